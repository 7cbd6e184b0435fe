"""Find every GEMM of a Dynamo graph, however it is spelled.

Sees a graph as Dynamo captured it, bodies of higher-order ops included; changes nothing. Leaves a list of
:class:`Site`: which operands are contracted along which axis, which is the weight, what layer the GEMM belongs to,
and, where the spelling does not allow a scale per row, why.

`spellings.py` is the table of what is understood, `origins.py` says what an operand derives from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qcompile.ir.sharding import local_tensor

from .graph import bodies_called, static_size, target_name, value_of
from .heads import Vocabulary, head_reasons, identity_of
from .names import Names
from .origins import Origin, Origins
from .record import Site
from .spellings import ATTENTION, HIGHER_ORDER_ATTENTION, TRANSFORM, Recognized, Slot, recognize
from .subclasses import obstacle_of_class, stored_as

__all__ = ["find_gemms"]

COMPUTES_A_WEIGHT = "computes a weight: neither operand depends on the model's inputs"
IS_CONSTANT = "a constant, not a weight (a buffer, or a tensor made in the graph)"
UNDER_NO_GRAD = "under no_grad inside a training graph"
CONSTANT_WEIGHT = "the weight is a constant"


def find_gemms(gm: GraphModule, names: Names) -> list[Site]:
    """All GEMM sites of ``gm`` and of the bodies of its higher-order ops, in program order within each body.

    ``names``: of the layers of what was compiled; its embeddings also tell which products are heads.
    """
    vocabulary = Vocabulary.of_modules(names.modules)
    sites = list(_sites_below(_Body("", gm, gradients=torch.is_grad_enabled()), vocabulary, names))
    for index, site in enumerate(sites):
        site.index = index
        site.name = site.name or f"{site.op}_{index}"
    return sites


@dataclass(frozen=True)
class _Body:
    """A graph module reachable through higher-order ops.

    Attributes:
        obstacle, anonymous: hold for all its sites. given: what its placeholders derive from, if that is known.
        gradients: whether gradients are enabled where it is called. autocasts: the regions of autocast around the call,
        device type and whether it is on, outermost first.
    """

    path: str
    module: GraphModule
    obstacle: str = ""
    anonymous: str = ""
    given: dict[Node, Origin] = field(default_factory=dict)
    gradients: bool = True
    autocasts: tuple[tuple[str, bool], ...] = ()

    def merged_with(self, other: _Body | None) -> _Body:
        """One body for two calls of it."""
        if other is None:
            return self
        return replace(self, given={node: origin | other.given[node] for node, origin in self.given.items()})


#: Higher-order ops whose backward is traced without saying which node serves which site.
_ANONYMOUS_BACKWARD = ("cond", "while_loop", "scan", "map_impl")


def _sites_below(body: _Body, vocabulary: Vocabulary, names: Names) -> Iterator[Site]:
    """The sites of a body, then those of the bodies it calls."""
    sites: dict[Node, Site] = {}
    nested: dict[GraphModule, _Body] = {}
    origins, weights = Origins(body.given), {}
    gradients, functorch_depth = body.gradients, 0
    autocasts: dict[Node, tuple[str, bool]] = {}
    training = gradients and _is_training(body.module)
    graph = body.module.graph
    for node in graph.nodes:
        called = node.op in ("call_function", "call_method")
        found = recognize(node) if called else None
        if found is not None:
            operands = [origins.of(slot.of(node)) for slot in found.slots]
            site = sites[node] = _site(node, found, operands, body, names)
            weights[node] = _identities(operands, site)
            site.obstacle = site.obstacle or _mixed_precision(site, (*body.autocasts, *autocasts.values()))
            if functorch_depth and not site.obstacle:
                site.obstacle = TRANSFORM
            if training and not gradients:
                site.reservation = site.reservation or UNDER_NO_GRAD
        origins.visit(node, found is not None)
        if called and any(source.op == "get_attr" for source in node.all_input_nodes):
            state = replace(body, gradients=gradients, autocasts=(*body.autocasts, *autocasts.values()))
            for inner in _nested_bodies(node, state, origins):
                nested[inner.module] = inner.merged_with(nested.get(inner.module))
        name = target_name(node)
        if name == "_set_grad_enabled":
            gradients = node.args[0]
        elif name == "_enter_autocast":
            autocasts[node] = (node.args[0], bool(node.args[2]))
        elif name == "_exit_autocast":
            autocasts.pop(node.args[0], None)
        functorch_depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
    vocabulary.add_graph(graph, lambda table: frozenset(map(identity_of, origins.of(table).roots)))
    for node, reason in head_reasons(graph, weights, vocabulary).items():
        sites[node].head = reason
    yield from sites.values()
    for inner in nested.values():
        yield from _sites_below(inner, vocabulary, names)


def _is_training(gm: GraphModule) -> bool:
    """Whether a result of the graph requires a gradient. Leaves that are handed back, and views of them, do not count:
    it is torch's version that decides whether ``p.T`` is a result of the graph.
    """
    values = [value_of(node) for node in gm.graph.output_node().all_input_nodes]
    results = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    return not all((v if v._base is None else v._base).is_leaf for v in results)


def _mixed_precision(site: Site, autocasts: tuple[tuple[str, bool], ...]) -> str:
    """What is wrong with operands of two dtypes where autocast does not make them one; the product itself raises."""
    values = [value_of(slot.of(site.node)) for slot in site.slots]
    if not all(isinstance(value, torch.Tensor) for value in values) or len({value.dtype for value in values}) < 2:
        return ""
    device = values[0].device.type
    states = [torch.is_autocast_enabled(device), *(enabled for kind, enabled in autocasts if kind == device)]
    return "" if states[-1] else f"operands are {_dtypes(values)}, which the product itself refuses"


def _dtypes(values: list[Any]) -> str:
    return " × ".join(str(value.dtype).removeprefix("torch.") for value in values)


def _nested_bodies(call: Node, body: _Body, origins: Origins) -> Iterator[_Body]:
    """The graph modules among the arguments of a higher-order op; ``body``: the caller in the state of the call."""
    operation = str(call.target)
    obstacle, anonymous = body.obstacle, body.anonymous
    if "autograd_function_apply" in operation:
        obstacle = "inside a torch.autograd.Function, whose backward is the user's own"
    elif operation in HIGHER_ORDER_ATTENTION:
        obstacle = ATTENTION
    elif operation in _ANONYMOUS_BACKWARD:
        anonymous = operation
    for attribute, module, arguments in bodies_called(call):
        given = {placeholder: origins.of(argument) for placeholder, argument in arguments.items()}
        path = f"{body.path}.{attribute.target}" if body.path else str(attribute.target)
        yield replace(body, path=path, module=module, obstacle=obstacle, anonymous=anonymous, given=given)


def _identities(operands: list[Origin], site: Site) -> frozenset[Any]:
    """The parameters in a site's weight."""
    weights = [o for o, slot in zip(operands, site.slots, strict=True) if slot.kind == "weight"]
    return frozenset(identity_of(root) for origin in weights for root in origin.roots)


