"""Detection: every spelling of a product, one row each, compared with the same spelling on operands quantized by hand.

A row that passes says four things: the site was found with the right kinds and axes, only its operands were quantized,
along the contraction axis, and forward and every gradient equal eager torch's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import (
    ACTIVATION,
    DISTINCT,
    WEIGHT,
    assert_same,
    backward,
    compile_and_run,
    compiler,
    fake_quantize,
    leaf,
)

A, W = "activation", "weight"
ALL_FUSED = {"fprop": 1, "dgrad": 1, "wgrad": 1}
BACKWARD_FUSED = {"dgrad": 1, "wgrad": 1}


@dataclass
class Row:
    """``f(m, x)`` with weight ``m.w`` of shape ``w`` and bias ``m.b``; ``axes`` are those of x and m.w as they are
    stored.
    """

    op: str
    f: Callable[[Any, Tensor], Tensor]
    x: tuple[int, ...]
    w: tuple[int, ...]
    axes: tuple[int, int] = (-1, -1)
    slots: tuple[tuple[int, str], ...] = ((-1, A), (-1, W))
    b: tuple[int, ...] = (11,)
    fused: dict[str, int] = field(default_factory=lambda: ALL_FUSED)
    note: str = ""
    quantize_x: Callable[[Tensor], Tensor] | None = None
    quantize_w: Callable[[Tensor], Tensor] | None = None


class Layer(nn.Module):
    """A function of x with a weight and a bias."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(row.w)), nn.Parameter(torch.randn(row.b))
        self.f = row.f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


MM = ((-1, A), (-2, W))
LEFT = ((-1, W), (-2, A))


def whole_sample(x: Tensor) -> Tensor:
    return fake_quantize(x.flatten(1), ACTIVATION, -1).view_as(x)


def filters(w: Tensor) -> Tensor:
    return fake_quantize(w.flatten(1), WEIGHT, -1).view_as(w)


def windows_2d(x: Tensor) -> Tensor:
    """3×3 windows of [B, C, 9, 12], each quantized as one row, by unfold and fold."""
    rows = fake_quantize(F.unfold(x, 3, stride=3), ACTIVATION, 1)
    return F.fold(rows, x.shape[2:], 3, stride=3)


def time_batch_channels(x: Tensor) -> Tensor:
    """One scale per sample of [T, B, C]."""
    return whole_sample(x.transpose(0, 1)).transpose(0, 1).contiguous()


def filters_last(w: Tensor) -> Tensor:
    """One scale per output channel of [window, channels, outputs]."""
    return filters(w.permute(2, 0, 1)).permute(1, 2, 0).contiguous()


