"""``gradient=``: every backward product reads Q(dY), or the report says that it does not, and why.

The reference is eager autograd on operands quantized by hand: the gradient of an operand is that of the plain product
for the cotangent Q(dY), with Q along the axes that the table below states for that spelling. A product that read the
plain dY would be off by the step of the grid, 1/28 of a row's largest element at least.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcompile.ir.ops import global_scale_of
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize import reference
from tests.passes.harness import assert_same, backward, compile_and_run, compiler, fp4

STE = "e2m1 row absmax even; ste"
TENSOR = "e5m2 tensor absmax even"
TEXTS = (TENSOR, "e4m3 row absmax even", "e2m1 block16 e4m3 even", "e2m1 block32 e8m0 even")
OPERANDS = {"both": (STE, STE), "weight": ("off", STE), "activation": (STE, "off"), "neither": ("off", "off")}


@dataclass(frozen=True)
class Spelling:
    """A product of x and w, which axes of them it contracts, and which axes of dY its gradients contract."""

    function: Callable[[Tensor, Tensor], Tensor]
    x: tuple[int, ...]
    w: tuple[int, ...]
    axes: tuple[int, int]
    dx: tuple[int, ...]
    dw: tuple[int, ...]


ZERO = torch.zeros(())

SPELLINGS = {
    "linear": Spelling(F.linear, (3, 7, 24), (20, 24), (-1, -1), (2,), (0, 1)),
    "linear of a vector": Spelling(F.linear, (24,), (20, 24), (-1, -1), (0,), ()),
    "linear, one row": Spelling(F.linear, (1, 24), (20, 24), (-1, -1), (1,), (0,)),
    "linear, one column": Spelling(F.linear, (7, 24), (1, 24), (-1, -1), (1,), (0,)),
    "linear, one row and column": Spelling(F.linear, (1, 24), (1, 24), (-1, -1), (1,), (0,)),
    "matmul": Spelling(torch.matmul, (3, 7, 24), (24, 20), (-1, -2), (2,), (0, 1)),
    "matmul, weight left": Spelling(lambda x, w: w @ x, (3, 24, 7), (20, 24), (-2, -1), (1,), (0, 2)),
    "matmul, weight left, vector": Spelling(lambda x, w: w @ x, (24,), (20, 24), (-1, -1), (0,), ()),
    "matmul, batches": Spelling(torch.matmul, (2, 3, 7, 24), (3, 24, 20), (-1, -2), (3,), (0, 2)),
    "matmul, vector by batches": Spelling(torch.matmul, (24,), (3, 24, 20), (-1, -2), (0, 1), ()),
    "mm": Spelling(torch.mm, (7, 24), (24, 20), (-1, -2), (1,), (0,)),
    "mv": Spelling(lambda x, w: torch.mv(w, x), (24,), (20, 24), (-1, -1), (0,), ()),
    "addmm": Spelling(lambda x, w: torch.addmm(ZERO, x, w), (7, 24), (24, 20), (-1, -2), (1,), (0,)),
    "addmv": Spelling(lambda x, w: torch.addmv(ZERO, w, x), (24,), (20, 24), (-1, -1), (0,), ()),
    "bmm": Spelling(torch.bmm, (3, 7, 24), (3, 24, 20), (-1, -2), (2,), (1,)),
    "baddbmm": Spelling(lambda x, w: torch.baddbmm(ZERO, x, w), (3, 7, 24), (3, 24, 20), (-1, -2), (2,), (1,)),
    "addbmm": Spelling(lambda x, w: torch.addbmm(ZERO, x, w), (3, 7, 24), (3, 24, 20), (-1, -2), (1,), (0,)),
    "inner": Spelling(torch.inner, (3, 7, 24), (20, 24), (-1, -1), (2,), (0, 1)),
    "tensordot": Spelling(
        lambda x, w: torch.tensordot(x, w, ([1], [2])), (7, 24, 2), (3, 5, 24), (1, 2), (2, 3), (0, 1)
    ),
    "einsum": Spelling(
        lambda x, w: torch.einsum("bsd,hdk->bhsk", x, w), (2, 5, 24), (3, 24, 4), (-1, 1), (1, 3), (0, 2)
    ),
    "einsum, batches": Spelling(
        lambda x, w: torch.einsum("...hd,hdk->...hk", x, w), (2, 5, 3, 24), (3, 24, 4), (-1, 1), (3,), (0, 1)
    ),
    "einsum, implicit": Spelling(lambda x, w: torch.einsum("ab,bc", x, w), (7, 24), (24, 20), (-1, 0), (1,), (0,)),
}  # fmt: skip


class Products(nn.Module):
    """All spellings at once: one compilation, one result and one weight each."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterList(torch.randn(s.w, generator=generator) for s in SPELLINGS.values())

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(s.function(x, w) for s, x, w in zip(SPELLINGS.values(), xs, self.weights, strict=True))


