"""Dynamo graph: let dgrad and wgrad read dY quantized where the recipe asks for it (``gradient=…``).

Autograd makes the backward products of ``y = f(x, w)`` from f, whatever f is, and hands them the gradient that arrives
at y. So f is called once more for every operand whose gradient is to be computed from a quantized dY. That call sees
the other operand detached, and ``split_gradient`` sends it Q(dY)::

    y = f(x, w, b)   ─►   y  = f(x.detach(), w.detach(), b)          plain dY, for a bias and for roles without Q
                          x' = f(x, w.detach(), b.detach())          dX = Q(dY) · W
                          w' = f(x.detach(), w, b.detach())          dW = Q(dY)ᵀ · X
                          y  = split_gradient(split_gradient(y, [x'], …), [w'], …)

No backward reads a result of f, so x' and w' are dead code once autograd has been traced. Nothing has to be recognized
in the backward: operands that are not quantized, products that become multiplications, convolutions and bodies of
higher-order ops need no rules of their own, and a backward product knows its role.

Where a recipe has an operand read again in the backward (``dgrad_weight``, ``wgrad_activation``), the twin reads that
in place of the other operand, and dY is rotated alike: nobody reads the twin's result, so its other operand may stand
in rotated coordinates. Under ``forward="bf16"`` all roles have twins, which read what is quantized, and y is made of
the originals.

Scales lie along the axes that a product contracts (`gradient_axes`); with one scale for all elements dgrad and wgrad
share the codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile.ir.operand import Operand

from .gradient_axes import axes_of_result, role_of_slot
from .graph import graph_modules
from .record import KIND_KEY, ROLE_KEY, Decision, Plan, marked
from .spellings import Slot
from .views import SplitGradient

__all__ = ["quantize_gradients"]


def quantize_gradients(gm: GraphModule, plan: Plan) -> int:
    """Rewrite ``gm`` and its nested bodies in place, after `insert`; returns of how many sites."""
    split = {d.site.node: d for d in plan.quantized if d.rounded or d.wide_forward}
    return sum(_quantize_in(module, split) for module in graph_modules(gm)) if split else 0


def _quantize_in(gm: GraphModule, split: dict[Node, Decision]) -> int:
    decisions = [split[node] for node in gm.graph.nodes if node in split]
    for decision in decisions:
        _split(gm.graph, decision)
    if decisions:
        gm.graph.lint()
        gm.recompile()
    return len(decisions)


def _split(graph: Graph, decision: Decision) -> None:
    """Rewrite the site of ``decision`` for the roles in ``decision.rounded``, or for all if its forward is wide."""
    site, gemm = decision.site, decision.site.node
    axes = axes_of_result(site) or ((), ())
    shared: dict[Any, list[Slot]] = {}
    for position, slot in enumerate(site.slots):
        role, beside = role_of_slot(site, position), decision.again.get(1 - position)
        if role in decision.rounded:
            gradient = _rotated(decision, position)
            anyhow = gradient.quantizer.granularity.kind == "tensor" and not gradient.transform
            along = ((), ()) if anyhow else (axes[position], axes[1 - position])
            shared.setdefault((gradient, *along, beside and beside.bits), []).append(slot)
        elif decision.wide_forward:
            shared.setdefault((None, (), (), None), []).append(slot)
    rewriter = _Rewriter(graph, decision)
    operands = {slot: slot.of(gemm) for slot in site.slots}
    readers = list(gemm.users)
    with graph.inserting_before(gemm.next):
        result = gemm
        for (gradient, rows, contracted, bits), slots in shared.items():
            twins = tuple(rewriter.twin(slot) for slot in slots)
            result = rewriter.call(SplitGradient(result, twins, gradient, tuple(rows), tuple(contracted), bits))
    for reader in readers:
        reader.replace_input_with(gemm, result)
    split = [slot for slots in shared.values() for slot in slots]
    with graph.inserting_before(gemm):
        for slot, original in zip(site.slots, decision.originals, strict=True):
            if slot in split:
                read = original if decision.wide_forward else operands[slot]
                slot.put(gemm, rewriter.detached(read, slot.kind))
    if rest := [role_of_slot(site, i) for i, slot in enumerate(site.slots) if slot not in split]:
        marked(gemm, **{ROLE_KEY: rest[0]})


def _rotated(decision: Decision, position: int) -> Operand:
    """What dY is quantized to for the gradient of the operand at ``position``: rotated as the other operand is, where
    that is read again.
    """
    role = role_of_slot(decision.site, position)
    gradient, again = decision.gradients[role], decision.read_again.get(role)
    assert gradient is not None
    return gradient if again is None else replace(gradient, transform=again.transform)


class _Rewriter:
    """Adds calls that carry the metadata of the product they serve."""

    def __init__(self, graph: Graph, decision: Decision) -> None:
        self.graph, self.decision, self.site, self.gemm = graph, decision, decision.site, decision.site.node

    def call(self, view: SplitGradient) -> Node:
        return self._described(self.graph.call_function(view.op, view.arguments()))

    def twin(self, slot: Slot) -> Node:
        """The product once more; its backward reaches the operand in ``slot`` alone."""
        position = self.site.slots.index(slot)
        other = self.site.slots[1 - position]
        again = self.decision.again.get(1 - position)
        beside = self.detached(again.node if again else other.of(self.gemm), other.kind)
        args, kwargs = torch.fx.map_arg((self.gemm.args, self.gemm.kwargs), self.detached)
        node = self._described(self.graph.create_node(self.gemm.op, self.gemm.target, args, kwargs))
        slot.put(node, slot.of(self.gemm))
        other.put(node, beside)
        return marked(node, **{ROLE_KEY: role_of_slot(self.site, position)})

    def detached(self, node: Node, kind: str = "") -> Node:
        """``kind``: that of an operand, which its detached form stays."""
        value = node.meta["example_value"]
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            return node
        made = self._described(self.graph.call_method("detach", (node,)))
        made.meta["example_value"] = value.detach()
        return marked(made, **{KIND_KEY: kind}) if kind else made

    def _described(self, node: Node) -> Node:
        node.meta = dict(self.gemm.meta)
        return node
