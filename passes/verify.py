"""Invariants of a graph in the dialect, checked after every pass in tests and under ``debug=True``.

1. The codes of every quantize reach a dequantize, a quantized_mm, an output, or nothing at all (dead code).
2. Scales have the shape their granularity says.
3. Every decoder reads codes of the width its quantizer packs.
4. No fake_quantize is left once autograd has been traced.
5. No product reads 8-bit codes that lie beside their levels (:attr:`Format.tensor_core_offset`) as levels.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.ir.formats import Format
from qcompile.ir.ops import moved_shape, storage_dtype
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.recipe import Operand

from .dialect import is_call, static_size, through_views

__all__ = ["VerificationError", "verify"]

ops = torch.ops.qcompile


class VerificationError(AssertionError):
    """A pass left a graph that breaks an invariant of the dialect."""


def verify(graph: Graph, stage: str) -> None:
    """Raises :class:`VerificationError` naming the stage, the node and the broken invariant."""
    for node in graph.nodes:
        if is_call(node, ops.fake_quantize.default):
            _fail(stage, node, "fake_quantize survived tracing")
        elif is_call(node, ops.quantize.default):
            _check_quantize(stage, node)
        elif is_call(node, ops.dequantize.default):
            _check_dequantize(stage, node)
        elif is_call(node, ops.mm_8bit.default):
            _check_offsets(stage, node)


def _check_quantize(stage: str, node: Node) -> None:
    x, text, axis = node.args[:3]
    quantizer = Quantizer.parse(text)  # type: ignore[arg-type]
    shape = moved_shape(x.meta["val"].shape, axis)  # type: ignore[union-attr,arg-type]
    codes, scales = node.meta["val"]
    _expect(stage, node, "codes", codes, [*shape[:-1], quantizer.packed_size(shape[-1])], torch.uint8)
    _expect(stage, node, "scales", scales, quantizer.scale_shape(tuple(shape)), storage_dtype(quantizer))
    for user in node.users:
        if not is_call(user, operator.getitem):
            _fail(stage, node, f"its tuple is read by {user.name}")
        if user.args[1] == 0 and user.users and not any(_consumes_codes(reader) for reader in _readers(user)):
            _fail(stage, node, "its codes reach neither a dequantize nor a quantized_mm")


def _check_dequantize(stage: str, node: Node) -> None:
    codes, scales, text, axis, _, dtype = node.args[:6]
    quantizer = Quantizer.parse(text)  # type: ignore[arg-type]
    shape = moved_shape(node.meta["val"].shape, axis)  # type: ignore[arg-type]
    value = codes.meta["val"]  # type: ignore[union-attr]
    _expect(stage, node, "codes", value, [*shape[:-1], quantizer.packed_size(shape[-1])], torch.uint8)
    _expect(stage, node, "scales", scales.meta["val"], quantizer.scale_shape(tuple(shape)), storage_dtype(quantizer))  # type: ignore[union-attr]
    if node.meta["val"].dtype != dtype:
        _fail(stage, node, f"decodes to {node.meta['val'].dtype}, not {dtype}")


def _check_offsets(stage: str, node: Node) -> None:
    summands: Any = (*node.args[5:], None, None, None)[1:3]
    for position, other in ((0, 1), (1, 0)):
        fmt = _format_of_8bit_codes(node.args[position])
        if fmt is not None and fmt.tensor_core_offset and summands[other] is None:
            _fail(stage, node, f"operand {position} has codes of {fmt.name}, without the sums of the other's codes")


def _format_of_8bit_codes(codes: Any) -> Format | None:
    """The format whose levels 8-bit codes stand for, ``None`` where the graph does not say."""
    source = codes.args[0] if is_call(codes, operator.getitem) else codes
    if is_call(source, ops.quantize_8bit_masked.default):
        return Operand.parse(source.args[1]).stored.format
    if is_call(source, *_MAKE_8BIT_CODES):
        return Quantizer.parse(source.args[1]).format
    return None


def _readers(node: Node) -> list[Node]:
    """Users of a tensor, views of it included."""
    found = []
    for user in node.users:
        found += _readers(user) if through_views(user) is not user and user.users else [user]
    return found


_MAKE_8BIT_CODES = (
    ops.recode.default,
    ops.quantize_8bit.default,
    ops.quantize_8bit_transposed.default,
    ops.quantize_8bit_pair.default,
)

#: Ops that read codes; after `lower` those of tensor cores too.
_CODE_READERS = (
    ops.dequantize.default,
    ops.quantized_mm.default,
    ops.recode.default,
    ops.mm_8bit.default,
    ops.mm_1bit.default,
    ops.count_bits.default,
    ops.mm_block_scaled.default,
    torch.ops.aten.view.dtype,
)


def _consumes_codes(node: Node) -> bool:
    return node.op == "output" or is_call(node, *_CODE_READERS)


def _expect(stage: str, node: Node, what: str, value: torch.Tensor, shape: Any, dtype: torch.dtype) -> None:
    known = [(static_size(a), static_size(b)) for a, b in zip(value.shape, shape, strict=False)]
    wrong = len(value.shape) != len(shape) or any(a is not None and b is not None and a != b for a, b in known)
    if wrong or value.dtype != dtype:
        _fail(stage, node, f"{what} are {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}")


def _fail(stage: str, node: Node, why: str) -> None:
    msg = f"after {stage}: {node.name} ({node.target}): {why}"
    raise VerificationError(msg)
