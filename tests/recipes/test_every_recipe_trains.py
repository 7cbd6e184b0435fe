"""Every recipe of all three products on a dense language model, a mixture of experts and a vision transformer.

What would break: a scale of zeros, of an expert without tokens, of a gradient that is tiny; an operand that a grouped
product or a patch embedding has and a linear layer has not; a rotation of an odd number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.recipes import IF4, MXFP4, MXFP8, NVFP4, QUARTET2, TETRAJET2, UNIFORM4
from tests.passes.harness import compiler

RECIPES = {recipe.name: recipe for recipe in (QUARTET2, NVFP4, TETRAJET2, UNIFORM4, IF4, MXFP4, MXFP8)}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
TEXT = {**SIZES, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64}


def tokens() -> dict[str, Tensor]:
    found = torch.randint(97, (2, 21), generator=torch.Generator().manual_seed(1))
    return {"input_ids": found, "labels": found}


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator), "labels": torch.arange(4)}


def dense(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, num_hidden_layers=layers))


def mixture(layers: int) -> nn.Module:
    """Two of four experts for each of 42 tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(**TEXT, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2)
    )


def vision(layers: int) -> nn.Module:
    """17 tokens: 16 patches and the class token."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(**SIZES, num_hidden_layers=layers, image_size=32, patch_size=8, num_labels=4)
    )


MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "dense": (dense, tokens),
    "mixture": (mixture, tokens),
    "vision": (vision, images),
}


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("qcompile_quartet2", 4, {}),
        *(pytest.param(name, 50, {}, marks=pytest.mark.nightly) for name in RECIPES),
        pytest.param("qcompile_mxfp4", 50, {"variant": "full"}, marks=pytest.mark.nightly),
        pytest.param("qcompile_quartet2", 50, {"forward": "bf16"}, marks=pytest.mark.nightly),
    ],
)
def test_nothing_becomes_nan(name: str, steps: int, options: dict[str, Any], model_name: str) -> None:
    """All gradients are finite and the loss falls, of a batch that can be learnt by heart."""
    torch.manual_seed(0)
    make, inputs = MODELS[model_name]
    model = make(2 if steps == 50 else 1).train()
    compiled, observations = compiler(model, RECIPES[name], fullgraph=False, debug=steps == 50, **options)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(steps):
        loss = compiled(**inputs()).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * (0.5 if steps == 50 else 1), losses
    assert sum(len(o.plan.quantized) for o in observations) >= 4  # type: ignore[union-attr]
