"""The ablations of *Optimizing Large Language Model Training Using FP4 Quantization* (arXiv 2501.17116, figure 6) in
miniature: 30M parameters and 85M bytes of real text per arm, against two seeds of BF16.

    python benchmarks/ablations.py --text novels.txt.xz --out benchmarks/h200/ablations.json --seconds 540

Model, batches, schedule and precision are those of loss_curves.py; only the options of the blocks differ. The paper's
panels (b) and (c) have one scale per tensor, by the commits of its authors (b: activations in 8 bits, c: weights in 8
bits), and so have ours; dY is in BF16. What is compared is the gap to BF16, and its order within a panel.

The file is read first: arms that it has are not run again, so a run is cut into as many sessions as it takes. An arm is
the unit: one that is cut starts again, and none begins that would not end within ``--seconds``, by the longest so far.
Writes the file after every arm, and at the end a figure (.png) and a table (.md) beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from loss_curves import Arm, Curve, Text, train
from measure import environment, failure, fresh_log, quiet_stderr
from model import SIZES, Size
from training_step import names_from, release

from qcompile.apps.demo import smoothed

__all__ = ["ARMS", "BASELINES", "PANELS", "Ablation", "Finding", "findings", "gaps", "main", "noise", "table"]

SIZE = replace(SIZES["d640"], name="30M", vocabulary=256)
BASELINES = ("bf16", "bf16_seed1")
PUBLISHED_BF16 = 2.74
#: What a loss that was read off a figure may be wrong by, in nats.
READING = 0.01

PANELS = {
    "a": "W4A4",
    "b": "DGE, W4A8 per tensor",
    "c": "OCC, W8A4 per tensor",
    "d": "granularity, W4A4 without DGE and OCC",
}


@dataclass(frozen=True)
class Ablation(Arm):
    """``panels``: those of the paper's figure that have it. ``published``: its final loss there (1.3B parameters, 10B
    tokens; about), infinite where it diverged, ``None`` where nobody published one.
    """

    panels: str = ""
    published: float | None = None


def w4a4(
    label: str, panels: str, published: float | None, activation: str, weight: str, color: str, style: str = "-"
) -> Ablation:
    """Operands as the recipe's options have them; the backward as printed."""
    options = {"variant": "paper", "activation": activation, "weight": weight}
    return Ablation(label, color, "qcompile_fp4", options, style=style, panels=panels, published=published)


def e2m1(granularity: str, rest: str = "ste") -> str:
    return f"e2m1 {granularity} absmax even; {rest}"


WIDE = "e4m3 tensor absmax even; ste"
ROW, TENSOR = e2m1("row"), e2m1("tensor")
DGE = e2m1("row", "dge(k=5,cap=3)")
OCC = e2m1("row", "ste; occ(alpha=0.99,per=row,compensate=1)")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:cyan")


def slopes() -> Iterator[tuple[str, Ablation]]:
    """Panel b: the straight-through estimator, and the DGE of three strengths."""
    yield "w4a8", w4a4("W4A8, direct", "b", 2.83, WIDE, TENSOR, COLORS[0])
    for k, published, color in zip((3, 5, 10), (2.77, 2.76, 2.77), COLORS[1:], strict=False):
        weight = e2m1("tensor", f"dge(k={k},cap=3)")
        yield f"w4a8_dge{k}", w4a4(f"W4A8, DGE k = {k}", "b", published, WIDE, weight, color)


def clamps() -> Iterator[tuple[str, Ablation]]:
    """Panel c: no clamp, and three quantiles with and without the residual."""
    yield "w8a4", w4a4("W8A4, direct", "c", math.inf, TENSOR, WIDE, COLORS[0])
    for alpha, published, color in zip((0.999, 0.99, 0.97), (2.785, 2.765, 2.752), COLORS[1:], strict=False):
        for compensate, style in ((1, "-"), (0, ":")):
            activation = e2m1("tensor", f"ste; occ(alpha={alpha},per=tensor,compensate={compensate})")
            label = f"W8A4, OCC α = {alpha}{'' if compensate else ', no residual'}"
            known = published if compensate else None
            name = f"w8a4_occ{alpha}{'' if compensate else '_clamp'}"
            yield name, w4a4(label, "c", known, activation, WIDE, color, style)


