"""8-bit matrix product on tensor cores in Triton: FP8 (e4m3, e5m2, mixed) and INT8, scaled in the epilogue.

Two kernels compute ``(a @ bᵀ + offset_a + offset_bᵀ) · scale_a · scale_bᵀ + bias``:

* **TMA** (compute capability 9.0 and up; rows of whole 16 bytes): persistent, as many programs as the card has
  processors, tiles in groups that share operands in L2. The loop over tiles is flattened into the loop over K, so
  that the operands of the next tile are on their way while the epilogue of this one runs.
* **Pointers** (everything else, down to compute capability 8.0 for INT8 and 8.9 for FP8, any M, N, K ≥ 1): one
  masked tile per program.

Both sum in the accumulator of the tensor cores over all of K. For INT8 that is int32, exact, to which offsets are added
in float32: those of half-integers are multiples of ¼, so that nothing is rounded below 2^22. For FP8 on Hopper it keeps
14 significant bits: sums of products of 4-bit codes, multiples of 1/4 for E2M1, are exact below 2^12 and come out of
row-wise quantized data at no more than 2^11.4 (K = 28672).

Which tile is fastest depends on the card and the shape. :data:`CONFIGS` has the candidates, :func:`candidates` orders
them by a model of the traffic between L2 and the processors, and ``tune=True`` measures the first of them, once: the
result is kept beside Triton's compiled kernels and is used from then on wherever the same card meets the same problem.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import CacheManager, get_cache_manager, triton_key
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench
from triton.tools.tensor_descriptor import TensorDescriptor

from qcompile.kernels.triton import launch

__all__ = [
    "CONFIGS",
    "EXPERIMENTAL_CONFIGS",
    "Card",
    "Config",
    "Problem",
    "accumulator_of",
    "best_config",
    "candidates",
    "card_of",
    "fastest",
    "first_element",
    "fits",
    "mm_8bit",
    "pieces_of",
    "predicted_cycles",
    "scaled",
    "store",
]

AnyConfig = TypeVar("AnyConfig")

#: What the tensor memory accelerator (TMA) wants addresses and row lengths to be multiples of, in bytes.
TMA_ALIGNMENT = 16
#: Shared memory of a processor in bytes, by compute capability (CUDA C++ Programming Guide, "Technical Specifications
#: per Compute Capability"); every program takes 1 KiB more than it asks for.
SHARED_MEMORY = dict.fromkeys(((9, 0), (10, 0), (10, 3)), 228 * 1024)
_LEAST_SHARED_MEMORY = 100 * 1024
#: Dtypes of the accumulator.
_ACCUMULATORS = {torch.int8: tl.int32, torch.float8_e4m3fn: tl.float32, torch.float8_e5m2: tl.float32}


@dataclass(frozen=True)
class Config:
    """How the TMA kernel is cut up.

    Attributes:
        block_m, block_n, block_k: extents of the tile; 128 bytes of K are one row of the swizzled shared memory.
        warps, stages: warps of a program, and operand tiles it has in flight.
        parts: pieces (a power of two, along N) in which the accumulator leaves; two need half the shared memory.
        group_m: tiles down before the next column of tiles begins.
        resident: programs that share a processor; the epilogue of one runs beside the product of another.
        flatten: whether the loops over tiles and over K are one.
        tma_store: whether the output leaves through TMA where it can, instead of by pointers.
        warp_specialize: whether loads and products get warps of their own.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int = 1
    group_m: int = 8
    resident: int = 1
    flatten: bool = True
    tma_store: bool = True
    warp_specialize: bool = False

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages} g{self.group_m}"
        more = {
            f"parts{self.parts}": self.parts > 1,
            f"resident{self.resident}": self.resident > 1,
            "nested": not self.flatten,
            "pointer-store": not self.tma_store,
            "specialized": self.warp_specialize,
        }
        return " ".join([tile, *(word for word, said in more.items() if said)])

    def shared_memory(self, out_itemsize: int) -> int:
        """Bytes of shared memory that a program takes, at most; ``out_itemsize`` is that of an output element.

        Operands in flight, the output on its way (by pointers, 16-bit elements of a whole tile leave in two turns),
        scales between two layouts, barriers, and what the system takes.
        """
        operands = self.stages * (self.block_m + self.block_n) * self.block_k
        output = self.block_m * self.block_n // self.parts * out_itemsize
        turns = 2 if not self.tma_store and out_itemsize == 2 and self.parts == 1 else 1
        return operands + output // turns + 4 * max(self.block_m, self.block_n) + 128 + 1024


