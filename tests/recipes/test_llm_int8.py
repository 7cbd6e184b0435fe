"""LLM.int8() (arXiv 2208.07339): outlier columns multiplied wide, the rest by vectors in INT8, against the formula in
plain torch and against bitsandbytes 0.50.

bitsandbytes on CPU differs in three ways. In training it multiplies X as it is with the decoded W (``MatMul8bitFp``),
so its INT8 forward runs in eval mode only. It takes X in float16. And it counts elements below the threshold that lie
in outlier columns when it looks for a row's scale, here and on CUDA; the paper's rest, and ours, has no such columns.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional as bnb
from torch import Tensor, nn

import qcompile
from qcompile import compat
from qcompile.ir.columns import take_columns
from qcompile.ir.operand import Operand
from qcompile.ir.outliers import OutlierColumns, Outliers
from qcompile.kernels.quantize import reference
from qcompile.kernels.statistics import STATISTICS
from qcompile.recipes import LLM_INT8
from qcompile.stored import PackedWeight
from tests.passes.harness import assert_same, compile_and_run, compiler

INPUTS, OUTPUTS = 256, 96
#: How many columns hold an element of 6 or more; of the last, 64 are taken.
COUNTS = [0, 1, 7, 100]
OPS = torch.ops.qcompile


def activations(count: int, *lead: int, inputs: int = INPUTS) -> Tensor:
    """Normal numbers below 6 with ``count`` outlier columns, each with an outlier in one row alone, all of different
    magnitude.
    """
    x = torch.randn(*lead, inputs).clamp(-4, 4)
    columns = torch.randperm(inputs)[:count]
    signs = torch.randn(count).sign()
    x.view(-1, inputs)[torch.arange(count) % x.view(-1, inputs).shape[0], columns] = signs * (6 + torch.arange(count))
    return x.requires_grad_()


def in_int8(rows: Tensor) -> Tensor:
    """round(127 x / c) · c / 127 with c the largest magnitude of each row; 127 / c rounded once, which torch's own
    ``127 / c`` is not.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    levels = torch.full_like(largest, 127)
    return torch.round(rows * (levels / largest)) * (largest / levels)


def untied(rows: Tensor) -> Tensor:
    """Float16 numbers, none of which lies half between two levels, where two roundings and one give other codes."""
    step = rows.abs().amax(-1, keepdim=True) / 127
    tied = ((rows / step).abs() % 1 - 0.5).abs() < 0.1
    return (rows - tied * 0.25 * step * rows.sign()).half().float()


def taken(x: Tensor, most: int = 64) -> Tensor:
    """Which columns are multiplied wide."""
    largest = x.detach().abs().flatten(0, -2).amax(0)
    return (largest >= 6) & (largest >= largest.sort(descending=True).values[min(most, len(largest)) - 1])


def as_read(x: Tensor) -> Tensor:
    """x as the product reads it, its outlier columns as they are."""
    wide = x.detach() * taken(x)
    return wide + in_int8(x.detach() - wide)


def decoded(layer: nn.Linear) -> Tensor:
    weight = layer.weight
    return weight.decoded() if isinstance(weight, PackedWeight) else in_int8(weight.detach())


def linear(stored: bool) -> nn.Linear:
    """The same float16 numbers in every call."""
    torch.manual_seed(3)
    layer = nn.Linear(INPUTS, OUTPUTS)
    layer.weight.data = untied(layer.weight.data)
    if stored:
        qcompile.pack_(layer, "int8 row")
    return layer


