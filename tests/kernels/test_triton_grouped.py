"""Products of groups without a GPU: numerics in Triton's interpreter and machine code for Hopper.

Operands are codes of 4-bit grids with scales that are powers of two, so every result is known exactly. What would
break: rows of a neighbour in a group's result or sum, a group of no rows that is not 0, a tail that is left out, NaN
that spreads, memory that was never written.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")

import qcompile.kernels  # noqa: E402, F401
from qcompile.ir.ops import padded_rows  # noqa: E402
from qcompile.kernels.matmul import grouped, reference  # noqa: E402
from qcompile.kernels.matmul import triton as gemm  # noqa: E402
from qcompile.kernels.quantize import reference as quantize_reference  # noqa: E402
from qcompile.kernels.quantize import triton as quantize_kernels  # noqa: E402

from .harness import compiled, interpreted, run_interpreted  # noqa: E402
from .test_triton_matmul import (  # noqa: E402
    BF16,
    E4M3,
    E5M2,
    FP32,
    H200,
    INT8,
    codes,
    compile_kernel,
    powers_of_two,
    stack_bytes,
)

#: Three programs that go through several tiles each.
SMALL_CARD = gemm.Card("small", (9, 0), 3)
TILE = gemm.Config(32, 64, 32, warps=4, stages=3, group_m=2, tma_store=False)
#: Of the sizes 0, 1, 15, 17, 129 …, empty ones at both ends and next to each other; rows that belong to no group.
SIZES = ([17], [0, 1, 15, 0, 0, 17, 129, 3, 0], [0, 0], [40, 24, 64])


def ends(sizes: list[int]) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)


@pytest.fixture
def small_card(monkeypatch):
    monkeypatch.setattr(grouped, "card_of", lambda device: SMALL_CARD)


@pytest.mark.nightly
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("config", [TILE, replace(TILE, parts=2, flatten=False)], ids=str)
def test_interpreted_groups_of_rows(small_card, sizes, config):
    """Each group's product is the dense one of its rows, with scales of rows or of a tensor and a bias."""
    groups, beyond, n, k = len(sizes), 2, 72, 48
    offs, rows = ends(sizes), sum(sizes) + beyond
    for dtype in (E4M3, INT8):
        a, b = codes(rows, k, dtype), codes(groups * n, k, dtype).view(groups, n, k)
        for single, bias in ((False, torch.randint(-3, 4, (groups, n)).float()), (True, None)):
            scale_a, scale_b = powers_of_two(1 if single else rows, 1), powers_of_two(groups, n, 1)
            got = grouped.mm_8bit_grouped(a, b, offs, scale_a, scale_b, FP32, bias, config=config)
            start = 0
            for group, size in enumerate(sizes):
                own = slice(start, start + size)
                scales = scale_a if single else scale_a[own], scale_b[group]
                shift = None if bias is None else bias[group]
                assert torch.equal(got[own], reference.mm_8bit(a[own], b[group], *scales, FP32, shift))
                start += size


