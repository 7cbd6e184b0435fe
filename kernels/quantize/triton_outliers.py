"""Quantize with outliers in Triton (2 bytes in, 1 out per element of a 16-bit x).

The row is in registers while its bounds are searched (:mod:`qcompile.kernels.outliers.row_search`), and comes out of L1
or L2 once more to be rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.operand import Operand
from qcompile.ir.ops import COMPENSATED, clamped_counts
from qcompile.kernels.outliers.row_search import most_registers, row_bounds, search_constants
from qcompile.kernels.outliers.triton import clamped
from qcompile.kernels.triton import (
    INTERPRETED,
    RUN,
    as_rows,
    greater,
    launch,
    runs,
)

from . import reference
from .grid import grid_of
from .triton_codes import encoded, nearest, saturated

__all__ = ["quantize_compensated"]

#: Bytes of elements a thread holds where a row is searched, which takes many reductions: one warp has 4096 16-bit
#: elements, and needs no barriers.
SEARCHED_BYTES_PER_THREAD = 256


@triton.jit
def _write_compensated_row(
    x,
    codes,
    lowest,
    highest,
    gamma,
    size,
    fmt: tl.constexpr,
    compensated: tl.constexpr,
    part: tl.constexpr,
    saturate: tl.constexpr,
):
    # x is read again, from L1 or L2, and in parts: the search has filled the registers.
    for start in range(0, size, part):
        at = start + runs(part, RUN)
        value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
        inner = clamped(value, lowest, highest)
        y = inner * gamma
        if saturate:
            level, _ = nearest(saturated(y, fmt), fmt)
            level = tl.where(value == inner, level, level + (value - inner) * gamma)
        else:
            level, _ = nearest(y, fmt)
            level += (inner - value) * -gamma  # −0 where nothing was clamped, which leaves zeros their sign
        if saturate or INTERPRETED:  # no NaN otherwise, and conversions saturate
            level = saturated(level, compensated)
        eight_bit, _ = encoded(level, compensated)
        tl.store(codes + at, eight_bit.to(tl.uint8, bitcast=True), mask=at < size)


@triton.jit(do_not_specialize=["low", "high"])
def _quantize_compensated_row(
    x,
    codes,
    scales,
    bounds,
    row_stride,
    size,
    low,
    high,
    fmt: tl.constexpr,
    compensated: tl.constexpr,
    group: tl.constexpr,
    halvings: tl.constexpr,
    pair: tl.constexpr,
    block: tl.constexpr,
    part: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = runs(block, RUN)
    element = tl.load(x + row * row_stride + at, mask=at < size, other=0.0)
    lowest, highest, amax = row_bounds(element, at < size, block - size, low, high, group, halvings, pair)
    if amax < float("inf"):  # of the clamped row; otherwise nothing may decode to a finite value
        amax = greater(greater(tl.abs(lowest), tl.abs(highest)), fmt.amax_floor)
    scale, gamma = fmt.scale_pair(amax)
    tl.store(scales + row, scale)
    tl.store(bounds + 3 * row, lowest)
    tl.store(bounds + 3 * row + 1, highest)
    tl.store(bounds + 3 * row + 2, gamma)
    x += row * row_stride
    codes += row * size
    if amax <= fmt.plain_limit:
        _write_compensated_row(x, codes, lowest, highest, gamma, size, fmt, compensated, part, False)
    else:
        _write_compensated_row(x, codes, lowest, highest, gamma, size, fmt, compensated, part, True)


# --- launching -------------------------------------------------------------------------------------------------------


def quantize_compensated(x: Tensor, operand: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_compensated`.

    x float32, bfloat16 or float16, any strides; at most ``LONGEST_ROW`` elements along ``axis``. Where a bound is zero
    and x has zeros of both signs, each keeps its own; in the reference that depends on which of them is the bound.
    """
    if x.numel() == 0:
        return reference.quantize_compensated(x, operand, axis)
    spec = Operand.parse(operand)
    assert spec.outliers is not None
    rows, shape = as_rows(x, axis)
    size = shape[-1]
    codes = x.new_empty(shape, dtype=torch.uint8)
    scales, bounds = (x.new_empty((*shape[:-1], n), dtype=torch.float32) for n in (1, 3))
    launch(
        _quantize_compensated_row,
        rows.shape[0],
        rows,
        codes,
        scales,
        bounds,
        rows.stride(0),
        size,
        *clamped_counts(spec.outliers, size),
        fmt=grid_of(str(spec.quantizer)),
        compensated=grid_of(COMPENSATED),
        **search_constants(rows, spec.outliers.alpha, SEARCHED_BYTES_PER_THREAD // x.element_size()),
        maxnreg=most_registers(rows),
    )
    return codes, scales, bounds
