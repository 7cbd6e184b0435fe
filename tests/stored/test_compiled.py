"""Packed weights through the compiler: what the passes make of them, and that numbers are those of eager torch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.recipes import FP4, STORED
from qcompile.stored import PackedWeight
from tests.passes.harness import (
    QuantizedProducts,
    Result,
    assert_same,
    compile_and_run,
    compiler,
    fp4,
    leaf,
    run_eager,
)

NESTED = "nf4 block64 absmax_bnb; nested"
SPECS = ["nf4 block64", NESTED, "fp4bnb block64 absmax_bnb", "int4 block32", "int8 row", "e2m1 row",
         "e2m1 block16 e4m3", "e2m1 block32 e8m0", "midrise3 block64x64"]  # fmt: skip


class Layers(nn.Module):
    """Two linear layers, of which the first needs no gradient of its input unless that is asked for."""

    def __init__(self, spec: str = NESTED, **options) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 64, bias=False)
        qcompile.pack_(self, spec, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def saved_floats(result: Result) -> set[tuple[int, ...]]:
    """Shapes of the floating-point tensors kept for the backward that the program did not get as an input."""
    return {tuple(row["shape"]) for row in result.saved}


@pytest.mark.parametrize("spec", SPECS)
def test_forward_and_dgrad_read_the_codes(spec):
    """Products of codes in both directions, and of nothing that is kept: one decoded weight, or the scales of nested
    ones as float32, would show among what is saved.
    """
    model = Layers(spec)
    x = leaf(4, 7, 128)
    result = compile_and_run(model, x, recipe=STORED)
    assert_same((result.outputs, result.gradients), run_eager(model, x), 1e-6)
    assert result.fused() == Counter(fprop=2, dgrad=2)
    stored = [row["operands"][1].partition(";")[0] for row in result.gemms]
    assert stored == [str(model.up.weight.stored.quantizer)] * 4
    assert saved_floats(result) == {(28, 192)}  # gelu's input
    rest = "all else in high precision: the recipe quantizes none of its operands"
    assert {d.reason for d in result.decisions} == {f"weight stored as {model.up.weight.spec}; {rest}"}


def test_without_the_passes_the_decoded_weight_is_kept():
    """What the test above would look like if nothing was done: that it can fail at all."""
    result = compile_and_run(Layers(), leaf(4, 7, 128), recipe=STORED, enabled=False)
    assert {(128, 192), (192, 128)} & saved_floats(result)


@pytest.mark.parametrize(
    ("spec", "backward", "dgrad"),
    [("e2m1 row", "bf16", "dense"), ("e2m1 row", "fp8", "e4m3 row absmax even; ste"), (NESTED, "bf16", "dense")],
)
def test_a_recipe_decides_the_activation(spec, backward, dgrad):
    """FP4 of arXiv 2501.17116 with weights that are stored: activations are quantized as by the recipe, weights not
    again. With 8-bit gradients the codes of a row-scaled weight serve dgrad without their scales.
    """
    model, x = Layers(spec), leaf(4, 7, 128)
    recipe = fp4(backward=backward)
    result = compile_and_run(model, x, recipe=recipe)
    assert [row["operands"][0] for row in result.gemms] == [str(recipe.activation)] * 2 + [dgrad] * 2
    assert result.fused() == Counter(fprop=2, dgrad=2)
    assert result.count("quantize", "joint_audit") == 2 + 2 * (backward == "fp8")
    assert [d.operands[1] for d in result.decisions] == [None, None]
    assert result.decisions[0].reason == f"weight stored as {model.up.weight.spec}"
    if backward == "bf16":
        dense = Layers(spec)
        dense.load_state_dict(model.state_dict())
        qcompile.unpack_(dense)
        with QuantizedProducts(recipe.override({"weight": "off"})):
            expected = run_eager(dense, x)
        assert_same((result.outputs, result.gradients), expected)


def test_stored_weights_beside_wide_ones_that_train():
    """The recipe quantizes those as ever."""
    model = Layers("e2m1 row", skip="down")
    model.down.requires_grad_(True)
    result = compile_and_run(model, leaf(4, 128), recipe=fp4())
    assert [[bool(operand) for operand in d.operands] for d in result.decisions] == [[True, False], [True, True]]
    assert result.gradients["down.weight"] is not None


def test_layers_that_a_recipe_leaves_alone_still_read_codes():
    """skip= is about the activation: a stored weight cannot be made wide by it."""
    result = compile_and_run(Layers("e2m1 row"), leaf(4, 128), recipe=FP4, skip=["up"])
    assert result.fused() == Counter(fprop=2, dgrad=2)
    assert "all else in high precision: skip='up'" in result.decisions[0].reason
    assert result.gemms[0]["operands"][0] == "dense"


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 96) * 0.1)
        self.bias = nn.Parameter(torch.zeros(96))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x.view(-1, 128), self.weight).view(*x.shape[:-1], 96)


@pytest.mark.parametrize("spec", [NESTED, "e2m1 row"])
def test_a_weight_with_a_column_per_output(spec):
    """transformers' Conv1D: blocks lie along the axis that is contracted here too."""
    model, x = Conv1D(), leaf(3, 5, 128)
    wide = model.weight.detach().clone()
    qcompile.pack_(model, spec)
    assert torch.equal(model.weight.decoded(), PackedWeight.of(wide.t(), spec).decoded().t())
    result = compile_and_run(model, x, recipe=STORED)
    assert_same((result.outputs, result.gradients), run_eager(model, x), 1e-6)
    assert result.fused() == Counter(fprop=1, dgrad=1)


def test_autocast_decodes_to_16_bits():
    model, x = Layers(), leaf(4, 7, 128)

    def under():
        return torch.autocast("cpu", torch.bfloat16)

    result = compile_and_run(model, x, recipe=STORED, under=under)
    outputs, gradients = run_eager(model, x, under=under)
    assert_same(result.outputs, outputs, 2**-7)
    assert_same(result.gradients, gradients, 2**-6)
    assert {row["dtype"] for row in result.gemms} == {"bfloat16"}
    assert result.fused() == Counter(fprop=2, dgrad=2)


def test_checkpointed_layers():
    """Their products are traced twice, and read codes both times."""
    model, x = Layers(), leaf(4, 7, 128)
    result = compile_and_run(
        lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False), x, recipe=STORED
    )
    outputs, gradients = run_eager(model, x)
    assert_same((result.outputs, result.gradients[0]), (outputs, gradients[0]), 1e-6)
    assert all(row["fused"] for row in result.gemms)


def test_weights_can_change_and_batches_grow_without_recompiling():
    """Parts are inputs of the graph; what is written into them is read."""
    model = Layers()
    compiled, observations = compiler(model, STORED, dynamic=True)
    for rows in (3, 8):
        x = torch.randn(rows, 128)
        assert_same(compiled(x), model(x), 1e-6)
        with torch.no_grad():
            model.up.weight.mul_(3)
            model.down.weight.copy_(torch.randn(64, 192))
    assert len(observations) == 1


def test_another_spec_recompiles():
    """The text of the quantizer is in the program: numbers of another format must not be decoded by it."""
    model = Layers()
    compiled, observations = compiler(model, STORED)
    x = torch.randn(3, 128)
    compiled(x)
    qcompile.unpack_(model)
    qcompile.pack_(model, "int4 block32")
    assert_same(compiled(x), model(x), 1e-6)
    assert len(observations) == 2
