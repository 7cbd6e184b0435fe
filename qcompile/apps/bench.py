"""``qcompile bench``: what a training step and its compilation cost, backend by backend.

Each backend is measured in a process of its own, twice with one Inductor cache directory that is empty at
first: the first process compiles cold, the second warm. Run as a module, this file is that process.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from qcompile import compat
from qcompile.recipes import RECIPES
from qcompile.report import saved_bytes

from .demo import Experiment, batches, build_model, configure, loss_of, require

__all__ = ["BenchPlan", "Measurement", "measure", "prepare", "run"]


@dataclass(frozen=True)
class BenchPlan:
    """A checked request."""

    backends: tuple[str, ...]
    repeats: int
    device: str
    sizes: dict[str, int]
    csv_file: Path | None


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    ``compile_seconds`` is what the first step took longer than ``step_seconds``, the later median;
    ``saved_bytes`` is of one step, parameters and inputs excluded; the rest are torch's cache counters.
    """

    backend: str
    cache: str
    compile_seconds: float
    step_seconds: float
    saved_bytes: int
    fxgraph_cache_hit: int
    fxgraph_cache_miss: int
    autograd_cache_hit: int
    autograd_cache_miss: int


def prepare(
    backends: list[str] | None,
    repeats: int,
    device: str,
    sizes: Mapping[str, int | None],
    csv_file: Path | None,
) -> BenchPlan:
    """Check a request. Raises as :func:`qcompile.apps.demo.prepare` does."""
    require("transformers")
    known = ("inductor", *RECIPES)
    for name in backends or ():
        if name not in known:
            msg = f"unknown backend {name!r}; known: {', '.join(known)}"
            raise ValueError(msg)
    if repeats < 1:
        msg = f"repeats must be positive, got {repeats}"
        raise ValueError(msg)
    given = {name: size for name, size in sizes.items() if size is not None}
    kind = configure({**given, "device": device}).device
    if csv_file is not None:
        csv_file.open("a").close()
    return BenchPlan(tuple(backends or known), repeats, kind, given, csv_file)


def run(plan: BenchPlan, console: Console) -> list[Measurement]:
    """Measure every backend cold and warm, print the table, write the CSV file."""
    measurements = []
    for backend in plan.backends:
        with tempfile.TemporaryDirectory(prefix="qcompile_bench_") as cache:
            for state in ("cold", "warm"):
                console.print(f"{backend}, {state} cache …", highlight=False)
                measurements.append(in_own_process(plan, backend, state, cache))
    console.print(table(measurements))
    if plan.csv_file is not None:
        with plan.csv_file.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(measurements[0])))
            writer.writeheader()
            writer.writerows(asdict(m) for m in measurements)
        console.print(f"Written to {plan.csv_file}", highlight=False)
    return measurements


def in_own_process(plan: BenchPlan, backend: str, state: str, cache: str) -> Measurement:
    """Raises ``RuntimeError`` with the end of the process's error output if it fails."""
    request = {
        "backend": backend,
        "cache": state,
        "repeats": plan.repeats,
        "device": plan.device,
        "sizes": plan.sizes,
    }
    done = subprocess.run(
        [sys.executable, "-m", "qcompile.apps.bench", json.dumps(request)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        msg = f"{backend}, {state} cache: exit status {done.returncode}\n{done.stderr[-2000:]}"
        raise RuntimeError(msg)
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def measure(backend: str, cache: str, repeats: int, device: str, sizes: Mapping[str, int]) -> Measurement:
    """Train the demo's model for ``repeats`` steps and a few more."""
    config = configure({**sizes, "device": device})
    assert config.sequence is not None
    text = torch.randint(256, (64 * config.sequence,), generator=torch.Generator().manual_seed(config.seed))
    experiment = Experiment(config, torch.device(device), text, text)
    model = build_model(config, experiment.device)
    compiled: Any = torch.compile(model, backend=backend)
    optimizer = torch.optim.AdamW(compiled.parameters(), fused=True)
    inputs, targets = next(batches(experiment))

    def step() -> float:
        start = time.perf_counter()
        loss = loss_of(compiled, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(compiled.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()
    with saved_bytes(compiled, inputs, targets) as saved:
        loss_of(compiled, inputs, targets)
    total = saved.total
    del saved
    step()
    median = statistics.median(step() for _ in range(repeats))
    graphs, autograd = compat.cache_counters()
    return Measurement(
        backend,
        cache,
        first - median,
        median,
        total,
        graphs["fxgraph_cache_hit"],
        graphs["fxgraph_cache_miss"],
        autograd["autograd_cache_hit"],
        autograd["autograd_cache_miss"],
    )


def table(measurements: list[Measurement]) -> Table:
    result = Table(title="One training step", title_justify="left", header_style="bold")
    result.add_column("backend")
    result.add_column("cache")
    for column in ("compile", "step", "saved", "graphs hit / miss", "autograd hit / miss"):
        result.add_column(column, justify="right")
    for m in measurements:
        result.add_row(
            m.backend,
            m.cache,
            f"{m.compile_seconds:.1f} s",
            f"{1000 * m.step_seconds:.1f} ms",
            f"{m.saved_bytes / 1e6:.2f} MB",
            f"{m.fxgraph_cache_hit} / {m.fxgraph_cache_miss}",
            f"{m.autograd_cache_hit} / {m.autograd_cache_miss}",
        )
    return result


if __name__ == "__main__":
    print(json.dumps(asdict(measure(**json.loads(sys.argv[1])))))
