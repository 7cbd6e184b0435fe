"""Random numbers as formulas: a hash of a seed and an index, the same on every device."""

from __future__ import annotations

from functools import cache

from .expression import INT, Formula, Value

__all__ = ["FACTORS", "hash_of", "shifted", "uniform"]

#: Wellons' "lowbias32": places and factors of its rounds, in int32.
FACTORS = ((16, 0x21F0AAAD), (15, 0x735A2D97))
#: What seeds are spread by: 2³² over the golden ratio, as int32.
_SPREAD = 0x9E3779B1 - 2**32


def shifted(x: Value, places: int) -> Value:
    """Logical: zeros are shifted in."""
    return (x >> places) & (2 ** (32 - places) - 1)


def hash_of(x: Value) -> Value:
    for shift, factor in FACTORS:
        x = (x ^ shifted(x, shift)) * factor
    return x ^ shifted(x, 15)


@cache
def uniform() -> Formula:
    """``(index, seed) → float32`` in [0, 1), a multiple of 2⁻²⁴; both int32, sums and products wrap."""

    def chance(index: Value, seed: Value) -> Value:
        return shifted(hash_of(index + seed * _SPREAD), 8).float().exact_product(2.0**-24)

    return Formula.record("uniform", chance, index=INT, seed=INT)
