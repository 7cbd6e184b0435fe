"""Outlier clamping of a whole tensor in Triton, without a GPU: numerics in the interpreter, and Hopper's machine code.

Blocks and samples are made small, so that a few hundred elements are several ranges of several blocks. How Triton
interprets is in test_triton_quantize.py, which holds the tests of rows. The interpreter converts bfloat16 numbers below
2⁻¹²⁶ wrongly: they are left to tests/gpu, but for the search, which compares bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import triton

from qcompile.ir.ops import clamped_counts
from qcompile.ir.outliers import OutlierClamp
from qcompile.kernels.outliers import reference, tensor_search
from qcompile.kernels.outliers import triton as kernels

from .harness import compiled, interpreted, run_interpreted
from .test_triton_quantize import compile_for_hopper, on_meta, spills

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INFINITY = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")

#: What makes quantiles hard to find, and residuals easy to get wrong.
KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "normal": lambda x: x,
    "constant": lambda x: x * 0 + 1.25,
    "both zeros": lambda x: x * 0,
    "half zeros": torch.relu,
    "ties": torch.round,
    "two values": lambda x: torch.where(x > 2, 5.0, -3.0),
    "shifted": lambda x: x + 10,
    "subnormal": lambda x: x * 2.0**-18 if x.dtype == FP16 else x * 2.0**-128,
    "heavy tails": lambda x: x**7,
    "far outliers": lambda x: torch.where(x.abs() > 2.5, x * 1e4, x),
    "few infinities": lambda x: x.index_fill(0, torch.tensor([0]), INFINITY).index_fill(
        0, torch.tensor([7]), -INFINITY
    ),
    "infinite bounds": lambda x: torch.where(x.abs() > 0.7, x * INFINITY, x),
    "few NaN": lambda x: x.index_fill(0, torch.tensor([3, 5]), NAN),
    "NaN of both signs": lambda x: torch.where(x > 0.5, NAN, torch.where(x < -1, -NAN, x)),
    "NaN but for few": lambda x: torch.where(x > 2, x, NAN),
    "NaN": lambda x: x * NAN,
}


@pytest.fixture
def small_blocks(monkeypatch):
    """Everything goes the way of a tensor, in blocks of a few elements."""
    monkeypatch.setattr(kernels, "LONGEST_ROW", 0)
    monkeypatch.setattr(kernels, "CLAMPED_BYTES", 256)
    monkeypatch.setattr(tensor_search, "COUNTED", 128)
    monkeypatch.setattr(tensor_search, "LONGEST_ROW", 64)
    monkeypatch.setattr(tensor_search, "ADDED", 4)


def assert_clamps(x: torch.Tensor, alpha: float, axis: int = -1) -> None:
    """Bounds and clamped tensor are the reference's; so is the residual, as far as the reference defines it."""
    clamp = f"occ(alpha={alpha},per=tensor)"
    clamped, values, positions = kernels.clamp_outliers(x, clamp, axis)
    expected, expected_values, expected_positions = reference.clamp_outliers(x, clamp, axis)
    assert clamped.stride() == expected.stride()
    assert (values.dtype, values.shape) == (expected_values.dtype, expected_values.shape)
    assert (positions.dtype, positions.shape) == (expected_positions.dtype, expected_positions.shape)
    torch.testing.assert_close(clamped, expected, rtol=0, atol=0, equal_nan=True)
    flat, positions, expected_positions = x.movedim(axis, -1).reshape(-1), positions.long(), expected_positions.long()
    assert len(positions.unique()) == len(positions)
    torch.testing.assert_close(values.sort()[0], expected_values.sort()[0], rtol=0, atol=0, equal_nan=True)

    low, high = clamped_counts(OutlierClamp.parse(clamp), x.numel())
    bounds = flat.float().sort()[0][[low, len(flat) - 1 - high]]
    if bounds.isfinite().all():  # else it is open which elements tie with one
        residual, expected_residual = (
            v.new_zeros(len(flat)).scatter_add(0, at, v)
            for v, at in ((values, positions), (expected_values, expected_positions))
        )
        torch.testing.assert_close(residual, expected_residual, rtol=0, atol=0, equal_nan=True)
        for side in (slice(low), slice(low, None)):
            at, cut = positions[side], values[side] != 0
            assert bool((cut.int().diff() <= 0).all()), "ties stand before what is cut"
            assert bool((at[cut].diff() > 0).all())
            assert bool((at[~cut].diff() > 0).all())
        zero = (clamped == 0) & (x == 0)
        assert torch.equal(clamped[zero].signbit(), x[zero].signbit())
        restored = reference.restore_outliers(clamped, values, positions, clamp, axis)
        expected = reference.restore_outliers(expected, expected_values, expected_positions, clamp, axis)
        torch.testing.assert_close(restored, expected, rtol=0, atol=0, equal_nan=True)
        # A float32 residual has 24 bits: enough for a number and a bound of 11 each that are not too far apart.
        magnitudes = torch.cat([bounds, flat[positions[values != 0]].float()]).abs()
        if x.dtype != FP32 and not x.isnan().any() and magnitudes.max() < 2.0**12 * magnitudes.min():
            assert torch.equal(restored, x)


