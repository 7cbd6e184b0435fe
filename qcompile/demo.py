"""``qcompile demo``: a small Llama pretrained in BF16 and in 4 bits, same seed, same batches.

The model is transformers' own ``LlamaForCausalLM``, untouched; an *arm* differs from the others in one line,
its ``torch.compile(model, backend=..., options=...)``. Text is read as bytes, so there is no tokenizer and
nothing to download.

Precision follows mixed-precision pretraining: FP32 parameters, which are the master weights of a plain AdamW,
and BF16 matrix products through ``torch.autocast``. The 4-bit arms quantize what autocast
hands to each product.
"""

from __future__ import annotations

import csv
import json
import lzma
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from .report import Report, explain, saved_bytes

__all__ = [
    "ARMS",
    "PRESETS",
    "Arm",
    "ArmResult",
    "DemoConfig",
    "Experiment",
    "build_model",
    "configure",
    "prepare",
    "run",
]

VOCABULARY = 256  # bytes
WARM_UP_STEPS = 3  # left out of tokens/s: the first compiles, the second is measured by `saved_bytes`
VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class Arm:
    """One way to compile the model: ``torch.compile(model, backend=backend, options=options)``."""

    label: str
    backend: str
    options: dict[str, Any] | None
    color: str


ARMS: dict[str, Arm] = {
    "bf16": Arm("BF16", "inductor", None, "#333333"),
    "fp4": Arm("FP4 recipe (DGE + OCC)", "qcompile_fp4", None, "#1f77b4"),
    # What the recipe is measured against (arXiv 2501.17116 §4): one scale per tensor, straight-through, no OCC.
    "direct": Arm(
        "FP4 direct cast, tensor-wise",
        "qcompile_fp4",
        {
            "activation": {"granularity": "tensor", "outliers": None},
            "weight": {"granularity": "tensor", "estimator": "ste"},
        },
        "#d62728",
    ),
}


@dataclass(frozen=True)
class DemoConfig:
    """Settings that every arm shares. The fields without a default come from the device's :data:`PRESETS`."""

    device: str
    steps: int
    batch: int
    sequence: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    learning_rate: float
    sample_bytes: int
    arms: tuple[str, ...] = tuple(ARMS)
    text: Path | None = None
    out: Path = Path("qcompile-demo")
    seed: int = 0


#: Bytes that are read of a text. The largest run of the demo sees fewer; more would only fill the memory.
MOST_TEXT = 64 * 2**20

#: Defaults by device. On 2 CPU cores three arms take less than 4 minutes, compilation included.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "steps": 300,
        "batch": 16,
        "sequence": 128,
        "hidden": 128,
        "layers": 2,
        "heads": 4,
        "intermediate": 384,
        "learning_rate": 2e-3,
        "sample_bytes": 240,
    },
    "cuda": {
        "steps": 400,
        "batch": 64,
        "sequence": 256,
        "hidden": 512,
        "layers": 6,
        "heads": 8,
        "intermediate": 1536,
        "learning_rate": 2e-3,
        "sample_bytes": 480,
    },
}


@dataclass(frozen=True)
class Experiment:
    """A checked configuration with its data: int64 byte values ``[n]`` on the CPU."""

    config: DemoConfig
    device: torch.device
    train: Tensor
    validation: Tensor


