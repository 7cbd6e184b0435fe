"""Export a language model in every layout that others read, load each by transformers, and compare the logits.

    python examples/export.py                                    # a small Llama of random weights
    python examples/export.py --model path/to/model --out exported

Each line is a checkpoint in a folder of its own, which ``AutoModelForCausalLM.from_pretrained`` loads without qcompile.
``meant`` is how far the loaded model is from the packed one: 0, or the last bit of a sum. ``wide`` is what quantization
itself changes. Both are the largest difference of a logit. Needs ``pip install compressed-tensors bitsandbytes``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import qcompile

#: Name of the folder → how weights are stored, the layout, and what it needs beyond.
EXPORTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "int4": ("int4 block64", "compressed-tensors", {}),
    "int8": ("int8 row", "compressed-tensors", {}),
    "e2m1_as_int8": ("e2m1 row", "compressed-tensors", {"bits": 8}),
    "nf4": ("nf4 block64 absmax_bnb; nested", "bitsandbytes", {}),
    "fp4": ("fp4bnb block64 absmax_bnb", "bitsandbytes", {}),
}
SMALL = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def prepared(path: str | None) -> Any:
    """The model to export, in float32, in which every layout but NVFP4's and MXFP4's has our scales."""
    if path is None:
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 35)[None]).logits


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of a transformers model (default: a small Llama, random)")
    parser.add_argument("--out", type=Path, default=Path("exported"))
    given = parser.parse_args(arguments)
    table = Table("folder", "stored as", "layout", "MB", "meant", "wide")
    try:
        model = prepared(given.model)
        wide = logits(model)
        for name, (spec, layout, options) in EXPORTS.items():
            packed = copy.deepcopy(model)
            qcompile.pack_(packed, spec)
            result = qcompile.export(packed, given.out / name, layout, **options)
            meant = logits(packed)
            other = transformers.AutoModelForCausalLM.from_pretrained(given.out / name)
            # In evaluation bitsandbytes rounds to BF16 on some CPUs.
            found = logits(other.train(layout == "bitsandbytes"))
            distances = [f"{float((found - reference).abs().max()):.2g}" for reference in (meant, wide)]
            table.add_row(name, spec, layout, f"{result.bytes / 1e6:.2f}", *distances)
    except (ValueError, OSError, ImportError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    Console(highlight=False).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
