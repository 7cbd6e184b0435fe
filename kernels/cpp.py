"""C++ on CPU: source text → shared library → ``ctypes`` function.

A kernel is one small C++ file without torch headers, generated from the data of a format or an estimator,
built in about half a second and kept on disk in Inductor's cache. The library is called through ``ctypes``
with data pointers and sizes, so the same function serves eager mode, Inductor's extern calls and every site
of a model.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.formulas import float32

__all__ = [
    "ELEMENT_TYPES",
    "PRELUDE",
    "double_literal",
    "find_compiler",
    "float_literal",
    "load",
    "rows_of",
    "supports_dtypes",
    "thread_count",
]

#: C++ structs of :data:`PRELUDE` by torch dtype. All arithmetic is float32, so float64 is left to the
#: references.
ELEMENT_TYPES = {torch.float32: "Float32", torch.bfloat16: "BFloat16", torch.float16: "Float16"}

#: Fewer elements than this are not worth a second thread (at::internal::GRAIN_SIZE).
GRAIN_SIZE = 32768

#: Inductor switches the loop vectorizer off, because its own code is vectorized by hand; and its way of
#: refusing value-changing float optimizations brings back trapping math, which keeps comparisons scalar, and
#: leaves the sign of a zero in doubt. A later flag wins.
COMPILER_FLAGS = (
    "-ftree-loop-vectorize",
    "-fno-trapping-math",
    "-fsigned-zeros",
    "--param=max-tree-if-conversion-phi-args=64",
)

#: Element types as bits with conversions from and to float32 that vectorize, and rounding to small
#: floating-point formats.
_PRELUDE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

template <class To, class From> static inline To bits_as(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// condition ? a : b by bits: compilers see no branch, which they would thread with others until nothing vectorizes.
static inline int32_t select(bool condition, int32_t a, int32_t b) { return b ^ ((a ^ b) & -int32_t(condition)); }
static inline float select(bool condition, float a, float b) {
  return bits_as<float>(select(condition, bits_as<int32_t>(a), bits_as<int32_t>(b)));
}
static inline double select(bool condition, double a, double b) { return condition ? a : b; }

// a · b + c of a product that does not round.
static inline float exact_fma(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

static constexpr uint32_t MAGNITUDE = 0x7fffffff;
static constexpr uint32_t INFINITY_BITS = 0x7f800000;

static inline float power_of_two(int exponent) {  // exact; exponents of normal numbers, and -127
  return bits_as<float>(exponent == -127 ? 1u << 22 : uint32_t(exponent + 127) << 23);
}

// Code of the magnitude `bits` (float32, not NaN) in an IEEE-like minifloat, ties to even, no saturation.
// Normal numbers are rounded as integers; below 2^min_exponent the levels are uniform, and adding a power of
// two rounds to their distance.
template <int mantissa, int min_exponent> static inline uint32_t round_to_minifloat(uint32_t bits) {
  constexpr int shift = 23 - mantissa;
  uint32_t normal = bits - (uint32_t(min_exponent - 1 + 127) << 23);
  normal = (normal + ((1u << (shift - 1)) - 1) + ((normal >> shift) & 1)) >> shift;
  const float magic = power_of_two(min_exponent - mantissa + 23);
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(bits) + magic) - bits_as<uint32_t>(magic);
  return bits < (uint32_t(min_exponent + 127) << 23) ? subnormal : normal;
}

// base^exponent in float64, rounded once, by 2^(exponent · log2 base): log2 m = 2 artanh((m − 1)/(m + 1)) / ln 2 with m
// in [√½, √2), e^t with |t| ≤ ln 2 / 2, both series to below 1e-12. Vectorizes, which the C library's powf does not.
static inline float power(float base, double exponent) {
  const uint32_t all = bits_as<uint32_t>(base);
  const bool small = all < 0x00800000;  // subnormal numbers are scaled by 2^24
  const uint32_t bits = small ? bits_as<uint32_t>(base * 0x1p24f) : all;
  const int32_t whole_log = int32_t(bits - 0x3f3504f3) >> 23;
  const double m = bits_as<float>(bits - (uint32_t(whole_log) << 23));
  const double s = (m - 1) / (m + 1), z = s * s;
  const double series = HORNER_ARTANH;
  double t = exponent * (whole_log - (small ? 24 : 0) + s * series * 2.8853900817779268);
  t = t < -1000 ? -1000 : t > 1000 ? 1000 : t;
  const double whole = (t + 0x1.8p52) - 0x1.8p52, r = (t - whole) * 0.6931471805599453;
  const double result = HORNER_EXP * bits_as<double>(int64_t(int32_t(whole) + 1023) << 52);
  const float of_zero = exponent < 0 ? INFINITY : 0.0f, of_infinity = exponent < 0 ? 0.0f : INFINITY;
  const float finite = base == 0 ? of_zero : float(result);
  return base == INFINITY ? of_infinity : base >= 0 ? finite : NAN;
}

struct Float32 {
  uint32_t bits;
  static constexpr uint32_t magnitude = MAGNITUDE;
  operator float() const { return bits_as<float>(bits); }
  static Float32 from(float value) { return {bits_as<uint32_t>(value)}; }
};

struct BFloat16 {
  uint16_t bits;
  static constexpr uint16_t magnitude = 0x7fff;
  operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
  static BFloat16 from(float value) {
    const uint32_t wide = bits_as<uint32_t>(value);
    const uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return {uint16_t((wide & MAGNITUDE) > INFINITY_BITS ? 0x7fc0 : rounded)};
  }
};

struct Float16 {
  uint16_t bits;
  static constexpr uint16_t magnitude = 0x7fff;
  operator float() const {
    const uint32_t narrow = bits & magnitude;
    // Read as a float32 the exponent is 112 too small, for subnormal numbers too; infinity and NaN keep the
    // top exponent.
    const uint32_t wide = bits_as<uint32_t>(bits_as<float>(narrow << 13) * power_of_two(112));
    return bits_as<float>((narrow >= 0x7c00 ? wide | INFINITY_BITS : wide) | uint32_t(bits & 0x8000) << 16);
  }
  static Float16 from(float value) {
    const uint32_t wide = bits_as<uint32_t>(value), size = wide & MAGNITUDE;
    uint32_t narrow = round_to_minifloat<10, -14>(size);
    narrow = size >= 0x47800000 || narrow > 0x7c00 ? 0x7c00 : narrow;  // 2^16 and above
    narrow = size > INFINITY_BITS ? 0x7e00 : narrow;
    return {uint16_t(narrow | (wide >> 16 & 0x8000))};
  }
};

// max |x| of n elements; bits of magnitudes order like their values with NaN above infinity, so NaN
// propagates.
template <class Element> static inline float absolute_maximum(const Element* x, int64_t n) {
  decltype(x->bits) top = 0;
  for (int64_t k = 0; k < n; ++k) {
    const decltype(top) size = x[k].bits & Element::magnitude;
    top = size > top ? size : top;
  }
  return Element{top};
}
"""


