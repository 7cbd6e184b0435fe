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
    if not width:
        return 0
    received, sent = _exchanged(x, width, group, codes)
    summed(received, x[rank * width : (rank + 1) * width], rank, factor, out)
    return sent


def all_reduce(x: Tensor, group: dist.ProcessGroup, factor: float, codes: Codes) -> int:
    """``x = factor · Σ`` over ranks, in place and bit for bit the same on all; ``x`` is flat. Returns the bytes that
    this rank sends. A single rank has nothing to send, and nothing of its own is quantized.
    """
    rank, world = group.rank(), group.size()
    if world == 1:
        x.mul_(factor)
        return 0
    width = -(-len(x) // (world * codes.block)) * codes.block  # the last shards may be short, or empty
    if not width:
        return 0
    received, sent = _exchanged(x, width, group, codes)
    mine, all_of = received.like(1), received.like(world)
    summed_and_encoded(received, x[rank * width : (rank + 1) * width], rank, factor, mine)
    compat.all_gather_single(all_of.data, mine.data, group=group)
    decode(all_of, x, width)
    return sent + (world - 1) * mine.data.numel()


def _exchanged(x: Tensor, width: int, group: dist.ProcessGroup, codes: Codes) -> tuple[Packets, int]:
    """What the other ranks have sent of this rank's shard of ``x``, ``width`` elements, and the bytes that this rank
    sends. Shards travel whole: every part that was to be quantized while another travels made a reduction longer on two
    H200. On CUDA the current stream waits, not the host.
    """
    rank, world = group.rank(), group.size()
    counts = [int(other != rank) for other in range(world)]
    sent = Packets.empty(world - 1, width, codes.format, codes.block, x.device)
    received = sent.like(world - 1)
    encode(x, width, rank, sent)
    dist.all_to_all_single(received.data, sent.data, counts, counts, group=group)
    return received, sent.data.numel()


def wide_bytes(elements: int, dtype: torch.dtype, world: int, hops: int) -> int:
    """What a rank sends in a reduce-scatter (one hop) or an all-reduce (two) of ``elements`` as they are."""
    return hops * elements * dtype.itemsize * (world - 1) // world
