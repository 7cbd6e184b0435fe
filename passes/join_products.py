"""Post-grad graphs: thin products that read one tensor become one product.

The adapters of q, k and v each read x to make ``rank`` numbers per token of it, and again for the gradients of their
weights. That takes as long as reading x does::

    x · Aqᵀ,  x · Akᵀ,  x · Avᵀ        ─►   [lq | lk | lv] = x · [Aq; Ak; Av]ᵀ
    dlqᵀ · x,  dlkᵀ · x,  dlvᵀ · x     ─►   [dAq; dAk; dAv] = [dlq | dlk | dlv]ᵀ · x

Every number is the sum that it was. Only cuBLAS may choose another order for it. The gradients lie in one allocation,
one behind the other.
"""

from __future__ import annotations

from collections import defaultdict
from math import prod
from typing import NamedTuple

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.kernels.matmul.costs import rates_of

from .graph import aten, emit, input_of, is_view, may_alias, static_size
from .pass_base import Context

__all__ = ["join_products"]

#: Numbers per row of a joined product: a tile of tensor cores, which one product has to itself as well.
_MOST = 128


class _Thin(NamedTuple):
    """A product of a shared tensor, at position ``side`` of its arguments, and of a thin one."""

    product: Node
    side: int
    extent: int

    @property
    def shared(self) -> Node:  # may have become a part of another product
        return self.product.args[self.side]  # type: ignore[return-value]

    @property
    def thin(self) -> Node:
        return self.product.args[1 - self.side]  # type: ignore[return-value]


def join_products(graph: Graph, context: Context) -> int:
    """Returns how many products became part of another."""
    groups: dict[tuple[Node, int], list[_Thin]] = defaultdict(list)
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        if compat.tensor_core_capability(product.meta["val"].device) is None:
            continue
        for side, shared in enumerate(product.args):
            extent = static_size(product.meta["val"].shape[1 - side])
            if extent is not None and extent < _MOST:
                groups[shared, side].append(_Thin(product, side, extent))
    return sum(_joined(graph, members) for members in groups.values())


def _joined(graph: Graph, members: list[_Thin]) -> int:
    """Join what may be; returns how many products are gone."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    members = [m for m in members if m.product in order and m.thin is not m.shared and _source(m.thin) is not None]
    if len(members) < 2 or sum(member.extent for member in members) > _MOST:
        return 0
    shared = members[0].shared
    if not _pays(shared, len(members)):
        return 0
    sources = [source for member in members if (source := _source(member.thin)) is not None]
    last = max((shared, *sources), key=lambda node: order[node])
    if any(order[user] <= order[last] for member in members for user in member.product.users):
        return 0  # something reads one product before the operands of another are there
    place = last.next
    while place.op == "placeholder":
        place = place.next
    side, serves, start = members[0].side, members[0].product, 0
    axis = 1 - side  # of the thin operands and of the result
    with graph.inserting_before(place):
        joined = emit(graph, serves, aten.cat.default, [_viewed_again(graph, m.thin) for m in members], axis)
        product = emit(graph, serves, aten.mm.default, *((shared, joined) if side == 0 else (joined, shared)))
        for member in members:
            end = start + member.extent
            part = emit(graph, member.product, aten.slice.Tensor, product, axis, start, end)
            as_expected = axis == 0 or not _is_returned(member.product)  # rows lie so
            if not as_expected or _is_read_by_address(member.product):
                part = emit(graph, member.product, aten.clone.default, part, memory_format=torch.contiguous_format)
            member.product.replace_all_uses_with(part)
            start = end
    for member in members:
        graph.erase_node(member.product)
    return len(members) - 1


def _source(node: Node) -> Node | None:
    """What a tensor is a view of; ``None`` where sizes of the view are computed in the graph."""
    while is_view(node):
        if len(node.all_input_nodes) > 1:
            return None
        node = input_of(node)
    return node


def _viewed_again(graph: Graph, node: Node) -> Node:
    """The same view, at the graph's insertion point."""
    if not is_view(node):
        return node
    return emit(graph, node, node.target, _viewed_again(graph, input_of(node)), *node.args[1:], **node.kwargs)


def _pays(shared: Node, readers: int) -> bool:
    """Whether reading a tensor once instead of once per reader saves more than joining and parting takes."""
    value = shared.meta["val"]
    sizes = [static_size(size) for size in value.shape]
    if None in sizes:
        return False
    rates, _ = rates_of(compat.card_name(value.device))
    moved = value.dtype.itemsize * prod(sizes) * (readers - 1)  # type: ignore[arg-type]
    return rates.passes(moved, 0) > rates.passes(0, readers)


def _is_returned(node: Node) -> bool:
    """Whether the graph returns a tensor, or a view of it."""
    return any(user.op == "output" or (is_view(user) and _is_returned(user)) for user in node.users)


def _is_read_by_address(node: Node) -> bool:
    """Whether something depends on where a tensor, or a view of it, lies in its storage: kernels that users wrote, and
    calls of ATen that take their own view of memory (``as_strided``, another dtype).
    """
    return any(
        _is_read_by_address(user) if is_view(user) else user.op != "output" and (may_alias(user) or not _is_known(user))
        for user in node.users
    )


def _is_known(call: Node) -> bool:
    """Whether an op reads tensors by their strides, whatever these are."""
    return getattr(call.target, "namespace", None) in ("aten", "prims", "qcompile")
