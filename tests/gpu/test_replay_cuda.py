"""Generated code calls our kernels past the dispatcher, and a repeated call gives what the recorded one gave."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

RECIPES = {
    "fp4": ("qcompile_fp4", {"backward": "fp8", "activation": {"outliers": "occ(residual=e4m3)"}}),
    "fp4 paper": ("qcompile_fp4", {}),
    "quest": ("qcompile_quest", {"backward": "fp8"}),
    "quest int8": ("qcompile_quest", {"bits": 8}),
    "quest 1 bit": ("qcompile_quest", {"bits": 1}),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_generated_code_calls_no_op_of_ours_through_the_dispatcher(recipe):
    """And the same batch gives the same bits at the first call and after others have been replayed."""
    from qcompile.kernels.register import DIRECT

    torch.manual_seed(0)
    torch.compiler.reset()
    for kernel in DIRECT.values():
        kernel.plans.clear()  # of other tests, which fill allocations with NaN: what does that cannot be repeated
    backend, options = RECIPES[recipe]
    model = nn.Sequential(nn.Linear(384, 512), nn.GELU(), nn.Linear(512, 384)).cuda().bfloat16()
    compiled = torch.compile(model, backend=backend, options=options, fullgraph=True)
    batches = [torch.randn(256, 384, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def gradients(batch):
        model.zero_grad()
        compiled(batch).square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    first, code = run_and_get_code(gradients, batches[0])
    text = "\n".join(line for line in "\n".join(code).splitlines() if not line.lstrip().startswith("#"))
    assert "qcompile_kernels[" in text
    assert not re.search(r"torch\.ops\.qcompile\.[\w.]+\(", text)
    for batch in batches[1:]:
        gradients(batch)
    again = gradients(batches[0])
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    used = {name for name in DIRECT if f"qcompile_kernels[{name!r}]" in text}
    planned = {name: list(DIRECT[name].plans.values()) for name in used}
    unplanned = [name for name, plans in planned.items() if None in plans]
    assert not unplanned, f"cannot be repeated: {unplanned}"
