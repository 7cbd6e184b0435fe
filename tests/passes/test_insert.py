"""Sharing of one quantization between products, and what must end it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.passes.pass_base import Observations

from .harness import SMALL_FP4 as FP4


class TwoReaders(nn.Module):
    """Two products of one tensor with something in between."""

    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(24, 8), nn.Linear(24, 8), between

    def forward(self, x):
        x = x * 1.0
        a = self.first(x)
        self.between(x)
        return a + self.second(x)


def quantized_activations(between) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How often the input was quantized, the compiled output and the output of the same products run eagerly."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, observed = TwoReaders(between), torch.randn(5, 24), Observations()

    def backend(gm, inputs):
        return compile_with(FP4, gm, inputs, observe=observed, inner_compile=compat.eager_inner_compile)

    def quantized(layer, x):
        fake = torch.ops.qcompile.fake_quantize
        return F.linear(fake(x, str(FP4.activation), -1), fake(layer.weight, str(FP4.weight), -1), layer.bias)

    with torch.no_grad():
        actual = torch.compile(model, backend=backend, fullgraph=True)(x)
        y = x * 1.0
        expected = quantized(model.first, y)
        between(y)
        expected = expected + quantized(model.second, y)
    return observed.programs["dynamo_insert"].count("occ("), actual, expected


@pytest.mark.parametrize(
    "mutate",
    [
        lambda x: x.add_(1),
        lambda x: x.__setitem__(0, 2.0),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.silu(x, True),
        lambda x: F.relu_(x),
        lambda x: torch.relu_(x),
        lambda x: nn.ReLU(inplace=True)(x),
        lambda x: nn.init.zeros_(x),
        lambda x: torch.add(x, 1, out=x),
        lambda x: torch.ops.aten.mul_.Tensor(x, 3.0),
    ],
    ids=["add_", "setitem", "relu", "silu", "relu_", "torch.relu_", "module", "init", "out", "aten"],
)
def test_a_mutation_between_two_readers_starts_afresh(mutate):
    """Reusing the codes from before would hand the second product the old values, silently."""
    count, actual, expected = quantized_activations(mutate)
    assert count == 2
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("read", [lambda x: x.sum(), F.relu, lambda x: x.view(-1)], ids=["sum", "relu", "view"])
def test_a_reader_in_between_does_not_end_the_sharing(read):
    count, actual, expected = quantized_activations(read)
    assert count == 1
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


DGE = FP4.override({"weight": "e2m1 row absmax even; dge"})
WRITES = {
    "into it": lambda w: w.fill_(0.25),
    "by a positional flag": lambda w: F.silu(w, True),
    "through a view": lambda w: w.t().add_(1),
    "into a row": lambda w: w.__setitem__(0, 2.0),
    "as out": lambda w: torch.add(w.detach(), 1, out=w.detach()),
}


def compiled_with_dge(program, *arguments) -> tuple[tuple, Observations]:
    torch._dynamo.reset()
    observed = Observations()

    def backend(gm, inputs):
        return compile_with(DGE, gm, inputs, observe=observed, inner_compile=compat.eager_inner_compile)

    return torch.compile(program, backend=backend, fullgraph=True)(*arguments), observed


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("computed", [lambda p: p * 0.5, lambda p: (p * 0.5)[2:]], ids=["all", "part"])
def test_a_weight_with_a_slope_may_change_after_its_product(write, computed):
    """Where x has no gradient, eager torch saves nothing of the weight. The estimator does: the value multiplied."""
    torch.manual_seed(0)
    x, parameter = torch.randn(5, 24), nn.Parameter(torch.randn(8, 24))

    def product(x, p):
        w = computed(p)
        y = F.linear(x, w)
        write(w)
        return y, w

    def quantized(x, w):
        fake = torch.ops.qcompile.fake_quantize
        return F.linear(fake(x, str(DGE.activation), -1), fake(w, str(DGE.weight), -1))

    def gradient(y):
        return torch.autograd.grad(y.square().sum(), parameter)[0]

    product(x, parameter)[0].sum().backward()  # eager torch takes it
    (y, changed), observed = compiled_with_dge(product, x, parameter)
    assert len(observed.plan.quantized) == 1
    torch.testing.assert_close(changed, product(x, parameter)[1])
    torch.testing.assert_close(gradient(y), gradient(quantized(x, computed(parameter))), rtol=1e-5, atol=1e-5)


def test_a_weight_that_nothing_changes_later_is_not_copied():
    def product(x, p):
        return F.linear(x, (p * 0.5).mul_(2))

    _, observed = compiled_with_dge(product, torch.randn(5, 24), nn.Parameter(torch.randn(8, 24)))
    assert len(observed.plan.quantized) == 1
    assert "clone" not in observed.programs["dynamo_insert"]
