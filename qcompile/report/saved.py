"""Measured bytes: what autograd keeps for the backward, compiled or eager."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.backends import plain_model

__all__ = ["SavedBytes", "saved_bytes"]


class SavedBytes:
    """Filled by :func:`saved_bytes`: ``total`` bytes, and ``(shape, dtype, bytes)`` for each distinct storage."""

    def __init__(self) -> None:
        self.tensors: list[tuple[tuple[int, ...], torch.dtype, int]] = []

    @property
    def total(self) -> int:
        return sum(size for _, _, size in self.tensors)


@contextmanager
def saved_bytes(model: nn.Module | None = None, *inputs: Any) -> Iterator[SavedBytes]:
    """Measure what autograd saves for the backward inside the ``with`` block, compiled or eager.

    Parameters and buffers of ``model`` and the given inputs are not counted: they live whether or not they are saved.
    What counts is storage: once if several saved tensors share it, and all of it if a saved tensor is a part of it.
    """
    if model is not None:
        model = plain_model(model, "saved_bytes")
    owners = [*model.parameters(), *model.buffers()] if model is not None else []
    owners += [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    seen = {tensor.untyped_storage().data_ptr() for tensor in owners}
    saved = SavedBytes()
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            keep.append(tensor.detach())  # alive until the end, so that no address is used twice
            saved.tensors.append((tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
