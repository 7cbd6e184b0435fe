"""The loss curves of full FP4, on a CPU: what is compared with what, when the forward is wide, what the file says.

What would break: gaps of other batches, a switch at the wrong step, an order that is called reproduced although two
seeds differ by more.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import full_fp4_curves  # noqa: E402
import study  # noqa: E402
import unbiasedness  # noqa: E402
from eight_bit_curves import Curve, Tokens  # noqa: E402
from full_fp4_curves import ARMS, BASELINE  # noqa: E402
from model import SIZES, Size  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SMALL = Size("small", 64, 2, 128, heads=2, kv_heads=1, sequence=16, batch=4, vocabulary=128)


class Recorder:
    """A backend that changes nothing."""

    def __init__(self) -> None:
        self.options: list[Any] = []

    def __call__(self, gm: Any, inputs: Any, *, options: Any = None, **_: Any) -> Any:
        self.options.append(options)
        return gm.forward


def test_an_arm_trains_and_switches_once() -> None:
    """The forward is wide for the last tenth of the steps; all blocks share what is compiled."""
    torch._dynamo.reset()
    backend = Recorder()
    tokens = Tokens.read(None, torch.device("cpu"))
    curve = study.train(ARMS["healed"], SMALL, tokens, 20, 1e-2, backend)
    assert len(curve.losses) == 20
    assert curve.losses[-1] < curve.losses[0]
    assert len(curve.validation) > 1
    assert backend.options == [None, {"forward": "bf16"}]
    assert [phase.start for phase in ARMS["healed"].schedule(3052).phases] == [0, 2747]


def test_every_arm_is_a_recipe_that_there_is() -> None:
    assert all(len(arm.schedule(100).phases) == 1 + arm.healed for arm in ARMS.values())


def test_full_arms_quantize_all_products_all_the_time() -> None:
    full = {name for name, arm in ARMS.items() if full_fp4_curves.is_full(arm)}
    assert full == {"quartet2", "nvidia", "tetrajet2", "if4", "uniform4", "mxfp4"}


def test_gaps_are_paired() -> None:
    base = Curve([2.0 + 0.1 * i for i in range(300)], [3.0, 5.0])
    other = Curve([x + 0.01 for x in base.losses], [3.03, 5.05])
    cut = Curve([x + 0.02 for x in base.losses[:250]], fault="took longer than 1 s")
    rows = {row["arm"]: row for row in full_fp4_curves.rows_of({BASELINE: base, "quartet2": other, "nvidia": cut})}
    assert rows[BASELINE]["train_gap"] == rows[BASELINE]["validation_gap"] == 0
    assert rows["quartet2"]["train_gap"] == pytest.approx(0.01)
    assert rows["quartet2"]["validation_gap"] == pytest.approx(0.04)
    assert rows["quartet2"]["validation_error"] == pytest.approx(0.01)
    assert rows["nvidia"]["train_gap"] == pytest.approx(0.02), "on the batches that both have read"
    text = full_fp4_curves.table({BASELINE: base, "quartet2": other, "nvidia": cut})
    assert "| Quartet II | 300 |" in text
    assert "| +0.0100 ± 0.0000 |" in text
    assert "NVIDIA (took longer than 1 s) | 250 |" in text


def test_the_file_says_what_is_published_and_what_is_reproduced() -> None:
    """Gaps on held-out text beside Quartet II's log; seeds that differ by 0.005."""
    losses = {BASELINE: 3.0, "quartet2": 3.05, "nvidia": 3.051, "forward_46": 3.04, "bf16_seed1": 2.995, "if4": 3.03}
    curves = {name: Curve([loss] * 3, [loss, loss + 1]) for name, loss in losses.items()}
    said = full_fp4_curves.found(curves)
    assert said["noise"] == pytest.approx(0.005)
    verdicts = {(order["better"], order["worse"]): order["verdict"] for order in said["orders"]}
    assert verdicts == {
        ("forward_46", "quartet2"): "reproduced",
        ("forward_46", "nvidia"): "reproduced",
        ("quartet2", "nvidia"): "within the noise of seeds",
    }
    assert said["forward_share"] == pytest.approx(0.8)
    assert said["published_forward_share"] == pytest.approx(0.88, abs=0.005)
    assert said["best"] == {"arm": "if4", "gap": pytest.approx(0.03), "goal": 0.043, "met": True}
    text = full_fp4_curves.table(curves)
    assert "in 4 bits is +0.0300, IF4's; the goal, 0.043, is met." in text
    assert "| NVIDIA | 3 | 3.0510 |" in text
    assert "± 0.0000 | 0.055 |" in text
    assert "| Quartet II | NVIDIA | 0.012 | +0.0010 | within the noise of seeds |" in text
    curves["nvidia"] = Curve([3.0, float("nan"), 3.0], [float("nan"), 3.0])
    diverged = {(order["better"], order["worse"]): order["ours"] for order in full_fp4_curves.found(curves)["orders"]}
    assert diverged["quartet2", "nvidia"] == float("inf")
    assert "| Quartet II | NVIDIA | 0.012 | diverged | reproduced |" in full_fp4_curves.table(curves)
    del curves["bf16_seed1"], curves["if4"]
    assert "in 4 bits is +0.0500, Quartet II's; the goal, 0.043, is missed." in full_fp4_curves.table(curves)
    assert full_fp4_curves.found(curves)["noise"] is None
    assert "reproduced" not in full_fp4_curves.table(curves)


