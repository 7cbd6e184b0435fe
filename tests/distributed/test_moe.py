"""transformers' mixtures of experts, compiled by layer and sharded by FSDP2 on two ranks, against one process.

Experts are one parameter of three axes, which FSDP2 shards along the first: whole experts, more of them on one rank.
Layers read gathered weights, so scales are those of one process however parameters are sharded. What would break: a
scale of a part of a row, an expert that is lost where ranks do not divide their number, products that are no longer
quantized behind FSDP's hooks, states or gradients of the wrong shard.

Rows are quantized one by one, so what is left is the order of sums over tokens, as in tests/loops/test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from ..loops.ranks import Ranks
from ..loops.worker import batches
from . import moe_worker as worker
from .test_gradients import GLOO, ONE_HOP, error

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("fresh_dynamo")]

#: Relative, L2: tokens of a batch times 2⁻²⁴, and ten times as much where momentum has added up.
TOLERANCE = 36 * 2.0**-24
QUANTIZED = ["mlp.experts.gate_up_proj grouped_mm True", "mlp.experts.down_proj grouped_mm True"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    return Ranks(worker.__file__, "moe", tmp_path_factory.mktemp("moe"), GLOO, timeout=400)


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative ones, L2, by name."""
    assert list(actual) == list(expected)
    return {
        name: float((actual[name] - value).float().norm() / value.float().norm()) for name, value in expected.items()
    }


@pytest.mark.parametrize("name", worker.MODELS)
def test_trains_like_one_process(name, ranks):
    model = worker.model_of(name)
    start, keys = worker.parameters_of(model), [*model.state_dict()]
    seen = worker.compile_layers(name, model, fullgraph=True)
    expected = worker.train(model, batches(worker.STEPS))
    assert worker.experts_in(seen) == QUANTIZED
    found = ranks(name)
    experts = worker.MODELS[name][2]
    assert [rank["local"] for rank in found] == [experts // 2 + 1, experts // 2]
    for rank in found:
        assert rank["placements"] == "(Shard(dim=0),)"
        assert rank["keys"] == keys
        assert rank["experts"] == QUANTIZED
        assert all(value < TOLERANCE for value in errors(rank["gradients"], expected["gradients"]).values())
        for parameter, value in expected["parameters"].items():
            moved = (value - start[parameter]).norm()
            assert moved > 0, parameter
            assert (rank["parameters"][parameter] - value).norm() < 10 * TOLERANCE * moved + 2**-23 * value.norm()
    first, second = (rank["parameters"] for rank in found)
    assert all(torch.equal(first[parameter], second[parameter]) for parameter in first)
    mean = [torch.stack(each).mean() for each in zip(*(rank["losses"] for rank in found), strict=True)]
    torch.testing.assert_close(torch.stack(mean), torch.stack(expected["losses"]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cell", ["rows", "columns", "apart"])
def test_how_experts_are_sharded_changes_no_bit(cell, ranks):
    """Scales are of whole rows although a rank has every other half of each, and products of a unit of their own are
    quantized as before.
    """
    for rank, other in zip(ranks(cell), ranks("mixtral"), strict=True):
        assert [text.removeprefix("mlp.") for text in rank["experts"]] == [t.removeprefix("mlp.") for t in QUANTIZED]
        for name, gradient in other["gradients"].items():
            assert torch.equal(rank["gradients"][name], gradient), name


def test_parameters_gathered_in_bfloat16(ranks):
    """Experts are quantized from BF16, and gradients are the FP32 mean of those of a process for each half of the
    batch, on FP32 shards.
    """
    model = worker.model_of("mixtral")
    for parameter in model.parameters():  # and no buffer
        parameter.data = parameter.data.bfloat16()
    worker.compile_layers("mixtral", model, fullgraph=True)
    halves = []
    for half in batches(1)[0].chunk(2):
        worker.loss(model, half).backward()
        halves.append(worker.gradients_of(model))
        model.zero_grad()
    expected = {name: (gradient.float() + halves[1][name].float()) / 2 for name, gradient in halves[0].items()}
    for rank in ranks("bfloat16"):
        assert rank["experts"] == QUANTIZED
        for name, gradient in expected.items():
            assert torch.equal(rank["gradients"][name], gradient), name


def test_gradients_travel_in_8_bits_and_a_checkpoint_resumes(ranks):
    wide = ranks("mixtral")[0]["gradients"]
    first, second = ranks("fp8")
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name
    experts = [name for name in wide if "experts" in name]
    assert len(experts) == 4
    for names in (experts, [*wide]):
        assert 0.001 < error({n: first["gradients"][n] for n in names}, {n: wide[n] for n in names}) < ONE_HOP
    assert 0.25 < first["sent"] < 0.26  # a byte per float32 number, and scales
    for rank in (first, second):
        for name, value in rank["whole"].items():
            assert torch.equal(rank["resumed"][name], value), name
            assert not torch.equal(value, rank["start"][name]), name
