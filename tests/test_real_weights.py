"""The table of real weights, on the 260K model: recipes as they are, errors of paired differences, runs resumed.

What would break: an arm that is BF16 under another name, the last blocks of a recipe that has them wide, a text or task
that is scored twice, or not again when it has changed.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, MODEL = ROOT / "benchmarks", ROOT / "examples" / "data" / "stories260K"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import real_weights  # noqa: E402

from qcompile.recipes import RECIPES  # noqa: E402

sys.path.remove(str(BENCHMARKS))

STORY = "Once upon a time there was a girl who had a ball. She played with it in the park every day. " * 8
CHOICES = {"query": "Once upon a time there was a", "choices": ["girl", "derivative", "boy"], "gold": 0}


def test_every_arm_has_a_forward_of_its_own():
    forwards = {
        name: (recipe.activation, recipe.weight)
        for name, arm in real_weights.ARMS.items()
        if arm.backend
        for recipe in [RECIPES[arm.backend].override(arm.options)]
    }
    assert len(set(forwards.values())) == len(forwards)
    assert (None, None) not in forwards.values()


@pytest.mark.parametrize(("arm", "expected"), [("NVFP4", 17), ("MXFP8", 20), ("BF16", 0)])
def test_the_last_blocks_stay_wide_where_the_recipe_says_so(arm, expected):
    model = SimpleNamespace(device=torch.device("cpu"))
    model.model = SimpleNamespace(layers=[nn.Linear(2, 2) for _ in range(20)])
    real_weights.compiled(model, real_weights.ARMS[arm])
    assert sum(layer._compiled_call_impl is not None for layer in model.model.layers) == expected


@pytest.mark.nightly  # compiles, for some seconds
def test_arms_are_compared_and_resumed(tmp_path, monkeypatch, capsys):
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "choices.jsonl").write_text("".join(f"{json.dumps({**CHOICES, 'gold': i})}\n" for i in range(3)))
    given = ["--model", str(MODEL), "--text", f"story={tmp_path / 'story.txt'}", "--out", str(tmp_path / "table")]
    given += ["--task", f"multiple_choice={tmp_path / 'choices.jsonl'}", "--tokens", "128", "--context", "32"]
    given += ["--device", "cpu", "--arms", "BF16", "MXFP4"]
    assert real_weights.main(given) == 0
    with (tmp_path / "table.csv").open() as file:
        rows = {(row["arm"], row["task"], row["metric"]): row for row in csv.DictReader(file)}
    assert len(rows) == 2 * 3
    assert float(rows["BF16", "story", "nll"]["difference"]) == 0
    assert float(rows["MXFP4", "story", "nll"]["difference"]) > 0.01
    assert float(rows["MXFP4", "story", "nll"]["error of the difference"]) > 0
    assert rows["MXFP4", "choices", "acc"]["documents"] == "3"
    monkeypatch.setattr(real_weights, "losses_of", None)  # would fail: the text is not scored again
    assert real_weights.main([*given, "--limit", "2"]) == 0
    scores = json.loads((tmp_path / "table" / "MXFP4.json").read_text())["tasks"]["choices"]["scores"]
    assert len(scores["acc"]) == 2
    assert real_weights.main([*given, "--limit", "2", "--finetune", "3", "--train", str(tmp_path / "story.txt")]) == 1
    assert "was made with finetune=None, now 3" in capsys.readouterr().err
    monkeypatch.undo()
    trained = [*given[:6], *given[8:], "--out", str(tmp_path / "trained"), "--finetune", "8", "--batch", "2"]
    assert real_weights.main([*trained, "--train", str(tmp_path / "story.txt"), "--learning-rate", "1e-3"]) == 0
    with (tmp_path / "trained.csv").open() as file:
        after = {(row["arm"], row["task"]): float(row["value"]) for row in csv.DictReader(file)}
    assert after["MXFP4", "story"] < float(rows["MXFP4", "story", "nll"]["value"]) - 0.1
    assert "| MXFP4 |" in capsys.readouterr().out
