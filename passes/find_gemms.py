"""Find every GEMM of a Dynamo graph, however it is spelled.

Sees a graph as Dynamo captured it, bodies of higher-order ops included; changes nothing. Leaves a list of
:class:`Site`: which operands are contracted along which axis, whether each is a weight, what layer the GEMM belongs to,
and, where the spelling does not allow a scale per row, why.

`spellings.py` is the table of what is understood.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .graph import static_size, value_of
from .names import layer_name, parameter_name, with_parameter
from .origins import is_functional_weight, is_weight, origin
from .spellings import ATTENTION, HIGHER_ORDER_ATTENTION, TRANSFORM, Slot, recognize

__all__ = ["Site", "find_gemms"]


@dataclass
class Site:
    """One matrix product. ``obstacle`` says why it cannot be quantized; empty if it can."""

    node: Node
    op: str
    slots: tuple[Slot, ...] = ()
    obstacle: str = ""
    name: str = ""
    body: str = ""
    shape: tuple[Any, ...] = ()
    weight_size: int | None = None
    index: int = -1
    training: bool = True


def find_gemms(gm: GraphModule) -> list[Site]:
    """All GEMM sites of ``gm`` and of the bodies of its higher-order ops, in program order within each body."""
    sites = [site for body in _bodies(gm) for site in _find_in(body)]
    for index, site in enumerate(sites):
        site.index = index
        site.name = site.name or f"{site.op}_{index}"
    return sites


@dataclass(frozen=True)
class _Body:
    """A graph module reachable through higher-order ops; ``obstacle`` and ``note`` hold for all its sites."""

    path: str
    module: GraphModule
    obstacle: str = ""
    note: str = ""


#: Higher-order ops whose backward is traced without saying which node serves which site.
_ANONYMOUS_BACKWARD = ("cond", "while_loop", "scan", "map_impl")


def _bodies(gm: GraphModule) -> Iterator[_Body]:
    yield from _bodies_below(_Body("", gm))


def _bodies_below(body: _Body) -> Iterator[_Body]:
    yield body
    users = {node.target: node for node in body.module.graph.nodes if node.op == "get_attr"}
    for name, child in body.module.named_children():
        if not isinstance(child, GraphModule):
            continue
        caller = next(iter(users[name].users), None) if name in users else None
        operation = str(caller.target) if caller is not None else ""
        obstacle, note = body.obstacle, body.note
        if "autograd_function_apply" in operation:
            obstacle = "inside a torch.autograd.Function, whose backward is the user's own"
        elif operation in HIGHER_ORDER_ATTENTION:
            obstacle = ATTENTION
        elif operation in _ANONYMOUS_BACKWARD:
            note = f"inside {operation}: its gradients stay in high precision"
        path = f"{body.path}.{name}" if body.path else name
        yield from _bodies_below(_Body(path, child, obstacle, note))


def _find_in(body: _Body) -> Iterator[Site]:
    functorch_depth = 0
    for node in body.module.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        target_name = getattr(node.target, "__name__", str(node.target))
        functorch_depth += target_name.endswith("_increment_nesting") - target_name.endswith("_decrement_nesting")
        found = recognize(node)
        if found is None:
            continue
        site = Site(node, found.op, found.slots, found.obstacle or body.obstacle, layer_name(node), body.path)
        if not site.obstacle and functorch_depth:
            site.obstacle = TRANSFORM
        if site.slots:
            _describe(site)
            left, right = site.slots
            site.slots = replace(left, note="; ".join(filter(None, (left.note, body.note)))), right
        yield site


def _describe(site: Site) -> None:
    """Fill in what the plan needs to know: weights, shapes, and obstacles that show in the operands."""
    node, values = site.node, [value_of(slot.of(site.node)) for slot in site.slots]
    if not all(isinstance(v, torch.Tensor) for v in values) or not isinstance(value_of(node), torch.Tensor):
        site.obstacle = site.obstacle or "its operands are not plain tensors"
        return
    if any(v.is_nested or v.layout is not torch.strided for v in values):
        site.obstacle = site.obstacle or "an operand is nested or sparse; only dense tensors are quantized"
        return
    origins = [origin(slot.of(node), node) for slot in site.slots]
    weights = [is_weight(source) for source in origins]
    if not any(weights):
        weights[1] = origins[0] is not origins[1] and is_functional_weight(origins[1], site.op)
    site.slots = tuple(
        replace(slot, kind="weight" if weight else "activation")
        for slot, weight in zip(site.slots, weights, strict=True)
    )
    contraction = static_size(site.slots[1].size(node))
    site.shape = (tuple(values[0].shape), tuple(values[1].shape))
    sizes = [v.numel() for v, s in zip(values, site.slots, strict=True) if s.kind == "weight"]
    site.weight_size = static_size(sizes[-1]) if sizes else None
    site.training = torch.is_grad_enabled() and any(v.requires_grad for v in values)
    parameter = next((parameter_name(o) for o, s in zip(origins, site.slots, strict=True) if s.kind == "weight"), "")
    site.name = with_parameter(site.name, parameter)
    if site.obstacle:
        return
    if not all(v.dtype.is_floating_point for v in values):
        site.obstacle = (
            f"operands are {' × '.join(str(v.dtype).removeprefix('torch.') for v in values)}, not floating point"
        )
    elif contraction is None:
        site.obstacle = "the contraction size is dynamic; mark it static"
    elif contraction <= 1:
        site.obstacle = f"contraction size {contraction}: an outer product, nothing is summed"
    elif any(static_size(v.numel()) == 0 for v in values):
        site.obstacle = "an operand is empty"
