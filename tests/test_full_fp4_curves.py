"""The loss curves of full FP4, on a CPU: what is compared with what, what is run again, when the forward is wide.

What would break: an arm that is lost because another one failed, one that is begun without time for it, gaps of other
batches, a switch at the wrong step, curves of other settings in one table.
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
    curve = full_fp4_curves.train(ARMS["healed"], SMALL, tokens, 20, 1e-2, backend)
    assert len(curve.losses) == 20
    assert curve.losses[-1] < curve.losses[0]
    assert len(curve.validation) > 1
    assert backend.options == [None, {"forward": "bf16"}]
    assert [phase.start for phase in ARMS["healed"].schedule(3052).phases] == [0, 2747]


def test_every_arm_is_a_recipe_that_there_is() -> None:
    assert all(len(arm.schedule(100).phases) == 1 + arm.healed for arm in ARMS.values())


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


def test_a_call_goes_on_where_the_last_one_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Done arms are kept, one that was cut is run anew, and none is begun for which no time is left."""
    ran = []

    def measured(name: str, given: Any, log: Path) -> Curve:
        ran.append(name)
        return Curve([2.0, 1.0], [1.5, 1.5], seconds=100.0, fault="cut" if ran == [BASELINE, name] else "")

    monkeypatch.setattr(full_fp4_curves, "measured", measured)
    monkeypatch.setitem(SIZES, "small", SMALL)
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "small", "--steps", "2", "--out", str(out)]
    assert full_fp4_curves.main([*given, "--arms", "bf16,quartet2"]) == 1
    assert full_fp4_curves.main([*given, "--arms", "bf16,quartet2"]) == 0
    assert ran == ["bf16", "quartet2", "quartet2"]
    assert full_fp4_curves.main([*given, "--arms", "bf16,nvidia", "--total", "99"]) == 1
    assert "nvidia       not begun: 99 s are left, the longest arm took 100" in capsys.readouterr().out
    assert list(json.loads(out.read_text())["arms"]) == ["bf16", "quartet2"]
    assert out.with_suffix(".png").stat().st_size > 0
    assert full_fp4_curves.main([*given, "--lr", "1"]) == 2
    assert "lr=0.0012, not 1.0" in capsys.readouterr().err


@pytest.mark.nightly
def test_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "tiny", "--steps", "20", "--arms", "bf16,quartet2,healed", "--out", str(out)]
    subprocess.run([sys.executable, str(BENCHMARKS / "full_fp4_curves.py"), *given], check=True, timeout=600)
    rows = {row["arm"]: row for row in json.loads(out.read_text())["final"]}
    assert 0 < abs(rows["quartet2"]["train_gap"]) < 0.2
    assert rows["healed"]["train_gap"] != rows["quartet2"]["train_gap"]


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
