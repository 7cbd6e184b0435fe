"""Do the errors of a 4-bit backward average out? The gradient's mean over many backward passes, against the exact one.

    python benchmarks/unbiasedness.py --out benchmarks/unbiasedness_cpu.json
    python benchmarks/unbiasedness.py --out /tmp/try.json --passes 16

A small Llama (model.py) is trained for a while on Shakespeare as bytes. Then the gradient of one batch is computed
again and again, with nothing changed but what is drawn. In all arms the forward is that of ``qcompile_quartet2`` (NVFP4
with 4/6), and the backward reads its codes; the exact gradient is that of a backward in high precision that reads the
same codes. Every operand of the backward is rotated in 128s with drawn signs. Where rounding is unbiased the squared
error of the mean over B passes falls as 1/B; where it is not, it stops at the square of the bias.

Writes the JSON file (settings, errors by arm and B) and the plot beside it (.png), and prints the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from loss_curves import Text
from measure import environment
from model import Size, build
from torch import Tensor, nn
from training_step import names_from

__all__ = ["ARMS", "MODEL", "Arm", "errors", "exact_gradient", "main", "passes", "trained"]

MODEL = Size("unbiased", 128, 1, 256, heads=4, kv_heads=4, sequence=64, batch=4, vocabulary=256)
TRAINED_STEPS = 100
ROTATED = "hadamard(128,signs=drawn)"


@dataclass(frozen=True)
class Arm:
    """How the operands of the backward are rounded, and how the curve is drawn."""

    label: str
    color: str
    quantizer: str

    @property
    def options(self) -> dict[str, Any]:
        again = f"{self.quantizer}; {ROTATED}"
        return {"gradient": self.quantizer, "dgrad_weight": again, "wgrad_activation": again}


ARMS: dict[str, Arm] = {
    "nearest": Arm("nearest", "tab:red", "e2m1 block16 e4m3"),
    "four_over_six": Arm("nearest, 4/6", "tab:orange", "e2m1 block16 e4m3_46"),
    "stochastic": Arm("stochastic", "tab:blue", "e2m1 block16 e4m3_guard stochastic"),
    "eden": Arm("MS-EDEN", "tab:green", "e2m1 block16 e4m3_eden eden"),
    "unguarded": Arm("stochastic, scales rounded below the maximum", "tab:cyan", "e2m1 block16 e4m3 stochastic"),
    "mxfp4": Arm("MXFP4, stochastic", "tab:purple", "e2m1 block32 e8m0_ceil stochastic"),
}
#: The backward in high precision, which reads what the forward read.
EXACT = {"gradient": "bf16", "dgrad_weight": None, "wgrad_activation": None}


def trained(size: Size = MODEL, steps: int = TRAINED_STEPS) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A float32 model in which gradients have the outliers that training makes, and a batch."""
    text = Text.read(None, torch.device("cpu"))
    model = build(size, torch.device("cpu"), torch.float32, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batches = text.batches(size, 0)
    for batch in islice(batches, steps):
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, next(batches)


def passes(model: nn.Module, batch: tuple[Tensor, Tensor], options: dict[str, Any], **kwargs: Any) -> Iterator[Tensor]:
    """The gradients of all weights of the blocks as one vector, pass by pass."""
    compiled = torch.compile(model, backend="qcompile_quartet2", options=options, **kwargs)
    weights = [p for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2]
    while True:
        yield torch.cat([g.flatten() for g in torch.autograd.grad(compiled(*batch), weights)])


def exact_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return next(passes(model, batch, EXACT))


def errors(gradients: Iterator[Tensor], exact: Tensor, count: int) -> dict[int, float]:
    """Relative squared error of the mean over B gradients, for B = 1, 2, 4 … ``count``."""
    total, found = torch.zeros_like(exact, dtype=torch.float64), {}
    for number, gradient in enumerate(islice(gradients, count), 1):
        total += gradient
        if number & (number - 1) == 0:
            found[number] = ((total / number - exact).norm() / exact.double().norm()).square().item()
    return found


def table(found: dict[str, dict[int, float]]) -> str:
    counts = list(next(iter(found.values())))
    lines = [f"| backward | {' | '.join(f'B = {b}' for b in counts)} | falls by |"]
    lines.append(f"|---|{'---:|' * (len(counts) + 1)}")
    for name, by_count in found.items():
        values = list(by_count.values())
        cells = " | ".join(f"{value:.2e}" for value in values)
        lines.append(f"| {ARMS[name].label} | {cells} | {values[0] / values[-1]:.0f} |")
    return "\n".join(lines)


def plot(path: Path, found: dict[str, dict[int, float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for name, by_count in found.items():
        counts, values = list(by_count), list(by_count.values())
        axes.loglog(counts, values, "o-", color=ARMS[name].color, label=ARMS[name].label, markersize=3)
    first = next(iter(found.get("eden", next(iter(found.values()))).values()))
    axes.loglog(counts, [first / b for b in counts], ":", color="0.5", label="1/B")
    axes.set_xlabel("backward passes B")
    axes.set_ylabel("relative squared error of the mean gradient")
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--passes", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("unbiasedness.json"))
    given = parser.parse_args(arguments)
    model, batch = trained()
    exact = exact_gradient(model, batch)
    found: dict[str, dict[int, float]] = {}
    for name in given.arms:
        torch.manual_seed(0)
        found[name] = errors(passes(model, batch, ARMS[name].options), exact, given.passes)
        data = {
            "environment": environment(),
            "settings": {**asdict(MODEL), "trained_steps": TRAINED_STEPS, "passes": given.passes},
            "arms": {name: {"quantizer": ARMS[name].quantizer, "errors": found[name]} for name in found},
        }
        given.out.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(f"{name:14} {found[name][1]:.2e} → {list(found[name].values())[-1]:.2e}", flush=True)
    plot(given.out.with_suffix(".png"), found)
    print(f"\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
