"""How a product may be spelled, and where its operands are.

:data:`SPELLINGS` is the table of what is understood; :data:`OUT_OF_SCOPE` names the products that are seen but left
alone. A new spelling is one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from qcompile import compat
from qcompile.ir.sharding import local_tensor

from .graph import argument_of, static_size, target_name, value_of

__all__ = [
    "ATTENTION", "HIGHER_ORDER_ATTENTION", "OUT_OF_SCOPE", "SPELLINGS", "TRANSFORM", "Frame", "Recognized", "Slot",
    "einsum_letters", "is_in", "is_opaque", "name_of", "recognize",
]  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Reshaping that turns an operand into rows × contraction axis before it is quantized, and back afterwards.

    ``flatten``: merge the axes from this one on (a convolution's weight, or its whole sample), after ``lead`` has been
    moved to the front. ``patch``: kernel extents of a convolution whose windows tile its input; each window becomes a
    row.
    """

    flatten: int | None = None
    lead: int = 0
    patch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Slot:
    """One operand of a GEMM: where the node holds it and which axis is contracted."""

    position: int
    keyword: str
    axis: int
    frame: Frame | None = None
    kind: str = "activation"
    note: str = ""
    item: int | None = None
    """Index into the argument where it is a list of operands (einsum)."""
    stored: str = ""
    """How the operand is stored as codes (text of a :class:`qcompile.ir.stored.Stored`); empty if it is wide."""

    def of(self, node: Node) -> Any:
        argument = self.argument(node)
        return argument if self.item is None else argument[self.item]

    def argument(self, node: Node) -> Any:
        """The operand, or the list that it is in."""
        by_keyword = self.position >= len(node.args)
        return node.kwargs.get(self.keyword_in(node)) if by_keyword else node.args[self.position]

    def put(self, node: Node, value: Any) -> None:
        """Let the node read ``value`` here."""
        if self.item is not None:
            operands = list(self.argument(node))
            operands[self.item] = value
            value = operands
        if self.position >= len(node.args):
            node.update_kwarg(self.keyword_in(node), value)
        else:
            node.update_arg(self.position, value)

    def keyword_in(self, node: Node) -> str:
        """The operand's keyword as this call spells it: what torch's functions call ``input`` is ``self`` in ATen."""
        target: Any = node.target
        if isinstance(target, compat.OpOverloadPacket):
            target = getattr(target, target.overloads()[0])
        aten = isinstance(target, compat.OpOverload)
        return str(target._schema.arguments[self.position].name) if aten else self.keyword

    def size(self, node: Node) -> Any:
        """How many elements a row of the operand has, along the axis it is quantized on."""
        shape = list(local_tensor(value_of(self.of(node))).shape)
        if self.frame is None:
            return shape[self.axis]
        if self.frame.flatten is not None:
            shape.insert(0, shape.pop(self.frame.lead))
            return math.prod(shape[self.frame.flatten :])
        return shape[1] * math.prod(self.frame.patch or ())


class Unsupported(Exception):  # noqa: N818  (a reason, not an error)
    """A spelling recognized as a GEMM but not in a form we quantize; the message is the reason in the plan."""


Locate = Callable[[Node], tuple[Slot, Slot]]


# --- spellings ------------------------------------------------------------------------------------------------------


_VECTORS = "a product of two vectors"
_OVERLAP = "output windows overlap; its operands have no exact scale per row"
_PER_POSITION = "one scale per position"
_PER_WINDOW = "one scale per window (windows tile the input)"
_PER_SAMPLE = "one scale per sample: windows overlap or leave a rest, so a position has no scale of its own"


def _fixed(a: tuple[int, str, int], b: tuple[int, str, int]) -> Locate:
    slots = (Slot(*a), Slot(*b))
    return lambda node: slots


def _matmul(left: int, right: int, right_name: str) -> Locate:
    def locate(node: Node) -> tuple[Slot, Slot]:
        slots = Slot(left, "input", -1), Slot(right, right_name, -2)
        dims = [value_of(slot.of(node)).dim() for slot in slots]
        if dims == [1, 1]:
            raise Unsupported(_VECTORS)
        return slots if dims[1] > 1 else (slots[0], replace(slots[1], axis=-1))

    return locate


