"""Backward estimators: what replaces the derivative of rounding, which is zero almost everywhere.

Write y = x / s for the scaled input and q for the level it was rounded to. The forward value is s·q whatever the
estimator; an estimator only decides the factor g in ``dL/dx = dL/dx̂ ⊙ g``. No gradient flows through the scale.

* ``ste``: g = 1. Bengio et al., arXiv 1308.3432.
* ``clip(s=1)``: g = 1[|y| ≤ s · max (1 + 2⁻²²)]: elements outside s times the grid stop learning; the ends of a code
  book may differ. Courbariaux et al., arXiv 1602.02830; s = 1.3 (1.25 without rotation) is QuEST's rule for one bit.
* ``trust``: g = 1[|y − q| ≤ T], q the nearest level (0 for an element that sparsity drops), T = half the widest gap of
  the grid: like ``clip``, but an element less than half a step outside the last level is still trusted. QuEST, arXiv
  2502.05003 §3.2. ``trust(t=…)`` sets T, in grid units.
* ``dge(k=5,cap=3)``: g = min(|v|^(1/k − 1) / k, cap), v ∈ [−1, 1] the position of y between its two neighbouring
  levels. The derivative of a smooth surrogate of the staircase. arXiv 2501.17116 §3.1, eq. 8. Beyond the last level
  (rounding noise of the scale, or a scale rule that clips) g takes its value at the last level, 1/k.

What an estimator needs kept for the backward decides how it is lowered: nothing, one bit per element, or the input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from .definitions import Registry, cached_by_text, short_name
from .formats import Format
from .formulas import Scalar, float32

__all__ = ["ESTIMATORS", "Estimator", "EstimatorSpec"]


# The formulas take tensors, or the scalars of qcompile.kernels.formula, from which kernels are printed.


def _clip_mask(y: Scalar, level: Scalar, fmt: Format, s: float) -> Scalar:
    if fmt.centred:
        return y.abs() <= clip_limit(fmt, s)
    lowest, highest = (level * (clip_limit(fmt, s) / fmt.max) for level in fmt.range)
    return (y >= lowest) & (y <= highest)


def _trust_mask(y: Scalar, level: Scalar, fmt: Format, t: float | None) -> Scalar:
    return (y - level).abs() <= trust_threshold(fmt, t)


def clip_limit(fmt: Format, s: float = 1.0) -> float:
    """Where ``clip`` ends: s times the last level, and the two roundings by which x · (max / amax) can exceed it at x =
    amax.
    """
    return s * fmt.max * (1 + 2.0**-22)


def trust_threshold(fmt: Format, t: float | None = None) -> float:
    """T in grid units: ``t``, or half the widest distance between neighbouring levels, the one across zero included."""
    if t is not None:
        return t
    return fmt.half_gap


def _trust_bound(fmt: Format, t: float | None) -> float | None:
    """Within the grid |y − level| is at most half the widest gap, so a threshold T not below it decides outside only,
    where y ∓ max is exact: |y| ≤ max + T.
    """
    threshold = float32(trust_threshold(fmt, t))
    return fmt.max + threshold if fmt.centred and trust_threshold(fmt) <= threshold <= fmt.max else None


def _trust_bound_at_zero(fmt: Format, t: float | None) -> float:
    return float32(trust_threshold(fmt, t))


def _clip_bound(fmt: Format, s: float) -> float | None:
    return float32(clip_limit(fmt, s)) if fmt.centred else None


def dge_surrogate(y: Tensor, fmt: Format, k: float) -> Tensor:
    """The smooth staircase f whose derivative DGE uses: float tensor in grid units in and out (arXiv 2501.17116 eq.
    7).
    """
    low, to_unit, position = _bin(y, fmt)
    rise = position.sign() * position.abs().pow(1 / k)
    sign = 1.0 if fmt.codebook else torch.where(y < 0, -1.0, 1.0)
    return sign * (low + (1 + rise) / to_unit)


def _dge_slope(y: Scalar, fmt: Format, k: float, cap: float) -> Scalar:
    return (_position(y, fmt).abs().pow(1 / k - 1) * (1 / k)).clamp(max=cap)


def _position(y: Scalar, fmt: Format) -> Scalar:
    """Position in [−1, 1] of |y| in its bin; at an edge that of either neighbour, whose magnitude is 1 as well.

    Where bins are as wide as powers of two and begin at multiples of their width, as those of small floats do, it is
    the fraction of |y| / width, exactly: a third of the operations of a search for the bin.
    """
    segments = _segments(fmt.magnitudes) if fmt.has_zero and not fmt.codebook else ()
    if not segments:
        return _bin(y, fmt)[2]
    magnitude = y.abs().clamp(max=fmt.max)
    per_width: Scalar = 1 / segments[0][1]
    for start, width in segments[1:]:
        per_width = torch.where(magnitude >= start, 1 / width, per_width)
    bins = magnitude * per_width
    return (bins - bins.floor()) * 2 - 1


def _segments(edges: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """Start and width of bins, a new one where the width changes; none if a fraction does not tell the position."""
    bins = [(low, high - low) for low, high in pairwise(edges)]
    if any(math.frexp(width)[0] != 0.5 or low % width for low, width in bins):
        return ()
    return tuple(bin for i, bin in enumerate(bins) if i == 0 or bin[1] != bins[i - 1][1])


def _bin(y: Scalar, fmt: Format) -> tuple[Scalar, Scalar, Scalar]:
    """Lower level, 2 / width and position in [−1, 1] of the bin that |y| lies in; that y lies in, for a code book.

    Bins lie between levels that elements are rounded to, of which the 0 of a pruned format is none.
    """
    fmt = fmt.grid
    if fmt.codebook:
        edges, magnitude = fmt.sorted_levels, y.clamp(*fmt.range)
    else:
        edges = fmt.magnitudes if fmt.has_zero else (-fmt.magnitudes[0], *fmt.magnitudes)
        magnitude = y.abs().clamp(max=fmt.max)
    low: Scalar = edges[0]
    to_unit: Scalar = 2 / (edges[1] - edges[0])
    for edge, end in pairwise(edges[1:]):
        reached = magnitude >= edge
        low = torch.where(reached, edge, low)
        to_unit = torch.where(reached, 2 / (end - edge), to_unit)
    return low, to_unit, (magnitude - low) * to_unit - 1


def _plain(value: float) -> str:
    """Shortest text that reads back as the same float: ``5``, ``0.1``."""
    return repr(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True)
class Estimator:
    """The definition of an estimator: the parameters it takes, and its formula.

    At most one of ``mask`` (needs one bit per element) and ``slope`` (needs the input) is set; with neither, gradients
    pass as they are. A parameter is a positive number; one whose default is ``None`` follows from the format.

    Attributes:
        name: what texts call it, followed by parameters in parentheses.
        mask: ``(y, level, format, **parameters) → bool``, y the scaled input and level what it was rounded to, float32
            in grid units. Operators and torch's elementwise functions.
        slope: ``(y, format, **parameters) → float32``, the factor on the gradient.
        parameters: name -> default.
        bound: ``(format, **parameters) → b`` where the mask is |y| ≤ b; ``None`` from it where it is not that. Kernels
            then need no level.
        bound_at_zero: the same where the level is 0, which it is of elements that sparsity drops.
        continuous: whether a slope changes little with the last bits of y, so that kernels may divide by the stored
            scale instead of searching the row for its maximum again.
    """

    name: str
    mask: Callable[..., Scalar] | None = field(default=None, repr=False)
    slope: Callable[..., Scalar] | None = field(default=None, repr=False)
    parameters: Mapping[str, float | None] = field(default_factory=dict, hash=False)
    bound: Callable[..., float | None] | None = field(default=None, repr=False)
    bound_at_zero: Callable[..., float | None] | None = field(default=None, repr=False)
    continuous: bool = False


ESTIMATORS: Registry[Estimator] = Registry(
    "estimator",
    (
        Estimator("ste"),
        Estimator("clip", mask=_clip_mask, parameters={"s": 1.0}, bound=_clip_bound, bound_at_zero=_clip_bound),
        Estimator(
            "trust", mask=_trust_mask, parameters={"t": None}, bound=_trust_bound, bound_at_zero=_trust_bound_at_zero
        ),
        Estimator("dge", slope=_dge_slope, parameters={"k": 5.0, "cap": 3.0}, continuous=True),
    ),
)


@dataclass(frozen=True)
class EstimatorSpec:
    """An estimator with its parameters; ``str()`` and :meth:`parse` are inverse, e.g. ``"dge(k=5,cap=3)"``.

    The text of a mask estimator leaves out what is as the table has it: ``"clip"``.
    """

    name: str
    parameters: tuple[tuple[str, float | None], ...] = ()

    @property
    def kind(self) -> Estimator:
        """The definition."""
        return ESTIMATORS[self.name]

    def __str__(self) -> str:
        shown = [
            (key, value)
            for key, value in self.parameters
            if value is not None and (self.kind.slope or value != self.kind.parameters[key])
        ]
        arguments = ",".join(f"{key}={_plain(value)}" for key, value in shown)
        return f"{self.name}({arguments})" if arguments else self.name

    @staticmethod
    def resolve(text: str) -> str:
        """``text`` with the full name of a user's estimator."""
        name, parenthesis, parameters = text.strip().partition("(")
        return ESTIMATORS.resolve(name.strip()) + parenthesis + parameters

    @staticmethod
    @cached_by_text
    def parse(text: str) -> EstimatorSpec:
        """Raises ``ValueError`` for an unknown estimator or parameter, or a non-positive value."""
        return EstimatorSpec._parsed(EstimatorSpec.resolve(text))

    @staticmethod
    @cache
    def _parsed(text: str) -> EstimatorSpec:
        match = re.fullmatch(r"([\w@]+)(?:\(([^()]*)\))?", text.replace(" ", ""))
        if match is None or match[1] not in ESTIMATORS:
            msg = f"unknown estimator {text!r}; known: {', '.join(ESTIMATORS.known)}"
            raise ValueError(msg)
        values = dict(ESTIMATORS[match[1]].parameters)
        parts = [part.partition("=") for part in filter(None, (match[2] or "").split(","))]
        if len({key for key, _, _ in parts}) < len(parts):
            msg = f"estimator {text!r}: a parameter is given twice"
            raise ValueError(msg)
        for key, _, value in parts:
            if key not in values:
                known = ", ".join(values) or "none"
                msg = f"estimator {short_name(match[1])!r} has no parameter {key!r}; its parameters: {known}"
                raise ValueError(msg)
            try:
                number = float(value)
            except ValueError:
                msg = f"estimator {short_name(match[1])!r}: {key}={value!r} is not a number"
                raise ValueError(msg) from None
            if not 0 < number < float("inf"):
                msg = f"estimator {short_name(match[1])!r}: {key} must be positive and finite, got {value}"
                raise ValueError(msg)
            values[key] = number
        return EstimatorSpec(match[1], tuple(values.items()))

    def mask(self, y: Scalar, level: Scalar, fmt: Format) -> Scalar:
        """Bool, of the shape of ``y``: which elements let their gradient pass."""
        assert self.kind.mask is not None
        return self.kind.mask(y, level, fmt, **dict(self.parameters))

    def slope(self, y: Scalar, fmt: Format) -> Scalar:
        """Of the shape and dtype of ``y``: the factor on the gradient."""
        assert self.kind.slope is not None
        return self.kind.slope(y, fmt, **dict(self.parameters))

    def bound(self, fmt: Format, at_zero: bool = False) -> float | None:
        """b where the mask is |y| ≤ b, of all elements or of those whose level is 0; else ``None``."""
        bound = self.kind.bound_at_zero if at_zero else self.kind.bound
        return bound(fmt, **dict(self.parameters)) if bound else None
