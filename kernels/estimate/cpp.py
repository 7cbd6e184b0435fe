"""C++ backward estimators: bit masks and the DGE slope, from the formulas of :mod:`qcompile.ir.estimators`.

The masks equal the reference bit for bit. So does the slope of ``dge`` up to its power |v|^(1/k − 1): it is
evaluated in float64 and rounded once, at most 0.501 units in the last place from the true value, where
torch's own (Sleef in the bulk of a tensor, the C library at its end) is within 1. So the two float32 powers
are equal or neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qcompile.ir.estimators import Estimator, clip_limit, trust_threshold
from qcompile.ir.formats import Format
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.cpp import ELEMENT_TYPES, float_literal, load, rows_of, supports_dtypes, thread_count
from qcompile.kernels.quantize.cpp import matrix_count, scaled_rows_source, supports_quantize

__all__ = [
    "estimator_mask",
    "mask_gradient",
    "scale_gradient",
    "supports_mask",
    "supports_mask_gradient",
    "supports_slope",
]

Support = tuple[bool, str]

#: Estimator masks as C++ expressions of |y| and the magnitude it is rounded to.
_MASKS: dict[str, Callable[..., str]] = {
    "clip": lambda fmt, s: f"size <= {float_literal(clip_limit(fmt, s))}",
    "trust": lambda fmt, t: (
        f"std::fabs(size - MAGNITUDES[nearest(bits, negative)]) <= {float_literal(trust_threshold(fmt, t))}"
    ),
}

_ESTIMATOR_MASK = r"""
extern "C" void run(const ELEMENT* x, uint8_t* mask, int64_t matrices, int64_t rows, int64_t size,
                    int64_t threads) {
  for_each_row(x, (Stored*)nullptr, matrices, rows, size, threads,
               [&](int64_t row, const auto* values, const float* reciprocals, uint8_t* buffer) {
    for_each_element(size, reciprocals, [&](int64_t k, float reciprocal) {
      const float y = values[k] * reciprocal;
      const uint32_t bits = bits_as<uint32_t>(y) & MAGNITUDE;
      const float size = bits_as<float>(bits);
      [[maybe_unused]] const bool negative = is_negative(y);
      buffer[k] = KEEP;
    });
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

# base^EXPONENT for base = 0, NaN or in [2^-24, 1], by 2^(EXPONENT · log2 base) in float64: log2 m = 2
# artanh((m − 1)/(m + 1)) / ln 2 with m in [√½, √2), e^t with |t| ≤ ln 2 / 2, both series to below 1e-12.
# Vectorizes, which the C library's powf does not.
_POWER = r"""
static inline float power(float base) {
  const uint32_t bits = bits_as<uint32_t>(base);
  const int32_t exponent = int32_t(bits - 0x3f3504f3) >> 23;
  const double m = bits_as<float>(bits - (uint32_t(exponent) << 23));
  const double s = (m - 1) / (m + 1), z = s * s;
  const double series = HORNER_ARTANH;
  double t = EXPONENT * (exponent + s * series * 2.8853900817779268);
  t = t < -1000 ? -1000 : t;
  const double whole = (t + 0x1.8p52) - 0x1.8p52, r = (t - whole) * 0.6931471805599453;
  const double small = HORNER_EXP;
  const double result = small * bits_as<double>(int64_t(int32_t(whole) + 1023) << 52);
  return base == 0 ? POWER_OF_ZERO : base != base ? POWER_OF_NAN : float(result);
}
"""

_DGE_SLOPE = r"""
static inline float slope(float y) {
  float size = bits_as<float>(bits_as<uint32_t>(y) & MAGNITUDE);
  size = size > LARGEST ? LARGEST : size;
  float low = FIRST_LOW, gap = FIRST_GAP;
BINS
  const float position = 2 * (size - low) / gap - 1;
  const float value = power(std::fabs(position)) / K;
  return value > CAP ? CAP : value;
}
"""

_SCALE_GRADIENT = r"""
extern "C" void run(const ELEMENT* x, const GRADIENT* grad, GRADIENT* out, int64_t matrices, int64_t rows,
                    int64_t size, int64_t threads) {
  for_each_row(x, (Stored*)nullptr, matrices, rows, size, threads,
               [&](int64_t row, const auto* values, const float* reciprocals, uint8_t*) {
    const GRADIENT* from = grad + row * size;
    GRADIENT* to = out + row * size;
    for_each_element(size, reciprocals, [&](int64_t k, float reciprocal) {
      to[k] = GRADIENT::from(from[k] * slope(values[k] * reciprocal));
    });
  });
}
"""

#: The bin of an element is found by one comparison per edge; beyond this many edges that is not the way.
MOST_BINS = 16


# --- what is supported --------------------------------------------------------------------------------------


def supports_mask(dtypes: tuple[torch.dtype, ...], quantizer: str, estimator: str, transform: str = "") -> Support:
    """Whether :func:`estimator_mask` handles the arguments, and if not, why."""
    name = Estimator.parse(estimator).name
    if name not in _MASKS:
        return False, f"estimator {name} has no C++ mask"
    return supports_quantize(dtypes, quantizer, transform)


def supports_mask_gradient(dtypes: tuple[torch.dtype, ...]) -> Support:
    """Whether :func:`mask_gradient` handles the dtype of the gradient, and if not, why."""
    return supports_dtypes(dtypes)


def supports_slope(dtypes: tuple[torch.dtype, ...], quantizer: str, estimator: str) -> Support:
    """Whether :func:`scale_gradient` handles the arguments, and if not, why."""
    name = Estimator.parse(estimator).name
    if name != "dge":
        return False, f"estimator {name} has no C++ slope"
    fmt = Quantizer.parse(quantizer).format
    if len(_edges(fmt)) - 1 > MOST_BINS:
        return False, f"{fmt.name} has more than {MOST_BINS} bins, the most the C++ slope compares with"
    return supports_quantize(dtypes, quantizer)


# --- source text --------------------------------------------------------------------------------------------


def _edges(fmt: Format) -> tuple[float, ...]:
    return fmt.magnitudes if fmt.has_zero else (-fmt.magnitudes[0], *fmt.magnitudes)


def _horner(variable: str, coefficients: list[float]) -> str:
    """C++ for the float64 polynomial with these coefficients, lowest degree first."""
    text = repr(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        text = f"({coefficient!r} + {variable} * {text})"
    return text


def _slope_source(fmt: Format, k: float, cap: float) -> str:
    edges = [float_literal(edge) for edge in _edges(fmt)]
    gaps = [float_literal(hi - lo) for lo, hi in zip(_edges(fmt), _edges(fmt)[1:], strict=False)]
    bins = "\n".join(
        f"  low = size >= {edge} ? {edge} : low, gap = size >= {edge} ? {gap} : gap;"
        for edge, gap in zip(edges[1:-1], gaps[1:], strict=True)
    )
    exponent = torch.tensor(1 / k - 1, dtype=torch.float32).item()  # the precision torch's pow takes it in
    artanh = [1 / (2 * n + 1) for n in range(8)]  # in s², after the factor s
    exp = [1 / math.factorial(n) for n in range(11)]
    at_zero = math.inf if exponent < 0 else 1.0 if exponent == 0 else 0.0
    constants = {
        "EXPONENT": repr(exponent),
        "POWER_OF_ZERO": float_literal(at_zero),
        "BINS": bins,
        "CAP": float_literal(cap),
    }
    constants |= {"POWER_OF_NAN": "1.0f" if exponent == 0 else "base"}  # pow(NaN, 0) = 1 in IEEE 754
    constants |= {"HORNER_ARTANH": _horner("z", artanh), "HORNER_EXP": _horner("r", exp)}
    constants |= {"FIRST_LOW": edges[0], "FIRST_GAP": gaps[0], "/ K": f"/ {float_literal(k)}"}
    source = _POWER + _DGE_SLOPE
    for name, text in constants.items():
        source = source.replace(name, text)
    return source


@cache
def _mask_kernel(quantizer: str, estimator: str, transform: str, dtype: torch.dtype) -> Callable[..., None]:
    q, spec = Quantizer.parse(quantizer), Estimator.parse(estimator)
    keep = _MASKS[spec.name](q.format, **dict(spec.parameters))
    source = scaled_rows_source(q, transform) + _ESTIMATOR_MASK.replace("KEEP", keep)
    return load(source.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=2, integers=4)


@cache
def _mask_gradient_kernel(dtype: torch.dtype) -> Callable[..., None]:
    return load(_MASK_GRADIENT.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=3, integers=3)


@cache
def _slope_kernel(quantizer: str, estimator: str, dtype: torch.dtype, gradient: torch.dtype) -> Callable[..., None]:
    q = Quantizer.parse(quantizer)
    slope = _slope_source(q.format, **dict(Estimator.parse(estimator).parameters))  # type: ignore[arg-type]
    source = (scaled_rows_source(q) + slope + _SCALE_GRADIENT).replace("ELEMENT", ELEMENT_TYPES[dtype])
    return load(source.replace("GRADIENT", ELEMENT_TYPES[gradient]), pointers=3, integers=4)


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
    kernel(x.data_ptr(), mask.data_ptr(), *matrix_count(x.shape), thread_count(x.numel()))
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
    pointers = rows.data_ptr(), gradient.data_ptr(), buffer.data_ptr()
    kernel(*pointers, *matrix_count(rows.shape), thread_count(rows.numel()))
    if not shared:
        out.movedim(axis, -1).copy_(buffer)
    return out
