"""What the tensors of a product's operand are, and how its elements follow from them.

The text of an :class:`Encoding` travels in the nodes of ``quantized_mm``:

======================= ============================================================================================
text                    tensors
======================= ============================================================================================
``"dense"``             the operand itself
``"levels <format>"``   codes; what they stand for has no scale, which has been folded into the other operand
an operand's            codes and scales; the global scale if the scale rule has two levels; values and positions of
                        the outliers' residual if it is kept apart
======================= ============================================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from .formats import Format, get_format
from .operand import Operand
from .quantizer import Quantizer

__all__ = ["DENSE", "Encoding", "Parts"]

_DENSE, _LEVELS = "dense", "levels "


class Parts(NamedTuple):
    """The tensors of an encoded operand by name (or the nodes that stand for them); ``None`` for those it has not."""

    codes: Any
    scales: Any = None
    global_scale: Any = None
    values: Any = None
    positions: Any = None


@dataclass(frozen=True)
class Encoding:
    """Quantized as ``operand`` says, or ``levels`` of a format, or neither: dense. ``str()`` and :meth:`parse` are
    inverse.
    """

    operand: Operand | None = None
    levels: Format | None = None

    def __str__(self) -> str:
        return str(self.operand) if self.operand else f"{_LEVELS}{self.levels.name}" if self.levels else _DENSE

    @staticmethod
    @cache
    def parse(text: str) -> Encoding:
        """Raises ``ValueError`` naming the part that is not understood."""
        if text == _DENSE:
            return DENSE
        if text.startswith(_LEVELS):
            return Encoding(levels=get_format(text.removeprefix(_LEVELS)))
        return Encoding(Operand.parse(text))

    @property
    def is_dense(self) -> bool:
        return self == DENSE

    @property
    def quantizer(self) -> Quantizer | None:
        """What the scales belong to; ``None`` where there are none."""
        return self.operand.quantizer if self.operand else None

    @property
    def format(self) -> Format:
        """The grid of the codes. Raises ``ValueError`` for a dense operand."""
        fmt = self.operand.quantizer.format if self.operand else self.levels
        if fmt is None:
            msg = "a dense operand has no format; ask is_dense first"
            raise ValueError(msg)
        return fmt

    def parts(self, tensors: Sequence[Any]) -> Parts:
        """The tensors by name. Raises ``ValueError`` if they are not those of an operand that is encoded so."""
        names = ["codes"] if self.levels else ["codes", "scales"]
        if self.quantizer and self.quantizer.scale.two_level:
            names.append("global_scale")
        if self.operand and self.operand.outliers:
            names += ["values", "positions"]
        if self.is_dense or len(tensors) != len(names):
            takes = "nothing that could be taken apart" if self.is_dense else " and ".join(names)
            msg = f"operand '{self}' consists of {takes}, got {len(tensors)} tensors"
            raise ValueError(msg)
        return Parts(**dict(zip(names, tensors, strict=True)))


DENSE = Encoding()
