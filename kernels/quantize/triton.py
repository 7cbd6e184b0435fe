"""Quantize kernels for tensor cores in Triton, equal to :mod:`qcompile.kernels.quantize.reference` bit for bit.

Every kernel is specialized by a :class:`Grid`, the constants of a quantizer's format; none knows a format by name. What
they read from device memory, in bytes per element of a 16-bit x, and how:

* **by rows** (2 in; 1 out, ½ more for packed codes): a program keeps its row in registers between absolute maximum and
  codes. Rows longer than ``LONGEST_ROW`` are read twice.
* **transposed** (2 + 2 in, 1 out): scales of rows first, then tiles; the second reading of a small matrix comes out of
  L2.
* **rows and columns of one matrix** (2 + 2 in, 1 + 1 out): persistent programs quantize rows and keep the absolute
  maxima of the columns they have seen in registers; a second kernel writes the columns' codes, transposed.
* **recode** (½ or 1 in, 1 out): from stored codes by table.
* **with outliers** (2 in, 1 out): the row is in registers while its bounds are searched
  (:mod:`qcompile.kernels.outliers.row_search`), and comes out of L1 or L2 once more to be rounded.

The arithmetic is float32 without contraction to fused multiply-adds, except where a product is exact. Divisions are
IEEE divisions. Triton's interpreter (``TRITON_INTERPRET=1``) runs the same kernels; it cannot convert to FP8 with
rounding, propagate NaN in a reduction or run inline PTX, so those three have a second form for it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.formats import Format
from qcompile.ir.ops import COMPENSATED, clamped_counts
from qcompile.ir.quantizer import RMS_FLOOR, Quantizer
from qcompile.ir.recipe import Operand
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.formula.layout import MANTISSA_BITS, why_not_rounded
from qcompile.kernels.outliers.row_search import most_registers, row_bounds, search_constants
from qcompile.kernels.outliers.triton import clamped
from qcompile.kernels.triton import (
    INTERPRETED,
    LONGEST_ROW,
    RUN,
    absolute_maximum,
    as_bits,
    as_float,
    as_rows,
    greater,
    launch,
    maximum,
    processors,
    row_block,
    runs,
    supports_dtypes,
    supports_size,
    warps,
    with_dense_rows,
)

from . import reference
from .grid import grid_of, unsupported

__all__ = [
    "quantize_8bit",
    "quantize_8bit_pair",
    "quantize_8bit_transposed",
    "quantize_columns",
    "quantize_compensated",
    "recode",
    "supports_columns",
    "supports_quantize_8bit",
    "supports_quantize_8bit_pair",
    "supports_quantize_8bit_transposed",
    "supports_quantize_compensated",
    "supports_recode",
]

Support = tuple[bool, str]

#: Elements a thread holds: enough to share the cost of scales and reductions, few enough to leave registers for other
#: programs of the processor. A row in parts has up to twice as many.
ELEMENTS_PER_THREAD = 64
#: Bytes of elements a thread holds where a row is searched, which takes many reductions: one warp has 4096 16-bit
#: elements, and needs no barriers.
SEARCHED_BYTES_PER_THREAD = 256
#: Rows and columns: of the tiles whose absolute maxima are taken, of those that are transposed, and of those of stored
#: codes, in bytes. 128 rows are lines of 128 bytes in a transposed copy.
COLUMN_BAND, TRANSPOSED_TILE, RECODE_TILE = (32, 128), (128, 64), (128, 64)
#: Codes that a program recodes where nothing is transposed.
RECODE_BLOCK = 8192

WARP = tl.constexpr(32)
#: Float32 numbers around it are one apart, so that adding it rounds to an integer, which then stands in the low bits.
ROUNDER = tl.constexpr(1.5 * 2.0**MANTISSA_BITS)
SMALLEST_CLIP = tl.constexpr(RMS_FLOOR)
#: Added to a mean of squares, for roots to be taken of positive numbers only; of float32 numbers' it is no part.
SMALLEST_MEAN = tl.constexpr(1e-300)
#: PTX: of a pair of numbers, not negative, and the magnitudes of another the greater ones; NaN if one is.
_GREATER_PAIR = "{{.reg .b32 magnitude; abs.{0} magnitude, $2; max.NaN.{0} $0, $1, magnitude;}}"
GREATER_BF16, GREATER_FP16 = (tl.constexpr(_GREATER_PAIR.format(pair)) for pair in ("bf16x2", "f16x2"))


# --- scales ---------------------------------------------------------------------------------------------------------


@triton.jit
def rms_scale_pair(squares, size, fmt: tl.constexpr):
    """Scale and reciprocal γ of rows of ``size`` elements with this sum of ``squares``, float64.

    Float64 until both are rounded, so that neither the order of summation shows, nor a product in place of a quotient,
    nor the last bits of quotients and roots, which of the ``rms`` rule are refined approximations on a GPU: IEEE's
    would take branches, and nothing is moved across them into the time that their chain of dependent instructions
    takes.
    """
    if INTERPRETED or fmt.clip == 0.0:
        scale, gamma = fmt.scale_pair(tl.sqrt(squares / size))
    else:
        mean = squares * _inverse(tl.cast(size, tl.float64))
        finite = mean < float("inf")
        clip = fmt.clip * tl.where(finite, _root(mean + SMALLEST_MEAN), mean) + SMALLEST_CLIP
        inverse = tl.where(finite, _inverse(clip), tl.where(mean > 0.0, 0.0, mean))
        scale, gamma = (clip * (1.0 / fmt.largest)).to(tl.float32), (inverse * fmt.largest).to(tl.float32)
    return scale, gamma


@triton.jit
def _inverse(x):
    """1 / x, float64, of a normal number: an approximation of 20 bits, which a cubic and a linear step refine."""
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    error = tl.fma(-y, x, 1.0)
    y = tl.fma(tl.fma(error, error, error), y, y)
    return tl.fma(tl.fma(-y, x, 1.0), y, y)


@triton.jit
def _root(x):
    """√x, likewise."""
    y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    error = tl.fma(-y * y, x, 1.0)
    y = tl.fma(tl.fma(error, 0.375, 0.5), y * error, y)
    root = x * y
    return tl.fma(tl.fma(-root, root, x), 0.5 * y, root)


# --- rounding -------------------------------------------------------------------------------------------------------


@triton.jit
def saturated(y, fmt: tl.constexpr):
    """y within ±largest, NaN as the largest: for rows beyond ``plain_limit``, whose y may be anything."""
    if INTERPRETED:  # of a number and NaN, a GPU takes the number
        y = tl.where(y == y, y, fmt.largest)
    y = tl.minimum(y, fmt.largest)
    if INTERPRETED or not fmt.is_target:  # conversions to the target saturate
        y = tl.maximum(y, -fmt.largest)
    return y


@triton.jit
def biased_code(y, fmt: tl.constexpr):
    """Int32 whose lowest bits are ⌊y⌋ + bias, of a grid that ``floors``: y rounded to half-integers with ties up."""
    base: tl.constexpr = ROUNDER + fmt.bias
    if INTERPRETED:
        raised = tl.floor(y) + base
    else:
        raised = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, $2;", "=f,f,f", [y, base], dtype=tl.float32, is_pure=True, pack=1
        )
    return as_bits(raised)


@triton.jit
def biased_level(code, fmt: tl.constexpr):
    """Float32 level of a :func:`biased_code`."""
    base: tl.constexpr = ROUNDER + fmt.bias
    return as_float(code) - base + 0.5


@triton.jit
def nearest(y, fmt: tl.constexpr):
    """The level nearest to y (no NaN, see ``plain_limit``) with y's sign, float32, and its code, int32.

    The code is the stored one, or that of :func:`biased_code` for a ``biased`` grid.
    """
    if fmt.floors:
        code = biased_code(y, fmt)
        level = biased_level(code, fmt)
        if fmt.pruned:
            index = as_bits(tl.abs(level) - 0.5 + ROUNDER) & (2 ** (fmt.bits - 1) - 1)
            code = (index + 1) | tl.where(y < 0.0, 2 ** (fmt.bits - 1), 0)
    else:
        level, code = fmt.nearest(y)
    return level, code


@triton.jit
def tensor_core_code(level, fmt: tl.constexpr):
    """A level in the target type, which holds it exactly, less an offset."""
    if fmt.factor != 1.0:
        level *= fmt.factor
    if fmt.target_offset != 0.0:
        level -= fmt.target_offset
    if fmt.target == "int8":
        code = as_bits(level + ROUNDER).to(tl.int8)
    elif fmt.target == "e4m3":
        code = level.to(tl.float8e4nv)
    else:
        code = level.to(tl.float8e5)
    return code


@triton.jit
def encoded(y, fmt: tl.constexpr):
    """8-bit code and code (see :func:`nearest`) of y (no NaN, see ``plain_limit``)."""
    if fmt.is_target and not INTERPRETED:
        eight_bit = tensor_core_code(y, fmt)
        code = eight_bit.to(tl.uint8, bitcast=True)
    else:
        level, code = nearest(y, fmt)
        eight_bit = tensor_core_code(level, fmt)
    return eight_bit, code


@triton.jit
def halves(x, axis: tl.constexpr):
    """Of every two neighbours along ``axis`` of a matrix the first and the second."""
    n: tl.constexpr = x.shape[0]
    m: tl.constexpr = x.shape[1]
    return tl.split(
        tl.reshape(x, [n, m // 2, 2]) if axis == 1 else tl.permute(tl.reshape(x, [n // 2, 2, m]), (0, 2, 1))
    )


@triton.jit
def _joined(codes, width: tl.constexpr, axis: tl.constexpr):
    """Codes of ``width`` bits as half as many of twice that, the lower index in the lower bits."""
    low, high = halves(codes, axis)
    return low + (high << width)


@triton.jit
def pack_codes(codes, fmt: tl.constexpr, axis: tl.constexpr):
    """Codes (see :func:`nearest`) as bytes of stored codes, packed along ``axis`` of a matrix."""
    if fmt.codes_per_byte == 8:
        codes = _joined(codes, 1, axis)
    if fmt.codes_per_byte >= 4:
        codes = _joined(codes, 2, axis)
    if fmt.codes_per_byte >= 2:
        codes = _joined(codes, 4, axis)
    codes = codes.to(tl.uint8)
    return _sign_magnitude(codes, fmt) if fmt.biased else codes


@triton.jit
def pack_levels(level, fmt: tl.constexpr):
    """Levels as bytes of stored codes, packed along axis 1, where :attr:`Grid.pack_8bit` has them from 8-bit codes.

    Four bytes at once: a thread has as many. Levels are converted once more, even and odd ones apart, which costs less
    than to part the bytes of 8-bit codes, and depends on no order in which a thread holds them.
    """
    even, odd = halves(level, 1)
    even, odd = tensor_core_code(even, fmt), tensor_core_code(odd, fmt)
    return tl.inline_asm_elementwise(
        fmt.pack_8bit,
        "=r,r,r",
        [even.to(tl.uint8, bitcast=True), odd.to(tl.uint8, bitcast=True)],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _sign_magnitude(codes, fmt: tl.constexpr):
    """Bytes of stored codes from bytes of ⌊y⌋ + bias: four at once where a thread has as many.

    It has if a warp does: programs of several warps have 32 elements per thread or more.
    """
    if INTERPRETED or codes.shape[0] * codes.shape[1] < 4 * WARP:
        number = codes.to(tl.int32) ^ fmt.in_every_code(fmt.bias)
        sign = number & fmt.in_every_code(2 ** (fmt.bits - 1))
        flip = sign - (sign >> (fmt.bits - 1))
        stored = ((number ^ flip) & fmt.in_every_code(2**fmt.bits - 1)).to(tl.uint8)
    else:
        stored = tl.inline_asm_elementwise(fmt.sign_magnitude, "=r,r", [codes], dtype=tl.uint8, is_pure=True, pack=4)
    return stored


# --- by rows --------------------------------------------------------------------------------------------------------


@triton.jit
def _loaded(x, fold, at, inside):
    """Elements ``at`` of the row x, or float32 products with those of ``fold``; 0 unless ``inside`` (``None``: all)."""
    other: tl.constexpr = None if inside is None else 0.0
    value = tl.load(x + at, mask=inside, other=other)
    if fold is not None:
        value = value.to(tl.float32) * tl.load(fold + at, mask=inside, other=other)
    return value


@triton.jit
def _row_maximum(row):
    """max |x|, float32, of a row in parts [n, RUN]; NaN if there is one."""
    largest = tl.zeros(row[0].shape, row[0].dtype)
    for i in tl.static_range(len(row)):
        largest = _greater_magnitude(largest, row[i])
    largest = _halved(_halved(_halved(largest)))  # what a thread has becomes one pair
    return absolute_maximum(largest.to(tl.float32), None)


@triton.jit
def _greater_magnitude(largest, x):
    """The greater of ``largest``, not negative, and |x|; NaN if one is. 16-bit elements are compared in pairs."""
    if INTERPRETED or x.dtype == tl.float32:
        largest = greater(largest.to(tl.float32), tl.abs(x.to(tl.float32))).to(x.dtype)
    else:
        ptx: tl.constexpr = GREATER_BF16 if x.dtype == tl.bfloat16 else GREATER_FP16
        largest = tl.inline_asm_elementwise(ptx, "=r,r,r", [largest, x], dtype=x.dtype, is_pure=True, pack=2)
    return largest


@triton.jit
def _halved(largest):
    """[2n, m / 2] from [n, m]: the greater of first and second halves."""
    first, second = halves(tl.reshape(largest, [2 * largest.shape[0], largest.shape[1] // 2]), 0)
    return _greater_magnitude(first, second)


@triton.jit
def _write_part(
    y,
    codes,
    stored,
    start,
    size,
    stored_size,
    fmt: tl.constexpr,
    part: tl.constexpr,
    ragged: tl.constexpr,
    whole: tl.constexpr,
):
    """8-bit and packed codes of the ``part`` elements of a row from ``start`` on; ``whole``: the row has as many."""
    at = start + runs(part, RUN)
    inside = None if whole else at < size
    from_levels: tl.constexpr = stored is not None and fmt.pack_8bit != "" and not INTERPRETED
    if from_levels:
        level, _ = nearest(y, fmt)
        eight_bit = tensor_core_code(level, fmt)
    else:
        eight_bit, code = encoded(y, fmt)
    tl.store(codes + at, eight_bit, mask=inside)
    if stored is not None:
        # The last byte is filled with zeros.
        if from_levels:
            packed = pack_levels(tl.where(inside, level, 0.0) if ragged and not whole else level, fmt)
        else:
            packed = pack_codes(tl.where(inside, code, fmt.blank) if ragged and not whole else code, fmt, 1)
        at = start // fmt.codes_per_byte + runs(part // fmt.codes_per_byte, RUN // fmt.codes_per_byte)
        tl.store(stored + at, packed, mask=None if whole else at < stored_size)


@triton.jit
def _write_row(
    row,
    gamma,
    codes,
    stored,
    size,
    stored_size,
    fmt: tl.constexpr,
    part: tl.constexpr,
    ragged: tl.constexpr,
    saturate: tl.constexpr,
):
    for i in tl.static_range(len(row)):
        y = row[i].to(tl.float32) * gamma
        if saturate:
            y = saturated(y, fmt)
        _write_part(y, codes, stored, i * part, size, stored_size, fmt, part, ragged, i < len(row) - 1)


@triton.jit
def _quantize_row(
    x,
    fold,
    codes,
    scales,
    stored,
    row_stride,
    size,
    stored_size,
    fmt: tl.constexpr,
    part: tl.constexpr,
    parts: tl.constexpr,
    ragged: tl.constexpr,
):
    """One row, in as many parts as it takes, not padded to a power of two as a block is; all but the last are whole."""
    number = tl.program_id(0).to(tl.int64)
    x += number * row_stride
    codes += number * size
    if stored is not None:
        stored += number * stored_size
    row = ()
    for i in tl.static_range(parts):
        at = i * part + runs(part, RUN)
        row += (_loaded(x, fold, at, None if i < parts - 1 else at < size),)  # type: ignore[assignment]
    amax = greater(_row_maximum(row), fmt.amax_floor)
    scale, gamma = fmt.scale_pair(amax)
    tl.store(scales + number, scale)
    # Every row would be saturated, by predicated instructions, if no more than that stood in a branch.
    if amax <= fmt.plain_limit:
        _write_row(row, gamma, codes, stored, size, stored_size, fmt, part, ragged, False)
    else:
        _write_row(row, gamma, codes, stored, size, stored_size, fmt, part, ragged, True)


@triton.jit
def _quantize_long_row(
    x,
    fold,
    codes,
    scales,
    stored,
    row_stride,
    size,
    stored_size,
    fmt: tl.constexpr,
    block: tl.constexpr,
    ragged: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    running = tl.zeros([block // RUN, RUN], tl.float32)
    for start in range(0, size, block):
        at = start + runs(block, RUN)
        running = greater(running, tl.abs(_loaded(x, fold, at, at < size).to(tl.float32)))
    amax = greater(absolute_maximum(running, None), fmt.amax_floor)
    scale, gamma = fmt.scale_pair(amax)
    tl.store(scales + row, scale)
    if stored is not None:
        stored += row * stored_size
    for start in range(0, size, block):
        at = start + runs(block, RUN)
        y = saturated(_loaded(x, fold, at, at < size).to(tl.float32) * gamma, fmt)
        _write_part(y, codes + row * size, stored, start, size, stored_size, fmt, block, ragged, False)


# --- transposed -----------------------------------------------------------------------------------------------------


@triton.jit
def _loaded_tile(x, first_row, first_column, rows, columns, row_stride, tile_rows: tl.constexpr, tile: tl.constexpr):
    """Float32 tile [tile_rows, tile] of the matrix x, 0 beyond its edges."""
    row = first_row + tl.arange(0, tile_rows)[:, None]
    column = first_column + tl.arange(0, tile)[None, :]
    at = row.to(tl.int64) * row_stride + column
    return tl.load(x + at, mask=(row < rows) & (column < columns), other=0.0).to(tl.float32)


@triton.jit
def _write_transposed(
    codes, tile, first_row, first_column, rows, columns, tile_rows: tl.constexpr, tile_columns: tl.constexpr
):
    """Tile [tile_rows, tile_columns] of codes to the contiguous matrix [columns, rows]."""
    row = first_row + tl.arange(0, tile_rows)[None, :]
    column = first_column + tl.arange(0, tile_columns)[:, None]
    at = column.to(tl.int64) * rows + row
    tl.store(codes + at, tl.trans(tile), mask=(row < rows) & (column < columns))


@triton.jit
def _row_scales(x, scales, gammas, row_stride, size, fmt: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    at = runs(block, RUN)
    largest = tl.abs(_loaded(x, None, at, at < size).to(tl.float32))
    for start in range(block, size, block):
        largest = greater(largest, tl.abs(_loaded(x, None, start + at, start + at < size).to(tl.float32)))
    scale, gamma = fmt.scale_pair(greater(absolute_maximum(largest, None), fmt.amax_floor))
    tl.store(scales + row, scale)
    tl.store(gammas + row, gamma)


@triton.jit
def _encode_transposed(
    x,
    by_row,
    by_column,
    codes,
    row_stride,
    rows,
    size,
    fmt: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
):
    """Codes [size, rows] of x · by_row · by_column, tile by tile along the rows."""
    tiles = tl.cdiv(size, tile)
    first_row = (tl.program_id(0) // tiles) * tile_rows
    first_column = (tl.program_id(0) % tiles) * tile
    y = _loaded_tile(x, first_row, first_column, rows, size, row_stride, tile_rows, tile)
    if by_row is not None:
        row = first_row + tl.arange(0, tile_rows)
        y *= tl.load(by_row + row, mask=row < rows, other=0.0)[:, None]
    if by_column is not None:
        column = first_column + tl.arange(0, tile)
        y *= tl.load(by_column + column, mask=column < size, other=0.0)[None, :]
    eight_bit, _ = encoded(saturated(y, fmt), fmt)
    _write_transposed(codes, eight_bit, first_row, first_column, rows, size, tile_rows, tile)


# --- by columns -----------------------------------------------------------------------------------------------------


@triton.jit
def _quantize_rows_of_pair(
    x,
    fold,
    fold_rows,
    codes,
    scales,
    partials,
    row_stride,
    rows,
    size,
    fmt: tl.constexpr,
    block: tl.constexpr,
    band: tl.constexpr,
    stages: tl.constexpr,
):
    """Every ``num_programs(0)``-th band, one or two rows, of x · fold; over these the columns' largest |x · fold_rows|.

    Two rows wait for the maxima of other warps once. The next bands are on their way to shared memory meanwhile.
    """
    at = runs(block, RUN)
    columns = tl.zeros([block // RUN, RUN], tl.float32)
    if fold is not None:
        fold = tl.load(fold + at, mask=at < size, other=0.0)
    for first in tl.range(tl.program_id(0) * band, rows, tl.num_programs(0) * band, num_stages=stages):
        values, largest = (), ()
        for i in tl.static_range(band):
            row = tl.minimum(first + i, rows - 1).to(tl.int64)  # a last row may come twice
            value = tl.load(x + row * row_stride + at, mask=at < size, other=0.0).to(tl.float32)
            if fold_rows is not None:
                columns = greater(columns, tl.abs(value * tl.load(fold_rows + row)))
            else:
                columns = greater(columns, tl.abs(value))
            if fold is not None:
                value *= fold
            values += (value,)  # type: ignore[assignment]
            largest += (absolute_maximum(value, 1),)  # type: ignore[assignment]
        amax = tl.split(maximum(tl.join(*largest), 0)) if band == 2 else (maximum(largest[0], 0),)  # type: ignore[misc]
        for i in tl.static_range(band):
            row = tl.minimum(first + i, rows - 1).to(tl.int64)
            scale, gamma = fmt.scale_pair(greater(amax[i], fmt.amax_floor))
            tl.store(scales + row, scale)
            eight_bit, _ = encoded(saturated(values[i] * gamma, fmt), fmt)
            tl.store(codes + row * size + at, eight_bit, mask=at < size)
    tl.store(partials + tl.program_id(0).to(tl.int64) * size + at, columns, mask=at < size)


@triton.jit
def _reduce_columns(
    x, fold_rows, partials, row_stride, rows, size, tile_rows: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr
):
    """Largest |x · fold_rows| of ``tile`` columns over every ``num_programs(1)``-th band of rows."""
    column = tl.program_id(0) * tile
    running = tl.zeros([tile_rows, tile], tl.float32)
    bands = tl.num_programs(1) * tile_rows
    for first in tl.range(tl.program_id(1) * tile_rows, rows, bands, num_stages=stages):
        value = _loaded_tile(x, first, column, rows, size, row_stride, tile_rows, tile)
        if fold_rows is not None:
            row = first + tl.arange(0, tile_rows)
            value *= tl.load(fold_rows + row, mask=row < rows, other=0.0)[:, None]
        running = greater(running, tl.abs(value))
    at = column + tl.arange(0, tile)
    partial = partials + tl.program_id(1).to(tl.int64) * size
    tl.store(partial + at, absolute_maximum(running, 0), mask=at < size)


@triton.jit
def _column_scales(
    partials, scales, gammas, count, size, fmt: tl.constexpr, tile_rows: tl.constexpr, tile: tl.constexpr
):
    """Scales and reciprocals from ``count`` partial maxima of each column."""
    column = tl.program_id(0) * tile
    running = tl.zeros([tile_rows, tile], tl.float32)
    for first in range(0, count, tile_rows):
        running = greater(running, _loaded_tile(partials, first, column, count, size, size, tile_rows, tile))
    scale, gamma = fmt.scale_pair(greater(absolute_maximum(running, 0), fmt.amax_floor))
    at = column + tl.arange(0, tile)
    tl.store(scales + at, scale, mask=at < size)
    tl.store(gammas + at, gamma, mask=at < size)


# --- from stored codes ----------------------------------------------------------------------------------------------


@triton.jit
def _looked_up(code, fmt: tl.constexpr):
    """8-bit codes, uint8, of stored codes up to 4 bits wide: bytes shifted out of the format's table."""
    word = tl.full(code.shape, fmt.table_word(0, 8), tl.int64)
    if fmt.bits == 4:
        word = tl.where(code < 8, word, tl.full(code.shape, fmt.table_word(8, 8), tl.int64))
    return (word >> ((code & 7).to(tl.int64) * 8)).to(tl.uint8)


