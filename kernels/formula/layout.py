"""What the data of a format says about rounding to its grid: which of the ways below applies, and its constants.

* ``uniform``: magnitude i is (i + o) · step, the step a power of two.
* ``minifloat``: an index is exponent and mantissa of a small float, subnormal numbers included.
* anything else with few levels, code books among them: comparisons with midpoints.
"""

from __future__ import annotations

import math
import struct

from qcompile.ir.formats import Format

__all__ = ["MANTISSA_BITS", "MOST_MIDPOINTS", "bits_of", "float_of", "minifloat", "uniform_offset", "why_not_rounded"]

#: Of float32.
MANTISSA_BITS = 23
#: Most midpoints that a formula compares with.
MOST_MIDPOINTS = 15


def uniform_offset(fmt: Format) -> float | None:
    """o where magnitude i is ``(i + o) · step`` and the step a power of two (exact division), else ``None``."""
    if fmt.codebook or fmt.step is None or math.frexp(fmt.step)[0] != 0.5:
        return None
    offset = fmt.magnitudes[0] / fmt.step
    uniform = all(m == (i + offset) * fmt.step for i, m in enumerate(fmt.magnitudes))
    return offset if uniform else None


def minifloat(fmt: Format) -> tuple[int, float] | None:
    """(mantissa bits, 2^(127 − bias)) if an index is exponent and mantissa of a small float, subnormal numbers
    included.

    Shifted to the place of float32's fields it then differs from the magnitude by a factor, the difference of the
    biases.
    """
    for mantissa_bits in range(0 if fmt.codebook else min(fmt.bits, MANTISSA_BITS)):
        shift = MANTISSA_BITS - mantissa_bits
        if len(fmt.magnitudes) << shift > 2**31:  # more exponents than float32 has
            continue
        as_float32 = [float_of(index << shift) for index in range(len(fmt.magnitudes))]
        if not as_float32[-1]:
            return None
        factor = fmt.max / as_float32[-1]
        if factor < 2.0**128 and all(m == v * factor for m, v in zip(fmt.magnitudes, as_float32, strict=True)):
            return mantissa_bits, factor
    return None


def why_not_rounded(fmt: Format) -> str:
    """Why there is no formula that rounds to ``fmt``; empty if there is one."""
    if fmt.grids:
        return next(filter(None, map(why_not_rounded, fmt.choices)), "")
    fmt = fmt.grid
    if uniform_offset(fmt) is not None or minifloat(fmt) is not None or len(fmt.thresholds) <= MOST_MIDPOINTS:
        return ""
    if fmt.codebook:
        return f"{fmt.name} is a code book of more than {MOST_MIDPOINTS + 1} levels"
    return f"{fmt.name} is neither uniform nor a minifloat, and has more than {MOST_MIDPOINTS + 1} magnitudes"


def bits_of(value: float) -> int:
    """The bits of a float32 number as a signed integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def float_of(bits: int) -> float:
    """Inverse of :func:`bits_of`."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]
