"""Serve a language model whose weights are stored in 4 bits: pack, compile, generate, and count tokens per second.

    python examples/serve.py                                            # a Llama of 0.3 million weights
    python examples/serve.py --model path/to/model --prompt "What is a compiler?" --tokens 256

``generate`` of transformers compiles each step of decoding by itself where there is a static cache, by the backend that
a ``CompileConfig`` names; its mode "reduce-overhead" records CUDA graphs. A model is a folder or a GGUF file. Needs
``pip install qcompile[examples]``.

What the compiled model has generated is given to the uncompiled one: each token must be the one that it would choose,
but where two logits are as close as rounding. ``off by`` is how far the chosen logit ever was from the best one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from local_model import NF4, SMALL, folder_of
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.stored import bytes_of


def prompted(tokenizer: Any, prompt: str, device: str) -> torch.Tensor:
    """The prompt's tokens ``[1, T]``, as a message of a chat if the model has been tuned for chats."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        found = tokenizer(prompt, return_tensors="pt")
    return found["input_ids"].to(device)


def generated(model: Any, ids: torch.Tensor, tokens: int, backend: str) -> torch.Tensor:
    """Greedy continuation, compiled by a backend, with ids in front."""
    config = transformers.CompileConfig(backend=backend, fullgraph=True, dynamic=False)
    config._compile_all_devices = True  # on a CPU, too
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        cache_implementation="static", compile_config=config, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def off_by(model: Any, output: torch.Tensor, prompt: int) -> float:
    """How far the logit of any generated token is from the best one, by the model without compilation; 0 if none is."""
    logits = model(output).logits[0, prompt - 1 : -1].float()
    banned = [model.generation_config.eos_token_id or []]  # min_new_tokens leaves no other choice
    logits[:, torch.tensor(banned, dtype=torch.int64).flatten()] = -torch.inf
    chosen = logits.gather(1, output[0, prompt:, None])
    return (logits.amax(1, keepdim=True) - chosen).max().item()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMALL, help="folder, or GGUF file")
    parser.add_argument("--spec", nargs="+", default=[NF4, "int4 block32"], help="how weights are stored")
    parser.add_argument("--prompt", default="Once upon a time, there was a little girl named Lily.")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    dtypes = "bfloat16", "float16", "float32"
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of activations and wide weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    table = Table("weights", "model, MB", "tokens/s", "× BF16", "off by")
    base, console = 0.0, Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for spec in given.spec:  # says what is wrong with one before anything is compiled
                qcompile.pack_(torch.nn.Sequential(torch.nn.Linear(256, 256)), spec)
            folder = folder_of(given.model, Path(scratch))
            for spec in ("", *given.spec):
                model = transformers.AutoModelForCausalLM.from_pretrained(
                    folder, dtype=getattr(torch, given.dtype), device_map=given.device
                ).eval()
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                ids = prompted(tokenizer, given.prompt, given.device)
                if spec:
                    qcompile.pack_(model, spec)
                backend = "qcompile_stored" if spec else "inductor"
                torch.compiler.reset()
                output = generated(model, ids, given.tokens, backend)  # compiles
                times = []
                for _ in range(3):
                    start = time.perf_counter()
                    again = generated(model, ids, given.tokens, backend).tolist()  # waits for the card
                    times.append(time.perf_counter() - start)
                    if again != output.tolist():
                        msg = f"{spec or given.dtype}: the same prompt gave {tokenizer.decode(again[0])!r} then"
                        raise ValueError(msg)
                speed = given.tokens / min(times)
                base = base or speed
                distance = off_by(model, output, ids.shape[1])
                console.print(f"[bold]{spec or given.dtype}[/]: {tokenizer.decode(output[0, ids.shape[1] :])!r}")
                figures = f"{bytes_of(model) / 1e6:.1f}", f"{speed:.1f}", f"{speed / base:.2f}", f"{distance:.2g}"
                table.add_row(spec or given.dtype, *figures)
        except (ValueError, OSError) as error:
            print(f"serve: {error}", file=sys.stderr)
            return 2
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
