"""What the demo prints and writes: a table, a sentence, CSV and JSON files, loss curves."""

from __future__ import annotations

import csv
import json
import os
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .model import unigram_entropy
from .settings import ARMS, Experiment
from .training import ArmResult, megabytes

__all__ = ["final_line", "plot", "replace_file", "smoothed", "summary_rows", "summary_table", "write_results"]


def summary_rows(results: list[ArmResult]) -> list[dict[str, Any]]:
    """One dictionary per arm; gaps and ratios are against the arm ``bf16`` and ``None`` without it."""
    base = next((r for r in results if r.arm == "bf16"), None)
    return [
        {
            "arm": r.arm,
            "train_loss": r.train_loss,
            "validation_loss": r.validation_loss,
            "gap_to_bf16": r.validation_loss - base.validation_loss if base else None,
            "train_gap_to_bf16": r.train_loss - base.train_loss if base else None,
            "tokens_per_second": r.tokens_per_second,
            "compile_seconds": r.compile_seconds,
            "saved_bytes": r.saved_bytes,
            "saved_ratio_to_bf16": r.saved_bytes / base.saved_bytes if base and base.saved_bytes else None,
        }
        for r in results
    ]


def summary_table(results: list[ArmResult]) -> Table:
    table = Table(title="Same seed, same batches", title_justify="left", header_style="bold")
    table.add_column("arm")
    for column in (
        "train loss",
        "validation loss",
        "gap to BF16",
        "tokens/s",
        "compile",
        "saved / step",
        "× BF16",
    ):
        table.add_column(column, justify="right")
    for row in summary_rows(results):
        gap, ratio = row["gap_to_bf16"], row["saved_ratio_to_bf16"]
        table.add_row(
            ARMS[row["arm"]].label,
            f"{row['train_loss']:.3f}",
            f"{row['validation_loss']:.3f}",
            "" if gap is None or row["arm"] == "bf16" else f"{gap:+.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['compile_seconds']:.0f} s",
            megabytes(row["saved_bytes"]),
            "" if ratio is None else f"{ratio:.2f}",
        )
    return table


def write_results(experiment: Experiment, results: list[ArmResult]) -> None:
    """``results.json`` (settings, summary), ``summary.csv`` and ``losses.csv`` (one column per arm)."""
    out = experiment.config.out
    rows = summary_rows(results)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(experiment.config).items()}
    data = {
        "settings": {**settings, "torch": torch.__version__},
        "unigram_entropy": unigram_entropy(experiment.train),
        "arms": rows,
    }
    replace_file(out / "results.json", json.dumps(data, indent=1) + "\n")
    write_csv(out / "summary.csv", [list(rows[0]), *([*row.values()] for row in rows)])
    curves = zip(*(r.losses for r in results), strict=True)
    write_csv(out / "losses.csv", [["step", *(r.arm for r in results)], *([i, *c] for i, c in enumerate(curves, 1))])


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    os.replace(temporary, path)


def replace_file(path: Path, text: str) -> None:
    """Write beside and rename, so that an interrupted run leaves the former file whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def smoothed(losses: list[float], reach: int = 12) -> list[float]:
    """Mean over ``reach`` steps to each side, fewer at the ends; symmetric, so that no curve lags its data."""
    curve = []
    for step in range(len(losses)):
        side = min(reach, step, len(losses) - 1 - step)
        curve.append(statistics.fmean(losses[step - side : step + side + 1]))
    return curve


def plot(experiment: Experiment, results: list[ArmResult], path: Path) -> None:
    """Loss curves (raw faint, smoothed bold) above; below, each arm's smoothed difference to BF16."""
    from matplotlib.figure import Figure

    base = next((r for r in results if r.arm == "bf16"), None)
    base_losses = base.losses if base else []
    others = [r for r in results if r is not base] if base else []
    figure = Figure(figsize=(8, 6.4 if others else 4.4), layout="constrained")
    axes = figure.subplots(
        2 if others else 1, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1] if others else [1]
    )[:, 0]
    for result in results:
        arm = ARMS[result.arm]
        steps = range(1, len(result.losses) + 1)
        axes[0].plot(steps, result.losses, color=arm.color, alpha=0.18, linewidth=0.8)
        label = f"{arm.label}: validation {result.validation_loss:.3f}"
        axes[0].plot(steps, smoothed(result.losses), color=arm.color, linewidth=1.8, label=label)
    entropy = unigram_entropy(experiment.train)
    axes[0].axhline(entropy, color="0.5", linestyle=":", linewidth=1, label=f"unigram entropy: {entropy:.3f}")
    lowest = min(min(r.losses) for r in results)
    axes[0].set_ylim(
        max(0.0, lowest - 0.15), max(entropy + 0.5, lowest + 0.3)
    )  # the first steps fall from ln 256 = 5.5
    axes[0].set_ylabel("training loss (nats per byte)")
    axes[0].legend(loc="upper right", frameon=False)
    config = experiment.config
    axes[0].set_title(
        f"Llama, {config.layers} layers of {config.hidden}; {config.batch} × {config.sequence} bytes per step; "
        f"seed {config.seed}"
    )
    for result in others:
        gap = smoothed([a - b for a, b in zip(result.losses, base_losses, strict=True)])
        axes[1].plot(range(1, len(gap) + 1), gap, color=ARMS[result.arm].color, linewidth=1.8)
    if others:
        axes[1].axhline(0, color=ARMS["bf16"].color, linewidth=1)
        axes[1].set_ylabel("loss − BF16 (smoothed)")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def final_line(results: list[ArmResult]) -> str:
    """Each arm's gap to BF16 in one sentence."""
    gaps = [
        f"{ARMS[row['arm']].label} {row['gap_to_bf16']:+.3f}" for row in summary_rows(results) if row["gap_to_bf16"]
    ]
    return (
        f"Validation loss against BF16 (nats per byte, one seed; repeats differ by about 0.03): {'; '.join(gaps)}"
        if gaps
        else "No gap to state: one arm only."
    )
