"""The 8-bit product in Gluon on Hopper: exact sums of 4-bit codes and of all int8, every config, any M and N.

Scales are powers of two, so every result is known exactly, up to its one rounding to the output dtype. Memory that the
caching allocator hands out holds NaN, so an element that the kernel leaves out shows.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch._inductor.lowering import lowerings, register_lowering
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton.experimental.gluon")

from qcompile.kernels.matmul import gluon, inductor, providers
from qcompile.kernels.quantize.reference import unpack

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAIRS = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2), (INT8, INT8)]
mm_8bit = torch.ops.qcompile.mm_8bit


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [torch.full((2**bits,), 0xFF, dtype=torch.uint8, device="cuda") for bits in (9, 14, 20, 23, 25)]
    del blocks


def codes(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random E2M1 levels, times two for INT8; of E5M2, powers of two."""
    levels = [0, 1, 2, 4] if dtype == E5M2 else [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*levels, *(-level for level in levels[1:])], device="cuda")
    return (values[torch.randint(len(values), (rows, columns), device="cuda")] * (2 if dtype == INT8 else 1)).to(dtype)


def any_int8(rows: int, columns: int) -> torch.Tensor:
    """All of int8, −128 included."""
    return torch.randint(-128, 128, (rows, columns), dtype=INT8, device="cuda")


def powers_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-3, 3, shape, device="cuda").float()


def exact(a, b, scale_a, scale_b, bias=None) -> torch.Tensor:
    """The product in float64, which holds it exactly where the scales are powers of two."""
    product = a.float().double() @ b.float().double().t() * scale_a.double() * scale_b.double().t()
    return product if bias is None else product + bias.double()


def check(m: int, n: int, k: int, dtypes, dtype: torch.dtype = BF16, **options) -> None:
    """A product with scales of rows and a bias, of which nothing is lost before the output is rounded."""
    a, b = codes(m, k, dtypes[0]), codes(n, k, dtypes[1])
    scales, bias = (powers_of_two(m, 1), powers_of_two(n, 1)), torch.randint(-3, 4, (n,), device="cuda").float()
    assert_equal(gluon.mm_8bit(a, b, *scales, dtype, bias, **options), exact(a, b, *scales, bias))


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=0)


# --- the kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", gluon.CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_every_config_is_exact(config, dtype):
    """Tiles that hang over all three ends, several per program: the ring goes round across tiles."""
    a, b = codes(5000, 2064, dtype), codes(6152, 2064, dtype)
    scales = powers_of_two(5000, 1), powers_of_two(6152, 1)
    assert_equal(gluon.mm_8bit(a, b, *scales, BF16, config=config), exact(a, b, *scales))
    if config.shared_memory(1) <= gluon.SHARED_MEMORY:
        check(300, 520, 144, (dtype, dtype), config=config)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("n", [520, 515], ids=["TMA store", "pointer store"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_every_pair_of_dtypes_is_exact(n, dtypes, dtype):
    """Mixed FP8 too; rows of 515 elements cannot be stored by TMA."""
    check(300, n, 144, dtypes, dtype)


@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 5, 32), (1000, 77, 528), (129, 264, 1008), (65, 257, 128)])
def test_any_extents_are_exact(shape, dtype):
    """Every output dtype, scales of rows and of tensors, without bias."""
    m, n, k = shape
    a, b = codes(m, k, dtype), codes(n, k, dtype)
    for rows, columns, out in ((m, n, FP32), (1, n, BF16), (m, 1, FP16), (1, 1, FP32)):
        scales = powers_of_two(rows, 1) / 8, powers_of_two(columns, 1) / 8
        assert_equal(gluon.mm_8bit(a, b, *scales, out), exact(a, b, *scales))


def test_all_of_int8_is_summed_in_int32():
    """Sums past 2^24, which float32 would round on the way, and the most negative of them, of −128 squared."""
    one = torch.ones(1, 1, device="cuda")
    a, b = any_int8(300, 8192), any_int8(520, 8192)
    a[7], b[11] = -128, -128
    a[8], b[12] = 127, -128
    got = gluon.mm_8bit(a, b, one, one, FP32)
    assert_equal(got, (a.double() @ b.double().t()).float())  # both are rounded once, from the integer