#: What can serve a problem; of those that :func:`predicted_cycles` cannot tell apart, the likelier first.
CONFIGS = (
    Config(128, 256, 128, warps=8, stages=4, parts=2),
    Config(128, 256, 128, warps=8, stages=4, parts=2, group_m=16),
    Config(128, 256, 128, warps=8, stages=3),
    Config(128, 256, 128, warps=8, stages=4, tma_store=False),
    Config(128, 256, 128, warps=8, stages=3, flatten=False),
    Config(256, 128, 128, warps=8, stages=4, parts=2, group_m=4),
    Config(128, 256, 128, warps=8, stages=3, parts=2),
    Config(128, 256, 128, warps=8, stages=4, parts=4),
    Config(256, 128, 128, warps=8, stages=3, group_m=4),
    Config(128, 128, 128, warps=4, stages=3, resident=2, tma_store=False),
    Config(128, 128, 128, warps=4, stages=4),
    Config(64, 256, 128, warps=4, stages=4),
    Config(64, 128, 128, warps=4, stages=5),
    Config(64, 64, 128, warps=4, stages=5),
    Config(64, 32, 128, warps=4, stages=6),
)
#: How many of them are measured, the likeliest first.
_MOST_MEASURED = 8

#: Configs that compile for Hopper and are tried by hand only (``benchmarks/gemm.py --sweep``): Triton's
#: documentation promises warp specialization for Blackwell alone.
EXPERIMENTAL_CONFIGS = (
    Config(128, 256, 128, warps=4, stages=3, flatten=False, tma_store=False, warp_specialize=True),
    Config(128, 256, 128, warps=4, stages=4, flatten=False, tma_store=False, warp_specialize=True),
    Config(128, 128, 128, warps=4, stages=4, flatten=False, tma_store=False, warp_specialize=True),
)


@dataclass(frozen=True)
class Card:
    """A GPU: its name, compute capability and number of (streaming multi-) processors."""

    name: str
    capability: tuple[int, int]
    processors: int


@dataclass(frozen=True)
class Problem:
    """What the choice of a config depends on: extents, dtypes of both operands and the output, and the card."""

    m: int
    n: int
    k: int
    a_dtype: torch.dtype
    b_dtype: torch.dtype
    dtype: torch.dtype
    card: Card


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def first_element(tile, m, n, block_m: tl.constexpr, block_n: tl.constexpr, group_m: tl.constexpr):
    """Row and column at which a tile begins; ``group_m`` tiles down, then the next column."""
    tiles_m = tl.cdiv(m, block_m)
    in_group = group_m * tl.cdiv(n, block_n)
    first = tile // in_group * group_m
    height = min(tiles_m - first, group_m)
    place = tile % in_group
    return (first + place % height) * block_m, place // height * block_n


