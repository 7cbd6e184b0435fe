"""Products in the bodies of higher-order ops: found, named, quantized once, and their gradients right.

References: the same model without the wrapper (checkpointing, regions and cond do not change what is computed), under
:class:`QuantizedProducts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.utils.checkpoint import checkpoint

from qcompile.report import saved_bytes

from .harness import DISTINCT, QuantizedProducts, assert_same, compile_and_run, compiler, run_eager
from .harness import SMALL_FP4 as FP4


class MLP(nn.Module):
    def __init__(self, width: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Stack(nn.Module):
    """Two blocks, each called through ``wrap``."""

    def __init__(self, wrap: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([MLP(), MLP()])
        self.wrap = wrap

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.wrap(block, x)
        return x


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def non_reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


def measured(model: nn.Module, x: Tensor, under: Callable[[], Any] = nullcontext, **options: Any) -> int:
    """Bytes autograd keeps for the backward of one compiled call."""
    compiled, _ = compiler(model, FP4, **options)
    with saved_bytes(model, x) as saved, under():
        compiled(x)
    return saved.total


@pytest.mark.parametrize("wrap", [reentrant, non_reentrant], ids=lambda wrap: wrap.__name__)
def test_checkpointed_blocks(wrap: Callable[..., Tensor]) -> None:
    x = torch.randn(24, 64, requires_grad=True)
    result = compile_and_run(Stack(wrap), x)
    assert [d.site.name for d in result.quantized] == ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]
    expected = run_eager(Stack(), x, under=lambda: QuantizedProducts(FP4))
    assert_same(result.outputs, expected[0])
    assert_same(result.gradients, expected[1])


@pytest.mark.parametrize("wrap", [reentrant, non_reentrant], ids=lambda wrap: wrap.__name__)
def test_checkpointing_saves_no_more_than_inductor(wrap: Callable[..., Tensor]) -> None:
    """Nodes that passes insert must take over the region's tags, or their codes are saved although all is
    recomputed.
    """
    x = torch.randn(24, 64, requires_grad=True)
    ours = measured(Stack(wrap), x)
    assert ours <= measured(Stack(wrap), x, enabled=False)
    assert ours < measured(Stack(), x)


def test_nested_region_is_quantized_once_and_counted_per_call() -> None:
    x = torch.randn(24, 64, requires_grad=True)
    model = Stack(region)
    result = compile_and_run(model, x)
    assert [d.site.name for d in result.quantized] == ["blocks.0.fc1", "blocks.0.fc2"]
    expected = run_eager(Stack(), x, under=lambda: QuantizedProducts(FP4))
    assert_same(result.outputs, expected[0])
    assert_same(result.gradients, expected[1])
    assert result.saved_bytes == measured(model, x)
    assert {row["custom"]["qcompile_site"] for row in result.saved if row["codes"]} == {0, 1}


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_cond(sign: float) -> None:
    """Both branches are quantized. The backward recomputes the branch and gets the estimators' gradients."""

    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(5)
            self.a, self.b = nn.Linear(37, 11), nn.Linear(37, 11)

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x).sin(), (x,))
            return self.a(x) if x.sum() > 0 else self.b(x).sin()

    x = (sign * torch.rand(5, 37)).requires_grad_()
    result = compile_and_run(Cond(), x, recipe=DISTINCT)
    assert [(d.site.name, d.quantized) for d in result.decisions] == [("a", True), ("b", True)]
    assert {d.reason for d in result.decisions} == {"inside cond: its gradients stay in high precision"}
    outputs, gradients = run_eager(Cond(), x, under=lambda: QuantizedProducts(DISTINCT))
    assert_same(result.outputs, outputs)
    for name, gradient in gradients.items():
        found = result.gradients[name]
        assert found is not None
        assert_same(found, torch.zeros_like(found) if gradient is None else gradient)
    roles = Counter(row["role"] for row in result.gemms)
    # Nothing in a cond's backward says which layer it serves; the second branch is also run again there.
    assert roles == {"fprop": 2, "backward": 5}


