"""Arms side by side: what is run again, what is begun, what workers may use, where their words go, how they end.

What would break: an arm that is lost because another one failed, one that is begun without time for it, a log of which
nobody knows who wrote it, workers that go on after an interrupt, a time per step of arms that shared the card.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import ablations  # noqa: E402
import eight_bit_curves  # noqa: E402
import full_fp4_curves  # noqa: E402
import measure  # noqa: E402
import study  # noqa: E402
from eight_bit_curves import Curve  # noqa: E402
from model import SIZES, Size  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SMALL = Size("small", 64, 2, 128, heads=2, kv_heads=1, sequence=16, batch=4, vocabulary=128)

#: Says who it is, waits until there are two of them, says it again; "fails" and "sleeps" do that.
WORKER = """
import json, os, sys, time
from pathlib import Path
name, scratch = sys.argv[sys.argv.index("--worker") + 1], Path(sys.argv[-1])
meeting = Path(sys.argv[1])
(meeting / name).write_text(str(os.getpid()))
print("I am", name, flush=True)
if name == "fails":
    raise SystemExit(3)
while name == "sleeps" or len(list(meeting.iterdir())) < 2:
    time.sleep(0.01)
print("still", name)
threads = [os.environ[name] for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")]
(scratch / "part.json").write_text(json.dumps({"losses": [9.0]}))
(scratch / "answer.json").write_text(json.dumps({"answer": {"losses": [float(threads[0])], "fault": ""}}))
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    (tmp_path / "meeting").mkdir()

    def measured(name: str, limit: float) -> Curve:
        meeting = str(tmp_path / "meeting")
        return eight_bit_curves.curve_of_process(script, name, [meeting], limit, tmp_path / "log", jobs=2)

    return measured


def run_arms(names: list[str], curves: dict[str, Curve], measured: Any, *, seconds: float, jobs: int = 2) -> None:
    eight_bit_curves.run_arms(
        names, curves, measured, lambda: None, limit=90, deadline=time.monotonic() + seconds, at_once=jobs, jobs=jobs
    )


def test_workers_run_side_by_side_and_a_failing_one_stops_no_other(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "4")
    assert measure.share_of_cores(2) == {"OMP_NUM_THREADS": "8", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    assert measure.share_of_cores(99)["OMP_NUM_THREADS"] == "1"
    curves: dict[str, Curve] = {}
    run_arms(["one", "two"], curves, worker, seconds=60)
    run_arms(["fails", "three"], curves, worker, seconds=60)
    assert [curves[name].losses for name in ("one", "two", "three")] == [[8.0]] * 3
    assert curves["fails"].fault == "RuntimeError: the process died (3)"
    assert all(curve.jobs == 2 and curve.seconds > 0 for curve in curves.values())
    log = (tmp_path / "log").read_text()
    for name in ("one", "two", "three"):
        assert f"=== {name}\nI am {name}\nstill {name}\n" in log
    assert "=== fails\nI am fails\n" in log


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit), (signal.SIGHUP, SystemExit)],
)
def test_an_interrupt_ends_all_workers(number, raised, worker, tmp_path, request):
    """And what `timeout` or a scheduler sends; else workers train on, and the next call begins them once more."""
    # What an interactive shell leaves it: children of others ignore SIGINT.
    outside = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, outside))
    before = signal.getsignal(number)

    def interrupted(name: str, limit: float) -> Curve:
        if name == "interrupt":
            while not (process := tmp_path / "meeting" / "sleeps").exists() or not process.read_text():
                time.sleep(0.01)
            signal.pthread_kill(threading.main_thread().ident, number)
            while measure._WORKERS:
                time.sleep(0.01)
            return Curve()
        return worker(name, limit)

    curves: dict[str, Curve] = {}
    with pytest.raises(raised):
        run_arms(["interrupt", "sleeps", "never"], curves, interrupted, seconds=60)
    assert signal.getsignal(number) == before
    assert sorted(curves) == ["interrupt", "sleeps"]
    assert "the process died" in curves["sleeps"].fault
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "meeting" / "sleeps").read_text()), 0)


def test_an_arm_that_is_stopped_says_so(worker):
    assert worker("sleeps", 1).fault == "TimeoutError: took longer than 1 s"


