"""Tensor-parallel models on one rank of two.

``python tensor_parallel.py GROUP RANK WORLD DIRECTORY`` runs :data:`CELLS` whose names begin with ``GROUP``, over gloo
on the CPU, or over NCCL on the first GPU that it sees if ``QCOMPILE_TEST_DEVICE=cuda``.
"""

from __future__ import annotations

import datetime
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.passes.pass_base import Observations
from qcompile.recipes import RECIPES

DEVICE = os.environ.get("QCOMPILE_TEST_DEVICE", "cpu")
WORLD = 2
VOCABULARY, WIDTH, HIDDEN, LAYERS, STEPS = 64, 64, 96, 2, 3


class MLP(nn.Module):
    def __init__(self, width: int = 48, hidden: int = 80) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def llama() -> nn.Module:
    """A Llama with grouped queries and a head of its own, attention written out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


#: Sharded by rows of the weight (outputs), by columns (inputs).
COLWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "up")
ROWWISE = ("o_proj", "down_proj", "down")


def llama_plan() -> dict[str, ParallelStyle]:
    """Hidden states sharded along the sequence between the layers, as torch's tutorial has it."""
    gathered = {"desired_input_layouts": (Replicate(),)}
    return {
        "model.embed_tokens": RowwiseParallel(
            input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False
        ),
        "model.layers.*.input_layernorm": SequenceParallel(),
        "model.layers.*.self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
        ),
        "model.layers.*.post_attention_layernorm": SequenceParallel(),
        "model.layers.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), **gathered),
        **{f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in COLWISE[:3]},
        **{f"model.layers.*.mlp.{name}": ColwiseParallel() for name in COLWISE[3:5]},
        "model.layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def compiled(model: nn.Module, recipe: str, observed: list[Observations], **options: Any) -> nn.Module:
    """``model`` compiled: on CPUs through all passes, the graphs then executed."""
    if DEVICE == "cuda":
        model.compile(backend=recipe, options=options, fullgraph=True)
        return model

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        observed.append(Observations())
        return compile_with(
            RECIPES[recipe], gm, inputs, options={"debug": True, **options}, observe=observed[-1],
            inner_compile=compat.eager_inner_compile,
        )  # fmt: skip

    model.compile(backend=backend, fullgraph=True)
    return model


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu().clone()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters()}


def inputs() -> Tensor:
    """The MLP's ``[6, 5, 48]``, with an outlier in every row."""
    x = torch.randn(6, 5, 48, generator=torch.Generator().manual_seed(5))
    x[..., 7] += 6
    return x.to(DEVICE)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (3, 17), generator=generator).to(DEVICE) for _ in range(STEPS)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    """An optimizer step a batch; losses, gradients of the first step, parameters at the end."""
    optimizer, losses, first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), [], {}
    for tokens in data:
        loss = loss_of(model, tokens)
        loss.backward()
        losses.append(loss.detach().cpu())
        first = first or gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": first, "parameters": {n: whole(p) for n, p in model.named_parameters()}}


# --- cells ------------------------------------------------------------------------------------------------------------


def mesh_of_ranks() -> DeviceMesh:
    return init_device_mesh(DEVICE, (WORLD,))


def mlp(recipe: str) -> dict[str, Any]:
    model, observed = MLP().to(DEVICE), []  # type: ignore[var-annotated]
    parallelize_module(model, mesh_of_ranks(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    compiled(model, recipe, observed)
    x = inputs().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    (seen,) = observed
    return {
        "y": whole(y), "gradients": {"x": x.grad, **gradients_of(model)}, "gemms": seen.gemms, "saved": seen.saved,
    }


CELLS = {"tp_mlp_fp4": lambda: mlp("qcompile_fp4"), "tp_mlp_quest": lambda: mlp("qcompile_quest")}


def train_llama(recipe: str) -> dict[str, Any]:
    model, observed = llama().to(DEVICE), []
    parallelize_module(model, mesh_of_ranks(), llama_plan())
    r = train(compiled(model, recipe, observed), batches())
    (seen,) = observed
    return {**r, "gemms": seen.gemms, "saved": seen.saved}

CELLS |= {"tp_llama_fp4": lambda: train_llama("qcompile_fp4"), "tp_llama_quest": lambda: train_llama("qcompile_quest")}

def main(group: str, rank: int, world: int, directory: Path) -> None:
    on_gpu = DEVICE == "cuda"
    torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
        device_id=torch.device("cuda", 0) if on_gpu else None,
    )
    for name, cell in CELLS.items():
        if name.startswith(group):
            print(f"{name}:", flush=True)
            torch._dynamo.reset()
            torch.save(cell(), directory / f"{name}.rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
