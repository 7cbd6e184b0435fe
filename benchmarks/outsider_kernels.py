"""Kernels printed for an outsider's definitions (``examples/outsider.py``) beside the built-in ones, in one run.

    python benchmarks/outsider_kernels.py --out benchmarks/h200/outsider_kernels.csv

Four ops on BF16 matrices: 8-bit codes by rows; these, packed codes and the mask in one kernel, as a training step takes
them; the mask alone; and a slope on the gradient, a loop that Inductor generates. The built-in ones are E2M1
with ``absmax``, ``trust`` and ``dge``. First the first rows of every result are compared with the reference: bit for
bit, but for the powers of ``dge``.

A mask without a bound needs the level, and a slope that is not known to be continuous searches the row for its scale
again.
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
from torch import Tensor

from qcompile.ir.estimators import EstimatorSpec
from qcompile.kernels.lowerings import register_lowerings
from qcompile.kernels.register import REFERENCES

__all__ = ["main"]

SIZES = [(16384, 4096), (16384, 2048), (16384, 14336)]
OPS = {
    "estimator_mask": SIZES,
    "scale_gradient": SIZES,
    "quantize_8bit": SIZES,
    "quantize_8bit_masked": SIZES[:1],
}
BUILT_IN = "e2m1 row absmax even", "trust", "dge(k=5,cap=3)"
#: Rows that are compared with the reference.
CHECKED = 32


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
    for op, sizes in OPS.items():
        for size in sizes:
            built_in_us, outsider_us = time_of(op, size, *BUILT_IN), time_of(op, size, *outsider)
            found.append(Row(op, *size, built_in_us, outsider_us, outsider_us / built_in_us))
            print(found[-1], flush=True)
            write_rows(arguments.out, found)


def time_of(op: str, size: tuple[int, int], quantizer: str, mask: str, slope: str) -> float:
    """Median µs of ``op`` on BF16 matrices. Raises ``AssertionError`` if it computes something else."""
    texts = {
        "quantize_8bit": (quantizer, False),
        "quantize_8bit_masked": (f"{quantizer}; {mask}", True),
        "estimator_mask": (quantizer, mask, -1),
        "scale_gradient": (quantizer, slope, -1),
    }[op]
    kernel = getattr(torch.ops.qcompile, op)

    def call(*tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return kernel(*tensors, *texts)

    run = torch.compile(call, dynamic=False) if op == "scale_gradient" else call
    sets = []
    for _ in range(rotations(4 * math.prod(size))):
        grad, x = torch.randn(2, *size, device="cuda", dtype=torch.bfloat16).unbind()
        scales = torch.ops.qcompile.quantize_8bit(x, quantizer, False)[1]
        sets.append({"scale_gradient": (grad, x, scales), "estimator_mask": (x, scales)}.get(op, (x,)))
    approximate = op == "scale_gradient" and EstimatorSpec.parse(slope).kind.continuous
    check(run(*sets[0]), REFERENCES[op](*(t[:CHECKED].cpu() for t in sets[0]), *texts), approximate)
    return microseconds([partial(run, *tensors) for tensors in sets])


def check(found: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...], approximate: bool) -> None:
    """The first rows are what the reference says; ``approximate``: but for a unit in the last place of BF16."""
    results = [(found, expected)] if isinstance(found, Tensor) else zip(found, expected, strict=True)
    for actual, reference in results:
        rows = actual[:CHECKED].cpu()
        if approximate:
            torch.testing.assert_close(rows, reference, rtol=2.0**-7, atol=0.0)
        else:
            assert torch.equal(rows.contiguous().view(torch.uint8), reference.contiguous().view(torch.uint8))


if __name__ == "__main__":
    main()
