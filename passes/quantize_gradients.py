"""Joint graph: quantize the gradient operand of dgrad and wgrad where the recipe asks for it (``gradient=…``).

A backward GEMM is one that reads a decoded operand of a site on one side and a tensor that depends on the tangents on
the other::

    mm(dy, dequantize(w))   ─►   mm(dequantize(quantize(dy)), dequantize(w))

dgrad contracts dY over its output features and wgrad over its tokens, so the two take their scales along different
axes; with one scale per tensor they are equal nodes and share one quantization.

Products that are to run on 8-bit tensor cores (``backward=…``) are left to `fold`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.ir.quantizer import Quantizer
from qcompile.ir.recipe import Operand

from .dialect import GEMMS, decode_root, gemm_operands, is_call, operand_kind
from .pass_base import Context, emit
from .plan import site_index

__all__ = ["depends_on_tangents", "encode_gradient", "gemm_role", "quantize_gradients", "size_along"]

aten, ops = torch.ops.aten, torch.ops.qcompile

#: Which gradient a backward product computes, by the operand of the site that it reads.
ROLE_OF_OPERAND = {"weight": "dgrad", "activation": "wgrad", "": "backward"}


def depends_on_tangents(graph: Graph) -> set[Node]:
    """Nodes of a joint graph that belong to the backward: everything computed from a tangent.

    The bodies of ``cond`` have no tangents; there the tracer's own mark tells.
    """
    backward: set[Node] = set()
    tangents = {n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)}
    for node in graph.nodes:
        tangent = node in tangents or (not tangents and node.meta.get("partitioner_tag") == "is_backward")
        if tangent or any(source in backward for source in node.all_input_nodes):
            backward.add(node)
    return backward


def gemm_role(node: Node, backward: set[Node]) -> str:
    """fprop, dgrad or wgrad: a backward product that reads a decoded weight is dgrad, a decoded activation wgrad.

    Where that operand is not quantized, or nothing says whose it is (the bodies of ``cond``), the two cannot be told
    apart from the graph; such a product is called "backward".
    """
    if node not in backward:
        return "fprop"
    roots = [decode_root(operand, rotated=True) for operand in gemm_operands(node) if operand not in backward]
    kinds = [operand_kind(root) for root in roots if root is not None]
    return ROLE_OF_OPERAND[kinds[0]] if kinds else "backward"


def quantize_gradients(graph: Graph, context: Context) -> int:
    """Returns how many gradient operands were quantized. Convolutions keep theirs: one ATen op makes both gradients."""
    decisions = {d.site.index: d for d in context.plan.quantized}
    if not any(operand for d in decisions.values() for operand in d.gradients.values()):
        return 0
    backward, shared, count = depends_on_tangents(graph), {}, 0  # type: ignore[var-annotated]
    for node in list(graph.nodes):
        decision = decisions.get(site_index(node))  # type: ignore[arg-type]
        if decision is None or node not in backward or not is_call(node, *GEMMS):
            continue
        operands = gemm_operands(node)
        if is_call(node, aten.convolution.default) or sum(o in backward for o in operands) != 1:
            continue
        role = gemm_role(node, backward)
        gradient = decision.gradients.get(role)
        if gradient is None or role in decision.folded:
            continue
        side = 0 if operands[0] in backward else 1
        with graph.inserting_before(node):
            quantized = _quantized(graph, node, operands[side], -1 if side == 0 else -2, gradient, shared)
        node.update_arg(GEMMS[node.target][side], quantized)
        count += 1
    return count


def _quantized(graph: Graph, gemm: Node, x: Node, axis: int, operand: Operand, shared: dict[Any, Node]) -> Node:
    quantizer = operand.quantizer
    if quantizer.granularity.kind == "tensor" and is_call(x, aten.permute.default) and x.args[1] == [1, 0]:
        # The scale does not know which axis is contracted: dgrad and wgrad share one quantization of dY itself.
        stored: Any = x.args[0]
        return emit(graph, gemm, aten.permute.default, _quantized(graph, gemm, stored, -1, operand, shared), [1, 0])
    if quantizer.granularity.kind == "tensor":
        axis = -1
    key = (x, axis, operand)
    if key in shared:
        return shared[key]
    codes, scales, global_scale = encode_gradient(graph, gemm, x, axis, quantizer)
    value = x.meta["val"]
    size = size_along(graph, gemm, x, axis)
    shared[key] = emit(
        graph, gemm, ops.dequantize.default, codes, scales, str(quantizer), axis, size, value.dtype, global_scale
    )
    return shared[key]


def encode_gradient(
    graph: Graph, gemm: Node, x: Node, axis: int, quantizer: Quantizer, fold: Node | None = None
) -> tuple[Node, Node, Node | None]:
    """Codes, scales and global scale of ``x · fold``, emitted at the insertion point."""
    seed = None
    if quantizer.rounding == "stochastic":
        device = x.meta["val"].device
        seed = emit(
            graph, gemm, aten.randint.low, 0, 2**31 - 1, [1], dtype=torch.int64, device=device, pin_memory=False
        )
    global_scale = None
    if quantizer.scale.two_level:
        amax = emit(graph, gemm, aten.amax.default, emit(graph, gemm, aten.abs.default, x))
        amax = emit(graph, gemm, torch.ops.prims.convert_element_type.default, amax, torch.float32)
        # 2^-100 keeps an all-zero gradient from dividing by zero; its codes are zero whatever the scale.
        floored = emit(graph, gemm, aten.clamp_min.default, amax, 2.0**-100)
        global_scale = emit(graph, gemm, aten.div.Tensor, floored, 448.0 * quantizer.format.max)
    optional = [argument for argument in (global_scale, seed, fold) if argument is not None]
    arguments = (global_scale, seed, fold) if optional else ()
    pair = emit(graph, gemm, ops.quantize.default, x, str(quantizer), axis, *arguments)
    codes, scales = (emit(graph, gemm, operator.getitem, pair, i) for i in range(2))
    return codes, scales, global_scale


def size_along(graph: Graph, gemm: Node, x: Node, axis: int) -> Any:
    """Length of an axis, as a number or as a node."""
    value = x.meta["val"]
    size = value.shape[axis]
    return size if isinstance(size, int) else emit(graph, gemm, aten.sym_size.int, x, axis % value.dim())