def _tensordot(node: Node) -> tuple[Slot, Slot]:
    """``torch.tensordot(a, b, dims)``: dims is a number of axes or two lists of them, which ATen's op takes apart."""
    given = dict(enumerate(node.args)) | node.kwargs
    dims: Any = given.get(2, given.get("dims", given.get("dims_self", 2)))
    if (others := given.get(3, given.get("dims_other"))) is not None:
        dims = (dims, others)
    if isinstance(dims, int) and dims == 1:
        dims = ([-1], [0])
    listed = isinstance(dims, (list, tuple)) and len(dims) == 2 and all(isinstance(d, (list, tuple)) for d in dims)
    if listed and len(dims[0]) == 1:
        return Slot(0, "a", dims[0][0]), Slot(1, "b", dims[1][0])
    msg = "tensordot contracts several axes; one scale per row needs a single contraction axis"
    raise Unsupported(msg)


def _einsum(node: Node) -> tuple[Slot, Slot]:
    equation, *operands = node.args or (node.kwargs["equation"],)
    operands = operands or [node.kwargs["tensors"]]  # ATen's own spelling
    if not isinstance(equation, str):
        msg = "einsum in sublist form; write the equation as a string"
        raise Unsupported(msg)
    nested = len(operands) == 1 and isinstance(operands[0], (list, tuple))
    values: Any = operands[0] if nested else operands
    if len(values) != 2:
        msg = f"einsum of {len(values)} operands; only products of two are quantized"
        raise Unsupported(msg)
    terms, output = einsum_letters(equation)
    for term in terms:
        letters = term.replace(".", "")
        if len(set(letters)) != len(letters):
            msg = f"einsum {equation!r} takes a diagonal"
            raise Unsupported(msg)
    contracted = [c for c in terms[0] if c != "." and c in terms[1] and c not in output]
    if len(contracted) != 1:
        msg = f"einsum {equation!r} contracts {len(contracted)} pairs of axes; exactly one is supported"
        raise Unsupported(msg)
    axes = [_letter_axis(term, contracted[0]) for term in terms]
    if nested:
        return Slot(1, "operands", axes[0], item=0), Slot(1, "operands", axes[1], item=1)
    return Slot(1, "operands", axes[0]), Slot(2, "operands", axes[1])


