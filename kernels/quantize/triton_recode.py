"""Stored codes as 8-bit codes in Triton, by table: ½ or 1 byte in, 1 out per element."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.ops import padded_rows
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.groups import ALIGNMENT, most_tiles, rows_of_tile
from qcompile.kernels.triton import (
    INTERPRETED,
    RUN,
    launch,
    runs,
    warps,
    with_dense_rows,
)

from . import reference
from .grid import grid_of
from .triton_codes import tensor_core_code

__all__ = ["recode"]

#: Rows and columns, in bytes of stored codes, of the tiles that are transposed.
RECODE_TILE = (128, 64)
#: Codes that a program recodes where nothing is transposed.
RECODE_BLOCK = 8192


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
    """A tile of ``tile`` bytes of ``tile_rows`` rows of one matrix of a batch."""
    tiles = tl.cdiv(stored_size, tile)
    row = tl.program_id(0) // tiles * tile_rows
    matrix = tl.program_id(1).to(tl.int64)
    stored += matrix * rows * row_stride
    codes += matrix * rows * size
    byte = tl.program_id(0) % tiles * tile
    _write_recoded(stored, codes, row, row, rows, rows, byte, row_stride, size, stored_size, fmt, tile_rows, tile)


@triton.jit
def _recode_groups(
    stored,
    codes,
    offs,
    groups,
    row_stride,
    padded,
    size,
    stored_size,
    most: tl.constexpr,
    fmt: tl.constexpr,
    tile: tl.constexpr,
):
    """The same of rows in groups, which begin at multiples of the alignment in ``padded`` columns of codes."""
    tiles = tl.cdiv(stored_size, tile)
    number = tl.program_id(0) // tiles
    _, row, end = rows_of_tile(number, offs, groups, most, ALIGNMENT)
    byte, to = tl.program_id(0) % tiles * tile, number * ALIGNMENT
    if row < end:
        _write_recoded(stored, codes, row, to, end, padded, byte, row_stride, size, stored_size, fmt, ALIGNMENT, tile)


@triton.jit
def _write_recoded(
    stored,
    codes,
    first,
    to,
    end,
    width,
    first_byte,
    row_stride,
    size,
    stored_size,
    fmt: tl.constexpr,
    tile_rows: tl.constexpr,
    tile: tl.constexpr,
):
    """``tile_rows`` rows from ``first`` on, and zeros from ``end`` on, as columns ``to`` … of the ``width`` of codes.

    Bytes are transposed before they are unpacked.
    """
    row = first + tl.arange(0, tile_rows)
    byte = first_byte + tl.arange(0, tile)
    at = row.to(tl.int64)[:, None] * row_stride + byte[None, :]
    packed = tl.trans(tl.load(stored + at, mask=(row < end)[:, None] & (byte < stored_size)[None, :], other=0))
    to += tl.arange(0, tile_rows)
    per_byte: tl.constexpr = fmt.codes_per_byte
    for i in tl.static_range(per_byte):
        if per_byte == 1:
            code = _converted(packed, fmt)
        elif per_byte == 2:
            code = _looked_up_pair(packed, fmt)[i]
        else:
            code = _looked_up((packed.to(tl.int32) >> (i * (8 // per_byte))) & (2 ** (8 // per_byte) - 1), fmt)
        column = byte * per_byte + i
        at = column.to(tl.int64)[:, None] * width + to[None, :]
        code = tl.where((row < end)[None, :], code, 0)
        tl.store(codes + at, code, mask=(column < size)[:, None] & (to < width)[None, :])


# --- launching -------------------------------------------------------------------------------------------------------


def recode(codes: Tensor, quantizer: str, size: int, transposed: bool, offs: Tensor | None = None) -> Tensor:
    """As :func:`qcompile.kernels.quantize.reference.recode`; codes ``[R, packed(K)]`` or a batch, any strides."""
    if codes.numel() == 0:
        return reference.recode(codes, quantizer, size, transposed, offs)
    q = Quantizer.parse(quantizer)
    fmt = grid_of(str(Quantizer(q.format)))  # codes do not depend on how they were scaled
    codes = with_dense_rows(codes) if codes.dim() == 2 else codes.contiguous()
    *batch, rows, stored_size = codes.shape
    tile_rows, tile = RECODE_TILE
    if offs is not None:
        groups, padded = offs.shape[0], padded_rows(rows, offs.shape[0])
        recoded = codes.new_empty((size, padded), dtype=tensor_core_dtype(q.format))
        launch(
            _recode_groups,
            most_tiles(rows, groups, ALIGNMENT.value) * triton.cdiv(stored_size, tile),
            codes,
            recoded.view(torch.uint8),
            offs,
            groups,
            codes.stride(0),
            padded,
            size,
            stored_size,
            most=triton.next_power_of_2(groups),
            fmt=fmt,
            tile=tile,
            num_warps=4,
        )
        return recoded
    shape = (*batch, size, rows) if transposed else (*batch, rows, size)
    recoded = codes.new_empty(shape, dtype=tensor_core_dtype(q.format))
    if transposed:
        launch(
            _recode_transposed,
            (triton.cdiv(rows, tile_rows) * triton.cdiv(stored_size, tile), math.prod(batch)),
            codes,
            recoded.view(torch.uint8),
            codes.stride(-2),
            rows,
            size,
            stored_size,
            fmt=fmt,
            tile_rows=tile_rows,
            tile=tile,
            num_warps=4,
        )
        return recoded
    rows *= math.prod(batch)
    if codes.is_contiguous() and size % fmt.codes_per_byte == 0:  # then it is all one row
        rows, size, stored_size = 1, rows * size, rows * stored_size
    launch(
        _recode,
        rows * triton.cdiv(size, RECODE_BLOCK),
        codes,
        recoded.view(torch.uint8),
        codes.stride(-2),
        size,
        stored_size,
        fmt=fmt,
        block=RECODE_BLOCK,
        num_warps=warps(RECODE_BLOCK, 64),
    )
    return recoded
