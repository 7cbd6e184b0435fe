"""Derivatives of derivatives, and ``torch.func`` around and inside a compiled model: done right, or refused.

Around a compiled model, ``torch.func`` never reaches a backend: Dynamo does not compile a frame under an active
transform. It runs the model as it is, unquantized, or raises under ``fullgraph=True``. That is torch's behaviour with
every backend; the tests hold it fixed so that a change is noticed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.passes.pass_base import Observations

from .passes.harness import SMALL_FP4

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def compiled(function, **kwargs):
    """``function`` compiled, and the list that one plan per sub-graph arrives in."""
    seen: list[Observations] = []

    def backend(gm, inputs, **options):
        seen.append(Observations())
        return compile_with(
            SMALL_FP4, gm, inputs, observe=seen[-1], inner_compile=compat.eager_inner_compile, **options
        )

    return torch.compile(function, backend=backend, **kwargs), seen


def decisions(seen: list[Observations]):
    return [d for observed in seen if observed.plan for d in observed.plan.decisions]


DOUBLE = r"^torch\.compile with aot_autograd does not currently support double backward$"


def test_double_backward_is_refused():
    """The gradient penalty of a GAN: the backward is compiled code without a derivative."""
    call, _ = compiled(Mlp())
    x = torch.randn(5, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=DOUBLE):
        gradient.square().sum().backward()


def test_double_backward_is_refused_where_the_gradient_is_taken_inside():
    model = Mlp()
    x = torch.randn(5, 24, requires_grad=True)

    def penalty(x):
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return gradient.square().sum()

    call, _ = compiled(penalty)
    with pytest.raises(RuntimeError, match=DOUBLE):
        call(x).backward()


def test_a_second_backward_needs_retain_graph():
    """As in eager mode; what was saved are codes, and they give the same gradients twice."""
    model = Mlp()
    call, _ = compiled(model)
    loss = call(torch.randn(5, 24)).square().sum()
    loss.backward(retain_graph=True)
    first = model.up.weight.grad.clone()
    loss.backward()
    assert torch.equal(model.up.weight.grad, 2 * first)
    with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph a second time"):
        loss.backward()


AROUND = {
    "vmap": lambda f: torch.func.vmap(f),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1],
    "jacrev": lambda f: lambda x: torch.func.jacrev(f)(x[0]),
}


@pytest.mark.parametrize("name", AROUND)
def test_a_transform_around_a_compiled_model_runs_it_uncompiled(name):
    model, x = Mlp(), torch.randn(5, 24)
    call, seen = compiled(model)
    assert torch.equal(AROUND[name](call)(x), AROUND[name](model)(x))
    assert not seen


@pytest.mark.parametrize("name", AROUND)
def test_a_transform_around_a_compiled_model_is_refused_under_fullgraph(name):
    call, _ = compiled(Mlp(), fullgraph=True)
    with pytest.raises(Unsupported, match=r"functorch"):
        AROUND[name](call)(torch.randn(5, 24))


@pytest.mark.parametrize("name", AROUND)
def test_products_inside_a_transform_are_left_alone_and_reported(name):
    model, x = Mlp(), torch.randn(5, 24)
    call, seen = compiled(AROUND[name](model))
    torch.testing.assert_close(call(x), AROUND[name](model)(x))
    found = decisions(seen)
    assert found
    assert {(d.quantized, d.reason) for d in found} == {
        (False, "inside a torch.func transform (vmap, grad): estimators do not compose with it")
    }


def test_gradients_of_each_sample_inside_a_compiled_function():
    """The usual differential-privacy recipe, in high precision."""
    model, x = Mlp(), torch.randn(5, 24)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    call, seen = compiled(each)
    torch.testing.assert_close(call(parameters, x), each(parameters, x))
    assert decisions(seen)
    assert not any(d.quantized for d in decisions(seen))


def test_functional_call_is_quantized():
    """Stateless, but no transform: parameters come as arguments and are still weights."""
    model, x = Mlp(), torch.randn(5, 24)
    plain, seen = compiled(model)
    expected = plain(x)
    assert all(d.quantized for d in decisions(seen))
    call, seen = compiled(lambda p, x: torch.func.functional_call(model, p, (x,)))
    assert torch.equal(call(dict(model.named_parameters()), x), expected)
    assert [d.quantized for d in decisions(seen)] == [True, True]


def test_forward_mode_is_refused():
    model, x = Mlp(), torch.randn(5, 24)
    call, _ = compiled(model)
    call(x)
    forward_ad = torch.autograd.forward_ad
    with (
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match=r"jvp function for custom autograd\.Function"),
    ):
        call(forward_ad.make_dual(x, x))
