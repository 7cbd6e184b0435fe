"""Rotated, masked and sparse operands in Triton, equal to the references bit for bit.

A thread holds blocks of up to 64 neighbours. Six of the seven butterflies of a block of 128 are additions between its
registers, in the order of the reference; the last one is an exchange with the next lane and an addition. Sums,
rounding, masks and packing happen in the thread too, and only codes go back through shared memory to be written in
lines. (128 neighbours would need no exchange, but many more registers: three warps per scheduler cannot hide that such
long code is fetched no faster than it runs.)

How elements are assigned to threads: persistent programs fetch rows of half-integers that a tensor descriptor can
address into swizzled shared memory, two rows ahead, and read them from there as columns. Other rows take a program per
row, which reads 16 neighbours per thread and exchanges them through shared memory while they have 16 bits.

Triton chooses layouts, so what runs where follows from shapes: *columns* [span, n] are blocks of ``span`` neighbours
below each other. Its default for such shapes gives every thread whole columns, as long as there are 32 of them.

Per element of a 16-bit x, in bytes of device memory:

* **quantize by rows** (2 in; 1 out as 8-bit codes, up to 1 as stored codes, ⅛ as mask, whichever are asked for): sum of
  squares in float64, rotation, scale, codes and mask in one pass. Rows longer than ``LONGEST_ROW`` are read twice.
* **transposed** (2 in, up to 1 out as stored codes; these in again, 1 out).
* **hadamard** (2 in, 2 out; ⅛ in for a mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.ir.estimators import Estimator
from qcompile.ir.operand import Operand
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.ir.transforms import SPARSITIES, Transform
from qcompile.kernels.estimate import reference as estimate_reference
from qcompile.kernels.quantize import reference as quantize_reference
from qcompile.kernels.quantize.grid import Constants, Grid, Passing, grid_of, passing, unsupported
from qcompile.kernels.quantize.triton import (
    biased_code,
    biased_level,
    halves,
    missing_conversion,
    nearest,
    pack_codes,
    recode,
    rms_scale_pair,
    saturated,
    supports_recode,
    tensor_core_code,
)
from qcompile.kernels.triton import (
    INTERPRETED,
    LONGEST_ROW,
    RUN,
    absolute_maximum,
    as_bits,
    as_rows,
    greater,
    launch,
    processors,
    row_block,
    runs,
    supports_dtypes,
    warps,
    with_dense_rows,
)

from . import reference

__all__ = [
    "estimator_mask",
    "hadamard",
    "kept",
    "quantize",
    "quantize_8bit_masked",
    "quantize_8bit_transposed",
    "rotated",
    "supports_estimator_mask",
    "supports_hadamard",
    "supports_quantize",
    "supports_quantize_8bit_masked",
    "supports_quantize_8bit_transposed",
]

Support = tuple[bool, str]

#: Most neighbours that one thread holds, and elements where it rotates them; and elements where it does not.
LARGEST_SPAN, UNROTATED_PER_THREAD = 64, 128
#: Elements that a program rotates where rows do not matter.
ROTATED_BLOCK = 4096

#: Warps of persistent programs, which take row after row: as many as leave 128 registers to a thread.
RESIDENT_WARPS = 16
#: Scales up to here are those of rows without NaN or infinity, whose rotation has none either.
LARGEST_PLAIN_SCALE = tl.constexpr(2.0**64)

#: PTX: the two float32 numbers that a pair of bfloat16 ones are.
_WIDEN = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
#: PTX: a copy of $1, and a reason to branch around it: threads wait for each other.
_STAY = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
#: PTX: the highest bits of $1 … $8, that of $1 highest.
_SHIFT_IN = tl.constexpr(
    "{.reg .b32 bits; shr.u32 bits, $1, 31;"
    + "".join(f"shf.l.wrap.b32 bits, ${i}, bits, 1;" for i in range(2, 9))
    + "mov.b32 $0, bits;}"
)
#: PTX: $1 · $2, whose magnitude is 1, added to what the lane $3 away has in place of $1.
_EXCHANGE = tl.constexpr(
    "{.reg .f32 other; shfl.sync.bfly.b32 other, $1, $3, 31, 0xffffffff; fma.rn.f32 $0, $1, $2, other;}"
)


# --- rotation -------------------------------------------------------------------------------------------------------


@triton.jit
def _columns(x, span: tl.constexpr):
    """[n, 16] as [span, 16n / span], neighbours below each other: what is not last stays in a thread."""
    return tl.permute(tl.reshape(x, [x.shape[0] * x.shape[1] // span, span]), (1, 0))


@triton.jit
def _runs_of(columns, run: tl.constexpr):
    """Inverse of :func:`_columns`, as [n, run]."""
    return tl.reshape(tl.permute(columns, (1, 0)), [columns.shape[0] * columns.shape[1] // run, run])


@triton.jit
def _butterfly(x, distance: tl.constexpr):
    """[m, n]: of every two elements ``distance`` apart along the first axis, sum and difference."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [m // (2 * distance), 2, distance, n]), (0, 2, 3, 1))
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, (0, 3, 1, 2)), [m, n])


