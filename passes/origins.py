"""Where an operand comes from."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from qcompile import compat

from .graph import value_of
from .spellings import is_in

__all__ = ["IN_PLACE_OPERATORS", "is_functional_weight", "is_weight", "origin"]

#: Python's in-place operators, by name.
IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
     "irshift", "setitem"}
)  # fmt: skip

#: Ops that keep an operand the same matrix up to layout and precision, or take rows or columns of it.
_TRANSPARENT_METHODS = frozenset(
    {
        "t", "transpose", "permute", "view", "reshape", "contiguous", "flatten", "unflatten", "expand", "squeeze",
        "unsqueeze", "to", "type", "float", "half", "bfloat16", "detach", "clone", "movedim", "swapaxes", "view_as",
        "type_as", "__getitem__", "chunk", "split", "narrow", "select", "unbind", "diagonal",
    }
)  # fmt: skip
_TRANSPARENT_FUNCTIONS = frozenset(
    {
        torch.t, torch.transpose,
        torch.permute, torch.reshape, torch.flatten, torch.unflatten,
        torch.squeeze, torch.unsqueeze, torch.movedim, torch.swapaxes, torch.clone, torch.detach, operator.getitem,
        torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind, torch.diagonal,
        torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.view.default,
        torch.ops.aten.split_with_sizes.default, torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default,
    }
)  # fmt: skip


#: Those that may make memory of its own.
_COPIES = frozenset({"reshape", "contiguous", "flatten", "to", "type", "float", "half", "bfloat16", "clone", "type_as"})


def origin(node: Any, reader: Node) -> Any:
    """The node an operand of ``reader`` comes from through views, casts and attributes like ``.T``.

    A copy that something is written into before it is read holds data of its own, and a buffer then holds no weight
    (a cache of keys); a parameter stays one whatever is written into it.
    """
    written = False
    while isinstance(node, Node):
        written = written or _is_written(node, reader)
        if not node.args or not (_writes_first_argument(node) or _is_transparent(node)):
            break
        if written and _target_name(node) in _COPIES:
            break
        node = node.args[0]
    return None if written and not compat.is_parameter(value_of(node)) else node


def _is_transparent(node: Node) -> bool:
    attribute = node.target is getattr and node.args[1] in ("T", "mT", "H", "mH", "data")
    method = node.op == "call_method" and node.target in _TRANSPARENT_METHODS
    return attribute or method or (node.op == "call_function" and is_in(_TRANSPARENT_FUNCTIONS, node.target))


def _target_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def _writes_first_argument(node: Node) -> bool:
    """Whether a call changes its first argument in place (and returns it, if anything)."""
    name = _target_name(node)
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return (name.endswith("_") and not name.endswith("__")) or name.strip("_") in IN_PLACE_OPERATORS


def _is_written(node: Node, before: Node) -> bool:
    """Whether anything is written into ``node``, or into a view of it, before ``before`` reads it."""
    for user in node.users:
        if user < before and user.args and user.args[0] is node:
            if _writes_first_argument(user) or user.kwargs.get("inplace"):
                return True
            if _is_transparent(user) and _target_name(user) != "clone" and _is_written(user, before):
                return True
    return False


def is_weight(node: Any) -> bool:
    """A parameter or a buffer."""
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return False
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    return static or compat.is_parameter(value_of(node))


def is_functional_weight(node: Any, op: str) -> bool:
    """A leaf input that requires grad and stands where a weight does: functional code passes weights that way.

    Of products that attention uses as well only matrices count: there, leaves of higher rank are queries, keys and
    values.
    """
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return False
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or not (value.requires_grad and value.is_leaf):
        return False
    return value.dim() == 2 or (value.dim() > 2 and op.startswith(("conv", "grouped")))
