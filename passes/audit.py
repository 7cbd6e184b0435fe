"""For the report: what the products of the joint graph read and what runs them, and what encodes operands in the
post-grad graphs. Changes nothing.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from qcompile.ir.operand import STE
from qcompile.kernels.register import provider_of

from .dialect import GEMMS, decode_root, gemm_operands, lies_in_memory, stored_operand
from .gradient_axes import ROLE_OF_OPERAND
from .graph import aten, input_of, is_call, is_gather, through_views
from .pass_base import Context, EncoderKey
from .record import PROVIDER_KEY, UNFOLDED_KEY, Provision, mark_of, operand_kind, site_index, stated_role
from .roles import depends_on_tangents, product_role
from .views import (
    ProductOperand,
    Quantize,
    Quantize8Bit,
    Quantize8BitMasked,
    Quantize8BitPair,
    Quantize8BitTransposed,
    QuantizeCompensated,
    QuantizedMM,
    QuantizeGroups,
    QuantizeGroupsPair,
    QuantizeProduced,
    View,
    encoder_of,
)  # fmt: skip

__all__ = ["audit", "audit_encoders"]


def audit(graph: Graph, context: Context) -> int:
    """Records one row per product in the context's observations; returns 0, since nothing is rewritten."""
    if context.observe is None:
        return 0
    backward = depends_on_tangents(graph)
    decisions = {decision.site.index: decision for decision in context.plan.quantized}
    for node in graph.nodes:
        provision = Provision("")
        if product := QuantizedMM.match(node):
            operands, fused = [_read_as(operand) for operand in product.operands], True
            role = "fprop" if node not in backward else _fused_role(node, product, backward)
            provision = mark_of(node, PROVIDER_KEY) or provision
            decision = decisions.get(site_index(node))  # type: ignore[arg-type]
            if decision is not None and role in decision.folded and "dense" in operands:
                provision = provision._replace(reason=mark_of(node, UNFOLDED_KEY) or provision.reason)
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
                "provider": provision.provider,
                "reason": provision.reason,
                "dtype": str(_output_dtype(node)).removeprefix("torch."),
            }
        )
    return 0


def _fused_role(node: Node, product: QuantizedMM, backward: set[Node]) -> str:
    """As stated, or by which operand is the gradient: the other one is the weight (dgrad) or the input (wgrad)."""
    if role := stated_role(node):
        return role
    for operand in product.operands:
        if operand.first not in backward:
            return ROLE_OF_OPERAND[operand_kind(through_views(operand.first))]
    return "backward"


def _read_as(operand: ProductOperand) -> str:
    """How an operand was quantized; E4M3 codes may be levels of a narrower grid and outliers."""
    source = through_views(operand.first)
    encoder, _ = encoder_of(through_views(input_of(source)) if is_gather(source) else source) or (None, 0)
    return str(encoder.operand if isinstance(encoder, QuantizeCompensated) else operand.encoding)


def _unfused_role(node: Node, backward: set[Node]) -> str:
    if is_call(node, aten.convolution_backward.default):
        return stated_role(node) or "dgrad+wgrad"
    return product_role(node, gemm_operands(node), backward)


def _operand_texts(node: Node) -> list[str]:
    operands: Any = node.args[:3] if is_call(node, aten.convolution_backward.default) else gemm_operands(node)
    roots = [decode_root(operand, changed=True) for operand in operands]
    return ["dense" if root is None else _read_as(stored_operand(root)) for root in roots]


def _output_dtype(node: Node) -> Any:
    value = node.meta["val"]
    # convolution_backward leaves out the gradients nobody asked for.
    return next(v for v in value if v is not None).dtype if isinstance(value, (tuple, list)) else value.dtype


# --- encoders -------------------------------------------------------------------------------------------------------


def audit_encoders(graph: Graph, context: Context) -> int:
    """Records what runs the encoders that were emitted; returns 0."""
    if context.observe is None:
        return 0
    for node in graph.nodes:
        for view in _ENCODERS:
            if encoder := view.match(node):
                _record(encoder, context.observe.encoders)
    return 0


_ENCODERS: tuple[type[View], ...] = (
    Quantize, QuantizeCompensated, QuantizeGroups, Quantize8Bit, Quantize8BitMasked, Quantize8BitTransposed,
    Quantize8BitPair, QuantizeGroupsPair, QuantizeProduced,
)  # fmt: skip


def _record(encoder: Any, encoders: dict[EncoderKey, list[Provision]]) -> None:
    producer = getattr(encoder, "producer", None)
    value = (encoder.x if producer is None else encoder.a).meta["val"]
    dtype = (producer or value).dtype
    operand = getattr(encoder, "operand", None)
    quantizer = operand.stored if operand is not None else encoder.quantizer
    transform = str(operand.transform if operand is not None else getattr(encoder, "transform", ""))
    estimator = str(operand.estimator if operand is not None else STE)
    name = encoder.op.name().removeprefix("qcompile::").partition(".")[0]
    there = producer is None and lies_in_memory(encoder.x)
    found = Provision(*provider_of(name, value.device.type, str(quantizer), dtype, estimator, transform, there))
    if producer is not None:
        found = found._replace(reason="; ".join(filter(None, (found.reason, f"with its {producer.operations}"))))
    known = encoders.setdefault(EncoderKey(str(quantizer), transform, dtype), [])
    if found not in known:
        known.append(found)
