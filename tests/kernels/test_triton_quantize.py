"""The Triton quantize kernels without a GPU: numerics in Triton's interpreter, and the machine code for Hopper.

Codes, scales and packed codes are compared with the references bit for bit. Fresh memory holds junk (conftest.py), so
an element that a kernel leaves out shows. The interpreter has to be chosen before Triton is imported: the tests named
``test_interpreted_…`` run in a process of their own, which :func:`test_numerics_under_the_interpreter` starts.

What the interpreter cannot run is inline PTX: that of table look-ups, of packing, of eight elements at once and of the
search among pairs is interpreted here; the maxima of rows and a few single instructions are left to tests/gpu.
"""

from __future__ import annotations

import math
import operator
import re
import subprocess
from collections.abc import Callable, Iterable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402
from triton.runtime.interpreter import TensorHandle  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from qcompile.ir.definitions import short_name  # noqa: E402
from qcompile.ir.formats import FORMATS, Format  # noqa: E402
from qcompile.ir.operand import Operand  # noqa: E402
from qcompile.ir.quantizer import ROUNDINGS, Quantizer  # noqa: E402
from qcompile.kernels.outliers import reference as outliers_reference  # noqa: E402
from qcompile.kernels.outliers import row_search  # noqa: E402
from qcompile.kernels.outliers import triton as outliers  # noqa: E402
from qcompile.kernels.quantize import grid as grids  # noqa: E402
from qcompile.kernels.quantize import reference, triton_codes, triton_recode  # noqa: E402
from qcompile.kernels.quantize import triton as kernels  # noqa: E402
from qcompile.kernels.quantize import triton_transformed as transform_kernels  # noqa: E402
from qcompile.kernels.quantize.grid import grid_of, passing, unsupported  # noqa: E402

from .harness import SM90, compiled, interpreted, launching, run_interpreted  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INFINITY = float("nan"), float("inf")
E2M1, E4M3 = "e2m1 row absmax even", "e4m3 row absmax even"
#: SwiGLU.
PRODUCER = "neg(a); exp(%0); add(%1, 1.0); div(a, %2); mul(%3, b) bfloat16"
#: The interpreter computes with NaN and converts arrays of one element, and says so every time.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


def quantizers() -> list[str]:
    """Every built-in format for tensor cores with every rounding and scale rule of the kernels."""
    texts = []
    for fmt in (fmt for fmt in FORMATS.values() if fmt.name == short_name(fmt.name)):  # others' tests define some
        for rounding in ("even", "half_up"):
            looked_up = len(fmt.codebook) <= 16  # by the lanes of half a warp
            if fmt.tensor_core_type and looked_up and not (fmt.pruned or (fmt.torch_dtype and rounding == "half_up")):
                texts += [f"{fmt.name} row {rule} {rounding}" for rule in ("absmax", "absmax_pow2")]
    return texts


def rows_of_everything(rows: int, columns: int, fmt: Format) -> torch.Tensor:
    """Float32 rows with ties, saturation, −0, tiny and huge scales, zeros only, NaN and infinity."""
    x = torch.randn(rows, columns)
    ties = torch.tensor([*fmt.thresholds, *fmt.magnitudes, -0.0][: columns - 1])
    for row, factor in ((0, 1.0), (1, -1.0), (2, -(2.0**60))):
        x[row] = 0.0
        x[row, : len(ties)] = ties * factor
        x[row, -1] = fmt.max * factor  # the scale is then a power of two, and ties stay ties
    x[3] = 0.0
    x[4] *= 1e-38
    x[5] = 3.4e38
    x[6, 1:4] = torch.tensor([NAN, INFINITY, -0.0])
    x[7, 1:4] = torch.tensor([INFINITY, -INFINITY, -0.0])
    return x