@pytest.mark.parametrize("config", gluon.CONFIGS, ids=str)
@pytest.mark.parametrize("n", [6152, 515], ids=["TMA store", "pointer store"])
def test_offsets_make_it_the_product_of_the_levels(config, n):
    """Half-integers of 8 bits: codes are beside them by ½ on both sides, or on one. Sums stay below 2^22."""
    a, b, bias = any_int8(5000, 240), any_int8(n, 240), torch.randint(-3, 4, (n,), device="cuda").float()
    scales = powers_of_two(5000, 1), powers_of_two(n, 1)
    sums = (a.sum(1, keepdim=True) / 2).float(), (b.sum(1, keepdim=True) / 2).float()
    for shift, offset_a, offset_b, left, right in (
        (None, sums[0] + 240 / 4, sums[1], a + 0.5, b + 0.5),
        (bias, sums[0] + 240 / 4, sums[1], a + 0.5, b + 0.5),
        (None, sums[0], None, a, b + 0.5),
        (bias, None, sums[1], a + 0.5, b),
    ):
        if config.shared_memory((shift is not None) + (offset_b is not None)) <= gluon.SHARED_MEMORY:
            got = gluon.mm_8bit(a, b, *scales, FP32, shift, offset_a, offset_b, config=config)
            assert_equal(got, exact(left, right, *scales, shift))
            got = gluon.mm_8bit(a, b, *scales, BF16, None, offset_a, offset_b, config=config)
            assert_equal(got, exact(left, right, *scales))


