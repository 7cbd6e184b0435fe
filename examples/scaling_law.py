"""A scaling law for low-precision training: what a parameter of P bits is worth, in parameters of 16 bits.

    python examples/scaling_law.py train --out runs.csv --text my_text.txt    # sizes × bits × tokens, resumable
    python examples/scaling_law.py train --out runs.csv --bits 16 4 fp4 --tokens 40e6 85e6 --seconds 540 --jobs 6
    python examples/scaling_law.py fit runs.csv                               # default: the runs QuEST published

The law is L(N, D, P) = A / (N·eff(P))^a + B / D^b + E (QuEST, arXiv 2502.05003): N parameters outside embedding and
head, D training tokens, loss L in nats per token, and one factor eff for every way to train, 1 for 16 bits by
definition. A model's weights take N·P bits, so eff(P)/P is what a bit is worth; 16·eff(P)/P compares it with BF16.

A few dozen runs determine ``eff`` and the predicted losses. They do not determine the constants: A, a and E trade
against each other, as do B and b, and in the published runs E cannot be told from 0, which no text has. Read the law
as an interpolation.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from itertools import product
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qcompile.apps import demo

PUBLISHED = Path(__file__).parent / "data" / "quest_losses.csv"
#: eff by setting, of QuEST's plotting notebook.
PUBLISHED_EFF = {
    "BF16": 1.0,
    **{"W8A8": 1.0162, "W4A4": 0.6918, "W3A3": 0.4331, "W2A2": 0.1519, "W1A1": 0.0205},
    **{"FP4": 0.6296, "INT4 4:8": 0.3812},
    **{"W4A16": 0.8404, "W3A16": 0.6531, "W2A16": 0.4137, "W1A16": 0.1384},
    **{
        "no-HT W8A8": 0.9376,
        "no-HT W4A4": 0.6033,
        "no-HT W3A3": 0.3221,
        "no-HT W2A2": 0.0784,
        "no-HT W1A1": 0.0156,
    },
}


@dataclass(frozen=True)
class Run:
    """A finished training run, one row of a CSV file. ``bits`` is the width P, NaN (an empty field) if unknown."""

    setting: str
    bits: float
    parameters: float
    tokens: float
    loss: float


COLUMNS = [field.name for field in fields(Run)]


def read_runs(path: Path) -> list[Run]:
    """The rows of a CSV file with the columns of :class:`Run`; others are ignored. Raises ``ValueError``."""
    runs = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            msg = f"{path} has no column {', '.join(missing)}; needed: {', '.join(COLUMNS)}"
            raise ValueError(msg)
        for row in reader:
            try:
                run = Run(row["setting"], *(float(row[name] or "nan") for name in COLUMNS[1:]))
            except ValueError as error:
                msg = f"{path}, line {reader.line_num}: {error}"
                raise ValueError(msg) from None
            for name in ("parameters", "tokens", "loss"):
                if not 0 < getattr(run, name) < math.inf:
                    msg = f"{path}, line {reader.line_num}: {name} must be a positive number, got {row[name]!r}"
                    raise ValueError(msg)
            runs.append(run)
    return runs


# --- the fit --------------------------------------------------------------------------------------------------------

HUBER = 1e-3  # residual of log loss from which on it counts linearly (arXiv 2203.15556, appendix D.3)
SHORT, LONG = 8, 1000  # L-BFGS iterations from every start, and from where the best FINALISTS of them have led
FINALISTS = 6


@dataclass(frozen=True)
class Law:
    """The fitted constants, for N in parameters, D in tokens and losses in nats."""

    A: float
    a: float
    B: float
    b: float
    E: float
    eff: dict[str, float]

    def loss(self, run: Run) -> float:
        """What the law predicts for the run's setting, size and tokens."""
        return self.A / (run.parameters * self.eff[run.setting]) ** self.a + self.B / run.tokens**self.b + self.E