def einsum_letters(equation: str) -> tuple[list[str], str]:
    """Terms of the operands and of the result of an equation."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.replace(",", "").replace(".", "")
    implied = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return inputs.split(","), output if arrow else ("..." if "..." in inputs else "") + implied


def _letter_axis(term: str, letter: str) -> int:
    """Axis of a letter, counted from the end if an ellipsis stands before it."""
    head, dots, tail = term.partition("...")
    if letter in head:
        return head.index(letter)
    return tail.index(letter) - len(tail) if dots else term.index(letter)


def _divides(kernel: tuple[int, ...], extents: Sequence[Any]) -> bool:
    """Whether windows fill an input; decided by a guard where its size is symbolic."""
    return all(compat.guarded_bool(extent % size == 0) for extent, size in zip(extents, kernel, strict=True))


def _conv(groups_at: int, transposed_at: int | None = None) -> Locate:
    """Convolutions contract channels × window. The weight's rows are its output channels. The input's rows depend on
    how windows overlap: per position for 1×1, per window where the windows tile the input, else one scale per sample,
    since an element that several windows read cannot carry the scale of each."""

    def locate(node: Node) -> tuple[Slot, Slot]:
        def per_axis(value: Any) -> tuple[int, ...]:
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            return value * dims if len(value) == 1 else value

        if transposed_at is not None and argument_of(node, transposed_at, "transposed", False):
            raise Unsupported(_OVERLAP)
        x_slot, weight_slot = Slot(0, "input", -1), Slot(1, "weight", -1, Frame(flatten=1))
        x, weight = (value_of(slot.of(node)) for slot in (x_slot, weight_slot))
        dims = weight.dim() - 2
        stride, padding = argument_of(node, 3, "stride", 1), argument_of(node, 4, "padding", 0)
        dilation, groups = per_axis(argument_of(node, 5, "dilation", 1)), argument_of(node, groups_at, "groups", 1)
        kernel = tuple(int(k) for k in weight.shape[2:])
        unpadded = padding == "valid" or (not isinstance(padding, str) and not any(per_axis(padding)))
        channels = x.dim() - dims - 1
        if groups == 1 and all(k == 1 for k in kernel):
            return replace(x_slot, axis=channels, note=_PER_POSITION), weight_slot
        tiled = per_axis(stride) == kernel and all(d == 1 for d in dilation) and x.dim() == dims + 2
        if groups == 1 and unpadded and tiled and _divides(kernel, x.shape[2:]):
            return replace(x_slot, frame=Frame(patch=kernel), note=_PER_WINDOW), weight_slot
        return replace(x_slot, frame=Frame(flatten=channels), note=_PER_SAMPLE), weight_slot

    return locate


def _conv_tbc(node: Node) -> tuple[Slot, Slot]:
    """Input [time, batch, channels], weight [window, channels, outputs]; scales as for other convolutions."""
    x, weight = Slot(0, "input", -1), Slot(1, "weight", -2)
    if static_size(value_of(weight.of(node)).shape[0]) == 1:
        return replace(x, note=_PER_POSITION), weight
    sample, filters = Frame(flatten=1, lead=1), Frame(flatten=1, lead=2)
    return replace(x, frame=sample, note=_PER_SAMPLE), replace(weight, axis=-1, frame=filters)


_LINEAR = _fixed((0, "input", -1), (1, "weight", -1))
_MATMUL = _matmul(0, 1, "other")
_MM = _matmul(0, 1, "mat2")
_ADDMM = _fixed((1, "mat1", -1), (2, "mat2", -2))
_ADDBMM = _fixed((1, "batch1", -1), (2, "batch2", -2))
_GROUPED = _fixed((0, "input", -1), (1, "mat2", -2))
_CONV = _conv(groups_at=6)
_CONVOLUTION = _conv(groups_at=8, transposed_at=6)

#: Name of a product (:func:`name_of`) → (op kind, where its operands are). One entry serves the function, the tensor
#: method, the form in place, and every overload of the ATen op.
SPELLINGS: dict[str, tuple[str, Locate]] = {
    "linear": ("linear", _LINEAR),
    "matmul": ("matmul", _MATMUL),
    "linalg_matmul": ("matmul", _MATMUL),
    "__rmatmul__": ("matmul", _fixed((1, "other", -1), (0, "self", -2))),
    "mm": ("mm", _MM),
    "mv": ("mv", _fixed((0, "input", -1), (1, "vec", -1))),
    "addmv": ("addmv", _fixed((1, "mat", -1), (2, "vec", -1))),
    "bmm": ("bmm", _MM),
    "addmm": ("addmm", _ADDMM),
    "_addmm_activation": ("addmm", _ADDMM),
    "addbmm": ("addbmm", _ADDBMM),
    "baddbmm": ("baddbmm", _ADDBMM),
    "inner": ("inner", _fixed((0, "input", -1), (1, "other", -1))),
    "einsum": ("einsum", _einsum),
    "tensordot": ("tensordot", _tensordot),
    "conv1d": ("conv1d", _CONV),
    "conv2d": ("conv2d", _CONV),
    "conv3d": ("conv3d", _CONV),
    "_convolution_mode": ("convolution", _CONV),
    "convolution": ("convolution", _CONVOLUTION),
    "_convolution": ("convolution", _CONVOLUTION),
    "conv_tbc": ("conv_tbc", _conv_tbc),
    "grouped_mm": ("grouped_mm", _GROUPED),
    "_grouped_mm": ("grouped_mm", _GROUPED),
    "transformers::grouped_mm_fallback": ("grouped_mm", _GROUPED),
}

ATTENTION = "attention is left in high precision (as in every published recipe)"
TRANSFORM = "inside a torch.func transform (vmap, grad): estimators do not compose with it"
_HIDDEN = "its products are not visible in the graph"
_OPAQUE = f"one opaque op; {_HIDDEN}"
_FAST_PATH = f"{_OPAQUE} (without torch.backends.mha.set_fastpath_enabled(False), which shows them)"
_OUTER = "an outer product, nothing is summed"
_QUANTIZED = "its operands are quantized already"
_DISTANCE = "a distance, not a product"
_SPARSE = "an operand is nested or sparse; only dense tensors are quantized"
_ORDER = "the order of products is chosen at run time"
_BILINEAR = "contracts two axes at once; no scale per row factors out"
_FUNCTION = "a function of a matrix, which is computed by many products; rounding errors would add up"
_FACTORS = "solves or factors a matrix; rounding errors would grow with its condition number"
_BACKWARD = "the backward of a product, called by hand"
_KERNEL = "a kernel of one device's own; spell it as the op that torch dispatches to it"

#: Reason → names of the products that are recognized and left alone for it.
_REASONS: dict[str, str] = {
    ATTENTION: """
        scaled_dot_product_attention _scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps
        _scaled_dot_product_cudnn_attention _scaled_dot_product_efficient_attention
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_fused_attention_overrideable _cudnn_attention_forward
        _cudnn_attention_forward_no_dropout_inplace _efficient_attention_forward
        _flash_attention_forward _flash_attention_forward_no_dropout_inplace _triton_scaled_dot_attention
        torch_attn::_varlen_attn torch_attn::_varlen_attn_out flex_attention flex_attention_backward
    """,
    _OPAQUE: """
        multi_head_attention_forward _triton_multi_head_attention linear_cross_entropy lstm gru rnn_tanh rnn_relu
        lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _cudnn_rnn miopen_rnn mkldnn_rnn_layer _lstm_mps
    """,
    _FAST_PATH: "_transformer_encoder_layer_fwd _native_multi_head_attention",
    _VECTORS: "dot vdot linalg_vecdot",
    _OUTER: "outer ger addr kron",
    _QUANTIZED: """
        _int_mm _scaled_mm _scaled_mm_v2 scaled_mm _scaled_addmm _scaled_grouped_mm _scaled_grouped_mm_v2
        scaled_grouped_mm _mixed_dtypes_linear _dyn_quant_matmul_4bit _weight_int4pack_mm _weight_int4pack_mm_for_cpu
        _weight_int4pack_mm_with_scales_and_zeros _weight_int8pack_mm _wrapped_quantized_linear_prepacked
        fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight
        fbgemm_linear_int8_weight_fp32_activation quantized_gru quantized_gru_cell quantized_lstm quantized_lstm_cell
        quantized_rnn_relu_cell quantized_rnn_tanh_cell out_dtype
    """,
    _DISTANCE: "cdist _cdist_forward pdist _pdist_forward",
    "a covariance: the data times itself": "cov corrcoef",
    "coordinates of a sampling grid": "affine_grid affine_grid_generator cudnn_affine_grid_generator",
    "a list of products in one op": "_foreach_mm",
    TRANSFORM: "_autograd_grad",
    _SPARSE: """
        _sparse_mm _sparse_addmm _sparse_mm_reduce_impl _sparse_sparse_matmul sparse_sampled_addmm hspmm smm sspaddmm
        _spsolve _cslt_sparse_mm _sparse_semi_structured_mm _sparse_semi_structured_addmm
        _sparse_semi_structured_linear
    """,
    _ORDER: "chain_matmul linalg_multi_dot",
    _BILINEAR: "bilinear _trilinear",
    _OVERLAP: "conv_transpose1d conv_transpose2d conv_transpose3d slow_conv_transpose2d slow_conv_transpose3d",
    _FUNCTION: "matrix_power linalg_matrix_power matrix_exp linalg_matrix_exp linalg_matrix_sqrth",
    _FACTORS: """
        linalg_polar inverse linalg_inv linalg_inv_ex pinverse linalg_pinv linalg_tensorinv linalg_solve linalg_solve_ex
        _linalg_solve_ex linalg_tensorsolve linalg_solve_triangular triangular_solve cholesky_solve
        _cholesky_solve_helper linalg_lu_solve lu_solve linalg_ldl_solve linalg_lstsq cholesky cholesky_inverse
        linalg_cholesky linalg_cholesky_ex linalg_ldl_factor linalg_ldl_factor_ex linalg_lu linalg_lu_factor
        linalg_lu_factor_ex _lu_with_info lu_unpack lu qr geqrf linalg_qr linalg_householder_product orgqr ormqr svd
        linalg_svd _linalg_svd linalg_svdvals linalg_eig linalg_eigh _linalg_eigh linalg_eigvals _linalg_eigvals
        linalg_eigvalsh det linalg_det _linalg_det logdet slogdet linalg_slogdet _linalg_slogdet
    """,
    _KERNEL: """
        _conv_depthwise2d conv_depthwise3d _slow_conv2d_forward slow_conv3d slow_conv3d_forward slow_conv_dilated2d
        slow_conv_dilated3d thnn_conv2d convolution_overrideable cudnn_convolution cudnn_convolution_add_relu
        cudnn_convolution_relu cudnn_convolution_transpose miopen_convolution miopen_convolution_add_relu
        miopen_convolution_relu miopen_convolution_transpose miopen_depthwise_convolution mkldnn_convolution
        mkldnn_linear _mps_convolution _mps_convolution_transpose _nnpack_spatial_convolution
    """,
    _BACKWARD: """
        _convolution_double_backward convolution_backward_overrideable mkldnn_linear_backward_input
        mkldnn_linear_backward_weights lstm_mps_backward mps_convolution_backward mps_convolution_transpose_backward
        _efficient_attention_backward _flash_attention_backward _cudnn_attention_backward _cdist_backward
        _pdist_backward _slow_conv2d_backward transformers::grouped_mm_fallback_backward
    """,
}  # fmt: skip
#: What the report calls them, where that is not their name.
_REPORTED_AS = {
    "scaled_dot_product_attention": "sdpa",
    "multi_head_attention_forward": "multi_head_attention",
    "_native_multi_head_attention": "multi_head_attention",
    "_transformer_encoder_layer_fwd": "transformer_encoder_layer",
    "_autograd_grad": "func.grad",
}
_REASON_OF = {name: reason for reason, names in _REASONS.items() for name in names.split()}
_REASON_OF = {f"{name}_backward": _BACKWARD for name in (*SPELLINGS, *_REASON_OF)} | _REASON_OF
#: Name → (op kind, reason).
OUT_OF_SCOPE: dict[str, tuple[str, str]] = {
    name: (_REPORTED_AS.get(name, name.removeprefix("linalg_").strip("_")), reason)
    for name, reason in _REASON_OF.items()
}
HIGHER_ORDER_ATTENTION = ("flex_attention", "flex_attention_backward")

#: Namespaces of ops that are torch's own or ours and that the tables above name as far as they are products.
_TORCH = frozenset(
    {
        "aten", "prims", "prim", "debugprims", "rngprims", "qcompile", "inductor", "higher_order", "profiler",
        "streams", "c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "fsdp",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Recognized:
    """A product, by its spelling alone. ``obstacle`` says why it cannot be quantized; empty if it may be."""

    op: str
    slots: tuple[Slot, ...] = ()
    obstacle: str = ""


def recognize(node: Node) -> Recognized | None:
    """What product a call is; ``None`` for anything else."""
    name = name_of(node)
    if name in OUT_OF_SCOPE:
        op, reason = OUT_OF_SCOPE[name]
        return Recognized(op, obstacle=reason)
    if name not in SPELLINGS:
        return _opaque(node, name)
    op, locate = SPELLINGS[name]
    try:
        return Recognized(op, locate(node))
    except Unsupported as reason:
        return Recognized(op, obstacle=str(reason))


def name_of(node: Node) -> str:
    """What a call is named in ATen, however it is made: as a function of torch's, a tensor method, in place, as an
    operator of Python's, or as an ATen op. Ops of other libraries have their namespace before them; "" for a function
    that is not torch's.
    """
    is_torch = node.op == "call_function" and (_is_op(node.target) or _is_torch(node.target))
    if not (is_torch or node.op == "call_method"):
        return ""
    name = target_name(node)
    if name in ("__matmul__", "__imatmul__", "imatmul"):
        return "matmul"
    return name if name.endswith("__") else name.removesuffix("_")


def _is_op(target: Any) -> bool:
    return isinstance(target, (compat.OpOverload, compat.OpOverloadPacket, compat.HigherOrderOperator))


def _is_torch(function: Any) -> bool:
    owner = getattr(function, "__objclass__", None)  # of torch.Tensor.matmul
    module = str((owner or function).__module__)
    return module.partition(".")[0] in ("torch", "_operator", "operator") and hasattr(function, "__name__")


def is_opaque(node: Node) -> bool:
    """Whether a call is an op of another library, or a kernel, that may be a product; see `recognize`."""
    return _opaque(node, name_of(node)) is not None


_TRITON = ("triton_kernel_wrapper_mutation", "triton_kernel_wrapper_functional")


def _opaque(node: Node, name: str) -> Recognized | None:
    """A call of somebody else's code that may be a product: it reads two tensors, one of them a floating matrix."""
    library, is_op, _ = name.partition("::")
    if name in _TRITON:
        op = compat.triton_kernel_name(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
        what = "one opaque Triton kernel"
    elif is_op and library not in _TORCH:
        op, what = name, f"one opaque op of {library}"
    else:
        return None
    tensors = [v for v in map(value_of, node.all_input_nodes) if isinstance(v, torch.Tensor)]
    if len(tensors) < 2 or not any(v.dim() > 1 and v.is_floating_point() for v in tensors):
        return None
    return Recognized(op, obstacle=f"{what}; its products, if it has any, are not visible in the graph")


def is_in(table: Container[Any], target: Any) -> bool:
    """Whether a call's target is in a table; unhashable ones are in none."""
    try:
        return target in table
    except TypeError:
        return False
