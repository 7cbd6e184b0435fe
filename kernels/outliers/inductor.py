"""Outlier clamping for Inductor: the op's own kernel clamps where there is one; what can be loops is, and fuses.

The residual's positions are distinct wherever its values are not zero (an element below the lower bound is
not above the upper one), so restoring is a gather, an addition and a plain scatter instead of atomic
additions: deterministic, and the read of x fuses with what made x.
"""

from __future__ import annotations

import torch
from torch._inductor import ir
from torch._inductor.lowering import lowerings, pointwise_cat

from qcompile.ir.ops import clamped_counts, index_dtype, residual_dtype
from qcompile.ir.outliers import OutlierClamp, Outliers
from qcompile.kernels.extern import own_kernel
from qcompile.kernels.quantize.inductor import axis_last, is_empty

__all__ = [
    "lower_clamp_outliers",
    "lower_restore_outliers",
]

aten = torch.ops.aten


def lower_clamp_outliers(x, clamp: str, axis: int):
    """``qcompile::clamp_outliers``: the op's own kernel, which finds quantiles of a row or a tensor without a sort.

    Rows that it does not take (very long ones, other axes): two extern top-k, then loops for the clamped tensor and the
    residual.
    """
    op = torch.ops.qcompile.clamp_outliers.default
    spec = OutlierClamp.parse(clamp)
    if not ir.is_triton(x) or is_empty(x) or spec.per == "tensor":
        return own_kernel(op, x, clamp, axis)
    axis %= len(x.get_size())
    if axis == len(x.get_size()) - 1 and _has_kernel(x, clamp):
        rows = ir.TensorBox(ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x)))
        return own_kernel(op, rows, clamp, axis)
    rows = axis_last(x, axis)
    size = _known(rows.get_size()[-1])
    if size is None:  # top-k asks for numbers
        return own_kernel(op, x, clamp, axis)
    low, high = clamped_counts(spec, size)
    last = len(rows.get_size()) - 1
    below, below_at = _call(aten.topk.default, rows, low + 1, last, False, True)
    above, above_at = _call(aten.topk.default, rows, high + 1, last, True, True)
    lower, upper = (_call(aten.slice.Tensor, t, last, n, n + 1) for t, n in ((below, low), (above, high)))
    below, below_at = (_call(aten.slice.Tensor, t, last, 0, low) for t in (below, below_at))
    above, above_at = (_call(aten.slice.Tensor, t, last, 0, high) for t in (above, above_at))
    wide = residual_dtype(x.get_dtype())
    residual = [
        _call(aten.sub.Tensor, _cast(cut, wide), _cast(bound, wide)) for cut, bound in ((below, lower), (above, upper))
    ]
    # Not the lowering of aten.cat: in torch 2.11 it takes the graph's node at hand for its own.
    positions = pointwise_cat([below_at, above_at], last)
    lower, upper = (axis_back(bound, axis) for bound in (lower, upper))
    clamped = _call(aten.minimum.default, _call(aten.maximum.default, x, lower), upper)
    return clamped, pointwise_cat(residual, last), _cast(positions, index_dtype(size))


def _has_kernel(x, clamp: str) -> bool:
    from .triton import supports_clamp_outliers  # imports Triton, which a build of torch for CPUs does without

    size = _known(x.get_size()[-1])
    return size is not None and supports_clamp_outliers((x.get_dtype(),), clamp, size)[0]


def lower_restore_outliers(x, values, positions, clamp: str, axis: int):
    """``qcompile::restore_outliers``: x with the residual added at its positions."""
    if not ir.is_triton(x) or is_empty(x, values):
        op = torch.ops.qcompile.restore_outliers.default
        return own_kernel(op, x, values, positions, clamp, axis)
    axis %= len(x.get_size())
    rows = axis_last(x, axis)
    shape = rows.get_size()
    if Outliers.parse(clamp).per == "tensor":
        rows = _call(aten.reshape.default, rows, [-1])
    last = len(rows.get_size()) - 1
    at = _call(aten.expand.default, _cast(positions, torch.int64), values.get_size())
    wide = _call(aten.add.Tensor, _cast(_call(aten.gather.default, rows, last, at), values.get_dtype()), values)
    raised = _cast(wide, x.get_dtype())
    restored = _call(aten.scatter_reduce_.two, _call(aten.clone.default, rows), last, at, raised, None)  # None: store
    return axis_back(_call(aten.reshape.default, restored, shape), axis)


def axis_back(x, axis: int):
    """View of ``x`` with its last axis moved to ``axis``."""
    order = list(range(len(x.get_size()) - 1))
    order.insert(axis, len(order))
    return _call(aten.permute.default, x, order)


def _cast(x, dtype: torch.dtype):
    return _call(torch.ops.prims.convert_element_type.default, x, dtype)


def _call(op: torch._ops.OpOverload, *args):
    return lowerings[op](*args)


def _known(size) -> int | None:
    """An Inductor size as a number, ``None`` if it is known at run time only."""
    return int(size) if isinstance(size, int) or size.is_number else None
