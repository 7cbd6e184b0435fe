"""Dynamo graph: compute beside every product what each candidate makes of it, and score the difference in the backward.

::

                            a  = f(fake_quantize(x.detach()), fake_quantize(w.detach()))     one for each candidate
    y = f(x, w)    ─►       y  = f(x, w)
                            y' = read_copies(y, [a, …], scores)

``scores`` is a leaf of zeros, one row per site. What arrives in its gradient is Σ (g ⊙ (a − y))² for every candidate, g
being the gradient at y. The model computes what it computed before, to the bit: candidates are read by the probe alone.
Autograd brings g wherever it goes, through graph breaks, repeated calls and checkpointed bodies, and one asks for the
gradients of the leaves alone, so no gradient of a weight is computed.

With ``gradients`` a probe also multiplies the two backward products of its site once wide and once by each candidate.
It differentiates the candidate's own call, so it needs to know of no spelling.

The rewritten graph is to be run as it is, in eager torch: `read_copies` is no op that later stages know.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from qcompile.ir.ops import quantize_along
from qcompile.ir.sharding import is_sharded

from .gradient_axes import axes_of_result, role_of_slot
from .graph import graph_modules, value_of
from .origins import written_by
from .record import Decision, Plan, Site

__all__ = ["Probes", "copy_products", "probe", "why_not_probed"]

#: Under what name a graph module keeps its leaf.
_LEAF = "qcompile_scores"


@dataclass
class Probes:
    """Copies of products, and what reads them.

    Attributes:
        sites: one for each row of ``scores``. candidates: their names, in the order of the columns.
        gradients: whether the backward products are compared too.
        copies: for each site's node the decisions about its copies, one for each column in ``columns``, and with
            ``gradients`` a wide one more.
        scores: the leaf, float64 ``[sites, columns]``. Its gradient holds the candidates' scores; with ``gradients``
            then, for each operand of the site, the squared norm of its gradient and that of every candidate's error.
    """

    sites: list[Site]
    candidates: tuple[str, ...]
    gradients: bool
    copies: dict[Node, list[Decision]]
    columns: dict[Node, list[int]]
    scores: nn.Parameter = field(init=False)

    def __post_init__(self) -> None:
        columns = len(self.candidates) + (2 * (1 + len(self.candidates)) if self.gradients else 0)
        device = value_of(self.sites[0].node).device if self.sites else None
        self.scores = nn.Parameter(torch.zeros(len(self.sites), columns, dtype=torch.float64, device=device))

    @property
    def plan(self) -> Plan:
        """What `insert` is to quantize."""
        return Plan([copy for copies in self.copies.values() for copy in copies], Counter())


def why_not_probed(site: Site) -> str:
    """Why a site that is quantized gets no score; "" if it gets one."""
    if any(written_by(site.node)):
        return "not scored: the product is written in place"
    if is_sharded(value_of(site.node)):
        return "not scored: the product is a DTensor; score the model on one device"
    return f"not scored: inside {site.anonymous}" if site.anonymous else ""


def copy_products(gm: GraphModule, plans: Mapping[str, Plan], gradients: bool = False) -> Probes:
    """Add the copies, to ``gm`` and its nested bodies. ``plans``: of the same sites, by candidate; a site that none of
    them quantizes is left alone. `insert` quantizes the copies' operands, then `probe` has them read.
    """
    decided: dict[Node, dict[str, Decision]] = {}
    for name, plan in plans.items():
        for decision in plan.quantized:
            if any(decision.operands) and not why_not_probed(decision.site):
                decided.setdefault(decision.site.node, {})[name] = decision
    sites = sorted((next(iter(found.values())).site for found in decided.values()), key=lambda site: site.index)
    columns = {node: [list(plans).index(name) for name in found] for node, found in decided.items()}
    probes = Probes(sites, tuple(plans), gradients, {}, columns)
    for module in graph_modules(gm):
        detached = _Detached(module.graph)
        for node in [node for node in module.graph.nodes if node in decided]:
            decisions = list(decided[node].values())
            if gradients:
                decisions.append(replace(decisions[0], operands=(None, None), gradients={}))
            probes.copies[node] = [replace(d, site=detached.copy(d.site)) for d in decisions]
    return probes


def probe(gm: GraphModule, probes: Probes) -> int:
    """Put a probe behind every product that has copies; returns how many."""
    rows = {site.node: row for row, site in enumerate(probes.sites)}
    for module in graph_modules(gm):
        nodes = [node for node in module.graph.nodes if node in rows]
        if nodes:
            module.register_parameter(_LEAF, probes.scores)
            with module.graph.inserting_before(nodes[0]):
                leaf = module.graph.get_attr(_LEAF)
            for node in nodes:
                _add_probe(node, leaf, rows[node], probes)
            module.graph.lint()
            module.recompile()
    return len(rows)


def _add_probe(gemm: Node, leaf: Node, row: int, probes: Probes) -> None:
    """Let the readers of ``gemm`` read what the probe returns."""
    readers = list(gemm.users)
    copies, columns = probes.copies[gemm], probes.columns[gemm]
    backward = [_with_leaves(copy) for copy in copies] if probes.gradients else []
    results = [copy.site.node for copy in copies[: len(columns)]]
    with gemm.graph.inserting_after(gemm):
        node = gemm.graph.call_function(read_copies, (gemm, leaf, row, columns, results, backward))
    node.meta = dict(gemm.meta)
    for reader in readers:
        reader.replace_input_with(gemm, node)


class _Detached:
    """Adds products that read what a site reads, out of autograd's sight."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.made: dict[Node, Node] = {}

    def copy(self, site: Site) -> Site:
        """In front of the site. Equal operands of several sites stay one node, so that `insert` quantizes them once."""
        gemm = site.node
        with self.graph.inserting_before(gemm):
            args, kwargs = torch.fx.map_arg((gemm.args, gemm.kwargs), self._detached)
            node = self.graph.create_node(gemm.op, gemm.target, args, kwargs)
        node.meta = dict(gemm.meta)
        return replace(site, node=node)

    def _detached(self, node: Node) -> Node:
        value = value_of(node)
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return node
        if node not in self.made:
            made = self.made[node] = self.graph.call_method("detach", (node,))
            made.meta = {**node.meta, "example_value": value.detach()}
        return self.made[node]


