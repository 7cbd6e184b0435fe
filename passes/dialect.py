"""Reading the ``qcompile::`` dialect: which tensors an operand is made of, and through which views a GEMM sees it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qcompile.ir.recipe import Operand

from .graph import static_size
from .plan import KIND_KEY

__all__ = [
    "GEMMS",
    "QuantizedOperand",
    "decode_root",
    "gemm_operands",
    "is_call",
    "is_relayout",
    "operand_kind",
    "quantized_operand",
    "same_sizes",
    "through_views",
]

aten, ops = torch.ops.aten, torch.ops.qcompile

#: ATen products → positions of their two matrix operands.
GEMMS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten._grouped_mm.default: (0, 1),
}

_VIEWS = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
        aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
        aten.alias.default, aten.detach.default, aten.expand.default,
    }
)  # fmt: skip


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def is_relayout(node: Any) -> bool:
    """A view, or a copy of the same elements in another layout."""
    return is_call(node, aten.clone.default, *_VIEWS)


def gemm_operands(node: Node) -> tuple[Node, Node]:
    left, right = GEMMS[node.target]
    return node.args[left], node.args[right]  # type: ignore[return-value]


def through_views(node: Node) -> Node:
    """The node whose memory ``node`` looks at."""
    while is_call(node, *_VIEWS):
        node = node.args[0]  # type: ignore[assignment]
    return node


def decode_root(node: Node, rotated: bool = False) -> Node | None:
    """The ``dequantize`` or ``restore_outliers`` an operand is a view of, or ``None``.

    ``rotated``: also if what is decoded has been rotated back since.
    """
    root = through_views(node)
    if rotated and is_call(root, ops.hadamard.default):
        root = through_views(root.args[0])  # type: ignore[arg-type]
    return root if is_call(root, ops.dequantize.default, ops.restore_outliers.default) else None


@dataclass(frozen=True)
class QuantizedOperand:
    """A decoded tensor taken apart: the tensors it is decoded from, and how.

    ``tensors`` are in the order ``quantized_mm`` reads them; ``size`` is the length of the quantization axis.
    """

    root: Node
    tensors: tuple[Node, ...]
    text: str
    axis: int
    size: Any

    @property
    def codes(self) -> Node:
        return self.tensors[0]

    @property
    def length(self) -> Any:
        """``size`` as a number; in a graph with dynamic shapes that may be the result of a node."""
        return self.size.meta["val"] if isinstance(self.size, Node) else self.size

    @property
    def quantize(self) -> Node:
        """The ``quantize`` call the codes come from."""
        codes = self.codes
        return codes.args[0] if is_call(codes, operator.getitem) else codes  # type: ignore[return-value]


def quantized_operand(root: Node) -> QuantizedOperand:
    """Take a node :func:`decode_root` found apart."""
    tensors, clamp = [], ""
    decoded = root
    if is_call(root, ops.restore_outliers.default):
        decoded, values, positions, clamp, _ = root.args  # type: ignore[assignment]
        tensors = [values, positions]
    codes, scales, quantizer, axis, size, _dtype, *rest = decoded.args
    global_scale = [rest[0]] if rest and rest[0] is not None else []
    text = str(Operand.parse(f"{quantizer}; {clamp}" if clamp else str(quantizer)))
    return QuantizedOperand(root, (codes, scales, *global_scale, *tensors), text, axis, size)  # type: ignore[arg-type]


def operand_kind(node: Node) -> str:
    """``"weight"`` or ``"activation"`` for a node traced from an operand `insert` wrapped; "" for others."""
    return (node.meta.get("custom") or {}).get(KIND_KEY, "")


def matrix_form(operand: QuantizedOperand, seen: Node) -> tuple[bool, list[Any]] | None:
    """How a GEMM's operand ``seen`` reads the stored codes: transposed or not, and the shape to view the stored rows
    in.

    Decided from sizes and strides alone, so any chain of views, permutes and reshapes is understood. ``None`` if the
    memory is not read as ``[batch…, rows, size]`` or its transpose.
    """
    value = seen.meta["val"]
    if (
        value.dim() not in (2, 3)
        or value.storage_offset() != 0
        or not _same(value.numel(), operand.root.meta["val"].numel())
    ):
        return None
    *batch, rows, columns = value.shape
    for transposed, (outer, inner) in ((False, (rows, columns)), (True, (columns, rows))):
        if not _same(inner, operand.length):
            continue
        expected = (1, inner) if transposed else (inner, 1)
        strides = [*([outer * inner] if batch else []), *expected]
        sizes = [*batch, rows, columns]
        if all(_same(n, 1) or _same(have, want) for n, have, want in zip(sizes, value.stride(), strides, strict=True)):
            return transposed, [*batch, outer]
    return None


def stored_view(tensor: Node, lead: list[Any], emit: Any) -> Node | None:
    """``tensor`` (codes, scales, residual) viewed as ``[*lead, last]``; ``None`` if its rows do not factor that way."""
    shape = tensor.meta["val"].shape
    target = [*lead, shape[-1]]
    if same_sizes(shape, target):
        return tensor
    sizes = [static_size(n) for n in target]
    if sizes.count(None) > 1 or (None in sizes and 0 in sizes):
        return None
    return emit(aten.view.default, tensor, [-1 if n is None else n for n in sizes])


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal as far as can be told without adding a guard."""
    return len(a) == len(b) and all(_same(m, n) for m, n in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    """Equal as far as can be told without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    known_a, known_b = static_size(a), static_size(b)
    if known_a is not None and known_b is not None:
        return known_a == known_b
    return str(a) == str(b)
