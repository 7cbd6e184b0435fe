"""The ops between a lowered graph and 8-bit tensor cores; `lower` puts them into the post-grad graphs.

A grid whose values are all exact in an 8-bit tensor-core type (:attr:`Format.tensor_core_type`) can be multiplied there
without rounding. The operand of such a product is

* **8-bit codes** ``[rows, K]``, contiguous ("K-major", the only layout in which Hopper reads 8-bit operands), in the
  torch dtype of that type; and
* **scales**, float32 ``[rows, 1]`` or ``[1, 1]``, those of ``quantize``. Where 8-bit codes are levels times
  :attr:`Format.tensor_core_factor` (half-integer grids in int8), whoever emits the product divides them by it.

Where an :attr:`Format.tensor_core_offset` has been subtracted as well (the half-integers of 8 bits), a product of codes
lacks what lies between it and that of the levels, times their factors. With codes p, q and offsets c, d::

    Σ (p + c)(q + d)  =  Σ p q  +  d Σ (p + c)  +  c Σ q

Whoever emits the product adds the last two as ``offset_a`` (one per row of a) and ``offset_b`` (one per row of b), as
zero points of quantized networks are handled (Jacob et al., arXiv 1712.05877, §2.3).

Tensor cores for single bits count those that are set in both of two stored rows. With levels ±½, of which −½ is a set
bit, that lacks counts of the bits of each row, which are added as offsets in the same way::

    Σ x y  =  Σ bit_x bit_y  −  ½ Σ bit_x  −  ½ Σ bit_y  +  K/4

Tensor cores for FP4 take E2M1 codes as they are stored, two per byte, and a scale for every block along K
(:data:`BLOCK_SCALES`) instead of one for a row. Which rule a scale followed from is nothing to them. Scales of squares
are scales of blocks along either axis, so such codes can be transposed, packed as they are.

A weight that is stored as codes (:mod:`.stored`) beside activations in high precision is decoded where it is
multiplied.

None of these ops is differentiable, and none is saved for the backward: packed codes are.
"""

from __future__ import annotations

import torch

from .formats import Format
from .operand import Operand
from .ops import LIB, padded_rows, register_meta
from .quantizer import Quantizer

__all__ = ["BLOCK_SCALES", "TENSOR_CORE_DTYPES", "block_scales", "tensor_core_dtype"]

