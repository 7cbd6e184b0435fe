"""Joint graph: quantize dY for 8-bit tensor cores (``backward="dgrad_fp8" | "fp8"``).

The scales of the codes that a backward product reads lie along its contraction: an output channel's scale along
dgrad's, a token's along wgrad's. A product cannot apply them afterwards, but dY can take them before it is quantized::

    dX = dY · (s_w ⊙ Wq) = (dY ⊙ s_w) · Wq            dW = dYᵀ · (s_x ⊙ Xq) = (dY ⊙ s_x)ᵀ · Xq

    quantized_mm(dy, [codes_w, s_w])   ─►   quantized_mm(quantize(dy, fold=s_w), levels [codes_w])

A dY that `quantize_gradients` has quantized without them is quantized anew, with them.

So one set of codes serves all three products exactly, and dY is the only operand that is rounded. dgrad takes dY's
scales along its rows and wgrad along its columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.ir.encoding import Encoding
from qcompile.ir.operand import Operand
from qcompile.ir.quantizer import Quantizer

from .gradient_axes import ROLE_OF_OPERAND
from .graph import aten, emit, input_of, is_call, size_along, take_over, through_views
from .pass_base import Context
from .record import UNFOLDED_KEY, marked, operand_kind, site_index
from .roles import depends_on_tangents
from .views import ProductOperand, Quantize, QuantizedMM

__all__ = ["fold"]


def fold(graph: Graph, context: Context) -> int:
    """Returns how many backward products read a quantized gradient now."""
    decisions = {d.site.index: d for d in context.plan.quantized if d.folded}
    if not decisions:
        return 0
    backward, count = depends_on_tangents(graph), 0
    for node in list(graph.nodes):
        decision = decisions.get(site_index(node))  # type: ignore[arg-type]
        product = QuantizedMM.match(node) if node in backward else None
        if decision is None or product is None:
            continue
        sides = _gradient_and_codes(product, backward)
        if sides is None:
            continue
        codes = getattr(product, sides[1])
        if why := _why_not(node, codes):
            marked(node, **{UNFOLDED_KEY: why})
            continue
        role = ROLE_OF_OPERAND[operand_kind(through_views(codes.first))]
        gradient = decision.gradients.get(role)
        if gradient is None or role not in decision.folded:
            continue
        with graph.inserting_before(node):
            folded = _folded(graph, node, product, *sides, gradient.quantizer)
        take_over(folded, node)
        node.replace_all_uses_with(folded)
        graph.erase_node(node)
        count += 1
    return count


def _gradient_and_codes(product: QuantizedMM, backward: set[Node]) -> tuple[str, str] | None:
    """Which operand is the gradient, and which one is codes."""
    for gradient, codes in (("a", "b"), ("b", "a")):
        first, second = (getattr(product, side) for side in (gradient, codes))
        if first.first in backward and second.first not in backward and not second.encoding.is_dense:
            return gradient, codes
    return None


def _why_not(node: Node, codes: ProductOperand) -> str:
    """Why the scales of ``codes`` cannot be folded into the gradient; "" if they can."""
    spec = codes.encoding.operand
    assert spec is not None
    quantizer = spec.quantizer
    if node.meta["val"].dim() != 2:
        return "a product of batches"
    if quantizer.granularity.kind != "row" or quantizer.scale.storage != "float32":
        return f"scales {quantizer.granularity} {quantizer.scale.name} are no float32 factor per row"
    if spec.outliers:
        return "the exact residual of the outliers is no code; occ(residual=e4m3) is"
    if quantizer.format.tensor_core_type not in ("e4m3", "e5m2"):
        return f"{quantizer.format.name} is not exact in 8-bit floating point, which gradients need"
    return "" if codes.contracts_rows else "its scales do not lie along the contraction"


def _folded(graph: Graph, gemm: Node, product: QuantizedMM, gradient: str, codes: str, quantizer: Quantizer) -> Node:
    dense, axis = _dense_gradient(graph, gemm, getattr(product, gradient))
    size = size_along(graph, gemm, dense, axis)
    stored: ProductOperand = getattr(product, codes)
    encoded = _encode(graph, gemm, dense, axis, quantizer, stored.parts.scales)
    operands: dict[str, Any] = {
        gradient: ProductOperand(encoded, Encoding(Operand(quantizer)), size),
        codes: replace(stored, tensors=(stored.first,), encoding=Encoding(levels=stored.encoding.format)),
    }
    return replace(product, **operands).emit(graph, near=gemm)


def _dense_gradient(graph: Graph, gemm: Node, gradient: ProductOperand) -> tuple[Node, int]:
    """dY as a matrix, not quantized, and the axis of it that the product contracts."""
    first = gradient.first
    axis = 0 if gradient.contracts_rows else 1
    if gradient.encoding.is_dense:
        swapped = is_call(first, aten.permute.default) and first.args[1] == [1, 0]
        transposed = swapped or is_call(first, aten.t.default)
        return (input_of(first), 1 - axis) if transposed else (first, axis)
    # Quantized already, in case its scales could not be folded. Codes are stored with the quantization axis last.
    quantize = Quantize.of(input_of(through_views(first)))
    x = quantize.x
    last = quantize.axis % x.meta["val"].dim()
    if x.meta["val"].dim() != 2:  # leading axes are merged where all elements have one scale
        x, last = emit(graph, gemm, aten.reshape.default, x, [-1, size_along(graph, gemm, x, -1)]), 1
    return x, 1 - last if gradient.contracts_rows else last


def _encode(graph: Graph, gemm: Node, x: Node, axis: int, quantizer: Quantizer, fold: Node) -> tuple[Node, ...]:
    """Codes and scales of ``x · fold``, emitted at the insertion point."""
    seed = None
    if quantizer.rounding == "stochastic":
        device = x.meta["val"].device
        seed = emit(
            graph, gemm, aten.randint.low, 0, 2**31 - 1, [1], dtype=torch.int64, device=device, pin_memory=False
        )
    return tuple(Quantize(x, quantizer, axis, seed=seed, fold=fold).emit_results(graph, near=gemm))
