"""What the tests of training on two GPUs train, on one process and on each of two.

``python distributed_worker.py GROUP RANK WORLD DIRECTORY`` runs :data:`CELLS` whose names begin with ``GROUP``, over
NCCL on the first GPU that it sees, or over gloo on the CPU if ``QCOMPILE_TEST_DEVICE=cpu``: the same cells, so that
they can be tried without a card.
"""

from __future__ import annotations

import copy
import datetime
import functools
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.distributed import fp8_gradients, fp8_lm_gradients, fp8_weights
from qcompile.recipes import RECIPES
from tests.distributed import worker as wire

DEVICE = os.environ.get("QCOMPILE_TEST_DEVICE", "cuda")
VOCABULARY, WIDTH, HIDDEN, HEADS, LAYERS = 512, 256, 640, 4, 2
ROWS, LENGTH, STEPS = 4, 128, 5

#: Name of a test's recipe → backend and options.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp4": ("qcompile_fp4", {}),
    "fp8_products": ("qcompile_fp4", {"backward": "fp8", "activation": {"outliers": "occ(residual=e4m3)"}}),
    "quest": ("qcompile_quest", {"bits": 4}),
}
#: The one whose weights may travel in 8 bits.
STRAIGHT = {"straight": ("qcompile_fp4", {"weight": {"estimator": "ste"}})}


