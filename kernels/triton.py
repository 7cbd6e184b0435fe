"""What the Triton kernels share: float32 numbers as bits, maxima that pass on NaN, how a row is laid out, launching.

The kernels also run in Triton's interpreter (``TRITON_INTERPRET=1``). It cannot convert to FP8 with rounding, reduce
with NaN in reasonable time, or run inline PTX: for these, and nothing else, code asks for :data:`INTERPRETED`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile import compat

from .replay import bound, note_launch, run_compiled

__all__ = [
    "INTERPRETED",
    "LONGEST_ROW",
    "MAGNITUDE",
    "RUN",
    "absolute_maximum",
    "as_bits",
    "as_float",
    "as_rows",
    "greater",
    "launch",
    "maximum",
    "processors",
    "row_block",
    "runs",
    "supports_dtypes",
    "supports_size",
    "warps",
    "with_dense_rows",
]

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

_ELEMENT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Most elements of a row that a program keeps in registers.
LONGEST_ROW = 16384
#: Elements of a thread that lie side by side: as many as a store of 16 bytes has 8-bit codes. Blocks of a row are
#: indexed [n, 16], so that elements, 8-bit codes and packed codes agree on who holds what and nothing moves between
#: threads.
RUN = tl.constexpr(16)

#: Of the bits of a float32 number.
MAGNITUDE = tl.constexpr(2**31 - 1)


@triton.jit
def as_bits(x):
    """Float32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def as_float(bits):
    """Inverse of :func:`as_bits`."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def greater(a, b):
    """The greater of two numbers; NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, axis: tl.constexpr):
    """Float32 maximum along ``axis``, or of all; NaN if there is one."""
    if INTERPRETED:
        bits = as_bits(tl.where(x == x, x, float("nan")))  # a positive one, the greatest of integers that order floats
        bits = tl.max(bits ^ ((bits >> 31) & MAGNITUDE), axis)
        largest = as_float(bits ^ ((bits >> 31) & MAGNITUDE))
    else:
        largest = tl.reduce(x, axis, greater)
    return largest


@triton.jit
def absolute_maximum(x, axis: tl.constexpr):
    """max |x|, float32, along ``axis``, or of all; NaN if there is one."""
    return maximum(tl.abs(x), axis)


@triton.jit
def runs(block: tl.constexpr, run: tl.constexpr):
    """0 … block − 1 as [block / run, run]."""
    return tl.arange(0, block // run)[:, None] * run + tl.arange(0, run)[None, :]


# --- launching ------------------------------------------------------------------------------------------------------


def supports_dtypes(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, str]:
    """Whether the kernels read tensors of these dtypes, and if not, why."""
    unsupported = [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype not in _ELEMENT_TYPES]
    return (False, f"no Triton kernel for {', '.join(unsupported)}") if unsupported else (True, "")


def supports_size(size: int) -> tuple[bool, str]:
    """Whether rows of ``size`` elements fit the registers of a program, and if not, that."""
    return size <= LONGEST_ROW, "" if size <= LONGEST_ROW else f"rows of more than {LONGEST_ROW} elements"


def with_dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it whose last axis has stride 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rows(x: Tensor, axis: int) -> tuple[Tensor, torch.Size]:
    """x ``[R, K]`` with ``axis`` last and dense, and the shape it has with ``axis`` moved last."""
    moved = x.movedim(axis, -1)
    return with_dense_rows(moved.reshape(-1, moved.shape[-1])), moved.shape


def launch(kernel, programs: int | tuple[int, int], *arguments, contract: bool = False, **constants) -> None:
    """Run ``kernel`` on the device of its first argument, a tensor or its descriptor. ``contract``: products and sums
    may become fused multiply-adds.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    options = {} if contract else {"enable_fp_fusion": False}
    first = getattr(arguments[0], "base", arguments[0])
    with torch.cuda.device_of(first):
        kind = _kind(kernel, first.device, arguments, constants, contract)
        prepared = _prepared.get(kind)
        if prepared is not None:
            compiled = prepared.compiled
            prepared.run((*grid, 1, 1)[:3], arguments, first.device)
        else:
            compiled = kernel[grid](*arguments, **constants, **options)
            if kind is not None and compiled is not None and len(_prepared) < _MOST_PREPARED:
                _prepared[kind] = _Prepared(compiled, kernel, arguments, constants)
    note_launch(kernel, compiled, grid, arguments, constants)


#: Constants that are told apart by their values; others are objects that live as long as the process.
_PLAIN = (int, float, str, tuple, type(None))
_MOST_PREPARED = 4096
#: Launches that Triton has bound, specialized and looked up once, by their kind.
_prepared: dict[Any, _Prepared] = {}


class _Prepared:
    """A compiled kernel and what stands behind the ``arguments`` of a launch, in the order of the kernel's parameters.

    Triton's own way to it takes tens to hundreds of microseconds of the host per launch, most of it for constants.
    """

    def __init__(self, compiled: Any, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.compiled, self.constants = compiled, constants  # kept: kinds tell constants by their identity
        self.behind = bound(kernel, arguments, constants)[len(arguments) :]

    def run(self, grid: tuple[int, ...], arguments: tuple[Any, ...], device: torch.device) -> None:
        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        run_compiled(self.compiled, grid, compat.raw_stream(device), [*values, *self.behind])


def _kind(kernel: Any, device: torch.device, arguments: tuple[Any, ...], constants: Any, contract: bool) -> Any:
    """All that the compiled kernel of a launch depends on; ``None`` if it is to be asked of Triton at every launch."""
    if device.type != "cuda":
        return None
    kinds: list[Any] = []
    for a in arguments:
        if isinstance(a, Tensor):
            kinds.append((a.dtype, a.data_ptr() % 16 == 0))
        elif a is None or isinstance(a, bool):
            kinds.append(a)
        elif isinstance(a, int):
            bits = 32 if -(2**31) <= a < 2**31 else 64 if -(2**63) <= a < 2**63 else 0
            kinds.append((bits, a == 1, a % 16 == 0))
        elif isinstance(a, float):
            kinds.append(float)
        else:  # a tensor descriptor
            return None
    named = [(name, value if isinstance(value, _PLAIN) else id(value)) for name, value in constants.items()]
    return (id(kernel), device.index, contract, *kinds, *named)


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def row_block(size: int) -> int:
    """Elements of a row of ``size`` that a program takes at once."""
    return max(RUN.value, triton.next_power_of_2(min(size, LONGEST_ROW)))


def warps(elements: int, per_thread: int, most: int = 16) -> int:
    """Warps of a program whose threads hold ``per_thread`` of its elements."""
    return max(1, min(most, elements // (32 * per_thread)))
