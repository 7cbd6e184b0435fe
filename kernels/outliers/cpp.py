"""C++ outlier clamping: one pass that finds both bounds of a row, clamps, and collects what was cut.

The bounds are the same order statistics as the reference's, so clamped values and the residual agree bit for bit. The
residual is listed in the order of positions, the reference's in the order of a top-k; ties at a bound carry the value 0
in both.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qcompile.ir.ops import clamped_counts, index_dtype
from qcompile.ir.outliers import OutlierClamp, Outliers
from qcompile.kernels.cpp import ELEMENT_TYPES, load, rows_of, supports_dtypes, thread_count

__all__ = ["clamp_outliers", "restore_outliers", "supports_clamp", "supports_restore"]

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


# The element of rank `rank` among `keys`, ascending. A handful of ranks from the edge, a sorted list of the candidates
# is rarely touched and beats a partial sort.
_CLAMP = r"""
#include <algorithm>
#include <vector>

static constexpr int32_t NAN_KEY = INT32_MAX;  // above every number, as torch.topk orders NaN

static inline int32_t key_of(float value) {  // orders like the value; both zeros are equal
  const int32_t bits = bits_as<int32_t>(value + 0.0f);
  return value != value ? NAN_KEY : bits ^ ((bits >> 31) & 0x7fffffff);
}

static inline float value_of(int32_t key) {
  return bits_as<float>(key == NAN_KEY ? 0x7fc00000 : key ^ ((key >> 31) & 0x7fffffff));
}

template <class Key> static int32_t of_rank(Key key, int64_t size, int64_t rank, std::vector<int32_t>& best) {
  best.clear();
  if (rank >= 64) {
    for (int64_t k = 0; k < size; ++k) best.push_back(key(k));
    std::nth_element(best.begin(), best.begin() + rank, best.end());
    return best[rank];
  }
  for (int64_t k = 0; k <= rank; ++k) best.push_back(key(k));
  std::sort(best.begin(), best.end());
  for (int64_t k = rank + 1; k < size; ++k) {
    const int32_t candidate = key(k);
    if (candidate >= best[rank]) continue;
    int64_t place = rank;
    for (; place > 0 && best[place - 1] > candidate; --place) best[place] = best[place - 1];
    best[place] = candidate;
  }
  return best[rank];
}

// Lists `count` elements beyond `bound` (key order `key`), then ties with it, and clamps them.
template <class Key>
static void cut(Key key, int32_t bound, float limit, const ELEMENT* x, ELEMENT* clamped, float* values, POSITION*
positions,
                int64_t size, int64_t count) {
  int64_t strict = 0, n = 0;
  for (int64_t k = 0; k < size; ++k) strict += key(k) < bound;
  int64_t ties = count - strict;
  for (int64_t k = 0; k < size && n < count; ++k) {
    const int32_t candidate = key(k);
    if (candidate < bound || (candidate == bound && ties-- > 0)) {
      values[n] = candidate < bound ? float(x[k]) - limit : 0.0f;
      positions[n++] = POSITION(k);
      if (candidate < bound && x[k] == x[k]) clamped[k] = ELEMENT::from(limit);
    }
  }
}

extern "C" void run(const ELEMENT* x, ELEMENT* clamped, float* values, POSITION* positions, int64_t rows, int64_t size,
                    int64_t low, int64_t high, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> keys(size), best;
#pragma omp for
    for (int64_t row = 0; row < rows; ++row) {
      const ELEMENT* in = x + row * size;
      ELEMENT* out = clamped + row * size;
      float* residual = values + row * (low + high);
      POSITION* at = positions + row * (low + high);
      for (int64_t k = 0; k < size; ++k) keys[k] = key_of(in[k]);
      std::memcpy(out, in, size * sizeof(ELEMENT));
      const auto ascending = [&](int64_t k) { return keys[k]; };
      const auto descending = [&](int64_t k) { return ~keys[k]; };
      const int32_t lower = of_rank(ascending, size, low, best), upper = of_rank(descending, size, high, best);
      cut(ascending, lower, value_of(lower), in, out, residual, at, size, low);
      cut(descending, upper, value_of(~upper), in, out, residual + low, at + low, size, high);
      if (~upper == NAN_KEY)  // clamping to NaN makes every element NaN
        for (int64_t k = 0; k < size; ++k) out[k] = ELEMENT::from(value_of(NAN_KEY));
    }
  }
}
"""


def supports_clamp(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether :func:`clamp_outliers` handles these dtypes, and if not, why."""
    return supports_dtypes(dtypes)


@cache
def _clamp_kernel(dtype: torch.dtype, positions: torch.dtype) -> Callable[..., None]:
    source = _CLAMP.replace("ELEMENT", ELEMENT_TYPES[dtype]).replace("POSITION", _POSITION_TYPES[positions])
    return load(source, pointers=4, integers=5)


def clamp_outliers(x: Tensor, clamp: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`qcompile.kernels.outliers.reference.clamp_outliers`; float32, bfloat16 or float16."""
    spec = OutlierClamp.parse(clamp)
    rows = rows_of(x, axis)
    lead = list(rows.shape[:-1]) if spec.per == "row" else []
    size = rows.shape[-1] if spec.per == "row" else rows.numel()
    low, high = clamped_counts(spec, size)
    buffer = torch.empty_like(rows)
    values = torch.empty([*lead, low + high], dtype=torch.float32)
    positions = torch.empty([*lead, low + high], dtype=index_dtype(size))
    if x.numel():
        pointers = rows.data_ptr(), buffer.data_ptr(), values.data_ptr(), positions.data_ptr()
        kernel = _clamp_kernel(x.dtype, positions.dtype)
        kernel(*pointers, math.prod(lead), size, low, high, min(thread_count(x.numel()), max(1, math.prod(lead))))
    moved = buffer.movedim(-1, axis)
    fitting = torch.empty_like(x)
    return (moved if moved.stride() == fitting.stride() else fitting.copy_(moved)), values, positions


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
    per = Outliers.parse(clamp).per
    rows = () if per == "tensor" else moved.shape[:-1]
    if per == "column":
        positions = positions.expand(values.shape)
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
