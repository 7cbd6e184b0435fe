"""The constants of the kernel that quantizes in blocks: what a quantizer's data says, and its printed formulas."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import EDEN_CHUNK, Candidate, Quantizer
from qcompile.kernels.formula import random, rounding, scales
from qcompile.kernels.formula.expression import Formula
from qcompile.kernels.formula.layout import why_not_rounded
from qcompile.kernels.formula.triton_target import device_function

from .grid import Constants

__all__ = ["ROWS", "SPAN", "BlockGrid", "block_grid_of", "in_place_of_loops", "why_not_in_blocks"]

#: How many neighbours along K a program has of each row: blocks divide it, and ``eden`` corrects as many at once.
SPAN = EDEN_CHUNK
#: How many rows a program has: squares divide it, and where rows are neighbours in memory, 64 of 16 bits are a line.
ROWS = 64


@dataclass(frozen=True, eq=False)
class Choice:
    """What a block may take, as device functions.

    Attributes:
        scale: ``(absolute maximum[, global scale]) → stored, γ, scale``.
        round_level: ``(y) → level``, the nearest one.
    """

    scale: Any
    round_level: Any


@dataclass(frozen=True, eq=False)
class BlockGrid(Constants):
    """A quantizer with a scale of one byte for every block or square, as constants of its kernel; one of each
    (:func:`block_grid_of`), as for rows.

    Attributes:
        block: how many neighbours along K share a scale.
        height: and of how many rows: 1, or ``block`` in squares.
        codes_per_byte: stored codes that share a byte, 1 or 2.
        amax_floor: smallest absolute maximum that a scale is derived from.
        two_level: whether scales are parts of one of the tensor.
        candidates: how many scales and grids a block chooses among.
        squared: whether by squared errors, not absolute ones.
        paired: whether the format is a pair of grids, and the sign of γ says which one a block has.
        by_chance, corrects: whether codes are rounded by chance; whether scales are, of ``eden``.
        formulas: digests of the formulas below.
        choices: the candidates.
        encode, decode, corrected_scale, uniform: device functions, ``(y[, marked][, chance]) → code``, ``(code) →
            level`` and ``(stored, Σ y², Σ y · level, chance) → stored`` (``None`` unless ``corrects``) and ``(index,
            seed) → chance``.
        error_unit, scaled_error: ``(absolute maximum) → unit`` and ``(x, level, scale, unit) → error``, what candidates
            are compared by.
    """

    block: int
    height: int
    codes_per_byte: int
    amax_floor: float
    two_level: bool
    candidates: int
    squared: bool
    paired: bool
    by_chance: bool
    corrects: bool
    formulas: tuple[str, ...]
    choices: tuple[Choice, ...] = field(repr=False)
    encode: Any = field(repr=False)
    uniform: Any = field(repr=False)
    error_unit: Any = field(repr=False)
    scaled_error: Any = field(repr=False)
    decode: Any = field(repr=False, default=None)
    corrected_scale: Any = field(repr=False, default=None)


@cache
def why_not_in_blocks(q: Quantizer) -> str:
    """Why the kernel does not quantize by ``q``; empty if it does."""
    fmt, (kind, size) = q.format, (q.granularity.kind, q.granularity.size)
    if kind not in ("block", "square") or SPAN % size or (kind == "square" and ROWS % size):
        return f"{q.granularity} scales, not those of blocks that divide {SPAN} or of squares that divide {ROWS}"
    if storage_dtype(q).itemsize != 1 or q.scale.statistic != "amax":
        return f"{q.scale.name} scales, which are no absolute maxima in one byte"
    if not fmt.has_zero or fmt.zero_code or fmt.codes_per_byte > 2:
        return f"{fmt.name}, whose code 0 is not the level 0, or of which more than two share a byte"
    return rounding.why_not_by_chance(fmt) if q.rounding == "stochastic" else why_not_rounded(fmt)


def in_place_of_loops(q: Quantizer, dtype: torch.dtype, in_memory: bool) -> bool:
    """Whether generated code calls the kernel for x of ``dtype``, and no loops are printed that fuse with what makes x.

    It reads x once, where loops do up to six times, and a site's take longer to print and compile than all else of it.
    Under a scale of the tensor whatever x is lies in memory then: its absolute maximum takes a pass of its own, behind
    which loops would compute x again.
    """
    return not why_not_in_blocks(q) and dtype != torch.float64 and (q.scale.two_level or in_memory)


@cache
def block_grid_of(quantizer: str) -> BlockGrid:
    """The constants of a quantizer. Raises ``ValueError`` where :func:`why_not_in_blocks` has a reason."""
    q = Quantizer.parse(quantizer)
    if reason := why_not_in_blocks(q):
        msg = f"{q}: no kernel in blocks for {reason}"
        raise ValueError(msg)
    fmt, corrects = q.format, q.rounding == "eden"
    of_elements = [rounding.encode(fmt, q.of_codes), random.uniform(), scales.error_unit(), scales.scaled_error()]
    if corrects:
        of_elements += [rounding.decode(fmt), scales.corrected_scale(q)]
    of_choices = [_formulas_of(q, number, candidate) for number, candidate in enumerate(q.candidates)]
    return BlockGrid(
        block=q.granularity.size,
        height=q.granularity.size if q.granularity.kind == "square" else 1,
        codes_per_byte=fmt.codes_per_byte,
        amax_floor=q.amax_floor,
        two_level=q.scale.two_level,
        candidates=len(q.candidates),
        squared=q.scale.error == "squared",
        paired=bool(fmt.grids),
        by_chance=q.rounding == "stochastic",
        corrects=corrects,
        formulas=tuple(formula.digest for formula in (*of_elements, *sum(of_choices, ()))),
        choices=tuple(Choice(*map(device_function, formulas)) for formulas in of_choices),
        **{formula.name: device_function(formula) for formula in of_elements},
    )


def _formulas_of(q: Quantizer, number: int, candidate: Candidate) -> tuple[Formula, Formula]:
    return scales.candidate(q, number), rounding.round_level(candidate.grid, q.nearest)
