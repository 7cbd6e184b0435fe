"""A row: one GEMM in one role; the rows of a plan, with what the later passes made of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from qcompile.ir.definitions import short_names
from qcompile.ir.encoding import Encoding
from qcompile.passes.graph import input_of
from qcompile.passes.pass_base import EncoderKey, Observations
from qcompile.passes.plan import transform_at
from qcompile.passes.record import DECODED, SITE_KEY, Decision, operand_kind

__all__ = ["NOT_CAPTURED", "NOT_COMPUTED", "QUANTIZED", "ROLES", "SKIPPED", "Row", "bare_row", "rows_of", "shape_text"]

ROLES = ("fprop", "dgrad", "wgrad")
#: What a row's ``decision`` may be.
QUANTIZED, SKIPPED, NOT_COMPUTED, NOT_CAPTURED = "quantized", "skipped", "not computed", "not captured"


@dataclass(frozen=True)
class Row:
    """One GEMM in one role (or one that was left alone).

    Attributes:
        layer: dotted module name. op: how the model spells the product. role: fprop, dgrad, wgrad, or "-" if left
        alone. shape: operand shapes, e.g. ``"8×64×256 · 1024×256"``.
        formats: what each operand is read as, e.g. ``"e2m1 row + residual × e2m1 row"``.
        estimator: backward estimators of the two operands, after their transforms (fprop rows).
        provider: the kernels that run it. saved_bytes: bytes of codes this site keeps for the backward (fprop rows).
        decision: "quantized", "skipped", of a gradient that nobody needs "not computed", of a product that no graph
            holds "not captured". reason: why, or a remark about granularity.
        ranks: the ranks that the row holds on, in a report merged over ranks; empty in the report of one process.
    """

    layer: str
    op: str
    role: str
    shape: str
    formats: str
    estimator: str
    provider: str
    saved_bytes: int
    decision: str
    reason: str
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))  # JSON has lists alone
        for name in ("formats", "estimator", "provider", "reason"):
            object.__setattr__(self, name, short_names(getattr(self, name)))


def shape_text(operands: Iterable[Iterable[Any]]) -> str:
    """``"8×64 · 32×64"``"""
    return " · ".join("×".join(str(n) for n in operand) for operand in operands)


def rows_of(decision: Decision, observed: Observations) -> list[Row]:
    """The rows of one site: one if it is left alone, else one for the product and one for each gradient."""
    site = decision.site
    left_alone = bare_row(site.name, site.op, shape_text(site.shape), SKIPPED, decision.reason)
    if not decision.quantized:
        return [left_alone]
    saved = sum(t["bytes"] for t in observed.saved if t["codes"] and t["custom"].get(SITE_KEY) == site.index)
    products = {g["role"]: g for g in observed.gemms if g["site"] == site.index}
    rows = []
    for role in ROLES:
        product = products.get(role)
        if product is None and role != "fprop":
            if not site.training:
                continue
            if not _needs_gradient(decision, role):
                why = "nothing upstream needs this gradient"
                rows.append(replace(left_alone, role=role, decision=NOT_COMPUTED, reason=why))
                continue
            product = products.get("dgrad+wgrad") or products.get("backward")
            if product is None and "weight" not in [slot.kind for slot in site.slots]:
                product = products.get("wgrad")  # both gradients of a product of activations go by that name
        reason = decision.reason if role == "fprop" else ""
        if product is None:
            product = _implied(decision, role)
            reason = "not a matrix product in the joint graph; it reads the decoded operands"
        elif site.op.startswith("conv"):
            product = _implied(decision, role)
        texts = product["operands"]
        dense = all(text == "dense" for text in texts)
        rows.append(
            replace(
                left_alone,
                role=role,
                formats=" × ".join(_format(text, product["dtype"]) for text in texts),
                estimator=_estimators(decision) if role == "fprop" else "",
                provider="" if dense else _provider(decision, product, role, observed),
                saved_bytes=saved if role == "fprop" else 0,
                decision=SKIPPED if dense else QUANTIZED,
                reason="both operands are kept in high precision"
                if dense
                else "; ".join(filter(None, (reason, product["reason"]))),
            )
        )
    gradients = [f"{row.role} {row.formats}" for row in rows[1:] if row.decision == QUANTIZED]
    if rows[0].decision == SKIPPED and gradients:
        rows[0] = replace(rows[0], reason=f"the forward is in high precision; quantized: {', '.join(gradients)}")
    return rows


def _estimators(decision: Decision) -> str:
    """``"trust of hadamard(64) × trust of hadamard(64)"``: estimators, and the transforms as the operands have them."""
    texts = []
    for slot, operand in zip(decision.site.slots, decision.operands, strict=True):
        if operand is None:
            texts.append("-")
            continue
        transform = transform_at(slot, operand, decision.site.node)
        texts.append(f"{operand.estimator} of {transform}" if transform else str(operand.estimator))
    return " × ".join(texts)


def bare_row(layer: str, op: str, shape: str, decision: str, reason: str) -> Row:
    """A row of which there is nothing to say but why."""
    return Row(layer, op, "-", shape, "", "", "", 0, decision, reason)


def _weight_position(decision: Decision) -> int:
    """Which operand is the weight; the right one of a product without."""
    kinds = [slot.kind for slot in decision.site.slots]
    return kinds.index("weight") if "weight" in kinds else 1


def _needs_gradient(decision: Decision, role: str) -> bool:
    """Whether autograd asks for dX (dgrad) or dW (wgrad): by the operand as the model has it, before what `insert` put
    on it.
    """
    weight = _weight_position(decision)
    node = decision.site.slots[weight if role == "wgrad" else 1 - weight].of(decision.site.node)
    while operand_kind(node):
        node = input_of(node)
    return bool(node.meta["example_value"].requires_grad)


def _implied(decision: Decision, role: str) -> dict[str, Any]:
    """What a product reads where the joint graph does not tell: autograd is given the decoded operands.

    Products over one element become multiplications, equal products are merged, some ops have a backward of their own,
    and a convolution reads windows that were put together again.
    """
    texts = [str(operand) if operand else "dense" for operand in decision.operands]
    if role != "fprop":
        weight = _weight_position(decision)
        texts = ["dense", texts[weight if role == "dgrad" else 1 - weight]]
    dtype = str(decision.site.node.meta["example_value"].dtype).removeprefix("torch.")
    return {"operands": texts, "fused": False, "dtype": dtype, "provider": "", "reason": ""}


def _format(text: str, dense: str) -> str:
    if text == "dense":
        return dense or "high precision"
    encoding = Encoding.parse(text)
    operand = encoding.operand
    if operand is None:
        return encoding.format.name  # its scales are in the gradient
    beside = operand.outliers.label if operand.outliers else ""
    return f"{operand.quantizer.format.name} {operand.quantizer.granularity}{beside}"


def _provider(decision: Decision, product: dict[str, Any], role: str, observed: Observations) -> str:
    """What runs the product, and (fprop) what quantizes its operands, as they were emitted."""
    product_by = product["provider"] if product["fused"] else DECODED
    if role != "fprop":
        return product_by
    node = decision.site.node
    dtype = node.meta["example_value"].dtype
    keys = [
        EncoderKey(str(operand.stored), str(transform_at(slot, operand, node)), dtype)
        for slot, operand in zip(decision.site.slots, decision.operands, strict=True)
        if operand
    ]
    encoders = dict.fromkeys(encoder for key in keys for encoder in observed.encoders.get(key, ()))
    names = ", ".join(name if not why else f"{name} ({why})" for name, why in encoders)
    return f"{names} quantize; {product_by}" if names else product_by
