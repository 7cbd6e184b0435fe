"""C++ quantize and dequantize around printed formulas; bit for bit equal to the references.

A row is read twice while it is in cache: once for the absolute maximum (or the sum of squares), once for the codes; a
rotated row is kept in a buffer between the two. Scales and rounding are the formulas of
:mod:`qcompile.kernels.formula`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from qcompile.ir.formats import Format
from qcompile.ir.ops import storage_dtype
from qcompile.ir.quantizer import EDEN_CHUNK, Quantizer
from qcompile.ir.transforms import Transform
from qcompile.kernels.cpp import ELEMENT_TYPES, float_literal, load, rows_of, supports_dtypes, thread_count
from qcompile.kernels.formula import random, rounding, scales
from qcompile.kernels.formula.cpp_target import cpp_function
from qcompile.kernels.formula.layout import why_not_rounded
from qcompile.kernels.transform.cpp import ROTATE

__all__ = [
    "dequantize",
    "matrix_count",
    "pointer_to",
    "quantize",
    "scaled_element",
    "scaled_rows_source",
    "supports_dequantize",
    "supports_quantize",
]

Support = tuple[bool, str]

#: C++ type of a stored scale by the size of its dtype; all but float32 are bits.
_STORED_TYPES = {4: "float", 2: "uint16_t", 1: "uint8_t"}

#: What a scale follows from, by statistic: the type it is gathered in, gathering over elements, and what it is in the
#: end. In float64 the order of summation does not show once a scale is rounded.
_STATISTICS = {
    "amax": r"""
using Gathered = uint32_t;  // the bits of a magnitude

template <class Element> static inline Gathered gather(Gathered top, const Element* x, int64_t count) {
  const uint32_t amax = bits_as<uint32_t>(absolute_maximum(x, count));
  return amax > top ? amax : top;
}

static inline float statistic(Gathered top, int64_t) {
  const float amax = bits_as<float>(top);
  return amax < AMAX_FLOOR ? AMAX_FLOOR : amax;  // keeps NaN
}
""",
    "rms": r"""
using Gathered = double;

template <class Element> static inline Gathered gather(Gathered sum, const Element* x, int64_t count) {
  double part[8] = {};
  int64_t k = 0;
  for (; k + 8 <= count; k += 8) {
    for (int i = 0; i < 8; ++i) part[i] += double(float(x[k + i])) * double(float(x[k + i]));
  }
  for (; k < count; ++k) part[0] += double(float(x[k])) * double(float(x[k]));
  for (int i = 0; i < 8; ++i) sum += part[i];
  return sum;
}

static inline double statistic(Gathered sum, int64_t count) { return std::sqrt(sum / double(count)); }
""",
}
_REDUCTIONS = {"amax": "max", "rms": "+"}

# Of one candidate: its scale, and γ.
_SCALES = r"""
template <class Statistic> static inline Stored scale_ofI(Statistic value, float global_scale, float* gamma) {
  *gamma = reciprocalI(valueWHOLE);
  return Stored(stored_scaleI(valueWHOLE));
}
"""

_ERROR = r"""
template <class Element>
static inline int64_t error_sumI(const Element* x, int64_t count, float gamma, float scale, float unit) {
  int64_t sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t error = scaled_error(x[k], round_levelI(x[k] * std::fabs(gamma)), scale, unit);
    sum += COUNTED;
  }
  return sum;
}
"""

#: What a difference counts for, by the error of a scale rule.
_COUNTED = {"squared": "error * error", "absolute": "error < 0 ? -error : error"}

# Whether the candidate's codes err less than those of the best one so far, whose scale and γ it then replaces.
_CANDIDATE = r"""
        {
          float gamma;
          const Stored other = scale_ofI(value, global_scale, &gamma);
          const int64_t error = of_blockI(gamma, scale_from(other, global_scale));
          if (error < least) { least = error; scale = other; reciprocals[s] = gamma; }
        }
