"""The order of scores against brute force: the loss with all layers in 4 bits but one, layer by layer."""

from __future__ import annotations

import lzma
import math
from importlib.resources import files
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import qcompile

OPERAND = "e2m1 row absmax even; ste"
SEQUENCE, WIDTH, BLOCKS = 64, 64, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class LanguageModel(nn.Module):
    """Of bytes; the result is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(256, WIDTH), nn.Embedding(SEQUENCE, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.lm_head(self.norm(x)).flatten(0, 1), tokens[:, 1:].flatten())


def trained(text: Tensor, steps: int) -> LanguageModel:
    model, generator = LanguageModel(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, step / 20) * (0.52 + 0.48 * math.cos(math.pi * step / steps))
        model(windows(text, 32, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def windows(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(text) - SEQUENCE - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(SEQUENCE + 1)].long()


class Quantized(TorchFunctionMode):
    """Quantizes both operands of the linear layers with these weights, in eager torch."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.weights = {id(weight) for weight in weights}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and id(args[1]) in self.weights:
            args = [torch.ops.qcompile.fake_quantize(operand, OPERAND, -1) for operand in args[:2]]
        return func(*args, **(kwargs or {}))


def spearman(left: list[float], right: list[float]) -> float:
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (left, right)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@pytest.mark.nightly
def test_the_order_of_scores_is_that_of_leave_one_out():
    """On a language model of three blocks, trained on Shakespeare for a minute, by groups that share a choice."""
    torch.manual_seed(0)
    data = lzma.decompress(files("qcompile.data").joinpath("tinyshakespeare.txt.xz").read_bytes())
    text = torch.tensor(list(data), dtype=torch.uint8)
    model = trained(text, 500)
    generator = torch.Generator().manual_seed(1)
    # Of the text it has learned, where the gradient of its weights is nearly 0: a score is of second order.
    batches = [windows(text, 64, generator) for _ in range(12)]
    options = {"activation": OPERAND, "weight": OPERAND}
    found = qcompile.sensitivity(model, batches, options=options)
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def loss(quantized: set[str]) -> float:
        with torch.no_grad(), Quantized([weights[name] for name in quantized]):
            return sum(model(batch).item() for batch in batches) / len(batches)

    everything = {layer.name for group in found.groups for layer in group}
    wide, narrow = loss(set()), loss(everything)
    groups = [{layer.name for layer in group} for group in found.groups]
    assert len(groups) == 4 * BLOCKS
    scores = [sum(layer.scores["qcompile_fp4"] for layer in group) for group in found.groups]
    gained = [narrow - loss(everything - names) for names in groups]
    alone = [loss(names) - wide for names in groups]
    agreement = {"leave one out": spearman(scores, gained), "one alone": spearman(scores, alone)}
    for line in zip(map(sorted, groups), scores, gained, alone, strict=True):
        print(*line)
    print(f"loss {wide:.4f}, in 4 bits {narrow:.4f}; Spearman {agreement}")
    assert narrow > wide + 0.02
    assert agreement["leave one out"] >= 0.8, agreement
    # A quarter of the savings buys far more than a quarter of the gap.
    chosen = {name for name, choice in found.choice.items() if choice == "wide"}
    assert narrow - loss(everything - chosen) > 0.4 * (narrow - wide)
