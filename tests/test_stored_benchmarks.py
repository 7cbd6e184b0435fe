"""Benchmarks of stored weights on a CPU: an arm that computes something else is not timed, and costs no other arm."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, MODEL = ROOT / "benchmarks", ROOT / "examples" / "data" / "stories260K"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(BENCHMARKS))
import generate  # noqa: E402
import lora_step  # noqa: E402
import stored_quality  # noqa: E402

sys.path.remove(str(BENCHMARKS))

TINY = argparse.Namespace(tiny=True, layers=1, device="cpu", regional=True, repeats=1)
TEXT = "Once upon a time there was a girl who had a ball. She played with it in the park every day. " * 8


def doubled(layer):
    layer.self_attn.o_proj.weight.mul_(2)


def test_an_arm_of_lora_is_timed_if_its_gradients_are_those_of_the_reference(tmp_path, monkeypatch):
    """Eager PyTorch in the place of compilers. ``doubled`` is a model that learns, but another one."""
    compared = (lora_step.REFERENCE, "ours_nf4", "ours_w4a4_wide_dx", "ours_w4a4")
    arms = {
        name: replace(arm, backend=arm.backend and "eager") for name, arm in lora_step.ARMS.items() if name in compared
    }
    arms["doubled"] = lora_step.Arm(doubled, "eager")
    monkeypatch.setattr(lora_step, "ARMS", arms)
    assert lora_step.work("ours_nf4", TINY, tmp_path).status.startswith("ok, but bnb_eager did not run")
    for name in compared:
        row = lora_step.work(name, TINY, tmp_path)
        assert (row.status, row.compiled) == ("ok", "layers" if arms[name].backend else "eager")
        assert row.median_ms > 0
        assert 0 < row.model_gb < row.peak_gb
        assert (row.worst_cosine > 0.99) == (name != lora_step.REFERENCE)
    with pytest.raises(ValueError, match=r"loss 6\.\d+, the reference's 6\.\d+; cosines of gradients .*'worst_cosine'"):
        lora_step.work("doubled", TINY, tmp_path)


def test_an_arm_of_lora_that_takes_too_long_is_a_row_that_says_so(tmp_path, capsys):
    out = tmp_path / "lora.csv"
    given = ["--tiny", "--device", "cpu", "--limit", "0.02", "--arms", "bf16", "ours_nf4", "--out", str(out)]
    assert lora_step.main(given) == 1
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["status"]) for row in rows] == [
        (arm, "FAILED: TimeoutError: took longer than 0.02 s") for arm in ("bf16", "ours_nf4")
    ]
    assert "ours_nf4" in capsys.readouterr().out


def test_tokens_are_counted_if_the_model_would_choose_them(monkeypatch):
    monkeypatch.setitem(generate.ARMS, "nf4", (lora_step.packed(lora_step.NF4), "eager"))
    given = argparse.Namespace(tiny=True, layers=1, device="cpu", prompt=4, tokens=3, repeats=1)
    row = generate.work("nf4", given)
    assert (row.arm, row.layers, row.tokens, row.status) == ("nf4", 1, 3, "ok")
    assert row.tokens_per_s > 0
    assert row.off_by <= 0.1
    monkeypatch.setattr(generate, "generated", lambda model, ids, *_: torch.cat((ids, ids[:, :3]), 1))
    with pytest.raises(ValueError, match=r"a token's logit is [1-9]\.\d\d standard deviations from the best one"):
        generate.work("nf4", given)


def test_perplexity_of_stored_weights(tmp_path, monkeypatch):
    arms = {
        "bf16": stored_quality.Arm(backend="eager"),
        "refused": stored_quality.Arm("nf4 block7", "eager"),
        "nf4": stored_quality.Arm("nf4 block64", "eager"),
    }
    monkeypatch.setattr(stored_quality, "ARMS", arms)
    text, out = tmp_path / "text", tmp_path / "quality.csv"
    text.write_text(TEXT)
    given = ["--model", str(MODEL), "--text", f"girl={text}", "--out", str(out), "--tokens", "100", "--context", "32"]
    assert stored_quality.main([*given, "--device", "cpu", "--arms", *arms]) == 1
    with out.open() as file:
        wide, refused, packed = csv.DictReader(file)
    assert "K = 64 is no multiple of block7" in refused["error"]
    model = stored_quality.load(MODEL, "cpu")
    windows = stored_quality.windows_of(text, stored_quality.tokenizer_of(MODEL), 100, 32)
    assert windows.shape == (3, 32)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].float()
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))
    assert float(wide["perplexity"]) == pytest.approx(expected, rel=0.01)  # BF16, and another size of batch
    assert wide["tokens"] == "96"
    assert float(packed["bits"]) == 4.5
    assert 0.001 < abs(float(packed["over_bf16"]) - 1) < 0.3
    short = [*given[:-1], "4096", "--device", "cpu"]
    assert stored_quality.main(short) == 2
