"""LoftQ (arXiv 2310.08659): adapters that begin by making up for the rounding of the weight below them.

W ≈ Q + s·B·A with Q on the grid of the weight's quantizer and B·A of low rank. Each iteration rounds what the factors
leave of W, then takes the best factors of what that rounding leaves::

    Q ← q(W − s·B·A)         √s·B, √s·A ← the leading singular vectors of W − Q, times the roots of their values

PEFT multiplies B·A by s = alpha / r, so both factors are divided by √s. Without that, the product is s times too large
wherever alpha ≠ r, and worse than no adapter for s ≥ 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.rules import matches_name

from .pack import multiplies
from .weight import PackedWeight

__all__ = ["LoftQLayer", "loftq_"]


@dataclass(frozen=True)
class LoftQLayer:
    """What became of one layer.

    Attributes:
        name: of the layer with the adapter.
        residuals: ‖W − Q − s·B·A‖ / ‖W‖ before the first iteration (where the factors are 0) and after each.
    """

    name: str
    residuals: tuple[float, ...]

    @property
    def best(self) -> float:
        """That of the iteration that was kept."""
        return min(self.residuals[1:])


def loftq_(
    model: nn.Module,
    spec: str,
    rank: int | None = None,
    iters: int = 5,
    *,
    adapter: str = "default",
    skip: str | Sequence[str] = (),
) -> list[LoftQLayer]:
    """Pack the weights below PEFT's LoRA adapters, and begin the adapters with what rounding takes away; in place.

    Of the iterations the one with the smallest residual is kept. Layers without an adapter stay as they are:
    :func:`~qcompile.pack_` packs them.

    Args:
        model: what ``peft.get_peft_model`` returns, its weights still wide.
        spec: how weights are stored.
        rank: singular directions that an adapter is given, its rank by default; the rest of it begins at 0.
        iters: iterations, at least one.
        adapter: name of the adapter.
        skip: names of layers to leave alone.

    Raises ``ValueError`` if there is no such adapter, for a weight that is packed already or cannot be, and for a rank
    that an adapter does not have.
    """
    if iters < 1:
        msg = f"loftq_: iters={iters} is not at least 1"
        raise ValueError(msg)
    patterns = [skip] if isinstance(skip, str) else list(skip)
    layers = {
        name: module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", ()) and multiplies(module.base_layer)
        if not any(matches_name(name, pattern) for pattern in patterns)
    }
    if not layers:
        msg = f"loftq_: no linear layer has a LoRA adapter {adapter!r}; call peft.get_peft_model(model, …) first"
        raise ValueError(msg)
    for name, layer in layers.items():
        _check(name, layer, adapter, rank)
    return [_initialize(name, layer, spec, rank, iters, adapter) for name, layer in layers.items()]


def _check(name: str, layer: Any, adapter: str, rank: int | None) -> None:
    if isinstance(layer.base_layer.weight, PackedWeight):
        msg = f"loftq_: the weight of {name!r} is packed already, and what rounding took is gone; start from wide ones"
        raise ValueError(msg)
    has = layer.lora_A[adapter].weight.shape[0]
    if rank is not None and not 1 <= rank <= has:
        msg = f"loftq_: rank={rank}, but the adapter {adapter!r} of {name!r} has rank {has}"
        raise ValueError(msg)


@torch.no_grad()
def _initialize(name: str, layer: Any, spec: str, rank: int | None, iters: int, adapter: str) -> LoftQLayer:
    base, (a, b) = layer.base_layer, (factor[adapter].weight for factor in (layer.lora_A, layer.lora_B))
    transposed = multiplies(base) == "transposed"
    stored = base.weight.mT if transposed else base.weight
    wide = stored.float()  # [N, K]
    kept, scaling = rank or a.shape[0], layer.scaling[adapter]
    left, right = torch.zeros_like(b, dtype=torch.float32), torch.zeros_like(a, dtype=torch.float32)
    norm = wide.norm()
    residuals: list[float] = []
    best = None
    for _ in range(iters):
        packed = PackedWeight.of((wide - left @ right).to(base.weight.dtype), spec)
        rest = wide - packed.decoded(torch.float32)
        if not residuals:
            residuals.append(float(rest.norm() / norm))
        left, right = _factors(rest, kept, left, right)
        residuals.append(float((rest - left @ right).norm() / norm))
        if best is None or residuals[-1] < best[0]:
            best = residuals[-1], packed, left, right
    assert best is not None
    _, packed, left, right = best
    for factor, value in ((b, left), (a, right)):
        factor.copy_(value / scaling**0.5)
    weight = packed.mT if transposed else packed
    base.weight = nn.Parameter(weight, requires_grad=False)
    return LoftQLayer(name, tuple(residuals))


def _factors(rest: Tensor, rank: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``rest`` ≈ left · right by its ``rank`` largest singular values; beyond them zeros, in the shapes given."""
    u, s, vh = torch.linalg.svd(rest, full_matrices=False)
    root = s[:rank].sqrt()
    left, right = torch.zeros_like(left), torch.zeros_like(right)
    left[:, :rank], right[:rank] = u[:, :rank] * root, root[:, None] * vh[:rank]
    return left, right
