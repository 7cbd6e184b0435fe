"""The whole pipeline, in order, and its hooks into Inductor. Start reading here.

:data:`PIPELINE` is what runs. ``python -m qcompile.passes.pipeline`` prints it as a table, with the graph that each
stage works on and which passes may change a model's numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic

from torch.fx import Graph, GraphModule

import qcompile.kernels  # registers the ops that the passes name
import qcompile.passes
from qcompile import compat
from qcompile.ir.recipe import Recipe

from .account import account
from .accumulate import accumulate
from .adopt import adopt
from .audit import audit, audit_encoders
from .cancel_rotations import cancel_rotations
from .causal_masks import causal_masks
from .choose_providers import choose_providers
from .expand import expand
from .find_gemms import find_gemms
from .fold import fold
from .fuse import fuse
from .fuse_producers import fuse_producers
from .gather_codes import gather_codes
from .graph import fake_values_read, unchanged
from .insert import insert, stamp
from .join_products import join_products
from .lower import lower, lower_frozen
from .merge_quantize import merge_quantize
from .move_factors import move_factors
from .names import Names
from .partition import Partitioner, hints, narrow_saved, share_codes
from .pass_base import Context, GraphPass, Observations, Work, dump, log, run_passes
from .pin import pin
from .plan import make_plan
from .probe import Probes, copy_products, probe
from .quantize_gradients import quantize_gradients
from .recompute_codes import recompute_codes
from .record import Plan, Site
from .watch import watch

__all__ = ["PASS_NAMES", "PIPELINE", "hooks", "rewrite", "rewrite_to_score", "table"]


@dataclass
class Capture:
    """A Dynamo graph on its way through the first stage. What one pass finds, later ones read."""

    gm: GraphModule
    recipe: Recipe
    observe: Observations | None
    call: compat.CompiledCall | None
    names: Names = field(init=False)
    sites: list[Site] = field(init=False)
    context: Context = field(init=False)

    def expand(self) -> int:
        return expand(self.gm) if self.recipe.enabled else 0

    def adopt(self) -> int:
        return adopt(self.gm) if self.recipe.enabled else 0

    def find_gemms(self) -> int:
        self.names = Names(self.gm, self.call or compat.compiled_call())
        self.sites = find_gemms(self.gm, self.names)
        return len(self.sites)

    def make_plan(self) -> int:
        plan = make_plan(self.sites, self.recipe)
        self.context = Context(self.recipe, plan, self.observe)
        if self.observe is not None:
            self.observe.plan = plan
        pin(self.gm, self.names, self.sites, self.recipe.all_rules)
        dump("dynamo_captured", self.gm.graph, self.context)
        stamp(plan)
        return len(plan.quantized)

    def causal_masks(self) -> int:
        """Attention's kernels round otherwise, so not where nothing is quantized: the off switch changes no bit."""
        if not self.context.plan.quantized:
            return 0
        found = causal_masks(self.gm)
        changed = sum(bool(call.became) for call in found)
        if self.observe is not None:
            self.observe.masked = found
        if changed:
            log.debug("dynamo/causal_masks: %d of %d calls of attention with a mask", changed, len(found))
            dump("dynamo_causal_masks", self.gm.graph, self.context)
        return changed

    def insert(self) -> int:
        plan = self.context.plan
        wrapped = insert(self.gm, plan)
        if wrapped:
            log.debug("dynamo/insert: %d operands of %d sites", wrapped, len(plan.quantized))
            dump("dynamo_insert", self.gm.graph, self.context)
        return wrapped

    def quantize_gradients(self) -> int:
        split = quantize_gradients(self.gm, self.context.plan)
        if split:
            log.debug("dynamo/quantize_gradients: %d sites", split)
            dump("dynamo_quantize_gradients", self.gm.graph, self.context)
        return split

    def watch(self) -> int:
        if self.recipe.monitor and self.observe is None:
            self.context.watched = watch(self.gm, self.context.plan)
        return len(self.context.watched)


