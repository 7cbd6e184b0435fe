"""What the tests of FP8 gradients run on each of two ranks: ``python worker.py GROUP RANK WORLD DIRECTORY`` as in
``tests/loops/worker.py``, whose decoder is trained here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.distributed import collectives, fp8_gradients, fp8_lm_gradients, fp8_weights
from qcompile.kernels.quantize import reference
from qcompile.optim import AdamW
from qcompile.recipes import FP4
from tests.loops.cells import run_cells
from tests.loops.worker import Decoder, batches, loss_of, mine

BLOCK = 32
#: Elements of a shard: blocks that end short, whole ones, and less than a block.
WIDTHS = (1000, 64, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = collectives.Codes("e4m3", BLOCK)


def summand(rank: int, size: int, dtype: torch.dtype, number: int = 0) -> Tensor:
    """What a rank adds: of magnitudes that spread, with zeros."""
    generator = torch.Generator().manual_seed(100 * number + rank)
    x = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).exp()
    x[::5] = 0
    return x.to(dtype)


def rounded(x: Tensor) -> Tensor:
    """What arrives of a flat float tensor, by the reference."""
    quantizer = f"e4m3 block{BLOCK} absmax even"
    return reference.dequantize(*reference.quantize(x, quantizer, -1), quantizer, -1, len(x), torch.float32)


def scattered(rank: int, width: int, dtype: torch.dtype) -> Tensor:
    """What ``reduce_scatter`` in :func:`direct` gives a rank: own summands as they are, the other's rounded."""
    shards = [summand(source, 2 * width, dtype).float().split(width)[rank] for source in range(2)]
    first, second = (shard if source == rank else rounded(shard) for source, shard in enumerate(shards))
    return ((first + second) * 0.5).to(dtype)


def first_shard(width: int, dtype: torch.dtype) -> Tensor:
    """What ``all_reduce`` in :func:`direct` gives all ranks of the shard that rank 0 sums."""
    size = 2 * width - 3
    stride = -(-size // (2 * BLOCK)) * BLOCK
    own, other = (summand(rank, size, dtype).float()[:stride] for rank in range(2))
    return rounded((own + rounded(other)) * 0.5).to(dtype)


def direct(device: str = "cpu") -> dict[str, Any]:
    """The two collectives on flat tensors of many sizes and dtypes."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    found: dict[str, Any] = {}
    for width in WIDTHS:
        for dtype in DTYPES:
            out = torch.full((width,), torch.nan, dtype=dtype, device=device)
            x = summand(rank, world * width, dtype).to(device)
            sent = collectives.reduce_scatter(x, out, group, 0.5, CODES)
            found[f"scatter {width} {dtype}"], found[f"sent {width}"] = out.cpu(), sent
            x = summand(rank, 2 * width - 3, dtype).to(device)
            collectives.all_reduce(x, group, 0.5, CODES)
            found[f"all {width} {dtype}"] = x.cpu()
    broken = torch.ones(400, device=device)
    if rank == 1:
        broken[7], broken[300] = torch.nan, torch.inf
    collectives.all_reduce(broken, group, 0.5, CODES)
    return found | {"broken": broken.cpu()}


def alone() -> dict[str, Any]:
    """A group of one rank: ``all_reduce``, and DDP as it is and in 8 bits."""
    group, _ = dist.new_subgroups(1)
    x = summand(dist.get_rank(), 1000, torch.float32)
    summed = x.clone()
    sent = collectives.all_reduce(summed, group, 0.25, CODES)
    found: dict[str, Any] = {"own": x, "summed": summed, "sent": sent}
    for fp8 in (False, True):
        model = DistributedDataParallel(Decoder(), process_group=group)
        if fp8:
            fp8_gradients(model, block=BLOCK)
        loss_of(model, mine(batches())[0]).backward()
        found["fp8" if fp8 else "wide"] = gradients(model)
    return found


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
        for name, p in model.named_parameters()
    }


def wrapped(kind: str, fp8: bool, **policy: torch.dtype) -> tuple[nn.Module, Any]:
    """The decoder under DDP with several buckets, or FSDP2 by blocks; and the counts of ``fp8_gradients``."""
    model: nn.Module = Decoder()
    if kind == "ddp":
        dist._DEFAULT_FIRST_BUCKET_BYTES = 10_000
        model = DistributedDataParallel(model, bucket_cap_mb=20_000 / 2**20)
    else:
        for block in model.blocks:
            fully_shard(block, mp_policy=MixedPrecisionPolicy(**policy))
        fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))
    return model, fp8_gradients(model, block=BLOCK) if fp8 else None


def step(kind: str, compiled: bool = False, **policy: torch.dtype) -> dict[str, Any]:
    """Gradients of a batch, wide and in 8 bits, and what was sent for the latter."""
    found: dict[str, Any] = {}
    for fp8 in (False, True):
        model, traffic = wrapped(kind, fp8, **policy)
        call = torch.compile(model, backend="eager") if compiled else model
        for tokens in mine(batches())[:2]:  # DDP puts all in one bucket the first time
            model.zero_grad()
            if fp8:
                traffic.reset()
            loss_of(call, tokens).backward()
        found["fp8" if fp8 else "wide"] = gradients(model)
    return found | {"traffic": vars(traffic)}


def accumulated(kind: str) -> dict[str, Any]:
    """Two micro-batches, of which the second reduces."""
    found: dict[str, Any] = {}
    for fp8 in (False, True):
        model, traffic = wrapped(kind, fp8)
        first, second = mine(batches())[0].chunk(2)
        if kind == "ddp":
            with model.no_sync():
                loss_of(model, first).backward()
        else:
            model.set_requires_gradient_sync(False)
            loss_of(model, first).backward()
            model.set_requires_gradient_sync(True)
        if fp8:
            assert traffic.bytes == 0
        loss_of(model, second).backward()
        found["fp8" if fp8 else "wide"] = gradients(model)
    return found


class Given(nn.Module):
    """Two parameters, whose gradients are what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(7, 20)), nn.Parameter(torch.zeros(33))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.a * a).sum() + (self.b * b).sum()


