"""Quantize and dequantize as Inductor loop bodies: generated Triton that fuses with the ops around it.

The formulas are those of :mod:`qcompile.kernels.quantize.reference`, and codes and scales are equal to its
bit for bit. They are written with ``ops.*`` (one value per name) instead of as a decomposition into aten ops,
which Inductor would expand again at every use. What is special to a generated kernel:

* A row's elements are read as ``[⌈K/p⌉, p]``, p codes to a byte, by the absolute maximum and by the encoder
  alike. Both loops then have as many iterations as there are bytes, so Inductor makes one kernel of them, and
  of the producer of x.
* Scales, rounding and decoding are the formulas of :mod:`qcompile.kernels.formula`, whose floating-point operations
  round once. Where a format or a scale has a torch dtype, the device's conversion takes the place of its formula.
* What is rounded is selected before (:func:`~qcompile.kernels.formula.rounding.saturated`), so that no product y is
  contracted with a sum to a fused multiply-add; where it is not, y is an :func:`uncontracted_product`.

Index tuples are of x with the quantization axis moved last: ``[..., r, k]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import sympy
import torch
from torch._inductor import config, ir
from torch._inductor.lowering import lowerings
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.functions import CeilDiv, FloorDiv, ModularIndexing

from qcompile.compat import no_fake_mode
from qcompile.ir.formats import Format
from qcompile.ir.operand import Operand
from qcompile.ir.ops import COMPENSATED, storage_dtype
from qcompile.ir.quantizer import EDEN_CHUNK, Granularity, Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.extern import own_kernel
from qcompile.kernels.formula import random, rounding, scales
from qcompile.kernels.formula.expression import Formula
from qcompile.kernels.formula.inductor_target import clamped, emit, rounded, uncontracted_product
from qcompile.kernels.formula.layout import why_not_rounded
from qcompile.kernels.quantize.block_grid import in_place_of_loops

__all__ = [
    "GridUnits",
    "axis_last",
    "element_loader",
    "index_of_moved",
    "is_empty",
    "lower_dequantize",
    "lower_encode_compensated",
    "lower_quantize",
    "lower_quantize_8bit",
    "lower_transpose_codes",
    "mark_of",
    "packed_bytes",
    "supports_dequantize",
    "supports_encode_compensated",
    "supports_quantize",
    "supports_scales",
    "why_not_scaled",
]

#: A value inside a loop body, and an index tuple.
Value = Any
Index = Sequence[sympy.Expr]

_FP32, _FP64, _INT32 = torch.float32, torch.float64, torch.int32
#: Integers by size in bytes.
_BITS = {1: torch.uint8, 2: torch.int16}


# --- what is supported --------------------------------------------------------------------------------------


def supports_quantize(q: Quantizer, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_quantize` generates code for ``q``, and if not, why."""
    if q.rounding == "stochastic" and (reason := rounding.why_not_by_chance(q.format)):
        return False, f"{reason} is not generated"
    if reason := why_not_rounded(q.format) or why_not_scaled(q):
        return False, reason
    return supports_scales(q, device)


def why_not_scaled(q: Quantizer) -> str:
    """Why no code is generated that finds the scales of ``q`` from the elements; empty if it is."""
    if q.scale.statistic != "amax":
        return f"{q.scale.name} scales are not generated"
    return why_not_rounded(q.format) if len(q.candidates) > 1 else ""  # which candidates are compared by