def rounded(x: Tensor, text: str, axis: int) -> Tensor:
    """x quantized along an axis by the kernels' definition; "off" leaves it."""
    if text == "off":
        return x
    quantizer = text.partition(";")[0]
    whole = global_scale_of(x, Quantizer.parse(quantizer))
    codes, scales = reference.quantize(x, quantizer, axis, whole)
    return reference.dequantize(codes, scales, quantizer, axis, x.shape[axis], x.dtype, whole)


def rounded_along(dy: Tensor, text: str, contracted: tuple[int, ...]) -> Tensor:
    """dY quantized in rows along some of its axes; without one every element is a row."""
    kept = [axis for axis in range(dy.dim()) if axis not in contracted]
    order = [*kept, *contracted]
    permuted = dy.permute(order)
    rows = permuted.reshape([*permuted.shape[: len(kept)], -1])
    return rounded(rows, text, -1).reshape(permuted.shape).permute([order.index(axis) for axis in range(dy.dim())])


def expected_gradients(
    function: Callable[..., Any], x: Tensor, w: Tensor, dx: Tensor, dw: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a plain product for one cotangent each."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = function(x, w)
    return (
        torch.autograd.grad(y, x, dx.reshape(y.shape), retain_graph=True)[0],
        torch.autograd.grad(y, w, dw.reshape(y.shape))[0],
    )


@pytest.mark.parametrize(
    ("text", "operands"),
    [
        (text, operands)
        for text in TEXTS
        for operands in OPERANDS
        if text in TEXTS[:2] or operands in ("both", "neither")
    ],
)
def test_both_gradients_of_every_spelling_read_the_quantized_gradient(text: str, operands: str) -> None:
    activation, weight = OPERANDS[operands]
    model = Products()
    xs = [torch.randn(s.x, requires_grad=True) for s in SPELLINGS.values()]
    result = compile_and_run(model, *xs, recipe=fp4(activation=activation, weight=weight), gradient=text)
    assert [d.quantized for d in result.decisions] == [True] * len(SPELLINGS)
    generator = torch.Generator().manual_seed(7)
    for i, (name, s) in enumerate(SPELLINGS.items()):
        dy = torch.randn(result.outputs[i].shape, generator=generator)
        x = rounded(xs[i].detach(), activation, s.axes[0])
        w = rounded(model.weights[i].detach(), weight, s.axes[1])
        assert_same(result.outputs[i], s.function(x, w))
        dx, dw = expected_gradients(s.function, x, w, rounded_along(dy, text, s.dx), rounded_along(dy, text, s.dw))
        for found, expected, of in ((result.gradients[i], dx, "dX"), (result.gradients[f"weights.{i}"], dw, "dW")):
            try:
                assert_same(found, expected)
            except AssertionError as error:
                msg = f"{name}: {of}: {error}"
                raise AssertionError(msg) from None


# --- the same in other surroundings ----------------------------------------------------------------------------------


def check(
    model: nn.Module, *inputs: Tensor, expected: Callable[..., Any], tolerance: float = 2e-5, **options: Any
) -> Any:
    """Compile, and compare with the gradients of ``expected``, an eager function of the leaves that rounds by hand."""
    result = compile_and_run(model, *inputs, recipe=fp4(activation=STE, weight=STE), **options)
    leaves = {**dict(enumerate(inputs)), **dict(model.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    assert_same(result.gradients, backward(expected(), leaves), tolerance)
    return result


class _Linear(torch.autograd.Function):
    """x wᵀ + b of operands that are rounded already; dY rounded for dX and dW, not for db."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, text: str) -> Tensor:
        ctx.text = text
        ctx.save_for_backward(x, w)
        return F.linear(x, w, b).clone()  # no view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, w = ctx.saved_tensors
        flat = dy.flatten(0, -2)
        dw = rounded_along(flat, ctx.text, (0,)).T @ x.flatten(0, -2)
        return rounded_along(dy, ctx.text, (dy.dim() - 1,)) @ w, dw, flat.sum(0), None


def linear(layer: nn.Linear, x: Tensor, text: str, operand: str = STE) -> Tensor:
    def straight_through(t: Tensor) -> Tensor:
        return t + (rounded(t, operand, -1) - t).detach()

    return _Linear.apply(straight_through(x), straight_through(layer.weight), layer.bias, text)


class Block(nn.Module):
    """Three layers share an input, and a residual adds what the fourth makes of them, in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor, product: Callable[..., Tensor] | None = None) -> Tensor:
        product = product or (lambda layer, x: layer(x))
        q, k, v = (product(layer, x) for layer in (self.q, self.k, self.v))
        return F.relu(product(self.o, q.mul_(2) * k.sigmoid() + v), inplace=True) + x


@pytest.mark.parametrize("text", TEXTS)
def test_layers_that_share_an_input_and_results_that_are_changed_in_place(text: str) -> None:
    """And biases, whose gradient is the sum of the plain dY."""
    model, x = Block(), torch.randn(3, 7, 24, requires_grad=True)
    check(model, x, expected=lambda: model(x, lambda layer, x: linear(layer, x, text)), gradient=text)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_regions(reentrant: bool) -> None:
    class Checkpointed(Block):
        def forward(self, x: Tensor, product: Any = None) -> Tensor:
            if product:
                return super().forward(x, product)
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model, x = Checkpointed(), torch.randn(5, 24, requires_grad=True)
    text = TEXTS[1]
    check(model, x, expected=lambda: model(x, lambda layer, x: linear(layer, x, text)), gradient=text)


@pytest.mark.parametrize("activation", [STE, "off"])
def test_bodies_of_cond(activation: str) -> None:
    class Cond(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 20), nn.Linear(24, 20)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x).sin(), (x,))

    model, x, text = Cond(), torch.rand(5, 24, requires_grad=True), TEXTS[1]
    recipe = fp4(activation=activation, weight=activation)
    result = compile_and_run(model, x, recipe=recipe, gradient=text)
    assert [(d.quantized, d.reason) for d in result.decisions] == [(True, "")] * 2
    expected = backward(
        linear(model.a, x, text, activation), {0: x, "a.weight": model.a.weight, "a.bias": model.a.bias}
    )
    assert_same({name: result.gradients[name] for name in expected}, expected)


