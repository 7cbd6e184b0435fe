"""Order statistics of rows in registers, without a sort (Triton).

A program has one or more rows in registers and finds both bounds of all of them by counting. A *pivot* that more than
``rank`` elements reach is not above the element of that rank; one that fewer reach is. Pivots are *keys*, integers that
order like the numbers of x's dtype, so two neighbouring ones enclose the answer in the end.

Bisection would take as many counts as a key has bits. But tails are regular: the logarithm of the count falls about
linearly with the key, which is itself about a logarithm. The mean key of the largest elements of groups is one that
about 0.56 elements per group reach, whatever the distribution, and their spread says how steeply counts fall. From
there every count makes a step of Newton's method, with bisection where it would leave what is known: three or four
counts for a bound of normally distributed rows, five to eight where outliers keep to channels.

What a step computes is the same in all threads of a row. So a short row has few threads, down to four, and a warp has
several rows, up to eight: one instruction makes the step for all of them, and sums over few threads take few exchanges.
A row is a number of *tiles*, eight elements of every thread each, so that rows of any length fill their threads.

On Hopper one instruction compares two 16-bit elements (``set.ge.u32.bf16x2``), or takes the larger ones of two pairs.
So every four elements are sorted first: three of them are hardly ever in the same tail, and while a pivot for the upper
bound is above all that came first or second, or one for the lower bound below all others, half the row is not counted.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from qcompile.kernels.triton import INTERPRETED, as_bits, greater

__all__ = ["row_bounds", "row_tiles", "search_constants"]

#: Elements of a tile that a thread has: 16-bit ones are read 16 bytes at a time.
RUN = tl.constexpr(8)
#: Of a row.
FEWEST_THREADS, MOST_THREADS = 4, 512
#: PTX types of two elements in a register.
_PAIRS = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


@cache
def pair_type(dtype: torch.dtype, device: torch.device) -> str:
    """PTX type of two elements of ``dtype`` on a device that compares them at once; empty: compare in float32."""
    if INTERPRETED or dtype not in _PAIRS or torch.cuda.get_device_capability(device) < (9, 0):
        return ""
    return _PAIRS[dtype]


def search_constants(
    size: int, dtype: torch.dtype, device: torch.device, registers: int, one_row: bool = False
) -> dict[str, Any]:
    """Compile-time arguments of a kernel that searches rows of ``size``: of a program, ``at_once`` of them, or one.

    Of a thread, about ``registers`` hold elements: a pair each, or one as float32.
    """
    pair = pair_type(dtype, device)
    threads = triton.next_power_of_2(triton.cdiv(size, registers * (2 if pair else 1)))
    threads = min(MOST_THREADS, max(32 if one_row else FEWEST_THREADS, threads))
    width = threads * RUN.value
    constants = {
        "pair": pair,
        "tiles": triton.cdiv(size, width),
        "width": width,
        "num_warps": max(1, threads // 32),
    }
    return constants if one_row else constants | {"at_once": max(1, 32 // threads)}


@triton.jit
def no_tiles():
    """An empty tuple, for tiles to be added to."""
    return ()


@triton.jit
def row_tiles(x, size, tiles: tl.constexpr, width: tl.constexpr):
    """Rows of ``size`` elements at pointers x [R, 1], as a tuple of [R, width]; what is past the end is 0."""
    found = no_tiles()
    for tile in tl.static_range(tiles):
        at = tile * width + tl.arange(0, width)[None, :]
        if tile + 1 < tiles:
            found += (tl.load(x + at),)
        else:
            found += (tl.load(x + at, mask=at < size, other=0.0),)
    return found


# --- keys -----------------------------------------------------------------------------------------------------------


@triton.jit
def _key(value, dtype: tl.constexpr):
    """Integer that orders like float32 ``value``, a number of ``dtype``: int64 for float32, else int32."""
    if dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFF)
    else:
        bits = value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    return key


@triton.jit
def _number(key, dtype: tl.constexpr):
    """Inverse of :func:`_key`, in ``dtype``."""
    if dtype == tl.float32:
        bits = (key ^ ((key >> 63) & 0x7FFFFFFF)).to(tl.int32)
    else:
        bits = (key ^ ((key >> 31) & 0x7FFF)).to(tl.int16)
    return bits.to(dtype, bitcast=True)


# --- pairs ----------------------------------------------------------------------------------------------------------


@triton.jit
def _pairs(tile):
    """16-bit elements [R, 8 n] as four int32 [R, n]: all that a thread has."""
    low, high = tl.split(tl.reshape(tile.to(tl.int16, bitcast=True), [tile.shape[0], tile.shape[1] // RUN, 2, 2, 2]))
    even, odd = tl.split((low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16))
    a, b = tl.split(even)
    c, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _on_pairs(instruction: tl.constexpr, a, b):
    return tl.inline_asm_elementwise(
        instruction + " $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _ordered(a, b, pair: tl.constexpr):
    """The larger and the smaller elements of two pairs, NaN being the larger."""
    return _on_pairs("max.NaN." + pair, a, b), _on_pairs("min." + pair, a, b)


@triton.jit
def _sorted(tiles, pair: tl.constexpr):
    """Tuples of int32 [R, n]: of every four elements the largest, the second, the third and the smallest."""
    first, second, third, fourth = no_tiles(), no_tiles(), no_tiles(), no_tiles()
    for tile in tl.static_range(len(tiles)):
        a, b, c, d = _pairs(tiles[tile])
        larger, smaller = _ordered(a, b, pair)
        other_larger, other_smaller = _ordered(c, d, pair)
        largest, upper_middle = _ordered(larger, other_larger, pair)
        lower_middle, smallest = _ordered(smaller, other_smaller, pair)
        upper_middle, lower_middle = _ordered(upper_middle, lower_middle, pair)
        first += (largest,)
        second += (upper_middle,)
        third += (lower_middle,)
        fourth += (smallest,)
    return first, second, third, fourth


@triton.jit
def _extreme_keys(pairs, instruction: tl.constexpr):
    """Keys of the largest (or smallest, by ``instruction``) of a tuple of pairs [R, n], as two [R, n].

    To join them would give what follows another layout than the data has, and Triton may convert all data to it.
    """
    extreme = pairs[0]
    for i in tl.static_range(1, len(pairs)):
        extreme = _on_pairs(instruction, extreme, pairs[i])
    low, high = (extreme << 16) >> 16, extreme >> 16
    return low ^ ((low >> 31) & 0x7FFF), high ^ ((high >> 31) & 0x7FFF)


@triton.jit
def _opposite(keys):
    """The keys of the opposites."""
    found = no_tiles()
    for i in tl.static_range(len(keys)):
        found += (~keys[i],)
    return found


@triton.jit
def _greatest(keys):
    """Of a tuple of keys [R, n], the greatest of a row: [R]."""
    greatest = keys[0]
    for i in tl.static_range(1, len(keys)):
        greatest = tl.maximum(greatest, keys[i])
    return tl.max(greatest, 1)


# --- the search -----------------------------------------------------------------------------------------------------


@triton.jit
def _reaching(data, bound, comparison: tl.constexpr, pair: tl.constexpr):
    """How many elements of each place in a tuple of [R, n] reach the bounds [R], int32 [R, n]; no NaN does.

    A comparison of pairs gives 0xffff in the place of each element that does. Added up as integers, with a of them in
    low halves and b in high ones, that is 65536 (a − b) − a.
    """
    total = tl.full(data[0].shape, 0, tl.int32)
    if pair != "":
        bounds = ((bound.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001)[:, None]
        for i in tl.static_range(len(data)):
            total += _on_pairs("set." + comparison + ".u32." + pair, data[i], bounds)
        low = -total & 0xFFFF
        total = 2 * low - ((total + low) >> 16)
    else:
        bounds = bound.to(tl.float32)[:, None]
        for i in tl.static_range(len(data)):
            total += ((data[i] >= bounds) if comparison == "ge" else (data[i] <= bounds)).to(tl.int32)
    return total


@triton.jit
def _counts(higher, lower, above, below, dtype: tl.constexpr, pair: tl.constexpr):
    """How many elements of ``higher`` reach the pivots ``above``, and opposites of ``lower`` those ``below``.

    In one number, the second count in its upper half: there is one sum over the threads of a row.
    """
    counts = _reaching(higher, _number(above, dtype), "ge", pair)
    counts += _reaching(lower, _number(~below, dtype), "le", pair) << 16
    return tl.sum(counts, 1)


@triton.jit
def _steps(count, rank, slope):
    """From a key that ``count`` elements (float32) reach to that of the element of this rank, in a regular tail."""
    # The bits of a float32 number are about its logarithm.
    doublings = (as_bits(count + 0.5) - as_bits(rank.to(tl.float32) + 1.0)).to(tl.float32) * 2.0**-23
    return doublings * slope


@triton.jit
def _begun(keys, first, end, rank):
    """A search for the element of this rank from above, the greatest of the keys of elements equal to it.

    It is between ``first`` and ``end``, inclusive; ``keys``, a tuple of [R, n], are those of the largest elements of
    groups. A search is a tuple of five [R]: the key is in [first, end); the pivot to be counted; how many keys double
    the count; and the direction of the last step.
    """
    end = tl.where(end == -1, 1, end + 1)  # −0 and +0 are equal
    coarse: tl.constexpr = 16 if keys[0].dtype == tl.int64 else 0  # so that their sum is an int32
    groups: tl.constexpr = len(keys) * keys[0].shape[1]
    total = (keys[0] >> coarse).to(tl.int32)
    for i in tl.static_range(1, len(keys)):
        total += (keys[i] >> coarse).to(tl.int32)
    mean = tl.sum(total, 1) // groups
    distance = tl.abs((keys[0] >> coarse).to(tl.int32) - mean[:, None])
    for i in tl.static_range(1, len(keys)):
        distance += tl.abs((keys[i] >> coarse).to(tl.int32) - mean[:, None])
    spread = tl.sum(distance, 1).to(tl.float32) / groups
    # The maxima of an exponential tail e^(−x/β) spread by about β (Gumbel), and it doubles every β ln 2. Their mean is
    # above the key that one element per group reaches, by 0.577 β: e^−0.577 elements reach it.
    slope = tl.maximum(spread * 0.7, 1.0)
    pivot = mean + _steps(tl.full(mean.shape, 0.56 * groups, tl.float32), rank, slope).to(tl.int32)
    pivot = tl.minimum(tl.maximum(pivot.to(end.dtype) << coarse, first + 1), end - 1)
    return first, end, pivot, slope * 2.0**coarse, mean * 0


@triton.jit
def _narrowed(search, count, rank):
    """One step of a search: ``count`` elements reach the pivot."""
    first, end, pivot, slope, direction = search
    above = count > rank
    first = tl.where(above, pivot, first)
    end = tl.where(above, end, pivot)
    if pivot.dtype == tl.int64:  # near enough: the element is the smallest one that reaches `first`
        end = tl.where(count == rank + 1, first + 1, end)
    towards = tl.where(above, 1, -1)
    slope = tl.where(towards == direction, slope * 1.5, slope)
    width = (end - first).to(tl.float32)
    step = _steps(count.to(tl.float32), rank, slope)
    pivot += tl.minimum(tl.maximum(step, -width), width).to(pivot.dtype) + towards
    pivot = tl.where((pivot > first) & (pivot < end), pivot, (first + end) >> 1)
    return first, end, pivot, slope, towards


@triton.jit
def _any(condition):
    """Whether a condition holds for any row."""
    return tl.max(condition.to(tl.int32), 0) != 0


@triton.jit
def row_bounds(tiles, size, low, high, pair: tl.constexpr):
    """The elements of rank ``low`` from below and ``high`` from above, and the largest magnitude, float32 [R].

    NaN is above all numbers, and each result may be NaN. A zero is −0 for the lower and +0 for the upper bound.
    ``tiles``: as of :func:`row_tiles`, of a float dtype of up to 32 bits. ``pair``: of :func:`search_constants`.
    """
    dtype: tl.constexpr = tiles[0].dtype
    width: tl.constexpr = tiles[0].shape[1]
    elements: tl.constexpr = len(tiles) * width
    padding = elements - size
    if pair != "":
        # Elements stay packed: half the registers.
        largest, second, third, smallest = _sorted(tiles, pair)
        larger, smaller = largest + second, third + smallest
        maxima = _extreme_keys(largest, "max.NaN." + pair)
        minima = _extreme_keys(smallest, "min." + pair)
        upper_reach = _greatest(_extreme_keys(third, "max.NaN." + pair))
        lower_reach = _greatest(_opposite(_extreme_keys(second, "min." + pair)))
    else:
        larger, smaller = no_tiles(), no_tiles()
        least = tl.full(tiles[0].shape, float("inf"), tl.float32)
        most = -least
        for i in tl.static_range(len(tiles)):
            value = tiles[i].to(tl.float32)
            larger += (value,)
            most, least = greater(most, value), tl.minimum(least, value)
        most = tl.where(most == most, most, float("nan"))  # a positive one
        maxima, minima = (_key(most, dtype),), (_key(least, dtype),)
    end, first = _greatest(maxima), ~_greatest(_opposite(minima))
    top, bottom = _number(end, dtype).to(tl.float32), _number(first, dtype).to(tl.float32)
    magnitude = greater(tl.abs(top), tl.abs(bottom))
    nans = tl.full(end.shape, 0, tl.int32)
    if _any(top != top):
        infinity = _key(tl.full(end.shape, float("inf"), tl.float32), dtype)
        end = tl.where(top != top, infinity, end)
        numbers = _reaching(larger, _number(~infinity, dtype), "ge", pair)
        if pair != "":
            numbers += _reaching(smaller, _number(~infinity, dtype), "ge", pair)
        nans = elements - tl.sum(numbers, 1)
    # The lower bound is minus the upper one of −x, and ~key is the key of the number's opposite.
    above, below = high - nans, low + nans * 0
    upper, lower = _begun(maxima, first, end, above), _begun(_opposite(minima), ~end, ~first, below)
    while _any((upper[1] - upper[0] > 1) | (lower[1] - lower[0] > 1)):
        if pair == "":
            counts = _counts(larger, larger, upper[2], lower[2], dtype, pair)
        else:
            counts = _counts(larger, smaller, upper[2], lower[2], dtype, pair)
            if _any((upper[2] <= upper_reach) | (lower[2] <= lower_reach)):
                counts += _counts(smaller, larger, upper[2], lower[2], dtype, pair)
        upper = _narrowed(upper, (counts & 0xFFFF) - tl.where(upper[2] <= 0, padding, 0), above)
        lower = _narrowed(lower, (counts >> 16) - tl.where(lower[2] <= 0, padding, 0), below)
    highest, lowest = _number(upper[0], dtype).to(tl.float32), _number(~lower[0], dtype).to(tl.float32)
    if dtype == tl.float32:
        least_above = tl.full(tiles[0].shape, float("inf"), tl.float32)
        most_below = -least_above
        for i in tl.static_range(len(tiles)):
            value = tiles[i]
            inside = i * width + tl.arange(0, width)[None, :] < size
            least_above = tl.minimum(least_above, tl.where(inside & (value >= highest[:, None]), value, float("inf")))
            most_below = tl.maximum(most_below, tl.where(inside & (value <= lowest[:, None]), value, float("-inf")))
        highest, lowest = tl.min(least_above, 1), tl.max(most_below, 1)
        highest, lowest = tl.where(highest == 0.0, 0.0, highest), tl.where(lowest == 0.0, -0.0, lowest)
    highest = tl.where((nans > 0) & (above < 0), float("nan"), highest)
    lowest = tl.where((nans > 0) & (below + nans >= size), float("nan"), lowest)
    return lowest, highest, magnitude
