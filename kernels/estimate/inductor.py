"""Backward estimators as Inductor loop bodies: the factor on the gradient fuses into whatever makes or reads
the gradient.

The scaled input y = x · γ is computed as the quantizer computes it (:class:`GridUnits`), so masks agree with
the codes bit for bit. A slope is a power and may differ from the reference's in the last place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._inductor import ir
from torch._inductor.virtualized import ops

from qcompile.ir.estimators import Estimator, clip_limit, trust_threshold
from qcompile.ir.formats import Format
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize.inductor import (
    GridUnits,
    Value,
    group_of,
    index_of_moved,
    is_empty,
    packed_bytes,
    rounded,
    run_reference,
    scale_value,
    select,
    supports_scales,
    threshold_bits,
    unpacked,
)

__all__ = [
    "lower_estimator_mask",
    "lower_mask_gradient",
    "lower_scale_gradient",
    "supports_estimator_mask",
    "supports_mask_gradient",
    "supports_scale_gradient",
]

_MASK_BITS_PER_BYTE = 8
#: Most bins of the staircase for which comparisons and selections are generated.
_MAX_BINS = 16

#: Estimator -> b where its mask is ``|y| ≤ b``. For ``trust``: inside the grid |y − q| is at most half the
#: local gap, which T is no smaller than; outside, q is the last level and the subtraction exact, hence max +
#: T. Stated so, no subtraction is there to be contracted with the product that makes y.
MASK_BOUNDS: dict[str, Callable[..., float]] = {
    "clip": clip_limit,
    "trust": lambda fmt, t: fmt.max + trust_threshold(fmt, t),
}


def _dge_slope(y: Value, fmt: Format, k: float, cap: float) -> Value:
    """min(|v|^(1/k − 1) / k, cap), v ∈ [−1, 1] the position of |y| in its bin (arXiv 2501.17116 eq. 8)."""
    bins = _Bins.of(fmt)
    magnitude = ops.minimum(ops.abs(y), _float(fmt.max))  # passes NaN on
    found = threshold_bits(bins.low[1:], lambda edge, odd: ops.ge(magnitude, edge))
    above = ops.sub(magnitude, select(found, bins.low))
    position = ops.sub(ops.mul(above, select(found, bins.to_unit)), _float(1.0))
    if k == 1:  # the surrogate is the identity, and 0 · log2 0 would be no number
        return ops.where(ops.eq(position, position), _float(min(1.0, cap)), position)
    # A power by way of the hardware's logarithm and exponential; the general function takes ten times as long.
    power = ops.exp2(ops.mul(ops.log2(ops.abs(position)), _float(1 / k - 1)))
    slope = ops.mul(power, _float(1 / k))
    return ops.minimum(slope, _float(cap))


#: Estimator -> factor on the gradient.
SLOPES: dict[str, Callable[..., Value]] = {"dge": _dge_slope}


@dataclass(frozen=True)
class _Bins:
    """The bins between neighbouring levels, the one across zero first if zero is no level."""

    low: tuple[float, ...]
    to_unit: tuple[float, ...]  # 2 / width

    @staticmethod
    def of(fmt: Format) -> _Bins:
        edges = fmt.magnitudes if fmt.has_zero else (-fmt.magnitudes[0], *fmt.magnitudes)
        return _Bins(edges[:-1], tuple(2 / (hi - lo) for lo, hi in itertools.pairwise(edges)))


# --- what is supported --------------------------------------------------------------------------------------


def supports_estimator_mask(q: Quantizer, estimator: Estimator, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_estimator_mask` generates code, and if not, why."""
    if estimator.name not in MASK_BOUNDS:
        return False, f"the mask of estimator {estimator.name} is not generated"
    threshold = dict(estimator.parameters).get("t")
    if threshold is not None and threshold < trust_threshold(q.format):
        return False, f"{estimator} distrusts elements inside the grid, for which no code is generated"
    if q.scale.statistic != "amax":
        return False, f"{q.scale.name} scales are not generated"
    if q.format.pruned:
        return False, f"{q.format.name} rounds to the levels of {q.format.pruned}"
    return supports_scales(q, device)  # rounding takes no part in it


