"""Values of a Dynamo graph that follow from the graph alone: what depends on no argument, parameter, buffer or draw.

Such a value is computed at compile time, on the CPU, by the graph's own nodes. Only ops that give the same on every
device are run (:data:`EXACT`), so that what is found out about the value holds on the device of the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompile import compat

from .graph import bodies_called, graph_modules, input_of, static_size, value_of
from .origins import values_read, written_by
from .spellings import name_of

__all__ = ["EXACT", "LIMIT", "Constants", "NotConstant"]

#: Bytes that may be alive at a time in an evaluation: a comparison of 32768 × 32768 positions takes a quarter of it.
LIMIT = 4 << 30

#: Where a ``vmap`` begins and ends; they have no results, and what is between them needs all of them.
_NESTING = frozenset({"lazy_load_decompositions", "vmap_increment_nesting", "vmap_decrement_nesting"})

#: Ops whose result is the same on every device, by :func:`name_of` without underscores around it.
EXACT = _NESTING | frozenset(
    """
    arange ones zeros full eye tensor scalar_tensor new_ones new_zeros new_full ones_like zeros_like full_like
    lt le gt ge eq ne less less_equal greater greater_equal not_equal and or xor not invert iand ior ixor
    logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not
    add sub rsub radd mul rmul neg abs iadd isub imul floordiv floor_divide mod remainder minimum maximum clamp
    where masked_fill fill zero tril triu diff
    getitem setitem index index_select select narrow slice cat stack repeat
    unsqueeze squeeze view view_as reshape reshape_as expand expand_as broadcast_to transpose t permute movedim flatten
    unflatten contiguous clone detach alias lift_fresh lift_fresh_copy
    to to_copy type type_as bool int long float double half bfloat16
    add_batch_dim remove_batch_dim
    """.split()  # noqa: SIM905
)
#: Ops that repeat their argument along axes of length 1, as whatever broadcasts would.
_EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to"})
#: As long as no rounding depends on the order of additions.
_EXACT_ON_INTEGERS = frozenset({"cumsum", "sum"})


class NotConstant(Exception):  # noqa: N818  (a reason, not an error)
    """A value that is not known at compile time; the message says why."""


class Constants:
    """The constants of one graph module.

    ``given`` has what the placeholders of a higher-order op's body stand for: nodes of the graph with ``call``, whose
    constants ``caller`` are. In a body that is called more than once (``shared``) they stand for nothing.
    """

    def __init__(
        self,
        module: GraphModule,
        given: dict[Node, Node] | None = None,
        caller: Constants | None = None,
        call: Node | None = None,
        shared: bool = False,
    ) -> None:
        self.module, self.given, self.caller, self.call, self.shared = module, given or {}, caller, call, shared
        self._order = {node: place for place, node in enumerate(module.graph.nodes)}
        self._writers = [(node, targets) for node in self._order if (targets := list(_written_by(node)))]
        self._unused = {node for node in self._order if not node.users}
        self._evaluated: set[Node] = set()
        self._nesting = [node for node in self._order if _name(node) in _NESTING]

    @staticmethod
    def of_all(gm: GraphModule) -> list[Constants]:
        """Those of ``gm`` and of the bodies below it."""
        calls = Counter(body for module in graph_modules(gm) for _, body, _ in _calls(module))
        found = [Constants(gm)]
        for caller in found:  # grows on the way
            for call, body, given in _calls(caller.module):
                if all(constants.module is not body for constants in found):
                    shared = calls[body] > 1
                    found.append(Constants(body, {} if shared else given, caller, call, shared))
        return found

    def source(self, node: Node, before: Node) -> tuple[Constants, Node, Node]:
        """Where a value comes from that ``before`` reads, through expansions and out of bodies that write nothing: the
        graph that computes it, the node there, and what reads it there.
        """
        while name_of(node) in _EXPANSIONS and node.args:
            node = input_of(node)
        if node not in self.given or self._writers:
            return self, node, before
        assert self.caller is not None
        assert self.call is not None
        return self.caller.source(self.given[node], self.call)

    def needed(self, node: Node, before: Node) -> list[Node]:
        """The nodes that make the value that ``node`` has at ``before``, in order; writes into its memory are among
        them.

        Raises :class:`NotConstant` if one is not known at compile time, or if they are too large.
        """
        found: dict[Node, None] = {}
        pending = [node]
        while pending:
            while pending:
                read = pending.pop()
                if read not in found:
                    found[read] = None
                    pending += self._read_by(read)
            pending = [other for other in self._implied(found, before) if other not in found]
        nodes = sorted(found, key=self._order.__getitem__)
        for read in nodes:
            if read not in self.given and not _is_exact(read):
                msg = f"it is computed by {name_of(read) or read.target}, which is not evaluated at compile time"
                raise NotConstant(msg)
        _check_size(nodes, node)
        return nodes

    def _read_by(self, node: Node) -> list[Node]:
        """The arguments whose values a node reads."""
        if node.op == "placeholder" and node in self.given:
            return []
        if node.op in ("placeholder", "get_attr"):
            raise NotConstant("its graph is called more than once" if self.shared else _what_varies(node))
        read = set(values_read(node))
        return [other for other in node.all_input_nodes if other in read or not isinstance(value_of(other), Tensor)]

    def _implied(self, found: dict[Node, None], before: Node) -> Iterator[Node]:
        """What changes the values found, besides what they read."""
        memories = {compat.memory_of(value_of(node)) for node in found} - {None}
        for writer, targets in self._writers:
            if self._order[writer] >= self._order[before]:
                break
            if any(target in found or compat.memory_of(value_of(target)) in memories for target in targets):
                yield writer
        if any(_name(node) == "add_batch_dim" for node in found):
            yield from self._nesting

    def evaluate(self, node: Node, needed: list[Node]) -> Tensor:
        """The value of ``node``, a tensor on the CPU, from the nodes that are :meth:`needed` for it."""
        self._evaluated.update(needed)
        last_use = {read: user for user in needed for read in user.all_input_nodes}
        values: dict[Node, Any] = {}
        with compat.no_fake_mode(), torch.no_grad(), torch.device("cpu"):
            for current in needed:
                values[current] = self._run(current, values)
                for read in current.all_input_nodes:
                    if last_use[read] is current and read is not node:
                        values.pop(read, None)
        return values[node]

    def erase_unused(self) -> None:
        """Erase the calls that have lost their last user since this was made, and writes that served them."""
        for node in reversed(self.module.graph.nodes):
            is_left = not node.users and (node not in self._unused or node in self._evaluated)
            is_call = is_left and node.op in ("call_function", "call_method") and _name(node) not in _NESTING
            if is_call and not _is_read_later(node):
                self.module.graph.erase_node(node)

    def _run(self, node: Node, values: dict[Node, Any]) -> Any:
        if node in self.given:
            assert self.caller is not None
            assert self.call is not None
            outer = self.given[node]
            return self.caller.evaluate(outer, self.caller.needed(outer, self.call))
        device = getattr(value_of(node), "device", None)

        def on_cpu(leaf: Any) -> Any:
            is_device = isinstance(leaf, torch.device) or (device is not None and leaf == device.type)
            return torch.device("cpu") if is_device else leaf

        args, kwargs = torch.fx.map_arg(
            (node.args, node.kwargs), lambda read: values[read] if read in values else _stand_in(read)
        )
        args, kwargs = compat.tree_map(on_cpu, (args, kwargs))
        function: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
        return function(*args, **kwargs)


def _calls(module: GraphModule) -> Iterator[tuple[Node, GraphModule, dict[Node, Node]]]:
    """The calls of higher-order ops in a graph: each body, and what its placeholders are given."""
    for node in module.graph.find_nodes(op="get_attr"):
        for call in node.users:
            for attribute, body, given in bodies_called(call):
                if attribute is node:
                    yield call, body, given


def _written_by(node: Node) -> Iterator[Node]:
    """The tensors that a call may write into, those of opaque higher-order ops included."""
    yield from written_by(node)
    if isinstance(node.target, compat.HigherOrderOperator):
        bodies = [inner for _, body, _ in bodies_called(node) for inner in graph_modules(body)]
        if not bodies or any(any(_written_by(inner)) for body in bodies for inner in body.graph.nodes):
            yield from node.all_input_nodes


def _is_read_later(writer: Node) -> bool:
    """Whether something reads memory that a call has written into."""
    memories = {compat.memory_of(value_of(target)) for target in written_by(writer)} - {None}
    node = writer.next
    while memories and node.op != "root":
        if any(compat.memory_of(value_of(read)) in memories for read in node.all_input_nodes):
            return True
        node = node.next
    return False


def _name(node: Node) -> str:
    return name_of(node).strip("_")


def _is_exact(node: Node) -> bool:
    name = _name(node)
    value = value_of(node)
    return name in EXACT or (name in _EXACT_ON_INTEGERS and isinstance(value, Tensor) and not value.is_floating_point())


def _what_varies(node: Node) -> str:
    value = value_of(node)
    name = str(node.target if node.op == "get_attr" else node.name).strip("_").removeprefix("l_")
    if not isinstance(value, Tensor) and node.op == "placeholder":
        return f"a size is symbolic ({name})"
    if compat.is_parameter(value):
        return f"it depends on the parameter {name}"
    if node.op == "placeholder" and compat.is_argument(node):
        return f"it depends on the input {name}"
    return f"it depends on the buffer {name}, which may change"


def _check_size(nodes: list[Node], result: Node) -> None:
    """Raises :class:`NotConstant` if the values of ``nodes`` that are alive at a time take more than :data:`LIMIT`."""
    memories = {node: _memory(node) for node in nodes}
    last_use = {memories[node]: place for place, user in enumerate(nodes) for node in _in(memories, user)}
    last_use[memories[result]] = len(nodes)
    live: dict[Any, int] = {}
    for place, node in enumerate(nodes):
        live.setdefault(memories[node], _bytes(node, result))
        if sum(live.values()) > LIMIT:
            size = sum(live.values()) / 2**30
            msg = f"its evaluation takes {size:.1f} GiB, more than {LIMIT / 2**30:.0f} GiB"
            raise NotConstant(msg)
        live = {memory: size for memory, size in live.items() if last_use[memory] > place}


def _in(memories: dict[Node, Any], user: Node) -> list[Node]:
    """A node and what it reads, as far as it is evaluated."""
    return [node for node in (user, *user.all_input_nodes) if node in memories]


def _memory(node: Node) -> Any:
    """What tells the memory of a value from others; views share theirs."""
    return compat.memory_of(value_of(node)) or node


def _bytes(node: Node, result: Node) -> int:
    """Size of a value's memory. One under vmap does not show its mapped axes; it is part of the result."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return 0
    if compat.memory_of(value) is None:
        value = value_of(result)
    size = static_size(value.untyped_storage().nbytes())
    if size is None:
        msg = "a size is symbolic"
        raise NotConstant(msg)
    return size


def _stand_in(node: Node) -> Tensor:
    """Something with the shape and dtype of a value that is not read (``x.new_ones(…)``)."""
    value = value_of(node)
    shape = [size for size in map(static_size, value.shape) if size is not None]
    if len(shape) < value.dim():
        msg = "a size is symbolic"
        raise NotConstant(msg)
    return torch.empty((), dtype=value.dtype).expand(shape)
