"""Measured bytes: what autograd keeps for the backward, compiled or eager."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import compat
from qcompile.backends import plain_model

__all__ = ["SavedBytes", "newly_saved", "saved_bytes", "storage_of", "storages_of"]


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
    owners += [leaf for leaf in compat.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    saved = SavedBytes()
    with newly_saved(storages_of(owners)) as kept:
        yield saved
        saved.tensors += [(tuple(t.shape), t.dtype, t.untyped_storage().nbytes()) for t in kept]


@contextmanager
def newly_saved(seen: set[int]) -> Iterator[list[Tensor]]:
    """Collects a tensor for each storage that autograd saves inside the ``with`` block and that is not in ``seen``,
    where it is then; collected tensors are alive, so that no storage comes twice.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        for part in compat.plain_parts(tensor):
            if (storage := storage_of(part)) not in seen:
                seen.add(storage)
                kept.append(part.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def storages_of(tensors: Iterable[Tensor]) -> set[int]:
    """Of all of them: those that a packed weight or a DTensor is made of, in its place."""
    return {storage_of(part) for tensor in tensors for part in compat.plain_parts(tensor)}


def storage_of(tensor: Tensor) -> int:
    """What views of one tensor share, on the meta device too; of a tensor without storage (sparse), itself."""
    try:
        return tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return id(tensor)
