"""Post-grad graphs: put in the place of every ``quantized_mm`` what `choose_providers` has chosen for it.

Where 8-bit tensor cores hold both operands exactly, they read the codes::

    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm_8bit(recode(codes_x), recode(codes_w), s_x, s_w)

with sums of the codes where these lie beside the levels (:attr:`Format.tensor_core_offset`). Columns of X that are
outliers are multiplied wide with the same columns of W, decoded, and added (``addmm``). `merge_quantize` then joins
``quantize`` and ``recode``. Signs are read as stored where tensor cores count bits, and MXFP4 and NVFP4 where
they multiply FP4::

    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm_1bit(codes_x, codes_w, s_x, s_w, counts of bits)
    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm_block_scaled(codes_x, codes_w, s_x, s_w)

Products of groups, with their ends ``offs``, read a matrix for each group, or codes that are padded to whole steps for
each group where the contraction is in groups::

    quantized_mm([codes_x, s_x], [codes_w, s_w], offs)   ─►   mm_8bit_grouped(recode(codes_x), recode(codes_w), offs, …)

A weight that the graph was given as codes is decoded by the kernel that multiplies it, nested scales too::

    quantized_mm(x, [codes_w, dequantize(codes_s, s_s) + mean])   ─►   mm_stored(x, codes_w, codes_s, s_s, mean)

Elsewhere the operands are decoded for an ATen product, so that Inductor's own choices (cuBLAS, templates, epilogue
fusion) apply to it; one decoded operand serves all products of the graph that read it::

    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm(dequantize(codes_x, s_x), permute(dequantize(codes_w, s_w)))

``quantize``, ``dequantize`` and the estimators stay: they have kernels and Inductor lowerings of their own
(kernels/lowerings.py).

Under Inductor's freezing, where parameters are constants, products for tensor cores are lowered in the joint graph
already (`lower_frozen`): Inductor then computes the weights' 8-bit codes once, instead of recoding them in every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.quantizer import Granularity, Quantizer
from qcompile.ir.tensor_core_ops import tensor_core_dtype
from qcompile.kernels.matmul import providers

from .batches import in_groups
from .dialect import stored_weight
from .graph import aten, emit, static_size, take_over
from .pass_base import Context
from .record import DECODED, PROVIDER_KEY, REFERENCE, mark_of
from .views import (
    CountBits,
    Dequantize,
    DequantizeGroups,
    Mm1Bit,
    Mm8Bit,
    Mm8BitGrouped,
    MmBlockScaled,
    MmStored,
    ProductOperand,
    QuantizedMM,
    Recode,
    RestoreOutliers,
)  # fmt: skip

__all__ = ["lower", "lower_frozen"]


def lower(graph: Graph, context: Context) -> int:
    """Returns how many products were lowered."""
    return _lower(graph, decoded=True)


def lower_frozen(graph: Graph, context: Context) -> int:
    """Products of frozen weights on tensor cores; 0 unless this is an inference graph that Inductor will freeze.

    What would run decoded stays: folded constants would be the wide weights.
    """
    return _lower(graph, decoded=False) if compat.will_freeze(graph) else 0


def _lower(graph: Graph, decoded: bool) -> int:
    made: dict[Any, Node] = {}
    count = 0
    for node in QuantizedMM.calls(graph):
        provision = mark_of(node, PROVIDER_KEY)
        if provision is None:
            msg = f"{node.name}: nothing was chosen to run it; choose_providers runs after whatever makes products"
            raise RuntimeError(msg)
        if provision.provider == REFERENCE or (provision.provider == DECODED and not decoded):
            continue
        lowering = _LOWERINGS.get(provision.provider, _tensor_core_product)
        with graph.inserting_before(node):
            replacement = lowering(graph, node, QuantizedMM.of(node), made)
        take_over(replacement, node)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        count += 1
    return count


# --- products on tensor cores -------------------------------------------------------------------------------------


def _tensor_core_product(graph: Graph, node: Node, product: QuantizedMM, made: dict[Any, Node]) -> Node:
    a, b = (_codes(graph, node, operand, made) for operand in product.operands)
    scale_a, scale_b = _scale(graph, node, product.a, a, made), _scale(graph, node, product.b, b, made)
    own, others = (operand.encoding.format.tensor_core_offset for operand in product.operands)
    # Σ (p + c)(q + d) = Σ p q + d Σ (p + c) + c Σ q
    offsets = _offset(graph, node, a, own, others, made), _offset(graph, node, b, 0.0, own, made)
    result = Mm8Bit(a, b, scale_a, scale_b, product.dtype, product.bias, *offsets).emit(graph, near=node)
    taken = product.a if product.a.takes_columns else product.b if product.b.takes_columns else None
    if taken is None:
        return result
    values, positions = taken.parts.values, taken.parts.positions
    other = (b, scale_b, others) if taken is product.a else (a, scale_a, own)
    wide = _columns(graph, node, *other, positions, product.dtype, made)
    left, right = (values, wide) if taken is product.a else (wide, values)
    transposed = emit(graph, node, aten.permute.default, right, [1, 0])
    return emit(graph, node, aten.addmm.default, result, left, transposed)


def _columns(
    graph: Graph, gemm: Node, codes: Node, scale: Node, offset: float, positions: Node, dtype: torch.dtype, made: Any
) -> Node:
    """Some columns of 8-bit codes, decoded: ``[rows, m]``. They alone are read."""
    key = ("columns", codes, scale, positions, dtype)
    if key not in made:
        levels = emit(graph, gemm, aten.index.Tensor, codes, [None, positions])
        levels = emit(graph, gemm, torch.ops.prims.convert_element_type.default, levels, torch.float32)
        if offset:
            levels = emit(graph, gemm, aten.add.Tensor, levels, offset)
        scaled = emit(graph, gemm, aten.mul.Tensor, levels, scale)
        made[key] = emit(graph, gemm, torch.ops.prims.convert_element_type.default, scaled, dtype)
    return made[key]


def _codes(graph: Graph, gemm: Node, operand: ProductOperand, made: dict[Any, Node]) -> Node:
    """8-bit codes of one operand, contraction last."""
    fmt, codes, transposed = operand.encoding.format, operand.first, operand.contracts_rows
    key = (codes, fmt.name, transposed)
    if key not in made:
        if fmt.torch_dtype and not transposed:
            made[key] = emit(graph, gemm, aten.view.dtype, codes, tensor_core_dtype(fmt))
        else:
            made[key] = Recode(codes, Quantizer(fmt), operand.size, transposed).emit(graph, near=gemm)
    return made[key]


def _scale(graph: Graph, gemm: Node, operand: ProductOperand, codes: Node, made: dict[Any, Node]) -> Node:
    """Its scales; where they were folded away, ones for every row, as cuBLASLt wants them beside another's rows."""
    factor = 1 / operand.encoding.format.tensor_core_factor
    if not operand.encoding.levels:
        scales = operand.parts.scales
        return scales if factor == 1 else emit(graph, gemm, aten.mul.Tensor, scales, factor)
    value = codes.meta["val"]
    rows = static_size(value.shape[0]) or 1
    key = ("scale", factor, rows)
    if key not in made:
        made[key] = emit(graph, gemm, aten.full.default, [rows, 1], factor, dtype=torch.float32, device=value.device)
    return made[key]


