"""Joint graph: make products read codes.

::

    mm(view(dequantize(codes_x, s_x)), permute(dequantize(codes_w, s_w)))
        ─►   quantized_mm([codes_x, s_x], [codes_w, s_w])

Done here, before the forward and the backward are parted: the partitioner then sees that the backward needs codes, and
saves codes, without being told. Numbers do not change: ``quantized_mm`` is defined as decode, then multiply.

A stored weight (:mod:`qcompile.stored`) is an input of the graph as codes and scales, and is read from there: the copy
that a cast of the whole weight makes of its parts (autocast) is none that the backward should keep.

A product whose operand cannot be read as a matrix of stored rows (a broadcast batch, a convolution) keeps its explicit
dequantize; `hints` then makes the partitioner recompute the wide tensor from the saved codes.

Products of groups (``_grouped_mm``) become ones with ``offs``: of the rows of a matrix with a matrix for each group
(fprop, dgrad), and of two matrices whose contraction is in groups (wgrad). In place of ``_grouped_mm``, which takes
bfloat16 alone, transformers compiles an op of its own for experts in other dtypes: a loop that waits for the host, and
one more for both gradients. These are taken apart likewise on cards that multiply groups of codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.encoding import DENSE
from qcompile.kernels.matmul import providers

from .dialect import (
    LOOP,
    LOOP_BACKWARD,
    adds_given_part,
    decode_root,
    gemm_operands,
    given_part,
    matrix_form,
    stored_operand,
    stored_view,
)
from .graph import (
    argument_of,
    aten,
    emit,
    input_of,
    is_call,
    is_view,
    result,
    same_sizes,
    take_over,
    target_name,
)  # fmt: skip
from .pass_base import Context
from .views import Dequantize, ProductOperand, QuantizedMM

__all__ = ["fuse"]


def fuse(graph: Graph, context: Context) -> int:
    """Returns how many products were fused."""
    count = 0
    _read_given_parts(graph)
    made: dict[Any, Node | None] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and target_name(node) in (LOOP, LOOP_BACKWARD):
            count += _fuse_loop(graph, node, made)
        if not is_call(node, *_FUSED) or not _plain(node):
            continue
        left, right = gemm_operands(node)
        if decode_root(left) is None and decode_root(right) is None:
            continue
        with graph.inserting_before(node):
            a, b = (_operand(graph, node, seen, is_left, made) for seen, is_left in ((left, True), (right, False)))
            if a is None or b is None:
                continue
            bias = input_of(node) if is_call(node, aten.addmm.default) else None
            offs = argument_of(node, 2, "offs") if is_call(node, aten._grouped_mm.default) else None
            fused = QuantizedMM(a, b, node.meta["val"].dtype, bias, offs).emit(graph, near=node)
        take_over(fused, node)
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        count += 1
    return count


def _fuse_loop(graph: Graph, node: Node, made: dict[Any, Node | None]) -> int:
    """Products of groups in place of transformers' loop over experts, or of its backward; returns how many."""
    x, weight, offs, *gradient = node.args
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    capability = compat.tensor_core_capability(x.meta["val"].device)
    if not providers.multiplies_groups(capability) or decode_root(x) is None or decode_root(weight) is None:
        return 0
    with graph.inserting_before(node):
        a, b = _operand(graph, node, x, True, made), _operand(graph, node, weight, False, made)
        if a is None or b is None:
            return 0
        assert isinstance(offs, Node)
        if offs.meta["val"].dtype != torch.int32:
            offs = emit(graph, node, torch.ops.prims.convert_element_type.default, offs, torch.int32)

        def product(left: ProductOperand, right: ProductOperand) -> Node:
            return QuantizedMM(left, right, x.meta["val"].dtype, None, offs).emit(graph, near=node)

        computed = _gradients_of_loop(graph, node, a, b, product) if gradient else {node: product(a, b)}
    for old, new in computed.items():
        take_over(new, old)
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    if gradient:
        graph.erase_node(node)
    return len(computed)


