"""Operands that are DTensors: every rank quantizes its own shard, so codes and scales never cross ranks.

A DTensor is a local tensor and its placements on a device mesh. The dialect's ops run on local tensors and results get
their placements back, so products that read them become products of local tensors, fused like any other. A quantizer is
no elementwise function, hence the definition: *an operand is quantized shard by shard*. Where the axis of a row is
sharded, there is one scale per row and shard. Sums that are still spread over ranks (``Partial``) are carried out
first, since rounding is not linear; estimators are linear in the gradient and take partial sums as they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

__all__ = ["aligned", "is_sharded", "local_tensor", "shards", "with_local", "without_partial_sums"]


def is_sharded(x: Any) -> bool:
    """Whether ``x`` is a DTensor (replicated ones included), and not of a class derived from it."""
    module = sys.modules.get("torch.distributed.tensor")  # as long as nobody imports it there is none
    return module is not None and type(x) is module.DTensor


def local_tensor(x: Tensor) -> Tensor:
    """What this rank holds of a DTensor, unknown to autograd; any other tensor as it is."""
    return getattr(x, _held(x)) if is_sharded(x) else x


def _held(x: Any) -> str:
    """Name of the attribute that the local tensor is in, by the protocol that ``torch.compile`` takes DTensors apart
    with: ``to_local()`` would record a view.
    """
    names, _ = x.__tensor_flatten__()
    return next(name for name in names if isinstance(getattr(x, name), Tensor))


def shards(x: Any, axes: Collection[int]) -> int:
    """Into how many parts a DTensor is split along these axes, counted from the front."""
    extents = (
        extent
        for extent, placement in zip(x.device_mesh.shape, x.placements, strict=True)
        if (dim := getattr(placement, "dim", None)) is not None and dim % x.dim() in axes
    )
    return math.prod(extents)


def with_local(x: Any, local: Tensor, stride: Sequence[Any]) -> Any:
    """``local`` as this rank's part of a DTensor with shape, dtype and placements of ``x`` and these global strides."""
    names, context = x.__tensor_flatten__()
    inner = {name: getattr(x, name) for name in names} | {_held(x): local}
    return type(x).__tensor_unflatten__(inner, context, x.shape, tuple(stride))


def without_partial_sums(x: Any) -> Any:
    """``x`` with its pending reductions carried out."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in x.placements]
    return x.redistribute(placements=placements) if placements != list(x.placements) else x


def aligned(grad: Any, placements: Sequence[Any]) -> Any:
    """A gradient placed as the tensor it belongs to, but for partial sums over ranks that all hold that tensor."""
    wanted = [
        have if have.is_partial() and want.is_replicate() else want
        for have, want in zip(grad.placements, placements, strict=True)
    ]
    return grad.redistribute(placements=wanted) if wanted != list(grad.placements) else grad