#: How a gradient is quantized in front of a backward product (arguments of `quantize_along`), ``None`` if it is not.
_Rounding = tuple[str, tuple[int, ...], tuple[int, ...]] | None


def _with_leaves(copy: Decision) -> tuple[Node, list[Node | None], list[_Rounding]]:
    """Make the operands of a copy leaves, but for a stored weight, which gets no gradient: the product, its leaves, and
    how their gradients read dY.
    """
    node: Node = copy.site.node
    leaves: list[Node | None] = []
    roundings = [_rounding(copy, position) for position in range(len(copy.site.slots))]
    for slot in copy.site.slots:
        if slot.stored:
            leaves.append(None)
            continue
        with node.graph.inserting_before(node):
            leaf = node.graph.call_function(_leaf, (slot.of(node),))
        slot.put(node, leaf)
        leaves.append(leaf)
    return node, leaves, roundings


def _rounding(decision: Decision, position: int) -> _Rounding:
    role = role_of_slot(decision.site, position)
    gradient = decision.gradients.get(role)
    if gradient is None or role not in (*decision.rounded, *decision.folded):
        return None
    if gradient.quantizer.granularity.kind == "tensor":
        return str(gradient.quantizer), (), ()
    axes = axes_of_result(decision.site)
    return None if axes is None else (str(gradient.quantizer), axes[position], axes[1 - position])


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def read_copies(
    y: Tensor,
    scores: Tensor,
    row: int,
    columns: list[int],
    results: list[Tensor],
    backward: list[tuple[Tensor, list[Tensor | None], list[_Rounding]]],
) -> Tensor:
    """y. In the backward row ``row`` of ``scores`` gets the scores of ``results``, one for each of ``columns``.

    ``backward``: empty, or the product of every candidate and then the wide one, each with its leaves.
    """
    found: Tensor = _Probe.apply(y, scores, row, columns, results, backward)
    return found


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, *_: Any) -> Tensor:
        return y.detach()  # no view of y as autograd counts them: those cannot be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        y, scores, ctx.row, ctx.columns, results, ctx.backward_products = inputs
        ctx.like = scores.shape, scores.dtype, scores.device
        ctx.save_for_backward(*(result.detach() - y for result in results))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        shape, dtype, device = ctx.like
        found = torch.zeros(shape, dtype=dtype, device=device)
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        for column, error in zip(ctx.columns, ctx.saved_tensors, strict=True):
            found[ctx.row, column] = _squared(g * error)
        if ctx.backward_products:
            with torch.autocast(gradient.device.type, enabled=False):
                _compare(gradient, ctx.backward_products, ctx.columns, found[ctx.row])
        return gradient, found, None, None, None, None


def _compare(gradient: Tensor, products: list[Any], columns: list[int], row: Tensor) -> None:
    """Write the squared norms of both gradients of the wide product into a row, and of the candidates' errors."""
    candidates = (row.shape[0] - 2) // 3
    found: list[list[Any]] = [[_gradient(gradient, product, i) for i in range(2)] for product in products]
    *others, wide = found
    for position, exact in enumerate(wide):
        if exact is None:
            continue
        start = candidates + position * (1 + candidates)
        row[start] = _squared(exact)
        for column, other in zip(columns, others, strict=True):
            row[start + 1 + column] = _squared(other[position] - exact)


def _gradient(gradient: Tensor, product: Any, position: int) -> Tensor | None:
    """Of the operand at ``position``, if it is a leaf."""
    result, leaves, roundings = product
    if leaves[position] is None:
        return None
    rounding = roundings[position]
    read = gradient if rounding is None else quantize_along(gradient, *rounding)
    return torch.autograd.grad(result, leaves[position], read.to(result.dtype), retain_graph=True)[0]


def _squared(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(dtype=torch.float64)
