"""Rotating quantize kernels against the same kernels without the rotation, and against a device copy.

    python benchmarks/rotate_kernels.py --out benchmarks/h200/rotate_kernels.csv

Every kernel is first compared with its plain-torch reference on the same card, bit for bit, and only then timed. Bytes
are the fewest possible: each input read once, each output written once; the copy moves as many (measure.py).
``of_plain`` is the time over that of the same outputs without rotation. ``unfused`` is the plain-torch reference
itself, launched op by op, which is what a model without such kernels runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import copy_microseconds, failure, fresh_log, microseconds, rotations, write_rows
from torch import Tensor

from qcompile.kernels.register import REFERENCES
from qcompile.recipes.quest import ROTATION, WIDTHS

__all__ = ["CASES", "Case", "Row", "main", "measure_all"]

ACTIVATIONS = [(16384, 4096), (16384, 14336), (16384, 2048)]
WEIGHTS = [(14336, 4096)]
MIDRISE4 = str(WIDTHS[4])
OPS: Any = torch.ops.qcompile


def plain(operand: str) -> str:
    """The operand without its rotation."""
    return operand.replace(f"; {ROTATION}", "")


@dataclass(frozen=True)
class Case:
    """``op(*inputs(rows, columns, device), *arguments)``; ``plain``: the case it is compared with."""

    op: str
    arguments: tuple[Any, ...]
    shapes: list[tuple[int, int]]
    plain: str = ""
    masked: bool = False
    unfused: bool = False

    def inputs(self, rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
        x = torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device).exp()
        return (x.to(torch.bfloat16), *self.mask(rows, columns, device))

    def mask(self, rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
        return (torch.randint(256, (rows, columns // 8), dtype=torch.uint8, device=device),) if self.masked else ()

    def call(self, kernels: Callable[[str], Callable[..., Any]], x: Tensor, *mask: Tensor) -> Any:
        return kernels(self.op)(x, *self.arguments, *mask)


def masked(bits: Any, packed: bool, rotated: bool, **options: Any) -> Case:
    operand = str(WIDTHS[bits])
    return Case("quantize_8bit_masked", (operand if rotated else plain(operand), packed), ACTIVATIONS, **options)


SPARSE = MIDRISE4.replace("midrise4", "midrise4p") + "; sparse(4:8)"
CASES: dict[str, Case] = {
    "midrise4 + mask": masked(4, False, False),
    "rotate + midrise4 + mask": masked(4, False, True, plain="midrise4 + mask"),
    "rotate + midrise4 + mask, unfused": masked(4, False, True, plain="midrise4 + mask", unfused=True),
    "midrise4 + packed + mask": masked(4, True, False),
    "rotate + midrise4 + packed + mask": masked(4, True, True, plain="midrise4 + packed + mask"),
    "e2m1 + packed + mask": masked("fp4", True, False),
    "rotate + e2m1 + packed + mask": masked("fp4", True, True, plain="e2m1 + packed + mask"),
    "midrise1 + packed + mask": masked(1, True, False),
    "rotate + midrise1 + packed + mask": masked(1, True, True, plain="midrise1 + packed + mask"),
    "midrise7 + mask": masked(7, False, False),
    "rotate + midrise7 + mask": masked(7, False, True, plain="midrise7 + mask"),
    "quantize_8bit midrise4 absmax": Case("quantize_8bit", ("midrise4 row absmax half_up", False), ACTIVATIONS),
    "weight: rotate + midrise4 transposed": Case(
        "quantize_8bit_transposed", ("midrise4 row rms half_up", ROTATION), WEIGHTS
    ),
    "weight: rotate + midrise4 4:8 + mask": Case("quantize_8bit_masked", (SPARSE, False), WEIGHTS),
    "hadamard": Case("hadamard", (128, -1), ACTIVATIONS),
    "hadamard masked": Case("hadamard", (128, -1), ACTIVATIONS, plain="hadamard", masked=True),
}


@dataclass
class Row:
    """One kernel on one shape. ``of_copy``: share of the copy's bandwidth; ``of_plain``: time over the plain case's."""

    kernel: str
    rows: int
    columns: int
    status: str = "ok"
    bytes: int = 0
    us: float = math.nan
    gb_per_s: float = math.nan
    of_copy: float = math.nan
    of_plain: float = math.nan


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def differs(actual: Any, expected: Any) -> str:
    """Why two results are not the same bits; "" if they are."""
    for position, (a, e) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            return f"output {position} is {a.dtype} {list(a.shape)}, not {e.dtype} {list(e.shape)}"
        differing = int((a.contiguous().view(torch.uint8) != e.contiguous().view(torch.uint8)).sum())
        if differing:
            return f"output {position} differs in {differing} bytes"
    return ""


def measure_case(name: str, case: Case, shape: tuple[int, int], device: str) -> Row:
    """Compare with the reference on fresh data, then time. Raises what the kernel raises."""
    row = Row(name, *shape)
    run = partial(case.call, REFERENCES.__getitem__ if case.unfused else partial(getattr, OPS))
    inputs = [case.inputs(*shape, device)]
    result = run(*inputs[0])
    if not case.unfused:
        part = tuple(t[:1024] for t in inputs[0])  # rows are independent; the reference takes much memory
        why = differs(run(*part), case.call(REFERENCES.__getitem__, *part))
        if why:
            row.status = f"FAILED: {why}"
            return row
    row.bytes = sum(t.nbytes for t in (*inputs[0], *tensors_of(result)))
    del result
    inputs += [case.inputs(*shape, device) for _ in range(1 if case.unfused else rotations(row.bytes) - 1)]
    row.us = microseconds([partial(run, *tensors) for tensors in inputs], repeats=5 if case.unfused else 20)
    row.gb_per_s, row.of_copy = row.bytes / row.us / 1e3, copy_microseconds(row.bytes) / row.us
    return row


def measure_all(scale: int, device: str, log: Path) -> Iterator[Row]:
    """A row per case and shape, shapes divided by ``scale``; a failing one is one line, and the others go on."""
    times: dict[tuple[str, int, int], float] = {}
    for name, case in CASES.items():
        for rows, columns in case.shapes:
            shape = rows // scale, columns // scale
            if case.unfused and shape != ACTIVATIONS[0] and scale == 1:
                continue
            try:
                row = measure_case(name, case, shape, device)
            except Exception as error:
                row = Row(name, *shape, status=failure(error, log, f"{name} {shape}"))
            times[name, *shape] = row.us
            row.of_plain = row.us / times.get((case.plain, *shape), math.nan)
            if device == "cuda":
                torch.cuda.empty_cache()
            yield row


HEAD = f"{'kernel':36} {'shape':>12} {'µs':>9} {'GB/s':>8} {'of copy':>9} {'of plain':>9}"


def line(row: Row) -> str:
    head = f"{row.kernel:36} {f'{row.rows}×{row.columns}':>12}"
    if row.status != "ok":
        return f"{head} {row.status}"
    return f"{head} {row.us:9.1f} {row.gb_per_s:8.0f} {100 * row.of_copy:7.1f} % {row.of_plain:9.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all shapes by this, to try things out")
    parser.add_argument("--out", type=Path, default=Path("rotate_kernels.csv"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("rotate_kernels: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    log = fresh_log(given.out)
    rows: list[Row] = []
    print(HEAD)
    for row in measure_all(given.scale, given.device, log):
        rows.append(row)
        write_rows(given.out, rows)
        print(line(row), flush=True)
    return 0 if all(row.status == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
