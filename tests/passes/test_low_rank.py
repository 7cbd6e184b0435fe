"""What LoRA adds to a layer: where its factor is multiplied (`move_factors`), and sums that products take in
(`accumulate`).

Everything runs on the CPU under a claim of tensor cores. What would break: a gradient without its factor, a factor
applied twice, a sum that is read before it is whole, a bias that is lost or added for every term, and passes that are
saved nowhere because a tensor is written twice instead.
"""

from __future__ import annotations

import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile import compat
from qcompile.kernels.matmul.costs import RATES, hides_summand
from qcompile.recipes import FP4, STORED

from .harness import Result, assert_same, compile_and_run, run_eager
from .test_pipeline import wrong_values

#: What is tested here; runs unless it is disabled.
PASSES = ["move_factors", "join_products", "accumulate"]
NF4 = "nf4 block64"


@pytest.fixture(autouse=True)
def _tensor_cores():
    """Of a card for which few rows are decoded before the product, as many are."""
    with (
        mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)),
        mock.patch.object(compat, "card_name", return_value=RATES[0].card),
        mock.patch("qcompile.passes.choose_providers.providers.decodes_first", return_value=True),
    ):
        yield


class Adapted(nn.Module):
    """A layer of a stored weight with a low-rank product beside it, as PEFT writes it."""

    def __init__(self, size: int, out: int, factor: float = 2.0, rank: int = 4, bias: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(size, out, bias=bias)
        qcompile.pack_(self.base, NF4)
        self.lora_a = nn.Parameter(torch.randn(rank, size) / 8)
        self.lora_b = nn.Parameter(torch.randn(out, rank) / 8)
        self.factor = factor

    def low(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.lora_a), self.lora_b) * self.factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.low(x)


