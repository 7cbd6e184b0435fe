"""Plain-torch backward estimators on quantized operands: masks in one bit, and the slope on the gradient.

The scaled input y = x / s is computed exactly as :mod:`qcompile.kernels.quantize.reference` does, so the mask agrees
with the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.estimators import Estimator
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize.reference import pack, scaled_input, unpack

__all__ = ["estimator_mask", "mask_gradient", "scale_gradient"]


def estimator_mask(
    x: Tensor,
    scales: Tensor,
    quantizer: str,
    estimator: str,
    axis: int,
    global_scale: Tensor | None = None,
    transform: str = "",
) -> Tensor:
    """Uint8 ``[..., R, ⌈K/8⌉]``: bit i of byte j is set where element 8j + i lets its gradient pass."""
    y, level = scaled_input(x, scales, quantizer, axis, global_scale, transform)
    mask = Estimator.parse(estimator).mask(y, level, Quantizer.parse(quantizer).format)
    return pack(mask.to(torch.uint8), bits=1)


def mask_gradient(grad: Tensor, mask: Tensor, axis: int) -> Tensor:
    """``grad`` where the packed ``mask`` is set, zero elsewhere (also where grad is not finite)."""
    keep = unpack(mask, bits=1, size=grad.shape[axis]).bool().movedim(-1, axis)
    return torch.empty_like(grad).copy_(grad.where(keep, grad.new_zeros(())))


def scale_gradient(
    grad: Tensor,
    x: Tensor,
    scales: Tensor,
    quantizer: str,
    estimator: str,
    axis: int,
    global_scale: Tensor | None = None,
) -> Tensor:
    """``grad ⊙ slope(x / s)`` in the dtype of ``grad``; the product is taken in float32."""
    y, _ = scaled_input(x, scales, quantizer, axis, global_scale)
    slope = Estimator.parse(estimator).slope(y, Quantizer.parse(quantizer).format)
    return torch.empty_like(grad).copy_(grad.float() * slope.movedim(-1, axis))
