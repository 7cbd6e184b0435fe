"""What 4-bit products do to the training of a mixture of experts: losses on real text, step by step.

    python benchmarks/moe_curves.py --tokens tokens.npz.xz --out benchmarks/h200/moe_curves.json
    python benchmarks/moe_curves.py --device cpu --size tiny_moe --steps 20 --out /tmp/try.json

transformers' Qwen3-MoE as it comes, with grouped products: 111 million parameters, of which a token meets 23 million,
16,384 tokens per step (eight_bit_curves.py says how ``--tokens`` are made). All arms have the same seed and batches.
The model is in BF16 and AdamW's parameters are float32: under ``torch.compile``, transformers runs experts in float32
one by one. Losses are those of the text; a thousandth of the load-balancing loss is added for the gradient. Every
decoder layer is compiled by itself, once for all of them; embedding and head run as they are.

``bf16_seed1`` starts from other weights and reads the same text: its gap is the noise that gaps are read against.

An arm is a process of its own. The JSON file is written every hundred steps. Arms that it has are not run again, but
one that was cut, by ``--limit`` or from outside, is. So the same command goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from eight_bit_curves import (
    Batch,
    Curve,
    Tokens,
    in_order,
    plot,
    read_json,
    rows_of,
    run_steps,
    settings_of,
    table,
    write_json,
)
from loss_curves import decay_groups
from measure import add_worker_arguments, answer, brief, fresh_log, in_fresh_process
from model import SIZES, Size, build
from torch import Tensor, nn
from training_step import names_from

from qcompile.apps.demo import learning_rate_factor

__all__ = ["ARMS", "Arm", "Masters", "main", "train"]

REPORT = 100  # steps after which a worker writes down what it has
BALANCE = 1e-3  # of the load-balancing loss, as in transformers' configurations


@dataclass(frozen=True)
class Arm:
    """``layer.compile(backend=backend, options=options)`` of every decoder layer, and how the curve is drawn."""

    label: str
    color: str
    backend: str = "inductor"
    options: dict[str, Any] | None = None
    seed: int = 0
    style: str = "-"


BASELINE = "bf16"
ARMS: dict[str, Arm] = {
    BASELINE: Arm("BF16", "black"),
    "default": Arm("FP4, no options", "tab:purple", "qcompile_fp4"),
    "quest": Arm("QuEST W4A4, no options", "tab:brown", "qcompile_quest"),
    "bf16_seed1": Arm("BF16, other initial weights", "0.6", seed=1, style="--"),
}


class Masters:
    """Float32 copies of a model's parameters, which an optimizer updates in their place."""

    def __init__(self, model: nn.Module) -> None:
        self.narrow = list(model.parameters())
        self.wide = [nn.Parameter(p.detach().float()) for p in self.narrow]
        for p in self.wide:
            p.grad = torch.zeros_like(p)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """The model keeps none."""
        torch._foreach_copy_([p.grad for p in self.wide], [p.grad for p in self.narrow])
        for p in self.narrow:
            p.grad = None

    @torch.no_grad()
    def give_back(self) -> None:
        torch._foreach_copy_(self.narrow, self.wide)


class Balance:
    """The load-balancing loss of the model's last forward.

    transformers collects what it is computed from by hooks that read context variables, at which Dynamo breaks graphs.
    """

    def __init__(self, model: Any) -> None:
        self.config = model.config
        self.routers = [layer.mlp.gate for layer in model.model.layers]
        for router in self.routers:
            router.register_forward_hook(self._keep)

    @staticmethod
    def _keep(router: nn.Module, arguments: object, output: tuple[Tensor, ...]) -> None:
        router.logits = output[0]

    def loss(self) -> Tensor:
        from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

        logits = tuple(router.logits for router in self.routers)
        return load_balancing_loss_func(logits, self.config.num_experts, self.config.num_experts_per_tok)


