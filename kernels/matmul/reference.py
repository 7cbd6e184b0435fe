"""Plain-torch ``quantized_mm``: decode both operands to the output dtype and multiply.

An operand is text and tensors, as :mod:`qcompile.ir.encoding` lists them. It is stored ``[batch…, rows, size]`` with
the axis it was quantized along last. ``transposed`` swaps the two: fprop reads W transposed, dgrad reads it as stored,
wgrad reads X transposed; the same codes serve all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.ir.encoding import Encoding
from qcompile.ir.stored import Stored
from qcompile.ir.tensor_core_ops import BLOCK_SCALES
from qcompile.kernels.quantize.nested import CodedScales, dequantize_scales
from qcompile.kernels.quantize.reference import decode, group_slices, load_scale, spread, swap_halves, unpack

__all__ = [
    "block_of",
    "count_bits",
    "decode_operand",
    "mm_1bit",
    "mm_8bit",
    "mm_8bit_grouped",
    "mm_block_scaled",
    "mm_stored",
    "quantized_mm",
]


def decode_operand(tensors: list[Tensor], operand: str, size: int, dtype: torch.dtype) -> Tensor:
    """The dense operand ``[batch…, rows, size]`` in ``dtype``."""
    encoding = Encoding.parse(operand)
    if encoding.is_dense:
        return tensors[0]
    codes, scales, global_scale, values, positions = encoding.parts(tensors)
    spec = encoding.operand
    if spec is None:
        return decode(unpack(codes, encoding.format.bits, size), encoding.format).to(dtype)
    ops = torch.ops.qcompile
    dense = ops.dequantize(codes, scales, str(spec.quantizer), -1, size, dtype, global_scale)
    if spec.outliers:
        dense = ops.restore_outliers(dense, values, positions, str(spec.outliers), -1)
    return dense


def quantized_mm(
    a: list[Tensor],
    a_operand: str,
    a_size: int,
    a_transposed: bool,
    b: list[Tensor],
    b_operand: str,
    b_size: int,
    b_transposed: bool,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    offs: Tensor | None = None,
) -> Tensor:
    """``op(a) @ op(b)`` in ``dtype``, 2-D or 3-D with a common batch; plus ``bias`` broadcast over the rows (2-D
    only).

    With ``offs``, where groups end, of a matrix a: the product of each group of its rows with its own matrix of b
    ``[E, K, N]``, 0 beyond the last group; or, b being a matrix too, the products ``[E, M, N]`` of each group of the
    contraction. An operand of :func:`~qcompile.kernels.quantize.reference.quantize_groups` has its scales, for instance
    ``[E, M, 1]``, and its layout.
    """

    def read(tensors: list[Tensor], operand: str, size: int, transposed: bool) -> Tensor:
        if offs is not None and len(tensors) > 1 and tensors[1].dim() > tensors[0].dim():
            quantizer = str(Encoding.parse(operand).quantizer)
            dense = torch.ops.qcompile.dequantize_groups(*tensors, quantizer, offs, size, dtype)
        else:
            dense = decode_operand(tensors, operand, size, dtype)
        return dense.mT if transposed else dense

    left, right = read(a, a_operand, a_size, a_transposed), read(b, b_operand, b_size, b_transposed)
    if offs is not None:
        return _grouped_mm(left, right, offs)
    return left @ right if bias is None else torch.addmm(bias, left, right)


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    own = [rows for rows, _ in group_slices(offs)]
    if right.dim() == 2:
        return torch.stack([left[:, rows] @ right[rows] for rows in own])
    out = left.new_zeros([left.shape[0], right.shape[2]])
    for rows, matrix in zip(own, right, strict=True):
        out[rows] = left[rows] @ matrix
    return out


def mm_8bit(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
) -> Tensor:
    """``(a @ bᵀ + offset_a + offset_bᵀ) · scale_a · scale_bᵀ + bias`` of 8-bit codes a ``[M, K]`` and b ``[N, K]``,
    summed in float32.
    """
    product = a.float() @ b.float().t()
    if offset_a is not None:
        product = product + offset_a
    if offset_b is not None:
        product = product + offset_b.t()
    product = product * scale_a * scale_b.t()
    return (product if bias is None else product + bias.float()).to(dtype)


def mm_8bit_grouped(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """Products of groups, which end at ``offs``, of 8-bit codes, summed in float32; scales may be single elements.

    Of rows: a ``[M, K]``, b ``[E, N, K]``, scales ``[M, 1]`` and ``[E, N, 1]``, bias ``[E, N]``: ``[M, N]``, 0 beyond
    the last group. Of the contraction: a ``[N, P]`` and b ``[K, P]`` as ``recode`` pads them, scales ``[E, N, 1]`` and
    ``[E, K, 1]``: ``[E, N, K]``.
    """

    def of_group(scales: Tensor, part: Any) -> Tensor:
        return scales.reshape(1, 1) if scales.numel() == 1 else scales[part]

    slices = list(group_slices(offs))
    if b.dim() == 2:
        products = [
            mm_8bit(a[:, place], b[:, place], of_group(scale_a, group), of_group(scale_b, group), dtype)
            for group, (_, place) in enumerate(slices)
        ]
        return torch.stack(products)
    result = a.new_zeros([a.shape[0], b.shape[1]], dtype=dtype)
    for group, (own, _) in enumerate(slices):
        scales, shift = (of_group(scale_a, own), of_group(scale_b, group)), None if bias is None else bias[group]
        result[own] = mm_8bit(a[own], b[group], *scales, dtype, shift)
    return result


def count_bits(codes: Tensor) -> Tensor:
    """How many bits are set in every row of codes uint8 ``[R, C]``: float32 ``[R, 1]``, exact below 2^24 bits.

    Sums of neighbouring fields of 1, 2 and 4 bits.
    """
    of_2 = codes - (torch.bitwise_right_shift(codes, 1) & 0x55)
    of_4 = (of_2 & 0x33) + (torch.bitwise_right_shift(of_2, 2) & 0x33)
    of_8 = (of_4 + torch.bitwise_right_shift(of_4, 4)) & 0x0F
    return of_8.sum(-1, keepdim=True, dtype=torch.float32)


def mm_1bit(a: Tensor, b: Tensor, *arguments: Any) -> Tensor:
    """:func:`mm_8bit` of the bits, 0 or 1, of a ``[M, K/8]`` and b ``[N, K/8]``, uint8."""
    return mm_8bit(unpack(a, 1, 8 * a.shape[1]), unpack(b, 1, 8 * b.shape[1]), *arguments)


def mm_block_scaled(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    global_a: Tensor | None,
    global_b: Tensor | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> Tensor:
    """``(â @ b̂ᵀ) · global_a · global_b + bias`` ``[M, N]`` in ``dtype``, summed in float32; â and b̂ are codes times
    scales.

    a ``[M, ⌈K/2⌉]`` and b ``[N, ⌈K/2⌉]`` uint8, two E2M1 codes per byte as `quantize` packs them; scales with one
    column for every block along K, both uint8 (E8M0, 32 elements; OCP MX v1.0 §5.2) or both float8_e4m3fn (16 elements;
    NVFP4, arXiv 2509.25149 App. B); global scales float32 ``[]``; bias ``[N]`` floating point. Raises ``ValueError``
    for scales of other dtypes.
    """
    block_of(scale_a, scale_b)
    product = _block_scaled(a, scale_a) @ _block_scaled(b, scale_b).t()
    for factor in (global_a, global_b):
        product = product if factor is None else product * factor
    return (product if bias is None else product + bias.float()).to(dtype)


def block_of(scale_a: Tensor, scale_b: Tensor) -> int:
    """How many elements share a scale. Raises ``ValueError`` if tensor cores do not take such scales."""
    if scale_a.dtype != scale_b.dtype or scale_a.dtype not in BLOCK_SCALES:
        got = f"{scale_a.dtype} and {scale_b.dtype}"
        msg = f"mm_block_scaled takes scales that are both uint8 (E8M0) or both float8_e4m3fn; got {got}"
        raise ValueError(msg)
    return BLOCK_SCALES[scale_a.dtype].granularity.size


def _block_scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Float32 codes times scales: two significant bits times at most four, so nothing is rounded."""
    quantizer = BLOCK_SCALES[scales.dtype]
    levels = decode(unpack(codes, 4, 2 * codes.shape[1]), quantizer.format)
    factors = scales.float() if quantizer.scale.two_level else load_scale(scales, quantizer)
    return levels * spread(factors, levels.shape, quantizer)