@pytest.mark.parametrize(("jobs", "begun"), [(1, ["next"]), (2, []), (3, [])])
def test_time_is_judged_by_arms_that_ran_beside_as_many(jobs, begun, capsys):
    """100 s alone and 200 s beside another one; of three nobody knows, and no less than of two is supposed."""
    curves = {"alone": Curve(seconds=100), "beside": Curve(seconds=200, jobs=2)}
    curves["cut"] = Curve(seconds=900, jobs=jobs, fault="cut")
    limits = {}

    def measured(name: str, limit: float) -> Curve:
        limits[name] = limit
        return Curve(jobs=jobs)

    run_arms(["next"], curves, measured, seconds=150, jobs=jobs)
    assert list(limits) == begun
    assert all(limit == 90 for limit in limits.values())
    if not begun:
        assert "next             not begun: 150 s are left, the longest arm took 200" in capsys.readouterr().out
    run_arms(["late"], {}, measured, seconds=0, jobs=jobs)
    assert list(limits) == begun


@pytest.mark.parametrize("script", [full_fp4_curves, ablations])
def test_a_call_goes_on_where_the_last_one_stopped(script, monkeypatch, tmp_path, capsys):
    """Done arms are kept, one that failed is run anew, and none is begun for which no time is left."""
    ran = []
    first, second, third = list(script.ARMS)[:3]

    def curve_of_process(path: Path, name: str, same: list[str], limit: float, log: Path, jobs: int) -> Curve:
        assert path == Path(script.__file__)
        assert "--steps=2" in same
        ran.append((name, jobs))
        if ran.count((second, jobs)) == 1 and name == second:
            return Curve([2.0], seconds=9, jobs=jobs, fault="RuntimeError: broken")
        return Curve([2.0, 1.0], [1.5, 1.5], seconds=100.0, jobs=jobs)

    monkeypatch.setattr(study, "curve_of_process", curve_of_process)
    monkeypatch.setitem(SIZES, "small", SMALL)
    out = tmp_path / "curves.json"
    given = ["--device", "cpu", "--size", "small", "--steps", "2", "--out", str(out)]
    assert script.main([*given, "--arms", f"{first},{second}", "--jobs", "5"]) == 1
    assert sorted(ran) == sorted([(first, 2), (second, 2)])
    assert f"left for the next call: {second}" in capsys.readouterr().out
    failed = json.loads(out.read_text())["arms"][second]
    assert failed["losses"] == [2.0]
    assert failed["fault"] == "RuntimeError: broken"
    assert "(RuntimeError: broken)" in out.with_suffix(".md").read_text()
    assert script.main([*given, "--arms", f"{first},{second}", "--jobs", "5"]) == 1
    assert ran[2:] == [(second, 1)], "one arm alone has the card for itself"
    assert script.main([*given, "--arms", f"{first},{second}"]) == 0
    assert script.main([*given, "--arms", f"{first},{third}", "--total", "99"]) == 1
    assert f"{third:16} not begun: 99 s are left, the longest arm took 100" in capsys.readouterr().out
    data = json.loads(out.read_text())
    assert list(data["arms"]) == [first, second]
    assert [curve["jobs"] for curve in data["arms"].values()] == [2, 1]
    assert {"final", "noise", "orders"} <= data.keys()
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert script.main([*given, "--lr", "1"]) == 2
    assert "lr=0.0012, not 1.0" in capsys.readouterr().err
    for option, value, said in (
        ("--jobs", "0", "--jobs must be at least 1, got 0"),
        ("--steps", "0", "--steps must be at least 1, got 0"),
        ("--tokens", "no.txt", "--tokens: there is no file no.txt"),
    ):
        with pytest.raises(SystemExit):
            script.main([*given, option, value])
        assert said in capsys.readouterr().err


def test_what_an_arm_took():
    """Times of arms that shared the card are none; what was not measured, on a CPU or by an earlier version, is left
    out.
    """
    curve = Curve(step_ms=1.25, first_step_s=41.04, memory_gib=2.5)
    assert curve.costs == ["1.2", "41.0", "2.50"]
    assert dataclasses.replace(curve, jobs=2).costs == ["side by side", "side by side", "2.50"]
    assert Curve(jobs=1).costs == ["", "", ""]
    table = full_fp4_curves.table({"bf16": curve, "quartet2": dataclasses.replace(curve, jobs=3)})
    assert "| published | ms per step | first step, s | peak GiB | s |" in table
    assert "| 1.2 | 41.0 | 2.50 | 0 |" in table
    assert "| side by side | side by side | 2.50 | 0 |" in table
    assert len({line.count("|") for line in table.splitlines()[:4]}) == 1
    assert "| BF16 |  |  | +0.0000 | 1.2 | 41.0 | 2.50 |" in ablations.table({"bf16": curve})