@triton.jit
def _butterfly_of_columns(x, distance: tl.constexpr):
    """The same along the second axis."""
    m: tl.constexpr = x.shape[0]
    n: tl.constexpr = x.shape[1]
    pairs = tl.permute(tl.reshape(x, [m, n // (2 * distance), 2, distance]), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    pairs = tl.join(first + second, first - second)
    return tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), [m, n])


@triton.jit
def _butterfly_of_lanes(x, distance: tl.constexpr):
    """The same, where the columns ``distance`` apart are held by threads ``distance`` lanes apart."""
    sign = tl.where(tl.arange(0, x.shape[1]) & distance != 0, -1.0, 1.0)[None, :]
    return tl.inline_asm_elementwise(
        _EXCHANGE, "=f,f,f,r", [x, sign, tl.full([1, 1], distance, tl.int32)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def rotated(columns, block: tl.constexpr):
    """Float32 columns times the orthonormal Hadamard matrix of size ``block``."""
    span: tl.constexpr = columns.shape[0]
    for step in tl.static_range(10):
        if 2**step < block:
            if 2**step < span:
                columns = _butterfly(columns, 2**step)
            elif not INTERPRETED and columns.shape[1] >= 32 and 2**step < 32 * span:
                columns = _butterfly_of_lanes(columns, 2**step // span)
            else:
                columns = _butterfly_of_columns(columns, 2**step // span)
    if block > 1:
        columns *= block**-0.5
    return columns


# --- sparsity -------------------------------------------------------------------------------------------------------


@triton.jit
def kept(columns, width: tl.constexpr):
    """Bool like columns: of four aligned units of ``width`` neighbours, the two with the larger sums of squares."""
    score = columns * columns
    if width == 2:
        first, second = halves(score, 0)
        score = first + second
    a, b, c, d = _quarters(score)
    # A unit loses to a larger one, and to an equal one before it; NaN loses to nothing.
    stays_a = _at_most_one(b > a, c > a, d > a)
    stays_b = _at_most_one(a >= b, c > b, d > b)
    stays_c = _at_most_one(a >= c, b >= c, d > c)
    stays_d = _at_most_one(a >= d, b >= d, c >= d)
    stays = _interleaved(_interleaved(stays_a, stays_c), _interleaved(stays_b, stays_d))
    if width == 2:
        stays = _interleaved(stays, stays)
    return stays != 0


@triton.jit
def _quarters(columns):
    """Every first, second, third and fourth of four neighbours."""
    even, odd = halves(columns, 0)
    first, third = halves(even, 0)
    second, fourth = halves(odd, 0)
    return first, second, third, fourth


@triton.jit
def _eighths(columns):
    """Every first to eighth of eight neighbours."""
    even, odd = halves(columns, 0)
    first, third, fifth, seventh = _quarters(even)
    second, fourth, sixth, eighth = _quarters(odd)
    return first, second, third, fourth, fifth, sixth, seventh, eighth


@triton.jit
def _interleaved(a, b):
    """[m, n] and [m, n] as [2m, n], taking turns."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [2 * a.shape[0], a.shape[1]])


@triton.jit
def _at_most_one(a, b, c):
    """Int32: 1 where at most one of three is true, else 0."""
    return tl.where((a & b) | (b & c) | (a & c), 0, 1)


# --- quantize -------------------------------------------------------------------------------------------------------


@triton.jit
def _columns_of(x, start, size, part: tl.constexpr):
    """Float32 columns of a part of the row x from ``start`` on, 0 past its end."""
    at = start + runs(part.block, RUN)
    return _widened(_columns(tl.load(x + at, mask=at < size, other=0.0), part.span))


@triton.jit
def _widened(columns):
    """Columns in float32; long ones of bfloat16 in pairs, at an instruction per element instead of one and a half."""
    if INTERPRETED or columns.dtype != tl.bfloat16 or columns.shape[0] == RUN:
        wide = columns.to(tl.float32)
    else:
        # To part them brings all of a column to one thread, while it still has 16 bits.
        upper, lower = _upper_and_lower(columns)
        wide = tl.permute(tl.join(_widened_pairs(upper), _widened_pairs(lower)), (2, 0, 1))
        wide = tl.reshape(wide, [columns.shape[0], columns.shape[1]])
    return wide


@triton.jit
def _widened_pairs(x):
    return tl.inline_asm_elementwise(_WIDEN, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def _upper_and_lower(columns):
    """The first half of every column and the second."""
    return tl.split(tl.permute(tl.reshape(columns, [2, columns.shape[0] // 2, columns.shape[1]]), (1, 2, 0)))


@triton.jit
def _squares(columns):
    """Float64, an eighth of the columns: sums of squares; each square is exact."""
    eighths = _eighths(columns.to(tl.float64))
    total = eighths[0] * eighths[0]
    for i in tl.static_range(1, 8):
        total = tl.fma(eighths[i], eighths[i], total)
    return total


@triton.jit
def _pack_signs(x):
    """Float32 columns as bytes of the signs, the lower index in the lower bits."""
    b0, b1, b2, b3, b4, b5, b6, b7 = _eighths(as_bits(x))
    if INTERPRETED:
        byte = (b0 < 0).to(tl.int32) | (b1 < 0).to(tl.int32) << 1
        byte |= (b2 < 0).to(tl.int32) << 2 | (b3 < 0).to(tl.int32) << 3
        byte |= (b4 < 0).to(tl.int32) << 4 | (b5 < 0).to(tl.int32) << 5
        byte |= (b6 < 0).to(tl.int32) << 6 | (b7 < 0).to(tl.int32) << 7
    else:
        byte = tl.inline_asm_elementwise(
            _SHIFT_IN, "=r,r,r,r,r,r,r,r,r", [b7, b6, b5, b4, b3, b2, b1, b0], dtype=tl.int32, is_pure=True, pack=1
        )
    return byte.to(tl.uint8)


@triton.jit
def _beyond(y, above):
    """|y| − above, whose sign is set where |y| < above; not for NaN, which a GPU computes without a sign."""
    beyond = tl.abs(y) - above
    if INTERPRETED:
        beyond = tl.where(beyond == beyond, beyond, 0.0)
    return beyond


@triton.jit
def _write_part(
    columns,
    scale,
    gamma,
    row,
    codes,
    stored,
    mask,
    start,
    sizes,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
):
    """What is asked for of rotated columns, elements of a row from ``start`` on; ``sizes``: see :func:`_sizes_of`."""
    size, stored_size, mask_size = sizes
    if codes is not None:
        codes += row * size
    if stored is not None:
        stored += row * stored_size
    if mask is not None:
        mask += row * mask_size
    y = columns * gamma
    # The last bytes of a row are filled with zeros.
    inside = _columns(start + runs(part.block, RUN), part.span) < size if part.ragged else None
    # What y is needed for comes first, and levels last: registers hold one number per element.
    if part.unit > 0:
        keep = kept(columns, part.unit)
    if mask is not None and passes.by_limits(part.unit > 0):
        limit = tl.where(keep, passes.above_limit, passes.above_limit_at_zero) if part.unit > 0 else passes.above_limit
        _write_mask(mask, _beyond(y, limit), inside, start, mask_size)
    if part.words:
        if not (scale <= LARGEST_PLAIN_SCALE):
            tl.inline_asm_elementwise(_STAY, "=f,f", [scale], dtype=tl.float32, is_pure=False, pack=1)
            y = saturated(y, fmt)
        _write_words(y, codes, stored, start, size, fmt)
    else:
        if fmt.biased:
            code = biased_code(saturated(y, fmt), fmt)
        else:
            level, code = nearest(saturated(y, fmt), fmt)
        if part.unit > 0:
            level = tl.where(keep, level, 0.0)
            code = tl.where(keep, code, fmt.blank)
        if stored is not None:
            _write_stored(stored, code, inside, start, stored_size, fmt)
        if fmt.biased:
            level = biased_level(code, fmt)
        if codes is not None:
            if fmt.biased and fmt.target == "int8":
                eight_bit = (fmt.integer_code[0] * code + fmt.integer_code[1]).to(tl.int8)
            else:
                eight_bit = tensor_core_code(level, fmt)
            at = start + runs(part.block, RUN)
            tl.store(codes + at, _runs_of(eight_bit, RUN), mask=at < size)
        if mask is not None and not passes.by_limits(part.unit > 0):
            _write_mask(mask, tl.where(passes.keeps(y, level), -1.0, 1.0), inside, start, mask_size)


@triton.jit
def _write_words(y, codes, stored, start, size, fmt: tl.constexpr):
    """8-bit and stored codes of scaled columns, not NaN and below 2¹⁵, eight neighbours at once."""
    y0, y1, y2, y3, y4, y5, y6, y7 = _eighths(y)
    first, second, packed = tl.inline_asm_elementwise(
        fmt.encode_eight,
        "=r,=r,=r,f,f,f,f,f,f,f,f",
        [y0, y1, y2, y3, y4, y5, y6, y7],
        dtype=(tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    if codes is not None:
        _store_words(codes, _interleaved(first, second), start // 4, size // 4)
    if stored is not None:
        _store_words(stored, packed, start // 8, size // 8)


@triton.jit
def _store_words(target, columns, start, size):
    """Columns of int32 to the row ``target``."""
    run: tl.constexpr = min(4, columns.shape[0])
    at = start + runs(columns.shape[0] * columns.shape[1], run)
    tl.store(target.to(tl.pointer_type(tl.int32)) + at, _runs_of(columns, run), mask=at < size)


@triton.jit
def _write_stored(stored, code, inside, start, stored_size, fmt: tl.constexpr):
    if inside is not None:
        code = tl.where(inside, code, fmt.blank)
    packed = pack_codes(code, fmt, 0)
    run: tl.constexpr = min(RUN, packed.shape[0])
    at = start // fmt.codes_per_byte + runs(packed.shape[0] * packed.shape[1], run)
    tl.store(stored + at, _runs_of(packed, run), mask=at < stored_size)


@triton.jit
def _write_mask(mask, beyond, inside, start, mask_size):
    if inside is not None:
        beyond = tl.where(inside, beyond, 0.0)
    bits = _pack_signs(beyond)
    run: tl.constexpr = bits.shape[0]  # they are where they are written from
    at = start // 8 + runs(run * bits.shape[1], run)
    tl.store(mask + at, _runs_of(bits, run), mask=at < mask_size)


@triton.jit
def _write_row(
    columns, row, codes, scales, stored, mask, sizes, fmt: tl.constexpr, passes: tl.constexpr, part: tl.constexpr
):
    """Scale, and what else is asked for, of a row of these columns."""
    if fmt.of_squares:
        scale, gamma = rms_scale_pair(tl.sum(_squares(columns)), sizes[0], fmt)
        columns = rotated(columns, part.rotation)
    else:
        columns = rotated(columns, part.rotation)
        scale, gamma = fmt.scale_pair(greater(absolute_maximum(columns, None), fmt.amax_floor))
    if scales is not None:
        tl.store(scales + row, scale)
    _write_part(columns, scale, gamma, row, codes, stored, mask, 0, sizes, fmt, passes, part)


@triton.jit
def _sizes_of(size, stored_size, mask_size, fmt: tl.constexpr, part: tl.constexpr):
    """Elements of a row, and bytes of its stored codes and its mask."""
    if part.whole:  # then no element has to be compared
        size = part.block
        stored_size = part.block // fmt.codes_per_byte
        mask_size = part.block // 8
    return size, stored_size, mask_size


@triton.jit
def _quantize_row(
    x,
    codes,
    scales,
    stored,
    mask,
    row_stride,
    rows,
    size,
    stored_size,
    mask_size,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
):
    """A row per program."""
    row = tl.program_id(0).to(tl.int64)
    sizes = _sizes_of(size, stored_size, mask_size, fmt, part)
    columns = _columns_of(x + row * row_stride, 0, sizes[0], part)
    _write_row(columns, row, codes, scales, stored, mask, sizes, fmt, passes, part)


@triton.jit
def _quantize_rows(
    x,
    codes,
    scales,
    stored,
    mask,
    row_stride,
    rows,
    size,
    stored_size,
    mask_size,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
):
    """Every ``num_programs(0)``-th row; x: descriptor of the matrix as [rows, size / span, span].

    While one row is worked on, the next two are on their way to shared memory, whence a thread takes whole columns.
    """
    sizes = _sizes_of(size, stored_size, mask_size, fmt, part)
    for i in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=3):
        columns = tl.permute(tl.reshape(x.load([i, 0, 0]), [part.block // part.span, part.span]), (1, 0))
        row = tl.cast(i, tl.int64)
        _write_row(_widened(columns), row, codes, scales, stored, mask, sizes, fmt, passes, part)


@triton.jit
def _quantize_long_row(
    x,
    codes,
    scales,
    stored,
    mask,
    row_stride,
    rows,
    size,
    stored_size,
    mask_size,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    part: tl.constexpr,
):
    """A row per program, in parts, read twice."""
    span: tl.constexpr = part.span
    block: tl.constexpr = part.block
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    sizes = _sizes_of(size, stored_size, mask_size, fmt, part)
    if fmt.of_squares:
        squares = tl.zeros([span // 8, block // span], tl.float64)
        for start in range(0, size, block):
            squares += _squares(_columns_of(x, start, size, part))
        scale, gamma = rms_scale_pair(tl.sum(squares), size, fmt)
    else:
        running = tl.zeros([span, block // span], tl.float32)
        for start in range(0, size, block):
            running = greater(running, tl.abs(rotated(_columns_of(x, start, size, part), part.rotation)))
        scale, gamma = fmt.scale_pair(greater(absolute_maximum(running, None), fmt.amax_floor))
    if scales is not None:
        tl.store(scales + row, scale)
    for start in range(0, size, block):
        columns = rotated(_columns_of(x, start, size, part), part.rotation)
        _write_part(columns, scale, gamma, row, codes, stored, mask, start, sizes, fmt, passes, part)


# --- hadamard -------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x,
    mask,
    out,
    row_stride,
    size,
    mask_size,
    part: tl.constexpr,
):
    """A part of one row."""
    span: tl.constexpr = part.span
    block: tl.constexpr = part.block
    parts = tl.cdiv(size, block)
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = (tl.program_id(0) % parts).to(tl.int64) * block
    columns = _columns_of(x + row * row_stride, start, size, part)
    if mask is not None:
        at = start // 8 + runs(block // 8, RUN // 8)
        bits = _columns(tl.load(mask + row * mask_size + at, mask=at < mask_size, other=0), span // 8).to(tl.int32)
        bits = tl.reshape(tl.broadcast_to(bits[:, None, :], [span // 8, 8, block // span]), [span, block // span])
        columns = tl.where((bits >> (tl.arange(0, span) % 8)[:, None]) & 1 != 0, columns, 0.0)
    at = start + runs(block, RUN)
    rotated_runs = _runs_of(rotated(columns, part.rotation).to(out.dtype.element_ty), RUN)
    tl.store(out + row * size + at, rotated_runs, mask=at < size)


# --- what is supported ----------------------------------------------------------------------------------------------


@cache
def supports_quantize_8bit_masked(dtypes: tuple[torch.dtype, ...], operand: str) -> Support:
    """Whether the kernels here quantize tensors of ``dtypes`` by an operand to 8-bit codes, and if not, why."""
    spec = Operand.parse(operand)
    if spec.outliers:
        return False, "the Triton kernel clamps no outliers"
    return _supports(dtypes, spec.stored, spec.transform, eight_bit=True)


@cache
def supports_quantize(
    dtypes: tuple[torch.dtype, ...], quantizer: str, transform: str, by_columns: bool = False
) -> Support:
    """The same for :func:`quantize`; ``by_columns``: along the first axis of a matrix, which is no hindrance."""
    return _supports(dtypes, Quantizer.parse(quantizer), Transform.parse(transform), eight_bit=False)


@cache
def supports_quantize_8bit_transposed(dtypes: tuple[torch.dtype, ...], quantizer: str, transform: str) -> Support:
    """The same for :func:`quantize_8bit_transposed`."""
    supported, reason = _supports(dtypes, Quantizer.parse(quantizer), Transform.parse(transform), eight_bit=True)
    return supports_recode((), quantizer) if supported else (False, reason)


@cache
def supports_estimator_mask(dtypes: tuple[torch.dtype, ...], quantizer: str, estimator: str, transform: str) -> Support:
    """The same for :func:`estimator_mask`."""
    return _supports(dtypes, Quantizer.parse(quantizer), Transform.parse(transform), eight_bit=False)


def _supports(dtypes: tuple[torch.dtype, ...], q: Quantizer, transform: Transform, eight_bit: bool) -> Support:
    reason = unsupported(q, eight_bit)
    if not reason and eight_bit:
        reason = missing_conversion(q.format)
    if not reason and transform.sparsity and not (q.format.pruned or q.format.has_zero):
        reason = f"{q.format.name} has no code for the elements that sparse({transform.sparsity}) drops"
    if not reason and transform.sparsity and q.format.zero_code:
        reason = f"{q.format.name} has another code than 0 for the elements that sparse({transform.sparsity}) drops"
    return (False, reason) if reason else supports_dtypes(dtypes)


def supports_hadamard(dtypes: tuple[torch.dtype, ...]) -> Support:
    """Whether :func:`hadamard` handles the dtype, and if not, why."""
    return supports_dtypes(dtypes)


# --- launching ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part(Constants):
    """How a program holds what it works on at once, ``block`` elements: columns of ``span``.

    Attributes:
        rotation: size of the Hadamard blocks.
        unit: neighbours that sparsity drops together, 0 if nothing is dropped.
        whole: whether a row is one part, and has no fewer elements.
        ragged: whether the last byte of a row of stored codes or of a mask has bits that no element has.
        words: whether eight elements may be encoded at once.
    """

    rotation: int
    span: int
    block: int
    unit: int = 0
    whole: bool = False
    ragged: bool = False
    words: bool = False

    @property
    def num_warps(self) -> int:
        return warps(self.block, LARGEST_SPAN if self.rotation > 1 else UNROTATED_PER_THREAD)


def _part(size: int, rotation: int, block: int, **others: Any) -> Part:
    """Raises ``ValueError`` if rows of ``size`` elements cannot be rotated."""
    if size % rotation:
        msg = f"hadamard: {size} elements are no multiple of the block size {rotation}"
        raise ValueError(msg)
    block = max(block, rotation)
    # With 32 columns or more a thread has whole ones.
    return Part(rotation, max(RUN.value, min(rotation, LARGEST_SPAN, block // 32)), block, **others)


def _by_words(x: Tensor, fmt: Grid, passes: Passing | None, transform: Transform) -> bool:
    """Whether eight elements of a row of x are encoded at once (:attr:`Grid.encode_eight`).

    Where nothing is rotated memory is what takes the time, and it is written faster byte by byte.
    """
    size = x.shape[1]
    # No element of a row of n, rotated or not, is larger than √n times their root mean square.
    bounded = size * (fmt.largest / fmt.clip) ** 2 < 2.0**28 if fmt.clip else fmt.plain_limit > 0.0
    suits = (
        fmt.encode_eight
        and transform.rotation > 1
        and not transform.sparsity
        and (passes is None or passes.limit > 0.0)
    )
    return bool(suits) and bounded and size % RUN.value == 0 and _is_hopper(x.device)


def _by_descriptor(x: Tensor, fmt: Grid, part: Part) -> bool:
    """Whether rows of x come by tensor descriptors, in lines of 128 bytes that are columns.

    Other grids than half-integers, and comparisons with the end of a row, take more registers than persistent programs
    have.
    """
    size, simple = x.shape[1], fmt.biased and (part.words or part.whole)
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(0) >= size
    in_lines = x.element_size() == 2 and part.span == LARGEST_SPAN and size % LARGEST_SPAN == 0
    return simple and aligned and in_lines and size <= LONGEST_ROW and (INTERPRETED.value or _is_hopper(x.device))


def _is_hopper(device: torch.device) -> bool:
    """Whether kernels for ``device`` may use what came with compute capability 9.0."""
    return not INTERPRETED.value and torch.cuda.get_device_capability(device) >= (9, 0)


def _by_rows(
    x: Tensor,
    q: Quantizer,
    transform: Transform,
    estimator: Estimator | None = None,
    eight_bit: bool = False,
    stored: bool = False,
    scaled: bool = True,
) -> list[Tensor]:
    """8-bit codes, scales, stored codes and mask of x ``[R, K]``; empty, ``[R, 0]``, where they are not wanted."""
    rows, size = x.shape
    x, fmt = with_dense_rows(x), grid_of(str(q), eight_bit)
    passes = passing(str(estimator), q.format) if estimator is not None else None
    masked = passes is not None
    part = _part(
        size,
        transform.rotation,
        row_block(size),
        unit=SPARSITIES[transform.sparsity].width if transform.sparsity else 0,
        whole=size == row_block(size),
        ragged=(stored and size % fmt.codes_per_byte != 0) or (masked and size % 8 != 0),
        words=_by_words(x, fmt, passes, transform),
    )
    codes = x.new_empty(
        (rows, size if eight_bit else 0), dtype=tensor_core_dtype(q.format) if eight_bit else torch.uint8
    )
    scales = x.new_empty((rows, 1 if scaled else 0), dtype=torch.float32)
    packed = x.new_empty((rows, q.packed_size(size) if stored else 0), dtype=torch.uint8)
    mask = x.new_empty((rows, -(-size // 8) if masked else 0), dtype=torch.uint8)
    source: Any = x
    kernel, programs = (_quantize_row, rows) if size <= LONGEST_ROW else (_quantize_long_row, rows)
    most_registers = None
    if _by_descriptor(x, fmt, part):
        most_registers = 65536 // (32 * RESIDENT_WARPS)
        kernel, programs = _quantize_rows, min(rows, processors(x.device) * (RESIDENT_WARPS // part.num_warps))
        lines = [rows, size // part.span, part.span], [x.stride(0), part.span, 1]
        source = TensorDescriptor(x, *lines, [1, part.block // part.span, part.span])
    launch(
        kernel,
        programs,
        source,
        codes if eight_bit else None,
        scales if scaled else None,
        packed if stored else None,
        mask if masked else None,
        x.stride(0),
        rows,
        size,
        packed.shape[1],
        mask.shape[1],
        fmt=fmt,
        passes=passes,
        part=part,
        num_warps=part.num_warps,
        maxnreg=most_registers,
    )
    return [codes, scales, packed, mask]


def quantize_8bit_masked(
    x: Tensor, operand: str, packed: bool, eight_bit: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit_masked`; x float32, bfloat16 or float16, any
    strides.

    Raises ``ValueError`` if the rotation does not divide K.
    """
    if x.numel() == 0:
        return quantize_reference.quantize_8bit_masked(x, operand, packed, eight_bit)
    spec = Operand.parse(operand)
    estimator = spec.estimator if spec.estimator.kind.mask else None
    codes, scales, stored, mask = _by_rows(x, spec.stored, spec.transform, estimator, eight_bit, stored=packed)
    return codes, scales, stored, mask


def quantize(
    x: Tensor,
    quantizer: str,
    axis: int,
    global_scale: Tensor | None = None,
    seed: Tensor | None = None,
    fold: Tensor | None = None,
    transform: str = "",
) -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize`, of formats whose codes follow from the row alone.

    An axis other than the last, and factors to ``fold``, take a copy of x.
    """
    if x.numel() == 0:
        return quantize_reference.quantize(x, quantizer, axis, global_scale, seed, fold, transform)
    rows, shape = as_rows(x, axis)
    if fold is not None:
        rows = rows.float() * fold.reshape(-1)
    _, scales, stored, _ = _by_rows(rows, Quantizer.parse(quantizer), Transform.parse(transform), stored=True)
    return stored.reshape(*shape[:-1], -1), scales.reshape(*shape[:-1], 1)


def quantize_8bit_transposed(x: Tensor, quantizer: str, transform: str = "") -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize_8bit_transposed`; dtypes and strides as above."""
    codes, scales = quantize(x, quantizer, -1, transform=transform)
    return recode(codes, quantizer, x.shape[1], True), scales


def estimator_mask(
    x: Tensor,
    scales: Tensor,
    quantizer: str,
    estimator: str,
    axis: int,
    global_scale: Tensor | None = None,
    transform: str = "",
) -> Tensor:
    """As :func:`qcompile.kernels.estimate.reference.estimator_mask`, without a global scale."""
    if x.numel() == 0:
        return estimate_reference.estimator_mask(x, scales, quantizer, estimator, axis, None, transform)
    rows, shape = as_rows(x, axis)
    q, rule = Quantizer.parse(quantizer), Estimator.parse(estimator)
    mask = _by_rows(rows, q, Transform.parse(transform), rule, scaled=False)[3]
    return mask.reshape(*shape[:-1], -1)


def hadamard(x: Tensor, block: int, axis: int, mask: Tensor | None = None) -> Tensor:
    """As :func:`qcompile.kernels.transform.reference.hadamard`; float32, bfloat16 or float16, any strides.

    Raises ``ValueError`` if the axis is no multiple of ``block``, or the mask does not fit.
    """
    if x.numel() == 0:
        return reference.hadamard(x, block, axis, mask)
    rows, shape = as_rows(x, axis)
    rows = rows.contiguous()
    count, size = rows.shape
    mask_size = -(-size // 8)
    if mask is not None and mask.shape != (*shape[:-1], mask_size):
        msg = f"hadamard: mask {tuple(mask.shape)} does not fit {tuple(x.shape)}, axis {axis}"
        raise ValueError(msg)
    part = _part(size, block, ROTATED_BLOCK)
    # The interpreter cuts where a GPU rounds: it leaves the cast to torch.
    out = torch.empty(shape, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if mask is None or size % 8 == 0:  # then it is all one row
        count, size, mask_size = 1, count * size, count * mask_size
    launch(
        _rotate,
        count * triton.cdiv(size, part.block),
        rows,
        None if mask is None else mask.contiguous(),
        out,
        rows.stride(0),
        size,
        mask_size,
        part=part,
        num_warps=part.num_warps,
    )
    moved = out.movedim(-1, axis)
    return moved if moved.stride() == x.stride() and moved.dtype == x.dtype else torch.empty_like(x).copy_(moved)
