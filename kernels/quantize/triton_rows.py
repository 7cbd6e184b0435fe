"""Quantize by rows in Triton: a program keeps its row in registers between absolute maximum and codes.

Reads 2 bytes per element of a 16-bit x and writes 1, ½ more for packed codes, ⅛ for a mask that needs levels. Rows
longer than ``LONGEST_ROW`` are read twice.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.groups import group_of_row
from qcompile.kernels.triton import (
    INTERPRETED,
    LONGEST_ROW,
    RUN,
    absolute_maximum,
    greater,
    launch,
    row_block,
    runs,
    warps,
    with_dense_rows,
)

from . import reference
from .grid import Grid, Passing, grid_of
from .triton_codes import (
    WARP,
    encoded,
    halves,
    in_float32,
    nearest,
    pack_bits,
    pack_codes,
    pack_levels,
    saturated,
    tensor_core_code,
)

__all__ = ["ELEMENTS_PER_THREAD", "flat", "loaded", "quantize_8bit", "write_rows", "write_rows_of_groups"]

#: Elements a thread holds: enough to share the cost of scales and reductions, few enough to leave registers for other
#: programs of the processor. A row in parts has up to twice as many.
ELEMENTS_PER_THREAD = 64
#: PTX: of a pair of numbers, not negative, and the magnitudes of another the greater ones; NaN if one is.
_GREATER_PAIR = "{{.reg .b32 magnitude; abs.{0} magnitude, $2; max.NaN.{0} $0, $1, magnitude;}}"
GREATER_BF16, GREATER_FP16 = (tl.constexpr(_GREATER_PAIR.format(pair)) for pair in ("bf16x2", "f16x2"))


@triton.jit
def loaded(x, fold, at, inside):
    """Elements ``at`` of the row x, or float32 products with those of ``fold``; 0 unless ``inside`` (``None``: all)."""
    other: tl.constexpr = None if inside is None else 0.0
    value = tl.load(x + at, mask=inside, other=other)
    if fold is not None:
        value = value.to(tl.float32) * tl.load(fold + at, mask=inside, other=other)
    return value


@triton.jit
def _row_maximum(row):
    """max |x|, float32, of a row in parts [n, RUN]; NaN if there is one."""
    largest = tl.zeros(row[0].shape, row[0].dtype)
    for i in tl.static_range(len(row)):
        largest = _greater_magnitude(largest, row[i])
    largest = _halved(_halved(_halved(largest)))  # what a thread has becomes one pair
    return absolute_maximum(largest.to(tl.float32), None)


@triton.jit
def _greater_magnitude(largest, x):
    """The greater of ``largest``, not negative, and |x|; NaN if one is. 16-bit elements are compared in pairs."""
    if INTERPRETED or x.dtype == tl.float32:
        largest = greater(largest.to(tl.float32), tl.abs(x.to(tl.float32))).to(x.dtype)
    else:
        ptx: tl.constexpr = GREATER_BF16 if x.dtype == tl.bfloat16 else GREATER_FP16
        largest = tl.inline_asm_elementwise(ptx, "=r,r,r", [largest, x], dtype=x.dtype, is_pure=True, pack=2)
    return largest


@triton.jit
def _halved(largest):
    """[2n, m / 2] from [n, m]: the greater of first and second halves."""
    first, second = halves(tl.reshape(largest, [2 * largest.shape[0], largest.shape[1] // 2]), 0)
    return _greater_magnitude(first, second)


@triton.jit
def _write_part(
    y,
    codes,
    stored,
    mask,
    start,
    sizes,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
    run: tl.constexpr,
    ragged: tl.constexpr,
    saturate: tl.constexpr,
    whole: tl.constexpr,
):
    """What is asked for of the ``part`` elements of a row from ``start`` on; ``whole``: the row has as many. ``sizes``:
    elements of a row, bytes of its packed codes and of its mask.
    """
    size, stored_size, mask_size = sizes
    at = start + runs(part, run)
    inside = None if whole else at < size
    within = saturated(y, fmt) if saturate else y
    by_bits: tl.constexpr = stored is not None and fmt.pack_8bit != "" and not INTERPRETED
    from_levels: tl.constexpr = codes is None or mask is not None or by_bits
    if from_levels:
        level, code = nearest(within, fmt)
        eight_bit = tensor_core_code(level, fmt) if codes is not None else None
    else:
        eight_bit, code = encoded(within, fmt)
    if codes is not None:
        tl.store(codes + at, eight_bit, mask=inside)
    # The last bytes are filled with zeros.
    if stored is not None:
        if by_bits:
            packed = pack_levels(tl.where(inside, level, 0.0) if ragged and not whole else level, fmt)
        else:
            packed = pack_codes(tl.where(inside, code, fmt.blank) if ragged and not whole else code, fmt, 1)
        at = start // fmt.codes_per_byte + runs(part // fmt.codes_per_byte, run // fmt.codes_per_byte)
        tl.store(stored + at, packed, mask=None if whole else at < stored_size)
    if mask is not None:
        keeps = passes.keeps(y, level)
        bits = pack_bits(keeps & inside if ragged and not whole else keeps, 1)
        at = start // 8 + runs(part // 8, run // 8)
        tl.store(mask + at, bits, mask=None if whole else at < mask_size)


@triton.jit
def _write_row(
    row,
    gamma,
    codes,
    stored,
    mask,
    sizes,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
    run: tl.constexpr,
    ragged: tl.constexpr,
    saturate: tl.constexpr,
):
    for i in tl.static_range(len(row)):
        y = in_float32(row[i]) * gamma
        _write_part(y, codes, stored, mask, i * part, sizes, fmt, passes, part, run, ragged, saturate, i < len(row) - 1)


@triton.jit
def _quantize_row(
    x,
    fold,
    codes,
    scales,
    stored,
    mask,
    row_stride,
    size,
    stored_size,
    mask_size,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
    run: tl.constexpr,
    parts: tl.constexpr,
    ragged: tl.constexpr,
):
    """One row, in as many parts as it takes, not padded to a power of two as a block is; all but the last are whole."""
    number = tl.program_id(0).to(tl.int64)
    x += number * row_stride
    row = ()
    for i in tl.static_range(parts):
        at = i * part + runs(part, run)
        row += (loaded(x, fold, at, None if i < parts - 1 else at < size),)  # type: ignore[assignment]
    amax = greater(_row_maximum(row), fmt.amax_floor)
    scale, gamma = fmt.scale_pair(amax)
    if scales is not None:
        tl.store(scales + number, scale)
    sizes = size, stored_size, mask_size
    if codes is not None:
        codes += number * size
    if stored is not None:
        stored += number * stored_size
    if mask is not None:
        mask += number * mask_size
    # Every row would be saturated, by predicated instructions, if no more than that stood in a branch.
    if fmt.buckets is not None or not (amax <= fmt.plain_limit):
        _write_row(row, gamma, codes, stored, mask, sizes, fmt, passes, part, run, ragged, True)
    else:
        _write_row(row, gamma, codes, stored, mask, sizes, fmt, passes, part, run, ragged, False)


@triton.jit
def _quantize_long_row(
    x,
    fold,
    codes,
    scales,
    stored,
    mask,
    row_stride,
    size,
    stored_size,
    mask_size,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    block: tl.constexpr,
    ragged: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    x += number * row_stride
    running = tl.zeros([block // RUN, RUN], tl.float32)
    for start in range(0, size, block):
        at = start + runs(block, RUN)
        running = greater(running, tl.abs(loaded(x, fold, at, at < size).to(tl.float32)))
    amax = greater(absolute_maximum(running, None), fmt.amax_floor)
    scale, gamma = fmt.scale_pair(amax)
    if scales is not None:
        tl.store(scales + number, scale)
    sizes = size, stored_size, mask_size
    if codes is not None:
        codes += number * size
    if stored is not None:
        stored += number * stored_size
    if mask is not None:
        mask += number * mask_size
    for start in range(0, size, block):
        at = start + runs(block, RUN)
        y = loaded(x, fold, at, at < size).to(tl.float32) * gamma
        _write_part(y, codes, stored, mask, start, sizes, fmt, passes, block, RUN, ragged, True, False)


# --- rows in groups, each with a fold of its own ---------------------------------------------------------------------


@triton.jit
def _quantize_row_of_group(
    x,
    fold,
    offs,
    codes,
    scales,
    groups,
    row_stride,
    size,
    most: tl.constexpr,
    fmt: tl.constexpr,
    part: tl.constexpr,
    run: tl.constexpr,
    parts: tl.constexpr,
):
    fold += group_of_row(tl.program_id(0), offs, groups, most).to(tl.int64) * size
    _quantize_row(x, fold, codes, scales, None, None, row_stride, size, 0, 0, fmt, None, part, run, parts, False)


@triton.jit
def _quantize_long_row_of_group(
    x, fold, offs, codes, scales, groups, row_stride, size, most: tl.constexpr, fmt: tl.constexpr, block: tl.constexpr
):
    fold += group_of_row(tl.program_id(0), offs, groups, most).to(tl.int64) * size
    _quantize_long_row(x, fold, codes, scales, None, None, row_stride, size, 0, 0, fmt, None, block, False)


# --- launching -------------------------------------------------------------------------------------------------------


def flat(fold: Tensor | None) -> Tensor | None:
    return None if fold is None else fold.reshape(-1).contiguous()


def quantize_8bit(x: Tensor, quantizer: str, packed: bool, fold: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit`; x float32, bfloat16 or float16, any strides."""
    if x.numel() == 0:
        return reference.quantize_8bit(x, quantizer, packed, fold)
    q = Quantizer.parse(quantizer)
    x = with_dense_rows(x)
    rows, size = x.shape
    codes = x.new_empty((rows, size), dtype=tensor_core_dtype(q.format))
    scales = x.new_empty((rows, 1), dtype=torch.float32)
    stored = x.new_empty((rows, q.packed_size(size) if packed else 0), dtype=torch.uint8)
    write_rows(x, grid_of(quantizer), None, codes, scales, stored if packed else None, None, fold)
    return codes, scales, stored