def windows_1d(x: Tensor) -> Tensor:
    batch, channels, length = x.shape
    rows = x.view(batch, channels, length // 4, 4).transpose(1, 2).reshape(batch, length // 4, channels * 4)
    rows = fake_quantize(rows, ACTIVATION, -1)
    return rows.view(batch, length // 4, channels, 4).transpose(1, 2).reshape(x.shape)


PER_SAMPLE = "one scale per sample: windows overlap or leave a rest, so a position has no scale of its own"
CONV = {"fused": {}, "quantize_w": filters}
OVERLAPPING = {**CONV, "quantize_x": whole_sample, "note": PER_SAMPLE, "b": (5,)}

ROWS: dict[str, Row] = {
    "linear": Row("linear", lambda m, x: F.linear(x, m.w), (3, 5, 37), (11, 37)),
    "linear bias": Row("linear", lambda m, x: F.linear(x, m.w, m.b), (3, 5, 37), (11, 37)),
    "linear keywords": Row("linear", lambda m, x: F.linear(input=x, weight=m.w, bias=m.b), (5, 37), (11, 37)),
    "linear of a vector": Row("linear", lambda m, x: F.linear(x, m.w), (37,), (11, 37)),
    "linear 5-D": Row("linear", lambda m, x: F.linear(x, m.w), (2, 1, 3, 2, 37), (11, 37)),
    "linear K = 2": Row("linear", lambda m, x: F.linear(x, m.w), (3, 2), (3, 2)),
    "@": Row("matmul", lambda m, x: x @ m.w, (3, 5, 37), (37, 11), (-1, 0), MM),
    "@ W.T": Row("matmul", lambda m, x: x @ m.w.T, (3, 5, 37), (11, 37), slots=MM),
    "@ W.mT of experts": Row("matmul", lambda m, x: x @ m.w.mT, (3, 5, 37), (3, 11, 37), slots=MM),
    "W @ x": Row("matmul", lambda m, x: m.w @ x, (37, 5), (11, 37), (0, -1), LEFT),
    "W @ batch": Row("matmul", lambda m, x: m.w @ x, (3, 37, 5), (11, 37), (1, -1), LEFT),
    "@=": Row("matmul", lambda m, x: _imatmul(x * 1, m.w), (5, 37), (37, 37), (-1, 0), MM),
    "__rmatmul__": Row("matmul", lambda m, x: x.__rmatmul__(m.w), (37, 5), (11, 37), (0, -1), LEFT),
    "torch.matmul keywords": Row(
        "matmul", lambda m, x: torch.matmul(input=x, other=m.w), (5, 37), (37, 11), (-1, 0), MM
    ),
    "Tensor.matmul keyword": Row("matmul", lambda m, x: x.matmul(other=m.w), (5, 37), (37, 11), (-1, 0), MM),
    "linalg.matmul": Row("matmul", lambda m, x: torch.linalg.matmul(x, m.w), (5, 37), (37, 11), (-1, 0), MM),
    "matmul by vector": Row("matmul", lambda m, x: x @ m.w, (5, 37), (37,), fused={}),
    "vector matmul": Row("matmul", lambda m, x: x @ m.w, (37,), (37, 11), (-1, 0), MM),
    "matmul 5-D": Row("matmul", lambda m, x: x @ m.w, (2, 1, 3, 5, 37), (37, 11), (-1, 0), MM),
    # The weight is broadcast over the batch, so its codes are no operand of a plain product; the activation's are.
    "matmul broadcast": Row(
        "matmul",
        lambda m, x: x @ m.w,
        (3, 4, 5, 37),
        (4, 37, 11),
        (-1, 1),
        MM,
        fused={"fprop": 1, "wgrad": 1},
    ),
    "mm": Row("mm", lambda m, x: torch.mm(x, m.w), (5, 37), (37, 11), (-1, 0), MM),
    "mm keyword": Row("mm", lambda m, x: torch.mm(x, mat2=m.w), (5, 37), (37, 11), (-1, 0), MM),
    "Tensor.mm of W.t()": Row("mm", lambda m, x: x.mm(m.w.t()), (5, 37), (11, 37), slots=MM),
    "aten.mm": Row("mm", lambda m, x: torch.ops.aten.mm(x, m.w), (5, 37), (37, 11), (-1, 0), MM),
    "aten.mm.default": Row("mm", lambda m, x: torch.ops.aten.mm.default(x, m.w), (5, 37), (37, 11), (-1, 0), MM),
    "mv": Row("mv", lambda m, x: torch.mv(m.w, x), (37,), (11, 37), slots=((-1, W), (-1, A)), fused={}),
    "addmv": Row("addmv", lambda m, x: torch.addmv(m.b, m.w, x), (37,), (11, 37), slots=((-1, W), (-1, A)), fused={}),
    "bmm": Row("bmm", lambda m, x: torch.bmm(x, m.w), (3, 5, 37), (3, 37, 11), (-1, 1), MM),
    "Tensor.bmm of W.transpose": Row("bmm", lambda m, x: x.bmm(m.w.transpose(1, 2)), (3, 5, 37), (3, 11, 37), slots=MM),
    "aten.mm keywords": Row("mm", lambda m, x: torch.ops.aten.mm(self=x, mat2=m.w), (5, 37), (37, 11), (-1, 0), MM),
    "aten.linear": Row("linear", lambda m, x: torch.ops.aten.linear(x, m.w, m.b), (3, 5, 37), (11, 37)),
    "Tensor.addmv": Row("addmv", lambda m, x: m.b.addmv(m.w, x), (37,), (11, 37), slots=((-1, W), (-1, A)), fused={}),
    "addmv_": Row(
        "addmv", lambda m, x: torch.ones(11).addmv_(m.w, x), (37,), (11, 37), slots=((-1, W), (-1, A)), fused={}
    ),
    "addmm": Row("addmm", lambda m, x: torch.addmm(m.b, x, m.w), (5, 37), (37, 11), (-1, 0), MM),
    "addmm keywords": Row(
        "addmm", lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.w), (5, 37), (37, 11), (-1, 0), MM
    ),
    "Tensor.addmm": Row("addmm", lambda m, x: m.b.addmm(x, m.w), (5, 37), (37, 11), (-1, 0), MM),
    "addmm_": Row(
        "addmm", lambda m, x: torch.ones(5, 11).addmm_(x, m.w), (5, 37), (37, 11), (-1, 0), MM, fused=BACKWARD_FUSED
    ),
    # Scaling factors and a full matrix added keep ATen's addmm; its operands are codes all the same.
    "addmm alpha beta": Row(
        "addmm",
        lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0),
        (5, 37),
        (37, 11),
        (-1, 0),
        MM,
        fused=BACKWARD_FUSED,
    ),
    "addmm of a matrix": Row(
        "addmm", lambda m, x: torch.addmm(m.b, x, m.w), (5, 37), (37, 11), (-1, 0), MM, (5, 11), BACKWARD_FUSED
    ),
    "baddbmm": Row(
        "baddbmm",
        lambda m, x: torch.baddbmm(m.b, x, m.w),
        (3, 5, 37),
        (3, 37, 11),
        (-1, 1),
        MM,
        (3, 1, 11),
        BACKWARD_FUSED,
    ),
    "addbmm": Row(
        "addbmm", lambda m, x: torch.addbmm(m.b, x, m.w), (3, 5, 37), (3, 37, 11), (-1, 1), MM, fused=BACKWARD_FUSED
    ),
    "Tensor.baddbmm": Row(
        "baddbmm",
        lambda m, x: m.b.baddbmm(x, m.w),
        (3, 5, 37),
        (3, 37, 11),
        (-1, 1),
        MM,
        (3, 1, 11),
        BACKWARD_FUSED,
    ),
    "addbmm_": Row(
        "addbmm",
        lambda m, x: torch.ones(5, 11).addbmm_(x, m.w),
        (3, 5, 37),
        (3, 37, 11),
        (-1, 1),
        MM,
        fused=BACKWARD_FUSED,
    ),
    "inner": Row("inner", lambda m, x: torch.inner(x, m.w), (3, 5, 37), (11, 37)),
    "tensordot dims=1": Row(
        "tensordot", lambda m, x: torch.tensordot(x, m.w, dims=1), (3, 5, 37), (37, 11), (-1, 0), ((-1, A), (0, W))
    ),
    "tensordot in the middle": Row(
        "tensordot", lambda m, x: torch.tensordot(x, m.w, ([1], [0])), (3, 37, 5), (37, 11), (1, 0), ((1, A), (0, W))
    ),
    "aten.tensordot": Row(
        "tensordot",
        lambda m, x: torch.ops.aten.tensordot(x, m.w, [1], [0]),
        (3, 37, 5),
        (37, 11),
        (1, 0),
        ((1, A), (0, W)),
    ),
    "aten.tensordot keywords": Row(
        "tensordot",
        lambda m, x: torch.ops.aten.tensordot(x, other=m.w, dims_self=[-1], dims_other=[-2]),
        (3, 5, 37),
        (37, 11),
        (-1, 0),
        MM,
    ),
    "aten.einsum": Row(
        "einsum", lambda m, x: torch.ops.aten.einsum("bk,nk->bn", [x, m.w]), (3, 37), (11, 37), slots=((1, A), (1, W))
    ),
    "aten.einsum keywords": Row(
        "einsum",
        lambda m, x: torch.ops.aten.einsum(equation="bk,nk->bn", tensors=[x, m.w]),
        (3, 37),
        (11, 37),
        slots=((1, A), (1, W)),
    ),
    "einsum": Row(
        "einsum", lambda m, x: torch.einsum("bsk,nk->bsn", x, m.w), (3, 5, 37), (11, 37), slots=((2, A), (1, W))
    ),
    "einsum weight first": Row(
        "einsum", lambda m, x: torch.einsum("nk,bsk->nbs", m.w, x), (3, 5, 37), (11, 37), slots=((1, W), (2, A))
    ),
    "einsum implicit output": Row(
        "einsum", lambda m, x: torch.einsum("ij,jk", x, m.w), (5, 37), (37, 11), (-1, 0), ((1, A), (0, W))
    ),
    "einsum ellipsis": Row(
        "einsum", lambda m, x: torch.einsum("...k,kn->...n", x, m.w), (3, 5, 37), (37, 11), (-1, 0), ((-1, A), (0, W))
    ),
    # The output lists the positions in another order than the codes are stored in: wgrad reads a decoded copy.
    "einsum in the middle": Row(
        "einsum",
        lambda m, x: torch.einsum("bks,kn->nsb", x, m.w),
        (3, 37, 5),
        (37, 11),
        (1, 0),
        ((1, A), (0, W)),
        fused={"fprop": 1, "dgrad": 1},
    ),
    "einsum k and K": Row(
        "einsum", lambda m, x: torch.einsum("Bsk,Kk->BKs", x, m.w), (3, 5, 37), (11, 37), slots=((2, A), (1, W))
    ),
    "einsum spaces": Row(
        "einsum", lambda m, x: torch.einsum(" b k , n k -> b n ", x, m.w), (3, 37), (11, 37), slots=((1, A), (1, W))
    ),
    "einsum operands in a list": Row(
        "einsum", lambda m, x: torch.einsum("bsk,nk->bsn", [x, m.w]), (3, 5, 37), (11, 37), slots=((2, A), (1, W))
    ),
    "einsum with a batch": Row(
        "einsum", lambda m, x: torch.einsum("ebk,enk->ebn", x, m.w), (3, 5, 37), (3, 11, 37), slots=((2, A), (2, W))
    ),
    # The free axes of x are summed up before the product, so the product reads no codes of x.
    "einsum summing a free axis": Row(
        "einsum",
        lambda m, x: torch.einsum("bsk,nk->n", x, m.w),
        (3, 5, 37),
        (11, 37),
        slots=((2, A), (1, W)),
        fused={"fprop": 1, "dgrad": 1},
    ),
    "sliced weight": Row("linear", lambda m, x: F.linear(x, m.w[2:9]), (5, 37), (11, 37)),
    "reshaped input": Row("linear", lambda m, x: F.linear(x.reshape(15, 37), m.w), (3, 5, 37), (11, 37)),
    "conv1d": Row("conv1d", lambda m, x: F.conv1d(x, m.w, m.b, padding=1), (2, 7, 19), (5, 7, 3), **OVERLAPPING),
    "conv2d": Row("conv2d", lambda m, x: F.conv2d(x, m.w, m.b, padding=1), (2, 7, 9, 11), (5, 7, 3, 3), **OVERLAPPING),
    "conv2d channels last": Row(
        "conv2d",
        lambda m, x: F.conv2d(x.to(memory_format=torch.channels_last), m.w, m.b),
        (2, 7, 9, 11),
        (5, 7, 3, 3),
        **OVERLAPPING,
    ),
    "conv2d non-contiguous": Row(
        "conv2d", lambda m, x: F.conv2d(x.transpose(2, 3), m.w, m.b), (2, 7, 9, 11), (5, 7, 3, 3), **OVERLAPPING
    ),
    "conv2d groups, same": Row(
        "conv2d",
        lambda m, x: F.conv2d(x, m.w, m.b, groups=2, padding="same"),
        (2, 6, 9, 11),
        (4, 3, 3, 3),
        **{**OVERLAPPING, "b": (4,)},
    ),
    "conv2d dilation": Row(
        "conv2d", lambda m, x: F.conv2d(x, m.w, m.b, stride=3, dilation=2), (2, 7, 9, 12), (5, 7, 3, 3), **OVERLAPPING
    ),
    "conv2d without batch": Row(
        "conv2d",
        lambda m, x: F.conv2d(x, m.w, m.b),
        (7, 9, 11),
        (5, 7, 3, 3),
        **{**OVERLAPPING, "quantize_x": lambda x: fake_quantize(x.flatten(), ACTIVATION, -1).view_as(x)},
    ),
    "conv3d": Row("conv3d", lambda m, x: F.conv3d(x, m.w, m.b), (2, 3, 5, 6, 7), (5, 3, 2, 2, 2), **OVERLAPPING),
    "conv2d 1×1": Row(
        "conv2d",
        lambda m, x: F.conv2d(x, m.w, stride=2),
        (2, 7, 9, 11),
        (5, 7, 1, 1),
        (1, -1),
        ((1, A), (-1, W)),
        note="one scale per position",
        **CONV,
    ),
    "conv1d windows tile": Row(
        "conv1d",
        lambda m, x: F.conv1d(x, m.w, stride=4),
        (2, 7, 20),
        (5, 7, 4),
        quantize_x=windows_1d,
        note="one scale per window (windows tile the input)",
        **CONV,
    ),
    "conv2d windows tile": Row(
        "conv2d",
        lambda m, x: F.conv2d(x, m.w, stride=3, padding="valid"),
        (2, 7, 9, 12),
        (5, 7, 3, 3),
        quantize_x=windows_2d,
        note="one scale per window (windows tile the input)",
        **CONV,
    ),
    "conv2d windows tile, channels last": Row(
        "conv2d",
        lambda m, x: F.conv2d(x.contiguous(memory_format=torch.channels_last), m.w, stride=3),
        (2, 7, 9, 12),
        (5, 7, 3, 3),
        quantize_x=windows_2d,
        note="one scale per window (windows tile the input)",
        **CONV,
    ),
    "torch.convolution": Row(
        "convolution",
        lambda m, x: torch.convolution(x, m.w, m.b, [1], [1], [1], False, [0], 1),
        (2, 7, 19),
        (5, 7, 3),
        **OVERLAPPING,
    ),
    "aten.convolution, windows tile": Row(
        "convolution",
        lambda m, x: torch.ops.aten.convolution(x, m.w, None, [3, 3], [0, 0], [1, 1], False, [0, 0], 1),
        (2, 7, 9, 12),
        (5, 7, 3, 3),
        quantize_x=windows_2d,
        note="one scale per window (windows tile the input)",
        **CONV,
    ),
    "aten.conv2d keywords": Row(
        "conv2d", lambda m, x: torch.ops.aten.conv2d(input=x, weight=m.w), (2, 7, 9, 11), (5, 7, 3, 3), **OVERLAPPING
    ),
    "torch._convolution_mode": Row(
        "convolution",
        lambda m, x: torch._convolution_mode(x, m.w, m.b, [1], "same", [1], 1),
        (2, 7, 19),
        (5, 7, 3),
        **OVERLAPPING,
    ),
    "conv_tbc": Row(
        "conv_tbc",
        lambda m, x: torch.conv_tbc(x, m.w, m.b, 1),
        (7, 2, 6),
        (3, 6, 5),
        b=(5,),
        fused={},
        note=PER_SAMPLE,
        quantize_x=time_batch_channels,
        quantize_w=filters_last,
    ),
    "conv_tbc of one position": Row(
        "conv_tbc",
        lambda m, x: torch.conv_tbc(x, m.w, m.b),
        (7, 2, 6),
        (1, 6, 5),
        (-1, 1),
        MM,
        (5,),
        {},
        "one scale per position",
    ),
    "conv2d windows leave a rest": Row(
        "conv2d", lambda m, x: F.conv2d(x, m.w, m.b, stride=3), (2, 7, 10, 12), (5, 7, 3, 3), **OVERLAPPING
    ),
}


