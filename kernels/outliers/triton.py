"""Outlier clamping in Triton: both bounds without a sort, and the residual in the order of positions.

* **a row** (``per=row``; 1 in, 1 out and the residual): a program searches its row in registers
  (:mod:`qcompile.kernels.outliers.row_search`), and reads it again from L1 or L2 to write.
* **a tensor** (``per=tensor``; 2 in, 1 out and the residual): one that is longer than a row can be is searched by
  counting (:mod:`qcompile.kernels.outliers.tensor_search`), then clamped range by range.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.ops import clamped_counts, index_dtype, residual_dtype
from qcompile.ir.outliers import OutlierClamp
from qcompile.kernels.triton import (
    INTERPRETED,
    LONGEST_ROW,
    MAGNITUDE,
    RUN,
    as_bits,
    as_rows,
    greater,
    launch,
    row_block,
    runs,
    supports_dtypes,
    supports_size,
)

from . import reference
from .row_search import row_bounds, row_tiles, search_constants
from .tensor_search import BEYOND, FIRST, KINDS, SIDE, number, ordinal, tensor_bounds

__all__ = ["clamp_outliers", "clamped", "supports_clamp_outliers"]

#: Registers of a thread that hold elements of a row while it is searched; more are needed to list a residual.
SEARCHED_REGISTERS = 16
#: Bytes that a program clamps at once, a part of its range of a tensor: 16 a thread.
CLAMPED_BYTES = 4096


@triton.jit
def clamped(value, lowest, highest):
    """``torch.clamp`` with the results of :func:`row_bounds`: NaN where one of the three is, and zeros keep their sign.

    On a GPU +0 is greater than −0, so a lowest −0 and a highest +0 leave both as they are.
    """
    if INTERPRETED:
        inner = tl.where(value < lowest, lowest, tl.where(value > highest, highest, value))
        inner = tl.where(lowest == lowest, tl.where(highest == highest, inner, highest), lowest)
    else:
        inner = tl.minimum(greater(value, lowest), highest, propagate_nan=tl.PropagateNan.ALL)
    return inner


# --- the residual ---------------------------------------------------------------------------------------------------


@triton.jit
def _list(values, positions, entry, residual, position, listed):
    """Store the entries of a residual where ``listed`` (an integer) is not 0, by the threads that hold them.

    ``tl.store`` would first hand pointers and values to other threads, so that neighbours lie side by side, and most
    of what it moves would be masked.
    """
    if INTERPRETED:
        tl.store(values + entry, residual, mask=listed != 0)
        tl.store(positions + entry, position, mask=listed != 0)
    else:
        bits: tl.constexpr = positions.dtype.element_ty.primitive_bitwidth
        tl.inline_asm_elementwise(
            "{ .reg .pred chosen; setp.ne.b32 chosen, $5, 0; @chosen st.global.b32 [$1], $2; @chosen st.global."
            + ("b8" if bits == 8 else ("b16" if bits == 16 else ("b32" if bits == 32 else "b64")))
            + " [$3], $4; mov.b32 $0, 0; }",
            "=r,l,r,l,l,r" if bits == 64 else "=r,l,r,l,r,r",
            [
                (values + entry).to(tl.int64),
                as_bits(residual),
                (positions + entry).to(tl.int64),
                position.to(tl.int64 if bits == 64 else tl.int32),
                listed,
            ],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


# --- rows -----------------------------------------------------------------------------------------------------------


@triton.jit
def _order(value):
    """Int32 that orders like float32 ``value``, both zeros alike and NaN above everything."""
    bits = as_bits(value + 0.0)
    return tl.where(value == value, bits ^ ((bits >> 31) & MAGNITUDE), MAGNITUDE)


@triton.jit
def _write_residual(values, positions, room, total, seen, residual, at, beyond, ties):
    """Entries of one side for a part of a row; the new ``seen``.

    The ``total`` elements beyond the bound come first, then as many that tie with it as there is ``room`` for.
    ``seen``: how many there were in earlier parts, those beyond in the low half, ties in the high half.
    """
    both = tl.reshape(beyond.to(tl.int32) | (ties.to(tl.int32) << 16), [at.shape[0] * RUN])
    counts = tl.reshape(tl.cumsum(both, 0), at.shape) + seen
    entry = tl.where(beyond, counts & 0xFFFF, total + (counts >> 16)) - 1
    chosen = beyond | (ties & (entry < room))
    _list(values, positions, entry, residual, at, chosen.to(tl.int32))
    return seen + tl.sum(both)


@triton.jit(do_not_specialize=["low", "high"])
def _clamp_row(
    x,
    clipped,
    values,
    positions,
    row_stride,
    size,
    low,
    high,
    pair: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
    part: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    clipped += row * size
    values += row * (low + high)
    positions += row * (low + high)
    row_elements = row_tiles(x + tl.zeros([1, 1], tl.int32), size, tiles, width)
    lowest, highest, _ = row_bounds(row_elements, size, low, high, pair)
    lowest, highest = lowest[:, None], highest[:, None]
    first, last = _order(lowest), _order(highest)
    out_below, out_above = tl.zeros([1, width], tl.int32), tl.zeros([1, width], tl.int32)
    for tile in tl.static_range(tiles):
        row_order = _order(row_elements[tile].to(tl.float32))
        in_row = tile * width + tl.arange(0, width)[None, :] < size
        out_below += (in_row & (row_order < first)).to(tl.int32)
        out_above += (in_row & (row_order > last)).to(tl.int32)
    below, above = tl.sum(out_below), tl.sum(out_above)
    seen_below, seen_above = below * 0, above * 0
    # x is read again, from L1 or L2, and in parts: the search has filled the registers.
    for start in range(0, size, part):
        at = start + runs(part, RUN)
        inside = at < size
        element = tl.load(x + at, mask=inside, other=0.0)
        value = element.to(tl.float32)
        tl.store(clipped + at, clamped(value, lowest, highest).to(element.dtype), mask=inside)
        order = _order(value)
        out, ties, residual = inside & (order < first), inside & (order == first), value - lowest
        seen_below = _write_residual(values, positions, low, below, seen_below, residual, at, out, ties)
        out, ties, residual = inside & (order > last), inside & (order == last), value - highest
        seen_above = _write_residual(values + low, positions + low, high, above, seen_above, residual, at, out, ties)


# --- a tensor -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["low", "high"])
def _clamp_range(
    x,
    clipped,
    values,
    positions,
    search,
    starts,
    numel,
    chunk,
    low,
    high,
    entries: tl.constexpr,
    block: tl.constexpr,
):
    """Clamp a range of a tensor. Each side lists the elements beyond its bound first, then ties to fill it.

    An element is listed once: where both bounds are equal, the upper side takes the ties that the lower one leaves.
    ``entries``: integers that count all elements and entries.
    """
    program = tl.program_id(0)
    begin = program.to(tl.int64) * chunk
    size = tl.minimum(numel - begin, chunk).to(tl.int32)
    dtype: tl.constexpr = x.dtype.element_ty
    first, last = tl.load(search + FIRST), tl.load(search + SIDE + FIRST)
    lowest, highest = number(first, dtype), number(last, dtype)
    lowest = tl.where(lowest == 0.0, -0.0, lowest)
    all_below, all_above = tl.load(search + BEYOND), tl.load(search + SIDE + BEYOND)
    skipped = tl.where(first == last, low - all_below, 0)
    starts += program * KINDS
    first_tie = low + all_above  # of the upper side
    below = tl.load(starts).to(entries)
    ties_below = (all_below + tl.load(starts + 1)).to(entries)
    above = (low + tl.load(starts + 2)).to(entries)
    ties_above = (first_tie - skipped + tl.load(starts + 3)).to(entries)
    first_tie = first_tie.to(entries)
    place_dtype: tl.constexpr = tl.int64 if dtype == tl.float32 else tl.int32
    first, last = first.to(place_dtype), last.to(place_dtype)
    begin_position = begin.to(positions.dtype.element_ty)
    x += begin
    clipped += begin
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        inside = at < size
        element = tl.load(x + at, mask=inside, other=0.0)
        value = element.to(tl.float32)
        tl.store(clipped + at, clamped(value, lowest, highest).to(dtype), mask=inside)
        place = ordinal(element)
        out_low, out_high = inside & (place < first), inside & (place > last)
        both = out_low.to(tl.int32) | (out_high.to(tl.int32) << 16)
        counts = tl.cumsum(both, 0)
        entry = tl.where(out_low, below + (counts & 0xFFFF), above + (counts >> 16)) - 1
        residual = value - tl.where(out_low, lowest, highest)
        _list(values, positions, entry, residual, begin_position + at, both)
        total = tl.sum(both)
        below, above = below + (total & 0xFFFF), above + (total >> 16)
        if (ties_below < low) | (ties_above < low + high):
            at_low, at_high = inside & (place == first), inside & (place == last)
            both = at_low.to(tl.int32) | (at_high.to(tl.int32) << 16)
            counts = tl.cumsum(both, 0)
            entry_low, entry_high = ties_below + (counts & 0xFFFF) - 1, ties_above + (counts >> 16) - 1
            to_low = at_low & (entry_low < low)
            to_high = at_high & (entry_high >= first_tie) & (entry_high < low + high)
            entry = tl.where(to_low, entry_low, entry_high)
            residual = value - tl.where(to_low, lowest, highest)
            _list(values, positions, entry, residual, begin_position + at, (to_low | to_high).to(tl.int32))
            total = tl.sum(both)
            ties_below, ties_above = ties_below + (total & 0xFFFF), ties_above + (total >> 16)


# --- the op ---------------------------------------------------------------------------------------------------------


def supports_clamp_outliers(dtypes: tuple[torch.dtype, ...], clamp: str, size: int) -> tuple[bool, str]:
    """Whether :func:`clamp_outliers` handles tensors of ``dtypes``, with ``size`` elements per row, and if not, why."""
    supported, reason = supports_dtypes(dtypes)
    if OutlierClamp.parse(clamp).per == "tensor" or not supported:
        return supported, reason
    return supports_size(size)


def clamp_outliers(x: Tensor, clamp: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.outliers.reference.clamp_outliers`, the residual in the order of positions.

    Each side lists what its bound cuts, then as many ties as are wanted. x float32, bfloat16 or float16, any strides;
    with per=row at most ``LONGEST_ROW`` elements along ``axis``.
    """
    if x.numel() == 0:
        return reference.clamp_outliers(x, clamp, axis)
    spec = OutlierClamp.parse(clamp)
    rows, shape = as_rows(x, axis)
    lead = shape[:-1]
    if spec.per == "tensor":
        rows, lead = rows.reshape(1, -1), torch.Size()
    size = rows.shape[-1]
    low, high = clamped_counts(spec, size)
    result = torch.empty_like(x)
    moved = result.movedim(axis, -1)
    clipped = moved if moved.is_contiguous() else rows.new_empty(shape)
    values = x.new_empty((*lead, low + high), dtype=residual_dtype(x.dtype))
    positions = values.new_empty(values.shape, dtype=index_dtype(size))
    outputs = clipped, values, positions
    if size <= LONGEST_ROW:
        part = max(RUN.value, row_block(size) // 4)
        constants = search_constants(size, x.dtype, x.device, SEARCHED_REGISTERS, one_row=True)
        launch(_clamp_row, rows.shape[0], rows, *outputs, rows.stride(0), size, low, high, part=part, **constants)
    else:
        _clamp_tensor(rows, *outputs, low, high)
    if clipped is not moved:
        moved.copy_(clipped)
    return result, values, positions


def _clamp_tensor(x: Tensor, clipped: Tensor, values: Tensor, positions: Tensor, low: int, high: int):
    """Fill the results for all elements of x, which is dense."""
    found = tensor_bounds(x, low, high)
    ranges = found.ranges
    launch(
        _clamp_range,
        ranges.programs,
        x,
        clipped,
        values,
        positions,
        found.search,
        found.starts,
        x.numel(),
        ranges.chunk,
        low,
        high,
        entries=tl.int32 if x.numel() + low + high < 2**31 else tl.int64,
        block=CLAMPED_BYTES // x.element_size(),
        num_warps=8,
    )
