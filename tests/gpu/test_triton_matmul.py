"""The 8-bit product on a GPU: exact sums of 4-bit codes, every config, extents of any size, graphs and compilation.

Products of 4-bit codes are multiples of a power of two, and their sums fit into the accumulator of the tensor cores.
With scales that are powers of two every result is therefore known exactly, up to its one rounding to the output dtype.
Memory that the caching allocator hands out holds NaN, so an element that a kernel leaves out shows.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton")

from qcompile.kernels.matmul import inductor, providers
from qcompile.kernels.matmul import triton as gemm
from qcompile.kernels.quantize.reference import quantize_8bit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2), (INT8, INT8)]
mm_8bit = torch.ops.qcompile.mm_8bit


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    sizes = (2**9, 2**14, 2**20, 2**23, 2**25)
    blocks = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


@pytest.fixture(autouse=True)
def _lowering():
    if mm_8bit.default not in lowerings:
        register_lowering(mm_8bit.default, type_promotion_kind=None)(inductor.lower_mm_8bit)
    torch._dynamo.reset()


def codes(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random E2M1 levels, times two for INT8; of E5M2, powers of two."""
    levels = [0, 1, 2, 4] if dtype == E5M2 else [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*levels, *(-level for level in levels[1:])], device="cuda")
    return (values[torch.randint(len(values), (rows, columns), device="cuda")] * (2 if dtype == INT8 else 1)).to(dtype)