def _imatmul(x: Tensor, w: Tensor) -> Tensor:
    x @= w
    return x


@pytest.mark.parametrize("name", ROWS)
def test_spelling(name: str) -> None:
    row = ROWS[name]
    layer, x = Layer(row), torch.randn(row.x, requires_grad=True)
    result = compile_and_run(layer, x, recipe=DISTINCT)

    (decision,) = result.decisions
    assert decision.quantized, decision.reason
    assert decision.site.op == row.op
    assert decision.site.name == "w"
    assert [(slot.axis, slot.kind) for slot in decision.site.slots] == list(row.slots)
    assert decision.reason == row.note

    stand_in = SimpleNamespace(
        w=row.quantize_w(layer.w) if row.quantize_w else fake_quantize(layer.w, WEIGHT, row.axes[1]), b=layer.b
    )
    expected = row.f(stand_in, row.quantize_x(x) if row.quantize_x else fake_quantize(x, ACTIVATION, row.axes[0]))
    leaves = {0: x, "w": layer.w, "b": layer.b}
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, leaves))
    assert result.fused() == Counter(row.fused)


def test_grouped_mm() -> None:
    """Experts of a mixture: one weight per expert, rows sorted by expert."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 32, 16, dtype=torch.bfloat16))

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.w, ends)

    experts, ends = Experts(), torch.tensor([3, 8], dtype=torch.int32)
    x = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True)
    result = compile_and_run(experts, x, ends, recipe=DISTINCT)
    (decision,) = result.decisions
    assert (decision.site.op, [(s.axis, s.kind) for s in decision.site.slots]) == ("grouped_mm", list(MM))
    expected = torch._grouped_mm(fake_quantize(x, ACTIVATION, -1), fake_quantize(experts.w, WEIGHT, 1), ends)
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, {0: x, "w": experts.w}))


def test_transformers_conv1d_is_an_addmm_named_after_its_layer() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(11, 37)), torch.randn(3, 5, 37, requires_grad=True)
    result = compile_and_run(model, x, recipe=DISTINCT)
    (decision,) = result.decisions
    assert (decision.site.op, decision.site.name) == ("addmm", "0")
    layer = model[0]
    expected = fake_quantize(x, ACTIVATION, -1) @ fake_quantize(layer.weight, WEIGHT, 0) + layer.bias
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, {0: x, "0.weight": layer.weight, "0.bias": layer.bias}))


# --- what is left alone, and why -------------------------------------------------------------------------------------

_VECTORS = "a product of two vectors"
_OUTER = "an outer product, nothing is summed"
_FUNCTION = "a function of a matrix, which is computed by many products; rounding errors would add up"
_FACTORS = "solves or factors a matrix; rounding errors would grow with its condition number"
_ATTENTION = "attention is left in high precision (as in every published recipe)"
LEFT_ALONE: dict[str, tuple[Callable[[Any, Tensor], Any], tuple[int, ...], tuple[int, ...], str, str]] = {
    "dot": (lambda m, x: torch.dot(x, m.w), (37,), (37,), "dot", _VECTORS),
    "vector @ vector": (lambda m, x: x @ m.w, (37,), (37,), "matmul", _VECTORS),
    "K = 1": (
        lambda m, x: F.linear(x, m.w),
        (5, 1),
        (11, 1),
        "linear",
        "contraction size 1: an outer product, nothing is summed",
    ),
    "empty batch": (lambda m, x: F.linear(x, m.w), (0, 37), (11, 37), "linear", "an operand is empty"),
    "integers": (
        lambda m, x: x.detach().int() @ m.w.detach().int(),
        (5, 37),
        (37, 11),
        "matmul",
        "operands are int32 × int32, not floating point",
    ),
    "two contracted pairs": (
        lambda m, x: torch.einsum("bhd,hdn->bn", x, m.w),
        (3, 5, 7),
        (5, 7, 11),
        "einsum",
        "einsum 'bhd,hdn->bn' contracts 2 pairs of axes; exactly one is supported",
    ),
    "diagonal": (
        lambda m, x: torch.einsum("bkk,kn->bn", x, m.w),
        (3, 7, 7),
        (7, 11),
        "einsum",
        "einsum 'bkk,kn->bn' takes a diagonal",
    ),
    "three operands": (
        lambda m, x: torch.einsum("bk,kn,nk->bn", x, m.w, m.w.T),
        (3, 7),
        (7, 11),
        "einsum",
        "einsum of 3 operands; only products of two are quantized",
    ),
    "einsum of one operand": (
        lambda m, x: torch.einsum("bk->kb", x) * m.w,
        (3, 7),
        (7, 3),
        "einsum",
        "einsum of 1 operands; only products of two are quantized",
    ),
    "element-wise einsum": (
        lambda m, x: torch.einsum("bk,bk->bk", x, m.w),
        (3, 7),
        (3, 7),
        "einsum",
        "einsum 'bk,bk->bk' contracts 0 pairs of axes; exactly one is supported",
    ),
    "sublists": (
        lambda m, x: torch.einsum(x, [0, 1], m.w, [1, 2], [0, 2]),
        (3, 7),
        (7, 11),
        "einsum",
        "einsum in sublist form; write the equation as a string",
    ),
    "tensordot of two axes": (
        lambda m, x: torch.tensordot(x, m.w, 2),
        (3, 5, 7),
        (5, 7, 11),
        "tensordot",
        "tensordot contracts several axes; one scale per row needs a single contraction axis",
    ),
    "bilinear": (
        lambda m, x: F.bilinear(x, x, m.w),
        (5, 7),
        (11, 7, 7),
        "bilinear",
        "contracts two axes at once; no scale per row factors out",
    ),
    "multi_dot": (
        lambda m, x: torch.linalg.multi_dot([x, m.w]),
        (5, 37),
        (37, 11),
        "multi_dot",
        "the order of products is chosen at run time",
    ),
    "transposed convolution": (
        lambda m, x: F.conv_transpose2d(x, m.w),
        (2, 7, 9, 11),
        (7, 5, 3, 3),
        "conv_transpose2d",
        "output windows overlap; its operands have no exact scale per row",
    ),
    "convolution, transposed": (
        lambda m, x: torch.convolution(x, m.w, None, [1, 1], [0, 0], [1, 1], True, [0, 0], 1),
        (2, 7, 9, 11),
        (7, 5, 3, 3),
        "convolution",
        "output windows overlap; its operands have no exact scale per row",
    ),
    "matrix_power": (lambda m, x: m.w.matrix_power(3) * x, (7, 7), (7, 7), "matrix_power", _FUNCTION),
    "matrix_exp": (lambda m, x: torch.linalg.matrix_exp(m.w) * x, (7, 7), (7, 7), "matrix_exp", _FUNCTION),
    "inverse": (lambda m, x: torch.linalg.inv(m.w) * x, (7, 7), (7, 7), "inv", _FACTORS),
    "solve": (lambda m, x: torch.linalg.solve(m.w, x), (7, 5), (7, 7), "solve", _FACTORS),
    "outer": (lambda m, x: x.outer(m.w), (5,), (7,), "outer", _OUTER),
    "kron": (lambda m, x: torch.kron(x, m.w), (5, 3), (7, 2), "kron", _OUTER),
    "addr": (lambda m, x: torch.addr(m.w, x, x), (7,), (7, 7), "addr", _OUTER),
    "vecdot": (lambda m, x: torch.linalg.vecdot(x, m.w), (5, 7), (5, 7), "vecdot", _VECTORS),
    "chain_matmul": (
        lambda m, x: torch.ops.aten.chain_matmul([x, m.w, m.w.mT]),
        (5, 37),
        (37, 11),
        "chain_matmul",
        "the order of products is chosen at run time",
    ),
    "cdist": (lambda m, x: torch.cdist(x, m.w), (5, 7), (11, 7), "cdist", "a distance, not a product"),
    "attention": (
        lambda m, x: F.scaled_dot_product_attention(x, x, x) * m.w,
        (2, 2, 5, 8),
        (8,),
        "sdpa",
        _ATTENTION,
    ),
    "scores": (
        lambda m, x: (x @ x.mT) * m.w,
        (2, 5, 8),
        (5,),
        "matmul",
        "no weight operand (attention-like product); attention=True quantizes these",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_with_its_reason_and_exact_numbers(name: str) -> None:
    f, x_shape, w_shape, op, reason = LEFT_ALONE[name]
    layer, x = Layer(Row(op, f, x_shape, w_shape)), torch.randn(x_shape, requires_grad=True)
    result = compile_and_run(layer, x, recipe=DISTINCT)
    assert [(d.site.op, d.quantized, d.reason) for d in result.decisions] == [(op, False, reason)]
    expected = f(layer, x)
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, {0: x, "w": layer.w, "b": layer.b}))


def test_flex_attention_is_left_alone_with_a_reason() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor) -> Tensor:
        return flex_attention(q, q, q)

    result = compile_and_run(attend, torch.randn(1, 2, 16, 16), recipe=DISTINCT)
    assert [(d.site.op, d.reason) for d in result.decisions if "attention" in d.site.op] == [
        ("flex_attention", _ATTENTION)
    ]
    assert not result.quantized


def test_multi_head_attention_is_named_in_the_plan() -> None:
    """A model whose products hide in one opaque op must not read as fully quantized."""

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    result = compile_and_run(Opaque(), torch.randn(2, 5, 16), recipe=DISTINCT, disable_passes=["expand"])
    assert [(d.site.op, d.site.name, d.quantized) for d in result.decisions] == [
        ("multi_head_attention", "attention", False)
    ]
    assert "not visible" in result.decisions[0].reason


# --- weights and activations ----------------------------------------------------------------------------------------


def kinds(function: Callable[..., Any], *inputs: Tensor, **changes: Any) -> list[list[str]]:
    result = compile_and_run(function, *inputs, recipe=DISTINCT, attention=True, **changes)
    return [[slot.kind for slot in d.site.slots] for d in result.decisions]


def test_functional_code_passes_its_weight_as_a_leaf() -> None:
    assert kinds(lambda x, w: x @ w, torch.randn(5, 37), leaf(37, 11)) == [[A, W]]
    assert kinds(F.linear, leaf(5, 37), leaf(11, 37)) == [[A, W]]


@pytest.mark.parametrize(
    "part",
    [
        lambda w: w.chunk(3)[1],
        lambda w: w.split(11)[1],
        lambda w: torch.split(w, [11, 22])[0],
        lambda w: w.narrow(0, 11, 11),
        lambda w: w[11:22],
        lambda w: w.view(3, 11, 37).unbind(0)[2],
        lambda w: w.view(3, 11, 37).select(0, 1),
        lambda w: torch.ops.aten.split.Tensor(w, 11)[0],
    ],
)
def test_rows_of_a_fused_weight_are_a_weight(part) -> None:
    """q, k and v in one parameter, taken apart by the model itself."""

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.randn(33, 37))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, part(self.qkv))

    assert kinds(Fused(), torch.randn(5, 37)) == [[A, W]]


def test_an_input_that_requires_grad_is_no_weight() -> None:
    """Would give the input of ``w @ x`` the weight's format and estimator."""
    w = nn.Parameter(torch.randn(11, 37))
    assert kinds(lambda x: w @ x, leaf(37, 5)) == [[W, A]]
    assert kinds(lambda x: x @ x.T, leaf(5, 37)) == [[A, A]]
    assert kinds(lambda q, k: q @ k.mT, leaf(2, 5, 37), leaf(2, 5, 37)) == [[A, A]]


