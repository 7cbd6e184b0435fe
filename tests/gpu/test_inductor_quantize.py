"""The generated kernels on a GPU: codes, scales and dense tensors equal to the plain-torch reference bit for
bit.

Memory that the caching allocator hands out holds NaN, so a byte that a kernel does not write, or one that it
reads past the end of a row, shows.
"""

from __future__ import annotations

import pytest
import torch

import qcompile.kernels  # noqa: F401
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.estimate import reference as estimate_reference
from qcompile.kernels.lowerings import cuda_provider, register_lowerings
from qcompile.kernels.outliers import reference as outliers_reference
from qcompile.kernels.quantize import reference
from qcompile.kernels.quantize.block_grid import why_not_in_blocks

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ops = torch.ops.qcompile
QUANTIZERS = [
    *[f"{name} row absmax {rounding}" for rounding in ("even", "half_up")
      for name in ("e2m1", "e1m2", "e3m0", "midrise4", "int4", "int8", "midrise8", "midrise3", "midrise1")],
    "e4m3 row absmax", "e5m2 tensor absmax", "e2m1 tensor absmax", "midrise4 block32 absmax", "e2m1 block5x5 absmax",
    "e2m1 row absmax_pow2 half_up", "e2m1 block32 e8m0", "e4m3 block32 e8m0",
    "e2m1 block16 e4m3", "e2m1 block16x16 e4m3", "e2m1 block16 e4m3_46", "midrise4 block5x5 e4m3_46 half_up",
    "e2m1/int4 block16 e4m3", "int4/e3m0 block5x5 absmax half_up",
]  # fmt: skip
SHAPES = [(37, 129), (3, 5, 254), (1030, 34), (5, 4099)]


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [
        torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in (2**9, 2**14, 2**20, 2**23, 2**25)
    ]
    del blocks


def compiled(fn, *inputs):
    """Run ``fn`` through Inductor with our lowerings."""
    register_lowerings()
    torch._dynamo.reset()
    return torch.compile(fn, backend="inductor", fullgraph=True, dynamic=False)(*inputs)


def inputs_for(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ties, zeros, −0, NaN, infinity, rows of very different size; and the global scale, if needed."""
    q = Quantizer.parse(text)
    generator = torch.Generator(device="cuda").manual_seed(1)
    x = torch.randn(shape, generator=generator, device="cuda")
    rows = x.view(-1, shape[-1])
    grid = q.candidates[0].grid
    ties = torch.tensor([*grid.thresholds, *grid.magnitudes, -0.0], device="cuda")[: shape[-1] - 1]
    for row, factor in enumerate((1.0, -1.0, 2.0**-90)):
        rows[row] = 0.0
        rows[row, : len(ties)] = ties * factor
        rows[row, -1] = grid.max * factor
    rows[3], rows[4] = 0.0, rows[4] * 1e37
    if q.granularity.kind == "row":
        rows[-1, 1], rows[-2, 2] = float("nan"), float("inf")
    global_scale = torch.full((), 0.37, device="cuda") if q.scale.two_level else None
    return x.to(dtype), global_scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_quantize_and_dequantize_are_the_references(dtype, axis):
    """Every format, rounding, granularity and scale rule; odd sizes; bit for bit."""
    for shape in SHAPES:
        cases = [(text, *inputs_for(text, shape, dtype)) for text in QUANTIZERS]

        def there_and_back(*tensors, cases=cases, shape=shape):
            out = []
            for (text, _, scale), x in zip(cases, tensors, strict=True):
                codes, scales = ops.quantize(x, text, axis, scale)
                out.append((codes, scales, ops.dequantize(codes, scales, text, axis, shape[axis], dtype, scale)))
            return out

        outputs = compiled(there_and_back, *[x for _, x, _ in cases])
        for (text, x, scale), (codes, scales, dense) in zip(cases, outputs, strict=True):
            q = Quantizer.parse(text)
            in_blocks = q.scale.two_level and not why_not_in_blocks(q)
            assert cuda_provider("quantize", text)[0] == ("triton" if in_blocks else "triton (inductor)")
            expected_codes, expected_scales = reference.quantize(x, text, axis, scale)
            expected = reference.dequantize(expected_codes, expected_scales, text, axis, shape[axis], dtype, scale)
            where = f"{text}, {shape}, axis {axis}"
            torch.testing.assert_close(
                scales.float(),
                expected_scales.float(),
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda m, w=where: f"{w}: {m}",
            )
            torch.testing.assert_close(codes, expected_codes, rtol=0, atol=0, msg=lambda m, w=where: f"{w}: {m}")
            torch.testing.assert_close(
                dense, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, w=where: f"{w}: {m}"
            )


def test_codes_of_non_contiguous_and_dynamic_inputs():
    """A transposed view is read by its strides, and the row's end is guarded at run time."""
    text, x = "e2m1 row absmax even", torch.randn(129, 37, device="cuda").t()
    register_lowerings()
    torch._dynamo.reset()
    run = torch.compile(lambda x: ops.quantize(x, text, -1), backend="inductor", fullgraph=True, dynamic=True)
    for sample in (x, x[:, :127], torch.randn(8, 64, device="cuda")):
        for got, expected in zip(run(sample), reference.quantize(sample, text, -1), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_estimators_agree_with_the_codes():
    """Masks bit for bit; the slope to float32 accuracy (powers may differ in the last place)."""
    x, grad = torch.randn(37, 129, device="cuda"), torch.randn(37, 129, device="cuda")
    scales = torch.ones(37, 1, device="cuda")
    for text in ("e2m1 row absmax", "e2m1 row e8m0", "midrise4 row e8m0", "e2m1/int4 block16 absmax"):
        for name in ("clip", "trust"):

            def masked(x, grad, text=text, name=name):
                mask = ops.estimator_mask(x, scales, text, name, -1)
                return mask, ops.mask_gradient(grad, mask, -1)

            mask, kept = compiled(masked, x, grad)
            expected = estimate_reference.estimator_mask(x, scales, text, name, -1)
            assert torch.equal(mask, expected), (text, name)
            assert torch.equal(kept, estimate_reference.mask_gradient(grad, expected, -1))
        own = reference.quantize(x, text, 0)[1]
        got = compiled(lambda x, g, s, text=text: ops.scale_gradient(g, x, s, text, "dge", 0), x, grad, own)
        # The bound of tests/kernels/test_triton_codegen.py: y is taken from the stored scale.
        expected = estimate_reference.scale_gradient(grad, x, own, text, "dge", 0)
        torch.testing.assert_close(got, expected, rtol=7e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_outliers_are_the_references(per, dtype):
    """Clamped tensor, and what its residual restores; which of equal elements top-k names is open."""
    clamp, x = f"occ(alpha=0.97,per={per})", torch.randn(131, 37, device="cuda").to(dtype)

    def there_and_back(x):
        clamped, values, positions = ops.clamp_outliers(x, clamp, 0)
        return clamped, ops.restore_outliers(clamped, values, positions, clamp, 0)

    clamped, restored = compiled(there_and_back, x)
    expected, values, positions = outliers_reference.clamp_outliers(x, clamp, 0)
    assert torch.equal(clamped, expected)
    assert torch.equal(restored, outliers_reference.restore_outliers(expected, values, positions, clamp, 0))
