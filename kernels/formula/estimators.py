"""The masks and slopes of estimators, recorded from their own formulas (:mod:`qcompile.ir.estimators`)."""

from __future__ import annotations

from functools import cache

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.formats import Format

from .expression import FLOAT, Formula
from .rounding import chosen, inputs, nearest_level, saturate_value, why_not_rounded

__all__ = ["mask", "mask_of_input", "slope", "why_no_mask", "why_no_slope"]

#: Most operations of a formula that kernels are printed with.
MOST_STEPS = 128


@cache
def mask(estimator: EstimatorSpec, fmt: Format) -> Formula:
    """``(y, level) → bool``: whether an element whose scaled input is y lets its gradient pass."""
    return Formula.record("keeps", lambda y, level: estimator.mask(y, level, fmt), y=FLOAT, level=FLOAT)


@cache
def mask_of_input(estimator: EstimatorSpec, fmt: Format, rounding: str) -> Formula:
    """``(y[, marked]) → bool``, the level being the nearest one."""

    def keeps(y, *marked):
        def of(grid):
            return estimator.mask(y, nearest_level(saturate_value(y, grid), grid, rounding)[0], grid)

        return chosen(fmt, marked, of)

    return Formula.record("keeps", keeps, **inputs(fmt, y=FLOAT))


@cache
def slope(estimator: EstimatorSpec, fmt: Format) -> Formula:
    """``(y[, marked]) → factor on the gradient``, float32."""

    def factor(y, *marked):
        return chosen(fmt, marked, lambda grid: estimator.slope(y, grid))

    return Formula.record("slope", factor, **inputs(fmt, y=FLOAT))


def why_no_mask(estimator: EstimatorSpec, fmt: Format) -> str:
    """Why kernels have no mask of ``estimator``; empty if they have."""
    if estimator.kind.mask is None:
        return f"estimator {estimator} has no mask"
    masks = (mask(estimator, grid) for grid in fmt.choices)
    return why_not_rounded(fmt) or next(filter(None, map(_too_long, masks)), "")


def why_no_slope(estimator: EstimatorSpec, fmt: Format) -> str:
    """Why kernels have no slope of ``estimator``; empty if they have."""
    if estimator.kind.slope is None:
        return f"estimator {estimator} has no slope"
    return _too_long(slope(estimator, fmt))


def _too_long(formula: Formula) -> str:
    count = len(formula.steps)
    return f"its {formula.name} takes {count} operations, more than {MOST_STEPS}" if count > MOST_STEPS else ""
