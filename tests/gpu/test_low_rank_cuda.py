"""LoRA's passes on a GPU: run by hand (`pytest tests/gpu`), never in CI.

Blocks that the caching allocator hands out hold NaN, so a sum that reads
what was not written shows.
"""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ..passes.test_low_rank import PASSES, Block

CUDA = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = pytest.mark.skipif(not CUDA, reason="needs a CUDA card")


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    torch.compiler.reset()
    blocks = [torch.full((2**power,), 0xFF, dtype=torch.uint8, device="cuda") for power in (9, 14, 20, 23, 25)]
    del blocks


def block(dtype: torch.dtype, **options) -> Block:
    return Block(**options).to("cuda", dtype)


def given(rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, rows, 512, generator=generator).to("cuda", dtype).requires_grad_()


def step(call, model, x) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    x.grad = None
    y = call(x)
    y.backward(torch.ones_like(y))
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double() for name, tensor in {"y": y, "dx": x.grad, **found}.items()}


@pytest.mark.parametrize("options", [{}, {"factor": 0.3, "bias": True}], ids=["", "bias, factor 0.3"])
@pytest.mark.parametrize("rows", [5, 2048])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_as_near_to_float64_as_eager_torch(options, rows, mode):
    """Three steps, of which later ones reuse memory, or are replayed; few rows, for which weights decode themselves."""
    exact_model, model = block(torch.float64, **options), block(torch.bfloat16, **options)
    exact = step(exact_model, exact_model, given(rows, torch.float64))
    x = given(rows, torch.bfloat16)
    eager = step(model, model, x)
    chosen = {"mode": mode} if mode else {}
    compiled = torch.compile(model, backend="qcompile_stored", fullgraph=True, options=chosen)
    for _ in range(3):
        found = step(compiled, model, x)
        for name, value in exact.items():
            errors = [(of[name] - value).norm() / value.norm() for of in (found, eager)]
            assert errors[0] < 1.2 * errors[1], name


def test_summands_are_not_copied_and_passes_are_saved():
    """By kernels that ran: no copy from device to device, and fewer bytes at the peak."""
    peaks = {}
    for disabled in ([], PASSES):
        torch.compiler.reset()
        model, x = block(torch.bfloat16), given(4096, torch.bfloat16)
        compiled = torch.compile(model, backend="qcompile_stored", options={"disable_passes": disabled})
        step(compiled, model, x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            y = compiled(x)
            y.sum().backward()
            torch.cuda.synchronize()
        peaks[not disabled] = torch.cuda.max_memory_allocated()
        copies = [event.key for event in trace.key_averages() if "Memcpy DtoD" in event.key]
        assert not copies or disabled, copies
    assert peaks[True] <= peaks[False]
