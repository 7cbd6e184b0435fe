"""The C++ kernels against the plain-torch references: codes, scales, masks and values bit for bit; and who
runs what."""

from __future__ import annotations

import math
import re
import warnings

import pytest
import torch

from qcompile.ir.formats import FORMATS
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels import cpp, register
from qcompile.kernels.estimate import cpp as estimate_cpp
from qcompile.kernels.estimate import reference as estimate
from qcompile.kernels.outliers import cpp as outliers_cpp
from qcompile.kernels.outliers import reference as outliers
from qcompile.kernels.quantize import cpp as quantize_cpp
from qcompile.kernels.quantize import reference as quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Of each way to round ties toward +∞, with and without a zero, with one magnitude and with 128.
UP_FORMATS = ("e2m1", "e1m2", "e3m0", "midrise1", "midrise4", "midrise5", "midrise8", "int8")

#: Every format and rounding, every scale rule and granularity, and the 16-bit dtypes, each combined with a
#: few of the others: a kernel takes half a second to build.
CASES = [
    *((f"{name} row absmax even", torch.float32) for name, fmt in FORMATS.items() if not fmt.pruned),
    *(
        (f"{name} {g} rms half_up", torch.bfloat16)
        for name in ("midrise1", "midrise4", "midrise8")
        for g in ("row", "tensor", "block16")
    ),
    ("e2m1 block3x3 rms even", torch.float32),
    *(
        (f"{fmt} row absmax half_up", torch.float32)
        for fmt in ["e2m1", "e1m2", "e3m0", "midrise1", "midrise4", "midrise5", "midrise8", "int8", "nf4", "dynamic8"]
    ),
    *((f"e2m1 {g} absmax even", torch.bfloat16) for g in ("row", "tensor")),
    *((f"e2m1 {g} absmax_pow2 even", torch.bfloat16) for g in ("row", "tensor")),
    *((f"e2m1 {granularity} e8m0 even", torch.float32) for granularity in ("block16", "block5", "block3x3")),
    ("e2m1 row absmax_pow2 even", torch.float16),
    ("int5 row absmax even", torch.float16),
    ("e4m3 row absmax even", torch.float16),
    ("e5m2 tensor absmax even", torch.bfloat16),
]


def special(size: int, dtype: torch.dtype) -> torch.Tensor:
    """``[13, size]``: a row each of zeros, −0, subnormal, tiny, huge, tied and non-finite values; the rest is
    normal noise."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(13, size, generator=generator)
    x[1], x[2], x[3], x[4] = 0, -0.0, x[3] * 1e-40, x[4] * 1e-36
    x[5] *= torch.finfo(dtype).max / x[5].abs().amax()
    for row, (steps, largest) in enumerate(
        ((0.25, 6), (0.5, 8), (0.25, 7.5)), start=6
    ):  # amax = M: ties survive scaling
        x[row] = torch.randint(-int(largest / steps), int(largest / steps) + 1, (size,), generator=generator) * steps
        x[row, -1] = -largest
    x[9, size // 2] = float("nan")
    x[10, 0] = float("inf")
    x[11, -1], x[11, 0] = float("nan"), float("-inf")
    return x.to(dtype)


def assert_same_values(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, layout and dtype; any NaN equals any NaN (conversions in torch do not agree on its sign and
    payload)."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.stride() == expected.stride()
    missing = expected.isnan()
    assert torch.equal(got.isnan(), missing)
    integer = torch.int32 if got.dtype == torch.float32 else torch.int16
    assert torch.equal(got.contiguous().view(integer)[~missing], expected.contiguous().view(integer)[~missing])


def assert_same_codes(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, quantizer: str) -> None:
    """Equal codes and padding, quantized along the last axis. The sign bit of a NaN's code is free: IEEE 754
    leaves the sign of inf · 0 and NaN · NaN open, and torch's own vector loop and its tail differ in it."""
    q = Quantizer.parse(quantizer)
    x = x.float()
    y = x * quantize.spread(quantize.scale_pair(quantize.group_statistic(x, x, q), q)[2], x.shape, q)
    padded = q.packed_size(x.shape[-1]) * q.format.codes_per_byte
    sign = torch.where(y.isnan(), 1 << (q.format.bits - 1), 0).to(torch.uint8)
    sign = torch.nn.functional.pad(sign, (0, padded - x.shape[-1]))
    assert got.dtype == torch.uint8
    assert got.shape == expected.shape
    fields = [quantize.unpack(codes, q.format.bits, padded) | sign for codes in (got, expected)]
    assert torch.equal(*fields)


