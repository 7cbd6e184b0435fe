"""A study: arms that train one model on the same batches from the same seed, and what their losses say.

The model is a Llama (model.py): FP32 parameters and AdamW, BF16 products under autocast, of which the arms quantize
those of the blocks. Every arm is a :class:`qcompile.Schedule`, those that heal of two phases.

An arm is a process of its own, and ``--jobs`` of them share the card: while one compiles or launches, others compute.
The JSON file is written after each, arms that it has are not run again, and none is begun that ``--total`` has no time
for: call the script again, in another session, until all are there. An arm that is stopped or fails keeps its losses in
the file, says why, and is run anew by the next call. The figure (.png), the table (.md) and a section for what each arm
printed (.log) are beside the file.

The table has the median time of the steps after the first 20, the time of the first step, which compiles, and the peak
of the card's memory in later ones. Times of arms that ran side by side are none, and it says so.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from eight_bit_curves import (
    Batch,
    Curve,
    Tokens,
    curve_of_process,
    in_order,
    read_json,
    run_arms,
    run_steps,
    settings_of,
    title_of,
    write_json,
)
from loss_curves import decay_groups, loss_of, step_of
from measure import add_worker_arguments, answer, fresh_log
from model import SIZES, Size, build
from torch import Tensor
from training_step import names_from

from qcompile import Schedule
from qcompile.recipes import RECIPES

__all__ = ["MODEL", "Arm", "Order", "Study", "orders", "signed", "train"]

MODEL = "d640"
HEALED = 0.1  # share of the steps whose forward is wide


@dataclass(frozen=True)
class Arm:
    """``healed``: the last steps multiply the originals in the forward. ``published``: what somebody reported of it."""

    label: str
    color: str
    backend: str = "inductor"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    healed: bool = False
    published: float | None = None
    style: str = "-"

    def wide_blocks(self, blocks: int) -> int:
        """How many of the last ones the recipe leaves wide: compiled one by one, no block knows its place."""
        recipe = RECIPES.get(self.backend)
        rules = [rule for rule in recipe.rules if rule.quantize is False] if recipe else []
        return max((rule.last_of(blocks) for rule in rules), default=0)

    def schedule(self, steps: int, backend: Callable[..., Any] | None = None) -> Schedule:
        """``backend``: in place of the arm's, for tests."""
        phases: list[tuple[Any, ...]] = [(0, backend or self.backend, self.options)]
        if self.healed:
            phases.append((steps - round(HEALED * steps), backend or self.backend, {**self.options, "forward": "bf16"}))
        return Schedule(phases)


