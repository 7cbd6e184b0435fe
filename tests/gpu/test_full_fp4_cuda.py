"""Recipes of all three products on a CUDA card: run by hand (`pytest tests/gpu`), never in CI.

What would break: kernels for scales of NVFP4, IF4 and ``e8m0_ceil`` that disagree with the CPU's, stochastic rounding
that has no kernel on the card, a CUDA graph that replays one draw.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.recipes import IF4, MXFP4, MXFP8, NVFP4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

RECIPES = [recipe.name for recipe in (NVFP4, IF4, MXFP4, MXFP8)]


def blocks() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(4)))


def gradients(name: str, device: str, **options: str) -> list[Tensor]:
    model = blocks().to(device)
    x = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
    torch.compile(model, backend=name, options=options)(x).square().sum().backward()
    return [g.grad.cpu() for g in (x, *model.parameters())]


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_are_those_of_a_cpu(name: str) -> None:
    """With rounding to the nearest. A sum in another order may move a few codes by one step, not a share of them."""
    options: dict = {"gradient": {"rounding": "even"}}
    if name == "qcompile_mxfp4":
        again = "e2m1 block32 e8m0_ceil even; hadamard(64,signs=fixed)"
        options |= {"wgrad_activation": again, "dgrad_weight": again}
    for found, expected in zip(gradients(name, "cuda", **options), gradients(name, "cpu", **options), strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("forward", ["quantized", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_bf16_model_learns(name: str, forward: str, mode: str) -> None:
    """Also from a CUDA graph, whose replays round otherwise each time where rounding is stochastic."""
    model = blocks().to("cuda", torch.bfloat16)
    compiled = torch.compile(model, backend=name, options={"forward": forward, "mode": mode})
    x = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 1e-3), []
    for _ in range(20):
        loss = (compiled(x) - x.roll(1, -1)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    if name != "qcompile_mxfp8":
        draws = []
        for _ in range(2):
            compiled(x).float().square().sum().backward()
            draws.append(model[0][0].weight.grad.clone())
            optimizer.zero_grad()
        assert not torch.equal(*draws)
