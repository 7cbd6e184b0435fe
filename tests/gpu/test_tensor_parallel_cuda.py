"""Tensor parallelism on two GPUs over NCCL: run by hand (`pytest -n 0 -s FILE`), never in CI.

The worker and the definition are those of ``tests/loops/test_tensor_parallel.py``: one process quantizes operands as
the shards of two ranks, in eager mode. Kernels sum in another order than eager products do, 2⁻²⁴ relative in float32,
which can carry an element over a rounding boundary: the limits, and why, are those of ``test_distributed_cuda.py``.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from ..loops import tensor_parallel as worker
from ..loops.ranks import WORLD, Ranks
from ..loops.test_tensor_parallel import split
from ..models.reference import REFERENCES, Reference
from .test_distributed_cuda import LIMITS, error

pytestmark = [
    pytest.mark.skipif(
        not (torch.cuda.device_count() >= WORLD and dist.is_nccl_available()), reason="needs two GPUs and NCCL"
    ),
    pytest.mark.usefixtures("fresh_dynamo"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    """Two processes, each of which sees one GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    environments = [{"CUDA_VISIBLE_DEVICES": visible[rank], "QCOMPILE_TEST_DEVICE": "cuda"} for rank in range(WORLD)]
    return Ranks(worker.__file__, "tp_llama", tmp_path_factory.mktemp("tp"), environments, timeout=500)


@pytest.mark.parametrize("cell", ["trained_fp4", "trained_quest", "in_two_dimensions_fp4"])
def test_a_llama_on_two_gpus(cell, ranks):
    first, second = ranks(cell)
    model = split(worker.llama())
    operands = REFERENCES[f"qcompile_{cell.rpartition('_')[2]}"]
    expected = worker.train(model, lambda tokens: Reference(model, tokens, operands).on())
    assert all(torch.equal(first["parameters"][name], value) for name, value in second["parameters"].items())
    found = {
        "gradient": max(error(first["gradients"][name], value) for name, value in expected["gradients"].items()),
        "loss": float((first["losses"] - expected["losses"]).abs().max()),
    }
    print(f"\n{cell}: " + ", ".join(f"{what} {value:.1e}" for what, value in found.items()))
    assert all(value < LIMITS[what] for what, value in found.items()), found