def mm_stored(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    stored: str,
    size: int,
    rows: bool,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    second: Tensor | None = None,
    offset: Tensor | None = None,
    high_first: bool = False,
) -> Tensor:
    """``x @ Wᵀ + bias`` ``[M, N]``, or, if ``rows`` are contracted, ``x @ W + bias`` ``[M, size]``, in ``dtype``.

    W ``[N, size]`` is decoded to x's dtype from codes uint8 ``[N, packed(size)]``. ``scales`` are as the quantizer of
    ``stored`` (a :class:`~qcompile.ir.stored.Stored`) stores them, and ``second`` its global scale; or, if they are
    nested, ``scales`` are codes uint8 ``[packed(n)]`` of the n scales, ``second`` the scales of those, and ``offset``
    their mean. ``high_first``: the first of two codes of a byte is in its high half, as bitsandbytes has it.
    """
    spec = Stored.parse(stored)
    q = spec.quantizer
    if high_first:
        codes = swap_halves(codes)
    global_scale = second
    if spec.nested is not None:
        assert second is not None
        shape = torch.Size(q.scale_shape((codes.shape[0], size)))
        scales, global_scale = dequantize_scales(CodedScales(scales, second, offset, shape), spec.nested), None
    dense = torch.ops.qcompile.dequantize(codes, scales, str(q), -1, size, x.dtype, global_scale)
    dense = dense if rows else dense.t()
    return (x @ dense if bias is None else torch.addmm(bias, x, dense)).to(dtype)
