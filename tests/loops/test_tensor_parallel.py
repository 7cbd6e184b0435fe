"""DTensors on two processes against one process, on which operands are quantized as the shards of the two.

The definition is that every rank quantizes what it holds. Where the contraction is whole on every rank this is what one
process does with the whole tensor; where it is sharded, a row has one scale per shard. One process reproduces the
latter by splitting operands first (:func:`by_shards`) and layers (:class:`Split`). The reference of the zoo's tests
quantizes; it shares no code with the package.

The sum over ranks is in another order than one process has it, and gradients are sums over K ≤ 96 terms or 48 tokens:
``2e-5`` of the largest element is allowed, some 300 roundings of 2⁻²⁴. Another code would be a step of the grid, at
least a twelfth of a row's largest element. After an optimizer step of momentum such differences grow: tenfold.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement

from ..models.reference import REFERENCES, Reference
from ..passes.harness import assert_same
from . import tensor_parallel as worker
from .ranks import WORLD, Ranks

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

each_recipe = pytest.mark.parametrize("recipe", ["fp4", "quest"])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    gloo = ({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},) * WORLD
    return Ranks(worker.__file__, "tp", tmp_path_factory.mktemp("tp"), gloo, timeout=400)


class Split(nn.Module):
    """A linear layer as the sum of what the ranks compute of it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(x.chunk(WORLD, -1), self.weight.chunk(WORLD, 1), strict=True)
        y = sum(nn.functional.linear(a, w) for a, w in parts)
        return y if self.bias is None else y + self.bias  # type: ignore[return-value]


def split(model: nn.Module) -> nn.Module:
    """``model`` with the layers split whose inputs the ranks share out."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in worker.ROWWISE:
                setattr(parent, name, Split(child))
    return model


def by_shards(x: Tensor, placement: Placement, axis: int, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    dim = getattr(placement, "dim", None)
    parts = [x] if dim is None else x.chunk(WORLD, dim)
    return torch.cat([quantize(part.movedim(axis, -1)).movedim(-1, axis) for part in parts], dim or 0)


@pytest.mark.parametrize("name", worker.PRODUCTS)
def test_products_of_dtensors(name, ranks):
    product, operands = worker.PRODUCTS[name], REFERENCES["qcompile_fp4"]
    x, w = (worker.tokens_with_outliers(*shape).requires_grad_() for shape in (product.x, product.w))
    y = product.function(
        by_shards(x, product.x_placement, product.axes[0], operands.activation),
        by_shards(w, product.w_placement, product.axes[1], operands.weight),
    )
    y.square().mean().backward()
    for rank in ranks(name):
        assert_same(rank, {"y": y.detach(), "x": x.grad, "w": w.grad})


@each_recipe
def test_an_mlp(recipe, ranks):
    """Output, all gradients; products are fused and codes saved on local tensors; layers have their names."""
    model, x = split(worker.MLP()), worker.tokens_with_outliers(6, 5, 48).requires_grad_()
    with Reference(model, x, REFERENCES[f"qcompile_{recipe}"]).on():
        y = model(x)
    y.square().mean().backward()
    expected = {"y": y.detach(), "gradients": {"x": x.grad, **worker.gradients_of(model)}}
    for rank in ranks(f"mlp_{recipe}"):
        assert_same({key: rank[key] for key in expected}, expected)
        assert all(product["fused"] for product in rank["gemms"])
        assert sorted((p["site"], p["role"]) for p in rank["gemms"]) == [
            (site, role) for site in (0, 1) for role in ("dgrad", "fprop", "wgrad")
        ]
        # 30 rows of 48 inputs, whole, and of 40 of the 80 hidden units: half a byte each.
        assert {30 * 48 // 2, 30 * 40 // 2} <= {t["bytes"] for t in rank["saved"] if t["codes"]}
        (up, _, up_note), (down, _, down_note) = rank["plan"]
        assert (up, down) == ("up", "down")
        assert "shard" not in up_note
        assert down_note.endswith("one scale per row and shard (2 ranks)")


def test_rotations_are_of_local_rows(ranks):
    """80 hidden units would have blocks of 16; the 40 of a rank have blocks of 8."""
    (_, _, up_note), (_, _, down_note) = ranks("mlp_quest")[0]["plan"]
    assert (up_note, down_note.partition(";")[0]) == ("hadamard(16), since K = 48", "hadamard(8), since K = 40")


@each_recipe
def test_without_gradients(recipe, ranks):
    for rank, trained in zip(ranks(f"mlp_without_gradients_{recipe}"), ranks(f"mlp_{recipe}"), strict=True):
        assert_same(rank, dict.fromkeys(("no_grad", "inference_mode"), trained["y"]))


def test_the_plan_says_which_scales_are_of_one_shard(ranks):
    assert list(ranks("scopes")[0].values()) == [
        "one scale per tensor and shard (2 ranks); outliers per row and shard (2 ranks)",
        "one scale per row and shard (2 ranks); outliers per tensor and shard (2 ranks)",
        "outliers per row and shard (2 ranks)",
    ]


@pytest.mark.parametrize(
    ("how", "recipe"), [("llama_trained", "fp4"), ("llama_trained", "quest"), ("llama_in_two_dimensions", "fp4")]
)
def test_a_llama(how, recipe, ranks):
    """Sequence-parallel norms, column- and row-wise projections; FSDP2 around that. Losses, all gradients, steps."""
    model = split(worker.llama())
    operands = REFERENCES[f"qcompile_{recipe}"]
    expected = worker.train(model, lambda tokens: Reference(model, tokens, operands).on())
    for rank in ranks(f"{how}_{recipe}"):
        for key, tolerance in (("gradients", 2e-5), ("losses", 2e-5), ("parameters", 2e-4)):
            assert_same(rank[key], expected[key], tolerance)


@each_recipe
def test_the_layers_of_a_llama(recipe, ranks):
    """Every projection of every layer is quantized under its own name, forward and backward."""
    projections = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
    names = {f"model.layers.{i}.{name}" for i in range(worker.LAYERS) for name in projections}
    for rank in ranks(f"llama_trained_{recipe}"):
        assert {name for name, quantized, _ in rank["plan"] if quantized} == names
        assert sum(set(product["operands"]) != {"dense"} for product in rank["gemms"]) == 3 * len(names)


def test_reports_of_shards(ranks):
    for rank in ranks("report"):
        own, merged = json.loads(rank["own"]), json.loads(rank["merged"])
        assert [(row["layer"], row["role"]) for row in own["rows"]] == [
            (layer, role) for layer in ("up", "down") for role in ("fprop", "dgrad", "wgrad")
        ]
        assert all(row["decision"] == "quantized" for row in own["rows"])
        assert own["remarks"] == []
        assert "one scale per row and shard (2 ranks)" in own["rows"][3]["reason"]
        assert merged["disagreements"] == []
        assert merged["code_bytes"] == 2 * own["code_bytes"] > 0


def test_the_monitor_watches_shards(ranks):
    """Ranks share the input of the first layer and none of the other operands."""
    first, second = ranks("monitored")
    assert first["layers"] == second["layers"] == ["up", "up", "down", "down"]
    (a, *rest), (b, *others) = (rank["sqnr"][-1].tolist() for rank in (first, second))
    assert a == b > 15
    assert all(10 < x < 40 and x != y for x, y in zip(rest, others, strict=True))
