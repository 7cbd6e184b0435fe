"""Products with stored weights in Triton: 4-bit codes, two in a byte, are decoded where they are multiplied.

============== ================================================ ====================================================
kernel         computes                                         for
============== ================================================ ====================================================
``fragments``  x · Wᵀ on tensor cores, 16-bit x                 up to 64 rows of x (:mod:`.stored_fragments`)
``gemv``       x · Wᵀ on CUDA cores, float32                    few rows of float32; any floating-point dtype
``tile``       x · Wᵀ on tensor cores                           up to where decoding once and cuBLAS is faster
``tile_rows``  x · W on tensor cores (dX of dY), from the same  likewise
               codes: no transposed copy
``decode``     W                                                decode + cuBLAS, beyond that (:mod:`.costs`)
============== ================================================ ====================================================

``fragments`` rounds levels to x's dtype and multiplies the scale by the float32 sum of a block. ``gemv`` multiplies
float32 levels, and likewise the scale by the sum of a block, so it rounds no weight. ``tile`` and ``tile_rows`` round
level · scale to x's dtype, which is bit for bit what ``decode`` and the reference make of it. All sum in float32. Where
the contraction is split over programs, each writes its own sum and ``add_splits`` adds them in order: no atomics, so
the same call gives the same bits.

**Levels** come from a table in the registers of a warp, one entry per lane and one shuffle per code, or from the
format's formula (:attr:`Config.table`); on an H200 the table is faster. ``tile`` takes 6 instructions per code as
compiled, and what moves decoded elements to shared memory.

**Scales of scales** are decoded here, not in front of the kernel. Of ``nf4 block64; nested`` a code of a scale is 1/64
byte per element; as float32 numbers that another kernel makes they are 4/64, which are written and read: 0.14 bytes per
element beside the 0.5 of the codes, 27 % more traffic, and one more launch of 2 to 3 µs where the product of a
4096 × 4096 weight takes 4 µs. In the kernel the level of a scale's code is one load from a table of 1 KiB, in L1, for
every 32 elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qcompile.ir.nested import NestedScales
from qcompile.ir.stored import Stored
from qcompile.kernels.formula import rounding, scales
from qcompile.kernels.formula.layout import MOST_MIDPOINTS
from qcompile.kernels.formula.triton_target import device_function
from qcompile.kernels.lasting import lasting
from qcompile.kernels.quantize.grid import Constants
from qcompile.kernels.quantize.triton_codes import WARP, eighths
from qcompile.kernels.replay import note_constant
from qcompile.kernels.triton import INTERPRETED, launch, processors

from . import costs
from .stored_fragments import MMA, MMA_COLUMNS, MMA_ROWS, STEP_WORDS, UNIT, fragments, scales_of_thread
from .stored_scales import load_scales, scales_of

__all__ = ["CONFIGS", "Config", "config_for", "decode", "mm_stored", "obstacle"]

#: Codes in a word of 32 bits.
CODES = tl.constexpr(8)
_WORD_BYTES = 4
#: Words that a thread loads at once, 16 bytes.
RUN = 4


# --- how a weight is stored, as constants of the kernels -------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weight(Constants):
    """A :class:`~qcompile.ir.stored.Stored` as constants of the kernels. There is one of each (:func:`weight_of`), told
    apart by identity.

    Attributes:
        text: of the :class:`Stored`.
        block: elements of a row that share a scale; 0 if all do.
        by_row: whether rows have scales of their own.
        run: words whose products are summed before the scale is applied.
        two_level: whether ``second`` is one scale of all scales.
        nested: how many scales share a scale, ``second``; 0 if they are none themselves.
        in_book: whether the levels of nested scales come from a table in memory; else from their formula.
        formulas: digests of the device functions.
        level: ``(code) → level``.
        load: ``(stored scale[, global scale]) → scale``.
        scale_level, load_second: the same of nested scales.
    """

    text: str
    block: int
    by_row: bool
    run: int
    two_level: bool
    nested: int
    in_book: bool
    formulas: tuple[str, ...]
    level: Any = field(repr=False)
    load: Any = field(repr=False)
    scale_level: Any = field(repr=False, default=None)
    load_second: Any = field(repr=False, default=None)


def obstacle(stored: Stored, size: int, dtype: torch.dtype) -> str:
    """Why no kernel here multiplies ``dtype`` with a weight stored so, rows of ``size``; empty if one does."""
    q = stored.quantizer
    fmt, block = q.format, q.granularity
    nested = stored.nested.quantizer if stored.nested else None
    checks = {
        f"{fmt.name} has {fmt.codes_per_byte} codes per byte, not 2": fmt.codes_per_byte == 2,
        f"which grid of {fmt.name} a code is of, its block's scale says": not fmt.grids,
        f"scales of {block} are not those of rows or blocks of a row": block.kind != "square",
        f"blocks of {block.size} are no multiple of 16": block.kind != "block" or block.size % 16 == 0,
        f"K = {size} is no multiple of 8": size % CODES.value == 0,
        f"no kernel reads {str(dtype).removeprefix('torch.')}": dtype in (torch.bfloat16, torch.float16, torch.float32),
        "scales of scales have several codes per byte": nested is None or nested.format.codes_per_byte == 1,
        "scales of scales are a pair of grids": nested is None or not nested.format.grids,
    }
    return next((reason for reason, passed in checks.items() if not passed), "")


@cache
def weight_of(text: str) -> Weight:
    """The constants of a weight stored as ``text``."""
    stored = Stored.parse(text)
    q, block = stored.quantizer, stored.quantizer.granularity
    formulas = {"level": rounding.decode(q.format), "load": scales.load_scale(q)}
    nested, in_book = stored.nested, False
    if nested is not None:
        in_book = _in_book(nested)
        formulas["load_second"] = scales.load_scale(nested.quantizer)
        if not in_book:
            formulas["scale_level"] = rounding.decode(nested.quantizer.format)
    size = block.size if block.kind == "block" else 0
    return Weight(
        text=str(stored),
        block=size,
        by_row=block.kind != "tensor",
        run=RUN if size % (RUN * CODES.value) == 0 else RUN // 2,
        two_level=q.scale.two_level,
        nested=nested.quantizer.granularity.size if nested else 0,
        in_book=in_book,
        formulas=tuple(formula.digest for formula in formulas.values()),
        **{name: device_function(formula) for name, formula in formulas.items()},
    )


def _in_book(nested: NestedScales) -> bool:
    """Whether a formula would compare codes with many levels."""
    return len(nested.quantizer.format.codebook) > MOST_MIDPOINTS + 1


@cache
def _book(text: str, device: torch.device) -> Tensor:
    """The levels of the codes of nested scales, float32."""
    nested = Stored.parse(text).nested
    assert nested is not None
    levels = nested.quantizer.format.levels
    return lasting(lambda: torch.tensor(levels, dtype=torch.float32, device=device))


@cache
def _pairs(text: str, dtype: torch.dtype, high_first: bool, device: torch.device) -> Tensor:
    """Two levels in ``dtype`` for every byte, the first element's in the low half of an int32."""
    levels = Stored.parse(text).quantizer.format.levels

    def made() -> Tensor:
        codes = torch.arange(256).view(-1, 1) >> torch.tensor([4, 0] if high_first else [0, 4])
        return torch.tensor(levels).to(dtype)[codes & 15].view(torch.int32).flatten().to(device)

    return lasting(made)


