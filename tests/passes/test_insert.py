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
