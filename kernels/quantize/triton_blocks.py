"""Quantize in blocks or squares with a scale of one byte each (NVFP4, MXFP4), in Triton: one read of x, equal to the
reference bit for bit.

A program has 128 neighbours along K of 64 rows: the blocks that they make up, and the chunk over which ``eden``
corrects its scales. How elements are assigned to threads, by what lies beside them in memory:

* **neighbours along K**: a thread has a part of a block, and exchanges maxima and sums with those beside it.
* **neighbours along rows** (K is the first axis of a matrix): a thread has whole blocks of a few rows, so that no scale
  is computed twice, and puts the codes of eight elements together before it writes them.

Where blocks choose among candidates (4/6, IF4), each candidate's errors are added up as integers, whose sum is the same
in any order.

Per element of a 16-bit x, in bytes of device memory: 2 in, ½ out, and a scale for every block. The loops that Inductor
generates read x once for absolute maxima, once for codes and once for sums or errors, and every site has loops of its
own, which have to be printed and compiled: of a block of Quartet II two hundred, where this is one kernel.
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
from qcompile.kernels.triton import absolute_maximum, as_bits, greater, launch, maximum, supports_dtypes

from .block_grid import ROWS, SPAN, block_grid_of, why_not_in_blocks

__all__ = ["quantize_blocks", "supports_blocks"]

WARPS = 8
WARPS_BY_COLUMNS = 4
#: Codes of a word, where whole blocks are in a thread.
WORD = tl.constexpr(8)
#: Elements of a block whose errors are computed side by side there: all of them take ten seconds to compile, and of
#: four 4/6 spills a register.
UNROLLED = tl.constexpr(2)


# --- scales ---------------------------------------------------------------------------------------------------------


@triton.jit
def _scale(amax, whole, number: tl.constexpr, fmt: tl.constexpr):
    """Stored scale, γ and s of a candidate, from absolute maxima that are no less than the floor."""
    if fmt.two_level:
        stored, gamma, scale = fmt.choices[number].scale(amax, tl.load(whole))
    else:
        stored, gamma, scale = fmt.choices[number].scale(amax)
    return stored, gamma, scale


@triton.jit
def _error(x, gamma, scale, unit, number: tl.constexpr, fmt: tl.constexpr):
    """Int64 errors of the levels that a candidate rounds x to; all of them broadcast."""
    count = fmt.scaled_error(x, fmt.choices[number].round_level(x * tl.abs(gamma)), scale, unit).to(tl.int64)
    return count * count if fmt.squared else tl.abs(count)


@triton.jit
def _less(error, least, candidate, best):
    """The error and, as a pair, stored scale and γ of what errs less; of equal ones of the best so far."""
    better = error < least
    stored, gamma = tl.where(better, candidate[0], best[0]), tl.where(better, candidate[1], best[1])
    return tl.where(better, error, least), (stored, gamma)


@triton.jit
def _choice(amax, whole, error_of: tl.constexpr, source, fmt: tl.constexpr):
    """Stored scales and γ of groups with ``amax``: of the candidate that errs least, of equal ones the first.
    ``error_of(source, γ, s, unit, candidate, fmt)``: errors of groups, of x that lies in ``source``.
    """
    amax = greater(amax, fmt.amax_floor)
    stored, gamma, scale = _scale(amax, whole, 0, fmt)
    if fmt.candidates > 1:
        unit = fmt.error_unit(amax)
        best = stored, gamma
        least = error_of(source, gamma, scale, unit, 0, fmt)
        candidates: tl.constexpr = fmt.candidates
        for i in tl.static_range(1, candidates):
            stored, gamma, scale = _scale(amax, whole, i, fmt)
            error = error_of(source, gamma, scale, unit, i, fmt)
            least, best = _less(error, least, (stored, gamma), best)
        stored, gamma = best
    return stored, gamma


@triton.jit
def _code(y, gamma, row, k, size, seed, fmt: tl.constexpr):
    """Int32 codes of y, the elements at ``row`` and ``k`` of blocks with ``gamma``; of more than 2³² the low bits of an
    index count.
    """
    if fmt.by_chance:
        chance = fmt.uniform(row * size + k, tl.load(seed).to(tl.int32))
        code = fmt.encode(y, as_bits(gamma) < 0, chance) if fmt.paired else fmt.encode(y, chance)
    else:
        code = fmt.encode(y, as_bits(gamma) < 0) if fmt.paired else fmt.encode(y)
    return code


@triton.jit
def _corrected(stored, squares, products, row, block, blocks, seed, fmt: tl.constexpr):
    """Stored scales under ``eden``, from the sums of their chunks."""
    chance = fmt.uniform(row * blocks + block, tl.load(seed).to(tl.int32))
    return fmt.corrected_scale(stored, squares, products, chance)


# --- neighbours along K ---------------------------------------------------------------------------------------------


@triton.jit
def _by_height(of_blocks, fmt: tl.constexpr):
    """[rows, blocks] as [rows / height, height, blocks]. What a group has is reduced along K first and then along rows:
    both at once are lanes of a warp that do not follow on each other, for which Triton (3.6, 3.7) takes others.
    """
    return tl.reshape(of_blocks, (of_blocks.shape[0] // fmt.height, fmt.height, of_blocks.shape[1]))


@triton.jit
def _for_rows(of_groups, fmt: tl.constexpr):
    """[rows / height, blocks] for every row: [rows, blocks]."""
    if fmt.height > 1:
        shape: tl.constexpr = (of_groups.shape[0], fmt.height, of_groups.shape[1])
        of_groups = tl.reshape(
            tl.broadcast_to(of_groups[:, None, :], shape), (of_groups.shape[0] * fmt.height, of_groups.shape[1])
        )
    return of_groups


@triton.jit
def _error_of_groups(blocks, gamma, scale, unit, number: tl.constexpr, fmt: tl.constexpr):
    """Errors of a candidate; ``gamma``, ``scale`` and ``unit`` by groups."""
    gamma, scale, unit = _for_rows(gamma, fmt), _for_rows(scale, fmt), _for_rows(unit, fmt)
    error = tl.sum(_error(blocks, gamma[:, :, None], scale[:, :, None], unit[:, :, None], number, fmt), 2)
    if fmt.height > 1:
        error = tl.sum(_by_height(error, fmt), 1)
    return error


@triton.jit
def _scale_of_groups(blocks, whole, fmt: tl.constexpr):
    """Stored scales and γ, [rows / height, blocks], of x [rows, blocks, block]."""
    amax = absolute_maximum(blocks, 2)
    if fmt.height > 1:
        amax = maximum(_by_height(amax, fmt), 1)
    return _choice(amax, whole, _error_of_groups, blocks, fmt)


@triton.jit(do_not_specialize=["rows", "blocks_of_row"])  # neither says how elements and codes are aligned
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
    batch_stride,
    row_stride,
    stride,
    fmt: tl.constexpr,
    tile: tl.constexpr,
    span: tl.constexpr,
):
    """x [batch, rows, size], of any strides; a last block may be short, and a last square."""
    spans = tl.cdiv(size, span)
    tiles = tl.cdiv(rows, tile)
    batch = tl.program_id(0) // (tiles * spans)
    first_row = (tl.program_id(0) // spans) % tiles * tile
    first = (tl.program_id(0) % spans) * span
    row = (first_row + tl.arange(0, tile))[:, None]
    k = (first + tl.arange(0, span))[None, :]
    at = batch.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride + k.to(tl.int64) * stride
    values = tl.load(x + at, mask=(row < rows) & (k < size), other=0.0).to(tl.float32)

    blocks = tl.reshape(values, (tile, span // fmt.block, fmt.block))
    stored, gamma = _scale_of_groups(blocks, whole, fmt)
    gamma = tl.broadcast_to(_for_rows(gamma, fmt)[:, :, None], blocks.shape)
    gamma = tl.reshape(gamma, (tile, span))
    y = values * tl.abs(gamma)
    code = _code(y, gamma, batch * rows + row, k, size, seed, fmt)

    height: tl.constexpr = fmt.height
    scale_row = (first_row // height + tl.arange(0, tile // height))[:, None]
    scale_rows = tl.cdiv(rows, height)
    block = (first // fmt.block + tl.arange(0, span // fmt.block))[None, :]
    if fmt.corrects:
        exact, level = y.to(tl.float64), fmt.decode(code).to(tl.float64)
        squares, products = tl.sum(exact * exact, 1)[:, None], tl.sum(exact * level, 1)[:, None]
        stored = _corrected(stored, squares, products, batch * rows + row, block, blocks_of_row, seed, fmt)
    at = (batch.to(tl.int64) * scale_rows + scale_row) * blocks_of_row + block
    tl.store(scales + at, stored.to(tl.uint8), mask=(scale_row < scale_rows) & (block < blocks_of_row))

    # Elements past the end are zeros, whose code is 0.
    if fmt.codes_per_byte == 2:
        low, high = tl.split(tl.reshape(code, (tile, span // 2, 2)))
        code = low | high << 4
    byte = (first // fmt.codes_per_byte + tl.arange(0, span // fmt.codes_per_byte))[None, :]
    at = (batch.to(tl.int64) * rows + row) * bytes_of_row + byte
    tl.store(codes + at, code.to(tl.uint8), mask=(row < rows) & (byte < bytes_of_row))


# --- neighbours along rows ------------------------------------------------------------------------------------------


@triton.jit
def _rows_by_groups(values, fmt: tl.constexpr):
    """[blocks, rows] as [blocks, rows / height, height]."""
    return tl.reshape(values, (values.shape[0], values.shape[1] // fmt.height, fmt.height))


@triton.jit
def _spread_rows(of_groups, fmt: tl.constexpr):
    """[blocks, groups] for every row of its group: [blocks, groups · height]."""
    if fmt.height > 1:
        shape: tl.constexpr = (of_groups.shape[0], of_groups.shape[1], fmt.height)
        of_groups = tl.reshape(
            tl.broadcast_to(of_groups[:, :, None], shape), (of_groups.shape[0], of_groups.shape[1] * fmt.height)
        )
    return of_groups


@triton.jit
def _error_of_columns(source, gamma, scale, unit, number: tl.constexpr, fmt: tl.constexpr):
    """Errors of a candidate by groups; ``gamma``, ``scale`` and ``unit`` by groups."""
    x, stride, inside = source
    gamma, scale, unit = _spread_rows(gamma, fmt), _spread_rows(scale, fmt), _spread_rows(unit, fmt)
    error = tl.zeros(gamma.shape, tl.int64)
    for i in tl.range(0, fmt.block, loop_unroll_factor=UNROLLED):
        value = tl.load(x + i * stride, mask=inside, other=0.0).to(tl.float32)
        error += _error(value, gamma, scale, unit, number, fmt)
    if fmt.height > 1:
        error = tl.sum(_rows_by_groups(error, fmt), 2)
    return error


@triton.jit
def _scale_of_columns(x, stride, inside, whole, count: tl.constexpr, tile: tl.constexpr, fmt: tl.constexpr):
    """As :func:`_scale_of_groups`, of blocks below each other: [count, tile / height]."""
    amax = tl.zeros((count, tile), tl.float32)
    block: tl.constexpr = fmt.block
    for i in tl.static_range(block):
        amax = greater(amax, tl.abs(tl.load(x + i * stride, mask=inside, other=0.0).to(tl.float32)))
    if fmt.height > 1:
        amax = maximum(_rows_by_groups(amax, fmt), 2)
    return _choice(amax, whole, _error_of_columns, (x, stride, inside), fmt)


@triton.jit(do_not_specialize=["blocks_of_row"])
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
    batch_stride,
    stride,
    fmt: tl.constexpr,
    tile: tl.constexpr,
    span: tl.constexpr,
):
    """x [batch, rows, size] whose rows are neighbours, of whole blocks; ``codes`` in words of 4 bytes."""
    block_size: tl.constexpr = fmt.block
    height: tl.constexpr = fmt.height
    count: tl.constexpr = span // block_size
    spans = tl.cdiv(size, span)
    tiles = tl.cdiv(rows, tile)
    batch = tl.program_id(0) // (tiles * spans)
    first_row = (tl.program_id(0) // spans) % tiles * tile
    row = (first_row + tl.arange(0, tile))[None, :]
    block = ((tl.program_id(0) % spans) * count + tl.arange(0, count))[:, None]
    inside = (row < rows) & (block < blocks_of_row)
    k = block * block_size
    x += batch.to(tl.int64) * batch_stride + row + k.to(tl.int64) * stride

    # x is read again for errors and for codes, from the cache beside the registers.
    stored, gamma = _scale_of_columns(x, stride, inside, whole, count, tile, fmt)
    gamma = _spread_rows(gamma, fmt)
    if fmt.corrects:
        squares, products = tl.zeros((count, tile), tl.float64), tl.zeros((count, tile), tl.float64)
    at = (batch.to(tl.int64) * rows + row) * (bytes_of_row // 4) + block * (block_size // WORD)
    for first in tl.range(0, block_size, WORD):
        word = tl.zeros((count, tile), tl.int32)
        for i in tl.static_range(WORD):
            value = tl.load(x + (first + i) * stride, mask=inside, other=0.0).to(tl.float32)
            y = value * tl.abs(gamma)
            code = _code(y, gamma, batch * rows + row, k + first + i, size, seed, fmt)
            word |= code << 4 * i
            if fmt.corrects:
                exact = y.to(tl.float64)
                squares += exact * exact
                products += exact * fmt.decode(code).to(tl.float64)
        tl.store(codes + at + first // WORD, word, mask=inside)
    if fmt.corrects:
        of_chunks = tl.sum(squares, 0)[None, :], tl.sum(products, 0)[None, :]
        at_row = batch * rows + row
        stored = _corrected(stored, of_chunks[0], of_chunks[1], at_row, block, blocks_of_row, seed, fmt)
    scale_row = (first_row // height + tl.arange(0, tile // height))[None, :]
    scale_rows = tl.cdiv(rows, height)
    at = (batch.to(tl.int64) * scale_rows + scale_row) * blocks_of_row + block
    tl.store(scales + at, stored.to(tl.uint8), mask=(scale_row < scale_rows) & (block < blocks_of_row))


# --- launching ------------------------------------------------------------------------------------------------------


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
    q, fmt = Quantizer.parse(quantizer), block_grid_of(quantizer)
    moved = x.movedim(axis, -1)
    matrices = _matrices(moved, fmt.height)
    batches, rows, size = matrices.shape
    codes = x.new_empty([*moved.shape[:-1], q.packed_size(size)], dtype=torch.uint8)
    scales = x.new_empty(q.scale_shape(tuple(moved.shape)), dtype=torch.uint8)
    programs = batches * triton.cdiv(rows, ROWS) * triton.cdiv(size, SPAN)
    sizes = rows, size, codes.shape[-1], scales.shape[-1]
    whole_words = fmt.codes_per_byte == 2 and fmt.block % WORD.value == 0 and size % fmt.block == 0
    if whole_words and matrices.stride(1) == 1 and matrices.stride(2) != 1:
        words, strides = codes.view(torch.int32), (matrices.stride(0), matrices.stride(2))
        launch(
            _quantize_by_columns, programs, matrices, global_scale, seed, words, scales, *sizes, *strides,
            fmt=fmt, tile=ROWS, span=SPAN, num_warps=WARPS_BY_COLUMNS,
        )  # fmt: skip
    else:
        launch(
            _quantize, programs, matrices, global_scale, seed, codes, scales, *sizes, *matrices.stride(),
            fmt=fmt, tile=ROWS, span=SPAN, num_warps=WARPS,
        )  # fmt: skip
    return codes, scales.view(storage_dtype(q))


def _matrices(moved: Tensor, height: int) -> Tensor:
    """[batch, rows, K] from x with K moved last. Rows of a batch are those of one matrix where scales are not shared
    between rows and K is its last axis already, so that no program has few of them.
    """
    if height == 1 and moved.stride(-1) == 1:
        return moved.reshape(1, -1, moved.shape[-1])
    return moved.reshape(-1, *moved.shape[-2:]) if moved.dim() > 1 else moved.reshape(1, 1, -1)


@cache
def supports_blocks(
    dtypes: tuple[torch.dtype, ...], quantizer: str, transform: str, by_columns: bool = False
) -> tuple[bool, str]:
    """Whether :func:`quantize_blocks` quantizes tensors of ``dtypes``, and if not, why. ``by_columns`` is no matter."""
    reason = f"the kernel in blocks does not apply {transform}" if transform else ""
    reason = reason or why_not_in_blocks(Quantizer.parse(quantizer))
    return (False, reason) if reason else supports_dtypes(dtypes)