class Block(nn.Module):
    """A Llama's block, but for rotary positions. Attention is written out: fused kernels sum dQ in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.mT * (WIDTH // HEADS) ** -0.5).masked_fill(future, float("-inf"))
        attended = scores.float().softmax(-1).to(x.dtype) @ v
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm, self.lm_head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


@functools.cache  # Dynamo shares graphs between blocks of one backend, not between backends that do the same
def compile_arguments(recipe: str) -> dict[str, Any]:
    """For ``torch.compile``. On CPUs, where compiling would take minutes, graphs are executed after all passes."""
    backend, options = (SETTINGS | STRAIGHT)[recipe]
    if DEVICE == "cuda":
        return {"backend": backend, "options": options}

    def eagerly(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return compile_with(RECIPES[backend], gm, inputs, options=options, inner_compile=compat.eager_inner_compile)

    return {"backend": eagerly}


def batches() -> list[Tensor]:
    """Tokens ``[ROWS, LENGTH + 1]`` of each step, the same in every process, of frequencies worth learning."""
    generator = torch.Generator().manual_seed(11)
    frequencies = (torch.arange(VOCABULARY) + 3.0) ** -1.5
    draws = [torch.multinomial(frequencies, ROWS * (LENGTH + 1), True, generator=generator) for _ in range(STEPS)]
    return [tokens.view(ROWS, -1).to(DEVICE) for tokens in draws]


def loss_of(call: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in float32."""
    return F.cross_entropy(call(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def whole(x: Tensor) -> Tensor:
    """A copy on the CPU of a tensor or of all its shards."""
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().cpu().clone()


def compile_blocks(model: Decoder, recipe: str) -> None:
    for block in model.blocks:
        block.compile(fullgraph=True, **compile_arguments(recipe))


def train(
    model: nn.Module, call: Callable[[Tensor], Tensor], data: list[Tensor], gradient_of: Callable[..., Tensor]
) -> dict[str, Any]:
    """One optimizer step a batch; the losses, the gradients of the first step, the parameters at the end.

    ``gradient_of(call, tokens)`` leaves the gradients in the parameters of ``model`` and returns the loss.
    """
    optimizer, losses, first = sgd(model), [], {}
    for tokens in data:
        losses.append(gradient_of(call, tokens).detach().cpu())
        first = first or {name: whole(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    end = {name: whole(p) for name, p in model.named_parameters()}
    return {"losses": torch.stack(losses), "gradients": first, "parameters": end}


def backward(call: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    loss = loss_of(call, tokens)
    loss.backward()
    return loss


def single_gpu(recipe: str, dtype: torch.dtype, parts: int) -> dict[str, Any]:
    """One process on whole batches, each in ``parts`` micro-batches whose gradients are added up in float32.

    The optimizer has float32 parameters; the blocks, compiled one by one, read them rounded to ``dtype``.
    """
    torch._dynamo.reset()
    model = Decoder().to(DEVICE)
    working = copy.deepcopy(model).to(dtype)
    compile_blocks(working, recipe)

    def gradient_of(call: Any, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            for p, master in zip(working.parameters(), model.parameters(), strict=True):
                p.copy_(master)
                master.grad = torch.zeros_like(master)
        total = torch.zeros((), device=DEVICE)
        for part in tokens.chunk(parts):
            total += backward(working, part).detach() / parts
            for p, master in zip(working.parameters(), model.parameters(), strict=True):
                master.grad += p.grad.float() / parts
            working.zero_grad()
        return total

    return train(model, working, batches(), gradient_of)


# --- cells ------------------------------------------------------------------------------------------------------------


def mine() -> list[Tensor]:
    """This rank's rows of every batch."""
    return [tokens.chunk(dist.get_world_size())[dist.get_rank()] for tokens in batches()]


#: torch's hook under another name: by its own, torch refuses to register it on CPUs.
in_bfloat16 = lambda state, bucket: bf16_compress_hook(None, bucket)  # noqa: E731  (annotations would be checked)


def ddp(recipe: str, hook: Any = None) -> dict[str, Any]:
    """``torch.compile(DistributedDataParallel(model))`` in float32, as its documentation has it."""
    model = Decoder().to(DEVICE)
    wrapped = DistributedDataParallel(model)
    if hook is not None:
        wrapped.register_comm_hook(None, hook)
    return train(model, torch.compile(wrapped, **compile_arguments(recipe)), mine(), backward)


def fsdp(recipe: str, **policy: torch.dtype) -> dict[str, Any]:
    """Each block compiled and sharded, then what is left of the model."""
    model = Decoder().to(DEVICE)
    compile_blocks(model, recipe)
    for block in model.blocks:
        fully_shard(block, mp_policy=MixedPrecisionPolicy(**policy))
    fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return train(model, model, mine(), backward)


def fp8_gradients_of(how: str, make: Callable[..., Any] = fp8_gradients, passes: int = 2) -> dict[str, Any]:
    """The first batch's gradients of the decoder in float32, as they are and in 8 bits, and what was sent for these."""
    found: dict[str, Any] = {}
    for fp8 in (False, True):
        model: nn.Module = Decoder().to(DEVICE)
        if how == "ddp":
            model = DistributedDataParallel(model, bucket_cap_mb=2)
        else:
            for block in model.blocks:
                fully_shard(block)
            fully_shard(model)
        traffic = make(model) if fp8 else None
        for tokens in (mine()[0],) * passes:  # DDP puts all in one bucket the first time
            model.zero_grad()
            backward(model, tokens)
        found["fp8" if fp8 else "wide"] = {name: whole(p.grad) for name, p in model.named_parameters()}
    return found | {"traffic": {name: vars(traffic)[name] for name in ("bytes", "wide_bytes")}}


def fp8_weights_of() -> dict[str, Any]:
    """The first loss and its gradients with compiled blocks, whose weights are gathered as they are and in 8 bits."""
    tokens, (_, options) = mine()[0], STRAIGHT["straight"]
    explained = qcompile.explain(Decoder().to(DEVICE).bfloat16(), tokens[:, :-1], options=options)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found: dict[str, Any] = {}
    for narrow in (False, True):
        model: nn.Module = Decoder().to(DEVICE)
        for block in model.blocks:
            block.compile(**compile_arguments("straight"))
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        traffic = fp8_weights(model, explained) if narrow else None
        loss = backward(model, tokens)
        found["narrow" if narrow else "wide"] = {name: whole(p.grad) for name, p in model.named_parameters()}
        found["narrow loss" if narrow else "wide loss"] = loss.detach().cpu()
    return found | {"weights": list(traffic.weights), "ratio": traffic.bytes / traffic.wide_bytes}


def fp8_sums() -> dict[str, Any]:
    """The two collectives on flat tensors."""
    return wire.direct(DEVICE)


def report(recipe: str) -> dict[str, Any]:
    """What each rank is told of its own half of a batch, merged."""
    backend, options = SETTINGS[recipe]
    model = Decoder().to(DEVICE).bfloat16()
    own = qcompile.explain(model, mine()[0][:, :-1], backend=backend, options=options)
    return {"own": own.to_json(), "merged": own.gather().to_json()}


def cells_of(recipe: str) -> dict[str, Callable[[], dict[str, Any]]]:
    bfloat16 = functools.partial(fsdp, recipe, param_dtype=torch.bfloat16)
    return {
        f"two_{recipe}_ddp": functools.partial(ddp, recipe),
        f"two_{recipe}_ddp_reduce": functools.partial(ddp, recipe, in_bfloat16),
        f"two_{recipe}_fsdp": functools.partial(fsdp, recipe),
        f"two_{recipe}_fsdp_bf16": functools.partial(bfloat16, reduce_dtype=torch.float32),
        f"two_{recipe}_fsdp_bf16_reduce": functools.partial(bfloat16, reduce_dtype=torch.bfloat16),
        f"two_{recipe}_report": functools.partial(report, recipe),
    }


#: What a test asks for by name.
CELLS = {name: cell for recipe in SETTINGS for name, cell in cells_of(recipe).items()} | {
    "wire_sums": fp8_sums,
    "wire_ddp": functools.partial(fp8_gradients_of, "ddp"),
    "wire_fsdp": functools.partial(fp8_gradients_of, "fsdp"),
    "wire_fp8_lm": functools.partial(fp8_gradients_of, "ddp", fp8_lm_gradients, passes=8),  # until µ has settled
    "wire_weights": fp8_weights_of,
}


def main(group: str, rank: int, world: int, directory: Path) -> None:
    on_gpu = DEVICE == "cuda"
    if on_gpu:
        torch.cuda.set_device(0)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=120),
        device_id=torch.device("cuda", 0) if on_gpu else None,
    )
    failed = []
    for name, cell in CELLS.items():
        if name.startswith(group):
            torch._dynamo.reset()
            try:
                torch.save(cell(), directory / f"{name}.rank{rank}.pt")
            except Exception:  # time on two cards is rare: the others may still tell something
                failed.append(name)
                print(f"{name}:\n{traceback.format_exc()}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
