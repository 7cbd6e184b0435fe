"""Joint graph: count every product that AOTAutograd made of the model, and say which site each belongs to.

Runs before any pass of ours rewrites the graph, so that what it sees are ATen's own products, forward and backward, and
it knows nothing of how they were spelled. A product without a site is one that `find_gemms` has missed: the report says
so, and in tests it is an error. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import flop_counter

from qcompile import compat

from .dialect import GEMMS, decode_root, gemm_operands
from .graph import input_of, is_call, value_of
from .pass_base import Context, Observations, Product
from .record import Plan, Site, site_index
from .roles import depends_on_tangents, product_role
from .spellings import is_opaque, name_of

__all__ = ["account", "remark"]

aten = torch.ops.aten


def account(graph: Graph, context: Context) -> int:
    """Records a :class:`Product` a node in the context's observations; returns 0, since nothing is rewritten."""
    if context.observe is None:
        return 0
    backward = depends_on_tangents(graph)
    body = not any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        flops = _flops(node)
        if flops is not None:
            context.observe.products.append(
                Product(
                    site=site_index(node),
                    body=body,
                    role=_role(node, backward),
                    op=name_of(node),
                    flops=flops,
                    quantized=any(map(_is_decoded, node.all_input_nodes)),
                    where=compat.source_line(node),
                )
            )
    _attribute_bodies(context.observe.products, context.plan)
    return 0