# --- from codes to levels --------------------------------------------------------------------------------------------


@triton.jit
def _lane_level(fmt: tl.constexpr, table: tl.constexpr):
    """The level that this thread's lane holds, that of the code in the lane's low bits; unused without a table."""
    if INTERPRETED or not table:
        level = 0.0
    else:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
        level = fmt.level(lane & 15)
    return level


@triton.jit
def _level(words, at: tl.constexpr, held, fmt: tl.constexpr, table: tl.constexpr):
    """Float32 level of the code from bit ``at`` of every word."""
    if INTERPRETED or not table:
        level = fmt.level((words >> at) & 15)
    else:  # of the lane, the shuffle reads five bits: the code, and one that does not matter
        level = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [held, words >> at],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return level


@triton.jit
def _levels(words, held, fmt: tl.constexpr, table: tl.constexpr, high_first: tl.constexpr):
    """The levels of a word's eight codes, in the order of elements."""
    swap: tl.constexpr = 4 if high_first else 0
    levels = ()
    for place in tl.static_range(CODES):
        levels += (_level(words, (4 * place) ^ swap, held, fmt, table),)  # type: ignore[assignment]
    return levels


@triton.jit
def _scales(stored, second, offset, book, rows, n, unit, units, per_row, fmt: tl.constexpr, span: tl.constexpr):
    """Float32 scales ``[rows, units]`` of runs of ``span`` elements, from run ``unit`` of a row on; 0 outside."""
    if fmt.block == 0:
        at = rows if fmt.by_row else rows * 0
        at = at[:, None]
        inside = (rows < n)[:, None]
    else:
        column = (unit + tl.arange(0, units)) * span // fmt.block
        at = rows.to(tl.int64)[:, None] * per_row + column[None, :]
        inside = (rows < n)[:, None] & (column < per_row)[None, :]
    loaded, shared = load_scales(stored, second, tl.where(inside, at, 0), fmt)
    scale = scales_of(loaded, shared, offset, book, fmt)
    return tl.where(inside, scale, 0.0)


