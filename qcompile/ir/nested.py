"""Scales that are quantized themselves: QLoRA's double quantization, bitsandbytes' ``compress_statistics``.

The float32 scales of a quantizer, one for every block, are quantized in their turn: all scales of a tensor in row-major
order are one row, from which their mean may be taken off first. With blocks of 64 elements and 256 scales, a scale
costs 0.127 bits per element instead of 0.5 (arXiv 2305.14314 §3).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .quantizer import Quantizer

__all__ = ["BITSANDBYTES", "BITSANDBYTES_FORMATS", "NestedScales"]


@dataclass(frozen=True)
class NestedScales:
    """How scales are quantized. ``str()`` and :meth:`parse` are inverse: ``"dynamic8 block256 absmax_bnb even; mean"``.

    Attributes:
        quantizer: of the scales; blocks with one level of scales, nearest rounding.
        mean: whether the mean of the scales, float32, is taken off before and added after.

    Raises ``ValueError`` for another quantizer.
    """

    quantizer: Quantizer
    mean: bool = True

    def __post_init__(self) -> None:
        q = self.quantizer
        if q.granularity.kind != "block" or q.scale.two_level:
            msg = f"nested scales {q}: scales are one row with scales of their own by blocks; use block<n> and absmax"
            raise ValueError(msg)
        if q.draws:
            msg = f"nested scales {q}: scales are rounded to the nearest; use even or half_up"
            raise ValueError(msg)

    def __str__(self) -> str:
        return f"{self.quantizer}; mean" if self.mean else str(self.quantizer)

    @staticmethod
    @cache
    def parse(text: str) -> NestedScales:
        """Raises ``ValueError`` naming the part that is not understood."""
        quantizer, separator, rest = text.partition(";")
        if separator and rest.strip() != "mean":
            msg = f"nested scales {text!r}: {rest.strip()!r} after the quantizer; there may be 'mean'"
            raise ValueError(msg)
        return NestedScales(Quantizer.parse(quantizer), bool(separator))


#: What bitsandbytes does with the absolute maxima of blocks under ``compress_statistics=True``.
BITSANDBYTES = NestedScales(Quantizer.parse("dynamic8 block256 absmax_bnb"))
#: bitsandbytes' ``quant_type`` → our format.
BITSANDBYTES_FORMATS = {"nf4": "nf4", "fp4": "fp4bnb"}
