"""Rotated, masked and sparse operands in Triton, equal to the references bit for bit.

A program reads a row once. Elements arrive 16 neighbours a thread, as a line of memory is read best, and are exchanged
through shared memory while they still have 16 bits, so that a thread then holds blocks of up to 64 neighbours. Six of
the seven butterflies of a block of 128 are additions between its registers, in the order of the reference; the last one
is an exchange with the next lane and an addition. Sums, rounding, masks and packing happen in the thread too, and only
codes go back through shared memory to be written in lines. (128 neighbours would need no exchange, but 167 registers
instead of 96: three warps a scheduler cannot hide that such long code is fetched no faster than it runs.)

Triton chooses layouts, so what runs where follows from shapes: *columns* [span, n] are blocks of ``span`` neighbours
below each other. Its default for such shapes gives every thread whole columns, as long as there are 32 of them.

Per element of a 16-bit x, in bytes of device memory:

* **quantize by rows** (2 in; 1 out as 8-bit codes, up to 1 as stored codes, ⅛ as mask, whichever are asked for): sum of
  squares in float64, rotation, scale, codes and mask in one pass. Rows longer than ``LONGEST_ROW`` are read twice.
* **transposed** (2 in, up to 1 out as stored codes; these in again, 1 out).
* **hadamard** (2 in, 2 out; ⅛ in for a mask).
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.ir.estimators import Estimator
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.recipe import Operand
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.ir.transforms import SPARSITIES, Transform
from qcompile.kernels.estimate import reference as estimate_reference
from qcompile.kernels.quantize import reference as quantize_reference
from qcompile.kernels.quantize.grid import grid_of, passing, unsupported
from qcompile.kernels.quantize.triton import (
    SMALLEST_AMAX,
    biased_code,
    biased_level,
    halves,
    missing_conversion,
    nearest,
    pack_codes,
    recode,
    rms_scale_pair,
    saturated,
    scale_pair,
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
def _interleaved(a, b):
    """[m, n] and [m, n] as [2m, n], taking turns."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), [2 * a.shape[0], a.shape[1]])


@triton.jit
def _at_most_one(a, b, c):
    """Int32: 1 where at most one of three is true, else 0."""
    return tl.where((a & b) | (b & c) | (a & c), 0, 1)


# --- quantize -------------------------------------------------------------------------------------------------------


@triton.jit
def _columns_of(x, start, size, block: tl.constexpr, span: tl.constexpr):
    """Float32 columns of ``block`` elements of the row x from ``start`` on, 0 past its end."""
    at = start + runs(block, RUN)
    return _columns(tl.load(x + at, mask=at < size, other=0.0), span).to(tl.float32)


@triton.jit
def _squares(columns):
    """Float64, a quarter of the columns: sums of squares; each square is exact."""
    a, b, c, d = _quarters(columns.to(tl.float64))
    return tl.fma(a, a, tl.fma(b, b, tl.fma(c, c, d * d)))