def _offset(graph: Graph, gemm: Node, codes: Node, own: float, others: float, made: dict[Any, Node]) -> Node | None:
    """Float32 ``[rows, 1]``: ``others`` · Σ (codes + ``own``) of every row, ``None`` if that is 0.

    In float32, which rounds none of the sums of half-integers up to 127½ below K = 65793, in any order, and takes no
    longer than int32: reading the codes does.
    """
    if not others:
        return None
    key = ("offset", codes, own, others)
    if key not in made:
        shifted = emit(graph, gemm, torch.ops.prims.convert_element_type.default, codes, torch.float32)
        if own:
            shifted = emit(graph, gemm, aten.add.Tensor, shifted, own)
        sums = emit(graph, gemm, aten.sum.dim_IntList, shifted, [-1], True)
        made[key] = emit(graph, gemm, aten.mul.Tensor, sums, others)
    return made[key]


# --- products of groups -------------------------------------------------------------------------------------------


def _grouped_product(graph: Graph, node: Node, product: QuantizedMM, made: dict[Any, Node]) -> Node:
    if product.offs is None:
        product = in_groups(graph, node, product)
        groups = _grouped_product(graph, node, product, made)
        return emit(graph, node, aten.view.default, groups, list(node.meta["val"].shape))
    a, b = (_codes_of_groups(graph, node, operand, product, made) for operand in product.operands)
    scale_a, scale_b = (_scale_of_groups(graph, node, operand, made) for operand in product.operands)
    return Mm8BitGrouped(a, b, product.offs, scale_a, scale_b, product.dtype).emit(graph, near=node)


