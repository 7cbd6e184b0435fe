"""What eight bits in the optimizer and between two GPUs do to training: losses on real text, step by step.

    python benchmarks/eight_bit_curves.py --write-tokens tokens.npz.xz --tokenizer bpe4k.json.xz \\
        --train a.txt.xz b.txt.xz --validation c.txt.xz                               # once, on any machine
    python benchmarks/eight_bit_curves.py --tokens tokens.npz.xz --out benchmarks/h200/eight_bit_curves.json
    python benchmarks/eight_bit_curves.py --device cpu --size tiny --steps 20 --out /tmp/try.json

A Llama (model.py, 30 million parameters in blocks) is trained with the same seed and batches in all arms. Blocks are
compiled by Inductor and run in BF16 under autocast, from float32 residuals: what is compared is the optimizer and the
gradients, so nothing else is quantized. Arms of two ranks are sharded by FSDP2 and take half of every batch each.
``fp32_two`` computes what ``fp32`` does and rounds sums elsewhere: its gap is the noise that gaps are read against.

The last two arms are to fail. They are float32 AdamW whose numbers are rounded after every step as storage would.

An arm is a process of its own, or two; those of one rank run side by side, one per GPU. The JSON file is written after
each, and arms that it has are not run again. An arm that is stopped by ``--limit`` keeps the losses it has.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from loss_curves import Text, decay_groups, loss_of, step_of, windows
from measure import (
    add_worker_arguments,
    answer,
    brief,
    environment,
    fresh_log,
    in_fresh_process,
    mark,
    milliseconds_between,
    side_by_side,
)
from model import SIZES, Size, build
from torch import Tensor, nn
from training_step import names_from

from qcompile.apps.demo import smoothed

__all__ = [
    "ARMS",
    "COSTS",
    "Arm",
    "Batch",
    "Curve",
    "Tokens",
    "curve_of_process",
    "gap",
    "in_order",
    "longest",
    "main",
    "plot",
    "read_json",
    "rows_of",
    "run_arms",
    "run_steps",
    "settings_of",
    "table",
    "table_head",
    "title_of",
    "train",
    "write_json",
]

FP32, BF16 = torch.float32, torch.bfloat16
LAST = 100  # steps that the final training loss is the mean of
HELD_OUT = 64  # batches at most
REPORT = 200  # steps after which a worker writes down what it has
WARM_UP = 20  # steps that the time per step leaves out
MODEL = "d640"
TOKENS = 85e6

Optimizer = Callable[[list[dict[str, Any]], float, tuple[float, float]], torch.optim.Optimizer]
#: A state's name, or "parameter", and what its numbers become when they are stored.
Storage = dict[str, Callable[[Tensor], Tensor]]
#: Tokens and those that follow them, int32 ``[windows, sequence]`` each.
Batch = tuple[Tensor, Tensor]


def in_bf16(x: Tensor) -> Tensor:
    return x.to(BF16)


def in_e4m3(x: Tensor) -> Tensor:
    """Rounded to nearest in blocks of 128 with one float32 scale each, the last one short."""
    padded = nn.functional.pad(x.flatten(), (0, -x.numel() % 128)).view(-1, 128)
    scale = padded.amax(1, keepdim=True).clamp(min=1e-38) / 448
    codes = (padded / scale).to(torch.float8_e4m3fn)
    return (codes.float() * scale).flatten()[: x.numel()].view_as(x)


def torchs(storage: Storage | None = None) -> Optimizer:
    """Float32 AdamW, its numbers rounded to what ``storage`` holds after every step."""

    def make(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

        @torch.no_grad()
        def round_all(*_: object) -> None:
            for parameter, state in optimizer.state.items():
                for name, rounded in (storage or {}).items():
                    target = parameter if name == "parameter" else state[name]
                    target.copy_(rounded(target))

        if storage:
            round_all()
            optimizer.register_step_post_hook(round_all)
        return optimizer

    return make


def ours(**options: Any) -> Optimizer:
    def make(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        from qcompile.optim import AdamW

        return AdamW(groups, lr=lr, betas=betas, **options)

    return make


class Drawn(Protocol):
    """What tables and plots want to know of an arm."""

    label: str
    color: str
    style: str


@dataclass(frozen=True)
class Arm:
    """``parameters``: their dtype, gradients' too. ``fp8``: gradients travel as FP8 codes."""

    label: str
    color: str
    optimizer: Optimizer = field(default_factory=torchs, repr=False)
    parameters: torch.dtype = FP32
    ranks: int = 1
    fp8: bool = False
    style: str = "-"


