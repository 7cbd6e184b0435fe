"""``wgrad_activation=``, ``dgrad_weight=`` and ``forward="bf16"``: what the backward reads where that is not what the
forward read.

The reference is eager torch with operands quantized by hand. One that was rotated otherwise than dY, or along another
axis, would give a gradient that has nothing to do with the right one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.ir.recipe import Recipe
from qcompile.ir.transforms import FIXED_SIGNS
from tests.passes.harness import Result, assert_same, compile_and_run, compiler
from tests.passes.test_quantize_gradients import rounded

X, W, G = "e2m1 block16 e4m3", "e2m1 block16x16 e4m3", "e2m1 block32 e8m0"
RECIPE = Recipe("again", activation=X, weight=W, gradient=G, wgrad_activation=X).override({"defaults": False})


def rotation(size: int, signs: str = "") -> Tensor:
    """[size, size] = diag(D·H, …) in blocks of 16."""
    h = torch.ones(1, 1)
    while len(h) < 16:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    d = torch.tensor([1.0 - 2 * (FIXED_SIGNS >> i & 1) for i in range(16)]) if signs == "fixed" else torch.ones(16)
    return torch.block_diag(*[d.diag() @ h / 4] * (size // 16))


def given(model: nn.Module, x: Tensor, **options: Any) -> tuple[Result, Tensor]:
    """What comes of a model, and the dY that the harness sends back."""
    result = compile_and_run(model, x, recipe=RECIPE, **options)
    generator = torch.Generator().manual_seed(7)
    return result, torch.randn(result.outputs.shape, generator=generator)


SPELLINGS = {
    "linear": (F.linear, (48, 32)),
    "matmul": (torch.matmul, (32, 48)),
    "addmm": (lambda x, w: torch.addmm(x.new_zeros(48), x.flatten(0, -2), w).unflatten(0, x.shape[:-1]), (32, 48)),
}


class Product(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.function, shape = SPELLINGS[spelling]
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def inputs(rows: int = 16) -> Tensor:
    return torch.randn(2, rows, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)


@pytest.mark.parametrize(("spelling", "signs"), [("linear", ""), ("matmul", "fixed"), ("addmm", "fixed")])
def test_wgrad_reads_the_input_again_along_the_tokens_rotated_like_the_gradient(spelling: str, signs: str) -> None:
    """From the original: X̂ of the forward has scales along K. The scale of the tensor is one of what is rotated."""
    rotated = f"hadamard(16{',signs=' if signs else ''}{signs})"
    model, x = Product(spelling), inputs()
    result, dy = given(model, x, wgrad_activation=f"{X}; {rotated}")
    rows, dy = x.detach().flatten(0, -2), dy.flatten(0, -2)
    turn = rotation(len(rows), signs)
    dw = rounded(turn.T @ dy, G, 0).T @ rounded(turn.T @ rows, X, 0)
    stored = model.weight.detach()
    w_read = rounded(stored, W, -1) if spelling == "linear" else rounded(stored.T, W, -1)
    assert_same(result.gradients["weight"], dw if spelling == "linear" else dw.T)
    assert_same(result.gradients[0].flatten(0, -2), rounded(dy, G, 1) @ w_read)
    (decision,) = result.quantized
    assert f"wgrad reads activation again as e2m1 block16 e4m3 even, and with dY in {rotated}" in decision.reason
    assert result.fused() == {"fprop": 1, "dgrad": 1, "wgrad": 1}


def test_layers_that_share_an_input_read_it_again_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x)

    result, _ = given(Shared(), inputs(), wgrad_activation=f"{X}; hadamard(16,signs=fixed)")
    # X, X again, and two weights; dY of each, in dgrad and in wgrad
    assert result.count("quantize") == 4 + 2 * 2


def test_rows_that_the_rotation_does_not_divide() -> None:
    """2·7 tokens are rotated in pairs."""
    model, x = Product("linear"), inputs(7)
    result, dy = given(model, x, gradient="e4m3 block16", wgrad_activation="e4m3 block16; hadamard(16)")
    exact = dy.flatten(0, -2).T @ x.detach().flatten(0, -2)
    assert (result.gradients["weight"] - exact).norm() < 0.06 * exact.norm()


def test_batch_sizes_share_a_graph_as_long_as_the_rotation_divides_them() -> None:
    """The size is asked whether sixteen divides it, not fixed."""
    layer, text = nn.Linear(32, 32, bias=False), "e4m3 block16"
    compiled, observations = compiler(layer, RECIPE, gradient=text, wgrad_activation=f"{text}; hadamard(16)")
    graphs = []
    for rows in (32, 48, 80, 24):
        x, dy = torch.randn(rows, 32), torch.randn(rows, 32)
        (dw,) = torch.autograd.grad(compiled(x), layer.weight, dy)
        assert (dw - dy.T @ x).norm() < 0.06 * (dy.T @ x).norm()
        graphs.append(len(observations))
    assert graphs == [1, 2, 2, 3]


def test_under_autocast() -> None:
    """What is read again is the BF16 copy that the product reads; a wide forward is the plain one."""

    class Cast(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    layer, x = Cast(32, 48, bias=False), inputs()
    result, dy = given(layer, x, forward="bf16", wgrad_activation=f"{X}; hadamard(16,signs=fixed)")
    assert torch.equal(result.outputs, layer(x))
    turn, dy = rotation(32, "fixed"), dy.bfloat16().flatten(0, -2)
    bf16 = [(turn.T @ t.float()).bfloat16() for t in (dy, x.detach().bfloat16().flatten(0, -2))]
    assert_same(result.gradients["weight"], (rounded(bf16[0], G, 0).T @ rounded(bf16[1], X, 0)).float(), 2**-7)


@pytest.mark.parametrize(
    ("model", "shape", "options", "why"),
    [
        (lambda: nn.Conv1d(32, 32, 3), (2, 32, 9), {"gradient": "fp8"}, "what conv1d contracts there is not known"),
        (lambda: nn.Linear(32, 32), (4, 32), {"gradient": "off"}, "dY stays in high precision"),
    ],
)
def test_what_cannot_be_read_again_is_said(model: Any, shape: tuple[int, ...], options: Any, why: str) -> None:
    result = compile_and_run(model(), torch.randn(shape, requires_grad=True), recipe=RECIPE, **options)
    assert f"wgrad_activation= is not applied: {why}" in result.quantized[0].reason


@pytest.mark.parametrize("gradient", [G, "off"])
def test_a_wide_forward_leaves_the_gradients_what_they_were(gradient: str) -> None:
    """y is that of the plain model, bit for bit; dX and dW are those of the quantized one for the same dY."""
    model, x = nn.Linear(32, 48), inputs()
    options = {"gradient": gradient, "weight": "e2m1 row; dge(k=5,cap=3)"}
    healed, _ = given(model, x, forward="bf16", **options)
    usual, _ = given(model, x, **options)
    assert torch.equal(healed.outputs, model(x))
    assert not torch.equal(usual.outputs, model(x))
    assert_same(healed.gradients, usual.gradients)
    assert "the forward multiplies the originals" in healed.quantized[0].reason


def test_a_wide_forward_without_a_backward_is_the_plain_model() -> None:
    model = nn.Linear(32, 48)
    result = compile_and_run(model.requires_grad_(False), torch.randn(4, 32), recipe=RECIPE, forward="bf16")
    assert [d.reason for d in result.decisions] == ["forward='bf16': no gradient is computed"]


STOCHASTIC = {"unbiased": "e2m1 block16 absmax stochastic", "nearest": "e2m1 block16 absmax even"}


@pytest.mark.parametrize("kind", STOCHASTIC)
def test_the_mean_of_many_gradients(kind: str) -> None:
    """Stochastic rounding of both operands, rotated: the squared error of a mean of B gradients falls as 1/B. Nearest
    rounding, under signs that do not change, stalls at once.
    """
    text = STOCHASTIC[kind]
    recipe = RECIPE.override({
        "activation": "off", "weight": "off", "gradient": text,
        "wgrad_activation": f"{text}; hadamard(16,signs=fixed)", "dgrad_weight": f"{text}; hadamard(16,signs=fixed)",
    })  # fmt: skip
    copies, layer = 256, nn.Linear(32, 32, bias=False)
    x, w = torch.randn(16, 32), layer.weight.detach()
    dy = torch.randn(16, 32)
    exact = dy.T @ x, dy @ w
    errors = {"dW": [], "dX": []}  # type: ignore[var-annotated]
    step = _gradients(recipe, layer, x, dy)
    found = [step() for _ in range(copies)]
    for name, reference, samples in zip(errors, exact, map(torch.stack, zip(*found, strict=True)), strict=True):
        for size in (1, 16, copies):
            means = samples[: size * (copies // size)].unflatten(0, (-1, size)).mean(1)
            error = (means - reference).square().mean(0).sum() / reference.square().sum()
            errors[name].append(error.item())
        falls = [math.log(a / b) / math.log(16) for a, b in zip(errors[name], errors[name][1:], strict=False)]
        wanted = pytest.approx(1, abs=0.12) if kind == "unbiased" else pytest.approx(0, abs=1e-3)
        assert falls == [wanted] * 2, (name, errors[name])


def _gradients(recipe: Recipe, layer: nn.Linear, x: Tensor, dy: Tensor) -> Any:
    """A call that computes dW and dX of one compiled step."""
    compiled, _ = compiler(layer, recipe)

    def step() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        dw, dx = torch.autograd.grad(compiled(leaf), (layer.weight, leaf), dy)
        return dw, dx

    return step


# --- signs that are drawn ---------------------------------------------------------------------------------------------

DRAWN = "e4m3 block16; hadamard(16,signs=drawn)"
#: All operands of the backward in eight bits, rotated with drawn signs: any two that differ in a sign give noise.
BOTH = {"gradient": "e4m3 block16", "wgrad_activation": DRAWN, "dgrad_weight": DRAWN}


class Shared(nn.Module):
    """Two layers of one input, and a third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.down = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def inner(self, x: Tensor) -> Tensor:
        return x + self.down(self.q(x).relu() * self.k(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Checkpointed(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


def near(found: list[Tensor], exact: list[Tensor]) -> bool:
    return all((a - b).norm() < 0.12 * b.norm() for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("model_class", "again_from"),
    [
        (Shared, "codes"),
        (Checkpointed, "originals"),
        pytest.param(Shared, "originals", marks=pytest.mark.nightly),
        pytest.param(Checkpointed, "codes", marks=pytest.mark.nightly),
    ],
)
def test_both_operands_of_a_product_get_the_signs_of_one_draw(model_class: type[nn.Module], again_from: str) -> None:
    """New ones at every call. The forward draws none, so nothing rotated is among what it saves."""
    model, x = model_class(), inputs()
    options = {**BOTH, "activation": "e4m3 block16", "weight": "e4m3 block16", "again_from": again_from}
    compiled, observations = compiler(model, RECIPE, **options)
    wanted = [x, *model.parameters()]
    exact = torch.autograd.grad(model(x).square().sum(), wanted)
    draws = [torch.autograd.grad(compiled(x).square().sum(), wanted) for _ in range(2)]
    assert all(near(list(found), list(exact)) for found in draws)
    assert not torch.equal(draws[0][1], draws[1][1])
    (observed,) = observations
    reason = observed.plan.decisions[0].reason  # type: ignore[union-attr]
    source = " from its codes" if again_from == "codes" else ""
    assert f"wgrad reads activation again{source} as e4m3 block16 absmax even, and with dY in hadamard(16,sig" in reason


@pytest.mark.nightly
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_signs_through_inductor(budget: float) -> None:
    """Whatever the partitioner may compute again."""
    model, x = Shared(), inputs()
    wanted = [x, *model.parameters()]
    exact = torch.autograd.grad(model(x).square().sum(), wanted)
    options = {**BOTH, "activation": "e4m3 block16", "weight": "e4m3 block16", "defaults": False}
    torch._dynamo.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled = torch.compile(model, backend="qcompile_mxfp8", options=options)
        for _ in range(2):
            assert near(list(torch.autograd.grad(compiled(x).square().sum(), wanted)), list(exact))


def test_codes_that_are_read_again_are_all_that_is_saved() -> None:
    """Of an activation that nobody else keeps: half a byte per element and its scales, not the original."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(x + self.up(x))

    saved = {}
    for again_from in ("originals", "codes"):
        options = {"wgrad_activation": f"{X}; hadamard(16,signs=drawn)", "again_from": again_from}
        (observed,) = compile_and_run(Residual(), inputs(), recipe=RECIPE, **options).observations
        saved[again_from] = sorted(row["dtype"] for row in observed.saved if len(row["shape"]) > 1)
    assert saved == {"originals": ["float32"], "codes": ["float8_e4m3fn", "float8_e4m3fn", "uint8", "uint8"]}
