"""What belongs to one ``torch.compile`` call although a backend sees one sub-graph at a time: have the user's rules
matched?

Graph breaks and DDP buckets call the backend several times. A rule that matches nothing in one
sub-graph is normal; one that has matched nothing once the first step is over is a mistake the user would otherwise
never learn of.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from typing import Any
from weakref import WeakKeyDictionary

from qcompile.passes.plan import user_rules
from qcompile.passes.record import Plan

from . import compat
from .ir.definitions import short_names
from .ir.recipe import Recipe

__all__ = ["Session", "UnmatchedRuleError", "session_of", "unmatched_message"]


class UnmatchedRuleError(ValueError):
    """A rule of the user's matched no GEMM of the whole model."""


def unmatched_message(rules: list[str], layers: list[str]) -> str:
    names = sorted(set(layers))
    known = ", ".join(names[:12]) or "none"
    parts = sorted({part for name in names for part in (name, *name.split("."))})
    patterns = [pattern for rule in rules for pattern in re.findall(r"'([^']+)'", rule)[:1]]
    close = [match for p in patterns if (match := next(iter(difflib.get_close_matches(p, parts, 1)), ""))]
    hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
    return f"{short_names(', '.join(rules))} matched no GEMM of the model{hint}; its layers: {known}"


class Session:
    """Rule matches and layer names over all sub-graphs of one ``torch.compile`` call.

    A second model of the same class and options runs the code of the first, and no backend is called for it: what there
    is to say was said of the first.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.matched: Counter[str] = Counter()
        self.layers: list[str] = []
        self.warned = False

    def add(self, plan: Plan) -> None:
        """Count a sub-graph's matches."""
        for rule, count in plan.matched.items():
            self.matched[rule] += count
        self.layers += [d.site.name for d in plan.decisions]

    def remark(self, plan: Plan) -> None:
        """Warn of the first layer that stays wide for want of a name."""
        nameless = plan.nameless
        if nameless and not self.warned:
            self.warned = True
            warnings.warn(f"qcompile: {nameless[0].reason}", UserWarning, stacklevel=2)

    def unmatched(self) -> list[str]:
        return [rule for rule, count in self.matched.items() if count == 0]

    def settle(self) -> None:
        """Judge. Raises :class:`UnmatchedRuleError` under ``strict``, else warns."""
        rules = self.unmatched()
        if not rules:
            return
        message = unmatched_message(rules, self.layers)
        if self.recipe.strict:
            raise UnmatchedRuleError(message)
        warnings.warn(f"qcompile: {message}", UserWarning, stacklevel=2)


#: By what one ``torch.compile`` call made, and freed with it.
_sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()


def session_of(call: compat.CompiledCall | None, recipe: Recipe) -> Session:
    """The session of a ``torch.compile`` call, new with its first sub-graph; one of its own outside of any call.

    A session with rules of the user's is judged when the compiled callable is called a second time: by then the first
    step has compiled every sub-graph.
    """
    if call is None:
        return Session(recipe)
    session = _sessions.get(call.context)
    if session is None:
        session = _sessions[call.context] = Session(recipe)
        if user_rules(recipe):
            compat.before_next_call(call, session.settle)
    return session