def _horner(variable: str, coefficients: list[float]) -> str:
    """C++ for the float64 polynomial with these coefficients, lowest degree first."""
    text = repr(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        text = f"({coefficient!r} + {variable} * {text})"
    return text


PRELUDE = _PRELUDE.replace(
    "HORNER_ARTANH",
    _horner("z", [1 / (2 * n + 1) for n in range(8)]),  # in s², after the factor s
).replace("HORNER_EXP", _horner("r", [1 / math.factorial(n) for n in range(11)]))


@lru_cache(maxsize=1)
def find_compiler() -> tuple[bool, str]:
    """Whether there is a C++ compiler, and if not, why. Warns once, since everything then runs many times
    slower."""
    # Private torch API (2.11 … 2.15): the search Inductor itself does, so that CXX and its config mean the
    # same to both.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        message = (
            "qcompile: no C++ compiler found, so CPU kernels fall back to plain torch (slow). Install g++ or set CXX."
        )
        warnings.warn(message, UserWarning, stacklevel=2)
        return False, "no C++ compiler found; install g++ or set CXX"
    return True, ""


def supports_dtypes(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether C++ kernels can run on tensors of these dtypes here, and if not, why."""
    for dtype in dtypes:
        if dtype not in ELEMENT_TYPES:
            return False, f"the C++ kernels compute in float32, the tensor is {dtype}".replace("torch.", "")
    return find_compiler()


def _build(source: str) -> ctypes.CDLL:
    """Compile ``source`` unless the library is on disk, and load it.

    The only private torch API here besides the compiler search: ``CppCodeCache`` hashes source and command
    line, locks between processes, and keeps the library in Inductor's cache directory (2.11 … 2.15).
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(PRELUDE + source, extra_flags=COMPILER_FLAGS)


def load(source: str, pointers: int, integers: int, returns: Any = None) -> Callable[..., Any]:
    """The function ``extern "C" run(pointer × pointers, int64_t × integers)`` of ``source``, which follows
    the prelude.

    Pass ``Tensor.data_ptr()`` and ``int``; ``returns`` is the ctypes type of the result, ``None`` for void.
    Raises Inductor's ``CppCompileError`` if the source does not compile.
    """
    run = _build(source).run
    run.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
    run.restype = returns
    return run


def float_literal(value: float) -> str:
    """A C++ float32 literal with exactly the float32 value nearest to ``value``."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return f"{float32(value).hex()}f"


def double_literal(value: float) -> str:
    """A C++ float64 literal."""
    if math.isfinite(value):
        return value.hex()
    return "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"


def rows_of(x: Tensor, axis: int) -> Tensor:
    """``x`` with ``axis`` last, contiguous; a copy only where the layout differs."""
    return x.movedim(axis, -1).contiguous()


def thread_count(elements: int) -> int:
    """Threads worth starting for ``elements``, at most ``torch.get_num_threads()``."""
    return max(1, min(torch.get_num_threads(), elements // GRAIN_SIZE))
