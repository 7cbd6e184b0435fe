"""What an element of the optimizer computes, written once: torch on the CPU and the Triton kernel are printed from it.

Numbers of a state lie in blocks with one float32 scale each. As in :mod:`qcompile.kernels.quantize.reference`, with M
the largest level: s = amax / M, γ = M / amax, y = x · γ, and x̂ = s · level.
"""

from __future__ import annotations

from functools import cache

import torch

from qcompile.ir.formats import Format
from qcompile.kernels.formula.expression import FLOAT, INT, Formula, Value, where
from qcompile.kernels.formula.layout import minifloat
from qcompile.kernels.formula.random import FACTORS, hash_of, shifted
from qcompile.kernels.formula.rounding import index_of_count, unit_counts
from qcompile.kernels.formula.scales import store_of, stored_format

__all__ = ["SMALLEST_NORMAL", "advance", "decode", "draw", "encode", "hashed", "round_parameter", "scale"]

SMALLEST_NORMAL = 2.0**-126


@cache
def hashed() -> Formula:
    """``(x) → hash`` of int32."""
    return Formula.record("hashed", hash_of, x=INT)


@cache
def draw() -> Formula:
    """``(index) → 16 random bits for the parameter, the first and the second moment``; index counts elements."""

    def bits(index: Value) -> tuple[Value, Value, Value]:
        first = hash_of(index)
        # One more round: the first and the second moment need not be as good as strangers.
        second = (first ^ shifted(first, 13)) * FACTORS[0][1]
        return shifted(first, 16), shifted(second, 16), shifted(second ^ first, 16)

    return Formula.record("draw", bits, index=INT)


@cache
def advance() -> Formula:
    """AdamW: ``(parameter, gradient, m, v, what :func:`qcompile.optim.adamw.scalars` says) → parameter, m, v``.

    As torch.optim.AdamW computes it: decoupled weight decay, then the step.
    """

    def update(
        p: Value,
        g: Value,
        m: Value,
        v: Value,
        unscale: Value,
        new1: Value,
        keep2: Value,
        new2: Value,
        decay: Value,
        rate: Value,
        root: Value,
        eps: Value,
    ) -> tuple[Value, Value, Value]:
        g = g * unscale
        m = m + (g - m) * new1
        v = v * keep2 + g * g * new2
        return p * decay - m / (v.sqrt() / root + eps) * rate, m, v

    names = ("p", "g", "m", "v", "unscale", "new1", "keep2", "new2", "decay", "rate", "root", "eps")
    return Formula.record("advance", update, **dict.fromkeys(names, FLOAT))


@cache
def scale(name: str) -> Formula:
    """``(amax) → scale, γ`` of a block. The smallest level times the smallest scale is a normal number."""
    fmt = stored_format(name)
    floor = fmt.max / fmt.magnitudes[1] * SMALLEST_NORMAL

    def pair(amax: Value) -> tuple[Value, Value]:
        amax = amax.clamp(min=floor)
        return amax / fmt.max, fmt.max / amax

    return Formula.record("scale", pair, amax=FLOAT)


def _rounded(y: Value, fmt: Format, random: Value) -> tuple[Value, Value]:
    """|y| to the level below or above, by chance such that the mean is |y|, and its index; 16 random bits.

    As in :func:`qcompile.kernels.formula.rounding.nearest`, a level is a count of units in the last place of its
    binade, and an index that count and 2^m for every binade above the smallest.
    """
    layout = minifloat(fmt)
    assert layout is not None
    count, unit, binade = unit_counts(abs(y), layout)
    dither = (random.float() + 0.5).exact_product(2.0**-16)
    below = count.floor()  # apart from the rest of it, beside which all bits of the chance have their place
    count = below + (count - below + dither).floor()
    return count.exact_product(unit), index_of_count(count, binade, layout)


@cache
def encode(name: str, positive: bool) -> Formula:
    """``(x, γ, 16 random bits) → code``, rounded by chance. ``positive``: x ≥ 0, and no x > 0 is stored as 0."""
    fmt = stored_format(name)
    last, sign = len(fmt.magnitudes) - 1, 2 ** (fmt.bits - 1)

    def code(x: Value, gamma: Value, random: Value) -> Value:
        y = x * gamma
        if positive:
            y = where(x > 0.0, y.at_least(fmt.magnitudes[1]), 0.0)
        _, index = _rounded(y, fmt, random)
        index = where(index > last, last, index)  # the largest of a block may be rounded above M / s
        return index if positive else where(y < 0.0, index | sign, index)

    return Formula.record("encode", code, x=FLOAT, gamma=FLOAT, random=INT)


@cache
def decode(name: str) -> Formula:
    """``(code, scale) → x``."""
    return Formula.record("decode", lambda code, scale: store_of(name).decode(code) * scale, code=INT, scale=FLOAT)


@cache
def round_parameter(dtype: torch.dtype) -> Formula:
    """``(x, 16 random bits) → x`` rounded by chance to a number that ``dtype`` holds; infinity and NaN stay."""

    def rounded(x: Value, random: Value) -> Value:
        if dtype == torch.bfloat16:  # the upper half: the lower one is the chance of the next number away from 0
            return where(x.isfinite(), ((x.view(INT) + random) & -(2**16)).view(FLOAT), x)
        level, _ = _rounded(x.clamp(-65504.0, 65504.0), stored_format("fp16"), random)
        return where(x.isfinite(), where(x < 0.0, 0.0 - level, level), x)

    return Formula.record("round_parameter", rounded, x=FLOAT, random=INT)
