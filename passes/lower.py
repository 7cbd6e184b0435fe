"""Post-grad graphs: give every ``quantized_mm`` the product that runs it.

Where 8-bit tensor cores hold both operands exactly, they read the codes::

    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm_8bit(recode(codes_x), recode(codes_w), s_x, s_w)

with sums of the codes where these lie beside the levels (:attr:`Format.tensor_core_offset`). `merge_quantize` then
joins ``quantize`` and ``recode``. Signs are read as stored where tensor cores count bits, and MXFP4 and NVFP4 where
they multiply FP4::

    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm_1bit(codes_x, codes_w, s_x, s_w, counts of bits)
    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm_block_scaled(codes_x, codes_w, s_x, s_w)

Elsewhere the operands are decoded for an ATen product, so that Inductor's own choices (cuBLAS, templates, epilogue
fusion) apply to it; one decoded operand serves all products of the graph that read it::

    quantized_mm([codes_x, s_x], [codes_w, s_w])   ─►   mm(dequantize(codes_x, s_x), permute(dequantize(codes_w, s_w)))

``quantize``, ``dequantize`` and the estimators stay: they have kernels and Inductor lowerings of their own
(kernels/lowerings.py).

Under Inductor's freezing, where parameters are constants, products for tensor cores are lowered in the joint graph
already (`lower_frozen`): Inductor then computes the weights' 8-bit codes once, instead of recoding them in every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.formats import Format, get_format
from qcompile.ir.recipe import Operand
from qcompile.ir.tensor_core_ops import BLOCK_SCALES, tensor_core_dtype
from qcompile.kernels.matmul import providers
from qcompile.kernels.matmul.reference import LEVELS

from .dialect import aten, ops, same_sizes
from .graph import static_size
from .pass_base import Context, emit

__all__ = ["DECODED", "lower", "lower_frozen", "product_provider"]

#: The provider that reads decoded operands.
DECODED = "dequantize + aten"
#: Tensor cores, through whichever kernel fits the extents.
AT_RUN_TIME = "cublaslt, gluon or triton"
#: Stands for an extent that is known at run time only: one that keeps no provider away.
_ALIGNED = 16
#: Levels of codes whose bits tensor cores count.
_SIGNS = (0.5, -0.5)
#: What FP4 tensor cores read as it is stored: format, granularity and scale rule.
_BLOCK_SCALED = {(q.format, q.granularity, q.scale) for q in BLOCK_SCALES.values()}


@dataclass(frozen=True)
class Side:
    """One operand of a ``quantized_mm``: its tensors and text, and how the product reads what is stored."""

    tensors: tuple[Node, ...]
    text: str
    size: Any
    transposed: bool

    @staticmethod
    def of(node: Node, position: int) -> Side:
        tensors, text, size, transposed = node.args[position : position + 4]
        return Side(tuple(tensors), text, size, bool(transposed))  # type: ignore[arg-type]

    @property
    def format(self) -> Format:
        if self.text.startswith(LEVELS):
            return get_format(self.text.removeprefix(LEVELS))
        return Operand.parse(self.text).quantizer.format

    def contracts_rows(self, left: bool) -> bool:
        """Whether the product sums over the stored rows, so that the codes have to be transposed for it."""
        return self.transposed == left

    def block_scaled(self, left: bool) -> tuple[Any, ...] | None:
        """How codes are scaled, if FP4 tensor cores read them as they are stored, else ``None``."""
        if self.text == "dense" or self.text.startswith(LEVELS) or self.contracts_rows(left):
            return None
        quantizer = Operand.parse(self.text).quantizer
        scaled = quantizer.format, quantizer.granularity, quantizer.scale
        alone = len(self.tensors) == (3 if quantizer.scale.two_level else 2)  # no residual of outliers beside them
        return scaled if scaled in _BLOCK_SCALED and alone else None

    def signs(self, left: bool) -> bool:
        """Whether tensor cores that count bits read the codes as they are stored."""
        stored = not (self.text.startswith(LEVELS) or self.contracts_rows(left))
        return stored and isinstance(self.size, int) and not self.why_not_8bit(left) and self.format.levels == _SIGNS

    def why_not_8bit(self, left: bool) -> str:
        """Why tensor cores cannot read the codes; "" if they can."""
        if self.text == "dense":
            return "an operand in high precision"
        if self.format.tensor_core_type is None:
            return f"{self.format.name} fits no 8-bit tensor-core type"
        if self.text.startswith(LEVELS):
            return ""
        quantizer = Operand.parse(self.text).quantizer
        kind = quantizer.granularity.kind
        if kind not in ("row", "tensor") or quantizer.scale.storage != "float32":
            return f"scales {quantizer.granularity} {quantizer.scale.name} change along the contraction"
        if kind == "row" and self.contracts_rows(left):
            return "scales of rows change along the contraction (backward= folds them into the gradient)"
        if len(self.tensors) != 2:
            return "the exact residual of the outliers (occ(residual=e4m3) is a code)"
        return ""


def product_provider(node: Node) -> tuple[str, str]:
    """What runs a ``quantized_mm``, and why not something faster; the report prints it."""
    left, right, value = Side.of(node, 0), Side.of(node, 4), node.meta["val"]
    capability = compat.tensor_core_capability(value.device)
    if capability is None:
        return DECODED, f"no 8-bit tensor cores on {value.device.type}"
    if value.dim() != 2:
        return DECODED, "a product of batches"
    readings, why_not = _readings(left, right)
    bias: Any = node.args[9] if len(node.args) > 9 else None
    if bias is not None and not same_sizes(bias.meta["val"].shape, value.shape[1:]):
        return DECODED, "a bias that is broadcast over the columns"
    extents = (static_size(value.shape[0]), static_size(value.shape[1]), _contraction(left))
    m, n, k = (_ALIGNED if extent is None else extent for extent in extents)
    reasons: list[str] = []
    for dtypes in readings:
        product = providers.Product(
            shape=(m, n, k),
            dtypes=dtypes,
            dtype=value.dtype,
            capability=capability,
            bias=None if bias is None else bias.meta["val"].dtype,
            tensor_scales=all(_is_scalar(side) for side in (left, right)),
            offsets=any(side.format.tensor_core_offset for side in (left, right)),
        )
        provider, why = providers.choose(product)
        reasons.append(why)
        if provider.name == "reference":
            continue
        if None in extents and provider.name not in _LOWERINGS:
            return AT_RUN_TIME, "extents are known at run time only"
        return provider.name, "; ".join(filter(None, reasons))
    return DECODED, "; ".join(filter(None, (*reasons, why_not)))


def _readings(left: Side, right: Side) -> tuple[list[tuple[torch.dtype, torch.dtype]], str]:
    """The dtypes as which tensor cores can read the two operands, best first; if not as 8-bit codes, why."""
    scaled = left.block_scaled(left=True)
    if scaled is not None and scaled == right.block_scaled(left=False):
        return [(providers.FP4, providers.FP4)], ""
    if why := left.why_not_8bit(left=True) or right.why_not_8bit(left=False):
        return [], why
    types = {left.format.tensor_core_type, right.format.tensor_core_type}
    if len(types) > 1 and "int8" in types:
        return [], f"{' and '.join(sorted(map(str, types)))} do not mix on tensor cores"
    signs = left.signs(left=True) and right.signs(left=False)
    as_8bit = tensor_core_dtype(left.format), tensor_core_dtype(right.format)
    return [*[(providers.ONE_BIT, providers.ONE_BIT)] * signs, as_8bit], ""


def _is_scalar(side: Side) -> bool:
    """Whether the operand has one scale; where scales were folded away, :func:`_scale` gives every row a one."""
    return not side.text.startswith(LEVELS) and Operand.parse(side.text).quantizer.granularity.kind == "tensor"


def _contraction(left: Side) -> int | None:
    """Length of the contraction, ``None`` if it is known at run time only."""
    if left.contracts_rows(True):
        return static_size(left.tensors[0].meta["val"].shape[-2])
    return left.size if isinstance(left.size, int) else None


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
    for node in graph.find_nodes(op="call_function", target=ops.quantized_mm.default):
        lowering = _LOWERINGS.get(product_provider(node)[0], _tensor_core_product)
        if lowering is _decoded_product and not decoded:
            continue
        with graph.inserting_before(node):
            replacement = lowering(graph, node, made)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        count += 1
    return count


# --- products on tensor cores -------------------------------------------------------------------------------------


def _tensor_core_product(graph: Graph, node: Node, made: dict[Any, Node]) -> Node:
    sides = Side.of(node, 0), Side.of(node, 4)
    codes = [_codes(graph, node, side, side is sides[0], made) for side in sides]
    scales = [_scale(graph, node, side, operand, made) for side, operand in zip(sides, codes, strict=True)]
    dtype, *rest = node.args[8:]
    bias = rest[0] if rest else None
    own, others = (side.format.tensor_core_offset for side in sides)
    # Σ (p + c)(q + d) = Σ p q + d Σ (p + c) + c Σ q
    offsets = _offset(graph, node, codes[0], own, others, made), _offset(graph, node, codes[1], 0.0, own, made)
    summands = (bias, *offsets) if any(offsets) else (bias,) if bias is not None else ()
    return emit(graph, node, ops.mm_8bit.default, *codes, *scales, dtype, *summands)


def _codes(graph: Graph, gemm: Node, side: Side, left: bool, made: dict[Any, Node]) -> Node:
    """8-bit codes of one operand, contraction last."""
    transposed = side.contracts_rows(left)
    fmt = side.format
    key = (side.tensors[0], fmt.name, transposed)
    if key not in made:
        codes = side.tensors[0]
        if fmt.torch_dtype and not transposed:
            made[key] = emit(graph, gemm, aten.view.dtype, codes, tensor_core_dtype(fmt))
        else:
            made[key] = emit(graph, gemm, ops.recode.default, codes, fmt.name, side.size, transposed)
    return made[key]


def _scale(graph: Graph, gemm: Node, side: Side, codes: Node, made: dict[Any, Node]) -> Node:
    """Its scales; where they were folded away, ones for every row, as cuBLASLt wants them beside another's rows."""
    factor = 1 / side.format.tensor_core_factor
    if not side.text.startswith(LEVELS):
        scales = side.tensors[1]
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


