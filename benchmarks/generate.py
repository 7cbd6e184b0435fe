"""Tokens per second of a Llama of 8 billion weights that are stored in 4 bits, beside BF16: one prompt, greedy.

    python benchmarks/generate.py --out generate.csv                         # 32 layers
    python benchmarks/generate.py --tiny --device cpu --out generate_cpu.csv # tries the script out

transformers' ``generate`` with a static cache, compiled for every arm in its mode "reduce-overhead", which is CUDA
graphs. Weights are random, made and packed layer by layer as in ``lora_step.py``. What has been generated is first
given to the model without compilation, whose best logit must be no more than :data:`OFF_BY` standard deviations above
that of any token. An arm has a process of its own and ``--limit`` seconds. Writes the CSV file after every arm.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lora_step import LLAMA_8B, NF4, TINY, as_they_are, by_bitsandbytes, llama, packed
from measure import add_worker_arguments, answer, answers, fresh_log, write_rows
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
from serve import generated, off_by  # noqa: E402

sys.path.remove(str(EXAMPLES))

__all__ = ["ARMS", "Row", "main", "work"]

#: How far from the best one a chosen logit may be; that of a wrong model is some four away.
OFF_BY = 0.5
BASELINE = "bf16"
#: How layers are stored, and the backend.
ARMS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    BASELINE: (as_they_are, "inductor"),
    "nf4": (packed(NF4), "qcompile_stored"),
    "int4 g32": (packed("int4 block32"), "qcompile_stored"),
    "int4 g128": (packed("int4 block128"), "qcompile_stored"),
    "nvfp4": (packed("e2m1 block16 e4m3"), "qcompile_stored"),
    "bitsandbytes nf4": (by_bitsandbytes, "inductor"),
}


@dataclass(frozen=True)
class Row:
    """One arm. ``off_by``: see :data:`OFF_BY`; ``over_bf16``: tokens per second over those of BF16."""

    arm: str
    layers: int
    prompt: int
    tokens: int
    tokens_per_s: float = math.nan
    over_bf16: float = math.nan
    model_gb: float = math.nan
    off_by: float = math.nan
    compile_s: float = math.nan
    status: str = "ok"


def work(name: str, given: argparse.Namespace) -> Row:
    """The arm built, checked and timed. Raises ``ValueError`` if it generates something else."""
    from qcompile.stored import bytes_of

    store, backend = ARMS[name]
    size, device = _size(given), torch.device(given.device)
    model = llama(size, store, device)
    ids = torch.randint(size.vocabulary, (1, given.prompt), generator=torch.Generator().manual_seed(1)).to(device)

    def seconds() -> tuple[float, Any]:
        start = time.perf_counter()
        output = generated(model, ids, given.tokens, backend)
        output.tolist()  # waits for the card
        return time.perf_counter() - start, output

    compile_s, output = seconds()
    with torch.no_grad():
        deviation = model(ids).logits.float().std().item()
    distance = off_by(model, output, given.prompt) / deviation
    if not distance <= OFF_BY:
        msg = f"a token's logit is {distance:.2f} standard deviations from the best one"
        raise ValueError(msg)
    speed = given.tokens / median(seconds()[0] for _ in range(given.repeats))
    return Row(
        name, size.layers, given.prompt, given.tokens, speed, model_gb=bytes_of(model) / 1e9, off_by=distance,
        compile_s=compile_s,
    )  # fmt: skip


def _size(given: argparse.Namespace) -> Any:
    size = replace(TINY if given.tiny else LLAMA_8B, sequence=given.prompt + given.tokens)
    return replace(size, layers=given.layers or size.layers)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--layers", type=int, help="decoder layers (default: 32)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt (default: 32)")
    parser.add_argument("--tokens", type=int, default=128, help="to generate (default: 128)")
    parser.add_argument("--repeats", type=int, default=3, help="timed generations (default: 3)")
    parser.add_argument("--limit", type=float, default=150, help="seconds of an arm (default: 150)")
    parser.add_argument("--device", default="cuda")
    add_worker_arguments(parser)
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("generate: needs a CUDA card (or --tiny --device cpu)", file=sys.stderr)
        return 2
    if given.worker:
        return answer(given, lambda: asdict(work(given.worker, given)))
    log, rows, base = fresh_log(given.out), list[Row](), math.nan
    failed = Row("", _size(given).layers, given.prompt, given.tokens)
    for name, found, fault in answers(Path(__file__), given.arms, arguments, given.limit, log):
        row = replace(failed, arm=name, status=f"FAILED: {fault}") if fault else Row(**found)
        base = row.tokens_per_s if name == BASELINE else base
        rows.append(replace(row, over_bf16=row.tokens_per_s / base))
        write_rows(given.out, rows)
        print(
            f"{name:18} {row.tokens_per_s:8.1f} tokens/s {rows[-1].over_bf16:6.3f}x  model {row.model_gb:6.2f} GB  "
            f"off by {row.off_by:.3f}  first call {row.compile_s:5.1f} s  {row.status}",
            flush=True,
        )
    return 0 if all(row.status == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
