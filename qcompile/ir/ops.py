"""The ``qcompile::`` dialect: schemas, shapes and autograd of the ops that passes insert.

Layout: an operand is quantized along ``axis``, the contraction axis of the GEMM that reads it. Codes and scales are
stored with that axis **last** ("K-major", what 8-bit tensor cores read), so with x of shape ``[..., R, K]`` after
moving ``axis`` to the end: codes are uint8 ``[..., R, packed(K)]``, scales ``[..., R, 1]`` (see :class:`Granularity`
for the others).

Arguments are plain data; a quantizer or an operand travels as text. Nothing here names a site: equal nodes must stay
equal so that common-subexpression elimination lets q, k and v share one quantize.

Only ``fake_quantize`` and ``split_gradient`` are differentiable. They are composites, as ``read_again`` is: the
autograd of the first *is* the estimator, that of the second quantizes dY. AOTAutograd traces through them, and the
joint graph shows the other ops, whose kernels are registered by :mod:`qcompile.kernels`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .columns import take_columns
from .encoding import Encoding
from .operand import Operand
from .outliers import OutlierClamp, OutlierColumns, Outliers
from .quantizer import SMALLEST_GLOBAL_SCALE, Quantizer
from .sharding import aligned, is_sharded, local_tensor, with_local, without_partial_sums
from .transforms import FIXED_SIGNS, Transform

__all__ = [
    "COMPENSATED",
    "GROUP_ALIGNMENT",
    "LIB",
    "clamped_counts",
    "index_dtype",
    "padded_rows",
    "quantize_along",
    "quantized",
    "transform_of",
    "with_signs",
    "without_autocast",
]

LIB = torch.library.Library("qcompile", "FRAGMENT")

_SCHEMAS = (
    # x̂ = estimator-aware dequantize(quantize(x)); what `insert` places on a GEMM operand. Same shape and dtype as x.
    "fake_quantize(Tensor x, str operand, int axis, Tensor? seed=None) -> Tensor",
    # y. Its gradient goes on as it is; the `twins`, whose values are not read, get it quantized (quantize_along), or as
    # it is without an `operand`. `bits`: int64 [n], 1 where a drawn sign of the operand's rotation is −.
    "split_gradient(Tensor y, Tensor[] twins, str? operand, int[] rows, int[] contracted, Tensor? bits=None) -> Tensor",
    # What a backward product reads in place of the operand x of the forward: quantize_along(x). Not differentiable.
    "read_again(Tensor x, str operand, int[] rows, int[] contracted, Tensor? bits=None) -> Tensor",
    # Float32 [5], what quantizing an operand does to it: see kernels/statistics.py; a composite too.
    "operand_statistics(Tensor x, str operand, int axis, Tensor? seed=None) -> Tensor",
    # codes, scales. `global_scale`: float32 [] for two-level scale rules. `seed`: int64 [1] for stochastic rounding.
    # `fold`: float32 factors along the axis, as many as it has elements; x · fold is quantized.
    # `transform`: text of a Transform whose rotation divides the axis; codes are of what it makes of x, rotated.
    "quantize(Tensor x, str quantizer, int axis, Tensor? global_scale=None, Tensor? seed=None, Tensor? fold=None, "
    "str transform='') -> (Tensor, Tensor)",
    # The tensor codes stand for, in `dtype`; `size` is the length of the quantization axis, which stands at `axis`
    # again afterwards.
    "dequantize(Tensor codes, Tensor scales, str quantizer, int axis, SymInt size, ScalarType dtype, "
    "Tensor? global_scale=None) -> Tensor",
    # x, or 0 where the packed mask is not set, times the block-diagonal orthonormal Hadamard matrix along `axis`.
    "hadamard(Tensor x, int block, int axis, Tensor? mask=None) -> Tensor",
    # x = clamped + residual (to one rounding); the residual as values and positions along `axis` (moved last):
    # [..., R, m] each.
    "clamp_outliers(Tensor x, str clamp, int axis) -> (Tensor, Tensor, Tensor)",
    # x + residual; positions are [m] where the residual is one of columns (ir/columns.py).
    "restore_outliers(Tensor x, Tensor values, Tensor positions, str clamp, int axis) -> Tensor",
    # Codes, in COMPENSATED, of an operand that clamps outliers and adds their residual to its codes; scales; and
    # bounds, float32 [..., R, 3]: what a row was clamped to, and γ.
    "quantize_compensated(Tensor x, str operand, int axis) -> (Tensor, Tensor, Tensor)",
    # The same codes from the same x, where the bounds are known.
    "encode_compensated(Tensor x, Tensor bounds, str operand, int axis) -> Tensor",
    # Which elements let their gradient pass, one bit each, packed along `axis` (moved last): uint8 [..., R, ceil(K/8)].
    # With a `transform` they are elements of what it makes of x.
    "estimator_mask(Tensor x, Tensor scales, str quantizer, str estimator, int axis, "
    "Tensor? global_scale=None, str transform='') -> Tensor",
    # grad where the mask is set, else 0.
    "mask_gradient(Tensor grad, Tensor mask, int axis) -> Tensor",
    # grad ⊙ slope(x / scales): the estimators that need their input again.
    "scale_gradient(Tensor grad, Tensor x, Tensor scales, str quantizer, str estimator, int axis, "
    "Tensor? global_scale=None) -> Tensor",
    # a @ b (+ bias) on quantized operands, see kernels/matmul/reference.py for the operands' tensors and text. With
    # `offs`, the product of every group of rows of a with its own matrix of b [E, …], or, if b is a matrix too, of the
    # groups of the axis that is contracted: [E, …].
    "quantized_mm(Tensor[] a, str a_operand, SymInt a_size, bool a_transposed, Tensor[] b, str b_operand, "
    "SymInt b_size, bool b_transposed, ScalarType dtype, Tensor? bias=None, Tensor? offs=None) -> Tensor",
    # Codes and scales of x [M, N] · fold, whose rows are in groups that end at `offs` (int32 [E]); 8-bit formats only.
    # Along axis 1 fold is [E, N, 1], a row for each group: codes [M, N], scales [M, 1]. Along axis 0 fold is [M, 1] and
    # scales are those of a column in a group, [E, N, 1]; codes are [N, padded_rows(M, E)]: those of a group begin at a
    # multiple of GROUP_ALIGNMENT, and zeros fill its last one up.
    "quantize_groups(Tensor x, str quantizer, int axis, Tensor offs, Tensor fold) -> (Tensor, Tensor)",
    # What its codes [N, P] and scales [E, N, 1] along axis 0 stand for: [N, size] in `dtype`, size being M.
    "dequantize_groups(Tensor codes, Tensor scales, str quantizer, Tensor offs, SymInt size, ScalarType dtype) "
    "-> Tensor",
)
for _schema in _SCHEMAS:
    LIB.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


#: Quantizer whose decoder reads what ``quantize_compensated`` writes.
COMPENSATED = "e4m3 row absmax even"


#: Where the codes of a group begin that are contracted along the rows of all groups: a step of the kernels, so that
#: none of them reads two groups.
GROUP_ALIGNMENT = 128


def padded_rows(rows, groups):
    """How many rows ``groups`` groups of ``rows`` rows take at most if each begins at a multiple of GROUP_ALIGNMENT."""
    return (rows + (GROUP_ALIGNMENT - 1) * groups) // GROUP_ALIGNMENT * GROUP_ALIGNMENT


def register_meta(name: str):
    """Decorator: the shapes, strides and dtypes an op returns, as a kernel of the meta device.

    Fake tensors run it too. A rule of ``torch.library.register_fake`` would make every result by a dispatch of its own,
    which takes twice as long, and a compilation asks several times for each node. With symbolic sizes such a kernel can
    make tensors, but take no view of them.
    """

    def register(kernel):
        LIB.impl(name, kernel, "Meta")
        return kernel

    return register


def moved_shape(shape, axis: int) -> list:
    """``shape`` with ``axis`` moved last."""
    sizes = list(shape)
    sizes.append(sizes.pop(axis))
    return sizes


def index_dtype(extent) -> torch.dtype:
    """Narrowest dtype that holds positions below ``extent``; a symbolic extent is guarded on which one that is."""
    if extent <= 256:
        return torch.uint8
    return torch.int16 if extent <= 2**15 else torch.int32 if extent <= 2**31 else torch.int64


def residual_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype that holds the difference of two values of ``dtype`` (see :mod:`qcompile.kernels.outliers.reference`)."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def clamped_counts(clamp: OutlierClamp, extent):
    """How many elements out of ``extent`` can lie below the lower and above the upper quantile (order statistics).

    The bounds are the elements of rank ⌊(1 − α)n⌋ and ⌊αn⌋ of the sorted row, as in the released code of arXiv
    2501.17116. Integer arithmetic, so that ``extent`` may be symbolic.
    """
    parts = 10**6
    upper = round(clamp.alpha * parts)
    return (parts - upper) * extent // parts, torch.sym_max(extent - 1 - upper * extent // parts, 0)


def storage_dtype(quantizer: Quantizer) -> torch.dtype:
    return getattr(torch, quantizer.scale.storage)


@register_meta("quantize")
def _(x, quantizer, axis, global_scale=None, seed=None, fold=None, transform=""):
    q = Quantizer.parse(quantizer)
    shape = moved_shape(x.shape, axis)
    codes = x.new_empty([*shape[:-1], q.packed_size(shape[-1])], dtype=torch.uint8)
    return codes, x.new_empty(q.scale_shape(tuple(shape)), dtype=storage_dtype(q))


@register_meta("dequantize")
def _(codes, scales, quantizer, axis, size, dtype, global_scale=None):
    shape = [*codes.shape[:-1], size]
    shape.insert(axis % len(shape), shape.pop())
    return codes.new_empty_strided(shape, _stride_of_dequantized(shape, axis), dtype=dtype)


@register_meta("hadamard")
def _(x, block, axis, mask=None):
    return torch.empty_like(x)


@register_meta("clamp_outliers")
def _(x, clamp, axis):
    spec = OutlierClamp.parse(clamp)
    shape = moved_shape(x.shape, axis)
    if spec.per == "tensor":
        shape = [x.numel()]
    low, high = clamped_counts(spec, shape[-1])
    values = x.new_empty([*shape[:-1], low + high], dtype=residual_dtype(x.dtype))
    return torch.empty_like(x), values, values.new_empty(values.shape, dtype=index_dtype(shape[-1]))


@register_meta("restore_outliers")
def _(x, values, positions, clamp, axis):
    return torch.empty_like(x)


@register_meta("quantize_compensated")
def _(x, operand, axis):
    *rows, size = moved_shape(x.shape, axis)
    codes = x.new_empty([*rows, size], dtype=torch.uint8)
    return codes, *(x.new_empty([*rows, n], dtype=torch.float32) for n in (1, 3))


@register_meta("encode_compensated")
def _(x, bounds, operand, axis):
    return x.new_empty(moved_shape(x.shape, axis), dtype=torch.uint8)


@register_meta("estimator_mask")
def _(x, scales, quantizer, estimator, axis, global_scale=None, transform=""):
    shape = moved_shape(x.shape, axis)
    return x.new_empty([*shape[:-1], (shape[-1] + 7) // 8], dtype=torch.uint8)


@register_meta("mask_gradient")
def _(grad, mask, axis):
    return torch.empty_like(grad)


@register_meta("scale_gradient")
def _(grad, x, scales, quantizer, estimator, axis, global_scale=None):
    return torch.empty_like(grad)


@register_meta("quantized_mm")
def _(a, a_operand, a_size, a_transposed, b, b_operand, b_size, b_transposed, dtype, bias=None, offs=None):
    def stored(tensors, operand, size):
        shape = tensors[0].shape
        # Codes are packed along the last axis.
        return shape if Encoding.parse(operand).is_dense else (*shape[:-1], size)

    a_shape, b_shape = stored(a, a_operand, a_size), stored(b, b_operand, b_size)
    rows = a_shape[-1] if a_transposed else a_shape[-2]
    columns = b_shape[-2] if b_transposed else b_shape[-1]
    batch = a_shape[:-2] if offs is None or len(b_shape) == 3 else [offs.shape[0]]
    return a[0].new_empty([*batch, rows, columns], dtype=dtype)


@register_meta("quantize_groups")
def _(x, quantizer, axis, offs, fold):
    rows, size = x.shape
    groups = offs.shape[0]
    if axis % 2:
        codes, scales = [rows, size], [rows, 1]
    else:
        codes, scales = [size, padded_rows(rows, groups)], [groups, size, 1]
    return x.new_empty(codes, dtype=torch.uint8), x.new_empty(scales, dtype=torch.float32)


@register_meta("dequantize_groups")
def _(codes, scales, quantizer, offs, size, dtype):
    return codes.new_empty([codes.shape[0], size], dtype=dtype)


@register_flop_formula(torch.ops.qcompile.quantized_mm)
def _(a, a_operand, a_size, a_transposed, *rest, out_shape, **keywords):
    """Multiplications and additions, of which a memory budget of torch's partitioner asks."""
    rows = a[0][-2]
    grouped = len(out_shape) == 3 and len(a[0]) == 2  # the groups share what is contracted
    return 2 * math.prod(out_shape[grouped:]) * (rows if a_transposed else a_size)


