"""The numerics example, a few steps of it: what would break is a file that is missing, empty, or of the wrong arm."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

from qcompile.apps import demo

from ..loops.worker import backend_of

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))
import watch_numerics  # noqa: E402

sys.path.remove(str(EXAMPLES))


@pytest.fixture
def eager_kernels(monkeypatch):
    """Graphs are executed after all passes, not compiled."""
    compile = torch.compile

    def eagerly(model, backend, options):
        return compile(model, backend=backend_of(backend), options=options)

    monkeypatch.setattr(torch, "compile", eagerly)


def test_both_arms_leave_a_table_and_two_maps(tmp_path, monkeypatch, capsys, eager_kernels):
    small = {"batch": 2, "sequence": 32, "hidden": 256, "layers": 1, "heads": 2, "intermediate": 320}
    monkeypatch.setitem(demo.PRESETS, "cpu", {**demo.PRESETS["cpu"], **small})
    assert watch_numerics.main(["--steps", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
    tables = {arm: list(csv.DictReader((tmp_path / f"{arm}.csv").open())) for arm in watch_numerics.ARMS}
    for rows in tables.values():
        assert {row["step"] for row in rows} == {"0", "1", "2"}
        assert len({(row["layer"], row["operand"]) for row in rows}) == 7 + 4  # weights; inputs that layers share
    sqnr = {arm: [float(r["sqnr_db"]) for r in rows if r["operand"] == "activation"] for arm, rows in tables.items()}
    assert sum(sqnr["occ"]) > sum(sqnr["no_occ"])  # compensated outliers leave finer steps to the rest
    assert all((tmp_path / f"{a}_{o}.png").stat().st_size > 1000 for a in tables for o in ("activation", "weight"))


def test_a_missing_text_is_one_line(tmp_path, capsys):
    assert watch_numerics.main(["--text", str(tmp_path / "none.txt"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("watch_numerics: ")
