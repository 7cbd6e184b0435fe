"""The report: what its rows, totals and programs say, what `explain` leaves, what is logged.

Graphs are executed eagerly here, as `explain` always does.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import RECIPES
from qcompile.report import ROLES, Report, Row

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mlp(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.inp = nn.Linear(40, 28)
        self.layers = nn.ModuleList(nn.Linear(28, 28) for _ in range(depth))
        self.lm_head = nn.Linear(28, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.lm_head(x)


@pytest.fixture(scope="module")
def report() -> Report:
    torch._dynamo.reset()
    return qcompile.explain(
        Mlp(),
        torch.randn(6, 40),
        options={
            "activation": {"outliers": "occ(alpha=0.9)"},  # rows this short have no outliers at 0.99
            "gradient": "fp8",
            "rules": [{"name": "layers.1", "weight": "off"}],
        },
    )


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_follow_the_program_and_the_roles(report):
    """One row per site and role, in program order; the input's gradient nobody needs; the head names its rule."""
    assert [(r.layer, r.role, r.decision) for r in report.rows] == [
        ("inp", "fprop", "quantized"),
        ("inp", "dgrad", "not computed"),
        ("inp", "wgrad", "quantized"),
        *(("layers.0", role, "quantized") for role in ROLES),
        ("layers.1", "fprop", "quantized"),
        ("layers.1", "dgrad", "quantized"),  # its weight is off, dY is not
        ("layers.1", "wgrad", "quantized"),
        ("lm_head", "-", "skipped"),
    ]
    assert report.rows[1].reason == "nothing upstream needs this gradient"
    assert report.rows[-1].reason == "skip='lm_head'"
    assert {r.op for r in report.rows} == {"linear"}
    assert report.rows[0].shape == "6×40 · 28×40"
    assert (report.sites, report.quantized_sites, report.graphs) == (4, 3, 1)


def test_rows_say_what_each_operand_is_read_as(report):
    rows = {(r.layer, r.role): r for r in report.rows}
    assert rows["layers.0", "fprop"].formats == "e2m1 row + residual × e2m1 row"
    assert rows["layers.0", "fprop"].estimator == "ste × dge(k=5,cap=3)"
    assert rows["layers.0", "dgrad"].formats == "e5m2 tensor × e2m1 row"
    assert rows["layers.0", "wgrad"].formats == "e5m2 tensor × e2m1 row + residual"
    assert rows["layers.1", "fprop"].formats == "e2m1 row + residual × float32"
    assert rows["layers.1", "fprop"].estimator == "ste × -"
    assert rows["layers.1", "wgrad"].formats == "e5m2 tensor × e2m1 row + residual"


def test_a_product_that_reads_nothing_quantized_is_not_called_quantized():
    """With weight and dY in high precision, dgrad multiplies two wide operands."""
    report = qcompile.explain(Mlp(), torch.randn(6, 40), options={"rules": [{"name": "layers.1", "weight": "off"}]})
    (row,) = (r for r in report.rows if (r.layer, r.role) == ("layers.1", "dgrad"))
    assert (row.formats, row.decision, row.provider) == ("float32 × float32", "skipped", "")
    assert row.reason == "both operands are kept in high precision"


def test_bytes_of_the_rows_add_up(report):
    """Codes belong to a row; the rest of what is saved belongs to none."""
    assert sum(row.saved_bytes for row in report.rows) == report.code_bytes > 0
    assert report.code_bytes == sum(t["bytes"] for t in report.saved if t["codes"])
    assert report.code_bytes < report.saved_bytes == sum(t["bytes"] for t in report.saved)
    assert all(row.role == "fprop" for row in report.rows if row.saved_bytes)


def test_one_shared_quantization_is_counted_once():
    """q, k and v read the same codes; counting them per layer would triple the total."""

    class Qkv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(40, 12) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) * self.k(x) + self.v(x)

    rows = [row for row in qcompile.explain(Qkv(), torch.randn(6, 40)).rows if row.role == "fprop"]
    assert [row.saved_bytes for row in rows] == [6 * (40 // 2 + 4), 0, 0]


def test_what_the_joint_graph_does_not_show_as_a_product_is_listed_all_the_same():
    """wgrad of a batch of matrix-vector products is a batch of outer products, which are multiplied out."""

    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 12, 40))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(self.weight, x)

    rows = qcompile.explain(Batched(), torch.randn(5, 40, 1, requires_grad=True)).rows
    assert [(row.role, row.decision) for row in rows] == [(role, "quantized") for role in ROLES]
    if torch.__version__ < "2.13":
        assert "e2m1 row" in rows[-1].formats  # torch 2.11 leaves it a bmm
    else:
        assert rows[-1].reason == "not a matrix product in the joint graph; it reads the decoded operands"


