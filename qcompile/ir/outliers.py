"""Outlier clamping and compensation: what an operand does with the few elements that would set its scale."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .options import reject_unknown

__all__ = ["OutlierClamp"]


@dataclass(frozen=True)
class OutlierClamp:
    """Outlier clamping and compensation (OCC), arXiv 2501.17116 §3.2.

    ``x = clamped + residual``, exactly for 16-bit x and to one rounding for float32, with ``clamped`` inside the
    (1 − α, α) quantiles. ``per="row"`` takes the quantiles of each token (the released code), ``per="tensor"`` those of
    the whole tensor. Without ``compensate`` the residual is dropped (the released wiring).

    ``residual="exact"`` keeps the residual apart, in high precision. ``residual="e4m3"`` adds it to the code of the
    clamped element, rounded to E4M3 (relative error ≤ 2⁻⁴; the levels in between stay what they are): one product
    on 8-bit tensor cores then serves both. It saturates at 448/max times the clamped row's absolute maximum.
    """

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

    @staticmethod
    def parse(text: str) -> OutlierClamp:
        match = re.fullmatch(r"occ(?:\(([^()]*)\))?", text.replace(" ", ""))
        if match is None:
            msg = f"outlier clamp {text!r} is not 'occ(alpha=0.99,per=row,compensate=1)'"
            raise ValueError(msg)
        parts = [part.partition("=") for part in filter(None, (match[1] or "").split(","))]
        values = {key: value for key, _, value in parts}
        reject_unknown("occ", values, ("alpha", "per", "compensate", "residual"))
        try:
            if len(values) < len(parts):
                msg = "a parameter is given twice"
                raise ValueError(msg)
            if not _is_number(values.get("alpha", "0.99")):
                msg = f"alpha={values['alpha']!r} is not a number"
                raise ValueError(msg)
            if values.get("compensate", "1") not in ("0", "1"):
                msg = f"compensate must be 0 or 1, got {values['compensate']!r}"
                raise ValueError(msg)
            return OutlierClamp(
                alpha=float(values.get("alpha", 0.99)),
                per=values.get("per", "row"),
                compensate=values.get("compensate", "1") == "1",
                residual=values.get("residual", "exact"),
            )
        except ValueError as error:
            msg = f"outlier clamp {text!r}: {error}"
            raise ValueError(msg) from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
