"""WIP"""
from __future__ import annotations
import torch, torch.nn.functional as F
from torch import nn, Tensor
from . import tensor_parallel as worker
from ..passes.harness import QuantizedProducts
from qcompile.recipes import RECIPES

class Split(nn.Module):
    """A linear layer as the sum of what ranks compute of it."""
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        parts = zip(x.chunk(worker.WORLD, -1), self.weight.chunk(worker.WORLD, 1), strict=True)
        y = sum(F.linear(a, w) for a, w in parts)
        return y if self.bias is None else y + self.bias

def split(model):
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in worker.ROWWISE:
                setattr(parent, name, Split(child))
    return model