def test_a_second_batch_size() -> None:
    """The last batch of an epoch is smaller; sizes become dynamic."""
    for text in (*TEXTS, "e2m1 block16 e4m3 stochastic", "e4m3 block8x8"):
        layer = nn.Linear(24, 20)
        compiled, _ = compiler(layer, fp4(activation=STE, weight=STE), gradient=text)
        for rows in (32, 20, 9):
            x = torch.randn(rows, 24, requires_grad=True)
            found = backward(compiled(x), {0: x, "w": layer.weight, "b": layer.bias})
            if "stochastic" in text or "x8" in text:
                assert all(gradient.isfinite().all() for gradient in found.values())
            else:
                assert_same(found, backward(linear(layer, x, text), {0: x, "w": layer.weight, "b": layer.bias}))


@pytest.mark.parametrize("operand", [STE, "off"])
@pytest.mark.parametrize("text", TEXTS[:2])
def test_products_of_activations(text: str, operand: str) -> None:
    """q·kᵀ under attention=True, and x·xᵀ, whose operands are one tensor."""

    def function(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return torch.matmul(q, k.transpose(-1, -2)), torch.matmul(q, q.mT)

    q, k = torch.randn(2, 3, 7, 24, requires_grad=True), torch.randn(2, 3, 5, 24, requires_grad=True)
    recipe = fp4(activation=operand, weight=operand, attention=True)
    result = compile_and_run(lambda q, k: function(q * 1, k * 1), q, k, recipe=recipe, gradient=text)
    generator = torch.Generator().manual_seed(7)
    dqk, dqq = (torch.randn(o.shape, generator=generator) for o in result.outputs)
    wide_q, wide_k = rounded(q.detach(), operand, -1), rounded(k.detach(), operand, -1)
    dq = rounded_along(dqk, text, (3,)) @ wide_k
    dq = dq + rounded_along(dqq, text, (3,)) @ wide_q + rounded_along(dqq, text, (2,)).mT @ wide_q
    assert_same(result.gradients, {0: dq, 1: rounded_along(dqk, text, (2,)).mT @ wide_q})


def test_a_rule_for_one_role() -> None:
    """dX reads Q(dY), dW the plain dY; and the report's rows have their roles although no operand is quantized."""
    layer, x, text = nn.Linear(24, 20), torch.randn(7, 24, requires_grad=True), TEXTS[1]
    rules = [{"gradient": text, "roles": ["dgrad"]}]
    result = compile_and_run(layer, x, recipe=fp4(activation=None, weight=None), rules=rules)
    dy = torch.randn(7, 20, generator=torch.Generator().manual_seed(7))
    dx = rounded_along(dy, text, (1,)) @ layer.weight.detach()
    assert_same(result.gradients, {0: dx, "weight": dy.T @ x.detach(), "bias": dy.sum(0)})
    rows = {row["role"]: row["operands"] for row in result.gemms}
    assert rows == {"fprop": ["dense", "dense"], "dgrad": [f"{text}; ste", "dense"], "wgrad": ["dense", "dense"]}


def test_grouped_products() -> None:
    """dW contracts the tokens of one expert at a time; a scale belongs to a channel, over all tokens."""
    w = nn.Parameter(torch.randn(2, 32, 16, dtype=torch.bfloat16))
    x, ends = torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True), torch.tensor([3, 8], dtype=torch.int32)
    model = nn.Module()
    model.w = w
    for operand in (STE, "off"):
        result = compile_and_run(
            lambda x, ends: torch._grouped_mm(x, w, ends),
            x,
            ends,
            recipe=fp4(activation=operand, weight=operand),
            gradient=TEXTS[1],
        )
        dy = torch.randn(8, 16, generator=torch.Generator().manual_seed(7)).bfloat16()
        wide = rounded(w.detach(), operand, 1)
        by_rows = rounded_along(dy, TEXTS[1], (1,))
        dx = torch.cat([by_rows[:3] @ wide[0].T, by_rows[3:] @ wide[1].T])
        assert_same(result.gradients, {0: dx}, 2**-7)
        assert result.decisions[0].rounded == ("dgrad", "wgrad")


