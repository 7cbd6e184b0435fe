"""What passes share about any graph: values and names of nodes, sizes, views, bodies, and how a node is added.

What they share about the ``qcompile::`` ops is in `views.py` and `dialect.py`, about sites in `record.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile import compat

__all__ = [
    "argument_of", "aten", "attribute_of", "bodies_called", "decided_size", "emit", "fake_values_read",
    "graph_modules", "input_of", "is_call", "is_cast", "is_gather", "is_read_by", "is_relayout", "is_view", "item_of",
    "may_alias", "memory_of", "result", "results_of", "same_size", "same_sizes", "size_along", "static_size",
    "take_over", "target_name", "through_views", "unchanged", "value_of",
]  # fmt: skip

aten = torch.ops.aten


def value_of(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else node


def static_size(size: Any) -> int | None:
    """The size as an int, or ``None`` if it is only known at run time. Specialized SymInts count as known."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return None if known is None else int(known)


def decided_size(size: Any) -> int | None:
    """The size as an int. One that is only known at run time is fixed by a guard, so that what follows from it is the
    same whether sizes are static or dynamic; ``None`` for one that must stay open.
    """
    return size if isinstance(size, int) else compat.guarded_int(size)


def graph_modules(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and the bodies nested in it."""
    children = [child for _, child in gm.named_children() if isinstance(child, GraphModule)]
    return [gm, *(module for child in children for module in graph_modules(child))]


def attribute_of(node: Node) -> Any:
    """What a ``get_attr`` node stands for, ``None`` if there is no such thing."""
    owner: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        owner = getattr(owner, part, None)
    return owner


def bodies_called(call: Node) -> Iterator[tuple[Node, GraphModule, dict[Node, Node]]]:
    """The bodies of a higher-order op, each as the attribute it is read from, the module, and what its placeholders
    are given.

    Such an op takes what its bodies read last, and in their order. What else it takes (a predicate) stands before, and
    placeholders that it fills itself (the score of an attention) come first.
    """
    arguments = [leaf for leaf in compat.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Node)]
    bodies = {a: m for a in arguments if a.op == "get_attr" and isinstance(m := attribute_of(a), GraphModule)}
    values = [a for a in arguments if a not in bodies]
    for attribute, module in bodies.items():
        placeholders = module.graph.find_nodes(op="placeholder")
        yield attribute, module, dict(zip(reversed(placeholders), reversed(values), strict=False))


def target_name(node: Node) -> str:
    """Name of what a node calls, as it is spelled there, without the overload; ops of other libraries than ATen have
    their namespace before it.
    """
    target: Any = node.target
    if isinstance(target, compat.OpOverload):
        return str(target.name().partition(".")[0].removeprefix("aten::"))
    if isinstance(target, compat.OpOverloadPacket):
        return str(target._qualified_op_name.removeprefix("aten::"))
    return str(getattr(target, "__name__", target)).partition(".")[0]


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


_VIEWS = frozenset(
    {
        aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
        aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
        aten.alias.default, aten.detach.default, aten.expand.default,
    }
)  # fmt: skip
#: Views of a part of a tensor, or of several at once.
_PARTS = frozenset(
    {
        aten.slice.Tensor, aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
        operator.getitem,
    }
)  # fmt: skip


def is_relayout(node: Any) -> bool:
    """A view, or a copy of the same elements in another layout."""
    return is_call(node, aten.clone.default, *_VIEWS)


def through_views(node: Node) -> Node:
    """The node whose memory ``node`` looks at."""
    while is_call(node, *_VIEWS):
        node = input_of(node)
    return node


def memory_of(node: Node) -> Node:
    """The node whose memory ``node`` looks at, or at a part of: gate and up are halves of one product."""
    while is_call(node, *_VIEWS, *_PARTS):
        node = input_of(node)
    return node


def is_view(node: Any) -> bool:
    return is_call(node, *_VIEWS)


def is_gather(node: Any) -> bool:
    """Whole rows that a list of numbers picks, in its order."""
    if is_call(node, aten.index_select.default):
        return bool(node.args[1] == 0)
    rows: Any = node.args[1] if is_call(node, aten.index.Tensor) else ()
    value = rows[0].meta["val"] if len(rows) == 1 and isinstance(rows[0], Node) else None
    return value is not None and value.dim() == 1 and value.dtype in (torch.int32, torch.int64)


def is_cast(node: Any) -> bool:
    """A copy in another dtype, or on another device."""
    return is_call(node, torch.ops.prims.convert_element_type.default, aten._to_copy.default)


def is_read_by(node: Node, readers: Collection[Node]) -> bool:
    """Whether one of ``readers`` reads a tensor, a view of it, or rows gathered from it."""
    passed_on = (user for user in node.users if is_view(user) or is_gather(user))
    return any(user in readers for user in node.users) or any(is_read_by(user, readers) for user in passed_on)


def input_of(node: Node) -> Node:
    """The first argument of a call."""
    return node.args[0]  # type: ignore[return-value]


def results_of(graph: Graph) -> Sequence[Any]:
    """What a graph returns: nodes, or constants."""
    return graph.output_node().args[0]  # type: ignore[return-value]


def argument_of(node: Node, position: int, keyword: str, default: Any = None) -> Any:
    """An argument of a call, however it is given."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(keyword, default)


def item_of(node: Any) -> tuple[Node, int] | None:
    """The call that returns a tuple, and which of its results ``node`` is; ``None`` for any other node."""
    return node.args if is_call(node, operator.getitem) else None


def result(node: Node, index: int) -> Node | None:
    """The node that takes a result out of the tuple that ``node`` returns, ``None`` if nothing does."""
    return next((user for user in node.users if item_of(user) == (node, index)), None)


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal as far as can be told without adding a guard."""
    return len(a) == len(b) and all(same_size(m, n) for m, n in zip(a, b, strict=True))


def same_size(a: Any, b: Any) -> bool:
    """Equal as far as can be told without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    known_a, known_b = static_size(a), static_size(b)
    if known_a is not None and known_b is not None:
        return known_a == known_b
    return str(a) == str(b)


#: Metadata a new node takes over: recomputation and checkpoint tags above all, else checkpointing silently saves more.
_INHERITED = (
    "recompute", "ac_graph_id", "partitioner_tag", "seq_nr", "autograd_backward", "custom", "stack_trace",
    "nn_module_stack", "fwd_nn_module_stack", "source_fn_stack", "fwd_source_fn_stack",
)  # fmt: skip


def emit(graph: Graph, serves: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """Add a call before the insertion point, with the metadata of the node it serves and its own fake value."""
    node = graph.call_function(target, args, kwargs)
    node.meta.update({key: serves.meta[key] for key in _INHERITED if key in serves.meta})
    values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    mode = compat.fake_mode_of(graph)

    def run() -> Any:
        with mode:
            return target(*values[0], **values[1])

    node.meta["val"] = compat.fake_result(mode, target, *values, run)
    return node


def take_over(new: Node, old: Node) -> None:
    """Let ``new``, which computes what ``old`` does and is no view, have its fake value: views of that stay views."""
    if _geometry(new) == _geometry(old):
        new.meta["val"] = old.meta["val"]


def _geometry(node: Node) -> Any:
    value = node.meta["val"]
    return [str(n) for n in (*value.shape, *value.stride())], value.dtype, value.device


def fake_values_read(graph: Graph) -> dict[Node, list[Any]]:
    """The fake values that each node is given."""
    return {node: [source.meta.get("val") for source in node.all_input_nodes] for node in graph.nodes}


def unchanged(graph: Graph, before: dict[Node, list[Any]]) -> set[Node]:
    """Nodes whose fake values are right if they were for what they read ``before``, and if added nodes got theirs by
    :func:`emit`. Left out are nodes that read other values now, and added views of memory that none of these has:
    of such a view that was there before Inductor's own patterns did not find the value anew either.
    """
    found = set()
    for node, values in fake_values_read(graph).items():
        known = before.get(node)
        if known is None:
            memory = compat.memory_of(node.meta.get("val"))
            right = memory is None or not may_alias(node) or memory in map(compat.memory_of, values)
        else:
            right = len(values) == len(known) and all(map(operator.is_, values, known))
        if right:
            found.add(node)
    return found


def may_alias(node: Node) -> bool:
    """Whether the result of an ATen call may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(argument.alias_info is not None for argument in schema.arguments)


def size_along(graph: Graph, serves: Node, x: Node, axis: int) -> Any:
    """Length of an axis, as a number or as a node."""
    value = x.meta["val"]
    size = value.shape[axis]
    return size if isinstance(size, int) else emit(graph, serves, torch.ops.aten.sym_size.int, x, axis % value.dim())
