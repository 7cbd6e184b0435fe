"""What quantize kernels do to a scaled element in Triton: scale, round, code, pack.

The formulas are device functions printed from :mod:`qcompile.kernels.formula`, attributes of a :class:`Grid`. Here
stand the instructions that do the same for some formats faster, and packing. The arithmetic is float32 without
contraction to fused multiply-adds, except where a product is exact. Divisions are IEEE divisions. Triton's interpreter
(``TRITON_INTERPRET=1``) cannot convert to FP8 with rounding or run inline PTX, so those have a second form for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompile.ir.quantizer import RMS_FLOOR
from qcompile.kernels.formula.layout import MANTISSA_BITS, bits_of
from qcompile.kernels.triton import (
    INTERPRETED,
    as_bits,
    as_float,
)

__all__ = [
    "WARP",
    "biased_code",
    "biased_level",
    "eighths",
    "encoded",
    "halves",
    "in_float32",
    "nearest",
    "pack_bits",
    "pack_codes",
    "pack_levels",
    "quarters",
    "rms_scale_pair",
    "saturated",
    "tensor_core_code",
]

WARP = tl.constexpr(32)
#: Float32 numbers around it are one apart, so that adding it rounds to an integer, which then stands in the low bits.
ROUNDER = tl.constexpr(1.5 * 2.0**MANTISSA_BITS)
SIGN = tl.constexpr(-(2**31))
#: PTX: the two float32 numbers that a pair of bfloat16 ones are.
_WIDEN = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
#: PTX: bits in one byte ($0, an integer in the low bits of a float32 number) from eight that are 0 or 1. Only the unit
#: that multiplies adds under a condition at full rate.
_PACK_BITS = tl.constexpr(
    "{.reg .pred bit; .reg .f32 sum; mov.f32 sum, 0f4b000000;"
    + "".join(f"setp.ne.u32 bit, ${i + 1}, 0; @bit add.rn.f32 sum, sum, 0f{bits_of(2.0**i):08x};" for i in range(8))
    + "mov.b32 $0, sum;}"
)
SMALLEST_CLIP = tl.constexpr(RMS_FLOOR)
#: Added to a mean of squares, for roots to be taken of positive numbers only; of float32 numbers' it is no part.
SMALLEST_MEAN = tl.constexpr(1e-300)
# --- scales ---------------------------------------------------------------------------------------------------------


@triton.jit
def rms_scale_pair(squares, size, fmt: tl.constexpr):
    """Scale and reciprocal γ of rows of ``size`` elements with this sum of ``squares``, float64.

    Float64 until both are rounded, so that neither the order of summation shows, nor a product in place of a quotient,
    nor the last bits of quotients and roots, which of the ``rms`` rule are refined approximations on a GPU: IEEE's
    would take branches, and nothing is moved across them into the time that their chain of dependent instructions
    takes.
    """
    if INTERPRETED or fmt.clip == 0.0:
        scale, gamma = fmt.scale_pair(tl.sqrt(squares / size))
    else:
        mean = squares * _inverse(tl.cast(size, tl.float64))
        finite = mean < float("inf")
        clip = fmt.clip * tl.where(finite, _root(mean + SMALLEST_MEAN), mean) + SMALLEST_CLIP
        inverse = tl.where(finite, _inverse(clip), tl.where(mean > 0.0, 0.0, mean))
        scale, gamma = (clip * (1.0 / fmt.largest)).to(tl.float32), (inverse * fmt.largest).to(tl.float32)
    return scale, gamma


@triton.jit
def _inverse(x):
    """1 / x, float64, of a normal number: an approximation of 20 bits, which a cubic and a linear step refine."""
    y = tl.inline_asm_elementwise("rcp.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    error = tl.fma(-y, x, 1.0)
    y = tl.fma(tl.fma(error, error, error), y, y)
    return tl.fma(tl.fma(-y, x, 1.0), y, y)


@triton.jit
def _root(x):
    """√x, likewise."""
    y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f64 $0, $1;", "=d,d", [x], dtype=tl.float64, is_pure=True, pack=1)
    error = tl.fma(-y * y, x, 1.0)
    y = tl.fma(tl.fma(error, 0.375, 0.5), y * error, y)
    root = x * y
    return tl.fma(tl.fma(-root, root, x), 0.5 * y, root)


# --- rounding -------------------------------------------------------------------------------------------------------


@triton.jit
def saturated(y, fmt: tl.constexpr):
    """y within ±largest, NaN as the largest: for rows beyond ``plain_limit``, whose y may be anything."""
    if INTERPRETED:  # of a number and NaN, a GPU takes the number
        y = tl.where(y == y, y, fmt.largest)
    if INTERPRETED or fmt.buckets is None:  # a table saturates
        y = tl.minimum(y, fmt.largest)
        if INTERPRETED or not fmt.is_target:  # conversions to the target saturate
            y = tl.maximum(y, -fmt.largest)
    return y


@triton.jit
def biased_code(y, fmt: tl.constexpr):
    """Int32 whose lowest bits are ⌊y⌋ + bias, of a grid that ``floors``: y rounded to half-integers with ties up."""
    base: tl.constexpr = ROUNDER + fmt.bias
    if INTERPRETED:
        raised = tl.floor(y) + base
    else:
        raised = tl.inline_asm_elementwise(
            "add.rm.f32 $0, $1, $2;", "=f,f,f", [y, base], dtype=tl.float32, is_pure=True, pack=1
        )
    return as_bits(raised)


@triton.jit
def biased_level(code, fmt: tl.constexpr):
    """Float32 level of a :func:`biased_code`."""
    base: tl.constexpr = ROUNDER + fmt.bias
    return as_float(code) - base + 0.5


@triton.jit
def _bucket_table(fmt: tl.constexpr):
    """What this thread's lane holds of its bucket (see :mod:`.buckets`): level, code as bits of float32, and edge."""
    buckets: tl.constexpr = fmt.buckets
    if INTERPRETED:
        lane = tl.arange(0, WARP)
    else:
        lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    number = (lane - 1) & (WARP - 1)
    below, code = fmt.nearest((number + buckets.first).to(tl.float32) * (1.0 / buckets.per_unit))
    following = tl.where(lane == 0, 0, (lane + 1) & (WARP - 1))  # nothing follows on the first
    rise = _of_lane(following, below) - below
    middle = tl.fma(rise, 0.5, below)
    level, _ = fmt.nearest(middle)
    # The edge is the greatest number that stays below: where a tie goes up, the one before it.
    edge = tl.where(level == below, middle, as_float(as_bits(middle) - tl.where(middle > 0.0, 1, -1)))
    edge = tl.where(rise == 0.0, float("inf"), edge) * -buckets.steepness
    return below, as_float(code), edge


