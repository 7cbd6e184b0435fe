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

from .emulator import emulate  # noqa: E402
from .harness import compiled, interpreted, launching, run_interpreted  # noqa: E402
from .test_triton_quantize import compile_for_hopper, launches_of, machine_code, on_meta  # noqa: E402

BF16 = torch.bfloat16
#: What the recipes of full FP4 quantize by, and what else is chosen or rounded otherwise.
QUANTIZERS = [
    "e2m1 block16 e4m3 even",
    "e2m1 block16 e4m3 stochastic",
    "e2m1 block16 e4m3_eden eden",
    "int4 block16 e4m3 stochastic",
    "int4 block16 e4m3 even",
    "e2m1 block32 e8m0 even",
    "e2m1 block32 e8m0_ceil stochastic",
    "e2m1 block16 e5m3 even",
    "e2m1 block16 e4m3_46",
    "e2m1 block16 e4m3_46_mae_448 half_up",
    "e2m1/int4 block16 e4m3",
    "e2m1/int4 block16 e4m3 stochastic",
    "int4/e2m1 block8 e4m3_46",
    "e2m1 block16x16 e4m3",
    "e2m1 block16x16 e4m3_46 stochastic",
    "e2m1/int4 block16x16 e4m3",
    "e4m3 block32x32 e8m0",
]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")


def inputs(shape: tuple[int, ...], text: str, axis: int) -> tuple:
    """Arguments of ``qcompile::quantize``; blocks of zeros, tiny and huge ones, with NaN and infinity among them, and
    ties. Squares have all of it, and one after the other.
    """
    x, q = torch.randn(shape, generator=torch.Generator().manual_seed(0)), Quantizer.parse(text)
    rows, step = x.movedim(axis, -1), q.granularity.size if q.granularity.kind == "square" else 1
    rows[0, :40] = 0.0
    rows[:step, -9:] = 0.0
    rows[step % len(rows)] *= 2.0**-120
    rows[2 * step % len(rows)] *= 2.0**100
    last = rows[3 * step % len(rows)]
    last[5], last[21], last[33] = float("nan"), float("inf"), -0.0
    rows[-1, :16] = torch.tensor(
        [*(0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0), *(-0.25, -2.5, -5.0, 4.0, 0.0, 1.0, 3.0, 2.0)]
    )
    whole = torch.tensor(0.013) if q.scale.two_level else None
    seed = torch.tensor([-(2**40) + 12345]) if q.draws else None
    return x.to(BF16), text, axis, whole, seed


@pytest.mark.slow
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize(("shape", "axis"), [((37, 150), -1), ((160, 70), 0), ((48, 5), 0)])
def test_interpreted_blocks(shape, axis, text):
    """Along either axis, in whole and in part-filled spans, codes and bits of scales."""
    assert_as_the_reference(*inputs(shape, text, axis))


def assert_as_the_reference(x: torch.Tensor, *arguments) -> None:
    codes, scales = triton_blocks.quantize_blocks(x, *arguments)
    expected = reference.quantize(x, *arguments)
    assert torch.equal(codes, expected[0])
    assert scales.dtype == expected[1].dtype
    assert torch.equal(scales.view(torch.uint8), expected[1].view(torch.uint8))


@interpreted
@pytest.mark.parametrize("text", ["e2m1 block16 e4m3", "e2m1/int4 block16 e4m3 stochastic", "e2m1 block16x16 e4m3"])
@pytest.mark.parametrize(("shape", "axis"), [((2, 19, 77), -1), ((3, 32, 21), 1), ((2, 2, 16, 40), -2), ((77,), -1)])
def test_interpreted_batches_and_odd_sizes(shape, axis, text):
    """Squares end with their matrix, and draws go on; a last block may be short, and a last byte half full."""
    if len(shape) == 1 and "x16" in text:
        pytest.skip("a vector has no squares")
    x, q = torch.randn(shape, generator=torch.Generator().manual_seed(0)), Quantizer.parse(text)
    assert_as_the_reference(x, text, axis, torch.tensor(0.02), torch.tensor([7]) if q.draws else None)


