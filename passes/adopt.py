"""Dynamo graph: read the 4-bit layers of bitsandbytes as linear layers whose weights are stored as codes.

::

    gemm_4bit(x, B, shape, absmax, …)      ─►    linear(x, dequantize(B with its halves swapped, absmax), bias)

The op is one node where x needs no gradient, and the forward of an ``autograd.Function`` elsewhere, whose backward
decodes the weight for an ATen product. Both become the same call, so that a backend's later passes see products of
codes in both directions. Bytes stay where bitsandbytes has them. Its first code is in the high half of a byte: what
swaps the two is elementwise, and the backward does it again.

What cannot be read is left as it is, and `find_gemms` says that it is an opaque op. So is a layer that computes in
another dtype than autocast would: bitsandbytes' op does not follow autocast, and a linear layer does.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from qcompile import compat
from qcompile.ir.formats import FORMATS
from qcompile.ir.nested import BITSANDBYTES, BITSANDBYTES_FORMATS
from qcompile.ir.quantizer import Quantizer

from .graph import argument_of, bodies_called, item_of, results_of, value_of
from .record import KIND_KEY, marked
from .spellings import name_of
from .views import Dequantize

__all__ = ["adopt"]

GEMM = "bitsandbytes::gemm_4bit"
#: Arguments of the op, in order.
ARGUMENTS = (
    "A", "B", "shapeB", "absmax", "blocksize", "quant_type", "bias", "absmax_8bit", "absmax_code", "absmax_offset",
)  # fmt: skip

_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "custom")


class _Around(NamedTuple):
    """What is around a graph: the nodes that placeholders of a body stand for, in the graphs that call it, and the
    regions of autocast (device type, dtype, whether it is on), outermost first.
    """

    arguments: dict[Node, Node]
    autocasts: tuple[tuple[str, torch.dtype, bool], ...]


def adopt(gm: GraphModule, around: _Around = _Around({}, ())) -> int:  # noqa: B008  (never changed)
    """Rewrites ``gm`` and the bodies of its higher-order ops in place; returns how many layers were read."""
    if "bitsandbytes" not in sys.modules:
        return 0
    count = 0
    entered: dict[Node, tuple[str, torch.dtype, bool]] = {}
    for node in list(gm.graph.nodes):
        if node.target is compat.enter_autocast:
            entered[node] = node.args[:3]
        elif node.target is compat.exit_autocast:
            entered.pop(node.args[0], None)
        autocasts = (*around.autocasts, *entered.values())
        function = "autograd_function_apply" in str(node.target)
        if name_of(node) == GEMM or function:
            count += _adopt(gm.graph, node, _Around(around.arguments, autocasts))
        if not function:
            for _, body, arguments in bodies_called(node):
                count += adopt(body, _Around({**around.arguments, **arguments}, autocasts))
    if count:
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
        gm.graph.lint()
        gm.recompile()
    return count


def _adopt(graph: Graph, node: Node, around: _Around) -> bool:
    """Whether a call of the op, or of a function that is nothing else, could be read."""
    given: dict[str, Any] | None
    if name_of(node) == GEMM:
        given, results = _arguments(node), [node]
    else:
        given, results = _arguments_of_function(node), _results_of_function(node)
    if given is None or not results or not _is_understood(given, around):
        return False
    with graph.inserting_before(node):
        linear = _linear(graph, node, given)
    linear.meta["example_value"] = value_of(results[0])
    for result in results:
        result.replace_all_uses_with(linear)
    for unused in dict.fromkeys((*node.users, node)):
        graph.erase_node(unused)
    return True


def _arguments(node: Node) -> dict[str, Any]:
    return {name: argument_of(node, position, name) for position, name in enumerate(ARGUMENTS)}


def _arguments_of_function(call: Node) -> dict[str, Any] | None:
    """The op's arguments, as the caller of a function knows them that returns what the op does; else ``None``."""
    _, forward, outside = next(bodies_called(call), (None, None, {}))
    if forward is None:
        return None
    calls: list[Node] = [node for node in forward.graph.nodes if name_of(node) == GEMM]
    first = next(iter(compat.tree_leaves(results_of(forward.graph))), None)
    if len(calls) != 1 or first is not calls[0]:
        return None
    inside = _arguments(calls[0])
    inside["B"] = _viewed(inside["B"])
    if any(isinstance(value, Node) and value not in outside for value in inside.values()):
        return None
    return {name: outside[value] if isinstance(value, Node) else value for name, value in inside.items()}


