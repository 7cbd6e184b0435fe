"""What options, rules and operands have in common where they are checked: names, and lists of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = ["names_of", "reject_unknown"]


def reject_unknown(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            msg = f"unknown {kind} {key!r}{hint} Known: {', '.join(known)}"
            raise ValueError(msg)


def names_of(key: str, value: Any) -> tuple[str, ...]:
    names = () if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    if not listed or not all(isinstance(name, str) and name for name in names):
        msg = f"option {key!r} takes a list of names, got {value!r}"
        raise ValueError(msg)
    return names
