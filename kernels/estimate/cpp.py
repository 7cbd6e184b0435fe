"""C++ backward estimators: bit masks and slopes around the printed formulas of :mod:`qcompile.ir.estimators`.

The masks equal the reference bit for bit. So do slopes, up to powers: they are evaluated in float64 and rounded once,
at most 0.501 units in the last place from the true value, where torch's own (Sleef in the bulk of a tensor, the C
library at its end) is within 1. So two float32 powers are equal or neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.cpp import ELEMENT_TYPES, load, rows_of, supports_dtypes, thread_count
from qcompile.kernels.formula import estimators as formulas
from qcompile.kernels.formula.cpp_target import cpp_function
from qcompile.kernels.quantize.cpp import (
    matrix_count,
    pointer_to,
    scaled_element,
    scaled_rows_source,
    supports_quantize,
)

__all__ = [
    "estimator_mask",
    "mask_gradient",
    "scale_gradient",
    "supports_mask",
    "supports_mask_gradient",
    "supports_slope",
]

Support = tuple[bool, str]

_ESTIMATOR_MASK = r"""
extern "C" void run(const ELEMENT* x, const float* global_scale, uint8_t* mask, int64_t matrices, int64_t rows,
                    int64_t size, int64_t threads) {
  for_each_row(x, (Stored*)nullptr, global_scale ? *global_scale : 1, matrices, rows, size, threads,
               [&](int64_t row, const auto* values, const float* reciprocals, uint8_t* buffer) {
    for_each_element(size, reciprocals, [&](int64_t k, float reciprocal) { buffer[k] = keeps(SCALED); });
    pack<8>(buffer, mask + row * ((size + 7) / 8), size);
  });
}
"""

_MASK_GRADIENT = r"""
extern "C" void run(const ELEMENT* grad, const uint8_t* mask, ELEMENT* out, int64_t rows, int64_t size,
                    int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    const ELEMENT* from = grad + row * size;
    ELEMENT* to = out + row * size;
    const uint8_t* keep = mask + row * ((size + 7) / 8);
    const int64_t whole = size / 8;
    for (int64_t j = 0; j < whole; ++j) {
      for (int i = 0; i < 8; ++i) to[8 * j + i].bits = keep[j] >> i & 1 ? from[8 * j + i].bits : 0;
    }
    for (int64_t k = 8 * whole; k < size; ++k) {
      to[k].bits = keep[whole] >> (k - 8 * whole) & 1 ? from[k].bits : 0;
    }
  }
}
"""

_SCALE_GRADIENT = r"""
extern "C" void run(const ELEMENT* x, const float* global_scale, const GRADIENT* grad, GRADIENT* out, int64_t matrices,
                    int64_t rows, int64_t size, int64_t threads) {
  for_each_row(x, (Stored*)nullptr, global_scale ? *global_scale : 1, matrices, rows, size, threads,
               [&](int64_t row, const auto* values, const float* reciprocals, uint8_t*) {
    const GRADIENT* from = grad + row * size;
    GRADIENT* to = out + row * size;
    for_each_element(size, reciprocals, [&](int64_t k, float reciprocal) {
      to[k] = GRADIENT::from(from[k] * slope(SCALED));
    });
  });
}
"""

# --- what is supported --------------------------------------------------------------------------------------


def supports_mask(dtypes: tuple[torch.dtype, ...], quantizer: str, estimator: str, transform: str = "") -> Support:
    """Whether :func:`estimator_mask` handles the arguments, and if not, why."""
    reason = formulas.why_no_mask(EstimatorSpec.parse(estimator), Quantizer.parse(quantizer).format)
    if reason:
        return False, reason
    return supports_quantize(dtypes, quantizer, transform)


def supports_mask_gradient(dtypes: tuple[torch.dtype, ...]) -> Support:
    """Whether :func:`mask_gradient` handles the dtype of the gradient, and if not, why."""
    return supports_dtypes(dtypes)


def supports_slope(dtypes: tuple[torch.dtype, ...], quantizer: str, estimator: str) -> Support:
    """Whether :func:`scale_gradient` handles the arguments, and if not, why."""
    reason = formulas.why_no_slope(EstimatorSpec.parse(estimator), Quantizer.parse(quantizer).format)
    if reason:
        return False, reason
    return supports_quantize(dtypes, quantizer)


# --- source text --------------------------------------------------------------------------------------------


@cache
def _mask_kernel(quantizer: str, estimator: str, transform: str, dtype: torch.dtype) -> Callable[..., None]:
    q, spec = Quantizer.parse(quantizer), EstimatorSpec.parse(estimator)
    keeps = cpp_function(formulas.mask_of_input(spec, q.format, q.nearest))
    source = scaled_rows_source(q, transform) + keeps + _ESTIMATOR_MASK.replace("SCALED", scaled_element(q.format))
    return load(source.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=3, integers=4)


@cache
def _mask_gradient_kernel(dtype: torch.dtype) -> Callable[..., None]:
    return load(_MASK_GRADIENT.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=3, integers=3)


@cache
def _slope_kernel(quantizer: str, estimator: str, dtype: torch.dtype, gradient: torch.dtype) -> Callable[..., None]:
    q = Quantizer.parse(quantizer)
    slope = cpp_function(formulas.slope(EstimatorSpec.parse(estimator), q.format))
    scaling = _SCALE_GRADIENT.replace("SCALED", scaled_element(q.format))
    source = (scaled_rows_source(q) + slope + scaling).replace("ELEMENT", ELEMENT_TYPES[dtype])
    return load(source.replace("GRADIENT", ELEMENT_TYPES[gradient]), pointers=4, integers=4)


# --- kernels ------------------------------------------------------------------------------------------------


def _rows_to_fill(like: Tensor, axis: int) -> tuple[Tensor, Tensor, bool]:
    """An uninitialized result in the layout of ``like``, a contiguous tensor with ``axis`` last to compute it
    in, and whether the two share memory; if not, the result is to be copied from there."""
    out = torch.empty_like(like)
    moved = out.movedim(axis, -1)
    shared = moved.is_contiguous()
    return out, moved if shared else moved.new_empty(moved.shape), shared


def estimator_mask(
    x: Tensor,
    scales: Tensor,
    quantizer: str,
    estimator: str,
    axis: int,
    global_scale: Tensor | None = None,
    transform: str = "",
) -> Tensor:
    """As :func:`qcompile.kernels.estimate.reference.estimator_mask`; float32, bfloat16 or float16."""
    x = rows_of(x, axis)
    mask = x.new_empty((*x.shape[:-1], (x.shape[-1] + 7) // 8), dtype=torch.uint8)
    kernel = _mask_kernel(quantizer, estimator, transform, x.dtype)
    pointers = x.data_ptr(), pointer_to(global_scale, Quantizer.parse(quantizer)), mask.data_ptr()
    kernel(*pointers, *matrix_count(x.shape), thread_count(x.numel()))
    return mask


def mask_gradient(grad: Tensor, mask: Tensor, axis: int) -> Tensor:
    """As :func:`qcompile.kernels.estimate.reference.mask_gradient`; float32, bfloat16 or float16."""
    out, buffer, shared = _rows_to_fill(grad, axis)
    rows, mask = rows_of(grad, axis), mask.contiguous()
    size = rows.shape[-1]
    if mask.shape != (*rows.shape[:-1], (size + 7) // 8):
        msg = f"mask_gradient: mask {tuple(mask.shape)} does not fit gradient {tuple(grad.shape)}, axis {axis}"
        raise ValueError(msg)
    kernel = _mask_gradient_kernel(grad.dtype)
    pointers = rows.data_ptr(), mask.data_ptr(), buffer.data_ptr()
    kernel(*pointers, math.prod(rows.shape[:-1]), size, thread_count(rows.numel()))
    if not shared:
        out.movedim(axis, -1).copy_(buffer)
    return out


def scale_gradient(
    grad: Tensor,
    x: Tensor,
    scales: Tensor,
    quantizer: str,
    estimator: str,
    axis: int,
    global_scale: Tensor | None = None,
) -> Tensor:
    """As :func:`qcompile.kernels.estimate.reference.scale_gradient`; float32, bfloat16 or float16, see above
    for the bound."""
    if grad.shape != x.shape:
        msg = f"scale_gradient: gradient {tuple(grad.shape)} and input {tuple(x.shape)} differ in shape"
        raise ValueError(msg)
    out, buffer, shared = _rows_to_fill(grad, axis)
    rows, gradient = rows_of(x, axis), rows_of(grad, axis)
    kernel = _slope_kernel(quantizer, estimator, x.dtype, grad.dtype)
    whole = pointer_to(global_scale, Quantizer.parse(quantizer))
    pointers = rows.data_ptr(), whole, gradient.data_ptr(), buffer.data_ptr()
    kernel(*pointers, *matrix_count(rows.shape), thread_count(rows.numel()))
    if not shared:
        out.movedim(axis, -1).copy_(buffer)
    return out
