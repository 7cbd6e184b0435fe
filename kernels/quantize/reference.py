"""Plain-torch quantize and dequantize: the definition every other provider must match bit for bit.

All arithmetic is float32. For the elements that share a scale, with M the format's largest magnitude::

    amax = max(|x|, floor)      (Quantizer.amax_floor; NaN and infinity pass through: nothing of such a row decodes to a
                                 finite value)
    s, γ = scale and its reciprocal, each rounded once from amax (absmax: s = amax / M, γ = M / amax)
           or from their root mean square, in float64 (rms: s = c / M, γ = M / c, c = α · rms + 10^-8)
    y    = x · γ, or of x rotated; a rotation does not change the root mean square of a row
    code = nearest level of min(|y|, M), sign kept; of a code book, nearest of all levels
    x̂    = s · level
    eden:  s · (Σ y² / Σ (y · level) over 128 neighbours), sums in float64, their quotient float32, the product rounded
           stochastically to a number that is stored

Shapes are written with the quantization axis moved last: x ``[..., R, K]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from qcompile.ir.formats import Format, codes_per_byte
from qcompile.ir.gaussian import clip_of
from qcompile.ir.operand import Operand
from qcompile.ir.ops import COMPENSATED, GROUP_ALIGNMENT, clamped_counts, padded_rows
from qcompile.ir.outliers import OutlierClamp
from qcompile.ir.quantizer import EDEN_CHUNK, ERROR_BITS, MOST_ERROR, RMS_FLOOR, SMALLEST_BNB_AMAX, Candidate, Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.ir.transforms import Transform
from qcompile.kernels.formula import scales as formulas
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.producer import Producer
from qcompile.kernels.transform.reference import kept, rotate

__all__ = [
    "by_grid",
    "decode",
    "dequantize",
    "dequantize_groups",
    "encode",
    "encode_compensated",
    "group_slices",
    "marks",
    "pack",
    "quantize",
    "quantize_8bit",
    "quantize_8bit_masked",
    "quantize_8bit_pair",
    "quantize_8bit_transposed",
    "quantize_compensated",
    "quantize_groups",
    "quantize_groups_pair",
    "quantize_produced",
    "recode",
    "scale_pair",
    "scaled_input",
    "swap_halves",
    "transpose_codes",
    "unpack",
]

#: Integers by size in bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def quantize(
    x: Tensor,
    quantizer: str,
    axis: int,
    global_scale: Tensor | None = None,
    seed: Tensor | None = None,
    fold: Tensor | None = None,
    transform: str = "",
) -> tuple[Tensor, Tensor]:
    """Codes ``[..., R, packed(K)]`` uint8 and scales (see :class:`Granularity`); x floating point, any strides.

    ``fold``: float32 factors with K elements; x · fold, rounded to float32, is quantized in place of x. ``transform``:
    text of a :class:`Transform` whose rotation divides K.
    """
    q, spec = Quantizer.parse(quantizer), Transform.parse(transform)
    x = x.movedim(axis, -1).float().contiguous()
    if fold is not None:
        x = x * fold.reshape(-1)
    rotated = rotate(x, spec.rotation)
    stored, reciprocal = group_scales(x, rotated, q, global_scale)
    keep = kept(rotated, spec.sparsity) if spec.sparsity else None
    y, marked = rotated * spread(reciprocal, x.shape, q), marks(stored, x.shape, q)
    codes = by_grid(q, marked, lambda of: encode(y, of, seed, keep))
    if q.rounding == "eden":
        stored = _corrected(stored, y, decode(codes, q.format), q, seed)
    return pack(codes, q.format.bits), stored


def dequantize(
    codes: Tensor,
    scales: Tensor,
    quantizer: str,
    axis: int,
    size: int,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Tensor in ``dtype`` with the quantization axis, of length ``size``, back at ``axis``."""
    q = Quantizer.parse(quantizer)
    codes = unpack(codes, q.format.bits, size)
    levels = by_grid(q, marks(scales, codes.shape, q), lambda of: decode(codes, of.format))
    scale = load_scale(scales, q, global_scale)
    return (levels * spread(scale, levels.shape, q)).to(dtype).movedim(-1, axis)


