"""Rounding to the levels of a format, coding them and decoding codes, from the format's data.

Numbers are in grid units: y = x · γ. Adding 1.5·2²³ to a float32 number rounds it to the nearest integer, ties to even,
which then stands in the low mantissa bits; adding 1.5·2²³ units in the last place of a number's own binade rounds to
the nearest of them. A pruned format is rounded to the grid it was made from; its codes are one index higher, below
which 0 has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from qcompile.ir.formats import Format

from .expression import BOOL, FLOAT, INT, Formula, Value, constant, where
from .layout import MANTISSA_BITS, bits_of, minifloat, uniform_offset, why_not_rounded

__all__ = [
    "ROUNDER",
    "SIGN",
    "by_chance",
    "chosen",
    "decode",
    "encode",
    "index_of_count",
    "inputs",
    "nearest",
    "round_level",
    "saturated",
    "unit_counts",
    "why_not_by_chance",
]

_MAGNITUDE = 2**31 - 1
#: The bit of float32 that is its sign, as int32.
SIGN = -(2**31)
_EXPONENT = 0xFF << MANTISSA_BITS
#: Float32 numbers around it are one apart: added to another, it rounds that to an integer in its low bits.
ROUNDER = 1.5 * 2.0**MANTISSA_BITS


# --- the formulas ---------------------------------------------------------------------------------------------------


def saturate_value(y: Value, fmt: Format) -> Value:
    """y within ± the largest magnitude; NaN as the largest, positive."""
    if fmt.codebook:  # comparisons saturate by themselves
        return where(y.isnan(), fmt.max, y)
    return y.within(fmt.max)


def nearest_level(y: Value, fmt: Format, rounding: str) -> tuple[Value, Value]:
    """The level nearest to y (saturated, no NaN) and its code; ties to the even index, or toward +∞ (``half_up``); of a
    code book to the lower level or the higher.
    """
    if fmt.codebook:
        return _of_codebook(y, fmt, rounding == "half_up")
    grid = fmt.grid
    ties_up = rounding == "half_up"
    negative = y < 0.0
    layout, offset = minifloat(grid), uniform_offset(grid)
    if offset is not None:
        level, index = _uniform(y, negative, grid, offset, ties_up)
    elif layout is not None and layout[0] > 0:
        level, index = _minifloat(y, negative, layout, ties_up)
    else:  # without mantissa bits the even index is not the even multiple of a unit in the last place
        level, index = _thresholds(y, negative, grid, ties_up)
    # The sign goes in as a bit, which keeps −0 where 0 is a level.
    sign = y.view(INT) & SIGN if fmt.has_zero else where(negative, SIGN, 0)
    level = ((level.view(INT) & _MAGNITUDE) | sign).view(FLOAT)
    if fmt.pruned:
        index = index + 1
    return level, index | _sign_bit(sign, fmt)


def _sign_bit(sign: Value, fmt: Format) -> Value:
    """The highest bit of a code, from that of float32."""
    return (sign >> (32 - fmt.bits)) & 2 ** (fmt.bits - 1)


def by_chance(y: Value, fmt: Format, chance: Value) -> Value:
    """Code of the level above y (saturated, no NaN) if ``chance`` is less than y's distance from the level below, as a
    part of the step between the two; else of the level below. Everything is exact.
    """
    size = abs(y)
    if uniform_offset(fmt) is not None:
        assert fmt.step is not None
        count = size.exact_product(1 / fmt.step)
        index = _raised(count, chance).int()
    else:
        layout = minifloat(fmt)
        assert layout is not None
        count, _, binade = unit_counts(size, layout)
        index = index_of_count(_raised(count, chance), binade, layout)
    return index | _sign_bit(y.view(INT) & SIGN, fmt)


def _raised(count: Value, chance: Value) -> Value:
    below = count.floor()
    return below + where(chance < count - below, 1.0, 0.0)


def unit_counts(size: Value, layout: tuple[int, float]) -> tuple[Value, Value, Value]:
    """A magnitude in units in the last place of its binade in a small float, or of the smallest one; the unit; and the
    binade, as bits of float32.
    """
    mantissa_bits, factor = layout
    binade = size.at_least(factor * 2.0**-126).view(INT) & _EXPONENT
    unit = binade.view(FLOAT).exact_product(2.0**-mantissa_bits)
    per_unit = (constant(254 << MANTISSA_BITS, INT) - binade).view(FLOAT).exact_product(2.0**mantissa_bits)
    return size.exact_product(per_unit), unit, binade


def index_of_count(count: Value, binade: Value, layout: tuple[int, float]) -> Value:
    """The index that a whole number of units stands for: that number and 2^m for every binade above the smallest."""
    mantissa_bits, factor = layout
    return count.int() + ((binade - bits_of(factor * 2.0**-126)) >> (MANTISSA_BITS - mantissa_bits))


def why_not_by_chance(fmt: Format) -> str:
    """Why there is no formula that rounds to ``fmt`` stochastically; empty if there is one."""
    if fmt.grids:
        return next(filter(None, map(why_not_by_chance, fmt.choices)), "")
    plain = not (fmt.codebook or fmt.pruned) and fmt.has_zero
    if plain and (uniform_offset(fmt) is not None or minifloat(fmt) is not None):
        return ""
    return f"stochastic rounding to {fmt.name}, which is neither uniform nor a minifloat,"


def _uniform(y: Value, negative: Value, fmt: Format, offset: float, ties_up: bool) -> tuple[Value, Value]:
    """Magnitude and index in a uniform grid. Additions of 1.5·2²³ round, all else is exact."""
    assert fmt.step is not None
    position = abs(y).exact_product(1 / fmt.step) - offset
    raised = position + ROUNDER
    if ties_up:
        rest = position - (raised - ROUNDER)
        up = (rest == 0.5) & (y > 0.0)
        down = (rest == -0.5) & negative & (raised > ROUNDER)
        raised = raised + where(up, 1.0, 0.0) - where(down, 1.0, 0.0)
    level = (raised - ROUNDER + offset).exact_product(fmt.step)
    return level, raised.view(INT) & 2 ** (fmt.bits - 1) - 1


def _minifloat(y: Value, negative: Value, layout: tuple[int, float], ties_up: bool) -> tuple[Value, Value]:
    """Magnitude, with a sign, and index: y rounded to the mantissa bits of its binade, or of the smallest one.

    The rounded number stands in the low bits as a count of units in the last place; an index is that count and 2^m for
    every binade above the smallest.
    """
    mantissa_bits, factor = layout
    smallest_normal = factor * 2.0**-126
    size, unit = abs(y), 2.0**-mantissa_bits
    binade = size.at_least(smallest_normal).view(INT) & _EXPONENT
    rounder = 1.5 * 2.0**MANTISSA_BITS * unit
    raised = size.plus_exact_product(binade.view(FLOAT), rounder)
    count = raised.view(INT) & 2 ** (mantissa_bits + 2) - 1
    if ties_up:
        level = raised.plus_exact_product(binade.view(FLOAT), -rounder)
        half = binade.view(FLOAT).exact_product(unit / 2)
        rest = size - level
        up, down = (rest == half) & (y > 0.0), (rest == -half) & negative
        steps = up.int() - down.int()
        level = level.plus_exact_product(steps.float(), half.exact_product(2.0))
        count = count + steps
    else:  # of y, not |y|, whose sign takes an instruction: where no index is wanted, the sum above is not computed
        level = y.plus_exact_product(binade.view(FLOAT), rounder).plus_exact_product(binade.view(FLOAT), -rounder)
    return level, count + ((binade - bits_of(smallest_normal)) >> (MANTISSA_BITS - mantissa_bits))


def _thresholds(y: Value, negative: Value, fmt: Format, ties_up: bool) -> tuple[Value, Value]:
    """Magnitude and index by counting midpoints below; as integers, so that a tie is one more or less."""
    bits = y.view(INT) & _MAGNITUDE
    if ties_up:
        bits = bits + where(negative, 0, 1)
    level, index = constant(fmt.magnitudes[0]), constant(0, INT)
    for i, (threshold, magnitude) in enumerate(zip(fmt.thresholds, fmt.magnitudes[1:], strict=True)):
        tie_counts = not ties_up and i % 2 == 1
        above = bits > bits_of(threshold) - tie_counts
        level = where(above, magnitude, level)
        index = index + above.int()
    return level, index


def _of_codebook(y: Value, fmt: Format, ties_up: bool) -> tuple[Value, Value]:
    """The nearest level and its code; each midpoint that y is above (or reaches) selects the next higher level."""
    level, code = constant(fmt.sorted_levels[0]), constant(fmt.ranked_codes[0], INT)
    for threshold, higher, its_code in zip(fmt.thresholds, fmt.sorted_levels[1:], fmt.ranked_codes[1:], strict=True):
        above = y >= threshold if ties_up else y > threshold
        level, code = where(above, higher, level), where(above, its_code, code)
    if fmt.negative_zero_code is not None:
        below_zero = (level == 0.0) & (y.view(INT) < 0)
        level, code = where(below_zero, -0.0, level), where(below_zero, fmt.negative_zero_code, code)
    return level, code


def decode_code(code: Value, fmt: Format) -> Value:
    """Float32 level of an int32 code."""
    if fmt.codebook:
        value = constant(fmt.levels[0])
        for last, following in enumerate(fmt.levels[1:]):
            value = where(code > last, following, value)
        return value
    index = code & 2 ** (fmt.bits - 1) - 1
    sign = (code & 2 ** (fmt.bits - 1)) << (32 - fmt.bits)
    grid, first = fmt.grid, index
    if fmt.pruned:
        index = index - 1
    if (offset := uniform_offset(grid)) is not None:
        assert grid.step is not None
        magnitude = (index.float() + offset).exact_product(grid.step)
    elif (layout := minifloat(grid)) is not None:
        magnitude = (index << (MANTISSA_BITS - layout[0])).view(FLOAT).exact_product(layout[1])
    else:
        magnitude = constant(grid.magnitudes[0])
        for i, level in enumerate(grid.magnitudes[1:]):
            magnitude = where(index > i, level, magnitude)
    if fmt.pruned:
        magnitude = where(first == 0, 0.0, magnitude)
    return (magnitude.view(INT) | sign).view(FLOAT)


# --- recorded, by format --------------------------------------------------------------------------------------------


def inputs(fmt: Format, **first: torch.dtype) -> dict[str, torch.dtype]:
    """``first``, and of a pair of grids whether the scale is marked."""
    return first | ({"marked": BOOL} if fmt.grids else {})


def chosen(fmt: Format, marked: Sequence[Value], value: Callable[[Format], Value]) -> Value:
    """``value(grid)`` of the grid that the block has taken."""
    values = [value(grid) for grid in fmt.choices]
    return where(marked[0], values[1], values[0]) if fmt.grids else values[0]


def _checked(fmt: Format) -> Format:
    if reason := why_not_rounded(fmt):
        raise ValueError(reason)
    return fmt


@cache
def saturated(fmt: Format) -> Formula:
    """``(y) → y`` within the grid."""
    return Formula.record("saturated", lambda y: saturate_value(y, fmt), y=FLOAT)


@cache
def nearest(fmt: Format, rounding: str) -> Formula:
    """``(y) → level, code`` of float32 ``y`` in grid units, saturated. Raises ``ValueError`` for a format with no way
    to round.
    """
    return Formula.record("nearest", lambda y: nearest_level(y, _checked(fmt), rounding), y=FLOAT)


@cache
def encode(fmt: Format, rounding: str) -> Formula:
    """``(y[, marked]) → code`` of any float32 ``y`` in grid units; stochastic: ``(y[, marked], chance) → code``, the
    last being a uniform number in [0, 1).
    """
    if rounding != "stochastic":

        def code(y: Value, *marked: Value) -> Value:
            return chosen(fmt, marked, lambda grid: nearest_level(saturate_value(y, grid), _checked(grid), rounding)[1])

        return Formula.record("encode", code, **inputs(fmt, y=FLOAT))
    if reason := why_not_by_chance(fmt):
        raise ValueError(reason)

    def drawn(y: Value, *others: Value) -> Value:
        *marked, chance = others
        return chosen(fmt, marked, lambda grid: by_chance(saturate_value(y, grid), grid, chance))

    return Formula.record("encode", drawn, **inputs(fmt, y=FLOAT), chance=FLOAT)


@cache
def round_level(fmt: Format, rounding: str) -> Formula:
    """``(y) → level`` of any float32 ``y`` in grid units."""

    def level(y: Value) -> Value:
        return nearest_level(saturate_value(y, fmt), _checked(fmt), rounding)[0]

    return Formula.record("round_level", level, y=FLOAT)


@cache
def decode(fmt: Format) -> Formula:
    """``(code[, marked]) → level``. Raises ``ValueError`` as :func:`nearest`."""

    def level(code: Value, *marked: Value) -> Value:
        return chosen(fmt, marked, lambda grid: decode_code(code, _checked(grid)))

    return Formula.record("decode", level, **inputs(fmt, code=INT))