def _codes_of_groups(
    graph: Graph, gemm: Node, operand: ProductOperand, product: QuantizedMM, made: dict[Any, Node]
) -> Node:
    """8-bit codes of one operand, contraction last, and padded if that is in groups."""
    codes, fmt = operand.first, operand.encoding.format
    value = codes.meta["val"]
    if operand.contracts_rows:
        offs = product.offs if product.contracts_groups else None
        key = (codes, fmt.name, offs)
        if key not in made:
            made[key] = Recode(codes, Quantizer(fmt), operand.size, True, offs).emit(graph, near=gemm)
        return made[key]
    if value.dim() == 2 or fmt.torch_dtype:
        return _codes(graph, gemm, operand, made)
    # A quantizer writes 8-bit codes itself, if that is asked of a matrix.
    rows = emit(graph, gemm, aten.view.default, codes, [-1, value.shape[-1]])
    matrix = Recode(rows, Quantizer(fmt), operand.size, False).emit(graph, near=gemm)
    return emit(graph, gemm, aten.view.default, matrix, [*value.shape[:-1], operand.size])


def _scale_of_groups(graph: Graph, gemm: Node, operand: ProductOperand, made: dict[Any, Node]) -> Node:
    """Its scales; where they were folded away, a single one."""
    if not operand.encoding.levels:
        return _scale(graph, gemm, operand, operand.first, made)
    value, factor = operand.first.meta["val"], 1 / operand.encoding.format.tensor_core_factor
    key = ("scale", factor, value.dim())
    if key not in made:
        made[key] = emit(
            graph, gemm, aten.full.default, [1] * value.dim(), factor, dtype=torch.float32, device=value.device
        )
    return made[key]


def _popcount_product(graph: Graph, node: Node, product: QuantizedMM, made: dict[Any, Node]) -> Node:
    """Σ x y  =  Σ bit_x bit_y  −  ½ Σ bit_x  −  ½ Σ bit_y  +  K/4  of levels ±½, of which −½ is a set bit."""
    a, b = (operand.first for operand in product.operands)
    scale_a, scale_b = (_scale(graph, node, operand, operand.first, made) for operand in product.operands)
    offsets = _count(graph, node, product.a, 0.0, made), _count(graph, node, product.b, product.b.size / 4, made)
    return Mm1Bit(a, b, scale_a, scale_b, product.dtype, product.bias, *offsets).emit(graph, near=node)


def _count(graph: Graph, gemm: Node, operand: ProductOperand, beside: float, made: dict[Any, Node]) -> Node:
    """Float32 ``[rows, 1]``: −½ for every set bit of a row, plus ``beside``; exact."""
    key = ("count", operand.first, beside)
    if key not in made:
        count = CountBits(operand.first).emit(graph, near=gemm)
        half = emit(graph, gemm, aten.mul.Tensor, count, -0.5)
        made[key] = emit(graph, gemm, aten.add.Tensor, half, beside) if beside else half
    return made[key]


