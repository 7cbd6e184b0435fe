"""What formulas of scale rules and estimators are made of, besides operators and torch's functions.

Each takes tensors, or the scalar values of :mod:`qcompile.kernels.formula.expression`, from which kernels are printed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

__all__ = ["Scalar", "float32", "floor_log2", "power_of_two"]

#: A tensor, or a scalar of a formula.
Scalar = Any

_EXPONENT_BIAS, _MANTISSA_BITS = 127, 23


def power_of_two(exponent: Scalar) -> Scalar:
    """Exact float32 2^exponent of an int32 exponent, clamped to −127 … 127: normal numbers, and E8M0's smallest."""
    bits = (exponent.clamp(-_EXPONENT_BIAS, 127) + _EXPONENT_BIAS) << _MANTISSA_BITS
    return torch.where(bits == 0, 1 << (_MANTISSA_BITS - 1), bits).to(torch.int32).view(torch.float32)


def floor_log2(value: Scalar) -> Scalar:
    """Int32 ⌊log2⌋ of a positive normal float32; −127 of a subnormal one, 128 of infinity and NaN."""
    return (value.view(torch.int32) >> _MANTISSA_BITS) - _EXPONENT_BIAS


def float32(number: float) -> float:
    """The float32 number nearest to ``number``, which a formula computes with; infinite beyond the largest."""
    return ctypes.c_float(number).value
