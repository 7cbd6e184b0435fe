"""The benchmark of the search, on a byte model of three blocks that it trains: every arm is a line, once.

What would break: arms that share a name or a choice, a share of the gap that is measured from another arm, weights that
training has not changed.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import sensitivity  # noqa: E402

sys.path.remove(str(BENCHMARKS))


@pytest.mark.nightly  # ten seconds on a busy core
def test_a_model_is_trained_searched_and_measured(tmp_path, monkeypatch, capsys):
    tiny = {"hidden": 64, "layers": 3, "heads": 2, "intermediate": 128, "batch": 4, "sequence": 32}
    monkeypatch.setattr(sensitivity, "TRAINED", tiny)
    monkeypatch.setitem(sensitivity.OPTIONS, "min_side", 0)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, and the cat sat on the mat.\n" * 200)
    given = ["--text", str(text), "--out", str(tmp_path / "out"), "--steps", "12", "--inner", "eager", "--batches", "1"]
    monkeypatch.setattr(sensitivity, "arms", lambda found, make=sensitivity.arms: dict(list(make(found).items())[:4]))
    assert sensitivity.main(given) == 0
    with (tmp_path / "out" / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == ["wide", "4 bits", "search 25%", "first and last 1 blocks"]
    assert float(rows[0]["loss"]) < 5.0  # ln 256 is 5.55: what was trained is what is measured
    assert [float(row["share of the products wide"]) for row in rows[:2]] == [1.0, 0.0]
    assert 0.0 < float(rows[2]["share of the products wide"]) <= 0.25
    assert (tmp_path / "out" / "sensitivity.png").stat().st_size > 10_000
    assert "| wide | 100.0% |" in capsys.readouterr().out


def test_the_gap_is_that_of_four_bits():
    rows = [{"arm": name, "loss": loss} for name, loss in (("wide", "1.0"), ("4 bits", "3.0"), ("x", "1.5"))]
    assert sensitivity.closed(rows) == {"wide": 1.0, "4 bits": 0.0, "x": 0.75}
    assert sensitivity.closed(rows[:1]) == {}
