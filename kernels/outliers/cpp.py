"""C++ ``restore_outliers``: one copy and a few additions a row, where the reference makes two copies and
widens the positions.

``clamp_outliers`` stays with the reference: it is dominated by ``torch.topk``, whose order of ties the
positions record.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from qcompile.kernels.cpp import ELEMENT_TYPES, load, supports_dtypes, thread_count
from torch import Tensor

from qcompile.ir.recipe import OutlierClamp

__all__ = ["restore_outliers", "supports_restore"]

_POSITION_TYPES = {
    torch.uint8: "uint8_t",
    torch.int16: "int16_t",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
}

# Each sum is rounded to the element type; `clamp_outliers` never gives one position two values that are not
# 0.
_RESTORE = r"""
extern "C" int64_t run(ELEMENT* x, const RESIDUAL* values, const POSITION* positions, int64_t rows,
                       int64_t size, int64_t count, int64_t threads) {
  int64_t outside = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : outside)
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t j = row * count; j < (row + 1) * count; ++j) {
      const int64_t position = positions[j];
      if (position < 0 || position >= size) {
        ++outside;
      } else {
        ELEMENT& element = x[row * size + position];
        element = ELEMENT::from(element + values[j]);
      }
    }
  }
  return outside;
}
"""


def supports_restore(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether :func:`restore_outliers` handles these dtypes of x and its residual, and if not, why."""
    return supports_dtypes(dtypes)


@cache
def _restore_kernel(dtype: torch.dtype, residual: torch.dtype, positions: torch.dtype) -> Callable[..., int]:
    source = _RESTORE.replace("ELEMENT", ELEMENT_TYPES[dtype]).replace("RESIDUAL", ELEMENT_TYPES[residual])
    source = source.replace("POSITION", _POSITION_TYPES[positions])
    return load(source, pointers=3, integers=4, returns=ctypes.c_int64)


def restore_outliers(x: Tensor, values: Tensor, positions: Tensor, clamp: str, axis: int) -> Tensor:
    """As :func:`qcompile.kernels.outliers.reference.restore_outliers`; float32, bfloat16 or float16.

    Raises ``ValueError`` if values and positions differ in shape, ``IndexError`` for a position outside its
    row.
    """
    out = torch.empty_like(x)
    moved = out.movedim(axis, -1)
    rows = moved.shape[:-1] if OutlierClamp.parse(clamp).per == "row" else ()
    if values.shape != positions.shape or values.shape[:-1] != rows:
        shapes = [tuple(tensor.shape) for tensor in (x, values, positions)]
        msg = f"restore_outliers: shapes of input, values and positions do not fit: {shapes}"
        raise ValueError(msg)
    buffer = moved if moved.is_contiguous() else moved.new_empty(moved.shape)
    buffer.copy_(x.movedim(axis, -1))
    values, positions = values.contiguous(), positions.contiguous()
    size = x.numel() if rows == () else moved.shape[-1]
    kernel = _restore_kernel(x.dtype, values.dtype, positions.dtype)
    pointers = buffer.data_ptr(), values.data_ptr(), positions.data_ptr()
    outside = kernel(*pointers, math.prod(rows), size, values.shape[-1], thread_count(values.numel()))
    if outside:
        msg = f"restore_outliers: {outside} positions lie outside rows of {size} elements"
        raise IndexError(msg)
    if buffer is not moved:
        moved.copy_(buffer)
    return out