@dataclass(frozen=True)
class PipelineStage(Generic[Work]):
    """Passes over the same graphs. ``graph``: which these are."""

    name: str
    graph: str
    passes: tuple[GraphPass[Work], ...]

    def without_rewrites(self) -> PipelineStage[Work]:
        return replace(self, passes=tuple(p for p in self.passes if p.observes))


DYNAMO = PipelineStage(
    "dynamo",
    "Dynamo FX graph, one per sub-graph",
    (
        GraphPass("expand", Capture.expand),
        GraphPass("adopt", Capture.adopt),
        GraphPass("find_gemms", Capture.find_gemms, optional=False),
        GraphPass("plan", Capture.make_plan, optional=False),
        GraphPass("causal_masks", Capture.causal_masks, changes="no (attention's kernel, where a mask is only causal)"),
        GraphPass("insert", Capture.insert, changes="yes, by the recipe"),
        GraphPass("quantize_gradients", Capture.quantize_gradients, changes="yes, if gradient= is set"),
        GraphPass("watch", Capture.watch, changes="no (statistics, if monitor= is set)", optional=False),
    ),
)
JOINT = PipelineStage(
    "joint",
    "forward and backward in ATen, before partitioning",
    (
        GraphPass("account", account, changes="no (counts products)", observes=True, dumped=False),
        GraphPass("cancel_rotations", cancel_rotations),
        GraphPass("gather_codes", gather_codes),
        GraphPass("fuse", fuse),
        GraphPass("fold", fold, changes="yes, if backward= is set"),
        GraphPass(
            "move_factors",
            move_factors,
            changes="no (where LoRA's product is rounded, unless by powers of two)",
            by_request=True,
        ),
        GraphPass("hints", hints),
        GraphPass(
            "choose_providers",
            choose_providers,
            changes="no (what runs each product)",
            optional=False,
            dumped=False,
        ),
        GraphPass("audit", audit, changes="no (records what is left)", observes=True),
        GraphPass("lower_frozen", lower_frozen, changes="no (inference with freezing)"),
        GraphPass("recompute_codes", recompute_codes),
    ),
)
PARTITION = PipelineStage(
    "partition",
    "joint → forward, backward",
    (
        GraphPass("share_codes", share_codes, optional=False),
        GraphPass("narrow_saved", narrow_saved, changes="yes, if save= is set", optional=False),
    ),
)
POST_GRAD = PipelineStage(
    "post_grad",
    "forward, then backward",
    (
        GraphPass("lower", lower),
        GraphPass("join_products", join_products, changes="no (order of sums)", by_request=True),
        GraphPass("accumulate", accumulate, changes="no (where a sum of products is rounded)", by_request=True),
        GraphPass("merge_quantize", merge_quantize),
        GraphPass("fuse_producers", fuse_producers, by_request=True),
        GraphPass("audit_encoders", audit_encoders, changes="no (records what quantizes)", dumped=False),
    ),
)
PIPELINE: tuple[PipelineStage[Any], ...] = (DYNAMO, JOINT, PARTITION, POST_GRAD)

#: Names that ``disable_passes`` takes. Without `lower`, ``quantized_mm`` runs as its own reference.
PASS_NAMES = tuple(p.name for stage in PIPELINE for p in stage.passes if p.optional)
#: Names that ``enable_passes`` takes.
PASSES_BY_REQUEST = tuple(p.name for stage in PIPELINE for p in stage.passes if p.by_request)


