"""Scales: the formula of a rule, what is stored of it, and the factor γ from x to grid units.

With one level s = load(store(rule(statistic))); with two, s = load(store(rule(statistic) / global)) · global. γ is the
rule's own formula, or 1 / s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from qcompile.ir.formats import Format, float_magnitudes, get_format
from qcompile.ir.formulas import floor_log2, power_of_two
from qcompile.ir.quantizer import ERROR_BITS, MOST_ERROR, Quantizer, ScaleRule

from .expression import DOUBLE, FLOAT, INT, Formula, Value, where
from .layout import MANTISSA_BITS, bits_of
from .rounding import ROUNDER, SIGN, by_chance, decode_code, nearest_level, saturate_value

__all__ = [
    "Store",
    "candidate",
    "corrected_scale",
    "error_unit",
    "is_marked",
    "load_scale",
    "reciprocal",
    "scale_and_reciprocal",
    "scaled_error",
    "store_of",
    "stored_format",
    "stored_scale",
]


class _ScaleFormat(Format):
    """A format of scales, which fill up to two bytes beside a sign."""

    MOST_BITS = 16


@dataclass(frozen=True)
class Store:
    """How a scale is stored: ``encode(float32 ≥ 0, or NaN) → bits`` and its inverse.

    Bits are int32 values, of which a device keeps the lowest; a float32 store has the number itself.
    """

    encode: Callable[[Value], Value]
    decode: Callable[[Value], Value]


def _small_float(fmt: Format, nan: int) -> Store:
    """A minifloat in which the code ``nan`` stands for NaN; saturating."""

    def encode(scale: Value) -> Value:
        return where(scale.isnan(), nan, nearest_level(saturate_value(scale, fmt), fmt, "even")[1])

    def decode(code: Value) -> Value:
        return where(code == nan, float("nan"), decode_code(code, fmt))

    return Store(encode, decode)


def _bfloat16(scale: Value) -> Value:
    """The upper half, ties to even; NaN keeps a bit."""
    bits = scale.view(INT)
    rounded = (bits + ((bits >> 16) & 1) + 0x7FFF) >> 16
    return where(scale.isnan(), 0x7FC0, where(rounded > 0x7F7F, 0x7F7F, rounded))


def _e8m0_bits(scale: Value) -> Value:
    return where(scale.isnan(), 255, scale.view(INT) >> MANTISSA_BITS)


def _e8m0_scale(byte: Value) -> Value:
    return where(byte == 255, float("nan"), power_of_two(byte - 127))


@cache
def store_of(name: str) -> Store:
    """The store of this name, a key of :data:`qcompile.ir.quantizer.SCALE_STORES`."""
    match name:
        case "fp32":
            return Store(lambda scale: scale, lambda scale: scale)
        case "e8m0":
            return Store(_e8m0_bits, _e8m0_scale)
        case "bf16":
            return Store(_bfloat16, lambda bits: (bits << 16).view(FLOAT))
        case "fp16":
            return _small_float(stored_format(name), 0x7E00)
        case "ue5m3":
            return _small_float(stored_format(name), 0xFF)
    return _small_float(stored_format(name), 0x7F)


@cache
def stored_format(name: str) -> Format:
    """The levels of the small float that a store keeps numbers in."""
    match name:
        case "fp16":
            return _ScaleFormat(name, 16, float_magnitudes(5, 10, reserved=1024))
        case "ue5m3":  # no sign, so all eight bits are magnitude
            return _ScaleFormat(name, 9, float_magnitudes(5, 3, reserved=1))
    return get_format(name)


# --- recorded, by quantizer -----------------------------------------------------------------------------------------


def _statistic_dtype(rule: ScaleRule) -> torch.dtype:
    return DOUBLE if rule.statistic == "rms" else FLOAT


def _stored_dtype(q: Quantizer) -> torch.dtype:
    return FLOAT if q.scale.store == "fp32" else INT


def _inputs(q: Quantizer, **first: torch.dtype) -> dict[str, torch.dtype]:
    return first | ({"global_scale": FLOAT} if q.scale.two_level else {})


def _stored(q: Quantizer, statistic: Value, *global_scale: Value, number: int = 0) -> Value:
    candidate = q.candidates[number]
    scale = q.scale.scale(statistic, candidate.grid)
    scale = scale * candidate.factor if candidate.factor != 1.0 else scale
    for whole in global_scale:
        scale = scale / whole
    stored = store_of(q.scale.store).encode(scale)
    return (stored.view(INT) | -_magnitude(q) - 1).view(stored.dtype) if candidate.marked else stored


def _loaded(q: Quantizer, stored: Value, *global_scale: Value) -> Value:
    if q.format.grids:
        stored = (stored.view(INT) & _magnitude(q)).view(stored.dtype)
    scale = store_of(q.scale.store).decode(stored)
    for whole in global_scale:
        scale = scale * whole
    return scale


def _magnitude(q: Quantizer) -> int:
    """The bits of a stored scale below its sign, as int32. Above it a device may have anything."""
    return 2 ** (8 * getattr(torch, q.scale.storage).itemsize - 1) - 1


def _reciprocal(q: Quantizer, statistic: Value, *global_scale: Value, number: int = 0) -> Value:
    candidate = q.candidates[number]
    if q.scale.reciprocal is not None:
        gamma = q.scale.reciprocal(statistic, candidate.grid)
        gamma = gamma / candidate.factor if candidate.factor != 1.0 else gamma
    else:
        scale = _loaded(q, _stored(q, statistic, *global_scale, number=number), *global_scale)
        gamma = where(scale == 0.0, 0.0, 1.0 / scale)
    return (gamma.view(INT) | SIGN).view(FLOAT) if candidate.marked else gamma


@cache
def stored_scale(q: Quantizer, number: int = 0) -> Formula:
    """``(statistic[, global scale]) → stored`` of a candidate: float32, or the bits of another store as int32, whose
    sign is set if the candidate is marked.
    """
    inputs = _inputs(q, statistic=_statistic_dtype(q.scale))
    return Formula.record("stored_scale", lambda *values: _stored(q, *values, number=number), **inputs)


@cache
def reciprocal(q: Quantizer, number: int = 0) -> Formula:
    """``(statistic[, global scale]) → γ`` of a candidate, float32; it has a sign where the stored scale has one."""
    inputs = _inputs(q, statistic=_statistic_dtype(q.scale))
    return Formula.record("reciprocal", lambda *values: _reciprocal(q, *values, number=number), **inputs)


@cache
def scale_and_reciprocal(q: Quantizer) -> Formula:
    """Both of the above at once, of the first candidate, which share what they compute."""
    inputs = _inputs(q, statistic=_statistic_dtype(q.scale))
    return Formula.record("scale_pair", lambda *values: (_stored(q, *values), _reciprocal(q, *values)), **inputs)


@cache
def candidate(q: Quantizer, number: int) -> Formula:
    """``(statistic[, global scale]) → stored, γ, s`` of a candidate: the first two as above, and what its stored scale
    is loaded as.
    """

    def scale(*values: Value) -> tuple[Value, ...]:
        stored = _stored(q, *values, number=number)
        return stored, _reciprocal(q, *values, number=number), _loaded(q, stored, *values[1:])

    return Formula.record("candidate", scale, **_inputs(q, statistic=_statistic_dtype(q.scale)))


@cache
def load_scale(q: Quantizer) -> Formula:
    """``(stored[, global scale]) → s``, float32, without the sign that says which grid of a pair it belongs to."""
    return Formula.record("load_scale", lambda *values: _loaded(q, *values), **_inputs(q, stored=_stored_dtype(q)))


@cache
def is_marked(q: Quantizer) -> Formula:
    """``(stored) → bool``: whether a block has taken the second grid of a pair."""
    sign = 31 - _magnitude(q).bit_length()
    return Formula.record("is_marked", lambda stored: stored.view(INT) << sign < 0, stored=_stored_dtype(q))


@cache
def corrected_scale(q: Quantizer) -> Formula:
    """``(stored, Σ y², Σ y · level, chance) → stored`` of ``eden``: the scale times the quotient of a chunk's sums,
    rounded to a neighbour by chance, saturating. A chunk of zeros keeps its scales.
    """
    fmt, store = stored_format(q.scale.store), store_of(q.scale.store)

    def corrected(stored: Value, squares: Value, products: Value, chance: Value) -> Value:
        quotient = where(products == 0.0, 1.0, squares / products).float()
        scale = store.decode(stored) * quotient
        return where(scale.isnan(), store.encode(scale), by_chance(saturate_value(scale, fmt), fmt, chance))

    return Formula.record("corrected_scale", corrected, stored=INT, squares=DOUBLE, products=DOUBLE, chance=FLOAT)


# --- what candidates are compared by --------------------------------------------------------------------------------


@cache
def error_unit() -> Formula:
    """``(absolute maximum) → factor`` from differences to the units that errors of its block are counted in; 0 of a
    block that is not finite.
    """

    def unit(amax: Value) -> Value:
        return where(amax.isfinite(), power_of_two(-floor_log2(amax) + ERROR_BITS), 0.0)

    return Formula.record("error_unit", unit, amax=FLOAT)


@cache
def scaled_error() -> Formula:
    """``(x, level, scale, unit) → error`` of the level, an int32 count of units."""

    def error(x: Value, level: Value, scale: Value, unit: Value) -> Value:
        units = (level * scale - x).exact_product(unit)
        units = where(abs(units) <= MOST_ERROR, units, MOST_ERROR)
        return (units + ROUNDER).view(INT) - bits_of(ROUNDER)

    return Formula.record("scaled_error", error, x=FLOAT, level=FLOAT, scale=FLOAT, unit=FLOAT)
