"""Gradients as codes on their way between ranks: how bytes are laid out, and what is computed before and after.

The plain-torch functions here run on CPUs, through the C++ kernels of ``quantize`` and ``dequantize``, and define what
:mod:`.triton` computes on CUDA, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import qcompile.kernels.register  # noqa: F401  (the ops below)

__all__ = ["Packets", "decode", "encode", "summed", "summed_and_encoded"]

#: What rows and their parts begin at a multiple of, so that threads move 16 bytes at once.
_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Packets:
    """Rows of codes, each with its scales behind it, as bytes that a collective moves.

    Attributes:
        data: uint8 ``[rows, bytes of a row]``.
        width: elements of a row.
        format: of the codes, one byte each.
        block: neighbours that share a float32 scale; the last block of a row may be short.
    """

    data: Tensor
    width: int
    format: str
    block: int

    @staticmethod
    def empty(rows: int, width: int, format: str, block: int, device: torch.device) -> Packets:
        made = Packets(torch.empty(rows, 0, dtype=torch.uint8, device=device), width, format, block)
        row = made.first_scale + _aligned(4 * made.blocks)
        return replace(made, data=torch.empty(rows, row, dtype=torch.uint8, device=device))

    def like(self, rows: int) -> Packets:
        """Others of the same width, uninitialized."""
        return Packets.empty(rows, self.width, self.format, self.block, self.data.device)

    @property
    def quantizer(self) -> str:
        """Of blocks as rows: so kernels do not depend on the size of blocks."""
        return f"{self.format} row absmax even"

    @property
    def blocks(self) -> int:
        """Of a row."""
        return -(-self.width // self.block)

    @property
    def codes(self) -> Tensor:
        """Uint8 ``[rows, width]``."""
        return self.data[:, : self.width]

    @property
    def first_scale(self) -> int:
        """Where in a row scales begin, in bytes."""
        return _aligned(self.width)

    @property
    def scales(self) -> Tensor:
        """Float32 ``[rows, blocks]``."""
        return self.data[:, self.first_scale :].view(torch.float32)[:, : self.blocks]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _provider(device: torch.device, name: str) -> Callable[..., None]:
    if device.type != "cuda":
        return globals()[f"_{name}"]
    from . import triton  # torch for CPUs comes without it

    return getattr(triton, name)


def encode(x: Tensor, stride: int, skip: int, packets: Packets) -> None:
    """Quantize rows of a flat tensor into ``packets``.

    Args:
        x: flat; element j of row i is element ``i · stride + j``, or 0 where there is none.
        skip: a row that is left out: its successors move up. As many as there are rows to leave out none.
    """
    _provider(x.device, "encode")(x, stride, skip, packets)


def _encode(x: Tensor, stride: int, skip: int, packets: Packets) -> None:
    rows = [i + (i >= skip) for i in range(len(packets.data))]
    if not rows:
        return
    whole = packets.blocks * packets.block
    values = torch.stack([_padded(x[i * stride : i * stride + packets.width], whole) for i in rows]).float()
    codes, scales = torch.ops.qcompile.quantize(values.view(-1, packets.block), packets.quantizer, -1)
    packets.codes.copy_(codes.view(len(rows), whole)[:, : packets.width])
    packets.scales.copy_(scales.view(len(rows), packets.blocks))


def summed(packets: Packets, own: Tensor, rank: int, factor: float, out: Tensor) -> None:
    """``out = factor · Σ`` over ranks in their order, in float32: row by row what others sent, and ``own`` unrounded.

    Args:
        packets: one row of every rank but ``rank``, in their order.
        own: flat, this rank's summand; zeros follow where it is shorter.
        out: flat, as many elements as a row has, of any dtype.
    """
    _provider(out.device, "summed")(packets, own, rank, factor, out)


def _summed(packets: Packets, own: Tensor, rank: int, factor: float, out: Tensor) -> None:
    out.copy_(_sum(packets, own, rank, factor))


def summed_and_encoded(packets: Packets, own: Tensor, rank: int, factor: float, out: Packets) -> None:
    """:func:`summed`, quantized into the one row of ``out``; the sum itself is not stored."""
    _provider(out.data.device, "summed_and_encoded")(packets, own, rank, factor, out)


def _summed_and_encoded(packets: Packets, own: Tensor, rank: int, factor: float, out: Packets) -> None:
    _encode(_sum(packets, own, rank, factor), 0, 1, out)


def _sum(packets: Packets, own: Tensor, rank: int, factor: float) -> Tensor:
    values = _decoded(packets)
    total = torch.zeros(packets.width)
    for source in range(len(packets.data) + 1):
        total += _padded(own, packets.width).float() if source == rank else values[source - (source > rank)]
    return total * factor


def decode(packets: Packets, out: Tensor, stride: int) -> None:
    """The inverse of :func:`encode` with nothing left out: ``out`` is flat, and elements beyond its end are dropped."""
    _provider(out.device, "decode")(packets, out, stride)


def _decode(packets: Packets, out: Tensor, stride: int) -> None:
    for i, row in enumerate(_decoded(packets)):
        target = out[i * stride : i * stride + packets.width]
        target.copy_(row[: len(target)])


def _decoded(packets: Packets) -> Tensor:
    """Float32 ``[rows, width]``."""
    codes = _padded(packets.codes, packets.blocks * packets.block).reshape(-1, packets.block)
    scales = packets.scales.reshape(-1, 1)
    values = torch.ops.qcompile.dequantize(codes, scales, packets.quantizer, -1, packets.block, torch.float32)
    return values.view(len(packets.data), packets.blocks * packets.block)[:, : packets.width]


def _padded(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last axis."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
