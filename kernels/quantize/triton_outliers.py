"""Quantize with outliers in Triton (2 bytes in, 1 out per element of a 16-bit x).

The row is in registers while its bounds are searched (:mod:`qcompile.kernels.outliers.row_search`), and comes out of L1
or L2 once more to be rounded.

Where x is computed by a :class:`~qcompile.kernels.producer.Producer`, the same kernel does that too, and x is neither
written to memory nor read. To compute it twice, for the search and for the codes, would cost more than that saves, and
registers hold no second copy of a row. So a program writes the rows it is about to quantize to a *slot*, which it uses
again for its next ones: slots of all programs stay in L2.
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
from qcompile.kernels.producer import Producer, device_producer
from qcompile.kernels.triton import (
    INTERPRETED,
    as_bits,
    as_float,
    as_rows,
    greater,
    launch,
    processors,
)

from . import reference
from .grid import grid_of
from .triton_codes import encoded, nearest, saturated

__all__ = ["quantize_compensated", "quantize_produced"]

#: Registers of a thread that hold elements of a row while it is searched, which takes many reductions: a warp has rows
#: of up to 4096 16-bit elements, and needs no barriers.
SEARCHED_REGISTERS = 64
#: Most tiles that are written at once.
WRITTEN_TILES = 4
#: Tiles that are computed at once. Not as many: where both loops have blocks of one shape, Triton gives inputs the
#: layout of codes, and exchanges elements between threads before it stores x.
PRODUCED_TILES = 2
#: Warps of a processor that :func:`quantize_produced` starts at once, and the registers of a thread that leave room for
#: them: programs that had to wait would then run alone, each for as long as all others together.
RESIDENT_WARPS, REGISTERS = 16, 128


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


@triton.jit
def _quantize_rows(
    x,
    codes,
    scales,
    bounds,
    row,
    size,
    low,
    high,
    fmt: tl.constexpr,
    compensated: tl.constexpr,
    pair: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
    part: tl.constexpr,
):
    """Rows at pointers x [R, 1], which are the ones numbered ``row`` [R] of the results."""
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
    _quantize_rows(x, codes, scales, bounds, row, size, low, high, fmt, compensated, pair, tiles, width, part)


# --- with its producer ------------------------------------------------------------------------------------------------


@triton.jit
def _input(x, row, row_stride, at, inside, along_row: tl.constexpr):
    """Elements of rows of an input: [R, n], or [R, 1] of one that is the same ``along_row``; 0 of none."""
    if x is None:
        value = 0.0
    elif along_row:
        value = tl.load(x + (row * row_stride)[:, None])
    else:
        # Not read again before the backward: what stays in L2 are slots.
        elements = x + (row * row_stride)[:, None] + at
        value = tl.load(elements, mask=inside, other=0.0, eviction_policy="evict_first")
    return value


@triton.jit
def _inputs(a, b, c, d, a_stride, b_stride, c_stride, d_stride, row, at, inside, along_row: tl.constexpr):
    return (
        _input(a, row, a_stride, at, inside, along_row[0]),
        _input(b, row, b_stride, at, inside, along_row[1]),
        _input(c, row, c_stride, at, inside, along_row[2]),
        _input(d, row, d_stride, at, inside, along_row[3]),
    )


@triton.jit
def _rounded(value, dtype: tl.constexpr):
    """Float32 numbers to the nearest of ``dtype``, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # to which the interpreter truncates
        bits = as_bits(value)
        value = tl.where(value == value, as_float((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000), value)
    return value.to(dtype)


@triton.jit
def _produce_rows(
    a,
    b,
    c,
    d,
    a_stride,
    b_stride,
    c_stride,
    d_stride,
    slot,
    row,
    size,
    producer: tl.constexpr,
    along_row: tl.constexpr,
    part: tl.constexpr,
):
    """Compute rows, and write them to pointers ``slot`` [R, 1]."""
    at = tl.arange(0, part)[None, :]
    inputs = _inputs(a, b, c, d, a_stride, b_stride, c_stride, d_stride, row, at, at < size, along_row)
    for _ in range(0, size, part):
        following = at + part  # is read before what is there is computed with, which takes about as long
        ahead = _inputs(a, b, c, d, a_stride, b_stride, c_stride, d_stride, row, following, following < size, along_row)
        value = producer.element(
            as_float32(inputs[0]), as_float32(inputs[1]), as_float32(inputs[2]), as_float32(inputs[3])
        )
        tl.store(slot + at, _rounded(value, slot.dtype.element_ty), mask=at < size)
        at, inputs = following, ahead


@triton.jit(do_not_specialize=["rows", "low", "high"])
def _quantize_produced_rows(
    a,
    b,
    c,
    d,
    a_stride,
    b_stride,
    c_stride,
    d_stride,
    slots,
    codes,
    scales,
    bounds,
    rows,
    size,
    low,
    high,
    producer: tl.constexpr,
    along_row: tl.constexpr,
    fmt: tl.constexpr,
    compensated: tl.constexpr,
    pair: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
    at_once: tl.constexpr,
    part: tl.constexpr,
    produced: tl.constexpr,
):
    slot = slots + ((tl.program_id(0) * at_once + tl.arange(0, at_once)) * (tiles * width))[:, None]
    for first in range(tl.program_id(0) * at_once, rows, tl.num_programs(0) * at_once):
        row = tl.minimum(first + tl.arange(0, at_once), rows - 1).to(tl.int64)
        _produce_rows(
            a, b, c, d, a_stride, b_stride, c_stride, d_stride, slot, row, size, producer, along_row, produced
        )
        tl.debug_barrier()  # other threads read what one has written
        _quantize_rows(slot, codes, scales, bounds, row, size, low, high, fmt, compensated, pair, tiles, width, part)
        tl.debug_barrier()


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
    constants = search_constants(size, x.dtype, x.device, SEARCHED_REGISTERS)
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


def quantize_produced(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, producer: str, operand: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_produced`; ``a`` has the shape of x."""
    if a.numel() == 0:
        return reference.quantize_produced(a, b, c, d, producer, operand)
    spec, dtype, size = Operand.parse(operand), Producer.parse(producer).dtype, a.shape[-1]
    assert isinstance(spec.outliers, OutlierClamp)
    constants = search_constants(size, dtype, a.device, SEARCHED_REGISTERS)
    width, part = constants["width"], constants["width"] * math.gcd(constants["tiles"], WRITTEN_TILES)
    inputs = [None if x is None else _rows_of_input(x, a.shape) for x in (a, b, c, d)]
    rows, at_once = a.numel() // size, constants["at_once"]
    resident = max(1, RESIDENT_WARPS // constants["num_warps"])
    programs = min(triton.cdiv(rows, at_once), processors(a.device) * resident)
    slots = a.new_empty((programs * at_once, constants["tiles"] * width), dtype=dtype)
    codes = a.new_empty(a.shape, dtype=torch.uint8)
    scales, bounds = (a.new_empty((*a.shape[:-1], n), dtype=torch.float32) for n in (1, 3))
    launch(
        _quantize_produced_rows,
        programs,
        *inputs,
        *(0 if x is None else x.stride(0) for x in inputs),
        slots,
        codes,
        scales,
        bounds,
        rows,
        size,
        *clamped_counts(spec.outliers, size),
        producer=device_producer(producer),
        along_row=tuple(x is not None and x.stride(1) == 0 for x in inputs),
        fmt=grid_of(str(spec.quantizer)),
        compensated=grid_of(COMPENSATED),
        part=part,
        produced=width * PRODUCED_TILES,
        maxnreg=REGISTERS,
        **constants,
    )
    return codes, scales, bounds


def _rows_of_input(x: Tensor, shape: torch.Size) -> Tensor:
    """An input as rows [R, K] of ``shape``, whose elements lie side by side, or are all one."""
    rows = x.expand(shape).reshape(-1, shape[-1])
    return rows if rows.stride(1) in (0, 1) else rows.contiguous()
