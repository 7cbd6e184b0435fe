"""Two processes over gloo against one process on the whole batch.

Rows are quantized one by one and weights are whole on every rank, so sharding the batch changes no code: what is left
is the order in which gradients are summed, first over a rank's rows and then over ranks. Per step that is a relative
error of at most R·2⁻²⁴ of the largest summand for the R = 36 rows; :func:`assert_same` allows four steps of it,
amplified tenfold by the momentum 1 / (1 − 0.9): 40·R·2⁻²⁴ ≈ 1e-4 of a parameter's largest *change*. A code that went
the other way would show as a step of the grid in one weight, at least a twelfth of its row's largest element.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from . import worker
from .ranks import WORLD, Ranks

TOLERANCE = 10 * worker.STEPS * 36 * 2.0**-24


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


#: Threads and a network that two processes of one machine can share.
GLOO = ({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},) * WORLD


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Ranks:
    return Ranks(worker.__file__, "ddp", tmp_path_factory.mktemp("ddp"), GLOO)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Ranks:
    return Ranks(worker.__file__, "fsdp", tmp_path_factory.mktemp("fsdp"), GLOO)


def single_process(recipe: str, regional: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and final parameters of one process on whole batches; ``regional`` compiles the blocks alone."""
    model = worker.Decoder()
    for module in model.blocks if regional else [model]:
        module.compile(backend=worker.backend_of(recipe), fullgraph=True)
    losses = worker.train(model, worker.sgd(model), worker.batches())
    return losses, worker.parameters_of(model)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Parameters equal up to ``TOLERANCE`` of what they were trained by, in the Euclidean norm: processors sum in other
    orders, and a number at a tie of the grid then gets the next code, which moves single elements by more.
    """
    start = worker.parameters_of(worker.Decoder())
    assert list(actual) == list(expected) == list(start)
    for name, value in expected.items():
        trained = float((value - start[name]).norm())
        assert trained > 0, f"{name} was not trained"
        error = float((actual[name] - value).norm())
        assert error <= TOLERANCE * trained + 2.0**-23 * float(value.norm()), (
            f"{name}: {error / trained:.2e} of the training"
        )


def assert_trains_like_one_process(recipe: str, ranks: list[dict[str, Any]], regional: bool = False) -> None:
    losses, parameters = single_process(recipe, regional)
    for rank in ranks:
        assert_same(rank["parameters"], parameters)
    assert all(torch.equal(ranks[0]["parameters"][name], ranks[1]["parameters"][name]) for name in parameters)
    if "losses" in ranks[0]:
        mean = [torch.stack(each).mean() for each in zip(*(rank["losses"] for rank in ranks), strict=True)]
        torch.testing.assert_close(torch.stack(mean), torch.stack(losses), rtol=1e-5, atol=0)


@pytest.mark.parametrize("recipe", ["fp4", "quest"])
def test_ddp_trains_like_one_process(recipe, ddp):
    assert_trains_like_one_process(f"qcompile_{recipe}", ddp(recipe))


def test_graphs_split_between_buckets_of_ddp(ddp):
    """Dynamo's DDPOptimizer hands the backend pieces of the graph, and weights must still be known as weights."""
    ranks = ddp("buckets")
    assert ranks[0]["graphs"] > 1
    assert_trains_like_one_process("qcompile_fp4", ranks)


def test_accumulation_under_ddp(ddp):
    assert_trains_like_one_process("qcompile_fp4", ddp("accumulating"))


def test_reports_are_merged_over_ranks(ddp):
    """What all ranks do alike is listed once; what one of them does not is a disagreement; bytes are added up."""
    first, second = ddp("reports")
    assert (first["same"], first["other"]) == (second["same"], second["other"])
    own, same, other = (json.loads(first[key]) for key in ("own", "same", "other"))
    assert same["ranks"] == [0, 1]
    assert same["disagreements"] == []
    assert {tuple(row["ranks"]) for row in same["rows"]} == {(0, 1)}
    assert [row | {"ranks": []} for row in same["rows"]] == own["rows"]
    assert same["code_bytes"] == 2 * own["code_bytes"] > 0

    layers = [f"blocks.{i}.up" for i in range(worker.LAYERS)]
    assert [line.partition(" (linear): rank 0: fprop quantized")[0] for line in other["disagreements"]] == layers
    assert all(line.endswith("| rank 1: skipped (skip='up')") for line in other["disagreements"])
    apart = [row for row in other["rows"] if row["ranks"] != [0, 1]]
    assert [(row["layer"], row["ranks"]) for row in apart if row["role"] in ("fprop", "-")] == [
        (layer, [rank]) for layer in layers for rank in range(WORLD)
    ]

    assert json.loads(second["group"])["ranks"] == [1]
    assert first["group"] == "Report.gather: rank 0 is not in the group whose reports it is to merge"


@pytest.mark.parametrize("recipe", ["fp4", "quest"])
def test_fsdp_trains_like_one_process(recipe, fsdp):
    """Every block compiled and sharded, as torch recommends; the head is outside of what is compiled."""
    assert_trains_like_one_process(f"qcompile_{recipe}", fsdp(recipe), regional=True)


def test_a_sharded_model_compiled_as_a_whole(fsdp):
    """Dynamo (2.13) compiles the blocks alone, FSDP's hooks breaking the graph in the loop: the head is as in eager."""
    assert_trains_like_one_process("qcompile_fp4", fsdp("whole"), regional=True)


def test_parameters_gathered_in_bfloat16(fsdp):
    """``MixedPrecisionPolicy``: weights are quantized from BF16 and gradients reduced in FP32, on the FP32 shards."""
    model = worker.Decoder().bfloat16()
    for block in model.blocks:
        block.compile(backend=worker.backend_of("qcompile_fp4"), fullgraph=True)
    worker.loss_of(model, worker.batches()[0]).backward()
    ranks = fsdp("bfloat16")
    for rank in ranks:
        for name, parameter in model.named_parameters():
            actual = rank["gradients"][name]
            assert actual.dtype == torch.float32
            # One process sums over both halves of the batch in BF16, whose last place is 2⁻⁸.
            assert torch.norm(actual - parameter.grad.float()) < 2**-6 * torch.norm(actual), name


def test_sharded_state_is_saved_and_loaded_bitwise(fsdp):
    """``torch.distributed.checkpoint`` of model and optimizer, under the names of the uncompiled model."""
    _, expected = single_process("qcompile_fp4", regional=True)
    for rank in fsdp("checkpoint"):
        assert rank["keys"] == sorted(worker.Decoder().state_dict())
        assert_same(rank["parameters"], expected)
        assert all(torch.equal(rank["resumed"][name], value) for name, value in rank["parameters"].items())
