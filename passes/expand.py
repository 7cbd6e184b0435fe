"""Open calls that Dynamo captures whole although they are made of products: ``F.multi_head_attention_forward`` and the
recurrent cells.

Such a call is one node, whose projections no other pass could see. It is traced at the level of ATen's own composite
ops (``linear``, ``scaled_dot_product_attention``), which is what AOTAutograd would make of it in any case, and its node
is replaced by theirs. Nothing is computed differently; autograd and autocast act on the new nodes as on the old one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile import compat

from .graph import graph_modules, item_of, results_of
from .spellings import name_of

__all__ = ["COMPOSITES", "expand"]

aten = torch.ops.aten

#: ATen ops that a trace would leave whole, too. Each is two linear layers and, on CUDA, a kernel that fuses the rest.
_CELLS = (aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
#: What is opened, by :func:`name_of`.
COMPOSITES = frozenset({"multi_head_attention_forward", *(cell.overloadpacket.__name__ for cell in _CELLS)})

_KEPT_META = ("nn_module_stack", "source_fn_stack", "stack_trace", "custom")


def expand(gm: GraphModule) -> int:
    """Rewrites ``gm`` and its nested bodies in place; returns how many calls were opened."""
    return sum(map(_expand_in, graph_modules(gm)))


def _expand_in(gm: GraphModule) -> int:
    if not any(name_of(node) in COMPOSITES for node in gm.graph.nodes):
        return 0
    count = 0
    state = _State()
    with state.restored:
        for node in list(gm.graph.nodes):
            state.follow(node)
            if name_of(node) in COMPOSITES:
                count += _open(gm, node)
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


class _State:
    """What of torch's state a graph changes on its way, so that a node is traced in the state it runs in."""

    def __init__(self) -> None:
        self.restored = ExitStack()
        self.restored.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        self.autocasts: dict[Any, Any] = {}

    def follow(self, node: Node) -> None:
        if node.target is compat.set_grad_enabled:
            compat.set_grad_enabled(node.args[0])
        elif node.target is compat.enter_autocast:
            self.autocasts[node] = compat.enter_autocast(*node.args, **node.kwargs)
        elif node.target is compat.exit_autocast:
            compat.exit_autocast(self.autocasts.pop(node.args[0]))


def _open(gm: GraphModule, call: Node) -> bool:
    """Whether ``call`` could be replaced by what it is made of."""
    leaves, structure = compat.tree_flatten((call.args, call.kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, Node)]
    function: Any = call.target

    def run(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = compat.tree_unflatten([next(given) if isinstance(x, Node) else x for x in leaves], structure)
        return function(*args, **kwargs)

    examples = [_example(node) for node in inputs]
    mode = compat.fake_mode_of(gm.graph)
    with mode:
        decompositions = {op: op.decompose for op in _CELLS}
        traced = compat.make_fx(run, decompositions, tracing_mode="real", pre_dispatch=True)(*examples)
        if any(node.op == "get_attr" for node in traced.graph.nodes):
            return False  # a constant made on the way
        new = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with gm.graph.inserting_before(call):
            for node in traced.graph.nodes:
                if node.op == "call_function":
                    new[node] = gm.graph.node_copy(node, new.__getitem__)
                    _describe(new[node], call)
    result = torch.fx.node.map_arg(results_of(traced.graph), new.__getitem__)
    _replace(call, result)
    return True


def _describe(node: Node, call: Node) -> None:
    """The example value as Dynamo leaves it (it knows whether a gradient is wanted), and where ``call`` stands."""
    function: Any = node.target
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), _example)
    node.meta = {key: call.meta[key] for key in _KEPT_META if key in call.meta}
    node.meta["example_value"] = function(*args, **kwargs)


def _replace(call: Node, result: Any) -> None:
    """Of a tuple that ``call`` returns Dynamo's graph reads the items."""
    if isinstance(result, Node):
        call.replace_all_uses_with(result)
    else:
        for user in list(call.users):
            _, index = item_of(user)  # type: ignore[misc]
            user.replace_all_uses_with(result[index])
            call.graph.erase_node(user)
    call.graph.erase_node(call)


def _example(node: Node) -> Any:
    return node.meta["example_value"]
