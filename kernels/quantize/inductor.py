"""Quantize and dequantize as Inductor loop bodies: generated Triton that fuses with the ops around it.

The formulas are those of :mod:`qcompile.kernels.quantize.reference`, and codes and scales are equal to its
bit for bit. They are written with ``ops.*`` (one value per name) instead of as a decomposition into aten ops,
which Inductor would expand again at every use. What is special to a generated kernel:

* A row's elements are read as ``[⌈K/p⌉, p]``, p codes to a byte, by the absolute maximum and by the encoder
  alike. Both loops then have as many iterations as there are bytes, so Inductor makes one kernel of them, and
  of the producer of x.
* Scales divide with :func:`exact_div`; Triton's ``/`` is an approximation in float32.
* No product is added to anything unless it is exact, so contraction to fused multiply-adds changes nothing.
* A format is encoded and decoded from its data (:func:`encode`, :func:`decode`); no format is known by name.

Index tuples are of x with the quantization axis moved last: ``[..., r, k]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, lowerings
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import CeilDiv, FloorDiv, ModularIndexing

from qcompile.ir.formats import Format
from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype

from .grid import bits_of, minifloat, uniform_offset

__all__ = [
    "GridUnits",
    "axis_last",
    "index_of_moved",
    "is_empty",
    "lower_dequantize",
    "lower_quantize",
    "lower_quantize_8bit",
    "packed_bytes",
    "rounded",
    "run_reference",
    "select",
    "supports_dequantize",
    "supports_quantize",
    "supports_scales",
    "threshold_bits",
]

#: A value inside a loop body, and an index tuple.
Value = Any
Index = Sequence[sympy.Expr]

_FP32, _INT32 = torch.float32, torch.int32
_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23
#: float32 numbers around 1.5·2²³ are one apart: adding it rounds to the nearest integer, ties to even, which
#: then stands in the low mantissa bits. Two additions; a conversion to an integer runs at a quarter of their
#: rate.
_ROUNDER = 1.5 * 2.0**_MANTISSA_BITS
#: Most magnitudes for which comparisons and selections are generated.
_MAX_SELECTED = 16


# --- what is supported --------------------------------------------------------------------------------------


def supports_quantize(q: Quantizer, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_quantize` generates code for ``q``, and if not, why."""
    if q.rounding == "stochastic":
        return False, "stochastic rounding is not generated"
    if q.scale.statistic != "amax":
        return False, f"{q.scale.name} scales are not generated"
    if q.format.pruned:
        return False, f"{q.format.name} rounds to the levels of {q.format.pruned}"
    if not (q.format.torch_dtype or uniform_offset(q.format) is not None or _selectable(q.format)):
        reason = f"{q.format.name} has too many levels for comparisons, no even spacing and no torch dtype"
        return False, reason
    return supports_scales(q, device)