def supports_dequantize(q: Quantizer, device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_dequantize` generates code for ``q``, and if not, why."""
    if not q.format.codebook and (reason := why_not_rounded(q.format)):
        return False, reason
    return supports_scales(q, device)


def supports_scales(q: Quantizer, device: torch.device | None) -> tuple[bool, str]:
    """Whether the device has the conversions of ``q``: Triton has E4M3's from compute capability 8.9 on."""
    needs_e4m3 = "float8_e4m3fn" in (*(grid.torch_dtype for grid in q.format.choices), q.scale.storage)
    if needs_e4m3 and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device if device and device.type == "cuda" else None)
        if capability < (8, 9):
            return False, f"E4M3 needs compute capability 8.9, this device has {capability}"
    return True, ""


def supports_encode_compensated(device: torch.device | None = None) -> tuple[bool, str]:
    """Whether :func:`lower_encode_compensated` generates code, and if not, why."""
    return supports_scales(Quantizer.parse(COMPENSATED), device)


def is_empty(*tensors: ir.TensorBox) -> bool:
    """Whether one is known to have no elements: there is no loop to generate then."""
    return any(size == 0 for tensor in tensors for size in tensor.get_size())


# --- the two ops --------------------------------------------------------------------------------------------


def lower_quantize(x, quantizer: str, axis: int, global_scale=None, seed=None, fold=None, transform: str = ""):
    """``qcompile::quantize``: codes ``[..., R, packed(K)]`` and scales; loops where Triton is generated, unless the
    kernel in blocks takes their place.
    """
    q = Quantizer.parse(quantizer)
    supported = not transform and supports_quantize(q, x.get_device())[0]
    in_blocks = fold is None and in_place_of_loops(q, x.get_dtype(), is_in_memory(x))
    if not ir.is_triton(x) or is_empty(x) or in_blocks or not supported:
        arguments = (x, quantizer, axis, global_scale, seed, fold, transform)
        return own_kernel(torch.ops.qcompile.quantize.default, *arguments)
    units = GridUnits(x, q, axis, q.format.codes_per_byte, global_scale, fold)
    drawn = by_chance(seed, units.shape) if q.rounding == "stochastic" else nothing_drawn

    def code(index: Index, byte: sympy.Expr) -> Value:
        return encode(q, *units.inputs(index, byte), **drawn(index))

    return packed_bytes(units, code), units.corrected_scale(seed) if q.rounding == "eden" else units.stored_scale()


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
        return own_kernel(torch.ops.qcompile.quantize_8bit.default, x, quantizer, packed, fold)
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
        return own_kernel(torch.ops.qcompile.dequantize.default, *args)
    scales.realize()  # ones that are computed, of nested scales, would be so once per element
    load_codes, load_scales = codes.make_loader(), scales.make_loader()
    load_global = global_scale.make_loader() if global_scale is not None else None
    level_of = looked_up(q.format, codes.get_device()) if q.format.codebook else partial(decode, q.format)
    product = uncontracted_product if dtype == _FP32 else ops.mul  # others are rounded before they are added up

    def element(index: Index) -> Value:
        code = unpacked(load_codes, index, q.format.codes_per_byte)
        stored = load_scales(group_of(index, q))
        level = level_of(code, *mark_of(stored, q))
        return ops.to_dtype(product(level, scale_value(stored, q, load_global)), dtype)

    shape = [*codes.get_size()[:-1], size]
    moved = ir.Pointwise.create(device=codes.get_device(), dtype=dtype, inner_fn=element, ranges=shape)
    order = list(range(len(shape) - 1))
    order.insert(axis % len(shape), len(shape) - 1)
    return lowerings[torch.ops.aten.permute.default](moved, order)


def lower_transpose_codes(codes, size):
    """``qcompile::transpose_codes``: a loop over bytes, each of two codes of one column."""
    if not ir.is_triton(codes) or is_empty(codes):
        return own_kernel(torch.ops.qcompile.transpose_codes.default, codes, size)
    load, rows = codes.make_loader(), codes.get_size()[0]

    def element(index: Index) -> Value:
        column, byte = index
        low, high = (partial(unpacked, load, [2 * byte + i, column], 2) for i in range(2))
        above = guarded([] if _divides(2, rows) else [(2 * byte + 1, rows)], high)
        return ops.to_dtype(ops.bitwise_or(low(), ops.bitwise_left_shift(above, _int(4))), torch.uint8)

    ranges = [size, CeilDiv(rows, 2)]
    return ir.Pointwise.create(device=codes.get_device(), dtype=torch.uint8, inner_fn=element, ranges=ranges)


def lower_encode_compensated(x, bounds, operand: str, axis: int):
    """``qcompile::encode_compensated``: a loop over elements that fuses with what computes x."""
    q, compensated = Operand.parse(operand).quantizer, Quantizer.parse(COMPENSATED)
    supported = not why_not_rounded(q.format) and supports_encode_compensated(x.get_device())[0]
    if not ir.is_triton(x) or is_empty(x) or not supported:
        return own_kernel(torch.ops.qcompile.encode_compensated.default, x, bounds, operand, axis)
    rows = axis_last(x, axis)
    load_x, load_bounds = element_loader(rows), bounds.make_loader()

    def element(index: Index) -> Value:
        lower, upper, reciprocal = (load_bounds([*index[:-1], sympy.Integer(i)]) for i in range(3))
        value = load_x(index)
        inner = clamped(value, lower, upper)
        level = _rounded(ops.mul(inner, reciprocal), q)
        raised = ops.add(level, uncontracted_product(ops.sub(value, inner), reciprocal))
        return ops.to_dtype(encode(compensated, ops.where(ops.eq(value, inner), level, raised)), torch.uint8)

    return ir.Pointwise.create(device=x.get_device(), dtype=torch.uint8, inner_fn=element, ranges=list(rows.get_size()))


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


def element_loader(x) -> Callable[[Index], Value]:
    """Loads elements of x in float32, as they are or would be in memory."""
    load, dtype = x.make_loader(), x.get_dtype()
    if is_in_memory(x):
        return lambda index: ops.to_dtype(load(index), _FP32)
    return lambda index: rounded(load(index), dtype)


class GridUnits:
    """The tensor ``y = x · γ`` that is rounded, computed where it is read, and the scales that belong to it.

    ``per_byte`` is how many neighbours along K one iteration of the reader's loop takes; the reductions to absolute
    maxima, and to the errors of candidates, take as many, so that Inductor can put all of them into one kernel.
    """

    def __init__(self, x, q: Quantizer, axis: int, per_byte: int, global_scale=None, fold=None) -> None:
        moved = axis_last(x, axis)
        self.q, self.per_byte, self.device = q, per_byte, x.get_device()
        self.shape = list(moved.get_size())
        self.axis_is_last = axis % len(self.shape) == len(self.shape) - 1
        self.groups = [sympy.sympify(size) for size in q.scale_shape(tuple(self.shape))]
        self._load_x = element_loader(moved)
        self._load_global = global_scale.make_loader() if global_scale is not None else None
        flat = None if fold is None else lowerings[torch.ops.aten.reshape.default](fold, [-1])
        self._load_fold = flat.make_loader() if flat is not None else None
        # Buffers, so that a reader in another kernel does not divide once per element; inside one kernel they
        # are registers.
        self._load_amax = self._over_groups(self._magnitude, ops.maximum, "max", _FP32)
        self._load_errors = self._errors() if len(q.candidates) > 1 else []
        self._load_reciprocal = self._per_group(_FP32, self._of_best(scales.reciprocal)).make_loader()

    def load_x(self, index: Index) -> Value:
        x = self._load_x(index)
        return x if self._load_fold is None else ops.mul(x, self._load_fold([index[-1]]))

    def _magnitude(self, index: Index, group: Index) -> Value:
        return ops.abs(self.load_x(index))

    def load(self, index: Index, byte=None, product: Callable[[Value, Value], Value] = ops.mul) -> Value:
        """Float32 y at ``index``, whose code goes to ``byte``."""
        return self.inputs(index, byte, product)[0]

    def inputs(self, index: Index, byte=None, product: Callable[[Value, Value], Value] = ops.mul) -> tuple[Value, ...]:
        """What formulas of elements are given: y, and of a pair of grids whether the block has the second."""
        gamma = self._load_reciprocal(group_of(index, self.q, byte, self.per_byte))
        if not self.q.format.grids:
            return (product(self.load_x(index), gamma),)
        return product(self.load_x(index), ops.abs(gamma)), has_sign(gamma)

    def stored_scale(self) -> ir.TensorBox:
        """The scales, in the dtype they are stored in."""
        dtype, stored = storage_dtype(self.q), self._of_best(scales.stored_scale)
        return self._per_group(dtype, lambda index: as_stored(stored(index), dtype))

    def corrected_scale(self, seed) -> ir.TensorBox:
        """The same under ``eden``, whose correction follows from the codes of a chunk."""
        nearest, per_chunk = replace(self.q, rounding=self.q.nearest), EDEN_CHUNK // self.q.granularity.size

        def product_with(other: Callable[[Value], Value]) -> Callable[[Index, Index], Value]:
            def product(index: Index, chunk: Index) -> Value:
                y = self.load(index, product=uncontracted_product)
                return ops.mul(ops.to_dtype(y, _FP64), ops.to_dtype(other(y), _FP64))

            return product

        of_chunks = replace(self.q, rounding=self.q.nearest, granularity=Granularity("block", EDEN_CHUNK))
        sums = [
            self._over_groups(product_with(other), ops.add, "sum", _FP64, of_chunks)
            for other in (lambda y: y, lambda y: _rounded(y, nearest))
        ]
        dtype, stored, drawn = storage_dtype(self.q), self._of_best(scales.stored_scale), by_chance(seed, self.groups)

        def element(index: Index) -> Value:
            chunk = [*index[:-1], FloorDiv(index[-1], per_chunk)]
            inputs = (stored(index), *(load(chunk) for load in sums), drawn(index)["chance"])
            return as_stored(emit(scales.corrected_scale(self.q), *inputs), dtype)

        return self._per_group(dtype, element)

    def _amax(self, index: Index) -> Value:
        # maximum passes NaN on
        return ops.maximum(self._load_amax(index), ops.constant(self.q.amax_floor, _FP32))

    def _of(self, formula: Callable[[Quantizer, int], Formula], number: int) -> Callable[[Index], Value]:
        """A formula of the absolute maximum, of the candidate with this number."""
        return lambda index: emit(formula(self.q, number), *_with_global(self._amax(index), self._load_global))

    def _of_best(self, formula: Callable[[Quantizer, int], Formula]) -> Callable[[Index], Value]:
        """The same of the candidate that errs least; of equal ones the first."""
        first, *others = (self._of(formula, number) for number in range(len(self.q.candidates)))

        def element(index: Index) -> Value:
            value, errors = first(index), [load(index) for load in self._load_errors]
            for other, error in zip(others, errors[1:], strict=True):
                better = ops.lt(error, errors[0])
                value, errors[0] = ops.where(better, other(index), value), ops.where(better, error, errors[0])
            return value

        return element

    def _errors(self) -> list[Callable[[Index], Value]]:
        """Loaders of every candidate's error by group, int64."""
        load_unit = self._per_group(_FP32, lambda index: emit(scales.error_unit(), self._amax(index))).make_loader()
        loaders = []
        for number, candidate in enumerate(self.q.candidates):
            stored, reciprocal = (self._of(formula, number) for formula in (scales.stored_scale, scales.reciprocal))
            of = replace(self.q, format=candidate.grid)

            def scale(index: Index, stored=stored) -> Value:
                return scale_of_bits(stored(index), self.q, self._load_global)

            load_scale, load_reciprocal = (self._per_group(_FP32, f).make_loader() for f in (scale, reciprocal))

            def counted(
                index: Index, group: Index, load_scale=load_scale, load_reciprocal=load_reciprocal, of=of
            ) -> Value:
                x = self.load_x(index)
                level = _rounded(ops.mul(x, ops.abs(load_reciprocal(group))), of)
                error = emit(scales.scaled_error(), x, level, load_scale(group), load_unit(group))
                error = ops.to_dtype(error, torch.int64)
                return ops.mul(error, error) if self.q.scale.error == "squared" else ops.abs(error)

            loaders.append(self._over_groups(counted, ops.add, "sum", torch.int64))
        return loaders

    def _per_group(self, dtype: torch.dtype, element: Callable[[Index], Value]) -> ir.TensorBox:
        values = ir.Pointwise.create(device=self.device, dtype=dtype, inner_fn=element, ranges=self.groups)
        values.realize()
        return values

    def _over_groups(
        self,
        value: Callable[[Index, Index], Value],
        combine: Callable[[Value, Value], Value],
        name: Literal["max", "sum"],
        dtype: torch.dtype,
        grouped: Quantizer | None = None,
    ) -> Callable[[Index], Value]:
        """A loader of the reduction ``name`` of ``value(index, group)`` over the elements that share a scale; zeros do
        not change it. ``combine``: of two values. ``grouped``: whose granularity says which elements these are, if it
        is not the quantizer itself.
        """
        granularity = (grouped or self.q).granularity
        groups = self.groups if grouped is None else grouped.scale_shape(tuple(self.shape))
        kind, n, size = granularity.kind, granularity.size, self.shape[-1]
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
            total = None
            for i in range(step):
                k = step * j + i + (n * group[-1] if n else 0)
                inside = _divides(n or step, size) or (not n and i == 0)
                in_row = [] if inside else [(k, size)]
                part = guarded([*bounds, *in_row], partial(value, [*lead, k], group))
                total = part if total is None else combine(total, part)
            return total

        # With p codes to a byte a row is read in p strides of p, which Inductor takes for a column; it would
        # then split the reduction over two kernels, and the codes would need a third.
        in_rows = self.axis_is_last and kind != "tensor"
        hint = ReductionHint.INNER if in_rows else ReductionHint.DEFAULT
        with config.patch(split_reductions=config.split_reductions and not in_rows):
            reduced = ir.Reduction.create(
                device=self.device,
                dst_dtype=dtype,
                src_dtype=dtype,
                inner_fn=element,
                ranges=[sympy.sympify(size) for size in groups],
                reduction_ranges=[*rows, along_k],
                reduction_type=name,
                reduction_hint=hint,
            )
        reduced.realize()
        return reduced.make_loader()


def by_chance(seed, shape: Sequence[sympy.Expr]) -> Callable[[Index], dict[str, Value]]:
    """What formulas that round by chance are given of the element at an index of a tensor of ``shape``."""
    load = seed.make_loader()

    def drawn(index: Index) -> dict[str, Value]:
        place = sympy.S.Zero
        for at, size in zip(index, shape, strict=True):
            place = place * size + at
        key = ops.to_dtype(load([sympy.S.Zero]), _INT32)
        counted = ops.to_dtype(ops.index_expr(place, torch.int64), _INT32)  # of more than 2³² elements, the low bits
        return {"chance": emit(random.uniform(), counted, key)}

    return drawn


def nothing_drawn(index: Index) -> dict[str, Value]:
    return {}


def as_stored(stored: Value, dtype: torch.dtype) -> Value:
    """A scale in the dtype it is stored in: float32, or that of its bits, int32, of which it takes the lowest."""
    if dtype == _FP32:
        return stored
    bits = ops.to_dtype(stored, _BITS[dtype.itemsize])
    return bits if dtype == _BITS[dtype.itemsize] else ops.to_dtype_bitcast(bits, dtype, _BITS[dtype.itemsize])


def scale_value(stored: Value, q: Quantizer, load_global=None) -> Value:
    """The float32 scale that a stored scale stands for."""
    dtype = storage_dtype(q)
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16):
        scale = ops.to_dtype(stored, _FP32)  # the device's own conversion, which is exact
        scale = ops.abs(scale) if q.format.grids else scale
        return scale if load_global is None else ops.mul(scale, load_global([]))
    return scale_of_bits(stored if dtype == _FP32 else ops.to_dtype(stored, _INT32), q, load_global)


def mark_of(stored: Value, q: Quantizer) -> tuple[Value, ...]:
    """Of a pair of grids, whether a stored scale is that of a block which has the second; nothing of another format."""
    return (has_sign(ops.to_dtype(stored, _FP32)),) if q.format.grids else ()


def has_sign(value: Value) -> Value:
    """Whether the sign of a float32 value is set, which may be 0."""
    return ops.lt(ops.to_dtype_bitcast(value, _INT32, _FP32), _int(0))


def scale_of_bits(stored: Value, q: Quantizer, load_global=None) -> Value:
    """The same from a float32 scale, or the bits of another as int32."""
    return emit(scales.load_scale(q), *_with_global(stored, load_global))


def _with_global(value: Value, load_global) -> tuple[Value, ...]:
    return (value,) if load_global is None else (value, load_global([]))


# --- codes --------------------------------------------------------------------------------------------------


def encode(q: Quantizer, y: Value, marked: Value | None = None, chance: Value | None = None) -> Value:
    """Int32 code of float32 ``y`` in grid units; saturating, NaN takes the largest magnitude, positive.

    ``marked``: of a pair of grids, whether the block has the second. ``chance``: for stochastic rounding, a uniform
    number.
    """
    if marked is not None:
        first, second = (encode(replace(q, format=grid), y, chance=chance) for grid in q.format.choices)
        return ops.where(marked, second, first)
    if chance is not None:
        return emit(rounding.encode(q.format, "stochastic"), y, chance)
    if q.format.torch_dtype is None:
        return emit(rounding.encode(q.format, q.nearest), y)
    # The conversion of the device is the rounding.
    dtype = getattr(torch, q.format.torch_dtype)
    cast = ops.to_dtype(emit(rounding.saturated(q.format), y), dtype, use_compute_types=False)
    return ops.to_dtype(ops.to_dtype_bitcast(cast, torch.uint8, dtype), _INT32)


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
    """Float32 level."""
    if q.format.torch_dtype:
        return decode(q.format, encode(q, y))
    return emit(rounding.round_level(q.format, q.nearest), y)


def looked_up(fmt: Format, device: torch.device) -> Callable[[Value], Value]:
    """:func:`decode` of a code book, by its table in memory: a selection for every level takes three times as long."""
    load_level = V.graph.add_tensor_constant(_levels(fmt, device)).make_loader()
    size = sympy.Integer(len(fmt.levels))
    return lambda code: load_level([ops.indirect_indexing(code, size, check=False, wrap_neg=False)])


@cache
def _levels(fmt: Format, device: torch.device) -> torch.Tensor:
    """Float32 levels by code; one tensor, so that a graph has one constant of it."""
    with no_fake_mode():
        return torch.tensor(fmt.levels, dtype=_FP32, device=device)


def decode(fmt: Format, code: Value, marked: Value | None = None) -> Value:
    """Float32 level of an int32 code; ``marked`` as in :func:`encode`."""
    if marked is not None:
        first, second = (decode(grid, code) for grid in fmt.choices)
        return ops.where(marked, second, first)
    if fmt.torch_dtype is None:
        return emit(rounding.decode(fmt), code)
    byte, dtype = ops.to_dtype(code, torch.uint8), getattr(torch, fmt.torch_dtype)
    return ops.to_dtype(ops.to_dtype_bitcast(byte, dtype, torch.uint8), _FP32)


def _int(value: int) -> Value:
    return ops.constant(value, _INT32)


def _float(value: float) -> Value:
    return ops.constant(value, _FP32)
