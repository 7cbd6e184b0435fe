"""What the backward is given: hints to the partitioner, and an option to narrow what else it keeps.

Hints, on nodes of the joint graph that no checkpoint region has tagged already:

* codes, scales, residuals and masks of activations are saved;
* a decoded wide tensor, or a copy of it in another layout (convolution windows, a broadcast batch) or rotated, is never
  saved but decoded again; so are decoded scales of a stored weight, and one with its zeros
  added;
* a weight is quantized again from the parameter, which is resident anyway (``saved_weights="codes"`` saves codes
  instead), unless the forward changes that parameter: its codes are saved then;
* a copy that repeats a smaller tensor (keys and values, once for every query head of their group) is made again;
* a cast of a weight (autocast) is done again: an estimator that needs its input would keep a wide copy of it else;
* what is rotated with drawn signs is computed in the backward, where dY is: the forward would draw others;
* what reads an input that the forward changes is not computed again, since the backward would read the new value
  (Inductor and ``aot_eager`` do, and get such gradients wrong).

``save="8bit" | "4bit"``: packed GEMM inputs replace only part of what a training step keeps; residual streams, gates
and attention inputs remain. :class:`Partitioner` narrows those too, after the min-cut has chosen them: the forward
returns codes and scales in place of the wide tensor and the backward decodes them. Lossy, and off by default.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile import compat
from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import Quantizer

from .dialect import adds_given_part
from .graph import (
    aten,
    bodies_called,
    emit,
    input_of,
    is_call,
    is_cast,
    is_read_by,
    is_relayout,
    is_view,
    item_of,
    result,
    results_of,
    static_size,
    through_views,
    value_of,
)  # fmt: skip
from .pass_base import Context, GraphPass
from .record import SIGNS_KEY, STATISTICS_KIND, mark_of, operand_kind
from .roles import depends_on_tangents
from .views import (
    ENCODERS,
    ClampOutliers,
    Dequantize,
    EncodeCompensated,
    EstimatorMask,
    Hadamard,
    Quantize,
    QuantizedMM,
    RestoreOutliers,
    encoder_of,
)  # fmt: skip

__all__ = ["Partitioner", "Split", "hints", "narrow_saved", "share_codes"]

_SAVE, _RECOMPUTE = compat.CheckpointPolicy.MUST_SAVE, compat.CheckpointPolicy.MUST_RECOMPUTE

_ENCODER_OPS = tuple(view.op for view in ENCODERS)
_DECODER_OPS = (Dequantize.op, RestoreOutliers.op)

#: What the min-cut may compute again in the backward, as it may torch's own elementwise operations, and what it may not
#: unless a memory budget makes it.
_ELEMENTWISE = (EncodeCompensated.op, Dequantize.op)
_PRODUCTS = (QuantizedMM.op,)

#: What `adopt` swaps the halves of bytes with.
_SWAPS = (aten.bitwise_or.Tensor, aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor_Scalar)

#: What torch puts between a mask and an attention kernel that wants its rows aligned.
_PADDING = (aten.constant_pad_nd.default, aten.slice.Tensor, aten.clone.default)

#: ``save=`` option → quantizer of the tensors it narrows.
SAVE_QUANTIZERS = {"8bit": "e4m3 row absmax even", "4bit": "e2m1 block32 absmax even"}


def hints(graph: Graph, context: Context) -> int:
    """Returns how many nodes were tagged."""
    tags: dict[Node, Any] = {}
    decoded: set[Node] = set()
    recompute_weights = context.recipe.saved_weights == "recompute"
    inputs = _overwritten_inputs(graph)
    overwritten = _computed_from(inputs, graph)
    backward = depends_on_tangents(graph)
    for node in graph.nodes:
        if operand_kind(node) == STATISTICS_KIND:
            continue  # nothing of the monitor's reaches the backward
        weight = operand_kind(node) == "weight" and recompute_weights and node not in overwritten
        if is_call(node, Quantize.op) and operand_kind(node) == "weight" and node not in overwritten:
            tags.update(dict.fromkeys(_casts(Quantize.of(node).x), _RECOMPUTE))
        again = is_call(node, *_DECODER_OPS) or (_keeps_size(node) and input_of(node) in decoded)
        if again or adds_given_part(node):
            decoded.add(node)
            tags[node] = _RECOMPUTE
        elif _swaps_halves(node) or (_repeats(node) and is_read_by(node, backward)):
            tags[node] = _RECOMPUTE
        elif is_call(node, EstimatorMask.op):
            tags[node] = _RECOMPUTE if weight else _SAVE
        elif is_call(node, *_ENCODER_OPS) and weight:
            # The tuple itself has no size to weigh; its elements carry the choice.
            tags[node] = _RECOMPUTE
        elif encoder_of(node) is not None:
            if weight:
                tags[node] = _RECOMPUTE
            elif not _is_clamped(node):
                tags[node] = _SAVE
    tags.update(dict.fromkeys(_readers(inputs, overwritten), _SAVE))
    tags.update(dict.fromkeys(_of_drawn_signs(graph) - backward, _RECOMPUTE))
    for node, tag in tags.items():
        node.meta.setdefault("recompute", tag)
    return len(tags)


def _keeps_size(node: Node) -> bool:
    """A tensor that is as wide as its input: a view, a copy in another layout, a cast, a rotation."""
    return is_relayout(node) or is_cast(node) or is_call(node, Hadamard.op)


def _swaps_halves(node: Node) -> bool:
    """Whether it is a step of `adopt` from bitsandbytes' bytes to codes."""
    return is_call(node, *_SWAPS) and operand_kind(node) == "weight"


