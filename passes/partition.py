"""What the backward is given: hints to the partitioner, and an option to narrow what else it keeps.

Hints, on nodes of the joint graph that no checkpoint region has tagged already:

* codes, scales, residuals and masks of activations are saved;
* a decoded wide tensor, or a copy of it in another layout (convolution windows, a broadcast batch) or rotated, is never
  saved but decoded again;
* a weight is quantized again from the parameter, which is resident anyway (``saved_weights="codes"`` saves codes
  instead), unless the forward changes that parameter: its codes are saved then;
* a cast of a weight (autocast) is done again: an estimator that needs its input would keep a wide copy of it else.

``save="8bit" | "4bit"``: packed GEMM inputs replace only part of what a training step keeps; residual streams, gates
and attention inputs remain. :class:`Partitioner` narrows those too, after the min-cut has chosen them: the forward
returns codes and scales in place of the wide tensor and the backward decodes them. Lossy, and off by default.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile import compat
from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import Quantizer

from .dialect import is_call, is_relayout, operand_kind, through_views
from .graph import static_size
from .pass_base import Context, GraphPass, emit
from .watch import STATISTICS_KIND

__all__ = ["Partitioner", "Split", "hints", "narrow_saved"]

aten, prims, ops = torch.ops.aten, torch.ops.prims, torch.ops.qcompile
_SAVE, _RECOMPUTE = compat.CheckpointPolicy.MUST_SAVE, compat.CheckpointPolicy.MUST_RECOMPUTE

_ENCODERS = (ops.quantize.default, ops.quantize_compensated.default, ops.clamp_outliers.default)
_DECODERS = (ops.dequantize.default, ops.restore_outliers.default)

#: ``save=`` option → quantizer of the tensors it narrows.
SAVE_QUANTIZERS = {"8bit": "e4m3 row absmax even", "4bit": "e2m1 block32 absmax even"}


def hints(graph: Graph, context: Context) -> int:
    """Returns how many nodes were tagged."""
    tags: dict[Node, Any] = {}
    decoded: set[Node] = set()
    recompute_weights = context.recipe.saved_weights == "recompute"
    overwritten = _from_overwritten_inputs(graph)
    for node in graph.nodes:
        if operand_kind(node) == STATISTICS_KIND:
            continue  # nothing of the monitor's reaches the backward
        weight = operand_kind(node) == "weight" and recompute_weights and node not in overwritten
        if is_call(node, ops.quantize.default) and operand_kind(node) == "weight" and node not in overwritten:
            tags.update(dict.fromkeys(_casts(node.args[0]), _RECOMPUTE))
        if is_call(node, *_DECODERS) or (_keeps_size(node) and node.args[0] in decoded):
            decoded.add(node)
            tags[node] = _RECOMPUTE
        elif is_call(node, ops.estimator_mask.default):
            tags[node] = _RECOMPUTE if weight else _SAVE
        elif is_call(node, *_ENCODERS) and weight:
            # The tuple itself has no size to weigh; its elements carry the choice.
            tags[node] = _RECOMPUTE
        elif is_call(node, operator.getitem) and is_call(node.args[0], *_ENCODERS):
            if weight:
                tags[node] = _RECOMPUTE
            elif not _is_clamped(node):
                tags[node] = _SAVE
    for node, tag in tags.items():
        node.meta.setdefault("recompute", tag)
    return len(tags)


def _keeps_size(node: Node) -> bool:
    """A tensor that is as wide as its input: a view, a copy in another layout, a rotation."""
    return is_relayout(node) or is_call(node, ops.hadamard.default)


def _from_overwritten_inputs(graph: Graph) -> set[Node]:
    """Nodes computed from an input that the graph writes to: the backward would compute them from the new value."""
    writes = [node for node in graph.nodes if is_call(node, aten.copy_.default) and node.args[0].op == "placeholder"]
    found = {node.args[0] for node in writes}
    for node in graph.nodes if found else ():
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _casts(source: Any) -> list[Node]:
    """The casts between a weight's quantize and the parameter."""
    casts = []
    while is_call(source := through_views(source), prims.convert_element_type.default, aten._to_copy.default):
        casts.append(source)
        source = source.args[0]
    return casts


class Split(NamedTuple):
    """A joint graph after the min-cut; the backward is given the forward's results from ``kept_outputs`` on."""

    forward: GraphModule
    backward: GraphModule
    kept_outputs: int