class Scan(nn.Module):
    """A recurrence; eager Python unrolls it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def step(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (h @ self.w).sin() + x, h * 2

    def forward(self, h: Tensor, xs: Tensor) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return scan(self.step, h, xs)
        ys = []
        for x in xs:
            h, y = self.step(h, x)
            ys.append(y)
        return h, torch.stack(ys)


def test_scan() -> None:
    h, xs = torch.randn(4, 16, requires_grad=True), torch.randn(5, 4, 16)
    result = compile_and_run(Scan(), h, xs, recipe=DISTINCT)
    (decision,) = result.quantized
    assert [s.kind for s in decision.site.slots] == ["activation", "weight"]
    outputs, gradients = run_eager(Scan(), h, xs, under=lambda: QuantizedProducts(DISTINCT))
    assert_same(result.outputs, outputs)
    assert_same(result.gradients, gradients)


# --- autocast ---------------------------------------------------------------------------------------------------------


def bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


class Mixed(nn.Module):
    """One layer before, inside and after an autocast region."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.p = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.p(x)
        with bfloat16():
            z = self.p(x)
        return y + z.float() + self.p(x)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_quantizes_what_the_product_reads(inside: bool) -> None:
    """Under autocast Dynamo's operands are float32 and the product runs in bfloat16: its rounded operand is quantized.

    The cast moves elements across rounding boundaries of a 4-bit grid, so quantizing the float32 tensor gives other
    codes. Sums are kept in bfloat16, whose last place is 2⁻⁸.
    """
    model, around = (Mixed(), nullcontext) if inside else (MLP(), bfloat16)
    x = torch.randn(24, 64)
    result = compile_and_run(model, x, under=around)

    @contextmanager
    def reference() -> Iterator[None]:
        with around(), QuantizedProducts(FP4):
            yield

    outputs, gradients = run_eager(model, x, under=reference)
    assert_same(result.outputs, outputs, tolerance=2**-8)
    assert_same(result.gradients, gradients, tolerance=2**-7)
    dtypes = [row["dtype"] for row in result.gemms if row["role"] == "fprop"]
    assert dtypes == (["float32", "bfloat16", "float32"] if inside else ["bfloat16"] * 2)


def test_autocast_saves_no_copy_of_a_weight() -> None:
    """DGE needs the weight in the backward; saving autocast's bfloat16 copy of it cost more than all codes spared."""
    model, x = MLP(), torch.randn(24, 64)
    result = compile_and_run(model, x, under=bfloat16)
    wide = [row for row in result.saved if not row["codes"]]
    assert all(row["shape"][0] == 24 for row in wide), wide
    assert result.saved_bytes < measured(model, x, bfloat16, enabled=False)


# --- bodies that are not ours to change ------------------------------------------------------------------------------


class Product(torch.autograd.Function):
    """A product whose backward is written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


def test_autograd_function_is_left_alone() -> None:
    """Its backward is its author's; a fake_quantize inside would be differentiated by nobody."""
    w, x = nn.Parameter(torch.randn(37, 11)), torch.randn(5, 37, requires_grad=True)
    result = compile_and_run(lambda x: Product.apply(x, w), x, recipe=DISTINCT)
    assert {d.reason for d in result.decisions} == {
        "inside a torch.autograd.Function, whose backward is the user's own"
    }
    assert_same(result.outputs, x @ w)


@pytest.mark.parametrize(
    "transform",
    [
        lambda layer, x: torch.vmap(layer)(x),
        lambda layer, x: torch.func.grad(lambda y: layer(y).square().sum())(x),
    ],
    ids=["vmap", "grad"],
)
def test_function_transforms_are_left_alone_and_what_follows_is_not(transform: Callable[..., Tensor]) -> None:
    inner, outer = nn.Linear(16, 16), nn.Linear(16, 8)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = inner, outer

        def forward(self, x: Tensor) -> Tensor:
            return self.outer(transform(self.inner, x))

    model, x = Model(), torch.randn(5, 16)
    result = compile_and_run(model, x, recipe=DISTINCT)
    left = [d for d in result.decisions if not d.quantized]
    assert left
    assert {d.reason for d in left} == {"inside a torch.func transform (vmap, grad): estimators do not compose with it"}
    assert [d.site.name for d in result.quantized] == ["outer"]
    middle = transform(inner, x)
    with QuantizedProducts(DISTINCT):
        expected = outer(middle)
    assert_same(result.outputs, expected)
