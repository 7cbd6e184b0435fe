"""What an optimizer keeps of a parameter, and in which numbers.

A state of a parameter ``[…, K]`` is a tensor of codes with the parameter's shape and, in small formats, a tensor of
float32 scales ``[…, K / block]``. Blocks lie along the last axis and never span two rows, so a state is sharded as its
parameter is: DTensor, FSDP2 and ``torch.distributed.checkpoint`` treat codes and scales as tensors like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.ir.sharding import is_sharded, local_tensor, shards
from qcompile.kernels.formula.torch_target import evaluate

from . import formulas

__all__ = [
    "LEAST_ELEMENTS",
    "STATES",
    "Kept",
    "Kind",
    "Numbers",
    "allocate",
    "block_of",
    "decoded",
    "encoded",
    "first_element",
    "kind_of",
    "like",
    "rows",
]

#: Parameters with fewer elements keep float32 states, as in bitsandbytes and torchao.
LEAST_ELEMENTS = 4096
#: Blocks that are shorter save too little.
LEAST_BLOCK = 16


@dataclass(frozen=True)
class Numbers:
    """How numbers are stored.

    Attributes:
        name: ``"fp32"``, or a store of :func:`qcompile.kernels.formula.scales.store_of`, scaled by blocks.
        dtype: of the tensor of codes. Collectives know float16, but not int16.
    """

    name: str
    dtype: torch.dtype

    @property
    def scaled(self) -> bool:
        return self.name != "fp32"

    @property
    def bits(self) -> torch.dtype:
        """The integers that kernels see codes as; of unscaled numbers their own dtype."""
        return torch.int16 if self.dtype == torch.float16 else self.dtype


FP32 = Numbers("fp32", torch.float32)
E4M3 = Numbers("e4m3", torch.uint8)
UE5M3 = Numbers("ue5m3", torch.uint8)
FP16 = Numbers("fp16", torch.float16)

#: The masters there are.
MASTERS: dict[str, Numbers | None] = {"none": None, "fp16": FP16, "fp32": FP32}


@dataclass(frozen=True)
class States:
    """The numbers of the first moment, of the second, and the master that 16-bit parameters have by default."""

    first: Numbers
    second: Numbers
    master: str = "none"


#: By the name that ``states=`` takes.
#:
#: The second moment's format decides whether training holds up: E4M3 spans 2^18 and a block of squared gradients more,
#: so 8 % of them become 0 and their parameters take steps of up to 30 times the right size. UE5M3, E4M3's sign bit as a
#: fifth bit of exponent, spans 2^33 at the same precision, FP16 2^40.
STATES = {
    "8bit": States(E4M3, UE5M3),
    "fp8-lm": States(E4M3, FP16, master="fp16"),
    "fp32": States(FP32, FP32),
}


@dataclass(frozen=True)
class Kind:
    """What a kernel is specialized by: ``block`` is 0 where nothing is scaled."""

    parameter: torch.dtype
    first: Numbers
    second: Numbers
    master: Numbers | None
    block: int

    def entries(self) -> Iterator[tuple[str, Numbers]]:
        """The names of ``torch.optim.AdamW``'s states, and of the master."""
        yield "exp_avg", self.first
        yield "exp_avg_sq", self.second
        if self.master is not None:
            yield "master", self.master


class Kept(Protocol):
    """What is kept of a parameter, whatever optimizer keeps it: names and numbers, and the block they are scaled by."""

    @property
    def block(self) -> int: ...

    def entries(self) -> Iterator[tuple[str, Numbers]]: ...


def rows(shape: torch.Size) -> tuple[tuple[int, ...], int]:
    """Leading axes, and the length of the rows that blocks lie in: the last axis, or, where that is short as in
    convolutions, all but the first. Rows of vectors have one element.
    """
    if len(shape) < 2:
        return tuple(shape), 1
    lead = len(shape) - 1 if shape[-1] >= 4 * LEAST_BLOCK else 1
    return tuple(shape[:lead]), math.prod(shape[lead:])


def kind_of(parameter: Tensor, states: States, master: str, block: int) -> Kind:
    """What ``parameter`` is updated by: FP32 states if it is small, or its rows part into no blocks.

    Raises ``ValueError`` if its shards cut blocks.
    """
    size = block_of(parameter, block) if states.first.scaled else 0
    first, second = (states.first, states.second) if size else (FP32, FP32)
    own = None if parameter.dtype == torch.float32 else MASTERS[master]
    return Kind(parameter.dtype, first, second, FP32 if own is not None and not size else own, size)


def block_of(parameter: Tensor, most: int) -> int:
    """How many elements of ``parameter`` share a scale; 0 if it is small, or its rows part into no blocks.

    Raises ``ValueError`` if its shards cut blocks.
    """
    lead, length = rows(parameter.shape)
    size = _largest_divisor(length, most)
    if parameter.numel() < LEAST_ELEMENTS or size < LEAST_BLOCK:
        return 0
    _check_shards(parameter, len(lead), size)
    return size


