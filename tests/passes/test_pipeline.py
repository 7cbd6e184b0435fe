"""How the passes hang together. What would break: a table that does not say what runs, a helper that two passes share
is looked for in a pass, a stage that the verifier knows nothing of, a provider that the report names and nothing runs.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import qcompile
from qcompile import compat
from qcompile.passes import pipeline
from qcompile.passes.graph import is_call
from qcompile.passes.pass_base import Context, GraphPass
from qcompile.passes.pipeline import PASS_NAMES, PIPELINE, table
from qcompile.passes.record import DECODED, PROVIDER_KEY, REFERENCE, Provision, mark_of, marked, site_index
from qcompile.passes.verify import STAGES, VerificationError, verify
from qcompile.passes.views import Quantize, QuantizedMM, Recode
from qcompile.recipes import FP4

from .harness import DISTINCT, compile_and_run

FOLDER = Path(pipeline.__file__).parent


# --- the table ------------------------------------------------------------------------------------------------------


def test_programs_are_recorded_in_the_order_of_the_table() -> None:
    """One program after each pass that rewrites: a pass that ran elsewhere, or in another order, would show here."""
    listed = [f"{stage.name}_{p.name}" for stage in PIPELINE for p in stage.passes if not p.by_request]
    result = compile_and_run(nn.Linear(32, 24), torch.randn(16, 32), recipe=DISTINCT, gradient="fp8")
    (observed,) = result.observations
    recorded = [name for name in observed.programs if not name.endswith(("_2", "captured"))]
    assert recorded == [name for name in listed if name in recorded]
    assert set(listed) - set(recorded) == {
        "dynamo_adopt", "dynamo_causal_masks", "dynamo_expand", "dynamo_find_gemms", "dynamo_plan", "dynamo_watch",
        "joint_account",
        "joint_choose_providers", "partition_share_codes", "partition_narrow_saved", "post_grad_audit_encoders",
    }  # fmt: skip


def test_the_table_has_a_line_for_every_pass() -> None:
    _, _, *lines = table().splitlines()
    names = [line.split(" | ")[2] for line in lines]
    assert names == [p.name for stage in PIPELINE for p in stage.passes]
    assert len(set(names)) == len(names)
    assert set(PASS_NAMES) < set(names)


# --- who imports whom -----------------------------------------------------------------------------------------------


def imports(module: Path) -> set[str]:
    """Names of the modules of this folder that a module imports, anywhere in it."""
    found = [node for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.ImportFrom)]
    return {str(node.module) for node in found if node.level == 1 or str(node.module).startswith("qcompile.passes.")}


#: All that the pipeline imports, except for what passes share.
PASSES = imports(FOLDER / "pipeline.py") - {"graph", "names", "pass_base", "record"}


def test_what_the_passes_are() -> None:
    assert {
        "account", "accumulate", "adopt", "audit", "cancel_rotations", "causal_masks", "choose_providers", "expand",
        "find_gemms", "fold", "fuse", "fuse_producers", "gather_codes", "insert", "join_products", "lower",
        "merge_quantize", "move_factors", "partition", "pin", "plan", "probe", "quantize_gradients", "recompute_codes",
        "watch",
    } == PASSES  # fmt: skip


@pytest.mark.parametrize("module", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_only_the_pipeline_imports_passes(module: Path) -> None:
    assert module.stem == "pipeline" or not imports(module) & PASSES


def test_only_the_views_name_the_ops() -> None:
    """Whoever takes a node apart by positions, or makes one by hand, has to name its op first."""
    named = {path.stem for path in FOLDER.glob("*.py") if "torch.ops.qcompile" in path.read_text()}
    assert named == {"views"}


# --- what may stand in a graph after each stage ---------------------------------------------------------------------


def test_every_graph_pass_has_a_stage() -> None:
    assert list(STAGES) == [p.name for p in (*pipeline.JOINT.passes, *pipeline.POST_GRAD.passes)]


def product(levels: bool = False) -> Graph:
    graph = Graph()
    codes, scales, dense = (graph.placeholder(name) for name in ("codes", "scales", "dense"))
    left = ([codes], "levels e2m1") if levels else ([codes, scales], "e2m1 row absmax even; ste")
    graph.call_function(QuantizedMM.op, (*left, 8, False, [dense], "dense", 0, False, torch.float32))
    return graph


def recoded() -> Graph:
    graph = Graph()
    graph.call_function(Recode.op, (graph.placeholder("codes"), "e2m1", 8, False))
    return graph


def folded() -> Graph:
    graph = Graph()
    x, factors = graph.placeholder("x"), graph.placeholder("factors")
    x.meta["val"] = torch.empty(3, 8)
    node = graph.call_function(Quantize.op, (x, "e4m3 row absmax even", -1, None, None, factors))
    node.meta["val"] = torch.empty(3, 8, dtype=torch.uint8), torch.empty(3, 1)
    return graph


@pytest.mark.parametrize(
    ("graph", "before", "after", "why"),
    [
        (product(), "fuse", "account", "does not stand in a graph at this stage"),
        (product(), "fold", "lower", "does not stand in a graph at this stage"),
        (product(), "fold", "choose_providers", "nothing was chosen to run it"),
        (product(levels=True), "fold", "fuse", "reads levels without scales, which only the pass fold leaves"),
        (folded(), "fold", "fuse", "folds scales in, which only the pass fold does"),
        (recoded(), "lower", "fold", "does not stand in a graph at this stage"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stages(graph: Graph, before: str, after: str, why: str) -> None:
    """The same graph is right after one stage and wrong after another."""
    verify(graph, f"joint/{before}")
    with pytest.raises(VerificationError, match=f"after joint/{after}: .*{why}"):
        verify(graph, f"joint/{after}")


def test_a_body_may_come_a_second_time() -> None:
    """Torch runs the joint hook on the body of a nested region, and again with the graph that calls it."""
    graph = product()
    (node,) = QuantizedMM.calls(graph)
    marked(node, **{PROVIDER_KEY: Provision(DECODED)})
    verify(graph, "joint/account")
    with pytest.raises(VerificationError, match=r"after post_grad/lower: .* does not stand in a graph at this stage"):
        verify(graph, "post_grad/lower")


def test_what_a_disabled_pass_would_take_out_stays() -> None:
    verify(product(), "post_grad/merge_quantize", disabled=("lower",))


# --- providers ------------------------------------------------------------------------------------------------------

SIGNS = "midrise1 row absmax half_up"

#: Provider → what stands for a product that it runs.
EMITTED: dict[str, tuple[Any, ...]] = {
    DECODED: (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.qcompile.mm_add.default),
    REFERENCE: (QuantizedMM.op,),
    **dict.fromkeys(("cublaslt", "gluon", "triton"), (torch.ops.qcompile.mm_8bit.default,)),
    "popcount": (torch.ops.qcompile.mm_1bit.default,),
    "dot_scaled": (torch.ops.qcompile.mm_block_scaled.default,),
}


class Layers(nn.Module):
    wrong_in_inductor: ClassVar[set[str]] = set()

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.up(x)))


@pytest.mark.parametrize(
    ("capability", "options", "forward", "quantized_by"),
    [
        (None, {}, DECODED, "cpp"),
        (None, {"disable_passes": ["lower"]}, REFERENCE, "cpp"),
        ((9, 0), {"backward": "fp8", "activation": {"outliers": None}}, "triton", "other provider of quantize_8bit on"),
        ((9, 0), {"activation": SIGNS, "weight": SIGNS}, "popcount", "cpp"),
        ((10, 0), {"activation": "e2m1 block32 e8m0", "weight": "e2m1 block32 e8m0"}, "dot_scaled", "cpp"),
    ],
    ids=["decoded", "as they are", "8-bit", "1-bit", "fp4"],
)  # fmt: skip
def test_the_report_names_what_was_emitted(
    capability: Any, options: dict[str, Any], forward: str, quantized_by: str
) -> None:
    """Site by site, forward and backward: the provider in the report is the one whose product stands in the graph."""
    emitted: list[tuple[str, str]] = []

    def collect(graph: Graph, context: Context) -> int:
        for node in graph.nodes:
            provision = mark_of(node, PROVIDER_KEY)
            if provision is not None and is_call(node, *(op for ops in EMITTED.values() for op in ops)):
                assert node.target in EMITTED[provision.provider], node.format_node()
                emitted.append((context.plan.decisions[site_index(node)].site.name, provision.provider))  # type: ignore
        return 0

    passes = (*pipeline.POST_GRAD.passes, GraphPass("collect", collect, dumped=False))
    with (
        mock.patch.object(compat, "tensor_core_capability", return_value=capability),
        mock.patch.object(pipeline, "POST_GRAD", replace(pipeline.POST_GRAD, passes=passes)),
    ):
        x = torch.randn(16, 128, requires_grad=True)
        report = qcompile.explain(Layers(), x, options={"min_side": 0, "defaults": False, "debug": True, **options})
    rows = [row for row in report.rows if row.decision == "quantized"]
    assert sorted(emitted) == sorted((row.layer, row.provider.split("; ")[-1]) for row in rows)
    first = next(row.provider for row in rows if row.role == "fprop")
    assert first.endswith(f"; {forward}")
    assert quantized_by in first


# --- fake values ----------------------------------------------------------------------------------------------------


def wrong_values(graph: Graph) -> list[str]:
    """Nodes whose fake value differs from that of calling them anew: in shape, strides or dtype, or in which of the
    values they are given they share memory with.
    """
    wrong = []
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        given = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with value.fake_mode:  # type: ignore[attr-defined]
            anew = node.target(*given[0], **given[1])
        read = [compat.memory_of(source.meta.get("val")) for source in node.all_input_nodes]
        told = [(v.shape, v.stride(), v.dtype, [m == compat.memory_of(v) for m in read]) for v in (value, anew)]
        if told[0] != told[1]:
            wrong.append(f"{node.format_node()}: {told[0]}, not {told[1]}")
    return wrong


class Scored(Layers):
    """Inductor writes the loss's backward as a comparison, with a view whose memory no node makes."""

    wrong_in_inductor: ClassVar = {"expand_default"}

    def forward(self, x: Tensor) -> Tensor:
        labels = torch.arange(x.shape[1]).expand(x.shape[0], -1)
        return nn.functional.cross_entropy(super().forward(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("model", "capability", "options"),
    [
        (Layers, None, {}),
        (Scored, None, {}),
        (Layers, (9, 0), {"backward": "fp8", "activation": {"outliers": None}}),
    ],
    ids=["decoded", "with a loss", "8-bit"],
)
def test_fake_values_that_inductor_does_not_find_anew_are_right(
    model: type[Layers], capability: Any, options: dict[str, Any]
) -> None:
    """A view of a product that was replaced must not keep memory that nothing makes: Inductor decides by it what may be
    written in place. And what is right must not be found anew, which takes longer than all passes.
    """
    checked: list[int] = []

    def update(updater: Any) -> int:
        graph = updater.gm.graph if hasattr(updater, "gm") else updater.graph
        stale = [node for node in graph.nodes if updater.hash_node(node) not in updater.processed_hashes]
        if capability is None:
            assert not stale, stale
        found = wrong_values(graph)
        known = {*map(str, stale), *model.wrong_in_inductor}
        assert not [line for line in found if line.partition(" ")[0].strip("%") not in known], found
        checked.append(len(stale))
        return real(updater)

    from torch._inductor.fx_utils import FakeTensorUpdater

    real = FakeTensorUpdater.incremental_update
    with (
        mock.patch.object(FakeTensorUpdater, "incremental_update", update),
        mock.patch.object(compat, "tensor_core_capability", return_value=capability),
    ):
        compile_and_run(model(), torch.randn(2, 64, 128, requires_grad=True), recipe=FP4, **options)
    assert len(checked) >= 2
