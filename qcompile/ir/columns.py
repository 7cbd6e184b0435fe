"""Outlier columns in plain torch operations, which compilers fuse with what is around them: x = rest + residual."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .outliers import OutlierColumns

__all__ = ["Taken", "take_columns"]


class Taken(NamedTuple):
    """x without its outlier columns, and those.

    Attributes:
        rest: x with 0 in the columns that were taken, in its layout.
        values: ``[..., R, m]``, the axis moved last, of x's dtype: m columns of x, 0 in those that were not taken.
        positions: int64 ``[m]``, of the columns along the axis; distinct.
        reaching: bool ``[m]``, whether each of them was taken.
        magnitudes: ``[K]``, the largest magnitude of every column.
    """

    rest: Tensor
    values: Tensor
    positions: Tensor
    reaching: Tensor
    magnitudes: Tensor


def take_columns(x: Tensor, spec: OutlierColumns, axis: int) -> Taken:
    """The columns of x, floating point with K elements along ``axis``, whose largest magnitude reaches
    ``spec.threshold``: m = min(spec.most, K) at most. A column with a NaN reaches it.
    """
    rows = x.movedim(axis, -1)
    size = rows.shape[-1]
    magnitudes = rows.abs().unsqueeze(0).amax(tuple(range(x.dim()))) if x.numel() else x.new_zeros(size)
    largest, positions = magnitudes.topk(min(spec.most, size))
    reaching = ~(largest < spec.threshold)
    taken = torch.zeros_like(magnitudes, dtype=torch.bool).scatter(0, positions, reaching)
    values = rows.index_select(-1, positions).masked_fill(~reaching, 0)
    along = [1] * x.dim()
    along[axis] = size
    return Taken(x.masked_fill(taken.view(along), 0), values, positions, reaching, magnitudes)
