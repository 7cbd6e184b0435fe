"""Reductions in which codes travel and sums are float32.

A reduce-scatter is one ``all_to_all_single``: a rank sends every other rank the codes of that rank's shard, and adds up
what it gets, in the order of ranks, with its own summand as it is. An all-reduce quantizes the sum of each shard once
more and gathers the codes, so that all ranks decode the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from qcompile import compat

from .packets import Packets, decode, encode, summed, summed_and_encoded

__all__ = ["Codes", "all_reduce", "reduce_scatter", "wide_bytes"]

#: Shards are cut into this many parts at most, of which one is quantized or added up while another travels. No part is
#: shorter than this many elements, which are bytes of codes: messages have a latency.
MOST_PARTS, SHORTEST_PART = 4, 8 << 20


@dataclass(frozen=True)
class Codes:
    """How gradients travel: the ``format`` of codes, and the ``block`` of neighbours that share a float32 scale."""

    format: str
    block: int


def reduce_scatter(x: Tensor, out: Tensor, group: dist.ProcessGroup, factor: float, codes: Codes) -> int:
    """``out = factor · Σ`` over ranks of their ``x``'s shard of this rank. Returns the bytes that this rank sends.

    Args:
        x: flat, the shards of all ranks one after the other.
        out: flat, one shard. Its dtype may be another.
    """
    rank, width = group.rank(), len(out)
    parts = _send(x, width, group, codes)
    own = x[rank * width : (rank + 1) * width]
    for start, arriving in parts:
        received = arriving.wait()
        summed(received, own[start:][: received.width], rank, factor, out[start:][: received.width])
    return sum(arriving.bytes for _, arriving in parts)


def all_reduce(x: Tensor, group: dist.ProcessGroup, factor: float, codes: Codes) -> int:
    """``x = factor · Σ`` over ranks, in place and bit for bit the same on all; ``x`` is flat. Returns the bytes that
    this rank sends. A single rank has nothing to send, and nothing of its own is quantized.
    """
    rank, world = group.rank(), group.size()
    if world == 1:
        x.mul_(factor)
        return 0
    width = -(-len(x) // (world * codes.block)) * codes.block  # the last shards may be short, or empty
    own = x[rank * width : (rank + 1) * width]
    parts = _send(x, width, group, codes)
    gathering = []
    for start, arriving in parts:
        received = arriving.wait()
        mine, all_of = received.like(1), received.like(world)
        summed_and_encoded(received, own[start:][: received.width], rank, factor, mine)
        work = compat.all_gather_single(all_of.data, mine.data, group=group, async_op=True)
        gathering.append((start, work, all_of, mine))
    for start, work, all_of, _ in gathering:
        work.wait()
        decode(all_of, x[start:], width)
    sent = sum(arriving.bytes for _, arriving in parts)
    return sent + (world - 1) * sum(mine.data.numel() for *_, mine in gathering)


@dataclass(frozen=True, eq=False)
class _Arriving:
    """``sent`` is kept until ``received`` is there. ``bytes`` that this rank sends."""

    work: dist.Work
    sent: Packets
    received: Packets

    @property
    def bytes(self) -> int:
        return self.sent.data.numel()

    def wait(self) -> Packets:
        """On CUDA the current stream waits, not the host."""
        self.work.wait()
        return self.received


def _send(x: Tensor, width: int, group: dist.ProcessGroup, codes: Codes) -> list[tuple[int, _Arriving]]:
    """The other ranks' shards of ``x``, of ``width`` elements, on their way to them, in parts; with each where in a
    shard it begins.
    """
    rank, world = group.rank(), group.size()
    counts = [int(other != rank) for other in range(world)]
    found = []
    length = _part_length(width, codes.block)
    for start in range(0, width, length):
        sent = Packets.empty(world - 1, min(length, width - start), codes.format, codes.block, x.device)
        received = sent.like(world - 1)
        encode(x[start:], width, rank, sent)
        work = dist.all_to_all_single(received.data, sent.data, counts, counts, group=group, async_op=True)
        found.append((start, _Arriving(work, sent, received)))
    return found


def _part_length(width: int, block: int) -> int:
    """Elements of a part of a shard of ``width``: whole blocks."""
    parts = max(1, min(MOST_PARTS, width // SHORTEST_PART))
    return max(1, -(-width // (parts * block))) * block


def wide_bytes(elements: int, dtype: torch.dtype, world: int, hops: int) -> int:
    """What a rank sends in a reduce-scatter (one hop) or an all-reduce (two) of ``elements`` as they are."""
    return hops * elements * dtype.itemsize * (world - 1) // world
