"""The report as text: one line per site, fitted to a width, what lines share said once, the user's text as it is."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch import Tensor, nn

import qcompile
from qcompile.report import Report, Row
from qcompile.report.text import folded_name, size_text

ROW = Row(
    "up", "linear", "fprop", "6×40 · 28×40", "e2m1 row × e2m1 row", "ste × ste", "cpp quantize", 144, "quantized", ""
)  # fmt: skip
#: Names that terminals, rich, HTML or Markdown read as something else.
NAMES = (
    "<script>alert(1)</script>",
    "[bold]head",
    "[/bold]",
    "a[0]",
    "a|b",
    "*x*",
    "`x`",
    "a\\b",
    "&amp;",
    "日本",
    "'\"",
)


def site(layer: str, decision: str = "quantized", **changes: Any) -> list[Row]:
    row = replace(ROW, layer=layer, decision=decision, **changes)
    if decision != "quantized":
        return [replace(row, role="-", formats="", estimator="", provider="", saved_bytes=0)]
    return [row, replace(row, role="wgrad", formats="float32 × e2m1 row", estimator="", saved_bytes=0)]


def of(*sites: list[Row], **fields: Any) -> Report:
    return Report("qcompile_fp4", [row for rows in sites for row in rows], graphs=1, **fields)


def text(report: Report, width: int = 200, **arguments: bool) -> str:
    console = Console(width=width, file=io.StringIO())
    console.print(report.table(**arguments) if arguments else report)
    return console.file.getvalue()  # type: ignore[attr-defined]


def lines_of(report: Report, layer: str, width: int = 200) -> list[str]:
    return [line for line in text(report, width).splitlines() if layer in line]


# --- brevity ------------------------------------------------------------------------------------------------


def test_a_site_is_one_line_and_roles_are_shown_on_request():
    report = of(site("up"), site("head", "skipped", reason="skip='head'"))
    (line,) = lines_of(report, "up ")
    assert [cell.strip() for cell in line.split("│")[1:-1]] == [
        "up", "linear 6×40 · 28×40", "144 B", "quantized: e2m1 row × e2m1 row"
    ]  # fmt: skip
    (head,) = lines_of(report, "head ")
    assert head.split("│")[-2].strip() == "skipped: skip='head'"
    detailed = text(report, roles=True)
    for row in report.rows:
        assert any(row.layer in line and f" {row.role} " in line for line in detailed.splitlines()), row


def test_what_all_quantized_sites_share_is_said_once():
    """Estimator, dY, kernels and a remark about the device; a site that is left alone does not hinder it."""
    report = of(*(site(f"up{i}", reason="no cores on cpu") for i in range(5)), site("head", "skipped", reason="fuel"))
    printed = text(report)
    assert "all quantized: estimator ste × ste; dY float32; kernels cpp quantize; no cores on cpu" in printed
    for once in ("ste × ste", "cpp quantize", "no cores on cpu", "dY"):
        assert printed.count(once) == 1, once


def test_what_sites_differ_in_has_a_column_or_a_number():
    """Nothing is hoisted that does not hold for all; remarks that several lines have are written once."""
    report = of(
        site("up0", estimator="trust × ste"),
        site("up1", reason="windows overlap"),
        site("up2", reason="windows overlap"),
    )
    printed = text(report)
    assert "all quantized: dY float32; kernels cpp quantize" in printed
    assert "estimator" in printed
    assert lines_of(report, "up0")[0].count("trust × ste") == 1
    assert lines_of(report, "up1")[0].split("│")[-2].strip().endswith("[1]")
    assert printed.count("windows overlap") == 1
    narrow = text(report, 60)
    assert "up0" in narrow
    assert "estimator trust × ste" in narrow  # no column for it any more


def test_a_gradient_that_is_treated_otherwise_is_said_at_its_site():
    dense = [ROW, replace(ROW, role="dgrad", decision="skipped", formats="float32 × float32", reason="kept wide")]
    printed = text(of(dense, site("down")))
    assert "[1] dgrad: kept wide" in printed
    unneeded = [ROW, replace(ROW, role="dgrad", decision="not computed", formats="", reason="nobody needs it")]
    assert "nobody needs it" not in text(of(unneeded))


@pytest.mark.parametrize("width", [60, 80, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal_and_every_site_is_there(width):
    layers = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    report = of(
        *(site(layer, shape="2×2048×4096 · 14336×4096", reason=f"remark {layer}") for layer in layers),
        site("lm_head", "skipped", reason="a reason that is quite long and has to go somewhere " * 3),
        remarks=["a remark " * 40],
    )
    printed = text(report, width)
    assert max(map(cell_len, printed.splitlines())) <= width
    squeezed = "".join(c for c in printed if c not in " │\n")
    for row in report.rows:
        for part in (row.layer, row.shape, row.reason):
            assert part.replace(" ", "") in squeezed or width == 60, part
    assert printed.count("linear") >= 3


def test_long_reports_fold_equal_layers():
    rows = [replace(ROW, layer=f"blocks.{i}.up{j}") for i in range(40) for j in (1, 2)]
    long = Report("qcompile_fp4", rows, graphs=1)
    assert long.table().row_count == 80
    assert long.table(compact=True).row_count == 2
    assert "blocks.*.up1 ×40" in str(long)
    assert "blocks.7.up1" not in str(long)
    different = [*rows[:4], replace(rows[4], shape="1×2 · 3×2")]
    assert Report("qcompile_fp4", different).table(compact=True).row_count == 3
    assert long.table(compact=True, roles=True).row_count == 2
    assert folded_name("layers.3.proj2.11") == "layers.*.proj2.*"


# --- text that is the user's --------------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_no_markup(name, roles):
    report = of(site(f"d.{name}"), site(name, "skipped", reason=f"rule {name!r}"), remarks=[f"not captured: {name}"])
    printed = text(report, roles=roles)
    assert printed.count(name) >= 3, printed
    assert report.to_records()[0]["layer"] == f"d.{name}"


def test_names_cannot_move_the_cursor_or_break_the_line():
    """Escape codes and line breaks are shown as escapes."""
    printed = text(of(site("a\x1b[2Jb\nc\r"), remarks=["x\x07"]))
    assert not {"\x1b", "\r", "\x07"} & set(printed)
    assert r"a\x1b[2Jb\nc\r" in printed
    assert r"x\x07" in printed


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_modules_name_survives_the_way_to_the_report():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(40, 12)})

        def forward(self, x: Tensor) -> Tensor:
            return self.d["<script>alert(1)</script>"](x)

    report = qcompile.explain(Named(), torch.randn(6, 40))
    assert all(row.layer == "d.<script>alert(1)</script>" for row in report.rows)
    assert "d.<script>alert(1)</script>" in str(report)
    assert "<script>alert" not in report.to_html() + report._repr_html_()


# --- forms --------------------------------------------------------------------------------------------------


def test_printing_needs_no_terminal(monkeypatch):
    """Nothing cut off, no escape codes in a log file, the summary first."""
    monkeypatch.delenv("COLUMNS", raising=False)
    report, out = of(site("up"), site("head", "skipped", reason="r" * 60)), io.StringIO()
    with redirect_stdout(out):
        print(report)
    printed = out.getvalue()
    assert "\x1b" not in printed
    assert printed.splitlines()[0] == report.summary()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) > 80


def test_printing_takes_the_width_that_the_environment_gives(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    report = of(*(site(f"encoder.block.{i}.attention.query") for i in range(3)))
    assert max(map(cell_len, str(report).splitlines())) <= 50


def test_an_empty_report_is_a_report():
    empty = qcompile.explain(lambda x: x + 1, torch.randn(3))
    assert (empty.rows, empty.sites, empty.saved_bytes) == ([], 0, 0)
    assert str(empty).strip() == "qcompile_fp4: 0 of 0 GEMM sites quantized in 1 graph(s)"
    assert json.loads(empty.to_json())["rows"] == empty.to_records() == []
    assert empty.to_markdown().strip() == r"qcompile\_fp4: 0 of 0 GEMM sites quantized in 1 graph(s)"
    assert "</html>" in empty.to_html()


def test_json_holds_rows_and_totals():
    report = of(site("up"), site("head", "skipped", reason="x"), saved=[{"bytes": 144, "codes": True}])
    data = json.loads(report.to_json())
    assert [Row(**row) for row in data["rows"]] == report.rows
    assert data["saved"] == report.saved
    for total in ("backend", "graphs", "sites", "quantized_sites", "saved_bytes", "code_bytes", "remarks"):
        assert data[total] == getattr(report, total)
    rebuilt = Report(data["backend"], [Row(**row) for row in data["rows"]], saved=data["saved"], graphs=data["graphs"])
    assert rebuilt.to_json() == report.to_json()


def test_records_are_plain_and_one_per_row():
    report = of(site("up"), site("head", "skipped", reason="x"))
    records = report.to_records()
    assert [record["role"] for record in records] == ["fprop", "wgrad", "-"]
    assert {type(value) for record in records for value in record.values()} == {str, int}
    merged = Report.merged([report, report], ranks=[4, 5]).to_records()
    assert {record["ranks"] for record in merged} == {"ranks 4–5"}


@pytest.mark.parametrize("roles", [False, True])
def test_markdown_is_a_table_whatever_is_in_the_names(roles):
    """As many cells in every row as in the header, so no name splits one."""
    report = of(*(site(name) for name in NAMES), site("head", "skipped", reason="a | b"))
    blocks = report.to_markdown(roles=roles).strip().split("\n\n")
    table = blocks[-1].splitlines()
    cells = [len(line.replace("\\|", "").strip("|").split("|")) for line in table]
    assert len(set(cells)) == 1
    assert len(table) == 2 + (len(report.rows) if roles else report.sites)
    assert "<script" not in blocks[-1].replace("\\<script", "")
    assert blocks[0].startswith(r"qcompile\_fp4: ")


def test_sizes_read_well():
    sizes = (0, 1023, 1024, 1536 * 1024, 3 * 2**30)
    assert [size_text(n) for n in sizes] == ["0 B", "1023 B", "1 KiB", "1.5 MiB", "3 GiB"]