def test_frozen_parameters_are_weights_and_buffers_are_not() -> None:
    layer = nn.Linear(37, 11)
    layer.weight.requires_grad_(False)
    layer.register_buffer("table", torch.randn(11, 7))
    result = compile_and_run(lambda x: layer(x) @ layer.table, leaf(5, 37), recipe=DISTINCT)
    assert [d.quantized for d in result.decisions] == [True, False]
    assert result.decisions[1].reason.startswith("a constant")


def test_tied_weights_are_quantized_along_each_contraction_axis() -> None:
    """One parameter, read as W and as Wᵀ: its scales are per row in one product and per column in the other."""
    w, x = nn.Parameter(torch.randn(11, 37)), leaf(5, 37)

    def tied(x: Tensor) -> Tensor:
        return F.linear(F.linear(x, w), w.T)

    result = compile_and_run(tied, x, recipe=DISTINCT)
    hidden = F.linear(fake_quantize(x, ACTIVATION, -1), fake_quantize(w, WEIGHT, -1))
    expected = F.linear(fake_quantize(hidden, ACTIVATION, -1), fake_quantize(w, WEIGHT, 0).T)
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, {0: x}))


def test_one_tensor_on_both_sides() -> None:
    """x @ x.T quantizes x once for the left and once, through the view, for the right."""
    x = leaf(5, 37)
    result = compile_and_run(lambda x: x @ x.T, x, recipe=DISTINCT, attention=True)
    expected = fake_quantize(x, ACTIVATION, -1) @ fake_quantize(x.T, ACTIVATION, 0)
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, {0: x}))