def train(
    arm: Arm,
    size: Size,
    tokens: Tokens,
    steps: int,
    lr: float,
    backend: Callable[..., Any] | None = None,
    report: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train one arm."""
    model = build(size, tokens.train.device, torch.float32, arm.seed)
    phases = arm.schedule(steps, backend)
    narrow = len(model.layers) - arm.wide_blocks(len(model.layers))
    phases.compile(*model.layers[:narrow], dynamic=False)
    for block in model.layers[narrow:]:
        block.compile(dynamic=False)
    optimizer = torch.optim.AdamW(decay_groups(model.parameters()), lr=lr, betas=(0.9, 0.95), fused=True)
    train_on = step_of(model, optimizer, steps)

    def step(batch: Batch) -> Tensor:
        loss = train_on(batch)
        phases.step()
        return loss

    return run_steps(step, partial(loss_of, model), tokens, size, steps, report)


# --- the order of arms ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """That ``better`` is published below ``worse``, by how much there and here; ``verdict`` in words."""

    better: str
    worse: str
    published: float
    ours: float
    verdict: str


def orders(
    published: Mapping[str, float], ours: Mapping[str, float], noise: float, reading: float = 0.0
) -> list[Order]:
    """All pairs of arms that both have, if what was published differs by more than two readings of a figure may.

    ``noise``: by how much two seeds of one arm differ, NaN if that is not known.
    """
    found = []
    for pair in combinations([name for name in published if name in ours], 2):
        better, worse = sorted(pair, key=lambda name: published[name])
        apart = published[worse] - published[better]
        if apart <= 2 * reading:
            continue
        here = ours[worse] - ours[better] if ours[worse] != ours[better] else 0.0
        verdict = "reproduced" if here > noise else "reversed" if here < -noise else "within the noise of seeds"
        if math.isnan(noise):
            verdict = "no second seed to compare with"
        found.append(Order(better, worse, apart, here, verdict))
    return found


def signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "diverged" if value == math.inf else "?"


# --- runs -----------------------------------------------------------------------------------------------------------

#: What a file of curves was made with: arms are added to it only if they were made with the same.
SETTINGS = ("size", "steps", "lr", "tokens")


@dataclass(frozen=True)
class Study:
    """A script's arms, in the order in which they are worth the time, and what it makes of their curves.

    ``tokens``: how many to train on. ``found``: what goes into the file beside the curves.
    """

    script: Path
    arms: Mapping[str, Arm]
    tokens: float
    found: Callable[[dict[str, Curve]], dict[str, Any]]
    table: Callable[[dict[str, Curve]], str]
    plot: Callable[[Path, dict[str, Curve], str], None]

    def work(self, given: argparse.Namespace) -> dict[str, Any]:
        """In a worker."""
        tokens = Tokens.read(given.tokens, torch.device(given.device))
        size = replace(SIZES[given.size], vocabulary=tokens.vocabulary)

        def report(curve: Curve) -> None:
            (given.scratch / "part.json").write_text(json.dumps(asdict(curve)))

        return asdict(train(self.arms[given.worker], size, tokens, given.steps, given.lr, report=report))

    def main(self, description: str, arguments: list[str] | None = None) -> int:
        given = self._given(description, arguments)
        name = self.script.stem
        if given.worker:
            return answer(given, lambda: self.work(given))
        if given.device == "cuda" and not torch.cuda.is_available():
            print(f"{name}: needs a CUDA card (or --device cpu)", file=sys.stderr)
            return 2
        settings = settings_of(given, SETTINGS)
        try:
            curves = read_json(given.out, settings, complete=False)
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        log = fresh_log(given.out)
        deadline = time.monotonic() + given.total
        missing = [each for each in dict.fromkeys(given.arms) if each not in curves or curves[each].fault]
        jobs = max(1, min(given.jobs, len(missing)))
        same = [f"--{key}={value}" for key in (*SETTINGS, "device", "out") if (value := getattr(given, key))]

        def keep() -> None:
            ordered = in_order(curves, self.arms)
            write_json(given.out, settings, ordered, **self.found(ordered))

        run_arms(
            missing,
            curves,
            lambda each, limit: curve_of_process(self.script, each, same, limit, log, jobs),
            keep,
            limit=given.limit,
            deadline=deadline,
            at_once=jobs,
            jobs=jobs,
        )
        if curves:
            self._show(given, in_order(curves, self.arms), settings["tokens"])
        left = [each for each in given.arms if each not in curves or curves[each].fault]
        if left:
            print(f"left for the next call: {','.join(left)}")
        return 1 if left else 0

    def _show(self, given: argparse.Namespace, curves: dict[str, Curve], tokens: str) -> None:
        size = SIZES[given.size]
        title = f"{title_of(size)}; {given.steps * size.tokens / 1e6:.0f} M of {tokens}"
        self.plot(given.out.with_suffix(".png"), curves, title)
        text = f"{title}.\n\n{self.table(curves)}"
        given.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}")

    def _given(self, description: str, arguments: list[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        known = ", ".join(self.arms)
        parser.add_argument("--arms", type=lambda s: names_from(self.arms, s), default=list(self.arms), help=known)
        parser.add_argument(
            "--tokens",
            type=Path,
            help="what eight_bit_curves.py --write-tokens wrote, or a text (default: Shakespeare)",
        )
        parser.add_argument("--size", choices=SIZES, default=MODEL)
        parser.add_argument("--steps", type=int, help=f"by default {self.tokens / 1e6:.0f} million tokens")
        parser.add_argument(
            "--lr", type=float, default=1.2e-3, help="peak; 5 %% warm-up, then a cosine down to a tenth"
        )
        parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
        parser.add_argument("--jobs", type=int, default=1, metavar="N", help="arms that share the card")
        parser.add_argument("--limit", type=float, default=math.inf, help="seconds per arm")
        parser.add_argument("--total", type=float, default=540, help="seconds that this call may take")
        parser.add_argument("--out", type=Path, default=Path(f"{self.script.stem}.json"))
        add_worker_arguments(parser)
        given = parser.parse_args(arguments)
        if given.jobs < 1:
            parser.error(f"--jobs must be at least 1, got {given.jobs}")
        if given.tokens and not given.tokens.is_file():
            parser.error(f"--tokens: there is no file {given.tokens}")
        if given.steps is None:
            given.steps = math.ceil(self.tokens / SIZES[given.size].tokens)
        if given.steps < 1:
            parser.error(f"--steps must be at least 1, got {given.steps}")
        return given
