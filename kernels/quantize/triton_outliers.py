"""Quantize with outliers in Triton (2 bytes in, 1 out per element of a 16-bit x).

The row is in registers while its bounds are searched (:mod:`qcompile.kernels.outliers.row_search`), and comes out of L1
or L2 once more to be rounded.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.operand import Operand
from qcompile.ir.ops import COMPENSATED, clamped_counts
from qcompile.ir.outliers import OutlierClamp
from qcompile.kernels.outliers.row_search import row_bounds, row_tiles, search_constants
from qcompile.kernels.outliers.triton import clamped
from qcompile.kernels.triton import (
    INTERPRETED,
    as_rows,
    greater,
    launch,
)

from . import reference
from .grid import grid_of
from .triton_codes import encoded, nearest, saturated

__all__ = ["quantize_compensated"]

#: Registers of a thread that hold elements of a row while it is searched, which takes many reductions: a warp has rows
#: of up to 4096 16-bit elements, and needs no barriers.
SEARCHED_REGISTERS = 64
#: Most tiles that are written at once.
WRITTEN_TILES = 4


@triton.jit
def as_float32(x):
    """Float32 numbers. Two bfloat16 ones in a register are a shift and a mask, which Triton takes one more for."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        value = x.to(tl.float32)
    else:
        value = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return value


@triton.jit
def _write_compensated_rows(
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
    """Rows at pointers x [R, 1], to ``codes`` [R, 1]; bounds and γ [R, 1]."""
    # x is read again, from L1 or L2, and in parts: the search has filled the registers.
    for start in range(0, size, part):
        at = start + tl.arange(0, part)[None, :]
        value = as_float32(tl.load(x + at, mask=at < size, other=0.0))
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


@triton.jit(do_not_specialize=["rows", "low", "high"])
def _quantize_compensated_rows(
    x,
    codes,
    scales,
    bounds,
    row_stride,
    rows,
    size,
    low,
    high,
    fmt: tl.constexpr,
    compensated: tl.constexpr,
    pair: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
    at_once: tl.constexpr,
    part: tl.constexpr,
):
    # The last program may take the last row several times, and store the same.
    row = tl.minimum(tl.program_id(0) * at_once + tl.arange(0, at_once), rows - 1).to(tl.int64)
    x += (row * row_stride)[:, None]
    lowest, highest, amax = row_bounds(row_tiles(x, size, tiles, width), size, low, high, pair)
    # Of the clamped row; if x is not finite, nothing may decode to a finite value.
    inner = greater(greater(tl.abs(lowest), tl.abs(highest)), fmt.amax_floor)
    amax = tl.where(amax < float("inf"), inner, amax)
    scale, gamma = fmt.scale_pair(amax)
    tl.store(scales + row, scale)
    bounds += 3 * row
    tl.store(bounds, lowest)
    tl.store(bounds + 1, highest)
    tl.store(bounds + 2, gamma)
    codes += (row * size)[:, None]
    lowest, highest, gamma = lowest[:, None], highest[:, None], gamma[:, None]
    if tl.min((amax <= fmt.plain_limit).to(tl.int32), 0) != 0:
        _write_compensated_rows(x, codes, lowest, highest, gamma, size, fmt, compensated, part, False)
    else:
        _write_compensated_rows(x, codes, lowest, highest, gamma, size, fmt, compensated, part, True)


# --- launching -------------------------------------------------------------------------------------------------------


def quantize_compensated(x: Tensor, operand: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_compensated`.

    x float32, bfloat16 or float16, any strides; at most ``LONGEST_ROW`` elements along ``axis``. Where a bound is zero
    and x has zeros of both signs, each keeps its own; in the reference that depends on which of them is the bound.
    """
    if x.numel() == 0:
        return reference.quantize_compensated(x, operand, axis)
    spec = Operand.parse(operand)
    assert isinstance(spec.outliers, OutlierClamp)
    rows, shape = as_rows(x, axis)
    size = shape[-1]
    codes = x.new_empty(shape, dtype=torch.uint8)
    scales, bounds = (x.new_empty((*shape[:-1], n), dtype=torch.float32) for n in (1, 3))
    constants = search_constants(rows, SEARCHED_REGISTERS)
    launch(
        _quantize_compensated_rows,
        triton.cdiv(rows.shape[0], constants["at_once"]),
        rows,
        codes,
        scales,
        bounds,
        rows.stride(0),
        rows.shape[0],
        size,
        *clamped_counts(spec.outliers, size),
        fmt=grid_of(str(spec.quantizer)),
        compensated=grid_of(COMPENSATED),
        part=constants["width"] * math.gcd(constants["tiles"], WRITTEN_TILES),
        **constants,
    )
    return codes, scales, bounds
