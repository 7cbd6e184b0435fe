"""Bytes of states per parameter and time per step of AdamW, ours beside torch's, torchao's and bitsandbytes'.

Parameters are the matrices of Llama's layers and its norms, as many as the size asks for, with gradients of the same
dtype; nothing else runs. The first step is timed apart: it makes the states and compiles. Every arm has a process of
its own and a time limit; a row is written as soon as it is there, and a failed arm has its reason in the row.

    python benchmarks/optimizer_step.py --out benchmarks/h200/optimizer_step.csv [--millions 100 300 1000] [--limit 120]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import add_worker_arguments, answer, answers, fresh_log, milliseconds, write_rows
from torch import Tensor

from qcompile import compat

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FP32, BF16 = torch.float32, torch.bfloat16
LR = 1e-4


def _torchs(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def _ours(**options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        from qcompile.optim import AdamW

        return AdamW(parameters, lr=LR, **options)

    return make


def _torchaos(name: str, **options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    def make(parameters: list[Tensor]) -> torch.optim.Optimizer:
        import torchao.optim

        return getattr(torchao.optim, name)(parameters, lr=LR, **options)

    return make


def _bitsandbytes(parameters: list[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=LR)


#: Arm → dtype of parameters and gradients, and the optimizer.
ARMS: dict[str, tuple[torch.dtype, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
    "torch fused, FP32": (FP32, _torchs),
    "torch fused, BF16": (BF16, _torchs),
    "ours 8bit, FP32": (FP32, _ours()),
    "ours 8bit, BF16": (BF16, _ours()),
    "ours 8bit, BF16 with FP32 master": (BF16, _ours(master="fp32")),
    "ours fp8-lm, BF16": (BF16, _ours(states="fp8-lm")),
    "ours fp32, FP32": (FP32, _ours(states="fp32")),
    "torchao AdamW8bit, BF16": (BF16, _torchaos("AdamW8bit", bf16_stochastic_round=True)),
    "torchao AdamWFp8, BF16": (BF16, _torchaos("AdamWFp8", bf16_stochastic_round=True)),
    "bitsandbytes AdamW8bit, BF16": (BF16, _bitsandbytes),
}


@dataclass(frozen=True)
class Row:
    """``state_bytes``: of all that the optimizer holds, per parameter. ``ratio``: to fused AdamW in float32."""

    arm: str
    millions: float
    tensors: int
    first_step_s: float = 0.0
    ms: float = 0.0
    state_bytes: float = 0.0
    ratio: float = 0.0
    error: str = ""


def shapes(millions: float) -> list[tuple[int, ...]]:
    """Layers of a Llama until there are as many parameters: 12 · width² each, about one per 128 of width."""
    width = 128 * max(1, round((millions * 1e6 * 128 / 12) ** (1 / 3) / 128))
    layer = [(width, width)] * 4 + [(8 * width // 3 // 128 * 128 + 128, width)] * 3 + [(width,)] * 2
    found: list[tuple[int, ...]] = []
    while sum(torch.Size(shape).numel() for shape in found) < millions * 1e6:
        found += layer
    return found


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the storages of all state tensors, those inside of subclasses included; each storage once."""
    values = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts = [part for value in values for part in compat.plain_parts(value)]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(storages.values())


def measured(arm: str, millions: float, steps: int) -> Row:
    dtype, make = ARMS[arm]
    generator = torch.Generator(DEVICE).manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(shape, device=DEVICE, generator=generator).mul(0.02).to(dtype))
        for shape in shapes(millions)
    ]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, device=DEVICE, generator=generator).mul(1e-3).to(dtype)
    optimizer = make(parameters)
    start = time.perf_counter()
    optimizer.step()
    _wait()
    first = time.perf_counter() - start
    optimizer.step()
    _wait()
    times = milliseconds(optimizer.step, steps, DEVICE.type == "cuda")
    elements = sum(parameter.numel() for parameter in parameters)
    return Row(arm, elements / 1e6, len(parameters), first, median(times), state_bytes(optimizer) / elements)


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--millions", type=float, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=float, default=120, help="seconds per arm")
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        return answer(options, lambda: asdict(measured(options.worker, options.millions[0], options.steps)))
    log = fresh_log(options.out)
    rows: list[Row] = []
    for millions in options.millions:
        baseline = 0.0
        arguments = ["--millions", str(millions), "--steps", str(options.steps), "--out", str(options.out)]
        for arm, found, fault in answers(Path(__file__), options.arms, arguments, options.limit, log):
            row = Row(arm, millions, 0, error=fault) if fault else Row(**found)
            baseline = row.ms if arm == "torch fused, FP32" else baseline
            rows.append(Row(**{**asdict(row), "ratio": row.ms / baseline if baseline else 0.0}))
            write_rows(options.out, rows)  # all of them, so that what is there is a table at any time
            print(rows[-1], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
