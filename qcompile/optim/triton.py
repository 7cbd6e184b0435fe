"""The update of all parameters of a device in one launch: :mod:`.blocks` bit for bit, on CUDA.

Parameters, gradients and states stay where they are; a table has their addresses. A program takes some blocks of one
parameter from memory to memory, so every number is read once and written once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qcompile.kernels.formula.triton_target import device_function
from qcompile.kernels.triton import absolute_maximum, launch

from . import formulas
from .states import Kind, Numbers

__all__ = ["Launch"]

#: Columns of the table of addresses: parameter, gradient, and codes and scales of the moments and the master.
COLUMNS = 8
_PLACES = {"exp_avg": 2, "exp_avg_sq": 4, "master": 6}
_COLUMNS = tl.constexpr(COLUMNS)
#: Elements of a program: 8 per thread. With more, registers run out (ptxas for sm_90: 78 here, 255 at 4096).
_ELEMENTS = 1024

_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
    torch.int16: tl.int16,
}
_SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class _State:
    """One state as constants of a kernel: ``place`` in the table, -1 if there is none."""

    place: int
    scaled: bool
    dtype: Any
    formulas: tuple[str, ...] = ()
    decode: Any = field(default=None, repr=False)
    scale: Any = field(default=None, repr=False)
    encode: Any = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class _Constants:
    """What the kernel is specialized by; one object per kind, as Triton looks constants up at every launch.

    A program has ``rows`` of ``width`` ≥ ``block`` elements; ``whole`` if parameters have whole blocks.
    """

    parameter: Any
    gradient: Any
    block: int
    whole: bool
    width: int
    rows: int
    first: _State
    second: _State
    master: _State
    rounds: bool
    formulas: tuple[str, ...]
    advance: Any = field(repr=False)
    draw: Any = field(repr=False)
    round_parameter: Any = field(default=None, repr=False)

    @property
    def cache_key(self) -> str:
        return f"{self!r} {_SOURCE}"


def _state(name: str, numbers: Numbers | None) -> _State:
    if numbers is None or not numbers.scaled:
        return _State(-1 if numbers is None else _PLACES[name], False, tl.float32)
    parts = (
        formulas.decode(numbers.name),
        formulas.scale(numbers.name),
        formulas.encode(numbers.name, name == "exp_avg_sq"),
    )
    digests = tuple(formula.digest for formula in parts)
    return _State(_PLACES[name], True, _TYPES[numbers.bits], digests, *map(device_function, parts))


@cache
def _constants(kind: Kind, gradient: torch.dtype) -> _Constants:
    block = kind.block or 128
    width = triton.next_power_of_2(block)
    rounds = kind.master is None and kind.parameter != torch.float32
    parts = [formulas.advance(), formulas.draw(), *([formulas.round_parameter(kind.parameter)] if rounds else [])]
    numbers = dict(kind.entries())
    first, second, master = (_state(name, numbers.get(name)) for name in _PLACES)
    return _Constants(
        _TYPES[kind.parameter],
        _TYPES[gradient],
        block,
        kind.block > 0,
        width,
        max(1, _ELEMENTS // width),
        first,
        second,
        master,
        rounds,
        tuple(formula.digest for formula in parts),
        *map(device_function, parts),
    )


@triton.jit
def _at(table, column: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(table + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if aligned else pointer


@triton.jit
def _load(table, state: tl.constexpr, at, rows, inside, present, aligned: tl.constexpr):
    x = tl.load(_at(table, state.place, state.dtype, aligned) + at, mask=inside, other=0)
    if state.scaled:
        scale = tl.load(_at(table, state.place + 1, tl.float32, aligned) + rows, mask=present, other=0.0)
        x = state.decode(x.to(tl.int32), scale[:, None])
    return x


@triton.jit
def _store(table, state: tl.constexpr, x, bits, at, rows, inside, present, aligned: tl.constexpr):
    if state.scaled:
        scale, gamma = state.scale(absolute_maximum(tl.where(inside, x, 0.0), 1))
        tl.store(_at(table, state.place + 1, tl.float32, aligned) + rows, scale, mask=present)
        x = state.encode(x, gamma[:, None], bits).to(state.dtype)
    tl.store(_at(table, state.place, state.dtype, aligned) + at, x, mask=inside)


@triton.jit
def _step(table, sizes, programs, reals, integers, own: tl.constexpr, aligned: tl.constexpr):
    # Triton 3.6 passes a constant on only under a name of its own.
    first: tl.constexpr = own.first
    second: tl.constexpr = own.second
    master: tl.constexpr = own.master
    program = tl.program_id(0)
    member = tl.load(programs + 2 * program)
    table += member * _COLUMNS
    if tl.load(integers + 2 * member + 1) == 0:
        rows = tl.load(programs + 2 * program + 1).to(tl.int64) * own.rows + tl.arange(0, own.rows)
        columns = tl.arange(0, own.width)[None, :]
        at = rows[:, None] * own.block + columns
        size = tl.load(sizes + member)
        present = rows * own.block < size
        # Of one value along a row where that is possible: a thread then moves many elements at once.
        whole_rows: tl.constexpr = own.whole and own.block == own.width
        inside = present[:, None] if whole_rows else (columns < own.block) & (at < size)
        for_parameter, for_first, for_second = own.draw(at.to(tl.int32) + tl.load(integers + 2 * member))

        g = tl.load(_at(table, 1, own.gradient, aligned) + at, mask=inside, other=0.0).to(tl.float32)
        m = _load(table, first, at, rows, inside, present, aligned)
        v = _load(table, second, at, rows, inside, present, aligned)
        if master.place >= 0:
            p = _load(table, master, at, rows, inside, present, aligned)
        else:
            p = tl.load(_at(table, 0, own.parameter, aligned) + at, mask=inside, other=0.0).to(tl.float32)
        reals += member * 8
        p, m, v = own.advance(
            p,
            g,
            m,
            v,
            tl.load(reals),
            tl.load(reals + 1),
            tl.load(reals + 2),
            tl.load(reals + 3),
            tl.load(reals + 4),
            tl.load(reals + 5),
            tl.load(reals + 6),
            tl.load(reals + 7),
        )
        _store(table, first, m, for_first, at, rows, inside, present, aligned)
        _store(table, second, v, for_second, at, rows, inside, present, aligned)
        if master.place >= 0:
            _store(table, master, p, for_parameter, at, rows, inside, present, aligned)
        if own.rounds:
            p = own.round_parameter(p, for_parameter)
        tl.store(_at(table, 0, own.parameter, aligned) + at, p.to(own.parameter), mask=inside)


class Launch:
    """The launch of parameters of one kind that step together; what it needs on the device is kept between steps.

    Args:
        places: rows of ``reals`` and ``integers``, one per parameter.
        sizes: elements of each.
    """

    def __init__(
        self, kind: Kind, gradient: torch.dtype, places: list[int], sizes: Sequence[int], device: torch.device
    ) -> None:
        self.places = places
        self.own = _constants(kind, gradient)
        per_program = self.own.rows * self.own.block
        counts = [-(-size // per_program) for size in sizes]
        member = np.repeat(np.arange(len(sizes), dtype=np.int32), counts)
        self.rows = torch.tensor(places, dtype=torch.int64, device=device)
        rank = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        self.programs = torch.from_numpy(np.stack([member, rank], 1)).to(device)
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.table = torch.empty(len(sizes), COLUMNS, dtype=torch.int64, device=device)
        self.addresses: list[list[int]] = []
        self.aligned = False
        self.on_host: Tensor | None = None

    def __call__(self, members: Sequence[dict[str, Tensor]], reals: Tensor, integers: Tensor) -> None:
        """``members``: ``parameter``, ``gradient`` and state of each, contiguous. ``reals`` and ``integers`` have a row
        for every place, as :func:`blocks.update` takes it.
        """
        addresses = [_addresses(tensors) for tensors in members]
        if addresses != self.addresses:  # gradients move; the copy does not wait, and its source outlives it
            host = torch.tensor(addresses, dtype=torch.int64)
            self.on_host = host.pin_memory() if self.table.is_cuda else host
            self.table.copy_(self.on_host, non_blocking=True)
            self.addresses = addresses
            self.aligned = all(address % 16 == 0 for row in addresses for address in row)
        reals, integers = reals[self.rows], integers[self.rows]
        arguments = (self.table, self.sizes, self.programs, reals, integers)
        launch(_step, len(self.programs), *arguments, own=self.own, aligned=self.aligned)


def _addresses(tensors: dict[str, Tensor]) -> list[int]:
    found = [tensors["parameter"].data_ptr(), tensors["gradient"].data_ptr(), *[0] * (COLUMNS - 2)]
    for name, place in _PLACES.items():
        for offset, key in enumerate((name, f"{name}_scale")):
            if key in tensors:
                found[place + offset] = tensors[key].data_ptr()
    return found
