"""Operands of a product: how one is quantized, as text, and as an option of a recipe or a rule gives or changes it."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from .definitions import cached_by_text, short_names
from .estimators import EstimatorSpec
from .formats import get_format, resolve_format
from .options import reject_unknown
from .outliers import OutlierClamp, OutlierColumns, Outliers
from .quantizer import SCALE_RULES, Granularity, Quantizer, get_scale_rule
from .transforms import Transform

__all__ = [
    "READ_AGAIN",
    "WIDE_GRADIENTS",
    "Operand",
    "check_override",
    "operand_from",
    "override_operand",
    "resolve_override",
]

STE = EstimatorSpec("ste")
NO_TRANSFORM = Transform()


@dataclass(frozen=True)
class Operand:
    """How one operand of a GEMM is quantized: transforms (optional) → quantizer → estimator for the way back."""

    quantizer: Quantizer
    estimator: EstimatorSpec = STE
    outliers: Outliers | None = None
    transform: Transform = NO_TRANSFORM

    def __post_init__(self) -> None:
        if self.transform:
            self._check_transform()
        if self.outliers and self.estimator.kind.slope:
            what = f"{self.outliers.kind}(...) {self.outliers.effect} the input"
            msg = f"{what} that {self.estimator.name} takes its slope from; use ste, clip or trust"
            raise ValueError(msg)
        e4m3 = self.outliers is not None and self.outliers.residual == "e4m3"
        if e4m3 and (why := _why_no_e4m3_residual(self.quantizer, self.estimator)):
            msg = f"occ: residual=e4m3 goes with {why}; residual=exact goes with all"
            raise ValueError(msg)

    def _check_transform(self) -> None:
        if self.outliers:
            msg = f"{self.outliers.kind}(...) {self.outliers.effect} what {self.transform} changes; take one of the two"
        elif self.estimator.kind.slope:
            msg = f"{self.estimator.name} needs the input that {self.transform} changes; use trust, clip or ste"
        elif self.quantizer.scale.two_level and self.transform.sparsity:
            msg = f"scale rule {self.quantizer.scale.name} has a scale of the tensor, which {self.transform} changes"
        else:
            if self.transform.sparsity:
                _ = self.quantizer.format.with_zero  # raises if 0 has no code
            return
        raise ValueError(msg)

    @property
    def stored(self) -> Quantizer:
        """The quantizer whose decoder reads the codes: with a code for 0 where sparsity gives one."""
        sparse = bool(self.transform.sparsity)
        return replace(self.quantizer, format=self.quantizer.format.with_zero) if sparse else self.quantizer

    def __str__(self) -> str:
        optional = [str(part) for part in (self.outliers, self.transform) if part]
        return "; ".join([str(self.quantizer), str(self.estimator), *optional])

    @staticmethod
    def resolve(text: str) -> str:
        """``text`` with the full names of users' definitions."""
        head, *rest = text.split(";")
        return "; ".join([Quantizer.resolve(head), *map(EstimatorSpec.resolve, rest)])

    @staticmethod
    @cached_by_text
    def parse(text: str) -> Operand:
        """``"<quantizer>[; <estimator>][; occ(...) | columns(...)][; hadamard(<size>)][; sparse(<pattern>)]"``; inverse
        of ``str()``. The quantizer comes first.
        """
        return Operand._parsed(Operand.resolve(text))

    @staticmethod
    @cache
    def _parsed(text: str) -> Operand:
        head, *rest = (part.strip() for part in text.split(";"))
        parts: dict[str, list[str]] = {name: [] for name in ("outliers", "hadamard", "sparse", "")}
        for part in rest:
            outliers = part.startswith((OutlierClamp.kind, OutlierColumns.kind))
            parts["outliers" if outliers else next(name for name in parts if part.startswith(name))].append(part)
        if any(len(found) > 1 for found in parts.values()):
            msg = f"operand {short_names(text)!r} names more than one estimator, outlier clamp, rotation or sparsity"
            raise ValueError(msg)
        return Operand(
            Quantizer.parse(head),
            EstimatorSpec.parse(parts[""][0]) if parts[""] else STE,
            Outliers.parse(parts["outliers"][0]) if parts["outliers"] else None,
            Transform.parse("; ".join([*parts["hadamard"], *parts["sparse"]])),
        )

    def override(self, changes: Mapping[str, Any]) -> Operand:
        """A copy with the named fields changed: format, granularity, scale, rounding, estimator, outliers, rotation,
        sparsity. A residual in E4M3 that they do not admit becomes exact, unless ``outliers`` is among them.
        """
        known = ("format", "granularity", "scale", "rounding", "estimator", "outliers", "rotation", "sparsity")
        reject_unknown("operand", changes, known)
        for key, value in changes.items():
            size = key == "rotation" and type(value) is int
            if not (isinstance(value, str) or size or (key in ("outliers", "rotation", "sparsity") and value is None)):
                msg = f"{key} takes {'a size' if key == 'rotation' else 'text'}, got {value!r}"
                raise ValueError(msg)
        quantizer = self.quantizer
        if "format" in changes:
            quantizer = replace(quantizer, format=get_format(changes["format"]))
        if "granularity" in changes:
            quantizer = replace(quantizer, granularity=Granularity.parse(changes["granularity"]))
        if "scale" in changes:
            quantizer = replace(quantizer, scale=get_scale_rule(changes["scale"]))
        if "rounding" in changes:
            quantizer = replace(quantizer, rounding=changes["rounding"])
        estimator = EstimatorSpec.parse(changes["estimator"]) if "estimator" in changes else self.estimator
        outliers = self.outliers
        if "outliers" in changes:
            outliers = Outliers.parse(changes["outliers"]) if changes["outliers"] else None
        elif isinstance(outliers, OutlierClamp) and outliers.residual == "e4m3":
            fits = not _why_no_e4m3_residual(quantizer, estimator)
            outliers = outliers if fits else replace(outliers, residual="exact")
        transform = self.transform
        if "rotation" in changes:
            transform = replace(transform, rotation=_rotation(changes["rotation"]))
        if "sparsity" in changes:
            transform = replace(transform, sparsity=changes["sparsity"] or "")
        return Operand(quantizer, estimator, outliers, transform)


