"""What quantizing an operand does to it, as five numbers: the op behind the numerics monitor.

It decomposes into the dialect's own ops on a sample of the rows, so it fuses like anything else and costs a fraction of
a quantization; nothing of it reaches a product or the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.columns import take_columns
from qcompile.ir.operand import Operand
from qcompile.ir.ops import LIB, quantized, transform_of, without_autocast
from qcompile.ir.outliers import OutlierColumns
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.sharding import local_tensor
from qcompile.kernels.quantize.reference import by_grid, load_scale, marks, spread, unpack

__all__ = ["STATISTICS"]

#: Names of the numbers, in order. Means over the elements of the sample: of x², of (x − x̂)²; and shares: elements
#: beyond the last level, elements whose gradient the estimator stops, elements other than 0 that are rounded to it; of
#: an operand that outlier columns are taken from, elements in them, and in those that are too many to be taken.
STATISTICS = ("signal", "noise", "clipped", "masked", "underflow", "columns", "excess")

#: Every n-th row is looked at where there are many, unless rows share scales.
_STRIDE, _FEW_ROWS = 16, 1024


def operand_statistics(x: Tensor, operand: str, axis: int, seed: Tensor | None = None) -> Tensor:
    """Float32 ``[len(STATISTICS)]`` of x, floating point, quantized along ``axis`` as ``operand`` says; of this rank's
    shard of a DTensor.
    """
    spec = Operand.parse(operand)
    rows = local_tensor(x).detach().movedim(axis, -1)
    if spec.quantizer.granularity.kind in ("row", "block") and not (spec.outliers and spec.outliers.per != "row"):
        rows = rows.reshape(-1, rows.shape[-1])
        many = not isinstance(rows.shape[0], int) or rows.shape[0] >= _FEW_ROWS
        rows = rows[::_STRIDE] if many else rows
    with torch.no_grad(), without_autocast(x):
        return _statistics(rows, spec, seed)


def _statistics(rows: Tensor, spec: Operand, seed: Tensor | None) -> Tensor:
    restored, scales, mask, global_scale = quantized(rows, str(spec), -1, seed)
    stored = spec.stored
    rotation = transform_of(spec, rows, -1).rotation
    seen = torch.ops.qcompile.hadamard(rows, rotation, -1) if rotation > 1 else rows
    columns = excess = torch.zeros((), device=rows.device)
    if isinstance(spec.outliers, OutlierColumns):
        taken = take_columns(rows, spec.outliers, -1)
        seen, columns = taken.rest, taken.reaching.sum() / taken.magnitudes.numel()
        excess = (~(taken.magnitudes < spec.outliers.threshold)).float().mean() - columns
    seen, wide = seen.float(), rows.float()
    scale = spread(load_scale(scales, stored, global_scale), rows.shape, stored)
    marked = marks(scales, rows.shape, stored)

    def clipped(of: Quantizer) -> Tensor:
        lowest, highest = (level * (1 + 2.0**-22) for level in of.format.range)
        return (seen < lowest * scale) | (seen > highest * scale)

    def underflow(of: Quantizer) -> Tensor:
        if of.format.around_zero is None:
            return torch.zeros_like(seen, dtype=torch.bool)
        low, high = of.format.around_zero
        return (seen >= low * scale) & (seen <= high * scale) & (seen != 0)

    kept = unpack(mask, 1, rows.shape[-1]) if mask is not None else torch.ones_like(seen)
    means = (
        wide.square(),
        (wide - restored.float()).square(),
        by_grid(stored, marked, clipped),
        1 - kept.float(),
        by_grid(stored, marked, underflow),
    )
    return torch.stack([*(values.float().mean() for values in means), columns, excess])


LIB.impl("operand_statistics", operand_statistics, "CompositeImplicitAutograd")
