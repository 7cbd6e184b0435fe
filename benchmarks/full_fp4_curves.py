"""What 4-bit training costs in loss: recipes of one, two and all three products, on real text, step by step.

    python benchmarks/full_fp4_curves.py --tokens tokens.npz.xz --out benchmarks/h200/full_fp4_curves.json
    python benchmarks/full_fp4_curves.py --tokens tokens.npz.xz --out benchmarks/h200/full_fp4_curves.json --total 400
    python benchmarks/full_fp4_curves.py --device cpu --size tiny --steps 20 --out /tmp/try.json

``tokens.npz.xz`` is what ``eight_bit_curves.py --write-tokens`` wrote. A Llama (model.py, 30 million parameters in
blocks) reads the same batches from the same seed in all arms: FP32 parameters and AdamW, BF16 products under autocast,
of which the arms quantize those of the blocks. ``bf16_seed1`` begins from other parameters: its gap is the noise that
gaps are read against. Every arm is a :class:`qcompile.Schedule`, those that heal of two phases.

An arm is a process of its own. The JSON file is written after each, arms that it has are not run again, and none is
begun that ``--total`` has no time for: call it again, in another session, until all are there. An arm that ``--limit``
stops keeps its losses in the file and is run anew by the next call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from eight_bit_curves import Curve, Tokens, curve_of_process, gap, read_json, settings_of, title_of, write_json
from loss_curves import decay_groups, loss_of
from measure import add_worker_arguments, answer, fresh_log
from model import SIZES, Size, build
from torch import Tensor, nn
from training_step import names_from

from qcompile import Schedule
from qcompile.apps.demo import learning_rate_factor, smoothed

__all__ = ["ARMS", "Arm", "main", "rows_of", "train"]

LAST = 100  # steps that the final training loss is the mean of
REPORT = 200  # steps after which a worker writes down what it has
MODEL = "d640"
TOKENS = 100e6
HEALED = 0.1  # share of the steps whose forward is wide

#: Nothing but the forward is quantized.
FORWARD_ONLY = {"gradient": "bf16", "dgrad_weight": None, "wgrad_activation": None}
NVFP4 = "e2m1 block16 e4m3"


@dataclass(frozen=True)
class Arm:
    """``healed``: the last steps multiply the originals in the forward. ``published``: gap to BF16 in nats at 30M
    parameters and 25 tokens each (C4, Quartet II's log).
    """

    label: str
    color: str
    backend: str = "inductor"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    healed: bool = False
    published: float | None = None
    style: str = "-"

    def schedule(self, steps: int, backend: Callable[..., Any] | None = None) -> Schedule:
        """``backend``: in place of the arm's, for tests."""
        phases: list[tuple[Any, ...]] = [(0, backend or self.backend, self.options)]
        if self.healed:
            phases.append((steps - round(HEALED * steps), backend or self.backend, {**self.options, "forward": "bf16"}))
        return Schedule(phases)


BASELINE = "bf16"
#: In the order in which they are worth the time.
ARMS: dict[str, Arm] = {
    BASELINE: Arm("BF16", "black"),
    "quartet2": Arm("Quartet II", "tab:green", "qcompile_quartet2", published=0.043),
    "nvidia": Arm("NVIDIA", "tab:blue", "qcompile_nvfp4", published=0.055),
    "forward_46": Arm("forward alone, NVFP4 + 4/6", "tab:orange", "qcompile_quartet2", FORWARD_ONLY, published=0.038),
    "bf16_seed1": Arm("BF16, another seed", "0.6", seed=1, style="--"),
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


def train(
    arm: Arm,
    size: Size,
    tokens: Tokens,
    steps: int,
    lr: float,
    backend: Callable[..., Any] | None = None,
    report: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train one arm. Losses are fetched every REPORT steps, so that others do not wait for the host."""
    start = time.perf_counter()
    model = build(size, tokens.train.device, torch.float32, arm.seed)
    phases = arm.schedule(steps, backend)
    phases.compile(*model.layers, dynamic=False)
    optimizer = torch.optim.AdamW(decay_groups(model.parameters()), lr=lr, betas=(0.9, 0.95), fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    curve, fresh = Curve(), list[Tensor]()

    def fetch() -> None:
        curve.losses += torch.stack(fresh).tolist()
        fresh.clear()
        before, curve.seconds = curve.seconds, time.perf_counter() - start
        # Of the steps since: the first ones compile.
        curve.step_ms = 1e3 * (curve.seconds - before) / (len(curve.losses) % REPORT or REPORT)

    for batch in tokens.batches(size, steps, 0, 1):
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.step()
        phases.step()
        fresh.append(loss.detach())
        if phases.count % REPORT == 0 and phases.count < steps:
            fetch()
            report(curve)
    fetch()
    # With gradients enabled, like the steps: nothing is compiled again.
    held_out = [loss_of(model, batch).detach() for batch in tokens.held_out(size, 0, 1)]
    curve.validation = torch.stack(held_out).tolist()
    curve.seconds = time.perf_counter() - start
    return curve


def work(given: argparse.Namespace) -> dict[str, Any]:
    """In a worker."""
    device = torch.device(given.device)
    tokens = Tokens.read(given.tokens, device)
    size = replace(SIZES[given.size], vocabulary=tokens.vocabulary)

    def report(curve: Curve) -> None:
        (given.scratch / "part.json").write_text(json.dumps(asdict(curve)))

    return asdict(train(ARMS[given.worker], size, tokens, given.steps, given.lr, report=report))


def measured(name: str, given: argparse.Namespace, log: Path) -> Curve:
    """The curve of an arm, whole or as far as it came."""
    arguments = [f"--{key}={value}" for key in (*SETTINGS, "device", "out") if (value := getattr(given, key))]
    return curve_of_process(Path(__file__), name, arguments, given.limit, log)


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


def table(curves: dict[str, Curve]) -> str:
    lines = [
        f"| arm | steps | train, last {LAST} | gap, nats | held out | gap, nats | published | ms per step | s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows_of(curves):
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
        lines.append(f"| {label} | {row['steps']} | {' | '.join(cells)} | {curve.step_ms:.1f} | {curve.seconds:.0f} |")
    return "\n".join(lines)


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


#: What a file of curves was made with: arms are added to it only if they were made with the same.
SETTINGS = ("size", "steps", "lr", "tokens")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--tokens", type=Path, help="what eight_bit_curves.py --write-tokens wrote (default: bytes)")
    parser.add_argument("--size", choices=SIZES, default=MODEL)
    parser.add_argument("--steps", type=int, help=f"by default {TOKENS / 1e6:.0f} million tokens")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak; 5 %% warm-up, then a cosine down to a tenth")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=float, default=300, help="seconds per arm")
    parser.add_argument("--total", type=float, default=540, help="seconds that this call may take")
    parser.add_argument("--out", type=Path, default=Path("full_fp4_curves.json"))
    add_worker_arguments(parser)
    given = parser.parse_args(arguments)
    given.steps = given.steps or round(TOKENS / SIZES[given.size].tokens)
    if given.worker:
        return answer(given, lambda: work(given))
    if given.device == "cuda" and not torch.cuda.is_available():
        print("full_fp4_curves: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    log, settings = fresh_log(given.out), settings_of(given, SETTINGS)
    try:
        curves = read_json(given.out, settings, complete=False)
    except ValueError as error:
        print(f"full_fp4_curves: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    for name in given.arms:
        if name in curves and not curves[name].fault:
            continue
        left = given.total - (time.monotonic() - start)
        needed = max((curve.seconds for curve in curves.values() if not curve.fault), default=0.0)
        if left < needed:
            print(f"{name:12} not begun: {left:.0f} s are left, the longest arm took {needed:.0f}", flush=True)
            continue
        limit, given.limit = given.limit, min(given.limit, left)
        curve = measured(name, given, log)
        given.limit = limit
        curves[name] = curve
        curves = {name: curves[name] for name in ARMS if name in curves}
        write_json(given.out, settings, curves, rows_of(curves))
        print(f"{name:12} {len(curve.losses)} steps in {curve.seconds:.0f} s {curve.fault}", flush=True)
    if curves:
        plot(given.out.with_suffix(".png"), curves, title_of(SIZES[given.size]))
    print(f"\n{table(curves)}")
    return 0 if all(name in curves and not curves[name].fault for name in given.arms) else 1


if __name__ == "__main__":
    sys.exit(main())
