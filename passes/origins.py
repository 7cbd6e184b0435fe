"""What a tensor of a Dynamo graph derives from: the model's inputs, its parameters, or neither.

Whether an operand is a weight follows from this alone, whatever views, casts, elementwise ops, concatenations or
normalizations lie between. No table of views is needed: a call derives from what the tensors it reads derive from. What
a table is needed for is short: arguments of which only the shape is read, and calls that write into one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Flag, auto
from itertools import islice
from typing import Any

import torch
from torch.fx import Node

from qcompile import compat

from .graph import input_of, target_name, value_of

__all__ = ["NOTHING", "Origin", "Origins", "Source", "values_read", "written_by"]

#: Python's in-place operators, by name.
_IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
     "irshift", "setitem"}
)  # fmt: skip

#: Calls that read the values of their first argument and at most the shape, dtype or device of the others.
_FIRST_ARGUMENT_ONLY = frozenset({"view_as", "reshape_as", "expand_as", "type_as", "to"})
#: Calls that pick parts of their first argument.
_SELECTIONS = frozenset({"getitem", "__getitem__", "index", "index_select"})
#: Casts and copies of the same values, whether or not they alias.
_COPIES = frozenset(
    {"to", "_to_copy", "type", "type_as", "float", "double", "half", "bfloat16", "clone", "contiguous", "reshape",
     "reshape_as", "flatten", "ravel", "detach"}
)  # fmt: skip


class Source(Flag):
    """Kinds of origin. A tensor may have several.

    ``CONSTANT``: a buffer, a tensor that a module or the surrounding code keeps, or the result of a factory.
    ``PARAMETER``: a parameter. ``LEAF``: an argument that requires grad and is a leaf, or a view or cast of one:
    functional code hands weights over that way. ``RANDOM``: drawn by the graph. ``INPUT``: any other argument, and
    everything that a product computes from one.
    """

    CONSTANT = auto()
    PARAMETER = auto()
    LEAF = auto()
    RANDOM = auto()
    INPUT = auto()


_NONE = Source(0)
_VARYING = Source.LEAF | Source.RANDOM | Source.INPUT


@dataclass(frozen=True)
class Origin:
    """What one tensor derives from; ``roots`` are its parameters and leaves, as long as no input is among its
    sources.
    """

    sources: Source = _NONE
    roots: frozenset[Node] = frozenset()

    def __or__(self, other: Origin) -> Origin:
        if other is NOTHING or other == self:
            return self
        sources = self.sources | other.sources
        return Origin(sources, frozenset() if Source.INPUT in sources else self.roots | other.roots)

    @property
    def varies(self) -> bool:
        """Whether the model's inputs, or drawn numbers alone, are behind it."""
        fixed = Source.PARAMETER in self.sources and not self.sources & (Source.LEAF | Source.INPUT)
        return bool(self.sources & _VARYING) and not fixed

    @property
    def is_parameter(self) -> bool:
        """Derives from parameters, and constants or noise at most beside them."""
        return Source.PARAMETER in self.sources and not self.varies

    @property
    def is_constant(self) -> bool:
        return self.sources == Source.CONSTANT

    @property
    def is_leaf(self) -> bool:
        """A leaf that requires grad, seen through views and casts alone."""
        return bool(self.roots) and self.sources == Source.LEAF


NOTHING = Origin()
_CONSTANT, _INPUT = Origin(Source.CONSTANT), Origin(Source.INPUT)


