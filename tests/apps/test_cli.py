"""The command line: bad input is refused in one line and touches nothing; good input leaves its files."""

from __future__ import annotations

import csv
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcompile.apps import cli, demo

TEXT = b"To be, or not to be, that is the question:\n" * 40


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def fail(capsys, *argv: object) -> str:
    """Run a command that must be refused; returns its one line of complaint."""
    assert cli.main([str(a) for a in argv]) == 2
    complaint = capsys.readouterr().err.strip()
    assert complaint.startswith(f"qcompile {argv[0]}: ")
    assert "\n" not in complaint
    return complaint


def test_version_and_help_do_not_import_torch():
    """They would take seconds."""
    program = (
        "import sys; from qcompile.apps.cli import build_parser; build_parser().format_help(); "
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arms", "bf16,fp5"], "unknown arm 'fp5'; known: bf16, fp4, direct"),
        (["--arms", "bf16,bf16"], "different"),
        (["--arms", ""], "one or more"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--steps", "0"], "steps must be positive"),
        (["--hidden", "100", "--heads", "3"], "hidden size 100"),
        (["--text", "no/such/file.txt"], "no/such/file.txt: No such file"),
    ],
)
def test_demo_refuses_bad_settings(flags, expected, capsys, tmp_path):
    out = tmp_path / "out"
    assert expected in fail(capsys, "demo", "--out", out, *flags)
    assert not out.exists(), "a refused request must leave no folder"