def _popcount_product(graph: Graph, node: Node, made: dict[Any, Node]) -> Node:
    """Σ x y  =  Σ bit_x bit_y  −  ½ Σ bit_x  −  ½ Σ bit_y  +  K/4  of levels ±½, of which −½ is a set bit."""
    left, right = sides = Side.of(node, 0), Side.of(node, 4)
    codes = [side.tensors[0] for side in sides]
    scales = [_scale(graph, node, side, side.tensors[0], made) for side in sides]
    dtype, *rest = node.args[8:]
    offsets = _count(graph, node, left, 0.0, made), _count(graph, node, right, right.size / 4, made)
    return emit(graph, node, ops.mm_1bit.default, *codes, *scales, dtype, rest[0] if rest else None, *offsets)


def _count(graph: Graph, gemm: Node, side: Side, beside: float, made: dict[Any, Node]) -> Node:
    """Float32 ``[rows, 1]``: −½ for every set bit of a row, plus ``beside``; exact."""
    key = ("count", side.tensors[0], beside)
    if key not in made:
        count = emit(graph, gemm, ops.count_bits.default, side.tensors[0])
        half = emit(graph, gemm, aten.mul.Tensor, count, -0.5)
        made[key] = emit(graph, gemm, aten.add.Tensor, half, beside) if beside else half
    return made[key]


