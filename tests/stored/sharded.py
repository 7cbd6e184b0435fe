"""QLoRA on one rank of two: packed weights under FSDP2, DDP and ``torch.distributed.checkpoint``.

``python sharded.py GROUP RANK WORLD DIRECTORY`` runs :data:`CELLS` whose names begin with ``GROUP`` over gloo, and
leaves what each returned in ``DIRECTORY/{CELL}.rank{RANK}.pt``. ``DIRECTORY/of_one`` is a checkpoint of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import STORED
from qcompile.stored import PackedShard, PackedWeight, load_packed_, packed_state_dict
from tests.loops.cells import run_cells

WIDTH, LAYERS, STEPS, VOCABULARY = 128, 2, 2, 57
NESTED = "nf4 block64 absmax_bnb; nested"
#: Rank 1 starts at the 300th scale of `up`, inside of a block of 256 scales; at row 19 of the 37 of `narrow`.
ROWS = {"up": 300, "narrow": 37}
#: `back` reads 37 elements, which no block divides; a shard of `mix` shares a global scale.
RULES = {"down": "int8 row", "back": "e2m1 row", "mix": "e2m1 block16 e4m3"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, ROWS["up"]), nn.Linear(ROWS["up"], WIDTH)
        self.narrow, self.back = nn.Linear(WIDTH, ROWS["narrow"]), nn.Linear(ROWS["narrow"], WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.norm(x))
        return x + self.down(F.gelu(self.up(y))) + self.back(F.gelu(self.narrow(y)))


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, seed: int = 3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([block() for _ in range(LAYERS)])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def qlora(seed: int = 3) -> nn.Module:
    """Every linear layer but the head stored as codes, with PEFT's adapters, whose numbers are always the same."""
    model = Model(seed=seed)
    qcompile.pack_(model, NESTED, rules=RULES)
    model.requires_grad_(False)
    torch.manual_seed(4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["mix", "up", "down", "narrow", "back"])
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def backend(gm: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    """All passes, then eager execution."""
    return compile_with(STORED, gm, inputs, inner_compile=compat.eager_inner_compile, **kwargs)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(4, 6, WIDTH, generator=generator), torch.randint(VOCABULARY, (4, 6), generator=generator)


def mine() -> tuple[Tensor, Tensor]:
    """This rank's rows of the batch."""
    inputs, targets = batch()
    return inputs.chunk(dist.get_world_size())[dist.get_rank()], targets.chunk(dist.get_world_size())[dist.get_rank()]


def train(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Losses, and the adapters' gradients of the last step."""
    return {"losses": losses_of(model, data), "gradients": gradients_of(model)}


def losses_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Of some steps."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data[0]).float().flatten(0, 1), data[1].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return {
        name.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g.clone()
        for name, g in named
        if g is not None
    }


def parts_of(state: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Of a state: whole packed weights as their parts, everything else as ``{"": tensor}``."""
    assert not {name: value for name, value in state.items() if isinstance(value, (DTensor, PackedShard))}
    return {
        name: {part: t.clone() for part, t in value.parts.items()}
        if isinstance(value, PackedWeight)
        else {"": value.detach().clone()}
        for name, value in state.items()
    }


# --- what travels -----------------------------------------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Op, dtype and number of elements of what a rank gives to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        given = compat.tree_leaves(args)
        if any(isinstance(value, PackedWeight) for value in given):
            return NotImplemented  # and what comes of it is seen
        if namespace == "c10d" or name == "all_gather_into_tensor":
            tensors = [value for value in given if isinstance(value, Tensor)]
            sent = tensors[-1]  # what these ops write into comes first
            self.sent.append((name, str(sent.dtype).removeprefix("torch."), sent.numel()))
        return func(*args, **(kwargs or {}))


@contextmanager
def collectives() -> Iterator[list[tuple[str, str, int]]]:
    with Collectives() as seen:
        yield seen.sent


# --- cells ------------------------------------------------------------------------------------------------------------

FULL = StateDictOptions(full_state_dict=True)


def sharded(compiled: bool = False, seed: int = 3, **options: Any) -> nn.Module:
    """FSDP2 around each block, and around what is left."""
    model = qlora(seed)
    for block in model.blocks:
        if compiled:
            block.compile(backend=backend, fullgraph=True)
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def eager() -> dict[str, Any]:
    model = sharded()
    local = {name: p.to_local() for name, p in model.named_parameters() if "base_layer.weight" in name}
    assert all(type(shard) is PackedShard for shard in local.values())
    rows = {name: shard.decoded() for name, shard in local.items()}
    with collectives() as sent:
        losses = losses_of(model, mine())
    trained = {"losses": losses, "gradients": gradients_of(model)}
    return trained | {"sent": sent, "rows": rows, "bytes": {name: shard.nbytes for name, shard in local.items()}}


def compiled() -> dict[str, Any]:
    return train(sharded(compiled=True), mine())


def offloaded() -> dict[str, Any]:
    return train(sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)), mine())


def bfloat16() -> dict[str, Any]:
    """Weights decode to what FSDP's policy says."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return train(sharded(mp_policy=policy), mine())


def state() -> dict[str, Any]:
    """The full state, with what is gathered for it; and that state loaded into a model of other weights, which has been
    run before.
    """
    model = sharded()
    with collectives() as sent:
        full = get_model_state_dict(model, options=FULL)
    file = packed_state_dict(full)
    other = sharded(seed=5)
    train(other, mine())
    set_model_state_dict(other, dict(full), options=FULL)  # torch changes the dictionary
    local = {n: p.full_tensor() for n, p in other.named_parameters() if "base_layer.weight" in n}
    return {
        "full": parts_of(full),
        "file": file,
        "loaded": parts_of(get_model_state_dict(other, options=FULL)),
        "tensors": parts_of(local),
        "trained": train(other, mine()),
        "sent": sent,
    }


def checkpoint(directory: Path) -> dict[str, Any]:
    """Saved by both ranks; what both have saved, and what one process has, loaded into models of other weights."""
    state = get_model_state_dict(sharded())
    dcp.save(state, checkpoint_id=directory / "of_two")
    loaded = {}
    for name in ("of_two", "of_one"):
        model = sharded(seed=5)
        target = get_model_state_dict(model)
        dcp.load(target, checkpoint_id=directory / name)
        set_model_state_dict(model, target)
        loaded[name] = parts_of(get_model_state_dict(model, options=FULL))
    return loaded


def ddp() -> dict[str, Any]:
    """Rank 0's weights reach rank 1 when the model is wrapped; then the adapters' gradients alone are exchanged."""
    model = qlora()
    with collectives() as sent:
        wrapped = DistributedDataParallel(model)
        del sent[:]
        trained = train(wrapped, mine())
    return trained | {"sent": sent, "full": parts_of(model.state_dict())}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def packed(spec: str, seed: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("up", nn.Linear(WIDTH, ROWS["up"], bias=False))
    qcompile.pack_(model, spec)
    return model.requires_grad_(False)


def columnwise() -> dict[str, Any]:
    """Tensor parallelism in eager torch: a rank decodes its rows. What rank 1 has had is what rank 0 sends it."""
    model = packed(NESTED, seed=dist.get_rank())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"up": ColwiseParallel(output_layouts=Replicate())})
    return {"y": model(batch()[0])}


def errors() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    shards = fully_shard(packed(NESTED))
    wide = {"up.weight": torch.zeros(ROWS["up"], WIDTH)}
    return {
        "squares": error_of(lambda: fully_shard(packed("midrise3 block64x64"))),
        "columns": error_of(lambda: fully_shard(packed(NESTED), shard_placement_fn=lambda _: Shard(1))),
        "halves": error_of(lambda: fully_shard(packed("nf4 block64; nested(int4 block64)"))),
        "rowwise": error_of(lambda: parallelize_module(packed(NESTED), mesh, {"up": RowwiseParallel()})),
        "reduced": error_of(lambda: dist.all_reduce(packed(NESTED).up.weight)),
        "file": error_of(lambda: packed_state_dict(shards)),
        "loaded": error_of(lambda: load_packed_(shards, packed_state_dict(packed(NESTED)))),
        "wide": error_of(lambda: set_model_state_dict(shards, wide, options=FULL)),
    }


CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    **{
        f"quick_{cell.__name__}": lambda _, cell=cell: cell()
        for cell in (eager, compiled, state, ddp, columnwise, errors)
    },
    "quick_checkpoint": checkpoint,
    **{f"quick_{cell.__name__}": lambda _, cell=cell: cell() for cell in (offloaded, bfloat16)},
}


if __name__ == "__main__":
    run_cells(CELLS, timeout=120)
