"""Invariants of a graph in the dialect, checked after every pass in tests and under ``debug=True``.

1. After a stage only such ops stand in the graph as :data:`STAGES` lists for it, in the forms it lists.
2. The codes of every quantize reach a dequantize, a quantized_mm, an output, or nothing at all (dead code).
3. Scales have the shape their granularity says.
4. Every decoder reads codes of the width its quantizer packs.
5. No product reads 8-bit codes that lie beside their levels (:attr:`Format.tensor_core_offset`) as levels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.formats import Format
from qcompile.ir.ops import moved_shape, storage_dtype
from qcompile.ir.quantizer import Quantizer

from .graph import aten, is_call, is_gather, item_of, static_size, through_views
from .record import PROVIDER_KEY, REFERENCE, mark_of
from .views import (
    VIEW_OF,
    ClampOutliers,
    CountBits,
    Dequantize,
    DequantizeGroups,
    EncodeCompensated,
    EstimatorMask,
    FakeQuantize,
    Hadamard,
    MaskGradient,
    Mm1Bit,
    Mm8Bit,
    Mm8BitGrouped,
    MmAdd,
    MmBlockScaled,
    MmStored,
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
    Recode,
    RestoreOutliers,
    ScaleGradient,
    TransposeCodes,
    View,
)  # fmt: skip

__all__ = ["STAGES", "VerificationError", "verify"]


class VerificationError(AssertionError):
    """A pass left a graph that breaks an invariant of the dialect."""


# --- what may stand in a graph after each stage ---------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a pass may leave, all told.

    Attributes:
        views: of the ops. forms: ``(node, its view) -> what is wrong``, "" if nothing is.
        takes_out: ops that stay where the pass is disabled, then and in later stages.
    """

    views: frozenset[type[View]]
    forms: tuple[Callable[[Node, Any], str], ...] = ()
    takes_out: frozenset[type[View]] = frozenset()


def _has_no_fold(node: Node, view: Any) -> str:
    if isinstance(view, Quantize) and view.fold is not None:
        return "folds scales in, which only the pass fold does"
    levels = isinstance(view, QuantizedMM) and any(operand.encoding.levels for operand in view.operands)
    return "reads levels without scales, which only the pass fold leaves" if levels else ""


def _has_a_provider(node: Node, view: Any) -> str:
    chosen = not isinstance(view, QuantizedMM) or mark_of(node, PROVIDER_KEY) is not None
    return "" if chosen else "nothing was chosen to run it"


#: What autograd leaves of fake_quantize and split_gradient.
_TRACED: frozenset[type[View]] = frozenset({
    Quantize, QuantizeCompensated, Dequantize, Hadamard, ClampOutliers, RestoreOutliers, EstimatorMask, MaskGradient,
    ScaleGradient,
})  # fmt: skip
_FUSED = _TRACED | {QuantizedMM}
_FOLDED = _FUSED | {QuantizeGroups}
_RECOMPUTED = _FOLDED | {EncodeCompensated}
_LOWERED = _TRACED | {
    EncodeCompensated, Recode, TransposeCodes, Mm8Bit, Mm1Bit, CountBits, MmBlockScaled, MmStored, QuantizeGroups,
    Mm8BitGrouped, DequantizeGroups,
}  # fmt: skip
_ACCUMULATED = _LOWERED | {MmAdd}
_MERGED = _ACCUMULATED | {
    Quantize8Bit, Quantize8BitMasked, Quantize8BitTransposed, Quantize8BitPair, QuantizeGroupsPair,
}  # fmt: skip
_PRODUCED = _MERGED | {QuantizeProduced}

#: By the name of the pass, in the order of the pipeline.
STAGES: dict[str, Stage] = {
    "account": Stage(_TRACED, (_has_no_fold,)),
    "cancel_rotations": Stage(_TRACED, (_has_no_fold,)),
    "gather_codes": Stage(_TRACED, (_has_no_fold,)),
    "fuse": Stage(_FUSED, (_has_no_fold,)),
    "fold": Stage(_FOLDED),
    "move_factors": Stage(_FOLDED),
    "hints": Stage(_FOLDED),
    "choose_providers": Stage(_FOLDED, (_has_a_provider,)),
    "audit": Stage(_FOLDED),
    "lower_frozen": Stage(_FUSED | _LOWERED),
    "recompute_codes": Stage(_RECOMPUTED | _LOWERED),
    "lower": Stage(_LOWERED, takes_out=frozenset({QuantizedMM})),
    "join_products": Stage(_LOWERED),
    "accumulate": Stage(_ACCUMULATED),
    "merge_quantize": Stage(_MERGED),
    "fuse_producers": Stage(_PRODUCED),
    "audit_encoders": Stage(_PRODUCED),
}

#: What runs before nodes are marked with what runs them.
_BEFORE_CHOICE = tuple(takewhile(lambda name: name != "choose_providers", STAGES))