@pytest.mark.parametrize(("quantizer", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize("size", [1, 33, 80])
def test_quantize_and_dequantize_equal_the_reference(quantizer: str, dtype: torch.dtype, size: int):
    """A wrong threshold, tie, scale, special value, pad or short last vector changes a code."""
    assert quantize_cpp.supports_quantize((dtype,), quantizer) == (True, "")
    if quantizer.split()[1] == "tensor":
        tensors = [special(size, dtype)[[0, 1, 2, 3, 4, 6]].contiguous(), special(size, dtype)]
    else:
        tensors = [special(size, dtype)]
    for x in tensors:
        codes, scales = quantize_cpp.quantize(x, quantizer, -1)
        expected_codes, expected_scales = quantize.quantize(x, quantizer, -1)
        assert_same_codes(codes, expected_codes, x, quantizer)
        if scales.dtype == torch.uint8:
            assert torch.equal(scales, expected_scales)
        else:
            assert_same_values(scales, expected_scales)
        arguments = expected_codes, expected_scales, quantizer, -1, size, dtype
        assert_same_values(quantize_cpp.dequantize(*arguments), quantize.dequantize(*arguments))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("quantizer", ["e2m1 row absmax even", "e2m1 block3x3 e8m0 even"])
def test_any_axis_and_strides(axis: int, quantizer: str):
    """Codes follow the moved axis, also of inputs with gaps; dequantized tensors have the strides the fake op
    announces."""
    x = torch.randn(5, 14, 7)[:, ::2]
    codes, scales = quantize_cpp.quantize(x, quantizer, axis)
    expected = quantize.quantize(x, quantizer, axis)
    assert torch.equal(codes, expected[0])
    assert torch.equal(scales, expected[1])
    arguments = codes, scales, quantizer, axis, x.shape[axis], torch.float32
    assert_same_values(quantize_cpp.dequantize(*arguments), quantize.dequantize(*arguments))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("quantizer", ["e2m1 row absmax even", "e2m1 tensor absmax even", "e2m1 block16 e8m0 even"])
def test_empty_tensors(shape: tuple[int, ...], quantizer: str):
    """No element: scales still have the value of the floor, nothing is read or written out of bounds."""
    x = torch.empty(shape)
    for got, expected in zip(quantize_cpp.quantize(x, quantizer, -1), quantize.quantize(x, quantizer, -1), strict=True):
        assert got.shape == expected.shape
        assert torch.equal(got, expected)


def test_vector_is_one_row():
    x = torch.randn(37)
    for got, expected in zip(
        quantize_cpp.quantize(x, "e2m1 row absmax even", 0),
        quantize.quantize(x, "e2m1 row absmax even", 0),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_several_threads_agree_with_one():
    """Large enough for two threads; a race or a wrong split of rows shows."""
    x = torch.randn(257, 511)
    for quantizer in ("e2m1 row absmax even", "e2m1 tensor absmax even"):
        for got, expected in zip(
            quantize_cpp.quantize(x, quantizer, -1), quantize.quantize(x, quantizer, -1), strict=True
        ):
            assert torch.equal(got, expected)


def test_dequantize_rejects_codes_of_another_size():
    """The C++ loop would read past the end."""
    codes, scales = quantize_cpp.quantize(torch.randn(3, 8), "e2m1 row absmax even", -1)
    with pytest.raises(ValueError, match="do not fit 18 elements"):
        quantize_cpp.dequantize(codes, scales, "e2m1 row absmax even", -1, 18, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("quantizer", "estimator"),
    [
        ("e2m1 row absmax_pow2 even", "clip"),
        ("midrise4 row absmax half_up", "trust"),
        ("midrise8 row absmax even", "trust"),
    ],
)
def test_masks_equal_the_reference(quantizer: str, estimator: str, dtype: torch.dtype):
    """Bits, NaN elements (never trusted) and the padding of the last byte."""
    x = special(43, dtype)
    scales = quantize.quantize(x, quantizer, -1)[1]
    for y, axis in ((x, -1), (x, 0)):
        got = estimate_cpp.estimator_mask(y, scales, quantizer, estimator, axis)
        assert torch.equal(got, estimate.estimator_mask(y, scales, quantizer, estimator, axis))
        assert got.count_nonzero() > 0
        grad = torch.randn(43, 13).mT.to(dtype)
        grad[2, 3] = float("nan")
        passed = estimate_cpp.mask_gradient(grad, got, axis)
        assert passed.stride() == grad.stride()  # what the fake op announces
        assert_same_values(passed.contiguous(), estimate.mask_gradient(grad, got, axis).contiguous())


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("estimator", ["dge", "dge(k=2,cap=10)", "dge(k=0.4,cap=3)", "dge(k=1,cap=3)"])
def test_slope_is_within_two_units_of_the_last_place(estimator: str, axis: int):
    """Neighbouring float32 powers (see the module), a division and a product: 2 units. NaN, cap and the bins'
    ends are exact."""
    for quantizer in ("e2m1 row absmax even", "midrise3 row absmax even"):
        x = special(43, torch.float32)
        grad = torch.ones_like(x)
        arguments = x, torch.ones(13, 1), quantizer, estimator, axis
        got, expected = (
            estimate_cpp.scale_gradient(grad, *arguments),
            estimate.scale_gradient(grad, *arguments),
        )
        assert torch.equal(got.isnan(), expected.isnan())
        finite = ~expected.isnan()
        difference = got.view(torch.int32)[finite] - expected.view(torch.int32)[finite]
        assert difference.abs().max() <= 2


def test_slope_of_16_bit_gradients_and_input():
    """The gradient's dtype need not be the input's."""
    x, quantizer = special(43, torch.bfloat16), "e2m1 row absmax even"
    grad = torch.randn(13, 43).to(torch.float16)
    arguments = x, torch.ones(13, 1), quantizer, "dge", -1
    got, expected = estimate_cpp.scale_gradient(grad, *arguments), estimate.scale_gradient(grad, *arguments)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got, expected, rtol=2**-10, atol=0, equal_nan=True)


@pytest.mark.parametrize("per", ["row", "tensor"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_equals_the_reference(dtype: torch.dtype, axis: int, per: str):
    clamp = f"occ(alpha=0.9,per={per})"
    x = torch.randn(21, 37).to(dtype)
    clamped, values, positions = outliers.clamp_outliers(x, clamp, axis)
    arguments = clamped, values, positions, clamp, axis
    assert_same_values(outliers_cpp.restore_outliers(*arguments), outliers.restore_outliers(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clamp", ["occ(alpha=0.99)", "occ(alpha=0.9)", "occ(alpha=0.7)", "occ(alpha=0.97,per=tensor)"])
@pytest.mark.parametrize("shape", [(7, 300), (5, 33), (3, 2), (4, 1), (0, 9), (2, 3, 130)])
@pytest.mark.parametrize("special", [False, True], ids=["plain", "special"])
def test_clamp_equals_the_reference(dtype, clamp, shape, special):
    """Clamped values bit for bit, and the same residual at the same positions whatever the order it is listed in.

    Special rows hold ties, constants, infinities and NaN; too few ranks beyond a bound would show as a missing
    residual.
    """
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    if special and x.numel() > 4:
        x = (x * 2).round() / 2
        x[0] = 1.25
        x.view(-1)[-1], x.view(-1)[-2] = math.inf, -math.inf
        x[1].view(-1)[0] = math.nan
    for axis in range(-1, -x.dim(), -1):
        actual, values, positions = outliers_cpp.clamp_outliers(x, clamp, axis)
        expected, *listed = outliers.clamp_outliers(x, clamp, axis)
        assert actual.stride() == expected.stride()
        assert torch.equal(actual.nan_to_num(77), expected.nan_to_num(77))
        assert (values.dtype, positions.dtype) == (listed[0].dtype, listed[1].dtype)
        zero = torch.zeros_like(x, dtype=torch.float32)
        dense = [outliers.restore_outliers(zero, *pair, clamp, axis) for pair in ((values, positions), listed)]
        assert torch.equal(dense[0].nan_to_num(77), dense[1].nan_to_num(77))


def test_restore_rejects_positions_outside():
    """The C++ loop would write past the end."""
    with pytest.raises(IndexError, match="1 positions lie outside"):
        outliers_cpp.restore_outliers(torch.zeros(1, 4), torch.ones(1, 2), torch.tensor([[3, 4]]), "occ", -1)


@pytest.mark.parametrize(
    ("op", "quantizer", "dtype", "estimator", "reason"),
    [
        ("quantize", "nf4 row absmax stochastic", torch.float32, "ste", "stochastic rounding to nf4"),
        ("quantize", "e2m1 row absmax even", torch.float64, "ste", "the tensor is float64"),
        ("scale_gradient", "midrise8 row absmax even", torch.float32, "dge", "its slope takes 265 operations"),
        ("estimator_mask", "e2m1 row absmax even", torch.float32, "ste", "estimator ste has no mask"),
        ("quantized_mm", "e2m1 row absmax even", torch.float32, "ste", "no other provider of quantized_mm on cpu"),
    ],
)
def test_reference_is_chosen_for_a_stated_reason(op, quantizer, dtype, estimator, reason):
    name, why = register.provider_of(op, "cpu", quantizer, dtype, estimator)
    assert name == "reference"
    assert re.search(reason, why)


def test_cpp_is_chosen_without_a_reason():
    assert register.provider_of("quantize", "cpu", "e2m1 row absmax even", torch.bfloat16) == ("cpp", "")
    assert register.provider_of("quantize", "cuda", "e2m1 row absmax even", torch.bfloat16) == ("triton (inductor)", "")
    rotated = register.provider_of(
        "quantize", "cuda", "midrise4 row rms half_up", torch.bfloat16, transform="hadamard(64)"
    )
    assert rotated == ("triton", "")
    by_hand = register.provider_of("quantize_8bit", "cuda", "midrise4 row rms half_up", torch.bfloat16)
    assert by_hand == ("triton", "")  # nothing is generated, and the one kernel there is asks for extents
    with pytest.raises(KeyError, match="unknown op"):
        register.provider_of("quantise", "cpu", "e2m1", torch.float32)


def test_registered_ops_run_what_the_table_says(monkeypatch):
    """The dispatcher reaches the C++ kernel for float32 and the reference for float64."""
    calls = []
    monkeypatch.setattr(quantize_cpp, "_quantize_kernel", lambda *key: calls.append(key) or (lambda *_: None))
    torch.ops.qcompile.quantize(torch.ones(2, 3), "e2m1 row absmax even", -1)
    assert calls == [("e2m1 row absmax even", "", torch.float32)]
    torch.ops.qcompile.quantize(torch.ones(2, 3, dtype=torch.float64), "e2m1 row absmax even", -1)
    assert len(calls) == 1


def test_fake_tensors_do_not_reach_the_kernels():
    """Fake implementations still win while tracing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        codes, scales = torch.ops.qcompile.quantize(torch.empty(2, 5), "e2m1 row absmax even", -1)
    assert codes.shape == (2, 3)
    assert scales.shape == (2, 1)


def test_without_a_compiler_the_reference_runs_and_says_so(monkeypatch):
    """One warning that names the fix, and the reason in the report."""
    from torch._inductor import cpp_builder, exc

    def fail():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", fail)
    cpp.find_compiler.cache_clear()
    try:
        with pytest.warns(UserWarning, match="Install g\\+\\+ or set CXX"):
            choice = register.provider_of("quantize", "cpu", "e2m1 row absmax even", torch.float32)
        assert choice == ("reference", "no C++ compiler found; install g++ or set CXX")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert register.provider_of("quantize", "cpu", "e2m1 row absmax even", torch.float32)[0] == "reference"
    finally:
        cpp.find_compiler.cache_clear()
