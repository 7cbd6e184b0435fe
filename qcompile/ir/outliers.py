"""What an operand does with the few elements that would set its scales: clamp them, or multiply their columns wide."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

from .options import reject_unknown

__all__ = ["OutlierClamp", "OutlierColumns", "Outliers"]


class Outliers(ABC):
    """``x = rest + residual``; the rest is quantized. ``str()`` and :meth:`parse` are inverse.

    Attributes:
        kind: how its text begins. effect: what is done to the input, as a verb.
        per: what outliers are told by: each ``"row"``, the whole ``"tensor"``, or each ``"column"``.
        compensate: whether the residual is added to the decoded rest. residual: ``"exact"``, beside the codes, or in
            them.
        why_no_code: why codes alone do not hold the operand.
    """

    kind: ClassVar[str]
    effect: ClassVar[str]
    why_no_code: ClassVar[str]
    per: str
    compensate: bool
    residual: str

    @property
    @abstractmethod
    def label(self) -> str:
        """What the report says after the format; "" if codes are all there is."""

    @staticmethod
    def parse(text: str) -> Outliers:
        """Raises ``ValueError`` naming the part that is not understood."""
        columns = text.strip().startswith(OutlierColumns.kind)
        return OutlierColumns.parse(text) if columns else OutlierClamp.parse(text)


@dataclass(frozen=True)
class OutlierClamp(Outliers):
    """Outlier clamping and compensation (OCC), arXiv 2501.17116 §3.2.

    ``x = clamped + residual``, exactly for 16-bit x and to one rounding for float32, with ``clamped`` inside the
    (1 − α, α) quantiles. ``per="row"`` takes the quantiles of each token (the released code), ``per="tensor"`` those of
    the whole tensor. Without ``compensate`` the residual is dropped (the released wiring).

    ``residual="exact"`` keeps the residual apart, in high precision. ``residual="e4m3"`` adds it to the code of the
    clamped element, rounded to E4M3 (relative error ≤ 2⁻⁴; the levels in between stay what they are): one product
    on 8-bit tensor cores then serves both. It saturates at 448/max times the clamped row's absolute maximum.
    """

    kind = "occ"
    effect = "clamps"
    why_no_code = "the exact residual of the outliers (occ(residual=e4m3) is a code)"
    alpha: float = 0.99
    per: str = "row"
    compensate: bool = True
    residual: str = "exact"

    def __post_init__(self) -> None:
        if not 0.5 < self.alpha <= 0.999999:
            msg = f"occ: alpha must lie in (0.5, 0.999999], got {self.alpha}"
            raise ValueError(msg)
        if self.per not in ("row", "tensor"):
            msg = f"occ: per must be 'row' or 'tensor', got {self.per!r}"
            raise ValueError(msg)
        if self.residual not in ("exact", "e4m3"):
            msg = f"occ: residual must be 'exact' or 'e4m3', got {self.residual!r}"
            raise ValueError(msg)
        if self.residual == "e4m3" and not (self.compensate and self.per == "row"):
            msg = "occ: residual=e4m3 goes with compensate=1 and per=row"
            raise ValueError(msg)

    def __str__(self) -> str:
        residual = f",residual={self.residual}" if self.residual != "exact" else ""
        return f"occ(alpha={self.alpha!r},per={self.per},compensate={int(self.compensate)}{residual})"

    @property
    def label(self) -> str:
        return "" if not self.compensate else " + residual" if self.residual == "exact" else " + e4m3 outliers"

    @staticmethod
    def parse(text: str) -> OutlierClamp:
        values = _parameters(text, OutlierClamp, "outlier clamp", "occ(alpha=0.99,per=row,compensate=1)")
        try:
            if values.get("compensate", "1") not in ("0", "1"):
                msg = f"compensate must be 0 or 1, got {values['compensate']!r}"
                raise ValueError(msg)
            return OutlierClamp(
                alpha=_number(values, "alpha", 0.99),
                per=values.get("per", "row"),
                compensate=values.get("compensate", "1") == "1",
                residual=values.get("residual", "exact"),
            )
        except ValueError as error:
            msg = f"outlier clamp {text!r}: {error}"
            raise ValueError(msg) from None


@dataclass(frozen=True)
class OutlierColumns(Outliers):
    """Columns in which some element reaches ``threshold`` in magnitude are multiplied wide (LLM.int8(), arXiv
    2208.07339 §3.2); the rest is quantized without them.

    Columns are counted along the contraction and over all rows of the operand. ``most`` of them at most, those of
    largest magnitude: shapes do not depend on data and nothing waits for the host. What reaches the threshold beyond
    that is quantized with the rest; the monitor counts it (``excess``).
    """

    kind = "columns"
    effect = "takes columns from"
    why_no_code = "outlier columns, which lie beside the codes"
    per = "column"
    compensate = True
    residual = "exact"
    threshold: float = 6.0
    most: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.threshold < float("inf"):
            msg = f"columns: threshold must be positive and finite, got {self.threshold}"
            raise ValueError(msg)
        if not 1 <= self.most <= 4096:
            msg = f"columns: most must be an integer from 1 to 4096, got {self.most}"
            raise ValueError(msg)

    def __str__(self) -> str:
        return f"columns(threshold={self.threshold!r},most={self.most})"

    @property
    def label(self) -> str:
        return f" + up to {self.most} columns ≥ {self.threshold:g}"

    @staticmethod
    def parse(text: str) -> OutlierColumns:
        values = _parameters(text, OutlierColumns, "outlier columns", "columns(threshold=6.0,most=64)")
        try:
            if not values.get("most", "64").isdecimal():
                msg = f"most={values['most']!r} is not an integer"
                raise ValueError(msg)
            return OutlierColumns(_number(values, "threshold", 6.0), int(values.get("most", 64)))
        except ValueError as error:
            msg = f"outlier columns {text!r}: {error}"
            raise ValueError(msg) from None


def _parameters(text: str, cls: type[OutlierClamp | OutlierColumns], what: str, example: str) -> dict[str, str]:
    """The parameters between the brackets by name. Raises ``ValueError`` for a text of another form."""
    match = re.fullmatch(rf"{cls.kind}(?:\(([^()]*)\))?", text.replace(" ", ""))
    if match is None:
        msg = f"{what} {text!r} is not {example!r}"
        raise ValueError(msg)
    parts = [part.partition("=") for part in filter(None, (match[1] or "").split(","))]
    values = {key: value for key, _, value in parts}
    reject_unknown(cls.kind, values, tuple(field.name for field in fields(cls)))
    if len(values) < len(parts):
        msg = f"{what} {text!r}: a parameter is given twice"
        raise ValueError(msg)
    return values


def _number(values: Mapping[str, str], name: str, default: float) -> float:
    try:
        return float(values.get(name, default))
    except ValueError:
        msg = f"{name}={values[name]!r} is not a number"
        raise ValueError(msg) from None
