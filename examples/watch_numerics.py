"""What rounding to FP4 does to every layer of a small Llama over a run, with and without outlier compensation.

    python examples/watch_numerics.py --out numerics            # Shakespeare; --text FILE for a text of yours

Trains twice with the same seed and batches, under ``options={"monitor": qcompile.Monitor()}``, and writes for each run
``<arm>.csv`` (a line per operand and step), ``<arm>_activation.png`` and ``<arm>_weight.png``: signal-to-quantization-
noise ratio in dB, layers × steps.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qcompile import Monitor
from qcompile.apps import demo

ARMS: dict[str, dict[str, Any]] = {"occ": {}, "no_occ": {"activation": {"outliers": None}}}


def train(experiment: demo.Experiment, options: dict[str, Any]) -> tuple[Monitor, float]:
    """The monitor of a whole run, and the loss of its last step."""
    config, monitor = experiment.config, Monitor()
    model: Any = demo.build_model(config, experiment.device)
    torch.compiler.reset()  # the runs share one model class, and Dynamo caches by class
    compiled = torch.compile(model, backend="qcompile_fp4", options={**options, "monitor": monitor})
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1, fused=True)
    for step, (inputs, targets) in zip(range(config.steps), demo.batches(experiment), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * demo.learning_rate_factor(step, config.steps)
        loss = demo.loss_of(compiled, inputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        monitor.step()
    return monitor, loss.item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="read as bytes (default: Shakespeare, 1 MB)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("numerics"))
    try:
        experiment = demo.prepare(vars(parser.parse_args(arguments)))
    except (ValueError, OSError, ImportError) as error:
        print(f"watch_numerics: {error}", file=sys.stderr)
        return 2
    out, console = experiment.config.out, Console(highlight=False)
    for arm, options in ARMS.items():
        monitor, loss = train(experiment, options)
        console.print(f"{arm}: loss {loss:.3f} after {experiment.config.steps} steps", monitor.table(last=20))
        monitor.to_csv(out / f"{arm}.csv")
        for operand in ("activation", "weight"):
            monitor.heat_map(out / f"{arm}_{operand}.png", operand=operand)
    console.print(f"Written: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
