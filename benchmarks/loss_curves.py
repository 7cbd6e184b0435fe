"""What the modes do to training: loss on real text, in BF16 and with 4-bit forward products.

    python benchmarks/loss_curves.py --out benchmarks/h200/loss_curves.json
    python benchmarks/loss_curves.py --arms bf16,default,fp8,paper --steps 2000 --text text.txt

A Llama of 28 million parameters (model.py, "d768") reads Shakespeare as bytes, all arms with the same seed and batches;
BF16 runs a second seed too, whose distance from the first is the noise that gaps have to be read against. Precision is
that of mixed-precision pretraining: FP32 parameters and AdamW, BF16 products under ``torch.autocast``; the 4-bit arms
quantize what autocast hands to a product. Every block is compiled by itself (``module.compile``), once for all layers,
so that six arms take seconds to compile; embedding, head and loss run as they are.

Writes the JSON file (settings, losses, gaps) and the plot beside it (.png), and prints the table of final gaps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import environment, failure, fresh_log, quiet_stderr
from model import SIZES, Llama, Size, build
from torch import Tensor, nn
from training_step import OURS, names_from, release

from qcompile.apps.demo import learning_rate_factor, read_text, smoothed

__all__ = [
    "ARMS",
    "Arm",
    "Curve",
    "Text",
    "decay_groups",
    "final_rows",
    "loss_of",
    "main",
    "step_of",
    "train",
    "windows",
]

LAST = 20  # steps that the final training loss is the mean of
ZOOM = 100  # steps in the inset
VALIDATION_BATCHES = 16


@dataclass(frozen=True)
class Arm:
    """``module.compile(backend=backend, options=options)`` of every block, and how the curve is drawn."""

    label: str
    color: str
    backend: str = "inductor"
    options: dict[str, Any] | None = None
    seed: int = 0
    style: str = "-"


def fp4(label: str, color: str, recipe: str) -> Arm:
    return Arm(label, color, "qcompile_fp4", OURS[recipe])


BASELINE = "bf16"
ARMS: dict[str, Arm] = {
    BASELINE: Arm("BF16", "black"),
    "bf16_seed1": Arm("BF16, another seed", "0.6", seed=1, style="--"),
    "default": Arm("FP4, no options", "tab:purple", "qcompile_fp4"),
    "paper": Arm("FP4, as printed", "tab:cyan", "qcompile_fp4", {"variant": "paper"}),
    "quest": Arm("QuEST W4A4, no options", "tab:brown", "qcompile_quest"),
    "forward": fp4("FP4 forward, BF16 backward", "tab:blue", "ours_bf16_occ"),
    "dgrad_fp8": fp4("FP4 forward, dgrad FP8", "tab:green", "ours_dgrad_fp8_occ"),
    "fp8": fp4("FP4 forward, backward FP8", "tab:orange", "ours_fp8_occ"),
    "fp8_no_occ": fp4("FP4 forward, backward FP8, no OCC", "tab:red", "ours_fp8"),
}


@dataclass(frozen=True)
class Text:
    """Byte values, uint8 ``[n]``: all but the last tenth to train on, and the last tenth."""

    train: Tensor
    validation: Tensor

    @staticmethod
    def read(path: Path | None, device: torch.device) -> Text:
        """A file, or the Shakespeare that the package ships."""
        data = torch.frombuffer(bytearray(read_text(path)), dtype=torch.uint8).to(device)
        return Text(data[: -len(data) // 10], data[-len(data) // 10 :])

    def batches(self, size: Size, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random windows, decided by the seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - size.sequence, (size.batch,), generator=generator)
            yield windows(self.train, starts, size)

    def validation_batches(self, size: Size) -> Iterator[tuple[Tensor, Tensor]]:
        """The same evenly spread windows for everybody."""
        count = VALIDATION_BATCHES * size.batch
        starts = torch.linspace(0, len(self.validation) - size.sequence - 1, count).long()
        for chunk in starts.split(size.batch):
            yield windows(self.validation, chunk, size)


def windows(data: Tensor, starts: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 ``[batch, sequence]``, that begin at ``starts``."""
    positions = starts.to(data.device)[:, None] + torch.arange(size.sequence + 1, device=data.device)
    text = data[positions].long()
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


@dataclass
class Curve:
    """What one arm produced; losses in nats per byte."""

    arm: str
    losses: list[float] = field(default_factory=list)
    validation: float = float("nan")
    seconds: float = 0.0
    failure: str = ""

    @property
    def final(self) -> float:
        return statistics.fmean(self.losses[-LAST:])