@triton.jit
def _pack_signs(x):
    """Float32 columns as bytes of the signs, the lower index in the lower bits."""
    even, odd = halves(as_bits(x), 0)
    b0, b2, b4, b6 = _quarters(even)
    b1, b3, b5, b7 = _quarters(odd)
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
    gamma,
    codes,
    stored,
    mask,
    start,
    size,
    stored_size,
    mask_size,
    fmt: tl.constexpr,
    passes: tl.constexpr,
    unit: tl.constexpr,
    block: tl.constexpr,
    ragged: tl.constexpr,
):
    """What is asked for of rotated columns, elements of one row from ``start`` on."""
    y = columns * gamma
    # The last bytes of a row are filled with zeros.
    inside = _columns(start + runs(block, RUN), columns.shape[0]) < size if ragged else None
    # What y is needed for comes first, and levels last: registers hold one number an element.
    if unit > 0:
        keep = kept(columns, unit)
    if mask is not None and passes.limit > 0.0:
        limit = tl.where(keep, passes.above_limit, passes.above_threshold) if unit > 0 else passes.above_limit
        _write_mask(mask, _beyond(y, limit), inside, start, mask_size)
    if fmt.biased:
        code = biased_code(saturated(y, fmt), fmt)
    else:
        level, code = nearest(saturated(y, fmt), fmt)
    if unit > 0:
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
        at = start + runs(block, RUN)
        tl.store(codes + at, _runs_of(eight_bit, RUN), mask=at < size)
    if mask is not None and passes.limit == 0.0:
        _write_mask(mask, _beyond(y - level, passes.above_threshold), inside, start, mask_size)


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
def _quantize_row(
    x,
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
    unit: tl.constexpr,
    rotation: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
    ragged: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if whole:  # then no element has to be compared
        size = block
        stored_size = block // fmt.codes_per_byte
        mask_size = block // 8
    columns = _columns_of(x + row * row_stride, 0, size, block, span)
    if fmt.clip > 0.0:
        scale, gamma = rms_scale_pair(tl.sum(_squares(columns)), size, fmt)
        columns = rotated(columns, rotation)
    else:
        columns = rotated(columns, rotation)
        scale, gamma = scale_pair(greater(absolute_maximum(columns, None), SMALLEST_AMAX), fmt)
    if scales is not None:
        tl.store(scales + row, scale)
    if codes is not None:
        codes += row * size
    if stored is not None:
        stored += row * stored_size
    if mask is not None:
        mask += row * mask_size
    _write_part(columns, gamma, codes, stored, mask, 0, size, stored_size, mask_size, fmt, passes, unit, block, ragged)


@triton.jit
def _quantize_long_row(
    x,
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
    unit: tl.constexpr,
    rotation: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
    ragged: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x += row * row_stride
    if fmt.clip > 0.0:
        squares = tl.zeros([span // 4, block // span], tl.float64)
        for start in range(0, size, block):
            squares += _squares(_columns_of(x, start, size, block, span))
        scale, gamma = rms_scale_pair(tl.sum(squares), size, fmt)
    else:
        running = tl.zeros([span, block // span], tl.float32)
        for start in range(0, size, block):
            running = greater(running, tl.abs(rotated(_columns_of(x, start, size, block, span), rotation)))
        scale, gamma = scale_pair(greater(absolute_maximum(running, None), SMALLEST_AMAX), fmt)
    if scales is not None:
        tl.store(scales + row, scale)
    if codes is not None:
        codes += row * size
    if stored is not None:
        stored += row * stored_size
    if mask is not None:
        mask += row * mask_size
    for start in range(0, size, block):
        columns = rotated(_columns_of(x, start, size, block, span), rotation)
        _write_part(
            columns, gamma, codes, stored, mask, start, size, stored_size, mask_size, fmt, passes, unit, block, ragged
        )


# --- hadamard -------------------------------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x,
    mask,
    out,
    row_stride,
    size,
    mask_size,
    rotation: tl.constexpr,
    span: tl.constexpr,
    block: tl.constexpr,
):
    """``block`` elements of one row."""
    parts = tl.cdiv(size, block)
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = (tl.program_id(0) % parts).to(tl.int64) * block
    columns = _columns_of(x + row * row_stride, start, size, block, span)
    if mask is not None:
        at = start // 8 + runs(block // 8, RUN // 8)
        bits = _columns(tl.load(mask + row * mask_size + at, mask=at < mask_size, other=0), span // 8).to(tl.int32)
        bits = tl.reshape(tl.broadcast_to(bits[:, None, :], [span // 8, 8, block // span]), [span, block // span])
        columns = tl.where((bits >> (tl.arange(0, span) % 8)[:, None]) & 1 != 0, columns, 0.0)
    at = start + runs(block, RUN)
    rotated_runs = _runs_of(rotated(columns, rotation).to(out.dtype.element_ty), RUN)
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
    return (False, reason) if reason else supports_dtypes(dtypes)


def supports_hadamard(dtypes: tuple[torch.dtype, ...]) -> Support:
    """Whether :func:`hadamard` handles the dtype, and if not, why."""
    return supports_dtypes(dtypes)


# --- launching ------------------------------------------------------------------------------------------------------


def _shape(size: int, rotation: int, block: int) -> dict[str, int]:
    """Constants of a kernel that rotates ``block`` elements at once.

    Raises ``ValueError`` if rows of ``size`` elements cannot be rotated.
    """
    if size % rotation:
        msg = f"hadamard: {size} elements are no multiple of the block size {rotation}"
        raise ValueError(msg)
    block = max(block, rotation)
    # With 32 columns or more a thread has whole ones.
    span = max(RUN.value, min(rotation, LARGEST_SPAN, block // 32))
    per_thread = LARGEST_SPAN if rotation > 1 else UNROTATED_PER_THREAD
    return {"rotation": rotation, "span": span, "block": block, "num_warps": warps(block, per_thread)}


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
    x, fmt, masked = with_dense_rows(x), grid_of(str(q), eight_bit), estimator is not None
    codes = x.new_empty(
        (rows, size if eight_bit else 0), dtype=tensor_core_dtype(q.format) if eight_bit else torch.uint8
    )
    scales = x.new_empty((rows, 1 if scaled else 0), dtype=torch.float32)
    packed = x.new_empty((rows, q.packed_size(size) if stored else 0), dtype=torch.uint8)
    mask = x.new_empty((rows, -(-size // 8) if masked else 0), dtype=torch.uint8)
    launch(
        _quantize_row if size <= LONGEST_ROW else _quantize_long_row,
        rows,
        x,
        codes if eight_bit else None,
        scales if scaled else None,
        packed if stored else None,
        mask if masked else None,
        x.stride(0),
        size,
        packed.shape[1],
        mask.shape[1],
        fmt=fmt,
        passes=passing(str(estimator), q.format) if masked else None,
        unit=SPARSITIES[transform.sparsity].width if transform.sparsity else 0,
        whole=size == row_block(size),
        ragged=(stored and size % fmt.codes_per_byte != 0) or (masked and size % 8 != 0),
        **_shape(size, transform.rotation, row_block(size)),
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
    constants = _shape(size, block, ROTATED_BLOCK)
    # The interpreter cuts where a GPU rounds: it leaves the cast to torch.
    out = torch.empty(shape, dtype=torch.float32 if INTERPRETED else x.dtype, device=x.device)
    if mask is None or size % 8 == 0:  # then it is all one row
        count, size, mask_size = 1, count * size, count * mask_size
    launch(
        _rotate,
        count * math.ceil(size / constants["block"]),
        rows,
        None if mask is None else mask.contiguous(),
        out,
        rows.stride(0),
        size,
        mask_size,
        **constants,
    )
    moved = out.movedim(-1, axis)
    return moved if moved.stride() == x.stride() and moved.dtype == x.dtype else torch.empty_like(x).copy_(moved)