#: In the order in which they run: what the paper's claims rest on first.
ARMS: dict[str, Ablation] = {
    "bf16": Ablation("BF16", "black", panels="abcd", published=PUBLISHED_BF16),
    "bf16_seed1": Ablation("BF16, another seed", "0.6", seed=1, style="--"),
    "w4a4_tensor": w4a4("W4A4, direct, per tensor", "ad", 4.5, TENSOR, TENSOR, COLORS[0]),
    "w4a4": w4a4("W4A4, direct, per row", "ad", 2.85, ROW, ROW, COLORS[1]),
    "w4a4_dge_occ": w4a4("W4A4, DGE and OCC", "a", 2.765, OCC, DGE, COLORS[2]),
    "w4a4_dge": w4a4("W4A4, DGE", "a", None, ROW, DGE, COLORS[3]),
    "w4a4_occ": w4a4("W4A4, OCC", "a", None, OCC, ROW, COLORS[4]),
    **dict(slopes()),
    **dict(clamps()),
    "weight_tensor": w4a4("weights per tensor", "d", 2.915, ROW, TENSOR, COLORS[2]),
    "activation_tensor": w4a4("activations per tensor", "d", 4.55, TENSOR, ROW, COLORS[3]),
}


# --- results --------------------------------------------------------------------------------------------------------


def loss_of(curve: Curve) -> float:
    """On held-out text; infinite if training diverged."""
    return curve.validation if math.isfinite(curve.validation) else math.inf


def gaps(curves: dict[str, Curve]) -> dict[str, float]:
    """Held-out loss above the mean of the seeds of BF16 that are there; NaN without one."""
    base = [loss_of(curves[name]) for name in BASELINES if name in curves]
    mean = statistics.fmean(base) if base else math.nan
    return {name: loss_of(curve) - mean for name, curve in curves.items()}


def noise(curves: dict[str, Curve]) -> float:
    """By how much two seeds of BF16 differ; NaN unless both are there."""
    losses = [loss_of(curves[name]) for name in BASELINES if name in curves]
    return abs(losses[0] - losses[-1]) if len(losses) == len(BASELINES) else math.nan


@dataclass(frozen=True)
class Finding:
    """That the paper has ``better`` below ``worse`` in a panel, and by how much each has it; ``verdict`` in words."""

    panel: str
    better: str
    worse: str
    published: float
    ours: float
    verdict: str


def findings(curves: dict[str, Curve]) -> list[Finding]:
    """All pairs of a panel whose published losses differ by more than two readings of a figure may."""
    own, found, within = gaps(curves), [], noise(curves)
    for panel in PANELS:
        known = [name for name, arm in ARMS.items() if panel in arm.panels and arm.published and name in curves]
        for pair in combinations(known, 2):
            better, worse = sorted(pair, key=lambda name: ARMS[name].published or 0.0)
            published = (ARMS[worse].published or 0.0) - (ARMS[better].published or 0.0)
            if published <= 2 * READING:
                continue
            ours = own[worse] - own[better] if own[worse] != own[better] else 0.0
            verdict = "reproduced" if ours > within else "reversed" if ours < -within else "within the noise of seeds"
            found.append(Finding(panel, better, worse, published, ours, verdict))
    return found


def table(curves: dict[str, Curve]) -> str:
    """Markdown: the arms of every panel, and the paper's order pair by pair."""
    own = gaps(curves)
    lines = [f"Two seeds of BF16 differ by {noise(curves):.4f} nats per byte of held-out text.", ""]
    for panel, title in PANELS.items():
        lines += [f"**({panel}) {title}**", "", "| arm | loss | gap | published gap |", "|---|---:|---:|---:|"]
        for name, arm in ARMS.items():
            if name in curves and (panel in arm.panels or name in BASELINES):
                published = "" if arm.published is None else signed(arm.published - PUBLISHED_BF16)
                loss = f"{loss_of(curves[name]):.4f}" if math.isfinite(loss_of(curves[name])) else "diverged"
                lines.append(f"| {arm.label} | {loss} | {signed(own[name])} | {published} |")
        lines.append("")
    lines += ["| panel | the paper has | below | by | here by | |", "|---|---|---|---:|---:|---|"]
    for each in findings(curves):
        better, worse = ARMS[each.better].label, ARMS[each.worse].label
        lines.append(
            f"| {each.panel} | {better} | {worse} | {signed(each.published)} | {signed(each.ours)} | {each.verdict} |"
        )
    return "\n".join(lines)


def signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "diverged" if value == math.inf else "?"


