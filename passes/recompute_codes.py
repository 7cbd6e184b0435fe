"""Joint graph: let the backward compute the 8-bit codes of an activation again, from what it is given anyway.

Codes of ``occ(residual=e4m3)`` take a byte per element, and often lie beside the very tensors that they were computed
from: a norm's input, attention's output, gate and up. Finding a row's bounds is what costs; with these (12 bytes per
row) codes are elementwise, and fuse with what computes x::

    codes, scales, bounds = quantize_compensated(x)              codes, scales, bounds = quantize_compensated(x)
    fprop reads codes                                     ─►     fprop reads codes
    wgrad reads codes                                            wgrad reads encode_compensated(x, bounds)

The same numbers, so which of the two is saved, the codes or what x is computed from, is the min-cut's choice by size
(`partition.py`). Where it saves the codes, `share_codes` leaves one encoder in the forward.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from .graph import emit, is_gather, is_read_by, is_view, result, through_views
from .pass_base import Context
from .record import STATISTICS_KIND, operand_kind
from .roles import depends_on_tangents
from .views import EncodeCompensated, QuantizeCompensated

__all__ = ["recompute_codes"]

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
        call = QuantizeCompensated.of(node)
        # The forward may have written to an input by then.
        if through_views(call.x).op == "placeholder" or not is_read_by(codes, backward):
            continue
        with graph.inserting_before(codes.next):
            bounds = result(node, 2) or emit(graph, node, operator.getitem, node, 2)
            again = EncodeCompensated(call.x, bounds, call.operand, call.axis).emit(graph, near=node)
        _give(graph, codes, again, backward)
        count += 1
    return count


def _give(graph: Graph, codes: Node, again: Node, readers: set[Node]) -> None:
    """Let ``readers`` read ``again`` instead of ``codes``, through views and gathered rows of its own."""
    for user in list(codes.users):
        if user in readers:
            user.replace_input_with(codes, again)
        elif (is_view(user) or is_gather(user)) and is_read_by(user, readers):
            args, kwargs = torch.fx.map_arg((user.args, user.kwargs), lambda node: again if node is codes else node)
            with graph.inserting_before(user.next):
                view = emit(graph, user, user.target, *args, **kwargs)
            _give(graph, user, view, readers)
