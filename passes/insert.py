"""Put an explicit ``fake_quantize`` on every operand the plan quantizes: the only pass that changes numbers.

Before::

    x ──────────► linear(x, w)          x ──────────► linear(x, v)

After::

    x ─► fake_quantize ─┬─► linear(·, ·)   ◄─ fake_quantize ◄─ w
                        └─► linear(·, ·)   ◄─ fake_quantize ◄─ v

The GEMM stays what it was, so a spelling that later passes cannot fuse is still right, only slower. One quantization
serves all consumers of an operand (q, k, v) as long as nothing between them can change its value or its meaning:
an in-place op, or a boundary of no_grad, autocast or torch.func, starts afresh. An operand that is written into later
is quantized from a copy where its estimator reads it again in the backward.

Under autocast the graph shows float32 operands for a GEMM that runs in 16 bits; the cast is made explicit first, so
that what is quantized is what the GEMM really reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile import compat
from qcompile.ir.operand import Operand

from .gradient_axes import axes_of_operand, role_of_slot
from .graph import graph_modules, target_name, value_of
from .origins import written_by
from .record import KIND_KEY, SIGNS_KEY, SITE_KEY, Again, Decision, Plan, marked
from .spellings import Frame, Slot
from .views import FakeQuantize, ReadAgain

__all__ = ["insert", "stamp"]

_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace")


def insert(gm: GraphModule, plan: Plan) -> int:
    """Rewrite ``gm`` and its nested bodies in place; returns how many operands were wrapped."""
    by_node = {decision.site.node: decision for decision in plan.quantized}
    return sum(_insert_in(module, by_node) for module in graph_modules(gm)) if by_node else 0


def stamp(plan: Plan) -> None:
    """Leave every site's index on its node; AOTAutograd carries ``custom`` to every node traced from it."""
    for decision in plan.decisions:
        marked(decision.site.node, **{SITE_KEY: decision.site.index})


def _insert_in(gm: GraphModule, by_node: dict[Node, Decision]) -> int:
    shared: dict[Any, Any] = {}
    nodes = list(gm.graph.nodes)
    last_write = {compat.memory_of(value_of(x)): place for place, node in enumerate(nodes) for x in written_by(node)}
    wrapped = 0
    for place, node in enumerate(nodes):
        if decision := by_node.get(node):
            decision.originals = tuple(slot.of(node) for slot in decision.site.slots)
            if not decision.from_codes:
                _read_again(gm.graph, decision, shared)
            for slot, operand in zip(decision.site.slots, decision.operands, strict=True):
                if operand is not None:
                    changes = last_write.get(compat.memory_of(value_of(slot.of(node))), -1) >= place
                    slot.put(node, _wrap(gm.graph, node, slot, operand, changes, shared))
                    wrapped += 1
            if decision.from_codes:
                _read_again(gm.graph, decision, shared)
        if _is_barrier(node):
            shared.clear()
    if wrapped:
        gm.graph.lint()
        gm.recompile()
    return wrapped


def _wrap(graph: Graph, gemm: Node, slot: Slot, operand: Operand, changes: bool, shared: dict[Any, Node]) -> Node:
    """The quantized operand, made once per (source, dtype, frame, axis, kind, operand). ``changes``: whether something
    writes into the source's memory later.
    """
    source = slot.of(gemm)
    dtype = _gemm_dtype(gemm, source)
    axis = slot.axis if slot.axis < 0 or slot.frame else slot.axis - value_of(source).dim()
    key = (source, dtype, slot.frame, axis, slot.kind, str(operand))
    if key not in shared:
        with graph.inserting_before(gemm):
            build = _Builder(graph, gemm, slot.kind)
            # An estimator with a slope saves its input, where the product alone would not: it must not see the change.
            saved = changes and operand.estimator.kind.slope is not None and value_of(source).requires_grad
            x = build(torch.clone, source) if saved else source
            shared[key] = _build(build, x, dtype, slot.frame, axis, operand)
    return shared[key]


def _read_again(graph: Graph, decision: Decision, shared: dict[Any, Any]) -> None:
    """Have the operands of a site as they are now read again, those of which the decision says so."""
    for position, slot in enumerate(decision.site.slots):
        operand = decision.read_again.get(role_of_slot(decision.site, 1 - position))
        if operand is not None:
            decision.again[position] = _again(graph, decision, position, slot, operand, shared)


