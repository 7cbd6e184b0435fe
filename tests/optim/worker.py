"""What the distributed tests of optimizers train, and the process that does it on one rank.

Every rank sees the whole batch, so that the mean of the gradients is exactly the gradient of one process, and what is
compared can be compared bit for bit. ``python worker.py GROUP RANK WORLD DIRECTORY`` as in ``tests/loops/worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qcompile.optim import AdamW, Muon
from tests.loops.cells import run_cells

STEPS = 4


class Model(nn.Module):
    """Rows that two ranks part unevenly, blocks of 96, small parameters, and one that rank 1 has nothing of."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(96, 57, dtype=dtype), nn.Linear(57, 96, bias=False, dtype=dtype)
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) * self.scale


def optimizer_of(model: nn.Module, **options: Any) -> AdamW:
    return AdamW(model.parameters(), lr=0.01, seed=7, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 96, generator=torch.Generator().manual_seed(step))
        dtype = next(model.parameters()).dtype
        (model(x.to(dtype)) - x.to(dtype)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def everything(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Parameters and states by name, gathered."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return found


def sharded(**options: Any) -> tuple[nn.Module, AdamW]:
    model = fully_shard(Model())
    return model, optimizer_of(model, **options)


def trained(**options: Any) -> dict[str, Any]:
    model, optimizer = sharded(**options)
    train(model, optimizer, range(STEPS))
    return everything(model, optimizer)


def with_muon(model: nn.Module) -> dict[str, Any]:
    """Its matrices by Muon: their parts are gathered, and half of one cannot be orthogonalized."""
    optimizer = Muon([p for p in model.parameters() if p.dim() == 2], lr=0.05, seed=7)
    train(model, optimizer, range(STEPS))
    found = {name: whole(p) for name, p in model.named_parameters()}
    return found | {
        f"{name}.{key}": whole(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def checkpoint(directory: Path) -> dict[str, Any]:
    """Saved half-way, loaded into a new model, and finished there."""
    model, optimizer = sharded()
    train(model, optimizer, range(STEPS // 2))
    saved, state = get_state_dict(model, optimizer)
    dcp.save({"model": saved, "optimizer": state}, checkpoint_id=directory / "checkpoint")
    return resumed(directory / "checkpoint", sharded)


def resumed(checkpoint: Path, make: Callable[[], tuple[nn.Module, AdamW]]) -> dict[str, Any]:
    model, optimizer = make()
    saved, state = get_state_dict(model, optimizer)
    target = {"model": saved, "optimizer": state}
    dcp.load(target, checkpoint_id=checkpoint, no_dist=not dist.is_initialized())
    set_state_dict(model, optimizer, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    train(model, optimizer, range(STEPS // 2, STEPS))
    return everything(model, optimizer)


def not_finite() -> dict[str, Any]:
    """A step in which one rank's shard of the gradient has a NaN."""
    model, optimizer = sharded()
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    if dist.get_rank() == 1:
        model.up.weight.grad.to_local()[0, 0] = torch.nan
    optimizer.step()
    after = everything(model, optimizer)
    return {"changed": [name for name in before if not torch.equal(before[name], after[name])]}


def cut_columns() -> dict[str, Any]:
    """Rows of one block, halved: refused; of two blocks, halved: trained."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(64, 128), mesh, [Shard(1)]))
    try:
        AdamW([weight])
    except ValueError as error:
        message = str(error)
    optimizer = AdamW([weight], block=64)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    return {"message": message, "weight": whole(weight), "scales": whole(state["exp_avg_scale"])}


CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "fsdp_8bit": lambda _: trained(),
    "fsdp_fp8-lm": lambda _: trained(states="fp8-lm"),
    "fsdp_muon": lambda _: with_muon(fully_shard(Model())),
    "fsdp_checkpoint": checkpoint,
    "fsdp_nan": lambda _: not_finite(),
    "fsdp_columns": lambda _: cut_columns(),
}


if __name__ == "__main__":
    torch.compiler.set_stance("force_eager")
    run_cells(CELLS)
