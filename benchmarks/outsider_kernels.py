"""Kernels printed for an outsider's definitions (``examples/outsider.py``) beside the built-in ones, in one run.

    python benchmarks/outsider_kernels.py --out benchmarks/h200/outsider_kernels.csv

Three ops on one BF16 matrix per size: 8-bit codes by rows, the packed mask of an estimator, and a slope on the gradient
(a loop that Inductor generates). The built-in ones are E2M1 with ``absmax``, ``trust`` and ``dge``. Outside the
built-in rules a row may leave the grid, so every element is clamped; a mask without a bound needs the level; and a
slope that is not known to be continuous searches the row for its scale again.
"""

from __future__ import annotations

import argparse
import math
import runpy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import microseconds, rotations, write_rows

from qcompile.kernels.lowerings import register_lowerings

__all__ = ["main"]

SIZES = [(16384, 4096), (16384, 2048), (16384, 14336)]
BUILT_IN = "e2m1 row absmax even", "trust", "dge(k=5,cap=3)"


@dataclass
class Row:
    """Median µs of the built-in kernel and of the outsider's, and their ratio."""

    op: str
    rows: int
    columns: int
    built_in_us: float
    outsider_us: float
    ratio: float


def main() -> None:
    """One row per op and size."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("outsider_kernels.csv"))
    arguments = parser.parse_args()
    register_lowerings()
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "outsider.py"))["recipe"]
    outsider = str(recipe.activation.quantizer), str(recipe.activation.estimator), str(recipe.weight.estimator)
    found = []
    for op in ("quantize_8bit", "estimator_mask", "scale_gradient"):
        for size in SIZES:
            built_in_us, outsider_us = time_of(op, size, *BUILT_IN), time_of(op, size, *outsider)
            found.append(Row(op, *size, built_in_us, outsider_us, outsider_us / built_in_us))
            print(found[-1])
    write_rows(arguments.out, found)


def time_of(op: str, size: tuple[int, int], quantizer: str, mask: str, slope: str) -> float:
    """Median µs of ``op`` on BF16 matrices."""
    ops = torch.ops.qcompile
    sets = [
        torch.randn(2, *size, device="cuda", dtype=torch.bfloat16).unbind()
        for _ in range(rotations(4 * math.prod(size)))
    ]
    scales = [ops.quantize_8bit(x, quantizer, False)[1] for x, _ in sets]
    sloped = torch.compile(lambda g, x, s: ops.scale_gradient(g, x, s, quantizer, slope, -1), dynamic=False)
    bodies = {
        "quantize_8bit": lambda x, grad, scale: ops.quantize_8bit(x, quantizer, False)[0],
        "estimator_mask": lambda x, grad, scale: ops.estimator_mask(x, scale, quantizer, mask, -1),
        "scale_gradient": lambda x, grad, scale: sloped(grad, x, scale),
    }
    return microseconds([partial(bodies[op], x, grad, scale) for (x, grad), scale in zip(sets, scales, strict=True)])


if __name__ == "__main__":
    main()