def test_a_convolution_reads_what_the_plan_says():
    """Its windows are quantized and put together again, which hides the codes from the audit."""
    model, x = nn.Conv2d(3, 8, 5, stride=5), torch.randn(2, 3, 20, 20)
    assert [(r.role, r.decision, r.formats) for r in qcompile.explain(model, x).rows] == [
        ("fprop", "quantized", "e2m1 row + e4m3 outliers × e2m1 row"),
        ("dgrad", "not computed", ""),
        ("wgrad", "quantized", "float32 × e2m1 row + e4m3 outliers"),
    ]


def test_inference_has_no_backward_rows():
    with torch.no_grad():
        report = qcompile.explain(Mlp(), torch.randn(6, 40))
    assert {row.role for row in report.rows} == {"fprop", "-"}
    assert report.saved == []
    assert "kept for the backward" not in report.summary()


def test_dynamic_sizes_are_shown_and_counted_by_example():
    x = torch.randn(6, 40)
    torch._dynamo.mark_dynamic(x, 0)
    report = qcompile.explain(Mlp(), x)
    rows, _, contraction = report.rows[0].shape.split(" · ")[0].partition("×")
    assert rows.startswith("s")
    assert contraction == "40"
    assert report.code_bytes == 6 * (40 // 2 + 4) + 2 * 6 * (28 // 2 + 4)


def test_functional_code_reports_its_backward_too():
    """Weights may be inputs, or belong to a module that a function closes over; the backward is there."""
    weight, x, module = torch.randn(40, 12, requires_grad=True), torch.randn(6, 40), nn.Linear(40, 12)
    for function, args in ((lambda w, x: x @ w, (weight, x)), (lambda x: module(x).sum(), (x,))):
        report = qcompile.explain(function, *args)
        assert [(r.role, r.decision) for r in report.rows] == [
            ("fprop", "quantized"), ("dgrad", "not computed"), ("wgrad", "quantized")
        ]  # fmt: skip
        assert "post_grad_lower_2" in report.programs
    assert weight.grad is None
    assert module.weight.grad is None


def test_complex_outputs_do_not_hinder_the_backward():
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(40, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(self.layer(x))

    assert [r.role for r in qcompile.explain(Spectrum(), torch.randn(6, 40)).rows] == list(ROLES)


# --- merged over ranks ---------------------------------------------------------------------------------------


def site(layer: str, decision: str = "quantized", **changes: Any) -> list[Row]:
    """Rows of one linear layer as one process reports them."""
    row = Row(layer, "linear", "fprop", "6×40 · 28×40", "e2m1 row × e2m1 row", "ste × ste", "cpp", 144, decision, "")
    row = replace(row, **changes)
    if decision == "skipped":
        return [replace(row, role="-", formats="", estimator="", provider="", saved_bytes=0)]
    return [row, replace(row, role="wgrad", estimator="", saved_bytes=0)]


def of_rank(*sites: list[Row], backend: str = "qcompile_fp4", graphs: int = 1) -> Report:
    rows = [row for rows in sites for row in rows]
    saved = [{"bytes": 200, "codes": False}, {"bytes": sum(row.saved_bytes for row in rows), "codes": True}]
    return Report(backend, rows, {"dynamo_captured": ""}, saved, graphs)


def listed(report: Report) -> list[tuple[str, str, str, tuple[int, ...]]]:
    return [(row.layer, row.role, row.shape[:4], row.ranks) for row in report.rows]


def test_equal_rows_of_ranks_are_one_row():
    """Bytes of a row are a rank's; totals are sums over ranks."""
    one = of_rank(site("up"), site("head", "skipped", reason="skip='head'"))
    merged = Report.merged([one, one])
    assert listed(merged) == [
        ("up", "fprop", "6×40", (0, 1)),
        ("up", "wgrad", "6×40", (0, 1)),
        ("head", "-", "6×40", (0, 1)),
    ]
    assert (merged.ranks, merged.sites, merged.quantized_sites, merged.graphs) == ((0, 1), 2, 1, 1)
    assert merged.rows[0].saved_bytes == 144
    assert (merged.code_bytes, merged.saved_bytes) == (2 * 144, 2 * 344)
    assert [entry["rank"] for entry in merged.saved] == [0, 0, 1, 1]
    assert merged.disagreements == []
    assert merged.summary() == (
        "2 ranks: qcompile_fp4: 1 of 2 GEMM sites quantized in 1 graph(s); "
        "688 B kept for the backward over all ranks, 288 B of it as codes"
    )
    assert str(merged).count("2 ranks") == 1  # what holds for all rows is said once


def test_stages_of_a_pipeline_stay_apart():
    """Each row names its ranks, which need not begin at 0; nobody disagrees about what others do not have."""
    stages = [of_rank(site("layers.0")), of_rank(site("layers.0")), of_rank(site("layers.1"), graphs=3)]
    merged = Report.merged(stages, ranks=[4, 5, 7])
    assert [(row.layer, row.ranks) for row in merged.rows[::2]] == [("layers.0", (4, 5)), ("layers.1", (7,))]
    assert (merged.graphs, merged.disagreements) == (3, [])
    assert "ranks 4–5" in str(merged)
    assert "rank 7" in str(merged)


def test_an_uneven_batch_is_no_disagreement():
    """Other shapes, bytes and kernels: two rows, the variants of a layer below each other."""
    short = of_rank(site("up", shape="5×40 · 28×40", saved_bytes=120, provider="aten"), site("down"))
    merged = Report.merged([of_rank(site("up"), site("down")), short])
    assert [(row.layer, row.shape[:4], row.ranks) for row in merged.rows if row.role == "fprop"] == [
        ("up", "6×40", (0,)),
        ("up", "5×40", (1,)),
        ("down", "6×40", (0, 1)),
    ]
    assert merged.disagreements == []


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (site("up", "skipped", reason="skip='up'"), "skipped (skip='up')"),
        (site("up", formats="midrise4 row × midrise4 row"), "fprop quantized midrise4 row × midrise4 row ste × ste"),
        (site("up", estimator="trust × trust"), "fprop quantized e2m1 row × e2m1 row trust × trust"),
        (site("up")[:1], "fprop quantized e2m1 row × e2m1 row ste × ste"),
    ],
    ids=["skipped", "format", "estimator", "frozen"],
)
def test_a_site_that_ranks_treat_differently_is_shown_first(other, said):
    usual = of_rank(site("up"), site("down"))
    merged = Report.merged([usual, usual, of_rank(other, site("down")), usual])
    (line,) = merged.disagreements
    assert line.startswith("up (linear): ranks 0–1, 3: fprop quantized e2m1 row × e2m1 row ste × ste; wgrad quantized")
    assert f"| rank 2: {said}" in line
    assert merged.summary().endswith(f"\nRANKS DISAGREE about 1 site(s):\n{line}")
    assert " ".join(str(merged).split()).startswith(" ".join(merged.summary().split()))
    assert json.loads(merged.to_json())["disagreements"] == [line]


