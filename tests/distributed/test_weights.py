"""Rounding to odd, for every bfloat16 number there is between a row's maximum and a 2⁻¹² of it.

What would break: a tie that goes the other way, a number that becomes a tie, a maximum that arrives as another one.
"""

from __future__ import annotations

import pytest
import torch

from qcompile.distributed import weights
from qcompile.distributed.weights import decode, encode
from qcompile.ir.operand import Operand
from qcompile.kernels.quantize import reference
from qcompile.recipes import FP4, QUEST


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """A row for every mantissa that its maximum may have, of all numbers below it, with both signs and zero."""
    mantissas, binades = torch.arange(128, 256).float(), torch.arange(13).float()
    numbers = (mantissas[:, None] * 2.0**-binades).flatten()
    x = numbers.minimum(mantissas[:, None])
    x[:, ::3] *= -1
    x[:, 100] = 0
    x = torch.cat([x, x * 2.0**-70, x * 2.0**70]).bfloat16()
    return torch.cat([x, torch.zeros(1, x.shape[1], dtype=x.dtype)])


@pytest.mark.parametrize("rounding", ["even", "half_up"])
def test_e2m1_reads_the_same_codes_and_scales(rounding, rows):
    quantizer = f"e2m1 row absmax {rounding}"
    arrived = decode(*encode(rows))
    for expected, actual in zip(
        reference.quantize(rows, quantizer, -1), reference.quantize(arrived, quantizer, -1), strict=True
    ):
        assert torch.equal(actual, expected)


def test_weights_that_would_not_arrive_as_they_are_stay_wide():
    """The default's slope looks at the weight, QuEST rotates it, and scales of another rule have other ties."""
    wide = (
        *(FP4.weight, QUEST.weight),
        *map(Operand.parse, ("e2m1 row absmax_pow2", "e2m1 row rms", "e2m1 block32", "int4 row", "e2m1 row; trust")),
    )
    assert [str(operand) for operand in wide if weights._tells_apart(str(operand))] == []
    assert weights._tells_apart(str(Operand.parse("e2m1 row absmax even; ste")))


def test_to_nearest_would_not_do(rows):
    """What rounding to odd is for: to nearest, numbers become ties and go the other way."""
    largest = rows.float().abs().amax(1, keepdim=True)
    nearest = (rows.float() / largest.clamp(min=1e-30) * 384).to(torch.float8_e4m3fn).float() * (largest / 384)
    codes, _ = reference.quantize(rows, "e2m1 row absmax even", -1)
    others, _ = reference.quantize(nearest.bfloat16(), "e2m1 row absmax even", -1)
    assert (codes != others).float().mean() > 0.01


def test_numbers_that_are_not_finite_stay_so():
    x = torch.ones(3, 16, dtype=torch.bfloat16)
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    arrived = decode(*encode(x))
    assert not arrived[[0, 1], [1, 2]].isfinite().any()
    assert torch.equal(arrived[2], x[2])


@pytest.mark.nightly
@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_is_eager(rows):
    """As on CUDA; quotients may be rounded otherwise, which is what numbers that are close enough are equal for."""
    code, back = (weights._compiled(function) for function in (encode, decode))
    assert torch.equal(back(*code(rows)), decode(*encode(rows)))
