"""Joint graph: take out rotations that undo each other.

`insert` asks for operands that mean what they meant before, so the dialect rotates decoded values back. With H the
block-diagonal, orthonormal and symmetric Hadamard matrix most of that work is not needed:

* a product that contracts two operands along the axis both are rotated on does not see the rotation::

      (X H)(W H)ᵀ = X Wᵀ

* a product that keeps the rotated axis can be rotated afterwards, and where the result is rotated next, as the
  gradient of a rotated operand is, the two rotations are none::

      (E · (W H)) H = E · W

Views, transposes and sums (a gradient with several sources) are looked through. What is left is a rotation of something
that is quantized alone; where it is an operand of a product that keeps the axis, it moves behind the product, which
can then read codes. Numbers change by the rounding of what is not computed any more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

from torch.fx import Graph, Node

from .dialect import GEMMS, LOOP, LOOP_BACKWARD, gemm_operands
from .graph import aten, emit, input_of, is_call, result, same_sizes, target_name
from .pass_base import Context
from .views import Hadamard

__all__ = ["cancel_rotations"]

#: Their operands come first. The matrices that a grouped one multiplies are the last two axes of each operand, and of
#: its results.
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten._grouped_mm.default)
_PRODUCTS_WITH_BIAS = (aten.addmm.default, aten.baddbmm.default)
_RESHAPES = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
_LIKE = (aten.alias.default, aten.detach.default, aten.clone.default)


@dataclass(frozen=True)
class Rotation:
    """Blocks of ``block`` along ``axis`` (not negative) of some tensor."""

    block: int
    axis: int


def cancel_rotations(graph: Graph, context: Context) -> int:
    """Returns how many products and gradients lost a rotation."""
    if not Hadamard.calls(graph):
        return 0
    count = sum(_contract_unrotated(graph, node) for node in list(graph.nodes))
    for node in Hadamard.calls(graph):
        x, rotation = _rotation_of(node)
        if not _is_masked(node) and _is_rotated(x, rotation):
            node.replace_all_uses_with(_unrotated(graph, x, rotation))
            count += 1
    graph.eliminate_dead_code()  # a product counts once, whichever of its operands is still rotated
    return count + sum(_rotate_afterwards(graph, node) for node in list(graph.nodes))


def _rotation_of(node: Node) -> tuple[Node, Rotation]:
    view = Hadamard.of(node)
    return view.x, Rotation(view.block, view.axis % view.x.meta["val"].dim())


def _is_masked(node: Node) -> bool:
    return Hadamard.of(node).mask is not None


def _contract_unrotated(graph: Graph, product: Node) -> bool:
    """Let a product of two operands rotated along the contraction read what they are rotated from."""
    positions = _contracted(product)
    if positions is None:
        return False
    left, right = (cast("Node", product.args[position]) for position in positions)
    axes = left.meta["val"].dim() - 1, right.meta["val"].dim() - 2
    blocks = {_block_along(operand, axis) for operand, axis in zip((left, right), axes, strict=True)}
    if len(blocks) != 1 or None in blocks:
        return False
    (block,) = blocks
    unrotated = [
        _unrotated(graph, operand, Rotation(block, axis))  # type: ignore[arg-type]
        for operand, axis in zip((left, right), axes, strict=True)
    ]
    for position, operand in zip(positions, unrotated, strict=True):
        product.update_arg(position, operand)
    if target_name(product) == LOOP_BACKWARD:  # gradients of what is not rotated
        for index, axis in enumerate(axes):
            if (gradient := result(product, index)) is not None:
                _rotate_result(graph, gradient, block, axis)  # type: ignore[arg-type]
    return True


def _contracted(product: Node) -> tuple[int, int] | None:
    """Positions of the two operands that a product contracts, along the last axis of the first one and the last but one
    of the second; or of those whose gradients it computes. Not where it contracts tokens in groups.
    """
    if is_call(product, *_PRODUCTS, *_PRODUCTS_WITH_BIAS):
        in_groups = is_call(product, aten._grouped_mm.default) and product.meta["val"].dim() == 3
        return None if in_groups else GEMMS[product.target]
    return (0, 1) if product.op == "call_function" and target_name(product) in (LOOP, LOOP_BACKWARD) else None


def _keeps(product: Node, side: int) -> bool:
    """Whether a product keeps the rows of its left operand (side 0) or the columns of its right one (1) in such a way
    that either can be rotated before it or after it. Rows in groups meet other matrices, each group its own.
    """
    return side == 1 or not (is_call(product, aten._grouped_mm.default) and product.meta["val"].dim() == 2)


def _rotate_result(graph: Graph, node: Node, block: int, axis: int) -> None:
    """Let everybody read the rotation of a node in its place."""
    with graph.inserting_after(node):
        rotated = Hadamard(node, block, axis).emit(graph, near=node)
    for user in [user for user in node.users if user is not rotated]:
        user.replace_input_with(node, rotated)


def _block_along(node: Node, axis: int) -> int | None:
    """Size of the blocks in which an operand, seen through views, is rotated along ``axis``."""
    while not is_call(node, Hadamard.op):
        source = _source_axis(node, axis)
        if source is None:
            return None
        node, axis = input_of(node), source
    _, rotation = _rotation_of(node)
    return rotation.block if rotation.axis == axis and not _is_masked(node) else None


def _rotate_afterwards(graph: Graph, product: Node) -> bool:
    """Move the rotation of an operand along an axis that a product keeps behind the product."""
    if not is_call(product, *_PRODUCTS):
        return False
    for side, operand in enumerate(gemm_operands(product)):
        kept, contracted = (-2, -1) if side == 0 else (-1, -2)
        axis = operand.meta["val"].dim() + kept
        block = _block_along(operand, axis) if _keeps(product, side) else None
        if block is None or _block_along(operand, operand.meta["val"].dim() + contracted) is not None:
            continue
        _rotate_result(graph, product, block, kept)
        product.update_arg(side, _unrotated(graph, operand, Rotation(block, axis)))
        return True
    return False


def _is_rotated(node: Any, rotation: Rotation) -> bool:
    """Whether :func:`_unrotated` can take the rotation away."""
    if is_call(node, Hadamard.op):
        return not _is_masked(node) and _rotation_of(node)[1] == rotation
    return bool(parts := _parts(node, rotation)) and all(_is_rotated(part, of) for part, of in parts.values())


def _unrotated(graph: Graph, node: Node, rotation: Rotation) -> Node:
    """What ``node`` is the rotation of; the operations between are repeated on it."""
    if is_call(node, Hadamard.op):
        return Hadamard.of(node).x
    arguments = list(node.args)
    for position, (part, of) in _parts(node, rotation).items():
        arguments[position] = _unrotated(graph, part, of)
    with graph.inserting_before(node):
        return emit(graph, node, node.target, *arguments, **node.kwargs)


def _parts(node: Any, rotation: Rotation) -> dict[int, tuple[Any, Rotation]]:
    """Arguments of which ``node`` is rotated if they are, with their rotations: what a view looks at, the terms of a
    sum, the operand of a product that brings the axis along.
    """
    if (source := _source_axis(node, rotation.axis)) is not None:
        return {0: (input_of(node), Rotation(rotation.block, source))}
    if is_call(node, aten.add.Tensor) and not node.kwargs and all(isinstance(term, Node) for term in node.args):
        shapes = [term.meta["val"].shape for term in node.args]
        if same_sizes(*shapes):
            return {position: (term, rotation) for position, term in enumerate(node.args)}
    # A product with other readers would have to be computed twice.
    if is_call(node, *_PRODUCTS) and len(node.users) == 1 and rotation.axis >= node.meta["val"].dim() - 2:
        behind = rotation.axis - node.meta["val"].dim()
        side = behind + 2  # rows come from the left operand, columns from the right
        operand = node.args[side]
        if _keeps(node, side):
            return {side: (operand, Rotation(rotation.block, operand.meta["val"].dim() + behind))}
    return {}


def _source_axis(node: Any, axis: int) -> int | None:
    """Which axis of its input, element for element, is ``axis`` of a view; ``None`` if there is none."""
    if is_call(node, *_LIKE):
        return axis
    if is_call(node, aten.permute.default):
        order: Any = node.args[1]
        return order[axis] % len(order)
    if is_call(node, aten.transpose.int, aten.t.default):
        first, second = (n % node.meta["val"].dim() for n in node.args[1:]) if len(node.args) > 1 else (0, 1)
        return {first: second, second: first}.get(axis, axis)
    if is_call(node, *_RESHAPES):
        return _kept_axis(input_of(node).meta["val"].shape, node.meta["val"].shape, axis)
    return None


def _kept_axis(before: Any, after: Any, axis: int) -> int | None:
    """The axis of ``before`` with the extent and the stride, counted in elements, of ``axis`` of ``after``."""
    inner = after[axis + 1 :]
    for candidate in reversed(range(len(before))):
        rest = before[candidate + 1 :]
        if same_sizes([before[candidate], math.prod(rest)], [after[axis], math.prod(inner)]):
            return candidate
    return None
