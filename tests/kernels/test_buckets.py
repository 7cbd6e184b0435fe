"""Levels by table (:mod:`qcompile.kernels.quantize.buckets`): the PTX against the formula, and where there is a table.

What would break: a tie that goes the other way, an edge of a bucket that belongs to its neighbour, NaN that is not the
highest level. ``test_triton_outsider.py`` has the table itself, as kernels fill it, in Triton's interpreter.
"""

from __future__ import annotations

import math
import random
from itertools import pairwise, product

import pytest
import torch

pytest.importorskip("triton")

import qcompile
from qcompile.ir.formats import FORMATS, Format
from qcompile.kernels.formula import rounding
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.quantize.buckets import BUCKETS, Buckets, buckets_of
from qcompile.kernels.quantize.triton_rows import quantize_8bit
from qcompile.kernels.quantize.triton_transformed import estimator_mask

from .harness import compiled
from .test_triton_quantize import launches_of, machine_code, on_meta, run_ptx

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")

INFINITY = float("inf")


def _random_grids(count: int) -> list[Format]:
    """Magnitudes and code books with uneven levels, of small fractions and of arbitrary numbers."""
    draw = random.Random(0)
    grids = []
    for i in range(count):
        unit, most = (0.25, 40) if i % 4 < 2 else (draw.uniform(1e-3, 10.0), 4000)
        if i % 2:
            levels = [unit * n for n in draw.sample(range(-most, most), draw.randrange(6, 17))]
            grids.append(Format(f"book{i}", 4, codebook=tuple(levels)))
        else:
            levels = sorted(unit * n for n in draw.sample(range(most), draw.randrange(5, 9)))
            grids.append(Format(f"grid{i}", 4, tuple(levels)))
    return grids


CURVE = Format("curve", 4, (0.0, 0.5, 1.0, 1.75, 2.5, 3.5, 5.0, 7.0))
CLOSE = Format("close", 4, (0.0, 1.0, 1.0 + 2.0**-23, 2.0, 3.0))  # a midpoint is rounded to one of its levels
TABLES = [fmt for fmt in (CURVE, CLOSE, FORMATS["nf4"], *_random_grids(40)) if buckets_of(fmt, "even")]
#: With either rounding; half up, a table has to hold both signs.
CASES = [
    (fmt, rounding_name) for fmt in TABLES for rounding_name in ("even", "half_up") if buckets_of(fmt, rounding_name)
]
assert len(TABLES) > 20
assert {(fmt.codebook != (), rounding_name) for fmt, rounding_name in CASES} == {
    *product((False, True), ("even", "half_up"))
}


def neighbours(values: torch.Tensor) -> torch.Tensor:
    ends = (torch.tensor(end) for end in (-INFINITY, INFINITY))
    return torch.cat([values, *(values.nextafter(end) for end in ends)])


def points(fmt: Format, buckets: Buckets) -> torch.Tensor:
    """Where levels or buckets change, the numbers beside, and far beyond."""
    edges = [(buckets.first + n) / buckets.per_unit for n in range(BUCKETS + 1)]
    special = [*fmt.range, 1e-40, 2 * fmt.max, 1e38, INFINITY]
    y = neighbours(torch.tensor([*edges, *fmt.thresholds, *special]))
    return torch.cat([y, -y, torch.tensor([float("nan")])])


def table_of(fmt: Format, rounding_name: str, buckets: Buckets) -> dict[str, list[int]]:
    """What lanes hold, found by trying numbers; floats as bits."""
    nearest_of = rounding.nearest(fmt, rounding_name)
    starts = torch.tensor([(buckets.first + n) / buckets.per_unit for n in range(BUCKETS + 1)])
    level, code = evaluate(nearest_of, starts)
    tried = neighbours(torch.tensor([*fmt.thresholds, *(-t for t in fmt.thresholds)]))
    levels_of_tried, _ = evaluate(nearest_of, tried)
    edges = []
    for (start, end), (below, above) in zip(pairwise(starts), pairwise(level), strict=True):
        stays = tried[(levels_of_tried == below) & (tried >= start) & (tried <= end)]
        last = max(stays.max() if len(stays) else start, start)
        edges.append(-INFINITY if below == above else -last.item() * buckets.steepness)
    columns = {
        "$3": level.view(torch.int32),
        "$4": torch.tensor([*edges, -INFINITY]).view(torch.int32),
        "code": code,
    }
    return {name: column.roll(1).tolist() for name, column in columns.items()}


