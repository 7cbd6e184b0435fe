"""Post-grad graphs: replace ``scaled_mm``, which Inductor does not know, by decode + ATen product.

So Inductor's own choices (cuBLAS, templates, epilogue fusion) apply
to it; one decoded operand serves all products of the graph that read it::

    scaled_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm(dequantize(codes_x, s_x), permute(dequantize(codes_w, s_w)))

``quantize``, ``dequantize`` and the estimators stay: Inductor has lowerings for them (kernels/lowerings.py): generated
Triton on a GPU, and on a CPU a call of one C++ kernel shared by all sites.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.ir.recipe import Operand

from .dialect import is_call
from .pass_base import Context, emit

__all__ = ["lower"]

aten, ops = torch.ops.aten, torch.ops.qcompile

PROVIDER = "dequantize + aten"


def lower(graph: Graph, context: Context) -> int:
    """Returns how many products were lowered."""
    decoded: dict[Any, Node] = {}
    count = 0
    for node in list(graph.nodes):
        if not is_call(node, ops.scaled_mm.default):
            continue
        with graph.inserting_before(node):
            replacement = _lower_product(graph, node, decoded)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        count += 1
    return count


def _lower_product(graph: Graph, node: Node, decoded: dict[Any, Node]) -> Node:
    a, a_text, a_size, a_transposed, b, b_text, b_size, b_transposed, dtype, *rest = node.args
    left = _operand(graph, node, a, a_text, a_size, a_transposed, dtype, decoded)
    right = _operand(graph, node, b, b_text, b_size, b_transposed, dtype, decoded)
    bias = rest[0] if rest else None
    if bias is not None:
        return emit(graph, node, aten.addmm.default, bias, left, right)
    product = aten.mm.default if left.meta["val"].dim() == 2 else aten.bmm.default
    return emit(graph, node, product, left, right)


def _operand(
    graph: Graph,
    gemm: Node,
    tensors: Any,
    text: Any,
    size: Any,
    transposed: Any,
    dtype: Any,
    decoded: dict[Any, Node],
) -> Node:
    if text == "dense":
        return tensors[0]
    key = (tuple(tensors), text, dtype)
    if key not in decoded:
        decoded[key] = _decode(graph, gemm, list(tensors), Operand.parse(text), size, dtype)
    dense = decoded[key]
    if not transposed:
        return dense
    order = [1, 0] if dense.meta["val"].dim() == 2 else [0, 2, 1]
    return emit(graph, gemm, aten.permute.default, dense, order)


def _decode(graph: Graph, gemm: Node, tensors: list[Node], spec: Operand, size: Any, dtype: torch.dtype) -> Node:
    codes, scales, *rest = tensors
    global_scale = rest.pop(0) if spec.quantizer.scale.two_level else None
    dense = emit(graph, gemm, ops.dequantize.default, codes, scales, str(spec.quantizer), -1, size, dtype, global_scale)
    if rest:
        dense = emit(graph, gemm, ops.restore_outliers.default, dense, *rest, str(spec.outliers), -1)
    return dense