def test_a_layer_that_is_called_twice_stays_two_sites():
    """Calls are compared one by one: here the first has another shape on rank 1, and nothing else differs."""

    def calls(shape: str) -> Report:
        return of_rank(site("up", shape=shape), site("up", estimator="clip × clip"))

    merged = Report.merged([calls("6×40 · 28×40"), calls("5×40 · 28×40")])
    assert [(row.shape[:4], row.estimator, row.ranks) for row in merged.rows if row.role == "fprop"] == [
        ("6×40", "ste × ste", (0,)),
        ("5×40", "ste × ste", (1,)),
        ("6×40", "clip × clip", (0, 1)),
    ]
    assert merged.disagreements == []
    assert Report.merged([of_rank(site("up"), site("up"))] * 2).sites == 2


def test_many_disagreements_do_not_fill_the_screen():
    names = [f"layers.{i}" for i in range(20)]
    merged = Report.merged([of_rank(*map(site, names)), of_rank(*(site(n, "skipped", reason="fuel") for n in names))])
    assert len(merged.disagreements) == 20
    assert "RANKS DISAGREE about 20 site(s)" in merged.summary()
    assert merged.summary().endswith("… and 12 more")


def test_merged_reports_survive_json():
    merged = Report.merged(
        [of_rank(site("up")), of_rank(site("up", "skipped", reason="fuel"), backend="qcompile_quest")]
    )
    data = json.loads(merged.to_json())
    assert data["backend"] == "qcompile_fp4 / qcompile_quest"
    assert [Row(**row) for row in data["rows"]] == merged.rows
    assert data["ranks"] == [0, 1]