class Problem:
    """Huber loss of log(predicted / measured) as a function of θ = (a, log B, b, log E, log A of every setting).

    With an A for each setting (A / eff^a), the logarithms of the law's three terms are linear in θ, and log L is the
    ``logsumexp`` of ``design @ θ``. N and D are taken relative to their geometric means, lest A move with a.

    Raises ``ValueError`` if the runs cannot determine the law.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        baseline = {run.setting for run in runs if run.bits == 16}
        if len(baseline) != 1:
            found = ", ".join(sorted(baseline)) or "none"
            msg = f"eff is relative to the one setting whose bits are 16; found: {found}"
            raise ValueError(msg)
        self.settings = [*baseline, *dict.fromkeys(run.setting for run in runs if run.setting not in baseline)]
        constants = 4 + len(self.settings)
        if len(runs) <= constants or len({run.parameters for run in runs}) < 2 or len({run.tokens for run in runs}) < 2:
            msg = f"{len(runs)} runs do not determine {constants} constants: train more, of several sizes and lengths"
            raise ValueError(msg)
        values = torch.tensor([[run.parameters, run.tokens, run.loss] for run in runs], dtype=torch.float64)
        size, length, self.target = values.log().unbind(1)
        self.center = size.mean(), length.mean()
        own = torch.tensor([self.settings.index(run.setting) for run in runs])
        self.design = torch.zeros(3, len(runs), constants, dtype=torch.float64)  # term, run, θ
        self.design[0, :, 0] = self.center[0] - size
        self.design[0, torch.arange(len(runs)), 4 + own] = 1
        self.design[1, :, 1] = 1
        self.design[1, :, 2] = self.center[1] - length
        self.design[2, :, 3] = 1

    def predict(self, theta: Tensor) -> Tensor:
        """Log loss of every run, ``[..., runs]`` for θ ``[..., constants]``."""
        terms = nn.functional.linear(theta, self.design.flatten(0, 1))
        return terms.unflatten(-1, (3, -1)).logsumexp(-2)

    def objective(self, theta: Tensor, target: Tensor | None = None) -> Tensor:
        """Sum over the runs, ``[...]``; ``target`` replaces the measured log losses."""
        excess = self.predict(theta) - (self.target if target is None else target)
        return nn.functional.huber_loss(excess, torch.zeros_like(excess), delta=HUBER, reduction="none").sum(-1)

    def recentered(self, theta: Tensor, sign: int) -> Tensor:
        """θ for raw N and D (sign 1) from θ for relative ones, or back (sign -1)."""
        theta = theta.clone()
        theta[..., 4:] += sign * theta[..., :1] * self.center[0]
        theta[..., 1] += sign * theta[..., 2] * self.center[1]
        return theta

    def law(self, theta: Tensor) -> Law:
        a, log_b, b, log_e, *log_a = self.recentered(theta, 1).tolist()
        eff = {setting: math.exp((log_a[0] - own) / a) for setting, own in zip(self.settings, log_a, strict=True)}
        return Law(math.exp(log_a[0]), a, math.exp(log_b), b, math.exp(log_e), eff)

    def starts(self) -> Tensor:
        """θ ``[125, constants]``: of the 4500 starts of arXiv 2203.15556, the best (A, B) for each (a, b, E).

        The 36 that share exponents and E differ by two factors, which are what L-BFGS gets right first.
        """
        exponents, scales = (0.0, 0.5, 1.0, 1.5, 2.0), range(0, 30, 5)
        best = []
        for a, b, log_e in product(exponents, exponents, (-1.0, -0.5, 0.0, 0.5, 1.0)):
            rows = [[a, log_b, b, log_e] + [log_a] * len(self.settings) for log_a, log_b in product(scales, scales)]
            grid = self.recentered(torch.tensor(rows, dtype=torch.float64), -1)
            best.append(grid[self.objective(grid).argmin()])
        return torch.stack(best)

    def descend(self, start: Tensor, iterations: int, target: Tensor | None = None) -> Tensor:
        """θ after at most so many iterations of L-BFGS; never worse than the start."""
        theta = start.clone().requires_grad_()
        # This Huber loss is next to an absolute value and full of kinks; a history longer than θ gets over them.
        optimizer = torch.optim.LBFGS(
            [theta], max_iter=iterations, max_eval=2 * iterations, history_size=50, line_search_fn="strong_wolfe",
            tolerance_grad=1e-9, tolerance_change=1e-10,
        )  # fmt: skip

        def evaluate() -> Tensor:
            theta.grad = None
            value = self.objective(theta, target) / HUBER**2  # the tolerances are for numbers around 1
            value.backward()
            return value

        optimizer.step(evaluate)
        end = theta.detach()
        return end if self.objective(end, target) <= self.objective(start, target) else start

    def fit(self) -> Tensor:
        """θ of the least objective that the starts lead to."""
        reached = torch.stack([self.descend(start, SHORT) for start in self.starts()])
        finalists = reached[self.objective(reached).argsort()[:FINALISTS]]
        ends = torch.stack([self.descend(theta, LONG) for theta in finalists])
        return ends[self.objective(ends).argmin()]

    def bootstrap(self, theta: Tensor, replicates: int, seed: int) -> list[Law]:
        """Laws fitted to predictions of ``theta`` plus residuals drawn from all runs with replacement.

        Fitted residuals are too small by the degrees of freedom that the fit took, so they are enlarged. Drawing from
        all runs alike supposes that the law is equally good for every setting and size.
        """
        fitted = self.predict(theta)
        residuals = (self.target - fitted) * math.sqrt(len(self.runs) / (len(self.runs) - len(theta)))
        start = theta.clone()
        start[3] = start[3].clamp(min=-1)  # at E = 0 log E has no gradient, and no replicate would get away from it
        generator = torch.Generator().manual_seed(seed)
        laws = []
        for _ in range(replicates):
            target = fitted + residuals[torch.randint(len(residuals), residuals.shape, generator=generator)]
            laws.append(self.law(self.descend(start, LONG, target)))
        return laws


# --- what the fit says ----------------------------------------------------------------------------------------------


def interval(values: Iterable[float]) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = torch.tensor([*values]).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def rows_of(problem: Problem, law: Law, replicates: list[Law]) -> list[dict[str, Any]]:
    """One row per setting: P, its runs, eff with its 95 % interval, 16·eff/P, the largest residual in nats."""
    rows = []
    for setting, eff in law.eff.items():
        runs = sorted((run for run in problem.runs if run.setting == setting), key=lambda run: run.parameters)
        low, high = interval(replicate.eff[setting] for replicate in replicates)
        worst = max((law.loss(run) - run.loss for run in runs), key=abs)
        row = {"setting": setting, "bits": runs[0].bits, "runs": runs, "eff": eff, "low": low, "high": high}
        rows.append({**row, "worth": 16 * eff / runs[0].bits, "worst": worst})
    return rows


def report(console: Console, problem: Problem, law: Law, replicates: list[Law]) -> None:
    """The two tables, and how far the law is from the runs."""
    constants = Table("", *"AaBbE", title="L = A / (N·eff)^a + B / D^b + E", title_justify="left", box=SIMPLE)
    spans = [interval(getattr(replicate, name) for replicate in replicates) for name in "AaBbE"]
    constants.add_row("fitted", *(f"{round(getattr(law, name), 9):.4g}" for name in "AaBbE"))
    constants.add_row("95 %", *(f"{round(low, 9):.3g} … {high:.3g}" for low, high in spans))
    effs = Table("setting", title="what a parameter is worth", title_justify="left", box=SIMPLE)
    for column in ("P", "runs", "eff", "95 %", "published", "16·eff/P", "worst"):
        effs.add_column(column, justify="right", no_wrap=True)
    for row in rows_of(problem, law, replicates):
        bits, worth = ("", "") if math.isnan(row["bits"]) else (f"{row['bits']:.3g}", f"{row['worth']:.3f}")
        span = f"{row['low']:.4f} … {row['high']:.4f}"
        own, published = f"{row['eff']:.4f}", f"{PUBLISHED_EFF.get(row['setting'], '')}"
        effs.add_row(row["setting"], bits, str(len(row["runs"])), own, span, published, worth, f"{row['worst']:+.4f}")
    residuals = torch.tensor([law.loss(run) - run.loss for run in problem.runs])
    rms, largest = residuals.square().mean().sqrt(), residuals.abs().max()
    console.print(constants, effs, f"{len(residuals)} runs; residual {rms:.4f} nats rms, {largest:.4f} at most")


def plot(problem: Problem, law: Law, replicates: list[Law], path: Path) -> None:
    """Loss over N, one curve per setting and D/N; beside it 16·eff/P over P, whose maximum is the best use of bits."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = sorted(rows_of(problem, law, replicates), key=lambda row: -row["eff"])
    longest = max(run.tokens / run.parameters for run in problem.runs)
    for place, row in enumerate(rows):
        color = colormaps["turbo"](0.05 + 0.9 * place / len(rows))
        left.plot([], [], "o-", color=color, markersize=4, label=f"{row['setting']}  {row['eff']:.3f}")
        halvings = [round(math.log2(longest * run.parameters / run.tokens)) for run in row["runs"]]
        for fewer in set(halvings):
            runs = [run for run, halved in zip(row["runs"], halvings, strict=True) if halved == fewer]
            sizes, style = [run.parameters for run in runs], {"color": color, "alpha": 0.6**fewer}
            left.plot(sizes, [law.loss(run) for run in runs], linewidth=1, **style)
            left.scatter(sizes, [run.loss for run in runs], s=14, **style)
        if not math.isnan(row["bits"]):
            worth, reach = row["worth"], [abs(row["eff"] - row[end]) * 16 / row["bits"] for end in ("low", "high")]
            right.errorbar(row["bits"], worth, [[reach[0]], [reach[1]]], fmt="o", color=color, capsize=3)
            right.annotate(row["setting"], (row["bits"], worth), (6, 3), textcoords="offset points", fontsize=7)
    left.set(xscale="log", xlabel="parameters N (millions)", ylabel="loss (nats per token)")
    sizes = sorted({run.parameters for run in problem.runs})
    left.set_xticks(sizes, [f"{size / 1e6:.3g}" for size in sizes])
    left.set_title(f"runs (points) and law (lines); D/N = {longest:.0f}, fainter for every halving", fontsize=9)
    left.legend(title="setting, eff", frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    right.axhline(1, color="0.5", linewidth=0.8, linestyle=":")
    right.set(xscale="log", xlabel="bits P", ylabel="16·eff(P) / P")
    right.set_xticks(ticks := [1, 2, 3, 4, 8, 16], ticks)
    right.set_title("what a bit of weights is worth, BF16 = 1; 95 % intervals", fontsize=9)
    for axes in (left, right):
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def fit(given: argparse.Namespace) -> int:
    demo.require("matplotlib")
    torch.set_num_threads(1)  # thousands of small operations: threads would only wait for each other
    problem = Problem(read_runs(given.csv))
    demo.check_writable(given.out)
    console = Console(highlight=False)
    with console.status(f"fitting {len(problem.runs)} runs and {given.replicates} bootstrap replicates …"):
        theta = problem.fit()
        replicates = problem.bootstrap(theta, given.replicates, given.seed)
    report(console, problem, problem.law(theta), replicates)
    plot(problem, problem.law(theta), replicates, given.out / "scaling_law.png")
    console.print(f"Written: {given.out / 'scaling_law.png'}")
    return 0


# --- the runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """A Llama with heads of 128, and contractions that are multiples of 128, the block of QuEST's rotation."""

    layers: int
    hidden: int
    intermediate: int

    @property
    def parameters(self) -> int:
        """All but embedding and head."""
        block = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * block + self.hidden


SIZES = {
    "3.4M": Size(4, 256, 768),
    "8.8M": Size(5, 384, 1024),
    "17M": Size(5, 512, 1536),
    "30M": Size(6, 640, 1792),
}
#: The name and P of a row, and what is compiled: ``torch.compile(model, backend=…, options=…)``.
ARMS: dict[str, tuple[str, float, str, dict[str, Any] | None]] = {
    "16": ("BF16", 16, "inductor", None),
    **{str(bits): (f"W{bits}A{bits}", bits, "qcompile_quest", {"bits": bits}) for bits in range(8, 0, -1)},
    "fp4": ("FP4", 4, "qcompile_quest", {"bits": "fp4"}),
    "ternary": ("ternary", math.log2(3), "qcompile_quest", {"bits": "ternary"}),
}


@dataclass(frozen=True)
class Missing:
    """A run that the file does not have: names of its size and arm, and its length."""

    size: str
    arm: str
    steps: int
    tokens: int

    @property
    def label(self) -> str:
        return f"{self.size} {ARMS[self.arm][0]} {self.tokens:,}"


def missing_runs(given: argparse.Namespace) -> list[Missing]:
    """Every size, length and arm, except what the file has; the longest runs first, so that none outlasts all others
    and what the longest so far took is more than what the rest will.
    """
    done = {(run.setting, run.parameters, run.tokens) for run in read_runs(given.out)}
    found = []
    for name, length, arm in product(given.sizes, given.tokens or given.tokens_per_parameter, given.bits):
        parameters = SIZES[name].parameters
        steps = max(1, round((length if given.tokens else parameters * length) / (given.batch * given.sequence)))
        tokens = steps * given.batch * given.sequence
        if (ARMS[arm][0], parameters, tokens) not in done:
            found.append(Missing(name, arm, steps, tokens))
    return sorted(found, key=lambda missing: -SIZES[missing.size].parameters * missing.tokens)


#: What all runs of a file share.
SHARED = ("text", "device", "batch", "sequence", "learning_rate", "seed")


def train(given: argparse.Namespace) -> int:
    """Every run from one seed with one set of hyperparameters, except what the file has already. Raises ``ValueError``
    for a number of jobs that there cannot be.
    """
    if given.jobs < 1:
        msg = f"--jobs must be at least 1, got {given.jobs}"
        raise ValueError(msg)
    if not given.out.exists():
        given.out.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    missing = missing_runs(given)
    began, took, left = time.perf_counter(), list[float](), list[Missing]()
    lock, failed = Lock(), list[str]()

    def run(each: Missing) -> None:
        with lock:
            start = time.perf_counter()
            rest = given.seconds - (start - began)
            if rest < max(took, default=0.0):
                left.append(each)
                return
        said, fault = train_here(given, each) if given.jobs == 1 else train_apart(given, each, rest)
        with lock:
            took.append(time.perf_counter() - start)
            failed.extend([each.label] if fault else [])
            print(f"{said}{fault}, {took[-1]:.0f} s", flush=True)

    if given.jobs == 1:
        for each in missing:
            run(each)
    else:
        workers().side_by_side(run, missing, given.jobs)
    if left:
        print(f"{len(left)} runs are left for the next call")
    if failed:
        print(f"failed, see {given.out.with_suffix('.log')}: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def train_here(given: argparse.Namespace, missing: Missing) -> tuple[str, str]:
    """Train in this process and append the row; what there is to say, and no fault."""
    size, (setting, bits, backend, options) = SIZES[missing.size], ARMS[missing.arm]
    inductor = {"triton.cudagraphs": True} if given.cudagraphs else {}
    same = {key: getattr(given, key) for key in SHARED}
    model = {**asdict(size), "heads": size.hidden // 128}
    experiment = demo.prepare({**same, **model, "steps": missing.steps, "out": given.out.parent})
    tokens = missing.tokens
    if tokens > 4 * len(experiment.train):
        print(f"{tokens / len(experiment.train):.0f} passes over the text; the law is about 1", file=sys.stderr)
    loss = train_one(experiment, backend, {**(options or {}), **inductor} or None)
    if math.isfinite(loss):  # a run that diverged is no run of the law
        with given.out.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(asdict(Run(setting, bits, size.parameters, tokens, loss)).values())
    return f"{missing.size} {setting}: {loss:.4f} nats per byte after {tokens:,} bytes", ""


def train_apart(given: argparse.Namespace, missing: Missing, limit: float) -> tuple[str, str]:
    """Train by a call of this script for one run, which shares the machine; what it said last, and what went wrong."""
    command = [sys.executable, __file__, "train", "--out", str(given.out), "--sizes", missing.size]
    command += ["--bits", missing.arm, "--tokens", str(missing.tokens), *["--cudagraphs"] * given.cudagraphs]
    for key in SHARED:
        if (value := getattr(given, key)) is not None:
            command.append(f"--{key.replace('_', '-')}={value}")
    log = given.out.with_suffix(".log")
    try:
        status, text = workers().run_process(command, missing.label, limit, log, given.jobs)
    except TimeoutError as error:
        return missing.label, f": {error}"
    if status:
        return missing.label, f": failed ({status}): {(text.strip().splitlines() or [''])[-1]}"
    said = [line for line in text.splitlines() if line.startswith(f"{missing.size} {ARMS[missing.arm][0]}: ")]
    return said[-1].rpartition(", ")[0], ""


def workers() -> ModuleType:
    """What the benchmarks run their workers with; beside this folder in the source tree."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return import_module("measure")


def train_one(
    experiment: demo.Experiment,
    backend: str,
    options: dict[str, Any] | None,
    watch: Callable[[int, Any], None] = lambda step, compiled: None,
) -> float:
    """Validation loss after QuEST's training: its initialization, AdamW and schedule, for all bits alike.

    ``watch`` is called with the number of the step and the compiled model after every step.
    """
    config = experiment.config
    model: Any = demo.build_model(config, experiment.device)
    generator = torch.Generator(experiment.device).manual_seed(config.seed)
    for name, matrix in model.named_parameters():
        if matrix.dim() == 2:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(matrix, 0, 0.02 / math.sqrt(2 * config.layers if ends_branch else 1), generator=generator)
    torch.compiler.reset()  # the runs share one model class, and Dynamo caches by class
    compiled: Any = torch.compile(model, backend=backend, options=options)
    decayed = [weight for weight in model.model.layers.parameters() if weight.dim() == 2]
    kept = [weight for weight in model.parameters() if all(weight is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(  # peak/100 → peak → peak/10, both legs cosines
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.1, div_factor=100, final_div_factor=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    for step, (inputs, targets) in zip(range(config.steps), demo.batches(experiment), strict=False):
        demo.loss_of(compiled, inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        watch(step + 1, compiled)
    return demo.validate(compiled, experiment)


# --- command line ---------------------------------------------------------------------------------------------------


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What every run of a table shares; the fields of an experiment by these names."""
    parser.add_argument("--text", type=Path, help="read as bytes (default: Shakespeare, 1 MB, for trying out only)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1.2e-3, help="peak, for every size and arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cudagraphs", action="store_true", help="at these sizes launches take longer than kernels")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    fitting = commands.add_parser("fit", help="fit the law to the runs of a CSV file")
    fitting.add_argument("csv", nargs="?", type=Path, default=PUBLISHED, help="default: QuEST's published runs")
    fitting.add_argument("--out", type=Path, default=Path(), help="folder for the plot")
    fitting.add_argument("--replicates", type=int, default=100, help="of the bootstrap, a third of a second each")
    fitting.add_argument("--seed", type=int, default=0)
    fitting.set_defaults(command=fit)
    training = commands.add_parser("train", help="train sizes × tokens × bits, one appended CSV row per run")
    training.add_argument("--out", type=Path, required=True, help="CSV file; one file, one set of hyperparameters")
    training.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    training.add_argument("--bits", nargs="+", choices=ARMS, default=["16", "4", "2", "1"])
    training.add_argument("--tokens-per-parameter", nargs="+", type=float, default=[25.0, 50.0], metavar="RATIO")
    training.add_argument("--tokens", nargs="+", type=float, metavar="N", help="the same lengths for all sizes instead")
    training.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="begin no run that would end later, if the rest take as long as the longest so far",
    )
    training.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs side by side, each a process of its own"
    )
    add_training_arguments(training)
    training.set_defaults(command=train)
    given = parser.parse_args(arguments)
    try:
        status: int = given.command(given)
    except (ValueError, OSError, ImportError) as error:
        print(f"scaling_law: {error}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
