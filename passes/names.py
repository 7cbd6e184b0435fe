"""What the layer of a product is called: exactly what ``named_modules()`` of the compiled model says.

A backend sees one graph of a call, after graph breaks with paths like ``L['___stack0']``. So nothing is read from such
text. Dynamo leaves the ``id`` of every live module in a node's ``nn_module_stack`` and the real tensor at every
placeholder, and the compiled model is on the Python stack (:func:`qcompile.compat.compiled_call`): layers and
parameters are known by identity.

==================== ===========================================================================================
what was compiled    names are
==================== ===========================================================================================
a module             those of its ``named_modules()``; also for ``model.compile()`` and ``torch.compile(m.forward)``
a function           those of the modules in its closure, globals, arguments, or in objects there, each relative to
                     itself; where two would agree, with the variable in front (``student.head``). A module that is
                     a layer itself, and a tensor, is called by its variable.
anything else        modules that no ``named_modules()`` lists (in a plain list, say) are called by the attributes that
                     lead to them
==================== ===========================================================================================

A module or tensor that is reached under several names has them all; the first is reported. Without a compiled call (a
backend called by hand) nothing has a name. Names decide nothing else but which rules match.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from qcompile import compat
from qcompile.ir.rules import Block, block_of, blocks_in

from .graph import attribute_of, bodies_called, graph_modules
from .reachable import argument_names, attributes_of, join, reachable

__all__ = ["Name", "Names", "given_parameters", "with_parameter"]

#: Names kept of one module. Shared modules in shared modules have exponentially many.
_MAX_NAMES = 64


@dataclass(frozen=True)
class Name:
    """All names of a product's layer, the reported one first; none for code that belongs to no layer.

    ``missing`` says what layer the product belongs to if that could not be found in what was compiled.
    """

    names: tuple[str, ...] = ()
    missing: str = ""


class Names:
    """Layers and parameters of the graphs of one compiled call.

    Args:
        gm: the Dynamo graph whose nodes are asked for; placeholders in bodies of higher-order ops are followed to it.
        call: the call being served, or ``None``.
    """

    def __init__(self, gm: GraphModule, call: compat.CompiledCall | None) -> None:
        self._modules: dict[int, list[str]] = defaultdict(list)
        self._tensors: dict[int, list[str]] = defaultdict(list)
        self._variables: dict[int, str] = {}
        self._owners: dict[int, nn.Module] = {}
        self._known: list[nn.Module] = []
        self._blocks: dict[str, Block] = {}
        self._outer = _outer_arguments(gm)
        self._call = call
        self._searched = call is None
        if call is not None:
            self._add_roots(call)

    def of(self, node: Node, weight: Any = None) -> Name:
        """The names of the product ``node`` with the placeholder ``weight`` behind it (if it has a weight)."""
        layers, missing = self._layers(node)
        tensors = self._tensors_behind(weight)
        parameters = [self._lookup(self._tensors, id(tensor)) for tensor in tensors]
        names = [name for known in parameters[:1] or [[]] for name in _combine(layers or [""], known)]
        for known in parameters[1:]:  # further callers of a body that serves several layers
            names += _combine([layer for layer in layers if layer and _under(layer, known)] or [""], known)
        names = [name or self._variable(node, tensors) for name in names]
        if any(names):
            return Name(tuple(dict.fromkeys(filter(None, names))))
        if not missing and not any(parameters) and tensors and compat.is_parameter(tensors[0]):
            missing = f"parameter of shape {'×'.join(map(str, tensors[0].shape))}"
        return Name((), missing)

    def of_module(self, module: nn.Module) -> list[str]:
        """All names of a module, the reported one first; none for one that is not known."""
        return self._modules.get(id(module), [])

    def block(self, name: str) -> Block | None:
        """Which entry of the outermost list of modules (of more than one) the layer of this name is in."""
        return block_of(name, self._blocks)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that has a name."""
        return tuple(self._known)

    def peers(self, module: nn.Module) -> list[nn.Module]:
        """Other modules of the same class."""
        return [m for m in self._known if type(m) is type(module) and m is not module]

    def owner(self, placeholder: Node) -> tuple[nn.Module | None, Any]:
        """The module through which the compiled frame comes to a parameter, and Dynamo's source of it: a local variable
        of the frame, or else the module that holds the parameter, with the source of the parameter.
        """
        variable, source = compat.local_variable(placeholder)
        value = self._call.variables.get(variable) if self._call is not None else None
        if isinstance(value, nn.Module) and id(value) in self._modules:
            return value, source
        return self._owners.get(id(_real_tensor(placeholder))), compat.source_of(placeholder)

    def _layers(self, node: Node) -> tuple[list[str], str]:
        if innermost := self._innermost(node):
            key, kind = innermost
            names = self._lookup(self._modules, key)
            return names, "" if names else kind
        enclosing = self._call.enclosing if self._call is not None else ()
        return next((self._modules[id(m)] for m in enclosing if id(m) in self._modules), []), ""

    def _innermost(self, node: Node) -> tuple[int, str] | None:
        """Identity and class of the innermost module in Dynamo's stack."""
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return None
        key, (_, kind) = list(stack.items())[-1]
        identity = str(key).split("@")[0]  # a module that is called again has "@1" behind its id
        return int(identity) if identity.isdecimal() else 0, getattr(kind, "__name__", str(kind).rpartition(".")[2])

    def _variable(self, node: Node, tensors: list[Tensor]) -> str:
        """What a function calls the module (or the owner of the tensor) whose own name is ""."""
        innermost = self._innermost(node)
        keys = [innermost[0]] if innermost else [id(tensor) for tensor in tensors]
        return next((self._variables[key] for key in keys if key in self._variables), "")

    def _tensors_behind(self, weight: Any) -> list[Tensor]:
        """The real tensors that a placeholder stands for: one, or one per caller of the body it belongs to."""
        return [tensor for source in self._sources(weight) if (tensor := _real_tensor(source)) is not None]

    def _sources(self, weight: Any) -> Iterator[Node]:
        """The placeholders of the outermost graph that a node stands for."""
        if not isinstance(weight, Node):
            return
        if weight not in self._outer:
            yield weight
        for argument in self._outer.get(weight, ()):
            yield from self._sources(argument)

    def _lookup(self, table: dict[int, list[str]], key: int) -> list[str]:
        if key not in table and not self._searched:
            self._search_attributes()
        return table.get(key, [])

    def _add_roots(self, call: compat.CompiledCall) -> None:
        target = call.target
        if isinstance(target, nn.Module):
            self._add("", target)
            return
        found = list(reachable([("", target), *_arguments(call)]))
        modules = {id(m): (label, m) for label, m in reversed(found) if isinstance(m, nn.Module)}
        inner = {id(child) for _, root in modules.values() for child in root.modules() if child is not root}
        roots = [root for key, root in reversed(modules.items()) if key not in inner]
        counts: dict[str, int] = defaultdict(int)
        for _, root in roots:
            for name in {name for name, _ in root.named_modules()} - {""}:
                counts[name] += 1
        for label, root in roots:
            shared = any(counts[name] > 1 for name, _ in root.named_modules())
            self._add(label if shared else "", root)
            self._variables |= dict.fromkeys([id(root), *map(id, root._parameters.values())], label)
        for label, tensor in found:
            if isinstance(tensor, Tensor) and id(tensor) not in self._tensors:
                self._tensors[id(tensor)].append(label)

    def _add(self, name: str, module: nn.Module, above: tuple[int, ...] = ()) -> None:
        """``module`` and all below it, as ``named_modules(remove_duplicate=False)`` walks, which cycles would keep
        walking.
        """
        names = self._modules[id(module)]
        if name in names or len(names) >= _MAX_NAMES:
            return
        if not names:
            self._known.append(module)
        names.append(name)
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                self._tensors[id(tensor)].append(join(name, key))
                self._owners[id(tensor)] = module
        self._blocks |= blocks_in(module, name)
        for key, child in module._modules.items():
            if child is not None and id(child) not in above:
                self._add(join(name, key), child, (*above, id(module)))

    def _search_attributes(self) -> None:
        """Name what no ``named_modules()`` lists, once: modules and tensors in attributes, and in what the forwards
        refer to.
        """
        self._searched = True
        assert self._call is not None
        position = 0
        starts = list(_arguments(self._call))
        while position < len(self._known) or starts:
            for module in self._known[position:]:
                starts += [(join(self._modules[id(module)][0], key), v) for key, v in attributes_of(module)]
            position = len(self._known)
            for label, value in reachable(starts):
                if isinstance(value, nn.Module):
                    if id(value) not in self._modules:
                        self._add(label, value)
                elif id(value) not in self._tensors:
                    self._tensors[id(value)].append(label)
            starts = []