def verify(graph: Graph, stage: str, disabled: Collection[str] = ()) -> None:
    """Raises :class:`VerificationError` naming the stage, the node and the broken invariant.

    ``stage``: a pass, with the hook that ran it before it (``"joint/fuse"``); any other name allows all that passes
    make. ``disabled``: passes that did not run.
    """
    spec = _spec(graph, stage)
    kept = frozenset(view for name in disabled if name in STAGES for view in STAGES[name].takes_out)
    for node in graph.nodes:
        cls = VIEW_OF.get(node.target) if isinstance(node.target, compat.OpOverload) else None
        if cls is None:
            continue
        if cls is FakeQuantize:
            _fail(stage, node, "fake_quantize survived tracing")
        if cls not in spec.views | kept and not _runs_itself(node):
            _fail(stage, node, "this op does not stand in a graph at this stage")
        view = cls.of(node)
        for form in spec.forms:
            if wrong := form(node, view):
                _fail(stage, node, wrong)
        if check := _CHECKS.get(cls):
            check(stage, node, view)


def _runs_itself(node: Node) -> bool:
    """Whether a product was left to its op's own kernel, which nothing takes out."""
    chosen = mark_of(node, PROVIDER_KEY)
    return chosen is not None and chosen.provider == REFERENCE and is_call(node, QuantizedMM.op)


def _spec(graph: Graph, stage: str) -> Stage:
    hook, _, name = stage.rpartition("/")
    # The body of a nested region comes to the joint hook a second time, with the graph that calls it.
    if hook == "joint" and name in _BEFORE_CHOICE and any(mark_of(node, PROVIDER_KEY) for node in graph.nodes):
        name = "lower_frozen"
    return STAGES.get(name, Stage(_FUSED | _PRODUCED))


# --- single ops -----------------------------------------------------------------------------------------------------


def _check_quantize(stage: str, node: Node, view: Quantize) -> None:
    shape = moved_shape(view.x.meta["val"].shape, view.axis)
    codes, scales = node.meta["val"]
    _expect_stored(stage, node, view.quantizer, shape, codes, scales)
    for user in node.users:
        item = item_of(user)
        if item is None:
            _fail(stage, node, f"its tuple is read by {user.name}")
        elif item[1] == 0 and user.users and not any(_consumes_codes(reader) for reader in _readers(user)):
            _fail(stage, node, "its codes reach neither a dequantize nor a quantized_mm")


def _check_dequantize(stage: str, node: Node, view: Dequantize) -> None:
    value = node.meta["val"]
    shape = moved_shape(value.shape, view.axis)
    _expect_stored(stage, node, view.quantizer, shape, view.codes.meta["val"], view.scales.meta["val"])
    if value.dtype != view.dtype:
        _fail(stage, node, f"decodes to {value.dtype}, not {view.dtype}")


def _check_offsets(stage: str, node: Node, view: Mm8Bit) -> None:
    sides = (view.a, view.offset_b), (view.b, view.offset_a)
    for position, (codes, sums) in enumerate(sides):
        fmt = _format_of_8bit_codes(codes)
        if fmt is not None and fmt.tensor_core_offset and sums is None:
            _fail(stage, node, f"operand {position} has codes of {fmt.name}, without the sums of the other's codes")


_CHECKS: dict[type[View], Callable[[str, Node, Any], None]] = {
    Quantize: _check_quantize,
    Dequantize: _check_dequantize,
    Mm8Bit: _check_offsets,
}


def _format_of_8bit_codes(codes: Node) -> Format | None:
    """The format whose levels 8-bit codes stand for, ``None`` where the graph does not say."""
    item = item_of(codes)
    source = codes if item is None else item[0]
    if masked := Quantize8BitMasked.match(source):
        return masked.operand.stored.format
    views = (cls.match(source) for cls in (Recode, Quantize8Bit, Quantize8BitTransposed, Quantize8BitPair))
    return next((view.quantizer.format for view in views if view is not None), None)


def _readers(node: Node) -> list[Node]:
    """Users of a tensor, of its views and of rows gathered from it."""
    found = []
    for user in node.users:
        found += _readers(user) if (through_views(user) is not user or is_gather(user)) and user.users else [user]
    return found


#: Ops that read codes; after `lower` those of tensor cores too.
_READ_CODES: tuple[type[View], ...] = (
    Dequantize, QuantizedMM, Recode, TransposeCodes, Mm8Bit, Mm8BitGrouped, Mm1Bit, CountBits, MmBlockScaled, MmStored,
)  # fmt: skip
_CODE_READERS = (*(view.op for view in _READ_CODES), aten.view.dtype)


def _consumes_codes(node: Node) -> bool:
    return node.op == "output" or is_call(node, *_CODE_READERS)


def _expect_stored(stage: str, node: Node, quantizer: Quantizer, shape: Any, codes: Any, scales: Any) -> None:
    """Codes and scales of a tensor of ``shape``, the axis they were quantized along last."""
    _expect(stage, node, "codes", codes, [*shape[:-1], quantizer.packed_size(shape[-1])], torch.uint8)
    _expect(stage, node, "scales", scales, quantizer.scale_shape(tuple(shape)), storage_dtype(quantizer))


def _expect(stage: str, node: Node, what: str, value: torch.Tensor, shape: Any, dtype: torch.dtype) -> None:
    known = [(static_size(a), static_size(b)) for a, b in zip(value.shape, shape, strict=False)]
    wrong = len(value.shape) != len(shape) or any(a is not None and b is not None and a != b for a, b in known)
    if wrong or value.dtype != dtype:
        _fail(stage, node, f"{what} are {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}")


def _fail(stage: str, node: Node, why: str) -> None:
    msg = f"after {stage}: {node.name} ({node.target}): {why}"
    raise VerificationError(msg)