@pytest.mark.parametrize("config", gluon.CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128), (333, 200, 1152), (5000, 515, 640), (300, 6152, 16512)], ids=str)
def test_bits_set_in_both_rows_are_counted(config, shape):
    """With offsets and bias, as levels ±½ want it: exact against float64."""
    m, n, k = shape
    a, b = (torch.randint(256, (rows, k // 8), dtype=torch.uint8, device="cuda") for rows in (m, n))
    bits = [unpack(x, 1, k).float() for x in (a, b)]
    levels = [0.5 - x for x in bits]
    scales, bias = (powers_of_two(m, 1), powers_of_two(n, 1)), torch.randint(-3, 4, (n,), device="cuda").float()
    assert_equal(gluon.mm_1bit(a, b, *scales, BF16, config=config), exact(*bits, *scales))
    if config.shared_memory(2) <= gluon.SHARED_MEMORY:
        offset_a, offset_b = (x.sum(1, keepdim=True) / 2 - c for x, c in zip(levels, (k / 4, 0), strict=True))
        got = gluon.mm_1bit(a, b, *scales, FP32, bias, offset_a, offset_b, config=config)
        assert_equal(got, exact(*levels, *scales, bias))


def test_counts_of_bits_replay_in_a_graph_and_through_the_op():
    """The op takes Gluon's kernel where K allows it, and counts in plain torch where not."""
    for k, name in ((256, "popcount"), (136, "reference")):
        a, b = (torch.randint(256, (rows, k // 8), dtype=torch.uint8, device="cuda") for rows in (77, 130))
        product = providers.Product((77, 130, k), (providers.ONE_BIT, providers.ONE_BIT), FP32, (9, 0))
        assert providers.choose(product)[0].name == name
        one = torch.ones(1, 1, device="cuda")
        torch.ops.qcompile.mm_1bit(a, b, one, one, FP32)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = torch.ops.qcompile.mm_1bit(a, b, one, one, FP32)
        a.random_(256)
        out.fill_(float("nan"))
        graph.replay()
        assert_equal(out, unpack(a, 1, k).double() @ unpack(b, 1, k).double().t())


@pytest.mark.parametrize("bias", [BF16, FP16, FP32])
def test_a_bias_of_any_dtype(bias):
    a, b, shift = codes(200, 256, INT8), codes(264, 256, INT8), torch.randint(-9, 9, (264,), device="cuda").to(bias)
    one = torch.ones(1, 1, device="cuda")
    assert_equal(gluon.mm_8bit(a, b, one, one, FP32, shift), exact(a, b, one, one, shift))


def test_strided_and_unaligned_operands_are_copied():
    a, b = codes(512, 300, INT8).t(), codes(264, 1024, INT8)[:, ::2]
    scales = powers_of_two(600, 1)[::2], powers_of_two(1, 264).t()
    assert_equal(gluon.mm_8bit(a, b, *scales, BF16), exact(a, b, *scales))
    a = codes(1, 300 * 512 + 1, INT8)[0, 1:].view(300, 512)
    bias = torch.randint(-3, 4, (265,), device="cuda").to(BF16)[1:]
    assert_equal(gluon.mm_8bit(a, b, *scales, BF16, bias), exact(a, b, *scales, bias))


@pytest.mark.parametrize("n", [32784, 32785], ids=["TMA store", "pointer store"])
def test_outputs_of_more_than_2_31_elements(n):
    """Offsets past 2^31 in the output: 65664 rows. Sums of 64 signs are exact in bfloat16."""
    a, b = (torch.randint(-1, 2, (rows, 64), dtype=INT8, device="cuda") for rows in (65664, n))
    one = torch.ones(1, 1, device="cuda")
    got, right = gluon.mm_8bit(a, b, one, one, BF16), b.float().t()
    for rows in torch.arange(65664, device="cuda").split(4096):
        assert torch.equal(got[rows[0] : rows[-1] + 1], (a[rows].float() @ right).to(BF16))


def test_many_launches_agree():
    """A race between the loads, the products and the stores would show in one of them."""
    a, b, scales = codes(4096, 4096, INT8), codes(4096, 4096, INT8), (powers_of_two(4096, 1), powers_of_two(4096, 1))
    first = gluon.mm_8bit(a, b, *scales, BF16)
    assert_equal(first, exact(a, b, *scales))
    for _ in range(50):
        assert torch.equal(gluon.mm_8bit(a, b, *scales, BF16), first)


def test_a_graph_replays_on_new_operands():
    a, b, scale_a, scale_b = codes(300, 512, INT8), codes(264, 512, INT8), powers_of_two(300, 1), powers_of_two(264, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gluon.mm_8bit(a, b, scale_a, scale_b, BF16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gluon.mm_8bit(a, b, scale_a, scale_b, BF16)
    for _ in range(3):
        a.copy_(codes(300, 512, INT8))
        scale_a.copy_(powers_of_two(300, 1))
        out.fill_(float("nan"))
        graph.replay()
        assert_equal(out, exact(a, b, scale_a, scale_b))


def test_tuning_keeps_a_config(monkeypatch):
    monkeypatch.setattr(gluon, "_MEASURED", {})
    check(1000, 776, 512, (INT8, INT8), tune=True)
    (measured,) = gluon._MEASURED.values()
    assert measured in gluon.CONFIGS


# --- as a provider --------------------------------------------------------------------------------------------------


def test_it_is_the_provider_of_int8_where_it_can_be():
    """K of whole 16 bytes; the sum of a product with other K goes to Triton."""
    for k, name in ((512, "gluon"), (513, "triton")):
        product = providers.Product((300, 264, k), (INT8, INT8), BF16, (9, 0))
        assert providers.choose(product)[0].name == name
        a, b, scales = codes(300, k, INT8), codes(264, k, INT8), (powers_of_two(300, 1), powers_of_two(264, 1))
        assert_equal(providers.mm_8bit(a, b, *scales, BF16), exact(a, b, *scales))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["default", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_compiled_products_are_exact(mode, bias):
    """Called from Inductor's code, or measured against its template."""
    if mm_8bit.default not in lowerings:
        register_lowering(mm_8bit.default, type_promotion_kind=None)(inductor.lower_mm_8bit)
    torch._dynamo.reset()

    def block(a, b, scale_a, scale_b, shift):
        return torch.relu(mm_8bit(a, b, scale_a, scale_b, FP32, shift if bias else None))

    compiled, ran = torch.compile(block, fullgraph=True, mode=mode, dynamic=False), []
    for m in (1000, 1000, 37):
        a, b, scales = codes(m, 240, INT8), codes(528, 240, INT8), (powers_of_two(m, 1), powers_of_two(528, 1))
        shift = torch.randint(-3, 4, (528,), device="cuda").to(BF16)
        got, code = run_and_get_code(compiled, a, b, *scales, shift)
        assert_equal(got, torch.relu(exact(a, b, *scales, shift if bias else None)))
        ran += code
    if mode == "default":
        assert "qcompile_mm_8bit_in_gluon" in ran[0]


def test_it_is_not_offered_without_gluon():
    with mock.patch.object(providers, "_gluon_error", return_value="no Gluon"):
        product = providers.Product((300, 264, 512), (INT8, INT8), BF16, (9, 0))
        provider, why = providers.choose(product)
    assert provider.name == "triton"
    assert "gluon: its kernel cannot be imported: no Gluon" in why
