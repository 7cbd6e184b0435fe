"""Order statistics of a row in registers, without a sort (Triton).

A program has its row in registers and finds both bounds by counting. A *pivot* that more than ``rank`` elements reach
is not above the element of that rank; one that fewer reach is. Pivots are *keys*, integers that order like the numbers
of x's dtype, so two neighbouring ones enclose the answer in the end.

Bisection would take as many counts as a key has bits. But tails are regular: the logarithm of the count falls about
linearly with the key, which is itself about a logarithm. The first pivot is the mean key of the largest elements of
groups of ln 2 / (1 − α), whose median is the quantile, whatever the distribution; their spread says how steeply counts
fall. From there every count makes a step of Newton's method, with bisection where it would leave what is known: three
or four counts for a bound of normally distributed rows, five to eight where outliers keep to channels.

On Hopper one instruction compares two 16-bit elements (``set.ge.u32.bf16x2``), or takes the larger ones of two pairs.
So every four elements are sorted first: three of them are hardly ever in the same tail, and while a pivot for the upper
bound is above all that came first or second, or one for the lower bound below all others, half the row is not counted.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.triton import INTERPRETED, RUN, as_bits, greater, maximum, row_block, warps

__all__ = ["most_registers", "row_bounds", "search_constants"]

#: PTX types of two elements in a register.
_PAIRS = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


@cache
def pair_type(dtype: torch.dtype, device: torch.device) -> str:
    """PTX type of two elements of ``dtype`` on a device that compares them at once; empty: compare in float32."""
    if INTERPRETED or dtype not in _PAIRS or torch.cuda.get_device_capability(device) < (9, 0):
        return ""
    return _PAIRS[dtype]


def group_size(alpha: float, block: int) -> int:
    """Elements of a row of ``block`` whose maximum is a guess at the α quantile; a power of two, 16 at least."""
    wanted = math.log(2) / (1 - alpha)
    return min(block, max(RUN.value, 2 ** round(math.log2(wanted))))


def search_constants(rows: Tensor, alpha: float, per_thread: int) -> dict[str, Any]:
    """Compile-time arguments of a kernel that searches ``rows`` [R, K], whose threads hold ``per_thread`` elements.

    It writes in parts, a quarter of a row each.
    """
    block = row_block(rows.shape[-1])
    num_warps = warps(block, per_thread)
    group = group_size(alpha, block)
    pairs = block // (2 * 32 * num_warps)  # of a thread
    return {
        "group": group,
        "halvings": max(2, min(group, pairs).bit_length() - 1),
        "pair": pair_type(rows.dtype, rows.device),
        "block": block,
        "part": max(RUN.value, block // 4),
        "num_warps": num_warps,
    }


def most_registers(rows: Tensor) -> int | None:
    """Of a thread that searches ``rows`` and does little else; ``None``: as many as the compiler wants.

    It would take a few more than 96, and leave room for four warps per scheduler instead of five. Rows that cannot be
    read 16 bytes at a time would spill.
    """
    aligned = rows.shape[-1] % RUN.value == 0 and rows.stride(0) % RUN.value == 0
    return 96 if aligned and pair_type(rows.dtype, rows.device) else None


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
def _pairs(x):
    """16-bit elements [n, 16] as int32 [8n], in an order in which both halves of it are in the same threads.

    So are the halves of these and so on: of four pairs that are loaded at once, each is in another quarter.
    """
    low, high = tl.split(tl.reshape(x.to(tl.int16, bitcast=True), [x.shape[0] * 2, 4, 2]))
    pairs = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    return tl.reshape(tl.trans(pairs), [x.shape[0] * RUN // 2])


@triton.jit
def _on_pairs(instruction: tl.constexpr, a, b):
    return tl.inline_asm_elementwise(
        instruction + " $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _halves(pairs):
    """The first and the second half."""
    return tl.split(tl.trans(tl.reshape(pairs, [2, pairs.shape[0] // 2])))


@triton.jit
def _joined(first, second):
    """Inverse of :func:`_halves`."""
    return tl.reshape(tl.trans(tl.join(first, second)), [2 * first.shape[0]])


@triton.jit
def _ordered(pairs, pair: tl.constexpr):
    """The larger and the smaller ones of the elements of both halves, NaN being the larger."""
    first, second = _halves(pairs)
    return _on_pairs("max.NaN." + pair, first, second), _on_pairs("min." + pair, first, second)


@triton.jit
def _extreme_keys(pairs, halvings: tl.constexpr, instruction: tl.constexpr):
    """Keys of the largest (or smallest, by ``instruction``) of every 2^halvings elements."""
    for _ in tl.static_range(halvings):
        first, second = _halves(pairs)
        pairs = _on_pairs(instruction, first, second)
    bits = tl.reshape(tl.join((pairs << 16) >> 16, pairs >> 16), [2 * pairs.shape[0]])
    return bits ^ ((bits >> 31) & 0x7FFF)


# --- the search -----------------------------------------------------------------------------------------------------


@triton.jit
def _first_pivot(keys, first, end):
    """A pivot in [first, end), and how many keys double the count, from the keys of the largest elements of groups."""
    coarse: tl.constexpr = 16 if keys.dtype == tl.int64 else 0  # so that their sum is an int32
    keys = (keys >> coarse).to(tl.int32)
    mean = tl.sum(keys) // keys.shape[0]
    spread = tl.sum(tl.abs(keys - mean)).to(tl.float32) / keys.shape[0]
    # The maxima of an exponential tail e^(−x/β) spread by about β (Gumbel), and it doubles every β ln 2.
    slope = tl.maximum(spread * 0.7, 1.0) * 2.0**coarse
    pivot = mean.to(end.dtype) << coarse
    return tl.minimum(tl.maximum(pivot, first + 1), end - 1), slope


@triton.jit
def _narrowed(first, end, pivot, slope, direction, count, rank):
    """One step: the key of the element is in [first, end), and ``count`` elements reach the pivot."""
    above = count > rank
    first = tl.where(above, pivot, first)
    end = tl.where(above, end, pivot)
    if pivot.dtype == tl.int64:  # near enough: the element is the smallest one that reaches `first`
        end = tl.where(count == rank + 1, first + 1, end)
    towards = tl.where(above, 1, -1)
    slope = tl.where(towards == direction, slope * 1.5, slope)
    width = (end - first).to(tl.float32)
    # The bits of a float32 number are about its logarithm.
    doublings = (as_bits(count.to(tl.float32) + 0.5) - as_bits(rank.to(tl.float32) + 1.0)).to(tl.float32) * 2.0**-23
    step = doublings * slope
    pivot += tl.minimum(tl.maximum(step, -width), width).to(pivot.dtype) + towards
    pivot = tl.where((pivot > first) & (pivot < end), pivot, (first + end) >> 1)
    return first, end, pivot, slope, towards


@triton.jit
def _count(data, pivot, dtype: tl.constexpr, comparison: tl.constexpr, pair: tl.constexpr):
    """How many elements of float32 data, or of pairs, reach the pivot; no NaN does.

    A comparison of pairs gives 0xffff in the place of each element that does. Added up as integers, with a of them in
    low halves and b in high ones, that is 65536 (a − b) − a.
    """
    mirrored: tl.constexpr = comparison == "le"
    bound = _number(~pivot if mirrored else pivot, dtype)
    if pair != "":
        bounds = (bound.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
        total = tl.sum(_on_pairs("set." + comparison + ".u32." + pair, data, bounds))
        low = -total & 0xFFFF
        count = 2 * low - ((total + low) >> 16)
    elif mirrored:
        count = tl.sum((data <= bound.to(tl.float32)).to(tl.int32))
    else:
        count = tl.sum((data >= bound.to(tl.float32)).to(tl.int32))
    return count


@triton.jit
def _element_of_rank(
    near,
    far,
    reach,
    keys,
    first,
    end,
    padding,
    rank,
    dtype: tl.constexpr,
    comparison: tl.constexpr,
    pair: tl.constexpr,
):
    """Key of the element of this rank from above, the greatest of the keys of elements equal to it.

    It is between ``first`` and ``end``, inclusive; ``keys`` are those of the largest elements of groups. Elements that
    are ``far`` have keys up to ``reach``, and most pivots are above it. With ``comparison`` "le" it is the element of
    this rank from below, and all keys are those of the numbers' opposites.
    """
    end = tl.where(end == -1, 1, end + 1)  # −0 and +0 are equal
    pivot, slope = _first_pivot(keys, first, end)
    direction = rank * 0
    while end - first > 1:
        count = _count(near, pivot, dtype, comparison, pair) - tl.where(pivot <= 0, padding, 0)
        if pair != "" and pivot <= reach:
            count += _count(far, pivot, dtype, comparison, pair)
        first, end, pivot, slope, direction = _narrowed(first, end, pivot, slope, direction, count, rank)
    return first


@triton.jit
def row_bounds(x, inside, padding, low, high, group: tl.constexpr, halvings: tl.constexpr, pair: tl.constexpr):
    """The elements of rank ``low`` from below and ``high`` from above, and the largest magnitude; float32 scalars.

    NaN is above all numbers, and each result may be NaN. A zero is −0 for the lower and +0 for the upper bound.
    x [n, 16] of a float dtype of up to 32 bits; ``inside``: which elements are the row's; ``padding``: how many are
    not, and are 0. The rest are :func:`search_constants`.
    """
    dtype: tl.constexpr = x.dtype
    elements: tl.constexpr = x.shape[0] * RUN
    if pair != "":
        # Elements stay packed: half the registers. Every four of them are sorted, from first to fourth.
        larger, smaller = _ordered(_pairs(x), pair)
        fourth, upper_middle = _ordered(larger, pair)
        lower_middle, first = _ordered(smaller, pair)
        third, second = _ordered(_joined(upper_middle, lower_middle), pair)
        larger, smaller = _joined(fourth, third), _joined(second, first)
        grouped: tl.constexpr = [elements // group, group // 2**halvings]
        maxima = tl.max(tl.reshape(_extreme_keys(fourth, halvings - 2, "max.NaN." + pair), grouped), 1)
        minima = tl.min(tl.reshape(_extreme_keys(first, halvings - 2, "min." + pair), grouped), 1)
        upper_reach = tl.max(_extreme_keys(second, halvings - 2, "max.NaN." + pair))
        lower_reach = ~tl.min(_extreme_keys(third, halvings - 2, "min." + pair))
    else:
        value = x.to(tl.float32)
        maxima = _key(maximum(tl.reshape(maximum(value, 1), [group // RUN, elements // group]), 0), dtype)
        minima = _key(tl.min(tl.reshape(tl.min(value, 1), [group // RUN, elements // group]), 0), dtype)
        larger, smaller = value, value
        upper_reach, lower_reach = low, low
    end, first = tl.max(maxima), tl.min(minima)
    top, bottom = _number(end, dtype).to(tl.float32), _number(first, dtype).to(tl.float32)
    largest = greater(tl.abs(top), tl.abs(bottom))
    nans = low * 0
    if top != top:
        end = _key(tl.full([], float("inf"), tl.float32), dtype)
        nans = elements - _count(larger, ~end, dtype, "ge", pair)
        if pair != "":
            nans -= _count(smaller, ~end, dtype, "ge", pair)
    # The lower bound is minus the upper one of −x, and ~key is the key of the number's opposite.
    above, below = high - nans, low
    upper = _element_of_rank(larger, smaller, upper_reach, maxima, first, end, padding, above, dtype, "ge", pair)
    lower = _element_of_rank(smaller, larger, lower_reach, ~minima, ~end, ~first, padding, below, dtype, "le", pair)
    highest, lowest = _number(upper, dtype).to(tl.float32), _number(~lower, dtype).to(tl.float32)
    if dtype == tl.float32:
        highest = tl.min(tl.where(inside & (value >= highest), value, float("inf")))
        lowest = tl.max(tl.where(inside & (value <= lowest), value, float("-inf")))
        highest, lowest = tl.where(highest == 0.0, 0.0, highest), tl.where(lowest == 0.0, -0.0, lowest)
    if nans > 0:
        highest = tl.where(above < 0, float("nan"), highest)
        lowest = tl.where(nans + below + padding >= elements, float("nan"), lowest)
    return lowest, highest, largest
