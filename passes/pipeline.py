"""The whole pipeline, in order, and its hooks into Inductor. Start reading here.

============== ================================================= ======================= =============================
stage          graph                                             pass                    changes numbers?
============== ================================================= ======================= =============================
dynamo         Dynamo FX graph, one per sub-graph                  expand                  no
dynamo                                                           find_gemms → plan       no
dynamo                                                           insert                  **yes, by the recipe**
dynamo                                                           quantize_gradients      **yes, if gradient= is set**
joint          forward and backward in ATen, before partitioning account                 no (counts products)
joint                                                            cancel_rotations        no
joint                                                            fuse                    no
joint                                                            fold                    **yes, if backward= is set**
joint                                                            hints                   no
joint                                                            audit                   no (records what is left)
joint                                                            lower_frozen            no (inference with freezing)
partition      joint → forward, backward                         narrow_saved            **yes, if save= is set**
post_grad      forward, then backward                            lower → merge_quantize  no
============== ================================================= ======================= =============================
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch.fx import Graph, GraphModule

from qcompile import compat
from qcompile.ir.recipe import Recipe

from .account import account
from .audit import audit
from .cancel_rotations import cancel_rotations
from .expand import expand
from .find_gemms import find_gemms
from .fold import fold
from .fuse import fuse
from .insert import insert, stamp
from .lower import lower, lower_frozen
from .merge_quantize import merge_quantize
from .names import Names
from .partition import Partitioner, hints
from .pass_base import Context, GraphPass, Observations, dump, log, run_passes
from .pin import pin
from .plan import Plan, all_rules, make_plan

__all__ = ["PASS_NAMES", "hooks", "rewrite"]

ACCOUNT, AUDIT = GraphPass("account", account, dumped=False), GraphPass("audit", audit)
JOINT = (
    ACCOUNT,
    GraphPass("cancel_rotations", cancel_rotations),
    GraphPass("fuse", fuse),
    GraphPass("fold", fold),
    GraphPass("hints", hints),
    AUDIT,
    GraphPass("lower_frozen", lower_frozen),
)
POST_GRAD = (GraphPass("lower", lower), GraphPass("merge_quantize", merge_quantize))

#: Names that ``disable_passes`` takes. Without `lower`, ``quantized_mm`` runs as its own reference.
PASS_NAMES = ("expand", "insert", "quantize_gradients", *(p.name for p in (*JOINT, *POST_GRAD)))


def rewrite(
    gm: GraphModule, recipe: Recipe, observe: Observations | None = None, call: compat.CompiledCall | None = None
) -> Context:
    """Stage one: expand, find, plan and insert on a Dynamo graph, in place.

    Layers are named as ``call`` names them, by default the one on the Python stack.
    """
    if recipe.enabled and "expand" not in recipe.disable_passes:
        expand(gm)
    names = Names(gm, call or compat.compiled_call())
    sites = find_gemms(gm, names)
    plan = make_plan(sites, recipe)
    pin(gm, names, sites, all_rules(recipe))
    context = Context(recipe, plan, observe)
    if observe is not None:
        observe.plan = plan
    dump("dynamo_captured", gm.graph, context)
    stamp(plan)
    if plan.quantized:
        wrapped = insert(gm, plan)
        log.debug("dynamo/insert: %d operands of %d sites", wrapped, len(plan.quantized))
        dump("dynamo_insert", gm.graph, context)
    return context


def hooks(context: Context, patches: dict[str, Any]) -> dict[str, Any]:
    """Inductor config that runs the later stages. Hooks the user has set already run first.

    Where nothing is quantized, only what observes runs: `explain` compares with such a model.
    """
    identity = cache_identity(context.recipe, context.plan)
    stages = {"joint": JOINT, "post_grad": POST_GRAD} if context.plan.quantized else {"joint": (ACCOUNT, AUDIT)}
    config: dict[str, Any] = {}
    for name, passes in stages.items():
        hook = f"{name}_custom_pre_pass"
        config[hook] = Stage(name, passes, context, identity, compat.user_hook(hook, patches))
    if context.recipe.save != "exact" or context.observe is not None:
        chained = compat.user_hook("custom_partitioner_fn", patches)
        config["custom_partitioner_fn"] = Partitioner(context, identity, chained)
    return config


class Stage(compat.CustomGraphPass):
    """One hook: the user's pass, if any, then ours."""

    def __init__(self, name: str, passes: tuple[GraphPass, ...], context: Context, identity: str, chained: Any) -> None:
        self.name, self.passes, self.context, self.identity = name, passes, context, identity
        self.chained = chained if isinstance(chained, (list, tuple)) else [chained] if chained is not None else []

    def __call__(self, graph: Graph) -> None:
        for user_pass in self.chained:
            user_pass(graph)
        run_passes(self.name, self.passes, graph, self.context)

    def __deepcopy__(self, memo: Any) -> Stage:
        return self  # Inductor copies its config; the plan and its graph's fake tensors cannot be copied

    def uuid(self) -> Any:
        return ("qcompile", self.name, self.identity, [p.uuid() for p in self.chained])


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
    import qcompile.kernels
    import qcompile.passes

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