@pytest.fixture(params=[None, (9, 0)], ids=["decoded", "tensor cores"])
def capability(request: pytest.FixtureRequest) -> Any:
    """With and without INT8 tensor cores."""
    with mock.patch.object(compat, "tensor_core_capability", return_value=request.param):
        yield request.param


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "wide"])
def test_outputs_and_gradients_are_those_of_the_formula(stored, capability):
    """Y = X̃ Ŵᵀ + b, dX = dY Ŵ, dW = dYᵀ X̃: what X̃ leaves wide, and that X's gradient is masked nowhere. One graph for
    any number of outlier columns and tokens, and nothing that is kept for the backward of a stored weight.
    """
    layer = linear(stored)
    weight = decoded(layer)
    compiled, observations = compiler(layer, LLM_INT8, dynamic=True)
    for count, tokens in zip(COUNTS, (11, 5, 48, 33), strict=True):
        x = activations(count, 3, tokens)
        assert int(taken(x).sum()) == min(count, 64)
        y = compiled(x)
        assert_same(y.detach(), as_read(x) @ weight.T + layer.bias.detach())
        dy = torch.randn_like(y)
        leaves = [x, layer.bias, *([] if stored else [layer.weight])]
        expected = dy @ weight, dy.sum((0, 1)), dy.flatten(0, 1).T @ as_read(x).flatten(0, 1)
        assert_same(list(torch.autograd.grad(y, leaves, dy)), list(expected[: len(leaves)]))
    (observed,) = observations
    assert not (stored and observed.saved)


@pytest.mark.parametrize(
    ("activation", "weight"),
    [("int8 row", "int8 row"), ("e2m1 row", "e2m1 row"), ("e4m3 tensor", "e4m3 row"), ("midrise8 row", "midrise8 row")],
)
def test_on_tensor_cores_the_columns_are_one_more_product(activation, weight):
    """Codes go to their kernel, nothing of the rest is decoded, and 64 columns of W are, whatever lies beside its
    levels.
    """
    options = {"activation": f"{activation}; ste; columns", "weight": weight}
    layer, x = linear(stored=False).requires_grad_(False), activations(7, 3, 11).detach()
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        result = compile_and_run(layer, x, recipe=LLM_INT8, **options)
    decisions = result.decisions[0].operands
    read, weight = (OPS.fake_quantize(t, str(how), -1) for t, how in zip((x, layer.weight), decisions, strict=True))
    assert_same(result.outputs, read @ weight.T + layer.bias)
    assert result.count("mm_8bit", "post_grad_lower") == 1
    assert result.count("dequantize", "post_grad_lower") == result.count("restore_outliers", "post_grad_lower") == 0
    (wide,) = (line for line in result.program("post_grad_merge_quantize").splitlines() if "addmm.default(" in line)
    assert wide.strip().startswith(f'addmm_default: "f32[33, {OUTPUTS}]')
    assert f"[{OUTPUTS}, 64]" in result.program("post_grad_lower")


def test_codes_are_those_of_the_reference():
    """Bit for bit those of X without its columns, and of W; a row that only has outlier columns is all zeros."""
    x = activations(7, 33).detach()
    x[0, ~taken(x)] = 0
    wide = taken(x)
    read = OPS.fake_quantize(x, str(LLM_INT8.activation), -1)
    codes, scales = reference.quantize(x.masked_fill(wide, 0), "int8 row", -1)
    expected = reference.dequantize(codes, scales, "int8 row", -1, INPUTS, torch.float32)
    assert torch.equal(read, torch.where(wide, x, expected))


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def test_codes_are_those_of_bitsandbytes():
    """But where 127 x / c is nearly a tie: it multiplies by 127 / c rounded twice."""
    weight = torch.randn(512, INPUTS) * 0.05
    codes, scales, _ = bnb.int8_vectorwise_quant(weight.clone())
    stored = PackedWeight.of(weight, "int8 row")
    levels = OPS.recode(stored.parts["codes"], "int8 row", INPUTS, False)
    differ = levels != codes
    exact = weight.double() * 127 / weight.double().abs().amax(1, keepdim=True)
    assert ((exact.abs() % 1 - 0.5).abs() < 1e-5)[differ].all()
    torch.testing.assert_close(stored.parts["scales"].flatten() * 127, scales, rtol=2**-22, atol=0)


