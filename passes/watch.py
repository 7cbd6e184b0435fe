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

from .graph import results_of
from .record import KIND_KEY, SITE_KEY, STATISTICS_KIND, Plan, mark_of, operand_kind
from .views import FakeQuantize, OperandStatistics

__all__ = ["watch"]


def watch(gm: GraphModule, plan: Plan) -> list[tuple[str, str, str]]:
    """Returns (layer, kind, operand text) of every row of the added result; nothing is added if there is none."""
    names = {decision.site.index: decision.site.name for decision in plan.decisions}
    rows, statistics = [], []
    with compat.fake_mode_of(gm.graph):
        for node in FakeQuantize.calls(gm.graph):
            view = FakeQuantize.of(node)
            rows.append((names[mark_of(node, SITE_KEY)], operand_kind(node), str(view.operand)))
            watched = OperandStatistics(view.x, view.operand, view.axis, view.seed)
            with gm.graph.inserting_after(node):
                statistics.append(_call(gm, watched.op, *watched.arguments()))
        if statistics:
            output = gm.graph.output_node()
            with gm.graph.inserting_before(output):
                table = _call(gm, torch.stack, statistics)
            output.args = ((*results_of(gm.graph), table),)
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
