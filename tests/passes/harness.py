"""Compile in seconds, look at what the passes did, and compare with plain eager torch.

:func:`compile_and_run` sends a function or module through every pass of a real compilation and executes the resulting
graphs eagerly instead of generating code. :class:`QuantizedProducts` is the independent reference: it knows nothing of
graphs, and quantizes the operands of products as eager torch calls them, with an autograd function of its own.

Tolerance: the compiled and the eager side do the same float32 arithmetic on the same codes and differ in the order of
accumulation only. :func:`assert_same` allows ``2e-5`` of the largest element, about K·2⁻²⁴ for the K ≤ 300 used here.
A code that rounds differently would be off by a step of the grid, at least 1/12 of a row's largest element.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import qcompile.kernels.register  # noqa: F401  (kernels of the qcompile:: ops)
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.operand import Operand
from qcompile.ir.ops import global_scale_of
from qcompile.ir.recipe import Recipe
from qcompile.kernels.estimate import reference as estimate
from qcompile.kernels.outliers import reference as outliers
from qcompile.kernels.quantize import reference as quantize
from qcompile.passes.pass_base import Observations
from qcompile.passes.record import Decision
from qcompile.recipes import FP4

#: Operands that tell the two kinds apart at a glance: different formats, and estimators that both change the gradient
#: (with an E8M0 scale, elements between 6 s and 8 s lie outside the grid).
ACTIVATION, WEIGHT = "e2m1 row e8m0 even; clip", "e1m2 row absmax even; dge(k=5,cap=3)"
DISTINCT = Recipe(name="distinct", activation=Operand.parse(ACTIVATION), weight=Operand.parse(WEIGHT)).override(
    {"defaults": False}
)
#: The FP4 recipe as the paper prints it, where layers are as thin as tests want them.
SMALL_FP4 = FP4.override({"variant": "paper", "min_side": 0})


@dataclass
class Result:
    """Outputs of one call, gradients of the leaves by name or position, and what the passes recorded."""

    outputs: Any
    gradients: dict[Any, Tensor | None]
    observations: list[Observations]

    @property
    def graphs(self) -> int:
        return len(self.observations)

    @property
    def decisions(self) -> list[Decision]:
        return [d for o in self.observations if o.plan for d in o.plan.decisions]

    @property
    def quantized(self) -> list[Decision]:
        return [d for d in self.decisions if d.quantized]

    @property
    def gemms(self) -> list[dict[str, Any]]:
        return [row for o in self.observations for row in o.gemms]

    @property
    def saved(self) -> list[dict[str, Any]]:
        return [row for o in self.observations for row in o.saved]

    @property
    def saved_bytes(self) -> int:
        return sum(row["bytes"] for row in self.saved)

    def program(self, name: str) -> str:
        """Text of one stage of the only graph."""
        (observed,) = self.observations
        return observed.programs[name]

    def count(self, op: str, stage: str = "joint_fuse") -> int:
        """Calls of ``qcompile.<op>`` in a stage's programs, over all graphs and sub-graph modules."""
        programs = [
            text for o in self.observations for name, text in o.programs.items() if name.rstrip("_0123456789") == stage
        ]
        return sum(text.count(f"torch.ops.qcompile.{op}.default(") for text in programs)

    def fused(self) -> Counter[str]:
        """Fused products by role."""
        return Counter(row["role"] for row in self.gemms if row["fused"])


def compiler(
    function: Callable[..., Any],
    recipe: Recipe = SMALL_FP4,
    *,
    fullgraph: bool = True,
    dynamic: bool | None = None,
    **options: Any,
) -> tuple[Callable[..., Any], list[Observations]]:
    """``function`` compiled through all passes with the verifier on, and the list its observations arrive in."""
    torch._dynamo.reset()
    observations: list[Observations] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        observations.append(Observations())
        return compile_with(
            recipe,
            gm,
            inputs,
            options={"debug": True, **options},
            observe=observations[-1],
            inner_compile=compat.eager_inner_compile,
        )

    return torch.compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic), observations


def compile_and_run(
    function: Callable[..., Any],
    *inputs: Any,
    recipe: Recipe = SMALL_FP4,
    fullgraph: bool = True,
    dynamic: bool | None = None,
    under: Callable[[], Any] = contextlib.nullcontext,
    **options: Any,
) -> Result:
    """Forward and, where anything requires a gradient, backward of ``function(*inputs)``, compiled.

    ``under`` makes the context (autocast, say) that surrounds the forward only.
    """
    compiled, observations = compiler(function, recipe, fullgraph=fullgraph, dynamic=dynamic, **options)
    with under():
        outputs = compiled(*inputs)
    result = Result(outputs, backward(outputs, leaves_of(function, inputs)), observations)
    missed = [product for observed in observations for product in observed.unaccounted]
    assert not missed, f"products that belong to no site: {missed}"
    return result


def run_eager(
    function: Callable[..., Any], *inputs: Any, under: Callable[[], Any] = contextlib.nullcontext
) -> tuple[Any, dict[Any, Tensor | None]]:
    """Outputs and gradients of the uncompiled function, run under ``under()``."""
    with under():
        outputs = function(*inputs)
    return outputs, backward(outputs, leaves_of(function, inputs))


