"""Rounding to a few uneven levels by table, in the registers of a warp: an override of the formula, which compares with
every midpoint.

The range that midpoints lie in is cut into *buckets* of equal width, none with more than one midpoint. Each lane of a
warp holds what there is to know of a bucket, and gives it to the lanes that ask: the level below the midpoint, its
code, and the midpoint. The level above is the one below the midpoint of the next bucket. The formula itself fills the
table, where buckets begin and at their midpoints (``_bucket_table`` of :mod:`.triton_codes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from qcompile.ir.formats import Format
from qcompile.ir.formulas import float32
from qcompile.kernels.formula.layout import MANTISSA_BITS, bits_of, float_of, minifloat, uniform_offset, why_not_rounded

__all__ = ["Buckets", "buckets_of"]

#: Buckets are one fewer than lanes. Lane i has number i − 1, and the first what lies above them all.
BUCKETS = 31
#: With fewer midpoints comparisons are faster.
FEWEST_MIDPOINTS = 4

#: PTX: level ($0) of y ($2), from the level below and the edge that lanes hold of their buckets ($3, $4), and in low
#: bits of $1 the lane that holds it: that of y's bucket, or, for y above the edge, the one after it.
#:
#: Below 1, float32 numbers are 2⁻²⁴ apart: the sum rounded down is 1 − (31 − n) · 2⁻²⁴ in bucket n. Above them all it
#: saturates to 1, and of NaN it is 0; low bits of both are the first lane's. A large multiple of ``size`` less that of
#: the edge is between 0 and 1 nowhere but at the edge, so it saturates to whether y is above; rounded once, its sign is
#: right.
_LOOK_UP = """
{{
.reg .f32 size, bucket, edge, above;
{size}
fma.rm.sat.f32 bucket, size, {width}, {origin};
shfl.sync.idx.b32 edge, $4, bucket, 31, 0xffffffff;
fma.rn.sat.f32 above, size, {steepness}, edge;
fma.rn.f32 $1, above, {next}, bucket;
shfl.sync.idx.b32 $0, $3, $1, 31, 0xffffffff;
}}
"""
#: ``size``: the magnitude of y, or y itself, not below the first bucket.
_MAGNITUDE, _VALUE = "abs.f32 size, $2;", "max.NaN.f32 size, $2, {lowest};"


@dataclass(frozen=True)
class Buckets:
    """Constants of a table.

    Attributes:
        lowest: what lies below is taken for this.
        per_unit: buckets per unit, a power of two.
        first: where the first begins, in buckets.
        steepness: a power of two; times it every difference from an edge is more than 1.
        of_magnitudes: whether |y| is looked up.
        signed: whether levels and codes get the sign of y.
    """

    lowest: float
    per_unit: float
    first: int
    steepness: float
    of_magnitudes: bool
    signed: bool

    @property
    def look_up(self) -> str:
        """PTX, see :data:`_LOOK_UP`."""
        return _LOOK_UP.format(
            size=_MAGNITUDE if self.of_magnitudes else _VALUE.format(lowest=_ptx(self.lowest)),
            width=_ptx(self.per_unit * 2.0**-24),
            origin=_ptx(1 - (BUCKETS + self.first) * 2.0**-24),
            steepness=_ptx(self.steepness),
            next=_ptx(2.0**-24),
        )


def buckets_of(fmt: Format, rounding: str) -> Buckets | None:
    """The table of a grid; ``None`` where arithmetic rounds to it, and where it fits no table."""
    grid = fmt.grid
    if uniform_offset(grid) is not None or minifloat(grid) is not None or why_not_rounded(grid):
        return None
    of_magnitudes = not grid.codebook and rounding == "even"  # of others ties depend on the sign
    levels = grid.magnitudes if of_magnitudes else grid.sorted_levels
    midpoints = sorted(map(float32, grid.thresholds))
    if not (of_magnitudes or grid.codebook):
        midpoints = [*(-midpoint for midpoint in reversed(midpoints)), *([] if grid.has_zero else [0.0]), *midpoints]
    if len(midpoints) < FEWEST_MIDPOINTS or 0.0 in midpoints or fmt.negative_zero_code is not None:
        return None
    if not all(map(_is_found, pairwise(levels), midpoints)):
        return None
    lowest = 0.0 if of_magnitudes else _neighbour(midpoints[0], -1)
    least, most = min(map(abs, midpoints)), max(map(abs, midpoints))
    steepness = 2.0 ** (MANTISSA_BITS + 3 - math.frexp(least)[1])
    if most * steepness >= 2.0**126 or least < 2.0**-64:
        return None
    exponent = math.frexp(most)[1]
    for per_unit in (2.0**power for power in range(-exponent, 7 - exponent)):
        first = math.floor(lowest * per_unit)
        places = [midpoint * per_unit - first for midpoint in midpoints]
        # A midpoint on the border of two buckets may be in either: in the first, if the tie goes up.
        parted = all(math.floor(place) < math.ceil(following) - 1 for place, following in pairwise(places))
        if parted and places[-1] < BUCKETS and -BUCKETS <= first < 2**20:
            return Buckets(lowest, per_unit, first, steepness, of_magnitudes, signed=not grid.codebook)
    return None


def _is_found(levels: tuple[float, float], midpoint: float) -> bool:
    """Whether the middle of two levels, in float32, is the midpoint."""
    low, high = map(float32, levels)
    return float32(low + float32(high - low) / 2) == midpoint


def _neighbour(value: float, direction: int) -> float:
    """The next float32 number upward (1) or downward (−1) from one that is not 0."""
    return float_of(bits_of(value) + (direction if value > 0 else -direction))


def _ptx(value: float) -> str:
    """A float32 number as PTX writes it."""
    return f"0f{bits_of(value) & 0xFFFFFFFF:08x}"
