"""What the loss curves measure on a card: the time of a step by events, its first one by itself, and peak memory."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import eight_bit_curves  # noqa: E402
from eight_bit_curves import Batch, Curve, Tokens  # noqa: E402
from model import Size  # noqa: E402

sys.path.remove(str(BENCHMARKS))

SMALL = Size("small", 64, 2, 128, heads=2, kv_heads=1, sequence=16, batch=4, vocabulary=128)
MIB = 2**20


def test_times_and_memory_of_steps() -> None:
    """Steps keep the card busy for 2 ms after the host has gone on, the first one for 40. That takes the most memory,
    too, which is not counted, as what validation takes is not.
    """
    tokens = Tokens.read(None, torch.device("cuda"))
    cycles_of_a_ms = 1_000_000
    steps = 0

    def step(batch: Batch) -> torch.Tensor:
        nonlocal steps
        steps += 1
        torch.empty((256 if steps == 1 else 64) * MIB, dtype=torch.uint8, device="cuda")
        torch.cuda._sleep((40 if steps == 1 else 2) * cycles_of_a_ms)
        return batch[0].float().mean()

    def held_out(batch: Batch) -> torch.Tensor:
        torch.empty(128 * MIB, dtype=torch.uint8, device="cuda")
        return batch[0].float().mean()

    before = torch.cuda.memory_allocated() / 2**30
    curve: Curve = eight_bit_curves.run_steps(step, held_out, tokens, SMALL, 60)
    assert curve.step_ms is not None
    assert curve.first_step_s is not None
    assert curve.memory_gib is not None
    # The clock of an H200 is 1.1 to 2 GHz.
    assert 0.8 < curve.step_ms < 4
    assert curve.first_step_s > 0.015
    assert 64 / 1024 <= curve.memory_gib - before < 80 / 1024
