"""Which axes of dY each of the two backward products of a site contracts. Changes nothing.

``y = f(x, w)``: dX contracts the axes of dY that w brings along, dW those that x brings along; axes that both have
count batches. A scale of dY that is to be constant over a row has its row along them.
"""

from __future__ import annotations

from collections.abc import Callable

from qcompile import compat
from qcompile.ir.operand import Operand

from .graph import argument_of
from .origins import written_by
from .record import Site
from .spellings import einsum_letters

__all__ = [
    "ROLE_OF_OPERAND",
    "axes_of_operand",
    "axes_of_result",
    "role_of_slot",
    "why_gradient_stays_wide",
    "why_not_read_again",
]

#: Which gradient a backward product computes, by the operand of the site that it reads.
ROLE_OF_OPERAND = {"weight": "dgrad", "activation": "wgrad", "": "backward"}

#: Axes of a result (not negative): of the left operand alone, and of the right one alone.
Axes = tuple[tuple[int, ...], tuple[int, ...]]


def role_of_slot(site: Site, position: int) -> str:
    """Which gradient the operand at ``position`` gets: dgrad where the other one is the weight, else wgrad. So a
    product of two activations has two wgrads.
    """
    return ROLE_OF_OPERAND[site.slots[1 - position].kind]


def axes_of_result(site: Site) -> Axes | None:
    """``None`` for an op whose gradients are no products of dY along some of its axes (convolutions)."""
    if site.op not in _AXES:
        return None
    operands = (slot.of(site.node) for slot in site.slots)
    return _AXES[site.op](site, *(node.meta["example_value"].dim() for node in (*operands, site.node)))


def axes_of_operand(site: Site, position: int) -> Axes | None:
    """Of the operand at ``position``: the axis that the forward contracts, and the axes that the gradient of the other
    operand does, in the order in which they are axes of dY. ``None`` for an op of which that is not known.
    """
    along = axes_of_result(site)
    slot = site.slots[position]
    rank, result = (node.meta["example_value"].dim() for node in (slot.of(site.node), site.node))
    other = site.slots[1 - position].of(site.node).meta["example_value"].dim()
    if along is None or slot.frame or site.op not in _PLAIN or min(rank, other) < 2:
        return None
    forward = slot.axis % rank
    if site.op in _OUTER:
        return (forward,), tuple(axis for axis in range(rank) if axis != forward)
    missing = result - rank
    return (forward,), tuple(axis - missing for axis in along[position])


def why_not_read_again(site: Site, role: str) -> str:
    """Why the product of a role cannot read an operand quantized for it alone; "" if it can."""
    for position, slot in enumerate(site.slots):
        if role_of_slot(site, 1 - position) == role:
            if slot.stored:
                return f"the {slot.kind} is stored as codes"
            axes = axes_of_operand(site, position)
            if axes is None:
                return f"what {site.op} contracts there is not known"
            shape = slot.of(site.node).meta["example_value"].shape
            if any(compat.decided_by_data(shape[axis]) for axis in axes[1]):
                return "how many rows there are depends on data"
    return ""


def why_gradient_stays_wide(site: Site, operand: Operand) -> str:
    """Why the backward products of a site cannot read dY quantized to ``operand``; "" if they can."""
    if any(written_by(site.node)):
        return "the product is written in place"
    if operand.quantizer.granularity.kind != "tensor" and axes_of_result(site) is None:
        return f"{site.op} has no rows of dY to scale; one scale per tensor fits, as in 'fp8'"
    return ""


def _outer(site: Site, left: int, right: int, result: int) -> Axes:
    """What the left operand keeps, then what the right one keeps."""
    return tuple(range(left - 1)), tuple(range(left - 1, result))


def _matmul(site: Site, left: int, right: int, result: int) -> Axes:
    """Batches are aligned from the right; those that one operand lacks come from the other."""
    rows, columns = int(left > 1), int(right > 1)
    batches = result - rows - columns
    only_left, only_right = (range(batches - max(other - 2, 0)) for other in (right, left))
    return (*only_left, *range(batches, batches + rows)), (*only_right, *range(batches + rows, result))


def _last_two(site: Site, left: int, right: int, result: int) -> Axes:
    return (result - 2,), (result - 1,)


def _einsum(site: Site, left: int, right: int, result: int) -> Axes:
    terms, output = einsum_letters(str(argument_of(site.node, 0, "equation")))
    terms = [term.replace("...", "*") for term in terms]
    head, _, tail = output.partition("...")
    letters = [*head, *"*" * (result - len(head) - len(tail)), *tail]

    def only(term: str, other: str) -> tuple[int, ...]:
        return tuple(axis for axis, letter in enumerate(letters) if letter in term and letter not in other)

    return only(*terms), only(*reversed(terms))


#: Products of all rows with all columns, and those of which every axis of an operand is one axis of the result.
_OUTER = ("linear", "mm", "addmm", "inner")
_PLAIN = (*_OUTER, "matmul", "bmm", "baddbmm")

_AXES: dict[str, Callable[[Site, int, int, int], Axes]] = {
    **dict.fromkeys((*_OUTER, "mv", "addmv", "tensordot"), _outer),
    **dict.fromkeys(("bmm", "baddbmm", "addbmm", "grouped_mm"), _last_two),
    "matmul": _matmul,
    "einsum": _einsum,
}