@cache
def _largest_divisor(length: int, most: int) -> int:
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0) if length else 1


def _check_shards(parameter: Tensor, lead: int, size: int) -> None:
    if not is_sharded(parameter):
        return
    for axis in range(lead, parameter.dim()):
        parts = shards(parameter, (axis,))
        whole_rows = axis == lead == parameter.dim() - 1 and parameter.shape[axis] % (parts * size) == 0
        if parts > 1 and not whole_rows:
            msg = (
                f"{parts} shards along axis {axis} of a parameter {tuple(parameter.shape)} cut blocks of {size}; "
                "give block= such that a shard holds whole blocks, or the parameter a group with states='fp32'"
            )
            raise ValueError(msg)


# --- tensors --------------------------------------------------------------------------------------------------------


def like(parameter: Any, own: Tensor, shape: torch.Size) -> Tensor:
    """``own`` as this rank's part of a tensor of ``shape`` that is placed as ``parameter`` is."""
    if not is_sharded(parameter):
        return own
    from torch.distributed.tensor import DTensor

    strides = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=strides
    )
    return made.to(own.device)  # parameters that FSDP2 offloads are on the CPU, where from_local leaves nothing


def _scale_shapes(parameter: Tensor, block: int) -> tuple[torch.Size, torch.Size]:
    """Of all scales, and of this rank's."""
    lead, length = rows(parameter.shape)
    own = local_tensor(parameter).detach().shape
    # A shard is cut along a leading axis, or along the last one in whole blocks.
    return (
        torch.Size((*lead, length // block)),
        torch.Size((*own[: len(lead)], math.prod(own[len(lead) :]) // block)),
    )


def allocate(parameter: Tensor, kind: Kept) -> dict[str, Tensor]:
    """Zero states and a master that equals the parameter: ``exp_avg``, ``exp_avg_scale``, …"""
    made: dict[str, Tensor] = {}
    own = local_tensor(parameter).detach()
    for name, numbers in kind.entries():
        if name == "master":
            made |= encoded(parameter, parameter.detach(), name, kind)
            continue
        made[name] = like(parameter, torch.zeros(own.shape, dtype=numbers.dtype, device=own.device), parameter.shape)
        if numbers.scaled:
            shape, own_shape = _scale_shapes(parameter, kind.block)
            made[f"{name}_scale"] = like(parameter, torch.zeros(own_shape, device=own.device), shape)
    return made


def encoded(parameter: Tensor, values: Tensor, name: str, kind: Kept) -> dict[str, Tensor]:
    """The state ``name`` of ``parameter`` as it is stored, rounded to nearest; ``values`` has the parameter's shape."""
    numbers = dict(kind.entries())[name]
    own = local_tensor(values).to(local_tensor(parameter).device, torch.float32)
    if not numbers.scaled:
        return {name: like(parameter, own.clone(), parameter.shape)}
    blocks = own.reshape(-1, kind.block)
    scale, gamma = evaluate(formulas.scale(numbers.name), blocks.abs().amax(1, keepdim=True))
    nearest = torch.full((), 2**15, dtype=torch.int32, device=own.device)  # a half, which rounds to nearest
    codes = evaluate(formulas.encode(numbers.name, name == "exp_avg_sq"), blocks, gamma, nearest)
    shape, own_shape = _scale_shapes(parameter, kind.block)
    return {
        name: like(parameter, codes.to(numbers.bits).view(numbers.dtype).view(own.shape), parameter.shape),
        f"{name}_scale": like(parameter, scale.reshape(own_shape).contiguous(), shape),
    }


def decoded(state: dict[str, Tensor], name: str, kind: Kept) -> Tensor:
    """The float32 numbers of a state, with the parameter's shape; a DTensor if the state is one."""
    codes, numbers = state[name], dict(kind.entries())[name]
    own = local_tensor(codes)
    if numbers.scaled:
        blocks, scale = (
            own.reshape(-1, kind.block).view(numbers.bits).to(torch.int32),
            local_tensor(state[f"{name}_scale"]),
        )
        own = evaluate(formulas.decode(numbers.name), blocks, scale.reshape(-1, 1)).view(own.shape)
    return like(codes, own.clone(), codes.shape)


def first_element(parameter: Any) -> int:
    """The place of this rank's first element in the whole parameter; exact for shards of the first axis."""
    if not is_sharded(parameter):
        return 0
    sizes, starts = list(parameter.shape), [0] * parameter.dim()
    for axis_of_mesh, place in enumerate(parameter.placements):
        if place.is_shard():
            part = math.ceil(sizes[place.dim] / parameter.device_mesh.size(axis_of_mesh))
            start = min(part * parameter.device_mesh.get_local_rank(axis_of_mesh), sizes[place.dim])
            starts[place.dim] += start
            sizes[place.dim] = min(part, sizes[place.dim] - start)
    return sum(start * stride for start, stride in zip(starts, parameter.stride(), strict=True))
