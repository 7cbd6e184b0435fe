"""The model of 4 and 8 GPUs: what went into a made-up measurement comes out, and nothing without its inputs.

What would break: a hop that is counted twice, the optimizer of a shard counted whole, a ratio of another world.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import scaling_on_paper  # noqa: E402
from model import SIZES  # noqa: E402

sys.path.remove(str(BENCHMARKS))

#: MB per µs of links, MB of gradients, µs of a step and of its optimizer, and the share of communication that shows.
RATE, WHOLE, ONE, OPTIMIZER, SHOWN = 0.2, 1000.0, 50_000.0, 4_000.0, 0.25
#: Weights of blocks are gathered twice, the others once.
GATHERS = 1 + SIZES["tiny"].block_weights / SIZES["tiny"].parameters
RATIOS = {2: 0.6, 4: 0.58, 8: 0.57}


def measured() -> list[tuple]:
    """Arm, size, gradients, µs, MB sent, ratio: two GPUs as the model has them."""
    ddp, weights, fsdp = WHOLE, GATHERS * WHOLE / 2, WHOLE / 2  # 2 hops, gathers and 1 hop of half of it
    return [
        ("reduce-scatter", "64 MiB", "bf16", 1.0, 1.0, 1.0),  # not the largest
        ("reduce-scatter", "256 MiB", "bf16", 100 / RATE, 100.0, 1.0),
        *(("model reduce-scatter", "256 MiB", f"{n} ranks", 1.0, 1.0, ratio) for n, ratio in RATIOS.items()),
        ("alone", "tiny", "bf16", ONE, 0.0, 0.0),
        ("optimizer", "tiny", "bf16", OPTIMIZER, 0.0, 0.0),
        ("ddp", "tiny", "bf16", ONE + SHOWN * ddp / RATE, ddp, 1.0),
        ("ddp", "tiny", "fp8", ONE + SHOWN * ddp * 0.6 / RATE, ddp * 0.508, 0.9),
        ("fsdp2", "tiny", "bf16", ONE - OPTIMIZER / 2 + SHOWN * (weights + fsdp) / RATE, fsdp, 1.0),
        ("fsdp2", "tiny", "fp8", ONE - OPTIMIZER / 2 + SHOWN * (weights + 0.6 * fsdp) / RATE, fsdp * 0.508, 0.9),
        ("ddp", "d2048", "bf16", 1.0, 1.0, 1.0),  # without a step of one GPU
    ]


def write(path: Path, rows: list[tuple]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("arm", "size", "gradients", "us", "sent_mb", "ratio", "status"))
        writer.writerows((*row, "ok") for row in rows)
    return path


def test_what_went_in_comes_out(tmp_path):
    rows = scaling_on_paper.read(write(tmp_path / "measured.csv", measured()))
    found = {(p.wrapper, p.gradients, p.gpus): p for p in scaling_on_paper.predictions(rows)}
    assert len(found) == 12
    for each in found.values():
        assert each.shown == pytest.approx(SHOWN)
        if each.gpus == 2:
            assert each.us == pytest.approx(each.measured)
    ddp = found["ddp", "fp8", 8]
    assert ddp.us == pytest.approx(ONE + SHOWN * 2 * WHOLE * 7 / 8 * RATIOS[8] / RATE)
    assert ddp.sent_mb == pytest.approx(2 * WHOLE * 7 / 8 * 0.508)
    fsdp = found["fsdp2", "fp8", 4]
    assert fsdp.us == pytest.approx(ONE - OPTIMIZER * 3 / 4 + SHOWN * WHOLE * 3 / 4 * (GATHERS + RATIOS[4]) / RATE)
    assert fsdp.efficiency == pytest.approx(ONE / fsdp.us)


def test_nothing_is_made_up(tmp_path, capsys):
    rows = [row for row in measured() if row[0] != "alone"]
    assert scaling_on_paper.main([str(write(tmp_path / "measured.csv", rows))]) == 1
    assert "lacks" in capsys.readouterr().err
    assert scaling_on_paper.main([str(write(tmp_path / "measured.csv", measured()))]) == 0
    assert "| fsdp2 | tiny | fp8 | 8 |" in capsys.readouterr().out
