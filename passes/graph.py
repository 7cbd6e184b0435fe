"""What passes share: the value a node stands for, and what is known of a size."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

__all__ = ["graph_modules", "static_size", "value_of"]


def value_of(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else node


def static_size(size: Any) -> int | None:
    """The size as an int, or ``None`` if it is only known at run time. Specialized SymInts count as known."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return None if known is None else int(known)


def graph_modules(gm: GraphModule) -> list[GraphModule]:
    """``gm`` and the bodies nested in it."""
    children = [child for _, child in gm.named_children() if isinstance(child, GraphModule)]
    return [gm, *(module for child in children for module in graph_modules(child))]
