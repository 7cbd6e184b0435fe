"""Scale rules that try candidates by block: Four over Six (arXiv 2512.02010)."""

from __future__ import annotations

import pytest
import torch

import qcompile.kernels  # noqa: F401
from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.ops import global_scale_of
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.estimate import cpp as estimate_cpp
from qcompile.kernels.estimate import inductor as estimate_inductor
from qcompile.kernels.estimate import reference as estimate
from qcompile.kernels.quantize import cpp, inductor, reference
from qcompile.kernels.register import provider_of

RULE = "e2m1 block16 e4m3_46"


def values(rows: int, columns: int) -> torch.Tensor:
    """Normal noise; blocks of zeros, tiny and huge ones, NaN and infinity where a row begins."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    x[1] *= 1e-30
    x[2] = 0.0
    x[3, :7] *= 300.0
    x[4] = x[4].round()
    return x


def quantized(x: torch.Tensor, text: str) -> tuple[torch.Tensor, ...]:
    whole = global_scale_of(x, Quantizer.parse(text))
    codes, scales = reference.quantize(x, text, -1, whole)
    return codes, scales, whole, reference.dequantize(codes, scales, text, -1, x.shape[-1], torch.float32, whole)


def four_over_six(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm of the paper in float64 and plain torch: values and the blocks' E4M3 scales."""
    blocks = x.unflatten(-1, (-1, 16))
    alpha = x.abs().amax() / (6 * 256)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    best = None
    for factor in (1.0, 1.5):
        scale = (blocks.abs().amax(-1) / 6 * factor / alpha).to(torch.float8_e4m3fn)
        s = (scale.float() * alpha).double()[..., None]
        magnitude = (blocks.double().abs() / s)[..., None]
        distance = (magnitude.clamp(max=6) - levels).abs()
        near = levels[distance.argmin(-1)] * blocks.sign() * s
        error = (near - blocks).square().sum(-1)
        if best is None:
            best = error, scale.float(), near
        else:
            less = error < best[0] * (1 - 1e-6)
            best = best[0], torch.where(less, scale.float(), best[1]), torch.where(less[..., None], near, best[2])
    return best[2].flatten(-2), best[1]


def test_four_over_six_is_that_of_the_paper():
    """Scales by the algorithm written out, but for ties of float64; 7.56e-3 of N(0, 1) where NVFP4 has 9.04e-3."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    _, scales, _, back = quantized(x, RULE)
    expected, expected_scales = four_over_six(x)
    same = scales.float() == expected_scales
    assert same.float().mean() > 0.9999
    everywhere = same.repeat_interleave(16, -1)
    torch.testing.assert_close(back[everywhere].double(), expected[everywhere], rtol=1e-6, atol=2e-6)
    error, plain = ((b - x).square().mean().item() for b in (back, quantized(x, "e2m1 block16 e4m3")[3]))
    assert abs(error - 7.56e-3) < 0.05e-3
    assert abs(plain - 9.04e-3) < 0.1e-3
    fours = scales.float() > (x.unflatten(-1, (-1, 16)).abs().amax(-1) / 6 * 1.2 * 1536 / x.abs().amax())
    assert 0.4 < fours.float().mean() < 0.5, "45 % of the blocks end at 4"


def test_no_block_errs_more_than_with_the_first_candidate():
    """Per block, on every kind of value: the choice is the least of two, and ties keep the first."""
    x = values(12, 160)
    q = Quantizer.parse(RULE)
    whole = global_scale_of(x, q)
    _, scales, _, back = quantized(x, RULE)
    statistic = reference.group_statistic(x, x, q)
    first, scale, gamma = reference.scale_pair(statistic, q, whole)
    codes = reference.encode(x * reference.spread(gamma, x.shape, q), q)
    plain = reference.decode(codes, q.format) * reference.spread(scale, x.shape, q)
    error, at_first = ((b - x).double().square().unflatten(-1, (-1, 16)).sum(-1) for b in (back, plain))
    assert (error <= at_first).all()
    assert (scales.float() == first.float())[error == at_first].all()
    assert (error < at_first).any()


@pytest.mark.parametrize(
    "text",
    [
        RULE,
        "e2m1 block16 e4m3_46_mae",
        "e2m1 block5 e4m3_46 half_up",
        "e2m1 block4x4 e4m3_46",
        "midrise4 block16 e4m3_46",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_chooses_as_the_reference(text, dtype):
    """Codes, scales and masks bit for bit; odd sizes, short last blocks, values that are not finite."""
    x = values(13, 38).to(dtype)
    for broken in (None, float("nan"), float("inf")):
        if broken is not None:
            x[6, 2] = broken
        whole = global_scale_of(torch.nan_to_num(x.float(), posinf=9.0), Quantizer.parse(text))
        assert cpp.supports_quantize((dtype,), text) == (True, "")
        codes, scales = cpp.quantize(x, text, -1, whole)
        expected, expected_scales = reference.quantize(x, text, -1, whole)
        assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))
        assert torch.equal(codes, expected)
        mask = estimate_cpp.estimator_mask(x, scales, text, "trust(t=0.3)", -1, whole)
        assert torch.equal(mask, estimate.estimator_mask(x, scales, text, "trust(t=0.3)", -1, whole))


def test_other_measures_and_ranges_of_scales():
    """By absolute errors other blocks end at 4; with all of E4M3 the largest block has nothing above its 448."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    squared, absolute, wide = (quantized(x, f"e2m1 block16 e4m3_46{kind}") for kind in ("", "_mae", "_448"))
    off = [(back - x).abs().unflatten(-1, (-1, 16)) for *_, back in (squared, absolute)]
    differs = squared[1].float() != absolute[1].float()
    assert 0.02 < differs.float().mean() < 0.2
    assert (off[0].square().sum(-1) <= off[1].square().sum(-1))[differs].all()
    assert (off[1].sum(-1) <= off[0].sum(-1))[differs].all()
    assert 256 <= squared[1].float().amax() <= 384
    assert wide[1].float().amax() == 448