@interpreted
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpreted_contraction_in_groups(small_card, sizes):
    """Sums over each group's rows alone, 0 without rows; memory that no group has holds NaN."""
    groups, n, k, rows = len(sizes), 40, 72, sum(sizes) + 2
    offs = ends(sizes)
    x, y = codes(rows, k, E4M3), codes(rows, n, E4M3)
    padded = [torch.full([width, padded_rows(rows, groups)], float("nan")).to(E4M3) for width in (n, k)]
    for (own, place), _ in zip(quantize_reference.group_slices(offs), sizes, strict=True):
        filled = slice(place.start, place.start - (place.start - place.stop) // 128 * 128)
        for of, to in ((y, padded[0]), (x, padded[1])):
            to[:, filled] = torch.zeros(1).to(E4M3)
            to[:, place] = of[own].t()
    scale = powers_of_two(groups, n, 1)
    got = grouped.mm_8bit_grouped(*padded, offs, scale, torch.ones(1, 1, 1), FP32, config=replace(TILE, flatten=False))
    for group, (own, _) in enumerate(quantize_reference.group_slices(offs)):
        assert torch.equal(got[group].double(), y[own].double().t() @ x[own].double() * scale[group].double())


@interpreted
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpreted_quantize_and_recode(sizes):
    """Codes, scales and padding bit for bit as in the reference; NaN and infinity stay in their group."""
    groups, rows, n, quantizer = len(sizes), sum(sizes) + 2, 72, "e4m3 row absmax even"
    offs, inside = ends(sizes), sum(sizes)
    x = torch.randn(rows, n)
    x[0, 3], x[inside - 1, 5] = float("nan"), float("inf")
    for axis, fold in ((1, torch.rand(groups, n, 1)), (0, torch.rand(rows, 1))):
        got = quantize_kernels.quantize_groups(x, quantizer, axis, offs, fold)
        expected = quantize_reference.quantize_groups(x, quantizer, axis, offs, fold)
        if axis:
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a[:inside].nan_to_num(-1.0), b[:inside].nan_to_num(-1.0))
        else:
            assert torch.equal(got[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
            assert torch.equal(written(got[0], offs), written(expected[0], offs))
    folds = torch.rand(groups, n, 1), torch.rand(rows, 1)
    pair = quantize_kernels.quantize_groups_pair(x, quantizer, offs, *folds)
    for axis, fold in zip((1, 0), folds, strict=True):
        single = quantize_kernels.quantize_groups(x, quantizer, axis, offs, fold)
        both = pair[:2] if axis else pair[2:]
        same = [(part[:inside] for part in both), (part[:inside] for part in single)] if axis else [both, single]
        (got_codes, got_scales), (codes_alone, scales_alone) = same
        assert torch.equal(got_scales.nan_to_num(-1.0), scales_alone.nan_to_num(-1.0))
        assert torch.equal(*((c if axis else written(c, offs)) for c in (got_codes, codes_alone)))
    stored = torch.randint(0, 256, (rows, 24), dtype=torch.uint8)
    for text in ("e2m1 row absmax even", "midrise4 row rms half_up"):
        got, expected = (m.recode(stored, text, 48, True, offs) for m in (quantize_kernels, quantize_reference))
        assert torch.equal(*(written(codes.view(torch.uint8), offs) for codes in (got, expected)))


def written(padded: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """The columns of groups, with their zeros."""
    last = max((-(-place.stop // 128) * 128 for _, place in quantize_reference.group_slices(offs)), default=0)
    return padded[:, :last]


@interpreted
@pytest.mark.parametrize("transposed", [False, True])
def test_interpreted_recode_of_a_batch(transposed):
    stored = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8)
    got, expected = (
        m.recode(stored, "e2m1 row absmax even", 48, transposed) for m in (quantize_kernels, quantize_reference)
    )
    assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


# --- machine code ---------------------------------------------------------------------------------------------------


def compile_grouped(config: gemm.Config, dtypes, contraction: bool, out=BF16):
    types = {
        "a": f"tensordesc<{TYPES[dtypes[0]]}[{config.block_m},{config.block_k}]>",
        "b": f"tensordesc<{TYPES[dtypes[1]]}[{config.block_n},{config.block_k}]>",
        "out": f"*{TYPES[out]}",
        "offs": "*i32",
        "scale_a": "*fp32",
        "scale_b": "*fp32",
        **dict.fromkeys(("groups", "m", "n") if contraction else ("groups", "n", "k"), "i32"),
    }
    named = ("block_m", "block_n", "block_k", "parts", "group_m", "flatten")
    constants = {name: getattr(config, name) for name in named}
    constants |= {"most": 64, "accumulator": gemm._ACCUMULATORS[dtypes[0]], "scale_a_stride": 1}
    constants |= {"scale_b_stride": int(not contraction)} | ({} if contraction else {"bias": None})
    kernel = grouped._contraction_kernel if contraction else grouped._rows_kernel
    return compile_kernel(kernel, types, constants, 90, config.warps, config.stages)


TYPES = {E4M3: "fp8e4nv", E5M2: "fp8e5", INT8: "i8", BF16: "bf16", FP32: "fp32"}


def problem_of(contraction: bool, out=BF16, groups: int = 16, rows: int = 131072) -> grouped.GroupedProblem:
    shape, depth = ((8192, 5120), rows // groups) if contraction else ((rows // groups, 8192), 5120)
    return grouped.GroupedProblem(rows, groups, shape, depth, contraction, (E4M3, E4M3), out, H200)


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("contraction", [False, True])
def test_the_kernels_run_on_hoppers_tensor_cores(contraction):
    """wgmma on FP8, tiles fetched by TMA while others are multiplied."""
    ptx = compile_grouped(grouped.candidates(problem_of(contraction))[0], (E4M3, E4M3), contraction).asm["ptx"]
    assert re.search(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.f32\.e4m3\.e4m3", ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.2d\.shared::\w+\.global", ptx)


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("out", [BF16, FP32], ids=str)
@pytest.mark.parametrize("contraction", [False, True])
def test_no_config_spills_and_each_fits_where_it_should(contraction, out):
    for config in grouped.candidates(problem_of(contraction, out)):
        kernel = compile_grouped(config, (E4M3, E4M3), contraction, out)
        assert stack_bytes(kernel) == 0, config
        assert kernel.metadata.shared + 1024 <= config.shared_memory(out.itemsize), config


@compiled
@pytest.mark.parametrize("contraction", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 64])
def test_every_result_has_a_config(contraction, groups):
    """Float32 results take more shared memory; the widest tile that fits is chosen for both."""
    for out in (BF16, FP32):
        config = grouped.candidates(problem_of(contraction, out, groups))[0]
        assert (config.block_m, config.block_n) == (128, 256)