def test_wrong_uses_of_merging_are_plain_errors():
    one = of_rank(site("up"))
    for reports, ranks in (([], None), ([one, one], [0]), ([one, Report.merged([one])], None)):
        with pytest.raises(ValueError, match="merging takes one report of one process per rank, got"):
            Report.merged(reports, ranks)
    with pytest.raises(RuntimeError, match=r"^Report\.gather needs a process group: call torch\.distributed\.init"):
        one.gather()


@pytest.mark.parametrize(
    "options", [{"enabled": False}, {"activation": "off", "weight": "off"}, {"enabled": False, "save": "4bit"}, {}],
    ids=["off", "no operand", "off though narrowed", "on"],
)  # fmt: skip
def test_saved_bytes_are_what_autograd_keeps_quantized_or_not(options):
    """Before and after can be compared, and watching an unquantized model changes neither its bytes nor its numbers."""
    model, x = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 12)), torch.randn(33, 40)
    report = qcompile.explain(model, x, options=options)

    def backend(gm, inputs):
        return compile_with(
            RECIPES["qcompile_fp4"], gm, inputs, options=options, inner_compile=compat.eager_inner_compile
        )

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    with qcompile.saved_bytes(model, x) as measured:
        compiled(x)
    assert report.saved_bytes == measured.total > 0
    assert (report.code_bytes == 0) == (options != {})


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.Identity])
@pytest.mark.parametrize("enabled", [False, True])
def test_what_one_graph_computes_and_the_next_one_saves_counts_once(enabled, act):
    """An input of a graph is alive anyway only if it is the user's; a result that both graphs save is one tensor."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.second = nn.Linear(40, 64), act(), nn.Linear(64, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.act(self.first(x))
            torch._dynamo.graph_break()
            return self.second(y)

    model, x, options = Broken(), torch.randn(33, 40), {"enabled": enabled}
    report = qcompile.explain(model, x, options=options)

    def backend(gm, inputs):
        return compile_with(
            RECIPES["qcompile_fp4"], gm, inputs, options=options, inner_compile=compat.eager_inner_compile
        )

    compiled = torch.compile(model, backend=backend)
    compiled(x)
    with qcompile.saved_bytes(model, x) as measured:
        compiled(x)
    assert report.graphs == 2
    assert report.saved_bytes == measured.total > 0


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_weights_are_parameters_and_not_saved(compiled):
    """Their codes and scales are alive anyway. What is kept of two frozen layers is the output of the ReLU."""
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).requires_grad_(False)
    qcompile.pack_(model, "nf4 block64 absmax_bnb; nested")
    x = torch.randn(8, 64, requires_grad=True)

    def backend(gm, inputs):
        return compile_with(RECIPES["qcompile_stored"], gm, inputs, inner_compile=compat.eager_inner_compile)

    call = torch.compile(model, backend=backend) if compiled else model
    call(x)
    with qcompile.saved_bytes(model, x) as measured:
        call(x)
    assert [shape for shape, _, _ in measured.tensors] == [(8, 128)]
    assert qcompile.explain(model, x, backend="qcompile_stored").saved_bytes <= 8 * 128 * 4


# --- programs -----------------------------------------------------------------------------------------------


def test_there_is_a_program_after_every_pass_for_both_directions(report):
    assert list(report.programs) == [
        "dynamo_captured", "dynamo_insert", "dynamo_quantize_gradients",
        "joint_cancel_rotations", "joint_gather_codes", "joint_fuse", "joint_fold", "joint_hints", "joint_audit",
        "joint_lower_frozen", "joint_recompute_codes",
        "post_grad_lower", "post_grad_merge_quantize", "post_grad_lower_2", "post_grad_merge_quantize_2",
    ]  # fmt: skip


def test_programs_are_python_and_show_what_the_pass_did(report):
    """One can save them, read them and diff them."""
    for name, text in report.programs.items():
        compile(text, name, "exec")
        (program,) = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef))
        assert program.name == "Program"
    calls = {name: text.count("torch.ops.qcompile.") for name, text in report.programs.items()}
    assert calls["dynamo_captured"] == 0
    assert report.programs["dynamo_insert"].count("qcompile.fake_quantize") == 5
    for before, after, op, change in (
        ("dynamo_insert", "joint_cancel_rotations", "fake_quantize", -5),
        ("joint_cancel_rotations", "joint_fuse", "quantized_mm", +8),
    ):
        assert (
            report.programs[after].count(f"qcompile.{op}.") - report.programs[before].count(f"qcompile.{op}") == change
        )
    assert "quantized_mm" not in report.programs["post_grad_lower"] + report.programs["post_grad_lower_2"]


def test_a_disabled_pass_has_no_program():
    report = qcompile.explain(Mlp(), torch.randn(6, 40), options={"disable_passes": ["fuse", "insert"]})
    assert not {"joint_fuse", "dynamo_insert"} & set(report.programs)


# --- explain leaves no trace --------------------------------------------------------------------------------


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(40, 12), nn.BatchNorm1d(12), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(self.layer(x)))


@pytest.mark.parametrize("training", [True, False])
def test_explain_changes_nothing(training):
    """Running statistics, gradients, random state, modes and parameters are those from before."""
    model, x = Stateful().train(training), torch.randn(6, 40, requires_grad=True)
    model.layer.weight.grad = torch.full_like(model.layer.weight, 3.0)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    assert qcompile.explain(model, x).quantized_sites == 1
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.layer.weight.grad, torch.full_like(model.layer.weight, 3.0))
    assert model.layer.bias.grad is None
    assert x.grad is None
    assert all(module.training is training for module in model.modules())


def test_explain_puts_things_back_after_an_error_too():
    class Failing(Stateful):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            torch._dynamo.graph_break()
            msg = "no such luck"
            raise LookupError(msg)

    model = Failing()
    model.compile(backend="eager")
    in_place, generator = model._compiled_call_impl, torch.get_rng_state()
    with pytest.raises(LookupError, match="no such luck"):
        qcompile.explain(model, torch.randn(6, 40))
    assert model._compiled_call_impl is in_place
    assert torch.equal(model.norm.running_mean, torch.zeros(12))
    assert not torch.equal(torch.get_rng_state(), generator)  # the input was drawn after the state was read


@pytest.mark.parametrize("how", ["wrapped", "in place", "its blocks in place"])
def test_a_model_that_is_compiled_already_is_explained_all_the_same(how):
    model, x = Mlp(), torch.randn(6, 40)
    expected = [replace(row) for row in qcompile.explain(model, x).rows]
    subject: nn.Module = model
    if how == "wrapped":
        subject = torch.compile(model, backend="eager")  # type: ignore[assignment]
    elif how == "in place":
        model.compile(backend="eager")
    else:
        for layer in model.layers:
            layer.compile(backend="eager")
    in_place = model._compiled_call_impl
    subject(x)
    assert qcompile.explain(subject, x).rows == expected
    assert model._compiled_call_impl is in_place


def test_explaining_often_neither_runs_dry_nor_keeps_the_model_from_being_compiled():
    """Dynamo gives up on a code object after eight versions: reports would be empty, and training eager."""
    model, x = Mlp(), torch.randn(6, 40)
    limit = torch._dynamo.config.recompile_limit
    assert {qcompile.explain(model, x).sites for _ in range(limit + 2)} == {4}
    compiled = []

    def backend(gm, inputs):
        compiled.append(gm)
        return gm.forward

    torch.compile(model, backend=backend)(x)
    assert len(compiled) == 1
    assert torch._dynamo.config.recompile_limit == limit


# --- wrong use ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"backend": "qcompile_fp3"}, r"unknown backend 'qcompile_fp3'; known: qcompile_fp4"),
        ({"options": {"weigth": "off"}}, r"unknown option 'weigth'; did you mean 'weight'\?"),
        (
            {"options": {"skip": ["nowhere"]}},
            r"skip='nowhere' matched no GEMM of the model; its layers: inp, layers\.0",
        ),
    ],
)
def test_mistakes_are_plain_value_errors(kwargs, message):
    """Not wrapped by Dynamo: the first line is ours."""
    with pytest.raises(ValueError, match=f"^{message}"):
        qcompile.explain(Mlp(), torch.randn(6, 40), **kwargs)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: qcompile.explain(model, torch.randn(6, 40)),
        lambda model: qcompile.save_repro("repro", model, torch.randn(6, 40)),
        lambda model: qcompile.gradient_cosine(model, lambda compiled: compiled(torch.randn(6, 40)).sum()),
        lambda model: qcompile.saved_bytes(model).__enter__(),
    ],
    ids=["explain", "save_repro", "gradient_cosine", "saved_bytes"],
)
def test_a_class_is_no_model(use, monkeypatch, tmp_path):
    """``torch.compile(nn.Linear)`` wraps the class's ``__call__`` for the whole process."""
    monkeypatch.chdir(tmp_path)
    called = Mlp.__call__
    with pytest.raises(ValueError, match=r": takes a model, got the class Mlp; make an instance: Mlp\(\.\.\.\)$"):
        use(Mlp)
    assert Mlp.__call__ is called
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r": takes a module or function, got int$"):
        use(3)


