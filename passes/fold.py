"""Joint graph: quantize dY for 8-bit tensor cores (``backward="auto" | "dgrad_fp8" | "fp8"``).

The scales of the codes that a backward product reads lie along its contraction: an output channel's scale along
dgrad's, a token's along wgrad's. A product cannot apply them afterwards, but dY can take them before it is quantized::

    dX = dY · (s_w ⊙ Wq) = (dY ⊙ s_w) · Wq            dW = dYᵀ · (s_x ⊙ Xq) = (dY ⊙ s_x)ᵀ · Xq

    quantized_mm(dy, [codes_w, s_w])   ─►   quantized_mm(quantize(dy, fold=s_w), levels [codes_w])

Of products of groups, experts for one, the scales that dY takes along its rows are those of the group, and those along
its columns are found for each group apart. Products of batches are such products, where a card multiplies groups.

A dY that `quantize_gradients` has quantized without them is quantized anew, with them.

So one set of codes serves all three products exactly, and dY is the only operand that is rounded. dgrad takes dY's
scales along its rows and wgrad along its columns.

With ``"auto"`` a product is left to be decoded where no tensor cores would multiply its codes, or where that is
estimated to be faster than to quantize dY first (:mod:`qcompile.kernels.matmul.costs`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.encoding import Encoding
from qcompile.ir.operand import Operand
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.matmul import costs, providers

from .batches import in_groups, why_no_groups
from .gradient_axes import ROLE_OF_OPERAND
from .graph import aten, emit, input_of, is_call, size_along, static_size, take_over, through_views
from .pass_base import Context
from .record import UNFOLDED_KEY, Decision, marked, operand_kind, site_index
from .roles import depends_on_tangents
from .views import ProductOperand, Quantize, QuantizedMM, QuantizeGroups

__all__ = ["fold"]


class _Backward(NamedTuple):
    """A backward product of a site, and which operand of it is the gradient and which one is codes."""

    node: Node
    product: QuantizedMM
    gradient: str
    codes: str
    role: str
    decision: Decision

    @property
    def product_codes(self) -> ProductOperand:
        return getattr(self.product, self.codes)

    @property
    def product_gradient(self) -> ProductOperand:
        return getattr(self.product, self.gradient)

    @property
    def is_batch(self) -> bool:
        return self.product.offs is None and bool(self.node.meta["val"].dim() == 3)


def fold(graph: Graph, context: Context) -> int:
    """Returns how many backward products read a quantized gradient now."""
    decisions = {d.site.index: d for d in context.plan.quantized if d.folded}
    if not decisions:
        return 0
    foldable: list[_Backward] = []
    for candidate in _backward_products(graph, decisions):
        if why := _why_not(candidate):
            marked(candidate.node, **{UNFOLDED_KEY: why})
        elif candidate.role in candidate.decision.folded:
            foldable.append(candidate)
    slower = _slower(foldable)
    for candidate in foldable:
        node = candidate.node
        if node in slower:
            marked(node, **{UNFOLDED_KEY: slower[node]})
            continue
        gradient = candidate.decision.gradients[candidate.role]
        assert gradient is not None
        with graph.inserting_before(node):
            product = candidate.product
            if candidate.is_batch:
                product = in_groups(graph, node, product, contraction=candidate.role == "wgrad")
            folded = _folded(graph, node, product, candidate.gradient, candidate.codes, gradient.quantizer)
            if candidate.is_batch and candidate.role == "dgrad":
                folded = emit(graph, node, aten.view.default, folded, list(node.meta["val"].shape))
        take_over(folded, node)
        node.replace_all_uses_with(folded)
        graph.erase_node(node)
    return len(foldable) - len(slower)


def _backward_products(graph: Graph, decisions: dict[int, Decision]) -> list[_Backward]:
    backward, found = depends_on_tangents(graph), []
    for node in graph.nodes:
        decision = decisions.get(site_index(node))  # type: ignore[arg-type]
        product = QuantizedMM.match(node) if node in backward else None
        if decision is None or product is None:
            continue
        for gradient, codes in (("a", "b"), ("b", "a")):
            first, second = (getattr(product, side) for side in (gradient, codes))
            if first.first in backward and second.first not in backward and not second.encoding.is_dense:
                role = ROLE_OF_OPERAND[operand_kind(through_views(second.first))]
                if decision.gradients.get(role) is not None:
                    found.append(_Backward(node, product, gradient, codes, role, decision))
    return found


def _slower(foldable: list[_Backward]) -> dict[Node, str]:
    """The products of ``"auto"`` that are estimated to be slower on 8-bit codes, and what the estimates are."""
    sites: dict[int, list[_Backward]] = {}
    for candidate in foldable:
        if candidate.decision.by_cost:
            sites.setdefault(candidate.decision.site.index, []).append(candidate)
    readers = Counter(through_views(c.product_codes.first) for c in foldable if c.role == "wgrad")
    slower = {}
    for candidates in sites.values():
        by_role = {candidate.role: candidate for candidate in sorted(candidates, key=lambda c: c.role)}
        roles, (m, n, k) = tuple(by_role), _extents(candidates[0])
        value = candidates[0].node.meta["val"]
        rates, measured = costs.rates_of(compat.card_name(value.device))
        shared = readers[through_views(by_role["wgrad"].product_codes.first)] if "wgrad" in by_role else 1
        offs = candidates[0].product.offs
        groups = 1 if offs is None else offs.meta["val"].shape[0]
        if candidates[0].is_batch:
            groups = candidates[0].node.meta["val"].shape[0]
            m *= groups
        chosen, estimates = costs.best_backward((m, n, k), roles, shared, value.dtype, rates, groups)
        for role in set(roles) - set(chosen):
            estimate = f"{estimates[chosen]:.0f} µs estimated for the backward, {estimates[roles]:.0f} in 8 bits"
            slower[by_role[role].node] = estimate if measured else f"{estimate}, at the rates of {rates.card}"
    return slower


def _extents(candidate: _Backward) -> tuple[int, int, int]:
    """(M, N, K) of the site: rows, outputs and inputs of the layer, as far as they are known."""
    of_gradient, of_codes = map(compat.size_hint, candidate.node.meta["val"].shape[-2:])
    if candidate.gradient == "b":
        of_gradient, of_codes = of_codes, of_gradient
    gradient = candidate.product_gradient
    contracted = compat.size_hint(gradient.first.meta["val"].shape[-2 if gradient.contracts_rows else -1])
    # dX is [M, K] and contracts N; dW is [N, K] and contracts M.
    return (of_gradient, contracted, of_codes) if candidate.role == "dgrad" else (contracted, of_gradient, of_codes)


def _why_not(candidate: _Backward) -> str:
    """Why the scales of the codes cannot be folded into the gradient; "" if they can."""
    node, codes, grouped = candidate.node, candidate.product_codes, candidate.product.offs is not None
    if candidate.decision.by_cost and compat.tensor_core_capability(node.meta["val"].device) is None:
        return f"no 8-bit tensor cores on {node.meta['val'].device.type}"
    spec = codes.encoding.operand
    assert spec is not None
    quantizer = spec.quantizer
    if candidate.is_batch and (why := _why_no_groups(candidate)):
        return why
    gradient = candidate.decision.gradients[candidate.role]
    assert gradient is not None
    if (grouped or candidate.is_batch) and (why := _why_not_in_groups(gradient.quantizer)):
        return why
    if quantizer.granularity.kind != "row" or quantizer.scale.storage != "float32":
        return f"scales {quantizer.granularity} {quantizer.scale.name} are no float32 factor per row"
    if spec.outliers:
        return spec.outliers.why_no_code
    if quantizer.format.tensor_core_type not in ("e4m3", "e5m2"):
        return f"{quantizer.format.name} is not exact in 8-bit floating point, which gradients need"
    return "" if codes.contracts_rows else "its scales do not lie along the contraction"


def _why_no_groups(candidate: _Backward) -> str:
    """Why a product of batches is not one of equal groups, as the kernel for these has it; "" if it is."""
    gradient = candidate.product_gradient
    capability = compat.tensor_core_capability(candidate.node.meta["val"].device)
    if not providers.multiplies_groups(capability):
        return "a product of batches: the kernel for groups needs compute capability 9.0"
    if not gradient.encoding.is_dense:
        return "a product of batches: its gradient is quantized before"
    rows, columns = gradient.first.meta["val"].shape[-2:]
    if candidate.role == "wgrad":
        if candidate.gradient == "a":  # dYᵀ
            rows, columns = columns, rows
    elif candidate.gradient == "b":
        return "a product of batches: its gradient is the right operand"
    elif static_size(columns) is None or columns % 16:
        return f"a product of batches: it contracts {columns}, no multiple of 16"
    return why_no_groups(candidate.product, rows, columns)


def _why_not_in_groups(quantizer: Quantizer) -> str:
    """Why ``quantize_groups`` does not round so; "" if it does."""
    if quantizer.granularity.kind != "row" or quantizer.scale.storage != "float32" or not quantizer.format.torch_dtype:
        return f"groups take a gradient with 8-bit codes and one float32 scale per row, which {quantizer} has not"
    return "no kernel rounds groups stochastically" if quantizer.rounding == "stochastic" else ""


def _folded(graph: Graph, gemm: Node, product: QuantizedMM, gradient: str, codes: str, quantizer: Quantizer) -> Node:
    dense, axis = _dense_gradient(graph, gemm, getattr(product, gradient))
    size = size_along(graph, gemm, dense, axis)
    stored: ProductOperand = getattr(product, codes)
    if product.offs is None:
        encoded = _encode(graph, gemm, dense, axis, quantizer, stored.parts.scales)
    else:
        groups = QuantizeGroups(dense, quantizer, axis, product.offs, stored.parts.scales)
        encoded = tuple(groups.emit_results(graph, near=gemm))
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
    if quantizer.draws:
        device = x.meta["val"].device
        seed = emit(
            graph, gemm, aten.randint.low, 0, 2**31 - 1, [1], dtype=torch.int64, device=device, pin_memory=False
        )
    return tuple(Quantize(x, quantizer, axis, seed=seed, fold=fold).emit_results(graph, near=gemm))
