"""The block Hadamard rotation and sparsity: definitions, and the C++ rotation bit for bit."""

from __future__ import annotations

import pytest
import torch

from qcompile.ir.transforms import SPARSITIES, Transform
from qcompile.kernels.quantize import cpp as quantize_cpp
from qcompile.kernels.quantize import reference as quantize
from qcompile.kernels.quantize.reference import pack
from qcompile.kernels.transform import cpp, reference

BLOCKS = [1, 2, 8, 64, 128, 1024]


def hadamard_matrix(block: int) -> torch.Tensor:
    """Sylvester's, by its definition: (−1)^(common bits of i and j) / √n."""
    index = range(block)
    signs = [[1 - 2 * ((i & j).bit_count() % 2) for j in index] for i in index]
    return torch.tensor(signs, dtype=torch.float64) / block**0.5


@pytest.mark.parametrize("block", BLOCKS)
def test_rotation_is_sylvesters_matrix_and_its_own_inverse(block):
    x = torch.randn(5, 3 * block)
    expected = (x.double().unflatten(-1, (3, block)) @ hadamard_matrix(block)).flatten(-2)
    rotated = reference.rotate(x, block)
    torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(reference.rotate(rotated, block), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_cpp_equals_the_reference(block, masked, dtype):
    """Every axis, gaps between elements, NaN and infinity; the result has the strides of the input."""
    for shape, axis in (((3, 5, 2 * block), -1), ((2, 3 * block, 7), 1), ((block, 5), 0)):
        x = torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
        x[(0,) * len(shape)], x[(-1,) * len(shape)] = float("nan"), float("inf")
        lead = [n for i, n in enumerate(shape) if i != axis % len(shape)]
        mask = pack(torch.randint(0, 2, (*lead, shape[axis]), dtype=torch.uint8), 1) if masked else None
        expected = reference.hadamard(x, block, axis, mask)
        actual = cpp.hadamard(x, block, axis, mask)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        assert actual.stride() == expected.stride() == torch.empty_like(x).stride()


def test_a_masked_infinity_leaves_no_trace():
    x = torch.randn(2, 8)
    x[0, 3] = float("inf")
    mask = pack((torch.arange(8) != 3).to(torch.uint8).expand(2, 8), 1)
    for hadamard in (reference.hadamard, cpp.hadamard):
        assert hadamard(x, 8, -1, mask).isfinite().all()


@pytest.mark.parametrize("hadamard", [reference.hadamard, cpp.hadamard])
def test_a_block_that_does_not_divide_is_refused(hadamard):
    with pytest.raises(ValueError, match="hadamard: 12 elements are no multiple of the block size 8"):
        hadamard(torch.randn(3, 12), 8, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "quantizer",
    ["midrise4 row rms half_up", "midrise4 row absmax half_up", "e2m1 block16 rms even", "midrise1 row rms half_up"],
)
def test_rotated_quantization_in_cpp(quantizer, dtype):
    """A row is rotated once, in float32, between its scale and its codes."""
    for size in (1, 33, 96, 256):
        x = torch.randn(2, 5, size).to(dtype)
        x[0, 1] = 0
        x[0, 2, 0], x[0, 3, -1] = float("nan"), float("inf")
        transform = str(Transform(128).on(size))
        codes, scales = quantize_cpp.quantize(x, quantizer, -1, transform=transform)
        expected_codes, expected_scales = quantize.quantize(x, quantizer, -1, transform=transform)
        torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
        finite = expected_scales.isfinite().flatten(2).all(-1)
        assert torch.equal(codes[finite], expected_codes[finite])


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_sparsity_keeps_the_larger_units(sparsity):
    """By brute force, last groups short; of equal units the earlier ones."""
    pattern = SPARSITIES[sparsity]
    for size in (1, 7, 8, 43):
        x = torch.randint(-2, 3, (6, size)).float()  # ties abound
        keep = reference.kept(x, sparsity)
        for row in range(6):
            for start in range(0, size, pattern.group):
                units = [range(i, i + pattern.width) for i in range(start, start + pattern.group, pattern.width)]
                norm = [sum(x[row, k].item() ** 2 for k in unit if k < size) for unit in units]
                order = sorted(range(pattern.units), key=lambda i: -norm[i])[: pattern.kept]
                for i, unit in enumerate(units):
                    assert all(keep[row, k].item() == (i in order) for k in unit if k < size)


@pytest.mark.parametrize("size", [1, 2, 3, 64, 96, 100, 448, 4096])
def test_the_largest_power_of_two_that_divides(size):
    rotation = Transform(128).on(size).rotation
    assert rotation == max(n for n in (1, 2, 4, 8, 16, 32, 64, 128) if size % n == 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hadamard(100)", r"hadamard\(100\): the size must be a power of two from 1 to 1024"),
        ("hadamard(2048)", "must be a power of two from 1 to 1024"),
        ("hadamard", r"unknown transform 'hadamard'; known: hadamard\(<size>\[,signs=fixed\|drawn\]\), sparse"),
        ("sparse(3:4)", r"sparse\(3:4\): known patterns: 2:4, 4:8"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        Transform.parse(text)


def test_text_and_value_are_inverse():
    for transform in (Transform(), Transform(64), Transform(sparsity="2:4"), Transform(128, "4:8")):
        assert Transform.parse(str(transform)) == transform