def test_the_model_and_its_text_are_what_the_comparison_asks() -> None:
    assert SIZES[study.MODEL].block_weights == pytest.approx(30e6, rel=0.03)
    assert full_fp4_curves.STUDY.tokens >= 100e6


@pytest.mark.nightly
def test_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "tiny", "--steps", "20", "--arms", "bf16,quartet2,healed", "--out", str(out)]
    given += ["--jobs", "2"]
    subprocess.run([sys.executable, str(BENCHMARKS / "full_fp4_curves.py"), *given], check=True, timeout=600)
    rows = {row["arm"]: row for row in json.loads(out.read_text())["final"]}
    assert 0 < abs(rows["quartet2"]["train_gap"]) < 0.2
    assert rows["healed"]["train_gap"] != rows["quartet2"]["train_gap"]
    assert out.with_suffix(".md").read_text().count("side by side") == 6
    assert all(f"=== {name}" in out.with_suffix(".log").read_text() for name in rows)


# --- unbiasedness -----------------------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_mean_gradient_of_unbiased_roundings_goes_on_falling() -> None:
    """64 backward passes: as 1/B for stochastic rounding and MS-EDEN; nearest and 4/6 stop at their bias."""
    model, batch = unbiasedness.trained(steps=30)
    exact = unbiasedness.exact_gradient(model, batch)
    falls = {}
    for name in ("eden", "stochastic", "nearest", "four_over_six"):
        torch.manual_seed(0)
        found = unbiasedness.errors(unbiasedness.passes(model, batch, ARMS_OF_BACKWARD[name].options), exact, 64)
        falls[name] = found[1] / found[64]
    assert min(falls["eden"], falls["stochastic"]) > 54, falls
    assert max(falls["nearest"], falls["four_over_six"]) < 48, falls


ARMS_OF_BACKWARD = unbiasedness.ARMS


def test_errors_of_means() -> None:
    """Independent noise falls as 1/B, a constant stays."""
    exact = torch.ones(10_000)
    generator = torch.Generator().manual_seed(0)
    noisy = unbiasedness.errors((exact + torch.randn(10_000, generator=generator) for _ in range(99)), exact, 64)
    biased = unbiasedness.errors((exact * 1.1 for _ in range(99)), exact, 64)
    assert list(noisy) == [1, 2, 4, 8, 16, 32, 64]
    assert noisy[1] / noisy[64] == pytest.approx(64, rel=0.1)
    assert biased[1] == pytest.approx(biased[64]) == pytest.approx(0.01)


def test_recipes_leave_their_last_blocks_wide():
    """Blocks are compiled one by one, so the recipe's own rule finds none: the study has to do it."""
    wide = {name: arm.wide_blocks(6) for name, arm in full_fp4_curves.ARMS.items()}
    assert {name for name, count in wide.items() if count} == {"nvidia", "if4"}
    assert wide["nvidia"] == wide["if4"] == 1