def write_rows(
    x: Tensor,
    fmt: Grid,
    passes: Passing | None,
    codes: Tensor | None,
    scales: Tensor | None,
    stored: Tensor | None,
    mask: Tensor | None,
    fold: Tensor | None = None,
) -> None:
    """Write what is not ``None`` of x ``[R, K]`` with dense rows, whose scales follow from the absolute maximum."""
    rows, size = x.shape
    # Alone, a mask is written where elements are read: eight of 16 bits per thread, a byte of the mask.
    num_warps, layout = _layout(size, 8 if codes is None and stored is None else RUN.value)
    launch(
        _quantize_row if size <= LONGEST_ROW else _quantize_long_row,
        rows,
        x,
        flat(fold),
        codes,
        scales,
        stored,
        mask,
        x.stride(0),
        size,
        0 if stored is None else stored.shape[1],
        0 if mask is None else mask.shape[1],
        fmt=fmt,
        passes=passes,
        **layout,
        ragged=size % (fmt.codes_per_byte if mask is None else 8) != 0,
        num_warps=num_warps,
    )


def write_rows_of_groups(x: Tensor, fmt: Grid, offs: Tensor, fold: Tensor, codes: Tensor, scales: Tensor) -> None:
    """8-bit codes and scales of x ``[M, N]`` with dense rows, times the row of ``fold`` ``[E, N, 1]`` that belongs to
    the group.
    """
    rows, size = x.shape
    num_warps, layout = _layout(size, RUN.value)
    launch(
        _quantize_row_of_group if size <= LONGEST_ROW else _quantize_long_row_of_group,
        rows,
        x,
        flat(fold),
        offs,
        codes,
        scales,
        offs.shape[0],
        x.stride(0),
        size,
        most=triton.next_power_of_2(offs.shape[0]),
        fmt=fmt,
        **layout,
        num_warps=num_warps,
    )


def _layout(size: int, run: int) -> tuple[int, dict[str, Any]]:
    """Warps that share a row, and the constants that say how they do."""
    if size > LONGEST_ROW:
        return warps(LONGEST_ROW, ELEMENTS_PER_THREAD), {"block": LONGEST_ROW}
    # Of the largest power of two that is not larger.
    num_warps = warps(row_block(size + 1) // 2, ELEMENTS_PER_THREAD)
    part = run * WARP.value * num_warps
    return num_warps, {"part": part, "run": run, "parts": triton.cdiv(size, part)}
