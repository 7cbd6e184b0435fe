"""Joint graph: a number that multiplies the result of a low-rank product moves to the small operand.

PEFT computes ``base(x) + lora_B(lora_A(x)) * scaling``. As written, the backward multiplies all of dY by the number,
and writes it once more, since dX of the base layer reads dY without it. With an adapter's weights A, B and l = x·Aᵀ::

    y  = (l · Bᵀ) · c                    ─►   y  = (l · c) · Bᵀ
    dl = (dY · c) · B                    ─►   dl = (dY · B) · c
    dB = (dY · c)ᵀ · l                   ─►   dB = dYᵀ · (l · c)

So c multiplies rank instead of N numbers per token, and ``l · c`` is computed once for both directions. What is
multiplied must be a quarter as large at most. If c is a power of two (2, PEFT's usual alpha / r), results have the same
bits but for the ends of the range of numbers. Otherwise ``l · c`` is rounded in place of y, as often as in eager torch.
FP16 is left alone: its range ends where activations are, and a factor in front of a product may be what keeps that
below 65504.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from .graph import aten, emit, input_of, is_call, is_view, same_sizes, static_size
from .pass_base import Context

__all__ = ["move_factors"]

#: How much smaller a tensor must be than the one that is multiplied now.
_SMALLER = 4


class _Use(NamedTuple):
    """A product, and the position of its operand that is a view of a given tensor."""

    product: Node
    side: int

    @property
    def other(self) -> Node:
        return self.product.args[1 - self.side]  # type: ignore[return-value]

    def extents(self) -> tuple[Any, Any, Any]:
        """Of the operand's own axis, of the contraction, and of the other operand's own axis."""
        left, right = (operand.meta["val"].shape for operand in self.product.args)  # type: ignore[union-attr]
        own = left[0], right[1]
        return own[self.side], left[1], own[1 - self.side]


def move_factors(graph: Graph, context: Context) -> int:
    """Returns how many multiplications moved."""
    moved: dict[tuple[Node, Any], Node] = {}  # an operand and its factor → their product, of the forward
    return sum(
        _to_operand(graph, node, moved) or _behind_products(graph, node, moved)
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        if _is_scaling(node)
    )


def _is_scaling(node: Node) -> bool:
    """Whether a tensor is multiplied by a finite number, without another dtype or layout, and not FP16."""
    x, factor = node.args
    if not isinstance(x, Node) or not isinstance(factor, (int, float)) or isinstance(factor, bool):
        return False
    before, after = x.meta["val"], node.meta["val"]
    has_range = before.dtype.is_floating_point and before.dtype != torch.float16 and isfinite(factor)
    return bool(has_range) and before.dtype == after.dtype and _same_strides(before, after)


def _same_strides(a: Any, b: Any) -> bool:
    """So that what views the one can view the other."""
    return same_sizes(a.shape, b.shape) and same_sizes(a.stride(), b.stride())


def _to_operand(graph: Graph, node: Node, moved: dict[tuple[Node, Any], Node]) -> bool:
    """``(a · b) · c`` → ``(a · c) · b``, if a is small and nothing else reads ``a · b``."""
    x, factor = node.args
    product = _viewed(x)
    if not is_call(product, aten.mm.default) or len(product.users) != 1:
        return False
    _, contracted, columns = _Use(product, 0).extents()
    if not _is_smaller(contracted, columns):
        return False
    operand: Node = product.args[0]
    key = operand, factor
    if key not in moved:
        with graph.inserting_before(product):
            moved[key] = emit(graph, product, aten.mul.Tensor, operand, factor)
    elif product < moved[key]:  # the result that is multiplied first may be of the later of two products
        product.prepend(moved[key])
    product.update_arg(0, moved[key])
    _read_instead(graph, node, x)  # type: ignore[arg-type]
    return True


def _behind_products(graph: Graph, node: Node, moved: dict[tuple[Node, Any], Node]) -> bool:
    """``(a · c) · b`` → ``a · (b · c)`` where the forward has that already, else ``(a · b) · c``; if all that reads
    ``a · c`` are such products.
    """
    x, factor = node.args
    uses = _uses(node)
    if not uses:
        return False
    for use in uses:
        own, contracted, others = use.extents()
        if not _is_smaller(others, own if (use.other, factor) in moved else contracted):
            return False
    for use in uses:
        if (use.other, factor) in moved:
            use.product.update_arg(1 - use.side, moved[use.other, factor])
            continue
        with graph.inserting_after(use.product):
            scaled = emit(graph, use.product, aten.mul.Tensor, use.product, factor)
        _read_instead(graph, use.product, scaled)
    _read_instead(graph, node, x)  # type: ignore[arg-type]
    return True


def _is_smaller(extent: Any, than: Any) -> bool:
    """As far as is known without a guard."""
    known = static_size(extent), static_size(than)
    return None not in known and known[0] * _SMALLER <= known[1]  # type: ignore[operator]


def _viewed(node: Any) -> Any:
    """What a chain of views looks at, of which each is read by the next alone."""
    while is_view(node) and len(node.users) == 1:
        node = input_of(node)
    return node


def _uses(node: Node) -> list[_Use]:
    """The products that read a tensor, through views; none if anything else does."""
    found: list[_Use] = []
    for user in node.users:
        if is_view(user) and user.users:
            uses = _uses(user)
        elif is_call(user, aten.mm.default) and user.args[0] is not user.args[1]:
            uses = [_Use(user, user.args.index(node))]
        else:
            uses = []
        if not uses:
            return []
        found += uses
    return found


def _read_instead(graph: Graph, old: Node, new: Node) -> None:
    """Let readers of ``old``, but for ``new``, read that; views of it included, whose fake values look at its memory
    then.
    """
    for user in list(old.users):
        if user is new:
            continue
        if is_view(user):
            with graph.inserting_before(user):
                view = emit(graph, user, user.target, new, *user.args[1:], **user.kwargs)
            _read_instead(graph, user, view)
        else:
            user.replace_input_with(old, new)
