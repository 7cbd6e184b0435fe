"""Products of batches of matrices as products of equal groups, which have a kernel for 8-bit codes: experts that each
get as many tokens, by ``bmm`` or ``einsum``. Changes nothing by itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .graph import aten, emit, input_of, is_call, static_size
from .views import ProductOperand, QuantizedMM

__all__ = ["in_groups", "why_no_groups"]

#: Rows and columns that fill a good part of a tile; and groups there are at most, which every program has in registers.
_LEAST_ROWS, _LEAST_COLUMNS, _MOST_GROUPS = 128, 64, 256


def why_no_groups(product: QuantizedMM, rows: Any, columns: Any) -> str:
    """Why a product of batches, ``rows`` tokens times ``columns`` features each, is none of groups; "" if it is."""
    shapes = [operand.first.meta["val"].shape for operand in product.operands]
    if any(len(shape) != 3 for shape in shapes):
        return "a product of batches: not both operands are stacks of matrices"
    batch, height, width = (static_size(size) for size in (shapes[0][0], rows, columns))
    if batch is None or height is None or width is None:
        return "a product of batches: sizes are known at run time only"
    limits = {
        f"{batch} matrices, more than the {_MOST_GROUPS} that the kernel for groups takes": batch > _MOST_GROUPS,
        f"{height} rows each, fewer than the {_LEAST_ROWS} that fill a tile": height < _LEAST_ROWS,
        f"{width} columns each, fewer than the {_LEAST_COLUMNS} that fill a tile": width < _LEAST_COLUMNS,
    }
    return next((f"a product of batches: {reason}" for reason, passed in limits.items() if passed), "")


def in_groups(graph: Graph, near: Node, product: QuantizedMM, contraction: bool = False) -> QuantizedMM:
    """The product of equal groups of rows, ``[B · M, N]`` for ``[B, M, N]``; or with ``contraction``, one operand being
    a dense gradient, of groups of what is contracted, ``[B, M, N]``. Emits what it reads, at the insertion point.
    """
    a, b = product.operands
    rows = _rows_of_group(product, contraction)
    value = a.first.meta["val"]
    # What `arange` is made of: Inductor has no lowering of that itself, and decomposes no longer here.
    options = {"dtype": torch.int32, "device": value.device, "requires_grad": False}
    offs = emit(graph, near, torch.ops.prims.iota.default, value.shape[0], start=rows, step=rows, **options)
    if not contraction:
        return replace(product, a=_flat(graph, near, a), offs=offs)
    return replace(product, a=_flat(graph, near, a, transposed=True), b=_flat(graph, near, b), offs=offs)


def _rows_of_group(product: QuantizedMM, contraction: bool) -> int:
    a, shape = product.a, product.a.first.meta["val"].shape
    return int(shape[-1] if contraction and not a.contracts_rows else shape[-2])


def _flat(graph: Graph, near: Node, operand: ProductOperand, transposed: bool = False) -> ProductOperand:
    """Its matrices below each other. ``transposed``: a dense one has them beside each other."""

    def below(tensor: Node) -> Node:
        shape = tensor.meta["val"].shape
        rows = [shape[0] * shape[1], shape[2]]
        return emit(graph, near, aten.reshape.default, tensor, rows)

    if not (transposed and operand.encoding.is_dense):
        return replace(operand, tensors=tuple(map(below, operand.tensors)))
    first = operand.first
    swapped = is_call(first, aten.permute.default) and first.args[1] == [0, 2, 1]
    upright = input_of(first) if swapped else emit(graph, near, aten.permute.default, first, [0, 2, 1])
    return replace(operand, tensors=(emit(graph, near, aten.permute.default, below(upright), [1, 0]),))
