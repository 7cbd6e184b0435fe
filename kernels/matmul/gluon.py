"""Matrix products for Hopper in Gluon, Triton's language of explicit layouts: FP8, INT8 or single bits, scaled in the
epilogue.

One persistent program per processor, its warps specialized:

* a warp that loads: TMA copies of both operands into a ring of stages in shared memory;
* two warp groups that multiply: each owns the upper or the lower half of the tile's rows, and both read the same stage
  of ``b``. They meet at the stages' barriers only, and the loads of the next tile go on while they write this one.

It is there for INT8, and for products of groups. Triton's compiler (3.6, 3.7) knows the widths of Hopper's integer
instruction up to 224 columns, though they go up to 256 (PTX ISA, "wgmma.mma_async", shapes for .s8). It cuts a tile of
256 columns into two products of 128, each of which reads ``a`` from shared memory, whose bandwidth limits 8-bit
products; and its pipeline waits for the products of a step before it begins the next.

Gluon ends in the same compiler and meets the same limit, but its layouts are given by hand and are the same for both
types: the product of two e4m3 in float32 and that of two int8 in int32 differ in the name of one instruction. So INT8
is compiled as e4m3, whose bits are those of int8 and whose sums are the bits of int32, which the epilogue reads as
such; and :func:`as_integers` renames the instruction in the PTX.

The instruction for single bits reads as many bytes as the others, 256 bits for 32 numbers of e4m3, at the same rate,
and counts the bits that are set in both operands (PTX ISA, "wgmma.mma_async", ``.b1.and.popc``). It is another name in
the same place: a product of signs takes an eighth of the time of one of 8-bit numbers.

Products of groups (experts, ``grouped.py``) are short: 16 steps for 2048 tokens or features. What comes before and
after the steps of a tile weighs as much, and here the loads of the next tile go on meanwhile. Where rows are in groups,
a tile is of one group. What hangs over the group's last row belongs to the next group: a part of a tile that has such
rows leaves by addresses, one by one, and all others by TMA.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.cache import get_cache_manager

from qcompile import compat
from qcompile.ir.ops import GROUP_ALIGNMENT
from qcompile.kernels.groups import most_tiles
from qcompile.kernels.triton import launch

from . import reference
from .triton import TMA_ALIGNMENT, Problem, accumulator_of, card_of, fastest, first_element, predicted_cycles
from .triton import Config as TritonConfig

__all__ = [
    "CONFIGS",
    "SHARED_MEMORY",
    "Config",
    "as_integers",
    "best_config",
    "candidates",
    "launch_arguments",
    "mm_1bit",
    "mm_8bit",
    "mm_8bit_grouped",
    "mm_8bit_kernel",
]

#: TMA copies as Triton 3.9 calls them; 3.6 has them by their former names only.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

#: Most shared memory that a program may take on compute capability 9.0, in bytes (CUDA C++ Programming Guide,
#: "Technical Specifications per Compute Capability").
SHARED_MEMORY = 227 * 1024
#: Bytes of K in a stage: one row of the swizzled shared memory.
BLOCK_K = gl.constexpr(128)
#: Warp groups that multiply, and the registers of a thread: of the second of them, and of the warp that loads, which
#: needs more to look for a tile's group. The first gets what is left of 168 per thread.
CONSUMERS = gl.constexpr(2)
_REGISTERS = gl.constexpr((232, 24))
_REGISTERS_OF_GROUPS = gl.constexpr((232, 40))
_ALIGNMENT = gl.constexpr(GROUP_ALIGNMENT)


@dataclass(frozen=True)
class Config:
    """How the kernel is cut up.

    Attributes:
        block_m, block_n: extents of the tile, of which each of the two warp groups multiplies half the rows.
        stages: tiles of both operands in flight.
        piece_bytes: length of a row of the pieces in which the output leaves, a multiple of 128 bytes.
        buffers: pieces of a warp group that may be on their way at once.
        group_m: tiles down before the next column of tiles begins.
    """

    block_m: int
    block_n: int
    stages: int
    piece_bytes: int = 128
    buffers: int = 1
    group_m: int = 8

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{BLOCK_K.value} s{self.stages} g{self.group_m}"
        return f"{tile} pieces {self.piece_bytes} x {self.buffers}"

    def shared_memory(self, summands: int = 0) -> int:
        """Bytes of shared memory that a program takes, at most.

        Operands in flight, output on its way, for each warp group the scales of the columns and their ``summands`` (a
        bias, an offset: 0 to 2), barriers.
        """
        operands = self.stages * (self.block_m + self.block_n) * BLOCK_K.value
        output = self.buffers * self.block_m * self.piece_bytes
        columns = CONSUMERS.value * (1 + summands) * 4 * self.block_n
        return operands + output + columns + 16 * self.stages + 256


#: What can serve a problem; of those that ``predicted_cycles`` cannot tell apart, the likelier first.
CONFIGS = (
    Config(128, 256, stages=4, buffers=2),
    Config(128, 256, stages=4),
    Config(128, 256, stages=4, group_m=16),
    Config(128, 256, stages=3, buffers=2),
    Config(128, 256, stages=3, piece_bytes=256),
    Config(256, 128, stages=4, group_m=4),
    Config(128, 128, stages=6),
)


# --- kernel ---------------------------------------------------------------------------------------------------------


@gluon.jit
def _next(stage, phase, stages: gl.constexpr):
    """The stage after ``stage``, and the parity of its barriers' phase, which changes once around the ring."""
    last = stage == stages - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(stage, stages: gl.constexpr):
    """The stage before ``stage``: not a variable that follows it, which Triton takes for a constant of the loop where
    both have the same value at first.
    """
    return gl.where(stage == 0, stages - 1, stage - 1)


