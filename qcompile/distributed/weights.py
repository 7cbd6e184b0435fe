"""Weights in eight bits between ranks, for FSDP2: those that compiled blocks round to four bits anyway.

A shard has whole rows, so it knows their scales. An element travels as E4M3, in units of its row's absolute maximum
over 384, that is 6 · 2⁶: E2M1 numbers and what lies half-way between two of them are E4M3 numbers then. It is rounded
*to odd*: a number between two of E4M3 becomes the one whose last bit is 1, which is never one of those. So E2M1 makes
of it what it makes of the original, and the row's maximum arrives as it was: products are the same, bit for bit.

Only the straight-through estimator goes with this, which does not look at the weight in the backward. DGE's slope is
steepest half-way between two numbers, where rounding leaves none: it would average a third of what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qcompile import compat
from qcompile.ir.operand import Operand

from .gradients import check_free

__all__ = ["WeightTraffic", "decode", "encode", "fp8_weights"]

_WHO = "fp8_weights"
_E4M3 = torch.float8_e4m3fn
#: E2M1's largest number in the units that travel.
_LARGEST = 384.0
#: Of float32's 23 bits of mantissa E4M3 has three. A quotient of two bfloat16 numbers that is as close as this to one
#: of its numbers is that number, but for float32's own roundings: others are 2⁻¹² of it away or more.
_CUT, _CLOSE = 20, 8
_LEAST = 1e-30


@dataclass
class WeightTraffic:
    """What this rank has sent of weights since :meth:`reset`, and which weights travel in 8 bits.

    Attributes:
        weights: names of parameters.
        bytes: codes, scales, and what travels wide.
        wide_bytes: what the same gathers would send in bfloat16.
    """

    weights: tuple[str, ...] = ()
    bytes: int = 0
    wide_bytes: int = 0

    def reset(self) -> None:
        """Count from here on, a step for example."""
        self.bytes = self.wide_bytes = 0


class _Report(Protocol):
    """What is read of a :class:`qcompile.Report`."""

    @property
    def weights(self) -> Mapping[str, str]: ...


def fp8_weights(model: nn.Module, report: _Report) -> WeightTraffic:
    """Let FSDP2 gather those weights as E4M3 codes that compiled blocks quantize to E2M1, one scale per row, anyway.

    Call it once, after ``fully_shard`` and on every rank alike. Losses and gradients do not change by a bit. Everything
    else travels as before: embeddings, heads, norms, biases, weights with another estimator than ``ste`` (``dge``, the
    default of ``qcompile_fp4``, looks at the weight), with a rotation, or with another scale than the maximum's, and
    weights that two modules share.

    Args:
        model: holds FSDP2 modules with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` or bfloat16 parameters.
        report: of :func:`qcompile.explain` for the model before it was sharded, with the options of the blocks.

    Raises ``ValueError`` where no weight would travel in 8 bits and for modules that have a custom all-gather;
    ``TypeError`` in the forward where weights are gathered in another dtype than bfloat16.
    """
    names = {module: name for name, module in model.named_modules()}
    narrow = {layer for layer, text in report.weights.items() if text and _tells_apart(text)}
    traffic, found = WeightTraffic(), list[tuple[FSDPModule, _AllGather]]()
    for name, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        segments = []
        for owner, of, shape, axis, shared in compat.fsdp_weights(module):
            layer = names.get(owner, "")
            takes = isinstance(owner, nn.Linear) and of == "weight" and axis == 0 and not shared and layer in narrow
            segments.append(_Segment(shape[0], math.prod(shape[1:])) if takes else _Segment(0, shape.numel()))
            traffic.weights += (f"{layer}.{of}",) if takes else ()
        if any(segment.rows for segment in segments):
            check_free(_WHO, name or type(module).__name__, compat.fsdp_all_gather(module), "gathers weights")
            found.append((module, _AllGather(name or type(module).__name__, tuple(segments), traffic)))
    if not found:
        msg = (
            f"{_WHO}: no weight of an FSDP2 module is 'e2m1 row; ste' in the report; call fully_shard first, and "
            'explain and compile with options={"weight": {"estimator": "ste"}}'
        )
        raise ValueError(msg)
    for module, gather in found:
        module.set_custom_all_gather(cast(Any, gather))
    return traffic


def _tells_apart(text: str) -> bool:
    """Whether an operand makes the same of numbers that were rounded to odd E4M3, in the backward too."""
    operand = Operand.parse(text)
    quantizer = operand.quantizer
    grid = (quantizer.format.name, str(quantizer.granularity)) == ("e2m1", "row")
    by_maximum = quantizer.scale.name == "absmax" and quantizer.rounding in ("even", "half_up")
    return grid and by_maximum and str(operand.estimator) == "ste" and not operand.transform and not operand.outliers


@dataclass(frozen=True)
class _Segment:
    """A parameter in the flat shard: ``rows`` of ``width`` that travel as codes, or ``width`` elements as they are."""

    rows: int
    width: int

    @property
    def elements(self) -> int:
        return (self.rows or 1) * self.width

    @property
    def bytes(self) -> int:
        """Codes and float32 maxima, filled up to 16; or bfloat16."""
        taken = self.rows * (self.width + 4) if self.rows else 2 * self.width
        return -(-taken // 16) * 16


@dataclass(frozen=True)
class _AllGather:
    """What ``FSDPModule.set_custom_all_gather`` takes. FSDP calls it on the stream of its all-gathers."""

    name: str
    segments: tuple[_Segment, ...]
    traffic: WeightTraffic

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Done, or queued on the current stream, when it returns; so there is nothing to wait for (``async_op``)."""
        if input_tensor.dtype != torch.bfloat16:
            dtype = str(input_tensor.dtype).removeprefix("torch.")
            msg = f"{_WHO}: {self.name} gathers {dtype}; give fully_shard MixedPrecisionPolicy(param_dtype=bfloat16)"
            raise TypeError(msg)
        elements = sum(segment.elements for segment in self.segments)
        if len(input_tensor) != elements:
            msg = f"{_WHO}: {self.name} gathers {len(input_tensor)} elements and not {elements}; reshard_after_forward "
            raise RuntimeError(msg + "has to be True or False")
        world, device = group.size(), input_tensor.device
        packet = torch.empty(sum(segment.bytes for segment in self.segments), dtype=torch.uint8, device=device)
        for segment, x, place in self._parts(input_tensor[None], packet[None]):
            if segment.rows:
                codes, largest = _on(device, encode)(x.view(segment.rows, segment.width))
                place[0, : codes.numel()].copy_(codes.flatten())
                place[0, codes.numel() :].view(torch.float32)[: segment.rows].copy_(largest.flatten())
            else:
                place.view(torch.bfloat16)[:, : segment.width].copy_(x)
        arrived = torch.empty(world, len(packet), dtype=torch.uint8, device=device)
        compat.all_gather_single(arrived.view(-1), packet, group=group)
        for segment, out, place in self._parts(output_tensor.view(world, -1), arrived):
            if segment.rows:
                size = segment.rows * segment.width
                codes = place[:, :size].view(world, segment.rows, segment.width)
                largest = place[:, size:].view(torch.float32)[:, : segment.rows, None]
                out.view(codes.shape).copy_(_on(device, decode)(codes, largest))
            else:
                out.copy_(place.view(torch.bfloat16)[:, : segment.width])
        self.traffic.bytes += (world - 1) * len(packet)
        self.traffic.wide_bytes += (world - 1) * 2 * elements

    def _parts(self, flat: Tensor, packets: Tensor) -> list[tuple[_Segment, Tensor, Tensor]]:
        """Each segment with its elements and its bytes, of every rank that there are rows of."""
        elements = flat.split([segment.elements for segment in self.segments], 1)
        places = packets.split([segment.bytes for segment in self.segments], 1)
        return list(zip(self.segments, elements, places, strict=True))


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[rows, width]`` of bfloat16 → E4M3 codes, uint8, and the rows' absolute maxima, float32 ``[rows, 1]``."""
    largest = x.abs().amax(1, keepdim=True).float()
    y = x.float() * (6.0 / largest.clamp(min=_LEAST)) * (_LARGEST / 6.0)
    bits = y.view(torch.int32)
    rest = bits & (2**_CUT - 1)
    down = bits - rest
    odd = torch.where(rest <= _CLOSE, down, torch.where(rest >= 2**_CUT - _CLOSE, down + 2**_CUT, down | 2**_CUT))
    return odd.view(torch.float32).to(_E4M3).view(torch.uint8), largest


def decode(codes: Tensor, largest: Tensor) -> Tensor:
    """The inverse of :func:`encode` on its results, bfloat16; ``largest`` broadcasts."""
    return (codes.view(_E4M3).float() * (largest / _LARGEST)).bfloat16()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """One kernel on CUDA; on CPUs, which wait for the network longer than for this, as it is."""
    return _compiled(function) if device.type == "cuda" else function