@pytest.mark.parametrize("content", [b"", b"short"])
def test_demo_refuses_a_text_too_short_to_hold_out_a_window(content, capsys, tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(content)
    assert f"{len(content)} bytes" in fail(capsys, "demo", "--text", path, "--out", tmp_path / "out")


def test_a_text_may_be_compressed(tmp_path, capsys):
    packed = tmp_path / "text.txt.xz"
    packed.write_bytes(lzma.compress(TEXT))
    assert demo.read_text(packed) == TEXT
    packed.write_bytes(lzma.compress(TEXT)[:-40])
    assert "text.txt.xz is no complete .xz file" in fail(capsys, "demo", "--text", packed, "--out", tmp_path / "out")


def test_demo_keeps_former_files_when_the_folder_is_a_file(capsys, text_file, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    fail(capsys, "demo", "--quick", "--text", text_file, "--out", occupied)
    assert occupied.read_text() == "mine"


def test_demo_names_the_pip_command_for_a_missing_package(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(demo.settings, "find_spec", lambda name: None if name == "matplotlib" else object())
    complaint = fail(capsys, "demo", "--out", tmp_path / "out")
    assert "matplotlib" in complaint
    assert "pip install 'qcompile[demo]'" in complaint


def experiment(text_file: Path, tmp_path: Path, **given: object) -> demo.Experiment:
    return demo.prepare({**cli.QUICK, "device": "cpu", "text": text_file, "out": tmp_path / "out", **given})


def test_every_arm_sees_the_same_parameters_and_batches(text_file, tmp_path):
    """Otherwise the gap would measure luck."""
    pytest.importorskip("transformers")
    setup = experiment(text_file, tmp_path, seed=3)
    first, second = (demo.build_model(setup.config, setup.device).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for (a, b), (c, d), _ in zip(demo.batches(setup), demo.batches(setup), range(3), strict=False):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert torch.equal(a[:, 1:], b[:, :-1]), "targets must be the inputs one byte later"


def test_validation_windows_lie_in_the_held_out_tail(tmp_path):
    """A window that reached back into the training text would flatter the validation loss."""
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(1800) + b"\x01" * 200)
    setup = experiment(path, tmp_path)
    assert len(setup.validation) == 200
    for inputs, targets in demo.validation_batches(setup):
        assert inputs.shape == (setup.config.batch, setup.config.sequence)
        assert (inputs == 1).all()
        assert (targets == 1).all()


def test_gap_and_ratio_are_against_bf16_whatever_the_order():
    fp4 = demo.ArmResult("fp4", [3.0] * 5, 2.5, [9.0, 1.0, 1.0, 0.5, 0.5], 40, 100)
    bf16 = demo.ArmResult("bf16", [2.0] * 5, 2.25, [5.0, 1.0, 1.0, 0.25, 0.25], 80, 100)
    row = demo.summary_rows([fp4, bf16])[0]
    assert row["gap_to_bf16"] == 0.25
    assert row["train_gap_to_bf16"] == 1.0
    assert row["saved_ratio_to_bf16"] == 0.5
    assert row["compile_seconds"] == 8.5
    assert row["tokens_per_second"] == 200
    assert demo.summary_rows([fp4])[0]["gap_to_bf16"] is None


def test_smoothing_does_not_lag():
    """A one-sided average would draw a falling loss too high."""
    ramp = [float(i) for i in range(40)]
    assert demo.smoothed(ramp) == pytest.approx(ramp)


@pytest.mark.slow
@pytest.mark.inductor
def test_quick_demo_leaves_every_file(text_file, tmp_path, capsys):
    """The whole way: three arms, table, plot, sample, results."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert cli.main(["demo", "--quick", "--device", "cpu", "--text", str(text_file), "--out", str(out)]) == 0
    files = {p.name for p in out.iterdir()}
    assert files == {"results.json", "summary.csv", "losses.csv", "loss.png", "sample.txt", "explain.html"}
    results = json.loads((out / "results.json").read_text())
    assert [row["arm"] for row in results["arms"]] == list(demo.ARMS)
    assert all(row["saved_bytes"] > 0 and row["compile_seconds"] > 0 for row in results["arms"])
    rows = list(csv.reader((out / "losses.csv").open()))
    assert rows[0] == ["step", *demo.ARMS]
    assert len(rows) == 1 + cli.QUICK["steps"]
    first = [float(value) for value in rows[1][1:]]
    assert len(set(first)) == len(first), "arms that lose exactly alike did not differ in precision"
    assert max(first) - min(first) < 0.2, "arms must start from the same parameters and batch"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_text()) > cli.QUICK["sample_bytes"] // 4
    printed = capsys.readouterr().out
    assert "q_proj" in printed
    rows = f"{cli.QUICK['batch']}×{cli.QUICK['sequence']}×{cli.QUICK['hidden']}"
    assert rows in printed.replace(" ", ""), "the table must describe the training graph, at its shapes"
    assert "Validation loss against BF16" in printed


# --- explain ------------------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 44))

def with_inputs():
    return model(), (torch.randn(6, 48),)

def nothing():
    return model()

def a_class():
    return nn.Linear, (48,)

def broken():
    raise KeyError("the factory's own fault")

class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(256, 32), nn.Linear(32, 48), nn.Linear(48, 256)

    def forward(self, input_ids, labels):
        logits = self.down(self.up(self.embed(input_ids)).relu())
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

def with_tokenizer():
    return LanguageModel(), lambda text: {"input_ids": list(text.encode())}
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> str:
    name = f"user_module_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


def test_explain_writes_json_html_and_programs(user_module, tmp_path, capsys):
    files = ["--json", "report.json", "--html", "report.html", "--programs", "programs"]
    assert cli.main(["explain", f"{user_module}:with_inputs", "--option", "skip=['2']", *files]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["sites"], report["quantized_sites"]) == (2, 1)
    assert "<html" in (tmp_path / "report.html").read_text()
    assert list((tmp_path / "programs").iterdir())
    assert "1 of 2 GEMM sites quantized" in capsys.readouterr().out


@pytest.mark.parametrize("roles", [False, True])
def test_explain_prints_gradients_on_request(roles, user_module, capsys):
    assert cli.main(["explain", f"{user_module}:with_inputs", *["--roles"][: int(roles)]]) == 0
    printed = capsys.readouterr().out
    assert ("wgrad" in printed, "fprop" in printed) == (roles, roles)
    assert "2 of 2 GEMM sites quantized" in printed


def test_explain_makes_inputs_from_shapes(user_module, capsys):
    assert cli.main(["explain", f"{user_module}:nothing", "--input", "6x48"]) == 0
    assert "2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{m}"], "MODULE:FACTORY"),
        (["no_such_module:build"], "no_such_module"),
        (["{m}:absent"], "has no function 'absent'"),
        (["{m}:nothing"], "--input"),
        (["{m}:a_class"], "explain: takes a model, got the class Linear; make an instance: Linear(...)"),
        (["{m}:nothing", "--input", "6xq"], "6xq"),
        (["{m}:nothing", "--input", "6x48:float99"], "float99"),
        (["{m}:with_inputs", "--backend", "qcompile_fp5"], "qcompile_fp5"),
        (["{m}:with_inputs", "--option", "gradient"], "key=value"),
        (["{m}:with_inputs", "--option", "gradiant=fp8"], "did you mean 'gradient'"),
    ],
)
def test_explain_refuses_in_one_line(argv, expected, user_module, capsys):
    assert expected in fail(capsys, "explain", *(a.format(m=user_module) for a in argv))


def test_sensitivity_scores_a_text_and_prints_rules(user_module, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 9)
    request = [
        f"{user_module}:with_tokenizer",
        "--text",
        "text.txt",
        "--batches",
        "2",
        "--batch",
        "3",
        "--tokens",
        "16",
    ]
    flags = ["--option", "min_side=0", "--option", "heads=True", "--candidate", "8=int8 row", "--json", "found.json"]
    assert cli.main(["sensitivity", *request, *flags, "--resume", "scores.json", "--plot", "frontier.png"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["choice"]) == {"up", "down"}
    assert len(json.loads((tmp_path / "scores.json").read_text())["batches"]) == 2
    assert (tmp_path / "frontier.png").exists()
    assert "rules: [" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{m}:model"], "it is to return (model, batches)"),
        (["{m}:with_tokenizer", "--text", "absent.txt"], "absent.txt: No such file"),
        (["{m}:with_tokenizer", "--text", "{m}.py", "--tokens", "1"], "tokens at least 2"),
        (["{m}:with_tokenizer", "--text", "{m}.py", "--batches", "999"], "tokens, fewer than the 2045952 of 999 × 4"),
        (["{m}:with_inputs", "--candidate", "eight"], "--candidate 'eight' is not NAME=OPERAND"),
        (["{m}:with_inputs", "--budget", "2"], "budget=2.0 is not a number from 0 to 1"),
    ],
)
def test_sensitivity_refuses_in_one_line(argv, expected, user_module, capsys):
    assert expected in fail(capsys, "sensitivity", *(a.format(m=user_module) for a in argv))


def test_a_factory_that_fails_keeps_its_traceback(user_module):
    """Its error is the user's own to debug, not a bad request to us."""
    with pytest.raises(KeyError, match="own fault"):
        cli.main(["explain", f"{user_module}:broken"])


def test_options_nest_by_dots():
    items = [
        "gradient=fp8",
        "activation.outliers=None",
        "weight.estimator=ste",
        "weight.format=e1m2",
        "fuel=3",
    ]
    assert cli.parse_options(items) == {
        "gradient": "fp8",
        "activation": {"outliers": None},
        "weight": {"estimator": "ste", "format": "e1m2"},
        "fuel": 3,
    }
    with pytest.raises(ValueError, match="as a whole before"):
        cli.parse_options(["weight=off", "weight.format=e1m2"])


# --- bench --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--backends", "eagre"], "unknown backend 'eagre'"),
        (["--repeats", "0"], "repeats must be positive"),
        (["--layers", "-1"], "layers must be positive"),
        (["--csv", "no/such/folder.csv"], "no/such/folder.csv: No such file"),
    ],
)
def test_bench_refuses_bad_settings(flags, expected, capsys):
    assert expected in fail(capsys, "bench", *flags)


@pytest.mark.nightly
@pytest.mark.inductor
def test_bench_finds_the_second_process_warm(tmp_path):
    """A backend whose hooks broke the cache keys would compile again."""
    pytest.importorskip("transformers")
    path = tmp_path / "bench.csv"
    sizes = [f"--{name}={cli.QUICK[name]}" for name in cli.MODEL_FLAGS]
    assert (
        cli.main(
            [
                "bench",
                "--backends",
                "qcompile_fp4",
                "--repeats",
                "2",
                "--device",
                "cpu",
                "--csv",
                str(path),
                *sizes,
            ]
        )
        == 0
    )
    cold, warm = csv.DictReader(path.open())
    assert int(cold["fxgraph_cache_miss"]) > 0
    assert int(warm["fxgraph_cache_miss"]) == 0
    assert int(warm["autograd_cache_hit"]) + int(warm["fxgraph_cache_hit"]) > 0
    assert cold["saved_bytes"] == warm["saved_bytes"]
