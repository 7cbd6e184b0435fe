"""QuEST's gradients on a GPU, by the kernels and products that a training step runs: run by hand."""

from __future__ import annotations

import pytest
import torch

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


def test_gradients_of_sparse_weights_are_the_papers():
    options = {"bits": 4, "weight": {"sparsity": "4:8"}}
    check_gradients(options, 384, torch.bfloat16, "qcompile_quest", device="cuda", options=options)
