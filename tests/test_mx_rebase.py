"""MXFP4 as E4M3 codes with one scale per row: where that is exact, what 14 bits make of the sums, what is written.

What would break: a bound that is one binade too wide, zeros that count as small numbers, a row with a NaN that
qualifies, a model of the accumulator that rounds where the hardware cuts off.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS, MODEL = ROOT / "benchmarks", ROOT / "examples" / "data" / "stories260K"
if not BENCHMARKS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))  # they are scripts, which import each other by name
import mx_rebase  # noqa: E402

sys.path.remove(str(BENCHMARKS))

from qcompile.ir.formats import get_format  # noqa: E402
from qcompile.kernels.matmul.costs import RATES  # noqa: E402
from qcompile.kernels.quantize.reference import pack  # noqa: E402

LEVELS = torch.tensor(get_format("e2m1").levels)
MX = "e2m1 block32 e8m0"


def decoded(codes: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    return torch.ops.qcompile.dequantize(codes, scales, MX, -1, size, torch.float64)


def test_every_level_times_a_power_of_two_that_e4m3_holds():
    """r = −8 … 6 and no other: what SPAN is."""
    holds = []
    for r in range(-20, 21):
        values = torch.ldexp(LEVELS.double(), torch.tensor(r))
        if torch.equal(values.to(torch.float8_e4m3fn).double(), values):
            holds.append(r)
    assert holds == list(range(mx_rebase.HIGHEST - mx_rebase.SPAN, mx_rebase.HIGHEST + 1))


@pytest.mark.parametrize("top", [1, 127, 251])
def test_rows_of_two_blocks_of_any_levels_and_exponents(top):
    """Every code in a block that is 0 … 20 binades below another: exact within SPAN, and said to be; beyond it a row
    qualifies if its lower block is zero, and ½ at least is lost.
    """
    shifts = torch.arange(min(21, top + 1)).repeat_interleave(16)
    low = torch.arange(16).repeat(len(shifts) // 16)
    codes = torch.zeros(len(low), 64, dtype=torch.uint8)
    codes[:, 0], codes[:, 40] = 7, low.to(torch.uint8)
    scales = torch.stack([torch.full_like(shifts, top), top - shifts], 1).to(torch.uint8)
    new, scale, span, exact = mx_rebase.rebased(pack(codes, 4), scales, 64)
    expected = decoded(pack(codes, 4), scales, 64)
    same = (new.double() * scale.double() == expected).all(1)
    zero = low % 8 == 0
    assert torch.equal(exact, (shifts <= mx_rebase.SPAN) | zero)
    assert torch.equal(span, shifts.masked_fill(zero, 0).int())
    assert same[exact].all()
    assert not same[(shifts == mx_rebase.SPAN + 1) & (low % 8 == 1)].any()


def test_rows_of_random_blocks():
    """A last block that is short and half a byte, a NaN, a row of zeros whose scales are far apart."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (200, 101), dtype=torch.uint8)
    scales = torch.randint(120, 135, (200, 4), dtype=torch.uint8)
    codes[7], scales[7] = 8, torch.tensor([0, 254, 3, 90])
    scales[11, 2] = 255
    new, scale, _, exact = mx_rebase.rebased(pack(codes, 4), scales, 101)
    same = (new.double() * scale.double() == decoded(pack(codes, 4), scales, 101)).all(1)
    assert torch.equal(exact, same)
    assert exact.sum() == 199
    assert not exact[11]
    assert not new[7].double().any()


def test_sums_of_fourteen_bits():
    """What has 14 bits is exact, also below 2^12 of E2M1 with one scale per row; beyond, all addends are cut off."""
    torch.manual_seed(0)
    a, b = (LEVELS[torch.randint(0, 16, (rows, 96))].double() for rows in (9, 7))
    assert torch.equal(mx_rebase.summed(a, b), a @ b.t())
    ones = torch.ones(1, 64, dtype=torch.float64)
    large = ones.clone()
    large[0, 0] = 2.0**13  # its last bit is 1
    assert mx_rebase.summed(large, ones).item() == 2**13 + 63
    large[0, 0] = 2.0**14 + 2  # its last bit is 2: each 1 beside it is lost
    assert mx_rebase.summed(large, ones).item() == 2**14 + 2
    assert mx_rebase.summed(-large, ones).item() == -(2**14) - 2
    large[0, 0] = 2.0**14 + 3  # and so is a 1 of its own
    assert mx_rebase.summed(large, ones).item() == 2**14 + 2


def test_estimates_count_what_they_say():
    shape = (4096, 1024, 2048)
    found, rates = mx_rebase.estimates(shape, RATES[0]), RATES[0]
    in_14_bits = found["rebased, summed in 14 bits"]
    instructions = 4096 * 1024 * 2048 / 32
    after = found["rebased, summed in FP32 by blocks, one after the other"]
    assert after - in_14_bits == pytest.approx(instructions / rates.instructions)
    twice = found["one operand in two summands, 14 bits"] - in_14_bits
    assert twice >= 2 * 4096 * 1024 * 2048 / rates.operations_8bit


@pytest.mark.nightly  # some seconds
def test_a_line_for_every_role_and_operand(tmp_path, capsys):
    text, out = tmp_path / "story.txt", tmp_path / "rebase.csv"
    text.write_text("Once upon a time there was a girl who had a ball. " * 20)
    given = ["--model", str(MODEL), "--text", str(text), "--out", str(out), "--tokens", "128", "--context", "64"]
    assert mx_rebase.main(given) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    names = [(row["role"], row["operand"]) for row in rows]
    roles = {"fprop": ("X", "W"), "dgrad": ("dY", "W"), "wgrad": ("dY", "X")}
    assert names == [(role, name) for role, both in roles.items() for name in both] + [("fprop", "E2M1 row")]
    assert all(0 < float(row["qualify"]) <= 1 and 0 <= float(row["exact"]) <= 1 for row in rows)
    assert float(rows[-1]["exact"]) == 1
    assert "microseconds" in capsys.readouterr().out
    assert mx_rebase.main([*given[:2], "--text", str(tmp_path / "none.txt"), *given[4:]]) == 2
