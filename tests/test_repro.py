"""A saved repro runs by itself, elsewhere, and says what the model it was made from does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import qcompile


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.inductor
def test_the_script_runs_and_bisects(tmp_path):
    """In a process of its own; with no fuel nothing differs."""
    script = qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 24), options={"skip": ["2"]})
    assert script == tmp_path / "repro.py"

    def differences() -> dict[str, float]:
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, cwd="/")
        assert done.returncode == 0, done.stderr[-2000:]
        assert "1 of 2 GEMM sites quantized" in done.stdout or "0 of 2" in done.stdout
        return {name: float(value) for value, name in re.findall(r"^ *([\d.]+)  (\S+)  \(", done.stdout, re.MULTILINE)}

    found = differences()
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert found["0.weight"] > 0.01
    script.write_text(script.read_text().replace("options = {'skip': ['2']}", "options = {'fuel': 0}"))
    assert set(differences().values()) == {0.0}


def test_what_cannot_be_compiled_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'skipp'; did you mean 'skip'"):
        qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 24), options={"skipp": []})
    with pytest.raises(ValueError, match="unknown backend 'inductor'; known: qcompile_fp4"):
        qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 24), backend="inductor")
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_and_a_monitor_are_taken_apart(tmp_path):
    script = qcompile.save_repro(
        tmp_path / "repro.py", torch.compile(model()), torch.randn(7, 24), options={"monitor": qcompile.Monitor()}
    )
    assert "options = {}" in script.read_text()
    saved = torch.load(script.with_suffix(".pt"), weights_only=False)
    assert type(saved["model"]) is nn.Sequential