def _block_scaled_product(graph: Graph, node: Node, made: dict[Any, Node]) -> Node:
    sides = Side.of(node, 0), Side.of(node, 4)
    codes, scales, global_scales = zip(*((*side.tensors, None)[:3] for side in sides), strict=True)
    return emit(graph, node, ops.mm_block_scaled.default, *codes, *scales, *global_scales, *node.args[8:])


# --- products of decoded operands ---------------------------------------------------------------------------------


def _decoded_product(graph: Graph, node: Node, made: dict[Any, Node]) -> Node:
    dtype, *rest = node.args[8:]
    left, right = (_decoded(graph, node, Side.of(node, position), dtype, made) for position in (0, 4))
    bias = rest[0] if rest else None
    if bias is not None:
        return emit(graph, node, aten.addmm.default, bias, left, right)
    product = aten.mm.default if left.meta["val"].dim() == 2 else aten.bmm.default
    return emit(graph, node, product, left, right)


def _decoded(graph: Graph, gemm: Node, side: Side, dtype: Any, made: dict[Any, Node]) -> Node:
    if side.text == "dense":
        return side.tensors[0]
    key = (side.tensors, side.text, dtype)
    if key not in made:
        made[key] = _decode(graph, gemm, side, dtype)
    dense = made[key]
    if not side.transposed:
        return dense
    order = [1, 0] if dense.meta["val"].dim() == 2 else [0, 2, 1]
    return emit(graph, gemm, aten.permute.default, dense, order)


def _decode(graph: Graph, gemm: Node, side: Side, dtype: torch.dtype) -> Node:
    codes, *rest = side.tensors
    if side.text.startswith(LEVELS):
        stored = codes.meta["val"]
        ones = emit(graph, gemm, aten.full.default, [1] * stored.dim(), 1.0, dtype=torch.float32, device=stored.device)
        quantizer = f"{side.format.name} tensor absmax even"
        return emit(graph, gemm, ops.dequantize.default, codes, ones, quantizer, -1, side.size, dtype)
    spec = Operand.parse(side.text)
    scales = rest.pop(0)
    global_scale = rest.pop(0) if spec.quantizer.scale.two_level else None
    quantizer = str(spec.quantizer)
    dense = emit(graph, gemm, ops.dequantize.default, codes, scales, quantizer, -1, side.size, dtype, global_scale)
    if rest:
        dense = emit(graph, gemm, ops.restore_outliers.default, dense, *rest, str(spec.outliers), -1)
    return dense


#: By provider; the others multiply 8-bit codes.
_LOWERINGS = {
    DECODED: _decoded_product,
    providers.POPCOUNT[0].name: _popcount_product,
    providers.BLOCK_SCALED[0].name: _block_scaled_product,
}
