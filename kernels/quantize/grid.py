"""What the data of a quantizer says about rounding to its grid and coding it: the constants of generated kernels.

Three ways of rounding cover every grid, and the magnitudes alone say which applies:

* ``uniform``: magnitude i is (i + o) · step, the step a power of two. Adding 1.5·2²³ rounds to the nearest integer.
* ``minifloat``: an index is exponent and mantissa of a small float, subnormal numbers included. Adding 1.5·2²³ units in
  the last place of the number's own binade rounds to the nearest of them.
* ``thresholds``: anything else with few levels. The midpoints that lie below a magnitude are counted.

A pruned format is rounded to the grid it was made from; its codes are one index higher, below which 0 has its own.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, pairwise, product
from pathlib import Path

import torch

from qcompile.ir.estimators import Estimator, clip_limit, trust_threshold
from qcompile.ir.formats import Format
from qcompile.ir.gaussian import clip_of
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype

__all__ = [
    "MANTISSA_BITS",
    "Constants",
    "Grid",
    "Passing",
    "bits_of",
    "float_of",
    "grid_of",
    "minifloat",
    "passing",
    "uniform_offset",
    "unsupported",
]

#: Of float32.
MANTISSA_BITS = 23

_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

#: Most midpoints that a kernel compares with.
_MOST_MIDPOINTS = 15

#: ``prmt`` takes four bytes out of eight, those that the nibbles of its last operand number. ``nibbles`` becomes four
#: low ones and four high ones; then, for each four, both halves of the table are looked up by the lower three bits
#: (``index``), and the highest bit chooses between the two bytes (``half``: j from the first, 4 + j from the second).
_PAIR_LOOKUP = """
{{
.reg .b32 by4, by8, low, high, part, nibbles, index, half, lower, upper;
shr.b32 by4, $2, 4;
shr.b32 by8, $2, 8;
and.b32 low, $2, 0x0f0f0f0f;
and.b32 part, by4, 0xf0f0f0f0;
or.b32 low, low, part;
and.b32 high, by4, 0x0f0f0f0f;
and.b32 part, by8, 0xf0f0f0f0;
or.b32 high, high, part;
prmt.b32 nibbles, low, high, 0x6420;
and.b32 index, nibbles, 0x77777777;
shr.b32 half, nibbles, 1;
and.b32 half, half, 0x44444444;
or.b32 half, half, 0x32103210;
prmt.b32 lower, {0}, {1}, index;
prmt.b32 upper, {2}, {3}, index;
prmt.b32 $0, lower, upper, half;
shr.b32 index, index, 16;
shr.b32 half, half, 16;
prmt.b32 lower, {0}, {1}, index;
prmt.b32 upper, {2}, {3}, index;
prmt.b32 $1, lower, upper, half;
}}
"""

#: Numbers in two's complement, plus {bias}, as sign and magnitude: where the sign is set, bits below it are flipped.
#: ``lop3`` computes any function of three words bit by bit, from its table: 0x28 stands for (a xor b) and c, 0x96 for a
#: xor b xor c.
_SIGN_MAGNITUDE = """
{{
.reg .b32 sign, flip;
lop3.b32 sign, {source}, {bias}, {sign}, 0x28;
shr.b32 flip, sign, {shift};
sub.s32 flip, sign, flip;
lop3.b32 {target}, {source}, {bias}, flip, 0x96;
and.b32 {target}, {target}, {code};
}}
"""

#: Stored codes in the upper halves of four bytes ({halves}) from 8-bit ones ({word}). Bits of ``kept`` stand there
#: already; each of the others is one ``function`` of three bits: that place's own and two lower ones. 0xe4 stands for
#: "the third chooses between the first two".
_UPPER_HALVES = """\
shl.b32 near, {word}, {near};
shl.b32 far, {word}, {far};
lop3.b32 far, {word}, near, far, {function:#04x};
lop3.b32 {halves}, {word}, far, {kept:#010x}, 0xe4;
"""

#: 8-bit codes of eight neighbours ($0, $1) and stored codes, two per byte ($2), from scaled values ($3 … $10) whose ⌊y⌋
#: fits 16 bits. ⌊y⌋ + {sign} is clamped and converted in pairs; then four even and four odd ones are put together.
_EIGHT = """
{{
.reg .f32 floor<8>;
.reg .b32 highest, to_level, pair<4>, half<4>, first, second, even, odd;
.reg .b16 two<4>;
mov.b32 highest, {highest:#010x};
mov.b32 to_level, {to_level:#010x};
{floors}{pairs}mad.lo.u32 first, pair1, 256, pair0;
mad.lo.u32 second, pair3, 256, pair2;
prmt.b32 even, first, second, 0x5410;
prmt.b32 odd, first, second, 0x7632;
mad.lo.u32 even, odd, 16, even;
{sign_magnitude}
mov.b32 $0, {{two0, two1}};
mov.b32 $1, {{two2, two3}};
}}
"""
_FLOOR = "add.rm.f32 floor{i}, ${operand}, 0f{rounder:08x};\n"
#: In float16, numbers from 256 on are ¼ apart: n · 4 added to the bits of 256 is 256 + n, which stays exact.
_PAIR = """\
prmt.b32 pair{i}, floor{even}, floor{odd}, 0x5410;
min.relu.s16x2 pair{i}, pair{i}, highest;
mad.lo.u32 half{i}, pair{i}, 4, 0x5c005c00;
add.rn.f16x2 half{i}, half{i}, to_level;
cvt.rn.satfinite.e4m3x2.f16x2 two{i}, half{i};
"""

#: Registers of what is packed.
_PARITIES = (("even", "$1"), ("odd", "$2"))

#: The upper halves of four bytes with even codes and of four with odd ones, as bytes with two codes.
_PACK_8BIT = """
{{
.reg .b32 near, far, even, odd;
{even}{odd}shr.b32 even, even, 4;
lop3.b32 $0, odd, even, 0xf0f0f0f0, 0xe4;
}}
"""


class Constants:
    """What kernels are specialized by."""

    @property
    def cache_key(self) -> str:
        """By which Triton tells constants apart in its cache on disk: fields, and the source of what follows from them
        (PTX, for one), which is no part of a kernel's own source.
        """
        return f"{self!r} {_SOURCE}"


@dataclass(frozen=True, eq=False)
class Grid(Constants):
    """A quantizer with one scale per row, as constants for its kernels to be specialized by.

    There is one of each (:func:`grid_of`), told apart by identity: Triton looks constants up at every launch.

    Attributes:
        bits: width of a stored code, sign included.
        codes_per_byte: stored codes that share a byte.
        largest: largest magnitude.
        has_zero: whether 0 is a level; then the sign of a zero is kept.
        ties_up: whether ties go toward +∞ instead of to the even index.
        power_of_two: whether scales are powers of two.
        amax_floor: smallest absolute maximum that a scale is derived from.
        clip: α of the rms rule, 0 where scales follow from the absolute maximum.
        plain_limit: largest absolute maximum of a row whose reciprocal scale is a normal number. No element of such a
            row leaves the grid by more than rounding takes back; only other rows need to be clamped.
        target: the 8-bit tensor-core type, "" if there is none.
        factor, target_offset: what levels are multiplied with, and what is then subtracted, to stand in it.
        is_target: whether the grid is that type's own, so that a conversion is rounding and code at once.
        rounding: ``"uniform"``, ``"minifloat"`` or ``"thresholds"``.
        step, offset: of a uniform grid.
        floors: whether rounding is ⌊y⌋ + ½, as it is for half-integers with ties up.
        pruned: whether elements that are rounded have indices one higher, 0 being that of elements that are dropped.
        mantissa_bits, smallest_normal: of a minifloat.
        to_fields: factor that moves a minifloat's exponent and mantissa to where float32 has its own.
        midpoints: float32 bits of magnitudes; index i + 1 begins right above the i-th.
        gaps: distances between neighbouring magnitudes, the first one's from 0.
        table: 8-bit codes by stored code, for stored codes of up to 4 bits.
    """

    bits: int
    codes_per_byte: int
    largest: float
    has_zero: bool
    ties_up: bool
    power_of_two: bool
    amax_floor: float
    clip: float
    plain_limit: float
    target: str
    factor: float
    target_offset: float
    is_target: bool
    rounding: str
    step: float = 1.0
    offset: float = 0.0
    floors: bool = False
    pruned: bool = False
    mantissa_bits: int = 0
    smallest_normal: float = 1.0
    to_fields: float = 1.0
    midpoints: tuple[int, ...] = ()
    gaps: tuple[float, ...] = ()
    table: tuple[int, ...] = ()

    @property
    def biased(self) -> bool:
        """Whether kernels have ⌊y⌋ + bias for a code until they pack it."""
        return self.floors and not self.pruned

    @property
    def blank(self) -> int:
        """The code, in a kernel, whose stored code is 0."""
        return self.bias if self.biased else 0

    @property
    def bias(self) -> int:
        """What is added to ⌊y⌋ for it to be no negative number in its part of a byte (see ``floors``)."""
        return 2 ** (8 // self.codes_per_byte - 1)

    @property
    def integer_code(self) -> tuple[int, int]:
        """What ⌊y⌋ + bias is multiplied with, and what is then added, for the 8-bit code of an integer ``target``."""
        return int(self.factor), int(self.factor * (0.5 - self.bias) - self.target_offset)

    def in_every_code(self, field: int) -> int:
        """The byte whose codes are all ``field``."""
        width = 8 // self.codes_per_byte
        return sum(field << width * i for i in range(self.codes_per_byte))

    @property
    def sign_magnitude(self) -> str:
        """PTX: four bytes of stored codes ($0) from four of ⌊y⌋ + bias ($1)."""
        return self._sign_magnitude("$1", "$0", self.bias)

    def _sign_magnitude(self, source: str, target: str, bias: int) -> str:
        bytes_of = {
            name: self.in_every_code(field) * 0x01010101
            for name, field in (("bias", bias), ("sign", 2 ** (self.bits - 1)), ("code", 2**self.bits - 1))
        }
        fields = {name: f"{value:#010x}" for name, value in bytes_of.items()}
        return _SIGN_MAGNITUDE.format(source=source, target=target, shift=self.bits - 1, **fields)

    @cached_property
    def encode_eight(self) -> str:
        """PTX: 8-bit codes ($0, $1) and stored codes ($2) from scaled values of eight neighbours ($3 … $10), not NaN
        and below 2¹⁵.

        "" unless two stored codes share a byte, rounding ``floors``, and levels are E4M3 numbers.
        """
        if not (self.biased and self.codes_per_byte == 2 and (self.target, self.factor) == ("e4m3", 1.0)):
            return ""
        sign = 2 ** (self.bits - 1)
        rounder = bits_of(1.5 * 2.0**MANTISSA_BITS + sign)
        return _EIGHT.format(
            highest=(2 * sign - 1) * 0x10001,
            to_level=(0xDC00 + 4 * sign - 2) * 0x10001,
            floors="".join(_FLOOR.format(i=i, operand=i + 3, rounder=rounder) for i in range(8)),
            pairs="".join(_PAIR.format(i=i, even=2 * i, odd=2 * i + 1) for i in range(4)),
            sign_magnitude=self._sign_magnitude("even", "$2", sign),
        )

    @cached_property
    def pack_8bit(self) -> str:
        """PTX: four bytes of two stored codes ($0) from the 8-bit codes of four even ($1) and four odd ($2) elements.

        "" unless two share a byte, 0 is a level, and stored bits are nearly those of 8-bit codes, as in small floats.
        """
        found = _upper_halves(self.table) if self.table and self.codes_per_byte == 2 and self.has_zero else None
        if found is None:
            return ""
        halves = {name: _UPPER_HALVES.format(word=word, halves=name, **found) for name, word in _PARITIES}
        return _PACK_8BIT.format(**halves)

    def table_word(self, first: int, count: int) -> int:
        """``count`` (4 or 8) entries of :attr:`table` as one signed integer, the lowest first."""
        entries = [*self.table[first : first + count], *[0] * count][:count]
        return int.from_bytes(bytes(entries), "little", signed=True)

    @property
    def pair_lookup(self) -> str:
        """PTX: the table's entries for the low ($0) and the high ($1) nibbles of four bytes ($2)."""
        words = [f"0x{self.table_word(first, 4) & 0xFFFFFFFF:08x}" for first in (0, 4, 8, 12)]
        return _PAIR_LOOKUP.format(*words)


@dataclass(frozen=True)
class Passing(Constants):
    """Which elements an estimator's mask lets pass, y being the scaled input: constants of a kernel.

    Attributes:
        limit: |y| ≤ limit passes, a float32 number; 0 if that does not decide.
        threshold: otherwise, and for elements that sparsity drops (whose level is 0), |y − level| ≤ threshold does.
    """

    limit: float
    threshold: float

    @property
    def above_limit(self) -> float:
        """The float32 number that follows the limit."""
        return float_of(bits_of(self.limit) + 1)

    @property
    def above_threshold(self) -> float:
        """The float32 number that follows the threshold."""
        return float_of(bits_of(self.threshold) + 1)


@cache
def passing(estimator: str, fmt: Format) -> Passing | None:
    """The constants of an estimator with a mask; ``None`` for one without.

    ``trust`` compares with the distance to the nearest level. That is at most half the widest gap within the grid, so a
    threshold not below it decides outside only, where y ∓ max is exact: a limit of |y| does as well.
    """
    spec = Estimator.parse(estimator)
    parameters = dict(spec.parameters)
    if spec.kind.mask is None:
        return None
    if spec.name == "clip":
        limit = _float32(clip_limit(fmt, **parameters))  # type: ignore[arg-type]
        return Passing(limit, limit)
    threshold = _float32(trust_threshold(fmt, **parameters))
    decides_outside = trust_threshold(fmt) <= threshold <= fmt.max
    return Passing(_largest_sum(fmt.max, threshold) if decides_outside else 0.0, threshold)


def _largest_sum(a: float, b: float) -> float:
    """The largest float32 number ≤ a + b, of positive float32 numbers whose sum float64 holds."""
    total = _float32(a + b)
    return total if total <= a + b else float_of(bits_of(total) - 1)


def _float32(value: float) -> float:
    return float_of(bits_of(value))


def unsupported(q: Quantizer, eight_bit: bool = True) -> str:
    """Why there is no :class:`Grid` for ``q``; empty if there is. ``eight_bit``: whether 8-bit codes are wanted."""
    fmt = q.format
    if q.granularity.kind != "row" or q.scale.name not in ("absmax", "absmax_pow2", "rms"):
        return f"scales other than absmax, absmax_pow2 and rms by rows, here {q.granularity} {q.scale.name}"
    if q.rounding == "stochastic":
        return "stochastic rounding"
    if eight_bit and fmt.tensor_core_type is None:
        return f"{fmt.name} has values that no 8-bit tensor-core type holds"
    if _rounding(fmt.grid) is None:
        return f"{fmt.name} is neither uniform nor a minifloat, and has more than {_MOST_MIDPOINTS + 1} magnitudes"
    return ""


@cache
def grid_of(quantizer: str, eight_bit: bool = True) -> Grid:
    """The constants of a quantizer. Raises ``ValueError`` where :func:`unsupported` has a reason."""
    q = Quantizer.parse(quantizer)
    reason, fmt = unsupported(q, eight_bit), q.format
    if reason:
        msg = f"{q}: {reason}"
        raise ValueError(msg)
    rounding = _rounding(fmt.grid)
    assert rounding is not None
    kind, constants = rounding
    if kind == "thresholds":
        ties = [q.rounding == "even" and i % 2 == 1 for i in range(len(fmt.grid.thresholds))]
        constants["midpoints"] = tuple(
            bits_of(threshold) - tie for threshold, tie in zip(fmt.grid.thresholds, ties, strict=True)
        )
    largest_float = torch.finfo(torch.float32).max
    dtype = tensor_core_dtype(fmt) if fmt.tensor_core_type else None
    return Grid(
        bits=fmt.bits,
        codes_per_byte=fmt.codes_per_byte,
        largest=fmt.max,
        has_zero=fmt.has_zero,
        ties_up=q.rounding == "half_up",
        power_of_two=q.scale.name == "absmax_pow2",
        amax_floor=q.amax_floor,
        clip=clip_of(fmt.name) if q.scale.statistic == "rms" else 0.0,
        plain_limit=min(fmt.max * 2.0**126, largest_float),
        target=fmt.tensor_core_type or "",
        factor=fmt.tensor_core_factor,
        target_offset=fmt.tensor_core_offset,
        is_target=fmt.torch_dtype is not None and getattr(torch, fmt.torch_dtype) == dtype,
        rounding=kind,
        floors=q.rounding == "half_up" and (constants.get("step"), constants.get("offset")) == (1.0, 0.5),
        pruned=fmt.pruned is not None,
        table=_table(fmt, dtype) if dtype and fmt.bits <= 4 else (),
        **constants,
    )


def _rounding(fmt: Format) -> tuple[str, dict] | None:
    """How to round to ``fmt``, with the constants that takes; ``None`` if no way is known."""
    offset, layout = uniform_offset(fmt), minifloat(fmt)
    if offset is not None:
        return "uniform", {"step": fmt.step, "offset": offset}
    # Without mantissa bits the even index is not the even multiple of a unit in the last place.
    if layout is not None and layout[0] > 0:
        mantissa_bits, factor = layout
        constants = {"mantissa_bits": mantissa_bits, "smallest_normal": factor * 2.0**-126, "to_fields": 1 / factor}
        return "minifloat", constants
    if len(fmt.thresholds) > _MOST_MIDPOINTS:
        return None
    magnitudes = (0.0, *fmt.magnitudes)
    return "thresholds", {"gaps": tuple(b - a for a, b in pairwise(magnitudes))}


def _table(fmt: Format, dtype: torch.dtype) -> tuple[int, ...]:
    """The byte of the 8-bit code of every stored code."""
    levels = [level * fmt.tensor_core_factor - fmt.tensor_core_offset for level in fmt.levels]
    return tuple(torch.tensor(levels).to(dtype).view(torch.uint8).tolist())


def _upper_halves(table: tuple[int, ...]) -> dict[str, int] | None:
    """Constants with which :data:`_UPPER_HALVES` turns every entry of a table into its index; ``None`` if none do."""
    distances = combinations(range(1, 5), 2)  # a bit from farther away would be one of another byte
    for (near, far), kept in product(distances, sorted(range(16), key=int.bit_count)):
        function: dict[int, int] = {}
        agree = True
        for (code, byte), place in product(enumerate(table), range(4, 8)):
            bit, own = code >> place - 4 & 1, byte >> place & 1
            if not kept >> place - 4 & 1:
                inputs = own << 2 | (byte >> place - near & 1) << 1 | byte >> place - far & 1
                own = function.setdefault(inputs, bit)
            agree &= own == bit
        if agree:
            lut = sum(bit << inputs for inputs, bit in function.items())
            return {"near": near, "far": far, "function": lut, "kept": kept * 0x10101010}
    return None


def uniform_offset(fmt: Format) -> float | None:
    """o where magnitude i is ``(i + o) · step`` and the step a power of two (exact division), else ``None``."""
    if fmt.step is None or math.frexp(fmt.step)[0] != 0.5:
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
    for mantissa_bits in range(fmt.bits):
        shift = MANTISSA_BITS - mantissa_bits
        as_float32 = [float_of(index << shift) for index in range(len(fmt.magnitudes))]
        if not as_float32[-1]:
            return None
        factor = fmt.max / as_float32[-1]
        if factor < 2.0**128 and all(m == v * factor for m, v in zip(fmt.magnitudes, as_float32, strict=True)):
            return mantissa_bits, factor
    return None


def bits_of(value: float) -> int:
    """The bits of a float32 number as a signed integer."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


def float_of(bits: int) -> float:
    """Inverse of :func:`bits_of`."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]
