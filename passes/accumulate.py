"""Post-grad graphs: a sum of products accumulates in the products.

A LoRA layer adds a low-rank product to that of its base layer, and a gradient that comes from q, k and v is a sum of
six products. Each is written, and what follows reads them all to add them up; a sum that is kept for the backward is
written once more. cuBLAS adds a matrix to a product while it has it in registers::

    x · Wᵀ + l · Bᵀ                             ─►   mm_add(l · Bᵀ, x, Wᵀ)
    dQ · Wq + dlq · Aq + dK · Wk + dlk · Ak     ─►   mm_add(mm_add([dlq | dlk] · [Aq; Ak], dQ, Wq), dK, Wk)

The low-rank product comes first: it takes as long as writing it does, while a long contraction waits for tensor cores
and not for what it reads beside (:func:`~qcompile.kernels.matmul.costs.hides_summand`). Low-rank products of one sum
become one. A product on 8-bit codes, or with a weight that it decodes itself, can only come first. Low-rank ones add to
it where the sum is written anyway (gate and up, which the backward reads), so that it is written once; elsewhere that
would move as many bytes as the kernel that reads both, to which they are left.

``mm_add`` writes over its summand (kernels/matmul/inductor.py); torch's ``addmm`` would copy it first. Partial sums are
rounded as in eager torch; products that are added are not rounded by themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from qcompile import compat
from qcompile.kernels.matmul.costs import Rates, hides_summand, rates_of

from .dialect import GEMMS
from .graph import aten, emit, input_of, is_call, is_view, same_size, same_sizes, static_size, take_over, target_name
from .pass_base import Context
from .views import Mm8Bit, MmAdd, MmStored

__all__ = ["accumulate"]

#: Products that add nothing themselves.
_FIRST_ONLY = (Mm8Bit.op, MmStored.op)
#: Views that keep the order of elements.
_RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


@dataclass
class _Terms:
    """The terms of a sum.

    Attributes:
        rest: what stays a term. first_only: products that others may add to, and the terms that they are.
        low, high: ``mm``, by what they wait for: for memory, or for tensor cores. bias: of one of them.
        shape: what products are viewed as, as arguments of a view; ``None`` for matrices.
    """

    rest: list[Node] = field(default_factory=list)
    first_only: list[tuple[Node, Node]] = field(default_factory=list)
    low: list[Node] = field(default_factory=list)
    high: list[Node] = field(default_factory=list)
    bias: Node | None = None
    shape: Any = None


def accumulate(graph: Graph, context: Context) -> int:
    """Returns how many sums are summed in products."""
    return sum(_accumulate(graph, node) for node in graph.find_nodes(op="call_function", target=aten.add.Tensor))


def _accumulate(graph: Graph, root: Node) -> bool:
    value = root.meta["val"]
    if value.dim() < 2 or not _is_sum(root) or _is_term(root) or compat.tensor_core_capability(value.device) is None:
        return False
    rates, _ = rates_of(compat.card_name(value.device))
    terms = _sorted(root, rates)
    merged = len(terms.low) > 1 and _pays_to_merge(terms.low, rates)
    chained = bool(terms.high) and len(terms.high) + len(terms.low) > 1
    useful = chained or merged or _adds_to_first(terms, root)
    if not useful or not value.is_contiguous():
        return False
    with graph.inserting_before(root):
        total = _summed(graph, terms, merged, root)
        _replace(graph, root, terms, total)
    return True


def _is_sum(node: Node) -> bool:
    """``a + b`` of two tensors of one shape and dtype."""
    if not is_call(node, aten.add.Tensor) or node.kwargs or not all(isinstance(term, Node) for term in node.args):
        return False
    value, terms = node.meta["val"], [term.meta["val"] for term in node.all_input_nodes]
    return len(terms) == 2 and all(t.dtype == value.dtype and same_sizes(t.shape, value.shape) for t in terms)


def _is_term(node: Node) -> bool:
    """Whether a sum is a term of a larger one, and read by nothing else."""
    return len(node.users) == 1 and _is_sum(next(iter(node.users)))


def _sorted(root: Node, rates: Rates) -> _Terms:
    terms, pending = _Terms(), list(reversed(root.all_input_nodes))
    while pending:
        term = pending.pop()
        if _is_sum(term) and len(term.users) == 1:
            pending += reversed(term.all_input_nodes)
            continue
        product = _product(term, root)
        if product is None:
            terms.rest.append(term)
            continue
        terms.shape = term.args[1] if is_call(term, *_RESHAPES) else None
        if is_call(product, *_FIRST_ONLY):
            terms.first_only.append((product, term))
        elif not is_call(product, aten.addmm.default):
            _by_length(product, terms, rates).append(product)
        elif terms.bias is None:
            terms.bias = product.args[0]  # type: ignore[assignment]
            _by_length(product, terms, rates).append(product)
        else:
            terms.rest.append(term)
    return terms


def _product(term: Node, root: Node) -> Node | None:
    """The product of matrices that a term is a view of, if nothing else reads it."""
    node, columns = term, root.meta["val"].shape[-1]
    while is_call(node, *_RESHAPES) and len(node.users) == 1 and same_size(node.meta["val"].shape[-1], columns):
        node = input_of(node)
    if len(node.users) != 1 or not is_call(node, aten.mm.default, aten.addmm.default, *_FIRST_ONLY):
        return None
    value, wanted = node.meta["val"], root.meta["val"]
    if value.dtype != wanted.dtype or not same_size(value.shape[-1], columns):
        return None
    if is_call(node, aten.addmm.default) and (node.kwargs or node.args[0].meta["val"].dim() != 1):  # type: ignore[union-attr]
        return None
    if is_call(node, aten.mm.default, aten.addmm.default) and _length(node) is None:
        return None
    return node


def _factors(product: Node) -> list[Node]:
    return [product.args[position] for position in GEMMS[product.target]]  # type: ignore[misc]


def _length(product: Node) -> int | None:
    """Of the contraction; ``None`` if it is known at run time only."""
    return static_size(_factors(product)[0].meta["val"].shape[1])


def _by_length(product: Node, terms: _Terms, rates: Rates) -> list[Node]:
    length = _length(product)
    assert length is not None
    return terms.high if hides_summand(length, product.meta["val"].dtype, rates) else terms.low


def _pays_to_merge(products: list[Node], rates: Rates) -> bool:
    """Whether writing and reading all products but one takes longer than to join their operands, two small kernels."""
    value = products[0].meta["val"]
    m, n = map(static_size, value.shape)
    if m is None or n is None:
        return False
    return rates.passes(2 * value.dtype.itemsize * m * n * (len(products) - 1), 0) > rates.passes(0, 2)


def _adds_to_first(terms: _Terms, root: Node) -> bool:
    """Whether low-rank products add to a product that can only come first. A bias of theirs would be one more term."""
    products_only = len(terms.first_only) == 1 and not (terms.high or terms.rest) and terms.bias is None
    return products_only and bool(terms.low) and _is_written(root)


def _is_written(node: Node) -> bool:
    """Whether a result reaches memory whatever is generated around it: something reads it that Inductor does not
    generate, or the graph returns it.
    """
    return any(
        user.op == "output"
        or is_call(user, *GEMMS)
        or (user.op == "call_function" and "attention" in target_name(user))
        or (is_view(user) and _is_written(user))
        for user in node.users
    )


def _summed(graph: Graph, terms: _Terms, merged: bool, root: Node) -> Node:
    """The sum of all terms that are products, a matrix; what can only come first stays in ``terms.rest`` if it does
    not.
    """
    added = [(product, _factors(product)) for product in terms.high]
    low = [(product, _factors(product)) for product in terms.low]
    if merged:
        lefts, rights = zip(*(factors for _, factors in low), strict=True)
        serves = terms.low[0]
        low = [
            (serves, [emit(graph, serves, aten.cat.default, list(of), axis) for of, axis in ((lefts, 1), (rights, 0))])
        ]
    if _adds_to_first(terms, root):
        total, added = terms.first_only[0][0], low
    else:
        terms.rest += [term for _, term in terms.first_only]
        (serves, (a, b)), *added = [*low, *added]
        if terms.bias is None:
            total = emit(graph, serves, aten.mm.default, a, b)
        else:
            total = emit(graph, serves, aten.addmm.default, terms.bias, a, b)
    for serves, (a, b) in added:
        total = MmAdd(total, a, b).emit(graph, near=serves)
    return total


def _replace(graph: Graph, root: Node, terms: _Terms, total: Node) -> None:
    """Put ``total`` and what else there is in place of a sum."""
    value = root.meta["val"]
    if not terms.rest:
        # Views of the sum look at its memory, which is that of the matrix now.
        with value.fake_mode:
            total.meta["val"] = value.view(total.meta["val"].shape)
    new = total if terms.shape is None else emit(graph, root, aten.view.default, total, terms.shape)
    if not terms.rest:
        new.meta["val"] = value
    for term in terms.rest:
        new = emit(graph, root, aten.add.Tensor, term, new)
    if terms.rest:
        take_over(new, root)
    root.replace_all_uses_with(new)
