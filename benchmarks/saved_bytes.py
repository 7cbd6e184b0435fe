"""Bytes that autograd keeps for the backward, parameters and inputs excluded: no timing, the same on every machine.

python benchmarks/saved_bytes.py --out saved_cpu.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qcompile

TOKENS = 256
E4M3_OUTLIERS = {"outliers": "occ(alpha=0.99,residual=e4m3)"}
#: Column → options; without any, the recipe as published.
ARMS: dict[str, dict[str, Any]] = {
    "inductor": {"enabled": False},
    "qcompile_fp4": {},
    "without OCC": {"activation": {"outliers": None}},
    "save=8bit": {"save": "8bit"},
    "save=4bit": {"save": "4bit"},
    "residual=e4m3": {"activation": E4M3_OUTLIERS},
    "residual=e4m3, save=8bit": {"activation": E4M3_OUTLIERS, "save": "8bit"},
}


def models() -> Iterator[tuple[str, nn.Module, dict[str, Any], bool]]:
    """Name, model, keyword inputs, and whether it runs under autocast to BF16."""
    for name, dtype, autocast in (
        ("FP32", torch.float32, False),
        ("BF16", torch.bfloat16, False),
        ("autocast", torch.float32, True),
    ):
        mlp = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(dtype)
        yield f"MLP 256-512-256, {name}", mlp, {"input": torch.randn(TOKENS, 256, dtype=dtype)}, autocast
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, dtype, autocast in (
        ("FP32", torch.float32, False),
        ("BF16", torch.bfloat16, False),
        ("autocast", torch.float32, True),
    ):
        llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, use_cache=False, **sizes)).to(dtype)
        yield f"Llama 2 × 128, {name}", llama, {"input_ids": torch.zeros(2, TOKENS // 2, dtype=torch.long)}, autocast


def measure(model: nn.Module, inputs: dict[str, Any], autocast: bool) -> list[int]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return [qcompile.explain(model, options=options, **inputs).saved_bytes for options in ARMS.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="CSV file (default: print)")
    out = parser.parse_args().out
    with out.open("w", newline="", encoding="utf-8") if out else sys.stdout as file:
        writer = csv.writer(file)
        writer.writerow(["model", *ARMS])
        for name, model, inputs, autocast in models():
            writer.writerow([name, *measure(model, inputs, autocast)])


if __name__ == "__main__":
    main()
