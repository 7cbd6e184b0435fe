"""What the host does for an op, recorded at the first call of a kind and repeated at the next ones.

The host function of an op finds out sizes, allocates results and launches kernels; for Triton, each launch binds,
specializes and looks up its arguments anew. All of it depends on the kind of the call alone: the sizes, strides, dtypes
and alignment of its tensors, and its other arguments. So the first call of a kind runs under a recorder, and the next
ones allocate what it allocated and launch what it launched, with their own addresses. That takes a few microseconds
per launch where the host function takes tens, which a model of small layers waits for.

A function is repeated if it does nothing to its arguments, and what it makes of them, but allocate, view, copy and
launch (:func:`qcompile.kernels.triton.launch`). Any other operation on them, a tensor from elsewhere that is no
constant (:func:`note_constant`), or a launch that gives no compiled kernel (Triton's interpreter), and the function
itself runs at every call of that kind.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from qcompile import compat

__all__ = ["bound", "note_constant", "note_launch", "replayed", "run_compiled"]

aten = torch.ops.aten

_ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
_COPIES = frozenset({aten.clone.default, aten._to_copy.default, aten.copy_.default})

#: Bytes that Triton specializes addresses by.
_ALIGNMENT = 16
#: Kinds of calls that a function remembers; a model of many sizes has its plans made again.
_MOST_KINDS = 4096


@dataclass(frozen=True)
class _View:
    """A tensor as a view of a slot: an argument of the call, or what a step of it made.

    ``offset`` in bytes; ``whole``: it is the slot as it is.
    """

    slot: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    whole: bool

    def of(self, slots: list[Any]) -> Tensor:
        tensor = slots[self.slot]
        if self.whole:
            return tensor
        tensor = tensor.view(self.dtype)
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset // tensor.itemsize)


@dataclass(frozen=True)
class _Allocation:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def run(self, slots: list[Any], stream: int) -> None:
        slots.append(compat.empty_strided(self.size, self.stride, self.dtype, self.device))


@dataclass(frozen=True)
class _Shared:
    """A tensor that all calls can share: one without elements, or a constant."""

    tensor: Tensor

    def run(self, slots: list[Any], stream: int) -> None:
        slots.append(self.tensor)


@dataclass(frozen=True)
class _Copy:
    """A call of one of :data:`_COPIES`, the only operations that compute."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, slots: list[Any], stream: int) -> None:
        arguments = [argument.of(slots) if isinstance(argument, _View) else argument for argument in self.arguments]
        slots.append(self.function(*arguments, **self.options))


