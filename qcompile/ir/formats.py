"""Element formats: the values a low-bit code can stand for.

A format is data. Everything the compiler needs follows from the values a format can represent: its largest value, the
decision thresholds of nearest rounding, the width of a code, how many codes share a byte, and which tensor-core type
holds every value exactly. Adding a format is one entry in :data:`FORMATS`.

Most formats are symmetric and stored as sign and magnitude: ``code = index | sign << (bits - 1)`` where
``magnitudes[index]`` is the absolute value. A *code book* is any list of levels: the code is the index into
:attr:`Format.codebook` as given, sorted or not. Codes are packed lower index first, low bits first, along the last
axis.

``e2m1/int4`` is a pair of formats: every block of elements is rounded to one of them, and the sign of its scale, which
is no use otherwise, says to which (IF4, arXiv 2603.28765). Any two formats with magnitudes and as many bits make one.

============ =================================================== ======================================
name         levels                                              source
============ =================================================== ======================================
e2m1         0 .5 1 1.5 2 3 4 6                                  OCP MX v1.0; arXiv 2501.17116 Table 4
e1m2         0 .5 1 1.5 2 2.5 3 3.5                              arXiv 2501.17116 Table 4
e3m0         0 .25 .5 1 2 4 8 16                                 arXiv 2501.17116 Table 4
e4m3         2**-9 … 448 (the ``fn`` variant: no infinities)     OCP FP8 v1.0
e5m2         2**-16 … 57344                                      OCP FP8 v1.0
nf4          -1 … 0 … 1: quantiles of the normal distribution    arXiv 2305.14314 App. E (QLoRA)
af4          -1 … 0 … 1: of least absolute error, blocks of 64   arXiv 2306.06965 (AbnormalFloat)
nf4torchao   those of nf4 to four decimals; _bf16, _fp16 in that  torchao's NF4Tensor
             dtype
fp4bnb       0 .0625 8 12 4 6 2 3, both signs, over 12           bitsandbytes, ``quant_type="fp4"``
uint4b8      -8 … 7: integers whose code is 8 more           compressed-tensors, GPTQ (vLLM's name)
uint8b128    -128 … 127: integers whose code is 128 more      the same in 8 bits
dynamic8     ±10**-7 … 1, seven decades, 0 and 1                 arXiv 1511.04561; bitsandbytes' 8-bit map
int2…8       0 1 2 … 2**(b−1) − 1: zero-centred, odd level count the usual symmetric integer grid; int2 is
                                                                 ternary
midrise1…8   ½ 1½ 2½ … (2**b − 1)/2: no zero, even level count   mid-rise: arXiv 2502.05003 §3 (QuEST)
midrise1p…7p those of midrise1…7 and a 0 that only pruning gives arXiv 2502.05003 §4.3 (INT4 with 4:8 sparsity)
uint2 3 4 8  0 1 2 … 2**b − 1: the code is the level              asymmetric grids: arXiv 2210.17323 (GPTQ),
                                                                 with zeros (:mod:`.stored`)
============ =================================================== ======================================

Tensor cores hold a level v as the number f·v − o of an 8-bit type. Nearly always that is v itself, in E4M3 up to 4
bits. midrise5…7 are 2v in INT8, since halves are no integers, and midrise8, whose doubles reach ±255, is v − ½ in INT8.
The levels of the code books above are no such numbers: products decode them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import ClassVar

import torch

from .definitions import Registry, short_names
from .formulas import float32

__all__ = ["FORMATS", "Format", "codes_per_byte", "float_magnitudes", "get_format", "is_format", "resolve_format"]


def resolve_format(name: str) -> str:
    """The full name of a user's format, or of a pair with one."""
    return "/".join(map(FORMATS.resolve, name.split("/"))) if isinstance(name, str) else name


