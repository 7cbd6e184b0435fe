"""What belongs to one ``torch.compile`` call although a backend sees one sub-graph at a time: have the user's rules
matched, and has any graph the experts?

Graph breaks and DDP buckets call the backend several times. A rule that matches nothing in one
sub-graph is normal; one that has matched nothing once the first step is over is a mistake the user would otherwise
never learn of. So are experts in one parameter that no graph reads: Dynamo has left a loop over them in Python.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.fx import GraphModule

from qcompile.passes.names import given_parameters
from qcompile.passes.plan import user_rules
from qcompile.passes.record import Plan

from . import compat, regional
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
        self.explained: set[str] = set()

    def add(self, plan: Plan) -> None:
        """Count a sub-graph's matches."""
        for rule, count in plan.matched.items():
            self.matched[rule] += count
        self.layers += [d.site.name for d in plan.decisions]

    def see(self, gm: GraphModule, call: compat.CompiledCall | None) -> None:
        """Note the experts that a sub-graph reads."""
        given = {id(parameter) for parameter in given_parameters(gm) if parameter.dim() == _EXPERTS_DIM}
        if call is not None and given:  # other graphs need no walk through the whole model
            _read.update(kind for kind, _, parameter in _experts(call.target) if id(parameter) in given)

    def remark(self, plan: Plan, call: compat.CompiledCall | None) -> None:
        """Warn of rules that do not reach the last blocks, and of the first layer that is wide for want of a name."""
        for rule, message, new in regional.out_of_reach(self.recipe, plan, call):
            self.explained.add(rule)
            if new:
                warnings.warn(f"qcompile: {message}", UserWarning, stacklevel=2)
        nameless = plan.nameless
        if nameless and not self.warned:
            self.warned = True
            warnings.warn(f"qcompile: {nameless[0].reason}", UserWarning, stacklevel=2)

    def unmatched(self) -> list[str]:
        return [rule for rule, count in self.matched.items() if count == 0]

    def settle(self) -> None:
        """Judge. Raises :class:`UnmatchedRuleError` under ``strict``, else warns of what is not explained yet."""
        rules = [rule for rule in self.unmatched() if self.recipe.strict or rule not in self.explained]
        if not rules:
            return
        message = unmatched_message(rules, self.layers)
        if self.recipe.strict:
            raise UnmatchedRuleError(message)
        warnings.warn(f"qcompile: {message}", UserWarning, stacklevel=2)


#: Experts in one parameter: a matrix for each.
_EXPERTS_DIM = 3
#: Class of a module with such experts, and what it calls them.
_Experts = tuple[type[nn.Module], str]

#: Those that any graph of the process has read. A second model of the same classes runs the code of the first, and
#: FSDP2 gives a module another parameter at each call.
_read: set[_Experts] = set()


def _experts(model: Any) -> Iterator[tuple[_Experts, str, nn.Parameter]]:
    """Experts of a model that are trained, with the names of their parameters."""
    if not isinstance(model, nn.Module):
        return
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == _EXPERTS_DIM and parameter.requires_grad:
                yield (type(module), name), f"{prefix}.{name}".lstrip("."), parameter


def _warn_of_experts(model: nn.Module) -> None:
    """Warn of experts that are in no graph, once for all layers."""
    left = {kind: name for kind, name, _ in _experts(model) if kind not in _read}
    if left:
        warnings.warn(
            f"qcompile: no graph reads {', '.join(left.values())}: where Dynamo leaves a loop over experts in Python, "
            "nothing is quantized; write it as grouped products (transformers: "
            'model.set_experts_implementation("grouped_mm"))',
            UserWarning,
            stacklevel=2,
        )


#: By what one ``torch.compile`` call made, and freed with it.
_sessions: WeakKeyDictionary[Any, Session] = WeakKeyDictionary()


def session_of(call: compat.CompiledCall | None, recipe: Recipe) -> Session:
    """The session of a ``torch.compile`` call, new with its first sub-graph; one of its own outside of any call.

    A session with rules of the user's is judged when the compiled callable is called a second time: by then the first
    step has compiled every sub-graph. So are experts of the compiled model.
    """
    if call is None:
        return Session(recipe)
    session = _sessions.get(call.context)
    if session is None:
        session = _sessions[call.context] = Session(recipe)
        if recipe.enabled and any(_experts(call.target)):
            compat.before_next_call(call, partial(_warn_of_experts, call.target))
        if user_rules(recipe):
            compat.before_next_call(call, session.settle)
    return session
