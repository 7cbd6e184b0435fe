"""The loss curves of a mixture of experts, on a CPU, and how much of one runs on kernels of 8-bit codes.

What would break: an arm that trains on other batches or ends with another model than its optimizer's, an arm that is
cut and counts as done, or that is lost with what others had, curves of other settings in one table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
pytest.importorskip("transformers")
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import moe_coverage  # noqa: E402
import moe_curves  # noqa: E402
from eight_bit_curves import Curve, Tokens  # noqa: E402
from model import SIZES, build  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SMALL = replace(SIZES["tiny_moe"], layers=1, hidden=64, heads=2, kv_heads=1, sequence=16)


def test_the_model_is_its_masters_rounded():
    """AdamW's float32 parameters take gradients from, and give values to, the BF16 ones, every one of them."""
    model = build(SMALL, torch.device("cpu"), torch.bfloat16, 0, "transformers")
    masters, before = moe_curves.Masters(model), [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    masters.take_gradients()
    assert all((p.grad == 2).all() and p.grad.dtype == torch.float32 for p in masters.wide)
    assert all(p.grad is None for p in model.parameters())
    torch.optim.SGD(masters.wide, lr=2**-12).step()  # too little for BF16 to see at 1
    masters.give_back()
    for old, wide, p in zip(before, masters.wide, model.parameters(), strict=True):
        assert torch.equal(wide, old.float() - 2**-11)
        assert torch.equal(p, wide.bfloat16())


def test_an_arm_trains_and_balances(monkeypatch):
    """The loss falls, is reported on the way, and the router's gradient holds that of the balance."""
    monkeypatch.setattr(moe_curves, "REPORT", 4)
    reported = []

    def train():
        tokens = Tokens.read(None, torch.device("cpu"))
        report = lambda curve: reported.append(len(curve.losses))  # noqa: E731
        return moe_curves.train(moe_curves.ARMS["bf16"], SMALL, tokens, 8, 1e-2, "eager", report)

    with torch.compiler.set_stance("force_eager"):
        curve = train()
        monkeypatch.setattr(moe_curves, "BALANCE", 1.0)
        other = train()
    assert reported[:2] == [4, 8]
    assert curve.losses[-1] < curve.losses[0]
    assert curve.losses[0] == other.losses[0]
    assert curve.losses[1:] != other.losses[1:]
    assert curve.validation


def test_an_arm_that_was_cut_is_run_again(monkeypatch, tmp_path, capsys):
    ran = []

    def in_fresh_process(script, name, arguments, limit, scratch, log):
        """What a worker leaves: its curve in the file."""
        ran.append(name)
        given = namespace(arguments)
        cut = name == "quest" and ran.count(name) == 1
        moe_curves.keep(given, name, Curve([2.0] if cut else [2.0, 1.0], [] if cut else [1.5], fault="cut" * cut))
        if cut:
            msg = "took longer than 1 s"
            raise TimeoutError(msg)

    def namespace(arguments):
        values = dict(argument.removeprefix("--").split("=") for argument in arguments)
        return type("Given", (), values | {"tokens": None, "steps": 2, "lr": 1e-3, "out": Path(values["out"])})

    monkeypatch.setattr(moe_curves, "in_fresh_process", in_fresh_process)
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "tiny_moe", "--steps", "2", "--out", str(out), "--arms"]
    assert moe_curves.main([*given, "bf16,quest"]) == 1
    assert json.loads(out.read_text())["arms"]["quest"]["losses"] == [2.0]
    assert "took longer" in out.with_suffix(".md").read_text()
    assert moe_curves.main([*given, "bf16,quest,default"]) == 0
    assert ran == ["bf16", "quest", "quest", "default"]
    assert list(json.loads(out.read_text())["arms"]) == ["bf16", "default", "quest"]
    assert out.with_suffix(".png").stat().st_size > 0
    assert moe_curves.main([*given[:-1], "--lr", "1", "--arms", "bf16"]) == 2
    assert "lr=0.001, not 1.0" in capsys.readouterr().err


@pytest.mark.nightly
def test_coverage_is_of_all_that_runs():
    """Experts and projections of Mixtral, by hand: per token two experts of three matrices, and attention's four; not
    the router, the head, and attention over 128 tokens, four products in the backward beside the two of the forward.
    """
    row = moe_coverage.coverage("mixtral", "grouped_mm", torch.bfloat16)
    width, codes = 256, 2 * 3 * 256 * 896 + 2 * 256 * 256 + 2 * 256 * 128
    wide, attention = width * 8 + width * 256, 2 * 128 * width
    assert row.forward == pytest.approx(100 * codes / (codes + wide + attention), abs=0.05)
    assert row.backward == pytest.approx(100 * 2 * codes / (2 * (codes + wide) + 2.5 * attention), abs=0.05)
    assert (row.graphs, row.warned) == (1, "")
