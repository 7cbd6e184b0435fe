"""Gradients in eight bits between ranks, for FSDP2 and DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import NoneType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from qcompile import compat
from qcompile.ir.formats import get_format

from .collectives import Codes, all_reduce, reduce_scatter, wide_bytes

__all__ = ["Buckets", "Traffic", "check_free", "fp8_gradients"]

_WHO = "fp8_gradients"
_FORMATS = ("e4m3", "e5m2")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKS = tuple(2**i for i in range(5, 13))


@dataclass
class Traffic:
    """What this rank has sent of gradients since :meth:`reset`.

    Attributes:
        bytes: codes and scales.
        wide_bytes: what the same reductions would send in the dtype of the gradients.
        reductions: how many there were.
    """

    bytes: int = 0
    wide_bytes: int = 0
    reductions: int = 0

    def reset(self) -> None:
        """Count from here on, a step for example."""
        self.bytes = self.wide_bytes = self.reductions = 0

    def _add(self, sent: int, wide: int) -> None:
        self.bytes += sent
        self.wide_bytes += wide
        self.reductions += 1


def fp8_gradients(
    model: nn.Module,
    format: str = "e4m3",
    *,
    block: int = 256,
    replicas: dist.ProcessGroup | None = None,
) -> Traffic:
    """Let the gradients of ``model`` travel between ranks as FP8 codes; sums are float32.

    Call it once, after ``fully_shard`` or ``DistributedDataParallel`` and on every rank alike. Under FSDP2 the sum of a
    shard is rounded to the dtype of the reduction only; under DDP it is quantized once more, and all ranks decode the
    same bytes. What a rank adds of its own is never quantized. Gradients are averaged as the wrapper would.

    Args:
        model: holds FSDP2 modules or a DistributedDataParallel, or is one, compiled or not.
        format: of the codes, ``"e4m3"`` or ``"e5m2"``.
        block: neighbours in a flat bucket that share a scale, a power of two from 32 to 4096.
        replicas: for HSDP, the ranks that hold the same shards as this one, over which gradients are averaged too.
            Shard on the other axis of the mesh alone: of a two-dimensional mesh FSDP2 runs the second reduction itself.
            After ``set_gradient_divide_factor`` the sum over shards and replicas is divided by that factor, as FSDP2
            does.

    Returns:
        Counts of the bytes that this rank sends.

    Raises ``ValueError`` for a model without such wrappers, for FSDP1, a two-dimensional mesh, modules with several
    parameter groups, wrappers that have a communication hook (from an earlier call too), options out of range, and a
    GPU that cannot convert to FP8; ``TypeError`` in the backward when gradients are sparse or have a dtype other than
    float32, bfloat16 and float16.
    """
    if format not in _FORMATS:
        msg = f"fp8_gradients: format={format!r}; one of {', '.join(_FORMATS)}"
        raise ValueError(msg)
    if type(block) is not int or block not in _BLOCKS:
        msg = f"fp8_gradients: block={block!r}; a power of two from {_BLOCKS[0]} to {_BLOCKS[-1]}"
        raise ValueError(msg)
    if not isinstance(replicas, (dist.ProcessGroup, NoneType)):
        msg = f"fp8_gradients: replicas={replicas!r}; a ProcessGroup, for example mesh['replicate'].get_group()"
        raise ValueError(msg)
    if any(parameter.is_cuda for parameter in model.parameters()):
        from qcompile.kernels.quantize.triton import missing_conversion  # torch for CPUs comes without Triton

        if reason := missing_conversion(get_format(format)):
            msg = f"fp8_gradients: {reason}"
            raise ValueError(msg)
    codes, traffic = Codes(format, block), Traffic()
    hooks = [*_hooks(model, codes, traffic, replicas)]  # all are checked before any is set
    if not hooks:
        msg = "fp8_gradients: no FSDP2 module or DistributedDataParallel in the model; call fully_shard(model) first"
        raise ValueError(msg)
    for install in hooks:
        install()
    return traffic


def _hooks(model: nn.Module, codes: Codes, traffic: Traffic, replicas: dist.ProcessGroup | None) -> Iterator[Any]:
    """What sets the hook of each wrapper."""
    for name, module in model.named_modules():
        name = name or type(module).__name__
        if isinstance(module, FullyShardedDataParallel):
            msg = f"fp8_gradients: {name} is sharded by FSDP1; use torch.distributed.fsdp.fully_shard"
            raise ValueError(msg)
        if isinstance(module, FSDPModule):
            if not (groups := compat.fsdp_axes(module)):
                continue
            if len(groups) > 1:
                msg = f"fp8_gradients: {name} has {len(groups)} parameter groups; apply fully_shard to its parts"
                raise ValueError(msg)
            if any(replicates for _, replicates in groups):
                msg = (
                    f"fp8_gradients: {name} is replicated on an axis of its mesh, whose reduction FSDP2 runs itself; "
                    "shard on mesh['shard'] and give replicas=mesh['replicate'].get_group()"
                )
                raise ValueError(msg)
            reduce_scatter, hooked = compat.fsdp_reduction(module)
            check_free(_WHO, name, reduce_scatter)
            yield partial(module.set_custom_reduce_scatter, cast(Any, _Fp8ReduceScatter(codes, traffic)))
            if replicas is not None:
                check_free(_WHO, name, "an all-reduce hook" if hooked else None)
                yield partial(module.set_all_reduce_hook, partial(_all_reduce_shard, codes, traffic, replicas, module))
        elif isinstance(module, DistributedDataParallel):
            if replicas is not None:
                msg = f"fp8_gradients: replicas= is for FSDP2; give {name}, a DistributedDataParallel, process_group="
                raise ValueError(msg)
            check_free(_WHO, name, compat.ddp_hook(module))
            names = {parameter: f"{name}.{path}" for path, parameter in module.named_parameters()}
            group = module.process_group
            buckets = Buckets(_WHO, partial(_reduce_codes, codes, group), traffic, group, names)
            yield partial(buckets.install, module)


def check_free(who: str, name: str, taken: str | None, does: str = "reduces gradients") -> None:
    """``taken`` is what does this for module ``name`` already, if anything but its wrapper does."""
    if taken is not None:
        msg = (
            f"{who}: {name} already {does} with {taken}, which this would replace; "
            "call it once, on wrappers without a communication hook"
        )
        raise ValueError(msg)


def check_dtype(who: str, gradient: Tensor) -> None:
    if gradient.dtype not in _DTYPES:
        dtype = str(gradient.dtype).removeprefix("torch.")
        msg = f"{who}: gradients are {dtype}; reduce them in float32, bfloat16 or float16"
        raise TypeError(msg)


# --- FSDP2 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fp8ReduceScatter:
    """What ``FSDPModule.set_custom_reduce_scatter`` takes. FSDP calls it on the stream of its reduce-scatters."""

    codes: Codes
    traffic: Traffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Done, or queued on the current stream, when it returns; so there is nothing to wait for (``async_op``)."""
        check_dtype(_WHO, input_tensor)
        world = group.size()
        sent = reduce_scatter(input_tensor, output_tensor, group, _factor(op, world), self.codes)
        self.traffic._add(sent, wide_bytes(len(input_tensor), input_tensor.dtype, world, hops=1))


