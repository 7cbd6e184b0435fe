"""QA-LoRA (arXiv 2309.14717): adapters that merge into packed weights without rounding.

A weight with zeros is ``scale · level + zero``, one zero for every block of g neighbours along K. An adapter that sees
no more of its input than the sum over each block adds the same number to all weights of a block, so it is one with the
zeros::

    y = x·Wᵀ + s · Σ(x)·Aᵀ·Bᵀ       Σ(x) [..., K / g]: sums over blocks;  A [r, K / g];  B [N, r];  s = alpha / r
    zeros ← zeros + s · B·A         the merge: codes and scales stay as they are

Sums are the paper's (``AvgPool(x) · g``). PEFT's own variant, for GPTQ layers, takes means times K / g instead and
merges nothing.

PEFT keeps its layers: what a layer does with an adapter of a kind of its own is an object in ``lora_variant``, and
:class:`QALoRA` is one. So ``merge_adapter``, ``merge_and_unload``, ``unmerge_adapter``, ``save_pretrained`` and several
adapters side by side work as ever, and the names of parameters are LoRA's (``….lora_A.default.weight``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.definitions import short_names
from qcompile.ir.rules import matches_name

from .pack import multiplies
from .weight import PackedWeight

__all__ = ["QALoRA", "qa_lora_"]


class QALoRA:
    """What PEFT calls for an adapter of block sums: its protocol for variants of LoRA (``peft.tuners.lora.variants``).

    Attributes:
        layer: name of the layer, for messages.
        before: the zeros before the merge, while the adapter is merged: adding and subtracting again would round.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.before: Tensor | None = None

    def supports_lora_conversion(self) -> bool:
        return False

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``result``, the base layer's, with the adapter's of ``x`` ``[..., K]`` added."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        sums = block_sums(module.lora_dropout[active_adapter](x), down.in_features)
        return result + up(down(sums)) * module.scaling[active_adapter]

    @torch.no_grad()
    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Into the zeros of ``orig_weight``, in place."""
        down, up = (factor[active_adapter].weight.float() for factor in (module.lora_A, module.lora_B))
        zeros = self._zeros_of(orig_weight, down.shape[1])
        self.before = zeros.clone()
        zeros.add_(up @ down, alpha=module.scaling[active_adapter])

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """``orig_weight``, which is a copy, after the merge."""
        self.merge_unsafe(module, active_adapter, orig_weight)
        return orig_weight

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight with the zeros from before the merge, bit for bit."""
        assert self.before is not None
        self._zeros_of(orig_weight, self.before.shape[-1]).copy_(self.before)
        self.before = None
        return orig_weight.data

    def _zeros_of(self, weight: Tensor, blocks: int) -> Tensor:
        """Raises ``RuntimeError`` for a weight that has been stored otherwise since the adapter was made."""
        zeros = weight.parts.get("zeros") if isinstance(weight, PackedWeight) else None
        if zeros is not None and zeros.shape[-1] == blocks:
            return zeros
        how = f"stored as {short_names(weight.spec)!r}" if isinstance(weight, PackedWeight) else "wide"
        msg = f"layer {self.layer!r}: its weight is {how} by now; merge adapters first, then change how it is stored"
        raise RuntimeError(msg)


def block_sums(x: Tensor, blocks: int) -> Tensor:
    """Sums over ``blocks`` equal runs of neighbours along the last axis of ``x``: ``[..., K]`` to ``[..., blocks]``."""
    return x.unflatten(-1, (blocks, -1)).sum(-1)


def qa_lora_(model: nn.Module, *, adapter: str = "default", skip: str | Sequence[str] = ()) -> list[str]:
    """Let PEFT's LoRA adapters see block sums of their inputs, and so merge into packed weights exactly; in place.

    Rank, alpha, dropout and targets are those of PEFT's configuration. Every ``lora_A`` is replaced by one of shape
    ``[r, K / block]``, initialized as PEFT does: call this before an optimizer is made, and before the state of trained
    adapters is loaded (``peft.set_peft_model_state_dict``). Adapters on wide weights stay as they are.

    Args:
        model: what ``peft.get_peft_model`` returns for a model packed with zeros (``"uint4 block32; zeros"``).
        adapter: name of the adapter.
        skip: names of layers whose adapters stay as they are, as patterns over whole dotted segments.

    Returns the names of the layers.

    Raises ``ValueError`` if there is no such adapter, and naming the layer for a packed weight without zeros, for an
    adapter that does not begin at zero, and for one of another kind (DoRA).
    """
    patterns = [skip] if isinstance(skip, str) else list(skip)
    layers = {
        name: module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", ()) and multiplies(module.base_layer)
        if isinstance(module.base_layer.weight, PackedWeight)
        if not any(matches_name(name, pattern) for pattern in patterns)
    }
    if not layers:
        msg = (
            f"qa_lora_: no packed layer has a LoRA adapter {adapter!r}; call qcompile.pack_(model, 'uint4 block32; "
            "zeros'), then peft.get_peft_model(model, …) first"
        )
        raise ValueError(msg)
    for name, layer in layers.items():
        _check(name, layer, adapter)
    for name, layer in layers.items():
        _pool(name, layer, adapter)
    return list(layers)


def _check(name: str, layer: Any, adapter: str) -> None:
    weight = layer.base_layer.weight
    if not weight.stored.zeros:
        msg = (
            f"qa_lora_: the weight of {name!r} is stored as {short_names(weight.spec)!r}, without zeros to merge into; "
            f"pack it as 'uint4 block32; zeros', or skip=[{name!r}]"
        )
        raise ValueError(msg)
    if adapter in layer.lora_variant:
        kind = type(layer.lora_variant[adapter]).__name__
        msg = f"qa_lora_: the adapter {adapter!r} of {name!r} is a {kind}; start from a plain LoraConfig"
        raise ValueError(msg)
    if layer.lora_B[adapter].weight.count_nonzero():
        msg = (
            f"qa_lora_: the adapter {adapter!r} of {name!r} does not begin at zero, and its lora_A would be lost; call "
            "this before training, with init_lora_weights=True"
        )
        raise ValueError(msg)


def _pool(name: str, layer: Any, adapter: str) -> None:
    old = layer.lora_A[adapter].weight
    blocks = layer.base_layer.weight.parts["zeros"].shape[-1]
    pooled = nn.Linear(blocks, old.shape[0], bias=False, device=old.device, dtype=old.dtype)
    layer.lora_A[adapter] = pooled.requires_grad_(old.requires_grad).train(layer.training)
    layer.lora_variant[adapter] = QALoRA(name)