class Partitioner(compat.CustomPartitionerFn):
    """Min-cut, then the passes over both graphs, and a note of what is saved (`explain`)."""

    def __init__(
        self, context: Context, identity: str, chained: Any = None, passes: Iterable[GraphPass[Split, Context]] = ()
    ) -> None:
        self.context, self.identity, self.chained, self.passes = context, identity, chained, tuple(passes)

    def __call__(self, gm: GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
        if self.chained is not None:
            forward, backward = self.chained(gm, joint_inputs, **kwargs)
        else:
            kwargs.setdefault("compiler", "inductor")
            forward, backward = compat.min_cut_partition(gm, joint_inputs, **kwargs)
        kept_outputs = kwargs["num_fwd_outputs"]
        for graph_pass in self.passes:
            if graph_pass.name not in self.context.recipe.disable_passes:
                graph_pass.run(Split(forward, backward, kept_outputs), self.context)
        if self.context.observe is not None:
            # Bodies of nested regions are parted before the graph that calls them, whose rows include theirs.
            self.context.observe.saved[:] = saved_tensors(forward, kept_outputs)
        return forward, backward

    def __deepcopy__(self, memo: Any) -> Partitioner:
        return self  # as in pipeline.Hook

    def uuid(self) -> Any:
        chained = self.chained.uuid() if self.chained is not None else None
        return ("qcompile.partitioner", self.identity, chained)


def saved_tensors(forward: GraphModule, kept_outputs: int) -> list[dict[str, Any]]:
    """One row for each tensor the forward hands to the backward, graph inputs left out: they are alive anyway."""
    rows = []
    for node in forward.graph.find_nodes(op="output")[0].args[0][kept_outputs:]:
        if not isinstance(node, Node) or (producer := _producer(node)).op == "placeholder":
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            rows.append(
                {
                    "node": node.name,
                    "shape": [int(n) if isinstance(n, int) else str(n) for n in value.shape],
                    "dtype": str(value.dtype).removeprefix("torch."),
                    "bytes": compat.size_hint(value.numel()) * value.dtype.itemsize,
                    "codes": _is_encoded(producer),
                    "custom": dict(producer.meta.get("custom") or {}),
                }
            )
    return rows


def _producer(node: Node) -> Node:
    """The node that makes a saved tensor, views aside; for a result of a nested region, the node in its body."""
    source = through_views(node)
    if not is_call(source, operator.getitem) or not is_call(source.args[0], torch.ops.higher_order.invoke_subgraph):
        return source
    call, index = source.args
    body, _, *operands = call.args  # type: ignore[union-attr]
    graph = getattr(node.graph.owning_module, body.target).graph  # type: ignore[union-attr, arg-type]
    inner = _producer(graph.find_nodes(op="output")[0].args[0][index])
    if inner.op != "placeholder":
        return inner
    return _producer(operands[graph.find_nodes(op="placeholder").index(inner)])


def _is_encoded(node: Node) -> bool:
    source = through_views(node)
    if is_call(source, operator.getitem) and is_call(source.args[0], *_ENCODERS):
        return not _is_clamped(source)
    return is_call(source, ops.estimator_mask.default)


def _is_clamped(node: Node) -> bool:
    """The wide result of ``clamp_outliers``; its other two are the residual."""
    source, index = node.args
    return is_call(source, ops.clamp_outliers.default) and bool(index == 0)


def narrow_saved(split: Split, context: Context) -> int:
    """Replace wide saved activations by codes and scales in both graphs; returns how many were narrowed."""
    if context.recipe.save == "exact" or not context.plan.quantized:
        return 0
    forward, backward, kept_outputs = split
    quantizer = Quantizer.parse(SAVE_QUANTIZERS[context.recipe.save])
    output = forward.graph.find_nodes(op="output")[0]
    results = list(output.args[0])
    placeholders = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    narrowed = 0
    for node in dict.fromkeys(results[kept_outputs:]):
        if not _can_narrow(node, results[:kept_outputs], quantizer):
            continue
        placeholder = placeholders.get(node.name)
        if placeholder is None:
            continue
        position = results.index(node, kept_outputs)
        with forward.graph.inserting_before(output):
            pair = emit(forward.graph, node, ops.quantize.default, node, str(quantizer), -1)
            parts = [emit(forward.graph, node, operator.getitem, pair, i) for i in range(2)]
        value = node.meta["val"]
        with backward.graph.inserting_before(placeholder):
            received = [backward.graph.placeholder(part.name) for part in parts]
        for new, part in zip(received, parts, strict=True):
            new.meta["val"] = part.meta["val"]
        first_use = next(n for n in backward.graph.nodes if n.op != "placeholder")
        with backward.graph.inserting_before(first_use):
            decoded = emit(
                backward.graph,
                placeholder,
                ops.dequantize.default,
                *received,
                str(quantizer),
                -1,
                value.shape[-1],
                value.dtype,
            )
        placeholder.replace_all_uses_with(decoded)
        backward.graph.erase_node(placeholder)
        results[position : position + 1] = parts
        narrowed += 1
    output.args = (tuple(results),)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()
    return narrowed


def _can_narrow(node: Any, kept: list[Any], quantizer: Quantizer) -> bool:
    """Wide, computed, row-shaped floating-point activations; never a result of the user's, a mask, or what is codes
    already.
    """
    if not isinstance(node, Node) or node in kept or through_views(node).op == "placeholder" or _is_encoded(node):
        return False
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    width = static_size(value.shape[-1]) if value.dim() >= 2 else None
    if width is None or width < 32 or not value.is_contiguous():
        return False
    # −inf masks and per-row statistics (log-sum-exp, reciprocal norms) lose their meaning in few bits.
    additive_mask = any(
        "scaled_dot_product" in str(user.target) and user.args.index(node) > 2
        for user in node.users
        if user.op == "call_function" and node in user.args
    )
    saved = value.dtype.itemsize - quantizer.format.bits / 8 - storage_dtype(quantizer).itemsize / width
    return not additive_mask and bool(saved > 0)