def global_scale_of(x: Tensor, quantizer: Quantizer) -> Tensor | None:
    """Float32 scalar tensor amax/(448·max) for two-level scale rules (arXiv 2509.25149 App. B; of some rules less than
    448, :attr:`ScaleRule.largest`), else ``None``. It is at least SMALLEST_GLOBAL_SCALE.
    """
    if not quantizer.scale.two_level:
        return None
    if x.numel() == 0:
        return x.new_ones((), dtype=torch.float32)
    amax = x.detach().abs().amax().float()
    return (amax / torch.full_like(amax, quantizer.scale.largest * quantizer.format.max)).clamp(
        min=SMALLEST_GLOBAL_SCALE
    )


def transform_of(spec: Operand, x: Tensor, axis: int) -> Transform:
    """The operand's transform on this axis of x; a rotation needs to know how long it is."""
    return spec.transform.on(int(x.shape[axis])) if spec.transform.rotation > 1 else spec.transform


def outliers_of(spec: Operand, x: Tensor, axis: int) -> Outliers | None:
    """What is done to the outliers of x; ``None`` where x is too short to have elements beyond its quantiles."""
    if not isinstance(spec.outliers, OutlierClamp):
        return spec.outliers
    extent = x.shape[axis] if spec.outliers.per == "row" else x.numel()
    return spec.outliers if any(clamped_counts(spec.outliers, extent)) else None


