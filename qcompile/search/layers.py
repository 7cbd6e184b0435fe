"""A layer as the search sees it: what its products are, what the candidates make of it, and what each costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod

import torch

from qcompile import compat
from qcompile.ir.operand import Operand
from qcompile.kernels.matmul.costs import rates_of
from qcompile.passes.gradient_axes import role_of_slot
from qcompile.passes.graph import value_of
from qcompile.passes.record import Decision, Site

__all__ = ["COSTS", "WIDE", "Cost", "Layer", "Operands", "grouped", "layer_of", "operands_of", "roles_of"]

#: The option of leaving a layer in high precision.
WIDE = "wide"

#: What a layer's two operands are quantized to, by kind; ``None`` for a layer in high precision.
Operands = dict[str, str] | None


@dataclass
class Layer:
    """All products of one kind in one layer.

    Attributes:
        name, op: as in the report. m, n, k: extents of the product, summed over calls (m) and as of the first (n, k).
        activation, weight: elements of these operands, the latter 0 without a weight.
        itemsize: bytes of an element in high precision.
        reads: what activation it reads; equal for layers that share one.
        recipe: its operands by the recipe itself. candidates: by each candidate that applies to it.
        scores: Σ (g ⊙ (y_q − y))² over all batches, by candidate.
        errors: squared norms, by backward role: of the exact gradient under ``"wide"`` and of each candidate's error.
        reason: why there are no scores.
    """

    name: str
    op: str
    m: int = 0
    n: int = 0
    k: int = 0
    activation: int = 0
    weight: int = 0
    itemsize: int = 4
    reads: str = ""
    recipe: Operands = None
    candidates: dict[str, dict[str, str]] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    reason: str = ""

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.op

    def noise(self, role: str, candidate: str) -> float | None:
        """‖error‖² / ‖gradient‖² of a backward product; ``None`` where it was not computed."""
        found = self.errors.get(role, {})
        return found[candidate] / found[WIDE] if found.get(WIDE) and candidate in found else None

    @property
    def kinds(self) -> tuple[str, str]:
        """Of the two operands."""
        return "activation", "weight" if self.weight else "activation"

    def operand(self, kind: str, candidate: str) -> Operand | None:
        """What a candidate quantizes an operand to; ``None`` in high precision."""
        text = self.candidates.get(candidate, {}).get(kind, "off")
        return None if text == "off" else Operand.parse(text)


def layer_of(site: Site, reads: str) -> Layer:
    """A layer of one product, without scores."""
    k = compat.size_hint(site.contraction) or 1
    sizes = {"activation": 0, "weight": 0}
    for slot in site.slots:
        sizes[slot.kind] += compat.size_hint(value_of(slot.of(site.node)).numel())
    weight = sizes["weight"]
    results = compat.size_hint(value_of(site.node).numel())
    n = max(weight // k, 1) if weight else compat.size_hint(value_of(site.node).shape[-1])
    itemsize = value_of(site.node).dtype.itemsize
    return Layer(site.name, site.op, max(results // n, 1), n, k, sizes["activation"], weight, itemsize, reads)


def operands_of(decision: Decision) -> Operands:
    """As a rule gives them; ``None`` in high precision. An operand that is stored as codes is what it is, and left
    out.
    """
    if not any(decision.operands):
        return None
    slots = zip(decision.site.slots, decision.operands, strict=True)
    return {slot.kind: str(operand) if operand else "off" for slot, operand in slots if not slot.stored}


def roles_of(site: Site) -> list[str]:
    """Which gradient each operand of a site gets."""
    return [role_of_slot(site, position) for position in range(len(site.slots))]


# --- which layers share a choice -------------------------------------------------------------------------------------


def grouped(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Scored layers that share a choice: those that read the same activation, which is quantized once and has one
    scale (q, k and v; gate and up), and the experts of a mixture. In order of their first layers.
    """
    parent = list(range(len(layers)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, layer in enumerate(layers):
        expert = re.sub(r"(^|\.)(experts)\.\d+(?=\.|$)", r"\1\2.*", layer.name)
        shared = [f"reads {layer.reads}"] if layer.reads else []
        shared += [f"expert {expert}"] if expert != layer.name else []
        for key in shared:
            j = root(first.setdefault(key, i))
            low, high = sorted((j, root(i)))
            parent[high] = low
    found: dict[int, list[Layer]] = {}
    for i, layer in enumerate(layers):
        found.setdefault(root(i), []).append(layer)
    return list(found.values())


# --- what a choice costs ---------------------------------------------------------------------------------------------

#: Cost of a group under an option: a candidate's name, or :data:`WIDE`. Integers, so that equal sums are equal.
Cost = Callable[[Sequence[Layer], str], int]


def _bits(layer: Layer, kind: str, option: str) -> int:
    operand = layer.operand(kind, option)
    return operand.quantizer.format.bits if operand else 8 * layer.itemsize


def _stored_bits(layer: Layer, kind: str, elements: int, option: str) -> int:
    """Of an operand in rows of K elements, scales included."""
    operand = layer.operand(kind, option)
    if operand is None:
        return 8 * layer.itemsize * elements
    quantizer = operand.quantizer
    rows, size = ceil(elements / layer.k), quantizer.granularity.size or 1
    scales = {
        "tensor": 1,
        "row": rows,
        "block": rows * ceil(layer.k / size),
        "square": ceil(rows / size) * ceil(layer.k / size),
    }[quantizer.granularity.kind]
    return quantizer.format.bits * elements + scales * 8 * _SCALE_BYTES.get(quantizer.scale.storage, 1)


_SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def _operations(layers: Iterable[Layer], option: str) -> int:
    return sum(2 * x.m * x.n * x.k * prod(_bits(x, kind, option) for kind in x.kinds) for x in layers)


def _weights(layers: Iterable[Layer], option: str) -> int:
    return sum(_stored_bits(x, "weight", x.weight, option) for x in layers)


def _saved(layers: Iterable[Layer], option: str) -> int:
    once = {layer.reads or repr(layer.key): layer for layer in layers}
    return sum(_stored_bits(x, "activation", x.activation, option) for x in once.values()) // 8


def _time(layers: Iterable[Layer], option: str) -> int:
    """Nanoseconds of the forward products and of what quantizes their operands, on this card."""
    rates, _ = rates_of(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    total, read = 0.0, set()
    for layer in layers:
        operations, results = 2.0 * layer.m * layer.n * layer.k, float(layer.m * layer.n)
        operands = [layer.operand(kind, option) for kind in layer.kinds]
        for position, (operand, rows) in enumerate(zip(operands, (layer.m, layer.n), strict=True)):
            if operand and (position or layer.reads not in read):
                total += rates.passes(3.0 * rows * layer.k, 1)
        read.add(layer.reads)
        types = {_tensor_core_type(operand) for operand in operands}
        eight = len(types) == 1 and None not in types
        dtype = torch.bfloat16 if layer.itemsize == 2 else torch.float32
        total += rates.product_8bit(operations, results) if eight else rates.product_decoded(operations, dtype)
    return round(1000 * total)


def _tensor_core_type(operand: Operand | None) -> str | None:
    """In what type tensor cores multiply an operand's codes; ``None`` where they do not."""
    if operand is None or operand.quantizer.granularity.kind not in ("row", "tensor"):
        return None
    return operand.quantizer.format.tensor_core_type


#: What ``cost=`` names, and its unit.
COSTS: Mapping[str, tuple[Cost, str]] = {
    "operations": (_operations, "bit operations"),
    "weights": (_weights, "bits"),
    "saved": (_saved, "bytes"),
    "time": (_time, "ns"),
}
