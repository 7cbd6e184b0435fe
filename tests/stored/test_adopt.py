"""Models with bitsandbytes' 4-bit layers, compiled as they are."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from qcompile.recipes import STORED
from tests.passes.harness import compile_and_run, compiler, leaf, run_eager
from tests.stored.adapters import adapted, in_4_bits, language_model, loss_and_gradients
from tests.stored.test_peft import worst

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("nested", [True, False])
def test_peft_on_bitsandbytes_layers_is_products_of_codes(nested):
    """The first q, k and v read an input without a gradient and are bare ops; the others are functions with a backward
    of their own. All of them multiply by codes in both directions, and numbers are bitsandbytes' eager ones.
    """
    pytest.importorskip("peft")
    model = adapted(in_4_bits(language_model(num_hidden_layers=1), nested=nested))
    expected_loss, expected = loss_and_gradients(model)
    compiled, (observed,) = run(model)
    loss, gradients = compiled
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert worst(gradients, expected) < 1e-6
    assert not observed.unaccounted
    products = Counter((row["role"], row["fused"]) for row in observed.gemms)
    assert (products["fprop", True], products["dgrad", True]) == (7, 4)
    reasons = Counter(d.reason.partition(";")[0] for d in observed.plan.decisions)
    assert reasons["weight stored as nf4 block64 absmax_bnb even"] == 7
    saved = {tuple(row["shape"]) for row in observed.saved}
    for rows, size in ((128, 128), (64, 128), (256, 128), (128, 256)):
        wide_or_copied = {(rows, size), (size, rows), (rows, size // 2), (rows, size // 64)}
        assert not saved & wide_or_copied


def run(model):
    compiled, observations = compiler(model, STORED)
    return loss_and_gradients(model, compiled), observations


class Layer(nn.Module):
    def __init__(self, size: int = 128, kind: str = "fp4", bias: bool = True) -> None:
        super().__init__()
        wide = nn.Linear(size, 64, bias=bias)
        self.layer = bnb.nn.Linear4bit(size, 64, bias=bias, compute_dtype=torch.float32, quant_type=kind)
        self.layer.weight = bnb.nn.Params4bit(wide.weight.data, requires_grad=False, quant_type=kind)
        self.layer.bias = wide.bias
        self.layer.to("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def test_fp4_with_a_bias_that_trains():
    model, x = Layer(), leaf(5, 128)
    result = compile_and_run(model, x, recipe=STORED)
    outputs, gradients = run_eager(model, x)
    torch.testing.assert_close(result.outputs, outputs, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(result.gradients[name], gradient, rtol=1e-5, atol=1e-6)
    assert result.fused() == Counter(fprop=1, dgrad=1)


@pytest.mark.parametrize(("dtype", "read"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(dtype, read, inside):
    """In a graph bitsandbytes' op computes in compute_dtype whatever autocast says; a linear layer in its place would
    not, and would return another dtype than what follows has been told.
    """
    model, x = Layer(kind="nf4", bias=False), torch.randn(5, 128)
    model.layer.compute_dtype = dtype

    def under():
        return torch.autocast("cpu", torch.bfloat16)

    def call(x):
        with under():
            return model(x)

    result = compile_and_run(call if inside else model, x, recipe=STORED, under=nullcontext if inside else under)
    assert bool(result.quantized) == read
    assert result.outputs.dtype == call(x).dtype
    torch.testing.assert_close(result.outputs, call(x), rtol=2**-6, atol=2**-8)


def test_inside_a_checkpointed_region():
    """There the bytes are placeholders of a body, and the code of scales is read from the argument behind one."""
    model, x = Layer(kind="nf4"), leaf(5, 128)
    result = compile_and_run(
        lambda x: torch.utils.checkpoint.checkpoint(lambda x: model(x * 2).sin(), x, use_reentrant=False),
        x,
        recipe=STORED,
    )
    expected = model(x * 2).sin()
    torch.testing.assert_close(result.outputs, expected, rtol=1e-5, atol=1e-6)
    assert all(row["fused"] for row in result.gemms)
    assert {row["role"] for row in result.gemms} == {"fprop", "dgrad"}


def test_blocks_that_run_through_rows_are_left_to_bitsandbytes():
    """And the report says that the op is opaque; another code of scales than bitsandbytes' own is one more reason."""
    model, x = Layer(size=96), torch.randn(5, 96)
    result = compile_and_run(model, x, recipe=STORED)
    assert not result.quantized
    assert "opaque op of bitsandbytes" in result.decisions[0].reason
    torch.testing.assert_close(result.outputs, model(x))
    other = Layer()
    other.layer.weight.quant_state.state2.code = other.layer.weight.quant_state.state2.code * 2
    assert not compile_and_run(other, torch.randn(5, 128), recipe=STORED).quantized
