"""What the tests of experts on two ranks run on each: ``python experts_worker.py GROUP RANK WORLD DIRECTORY`` as in
``tests/loops/worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
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
from tests.loops.ranks import WORLD

#: Three experts per rank.
WIDTH, HIDDEN, EXPERTS, TOKENS = 32, 48, 6, 24
#: Rows from each rank (outer) to each: one sends nothing to the other; one gets nothing; one has nothing; nobody has.
COUNTS = {
    "ragged": ((3, 5), (0, 7)),
    "none arrive": ((0, 5), (0, 7)),
    "none leave": ((0, 0), (4, 3)),
    "none": ((0, 0), (0, 0)),
}


def rows(rank: int, counts: tuple[tuple[int, int], ...]) -> Tensor:
    """What a rank sends, of magnitudes that spread; a row of zeros, and one with a NaN."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(sum(counts[rank]), WIDTH, generator=generator)
    x = x * torch.randn(len(x), 1, generator=generator).exp()
    x[-1:], x[-2:-1, 3] = 0, torch.nan
    return x.bfloat16()


def exchanged(directory: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    found = {}
    for name, counts in COUNTS.items():
        received = [each[rank] for each in counts]
        for codes in ("e4m3", None):
            x = rows(rank, counts).requires_grad_()
            y = exchange_rows(x, counts[rank], received, codes=codes)
            y.backward(y.detach() * 2)
            found[f"{name} {codes}"] = y.detach(), x.grad
    return found


class Layer(nn.Module):
    """A router, and experts of which each rank has as many; with one rank the whole layer."""

    def __init__(self, ranks: int, dispatch: Any, combine: Any, experts: Callable[..., Tensor]) -> None:
        super().__init__()
        self.ranks, self.dispatch, self.combine, self.experts = ranks, dispatch, combine, experts
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH, dtype=torch.bfloat16) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN, dtype=torch.bfloat16) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x.float()).softmax(-1).max(-1)
        order = torch.sort(chosen, stable=True).indices
        counts = F.one_hot(chosen, EXPERTS).sum(0)
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
        y = torch.empty_like(arrived).index_copy(0, by_expert, self.experts(arrived[by_expert], *weight, offs))
        if self.ranks > 1:
            y = exchange_rows(y, received, sent, codes=self.combine)
        return torch.empty_like(x).index_copy(0, order, y) * weights[:, None].to(x.dtype)


def _experts(x: Tensor, up: Tensor, down: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(F.silu(F.grouped_mm(x, up.mT, offs=offs)), down.mT, offs=offs)


def _backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    options = {"min_side": 0, "backward": "bf16", "activation": {"outliers": None}, "defaults": False}
    rules = [{"name": "*", "quantize": True}, {"name": "router", "quantize": False}]  # later ones win
    return compile_with(FP4, gm, inputs, options={**options, "rules": rules}, inner_compile=compat.eager_inner_compile)


experts = torch.compile(_experts, backend=_backend, dynamic=True)


def layer(directory: Path) -> dict[str, Any]:
    """Results and gradients of this rank's tokens: of the whole layer, and of one whose experts are sharded and whose
    router FSDP2 shards.
    """
    return {
        "whole": trained(Layer(1, None, None, experts)),
        "wide": trained(sharded(Layer(WORLD, None, None, experts))),
        "e4m3": trained(sharded(Layer(WORLD, "e4m3", "e4m3", experts))),
        "odd": trained(sharded(Layer(WORLD, "e4m3_odd", None, experts))),
    }


def lopsided(directory: Path) -> dict[str, Any]:
    """The same of a router that sends every token to the first rank."""
    return {
        "whole": trained(first_half(Layer(1, None, None, experts))),
        "odd": trained(sharded(first_half(Layer(WORLD, "e4m3_odd", None, experts)))),
    }


def compiled(directory: Path) -> dict[str, Any]:
    """The layer and its exchanges as one graph each way, sizes and all; tokens go to both ranks, and then to one."""
    found = {}
    torch._dynamo.config.capture_scalar_outputs = torch._dynamo.config.capture_dynamic_output_shape_ops = True
    for codes in (None, "e4m3_odd"):
        apart, whole = (parted(Layer(WORLD, codes, None, function)) for function in (experts, _experts))
        whole.compile(backend=_backend, fullgraph=True)
        expected = trained(apart), trained(first_half(apart))
        actual = [trained(whole)]
        torch._dynamo.utils.counters.clear()
        actual.append(trained(first_half(whole)))
        found[f"graphs {codes}"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found |= dict(zip((f"both {codes}", f"first {codes}"), zip(expected, actual, strict=True), strict=True))
    return found


def first_half(model: Layer) -> Layer:
    with torch.no_grad():
        model.router.bias[EXPERTS // 2 :] = -1e4
    return model


def parted(model: Layer) -> Layer:
    """Each rank with its own experts, DTensors."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for weight in ("up", "down"):
        setattr(model, weight, nn.Parameter(distribute_tensor(getattr(model, weight).detach(), mesh, [Shard(0)])))
    return model


def sharded(model: Layer) -> Layer:
    """The same beside a router under FSDP2."""
    fully_shard(model.router, mesh=init_device_mesh("cpu", (WORLD,)))
    return parted(model)


def trained(model: Layer) -> dict[str, Tensor]:
    """Results, and gradients, which are those of the tokens of all ranks."""
    model.zero_grad()
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    y = model(x.requires_grad_())
    y.float().square().sum().backward()
    gradients = {}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor() * (WORLD if key.startswith("router") else 1)  # FSDP2 takes a mean
        else:
            dist.all_reduce(gradient)
        gradients[key] = gradient.float()
    return {"y": y.detach().float(), "x": x.grad.float(), **gradients}


if __name__ == "__main__":
    cells = (exchanged, layer, lopsided, compiled)
    run_cells({f"experts_{cell.__name__}": cell for cell in cells})