@interpreted
@pytest.mark.parametrize("size", [2, 4])
def test_interpreted_blocks_shorter_than_a_word(size):
    """Eight neighbours along K, whose codes one thread could write at once, are in more than one of them."""
    assert_as_the_reference(*inputs((64, 9), f"e2m1 block{size} e4m3", 0))


@interpreted
def test_interpreted_ties_between_candidates_keep_the_first():
    """A block of fours is exact at either end, 6 · s and 4 · s · 1.5: the scale is that of 6."""
    x, whole = torch.full((16, 16), 4.0), torch.tensor(1.0 / 6)
    for axis in (-1, 0):
        _, scales = triton_blocks.quantize_blocks(x, "e2m1 block16 e4m3_46", axis, whole)
        assert set(scales.float().flatten().tolist()) == {4.0}
        assert_as_the_reference(x, "e2m1 block16 e4m3_46", axis, whole)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("e2m1 row absmax even", "row scales, not those of blocks that divide 128"),
        (
            "e2m1 block128x128 e4m3",
            "block128x128 scales, not those of blocks that divide 128 or of squares that divide",
        ),
        ("e2m1/midrise4 block16 e4m3", "e2m1/midrise4, whose code 0 is not the level 0"),
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
        ("e2m1 block16 e4m3_46", -1, 90),
        ("e2m1 block16 e4m3_46", 0, 90),
        ("e2m1/int4 block16 e4m3 stochastic", -1, 120),
        ("e2m1/int4 block16 e4m3 stochastic", 0, 120),
        ("e2m1/int4 block16x16 e4m3", -1, 105),  # 104 by Triton 3.8
        ("e2m1/int4 block16x16 e4m3", 0, 100),
        ("e2m1 block16x16 e4m3", -1, 45),
    ],
)
def test_machine_code(text, axis, most, tmp_path):
    """One kernel; nothing is spilled, divided approximately or flushed to 0; elements come in vectors, and instructions
    per element are few: the printed ones, of which those in loops run several times.
    """
    x, whole, seed = on_meta(1024, 2048), on_meta(1, dtype=torch.float32), on_meta(1, dtype=torch.int64)
    (kernel,) = launches_of(lambda: triton_blocks.quantize_blocks(x, text, axis, whole, seed))
    assert "div.rn.f32" in kernel.asm["ptx"]
    assert set(re.findall(r"ld\.global\S*\.(v\d)", kernel.asm["ptx"])) == {"v2" if axis == 0 else "v4"}
    assert not re.search(r"div\.full|(?<!cvt\.rmi)\.ftz", kernel.asm["ptx"])  # of what is below 1 the floor is 0 anyway
    instructions = machine_code(kernel, tmp_path)
    assert "STL" not in instructions
    elements = triton_blocks.ROWS * SPAN / 32 / kernel.metadata.num_warps
    assert (len(instructions) - instructions.count("NOP")) / elements < most


@compiled
@pytest.mark.parametrize(
    "text", ["e2m1 block16x16 e4m3", "e2m1 block16x16 e4m3_46", "e4m3 block32x32 e8m0", "e2m1 block16 e4m3"]
)
def test_machine_code_runs_as_the_reference_says(text):
    """With vectors of elements in a thread and two rows in a warp, which no interpreter has. Lanes that share a square
    do not follow on each other then, and Triton took others for them where rows and columns were reduced at once.
    """
    x, *arguments = inputs((144, 192), text, -1)

    def launch(kernel, programs, *given, num_warps, **constants):
        built = compile_for_hopper(kernel, given, constants, num_warps, None)
        emulate(
            built.asm["ptx"],
            [value for value in given if isinstance(value, torch.Tensor) or value not in (None, 1)],
            (programs,),
            num_warps,
        )

    with launching(launch):
        assert_as_the_reference(x, *arguments)
