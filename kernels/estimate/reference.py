"""Plain-torch backward estimators on quantized operands: masks in one bit, and the slope on the gradient.

The scaled input y = x / s is computed exactly as :mod:`qcompile.kernels.quantize.reference` does, so the mask agrees
with the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.estimators import EstimatorSpec, clip_limit, trust_threshold
from qcompile.ir.formats import Format
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.formula import estimators as formulas
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.quantize.reference import by_grid, pack, scaled_input, unpack

__all__ = ["estimator_mask", "mask_gradient", "mask_of", "scale_gradient", "slope_of"]


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
    y, level, marked = scaled_input(x, scales, quantizer, axis, global_scale, transform)
    spec, q = EstimatorSpec.parse(estimator), Quantizer.parse(quantizer)
    mask = by_grid(q, marked, lambda of: mask_of(spec, y, level, of.format))
    return pack(mask.to(torch.uint8), bits=1)


def mask_of(estimator: EstimatorSpec, y: Tensor, level: Tensor, fmt: Format) -> Tensor:
    """Bool: the masks of the papers in plain torch; an outsider's formula as it is recorded: on CUDA torch divides by
    numbers in its own way.
    """
    parameters = dict(estimator.parameters)
    match estimator.name:
        case "clip":
            factor = clip_limit(fmt, **parameters) / fmt.max  # type: ignore[arg-type]
            lowest, highest = (level * factor for level in fmt.range)
            return (y >= lowest) & (y <= highest)
        case "trust":
            return (y - level).abs() <= trust_threshold(fmt, **parameters)
    return evaluate(formulas.mask(estimator, fmt), y, level)


def slope_of(estimator: EstimatorSpec, y: Tensor, fmt: Format) -> Tensor:
    """Float32: the slope of arXiv 2501.17116 eq. 8 in plain torch, an outsider's formula as it is recorded."""
    if estimator.name != "dge":
        return evaluate(formulas.slope(estimator, fmt), y)
    k, cap = (value for _, value in estimator.parameters)
    assert k is not None
    fmt = fmt.grid
    if fmt.codebook:
        edges, magnitude = torch.tensor(sorted({*fmt.codebook}), device=y.device), y.clamp(*fmt.range)
    else:
        lowest = () if fmt.has_zero else (-fmt.magnitudes[0],)
        edges, magnitude = torch.tensor((*lowest, *fmt.magnitudes), device=y.device), y.abs().clamp(max=fmt.max)
    index = torch.bucketize(magnitude, edges[1:-1].contiguous(), right=True)
    position = 2 * (magnitude - edges[index]) / (edges[index + 1] - edges[index]) - 1
    return (position.abs().pow(1 / k - 1) * (1 / k)).clamp(max=cap)


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
    y, _, marked = scaled_input(x, scales, quantizer, axis, global_scale)
    spec, q = EstimatorSpec.parse(estimator), Quantizer.parse(quantizer)
    slope = by_grid(q, marked, lambda of: slope_of(spec, y, of.format))
    return torch.empty_like(grad).copy_(grad.float() * slope.movedim(-1, axis))
