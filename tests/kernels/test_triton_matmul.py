"""The 8-bit product without a GPU: its numerics in Triton's interpreter, its machine code, and what chooses it.

Operands are codes of 4-bit grids, whose products are multiples of a power of two: sums are exact in any order, so
results are compared with exact integers, bit for bit. The interpreter has to be chosen before Triton is imported: the
tests named ``test_interpreted_…`` run in a process of their own, which :func:`test_numerics_under_the_interpreter`
starts. It truncates where it should round to bfloat16, so outputs are float32 and float16 there.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")

import torch._inductor.config as inductor_config  # noqa: E402
from torch._inductor.lowering import lowerings, register_lowering  # noqa: E402
from torch._inductor.runtime import triton_heuristics  # noqa: E402
from torch._inductor.select_algorithm import AlgorithmSelectorCache, TritonTemplateCaller  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, CompiledKernel  # noqa: E402

import qcompile.kernels  # noqa: E402, F401
from qcompile.kernels.matmul import inductor, providers, reference  # noqa: E402
from qcompile.kernels.matmul import triton as gemm  # noqa: E402
from qcompile.kernels.matmul.providers import Product, choose  # noqa: E402

from .harness import INTERPRETED, ClaimedDriver, compiled, interpreted, run_interpreted  # noqa: E402

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2), (INT8, INT8)]
H200 = gemm.Card("NVIDIA H200", (9, 0), 132)
#: A card with so few processors that its programs go through several tiles each.
SMALL_CARD = gemm.Card("small", (9, 0), 3)
#: A tile that several of the shapes below do not fill.
TILE = gemm.Config(32, 64, 32, warps=4, stages=3, group_m=2)
mm_8bit = torch.ops.qcompile.mm_8bit


def codes(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random E2M1 levels, times two for INT8; of E5M2, powers of two."""
    levels = [0, 1, 2, 4] if dtype == E5M2 else [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*levels, *(-level for level in levels[1:])])
    return (values[torch.randint(len(values), (rows, columns))] * (2 if dtype == INT8 else 1)).to(dtype)


def powers_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-3, 3, shape).float()


def exact(a, b, scale_a, scale_b, bias=None) -> torch.Tensor:
    """The product in float64, which holds it exactly."""
    product = a.double() @ b.double().t() * scale_a.double() * scale_b.double().t()
    return product if bias is None else product + bias.double()


def half_integers(m: int, n: int, k: int) -> tuple[tuple[torch.Tensor, ...], ...]:
    """Codes p and q of all half-integers of 8 bits, p + ½ and q + ½, and what their product lacks."""
    p, q = (torch.randint(-128, 128, (rows, k), dtype=INT8) for rows in (m, n))
    p[0], q[0] = -128, -128
    return (p, q), ((p.sum(1, keepdim=True) / 2 + k / 4).float(), (q.sum(1, keepdim=True) / 2).float())


# --- numerics in the interpreter ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@pytest.fixture
def small_card(monkeypatch):
    monkeypatch.setattr(gemm, "card_of", lambda device: SMALL_CARD)


@interpreted
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (37, 129, 65), (5, 70, 1)])
def test_interpreted_pointer_kernel(small_card, shape, dtypes):
    """Any extents: masks at all three ends, K that is no multiple of anything, one row, one column, one product."""
    check(shape, dtypes, config=None)


@interpreted
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize(
    "config",
    [TILE, replace(TILE, parts=2), replace(TILE, parts=4, flatten=False), replace(TILE, tma_store=False, parts=2)],
    ids=str,
)
def test_interpreted_tma_kernel(small_card, config, dtypes):
    """Tiles that hang over every edge, K shorter than a tile, outputs whose rows TMA cannot store (N = 129)."""
    for shape in ((70, 136, 80), (37, 129, 16), (1, 64, 48), (129, 64, 32)):
        check(shape, dtypes, config)