@pytest.mark.parametrize(("fmt", "rounding_name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_ptx_of_the_table(fmt, rounding_name):
    buckets = buckets_of(fmt, rounding_name)
    table = table_of(fmt, rounding_name, buckets)
    y = points(fmt, buckets)
    expected = evaluate(rounding.round_level(fmt, rounding_name), y), evaluate(rounding.encode(fmt, rounding_name), y)
    for bits, y_is, level, code in zip(
        y.view(torch.int32).tolist(), y.tolist(), *(e.tolist() for e in expected), strict=True
    ):
        found, lane = run_ptx(buckets.look_up, ["$0", "$1"], {"$2": bits & 2**32 - 1, **table})
        its_code = table["code"][lane & 31]
        its_level = torch.tensor([found], dtype=torch.int64).to(torch.int32).view(torch.float32).item()
        if buckets.signed:  # the sign is put in afterwards
            negative = bits < 0 if fmt.has_zero else y_is < 0
            its_level, its_code = math.copysign(its_level, -1.0 if negative else 1.0), its_code & 7 | negative << 3
        assert (its_level, its_code & 15) == (level, code), y_is


@pytest.mark.parametrize(
    ("fmt", "why"),
    [
        (FORMATS["e2m1"], "arithmetic rounds"),
        (FORMATS["int4"], "arithmetic rounds"),
        (FORMATS["e3m0"], "midpoints are too close together for their range"),
        (FORMATS["fp4bnb"], "two zeros"),
        (Format("few", 3, (0.0, 0.5, 1.25, 2.5)), "few midpoints"),
        (Format("centre", 3, codebook=(-3.0, -1.0, 1.0, 1.5, 3.0)), "a midpoint at 0, near which differences vanish"),
        (Format("tiny", 4, (0.0, 1e-30, 3e-30, 4e-30, 6e-30)), "differences are tiny"),
        (Format("wide", 4, (0.0, 1.0, 2.0, 4.0, 1e6)), "more buckets than lanes"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_where_there_is_no_table(fmt, why):
    assert buckets_of(fmt, "even") is None, why


@compiled
@pytest.mark.parametrize(("op", "most"), [("codes", 14.0), ("codes and packed codes", 16.0), ("mask", 16.0)])
def test_instructions_per_element(op, most, definitions_forgotten, tmp_path):
    """Comparisons took 25 to 28 instructions per element, most of them of a unit with half the rate. About 20 fit in
    the time in which memory delivers an element and takes its code.
    """
    fmt = qcompile.Format("curve", 4, CURVE.magnitudes)
    rising = qcompile.Estimator("rising", mask=lambda y, level, fmt: (y > level) | (y.abs() < fmt.max / 2))
    text, x = f"{fmt.name} row", on_meta(64, 2048)
    call = {
        "codes": lambda: quantize_8bit(x, text, False),
        "codes and packed codes": lambda: quantize_8bit(x, text, True),
        "mask": lambda: estimator_mask(x, on_meta(64, 1), text, rising.name, -1),
    }[op]
    (kernel,) = launches_of(call)
    instructions = machine_code(kernel, tmp_path)
    per_element = (len(instructions) - instructions.count("NOP")) / (2048 / 32)
    assert per_element < most
    assert not instructions.count("STL")
    assert instructions.count("SHFL") < 2.5 * 2048 / 32