class Block(nn.Module):
    """Two layers that share x, and one that reads both: dX is a sum of four products."""

    def __init__(self, factor: float = 2.0, rank: int = 4, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = (Adapted(512, 576, factor, rank, bias) for _ in range(2))
        self.down = Adapted(576, 512, factor, rank, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.rms_norm(x, (512,))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def inputs(dtype: torch.dtype = torch.float32, rows: int = 21) -> torch.Tensor:
    return torch.randn(3, rows, 512, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def run(model: nn.Module, x: torch.Tensor, without: list[str] | None = None, **options) -> Result:
    """With all the passes, or ``without`` some, whatever the recipe."""
    return compile_and_run(
        model, x, recipe=options.pop("recipe", STORED), enable_passes=PASSES, disable_passes=without or [], **options
    )


def lines(result: Result, stage: str, call: str) -> list[str]:
    """Calls in the programs of a stage, over forward and backward."""
    programs = [
        text for o in result.observations for name, text in o.programs.items() if re.fullmatch(rf"{stage}(_\d+)?", name)
    ]
    return [line for text in programs for line in text.splitlines() if f"{call}.default(" in line or f"{call}(" in line]


# --- factors --------------------------------------------------------------------------------------------------------


def scalings(result: Result, stage: str, factor: float) -> list[int]:
    """How many numbers per row a factor multiplies, wherever one does."""
    calls = lines(result, stage, "aten.mul.Tensor")
    return [int(re.search(r"\w+\[([^]]+)\]", line)[1].split(",")[-1]) for line in calls if f", {factor})" in line]  # type: ignore[index]


@pytest.mark.parametrize("factor", [2.0, 0.3])
def test_factors_multiply_rank_instead_of_columns(factor):
    """Once per layer and direction: dB reads what the forward multiplied."""
    x = inputs()
    off, on = (run(Block(factor), x, disabled) for disabled in (PASSES, ["accumulate"]))
    assert sorted(scalings(off, "joint_hints", factor)) == [512] * 2 + [576] * 4
    assert scalings(on, "joint_hints", factor) == [4] * 6
    assert_same((on.outputs, on.gradients), run_eager(Block(factor), x))


@pytest.mark.parametrize("factor", [2.0, 0.125])
def test_powers_of_two_change_no_bit(factor):
    x = inputs(torch.bfloat16)
    off, on = (run(Block(factor).to(torch.bfloat16), x, disabled) for disabled in (PASSES, ["accumulate"]))
    assert torch.equal(on.outputs, off.outputs)
    for name, gradient in off.gradients.items():
        assert torch.equal(on.gradients[name], gradient), name


def test_other_factors_are_rounded_as_often_as_in_eager_torch():
    """In BF16, against the same in float64."""
    model, x = Block(0.3).to(torch.bfloat16), inputs(torch.bfloat16)
    exact = run_eager(Block(0.3).double(), x.detach().double().requires_grad_())[0]
    compiled, eager = run(model, x).outputs, run_eager(model, x)[0]
    errors = [(y.double() - exact).norm() / exact.norm() for y in (compiled, eager)]
    assert errors[0] < 1.05 * errors[1]


class Read(nn.Module):
    """Adds the low-rank product to a layer by a function of the two."""

    def __init__(self, function, rank: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = Adapted(512, 576, 2.0, rank), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


def later_first(layer, x):
    """Two products of one small operand; the result of the second is multiplied first."""
    low = F.linear(x[0], layer.lora_a)
    first, second = F.linear(low, layer.lora_b), F.linear(low, layer.lora_b.sin())
    return (second * 2.0).sin() + first * 2.0 + layer.base(x[0])


def test_products_of_one_operand_in_any_order():
    model, x = Read(later_first), inputs()
    result = run(model, x)
    assert scalings(result, "joint_hints", 2.0) == [4] * 3  # dB of both reads what the forward multiplied
    assert_same((result.outputs, result.gradients), run_eager(model, x))


OUT_OF_RANGE = {
    # A product of 512 numbers near 2000 by as many near 1 is above FP16's 65504 before it is multiplied by 2⁻¹⁰.
    "down, in front of a product": (lambda layer, x: F.linear((x + 2000) * 2.0**-10, layer.lora_a + 1), torch.float16),
    "up, behind one": (
        lambda layer, x: F.linear(x + 64, layer.lora_a + 1) @ (layer.lora_b.T / 2**8) * 4.0,
        torch.float16,
    ),
    "to infinity": (lambda layer, x: F.linear(F.linear(x, layer.lora_a), layer.lora_b) * float("inf"), torch.float32),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_numbers_that_stay_in_range(case):
    """What is finite in eager torch is finite, and nothing is NaN that is not NaN there."""
    function, dtype = OUT_OF_RANGE[case]
    model = Read(lambda layer, x: (function(layer, x), layer.base(x))).to(dtype)
    with torch.no_grad():
        expected = model(inputs(dtype))[0]
        result = run(model, inputs(dtype)).outputs[0]
    assert not expected.isnan().any()
    torch.testing.assert_close(result, expected, rtol=2**-8, atol=0)


def read_twice(layer, x):
    low = F.linear(F.linear(x, layer.lora_a), layer.lora_b)
    return low.sigmoid() + layer.base(x) + low * 2.0


KEPT = {
    "rank that is not small": (lambda layer, x: layer(x), 200),
    "a product that something else reads": (read_twice, 4),
    "a factor per column": (lambda layer, x: layer.base(x) + layer.low(x) * layer.lora_b[:, 0], 4),
}


@pytest.mark.parametrize("case", KEPT)
def test_factors_that_stay(case):
    """And what is computed is right all the same."""
    function, rank = KEPT[case]
    model, x = Read(function, rank), inputs()
    on, off = (run(model, x, disabled) for disabled in ([], PASSES))
    if case != "a factor per column":  # that of the adapter does move
        assert scalings(on, "joint_hints", 2.0) == scalings(off, "joint_hints", 2.0)
    assert_same((on.outputs, on.gradients), run_eager(model, x))


# --- products that read one tensor ----------------------------------------------------------------------------------


def test_thin_products_of_one_tensor_become_one():
    """Of gate and up, forward and for the gradients of their weights, which do not overlap."""
    model, x = Block(), inputs()
    with mock.patch("qcompile.passes.join_products.rates_of", return_value=(replace(RATES[0], launch=0.0), True)):
        on = run(model, x)
    joined = [len(lines(on, stage, "aten.mm")) for stage in ("post_grad_lower", "post_grad_join_products")]
    assert joined[0] - joined[1] == 2
    assert_same((on.outputs, on.gradients), run_eager(model, x))
    gate, up = (on.gradients[f"{name}.lora_a"] for name in ("gate", "up"))
    before = up.clone()
    gate.zero_()
    assert torch.equal(up, before)
    assert gate.is_contiguous()
    assert up.is_contiguous()


def test_few_rows_are_read_as_often_as_before():
    """Where another launch takes longer."""
    result = run(Block(), inputs())
    assert len(lines(result, "post_grad_lower", "aten.mm")) == len(lines(result, "post_grad_join_products", "aten.mm"))


@torch.library.custom_op("qcompile_low_rank::dense", mutates_args=())
def dense(x: torch.Tensor) -> torch.Tensor:
    """What a kernel of a user may take for granted that is given what such a product returns."""
    assert x.is_contiguous()
    return x + 1


dense.register_fake(torch.empty_like)


READ_BY_ADDRESS = {
    "a user's op": dense,
    "as_strided": lambda y: y.as_strided((5, 5), (3, 1)),
    "a view in a longer dtype": lambda y: y.view(-1, 4).view(torch.int64),
}


@pytest.mark.parametrize("case", READ_BY_ADDRESS)
def test_what_depends_on_memory_finds_it_as_it_was(case):
    def function(layer, x):
        row = x[0]
        first, second = F.linear(row, layer.lora_a), F.linear(row, layer.lora_c)
        return layer.base(x), READ_BY_ADDRESS[case](first), second.sin()

    model, x = Read(function), inputs().detach()
    model.layer.lora_c = nn.Parameter(torch.randn(3, 512))
    with (
        torch.no_grad(),
        mock.patch("qcompile.passes.join_products.rates_of", return_value=(replace(RATES[0], launch=0.0), True)),
    ):
        result = run(model, x)
        assert "aten.cat" in result.program("post_grad_join_products")
        for found, expected in zip(result.outputs, model(x), strict=True):
            torch.testing.assert_close(found.float(), expected.float(), rtol=1e-4, atol=1e-4)


def test_products_of_a_joined_one_are_joined_as_well():
    """What two of them share is a part of the first product then."""

    def function(layer, x):
        row = x[0]
        first, second = F.linear(row, layer.lora_a), F.linear(row, layer.lora_a.sin())
        narrow = layer.lora_b[:8]
        return layer.base(x) + F.linear(first, narrow).sum() + F.linear(first, narrow.cos()).sum() + second.sum()

    model, x = Read(function), inputs()
    with mock.patch("qcompile.passes.join_products.rates_of", return_value=(replace(RATES[0], launch=0.0), True)):
        result = run(model, x)
    assert_same((result.outputs, result.gradients), run_eager(model, x))


# --- sums -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_products_accumulate(bias):
    """Three layers forward; down's dX, and that of gate and up as one chain. No sum of products is left to add."""
    model, x = Block(bias=bias), inputs()
    result = run(model, x)
    assert result.count("mm_add", "post_grad_accumulate") == 3 + 1 + 3
    assert_same((result.outputs, result.gradients), run_eager(model, x))
    for line in lines(result, "post_grad_accumulate", "aten.add.Tensor"):
        assert "view" not in line.partition("add.Tensor(")[2].partition(",")[0] or "f32[3, 21, 512]" in line


def test_low_rank_products_of_one_sum_become_one():
    """Where it takes longer to write one of them and to read it than to launch two small kernels."""
    model, x = Block(), inputs(rows=2000)
    result = run(model, x)
    assert len(lines(result, "post_grad_accumulate", "aten.cat")) == 2
    assert result.count("mm_add", "post_grad_accumulate") == 3 + 1 + 2
    assert_same((result.outputs, result.gradients), run_eager(model, x))


def test_bfloat16_is_as_near_as_eager_torch():
    model, x = Block().to(torch.bfloat16), inputs(torch.bfloat16)
    exact = run_eager(Block().double(), x.detach().double().requires_grad_())
    compiled, eager = run(model, x), run_eager(model, x)
    for name, gradient in exact[1].items():
        errors = [(g[name].double() - gradient).norm() / gradient.norm() for g in (compiled.gradients, eager[1])]
        assert errors[0] < 1.1 * errors[1], name


def test_nothing_accumulates_elsewhere():
    """Other devices' products copy the summand first."""
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        assert run(Block(), inputs()).count("mm_add", "post_grad_accumulate") == 0


def test_rows_that_are_counted_at_run_time():
    """Products decode by themselves then, so they come first: the low-rank ones add to gate and up, which are saved."""
    model, x = Block(), inputs()
    torch._dynamo.mark_dynamic(x, 1)
    result = run(model, x)
    assert result.count("mm_stored", "post_grad_accumulate") == 6
    assert result.count("mm_add", "post_grad_accumulate") == 2
    assert scalings(result, "joint_hints", 2.0) == [4] * 6
    assert_same((result.outputs, result.gradients), run_eager(model, x))


def test_a_bias_beside_a_product_that_comes_first():
    """The low-rank product's own is a term that the first product cannot take in."""

    def function(layer, x):
        y = layer.base(x) + F.linear(F.linear(x, layer.lora_a), layer.lora_b, layer.base.bias)
        return y @ torch.ones(576, 3)

    torch.manual_seed(0)
    model, x = Read(function), inputs()
    model.layer = Adapted(512, 576, bias=True)
    torch._dynamo.mark_dynamic(x, 1)
    result = run(model, x)
    assert result.count("mm_stored", "post_grad_accumulate") == 2
    assert_same((result.outputs, result.gradients), run_eager(model, x))


@pytest.mark.parametrize("rank", [4, 8])
def test_products_on_8_bit_codes_come_first(rank):
    """They add nothing. Low-rank products add to gate and up, which the backward reads: these are written once so. What
    down adds up is left to the kernel that reads the residual as well.
    """
    model, x = Block(rank=rank).to(torch.bfloat16), inputs(torch.bfloat16)
    for layer in (model.gate, model.up, model.down):
        qcompile.unpack_(layer.base)
        qcompile.pack_(layer.base, "e2m1 row")
    recipe = FP4.override({"activation": "e2m1 row", "min_side": 0, "skip": ["*lora*"], "backward": "bf16"})
    on, off = (run(model, x, disabled, recipe=recipe) for disabled in ([], PASSES))
    programs = [on.program(f"post_grad_accumulate{n}") for n in ("", "_2")]
    assert [text.count("qcompile.mm_add.default(") for text in programs] == [2, 1 + 3]
    assert on.count("mm_8bit", "post_grad_accumulate") == 3
    for name, gradient in off.gradients.items():
        assert (on.gradients[name] - gradient).norm() < 2**-6 * gradient.norm(), name


LEFT_ALONE = {
    "one product and no other": lambda layer, x: layer.base(x) + F.silu(layer.base.bias),
    "dtypes that differ": lambda layer, x: layer.base(x) + layer.low(x).double(),
    "a product that is read twice": lambda layer, x: (y := layer.base(x)) + (low := layer.low(x)) + (y * low).sin(),
    "a weighted sum": lambda layer, x: torch.add(layer.base(x), layer.low(x), alpha=3),
    "rows in another order": lambda layer, x: layer.base(x).transpose(0, 1) + layer.low(x.transpose(0, 1)),
    "a sum that is broadcast": lambda layer, x: layer.base(x) + layer.low(x[:1]),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_sums_that_stay(case):
    torch.manual_seed(0)
    model, x = Read(LEFT_ALONE[case]), inputs()
    model.layer = Adapted(512, 576, bias=True)
    result = run(model, x)
    (forward, *_) = (o.programs["post_grad_accumulate"] for o in result.observations)
    assert "mm_add" not in forward
    assert_same((result.outputs, result.gradients), run_eager(model, x))


def test_sums_of_numbers_stay():
    """Of losses, say, which have no columns."""
    model, x = Read(lambda layer, x: layer(x).square().mean() + layer.low(x).abs().mean()), inputs()
    result = run(model, x)
    assert_same((result.outputs, result.gradients), run_eager(model, x))


def test_several_terms_beside_products():
    """Their order is kept; products are added last."""

    def function(layer, x):
        return x[..., :1] * layer.base.bias + (layer.base(x) + (layer.low(x) + layer.low(2 * x))) + layer.lora_b[:, 0]

    torch.manual_seed(0)
    model, x = Read(function), inputs()
    model.layer = Adapted(512, 576, bias=True)
    result = run(model, x)
    assert result.count("mm_add", "post_grad_accumulate") >= 2
    assert_same((result.outputs, result.gradients), run_eager(model, x))


def test_fake_values_are_right():
    """A view of a sum that was replaced must not keep memory that nothing makes: Inductor decides by it what may be
    written in place.
    """
    from torch._inductor.fx_utils import FakeTensorUpdater

    checked = []
    real = FakeTensorUpdater.incremental_update

    def update(updater):
        graph = updater.gm.graph if hasattr(updater, "gm") else updater.graph
        stale = {str(node) for node in graph.nodes if updater.hash_node(node) not in updater.processed_hashes}
        assert not [line for line in wrong_values(graph) if line.partition(" ")[0].strip("%") not in stale]
        checked.append("mm_add" in str(graph))
        return real(updater)

    with mock.patch.object(FakeTensorUpdater, "incremental_update", update):
        run(Block(), inputs())
    assert any(checked)


def test_what_hides_a_summand():
    """Adapters do not; the thinnest layers of models that are worth it do."""
    for rates in RATES:
        assert not hides_summand(128, torch.bfloat16, rates)
        assert hides_summand(1024, torch.bfloat16, rates)
