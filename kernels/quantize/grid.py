"""The constants of generated kernels: what the data of a quantizer says, its printed formulas, and overrides in PTX.

Rounding, scales and masks are the formulas of :mod:`qcompile.kernels.formula` as device functions. Instructions that
do the same for some formats faster stand here as text, each chosen by a fact about the format:

* ``floors`` (half-integers with ties up): rounding is ⌊y⌋ + ½, one addition that rounds down.
* ``encode_eight``: of those, the ones that fit E4M3 and half a byte, eight at once.
* ``pack_8bit``: stored bits that are nearly those of 8-bit codes, as small floats have them.
* ``pair_lookup``: two codes per byte, by table.
* ``is_target``: the format of an 8-bit tensor-core type, whose conversion is rounding and code at once.
* ``buckets``: a few uneven levels, looked up in a table (:mod:`.buckets`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.formats import Format
from qcompile.ir.formulas import float32
from qcompile.ir.gaussian import clip_of
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.formula import estimators as estimator_formulas
from qcompile.kernels.formula import rounding, scales
from qcompile.kernels.formula.layout import MANTISSA_BITS, bits_of, float_of, uniform_offset, why_not_rounded
from qcompile.kernels.formula.triton_target import device_function

from . import buckets
from .buckets import Buckets, buckets_of

__all__ = [
    "Constants",
    "Grid",
    "Passing",
    "grid_of",
    "passing",
    "unsupported",
]

_SOURCE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, buckets.__file__))).hexdigest()

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
        amax_floor: smallest absolute maximum that a scale is derived from.
        of_squares: whether scales follow from the root mean square instead of the absolute maximum.
        clip: α of the ``rms`` rule, 0 for other rules.
        plain_limit: largest absolute maximum of a row whose reciprocal scale is a normal number. No element of such a
            row leaves the grid by more than rounding takes back; only other rows need to be clamped. Negative for scale
            rules of which that is not known (:attr:`~qcompile.ir.quantizer.ScaleRule.covers`).
        target: the 8-bit tensor-core type, "" if there is none.
        factor, target_offset: what levels are multiplied with, and what is then subtracted, to stand in it.
        is_target: whether the grid is that type's own, so that a conversion is rounding and code at once.
        floors: whether rounding is ⌊y⌋ + ½, as it is for half-integers with ties up.
        buckets: the table that levels are looked up in; ``None`` if there is none.
        pruned: whether elements that are rounded have indices one higher, 0 being that of elements that are dropped.
        formulas: digests of the formulas below.
        nearest, decode, scale_pair: device functions, ``(y) → level, code``, ``(code) → level`` and ``(statistic) →
            scale, γ``.
        table: 8-bit codes by stored code, for stored codes of up to 4 bits.
    """

    bits: int
    codes_per_byte: int
    largest: float
    has_zero: bool
    amax_floor: float
    of_squares: bool
    clip: float
    plain_limit: float
    target: str
    factor: float
    target_offset: float
    is_target: bool
    floors: bool
    buckets: Buckets | None
    pruned: bool
    formulas: tuple[str, ...]
    nearest: Any = field(repr=False)
    decode: Any = field(repr=False)
    scale_pair: Any = field(repr=False)
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


@dataclass(frozen=True, eq=False)
class Passing(Constants):
    """Which elements an estimator's mask lets pass, y being the scaled input: constants of a kernel. One of each
    (:func:`passing`), as for grids.

    Attributes:
        limit: |y| ≤ limit passes, a float32 number; 0 if that does not decide.
        limit_at_zero: the same of elements whose level is 0 because sparsity drops them.
        formula: digest of the mask's formula.
        keeps: device function, ``(y, level) → whether it passes``.
    """

    limit: float
    limit_at_zero: float
    formula: str
    keeps: Any = field(repr=False)

    @property
    def above_limit(self) -> float:
        """The float32 number that follows the limit."""
        return float_of(bits_of(self.limit) + 1)

    @property
    def above_limit_at_zero(self) -> float:
        """The float32 number that follows the limit of dropped elements."""
        return float_of(bits_of(self.limit_at_zero) + 1)

    def by_limits(self, sparse: bool) -> bool:
        """Whether limits decide, so that no level is needed."""
        return self.limit > 0.0 and (self.limit_at_zero > 0.0 or not sparse)


@cache
def passing(estimator: str, fmt: Format) -> Passing | None:
    """The constants of an estimator with a mask; ``None`` for one without."""
    spec = EstimatorSpec.parse(estimator)
    if spec.kind.mask is None:
        return None
    limit, limit_at_zero = (_largest_float32(spec.bound(fmt, at_zero) or 0.0) for at_zero in (False, True))
    formula = estimator_formulas.mask(spec, fmt)
    return Passing(limit, limit_at_zero, formula.digest, device_function(formula))


def _largest_float32(bound: float) -> float:
    """The largest float32 number ≤ bound: then |y| ≤ it decides as |y| ≤ bound does."""
    nearest = float32(bound)
    return nearest if nearest <= bound else float_of(bits_of(nearest) - 1)


def unsupported(q: Quantizer, eight_bit: bool = True) -> str:
    """Why there is no :class:`Grid` for ``q``; empty if there is. ``eight_bit``: whether 8-bit codes are wanted."""
    fmt = q.format
    if q.granularity.kind != "row" or q.scale.store != "fp32" or q.scale.two_level:
        return f"scales other than float32 by rows, here {q.granularity} {q.scale.name}"
    if q.draws:
        return "stochastic rounding"
    if eight_bit and fmt.tensor_core_type is None:
        return f"{fmt.name} has values that no 8-bit tensor-core type holds"
    return why_not_rounded(fmt)


@cache
def grid_of(quantizer: str, eight_bit: bool = True) -> Grid:
    """The constants of a quantizer. Raises ``ValueError`` where :func:`unsupported` has a reason."""
    q = Quantizer.parse(quantizer)
    reason, fmt = unsupported(q, eight_bit), q.format
    if reason:
        msg = f"{q}: {reason}"
        raise ValueError(msg)
    formulas = rounding.nearest(fmt, q.rounding), rounding.decode(fmt), scales.scale_and_reciprocal(q)
    largest_float = torch.finfo(torch.float32).max
    dtype = tensor_core_dtype(fmt) if fmt.tensor_core_type else None
    return Grid(
        bits=fmt.bits,
        codes_per_byte=fmt.codes_per_byte,
        largest=fmt.max,
        has_zero=fmt.has_zero,
        amax_floor=q.amax_floor,
        of_squares=q.scale.statistic == "rms",
        clip=clip_of(fmt.name) if q.scale.name == "rms" else 0.0,
        plain_limit=min(fmt.max * 2.0**126, largest_float) if q.scale.covers else -1.0,
        target=fmt.tensor_core_type or "",
        factor=fmt.tensor_core_factor,
        target_offset=fmt.tensor_core_offset,
        is_target=fmt.torch_dtype is not None and getattr(torch, fmt.torch_dtype) == dtype,
        floors=q.rounding == "half_up" and (fmt.grid.step, uniform_offset(fmt.grid)) == (1.0, 0.5),
        buckets=buckets_of(fmt, q.rounding),
        pruned=fmt.pruned is not None,
        table=_table(fmt, dtype) if dtype and fmt.bits <= 4 else (),
        formulas=tuple(formula.digest for formula in formulas),
        **{formula.name: device_function(formula) for formula in formulas},
    )


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
