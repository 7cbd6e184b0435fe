"""Joint graph: make products read codes.

::

    mm(view(dequantize(codes_x, s_x)), permute(dequantize(codes_w, s_w)))
        ─►   quantized_mm([codes_x, s_x], [codes_w, s_w])

Done here, before the forward and the backward are parted: the partitioner then sees that the backward needs codes, and
saves codes, without being told. Numbers do not change: ``quantized_mm`` is defined as decode, then multiply.

A product whose operand cannot be read as a matrix of stored rows (a broadcast batch, a convolution, a grouped product)
keeps its explicit dequantize; `hints` then makes the partitioner recompute the wide tensor from the saved codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.ir.recipe import Operand

from .dialect import decode_root, gemm_operands, is_call, matrix_form, quantized_operand, same_sizes, stored_view
from .pass_base import Context, emit

__all__ = ["fuse"]

aten, ops = torch.ops.aten, torch.ops.qcompile


def fuse(graph: Graph, context: Context) -> int:
    """Returns how many products were fused."""
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, aten.mm.default, aten.addmm.default, aten.bmm.default) or not _plain(node):
            continue
        left, right = gemm_operands(node)
        if decode_root(left) is None and decode_root(right) is None:
            continue
        with graph.inserting_before(node):
            sides = [_side(graph, node, operand) for operand in (left, right)]
            if any(side is None for side in sides):
                continue
            bias = node.args[0] if is_call(node, aten.addmm.default) else None
            arguments = [argument for side in sides for argument in side]  # type: ignore[union-attr]
            fused = emit(graph, node, ops.quantized_mm.default, *arguments, node.meta["val"].dtype, bias)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        count += 1
    return count


def _plain(node: Node) -> bool:
    """No scaling factors, one dtype, as ATen demands, and a bias that broadcasts over rows."""
    dtypes = {
        source.meta["val"].dtype for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)
    }
    if len(dtypes) > 1 or any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return False
    return not is_call(node, aten.addmm.default) or node.args[0].meta["val"].dim() == 1  # type: ignore[union-attr]


def _side(graph: Graph, gemm: Node, operand: Node) -> tuple[list[Node], str, Any, bool] | None:
    """``(tensors, text, size, transposed)`` of one operand of ``quantized_mm``, or ``None`` if it cannot be read from
    codes.
    """
    root = decode_root(operand)
    if root is None:
        return [operand], "dense", 0, False
    quantized = quantized_operand(root)
    spec = Operand.parse(quantized.text)
    form = matrix_form(quantized, operand)
    if form is None or (spec.outliers and spec.outliers.per == "tensor"):
        return None
    transposed, lead = form
    kind = spec.quantizer.granularity.kind
    if kind == "square" and not same_sizes(quantized.codes.meta["val"].shape[:-1], lead):
        return None  # square blocks span rows, so rows may not be regrouped
    tensors = []
    for i, tensor in enumerate(quantized.tensors):
        shared = (i == 1 and kind in ("tensor", "square")) or (i == 2 and spec.quantizer.scale.two_level)
        view = (
            _shared_scale(graph, gemm, tensor, len(lead) + 1, i)
            if shared
            else stored_view(tensor, lead, lambda *a: emit(graph, gemm, *a))
        )
        if view is None:
            return None
        tensors.append(view)
    return tensors, quantized.text, quantized.size, transposed


def _shared_scale(graph: Graph, gemm: Node, tensor: Node, dims: int, position: int) -> Node:
    """A scale of the whole tensor keeps one element whatever the rows are; only its rank follows the matrix."""
    if position == 2 or tensor.meta["val"].dim() == dims or tensor.meta["val"].numel() != 1:
        return tensor
    return emit(graph, gemm, aten.view.default, tensor, [1] * dims)
