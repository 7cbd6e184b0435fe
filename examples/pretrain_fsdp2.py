"""Pretrain a byte-level Llama on several GPUs: 4-bit products, FP8 gradients between the GPUs, 8-bit optimizer states.

    torchrun --nproc-per-node 8 examples/pretrain_fsdp2.py --text my_text.txt --out run

Three lines differ from plain PyTorch: ``backend="qcompile_fp4"``, ``fp8_gradients(model)`` and qcompile's ``AdamW``.
Run the same command again to go on from the last checkpoint, on as many GPUs as there are then. Without a GPU it trains
on CPUs over gloo. ``--out`` gets the losses (CSV), their plot, and the checkpoints.
"""

import argparse
import csv
import lzma
import math
import os
import shutil
import sys
import time
from importlib.resources import files
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from qcompile.distributed import fp8_gradients
from qcompile.optim import AdamW

#: Dense BF16 FLOP/s of cards, by what their names contain: what MFU is a share of.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


def build(options, device):
    """The model with FP32 parameters in shards; blocks are compiled, gathered in BF16, and summed up in FP32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=options.width * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.width // 64),
        max_position_embeddings=options.sequence,
        use_cache=False,
    )
    with device:
        model = LlamaForCausalLM(config)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.model.layers:
        block.compile(backend="qcompile_fp4", dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def batch_of(text, step, options, device):
    """This rank's windows of a step: they follow from step and rank, so resuming needs no state."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - options.sequence, (options.batch, 1), generator=generator)
    window = text[starts + torch.arange(options.sequence + 1)].long().to(device)
    return window[:, :-1].contiguous(), window[:, 1:].flatten()


def learning_rate(step, options):
    """Linear warm-up over the first 5 %, then a cosine down to a tenth."""
    warm_up = max(1, options.steps // 20)
    if step < warm_up:
        return options.lr * (step + 1) / warm_up
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, options.steps - warm_up)))


def save(model, optimizer, step, out):
    """A checkpoint; the one before goes once this one is whole."""
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=out / f"step-{step}")
    if dist.get_rank() == 0:
        (out / "latest.part").write_text(str(step))
        (out / "latest.part").replace(out / "latest")
        for other in out.glob("step-*"):
            if other.name != f"step-{step}":
                shutil.rmtree(other)


def resume(model, optimizer, out):
    """Load the last checkpoint; returns the steps that it has behind it."""
    if not (out / "latest").exists():
        return 0
    step = int((out / "latest").read_text())
    weights, states = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=out / f"step-{step}")
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return step


def flops_per_token(model, options):
    """Forward and backward of all products, causal attention's included: 6 per weight, and 6 · width per position."""
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2) - 256 * options.width  # but the embedding's
    return 6 * weights + 6 * options.layers * options.width * options.sequence


def plot(losses, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    figure.savefig(path, dpi=150)


def train(options):
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    first, world = dist.get_rank() == 0, dist.get_world_size()
    data = options.text.read_bytes() if options.text else lzma.decompress(
        files("qcompile.data").joinpath("tinyshakespeare.txt.xz").read_bytes()
    )  # fmt: skip
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if len(text) <= options.sequence + 1:
        sys.exit(f"pretrain_fsdp2: {options.text} has {len(text)} bytes, too few for --sequence {options.sequence}")
    options.out.mkdir(parents=True, exist_ok=True)

    model = build(options, device)
    traffic = fp8_gradients(model)
    optimizer = AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    begin = resume(model, optimizer, options.out)

    table = options.out / "losses.csv"
    losses = [(int(s), float(x)) for s, x in csv.reader(table.open())][:begin] if begin else []
    peak = next((peak for name, peak in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), 0.0)
    per_token, tokens = flops_per_token(model, options), options.batch * options.sequence
    status = TextColumn("{task.fields[status]}")
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), status, TimeRemainingColumn())
    with Progress(*columns, disable=not first) as progress:
        task = progress.add_task("", total=options.steps, completed=begin, status="compiling …")
        since, counted = time.perf_counter(), begin
        for step in range(begin, options.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options)
            inputs, targets = batch_of(text, step, options, device)
            loss = F.cross_entropy(model(input_ids=inputs).logits.float().flatten(0, 1), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach() / world
            dist.all_reduce(mean)
            losses.append((step, mean))  # a tensor: the host does not wait for it here
            done = step + 1
            if done % options.report == 0 or done == options.steps:
                losses = [(s, float(x)) for s, x in losses]
                seconds = (time.perf_counter() - since) / (done - counted)
                status = f"loss {losses[-1][1]:.3f}  {world * tokens / seconds:,.0f} tokens/s"
                if peak:
                    status += f"  MFU {tokens * per_token / seconds / peak:.1%}"
                status += f"  gradients sent {traffic.bytes / (done - counted) / 1e6:.2f} MB per step"
                progress.update(task, completed=done, status=status)
                since, counted = time.perf_counter(), done
                traffic.reset()
            if done % options.save_every == 0 or done == options.steps:
                losses = [(s, float(x)) for s, x in losses]
                if first:  # before the checkpoint that counts on them
                    with table.open("w", newline="") as file:
                        csv.writer(file).writerows(losses)
                save(model, optimizer, done, options.out)
    if first:
        plot(losses, options.out / "loss.png")
        print(f"loss {losses[-1][1]:.3f} after {options.steps} steps; see {options.out}/")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="any file; Shakespeare's works without it")
    parser.add_argument("--out", type=Path, default=Path("pretrain_fsdp2"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16, help="sequences per GPU")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--report", type=int, default=10, help="steps between figures")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