def _why_no_e4m3_residual(q: Quantizer, estimator: EstimatorSpec) -> str:
    """What codes must be that an outlier's residual is added to in E4M3, and are not; empty if they are."""
    fits = q.format.tensor_core_type == "e4m3" and q.format.bits <= 4
    if not (fits and q.granularity.kind == "row" and q.scale.name == "absmax" and q.rounding != "stochastic"):
        return f"a grid of up to 4 bits, granularity row and scale absmax, not {q}"
    return "" if estimator == STE else f"the estimator ste, not {estimator}"


#: What quantizes an operand again for the backward product of a role: the role by the name of the field.
READ_AGAIN = {"dgrad_weight": "dgrad", "wgrad_activation": "wgrad"}


def _rotation(value: Any) -> int:
    """The size of a rotation given as a number, as ``"hadamard(128)"``, or as ``None``."""
    return Transform.parse(value).rotation if isinstance(value, str) else 1 if value is None else value


#: Short names for the gradient operand. "fp8" is per-tensor E5M2, as published (arXiv 2501.17116 §4.1).
GRADIENT_ALIASES: dict[str, str | None] = {"bf16": None, "fp8": "e5m2 tensor absmax even"}

#: What ``gradient=`` of a rule takes for high precision.
WIDE_GRADIENTS = ("off", *(name for name, text in GRADIENT_ALIASES.items() if text is None))


def override_operand(base: Operand | None, value: Any, name: str) -> Operand | None:
    """Apply an operand option: ``None``/"off", a whole operand as text, or a dictionary of changed fields."""
    try:
        return operand_from(base, value, name)
    except ValueError as error:
        msg = f"option {name!r}: {error}"
        raise ValueError(msg) from None


def operand_from(base: Operand | None, value: Any, name: str) -> Operand | None:
    """:func:`override_operand`, with errors that do not name the option."""
    if value is None or value == "off":
        return None
    operand = _operand_from(base, value, name)
    if operand and (why := _misplaced(operand, name)):
        msg = f"{operand}: {why}"
        raise ValueError(msg)
    return operand


def _misplaced(operand: Operand, name: str) -> str:
    """Why an operand cannot be the one called ``name``; empty if it can."""
    if name == "gradient" and operand != Operand(operand.quantizer):
        return "a gradient takes a quantizer only, no estimator, no outlier clamp and no transform"
    if name in READ_AGAIN:
        rotated = Operand(
            operand.quantizer, transform=Transform(operand.transform.rotation, "", operand.transform.signs)
        )
        return "" if operand == rotated else "an operand of the backward takes a quantizer and a rotation only"
    return "signs= go with operands of the backward: " + ", ".join(READ_AGAIN) if operand.transform.signs else ""


def check_override(value: Any, name: str) -> None:
    """Refuse what :func:`override_operand` would refuse whatever operand it starts from."""
    if not isinstance(value, Mapping):
        override_operand(None, value, name)
        return
    for key, part in value.items():
        granularity = Granularity("block", 16) if key == "scale" else Granularity("row")
        override_operand(Operand(Quantizer(get_format("e2m1"), granularity)), {key: part}, name)


def resolve_override(value: Any) -> Any:
    """An operand option with the full names of users' definitions, so that it keeps its meaning."""
    if isinstance(value, str):
        return Operand.resolve(value)
    if isinstance(value, Mapping):
        resolve = {"format": resolve_format, "scale": SCALE_RULES.resolve, "estimator": EstimatorSpec.resolve}
        return {key: resolve.get(key, lambda part: part)(part) for key, part in value.items()}
    return value


def _operand_from(base: Operand | None, value: Any, name: str) -> Operand | None:
    if isinstance(value, Operand):
        return value
    if isinstance(value, str):
        if name != "gradient":
            return Operand.parse(value)
        if value in GRADIENT_ALIASES:
            alias = GRADIENT_ALIASES[value]
            return None if alias is None else Operand.parse(alias)
        try:
            return Operand.parse(value)
        except ValueError as error:
            msg = f"{error}; or {', '.join(GRADIENT_ALIASES)} for short"
            raise ValueError(msg) from None
    if isinstance(value, Mapping):
        if base is None:
            msg = "there is nothing to change in part; give the whole operand as text"
            raise ValueError(msg)
        return base.override(value)
    msg = f"takes text, a dictionary or None, got {type(value).__name__} {reprlib.repr(value)}"
    raise ValueError(msg)
