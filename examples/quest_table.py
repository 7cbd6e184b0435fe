"""QuEST's table in miniature: one small Llama, one seed, one set of hyperparameters, every way to quantize it.

    python examples/quest_table.py --text my_text.txt --out results    # resumable: runs in the file are skipped

Writes ``quest_table.csv`` (one row per run), ``quest_curves.csv`` (validation loss over steps) and ``quest_table.png``.
Absolute losses depend on text and tokens, so what is compared with the paper (arXiv 2502.05003, a Llama of 30M
parameters on C4, 100 tokens per parameter) is the gap to BF16 as a share of the gap of W2A2.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from scaling_law import SIZES, add_training_arguments, train_one

from qcompile.apps import demo


class Arm(NamedTuple):
    """What to compile with, and the published gap to BF16 in nats per token; ``None`` if nobody published one."""

    options: dict[str, Any] | None
    published: float | None


def both(bits: Any, **changes: Any) -> dict[str, Any]:
    """Options for two operands of one width, changed alike."""
    return {"bits": bits, "activation": changes, "weight": changes} if changes else {"bits": bits}


ARMS = {
    "BF16": Arm(None, 0.0),
    "W4A4": Arm(both(4), 0.0650),
    "W2A2": Arm(both(2), 0.3669),
    "W1A1": Arm(both(1), 0.7378),
    "W8A8": Arm(both(8), 0.0018),
    "W3A3": Arm(both(3), 0.1648),
    "FP4": Arm(both("fp4"), 0.0887),
    "INT4 4:8": Arm({"bits": 4, "weight": {"sparsity": "4:8"}}, 0.1720),
    "STE W4A4": Arm(both(4, estimator="ste", rotation=None), 0.5849),
    "no rotation W4A4": Arm(both(4, rotation=None), 0.0965),
    "no rotation W2A2": Arm(both(2, rotation=None), 0.4701),
    "absmax W4A4": Arm(both(4, scale="absmax", estimator="ste"), 0.1309),
    "absmax W2A2": Arm(both(2, scale="absmax", estimator="ste"), 1.2739),
    "INT4 2:4": Arm({"bits": 4, "weight": {"sparsity": "2:4"}}, None),
    "FP4, trust as shipped": Arm(both("fp4", estimator="trust(t=0.6541)"), None),
    **{f"W{bits}A{bits}": Arm(both(bits), gap) for bits, gap in ((7, 0.0036), (6, 0.0106), (5, 0.0245))},
    **{
        f"W{bits}A16": Arm({"bits": {"activation": 16, "weight": bits}}, gap)
        for bits, gap in ((4, 0.0401), (3, 0.0885), (2, 0.1659), (1, 0.3656))
    },
}
TABLE, CURVES = ("setting", "parameters", "tokens", "loss"), ("setting", "step", "loss")


def rows_of(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a CSV file, which is begun if there is none."""
    if not path.exists():
        path.write_text(",".join(columns) + "\n", encoding="utf-8")
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def forget(path: Path, columns: tuple[str, ...], setting: str) -> None:
    """Take out what an interrupted run has left."""
    kept = [row for row in rows_of(path, columns) if row["setting"] != setting]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)


def append(path: Path, *values: Any) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(values)