def linear_8bit() -> nn.Linear:
    """bitsandbytes' layer of the weight and the bias of :func:`linear`, on the CPU, in eval mode."""
    wide = linear(stored=False)
    layer = bitsandbytes.nn.Linear8bitLt(INPUTS, OUTPUTS, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(wide.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = wide.bias
    return layer.to("cpu").eval()


def test_outputs_are_those_of_bitsandbytes():
    """Where all elements of outlier columns reach 6, so that they are no part of its scales either. Float16 numbers, as
    it takes them.
    """
    compiled, _ = compiler(linear(stored=True), LLM_INT8, activation={"outliers": "columns(most=128)"})
    for count in COUNTS:
        x = activations(count, 3, 11).detach()
        wide = taken(x, INPUTS)
        x = torch.where(wide, x.sign() * (x.abs() + 6), untied(x * ~wide)).half().float()
        with torch.no_grad():
            assert_same(compiled(x), linear_8bit()(x))


def test_rows_are_scaled_finer_than_in_bitsandbytes():
    """Elements below the threshold in outlier columns: part of its scales, not of the paper's. Both err in the codes;
    ours by less.
    """
    layer, x = linear(stored=True), activations(7, 33).detach().half().float()
    x = torch.where(taken(x) & (x.abs() < 6), 5.5, x / 4 * (~taken(x)) + x * taken(x)).half().float()
    exact = x @ decoded(layer).T + layer.bias.detach()
    ours = compile_and_run(layer, x, recipe=LLM_INT8).outputs
    with torch.no_grad():
        theirs = linear_8bit()(x)
    assert (ours - exact).norm() < 0.5 * (theirs - exact).norm()


def test_gradients_are_those_of_bitsandbytes():
    """dX = dY Ŵ in training, where its CPU forward is the wide product."""
    x, layer = activations(7, 3, 11), linear_8bit().train()
    result = compile_and_run(linear(stored=True), x, recipe=LLM_INT8)
    dy = torch.randn(3, 11, OUTPUTS, generator=torch.Generator().manual_seed(7))
    assert_same(result.gradients[0], torch.autograd.grad(layer(x), x, dy)[0])


# --- what it costs, and what is said --------------------------------------------------------------------------------


class Adapted(nn.Module):
    """Two stored layers with an adapter beside the first."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        self.lora_A, self.lora_B = nn.Linear(64, 4, bias=False), nn.Linear(4, 128, bias=False)
        qcompile.pack_(self, "int8 row", skip="lora_*")

    def forward(self, x: Tensor, read: Any = lambda x: x) -> Tensor:
        hidden = nn.functional.linear(read(x), self.up.weight) + self.lora_B(self.lora_A(x))
        return nn.functional.linear(read(hidden * 3), self.down.weight)


def test_adapters_train_through_it():
    """Their gradients pass the second layer, of which outlier columns come and go with x."""
    torch.manual_seed(1)
    model = Adapted()
    x = activations(3, 2, 9, inputs=64)
    result = compile_and_run(model, x, recipe=LLM_INT8)
    outputs = model(x, lambda x: x + (as_read(x) - x).detach())
    assert_same(result.outputs, outputs.detach())
    dy = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(7))
    names = ["lora_A.weight", "lora_B.weight"]
    expected = torch.autograd.grad(outputs, [model.get_parameter(name) for name in names], dy)
    assert_same([result.gradients[name] for name in names], list(expected))
    assert [d.quantized for d in result.decisions] == [True, False, False, True]


def test_columns_are_counted_and_those_that_do_not_fit():
    """100 columns of 256: 64 wide, 36 in INT8. Every row counts, not a sample of them; what is wide is not clipped."""
    for count, columns, excess in ((100, 64, 36), (7, 7, 0), (0, 0, 0)):
        values = OPS.operand_statistics(activations(count, 2048), str(LLM_INT8.activation), -1).tolist()
        found = dict(zip(STATISTICS, values, strict=True))
        assert (found["columns"], found["excess"]) == (columns / INPUTS, excess / INPUTS)
        assert found["clipped"] == 0
        assert found["noise"] < 1e-3 or excess


def test_the_report_says_what_is_done():
    layer = linear(stored=True)
    report = qcompile.explain(layer, torch.randn(8, INPUTS), backend="qcompile_llm_int8")
    row = report.rows[0]
    assert row.formats == "int8 row + up to 64 columns ≥ 6 × int8 row"
    assert row.reason.startswith("weight stored as int8 row absmax even")


# --- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((INPUTS,), -1), ((0, 32), -1), ((5, 48), -1), ((2, 32, 5), 1)], ids=str)
def test_shapes(shape, axis):
    """One row, none, fewer columns than may be taken, and columns along another axis."""
    x = torch.randn(shape) * 3
    spec = OutlierColumns(threshold=6.0, most=64)
    taken = take_columns(x, spec, axis)
    rows = x.movedim(axis, -1)
    reach = (
        rows.abs().reshape(-1, rows.shape[-1]).max(0).values >= 6 if x.numel() else torch.zeros(32, dtype=torch.bool)
    )
    assert torch.equal(taken.rest.movedim(axis, -1), rows * ~reach)
    text = f"int8 row; ste; {spec}"
    read = OPS.fake_quantize(x, text, axis)
    assert torch.equal(read.movedim(axis, -1)[..., reach], rows[..., reach])
    assert taken.rest.stride() == x.stride()


def test_nothing_that_is_not_finite_disappears():
    """In a wide column it reaches every output of its row, and no other row."""
    layer = linear(stored=True)
    compiled, _ = compiler(layer, LLM_INT8)
    for bad in (float("nan"), float("inf")):
        x = activations(7, 33).detach()
        x[3, 5] = bad
        finite = compiled(x).isfinite()
        assert not finite[3].any()
        assert finite[torch.arange(33) != 3].all()


def test_a_quantized_input_of_a_convolution_keeps_its_columns():
    """No matrix product there: the decoded operand, columns restored, is what any other op reads."""
    model = nn.Conv1d(40, 48, 1)
    x = (torch.randn(2, 40, 9) * 3).requires_grad_()
    result = compile_and_run(model, x, recipe=LLM_INT8, min_side=0)
    assert result.quantized
    read = OPS.fake_quantize(x.detach(), str(LLM_INT8.activation), 1)
    weight = OPS.fake_quantize(model.weight.detach().flatten(1), "int8 row", -1).view_as(model.weight)
    assert_same(result.outputs, nn.functional.conv1d(read, weight, model.bias.detach()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("columns(threshold=0)", "columns: threshold must be positive and finite, got 0.0"),
        ("columns(threshold=six)", "outlier columns 'columns(threshold=six)': threshold='six' is not a number"),
        ("columns(most=0)", "columns: most must be an integer from 1 to 4096, got 0"),
        ("columns(most=1.5)", "outlier columns 'columns(most=1.5)': most='1.5' is not an integer"),
        ("columns(most=1,most=2)", "outlier columns 'columns(most=1,most=2)': a parameter is given twice"),
        ("columns(top=3)", "unknown columns 'top'"),
        ("columns(most=3", "outlier columns 'columns(most=3' is not 'columns(threshold=6.0,most=64)'"),
    ],
)
def test_what_is_not_understood(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Operand.parse(f"int8 row; ste; {text}")


def test_text():
    for spec in (OutlierColumns(), OutlierColumns(4.5, 16)):
        assert Outliers.parse(str(spec)) == spec
    assert LLM_INT8.override({"activation": {"outliers": "columns(most=8)"}}).activation.outliers.most == 8
    for text, why in (
        ("int8 row; dge; columns", r"columns\(...\) takes columns from the input that dge takes its slope from"),
        ("int8 row; ste; columns; hadamard(64)", r"columns\(...\) takes columns from what hadamard\(64\) changes"),
        ("int8 row; ste; columns; occ", "names more than one"),
    ):
        with pytest.raises(ValueError, match=why):
            Operand.parse(text)


@pytest.mark.inductor
@torch.no_grad()
def test_generated_code():
    """What Inductor makes of it, for two counts of outliers without another compilation."""
    torch._dynamo.reset()
    layer = linear(stored=True)
    compiled = torch.compile(layer, backend="qcompile_llm_int8", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (7, 100):
            x = activations(count, 33).detach()
            assert_same(compiled(x), as_read(x) @ decoded(layer).T + layer.bias)