_SCHEMAS = (
    # Row-wise quantization of x [R, K], optionally of x · fold (float32, K elements): 8-bit codes [R, K], scales
    # [R, 1], and, if `packed`, codes as `quantize` stores them (else uint8 [R, 0]).
    "quantize_8bit(Tensor x, str quantizer, bool packed, Tensor? fold=None) -> (Tensor, Tensor, Tensor)",
    # The same by a whole operand, with its transform (whose rotation divides K), and the packed mask of its estimator:
    # uint8 [R, ceil(K/8)], or [R, 0] if that has none. 8-bit codes that are not asked for are uint8 [R, 0].
    "quantize_8bit_masked(Tensor x, str operand, bool packed, bool eight_bit=True) -> (Tensor, Tensor, Tensor, Tensor)",
    # Codes and scales of quantize_8bit, the codes transposed: [K, R] and [R, 1]; or those of a batch of matrices.
    # `transform`: as in quantize.
    "quantize_8bit_transposed(Tensor x, str quantizer, str transform='') -> (Tensor, Tensor)",
    # quantize_compensated along the last axis of what a producer (kernels/producer.py) makes of up to four tensors. The
    # first has the shape of the result, the others are broadcast to it.
    "quantize_produced(Tensor a, Tensor? b, Tensor? c, Tensor? d, str producer, str operand) "
    "-> (Tensor, Tensor, Tensor)",
    # Two quantizations of one x [M, N]: rows of x · fold, and columns of x · fold_rows (float32, M elements):
    # [M, N], [M, 1], [N, M], [N, 1].
    "quantize_8bit_pair(Tensor x, str quantizer, Tensor? fold, Tensor? fold_rows) -> (Tensor, Tensor, Tensor, Tensor)",
    # quantize_groups of one x along both axes, of x · fold [E, N, 1] and of x · fold_rows [M, 1]: both its results by
    # rows, and then by columns.
    "quantize_groups_pair(Tensor x, str quantizer, Tensor offs, Tensor fold, Tensor fold_rows) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    # Stored codes uint8 [R, packed(K)] as 8-bit codes [R, K], or transposed [K, R]; also of every matrix of a batch.
    # With `offs`, the ends of groups of rows, transposed [K, padded_rows(R, E)] as by quantize_groups.
    "recode(Tensor codes, str quantizer, SymInt size, bool transposed, Tensor? offs=None) -> Tensor",
    # Stored 4-bit codes uint8 [R, ceil(K/2)] of K = `size` columns as those of the transpose, [K, ceil(R/2)].
    "transpose_codes(Tensor codes, SymInt size) -> Tensor",
    # a [M, K] times b [N, K] transposed, plus offset_a [M, 1] and offset_b [N, 1] (float32), times both scales (M or 1,
    # N or 1), plus bias [N]: [M, N] in `dtype`.
    "mm_8bit(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType dtype, Tensor? bias=None, "
    "Tensor? offset_a=None, Tensor? offset_b=None) -> Tensor",
    # The same of stored 1-bit codes a [M, K/8] and b [N, K/8], uint8: it counts the bits that are set in both.
    "mm_1bit(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, ScalarType dtype, Tensor? bias=None, "
    "Tensor? offset_a=None, Tensor? offset_b=None) -> Tensor",
    # Products of groups, which end at `offs` (int32 [E]). Of rows: a [M, K] times the group's own matrix of b [E, N, K]
    # transposed, times scales (M or 1) and ([E, N, 1] or 1), plus bias [E, N]: [M, N]; rows beyond the last group are
    # not written. Of the contraction: a [N, P] times b [K, P] transposed, P padded as by quantize_groups, times scales
    # ([E, N, 1] or 1) and ([E, K, 1] or 1): [E, N, K], 0 for a group without rows.
    "mm_8bit_grouped(Tensor a, Tensor b, Tensor offs, Tensor scale_a, Tensor scale_b, ScalarType dtype, "
    "Tensor? bias=None) -> Tensor",
    # How many bits are set in every row of codes uint8 [R, C]: float32 [R, 1].
    "count_bits(Tensor codes) -> Tensor",
    # Stored E2M1 codes a [M, ceil(K/2)] times b [N, ceil(K/2)] transposed, with scales of blocks along K, both of one
    # dtype of BLOCK_SCALES, times both global scales (float32 []), plus bias [N].
    "mm_block_scaled(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor? global_a, Tensor? global_b, "
    "ScalarType dtype, Tensor? bias=None) -> Tensor",
    # x [M, K] times a stored weight [N, size] transposed, plus bias [N]; or, if `rows` are contracted, x [M, N] times
    # the weight as it is. `scales`: as the quantizer stores them, or their codes if they are nested. `second`: the
    # global scale, or the scales of nested ones, which have an `offset`. `high_first`: the first of a byte's codes is
    # in its high half.
    "mm_stored(Tensor x, Tensor codes, Tensor scales, str stored, SymInt size, bool rows, ScalarType dtype, "
    "Tensor? bias=None, Tensor? second=None, Tensor? offset=None, bool high_first=False) -> Tensor",
    # sum [M, N] plus a [M, K] times b [K, N], of one dtype: added before the product is rounded. Generated code writes
    # over `sum`, so nothing else may read it.
    "mm_add(Tensor sum, Tensor a, Tensor b) -> Tensor",
)
for _schema in _SCHEMAS:
    LIB.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

#: Tensor-core type → torch dtype.
TENSOR_CORE_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}


#: Dtype of stored scales → a quantizer whose codes and scales FP4 tensor cores read: MXFP4 (OCP MX v1.0 §5.2) and NVFP4
#: (arXiv 2509.25149 App. B). They read all of the same format, size of blocks and store (:func:`block_scales`).
BLOCK_SCALES = {
    torch.uint8: Quantizer.parse("e2m1 block32 e8m0"),
    torch.float8_e4m3fn: Quantizer.parse("e2m1 block16 e4m3"),
}


def block_scales(quantizer: Quantizer) -> Quantizer | None:
    """The entry of :data:`BLOCK_SCALES` that codes and scales are read as, those of squares with a scale for every row;
    ``None`` if FP4 tensor cores do not read them.
    """
    granularity = quantizer.granularity
    for read in BLOCK_SCALES.values():
        alike = (quantizer.format, quantizer.scale.store, granularity.size) == (
            read.format, read.scale.store, read.granularity.size
        )  # fmt: skip
        if alike and granularity.kind in ("block", "square"):
            return read
    return None


def tensor_core_dtype(fmt: Format) -> torch.dtype:
    """Raises ``ValueError`` for a format that no 8-bit tensor-core type holds exactly."""
    if fmt.tensor_core_type is None:
        msg = f"{fmt.name} has values that no 8-bit tensor-core type holds"
        raise ValueError(msg)
    return TENSOR_CORE_DTYPES[fmt.tensor_core_type]