def leaves_of(function: Callable[..., Any], inputs: Sequence[Any]) -> dict[Any, Tensor]:
    """What gradients are taken for: inputs by position and parameters by name."""
    leaves: dict[Any, Tensor] = {
        i: x for i, x in enumerate(torch.utils._pytree.tree_leaves(inputs)) if isinstance(x, Tensor) and x.requires_grad
    }
    if isinstance(function, nn.Module):
        leaves |= {name: p for name, p in function.named_parameters() if p.requires_grad}
    return leaves


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def backward(outputs: Any, leaves: dict[Any, Tensor]) -> dict[Any, Tensor | None]:
    """Gradients of ``Σ output ⊙ cotangent`` with fixed random cotangents."""
    found = [o for o in torch.utils._pytree.tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
    if not found or not leaves:
        return {}
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in found]
    gradients = torch.autograd.grad(found, list(leaves.values()), cotangents, allow_unused=True)
    return dict(zip(leaves, gradients, strict=True))


def assert_same(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal up to ``tolerance`` times the largest magnitude of each expected tensor; structures must agree."""
    left, right = (torch.utils._pytree.tree_flatten(value) for value in (actual, expected))
    assert left[1] == right[1]
    for a, b in zip(left[0], right[0], strict=True):
        if not isinstance(b, Tensor):
            assert a == b
            continue
        limit = tolerance * float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=max(limit, 1e-12))


# --- the eager reference ---------------------------------------------------------------------------------------------


class _FakeQuantize(torch.autograd.Function):
    """One operand, by the formulas of the kernels' references: clamp → quantize → dequantize → restore; estimator
    back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, text: str, axis: int) -> Tensor:
        spec = Operand.parse(text)
        ctx.spec, ctx.axis = spec, axis
        clamped = x
        if spec.outliers:
            clamped, values, positions = outliers.clamp_outliers(x, str(spec.outliers), axis)
        whole = global_scale_of(clamped, spec.quantizer)
        codes, scales = quantize.quantize(clamped, str(spec.quantizer), axis, whole)
        y = quantize.dequantize(codes, scales, str(spec.quantizer), axis, x.shape[axis], x.dtype, whole)
        if spec.outliers and spec.outliers.compensate:
            y = outliers.restore_outliers(y, values, positions, str(spec.outliers), axis)
        ctx.save_for_backward(clamped, scales, *([] if whole is None else [whole]))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, scales, *rest = ctx.saved_tensors
        arguments = (x, scales, str(ctx.spec.quantizer), str(ctx.spec.estimator), ctx.axis, *rest)
        if ctx.spec.estimator.kind.slope:
            grad = estimate.scale_gradient(grad, *arguments)
        elif ctx.spec.estimator.kind.mask:
            grad = estimate.mask_gradient(grad, estimate.estimator_mask(*arguments), ctx.axis)
        return grad, None, None


def fake_quantize(x: Tensor, operand: Operand | str | None, axis: int) -> Tensor:
    """``x`` quantized along ``axis`` and decoded again, differentiable through its estimator; ``None`` leaves it
    alone.
    """
    if operand is None:
        return x
    return _FakeQuantize.apply(x, str(operand), axis - x.dim() if axis >= 0 else axis)


class _QuantizeGradient(torch.autograd.Function):
    """A linear layer whose backward products read dY quantized: ``y = x wᵀ``, ``dx = Q(dy) w``, ``dw = Q(dy)ᵀ x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, dgrad: str | None, wgrad: str | None) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.operands = dgrad, wgrad
        return F.linear(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        dgrad, wgrad = ctx.operands
        rows = dy.flatten(0, -2)
        dx = fake_quantize(dy, dgrad, -1) @ w
        return dx, fake_quantize(rows, wgrad, -2).T @ x.flatten(0, -2), None, None


class QuantizedProducts(TorchFunctionMode):
    """Quantizes the operands of products as eager torch runs them. Weights are parameters and views of parameters.

    ``skip`` tells which weights to leave alone; products without a weight are left alone unless ``attention``.
    """

    def __init__(
        self,
        recipe: Recipe = SMALL_FP4,
        skip: Callable[[Tensor], bool] = lambda weight: False,
        dgrad: str | None = None,
        wgrad: str | None = None,
    ) -> None:
        self.recipe, self.skip, self.dgrad, self.wgrad = recipe, skip, dgrad, wgrad
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _AXES:
            return func(*args, **kwargs)
        args = list(args)
        (left, left_axis), (right, right_axis) = _AXES[func]
        weights = [t for t in (args[left], args[right]) if _is_weight(t)]
        if any(self.skip(w) for w in weights) or not (weights or self.recipe.attention):
            return func(*args, **kwargs)
        self.products += 1
        for position, axis in ((left, left_axis), (right, right_axis)):
            operand = self.recipe.weight if _is_weight(args[position]) else self.recipe.activation
            x = args[position]
            if torch.is_autocast_enabled("cpu"):
                x = x.to(torch.get_autocast_dtype("cpu"))
            args[position] = fake_quantize(x, operand, axis)
        if func is F.linear and (self.dgrad or self.wgrad):
            y = _QuantizeGradient.apply(args[0], args[1], self.dgrad, self.wgrad)
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            return y if bias is None else y + bias
        return func(*args, **kwargs)


_AXES: dict[Any, tuple[tuple[int, int], tuple[int, int]]] = {
    F.linear: ((0, -1), (1, -1)),
    torch.addmm: ((1, -1), (2, -2)),
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.__matmul__), ((0, -1), (1, -2))),
}


def _is_weight(tensor: Tensor) -> bool:
    root = tensor._base if tensor._is_view() and tensor._base is not None else tensor
    return isinstance(root, nn.Parameter)


def fp4(**changes: Any) -> Recipe:
    """The published recipe with options applied."""
    return SMALL_FP4.override(changes)
