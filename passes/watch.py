"""Dynamo graph: compute statistics of every operand that `insert` has wrapped, and return them (``monitor=``).

::

    v = fake_quantize(x, …)            v = fake_quantize(x, …)
    …                           ─►     s = operand_statistics(x, …)
    return y                           return y, stack([s, …])

The statistics leave the graph as one more result, which whoever runs the graph takes off again
(:class:`qcompile.numerics.Monitor`): no buffer is written, no value reaches the host. Operands inside the bodies of
higher-order ops (activation checkpointing, cond) are not watched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile import compat

from .dialect import ops
from .plan import KIND_KEY, SITE_KEY, Plan

__all__ = ["STATISTICS_KIND", "watch"]

#: What `insert`'s mark of an operand's kind says of statistics: they are no operand.
STATISTICS_KIND = "statistics"


def watch(gm: GraphModule, plan: Plan) -> list[tuple[str, str, str]]:
    """Returns (layer, kind, operand text) of every row of the added result; nothing is added if there is none."""
    names = {decision.site.index: decision.site.name for decision in plan.decisions}
    rows, statistics = [], []
    with compat.fake_mode_of(gm.graph):
        for node in list(gm.graph.find_nodes(op="call_function", target=ops.fake_quantize.default)):
            custom = node.meta["custom"]
            rows.append((names[custom[SITE_KEY]], custom[KIND_KEY], str(node.args[1])))
            with gm.graph.inserting_after(node):
                statistics.append(_call(gm, ops.operand_statistics.default, *node.args))
        if statistics:
            output = gm.graph.output_node()
            with gm.graph.inserting_before(output):
                table = _call(gm, torch.stack, statistics)
            output.args = ((*output.args[0], table),)  # type: ignore[misc]
            gm.graph.lint()
            gm.recompile()
    return rows


def _call(gm: GraphModule, target: Any, *args: Any) -> Node:
    node = gm.graph.call_function(target, args)
    node.meta["custom"] = {KIND_KEY: STATISTICS_KIND}
    values = torch.fx.map_arg(args, lambda n: n.meta["example_value"])
    with torch.no_grad():
        node.meta["example_value"] = target(*values)
    return node