@dataclass
class ArmResult:
    """What one arm produced: losses in nats per byte, bytes kept for the backward of one step, seconds."""

    arm: str
    losses: list[float] = field(default_factory=list)
    validation_loss: float = math.nan
    step_seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    tokens_per_step: int = 0

    @property
    def train_loss(self) -> float:
        """Mean over the last 5 % of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 20) :])

    @property
    def step_median(self) -> float:
        """Median seconds of a step after warm-up."""
        return statistics.median(self.step_seconds[WARM_UP_STEPS:] or self.step_seconds[-1:])

    @property
    def compile_seconds(self) -> float:
        """What the first step took longer than a later one."""
        return max(0.0, self.step_seconds[0] - self.step_median)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_median


# --- before training: everything a user can get wrong -------------------------------------------------------


def prepare(given: Mapping[str, Any]) -> Experiment:
    """Check the settings and read the text, before anything is trained or written over.

    ``given`` holds fields of :class:`DemoConfig`; ``None`` or left out means the default.

    Raises ``ValueError`` for a setting or a text that cannot be used, ``OSError`` for a file or folder,
    ``ImportError`` naming the pip command for a missing package.
    """
    require("transformers", "matplotlib")
    config = configure(given)
    text = read_text(config.text)
    needed = 10 * (config.sequence + 1)
    if len(text) < needed:
        name = config.text or "the built-in text"
        msg = f"{name} has {len(text)} bytes; windows of {config.sequence} bytes need at least {needed}"
        raise ValueError(msg)
    check_writable(config.out)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    held_out = len(data) // 10
    return Experiment(config, torch.device(config.device), data[:-held_out], data[-held_out:])


def configure(given: Mapping[str, Any]) -> DemoConfig:
    """Fill in the defaults of the device. Raises ``ValueError`` for an unknown arm or a size no Llama has."""
    device = pick_device(given.get("device") or "auto")
    chosen = {name: value for name, value in given.items() if value is not None}
    config = DemoConfig(**{**PRESETS[device], **chosen, "device": device})
    for name in config.arms:
        if name not in ARMS:
            msg = f"unknown arm {name!r}; known: {', '.join(ARMS)}"
            raise ValueError(msg)
    if not config.arms or len(set(config.arms)) < len(config.arms):
        msg = f"arms must be one or more different names of {', '.join(ARMS)}"
        raise ValueError(msg)
    for name in PRESETS[device]:
        if not 0 < getattr(config, name) < math.inf:  # false for NaN
            msg = f"{name.replace('_', ' ')} must be positive and finite, got {getattr(config, name)}"
            raise ValueError(msg)
    if config.hidden % (2 * config.heads):
        msg = f"hidden size {config.hidden} must be a multiple of twice the {config.heads} heads (rotary pairs)"
        raise ValueError(msg)
    return config


def require(*packages: str) -> None:
    """Raise ``ImportError`` unless every package of the ``demo`` extra can be imported."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        msg = f"the demo needs {' and '.join(missing)}: pip install 'qcompile[demo]'"
        raise ImportError(msg)


def pick_device(name: str) -> str:
    """``"auto"`` takes a GPU if there is one. Raises ``ValueError`` for a device this torch cannot use."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if name not in PRESETS:
        msg = f"unknown device {name!r}; choose auto, {' or '.join(PRESETS)}"
        raise ValueError(msg)
    if name == "cuda" and not cuda:
        msg = "device 'cuda' is not available: this torch sees no GPU"
        raise ValueError(msg)
    return name


def read_text(path: Path | None) -> bytes:
    """The first MOST_TEXT bytes of the user's file, or the works of Shakespeare shipped with the package (public
    domain).
    """
    if path is None:
        return lzma.decompress(files("qcompile.data").joinpath("tinyshakespeare.txt.xz").read_bytes())
    with path.open("rb") as file:
        return file.read(MOST_TEXT)


def check_writable(folder: Path) -> None:
    """Create ``folder`` and try a file in it. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


# --- model and data -----------------------------------------------------------------------------------------


def build_model(config: DemoConfig, device: torch.device) -> nn.Module:
    """A randomly initialized ``LlamaForCausalLM`` in FP32; equal seeds give equal parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    settings: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "use_cache": False,
    }  # not in LlamaConfig's signature
    llama = LlamaConfig(
        **settings,
        vocab_size=VOCABULARY,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.sequence,
        initializer_range=0.05,  # the default of 0.02 is for widths in the thousands
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(llama)
    return model.to(device)


def batches(experiment: Experiment) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(inputs, targets)``, int64 ``[batch, sequence]``: random windows, decided by the seed."""
    config = experiment.config
    generator = torch.Generator().manual_seed(config.seed)
    offsets = torch.arange(config.sequence + 1)
    while True:
        starts = torch.randint(len(experiment.train) - config.sequence, (config.batch, 1), generator=generator)
        yield split_windows(experiment.train[starts + offsets], experiment.device)