@triton.jit
def _looked_up_pair(byte, fmt: tl.constexpr):
    """8-bit codes, uint8, of the stored codes in the low and the high halves of bytes.

    Four bytes at once: their low nibbles are gathered to a selector of ``prmt``, which takes four bytes out of eight;
    the two halves of the table are looked up and a third selection, by the nibbles' highest bits, decides.
    """
    if INTERPRETED:
        low, high = _looked_up(byte.to(tl.int32) & 15, fmt), _looked_up(byte.to(tl.int32) >> 4, fmt)
    else:
        low, high = tl.inline_asm_elementwise(
            fmt.pair_lookup, "=r,=r,r", [byte], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def _converted(stored, fmt: tl.constexpr):
    """8-bit codes of stored codes that fill a byte."""
    if fmt.is_target:
        code = stored
    else:
        code = tensor_core_code(fmt.decode(stored.to(tl.int32)), fmt).to(tl.uint8, bitcast=True)
    return code


@triton.jit
def _interleaved(a, b):
    """[n, m] and [n, m] as [n, 2m], taking turns."""
    return tl.reshape(tl.join(a, b), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _recoded(stored, fmt: tl.constexpr):
    """8-bit codes [n, m · codes_per_byte] of bytes [n, m]."""
    if fmt.codes_per_byte == 1:
        codes = _converted(stored, fmt)
    elif fmt.codes_per_byte == 2:
        low, high = _looked_up_pair(stored, fmt)
        codes = _interleaved(low, high)
    else:
        codes = stored.to(tl.int32)
        codes = _interleaved(codes & 15, codes >> 4)
        codes = _interleaved(codes & 3, codes >> 2)
        if fmt.codes_per_byte == 8:
            codes = _interleaved(codes & 1, codes >> 1)
        codes = _looked_up(codes, fmt)
    return codes


@triton.jit
def _recode(stored, codes, row_stride, size, stored_size, fmt: tl.constexpr, block: tl.constexpr):
    """``block`` codes of one row."""
    blocks = tl.cdiv(size, block)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks) * block
    at = start // fmt.codes_per_byte + runs(block // fmt.codes_per_byte, RUN // fmt.codes_per_byte)
    code = _recoded(tl.load(stored + row * row_stride + at, mask=at < stored_size, other=0), fmt)
    at = start + runs(block, RUN)
    tl.store(codes + row * size + at, code, mask=at < size)


@triton.jit
def _recode_transposed(
    stored,
    codes,
    row_stride,
    rows,
    size,
    stored_size,
    fmt: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
):
    """A tile of ``tile`` bytes of ``tile_rows`` rows: bytes are transposed before they are unpacked."""
    tiles = tl.cdiv(stored_size, tile)
    row = (tl.program_id(0) // tiles) * tile_rows + tl.arange(0, tile_rows)
    byte = (tl.program_id(0) % tiles) * tile + tl.arange(0, tile)
    at = row.to(tl.int64)[:, None] * row_stride + byte[None, :]
    packed = tl.trans(tl.load(stored + at, mask=(row < rows)[:, None] & (byte < stored_size)[None, :], other=0))
    per_byte: tl.constexpr = fmt.codes_per_byte
    for i in tl.static_range(per_byte):
        if per_byte == 1:
            code = _converted(packed, fmt)
        elif per_byte == 2:
            code = _looked_up_pair(packed, fmt)[i]
        else:
            code = _looked_up((packed.to(tl.int32) >> (i * (8 // per_byte))) & (2 ** (8 // per_byte) - 1), fmt)
        column = byte * per_byte + i
        at = column.to(tl.int64)[:, None] * rows + row[None, :]
        tl.store(codes + at, code, mask=(column < size)[:, None] & (row < rows)[None, :])


# --- with outliers --------------------------------------------------------------------------------------------------


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
    x += row * row_stride
    codes += row * size
    if amax <= fmt.plain_limit:
        _write_compensated_row(x, codes, lowest, highest, gamma, size, fmt, compensated, part, False)
    else:
        _write_compensated_row(x, codes, lowest, highest, gamma, size, fmt, compensated, part, True)


# --- what is supported ----------------------------------------------------------------------------------------------


@cache
def supports_quantize_8bit(dtypes: tuple[torch.dtype, ...], quantizer: str) -> Support:
    """Whether the kernels here quantize tensors of ``dtypes`` so, and if not, why."""
    q = Quantizer.parse(quantizer)
    reason = unsupported(q) or missing_conversion(q.format)
    if not reason and q.scale.statistic == "rms":
        reason = "root mean squares are taken by the kernels of transforms"
    return (False, reason) if reason else supports_dtypes(dtypes)


supports_quantize_8bit_transposed = supports_quantize_8bit_pair = supports_quantize_8bit


def supports_columns(dtypes: tuple[torch.dtype, ...], quantizer: str, by_columns: bool) -> Support:
    """The same for :func:`quantize_columns`; ``by_columns``: whether a matrix is quantized along axis 0, unseeded."""
    q = Quantizer.parse(quantizer)
    if not by_columns:
        return False, "the Triton kernel quantizes the columns of a matrix"
    if q.format.torch_dtype is None:
        return False, f"the Triton kernel writes 8-bit codes, which those of {q.format.name} are not"
    return supports_quantize_8bit(dtypes, quantizer)


@cache
def supports_recode(dtypes: tuple[torch.dtype, ...], quantizer: str) -> Support:
    """Whether :func:`recode` handles codes of ``quantizer``, and if not, why; ``dtypes`` is empty."""
    q = Quantizer.parse(quantizer)
    fmt = q.format
    if fmt.codes_per_byte == 1 and not fmt.torch_dtype and (reason := why_not_rounded(fmt)):
        return False, reason
    return supports_quantize_8bit(dtypes, str(Quantizer(fmt)))


def supports_quantize_compensated(dtypes: tuple[torch.dtype, ...], operand: str, size: int) -> Support:
    """Whether :func:`quantize_compensated` handles rows of ``size`` elements of ``dtypes``, and if not, why."""
    supported, reason = supports_quantize_8bit(dtypes, str(Operand.parse(operand).quantizer))
    if not supported:
        return False, reason
    reason = missing_conversion(Quantizer.parse(COMPENSATED).format)
    return (False, reason) if reason else supports_size(size)


def missing_conversion(fmt: Format) -> str:
    """Why this device cannot write 8-bit codes of ``fmt``; empty if it can, or if there is none."""
    if fmt.tensor_core_type == "int8" or not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability()
    return "" if capability >= (8, 9) else f"FP8 needs compute capability 8.9, this device has {capability}"


# --- launching ------------------------------------------------------------------------------------------------------


def _flat(fold: Tensor | None) -> Tensor | None:
    return None if fold is None else fold.reshape(-1).contiguous()


def quantize_8bit(x: Tensor, quantizer: str, packed: bool, fold: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit`; x float32, bfloat16 or float16, any strides."""
    if x.numel() == 0:
        return reference.quantize_8bit(x, quantizer, packed, fold)
    q, fmt = Quantizer.parse(quantizer), grid_of(quantizer)
    x = with_dense_rows(x)
    rows, size = x.shape
    codes = x.new_empty((rows, size), dtype=tensor_core_dtype(q.format))
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    stored = x.new_empty((rows, q.packed_size(size) if packed else 0), dtype=torch.uint8)
    if size <= LONGEST_ROW:
        # Of the largest power of two that is not larger.
        num_warps = warps(row_block(size + 1) // 2, ELEMENTS_PER_THREAD)
        part = RUN.value * WARP.value * num_warps
        kernel, layout = _quantize_row, {"part": part, "parts": triton.cdiv(size, part)}
    else:
        num_warps = warps(LONGEST_ROW, ELEMENTS_PER_THREAD)
        kernel, layout = _quantize_long_row, {"block": LONGEST_ROW}
    launch(
        kernel,
        rows,
        x,
        _flat(fold),
        codes,
        scales,
        stored if packed else None,
        x.stride(0),
        size,
        stored.shape[1],
        fmt=fmt,
        **layout,
        ragged=size % fmt.codes_per_byte != 0,
        num_warps=num_warps,
    )
    return codes, scales, stored


def quantize_8bit_transposed(x: Tensor, quantizer: str) -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit_transposed`; dtypes and strides as above."""
    if x.numel() == 0:
        return reference.quantize_8bit_transposed(x, quantizer)
    x = with_dense_rows(x)
    rows, size = x.shape
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    gammas, block = torch.empty_like(scales), row_block(size)
    launch(
        _row_scales,
        rows,
        x,
        scales,
        gammas,
        x.stride(0),
        size,
        fmt=grid_of(quantizer),
        block=block,
        num_warps=warps(block, ELEMENTS_PER_THREAD),
    )
    return _transposed(x, quantizer, gammas, None), scales


def quantize_8bit_pair(
    x: Tensor, quantizer: str, fold: Tensor | None, fold_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit_pair`; dtypes and strides as above."""
    if x.numel() == 0:
        return reference.quantize_8bit_pair(x, quantizer, fold, fold_rows)
    x, fold, fold_rows = with_dense_rows(x), _flat(fold), _flat(fold_rows)
    rows, size = x.shape
    if size > LONGEST_ROW:
        codes, scales, _ = quantize_8bit(x, quantizer, False, fold)
        return codes, scales, *_by_columns(x, quantizer, fold_rows, _column_maxima(x, fold_rows))
    codes = x.new_empty((rows, size), dtype=tensor_core_dtype(Quantizer.parse(quantizer).format))
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    block = row_block(size)
    band = 2 if block < LONGEST_ROW and rows > 1 else 1
    # As many programs as run at the same time: each writes the maxima of all columns once.
    programs = processors(x.device) * max(1, min(4, LONGEST_ROW // (band * block)))
    programs = min(triton.cdiv(rows, band), programs)
    partials = x.new_empty((programs, size), dtype=torch.float32)
    launch(
        _quantize_rows_of_pair,
        programs,
        x,
        fold,
        fold_rows,
        codes,
        scales,
        partials,
        x.stride(0),
        rows,
        size,
        fmt=grid_of(quantizer),
        block=block,
        band=band,
        stages=4 if band == 1 else 3,
        num_warps=warps(block, 32, most=32),
    )
    return codes, scales, *_by_columns(x, quantizer, fold_rows, partials)


def quantize_columns(x: Tensor, quantizer: str, fold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize` with axis 0: uint8 ``[N, M]`` and scales ``[N, 1]``.

    x ``[M, N]``; formats whose stored code is the 8-bit code.
    """
    if x.numel() == 0:
        return reference.quantize(x, quantizer, 0, fold=fold)
    x, fold = with_dense_rows(x), _flat(fold)
    codes, scales = _by_columns(x, quantizer, fold, _column_maxima(x, fold))
    return codes.view(torch.uint8), scales


def _column_maxima(x: Tensor, fold_rows: Tensor | None) -> Tensor:
    """Float32 ``[splits, N]``: the columns' largest |x · fold_rows| over parts of the rows."""
    rows, size = x.shape
    tile_rows, tile = COLUMN_BAND
    columns = triton.cdiv(size, tile)
    splits = max(1, min(triton.cdiv(rows, tile_rows), 8 * processors(x.device) // columns))
    partials = x.new_empty((splits, size), dtype=torch.float32)
    launch(
        _reduce_columns,
        (columns, splits),
        x,
        fold_rows,
        partials,
        x.stride(0),
        rows,
        size,
        tile_rows=tile_rows,
        tile=tile,
        stages=3,
        num_warps=warps(tile_rows * tile, 32),
    )
    return partials


def _by_columns(x: Tensor, quantizer: str, fold_rows: Tensor | None, partials: Tensor) -> tuple[Tensor, Tensor]:
    """8-bit codes ``[N, M]`` of x · fold_rows and scales ``[N, 1]`` from partial maxima of the columns."""
    size, fmt = x.shape[1], grid_of(quantizer)
    scales = x.new_empty((size, 1), dtype=torch.float32)
    gammas = torch.empty_like(scales)
    columns = 32
    launch(
        _column_scales,
        triton.cdiv(size, columns),
        partials,
        scales,
        gammas,
        partials.shape[0],
        size,
        fmt=fmt,
        tile_rows=128,
        tile=columns,
        num_warps=4,
    )
    return _transposed(x, quantizer, fold_rows, gammas), scales


def _transposed(x: Tensor, quantizer: str, by_row: Tensor | None, by_column: Tensor | None) -> Tensor:
    """8-bit codes ``[N, M]`` of x ``[M, N]`` · by_row · by_column."""
    rows, size = x.shape
    codes = x.new_empty((size, rows), dtype=tensor_core_dtype(Quantizer.parse(quantizer).format))
    tile_rows, tile = TRANSPOSED_TILE
    launch(
        _encode_transposed,
        triton.cdiv(rows, tile_rows) * triton.cdiv(size, tile),
        x,
        by_row,
        by_column,
        codes,
        x.stride(0),
        rows,
        size,
        fmt=grid_of(quantizer),
        tile_rows=tile_rows,
        tile=tile,
        num_warps=warps(tile_rows * tile, 32),
    )
    return codes


def recode(codes: Tensor, quantizer: str, size: int, transposed: bool) -> Tensor:
    """As :func:`qcompile.kernels.quantize.reference.recode`; codes ``[R, packed(K)]``, any strides."""
    if codes.numel() == 0:
        return reference.recode(codes, quantizer, size, transposed)
    q = Quantizer.parse(quantizer)
    fmt = grid_of(str(Quantizer(q.format)))  # codes do not depend on how they were scaled
    codes = with_dense_rows(codes)
    rows, stored_size = codes.shape
    shape = (size, rows) if transposed else (rows, size)
    recoded = codes.new_empty(shape, dtype=tensor_core_dtype(q.format))
    if transposed:
        tile_rows, tile = RECODE_TILE
        launch(
            _recode_transposed,
            triton.cdiv(rows, tile_rows) * triton.cdiv(stored_size, tile),
            codes,
            recoded.view(torch.uint8),
            codes.stride(0),
            rows,
            size,
            stored_size,
            fmt=fmt,
            tile_rows=tile_rows,
            tile=tile,
            num_warps=4,
        )
        return recoded
    if codes.is_contiguous() and size % fmt.codes_per_byte == 0:  # then it is all one row
        rows, size, stored_size = 1, rows * size, rows * stored_size
    launch(
        _recode,
        rows * triton.cdiv(size, RECODE_BLOCK),
        codes,
        recoded.view(torch.uint8),
        codes.stride(0),
        size,
        stored_size,
        fmt=fmt,
        block=RECODE_BLOCK,
        num_warps=warps(RECODE_BLOCK, 64),
    )
    return recoded


def quantize_compensated(x: Tensor, operand: str, axis: int) -> tuple[Tensor, Tensor]:
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
    scales = x.new_empty((*shape[:-1], 1), dtype=torch.float32)
    launch(
        _quantize_compensated_row,
        rows.shape[0],
        rows,
        codes,
        scales,
        rows.stride(0),
        size,
        *clamped_counts(spec.outliers, size),
        fmt=grid_of(str(spec.quantizer)),
        compensated=grid_of(COMPENSATED),
        **search_constants(rows, spec.outliers.alpha, SEARCHED_BYTES_PER_THREAD // x.element_size()),
        maxnreg=most_registers(rows),
    )
    return codes, scales
