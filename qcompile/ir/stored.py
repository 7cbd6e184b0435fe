"""How a weight is stored: the quantizer of its elements, and of its scales if those are quantized too.

::

    nf4 block64                            a float32 scale for every 64 elements
    nf4 block64 absmax_bnb; nested         QLoRA: those scales in 8 bits, as bitsandbytes has them
    nf4 block64; nested(int8 block128)     scales as any quantizer has them
    uint4 block32; zeros                   asymmetric: a float32 number for every block is added to scale · level

Zeros put the range of the levels where the elements of a block lie: the lowest level at their minimum, the highest at
their maximum. For ``uint4``, whose levels are the codes 0 … 15, ``w = scale · code + zero`` with
``scale = (max − min) / 15`` and ``zero = min``, as HQQ and gemlite have it; GPTQ's ``w = scale · (code − zero)`` has
−zero / scale in its place. Any format can have zeros: NF4's range is centred, so its zero is (min + max) / 2.

The axis that is quantized is the one the layer contracts, always the last one of what is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from .definitions import cached_by_text
from .nested import BITSANDBYTES, NestedScales
from .quantizer import Quantizer

__all__ = ["Stored"]

_NESTED, _ZEROS = "nested", "zeros"


@dataclass(frozen=True)
class Stored:
    """What :meth:`parse` makes of a text; ``str()`` is its inverse.

    Attributes:
        quantizer: of the elements, rounded to the nearest.
        nested: of the float32 scales; ``None`` stores them as the scale rule does.
        zeros: whether every block has a float32 number that is added to scale · level.

    Raises ``ValueError`` naming the quantizer and what to write instead.
    """

    quantizer: Quantizer
    nested: NestedScales | None = None
    zeros: bool = False

    def __post_init__(self) -> None:
        q = self.quantizer
        if q.draws:
            msg = f"weights stored as {str(q)!r}: a stored weight is rounded once, to the nearest; use even"
            raise ValueError(msg)
        if self.nested and (q.scale.storage != "float32" or q.scale.two_level):
            msg = f"weights stored as {str(q)!r}: scales in {q.scale.store} are not quantized again; drop '; nested'"
            raise ValueError(msg)
        if self.zeros and q.granularity.kind not in ("block", "row"):
            msg = f"weights stored as {str(q)!r}: zeros belong to blocks of a row, for example block32, or to 'row'"
            raise ValueError(msg)
        if not self.zeros and all(grid.range[0] >= 0 for grid in q.format.choices):
            msg = f"weights stored as {str(q)!r}: {q.format.name} has no negative levels; add '; zeros'"
            raise ValueError(msg)

    def __str__(self) -> str:
        how = "" if self.nested == BITSANDBYTES else f"({self.nested})"
        parts = [str(self.quantizer), *([_NESTED + how] if self.nested else []), *([_ZEROS] if self.zeros else [])]
        return "; ".join(parts)

    def check_size(self, size: int) -> None:
        """Raises ``ValueError`` if blocks do not divide rows of ``size`` elements."""
        block = self.quantizer.granularity
        if block.kind == "block" and size % block.size:
            msg = f"K = {size} is no multiple of {block}; take a block that divides it, or 'row'"
            raise ValueError(msg)

    @staticmethod
    def parse(text: str) -> Stored:
        """Raises ``ValueError`` naming the part that is not understood, or what is no text."""
        if not isinstance(text, str):
            msg = f"weights stored as {text!r}: that is no text; for example 'nf4 block64'"
            raise ValueError(msg)
        return Stored._parsed(text)

    @staticmethod
    @cached_by_text
    def _parsed(text: str) -> Stored:
        before, separator, last = (part.strip() for part in text.rpartition(";"))
        zeros = bool(separator) and last == _ZEROS
        quantizer, separator, rest = (part.strip() for part in (before if zeros else text).partition(";"))
        if not separator:
            return Stored(Quantizer.parse(quantizer), zeros=zeros)
        if rest == _NESTED:
            return Stored(Quantizer.parse(quantizer), BITSANDBYTES, zeros)
        if not (rest.startswith(f"{_NESTED}(") and rest.endswith(")")):
            msg = (
                f"weights stored as {text!r}: {rest!r} after the quantizer is not 'nested' or 'nested(<quantizer>)', "
                "'zeros' after those"
            )
            raise ValueError(msg)
        return Stored(Quantizer.parse(quantizer), NestedScales.parse(rest[len(_NESTED) + 1 : -1]), zeros)
