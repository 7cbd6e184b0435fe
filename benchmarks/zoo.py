"""Every model of the test zoo through real Inductor: what is quantized, and what that costs in compile time.

One row per model, written as soon as it is known: first what is counted, of all models, then the times. What the file
has already is kept, so that an interrupted run can be continued; to have a row counted again, blank its ``sites``.
Sites and the share of the products' operations that run quantized are counted while the graphs execute eagerly
(``tests/models``). Compile time is that of the first forward and backward less a later one, in a process of its own
with an empty cache; which of the two backends goes first alternates. Processor seconds, compilers included, are what
is compared: they hold on a machine that is shared, where the clock does not. Sizes are tiny, so that this is the
fixed cost of a graph.

    python benchmarks/zoo.py --out benchmarks/zoo_cpu.csv [--minutes 20] [model …]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._inductor.config
import transformers
from measure import Seconds, in_own_process

from qcompile.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from models.harness import Compiled, Step, expect  # noqa: E402
from models.zoo import ZOO, build  # noqa: E402

BACKENDS = ("inductor", "qcompile_fp4")


@dataclass(frozen=True)
class Counted:
    """GEMM sites, and the share of the eager model's operations of products that run quantized.

    ``graph_breaks``: sub-graphs beyond the first. ``unaccounted``: products of the graphs, forward and backward, that
    belong to no site. ``counted``: the date.
    """

    sites: int
    quantized_sites: int
    forward_coverage: float
    backward_coverage: float
    graph_breaks: int
    unaccounted: int
    counted: str


@dataclass(frozen=True)
class Timed:
    """Cold compile time in processor seconds, and by the clock (``…_wall``) with one compiler at a time.

    ``load``: the machine's load average at the end. ``date``, ``torch`` and ``transformers`` are of the times.
    """

    inductor_seconds: float
    qcompile_seconds: float
    ratio: float
    inductor_wall: float
    qcompile_wall: float
    load: float
    date: str
    torch: str
    transformers: str


COLUMNS = ("model", *(field.name for columns in (Counted, Timed) for field in fields(columns)))


def count(name: str) -> Counted:
    """For the recipe as users get it, but that no layer is too thin: these models are thin because they are tiny."""
    entry = ZOO[name]
    model, inputs = build(entry)
    eager = expect(model, inputs(0))
    compiled = Compiled(RECIPES["qcompile_fp4"].override({"min_side": 0}))
    with torch._dynamo.config.patch(**entry.dynamo):
        Step.of(model, torch.compile(model, backend=compiled), inputs(0))
    decisions = compiled.decisions
    return Counted(
        sites=len(decisions),
        quantized_sites=sum(decision.quantized for decision in decisions),
        forward_coverage=compiled.forward.quantized / eager.forward.count.total,
        backward_coverage=compiled.backward.quantized / eager.backward.count.total,
        graph_breaks=len(compiled.graphs) - 1,
        unaccounted=sum(len(graph.unaccounted) for graph in compiled.graphs),
        counted=str(datetime.date.today()),
    )


def compile_seconds(name: str, backend: str) -> Seconds:
    """What the first step takes longer than the third, in float32 with an empty cache."""
    entry = ZOO[name]
    model, inputs = build(entry, torch.float32)
    call = torch.compile(model, backend=backend)
    torch._inductor.config.compile_threads = 1  # in this process, whose time is taken
    times = []
    with tempfile.TemporaryDirectory(prefix="qcompile_zoo_") as cache, torch._dynamo.config.patch(**entry.dynamo):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for number in range(3):
            start = Seconds.now()
            Step.of(model, call, inputs(number))
            times.append(Seconds.now() - start)
    return times[0] - times[-1]


def measure(name: str, turn: int) -> Timed:
    order = BACKENDS if turn % 2 == 0 else BACKENDS[::-1]
    seconds = {backend: in_own_process(partial(compile_seconds, name, backend)) for backend in order}
    inductor, ours = (seconds[backend] for backend in BACKENDS)
    return Timed(
        inductor_seconds=inductor.processor,
        qcompile_seconds=ours.processor,
        ratio=ours.processor / inductor.processor,
        inductor_wall=inductor.wall,
        qcompile_wall=ours.wall,
        load=os.getloadavg()[0],
        date=str(datetime.date.today()),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


Table = dict[str, dict[str, str]]
"""Rows of the file by model."""


def read(path: Path) -> Table:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def write(path: Path, table: Table) -> None:
    """In the order of the zoo."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(table[name] for name in ZOO if name in table)


def fill(path: Path, names: list[str], column: str, work: Callable[[str, int], Any], end: float) -> None:
    """``work`` for every model that has nothing in ``column`` yet, until the clock passes ``end``."""
    table = read(path)
    pending = [name for name in names if not table.get(name, {}).get(column)]
    for turn, name in enumerate(pending):
        if time.monotonic() > end:
            break
        try:
            found = asdict(work(name, turn))
        except RuntimeError as error:
            print(f"{name}: {error}", flush=True)
            continue
        texts = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in found.items()}
        table[name] = {"model": name, **table.get(name, {}), **texts}
        write(path, table)
        print(name, *texts.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of the zoo; all if none is given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "zoo_cpu.csv")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further model after this long")
    arguments = parser.parse_args()
    names = arguments.models or list(ZOO)
    if unknown := set(names) - set(ZOO):
        parser.error(f"no such models: {', '.join(sorted(unknown))}; known: {', '.join(ZOO)}")
    end = time.monotonic() + 60 * arguments.minutes
    fill(arguments.out, names, "sites", lambda name, _: in_own_process(partial(count, name)), end)
    fill(arguments.out, names, "ratio", measure, end)
    ratios = [float(row["ratio"]) for row in read(arguments.out).values() if row["ratio"]]
    if ratios:
        print(f"{len(ratios)} models; median of compile time over Inductor's: {median(ratios):.3f}")


if __name__ == "__main__":
    main()
