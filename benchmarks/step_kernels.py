"""Which kernels one 4-bit training step launches, and which ops each was fused from.

    python benchmarks/step_kernels.py [--out FILE]

Profiles a two-layer Llama block stack on CUDA under `inductor` and `qcompile_fp4` and writes a Markdown table a
backend: kernel, launches, microseconds. Inductor names a generated kernel after the ops in it, so
`triton_per_fused_..._quantize_...` is a quantize fused with its producer.
"""

from __future__ import annotations

import argparse
import datetime
import sys

import torch
from torch.profiler import ProfilerActivity, profile


def kernel_table(backend: str, steps: int = 3) -> str:
    """Markdown rows of the kernels of one step (means over ``steps``), most expensive first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch._dynamo.reset()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    ids = torch.randint(0, 4096, (8, 1024), device="cuda")
    compiled = torch.compile(model, backend=backend)
    for _ in range(3):
        compiled(input_ids=ids, labels=ids).loss.backward()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            compiled(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
    events = sorted(trace.key_averages(), key=lambda e: -e.device_time_total)
    rows = [
        f"| `{e.key[:140]}` | {e.count / steps:g} | {e.device_time_total / steps:.0f} |"
        for e in events
        if e.device_time_total
    ]
    total = sum(e.device_time_total for e in events) / steps
    head = f"### {backend}: {total / 1e3:.2f} ms of kernels per step\n\n"
    return head + "\n".join(["| kernel | launches | µs per step |", "|---|---:|---:|", *rows]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="-", help="Markdown file to write (default: standard output)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("step_kernels: needs a CUDA card", file=sys.stderr)
        return 2
    stamp = f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    text = (
        f"# Kernels of one training step\n\n{stamp}. Llama, 2 layers, d=1024, ff=2816, 8×1024 tokens, BF16 weights.\n\n"
    )
    text += "\n".join(kernel_table(backend) for backend in ("inductor", "qcompile_fp4"))
    if arguments.out == "-":
        print(text)
    else:
        with open(arguments.out, "w", encoding="utf-8") as file:
            file.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
