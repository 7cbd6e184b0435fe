"""Rotations and N:M selection in Triton, equal to the references bit for bit; and the rotation alone, as a kernel.

A thread holds blocks of up to 64 neighbours. Six of the seven butterflies of a block of 128 are additions between its
registers, in the order of the reference; the last one is an exchange with the next lane and an addition. (128
neighbours would need no exchange, but many more registers: three warps per scheduler cannot hide that such long code is
fetched no faster than it runs.)

Triton chooses layouts, so what runs where follows from shapes: *columns* [span, n] are blocks of ``span`` neighbours
below each other. Its default for such shapes gives every thread whole columns, as long as there are 32 of them.

**hadamard** reads 2 bytes per element of a 16-bit x and writes 2; ⅛ in for a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.quantize.grid import Constants
from qcompile.kernels.quantize.triton_codes import halves, in_float32, quarters
from qcompile.kernels.triton import (
    INTERPRETED,
    RUN,
    as_rows,
    launch,
    runs,
    supports_dtypes,
    warps,
)

from . import reference

__all__ = [
    "Part",
    "as_columns",
    "columns_of",
    "hadamard",
    "interleave",
    "kept",
    "part_of",
    "rotated",
    "runs_of",
    "supports_hadamard",
    "widened",
]

#: Most neighbours that one thread holds, and elements where it rotates them; and elements where it does not.
LARGEST_SPAN, UNROTATED_PER_THREAD = 64, 128
#: Elements that a program rotates where rows do not matter.
ROTATED_BLOCK = 4096

#: PTX: $1 · $2, whose magnitude is 1, added to what the lane $3 away has in place of $1.
_EXCHANGE = tl.constexpr(
    "{.reg .f32 other; shfl.sync.bfly.b32 other, $1, $3, 31, 0xffffffff; fma.rn.f32 $0, $1, $2, other;}"
)


# --- rotation -------------------------------------------------------------------------------------------------------


@triton.jit
def as_columns(x, span: tl.constexpr):
    """[n, 16] as [span, 16n / span], neighbours below each other: what is not last stays in a thread."""
    return tl.permute(tl.reshape(x, [x.shape[0] * x.shape[1] // span, span]), (1, 0))


@triton.jit
def runs_of(columns, run: tl.constexpr):
    """Inverse of :func:`_columns`, as [n, run]."""
    return tl.reshape(tl.permute(columns, (1, 0)), [columns.shape[0] * columns.shape[1] // run, run])


@triton.jit
def _butterfly(x, distance: tl.constexpr):
    """[m, n]: of every two elements ``distance`` apart along the first axis, sum and difference."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [m // (2 * distance), 2, distance, n]), (0, 2, 3, 1))
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, (0, 3, 1, 2)), [m, n])


@triton.jit
def _butterfly_of_columns(x, distance: tl.constexpr):
    """The same along the second axis."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [m, n // (2 * distance), 2, distance]), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [m, n])


@triton.jit
def _butterfly_of_lanes(x, distance: tl.constexpr):
    """The same, where the columns ``distance`` apart are held by threads ``distance`` lanes apart."""
    sign = tl.where(tl.arange(0, x.shape[1]) & distance != 0, -1.0, 1.0)[None, :]
    return tl.inline_asm_elementwise(
        _EXCHANGE, "=f,f,f,r", [x, sign, tl.full([1, 1], distance, tl.int32)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rotated(columns, block: tl.constexpr):
    """Float32 columns times the orthonormal Hadamard matrix of size ``block``."""
    span: tl.constexpr = columns.shape[0]
    for step in tl.static_range(10):
        if 2**step < block:
            if 2**step < span:
                columns = _butterfly(columns, 2**step)
            elif not INTERPRETED and columns.shape[1] >= 32 and 2**step < 32 * span:
                columns = _butterfly_of_lanes(columns, 2**step // span)
            else:
                columns = _butterfly_of_columns(columns, 2**step // span)
    if block > 1:
        columns *= block**-0.5
    return columns


# --- sparsity -------------------------------------------------------------------------------------------------------


@triton.jit
def kept(columns, width: tl.constexpr):
    """Bool like columns: of four aligned units of ``width`` neighbours, the two with the larger sums of squares."""
    score = columns * columns
    if width == 2:
        first, second = halves(score, 0)
        score = first + second
    a, b, c, d = quarters(score, 0)
    # A unit loses to a larger one, and to an equal one before it; NaN loses to nothing.
    stays_a = _at_most_one(b > a, c > a, d > a)
    stays_b = _at_most_one(a >= b, c > b, d > b)
    stays_c = _at_most_one(a >= c, b >= c, d > c)
    stays_d = _at_most_one(a >= d, b >= d, c >= d)
    stays = interleave(interleave(stays_a, stays_c), interleave(stays_b, stays_d))
    if width == 2:
        stays = interleave(stays, stays)
    return stays != 0


@triton.jit
def interleave(a, b):
    """[m, n] and [m, n] as [2m, n], taking turns."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [2 * a.shape[0], a.shape[1]])


@triton.jit
def _at_most_one(a, b, c):
    """Int32: 1 where at most one of three is true, else 0."""
    return tl.where((a & b) | (b & c) | (a & c), 0, 1)


