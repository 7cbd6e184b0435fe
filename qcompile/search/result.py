"""What a search has found: scores, the frontier of choices, and the rules of one of them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table

from qcompile.ir.rules import Rule
from qcompile.report.text import printable

from .knapsack import Frontier, solve
from .layers import WIDE, Cost, Layer, Operands, grouped

__all__ = ["Sensitivity", "check_budget"]

#: Budgets that the table of the frontier lists.
BUDGETS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0)


def check_budget(budget: Any) -> None:
    """Raises ``ValueError`` for what is no share."""
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 <= budget <= 1:
        msg = f"sensitivity: budget={budget!r} is not a number from 0 to 1, the share of the savings to give up"
        raise ValueError(msg)


@dataclass(frozen=True)
class Sensitivity:
    """Scores of all layers, and one choice among the candidates (:func:`qcompile.sensitivity`).

    Attributes:
        layers: all products, by layer, with the scores of each candidate; those that are not scored say why.
        groups: the scored ones, those that share a choice together. Same order as ``chosen``.
        candidates: their names.
        budget: the share of the savings that may be given up.
        chosen: of every group, the candidate or ``"wide"``.
        unit: of costs.
        options: those that the search was given.
    """

    layers: list[Layer]
    groups: list[list[Layer]]
    candidates: tuple[str, ...]
    budget: float
    chosen: list[str]
    unit: str
    options: Mapping[str, Any] = field(repr=False)
    frontier: Frontier = field(repr=False)
    choices: list[list[str]] = field(repr=False)

    @staticmethod
    def of(
        layers: list[Layer],
        candidates: tuple[str, ...],
        cost: Cost,
        unit: str,
        budget: float,
        options: Mapping[str, Any],
    ) -> Sensitivity:
        """Group, solve and choose. Raises ``ValueError`` for a cost that is no integer."""
        groups = grouped([layer for layer in layers if layer.scores])
        choices, solved = [], []
        for group in groups:
            shared = [name for name in candidates if all(name in layer.scores for layer in group)]
            choices.append([*shared, WIDE])
            costs = [cost(group, option) for option in choices[-1]]
            if bad := [value for value in costs if type(value) is not int]:
                msg = f"sensitivity: cost of {group[0].name!r} is {bad[0]!r}; a cost is an integer"
                raise ValueError(msg)
            scores = [sum(layer.scores.get(option, 0.0) for layer in group) for option in choices[-1]]
            solved.append(list(zip(costs, scores, strict=True)))
        found = Sensitivity(layers, groups, candidates, budget, [], unit, options, solve(solved), choices)
        return found.at(budget)

    def at(self, budget: float) -> Sensitivity:
        """The choice for another budget, from the same scores. Raises ``ValueError`` for one outside of 0 … 1."""
        check_budget(budget)
        point = self._point(budget)
        chosen = [options[i] for options, i in zip(self.choices, self.frontier.choice(point), strict=True)]
        return replace(self, budget=budget, chosen=chosen)

    def _point(self, budget: float) -> int:
        cheapest, best = self.frontier.costs[0].item(), self.frontier.costs[-1].item()
        return self.frontier.within(cheapest + int(budget * (best - cheapest)))

    @property
    def cost(self) -> int:
        """Of the choice."""
        return int(self.frontier.costs[self._point(self.budget)])

    @property
    def score(self) -> float:
        """Of the choice; 0 is high precision."""
        return float(self.frontier.scores[self._point(self.budget)])

    @property
    def choice(self) -> dict[str, str]:
        """Layer → candidate or ``"wide"``; of a layer with several kinds of products, the last one's."""
        return {layer.name: name for group, name in zip(self.groups, self.chosen, strict=True) for layer in group}

    @property
    def rules(self) -> list[dict[str, Any]]:
        """What to add to the options of the search, so that exactly the layers whose choice is not the recipe's own
        change: ``options={"rules": found.rules}``.

        A rule for ``"0"`` is one for ``"head.0"`` too. So shorter names come first, and a layer that an earlier rule
        meets without being meant gets one of its own.
        """
        wanted: dict[tuple[str, str], Operands] = {layer.key: layer.recipe for layer in self.layers}
        for group, option in zip(self.groups, self.chosen, strict=True):
            wanted.update({layer.key: layer.candidates.get(option) for layer in group})
        state: dict[tuple[str, str], Operands] = {layer.key: layer.recipe for layer in self.layers}
        rules: list[dict[str, Any]] = []
        left_out: set[tuple[str, str]] = set()  # by a rule so far
        for name, op in sorted(wanted, key=lambda key: (key[0].count("."), key)):
            target = wanted[name, op]
            if state[name, op] == target:
                continue
            rule: dict[str, Any] = {"name": name, "op": op}
            rule |= {"quantize": False} if target is None else target
            if target is not None and (name, op) in left_out:
                rule["quantize"] = True
            parsed = Rule.from_data(rule)
            met = {key for key in state if parsed.matches(*key, None)}
            state.update(dict.fromkeys(met, target))
            left_out = left_out | met if target is None else left_out - met
            rules.append(rule)
        return rules

    # --- what people read ------------------------------------------------------------------------------------------

    def points(self) -> list[dict[str, Any]]:
        """The frontier at a few budgets: ``budget``, ``cost``, ``score``, ``left`` (the share of the score of the
        cheapest choice) and ``wide`` (how many layers are in high precision).
        """
        most = float(self.frontier.scores[0])
        rows = []
        for budget in sorted({*BUDGETS, self.budget}):
            found = self.at(budget)
            wide = sum(option == WIDE for option in found.choice.values())
            left = found.score / most if most else 0.0
            rows.append({"budget": budget, "cost": found.cost, "score": found.score, "left": left, "wide": wide})
        return rows

    def frontier_table(self) -> Table:
        """The frontier, for rich."""
        table = Table(title="least score for a cost", title_justify="left")
        for header in (
            "budget",
            f"cost, {self.unit}" if self.unit else "cost",
            "score",
            "of the cheapest",
            "wide layers",
        ):
            table.add_column(header, justify="right")
        for row in self.points():
            style = "bold" if row["budget"] == self.budget else ""
            texts = f"{row['budget']:.0%}", f"{row['cost']:,}", f"{row['score']:.3g}", f"{row['left']:.1%}"
            table.add_row(*texts, f"{row['wide']} of {len(self.choice)}", style=style)
        return table

    def table(self) -> Table:
        """One line for each scored layer, groups apart, for rich."""
        roles = [role for role in ("dgrad", "wgrad") if any(layer.errors.get(role) for layer in self.layers)]
        table = Table(title=f"{len(self.choice)} layers, budget {self.budget:.0%}", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("op")
        for name in self.candidates:
            table.add_column(printable(name), justify="right")
            for role in roles:
                table.add_column(f"{role} error", justify="right")
        table.add_column("chosen")
        for group, option in zip(self.groups, self.chosen, strict=True):
            for layer in group:
                texts = []
                for name in self.candidates:
                    texts.append(_number(layer.scores.get(name)))
                    texts += [_number(layer.noise(role, name)) for role in roles]
                style = "yellow" if option == WIDE else ""
                table.add_row(printable(layer.name), layer.op, *texts, printable(option), style=style)
            table.add_section()
        return table

    def __rich__(self) -> Group:
        return Group(self.table(), self.frontier_table())

    def __str__(self) -> str:
        console = Console(width=160, file=io.StringIO())
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def plot(self, path: str | Path) -> None:
        """Draw the frontier, score over cost, to an image file. Raises ``ImportError`` without matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        most = float(self.frontier.scores[0]) or 1.0
        costs, left = self.frontier.costs.tolist(), (self.frontier.scores / most).tolist()
        axes.step(costs, left, where="post", marker="." if len(costs) < 100 else None)
        axes.plot([self.cost], [self.score / most], "o", label=f"budget {self.budget:.0%}")
        axes.set(xlabel=f"cost, {self.unit}" if self.unit else "cost", ylabel="score / score of the cheapest choice")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(path, dpi=150)

    def to_json(self) -> str:
        """Choice, rules, scores and frontier as JSON."""
        layers = [
            {
                "layer": layer.name,
                "op": layer.op,
                "scores": layer.scores,
                "errors": layer.errors,
                "reason": layer.reason,
            }
            for layer in self.layers
        ]
        data = {"budget": self.budget, "choice": self.choice, "rules": self.rules, "layers": layers}
        return json.dumps({**data, "frontier": self.points()}, indent=1)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
