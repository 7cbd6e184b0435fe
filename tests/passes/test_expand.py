"""Opening composite calls, attention and recurrent cells: their products become sites, and no number changes.

What would break: ``nn.Transformer`` whose projections stay in high precision without anybody noticing; a call traced in
another autocast or gradient mode than it runs in.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule

from qcompile.passes.expand import expand
from qcompile.passes.find_gemms import find_gemms
from qcompile.passes.names import Names

from .harness import ACTIVATION, DISTINCT, WEIGHT, assert_same, backward, compile_and_run, fake_quantize, leaves_of


class Attention(nn.Module):
    """Self- or cross-attention between two linear layers; ``weights`` asks for the attention weights as well."""

    def __init__(self, context: bool = False, weights: bool = False, **options) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(20, 36), nn.Linear(36, 7)
        self.attention = nn.MultiheadAttention(36, 3, batch_first=True, **options)
        self.context, self.weights = context, weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        source = x[:, :3] if self.context else x
        attended, weights = self.attention(x, source, source, need_weights=self.weights)
        return self.after(attended) if weights is None else self.after(attended) * weights.sum(-1, keepdim=True)


def decisions(model: nn.Module, **options) -> list[tuple[str, str, bool]]:
    result = compile_and_run(model, torch.randn(2, 5, 20), recipe=DISTINCT, **options)
    return [(d.site.name, d.site.op, d.quantized) for d in result.decisions]


def test_projections_are_sites_and_attention_is_not():
    assert decisions(Attention()) == [
        ("before", "linear", True),
        ("attention.in_proj_weight", "linear", True),
        ("attention", "sdpa", False),
        ("attention.out_proj", "linear", True),
        ("after", "linear", True),
    ]


def test_the_packed_weight_of_cross_attention_is_one_weight_in_two_parts():
    found = decisions(Attention(context=True, weights=True))
    assert [name for name, op, quantized in found if op == "linear" and quantized] == [
        "before",
        "attention.in_proj_weight",
        "attention.in_proj_weight",
        "attention.out_proj",
        "after",
    ]
    assert [quantized for _, op, quantized in found if op == "bmm"] == [False, False]


@pytest.mark.parametrize(
    ("model", "dynamic", "autocast"),
    [
        (Attention(), False, False),
        (Attention(), True, True),
        (Attention(context=True, weights=True), True, False),
        (Attention(add_bias_kv=True, add_zero_attn=True, bias=False), False, True),
        (Attention(context=True, kdim=36, vdim=36, dropout=0.3), False, False),
    ],
    ids=["self", "dynamic_autocast", "dynamic_cross", "bias_kv_autocast", "dropout"],
)
def test_opening_a_call_changes_no_bit(model, dynamic, autocast):
    """With every site skipped, loss and gradients are those of the graph as Dynamo captured it."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return self.model(x)

    x = torch.randn(2, 5, 20, requires_grad=True)
    results = []
    for disabled in ([], ["expand"]):
        torch.manual_seed(0)
        results.append(
            compile_and_run(Cast(), x, recipe=DISTINCT, skip=["*"], disable_passes=disabled, dynamic=dynamic)
        )
    opened, closed = results
    assert len(opened.decisions) > len(closed.decisions)
    assert opened.outputs.dtype == closed.outputs.dtype
    assert torch.equal(opened.outputs, closed.outputs)
    assert opened.gradients.keys() == closed.gradients.keys()
    for name, gradient in closed.gradients.items():
        assert (gradient is None) == (opened.gradients[name] is None)
        assert gradient is None or torch.equal(opened.gradients[name], gradient), name


class Recurrence(nn.Module):
    """A cell called for every step of [batch, time, features]."""

    def __init__(self, cell: type[nn.RNNCellBase], **options) -> None:
        super().__init__()
        self.cell = cell(20, 12, **options)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return torch.cat(state) if isinstance(state, tuple) else state


CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {"bias": False}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu"})]


