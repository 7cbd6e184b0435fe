"""What every pass over an ATen graph has in common: a name, a match count, timing, dumps and an op-count diff.

A pass is a function ``(graph, context) -> matches``. The runner below does the rest, so that a pass file holds only its
rewrite. Set ``QCOMPILE_LOGS=debug`` (or the level of the standard logger ``qcompile``) to see, per pass, the matches,
the milliseconds and which ops came and went.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, ParamSpec

import torch
from torch.fx import Graph

from qcompile import compat
from qcompile.ir.recipe import Recipe

from .record import Plan, Provision
from .verify import verify

__all__ = [
    "Context", "EncoderKey", "GraphPass", "MaskedAttention", "Observations", "Product", "Work", "dump", "log",
    "run_passes",
]  # fmt: skip

log = logging.getLogger("qcompile")
if _level := os.environ.get("QCOMPILE_LOGS"):
    log.setLevel(_level.upper())
    log.addHandler(logging.StreamHandler())


@dataclass(frozen=True)
class Product:
    """One product of a joint graph.

    Attributes:
        site: index of the site it belongs to, or ``None``. body: whether it is in the body of a higher-order op (or in
        an inference graph), which may run any number of times and is counted once.
        role: fprop, dgrad, wgrad, "dgrad+wgrad", or "backward" where the graph does not tell which.
        op: its name in ATen. flops: floating-point operations, 0 for the opaque op of another library.
        quantized: whether it reads an operand that was quantized. where: ``file:line`` of the model.
    """

    site: int | None
    body: bool
    role: str
    op: str
    flops: int
    quantized: bool
    where: str


@dataclass(frozen=True)
class MaskedAttention:
    """What became of a call of ``scaled_dot_product_attention`` with a mask (`causal_masks`).

    Attributes:
        became: what it is told instead of the mask; empty where the mask stays. grouped: whether it reads the heads of
        keys and values before they are repeated. reason: why the mask, or the repetition, stays.
    """

    became: str = ""
    grouped: bool = False
    reason: str = ""


class EncoderKey(NamedTuple):
    """What tells encoders apart: the texts of quantizer and transform, and the dtype of what is encoded."""

    quantizer: str
    transform: str
    dtype: torch.dtype


@dataclass
class Observations:
    """What the passes saw of one compiled graph; kept for `explain`, empty otherwise.

    Attributes:
        programs: readable program after each pass, by stage and pass name.
        gemms: rows the joint audit leaves: one a GEMM of the joint graph.
        products: every product that AOTAutograd made of the graph, forward and backward, with its FLOPs and its site.
        encoders: what runs the ops that quantize, in the post-grad graphs, each as often as it differs.
        saved: tensors the partitioner keeps for the backward.
        plan: the decisions about the graph.
        masked: calls of attention that were given a mask.
    """

    programs: dict[str, str] = field(default_factory=dict)
    gemms: list[dict[str, Any]] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    encoders: dict[EncoderKey, list[Provision]] = field(default_factory=dict)
    saved: list[dict[str, Any]] = field(default_factory=list)
    plan: Plan | None = None
    masked: list[MaskedAttention] = field(default_factory=list)

    @property
    def unaccounted(self) -> list[Product]:
        """Products that belong to no site: what `find_gemms` missed."""
        return [product for product in self.products if product.site is None]


@dataclass
class Context:
    """What a pass may look at: the recipe and the plan, never the user's model. ``observe`` is set under `explain`.

    ``watched``: (layer, kind, operand text) of every row of statistics that the graph returns (`watch`).
    """

    recipe: Recipe
    plan: Plan
    observe: Observations | None = None
    watched: list[tuple[str, str, str]] = field(default_factory=list)


Work = ParamSpec("Work")


@dataclass(frozen=True)
class GraphPass(Generic[Work]):
    """A named pass; ``run`` takes what its stage works on and returns how many places it changed.

    Attributes:
        changes: whether it may change a model's numbers, as the table of the pipeline says it.
        optional: whether ``disable_passes`` takes its name; nothing works without the others.
        by_request: whether it runs only if ``enable_passes`` has its name.
        observes: it rewrites nothing, and runs where nothing is quantized, too.
        dumped: whether the program after it is worth a record.
    """

    name: str
    run: Callable[Work, int]
    changes: str = "no"
    optional: bool = True
    by_request: bool = False
    observes: bool = False
    dumped: bool = True

    def runs(self, recipe: Recipe) -> bool:
        """Whether a recipe lets it run."""
        return self.name not in recipe.disable_passes and (not self.by_request or self.name in recipe.enable_passes)


def run_passes(stage: str, passes: Iterable[GraphPass[Graph, Context]], graph: Graph, context: Context) -> None:
    """Run ``passes`` in order, leaving out those that the recipe does."""
    for graph_pass in passes:
        if not graph_pass.runs(context.recipe):
            continue
        debugging = log.isEnabledFor(logging.DEBUG)
        before, start = count_ops(graph) if debugging else Counter(), time.perf_counter()
        matches = graph_pass.run(graph, context)
        if matches:
            compat.erase_unread(graph)
        if debugging:
            elapsed = (time.perf_counter() - start) * 1e3
            diff = op_diff(before, count_ops(graph))
            log.debug("%s/%s: %d matches in %.1f ms%s", stage, graph_pass.name, matches, elapsed, diff)
        if graph_pass.dumped:
            dump(f"{stage}_{graph_pass.name}", graph, context)
        if context.recipe.debug:
            verify(graph, f"{stage}/{graph_pass.name}", context.recipe.disable_passes)


def dump(name: str, graph: Graph, context: Context) -> None:
    """Record the program for the report and for tlparse."""
    text = functools.cache(functools.partial(program_text, graph))  # both may want it, usually neither does
    compat.log_artifact(name, text)
    if context.observe is not None:
        key, n = name, 1
        while key in context.observe.programs:  # one joint graph per sub-graph module, two post-grad graphs
            n += 1
            key = f"{name}_{n}"
        context.observe.programs[key] = text()


def program_text(graph: Graph) -> str:
    """The graph as Python source, with shapes, strides and devices.

    The module that prints it is a lazy one: any other generates and compiles its code first, which takes as long again.
    """
    owner = graph.owning_module
    module = compat.LazyGraphModule(owner if owner is not None else torch.nn.Module(), graph, class_name="Program")
    graph.owning_module = owner  # a GraphModule takes its graph over; later passes must find the one they compile
    return module.print_readable(print_output=False, include_stride=True, include_device=True)


def count_ops(graph: Graph) -> Counter[str]:
    return Counter(str(n.target) for n in graph.nodes if n.op in ("call_function", "call_method"))


def op_diff(before: Counter[str], after: Counter[str]) -> str:
    """Text like ``; aten.mm.default 5 → 0, qcompile.quantized_mm.default 0 → 5``; empty if nothing changed."""
    changed = [op for op in sorted({*before, *after}) if before[op] != after[op]]
    return "".join(f"{', ' if i else '; '}{op} {before[op]} → {after[op]}" for i, op in enumerate(changed))