@register_meta("quantize_produced")
def _(a, b, c, d, producer, operand):
    *rows, size = a.shape
    codes = a.new_empty([*rows, size], dtype=torch.uint8)
    return codes, *(a.new_empty([*rows, n], dtype=torch.float32) for n in (1, 3))


@register_meta("quantize_8bit")
def _(x, quantizer, packed, fold=None):
    q = Quantizer.parse(quantizer)
    rows, size = x.shape
    codes = x.new_empty([rows, size], dtype=tensor_core_dtype(q.format))
    stored = x.new_empty([rows, q.packed_size(size) if packed else 0], dtype=torch.uint8)
    return codes, x.new_empty([rows, 1], dtype=torch.float32), stored


@register_meta("quantize_8bit_masked")
def _(x, operand, packed, eight_bit=True):
    spec = Operand.parse(operand)
    rows, size = x.shape
    dtype = tensor_core_dtype(spec.stored.format) if eight_bit else torch.uint8
    codes = x.new_empty([rows, size if eight_bit else 0], dtype=dtype)
    stored = x.new_empty([rows, spec.stored.packed_size(size) if packed else 0], dtype=torch.uint8)
    mask = x.new_empty([rows, (size + 7) // 8 if spec.estimator.kind.mask else 0], dtype=torch.uint8)
    return codes, x.new_empty([rows, 1], dtype=torch.float32), stored, mask


@register_meta("quantize_8bit_transposed")
def _(x, quantizer, transform=""):
    *batch, rows, size = x.shape
    codes = x.new_empty([*batch, size, rows], dtype=tensor_core_dtype(Quantizer.parse(quantizer).format))
    return codes, x.new_empty([*batch, rows, 1], dtype=torch.float32)


@register_meta("quantize_8bit_pair")
def _(x, quantizer, fold, fold_rows):
    rows, columns = x.shape
    dtype = tensor_core_dtype(Quantizer.parse(quantizer).format)
    return (
        x.new_empty([rows, columns], dtype=dtype),
        x.new_empty([rows, 1], dtype=torch.float32),
        x.new_empty([columns, rows], dtype=dtype),
        x.new_empty([columns, 1], dtype=torch.float32),
    )


@register_meta("quantize_groups_pair")
def _(x, quantizer, offs, fold, fold_rows):
    (rows, columns), groups = x.shape, offs.shape[0]
    return (
        x.new_empty([rows, columns], dtype=torch.uint8),
        x.new_empty([rows, 1], dtype=torch.float32),
        x.new_empty([columns, padded_rows(rows, groups)], dtype=torch.uint8),
        x.new_empty([groups, columns, 1], dtype=torch.float32),
    )


@register_meta("recode")
def _(codes, quantizer, size, transposed, offs=None):
    *batch, rows, _ = codes.shape
    if offs is not None:
        rows = padded_rows(rows, offs.shape[0])
    shape = [*batch, size, rows] if transposed else [*batch, rows, size]
    return codes.new_empty(shape, dtype=tensor_core_dtype(Quantizer.parse(quantizer).format))


@register_meta("transpose_codes")
def _(codes, size):
    return codes.new_empty([size, (codes.shape[0] + 1) // 2])


@register_meta("count_bits")
def _(codes):
    return codes.new_empty([codes.shape[0], 1], dtype=torch.float32)


@register_meta("mm_1bit")
@register_meta("mm_8bit")
def _(a, b, scale_a, scale_b, dtype, bias=None, offset_a=None, offset_b=None):
    return a.new_empty([a.shape[0], b.shape[0]], dtype=dtype)


@register_meta("mm_8bit_grouped")
def _(a, b, offs, scale_a, scale_b, dtype, bias=None):
    shape = [a.shape[0], b.shape[1]] if b.dim() == 3 else [offs.shape[0], a.shape[0], b.shape[0]]
    return a.new_empty(shape, dtype=dtype)


@register_meta("mm_stored")
def _(x, codes, scales, stored, size, rows, dtype, bias=None, second=None, offset=None, high_first=False):
    return x.new_empty([x.shape[0], size if rows else codes.shape[0]], dtype=dtype)


@register_meta("mm_add")
def _(sum, a, b):
    return torch.empty_like(sum)


@register_meta("mm_block_scaled")
def _(a, b, scale_a, scale_b, global_a, global_b, dtype, bias=None):
    return a.new_empty([a.shape[0], b.shape[0]], dtype=dtype)