def _gradients_of_loop(
    graph: Graph, node: Node, x: ProductOperand, weight: ProductOperand, product: Callable[..., Node]
) -> dict[Node, Node]:
    """What its backward returns, by the nodes that take it: dX of x ``[M, K]``, dW of the weight ``[E, K, N]``."""
    dy: Node = node.args[3]  # type: ignore[assignment]
    computed = {}
    if (dx := result(node, 0)) is not None:
        by_rows = replace(weight, contracts_rows=not weight.contracts_rows)
        computed[dx] = product(ProductOperand((dy,), DENSE), by_rows)
    if (dw := result(node, 1)) is not None:
        by_rows = replace(x, contracts_rows=True)
        if weight.contracts_rows:
            computed[dw] = product(by_rows, ProductOperand((dy,), DENSE, contracts_rows=True))
        else:  # as the weight lies in memory, [E, N, K]
            transposed = emit(graph, node, aten.permute.default, dy, [1, 0])
            in_memory = product(ProductOperand((transposed,), DENSE), by_rows)
            computed[dw] = emit(graph, node, aten.permute.default, in_memory, [0, 2, 1])
    return computed


def _read_given_parts(graph: Graph) -> None:
    """Let decoders read inputs of the graph instead of copies of them."""
    readers = [*Dequantize.calls(graph), *(node for node in graph.nodes if adds_given_part(node))]
    for reader in readers:
        for source in reader.all_input_nodes:
            node = reader
            while is_view(source):
                node, source = source, input_of(source)
            if (given := given_part(source)) is not None and given is not source:
                node.replace_input_with(source, given)
                if not source.users:
                    graph.erase_node(source)


_FUSED = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten._grouped_mm.default)


def _plain(node: Node) -> bool:
    """No scaling factors, one dtype, as ATen demands, and a bias that broadcasts over rows."""
    if is_call(node, aten._grouped_mm.default):
        left, _ = (operand.meta["val"] for operand in gemm_operands(node))
        said = [argument_of(node, *argument) for argument in ((3, "bias"), (4, "out_dtype"))]
        return left.dim() == 2 and said == [None, None] and argument_of(node, 2, "offs") is not None
    dtypes = {
        source.meta["val"].dtype for source in node.all_input_nodes if isinstance(source.meta["val"], torch.Tensor)
    }
    if len(dtypes) > 1 or any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return False
    return not is_call(node, aten.addmm.default) or input_of(node).meta["val"].dim() == 1


def _operand(
    graph: Graph, gemm: Node, seen: Node, is_left: bool, made: dict[Any, Node | None]
) -> ProductOperand | None:
    """An operand of ``gemm`` as ``quantized_mm`` reads it; ``None`` if it cannot be read from codes.

    ``made``: see :func:`_rows`.
    """
    root = decode_root(seen)
    if root is None:
        return ProductOperand((seen,), DENSE, contracts_rows=not is_left)
    stored = stored_operand(root)
    spec, parts = stored.encoding.operand, stored.parts
    assert spec is not None
    form = matrix_form(root, stored.length, seen)
    if form is None or (spec.outliers and spec.outliers.per == "tensor"):
        return None
    transposed, lead = form
    kind = spec.quantizer.granularity.kind
    if kind == "square" and not same_sizes(parts.codes.meta["val"].shape[:-1], lead):
        return None  # square blocks span rows, so rows may not be regrouped
    if kind in ("tensor", "square"):
        parts = parts._replace(scales=_shared_scale(graph, gemm, parts.scales, len(lead) + 1))
    shared = ["global_scale", *["scales"] * (kind in ("tensor", "square"))]
    if spec.outliers and spec.outliers.per == "column":
        shared.append("positions")
    views = [
        tensor if name in shared else _rows(graph, gemm, tensor, lead, made)
        for name, tensor in parts._asdict().items()
        if tensor is not None
    ]
    if any(view is None for view in views):
        return None
    return replace(stored, tensors=tuple(views), contracts_rows=transposed == is_left)  # type: ignore[arg-type]


def _rows(graph: Graph, gemm: Node, tensor: Node, lead: list[Any], made: dict[Any, Node | None]) -> Node | None:
    """:func:`stored_view`, made once for all products that read the tensor in this shape."""
    key = (tensor, *map(str, lead))
    if key not in made:
        made[key] = stored_view(graph, gemm, tensor, lead)
    return made[key]


def _shared_scale(graph: Graph, gemm: Node, scales: Node, dims: int) -> Node:
    """A scale of the whole tensor keeps one element whatever the rows are; only its rank follows the matrix."""
    if scales.meta["val"].dim() == dims or scales.meta["val"].numel() != 1:
        return scales
    return emit(graph, gemm, aten.view.default, scales, [1] * dims)
