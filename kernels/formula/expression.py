"""Scalar expressions: what a formula is made of, before it is code for a device.

A formula is a Python function of :class:`Value` objects. Calling it records which operations it applies; the record
(:class:`Formula`) is what targets print. The operations are a subset of those of Inductor's ``ops`` handler, and a
value is used like a tensor of one element per place: operators, the methods below, and torch's functions of the same
meaning (``torch.where(y < 0, -1.0, y)``). So one function runs on tensors and is printed as C++ and Triton.

Floating-point operations round once and are not contracted, on every target; ``log2``, ``exp2`` and ``power`` (NaN of a
negative base) are as accurate as the target has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import torch

from qcompile import compat
from qcompile.ir.formulas import float32

__all__ = ["OPERATORS", "Formula", "Number", "Value", "constant", "where"]

#: What stands beside a value in an operation.
Number = float | int | bool

FLOAT, DOUBLE, INT, BOOL = torch.float32, torch.float64, torch.int32, torch.bool

#: Operations that C++ and Python spell alike.
OPERATORS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "exact_mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
}

_INTERNED: WeakValueDictionary[tuple, Value] = WeakValueDictionary()


class Value:
    """A scalar of ``dtype`` (float32, float64, int32 or bool), computed by ``op`` from ``args``.

    Equal values are one object: what a formula computes twice is printed once.
    """

    __slots__ = ("__weakref__", "args", "dtype", "op")

    op: str
    args: tuple[Any, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, op: str, dtype: torch.dtype, *args: Any) -> Value:
        """The value ``op(*args)``; arguments are values, or what a constant or an input says of itself."""
        key = (op, dtype, *(("value", id(a)) if isinstance(a, Value) else (type(a), repr(a)) for a in args))
        value = _INTERNED.get(key)
        if value is None:
            value = object.__new__(cls)
            value.op, value.dtype, value.args = op, dtype, args
            _INTERNED[key] = value
        return value

    @classmethod
    def input(cls, name: str, dtype: torch.dtype = FLOAT) -> Value:
        """An argument of a formula."""
        return cls.of("input", dtype, name)

    # --- arithmetic ---------------------------------------------------------------------------------------------

    def __add__(self, other: Value | Number) -> Value:
        return self._with("add", other)

    def __radd__(self, other: Number) -> Value:
        return constant(other, self.dtype) + self

    def __sub__(self, other: Value | Number) -> Value:
        return self._with("sub", other)

    def __rsub__(self, other: Number) -> Value:
        return constant(other, self.dtype) - self

    def __mul__(self, other: Value | Number) -> Value:
        return self._with("mul", other)

    __rmul__ = __mul__

    def plus_exact_product(self, a: Value, b: Value | Number) -> Value:
        """self + a · b of a product that is known not to round: one instruction where there is one for it."""
        return Value.of("exact_fma", FLOAT, a, constant(b), self)

    def exact_product(self, other: Value | Number) -> Value:
        """A product that is known not to round, so that a target may contract it with a sum."""
        return self._with("exact_mul", other)

    def __truediv__(self, other: Value | Number) -> Value:
        return self._with("div", other)

    def __rtruediv__(self, other: Number) -> Value:
        return constant(other, self.dtype) / self

    def __pow__(self, exponent: Number) -> Value:
        if isinstance(exponent, Value) or self.dtype != FLOAT:
            msg = "a formula raises float32 values to constant powers only"
            raise TypeError(msg)
        exponent = constant(exponent).args[0]  # float32, as torch takes it
        return constant(1.0) if exponent == 0 else Value.of("power", FLOAT, self, exponent)

    def __neg__(self) -> Value:
        return constant(0, self.dtype) - self if self.dtype == INT else Value.of("neg", self.dtype, self)

    def __abs__(self) -> Value:
        return Value.of("abs", self.dtype, self)

    def abs(self) -> Value:
        return abs(self)

    def pow(self, exponent: Number) -> Value:
        return self**exponent

    def sqrt(self) -> Value:
        return Value.of("sqrt", self.dtype, self)

    def floor(self) -> Value:
        return Value.of("floor", self.dtype, self)

    def exp2(self) -> Value:
        return Value.of("exp2", self.dtype, self)

    def log2(self) -> Value:
        return Value.of("log2", self.dtype, self)

    def square(self) -> Value:
        return self * self

    def sign(self) -> Value:
        """−1, 0 or 1; NaN of NaN."""
        return where(self > 0, 1.0, where(self < 0, -1.0, self))

    def at_least(self, least: Number) -> Value:
        """The greater of the two, of a value that is not NaN."""
        return self._with("at_least", least)

    def within(self, limit: Number) -> Value:
        """Between −``limit`` and ``limit``; NaN as ``limit``."""
        return self._with("within", limit)

    def clamp(self, min: Value | Number | None = None, max: Value | Number | None = None) -> Value:
        """Between the bounds that are given; NaN stays."""
        value = self if max is None else where(self > max, max, self)
        return value if min is None else where(value < min, min, value)

    # --- comparisons and bits -----------------------------------------------------------------------------------

    def __lt__(self, other: Value | Number) -> Value:
        return self._compared("lt", other)

    def __le__(self, other: Value | Number) -> Value:
        return self._compared("le", other)

    def __gt__(self, other: Value | Number) -> Value:
        return self._compared("gt", other)

    def __ge__(self, other: Value | Number) -> Value:
        return self._compared("ge", other)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return self._compared("eq", other)  # type: ignore[arg-type]

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return self._compared("ne", other)  # type: ignore[arg-type]

    __hash__ = object.__hash__

    def __and__(self, other: Value | Number) -> Value:
        return self._with("and", other)

    def __or__(self, other: Value | Number) -> Value:
        return self._with("or", other)

    def __xor__(self, other: Value | Number) -> Value:
        return self._with("xor", other)

    def __invert__(self) -> Value:
        if self.dtype != BOOL:
            msg = f"~ inverts conditions, not {_name(self.dtype)} values"
            raise TypeError(msg)
        return Value.of("not", BOOL, self)

    def __lshift__(self, places: Number) -> Value:
        return self._with("shift_left", places)

    def __rshift__(self, places: Number) -> Value:
        """Arithmetic: the sign is shifted in."""
        return self._with("shift_right", places)

    def isnan(self) -> Value:
        return self != self

    def isfinite(self) -> Value:
        return abs(self) < float("inf")

    # --- conversions --------------------------------------------------------------------------------------------

    def to(self, dtype: torch.dtype) -> Value:
        """Converted; a float becomes an integer toward zero."""
        return self if dtype == self.dtype else Value.of("to", dtype, self)

    def float(self) -> Value:
        return self.to(FLOAT)

    def double(self) -> Value:
        return self.to(DOUBLE)

    def int(self) -> Value:
        return self.to(INT)

    def view(self, dtype: torch.dtype) -> Value:
        """The same 32 bits as int32 or float32."""
        return self if dtype == self.dtype else Value.of("bits", dtype, self)

    # --- how it is made -----------------------------------------------------------------------------------------

    def _with(self, op: str, other: Value | Number) -> Value:
        other = constant(other, self.dtype)
        if self.dtype == DOUBLE or other.dtype == DOUBLE:
            return Value.of(op, DOUBLE, self.double(), other.double())
        if self.dtype != other.dtype:
            msg = f"{op} of {_name(self.dtype)} and {_name(other.dtype)}: convert one of them"
            raise TypeError(msg)
        return Value.of(op, self.dtype, self, other)

    def _compared(self, op: str, other: Value | Number) -> Value:
        other = constant(other, self.dtype)
        if self.dtype != other.dtype:
            msg = f"{op} of {_name(self.dtype)} and {_name(other.dtype)}: convert one of them"
            raise TypeError(msg)
        return Value.of(op, BOOL, self, other)

    def __bool__(self) -> bool:
        msg = "a formula has no branches on values: write torch.where(condition, a, b)"
        raise TypeError(msg)

    def __repr__(self) -> str:
        return f"<{_name(self.dtype)} {self.op}>"

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in _TORCH_FUNCTIONS:
            known = ", ".join(sorted({f.__name__ for f in _TORCH_FUNCTIONS}))
            msg = f"torch.{getattr(function, '__name__', function)} has no scalar formula; there are: {known}"
            raise TypeError(msg)
        return _TORCH_FUNCTIONS[function](*args, **(kwargs or {}))


def constant(value: Value | Number, dtype: torch.dtype = FLOAT) -> Value:
    """``value`` as a constant of ``dtype``; a float32 one is rounded to it here, so that all targets see one number."""
    if isinstance(value, Value):
        return value
    if dtype == FLOAT:
        number: Number = float32(value)
    elif dtype == DOUBLE:
        number = float(value)
    elif dtype == INT:
        if value != int(value):
            msg = f"{value!r} beside an int32 value: convert that first"
            raise TypeError(msg)
        number = int(value)
    else:
        number = bool(value)
    return Value.of("constant", dtype, number)


def where(condition: Value, a: Value | Number, b: Value | Number) -> Value:
    """``a`` if ``condition`` else ``b``."""
    typed = [x.dtype for x in (a, b) if isinstance(x, Value)]
    numbers = all(isinstance(x, int) for x in (a, b))
    dtype = typed[0] if typed else INT if numbers else FLOAT
    a, b = constant(a, dtype), constant(b, dtype)
    return a if a is b else Value.of("where", dtype, condition, a, b)


_TORCH_FUNCTIONS: dict[Callable[..., Any], Callable[..., Value]] = {
    torch.where: where,
    torch.abs: abs,
    torch.sign: Value.sign,
    torch.sqrt: Value.sqrt,
    torch.floor: Value.floor,
    torch.exp2: Value.exp2,
    torch.log2: Value.log2,
    torch.square: Value.square,
    torch.pow: Value.pow,
    torch.clamp: Value.clamp,
    torch.minimum: lambda a, b: where((a < b) | a.isnan(), a, b),
    torch.maximum: lambda a, b: where((a > b) | a.isnan(), a, b),
    torch.isnan: Value.isnan,
    torch.isfinite: Value.isfinite,
    torch.logical_and: lambda a, b: a & b,
    torch.logical_or: lambda a, b: a | b,
    torch.logical_not: lambda a: ~a,
}


@dataclass(frozen=True, eq=False)
class Formula:
    """A recorded function: its name, its inputs by name, and the values it returns.

    :attr:`text` says what is computed, one operation per line; two formulas with the same text are the same. It is what
    caches tell formulas apart by.
    """

    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @staticmethod
    def record(name: str, function: Callable[..., Any], **inputs: torch.dtype) -> Formula:
        """``function`` applied to one value per keyword. Raises ``TypeError`` if it does not return values."""
        values = tuple(Value.input(key, dtype) for key, dtype in inputs.items())
        with compat.enabled_torch_function():  # a tensor subclass that is at work may have turned it off
            result = function(*values)
        outputs = result if isinstance(result, tuple) else (result,)
        for output in outputs:
            if not isinstance(output, Value):
                msg = f"formula {name} returned {type(output).__name__}, not a value computed from {', '.join(inputs)}"
                raise TypeError(msg)
        return Formula(name, values, outputs)

    @cached_property
    def steps(self) -> tuple[Value, ...]:
        """Every operation that an output needs, after its arguments."""
        found: dict[int, Value] = {}

        def visit(value: Value) -> None:
            if id(value) in found or value.op in ("input", "constant"):
                return
            for argument in value.args:
                if isinstance(argument, Value):
                    visit(argument)
            found[id(value)] = value

        for output in self.outputs:
            visit(output)
        return tuple(found.values())

    def lines(
        self, target: Callable[[Value, Sequence[str]], str], literal: Callable[[Value], str]
    ) -> Iterator[tuple[Value, str, str]]:
        """Every step, its name and ``target(step, texts of its arguments)``, which may refer to earlier ones by name:
        ``v0``, ``v1`` … :meth:`results` are the texts of the outputs.
        """
        for step in self.steps:
            yield step, self._names[id(step)], target(step, [self._text(a, literal) for a in step.args])

    def results(self, literal: Callable[[Value], str]) -> list[str]:
        """The texts of the outputs, beside :meth:`lines`."""
        return [self._text(output, literal) for output in self.outputs]

    def _text(self, argument: Any, literal: Callable[[Value], str]) -> str:
        if not isinstance(argument, Value):
            return repr(argument)
        if argument.op == "constant":
            return literal(argument)
        if argument.op == "input":
            return argument.args[0]
        return self._names[id(argument)]

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(step): f"v{i}" for i, step in enumerate(self.steps)}

    @cached_property
    def text(self) -> str:
        """The operations, one per line; independent of the target and of :attr:`name`."""

        def literal(value: Value) -> str:
            number = value.args[0]
            return f"{_name(value.dtype)} {number.hex() if isinstance(number, float) else number}"

        lines = self.lines(lambda step, args: f"{_name(step.dtype)} {step.op}({', '.join(args)})", literal)
        inputs = ", ".join(f"{_name(v.dtype)} {v.args[0]}" for v in self.inputs)
        return "\n".join([f"({inputs})", *(line for _, _, line in lines), f"return {', '.join(self.results(literal))}"])

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that tell formulas apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