def test_an_error_of_the_model_is_the_models():
    def fails(x: Tensor) -> Tensor:
        return x @ torch.randn(3, 4)

    with pytest.raises(Exception, match="40"):
        qcompile.explain(fails, torch.randn(6, 40))


# --- logs and traces ----------------------------------------------------------------------------------------


def logged(caplog, level: int, model: nn.Module) -> list[str]:
    caplog.clear()
    with caplog.at_level(level, logger="qcompile"):
        qcompile.explain(model, torch.randn(6, 40))
    return [record.getMessage() for record in caplog.records if record.name == "qcompile"]


def test_one_info_line_whatever_the_depth(caplog):
    """A line per layer would drown the training log."""
    for depth in (1, 6):
        torch._dynamo.reset()
        (line,) = logged(caplog, logging.INFO, Mlp(depth))
        assert line == f"qcompile_fp4: {depth + 1} of {depth + 2} GEMM sites quantized (left alone: 1: skip='lm_head')"


def test_debug_lines_say_which_ops_came_and_went(caplog):
    lines = logged(caplog, logging.DEBUG, Mlp())
    (fuse,) = (line for line in lines if line.startswith("joint/fuse:"))
    assert "8 matches in " in fuse
    assert "qcompile.quantized_mm.default 0 → 8" in fuse
    assert "dynamo/insert: 6 operands of 3 sites" in lines
    lowered = [line for line in lines if line.startswith("post_grad/lower:")]
    assert ["3 matches" in lowered[0], "5 matches" in lowered[1]] == [True, True]


SCRIPT = """
import torch, qcompile
from torch import nn
torch.manual_seed(0)
qcompile.explain(nn.Linear(40, 36), torch.randn(6, 40))
"""


def test_environment_variables_open_the_log_and_the_trace(tmp_path):
    """``QCOMPILE_LOGS`` prints without logging set-up; ``TORCH_TRACE`` receives every program for tlparse."""
    environment = {**os.environ, "QCOMPILE_LOGS": "debug", "TORCH_TRACE": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert run.returncode == 0, run.stderr[-2000:]
    assert "joint/fuse: 2 matches in " in run.stderr
    assert "qcompile.quantized_mm.default 0 → 2" in run.stderr
    assert "qcompile_fp4: 1 of 1 GEMM sites quantized" in run.stderr
    trace = "".join(path.read_text() for path in tmp_path.iterdir())
    for name in ("dynamo_captured", "dynamo_insert", "joint_fuse", "post_grad_lower"):
        assert f'"name": "qcompile_{name}"' in trace, name
    assert "torch.ops.qcompile.quantized_mm.default" in trace