def _block_scaled_product(graph: Graph, node: Node, product: QuantizedMM, made: dict[Any, Node]) -> Node:
    a, b = (operand.parts for operand in product.operands)
    tensors = a.codes, b.codes, a.scales, b.scales, a.global_scale, b.global_scale
    return MmBlockScaled(*tensors, product.dtype, product.bias).emit(graph, near=node)


def _stored_product(graph: Graph, node: Node, product: QuantizedMM, made: dict[Any, Node]) -> Node:
    weight = stored_weight(product.b)
    assert weight is not None
    return MmStored(
        product.a.first,
        weight.codes,
        weight.scales,
        weight.stored,
        product.b.size,
        product.b.contracts_rows,
        product.dtype,
        product.bias,
        weight.second,
        weight.offset,
        weight.high_first,
    ).emit(graph, near=node)


# --- products of decoded operands ---------------------------------------------------------------------------------


def _decoded_product(graph: Graph, node: Node, product: QuantizedMM, made: dict[Any, Node]) -> Node:
    sides = (product.a, product.a.contracts_rows), (product.b, not product.b.contracts_rows)
    left, right = (_decoded(graph, node, operand, transposed, product, made) for operand, transposed in sides)
    if product.offs is not None:
        return emit(graph, node, aten._grouped_mm.default, left, right, product.offs)
    if product.bias is not None:
        return emit(graph, node, aten.addmm.default, product.bias, left, right)
    target = aten.mm.default if left.meta["val"].dim() == 2 else aten.bmm.default
    return emit(graph, node, target, left, right)


def _decoded(
    graph: Graph, gemm: Node, operand: ProductOperand, transposed: bool, product: QuantizedMM, made: dict[Any, Node]
) -> Node:
    if operand.encoding.is_dense:
        return operand.first
    key = (operand.tensors, operand.encoding, product.dtype)
    if key not in made:
        made[key] = _decode(graph, gemm, operand, product)
    dense = made[key]
    if not transposed:
        return dense
    order = [1, 0] if dense.meta["val"].dim() == 2 else [0, 2, 1]
    return emit(graph, gemm, aten.permute.default, dense, order)


def _decode(graph: Graph, gemm: Node, operand: ProductOperand, product: QuantizedMM) -> Node:
    codes, scales, global_scale, values, positions = operand.parts
    spec, dtype = operand.encoding.operand, product.dtype
    if product.has_scales_of_groups(operand):
        assert spec is not None
        assert product.offs is not None
        groups = DequantizeGroups(codes, scales, spec.quantizer, product.offs, operand.size, dtype)
        return groups.emit(graph, near=gemm)
    if spec is None:
        stored = codes.meta["val"]
        ones = emit(graph, gemm, aten.full.default, [1] * stored.dim(), 1.0, dtype=torch.float32, device=stored.device)
        quantizer = Quantizer(operand.encoding.format, Granularity("tensor"))
        return Dequantize(codes, ones, quantizer, -1, operand.size, dtype).emit(graph, near=gemm)
    decode = Dequantize(codes, scales, spec.quantizer, -1, operand.size, dtype, global_scale)
    dense = decode.emit(graph, near=gemm)
    if spec.outliers is None:
        return dense
    return RestoreOutliers(dense, values, positions, spec.outliers, -1).emit(graph, near=gemm)


#: By provider; the others multiply 8-bit codes.
_LOWERINGS = {
    DECODED: _decoded_product,
    providers.POPCOUNT[0].name: _popcount_product,
    providers.BLOCK_SCALED[0].name: _block_scaled_product,
    providers.STORED: _stored_product,
    **{provider.name: _grouped_product for provider in providers.GROUPED[:-1]},
    providers.GROUPED_AT_RUN_TIME: _grouped_product,
}
