"""Numbers, ranks and names as the report writes them."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["SHOWN", "folded_name", "printable", "ranks_text", "size_text", "some"]

#: How many of a list's items the summary spells out.
SHOWN = 8


def some(items: Sequence[str], most: int) -> str:
    """``"a, b and 3 more"``"""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def folded_name(layer: str) -> str:
    """``"layers.*.up"`` for ``"layers.3.up"``: what equal layers have in common."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def printable(text: str) -> str:
    """``text`` with what would move a terminal's cursor or break a line as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def ranks_text(ranks: Sequence[int], everyone: Sequence[int] = ()) -> str:
    """``"2 ranks"`` for everyone, else which: ``"rank 3"``, ``"ranks 0–3, 6"``."""
    if len(ranks) > 1 and tuple(ranks) == tuple(everyone):
        return f"{len(ranks)} ranks"
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