def supports_scale_gradient(q: Quantizer, estimator: Estimator, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_scale_gradient` generates code, and if not, why."""
    if estimator.name not in SLOPES:
        return False, f"the slope of estimator {estimator.name} is not generated"
    if len(_Bins.of(q.format).low) > _MAX_BINS:
        return False, f"{q.format.name} has too many levels for comparisons"
    return supports_scales(q, device)  # rounding takes no part in it


def supports_mask_gradient() -> tuple[bool, str]:
    """Code is always generated."""
    return True, ""


# --- the ops ------------------------------------------------------------------------------------------------


def lower_estimator_mask(x, scales, quantizer: str, estimator: str, axis: int, global_scale=None, transform: str = ""):
    """``qcompile::estimator_mask``: one bit per element, packed in the kernel that finds the scales again."""
    q, spec = Quantizer.parse(quantizer), Estimator.parse(estimator)
    supported = not transform and supports_estimator_mask(q, spec, x.get_device())[0]
    if not ir.is_triton(x) or is_empty(x) or not supported:
        op = torch.ops.qcompile.estimator_mask.default
        return run_reference(op, x, scales, quantizer, estimator, axis, global_scale, transform)
    bound = MASK_BOUNDS[spec.name](q.format, **dict(spec.parameters))
    units = GridUnits(x, q, axis, _MASK_BITS_PER_BYTE, global_scale)

    def keep(index, byte) -> Value:
        inside = ops.le(ops.abs(units.load(index, byte)), _float(bound))
        return ops.to_dtype(inside, torch.int32)

    return packed_bytes(units, keep)


def lower_mask_gradient(grad, mask, axis: int):
    """``qcompile::mask_gradient``: a loop over the gradient."""
    if not ir.is_triton(grad) or is_empty(grad):
        return run_reference(torch.ops.qcompile.mask_gradient.default, grad, mask, axis)
    load_grad, load_mask, dtype = grad.make_loader(), mask.make_loader(), grad.get_dtype()

    def element(index) -> Value:
        bit = unpacked(load_mask, index_of_moved(index, axis), _MASK_BITS_PER_BYTE)
        kept = ops.ne(bit, ops.constant(0, torch.int32))
        return ops.where(kept, load_grad(index), ops.constant(0, dtype))

    return ir.Pointwise.create(device=grad.get_device(), dtype=dtype, inner_fn=element, ranges=list(grad.get_size()))


def lower_scale_gradient(grad, x, scales, quantizer: str, estimator: str, axis: int, global_scale=None):
    """``qcompile::scale_gradient``: a loop over the gradient.

    y is x over the stored scale, which saves the search for the absolute maximum. It can be two units in the last place
    from what the quantizer rounded; the slope is continuous, so that is all it differs by.
    """
    q, spec = Quantizer.parse(quantizer), Estimator.parse(estimator)
    if not ir.is_triton(grad) or is_empty(grad) or not supports_scale_gradient(q, spec, grad.get_device())[0]:
        op = torch.ops.qcompile.scale_gradient.default
        return run_reference(op, grad, x, scales, quantizer, estimator, axis, global_scale)
    load_grad, dtype = grad.make_loader(), grad.get_dtype()
    load_x, load_scale = x.make_loader(), scales.make_loader()
    load_global = global_scale.make_loader() if global_scale is not None else None

    def element(index) -> Value:
        scale = scale_value(load_scale(group_of(index_of_moved(index, axis), q)), q, load_global)
        y = ops.truediv(rounded(load_x(index), x.get_dtype()), scale)
        y = ops.where(ops.eq(scale, _float(0.0)), _float(0.0), y)
        slope = SLOPES[spec.name](y, q.format, **dict(spec.parameters))
        return ops.to_dtype(ops.mul(ops.to_dtype(load_grad(index), torch.float32), slope), dtype)

    return ir.Pointwise.create(device=grad.get_device(), dtype=dtype, inner_fn=element, ranges=list(grad.get_size()))


def _float(value: float) -> Value:
    return ops.constant(value, torch.float32)
