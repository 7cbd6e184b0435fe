"""Backward estimators as Inductor loop bodies: the factor on the gradient fuses into whatever makes or reads
the gradient.

The scaled input y = x · γ is computed as the quantizer computes it (:class:`GridUnits`), so masks agree with
the codes bit for bit. A slope is a power and may differ from the reference's in the last place.
"""

from __future__ import annotations

import torch
from torch._inductor import ir
from torch._inductor.virtualized import ops

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.extern import own_kernel
from qcompile.kernels.formula import estimators as formulas
from qcompile.kernels.formula.inductor_target import emit, uncontracted_product
from qcompile.kernels.quantize.inductor import (
    GridUnits,
    Value,
    element_loader,
    group_of,
    index_of_moved,
    is_empty,
    mark_of,
    packed_bytes,
    scale_value,
    supports_scales,
    unpacked,
    why_not_scaled,
)

__all__ = [
    "lower_estimator_mask",
    "lower_mask_gradient",
    "lower_scale_gradient",
    "supports_estimator_mask",
    "supports_scale_gradient",
]

_MASK_BITS_PER_BYTE = 8


# --- what is supported --------------------------------------------------------------------------------------


def supports_estimator_mask(
    q: Quantizer, estimator: EstimatorSpec, device: torch.device | None = None
) -> tuple[bool, str]:
    """Whether :func:`lower_estimator_mask` generates code, and if not, why."""
    if reason := formulas.why_no_mask(estimator, q.format) or why_not_scaled(q):
        return False, reason
    return supports_scales(q, device)  # rounding takes no part in it


def supports_scale_gradient(
    q: Quantizer, estimator: EstimatorSpec, device: torch.device | None = None
) -> tuple[bool, str]:
    """Whether :func:`lower_scale_gradient` generates code, and if not, why."""
    if reason := formulas.why_no_slope(estimator, q.format):
        return False, reason
    if not estimator.kind.continuous and (reason := why_not_scaled(q)):
        return False, reason
    return supports_scales(q, device)  # rounding takes no part in it


# --- the ops ------------------------------------------------------------------------------------------------


def lower_estimator_mask(x, scales, quantizer: str, estimator: str, axis: int, global_scale=None, transform: str = ""):
    """``qcompile::estimator_mask``: one bit per element, packed in the kernel that finds the scales again."""
    q, spec = Quantizer.parse(quantizer), EstimatorSpec.parse(estimator)
    supported = not transform and supports_estimator_mask(q, spec, x.get_device())[0]
    if not ir.is_triton(x) or is_empty(x) or not supported:
        op = torch.ops.qcompile.estimator_mask.default
        return own_kernel(op, x, scales, quantizer, estimator, axis, global_scale, transform)
    bound = None if q.format.grids else spec.bound(q.format)
    units = GridUnits(x, q, axis, _MASK_BITS_PER_BYTE, global_scale)

    def keep(index, byte) -> Value:
        if bound is not None:
            inside = ops.le(ops.abs(units.load(index, byte)), _float(bound))
        else:
            formula = formulas.mask_of_input(spec, q.format, q.nearest)
            inside = emit(formula, *units.inputs(index, byte, uncontracted_product))
        return ops.to_dtype(inside, torch.int32)

    return packed_bytes(units, keep)


def lower_mask_gradient(grad, mask, axis: int):
    """``qcompile::mask_gradient``: a loop over the gradient."""
    if not ir.is_triton(grad) or is_empty(grad):
        return own_kernel(torch.ops.qcompile.mask_gradient.default, grad, mask, axis)
    load_grad, load_mask, dtype = grad.make_loader(), mask.make_loader(), grad.get_dtype()

    def element(index) -> Value:
        bit = unpacked(load_mask, index_of_moved(index, axis), _MASK_BITS_PER_BYTE)
        kept = ops.ne(bit, ops.constant(0, torch.int32))
        return ops.where(kept, load_grad(index), ops.constant(0, dtype))

    return ir.Pointwise.create(device=grad.get_device(), dtype=dtype, inner_fn=element, ranges=list(grad.get_size()))


def lower_scale_gradient(grad, x, scales, quantizer: str, estimator: str, axis: int, global_scale=None):
    """``qcompile::scale_gradient``: a loop over the gradient.

    Of a continuous slope y is x over the stored scale, which saves the search for the absolute maximum: it can be two
    units in the last place from what the quantizer rounded. Other slopes get the y that was rounded.
    """
    q, spec = Quantizer.parse(quantizer), EstimatorSpec.parse(estimator)
    if not ir.is_triton(grad) or is_empty(grad) or not supports_scale_gradient(q, spec, grad.get_device())[0]:
        op = torch.ops.qcompile.scale_gradient.default
        return own_kernel(op, grad, x, scales, quantizer, estimator, axis, global_scale)
    load_grad, dtype = grad.make_loader(), grad.get_dtype()
    load_x, load_scale = element_loader(x), scales.make_loader()
    load_global = global_scale.make_loader() if global_scale is not None else None
    units = None if spec.kind.continuous else GridUnits(x, q, axis, 1, global_scale)

    def inputs(index) -> tuple[Value, ...]:
        if units is not None:
            return units.inputs(index_of_moved(index, axis), product=uncontracted_product)
        stored = load_scale(group_of(index_of_moved(index, axis), q))
        scale = scale_value(stored, q, load_global)
        y = ops.truediv(load_x(index), scale)
        return ops.where(ops.eq(scale, _float(0.0)), _float(0.0), y), *mark_of(stored, q)

    def element(index) -> Value:
        slope = emit(formulas.slope(spec, q.format), *inputs(index))
        return ops.to_dtype(ops.mul(ops.to_dtype(load_grad(index), torch.float32), slope), dtype)

    return ir.Pointwise.create(device=grad.get_device(), dtype=dtype, inner_fn=element, ranges=list(grad.get_size()))


def _float(value: float) -> Value:
    return ops.constant(value, torch.float32)