@triton.jit
def pieces_of(product, parts: tl.constexpr):
    """A tuple of the tile's ``parts`` pieces, from left to right."""
    if parts == 1:
        return (product,)
    else:  # what follows a return is compiled as well
        halves = tl.reshape(product, (product.shape[0], 2, product.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return pieces_of(left, parts // 2) + pieces_of(right, parts // 2)


@triton.jit
def scaled(product, row, column, m, n, scale_a, scale_a_stride, scale_b, scale_b_stride, bias, offset_a, offset_b):
    """Float32 ``(product + offset_a + offset_bᵀ) · scale_a · scale_bᵀ + bias`` of the tile at (row, column)."""
    rows = row + tl.arange(0, product.shape[0])
    columns = column + tl.arange(0, product.shape[1])
    by_row = tl.load(scale_a + rows * scale_a_stride, mask=rows < m, other=0.0)
    by_column = tl.load(scale_b + columns * scale_b_stride, mask=columns < n, other=0.0)
    result = product.to(tl.float32)
    if offset_a is not None:
        result += tl.load(offset_a + rows, mask=rows < m, other=0.0)[:, None]
    if offset_b is not None:
        result += tl.load(offset_b + columns, mask=columns < n, other=0.0)[None, :]
    result = result * by_row[:, None] * by_column[None, :]
    if bias is not None:
        result += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def store(out, value, row, column, m, n):
    """The tile at (row, column) of a result [m, n], of which nothing is written beyond its edges."""
    rows = row + tl.arange(0, value.shape[0])
    columns = column + tl.arange(0, value.shape[1])
    at = out + rows.to(tl.int64)[:, None] * n + columns[None, :]  # m · n may exceed 2^31
    tl.store(at, value.to(out.dtype.element_ty), mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def _tma_kernel(
    a,
    b,
    out,
    scale_a,
    scale_b,
    bias,
    offset_a,
    offset_b,
    m,
    n,
    k,
    scale_a_stride,
    scale_b_stride,
    accumulator: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    parts: tl.constexpr,
    group_m: tl.constexpr,
    flatten: tl.constexpr,
    tma_store: tl.constexpr,
    warp_specialize: tl.constexpr,
):
    """``a``, ``b`` and, if ``tma_store``, ``out`` are tensor descriptors; the accelerator fills with zeros and drops
    what lies outside.
    """
    part_n: tl.constexpr = block_n // parts
    tiles = tl.cdiv(m, block_m) * tl.cdiv(n, block_n)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=flatten, warp_specialize=warp_specialize):
        row, column = first_element(tile, m, n, block_m, block_n, group_m)
        product = tl.zeros((block_m, block_n), dtype=accumulator)
        for step in range(tl.cdiv(k, block_k)):
            left = a.load([row, step * block_k])
            right = b.load([column, step * block_k])
            product = tl.dot(left, right.T, product, out_dtype=accumulator)
        pieces = pieces_of(product, parts)
        for part in tl.static_range(parts):
            piece = pieces[part]
            at = column + part * part_n
            value = scaled(
                piece, row, at, m, n, scale_a, scale_a_stride, scale_b, scale_b_stride, bias, offset_a, offset_b
            )
            if tma_store:
                out.store([row, at], value.to(out.dtype))
            else:
                store(out, value, row, at, m, n)


@triton.jit
def _pointer_kernel(
    a,
    b,
    out,
    scale_a,
    scale_b,
    bias,
    offset_a,
    offset_b,
    m,
    n,
    k,
    scale_a_stride,
    scale_b_stride,
    accumulator: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    group_m: tl.constexpr,
):
    row, column = first_element(tl.program_id(0), m, n, block_m, block_n, group_m)
    rows = row + tl.arange(0, block_m)
    columns = column + tl.arange(0, block_n)
    depth = tl.arange(0, block_k)
    at_a = a + rows.to(tl.int64)[:, None] * k + depth[None, :]  # m · k may exceed 2^31
    at_b = b + columns.to(tl.int64)[:, None] * k + depth[None, :]
    product = tl.zeros((block_m, block_n), dtype=accumulator)
    for step in range(tl.cdiv(k, block_k)):
        inside = (depth < k - step * block_k)[None, :]
        left = tl.load(at_a, mask=(rows < m)[:, None] & inside, other=0.0)
        right = tl.load(at_b, mask=(columns < n)[:, None] & inside, other=0.0)
        product = tl.dot(left, right.T, product, out_dtype=accumulator)
        at_a += block_k
        at_b += block_k
    value = scaled(
        product, row, column, m, n, scale_a, scale_a_stride, scale_b, scale_b_stride, bias, offset_a, offset_b
    )
    store(out, value, row, column, m, n)


# --- choice of a config ---------------------------------------------------------------------------------------------


@cache
def candidates(problem: Problem) -> tuple[Config, ...]:
    """The configs that fit the card, in the order of :func:`predicted_cycles`, then of :data:`CONFIGS`."""
    fitting = [config for config in CONFIGS if fits(config, problem)]
    return tuple(sorted(fitting, key=lambda config: predicted_cycles(config, problem)))


def fits(config: Config, problem: Problem) -> bool:
    """Whether the programs that should share a processor find room in its shared memory."""
    available = SHARED_MEMORY.get(problem.card.capability, _LEAST_SHARED_MEMORY)
    return config.resident * config.shared_memory(problem.dtype.itemsize) <= available


def predicted_cycles(config: Config, problem: Problem) -> float:
    """Clock cycles of a product on a Hopper processor, roughly.

    A step along K takes the longer of its products (4096 multiply-adds a cycle) and the way of its operands from
    L2 (48 bytes a cycle, what 1300 TFLOP/s need with tiles of 128 × 256). Programs that share a processor share both
    rates and hide each other's epilogue (32 elements a cycle).
    """
    area = config.block_m * config.block_n
    step = max(area * config.block_k / 4096, (config.block_m + config.block_n) * config.block_k / 48)
    tiles = triton.cdiv(problem.m, config.block_m) * triton.cdiv(problem.n, config.block_n)
    waves = triton.cdiv(tiles, problem.card.processors * config.resident)
    return waves * (config.resident * triton.cdiv(problem.k, config.block_k) * step + area / 32)


def best_config(problem: Problem, run: Callable[[Config], None], tune: bool) -> Config:
    """The measured config, if there is one or ``tune`` asks for it, else the first candidate; ``run`` launches one."""
    key = replace(problem, m=_rounded(problem.m), n=_rounded(problem.n), k=_rounded(problem.k))
    config = _MEASURED.get(key) or _read(key)
    if config is None and tune and not torch.cuda.is_current_stream_capturing():
        config = _MEASURED[key] = fastest(candidates(problem)[:_MOST_MEASURED], run)
        _cache_on_disk(key).put(json.dumps(asdict(config)), _FILE, binary=False)
    return config or candidates(problem)[0]


#: What this process measured; what others did is in Triton's cache on disk.
_MEASURED: dict[Problem, Config] = {}
_FILE = "mm_8bit.json"


def _rounded(extent: int) -> int:
    """``extent`` rounded up to three significant bits, so that neighbouring sizes share what was measured."""
    unit = 1 << max(extent.bit_length() - 3, 0)
    return triton.cdiv(extent, unit) * unit


def _cache_on_disk(problem: Problem) -> CacheManager:
    """Triton's cache of one problem; another version of this file or of Triton has another one."""
    what = [triton_key(), Path(__file__).read_text(encoding="utf-8"), str(problem)]
    return get_cache_manager(hashlib.sha256("\n".join(what).encode()).hexdigest())


@cache
def _read(problem: Problem) -> Config | None:
    path = _cache_on_disk(problem).get_file(_FILE)
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return Config(**json.load(file))


def fastest(configs: Sequence[AnyConfig], run: Callable[[AnyConfig], None]) -> AnyConfig:
    """The config with the smallest median time."""

    def milliseconds(config: AnyConfig) -> float:
        try:
            return do_bench(lambda: run(config), warmup=5, rep=25, return_mode="median")
        except OutOfResources:
            return math.inf

    times = {config: milliseconds(config) for config in configs}
    return min(times, key=times.__getitem__)


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

    a ``[M, K]`` and b ``[N, K]`` both int8, or each float8_e4m3fn or float8_e5m2; M, N, K ≥ 1; copied if they are not
    contiguous. scale_a ``[M, 1]`` or ``[1, 1]`` and scale_b ``[N, 1]`` or ``[1, 1]`` float32; bias ``[N]`` floating
    point; offset_a ``[M, 1]`` and offset_b ``[N, 1]`` float32. ``config`` fixes how the TMA kernel is cut up; ``tune``
    measures which is fastest, unless that is known or a CUDA graph is being captured. Raises ``ValueError`` for a pair
    of dtypes that tensor cores do not multiply.
    """
    accumulator = accumulator_of(a, b)
    a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty((m, n), dtype=dtype)
    scales = scale_a.contiguous(), scale_b.contiguous()
    strides = tuple(int(scale.shape[0] > 1) for scale in scales)
    summands = (x if x is None else x.contiguous() for x in (bias, offset_a, offset_b))
    operands = (*scales, *summands, m, n, k, *strides, accumulator)
    card = card_of(a.device)
    with torch.cuda.device_of(a):
        if card.capability < (9, 0) or not (_aligned(a, k) and _aligned(b, k)):
            _launch_pointers(a, b, out, *operands)
            return out

        def run(config: Config) -> None:
            _launch_tma(config, card, a, b, out, *operands)

        run(config or best_config(Problem(m, n, k, a.dtype, b.dtype, dtype, card), run, tune))
    return out


def accumulator_of(a: Tensor, b: Tensor) -> tl.dtype:
    """What products of the two are summed in. Raises ``ValueError`` if tensor cores do not multiply them."""
    accumulator = _ACCUMULATORS.get(a.dtype)
    if accumulator is None or accumulator != _ACCUMULATORS.get(b.dtype):
        msg = f"mm_8bit takes int8 with int8, or float8_e4m3fn and float8_e5m2; got {a.dtype} with {b.dtype}"
        raise ValueError(msg)
    return accumulator


@cache
def card_of(device: torch.device) -> Card:
    """The card that ``device`` stands for."""
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, (properties.major, properties.minor), properties.multi_processor_count)


def _aligned(matrix: Tensor, columns: int) -> bool:
    """Whether TMA takes a contiguous matrix."""
    return matrix.data_ptr() % TMA_ALIGNMENT == 0 and columns * matrix.itemsize % TMA_ALIGNMENT == 0


def _launch_tma(
    config: Config, card: Card, a, b, out, scale_a, scale_b, bias, offset_a, offset_b, m, n, k, *rest
) -> None:
    def descriptor(matrix: Tensor, columns: int, *block: int) -> TensorDescriptor:
        # A single row may have any stride, so it is not asked.
        return TensorDescriptor(matrix, [matrix.shape[0], columns], [columns, 1], list(block))

    tma_store = config.tma_store and _aligned(out, n)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    launch(
        _tma_kernel,
        min(tiles, card.processors * config.resident),
        descriptor(a, k, config.block_m, config.block_k),
        descriptor(b, k, config.block_n, config.block_k),
        descriptor(out, n, config.block_m, config.block_n // config.parts) if tma_store else out,
        scale_a,
        scale_b,
        bias,
        offset_a,
        offset_b,
        m,
        n,
        k,
        *rest,
        config.block_m,
        config.block_n,
        config.block_k,
        config.parts,
        config.group_m,
        config.flatten,
        tma_store,
        config.warp_specialize,
        num_warps=config.warps,
        num_stages=config.stages,
        contract=True,
    )


def _launch_pointers(a, b, out, scale_a, scale_b, bias, offset_a, offset_b, m, n, k, *rest) -> None:
    block_m, block_n, block_k = 64 if m <= 64 else 128, 128, 64
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    arguments = (a, b, out, scale_a, scale_b, bias, offset_a, offset_b, m, n, k, *rest)
    constants = {"num_warps": 8, "num_stages": 3}
    launch(_pointer_kernel, tiles, *arguments, block_m, block_n, block_k, 8, contract=True, **constants)
