"""The constants of the kernel that quantizes in blocks: what a quantizer's data says, and its printed formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import EDEN_CHUNK, Quantizer
from qcompile.kernels.formula import random, rounding, scales
from qcompile.kernels.formula.layout import why_not_rounded
from qcompile.kernels.formula.triton_target import device_function

from .grid import Constants

__all__ = ["SPAN", "BlockGrid", "block_grid_of", "why_not_in_blocks"]

#: How many neighbours along K a program has of each row: blocks divide it, and ``eden`` corrects as many at once.
SPAN = EDEN_CHUNK


@dataclass(frozen=True, eq=False)
class BlockGrid(Constants):
    """A quantizer with a scale of one byte for every block, as constants of its kernel; one of each
    (:func:`block_grid_of`), as for rows.

    Attributes:
        block: how many neighbours share a scale.
        codes_per_byte: stored codes that share a byte, 1 or 2.
        amax_floor: smallest absolute maximum that a scale is derived from.
        two_level: whether scales are parts of one of the tensor.
        by_chance, corrects: whether codes are rounded by chance; whether scales are, of ``eden``.
        formulas: digests of the formulas below.
        scale_pair, encode, decode, corrected_scale, uniform: device functions, ``(absolute maximum[, global scale]) →
            stored, γ``, ``(y[, chance]) → code``, ``(code) → level``, ``(stored, Σ y², Σ y · level, chance) → stored``
            (``None`` unless ``corrects``) and ``(index, seed) → chance``.
    """

    block: int
    codes_per_byte: int
    amax_floor: float
    two_level: bool
    by_chance: bool
    corrects: bool
    formulas: tuple[str, ...]
    scale_pair: Any = field(repr=False)
    encode: Any = field(repr=False)
    decode: Any = field(repr=False)
    uniform: Any = field(repr=False)
    corrected_scale: Any = field(repr=False, default=None)


@cache
def why_not_in_blocks(q: Quantizer) -> str:
    """Why the kernel does not quantize by ``q``; empty if it does."""
    fmt = q.format
    if q.granularity.kind != "block" or SPAN % q.granularity.size:
        return f"{q.granularity} scales, not those of blocks that divide {SPAN}"
    if storage_dtype(q).itemsize != 1 or q.scale.statistic != "amax":
        return f"{q.scale.name} scales, which are no absolute maxima in one byte"
    if len(q.candidates) > 1:
        return f"{q.scale.name} scales of {fmt.name}, which are chosen among candidates"
    if not fmt.has_zero or fmt.zero_code or fmt.codes_per_byte > 2:
        return f"{fmt.name}, whose code 0 is not the level 0, or of which more than two share a byte"
    return rounding.why_not_by_chance(fmt) if q.rounding == "stochastic" else why_not_rounded(fmt)


@cache
def block_grid_of(quantizer: str) -> BlockGrid:
    """The constants of a quantizer. Raises ``ValueError`` where :func:`why_not_in_blocks` has a reason."""
    q = Quantizer.parse(quantizer)
    if reason := why_not_in_blocks(q):
        msg = f"{q}: no kernel in blocks for {reason}"
        raise ValueError(msg)
    fmt, corrects = q.format, q.rounding == "eden"
    formulas = [
        scales.scale_and_reciprocal(q),
        rounding.encode(fmt, q.of_codes),
        rounding.decode(fmt),
        random.uniform(),
        *([scales.corrected_scale(q)] if corrects else []),
    ]
    return BlockGrid(
        block=q.granularity.size,
        codes_per_byte=fmt.codes_per_byte,
        amax_floor=q.amax_floor,
        two_level=q.scale.two_level,
        by_chance=q.rounding == "stochastic",
        corrects=corrects,
        formulas=tuple(formula.digest for formula in formulas),
        **{formula.name: device_function(formula) for formula in formulas},
    )
