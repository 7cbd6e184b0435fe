"""Opening composite calls: their products become sites, and no number changes.

What would break: ``nn.Transformer`` whose projections stay in high precision without anybody noticing; a call traced in
another autocast or gradient mode than it runs in.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from .harness import DISTINCT, compile_and_run


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
