"""Tensor-parallel models on one rank of two.

``python tensor_parallel.py GROUP RANK WORLD DIRECTORY`` runs :data:`CELLS` whose names begin with ``GROUP``, over gloo
on the CPU, or over NCCL on the first GPU that it sees if ``QCOMPILE_TEST_DEVICE=cuda``.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
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
VOCABULARY, WIDTH, HIDDEN, LAYERS, STEPS = 64, 64, 96, 1, 2


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


#: Layers whose weight is sharded along its inputs; the others' along outputs.
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
        **{f"model.layers.*.self_attn.{name}": ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")},
        **{f"model.layers.*.mlp.{name}": ColwiseParallel() for name in ("gate_proj", "up_proj")},
        "model.layers.*.self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "model.layers.*.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


#: Rows are too short to have anything beyond the 99 % quantile.
OPTIONS: dict[str, dict[str, Any]] = {
    "qcompile_fp4": {"activation": {"outliers": "occ(alpha=0.95)"}},
    "qcompile_quest": {},
}
#: Rotations that are not computed are roundings that are not made: after a step of training a code goes the other way.
EVERY_ROTATION = {"disable_passes": ["cancel_rotations"]}


def compile_arguments(recipe: str, observed: list[Observations], **options: Any) -> dict[str, Any]:
    """For ``torch.compile``. On CPUs the graphs are executed after all passes, and ``observed`` is filled."""
    options = {**OPTIONS[recipe], **options}
    if DEVICE == "cuda":
        return {"backend": recipe, "options": options, "fullgraph": True}

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        observed.append(Observations())
        return compile_with(
            RECIPES[recipe], gm, inputs, options={"debug": True, **options}, observe=observed[-1],
            inner_compile=compat.eager_inner_compile,
        )  # fmt: skip

    return {"backend": backend, "fullgraph": True}


def whole(x: Tensor) -> Tensor:
    """A copy on the CPU of a tensor or of all its shards."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu().clone()


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def tokens_with_outliers(*shape: int) -> Tensor:
    """Normal numbers of this shape, the same in every process, some channels much larger than others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    return (x * (1 + 6 * (torch.arange(shape[-1]) % 11 == 7))).to(DEVICE)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (3, 17), generator=generator).to(DEVICE) for _ in range(STEPS)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, under: Callable[[Tensor], Any] = contextlib.nullcontext) -> dict[str, Any]:
    """One optimizer step a batch, forwards under ``under(batch)``; losses, gradients of the first step, parameters."""
    optimizer, losses, first = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), [], {}
    for tokens in batches():
        with under(tokens):
            loss = loss_of(model, tokens)
        loss.backward()
        losses.append(loss.detach().cpu())
        first = first or gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: whole(p) for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), "gradients": first, "parameters": parameters}


@dataclass(frozen=True)
class Product:
    """A function of x and w, DTensors with these shapes, placements and contracted axes."""

    function: Callable[[Tensor, Tensor], Tensor]
    x: tuple[int, ...]
    x_placement: Placement
    w: tuple[int, ...]
    w_placement: Placement
    axes: tuple[int, int] = (-1, -2)


PRODUCTS: dict[str, Product] = {
    "outputs": Product(torch.matmul, (6, 5, 48), Replicate(), (48, 32), Shard(1)),
    "inputs": Product(torch.matmul, (6, 5, 48), Shard(2), (48, 32), Shard(0)),
    "inputs_unevenly": Product(torch.matmul, (6, 5, 47), Shard(2), (47, 32), Shard(0)),
    "tokens": Product(torch.matmul, (6, 5, 48), Shard(0), (48, 32), Replicate()),
    # Placed so that the product has to move one of them: scales are those of how the operands came.
    "one_moves": Product(F.linear, (6, 5, 48), Shard(0), (32, 48), Shard(1), (-1, -1)),
    "transposed": Product(lambda x, w: F.linear(x, w.transpose(0, 1)), (6, 5, 48), Shard(2), (48, 32), Shard(0)),
    "einsum": Product(lambda x, w: torch.einsum("btk,kn->btn", x, w), (6, 5, 48), Shard(2), (48, 32), Shard(0)),
    "heads": Product(lambda x, w: torch.einsum("bhk,hkn->bhn", x, w), (6, 4, 48), Shard(1), (4, 48, 8), Shard(0)),
}


def run_product(name: str, recipe: str) -> dict[str, Tensor]:
    product, observed = PRODUCTS[name], []  # type: ignore[var-annotated]
    mesh = mesh_of_ranks()
    x = distribute_tensor(tokens_with_outliers(*product.x), mesh, [product.x_placement]).requires_grad_()
    w = nn.Parameter(distribute_tensor(tokens_with_outliers(*product.w), mesh, [product.w_placement]))
    y = torch.compile(product.function, **compile_arguments(recipe, observed))(x, w)
    y.square().mean().backward()
    assert all(decision.quantized for seen in observed for decision in seen.plan.decisions)
    return {"y": whole(y), "x": whole(x.grad), "w": whole(w.grad)}


# --- cells ------------------------------------------------------------------------------------------------------------


@functools.cache  # uneven shards on a second, equal mesh fail in AOTAutograd (2.13, plain Inductor too)
def mesh_of_ranks() -> DeviceMesh:
    return init_device_mesh(DEVICE, (WORLD,))


def sharded_mlp() -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(MLP().to(DEVICE), mesh_of_ranks(), plan)


def seen_by_passes(observed: list[Observations]) -> dict[str, Any]:
    """Of a compiled graph: products, saved tensors, and what the plan says of each layer."""
    if DEVICE == "cuda":
        return {}
    (seen,) = observed
    plan = [(d.site.name, d.quantized, d.reason) for d in seen.plan.decisions]  # type: ignore[union-attr]
    # Without the marks of passes, which are no plain data: what ranks hand over is loaded with weights_only=True.
    saved = [{key: value for key, value in tensor.items() if key != "custom"} for tensor in seen.saved]
    return {"gemms": seen.gemms, "saved": saved, "plan": plan}


def mlp(recipe: str, **options: Any) -> dict[str, Any]:
    model, observed = sharded_mlp(), []  # type: ignore[var-annotated]
    x = tokens_with_outliers(6, 5, 48).requires_grad_()
    model.compile(**compile_arguments(recipe, observed, **options))
    y = model(x)
    y.square().mean().backward()
    return {"y": whole(y), "gradients": {"x": whole(x.grad), **gradients_of(model)}, **seen_by_passes(observed)}


def mlp_without_gradients(recipe: str) -> dict[str, Any]:
    """``no_grad``, and ``inference_mode``, where composite ops arrive undecomposed at a DTensor."""
    outputs = {}
    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        model = sharded_mlp()
        model.compile(**compile_arguments(recipe, []))
        with mode():
            outputs[mode.__name__] = whole(model(tokens_with_outliers(6, 5, 48)))
    return outputs


def scopes() -> dict[str, str]:
    """What the plan says of the row-wise layer where scales have another scope."""
    told = {}
    for scope in ({"granularity": "tensor"}, {"outliers": "occ(per=tensor)"}, {"granularity": "block8"}):
        torch._dynamo.reset()
        told[str(scope)] = mlp("qcompile_fp4", activation=scope, weight="off")["plan"][1][2]
    return told


def llama_trained(recipe: str) -> dict[str, Any]:
    model, observed = llama().to(DEVICE), []  # type: ignore[var-annotated]
    parallelize_module(model, mesh_of_ranks(), llama_plan())
    model.compile(**compile_arguments(recipe, observed, **EVERY_ROTATION))
    return {**train(model), **seen_by_passes(observed)}


def llama_in_two_dimensions(recipe: str) -> dict[str, Any]:
    """FSDP2 around tensor parallelism, each block compiled. Two ranks leave one to shard over."""
    mesh = init_device_mesh(DEVICE, (1, WORLD), mesh_dim_names=("data", "tensor"))
    model = llama().to(DEVICE)
    parallelize_module(model, mesh["tensor"], llama_plan())
    arguments = compile_arguments(recipe, [], **EVERY_ROTATION)
    for block in model.model.layers:
        block.compile(**arguments)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    assert all(p.device_mesh.ndim == 2 for p in model.parameters())
    return train(model)


def report() -> dict[str, Any]:
    x = tokens_with_outliers(6, 5, 48).requires_grad_()
    own = qcompile.explain(sharded_mlp(), x)
    return {"own": own.to_json(), "merged": own.gather().to_json()}


def monitored() -> dict[str, Any]:
    """SQNR in dB of operands ``[1, 4]``, each rank's of its own shards."""
    monitor, model = qcompile.Monitor(), sharded_mlp()

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_with(
            RECIPES["qcompile_fp4"], gm, inputs, options={"monitor": monitor}, inner_compile=compat.eager_inner_compile
        )

    model.compile(backend=backend, fullgraph=True)
    model(tokens_with_outliers(6, 5, 48))
    monitor.step()
    return {"sqnr": monitor.sqnr(), "layers": [layer[0] for layer in monitor.layers]}


CELLS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"tp_{name}": functools.partial(run_product, name, "qcompile_fp4") for name in PRODUCTS},
    **{
        f"tp_{cell.__name__}_{recipe}": functools.partial(cell, f"qcompile_{recipe}")
        for cell in (mlp, mlp_without_gradients, llama_trained)
        for recipe in ("fp4", "quest")
    },
    "tp_llama_in_two_dimensions_fp4": lambda: llama_in_two_dimensions("qcompile_fp4"),
    "tp_scopes": scopes,
    "tp_report": report,
    "tp_monitored": monitored,
}


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
