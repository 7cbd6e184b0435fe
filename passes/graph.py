"""What passes share: the value a node stands for, and what is known of a size, or decided."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from qcompile import compat

__all__ = ["decided_size", "graph_modules", "static_size", "value_of"]


def value_of(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else node


def static_size(size: Any) -> int | None:
    """The size as an int, or ``None`` if it is only known at run time. Specialized SymInts count as known."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return None if known is None else int(known)


def decided_size(size: Any) -> int | None:
    """The size as an int. One that is only known at run time is fixed by a guard, so that what follows from it is the
    same whether sizes are static or dynamic; ``None`` for one that must stay open.
    """
    return size if isinstance(size, int) else compat.guarded_int(size)


def graph_modules(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and the bodies nested in it."""
    children = [child for _, child in gm.named_children() if isinstance(child, GraphModule)]
    return [gm, *(module for child in children for module in graph_modules(child))]
