"""Run a program compiled and by the reference, and compare: every result, gradient, changed input, and decision.

Tolerances. *Exact* programs hold quarters of integers, their recipes have power-of-two scales, and what is computed
between products is exact: a sum of K products of two 4-bit levels with one scale per row takes at most 2·4 + log2 K
bits, so every forward value is one float32 number, whatever the order of accumulation, and must agree **bitwise** (but
where a 16-bit product adds a bias, which rounds once or twice as the kernel pleases).
Elsewhere a float32 result may differ by 2⁻¹⁶ of the tensor's largest element: 256 roundings of 2⁻²⁴, four products in a
chain with sums of up to 64 terms each. For 16-bit programs sixteen roundings to half a unit are allowed: 2⁻⁵
(bfloat16), 2⁻⁸ (float16).

Where an operand comes out of an inexact computation, the two orders of accumulation may put it on either side of a
decision threshold, and a code flips. That needs a value within 2⁻²⁰ or so of a threshold, and does not happen again
with other values: a mismatch of an inexact program counts if it is there in three draws of the leaves out of three.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.recipe import Recipe
from qcompile.passes.pass_base import Observations

from .graphs import Program, ProgramModule
from .reference import Numbers, QuantizedProducts

__all__ = ["EXACT", "ROUNDED", "MismatchError", "Outcome", "Setting", "attempt", "check"]

DRAWS = 3


@dataclass(frozen=True)
class Setting:
    """A recipe, and switches that may not change what is computed."""

    activation: Numbers
    weight: Numbers
    attention: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def recipe(self) -> Recipe:
        changes = {"activation": str(self.activation), "weight": str(self.weight), "attention": self.attention}
        return Recipe(name="fuzz").override({"defaults": False, **changes, **dict(self.options), "debug": True})


#: Operands whose decoded values are sums of a few powers of two.
EXACT = (
    (Numbers(scale="absmax_pow2"), Numbers(scale="absmax_pow2", estimator="clip")),
    (Numbers(scale="e8m0", group=16), Numbers(grid="e1m2", scale="e8m0", estimator="trust")),
    (Numbers(grid="midrise4", scale="absmax_pow2", group="tensor"), Numbers(scale="e8m0", estimator="dge")),
)
#: Operands as published, and combinations of the rest.
ROUNDED = (
    (Numbers(alpha=0.9), Numbers(estimator="dge")),
    (Numbers(alpha=0.8, per="tensor"), Numbers(group="tensor", estimator="dge")),
    (Numbers(grid="int4", group=8, estimator="clip"), Numbers(grid="midrise4", estimator="trust")),
    (Numbers(), Numbers(grid="e1m2", group=16)),
)


class MismatchError(AssertionError):
    """The compiled program is wrong; the message holds the program."""


@dataclass
class Outcome:
    """What one program showed."""

    products: int = 0
    quantized: int = 0
    refused: str = ""
    redrawn: int = 0
    reasons: list[str] = field(default_factory=list)


def check(program: Program, setting: Setting) -> Outcome:
    """Raises :class:`MismatchError`; a program that eager torch cannot run gives an outcome without products."""
    outcome = Outcome()
    if not _eager_runs(program):
        return outcome
    for draw in range(DRAWS):
        problem = attempt(program, setting, draw, outcome)
        if not problem:
            outcome.redrawn = draw
            return outcome
        if program.bitwise:
            break
    msg = f"{problem}\n{setting}\n{program!r}\n{program.source()}"
    raise MismatchError(msg)


def attempt(program: Program, setting: Setting, draw: int, outcome: Outcome) -> str:
    """What is wrong with one draw of the leaves; "" if nothing is."""
    expected = _run_reference(program, setting, draw)
    try:
        actual = _run_compiled(program, setting, draw)
    except BackendCompilerFailed as error:
        lines = str(error).splitlines()
        if len(lines) > 1 and re.match(r"ValueError: (layer|option) ", lines[1]):
            outcome.refused = lines[1]
            return ""
        return f"it does not compile: {error!r}"
    decisions = actual.decisions
    outcome.products, outcome.quantized = len(decisions), sum(d.quantized for d in decisions)
    outcome.reasons = [d.reason for d in decisions if not d.quantized]
    if len(decisions) != program.products:
        return f"{program.products} products, but decisions about {[d.site.op for d in decisions]}"
    if not all(outcome.reasons):
        return "a product is left alone without a reason"
    if [d.quantized for d in decisions] != expected.quantized:
        told = [(d.site.op, d.quantized, d.reason) for d in decisions]
        return f"decisions {told}, expected {expected.quantized}"
    return _difference(program, actual, expected)


# --- running --------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    results: list[Tensor]
    gradients: dict[str, Tensor | None]
    leaves: dict[str, Tensor]
    quantized: list[bool] = field(default_factory=list)
    decisions: list[Any] = field(default_factory=list)


def _eager_runs(program: Program) -> bool:
    """Whether eager torch takes the program, and its backward: an in-place op may spoil what autograd has saved."""
    leaves = program.make_leaves()
    try:
        with _autocast(program):
            results = program.function()(*leaves.values())
        _gradients(program, results, leaves)
    except (RuntimeError, IndexError):
        return False
    return True


def _run_reference(program: Program, setting: Setting, draw: int) -> _Run:
    leaves = program.make_leaves(draw)
    with _autocast(program):
        results = zip(program.results, program.function()(*program.make_leaves(draw).values()), strict=True)
    training = any(r.requires_grad for name, r in results if not program.is_attribute_of_a_leaf(name))
    parameters, inputs = (
        [leaves[leaf.name] for leaf in program.leaves if program.is_given_as(leaf) == role]
        for role in ("parameter", "input")
    )
    mode = QuantizedProducts(setting.activation, setting.weight, parameters, inputs, setting.attention, training)
    with _autocast(program), mode:
        results = program.function()(*leaves.values())
    return _Run(list(results), _gradients(program, results, leaves), leaves, quantized=mode.quantized)


def _run_compiled(program: Program, setting: Setting, draw: int) -> _Run:
    torch._dynamo.reset()
    leaves, observed = program.make_leaves(draw), Observations()

    def backend(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return compile_with(setting.recipe(), gm, inputs, observe=observed, inner_compile=compat.eager_inner_compile)

    if program.as_module:
        function: Any = ProgramModule(program, leaves)
        arguments = [leaves[leaf.name] for leaf in program.leaves if leaf.role == "input"]
    else:
        function, arguments = program.function(), list(leaves.values())
    with _autocast(program):
        results = torch.compile(function, backend=backend, fullgraph=True, dynamic=program.dynamic)(*arguments)
    decisions = observed.plan.decisions if observed.plan else []
    return _Run(list(results), _gradients(program, results, leaves), leaves, decisions=decisions)


def _autocast(program: Program) -> Any:
    return torch.autocast("cpu", program.autocast or torch.bfloat16, enabled=program.autocast is not None)


def _gradients(program: Program, results: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Of Σ result ⊙ cotangent, with halves of integers as cotangents."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = [r for r in results if r.requires_grad]
    if not wanted or not found:
        return {}
    generator = torch.Generator().manual_seed(program.seed)
    cotangents = [(torch.randint(-2, 3, r.shape, generator=generator) / 2).to(r.dtype) for r in found]
    gradients = torch.autograd.grad(found, list(wanted.values()), cotangents, allow_unused=True)
    return dict(zip(wanted, gradients, strict=True))


# --- comparing ------------------------------------------------------------------------------------------------------

_ROUNDINGS = {torch.float32: 2.0**-16, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


def _difference(program: Program, actual: _Run, expected: _Run) -> str:
    tolerance = max(_ROUNDINGS[dtype] for dtype in program.dtypes)
    forward = 0.0 if program.bitwise else tolerance
    pairs: list[tuple[str, Tensor | None, Tensor | None, float]] = [
        (name, a, b, forward) for name, a, b in zip(program.results, actual.results, expected.results, strict=True)
    ]
    pairs += [(f"leaf {name} after the call", actual.leaves[name], b, forward) for name, b in expected.leaves.items()]
    if actual.gradients.keys() != expected.gradients.keys():
        return f"gradients of {list(actual.gradients)}, expected of {list(expected.gradients)}"
    pairs += [(f"gradient of {name}", actual.gradients[name], b, tolerance) for name, b in expected.gradients.items()]
    return next(filter(None, (_compare(*pair) for pair in pairs)), "")


def _compare(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float) -> str:
    """Largest difference over the largest finite magnitude; what is not finite must be so in the same places."""
    if actual is None or expected is None:
        some = actual if expected is None else expected
        return "" if some is None or not some.any() else f"{name}: one side has no gradient"
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{name}: {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
    a, b = actual.detach().double(), expected.detach().double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return f"{name}: not finite in other places"
    if not finite.any():
        return ""
    difference, largest = (a - b)[finite].abs().max(), b[finite].abs().max()
    if difference <= tolerance * largest:
        return ""
    return f"{name}: off by {float(difference):.3g}, {float(difference / largest):.2g} of its largest element"
