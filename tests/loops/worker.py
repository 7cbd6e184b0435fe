"""What the tests of training loops train, and the process that trains it on one rank.

``python worker.py GROUP RANK WORLD DIRECTORY`` runs those entries of :data:`CELLS` over gloo whose names begin with
``GROUP``, meets the other ranks at ``DIRECTORY/rendezvous`` and leaves what the tests compare in
``DIRECTORY/{CELL}.rank{RANK}.pt``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import RECIPES
from tests.loops.cells import run_cells

VOCABULARY, WIDTH, LAYERS, STEPS = 57, 36, 2, 4
#: The decoder's head is tied to its embedding and would stay wide: both uses of one weight are to be tested.
HEADS = {"heads": True}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp_norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 52), nn.Linear(52, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (3, 12)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Decoder(nn.Module):
    """A language model whose head is its embedding, each block called through ``wrap``."""

    def __init__(
        self, wrap: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x), layers: int = LAYERS
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.wrap = wrap

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = self.wrap(block, x)
        return self.head(self.norm(x))


@functools.cache  # Dynamo shares graphs between blocks of one backend, not between backends that do the same
def backend_of(recipe: str) -> Callable[..., Any]:
    """A backend that runs every pass and then executes the graphs eagerly; the decoder's tied head is quantized too."""
    with_heads = RECIPES[recipe].override(HEADS)

    def backend(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        return compile_with(with_heads, gm, inputs, inner_compile=compat.eager_inner_compile, **kwargs)

    return backend


def batches(steps: int = STEPS, rows: int = 4, length: int = 9) -> list[Tensor]:
    """Tokens ``[rows, length + 1]`` of each step, the same in every process."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (rows, length + 1), generator=generator) for _ in range(steps)]


def loss_of(call: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    return F.cross_entropy(call(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def train(call: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, data: Iterable[Tensor]) -> list[Tensor]:
    """One optimizer step a batch; returns the losses."""
    losses = []
    for tokens in data:
        loss = loss_of(call, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters by name, those in shards gathered."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def mine(data: list[Tensor]) -> list[Tensor]:
    """This rank's rows of every batch."""
    return [tokens.chunk(dist.get_world_size())[dist.get_rank()] for tokens in data]


# --- cells ------------------------------------------------------------------------------------------------------------


def ddp(recipe: str, bucket_bytes: int = 25 << 20) -> dict[str, Any]:
    """``torch.compile(DistributedDataParallel(model))``; small buckets make Dynamo split the graph between them."""
    # No public setting makes the first bucket smaller than a megabyte, or another smaller than the first.
    dist._DEFAULT_FIRST_BUCKET_BYTES = min(bucket_bytes, dist._DEFAULT_FIRST_BUCKET_BYTES)
    model = DistributedDataParallel(Decoder(), bucket_cap_mb=bucket_bytes / 2**20)
    compiled = 0

    def backend(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return backend_of(recipe)(gm, inputs, **kwargs)

    losses = train(torch.compile(model, backend=backend), sgd(model), mine(batches()))
    return {"losses": losses, "parameters": parameters_of(model.module), "graphs": compiled}


def ddp_accumulating(recipe: str) -> dict[str, Any]:
    """Two micro-batches per step, gradients exchanged after the second alone."""
    model = DistributedDataParallel(Decoder())
    call, optimizer = torch.compile(model, backend=backend_of(recipe)), sgd(model)
    for tokens in mine(batches()):
        first, second = tokens.chunk(2)
        with model.no_sync():
            (loss_of(call, first) / 2).backward()
        (loss_of(call, second) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"parameters": parameters_of(model.module)}


def sharded(recipe: str, **policy: torch.dtype) -> nn.Module:
    """Each block compiled and sharded, then what is left of the model."""
    model = Decoder()
    for block in model.blocks:
        block.compile(backend=backend_of(recipe), fullgraph=True)
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**policy))
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))


def fsdp(recipe: str) -> dict[str, Any]:
    model = sharded(recipe)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    losses = train(model, sgd(model), mine(batches()))
    return {"losses": losses, "parameters": parameters_of(model)}


def fsdp_whole(recipe: str) -> dict[str, Any]:
    """The sharded model compiled as a whole. FSDP's hooks break the graph in the loop over blocks, so Dynamo leaves the
    model's own forward to Python and compiles what it calls.
    """
    model = Decoder()
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    losses = train(torch.compile(model, backend=backend_of(recipe)), sgd(model), mine(batches()))
    return {"losses": losses, "parameters": parameters_of(model)}


def fsdp_bfloat16(recipe: str) -> dict[str, Any]:
    """Parameters gathered in BF16, gradients reduced in FP32; loss of the first step and gradients."""
    model = sharded(recipe, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    loss = loss_of(model, mine(batches())[0])
    loss.backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"losses": [loss.detach()], "gradients": gradients}


def fsdp_checkpoint(recipe: str, directory: Path) -> dict[str, Any]:
    """Saved by ``torch.distributed.checkpoint`` half-way, loaded into a new model, and finished there."""
    data = mine(batches())
    model = sharded(recipe)
    optimizer = sgd(model)
    train(model, optimizer, data[:2])
    saved, state = get_state_dict(model, optimizer)
    dcp.save({"model": saved, "optimizer": state}, checkpoint_id=directory / "checkpoint")
    train(model, optimizer, data[2:])

    resumed = sharded(recipe)
    other = sgd(resumed)
    target, target_state = get_state_dict(resumed, other)
    dcp.load({"model": target, "optimizer": target_state}, checkpoint_id=directory / "checkpoint")
    set_state_dict(resumed, other, model_state_dict=target, optim_state_dict=target_state)
    train(resumed, other, data[2:])
    return {"parameters": parameters_of(model), "resumed": parameters_of(resumed), "keys": sorted(saved)}


def reports() -> dict[str, Any]:
    """Reports merged over ranks as JSON: all alike; with rank 1 given a layer more to skip; of a group that rank 1
    alone is in, or what rank 0 is told of it.
    """
    model, tokens, rank = Decoder(), mine(batches())[0][:, :-1], dist.get_rank()
    same = qcompile.explain(model, tokens)
    other = qcompile.explain(model, tokens, options={"skip": ["head", "up"] if rank else ["head"]})
    alone = dist.new_group([1])
    try:
        of_group = same.gather(alone).to_json()
    except ValueError as error:
        of_group = str(error)
    merged = same.gather()
    assert merged.programs == same.programs
    return {"same": merged.to_json(), "other": other.gather().to_json(), "group": of_group, "own": same.to_json()}


#: What a test asks for by name, given the rendezvous directory.
CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "ddp_fp4": lambda _: ddp("qcompile_fp4"),
    "ddp_quest": lambda _: ddp("qcompile_quest"),
    "ddp_buckets": lambda _: ddp("qcompile_fp4", bucket_bytes=20_000),
    "ddp_accumulating": lambda _: ddp_accumulating("qcompile_fp4"),
    "ddp_reports": lambda _: reports(),
    "fsdp_fp4": lambda _: fsdp("qcompile_fp4"),
    "fsdp_quest": lambda _: fsdp("qcompile_quest"),
    "fsdp_whole": lambda _: fsdp_whole("qcompile_fp4"),
    "fsdp_bfloat16": lambda _: fsdp_bfloat16("qcompile_fp4"),
    "fsdp_checkpoint": lambda directory: fsdp_checkpoint("qcompile_fp4", directory),
}


if __name__ == "__main__":
    run_cells(CELLS)
