"""Compiled code is reused exactly when it may be: the hooks' identity, and both of torch's caches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.operand import Operand
from qcompile.ir.rules import Rule
from qcompile.passes import pipeline
from qcompile.passes.pipeline import cache_identity, hooks, source_digest
from qcompile.passes.record import Plan
from qcompile.recipes.fp4 import FP4

ROOT = Path(__file__).resolve().parents[1]


class Layers(nn.Module):
    """Two products, under names the caller chooses."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.order = (first, second)
        self.add_module(first, nn.Linear(48, 40))
        self.add_module(second, nn.Linear(40, 36))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (getattr(self, name) for name in self.order)
        return second(first(x).relu())


def plan_of(model: nn.Module, recipe=FP4) -> Plan:
    plans = []

    def backend(gm, inputs):
        plans.append(pipeline.rewrite(gm, recipe).plan)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(7, 48))
    (plan,) = plans
    return plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of(Layers("up", "down"))


# --- what the identity depends on ---------------------------------------------------------------------------

#: For each field of a recipe, a value the FP4 recipe does not have.
OTHER_VALUES = {
    "name": "other",
    "source": "arXiv 0000.00000",
    "activation": Operand.parse("e1m2 row"),
    "weight": Operand.parse("e2m1 row absmax even; dge(k=4,cap=3)"),
    "gradient": Operand.parse("e5m2 tensor"),
    "backward": "fp8",
    "forward": "bf16",
    "dgrad_weight": Operand.parse("e2m1 block32 e8m0"),
    "wgrad_activation": Operand.parse("e2m1 block16 e4m3"),
    "again_from": "codes",
    "skip": (),
    "rules": (Rule(name="up", weight="off"),),
    "heads": True,
    "min_side": 8,
    "attention": True,
    "saved_weights": "codes",
    "save": "8bit",
    "enabled": False,
    "fuel": 1,
    "disable_passes": ("fuse",),
    "enable_passes": ("fuse_producers",),
    "strict": True,
    "debug": True,
}


def test_equal_recipes_and_plans_are_one_identity(plan):
    """Otherwise nothing ever hits: a plan made again from another model of the same structure must agree."""
    again = plan_of(Layers("up", "down"))
    assert again is not plan
    assert cache_identity(replace(FP4), again) == cache_identity(FP4, plan)


@pytest.mark.parametrize("field", [f.name for f in fields(FP4) if f.compare and f.name != "user_patterns"])
def test_every_field_of_the_recipe_counts(plan, field):
    """A field left out of the identity would run code compiled for another value of it. Fields that do not compare
    show in the plan (the operands of a width) or in the graph (a monitor's statistics).
    """
    assert cache_identity(replace(FP4, **{field: OTHER_VALUES[field]}), plan) != cache_identity(FP4, plan)


def test_layer_names_do_not_count(plan):
    """Equal blocks under different names share their code."""
    renamed = plan_of(Layers("q_proj", "k_proj"))
    assert [d.site.name for d in renamed.decisions] != [d.site.name for d in plan.decisions]
    assert cache_identity(FP4, renamed) == cache_identity(FP4, plan)


def test_the_decisions_count(plan):
    """Same recipe, other plan: a site left alone, another operand or gradient, an activation for a weight."""
    changes = [
        plan_of(Layers("lm_head", "down")),
        plan_of(Layers("up", "down"), replace(FP4, rules=(Rule(name="up", weight="off"),))),
        plan_of(Layers("up", "down"), replace(FP4, rules=(Rule(name="up", gradient="fp8", roles=("wgrad",)),))),
        plan_of(Layers("up", "down"), replace(FP4, rules=(Rule(name="up", gradient="fp8", roles=("dgrad",)),))),
    ]
    site = plan.decisions[0].site
    slots = tuple(replace(slot, kind="activation") for slot in site.slots)
    other_kind = replace(plan.decisions[0], site=replace(site, slots=slots))
    changes.append(Plan([other_kind, *plan.decisions[1:]], plan.matched))
    identities = {cache_identity(FP4, changed) for changed in [plan, *changes]}
    assert len(identities) == len(changes) + 1


def test_any_source_file_counts(plan, monkeypatch):
    before = cache_identity(FP4, plan)
    monkeypatch.setattr(pipeline, "source_digest", lambda: "edited")
    assert cache_identity(FP4, plan) != before
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "package_version", lambda: "edited")
    assert cache_identity(FP4, plan) != before


@pytest.mark.parametrize(
    "file",
    ["ir/estimators.py", "ir/formats.py", "backends.py", "passes/fuse.py", "kernels/quantize/reference.py"],
)
def test_the_source_digest_sees_the_content_of(file, tmp_path, monkeypatch):
    """Torch hashes neither ops nor lowerings. Read from a copy of the package, one byte of which changes."""
    copy_package(tmp_path)
    before = digest_of(tmp_path, monkeypatch)
    assert digest_of(tmp_path, monkeypatch) == before
    path = tmp_path / "qcompile" / file
    path.write_text(path.read_text() + "#")
    assert digest_of(tmp_path, monkeypatch) != before


