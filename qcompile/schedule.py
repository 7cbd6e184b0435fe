"""``qcompile.Schedule``: another backend, or other options, from a given step on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from . import compat
from .backends import with_options
from .recipes import RECIPES

__all__ = ["Phase", "Schedule", "refused"]

log = logging.getLogger("qcompile")


@dataclass(frozen=True)
class Phase:
    """What is compiled from ``start`` on, counted in steps of the optimizer."""

    start: int
    backend: str | Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        name = self.backend if isinstance(self.backend, str) else getattr(self.backend, "__name__", repr(self.backend))
        return f"{name}, {dict(self.options)}" if self.options else name

    def check(self) -> None:
        """Raises ``ValueError`` for a backend or an option that would fail when the phase begins."""
        if type(self.start) is not int or self.start < 0:
            msg = f"Schedule: a phase begins at a step ≥ 0, got {self.start!r}"
            raise ValueError(msg)
        if not isinstance(self.options, Mapping):
            msg = f"Schedule: options of the phase at step {self.start} are no dictionary, got {self.options!r}"
            raise ValueError(msg)
        if not callable(self.backend) and (why := refused(self.backend, self.options)):
            msg = f"Schedule: at step {self.start}: {why}"
            raise ValueError(msg)


def refused(backend: str, options: Mapping[str, Any]) -> str:
    """Why ``torch.compile`` would refuse a backend's name or its options, as far as names tell; empty if not."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        return f"unknown backend {backend!r}; known: {', '.join(torch.compiler.list_backends())}"
    if backend == "inductor":
        unknown = next((name for name in options if not compat.is_inductor_option(name)), None)
        return f"inductor has no option {unknown!r}" if unknown is not None else ""
    if backend in RECIPES:
        try:
            with_options(RECIPES[backend], options)
        except ValueError as error:
            return str(error)
    return ""


class Schedule:
    """Phases of a run: a model is compiled again, once, when a step is reached at which another one begins.

    ``Schedule([(0, "qcompile_quartet2"), (900, "qcompile_quartet2", {"forward": "bf16"})])``: each phase is its first
    step, a backend as ``torch.compile`` takes it, and the options (none by default). The first one begins at step 0.
    Call :meth:`compile` once and :meth:`step` after every step of the optimizer. Parameters, optimizer and
    ``state_dict`` are left alone: all that changes is what calls of the module run. Save :meth:`state_dict` beside the
    model's, and a run that is resumed begins in the phase that it was in.

    Raises ``ValueError`` for phases that are out of order, a backend that there is not, or an option that it would
    refuse, at once and not when the phase begins.
    """

    def __init__(self, phases: Sequence[tuple[Any, ...] | Phase]) -> None:
        try:
            self.phases = [phase if isinstance(phase, Phase) else Phase(*phase) for phase in phases]
        except TypeError:
            msg = f'Schedule: takes phases such as (900, "qcompile_nvfp4", {{"forward": "bf16"}}), got {phases!r}'
            raise ValueError(msg) from None
        for phase in self.phases:
            phase.check()
        starts = [phase.start for phase in self.phases]
        if starts[:1] != [0]:
            msg = f"Schedule: the first phase begins at step 0, got {starts[0] if starts else 'no phase'}"
            raise ValueError(msg)
        if any(after <= before for before, after in pairwise(starts)):
            msg = f"Schedule: phases begin one after another, got {starts}"
            raise ValueError(msg)
        #: Steps that have been made.
        self.count = 0
        self._modules: list[tuple[nn.Module, dict[str, Any]]] = []

    @property
    def phase(self) -> Phase:
        """The one that the next step is in."""
        return [phase for phase in self.phases if phase.start <= self.count][-1]

    def compile(self, *modules: nn.Module, **arguments: Any) -> None:
        """``module.compile(backend=…, options=…)`` of the current phase, now and whenever another one begins.

        ``arguments`` are further ones of ``torch.compile`` (``dynamic``, ``fullgraph``). Raises ``TypeError`` for what
        is no module, what ``torch.compile`` returned, and torch's own modules (``nn.Sequential``), whose forward
        ``module.compile`` leaves as it is.
        """
        for name in {"backend", "options", "mode", "disable"} & arguments.keys():
            hint = " as an option, which qcompile's backends take" if name == "mode" else ""
            msg = f"Schedule.compile: {name}= belongs to a phase; write it there{hint}"
            raise ValueError(msg)
        for module in modules:
            if not isinstance(module, nn.Module) or hasattr(module, "_orig_mod"):
                what = "what torch.compile returned" if hasattr(module, "_orig_mod") else type(module).__name__
                msg = f"Schedule.compile: takes modules as they were before torch.compile, got {what}"
                raise TypeError(msg)
            if module.forward.__module__.startswith("torch.nn.modules."):
                name = type(module).__name__
                msg = f"Schedule.compile: torch runs {name}'s own forward uncompiled; give a module that calls it"
                raise TypeError(msg)
        new = [(module, arguments) for module in modules]
        self._modules += new
        self._apply(new)

    def step(self) -> None:
        """Count a step of the optimizer. Where a phase begins, modules are compiled again at their next call."""
        self._move_to(self.count + 1)

    def state_dict(self) -> dict[str, int]:
        """The number of steps made."""
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go to the phase of a saved run. Raises ``ValueError`` for what :meth:`state_dict` did not return."""
        count = state.get("count") if isinstance(state, Mapping) else None
        if type(count) is not int or count < 0:
            msg = f"Schedule.load_state_dict: takes what state_dict() returned, got {state!r}"
            raise ValueError(msg)
        self._move_to(count)

    def _move_to(self, count: int) -> None:
        before, self.count = self.phase, count
        if self.phase is not before and self._modules:
            log.warning("qcompile: step %d: %s; compiled again at the next call", count, self.phase)
            self._apply(self._modules)

    def _apply(self, modules: list[tuple[nn.Module, dict[str, Any]]]) -> None:
        phase = self.phase
        for module, arguments in modules:
            module.compile(backend=phase.backend, options=dict(phase.options) or None, **arguments)
