"""Backward estimators: what replaces the derivative of rounding, which is zero almost everywhere.

Write y = x / s for the scaled input and q for the level it was rounded to. The forward value is s·q whatever the
estimator; an estimator only decides the factor g in ``dL/dx = dL/dx̂ ⊙ g``. No gradient flows through the scale.

* ``ste``: g = 1. Bengio et al., arXiv 1308.3432.
* ``clip(s=1)``: g = 1[|y| ≤ s · max (1 + 2⁻²²)]: elements outside s times the grid stop learning. Courbariaux et al.,
  arXiv 1602.02830; s = 1.3 (1.25 without rotation) is QuEST's rule for one bit.
* ``trust``: g = 1[|y − q| ≤ T], q the nearest level (0 for an element that sparsity drops), T = half the widest gap of
  the grid: like ``clip``, but an element less than half a step outside the last level is still trusted. QuEST, arXiv
  2502.05003 §3.2. ``trust(t=…)`` sets T, in grid units.
* ``dge(k=5,cap=3)``: g = min(|v|^(1/k − 1) / k, cap), v ∈ [−1, 1] the position of y between its two neighbouring
  levels. The derivative of a smooth surrogate of the staircase. arXiv 2501.17116 §3.1, eq. 8. Beyond the last level
  (rounding noise of the scale, or a scale rule that clips) g takes its value at the last level, 1/k.

What an estimator needs kept for the backward decides how it is lowered: nothing, one bit per element, or the input.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from .formats import Format

__all__ = ["ESTIMATORS", "Estimator"]


def _clip_mask(y: Tensor, q: Tensor, fmt: Format, s: float) -> Tensor:
    return y.abs() <= clip_limit(fmt, s)


def _trust_mask(y: Tensor, q: Tensor, fmt: Format, t: float | None) -> Tensor:
    return (y - q).abs() <= trust_threshold(fmt, t)


def clip_limit(fmt: Format, s: float = 1.0) -> float:
    """Where ``clip`` ends: s times the last level, and the two roundings by which x · (max / amax) can exceed it at x =
    amax.
    """
    return s * fmt.max * (1 + 2.0**-22)


def trust_threshold(fmt: Format, t: float | None = None) -> float:
    """T in grid units: ``t``, or half the widest distance between neighbouring levels, the one across zero included."""
    if t is not None:
        return t
    fmt = fmt.grid
    gaps = [hi - lo for lo, hi in zip(fmt.magnitudes, fmt.magnitudes[1:], strict=False)]
    across_zero = fmt.magnitudes[0] if fmt.has_zero else 2 * fmt.magnitudes[0]
    return max([*gaps, across_zero]) / 2


def dge_surrogate(y: Tensor, fmt: Format, k: float) -> Tensor:
    """The smooth staircase f whose derivative DGE uses: float tensor in grid units in and out (arXiv 2501.17116 eq.
    7).
    """
    low, gap, position = _bin(y, fmt)
    rise = position.sign() * position.abs().pow(1 / k)
    return torch.where(y < 0, -1.0, 1.0) * (low + gap / 2 * (1 + rise))


def _dge_slope(y: Tensor, fmt: Format, k: float, cap: float) -> Tensor:
    _, _, position = _bin(y, fmt)
    return (position.abs().pow(1 / k - 1) / k).clamp(max=cap)


def _bin(y: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Lower level, width and position in [−1, 1] of the bin that |y| lies in."""
    edges = list(fmt.magnitudes if fmt.has_zero else (-fmt.magnitudes[0], *fmt.magnitudes))
    levels = torch.tensor(edges, dtype=y.dtype, device=y.device)
    magnitude = y.abs().clamp(max=fmt.max)
    index = torch.bucketize(magnitude, levels[1:-1].contiguous(), right=True)
    low = levels[index]
    gap = levels[index + 1] - low
    return low, gap, 2 * (magnitude - low) / gap - 1


def _plain(value: float) -> str:
    """Shortest text that reads back as the same float: ``5``, ``0.1``."""
    return repr(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True)
class EstimatorKind:
    """One row of the table: the parameters an estimator takes, and its formula.

    Exactly one of ``mask`` (needs one bit per element) and ``slope`` (needs the input) is set, or neither (needs
    nothing). Formulas take float32 tensors in grid units. A parameter is a positive number; one whose default is
    ``None`` follows from the format.
    """

    parameters: dict[str, float | None] = field(default_factory=dict)
    mask: Callable[..., Tensor] | None = None
    slope: Callable[..., Tensor] | None = None


ESTIMATORS: dict[str, EstimatorKind] = {
    "ste": EstimatorKind(),
    "clip": EstimatorKind({"s": 1.0}, mask=_clip_mask),
    "trust": EstimatorKind({"t": None}, mask=_trust_mask),
    "dge": EstimatorKind({"k": 5.0, "cap": 3.0}, slope=_dge_slope),
}


@dataclass(frozen=True)
class Estimator:
    """An estimator with its parameters; ``str()`` and :meth:`parse` are inverse, e.g. ``"dge(k=5,cap=3)"``.

    The text of a mask estimator leaves out what is as the table has it: ``"clip"``.
    """

    name: str
    parameters: tuple[tuple[str, float | None], ...] = ()

    @property
    def kind(self) -> EstimatorKind:
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
    @cache
    def parse(text: str) -> Estimator:
        """Raises ``ValueError`` for an unknown estimator or parameter, or a non-positive value."""
        match = re.fullmatch(r"(\w+)(?:\(([^()]*)\))?", text.replace(" ", ""))
        if match is None or match[1] not in ESTIMATORS:
            msg = f"unknown estimator {text!r}; known: {', '.join(ESTIMATORS)}"
            raise ValueError(msg)
        values = dict(ESTIMATORS[match[1]].parameters)
        parts = [part.partition("=") for part in filter(None, (match[2] or "").split(","))]
        if len({key for key, _, _ in parts}) < len(parts):
            msg = f"estimator {text!r}: a parameter is given twice"
            raise ValueError(msg)
        for key, _, value in parts:
            if key not in values:
                known = ", ".join(values) or "none"
                msg = f"estimator {match[1]!r} has no parameter {key!r}; its parameters: {known}"
                raise ValueError(msg)
            try:
                number = float(value)
            except ValueError:
                msg = f"estimator {match[1]!r}: {key}={value!r} is not a number"
                raise ValueError(msg) from None
            if not 0 < number < float("inf"):
                msg = f"estimator {match[1]!r}: {key} must be positive and finite, got {value}"
                raise ValueError(msg)
            values[key] = number
        return Estimator(match[1], tuple(values.items()))

    def mask(self, y: Tensor, q: Tensor, fmt: Format) -> Tensor:
        """Bool tensor of the shape of ``y``: which elements let their gradient pass."""
        assert self.kind.mask is not None
        return self.kind.mask(y, q, fmt, **dict(self.parameters))

    def slope(self, y: Tensor, fmt: Format) -> Tensor:
        """Float32 tensor of the shape of ``y``: the factor on the gradient."""
        assert self.kind.slope is not None
        return self.kind.slope(y, fmt, **dict(self.parameters))
