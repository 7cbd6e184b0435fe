"""The multiple-choice knapsack, exactly: one option of every group, least total score for every total cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Frontier", "solve"]


@dataclass(frozen=True)
class Frontier:
    """Every choice that no other one beats in both cost and score, from the cheapest to the best.

    Attributes:
        costs, scores: of the points: int64 and float64 ``[points]``, the one ascending, the other descending.
        trail: for each group, the point of the groups before it that a point extends, and by which option.
    """

    costs: Tensor
    scores: Tensor
    trail: tuple[tuple[Tensor, Tensor], ...]

    def choice(self, point: int) -> list[int]:
        """The option of every group at a point."""
        chosen = []
        for came_from, option in reversed(self.trail):
            chosen.append(int(option[point]))
            point = int(came_from[point])
        return chosen[::-1]

    def within(self, limit: float) -> int:
        """The best point that costs at most ``limit``; the cheapest if none does."""
        return max(int((self.costs <= limit).sum()) - 1, 0)


def solve(groups: Sequence[Sequence[tuple[int, float]]]) -> Frontier:
    """``groups``: the (cost, score) of each option. Costs are integers, so that equal sums are equal.

    Groups are added one by one, and what another choice beats is dropped. There are at most as many points as there are
    different sums of costs: few, since a model repeats its layers. Of choices that are equal in both the first is kept.
    """
    costs, scores = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    trail = []
    for options in groups:
        steps = torch.tensor([cost for cost, _ in options], dtype=torch.int64)
        rises = torch.tensor([score for _, score in options], dtype=torch.float64)
        total, risen = (steps[:, None] + costs).flatten(), (rises[:, None] + scores).flatten()
        order = torch.argsort(risen, stable=True)
        order = order[torch.argsort(total[order], stable=True)]
        best = risen[order].cummin(0).values
        order = order[torch.cat([torch.tensor([True]), risen[order][1:] < best[:-1]])]
        trail.append((order % len(costs), order // len(costs)))
        costs, scores = total[order], risen[order]
    return Frontier(costs, scores, tuple(trail))
