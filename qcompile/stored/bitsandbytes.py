"""Weights that bitsandbytes has packed, read as they lie: every byte is kept, so every number is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qcompile.ir.nested import BITSANDBYTES
from qcompile.kernels.quantize.reference import swap_halves

from .layouts import bnb_spec
from .weight import PackedWeight

__all__ = ["from_bitsandbytes_", "packed_weight"]

#: Scales that share a scale of scales.
_NESTED_BLOCK = BITSANDBYTES.quantizer.granularity.size


def from_bitsandbytes_(model: nn.Module) -> list[str]:
    """Make plain linear layers, with packed weights, of a model's ``bitsandbytes.nn.Linear4bit``; in place.

    Before adapters are put on it: PEFT has classes of its own around bitsandbytes' layers. A layer's inputs are then to
    have the dtype of its weight (``QuantState.dtype``), which is no more cast to ``compute_dtype``.

    Returns the names of the layers. Raises ``ValueError`` naming a layer that cannot be read.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and hasattr(module.weight, "quant_state")
    ]
    weights = {name: packed_weight(name, module.weight) for name, module in found}
    for name, module in found:
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weights[name], requires_grad=False), module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(module.training))
    return [name for name, _ in found]


def packed_weight(name: str, weight: Any) -> PackedWeight:
    """Of a ``Params4bit`` that has been quantized, ``[N, K]``; ``name`` is the layer's, for messages."""
    state = weight.quant_state
    if state is None:
        msg = f"layer {name!r}: bitsandbytes has not quantized its weight yet; move the model to its device first"
        raise ValueError(msg)
    rows, size = state.shape
    if getattr(state, "packing_format_for_cpu", False):
        msg = (
            f"layer {name!r}: bitsandbytes has repacked its weight for AVX512 (an evaluation on the CPU does); convert "
            "the model before its first forward"
        )
        raise ValueError(msg)
    if size % state.blocksize:
        msg = f"layer {name!r}: K = {size} is no multiple of its blocks of {state.blocksize}, which run through rows"
        raise ValueError(msg)
    if state.nested and state.state2.blocksize != _NESTED_BLOCK:
        msg = f"layer {name!r}: {state.state2.blocksize} scales share a scale; {_NESTED_BLOCK} are understood"
        raise ValueError(msg)
    parts = {"codes": swap_halves(weight.data.view(-1).view(torch.uint8)).view(rows, -1)}
    if state.nested:
        parts |= {"scale_codes": state.absmax, "second": state.state2.absmax, "offset": state.offset.view(())}
    else:
        parts["scales"] = state.absmax.view(rows, -1)
    return PackedWeight(parts, bnb_spec(state.quant_type, state.blocksize, state.nested), size, state.dtype)
