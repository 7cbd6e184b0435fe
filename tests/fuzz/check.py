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

Torch's own mistakes. What plain torch, without this package, makes of the program is asked only where a gradient
differs: one that differs in the same way there (from eager torch, nothing quantized) is not counted as wrong, but
reported as torch's. Results, changed inputs and decisions have no such excuse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.recipe import Recipe
from qcompile.passes.pass_base import Observations

from .graphs import Program, ProgramModule
from .reference import Numbers, QuantizedProducts

__all__ = ["EXACT", "ROUNDED", "MismatchError", "Outcome", "Setting", "attempt", "check", "torchs_own"]

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
    """What one program showed. ``excused``: what is wrong with gradients that plain torch gets wrong, too."""

    products: int = 0
    quantized: int = 0
    refused: str = ""
    redrawn: int = 0
    reasons: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)


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
    differences = _differences(program, actual, expected)
    torchs = torchs_own(program, draw) if any(d.is_gradient for d in differences) else []
    known = {(d.name, d.kind) for d in torchs}
    outcome.excused = [str(d) for d in differences if (d.name, d.kind) in known]
    return next((str(d) for d in differences if (d.name, d.kind) not in known), "")


def torchs_own(program: Program, draw: int = 0, backend: Any = None) -> list[Difference]:
    """Gradients that a backend of torch's gets wrong; by default Inductor, its graphs executed eagerly."""

    def inductor(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        patches = {"fx_graph_cache": False}
        return compat.compile_fx(gm, inputs, inner_compile=compat.eager_inner_compile, config_patches=patches)

    expected = _run_eager(program, draw)
    return [d for d in _differences(program, _compiled(program, draw, backend or inductor), expected) if d.is_gradient]


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
    try:
        _run_eager(program, draw=0)
    except (RuntimeError, IndexError):
        return False
    return True


def _run_reference(program: Program, setting: Setting, draw: int) -> _Run:
    leaves = program.make_leaves(draw)
    with _autocast(program):
        training = any(map(_is_trained, program.function()(*program.make_leaves(draw).values())))
    parameters, inputs = (
        [leaves[leaf.name] for leaf in program.leaves if program.is_given_as(leaf) == role]
        for role in ("parameter", "input")
    )
    mode = QuantizedProducts(setting.activation, setting.weight, parameters, inputs, setting.attention, training)
    with _autocast(program), mode:
        results = program.function()(*leaves.values())
    return _Run(list(results), _gradients(program, results, leaves), leaves, quantized=mode.quantized)


def _is_trained(result: Tensor) -> bool:
    """Whether a gradient would come from it through something that is computed: not of a leaf, nor of a view of one."""
    whole = result if result._base is None else result._base
    return result.requires_grad and not whole.is_leaf


def _run_eager(program: Program, draw: int) -> _Run:
    leaves = program.make_leaves(draw)
    with _autocast(program):
        results = program.function()(*leaves.values())
    return _Run(list(results), _gradients(program, results, leaves), leaves)


def _run_compiled(program: Program, setting: Setting, draw: int) -> _Run:
    observed = Observations()

    def backend(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return compile_with(setting.recipe(), gm, inputs, observe=observed, inner_compile=compat.eager_inner_compile)

    run = _compiled(program, draw, backend)
    return replace(run, decisions=observed.plan.decisions if observed.plan else [])


def _compiled(program: Program, draw: int, backend: Any) -> _Run:
    torch._dynamo.reset()
    leaves = program.make_leaves(draw)
    if program.as_module:
        function: Any = ProgramModule(program, leaves)
        arguments = [leaves[leaf.name] for leaf in program.leaves if leaf.role == "input"]
    else:
        function, arguments = program.function(), list(leaves.values())
    with _autocast(program):
        results = torch.compile(function, backend=backend, fullgraph=True, dynamic=program.dynamic)(*arguments)
    return _Run(list(results), _gradients(program, results, leaves), leaves)


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


class Difference(NamedTuple):
    """``kind``: of two that are equal up to ``detail``, one explains the other."""

    name: str
    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}{self.detail}"

    @property
    def is_gradient(self) -> bool:
        return self.name.startswith(_GRADIENT)


_GRADIENT = "gradient of "


def _differences(program: Program, actual: _Run, expected: _Run) -> list[Difference]:
    tolerance = max(_ROUNDINGS[dtype] for dtype in program.dtypes)
    forward = 0.0 if program.bitwise else tolerance
    pairs: list[tuple[str, Tensor | None, Tensor | None, float]] = [
        (name, a, b, forward) for name, a, b in zip(program.results, actual.results, expected.results, strict=True)
    ]
    pairs += [(f"leaf {name} after the call", actual.leaves[name], b, forward) for name, b in expected.leaves.items()]
    if actual.gradients.keys() != expected.gradients.keys():
        return [Difference("gradients", f"of {list(actual.gradients)}, expected of {list(expected.gradients)}")]
    pairs += [(_GRADIENT + name, actual.gradients[name], b, tolerance) for name, b in expected.gradients.items()]
    return [found for pair in pairs if (found := _compare(*pair))]


def _compare(name: str, actual: Tensor | None, expected: Tensor | None, tolerance: float) -> Difference | None:
    """Largest difference over the largest finite magnitude; what is not finite must be so in the same places."""
    if actual is None or expected is None:
        some = actual if expected is None else expected
        return None if some is None or not some.any() else Difference(name, "one side has no gradient")
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        got, wanted = (f"{x.dtype} {list(x.shape)}" for x in (actual, expected))
        return Difference(name, f"{got}, expected {wanted}")
    a, b = actual.detach().double(), expected.detach().double()
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or not torch.equal(a.isnan(), b.isnan()):
        return Difference(name, "not finite in other places")
    if not finite.any():
        return None
    difference, largest = (a - b)[finite].abs().max(), b[finite].abs().max()
    if difference <= tolerance * largest:
        return None
    return Difference(
        name, "off by ", f"{float(difference):.3g}, {float(difference / largest):.2g} of its largest element"
    )
