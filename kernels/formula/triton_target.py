"""Formulas as Triton device functions: generated modules that stay on disk, so that tracebacks and Triton find lines.

A kernel has its constants in one object (:class:`qcompile.kernels.quantize.grid.Grid`), of which such a function is an
attribute: ``level, code = fmt.nearest(y)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .expression import OPERATORS, Formula, Value

__all__ = ["device_function", "loaded", "triton_source"]

_TYPES = {torch.float32: "tl.float32", torch.float64: "tl.float64", torch.int32: "tl.int32", torch.bool: "tl.int1"}

_OPS = {
    **OPERATORS,
    "exact_fma": "tl.fma({0}, {1}, {2})",
    "at_least": "tl.maximum({0}, {1})",
    "within": "tl.where({0} < -{1}, -{1}, tl.where({0} <= {1}, {0}, {1}))",
    "div": "tl.math.div_rn({0}, {1})",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "floor": "tl.floor({0})",
    "exp2": "tl.exp2({0})",
    "log2": "tl.log2({0})",
    "power": "tl.exp2(tl.log2({0}) * {1})",
    "not": "{0} == 0",
    "where": "tl.where({0}, {1}, {2})",
    "to": "{0}.to({type})",
    "bits": "{0}.to({type}, bitcast=True)",
}
#: Where float32 needs a function that rounds correctly, the operator of float64 does.
_OPS_OF_DOUBLES = {"div": OPERATORS["div"], "sqrt": "tl.sqrt({0})"}
_HEAD = '''"""Printed by qcompile.kernels.formula.triton_target."""
import triton
import triton.language as tl


@triton.jit
'''


def triton_source(formula: Formula) -> str:
    """The device function ``name(inputs)`` of ``formula`` as Python text."""
    body = [f"    {variable} = {line}" for _, variable, line in formula.lines(_step, _literal)]
    inputs = ", ".join(value.args[0] for value in formula.inputs)
    return "\n".join(
        [f"def {formula.name}({inputs}):", *body, f"    return {', '.join(formula.results(_literal))}", ""]
    )


@cache
def device_function(formula: Formula) -> Any:
    """``formula`` as a function that Triton kernels call; in the interpreter, an interpreted one."""
    return loaded(_HEAD + triton_source(formula), formula.name)


def loaded(source: str, name: str) -> Any:
    """A function of a module with this text."""
    # Private torch API (2.11 … 2.15): writes modules to Inductor's cache directory, as it does for its own kernels.
    from torch._inductor.codecache import PyCodeCache

    return getattr(PyCodeCache.load(source), name)


def _step(step: Value, arguments: Sequence[str]) -> str:
    template = _OPS_OF_DOUBLES.get(step.op, _OPS[step.op]) if step.dtype == torch.float64 else _OPS[step.op]
    return template.format(*arguments, type=_TYPES[step.dtype])


def _literal(value: Value) -> str:
    number = value.args[0]
    return repr(number) if number == number and abs(number) != float("inf") else f'float("{number}")'