@triton.jit
def _of_lane(lane, x):
    """x of other lanes."""
    if INTERPRETED:
        other = tl.reshape(tl.gather(x, tl.reshape(lane, [lane.numel]), 0), lane.shape)
    else:
        other = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
        )
    return other


@triton.jit
def _looked_up(y, fmt: tl.constexpr):
    """:func:`nearest` by table."""
    buckets: tl.constexpr = fmt.buckets
    below, code, edge = _bucket_table(fmt)
    if INTERPRETED:
        size = tl.abs(y) if buckets.of_magnitudes else tl.where(y < buckets.lowest, buckets.lowest, y)
        number = tl.floor(size * buckets.per_unit) - buckets.first
        lane = tl.where(number < WARP - 1, number + 1.0, 0.0).to(tl.int32)
        above = size * buckets.steepness + _of_lane(lane, edge) > 0.0
        lane = (lane + above.to(tl.int32)) & (WARP - 1)
        level = _of_lane(lane, below)
    else:
        level, lane = tl.inline_asm_elementwise(
            buckets.look_up, "=f,=r,f,f,f", [y, below, edge], dtype=(tl.float32, tl.int32), is_pure=True, pack=1
        )
    code = _of_lane(lane, code)
    code = as_bits(code) & (2**fmt.bits - 1)
    if buckets.signed:
        sign = as_bits(y) & SIGN if fmt.has_zero else tl.where(y < 0.0, SIGN, 0)
        level = as_float(as_bits(level) | sign)
        code |= (sign >> (32 - fmt.bits)) & 2 ** (fmt.bits - 1)
    return level, code


@triton.jit
def nearest(y, fmt: tl.constexpr):
    """The level nearest to y (no NaN, see ``plain_limit``) with y's sign, float32, and its code, int32.

    The code is the stored one, or that of :func:`biased_code` for a ``biased`` grid.
    """
    if fmt.floors:
        code = biased_code(y, fmt)
        level = biased_level(code, fmt)
        if fmt.pruned:
            index = as_bits(tl.abs(level) - 0.5 + ROUNDER) & (2 ** (fmt.bits - 1) - 1)
            code = (index + 1) | tl.where(y < 0.0, 2 ** (fmt.bits - 1), 0)
    elif fmt.buckets is not None:
        level, code = _looked_up(y, fmt)
    else:
        level, code = fmt.nearest(y)
    return level, code


@triton.jit
def tensor_core_code(level, fmt: tl.constexpr):
    """A level in the target type, which holds it exactly, less an offset."""
    if fmt.factor != 1.0:
        level *= fmt.factor
    if fmt.target_offset != 0.0:
        level -= fmt.target_offset
    if fmt.target == "int8":
        code = as_bits(level + ROUNDER).to(tl.int8)
    elif fmt.target == "e4m3":
        code = level.to(tl.float8e4nv)
    else:
        code = level.to(tl.float8e5)
    return code