def given_gradients(rank: int) -> tuple[Tensor, Tensor]:
    """``a`` has a 4 on both ranks, and a number that E4M3 does not hold beside it; ``b`` has zeros alone on one."""
    a, b = torch.linspace(-1, 1, 140).view(7, 20), torch.full((33,), 3.0 * rank)
    a[0, 0], a[0, 1] = 4.0, 0.1
    return a, b


def fp8_lm() -> dict[str, Any]:
    """Three steps with the same gradients, and µ after each; a step of the decoder; what is refused."""
    model = DistributedDataParallel(Given())
    scaling = fp8_lm_gradients(model)
    found: dict[str, Any] = {"steps": []}
    for _ in range(3):
        model.zero_grad()
        model(*given_gradients(dist.get_rank())).backward()
        found["steps"].append({**gradients(model), **{f"factor {n}": f.clone() for n, f in scaling.factors.items()}})
    found["bytes"], found["wide_bytes"] = scaling.bytes, scaling.wide_bytes
    decoder, _ = wrapped("ddp", False)
    fp8_lm_gradients(decoder)
    for tokens in mine(batches())[:2]:
        decoder.zero_grad()
        loss_of(decoder, tokens).backward()
    found["decoder"] = gradients(decoder)
    for name, wrong in (
        ("again", model),
        ("plain", nn.Linear(2, 2)),
        ("fsdp", fully_shard(nn.Linear(2, 2))),
    ):
        try:
            fp8_lm_gradients(wrong)
        except ValueError as error:
            found[name] = str(error)
    return found


