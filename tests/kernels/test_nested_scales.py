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
#: bitsandbytes divides blocks of a smaller maximum by this one in its torch and CUDA kernels, not in C++.
LEAST = torch.tensor(1e-38)
quantize, dequantize = torch.ops.qcompile.quantize, torch.ops.qcompile.dequantize


def weights(kind: str, seed: int = 14) -> torch.Tensor:
    """``[512, 512]``: 4096 blocks of 64, 16 blocks of scales. ``one block``: one of each. ``ragged``: a vector whose
    last block has 21 elements, and whose last block of scales has 203.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 512, generator=generator)
    match kind:
        case "student-t":  # two degrees of freedom: no variance
            return x / (torch.randn(2, 512, 512, generator=generator).square().sum(0) / 2).sqrt()
        case "cauchy":
            return x.cauchy_(generator=generator)
        case "zero blocks":
            x.view(-1, 64)[::3] = 0.0
        case "tiny blocks":  # 10^-45 … 1: subnormal maxima, and maxima whose reciprocal is not finite
            x.view(-1, 64).mul_(10.0 ** -torch.linspace(0, 45, 4096, dtype=torch.float64)[:, None])
        case "tiny":  # scales of scales are subnormal too
            return x * 1e-39
        case "one block":
            return x[0, :64]
        case "ragged":
            return x.reshape(-1)[: 203 * 64 - 43]
        case "bfloat16":
            return x.bfloat16()
    return x


KINDS = [
    *(("random", seed) for seed in range(3)),
    *(("student-t", seed) for seed in range(3)),
    *(("cauchy", seed) for seed in range(4)),
    *((kind, 14) for kind in ("zero blocks", "tiny blocks", "tiny", "one block", "ragged", "bfloat16")),
]


def swapped(codes: torch.Tensor) -> torch.Tensor:
    """bitsandbytes has the first of two codes in the high half of a byte, we have it in the low one."""
    return (codes >> 4) | (codes << 4)


def by_table(centred: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Codes of bitsandbytes' C++ kernel (``csrc/cpu_ops.cpp``): [-1, 1] in 65535 equal parts, each with the code that
    is nearest to its middle. Blocks of zeros get code 0. Undefined where a reciprocal overflows.
    """
    middles = -1.0 + (2.0 * torch.arange(65536)).float() / torch.tensor(65535.0)
    table = torch.bucketize(middles, (levels[:-1] + levels[1:]) * 0.5)
    absmax = absmax.repeat_interleave(256)[: centred.numel()]
    y = (centred * (1.0 / absmax)).clamp(-1.0, 1.0).nan_to_num(-1.0)
    return table[((y + 1.0) * 0.5 * 65535.0 + 0.5).long()].to(torch.uint8)


@pytest.mark.parametrize(("kind", "seed"), KINDS)
def test_nf4_and_nested_scales_are_those_of_bitsandbytes(kind, seed):
    """Bitwise: NF4 codes, absolute maxima, scales of scales, the offset; codes of scales as its torch kernel has them,
    which rounds to the nearest. Its C++ kernel looks codes up by the 65536th of the range that a scale is in: its codes
    are those of that table, and where they differ from ours, its level is farther away (0.1 to 0.3 % of the codes of
    normal data, up to 1.3 % of Cauchy's). Its bytes decode to its own numbers.
    """
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = weights(kind, seed)
    theirs, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)
    plain = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)[1]
    codes, absmax = quantize(x, NF4, -1)
    whole = x.numel() // 2  # bytes of two codes; bitsandbytes fills the last one with the code of 0, we with zeros
    assert torch.equal(swapped(codes).reshape(-1)[:whole], theirs.reshape(-1)[:whole])
    assert torch.equal(codes.reshape(-1)[whole:] & 15, theirs.reshape(-1)[whole:] >> 4)
    assert torch.equal(absmax.reshape(-1), plain.absmax)

    nested = quantize_scales(absmax, BITSANDBYTES)
    assert torch.equal(nested.scales, state.state2.absmax)
    assert nested.offset is not None
    assert torch.equal(nested.offset, state.offset)
    levels = torch.tensor(FORMATS["dynamic8"].codebook)
    centred = absmax.reshape(-1) - nested.offset
    torch_kernel = torch._C.DispatchKey.CompositeExplicitAutograd
    rounded, _ = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(torch_kernel, centred, levels, 256)
    assert torch.equal(nested.codes, rounded)

    defined = (1.0 / nested.scales).isfinite() | (nested.scales == 0)
    assert defined.all() or kind == "tiny"
    spread = defined.repeat_interleave(256)[: centred.numel()]
    table = by_table(centred, nested.scales, levels)
    assert torch.equal(state.absmax[spread], table[spread])
    # Otherwise than C++, the torch kernel does not divide by less than LEAST.
    compared = spread & (nested.scales >= LEAST).repeat_interleave(256)[: centred.numel()]
    y = (centred * (1.0 / nested.scales.clamp(min=LEAST)).repeat_interleave(256)[: centred.numel()])[compared]
    ours, others = ((y - levels[c[compared].long()]).abs() for c in (nested.codes, state.absmax))
    differing = (nested.codes != state.absmax)[compared]
    assert (ours < others)[differing].all()

    coded = CodedScales(state.absmax, state.state2.absmax, state.offset, absmax.shape)
    decoded = dequantize_scales(coded, BITSANDBYTES)
    expected = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(decoded.reshape(-1), expected)
    packed = swapped(theirs).reshape(codes.shape)
    values = dequantize(packed, decoded, NF4, -1, x.shape[-1], x.dtype)
    assert torch.equal(values, bnb.dequantize_4bit(theirs, state).reshape(x.shape))


def test_where_all_nested_codes_differ_they_decode_alike():
    """Scales that are all their mean, as one block has: bitsandbytes' C++ writes code 0 to blocks of zeros, we write
    that of 0. An infinite element: the mean is infinite, and what is left is no number on either side.
    """
    bnb = pytest.importorskip("bitsandbytes.functional")
    for x in (weights("one block"), torch.ones(5 * 64), torch.full((64 * 9,), float("inf"))):
        state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64, compress_statistics=True)[1]
        _, absmax = quantize(x, NF4, -1)
        nested = quantize_scales(absmax, BITSANDBYTES)
        assert (nested.codes != state.absmax).all()
        theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(dequantize_scales(nested, BITSANDBYTES).isfinite(), theirs.isfinite())
        if x.isfinite().all():
            assert torch.equal(dequantize_scales(nested, BITSANDBYTES), theirs)


@pytest.mark.parametrize("kind", ["random", "cauchy", "zero blocks", "tiny blocks", "bfloat16"])
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
