"""The Triton kernel that quantizes in blocks, without a GPU: codes and scales in Triton's interpreter equal the
reference's bit for bit, and the machine code for Hopper.
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")

from qcompile.ir.quantizer import Quantizer  # noqa: E402
from qcompile.kernels.quantize import reference, triton_blocks  # noqa: E402
from qcompile.kernels.quantize.block_grid import SPAN, block_grid_of, why_not_in_blocks  # noqa: E402

from .harness import compiled, interpreted, run_interpreted  # noqa: E402
from .test_triton_quantize import launches_of, machine_code, on_meta  # noqa: E402

BF16 = torch.bfloat16
#: What the recipes of full FP4 quantize by, less candidates and squares.
QUANTIZERS = [
    "e2m1 block16 e4m3 even",
    "e2m1 block16 e4m3 stochastic",
    "e2m1 block16 e4m3_eden eden",
    "int4 block16 e4m3 stochastic",
    "int4 block16 e4m3 even",
    "e2m1 block32 e8m0 even",
    "e2m1 block32 e8m0_ceil stochastic",
    "e2m1 block16 e5m3 even",
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


def inputs(shape: tuple[int, ...], text: str, axis: int) -> tuple:
    """Arguments of ``qcompile::quantize``; blocks of zeros, tiny and huge ones, with NaN and infinity among them."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = x.movedim(axis, -1)
    rows[0, :40] = 0.0
    rows[1] *= 2.0**-120
    rows[2] *= 2.0**100
    rows[3, 5], rows[3, 21], rows[3, 33] = float("nan"), float("inf"), -0.0
    q = Quantizer.parse(text)
    whole = torch.tensor(0.013) if q.scale.two_level else None
    seed = torch.tensor([-(2**40) + 12345]) if q.draws else None
    return x.to(BF16), text, axis, whole, seed


def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize(("shape", "axis"), [((5, 384), -1), ((256, 70), 0), ((5, 80), -1), ((48, 5), 0)])
def test_interpreted_blocks(shape, axis, text):
    """Along either axis, in whole and in part-filled spans, codes and bits of scales."""
    x, *arguments = inputs(shape, text, axis)
    codes, scales = triton_blocks.quantize_blocks(x, *arguments)
    expected = reference.quantize(x, *arguments)
    assert torch.equal(codes, expected[0])
    assert scales.dtype == expected[1].dtype
    assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))


@interpreted
def test_interpreted_batch_and_odd_sizes():
    """Leading axes are rows; a last block may be short, and a last byte half full."""
    x = torch.randn(2, 3, 77, generator=torch.Generator().manual_seed(0))
    arguments = "e2m1 block16 e4m3 even", -1, torch.tensor(0.02)
    found, expected = triton_blocks.quantize_blocks(x, *arguments), reference.quantize(x, *arguments)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.uint8), expected[1].view(torch.uint8))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("e2m1 row absmax even", "row scales, not those of blocks that divide 128"),
        ("e2m1 block16x16 e4m3 even", "block16x16 scales, not those of blocks that divide 128"),
        ("e2m1 block16 e4m3_46 even", "e4m3_46 scales of e2m1, which are chosen among candidates"),
        ("e2m1 block32 absmax even", "absmax scales, which are no absolute maxima in one byte"),
        ("midrise4 block32 e8m0 even", "midrise4, whose code 0 is not the level 0, or of which more than two share"),
    ],
)
def test_what_the_kernel_leaves_to_others(text, reason):
    """The reason names what stands in the way; asked for its constants all the same, the quantizer is refused."""
    assert why_not_in_blocks(Quantizer.parse(text)).startswith(reason)
    assert triton_blocks.supports_blocks((BF16,), text, "") == (False, why_not_in_blocks(Quantizer.parse(text)))
    with pytest.raises(ValueError, match="no kernel in blocks"):
        block_grid_of(text)


def test_a_rotation_is_left_to_others():
    supported, reason = triton_blocks.supports_blocks((BF16,), QUANTIZERS[0], "hadamard(16)")
    assert (supported, reason) == (False, "the kernel in blocks does not apply hadamard(16)")
    assert triton_blocks.supports_blocks((BF16,), QUANTIZERS[0], "") == (True, "")


@compiled
@pytest.mark.parametrize(
    ("text", "axis", "most"),
    [
        ("e2m1 block16 e4m3_eden eden", -1, 70),
        ("e2m1 block16 e4m3_eden eden", 0, 90),
        ("e2m1 block16 e4m3 stochastic", -1, 60),
        ("e2m1 block16 e4m3 stochastic", 0, 60),
    ],
)
def test_machine_code(text, axis, most, tmp_path):
    """One kernel; nothing is spilled, divided approximately or flushed to 0; instructions per element are few."""
    x, whole, seed = on_meta(1024, 2048), on_meta(1, dtype=torch.float32), on_meta(1, dtype=torch.int64)
    (kernel,) = launches_of(lambda: triton_blocks.quantize_blocks(x, text, axis, whole, seed))
    assert "div.rn.f32" in kernel.asm["ptx"]
    assert not re.search(r"div\.full|(?<!cvt\.rmi)\.ftz", kernel.asm["ptx"])  # of what is below 1 the floor is 0 anyway
    instructions = machine_code(kernel, tmp_path)
    assert "STL" not in instructions
    elements = triton_blocks.ROWS * SPAN / 32 / kernel.metadata.num_warps
    assert (len(instructions) - instructions.count("NOP")) / elements < most
