"""What 4-bit training costs in loss: recipes of one, two and all three products, on real text, step by step.

    python benchmarks/full_fp4_curves.py --tokens tokens.npz.xz --out benchmarks/h200/full_fp4_curves.json --jobs 4
    python benchmarks/full_fp4_curves.py --tokens tokens.npz.xz --out benchmarks/h200/full_fp4_curves.json --total 400
    python benchmarks/full_fp4_curves.py --device cpu --size tiny --steps 20 --out /tmp/try.json

``tokens.npz.xz`` is what ``eight_bit_curves.py --write-tokens`` wrote: novels and technical documents, of which 100
million tokens are three passes. The model has 30 million parameters in blocks; ``study.py`` says how arms run and how
calls go on. ``bf16_seed1`` begins from other parameters and reads the same batches: its gap is the noise that gaps are
read against.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eight_bit_curves import COSTS, Curve, gap, table_head
from study import Arm, Study, orders, signed

from qcompile import RECIPES
from qcompile.apps.demo import smoothed

__all__ = ["ARMS", "BASELINE", "STUDY", "found", "rows_of", "table"]

LAST = 100  # steps that the final training loss is the mean of
GOAL = 0.043  # gap on held-out text that the best recipe of all three products is to have: Quartet II's, published

#: Nothing but the forward is quantized.
FORWARD_ONLY = {"gradient": "bf16", "dgrad_weight": None, "wgrad_activation": None}
NVFP4 = "e2m1 block16 e4m3"

BASELINE, SECOND = "bf16", "bf16_seed1"
#: In the order in which they are worth the time. ``published``: gap to BF16 in nats on held-out text at 30M parameters
#: and 25 tokens each (C4, Quartet II's log).
ARMS: dict[str, Arm] = {
    BASELINE: Arm("BF16", "black"),
    "quartet2": Arm("Quartet II", "tab:green", "qcompile_quartet2", published=0.043),
    "nvidia": Arm("NVIDIA", "tab:blue", "qcompile_nvfp4", published=0.055),
    "forward_46": Arm("forward alone, NVFP4 + 4/6", "tab:orange", "qcompile_quartet2", FORWARD_ONLY, published=0.038),
    SECOND: Arm("BF16, another seed", "0.6", seed=1, style="--"),
    "healed": Arm("Quartet II, forward wide for the last 10 %", "tab:olive", "qcompile_quartet2", healed=True),
    "forward": Arm(
        "forward alone, NVFP4",
        "tab:red",
        "qcompile_quartet2",
        {"activation": NVFP4, "weight": NVFP4, **FORWARD_ONLY},
        published=0.041,
    ),
    "tetrajet2": Arm("TetraJet-v2's core", "tab:purple", "qcompile_tetrajet2", published=0.054),
    "if4": Arm("IF4", "tab:cyan", "qcompile_if4"),
    "uniform4": Arm("uniform, after UFP4", "tab:pink", "qcompile_uniform4"),
    "mxfp4": Arm("MXFP4, forward too", "tab:brown", "qcompile_mxfp4", {"variant": "full"}),
    "quest": Arm("QuEST W4A4, BF16 backward", "goldenrod", "qcompile_quest", {"variant": "paper"}),
    "fp4_paper": Arm("FP4 as printed", "navy", "qcompile_fp4", {"variant": "paper"}),
}


def is_full(arm: Arm) -> bool:
    """All three products in 4 bits, from the first step to the last."""
    return arm.backend in RECIPES and RECIPES[arm.backend].override(arm.options).gradient is not None and not arm.healed


# --- results --------------------------------------------------------------------------------------------------------


def rows_of(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """Final losses and gaps to the baseline on the same batches: the last steps, if it has them, and held-out text."""
    base, found = curves.get(BASELINE, Curve()), []
    for name, curve in curves.items():
        row: dict[str, Any] = {"arm": name, "steps": len(curve.losses), "fault": curve.fault}
        if curve.losses:
            row["train"] = statistics.fmean(curve.losses[-LAST:])
            if len(base.losses) >= len(curve.losses):
                last = slice(max(0, len(curve.losses) - LAST), len(curve.losses))
                row["train_gap"], row["train_error"] = gap(curve.losses[last], base.losses[last])
        if curve.validation:
            row["validation"] = statistics.fmean(curve.validation)
            if base.validation:
                row["validation_gap"], row["validation_error"] = gap(curve.validation, base.validation)
        row["published_gap"] = ARMS[name].published
        found.append(row)
    return found


def found(curves: dict[str, Curve]) -> dict[str, Any]:
    """The rows; by how much two seeds of BF16 differ on held-out text; which of the published orders are ours; what
    share of Quartet II's gap its forward alone has; and the lowest gap of all three products in 4 bits.
    """
    rows = rows_of(curves)
    own = {row["arm"]: row["validation_gap"] for row in rows if "validation_gap" in row}
    published = {name: arm.published for name, arm in ARMS.items() if arm.published is not None}
    noise = abs(own.get(SECOND, math.nan))
    whole, forward = (own.get(name) for name in ("quartet2", "forward_46"))
    best = min((name for name in own if is_full(ARMS[name])), key=lambda name: own[name], default=None)
    return {
        "final": rows,
        "noise": None if math.isnan(noise) else noise,
        "orders": [asdict(order) for order in orders(published, own, noise)],
        "forward_share": forward / whole if whole and forward is not None else None,
        "published_forward_share": published["forward_46"] / published["quartet2"],
        "best": {"arm": best, "gap": own[best], "goal": GOAL, "met": own[best] <= GOAL} if best else None,
    }


def table(curves: dict[str, Curve]) -> str:
    """Markdown: losses and gaps, the noise that they are read against, and the published order pair by pair."""
    said = found(curves)
    headers = ["steps", f"train, last {LAST}", "gap, nats", "held out", "gap, nats", "published", *COSTS, "s"]
    lines = table_head(headers)
    for row in said["final"]:
        curve, cells = curves[row["arm"]], []
        for key, form, error in (
            ("train", ".4f", ""),
            ("train_gap", "+.4f", "train_error"),
            ("validation", ".4f", ""),
            ("validation_gap", "+.4f", "validation_error"),
            ("published_gap", ".3f", ""),
        ):
            known = row.get(key) is not None
            cells.append(f"{row[key]:{form}}" + (f" ± {row[error]:.4f}" if error else "") if known else "")
        label = ARMS[row["arm"]].label + (f" ({row['fault']})" if row["fault"] else "")
        cells += curve.costs
        lines.append(f"| {label} | {row['steps']} | {' | '.join(cells)} | {curve.seconds:.0f} |")
    lines.append("")
    if said["noise"] is not None:
        lines += [f"Two seeds of BF16 differ by {said['noise']:.4f} nats on held-out text.", ""]
    if said["forward_share"] is not None:
        lines += [
            f"The forward alone has {said['forward_share']:.0%} of Quartet II's gap on held-out text"
            f" (published: {said['published_forward_share']:.0%}).",
            "",
        ]
    if best := said["best"]:
        verdict = "met" if best["met"] else "missed"
        lines += [
            f"The lowest gap of all three products in 4 bits is {signed(best['gap'])}, {ARMS[best['arm']].label}'s;"
            f" the goal, {best['goal']}, is {verdict}.",
            "",
        ]
    if said["orders"]:
        lines += ["| published below | | by | here by, held out | |", "|---|---|---:|---:|---|"]
    lines += [
        f"| {ARMS[order['better']].label} | {ARMS[order['worse']].label} | {order['published']:.3f} |"
        f" {signed(order['ours'])} | {order['verdict']} |"
        for order in said["orders"]
    ]
    return "\n".join(lines).rstrip()


def plot(path: Path, curves: dict[str, Curve], title: str) -> None:
    """Losses above, smoothed; below, the gap to the baseline on the same batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    base = curves.get(BASELINE, Curve()).losses
    for name, curve in curves.items():
        arm = ARMS[name]
        above.plot(smoothed(curve.losses, 32), arm.style, color=arm.color, linewidth=1.1, label=arm.label)
        if base and name != BASELINE:
            gaps = [a - b for a, b in zip(curve.losses, base, strict=False)]
            below.plot(smoothed(gaps, 64), arm.style, color=arm.color, linewidth=1.1)
    above.set_ylabel("training loss (nats per token)")
    above.set_title(title, fontsize=9, loc="left")
    above.legend(frameon=False, fontsize=7, ncols=2)
    below.set_ylabel("gap to BF16 on the same batch, nats")
    below.set_xlabel("step")
    below.set_ylim(-0.02, 0.15)
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


STUDY = Study(Path(__file__), ARMS, 100e6, found, table, plot)


def main(arguments: list[str] | None = None) -> int:
    return STUDY.main(__doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
