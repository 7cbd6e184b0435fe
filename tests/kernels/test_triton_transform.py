"""The Triton kernels of rotated, masked and sparse operands without a GPU: numerics in Triton's interpreter, and the
machine code for Hopper.

Codes, scales, packed codes and masks are compared with the references bit for bit. Fresh memory holds junk
(conftest.py), so an element that a kernel leaves out shows. What the interpreter cannot run is inline PTX: one rounding
mode, approximations, and packings whose text is interpreted here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from qcompile.ir.estimators import EstimatorSpec  # noqa: E402
from qcompile.ir.formats import FORMATS, get_format  # noqa: E402
from qcompile.ir.operand import Operand  # noqa: E402
from qcompile.ir.quantizer import Quantizer  # noqa: E402
from qcompile.kernels.estimate import reference as estimate_reference  # noqa: E402
from qcompile.kernels.estimate.reference import mask_of  # noqa: E402
from qcompile.kernels.formula import estimators as estimator_formulas  # noqa: E402
from qcompile.kernels.formula.torch_target import evaluate  # noqa: E402
from qcompile.kernels.quantize import reference as quantize_reference  # noqa: E402
from qcompile.kernels.quantize import triton as quantize_kernels  # noqa: E402
from qcompile.kernels.quantize import triton_transformed as kernels  # noqa: E402
from qcompile.kernels.quantize.grid import grid_of, passing  # noqa: E402
from qcompile.kernels.transform import reference  # noqa: E402
from qcompile.kernels.transform import triton as rotations  # noqa: E402
from qcompile.kernels.triton import row_block  # noqa: E402
from qcompile.recipes.quest import WIDTHS  # noqa: E402

from .harness import compiled, interpreted, launching, run_interpreted  # noqa: E402
from .test_triton_quantize import (  # noqa: E402
    assert_same,
    compile_for_hopper,
    run_ptx,
    spills,
)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INFINITY = float("nan"), float("inf")
QUEST = {bits: str(operand) for bits, operand in WIDTHS.items() if operand is not None}
MIDRISE4, SPARSE = QUEST[4], "midrise4p row rms half_up; trust; hadamard(128); sparse(4:8)"
#: Of roots and quotients in float64, which are then refined.
APPROXIMATIONS = {"rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64"}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


def rows_to_rotate(rows: int, columns: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Normal rows of different size; as far as there are rows, one of zeros, ties (rows whose rotation is one level),
    NaN, infinity, rows whose squares or sums leave float32, and tiny ones.
    """
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    special: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
        torch.zeros_like,
        lambda row: row.sign(),
        lambda row: row.where(torch.arange(columns) != columns // 2, NAN),
        lambda row: row.where(torch.arange(columns) != columns // 3, -INFINITY),
        lambda row: row.sign() * 3e38 if dtype != FP16 else row.sign() * 6e4,
        lambda row: row * 1e-30,
        lambda row: row.where(torch.arange(columns) % 5 != 0, -0.0),
    )
    for i in range(1, min(rows, len(special) + 1)):
        x[i] = special[i - 1](x[i])
    return x.to(dtype)


# --- the data of estimators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
def test_limits_decide_as_estimators_do(name):
    """A limit one float off would mask or trust an element on the edge."""
    fmt = get_format(name)
    for text in ("clip", "clip(s=1.3)", "clip(s=1.25)", "trust", "trust(t=0.6541)", "trust(t=3.3)", "trust(t=0.1)"):
        rule, estimator = passing(text, fmt), EstimatorSpec.parse(text)
        assert rule is not None
        edges = {0.0, *map(abs, fmt.levels), *fmt.thresholds, rule.limit, rule.limit_at_zero}
        edges |= {m + s * rule.limit_at_zero for m in fmt.sorted_levels for s in (-1, 1)}
        around = np.array(sorted(edges), dtype=np.float32)
        values = [
            around,
            np.nextafter(around, np.float32(9e9)),
            np.nextafter(around, np.float32(-9e9)),
            [NAN, INFINITY],
        ]
        y = torch.from_numpy(np.concatenate(values).astype(np.float32))
        y = torch.cat([y, -y])
        level = quantize_reference.decode(quantize_reference.encode(y, Quantizer(fmt)), fmt)
        if rule.limit:
            assert torch.equal(y.abs() <= rule.limit, estimator.mask(y, level, fmt)), text
        assert torch.equal(
            evaluate(estimator_formulas.mask(estimator, fmt), y, level), mask_of(estimator, y, level, fmt)
        )
        dropped = torch.zeros_like(y)
        if rule.limit_at_zero:
            assert torch.equal(y.abs() <= rule.limit_at_zero, estimator.mask(y, dropped, fmt)), text
        assert bool(rule.limit_at_zero) == (fmt.centred or estimator.name == "trust"), text
    assert passing("ste", fmt) is None


def test_what_is_supported():
    """A kernel that is asked for what it cannot do has no other way to refuse."""
    bf16 = (BF16,)
    for text in (*QUEST.values(), SPARSE, "e2m1 row absmax even; trust; sparse(2:4)", "midrise4; clip"):
        spec = Operand.parse(text)
        quantizer, transform = str(spec.stored), str(spec.transform)
        assert kernels.supports_quantize_8bit_masked(bf16, text) == (True, "")
        assert kernels.supports_quantize(bf16, quantizer, transform) == (True, "")
        assert kernels.supports_quantize_8bit_transposed(bf16, quantizer, transform) == (True, "")
        assert kernels.supports_estimator_mask(bf16, quantizer, "trust", transform) == (True, "")
    for refused, reason in (
        (kernels.supports_quantize_8bit_masked((torch.float64,), MIDRISE4), "float64"),
        (kernels.supports_quantize_8bit_masked(bf16, "midrise4; ste; occ(alpha=0.99)"), "outliers"),
        (kernels.supports_quantize(bf16, "midrise4 block32", ""), "by rows"),
        (kernels.supports_quantize(bf16, "midrise4 row rms half_up", "sparse(2:4)"), "no code"),
        (rotations.supports_hadamard((torch.float64,)), "float64"),
        (kernels.supports_quantize(bf16, "nf4", "sparse(2:4)"), "nf4 has another code than 0 for the elements"),
        (quantize_kernels.supports_quantize_8bit(bf16, "midrise4 row rms half_up"), "root mean squares"),
    ):
        assert not refused[0]
        assert reason in refused[1]
    assert kernels.supports_quantize(bf16, "midrise8 row rms half_up", "hadamard(128)") == (True, "")


@pytest.mark.parametrize("bits", range(1, 9))
def test_ptx_of_signs_and_magnitudes(bits):
    """Every code in every place of a byte: a wrong mask would negate levels, or leave bits that no code has."""
    grid, fmt = grid_of(f"midrise{bits} row rms half_up", eight_bit=False), get_format(f"midrise{bits}")
    width = 8 // grid.codes_per_byte
    for start in range(0, 2**bits, 4):
        floors = [(start + i) % 2**bits - 2 ** (bits - 1) for i in range(4)]
        y = torch.tensor([[f + 0.5] * grid.codes_per_byte for f in floors])
        expected = quantize_reference.pack(quantize_reference.encode(y, Quantizer(fmt, rounding="half_up")), bits)
        fields = [sum(f + grid.bias << width * i for i in range(grid.codes_per_byte)) for f in floors]
        word = int.from_bytes(bytes(fields), "little")
        assert (
            list(run_ptx(grid.sign_magnitude, ["$0"], {"$1": word})[0].to_bytes(4, "little"))
            == expected.flatten().tolist()
        )


@pytest.mark.parametrize("bits", [3, 4])
def test_ptx_of_eight_elements(bits):
    """Every level, both its neighbours' edges and far beyond, in every place: floors, clamps, levels, packing."""
    grid, q = grid_of(f"midrise{bits} row rms half_up"), Quantizer(get_format(f"midrise{bits}"), rounding="half_up")
    edges = torch.arange(-(2.0 ** (bits - 1)) - 1, 2.0 ** (bits - 1) + 2)
    below, above = edges.nextafter(torch.tensor(-INFINITY)), edges.nextafter(torch.tensor(INFINITY))
    y = torch.cat([edges, below, above, edges + 0.5, torch.tensor([-0.0, 1e-40, -1e-40, 3e4, -3e4])])
    y = torch.cat([y, y.new_zeros(-len(y) % 8)])
    for eight in torch.cat([y.view(-1, 8), y.view(8, -1).t()]):
        words = {f"${3 + i}": int(word) for i, word in enumerate(eight.numpy().view(np.uint32))}
        first, second, packed = run_ptx(grid.encode_eight, ["$0", "$1", "$2"], words)
        codes = quantize_reference.encode(eight[None], q)
        levels = torch.tensor(q.format.levels)[codes.long()].to(torch.float8_e4m3fn).view(torch.uint8)
        assert [*first.to_bytes(4, "little"), *second.to_bytes(4, "little")] == levels.flatten().tolist()
        assert [*packed.to_bytes(4, "little")] == quantize_reference.pack(codes, bits).flatten().tolist()


def test_ptx_of_packed_signs():
    """Every sign alone: bits in the wrong order would mask neighbours."""
    text = kernels._SHIFT_IN.value
    for bit in range(8):
        words = {f"${i + 1}": 0x80000001 if i == 7 - bit else 0x7FFFFFFF for i in range(8)}
        assert run_ptx(text, ["$0"], words)[0] & 255 == 1 << bit


# --- numerics in the interpreter ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


def assert_quantizes(x: torch.Tensor, operand: str, packed: bool = True) -> None:
    actual = kernels.quantize_8bit_masked(x, operand, packed)
    assert_same(actual, quantize_reference.quantize_8bit_masked(x, operand, packed), (operand, tuple(x.shape)))


@interpreted
@pytest.mark.parametrize("bits", QUEST)
def test_interpreted_widths(bits):
    """Every operand of the recipe on every kind of row: rounding, clipping, packing, masks, non-finite rows."""
    assert_quantizes(rows_to_rotate(8, 256), QUEST[bits])
    unrotated = QUEST[bits].replace("; hadamard(128)", "")
    assert_quantizes(rows_to_rotate(3, 37), unrotated)


@interpreted
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
def test_interpreted_rotations(block):
    """A butterfly too few, too many or between the wrong elements; blocks beyond a thread; sizes that are no power of
    two, or no multiple of a run.
    """
    for size in (block, 3 * block, 37 * block if block <= 8 else 5 * block):
        assert_quantizes(torch.randn(2, size), f"midrise4 row rms half_up; trust; hadamard({block})")
    x = torch.randn(3, 3 * block)
    assert_same([rotations.hadamard(x, block, -1)], [reference.hadamard(x, block, -1)], block)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_interpreted_elements_and_strides(dtype):
    """Element types, views, odd rows, and rows that do not fit registers, with and without packed codes."""
    x = rows_to_rotate(8, 128, dtype)
    assert_quantizes(x, MIDRISE4, packed=False)
    for view in (x[::3, 64:], x.t()[:2], x[:1].expand(2, -1)):
        assert_quantizes(view, "midrise4 row rms half_up; trust; hadamard(8)")
    assert_quantizes(torch.randn(1, 16512).to(dtype), MIDRISE4)
    assert_quantizes(x[:0], MIDRISE4)


@interpreted
@pytest.mark.parametrize("text", [MIDRISE4, QUEST[1], "midrise4 row absmax half_up; trust; hadamard(128)"])
def test_interpreted_rows_by_descriptor(text, monkeypatch):
    """Persistent programs take a row after the other, the last of which not all of them get; views with gaps."""
    monkeypatch.setattr(kernels, "RESIDENT_WARPS", 1)
    for x in (rows_to_rotate(9, 2048, BF16), torch.randn(3, 2064).to(BF16)[:, 16:]):
        with mock.patch.object(kernels, "_quantize_row", None):  # which this is not to be
            assert_quantizes(x, text)


@interpreted
@pytest.mark.parametrize(
    "text",
    [
        "e2m1 row rms even; trust(t=0.6541); hadamard(32)",
        "midrise4 row rms half_up; trust(t=0.25); hadamard(32)",
        "midrise2 row rms half_up; clip(s=1.25)",
        "midrise4 row absmax even; trust; hadamard(64)",
        "e3m0 row absmax_pow2 half_up; clip; hadamard(64)",
        "e4m3 row rms even; trust; hadamard(16)",
        "midrise4 row rms half_up; ste; hadamard(16)",
    ],
)
def test_interpreted_other_rules(text):
    """Thresholds within the grid, maxima of rotated rows, formats that are 8-bit types, no mask."""
    assert_quantizes(rows_to_rotate(6, 192), text)


@interpreted
@pytest.mark.parametrize(
    "text", ["nf4 row absmax even; trust; hadamard(64)", "fp4bnb row rms half_up; clip(s=0.9); hadamard(16)"]
)
def test_interpreted_code_books(text):
    """Stored codes and masks; no 8-bit type has the levels."""
    x = rows_to_rotate(6, 192)
    actual = kernels.quantize_8bit_masked(x, text, True, False)
    assert_same(actual, quantize_reference.quantize_8bit_masked(x, text, True, False), text)


@interpreted
def test_interpreted_long_rows_by_absolute_maximum():
    assert_quantizes(torch.randn(1, 16512), "e2m1 row absmax even; clip; hadamard(128)")


@interpreted
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_interpreted_sparsity(pattern):
    """Which units stay, ties and NaN included; a last group that is short; codes with a 0 of their own."""
    for fmt in (
        "midrise4p row rms half_up",
        "midrise3p row rms half_up",
        "midrise1p row rms half_up",
        "e2m1 row rms even",
        "midrise7p row rms half_up",
    ):
        x = rows_to_rotate(5, 64)
        x[0] = torch.randint(-1, 2, (64,)).float()
        assert_quantizes(x, f"{fmt}; trust; hadamard(2); sparse({pattern})")
    assert_quantizes(torch.randn(3, 37), f"midrise4p row rms half_up; clip; sparse({pattern})")


@interpreted
def test_interpreted_ops():
    """Stored codes of 8 bits on half-integers, other axes, factors to fold, transposed codes, masks alone."""
    x = torch.randn(4, 3, 64)
    for text in ("midrise8 row rms half_up", "midrise4p row rms half_up", "e2m1 row absmax even"):
        transform = "hadamard(64); sparse(4:8)" if "p " in text else "hadamard(64)"
        expected = quantize_reference.quantize(x, text, -1, transform=transform)
        assert_same(kernels.quantize(x, text, -1, None, None, None, transform), expected, text)
    fold = torch.rand(4) + 0.5
    expected = quantize_reference.quantize(x, "midrise4 row rms half_up", 0, fold=fold, transform="hadamard(4)")
    assert_same(kernels.quantize(x, "midrise4 row rms half_up", 0, None, None, fold, "hadamard(4)"), expected)
    for text, transform in (("midrise4 row rms half_up", "hadamard(16)"), ("midrise3p row rms half_up", "sparse(2:4)")):
        expected = quantize_reference.quantize_8bit_transposed(x[0], text, transform)
        assert_same(kernels.quantize_8bit_transposed(x[0], text, transform), expected, text)
    for axis in (-1, 0):
        arguments = x, torch.ones(1), "midrise4 row rms half_up", "trust", axis, None, "hadamard(4)"
        assert_same([kernels.estimator_mask(*arguments)], [estimate_reference.estimator_mask(*arguments)], axis)
    with pytest.raises(ValueError, match="no multiple of the block size 128"):
        kernels.quantize(x, "midrise4 row rms half_up", -1, None, None, None, "hadamard(128)")


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_interpreted_hadamard(dtype):
    """Masked and not, along both axes, rows of no whole byte, and what the mask hides not being finite."""
    for shape, block, axis in (((3, 256), 128, -1), ((32, 5), 16, 0), ((2, 3, 20), 4, -1), ((1, 4224), 128, -1)):
        x = torch.randn(shape).to(dtype)
        moved = x.movedim(axis, -1)
        mask = torch.randint(256, (*moved.shape[:-1], -(-moved.shape[-1] // 8)), dtype=torch.uint8)
        moved[..., 0] = NAN
        mask[..., 0] &= 254
        for given in (None, mask):
            actual, expected = rotations.hadamard(x, block, axis, given), reference.hadamard(x, block, axis, given)
            assert actual.stride() == expected.stride()
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="mask"):
        rotations.hadamard(torch.randn(2, 16), 16, -1, torch.zeros(2, 3, dtype=torch.uint8))


@interpreted
@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.pruned and fmt.tensor_core_type])
def test_interpreted_recode_of_pruned_formats(name):
    """The index of 0 read as a level, or levels one index off."""
    codes, _ = quantize_reference.quantize(torch.randn(5, 64), f"{name} row rms half_up", -1, transform="sparse(4:8)")
    for transposed in (False, True):
        actual = quantize_kernels.recode(codes, name, 64, transposed)
        assert_same([actual], [quantize_reference.recode(codes, name, 64, transposed)], transposed)


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


def all_calls(rows: int, size: int, dtype: torch.dtype = BF16, block: int = 128) -> dict[str, Callable[[], object]]:
    x = torch.empty(rows, size, dtype=dtype, device="meta")
    mask = torch.empty(rows, -(-size // 8), dtype=torch.uint8, device="meta")
    transform = f"hadamard({block})"
    return {
        **{
            f"masked {bits}": lambda text=text: kernels.quantize_8bit_masked(
                x, text.replace("(128)", f"({block})"), True
            )
            for bits, text in QUEST.items()
            if bits in (1, 4, 7, 8, "fp4")
        },
        "sparse": lambda: kernels.quantize_8bit_masked(
            x, f"midrise4p row rms half_up; trust; {transform}; sparse(4:8)", False
        ),
        "stored": lambda: kernels.quantize(x, "midrise4 row rms half_up", -1, None, None, None, transform),
        "mask": lambda: kernels.estimator_mask(x, x, "midrise4 row rms half_up", "trust", -1, None, transform),
        "hadamard": lambda: rotations.hadamard(x, block, -1),
        "masked hadamard": lambda: rotations.hadamard(x, block, -1, mask),
    }


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("size", [2048, 4096, 14336])
@pytest.mark.parametrize("name", all_calls(1, 128))
def test_nothing_spills(name, size, tmp_path):
    """A row that does not fit the registers goes to memory instead, and the kernel to a fraction of its speed."""
    for kernel in launches_of(all_calls(16384, size)[name]):
        assert not spills(kernel, tmp_path), kernel.name


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("rows", "size", "dtype", "block"),
    [(1, 1, FP32, 1), (19, 36, FP16, 4), (3, 16512, BF16, 128), (2, 2048, BF16, 1024)],
)
def test_odd_shapes_compile(rows, size, dtype, block):
    """Sizes of 1 are constants to the compiler, odd ones leave nothing aligned, long rows take other kernels."""
    for name, call in all_calls(rows, size, dtype, block).items():
        assert launches_of(call), name


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("bits", [1, 2, 4, 7, 8])
def test_small_rows_compile(bits):
    """Four bytes are packed at once, which threads of small programs do not have."""
    for size in (1, 37, 128, 512, 1024):
        x = torch.empty(3, size, dtype=BF16, device="meta")
        block = 128 if size % 128 == 0 else 1
        assert launches_of(
            lambda x=x, b=block: kernels.quantize_8bit_masked(x, QUEST[bits].replace("128", str(b)), True)
        )
        assert launches_of(lambda x=x: quantize_kernels.quantize_8bit(x, f"midrise{bits} row absmax half_up", True))


@compiled
@pytest.mark.parametrize("size", [1024, 2048, 4096, 14336])
def test_butterflies_are_additions_between_registers_and_one_exchange(size):
    """Fewer additions would be another tree, and more, or more exchanges than distances beyond a thread, half the
    speed.
    """
    (kernel,) = launches_of(all_calls(64, size)["stored"])
    (plain,) = launches_of(all_calls(64, size, block=1)["stored"])
    part = rotations.part_of(size, 128, row_block(size))
    per_thread = part.block // 32 // part.num_warps
    lanes = math.log2(128 / part.span)

    def count(pattern: str) -> float:
        """Of an element, more than without rotation."""
        per_thread_of_plain = part.block // 32 // plain.metadata.num_warps
        found, beside = (len(re.findall(pattern, k.asm["ptx"])) for k in (kernel, plain))
        return found / per_thread - beside / per_thread_of_plain

    assert count(r"\b(?:add|sub)\.(?:rn\.)?f32") == pytest.approx(7 - lanes, abs=0.1)
    assert count(r"\bmul\.(?:rn\.)?f32") == pytest.approx(1, abs=0.1)
    assert count(r"\bfma\.rn\.f32") == lanes
    assert count(r"shfl\.sync\.bfly\.b32 other") == lanes
    assert set(re.findall(r"\S*\.ftz\S*", kernel.asm["ptx"])) == APPROXIMATIONS


@compiled
@pytest.mark.parametrize("size", [512, 2048, 4096, 14336])
def test_neighbouring_columns_are_in_neighbouring_lanes(size):
    """Triton chooses the layout that the exchange relies on: with another one, sums of the wrong elements."""
    calls = all_calls(64, size)
    for name in ("masked 4", "sparse", "hadamard", "masked hadamard"):
        (kernel,) = launches_of(calls[name])
        text = kernel.asm["ttgir"]
        exchanged = re.findall(r"shfl\.sync.*-> tensor<\w+, (#\w+)>", text)
        assert exchanged
        for layout in set(exchanged):
            (definition,) = re.findall(rf"^{layout} = (.*)$", text, re.MULTILINE)
            linear = "lane = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 16]]" in definition
            assert linear or re.search(r"sizePerThread = \[\d+, 1\], threadsPerWarp = \[1, 32\]", definition), (
                definition
            )


@compiled
def test_arithmetic_of_scales_in_ptx():
    """Float64 to the end, from approximations that are refined, and exact quotients; floors by the rounding mode;
    nothing else contracted or flushed.
    """
    (kernel,) = launches_of(all_calls(64, 4096)["masked 4"])
    ptx = kernel.asm["ptx"]
    assert set(re.findall(r"\w+\.approx\S*|\S*\.ftz\S*", ptx)) == APPROXIMATIONS
    assert "div." not in ptx
    assert "add.rm.f32" in ptx
    assert len(re.findall(r"fma\.rn\.f32", ptx)) == len(re.findall(r"shfl\.sync\.bfly\.b32 other", ptx))


@compiled
def test_rows_without_descriptors_are_read_in_long_vectors():
    (kernel,) = launches_of(all_calls(64, 4096)["sparse"])
    assert "ld.global.v4.b32" in kernel.asm["ptx"] or "ld.global.v8.b32" in kernel.asm["ptx"]
    assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]


@compiled
def test_eight_elements_are_encoded_at_once():
    """In pairs of 16 bits, saturated behind a branch only; rows come by descriptor unless they are not aligned."""
    (kernel,) = launches_of(all_calls(64, 4096)["masked 4"])
    ptx = kernel.asm["ptx"]
    assert "min.relu.s16x2" in ptx
    assert "cvt.rn.satfinite.e4m3x2.f16x2" in ptx
    assert "bar.warp.sync" in ptx
    assert "cp.async.bulk.tensor.3d.shared" in ptx
    gaps = torch.empty(64, 4100, dtype=BF16, device="meta")[:, :4096]
    (kernel,) = launches_of(lambda: kernels.quantize_8bit_masked(gaps, MIDRISE4, True))
    assert "min.relu.s16x2" in kernel.asm["ptx"]
    assert "cp.async.bulk.tensor" not in kernel.asm["ptx"]
