"""FP8 products by cuBLASLt called directly: torch's own bits, at every call, on every thread and in a CUDA graph.

What would break: a wrong constant of its interface, an address kept from an earlier call, a workspace that is shared.
"""

from __future__ import annotations

import threading

import pytest
import torch

from qcompile.kernels.matmul import cublaslt
from qcompile.kernels.register import DIRECT

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a CUDA card with FP8 and scales of rows")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def operands(m, n, k, dtypes=(E4M3, E4M3), of_rows=True, bias=False):
    a, b = (torch.randn(rows, k, device="cuda").to(dtype) for rows, dtype in zip((m, n), dtypes, strict=True))
    scales = [torch.rand(rows if of_rows else 1, 1, device="cuda") + 0.5 for rows in (m, n)]
    return a, b, *scales, torch.randn(n, device="cuda", dtype=torch.bfloat16) if bias else None


def expected(a, b, scale_a, scale_b, bias):
    return torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), bias, None, torch.bfloat16, use_fast_accum=True)


@pytest.mark.parametrize("of_rows", [True, False], ids=["rows", "tensors"])
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=["e4m3", "e5m2·e4m3", "e4m3·e5m2"])
@pytest.mark.parametrize("shape", [(1, 16, 16), (37, 48, 80), (129, 1040, 528), (4096, 640, 1792), (640, 640, 32768)])
def test_products_are_torchs(shape, dtypes, of_rows):
    """And those of float64, to BF16 and to the accumulator's 14 bits."""
    inputs = operands(*shape, dtypes, of_rows, bias=shape[1] == 48)
    assert cublaslt.supports(*inputs[:2])
    found = cublaslt.scaled_mm(*inputs)
    assert torch.equal(found, expected(*inputs))
    a, b, scale_a, scale_b, bias = (None if x is None else x.double() for x in inputs)
    exact = (a @ b.t()) * scale_a * scale_b.t() + (0 if bias is None else bias)
    assert (found.double() - exact).norm() < 2**-7 * exact.norm()


def test_a_repeated_call_reads_its_own_operands():
    """Replayed: products of other operands, in other memory, with and without a bias in turn."""
    kernel, kept = DIRECT["mm_8bit"], []
    for turn in range(6):
        a, b, scale_a, scale_b, bias = operands(256, 512, 384, bias=turn % 2 == 1)
        kept.append((a, b))
        found = kernel(a, b, scale_a, scale_b, torch.bfloat16, bias, None, None)
        assert torch.equal(found, expected(a, b, scale_a, scale_b, bias))
    kinds = [plan for kind, plan in kernel.plans.items() if kind[0][0] == (256, 384)]
    assert len(kinds) >= 2
    assert None not in kinds, "a product is not replayed"


def test_threads_do_not_share_addresses():
    """Two threads multiply with other scales at the same time."""
    inputs = [operands(128, 256, 256) for _ in range(2)]
    wanted, wrong = [expected(*each) for each in inputs], []

    def multiply(place):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(200):
                if not torch.equal(cublaslt.scaled_mm(*inputs[place]), wanted[place]):
                    wrong.append(place)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=multiply, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_a_cuda_graph():
    """The graph reads what lies at the captured addresses at its replay."""
    inputs = operands(512, 640, 1792)
    cublaslt.scaled_mm(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = cublaslt.scaled_mm(*inputs)
    inputs[0].copy_(torch.randn(512, 1792, device="cuda").to(E4M3))
    graph.replay()
    assert torch.equal(found, expected(*inputs))


def test_an_address_that_is_not_aligned_is_left_to_torch():
    codes = torch.zeros(64 * 64 + 8, device="cuda").to(E4M3)[8:].view(64, 64)
    assert not cublaslt.supports(codes, operands(64, 64, 64)[1])
