"""The outsider's format, scale rule and estimators (``examples/outsider.py``) in Triton's interpreter."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import qcompile  # noqa: E402
from qcompile.ir.formats import FORMATS  # noqa: E402
from qcompile.ir.operand import Operand  # noqa: E402
from qcompile.kernels.formula import estimators as formulas  # noqa: E402
from qcompile.kernels.formula import rounding, scales  # noqa: E402
from qcompile.kernels.formula.torch_target import evaluate  # noqa: E402
from qcompile.kernels.formula.triton_target import device_function  # noqa: E402
from qcompile.kernels.quantize import triton_transformed as kernels  # noqa: E402
from qcompile.kernels.quantize.buckets import buckets_of  # noqa: E402
from qcompile.kernels.quantize.grid import grid_of  # noqa: E402
from qcompile.kernels.quantize.reference import pack  # noqa: E402
from qcompile.kernels.quantize.triton_codes import nearest, saturated  # noqa: E402
from qcompile.kernels.register import provider_of  # noqa: E402

from .harness import interpreted, run_interpreted  # noqa: E402
from .test_buckets import TABLES, points  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def recipe(definitions_forgotten):
    return runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "outsider.py"))["recipe"]


def test_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("shape", [(3, 7), (5, 129), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interpreted_codes_and_mask(recipe, shape, dtype):
    """Stored codes, 8-bit codes, scales and mask of one kernel, bit for bit what the formulas say."""
    spec: Operand = recipe.activation
    q, x = spec.quantizer, torch.randn(shape).to(dtype)
    x[0] = 0.0
    supported = kernels.supports_quantize_8bit_masked((dtype,), str(spec))
    assert supported == (True, "")
    codes, stored, packed, mask = kernels.quantize_8bit_masked(x, str(spec), packed=True)
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=q.amax_floor)
    y = x.float() * evaluate(scales.reciprocal(q), amax)
    level = evaluate(rounding.round_level(q.format, q.rounding), y)
    assert torch.equal(codes.float(), level)
    assert torch.equal(stored, evaluate(scales.stored_scale(q), amax))
    assert torch.equal(packed, pack(evaluate(rounding.encode(q.format, q.rounding), y).to(torch.uint8), 4))
    keeps = evaluate(formulas.mask(spec.estimator, q.format), y, level)
    assert torch.equal(mask, pack(keeps.to(torch.uint8), 1))
    alone = kernels.estimator_mask(x, stored, str(q), str(spec.estimator), -1)
    assert torch.equal(alone, mask)


@triton.jit
def _apply(source, target, size, function: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, function(tl.load(source + at, at < size)), at < size)


@interpreted
@pytest.mark.parametrize("size", [1, 77, 130])
def test_interpreted_slope(recipe, size):
    """On GPUs the slope is part of kernels that Inductor makes; its device function says what the formula does."""
    formula = formulas.slope(recipe.weight.estimator, recipe.weight.quantizer.format)
    y = torch.randn(size) * 5
    slope = torch.empty_like(y)
    _apply[(-(-size // 64),)](y, slope, size, device_function(formula), 64)
    assert torch.equal(slope, evaluate(formula, y))


@triton.jit
def _round(source, levels, codes, size, fmt: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level, code = nearest(saturated(tl.load(source + at, at < size), fmt), fmt)
    tl.store(levels + at, level, at < size)
    tl.store(codes + at, code, at < size)


@interpreted
@pytest.mark.parametrize("rounding_name", ["even", "half_up"])
@pytest.mark.parametrize("fmt", TABLES, ids=lambda fmt: fmt.name)
def test_interpreted_table(fmt, rounding_name, definitions_forgotten):
    """Levels that are looked up in a table, which the kernel fills."""
    if fmt.name not in FORMATS:
        fmt = qcompile.Format(fmt.name, fmt.bits, fmt.magnitudes, codebook=fmt.codebook)
    grid = grid_of(f"{fmt.name} row {rounding_name}", eight_bit=False)
    y = points(fmt, buckets_of(fmt, "even"))
    levels, codes = torch.empty_like(y), torch.empty(y.shape, dtype=torch.int32)
    _round[(-(-len(y) // 64),)](y, levels, codes, len(y), grid, 64)
    assert torch.equal(
        levels.view(torch.int32), evaluate(rounding.round_level(fmt, rounding_name), y).view(torch.int32)
    )
    assert torch.equal(codes, evaluate(rounding.encode(fmt, rounding_name), y))


def test_no_provider_on_cuda_is_the_reference(recipe):
    """What the report says of a GPU: kernels are generated or ours."""
    for spec in (recipe.activation, recipe.weight):
        estimator = str(spec.estimator)
        op = "scale_gradient" if spec.estimator.kind.slope else "estimator_mask"
        for name, text in (("quantize", None), ("dequantize", None), (op, estimator)):
            provider, reason = provider_of(name, "cuda", str(spec.quantizer), torch.bfloat16, text)
            assert provider != "reference", f"{name}: {reason}"