def signs(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random −1, 0 and 1: sums of 256 of them are exact in bfloat16."""
    return (
        torch.randint(-1, 2, (rows, columns), dtype=INT8, device="cuda").to(FP32 if dtype != INT8 else INT8).to(dtype)
    )


def powers_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-3, 3, shape, device="cuda").float()


def exact(a, b, scale_a, scale_b, bias=None) -> torch.Tensor:
    """The product in float64, which holds it exactly where the scales are powers of two."""
    product = a.float().double() @ b.float().double().t() * scale_a.double() * scale_b.double().t()
    return product if bias is None else product + bias.double()


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=0)


# --- the hand-launched kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", gemm.CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_every_config_is_exact(config, dtype):
    """Tiles that hang over all three ends, several per program."""
    if not gemm.fits(config, gemm.Problem(1, 1, 1, dtype, dtype, BF16, this_card())):
        pytest.skip("not enough shared memory")
    check(2000, 2056, 2064, (dtype, dtype), config)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("n", [520, 515], ids=["TMA store", "pointer store"])
def test_every_pair_of_dtypes_is_exact(n, dtypes):
    """Mixed FP8 too; rows of 515 elements cannot be stored by TMA."""
    check(300, n, 144, dtypes, gemm.CONFIGS[0])


def check(m: int, n: int, k: int, dtypes, config) -> None:
    a, b, bias = codes(m, k, dtypes[0]), codes(n, k, dtypes[1]), torch.randint(-3, 4, (n,), device="cuda").float()
    scales = powers_of_two(m, 1), powers_of_two(n, 1)
    assert_equal(gemm.mm_8bit(a, b, *scales, BF16, bias, config=config), exact(a, b, *scales, bias))


def this_card() -> gemm.Card:
    return gemm.card_of(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3), (INT8, INT8)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (1000, 77, 513), (129, 264, 1008), (5, 8192, 2048)])
def test_any_extents_are_exact(shape, dtypes):
    """Both kernels, every output dtype, scales of rows and of tensors."""
    m, n, k = shape
    a, b = codes(m, k, dtypes[0]), codes(n, k, dtypes[1])
    for rows, columns, dtype in ((m, n, FP32), (1, n, BF16), (m, 1, FP16), (1, 1, FP32)):
        scales = powers_of_two(rows, 1) / 8, powers_of_two(columns, 1) / 8
        assert_equal(gemm.mm_8bit(a, b, *scales, dtype), exact(a, b, *scales))


@pytest.mark.parametrize("quantizer", ["e2m1 row absmax even", "midrise4 row absmax even"])
def test_quantized_rows_of_a_model_are_exact(quantizer):
    """K of the widest layers: sums of codes quantized with the absolute maximum of a row stay in the accumulator."""
    (a, _, _), (b, _, _) = (
        quantize_8bit(torch.randn(rows, 28672, device="cuda"), quantizer, False) for rows in (256, 512)
    )
    one = torch.ones(1, 1, device="cuda")
    assert_equal(gemm.mm_8bit(a, b, one, one, FP32), exact(a, b, one, one))


@pytest.mark.parametrize("shape", [(300, 520, 144), (129, 264, 37), (2000, 2056, 240)], ids=str)
def test_offsets_make_it_the_product_of_the_levels(shape):
    """Half-integers of 8 bits on both sides or on one, by every provider; below 2^22 nothing is rounded."""
    m, n, k = shape
    a, b = (torch.randint(-128, 128, (rows, k), dtype=INT8, device="cuda") for rows in (m, n))
    scales, bias = (powers_of_two(m, 1), powers_of_two(n, 1)), torch.randint(-3, 4, (n,), device="cuda").float()
    sums = (a.sum(1, keepdim=True) / 2).float(), (b.sum(1, keepdim=True) / 2).float()
    for offset_a, offset_b, left, right in (
        (sums[0] + k / 4, sums[1], a + 0.5, b + 0.5),
        (sums[0], None, a, b + 0.5),
        (None, sums[1], a + 0.5, b),
    ):
        for shift, dtype in ((None, BF16), (bias, FP32)):
            expected = exact(left, right, *scales, shift)
            product = providers.Product(shape, (INT8, INT8), dtype, this_card().capability, None, False, True)
            able = [provider for provider in providers.PROVIDERS if not provider.obstacle(product)]
            assert "triton" in [provider.name for provider in able]
            for provider in able:
                got = provider.run(a, b, *scales, dtype, shift, offset_a, offset_b)
                assert_equal(got, expected)


def test_compiled_sums_and_offsets_are_exact(monkeypatch):
    """The graph of `lower`: sums of the codes and the product, by the template, and by what runs without it."""
    m, n, k = 1000, 528, 240
    a, b = (torch.randint(-128, 128, (rows, k), dtype=INT8, device="cuda") for rows in (m, n))
    scales = powers_of_two(m, 1), powers_of_two(n, 1)

    def product(a, b, scale_a, scale_b):
        offset_a, offset_b = (a.float() + 0.5).sum(-1, keepdim=True) * 0.5, b.float().sum(-1, keepdim=True) * 0.5
        return torch.relu(mm_8bit(a, b, scale_a, scale_b, FP32, None, offset_a, offset_b))

    expected = torch.relu(exact(a + 0.5, b + 0.5, *scales))
    assert_equal(torch.compile(product, fullgraph=True)(a, b, *scales), expected)
    torch._dynamo.reset()
    monkeypatch.setattr(providers, "_gluon_error", lambda: "no Gluon")
    with inductor_config.patch(force_disable_caches=True):  # their key says nothing of the patch
        got, (code,) = run_and_get_code(torch.compile(product, fullgraph=True), a, b, *scales)
    assert "triton_tem_fused" in code
    assert_equal(got, expected)


def test_arbitrary_scales_round_a_few_times():
    """Two products and a sum in float32, then the output dtype: half a unit in the last place each."""
    a, b = codes(300, 512, E4M3), codes(264, 512, E4M3)
    scales, bias = (
        (torch.rand(300, 1, device="cuda"), torch.rand(264, 1, device="cuda")),
        torch.randn(264, device="cuda"),
    )
    expected = exact(a, b, *scales, bias)
    magnitude = exact(a, b, *scales).abs() + bias.abs()
    for dtype in (FP32, BF16, FP16):
        error = (gemm.mm_8bit(a, b, *scales, dtype, bias).double() - expected).abs()
        unit = torch.finfo(dtype).eps / 2
        assert (error <= 3 * 2.0**-24 * magnitude + unit * expected.abs() + torch.finfo(dtype).tiny).all()


def test_strided_operands_and_unaligned_addresses():
    """Views are copied; a matrix that begins at an odd address is read by pointers."""
    a, b = codes(512, 300, E4M3).t(), codes(264, 1024, E4M3)[:, ::2]
    scales = powers_of_two(600, 1)[::2], powers_of_two(1, 264).t()
    assert_equal(gemm.mm_8bit(a, b, *scales, BF16), exact(a, b, *scales))
    a = codes(1, 300 * 512 + 1, E4M3)[0, 1:].view(300, 512)
    assert_equal(gemm.mm_8bit(a, b, *scales, BF16), exact(a, b, *scales))


@pytest.mark.parametrize("k", [64, 63], ids=["TMA", "pointers"])
@pytest.mark.parametrize("tma_store", [True, False])
def test_outputs_of_more_than_2_31_elements(k, tma_store):
    """Offsets past 2^31 in the output: 65664 × 32784 of them."""
    if k == 63 and tma_store:
        pytest.skip("there is no TMA store of the pointer kernel")
    check_large_output(
        lambda *x: gemm.mm_8bit(*x, BF16, config=gemm.Config(128, 256, 128, 8, 3, tma_store=tma_store)), k
    )


def check_large_output(multiply, k: int) -> None:
    a, b, one = signs(65664, k, INT8), signs(32784, k, INT8), torch.ones(1, 1, device="cuda")
    got = multiply(a, b, one, one)
    right = b.float().t()
    for rows in torch.arange(65664, device="cuda").split(4096):
        assert torch.equal(got[rows[0] : rows[-1] + 1], (a[rows].float() @ right).to(BF16))


@pytest.mark.parametrize("k", [16400, 16401], ids=["TMA", "pointers"])
def test_operands_of_more_than_2_31_elements(k):
    a, b, one = signs(131200, k, INT8), signs(128, k, INT8), torch.ones(1, 1, device="cuda")
    got = gemm.mm_8bit(a, b, one, one, FP32)
    for rows in (slice(0, 256), slice(-256, None)):
        assert torch.equal(got[rows], a[rows].float() @ b.float().t())


def test_a_graph_replays_on_new_operands():
    """Descriptors and addresses are captured, contents are not."""
    a, b, scale_a, scale_b = codes(300, 512, E4M3), codes(264, 512, E4M3), powers_of_two(300, 1), powers_of_two(264, 1)
    unaligned = codes(300, 511, E4M3), codes(264, 511, E4M3)

    def step():
        return gemm.mm_8bit(a, b, scale_a, scale_b, BF16), gemm.mm_8bit(*unaligned, scale_a, scale_b, BF16)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for _ in range(3):
        for tensor in (a, b, *unaligned):
            tensor.copy_(codes(*tensor.shape, E4M3))
        scale_a.copy_(powers_of_two(300, 1))
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        for output, operands in zip(outputs, ((a, b), unaligned), strict=True):
            assert_equal(output, exact(*operands, scale_a, scale_b))


def test_tuning_keeps_a_config_on_disk(monkeypatch, tmp_path):
    """The measured config is used, found again by another process, and right."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(gemm, "_MEASURED", {})
    gemm._read.cache_clear()
    a, b, scales = codes(1000, 512, E4M3), codes(776, 512, E4M3), (powers_of_two(1000, 1), powers_of_two(776, 1))
    assert_equal(gemm.mm_8bit(a, b, *scales, BF16, tune=True), exact(a, b, *scales))
    assert len(list(tmp_path.rglob(gemm._FILE))) == 1
    (measured,) = gemm._MEASURED.values()
    monkeypatch.setattr(gemm, "_MEASURED", {})
    gemm._read.cache_clear()
    problem = gemm.Problem(1000, 776, 512, E4M3, E4M3, BF16, gemm.card_of(a.device))
    assert gemm.best_config(problem, lambda config: None, tune=False) == measured
    gemm._read.cache_clear()


# --- providers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_every_provider_that_claims_a_product_is_exact(dtypes):
    """cuBLASLt, Gluon, Triton and the reference agree bit for bit: every shape of the scales, with and without bias."""
    a, b, bias = codes(304, 2048, dtypes[0]), codes(272, 2048, dtypes[1]), torch.randint(-3, 4, (272,), device="cuda")
    capability = torch.cuda.get_device_capability()
    for rows, columns in ((304, 272), (1, 272), (304, 1), (1, 1)):
        for shift in (None, bias.to(BF16)):
            scales, bias_dtype = (powers_of_two(rows, 1), powers_of_two(columns, 1)), None if shift is None else BF16
            whole = rows == columns == 1
            product = providers.Product((304, 272, 2048), dtypes, BF16, capability, bias_dtype, whole)
            expected = exact(a, b, *scales, shift)
            for provider in providers.PROVIDERS:
                if not provider.obstacle(product):
                    assert_equal(provider.run(a, b, *scales, BF16, shift), expected)
            assert_equal(providers.mm_8bit(a, b, *scales, BF16, shift), expected)


def test_products_of_nothing():
    """Empty operands: no launch, zeros where K is 0."""
    one = torch.ones(1, 1, device="cuda")
    for m, n, k in ((0, 16, 16), (16, 0, 16), (16, 16, 0)):
        got = providers.mm_8bit(codes(m, k, E4M3), codes(n, k, E4M3), one, one, BF16)
        assert_equal(got, torch.zeros(m, n, device="cuda"))


# --- through Inductor -----------------------------------------------------------------------------------------------


def residual_block(a, b, scale_a, scale_b, residual):
    return torch.relu(mm_8bit(a, b, scale_a, scale_b, BF16) + residual)


def block_inputs(m: int, n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Operands whose product and its sum with the residual are exact in bfloat16."""
    residual = torch.randint(-9, 10, (m, n), device="cuda").to(BF16)
    one = torch.ones(1, 1, device="cuda")
    return [signs(m, k, dtype), signs(n, k, dtype), one.expand(m, 1).contiguous(), one, residual]


def expected_block(a, b, scale_a, scale_b, residual):
    return torch.relu(exact(a, b, scale_a, scale_b) + residual.double())


@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_compiled_products_are_exact(mode, dtype):
    """cuBLASLt or the template, alone or measured against each other, with an epilogue."""
    compiled = torch.compile(residual_block, fullgraph=True, mode=mode)
    for _ in range(3):  # the third replays where there are graphs
        inputs = block_inputs(1000, 528, 240, dtype)
        assert_equal(compiled(*inputs), expected_block(*inputs))


@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
@pytest.mark.parametrize("n", [512, 515])
def test_the_template_takes_the_epilogue(monkeypatch, dtype, n):
    """Without cuBLASLt there is one kernel, which adds the residual; its output rows may be of any length."""
    monkeypatch.setattr(providers, "_cuda_version", lambda: (0,))
    monkeypatch.setattr(providers, "_gluon_error", lambda: "no Gluon")
    inputs = block_inputs(1000, n, 240, dtype)
    got, (code,) = run_and_get_code(torch.compile(residual_block, fullgraph=True), *inputs)
    assert "triton_tem_fused_add_mm_8bit_relu" in code
    assert_equal(got, expected_block(*inputs))


@pytest.mark.parametrize("place", [0, 2, 3, 5, 7, 9])
def test_configs_of_the_template_are_exact(monkeypatch, place):
    """Tiles that max-autotune may choose, the best first; several per processor, with row scales and bias."""
    configs = inductor._template_configs(gemm.Problem(4000, 2064, 528, INT8, INT8, FP32, this_card()))
    if place >= len(configs):
        pytest.skip("there are fewer")
    monkeypatch.setattr(inductor, "_template_configs", lambda problem: configs[place:])
    monkeypatch.setattr(providers, "_gluon_error", lambda: "no Gluon")
    a, b, bias = codes(4000, 528, INT8), codes(2064, 528, INT8), torch.randint(-3, 4, (2064,), device="cuda").float()
    scales = powers_of_two(4000, 1), powers_of_two(2064, 1)
    got = torch.compile(lambda *x: mm_8bit(*x[:4], FP32, x[4]), fullgraph=True)(a, b, *scales, bias)
    assert_equal(got, exact(a, b, *scales, bias))


@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_one_compilation_serves_every_number_of_rows(mode, dtype):
    """M is symbolic: long, short and one row, without compiling again for the first three."""
    compiled = torch.compile(residual_block, fullgraph=True, mode=mode)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for m in (1000, 37, 4096):
            inputs = block_inputs(m, 528, 240, dtype)
            for i in (0, 2, 4):
                torch._dynamo.mark_dynamic(inputs[i], 0)
            assert_equal(compiled(*inputs), expected_block(*inputs))


def test_template_outputs_of_more_than_2_31_elements(monkeypatch):
    """Inductor's index arithmetic, past 2^31."""
    monkeypatch.setattr(providers, "_gluon_error", lambda: "no Gluon")
    check_large_output(torch.compile(lambda *x: mm_8bit(*x, BF16), fullgraph=True), 64)