def test_numerics_under_the_interpreter():
    """Runs the tests below in a process that started with TRITON_INTERPRET=1."""
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kinds(kind, dtype, small_blocks):
    if (kind, dtype) == ("subnormal", BF16):
        pytest.skip("not for the interpreter")
    assert_clamps(KINDS[kind](torch.randn(300).to(dtype)).to(dtype), 0.9)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_interpreted_sizes(dtype, small_blocks):
    """One element, one side without outliers, whole blocks and ranges, and one element more or less."""
    for size in (1, 2, 10, 11, 127, 128, 129, 1025):
        assert_clamps(torch.randn(size).to(dtype), 0.6 if size < 10 else 0.9)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_interpreted_blocks_as_they_are(dtype):
    """Tensors that are just too long for a row, with the constants of a GPU."""
    for alpha in (0.9, 0.99, 0.999):
        assert_clamps(torch.randn(17_003).to(dtype), alpha)
    assert_clamps(torch.randn(131, 130).to(dtype), 0.99)


@interpreted
def test_interpreted_short_tensors_are_rows():
    for size in (1, 5, 600):
        assert_clamps(torch.randn(size).to(BF16), 0.9)
    assert_clamps(torch.randn(7, 5, 3).to(BF16), 0.9, 1)


@interpreted
def test_interpreted_layouts(small_blocks):
    """Positions count through the tensor with the axis moved last, wherever its elements lie."""
    x = torch.randn(5, 33, 8).to(BF16)
    for axis in (0, 1, -1):
        assert_clamps(x, 0.9, axis)
    for view, axis in ((x.transpose(0, 2), 0), (x[:, ::2, 1:], -1), (x[:1].expand(4, -1, -1), -2), (x[..., 0].t(), 0)):
        assert_clamps(view, 0.9, axis)


@interpreted
@settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # an example takes half a second, and shrinking thousands of them
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    bits=st.lists(st.one_of(st.integers(-(2**15), 2**15 - 1), st.sampled_from([0, -(2**15), 0x3F80])), min_size=1),
    dtype=st.sampled_from([BF16, FP16]),
    alpha=st.sampled_from([0.51, 0.7, 0.9]),
)
def test_interpreted_any_bits(small_blocks, bits, dtype, alpha):
    """Every number that the interpreter can convert, NaN with every payload."""
    x = torch.tensor(bits, dtype=torch.int16).view(dtype)
    assert_clamps(x.where(x.abs() >= 2.0**-126, 0.0 * x) if dtype == BF16 else x, alpha)


