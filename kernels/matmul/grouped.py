"""Products of groups on 8-bit tensor cores in Triton: a mixture of experts, whose groups are the tokens of an expert.

Two kernels, both persistent, with tiles fetched by TMA (compute capability 9.0 and up), as
:mod:`qcompile.kernels.matmul.triton` has them:

* **Rows** (fprop, dgrad): each group of rows of a ``[M, K]`` times a matrix of its own, out of b ``[E, N, K]``. A tile
  is of one group. What hangs over its last row is fetched, since the next group's rows lie there, multiplied, and not
  stored; nothing is padded or copied.
* **Contraction** (wgrad): a ``[N, P]`` times b ``[K, P]``, summed over each group's part of P alone: ``[E, N, K]``. The
  codes of a group begin at a multiple of ``GROUP_ALIGNMENT`` and end with zeros: whoever transposed them wrote them
  so, which costs nothing, so that no step along P reads two groups. A group without rows takes no step and is 0.

Where groups end is read from the device by every program, so nothing waits for the host, and a CUDA graph serves groups
of all sizes. The number of programs is that of the card.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.kernels.groups import ALIGNMENT, group_of_tile, groups_of, most_tiles, picked
from qcompile.kernels.triton import launch

from . import reference
from .triton import (
    TMA_ALIGNMENT,
    Card,
    Config,
    Problem,
    accumulator_of,
    card_of,
    first_element,
    fits,
    pieces_of,
    scaled,
    store,
)

__all__ = ["CONFIGS", "GroupedProblem", "candidates", "mm_8bit_grouped", "predicted_cycles"]

#: What can serve a problem; of those that :func:`predicted_cycles` cannot tell apart, the likelier first (as measured,
#: ``benchmarks/h200/grouped.csv``). Tiles of float32 results leave in two parts, for which there is room. Steps along a
#: contraction in groups are as long as these are aligned.
CONFIGS = (
    Config(128, 256, 128, warps=8, stages=4, tma_store=False),
    Config(128, 256, 128, warps=8, stages=3, tma_store=False, flatten=False),
    Config(128, 256, 128, warps=8, stages=3, tma_store=False, parts=2),
    Config(128, 256, 128, warps=8, stages=3, tma_store=False, parts=2, flatten=False),
    Config(128, 128, 128, warps=4, stages=3, tma_store=False, resident=2),
    Config(128, 128, 128, warps=4, stages=3, tma_store=False, flatten=False, resident=2),
    Config(64, 256, 128, warps=4, stages=4, tma_store=False),
    Config(64, 128, 128, warps=4, stages=5, tma_store=False),
)


@dataclass(frozen=True)
class GroupedProblem:
    """What the choice of a config depends on.

    Attributes:
        rows, groups: of all groups together, and how many there are.
        shape: of each group's result: (rows on average, N), or (N, K) where the contraction is in groups.
        depth: of each product; on average where the contraction is in groups.
        contraction: whether it is.
        dtypes: of both operands. dtype: of the results.
    """

    rows: int
    groups: int
    shape: tuple[int, int]
    depth: int
    contraction: bool
    dtypes: tuple[torch.dtype, torch.dtype]
    dtype: torch.dtype
    card: Card

    @property
    def of_group(self) -> Problem:
        """A group's own product."""
        return Problem(*self.shape, self.depth, *self.dtypes, self.dtype, self.card)


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _write(
    product, out, row, column, m, n, scale_a, scale_a_stride, scale_b, scale_b_stride, bias, parts: tl.constexpr
):
    """``product · scale_a · scale_bᵀ + bias``, a tile of a group's result [m, n], part by part."""
    pieces = pieces_of(product, parts)
    for part in tl.static_range(parts):
        at = column + part * (product.shape[1] // parts)
        value = scaled(pieces[part], row, at, m, n, scale_a, scale_a_stride, scale_b, scale_b_stride, bias, None, None)
        store(out, value, row, at, m, n)


@triton.jit
def _rows_kernel(
    a,
    b,
    out,
    offs,
    scale_a,
    scale_b,
    bias,
    groups,
    n,
    k,
    scale_a_stride,
    scale_b_stride,
    most: tl.constexpr,
    accumulator: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    parts: tl.constexpr,
    group_m: tl.constexpr,
    flatten: tl.constexpr,
):
    """``a`` and ``b``, its matrices below each other, are tensor descriptors."""
    starts, sizes = groups_of(offs, groups, most)
    tiles = tl.cdiv(sizes, block_m) * tl.cdiv(n, block_n)
    for tile in tl.range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0), flatten=flatten):
        group, place = group_of_tile(tile, tiles)
        start, size = picked(starts, group), picked(sizes, group)
        row, column = first_element(place, size, n, block_m, block_n, group_m)
        above = group * n
        product = tl.zeros((block_m, block_n), dtype=accumulator)
        for step in range(tl.cdiv(k, block_k)):
            left = a.load([start + row, step * block_k])
            right = b.load([above + column, step * block_k])
            product = tl.dot(left, right.T, product, out_dtype=accumulator)
        of_rows = scale_a + start * scale_a_stride
        of_columns = scale_b + above * scale_b_stride
        shift = bias
        if bias is not None:
            shift = bias + above
        first = out + start.to(tl.int64) * n
        _write(product, first, row, column, size, n, of_rows, scale_a_stride, of_columns, scale_b_stride, shift, parts)