class Origins:
    """Origins of one graph's nodes, gathered in program order by :meth:`visit`.

    ``given`` has the origins of placeholders where the graph is the body of a higher-order op.
    """

    def __init__(self, given: dict[Node, Origin] | None = None) -> None:
        self._given = given or {}
        self._origins: dict[Node, Origin] = {}
        self._written: dict[Any, Origin] = {}
        self._parameters: set[Any] = set()

    def of(self, node: Any) -> Origin:
        """The origin of a visited node's tensor, with what has been written into its memory so far."""
        if not isinstance(node, Node) or node not in self._origins:
            return NOTHING
        written = self._written.get(compat.memory_of(value_of(node)), NOTHING) if self._written else NOTHING
        return self._origins[node] | written

    def visit(self, node: Node, is_product: bool = False) -> None:
        """Note what ``node`` derives from. ``is_product``: whether it multiplies matrices."""
        if node.op == "placeholder":
            self._origins[node] = self._given.get(node) or self._placeholder(node)
        elif node.op == "get_attr":
            self._origins[node] = _CONSTANT
        elif node.op in ("call_function", "call_method"):
            self._origins[node] = self._call(node, is_product)

    def _placeholder(self, node: Node) -> Origin:
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            return NOTHING
        leaf = value.requires_grad and value.is_leaf
        if compat.is_parameter(value) or (leaf and not compat.is_argument(node)):
            # A parameter stays one whatever is written into it.
            self._parameters.add(compat.memory_of(value))
            return Origin(Source.PARAMETER, frozenset({node}))
        if leaf:
            return Origin(Source.LEAF, frozenset({node}))
        return _INPUT if compat.is_argument(node) else _CONSTANT

    def _call(self, node: Node, is_product: bool) -> Origin:
        read = [self.of(argument) for argument in _derived_from(node)]
        origin = NOTHING
        for other in read:
            origin = origin | other
        if origin is NOTHING:
            origin = Origin(Source.RANDOM) if _is_random(node) else _CONSTANT
        elif is_product and any(operand.varies for operand in read):
            origin = _INPUT  # an activation, whatever parameters are in it
        elif Source.LEAF in origin.sources and not self._is_same_matrix(node):
            origin = _INPUT
        for target in written_by(node):
            memory = compat.memory_of(value_of(target))
            if memory is not None and memory not in self._parameters:
                self._written[memory] = self._written.get(memory, NOTHING) | origin
        return origin

    def _is_same_matrix(self, node: Node) -> bool:
        """Whether a call returns its first argument's values: a view, a cast or a copy."""
        first = next(iter(_tensors(node)), None)
        if first is None:
            return False
        if target_name(node) in _COPIES or not isinstance(value_of(node), torch.Tensor):
            return True  # of a tuple, each item is looked at where it is taken out
        memory = compat.memory_of(value_of(node))
        source = first if isinstance(value_of(first), torch.Tensor) else input_of(first)
        return memory is not None and memory == compat.memory_of(value_of(source))


def _tensors(node: Node) -> Iterator[Node]:
    """The nodes among a call's arguments that are tensors, or tuples of them."""
    for leaf in compat.tree_leaves((node.args, node.kwargs)):
        if isinstance(leaf, Node) and any(isinstance(v, torch.Tensor) for v in compat.tree_leaves(value_of(leaf))):
            yield leaf


def values_read(node: Node) -> Iterator[Node]:
    """The tensors among a call's arguments, or tuples of them, whose values it reads; of ``zeros_like`` and
    ``new_zeros``, none.
    """
    name = target_name(node)
    if not (name.endswith("_like") or name.startswith("new_")):
        yield from islice(_tensors(node), 1 if name in _FIRST_ARGUMENT_ONLY else None)


def _derived_from(node: Node) -> Iterator[Node]:
    """The arguments that a call's result derives from: those it reads, and of selections what they pick from.

    Whole matrices that are picked from a stack (the experts of a token) are the stack's, whatever picks them; rows that
    are picked from a matrix are not (an embedding).
    """
    tensors = values_read(node)
    if target_name(node) in _SELECTIONS and (first := next(tensors, None)) is not None:
        yield first
        stacked = isinstance(value_of(first), torch.Tensor) and value_of(first).dim() > 2
        tensors = islice(tensors, 0 if stacked else None)
    yield from tensors


def _is_random(node: Node) -> bool:
    return target_name(node).startswith(("rand", "normal", "bernoulli", "multinomial", "poisson"))


def written_by(node: Node) -> Iterator[Node]:
    """The tensors that a call writes into."""
    if node.op not in ("call_function", "call_method"):
        return
    schema = getattr(node.target, "_schema", None)
    written = [node.kwargs.get("out")]
    if schema is not None and schema.is_mutable:
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        written += [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    elif _is_in_place(node):
        written += node.args[:1] or [node.kwargs.get("input")]
    yield from dict.fromkeys(leaf for leaf in compat.tree_leaves(written) if isinstance(leaf, Node))


def _is_in_place(node: Node) -> bool:
    """Whether a call that has no schema changes its first argument, by its name or by its flag."""
    name = target_name(node)
    if (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _IN_PLACE_OPERATORS:
        return True
    if getattr(node.target, "__module__", "") == "torch.nn.functional" and any(flag is True for flag in node.args):
        # F.relu(x, True)
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace") is True  # type: ignore[arg-type]
    return node.kwargs.get("inplace") is True