def _repeats(node: Node) -> bool:
    """A copy with more elements than there are in memory of what it copies."""
    if not is_call(node, aten.clone.default):
        return False
    value = input_of(node).meta["val"]
    return any(stride == 0 and static_size(size) != 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def _overwritten_inputs(graph: Graph) -> list[Node]:
    """Inputs that the graph writes to: what the backward computes from one, it computes from the new value."""
    written = map(input_of, graph.find_nodes(op="call_function", target=aten.copy_.default))
    return [node for node in written if node.op == "placeholder"]


def _computed_from(inputs: list[Node], graph: Graph) -> dict[Node, None]:
    """``inputs`` and all that depends on them, in order."""
    found = dict.fromkeys(inputs)
    for node in graph.nodes if found else ():
        if any(source in found for source in node.all_input_nodes):
            found[node] = None
    return found


def _of_drawn_signs(graph: Graph) -> set[Node]:
    """What depends on signs that are drawn, they themselves aside."""
    drawn = _drawn_signs(graph)
    return {*_computed_from(drawn, graph)} - {*drawn}


def _drawn_signs(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if mark_of(node, SIGNS_KEY) and not node.all_input_nodes]


def _readers(inputs: list[Node], dependent: Iterable[Node]) -> list[Node]:
    """Nodes that compute something of their own from the memory of ``inputs``, views of them aside."""
    written = {compat.memory_of(value_of(node)) for node in inputs} - {None}

    def is_alias(node: Node) -> bool:
        return not written.isdisjoint(map(compat.memory_of, compat.tree_leaves(value_of(node))))

    return [node for node in dependent if not is_alias(node) and any(map(is_alias, node.all_input_nodes))]


def _casts(source: Any) -> list[Node]:
    """The casts between a weight's quantize and the parameter."""
    casts = []
    while is_cast(source := through_views(source)):
        casts.append(source)
        source = input_of(source)
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
            with compat.partitioner_knows(elementwise=_ELEMENTWISE, products=_PRODUCTS):
                forward, backward = compat.min_cut_partition(gm, joint_inputs, **kwargs)
        if _drawn_signs(forward.graph):
            msg = "qcompile: the partitioner would draw signs in the forward and again in the backward; use signs=fixed"
            raise RuntimeError(msg)
        kept_outputs = kwargs["num_fwd_outputs"]
        for graph_pass in self.passes:
            if graph_pass.runs(self.context.recipe):
                graph_pass.run(Split(forward, backward, kept_outputs), self.context)
        if self.context.observe is not None:
            # Bodies of nested regions are parted before the graph that calls them, whose rows include theirs.
            self.context.observe.saved[:] = saved_tensors(forward, kept_outputs)
        return forward, backward

    def __deepcopy__(self, memo: Any) -> Partitioner:
        return self  # as in pipeline.Hook

    def __reduce__(self) -> tuple[Any, ...]:
        """As its identity: torch pickles its config for the caches' keys, this hook included."""
        return str, (repr(self.uuid()),)

    def uuid(self) -> Any:
        chained = self.chained.uuid() if self.chained is not None else None
        return ("qcompile.partitioner", self.identity, chained)


def saved_tensors(forward: GraphModule, kept_outputs: int) -> list[dict[str, Any]]:
    """One row for each tensor the forward hands to the backward, graph inputs left out: they are alive anyway."""
    rows = []
    for node in results_of(forward.graph)[kept_outputs:]:
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
    item = item_of(source)
    if item is None or not is_call(item[0], torch.ops.higher_order.invoke_subgraph):
        return source
    ((_, body, given),) = bodies_called(item[0])
    inner = _producer(results_of(body.graph)[item[1]])
    return _producer(given[inner]) if inner.op == "placeholder" else inner


def _is_encoded(node: Node) -> bool:
    source = through_views(node)
    return is_call(source, EstimatorMask.op) or (encoder_of(source) is not None and not _is_clamped(source))


def _is_clamped(node: Node) -> bool:
    """The wide result of ``clamp_outliers``; its other two are the residual."""
    encoder = encoder_of(node)
    return encoder is not None and isinstance(encoder[0], ClampOutliers) and encoder[1] == 0


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


def narrow_saved(split: Split, context: Context) -> int:
    """Replace wide saved activations by codes and scales in both graphs; returns how many were narrowed."""
    if context.recipe.save == "exact" or not context.plan.quantized:
        return 0
    forward, backward, kept_outputs = split
    quantizer = Quantizer.parse(SAVE_QUANTIZERS[context.recipe.save])
    output, results = forward.graph.output_node(), list(results_of(forward.graph))
    placeholders = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    kept = {through_views(node) for node in results[:kept_outputs] if isinstance(node, Node)}
    narrowed = 0
    for node in dict.fromkeys(results[kept_outputs:]):
        order = _memory_order(node, kept, quantizer)
        if order is None:
            continue
        placeholder = placeholders.get(node.name)
        if placeholder is None:
            continue
        position = results.index(node, kept_outputs)
        # Where the tensor is made: at the end of the forward all of them would be alive at once.
        with forward.graph.inserting_before(node.next):
            rows = _permuted(forward.graph, node, order)
            parts = Quantize(rows, quantizer, -1).emit_results(forward.graph, near=node)
        value = node.meta["val"]
        with backward.graph.inserting_before(placeholder):
            received = [backward.graph.placeholder(part.name) for part in parts]
        for new, part in zip(received, parts, strict=True):
            new.meta["val"] = part.meta["val"]
        first_use = next(n for n in backward.graph.nodes if n in placeholder.users)
        with backward.graph.inserting_before(first_use):
            decode = Dequantize(received[0], received[1], quantizer, -1, value.shape[-1], value.dtype)
            rows = decode.emit(backward.graph, near=placeholder)
            decoded = _permuted(backward.graph, rows, sorted(range(len(order)), key=order.__getitem__))
        placeholder.replace_all_uses_with(decoded)
        backward.graph.erase_node(placeholder)
        results[position : position + 1] = parts
        narrowed += 1
    output.args = (tuple(results),)
    for gm in (forward, backward):
        gm.graph.lint()
        gm.recompile()
    return narrowed


def _permuted(graph: Graph, x: Node, order: Sequence[int]) -> Node:
    return x if list(order) == sorted(order) else emit(graph, x, aten.permute.default, x, list(order))


def _memory_order(node: Any, kept: set[Node], quantizer: Quantizer) -> list[int] | None:
    """The axes of a tensor to narrow as they lie in memory, rows last; ``None`` for one that stays as it is.

    Narrowed are wide, computed floating-point activations with dense rows; never a result of the user's (``kept``,
    which is alive anyway), a mask, or what is codes already.
    """
    if not isinstance(node, Node) or through_views(node).op == "placeholder" or _is_encoded(node):
        return None
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    width = static_size(value.shape[-1]) if value.dim() >= 2 else None
    if width is None or width < 32 or through_views(node) in kept or _masks_attention(node):
        return None
    # As attention has its heads: transposed, but dense.
    strides = [compat.size_hint(stride) for stride in value.stride()]
    order = sorted(range(value.dim()), key=lambda axis: -strides[axis])
    if order[-1] != value.dim() - 1 or not value.permute(order).is_contiguous():
        return None
    # Statistics per row (log-sum-exp, reciprocal norms) are no wider than 32 and lose their meaning in few bits.
    saved = value.dtype.itemsize - quantizer.format.bits / 8 - storage_dtype(quantizer).itemsize / width
    return order if saved > 0 else None


def _masks_attention(node: Node) -> bool:
    """Whether attention takes a tensor, or a view of it, as anything but queries, keys and values: −∞ is no code."""
    for user in node.users:
        if is_view(user) or is_call(user, *_PADDING):
            if _masks_attention(user):
                return True
        elif "scaled_dot_product" in str(user.target) and node not in user.args[:3]:
            return True
    return False
