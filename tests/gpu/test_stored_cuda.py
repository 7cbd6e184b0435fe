"""Products with stored weights on a GPU: run by hand (`pytest tests/gpu`), never in CI.

Written before any of these kernels had run on a card. Memory that the caching allocator hands out holds NaN, so an
element that a kernel leaves out shows. Bounds are those of ``tests/kernels/test_stored_matmul.py``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton")

import qcompile
from qcompile.ir.stored import Stored
from qcompile.kernels.matmul import reference
from qcompile.kernels.matmul import stored as kernels
from qcompile.kernels.matmul.stored import CONFIGS, Config
from qcompile.kernels.register import DIRECT

from ..kernels.test_stored_matmul import NESTED, SPECS, arguments, as_multiplied, assert_product, decoded, weight

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = pytest.mark.skipif(not CUDA, reason="needs a CUDA card")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CONFIG_OF = {str(config): (rows, config) for rows, configs in CONFIGS.items() for config in configs}


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [torch.full((2**power,), 0xFF, dtype=torch.uint8, device="cuda") for power in (9, 14, 20, 23, 25)]
    del blocks


def check(config: Config, rows: bool, spec: str, m: int, n: int, size: int, dtype, high_first=False, bias=None) -> None:
    parts = weight(n, size, spec, "cuda")
    x = torch.randn(m, n if rows else size, device="cuda", dtype=dtype)
    got = kernels.mm_stored(x, *arguments(parts, spec, size, rows, dtype, bias, high_first), config=config)
    dense = as_multiplied(config.kernel, parts, spec, size, dtype)
    assert_product(got, x, dense.t() if rows else dense, bias, rounded=config.kernel not in ("gemv", "fragments"))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", CONFIG_OF)
def test_every_config_with_every_kind_of_scale(name, spec):
    """Odd N and M, K = 3 blocks and K of several steps, both halves' order, levels by table and by formula."""
    rows, config = CONFIG_OF[name]
    block = Stored.parse(spec).quantizer.granularity.size or 32
    m = {"gemv": config.most_m, "fragments": max(1, config.most_m - 1)}.get(config.kernel, 17)
    for size, table, high_first in ((3 * block, True, False), (4096 + 3 * block, True, True), (640, False, False)):
        check(replace(config, table=table), rows, spec, m, 37, size, BF16, high_first)
    bias = torch.randn(640 if rows else 1000, device="cuda", dtype=FP16)
    check(config, rows, spec, 1, 1000, 640, FP16, bias=bias)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 16, 17, 64, 65, 300, 4096])
@pytest.mark.parametrize("rows", [False, True])
def test_the_op_for_any_number_of_rows(m, rows):
    """Whatever kernel the op takes, and decode + cuBLAS; a weight of many tiles and one of few, which is split."""
    for n, size in ((4096, 1024), (192, 8192)):
        parts = weight(n, size, NESTED, "cuda")
        x = torch.randn(m, n if rows else size, device="cuda", dtype=BF16)
        got = torch.ops.qcompile.mm_stored(x, *arguments(parts, NESTED, size, rows, BF16))
        config = kernels.config_for((m, n, size), rows, BF16, kernels._rates(x.device))
        kernel = "" if config is None else config.kernel
        dense = as_multiplied(kernel, parts, NESTED, size, BF16)
        assert_product(got, x, dense.t() if rows else dense, rounded=kernel != "fragments")


#: Warps side by side and in turn, tiles of 16 rows of W, steps, programs per processor.
CUTS = ((1, 1, 1, 1, 1), (4, 2, 1, 2, 1), (1, 8, 1, 2, 4), (2, 4, 2, 1, 1))
FRAGMENTS = (*SPECS, "int4 block96", "int4 block256")


