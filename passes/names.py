"""The names of layers and parameters, as the report and the user's rules spell them."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from qcompile import compat

__all__ = ["layer_name", "parameter_name", "with_parameter"]


def parameter_name(node: Any) -> str:
    """Dotted name of a parameter placeholder, e.g. ``layers.0.weight``; "" where Dynamo does not tell (nested
    bodies).
    """
    if not isinstance(node, Node):
        return ""
    source = compat.source_name(node)
    parts = re.findall(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]", source.removeprefix("L").removeprefix("G"))
    names = [a or b or c for a, b, c in parts]
    return ".".join(n for n in names[1:] if n not in ("_modules", "_parameters", "_buffers"))


def layer_name(node: Node) -> str:
    """Dotted name of the innermost module whose forward called the GEMM; "" at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return ".".join(p for p in path.split(".") if p and p not in ("_modules", "_parameters", "_buffers"))


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
