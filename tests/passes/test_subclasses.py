"""Operands that are no plain tensors: wrappers stay wide with a reason, plain data under another class is quantized."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import qcompile
from qcompile.passes.subclasses import obstacle_of_class

from .harness import QuantizedProducts, assert_same, compile_and_run, compiler


def int8_weights() -> tuple[nn.Module, Tensor, str]:
    torchao = pytest.importorskip("torchao.quantization")
    layer = nn.Sequential(nn.Linear(32, 24))
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())
    return layer, torch.randn(6, 32), f"the weight is an {type(layer[0].weight).__name__}"


def two_weights() -> tuple[nn.Module, Tensor, str]:
    layer = nn.Linear(32, 24)
    layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), 2 * layer.weight.detach()))
    return layer, torch.randn(6, 32), "the weight is a TwoTensor"


def two_activations() -> tuple[nn.Module, Tensor, str]:
    return nn.Linear(32, 24), TwoTensor(torch.randn(6, 32), torch.randn(6, 32)), "an operand is a TwoTensor"


@pytest.mark.parametrize("given", [int8_weights, two_weights, two_activations])
def test_wrappers_stay_wide(given):
    """What eager computes, where quantizing them would raise or read one of two tensors; and the class is named."""
    torch.manual_seed(0)
    layer, x, reason = given()
    compiled, observations = compiler(layer)
    with torch.no_grad():
        actual, expected = compiled(x), layer(x)
    assert type(actual) is type(expected)
    parts = (lambda y: [y.a, y.b]) if isinstance(expected, TwoTensor) else lambda y: [y]
    assert_same(parts(actual), parts(expected), tolerance=1e-6)
    (decision,) = observations[0].plan.decisions
    assert decision.reason == f"{reason}, a tensor subclass: it multiplies in its own way"
    assert decision.site.shape == ((6, 32), (24, 32))


class Labelled(Tensor):
    """Plain data of a class of its own, as torchvision's images are."""


@pytest.mark.xfail(
    torch.__version__ < "2.13",
    raises=TypeError,
    strict=True,
    reason="torch 2.11 runs a compiled graph with the subclass's __torch_function__, and AOTAutograd's check of custom "
    "ops then refuses the class: a torch.library.custom_op fails alike under aot_eager",
)
def test_plain_data_of_another_class_is_quantized():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 24), torch.randn(6, 32)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Labelled))
    result = compile_and_run(layer, x)
    twin = nn.Linear(32, 24)
    twin.load_state_dict({name: p.detach().as_subclass(Tensor) for name, p in layer.named_parameters()})
    with QuantizedProducts():
        expected = twin(x)
    assert len(result.quantized) == 1
    assert_same(result.outputs.as_subclass(Tensor).detach(), expected.detach())


def test_plain_tensors_have_no_obstacle():
    with FakeTensorMode():
        assert obstacle_of_class([torch.randn(2), nn.Parameter(torch.randn(2))]) == ""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48)
        self.drop, self.patches = nn.Dropout(0.1), nn.Conv2d(3, 48, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(self.patches(x).flatten(2).mT))).relu()


@pytest.mark.parametrize("backend", ["qcompile_fp4", "qcompile_quest"])
@pytest.mark.parametrize("device", [lambda: torch.device("meta"), FakeTensorMode], ids=["meta", "fake"])
def test_without_data(device, backend, fresh_dynamo):
    """The report is that of real tensors, bytes included; forward and backward have the right shapes."""
    expected = qcompile.explain(Small(), torch.randn(2, 3, 16, 16), backend=backend)
    with device():
        model, x = Small(), torch.randn(2, 3, 16, 16)
        report = qcompile.explain(model, x, backend=backend)
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
        y.sum().backward()
    told = [
        [(row.layer, row.role, row.formats, row.estimator, row.saved_bytes, row.decision) for row in r.rows]
        for r in (report, expected)
    ]
    assert told[0] == told[1]
    assert report.saved == expected.saved
    assert sum(row.saved_bytes for row in report.rows) > 0
    assert y.shape == (2, 16, 48)
    for parameter in model.parameters():
        assert type(parameter.grad) is type(y)
        assert parameter.grad.shape == parameter.shape