def _viewed(node: Any) -> Any:
    """The tensor behind a chain of ``view``."""
    while isinstance(node, Node) and node.op == "call_method" and node.target == "view":
        node = node.args[0]
    return node


def _results_of_function(call: Node) -> list[Node]:
    """The nodes that take the first result out of the tuple; none if another one is read. Torch 2.11 takes out all that
    a region under a checkpoint returns.
    """
    items = {user: item_of(user) for user in call.users}
    first = [user for user, item in items.items() if item is not None and item[1] == 0]
    return first if all(user in first or not user.users for user in items) else []


def _is_understood(given: dict[str, Any], around: _Around) -> bool:
    """Whether blocks lie within rows, scales of scales are those that :mod:`qcompile.ir.nested` knows, and a linear
    layer computes in the same dtype.
    """
    rows, size = given["shapeB"]
    codes = value_of(given["B"])
    if _autocast_dtype(codes.device.type, around) not in (None, value_of(given["A"]).dtype):
        return False
    plain = codes.dtype == torch.uint8 and codes.numel() * 2 == rows * size and size % given["blocksize"] == 0
    if given["absmax_8bit"] is None:
        return plain
    source = given["absmax_code"]
    while source in around.arguments:
        source = around.arguments[source]
    levels = compat.placeholder_value(source)
    if type(levels) is not torch.Tensor or levels.is_meta:  # nothing to compare
        return False
    known = torch.tensor(FORMATS["dynamic8"].codebook)
    return plain and levels.shape == known.shape and torch.equal(levels.cpu(), known)


def _autocast_dtype(device: str, around: _Around) -> torch.dtype | None:
    """What autocast makes of the operands of a linear layer, ``None`` where it is off."""
    for kind, dtype, enabled in reversed(around.autocasts):
        if kind == device:
            return dtype if enabled else None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _linear(graph: Graph, near: Node, given: dict[str, Any]) -> Node:
    def emit(target: Any, *args: Any) -> Node:
        node = graph.call_function(target, args)
        node.meta = {key: near.meta[key] for key in _KEPT_META if key in near.meta}
        with compat.fake_mode_of(graph), torch.no_grad():
            node.meta["example_value"] = target(*map(value_of, args))
        return marked(node, **{KIND_KEY: "weight"})

    rows, size = given["shapeB"]
    block = given["blocksize"]
    stored = emit(torch.reshape, given["B"], (rows, size // 2))
    halves = emit(torch.bitwise_left_shift, stored, 4), emit(torch.bitwise_right_shift, stored, 4)
    codes = emit(torch.bitwise_or, *halves)
    scales = given["absmax"]
    if given["absmax_8bit"] is not None:
        of_scales = Dequantize(
            given["absmax_8bit"], scales, BITSANDBYTES.quantizer, -1, rows * size // block, torch.float32
        )
        scales = emit(torch.add, emit(of_scales.op, *of_scales.arguments()), given["absmax_offset"])
    scales = emit(torch.reshape, scales, (rows, size // block))
    quantizer = Quantizer.parse(f"{BITSANDBYTES_FORMATS[given['quant_type']]} block{block} absmax_bnb")
    decode = Dequantize(codes, scales, quantizer, -1, size, value_of(given["A"]).dtype)
    weight = emit(decode.op, *decode.arguments())
    linear = graph.call_function(torch.nn.functional.linear, (given["A"], weight, given["bias"]))
    linear.meta = {key: near.meta[key] for key in _KEPT_META if key in near.meta}
    return linear
