"""Steps on 2, 4 and 8 GPUs by a model on paper, from what gradient_communication.py measured on two.

    python benchmarks/scaling_on_paper.py benchmarks/h200/gradient_communication.csv

The model has four inputs, all of them from the CSV file:

- the step of one GPU by itself, and its optimizer, which FSDP2 spreads over the GPUs: what is computed, C(N);
- bytes: a rank sends 2 hops (DDP: reduce-scatter and all-gather) or 1 (FSDP2) of gradients and, under FSDP2, the BF16
  weights: those of blocks twice, the root's once; (N − 1)/N of each. FP8 gradients are codes and scales;
- links: the bytes per second of BF16's reduce-scatter of two GPUs, for any N, as GPUs behind a switch have;
- overlap: what a step of two GPUs with BF16 gradients takes beside C(2), as a share x of its communication on idle
  links. It is above 1 where communication that is hidden slows down what hides it.

A step takes C(N) + x · communication(N). With FP8 gradients their part of it is multiplied with the ratio that
``model reduce-scatter`` of the CSV file has for N ranks, kernels included. Nothing else is fitted, so FP8's step on two
GPUs is a prediction, and stands beside its measurement. What the host takes to queue a step is not in the model.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from model import SIZES, Size

__all__ = ["Prediction", "main", "predictions", "table"]

WORLDS = (2, 4, 8)
#: Hops of gradients.
HOPS = {"ddp": 2, "fsdp2": 1}

Rows = dict[tuple[str, str, str], dict[str, str]]


@dataclass(frozen=True)
class Prediction:
    """Of a step in microseconds. ``shown``: x. ``efficiency``: of N GPUs, to N times one. ``measured``: of two GPUs, or
    0.
    """

    wrapper: str
    size: str
    gradients: str
    gpus: int
    sent_mb: float
    us: float
    measured: float
    shown: float
    efficiency: float


def read(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"].startswith("ok")]
    return {(row["arm"], row["size"], row["gradients"]): row for row in rows}


def gathers(wrapper: str, size: Size) -> float:
    """How often a weight is gathered, on average: FSDP2 keeps the root's until the backward."""
    return 1 + size.block_weights / size.parameters if wrapper == "fsdp2" else 0.0


def predictions(rows: Rows) -> Iterator[Prediction]:
    """Of every wrapper and size that all inputs are there for; the largest bucket's rates are used."""
    buckets = [size for arm, size, gradients in rows if (arm, gradients) == ("reduce-scatter", "bf16")]
    if not buckets:
        return
    bucket = max(buckets, key=lambda size: int(size.split()[0]))
    wide = rows["reduce-scatter", bucket, "bf16"]
    rate = float(wide["sent_mb"]) / float(wide["us"])
    ratios = {world: rows.get(("model reduce-scatter", bucket, f"{world} ranks")) for world in WORLDS}
    for (wrapper, size, gradients), step in rows.items():
        alone, optimizer = (rows.get((arm, size, "bf16")) for arm in ("alone", "optimizer"))
        narrow = rows.get((wrapper, size, "fp8"))
        if wrapper not in HOPS or gradients != "bf16" or None in (alone, optimizer, narrow, *ratios.values()):
            continue
        assert alone is not None
        assert optimizer is not None
        assert narrow is not None
        hops, weights = HOPS[wrapper], gathers(wrapper, SIZES[size])
        whole = 2 * float(step["sent_mb"]) / hops  # of gradients in BF16: on two GPUs a rank sends half of it per hop
        narrow_share = float(narrow["sent_mb"]) / float(step["sent_mb"])
        one, states = float(alone["us"]), float(optimizer["us"])

        def computed(world: int, one: float = one, states: float = states, sharded: bool = weights > 0) -> float:
            return one - states * (1 - 1 / world) if sharded else one

        def sent(world: int, times: float, whole: float = whole) -> float:
            return times * whole * (world - 1) / world

        exposed = (float(step["us"]) - computed(2)) / (sent(2, hops + weights) / rate)
        for world in WORLDS:
            ratio = float(ratios[world]["ratio"])  # type: ignore[index]
            for name, share, factor in (("bf16", 1.0, 1.0), ("fp8", narrow_share, ratio)):
                time = computed(world) + exposed * sent(world, hops * factor + weights) / rate
                measured = float(rows[wrapper, size, name]["us"]) if world == 2 else 0.0
                bytes_sent = sent(world, hops * share + weights)
                yield Prediction(wrapper, size, name, world, bytes_sent, time, measured, exposed, one / time)


def table(found: list[Prediction]) -> str:
    lines = [
        "| | size | gradients | GPUs | MB sent per step | ms, model | ms, measured | of N × one GPU |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for each in found:
        measured = f"{each.measured / 1e3:.1f}" if each.measured else ""
        lines.append(
            f"| {each.wrapper} | {each.size} | {each.gradients} | {each.gpus} | {each.sent_mb:.0f} |"
            f" {each.us / 1e3:.1f} | {measured} | {each.efficiency:.0%} |"
        )
    shown = {(each.wrapper, each.size): f"{each.wrapper} {each.size} {each.shown:.2f}" for each in found}
    return "\n".join([*lines, "", f"x: {', '.join(shown.values())}."])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="what gradient_communication.py wrote, with all its arms")
    given = parser.parse_args(arguments)
    found = list(predictions(read(given.csv)))
    if not found:
        print(f"scaling_on_paper: {given.csv} lacks reductions, kernels, alone, or bf16 and fp8 steps", file=sys.stderr)
        return 1
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