"""
# Its error in a block.
_OF_BLOCK = r"""
        const auto of_blockI = [&](float gamma, float scale) {
          if constexpr (ROTATION > 1) return error_sumI(elements + s * segment, count, gamma, scale, unit);
          int64_t sum = 0;
          for (int64_t row = first; row < last; ++row) {
            sum += error_sumI(x + row * size + s * segment, count, gamma, scale, unit);
          }
          return sum;
        };
"""
_FIRST = r"""
        int64_t least = of_block0(reciprocals[s], scale_from(scale, global_scale));
"""

_LOAD_SCALE = r"""
static inline float scale_from(Stored stored, float global_scale) { return load_scale(storedWHOLE); }
"""

# The band of rows that shares scales is one row, or n rows of one matrix (square); along a row a scale covers
# SEGMENT elements.
_ROWS = r"""
static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Element>
static auto of_all(const Element* x, int64_t rows, int64_t size, int64_t threads) {
  Gathered gathered = 0;
#pragma omp parallel for num_threads(threads) reduction(REDUCTION : gathered)
  for (int64_t row = 0; row < rows; ++row) gathered = gather(gathered, x + row * size, size);
  return statistic(gathered, rows * size);
}

// The elements of a row as they are quantized: those of x, or what the rotation makes of them, in a buffer.
template <class Element, class Value> static inline const Value* row_of(const Element* x, Value* buffer, int64_t size) {
  if constexpr (ROTATION == 1) {
    return x;
  } else {
    for (int64_t k = 0; k < size; ++k) buffer[k] = Value::from(float(x[k]));
    rotate<ROTATION>((float*)buffer, size);
    return buffer;
  }
}

// visit(row, elements, reciprocals, buffer) for all rows: its elements, rotated; one reciprocal a segment; a zeroed
// byte buffer of one row, a multiple of 8.
template <class Element, class Visit>
static void for_each_row(const Element* x, Stored* scales, float global_scale, int64_t matrices, int64_t rows,
                         int64_t size, int64_t threads, Visit visit) {
  const int64_t segment = SEGMENT ? SEGMENT : size > 1 ? size : 1;
  const int64_t segments = SEGMENT ? (size + segment - 1) / segment : 1;
  const int64_t bands = (rows + BAND - 1) / BAND;
  using Value = std::conditional_t<ROTATION == 1, Element, Float32>;
  float whole = 0;
  if (WHOLE) {
    const Stored scale = scale_of0(of_all(x, matrices * rows, size, threads), global_scale, &whole);
    if (scales) scales[0] = scale;
  }
#pragma omp parallel num_threads(threads)
  {
    uint8_t* buffer = new uint8_t[size / 8 * 8 + 8]();
    float* reciprocals = new float[segments + 1];
    Value* rotated = new Value[ROTATION == 1 ? 1 : size + 1];
    reciprocals[0] = whole;
#pragma omp for
    for (int64_t band = 0; band < matrices * bands; ++band) {
      const int64_t first = band / bands * rows + band % bands * BAND;
      const int64_t last = lesser(first + BAND, (band / bands + 1) * rows);
      const Value* elements = row_of(x + first * size, rotated, size);
      for (int64_t s = 0; s < (WHOLE ? 0 : segments); ++s) {
        const int64_t count = lesser(segment, size - s * segment);
        Gathered gathered = 0;
        if constexpr (ROTATION > 1 && !OF_UNROTATED) {
          gathered = gather(gathered, elements + s * segment, count);
        } else {
          for (int64_t row = first; row < last; ++row) gathered = gather(gathered, x + row * size + s * segment, count);
        }
        const auto value = statistic(gathered, (last - first) * count);
        Stored scale = scale_of0(value, global_scale, reciprocals + s);
CHOICE
        if (scales) scales[band * segments + s] = scale;
      }
      for (int64_t row = first; row < last; ++row) {
        visit(row, row == first ? elements : row_of(x + row * size, rotated, size), reciprocals, buffer);
      }
    }
    delete[] buffer;
    delete[] reciprocals;
    delete[] rotated;
  }
}

