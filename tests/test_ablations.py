"""The paper's ablations in miniature: every arm is a recipe of its own, runs are resumed, orders are judged by noise.

What would break: two arms that are the same recipe, an arm that runs again, one that begins without time to end, an
order that is called reproduced although two seeds differ by more.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from qcompile.recipes import FP4

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import ablations  # noqa: E402
from ablations import ARMS, BASELINES, Curve  # noqa: E402
from model import SIZES, Size  # noqa: E402

sys.path.remove(str(BENCHMARKS))

BYTES = Size("bytes", 64, 2, 128, heads=2, kv_heads=1, sequence=16, batch=4, vocabulary=256)


def test_every_arm_is_a_recipe_of_its_own():
    recipes = {name: FP4.override(arm.options) for name, arm in ARMS.items() if arm.options}
    assert len(set(recipes.values())) == len(recipes) == len(ARMS) - len(BASELINES)
    assert ablations.SIZE.parameters == pytest.approx(30e6, rel=0.03)
    assert 2600 * ablations.SIZE.tokens >= 85e6


def made(**losses: float) -> dict[str, Curve]:
    return {name: Curve(name, [loss] * 4, loss, 1.0) for name, loss in losses.items()}


def test_orders_are_judged_by_the_noise_of_seeds():
    """The paper: DGE and OCC below rows by 0.085, rows below tensors by 1.65; W8A4 without a clamp diverges."""
    curves = made(bf16=1.0, bf16_seed1=1.02, w4a4_dge_occ=1.1, w4a4=1.11, w4a4_tensor=1.5, w8a4=math.nan)
    curves |= made(**{"w8a4_occ0.99": 1.2, "w8a4_occ0.97": 1.3})
    found = {(each.panel, each.better, each.worse): each.verdict for each in ablations.findings(curves)}
    assert found["a", "w4a4_dge_occ", "w4a4"] == "within the noise of seeds"
    assert found["a", "w4a4", "w4a4_tensor"] == "reproduced"
    assert found["c", "w8a4_occ0.99", "w8a4"] == "reproduced"
    assert ("c", "w8a4_occ0.97", "w8a4_occ0.99") not in found  # 0.013 apart: what was read off a figure does not say
    assert ("c", "w8a4_occ0.97", "w8a4") in found
    assert ablations.gaps(curves)["w4a4"] == pytest.approx(0.1)
    reversed_order = made(bf16=1.0, bf16_seed1=1.0, w4a4=1.2, w4a4_dge_occ=1.3)
    assert {each.verdict for each in ablations.findings(reversed_order) if "bf16" not in each.better} == {"reversed"}


def test_a_run_goes_on_where_it_was_cut(monkeypatch, tmp_path, capsys):
    trained = []

    def train(name, *_):
        trained.append(name)
        if name == "w4a4_dge":
            msg = "broken"
            raise RuntimeError(msg)
        return Curve(name, [2.0, 1.0], math.nan if name == "w8a4" else 1.0 + len(trained) / 100, 10.0)

    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "plot", lambda *_: None)  # half a second each
    monkeypatch.setattr(ablations, "release", lambda: None)
    monkeypatch.setitem(SIZES, "bytes", BYTES)
    out = tmp_path / "ablations.json"
    given = ["--device", "cpu", "--size", "bytes", "--steps", "2", "--out", str(out)]
    assert ablations.main([*given, "--seconds", "5", "--expected", "4", "--arms", "bf16,w4a4"]) == 1
    assert trained == ["bf16"]
    assert "left for the next call: w4a4" in capsys.readouterr().out
    assert ablations.main(given) == 1  # one arm is broken
    assert trained == list(ARMS)
    assert ablations.main(given) == 1
    assert trained[len(ARMS) :] == ["w4a4_dge"]
    assert set(json.loads(out.read_text())["arms"]) == set(ARMS) - {"w4a4_dge"}
    assert "| W8A4, direct | diverged | diverged | diverged |" in out.with_suffix(".md").read_text()
    assert ablations.main([*given[:-4], "--steps", "3", *given[-2:]]) == 2
    assert "was made with steps=2, now 3" in capsys.readouterr().err


def test_an_arm_trains_a_byte_model(tmp_path, monkeypatch):
    """Through `loss_curves.train`, with no compiler."""
    monkeypatch.setitem(SIZES, "bytes", BYTES)
    monkeypatch.setitem(ARMS, "bf16", ablations.Ablation("BF16", "black", "eager", panels="abcd", published=2.74))
    out = tmp_path / "ablations.json"
    assert (
        ablations.main(["--device", "cpu", "--size", "bytes", "--steps", "3", "--arms", "bf16", "--out", str(out)]) == 0
    )
    assert len(json.loads(out.read_text())["arms"]["bf16"]["losses"]) == 3
    assert out.with_suffix(".png").stat().st_size > 10_000
