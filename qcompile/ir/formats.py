"""Element formats: the values a low-bit code can stand for.

A format is data. Everything the compiler needs follows from the magnitudes a format can represent: its largest
value, the decision thresholds of nearest rounding, the width of a code, how many codes share a byte, and
which tensor-core type holds every value exactly. Adding a format is one entry in :data:`FORMATS`.

All formats here are symmetric and stored as sign and magnitude: ``code = index | sign << (bits - 1)`` where
``magnitudes[index]`` is the absolute value. Codes are packed lower index first, low bits first, along the last axis.

============ =================================================== ======================================
name         magnitudes                                          source
============ =================================================== ======================================
e2m1         0 .5 1 1.5 2 3 4 6                                  OCP MX v1.0; arXiv 2501.17116 Table 4
e1m2         0 .5 1 1.5 2 2.5 3 3.5                              arXiv 2501.17116 Table 4
e3m0         0 .25 .5 1 2 4 8 16                                 arXiv 2501.17116 Table 4
e4m3         2**-9 … 448 (the ``fn`` variant: no infinities)     OCP FP8 v1.0
e5m2         2**-16 … 57344                                      OCP FP8 v1.0
int2…8       0 1 2 … 2**(b−1) − 1: zero-centred, odd level count the usual symmetric integer grid; int2 is
                                                                 ternary
midrise1…8   ½ 1½ 2½ … (2**b − 1)/2: no zero, even level count   mid-rise: arXiv 2502.05003 §3 (QuEST)
midrise1p…7p those of midrise1…7 and a 0 that only pruning gives arXiv 2502.05003 §4.3 (INT4 with 4:8 sparsity)
============ =================================================== ======================================

Tensor cores hold a level v as the number f·v − o of an 8-bit type. Nearly always that is v itself, in E4M3 up to 4
bits. midrise5…7 are 2v in INT8, since halves are no integers, and midrise8, whose doubles reach ±255, is v − ½ in INT8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

__all__ = ["FORMATS", "Format", "codes_per_byte", "get_format"]


@dataclass(frozen=True)
class Format:
    """A symmetric grid of representable values.

    Attributes:
        name: key in :data:`FORMATS`.
        bits: width of one code, sign included.
        magnitudes: representable absolute values, ascending; the index is the magnitude part of the code.
        has_zero: whether 0 is a level. Where it is, the sign bit of a zero input is kept (IEEE −0); where it is
            not (half-integer grids) zero belongs to the positive side.
        step: distance between levels if the grid is uniform, else ``None``. Uniform grids round by arithmetic, the
            others by comparison with :attr:`thresholds`.
        torch_dtype: name of the torch dtype with the same encoding, where there is one; its cast is then the rounding.
        pruned: name of the grid that rounding goes to, for a format that adds 0 to it as index 0: that code is given to
            elements that sparsity drops, and to no other.
    """

    name: str
    bits: int
    magnitudes: tuple[float, ...]
    has_zero: bool = True
    step: float | None = None
    torch_dtype: str | None = None
    pruned: str | None = None

    @property
    def grid(self) -> Format:
        """The format whose levels elements are rounded to: itself, but for a pruned one."""
        return FORMATS[self.pruned] if self.pruned else self

    @cached_property
    def with_zero(self) -> Format:
        """The format that holds these levels and 0. Raises ``ValueError`` if there is none."""
        if self.has_zero or self.pruned:
            return self
        twins = [fmt for fmt in FORMATS.values() if fmt.pruned == self.name]
        if not twins:
            msg = f"{self.name} has no level 0 and no spare code for one, which sparsity needs"
            raise ValueError(msg)
        return twins[0]

    @property
    def max(self) -> float:
        """Largest representable magnitude."""
        return self.magnitudes[-1]

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The level of every code; codes that no level has read as 0."""
        unused = (0.0,) * (2 ** (self.bits - 1) - len(self.magnitudes))
        return (*self.magnitudes, *unused, *(-m for m in self.magnitudes), *unused)

    @cached_property
    def max_exponent(self) -> int:
        """⌊log2 max⌋, called ``emax`` in the OCP MX specification."""
        return _floor_log2(self.max)

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Midpoints between neighbouring magnitudes; ``thresholds[i]`` separates index ``i`` from ``i + 1``."""
        return tuple((lo + hi) / 2 for lo, hi in zip(self.magnitudes, self.magnitudes[1:], strict=False))

    @property
    def codes_per_byte(self) -> int:
        """Codes that share a byte: 8, 4, 2 or 1."""
        return codes_per_byte(self.bits)

    @cached_property
    def tensor_core_type(self) -> str | None:
        """8-bit tensor-core type that holds ``level · factor − offset`` of every level exactly.

        ``"e4m3"`` for every 4-bit grid (odd numerators 2k+1 ≤ 15 fit its four significant bits), ``"int8"`` for the
        other integer grids. ``None`` if there is none. Without an offset if that is possible, and without a factor.
        """
        return self._tensor_core[0]

    @property
    def tensor_core_factor(self) -> float:
        """What levels are multiplied with to stand in :attr:`tensor_core_type`: 2 for up to 7 bits of half-integers in
        int8, whose numerators are at most 127; else 1.
        """
        return self._tensor_core[1]

    @property
    def tensor_core_offset(self) -> float:
        """What is then subtracted: ½ for 8 bits of half-integers, k + ½ being k in int8; else 0.

        Such a code is no multiple of its level: products of codes need terms that correct them (``mm_8bit``).
        """
        return self._tensor_core[2]

    @cached_property
    def _tensor_core(self) -> tuple[str | None, float, float]:
        levels = {*self.magnitudes, *(-m for m in self.magnitudes)}
        for offset, factor in ((0.0, 1.0), (0.0, 2.0), (0.5, 1.0)):
            for candidate, values in _TENSOR_CORE_VALUES.items():
                if all(level * factor - offset in values for level in levels):
                    return candidate, factor, offset
        return None, 1.0, 0.0


def codes_per_byte(bits: int) -> int:
    """How many codes of ``bits`` bits are packed into one byte."""
    return 8 if bits == 1 else 4 if bits == 2 else 2 if bits <= 4 else 1


def _floor_log2(value: float) -> int:
    exponent = 0
    while 2.0 ** (exponent + 1) <= value:
        exponent += 1
    while 2.0**exponent > value:
        exponent -= 1
    return exponent


def _float_magnitudes(exponent_bits: int, mantissa_bits: int, reserved: int = 0) -> tuple[float, ...]:
    """Values of an IEEE-like minifloat with bias 2**(E−1) − 1; the top ``reserved`` codes are NaN or infinity."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - reserved):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        significand = mantissa / 2**mantissa_bits + (exponent > 0)
        values.append(significand * 2.0 ** (max(exponent, 1) - bias))
    return tuple(values)


