"""Pretrain a byte-level Llama on a text file of yours, in 4 bits.

    python examples/pretrain.py my_text.txt

The only line that makes it 4-bit is ``torch.compile``; model, optimizer, data and loop are plain PyTorch.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from qcompile import saved_bytes

BATCH, SEQUENCE, STEPS = 16, 128, 300


def main(path: str, steps: int = STEPS) -> float:
    """Train on the bytes of ``path``; returns the last loss in nats per byte."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).long()
    if len(text) <= SEQUENCE + 1:
        sys.exit(f"{path} is too short: {len(text)} bytes, at least {SEQUENCE + 2} are needed")

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.05,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)  # parameters, checkpoints and optimizer stay FP32
    compiled = torch.compile(model, backend="qcompile_fp4")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)

    for step in range(steps):
        starts = torch.randint(len(text) - SEQUENCE, (BATCH, 1))
        window = text[starts + torch.arange(SEQUENCE + 1)].to(device)
        inputs, targets = window[:, :-1].contiguous(), window[:, 1:].flatten()
        with saved_bytes(model, inputs) as saved, torch.autocast(device, torch.bfloat16):
            logits = compiled(input_ids=inputs).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  saved for backward {saved.total / 1e6:.1f} MB")
        saved.tensors.clear()
    return loss.item()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/pretrain.py TEXT_FILE")
    main(sys.argv[1])