def test_a_step_takes_the_median_of_those_after_the_first_twenty(monkeypatch):
    """By a clock that the steps themselves advance: 100 s the first, 5 s each to the 20th, then 1, 2, 3, 1, 2 … s."""
    now, made, reported = [0.0], [0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def step(batch: Any) -> torch.Tensor:
        made[0] += 1
        late = made[0] - 21
        now[0] += 100 if made[0] == 1 else 5 if late < 0 else 1 + late % 3
        return torch.tensor(float(made[0]))

    def run(steps: int) -> Curve:
        made[0] = 0
        tokens = eight_bit_curves.Tokens.read(None, torch.device("cpu"))
        report = lambda curve: reported.append((len(curve.losses), curve.step_ms))  # noqa: E731
        return eight_bit_curves.run_steps(step, lambda _: torch.tensor(7.0), tokens, SMALL, steps, report, every=10)

    curve = run(27)
    assert curve.losses == [float(i) for i in range(1, 28)]
    assert set(curve.validation) == {7.0}
    assert (curve.first_step_s, curve.step_ms, curve.memory_gib) == (pytest.approx(100), pytest.approx(2000), None)
    assert reported == [(10, None), (20, None), (27, pytest.approx(2000))]
    assert run(20).step_ms is None


RESULTS = BENCHMARKS / "h200" / "full_fp4_curves.json"


def test_a_file_of_an_earlier_version_is_gone_on_with(tmp_path):
    """Nothing is added to its arms, in which less was measured, and nothing of them is lost."""
    data = json.loads(RESULTS.read_text())
    settings = {name: data["settings"][name] for name in study.SETTINGS}
    curves = eight_bit_curves.read_json(RESULTS, settings, complete=False)
    out = tmp_path / "curves.json"
    eight_bit_curves.write_json(out, settings, curves, **full_fp4_curves.found(curves))
    again = json.loads(out.read_text())
    assert again["arms"] == data["arms"]
    assert again["settings"] == data["settings"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"settings": {"steps": 2}, "arms": {"bf16": {"lo', "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"arms": {}}', "KeyError: 'settings'"),
        ('{"settings": {}, "arms": []}', "AttributeError"),
        ('{"settings": {}, "arms": {"bf16": {"loss": 1}}}', "unexpected keyword argument 'loss'"),
        ('{"settings": {}, "arms": {"bf16": {"losses": [1, "two"]}}}', "losses are a list of numbers"),
    ],
)
@pytest.mark.parametrize("script", [full_fp4_curves, eight_bit_curves])
def test_a_damaged_file_is_left_as_it_is(script, text, said, tmp_path, capsys):
    out = tmp_path / "curves.json"
    out.write_text(text)
    out.with_suffix(".log").write_text("what happened")
    assert script.main(["--device", "cpu", "--size", "tiny", "--steps", "2", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{Path(script.__file__).stem}: {out} is damaged, or no file of curves (")
    assert said in line
    assert line.endswith("); restore it, or give another --out")
    assert out.read_text() == text
    assert out.with_suffix(".log").read_text() == "what happened"


def test_a_worker_says_what_broke(monkeypatch, tmp_path, capfd):
    """One line for the file, the traceback where its section is."""
    monkeypatch.setitem(SIZES, "small", SMALL)
    monkeypatch.setitem(full_fp4_curves.ARMS, "bf16", study.Arm("BF16", "black", "no_such_backend"))
    given = ["--device", "cpu", "--size", "small", "--steps", "2", "--worker", "bf16", "--scratch", str(tmp_path)]
    assert full_fp4_curves.main(given) == 0
    assert "no_such_backend" in json.loads((tmp_path / "answer.json").read_text())["error"]
    assert "Traceback" in capfd.readouterr().err


def test_texts_are_bytes_and_tokens_are_tokens(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("0123456789" * 10)
    tokens = eight_bit_curves.Tokens.read(path, torch.device("cpu"))
    assert (len(tokens.train), len(tokens.validation)) == (90, 10)
    assert tokens.train[:3].tolist() == [48, 49, 50]