@pytest.mark.parametrize("operand", ["e2m1 tensor absmax even", "off"])
def test_convolutions_take_one_scale_per_tensor(operand: str) -> None:
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 6, 6, requires_grad=True)
    result = compile_and_run(layer, x, recipe=fp4(activation=operand, weight=operand), gradient=TENSOR)
    dy = torch.randn(result.outputs.shape, generator=torch.Generator().manual_seed(7))

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)

    q = rounded(dy, TENSOR, -1)
    dx, dw = expected_gradients(
        plain, rounded(x.detach(), operand, -1), rounded(layer.weight.detach(), operand, -1), q, q
    )
    assert_same(result.gradients, {0: dx, "weight": dw, "bias": dy.sum((0, 2, 3))})


@pytest.mark.parametrize("operand", [STE, "off"])
def test_a_convolution_has_no_rows_of_the_gradient_and_the_report_says_so(operand: str) -> None:
    layer, x = nn.Conv2d(3, 5, 3), torch.randn(2, 3, 6, 6, requires_grad=True)
    recipe = fp4(activation=operand, weight=operand)
    result = compile_and_run(layer, x, recipe=recipe, gradient=TEXTS[1])
    (decision,) = result.decisions
    assert decision.quantized == (operand == STE)
    assert "gradient= is not applied: conv2d has no rows of dY to scale; one scale per tensor fits" in decision.reason
    assert_same(result.gradients, compile_and_run(layer, x, recipe=recipe).gradients)