def check(shape: tuple[int, int, int], dtypes, config) -> None:
    """Every output dtype, scales of rows and of tensors, with and without bias: equal to exact arithmetic."""
    m, n, k = shape
    a, b = codes(m, k, dtypes[0]), codes(n, k, dtypes[1])
    bias = torch.randint(-3, 4, (n,)).float()
    for rows, columns, dtype, shift in (
        (m, n, FP32, None),
        (1, n, FP16, bias.half()),
        (m, 1, FP32, bias),
        (1, 1, FP16, None),
    ):
        scales = powers_of_two(rows, 1), powers_of_two(columns, 1)
        got = gemm.mm_8bit(a, b, *scales, dtype, shift, config=config)
        torch.testing.assert_close(got, exact(a, b, *scales, shift).to(dtype), rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("k", [80, 37], ids=["TMA", "pointers"])
@pytest.mark.parametrize("parts", [1, 4])
def test_interpreted_offsets(small_card, parts, k):
    """Codes beside their levels by ½ on both sides or on one, with scales and a bias: the product of the levels."""
    m, n = 37, 129
    (p, q), (offset_a, offset_b) = half_integers(m, n, k)
    scales, bias, config = (powers_of_two(m, 1), powers_of_two(n, 1)), torch.randint(-3, 4, (n,)).float(), TILE
    got = gemm.mm_8bit(p, q, *scales, FP32, bias, offset_a, offset_b, config=replace(config, parts=parts))
    torch.testing.assert_close(got, exact(p + 0.5, q + 0.5, *scales, bias).float(), rtol=0, atol=0)
    got = gemm.mm_8bit(p, q, *scales, FP32, None, None, offset_b, config=config)
    torch.testing.assert_close(got, exact(p + 0.5, q, *scales).float(), rtol=0, atol=0)
    got = gemm.mm_8bit(p, q, *scales, FP32, None, offset_a - k / 4, config=config)
    torch.testing.assert_close(got, exact(p, q + 0.5, *scales).float(), rtol=0, atol=0)


@interpreted
def test_interpreted_bfloat16_of_both_kernels(small_card):
    """Results that bfloat16 holds come out as they are."""
    for k in (3, 16):
        a, b = torch.ones(33, k).to(E4M3), codes(65, k, E4M3)
        b[:, 2:] = 0
        got = gemm.mm_8bit(a, b, torch.ones(1, 1), torch.ones(1, 1), BF16, config=TILE)
        torch.testing.assert_close(got.double(), exact(a, b, torch.ones(1, 1), torch.ones(1, 1)), rtol=0, atol=0)


@interpreted
def test_interpreted_operands_with_strides(small_card):
    """Operands, scales and bias that are views; an address that TMA does not take."""
    a, b = codes(48, 33, E4M3).t(), codes(40, 96, E4M3)[:, ::2]
    scale_a, scale_b, bias = powers_of_two(66, 1)[::2], powers_of_two(1, 40).t(), torch.arange(80.0)[::2]
    unaligned = codes(1, 33 * 48 + 1, E4M3)[0, 1:].view(33, 48)
    for left in (a, unaligned):
        got = gemm.mm_8bit(left, b, scale_a, scale_b, FP32, bias, config=TILE)
        torch.testing.assert_close(got, exact(left, b, scale_a, scale_b, bias).float(), rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (INT8, INT8)], ids=str)
@pytest.mark.parametrize("parts", [1, 4])
def test_interpreted_template_and_its_epilogue(generate, monkeypatch, dtypes, parts):
    """What Inductor makes of the template, a residual and an activation in its epilogue; several tiles per program."""
    monkeypatch.setattr(inductor, "_template_configs", lambda problem: [replace(TILE, parts=parts)])
    a, b, bias = codes(70, 80, dtypes[0]), codes(134, 80, dtypes[1]), torch.randint(-3, 4, (134,)).float()
    for rows, columns in ((70, 134), (1, 134), (1, 1)):
        scales, residual = (powers_of_two(rows, 1), powers_of_two(columns, 1)), torch.randint(-9, 9, (70, 134)).float()

        def product(a, b, scale_a, scale_b, bias, residual):
            return torch.relu(mm_8bit(a, b, scale_a, scale_b, FP32, bias) + residual)

        got, (kernel,) = generate(product, a, b, *scales, bias, residual)
        assert kernel.is_template
        expected = torch.relu(exact(a, b, *scales, bias) + residual).float()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)], ids=str)
