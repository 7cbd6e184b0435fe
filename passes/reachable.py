"""Which modules and tensors a Python function can get at, and by which path: closures, globals, arguments, attributes.

Only looks: nothing is called, no property is read.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["argument_names", "attributes_of", "join", "reachable"]

#: Objects looked at before giving up: a data set in memory is no place for a layer.
_MAX_OBJECTS = 20_000

#: What a module keeps for itself: its registered children have names already, hooks are nobody's attribute.
_REGISTERED = frozenset(vars(nn.Module()))

Labelled = tuple[str, Any]


def join(*parts: Any) -> str:
    return ".".join(part for part in map(str, parts) if part)


def reachable(starts: Iterable[Labelled]) -> Iterator[Labelled]:
    """Modules and tensors, each once, nearest first, with the path to them: ``trainer.models.0``.

    Does not look into the modules it finds.
    """
    queue = deque(starts)
    seen: set[int] = set()
    kept = []  # as long as an object lives no other has its id
    while queue and len(seen) < _MAX_OBJECTS:
        label, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        if issubclass(type(value), (nn.Module, Tensor)):
            yield label, value
        else:
            queue.extend(_children(label, value))


def attributes_of(module: nn.Module) -> Iterator[Labelled]:
    """What a module holds without registering it, and what the functions of its class refer to."""
    yield from ((key, value) for key, value in vars(module).items() if key not in _REGISTERED)
    for cls in type(module).__mro__:
        if not _is_torch(cls.__module__):
            yield from (("", value) for value in vars(cls).values() if issubclass(type(value), FunctionType))


def _children(label: str, value: Any) -> Iterator[Labelled]:
    """What an object holds. The variables of a function are called as they are in the function, wherever that is."""
    kind = type(value)  # `isinstance` would ask lazy proxies what they stand for
    if issubclass(kind, FunctionType):
        yield from _variables(value)
        return
    found: Iterable[tuple[Any, Any]] = ()
    if issubclass(kind, dict):
        found = dict.items(value)
    elif issubclass(kind, (list, tuple, set, frozenset, deque)):
        found = enumerate(value)
    elif issubclass(kind, functools.partial):
        found = [("", value.func), *(("", argument) for argument in value.args), *value.keywords.items()]
    elif issubclass(kind, MethodType):
        found = [("", value.__self__), ("", value.__func__)]
    elif not issubclass(kind, (type, ModuleType)) and kind.__module__ != "builtins":
        found = [*object.__getattribute__(value, "__dict__").items()] if _has(value, "__dict__") else []
        slots = [name for cls in kind.__mro__ for name in _slots(cls)]
        found += [(name, object.__getattribute__(value, name)) for name in slots if _has(value, name)]
    yield from [(join(label, key), child) for key, child in found]


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if not name.startswith("__")]


def _has(value: Any, name: str) -> bool:
    try:
        object.__getattribute__(value, name)
    except AttributeError:
        return False
    return True


def _variables(function: FunctionType) -> Iterator[Labelled]:
    """What a function takes from outside: its closure, its defaults, the globals it names."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # not assigned yet
            yield name, cell.cell_contents
    defaults = function.__defaults__ or ()
    yield from zip(argument_names(function)[-len(defaults) :], defaults, strict=True) if defaults else ()
    yield from (function.__kwdefaults__ or {}).items()
    if _is_torch(function.__module__ or ""):
        return
    names = _global_names(function.__code__)
    for name in names:
        value: Any = function.__globals__.get(name)
        if issubclass(type(value), ModuleType) and not _is_torch(value.__name__):
            yield from ((attribute, vars(value)[attribute]) for attribute in names if attribute in vars(value))
        elif value is not None:
            yield name, value


def argument_names(function: FunctionType) -> tuple[str, ...]:
    """Positional arguments of a function, ``self`` included."""
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _global_names(code: CodeType) -> list[str]:
    """Names of globals and attributes in a function and the functions in it, in order."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _global_names(constant)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _is_torch(module: str) -> bool:
    return module.split(".")[0] in ("torch", "torchvision", "numpy", "builtins")
