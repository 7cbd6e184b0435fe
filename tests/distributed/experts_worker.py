"""What the tests of experts on two ranks run on each: ``python experts_worker.py GROUP RANK WORLD DIRECTORY`` as in
``tests/loops/worker.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.distributed import exchange_rows
from qcompile.recipes import FP4
from tests.loops.cells import run_cells

WIDTH, HIDDEN, EXPERTS, TOKENS = 32, 48, 4, 24
#: Rows from each rank (outer) to each; one sends nothing to the other.
COUNTS = ((3, 5), (0, 7))


def rows(rank: int) -> Tensor:
    """What a rank sends, of magnitudes that spread; a row of zeros, and one with a NaN."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sum(COUNTS[rank]), WIDTH, generator=generator)
    x = x * torch.randn(len(x), 1, generator=generator).exp()
    x[-1], x[-2, 3] = 0, torch.nan
    return x.bfloat16()


def exchanged(directory: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    received = [counts[rank] for counts in COUNTS]
    found = {}
    for codes in ("e4m3", None):
        x = rows(rank).requires_grad_()
        y = exchange_rows(x, COUNTS[rank], received, codes=codes)
        y.backward(y.detach() * 2)
        found[codes or "wide"] = y.detach(), x.grad
    return found


class Layer(nn.Module):
    """A router, and experts of which each rank has as many; with one rank the whole layer."""

    def __init__(self, ranks: int, dispatch: Any, combine: Any) -> None:
        super().__init__()
        self.ranks, self.dispatch, self.combine = ranks, dispatch, combine
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=torch.bfloat16) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x.float()).softmax(-1).max(-1)
        order = torch.sort(chosen, stable=True).indices
        counts = torch.bincount(chosen, minlength=EXPERTS)
        arrived, theirs = x[order], counts[None]
        if self.ranks > 1:
            theirs = torch.empty(self.ranks, EXPERTS // self.ranks, dtype=counts.dtype)
            dist.all_to_all_single(theirs.view(-1), counts)
            sent, received = counts.view(self.ranks, -1).sum(1).tolist(), theirs.sum(1).tolist()
            arrived = exchange_rows(arrived, sent, received, codes=self.dispatch)
        # From groups by rank to groups by expert, and back.
        expert = torch.arange(theirs.shape[1]).repeat(len(theirs)).repeat_interleave(theirs.flatten())
        by_expert = torch.sort(expert, stable=True).indices
        offs = theirs.sum(0).cumsum(0).int()
        weight = [w.to_local() if isinstance(w, DTensor) else w for w in (self.up, self.down)]
        y = torch.empty_like(arrived).index_copy(0, by_expert, experts(arrived[by_expert], *weight, offs))
        if self.ranks > 1:
            y = exchange_rows(y, received, sent, codes=self.combine)
        return torch.empty_like(x).index_copy(0, order, y) * weights[:, None].to(x.dtype)


def _experts(x: Tensor, up: Tensor, down: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(F.silu(F.grouped_mm(x, up.mT, offs=offs)), down.mT, offs=offs)


def _backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    options = {"min_side": 0, "backward": "bf16", "activation": {"outliers": None}, "defaults": False}
    rules = [{"name": "*", "quantize": True}]
    return compile_with(FP4, gm, inputs, options={**options, "rules": rules}, inner_compile=compat.eager_inner_compile)


experts = torch.compile(_experts, backend=_backend, dynamic=True)


def layer(directory: Path) -> dict[str, Any]:
    """Results and gradients of this rank's tokens: of the whole layer, and of one whose experts are sharded and whose
    router FSDP2 shards.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, ranks, *codes in (
        ("whole", 1, None, None),
        ("wide", world, None, None),
        ("e4m3", world, "e4m3", "e4m3"),
        ("odd", world, "e4m3_odd", None),
    ):
        model = Layer(ranks, *codes)
        if ranks > 1:
            for weight in ("up", "down"):
                sharded = distribute_tensor(getattr(model, weight).detach(), mesh, [Shard(0)])
                setattr(model, weight, nn.Parameter(sharded))
            fully_shard(model.router, mesh=mesh)
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank)).bfloat16().requires_grad_()
        y = model(x)
        y.float().square().sum().backward()
        gradients = {}
        for key, parameter in model.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                gradient = gradient.full_tensor() * (world if key.startswith("router") else 1)  # FSDP2 takes a mean
            else:
                dist.all_reduce(gradient)
            gradients[key] = gradient.float()
        found[name] = {"y": y.detach().float(), "x": x.grad.float(), **gradients}
    return found


if __name__ == "__main__":
    run_cells({"experts_exchanged": exchanged, "experts_layer": layer})
