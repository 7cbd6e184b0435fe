"""Which kernel a product with a stored weight is given on a card, and that it is told all about the weight."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile import compat
from qcompile.recipes import STORED
from qcompile.stored import PackedWeight
from tests.passes.harness import Result, assert_same, compile_and_run, leaf, run_eager

NESTED = "nf4 block64 absmax_bnb; nested"
SPECS = [NESTED, "nf4 block64; nested(int8 block128)", "int4 block32", "int4 row", "e2m1 block16 e4m3"]


class Layers(nn.Module):
    def __init__(self, spec: str, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 192, bias=bias), nn.Linear(192, 64, bias=False)
        qcompile.pack_(self, spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


def on_hopper(model: nn.Module, x: torch.Tensor, **options) -> Result:
    """The passes as on a card; what runs is the reference of the ops."""
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        return compile_and_run(model, x, recipe=STORED, **options)


@pytest.mark.parametrize("spec", SPECS)
def test_products_decode_by_themselves_in_both_directions(spec):
    """Nested scales too: no decoder is left in the graph, and no float of the weight's shape in any."""
    model, x = Layers(spec).to(torch.bfloat16), torch.randn(4, 7, 128, dtype=torch.bfloat16, requires_grad=True)
    result = on_hopper(model, x)
    assert [row["provider"] for row in result.gemms] == ["stored"] * 4
    for op, calls in (("mm_stored", 4), ("dequantize", 0), ("quantized_mm", 0)):
        assert result.count(op, "post_grad_lower") == calls, op
    # The two sum in orders of their own and round to bfloat16, the gradient of the hidden layer too.
    assert_same((result.outputs, result.gradients), run_eager(model, x), tolerance=2**-8)


@pytest.mark.parametrize("nested", [True, False])
def test_bytes_of_bitsandbytes_are_read_as_they_lie(nested):
    """Their first code is in the high half: no copy of the codes is made for that."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 128), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    layer, x = layer.to("cpu"), torch.randn(4, 128)
    result = on_hopper(layer, x)
    assert [row["provider"] for row in result.gemms] == ["stored"]
    program = result.program("post_grad_lower")
    assert "bitwise" not in program
    assert "dequantize" not in program
    torch.testing.assert_close(result.outputs, layer(x), rtol=1e-5, atol=1e-5)


def test_float32_products_are_equal_to_rounding():
    """A few rows of float32 have a kernel; more of them, and their gradients, are decoded first."""
    model, x = Layers(NESTED), leaf(8, 128)
    result = on_hopper(model, x)
    assert [row["provider"] for row in result.gemms] == ["stored"] * 2 + ["dequantize + aten"] * 2
    assert result.gemms[2]["reason"] == "with M = 8, decoding before the product is estimated to be faster"
    assert_same((result.outputs, result.gradients), run_eager(model, x))


def test_rows_that_are_counted_at_run_time():
    """One graph serves every batch: the op chooses when it is called."""
    model = Layers(NESTED)
    with torch.no_grad():
        result = on_hopper(model, torch.randn(8, 128), dynamic=True)
    assert [(row["provider"], row["reason"]) for row in result.gemms] == [("stored", "M is known at run time only")] * 2


@pytest.mark.parametrize(
    ("spec", "dtype", "reason"),
    [
        ("int8 row", torch.bfloat16, "int8 has 1 codes per byte, not 2"),
        ("midrise3 block64x64", torch.bfloat16, "scales of block64x64 are not those of rows or blocks of a row"),
        ("int4 block32", torch.float64, "no kernel reads float64"),
    ],
)
def test_what_no_kernel_reads_is_decoded(spec, dtype, reason):
    result = on_hopper(Layers(spec).to(dtype), torch.randn(4, 128, dtype=dtype, requires_grad=True))
    assert result.gemms[0]["provider"] == "dequantize + aten"
    assert reason in result.gemms[0]["reason"]


def test_weights_that_the_graph_quantizes_are_decoded():
    """Their codes are new in every call; nothing is gained by reading them instead of what they are made of."""
    torch.manual_seed(0)
    model = nn.Linear(128, 64)
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        result = compile_and_run(
            model, leaf(4, 128), recipe=STORED.override({"weight": "int4 block32", "activation": "off", "min_side": 0})
        )
    assert "stored" not in [row["provider"] for row in result.gemms]


@pytest.mark.inductor
def test_inductor_calls_the_ops_own_kernel(fresh_dynamo):
    """With optional tensors that are there and that are not, and a number of rows that is not fixed."""
    weight = PackedWeight.of(torch.randn(48, 128), NESTED)
    parts, op = weight.parts, torch.ops.qcompile.mm_stored
    scales = parts["scale_codes"], weight.spec, 128, False, torch.float32, None, parts["second"], parts["offset"]
    compiled = torch.compile(lambda x: torch.relu(op(x, parts["codes"], *scales)), dynamic=True, fullgraph=True)
    for m in (3, 5):
        x = torch.randn(m, 128)
        torch.testing.assert_close(compiled(x), torch.relu(x @ weight.decoded().t()))
