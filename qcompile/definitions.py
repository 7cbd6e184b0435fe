"""Formats, estimators and scale rules that users define: validated, named for texts, and ready for every device.

Making one defines its name for the texts of recipes and options::

    qcompile.Format("curve", 4, (0.0, 0.5, 1.0, 1.75, 2.5, 3.5, 5.0, 7.0))
    qcompile.Estimator("soft", slope=lambda y, fmt: 1 / (1 + y.square()))
    recipe = qcompile.Recipe("mine", weight="curve row; soft")

Formulas are ordinary functions of values that behave like float32 tensors: operators, methods such as ``abs`` and
``clamp``, and torch's elementwise functions (``torch.where`` instead of ``if``). They are recorded once, here. From the
record kernels are printed in C++ and Triton, so a formula that has no such record is refused at once.

The object's ``name`` is the full one, ``curve@1a2b3c4d``, with a digest of the data and of the recorded formulas. In
texts the short name stands for the latest definition; what was made before keeps the one it was made with. An f-string
of the object (``f"{grid} row"``) names exactly that object. Code on disk is never reused for another definition, nor is
that of another :func:`qcompile.backend`. What Dynamo keeps for two equal calls of ``torch.compile``, with the name of a
backend and equal ``options``, it takes for the same call: there ``torch.compiler.reset()`` comes between.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from .ir import estimators, formats, quantizer
from .ir.definitions import Registry, full_name, short_name
from .ir.estimators import ESTIMATORS
from .ir.formats import FORMATS
from .ir.quantizer import ROUNDINGS, SCALE_RULES, SCALE_STORES
from .kernels.formula.expression import Formula, Value

__all__ = ["Estimator", "Format", "ScaleRule"]

_FLOAT = torch.float32


@dataclass(frozen=True)
class Format(formats.Format):
    """A grid of your own, as text calls it: ``Format("curve", 4, (0, 0.5, 1, …))``; see :mod:`qcompile.definitions`.

    Arguments are the attributes of :class:`qcompile.ir.formats.Format`. Raises ``ValueError`` for a name that texts
    could not tell from another word, and for levels that ``bits`` bits cannot number.
    """

    def __post_init__(self) -> None:
        name = _checked_name(FORMATS, self.name, reserved=(*SCALE_RULES.known, *ROUNDINGS))
        object.__setattr__(self, "name", name)
        super().__post_init__()
        _define(FORMATS, self, name)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Estimator(estimators.Estimator):
    """An estimator of your own, either of a mask or of a slope; see :mod:`qcompile.definitions`.

    ``Estimator("inside", mask=lambda y, level, fmt: y.abs() <= fmt.max)``: gradients pass where the mask is true. y is
    the scaled input and level what it was rounded to, float32 in grid units; the result is bool.
    ``Estimator("soft", slope=lambda y, fmt: 1 / (1 + y.square()))``: gradients are multiplied by the slope, float32.
    ``parameters={"t": 1.0}`` adds keyword arguments that texts may set: ``"e2m1 row; mine(t=0.5)"``.

    Arguments are the attributes of :class:`qcompile.ir.estimators.Estimator`. Raises ``ValueError`` for a name that is
    taken, for none or both of mask and slope, for a parameter that is no positive number, and for a formula that
    kernels cannot be printed from, naming what it cannot use.
    """

    def __post_init__(self) -> None:
        name = _checked_name(ESTIMATORS, self.name, reserved=("occ", "hadamard", "sparse"))
        where = f"estimator {name!r}"
        if (self.mask is None) == (self.slope is None):
            msg = f"{where}: give mask=… or slope=…, one of the two"
            raise ValueError(msg)
        for key, value in self.parameters.items():
            if not (value is None or (isinstance(value, (int, float)) and 0 < value < float("inf"))):
                msg = f"{where}: parameter {key}={value!r} is not a positive number or None"
                raise ValueError(msg)
        defaults = dict(self.parameters)
        if self.mask is not None:
            mask = partial(self.mask, **defaults)
            recorded = _recorded(f"{where}: mask", mask, torch.bool, y=_FLOAT, level=_FLOAT)
        else:
            assert self.slope is not None
            recorded = _recorded(f"{where}: slope", partial(self.slope, **defaults), _FLOAT, y=_FLOAT)
        bounds = [
            _tried(partial(bound, fmt, **defaults))
            for bound in (self.bound, self.bound_at_zero)
            if bound is not None
            for fmt in FORMATS.values()
        ]
        _define(ESTIMATORS, self, name, recorded, bounds)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ScaleRule(quantizer.ScaleRule):
    """A scale rule of your own; see :mod:`qcompile.definitions`.

    ``ScaleRule("tight", scale=lambda amax, fmt: amax / fmt.max * 0.9)``: the scale of the elements that share one, from
    their absolute maximum, float32 and positive (``statistic="rms"``: their root mean square, float64); the result is
    float32. Elements are multiplied by 1 / scale, or by ``reciprocal=`` of the same arguments.

    Arguments are the attributes of :class:`qcompile.ir.quantizer.ScaleRule`. Raises ``ValueError`` for a name that
    texts could not tell from another word, an unknown store or statistic, numbers that cannot be meant, and for a
    formula that kernels cannot be printed from, naming what it cannot use.
    """

    def __post_init__(self) -> None:
        name = _checked_name(SCALE_RULES, self.name, reserved=(*FORMATS.known, *ROUNDINGS))
        where = f"scale rule {name!r}"
        for key, value, known in (
            ("store", self.store, tuple(SCALE_STORES)),
            ("statistic", self.statistic, ("amax", "rms")),
            ("two_level", self.two_level, (False, True)),
            ("covers", self.covers, (False, True)),
        ):
            if value not in known:
                msg = f"{where}: {key}={value!r} is not one of {', '.join(map(str, known))}"
                raise ValueError(msg)
        if fault := self._fault_of_numbers():
            msg = f"{where}: {fault}"
            raise ValueError(msg)
        object.__setattr__(self, "candidates", tuple(map(float, self.candidates)))
        statistic = {"statistic": torch.float64 if self.statistic == "rms" else _FLOAT}
        recorded = [
            _recorded(f"{where}: {key}", function, _FLOAT, **statistic)
            for key, function in (("scale", self.scale), ("reciprocal", self.reciprocal))
            if function is not None
        ]
        _define(SCALE_RULES, self, name, recorded)

    def _fault_of_numbers(self) -> str:
        """What is wrong with a number, and what to give instead; empty if nothing is."""
        factors, most = self.candidates, self.largest_stored
        if not isinstance(factors, (tuple, list)) or not all(_is_number(f) and f > 0 for f in factors):
            return f"candidates={factors!r} are not positive numbers, for example (1.0, 1.5)"
        if not factors or factors[0] != 1.0:
            return f"candidates={factors!r} do not begin with 1.0, the scale of the formula; put it first"
        if len({*factors}) < len(factors):
            return f"candidates={factors!r} name a factor twice; give each once"
        if len(factors) > 1 and self.statistic != "amax":
            return f"candidates={factors!r} are compared relative to the absolute maximum; use statistic='amax'"
        if self.floor is not None and not (_is_number(self.floor) and self.floor >= 0):
            return f"floor={self.floor!r} is not a finite number from 0 on, or None"
        if not (_is_number(self.largest) and 0 < self.largest <= most):
            return f"largest={self.largest!r} is not a positive number that {self.store} holds, at most {most:g}"
        return ""

    def __str__(self) -> str:
        return self.name


def _is_number(value: object) -> bool:
    """Whether ``value`` is a finite number of Python's."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def _checked_name(registry: Registry[Any], given: str, reserved: tuple[str, ...]) -> str:
    """The short name. Raises ``ValueError`` where texts could not use it."""
    kind = registry.kind
    if not isinstance(given, str) or not short_name(given).isidentifier() or keyword.iskeyword(short_name(given)):
        msg = f"{kind} {given!r}: a name is letters, digits and underscores, and does not begin with a digit"
        raise ValueError(msg)
    name = short_name(given)
    if name in registry:
        msg = f"{kind} {name!r} is defined by qcompile; take another name"
        raise ValueError(msg)
    if name in reserved or quantizer.is_granularity(name):
        msg = f"{kind} {name!r}: texts use this word for something else; take another name"
        raise ValueError(msg)
    return name


