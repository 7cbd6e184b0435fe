"""The benchmark of the search, on a byte model of three blocks that it trains: every arm is a line, once.

What would break: arms that share a name or a choice, a share of the gap that is measured from another arm, weights that
training has not changed.
"""

from __future__ import annotations

import csv
import json
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
    monkeypatch.setattr(sensitivity, "arms", lambda found, make=sensitivity.arms: dict(list(make(found).items())[:5]))
    assert sensitivity.main([*given, "--limit", "-1"]) == 1
    assert "left for the next call: wide, 4 bits" in capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    monkeypatch.setattr(sensitivity, "train_arm", None)  # its weights are there
    assert sensitivity.main(given) == 0
    with (tmp_path / "out" / "sensitivity.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["wide", "4 bits", "search 25%", "first and last 1 blocks", "search at the cost of 1 + 1 blocks"]
    assert [row["arm"] for row in rows] == names
    assert float(rows[0]["loss"]) < 5.0  # ln 256 is 5.55: what was trained is what is measured
    assert [float(row["share of the products wide"]) for row in rows[:2]] == [1.0, 0.0]
    assert 0.0 < float(rows[2]["share of the products wide"]) <= 0.25
    assert (tmp_path / "out" / "sensitivity.png").stat().st_size > 10_000
    assert "| wide | 100.0% |" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert [arm["arm"] for arm in data["arms"]] == names
    assert data["arms"][2]["closed"] == pytest.approx(sensitivity.closed(rows)["search 25%"])
    assert data["goal"] == (data["arms"][2]["closed"] >= 0.6)
    assert first["goal"] is None
    assert [pair["other"] for pair in data["compared"]] == ["first and last 1 blocks"]
    assert {"budget", "cost", "score", "left", "wide"} == data["frontier"][0].keys()
    assert data["frontier"] == first["frontier"], "of the same weights"
    assert all(data["seconds"][stage] >= first["seconds"][stage] > 0 for stage in ("prepared", "scored"))
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 10_000
    assert sensitivity.main([*given, "--steps", "13"]) == 2
    assert "take another --out" in capsys.readouterr().err
    (tmp_path / "out" / "trained.pt").unlink()
    trained = []

    def stop(*_):
        trained.append(True)
        raise OSError

    monkeypatch.setattr(sensitivity, "train_arm", stop)
    assert sensitivity.main(given) == 2
    assert trained


def test_the_gap_is_that_of_four_bits():
    rows = [{"arm": name, "loss": loss} for name, loss in (("wide", "1.0"), ("4 bits", "3.0"), ("x", "1.5"))]
    assert sensitivity.closed(rows) == {"wide": 1.0, "4 bits": 0.0, "x": 0.75}
    assert sensitivity.closed(rows[:1]) == {}


def test_the_search_is_compared_with_choices_of_its_cost():
    losses = {"wide": 1.0, "4 bits": 2.0, "search 25%": 1.3, "random 0": 1.7, "first and last 2 blocks": 1.4}
    losses |= {"search at the cost of 2 + 2 blocks": 1.5, "first and last 4 blocks": 1.1}
    rows = [{"arm": name, "loss": str(loss), sensitivity.COLUMNS[2]: "0.5"} for name, loss in losses.items()]
    assert [(pair["other"], round(pair["lower_by"], 3)) for pair in sensitivity.compared(rows)] == [
        ("random 0", 0.4),
        ("first and last 2 blocks", -0.1),
    ]
    text = sensitivity.table(rows)
    assert "search 25% closes 70.0% of the gap; the goal, 60%, is met." in text
    assert "search at the cost of 2 + 2 blocks is 0.1000 nats above first and last 2 blocks." in text