def without_outliers(x: Tensor, outliers: Outliers, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """What of x is quantized, and the values and positions of its residual."""
    if isinstance(outliers, OutlierColumns):
        return take_columns(x, outliers, axis)[:3]
    return torch.ops.qcompile.clamp_outliers(x, str(outliers), axis)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """For formulas that choose their own precision: autocast is on inside a Function's forward, eager and traced."""
    kind = x.device.type
    # The meta device has none.
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class _FakeQuantize(torch.autograd.Function):
    """quantize → dequantize forward, the operand's estimator backward."""

    @staticmethod
    def forward(x: Tensor, operand: str, axis: int, seed: Tensor | None):
        ops = torch.ops.qcompile
        spec = Operand.parse(operand)
        quantizer, transform = str(spec.stored), transform_of(spec, x, axis)
        outliers = outliers_of(spec, x, axis)
        values = positions = mask = None
        rest = x
        if outliers and outliers.residual == "e4m3":
            codes, scales, _ = ops.quantize_compensated(x, operand, axis)
            return ops.dequantize(codes, scales, COMPENSATED, axis, x.shape[axis], x.dtype), scales, None, None
        if outliers:
            rest, values, positions = without_outliers(x, outliers, axis)
        rotated = transform.rotation > 1 and spec.quantizer.scale.two_level
        if rotated:  # the scale of the tensor is one of what is rotated
            rest = ops.hadamard(rest, transform.rotation, axis)
        text = (str(transform),) if transform and not rotated else ()
        fold = (None,) * len(text)
        global_scale = global_scale_of(rest, spec.quantizer)
        codes, scales = ops.quantize(rest, quantizer, axis, global_scale, seed, *fold, *text)
        y = ops.dequantize(codes, scales, quantizer, axis, x.shape[axis], x.dtype, global_scale)
        if transform.rotation > 1:
            y = ops.hadamard(y, transform.rotation, axis)
        if outliers and outliers.compensate:
            y = ops.restore_outliers(y, values, positions, str(outliers), axis)
        if spec.estimator.kind.mask:
            mask = ops.estimator_mask(rest, scales, quantizer, str(spec.estimator), axis, global_scale, *text)
        return y, scales, mask, global_scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.operand, ctx.axis, _ = inputs
        _, scales, mask, global_scale = output
        ctx.mark_non_differentiable(*(t for t in (scales, mask, global_scale) if t is not None))
        kind = Operand.parse(ctx.operand).estimator.kind
        ctx.save_for_backward(*((x, scales, global_scale) if kind.slope else (mask,) if kind.mask else ()))

    @staticmethod
    def backward(ctx, grad, *_):
        ops = torch.ops.qcompile
        spec = Operand.parse(ctx.operand)
        if spec.estimator.kind.slope:
            x, scales, global_scale = ctx.saved_tensors
            grad = ops.scale_gradient(grad, x, scales, str(spec.quantizer), str(spec.estimator), ctx.axis, global_scale)
        elif spec.estimator.kind.mask:
            (mask,) = ctx.saved_tensors
            rotation = transform_of(spec, grad, ctx.axis).rotation
            if rotation > 1:  # the mask is one of rotated elements
                grad = ops.hadamard(ops.hadamard(grad, rotation, ctx.axis), rotation, ctx.axis, mask)
            else:
                grad = ops.mask_gradient(grad, mask, ctx.axis)
        return grad, None, None, None


#: ``(x̂, scales, mask, global scale)`` of x, an operand's text, an axis and a seed: the forward alone, which autograd
#: does not see. Mask and global scale are ``None`` where there is none.
quantized = _FakeQuantize.forward


class _FakeQuantizeShards(torch.autograd.Function):
    """The same of a DTensor, on this rank's shard (:mod:`qcompile.ir.sharding`)."""

    @staticmethod
    def forward(x: Tensor, operand: str, axis: int, seed: Tensor | None):
        y, *rest = _FakeQuantize.forward(local_tensor(x), operand, axis, seed)
        return with_local(x, y, _stride_of_dequantized(x.shape, axis)), *rest

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, *rest = inputs
        ctx.placements = x.placements
        _FakeQuantize.setup_context(ctx, (local_tensor(x), *rest), output)

    @staticmethod
    def backward(ctx, grad, *_):
        kind = Operand.parse(ctx.operand).estimator.kind
        if not (kind.slope or kind.mask):
            return grad, None, None, None
        grad = aligned(grad, ctx.placements)
        local = local_tensor(grad)
        result, *rest = _FakeQuantize.backward(ctx, local)
        # Gradients keep their layout, but for those that are broadcast from fewer elements.
        stride = grad.stride() if result.stride() == local.stride() else _stride_of_dequantized(grad.shape, -1)
        return with_local(grad, result, stride), *rest


def _stride_of_dequantized(shape, axis: int) -> tuple:
    """Strides of what ``dequantize`` returns: dense, with ``axis`` innermost."""
    strides = [1]
    for size in reversed(moved_shape(shape, axis)[1:]):
        strides.insert(0, strides[0] * size)
    strides.insert(axis % len(shape), strides.pop())
    return tuple(strides)


def _fake_quantize(x: Tensor, operand: str, axis: int, seed: Tensor | None = None) -> Tensor:
    with without_autocast(x):
        if is_sharded(x):
            return _FakeQuantizeShards.apply(without_partial_sums(x), operand, axis, seed)[0]
        return _FakeQuantize.apply(x, operand, axis, seed)[0]


LIB.impl("fake_quantize", _fake_quantize, "CompositeImplicitAutograd")


def quantize_along(
    x: Tensor, operand: str, rows: Sequence[int], contracted: Sequence[int], bits: Tensor | None = None
) -> Tensor:
    """``x`` quantized and decoded again, as a product reads it that contracts the axes ``contracted`` of x and keeps
    ``rows``; the other axes count batches. Same shape and dtype as x.

    Axes are not negative; those of a group are merged. Where nothing is contracted a row is one element. With one scale
    for all elements the axes do not matter, and x is quantized as it is, so that two products can share its codes.

    A rotation of the operand is one of the contracted axes, merged, and is not undone: the other operand of the product
    has to be rotated alike, with the same ``bits`` where signs are drawn.
    """
    spec = Operand.parse(operand)
    if spec.quantizer.granularity.kind == "tensor" and not spec.transform and x.dim():
        return _rounded(x, spec, -1, bits)
    natural = list(range(x.dim()))
    batch = [axis for axis in natural if axis not in rows and axis not in contracted]
    # Then x is read as it lies, along its last axis but one.
    crossed = bool(rows and contracted) and [*batch, *contracted, *rows] == natural
    groups = (contracted, rows) if crossed else (rows, contracted)
    order = [*batch, *groups[0], *groups[1]]
    permuted = x if order == natural else x.permute(order)
    merged = any(len(group) != 1 for group in groups)
    sizes = [math.prod(x.shape[axis] for axis in group) for group in groups]
    matrix = permuted.reshape([*(x.shape[axis] for axis in batch), *sizes]) if merged else permuted
    y = _rounded(matrix, spec, -2 if crossed else -1, bits)
    y = y.reshape(permuted.shape) if merged else y
    return y if order == natural else y.permute([order.index(axis) for axis in natural])


def _rounded(x: Tensor, spec: Operand, axis: int, bits: Tensor | None) -> Tensor:
    ops, q = torch.ops.qcompile, spec.quantizer
    if (transform := spec.transform.on(x.shape[axis])).rotation > 1:
        x = ops.hadamard(with_signs(x, transform, axis, bits), transform.rotation, axis)
    seed = torch.randint(0, 2**31 - 1, (1,), device=x.device) if q.draws else None
    global_scale = global_scale_of(x, q)
    codes, scales = ops.quantize(x, str(q), axis, global_scale, seed)
    return ops.dequantize(codes, scales, str(q), axis, x.shape[axis], x.dtype, global_scale)


def with_signs(x: Tensor, transform: Transform, axis: int, bits: Tensor | None = None) -> Tensor:
    """x · D: every block along ``axis`` (-1 or -2) times the signs of the rotation, drawn ones of ``bits``."""
    n = transform.rotation
    if not transform.signs:
        return x
    if transform.signs == "fixed":
        bits = (FIXED_SIGNS >> torch.arange(n, device=x.device) % 16) & 1
    assert bits is not None, "signs are drawn by whoever rotates both operands"
    signs = 1 - 2 * bits[:n]
    row = signs.to(x.dtype).expand(x.shape[axis] // n, n).reshape(-1)
    return x * (row if axis == -1 else row.unsqueeze(-1))


def _read_again(x: Tensor, operand: str, rows: list[int], contracted: list[int], bits: Tensor | None = None) -> Tensor:
    with without_autocast(x):
        return quantize_along(x.detach(), operand, rows, contracted, bits)


LIB.impl("read_again", _read_again, "CompositeImplicitAutograd")


class _SplitGradient(torch.autograd.Function):
    """y forward; dY to y and ``quantize_along(dY)`` to the twins backward."""

    @staticmethod
    def forward(
        y: Tensor, operand: str | None, rows: list[int], contracted: list[int], bits: Tensor | None, *twins: Tensor
    ) -> Tensor:
        return y.detach()  # no view of y as autograd counts them: those cannot be changed in place

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.how, bits = inputs[:5]
        ctx.twins = len(inputs) - 5
        ctx.save_for_backward(*(() if bits is None else (bits,)))

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            rounded = grad if ctx.how[0] is None else quantize_along(grad, *ctx.how, *ctx.saved_tensors)
            return grad, None, None, None, None, *[rounded] * ctx.twins


def _split_gradient(
    y: Tensor,
    twins: list[Tensor],
    operand: str | None,
    rows: list[int],
    contracted: list[int],
    bits: Tensor | None = None,
) -> Tensor:
    return _SplitGradient.apply(y, operand, rows, contracted, bits, *twins)


LIB.impl("split_gradient", _split_gradient, "CompositeImplicitAutograd")
