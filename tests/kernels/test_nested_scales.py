"""Nested scales, and NF4, against bitsandbytes' own CPU kernels."""

from __future__ import annotations

import pytest
import torch

import qcompile.kernels  # noqa: F401
from qcompile.ir.formats import FORMATS
from qcompile.ir.nested import BITSANDBYTES, NestedScales
from qcompile.kernels.quantize import reference
from qcompile.kernels.quantize.nested import CodedScales, dequantize_scales, quantize_scales

NF4 = "nf4 block64 absmax_bnb"
quantize, dequantize = torch.ops.qcompile.quantize, torch.ops.qcompile.dequantize


def weights(kind: str) -> torch.Tensor:
    """``[512, 512]``: 4096 blocks of 64, 16 blocks of scales."""
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(14))
    match kind:
        case "heavy-tailed":
            return x / x.roll(1).abs().clamp(min=1e-3)  # Cauchy's distribution, but for the end of its tail
        case "zero blocks":
            x.view(-1, 64)[::3] = 0.0
        case "tiny blocks":  # 10^-45 … 1: subnormal maxima, and maxima whose reciprocal is not finite
            x.view(-1, 64).mul_(10.0 ** -torch.linspace(0, 45, 4096, dtype=torch.float64)[:, None])
        case "bfloat16":
            return x.bfloat16()
    return x


KINDS = ["random", "heavy-tailed", "zero blocks", "tiny blocks", "bfloat16"]


def swapped(codes: torch.Tensor) -> torch.Tensor:
    """bitsandbytes has the first of two codes in the high half of a byte, we have it in the low one."""
    return (codes >> 4) | (codes << 4)


@pytest.mark.parametrize("kind", KINDS)
def test_nf4_and_nested_scales_are_those_of_bitsandbytes(kind):
    """Codes, absolute maxima, scales of scales and the offset bitwise. Few codes of scales differ (0.1 to 0.2 % of
    normal data, more of tails), where its CPU look-up table rounds to a level that is farther away. Its bytes decode to
    its own numbers.
    """
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = weights(kind)
    theirs, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)
    plain = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)[1]
    codes, absmax = quantize(x, NF4, -1)
    assert torch.equal(swapped(codes).reshape(-1), theirs.reshape(-1))
    assert torch.equal(absmax.reshape(-1), plain.absmax)

    nested = quantize_scales(absmax, BITSANDBYTES)
    assert torch.equal(nested.scales, state.state2.absmax)
    assert nested.offset is not None
    assert torch.equal(nested.offset, state.offset)
    differing = nested.codes != state.absmax
    assert differing.float().mean() < (0.005 if kind == "heavy-tailed" else 0.002)
    levels = torch.tensor(FORMATS["dynamic8"].codebook)
    y = (absmax.reshape(-1) - nested.offset) * (1 / nested.scales).repeat_interleave(256)
    ours, others = ((y - levels[c.long()]).abs()[differing] for c in (nested.codes, state.absmax))
    assert (ours <= others).all()

    coded = CodedScales(state.absmax, state.state2.absmax, state.offset, absmax.shape)
    decoded = dequantize_scales(coded, BITSANDBYTES)
    expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(decoded.reshape(-1), expected)
    values = dequantize(swapped(theirs).reshape(codes.shape), decoded, NF4, -1, 512, x.dtype)
    assert torch.equal(values, bnb.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("kind", KINDS)
def test_fp4_is_that_of_bitsandbytes(kind):
    """The unsorted code book; its two zeros are told apart by a sign that its default kernel does not keep."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = weights(kind)
    theirs, state = bnb.quantize_4bit(x, quant_type="fp4", blocksize=64)
    codes, absmax = quantize(x, "fp4bnb block64 absmax_bnb", -1)
    assert torch.equal(absmax.reshape(-1), state.absmax)
    fmt = FORMATS["fp4bnb"]
    ours, expected = (
        reference.decode(reference.unpack(c, 4, 512), fmt) for c in (codes, swapped(theirs).view(512, -1))
    )
    assert torch.equal(ours, expected)
    values = dequantize(codes, absmax, "fp4bnb block64 absmax_bnb", -1, 512, x.dtype)
    assert torch.equal(values, bnb.dequantize_4bit(theirs, state))


def test_the_code_books_are_those_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional")
    for name, fmt in (("nf4", "nf4"), ("fp4", "fp4bnb")):
        assert torch.equal(bnb.get_4bit_type(name, device="cpu"), torch.tensor(FORMATS[fmt].codebook))
    assert torch.equal(bnb.get_4bit_type("af4", device="cpu"), torch.tensor(FORMATS["af4"].codebook).flip(0))
    assert torch.equal(bnb.create_dynamic_map(), torch.tensor(FORMATS["dynamic8"].codebook))


@pytest.mark.parametrize(
    "text", ["dynamic8 block256 absmax_bnb even; mean", "e4m3 block16 absmax even", "int4 block7 absmax even; mean"]
)
def test_any_quantizer_of_scales(text):
    """The text form; each scale within half the widest gap of its block's scale; a short last block; shapes."""
    nested = NestedScales.parse(text)
    assert NestedScales.parse(str(nested)) == nested
    scales = torch.rand(3, 5, 41, generator=torch.Generator().manual_seed(2)) + 0.5
    coded = quantize_scales(scales, nested)
    back = dequantize_scales(coded, nested)
    assert back.shape == scales.shape
    n, fmt = nested.quantizer.granularity.size, nested.quantizer.format
    bound = coded.scales.repeat_interleave(n)[: scales.numel()].view(scales.shape) * fmt.half_gap
    assert ((back - scales).abs() <= bound * (1 + 2.0**-20)).all()
    assert (coded.offset is not None) == nested.mean
    constant = quantize_scales(torch.full((4, 9), 0.3), nested)
    torch.testing.assert_close(dequantize_scales(constant, nested), torch.full((4, 9), 0.3), rtol=2.0**-22, atol=0)


def test_what_cannot_be_nested():
    for text, message in {
        "int4 row": r"nested scales int4 row absmax even: scales are one row with .* use block<n> and absmax",
        "e2m1 block16 e4m3": "use block<n> and absmax",
        "int4 block16 absmax stochastic": "scales are rounded to the nearest; use even or half_up",
        "int4 block16; median": "'median' after the quantizer; there may be 'mean'",
    }.items():
        with pytest.raises(ValueError, match=message):
            NestedScales.parse(text)
    with pytest.raises(TypeError, match=r"scales are torch.uint8; those of a rule that stores fp32"):
        quantize_scales(torch.zeros(4, dtype=torch.uint8), BITSANDBYTES)
    with pytest.raises(ValueError, match=r"no scales, shape \(0, 3\)"):
        quantize_scales(torch.zeros(0, 3), BITSANDBYTES)