def _signed(magnitudes: tuple[float, ...]) -> frozenset[float]:
    return frozenset((*magnitudes, *(-m for m in magnitudes)))


#: Values of the 8-bit tensor-core types, the preferred ones first.
_TENSOR_CORE_VALUES = {
    "e4m3": _signed(_float_magnitudes(4, 3, reserved=1)),
    "int8": frozenset(float(i) for i in range(-128, 128)),
    "e5m2": _signed(_float_magnitudes(5, 2, reserved=4)),
}

_ALL = (
    Format("e2m1", 4, _float_magnitudes(2, 1)),
    Format("e1m2", 4, _float_magnitudes(1, 2), step=0.5),
    Format("e3m0", 4, _float_magnitudes(3, 0)),
    Format("e4m3", 8, _float_magnitudes(4, 3, reserved=1), torch_dtype="float8_e4m3fn"),
    Format("e5m2", 8, _float_magnitudes(5, 2, reserved=4), torch_dtype="float8_e5m2"),
    *(
        Format(f"midrise{b}", b, tuple(i + 0.5 for i in range(2 ** (b - 1))), has_zero=False, step=1.0)
        for b in range(1, 9)
    ),
    *(Format(f"int{b}", b, tuple(float(i) for i in range(2 ** (b - 1))), step=1.0) for b in range(2, 9)),
    *(
        Format(
            f"midrise{b}p", b + 1, (0.0, *(i + 0.5 for i in range(2 ** (b - 1)))), has_zero=False, pruned=f"midrise{b}"
        )
        for b in range(1, 8)
    ),
)

FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _ALL}

#: Former names: ``int1`` … ``int8`` were the mid-rise grids, so that ``int2`` … ``int8`` now mean other values.
_RENAMED = {
    "int1": "midrise1",
    **{f"int{b}z": f"int{b}" for b in range(2, 9)},
    **{f"int{b}p": f"midrise{b}p" for b in range(1, 8)},
}


def get_format(name: str) -> Format:
    """Look a format up by name. Raises ``ValueError`` listing the known names, or with the new one of a former name."""
    try:
        return FORMATS[name]
    except KeyError:
        if name in _RENAMED:
            msg = f"unknown format {name!r}: {name} is now {_RENAMED[name]}"
            raise ValueError(msg) from None
        known = [fmt.name for fmt in _ALL if not fmt.pruned]  # sparsity finds those by itself
        hint = f"did you mean {name.lower()!r}? " if isinstance(name, str) and name.lower() in FORMATS else ""
        msg = f"unknown format {name!r}; {hint}known formats: {', '.join(known)}"
        raise ValueError(msg) from None