def test_a_product_in_place_keeps_the_gradient_and_says_so() -> None:
    w = nn.Parameter(torch.randn(24, 20))
    out = torch.zeros(7, 20)
    result = compile_and_run(
        lambda x: out.clone().addmm_(x, w), torch.randn(7, 24, requires_grad=True), gradient=TENSOR
    )
    assert result.decisions[0].reason == "gradient= is not applied: the product is written in place"


def test_a_disabled_pass_is_a_reason() -> None:
    x = torch.randn(7, 24, requires_grad=True)
    options: dict[str, Any] = {"recipe": fp4(gradient=TENSOR), "disable_passes": ["quantize_gradients"]}
    (decision,) = compile_and_run(nn.Linear(24, 20), x, **options).decisions
    assert decision.reason == "gradient= is not applied: the pass quantize_gradients is disabled"


def test_without_a_backward_there_is_no_gradient_to_quantize() -> None:
    """And no product twice, as a program that is run as it is would have it."""
    x, options = torch.randn(7, 24), {"recipe": fp4(activation=None, weight=None), "gradient": TENSOR}
    with torch.no_grad():
        result = compile_and_run(nn.Linear(24, 20), x, **options)
    assert [(d.quantized, d.reason) for d in result.decisions] == [(False, "the recipe quantizes none of its operands")]


def test_autocast() -> None:
    """Products in bfloat16, and so is the gradient that is rounded."""
    layer, x = nn.Linear(24, 20, bias=False), torch.randn(7, 24, requires_grad=True)
    recipe = fp4(activation=None, weight=None)
    result = compile_and_run(
        layer, x, recipe=recipe, gradient=TEXTS[2], under=lambda: torch.autocast("cpu", torch.bfloat16)
    )
    dy = torch.randn(7, 20, generator=torch.Generator().manual_seed(7)).bfloat16()
    x16, w16 = x.detach().bfloat16(), layer.weight.detach().bfloat16()
    dx = (rounded_along(dy, TEXTS[2], (1,)) @ w16).float()
    assert_same(result.gradients, {0: dx, "weight": (rounded_along(dy, TEXTS[2], (0,)).T @ x16).float()}, 2**-7)


@pytest.mark.parametrize("mode", ["dgrad_fp8", "fp8"])
def test_a_given_gradient_is_rounded_where_its_scales_cannot_be_folded(mode: str) -> None:
    """Operands that are off, and batches, have no scales to fold into dY."""
    text = TEXTS[1]
    layer, x = nn.Linear(24, 20), torch.randn(7, 24, requires_grad=True)
    options: dict[str, Any] = {"recipe": fp4(activation=None, weight=None), "backward": mode}
    result = compile_and_run(layer, x, gradient=text, **options)
    assert_same(result.gradients, backward(linear(layer, x, text, "off"), {0: x, **dict(layer.named_parameters())}))
    w = nn.Parameter(torch.randn(3, 24, 20))
    batch = torch.randn(3, 7, 24, requires_grad=True)
    found = compile_and_run(
        lambda x: x @ w, batch, recipe=fp4(activation=STE, weight=STE), backward=mode, gradient=text
    )
    dy = torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(7))
    assert_same(found.gradients, {0: rounded_along(dy, text, (2,)) @ rounded(w.detach(), STE, 1).mT})


def test_rotated_operands() -> None:
    """QuEST's rotations cancel with a rounded dY as with a plain one."""
    operand = "e2m1 row absmax even; ste; hadamard(8)"
    layer, x = nn.Linear(24, 20, bias=False), torch.randn(7, 24, requires_grad=True)
    result = compile_and_run(layer, x, recipe=fp4(activation=operand, weight=operand), gradient=TEXTS[1])
    dy = torch.randn(7, 20, generator=torch.Generator().manual_seed(7))
    wide = [torch.ops.qcompile.fake_quantize(t.detach(), operand, -1) for t in (x, layer.weight)]
    dx, dw = rounded_along(dy, TEXTS[1], (1,)) @ wide[1], rounded_along(dy, TEXTS[1], (0,)).T @ wide[0]
    assert_same(result.gradients, {0: dx, "weight": dw})