def test_scales_of_five_exponent_bits():
    """A block 2⁻²⁰ below the largest keeps its values, which E4M3 scales lose."""
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    x[1] *= 2.0**-20
    for rule, kept in (("e4m3", False), ("e5m3", True)):
        codes, scales, whole, back = quantized(x, f"e2m1 block16 {rule}")
        assert ((back[1] - x[1]).norm() < 0.2 * x[1].norm()) == kept
        ours = cpp.quantize(x, f"e2m1 block16 {rule}", -1, whole)
        assert torch.equal(ours[0], codes)
        assert torch.equal(ours[1].view(torch.uint8), scales.view(torch.uint8))


def test_a_choice_does_not_depend_on_the_order_of_elements():
    """Every provider adds in an order of its own; sums of integers are the same."""
    x = torch.randn(64, 64, 16, generator=torch.Generator().manual_seed(5)).exp()
    mixed = x[..., torch.randperm(16, generator=torch.Generator().manual_seed(6))]
    q = Quantizer.parse(RULE)
    whole = global_scale_of(x, q)
    errors = []
    for values in (x.flatten(-2), mixed.flatten(-2)):
        amax = reference.group_statistic(values, values, q)
        _, scale, gamma = reference.scale_pair(amax, q, whole)
        errors.append(reference._error(values, amax, scale, gamma, q))
    assert errors[0].dtype == torch.int64
    assert torch.equal(*errors)


def test_who_chooses():
    """Generated Triton as C++ does; what compares levels can only be printed for few of them."""
    q = Quantizer.parse(RULE)
    assert inductor.supports_quantize(q) == inductor.supports_dequantize(q) == (True, "")
    assert estimate_inductor.supports_estimator_mask(q, EstimatorSpec.parse("clip")) == (True, "")
    assert provider_of("quantize", "cuda", RULE, torch.bfloat16) == ("triton", "")
    many, reason = "dynamic8 block16 e4m3_46", (False, "dynamic8 is a code book of more than 16 levels")
    assert inductor.supports_quantize(Quantizer.parse(many)) == reason
    assert cpp.supports_quantize((torch.float32,), many) == reason
    for text, message in {
        "e2m1 row e4m3_46": "scale rule e4m3_46 chooses by blocks, for example block16; got row",
        "e2m1 block2048x2048 e4m3_46": "adds up errors of at most 2097151 elements; got block2048x2048",
    }.items():
        with pytest.raises(ValueError, match=message):
            Quantizer.parse(text)
