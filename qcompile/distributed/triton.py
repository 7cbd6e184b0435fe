"""What :mod:`.packets` defines, on CUDA: every number is read once and written once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.quantize.grid import grid_of
from qcompile.kernels.quantize.triton_codes import encoded, in_float32, saturated
from qcompile.kernels.triton import INTERPRETED, absolute_maximum, greater, launch

from .packets import Packets

__all__ = ["decode", "encode", "summed", "summed_and_encoded"]

#: Elements of a program; a thread holds 16, which are 16 bytes of codes.
_ELEMENTS, _WARPS = 4096, 8


@triton.jit
def _places(blocks: tl.constexpr, block: tl.constexpr):
    """Blocks of a program, and their elements ``[blocks, block]``."""
    numbers = tl.program_id(0) * blocks + tl.arange(0, blocks)
    return numbers, numbers[:, None] * block + tl.arange(0, block)[None, :]


@triton.jit
def _write(x, row, codes, scales, numbers, at, width, row_bytes, fmt: tl.constexpr):
    """Blocks of float32 numbers as codes and scales of a row."""
    amax = greater(absolute_maximum(x, 1), fmt.amax_floor)
    scale, gamma = fmt.scale_pair(amax)
    _, code = encoded(saturated(x * gamma[:, None], fmt), fmt)
    tl.store(codes + row * row_bytes + at, code.to(tl.uint8), mask=at < width)
    tl.store(scales + row * (row_bytes // 4) + numbers, scale, mask=numbers * at.shape[1] < width)


@triton.jit
def _read(row, codes, scales, numbers, at, width, row_bytes, fmt: tl.constexpr):
    """The float32 numbers of blocks of a row."""
    code = tl.load(codes + row * row_bytes + at, mask=at < width, other=0)
    scale = tl.load(scales + row * (row_bytes // 4) + numbers, mask=numbers * at.shape[1] < width, other=0.0)
    if INTERPRETED or not fmt.is_target:
        level = fmt.decode(code.to(tl.int32))
    elif fmt.target == "e4m3":
        level = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        level = code.to(tl.float8e5, bitcast=True).to(tl.float32)
    return level * scale[:, None]


# Ranks and their number are no constants: all ranks run the same kernels.
@triton.jit(do_not_specialize=["skip"])
def _encode(
    x, codes, scales, size, stride, skip, width, row_bytes, fmt: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(1)
    first = (row + (row >= skip).to(tl.int32)).to(tl.int64) * stride
    numbers, at = _places(blocks, block)
    values = in_float32(tl.load(x + first + at, mask=at < tl.minimum(size - first, width), other=0.0))
    _write(values, row.to(tl.int64), codes, scales, numbers, at, width, row_bytes, fmt)


@triton.jit(do_not_specialize=["rank", "sources"])
def _sum(
    own, codes, scales, out, out_scales, size, rank, sources, factor, width, row_bytes,
    fmt: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    numbers, at = _places(blocks, block)
    total = tl.zeros(at.shape, tl.float32)
    for source in range(sources):
        if source == rank:
            total += in_float32(tl.load(own + at, mask=at < size, other=0.0))
        else:
            row = (source - (source > rank).to(tl.int32)).to(tl.int64)
            total += _read(row, codes, scales, numbers, at, width, row_bytes, fmt)
    total *= factor
    if out_scales is None:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=at < width)
    else:
        _write(total, 0, out, out_scales, numbers, at, width, row_bytes, fmt)


@triton.jit
def _decode(
    codes, scales, out, size, stride, width, row_bytes, fmt: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    numbers, at = _places(blocks, block)
    values = _read(row, codes, scales, numbers, at, width, row_bytes, fmt)
    inside = at < tl.minimum(size - row * stride, width)
    tl.store(out + row * stride + at, values.to(out.dtype.element_ty), mask=inside)


def _launch(kernel, packets: Packets, rows: int, *arguments) -> None:
    if not rows or not packets.width:
        return
    blocks = max(1, _ELEMENTS // packets.block)
    programs = -(-packets.width // (blocks * packets.block))
    constants: dict[str, Any] = {"blocks": blocks, "block": packets.block, "num_warps": _WARPS}
    constants["fmt"] = grid_of(packets.quantizer)
    launch(kernel, (programs, rows), *arguments, packets.width, packets.data.shape[1], **constants)


def _parts(packets: Packets) -> tuple[Tensor, Tensor]:
    """Codes and scales, of which kernels take the addresses."""
    return packets.codes, packets.scales


def encode(x: Tensor, stride: int, skip: int, packets: Packets) -> None:
    """See :func:`.packets.encode`."""
    _launch(_encode, packets, len(packets.data), x, *_parts(packets), len(x), stride, skip)


def summed(packets: Packets, own: Tensor, rank: int, factor: float, out: Tensor) -> None:
    """See :func:`.packets.summed`."""
    sources = len(packets.data) + 1
    _launch(_sum, packets, 1, own, *_parts(packets), out, None, len(own), rank, sources, factor)


def summed_and_encoded(packets: Packets, own: Tensor, rank: int, factor: float, out: Packets) -> None:
    """See :func:`.packets.summed_and_encoded`."""
    sources = len(packets.data) + 1
    _launch(_sum, packets, 1, own, *_parts(packets), *_parts(out), len(own), rank, sources, factor)


def decode(packets: Packets, out: Tensor, stride: int) -> None:
    """See :func:`.packets.decode`."""
    _launch(_decode, packets, len(packets.data), *_parts(packets), out, len(out), stride)
