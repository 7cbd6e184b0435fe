"""Rounding by chance: stochastic codes, and scales that MS-EDEN corrects and rounds stochastically.

``QUARTET2`` is what the released Triton kernel of Quartet II (8776a90, without its rotation) made of
:func:`quartet2_input`: the SHA-256 of its codes, 16 digits, and its scales.
"""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from qcompile.ir.ops import global_scale_of
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize import cpp, reference
from qcompile.kernels.transform.reference import rotate

EDEN = "e2m1 block16 e4m3_eden eden"
QUARTET2 = (
    "23e39aae897a856e",
    "71776e7776727672776d7676727772776e7771777177776f78707870787870786a756a757375756a756c757276766b7672766c7675737573756c76"
    "767376737570786f786f777771776e776e777771766d7672777276766d7771777177776e7774746b7474747575746a74747574757571776d767672"
    "7673766d7776737772766e7771777078786f77707870787870786b756a757375766b766b767276766c7673756c7575737572756b75747374737470"
    "7770786e777771776e776e777771766c7672767177776d7771777177776e7774756b7474747475756a75737573757572766d7676727672766c7675"
    "737573756f787078707878707870797078787077",
)


def quartet2_input() -> Tensor:
    i, j = torch.arange(16).double()[:, None], torch.arange(256).double()
    return (((37 * i + 101 * j) % 257 - 128) / 64 * 2 ** ((i + 3 * j) % 7 - 3)).float()


def quantized(x: Tensor, text: str, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and what they stand for."""
    whole = global_scale_of(x, Quantizer.parse(text))
    codes, scales = reference.quantize(x, text, -1, whole, torch.tensor([seed]))
    return codes, scales, reference.dequantize(codes, scales, text, -1, x.shape[-1], torch.float32, whole)


def neighbours(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every block: MS-EDEN's scale before it is rounded (float64), and the E4M3 numbers below and above it."""
    clip = 17 / 16 * 0.93
    blocks = x.double().unflatten(-1, (-1, 16))
    whole = x.abs().max().double() / 255.99 / (6 / clip)
    scale = (blocks.abs().amax(-1) / (6 / clip) / whole).float().to(torch.float8_e4m3fn).double()
    y = blocks / (scale * whole)[..., None]
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).double()
    level = levels[(y.abs()[..., None].clamp(max=6) - levels).abs().argmin(-1)] * y.sign()
    squares, products = (v.flatten(-2).unflatten(-1, (-1, 128)).sum(-1, keepdim=True) for v in (y * y, y * level))
    exact = scale * (squares / products).repeat_interleave(8, -1).reshape(scale.shape)
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    above = torch.searchsorted(numbers, exact)
    return exact, numbers[above - 1], numbers[above]


def test_codes_are_those_of_quartet2_and_scales_one_of_the_same_two() -> None:
    """All 4096 codes; ties to even here and in its CUDA kernels, away from zero in the Triton kernel: none is one. Each
    of the 256 scales is drawn, by ours and by theirs, from the two neighbours of the same number.
    """
    x = quartet2_input()
    codes, scales, _ = quantized(x, EDEN)
    assert hashlib.sha256(codes.numpy().tobytes()).hexdigest()[:16] == QUARTET2[0]
    theirs = torch.frombuffer(bytearray.fromhex(QUARTET2[1]), dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    _, below, above = neighbours(x)
    for drawn in (scales.double(), theirs.double()):
        assert ((drawn == below) | (drawn == above)).all()
    assert not torch.equal(scales.view(torch.uint8), theirs.view(torch.uint8))


def test_scales_are_drawn_by_distance() -> None:
    """Their mean over seeds is the corrected scale; 200 draws of 256 blocks."""
    x = quartet2_input()
    exact, below, above = neighbours(x)
    mean = torch.stack([quantized(x, EDEN, seed)[1].double() for seed in range(200)]).mean(0)
    step = above - below
    assert ((mean - exact).abs() < 4.5 * step / 2 / math.sqrt(200)).all()
    assert ((exact - below) / step).std() > 0.2, "all kinds of distances"


def test_rotated_by_drawn_signs_the_mean_is_the_tensor() -> None:
    """128 draws of signs and scales: the error falls to the noise of so many; of nearest rounding it does not."""
    generator, count = torch.Generator().manual_seed(0), 128
    x = torch.randn(4, 256, generator=generator)
    total, plain = torch.zeros_like(x), torch.zeros_like(x)
    one = 0.0
    for draw in range(count):
        signs = (torch.randint(0, 2, (128,), generator=generator) * 2.0 - 1).repeat(2)
        back = rotate(quantized(rotate(x * signs, 128), EDEN, draw)[2], 128) * signs
        one += ((back - x).square().sum() / x.square().sum()).item() / count
        total, plain = total + back / count, plain + quantized(x, "e2m1 block16 e4m3")[2] / count
    error, stuck = (((mean - x).square().sum() / x.square().sum()).item() for mean in (total, plain))
    assert error < 1.3 * one / count
    assert stuck > 50 * error


TEXTS = [
    EDEN,
    "int4 block8 e4m3_eden eden",
    "e2m1 block16 e4m3 stochastic",
    "e2m1 block16x16 e4m3 stochastic",
    "int4 block32 e8m0_ceil stochastic",
    "e3m0 row stochastic",
    "e5m2 tensor stochastic",
    "e2m1/int4 block16 e4m3 stochastic",
    "e2m1 block4x4 e4m3_46 stochastic",
]


@pytest.mark.parametrize("text", TEXTS)
def test_cpp_draws_as_the_reference(text: str) -> None:
    """Bit for bit: the same numbers are drawn for the same places. Short last blocks and chunks, no finite values."""
    x = torch.randn(37, 300, generator=torch.Generator().manual_seed(3))
    x[1], x[2], x[4] = x[1] * 1e-30, 0.0, x[4].round()
    seed, q = torch.tensor([2**31 - 2]), Quantizer.parse(text)
    whole = global_scale_of(x, q)
    for broken in (None, float("nan"), float("inf")):
        if broken is not None:
            x[6, 2] = broken
        assert cpp.supports_quantize((x.dtype,), text) == (True, "")
        codes, scales = cpp.quantize(x, text, -1, whole, seed)
        expected, expected_scales = reference.quantize(x, text, -1, whole, seed)
        assert torch.equal(codes, expected)
        assert torch.equal(scales.view(torch.uint8), expected_scales.view(torch.uint8))


def test_what_has_no_formula_is_left_to_the_reference() -> None:
    reason = "stochastic rounding to nf4, which is neither uniform nor a minifloat, has no C++ kernel"
    assert cpp.supports_quantize((torch.float32,), "nf4 stochastic") == (False, reason)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e2m1 row eden", "eden corrects the blocks of 128 elements, for example block16; got row"),
        ("e2m1 block48 e4m3 eden", "for example block16; got block48"),
        ("e2m1 block16 eden", "takes a rule with e4m3, e5m2, for example e4m3_eden; got absmax"),
        ("e2m1 block16 e4m3_46 eden", "lets blocks choose; use e4m3_eden"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer.parse(text)