def test_an_operand_that_is_also_an_output_stays_what_it_was() -> None:
    """The user's own result must not become the quantized copy."""
    layer, x = nn.Linear(37, 11), leaf(5, 37)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 2
        return layer(h), h

    y, h = compile_and_run(both, x, recipe=DISTINCT).outputs
    assert torch.equal(h, x * 2)
    assert_same(y, F.linear(fake_quantize(x * 2, ACTIVATION, -1), fake_quantize(layer.weight, WEIGHT, -1), layer.bias))


def test_out_argument_receives_the_quantized_product() -> None:
    x, w, out = torch.randn(5, 37), nn.Parameter(torch.randn(37, 11)), torch.empty(5, 11)

    def into(x: Tensor, out: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.mm(x, w, out=out)

    result = compile_and_run(into, x, out, recipe=DISTINCT)
    expected = fake_quantize(x, ACTIVATION, -1) @ fake_quantize(w, WEIGHT, 0)
    assert_same(out, expected.detach())
    assert_same(result.outputs, expected.detach())


# --- dynamic shapes -------------------------------------------------------------------------------------------------


def test_dynamic_batch_compiles_once_for_three_lengths() -> None:
    layer = nn.Linear(37, 11)
    compiled, observations = compiler(layer, DISTINCT, dynamic=None)
    for length in (5, 6, 9):
        x = torch.randn(2, length, 37)
        torch._dynamo.mark_dynamic(x, 1)
        expected = F.linear(fake_quantize(x, ACTIVATION, -1), fake_quantize(layer.weight, WEIGHT, -1), layer.bias)
        y = compiled(x)
        assert_same(y, expected)
        assert_same(backward(y, dict(layer.named_parameters())), backward(expected, dict(layer.named_parameters())))
    assert len(observations) == 1
    assert Counter(row["role"] for row in observations[0].gemms if row["fused"]) == {"fprop": 1, "wgrad": 1}


def test_dynamic_convolution_batch() -> None:
    """Frames reshape by sizes that are only known at run time."""
    layer = nn.Conv2d(3, 5, 2, stride=2)
    compiled, observations = compiler(layer, DISTINCT)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 4, 6)
        torch._dynamo.mark_dynamic(x, 0)
        rows = F.unfold(x, 2, stride=2)
        tiles = F.fold(fake_quantize(rows, ACTIVATION, 1), (4, 6), 2, stride=2)
        assert_same(compiled(x), F.conv2d(tiles, filters(layer.weight), layer.bias, stride=2))
    assert len(observations) == 1


