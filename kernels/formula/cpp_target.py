"""Formulas as C++ functions, which compilers vectorize: straight-line code with selections instead of branches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qcompile.kernels.cpp import double_literal, float_literal

from .expression import OPERATORS, Formula, Value

__all__ = ["cpp_function"]

_TYPES = {torch.float32: "float", torch.float64: "double", torch.int32: "int32_t", torch.bool: "bool"}

_OPS = {
    **OPERATORS,
    "exact_fma": "exact_fma({0}, {1}, {2})",
    "at_least": "select({0} < {1}, {1}, {0})",
    "within": "select({0} < -{1}, -{1}, select({0} <= {1}, {0}, {1}))",
    "abs": "std::fabs({0})",
    "sqrt": "std::sqrt({0})",
    "floor": "std::floor({0})",
    "exp2": "std::exp2({0})",
    "log2": "std::log2({0})",
    "power": "power({0}, {1})",
    "not": "!{0}",
    "shift_left": "int32_t(uint32_t({0}) << {1})",
    "where": "select({0}, {1}, {2})",
    "to": "{type}({0})",
    "bits": "bits_as<{type}>({0})",
}
#: Signed overflow is undefined there; formulas wrap.
_OPS_OF_INTS = {
    name: f"int32_t(uint32_t({{0}}) {sign} uint32_t({{1}}))"
    for name, sign in (("add", "+"), ("sub", "-"), ("mul", "*"))
}


def cpp_function(formula: Formula, name: str = "") -> str:
    """``static inline T name(inputs)`` of a formula with one output."""
    (output,) = formula.outputs
    lines = formula.lines(_step, _literal)
    body = [f"  const {_TYPES[step.dtype]} {variable} = {line};" for step, variable, line in lines]
    inputs = ", ".join(f"{_TYPES[value.dtype]} {value.args[0]}" for value in formula.inputs)
    head = f"static inline {_TYPES[output.dtype]} {name or formula.name}({inputs}) {{"
    return "\n".join([head, *body, f"  return {formula.results(_literal)[0]};", "}", ""])


def _step(step: Value, arguments: Sequence[str]) -> str:
    template = _OPS_OF_INTS.get(step.op, _OPS[step.op]) if step.dtype == torch.int32 else _OPS[step.op]
    return template.format(*arguments, type=_TYPES[step.dtype])


def _literal(value: Value) -> str:
    number = value.args[0]
    if value.dtype == torch.float32:
        return float_literal(number)
    if value.dtype == torch.float64:
        return double_literal(number)
    if value.dtype == torch.bool:
        return "true" if number else "false"
    return "INT32_MIN" if number == -(2**31) else str(math.trunc(number))