def run(given: argparse.Namespace) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    table, curves = given.out / "quest_table.csv", given.out / "quest_curves.csv"
    done = {row["setting"] for row in rows_of(table, TABLE)}
    size = SIZES[given.size]
    shared = ("text", "device", "batch", "sequence", "learning_rate", "seed", "steps", "out")
    same = {key: getattr(given, key) for key in shared}
    experiment = demo.prepare({**same, **asdict(size), "heads": size.hidden // 128})
    tokens = given.steps * given.batch * given.sequence
    passes = tokens / len(experiment.train)
    inductor = {"triton.cudagraphs": True} if given.cudagraphs else {}
    print(f"{size.parameters:,} parameters, {tokens:,} bytes: {passes:.1f} passes over the text")
    for setting in given.settings:
        if setting in done:
            continue

        def watch(step: int, compiled: Any, setting: str = setting) -> None:
            if step % given.every == 0:
                append(curves, setting, step, f"{demo.validate(compiled, experiment):.5f}")

        forget(curves, CURVES, setting)
        options = ARMS[setting].options
        backend = "inductor" if options is None else "qcompile_quest"
        start = time.perf_counter()
        loss = train_one(experiment, backend, {**(options or {}), **inductor} or None, watch)
        append(table, setting, size.parameters, tokens, f"{loss:.5f}")
        minutes = (time.perf_counter() - start) / 60
        print(f"{setting}: {loss:.4f} nats per byte, {minutes:.1f} minutes", flush=True)
    console = Console(highlight=False)
    console.print(summary(rows_of(table, TABLE)))
    plot(rows_of(table, TABLE), rows_of(curves, CURVES), given.out / "quest_table.png")
    console.print(f"Written: {table}, {curves}, {given.out / 'quest_table.png'}")


def gaps(rows: list[dict[str, str]]) -> dict[str, float]:
    """Loss above BF16 by setting, NaN without a BF16 run; ascending, as far as there is an order."""
    losses = {row["setting"]: float(row["loss"]) for row in rows}
    base = losses.get("BF16", math.nan)
    return dict(sorted(((name, loss - base) for name, loss in losses.items()), key=lambda item: item[1]))


def summary(rows: list[dict[str, str]]) -> Table:
    found = gaps(rows)
    table = Table(title="gap to BF16, and its ratio to that of W2A2", title_justify="left", box=SIMPLE)
    for column in ("setting", "loss", "gap", "ratio", "published ratio"):
        table.add_column(column, justify="left" if column == "setting" else "right")
    unit, published_unit = found.get("W2A2", math.nan), ARMS["W2A2"].published or math.nan
    losses = {row["setting"]: row["loss"] for row in rows}
    for name, gap in found.items():
        published = ARMS[name].published
        ratio = "" if published is None else f"{published / published_unit:.3f}"
        table.add_row(name, f"{float(losses[name]):.4f}", f"{gap:+.4f}", f"{gap / unit:.3f}", ratio)
    return table


def plot(rows: list[dict[str, str]], curves: list[dict[str, str]], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    found = gaps(rows)
    for place, name in enumerate(found):
        points = [(int(row["step"]), float(row["loss"])) for row in curves if row["setting"] == name]
        color = colormaps["turbo"](0.05 + 0.9 * place / max(1, len(found) - 1))
        left.plot([step for step, _ in points], [loss for _, loss in points], color=color, linewidth=1.2, label=name)
    left.set(xlabel="step", ylabel="validation loss (nats per byte)", yscale="log")
    left.legend(frameon=False, fontsize=7)
    unit, published_unit = found.get("W2A2", math.nan), ARMS["W2A2"].published or math.nan
    compared = [(name, gap / unit, ARMS[name].published) for name, gap in found.items() if ARMS[name].published]
    for place, (name, ratio, published) in enumerate(compared):
        right.plot([published / published_unit, ratio], [place, place], color="0.8", zorder=0)
        right.scatter(published / published_unit, place, facecolors="none", edgecolors="0.3", s=36)
        right.scatter(ratio, place, color="tab:blue", s=30)
        right_end = max(ratio, published / published_unit)
        right.annotate(name, (right_end, place), (6, -3), textcoords="offset points", size=7)
    right.set(xlabel="gap to BF16 ÷ gap of W2A2: here (filled), published at 30M (open)", yticks=[])
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("quest_table"), help="folder; one folder, one configuration")
    parser.add_argument("--settings", nargs="+", choices=ARMS, default=[*ARMS], metavar="SETTING")
    parser.add_argument("--size", choices=SIZES, default="8.8M")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--every", type=int, default=250, help="steps between validations")
    add_training_arguments(parser)
    demo.require("matplotlib")
    torch.set_float32_matmul_precision("high")
    try:
        run(parser.parse_args(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"quest_table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
