"""Joint graph: list every product, its role and what it reads, for the report. Changes nothing."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from .dialect import GEMMS, decode_root, gemm_operands, is_call, operand_kind, quantized_operand, through_views
from .fold import why_not_folded
from .gradient_axes import ROLE_OF_OPERAND
from .lower import product_provider
from .pass_base import Context
from .plan import site_index
from .roles import depends_on_tangents, product_role, stated_role

__all__ = ["audit"]

aten, ops = torch.ops.aten, torch.ops.qcompile


def audit(graph: Graph, context: Context) -> int:
    """Records one row per product in the context's observations; returns 0, since nothing is rewritten."""
    if context.observe is None:
        return 0
    backward = depends_on_tangents(graph)
    decisions = {decision.site.index: decision for decision in context.plan.quantized}
    for node in graph.nodes:
        provider, reason = "", ""
        if is_call(node, ops.quantized_mm.default):
            operands, fused = [_text(node.args[i], node.args[i + 1]) for i in (0, 4)], True
            role = "fprop" if node not in backward else _fused_role(node, backward)
            provider, reason = product_provider(node)
            decision = decisions.get(site_index(node))  # type: ignore[arg-type]
            if decision is not None and role in decision.folded and "dense" in operands:
                codes = 0 if operands[1] == "dense" else 4
                reason = why_not_folded(node, codes) or reason
        elif is_call(node, *GEMMS) or is_call(node, aten.convolution_backward.default):
            operands, fused = _operand_texts(node), False
            role = _unfused_role(node, backward)
        else:
            continue
        context.observe.gemms.append(
            {
                "node": node.name,
                "site": site_index(node),
                "role": role,
                "operands": operands,
                "fused": fused,
                "provider": provider,
                "reason": reason,
                "dtype": str(_output_dtype(node)).removeprefix("torch."),
            }
        )
    return 0


def _fused_role(node: Node, backward: set[Node]) -> str:
    """As stated, or by which operand is the gradient: the other one is the weight (dgrad) or the input (wgrad)."""
    if role := stated_role(node):
        return role
    for tensors in (node.args[0], node.args[4]):
        first: Any = tensors[0]  # type: ignore[index]
        if first not in backward:
            return ROLE_OF_OPERAND[operand_kind(through_views(first))]
    return "backward"


def _text(tensors: Any, text: Any) -> str:
    """How an operand of ``quantized_mm`` was quantized; E4M3 codes may be levels of a narrower grid and outliers."""
    codes = through_views(tensors[0])
    source: Any = codes.args[0] if is_call(codes, operator.getitem) else None
    return str(source.args[1] if is_call(source, ops.quantize_compensated.default) else text)


def _unfused_role(node: Node, backward: set[Node]) -> str:
    if is_call(node, aten.convolution_backward.default):
        return stated_role(node) or "dgrad+wgrad"
    return product_role(node, gemm_operands(node), backward)


def _operand_texts(node: Node) -> list[str]:
    operands = node.args[:3] if is_call(node, aten.convolution_backward.default) else gemm_operands(node)
    texts = []
    for operand in operands:
        root = decode_root(operand, rotated=True)  # type: ignore[arg-type]
        if root is None:
            texts.append("dense")
        else:
            quantized = quantized_operand(root)
            texts.append(_text(quantized.tensors, quantized.text))
    return texts


def _output_dtype(node: Node) -> Any:
    value = node.meta["val"]
    # convolution_backward leaves out the gradients nobody asked for.
    return next(v for v in value if v is not None).dtype if isinstance(value, (tuple, list)) else value.dtype