def test_interpreted_template_with_offsets(generate, monkeypatch, given, with_bias):
    """Any of the optional operands may be there, and each is taken for itself."""
    monkeypatch.setattr(inductor, "_template_configs", lambda problem: [replace(TILE, parts=2)])
    (p, q), offsets = half_integers(70, 134, 80)
    scales, bias = (powers_of_two(70, 1), powers_of_two(134, 1)), torch.randint(-3, 4, (134,)).float()
    shift = bias if with_bias else None
    offset_a, offset_b = (offset if present else None for offset, present in zip(offsets, given, strict=True))
    got, (kernel,) = generate(lambda *x: mm_8bit(*x[:4], FP32, *x[4:]), p, q, *scales, shift, offset_a, offset_b)
    assert kernel.is_template
    assert_equal = torch.testing.assert_close
    assert_equal(got, reference.mm_8bit(p, q, *scales, FP32, shift, offset_a, offset_b), rtol=0, atol=0)


@interpreted
def test_interpreted_template_with_symbolic_rows(generate, monkeypatch):
    """One kernel for every M: its extent is an argument."""
    monkeypatch.setattr(inductor, "_template_configs", lambda problem: [TILE])
    a, b, scale_a, scale_b = codes(70, 80, INT8), codes(64, 80, INT8), powers_of_two(70, 1), powers_of_two(64, 1)
    for tensor in (a, scale_a):
        torch._dynamo.mark_dynamic(tensor, 0)
    got, (kernel,) = generate(lambda *x: mm_8bit(*x, FP32), a, b, scale_a, scale_b, dynamic=None)
    assert kernel.is_template
    assert any(name.startswith("ks") for name in kernel.signature)
    torch.testing.assert_close(got, exact(a, b, scale_a, scale_b).float(), rtol=0, atol=0)


# --- machine code ---------------------------------------------------------------------------------------------------

TYPE_NAMES = {E4M3: "fp8e4nv", E5M2: "fp8e5", INT8: "i8", BF16: "bf16", FP16: "fp16", FP32: "fp32"}
MULTIPLIED_AS = {E4M3: "e4m3", E5M2: "e5m2", INT8: "s8"}