def _factor(op: Any, world: int) -> float:
    """What sums are multiplied with in a reduction ``op``."""
    kind, factor = compat.reduction(op)
    if kind == dist.ReduceOp.PREMUL_SUM:
        return factor
    return {dist.ReduceOp.SUM: 1.0, dist.ReduceOp.AVG: 1 / world}[kind]


def _all_reduce_shard(
    codes: Codes, traffic: Traffic, group: dist.ProcessGroup, module: FSDPModule, shard: Tensor
) -> None:
    """What ``FSDPModule.set_all_reduce_hook`` takes, on the stream of FSDP's all-reduces: the mean over replicas, or
    the sum where the user has set what the sum over all ranks is divided by, which the reduce-scatter has done.
    """
    check_dtype(_WHO, shard)
    if shard.is_cuda:  # allocated on the stream of reduce-scatters, which may give its memory to the next one
        shard.record_stream(torch.cuda.current_stream(shard.device))
    world = group.size()
    factor = 1 / world if compat.fsdp_divide_factor(module) is None else 1.0
    sent = all_reduce(shard, group, factor, codes)
    traffic._add(sent, wide_bytes(len(shard), shard.dtype, world, hops=2))


# --- DDP ------------------------------------------------------------------------------------------------------------


#: Averages a bucket in place; returns the bytes that this rank sends.
Reduce = Callable[[dist.GradBucket], int]


class Buckets:
    """The communication hook of a DDP.

    Not the module itself: it would keep itself alive through its reducer, where Python's garbage collector cannot see.

    Args:
        who: the function that sets the hook, for messages.
        names: of the parameters.
    """

    def __init__(
        self, who: str, reduce: Reduce, traffic: Traffic, group: dist.ProcessGroup, names: dict[nn.Parameter, str]
    ) -> None:
        self.who, self.reduce, self.traffic, self.group, self.names = who, reduce, traffic, group, names
        self.stream: torch.cuda.Stream | None = None  # beside that of the backward

    def install(self, module: DistributedDataParallel) -> None:
        # A lambda: DDP compares annotations with classes, and here they are text.
        hook = lambda state, bucket: _reduce_bucket(state, bucket)  # noqa: E731
        hook.__qualname__ = self.who  # what DDP logs, and what a second call is told
        module.register_comm_hook(self, cast(Any, hook))


def _reduce_bucket(state: Buckets, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What ``DistributedDataParallel.register_comm_hook`` takes: the mean of the bucket's gradients."""
    gradients = bucket.buffer()
    if gradients.is_sparse:
        name = state.names[cast(nn.Parameter, bucket.parameters()[0])]  # sparse gradients have buckets of their own
        msg = f"{state.who}: the gradient of {name} is sparse; make it dense, for example nn.Embedding(sparse=False)"
        raise TypeError(msg)
    check_dtype(state.who, gradients)
    if not gradients.is_cuda:
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        sent = state.reduce(bucket)
        done.set_result(gradients)
    else:
        # Beside the backward, as NCCL's own reductions are; a future remembers the stream on which it is set.
        state.stream = state.stream or torch.cuda.Stream(gradients.device)
        state.stream.wait_stream(torch.cuda.current_stream(gradients.device))
        done = torch.futures.Future(devices=[gradients.device])
        with torch.cuda.stream(state.stream):
            sent = state.reduce(bucket)
            done.set_result(gradients)
    state.traffic._add(sent, wide_bytes(len(gradients), gradients.dtype, state.group.size(), hops=2))
    return done


def _reduce_codes(codes: Codes, group: dist.ProcessGroup, bucket: dist.GradBucket) -> int:
    return all_reduce(bucket.buffer(), group, 1 / group.size(), codes)
