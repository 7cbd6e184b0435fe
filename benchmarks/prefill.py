"""Prefill of a Llama of 1.6 billion parameters: prompts of 512 tokens in, logits of the last token out.

    python benchmarks/prefill.py --out benchmarks/h200/prefill.csv           # batches 1, 2, 4, 8
    python benchmarks/prefill.py --batches 8 --out prefill_8.csv             # one process per batch: they compile alone

The shape is that of QuEST's serving table (arXiv 2502.05003, figure 6: 20 layers of width 2560, MLP 6912), where INT4
kernels on an RTX 4090 gain 1.4 to 1.8 over BF16. Weights are random and frozen (``TORCHINDUCTOR_FREEZING``), for all
arms: Inductor computes the codes of a weight once, when it compiles. CUDA graphs leave launches out of every arm.

Before an arm is timed, two layers compiled in its way must give nearly the logits of the same math in plain torch. How
nearly, plain torch says itself: random layers amplify the rounding of the last bit, and float32 logits of that math are
at a cosine of 0.93 from its bfloat16 ones. An arm may be twice as far; without quantization it is at 0.82.

Writes the CSV file after every arm and a plot beside it (.png).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._inductor.config
from measure import environment, failure, fresh_log, milliseconds, quiet_stderr, write_rows
from model import SIZES, Llama, Size, build
from torch import Tensor, nn
from training_step import in_plain_quest, names_from, release

__all__ = ["ARMS", "Arm", "Prefill", "Row", "main", "measure_batch"]

WIDE = Size("1.6B", 2560, 20, 6912, heads=20, kv_heads=20, sequence=512, batch=1)
#: Most distance (one less the cosine) from the plain math, as a multiple of what float32 changes in that.
FACTOR = 2
UNROTATED = {"activation": {"rotation": None}, "weight": {"rotation": None}}


@dataclass(frozen=True)
class Arm:
    """Backend, options, and what says the same in plain torch (none: not gated)."""

    backend: str
    options: dict[str, Any]
    plain: Callable[[nn.Module], nn.Module] | None = None


BASELINE = "bf16"
ARMS = {
    BASELINE: Arm("inductor", {}),
    "w4a4": Arm("qcompile_quest", {"bits": 4}, in_plain_quest),
    "w1a1": Arm("qcompile_quest", {"bits": 1}, partial(in_plain_quest, bits=1)),
    "w4a4_unrotated": Arm("qcompile_quest", {"bits": 4, **UNROTATED}, partial(in_plain_quest, block=1)),
}


class Prefill(nn.Module):
    """Logits ``[batch, vocabulary]`` of the token that follows each prompt, int64 ``[batch, sequence]``."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        model = self.model
        x = model.embedding(tokens)
        for block in model.layers:
            x = block(x, model.cosine, model.sine)
        return model.lm_head(model.norm(x[:, -1]))


@dataclass
class Row:
    """One arm at one batch. ``speedup``: BF16's time over this one; ``cosine``: of the gate."""

    arm: str
    batch: int
    status: str = "ok"
    median_ms: float = math.nan
    min_ms: float = math.nan
    speedup: float = math.nan
    cosine: float = math.nan


def model_of(size: Size, device: torch.device) -> Llama:
    return build(size, device, torch.bfloat16, seed=0).eval()


def compiled(arm: Arm, model: Prefill, cudagraphs: bool) -> Callable[[Tensor], Tensor]:
    torch._inductor.config.freezing = True
    options = {**arm.options, "triton.cudagraphs": cudagraphs}
    return torch.compile(model, backend=arm.backend, options=options, dynamic=False)


@torch.no_grad()
def gate(arm: Arm, size: Size, tokens: Tensor) -> float:
    """Mean cosine of two layers' logits with those of the plain math. Raises ``ValueError`` if they are wrong."""
    if arm.plain is None:
        return math.nan
    short = replace(size, layers=2)
    logits = compiled(arm, Prefill(model_of(short, tokens.device)), cudagraphs=False)(tokens).float()
    release()
    plain = Prefill(arm.plain(model_of(short, tokens.device)))  # type: ignore[arg-type]
    expected, exact = plain(tokens).float(), plain.float()(tokens)
    cosines = nn.functional.cosine_similarity(torch.stack((logits, exact)), expected, -1)
    cosine, usual = cosines.mean(-1).tolist()
    if not 1 - cosine <= FACTOR * (1 - usual):
        msg = f"logits have a cosine of {cosine:.3f} with those of the plain math, which float32 leaves at {usual:.3f}"
        raise ValueError(msg)
    return cosine


@torch.no_grad()
def measure(arm: Arm, size: Size, tokens: Tensor, repeats: int) -> dict[str, float]:
    cosine = gate(arm, size, tokens)
    run = compiled(arm, Prefill(model_of(size, tokens.device)), cudagraphs=tokens.is_cuda)
    call = partial(run, tokens)
    for _ in range(5):
        call()
    times = milliseconds(call, repeats, tokens.is_cuda)
    return {"median_ms": median(times), "min_ms": min(times), "cosine": cosine}


def measure_batch(size: Size, batch: int, arms: list[str], device: str, repeats: int, log: Path) -> Iterator[Row]:
    """A failing arm is one line, and the others go on."""
    shape = (batch, size.sequence)
    tokens = torch.randint(size.vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
    base = math.nan
    for arm in arms:
        row = Row(arm, batch)
        try:
            with quiet_stderr(log):
                figures = measure(ARMS[arm], size, tokens, repeats)
            base = figures["median_ms"] if arm == BASELINE else base
            row = Row(arm, batch, speedup=base / figures["median_ms"], **figures)
        except Exception as error:
            row.status = failure(error, log, f"{arm}, batch {batch}")
        release()
        yield row


def plot(path: Path, rows: list[Row]) -> None:
    """Time over batch size, and speedup beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for arm in dict.fromkeys(row.arm for row in rows):
        points = [row for row in rows if row.arm == arm and row.status == "ok"]
        left.plot([r.batch for r in points], [r.median_ms for r in points], "o-", label=arm)
        right.plot([r.batch for r in points], [r.speedup for r in points], "o-", label=arm)
    left.set(xlabel="prompts of 512 tokens", ylabel="milliseconds (median)")
    right.set(xlabel="prompts of 512 tokens", ylabel="times BF16")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    where = environment()
    figure.suptitle(f"{where['card']}, torch {where['torch']}, {where['date']}", fontsize=9)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=lambda s: [int(n) for n in s.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(ARMS), help=", ".join(ARMS))
    parser.add_argument("--size", choices=SIZES, help="a smaller model, to try the script out")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("prefill.csv"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("prefill: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    size = SIZES[given.size] if given.size else WIDE
    log = fresh_log(given.out)
    rows: list[Row] = []
    for batch in given.batches:
        for row in measure_batch(size, batch, given.arms, given.device, given.repeats, log):
            rows.append(row)
            write_rows(given.out, rows)
            print(f"{row.arm:16} {row.batch:3} {row.median_ms:9.3f} ms {row.speedup:6.3f} {row.status}", flush=True)
    plot(given.out.with_suffix(".png"), rows)
    return 0 if all(row.status == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