def train(name: str, arm: Arm, size: Size, text: Text, steps: int, learning_rate: float) -> Curve:
    """Train one arm from its seed. Losses are fetched at the end, so that no step waits for the host."""
    start = time.perf_counter()
    device = text.train.device
    model = build(size, device, torch.float32, arm.seed)
    for block in model.layers:
        block.compile(backend=arm.backend, options=arm.options, dynamic=False)
    optimizer = torch.optim.AdamW(decay_groups(model.parameters()), lr=learning_rate, betas=(0.9, 0.95), fused=True)
    step = step_of(model, optimizer, steps)
    batches = zip(range(steps), text.batches(size, arm.seed), strict=False)
    losses = [step(batch).detach() for _, batch in batches]
    # With gradients enabled, like the steps: nothing is compiled again.
    held_out = [loss_of(model, batch).detach() for batch in text.validation_batches(size)]
    validation = torch.stack(held_out).mean().item()
    return Curve(name, torch.stack(losses).tolist(), validation, time.perf_counter() - start)


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors do not."""
    known = list(parameters)
    decayed, other = ([p for p in known if (p.dim() >= 2) == matrix] for matrix in (True, False))
    return [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]


def step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """What trains ``model`` on a batch and returns its loss: clipped gradients, the rates of ``steps`` steps."""
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rates.step()
        return loss

    return step


def loss_of(model: Llama, batch: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        return model(*batch)


# --- results --------------------------------------------------------------------------------------------------------


def final_rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Final losses and their gaps to BF16's first seed (``None`` if that is missing)."""
    done = [curve for curve in curves if not curve.failure]
    base = next((curve for curve in done if curve.arm == BASELINE), None)
    return [
        {
            "arm": curve.arm,
            "train": curve.final,
            "train_gap": curve.final - base.final if base else None,
            "validation": curve.validation,
            "validation_gap": curve.validation - base.validation if base else None,
            "seconds": curve.seconds,
        }
        for curve in done
    ]


def table(curves: Sequence[Curve]) -> str:
    head = f"| {'arm':34} | train, last {LAST} | gap | validation | gap |\n|{'-' * 36}|---:|---:|---:|---:|\n"
    lines = []
    for row in final_rows(curves):
        train_gap, validation_gap = (
            "" if row[key] is None or row["arm"] == BASELINE else f"{row[key]:+.4f}"
            for key in ("train_gap", "validation_gap")
        )
        lines.append(
            f"| {ARMS[row['arm']].label:34} | {row['train']:.4f} | {train_gap} | {row['validation']:.4f} |"
            f" {validation_gap} |"
        )
    lines += [f"| {ARMS[curve.arm].label:34} | {curve.failure} |" for curve in curves if curve.failure]
    return head + "\n".join(lines)


def plot(path: Path, curves: Sequence[Curve], title: str) -> None:
    """All curves, smoothed over the raw ones; the last steps again, larger, in the free corner above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    inset = axes.inset_axes((0.42, 0.36, 0.56, 0.61))
    for curve in curves:
        arm, steps, smooth = ARMS[curve.arm], range(1, len(curve.losses) + 1), smoothed(curve.losses, 8)
        axes.plot(steps, curve.losses, color=arm.color, alpha=0.15, linewidth=0.7)
        axes.plot(steps, smooth, arm.style, color=arm.color, linewidth=1.4, label=arm.label)
        inset.plot(steps[-ZOOM:], smooth[-ZOOM:], arm.style, color=arm.color, linewidth=1.4)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.16), ncols=2, frameon=False, fontsize=8)
    inset.set_title(f"last {ZOOM} steps", fontsize=8)
    inset.tick_params(labelsize=7)
    for each in (axes, inset):
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def write_json(path: Path, size: Size, settings: dict[str, Any], curves: Sequence[Curve]) -> None:
    data = {
        "environment": environment(),
        "settings": {**asdict(size), "parameters": size.parameters, **settings},
        "final": final_rows(curves),
        "arms": {curve.arm: {"options": ARMS[curve.arm].options, **asdict(curve)} for curve in curves},
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--size", choices=SIZES, default="d768")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak; 5 %% warm-up, then a cosine")
    parser.add_argument("--text", type=Path, help="another text (default: the Shakespeare of the package)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("loss_curves.json"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("loss_curves: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    size = SIZES[given.size]
    if size.vocabulary < 256:
        print(f"loss_curves: size {size.name} has a vocabulary of {size.vocabulary}; bytes need 256", file=sys.stderr)
        return 2
    log = fresh_log(given.out)
    text = Text.read(given.text, torch.device(given.device))
    settings = {
        "steps": given.steps,
        "learning_rate": given.learning_rate,
        "text": str(given.text or "tinyshakespeare"),
    }
    curves: list[Curve] = []
    for name in given.arms:
        try:
            with quiet_stderr(log):
                curve = train(name, ARMS[name], size, text, given.steps, given.learning_rate)
        except Exception as error:
            curve = Curve(name, failure=failure(error, log, name))
        release()
        curves.append(curve)
        write_json(given.out, size, settings, curves)
        print(f"{name:12} {curve.failure or f'{curve.final:.4f} after {curve.seconds:.0f} s'}", flush=True)
    done = [curve for curve in curves if not curve.failure]
    if done:
        where = environment()
        plot(
            given.out.with_suffix(".png"),
            done,
            f"Llama, {size.parameters / 1e6:.0f} M parameters, {size.tokens} bytes per step; {where['card']},"
            f" torch {where['torch']}, {where['date']}",
        )
    print(f"\n{table(curves)}")
    return 0 if len(done) == len(curves) else 1


if __name__ == "__main__":
    sys.exit(main())
