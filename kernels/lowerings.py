"""The table of Inductor lowerings, and what it says about a device.

Where Inductor generates Triton (CUDA), the ops below become loop bodies that fuse with their neighbours.
Elsewhere, and for arguments that are not supported, a lowering calls the op's own kernel: on CPU one compiled
kernel serves all sites.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch._inductor.lowering import add_layout_constraint, constrain_to_fx_strides, lowerings, register_lowering

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.quantizer import Quantizer

from .estimate import inductor as estimate
from .extern import own_kernel
from .matmul import inductor as matmul
from .outliers import inductor as outliers
from .quantize import inductor as quantize
from .quantize.block_grid import in_place_of_loops
from .register import DIRECT

__all__ = ["LOWERINGS", "Lowering", "cuda_provider", "register_lowerings"]


def _always() -> tuple[bool, str]:
    """Of an op that is lowered whatever its texts say; what runs it may still depend on layout and extents."""
    return True, ""


@dataclass(frozen=True)
class Lowering:
    """How an op is lowered, and ``supports(*the first texts of its node, parsed) -> (ok, reason)``; and whether the
    op's own kernel takes the place of what is generated, by the quantizer, the dtype, and whether x lies in memory.
    """

    lower: Callable
    supports: Callable[..., tuple[bool, str]] = _always
    texts: int = 0
    in_place: Callable[[Quantizer, torch.dtype, bool], bool] | None = None


LOWERINGS: dict[str, Lowering] = {
    "quantize": Lowering(quantize.lower_quantize, quantize.supports_quantize, texts=1, in_place=in_place_of_loops),
    "quantize_8bit": Lowering(quantize.lower_quantize_8bit, quantize.supports_quantize, texts=1),
    "encode_compensated": Lowering(quantize.lower_encode_compensated, quantize.supports_encode_compensated),
    "dequantize": Lowering(quantize.lower_dequantize, quantize.supports_dequantize, texts=1),
    "transpose_codes": Lowering(quantize.lower_transpose_codes),
    "mm_8bit": Lowering(matmul.lower_mm_8bit),
    "mm_add": Lowering(matmul.lower_mm_add),
    "count_bits": Lowering(matmul.lower_count_bits),
    "estimator_mask": Lowering(estimate.lower_estimator_mask, estimate.supports_estimator_mask, texts=2),
    "mask_gradient": Lowering(estimate.lower_mask_gradient),
    "scale_gradient": Lowering(estimate.lower_scale_gradient, estimate.supports_scale_gradient, texts=2),
    "clamp_outliers": Lowering(outliers.lower_clamp_outliers),
    "restore_outliers": Lowering(outliers.lower_restore_outliers),
}


def register_lowerings() -> None:
    """Tell Inductor about the lowerings. Calling it again does nothing."""
    for name, entry in LOWERINGS.items():
        op = getattr(torch.ops.qcompile, name).default
        if op not in lowerings:
            register_lowering(op, type_promotion_kind=None)(entry.lower)
    for name in DIRECT.keys() - LOWERINGS.keys():  # never generated; with the strides of the graph, as extern calls are
        op = getattr(torch.ops.qcompile, name).default
        if op not in lowerings:
            add_layout_constraint(op, constrain_to_fx_strides)
            register_lowering(op, type_promotion_kind=None)(partial(own_kernel, op))


def cuda_provider(
    op: str,
    quantizer: str | None = None,
    estimator: str | None = None,
    transform: str = "",
    dtype: torch.dtype = torch.float32,
    in_memory: bool = False,
) -> tuple[str, str]:
    """What runs ``qcompile::<op>`` on CUDA, for the report: provider and, where it is the reference, the
    reason.

    ``quantizer`` and ``estimator`` are the texts the node carries, ``None`` for an op that has none; ``dtype`` is that
    of its x, and ``in_memory`` whether Inductor generates nothing that makes x.
    """
    if op not in LOWERINGS:
        return "reference", f"{op} has no lowering"
    if transform:
        return "reference", f"{transform} is not generated"
    q = None if quantizer is None else Quantizer.parse(quantizer)
    texts: list[Quantizer | EstimatorSpec] = [] if q is None else [q]
    if estimator is not None:
        texts.append(EstimatorSpec.parse(estimator))
    entry = LOWERINGS[op]
    if q is not None and entry.in_place and entry.in_place(q, dtype, in_memory):
        return "triton", ""
    supported, reason = entry.supports(*texts[: entry.texts])
    return ("triton (inductor)", "") if supported else ("reference", reason)