def validation_batches(experiment: Experiment) -> Iterator[tuple[Tensor, Tensor]]:
    """Evenly spread windows of the held-out tail, in the training shape so that nothing is compiled again."""
    config = experiment.config
    last = len(experiment.validation) - config.sequence - 1
    starts = torch.linspace(0, last, VALIDATION_BATCHES * config.batch).long()[:, None]
    windows = experiment.validation[starts + torch.arange(config.sequence + 1)]
    for chunk in windows.split(config.batch):
        yield split_windows(chunk, experiment.device)


def split_windows(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    windows = windows.to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def unigram_entropy(data: Tensor) -> float:
    """Nats per byte of a model that knows only how often each byte occurs."""
    counts = torch.bincount(data, minlength=VOCABULARY)
    return float(torch.special.entr(counts / counts.sum()).sum())


# --- training -----------------------------------------------------------------------------------------------


def loss_of(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, FP32 scalar."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def compile_arm(arm: str, model: nn.Module) -> Any:
    """The one line in which the arms differ."""
    torch._dynamo.reset()  # the arms share one model class, and Dynamo caches by class
    return torch.compile(model, backend=ARMS[arm].backend, options=ARMS[arm].options)


def train_arm(arm: str, compiled: Any, experiment: Experiment, progress: ArmProgress) -> ArmResult:
    """Train one compiled model in place and measure it."""
    config = experiment.config
    steps = config.steps
    result = ArmResult(arm, tokens_per_step=config.batch * config.sequence)
    optimizer = torch.optim.AdamW(
        compiled.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    for step, (inputs, targets) in zip(range(steps), batches(experiment), strict=False):
        start = time.perf_counter()
        if step == min(1, steps - 1):
            with saved_bytes(compiled, inputs, targets) as saved:
                loss = loss_of(compiled, inputs, targets)
            result.saved_bytes = saved.total
            del saved
        else:
            loss = loss_of(compiled, inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(compiled.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        result.losses.append(loss.item())  # waits for the device, so the clock below is right
        result.step_seconds.append(time.perf_counter() - start)
        progress.advance(result)
    result.validation_loss = validate(compiled, experiment)
    return result


def validate(compiled: Any, experiment: Experiment) -> float:
    """Mean loss over the held-out windows; runs the training graph, which is compiled already."""
    return statistics.fmean(loss_of(compiled, *batch).detach().item() for batch in validation_batches(experiment))


class ArmProgress:
    """A progress bar per arm on a terminal, a line every tenth of the steps elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self.bar = Progress(
            TextColumn("{task.description:<29}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.arm = ""
        self.task: Any = None

    def start(self, arm: str) -> None:
        self.arm = ARMS[arm].label
        if self.console.is_terminal:
            self.task = self.bar.add_task(self.arm, total=self.steps, status="compiling …")
        else:
            self.console.print(f"{self.arm}: compiling …", highlight=False)

    def advance(self, result: ArmResult) -> None:
        done = len(result.losses)
        status = f"loss {result.losses[-1]:.3f}"
        if done > 1:
            status += f"  {result.tokens_per_second:,.0f} tokens/s  {megabytes(result.saved_bytes)} saved"
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, status=status)
        elif done % max(1, self.steps // 10) == 0 or done == 1:
            self.console.print(f"{self.arm}: step {done}/{self.steps}  {status}", highlight=False)


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


# --- a text sample ------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(compiled: Any, experiment: Experiment, temperature: float = 0.7) -> str:
    """Continue the first line of the held-out text, byte by byte.

    The window has one fixed shape ``[1, sequence]``, filled from the left, so that it compiles once;
    causal attention hides the positions after the last byte.
    """
    torch._dynamo.reset()  # beside the training shape, a single window would compile as a dynamic batch
    config = experiment.config
    generator = torch.Generator().manual_seed(config.seed)
    prompt = bytes(experiment.validation[: config.sequence // 4].tolist())
    text = list(prompt)
    window = torch.zeros(1, config.sequence, dtype=torch.long)
    for _ in range(config.sample_bytes):
        context = torch.tensor(text[-config.sequence :])
        window[0, : len(context)] = context
        with torch.autocast(experiment.device.type, torch.bfloat16):
            logits = compiled(input_ids=window.to(experiment.device)).logits[0, len(context) - 1]
        probabilities = torch.softmax(logits.float().cpu() / temperature, -1)
        text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
    return bytes(text).decode("utf-8", errors="replace")


# --- results ------------------------------------------------------------------------------------------------


def summary_rows(results: list[ArmResult]) -> list[dict[str, Any]]:
    """One dictionary per arm; gaps and ratios are against the arm ``bf16`` and ``None`` without it."""
    base = next((r for r in results if r.arm == "bf16"), None)
    return [
        {
            "arm": r.arm,
            "train_loss": r.train_loss,
            "validation_loss": r.validation_loss,
            "gap_to_bf16": r.validation_loss - base.validation_loss if base else None,
            "train_gap_to_bf16": r.train_loss - base.train_loss if base else None,
            "tokens_per_second": r.tokens_per_second,
            "compile_seconds": r.compile_seconds,
            "saved_bytes": r.saved_bytes,
            "saved_ratio_to_bf16": r.saved_bytes / base.saved_bytes if base and base.saved_bytes else None,
        }
        for r in results
    ]


def summary_table(results: list[ArmResult]) -> Table:
    table = Table(title="Same seed, same batches", title_justify="left", header_style="bold")
    table.add_column("arm")
    for column in (
        "train loss",
        "validation loss",
        "gap to BF16",
        "tokens/s",
        "compile",
        "saved / step",
        "× BF16",
    ):
        table.add_column(column, justify="right")
    for row in summary_rows(results):
        gap, ratio = row["gap_to_bf16"], row["saved_ratio_to_bf16"]
        table.add_row(
            ARMS[row["arm"]].label,
            f"{row['train_loss']:.3f}",
            f"{row['validation_loss']:.3f}",
            "" if gap is None or row["arm"] == "bf16" else f"{gap:+.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['compile_seconds']:.0f} s",
            megabytes(row["saved_bytes"]),
            "" if ratio is None else f"{ratio:.2f}",
        )
    return table


def write_results(experiment: Experiment, results: list[ArmResult]) -> None:
    """``results.json`` (settings, summary), ``summary.csv`` and ``losses.csv`` (one column per arm)."""
    out = experiment.config.out
    rows = summary_rows(results)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(experiment.config).items()}
    data = {
        "settings": {**settings, "torch": torch.__version__},
        "unigram_entropy": unigram_entropy(experiment.train),
        "arms": rows,
    }
    replace_file(out / "results.json", json.dumps(data, indent=1) + "\n")
    write_csv(out / "summary.csv", [list(rows[0]), *([*row.values()] for row in rows)])
    curves = zip(*(r.losses for r in results), strict=True)
    write_csv(out / "losses.csv", [["step", *(r.arm for r in results)], *([i, *c] for i, c in enumerate(curves, 1))])


def write_csv(path: Path, rows: list[list[Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    os.replace(temporary, path)


def replace_file(path: Path, text: str) -> None:
    """Write beside and rename, so that an interrupted run leaves the former file whole."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def smoothed(losses: list[float], reach: int = 12) -> list[float]:
    """Mean over ``reach`` steps to each side, fewer at the ends; symmetric, so that no curve lags its data."""
    curve = []
    for step in range(len(losses)):
        side = min(reach, step, len(losses) - 1 - step)
        curve.append(statistics.fmean(losses[step - side : step + side + 1]))
    return curve


def plot(experiment: Experiment, results: list[ArmResult], path: Path) -> None:
    """Loss curves (raw faint, smoothed bold) above; below, each arm's smoothed difference to BF16."""
    from matplotlib.figure import Figure

    base = next((r for r in results if r.arm == "bf16"), None)
    base_losses = base.losses if base else []
    others = [r for r in results if r is not base] if base else []
    figure = Figure(figsize=(8, 6.4 if others else 4.4), layout="constrained")
    axes = figure.subplots(
        2 if others else 1, 1, sharex=True, squeeze=False, height_ratios=[2.4, 1] if others else [1]
    )[:, 0]
    for result in results:
        arm = ARMS[result.arm]
        steps = range(1, len(result.losses) + 1)
        axes[0].plot(steps, result.losses, color=arm.color, alpha=0.18, linewidth=0.8)
        label = f"{arm.label}: validation {result.validation_loss:.3f}"
        axes[0].plot(steps, smoothed(result.losses), color=arm.color, linewidth=1.8, label=label)
    entropy = unigram_entropy(experiment.train)
    axes[0].axhline(entropy, color="0.5", linestyle=":", linewidth=1, label=f"unigram entropy: {entropy:.3f}")
    lowest = min(min(r.losses) for r in results)
    axes[0].set_ylim(
        max(0.0, lowest - 0.15), max(entropy + 0.5, lowest + 0.3)
    )  # the first steps fall from ln 256 = 5.5
    axes[0].set_ylabel("training loss (nats per byte)")
    axes[0].legend(loc="upper right", frameon=False)
    config = experiment.config
    axes[0].set_title(
        f"Llama, {config.layers} layers of {config.hidden}; {config.batch} × {config.sequence} bytes per step; "
        f"seed {config.seed}"
    )
    for result in others:
        gap = smoothed([a - b for a, b in zip(result.losses, base_losses, strict=True)])
        axes[1].plot(range(1, len(gap) + 1), gap, color=ARMS[result.arm].color, linewidth=1.8)
    if others:
        axes[1].axhline(0, color=ARMS["bf16"].color, linewidth=1)
        axes[1].set_ylabel("loss − BF16 (smoothed)")
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def explain_arm(arm: str, model: nn.Module, experiment: Experiment) -> Report:
    """The report of one 4-bit arm, under the same autocast as its training."""
    inputs, _ = next(batches(experiment))
    torch._dynamo.reset()
    with torch.autocast(experiment.device.type, torch.bfloat16):
        return explain(model, input_ids=inputs, backend=ARMS[arm].backend, options=ARMS[arm].options)


def run(experiment: Experiment, console: Console) -> list[ArmResult]:
    """Train every arm, print and write the results; a finished arm is on disk before the next one starts."""
    config = experiment.config
    results: list[ArmResult] = []
    shown = next((arm for arm in ("fp4", "direct") if arm in config.arms), None)
    text = report = None
    progress = ArmProgress(console, config.steps)
    with progress.bar:
        for arm in config.arms:
            progress.start(arm)
            model = build_model(config, experiment.device)
            if arm == shown:  # before training: other shapes seen first would make the graph's batch symbolic
                report = explain_arm(arm, model, experiment)
                replace_file(config.out / "explain.html", report.to_html())
            compiled = compile_arm(arm, model)
            results.append(train_arm(arm, compiled, experiment, progress))
            write_results(experiment, results)
            if arm == shown:
                text = sample(compiled, experiment)
                replace_file(config.out / "sample.txt", text)
    plot(experiment, results, config.out / "loss.png")
    if report is not None:
        console.print(report.table(compact=True))
    console.print(summary_table(results))
    if text is not None:
        console.rule(f"written by the 4-bit model ({ARMS[shown or ''].label})", align="left")
        console.print(text, markup=False, highlight=False)
        console.rule()
    console.print(final_line(results), markup=False, highlight=False)
    console.print(
        f"Written to {config.out}/: {', '.join(sorted(p.name for p in config.out.iterdir()))}",
        highlight=False,
    )
    return results


def final_line(results: list[ArmResult]) -> str:
    """Each arm's gap to BF16 in one sentence."""
    gaps = [
        f"{ARMS[row['arm']].label} {row['gap_to_bf16']:+.3f}" for row in summary_rows(results) if row["gap_to_bf16"]
    ]
    return (
        f"Validation loss against BF16 (nats per byte, one seed; repeats differ by about 0.03): {'; '.join(gaps)}"
        if gaps
        else "No gap to state: one arm only."
    )
