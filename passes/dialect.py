"""Reading the ``qcompile::`` dialect: which tensors an operand is made of, and through which views a GEMM sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Graph, Node

from qcompile.ir.encoding import Encoding
from qcompile.ir.nested import NestedScales
from qcompile.ir.operand import Operand
from qcompile.ir.stored import Stored

from .graph import aten, emit, input_of, is_call, is_cast, memory_of, same_size, same_sizes, static_size, through_views
from .record import operand_kind
from .views import (
    Dequantize,
    Hadamard,
    Mm1Bit,
    Mm8Bit,
    Mm8BitGrouped,
    MmBlockScaled,
    MmStored,
    ProductOperand,
    RestoreOutliers,
)  # fmt: skip

__all__ = [
    "GEMMS",
    "LOOP",
    "LOOP_BACKWARD",
    "StoredWeight",
    "adds_given_part",
    "decode_root",
    "gemm_operands",
    "given_part",
    "kind_of",
    "lies_in_memory",
    "matrix_form",
    "stored_operand",
    "stored_view",
    "stored_weight",
]

#: ATen products → positions of their two matrix operands.
GEMMS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten._grouped_mm.default: (0, 1),
}
#: What is no loop of Inductor's: its results are in memory.
_WRITING = (
    *(view.op for view in (Hadamard, Mm8Bit, Mm8BitGrouped, Mm1Bit, MmBlockScaled, MmStored)),
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._grouped_mm.default,
)

#: transformers' products of groups in other dtypes than bfloat16, and both gradients of one: opaque ops.
LOOP, LOOP_BACKWARD = "transformers::grouped_mm_fallback", "transformers::grouped_mm_fallback_backward"


def gemm_operands(node: Node) -> tuple[Node, Node]:
    left, right = GEMMS[node.target]
    return node.args[left], node.args[right]  # type: ignore[return-value]


def lies_in_memory(node: Node) -> bool:
    """Whether ``node`` is an input of a post-grad graph, what a kernel that is not printed writes, or a part of it."""
    source = memory_of(node)
    return source.op == "placeholder" or is_call(source, *_WRITING)


def decode_root(node: Node, changed: bool = False) -> Node | None:
    """The ``dequantize`` or ``restore_outliers`` an operand is a view of, or ``None``.

    ``changed``: also if what is decoded has been rotated back since, or has had its zeros added, which keeps a product
    from reading codes.
    """
    root = through_views(node)
    if changed:
        change = through_views(input_of(root)) if is_cast(root) else root
        if is_call(change, Hadamard.op) or adds_given_part(change):
            root = through_views(input_of(change))
    return root if is_call(root, Dequantize.op, RestoreOutliers.op) else None


def given_part(node: Node) -> Node | None:
    """The input of the graph that a node is, or copies as it is; ``None`` if there is none."""
    source = input_of(node) if is_call(node, aten.clone.default) else node
    return source if source.op == "placeholder" else None


def _of_given_part(node: Node) -> bool:
    """Whether a node, through views, is such an input, or what is taken of one by indices: experts."""
    node = through_views(node)
    if is_call(node, aten.index.Tensor, aten.index_select.default):
        node = through_views(input_of(node))
    return given_part(node) is not None


def adds_given_part(node: Node) -> bool:
    """Whether what is decoded of a stored weight gets a part of it added that is an input of the graph: decoded scales
    their mean, or levels their zeros.
    """
    if not is_call(node, aten.add.Tensor) or not isinstance(node.args[1], Node):
        return False
    decoded = through_views(input_of(node))
    given = is_call(decoded, Dequantize.op) and _of_given_part(Dequantize.of(decoded).codes)
    return given and _of_given_part(node.args[1])


class StoredWeight(NamedTuple):
    """A weight that the graph was given, as ``mm_stored`` reads it (:mod:`qcompile.ir.tensor_core_ops`)."""

    stored: Stored
    codes: Node
    scales: Node
    second: Node | None
    offset: Node | None
    high_first: bool


def stored_weight(operand: ProductOperand) -> StoredWeight | None:
    """A quantized operand that is one; else ``None``."""
    spec = operand.encoding.operand
    codes, high_first = _given_codes(operand.first)
    if spec is None or spec.outliers or codes is None:
        return None
    _, scales, second, *_ = operand.parts
    row, offset = through_views(scales), None
    if adds_given_part(row):
        row, offset = input_of(row), row.args[1]
    nested = None
    if coded := Dequantize.match(row):
        nested = NestedScales(coded.quantizer, mean=offset is not None)
        scales, second = coded.codes, coded.scales
    return StoredWeight(Stored(spec.quantizer, nested), codes, scales, second, offset, high_first)  # type: ignore


def _given_codes(codes: Node) -> tuple[Node | None, bool]:
    """The bytes that the graph was given as codes, or as codes whose halves `adopt` has swapped, and whether it has;
    ``None`` for others.
    """
    if given_part(through_views(codes)) is not None:
        return codes, False
    if is_call(codes, aten.bitwise_or.Tensor):
        up, down = codes.all_input_nodes if len(codes.all_input_nodes) == 2 else (codes, codes)
        shifts = (
            is_call(up, aten.bitwise_left_shift.Tensor_Scalar),
            is_call(down, aten.bitwise_right_shift.Tensor_Scalar),
        )
        if all(shifts) and up.args == down.args and up.args[1] == 4:
            source = input_of(up)
            if given_part(through_views(source)) is not None:
                return source, True
    return None, False


def kind_of(decoded: Node) -> str:
    """``"weight"`` or ``"activation"`` for what a decoder makes of an operand, "" if nothing says: as `insert` marked
    it, and a weight if its codes are inputs of the graph.
    """
    stored = is_call(decoded, Dequantize.op) and _of_given_part(Dequantize.of(decoded).codes)
    return operand_kind(decoded) or ("weight" if stored else "")


def stored_operand(root: Node) -> ProductOperand:
    """What a node that :func:`decode_root` found is decoded from, as a product reads it that contracts the axis it was
    quantized along.
    """
    decoded, residual, clamp = root, (), None
    if restored := RestoreOutliers.match(root):
        decoded, residual, clamp = restored.x, (restored.values, restored.positions), restored.clamp  # type: ignore
    view = Dequantize.of(decoded)
    global_scale = () if view.global_scale is None else (view.global_scale,)
    encoding = Encoding(Operand(view.quantizer, outliers=clamp))
    return ProductOperand((view.codes, view.scales, *global_scale, *residual), encoding, view.size)


def matrix_form(root: Node, length: Any, seen: Node) -> tuple[bool, list[Any]] | None:
    """How a GEMM's operand ``seen``, a view of ``root``, reads the stored codes, whose rows have ``length`` elements:
    transposed or not, and the shape to view the stored rows in.

    Decided from sizes and strides alone, so any chain of views, permutes and reshapes is understood. ``None`` if the
    memory is not read as ``[batch…, rows, size]`` or its transpose.
    """
    value = seen.meta["val"]
    if (
        value.dim() not in (2, 3)
        or value.storage_offset() != 0
        or not same_size(value.numel(), root.meta["val"].numel())
    ):
        return None
    *batch, rows, columns = value.shape
    for transposed, (outer, inner) in ((False, (rows, columns)), (True, (columns, rows))):
        if not same_size(inner, length):
            continue
        expected = (1, inner) if transposed else (inner, 1)
        strides = [*([outer * inner] if batch else []), *expected]
        sizes = [*batch, rows, columns]
        if all(
            same_size(n, 1) or same_size(have, want)
            for n, have, want in zip(sizes, value.stride(), strides, strict=True)
        ):
            return transposed, [*batch, outer]
    return None


def stored_view(graph: Graph, near: Node, tensor: Node, lead: list[Any]) -> Node | None:
    """``tensor`` (codes, scales, residual) viewed as ``[*lead, last]``; ``None`` if its rows do not factor that way."""
    shape = tensor.meta["val"].shape
    target = [*lead, shape[-1]]
    if same_sizes(shape, target):
        return tensor
    sizes = [static_size(n) for n in target]
    if sizes.count(None) > 1 or (None in sizes and 0 in sizes):
        return None
    return emit(graph, near, aten.view.default, tensor, [-1 if n is None else n for n in sizes])
