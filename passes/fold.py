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

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile.ir.quantizer import Quantizer
from qcompile.ir.recipe import Operand
from qcompile.kernels.matmul.reference import LEVELS

from .dialect import aten, is_call, operand_kind, ops, through_views
from .gradient_axes import ROLE_OF_OPERAND
from .pass_base import Context, emit, size_along
from .plan import site_index
from .roles import depends_on_tangents

__all__ = ["fold", "why_not_folded"]


def fold(graph: Graph, context: Context) -> int:
    """Returns how many backward products read a quantized gradient now."""
    decisions = {d.site.index: d for d in context.plan.quantized if d.folded}
    if not decisions:
        return 0
    backward, count = depends_on_tangents(graph), 0
    for node in list(graph.nodes):
        decision = decisions.get(site_index(node))  # type: ignore[arg-type]
        if decision is None or node not in backward or not is_call(node, ops.quantized_mm.default):
            continue
        sides = _gradient_and_codes(node, backward)
        if sides is None or why_not_folded(node, sides[1]):
            continue
        codes: Any = node.args[sides[1]]
        role = ROLE_OF_OPERAND[operand_kind(through_views(codes[0]))]
        gradient = decision.gradients.get(role)
        if gradient is None or role not in decision.folded:
            continue
        with graph.inserting_before(node):
            _fold_into_gradient(graph, node, *sides, gradient.quantizer)
        count += 1
    return count


def _gradient_and_codes(node: Node, backward: set[Node]) -> tuple[int, int] | None:
    """Positions, among the arguments of a ``quantized_mm``, of the gradient and of the operand that is codes."""
    for gradient, codes in ((0, 4), (4, 0)):
        first, second = (node.args[position][0] for position in (gradient, codes))  # type: ignore[index]
        if first in backward and second not in backward and node.args[codes + 1] != "dense":
            return gradient, codes
    return None


def why_not_folded(node: Node, position: int) -> str:
    """Why the scales of the operand at ``position`` cannot be folded into the gradient; "" if they can."""
    tensors, text, _, transposed = node.args[position : position + 4]
    spec = Operand.parse(text)  # type: ignore[arg-type]
    quantizer = spec.quantizer
    if node.meta["val"].dim() != 2:
        return "a product of batches"
    if quantizer.granularity.kind != "row" or quantizer.scale.storage != "float32":
        return f"scales {quantizer.granularity} {quantizer.scale.name} are no float32 factor per row"
    if len(tensors) != 2:  # type: ignore[arg-type]
        return "the exact residual of the outliers is no code; occ(residual=e4m3) is"
    if quantizer.format.tensor_core_type not in ("e4m3", "e5m2"):
        return f"{quantizer.format.name} is not exact in 8-bit floating point, which gradients need"
    # Stored rows are contracted unless the right operand is read transposed or the left one is not.
    if bool(transposed) != (position == 0):
        return "its scales do not lie along the contraction"
    return ""


def _fold_into_gradient(graph: Graph, gemm: Node, gradient: int, codes: int, quantizer: Quantizer) -> None:
    arguments: list[Any] = list(gemm.args)
    dense, axis = _dense_gradient(graph, gemm, gradient)
    size = size_along(graph, gemm, dense, axis)
    stored, scales = arguments[codes]
    encoded, its_scales = _encode(graph, gemm, dense, axis, quantizer, scales)
    arguments[gradient : gradient + 4] = [encoded, its_scales], str(Operand(quantizer)), size, gradient == 4
    levels = Operand.parse(arguments[codes + 1]).quantizer.format.name
    arguments[codes : codes + 2] = [stored], LEVELS + levels
    fused = emit(graph, gemm, ops.quantized_mm.default, *arguments)
    gemm.replace_all_uses_with(fused)
    graph.erase_node(gemm)


def _dense_gradient(graph: Graph, gemm: Node, position: int) -> tuple[Node, int]:
    """dY as a matrix, not quantized, and the axis of it that the product contracts."""
    tensors, text, _, transposed = gemm.args[position : position + 4]
    first: Any = tensors[0]  # type: ignore[index]
    axis = 1 if position == 0 else 0
    if text == "dense":
        if is_call(first, aten.t.default) or (is_call(first, aten.permute.default) and first.args[1] == [1, 0]):
            return first.args[0], 1 - axis
        return first, axis
    # Quantized already, in case its scales could not be folded. Codes are stored with the quantization axis last.
    quantize: Any = through_views(first).args[0]
    x, _, along = quantize.args[:3]
    last = along % x.meta["val"].dim()
    if x.meta["val"].dim() != 2:  # leading axes are merged where all elements have one scale
        x, last = emit(graph, gemm, aten.reshape.default, x, [-1, size_along(graph, gemm, x, -1)]), 1
    return x, last if transposed == (position == 4) else 1 - last


def _encode(graph: Graph, gemm: Node, x: Node, axis: int, quantizer: Quantizer, fold: Node) -> tuple[Node, Node]:
    """Codes and scales of ``x · fold``, emitted at the insertion point."""
    seed = None
    if quantizer.rounding == "stochastic":
        device = x.meta["val"].device
        seed = emit(
            graph, gemm, aten.randint.low, 0, 2**31 - 1, [1], dtype=torch.int64, device=device, pin_memory=False
        )
    pair = emit(graph, gemm, ops.quantize.default, x, str(quantizer), axis, None, seed, fold)
    return emit(graph, gemm, operator.getitem, pair, 0), emit(graph, gemm, operator.getitem, pair, 1)
