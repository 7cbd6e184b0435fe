"""Quantize kernels for tensor cores in Triton, equal to :mod:`qcompile.kernels.quantize.reference` bit for bit: which
there are, and what they support.

Every kernel is specialized by a :class:`Grid`, the constants of a quantizer's format; none knows a format by name.
Triton's interpreter (``TRITON_INTERPRET=1``) runs the same kernels.
"""

from __future__ import annotations

from functools import cache

import torch

from qcompile.ir.formats import Format
from qcompile.ir.operand import Operand
from qcompile.ir.ops import COMPENSATED
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.triton import (
    supports_dtypes,
    supports_size,
)

from .grid import unsupported
from .triton_columns import quantize_8bit_pair, quantize_8bit_transposed, quantize_columns
from .triton_groups import quantize_groups, quantize_groups_pair
from .triton_outliers import quantize_compensated, quantize_produced
from .triton_recode import recode
from .triton_rows import quantize_8bit

__all__ = [
    "quantize_8bit",
    "quantize_8bit_pair",
    "quantize_8bit_transposed",
    "quantize_columns",
    "quantize_compensated",
    "quantize_groups",
    "quantize_groups_pair",
    "quantize_produced",
    "recode",
    "supports_columns",
    "supports_quantize_8bit",
    "supports_quantize_8bit_pair",
    "supports_quantize_8bit_transposed",
    "supports_quantize_compensated",
    "supports_quantize_groups",
    "supports_recode",
]

Support = tuple[bool, str]


@cache
def supports_quantize_8bit(dtypes: tuple[torch.dtype, ...], quantizer: str) -> Support:
    """Whether the kernels here quantize tensors of ``dtypes`` so, and if not, why."""
    q = Quantizer.parse(quantizer)
    reason = unsupported(q) or missing_conversion(q.format)
    if not reason and q.scale.statistic == "rms":
        reason = "root mean squares are taken by the kernels of transforms"
    return (False, reason) if reason else supports_dtypes(dtypes)


supports_quantize_8bit_transposed = supports_quantize_8bit_pair = supports_quantize_8bit


def supports_columns(dtypes: tuple[torch.dtype, ...], quantizer: str, by_columns: bool) -> Support:
    """The same for :func:`quantize_columns`; ``by_columns``: whether a matrix is quantized along axis 0, unseeded."""
    q = Quantizer.parse(quantizer)
    if not by_columns:
        return False, "the Triton kernel quantizes the columns of a matrix"
    if q.format.torch_dtype is None:
        return False, f"the Triton kernel writes 8-bit codes, which those of {q.format.name} are not"
    return supports_quantize_8bit(dtypes, quantizer)


def supports_quantize_groups(dtypes: tuple[torch.dtype, ...], quantizer: str) -> Support:
    """The same for :func:`quantize_groups` and :func:`quantize_groups_pair`."""
    return supports_columns(dtypes, quantizer, by_columns=True)


@cache
def supports_recode(dtypes: tuple[torch.dtype, ...], quantizer: str) -> Support:
    """Whether :func:`recode` handles codes of ``quantizer``, and if not, why; ``dtypes`` is empty."""
    return supports_quantize_8bit(dtypes, str(Quantizer(Quantizer.parse(quantizer).format)))


def supports_quantize_compensated(dtypes: tuple[torch.dtype, ...], operand: str, size: int) -> Support:
    """Whether :func:`quantize_compensated` handles rows of ``size`` elements of ``dtypes``, and if not, why."""
    supported, reason = supports_quantize_8bit(dtypes, str(Operand.parse(operand).quantizer))
    if not supported:
        return False, reason
    reason = missing_conversion(Quantizer.parse(COMPENSATED).format)
    return (False, reason) if reason else supports_size(size)


def missing_conversion(fmt: Format) -> str:
    """Why this device cannot write 8-bit codes of ``fmt``; empty if it can, or if there is none."""
    if fmt.tensor_core_type == "int8" or not torch.cuda.is_available():
        return ""
    capability = torch.cuda.get_device_capability()
    return "" if capability >= (8, 9) else f"FP8 needs compute capability 8.9, this device has {capability}"