def train(
    arm: Arm,
    size: Size,
    tokens: Tokens,
    steps: int,
    lr: float,
    backend: str | None = None,
    report: Callable[[Curve], None] = lambda curve: None,
) -> Curve:
    """Train one arm, by another backend if one is given."""
    model = build(size, tokens.train.device, torch.bfloat16, arm.seed, "transformers")
    balance, masters = Balance(model), Masters(model)
    for layer in model.model.layers:
        layer.compile(backend=backend or arm.backend, options=None if backend else arm.options, dynamic=False)
    optimizer = torch.optim.AdamW(decay_groups(masters.wide), lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))

    def step(batch: Batch) -> Tensor:
        loss = loss_of(model, batch)
        (loss + BALANCE * balance.loss()).backward()
        masters.take_gradients()
        nn.utils.clip_grad_norm_(masters.wide, 1.0)
        optimizer.step()
        masters.give_back()
        schedule.step()
        return loss

    return run_steps(step, partial(loss_of, model), tokens, size, steps, report, every=REPORT)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over tokens, in nats."""
    ids, targets = batch
    return nn.functional.cross_entropy(model(input_ids=ids).logits.float().flatten(0, 1), targets.flatten())


#: What a file of curves was made with: arms are added to it only if they were made with the same.
SETTINGS = ("size", "steps", "lr", "tokens")


def keep(given: argparse.Namespace, name: str, curve: Curve) -> None:
    """Put the curve into the file. Others that are not complete stay in it until they are run again."""
    settings = settings_of(given, SETTINGS)
    curves = {**read_json(given.out, settings, complete=False), name: curve}
    ordered = in_order(curves, ARMS)
    write_json(given.out, settings, ordered, final=rows_of(ordered, BASELINE))


def work(given: argparse.Namespace) -> dict[str, Any]:
    """In a worker."""
    tokens = Tokens.read(given.tokens, torch.device(given.device))
    size = replace(SIZES[given.size], vocabulary=tokens.vocabulary)

    def report(curve: Curve) -> None:
        keep(given, given.worker, replace(curve, fault="cut"))

    keep(given, given.worker, train(ARMS[given.worker], size, tokens, given.steps, given.lr, report=report))
    return {}


def finished(given: argparse.Namespace, name: str, log: Path) -> Curve:
    """The curve of an arm that runs in a process of its own, whole or as far as it came."""
    arguments = [
        f"--{key}={value}" for key in (*SETTINGS, "device", "out") if (value := getattr(given, key)) is not None
    ]
    fault = ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            in_fresh_process(Path(__file__), name, arguments, given.limit, Path(scratch), log)
        except (RuntimeError, TimeoutError) as error:
            fault = brief(error)
    curve = read_json(given.out, settings_of(given, SETTINGS), complete=False).get(name, Curve())
    if fault:
        curve.fault = fault
        keep(given, name, curve)
    return curve


def missing(given: argparse.Namespace) -> Iterator[str]:
    done = read_json(given.out, settings_of(given, SETTINGS))
    return (name for name in given.arms if name not in done)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=lambda s: names_from(ARMS, s), default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--tokens", type=Path, help="what eight_bit_curves.py wrote (default: Shakespeare as bytes)")
    parser.add_argument("--size", choices=[name for name in SIZES if SIZES[name].experts], default="moe100m")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3, help="peak; 5 %% warm-up, then a cosine down to a tenth")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--limit", type=float, default=120, help="seconds per arm")
    parser.add_argument("--total", type=float, default=420, help="seconds after which no arm is started")
    parser.add_argument("--out", type=Path, default=Path("moe_curves.json"))
    add_worker_arguments(parser)
    given = parser.parse_args(arguments)
    if given.worker:
        return answer(given, lambda: work(given))
    if given.device == "cuda" and not torch.cuda.is_available():
        print("moe_curves: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    start = time.monotonic()
    try:
        names = list(missing(given))
    except ValueError as error:
        print(f"moe_curves: {error}", file=sys.stderr)
        return 2
    log = fresh_log(given.out)
    for name in names:
        if time.monotonic() - start > given.total:
            print(f"{name:12} no time", flush=True)
            break
        curve = finished(given, name, log)
        print(f"{name:12} {len(curve.losses)} steps in {curve.seconds:.0f} s {curve.fault}", flush=True)
    curves = read_json(given.out, settings_of(given, SETTINGS), complete=False)
    if any(curve.losses for curve in curves.values()):
        title = title_of(given)
        plot(given.out.with_suffix(".png"), curves, title, ARMS)
        text = f"{title}\n\n{table(curves, ARMS)}"
        given.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}")
    return 0 if not list(missing(given)) else 1


def title_of(given: argparse.Namespace) -> str:
    """From the file, whose arms may have run on other days."""
    data, size = json.loads(given.out.read_text()), SIZES[given.size]
    where = data["environment"]
    return (
        f"{size.family}, {size.parameters / 1e6:.0f} M parameters, {size.experts} experts, {size.experts_per_token} per"
        f" token, {size.tokens} tokens per step; {where['card']}, torch {where['torch']}, {where['date']}"
    )


if __name__ == "__main__":
    sys.exit(main())