def supports_dequantize(q: Quantizer, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_dequantize` generates code for ``q``, and if not, why."""
    fmt = q.format
    by_bits = fmt.torch_dtype or uniform_offset(fmt) is not None or minifloat(fmt) is not None
    if not (by_bits or _selectable(fmt)):
        return False, f"{fmt.name} has too many levels for selections and is no number format of known layout"
    return supports_scales(q, device)


def _selectable(fmt: Format) -> bool:
    return len(fmt.magnitudes) <= _MAX_SELECTED


def supports_scales(q: Quantizer, device: torch.device | None) -> tuple[bool, str]:
    """Whether the device has the conversions of ``q``: Triton has E4M3's from compute capability 8.9 on."""
    needs_e4m3 = "float8_e4m3fn" in (q.format.torch_dtype, q.scale.storage)
    if needs_e4m3 and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device if device and device.type == "cuda" else None)
        if capability < (8, 9):
            return False, f"E4M3 needs compute capability 8.9, this device has {capability}"
    return True, ""


def run_reference(op: torch._ops.OpOverload, *args):
    """Call the op's own kernel from the generated program (an extern call)."""
    return fallback_handler(op, add_to_fallback_set=False)(*args)


def is_empty(*tensors: ir.TensorBox) -> bool:
    """Whether one is known to have no elements: there is no loop to generate then."""
    return any(size == 0 for tensor in tensors for size in tensor.get_size())


# --- the two ops --------------------------------------------------------------------------------------------


def lower_quantize(x, quantizer: str, axis: int, global_scale=None, seed=None, fold=None, transform: str = ""):
    """``qcompile::quantize``: codes ``[..., R, packed(K)]`` and scales; loops where Triton is generated."""
    q = Quantizer.parse(quantizer)
    supported = not transform and supports_quantize(q, x.get_device())[0]
    if not ir.is_triton(x) or is_empty(x) or not supported:
        arguments = (x, quantizer, axis, global_scale, seed, fold, transform)
        return run_reference(torch.ops.qcompile.quantize.default, *arguments)
    units = GridUnits(x, q, axis, q.format.codes_per_byte, global_scale, fold)
    codes = packed_bytes(units, lambda index, byte: encode(units.load(index, byte), q))
    return codes, units.stored_scale()


def lower_quantize_8bit(x, quantizer: str, packed: bool, fold=None):
    """``qcompile::quantize_8bit``: loops that fuse with what computes x.

    The op's own kernel runs where x lies in memory, and where packed codes are wanted too: a loop that makes both reads
    x in strides, and a second one over the 8-bit codes takes longer than x takes to be written and read. (On an H200
    the two loops took 155 µs behind a norm and 688 µs behind SwiGLU, 16384 rows; the producer at the speed of memory
    and the op's kernel as measured are 127 and 621 µs.)
    """
    q = Quantizer.parse(quantizer)
    fused = ir.is_triton(x) and not (packed or is_empty(x) or is_in_memory(x))
    if not fused or not supports_quantize(q, x.get_device())[0]:
        return run_reference(torch.ops.qcompile.quantize_8bit.default, x, quantizer, packed, fold)
    units = GridUnits(x, q, 1, 1, fold=fold)
    rows, size = units.shape
    codes = ir.Pointwise.create(
        device=units.device,
        dtype=tensor_core_dtype(q.format),
        inner_fn=lambda index: tensor_core_code(units.load(index, index[-1]), q),
        ranges=[rows, size],
    )
    empty = lowerings[torch.ops.aten.empty.memory_format]([rows, 0], dtype=torch.uint8, device=units.device)
    return codes, units.stored_scale(), empty


def lower_dequantize(codes, scales, quantizer: str, axis: int, size, dtype: torch.dtype, global_scale=None):
    """``qcompile::dequantize``: the tensor in ``dtype``, as a loop that fuses where Triton is generated."""
    q = Quantizer.parse(quantizer)
    if not ir.is_triton(codes) or is_empty(codes) or not supports_dequantize(q, codes.get_device())[0]:
        args = (codes, scales, quantizer, axis, size, dtype, global_scale)
        return run_reference(torch.ops.qcompile.dequantize.default, *args)
    load_codes, load_scales = codes.make_loader(), scales.make_loader()
    load_global = global_scale.make_loader() if global_scale is not None else None

    def element(index: Index) -> Value:
        code = unpacked(load_codes, index, q.format.codes_per_byte)
        scale = scale_value(load_scales(group_of(index, q)), q, load_global)
        return ops.to_dtype(ops.mul(decode(code, q.format), scale), dtype)

    shape = [*codes.get_size()[:-1], size]
    moved = ir.Pointwise.create(device=codes.get_device(), dtype=dtype, inner_fn=element, ranges=shape)
    order = list(range(len(shape) - 1))
    order.insert(axis % len(shape), len(shape) - 1)
    return lowerings[torch.ops.aten.permute.default](moved, order)


def is_in_memory(x) -> bool:
    """Whether ``x`` is an input or the result of a kernel that is not generated: there is nothing to fuse with."""
    data = x.data
    while isinstance(data, (ir.BaseView, ir.StorageBox)):
        data = data.data
    return isinstance(data, (ir.InputBuffer, ir.ExternKernel, ir.TemplateBuffer, ir.MultiOutput))


# --- layout -------------------------------------------------------------------------------------------------


def axis_last(x, axis: int):
    """View of ``x`` with ``axis`` moved last."""
    dims = list(range(len(x.get_size())))
    dims.append(dims.pop(axis))
    return lowerings[torch.ops.aten.permute.default](x, dims)


def index_of_moved(index: Index, axis: int) -> list:
    """Index into the tensor with ``axis`` moved last, of an element at ``index`` of the tensor as it is."""
    moved = list(index)
    moved.append(moved.pop(axis))
    return moved


def group_of(index: Index, q: Quantizer, byte=None, per_byte: int = 1) -> list:
    """Index of the scale of element ``index``; ``byte``: where its code is packed, if at hand."""
    n, *lead = q.granularity.size, *index[:-1]
    if q.granularity.kind == "tensor":
        return [sympy.S.Zero] * len(index)
    if q.granularity.kind == "row":
        return [*lead, sympy.S.Zero]
    # From the byte's position, the divisor is the trip count of the reduction over a block, which Inductor
    # can cancel.
    in_bytes = byte is not None and n % per_byte == 0
    block = FloorDiv(byte, n // per_byte) if in_bytes else FloorDiv(index[-1], n)
    if q.granularity.kind == "square":
        lead[-1] = FloorDiv(lead[-1], n)
    return [*lead, block]


def guarded(bounds: Sequence[tuple], body: Callable[[], Value]) -> Value:
    """``body()`` where every ``(position, size)`` of ``bounds`` has position < size, else 0."""
    inside = None
    for position, size in bounds:
        below = ops.lt(ops.index_expr(position, torch.int64), ops.index_expr(size, torch.int64))
        inside = below if inside is None else ops.logical_and(inside, below)
    return body() if inside is None else ops.masked(inside, body, 0)


def _divides(n: int, size) -> bool:
    return V.graph.sizevars.statically_known_multiple_of(size, n)


def packed_bytes(units: GridUnits, code: Callable[[Index, Any], Value]) -> ir.TensorBox:
    """Uint8 ``[..., R, ⌈K/p⌉]`` of the int32 codes ``code(index, byte)``; bits past the end are zeros."""
    per_byte, size = units.per_byte, units.shape[-1]
    full = _divides(per_byte, size)

    def element(index: Index) -> Value:
        *lead, byte = index
        packed = None
        for i in range(per_byte):
            at = [*lead, per_byte * byte + i]
            bound = [] if full or i == 0 else [(at[-1], size)]
            part = guarded(bound, partial(code, at, byte))
            part = ops.bitwise_left_shift(part, _int(8 // per_byte * i)) if i else part
            packed = part if packed is None else ops.bitwise_or(packed, part)
        return ops.to_dtype(packed, torch.uint8)

    ranges = [*units.shape[:-1], CeilDiv(size, per_byte)]
    n = units.q.granularity.size
    if units.q.granularity.kind != "block" or n % per_byte or not _divides(n, size):
        return ir.Pointwise.create(device=units.device, dtype=torch.uint8, inner_fn=element, ranges=ranges)

    # Looped over as [..., blocks, bytes of a block], reads of the blocks' scales match the loop that writes
    # them: one kernel.
    def element_of_block(index: Index) -> Value:
        *lead, block, byte = index
        return element([*lead, n // per_byte * block + byte])

    in_blocks = [*units.shape[:-1], FloorDiv(size, n), sympy.Integer(n // per_byte)]
    packed = ir.Pointwise.create(device=units.device, dtype=torch.uint8, inner_fn=element_of_block, ranges=in_blocks)
    packed.realize()
    return lowerings[torch.ops.aten.reshape.default](packed, ranges)


def unpacked(load: Callable[[Index], Value], index: Index, per_byte: int) -> Value:
    """Int32 code of element ``index`` from packed bytes."""
    *lead, k = index
    if per_byte == 1:
        return ops.to_dtype(load(index), _INT32)
    width = 8 // per_byte
    byte = ops.to_dtype(load([*lead, FloorDiv(k, per_byte)]), _INT32)
    shift = ops.index_expr(width * ModularIndexing(k, 1, per_byte), _INT32)
    return ops.bitwise_and(ops.bitwise_right_shift(byte, shift), _int(2**width - 1))


# --- scales -------------------------------------------------------------------------------------------------


def rounded(value: Value, dtype: torch.dtype) -> Value:
    """A loaded element of a tensor of ``dtype``, in float32.

    Inductor keeps float32 between the operations that it puts into one kernel, 16-bit casts among them. Codes would
    then depend on what was fused: a weight that autocast casts would not be the same in the backward as in the forward.
    """
    if dtype in (torch.bfloat16, torch.float16):
        value = ops.to_dtype(value, dtype, use_compute_types=False)
    return ops.to_dtype(value, _FP32)


class GridUnits:
    """The tensor ``y = x · γ`` that is rounded, computed where it is read, and the scales that belong to it.

    ``per_byte`` is how many neighbours along K one iteration of the reader's loop takes; the reduction to
    absolute maxima takes as many, so that Inductor can put both into one kernel.
    """

    def __init__(self, x, q: Quantizer, axis: int, per_byte: int, global_scale=None, fold=None) -> None:
        moved = axis_last(x, axis)
        self.q, self.per_byte, self.device = q, per_byte, x.get_device()
        self._dtype = x.get_dtype()
        self.shape = list(moved.get_size())
        self.axis_is_last = axis % len(self.shape) == len(self.shape) - 1
        self.groups = [sympy.sympify(size) for size in q.scale_shape(tuple(self.shape))]
        self._load_x = moved.make_loader()
        self._load_global = global_scale.make_loader() if global_scale is not None else None
        flat = None if fold is None else lowerings[torch.ops.aten.reshape.default](fold, [-1])
        self._load_fold = flat.make_loader() if flat is not None else None
        # Buffers, so that a reader in another kernel does not divide once per element; inside one kernel they
        # are registers.
        self._load_amax = self._reduce_amax().make_loader()
        self._load_reciprocal = self._per_group(_FP32, self._reciprocal).make_loader()

    def load_x(self, index: Index) -> Value:
        x = rounded(self._load_x(index), self._dtype)
        return x if self._load_fold is None else ops.mul(x, self._load_fold([index[-1]]))

    def _magnitude(self, index: Index) -> Value:
        return ops.abs(self.load_x(index))

    def load(self, index: Index, byte=None) -> Value:
        """Float32 y at ``index``, whose code goes to ``byte``."""
        return ops.mul(self.load_x(index), self._load_reciprocal(group_of(index, self.q, byte, self.per_byte)))

    def stored_scale(self) -> ir.TensorBox:
        """The scales, in the dtype they are stored in."""
        return self._per_group(storage_dtype(self.q), lambda amax: stored_scale(amax, self.q, self._load_global))

    def _reciprocal(self, amax: Value) -> Value:
        return reciprocal(amax, self.q, self._load_global)

    def _per_group(self, dtype: torch.dtype, formula: Callable[[Value], Value]) -> ir.TensorBox:
        def element(index: Index) -> Value:
            # maximum passes NaN on
            return formula(ops.maximum(self._load_amax(index), ops.constant(self.q.amax_floor, _FP32)))

        values = ir.Pointwise.create(device=self.device, dtype=dtype, inner_fn=element, ranges=self.groups)
        values.realize()
        return values

    def _reduce_amax(self) -> ir.TensorBox:
        kind, n, size = self.q.granularity.kind, self.q.granularity.size, self.shape[-1]
        step = self.per_byte if kind in ("tensor", "row") or n % self.per_byte == 0 else 1
        along_k = CeilDiv(size, step) if kind in ("tensor", "row") else sympy.Integer(n // step)
        rows = {"tensor": self.shape[:-1], "square": [sympy.Integer(n)]}.get(kind, [])

        def element(group: Index, inner: Index) -> Value:
            *row, j = inner
            lead = row if kind == "tensor" else list(group[:-1])
            bounds = []
            if kind == "square":
                lead[-1] = n * lead[-1] + row[0]
                if not _divides(n, self.shape[-2]):
                    bounds.append((lead[-1], self.shape[-2]))
            largest = None
            for i in range(step):
                k = step * j + i + (n * group[-1] if n else 0)
                inside = _divides(n or step, size) or (not n and i == 0)
                in_row = [] if inside else [(k, size)]
                value = guarded([*bounds, *in_row], partial(self._magnitude, [*lead, k]))
                largest = value if largest is None else ops.maximum(largest, value)
            return largest

        # With p codes to a byte a row is read in p strides of p, which Inductor takes for a column; it would
        # then split the reduction over two kernels, and the codes would need a third.
        in_rows = self.axis_is_last and kind != "tensor"
        hint = ReductionHint.INNER if in_rows else ReductionHint.DEFAULT
        with config.patch(split_reductions=config.split_reductions and not in_rows):
            amax = ir.Reduction.create(
                device=self.device,
                dst_dtype=_FP32,
                src_dtype=_FP32,
                inner_fn=element,
                ranges=self.groups,
                reduction_ranges=[*rows, along_k],
                reduction_type="max",
                reduction_hint=hint,
            )
        amax.realize()
        return amax


def exact_div(a: Value, b: Value) -> Value:
    """Correctly rounded float32 ``a / b``.

    Triton's ``/`` on float32 is an approximation. ``ops.div_rn`` is IEEE division; Inductor versions without
    it divide in float64, where Triton's ``/`` is IEEE division, and round again: that is the same number,
    because 53 bits are at least 2·24 + 2 (Figueroa, "When is double rounding innocuous?", SIGNUM 1995).
    """
    if hasattr(OpsHandler, "div_rn"):
        return ops.div_rn(a, b)
    quotient = ops.truediv(ops.to_dtype(a, torch.float64), ops.to_dtype(b, torch.float64))
    return ops.to_dtype(quotient, _FP32)


def stored_scale(amax: Value, q: Quantizer, load_global=None) -> Value:
    """The scale as it is stored, from a group's absolute maximum."""
    largest = _float(q.format.max)
    match q.scale.name:
        case "absmax":
            return exact_div(amax, largest)
        case "absmax_pow2":
            exponent = ops.neg(_exponent(exact_div(largest, amax), finite=_is_finite(amax)))
            return ops.where(_is_finite(amax), power_of_two(exponent), _float(math.nan))
        case "e8m0":
            byte = ops.add(_e8m0_exponent(amax, q), _int(_EXPONENT_BIAS))
            return ops.to_dtype(ops.where(_is_finite(amax), byte, _int(255)), torch.uint8)
    assert load_global is not None, "two-level scale rules need the global scale"
    scale = exact_div(exact_div(amax, largest), load_global([]))
    return ops.to_dtype(ops.minimum(scale, _float(448.0)), torch.float8_e4m3fn, use_compute_types=False)


def reciprocal(amax: Value, q: Quantizer, load_global=None) -> Value:
    """γ, the float32 factor from x to grid units."""
    match q.scale.name:
        case "absmax":
            return exact_div(_float(q.format.max), amax)
        case "absmax_pow2":
            ratio = exact_div(_float(q.format.max), amax)
            return power_of_two(_exponent(ratio, finite=_is_finite(amax)))
        case "e8m0":
            return power_of_two(ops.neg(_e8m0_exponent(amax, q)))
    scale = scale_value(stored_scale(amax, q, load_global), q, load_global)
    return ops.where(ops.eq(scale, _float(0.0)), _float(0.0), exact_div(_float(1.0), scale))


def scale_value(stored: Value, q: Quantizer, load_global=None) -> Value:
    """The float32 scale that a stored scale stands for."""
    if q.scale.name == "e8m0":
        byte = ops.to_dtype(stored, _INT32)
        scale = power_of_two(ops.sub(byte, _int(_EXPONENT_BIAS)))
        return ops.where(ops.eq(byte, _int(255)), _float(math.nan), scale)
    scale = ops.to_dtype(stored, _FP32)
    return scale if load_global is None else ops.mul(scale, load_global([]))


def power_of_two(exponent: Value) -> Value:
    """Exact float32 2^exponent from int32; exponents of normal numbers, and −127, the smallest of E8M0."""
    exponent = ops.minimum(ops.maximum(exponent, _int(-_EXPONENT_BIAS)), _int(127))
    bits = ops.bitwise_left_shift(ops.add(exponent, _int(_EXPONENT_BIAS)), _int(_MANTISSA_BITS))
    bits = ops.where(ops.eq(bits, _int(0)), _int(1 << (_MANTISSA_BITS - 1)), bits)
    return ops.to_dtype_bitcast(bits, _FP32, _INT32)


def _exponent(value: Value, finite: Value) -> Value:
    """⌊log2⌋ of a positive float32 (subnormal: −127); −1, which is frexp's, where the group is not finite."""
    field = ops.bitwise_right_shift(ops.to_dtype_bitcast(value, _INT32, _FP32), _int(_MANTISSA_BITS))
    return ops.where(finite, ops.sub(field, _int(_EXPONENT_BIAS)), _int(-1))


def _e8m0_exponent(amax: Value, q: Quantizer) -> Value:
    # Half-integers of one bit have a maximum below 1: their amax may be subnormal, and twice it is not.
    shift = max(-q.format.max_exponent, 0)
    finite = _is_finite(amax)
    exponent = ops.sub(_exponent(ops.mul(amax, _float(2.0**shift)), finite), _int(q.format.max_exponent + shift))
    return ops.minimum(ops.maximum(exponent, _int(-127)), _int(127))


def _is_finite(magnitude: Value) -> Value:
    return ops.lt(magnitude, _float(math.inf))  # false for NaN


# --- codes --------------------------------------------------------------------------------------------------


def encode(y: Value, q: Quantizer) -> Value:
    """Int32 code of float32 ``y`` in grid units; saturating, NaN takes the largest magnitude, positive."""
    fmt, zero = q.format, _float(0.0)
    y = ops.where(ops.eq(y, y), y, _float(fmt.max))
    sign_bit = 1 << (fmt.bits - 1)
    bits = ops.to_dtype_bitcast(y, _INT32, _FP32)
    if fmt.has_zero:
        sign = ops.bitwise_and(ops.bitwise_right_shift(bits, _int(32 - fmt.bits)), _int(sign_bit))
        negative = ops.lt(bits, _int(0))
    else:
        negative = ops.lt(y, zero)
        sign = ops.where(negative, _int(sign_bit), _int(0))
    magnitude = ops.abs(y)
    # Not ops.minimum, which takes further instructions to pass on NaN; there is none here.
    magnitude = ops.where(ops.le(magnitude, _float(fmt.max)), magnitude, _float(fmt.max))
    if fmt.torch_dtype:
        index = _index_by_cast(magnitude, getattr(torch, fmt.torch_dtype))
    elif (offset := uniform_offset(fmt)) is not None:
        index = _index_by_rounding(magnitude, negative, fmt, offset, q.rounding)
    else:
        index = _index_by_search(magnitude, negative, fmt, q.rounding)
    return ops.bitwise_or(index, sign)


def tensor_core_code(y: Value, q: Quantizer) -> Value:
    """The level nearest to float32 ``y`` in grid units, times the format's factor, less its offset, in the tensor-core
    dtype.
    """
    fmt, dtype = q.format, tensor_core_dtype(q.format)
    value = _rounded(y, q)
    if fmt.tensor_core_factor != 1:
        value = ops.mul(value, _float(fmt.tensor_core_factor))
    if fmt.tensor_core_offset != 0:
        value = ops.sub(value, _float(fmt.tensor_core_offset))
    return ops.to_dtype(value, dtype, use_compute_types=False)


def _rounded(y: Value, q: Quantizer) -> Value:
    """Float32 level; by arithmetic where the format allows, else by way of the code."""
    fmt, layout = q.format, minifloat(q.format)
    if q.rounding != "even" or fmt.torch_dtype or layout is None or layout[0] == 0:
        return decode(encode(y, q), fmt)
    mantissa_bits, factor = layout
    y = ops.where(ops.eq(y, y), y, _float(fmt.max))
    sign = ops.bitwise_and(ops.to_dtype_bitcast(y, _INT32, _FP32), _int(-(2**31)))
    magnitude = ops.abs(y)
    # A selection also keeps the product that made y from being contracted with the addition below.
    magnitude = ops.where(ops.le(magnitude, _float(fmt.max)), magnitude, _float(fmt.max))
    exponent = ops.bitwise_and(ops.to_dtype_bitcast(magnitude, _INT32, _FP32), _int(0xFF << _MANTISSA_BITS))
    smallest_normal = bits_of(2 * factor * 2.0**-_EXPONENT_BIAS)
    exponent = ops.maximum(exponent, _int(smallest_normal))
    # Added to a number of this exponent, 2^(23 − mantissa bits) times its power of two rounds to nearest even.
    shift = _int((_MANTISSA_BITS - mantissa_bits) << _MANTISSA_BITS)
    rounder = ops.to_dtype_bitcast(ops.add(exponent, shift), _FP32, _INT32)
    return _with_sign(ops.sub(ops.add(magnitude, rounder), rounder), sign)


def decode(code: Value, fmt: Format) -> Value:
    """Float32 level of an int32 code."""
    sign_bit = 1 << (fmt.bits - 1)
    if fmt.torch_dtype:
        byte, dtype = ops.to_dtype(code, torch.uint8), getattr(torch, fmt.torch_dtype)
        return ops.to_dtype(ops.to_dtype_bitcast(byte, dtype, torch.uint8), _FP32)
    index = ops.bitwise_and(code, _int(sign_bit - 1))
    # The sign goes in as a bit: Triton negates by subtracting from zero, which loses −0.
    sign = ops.bitwise_left_shift(ops.bitwise_and(code, _int(sign_bit)), _int(32 - fmt.bits))
    if (offset := uniform_offset(fmt)) is not None:
        assert fmt.step is not None
        position = ops.add(ops.to_dtype(index, _FP32), _float(offset))
        return _with_sign(ops.mul(position, _float(fmt.step)), sign)
    if (layout := minifloat(fmt)) is not None:
        mantissa_bits, factor = layout
        bits = ops.bitwise_left_shift(index, _int(_MANTISSA_BITS - mantissa_bits))
        return ops.mul(ops.to_dtype_bitcast(ops.bitwise_or(bits, sign), _FP32, _INT32), _float(factor))
    width = _index_bits(len(fmt.magnitudes))
    chosen = [ops.ne(ops.bitwise_and(index, _int(1 << i)), _int(0)) for i in reversed(range(width))]
    return _with_sign(select(chosen, fmt.magnitudes), sign)


def _with_sign(magnitude: Value, sign: Value) -> Value:
    bits = ops.bitwise_or(ops.to_dtype_bitcast(magnitude, _INT32, _FP32), sign)
    return ops.to_dtype_bitcast(bits, _FP32, _INT32)


def _index_by_cast(magnitude: Value, dtype: torch.dtype) -> Value:
    cast = ops.to_dtype(magnitude, dtype, use_compute_types=False)
    return ops.to_dtype(ops.to_dtype_bitcast(cast, torch.uint8, dtype), _INT32)


def _index_by_rounding(magnitude: Value, negative: Value, fmt: Format, offset: float, rounding: str) -> Value:
    """Index in a uniform grid. All operations but one are exact: the step is a power of two."""
    assert fmt.step is not None
    position = ops.sub(ops.mul(magnitude, _float(1 / fmt.step)), _float(offset))
    rounded = ops.add(position, _float(_ROUNDER))  # the one that rounds: to the nearest integer, ties to even
    index = ops.sub(ops.to_dtype_bitcast(rounded, _INT32, _FP32), _int(bits_of(_ROUNDER)))
    if rounding == "even":
        return index
    # Ties toward +∞: repair those that went the other way.
    rest = ops.sub(position, ops.sub(rounded, _float(_ROUNDER)))
    up = ops.logical_and(ops.eq(rest, _float(0.5)), ops.logical_not(negative))
    down = ops.logical_and(ops.eq(rest, _float(-0.5)), negative)
    index = ops.sub(ops.add(index, ops.to_dtype(up, _INT32)), ops.to_dtype(down, _INT32))
    return ops.maximum(
        index, _int(0)
    )  # below the smallest level of a grid without zero there is nothing to round down to


def _index_by_search(magnitude: Value, negative: Value, fmt: Format, rounding: str) -> Value:
    def reached(threshold: Value, odd: bool) -> Value:
        if rounding == "half_up":
            tie = ops.logical_and(ops.eq(magnitude, threshold), ops.logical_not(negative))
            return ops.logical_or(ops.gt(magnitude, threshold), tie)
        # Threshold i separates index i from i + 1; a tie there goes to the even one.
        return ops.ge(magnitude, threshold) if odd else ops.gt(magnitude, threshold)

    index = None
    bits = threshold_bits(fmt.thresholds, reached)
    for place, bit in enumerate(reversed(bits)):
        part = ops.where(bit, _int(1 << place), _int(0))
        index = part if index is None else ops.bitwise_or(index, part)
    return index if index is not None else _int(0)


def threshold_bits(thresholds: Sequence[float], reached: Callable[[Value, bool], Value]) -> list[Value]:
    """How many of the ascending ``thresholds`` are reached, by binary search: bits of the count, highest
    first.

    ``reached(threshold, odd)`` decides one; ``odd`` is the parity of its position, the same for all that a
    bit may be compared with.
    """
    width = _index_bits(len(thresholds) + 1)
    padded = [*thresholds, *[math.inf] * (2**width - 1 - len(thresholds))]
    bits: list[Value] = []
    for place in reversed(range(width)):
        first, stride = 2**place - 1, 2 ** (place + 1)
        bits.append(reached(select(bits, padded[first::stride]), place > 0))
    return bits


def select(bits: Sequence[Value], table: Sequence[float]) -> Value:
    """Float32 ``table`` entry at the number whose bits, highest first, are ``bits``."""
    padded = [*table, *[table[-1]] * (2 ** len(bits) - len(table))]
    if len(set(padded)) == 1:
        return _float(padded[0])
    half = len(padded) // 2
    return ops.where(bits[0], select(bits[1:], padded[half:]), select(bits[1:], padded[:half]))


# --- what a format's data says ------------------------------------------------------------------------------


def _index_bits(count: int) -> int:
    return (count - 1).bit_length()


def _float(value: float) -> Value:
    return ops.constant(value, _FP32)


def _int(value: int) -> Value:
    return ops.constant(value, _INT32)