def table() -> str:
    """The pipeline as a Markdown table, one line per pass."""
    rows = [(stage.name, stage.graph, p.name, p.changes) for stage in PIPELINE for p in stage.passes]
    lines = [("stage", "graph", "pass", "changes numbers?"), ("---",) * 4, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rewrite(
    gm: GraphModule, recipe: Recipe, observe: Observations | None = None, call: compat.CompiledCall | None = None
) -> Context:
    """The first stage: a Dynamo graph from `expand` to `watch`, in place.

    Layers are named as ``call`` names them, by default the one on the Python stack.
    """
    capture = Capture(gm, recipe, observe, call)
    for graph_pass in DYNAMO.passes:
        if graph_pass.runs(recipe):
            graph_pass.run(capture)
    return capture.context


def rewrite_to_score(
    gm: GraphModule, recipe: Recipe, candidates: Mapping[str, Recipe], gradients: bool
) -> tuple[Plan, dict[str, Plan], Probes]:
    """The first passes, then `insert` on copies of every product: a Dynamo graph that scores the candidates.

    Returns the plan by ``recipe``, those by the candidates, and what was put in. The graph is to be run as it is.
    """
    capture = Capture(gm, recipe, None, compat.compiled_call())
    for step in (capture.expand, capture.adopt, capture.find_gemms, capture.make_plan):
        step()
    plans = {name: make_plan(capture.sites, candidate) for name, candidate in candidates.items()}
    probes = copy_products(gm, plans, gradients)
    insert(gm, probes.plan)
    probe(gm, probes)
    return capture.context.plan, plans, probes


def hooks(context: Context, patches: dict[str, Any]) -> dict[str, Any]:
    """Inductor config that runs the later stages. Hooks the user has set already run first.

    Where nothing is quantized, only what observes runs: `explain` compares with such a model.
    """
    identity = cache_identity(context.recipe, context.plan)
    stages = (JOINT, POST_GRAD) if context.plan.quantized else (JOINT.without_rewrites(),)
    config: dict[str, Any] = {}
    for stage in stages:
        hook = f"{stage.name}_custom_pre_pass"
        config[hook] = Hook(stage, context, identity, compat.user_hook(hook, patches))
    if context.plan.quantized or context.observe is not None:
        chained = compat.user_hook("custom_partitioner_fn", patches)
        config["custom_partitioner_fn"] = Partitioner(context, identity, chained, PARTITION.passes)
    return config


class Hook(compat.CustomGraphPass):
    """A stage that Inductor calls: the user's pass, if any, then ours."""

    def __init__(self, stage: PipelineStage[Graph, Context], context: Context, identity: str, chained: Any) -> None:
        self.stage, self.context, self.identity = stage, context, identity
        self.chained = chained if isinstance(chained, (list, tuple)) else [chained] if chained is not None else []

    def __call__(self, graph: Graph) -> None:
        for user_pass in self.chained:
            user_pass(graph)
        # What a user's pass has left is for Inductor to find out.
        before = fake_values_read(graph) if self.stage is POST_GRAD and not self.chained else None
        run_passes(self.stage.name, self.stage.passes, graph, self.context)
        if before is not None:
            compat.fake_values_hold(graph, unchanged(graph, before))

    def __deepcopy__(self, memo: Any) -> Hook:
        return self  # Inductor copies its config; the plan and its graph's fake tensors cannot be copied

    def uuid(self) -> Any:
        return ("qcompile", self.stage.name, self.identity, [p.uuid() for p in self.chained])


def cache_identity(recipe: Recipe, plan: Plan) -> str:
    """What compiled code depends on besides the graph: every source file of this package, the recipe and the plan.

    Torch hashes neither the bodies of registered ops nor of lowerings, so all sources count, formats and estimators
    included.
    """
    text = "\n".join([source_digest(), package_version(), repr(recipe), plan.digest()])
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def source_digest() -> str:
    """SHA-256 over the package's Python sources, wherever the three folders are installed."""
    digest = hashlib.sha256()
    for package in (qcompile, qcompile.passes, qcompile.kernels):
        for folder in package.__path__:
            for path in sorted(Path(folder).rglob("*.py")):
                digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=1)
def package_version() -> str:
    try:
        return version("qcompile")
    except PackageNotFoundError:
        return "source"


if __name__ == "__main__":
    print(table())
