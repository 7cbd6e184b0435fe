"""Transforms: what happens to an operand, along its quantization axis, before it is rounded.

* ``hadamard(n)``: blocks of n neighbours are rotated by the orthonormal Hadamard matrix H of that size, Sylvester's
  order. It spreads outliers over their block, so that a row looks normal; and since H = Hᵀ = H⁻¹, a product of two
  operands that are rotated alike needs no rotation back. n is a power of two up to :data:`LARGEST_ROTATION`; where it
  does not divide the axis, the largest power of two that does takes its place (an odd axis is not rotated).
  ``hadamard(n,signs=fixed)`` flips signs first, those of TransformerEngine, repeated: D·H in place of H.
  ``signs=drawn`` draws them on the device at every call, once for both operands of a product. For operands of the
  backward, which nothing rotates back.
* ``sparse(4:8)``: of four aligned pairs of neighbours, the two with the larger Euclidean norms are kept; INT4 sparse
  tensor cores want pairs. ``sparse(2:4)``: of four neighbours the two of larger magnitude. Ties go to the lower index.
  Chosen anew at every step, from the rotated values. The others become 0.

arXiv 2502.05003 (QuEST) §3.1 and §4.3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

__all__ = ["FIXED_SIGNS", "LARGEST_ROTATION", "SIGNS", "SPARSITIES", "Sparsity", "Transform"]

LARGEST_ROTATION = 1024

#: +1 where a bit is not set, −1 where it is, the lowest bit first: + + + − + − − − − − − + − + − −.
FIXED_SIGNS = 0b1101_0111_1110_1000

#: What ``signs=`` takes.
SIGNS = ("fixed", "drawn")


@dataclass(frozen=True)
class Sparsity:
    """Of ``units`` aligned units of ``width`` neighbours, ``kept`` are kept."""

    width: int
    units: int
    kept: int

    @property
    def group(self) -> int:
        """Neighbours that compete."""
        return self.width * self.units


SPARSITIES = {"2:4": Sparsity(width=1, units=4, kept=2), "4:8": Sparsity(width=2, units=4, kept=2)}


@dataclass(frozen=True)
class Transform:
    """A rotation (1: none), the signs in front of it ("": none) and a sparsity pattern ("": none); ``str()`` and
    :meth:`parse` are inverse.
    """

    rotation: int = 1
    sparsity: str = ""
    signs: str = ""

    def __post_init__(self) -> None:
        n = self.rotation
        if not (1 <= n <= LARGEST_ROTATION and n & (n - 1) == 0):
            msg = f"hadamard({n}): the size must be a power of two from 1 to {LARGEST_ROTATION}"
            raise ValueError(msg)
        if self.signs and (n == 1 or self.signs not in SIGNS):
            msg = f"hadamard({n},signs={self.signs}): signs are those of a rotation, {' or '.join(SIGNS)}"
            raise ValueError(msg)
        if self.sparsity and self.sparsity not in SPARSITIES:
            msg = f"sparse({self.sparsity}): known patterns: {', '.join(SPARSITIES)}"
            raise ValueError(msg)

    def __bool__(self) -> bool:
        return self != Transform()

    def __str__(self) -> str:
        signs = f",signs={self.signs}" if self.signs else ""
        rotation = [f"hadamard({self.rotation}{signs})"] if self.rotation > 1 else []
        return "; ".join([*rotation, *([f"sparse({self.sparsity})"] if self.sparsity else [])])

    def on(self, size: int) -> Transform:
        """The transform of an axis of ``size`` elements, which may be symbolic: with a rotation that divides it."""
        rotation = self.rotation
        while rotation > 1 and size % rotation:
            rotation //= 2
        return replace(self, rotation=rotation, signs=self.signs if rotation > 1 else "")

    @staticmethod
    @cache
    def parse(text: str) -> Transform:
        """Raises ``ValueError`` naming the part that is not understood."""
        transform = Transform()
        for part in filter(None, (part.strip() for part in text.split(";"))):
            if match := re.fullmatch(r"hadamard\((\d+)(?:, *signs=(\w+))?\)", part):
                transform = replace(transform, rotation=int(match[1]), signs=match[2] or "")
            elif match := re.fullmatch(r"sparse\(([^()]*)\)", part):
                transform = replace(transform, sparsity=match[1])
            else:
                sparse = "), sparse(".join(SPARSITIES)
                msg = f"unknown transform {part!r}; known: hadamard(<size>[,signs=fixed|drawn]), sparse({sparse})"
                raise ValueError(msg)
        return transform
