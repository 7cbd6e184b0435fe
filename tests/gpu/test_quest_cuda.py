"""QuEST's gradients on a GPU, by the kernels and products that a training step runs: run by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile

from ..recipes.test_quest import check_gradients

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # Every test compiles the same code object, and Dynamo gives up after eight.
    pytest.mark.usefixtures("fresh_dynamo"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [101, 448, 2048], ids=lambda n: f"K={n}")
@pytest.mark.parametrize("bits", [1, 2, 4, 8, "ternary", "fp4"], ids=str)
def test_gradients_are_the_papers(bits, size, dtype):
    """Rotations of no, 64 and 128 elements."""
    check_gradients({"bits": bits}, size, dtype, "qcompile_quest", device="cuda", options={"bits": bits})


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
def test_eight_bits_run_forward_as_int8():
    """The product on INT8 tensor cores is that of decoded operands, to their roundings; the backward says why not."""
    layer = nn.Linear(2048, 1024, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    options = {"bits": 8, "backward": "fp8"}
    rows = qcompile.explain(layer, x, backend="qcompile_quest", options=options).rows
    assert {row.role: row.provider.split("; ")[-1] for row in rows}["fprop"] == "gluon"
    assert {row.reason for row in rows if row.role != "fprop"} == {
        "midrise8 is not exact in 8-bit floating point, which gradients need"
    }
    outputs = []
    for disabled in ([], ["lower", "merge_quantize"]):
        torch._dynamo.reset()
        call = torch.compile(layer, backend="qcompile_quest", options=options | {"disable_passes": disabled})
        y = call(x)
        outputs.append([t.double() for t in (y, *torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y)))])
    for on_codes, decoded in zip(*outputs, strict=True):
        assert (on_codes - decoded).norm() < 6e-3 * decoded.norm()


def test_gradients_of_sparse_weights_are_the_papers():
    options = {"bits": 4, "weight": {"sparsity": "4:8"}}
    check_gradients(options, 384, torch.bfloat16, "qcompile_quest", device="cuda", options=options)
