"""The Triton kernels of rotated, masked and sparse operands on a GPU, equal to the plain-torch references there bit for
bit: run by hand.

Memory that the caching allocator hands out holds NaN, so an element that a kernel does not write, or one that it reads
past the end of a row, shows. What only a GPU runs: the exchange between threads, inline PTX (floors, packing of codes
and masks), rounding to 16 bits and to FP8, reductions over several warps.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("triton")

from qcompile.ir.formats import FORMATS  # noqa: E402
from qcompile.ir.operand import Operand  # noqa: E402
from qcompile.kernels.estimate import reference as estimate_reference  # noqa: E402
from qcompile.kernels.quantize import reference as quantize_reference  # noqa: E402
from qcompile.kernels.quantize import triton as quantize_kernels  # noqa: E402
from qcompile.kernels.quantize import triton_transformed as kernels  # noqa: E402
from qcompile.kernels.transform import reference  # noqa: E402
from qcompile.kernels.transform import triton as rotations  # noqa: E402
from qcompile.recipes.quest import WIDTHS  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QUEST = {bits: str(operand) for bits, operand in WIDTHS.items() if operand is not None}
MIDRISE4 = QUEST[4]
#: Rows of one block, of whole and of half-filled warps, as long as registers hold, and longer.
SHAPES = [(1, 128), (37, 384), (130, 1152), (300, 2048), (64, 4096), (9, 14336), (7, 16384), (3, 20096)]


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [torch.full((2**n,), 0xFF, dtype=torch.uint8, device="cuda") for n in (9, 14, 18, 20, 22, 23, 25)]
    del blocks


def rows_to_rotate(rows: int, columns: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Normal rows of different size; as far as there are rows: zeros, signs (ties), NaN, infinity, very large and very
    small ones.
    """
    x = torch.randn(rows, columns, device="cuda") * torch.logspace(-3, 3, rows, device="cuda")[:, None]
    if rows > 7:
        x[1] = 0.0
        x[2], x[5], x[6] = x[2].sign(), x[5].sign() * (6e4 if dtype == FP16 else 3e38), x[6] * 1e-30
        x[3, columns // 2], x[4, columns // 3] = float("nan"), -float("inf")
    return x.to(dtype)


def assert_same(actual, expected, what: object = "") -> None:
    """Equal bits, except that any NaN equals any other."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), (what, i)
        if a.dtype.is_floating_point and a.element_size() > 1:
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{what}[{i}]: {m}")
        else:
            differing = (a.contiguous().view(torch.uint8) != e.contiguous().view(torch.uint8)).nonzero()
            assert not len(differing), (what, i, len(differing), differing[:5].tolist())


def assert_quantizes(x: torch.Tensor, operand: str, packed: bool = True) -> None:
    actual = kernels.quantize_8bit_masked(x, operand, packed)
    assert_same(actual, quantize_reference.quantize_8bit_masked(x, operand, packed), (operand, tuple(x.shape), x.dtype))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("bits", QUEST)
def test_widths(bits, dtype):
    """Every operand of the recipe, rotated and not, on rows of every length and kind."""
    for shape in SHAPES:
        x = rows_to_rotate(*shape, dtype)
        assert_quantizes(x, QUEST[bits])
        assert_quantizes(x[:, :-3], QUEST[bits].replace("; hadamard(128)", ""))


@pytest.mark.parametrize(
    "text", [MIDRISE4, QUEST[1], QUEST[3], QUEST[7], "midrise4 row absmax half_up; trust; hadamard(128)"]
)
def test_more_rows_than_programs(text):
    """Persistent programs: what is left of one row must not reach the next; some take a row less than others."""
    for shape in ((5000, 2048), (2500, 4096), (600, 14336)):
        assert_quantizes(rows_to_rotate(*shape, BF16), text)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_rotations(block):
    """Blocks within a run, a thread, a warp, a program; sizes that are no power of two or no multiple of a run."""
    for size in (block, 3 * block, 5 * block, 37 * block):
        for dtype in (BF16, FP32):
            x = rows_to_rotate(19, size, dtype)
            if size <= 16384:
                assert_quantizes(x, f"midrise4 row rms half_up; trust; hadamard({block})")
                assert_quantizes(x, f"e2m1 row absmax even; clip; hadamard({block})", packed=False)
            assert_same([rotations.hadamard(x, block, -1)], [reference.hadamard(x, block, -1)], (block, size))


@pytest.mark.parametrize(
    "text",
    [
        "e2m1 row rms even; trust(t=0.6541); hadamard(128)",
        "midrise4 row rms half_up; trust(t=0.25); hadamard(32)",
        "midrise2 row rms half_up; clip(s=1.25)",
        "midrise4 row absmax even; trust; hadamard(64)",
        "e3m0 row absmax_pow2 half_up; clip; hadamard(128)",
        "e4m3 row rms even; trust; hadamard(128)",
        "e5m2 row absmax even; ste; hadamard(128)",
        "midrise4 row rms half_up; ste; hadamard(16)",
        "midrise4p row rms half_up; trust; hadamard(128); sparse(4:8)",
        "midrise3p row rms half_up; trust; hadamard(128); sparse(2:4)",
        "midrise1p row rms half_up; clip; sparse(4:8)",
        "midrise7p row rms half_up; trust; hadamard(128); sparse(4:8)",
        "e2m1 row rms even; trust; hadamard(128); sparse(2:4)",
    ],
)
def test_other_rules_and_sparsity(text):
    """Thresholds within the grid, absolute maxima of rotated rows, formats that are 8-bit types, what is dropped."""
    for shape in SHAPES:
        x = rows_to_rotate(*shape, BF16)
        x[0] = torch.randint(-1, 2, (shape[1],), device="cuda")  # ties between units
        assert_quantizes(x, text)


def test_strided_inputs():
    """Views: padded rows, every other row, one row for all, columns for rows, and bases that are not aligned."""
    whole = torch.randn(256, 2304, device="cuda", dtype=BF16)
    views = [whole[:, :256], whole[::2, 3:643], whole[:1, :2048].expand(50, -1), whole[:128].t(), whole[1:, 1:129]]
    for x in (*views, whole[:, 8:2056], whole[:, 128:2176], whole[:, 1:2049], whole[3:4, :2048]):
        assert_quantizes(x, MIDRISE4)
        rotated = rotations.hadamard(x, 128, -1)
        assert_same([rotated], [reference.hadamard(x, 128, -1)])


def test_ops():
    """Stored codes, other axes, factors to fold, transposed codes, masks alone."""
    x = rows_to_rotate(384, 1152, BF16)
    for text in ("midrise8 row rms half_up", "midrise2 row rms half_up", "e2m1 row absmax even"):
        for axis in (-1, 0):
            expected = quantize_reference.quantize(x, text, axis, transform="hadamard(128)")
            actual = kernels.quantize(x, text, axis, None, None, None, "hadamard(128)")
            assert_same(actual, expected, (text, axis))
    fold = torch.rand(1152, device="cuda") + 0.5
    expected = quantize_reference.quantize(x, "midrise4 row rms half_up", -1, fold=fold, transform="hadamard(128)")
    assert_same(kernels.quantize(x, "midrise4 row rms half_up", -1, None, None, fold, "hadamard(128)"), expected)
    for bits, operand in QUEST.items():
        text, transform = str(Operand.parse(operand).quantizer), "hadamard(128)"
        expected = quantize_reference.quantize_8bit_transposed(x, text, transform)
        assert_same(kernels.quantize_8bit_transposed(x, text, transform), expected, bits)
        for axis in (-1, 0):
            arguments = x, x, text, "trust", axis, None, transform
            assert_same([kernels.estimator_mask(*arguments)], [estimate_reference.estimator_mask(*arguments)], bits)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_hadamard(dtype):
    """Gradients: masked and not, along both axes, rows of no whole byte; what the mask hides need not be finite."""
    for shape, block, axis in (
        ((300, 4096), 128, -1),
        ((9, 14336), 128, -1),
        ((256, 70), 64, 0),
        ((5, 3, 100), 4, -1),
        ((3, 8192), 1024, -1),
        ((1, 128), 128, -1),
    ):
        x = torch.randn(shape, device="cuda").to(dtype)
        moved = x.movedim(axis, -1)
        mask = torch.randint(256, (*moved.shape[:-1], -(-moved.shape[-1] // 8)), dtype=torch.uint8, device="cuda")
        moved[..., 0] = float("nan")
        mask[..., 0] &= 254
        for given in (None, mask):
            actual, expected = rotations.hadamard(x, block, axis, given), reference.hadamard(x, block, axis, given)
            assert actual.stride() == expected.stride()
            assert_same([actual], [expected], (shape, given is None))


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.pruned and fmt.tensor_core_type])
def test_recode_of_pruned_formats(name):
    codes, _ = quantize_reference.quantize(
        torch.randn(130, 1152, device="cuda"), f"{name} row rms half_up", -1, transform="sparse(4:8)"
    )
    for transposed in (False, True):
        expected = [quantize_reference.recode(codes, name, 1152, transposed)]
        assert_same([quantize_kernels.recode(codes, name, 1152, transposed)], expected, transposed)


def test_dispatch():
    """The ops reach these kernels: a refusal would show as the reference's speed only."""
    from qcompile.kernels.register import provider_of

    for op in ("quantize", "quantize_8bit_masked", "quantize_8bit_transposed", "hadamard"):
        assert provider_of(op, "cuda", "midrise4 row rms half_up", BF16, "trust", "hadamard(128)")[0] == "triton"
    x = rows_to_rotate(37, 384, BF16)
    actual = torch.ops.qcompile.quantize_8bit_masked(x, MIDRISE4, True)
    assert_same(actual, quantize_reference.quantize_8bit_masked(x, MIDRISE4, True))
    actual = torch.ops.qcompile.quantize_8bit_transposed(x, "midrise4 row rms half_up", "hadamard(128)")
    assert_same(actual, quantize_reference.quantize_8bit_transposed(x, "midrise4 row rms half_up", "hadamard(128)"))


def test_cuda_graph():
    """Captured launches read the data of the replay: no scalar of the data is baked in, and nothing synchronizes."""
    x = torch.randn(256, 4096, device="cuda", dtype=BF16)
    mask = torch.randint(256, (256, 512), device="cuda", dtype=torch.uint8)

    def everything(rows, of_rotations):
        return [
            *rows.quantize_8bit_masked(x, MIDRISE4, True),
            *rows.quantize_8bit_transposed(x, "midrise4 row rms half_up", "hadamard(128)"),
            of_rotations.hadamard(x, 128, -1, mask),
        ]

    everything(kernels, rotations)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(kernels, rotations)
    for scale in (1.0, 1e-3):
        x.normal_().mul_(scale)
        mask.random_()
        graph.replay()
        assert_same(captured, everything(quantize_reference, reference), scale)


def test_offsets_beyond_32_bits():
    """More than 2³¹ elements: the last rows would be written to where the first ones are."""
    rows, size = 2**31 // 4096 + 8, 4096
    x = torch.randn(16, size, device="cuda", dtype=BF16).repeat(rows // 16 + 1, 1)[:rows]
    x[-8:].normal_()
    outputs = kernels.quantize_8bit_masked(x, MIDRISE4, True)
    for part in (slice(0, 8), slice(-8, None)):
        expected = quantize_reference.quantize_8bit_masked(x[part], MIDRISE4, True)
        assert_same([output[part] for output in outputs], expected)
    mask = outputs[3]
    del outputs
    rotated = rotations.hadamard(x, 128, -1, mask)
    for part in (slice(0, 8), slice(-8, None)):
        assert_same([rotated[part]], [reference.hadamard(x[part], 128, -1, mask[part])])
