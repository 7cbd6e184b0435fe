"""What is saved for the backward beside codes: tensors that codes are computed from again, attention's operands, and
what a memory budget of torch's leaves.

What would break: codes saved beside the tensors that they were computed from, or computed again into other codes; keys
and values saved once per query head; a mask of −∞ in few bits; a memory budget that takes products for free.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qcompile
from qcompile import compat

from .harness import SMALL_FP4 as FP4
from .harness import Result, compile_and_run, fp4

TOKENS, WIDTH, HIDDEN = 35, 48, 80
#: Of attention; at 32 a mask's rows are long enough to be narrowed.
ROWS = 37
OUTLIERS = {"outliers": "occ(alpha=0.9,residual=e4m3)"}
BUDGET = torch._functorch.config


@pytest.fixture(autouse=True)
def _hopper() -> Any:
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        yield


class GatedMLP(nn.Module):
    """A norm and SwiGLU, as a Llama has them: every operand of a product is computed from what the backward reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Doubled(nn.Linear):
    """What it multiplies is computed, and not read by any derivative."""

    def __init__(self) -> None:
        super().__init__(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class GroupedAttention(nn.Module):
    """Two query heads for every key, a mask with −∞, and projections, in BF16: attention is one op then."""

    def __init__(self, heads: int = 4, head: int = 32) -> None:
        super().__init__()
        self.head = head
        self.q, self.k, self.v = (nn.Linear(64, n * head, bias=False) for n in (heads, heads // 2, heads // 2))
        self.o = nn.Linear(heads * head, 64, bias=False)
        self.bfloat16()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).flatten(2))


def attention_inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, ROWS, 64, dtype=torch.bfloat16, requires_grad=True)
    return x, torch.ones(ROWS, ROWS, dtype=torch.bool).tril()


def of_codes(result: Result) -> int:
    """Bytes of the codes among what is saved, which the rest of the dialect's tensors, float32, are not."""
    return sum(row["bytes"] for row in result.saved if row["dtype"] == "uint8")


def assert_equal(a: Result, b: Result) -> None:
    """The same outputs and gradients, bit for bit."""
    torch.testing.assert_close(a.outputs, b.outputs, rtol=0, atol=0)
    torch.testing.assert_close(a.gradients, b.gradients, rtol=0, atol=0)


@pytest.mark.parametrize("backward", ["bf16", "fp8"])
def test_codes_are_computed_again_from_what_is_saved_anyway(backward: str) -> None:
    """Gate, up and the norm's input are; all that is left of codes are 12 bytes per row, and gradients are the same."""
    torch.manual_seed(0)
    model, x = GatedMLP(), torch.randn(5, 7, WIDTH, requires_grad=True)
    options: dict[str, Any] = {"recipe": fp4(activation=OUTLIERS), "backward": backward}
    again = compile_and_run(model, x, **options)
    saved = compile_and_run(model, x, disable_passes=["recompute_codes"], **options)
    assert_equal(again, saved)
    assert of_codes(again) == 0
    assert of_codes(saved) == TOKENS * (WIDTH + HIDDEN)
    assert saved.saved_bytes - again.saved_bytes == TOKENS * (WIDTH + HIDDEN - 2 * 12)