# --- how a program holds its elements --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part(Constants):
    """How a program holds what it works on at once, ``block`` elements: columns of ``span``.

    Attributes:
        rotation: size of the Hadamard blocks.
        unit: neighbours that sparsity drops together, 0 if nothing is dropped.
        whole: whether a row is one part, and has no fewer elements.
        ragged: whether the last byte of a row of stored codes or of a mask has bits that no element has.
        words: whether eight elements may be encoded at once.
    """

    rotation: int
    span: int
    block: int
    unit: int = 0
    whole: bool = False
    ragged: bool = False
    words: bool = False

    @property
    def num_warps(self) -> int:
        return warps(self.block, LARGEST_SPAN if self.rotation > 1 else UNROTATED_PER_THREAD)


def part_of(size: int, rotation: int, block: int, **others: Any) -> Part:
    """Raises ``ValueError`` if rows of ``size`` elements cannot be rotated."""
    if size % rotation:
        msg = f"hadamard: {size} elements are no multiple of the block size {rotation}"
        raise ValueError(msg)
    block = max(block, rotation)
    # With 32 columns or more a thread has whole ones.
    return Part(rotation, max(RUN.value, min(rotation, LARGEST_SPAN, block // 32)), block, **others)


@triton.jit
def columns_of(x, start, size, part: tl.constexpr):
    """Float32 columns of a part of the row x from ``start`` on, 0 past its end."""
    at = start + runs(part.block, RUN)
    return widened(as_columns(tl.load(x + at, mask=at < size, other=0.0), part.span))


@triton.jit
def widened(columns):
    """Columns in float32; long ones of bfloat16 in pairs (:func:`in_float32`)."""
    if INTERPRETED or columns.dtype != tl.bfloat16 or columns.shape[0] == RUN:
        wide = columns.to(tl.float32)
    else:
        # To part them brings all of a column to one thread, while it still has 16 bits.
        upper, lower = _upper_and_lower(columns)
        wide = tl.permute(tl.join(in_float32(upper), in_float32(lower)), (2, 0, 1))
        wide = tl.reshape(wide, [columns.shape[0], columns.shape[1]])
    return wide


@triton.jit
def _upper_and_lower(columns):
    """The first half of every column and the second."""
    return tl.split(tl.permute(tl.reshape(columns, [2, columns.shape[0] // 2, columns.shape[1]]), (1, 2, 0)))


# --- hadamard --------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x,
    mask,
    out,
    row_stride,
    size,
    mask_size,
    part: tl.constexpr,
):
    """A part of one row."""
    span: tl.constexpr = part.span
    block: tl.constexpr = part.block
    parts = tl.cdiv(size, block)
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = (tl.program_id(0) % parts).to(tl.int64) * block
    columns = columns_of(x + row * row_stride, start, size, part)
    if mask is not None:
        at = start // 8 + runs(block // 8, RUN // 8)
        bits = as_columns(tl.load(mask + row * mask_size + at, mask=at < mask_size, other=0), span // 8).to(tl.int32)
        bits = tl.reshape(tl.broadcast_to(bits[:, None, :], [span // 8, 8, block // span]), [span, block // span])
        columns = tl.where((bits >> (tl.arange(0, span) % 8)[:, None]) & 1 != 0, columns, 0.0)
    at = start + runs(block, RUN)
    rotated_runs = runs_of(rotated(columns, part.rotation).to(out.dtype.element_ty), RUN)
    tl.store(out + row * size + at, rotated_runs, mask=at < size)


def supports_hadamard(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether :func:`hadamard` handles the dtype, and if not, why."""
    return supports_dtypes(dtypes)


def hadamard(x: Tensor, block: int, axis: int, mask: Tensor | None = None) -> Tensor:
    """As :func:`qcompile.kernels.transform.reference.hadamard`; float32, bfloat16 or float16, any strides.

    Raises ``ValueError`` if the axis is no multiple of ``block``, or the mask does not fit.
    """
    if x.numel() == 0:
        return reference.hadamard(x, block, axis, mask)
    rows, shape = as_rows(x, axis)
    rows = rows.contiguous()
    count, size = rows.shape
    mask_size = -(-size // 8)
    if mask is not None and mask.shape != (*shape[:-1], mask_size):
        msg = f"hadamard: mask {tuple(mask.shape)} does not fit {tuple(x.shape)}, axis {axis}"
        raise ValueError(msg)
    part = part_of(size, block, ROTATED_BLOCK)
    # The interpreter cuts where a GPU rounds: it leaves the cast to torch.
    out = torch.empty(shape, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if mask is None or size % 8 == 0:  # then it is all one row
        count, size, mask_size = 1, count * size, count * mask_size
    launch(
        _rotate,
        count * triton.cdiv(size, part.block),
        rows,
        None if mask is None else mask.contiguous(),
        out,
        rows.stride(0),
        size,
        mask_size,
        part=part,
        num_warps=part.num_warps,
    )
    moved = out.movedim(-1, axis)
    return moved if moved.stride() == x.stride() and moved.dtype == x.dtype else torch.empty_like(x).copy_(moved)