@pytest.mark.parametrize("spec", FRAGMENTS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16, 17, 33, 64])
def test_fragments_however_they_are_cut(m, spec):
    """Odd N; K of some blocks, with a bias, and of whole rounds, where nothing is masked, either half of a byte first;
    splits. Every cut meets every spec.
    """
    across, along, tiles, stages, programs = CUTS[(m + FRAGMENTS.index(spec)) % len(CUTS)]
    block_m = 1 << (m - 1).bit_length()
    config = Config("fragments", 0, 16 * across * tiles, 16 * along, block_m, across * along, stages, programs)
    bias = torch.randn(37, device="cuda", dtype=FP16)
    block = Stored.parse(spec).quantizer.granularity.size or 40
    check(config, False, spec, m, 37, 7 * block, FP16, bias=bias)
    check(config, False, spec, m, 37, 4096 // block * block, BF16, high_first=True)


OVERLAPPING = (
    Config("fragments", 1, 32, 64, 1, warps=8, stages=4, programs=2),
    Config("fragments", 16, 64, 64, 16, warps=16, stages=1, programs=1),
)


@pytest.mark.parametrize("config", OVERLAPPING, ids=str)
def test_a_kernel_that_begins_early_reads_what_those_in_front_wrote(config):
    """x is the last product; every fourth time codes are new. Waiting for the device in between changes no bit."""
    parts = weight(2048, 2048, NESTED, "cuda")
    start = torch.randn(config.block_m, 2048, device="cuda", dtype=BF16)
    sources = parts["codes"].clone(), parts["codes"].flip(0)

    def chain(wait: bool) -> torch.Tensor:
        x = start
        for i in range(24):
            if i % 4 == 0:
                parts["codes"].copy_(sources[i // 4 % 2])
            if wait:
                torch.cuda.synchronize()
            x = kernels.mm_stored(x, *arguments(parts, NESTED, 2048, False, BF16), config=config)
        return x

    expected = chain(wait=True)
    assert expected.isfinite().all()
    for _ in range(5):
        torch.testing.assert_close(chain(wait=False), expected, rtol=0, atol=0)


@pytest.mark.parametrize("m", [1, 7, 8])
def test_float32_rows(m):
    check(kernels.config_for((m, 512, 1024), False, FP32, kernels._rates(torch.device("cuda"))), False, NESTED, m, 512,
          1024, FP32)  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_decoded_weights_are_the_references_bit_for_bit(spec, dtype):
    parts = weight(515, 1152, spec, "cuda")
    call = arguments(parts, spec, 1152, True, dtype)
    got = kernels.decode(*call[:4], dtype, *call[7:9])
    torch.testing.assert_close(got, decoded(parts, spec, 1152, dtype), rtol=0, atol=0)


def test_the_same_call_gives_the_same_bits():
    """Sums of splits are added in order."""
    parts = weight(128, 28672, NESTED, "cuda")
    for m in (1, 4, 16, 64):
        x = torch.randn(m, 28672, device="cuda", dtype=BF16)
        call = arguments(parts, NESTED, 28672, False, BF16)
        first = torch.ops.qcompile.mm_stored(x, *call)
        assert all(torch.equal(first, torch.ops.qcompile.mm_stored(x, *call)) for _ in range(20))


@pytest.mark.parametrize("m", [1, 16])
def test_repeated_calls_and_graphs(m):
    """A call is replayed at its own addresses, with the table of nested scales; a CUDA graph holds it."""
    DIRECT["mm_stored"].plans.clear()
    parts = weight(1024, 2048, NESTED, "cuda")
    call = arguments(parts, NESTED, 2048, False, BF16)
    inputs = [torch.randn(m, 2048, device="cuda", dtype=BF16) for _ in range(3)]
    products = [DIRECT["mm_stored"](x, *call) for x in inputs]
    (plan,) = DIRECT["mm_stored"].plans.values()
    assert plan is not None, "the call cannot be replayed"
    expected = [kernels.mm_stored(x, *call) for x in inputs]
    assert all(map(torch.equal, products, expected))
    static, graph = inputs[0].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = DIRECT["mm_stored"](static, *call)
    for x, product in zip(inputs, expected, strict=True):
        static.copy_(x)
        graph.replay()
        assert torch.equal(result, product)


class Layers(nn.Module):
    def __init__(self, spec: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 1024), nn.Linear(1024, 256, bias=False)
        self.cuda().bfloat16()
        qcompile.pack_(self, spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize("spec", [NESTED, "int4 block32", "e2m1 block16 e4m3", "int4 row"])
@pytest.mark.parametrize("m", [1, 16, 4096])
def test_compiled_layers(spec, m):
    """Forward and gradient through Inductor, near those of eager torch, which decodes every weight."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Layers(spec)
    compiled = torch.compile(model, backend="qcompile_stored", fullgraph=True)
    x = torch.randn(m, 512, device="cuda", dtype=BF16, requires_grad=True)
    dy = torch.randn(m, 256, device="cuda", dtype=BF16)
    results = []
    for function in (model, compiled):
        x.grad = None
        y = function(x)
        y.backward(dy)
        results.append((y.detach().double(), x.grad.double()))
    # Three roundings to bfloat16 of each way's own on the way through two layers; a wrong element would be off by 1.
    for got, expected in zip(results[1], results[0], strict=True):
        assert (got - expected).norm() <= 3 * 2.0**-8 * expected.norm()


def test_one_graph_for_all_batches_chooses_when_it_runs():
    torch.compiler.reset()
    model = Layers(NESTED)
    compiled = torch.compile(model, backend="qcompile_stored", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (2, 3, 16, 100, 3000):
            x = torch.randn(m, 512, device="cuda", dtype=BF16)
            got, expected = compiled(x).double(), model(x).double()
            assert (got - expected).norm() <= 3 * 2.0**-8 * expected.norm()


def test_reduce_overhead():
    """CUDA graphs of Inductor's own hold the calls, and the first of these may be what makes the tables."""
    torch.compiler.reset()
    for table in (kernels._book, kernels._pairs):
        table.cache_clear()
    model = Layers(NESTED)
    compiled = torch.compile(model, backend="qcompile_stored", mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 512, device="cuda", dtype=BF16)
            got, expected = compiled(x).double(), model(x).double()
            assert (got - expected).norm() <= 3 * 2.0**-8 * expected.norm()


def test_reference_and_kernels_have_one_signature():
    """A call with everything by position, as generated code makes it."""
    parts = weight(64, 256, NESTED, "cuda")
    x = torch.randn(4, 256, device="cuda", dtype=BF16)
    call = arguments(parts, NESTED, 256, False, BF16, torch.randn(64, device="cuda", dtype=BF16), True)
    got, expected = DIRECT["mm_stored"](x, *call), reference.mm_stored(x, *call)
    assert (got.double() - expected.double()).norm() <= 2.0**-7 * expected.double().norm()