def _define(registry: Registry[Any], definition: Any, name: str, *recorded: object) -> None:
    """Enter a definition under its full name, whose digest is of all fields: data as it is, functions as recorded."""
    values = {f.name: getattr(definition, f.name) for f in fields(definition) if f.name != "name"}
    data = {key: value for key, value in values.items() if not callable(value)}
    object.__setattr__(definition, "name", full_name(name, registry.kind, data, *recorded))
    registry.define(definition)


def _recorded(where: str, formula: Callable[..., Any], dtype: torch.dtype, **inputs: torch.dtype) -> list[str]:
    """What ``formula(*inputs, format)`` does on every format of this package, as text. Raises ``ValueError`` if it
    works on none, or returns no value of ``dtype``.
    """
    built_in = [fmt for name, fmt in FORMATS.items() if short_name(name) == name]
    formulas = [_tried(partial(_record, where.split()[-1], formula, fmt, inputs)) for fmt in built_in]
    works = [recorded for recorded in formulas if isinstance(recorded, Formula)]
    if not works:
        error = formulas[0]
        missing = isinstance(error, AttributeError) and isinstance(error.obj, Value)
        why = f"values of a formula have no operation {error.name!r}" if missing else str(error)
        msg = f"{where} cannot be printed as a kernel: {why}"
        raise ValueError(msg)
    for recorded in works:
        output, *others = recorded.outputs
        if others or output.dtype != dtype:
            returned = "several values" if others else str(output.dtype).removeprefix("torch.")
            msg = f"{where} returns {returned}, not {str(dtype).removeprefix('torch.')}"
            raise ValueError(msg)
    return [recorded.text if isinstance(recorded, Formula) else repr(recorded) for recorded in formulas]


def _record(name: str, formula: Callable[..., Any], fmt: formats.Format, inputs: dict[str, torch.dtype]) -> Formula:
    return Formula.record(name, lambda *values: formula(*values, fmt), **inputs)


def _tried(compute: Callable[[], Any]) -> Any:
    """What ``compute`` returns or, since a formula need not suit every format, raises."""
    try:
        return compute()
    except Exception as error:
        return error
