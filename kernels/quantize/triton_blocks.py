"""Quantize in blocks with a scale of one byte each (NVFP4, MXFP4), in Triton: one read of x, equal to the reference bit
for bit.

A program has 128 neighbours along K of a few rows: the blocks that they make up, and the chunk over which ``eden``
corrects its scales. How elements are assigned to threads, by what lies beside them in memory:

* **neighbours along K**: a thread has a part of a block, and exchanges maxima and sums with those beside it.
* **neighbours along rows** (K is the first axis of a matrix): a thread has whole blocks of a few rows, so that no scale
  is computed twice, and puts the codes of eight elements together before it writes them.

Per element of a 16-bit x, in bytes of device memory: 2 in, ½ out, and a scale for every block. The loops that Inductor
generates read x once for absolute maxima, once for codes and once for sums, and every site has loops of its own, which
have to be printed and compiled: of a block of Quartet II two hundred, where this is one kernel.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize import reference
from qcompile.kernels.triton import absolute_maximum, greater, launch, supports_dtypes

from .block_grid import SPAN, block_grid_of, why_not_in_blocks

__all__ = ["quantize_blocks", "supports_blocks"]

#: Rows of a program: where they are neighbours in memory, 64 of 16 bits are a line of it.
ROWS = 64
WARPS = 8
WARPS_BY_COLUMNS = 4
#: Codes of a word, where whole blocks are in a thread.
WORD = tl.constexpr(8)


@triton.jit
def _scale_pair(amax, whole, fmt: tl.constexpr):
    """Stored scales and γ of absolute maxima."""
    amax = greater(amax, fmt.amax_floor)
    if fmt.two_level:
        stored, gamma = fmt.scale_pair(amax, tl.load(whole))
    else:
        stored, gamma = fmt.scale_pair(amax)
    return stored, gamma


@triton.jit
def _encoded(y, row, k, size, seed, fmt: tl.constexpr):
    """Int32 codes of y, the elements at ``row`` and ``k``; of more than 2³² the low bits of an index count."""
    if fmt.by_chance:  # noqa: SIM108
        code = fmt.encode(y, fmt.uniform(row * size + k, tl.load(seed).to(tl.int32)))
    else:
        code = fmt.encode(y)
    return code


@triton.jit
def _corrected(stored, squares, products, row, block, blocks, seed, fmt: tl.constexpr):
    """Stored scales under ``eden``, from the sums of their chunks."""
    chance = fmt.uniform(row * blocks + block, tl.load(seed).to(tl.int32))
    return fmt.corrected_scale(stored, squares, products, chance)


@triton.jit
def _quantize(
    x,
    whole,
    seed,
    codes,
    scales,
    rows,
    size,
    bytes_of_row,
    blocks_of_row,
    row_stride,
    stride,
    fmt: tl.constexpr,
    tile: tl.constexpr,
    span: tl.constexpr,
):
    """x [rows, size], of any strides; a last block may be short."""
    spans = tl.cdiv(size, span)
    row = ((tl.program_id(0) // spans) * tile + tl.arange(0, tile))[:, None]
    first = (tl.program_id(0) % spans) * span
    k = (first + tl.arange(0, span))[None, :]
    at = row.to(tl.int64) * row_stride + k.to(tl.int64) * stride
    values = tl.load(x + at, mask=(row < rows) & (k < size), other=0.0).to(tl.float32)

    count: tl.constexpr = span // fmt.block
    blocks = tl.reshape(values, (tile, count, fmt.block))
    stored, gamma = _scale_pair(absolute_maximum(blocks, 2), whole, fmt)
    y = tl.reshape(blocks * gamma[:, :, None], (tile, span))
    code = _encoded(y, row, k, size, seed, fmt)

    block = (first // fmt.block + tl.arange(0, count))[None, :]
    if fmt.corrects:
        exact, level = y.to(tl.float64), fmt.decode(code).to(tl.float64)
        squares, products = tl.sum(exact * exact, 1)[:, None], tl.sum(exact * level, 1)[:, None]
        stored = _corrected(stored, squares, products, row, block, blocks_of_row, seed, fmt)
    at = row.to(tl.int64) * blocks_of_row + block
    tl.store(scales + at, stored.to(tl.uint8), mask=(row < rows) & (block < blocks_of_row))

    # Elements past the end are zeros, whose code is 0.
    if fmt.codes_per_byte == 2:
        low, high = tl.split(tl.reshape(code, (tile, span // 2, 2)))
        code = low | high << 4
    byte = (first // fmt.codes_per_byte + tl.arange(0, span // fmt.codes_per_byte))[None, :]
    at = row.to(tl.int64) * bytes_of_row + byte
    tl.store(codes + at, code.to(tl.uint8), mask=(row < rows) & (byte < bytes_of_row))


@triton.jit
def _quantize_by_columns(
    x,
    whole,
    seed,
    codes,
    scales,
    rows,
    size,
    bytes_of_row,
    blocks_of_row,
    stride,
    fmt: tl.constexpr,
    tile: tl.constexpr,
    span: tl.constexpr,
):
    """x [rows, size] whose rows are neighbours, of whole blocks; ``codes`` in words of 4 bytes."""
    block_size: tl.constexpr = fmt.block
    count: tl.constexpr = span // block_size
    spans = tl.cdiv(size, span)
    row = ((tl.program_id(0) // spans) * tile + tl.arange(0, tile))[None, :]
    block = ((tl.program_id(0) % spans) * count + tl.arange(0, count))[:, None]
    inside = (row < rows) & (block < blocks_of_row)
    k = block * block_size
    x += row + k.to(tl.int64) * stride

    # x is read twice, the second time from the cache beside the registers.
    amax = tl.zeros((count, tile), tl.float32)
    for i in tl.static_range(block_size):
        amax = greater(amax, tl.abs(tl.load(x + i * stride, mask=inside, other=0.0).to(tl.float32)))
    stored, gamma = _scale_pair(amax, whole, fmt)

    if fmt.corrects:
        squares, products = tl.zeros((count, tile), tl.float64), tl.zeros((count, tile), tl.float64)
    at = row.to(tl.int64) * (bytes_of_row // 4) + block * (block_size // WORD)
    for first in tl.static_range(0, block_size, WORD):
        word = tl.zeros((count, tile), tl.int32)
        for i in tl.static_range(WORD):
            value = tl.load(x + (first + i) * stride, mask=inside, other=0.0).to(tl.float32)
            y = value * gamma
            code = _encoded(y, row, k + first + i, size, seed, fmt)
            word |= code << 4 * i
            if fmt.corrects:
                exact = y.to(tl.float64)
                squares += exact * exact
                products += exact * fmt.decode(code).to(tl.float64)
        tl.store(codes + at + first // WORD, word, mask=inside)
    if fmt.corrects:
        of_chunks = tl.sum(squares, 0)[None, :], tl.sum(products, 0)[None, :]
        stored = _corrected(stored, of_chunks[0], of_chunks[1], row, block, blocks_of_row, seed, fmt)
    tl.store(scales + row.to(tl.int64) * blocks_of_row + block, stored.to(tl.uint8), mask=inside)


def quantize_blocks(
    x: Tensor,
    quantizer: str,
    axis: int,
    global_scale: Tensor | None = None,
    seed: Tensor | None = None,
    fold: Tensor | None = None,
    transform: str = "",
) -> tuple[Tensor, Tensor]:
    """``qcompile::quantize`` of what :func:`supports_blocks` takes."""
    if fold is not None or x.numel() == 0:
        return reference.quantize(x, quantizer, axis, global_scale, seed, fold, transform)
    q = Quantizer.parse(quantizer)
    moved = x.movedim(axis, -1)
    matrix = moved.reshape(-1, moved.shape[-1])
    rows, size = matrix.shape
    codes = x.new_empty([*moved.shape[:-1], q.packed_size(size)], dtype=torch.uint8)
    scales = x.new_empty(q.scale_shape(tuple(moved.shape)), dtype=torch.uint8)
    fmt, programs = block_grid_of(quantizer), triton.cdiv(rows, ROWS) * triton.cdiv(size, SPAN)
    sizes = rows, size, codes.shape[-1], scales.shape[-1]
    by_columns = matrix.stride(0) == 1 and fmt.codes_per_byte == 2 and size % fmt.block == 0
    if by_columns and matrix.stride(1) != 1:
        words = codes.view(torch.int32)
        launch(
            _quantize_by_columns, programs, matrix, global_scale, seed, words, scales, *sizes, matrix.stride(1),
            fmt=fmt, tile=ROWS, span=SPAN, num_warps=WARPS_BY_COLUMNS,
        )  # fmt: skip
    else:
        launch(
            _quantize, programs, matrix, global_scale, seed, codes, scales, *sizes, *matrix.stride(),
            fmt=fmt, tile=ROWS, span=SPAN, num_warps=WARPS,
        )  # fmt: skip
    return codes, scales.view(storage_dtype(q))


@cache
def supports_blocks(
    dtypes: tuple[torch.dtype, ...], quantizer: str, transform: str, by_columns: bool = False
) -> tuple[bool, str]:
    """Whether :func:`quantize_blocks` quantizes tensors of ``dtypes``, and if not, why. ``by_columns`` is no matter."""
    reason = f"the kernel in blocks does not apply {transform}" if transform else ""
    reason = reason or why_not_in_blocks(Quantizer.parse(quantizer))
    return (False, reason) if reason else supports_dtypes(dtypes)
