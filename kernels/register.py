"""Registers the kernels of the ``qcompile::`` ops with the dispatcher.

Every op runs its plain-torch reference wherever no faster provider supports the arguments. :func:`provider_of` says which one
that is and why; the report prints it.
"""

from __future__ import annotations

from qcompile.ir.ops import LIB

from .estimate import reference as estimate
from .matmul import reference as matmul
from .outliers import reference as outliers
from .quantize import reference as quantize

REFERENCES = {
    "quantize": quantize.quantize,
    "dequantize": quantize.dequantize,
    "clamp_outliers": outliers.clamp_outliers,
    "restore_outliers": outliers.restore_outliers,
    "estimator_mask": estimate.estimator_mask,
    "mask_gradient": estimate.mask_gradient,
    "scale_gradient": estimate.scale_gradient,
    "scaled_mm": matmul.scaled_mm,
}

for _name, _reference in REFERENCES.items():
    LIB.impl(_name, _reference, "CompositeExplicitAutograd")