def _site(node: Node, found: Recognized, operands: list[Origin], body: _Body, names: Names) -> Site:
    """What the plan needs to know: weights, shapes, and obstacles that show in the operands."""
    site = Site(node, found.op, found.slots, found.obstacle or body.obstacle, body=body.path, anonymous=body.anonymous)
    _name(site, names)
    if not found.slots:
        return site
    left, right = found.slots
    if found.op.startswith(_LAYERS) and operands[1].is_constant:
        site.slots = replace(left, note="; ".join(filter(None, (left.note, CONSTANT_WEIGHT)))), right
    values = [value_of(slot.of(node)) for slot in site.slots]
    if not all(isinstance(v, torch.Tensor) for v in values) or not isinstance(value_of(node), torch.Tensor):
        site.obstacle = site.obstacle or "its operands are not plain tensors"
        return site
    site.obstacle = site.obstacle or obstacle_of_class(values)
    if any(v.is_nested or v.layout is not torch.strided for v in values):
        site.obstacle = site.obstacle or "an operand is nested or sparse; only dense tensors are quantized"
        return site
    weights = _weights(found.op, operands, values)
    site.slots = tuple(
        replace(slot, kind="weight" if weight else "activation", stored=stored_as(slot.of(node)))
        for slot, weight in zip(site.slots, weights, strict=True)
    )
    site.reservation = _reservation(site, operands)
    site.shape = (tuple(values[0].shape), tuple(values[1].shape))
    site.contraction = site.slots[1].size(node)
    site.training = torch.is_grad_enabled() and any(v.requires_grad for v in values)
    for slot, value, origin in zip(site.slots, values, operands, strict=True):
        if slot.kind == "weight":
            site.weight_size = value.numel()
            site.sides = max(_sides(value, slot, slot.size(node)), _sides_of_parameter(origin), key=min)
            if parameter := _parameter_behind(origin, body):
                _name(site, names, parameter)
    if site.obstacle:
        return site
    if not all(v.dtype.is_floating_point for v in values):
        site.obstacle = f"operands are {_dtypes(values)}, not floating point"
    elif static_size(site.contraction) in (0, 1):
        site.obstacle = f"contraction size {site.contraction}: an outer product, nothing is summed"
    elif any(static_size(local_tensor(v).numel()) == 0 for v in values):
        site.obstacle = "an operand is empty"
    return site


