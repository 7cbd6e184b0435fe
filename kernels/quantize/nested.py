"""Quantize the scales of a quantizer, and get them back (:mod:`qcompile.ir.nested`).

Both are made of the dialect's own ``quantize`` and ``dequantize``, so whatever runs those runs these. No graph has
nested scales yet: its ops read scales as one tensor of the quantizer's store. What holds codes of scales gets that
tensor from :func:`dequantize_scales` first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile.ir.nested import NestedScales

__all__ = ["CodedScales", "dequantize_scales", "quantize_scales"]


class CodedScales(NamedTuple):
    """n scales as codes.

    Attributes:
        codes: uint8 ``[packed(n)]``.
        scales: of those, ``[⌈n / block⌉]`` in the store of their rule.
        offset: float32 ``[]``, what was taken off; ``None`` if nothing was.
        shape: of the scales.
    """

    codes: Tensor
    scales: Tensor
    offset: Tensor | None
    shape: torch.Size


def quantize_scales(scales: Tensor, nested: NestedScales) -> CodedScales:
    """Codes of float32 ``scales`` of any shape. Raises ``TypeError`` for another dtype, ``ValueError`` if there are
    none.
    """
    if scales.dtype != torch.float32:
        msg = f"quantize_scales: scales are {scales.dtype}; those of a rule that stores fp32 are quantized, as absmax's"
        raise TypeError(msg)
    if scales.numel() == 0:
        msg = f"quantize_scales: no scales, shape {tuple(scales.shape)}"
        raise ValueError(msg)
    row = scales.reshape(-1)
    offset = row.mean() if nested.mean else None
    centred = row if offset is None else row - offset
    codes, second = torch.ops.qcompile.quantize(centred, str(nested.quantizer), -1)
    return CodedScales(codes, second, offset, scales.shape)


def dequantize_scales(coded: CodedScales, nested: NestedScales) -> Tensor:
    """The float32 scales that codes stand for, in the shape they had: code's level · second scale + offset."""
    count = math.prod(coded.shape)
    text = str(nested.quantizer)
    row = torch.ops.qcompile.dequantize(coded.codes, coded.scales, text, -1, count, torch.float32)
    return (row if coded.offset is None else row + coded.offset).reshape(coded.shape)