def test_the_source_digest_sees_a_file_move(tmp_path, monkeypatch):
    copy_package(tmp_path)
    before = digest_of(tmp_path, monkeypatch)
    (tmp_path / "qcompile/ir/formats.py").rename(tmp_path / "qcompile/ir/grids.py")
    assert digest_of(tmp_path, monkeypatch) != before


def copy_package(site: Path) -> None:
    """``site/qcompile`` as a wheel installs it: plain folders in place of links."""
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "qcompile", site / "qcompile", ignore=unwanted)


def digest_of(site: Path, monkeypatch) -> str:
    import qcompile
    import qcompile.kernels
    import qcompile.passes

    folders = {qcompile: "qcompile", qcompile.passes: "qcompile/passes", qcompile.kernels: "qcompile/kernels"}
    for package, folder in folders.items():
        monkeypatch.setattr(package, "__path__", [str(site / folder)])
    return source_digest.__wrapped__()


def test_every_hook_carries_the_identity(plan):
    """Inductor keys its cache by the hooks' uuids: each contains the identity and tells the stages apart."""
    context = pipeline.Context(replace(FP4, save="8bit"), plan)
    config = hooks(context, {})
    assert set(config) == {"joint_custom_pre_pass", "post_grad_custom_pre_pass", "custom_partitioner_fn"}
    uuids = [hook.uuid() for hook in config.values()]
    assert all(cache_identity(context.recipe, plan) in uuid for uuid in uuids)
    assert len(set(map(repr, uuids))) == 3
    assert isinstance(config["joint_custom_pre_pass"], compat.CustomGraphPass)
    assert isinstance(config["custom_partitioner_fn"], compat.CustomPartitionerFn)


def test_a_chained_hook_counts(plan):
    """A pass of the user's changes the code, so its uuid belongs to ours."""

    class Pass(compat.CustomGraphPass):
        def __init__(self, tag: str) -> None:
            self.tag = tag

        def __call__(self, graph) -> None: ...

        def uuid(self) -> str:
            return self.tag

    for name in ("joint_custom_pre_pass", "post_grad_custom_pre_pass"):
        uuids = [repr(hooks(pipeline.Context(FP4, plan), patches)[name].uuid()) for patches in
                 ({}, {name: Pass("a")}, {name: Pass("b")})]  # fmt: skip
        assert len(set(uuids)) == 3


def test_observing_never_caches():
    """A hit would skip the passes, and `explain` would report nothing."""
    model, x = Layers("up", "down"), torch.randn(7, 48)
    for _ in range(2):
        torch._dynamo.reset()
        observed = pipeline.Observations()

        def backend(gm, inputs, observed=observed):
            return compile_with(FP4, gm, inputs, observe=observed, inner_compile=compat.eager_inner_compile)

        torch.compile(model, backend=backend)(x)
        assert len(observed.gemms) == 5


# --- both caches, across processes --------------------------------------------------------------------------

STEP = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import qcompile
results = []
for options in map(json.loads, sys.argv[1:]):
    torch._dynamo.reset(); counters.clear(); torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 36))
    step = torch.compile(model, backend="qcompile_fp4", options=options)
    step(torch.randn(7, 48)).square().sum().backward()
    results.append({
        "package": qcompile.__file__,
        "gradient": model[0].weight.grad.tolist(),
        **{name: counters["inductor"][name] for name in
           ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")},
        **{name: counters["aot_autograd"][name] for name in
           ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass")},
    })
print(json.dumps(results))
"""


@pytest.mark.inductor
def test_a_second_process_hits_both_caches_and_any_change_misses(tmp_path):
    """Same source and recipe: hit, with the same gradient. Another recipe or estimator source: miss."""
    site = tmp_path / "site"
    copy_package(site)

    def run(*options):
        environment = {
            **os.environ, "PYTHONPATH": str(site), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-c", STEP, *map(json.dumps, options)]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 0, process.stderr[-3000:]
        results = json.loads(process.stdout.splitlines()[-1])
        for result in results:
            assert result.pop("package").startswith(str(site)), "the copy must be what runs"
            assert result["fxgraph_cache_bypass"] == result["autograd_cache_bypass"] == 0
        return results

    def missed(result):
        return (
            result["autograd_cache_hit"] == 0
            and result["autograd_cache_miss"] == 1
            and result["fxgraph_cache_hit"] == 0
        )

    [first] = run({})
    assert missed(first)
    second, other = run({}, {"saved_weights": "codes"})
    # The graphs of an AOTAutograd entry are looked up in the FX-graph cache: forward and backward.
    assert (second["autograd_cache_hit"], second["autograd_cache_miss"]) == (1, 0)
    assert (second["fxgraph_cache_hit"], second["fxgraph_cache_miss"]) == (2, 0)
    assert second["gradient"] == first["gradient"]

    assert missed(other)  # the Dynamo graph is the same; only our hooks know

    estimators = site / "qcompile/ir/estimators.py"
    source = estimators.read_text()
    assert source.count(".clamp(max=cap)") == 1
    estimators.write_text(source.replace(".clamp(max=cap)", ".clamp(max=cap * 0)"))
    [changed] = run({})
    assert missed(changed)