def bound(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a launch in the order of the kernel's parameters, constants and defaults included."""
    named = {name: value for name, value in constants.items() if name in kernel.arg_names}
    found = kernel.signature.bind(*arguments, **named)
    found.apply_defaults()
    return found.args


def run_compiled(compiled: Any, grid: tuple[int, ...], stream: int, arguments: list[Any]) -> None:
    """Launch a compiled Triton kernel with all its arguments (:func:`bound`), addresses in place of tensors."""
    # No launch metadata and no hooks: those belong to Triton's own profiler.
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


class _Address:
    """What stands for the tensor of a tensor descriptor, which is asked for its address only."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Launch:
    """A launch of a compiled Triton kernel.

    Attributes:
        arguments: all of them, with ``None`` where addresses come in.
        addresses: place, slot and offset in bytes of each address.
        descriptors: the same of each tensor descriptor, and a descriptor to copy.
    """

    def __init__(
        self,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: list[Any],
        addresses: list[tuple[int, int, int]],
        descriptors: list[tuple[int, int, int, Any]],
    ) -> None:
        self.compiled, self.grid = compiled, grid
        self.arguments, self.addresses, self.descriptors = arguments, addresses, descriptors

    def run(self, slots: list[Any], stream: int) -> None:
        arguments = self.arguments.copy()
        for place, slot, offset in self.addresses:
            arguments[place] = slots[slot].data_ptr() + offset
        for place, slot, offset, descriptor in self.descriptors:
            moved = copy.copy(descriptor)
            moved.base = _Address(slots[slot].data_ptr() + offset)
            arguments[place] = moved
        run_compiled(self.compiled, self.grid, stream, arguments)


@dataclass(frozen=True)
class _Plan:
    """What a call did: ``steps`` in order, each with the slots made so far, and which slots are its results."""

    tensors: tuple[int, ...]
    steps: tuple[Any, ...]
    results: tuple[_View, ...]
    device: torch.device
    single: bool

    def run(self, arguments: tuple[Any, ...]) -> Any:
        slots = [arguments[i] for i in self.tensors]
        stream = compat.raw_stream(self.device)
        for step in self.steps:
            step.run(slots, stream)
        if self.single:
            return self.results[0].of(slots)
        return tuple([result.of(slots) for result in self.results])


class _Recorder(compat.TorchDispatchMode):
    """Notes what one call does on its tensors. Slots and ``views`` of them stay alive: identities are then unique."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.places = tuple(i for i, argument in enumerate(arguments) if isinstance(argument, Tensor))
        self.slots: list[Tensor] = [arguments[i] for i in self.places]
        self.slot_of = {id(tensor): slot for slot, tensor in enumerate(self.slots)}
        self.views: list[Tensor] = []
        self.steps: list[Any] = []
        self.obstacle = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in compat.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if func in _ALLOCATIONS:
            made = _Allocation(tuple(result.shape), result.stride(), result.dtype, result.device)
            self._made(result, made if result.numel() else _Shared(result))
        elif any(id(tensor) in self.slot_of for tensor in tensors) and self._knows(*tensors):
            self._note(func, args, kwargs or {}, result)
        return result  # of other tensors, constants that a first call works out: no step of the call

    def _note(self, func: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        aliases = [returned.alias_info for returned in func._schema.returns]
        if func in _COPIES:
            step = _Copy(func, tuple(self._view(a) if isinstance(a, Tensor) else a for a in args), options)
            self._made(result, step)
        elif isinstance(result, Tensor) and all(alias and not alias.is_write for alias in aliases):
            self.views.append(result)
            self.slot_of[id(result)] = self.slot_of[id(args[0])]
        else:
            self.obstacle = f"it calls {func}"

    def _knows(self, *values: Any) -> bool:
        """Whether all tensors among ``values`` are arguments of the call, or made of them; if not, it is noted."""
        if not all(id(value) in self.slot_of for value in values if isinstance(value, Tensor)):
            self.obstacle = "it reads a tensor that is none of its arguments"
        return not self.obstacle

    def _made(self, result: Tensor, step: Any) -> None:
        self.steps.append(step)
        self.slots.append(result)
        self.slot_of.setdefault(id(result), len(self.slots) - 1)

    def _view(self, tensor: Tensor) -> _View:
        slot = self.slot_of[id(tensor)]
        base = self.slots[slot]
        offset = tensor.data_ptr() - base.data_ptr() if tensor.numel() and base.numel() else 0
        kind = (tensor.shape, tensor.stride(), tensor.dtype, offset)
        return _View(slot, *kind, whole=kind == (base.shape, base.stride(), base.dtype, 0))

    def launched(self, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """``arguments``: in the order of the kernel's parameters, constants included."""
        if not self._knows(*(getattr(argument, "base", argument) for argument in arguments)):
            return
        values: list[Any] = list(arguments)
        addresses: list[tuple[int, int, int]] = []
        descriptors: list[tuple[int, int, int, Any]] = []
        for place, value in enumerate(arguments):
            if isinstance(value, Tensor):
                view, values[place] = self._view(value), None
                addresses.append((place, view.slot, view.offset))
            elif isinstance(getattr(value, "base", None), Tensor):
                view, template = self._view(value.base), copy.copy(value)
                template.base = values[place] = None
                descriptors.append((place, view.slot, view.offset, template))
        self.steps.append(_Launch(compiled, (*grid, 1, 1)[:3], values, addresses, descriptors))

    def plan(self, result: Any) -> _Plan | None:
        """What repeats the call that gave ``result``; ``None`` if nothing does."""
        results = result if isinstance(result, (tuple, list)) else (result,)
        if not self._knows(*results):
            return None
        views = tuple(map(self._view, results))
        return _Plan(self.places, tuple(self.steps), views, results[0].device, single=results is not result)


_active = threading.local()


def note_launch(kernel: Any, compiled: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: Any) -> None:
    """Tell the recorder of this thread, if there is one, what :func:`qcompile.kernels.triton.launch` did."""
    recorder = getattr(_active, "recorder", None)
    if recorder is None:
        return
    if compiled is None:
        recorder.obstacle = "no kernel was compiled"
        return
    recorder.launched(compiled, grid, bound(kernel, arguments, constants))


def note_constant(tensor: Tensor) -> None:
    """Tell the recorder of this thread, if there is one, that ``tensor`` is the same, and unchanged, at every call."""
    recorder = getattr(_active, "recorder", None)
    if recorder is not None and id(tensor) not in recorder.slot_of:
        recorder._made(tensor, _Shared(tensor))


def _kind(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that a call depends on but for the addresses and contents of its tensors."""
    return tuple(
        [
            (a.shape, a.stride(), a.dtype, a.device, a.data_ptr() % _ALIGNMENT == 0) if isinstance(a, Tensor) else a
            for a in arguments
        ]
    )


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function(*arguments)``, recorded at the first call of a kind and repeated at the next ones.

    Its results must be new tensors. Calls while another device is current, and recursive ones, run it as it is.
    """
    plans: dict[tuple[Any, ...], _Plan | None] = {}

    @wraps(function)
    def call(*arguments: Any) -> Any:
        kind = _kind(arguments)
        plan = plans.get(kind)
        if plan is not None and compat.is_current(plan.device):
            return plan.run(arguments)
        if kind in plans or getattr(_active, "recorder", None) is not None:
            return function(*arguments)
        recorder = _Recorder(arguments)
        _active.recorder = recorder
        try:
            with torch.no_grad(), recorder:
                result = function(*arguments)
        finally:
            _active.recorder = None
        if len(plans) >= _MOST_KINDS:
            plans.clear()
        plans[kind] = recorder.plan(result)
        return result

    call.plans = plans  # type: ignore[attr-defined]
    return call