@dataclass(frozen=True)
class Format:
    """The values that codes stand for: ``magnitudes`` with either sign, the levels of a ``codebook``, or, block by
    block, the values of one of two ``grids``.

    Attributes:
        name: key in :data:`FORMATS`, or two of them (``"e2m1/int4"``).
        bits: width of one code, sign included.
        magnitudes: representable absolute values, ascending; the index is the magnitude part of the code. None for a
            code book.
        step: distance between levels if the grid is uniform, else ``None``. Uniform grids round by arithmetic, the
            others by comparison with :attr:`thresholds`.
        torch_dtype: name of the torch dtype with the same encoding, where there is one; its cast is then the rounding.
        pruned: name of the grid that rounding goes to, for a format that adds 0 to it as index 0: that code is given to
            elements that sparsity drops, and to no other.
        codebook: the level of every code (rounded to float32), in the order of codes; up to 2^bits levels in any order,
            of which no two are equal. 0.0 and −0.0 may both be there: the sign of what is rounded to 0 then chooses.
        grids: names of two formats, of which every block takes the one whose codes err less. What follows from levels
            below is to be asked of :attr:`choices` then.

    Raises ``ValueError`` for values that make no format.
    """

    #: Most bits of a code.
    MOST_BITS: ClassVar[int] = 8

    name: str
    bits: int
    magnitudes: tuple[float, ...] = ()
    step: float | None = None
    torch_dtype: str | None = None
    pruned: str | None = None
    codebook: tuple[float, ...] = ()
    grids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", tuple(map(resolve_format, self.grids)))
        object.__setattr__(self, "magnitudes", tuple(self.magnitudes))
        object.__setattr__(self, "codebook", tuple(self.codebook))
        if fault := self._fault():
            msg = f"format {self.name!r}: {fault}"
            raise ValueError(short_names(msg))
        object.__setattr__(self, "codebook", tuple(map(float32, self.codebook)))

    def _fault(self) -> str:
        """What makes these values no format, and what to give instead; empty if nothing does."""
        name = self.name.replace("/", "") if self.grids and isinstance(self.name, str) else self.name
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][\w@]*" if self.grids else r"[a-z]\w*", name):
            return "a name is a lower-case letter, then letters, digits or _"
        if not isinstance(self.bits, int) or not 1 <= self.bits <= self.MOST_BITS:
            return f"bits={self.bits!r}; a code has 1 to {self.MOST_BITS} bits"
        if self.grids:
            return self._fault_of_grids()
        if bool(self.magnitudes) == bool(self.codebook):
            return "give either magnitudes=, for levels of both signs, or codebook=, the level of every code"
        for value in (*self.magnitudes, *self.codebook):
            if not isinstance(value, (int, float)) or not abs(value) <= _LARGEST_FLOAT32:
                return f"level {value!r} is not a finite float32 number"
        return self._fault_of_codebook() if self.codebook else self._fault_of_magnitudes()

    def _fault_of_grids(self) -> str:
        if self.magnitudes or self.codebook or self.step is not None or self.torch_dtype or self.pruned:
            return "grids= have levels of their own; leave everything but bits= out"
        if len({*self.grids}) != 2 or len(self.grids) != 2:
            return f"grids={self.grids!r} are not two formats, for example ('e2m1', 'int4')"
        for name in self.grids:
            grid = get_format(name)
            faults = {
                "has no magnitudes": not grid.magnitudes,
                "is pruned": grid.pruned,
                f"has {grid.bits} bits": grid.bits != self.bits,
            }
            if fault := next((fault for fault, is_so in faults.items() if is_so), ""):
                return f"{name} {fault}; grids of a pair have magnitudes, and {self.bits} bits both"
        return ""

    def _fault_of_codebook(self) -> str:
        if (count := len(self.codebook)) > 2**self.bits:
            return f"{count} levels in {self.bits} bits, which hold {2**self.bits}; give more bits or fewer levels"
        for level, after in pairwise(sorted((float32(v), math.copysign(1.0, v)) for v in self.codebook)):
            if level == after:
                return f"level {level[0]!r} is there twice (as float32); every level has one code"
        if len({*map(float, self.codebook)}) < 2:
            return "a code book has two different levels at least"
        if self.step is not None or self.torch_dtype is not None or self.pruned is not None:
            return "step=, torch_dtype= and pruned= are for formats with magnitudes="
        return ""

    def _fault_of_magnitudes(self) -> str:
        held = 2 ** (self.bits - 1)
        if self.magnitudes[0] < 0:
            return f"magnitude {self.magnitudes[0]!r} is negative; give signed levels as codebook="
        if len(self.magnitudes) > held:
            return (
                f"{len(self.magnitudes)} magnitudes in {self.bits} bits, which hold {held} and a sign; give more bits"
            )
        for value, after in pairwise(map(float32, self.magnitudes)):
            if not value < after:
                return f"magnitudes {value!r}, {after!r} do not ascend (as float32); sort them and drop repetitions"
        if self.magnitudes[-1] == 0:
            return "the only magnitude is 0; give one above"
        if self.step is not None and any(abs(b - a - self.step) > 1e-6 * b for a, b in pairwise(self.magnitudes)):
            return f"step={self.step!r}, but the magnitudes are not that far apart; leave step= out"
        return ""

    @property
    def has_zero(self) -> bool:
        """Whether elements are rounded to 0. Where they are, sign and magnitude keep the sign of a zero input (IEEE
        −0); where not (half-integer grids) zero belongs to the positive side.
        """
        if self.grids:
            return all(grid.has_zero for grid in self.choices)
        return not self.pruned and 0.0 in (self.codebook or self.magnitudes)

    @cached_property
    def choices(self) -> tuple[Format, ...]:
        """The formats that a block may take: itself alone, but for a pair of ``grids``."""
        return tuple(map(get_format, self.grids)) or (self,)

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

    @cached_property
    def zero_code(self) -> int:
        """The code of elements that sparsity drops, for a format that is its own :attr:`with_zero`."""
        zeros = [code for code, level in enumerate(self.codebook) if level == 0]
        return next((code for code in zeros if code != self.negative_zero_code), 0)

    @cached_property
    def sorted_levels(self) -> tuple[float, ...]:
        """The different levels that elements are rounded to, of both signs, ascending; 0 once."""
        grid = self.grid
        return tuple(sorted({*grid.codebook, *grid.magnitudes, *(-m for m in grid.magnitudes)}))

    @property
    def max(self) -> float:
        """Largest representable magnitude; of a pair the smaller one, to which the larger scale belongs."""
        if self.grids:
            return min(grid.max for grid in self.choices)
        return max(abs(level) for level in self.codebook) if self.codebook else self.magnitudes[-1]

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest level."""
        return self.sorted_levels[0], self.sorted_levels[-1]

    @property
    def centred(self) -> bool:
        """Whether the lowest level is minus the highest."""
        lowest, highest = self.range
        return lowest == -highest

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The level of every code; codes that no level has read as 0. Of a pair those of both, one after the other."""
        if self.grids:
            return tuple(level for grid in self.choices for level in grid.levels)
        if self.codebook:
            return (*self.codebook, *(0.0,) * (2**self.bits - len(self.codebook)))
        unused = (0.0,) * (2 ** (self.bits - 1) - len(self.magnitudes))
        return (*self.magnitudes, *unused, *(-m for m in self.magnitudes), *unused)

    @cached_property
    def max_exponent(self) -> int:
        """⌊log2 max⌋, called ``emax`` in the OCP MX specification."""
        return _floor_log2(self.max)

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Midpoints between neighbours: of magnitudes, where ``thresholds[i]`` separates index ``i`` from ``i + 1``; of
        a code book those of :attr:`sorted_levels`, rounded to float32.
        """
        if self.codebook:
            return tuple(float32((low + high) / 2) for low, high in pairwise(self.sorted_levels))
        return tuple((lo + hi) / 2 for lo, hi in pairwise(self.magnitudes))

    @cached_property
    def ranked_codes(self) -> tuple[int, ...]:
        """Of a code book the code of each of :attr:`sorted_levels`; of 0 the code of 0.0, if −0.0 is there too."""
        return tuple(self.zero_code if level == 0 else self.codebook.index(level) for level in self.sorted_levels)

    @cached_property
    def negative_zero_code(self) -> int | None:
        """Of a code book that tells 0.0 and −0.0 apart the code of −0.0."""
        zeros = {math.copysign(1.0, level): code for code, level in enumerate(self.codebook) if level == 0}
        return zeros[-1.0] if len(zeros) == 2 else None

    @cached_property
    def around_zero(self) -> tuple[float, float] | None:
        """Between which values elements are rounded to 0, in grid units; ``None`` if none are."""
        if not self.has_zero:
            return None
        at = self.sorted_levels.index(0.0)
        borders = (-math.inf, *((a + b) / 2 for a, b in pairwise(self.sorted_levels)), math.inf)
        return borders[at], borders[at + 1]

    @cached_property
    def half_gap(self) -> float:
        """How far within the range an element can be from its level: half the widest gap, the one across zero included.

        Thresholds of a code book are rounded, so the farther level counts there.
        """
        pairs = list(pairwise(self.sorted_levels))
        borders = self.thresholds if self.codebook else [(low + high) / 2 for low, high in pairs]
        return max(max(t - low, high - t) for (low, high), t in zip(pairs, borders, strict=True))

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
        if self.grids:  # a code alone does not say its level
            return None, 1.0, 0.0
        levels = {*self.codebook, *self.magnitudes, *(-m for m in self.magnitudes)}
        for offset, factor in ((0.0, 1.0), (0.0, 2.0), (0.5, 1.0)):
            for candidate, values in _TENSOR_CORE_VALUES.items():
                if all(level * factor - offset in values for level in levels):
                    return candidate, factor, offset
        return None, 1.0, 0.0


def codes_per_byte(bits: int) -> int:
    """How many codes of ``bits`` bits are packed into one byte."""
    return 8 if bits == 1 else 4 if bits == 2 else 2 if bits <= 4 else 1


#: The largest finite float32 number.
_LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


def _floor_log2(value: float) -> int:
    exponent = 0
    while 2.0 ** (exponent + 1) <= value:
        exponent += 1
    while 2.0**exponent > value:
        exponent -= 1
    return exponent


def float_magnitudes(exponent_bits: int, mantissa_bits: int, reserved: int = 0) -> tuple[float, ...]:
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
    "e4m3": _signed(float_magnitudes(4, 3, reserved=1)),
    "int8": frozenset(float(i) for i in range(-128, 128)),
    "e5m2": _signed(float_magnitudes(5, 2, reserved=4)),
}


def _dynamic_map() -> tuple[float, ...]:
    """bitsandbytes' signed 8-bit map: seven decades, each of twice as many numbers as the one below, both signs, 0, 1.

    Numbers are midpoints of equal parts of [0.1, 1], computed in float32 as bitsandbytes does.
    """
    positive = []
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32, device="cpu")
        positive += ((borders[:-1] + borders[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    return tuple(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_AF4 = (
    *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
    *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
)
_FP4_BNB = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_CODE_BOOKS = (
    Format("nf4", 4, codebook=_NF4),
    Format("af4", 4, codebook=_AF4),
    Format("fp4bnb", 4, codebook=tuple(sign * level / 12 for sign in (1.0, -1.0) for level in _FP4_BNB)),
    Format("dynamic8", 8, codebook=_dynamic_map()),
)
#: Integers with the lowest code of two's complement, which others' files have, as the number above it.
_OFFSET_INTEGERS = tuple(
    Format(f"uint{b}b{2 ** (b - 1)}", b, codebook=tuple(range(-(2 ** (b - 1)), 2 ** (b - 1)))) for b in (4, 8)
)
#: NF4 with four decimals, in the dtype of the weight.
_NF4_OF_TORCHAO = tuple(
    Format(name, 4, codebook=tuple(torch.tensor([round(v, 4) for v in _NF4], device="cpu").to(dtype).tolist()))
    for name, dtype in (
        ("nf4torchao", torch.float32),
        ("nf4torchao_bf16", torch.bfloat16),
        ("nf4torchao_fp16", torch.float16),
    )
)

_ALL = (
    Format("e2m1", 4, float_magnitudes(2, 1)),
    Format("e1m2", 4, float_magnitudes(1, 2), step=0.5),
    Format("e3m0", 4, float_magnitudes(3, 0)),
    Format("e4m3", 8, float_magnitudes(4, 3, reserved=1), torch_dtype="float8_e4m3fn"),
    Format("e5m2", 8, float_magnitudes(5, 2, reserved=4), torch_dtype="float8_e5m2"),
    *_CODE_BOOKS,
    *(Format(f"midrise{b}", b, tuple(i + 0.5 for i in range(2 ** (b - 1))), step=1.0) for b in range(1, 9)),
    *(Format(f"int{b}", b, tuple(float(i) for i in range(2 ** (b - 1))), step=1.0) for b in range(2, 9)),
    *(
        Format(f"midrise{b}p", b + 1, (0.0, *(i + 0.5 for i in range(2 ** (b - 1)))), pruned=f"midrise{b}")
        for b in range(1, 8)
    ),
    *_OFFSET_INTEGERS,
    *_NF4_OF_TORCHAO,
    *(Format(f"uint{b}", b, codebook=tuple(map(float, range(2**b)))) for b in (2, 3, 4, 8)),
)

FORMATS: Registry[Format] = Registry("format", _ALL)

#: Former names: ``int1`` … ``int8`` were the mid-rise grids, so that ``int2`` … ``int8`` now mean other values.
_RENAMED = {
    "int1": "midrise1",
    **{f"int{b}z": f"int{b}" for b in range(2, 9)},
    **{f"int{b}p": f"midrise{b}p" for b in range(1, 8)},
}


def is_format(name: str) -> bool:
    """Whether a format is called so, or was; or a pair."""
    return FORMATS.resolve(name) in FORMATS or name in _RENAMED or "/" in name


@cache
def _pair(name: str) -> Format:
    names = tuple(name.split("/"))
    return Format(name, get_format(names[0]).bits, grids=names)


def get_format(name: str) -> Format:
    """Look a format up by name, or make the pair of ``"e2m1/int4"``. Raises ``ValueError`` listing the known names, or
    with the new one of a former name.
    """
    if isinstance(name, str) and "/" in name:
        return _pair(resolve_format(name))
    try:
        return FORMATS[FORMATS.resolve(name)]
    except KeyError:
        if name in _RENAMED:
            msg = f"unknown format {name!r}: {name} is now {_RENAMED[name]}"
            raise ValueError(msg) from None
        known = [name for name in FORMATS.known if not FORMATS[FORMATS.resolve(name)].pruned]  # sparsity finds those
        hint = f"did you mean {name.lower()!r}? " if isinstance(name, str) and name.lower() in FORMATS else ""
        msg = f"unknown format {name!r}; {hint}known formats: {', '.join(known)}"
        raise ValueError(msg) from None
