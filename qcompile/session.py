"""What belongs to one ``torch.compile`` call although a backend sees one sub-graph at a time: have the user's rules
matched?

Graph breaks, DDP buckets and regional compilation call the backend several times. A rule that matches nothing in one
sub-graph is normal; one that has matched nothing once the first step is over is a mistake the user would otherwise
never learn of.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from qcompile.passes.plan import Plan

from .ir.recipe import Recipe

__all__ = ["Session", "UnmatchedRuleError", "session_for", "unmatched_message"]


class UnmatchedRuleError(ValueError):
    """A rule of the user's matched no GEMM of the whole model."""


def unmatched_message(rules: list[str], layers: list[str]) -> str:
    names = sorted(set(layers))
    known = ", ".join(names[:12]) or "none"
    parts = sorted({part for name in names for part in (name, *name.split("."))})
    patterns = [pattern for rule in rules for pattern in re.findall(r"'([^']+)'", rule)[:1]]
    close = [match for p in patterns if (match := next(iter(difflib.get_close_matches(p, parts, 1)), ""))]
    hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
    return f"{', '.join(rules)} matched no GEMM of the model{hint}; its layers: {known}"


class Session:
    """Rule matches and layer names over all sub-graphs of one ``torch.compile`` call."""

    def __init__(self, recipe: Recipe, options: Any) -> None:
        self.recipe = recipe
        self.options = options  # kept alive: its identity is the session's key
        self.matched: Counter[str] = Counter()
        self.layers: list[str] = []
        self.settled = False

    def add(self, plan: Plan) -> None:
        """Count a sub-graph's matches."""
        for rule, count in plan.matched.items():
            self.matched[rule] += count
        self.layers += [d.site.name for d in plan.decisions]

    def unmatched(self) -> list[str]:
        return [rule for rule, count in self.matched.items() if count == 0]

    def settle(self) -> None:
        """Judge once. Raises :class:`UnmatchedRuleError` under ``strict``, else warns."""
        self.settled = True
        rules = self.unmatched()
        if not rules:
            return
        message = unmatched_message(rules, self.layers)
        if self.recipe.strict:
            raise UnmatchedRuleError(message)
        warnings.warn(f"qcompile: {message}", UserWarning, stacklevel=2)

    def watch(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, judging when it is called a second time: by then the first step has compiled every
        sub-graph.
        """
        if not self.matched or self.settled:
            return compiled
        calls = 0

        def run(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2 and not self.settled:
                self.settle()
            return compiled(*args)

        return run


_sessions: dict[tuple[int, str], Session] = {}


def session_for(recipe: Recipe, options: Mapping[str, Any] | None) -> Session:
    """The session of one ``torch.compile`` call, told apart by the options object that torch hands to every
    sub-graph.
    """
    key = (id(options), repr(recipe))
    if options is None or key not in _sessions:
        session = Session(recipe, options)
        if options is None:
            return session
        _sessions[key] = session
    return _sessions[key]