@gluon.jit
def _extent(offs, group, of_rows: gl.constexpr):
    """Rows of a group; of a contraction, rounded up to where the next group begins."""
    before = gl.load(offs + gl.maximum(group, 1) - 1)
    rows = gl.maximum(gl.load(offs + group) - gl.where(group == 0, 0, before), 0)
    if of_rows:
        return rows
    else:
        return gl.cdiv(rows, _ALIGNMENT) * _ALIGNMENT


@gluon.jit
def _tiles(offs, groups, m, n, most: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr):
    """Tiles of all groups together. ``most``: 0, or a power of two where rows are in as many groups at most."""
    if most > 0:
        # Every warp has all groups, so that nothing is exchanged among warps.
        per_lane: gl.constexpr = most // 32 if most > 32 else 1
        layout: gl.constexpr = gl.BlockedLayout([per_lane], [32], [gl.num_warps()], [0])
        index = gl.arange(0, most, layout)
        ends = gl.load(offs + index, mask=index < groups, other=0)
        starts = gl.load(offs + index - 1, mask=(index > 0) & (index < groups), other=0)
        down = gl.sum(gl.cdiv(gl.maximum(ends - starts, 0), block_m), 0)
    else:
        down = groups * gl.cdiv(m, block_m)
    return down * gl.cdiv(n, block_n)


@gluon.jit
def _height(begin, end, m, of_rows: gl.constexpr):
    """Rows of a group's result."""
    if of_rows:
        return end - begin
    else:
        return m


@gluon.jit
def _seek(
    tile, group, first, begin, end, offs, m, n, of_rows: gl.constexpr, block_m: gl.constexpr, block_n: gl.constexpr
):
    """The group of a tile, its first tile, and where its rows, or its part of the contraction, begin and end; those of
    an earlier tile are given.
    """
    across = gl.cdiv(n, block_n)
    after = first + gl.cdiv(_height(begin, end, m, of_rows), block_m) * across
    while tile >= after:
        group += 1
        first = after
        begin = end
        end += _extent(offs, group, of_rows)
        after += gl.cdiv(_height(begin, end, m, of_rows), block_m) * across
    return group, first, begin, end


@gluon.jit
def _load(
    of_rows: gl.constexpr,
    block_m: gl.constexpr,
    block_n: gl.constexpr,
    stages: gl.constexpr,
    group_m: gl.constexpr,
    a,
    b,
    offs,
    tiles,
    m,
    n,
    k,
    left,
    right,
    full,
    empty,
):
    """Fill the ring: the part of ``a`` of each warp group, and ``b``."""
    part_m: gl.constexpr = block_m // CONSUMERS
    stage = 0
    phase = 1  # of a fresh barrier, the phase before counts as over: all stages are empty
    group, first, begin, end = 0, 0, 0, k
    if offs is not None:
        end = _extent(offs, 0, of_rows)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        if offs is not None:
            group, first, begin, end = _seek(tile, group, first, begin, end, offs, m, n, of_rows, block_m, block_n)
        row, column = first_element(tile - first, _height(begin, end, m, of_rows), n, block_m, block_n, group_m)
        depth_begin, depth_end = begin, end
        if of_rows:  # whose matrices lie below each other
            row += begin
            column += group * n
            depth_begin, depth_end = 0, k
        for depth in range(depth_begin, depth_end, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (block_m + block_n) * BLOCK_K)
            for part in gl.static_range(CONSUMERS):
                into = left.index(stage * CONSUMERS + part)
                async_load(a, [row + part * part_m, depth], arrived, into)
            async_load(b, [column, depth], arrived, right.index(stage))
            stage, phase = _next(stage, phase, stages)


