"""Matrix product on FP4 tensor cores in Triton: E2M1 codes as they are stored, a scale for every block along K.

``tl.dot_scaled`` becomes the instructions that take scales of blocks (PTX ISA, "tcgen05.mma", ``.block_scale``):
``kind::mxf4`` for MXFP4, E8M0 scales of 32 elements, and ``kind::mxf4nvf4`` for NVFP4, E4M3 scales of 16. On compute
capability 12.0 these are ``mma.sync`` of ``kind::mxf4nvf4``. Below 10 Triton (3.6, 3.7) widens codes and E8M0 scales to
BF16, which is exact and lets an older card check this kernel; for E4M3 scales it has no such fallback.

**None of this has run on a card with FP4 tensor cores**, only been compiled for them.

Codes come through TMA, which fills with zeros what lies outside. Scales go to the tensor cores' own memory, whose
layout has 128 rows by 4 scales in 512 bytes: four rows that are 32 apart side by side (PTX ISA, "tcgen05.mma scale
factor A layout"). Triton copies them there from shared memory (``tcgen05.cp``) if they are loaded in that order as
one row of numbers, so that is how addresses are computed; in any other order they pass through registers. What
`quantize` stores, row after row, is gathered four bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.kernels.triton import launch

from .reference import block_of
from .triton import TMA_ALIGNMENT, Config, card_of, first_element

__all__ = ["CONFIGS", "config_for", "kernel", "mm_block_scaled"]

#: Scales that lie side by side in the tensor cores' memory.
CHUNK = tl.constexpr(4)
#: Rows whose scales are one tile there.
SCALED_ROWS = tl.constexpr(128)

#: By the first number of the compute capability; ``block_k`` counts elements, half a byte each. A processor of
#: compute capability 10 has 228 KiB of shared memory and 512 columns of tensor memory, 256 of which this tile sums in.
CONFIGS = {10: Config(128, 256, 256, warps=8, stages=3)}
_SMALLEST = Config(128, 128, 256, warps=8, stages=3)


@triton.jit
def _scales(stored, first, rows, chunks, step, block_m: tl.constexpr, blocks: tl.constexpr):
    """Scales ``[block_m, blocks]`` of the rows from ``first`` on, of the given step along K; 0 outside."""
    tile: tl.constexpr = SCALED_ROWS * CHUNK
    place = tl.arange(0, block_m * blocks)[None, :]
    tiles_k: tl.constexpr = blocks // CHUNK
    row = first + place // (tiles_k * tile) * SCALED_ROWS + place // CHUNK % 4 * 32 + place // (4 * CHUNK) % 32
    chunk = step * tiles_k + place // tile % tiles_k
    at = row.to(tl.int64) * (chunks * CHUNK) + chunk * CHUNK + place % CHUNK
    scales = tl.load(stored + at, mask=(row < rows) & (chunk < chunks), other=0.0)
    tiles = scales.reshape(block_m // SCALED_ROWS, tiles_k, 32, 4, CHUNK)
    return tiles.trans(0, 3, 2, 1, 4).reshape(block_m, blocks)


@triton.jit
def kernel(
    a,
    b,
    out,
    scale_a,
    scale_b,
    global_a,
    global_b,
    bias,
    m,
    n,
    row_bytes,
    chunks,
    block: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
):
    """One tile per program. ``a`` and ``b`` are tensor descriptors of bytes; ``block`` elements share a scale, and a
    row has ``chunks`` times four of them.
    """
    row, column = first_element(tl.program_id(0), m, n, block_m, block_n, group_m)
    product = tl.zeros((block_m, block_n), dtype=tl.float32)
    for step in range(tl.cdiv(row_bytes, block_k // 2)):
        left = a.load([row, step * (block_k // 2)])
        right = b.load([column, step * (block_k // 2)])
        of_rows = _scales(scale_a, row, m, chunks, step, block_m, block_k // block)
        of_columns = _scales(scale_b, column, n, chunks, step, block_n, block_k // block)
        product = tl.dot_scaled(left, of_rows, "e2m1", right.T, of_columns, "e2m1", product)
    rows = row + tl.arange(0, block_m)
    columns = column + tl.arange(0, block_n)
    if global_a is not None:
        product *= tl.load(global_a)
    if global_b is not None:
        product *= tl.load(global_b)
    if bias is not None:
        product += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    at = out + rows.to(tl.int64)[:, None] * n + columns[None, :]  # m · n may exceed 2^31
    tl.store(at, product.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


def config_for(capability: tuple[int, int]) -> Config:
    """How the kernel is cut up on a card: by what fits, nothing has been measured."""
    return CONFIGS.get(capability[0], _SMALLEST)


def mm_block_scaled(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    global_a: Tensor | None,
    global_b: Tensor | None,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    *,
    config: Config | None = None,
) -> Tensor:
    """As :func:`qcompile.kernels.matmul.reference.mm_block_scaled`, in bfloat16, float16 or float32; M, N, K ≥ 1.

    Operands are copied if their rows are no multiple of 16 bytes, or their scales no multiple of four, which is what
    the kernel reads at once; K that is a multiple of 128 is never copied. ``config`` fixes how the kernel is cut up.
    """
    block = block_of(scale_a, scale_b)
    (m, _), n = a.shape, b.shape[0]
    a, b = _with_whole_rows(a, TMA_ALIGNMENT), _with_whole_rows(b, TMA_ALIGNMENT)
    scale_a, scale_b = _with_whole_rows(scale_a, CHUNK.value), _with_whole_rows(scale_b, CHUNK.value)
    out = a.new_empty((m, n), dtype=dtype)
    config = config or config_for(card_of(a.device).capability)
    row_bytes = a.shape[1]
    tile_bytes = config.block_k // 2
    launch(
        kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        TensorDescriptor(a, [m, row_bytes], [row_bytes, 1], [config.block_m, tile_bytes]),
        TensorDescriptor(b, [n, row_bytes], [row_bytes, 1], [config.block_n, tile_bytes]),
        out,
        scale_a,
        scale_b,
        global_a,
        global_b,
        bias if bias is None else bias.contiguous(),
        m,
        n,
        row_bytes,
        scale_a.shape[1] // CHUNK.value,
        block,
        config.block_m,
        config.block_n,
        config.block_k,
        config.group_m,
        num_warps=config.warps,
        num_stages=config.stages,
        contract=True,
    )
    return out


def _with_whole_rows(matrix: Tensor, multiple: int) -> Tensor:
    """The matrix, contiguous and at an address that TMA takes, its rows padded with zeros to a multiple of bytes."""
    missing = -matrix.shape[1] % multiple
    if missing:
        padded = matrix.new_zeros(matrix.shape[0], matrix.shape[1] + missing)
        padded[:, : matrix.shape[1]] = matrix
        return padded
    matrix = matrix.contiguous()
    return matrix if matrix.data_ptr() % TMA_ALIGNMENT == 0 else matrix.clone()
