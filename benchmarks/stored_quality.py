"""Perplexity of a pretrained language model whose weights are stored in 4 or 8 bits, beside its own in BF16.

    python benchmarks/stored_quality.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out stored_quality_cpu.csv \\
        --text wikitext2=test.txt docs=valid.txt.xz

The model is a folder of transformers' or a GGUF file. A text is cut into windows of ``--context`` tokens, and every
token but a window's first is predicted from those before it in its window; perplexity is exp of the mean loss of the
first ``--tokens``. Decoder layers are compiled one by one, so that one compilation serves them all.

Writes a CSV file after every arm.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import brief, failure, fresh_log, quiet_stderr, write_rows
from torch import Tensor

import qcompile

__all__ = ["ARMS", "BASELINE", "Arm", "Row", "load", "main", "perplexity", "tokenizer_of", "windows_of"]


@dataclass(frozen=True)
class Arm:
    """How weights are stored ("" for wide ones), and what the layers are compiled with."""

    spec: str = ""
    backend: str = "qcompile_stored"
    options: dict[str, Any] = field(default_factory=dict)


BASELINE = "bf16"
ARMS = {
    BASELINE: Arm(backend="inductor"),
    "nf4 nested": Arm("nf4 block64 absmax_bnb; nested"),
    "int4 g32": Arm("int4 block32"),
    "int4 g32, float zeros": Arm("uint4 block32; zeros"),
    "nvfp4": Arm("e2m1 block16 e4m3"),
    "mxfp4": Arm("e2m1 block32 e8m0"),
    "llm.int8": Arm("int8 row", "qcompile_llm_int8"),
    "e2m1 row": Arm("e2m1 row"),
    "e2m1 row, W4A4": Arm("e2m1 row", options={"activation": "e2m1 row"}),
    "e2m1 row, W4A4, OCC": Arm("e2m1 row", options={"activation": "e2m1 row absmax even; ste; occ(residual=e4m3)"}),
}


@dataclass(frozen=True)
class Row:
    """One arm on one text. ``over_bf16``: perplexity over that of BF16; ``bits``: of a packed weight, with scales."""

    model: str
    text: str
    arm: str
    spec: str
    bits: float = 16.0
    tokens: int = 0
    context: int = 0
    perplexity: float = math.nan
    over_bf16: float = math.nan
    seconds: float = math.nan
    error: str = ""


def load(path: Path, device: str) -> Any:
    """The model in BF16, of a folder or a GGUF file."""
    where, options = _source(path)
    if options:  # plain layers, instead of those that keep GGUF's blocks
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16, **options)
    return model.to(device).eval()


def tokenizer_of(path: Path) -> Any:
    where, options = _source(path)
    return transformers.AutoTokenizer.from_pretrained(where, **options)


def _source(path: Path) -> tuple[Path, dict[str, Any]]:
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})


def windows_of(path: Path, tokenizer: Any, tokens: int, context: int) -> Tensor:
    """The beginning of a text (.xz or plain) as int64 ``[windows, context]``."""
    with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
        ids = tokenizer(file.read(16 * tokens), return_tensors="pt", verbose=False)["input_ids"][0]
    count = min(tokens, len(ids)) // context
    if not count:
        msg = f"{path}: has {len(ids)} tokens, less than a window of {context}"
        raise ValueError(msg)
    return ids[: count * context].view(count, context)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor) -> float:
    """Of int64 ``[windows, context]``, one window at a time."""
    losses = [model(input_ids=w, labels=w, use_cache=False).loss.double() for w in windows.to(model.device).split(1)]
    return math.exp(torch.stack(losses).mean().item())


def prepared(arm: Arm, path: Path, device: str) -> tuple[Any, float]:
    """The compiled model, and bits per packed weight."""
    model = load(path, device)
    bits = qcompile.pack_(model, arm.spec).bits_per_weight if arm.spec else 16.0
    torch.compiler.reset()
    for layer in model.model.layers:
        layer.compile(backend=arm.backend, options=dict(arm.options) or None, dynamic=False)
    return model, bits


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model, or a GGUF file")
    parser.add_argument("--text", nargs="+", required=True, metavar="NAME=FILE", help="texts, .xz or plain")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=8192, help="of each text (default: 8192)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(argv)
    log = fresh_log(given.out)
    try:
        tokenizer = tokenizer_of(given.model)
        files = dict(text.split("=", 1) for text in given.text)
        texts = {name: windows_of(Path(file), tokenizer, given.tokens, given.context) for name, file in files.items()}
    except (ValueError, OSError) as error:
        print(f"stored_quality: {brief(error)}", file=sys.stderr)
        return 2
    base: dict[str, float] = {}
    rows: list[Row] = []
    for arm in given.arms:
        try:
            with quiet_stderr(log):
                model, bits = prepared(ARMS[arm], given.model, given.device)
            for name, windows in texts.items():
                start = time.perf_counter()
                with quiet_stderr(log):
                    found = perplexity(model, windows)
                base |= {name: found} if arm == BASELINE else {}
                figures = windows.numel(), given.context, found, found / base.get(name, math.nan)
                seconds = time.perf_counter() - start
                rows.append(Row(given.model.stem, name, arm, ARMS[arm].spec, bits, *figures, seconds))
                print(f"{name:12} {arm:24} {found:9.4f} {rows[-1].over_bf16:8.4f} {seconds:6.1f} s", flush=True)
        except Exception as error:  # the others go on
            rows.append(Row(given.model.stem, "", arm, ARMS[arm].spec, error=failure(error, log, arm)))
            print(f"{arm}: {brief(error)}", file=sys.stderr)
        write_rows(given.out, rows)
    return 1 if any(row.error for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
