"""Formulas as Inductor loop bodies, where they fuse with what is around them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch._inductor.ops_handler import OpsHandler
from torch._inductor.virtualized import ops

from .expression import Formula, Value

__all__ = ["clamped", "emit", "rounded", "uncontracted_product"]

#: A value inside a loop body.
Body = Any


def emit(formula: Formula, *inputs: Body) -> Any:
    """The output of ``formula`` on values of a loop body, or a tuple of them."""
    known = {id(value): body for value, body in zip(formula.inputs, inputs, strict=True)}
    summed = _summands(formula)

    def body_of(argument: Any) -> Body:
        if not isinstance(argument, Value):
            return argument
        if argument.op == "constant":
            return ops.constant(argument.args[0], argument.dtype)
        return known[id(argument)]

    for step in formula.steps:
        arguments = [body_of(argument) for argument in step.args]
        if step.op in _CONVERSIONS:
            known[id(step)] = _CONVERSIONS[step.op](arguments[0], step.dtype, step.args[0].dtype)
        elif step.op == "mul" and step.dtype == torch.float32 and id(step) in summed:
            known[id(step)] = uncontracted_product(*arguments)
        else:
            known[id(step)] = _OPS[step.op](*arguments)
    outputs = tuple(body_of(output) for output in formula.outputs)
    return outputs if len(outputs) > 1 else outputs[0]


def _summands(formula: Formula) -> set[int]:
    """What is added to something, or subtracted."""
    return {id(a) for step in formula.steps if step.op in ("add", "sub") for a in step.args if isinstance(a, Value)}


def has_ptx() -> bool:
    """Whether what is generated is compiled for CUDA."""
    if torch.version.cuda is None:
        return False
    from qcompile.kernels.triton import INTERPRETED  # torch for CPUs comes without Triton

    return not INTERPRETED


def exact_div(a: Body, b: Body) -> Body:
    """Correctly rounded float32 ``a / b``.

    Triton's ``/`` on float32 is an approximation. ``ops.div_rn`` is IEEE division; Inductor versions without
    it divide in float64, where Triton's ``/`` is IEEE division, and round again: that is the same number,
    because 53 bits are at least 2·24 + 2 (Figueroa, "When is double rounding innocuous?", SIGNUM 1995).
    """
    if hasattr(OpsHandler, "div_rn"):
        return ops.div_rn(a, b)
    quotient = ops.truediv(ops.to_dtype(a, torch.float64), ops.to_dtype(b, torch.float64))
    return ops.to_dtype(quotient, torch.float32)


def uncontracted_product(a: Body, b: Body) -> Body:
    """A float32 product that the compiler does not contract with a sum to a fused multiply-add.

    Inductor leaves contraction on, and Triton's language has no product without it; an instruction of PTX is one.
    """
    if not has_ptx():
        return ops.mul(a, b)
    return _instruction("mul.rn.f32 $0, $1, $2;", a, b)


def clamped(value: Body, lowest: Body, highest: Body) -> Body:
    """``torch.clamp`` as :func:`qcompile.kernels.outliers.triton.clamped`, at an instruction per bound."""
    if not has_ptx():
        return ops.where(ops.lt(value, lowest), lowest, ops.where(ops.gt(value, highest), highest, value))
    text = "{.reg .f32 raised; max.NaN.f32 raised, $1, $2; min.NaN.f32 $0, raised, $3;}"
    return _instruction(text, value, lowest, highest)


def rounded(value: Body, dtype: torch.dtype) -> Body:
    """A computed element of a tensor of ``dtype``, in float32.

    Inductor keeps float32 between the operations that it puts into one kernel, 16-bit casts among them. Codes would
    then depend on what was fused: a weight that autocast casts would not be the same in the backward as in the forward.
    CUDA rounds pairs four times as fast as single numbers, which Triton's conversion there and back would be.
    """
    if dtype == torch.bfloat16 and has_ptx():
        text = "{.reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; and.b32 $1, pair, 0xffff0000;}"
        return ops.inline_asm_elementwise(value, asm=text, constraints="=f,=f,f,f", dtype=torch.float32, pack=2)
    if dtype in (torch.bfloat16, torch.float16):
        value = ops.to_dtype(value, dtype, use_compute_types=False)
    return ops.to_dtype(value, torch.float32)


def _within(y: Body, limit: Body) -> Body:
    """Of a number and NaN, an instruction takes the number."""
    if not has_ptx():
        least = ops.neg(limit)
        return ops.where(ops.lt(y, least), least, ops.where(ops.le(y, limit), y, limit))
    text = "{.reg .f32 most, least; min.f32 most, $1, $2; neg.f32 least, $2; max.f32 $0, most, least;}"
    return _instruction(text, y, limit)


def _power(base: Body, exponent: float) -> Body:
    """By way of the hardware's logarithm and exponential; the general function takes ten times as long.

    Triton's ``log2`` on CUDA is a polynomial of 14 multiply-adds, which made a slope wait for arithmetic; one
    instruction is within 2⁻²² of it.
    """
    if not has_ptx():
        return ops.exp2(ops.mul(ops.log2(base), ops.constant(exponent, torch.float32)))
    logarithm = _instruction("lg2.approx.f32 $0, $1;", base)
    return _instruction("ex2.approx.f32 $0, $1;", ops.mul(logarithm, ops.constant(exponent, torch.float32)))


def _instruction(text: str, *arguments: Body) -> Body:
    """PTX from float32 registers to one."""
    constraints = ",".join(["=f", *("f" for _ in arguments)])
    return ops.inline_asm_elementwise(*arguments, asm=text, constraints=constraints, dtype=torch.float32)


def _same_named(name: str, *arguments: Body) -> Body:
    return getattr(ops, name)(*arguments)


_OPS: dict[str, Callable[..., Body]] = {
    **{name: partial(_same_named, name) for name in ("add", "sub", "mul", "neg", "abs", "sqrt", "floor")},
    **{name: partial(_same_named, name) for name in ("exp2", "log2", "lt", "le", "gt", "ge", "eq", "ne", "where")},
    "exact_mul": partial(_same_named, "mul"),
    "exact_fma": lambda a, b, c: ops.add(ops.mul(a, b), c),
    "at_least": lambda a, b: ops.where(ops.lt(a, b), b, a),  # without the instructions that pass on NaN
    "within": _within,
    "div": exact_div,
    "power": _power,
    "and": partial(_same_named, "bitwise_and"),
    "or": partial(_same_named, "bitwise_or"),
    "xor": partial(_same_named, "bitwise_xor"),
    "not": partial(_same_named, "logical_not"),
    "shift_left": partial(_same_named, "bitwise_left_shift"),
    "shift_right": partial(_same_named, "bitwise_right_shift"),
}
_CONVERSIONS: dict[str, Callable[..., Body]] = {
    "to": lambda value, dtype, source: ops.to_dtype(value, dtype),
    "bits": lambda value, dtype, source: ops.to_dtype_bitcast(value, dtype, source),
}
