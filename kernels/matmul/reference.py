"""Plain-torch ``scaled_mm``: decode both operands to the output dtype and multiply.

An operand is ``[dense]``, ``[codes, scales]`` or ``[codes, scales, values, positions]`` (an outlier residual to add), stored
``[batch…, rows, size]`` with the axis it was quantized along last. ``transposed`` swaps the two: fprop reads W transposed,
dgrad reads it as stored, wgrad reads X transposed; the same codes serve all three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.recipe import Operand

__all__ = ["decode_operand", "scaled_mm"]


def decode_operand(tensors: list[Tensor], operand: str, size: int, dtype: torch.dtype) -> Tensor:
    """The dense operand ``[batch…, rows, size]`` in ``dtype``."""
    if operand == "dense":
        return tensors[0]
    spec = Operand.parse(operand)
    codes, scales, *residual = tensors
    dense = torch.ops.qcompile.dequantize(codes, scales, str(spec.quantizer), -1, size, dtype)
    if residual:
        dense = torch.ops.qcompile.restore_outliers(dense, *residual, str(spec.outliers), -1)
    return dense


def scaled_mm(
    a: list[Tensor],
    a_operand: str,
    a_size: int,
    a_transposed: bool,
    b: list[Tensor],
    b_operand: str,
    b_size: int,
    b_transposed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``op(a) @ op(b)`` in ``dtype``; 2-D, or 3-D with a common batch."""
    left = decode_operand(a, a_operand, a_size, dtype)
    right = decode_operand(b, b_operand, b_size, dtype)
    return (left.mT if a_transposed else left) @ (right.mT if b_transposed else right)
