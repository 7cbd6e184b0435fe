"""Plain-torch ``scaled_mm``: decode both operands to the output dtype and multiply.

An operand is text and tensors. ``"dense"``: ``[tensor]``. ``"levels <format>"``: ``[codes]``, what they stand for
without a scale, which has been folded into the other operand. Otherwise the text of an :class:`Operand` and ``[codes,
scales]``, followed by ``global_scale`` if its scale rule has two levels and by ``values, positions`` if its outlier
residual is compensated. It is stored ``[batch…, rows, size]`` with the axis it was quantized along last. ``transposed``
swaps the two: fprop reads W transposed, dgrad reads it as stored, wgrad reads X transposed; the same codes serve all
three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.formats import get_format
from qcompile.ir.recipe import Operand
from qcompile.kernels.quantize.reference import decode, unpack

__all__ = ["LEVELS", "decode_operand", "mm_8bit", "scaled_mm"]

#: First word of the text of an operand without scales.
LEVELS = "levels "


def decode_operand(tensors: list[Tensor], operand: str, size: int, dtype: torch.dtype) -> Tensor:
    """The dense operand ``[batch…, rows, size]`` in ``dtype``."""
    if operand == "dense":
        return tensors[0]
    if operand.startswith(LEVELS):
        fmt = get_format(operand.removeprefix(LEVELS))
        return decode(unpack(tensors[0], fmt.bits, size), fmt).to(dtype)
    spec = Operand.parse(operand)
    codes, scales, *rest = tensors
    if spec.quantizer.scale.two_level and not rest:
        msg = f"operand {operand!r} needs codes, scales and the global scale"
        raise ValueError(msg)
    global_scale = rest.pop(0) if spec.quantizer.scale.two_level else None
    dense = torch.ops.qcompile.dequantize(codes, scales, str(spec.quantizer), -1, size, dtype, global_scale)
    if rest:
        dense = torch.ops.qcompile.restore_outliers(dense, *rest, str(spec.outliers), -1)
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
    bias: Tensor | None = None,
) -> Tensor:
    """``op(a) @ op(b)`` in ``dtype``, 2-D or 3-D with a common batch; plus ``bias`` broadcast over the rows (2-D
    only).
    """
    left = decode_operand(a, a_operand, a_size, dtype)
    right = decode_operand(b, b_operand, b_size, dtype)
    left, right = left.mT if a_transposed else left, right.mT if b_transposed else right
    return left @ right if bias is None else torch.addmm(bias, left, right)


def mm_8bit(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
) -> Tensor:
    """``(a @ bᵀ + offset_a + offset_bᵀ) · scale_a · scale_bᵀ + bias`` of 8-bit codes a ``[M, K]`` and b ``[N, K]``,
    summed in float32.
    """
    product = a.float() @ b.float().t()
    if offset_a is not None:
        product = product + offset_a
    if offset_b is not None:
        product = product + offset_b.t()
    product = product * scale_a * scale_b.t()
    return (product if bias is None else product + bias.float()).to(dtype)