@triton.jit
def encoded(y, fmt: tl.constexpr):
    """8-bit code and code (see :func:`nearest`) of y (no NaN, see ``plain_limit``)."""
    if fmt.is_target and not INTERPRETED:
        eight_bit = tensor_core_code(y, fmt)
        code = eight_bit.to(tl.uint8, bitcast=True)
    else:
        level, code = nearest(y, fmt)
        eight_bit = tensor_core_code(level, fmt)
    return eight_bit, code


@triton.jit
def in_float32(x):
    """x in float32; bfloat16 in pairs, at an instruction per element instead of one and a half."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        wide = x.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(_WIDEN, "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2)
    return wide


@triton.jit
def halves(x, axis: tl.constexpr):
    """Of every two neighbours along ``axis`` of a matrix the first and the second."""
    n: tl.constexpr = x.shape[0]
    m: tl.constexpr = x.shape[1]
    return tl.split(
        tl.reshape(x, [n, m // 2, 2]) if axis == 1 else tl.permute(tl.reshape(x, [n // 2, 2, m]), (0, 2, 1))
    )


@triton.jit
def quarters(x, axis: tl.constexpr):
    """Every first, second, third and fourth of four neighbours."""
    even, odd = halves(x, axis)
    first, third = halves(even, axis)
    second, fourth = halves(odd, axis)
    return first, second, third, fourth


@triton.jit
def eighths(x, axis: tl.constexpr):
    """Every first to eighth of eight neighbours."""
    even, odd = halves(x, axis)
    first, third, fifth, seventh = quarters(even, axis)
    second, fourth, sixth, eighth = quarters(odd, axis)
    return first, second, third, fourth, fifth, sixth, seventh, eighth


@triton.jit
def _joined(codes, width: tl.constexpr, axis: tl.constexpr):
    """Codes of ``width`` bits as half as many of twice that, the lower index in the lower bits."""
    low, high = halves(codes, axis)
    return low + (high << width)


@triton.jit
def pack_codes(codes, fmt: tl.constexpr, axis: tl.constexpr):
    """Codes (see :func:`nearest`) as bytes of stored codes, packed along ``axis`` of a matrix."""
    if fmt.codes_per_byte == 8:
        codes = _joined(codes, 1, axis)
    if fmt.codes_per_byte >= 4:
        codes = _joined(codes, 2, axis)
    if fmt.codes_per_byte >= 2:
        codes = _joined(codes, 4, axis)
    codes = codes.to(tl.uint8)
    return _sign_magnitude(codes, fmt) if fmt.biased else codes


@triton.jit
def pack_bits(keeps, axis: tl.constexpr):
    """Bool as bytes, packed along ``axis`` of a matrix, the lower index in the lower bits."""
    b0, b1, b2, b3, b4, b5, b6, b7 = eighths(keeps.to(tl.int32), axis)
    if INTERPRETED:
        byte = b0 | b1 << 1 | b2 << 2 | b3 << 3 | b4 << 4 | b5 << 5 | b6 << 6 | b7 << 7
    else:
        byte = tl.inline_asm_elementwise(
            _PACK_BITS, "=r,r,r,r,r,r,r,r,r", [b0, b1, b2, b3, b4, b5, b6, b7], dtype=tl.int32, is_pure=True, pack=1
        )
    return byte.to(tl.uint8)


@triton.jit
def pack_levels(level, fmt: tl.constexpr):
    """Levels as bytes of stored codes, packed along axis 1, where :attr:`Grid.pack_8bit` has them from 8-bit codes.

    Four bytes at once: a thread has as many. Levels are converted once more, even and odd ones apart, which costs less
    than to part the bytes of 8-bit codes, and depends on no order in which a thread holds them.
    """
    even, odd = halves(level, 1)
    even, odd = tensor_core_code(even, fmt), tensor_core_code(odd, fmt)
    return tl.inline_asm_elementwise(
        fmt.pack_8bit,
        "=r,r,r",
        [even.to(tl.uint8, bitcast=True), odd.to(tl.uint8, bitcast=True)],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _sign_magnitude(codes, fmt: tl.constexpr):
    """Bytes of stored codes from bytes of ⌊y⌋ + bias: four at once where a thread has as many.

    It has if a warp does: programs of several warps have 32 elements per thread or more.
    """
    if INTERPRETED or codes.shape[0] * codes.shape[1] < 4 * WARP:
        number = codes.to(tl.int32) ^ fmt.in_every_code(fmt.bias)
        sign = number & fmt.in_every_code(2 ** (fmt.bits - 1))
        flip = sign - (sign >> (fmt.bits - 1))
        stored = ((number ^ flip) & fmt.in_every_code(2**fmt.bits - 1)).to(tl.uint8)
    else:
        stored = tl.inline_asm_elementwise(fmt.sign_magnitude, "=r,r", [codes], dtype=tl.uint8, is_pure=True, pack=4)
    return stored
