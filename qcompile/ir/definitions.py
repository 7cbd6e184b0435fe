"""Definitions by name: formats, scale rules and estimators, this package's own and those of users.

Texts name definitions: ``"e2m1 row absmax even"``. Texts travel through graphs and key caches, in this process and on
disk, so a name must mean one thing for ever. What this package defines has a plain name, since its sources are part of
every key. What a user defines gets a name with a digest of everything it says: ``mine@1a2b3c4d``. The part before the @
is for people. It stands for the latest definition of that name, and is replaced by the full name wherever a text comes
in (:meth:`Registry.resolve`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol, TypeVar

__all__ = [
    "Registry", "cached_by_text", "definitions_as_before", "full_name", "named_definitions", "short_name",
    "short_names",
]  # fmt: skip

_FULL_NAME = re.compile(r"\b([^\W\d]\w*)@[0-9a-f]{8}\b")


class Named(Protocol):
    @property
    def name(self) -> str: ...


Definition = TypeVar("Definition", bound=Named)
Parsed = TypeVar("Parsed")

_CACHES: list[Callable[[], None]] = []


def cached_by_text(parse: Callable[[str], Parsed]) -> Callable[[str], Parsed]:
    """``parse``, remembering what texts mean until a user's definition may give a short name another meaning.

    Every call of an op parses its texts, so names are not to be looked up each time.
    """
    cached = cache(parse)
    _CACHES.append(cached.cache_clear)
    return cached


def _forget_texts() -> None:
    for clear in _CACHES:
        clear()


class Registry(dict[str, Definition]):
    """Definitions of one ``kind`` ("format", …) by full name."""

    def __init__(self, kind: str, built_in: Iterable[Definition]) -> None:
        super().__init__({definition.name: definition for definition in built_in})
        self.kind = kind
        self._latest: dict[str, str] = {}

    def define(self, definition: Definition) -> None:
        """Add a user's definition, which its short name stands for from now on."""
        self[definition.name] = definition
        self._latest[short_name(definition.name)] = definition.name
        _forget_texts()

    def resolve(self, name: str) -> str:
        """The full name that ``name`` stands for; ``name`` itself if it is none of a user's."""
        return self._latest.get(name, name)

    @property
    def known(self) -> list[str]:
        """Names as people write them."""
        return list(dict.fromkeys(map(short_name, self)))


@contextmanager
def definitions_as_before(*registries: Registry[Any]) -> Iterator[None]:
    """What is defined within it is forgotten after it."""
    before = [(registry, dict(registry), dict(registry._latest)) for registry in registries]
    try:
        yield
    finally:
        for registry, content, latest in before:
            registry.clear()
            registry.update(content)
            registry._latest = latest
        _forget_texts()


def full_name(name: str, *content: object) -> str:
    """``name`` with a digest of ``content``, which is all that a definition says, as texts and numbers."""
    return f"{name}@{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"


def short_name(name: str) -> str:
    """The part of a name that people write."""
    return name.partition("@")[0]


def short_names(text: str) -> str:
    """``text`` with every full name in it cut to the short one, for reports and messages."""
    return _FULL_NAME.sub(r"\1", text)


def named_definitions(text: str) -> list[str]:
    """Full names of users' definitions in ``text``, in order, each once."""
    return list(dict.fromkeys(match[0] for match in _FULL_NAME.finditer(text)))