def test_codes_are_saved_where_their_input_is_not() -> None:
    """Codes are a quarter of the float32 input, which nothing else reads; the forward computes them once."""
    model, x = Doubled(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    result = compile_and_run(model, x, recipe=fp4(activation=OUTLIERS), backward="fp8")
    assert result.saved_bytes == TOKENS * (WIDTH + 4)
    assert result.count("encode_compensated", "joint_recompute_codes") == 1
    assert result.count("encode_compensated", "post_grad_lower") == 0


def test_keys_are_not_saved_for_every_query_head() -> None:
    """Queries and attention's output are as wide as four heads; keys and values as two."""
    x, mask = attention_inputs()
    result = compile_and_run(GroupedAttention(), x, mask, recipe=fp4(activation=OUTLIERS), backward="fp8")
    wide = [row for row in result.saved if row["dtype"] == "bfloat16"]
    heads = sorted(row["bytes"] // (2 * 2 * ROWS * 32) for row in wide if row["shape"][-2:] != [ROWS, ROWS])
    assert heads == [2, 2, 4, 4]


def test_heads_are_narrowed_and_masks_are_not() -> None:
    """Heads lie transposed in memory; a row of a mask would have an infinite scale, and NaN for codes."""
    x, mask = attention_inputs()
    model, recipe = GroupedAttention(), fp4(activation=OUTLIERS)
    exact = compile_and_run(model, x, mask, recipe=recipe, backward="fp8")
    narrowed = compile_and_run(model, x, mask, recipe=recipe, backward="fp8", save="8bit")
    (wide,) = [row for row in narrowed.saved if row["dtype"] == "bfloat16"]
    assert wide["shape"][-2:] == [ROWS, ROWS]
    assert narrowed.saved_bytes < 0.7 * exact.saved_bytes
    for name, gradient in exact.gradients.items():
        cosine = F.cosine_similarity(narrowed.gradients[name].flatten(), gradient.flatten(), dim=0)  # type: ignore
        assert cosine > 0.99, name


def test_narrowed_tensors_do_not_outlive_their_last_use() -> None:
    """Each is encoded next to where it is made and decoded next to where it is read: else all are alive at once."""
    model, x = nn.Sequential(GatedMLP(), GatedMLP()), torch.randn(TOKENS, WIDTH, requires_grad=True)
    result = compile_and_run(model, x, recipe=fp4(activation=OUTLIERS), backward="fp8", save="8bit")
    forward, backward = (result.program(f"post_grad_lower{n}").splitlines() for n in ("", "_2"))

    def first(program: list[str], op: str) -> int:
        return next(i for i, line in enumerate(program) if f"qcompile.{op}.default(" in line)

    last = len(forward) - 1 - first(forward[::-1], "mm_8bit")
    assert first(forward, "quantize") < last
    decoded = [i for i, line in enumerate(backward) if "qcompile.dequantize.default(" in line]
    assert decoded[-1] > first(backward, "mm_8bit")


@pytest.mark.parametrize(("budget", "again"), [(0.7, 2), (0.3, 5)])
def test_a_memory_budget_is_kept_with_few_products(budget: float, again: int) -> None:
    """`torch._functorch.config.activation_memory_budget`: products are not free, so no more are computed again than the
    budget takes, of the nine here, and gradients are the same.
    """
    torch.manual_seed(0)
    model, x = nn.Sequential(*(GatedMLP() for _ in range(3))), torch.randn(TOKENS, WIDTH, requires_grad=True)
    options: dict[str, Any] = {"recipe": fp4(activation=OUTLIERS), "backward": "fp8"}
    everything = compile_and_run(model, x, **options)
    with BUDGET.patch(activation_memory_budget=budget):
        less = compile_and_run(model, x, **options)
    assert_equal(less, everything)
    assert budget - 0.1 < less.saved_bytes / everything.saved_bytes < budget + 0.1
    assert less.count("mm_8bit", "post_grad_lower") - everything.count("mm_8bit", "post_grad_lower") <= again


def test_a_memory_budget_is_told_what_a_product_costs() -> None:
    """Rows of codes by rows of codes, and by columns."""
    quantizer = str(FP4.weight.quantizer)  # type: ignore[union-attr]
    (a, scale_a), (b, scale_b) = (torch.ops.qcompile.quantize(torch.randn(n, 48), quantizer, -1) for n in (6, 10))
    arguments = [a, scale_a], quantizer, 48, False, [b, scale_b], quantizer, 48, True, torch.float32
    with FlopCounterMode(display=False) as counted:
        torch.ops.qcompile.quantized_mm(*arguments)
    assert counted.get_total_flops() == 2 * 6 * 48 * 10


@pytest.mark.inductor
def test_a_memory_budget_with_generated_code() -> None:
    torch.manual_seed(0)
    model, x = GatedMLP(), torch.randn(TOKENS, WIDTH)
    options = {"min_side": 0, "activation": OUTLIERS}
    found = []
    for budget in (1.0, 0.2):
        torch._dynamo.reset()
        with BUDGET.patch(activation_memory_budget=budget):
            compiled = torch.compile(model, backend="qcompile_fp4", options=options)
            with qcompile.saved_bytes(model, x) as saved:
                loss = compiled(x).square().sum()
            model.zero_grad()
            loss.backward()
        found.append((saved.total, [p.grad.clone() for p in model.parameters()]))  # type: ignore[union-attr]
    (most, gradients), (least, same) = found
    assert least < 0.5 * most
    torch.testing.assert_close(same, gradients, rtol=1e-6, atol=1e-6)
