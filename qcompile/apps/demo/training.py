"""Training of one arm, what is measured of it, and a text sample from the trained model."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from qcompile.report import saved_bytes

from .model import batches, learning_rate_factor, loss_of, validation_batches
from .settings import ARMS, Experiment

__all__ = ["ArmProgress", "ArmResult", "compile_arm", "megabytes", "sample", "train_arm", "validate"]

WARM_UP_STEPS = 3  # left out of tokens/s: the first compiles, the second is measured by `saved_bytes`


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


def compile_arm(arm: str, model: nn.Module) -> Any:
    """The one line in which the arms differ."""
    torch.compiler.reset()  # the arms share one model class, and Dynamo caches by class
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


@torch.no_grad()
def sample(compiled: Any, experiment: Experiment, temperature: float = 0.7) -> str:
    """Continue the first line of the held-out text, byte by byte.

    The window has one fixed shape ``[1, sequence]``, filled from the left, so that it compiles once;
    causal attention hides the positions after the last byte.
    """
    torch.compiler.reset()  # beside the training shape, a single window would compile as a dynamic batch
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