@interpreted
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("ranks", [lambda rank, numel, size: (0, 0), lambda rank, numel, size: (size // 2, size // 2)])
def test_interpreted_wrong_guesses(dtype, ranks, small_blocks, monkeypatch):
    """A sample that misleads costs reads; as many as are launched are enough wherever the bounds are."""
    monkeypatch.setattr(tensor_search, "sample_ranks", ranks)
    for kind in ("normal", "heavy tails", "two values", "infinite bounds"):
        assert_clamps(KINDS[kind](torch.randn(300).to(dtype)).to(dtype), 0.9)


@interpreted
def test_interpreted_reads(monkeypatch):
    """A normal bfloat16 tensor is read once, which is what makes this faster than sorting digits."""
    monkeypatch.setattr(tensor_search, "reads", lambda dtype: 1)
    found = tensor_search.tensor_bounds(torch.randn(100_000).to(BF16), 1000, 1000)
    assert found.search[tensor_search.FOUND.value] == 1


@interpreted
@pytest.mark.parametrize("scale", [1.0, 2.0**-128])
def test_interpreted_bounds(scale):
    """Ordinals and counts of a search, against a sort."""
    x = (torch.randn(20_000) * scale).to(BF16)
    found = tensor_search.tensor_bounds(x, 300, 100)
    lower, upper = x.float().sort()[0][[300, -101]]
    beyond = found.search[[tensor_search.BEYOND.value, tensor_search.SIDE.value + tensor_search.BEYOND.value]]
    assert beyond.tolist() == [(x < lower).sum(), (x > upper).sum()]
    ranges = x.split(found.ranges.chunk)
    counts = [
        [(part < lower).sum(), (part == lower).sum(), (part > upper).sum(), (part == upper).sum()] for part in ranges
    ]
    assert torch.equal(found.starts[1:], torch.tensor(counts).cumsum(0)[:-1])
    assert not found.starts[0].any()


# --- machine code ---------------------------------------------------------------------------------------------------


def launches_of(call: Callable[[], object]) -> dict:
    """The kernels that ``call`` would launch on an H200, compiled, by name; its tensors are on the meta device."""
    found = {}

    def compile_instead(kernel, programs, *arguments, num_warps: int, **constants):
        found[kernel.__name__] = compile_for_hopper(kernel, arguments, constants, num_warps)

    with (
        mock.patch.object(kernels, "launch", compile_instead),
        mock.patch.object(tensor_search, "launch", compile_instead),
        mock.patch.object(tensor_search, "processors", return_value=132),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        call()
    return found


def clamp(x: torch.Tensor, alpha: float = 0.99) -> Callable[[], object]:
    return lambda: kernels.clamp_outliers(x, f"occ(alpha={alpha},per=tensor)", -1)


@compiled
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_machine_code(dtype, tmp_path):
    """Elements are read 16 bytes at a time, nothing spills, and what is listed stays in the threads that hold it."""
    found = launches_of(clamp(on_meta(16384, 4096, dtype=dtype)))
    assert set(found) == {"_guess", "_count", "_narrow", "_clamp_range"}
    # Triton 3.8 and 3.9 spill a few registers of the one program that looks at a sample; up to 3.7 none are spilled.
    allowed = {"_guess": 16} if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8) else {}
    for name, kernel in found.items():
        assert spills(kernel, tmp_path) <= allowed.get(name, 0), name
    for name in ("_count", "_clamp_range"):
        assert re.search(r"ld\.global\.v(4\.b32|2\.b64)", found[name].asm["ptx"]), name
    assert "convert_layout" not in found["_clamp_range"].asm["ttgir"]


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("shape", "dtype", "alpha"),
    [((131, 1001), BF16, 0.99), ((131, 1001), FP16, 0.9), ((3, 2**31 + 1), FP32, 0.6), ((17, 1009), FP32, 0.99)],
)
def test_odd_shapes_compile(shape, dtype, alpha, tmp_path: Path):
    """Positions of 16, 32 and 64 bits, residuals of more than 2³¹ entries, elements that no vector is aligned to."""
    for kernel in launches_of(clamp(on_meta(*shape, dtype=dtype), alpha)).values():
        assert not spills(kernel, tmp_path)
