"""What rows rotated by tensor cores may be: the reference's codes, but for numbers that lie on a midpoint.

Tensor cores add in an order of their own and cut sums off (Hopper keeps at least 23 bits), so a rotated element is off
by some 2⁻²² of what was added up. ``UNCERTAINTY`` leaves room for eight instructions that each do that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.ir.quantizer import Quantizer
from qcompile.ir.recipe import Operand
from qcompile.ir.transforms import Transform
from qcompile.kernels.quantize import reference

UNCERTAINTY = 2.0**-18


def assert_rotated_by_product(actual: tuple[Tensor, ...], x: Tensor, operand: str) -> None:
    """Of :func:`quantize_8bit_masked` with packed codes, for rows x ``[R, K]``.

    Scales are the reference's bit for bit, and so are codes and masks where y minus and plus its uncertainty have the
    same, as nearly all of the first row must; elsewhere a level is between those two. 8-bit and stored codes agree.
    """
    spec = Operand.parse(operand)
    codes, scales, stored, mask = actual
    fmt = spec.stored.format
    torch.testing.assert_close(scales, reference.quantize(x, str(spec.stored), -1)[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(codes, reference.recode(stored, str(spec.stored), x.shape[1], False))

    y, _ = reference.scaled_input(x, scales, str(spec.stored), -1, None, str(spec.transform))
    off = uncertainty(x, spec.stored, spec.transform)
    below, above = (_levels(y + sign * off, spec.stored) for sign in (-1, 1))
    levels = reference.decode(reference.unpack(stored, fmt.bits, x.shape[1]), fmt)
    wrong = ((levels < below) | (levels > above)) & ~off.isposinf()  # sums that leave float32 may do so on the way
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} levels, the first at {wrong.nonzero()[0].tolist()}"

    if spec.estimator.kind.mask:
        passed = reference.unpack(mask, 1, x.shape[1]).bool()
        points = ((y - off, below), (y, levels), (y + off, above))
        lower, middle, upper = (spec.estimator.mask(point, level, fmt) for point, level in points)
        certain = (lower == middle) & (middle == upper) & ~off.isposinf()
        wrong = certain & (passed != middle)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} in the mask"
        assert certain[0].float().mean() > 0.99
    assert (below == above)[0].float().mean() > 0.99


def uncertainty(x: Tensor, q: Quantizer, transform: Transform) -> Tensor:
    """Of every element of y, float32 ``[R, K]``: in proportion to the magnitudes that are added up for it."""
    size = x.shape[1]
    _, _, reciprocal = reference.scale_pair(reference.group_statistic(x.float(), x.float(), q), q)
    summed = x.float().abs().unflatten(1, (size // transform.rotation, transform.rotation)).sum(-1)
    return (summed * reciprocal * transform.rotation**-0.5 * UNCERTAINTY).repeat_interleave(transform.rotation, 1)


def _levels(y: Tensor, q: Quantizer) -> Tensor:
    return reference.decode(reference.encode(y, q), q.format)
