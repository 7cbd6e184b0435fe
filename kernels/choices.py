"""One of Inductor's choices made otherwise: rows that are quantized stay in registers.

A row is read to find its scale and again to round it. Inductor loops over rows longer than 1024 elements, and the
second loop reads (or computes) everything anew. Quantizing is bound by memory, and rows of a few thousand elements fit
the registers of one program, so here the reduction is persistent and the row is read once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

__all__ = ["QuantizeChoices", "quantize_choices"]

#: Longest row that is kept: 32 float32 numbers per thread at the 512 threads Inductor gives it.
LONGEST_ROW = 16384

_QUANTIZERS = (torch.ops.qcompile.quantize.default, torch.ops.qcompile.quantize_8bit.default)


class QuantizeChoices(InductorChoices):
    """Inductor's heuristics, with persistent reductions for kernels that quantize rows."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """As Inductor decides, or if a ``quantize`` is part of the kernel and its rows are short enough."""
        if InductorChoices.should_use_persistent_reduction(features, cooperative_reduction):
            return True
        quantizes = any(
            origin.target in _QUANTIZERS for node in features.scheduler_nodes() for origin in node.node.origins
        )
        # Rows, not columns: those of a persistent reduction would be read element by element.
        quantizes = quantizes and features.get_reduction_hint() == ReductionHint.INNER
        return quantizes and V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW)


def quantize_choices() -> AbstractContextManager[Any]:
    """Within it Inductor compiles by :class:`QuantizeChoices`, unless the user has heuristics of their own.

    A backward that AOTAutograd compiles at its first call comes after it and keeps Inductor's choices.

    Not set through ``config.inductor_choices_class``: Inductor reads that once per thread, so it would stay for other
    backends.
    """
    return nullcontext() if config.inductor_choices_class else V.set_choices_handler(QuantizeChoices())