def assert_same(actual, expected, what: object = "") -> None:
    """Equal bits, except that any NaN equals any other."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype, (what, i)
        assert a.shape == e.shape, (what, i)
        if a.dtype == FP32:
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{what}[{i}]: {m}")
        else:
            differing = (a.contiguous().view(torch.uint8) != e.contiguous().view(torch.uint8)).nonzero()
            assert not len(differing), (what, i, differing[:5].tolist())


def compensated(module, x, operand, axis):
    """Codes, scales and bounds; the bounds of a row that is not finite are any."""
    codes, scales, bounds = module.quantize_compensated(x, operand, axis)
    return codes, scales, bounds.where(scales.isfinite(), 0.0)


# --- the data of formats --------------------------------------------------------------------------------------------


def test_grids_say_why_there_is_none(monkeypatch):
    """A quantizer without constants would otherwise be rounded by those of another."""
    monkeypatch.setitem(FORMATS, "thirds", Format("thirds", 3, (0.0, 1 / 3, 2 / 3, 1.0)))
    for text, reason in {
        "thirds": "no 8-bit tensor-core type holds",
        "e2m1 block16": "scales other than",
        "e2m1 row e8m0": "scales other than",
        "e2m1 row absmax stochastic": "stochastic rounding",
    }.items():
        assert reason in unsupported(Quantizer.parse(text))
        with pytest.raises(ValueError, match=reason):
            grid_of(text)
    assert {text.rpartition(" ")[2] for text in quantizers()} | {"stochastic", "eden"} == set(ROUNDINGS)


def test_what_is_supported():
    """A kernel that is asked for what it cannot do has no other way to refuse."""
    bf16 = (BF16,)
    for text in quantizers():
        assert kernels.supports_quantize_8bit(bf16, text) == (True, "")
        assert kernels.supports_recode((), text) == (True, "")
    assert not kernels.supports_quantize_8bit((torch.float64,), E2M1)[0]
    assert kernels.supports_recode((), "e2m1 block16 e8m0") == (True, "")
    assert kernels.supports_columns(bf16, E4M3, True) == (True, "")
    assert not kernels.supports_columns(bf16, E4M3, False)[0]
    assert not kernels.supports_columns(bf16, E2M1, True)[0]
    operand = "e2m1 row absmax even; ste; occ(residual=e4m3)"
    assert kernels.supports_quantize_compensated(bf16, operand, 16384) == (True, "")
    assert not kernels.supports_quantize_compensated(bf16, operand, 16385)[0]
    assert outliers.supports_clamp_outliers(bf16, "occ(alpha=0.99)", 4096) == (True, "")
    assert outliers.supports_clamp_outliers(bf16, "occ(per=tensor)", 2**31) == (True, "")


@pytest.mark.parametrize("name", ["e2m1", "midrise4", "e3m0", "int3"])
def test_ptx_of_the_look_up(name):
    """Every byte in every place, through the PTX text: a wrong selector would swap or negate levels."""
    fmt = FORMATS[name]
    fields = torch.arange(256, dtype=torch.uint8)
    expected = reference.recode(fields[:, None], name, 2, False) if fmt.bits == 4 else None
    table = grid_of(name).table
    for byte in range(0, 256, 1 if fmt.bits == 4 else 17):
        word = int.from_bytes(bytes([byte, 255 - byte, 0x3C, byte ^ 0x5A]), "little")
        if fmt.bits == 3:  # such codes leave the highest bit of their four unused
            word &= 0x77777777
        low, high = run_ptx(grid_of(name).pair_lookup, ["$0", "$1"], {"$2": word})
        for place in range(4):
            code = word >> 8 * place & 255
            assert low >> 8 * place & 255 == table[code & 15]
            assert high >> 8 * place & 255 == table[code >> 4]
        if expected is not None:
            assert [low & 255, high & 255] == expected.view(torch.uint8)[byte].tolist()


@pytest.mark.parametrize("name", ["e2m1", "e3m0"])
def test_ptx_of_packing_8bit_codes(name):
    """Every pair of codes in every place: a wrong bit would change a level, one from a neighbour only some of them."""
    grid = grid_of(name)
    for first in range(0, 256, 4):
        pairs = [first, first + 1, first ^ 0xA7, first + 3]  # two codes each, the even one in the low half
        even, odd = (as_word(grid.table[pair >> shift & 15] for pair in pairs) for shift in (0, 4))
        for turn in range(0, 32, 8):
            words = {"$1": turned(even, turn), "$2": turned(odd, turn)}
            assert run_ptx(grid.pack_8bit, ["$0"], words) == [turned(as_word(pairs), turn)], pairs


def test_ptx_of_packed_bits():
    """Every bit alone: one in the wrong place would mask a neighbour."""
    for bit in range(8):
        words = {f"${i + 1}": int(i == bit) for i in range(8)}
        assert run_ptx(triton_codes._PACK_BITS.value, ["$0"], words)[0] & 255 == 1 << bit


def test_only_small_floats_are_packed_from_8bit_codes():
    """Where no function of bits is found there has to be no PTX either, not one that is wrong for some codes."""
    packed = {text.split()[0] for text in quantizers() if grid_of(text).pack_8bit}
    assert packed == {"e2m1", "e3m0"}


@pytest.mark.parametrize("name", ["midrise1", "midrise2", "midrise3", "midrise4", "midrise7"])
def test_ptx_of_sign_and_magnitude(name):
    """Every byte of ⌊y⌋ + bias, against ⌊y⌋ itself: index and sign of the half-integer above it."""
    grid = grid_of(f"{name} row absmax half_up")
    width = 8 // grid.codes_per_byte
    codes = torch.arange(256)[:, None] >> torch.arange(0, 8, width) & 2**width - 1
    floors = (codes - grid.bias).clamp(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1)  # beyond, y was saturated
    stored = torch.where(floors < 0, -floors - 1 + 2 ** (grid.bits - 1), floors)
    places = 2 ** torch.arange(0, 8, width)
    biased, packed = ((part * places).sum(1).tolist() for part in (floors + grid.bias, stored))
    for i in range(256):
        word, expected = (as_word((part[i], part[255 - i], part[0], part[i ^ 0x5A])) for part in (biased, packed))
        assert run_ptx(grid.sign_magnitude, ["$0"], {"$1": word}) == [expected], i


def as_word(four: Iterable[int]) -> int:
    return int.from_bytes(bytes(four), "little")


def turned(word: int, bits: int) -> int:
    """A word of 32 bits rotated to the left."""
    return (word << bits | word >> 32 - bits) & 2**32 - 1


def run_ptx(text: str, results: list[str], inputs: dict[str, Any]) -> list[int]:
    """``results`` of straight-line PTX on registers, from ``inputs``, as unsigned integers; 32 for a register that
    other lanes read.
    """
    registers = dict(inputs)
    for predicate, instruction, operands in re.findall(rf"(?:@(\w+) )?\b((?:{'|'.join(PTX)})[.\w]*) ([^;]*);", text):
        if predicate and not registers[predicate]:
            continue
        destination, *sources = re.findall(r"{[^}]*}|[^,\s]+", operands)
        function = PTX.get(instruction) or PTX[instruction.partition(".")[0]]
        registers[destination] = function(*(_operand(source, registers) for source in sources)) & 2**32 - 1
    return [registers[result] for result in results]


def _operand(text: str, registers: dict[str, Any]) -> Any:
    if text.startswith("{"):
        low, high = text.strip("{}").split(", ")
        return registers[low] | registers[high] << 16
    if text.startswith("0f"):
        return int(text[2:], 16)
    return registers[text] if text in registers else int(text, 0)


def _prmt(a: int, b: int, selectors: int) -> int:
    eight = (a | b << 32).to_bytes(8, "little")
    places = [selectors >> 4 * i & 15 for i in range(4)]
    assert max(places) < 8  # the others replicate signs
    return as_word(eight[place] for place in places)


def _lop3(a: int, b: int, c: int, table: int) -> int:
    return sum((table >> (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1) & 1) << i for i in range(32))


def _floor_sum(a: int, b: int) -> int:
    """Float32 sum, rounded down."""
    exact = sum(Fraction(float(number)) for number in np.array([a, b], np.uint32).view(np.float32))
    nearest = np.float32(float(exact))
    down = nearest if Fraction(float(nearest)) <= exact else np.nextafter(nearest, np.float32(-np.inf))
    return int(down.view(np.uint32))


def _fused(a: int, b: int, c: int, down: bool = False, saturate: bool = False) -> int:
    """Float32 a · b + c, rounded once: to the nearest, ties to even, or down."""
    factor, other, summand = (float(n) for n in np.array([a, b, c], np.int64).astype(np.uint32).view(np.float32))
    if all(map(math.isfinite, (factor, other, summand))):
        exact = Fraction(factor) * Fraction(other) + Fraction(summand)
        near = np.float32(float(exact))
        below = near if Fraction(float(near)) <= exact else np.nextafter(near, np.float32(-np.inf))
        above = np.nextafter(below, np.float32(np.inf))
        distances = exact - Fraction(float(below)), Fraction(float(above)) - exact
        even = below.view(np.uint32) % 2 == 0
        result = below if down or distances[0] < distances[1] or (distances[0] == distances[1] and even) else above
    else:
        result = np.float32(factor * other + summand)
    if saturate:
        result = np.float32(0.0 if np.isnan(result) else min(max(result, 0.0), 1.0))
    return int(result.view(np.uint32))


def _maximum(a: int, b: int) -> int:
    """Of float32 numbers; NaN if one is."""
    return int(np.maximum(*np.array([a, b], np.uint32).view(np.float32)).view(np.uint32))


def _pairs(word: int, dtype) -> np.ndarray:
    return np.array([word], np.uint32).view(dtype)


def _word(pair: np.ndarray) -> int:
    return int(pair.view(np.uint32)[0])


def _to_e4m3(pair: int) -> int:
    low, high = torch.from_numpy(_pairs(pair, np.float16).copy()).to(torch.float8_e4m3fn).view(torch.uint8).tolist()
    return low | high << 8


PTX: dict[str, Callable[..., int]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "sub": operator.sub,
    "shl": operator.lshift,
    "shr": operator.rshift,
    "shf": lambda a, b, shift: (b << 32 | a) << shift >> 32,  # .l.wrap, shifts below 32
    "mov": operator.pos,
    "prmt": _prmt,
    "lop3": _lop3,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "add.rm.f32": _floor_sum,
    "abs.f32": lambda a: a & 2**31 - 1,
    "max.NaN.f32": _maximum,
    "fma.rn.f32": _fused,
    "fma.rn.sat.f32": partial(_fused, saturate=True),
    "fma.rm.sat.f32": partial(_fused, down=True, saturate=True),
    "shfl.sync.idx.b32": lambda lanes, lane, *whole_warp: lanes[lane & 31],
    "add.rn.f32": lambda a, b: _fused(a, 0x3F800000, b),
    "setp.ne.u32": operator.ne,
    "add.rn.f16x2": lambda a, b: _word(_pairs(a, np.float16) + _pairs(b, np.float16)),
    "min.relu.s16x2": lambda a, b: _word(np.maximum(np.minimum(_pairs(a, np.int16), _pairs(b, np.int16)), 0)),
    "cvt.rn.satfinite.e4m3x2.f16x2": _to_e4m3,
}


# --- numerics in the interpreter ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("text", quantizers())
def test_interpreted_formats(text):
    """Threshold, tie, sign, saturation or padding arithmetic off by one bit in any grid; odd K; packed codes."""
    fmt = Quantizer.parse(text).format
    x = rows_of_everything(9, 37 if fmt.bits <= 5 else 291, fmt)
    assert_same(kernels.quantize_8bit(x, text, True), reference.quantize_8bit(x, text, True))


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_interpreted_rows(dtype):
    """Element types, tiny rows, strides, the fold, rows in parts, and rows that do not fit registers."""
    for shape in ((1, 1), (3, 2), (5, 130), (2, 1537), (2, 16401)):
        x, fold = torch.randn(shape).to(dtype), torch.rand(1, shape[1]) + 0.5
        for text in (E2M1, E4M3):
            assert_same(kernels.quantize_8bit(x, text, True, fold), reference.quantize_8bit(x, text, True, fold), shape)
        assert_same(kernels.quantize_8bit(x, E2M1, False), reference.quantize_8bit(x, E2M1, False), shape)
    x = torch.randn(37, 80).to(dtype)
    for view in (x[::3, 5:41], x.t()[:4], x[:1].expand(3, -1)):
        assert_same(kernels.quantize_8bit(view, E2M1, True), reference.quantize_8bit(view, E2M1, True))
    empty = x[:0]
    assert_same(kernels.quantize_8bit(empty, E2M1, True), reference.quantize_8bit(empty, E2M1, True))


@interpreted
@pytest.mark.parametrize("text", [E2M1, E4M3, "midrise4 row absmax_pow2 half_up", "int8", "e5m2"])
def test_interpreted_transposed(text):
    """Both edges of tiles, strides, and rows that are not finite, each with scales of its own."""
    for shape in ((1, 1), (19, 37), (131, 70)):
        x = rows_of_everything(max(9, shape[0]), max(7, shape[1]), Quantizer.parse(text).format)[: shape[0], : shape[1]]
        for view in (x, x.t()):
            actual = kernels.quantize_8bit_transposed(view, text)
            assert_same(actual, reference.quantize_8bit_transposed(view, text), shape)


@interpreted
@pytest.mark.parametrize("text", [E4M3, "e5m2", "e2m1 row absmax_pow2 half_up"])
def test_interpreted_pair(text):
    """Rows and columns of one matrix: running maxima, both folds, columns that are not finite, more rows than
    programs.
    """
    for rows, columns in ((1, 1), (19, 37), (70, 19)):
        x = torch.randn(rows, columns)
        if rows > 1:
            x = torch.cat([rows_of_everything(9, columns, Quantizer.parse(text).format), x[9:]])
        if rows == 70:
            x[:9] = 1e-3 * torch.randn(9, 19)
            x[40, 3], x[41, 4], x[:, 5] = NAN, INFINITY, 0.0
        for fold, fold_rows in ((None, None), (torch.rand(columns), torch.rand(rows, 1))):
            actual = kernels.quantize_8bit_pair(x, text, fold, fold_rows)
            assert_same(actual, reference.quantize_8bit_pair(x, text, fold, fold_rows), (rows, columns))


@interpreted
def test_interpreted_columns():
    """Columns alone, of a transposed view; and the pair for rows that are too long for registers."""
    x, fold_rows = torch.randn(45, 150), torch.rand(45, 1)
    x[7, 8] = NAN
    actual = kernels.quantize_columns(x.t().contiguous().t(), E4M3, fold_rows)
    assert_same(actual, reference.quantize(x, E4M3, 0, fold=fold_rows))
    x, fold, fold_rows = torch.randn(2, 16401), torch.rand(16401), torch.rand(2)
    actual_pair = kernels.quantize_8bit_pair(x, E4M3, fold, fold_rows)
    assert_same(actual_pair, reference.quantize_8bit_pair(x, E4M3, fold, fold_rows))


@interpreted
@pytest.mark.parametrize("name", [*dict.fromkeys(text.split()[0] for text in quantizers())])
def test_interpreted_recode(name):
    """Every code of every format, in odd rows and whole ones, side by side and apart, as stored and transposed."""
    fmt = FORMATS[name]
    for size in (37, 64):
        x = torch.randn(9, size)
        x[0, :] = torch.linspace(-fmt.max, fmt.max, size)
        codes, _ = reference.quantize(x, name, -1)
        apart = torch.full((9, codes.shape[1] + 3), 255, dtype=torch.uint8)[:, : codes.shape[1]].copy_(codes)
        for stored in (codes, apart):
            for transposed in (False, True):
                actual = kernels.recode(stored, name, size, transposed)
                assert_same([actual], [reference.recode(codes, name, size, transposed)], (size, transposed))
    scaled_otherwise = kernels.recode(codes, f"{name} block32 e8m0", size, False)
    assert_same([scaled_otherwise], [reference.recode(codes, name, size, False)])


def rows_with_outliers(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose order statistics are hard to find: ties, one sign, a shift, extremes, NaN in any number."""
    x = torch.randn(12, size)
    x[1] = 0.0
    x[2] = x[2].relu()
    x[3] *= 100.0
    x[4] = 3.0
    x[5] = torch.randint(-2, 3, (size,)).float()
    x[6] += 10.0
    x[7, size // 2], x[7, 0] = INFINITY, -INFINITY
    x[8] = 2.0 ** -torch.arange(size).clamp(max=100).float()
    x[9, size // 2] = NAN
    x[10, : size // 2] = NAN
    x[11] = NAN
    return x.to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_interpreted_compensated(dtype):
    """Order statistics with ties and NaN, what is raised above the grid, and rows without a finite code."""
    for size, grid, alpha in (
        (1, "e2m1", 0.9),
        (37, "midrise4 row absmax half_up", 0.6),
        (37, "e3m0", 0.9),
        (600, "e2m1", 0.99),
    ):
        operand = f"{grid}; ste; occ(alpha={alpha},residual=e4m3)"
        x = rows_with_outliers(size, dtype)
        assert_same(compensated(kernels, x, operand, -1), compensated(reference, x, operand, -1), size)
    x = torch.randn(2, 33, 2).to(dtype)
    assert_same(compensated(kernels, x, operand, 1), compensated(reference, x, operand, 1))


def on_pairs(instruction: str, constraints: str, words: list, dtype, is_pure: bool, pack: int):
    """What PTX does with two 16-bit floats in a register, for the interpreter."""
    name, pair = instruction.split()[0].rsplit(".", 1)
    element = {"bf16x2": BF16, "f16x2": FP16}[pair]
    arrays = np.broadcast_arrays(*(word.handle.data for word in words))
    a, b = (torch.from_numpy(np.ascontiguousarray(array)).view(element) for array in arrays)
    if name in ("set.ge.u32", "set.le.u32"):
        result = -(a >= b if "ge" in name else a <= b).to(torch.int16)
    else:
        chosen = {"max.NaN": torch.maximum, "min": torch.fmin}[name](a, b)
        result = torch.where(chosen.isnan(), 0x7FFF, chosen.view(torch.int16))  # the canonical NaN
    words = result.view(torch.int32).numpy().reshape(arrays[0].shape)
    return tl.core.tensor(TensorHandle(words, tl.int32), tl.block_type(tl.int32, list(words.shape)))


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_interpreted_pairs(dtype, monkeypatch):
    """The search as a Hopper GPU makes it, two elements an instruction: every element counts once, wherever it is."""
    monkeypatch.setattr(tl, "inline_asm_elementwise", on_pairs)
    monkeypatch.setattr(row_search, "pair_type", lambda dtype, device: {BF16: "bf16x2", FP16: "f16x2"}[dtype])
    for size, alpha in ((1, 0.9), (37, 0.6), (600, 0.99), (4000, 0.999)):
        operand = f"e2m1; ste; occ(alpha={alpha},residual=e4m3)"
        x = rows_with_outliers(size, dtype)
        assert_same(compensated(kernels, x, operand, -1), compensated(reference, x, operand, -1), size)
    assert_clamps(rows_with_outliers(300, dtype)[:10], "occ(alpha=0.9)", -1)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_interpreted_clamp(dtype):
    """The clamped tensor bit for bit, and the residual wherever its entries stand; one position per value."""
    for size, alpha in ((1, 0.9), (5, 0.6), (37, 0.6), (300, 0.9)):
        assert_clamps(rows_with_outliers(size, dtype)[:10], f"occ(alpha={alpha})", -1)
    assert_clamps(torch.randn(2, 33, 2).to(dtype), "occ(alpha=0.9)", 1)


def assert_clamps(x: torch.Tensor, clamp: str, axis: int) -> None:
    clamped, values, positions = outliers.clamp_outliers(x, clamp, axis)
    expected, expected_values, expected_positions = outliers_reference.clamp_outliers(x, clamp, axis)
    assert clamped.stride() == expected.stride()
    assert (values.dtype, values.shape) == (expected_values.dtype, expected_values.shape)
    assert (positions.dtype, positions.shape) == (expected_positions.dtype, expected_positions.shape)
    torch.testing.assert_close(clamped, expected, rtol=0, atol=0, equal_nan=True)
    rows = x.movedim(axis, -1)
    torch.testing.assert_close(
        dense(values, positions, rows), dense(expected_values, expected_positions, rows), rtol=0, atol=0, equal_nan=True
    )
    for row, at in zip(values.flatten(0, -2), positions.flatten(0, -2), strict=True):
        assert len(at[row != 0].unique()) == (row != 0).sum()


def dense(values: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return values.new_zeros(rows.shape).scatter_add_(-1, positions.long(), values)


# --- machine code ---------------------------------------------------------------------------------------------------


def launches_of(call: Callable[[], object]) -> list:
    """The kernels that ``call`` would launch on a Hopper card, compiled; its tensors are on the meta device."""
    found = []

    def compile_instead(kernel, programs, *arguments, num_warps: int, maxnreg: int | None = None, **constants):
        found.append(compile_for_hopper(kernel, arguments, constants, num_warps, maxnreg))

    with (
        launching(compile_instead),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        call()
    return found


def compile_for_hopper(kernel, arguments, constants: dict, num_warps: int, maxnreg: int | None = None):
    """As a launch would specialize: None and 1 are constants, pointers and multiples of 16 are known to be such."""
    names = {torch.float32: "*fp32", BF16: "*bf16", FP16: "*fp16", torch.uint8: "*u8", torch.int16: "*i16"}
    names |= {torch.float8_e4m3fn: "*fp8e4nv", torch.float8_e5m2: "*fp8e5", torch.int8: "*i8"}
    names |= {torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, aligned = {}, dict(constants), []
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
        plain = parameter.do_not_specialize
        if isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name] = f"tensordesc<{names[value.base.dtype].strip('*')}[{block}]>"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = names[value.dtype]
        elif value is None or (value == 1 and not plain):
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0 and not plain):
            aligned.append((i,))
    signature = {p.name: signature.get(p.name, "constexpr") for p in kernel.params}
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    options = {"num_warps": num_warps, "maxnreg": maxnreg, "enable_fp_fusion": False}
    return triton.compile(source, target=SM90, options=options)


@compiled
def test_cached_kernels_depend_on_what_follows_from_a_format(monkeypatch):
    """PTX that is made here is in no kernel's source, and its text may change where no field of a format does: then
    kernels in a cache on disk are old.
    """

    def key(kernel, name: str, constants) -> str:
        return ASTSource(kernel, {name: "constexpr"}, {name: constants}).hash()

    def keys() -> list[str]:
        operand = Operand.parse("midrise4 row rms half_up; trust")
        passes = passing(str(operand.estimator), operand.stored.format)
        return [key(triton_recode._recode, "fmt", grid_of(E2M1)), key(transform_kernels._write_part, "passes", passes)]

    before = keys()
    assert before == keys()
    monkeypatch.setattr(grids, "_SOURCE", "another")
    assert not set(before) & set(keys())


def disassembled(kernel, folder: Path) -> str:
    """A compiled kernel, an instruction a line, with its address in front."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout


def machine_code(kernel, folder: Path) -> list[str]:
    """The instructions of a compiled kernel, without operands."""
    code = disassembled(kernel, folder)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?\s*(\w+)", code, re.MULTILINE)
    assert "EXIT" in instructions
    return instructions


def spills(kernel, folder: Path) -> int:
    """Instructions that store registers to local memory."""
    return machine_code(kernel, folder).count("STL")


def on_meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def all_calls(rows: int, size: int, dtype: torch.dtype = BF16) -> dict[str, Callable[[], object]]:
    x = on_meta(rows, size, dtype=dtype)
    fold, fold_rows = on_meta(size, dtype=FP32), on_meta(rows, dtype=FP32)
    packed = on_meta(rows, (size + 1) // 2, dtype=torch.uint8)
    occ = "occ(alpha=0.99,residual=e4m3)"
    return {
        "rows e2m1": lambda: kernels.quantize_8bit(x, E2M1, True),
        "rows midrise4": lambda: kernels.quantize_8bit(x, "midrise4 row absmax half_up", True),
        "rows e4m3": lambda: kernels.quantize_8bit(x, E4M3, False, fold),
        "transposed e2m1": lambda: kernels.quantize_8bit_transposed(x, E2M1),
        "pair e4m3": lambda: kernels.quantize_8bit_pair(x, E4M3, fold, fold_rows),
        "columns e4m3": lambda: kernels.quantize_columns(x, E4M3, fold_rows),
        "recode e2m1": lambda: kernels.recode(packed, E2M1, size, False),
        "recode e2m1 transposed": lambda: kernels.recode(packed, E2M1, size, True),
        "compensated": lambda: kernels.quantize_compensated(x, f"{E2M1}; ste; {occ}", -1),
        "produced": lambda: kernels.quantize_produced(x, x, None, None, PRODUCER, f"{E2M1}; ste; {occ}"),
        "produced of halves": lambda: kernels.quantize_produced(
            *on_meta(rows, 2 * size, dtype=dtype).chunk(2, -1), None, None, PRODUCER, f"{E2M1}; ste; {occ}"
        ),
        "clamp": lambda: outliers.clamp_outliers(x, "occ(alpha=0.99)", -1),
    }


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("size", [2048, 4096, 14336])
@pytest.mark.parametrize("name", all_calls(1, 1))
def test_nothing_spills(name, size, tmp_path):
    """A row that does not fit the registers goes to memory instead, and the kernel to a fraction of its speed."""
    for kernel in launches_of(all_calls(16384, size)[name]):
        assert not spills(kernel, tmp_path), kernel.name


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize(("rows", "size", "dtype"), [(1, 1, FP32), (19, 37, FP16), (3, 16401, BF16)])
def test_odd_shapes_compile(rows, size, dtype):
    """Sizes of 1 are constants to the compiler, odd ones leave nothing aligned, long rows take other kernels."""
    for name, call in all_calls(rows, size, dtype).items():
        if size <= 16384 or name not in ("compensated", "produced", "produced of halves", "clamp"):
            assert launches_of(call), name


@compiled
@pytest.mark.nightly
def test_producers_in_ptx():
    """Approximations are those of Inductor's kernels; inputs go through L2 first, whole words at a time."""
    (kernel,) = launches_of(all_calls(64, 1024)["produced"])
    ptx = kernel.asm["ptx"]
    assert "ex2.approx.ftz.f32" in ptx
    assert "div.full.f32" in ptx
    assert "st.global.v4.b32" in ptx
    assert "L2::evict_first" in ptx


@compiled
def test_arithmetic_in_ptx():
    """Approximate divisions change scales in the last place, contraction changes codes, flushing loses small rows."""
    (kernel,) = launches_of(all_calls(64, 512)["rows e2m1"])
    ptx = kernel.asm["ptx"]
    assert "div.rn.f32" in ptx
    assert "div.full" not in ptx
    assert ".ftz" not in ptx
    # Two fused multiply-adds round an element, of a row that is saturated or of one that is not; products are exact.
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == 2 * 2 * 512 // 32
    assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
    assert "ld.global.v4.b32" in ptx or "ld.global.v8.b32" in ptx