// visit(k, γ) for the elements of a row.
template <class Visit>
static inline void for_each_element(int64_t size, const float* reciprocals, Visit visit) {
  const int64_t segment = SEGMENT ? SEGMENT : size;
  for (int64_t begin = 0, s = 0; begin < size; begin += segment, ++s) {
    const float reciprocal = reciprocals[s];
    const int64_t end = lesser(begin + segment, size);
    for (int64_t k = begin; k < end; ++k) visit(k, reciprocal);
  }
}

// Packs one row of values of 8 / codes_per_byte bits, lower index in the lower bits. The buffer is padded
// with zeros.
template <int codes_per_byte> static inline void pack(const uint8_t* codes, uint8_t* packed, int64_t size) {
  const int64_t bytes = (size + codes_per_byte - 1) / codes_per_byte;
  for (int64_t j = 0; j < bytes; ++j) {
    uint8_t byte = 0;
    for (int i = 0; i < codes_per_byte; ++i) {
      byte |= uint8_t(codes[j * codes_per_byte + i] << (8 / codes_per_byte * i));
    }
    packed[j] = byte;
  }
}
"""

_QUANTIZE = r"""
extern "C" void run(const ELEMENT* x, const float* global_scale, const int64_t* seed, uint8_t* codes, Stored* scales,
                    int64_t matrices, int64_t rows, int64_t size, int64_t threads) {
  const int64_t packed_size = (size + CODES_PER_BYTE - 1) / CODES_PER_BYTE;
  const int32_t key = seed ? int32_t(uint64_t(*seed)) : 0;
  for_each_row(x, scales, global_scale ? *global_scale : 1, matrices, rows, size, threads,
               [&](int64_t row, const auto* values, const float* reciprocals, uint8_t* buffer) {
    for_each_element(size, reciprocals, [&](int64_t k, float reciprocal) { buffer[k] = encode(SCALED); });
CORRECTION
    pack<CODES_PER_BYTE>(buffer, codes + row * packed_size, size);
  });
}
"""
#: The last argument of a formula that rounds by chance.
_CHANCE = ", uniform(int32_t(uint64_t(row * size + k)), key)"
_CORRECTION = r"""
    const int64_t segments = (size + SEGMENT - 1) / SEGMENT;
    for (int64_t begin = 0; begin < size; begin += CHUNK) {
      const int64_t end = lesser(begin + CHUNK, size);
      double squares = 0, products = 0;
      for (int64_t k = begin; k < end; ++k) {
        const float y = values[k] * reciprocals[k / SEGMENT];
        squares += double(y) * y;
        products += double(y) * decode(buffer[k]);
      }
      for (int64_t s = begin / SEGMENT; s * SEGMENT < end; ++s) {
        const int64_t group = row * segments + s;
        const float chance = uniform(int32_t(uint64_t(group)), key);
        scales[group] = Stored(corrected_scale(scales[group], squares, products, chance));
      }
    }
