"""Joint graph: let the backward compute the 8-bit codes of an activation again, from what it is given anyway.

Codes of ``occ(residual=e4m3)`` take a byte per element, and often lie beside the very tensors that they were computed
from: a norm's input, attention's output, gate and up. Finding a row's bounds is what costs; with these (12 bytes per
row) codes are elementwise, and fuse with what computes x::

    codes, scales, bounds = quantize_compensated(x)              codes, scales, bounds = quantize_compensated(x)
    fprop reads codes                                     ─►     fprop reads codes
    wgrad reads codes                                            wgrad reads encode_compensated(x, bounds)

The same numbers, so which of the two is saved, the codes or what x is computed from, is the min-cut's choice by size
(`partition.py`). Where it saves the codes, :func:`share_codes` leaves one encoder in the forward.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from .graph import emit, item_of, result, through_views
from .partition import Split
from .pass_base import Context
from .record import STATISTICS_KIND, operand_kind
from .roles import depends_on_tangents
from .views import EncodeCompensated, QuantizeCompensated

__all__ = ["recompute_codes", "share_codes"]

#: Whose codes the backward computes again already (a weight's) or never reads.
_OTHER_KINDS = ("weight", STATISTICS_KIND)


def recompute_codes(graph: Graph, context: Context) -> int:
    """Returns of how many encoders the backward reads codes that it may compute again."""
    backward, count = depends_on_tangents(graph), 0
    for node in QuantizeCompensated.calls(graph) if backward else ():
        codes = result(node, 0)
        # A checkpoint region has decided for itself.
        if codes is None or operand_kind(node) in _OTHER_KINDS or "ac_graph_id" in node.meta:
            continue
        if not _is_read(codes, backward):
            continue
        call = QuantizeCompensated.of(node)
        with graph.inserting_before(codes.next):
            bounds = result(node, 2) or emit(graph, node, operator.getitem, node, 2)
            again = EncodeCompensated(call.x, bounds, call.operand, call.axis).emit(graph, near=node)
        _give(graph, codes, again, backward)
        count += 1
    return count


def _is_read(codes: Node, readers: set[Node]) -> bool:
    """Whether one of ``readers`` reads the codes, or a view of them."""
    return any(user in readers or (_is_view(user) and _is_read(user, readers)) for user in codes.users)


def _give(graph: Graph, codes: Node, again: Node, readers: set[Node]) -> None:
    """Let ``readers`` read ``again`` instead of ``codes``, through views of its own."""
    for user in list(codes.users):
        if user in readers:
            user.replace_input_with(codes, again)
        elif _is_view(user) and _is_read(user, readers):
            with graph.inserting_before(user.next):
                view = graph.node_copy(user, lambda node: again if node is codes else node)
            _give(graph, user, view, readers)


def _is_view(node: Node) -> bool:
    return through_views(node) is not node


def share_codes(split: Split, context: Context) -> int:
    """Let the forward return the codes it has, where it would compute them again for the backward to be given; returns
    of how many encoders.
    """
    graph = split.forward.graph
    again = EncodeCompensated.calls(graph)
    for node in again:
        encoder = item_of(EncodeCompensated.of(node).bounds)
        assert encoder is not None
        codes = result(encoder[0], 0)
        assert codes is not None
        node.replace_all_uses_with(codes)
        graph.erase_node(node)
    if again:
        split.forward.recompile()
    return len(again)
