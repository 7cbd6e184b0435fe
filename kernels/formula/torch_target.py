"""Formulas on tensors: every operation is the torch function of its meaning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .expression import Formula, Value

__all__ = ["evaluate", "torch_function"]


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded: torch's vectorized root of float32 misses the last place."""
    return x.double().sqrt().to(x.dtype)


def _power(base: Tensor, exponent: float) -> Tensor:
    """NaN of a negative base, whatever the exponent."""
    return torch.where(base < 0, float("nan"), base.pow(exponent))


_OPS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "exact_mul": torch.mul,
    "exact_fma": lambda a, b, c: a * b + c,
    "at_least": torch.maximum,
    "within": lambda y, limit: torch.where(y.isnan(), limit, y).clamp(-limit, limit),
    "div": torch.div,
    "neg": torch.neg,
    "abs": torch.abs,
    "sqrt": _sqrt,
    "floor": torch.floor,
    "exp2": torch.exp2,
    "log2": torch.log2,
    "power": _power,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "not": torch.logical_not,
    "shift_left": torch.bitwise_left_shift,
    "shift_right": torch.bitwise_right_shift,
    "where": torch.where,
}
#: What names the type of its result.
_CONVERSIONS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {"to": Tensor.to, "bits": Tensor.view}


def evaluate(formula: Formula, *inputs: Tensor) -> Any:
    """The output of ``formula`` on these tensors, or a tuple of them; shapes broadcast."""
    known = {id(value): tensor for value, tensor in zip(formula.inputs, inputs, strict=True)}
    device = inputs[0].device

    def tensor_of(argument: Any) -> Any:
        if not isinstance(argument, Value):
            return argument
        if argument.op == "constant":
            # A tensor, not a number: beside a number torch divides by way of a reciprocal on CUDA.
            return torch.full((), argument.args[0], dtype=argument.dtype, device=device)
        return known[id(argument)]

    for step in formula.steps:
        arguments = [tensor_of(argument) for argument in step.args]
        if step.op in _CONVERSIONS:
            known[id(step)] = _CONVERSIONS[step.op](arguments[0], step.dtype)
        else:
            known[id(step)] = _OPS[step.op](*arguments)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in inputs))
    outputs = tuple(tensor_of(output).expand(shape) for output in formula.outputs)  # a constant has no shape
    return outputs if len(outputs) > 1 else outputs[0]


@cache
def torch_function(formula: Formula) -> Callable[..., Any]:
    """``formula`` as a function of tensors without loops or look-ups, which ``torch.compile`` traces quickly. Its
    results have the shapes that they follow from.
    """
    constants: dict[str, str] = {}

    def literal(value: Value) -> str:
        made = f"torch.full((), {value.args[0]!r}, dtype={value.dtype}, device={formula.inputs[0].args[0]}.device)"
        return constants.setdefault(made, f"c{len(constants)}")

    def line(step: Value, arguments: Sequence[str]) -> str:
        dtype = (str(step.dtype),) if step.op in _CONVERSIONS else ()
        return f"op_{step.op}({', '.join((*arguments, *dtype))})"

    steps = [f"{name} = {text}" for _, name, text in formula.lines(line, literal)]
    results = f"return {', '.join(formula.results(literal))}"
    body = [*(f"{name} = {made}" for made, name in constants.items()), *steps, results]
    inputs = ", ".join(value.args[0] for value in formula.inputs)
    source = "\n    ".join([f"def {formula.name}({inputs}):", *body])
    named = {f"op_{name}": function for name, function in (_OPS | _CONVERSIONS).items()}
    scope: dict[str, Any] = {"torch": torch, "inf": float("inf"), "nan": float("nan"), **named}
    exec(compile(source, f"<formula {formula.name}>", "exec"), scope)
    return scope[formula.name]
