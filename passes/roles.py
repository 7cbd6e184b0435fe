"""Joint graph: what belongs to the backward, and which gradient a product there computes."""

from __future__ import annotations

from torch.fx import Graph, Node

from .dialect import decode_root, kind_of
from .gradient_axes import ROLE_OF_OPERAND
from .record import stated_role

__all__ = ["depends_on_tangents", "product_role"]


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


def product_role(node: Node, operands: tuple[Node, ...], backward: set[Node]) -> str:
    """fprop, dgrad or wgrad: a backward product that reads a decoded weight is dgrad, a decoded activation wgrad.

    Where that operand is not quantized and no role is stated, or nothing says whose it is (the bodies of ``cond``), the
    two cannot be told apart from the graph; such a product is called "backward".
    """
    if node not in backward:
        return "fprop"
    if role := stated_role(node):
        return role
    roots = [decode_root(operand, rotated=True) for operand in operands if operand not in backward]
    kinds = [kind_of(root) for root in roots if root is not None]
    return ROLE_OF_OPERAND[kinds[0]] if kinds else "backward"