"""

# A row's scale times its few levels, in the output type, is a table of up to 16 products; 8-bit grids look
# levels up.
_DEQUANTIZE = r"""
extern "C" void run(const uint8_t* codes, const Stored* scales, const float* global_scale, ELEMENT* out,
                    int64_t matrices, int64_t rows, int64_t size, int64_t threads) {
  constexpr int width = 8 / CODES_PER_BYTE, mask = (1 << width) - 1;
  const int64_t packed_size = (size + CODES_PER_BYTE - 1) / CODES_PER_BYTE;
  const int64_t segment = SEGMENT ? SEGMENT : size > 1 ? size : 1;
  const int64_t segments = (size + segment - 1) / segment;
  const int64_t bands = (rows + BAND - 1) / BAND;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < matrices * rows; ++row) {
    const uint8_t* packed = codes + row * packed_size;
    ELEMENT* values = out + row * size;
    const int64_t band = row / rows * bands + row % rows / BAND;
    for (int64_t s = 0; s < segments; ++s) {
      const float scale = scale_from(scales[WHOLE ? 0 : band * segments + s], global_scale ? *global_scale : 1);
      const int64_t begin = s * segment, end = lesser(begin + segment, size);
      const float* const levels = LEVELS OF_MARKED;
      if constexpr (CODES_PER_BYTE == 1) {
        for (int64_t k = begin; k < end; ++k) values[k] = ELEMENT::from(levels[packed[k]] * scale);
      } else {
        ELEMENT products[1 << width];
        for (int i = 0; i <= mask; ++i) products[i] = ELEMENT::from(levels[i] * scale);
        int64_t k = begin;
        if constexpr (SEGMENT % CODES_PER_BYTE == 0) {  // whole bytes, with constant shifts
          for (; k + CODES_PER_BYTE <= end; k += CODES_PER_BYTE) {
            const uint32_t byte = packed[k / CODES_PER_BYTE];
            for (int i = 0; i < CODES_PER_BYTE; ++i) values[k + i] = products[byte >> i * width & mask];
          }
        }
        for (; k < end; ++k) {
          values[k] = products[packed[k / CODES_PER_BYTE] >> k % CODES_PER_BYTE * width & mask];
        }
      }
    }
  }
}
"""

# The code of the nearest level of a code book with many: a binary search among midpoints, infinity past the last.
_SEARCH = r"""
static inline int32_t encode(float y) {
  y = y == y ? y : HIGHEST;
  int rank = 0;
  for (int step = STEP; step; step /= 2) rank += y ABOVE THRESHOLDS[rank + step - 1] ? step : 0;
  return RANKED_CODES[rank];
}
"""

# --- what is supported --------------------------------------------------------------------------------------


def supports_quantize(dtypes: tuple[torch.dtype, ...], quantizer: str, transform: str = "") -> Support:
    """Whether :func:`quantize` handles ``quantizer`` on these dtypes, and if not, why."""
    q, spec = Quantizer.parse(quantizer), Transform.parse(transform)
    if q.rounding == "stochastic" and (reason := rounding.why_not_by_chance(q.format)):
        return False, f"{reason} has no C++ kernel"
    if spec.sparsity:
        return False, "sparsity has no C++ kernel"
    if spec.rotation > 1 and q.granularity.kind not in ("row", "block"):
        return False, f"a rotation under granularity {q.granularity} has no C++ kernel"
    if reason := why_not_rounded(q.format) and why_not_searched(q.format):
        return False, reason
    if len(q.candidates) > 1 and (reason := why_not_rounded(q.format)):
        return False, reason
    return supports_dtypes(dtypes)


def why_not_searched(fmt: Format) -> str:
    """Why no table of levels is searched for the nearest one; empty if one is."""
    if not fmt.codebook:
        return why_not_rounded(fmt)
    return f"{fmt.name} tells 0.0 and −0.0 apart, among too many levels" if fmt.negative_zero_code is not None else ""


def supports_dequantize(dtypes: tuple[torch.dtype, ...], quantizer: str) -> Support:
    """Whether :func:`dequantize` handles ``quantizer`` with this output dtype, and if not, why."""
    return supports_dtypes(dtypes)


# --- source text --------------------------------------------------------------------------------------------


def _table(name: str, values: list[float]) -> str:
    return f"static const float {name}[] = {{{', '.join(map(float_literal, values))}}};"


def _encode_source(q: Quantizer) -> str:
    """``int32_t encode(float)``: the formula, or a search where there is none."""
    fmt = q.format
    if not why_not_rounded(fmt):
        return cpp_function(rounding.encode(fmt, q.of_codes))
    size = 2 ** len(fmt.thresholds).bit_length()
    thresholds = [*fmt.thresholds, *[math.inf] * (size - len(fmt.ranked_codes))]
    codes = ", ".join(map(str, fmt.ranked_codes))
    above = ">=" if q.rounding == "half_up" else ">"
    search = _SEARCH.replace("HIGHEST", float_literal(fmt.range[1])).replace("STEP", str(size // 2))
    tables = _table("THRESHOLDS", thresholds), f"static const uint8_t RANKED_CODES[] = {{{codes}}};"
    return "\n".join((*tables, search.replace("ABOVE", above)))


def _geometry(q: Quantizer, rotation: int = 1) -> str:
    """Constants that say which elements share a scale, and what it follows from."""
    kind, n = q.granularity.kind, q.granularity.size
    of_unrotated = q.scale.statistic == "rms" and kind == "row"
    return "\n".join(
        (
            f"static constexpr int ROTATION = {rotation};",
            f"static constexpr bool OF_UNROTATED = {int(of_unrotated)};",
            f"using Stored = {_STORED_TYPES[storage_dtype(q).itemsize]};",
            f"static constexpr bool WHOLE = {int(kind == 'tensor')};",
            f"static constexpr int64_t SEGMENT = {n}, BAND = {n if kind == 'square' else 1};",
            f"static constexpr int CODES_PER_BYTE = {q.format.codes_per_byte};",
            f"static constexpr float AMAX_FLOOR = {float_literal(q.amax_floor)};",
        )
    )


def scaled_rows_source(q: Quantizer, transform: str = "") -> str:
    """C++ that rotates and scales every row as the reference does: ``for_each_row`` and ``for_each_element``."""
    whole = ", global_scale" if q.scale.two_level else ""
    statistic = q.scale.statistic
    source = [_geometry(q, Transform.parse(transform).rotation), ROTATE, _STATISTICS[statistic]]
    for number in range(len(q.candidates)):
        source.append(cpp_function(scales.stored_scale(q, number), f"stored_scale{number}"))
        source.append(cpp_function(scales.reciprocal(q, number), f"reciprocal{number}"))
        source.append(_numbered(_SCALES.replace("WHOLE", whole), number))
    choice = ""
    if len(q.candidates) > 1:
        source += [cpp_function(scales.load_scale(q)), _LOAD_SCALE.replace("WHOLE", whole)]
        source += [cpp_function(scales.error_unit()), cpp_function(scales.scaled_error())]
        for number, candidate in enumerate(q.candidates):
            source.append(cpp_function(rounding.round_level(candidate.grid, q.nearest), f"round_level{number}"))
            source.append(_numbered(_ERROR.replace("COUNTED", _COUNTED[q.scale.error]), number))
            choice += _numbered(_OF_BLOCK, number) + (_numbered(_CANDIDATE, number) if number else _FIRST)
        choice = "        const float unit = error_unit(value);\n" + choice
    source.append(_ROWS.replace("REDUCTION", _REDUCTIONS[statistic]).replace("CHOICE", choice))
    return "\n".join(source)


def _numbered(source: str, number: int) -> str:
    """``source`` of a candidate, in whose names I stands for its number."""
    return re.sub(r"\b(scale_of|reciprocal|stored_scale|error_sum|round_level|of_block)I\b", rf"\g<1>{number}", source)


def scaled_element(fmt: Format) -> str:
    """What formulas of elements are given: y, and of a pair of grids whether the block has the second, which γ says by
    its sign.
    """
    if fmt.grids:
        return "values[k] * std::fabs(reciprocal), std::signbit(reciprocal)"
    return "values[k] * reciprocal"


# --- kernels ------------------------------------------------------------------------------------------------


@cache
def _quantize_kernel(quantizer: str, transform: str, dtype: torch.dtype) -> Callable[..., None]:
    q = Quantizer.parse(quantizer)
    source, element, correction = scaled_rows_source(q, transform) + _encode_source(q), scaled_element(q.format), ""
    if q.draws:
        source += cpp_function(random.uniform())
    if q.rounding == "stochastic":
        element += _CHANCE
    if q.rounding == "eden":
        source += cpp_function(rounding.decode(q.format)) + cpp_function(scales.corrected_scale(q))
        correction = _CORRECTION.replace("CHUNK", str(EDEN_CHUNK))
    source += _QUANTIZE.replace("SCALED", element).replace("CORRECTION", correction)
    return load(source.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=5, integers=4)


def _levels_of_fields(fmt: Format, count: int) -> list[float]:
    """The levels of ``count`` codes, of as many bits as a code takes in a byte."""
    if fmt.torch_dtype:  # every byte has a level here, NaN codes included
        return torch.arange(count, dtype=torch.uint8).view(getattr(torch, fmt.torch_dtype)).tolist()
    return [*fmt.levels, *[0.0] * (count - len(fmt.levels))]  # 3-bit codes in 4-bit fields


@cache
def _dequantize_kernel(quantizer: str, dtype: torch.dtype) -> Callable[..., None]:
    q = Quantizer.parse(quantizer)
    fields = 2 ** (8 // q.format.codes_per_byte)
    levels = [level for grid in q.format.choices for level in _levels_of_fields(grid, fields)]
    load_scale = _LOAD_SCALE.replace("WHOLE", ", global_scale" if q.scale.two_level else "")
    helpers = "static inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }"
    scale = cpp_function(scales.load_scale(q)) + load_scale
    of_marked = ""
    if q.format.grids:
        scale += cpp_function(scales.is_marked(q))
        of_marked = f"+ (is_marked(scales[WHOLE ? 0 : band * segments + s]) ? {fields} : 0)"
    decoding = _DEQUANTIZE.replace("OF_MARKED", of_marked)
    source = "\n".join((_geometry(q), _table("LEVELS", levels), scale, helpers, decoding))
    return load(source.replace("ELEMENT", ELEMENT_TYPES[dtype]), pointers=4, integers=4)


def matrix_count(shape: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
    """``[..., R, K]`` as (number of matrices, R, K); a vector is one row."""
    return math.prod(shape[:-2]), (shape[-2] if len(shape) > 1 else 1), shape[-1]


def pointer_to(global_scale: Tensor | None, q: Quantizer) -> int | None:
    """What kernels take for the scale of the tensor. Raises ``ValueError`` if the scale rule needs one that is not
    given.
    """
    q.check_global_scale(global_scale)
    return global_scale.data_ptr() if q.scale.two_level and global_scale is not None else None


def quantize(
    x: Tensor,
    quantizer: str,
    axis: int,
    global_scale: Tensor | None = None,
    seed: Tensor | None = None,
    fold: Tensor | None = None,
    transform: str = "",
) -> tuple[Tensor, Tensor]:
    """As :func:`qcompile.kernels.quantize.reference.quantize`; float32, bfloat16 or float16."""
    q = Quantizer.parse(quantizer)
    x = rows_of(x, axis)
    if fold is not None:
        x = x.float() * fold.reshape(-1)
    codes = x.new_empty((*x.shape[:-1], q.packed_size(x.shape[-1])), dtype=torch.uint8)
    scales = x.new_empty(q.scale_shape(tuple(x.shape)), dtype=storage_dtype(q))
    kernel = _quantize_kernel(quantizer, transform, x.dtype)
    key = seed.data_ptr() if q.draws and seed is not None else None
    pointers = x.data_ptr(), pointer_to(global_scale, q), key, codes.data_ptr(), scales.data_ptr()
    kernel(*pointers, *matrix_count(x.shape), thread_count(x.numel()))
    return codes, scales


def dequantize(
    codes: Tensor,
    scales: Tensor,
    quantizer: str,
    axis: int,
    size: int,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> Tensor:
    """As :func:`qcompile.kernels.quantize.reference.dequantize`; ``dtype`` float32, bfloat16 or float16.

    Raises ``ValueError`` if codes or scales do not have the shapes that go with ``size``.
    """
    q = Quantizer.parse(quantizer)
    shape = (*codes.shape[:-1], size)
    if codes.shape[-1] != q.packed_size(size) or tuple(scales.shape) != q.scale_shape(shape):
        shapes = f"codes {tuple(codes.shape)} and scales {tuple(scales.shape)}"
        msg = f"dequantize: {shapes} do not fit {size} elements, {q}"
        raise ValueError(msg)
    codes, scales = codes.contiguous(), scales.contiguous()
    out = codes.new_empty(shape, dtype=dtype)
    kernel = _dequantize_kernel(quantizer, dtype)
    kernel(
        codes.data_ptr(),
        scales.data_ptr(),
        pointer_to(global_scale, q),
        out.data_ptr(),
        *matrix_count(out.shape),
        thread_count(out.numel()),
    )
    return out.movedim(-1, axis)
