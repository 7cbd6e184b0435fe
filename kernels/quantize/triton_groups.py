"""Rows in groups (:mod:`qcompile.kernels.groups`), quantized for the products of their gradients in Triton.

By rows a program finds the factors of its row's group, and is any row's program otherwise (2 bytes in, 1 out per
element). By columns (2 + 2 in, 1 out) programs find the absolute maxima of bands of one group, which meet by atomic
maxima of their bits, the same in any order; then tiles are written transposed, those of a group from a multiple of the
alignment on. By both (2 + 2 in, 1 + 1 out) it is the programs of rows that find the maxima, each of a band of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.ops import padded_rows
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.groups import ALIGNMENT, most_tiles, rows_of_tile
from qcompile.kernels.triton import (
    LONGEST_ROW,
    RUN,
    absolute_maximum,
    as_bits,
    as_float,
    greater,
    launch,
    row_block,
    runs,
    warps,
    with_dense_rows,
)

from . import reference
from .grid import grid_of
from .triton_codes import encoded, saturated
from .triton_columns import TRANSPOSED_TILE, loaded_tile
from .triton_rows import write_rows_of_groups

__all__ = ["quantize_groups", "quantize_groups_pair"]

#: Rows of a band, whose maxima are taken in tiles of so many rows and columns.
BAND = 512
BAND_TILE = (32, 128)
#: Rows of a band whose programs keep rows in registers.
PAIR_BAND = 64
#: Elements that a program of the small kernels takes.
BLOCK = 1024


@triton.jit
def _zero(maxima, count, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(maxima + at, 0, mask=at < count)


@triton.jit
def _maxima_of_groups(
    x,
    fold,
    maxima,
    offs,
    groups,
    row_stride,
    size,
    most: tl.constexpr,
    band: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
    stages: tl.constexpr,
):
    """Largest |x · fold| of ``tile`` columns in one band of a group, as bits."""
    group, begin, end = rows_of_tile(tl.program_id(1), offs, groups, most, band)
    column = tl.program_id(0) * tile
    running = tl.zeros([tile_rows, tile], tl.float32)
    for first in tl.range(begin, tl.minimum(begin + band, end), tile_rows, num_stages=stages):
        value = loaded_tile(x, first, column, end, size, row_stride, tile_rows, tile)
        row = first + tl.arange(0, tile_rows)
        value *= tl.load(fold + row, mask=row < end, other=0.0)[:, None]
        running = greater(running, tl.abs(value))
    if begin < end:
        at = column + tl.arange(0, tile)
        bits = as_bits(absolute_maximum(running, 0))  # of numbers that are not negative, in their order; NaN above all
        tl.atomic_max(maxima + group.to(tl.int64) * size + at, bits, mask=at < size, sem="relaxed")


@triton.jit
def _quantize_pair_of_groups(
    x,
    fold,
    fold_rows,
    codes,
    scales,
    maxima,
    offs,
    groups,
    row_stride,
    size,
    most: tl.constexpr,
    fmt: tl.constexpr,
    band: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
):
    """The rows of a band, all of one group, times ``fold``; and over them the columns' largest |x · fold_rows|."""
    group, begin, end = rows_of_tile(tl.program_id(0), offs, groups, most, band)
    at = runs(block, RUN)
    columns = tl.zeros([block // RUN, RUN], tl.float32)
    if begin < end:
        shared = group.to(tl.int64) * size + at
        factor = tl.load(fold + shared, mask=at < size, other=0.0)
        for i in tl.range(0, tl.minimum(end - begin, band), num_stages=stages):
            row = (begin + i).to(tl.int64)
            value = tl.load(x + row * row_stride + at, mask=at < size, other=0.0).to(tl.float32)
            columns = greater(columns, tl.abs(value * tl.load(fold_rows + row)))
            value *= factor
            scale, gamma = fmt.scale_pair(greater(absolute_maximum(value, None), fmt.amax_floor))
            tl.store(scales + row, scale)
            eight_bit, _ = encoded(saturated(value * gamma, fmt), fmt)
            tl.store(codes + row * size + at, eight_bit, mask=at < size)
        tl.atomic_max(maxima + shared, as_bits(columns), mask=at < size, sem="relaxed")


@triton.jit
def _scales_of_groups(maxima, scales, gammas, count, fmt: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    amax = as_float(tl.load(maxima + at, mask=at < count, other=0))
    scale, gamma = fmt.scale_pair(greater(amax, fmt.amax_floor))
    tl.store(scales + at, scale, mask=at < count)
    tl.store(gammas + at, gamma, mask=at < count)


@triton.jit
def _encode_groups(
    x,
    fold,
    gammas,
    codes,
    offs,
    groups,
    row_stride,
    padded,
    size,
    most: tl.constexpr,
    fmt: tl.constexpr,
    tile: tl.constexpr,
):
    """Codes [size, padded] of x · fold · gammas of the group, tile by tile along the rows; zeros after its last."""
    tiles = tl.cdiv(size, tile)
    number = tl.program_id(0) // tiles
    group, first, end = rows_of_tile(number, offs, groups, most, ALIGNMENT)
    if first < end:
        first_column = tl.program_id(0) % tiles * tile
        y = loaded_tile(x, first, first_column, end, size, row_stride, ALIGNMENT, tile)
        row, column = first + tl.arange(0, ALIGNMENT), first_column + tl.arange(0, tile)
        y *= tl.load(fold + row, mask=row < end, other=0.0)[:, None]
        y *= tl.load(gammas + group.to(tl.int64) * size + column, mask=column < size, other=0.0)[None, :]
        eight_bit, _ = encoded(saturated(y, fmt), fmt)
        code = tl.where((row < end)[:, None], eight_bit.to(tl.uint8, bitcast=True), 0)
        to = number * ALIGNMENT + tl.arange(0, ALIGNMENT)
        at = column.to(tl.int64)[:, None] * padded + to[None, :]
        tl.store(codes + at, tl.trans(code), mask=(column < size)[:, None])


# --- launching -------------------------------------------------------------------------------------------------------


def quantize_groups(x: Tensor, quantizer: str, axis: int, offs: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_groups`, but for what lies beyond the last group, which is
    not written or stands for anything; x float32, bfloat16 or float16, any strides.
    """
    if x.numel() == 0:
        return reference.quantize_groups(x, quantizer, axis, offs, fold)
    q, fmt = Quantizer.parse(quantizer), grid_of(quantizer)
    x, offs = with_dense_rows(x), offs.contiguous()
    (rows, size), groups = x.shape, offs.shape[0]
    if axis % 2:
        codes = x.new_empty((rows, size), dtype=torch.uint8)
        scales = x.new_empty((rows, 1), dtype=torch.float32)
        write_rows_of_groups(x, fmt, offs, fold, codes.view(tensor_core_dtype(q.format)), scales)
        return codes, scales
    fold, maxima = fold.reshape(-1).contiguous(), _no_maxima(x, groups)
    tile_rows, tile = BAND_TILE
    launch(
        _maxima_of_groups,
        (triton.cdiv(size, tile), most_tiles(rows, groups, BAND)),
        x,
        fold,
        maxima,
        offs,
        groups,
        x.stride(0),
        size,
        most=triton.next_power_of_2(groups),
        band=BAND,
        tile_rows=tile_rows,
        tile=tile,
        stages=3,
        num_warps=warps(tile_rows * tile, 32),
    )
    return _by_columns(x, quantizer, offs, fold, maxima)


def quantize_groups_pair(
    x: Tensor, quantizer: str, offs: Tensor, fold: Tensor, fold_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_groups_pair`, with the exceptions of
    :func:`quantize_groups`.
    """
    rows, size = x.shape
    if x.numel() == 0 or size > LONGEST_ROW:
        by_rows = quantize_groups(x, quantizer, 1, offs, fold)
        return *by_rows, *quantize_groups(x, quantizer, 0, offs, fold_rows)
    x, offs = with_dense_rows(x), offs.contiguous()
    groups, block = offs.shape[0], row_block(size)
    codes = x.new_empty((rows, size), dtype=torch.uint8)
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    fold_rows, maxima = fold_rows.reshape(-1).contiguous(), _no_maxima(x, groups)
    launch(
        _quantize_pair_of_groups,
        most_tiles(rows, groups, PAIR_BAND),
        x,
        fold.reshape(-1).contiguous(),
        fold_rows,
        codes.view(tensor_core_dtype(Quantizer.parse(quantizer).format)),
        scales,
        maxima,
        offs,
        groups,
        x.stride(0),
        size,
        most=triton.next_power_of_2(groups),
        fmt=grid_of(quantizer),
        band=PAIR_BAND,
        block=block,
        stages=3,
        num_warps=warps(block, 32, most=32),
    )
    return codes, scales, *_by_columns(x, quantizer, offs, fold_rows, maxima)


def _no_maxima(x: Tensor, groups: int) -> Tensor:
    """Int32 ``[E, N]``, zeros: bits of the columns' largest numbers, for kernels to raise."""
    maxima = x.new_empty((groups, x.shape[1]), dtype=torch.int32)
    launch(_zero, triton.cdiv(maxima.numel(), BLOCK), maxima, maxima.numel(), block=BLOCK)
    return maxima


def _by_columns(x: Tensor, quantizer: str, offs: Tensor, fold: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Padded codes and scales of x · fold by columns, from the maxima of groups."""
    (rows, size), groups, fmt = x.shape, offs.shape[0], grid_of(quantizer)
    scales = x.new_empty((groups, size, 1), dtype=torch.float32)
    gammas, count = torch.empty_like(scales), groups * size
    launch(_scales_of_groups, triton.cdiv(count, BLOCK), maxima, scales, gammas, count, fmt=fmt, block=BLOCK)
    padded = padded_rows(rows, groups)
    codes = x.new_empty((size, padded), dtype=torch.uint8)
    _, tile = TRANSPOSED_TILE
    launch(
        _encode_groups,
        most_tiles(rows, groups, ALIGNMENT.value) * triton.cdiv(size, tile),
        x,
        fold,
        gammas,
        codes,
        offs,
        groups,
        x.stride(0),
        padded,
        size,
        most=triton.next_power_of_2(groups),
        fmt=fmt,
        tile=tile,
        num_warps=warps(ALIGNMENT.value * tile, 32),
    )
    return codes, scales