def _attribute_bodies(products: list[Product], plan: Plan) -> None:
    """Give a site to the products in bodies of ``cond``, ``scan`` and ``map`` that have none.

    Torch traces their backwards, and the forward of a ``scan`` that is differentiated, on their own and hands no
    metadata on. All three roles of a site multiply the same three extents, so such a product belongs to a site in a
    body that has as many operations, and to none if there is no such site.
    """
    sites = {_site_flops(d.site): d.site.index for d in plan.decisions if d.site.body and d.site.slots}
    for i, product in enumerate(products):
        if product.site is None and product.body:
            # One ATen op makes both gradients of a convolution.
            products[i] = replace(product, site=sites.get(product.flops, sites.get(product.flops // 2)))


def _site_flops(site: Site) -> int:
    """2 · results · contraction, from the graph as Dynamo captured it."""
    return 2 * compat.size_hint(value_of(site.node).numel()) * compat.size_hint(site.slots[1].size(site.node))


def remark(graphs: Iterable[Observations]) -> str:
    """What to say of products that belong to no site; "" if there are none."""
    products = [product for observed in graphs for product in observed.products]
    missed = [product for product in products if product.site is None]
    if not missed:
        return ""
    total = sum(product.flops for product in products)
    share = sum(product.flops for product in missed) / total if total else 0.0
    places = dict.fromkeys(f"{product.op} at {product.where}" if product.where else product.op for product in missed)
    more = f" and {len(places) - SHOWN} more places" if len(places) > SHOWN else ""
    return (
        f"not accounted for: {len(missed)} product(s), {share:.1%} of the FLOPs of the graphs, belong to no layer: "
        f"{', '.join(list(places)[:SHOWN])}{more}"
    )


#: How many places a remark spells out.
SHOWN = 4


def _role(node: Node, backward: set[Node]) -> str:
    if node not in backward:
        return "fprop"
    if is_call(node, aten.convolution_backward.default):
        return "dgrad+wgrad"
    return product_role(node, gemm_operands(node), backward) if is_call(node, *GEMMS) else "backward"


def _is_decoded(node: Node) -> bool:
    """Whether an operand is what a quantized one was decoded to, or a copy of it."""
    while is_call(node, *_COPIES):
        node = input_of(node)
    return decode_root(node, changed=True) is not None


_COPIES = (aten.clone.default, aten.constant_pad_nd.default, torch.ops.prims.convert_element_type.default)


# --- operations -----------------------------------------------------------------------------------------------------


def _flops(node: Node) -> int | None:
    """Floating-point operations of a call; 0 for an opaque op, ``None`` for what is no product.

    Sizes that are symbolic count as in the call that is compiled; those known only at run time count as 1.
    """
    if node.op != "call_function":
        return None
    formula = FORMULAS.get(name_of(node)) or flop_counter.flop_registry.get(
        getattr(node.target, "overloadpacket", node.target)
    )
    if formula is None:
        return 0 if is_opaque(node) else None
    args, kwargs, result = compat.tree_map(_concrete, (node.args, node.kwargs, node.meta.get("val")))
    return int(formula(*args, **kwargs, out_val=result))


def _concrete(value: Any) -> Any:
    """A value with sizes that are numbers: tensors on the meta device for nodes and fake tensors."""
    if isinstance(value, Node):
        return compat.tree_map(_concrete, value.meta.get("val"))
    if isinstance(value, torch.Tensor):
        return torch.empty([compat.size_hint(n) for n in value.shape], dtype=value.dtype, device="meta")
    return compat.size_hint(value) if isinstance(value, torch.SymInt) else value


def _grouped(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    """Groups part the rows of a, or the columns of b where only that is a matrix."""
    return 2 * prod(a.shape[-2:] if a.dim() > b.dim() else a.shape) * b.shape[-1]


def _recurrent(x: torch.Tensor, *weights: Any, **_: Any) -> int:
    """Every element of a weight matrix is multiplied once for each position of [time, batch, features]. The weights
    are a list (cuDNN, MIOpen) or four tensors (oneDNN)."""
    listed = weights[0] if isinstance(weights[0], (list, tuple)) else weights[:4]
    return 2 * prod(x.shape[:-1]) * sum(w.numel() for w in listed if w.dim() == 2)


def _conv_tbc(x: torch.Tensor, weight: torch.Tensor, bias: Any, pad: int = 0, **_: Any) -> int:
    """x [time, batch, channels], weight [window, channels, outputs]."""
    length = x.shape[0] + 2 * pad - weight.shape[0] + 1
    return 2 * length * x.shape[1] * weight.numel()


def _matrix_matrix(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _matrix_vector(matrix: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * matrix.numel()


_ATTENTIONS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> int:
    """q·kᵀ and p·v; torch 2.11's own formula refuses grouped heads."""
    return 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *__: Any, **___: Any) -> int:
    """q·kᵀ once more, then dP, dV, dQ and dK."""
    return 2 * q[..., 0].numel() * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


#: Operations from the arguments of products that torch's flop_counter has no formula for, by name.
FORMULAS: dict[str, Callable[..., int]] = {
    "mv": _matrix_vector,
    "dot": _matrix_vector,
    "vdot": _matrix_vector,
    "addmv": lambda bias, matrix, *_, **__: 2 * matrix.numel(),
    "_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "transformers::grouped_mm_fallback_backward": lambda a, b, *_, **__: 2 * _grouped(a, b),
    **{f"_scaled_dot_product_{kind}": _attention for kind in _ATTENTIONS},
    **{f"_scaled_dot_product_{kind}_backward": _attention_backward for kind in _ATTENTIONS},
    "_int_mm": _matrix_matrix,
    "_scaled_mm_v2": _matrix_matrix,
    "_scaled_grouped_mm": _grouped,
    "conv_tbc": _conv_tbc,
    "conv_tbc_backward": lambda grad, *args, **_: 2 * _conv_tbc(*args),
    "_cudnn_rnn": _recurrent,
    "miopen_rnn": _recurrent,
    "mkldnn_rnn_layer": _recurrent,
    "_cudnn_rnn_backward": lambda *args, **_: 2 * _recurrent(*args),
    "miopen_rnn_backward": lambda *args, **_: 2 * _recurrent(*args),
    "mkldnn_rnn_layer_backward": lambda *args, **_: 2 * _recurrent(*args),
}
