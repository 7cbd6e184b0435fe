"""Rotated, masked and sparse operands quantized in one pass in Triton, equal to the references bit for bit.

How elements are assigned to threads: rows that a tensor descriptor can address, of half-integers, are fetched into
swizzled shared memory two rows ahead by persistent programs, and read from there as columns
(:mod:`qcompile.kernels.transform.triton`). Other rows are read 16 neighbours per thread, one program per row, and
exchanged through shared memory while they have 16 bits. Sums, rounding, masks and packing happen in the thread too, and
only codes go back through shared memory to be written in lines.

Per element of a 16-bit x, in bytes of device memory:

* **by rows** (2 in; 1 out as 8-bit codes, up to 1 as stored codes, ⅛ as mask, whichever are asked for): sum of squares
  in float64, rotation, scale, codes and mask in one pass. Rows longer than ``LONGEST_ROW`` are read twice.
* **by rows that are not transformed**, where levels are looked up or a mask needs them: :mod:`.triton_rows`.
* **transposed** (2 in, up to 1 out as stored codes; these in again, 1 out).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.operand import Operand
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.ir.transforms import SPARSITIES, Transform
from qcompile.kernels.estimate import reference as estimate_reference
from qcompile.kernels.quantize import reference as quantize_reference
from qcompile.kernels.quantize.grid import Grid, Passing, grid_of, passing, unsupported
from qcompile.kernels.quantize.triton import missing_conversion, recode, supports_recode
from qcompile.kernels.quantize.triton_codes import (
    biased_code,
    biased_level,
    eighths,
    nearest,
    pack_bits,
    pack_codes,
    rms_scale_pair,
    saturated,
    tensor_core_code,
)
from qcompile.kernels.quantize.triton_rows import write_rows
from qcompile.kernels.transform.triton import (
    LARGEST_SPAN,
    Part,
    as_columns,
    columns_of,
    interleave,
    kept,
    part_of,
    rotated,
    runs_of,
    widened,
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
    with_dense_rows,
)

__all__ = [
    "estimator_mask",
    "quantize",
    "quantize_8bit_masked",
    "quantize_8bit_transposed",
    "supports_estimator_mask",
    "supports_quantize",
    "supports_quantize_8bit_masked",
    "supports_quantize_8bit_transposed",
]

Support = tuple[bool, str]

#: Warps of persistent programs, which take row after row: as many as leave 128 registers to a thread.
RESIDENT_WARPS = 16
#: Scales up to here are those of rows without NaN or infinity, whose rotation has none either.
LARGEST_PLAIN_SCALE = tl.constexpr(2.0**64)

#: PTX: a copy of $1, and a reason to branch around it: threads wait for each other.
_STAY = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")
#: PTX: the highest bits of $1 … $8, that of $1 highest.
_SHIFT_IN = tl.constexpr(
    "{.reg .b32 bits; shr.u32 bits, $1, 31;"
    + "".join(f"shf.l.wrap.b32 bits, ${i}, bits, 1;" for i in range(2, 9))
    + "mov.b32 $0, bits;}"
)


@triton.jit
def _squares(columns):
    """Float64, an eighth of the columns: sums of squares; each square is exact."""
    parts = eighths(columns.to(tl.float64), 0)
    total = parts[0] * parts[0]
    for i in tl.static_range(1, 8):
        total = tl.fma(parts[i], parts[i], total)
    return total


@triton.jit
def _pack_signs(x):
    """Float32 columns as bytes of the signs, the lower index in the lower bits."""
    b0, b1, b2, b3, b4, b5, b6, b7 = eighths(as_bits(x), 0)
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
    inside = as_columns(start + runs(part.block, RUN), part.span) < size if part.ragged else None
    # What y is needed for comes first, and levels last: registers hold one number per element.
    if part.unit > 0:
        keep = kept(columns, part.unit)
    if mask is not None and passes.by_limits(part.unit > 0):
        limit = tl.where(keep, passes.above_limit, passes.above_limit_at_zero) if part.unit > 0 else passes.above_limit
        beyond = _beyond(y, limit)
        _write_mask(mask, _pack_signs(beyond if inside is None else tl.where(inside, beyond, 0.0)), start, mask_size)
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
            tl.store(codes + at, runs_of(eight_bit, RUN), mask=at < size)
        if mask is not None and not passes.by_limits(part.unit > 0):
            keeps = passes.keeps(y, level)
            _write_mask(mask, pack_bits(keeps if inside is None else keeps & inside, 0), start, mask_size)


@triton.jit
def _write_words(y, codes, stored, start, size, fmt: tl.constexpr):
    """8-bit and stored codes of scaled columns, not NaN and below 2¹⁵, eight neighbours at once."""
    y0, y1, y2, y3, y4, y5, y6, y7 = eighths(y, 0)
    first, second, packed = tl.inline_asm_elementwise(
        fmt.encode_eight,
        "=r,=r,=r,f,f,f,f,f,f,f,f",
        [y0, y1, y2, y3, y4, y5, y6, y7],
        dtype=(tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    if codes is not None:
        _store_words(codes, interleave(first, second), start // 4, size // 4)
    if stored is not None:
        _store_words(stored, packed, start // 8, size // 8)


@triton.jit
def _store_words(target, columns, start, size):
    """Columns of int32 to the row ``target``."""
    run: tl.constexpr = min(4, columns.shape[0])
    at = start + runs(columns.shape[0] * columns.shape[1], run)
    tl.store(target.to(tl.pointer_type(tl.int32)) + at, runs_of(columns, run), mask=at < size)


@triton.jit
def _write_stored(stored, code, inside, start, stored_size, fmt: tl.constexpr):
    if inside is not None:
        code = tl.where(inside, code, fmt.blank)
    packed = pack_codes(code, fmt, 0)
    run: tl.constexpr = min(RUN, packed.shape[0])
    at = start // fmt.codes_per_byte + runs(packed.shape[0] * packed.shape[1], run)
    tl.store(stored + at, runs_of(packed, run), mask=at < stored_size)


@triton.jit
def _write_mask(mask, bits, start, mask_size):
    run: tl.constexpr = bits.shape[0]  # they are where they are written from
    at = start // 8 + runs(run * bits.shape[1], run)
    tl.store(mask + at, runs_of(bits, run), mask=at < mask_size)


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
    columns = columns_of(x + row * row_stride, 0, sizes[0], part)
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
        _write_row(widened(columns), row, codes, scales, stored, mask, sizes, fmt, passes, part)


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
            squares += _squares(columns_of(x, start, size, part))
        scale, gamma = rms_scale_pair(tl.sum(squares), size, fmt)
    else:
        running = tl.zeros([span, block // span], tl.float32)
        for start in range(0, size, block):
            running = greater(running, tl.abs(rotated(columns_of(x, start, size, part), part.rotation)))
        scale, gamma = fmt.scale_pair(greater(absolute_maximum(running, None), fmt.amax_floor))
    if scales is not None:
        tl.store(scales + row, scale)
    for start in range(0, size, block):
        columns = rotated(columns_of(x, start, size, part), part.rotation)
        _write_part(columns, scale, gamma, row, codes, stored, mask, start, sizes, fmt, passes, part)


# --- what is supported -----------------------------------------------------------------------------------------------


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


# --- launching -------------------------------------------------------------------------------------------------------


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


def _is_plain(fmt: Grid, passes: Passing | None, part: Part) -> bool:
    """Whether no element meets another one, and levels are looked up or a mask needs them: the kernel of such rows
    holds 16-bit elements as they are.
    """
    alone = part.rotation == 1 and part.unit == 0 and not fmt.of_squares
    return alone and (fmt.buckets is not None if passes is None else not passes.by_limits(sparse=False))


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
    estimator: EstimatorSpec | None = None,
    eight_bit: bool = False,
    stored: bool = False,
    scaled: bool = True,
) -> list[Tensor]:
    """8-bit codes, scales, stored codes and mask of x ``[R, K]``; empty, ``[R, 0]``, where they are not wanted."""
    rows, size = x.shape
    x, fmt = with_dense_rows(x), grid_of(str(q), eight_bit)
    passes = passing(str(estimator), q.format) if estimator is not None else None
    masked = passes is not None
    part = part_of(
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
    wanted = ((codes, eight_bit), (scales, scaled), (packed, stored), (mask, masked))
    outputs = [output if is_wanted else None for output, is_wanted in wanted]
    if _is_plain(fmt, passes, part):
        write_rows(x, fmt, passes, *outputs)
        return [codes, scales, packed, mask]
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
        *outputs,
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
    return recode(codes, quantizer, x.shape[-1], True), scales


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
    q, rule = Quantizer.parse(quantizer), EstimatorSpec.parse(estimator)
    mask = _by_rows(rows, q, Transform.parse(transform), rule, scaled=False)[3]
    return mask.reshape(*shape[:-1], -1)
