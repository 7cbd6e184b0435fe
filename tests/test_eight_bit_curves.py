"""The loss curves of eight bits, on a CPU: who reads what, what is compared with what, what is run again.

What would break: two ranks that train on other text than one, gaps of other batches, a failing variant that loses what
it is to lose, an arm that is lost because another one failed, curves of other settings in one table.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import eight_bit_curves  # noqa: E402
from eight_bit_curves import ARMS, BASELINE, Curve, Tokens  # noqa: E402
from model import SIZES, Size  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SMALL = Size("small", 64, 2, 128, heads=2, kv_heads=1, sequence=16, batch=4, vocabulary=128)


@pytest.fixture
def tokens():
    return Tokens.read(None, torch.device("cpu"))


def test_two_ranks_read_what_one_reads(tokens):
    for read in (lambda *of: tokens.batches(SMALL, 2, *of), lambda *of: tokens.held_out(SMALL, *of)):
        (whole, targets), first, second = (next(read(*of))[0:2] for of in ((0, 1), (0, 2), (1, 2)))
        assert torch.equal(whole[::2], first[0])
        assert torch.equal(whole[1::2], second[0])
        assert torch.equal(whole[:, 1:], targets[:, :-1])


def test_variants_store_what_they_say(tokens):
    """Rounded after every step: to numbers that BF16 holds, and to zeros that the smallest of a block become."""
    for name in ("bf16_nearest", "e4m3_second"):
        parameter = torch.nn.Parameter(torch.linspace(0.1, 1, 200))
        optimizer = ARMS[name].optimizer([{"params": [parameter]}], 1e-3, (0.9, 0.95))
        parameter.grad = torch.logspace(-6, 0, 200)
        optimizer.step()
        second = optimizer.state[parameter]["exp_avg_sq"]
        if name == "bf16_nearest":
            assert torch.equal(parameter, parameter.bfloat16().float())
            assert torch.equal(second, second.bfloat16().float())
        else:
            zeros = second == 0
            assert zeros[:30].all()
            assert not zeros[150:].any()
            assert torch.allclose(second[150:], 0.05 * parameter.grad[150:].square(), rtol=1 / 16)


@pytest.mark.parametrize("name", ["fp32", "states"])
def test_arms_train(name, tokens):
    with torch.compiler.set_stance("force_eager"):
        curve = eight_bit_curves.train(ARMS[name], SMALL, tokens, 6, 1e-2, 0.95, backend="eager")
    assert len(curve.losses) == 6
    assert curve.losses[-1] < curve.losses[0]


def test_gaps_are_paired():
    base = Curve([2.0 + 0.1 * i for i in range(300)], [3.0, 5.0])
    other = Curve([1.01 * x for x in base.losses[:250]], [3.03, 5.05], fault="took longer than 1 s")
    base_row, row = eight_bit_curves.rows_of({BASELINE: base, "states": other})
    assert base_row["train_gap"] == base_row["validation_gap"] == 0
    assert row["steps"] == 250
    assert row["train_gap"] == pytest.approx(1)  # at the last steps that both have
    assert row["validation_gap"] == pytest.approx(1)
    assert "took longer" in eight_bit_curves.table({BASELINE: base, "states": other})


def test_done_arms_are_kept_and_others_run_again(monkeypatch, tmp_path, capsys):
    ran = []

    def measured(name, card, limit, given, log):
        ran.append(name)
        return Curve([2.0, 1.0], [1.5, 1.5], fault="died" if name == "states" else "")

    monkeypatch.setattr(eight_bit_curves, "measured", measured)
    monkeypatch.setitem(SIZES, "small", SMALL)
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "small", "--steps", "2", "--out", str(out), "--arms"]
    assert eight_bit_curves.main([*given, "states,fp32"]) == 1
    assert eight_bit_curves.main([*given, "states,fp32,both"]) == 1
    assert sorted(ran) == ["both", "fp32", "states", "states"]
    assert list(json.loads(out.read_text())["arms"]) == ["fp32", "states", "both"]
    assert out.with_suffix(".png").stat().st_size > 0
    assert eight_bit_curves.main([*given[:-1], "--lr", "1", "--arms", "fp32"]) == 2
    assert "lr=0.001, not 1.0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        eight_bit_curves.main(["--device", "cpu", "--steps", "0", "--out", str(out)])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err


@pytest.mark.nightly
def test_processes_of_one_and_two_ranks(tmp_path):
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "tiny", "--steps", "4", "--arms", "fp32,fp32_two,gradients"]
    script = BENCHMARKS / "eight_bit_curves.py"
    subprocess.run([sys.executable, str(script), *given, "--out", str(out)], check=True, timeout=300)
    rows = {row["arm"]: row for row in json.loads(out.read_text())["final"]}
    assert abs(rows["fp32_two"]["train_gap"]) < 0.05
    assert 0 < abs(rows["gradients"]["train_gap"]) < 0.05


@pytest.mark.nightly
def test_a_limit_keeps_what_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr(eight_bit_curves, "SETTINGS", ("size", "steps"))
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "tiny", "--steps", "100000", "--limit", "60", "--arms", "fp32"]
    assert eight_bit_curves.main([*given, "--out", str(out)]) == 1
    (curve,) = json.loads(out.read_text())["arms"].values()
    assert curve["losses"]
    assert curve["fault"] == "TimeoutError: took longer than 60 s"