#: Beginnings of the names of products that have a slot for the weight, the second.
_LAYERS = ("linear", "conv", "grouped")


def _parameter_behind(origin: Origin, body: _Body) -> Node | None:
    """The one parameter that a weight derives from; in a body that has several callers, the placeholder that stands for
    one of each.
    """
    if len(origin.roots) == 1:
        return next(iter(origin.roots))
    return next((p for p, given in body.given.items() if origin.roots and given.roots == origin.roots), None)


def _name(site: Site, names: Names, weight: Node | None = None) -> None:
    found = names.of(site.node, weight)
    site.name, site.aliases, site.missing = next(iter(found.names), ""), found.names[1:], found.missing
    site.blocks = tuple(map(names.block, site.names))


def _weights(op: str, operands: list[Origin], values: list[torch.Tensor]) -> list[bool]:
    """Which operands are weights.

    Layers have a slot for theirs, whatever is computed for it. In a free product it is what derives from parameters, or
    a constant (which is then left wide by default). An argument that is a leaf and requires grad counts where it stands
    on the right and is a matrix: leaves of higher rank are queries, keys and values.
    """
    if op.startswith(_LAYERS):
        return [False, True]
    weights = [operand.is_parameter or operand.is_constant for operand in operands]
    left, right = operands
    if not any(weights) and right.is_leaf and not left.roots & right.roots:
        weights[1] = values[1].dim() == 2
    return weights


def _reservation(site: Site, operands: list[Origin]) -> str:
    if not any(operand.varies for operand in operands):
        return COMPUTES_A_WEIGHT
    constant = any(operand.is_constant for operand in operands)
    return IS_CONSTANT if constant and not site.op.startswith(_LAYERS) else ""


def _sides(value: torch.Tensor, slot: Slot, contracted: Any) -> tuple[Any, Any]:
    """Of a weight, as one of a batch of matrices if it has more than two axes."""
    if value.dim() > 2 and slot.frame is None and slot.axis in (-1, -2):
        return contracted, value.shape[-3 - slot.axis]
    return contracted, value.numel() // contracted if value.numel() else 0


def _sides_of_parameter(origin: Origin) -> tuple[Any, Any]:
    """Of the one matrix that a weight may be a part of: half of a wide layer is no thin one."""
    shapes = [value_of(root).shape for root in origin.roots]
    return tuple(shapes[0]) if len(shapes) == 1 and len(shapes[0]) == 2 else (0, 0)