def weights() -> dict[str, Any]:
    """Compiled blocks whose weights are gathered in bfloat16 and in 8 bits; and what is refused."""
    found: dict[str, Any] = {}
    tokens, straight = mine(batches())[0], {"weight": {"estimator": "ste"}}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def backend(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        return compile_with(FP4.override(straight), gm, inputs, inner_compile=compat.eager_inner_compile, **kwargs)

    report = qcompile.explain(Decoder(layers=1).bfloat16(), tokens[:, :-1], options=straight)
    for name in ("wide", "narrow"):
        model: nn.Module = Decoder(layers=1)
        for block in model.blocks:
            block.compile(backend=backend)
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        if name == "narrow":
            traffic = fp8_weights(model, report)
        loss = loss_of(model, tokens)
        loss.backward()
        found[name] = {"loss": loss.detach(), **gradients(model)}
    found["traffic"] = {**vars(traffic), "weights": list(traffic.weights)}
    unset = fully_shard(Decoder(layers=1))
    for name, given, of in (("again", model, report), ("none", unset, mock.Mock(weights={"blocks.0.up": ""}))):
        try:
            fp8_weights(given, of)
        except ValueError as error:
            found[name] = str(error)
    fp8_weights(unset, report)
    try:
        unset(tokens)
    except TypeError as error:
        found["dtype"] = str(error)
    return found


def divided() -> dict[str, Any]:
    """``set_gradient_divide_factor``: what FSDP hands over is a sum of multiples then."""
    model, _ = wrapped("fsdp", True)
    loss_of(model, mine(batches())[0]).backward()
    mean = gradients(model)
    model.zero_grad()
    for module in (*model.blocks, model):
        module.set_gradient_divide_factor(8.0)
    loss_of(model, mine(batches())[0]).backward()
    return {"mean": mean, "divided": gradients(model)}


def replicated() -> dict[str, Any]:
    """A mesh of two replicas of one shard each, also with ``set_gradient_divide_factor``, where FSDP2's own reduction
    over both axes is the reference; and what is said of a mesh with both.
    """
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    replicas = mesh["replicate"].get_group()
    model = fully_shard(Decoder(), mesh=mesh["shard"])
    traffic = fp8_gradients(model, block=BLOCK, replicas=replicas)
    loss_of(model, mine(batches())[1]).backward()  # the last one of :func:`step`
    found = {"fp8": gradients(model), "bytes": traffic.bytes, "message": said(fully_shard(Decoder(), mesh=mesh))}
    for name, axes in (("divided", mesh["shard"]), ("divided_wide", mesh)):
        model = fully_shard(Decoder(), mesh=axes)
        if name == "divided":
            fp8_gradients(model, block=BLOCK, replicas=replicas)
        model.set_gradient_divide_factor(1.0)  # after the call, which is to see it all the same
        loss_of(model, mine(batches())[1]).backward()
        found[name] = gradients(model)
    return found


def said(model: nn.Module, **options: Any) -> str:
    try:
        fp8_gradients(model, **options)
    except ValueError as error:
        return str(error)
    return ""


def raised(model: nn.Module, x: Tensor) -> str:
    try:
        model(x).sum().backward()
    except Exception as error:  # DDP may raise its own around it
        return str(error)
    return ""


def refused() -> dict[str, Any]:
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    wide = DistributedDataParallel(nn.Linear(2, 2, dtype=torch.float64))
    fp8_gradients(wide)
    sparse = DistributedDataParallel(nn.Embedding(16, 32, sparse=True))
    fp8_gradients(sparse)
    again = nn.ModuleDict({"free": fully_shard(nn.Linear(2, 2)), "taken": fully_shard(nn.Linear(2, 2))})
    fp8_gradients(again["taken"], replicas=dist.group.WORLD)
    hooked = fully_shard(nn.Linear(2, 2))
    hooked.set_all_reduce_hook(lambda shard: None)
    with mock.patch.object(compat, "fsdp_axes", return_value=[(True, False)] * 2):  # torch 2.11 makes one at most
        groups = said(fully_shard(nn.Linear(2, 2)))
    return {
        "groups": groups,
        "again": said(again),
        "untouched": said(again["free"]),
        "again_ddp": said(wide),
        "hooked": said(hooked, replicas=dist.group.WORLD),
        "format": said(ddp, format="e3m4"),
        "block": said(ddp, block=100),
        "block_float": said(ddp, block=256.0),
        "ranks": said(fully_shard(nn.Linear(2, 2)), replicas=[0, 1]),
        "plain": said(nn.Linear(2, 2)),
        "fsdp1": said(nn.Sequential(FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu")))),
        "replicas": said(ddp, replicas=dist.group.WORLD),
        "dtype": raised(wide, torch.ones(1, 2, dtype=torch.float64)),
        "sparse": raised(sparse, torch.arange(4)),
    }


def trained(directory: Path) -> dict[str, Any]:
    """Compiled blocks under FSDP2 and AdamW with 8-bit states, saved half-way, and finished by a new model."""

    def make() -> tuple[nn.Module, AdamW]:
        model, _ = wrapped("fsdp", True)
        for block in model.blocks:  # what is in the graphs does not matter to the gradients' way
            block.compile(backend="eager", fullgraph=True)
        return model, AdamW(model.parameters(), lr=1e-3)

    def run(model: nn.Module, optimizer: AdamW, data: Iterator[Tensor]) -> None:
        for tokens in data:
            loss_of(model, tokens).backward()
            with torch.compiler.set_stance("force_eager"):  # on a CPU it compiles for longer than all else takes
                optimizer.step()
            optimizer.zero_grad()

    data = mine(batches())
    model, optimizer = make()
    run(model, optimizer, data[:2])
    saved, state = get_state_dict(model, optimizer)
    dcp.save({"model": saved, "optimizer": state}, checkpoint_id=directory / "checkpoint")
    run(model, optimizer, data[2:])

    resumed, other = make()
    target, target_state = get_state_dict(resumed, other)
    dcp.load({"model": target, "optimizer": target_state}, checkpoint_id=directory / "checkpoint")
    set_state_dict(resumed, other, model_state_dict=target, optim_state_dict=target_state)
    run(resumed, other, data[2:])
    whole = [{n: p.full_tensor().detach() for n, p in m.named_parameters()} for m in (model, resumed)]
    return {"whole": whole[0], "resumed": whole[1]}


CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "wire_direct": lambda _: direct(),
    "wire_alone": lambda _: alone(),
    "wire_fsdp": lambda _: step("fsdp"),
    "wire_fsdp_bfloat16": lambda _: step("fsdp", param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16),
    "wire_ddp": lambda _: step("ddp"),
    "wire_ddp_compiled": lambda _: step("ddp", compiled=True),
    "wire_fsdp_accumulated": lambda _: accumulated("fsdp"),
    "wire_ddp_accumulated": lambda _: accumulated("ddp"),
    "wire_fp8_lm": lambda _: fp8_lm(),
    "wire_weights": lambda _: weights(),
    "wire_divided": lambda _: divided(),
    "wire_replicated": lambda _: replicated(),
    "wire_refused": lambda _: refused(),
    "wire_trained": trained,
}


if __name__ == "__main__":
    run_cells(CELLS)