def products(cell: nn.RNNCellBase, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """W·x + b and U·h + b of operands quantized by hand."""
    inputs = ((x, cell.weight_ih, "bias_ih"), (h, cell.weight_hh, "bias_hh"))
    first, second = (
        F.linear(fake_quantize(v, ACTIVATION, -1), fake_quantize(w, WEIGHT, -1), getattr(cell, b)) for v, w, b in inputs
    )
    return first, second


def by_hand(model: Recurrence, x: Tensor) -> Tensor:
    """The equations of PyTorch's documentation, on products of operands quantized by hand."""
    cell = model.cell
    h = c = torch.zeros(x.shape[0], cell.hidden_size)
    for step in x.unbind(1):
        inner, outer = products(cell, step, h)
        if isinstance(cell, nn.LSTMCell):
            i, f, g, o = (inner + outer).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif isinstance(cell, nn.GRUCell):
            (r, z, n), (hr, hz, hn) = inner.chunk(3, 1), outer.chunk(3, 1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            n = (n + r * hn).tanh()
            h = (1 - z) * n + z * h
        else:
            h = (inner + outer).tanh() if cell.nonlinearity == "tanh" else (inner + outer).relu()
    return torch.cat((h, c)) if isinstance(cell, nn.LSTMCell) else h


@pytest.mark.parametrize(("cell", "options"), CELLS, ids=["lstm", "gru", "rnn", "relu"])
def test_both_products_of_a_cell_are_quantized(cell, options):
    model, x = Recurrence(cell, **options), torch.randn(5, 3, 20, requires_grad=True)
    result = compile_and_run(model, x, recipe=DISTINCT)
    assert [d.site.op for d in result.decisions] == ["linear"] * 6
    # What the first step multiplies its state with are zeros that the graph makes.
    assert [d.site.name for d in result.decisions if not d.quantized] == ["cell.weight_hh"]
    assert {d.site.name for d in result.quantized} == {"cell.weight_ih", "cell.weight_hh"}
    expected = by_hand(model, x)
    assert_same(result.outputs, expected)
    assert_same(result.gradients, backward(expected, leaves_of(model, (x,))))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("cell", "options"), CELLS, ids=["lstm", "gru", "rnn", "relu"])
def test_opening_a_cell_changes_no_bit(cell, options, autocast):
    model, x = Recurrence(cell, **options), torch.randn(5, 3, 20, requires_grad=True)

    def cast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=autocast)

    results = [
        compile_and_run(model, x, recipe=DISTINCT, under=cast, skip=["*"], disable_passes=disabled)
        for disabled in ([], ["expand"])
    ]
    opened, closed = results
    assert {d.site.op for d in opened.decisions} == {"linear"} != {d.site.op for d in closed.decisions}
    assert torch.equal(opened.outputs, closed.outputs)
    for name, gradient in closed.gradients.items():
        assert torch.equal(opened.gradients[name], gradient), name


def test_on_cuda_the_products_of_a_cell_stand_before_its_fused_kernel():
    """There an LSTM cell is two products and one kernel; opened without a card, on fake tensors."""
    with FakeTensorMode():
        shapes = ((5, 20), (5, 12), (5, 12), (48, 20), (48, 12), (48,), (48,))
        values = [torch.empty(shape, device="cuda") for shape in shapes]
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for node, value in zip(nodes, values, strict=True):
        node.meta["example_value"] = value
    x, h, c, *weights = nodes
    call = graph.call_function(torch.lstm_cell, (x, (h, c), *weights))
    graph.output(tuple(graph.call_function(operator.getitem, (call, i)) for i in range(2)))
    gm = GraphModule({}, graph)
    assert expand(gm) == 1
    sites = find_gemms(gm, Names(gm, None))
    assert [site.op for site in sites] == ["matmul", "matmul"]
    assert torch.ops.aten._thnn_fused_lstm_cell.default in {node.target for node in gm.graph.nodes}


def test_under_autocast_the_projections_read_16_bits():
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Attention()

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.model(x)

    result = compile_and_run(Cast(), torch.randn(2, 5, 20), recipe=DISTINCT)
    assert {d.site.node.meta["example_value"].dtype for d in result.decisions} == {torch.bfloat16}


def test_without_gradients_the_same_operands_are_quantized():
    model, x = Attention(), torch.randn(2, 5, 20)
    training = decisions(model)
    with torch.no_grad():
        result = compile_and_run(model, x, recipe=DISTINCT)
    assert [(d.site.name, d.site.op, d.quantized) for d in result.decisions] == training


def test_the_fused_inference_path_of_the_encoder_layer_is_named():
    """Out of torch's hands the layer is one op in inference; it must not read as having no products."""
    model = nn.TransformerEncoderLayer(36, 4, 20, batch_first=True).eval()  # an odd number of heads is not fused
    with torch.no_grad():
        result = compile_and_run(model, torch.randn(2, 5, 36), recipe=DISTINCT)
    ((site, reason),) = [(d.site, d.reason) for d in result.decisions]
    assert site.op == "transformer_encoder_layer"
    assert "set_fastpath_enabled" in reason
