"""Plain-torch transforms: the block Hadamard rotation, and which elements sparsity keeps.

The rotation is defined as the fast Walsh–Hadamard transform in float32: butterflies of distance 1, 2, 4 … and one
multiplication by n^(−½). Every result is one tree of additions, so a kernel that takes the same butterflies gives the
same bits on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.transforms import SPARSITIES

__all__ = ["hadamard", "kept", "rotate"]


def hadamard(x: Tensor, block: int, axis: int, mask: Tensor | None = None) -> Tensor:
    """Tensor like x: rotated along ``axis``, whose length ``block`` divides; float32 inside, one rounding at the end.

    ``mask``: uint8 ``[..., R, ⌈K/8⌉]`` with ``axis`` moved last; elements whose bit is not set count as 0.
    """
    if mask is not None:
        x = torch.ops.qcompile.mask_gradient(x, mask, axis)
    rotated = rotate(x.movedim(axis, -1).float(), block)
    return torch.empty_like(x).copy_(rotated.movedim(-1, axis))


def rotate(x: Tensor, block: int) -> Tensor:
    """x, float32 ``[..., K]``, with blocks of K rotated.

    Raises ``ValueError`` if K is no multiple of ``block``.
    """
    size = x.shape[-1]
    if size % block:
        msg = f"hadamard: {size} elements are no multiple of the block size {block}"
        raise ValueError(msg)
    distance = 1
    while distance < block:
        first, second = x.unflatten(-1, (size // (2 * distance), 2, distance)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        distance *= 2
    return x * block**-0.5


def kept(x: Tensor, sparsity: str) -> Tensor:
    """Bool tensor of the shape of x, float32 ``[..., K]``: the elements that stay. A last group may be short.

    A unit stays if fewer than the number to keep have a larger sum of squares, or an equal one and a lower index.
    """
    pattern, size = SPARSITIES[sparsity], x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -size % pattern.group))
    units = padded.unflatten(-1, (padded.shape[-1] // pattern.group, pattern.units, pattern.width))
    score = units.square().sum(-1)
    larger = score.unsqueeze(-2) > score.unsqueeze(-1)
    index = torch.arange(pattern.units, device=x.device)
    earlier = (score.unsqueeze(-2) == score.unsqueeze(-1)) & (index < index.unsqueeze(-1))
    stays = (larger | earlier).sum(-1) < pattern.kept
    return stays.unsqueeze(-1).expand(units.shape).flatten(-3)[..., :size]