@triton.jit
def _words(codes, rows, n, word, row_words, wanted, block_w: tl.constexpr):
    """Words ``[rows, block_w]`` of codes from word ``word`` of a row on; 0 outside, or if not ``wanted``."""
    columns = word + tl.arange(0, block_w)
    inside = (rows < n)[:, None] & (columns < row_words)[None, :] & wanted
    at = codes + rows.to(tl.int64)[:, None] * row_words + columns[None, :]
    return tl.load(at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _weights(words, scale, held, dtype: tl.constexpr, fmt: tl.constexpr, table: tl.constexpr, high_first: tl.constexpr):
    """Decoded elements ``[rows, 8 · words]`` in ``dtype``: level · scale, rounded in float32 and then in ``dtype``.

    ``scale``: ``[rows, runs]``, or one for a row.
    """
    rows: tl.constexpr = words.shape[0]
    width: tl.constexpr = words.shape[1]
    runs: tl.constexpr = scale.shape[1]
    by_word = tl.reshape(tl.broadcast_to(scale[:, :, None], [rows, runs, width // runs]), [rows, width])
    l0, l1, l2, l3, l4, l5, l6, l7 = _levels(words, held, fmt, table, high_first)
    # Of two joined ones the last axis tells which: bits of an element's place, the lowest one joined last.
    low = tl.join(_pair(l0, l4, by_word, dtype), _pair(l2, l6, by_word, dtype))
    high = tl.join(_pair(l1, l5, by_word, dtype), _pair(l3, l7, by_word, dtype))
    return tl.reshape(tl.join(low, high), [rows, CODES * width])


@triton.jit
def _pair(first, second, scale, dtype: tl.constexpr):
    return tl.join((first * scale).to(dtype), (second * scale).to(dtype))


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def gemv(
    x,
    codes,
    scales,
    second,
    offset,
    book,
    bias,
    out,
    n,
    row_words,
    per_row,
    steps,
    m: tl.constexpr,
    fmt: tl.constexpr,
    table: tl.constexpr,
    high_first: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
):
    """``out[split, m, n] = x[m, K] · W[n, K]ᵀ`` over the ``steps`` · ``block_w`` words of a split; ``block_n`` columns
    per program.
    """
    held = _lane_level(fmt, table)
    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    split = tl.program_id(1)
    units: tl.constexpr = block_w // fmt.run
    word = split * steps * block_w
    words = _words(codes, rows, n, word, row_words, True, block_w)
    sums = ()
    for _ in tl.static_range(m):
        sums += (tl.zeros([block_n, units], tl.float32),)  # type: ignore[assignment]
    for step in range(steps):
        following = _words(codes, rows, n, word + block_w, row_words, step + 1 < steps, block_w)
        levels = _levels(words, held, fmt, table, high_first)
        scale = _scales(scales, second, offset, book, rows, n, word // fmt.run, units, per_row, fmt, fmt.run * CODES)
        columns = word * CODES + tl.arange(0, block_w * CODES)
        added = ()
        for row in tl.static_range(m):
            at = row * row_words * CODES + columns
            values = tl.load(x + at, mask=columns < row_words * CODES, other=0.0).to(tl.float32)
            parts = eighths(values[None, :], 1)
            total = levels[0] * parts[0]
            for place in tl.static_range(1, CODES):
                total = tl.fma(levels[place], tl.broadcast_to(parts[place], [block_n, block_w]), total)
            of_runs = tl.sum(tl.reshape(total, [block_n, units, fmt.run]), 2)
            scales_of = tl.broadcast_to(scale, [block_n, units])
            added += (tl.fma(of_runs, scales_of, sums[row]),)  # type: ignore[assignment]
        sums = added
        words = following
        word += block_w
    for row in tl.static_range(m):
        total = tl.sum(sums[row], 1)
        if bias is not None:
            total += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
        at = (split * m + row) * n + rows
        tl.store(out + at, total.to(out.dtype.element_ty), mask=rows < n)


@triton.jit
def tile(
    x,
    codes,
    scales,
    second,
    offset,
    book,
    bias,
    out,
    m,
    n,
    row_words,
    per_row,
    steps,
    fmt: tl.constexpr,
    table: tl.constexpr,
    high_first: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
):
    """The same on tensor cores, a tile of ``block_m`` × ``block_n`` per program.

    W is the left operand, whose tiles are 64 rows on Hopper, so that few rows of x waste nothing.
    """
    held = _lane_level(fmt, table)
    # Tiles that share codes run side by side.
    tiles_m = tl.cdiv(m, block_m)
    rows = tl.program_id(0) // tiles_m * block_n + tl.arange(0, block_n)
    lines = tl.program_id(0) % tiles_m * block_m + tl.arange(0, block_m)
    split = tl.program_id(1)
    units: tl.constexpr = block_w // fmt.run
    word = split * steps * block_w
    product = tl.zeros([block_n, block_m], tl.float32)
    for _ in range(steps):
        words = _words(codes, rows, n, word, row_words, True, block_w)
        scale = _scales(scales, second, offset, book, rows, n, word // fmt.run, units, per_row, fmt, fmt.run * CODES)
        columns = word * CODES + tl.arange(0, block_w * CODES)
        inside = (lines < m)[:, None] & (columns < row_words * CODES)[None, :]
        at = lines.to(tl.int64)[:, None] * (row_words * CODES) + columns[None, :]
        left = _weights(words, scale, held, x.dtype.element_ty, fmt, table, high_first)
        product = tl.dot(left, tl.load(x + at, mask=inside, other=0.0).T, product)
        word += block_w
    if bias is not None:
        product += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    at = out + (split * m + lines).to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(at, product.to(out.dtype.element_ty), mask=(rows < n)[:, None] & (lines < m)[None, :])


@triton.jit
def tile_rows(
    x,
    codes,
    scales,
    second,
    offset,
    book,
    bias,
    out,
    m,
    n,
    row_words,
    per_row,
    steps,
    fmt: tl.constexpr,
    table: tl.constexpr,
    high_first: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
):
    """``out[split, m, K] = x[m, n] · W[n, K]``: ``block_w`` words of the columns per program, over ``steps`` ·
    ``block_n`` rows of W.
    """
    held = _lane_level(fmt, table)
    tiles_m = tl.cdiv(m, block_m)
    word = tl.program_id(0) // tiles_m * block_w
    lines = tl.program_id(0) % tiles_m * block_m + tl.arange(0, block_m)
    split = tl.program_id(1)
    units: tl.constexpr = block_w // fmt.run
    product = tl.zeros([block_m, block_w * CODES], tl.float32)
    first = split * steps * block_n
    for _ in range(steps):
        rows = first + tl.arange(0, block_n)
        words = _words(codes, rows, n, word, row_words, True, block_w)
        scale = _scales(scales, second, offset, book, rows, n, word // fmt.run, units, per_row, fmt, fmt.run * CODES)
        at = lines.to(tl.int64)[:, None] * n + rows[None, :]
        left = tl.load(x + at, mask=(lines < m)[:, None] & (rows < n)[None, :], other=0.0)
        right = _weights(words, scale, held, x.dtype.element_ty, fmt, table, high_first)
        product = tl.dot(left, right, product)
        first += block_n
    columns = word * CODES + tl.arange(0, block_w * CODES)
    inside = columns < row_words * CODES
    if bias is not None:
        product += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = out + (split * m + lines).to(tl.int64)[:, None] * (row_words * CODES) + columns[None, :]
    tl.store(at, product.to(out.dtype.element_ty), mask=(lines < m)[:, None] & inside[None, :])


@triton.jit
def decode_rows(
    codes,
    scales,
    second,
    offset,
    book,
    out,
    n,
    row_words,
    per_row,
    fmt: tl.constexpr,
    table: tl.constexpr,
    high_first: tl.constexpr,
    block_n: tl.constexpr,
    block_w: tl.constexpr,
):
    """``out[n, K]``: W."""
    held = _lane_level(fmt, table)
    rows = tl.program_id(0) * block_n + tl.arange(0, block_n)
    word = tl.program_id(1) * block_w
    units: tl.constexpr = block_w // fmt.run
    words = _words(codes, rows, n, word, row_words, True, block_w)
    scale = _scales(scales, second, offset, book, rows, n, word // fmt.run, units, per_row, fmt, fmt.run * CODES)
    elements = _weights(words, scale, held, out.dtype.element_ty, fmt, table, high_first)
    columns = word * CODES + tl.arange(0, block_w * CODES)
    at = out + rows.to(tl.int64)[:, None] * (row_words * CODES) + columns[None, :]
    tl.store(at, elements, mask=(rows < n)[:, None] & (columns < row_words * CODES)[None, :])


@triton.jit
def add_splits(partial, bias, out, count, columns, splits: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    """``out[i] = Σ partial[split, i] + bias``, the splits in order."""
    if early:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.zeros([block], tl.float32)
    for split in tl.static_range(splits):
        total += tl.load(partial + split * count + at, mask=at < count, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % columns, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < count)


# --- how they are cut up ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """How a product is cut up; ``benchmarks/stored_linears.py --sweep`` tries others.

    Attributes:
        kernel: ``fragments``, ``gemv``, ``tile`` or ``tile_rows``.
        most_m: the most rows of x that it is for; 0 if any.
        block_n: rows of W per program, or, of ``tile_rows``, per step.
        block_w: words of W's rows per step, or, of ``tile_rows``, per program; 8 codes each.
        block_m: rows of x per program; ``gemv`` takes all.
        warps, stages: warps of a program, and steps whose operands it has on their way. In ``fragments``, ``block_w``
            / 16 warps share rows of W and take turns along them, the others have rows of their own.
        programs: how many a processor should get; where tiles are fewer, the contraction is split.
        table: whether levels are looked up in the registers of a warp; else they are computed.
        early: whether ``fragments`` begins, with its table, before the kernel in front of it has ended, on Hopper.
    """

    kernel: str
    most_m: int
    block_n: int
    block_w: int
    block_m: int = 1
    warps: int = 4
    stages: int = 1
    programs: int = 4
    table: bool = True
    early: bool = True

    def __str__(self) -> str:
        extents = f"{self.block_m}x{self.block_n}x{CODES.value * self.block_w}"
        how = ("table" if self.table else "formula") + " early" * (self.early and self.kernel == "fragments")
        return f"{self.kernel} {extents} w{self.warps} s{self.stages} p{self.programs} {how}"


#: Of products that contract rows of W, x · Wᵀ, and of those that contract its columns, x · W; by M. Those of
#: ``fragments`` for 1 and 16 rows were the fastest of five on an H200, that for 64 of about 100, for
#: ``nf4 block64; nested`` and N = K = 8192. More rows of x want many rows of W per program, which read x once, and K is
#: split for enough programs. Others were not measured.
CONFIGS = {
    False: (
        Config("fragments", 1, block_n=32, block_w=64, block_m=1, warps=8, stages=4, programs=2),
        Config("fragments", 2, block_n=64, block_w=64, block_m=2, warps=16, stages=2, programs=1),
        Config("fragments", 4, block_n=64, block_w=64, block_m=4, warps=16, stages=2, programs=1),
        Config("fragments", 8, block_n=64, block_w=64, block_m=8, warps=16, stages=2, programs=1),
        Config("fragments", 16, block_n=256, block_w=16, block_m=16, warps=8, stages=2, programs=1, early=False),
        Config("fragments", 32, block_n=256, block_w=16, block_m=32, warps=8, stages=1, programs=1, early=False),
        Config("fragments", 64, block_n=256, block_w=16, block_m=64, warps=8, stages=1, programs=1, early=False),
        Config("tile", 0, block_n=128, block_w=8, block_m=128, warps=8, stages=3, programs=1),
    ),
    True: (
        Config("tile_rows", 16, block_n=64, block_w=16, block_m=16, stages=3, programs=2),
        Config("tile_rows", 64, block_n=64, block_w=16, block_m=64, stages=3, programs=2),
        Config("tile_rows", 0, block_n=64, block_w=16, block_m=128, warps=8, stages=3, programs=1),
    ),
}
#: The most rows of x that CUDA cores multiply: float32 ones, which no tensor core takes.
MOST_ROWS = 8
_WIDE_ROWS = Config("gemv", MOST_ROWS, block_n=2, block_w=256, programs=8)
_DECODE = Config("decode_rows", 0, block_n=8, block_w=64)
_ADD_BLOCK = 1024
#: Scales of a row of W that a thread of ``fragments`` has registers for.
_MOST_SCALES = 4
#: Tiles of 16 × 8 sums of a thread that leave it registers for a scale of every 16 codes.
_MOST_TILES = 8
#: Of a processor.
_REGISTERS = 65536
#: Rows of x times warps of a processor up to which ``fragments`` has registers for the x of two steps.
_X_AHEAD = 128
_KERNELS = {"fragments": fragments, "gemv": gemv, "tile": tile, "tile_rows": tile_rows}


def config_for(shape: tuple[int, int, int], rows: bool, dtype: torch.dtype, rates: costs.Rates) -> Config | None:
    """How x ``[M, …]`` of ``shape`` (M, N, K) is multiplied; ``None`` if W is decoded for cuBLAS.

    ``rows``: whether the contraction is over the rows of W.
    """
    m = shape[0]
    if dtype == torch.float32:
        return _WIDE_ROWS if m <= MOST_ROWS and not rows else None
    if not costs.decodes_in_tile(shape, rates):
        return None
    return next(config for config in CONFIGS[rows] if not config.most_m or m <= config.most_m)


def _fitted(config: Config, row_words: int) -> Config:
    """The config, no wider than a row, and no narrower than what shares a scale or a thread loads."""
    if config.kernel == "fragments":
        return config
    words = max(RUN, min(config.block_w, triton.next_power_of_2(row_words)))
    if config.kernel != "gemv":
        words = max(words, 16 // CODES.value)
        return replace(config, block_w=words)
    warps = max(1, min(config.warps, config.block_n * words // (RUN * WARP.value)))
    return replace(config, block_w=words, warps=warps)


def _most_registers(config: Config) -> int | None:
    """Of a thread, for a processor to have room for its programs; ``None`` where they would be too few."""
    most = _REGISTERS // (WARP.value * config.warps * config.programs) // 8 * 8
    return most if 128 <= most < 255 else None


def _splits(tiles: int, steps: int, config: Config, device: torch.device) -> tuple[int, int]:
    """Into how many parts the contraction is cut for every processor to get its programs, and the steps of each."""
    wanted = config.programs * processors(device) // tiles
    each = triton.cdiv(steps, max(1, min(wanted, steps)))
    return triton.cdiv(steps, each), each


# --- calls -----------------------------------------------------------------------------------------------------------


def mm_stored(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    stored: str,
    size: int,
    rows: bool,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    high_first: bool = False,
    *,
    config: Config | None = None,
) -> Tensor:
    """As :func:`qcompile.kernels.matmul.reference.mm_stored`; ``config`` fixes the kernel.

    Raises ``ValueError`` for what :func:`obstacle` names.
    """
    if reason := obstacle(Stored.parse(stored), size, x.dtype):
        msg = f"mm_stored: {reason}"
        raise ValueError(msg)
    (m, _), n = x.shape, codes.shape[0]
    shape = (m, size if rows else n)
    if 0 in (m, n, size):
        return x.new_zeros(shape, dtype=dtype) if bias is None else bias.to(dtype).expand(shape).contiguous()
    config = config or config_for((m, n, size), rows, x.dtype, _rates(x.device))
    if config is None:
        dense = decode(codes, scales, stored, size, x.dtype, second, offset, high_first)
        dense = dense if rows else dense.t()
        return (torch.mm(x, dense) if bias is None else torch.addmm(bias, x, dense)).to(dtype)
    weight = weight_of(stored)
    row_words = size // CODES.value
    config = _fitted(config, row_words)
    arguments = _arguments(codes, scales, weight, second, offset)
    if config.kernel == "fragments":
        return _by_fragments(x, arguments, weight, size, dtype, bias, high_first, config)
    extents: tuple[int, ...]
    blocks: dict[str, Any]
    if config.kernel == "gemv":
        extents, blocks, tiles, steps = (n,), {"m": m}, triton.cdiv(n, config.block_n), row_words
    else:
        extents, blocks = (m, n), {"block_m": config.block_m}
        across, steps = (row_words, n) if rows else (n, row_words)
        tiles = triton.cdiv(across, config.block_w if rows else config.block_n) * triton.cdiv(m, config.block_m)
    steps = triton.cdiv(steps, config.block_n if rows else config.block_w)
    splits, steps = _splits(tiles, steps, config, x.device)
    out = x.new_empty(shape, dtype=dtype)
    partial = x.new_empty((splits, *shape), dtype=torch.float32) if splits > 1 else out
    launch(
        _KERNELS[config.kernel],
        (tiles, splits),
        x.contiguous(),
        *arguments,
        bias if splits == 1 else None,
        partial,
        *extents,
        row_words,
        _per_row(weight, size),
        steps,
        **blocks,
        fmt=weight,
        table=config.table,
        high_first=high_first,
        block_n=config.block_n,
        block_w=config.block_w,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    _add_splits(partial, bias, out)
    return out


def _by_fragments(
    x: Tensor,
    arguments: tuple[Tensor | None, ...],
    weight: Weight,
    size: int,
    dtype: torch.dtype,
    bias: Tensor | None,
    high_first: bool,
    config: Config,
) -> Tensor:
    """:func:`mm_stored` by the kernel of :mod:`.stored_fragments`, for as many rows of x as ``config.block_m``."""
    codes, scales, *_ = arguments
    assert codes is not None
    assert scales is not None
    m, n, row_words = x.shape[0], codes.shape[0], size // CODES.value
    if m > config.block_m:
        msg = f"mm_stored: {config} is for {config.block_m} rows of x, not {m}; take a config with block_m >= M"
        raise ValueError(msg)
    along = config.block_w // STEP_WORDS.value
    across = config.warps // along
    lines = min(config.block_m, MMA_ROWS.value) if weight.block else MMA_ROWS.value
    unit, steps = math.gcd(weight.block, UNIT.value), config.stages
    while weight.block and steps > 1 and scales_of_thread(steps * UNIT.value // unit, lines) > _MOST_SCALES:
        steps //= 2
    tiles_m, tiles_n = triton.cdiv(config.block_m, MMA_ROWS.value), config.block_n // (MMA_COLUMNS.value * across)
    if unit == MMA_COLUMNS.value:
        tiles_n = max(1, min(tiles_n, _MOST_TILES // tiles_m))
    block_n = MMA_COLUMNS.value * across * tiles_n
    tiles, turns = triton.cdiv(n, block_n), triton.cdiv(row_words, config.block_w * steps)
    splits, rounds = _splits(tiles, turns, config, x.device)
    early = config.early and _begins_early(x.device)
    pairs = _pairs(weight.text, x.dtype, high_first, x.device)
    note_constant(pairs)
    out = x.new_empty((m, n), dtype=dtype)
    partial = x.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else out
    launch(
        fragments,
        (tiles, splits),
        _words_of(x),
        *arguments,
        pairs,
        bias if splits == 1 else None,
        partial,
        m,
        n,
        row_words,
        _per_row(weight, size),
        rounds,
        fmt=weight,
        instruction=MMA[x.dtype],
        unit=unit,
        lines=lines,
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        across=across,
        along=along,
        steps=steps,
        even=row_words == splits * rounds * config.block_w * steps,
        x_ahead=config.block_m * config.warps * config.programs <= _X_AHEAD,
        number=gl.int32 if scales.numel() < 2**31 else gl.int64,
        early=early,
        num_warps=config.warps,
        maxnreg=_most_registers(config),
        **({"launch_pdl": True} if early else {}),
    )
    _add_splits(partial, bias, out, early)
    return out


def _add_splits(partial: Tensor, bias: Tensor | None, out: Tensor, early: bool = False) -> None:
    """Nothing if ``partial`` is ``out`` already."""
    if partial is not out:
        count, columns = out.numel(), out.shape[1]
        programs = triton.cdiv(count, _ADD_BLOCK)
        launch(
            add_splits,
            programs,
            partial,
            bias,
            out,
            count,
            columns,
            splits=partial.shape[0],
            block=_ADD_BLOCK,
            early=early,
            **({"launch_pdl": True} if early else {}),
        )


def decode(
    codes: Tensor,
    scales: Tensor,
    stored: str,
    size: int,
    dtype: torch.dtype,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    high_first: bool = False,
) -> Tensor:
    """W ``[N, size]`` in ``dtype``, bit for bit that of the reference. N and ``size`` ≥ 1."""
    weight, n = weight_of(stored), codes.shape[0]
    row_words = size // CODES.value
    config = _fitted(_DECODE, row_words)
    out = codes.new_empty((n, size), dtype=dtype)
    launch(
        decode_rows,
        (triton.cdiv(n, config.block_n), triton.cdiv(row_words, config.block_w)),
        *_arguments(codes, scales, weight, second, offset),
        out,
        n,
        row_words,
        _per_row(weight, size),
        fmt=weight,
        table=config.table,
        high_first=high_first,
        block_n=config.block_n,
        block_w=config.block_w,
        num_warps=config.warps,
    )
    return out


def _arguments(
    codes: Tensor, scales: Tensor, weight: Weight, second: Tensor | None, offset: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Codes as words, scales as numbers or bits, what belongs to scales of scales."""
    book = _book(weight.text, codes.device) if weight.in_book else None
    if book is not None:
        note_constant(book)
    scales = scales.contiguous()
    if scales.dtype != torch.float32:
        scales = scales.view(torch.int16 if scales.itemsize == 2 else torch.uint8)
    return _words_of(codes), scales, second if second is None else second.contiguous(), offset, book


def _words_of(codes: Tensor) -> Tensor:
    codes = codes.contiguous()
    aligned = codes if codes.data_ptr() % _WORD_BYTES == 0 else codes.clone()
    return aligned.view(torch.int32)


def _per_row(weight: Weight, size: int) -> int:
    """Scales of a row."""
    return triton.cdiv(size, weight.block) if weight.block else 1


@cache
def _begins_early(device: torch.device) -> bool:
    """Whether kernels may be launched before the one in front has ended; without a card, they are compiled for it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def _rates(device: torch.device) -> costs.Rates:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return costs.rates_of(name)[0]