def with_parameter(layer: str, parameter: str) -> str:
    """Tell apart several products of one module: ``experts`` with parameter ``experts.down_proj`` →
    ``experts.down_proj``, ``attention`` with ``attention.out_proj.weight`` → ``attention.out_proj``.
    """
    prefix = f"{layer}." if layer else ""
    if parameter == f"{prefix}weight":
        return layer
    if parameter.startswith(prefix):
        return parameter.removesuffix(".weight") or layer
    return layer


def _combine(layers: list[str], parameters: list[str]) -> list[str]:
    """Names of a product: those of its layers, and of the parameter under each; a tied parameter has others, too."""
    return [with_parameter(layer, name) for layer in layers for name in _under(layer, parameters) or [""]]


def _under(layer: str, parameters: list[str]) -> list[str]:
    prefix = f"{layer}." if layer else ""
    return [name for name in parameters if name.startswith(prefix)]


def _arguments(call: compat.CompiledCall) -> list[tuple[str, Any]]:
    """Arguments of the call, by the names they have in the function or forward."""
    function = call.target
    if isinstance(function, nn.Module):
        function = type(function).forward
    names = argument_names(function) if isinstance(function, FunctionType) else ()
    names = names[isinstance(call.target, nn.Module) :]
    positional = zip_longest(names[: len(call.args)], call.args, fillvalue="")
    return [*positional, *call.kwargs.items()]


def given_parameters(gm: GraphModule) -> Iterator[Tensor]:
    """The parameters that a Dynamo graph is given, themselves."""
    values = map(_real_tensor, gm.graph.find_nodes(op="placeholder"))
    return (value for value in values if value is not None and compat.is_parameter(value))


def _real_tensor(node: Node) -> Tensor | None:
    """The tensor that a placeholder or attribute of a Dynamo graph stands for."""
    if node.op == "get_attr":
        owner = attribute_of(node)
        return owner if isinstance(owner, Tensor) else None
    return compat.placeholder_value(node)


def _outer_arguments(gm: GraphModule) -> dict[Node, list[Node]]:
    """What callers hand to the placeholders of bodies of higher-order ops."""
    outer: dict[Node, list[Node]] = {}
    for module in graph_modules(gm):
        attributes = module.graph.find_nodes(op="get_attr")
        for caller in dict.fromkeys(user for attribute in attributes for user in attribute.users):
            for _, body, given in bodies_called(caller):
                for placeholder in body.graph.find_nodes(op="placeholder"):
                    outer.setdefault(placeholder, []).extend(filter(None, [given.get(placeholder)]))
    return outer