def compile_kernel(kernel, types: dict[str, str], constants: dict, capability: int, warps: int, stages: int):
    """A kernel compiled for a card that is not there; pointers and integers are multiples of 16."""
    signature = types | dict.fromkeys(constants, "constexpr")
    order = [name for name in kernel.arg_names if name in signature]
    aligned = [i for i, name in enumerate(order) if re.match(r"\*|i32", signature[name])]
    source = ASTSource(
        kernel,
        {name: signature[name] for name in order},
        constants,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_tma(
    config: gemm.Config, a_dtype, b_dtype, dtype, bias: bool = True, offsets: bool = False
) -> CompiledKernel:
    out = f"{TYPE_NAMES[dtype]}[{config.block_m},{config.block_n // config.parts}]"
    types = {
        "a": f"tensordesc<{TYPE_NAMES[a_dtype]}[{config.block_m},{config.block_k}]>",
        "b": f"tensordesc<{TYPE_NAMES[b_dtype]}[{config.block_n},{config.block_k}]>",
        "out": f"tensordesc<{out}>" if config.tma_store else f"*{TYPE_NAMES[dtype]}",
        "scale_a": "*fp32",
        "scale_b": "*fp32",
        **({"bias": "*fp32"} if bias else {}),
        **(dict.fromkeys(("offset_a", "offset_b"), "*fp32") if offsets else {}),
        **dict.fromkeys(("m", "n", "k"), "i32"),
    }
    named = ("block_m", "block_n", "block_k", "parts", "group_m", "flatten", "tma_store", "warp_specialize")
    constants = {name: getattr(config, name) for name in named} | scale_constants(a_dtype, bias, offsets)
    return compile_kernel(gemm._tma_kernel, types, constants, 90, config.warps, config.stages)


def scale_constants(dtype: torch.dtype, bias: bool, offsets: bool = False) -> dict:
    constants = {"scale_a_stride": 1, "scale_b_stride": 1, "accumulator": gemm._ACCUMULATORS[dtype]}
    absent = [*([] if bias else ["bias"]), *([] if offsets else ["offset_a", "offset_b"])]
    return constants | dict.fromkeys(absent)


def stack_bytes(kernel: CompiledKernel) -> int:
    """Local memory of a thread: zero if nothing was spilled."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton came without cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


@compiled
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_the_tma_kernel_runs_on_hoppers_tensor_cores(dtypes):
    """wgmma on the operands' own types, both fetched and the result stored by TMA."""
    config = gemm.candidates(gemm.Problem(16384, 4096, 4096, *dtypes, BF16, H200))[0]
    ptx = compile_tma(config, *dtypes, BF16).asm["ptx"]
    left, right = (MULTIPLIED_AS[dtype] for dtype in dtypes)
    assert re.search(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.[fs]32\.{left}\.{right}", ptx)
    assert re.search(r"cp\.async\.bulk\.tensor\.2d\.shared::\w+\.global", ptx)
    assert "cp.async.bulk.tensor.2d.global.shared::cta" in ptx
    assert not re.search(r"\bmma\.sync", ptx)


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_no_config_spills_and_each_fits_where_it_should(dtype):
    """Registers in local memory would cost more than any tile gains; shared memory has been foreseen."""
    for out in (BF16, FP32):
        problem = gemm.Problem(16384, 4096, 4096, dtype, dtype, out, H200)
        for config in gemm.candidates(problem):
            kernel = compile_tma(config, dtype, dtype, out, offsets=dtype == INT8)
            assert stack_bytes(kernel) == 0, config
            assert kernel.metadata.shared + 1024 <= config.shared_memory(out.itemsize), config


@compiled
@pytest.mark.parametrize(
    ("dtype", "capability", "instruction"),
    [
        (E4M3, 90, r"wgmma\.mma_async\S*\.e4m3\.e4m3"),
        (E4M3, 89, r"mma\.sync\S*\.e4m3\.e4m3"),
        (INT8, 80, r"mma\.sync\S*\.s8\.s8"),
    ],
)
def test_the_pointer_kernel_runs_on_tensor_cores(dtype, capability, instruction):
    """Older cards, and extents that TMA does not take, are served by tensor cores too."""
    types = {"a": f"*{TYPE_NAMES[dtype]}", "b": f"*{TYPE_NAMES[dtype]}", "out": "*bf16", "scale_a": "*fp32"}
    types |= {"scale_b": "*fp32", **dict.fromkeys(("m", "n", "k"), "i32")}
    constants = {"block_m": 128, "block_n": 128, "block_k": 64, "group_m": 8} | scale_constants(dtype, bias=False)
    kernel = compile_kernel(gemm._pointer_kernel, types, constants, capability, warps=8, stages=3)
    assert re.search(instruction, kernel.asm["ptx"])
    assert "cp.async" in kernel.asm["ptx"]


# --- choice of a config ---------------------------------------------------------------------------------------------


def problem_of(m: int, n: int, k: int, dtype=BF16, card=H200) -> gemm.Problem:
    return gemm.Problem(m, n, k, E4M3, E4M3, dtype, card)


def test_the_default_fills_the_card():
    """Large products take the tile with the least traffic; small ones one that gives every processor work."""
    large = gemm.candidates(problem_of(16384, 4096, 4096))[0]
    assert (large.block_m, large.block_n) == (128, 256)
    for m, n in ((1, 4096), (64, 8192), (512, 2048)):
        config = gemm.candidates(problem_of(m, n, 4096))[0]
        tiles = -(-m // config.block_m) * -(-n // config.block_n)
        assert tiles >= 0.9 * min(H200.processors, n // 32), (m, n, str(config))


def test_every_card_and_output_has_a_config():
    """Shared memory is that of the card, and float32 outputs need more of it."""
    for capability in ((9, 0), (10, 0), (12, 0)):
        for dtype in (BF16, FP16, FP32):
            assert gemm.candidates(problem_of(4096, 4096, 4096, dtype, gemm.Card("card", capability, 100)))


@compiled
def test_tuning_measures_once_and_for_all_processes(monkeypatch, tmp_path):
    """Only when asked and out of graphs; then once for a problem and its neighbours, for other processes too."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gemm, "_MEASURED", {})
    gemm._read.cache_clear()
    problem, tried = problem_of(16384, 4096, 4096), []
    fastest = gemm.candidates(problem)[3]

    def time_of(run, **options):
        run()
        if tried[-1] == gemm.candidates(problem)[1]:
            raise gemm.OutOfResources(300000, 232448, "shared memory")
        return 1.0 if tried[-1] == fastest else 2.0

    monkeypatch.setattr(gemm, "do_bench", time_of)
    for tune, capturing in ((False, False), (True, True)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert gemm.best_config(problem, tried.append, tune=tune) == gemm.candidates(problem)[0]
    assert not tried
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gemm.best_config(problem, tried.append, tune=True) == fastest
    assert len(tried) == gemm._MOST_MEASURED
    assert gemm.best_config(replace(problem, m=16000), tried.append, tune=True) == fastest
    monkeypatch.setattr(gemm, "_MEASURED", {})
    gemm._read.cache_clear()
    assert gemm.best_config(problem, tried.append, tune=False) == fastest
    assert len(tried) == gemm._MOST_MEASURED
    gemm._read.cache_clear()


def test_dtypes_that_no_tensor_core_multiplies_are_refused():
    with pytest.raises(ValueError, match=r"got torch\.int8 with torch\.float8_e4m3fn"):
        gemm.mm_8bit(codes(2, 2, INT8), codes(2, 2, E4M3), torch.ones(1, 1), torch.ones(1, 1), FP32)


# --- choice of a provider -------------------------------------------------------------------------------------------

ROWS = Product((4096, 4096, 4096), (E4M3, E4M3), BF16, (9, 0))


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({}, "cublaslt", ""),
        ({"dtypes": (E5M2, E4M3)}, "cublaslt", ""),
        ({"bias": BF16}, "cublaslt", ""),
        ({"dtypes": (E5M2, E5M2)}, "triton", "cublaslt: it does not multiply e5m2 with e5m2"),
        ({"dtypes": (INT8, INT8)}, "gluon", "cublaslt: it multiplies FP8 only"),
        ({"dtypes": (INT8, INT8), "shape": (7, 4096, 24)}, "triton", "cublaslt: it multiplies FP8 only"),
        ({"shape": (7, 4096, 24)}, "triton", "cublaslt: K = 24 is no multiple of 16"),
        ({"shape": (7, 100, 32)}, "triton", "cublaslt: N = 100 is no multiple of 16"),
        ({"dtype": FP32}, "triton", "cublaslt: it writes bfloat16, not float32"),
        ({"bias": FP32}, "triton", "cublaslt: its bias is bfloat16, not float32"),
        ({"shape": (0, 16, 16)}, "reference", "triton: there is nothing to multiply"),
        ({"dtypes": (INT8, E4M3)}, "reference", "triton: tensor cores do not multiply int8 with float8_e4m3fn"),
        ({"capability": (8, 0)}, "reference", "triton: FP8 needs compute capability 8.9 (integer grids as INT8: 8.0)"),
        ({"capability": (8, 0), "dtypes": (INT8, INT8)}, "triton", "untested on compute capability 8.0"),
        ({"capability": (7, 5), "dtypes": (INT8, INT8)}, "reference", "triton: INT8 needs compute capability 8.0"),
        ({"capability": (8, 9)}, "triton", "cublaslt: scales of rows need compute capability 9.0"),
        ({"capability": (8, 9), "tensor_scales": True}, "cublaslt", "untested on compute capability 8.9"),
        ({"capability": (10, 0)}, "cublaslt", "native FP4 would need a scale for every 16 or 32 elements"),
    ],
)
def test_the_provider_and_why_no_better_one(monkeypatch, change, name, reason):
    """The report's sentence about a product: empty for the first choice, else what kept the better ones."""
    monkeypatch.setattr(providers, "_cuda_version", lambda: (13, 0))
    provider, said = choose(replace(ROWS, **change))
    assert provider.name == name
    assert reason in said
    assert bool(said) == bool(reason)


def test_integers_on_blackwell_are_not_told_of_fp4():
    """Grids of 5 to 8 bits have no FP4 codes, whatever their scales."""
    assert choose(replace(ROWS, dtypes=(INT8, INT8), capability=(10, 0)))[1].endswith("on compute capability 10.0")


def test_codes_beside_their_levels_are_no_product_of_cublaslt():
    """Nothing can be added before its scales: it would drop the offsets."""
    with mock.patch.object(providers, "_cuda_version", return_value=(13, 0)):
        provider, said = choose(replace(ROWS, offsets=True))
    assert provider.name == "triton"
    assert "cublaslt: it adds nothing before the scales" in said


def test_a_build_without_cuda_has_no_cublaslt(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose(ROWS)[0].name == "triton"
    monkeypatch.setattr(providers, "_has_triton", lambda: False)
    provider, reason = choose(ROWS)
    assert provider.name == "reference"
    assert "has CUDA None, it needs 12.1; gluon: it is used for INT8 only; triton: it is not installed" in reason


@pytest.mark.parametrize("rows", [(1, 1), (5, 1), (1, 16), (5, 16)])
def test_cublaslt_is_called_with_scales_that_it_takes(monkeypatch, rows):
    """``[M, 1]`` and ``[1, N]``, or one number for each operand; B transposed in place, fast accumulation."""
    a, b, scale_a, scale_b = (
        codes(5, 32, E4M3),
        codes(16, 32, E4M3),
        powers_of_two(rows[0], 1),
        powers_of_two(rows[1], 1),
    )

    def scaled_mm(a, b, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum):
        whole, by_rows = ((1, 1), (1, 1)), ((5, 1), (1, 16))
        assert (scale_a.shape, scale_b.shape) == (whole if rows == (1, 1) else by_rows)
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert b.stride() == (1, 32)
        assert (scale_result, use_fast_accum) == (None, True)
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    got = providers.PROVIDERS[0].run(a, b, scale_a, scale_b, BF16)
    assert torch.equal(got, reference.mm_8bit(a, b, scale_a, scale_b, BF16))


# --- Inductor -------------------------------------------------------------------------------------------------------


class Kernel:
    """One generated kernel; of a template also its function, run in the interpreter (or not at all)."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self.name, self.source = name, source
        self.is_template = "triton_heuristics.template" in source
        if not self.is_template:
            return
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        with mock.patch.object(triton_heuristics, "template", self._record):
            spec.loader.exec_module(module)
        self.function = getattr(module, name)

    def _record(self, *, num_stages, num_warps, triton_meta, **options):
        self.signature, self.stages, self.warps = triton_meta["signature"], num_stages, num_warps
        return lambda function: function

    def run(self, *args, stream=None):
        if INTERPRETED and self.is_template:
            *args, x, y, z = args
            self.function[x, y, z](*args)

    def compile(self) -> CompiledKernel:
        return compile_kernel(self.function, dict(self.signature), {}, 90, self.warps, self.stages)


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """``generate(fn, *inputs, dynamic=False, **settings) -> (outputs, kernels)`` of Inductor for a claimed H200.

    Outputs are right in the interpreter if a template writes them. Extern calls are made, on the CPU.
    """
    op = mm_8bit.default
    if op not in lowerings:
        register_lowering(op, type_promotion_kind=None)(inductor.lower_mm_8bit)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gemm, "card_of", lambda device: SMALL_CARD if INTERPRETED else H200)
    monkeypatch.setattr(providers, "_gluon_error", lambda: "no Gluon")  # its kernel runs on cards only
    # Inductor trusts no address on the CPU, and TMA needs multiples of 16.
    monkeypatch.setattr("torch._inductor.graph.should_assume_input_aligned", lambda example: True)
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(ClaimedDriver())

    def run(fn, *inputs, dynamic: bool | None = False, **settings):
        kernels: dict[str, Kernel] = {}  # Inductor asks for each more than once

        def load(self, name: str, source: str, device_str: str = "cpu") -> Kernel:
            if name not in kernels:
                kernels[name] = Kernel(name, source, tmp_path)
            return kernels[name]

        torch._dynamo.reset()
        settings |= {"cpu_backend": "triton", "fx_graph_cache": False, "autotune_remote_cache": False}
        with (
            mock.patch("torch._inductor.async_compile.AsyncCompile.triton", load),
            inductor_config.patch(settings),
        ):
            outputs = torch.compile(fn, backend="inductor", fullgraph=True, dynamic=dynamic)(*inputs)
        return outputs, list(kernels.values())

    yield run
    triton.runtime.driver._active = previous


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [codes(m, k, dtype), codes(n, k, dtype), powers_of_two(m, 1), powers_of_two(n, 1)]


def residual_block(a, b, scale_a, scale_b, residual):
    return torch.relu(mm_8bit(a, b, scale_a, scale_b, BF16) + residual)


@compiled
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "dynamic M"])
def test_residual_and_activation_are_fused_into_the_template(generate, dtype, dynamic):
    """One kernel for the product, its scales, a residual, an activation; on Hopper's tensor cores, nothing spilled."""
    inputs = [*operands(16384, 512, 256, dtype), torch.randn(16384, 512).to(BF16)]
    if dynamic is None:
        for tensor in (inputs[0], inputs[2], inputs[4]):
            torch._dynamo.mark_dynamic(tensor, 0)
    with mock.patch.object(providers, "_cuda_version", return_value=(0,)):
        _, (kernel,) = generate(residual_block, *inputs, dynamic=dynamic)
    assert kernel.name == "triton_tem_fused_add_mm_8bit_relu_0"
    built = kernel.compile()
    assert re.search(rf"wgmma\.mma_async\S*\.{MULTIPLIED_AS[dtype]}\.{MULTIPLIED_AS[dtype]}", built.asm["ptx"])
    assert "cp.async.bulk.tensor" in built.asm["ptx"]
    assert stack_bytes(built) == 0
    assert built.metadata.shared <= 227 * 1024


@compiled
def test_the_template_with_offsets_does_not_spill(generate):
    """Both offsets and a bias, the most that an epilogue adds."""
    offsets = torch.randn(16384, 1), torch.randn(512, 1)
    inputs = [*operands(16384, 512, 256, INT8), torch.randn(512), *offsets]
    _, (kernel,) = generate(lambda *x: mm_8bit(*x[:4], BF16, *x[4:]), *inputs)
    built = kernel.compile()
    assert stack_bytes(built) == 0
    assert built.metadata.shared <= 227 * 1024


@compiled
def test_stored_codes_seen_as_e4m3_are_not_read_as_bytes(generate):
    """A view in another dtype reaches a template as the buffer of bytes behind it, unless it is a call's result."""
    a, b, scale_a, scale_b = operands(16384, 512, 256, E4M3)

    def product(a, b, scale_a, scale_b):
        return mm_8bit(a.view(E4M3), b.view(E4M3), scale_a, scale_b, FP16)

    _, (kernel,) = generate(product, a.view(torch.uint8), b.view(torch.uint8), scale_a, scale_b)
    assert re.search(r"wgmma\.mma_async\S*\.e4m3\.e4m3", kernel.compile().asm["ptx"])


@compiled
def test_two_outputs_and_a_cast_leave_the_template_together(generate):
    """The largest epilogue: a float32 output beside the product. Its pieces fit into shared memory."""

    def product(a, b, scale_a, scale_b):
        y = mm_8bit(a, b, scale_a, scale_b, FP16)
        return y, torch.nn.functional.silu(y.float())

    _, (kernel,) = generate(product, *operands(16384, 512, 256, INT8))
    built = kernel.compile()
    assert stack_bytes(built) == 0
    assert built.metadata.shared <= 227 * 1024


@compiled
@pytest.mark.parametrize("winner", ["cublaslt", "template"])
def test_max_autotune_chooses_among_both(generate, monkeypatch, winner):
    """Inductor is offered cuBLASLt and the template's configs, and generates the one it measured to be faster."""
    offered = []

    def timings(self, name, inputs, layout, gens, key, choices, *rest, **options):
        offered.extend(choices)
        return {c: 1.0 if isinstance(c, TritonTemplateCaller) == (winner == "template") else 2.0 for c in choices}

    monkeypatch.setattr(AlgorithmSelectorCache, "do_autotuning", timings)
    monkeypatch.setattr(providers, "_cuda_version", lambda: (13, 0))
    calls = []
    monkeypatch.setattr("torch._inductor.select_algorithm.extern_kernels._scaled_mm", lambda *a, **k: calls.append(k))
    inputs = [*operands(256, 512, 256, E4M3), torch.randn(256, 512).to(BF16)]
    settings = {"max_autotune_gemm": True, "benchmark_epilogue_fusion": False}
    _, kernels = generate(residual_block, *inputs, **settings)
    assert len(offered) == 1 + inductor._MEASURED_CONFIGS
    assert [kernel.is_template for kernel in kernels] == [winner == "template"]
    assert [call["use_fast_accum"] for call in calls] == [True] * (winner == "cublaslt")


@compiled
def test_cublaslt_serves_products_that_it_takes(generate, monkeypatch):
    """Without max-autotune the first provider is called, its scales in the shape that it wants."""
    monkeypatch.setattr(providers, "_cuda_version", lambda: (13, 0))
    shapes = []

    def scaled_mm(a, b, scale_a, scale_b, *, out, **options):
        shapes.append((tuple(b.stride()), tuple(scale_a.shape), tuple(scale_b.shape)))

    monkeypatch.setattr("torch._inductor.select_algorithm.extern_kernels._scaled_mm", scaled_mm)
    a, b, scale_a, scale_b = operands(64, 48, 32, E4M3)
    for left, right in ((scale_a, scale_b), (scale_a[:1].clone(), scale_b), (scale_a[:1].clone(), scale_b[:1].clone())):
        generate(lambda *x: mm_8bit(*x, BF16), a, b, left, right)
    assert shapes == [((1, 32), (64, 1), (1, 48))] * 2 + [((1, 32), (1, 1), (1, 1))]


@compiled
@pytest.mark.parametrize("k", [33, "symbolic"])
def test_what_the_template_cannot_take_calls_the_ops_own_kernel(generate, k):
    """K that is no multiple of 16, or not known to be one: the kernel of the op decides when it meets the sizes."""
    inputs = operands(20, 24, 33 if k == 33 else 32, INT8)
    if k == "symbolic":
        for tensor in inputs[:2]:
            torch._dynamo.mark_dynamic(tensor, 1)
    got, kernels = generate(lambda *x: mm_8bit(*x, FP32), *inputs, dynamic=None)
    assert not kernels
    torch.testing.assert_close(got, exact(*inputs).float(), rtol=0, atol=0)


def test_the_cpu_calls_the_ops_own_kernel():
    """With Inductor's C++ backend nothing of Triton is touched."""
    if mm_8bit.default not in lowerings:
        register_lowering(mm_8bit.default, type_promotion_kind=None)(inductor.lower_mm_8bit)
    inputs = operands(5, 7, 16, E4M3)
    torch._dynamo.reset()
    got = torch.compile(lambda *x: mm_8bit(*x, FP32), backend="inductor")(*inputs)
    torch.testing.assert_close(got, exact(*inputs).float(), rtol=0, atol=0)