@gluon.jit
def _pieces(product, parts: gl.constexpr):
    """A tuple of the tile's ``parts`` pieces, from left to right."""
    if parts == 1:
        return (product,)
    else:  # what follows a return is compiled as well
        halves = product.reshape((product.shape[0], 2, product.shape[1] // 2))
        first, second = halves.permute((0, 2, 1)).split()
        return _pieces(first, parts // 2) + _pieces(second, parts // 2)


@gluon.jit
def _send(value, out, row, column, buffer, buffers: gl.constexpr):
    """By TMA, once the piece that was in ``buffer`` has left."""
    tma.store_wait(buffers - 1)
    buffer.store(value.to(out.dtype))
    fence_async_shared()
    async_store(out, [row, column], buffer)


@gluon.jit
def _write(value, pointer, above, rows, height, column, n):
    """By addresses: rows of a group's ``height``, ``above`` which others lie."""
    layout: gl.constexpr = value.type.layout
    columns = column + gl.arange(0, value.shape[1], gl.SliceLayout(0, layout))
    address = pointer + (above + rows).to(gl.int64)[:, None] * n + columns[None, :]  # m · n may exceed 2^31
    mask = (rows < height)[:, None] & (columns < n)[None, :]
    gl.store(address, value.to(pointer.dtype.element_ty), mask=mask)


@gluon.jit
def _multiply(
    part: gl.constexpr,
    of_rows: gl.constexpr,
    integer: gl.constexpr,
    block_m: gl.constexpr,
    block_n: gl.constexpr,
    stages: gl.constexpr,
    piece_n: gl.constexpr,
    buffers: gl.constexpr,
    group_m: gl.constexpr,
    optional,
    staged,
    columnwise,
    left,
    right,
    full,
    empty,
    scale_a,
    scale_b,
    tiles,
    m,
    n,
    k,
    scale_a_stride,
    scale_b_stride,
):
    """One warp group: its rows of every tile of this program.

    ``out`` is a tensor descriptor where tiles leave by TMA, ``pointer`` an address where some do not. ``staged`` holds
    pieces of the output on their way out, ``columnwise`` the scales of the columns, then their bias, then their
    offsets, as far as there are such.
    """
    bias, offset_a, offset_b, offs, out, pointer = optional  # ``None`` where there are none
    part_m: gl.constexpr = block_m // CONSUMERS
    parts: gl.constexpr = block_n // piece_n
    gl.static_assert(parts % buffers == 0)  # a buffer is taken in turn
    warps: gl.constexpr = [gl.num_warps(), 1]
    whole_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps, [16, block_n, 32])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps, [16, piece_n, 32])
    by_thread: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    stage = 0
    phase = 0
    group, first, begin, end = 0, 0, 0, k
    if offs is not None:
        end = _extent(offs, 0, of_rows)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        if offs is not None:
            group, first, begin, end = _seek(tile, group, first, begin, end, offs, m, n, of_rows, block_m, block_n)
        height = _height(begin, end, m, of_rows)
        row, column = first_element(tile - first, height, n, block_m, block_n, group_m)
        row += part * part_m
        # Groups lie below each other, in results as in scales.
        above = group * m
        before = group * n
        depth_begin, depth_end = begin, end
        if of_rows:
            above = begin
            depth_begin, depth_end = 0, k
        # Asked for now, so that they are there when the epilogue wants them.
        rows = row + gl.arange(0, part_m, gl.SliceLayout(1, layout))
        by_row = gl.load(scale_a + (above + rows) * scale_a_stride, mask=rows < height, other=0.0)
        columns = column + gl.arange(0, block_n, by_thread)
        by_column = gl.load(scale_b + (before + columns) * scale_b_stride, mask=columns < n, other=0.0)
        if bias is not None:
            shift = gl.load(bias + before + columns, mask=columns < n, other=0.0).to(gl.float32)
        if offset_a is not None:
            row_offset = gl.load(offset_a + rows, mask=rows < height, other=0.0)
        if offset_b is not None:
            column_offset = gl.load(offset_b + columns, mask=columns < n, other=0.0)

        product = gl.zeros((part_m, block_n), gl.float32, whole_layout)
        for depth in range(depth_begin, depth_end, BLOCK_K):
            mbarrier.wait(full.index(stage), phase)
            transposed = right.index(stage).permute((1, 0))
            product = warpgroup_mma(left.index(stage * CONSUMERS + part), transposed, product, is_async=True)
            product = warpgroup_mma_wait(1, deps=[product])
            mbarrier.arrive(empty.index(_before(stage, stages)), pred=depth > depth_begin)
            stage, phase = _next(stage, phase, stages)
        product = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(empty.index(_before(stage, stages)), pred=depth_begin < depth_end)

        scales = columnwise.index(0)
        scales.store(by_column)
        if bias is not None:
            columnwise.index(1).store(shift)
        if offset_b is not None:
            offsets = columnwise.index(columnwise.shape[0] - 1)
            offsets.store(column_offset)
        whole = row + part_m <= height  # nothing hangs over the last row
        pieces = _pieces(product, parts)
        for piece in gl.static_range(parts):
            value = gl.convert_layout(pieces[piece], layout, assert_trivial=True)
            if integer:
                value = value.to(gl.int32, bitcast=True).to(gl.float32)
            if offset_a is not None:
                value += row_offset[:, None]
            if offset_b is not None:
                value += offsets.slice(piece * piece_n, piece_n).load(gl.SliceLayout(0, layout))[None, :]
            factor = scales.slice(piece * piece_n, piece_n).load(gl.SliceLayout(0, layout))
            value = value * by_row[:, None] * factor[None, :]
            if bias is not None:
                summand = columnwise.index(1).slice(piece * piece_n, piece_n).load(gl.SliceLayout(0, layout))
                value += summand[None, :]
            at = column + piece * piece_n
            if pointer is None:
                _send(value, out, above + row, at, staged.index(piece % buffers), buffers)
            elif out is None:
                _write(value, pointer, above, rows, height, at, n)
            elif whole:
                _send(value, out, above + row, at, staged.index(piece % buffers), buffers)
            else:
                _write(value, pointer, above, rows, height, at, n)
    if out is not None:
        tma.store_wait(0)


# One binary for all extents and addresses: that of INT8 is made once.
@gluon.jit(
    do_not_specialize=["groups", "m", "n", "k", "scale_a_stride", "scale_b_stride"],
    do_not_specialize_on_alignment=["pointer", "scale_a", "scale_b", "bias", "offset_a", "offset_b", "offs"],
)
def mm_8bit_kernel(
    a,
    b,
    out,
    pointer,
    scale_a,
    scale_b,
    bias,
    offset_a,
    offset_b,
    offs,
    groups,
    m,
    n,
    k,
    scale_a_stride,
    scale_b_stride,
    most: gl.constexpr,
    integer: gl.constexpr,
    block_m: gl.constexpr,
    block_n: gl.constexpr,
    stages: gl.constexpr,
    piece_n: gl.constexpr,
    buffers: gl.constexpr,
    group_m: gl.constexpr,
):
    """``a``, ``b`` and ``out`` are tensor descriptors; the accelerator fills with zeros and drops what lies outside.

    ``pointer``: of the result, where tiles leave by addresses: all of them where ``out`` is ``None``. ``offs``: where
    groups end, ``None`` if there are none. ``most``: a power of two, at least the number of groups, where these are
    groups of rows, else 0.
    """
    of_rows: gl.constexpr = most > 0
    tiles = _tiles(offs, groups, m, n, most, block_m, block_n)
    part_m: gl.constexpr = block_m // CONSUMERS
    left = gl.allocate_shared_memory(a.dtype, [stages * CONSUMERS, part_m, BLOCK_K], a.layout)
    right = gl.allocate_shared_memory(b.dtype, [stages, block_n, BLOCK_K], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    kinds: gl.constexpr = 1 + (bias is not None) + (offset_b is not None)
    columns_0 = gl.allocate_shared_memory(gl.float32, [kinds, block_n], plain)
    columns_1 = gl.allocate_shared_memory(gl.float32, [kinds, block_n], plain)
    if out is not None:
        staged_0 = gl.allocate_shared_memory(out.dtype, [buffers, part_m, piece_n], out.layout)
        staged_1 = gl.allocate_shared_memory(out.dtype, [buffers, part_m, piece_n], out.layout)
    else:
        staged_0 = columns_0
        staged_1 = columns_1
    optional = (bias, offset_a, offset_b, offs, out, pointer)
    ring = (left, right, full, empty)
    problem = (scale_a, scale_b, tiles, m, n, k, scale_a_stride, scale_b_stride)
    registers: gl.constexpr = _REGISTERS if offs is None else _REGISTERS_OF_GROUPS
    gl.warp_specialize(
        [
            (
                _multiply,
                # Triton adds tuples, but does not unpack them; of what is added on the right, only tensors survive.
                (0, of_rows, integer, block_m, block_n, stages, piece_n, buffers, group_m, optional)  # noqa: RUF005
                + (staged_0, columns_0)
                + ring
                + problem,
            ),
            (
                _multiply,
                (1, of_rows, integer, block_m, block_n, stages, piece_n, buffers, group_m, optional)  # noqa: RUF005
                + (staged_1, columns_1)
                + ring
                + problem,
            ),
            (_load, (of_rows, block_m, block_n, stages, group_m, a, b, offs, tiles, m, n, k) + ring),  # noqa: RUF005
        ],
        [4, 1],
        registers,
    )


# --- choice of a config ---------------------------------------------------------------------------------------------


@cache
def candidates(problem: Problem, summands: int = 0) -> tuple[Config, ...]:
    """The configs that fit into shared memory, in the order of ``predicted_cycles``, then of :data:`CONFIGS`.

    Where operands are bits, tall tiles come before wide ones: with an eighth of the steps outputs weigh more, and tall
    tiles have fewer columns' scales (1 to 9 % faster on an H200, benchmarks/h200/gemm_int1_configs.csv).
    """
    bits = problem.a_dtype == torch.uint8

    def cost(config: Config) -> tuple[float, bool]:
        tile = TritonConfig(config.block_m, config.block_n, BLOCK_K.value, warps=12, stages=config.stages)
        return predicted_cycles(tile, problem), bits and config.block_m < config.block_n

    fitting = [config for config in CONFIGS if config.shared_memory(summands) <= SHARED_MEMORY]
    return tuple(sorted(fitting, key=cost))


def best_config(problem: Problem, run: Callable[[Config], None], tune: bool, summands: int = 0) -> Config:
    """The measured config, if there is one or ``tune`` asks for it, else the first candidate; ``run`` launches one."""
    measured = _MEASURED.get((problem, summands))
    if measured is None and tune and not torch.cuda.is_current_stream_capturing():
        measured = _MEASURED[problem, summands] = fastest(candidates(problem, summands), run)
    return measured or candidates(problem, summands)[0]


#: What this process measured, by problem and summands of the columns.
_MEASURED: dict[tuple[Problem, int], Config] = {}


# --- launch ---------------------------------------------------------------------------------------------------------


def mm_8bit(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    *,
    config: Config | None = None,
    tune: bool = False,
) -> Tensor:
    """``(a @ bᵀ + offset_a + offset_bᵀ) · scale_a · scale_bᵀ + bias`` ``[M, N]`` in ``dtype`` (bfloat16, float16 or
    float32).

    a ``[M, K]`` and b ``[N, K]`` both int8, or each float8_e4m3fn or float8_e5m2; M, N ≥ 1, K ≥ 16 a multiple of 16;
    copied if they are not contiguous or not aligned to 16 bytes. scale_a ``[M, 1]`` or ``[1, 1]`` and scale_b
    ``[N, 1]`` or ``[1, 1]`` float32; bias ``[N]`` floating point; offset_a ``[M, 1]`` and offset_b ``[N, 1]`` float32.
    ``config`` fixes how the kernel is cut up; ``tune`` measures which is fastest, once per process. Raises
    ``ValueError`` for other dtypes and other K.
    """
    accumulator_of(a, b)  # raises for what tensor cores do not multiply
    if a.shape[1] % TMA_ALIGNMENT:
        msg = f"mm_8bit in Gluon needs K to be a multiple of {TMA_ALIGNMENT}, got {a.shape[1]}"
        raise ValueError(msg)
    return _product(a, b, scale_a, scale_b, dtype, (bias, offset_a, offset_b), config, tune)


def mm_1bit(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    *summands: Tensor | None,
    config: Config | None = None,
    tune: bool = False,
) -> Tensor:
    """:func:`mm_8bit` with the numbers of bits that are set in rows of both a ``[M, K/8]`` and b ``[N, K/8]``, uint8.

    K a multiple of 128; ``summands``: bias, offset_a, offset_b, as many as there are. Raises ``ValueError`` for other
    dtypes and other K.
    """
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        msg = f"mm_1bit takes eight codes per byte, uint8; got {a.dtype} with {b.dtype}"
        raise ValueError(msg)
    if a.shape[1] % TMA_ALIGNMENT:
        msg = f"mm_1bit needs K to be a multiple of {8 * TMA_ALIGNMENT}, got {8 * a.shape[1]}"
        raise ValueError(msg)
    bias, offset_a, offset_b = (*summands, None, None, None)[:3]
    return _product(a, b, scale_a, scale_b, dtype, (bias, offset_a, offset_b), config, tune)


def mm_8bit_grouped(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """As :func:`qcompile.kernels.matmul.reference.mm_8bit_grouped`; rows beyond the last group are not written.

    Both int8, or each float8_e4m3fn or float8_e5m2, the contraction a multiple of 16; copied if they are not contiguous
    or not aligned to 16 bytes. ``offs`` int32 ``[E]``, on their device, is never read by the host. ``config`` fixes how
    the kernel is cut up. Raises ``ValueError`` for other dtypes and other contractions.
    """
    accumulator_of(a, b)
    if a.shape[1] % TMA_ALIGNMENT:
        msg = f"mm_8bit_grouped in Gluon needs a contraction of a multiple of {TMA_ALIGNMENT}, got {a.shape[1]}"
        raise ValueError(msg)
    if a.numel() * b.numel() * offs.shape[0] == 0:
        return reference.mm_8bit_grouped(a, b, offs, scale_a, scale_b, dtype, bias)
    scales, summands = (scale_a.reshape(-1, 1), scale_b.reshape(-1, 1)), (bias, None, None)
    return _product(a, b, *scales, dtype, summands, config, False, offs.contiguous())


def _product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    summands: tuple[Tensor | None, Tensor | None, Tensor | None],
    config: Config | None,
    tune: bool,
    offs: Tensor | None = None,
) -> Tensor:
    """``summands``: bias and offsets; everything counts bytes along K; b is ``[E, N, K]`` where rows are in groups."""
    (m, k), n, of_rows = a.shape, b.shape[-2], b.dim() == 3
    groups = 1 if offs is None else offs.shape[0]
    out = a.new_empty((m, n) if offs is None or of_rows else (groups, m, n), dtype=dtype)
    scale_a, scale_b = scale_a.contiguous(), scale_b.contiguous()
    dense = [None if x is None else x.contiguous() for x in summands]
    of_columns = sum(x is not None for x in (dense[0], dense[2]))
    card = card_of(a.device)
    with torch.cuda.device_of(a):
        a, b = _aligned(a), _aligned(b)

        def run(config: Config) -> None:
            arguments, options = launch_arguments(config, a, b, out, scale_a, scale_b, *dense, offs=offs)
            down = most_tiles(m, groups, config.block_m) if of_rows else groups * triton.cdiv(m, config.block_m)
            tiles = down * triton.cdiv(n, config.block_n)
            launch(mm_8bit_kernel, min(tiles, card.processors), *arguments, contract=True, **options)

        height, depth = (max(1, m // groups), k) if of_rows else (m, k // groups)
        problem = Problem(height, n, depth, a.dtype, b.dtype, dtype, card)
        run(config or best_config(problem, run, tune, of_columns))
    return out


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix where the tensor memory accelerator can read it."""
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % TMA_ALIGNMENT else matrix


def launch_arguments(
    config: Config,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
    *,
    offs: Tensor | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and options of the kernel, for which integers may have to be compiled; all tensors are contiguous."""
    (m, k), n, of_rows = a.shape, b.shape[-2], b.dim() == 3
    groups = 1 if offs is None else offs.shape[0]
    rows = config.block_m // CONSUMERS.value
    # What hangs over the last row of a group's result would be written into the next one.
    fits_below = offs is None or of_rows or m % config.block_m == 0
    tma_store = fits_below and n * out.itemsize % TMA_ALIGNMENT == 0
    piece_n = (config.piece_bytes if tma_store else 128) // out.itemsize  # addresses take registers
    stored = a.dtype
    integer = stored in _INSTRUCTIONS
    if integer:
        a, b = a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn)
    arguments = (
        _descriptor(a, k, rows, BLOCK_K.value),
        _descriptor(b.view(-1, k), k, config.block_n, BLOCK_K.value),
        _descriptor(out.view(-1, n), n, rows, piece_n) if tma_store else None,
        out if of_rows or not tma_store else None,
        scale_a,
        scale_b,
        bias,
        offset_a,
        offset_b,
        offs,
        groups,
        m,
        n,
        k,
        int(scale_a.shape[0] > 1),
        int(scale_b.shape[0] > 1),
        triton.next_power_of_2(groups) if of_rows else 0,
        integer,
        config.block_m,
        config.block_n,
        config.stages,
        piece_n,
        config.buffers,
        config.group_m,
    )
    options: dict[str, Any] = {"num_warps": 4}  # of the first warp group; the others add theirs
    if integer:
        summands = (None if x is None else x.dtype for x in (bias, offset_a, offset_b))
        most = triton.next_power_of_2(groups) if of_rows else offs is None
        key = (stored, config, a.device, tma_store, out.dtype, of_rows, most, *summands)
        if key not in _INTEGER_PTX:
            _INTEGER_PTX[key] = _integer_ptx(stored, arguments, options)
        options["ir_override"] = _INTEGER_PTX[key]
    return arguments, options


def _descriptor(matrix: Tensor, columns: int, *block: int) -> TensorDescriptor:
    # A single row may have any stride, so it is not asked.
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * matrix.itemsize, rank=2)
    return TensorDescriptor(matrix, [matrix.shape[0], columns], [columns, 1], list(block), layout)


#: What stands for ``k32.f32.e4m3.e4m3`` in the instruction that multiplies integers; uint8 is eight single bits.
_INSTRUCTIONS = {torch.int8: "k32.s32.s8.s8", torch.uint8: "k256.s32.b1.b1.and.popc"}
#: Files of PTX for integers, by all that the PTX depends on.
_INTEGER_PTX: dict[tuple[Any, ...], str] = {}


def _integer_ptx(stored: torch.dtype, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """A file with the PTX of the kernel for integers, which Triton assembles in place of its own.

    Raises ``RuntimeError`` if Triton does not take it (``TRITON_KERNEL_OVERRIDE=1`` makes it look elsewhere).
    """
    # What an earlier process left in Triton's cache may be PTX for torch's assembler, which Triton's own, older, would
    # refuse.
    compat.use_torchs_ptxas()
    ptx = as_integers(mm_8bit_kernel.warmup(*arguments, grid=(1,), **options).asm["ptx"], stored)
    path = get_cache_manager(hashlib.sha256(ptx.encode()).hexdigest()).put(ptx, "mm_integers.ptx", binary=False)
    if mm_8bit_kernel.warmup(*arguments, grid=(1,), **options, ir_override=path).asm["ptx"] != ptx:
        msg = f"Triton did not assemble {path}"
        raise RuntimeError(msg)
    return path


def as_integers(ptx: str, stored: torch.dtype) -> str:
    """PTX in which the products of e4m3 are those of integers, their sums int32; of int8, or of the bits of uint8.

    Only the type and the two signs, which integers do not have, differ: "wgmma.mma_async" in the PTX ISA. Raises
    ``ValueError`` if there is none.
    """
    product = re.compile(r"(wgmma\.mma_async\.sync\.aligned\.m64n\d+)k32\.f32\.e4m3\.e4m3( [^;]*), 1, 1;")
    renamed, count = product.subn(rf"\g<1>{_INSTRUCTIONS[stored]}\2;", ptx)
    if not count or ".e4m3" in renamed:
        msg = "the PTX has products of e4m3 in no known form, or none"
        raise ValueError(msg)
    return renamed
