"""Quantized and transposed in Triton, and the columns of a matrix. Bytes per element of a 16-bit x:

* **transposed** (2 in, 1 out, and of 4 bits ½ out and in): codes by rows, which are recoded in tiles; those of a small
  matrix come out of L2.
* **rows and columns of one matrix** (2 + 2 in, 1 + 1 out): persistent programs quantize rows and keep the absolute
  maxima of the columns they have seen in registers; a second kernel writes the columns' codes, transposed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.triton import (
    LONGEST_ROW,
    RUN,
    absolute_maximum,
    greater,
    launch,
    maximum,
    processors,
    row_block,
    runs,
    warps,
    with_dense_rows,
)

from . import reference
from .grid import grid_of
from .triton_codes import encoded, in_float32, saturated
from .triton_recode import recode
from .triton_rows import flat, quantize_8bit, write_rows

__all__ = ["TRANSPOSED_TILE", "loaded_tile", "quantize_8bit_pair", "quantize_8bit_transposed", "quantize_columns"]

#: Rows and columns of the tiles whose absolute maxima are taken, and of those that are transposed. 128 rows are lines
#: of 128 bytes in a transposed copy.
COLUMN_BAND, TRANSPOSED_TILE = (32, 128), (128, 64)


# --- transposed -----------------------------------------------------------------------------------------------------


@triton.jit
def loaded_tile(x, first_row, first_column, rows, columns, row_stride, tile_rows: tl.constexpr, tile: tl.constexpr):
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
    y = loaded_tile(x, first_row, first_column, rows, size, row_stride, tile_rows, tile)
    if by_row is not None:
        row = first_row + tl.arange(0, tile_rows)
        y *= tl.load(by_row + row, mask=row < rows, other=0.0)[:, None]
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
            value = in_float32(tl.load(x + row * row_stride + at, mask=at < size, other=0.0))
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
        value = loaded_tile(x, first, column, rows, size, row_stride, tile_rows, tile)
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
        running = greater(running, loaded_tile(partials, first, column, count, size, size, tile_rows, tile))
    scale, gamma = fmt.scale_pair(greater(absolute_maximum(running, 0), fmt.amax_floor))
    at = column + tl.arange(0, tile)
    tl.store(scales + at, scale, mask=at < size)
    tl.store(gammas + at, gamma, mask=at < size)


# --- launching -------------------------------------------------------------------------------------------------------


def quantize_8bit_transposed(x: Tensor, quantizer: str) -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit_transposed`; dtypes and strides as above."""
    if x.numel() == 0:
        return reference.quantize_8bit_transposed(x, quantizer)
    q, (*batch, size) = Quantizer.parse(quantizer), x.shape
    x = with_dense_rows(x.reshape(-1, size))
    scales = x.new_empty((*batch, 1), dtype=torch.float32)
    stored = x.new_empty((*batch, q.packed_size(size)), dtype=torch.uint8)
    write_rows(x, grid_of(quantizer), None, None, scales, stored.view(len(x), -1), None)
    return recode(stored, quantizer, size, True), scales


def quantize_8bit_pair(
    x: Tensor, quantizer: str, fold: Tensor | None, fold_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit_pair`; dtypes and strides as above."""
    if x.numel() == 0:
        return reference.quantize_8bit_pair(x, quantizer, fold, fold_rows)
    x, fold, fold_rows = with_dense_rows(x), flat(fold), flat(fold_rows)
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
    x, fold = with_dense_rows(x), flat(fold)
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
    (rows, size), fmt = x.shape, grid_of(quantizer)
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
    codes = x.new_empty((size, rows), dtype=tensor_core_dtype(Quantizer.parse(quantizer).format))
    tile_rows, tile = TRANSPOSED_TILE
    launch(
        _encode_transposed,
        triton.cdiv(rows, tile_rows) * triton.cdiv(size, tile),
        x,
        fold_rows,
        gammas,
        codes,
        x.stride(0),
        rows,
        size,
        fmt=fmt,
        tile_rows=tile_rows,
        tile=tile,
        num_warps=warps(tile_rows * tile, 32),
    )
    return codes, scales
