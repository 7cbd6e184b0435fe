"""The product of stored FP4 codes on a GPU: run by hand (`pytest tests/gpu`), never in CI.

Cards before Blackwell widen MXFP4 to BF16 inside the same kernel, which checks addresses, masks, scales and epilogue;
what FP4 tensor cores make of it is untested until this runs on one. Memory that the caching allocator hands out holds
NaN, so an element that the kernel leaves out shows.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

import qcompile
from qcompile import compat
from qcompile.kernels.matmul import block_scaled, providers

from ..kernels.block_scaled_operands import MXFP4, NVFP4, arguments, exact, operand

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = pytest.mark.skipif(not CUDA, reason="needs a CUDA card with TMA")

BLACKWELL = CUDA and torch.cuda.get_device_capability() >= (10, 0)
ON_THIS_CARD = [
    pytest.param(MXFP4, id="mxfp4"),
    pytest.param(
        NVFP4,
        id="nvfp4",
        marks=pytest.mark.skipif(not BLACKWELL, reason="Triton widens E8M0 scales only, on cards without FP4"),
    ),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
mm_block_scaled = torch.ops.qcompile.mm_block_scaled


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [torch.full((2**power,), 0xFF, dtype=torch.uint8, device="cuda") for power in (9, 14, 20, 23, 25)]
    del blocks


@pytest.fixture
def claimed_blackwell(monkeypatch):
    """Graphs are lowered for compute capability 10.0, whatever the card."""
    torch._dynamo.reset()
    monkeypatch.setattr(compat, "tensor_core_capability", lambda device: (10, 0))


@pytest.mark.parametrize("quantizer", ON_THIS_CARD)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 33), (128, 256, 256), (300, 515, 464), (1000, 77, 2080), (257, 264, 4096)]
)
def test_any_extents_are_exact(shape, quantizer):
    """Every output dtype, with and without bias; rows of bytes and scales that have to be padded, and that have not."""
    m, n, k = shape
    a, b = operand(m, k, quantizer, "cuda"), operand(n, k, quantizer, "cuda")
    bias = torch.randint(-3, 4, (n,), device="cuda").half()
    for dtype, shift in ((FP32, None), (FP32, bias), (FP16, None), (BF16, bias)):
        got = block_scaled.mm_block_scaled(*arguments(a, b), dtype, shift)
        expected = exact(a, b, k, quantizer, shift).to(dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", ON_THIS_CARD)
def test_a_nan_scale_spoils_its_row_only(quantizer):
    """0xFF is NaN in E8M0, 0x7F in E4M3."""
    a, b = operand(130, 512, quantizer, "cuda"), operand(140, 512, quantizer, "cuda")
    a[1].view(torch.uint8)[129, 7] = 0x7F if quantizer.scale.two_level else 0xFF
    got = block_scaled.mm_block_scaled(*arguments(a, b), FP32)
    assert got[129].isnan().all()
    assert not got[:129].isnan().any()


@pytest.mark.parametrize("quantizer", ON_THIS_CARD)
def test_a_graph_replays_on_new_operands(quantizer):
    """Descriptors and addresses are captured, contents are not."""
    a, b = operand(300, 512, quantizer, "cuda"), operand(264, 512, quantizer, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block_scaled.mm_block_scaled(*arguments(a, b), BF16)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_scaled.mm_block_scaled(*arguments(a, b), BF16)
    others = operand(300, 512, quantizer, "cuda"), operand(264, 512, quantizer, "cuda")
    for held, new in zip(arguments(a, b), arguments(*others), strict=True):
        if held is not None:
            held.copy_(new)
    out.fill_(float("nan"))
    graph.replay()
    torch.testing.assert_close(out, exact(a, b, 512, quantizer).to(BF16), rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
def test_the_op_is_exact_on_every_card(quantizer):
    """Through the dispatcher, which runs the kernel where there are FP4 tensor cores and decodes elsewhere."""
    a, b = operand(35, 96, quantizer, "cuda"), operand(40, 96, quantizer, "cuda")
    got = mm_block_scaled(*arguments(a, b), FP32)
    torch.testing.assert_close(got, exact(a, b, 96, quantizer).float(), rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", [MXFP4, NVFP4], ids=["mxfp4", "nvfp4"])
@pytest.mark.parametrize("tokens", [(4, 96), (3, 37)])
def test_a_layer_compiled_for_blackwell(claimed_blackwell, monkeypatch, quantizer, tokens):
    """Stored codes of a layer meet in the kernel (of MXFP4; NVFP4 is decoded unless the card has FP4) and give the
    product of the decoded operands: two roundings of those to 2^-9, and one of the result.
    """
    if quantizer is MXFP4:
        monkeypatch.setattr(providers, "_capability", lambda device: (10, 0))
    text = " ".join(str(quantizer).split()[:3])
    options = {"activation": text, "weight": text, "debug": True}
    torch.manual_seed(0)
    layer = nn.Linear(256, 640, device="cuda", dtype=BF16)
    x = torch.randn(*tokens, 256, device="cuda", dtype=BF16, requires_grad=True)

    def step(**more):
        torch._dynamo.reset()
        y = torch.compile(layer, backend="qcompile_fp4", options=options | more)(x)
        cotangent = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
        return [t.detach().double() for t in (y, *torch.autograd.grad(y, (x, *layer.parameters()), cotangent))]

    for got, expected in zip(step(), step(disable_passes=["lower", "merge_quantize"]), strict=True):
        assert (got - expected).norm() < 6e-3 * expected.norm()


@pytest.mark.parametrize("shape", [(1, 1), (37, 45), (1000, 515), (4096, 2048)])
def test_codes_of_the_transpose(shape):
    """What Inductor generates is what the reference says, half bytes included."""
    rows, size = shape
    codes = torch.randint(0, 256, (rows, (size + 1) // 2), dtype=torch.uint8, device="cuda")
    got = torch.compile(lambda codes: torch.ops.qcompile.transpose_codes(codes, size), fullgraph=True)(codes)
    assert torch.equal(got.cpu(), torch.ops.qcompile.transpose_codes(codes.cpu(), size))


def test_a_layer_whose_weight_is_in_squares(claimed_blackwell, monkeypatch):
    """Forward and dX by the kernel, which reads the weight's codes as they are and transposed; MX blocks, which cards
    before Blackwell widen. The same as decoded, but for the roundings above.
    """
    monkeypatch.setattr(providers, "_capability", lambda device: (10, 0))
    options = {"activation": "e2m1 block32 e8m0", "weight": "e2m1 block32x32 e8m0", "gradient": "e2m1 block32 e8m0"}
    torch.manual_seed(0)
    layer = nn.Linear(253, 648, device="cuda", dtype=BF16)
    x = torch.randn(96, 253, device="cuda", dtype=BF16, requires_grad=True)
    rows = qcompile.explain(layer, x, options=options).rows
    assert {row.role: row.provider for row in rows if row.provider.endswith("dot_scaled")}.keys() == {"fprop", "dgrad"}

    def step(**more):
        torch._dynamo.reset()
        y = torch.compile(layer, backend="qcompile_fp4", options=options | {"debug": True} | more)(x)
        cotangent = torch.linspace(-1, 1, y.numel(), device="cuda").view_as(y).to(y.dtype)
        return [t.detach().double() for t in (y, *torch.autograd.grad(y, (x, *layer.parameters()), cotangent))]

    for got, expected in zip(step(), step(disable_passes=["lower", "merge_quantize"]), strict=True):
        assert (got - expected).norm() < 6e-3 * expected.norm()


def test_the_report_says_that_it_is_untested(claimed_blackwell):
    layer, x = nn.Linear(256, 640, device="cuda", dtype=BF16), torch.randn(96, 256, device="cuda", dtype=BF16)
    options = {"activation": "e2m1 block32 e8m0", "weight": "e2m1 block32 e8m0"}
    (row,) = (row for row in qcompile.explain(layer, x, options=options).rows if row.role == "fprop")
    assert row.provider.endswith("dot_scaled")
    assert "untested on compute capability 10.0" in row.reason
