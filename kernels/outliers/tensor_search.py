"""Order statistics of a whole tensor without a sort (Triton): as a rule one read of 16-bit elements, whatever they are.

Elements are compared by their *ordinals*, integers that order like the numbers. 62 thresholds, 31 around each bound,
part the ordinals into bins, and one read counts the elements in every bin (:func:`_count`). The wanted ranks then say
which bin each bound is in, and that bin gets the next thresholds (:func:`_narrow`), until bins hold one ordinal each.
Any thresholds will do: bins that are badly chosen cost another read, never a wrong result.

The first thresholds are set by the order statistics of a sample (:func:`_guess`), four standard deviations to both
sides. Near the 1 % quantile of a normal distribution that is about twenty bfloat16 numbers, fewer than there are
thresholds, and the search ends after one read; three bits more of a float16 number or a steeper rank take two, float32
five. After that each read takes four bits off at least, so the number of launches is fixed: those that find the search
ended return at once, and nothing waits for the host.

The elements of a tensor are parted into ranges, one per program. The counts of the last read also say how many of each
range lie beyond the bounds, and with that where in a list of them each range begins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.triton import LONGEST_ROW, launch, processors

from .row_search import no_tiles, row_bounds, search_constants

__all__ = ["BEYOND", "FIRST", "KINDS", "SIDE", "Ranges", "TensorBounds", "number", "ordinal", "tensor_bounds"]

#: Registers of a thread that hold elements of the sample.
SEARCHED_REGISTERS = 32
#: Bins of the counts of a range, a power of two; and thresholds of each side, which enclose one bin less than they are.
#: Both sides' thresholds part the ordinals into 63 bins.
BINS = tl.constexpr(64)
THRESHOLDS = tl.constexpr(BINS.value // 2 - 1)

#: What a search knows, int64: for the lower bound, then for the upper one, that its ordinal is in [FIRST, END); that
#: its thresholds are 1, 2, … times 2^SHIFT above BASE; and, in the end, how many elements lie BEYOND it.
FIRST, END, BASE, SHIFT, BEYOND = (tl.constexpr(place) for place in range(5))
SIDE = tl.constexpr(5)
#: Then, whether both ordinals are known.
FOUND = tl.constexpr(2 * SIDE.value)

#: Elements that ranges count for the lists: below the lower bound, equal to it, above the upper one, equal to it.
KINDS = tl.constexpr(4)

#: Elements a program counts at once, and ranges whose counts are added at once.
COUNTED = 8192
ADDED = 128
RANGES_PER_PROCESSOR = 4


# --- ordinals -------------------------------------------------------------------------------------------------------


@triton.jit
def _infinity(dtype: tl.constexpr):
    """The bits of +∞."""
    return 0x7F800000 if dtype == tl.float32 else (0x7F80 if dtype == tl.bfloat16 else 0x7C00)


@triton.jit
def ordinal(x):
    """Integers that order like x, from 0 for −∞: int64 (below 2³²) for float32, int32 (below 2¹⁶) for 16 bits.

    Both zeros are equal. NaN of either sign is above +∞: those of sign minus, below −∞, wrap around.
    """
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64)
        sign = bits >> 63
        result = (((bits & 0x7FFFFFFF) ^ sign) - sign + _infinity(x.dtype)) & 0xFFFFFFFF
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        sign = bits >> 31
        result = (((bits & 0x7FFF) ^ sign) - sign + _infinity(x.dtype)) & 0xFFFF
    return result


@triton.jit
def number(ordinal, dtype: tl.constexpr):
    """Float32, the number of ``dtype`` that an ordinal (int64) stands for; a zero is +0."""
    infinity = _infinity(dtype)
    signed = ordinal - infinity
    magnitude = tl.abs(signed)
    if dtype == tl.float32:
        value = magnitude.to(tl.int32).to(tl.float32, bitcast=True)
    else:
        value = magnitude.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    value = tl.where(signed < 0, -value, value)
    return tl.where(signed > infinity, float("nan"), value)


# --- thresholds -----------------------------------------------------------------------------------------------------


@triton.jit
def _bin(ordinal, low_base, low_shift, high_base, high_shift):
    """How many of the thresholds an ordinal reaches."""
    low = tl.minimum(tl.maximum((ordinal - low_base) >> low_shift, 0), THRESHOLDS)
    high = tl.minimum(tl.maximum((ordinal - high_base) >> high_shift, 0), THRESHOLDS)
    return low + high


@triton.jit
def _set_thresholds(side, first, end):
    """Bins of equal width that cover [first, end)."""
    shift, one = first * 0, tl.full([], 1, tl.int64)
    while ((THRESHOLDS - 1) * one << shift) < end - first:
        shift += 1
    tl.store(side + BASE, first - (one << shift))
    tl.store(side + SHIFT, shift)


@triton.jit
def _guess(
    x,
    search,
    stride,
    size,
    low_near,
    high_near,
    low_far,
    high_far,
    pair: tl.constexpr,
    tiles: tl.constexpr,
    width: tl.constexpr,
):
    """Thresholds between the elements of two ranks from either end of a sample: one element out of every ``stride``."""
    sample = no_tiles()
    for tile in tl.static_range(tiles):
        place = tile * width + tl.arange(0, width)[None, :]
        # At random, since outliers keep to columns; always the same ones, since runs are to be repeatable.
        offset = tl.randint(0, place).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        sample += (tl.load(x + (place.to(tl.int64) * stride + offset % stride), mask=place < size, other=0.0),)
    lowest, highest, _ = row_bounds(sample, size, low_near, high_near, pair)
    low_end, high_end, _ = row_bounds(sample, size, low_far, high_far, pair)
    dtype: tl.constexpr = x.dtype.element_ty
    _set_thresholds(search, _ordinal_of(lowest, dtype), _ordinal_of(low_end, dtype) + 1)
    _set_thresholds(search + SIDE, _ordinal_of(high_end, dtype), _ordinal_of(highest, dtype) + 1)
    for side in tl.static_range(2):
        tl.store(search + side * SIDE + FIRST, 0)
        tl.store(search + side * SIDE + END, tl.full([], 1, tl.int64) << dtype.primitive_bitwidth)
    tl.store(search + FOUND, 0)


@triton.jit
def _ordinal_of(value, dtype: tl.constexpr):
    """Int64 ordinal, a scalar, of a float32 number [1] of ``dtype``."""
    return tl.max(ordinal(value.to(dtype)).to(tl.int64), 0)


@triton.jit
def _count(x, counts, search, numel, chunk, block: tl.constexpr):
    """Elements of a range in each bin, int32 [BINS]."""
    if tl.load(search + FOUND) == 0:
        program = tl.program_id(0)
        begin = program.to(tl.int64) * chunk
        size = tl.minimum(numel - begin, chunk).to(tl.int32)
        wide: tl.constexpr = tl.int64 if x.dtype.element_ty == tl.float32 else tl.int32
        low_base, low_shift = tl.load(search + BASE).to(wide), tl.load(search + SHIFT).to(wide)
        high_base, high_shift = tl.load(search + SIDE + BASE).to(wide), tl.load(search + SIDE + SHIFT).to(wide)
        total = tl.zeros([BINS], tl.int32)
        for start in range(0, size, block):
            at = start + tl.arange(0, block)
            element = tl.load(x + begin + at, mask=at < size, other=0.0)
            place = _bin(ordinal(element), low_base, low_shift, high_base, high_shift).to(tl.int32)
            # What is past the end has a bin above all others: no rank from below changes, and no range follows.
            total += tl.histogram(tl.where(at < size, place, BINS - 1), BINS)
        tl.store(counts + program * BINS + tl.arange(0, BINS), total)


@triton.jit
def _narrow_side(side, place, thresholds, reached, first, end):
    """The ordinal of a bound is in bin ``place`` and in [first, end). Returns whether there is one ordinal in the bin.

    ``reached``: how many thresholds each of the thresholds reaches.
    """
    lowest = tl.max(tl.where(reached <= place, thresholds, -(2**40)))
    highest = tl.min(tl.where(reached > place, thresholds, 2**40))
    first, end = tl.maximum(first, lowest), tl.minimum(end, highest)
    tl.store(side + FIRST, first)
    tl.store(side + END, end)
    _set_thresholds(side, first, end)
    return highest - lowest == 1


@triton.jit
def _start_of_ranges(starts, counts, seen, inside):
    """Store how many elements there are in earlier ranges, of which there were ``seen`` before; the new ``seen``."""
    tl.store(starts, seen + tl.cumsum(counts, 0) - counts, mask=inside)
    return seen + tl.sum(counts)


@triton.jit(do_not_specialize=["low", "high"])
def _narrow(counts, search, starts, programs, numel, low, high, added: tl.constexpr):
    """New thresholds from the counts of all ranges; or, with bins that hold one ordinal, the results."""
    if tl.load(search + FOUND) == 0:
        low_first, low_end = tl.load(search + FIRST), tl.load(search + END)
        low_base, low_shift = tl.load(search + BASE), tl.load(search + SHIFT)
        high_first, high_end = tl.load(search + SIDE + FIRST), tl.load(search + SIDE + END)
        high_base, high_shift = tl.load(search + SIDE + BASE), tl.load(search + SIDE + SHIFT)
        bins = tl.arange(0, BINS)
        some = tl.arange(0, added)
        total = tl.zeros([added, BINS], tl.int64)
        for start in range(0, programs, added):
            program = start + some
            total += tl.load(
                counts + program[:, None] * BINS + bins[None, :], mask=(program < programs)[:, None], other=0
            )
        in_bins = tl.sum(total, 0)
        up_to = tl.cumsum(in_bins, 0)
        low_bin = tl.sum((up_to <= low).to(tl.int32))
        high_bin = tl.sum((up_to < numel - high).to(tl.int32))

        half: tl.constexpr = BINS // 2
        step = tl.minimum(bins % half + 1, THRESHOLDS).to(tl.int64)
        thresholds = tl.where(bins < half, low_base + (step << low_shift), high_base + (step << high_shift))
        reached = _bin(thresholds, low_base, low_shift, high_base, high_shift)
        low_known = _narrow_side(search, low_bin, thresholds, reached, low_first, low_end)
        high_known = _narrow_side(search + SIDE, high_bin, thresholds, reached, high_first, high_end)

        if low_known & high_known:
            tl.store(search + FOUND, 1)
            tl.store(search + BEYOND, tl.sum(tl.where(bins < low_bin, in_bins, 0)))
            tl.store(search + SIDE + BEYOND, numel - tl.sum(tl.where(bins <= high_bin, in_bins, 0)))
            below, ties_below, above, ties_above = low_first * 0, low_first * 0, low_first * 0, low_first * 0
            for start in range(0, programs, added):
                program = start + some
                inside = program < programs
                part = tl.load(counts + program[:, None] * BINS + bins[None, :], mask=inside[:, None], other=0)
                out_low = tl.sum(tl.where((bins < low_bin)[None, :], part, 0), 1).to(tl.int64)
                at_low = tl.sum(tl.where((bins == low_bin)[None, :], part, 0), 1).to(tl.int64)
                out_high = tl.sum(tl.where((bins > high_bin)[None, :], part, 0), 1).to(tl.int64)
                at_high = tl.sum(tl.where((bins == high_bin)[None, :], part, 0), 1).to(tl.int64)
                here = starts + program * KINDS
                below = _start_of_ranges(here, out_low, below, inside)
                ties_below = _start_of_ranges(here + 1, at_low, ties_below, inside)
                above = _start_of_ranges(here + 2, out_high, above, inside)
                ties_above = _start_of_ranges(here + 3, at_high, ties_above, inside)


# --- searching ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranges:
    """``programs`` ranges of ``chunk`` elements, the last of them shorter."""

    programs: int
    chunk: int

    @classmethod
    def of(cls, x: Tensor) -> Ranges:
        """As many ranges of x as a device works on at once, of whole blocks."""
        blocks = triton.cdiv(x.numel(), COUNTED)
        chunk = triton.cdiv(blocks, RANGES_PER_PROCESSOR * processors(x.device)) * COUNTED
        return cls(triton.cdiv(x.numel(), chunk), chunk)


@dataclass(frozen=True)
class TensorBounds:
    """What a search found, on the device.

    Attributes:
        search: int64, per side SIDE numbers; FIRST is the ordinal of the bound, BEYOND the elements beyond it.
        starts: int64 [programs, KINDS], how many elements of each kind there are in earlier ranges.
        ranges: the ranges.
    """

    search: Tensor
    starts: Tensor
    ranges: Ranges


def sample_ranks(rank: int, numel: int, size: int) -> tuple[int, int]:
    """Ranks in a sample of ``size`` that the element of ``rank`` of all is between, with four standard deviations."""
    expected = rank * size / numel
    spread = 4 * math.sqrt(expected * (1 - rank / numel)) + 1
    return max(0, math.floor(expected - spread)), min(size - 1, math.ceil(expected + spread))


def reads(dtype: torch.dtype) -> int:
    """How often elements are counted at most: after the guess four bits each time, since 30 bins of 2ᵇ⁻⁴ cover 2ᵇ."""
    return 1 + 8 * dtype.itemsize // 4


def tensor_bounds(x: Tensor, low: int, high: int) -> TensorBounds:
    """The elements of rank ``low`` from below and ``high`` from above of a dense tensor, at least one element.

    NaN is above all numbers.
    """
    numel, ranges = x.numel(), Ranges.of(x)
    counts = x.new_empty((ranges.programs, BINS.value), dtype=torch.int32)
    search = x.new_empty(FOUND.value + 1, dtype=torch.int64)
    starts = x.new_empty((ranges.programs, KINDS.value), dtype=torch.int64)
    size = min(LONGEST_ROW, 1 << (numel.bit_length() - 1))
    constants = search_constants(size, x.dtype, x.device, SEARCHED_REGISTERS, one_row=True)
    (low_near, low_far), (high_near, high_far) = (sample_ranks(rank, numel, size) for rank in (low, high))
    launch(_guess, 1, x, search, numel // size, size, low_near, high_near, low_far, high_far, **constants)
    for _ in range(reads(x.dtype)):
        launch(_count, ranges.programs, x, counts, search, numel, ranges.chunk, block=COUNTED, num_warps=8)
        launch(_narrow, 1, counts, search, starts, ranges.programs, numel, low, high, added=ADDED, num_warps=16)
    return TensorBounds(search, starts, ranges)
