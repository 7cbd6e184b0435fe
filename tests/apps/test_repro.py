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
    return nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5))


@pytest.mark.inductor
def test_the_script_runs_and_bisects(tmp_path):
    """In a process of its own; with no fuel nothing differs."""
    script = qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 48), options={"skip": ["2"]})
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
        qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 48), options={"skipp": []})
    with pytest.raises(ValueError, match="unknown backend 'inductor'; known: qcompile_fp4"):
        qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 48), backend="inductor")
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_and_a_monitor_are_taken_apart(tmp_path):
    script = qcompile.save_repro(
        tmp_path / "repro.py", torch.compile(model()), torch.randn(7, 48), options={"monitor": qcompile.Monitor()}
    )
    assert "options = {}" in script.read_text()
    saved = torch.load(script.with_suffix(".pt"), weights_only=False)
    assert type(saved["model"]) is nn.Sequential


KINDS = """
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.ir.operand import Operand

WIDTH = 48
x = torch.ones(3)  # a global of a name that the class has local ones of


def double(x):
    return 2 * x


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)


class Net(Base):
    def forward(self, x):
        return F.relu(double(self.first(x)))


class Opaque(nn.Module):
    def forward(self, x):
        return self.made(x)


tied = nn.Sequential(nn.Linear(48, 48), nn.Linear(48, 48))
tied[1].weight = tied[0].weight
inputs = torch.randn(7, 48)
folder = Path(sys.argv[1])
rule = qcompile.Rule(name="0", weight="midrise8 row", gradient=Operand.parse("e5m2 tensor"), roles=("dgrad",))
for name, model, options in (
    ("frozen", nn.Sequential(nn.Linear(48, 48)).requires_grad_(False), {}),
    ("run.v2", tied.double(), {"rules": [rule], "activation": Operand.parse("e2m1 row"), "skip": ("1",)}),
    ("defined_in_main.py", Net(), {"monitor": qcompile.Monitor(), "mode": "default"}),
):
    print(qcompile.save_repro(folder / name, model, inputs.to(next(model.parameters()).dtype), options=options).name)
opaque = Opaque()
opaque.made = lambda x: x
try:
    qcompile.save_repro(folder / "opaque", opaque, inputs)
except ValueError as error:
    print(error)
"""

RUN_ALL = """
import runpy, sys, torch
from qcompile import backends, compat
compile_with = backends.compile_with
eager = {"inner_compile": compat.eager_inner_compile}
backends.compile_with = lambda *args, **kwargs: compile_with(*args, **{**eager, **kwargs})
for script in sys.argv[1:]:
    module = sys.modules["__main__"]
    runpy.run_path(script, run_name="__main__")
"""


def python(*arguments: object) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_scripts_of_every_kind_of_model_run(tmp_path):
    """Without gradients; with rules, operands, tied weights, float64 and a dot in the name; with classes of __main__
    and all they use. Each is run as Python runs a script; code is not generated.
    """
    (tmp_path / "kinds.py").write_text(KINDS)
    *names, refused = python(tmp_path / "kinds.py", tmp_path).strip().splitlines()
    assert names == ["frozen.py", "run.v2.py", "defined_in_main.py"]
    assert refused.startswith("save_repro: the model or its inputs cannot be pickled: ")
    assert not list(tmp_path.glob("opaque*"))
    (tmp_path / "all.py").write_text(RUN_ALL)
    printed = python(tmp_path / "all.py", *(tmp_path / name for name in names))
    assert printed.count("mean square of the results") == 3
    assert "x = " not in (tmp_path / "defined_in_main.py").read_text().split("options =")[0]
    assert re.findall(r"  (\S+)  \(diff", printed) == ["0.weight", "0.bias", "1.bias", "first.weight", "first.bias"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"disable_passes": ["fusee"]}, "there is no pass 'fusee'"),
        (
            {"post_grad_custom_pre_pass": print},
            "option 'post_grad_custom_pre_pass': .* cannot be written into a script",
        ),
    ],
)
def test_options_that_no_script_can_hold_are_refused(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        qcompile.save_repro(tmp_path / "repro", model(), torch.randn(7, 48), options=options)
    assert not list(tmp_path.iterdir())