@triton.jit
def _contraction_kernel(
    a,
    b,
    out,
    offs,
    scale_a,
    scale_b,
    groups,
    m,
    n,
    scale_a_stride,
    scale_b_stride,
    most: tl.constexpr,
    accumulator: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    parts: tl.constexpr,
    group_m: tl.constexpr,
    flatten: tl.constexpr,
):
    """``a`` and ``b`` are tensor descriptors; every group has the same tiles, of a result [m, n]."""
    _, sizes = groups_of(offs, groups, most)
    steps = tl.cdiv(sizes, ALIGNMENT) * (ALIGNMENT // block_k)
    begins = tl.cumsum(steps, 0) - steps
    tiles = tl.cdiv(m, block_m) * tl.cdiv(n, block_n)
    for tile in tl.range(tl.program_id(0), groups * tiles, tl.num_programs(0), flatten=flatten):
        group = tile // tiles
        begin, count = picked(begins, group), picked(steps, group)
        row, column = first_element(tile % tiles, m, n, block_m, block_n, group_m)
        product = tl.zeros((block_m, block_n), dtype=accumulator)
        for step in range(begin, begin + count):
            left = a.load([row, step * block_k])
            right = b.load([column, step * block_k])
            product = tl.dot(left, right.T, product, out_dtype=accumulator)
        of_rows, of_columns = scale_a + group * m * scale_a_stride, scale_b + group * n * scale_b_stride
        first = out + group.to(tl.int64) * m * n
        _write(product, first, row, column, m, n, of_rows, scale_a_stride, of_columns, scale_b_stride, None, parts)


# --- choice of a config ---------------------------------------------------------------------------------------------


@cache
def candidates(problem: GroupedProblem) -> tuple[Config, ...]:
    """The configs that fit the card, in the order of :func:`predicted_cycles`, then of :data:`CONFIGS`."""
    # Where steps differ from tile to tile, the loops over tiles and steps are not one.
    fitting = [c for c in CONFIGS if fits(c, problem.of_group) and not (problem.contraction and c.flatten)]
    return tuple(sorted(fitting, key=lambda config: predicted_cycles(config, problem)))


def predicted_cycles(config: Config, problem: GroupedProblem) -> float:
    """As :func:`qcompile.kernels.matmul.triton.predicted_cycles`, with half a tile too many for each group."""
    area = config.block_m * config.block_n
    step = max(area * config.block_k / 4096, (config.block_m + config.block_n) * config.block_k / 48)
    m, n = problem.shape
    if problem.contraction:
        tiles = float(problem.groups * triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n))
        steps = problem.depth / config.block_k + 0.5
    else:
        tiles = (problem.rows / config.block_m + 0.5 * problem.groups) * triton.cdiv(n, config.block_n)
        steps = float(triton.cdiv(problem.depth, config.block_k))
    waves = max(1.0, tiles / (problem.card.processors * config.resident))
    hidden = config.flatten or config.resident > 1  # the epilogue, behind the next product or another program's
    return waves * (config.resident * steps * step + area / (32 if hidden else 8))


# --- launch ---------------------------------------------------------------------------------------------------------


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

    Operands contiguous, or copied, with a contraction of a multiple of 16; ``dtype`` bfloat16, float16 or float32;
    ``config`` fixes how the kernel is cut up. Raises ``ValueError`` for dtypes that tensor cores do not multiply.
    """
    accumulator = accumulator_of(a, b)
    a, b, offs = _aligned(a), _aligned(b), offs.contiguous()
    groups, card = offs.shape[0], card_of(a.device)
    contraction = b.dim() == 2
    if a.numel() * b.numel() * groups == 0:
        return reference.mm_8bit_grouped(a, b, offs, scale_a, scale_b, dtype, bias)
    rows, n = a.shape[contraction], b.shape[-2]
    height, average = a.shape[0] if contraction else rows, max(1, rows // groups)
    out = a.new_empty((groups, height, n) if contraction else (rows, n), dtype=dtype)
    problem = GroupedProblem(
        rows,
        groups,
        (height if contraction else average, n),
        average if contraction else a.shape[1],
        contraction,
        (a.dtype, b.dtype),
        dtype,
        card,
    )
    config = config or candidates(problem)[0]
    scales = scale_a.contiguous(), scale_b.contiguous()
    strides = tuple(int(scale.numel() > 1) for scale in scales)
    tiles = triton.cdiv(n, config.block_n)
    sizes: tuple[Any, ...]
    if contraction:
        tiles *= groups * triton.cdiv(height, config.block_m)
        kernel, sizes = _contraction_kernel, (groups, height, n)
    else:
        tiles *= most_tiles(rows, groups, config.block_m)
        kernel, sizes = _rows_kernel, (None if bias is None else bias.contiguous(), groups, n, a.shape[1])
    launch(
        kernel,
        min(tiles, card.processors * config.resident),
        _descriptor(a, config.block_m, config.block_k),
        _descriptor(b.view(-1, b.shape[-1]), config.block_n, config.block_k),
        out,
        offs,
        *scales,
        *sizes,
        *strides,
        triton.next_power_of_2(groups),
        accumulator,
        config.block_m,
        config.block_n,
        config.block_k,
        config.parts,
        config.group_m,
        config.flatten,
        num_warps=config.warps,
        num_stages=config.stages,
        contract=True,
    )
    return out


def _aligned(operand: Tensor) -> Tensor:
    """Contiguous, from an address that TMA takes."""
    operand = operand.contiguous()
    return operand if operand.data_ptr() % TMA_ALIGNMENT == 0 else operand.clone()


def _descriptor(matrix: Tensor, *block: int) -> TensorDescriptor:
    rows, columns = matrix.shape
    return TensorDescriptor(matrix, [rows, columns], [columns, 1], list(block))