def quantize_compensated(x: Tensor, operand: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 ``[..., R, K]`` of E4M3, scales ``[..., R, 1]``, and bounds float32 ``[..., R, 3]`` of an operand
    with outliers.

    The levels of the clamped row, plus (x − clamped) · γ rounded to E4M3, saturating, where x was clamped. A row with
    a NaN or an infinity takes its absolute maximum for the scale, so that nothing of it decodes to a finite value; its
    bounds are any.
    """
    spec = Operand.parse(operand)
    assert isinstance(spec.outliers, OutlierClamp)
    x = x.movedim(axis, -1).contiguous()
    low, high = clamped_counts(spec.outliers, x.shape[-1])
    if x.numel() == 0:
        scale, bounds = (x.new_empty([*x.shape[:-1], n], dtype=torch.float32) for n in (1, 3))
        return x.new_empty(x.shape, dtype=torch.uint8), scale, bounds
    lower = x.topk(low + 1, largest=False).values[..., -1:].float()
    upper = x.topk(high + 1).values[..., -1:].float()
    x = x.float()
    largest, floor = x.abs().amax(-1, keepdim=True), spec.quantizer.amax_floor
    amax = torch.where(largest.isfinite(), torch.maximum(lower.abs(), upper.abs()).clamp(min=floor), largest)
    scale, _, reciprocal = scale_pair(amax, spec.quantizer)
    bounds = torch.cat([lower, upper, reciprocal], -1)
    return encode_compensated(x, bounds, operand, -1), scale, bounds


def quantize_produced(
    a: Tensor, b: Tensor | None, c: Tensor | None, d: Tensor | None, producer: str, operand: str
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`quantize_compensated` along the last axis of what a producer makes of a, b, c and d.

    Casts between its steps round here, as they do in eager torch; in generated code they do not.
    """
    return quantize_compensated(Producer.parse(producer).produced((a, b, c, d)), operand, -1)


def encode_compensated(x: Tensor, bounds: Tensor, operand: str, axis: int) -> Tensor:
    """The codes of :func:`quantize_compensated`, with its bounds: nothing is searched for, and elements are
    independent.
    """
    spec = Operand.parse(operand)
    x = x.movedim(axis, -1).float().contiguous()
    lower, upper, reciprocal = bounds.split(1, -1)
    clamped = x.clamp(lower, upper)
    levels = decode(encode(clamped * reciprocal, spec.quantizer), spec.quantizer.format)
    raised = levels + (x - clamped) * reciprocal
    return encode(torch.where(x == clamped, levels, raised), Quantizer.parse(COMPENSATED))


def quantize_8bit(x: Tensor, quantizer: str, packed: bool, fold: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit codes ``[R, K]``, scales ``[R, 1]``, and the stored codes (empty unless ``packed``) of x ``[R, K]``."""
    codes, scales = quantize(x, quantizer, -1, fold=fold)
    recoded = recode(codes, quantizer, x.shape[-1], False)
    return recoded, scales, codes if packed else codes.new_empty([x.shape[0], 0])


def quantize_8bit_masked(
    x: Tensor, operand: str, packed: bool, eight_bit: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`quantize_8bit`, of an operand with its transform; and the mask of its estimator, uint8 ``[R, ⌈K/8⌉]``
    (or ``[R, 0]``). 8-bit codes are uint8 ``[R, 0]`` unless ``eight_bit``.
    """
    spec = Operand.parse(operand)
    quantizer, transform = str(spec.stored), str(spec.transform)
    codes, scales = quantize(x, quantizer, -1, transform=transform)
    recoded, mask = (codes.new_empty([x.shape[0], 0]) for _ in range(2))
    if eight_bit:
        recoded = recode(codes, quantizer, x.shape[-1], False)
    if spec.estimator.kind.mask:
        mask = torch.ops.qcompile.estimator_mask(x, scales, quantizer, str(spec.estimator), -1, None, transform)
    return recoded, scales, codes if packed else codes.new_empty([x.shape[0], 0]), mask


def quantize_8bit_transposed(x: Tensor, quantizer: str, transform: str = "") -> tuple[Tensor, Tensor]:
    """8-bit codes ``[K, R]`` and scales ``[R, 1]`` of x ``[R, K]``, or of every matrix of a batch."""
    codes, scales = quantize(x, quantizer, -1, transform=transform)
    return recode(codes, quantizer, x.shape[-1], True), scales


def quantize_8bit_pair(
    x: Tensor, quantizer: str, fold: Tensor | None, fold_rows: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x ``[M, N]`` by rows and by columns: codes ``[M, N]``, scales ``[M, 1]``, codes ``[N, M]``, scales ``[N, 1]``."""
    by_rows, by_columns = quantize(x, quantizer, -1, fold=fold), quantize(x, quantizer, 0, fold=fold_rows)
    return (
        recode(by_rows[0], quantizer, x.shape[1], False),
        by_rows[1],
        recode(by_columns[0], quantizer, x.shape[0], False),
        by_columns[1],
    )


def quantize_groups(x: Tensor, quantizer: str, axis: int, offs: Tensor, fold: Tensor) -> tuple[Tensor, Tensor]:
    """x ``[M, N]`` · fold, whose rows are in groups that end at ``offs``, in a format of 8 bits.

    Along axis 1, fold being float32 ``[E, N, 1]``: codes uint8 ``[M, N]`` and scales ``[M, 1]``; 0 and 1 beyond the
    last group. Along axis 0, fold being ``[M, 1]``: codes ``[N, padded_rows(M, E)]``, those of each group from a
    multiple of ``GROUP_ALIGNMENT`` on and zeros after them, and scales ``[E, N, 1]``, one for a column and group.
    """
    (rows, size), groups = x.shape, offs.shape[0]
    if axis % 2:
        codes, scales = x.new_zeros([rows, size], dtype=torch.uint8), x.new_ones([rows, 1], dtype=torch.float32)
        for group, (own, _) in enumerate(group_slices(offs)):
            codes[own], scales[own] = quantize(x[own], quantizer, -1, fold=fold[group])
        return codes, scales
    codes = x.new_zeros([size, padded_rows(rows, groups)], dtype=torch.uint8)
    scales = x.new_empty([groups, size, 1], dtype=torch.float32)
    for group, (own, place) in enumerate(group_slices(offs)):
        codes[:, place], scales[group] = quantize(x[own], quantizer, 0, fold=fold[own])
    return codes, scales


def quantize_groups_pair(
    x: Tensor, quantizer: str, offs: Tensor, fold: Tensor, fold_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`quantize_groups` of x · fold by rows and of x · fold_rows by columns."""
    by_rows = quantize_groups(x, quantizer, 1, offs, fold)
    return *by_rows, *quantize_groups(x, quantizer, 0, offs, fold_rows)


def dequantize_groups(
    codes: Tensor, scales: Tensor, quantizer: str, offs: Tensor, size: int, dtype: torch.dtype
) -> Tensor:
    """``[N, size]`` from the codes ``[N, P]`` and scales ``[E, N, 1]`` that :func:`quantize_groups` makes along axis 0;
    any numbers beyond the last group. The host waits for nothing.
    """
    row = torch.arange(size, device=codes.device)
    group = torch.bucketize(row, offs, right=True).clamp(max=offs.shape[0] - 1)
    sizes = offs.diff(prepend=offs.new_zeros(1)).long()
    whole = (sizes + GROUP_ALIGNMENT - 1) // GROUP_ALIGNMENT * GROUP_ALIGNMENT
    place = row + (whole.cumsum(0) - whole - offs + sizes)[group]
    levels = decode(codes[:, place.clamp(max=codes.shape[1] - 1)], Quantizer.parse(quantizer).format)
    return (levels * scales[group, :, 0].t()).to(dtype)


def group_slices(offs: Tensor) -> Iterator[tuple[slice, slice]]:
    """The rows of every group, and those it has where each begins at a multiple of ``GROUP_ALIGNMENT``."""
    start = place = 0
    for end in offs.tolist():
        end = max(start, end)
        yield slice(start, end), slice(place, place + end - start)
        place += -(-(end - start) // GROUP_ALIGNMENT) * GROUP_ALIGNMENT
        start = end


def recode(codes: Tensor, quantizer: str, size: int, transposed: bool, offs: Tensor | None = None) -> Tensor:
    """Stored codes ``[R, packed(K)]`` as 8-bit tensor-core codes ``[R, K]`` (or ``[K, R]``), contiguous; also a batch
    of them. With ``offs``, where groups of rows end, transposed, ``[K, padded_rows(R, E)]`` as :func:`quantize_groups`
    has them.
    """
    fmt = Quantizer.parse(quantizer).format
    values = decode(unpack(codes, fmt.bits, size), fmt) * fmt.tensor_core_factor - fmt.tensor_core_offset
    values = values.to(tensor_core_dtype(fmt))
    if offs is None:
        return values.mT.contiguous() if transposed else values
    padded = values.new_zeros([size, padded_rows(values.shape[0], offs.shape[0])])
    for own, place in group_slices(offs):
        padded[:, place] = values[own].t()
    return padded


def transpose_codes(codes: Tensor, size: int) -> Tensor:
    """Stored 4-bit codes ``[R, ⌈K/2⌉]`` of ``size`` columns as those of the transpose, ``[K, ⌈R/2⌉]``, contiguous."""
    return pack(unpack(codes, 4, size).t().contiguous(), 4)


def scaled_input(
    x: Tensor,
    scales: Tensor,
    quantizer: str,
    axis: int,
    global_scale: Tensor | None = None,
    transform: str = "",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y = x / s`` in grid units (float32, axis last), x rotated if it is, and each element's level: the nearest one,
    0 where sparsity drops it. Of a pair of grids also whether each element is in a block that has the second.
    """
    q, spec = Quantizer.parse(quantizer), Transform.parse(transform)
    q = replace(q, rounding=q.nearest)
    x = x.movedim(axis, -1).float().contiguous()
    rotated = rotate(x, spec.rotation)
    stored, reciprocal = group_scales(x, rotated, q, global_scale)
    marked = marks(stored, x.shape, q)
    y = rotated * spread(reciprocal, x.shape, q)
    keep = kept(rotated, spec.sparsity) if spec.sparsity else None
    return y, by_grid(q, marked, lambda of: decode(encode(y, of, keep=keep), of.format)), marked


# --- the two grids of a pair ----------------------------------------------------------------------------------------


def marks(stored: Tensor, shape: torch.Size, q: Quantizer) -> Tensor | None:
    """Bool for every element of a tensor of ``shape``, whether the scale of its block has its sign set: such blocks
    have the second grid of a pair. ``None`` if there is no pair.
    """
    if not q.format.grids:
        return None
    bits = stored.view(_BITS[stored.element_size()])
    return spread(bits >= 128 if bits.dtype == torch.uint8 else bits < 0, shape, q)


def by_grid(q: Quantizer, marked: Tensor | None, compute: Callable[[Quantizer], Tensor]) -> Tensor:
    """``compute`` of q with the grid of each element's block for a format."""
    if marked is None:
        return compute(q)
    first, second = (compute(replace(q, format=grid)) for grid in q.format.choices)
    return torch.where(marked, second, first)


# --- scales ---------------------------------------------------------------------------------------------------------


def group_scales(x: Tensor, rotated: Tensor, q: Quantizer, global_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Stored scales and float32 γ of every group; of a rule with candidates those whose codes, rounded to the nearest,
    err least.
    """
    statistic = group_statistic(x, rotated, q)
    stored, scale, reciprocal = _of_candidate(q.candidates[0], statistic, q, global_scale)
    if len(q.candidates) > 1 and x.numel():
        q = replace(q, rounding=q.nearest)
        least = _error(rotated, statistic, scale, reciprocal, replace(q, format=q.candidates[0].grid))
        for candidate in q.candidates[1:]:
            other, scale, other_reciprocal = _of_candidate(candidate, statistic, q, global_scale)
            error = _error(rotated, statistic, scale, other_reciprocal, replace(q, format=candidate.grid))
            better = error < least
            bits = _BITS[stored.element_size()]
            stored = torch.where(better, other.view(bits), stored.view(bits)).view(stored.dtype)
            least = torch.where(better, error, least)
            reciprocal = torch.where(better, other_reciprocal, reciprocal)
    return stored, reciprocal


def _corrected(stored: Tensor, y: Tensor, levels: Tensor, q: Quantizer, seed: Tensor | None) -> Tensor:
    """The stored scales of ``eden``, from y and its levels ``[..., R, K]``."""
    if y.numel() == 0:
        return stored
    n, size = q.granularity.size, y.shape[-1]
    squares, products = (
        _blocks(values, -1, EDEN_CHUNK).sum(-1) for values in (y.double().square(), y.double() * levels.double())
    )
    quotient = torch.where(products == 0, 1.0, squares / products).float()
    quotient = quotient.repeat_interleave(EDEN_CHUNK // n, -1)[..., : -(-size // n)]
    scale, magnitudes = stored.float() * quotient, formulas.stored_format(q.scale.store).magnitudes
    index = _stochastic_index(scale.nan_to_num(0.0).clamp(max=magnitudes[-1]), magnitudes, seed).to(torch.uint8)
    return torch.where(scale.isnan(), 0x7F, index).to(torch.uint8).view(stored.dtype)  # one of the two codes of NaN


def _of_candidate(
    candidate: Candidate, statistic: Tensor, q: Quantizer, global_scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`scale_pair`; the stored scale with its sign set if the candidate is marked."""
    of = replace(q, format=candidate.grid)
    stored, scale, reciprocal = scale_pair(statistic, of, global_scale, candidate.factor)
    if candidate.marked:
        bits = stored.view(_BITS[stored.element_size()])
        stored = (bits | (128 if bits.dtype == torch.uint8 else torch.iinfo(bits.dtype).min)).view(stored.dtype)
    return stored, scale, reciprocal


def _error(x: Tensor, amax: Tensor, scale: Tensor, reciprocal: Tensor, q: Quantizer) -> Tensor:
    """Int64 Σ n², or Σ |n|, of every group, where n is s · level − x as a count of units of 2^(⌊log2 amax⌋ − 19), at
    most 2²¹ of them. All n of a group that is not finite are 0 or 2²¹.
    """
    level = decode(encode(x * spread(reciprocal, x.shape, q), q), q.format)
    exponent = ERROR_BITS + 1 - torch.frexp(amax.clamp(min=2.0**-126)).exponent
    unit = torch.where(amax.isfinite(), _power_of_two(exponent), 0.0)
    count = (level * spread(scale, x.shape, q) - x) * spread(unit, x.shape, q)
    count = torch.where(count.abs() <= MOST_ERROR, count, MOST_ERROR).round().long()
    counted = count.square() if q.scale.error == "squared" else count.abs()
    return _over_groups(counted, q, Tensor.sum).reshape(scale.shape)


def group_statistic(x: Tensor, rotated: Tensor, q: Quantizer) -> Tensor:
    """What the scales follow from, in their shape, for every group of elements that shares one.

    The absolute maximum of ``rotated``, float32, never below the floor; or the root mean square, float64, so that the
    order of summation does not show once a scale is rounded. That of whole rows is taken from x, where it is the same.
    """
    shape = q.scale_shape(tuple(x.shape))
    if x.numel() == 0:
        return x.new_full(shape, q.amax_floor)
    if q.scale.statistic == "amax":
        return _over_groups(rotated.abs(), q, Tensor.amax).reshape(shape).clamp(min=q.amax_floor)
    source = (x if q.granularity.kind in ("row", "tensor") else rotated).double()
    count = _over_groups(torch.ones_like(source), q, Tensor.sum)
    return (_over_groups(source.square(), q, Tensor.sum) / count).sqrt().reshape(shape)


def _over_groups(values: Tensor, q: Quantizer, reduce: Callable[..., Tensor]) -> Tensor:
    """``reduce`` over the elements that share a scale; where a last block is short, zeros fill it up."""
    n = q.granularity.size
    match q.granularity.kind:
        case "tensor":
            return reduce(values)
        case "row":
            return reduce(values, -1)
        case "block":
            return reduce(_blocks(values, -1, n), -1)
    return reduce(_blocks(reduce(_blocks(values, -1, n), -1), -2, n), -1)


def _blocks(x: Tensor, dim: int, n: int) -> Tensor:
    """Cut ``dim`` into ⌈size/n⌉ blocks (zero-padded); the elements of a block become the last axis."""
    x = x.movedim(dim, -1)
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % n))
    return x.unflatten(-1, (-1, n)).movedim(-2, dim - 1)


def spread(values: Tensor, shape: torch.Size, q: Quantizer) -> Tensor:
    """Expand per-group ``values`` so that they broadcast against a tensor of ``shape``."""
    n = q.granularity.size
    if q.granularity.kind in ("block", "square"):
        values = values.repeat_interleave(n, -1)[..., : shape[-1]]
    if q.granularity.kind == "square":
        values = values.repeat_interleave(n, -2)[..., : shape[-2], :]
    return values


def scale_pair(
    amax: Tensor, q: Quantizer, global_scale: Tensor | None = None, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Stored scale, float32 scale s and float32 reciprocal γ for absolute maxima ``amax`` (float32), or for root mean
    squares (float64). ``factor``: of a candidate other than the first, on the scale.

    Raises ``ValueError`` if the scale rule has two levels and there is no global scale.
    """
    q.check_global_scale(global_scale)
    largest = q.format.max
    match q.scale.name:
        case "rms":
            clip = clip_of(q.format.name) * amax.double() + RMS_FLOOR
            scale = (clip / torch.full_like(clip, largest)).float()
            return scale, scale, (torch.full_like(clip, largest) / clip).float()
        case "absmax":
            scale = amax / torch.full_like(amax, largest)
            return scale, scale, _ratio(largest, amax)
        case "absmax_bnb":
            scale = amax / torch.full_like(amax, largest)
            return scale, scale, _ratio(largest, amax.clamp(min=SMALLEST_BNB_AMAX * max(largest, 1.0)))
        case "absmax_pow2":
            # γ = 2^⌊log2(M / amax)⌋; frexp's exponent is exact where a float32 log2 is not.
            exponent = torch.frexp(_ratio(largest, amax)).exponent - 1
            scale = _finite_or_nan(_power_of_two(-exponent), amax)
            return scale, scale, _power_of_two(exponent)
        case "e8m0":
            exponent = (torch.frexp(amax).exponent - 1 - q.format.max_exponent).clamp(-127, 127)
            byte = torch.where(amax.isfinite(), exponent + 127, 255).to(torch.uint8)
            return byte, load_scale(byte, q), _power_of_two(-exponent)
    if q.scale.name not in ("e4m3", "e4m3_46"):
        return _scale_pair_of_formula(amax, q, global_scale, factor)
    assert global_scale is not None
    stored = (amax / torch.full_like(amax, largest) * factor / global_scale).clamp(max=448.0).to(torch.float8_e4m3fn)
    scale = load_scale(stored, q, global_scale)
    return stored, scale, torch.where(scale == 0, 0.0, 1.0 / scale)


def _scale_pair_of_formula(
    statistic: Tensor, q: Quantizer, global_scale: Tensor | None, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`scale_pair` of a rule that is told by its formula alone, evaluated in torch."""
    inputs = (statistic, *_if_given(global_scale))
    number = q.scale.candidates.index(factor)
    stored = evaluate(formulas.stored_scale(q, number), *inputs)
    dtype = getattr(torch, q.scale.storage)
    if dtype != torch.float32:
        stored = stored.to(_BITS[dtype.itemsize]).view(dtype)
    return stored, load_scale(stored, q, global_scale), evaluate(formulas.reciprocal(q, number), *inputs)


def load_scale(stored: Tensor, q: Quantizer, global_scale: Tensor | None = None) -> Tensor:
    """The float32 scale that stored scales stand for."""
    q.check_global_scale(global_scale)
    if q.scale.store == "ue5m3":
        return evaluate(formulas.load_scale(q), stored.to(torch.int32), *_if_given(global_scale))
    if q.scale.store == "e8m0":
        number = torch.where(stored == 255, float("nan"), _power_of_two(stored.to(torch.int32) - 127))
    else:
        number = stored.float()
    number = number.abs() if q.format.grids else number
    return number if global_scale is None else number * global_scale


def _if_given(global_scale: Tensor | None) -> tuple[Tensor, ...]:
    return () if global_scale is None else (global_scale,)


def _ratio(numerator: float, amax: Tensor) -> Tensor:
    """One correctly rounded division. With a Python number on either side torch multiplies by a reciprocal (on CUDA at
    least).
    """
    return torch.full_like(amax, numerator) / amax


def _power_of_two(exponent: Tensor) -> Tensor:
    """Exact float32 2^exponent, built from its bits; exponents of normal numbers, and −127, the smallest of E8M0."""
    exponent = exponent.to(torch.int32).clamp(-127, 127)
    return torch.where(exponent == -127, 1 << 22, (exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _finite_or_nan(scale: Tensor, amax: Tensor) -> Tensor:
    return torch.where(amax.isfinite(), scale, float("nan"))


# --- codes ----------------------------------------------------------------------------------------------------------


def encode(y: Tensor, q: Quantizer, seed: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
    """Unpacked uint8 codes of float32 values in grid units; saturating. NaN takes the highest level.

    Elements that are not in ``keep`` (bool, like y) take the code of 0.
    """
    by_book = q.format.codebook
    codes = _encode_by_book(y, q, seed) if by_book else _encode(y, replace(q, format=q.format.grid), seed)
    if q.format.pruned:  # one magnitude more, the first; and one bit more, below the sign
        index, sign = codes & (2 ** (q.format.bits - 2) - 1), codes >> (q.format.bits - 2)
        codes = (index + 1) | (sign << (q.format.bits - 1))
    return codes if keep is None else torch.where(keep, codes, codes.new_full((), q.format.zero_code))


def _encode_by_book(y: Tensor, q: Quantizer, seed: Tensor | None) -> Tensor:
    """Codes of a code book: y's rank among the sorted levels, and the code of the level there. Ties: to the lower
    level, or to the higher one (``half_up``).
    """
    book = q.format.codebook
    # Of two zeros −0.0 comes first, and is left to numbers with that sign.
    order = sorted(range(len(book)), key=lambda code: (book[code], math.copysign(1.0, book[code])))
    zeros = [code for code in order if book[code] == 0]
    if len(zeros) == 2:
        order.remove(zeros[0])
    levels = tuple(book[code] for code in order)
    y = y.clamp(levels[0], levels[-1]).nan_to_num(levels[-1])
    if q.rounding == "stochastic":
        rank = _stochastic_index(y, levels, seed)
    else:
        midpoints = torch.tensor([(low + high) / 2 for low, high in pairwise(levels)], device=y.device)
        rank = torch.bucketize(y, midpoints, right=q.rounding == "half_up")
    codes = torch.tensor(order, dtype=torch.uint8, device=y.device)[rank.long()]
    return torch.where((codes == zeros[1]) & y.signbit(), zeros[0], codes) if len(zeros) == 2 else codes


def _encode(y: Tensor, q: Quantizer, seed: Tensor | None) -> Tensor:
    fmt = q.format
    negative = torch.signbit(y) & ~y.isnan() if fmt.has_zero else y < 0
    magnitude = y.abs().nan_to_num(fmt.max).clamp(max=fmt.max)
    if q.rounding == "stochastic":
        index = _stochastic_index(magnitude, fmt.magnitudes, seed)
    elif fmt.torch_dtype:
        index = magnitude.to(getattr(torch, fmt.torch_dtype)).view(torch.uint8).to(torch.int32)
    else:
        index = _nearest_index(magnitude, negative, fmt, q.rounding)
    return (index + (negative.to(torch.int32) << (fmt.bits - 1))).to(torch.uint8)


def _nearest_index(magnitude: Tensor, negative: Tensor, fmt: Format, rounding: str) -> Tensor:
    """Index of the nearest magnitude. Ties: to the even index, or toward +∞ (up when positive, down when negative)."""
    thresholds = torch.tensor(fmt.thresholds, device=magnitude.device)
    below = torch.bucketize(magnitude, thresholds, right=False).to(torch.int32)  # ties down
    above = torch.bucketize(magnitude, thresholds, right=True).to(torch.int32)  # ties up
    if rounding == "half_up":
        return torch.where(negative, below, above)
    return torch.where(below % 2 == 0, below, above)


def _stochastic_index(magnitude: Tensor, levels: tuple[float, ...], seed: Tensor | None) -> Tensor:
    """Index of the level below or the one above, within ``levels``, which ascend."""
    assert seed is not None, "stochastic rounding needs a seed tensor"
    index = torch.zeros_like(magnitude, dtype=torch.int32)
    fraction = torch.zeros_like(magnitude)
    # Level by level with Python numbers: copying a table to a GPU could not be recorded in a CUDA graph.
    for i, (low, high) in enumerate(pairwise(levels)):
        above = magnitude >= low
        index = torch.where(above, i, index)
        fraction = torch.where(above, (magnitude - low) / (high - low), fraction)
    return index + (uniform(magnitude, seed) < fraction).to(torch.int32)


def uniform(like: Tensor, seed: Tensor) -> Tensor:
    """One float32 in [0, 1) per element of ``like``, a hash of (seed, element index): the same on every device."""
    state = torch.arange(like.numel(), dtype=torch.int64, device=like.device).view(like.shape)
    state = (state + seed.to(torch.int64) * 0x9E3779B1) & 0xFFFFFFFF
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):  # Wellons' "lowbias32" finalizer
        state = ((state ^ (state >> shift)) * factor) & 0xFFFFFFFF
    state = state ^ (state >> 15)
    return (state >> 8).float() * 2.0**-24


def decode(codes: Tensor, fmt: Format) -> Tensor:
    """Float32 levels of unpacked codes."""
    if fmt.torch_dtype:
        return codes.to(torch.uint8).view(getattr(torch, fmt.torch_dtype)).float()
    return torch.tensor(fmt.levels, device=codes.device)[codes.to(torch.int64)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes along the last axis, lower index in the lower bits; a short last byte is filled with zeros."""
    per_byte = codes_per_byte(bits)
    if per_byte == 1:
        return codes
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    width = 8 // per_byte
    packed = codes[..., 0]
    for i in range(1, per_byte):
        packed = packed | (codes[..., i] << (width * i))
    return packed


def swap_halves(packed: Tensor) -> Tensor:
    """Bytes of two codes with these swapped: bitsandbytes has the first one in the high half, we in the low one."""
    return (packed << 4) | (packed >> 4)


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """Inverse of :func:`pack` for ``size`` codes per row."""
    per_byte = codes_per_byte(bits)
    if per_byte == 1:
        return packed
    width = 8 // per_byte
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=packed.device) * width
    # Not `>>`, which has no symbolic shapes.
    codes = torch.bitwise_right_shift(packed.unsqueeze(-1), shifts) & (2**width - 1)
    return codes.flatten(-2)[..., :size]
