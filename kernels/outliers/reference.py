"""Plain-torch outlier clamping (OCC, arXiv 2501.17116 §3.2): x = clamped + residual.

Exactly so for 16-bit inputs; in float32 the difference may round once, so the sum may miss x by one unit in the last
place.

The bounds are order statistics, so at most ⌊(1 − α)n⌋ elements lie below and n − 1 − ⌊αn⌋ above them: the residual has
a fixed size known before the data is, and its positions come out of the same top-k that finds the bounds. No sort, no
host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.ops import clamped_counts, index_dtype, residual_dtype
from qcompile.ir.outliers import OutlierClamp, Outliers

__all__ = ["clamp_outliers", "restore_outliers"]


def clamp_outliers(x: Tensor, clamp: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clamped tensor (layout of x), residual values ``[..., R, m]`` and their positions along ``axis``.

    The residual is float32 for 16-bit inputs, so that ``clamped + residual`` rounds back to x: a difference of two
    bfloat16 numbers is no bfloat16 number.

    With ``per=tensor`` the residual is ``[m]`` and positions count through the flattened tensor (``axis`` moved last).
    Entries that the bounds do not cut (ties) carry the value 0.
    """
    spec = OutlierClamp.parse(clamp)
    rows = x.movedim(axis, -1)
    if spec.per == "tensor":
        rows = rows.reshape(-1)
    size = rows.shape[-1]
    low, high = clamped_counts(spec, size)
    if x.numel() == 0:
        shape = [*rows.shape[:-1], low + high]
        values = rows.new_empty(shape, dtype=residual_dtype(x.dtype))
        return x.clone(), values, values.new_empty(shape, dtype=index_dtype(size))
    below, below_at = rows.topk(low + 1, largest=False)
    above, above_at = rows.topk(high + 1)
    lower, upper = below[..., -1:], above[..., -1:]
    wide = residual_dtype(x.dtype)
    values = torch.cat([below[..., :-1].to(wide) - lower, above[..., :-1].to(wide) - upper], -1)
    positions = torch.cat([below_at[..., :-1], above_at[..., :-1]], -1)
    if spec.per == "row":
        lower, upper = lower.movedim(-1, axis), upper.movedim(-1, axis)
    return x.clamp(lower, upper), values, positions.to(index_dtype(size))


def restore_outliers(x: Tensor, values: Tensor, positions: Tensor, clamp: str, axis: int) -> Tensor:
    """``x`` plus the residual, in x's layout; of a residual of columns all rows have the same positions, ``[m]``."""
    rows = x.movedim(axis, -1)
    shape = rows.shape
    if Outliers.parse(clamp).per == "tensor":
        rows = rows.reshape(-1)
    at = positions.to(torch.int64).expand(values.shape)
    restored = rows.to(values.dtype).scatter_add(-1, at, values).to(x.dtype)
    return torch.empty_like(x).copy_(restored.view(shape).movedim(-1, axis))
