"""Reading the ``qcompile::`` dialect: which tensors an operand is made of, and through which views a GEMM sees it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Graph, Node

from qcompile.ir.encoding import Encoding
from qcompile.ir.nested import NestedScales
from qcompile.ir.operand import Operand
from qcompile.ir.stored import Stored

from .graph import aten, emit, input_of, is_call, same_size, same_sizes, static_size, through_views
from .record import operand_kind
from .views import Dequantize, Hadamard, ProductOperand, RestoreOutliers

__all__ = [
    "GEMMS",
    "StoredScales",
    "decode_root",
    "gemm_operands",
    "given_part",
    "kind_of",
    "matrix_form",
    "restores_mean",
    "stored_operand",
    "stored_scales",
    "stored_view",
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


def gemm_operands(node: Node) -> tuple[Node, Node]:
    left, right = GEMMS[node.target]
    return node.args[left], node.args[right]  # type: ignore[return-value]


def decode_root(node: Node, rotated: bool = False) -> Node | None:
    """The ``dequantize`` or ``restore_outliers`` an operand is a view of, or ``None``.

    ``rotated``: also if what is decoded has been rotated back since.
    """
    root = through_views(node)
    if rotated and is_call(root, Hadamard.op):
        root = through_views(input_of(root))
    return root if is_call(root, Dequantize.op, RestoreOutliers.op) else None


def given_part(node: Node) -> Node | None:
    """The input of the graph that a node is, or copies as it is; ``None`` if there is none."""
    source = input_of(node) if is_call(node, aten.clone.default) else node
    return source if source.op == "placeholder" else None


def restores_mean(node: Node) -> bool:
    """Whether decoded scales of a stored weight get their mean back: a number that is an input of the graph."""
    if not is_call(node, aten.add.Tensor) or not is_call(input_of(node), Dequantize.op):
        return False
    other = node.args[1]
    return isinstance(other, Node) and given_part(other) is not None and other.meta["val"].dim() == 0


class StoredScales(NamedTuple):
    """The scales of a stored weight as it has them, and how it is ``stored``; see ``mm_stored`` in
    :mod:`qcompile.ir.tensor_core_ops`.
    """

    stored: Stored
    scales: Node
    second: Node | None = None
    offset: Node | None = None


def stored_scales(operand: ProductOperand) -> StoredScales | None:
    """Of a quantized operand; ``None`` if its codes are none that the graph was given."""
    spec = operand.encoding.operand
    if spec is None or spec.outliers or given_part(through_views(operand.first)) is None:
        return None
    _, scales, global_scale, *_ = operand.parts
    row, offset = through_views(scales), None
    if restores_mean(row):
        row, offset = input_of(row), row.args[1]
    coded = Dequantize.match(row)
    if coded is None:
        return StoredScales(Stored(spec.quantizer), scales, global_scale)
    nested = NestedScales(coded.quantizer, mean=offset is not None)
    return StoredScales(Stored(spec.quantizer, nested), coded.codes, coded.scales, offset)  # type: ignore[arg-type]


def kind_of(decoded: Node) -> str:
    """``"weight"`` or ``"activation"`` for what a decoder makes of an operand, "" if nothing says: as `insert` marked
    it, and a weight if its codes are inputs of the graph.
    """
    stored = is_call(decoded, Dequantize.op) and given_part(through_views(Dequantize.of(decoded).codes)) is not None
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