def test_dynamic_contraction_is_left_alone() -> None:
    """A product over a run-time size, as p @ v of attention: no layout of codes is known for it."""
    compiled, observations = compiler(lambda p, v: p @ v, DISTINCT, attention=True)
    for length in (5, 8):
        p, v = torch.randn(2, 3, length), torch.randn(2, length, 7)
        torch._dynamo.mark_dynamic(p, 2)
        torch._dynamo.mark_dynamic(v, 1)
        assert torch.allclose(compiled(p, v), p @ v)
    (decision,) = observations[0].plan.decisions
    assert decision.reason == "the contraction size is marked dynamic or depends on data; mark it static"


# --- names and rules ------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(2))
        self.experts = nn.ParameterDict(
            {"up": nn.Parameter(torch.randn(16, 8)), "down": nn.Parameter(torch.randn(8, 16))}
        )
        self.lm_head = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x @ self.experts["up"] @ self.experts["down"])


LAYERS = ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "experts.up", "experts.down", "lm_head"]


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({}, LAYERS[:-1]),
        ({"skip": ["layers.0"]}, LAYERS[2:-1]),
        ({"defaults": False}, LAYERS),
        ({"defaults": False, "skip": ["layers.0"]}, LAYERS[2:]),
        ({"min_side": 9}, LAYERS[:4]),
        ({"rules": [{"name": "lm_head", "quantize": True}]}, LAYERS),
        ({"rules": [{"op": "matmul", "quantize": False}]}, LAYERS[:4]),
        ({"rules": [{"max_size": 200, "quantize": False}]}, LAYERS[:4]),
        ({"rules": [{"name": "layers.*.1", "activation": "off", "weight": "off"}]}, [LAYERS[i] for i in (0, 2, 4, 5)]),
        ({"rules": [{"name": "*", "quantize": False}, {"name": "layers.1", "quantize": True}]}, LAYERS[2:4]),
        ({"fuel": 2}, LAYERS[:2]),
    ],
    ids=str,
)
def test_rules_choose_layers(options: dict[str, Any], quantized: list[str]) -> None:
    result = compile_and_run(Named(), torch.randn(3, 16), **options)
    assert [d.site.name for d in result.decisions] == LAYERS
    assert [d.site.name for d in result.quantized] == quantized
    assert all(d.reason for d in result.decisions if not d.quantized)
