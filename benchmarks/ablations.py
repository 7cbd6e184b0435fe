"""The ablations of *Optimizing Large Language Model Training Using FP4 Quantization* (arXiv 2501.17116, figure 6) in
miniature: 30M parameters and 85M tokens of real text per arm, against two seeds of BF16.

    python benchmarks/ablations.py --tokens tokens.npz.xz --out benchmarks/h200/ablations.json --jobs 4
    python benchmarks/ablations.py --tokens novels.txt.xz --out benchmarks/h200/ablations.json --jobs 4   # bytes

``study.py`` says what the model is, how arms run and how calls go on; ``tokens.npz.xz`` is what ``eight_bit_curves.py
--write-tokens`` wrote. Only the options of the blocks differ. The paper's panels (b) and (c) have one scale per tensor,
by the commits of its authors (b: activations in 8 bits, c: weights in 8 bits), and so have ours; dY is in BF16. What is
compared is the gap to BF16, and its order within a panel.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eight_bit_curves import COSTS, Curve, table_head
from study import Arm, Order, Study, orders, signed

from qcompile.apps.demo import smoothed

__all__ = ["ARMS", "BASELINES", "PANELS", "STUDY", "Ablation", "findings", "found", "gaps", "main", "noise", "table"]

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
    """On held-out text; infinite if training diverged. Of complete arms only."""
    loss = statistics.fmean(curve.validation)
    return loss if math.isfinite(loss) else math.inf


def complete(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if curve.validation}


def gaps(curves: dict[str, Curve]) -> dict[str, float]:
    """Held-out loss of complete arms above the mean of the seeds of BF16 that are there; NaN without one."""
    done = complete(curves)
    base = [loss_of(done[name]) for name in BASELINES if name in done]
    mean = statistics.fmean(base) if base else math.nan
    return {name: loss_of(curve) - mean for name, curve in done.items()}


def noise(curves: dict[str, Curve]) -> float:
    """By how much two seeds of BF16 differ; NaN unless both are there."""
    losses = [loss_of(curve) for name, curve in complete(curves).items() if name in BASELINES]
    return abs(losses[0] - losses[-1]) if len(losses) == len(BASELINES) else math.nan


def findings(curves: dict[str, Curve]) -> list[tuple[str, Order]]:
    """Panels, and pairs of theirs whose published losses differ by more than what was read off a figure may."""
    own, within = gaps(curves), noise(curves)
    return [
        (panel, order)
        for panel in PANELS
        for order in orders(
            {name: arm.published for name, arm in ARMS.items() if panel in arm.panels and arm.published},
            own,
            within,
            READING,
        )
    ]


def found(curves: dict[str, Curve]) -> dict[str, Any]:
    """For the file: losses and gaps, the noise that gaps are read against, and the paper's orders."""
    own, within = gaps(curves), noise(curves)
    return {
        "final": [
            {
                "arm": name,
                "panels": ARMS[name].panels,
                "validation": loss_of(curves[name]),
                "gap": gap,
                "published": ARMS[name].published,
            }
            for name, gap in own.items()
        ],
        "noise": None if math.isnan(within) else within,
        "orders": [{"panel": panel, **asdict(order)} for panel, order in findings(curves)],
    }


def table(curves: dict[str, Curve]) -> str:
    """Markdown: the arms of every panel, and the paper's order pair by pair."""
    own, within = gaps(curves), noise(curves)
    lines = [] if math.isnan(within) else [f"Two seeds of BF16 differ by {within:.4f} nats on held-out text.", ""]
    for panel, title in PANELS.items():
        headers = ["loss", "gap", "published gap", *COSTS]
        lines += [f"**({panel}) {title}**", "", *table_head(headers)]
        for name, curve in curves.items():
            arm = ARMS[name]
            if panel in arm.panels or name in BASELINES:
                published = "" if arm.published is None else signed(arm.published - PUBLISHED_BF16)
                label = arm.label + (f" ({curve.fault})" if curve.fault else "")
                loss = "" if name not in own else f"{loss_of(curve):.4f}" if own[name] < math.inf else "diverged"
                cells = [label, loss, signed(own[name]) if name in own else "", published, *curve.costs]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    lines += ["| panel | the paper has | below | by | here by | |", "|---|---|---|---:|---:|---|"]
    for panel, order in findings(curves):
        better, worse = ARMS[order.better].label, ARMS[order.worse].label
        lines.append(
            f"| {panel} | {better} | {worse} | {signed(order.published)} | {signed(order.ours)} | {order.verdict} |"
        )
    return "\n".join(lines)


def plot(path: Path, curves: dict[str, Curve], title: str) -> None:
    """A panel each: training loss above the smoothed one of BF16, over steps, as far as both go."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    base = smoothed(curves.get(BASELINES[0], Curve()).losses, 64)
    for axes, (panel, heading) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name, curve in curves.items():
            arm = ARMS[name]
            if name != BASELINES[0] and (panel in arm.panels or name in BASELINES):
                above = [loss - wide for loss, wide in zip(smoothed(curve.losses, 64), base, strict=False)]
                axes.plot(range(1, len(above) + 1), above, arm.style, color=arm.color, linewidth=1.2, label=arm.label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_title(f"({panel}) {heading}", fontsize=9, loc="left")
        axes.set(xlabel="step", ylabel="training loss above BF16 (nats)")
        axes.set_yscale("symlog", linthresh=0.1)
        if axes.lines[1:]:
            axes.legend(frameon=False, fontsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


STUDY = Study(Path(__file__), ARMS, 85e6, found, table, plot)


def main(arguments: list[str] | None = None) -> int:
    return STUDY.main(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
