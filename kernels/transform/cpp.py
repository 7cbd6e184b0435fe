"""C++ block Hadamard rotation: the butterflies of the reference, in its order, so equal to it bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qcompile.kernels.cpp import ELEMENT_TYPES, load, rows_of, supports_dtypes, thread_count

__all__ = ["ROTATE", "hadamard", "supports_hadamard"]

#: ``rotate<n>(values, size)``: blocks of n of ``size`` floats, in place.
ROTATE = r"""
template <int block> static inline void rotate(float* values, int64_t size) {
  const float norm = float(1 / std::sqrt(double(block)));
  for (float* p = values; p < values + size; p += block) {
    for (int distance = 1; distance < block; distance *= 2) {
      for (int i = 0; i < block; i += 2 * distance) {
        for (int j = i; j < i + distance; ++j) {
          const float first = p[j], second = p[j + distance];
          p[j] = first + second;
          p[j + distance] = first - second;
        }
      }
    }
    for (int i = 0; i < block; ++i) p[i] *= norm;
  }
}
"""

_HADAMARD = r"""
extern "C" void run(const ELEMENT* x, const uint8_t* mask, ELEMENT* out, int64_t rows, int64_t size, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    float* values = new float[size + 1];
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      const ELEMENT* from = x + row * size;
      ELEMENT* to = out + row * size;
      const uint8_t* keep = mask + row * ((size + 7) / 8);
      for (int64_t k = 0; k < size; ++k) values[k] = !mask || keep[k / 8] >> k % 8 & 1 ? float(from[k]) : 0;
      rotate<BLOCK>(values, size);
      for (int64_t k = 0; k < size; ++k) to[k] = ELEMENT::from(values[k]);
    }
    delete[] values;
  }
}
"""


def supports_hadamard(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether :func:`hadamard` handles the dtype, and if not, why."""
    return supports_dtypes(dtypes)


@cache
def _kernel(block: int, dtype: torch.dtype) -> Callable[..., None]:
    source = ROTATE + _HADAMARD.replace("BLOCK", str(block))
    return load(source.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=3, integers=3)


def hadamard(x: Tensor, block: int, axis: int, mask: Tensor | None = None) -> Tensor:
    """As :func:`qcompile.kernels.transform.reference.hadamard`; float32, bfloat16 or float16.

    Raises ``ValueError`` if the axis is no multiple of ``block``, or the mask does not fit.
    """
    rows = rows_of(x, axis)
    size, lead = rows.shape[-1], rows.shape[:-1]
    if size % block:
        msg = f"hadamard: {size} elements are no multiple of the block size {block}"
        raise ValueError(msg)
    if mask is not None and mask.shape != (*lead, (size + 7) // 8):
        msg = f"hadamard: mask {tuple(mask.shape)} does not fit {tuple(x.shape)}, axis {axis}"
        raise ValueError(msg)
    out, bits = torch.empty_like(rows), None if mask is None else mask.contiguous()
    pointers = rows.data_ptr(), 0 if bits is None else bits.data_ptr(), out.data_ptr()
    _kernel(block, x.dtype)(*pointers, math.prod(lead), size, thread_count(rows.numel()))
    return torch.empty_like(x).copy_(out.movedim(-1, axis))