BASELINE = "fp32"
ARMS: dict[str, Arm] = {
    BASELINE: Arm("FP32 states, FP32 gradients", "black"),
    "states": Arm("8-bit states", "tab:blue", ours()),
    "fp32_two": Arm("the baseline on two ranks", "0.6", ranks=2, style="--"),
    "gradients": Arm("FP8 gradients, two ranks", "tab:green", ranks=2, fp8=True),
    "both": Arm("8-bit states, FP8 gradients, two ranks", "tab:purple", ours(), ranks=2, fp8=True),
    "bf16_nearest": Arm(
        "BF16 parameters and states, to nearest",
        "tab:red",
        torchs({"parameter": in_bf16, "exp_avg": in_bf16, "exp_avg_sq": in_bf16}),
    ),
    "e4m3_second": Arm("second moment in E4M3, to nearest", "tab:orange", torchs({"exp_avg_sq": in_e4m3})),
    "states_bf16": Arm("8-bit states, BF16 parameters, stochastic", "tab:cyan", ours(), parameters=BF16),
    "fp8-lm": Arm("states as FP8-LM's", "tab:brown", ours(states="fp8-lm"), parameters=BF16),
}


# --- text -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Int32 ``[n]`` each: to train on, and held out."""

    train: Tensor
    validation: Tensor

    @staticmethod
    def read(path: Path | None, device: torch.device) -> Tokens:
        """What :func:`write_tokens` wrote (.npz.xz); or a text as bytes, the package's Shakespeare if there is no path,
        the last tenth held out.
        """
        if path is None or not path.name.endswith(".npz.xz"):
            text = Text.read(path, device)
            return Tokens(text.train.int(), text.validation.int())
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as found:
            return Tokens(
                *(torch.from_numpy(found[name].astype(np.int32)).to(device) for name in ("train", "validation"))
            )

    @property
    def vocabulary(self) -> int:
        """One more than the largest token, up to a multiple of 128."""
        return -(-(int(self.train.max()) + 1) // 128) * 128

    def batches(self, size: Size, steps: int, rank: int, ranks: int) -> Iterator[Batch]:
        """This rank's part of random windows, the same for everybody."""
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(len(self.train) - size.sequence, (steps, size.batch), generator=generator)
        for of_step in starts.to(self.train.device):
            yield windows(self.train, of_step[rank::ranks], size)

    def held_out(self, size: Size, rank: int, ranks: int) -> Iterator[Batch]:
        """The same evenly spread windows for everybody, at most HELD_OUT batches; none overlaps another."""
        count = min(len(self.validation) // (size.sequence + 1) // size.batch, HELD_OUT) * size.batch
        starts = torch.linspace(0, len(self.validation) - size.sequence - 1, count).long()
        for chunk in starts.to(self.validation.device).split(size.batch):
            yield windows(self.validation, chunk[rank::ranks], size)


def write_tokens(path: Path, tokenizer: Path, train: list[Path], validation: list[Path]) -> None:
    from tokenizers import Tokenizer

    coder = Tokenizer.from_str(_text(tokenizer))

    def encoded(paths: list[Path]) -> np.ndarray:
        lines = [line for path in paths for line in _text(path).splitlines(keepends=True)]
        return np.concatenate(
            [np.array(e.ids, np.uint16) for e in coder.encode_batch_fast(lines, add_special_tokens=False)]
        )

    content = io.BytesIO()
    np.savez(content, train=encoded(train), validation=encoded(validation))
    path.write_bytes(lzma.compress(content.getvalue(), preset=6))


def _text(path: Path) -> str:
    return (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8").read()


# --- an arm ---------------------------------------------------------------------------------------------------------


#: Headers of :attr:`Curve.costs`.
COSTS = ("ms per step", "first step, s", "peak GiB")


def table_head(headers: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table of arms: their names, and numbers under ``headers``."""
    return [f"| arm | {' | '.join(headers)} |", f"|---|{'---:|' * len(headers)}"]


@dataclass
class Curve:
    """What one arm produced; losses in nats per token. What was not measured is ``None``.

    Attributes:
        seconds: of the arm, from beginning to end.
        step_ms: median of the steps after the first WARM_UP.
        first_step_s: of the first step, which compiles, or reads what another process has compiled.
        memory_gib: the most that tensors took of the card in any later step.
        jobs: how many arms shared its card.
    """

    losses: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    seconds: float = 0.0
    step_ms: float | None = None
    sent_mb: float = 0.0
    jobs: int = 1
    fault: str = ""
    first_step_s: float | None = None
    memory_gib: float | None = None

    @property
    def costs(self) -> list[str]:
        """What the arm took, for a table. Times say nothing of an arm that shared the card and the processor."""
        times = [(self.step_ms, ".1f"), (self.first_step_s, ".1f")]
        texts = ["" if value is None else f"{value:{form}}" for value, form in (*times, (self.memory_gib, ".2f"))]
        return ["side by side"] * len(times) + texts[len(times) :] if self.jobs > 1 else texts

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> Curve:
        """Raises ``TypeError`` for what is not in the data of a curve, or is no list of numbers where there is one."""
        curve = Curve(**data)
        for losses in (curve.losses, curve.validation):
            if not isinstance(losses, list) or not all(isinstance(loss, (int, float)) for loss in losses):
                msg = f"losses are a list of numbers, got {losses!r:.40}"
                raise TypeError(msg)
        return curve


def run_steps(
    step: Callable[[Batch], Tensor],
    held_out: Callable[[Batch], Tensor],
    tokens: Tokens,
    size: Size,
    steps: int,
    report: Callable[[Curve], None] = lambda curve: None,
    rank: int = 0,
    ranks: int = 1,
    every: int = REPORT,
) -> Curve:
    """Losses of ``step``, which trains on a batch, and then of ``held_out``, each of this rank's part of the batches.

    They are fetched, and the curve so far reported, after ``every`` so many steps: the other steps do not wait for the
    host.
    """
    start = time.perf_counter()
    cuda = tokens.train.is_cuda
    curve, fresh, marks = Curve(), list[Tensor](), [mark(cuda)]
    for number, batch in enumerate(tokens.batches(size, steps, rank, ranks), 1):
        fresh.append(step(batch).detach())
        marks.append(mark(cuda))
        if number == 1:
            curve.first_step_s = 1e-3 * milliseconds_between(marks, cuda)[0]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
        if number % every == 0 or number == steps:
            curve.losses += _mean_of_ranks(fresh, ranks)
            fresh.clear()
            curve.seconds = time.perf_counter() - start
            if late := milliseconds_between(marks, cuda)[WARM_UP:]:
                curve.step_ms = statistics.median(late)
            if cuda:
                curve.memory_gib = torch.cuda.max_memory_allocated() / 2**30
            report(curve)
    # With gradients enabled, like the steps: nothing is compiled again.
    curve.validation = _mean_of_ranks([held_out(batch).detach() for batch in tokens.held_out(size, rank, ranks)], ranks)
    curve.seconds = time.perf_counter() - start
    return curve


def train(
    arm: Arm,
    size: Size,
    tokens: Tokens,
    steps: int,
    lr: float,
    beta2: float,
    rank: int = 0,
    backend: str = "inductor",
    report: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train one arm."""
    device = tokens.train.device
    model = build(size, device, arm.parameters, seed=0)
    # Residuals are float32 whatever the parameters are, so that arms differ in what they are about.
    model.embedding.register_forward_hook(lambda module, arguments, output: output.float())
    for block in model.layers:
        block.compile(backend=backend, dynamic=False)
    traffic = None
    if arm.ranks > 1:
        traffic = _shard(model, device, arm)
    optimizer = arm.optimizer(decay_groups(model.parameters()), lr, (0.9, beta2))
    step = step_of(model, optimizer, steps)
    curve = run_steps(step, partial(loss_of, model), tokens, size, steps, report, rank, arm.ranks)
    curve.sent_mb = traffic.bytes / steps / 1e6 if traffic else 0.0
    return curve


def _shard(model: nn.Module, device: torch.device, arm: Arm) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from qcompile.distributed import fp8_gradients

    mesh = init_device_mesh(device.type, (arm.ranks,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return fp8_gradients(model) if arm.fp8 else None


def _mean_of_ranks(losses: list[Tensor], ranks: int) -> list[float]:
    stacked = torch.stack(losses)
    if ranks > 1:
        dist.all_reduce(stacked)
    return (stacked / ranks).tolist()


def work(given: argparse.Namespace) -> dict[str, Any]:
    """In a worker; the first rank of two starts the other one."""
    arm, second = ARMS[given.worker], None
    cuda = given.device != "cpu"
    if arm.ranks > 1 and given.rank == 0:
        second = subprocess.Popen([sys.executable, *sys.argv, "--rank", "1"])
    device = torch.device("cuda", given.rank if arm.ranks > 1 else given.card) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if arm.ranks > 1:
        where = f"file://{given.scratch / 'meet'}"
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, where, rank=given.rank, world_size=arm.ranks, device_id=device if cuda else None
        )

    def report(curve: Curve) -> None:
        if given.rank == 0:
            (given.scratch / "part.json").write_text(json.dumps(asdict(curve)))

    tokens = Tokens.read(given.tokens, device)
    size = replace(SIZES[given.size], vocabulary=tokens.vocabulary)
    backend = "inductor" if cuda else "eager"
    curve = train(arm, size, tokens, given.steps, given.lr, given.beta2, given.rank, backend, report)
    if arm.ranks > 1:
        dist.destroy_process_group()
    if second is not None and second.wait():
        msg = "the second rank failed"
        raise RuntimeError(msg)
    return asdict(curve)


def measured(name: str, card: int, limit: float, given: argparse.Namespace, log: Path) -> Curve:
    """The curve of an arm that runs in processes of its own, whole or as far as it came."""
    arguments = [
        f"--{key.replace('_', '-')}={value}" for key in (*SETTINGS, "device", "out") if (value := getattr(given, key))
    ]
    return curve_of_process(Path(__file__), name, [*arguments, "--card", str(card)], limit, log)


def curve_of_process(script: Path, name: str, arguments: list[str], limit: float, log: Path, jobs: int = 1) -> Curve:
    """What a worker of ``script`` returned, or what it had written to ``part.json`` when it failed or was stopped; its
    seconds are those of the process.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        part = Path(scratch) / "part.json"
        try:
            found = in_fresh_process(script, name, arguments, limit, Path(scratch), log, jobs)
        except (RuntimeError, TimeoutError) as error:
            found = {**(json.loads(part.read_text()) if part.exists() else {}), "fault": brief(error)}
    return Curve(**{**found, "seconds": time.monotonic() - start, "jobs": jobs})


def longest(curves: Mapping[str, Curve], jobs: int) -> float:
    """Seconds of the longest complete arm that shared its card by as many, or of any if none did."""
    done = [curve for curve in curves.values() if not curve.fault]
    alike = [curve for curve in done if curve.jobs == jobs]
    return max((curve.seconds for curve in alike or done), default=0.0)


def in_order(curves: Mapping[str, Curve], arms: Mapping[str, Any]) -> dict[str, Curve]:
    return {name: curves[name] for name in arms if name in curves}


def run_arms(
    names: Sequence[str],
    curves: dict[str, Curve],
    measured: Callable[[str, float], Curve],
    keep: Callable[[], None],
    *,
    limit: float,
    deadline: float,
    at_once: int,
    jobs: int,
) -> None:
    """Put the curves of arms into ``curves``, ``at_once`` at a time, and call ``keep`` after each.

    ``measured(name, seconds)`` waits for a worker. An arm is stopped after ``limit`` seconds and at ``deadline`` of the
    monotonic clock, and is not begun if the longest so far would not end by then (:func:`longest`, with ``jobs``).
    """
    one = Lock()

    def run(name: str) -> None:
        with one:
            left, needed = deadline - time.monotonic(), longest(curves, jobs)
        if left <= needed:
            print(f"{name:16} not begun: {left:.0f} s are left, the longest arm took {needed:.0f}", flush=True)
            return
        curve = measured(name, min(limit, left))
        with one:
            curves[name] = curve
            keep()
        print(f"{name:16} {len(curve.losses)} steps in {curve.seconds:.0f} s {curve.fault}", flush=True)

    side_by_side(run, names, at_once)


# --- results --------------------------------------------------------------------------------------------------------


def gap(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of paired differences in nats, and its standard error as if they were independent; infinite and unknown if
    one of them is not finite: training diverged.
    """
    differences = [a - b for a, b in zip(losses, base, strict=True)]
    if not all(map(math.isfinite, differences)):
        return math.inf, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return statistics.fmean(differences), error


def percent_gap(losses: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """:func:`gap` in percent of the base."""
    scale = 100 / statistics.fmean(base)
    mean, error = gap(losses, base)
    return mean * scale, error * scale


def rows_of(curves: dict[str, Curve], baseline: str = BASELINE) -> list[dict[str, Any]]:
    """Final losses and paired gaps to the baseline: at the last steps that both have, and on the held-out text."""
    base = curves.get(baseline, Curve())
    found = []
    for name, curve in curves.items():
        row: dict[str, Any] = {"arm": name, "steps": len(curve.losses), "fault": curve.fault}
        if curve.losses:
            row["train"] = statistics.fmean(curve.losses[-LAST:])
        if both := min(len(curve.losses), len(base.losses)):
            last = slice(max(0, both - LAST), both)
            row["train_gap"], row["train_error"] = percent_gap(curve.losses[last], base.losses[last])
        if curve.validation:
            row["validation"] = statistics.fmean(curve.validation)
            if base.validation:
                row["validation_gap"], row["validation_error"] = percent_gap(curve.validation, base.validation)
        found.append(row)
    return found


def table(curves: dict[str, Curve], arms: Mapping[str, Drawn] = ARMS) -> str:
    """Markdown; the first of ``arms`` is the baseline."""
    headers = ["steps", f"train, last {LAST}", "gap, %", "validation", "gap, %", *COSTS, "s"]
    lines = table_head(headers)
    for row in rows_of(curves, next(iter(arms))):
        curve = curves[row["arm"]]
        cells = [
            f"{row[key]:{form}}" + (f" ± {row[error]:.3f}" if error else "") if key in row else ""
            for key, form, error in (
                ("train", ".4f", ""),
                ("train_gap", "+.3f", "train_error"),
                ("validation", ".4f", ""),
                ("validation_gap", "+.3f", "validation_error"),
            )
        ]
        label = arms[row["arm"]].label + (f" ({row['fault']})" if row["fault"] else "")
        cells += curve.costs
        lines.append(f"| {label} | {row['steps']} | {' | '.join(cells)} | {curve.seconds:.0f} |")
    return "\n".join(lines)


def plot(path: Path, curves: dict[str, Curve], title: str, arms: Mapping[str, Drawn] = ARMS) -> None:
    """Losses above, smoothed; below, the paired gap in percent to the baseline, the first of ``arms``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    baseline = next(iter(arms))
    base = curves.get(baseline, Curve()).losses
    for name, curve in curves.items():
        arm, steps = arms[name], range(1, len(curve.losses) + 1)
        above.plot(steps, smoothed(curve.losses, 32), arm.style, color=arm.color, linewidth=1.2, label=arm.label)
        if base and name != baseline:
            gaps = [100 * (a - b) / b for a, b in zip(curve.losses, base, strict=False)]
            below.plot(range(1, len(gaps) + 1), smoothed(gaps, 64), arm.style, color=arm.color, linewidth=1.2)
    above.set_ylabel("training loss (nats per token)")
    above.set_title(title, fontsize=9, loc="left")
    above.legend(frameon=False, fontsize=8)
    below.set_ylabel("gap to the baseline on the same batch, %")
    below.set_xlabel("step")
    below.set_ylim(-1, 3)
    below.axhspan(-0.1, 0.1, color="0.9")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


#: What a file of curves was made with: arms are added to it only if they were made with the same.
SETTINGS = ("size", "steps", "lr", "beta2", "tokens")


def settings_of(given: argparse.Namespace, names: Sequence[str] = SETTINGS) -> dict[str, Any]:
    found = {name: getattr(given, name) for name in names}
    return {**found, "tokens": given.tokens.name if given.tokens else "tinyshakespeare as bytes"}


def read_json(path: Path, settings: dict[str, Any], complete: bool = True) -> dict[str, Curve]:
    """Curves of an earlier call, the complete ones or all. Raises ``ValueError`` if it had other settings, and for what
    is no file of curves.
    """
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        made_with = dict(data["settings"])
        curves = {name: Curve.from_data(curve) for name, curve in data["arms"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} is damaged, or no file of curves ({brief(error)}); restore it, or give another --out"
        raise ValueError(msg) from None
    for name, value in settings.items():
        if made_with.get(name) != value:
            msg = f"{path} was made with {name}={made_with.get(name)}, not {value}; give another --out"
            raise ValueError(msg)
    return {name: curve for name, curve in curves.items() if not (complete and curve.fault)}


def write_json(path: Path, settings: dict[str, Any], curves: dict[str, Curve], **found: Any) -> None:
    """``found``: what the curves say. A call that is killed leaves the file as it was or as it becomes."""
    size = SIZES[settings["size"]]
    arms = {name: _data_of(curve) for name, curve in curves.items()}
    data = {
        "environment": environment(),
        "settings": {**settings, "tokens_per_step": size.tokens, "block_weights": size.block_weights},
        **found,
        "arms": arms,
    }
    new = path.with_suffix(".new")
    new.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def _data_of(curve: Curve) -> dict[str, Any]:
    """What is known of a curve: nothing about what was not measured."""
    data = {**asdict(curve), "losses": [round(loss, 5) for loss in curve.losses]}
    return {key: value for key, value in data.items() if value is not None}


def title_of(size: Size) -> str:
    where = environment()
    return (
        f"Llama, {size.block_weights / 1e6:.1f} M parameters in blocks, {size.tokens} tokens per step;"
        f" {where['card']}, torch {where['torch']}, {where['date']}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = [name for name in ARMS if name not in ("states_bf16", "fp8-lm")]
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=default, help=f"of {', '.join(ARMS)}")
    parser.add_argument("--tokens", type=Path, help="what --write-tokens wrote (default: Shakespeare as bytes)")
    parser.add_argument("--size", choices=SIZES, default=MODEL)
    parser.add_argument("--steps", type=int, help=f"by default {TOKENS / 1e6:.0f} million tokens")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; 5 %% warm-up, then a cosine down to a tenth")
    parser.add_argument("--beta2", type=float, default=0.95)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=float, default=120, help="seconds per arm")
    parser.add_argument("--total", type=float, default=420, help="seconds that this call may take")
    parser.add_argument("--out", type=Path, default=Path("eight_bit_curves.json"))
    parser.add_argument("--write-tokens", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--train", type=Path, nargs="+")
    parser.add_argument("--validation", type=Path, nargs="+")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--card", type=int, default=0, help=argparse.SUPPRESS)
    add_worker_arguments(parser)
    given = parser.parse_args(arguments)
    if given.steps is None:
        given.steps = round(TOKENS / SIZES[given.size].tokens)
    if given.steps < 1:
        parser.error(f"--steps must be at least 1, got {given.steps}")
    if given.write_tokens:
        write_tokens(given.write_tokens, given.tokenizer, given.train, given.validation)
        return 0
    if given.worker:
        return answer(given, lambda: work(given)) if given.rank == 0 else work(given) is None
    cards = torch.cuda.device_count() if given.device == "cuda" else 2
    if not cards:
        print("eight_bit_curves: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    settings = settings_of(given)
    try:
        curves = read_json(given.out, settings)
    except ValueError as error:
        print(f"eight_bit_curves: {error}", file=sys.stderr)
        return 2
    log = fresh_log(given.out)
    deadline = time.monotonic() + given.total

    def keep() -> None:
        ordered = in_order(curves, ARMS)
        write_json(given.out, settings, ordered, final=rows_of(ordered))

    missing = [name for name in given.arms if name not in curves]
    for ranks, at_once in ((1, cards), (2, 1)):
        free = list(range(at_once))

        def on_a_card(name: str, limit: float, free: list[int] = free) -> Curve:
            card = free.pop()
            curve = measured(name, card, limit, given, log)
            free.append(card)
            return curve

        names = [name for name in missing if ARMS[name].ranks == ranks]
        run_arms(names, curves, on_a_card, keep, limit=given.limit, deadline=deadline, at_once=at_once, jobs=1)
    curves = in_order(curves, ARMS)
    if curves:
        plot(given.out.with_suffix(".png"), curves, title_of(SIZES[given.size]))
    print(f"\n{table(curves)}")
    return 0 if all(name in curves and not curves[name].fault for name in given.arms) else 1


if __name__ == "__main__":
    sys.exit(main())