def _again(
    graph: Graph, decision: Decision, position: int, slot: Slot, operand: Operand, shared: dict[Any, Any]
) -> Again:
    """An operand as the backward reads it, made once like the forward's; and so are its signs, if they are drawn."""
    gemm, axes = decision.site.node, axes_of_operand(decision.site, position)
    assert axes is not None  # the plan has asked
    source = slot.of(gemm)
    dtype = _gemm_dtype(gemm, source)
    key = (source, dtype, axes, slot.kind, str(operand))
    if key not in shared:
        with graph.inserting_before(gemm):
            build = _Builder(graph, gemm, slot.kind)
            x = source if value_of(source).dtype == dtype else build(torch.Tensor.to, source, dtype)
            bits = None
            if operand.transform.signs == "drawn":
                bits = build(torch.randint, 0, 2, (operand.transform.rotation,), device=value_of(source).device)
                marked(bits, **{SIGNS_KEY: True})
            view = ReadAgain(x, operand, *axes, bits)
            shared[key] = Again(build(view.op, *view.arguments()), bits)
    return shared[key]


def _build(build: _Builder, source: Node, dtype: torch.dtype, frame: Frame | None, axis: int, operand: Operand) -> Node:
    x = source if value_of(source).dtype == dtype else build(torch.Tensor.to, source, dtype)
    seed = None
    if operand.quantizer.draws:
        seed = build(torch.randint, 0, 2**31 - 1, (1,), device=value_of(source).device)

    def quantized(rows: Node, along: int) -> Node:
        view = FakeQuantize(rows, operand, along, seed)
        return build(view.op, *view.arguments())

    if frame is None:
        return quantized(x, axis)
    if frame.flatten is not None:
        led = build(torch.movedim, x, frame.lead, 0) if frame.lead else x
        flat = build(torch.flatten, led, frame.flatten)
        shaped = build(torch.Tensor.view_as, quantized(flat, axis), led)
        if not frame.lead:
            return shaped
        # conv_tbc takes views of its operands that only contiguous memory has.
        return build(torch.clone, build(torch.movedim, shaped, 0, frame.lead), memory_format=torch.contiguous_format)
    assert frame.patch is not None
    return _per_patch(build, x, frame.patch, lambda rows: quantized(rows, -1))


def _per_patch(build: _Builder, x: Node, patch: tuple[int, ...], quantize: Any) -> Node:
    """[B, C, H, W] → [B, H/p, W/p, C·p·p] → quantize rows → back."""
    dims = len(patch)
    split = x
    for i, extent in enumerate(patch):
        split = build(torch.unflatten, split, 2 + 2 * i, (-1, extent))
    order = (0, *(2 + 2 * i for i in range(dims)), 1, *(3 + 2 * i for i in range(dims)))
    windows = build(torch.permute, split, order)
    rows = build(torch.flatten, windows, 1 + dims)
    restored = build(torch.Tensor.view_as, quantize(rows), windows)
    inverse = tuple(order.index(axis) for axis in range(len(order)))
    return build(torch.Tensor.reshape_as, build(torch.permute, restored, inverse), x)


class _Builder:
    """Adds nodes that carry the metadata of the GEMM they serve, and the fake value AOTAutograd's cache asks for."""

    def __init__(self, graph: Graph, gemm: Node, kind: str) -> None:
        self.graph, self.gemm, self.kind = graph, gemm, kind
        self.fake_mode = compat.fake_mode_of(graph)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        method = target.__name__ if target in (torch.Tensor.to, torch.Tensor.view_as, torch.Tensor.reshape_as) else None
        node = (
            self.graph.call_method(method, args, kwargs) if method else self.graph.call_function(target, args, kwargs)
        )
        node.meta.update({key: self.gemm.meta[key] for key in _KEPT_META if key in self.gemm.meta})
        node.meta["custom"] = self.gemm.meta["custom"]
        marked(node, **{KIND_KEY: self.kind})
        values = [value_of(a) for a in args]

        def run() -> Any:
            with self.fake_mode, torch.no_grad():
                return target(*values, **kwargs)

        # A quantized operand takes its whole formula to find, and layers repeat.
        repeated = target in (FakeQuantize.op, ReadAgain.op)
        node.meta["example_value"] = (
            compat.fake_result(self.fake_mode, target, values, kwargs, run) if repeated else run()
        )
        return node


def _gemm_dtype(gemm: Node, source: Node) -> torch.dtype:
    """The dtype the GEMM reads its operand in: its output's, where autocast narrows on the way."""
    operand, result = value_of(source).dtype, value_of(gemm).dtype
    return result if result.itemsize < operand.itemsize else operand


def _is_barrier(node: Node) -> bool:
    """Whether a quantized operand from before this node must not be reused after it."""
    if any(written_by(node)):
        return True
    return node.op == "call_function" and any(mark in target_name(node) for mark in _BOUNDARIES)


#: Parts of the names of nodes that change how what follows is computed, or write where a schema does not show it.
_BOUNDARIES = (
    "set_grad_enabled", "inference_mode", "_enter_autocast", "_exit_autocast", "_nesting", "triton_kernel_wrapper",
)  # fmt: skip
