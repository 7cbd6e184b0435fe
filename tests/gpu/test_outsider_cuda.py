"""The outsider's file (``examples/outsider.py``) on a GPU: kernels are its formulas bit for bit, and it trains.

What would break: a product contracted with a sum, a formula printed for another definition, a silent reference.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import qcompile
from qcompile.ir.estimators import EstimatorSpec
from qcompile.kernels.formula import estimators as formulas
from qcompile.kernels.formula import rounding, scales
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.lowerings import register_lowerings
from qcompile.kernels.quantize.reference import pack
from qcompile.kernels.register import REFERENCES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ops = torch.ops.qcompile


@pytest.fixture(scope="module")
def recipe(definitions_forgotten):
    return runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "outsider.py"))["recipe"]


def compiled(function, *inputs):
    """Run ``function`` through Inductor with our lowerings."""
    register_lowerings()
    torch._dynamo.reset()
    return torch.compile(function, backend="inductor", fullgraph=True, dynamic=False)(*inputs)


@pytest.mark.parametrize("way", ["eager", "inductor"])
@pytest.mark.parametrize("shape", [(37, 129), (3, 5, 254), (130, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_the_formulas(recipe, shape, dtype, way):
    """Codes, scales, mask and slope against the formulas evaluated in torch on the same card.

    The example's slope is declared continuous: a generated loop divides by the stored scale and may be two units in the
    last place off in y, and two in the quotient. The same slope without that word is the formula of the y that was
    rounded.
    """
    run = compiled if way == "inductor" else lambda function, *inputs: function(*inputs)
    activation, soft = recipe.activation, recipe.weight.estimator
    qcompile.Estimator("soft_exact", slope=soft.kind.slope)
    q, text = activation.quantizer, str(activation.quantizer)
    x = torch.randn(shape, device="cuda").to(dtype)
    x[..., 0, :] = 0.0
    grad = torch.randn(shape, device="cuda").to(dtype)
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=q.amax_floor)
    y = x.float() * evaluate(scales.reciprocal(q), amax)
    level = evaluate(rounding.round_level(q.format, q.rounding), y)
    codes, stored = run(lambda x: ops.quantize(x, text, -1), x)
    assert torch.equal(stored, evaluate(scales.stored_scale(q), amax))
    assert torch.equal(codes, pack(evaluate(rounding.encode(q.format, q.rounding), y).to(torch.uint8), 4))
    keeps = evaluate(formulas.mask(activation.estimator, q.format), y, level)
    mask = run(lambda x, s: ops.estimator_mask(x, s, text, str(activation.estimator), -1), x, stored)
    assert torch.equal(mask, pack(keeps.to(torch.uint8), 1))
    expected = (grad.float() * evaluate(formulas.slope(soft, q.format), y)).to(dtype)

    def sloped(estimator: EstimatorSpec):
        return run(lambda g, x, s: ops.scale_gradient(g, x, s, text, str(estimator), -1), grad, x, stored)

    assert torch.equal(sloped(EstimatorSpec.parse("soft_exact")), expected)
    torch.testing.assert_close(sloped(soft), expected, rtol=6 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("columns", [64, 255, 4096, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_rows(recipe, columns, dtype):
    """Ties, −0, rows beyond the grid, NaN and infinities in every kernel that looks levels up are the reference's."""
    spec = recipe.activation
    fmt, text = spec.quantizer.format, str(spec.quantizer)
    x = torch.randn(9, columns)
    ties = torch.tensor([*fmt.thresholds, *fmt.magnitudes, -0.0])
    for row, factor in ((0, 1.0), (1, -1.0), (2, -(2.0**60))):
        x[row, : len(ties)] = ties * factor
        x[row, -1] = fmt.max / 0.9 * factor
    x[3], x[4] = 0.0, x[4] * 1e-38
    x[5, 1:4] = torch.tensor([float("nan"), float("inf"), -0.0])
    x[6, 1:4] = torch.tensor([float("inf"), -float("inf"), -0.0])
    x[7] *= 1e37
    x = x.to(dtype)
    for op, texts in (
        ("quantize_8bit", (text, True)),
        ("quantize_8bit_transposed", (text,)),
        ("quantize_8bit_masked", (str(spec), True)),
        ("quantize", ("nf4 row", -1)),
    ):
        found = getattr(ops, op)(x.cuda(), *texts)
        for actual, expected in zip(found, REFERENCES[op](x, *texts), strict=True):
            if expected.dtype == torch.float32:
                torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)
            else:
                assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8)), op


def test_8bit_codes_are_the_levels(recipe):
    """What tensor cores read."""
    q = recipe.activation.quantizer
    x = torch.randn(37, 2050, device="cuda", dtype=torch.bfloat16)
    codes, scale, _ = ops.quantize_8bit(x, str(q), False)
    amax = x.float().abs().amax(-1, keepdim=True)
    y = x.float() * evaluate(scales.reciprocal(q), amax)
    assert torch.equal(codes.float(), evaluate(rounding.round_level(q.format, q.rounding), y))
    assert torch.equal(scale, evaluate(scales.stored_scale(q), amax))


def test_it_trains(recipe):
    """The loss falls, and the report names no reference."""
    torch.manual_seed(0)
    model = nn.Linear(512, 256).to("cuda")
    step = torch.compile(model, backend=qcompile.backend(recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses, x = [], torch.randn(130, 512, device="cuda")
    for _ in range(8):
        loss = (step(x) - x[:, :256]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    report = qcompile.explain(model, x, backend=recipe)
    assert "reference" not in report.rows[0].provider
