"""Which tensor subclasses are quantized, and what is said of the others.

Dynamo traces subclasses that only override ``__torch_function__`` away: their operands are plain tensors by now. What
is left are wrappers around other tensors. A DTensor around a plain tensor is quantized on every rank
(:mod:`qcompile.ir.sharding`). A weight that is stored as codes (:mod:`qcompile.stored`) is quantized already. Every
other wrapper brings products of its own (torchao's integer and float8 weights, nested tensors): it has no elements that
a quantizer could read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.fx import Node

from qcompile import compat
from qcompile.ir.operand import Operand
from qcompile.ir.sharding import is_sharded, local_tensor, shards
from qcompile.stored.weight import PackedWeight

from .graph import value_of
from .record import operand_kind
from .views import Dequantize

if TYPE_CHECKING:
    from .spellings import Slot

__all__ = ["obstacle_of_class", "shard_note", "stored_as"]


def stored_as(operand: Node) -> str:
    """How an operand is stored as codes, by us or by a library that `adopt` knows; "" if it is not."""
    value = value_of(operand)
    if isinstance(value, PackedWeight):
        return value.spec
    adopted = Dequantize.match(operand) if operand_kind(operand) == "weight" else None
    return str(adopted.quantizer) if adopted else ""


def obstacle_of_class(operands: Iterable[Tensor]) -> str:
    """Why operands of these classes are left alone; "" if all are plain or packed tensors, or DTensors around plain
    ones.
    """
    for operand in operands:
        local = local_tensor(operand)
        if isinstance(operand, PackedWeight):
            continue
        if compat.is_wrapper_subclass(local):
            name = type(local).__name__
            where = " inside a DTensor" if is_sharded(operand) else ""
            what = "the weight" if compat.is_parameter(operand) else "an operand"
            article = "an" if name[0] in "AEIOU" else "a"
            return f"{what} is {article} {name}{where}, a tensor subclass: it multiplies in its own way"
    return ""


def shard_note(slot: Slot, operand: Operand | None, node: Node) -> str:
    """Which scales of an operand are those of one shard, where a single process would have one for all of them; ""
    if there are none.
    """
    value = slot.of(node).meta["example_value"]
    if operand is None or not is_sharded(value):
        return ""
    first = slot.axis % value.dim() if slot.frame is None else slot.frame.flatten or 1
    row = range(first, first + 1 if slot.frame is None else value.dim())
    ranks = {"row": shards(value, row), "tensor": shards(value, range(value.dim()))}
    quantizer = operand.quantizer
    scales = [quantizer.granularity.kind, *["tensor"] * quantizer.scale.two_level]
    outliers = [operand.outliers.per] if operand.outliers and operand.outliers.per not in scales else []
    return "; ".join(
        f"{what} per {scope} and shard ({ranks[scope]} ranks)"
        for what, scopes in (("one scale", scales), ("outliers", outliers))
        for scope in scopes
        if ranks.get(scope, 1) > 1
    )