def plot(path: Path, curves: dict[str, Curve], title: str) -> None:
    """A panel each: training loss above the smoothed one of BF16, over steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    base = smoothed(curves[BASELINES[0]].losses, 64)
    for axes, (panel, heading) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, curve in curves.items():
            arm = ARMS[name]
            if name != BASELINES[0] and (panel in arm.panels or name in BASELINES):
                above = [loss - wide for loss, wide in zip(smoothed(curve.losses, 64), base, strict=True)]
                axes.plot(range(1, len(above) + 1), above, arm.style, color=arm.color, linewidth=1.2, label=arm.label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"({panel}) {heading}", fontsize=9, loc="left")
        axes.set(xlabel="step", ylabel="training loss above BF16 (nats per byte)")
        axes.set_yscale("symlog", linthresh=0.1)
        if axes.lines[1:]:
            axes.legend(frameon=False, fontsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# --- runs -----------------------------------------------------------------------------------------------------------


def read(path: Path, settings: dict[str, Any]) -> dict[str, Curve]:
    """What an earlier call has finished. Raises ``ValueError`` where it had other settings."""
    if not path.exists():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if data["settings"].get(key) != value:
            msg = f"{path} was made with {key}={data['settings'].get(key)!r}, now {value!r}; take another file"
            raise ValueError(msg)
    return {name: Curve(**curve) for name, curve in data["arms"].items() if name in ARMS}


def write(path: Path, settings: dict[str, Any], curves: dict[str, Curve]) -> None:
    arms = {n: {**asdict(c), "losses": [round(loss, 5) for loss in c.losses]} for n, c in curves.items()}
    data = {"environment": environment(), "settings": settings, "arms": arms}
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")


def settings_of(size: Size, given: argparse.Namespace) -> dict[str, Any]:
    return {
        **asdict(size),
        "parameters": size.parameters,
        "steps": given.steps,
        "bytes": given.steps * size.tokens,
        "learning_rate": given.learning_rate,
        "text": given.text.name if given.text else "tinyshakespeare",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--size", choices=SIZES, help="another model (default: 30M parameters)")
    parser.add_argument("--steps", type=int, default=2600, help="of 32768 bytes: 85M")
    parser.add_argument("--learning-rate", type=float, default=1.2e-3, help="peak; 5 %% warm-up, then a cosine")
    parser.add_argument("--text", type=Path, help="plain or .xz (default: the Shakespeare of the package)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf, help="in all; no arm begins that would end later")
    parser.add_argument(
        "--expected", type=float, default=180.0, metavar="SECONDS", help="of an arm, before one is known"
    )
    parser.add_argument("--out", type=Path, default=Path("ablations.json"))
    given = parser.parse_args(arguments)
    began = time.perf_counter()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("ablations: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    size = SIZES[given.size] if given.size else SIZE
    settings = settings_of(size, given)
    try:
        curves = read(given.out, settings)
        text = Text.read(given.text, torch.device(given.device))
    except (ValueError, OSError) as error:
        print(f"ablations: {error}", file=sys.stderr)
        return 2
    log = fresh_log(given.out)
    failed, left = [], []
    for name in given.arms:
        if name in curves:
            continue
        longest = max((curve.seconds for curve in curves.values()), default=given.expected)
        if time.perf_counter() - began + longest > given.seconds:
            left.append(name)
            continue
        try:
            with quiet_stderr(log):
                curves[name] = train(name, ARMS[name], size, text, given.steps, given.learning_rate)
            write(given.out, settings, curves)
            print(f"{name:16} {loss_of(curves[name]):.4f} after {curves[name].seconds:.0f} s", flush=True)
        except Exception as error:  # the others go on
            failed.append(name)
            print(f"{name:16} {failure(error, log, name)}", flush=True)
        release()
    curves = {name: curves[name] for name in ARMS if name in curves}
    if BASELINES[0] in curves:
        where = environment()
        made = f"{where['card']}, torch {where['torch']}, Triton {where['triton']}, {where['date']}"
        title = f"Llama of {size.parameters / 1e6:.0f}M parameters, {settings['bytes'] / 1e6:.0f}M bytes; {made}"
        plot(given.out.with_suffix(".png"), curves, title)
        given.out.with_suffix(".md").write_text(f"{title}.\n\n{table(curves)}\n", encoding="utf-8")
        print(table(curves))
    if left:
        print(f"left for the next call: {','.join(left)}")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
