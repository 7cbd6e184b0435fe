"""The QuEST table example: every arm is an option the backend takes, runs are resumed, ratios are ratios of gaps."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from qcompile.apps import demo
from qcompile.recipes import QUEST

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(EXAMPLES))
import quest_table  # noqa: E402

sys.path.remove(str(EXAMPLES))

LOSSES = {"BF16": 2.0, "W4A4": 2.1, "W2A2": 2.4, "W1A1": 2.8}


@pytest.mark.parametrize("setting", quest_table.ARMS)
def test_every_arm_is_a_recipe_of_its_own(setting):
    options = quest_table.ARMS[setting].options
    recipe = QUEST.override(options or {"bits": 16})
    others = [QUEST.override(arm.options or {"bits": 16}) for name, arm in quest_table.ARMS.items() if name != setting]
    assert recipe not in others


def test_published_gaps_have_the_published_order():
    order = ["BF16", "W8A8", "W7A7", "W6A6", "W5A5", "W4A4", "FP4", "W3A3", "INT4 4:8", "W2A2", "W1A1"]
    gaps = [quest_table.ARMS[name].published for name in order]
    assert gaps == sorted(gaps)


def test_runs_are_added_once_each_and_compared_by_ratio(tmp_path, monkeypatch, capsys):
    trained = []

    def train_one(experiment, backend, options, watch):
        setting = next(name for name, arm in quest_table.ARMS.items() if arm.options == options)
        assert backend == ("inductor" if setting == "BF16" else "qcompile_quest")
        trained.append(setting)
        for step in range(1, 5):
            watch(step, None)
        return LOSSES[setting]

    monkeypatch.setattr(quest_table, "train_one", train_one)
    monkeypatch.setattr(demo, "validate", lambda compiled, experiment: 3.0)
    arguments = ["--out", str(tmp_path), "--steps", "4", "--every", "2", "--batch", "2", "--sequence", "16"]
    assert quest_table.main([*arguments, "--settings", "BF16", "W4A4"]) == 0
    assert quest_table.main([*arguments, "--settings", *LOSSES]) == 0
    assert trained == list(LOSSES)
    with (tmp_path / "quest_table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["setting"], float(row["loss"])) for row in rows] == list(LOSSES.items())
    assert {row["tokens"] for row in rows} == {"128"}
    with (tmp_path / "quest_curves.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4"] * 4
    printed = capsys.readouterr().out
    assert "0.250" in printed  # W4A4: 0.1 of 0.4
    assert "2.000" in printed  # W1A1
    assert (tmp_path / "quest_table.png").stat().st_size > 10_000
