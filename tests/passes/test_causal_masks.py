"""Masks that are only causal: attention is told so, computes the same, and nothing else loses its mask.

What would break: a model that attends to the future, or outside of its window, because a mask was taken for causal; a
mask that is built in every step although nobody reads it; a report that does not say why attention is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from qcompile import explain
from qcompile.passes import causal_masks as module
from qcompile.passes import constants
from qcompile.passes.causal_masks import CAUSAL, NO_MASK, causal_masks, pattern_of
from qcompile.passes.pass_base import MaskedAttention

from .harness import assert_same, backward, compile_and_run, leaves_of, run_eager

transformers = pytest.importorskip("transformers")

INFINITY = float("inf")


class Rewritten:
    """``function(*inputs)``, compiled with this pass alone and then run as it is: outputs, gradients, and the graph."""

    def __init__(self, function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> None:
        torch._dynamo.reset()

        def backend(gm: GraphModule, _: Any) -> Any:
            self.before = len(gm.graph.nodes)
            self.found = causal_masks(gm)
            self.gm = gm
            return gm.forward

        torch.manual_seed(0)
        self.outputs = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
        self.gradients = backward(self.outputs, leaves_of(function, inputs))
        torch.manual_seed(0)
        expected = run_eager(function, *inputs)
        assert_same((self.outputs, self.gradients), expected)

    @property
    def calls(self) -> list[str]:
        return [str(getattr(n.target, "__name__", n.target)) for n in self.gm.graph.nodes if n.op.startswith("call")]

    @property
    def attention(self) -> list[dict[str, Any]]:
        return [dict(n.kwargs) for n in self.gm.graph.nodes if "scaled_dot_product" in str(n.target)]


def attention(mask: Callable[[Tensor], Tensor], **options: Any) -> Callable[..., Tensor]:
    """A function of q, k and v whose mask is made of q's shape."""
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q), **options)


def operands(queries: int = 7, keys: int = 7, heads: int = 4, kept: int = 4) -> list[Tensor]:
    shapes = ((2, heads, queries, 8), (2, kept, keys, 8), (2, kept, keys, 8))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def in_place(q: Tensor) -> Tensor:
    """As torch's documentation of ``scaled_dot_product_attention`` spells it."""
    bias = torch.zeros(q.shape[-2], q.shape[-2])
    seen = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril(diagonal=0)
    bias.masked_fill_(seen.logical_not(), -INFINITY)
    return bias


def least(q: Tensor) -> Tensor:
    seen = torch.arange(q.shape[-2])[:, None] >= torch.arange(q.shape[-2])
    return torch.where(seen, 0.0, torch.finfo(q.dtype).min)[None, None].expand(q.shape[0], 1, -1, -1)


def mapped(q: Tensor) -> Tensor:
    """Index by index, as transformers builds masks with ``use_vmap``."""
    rows = torch.vmap(lambda i, j: j <= i, (None, 0))
    return torch.vmap(rows, (0, None))(torch.arange(q.shape[-2]), torch.arange(q.shape[-2]))


def packed(q: Tensor) -> Tensor:
    """One sequence in a batch of packed ones, as transformers finds them out from positions."""
    positions = torch.arange(q.shape[-2])[None].expand(q.shape[0], -1)
    sequence = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch, i, j = torch.arange(q.shape[0])[:, None, None, None], torch.arange(q.shape[-2])[:, None], torch.arange(7)
    return (sequence[batch, i] == sequence[batch, j]) & (positions[batch, j] <= positions[batch, i])


def one_bit(row: int, column: int, value: bool) -> Callable[[Tensor], Tensor]:
    def mask(q: Tensor) -> Tensor:
        seen = torch.ones(7, 7, dtype=torch.bool).tril()
        seen[row, column] = value
        return seen

    return mask


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "compared": lambda q: (torch.arange(7)[None, :] <= torch.arange(7)[:, None]).expand(2, 1, 7, 7),
    "tril": lambda q: torch.ones(7, 7, dtype=torch.bool, device=q.device).tril(),
    "not_triu": lambda q: ~torch.triu(q.new_ones(7, 7, dtype=torch.bool), diagonal=1),
    "square": lambda q: nn.Transformer.generate_square_subsequent_mask(7),
    "full_like": lambda q: torch.full_like(q[0, :, :, :7], -INFINITY).triu_(1),
    "least": least,
    "in_place": in_place,
    "assigned": one_bit(3, 3, True),
    "mapped": mapped,
    "packed": packed,
    "cast": lambda q: torch.tril(torch.ones(7, 7)).to(torch.int8).bool().unsqueeze(0),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_causal_mask_becomes_a_flag(spelling):
    result = Rewritten(attention(SPELLINGS[spelling]), *operands())
    assert result.found == [MaskedAttention(CAUSAL)]
    assert result.attention == [{"attn_mask": None, "is_causal": True}]
    # `vmap` begins and ends where it did, around nothing.
    rest = [call for call in result.calls if not call.endswith(("_nesting", "lazy_load_decompositions"))]
    assert rest == ["scaled_dot_product_attention"], "what nobody reads is still computed"


@pytest.mark.parametrize(("queries", "keys"), [(7, 5), (3, 8), (5, 1)])
def test_causal_masks_that_are_not_square_begin_at_the_first_key(queries, keys):
    seen = lambda q: torch.ones(queries, keys, dtype=torch.bool).tril()  # noqa: E731
    result = Rewritten(attention(seen), *operands(queries, keys))
    assert [call.became for call in result.found] == [NO_MASK if keys == 1 else CAUSAL]


@pytest.mark.parametrize(
    "mask", [lambda q: torch.ones(1, 7, dtype=torch.bool), lambda q: torch.zeros(7, 7), lambda q: q.new_zeros(1, 1)]
)
def test_a_mask_that_hides_nothing_is_none(mask):
    result = Rewritten(attention(mask), *operands())
    assert result.found == [MaskedAttention(NO_MASK)]
    assert result.attention == [{"attn_mask": None, "is_causal": False}]


def window(q: Tensor) -> Tensor:
    distance = torch.arange(7)[:, None] - torch.arange(7)
    return (distance >= 0) & (distance < 4)


def one_head(q: Tensor) -> Tensor:
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    return torch.stack([causal, causal, torch.ones_like(causal), causal])


OTHER = "it is neither causal nor all true"
NUMBERS = "it adds other numbers than 0 and −∞"


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (one_bit(3, 4, True), OTHER),
        (one_bit(6, 0, False), OTHER),
        (one_bit(0, 6, True), OTHER),
        (window, OTHER),
        (one_head, OTHER),
        (lambda q: torch.ones(7, 7).tril(), NUMBERS),
        (lambda q: torch.full((7, 7), -1e4).triu(1), NUMBERS),
        (lambda q: torch.rand(7, 7) > -1, "it is computed by rand, which is not evaluated at compile time"),
        (lambda q: torch.arange(7)[:, None] >= torch.arange(7) + 0 * q[0, 0, 0, 0], "it depends on the input q"),
    ],
    ids=["sees_next", "misses_first", "sees_last", "window", "one_head", "ones", "-1e4", "random", "input"],
)
def test_any_other_mask_stays(mask, reason):
    result = Rewritten(attention(mask), *operands())
    assert result.found == [MaskedAttention(reason=f"the mask stays: {reason}")]
    assert len(result.gm.graph.nodes) == result.before


def test_nan_hides_nothing_and_shows_nothing():
    assert pattern_of(torch.full((7, 7), float("nan")).triu(1), 7, 7) == ("", NUMBERS)


def test_the_least_half_is_a_number_that_scores_reach():
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    for dtype, became in [
        (torch.float16, ""),
        (torch.bfloat16, CAUSAL),
        (torch.float32, CAUSAL),
        (torch.float64, CAUSAL),
    ]:
        mask = torch.zeros(5, 5, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        assert pattern_of(mask, 5, 5)[0] == became, dtype


def test_large_masks_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 20)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    assert pattern_of(seen.expand(3, 2, 9, 9), 9, 9) == (CAUSAL, "")
    for row, column in [(8, 0), (7, 8), (4, 5)]:
        other = seen.clone()
        other[row, column] ^= True
        assert pattern_of(torch.stack([seen, other]), 9, 9) == ("", OTHER)


class Masked(nn.Module):
    """A layer whose mask is of its own: a parameter, a buffer, or what the graph has written an input into."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.mask: Any = torch.zeros(7, 7)
        if kind == "parameter":
            self.mask = nn.Parameter(torch.zeros(7, 7))
        elif kind == "buffer":
            del self.mask
            self.register_buffer("mask", torch.zeros(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask
        if self.kind == "written":
            mask = torch.zeros(7, 7)
            mask[0, 1:] = x[0, 0, 0, 0].detach() - INFINITY
        return F.scaled_dot_product_attention(x, x, x, mask)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("parameter", "it depends on the parameter self_parameters_mask"),
        ("buffer", "it depends on the buffer self_buffers_mask, which may change"),
        ("written", "it depends on the input x"),
    ],
)
def test_what_may_change_is_no_constant(kind, reason):
    result = Rewritten(Masked(kind), torch.randn(2, 4, 7, 8, requires_grad=True))
    assert result.found == [MaskedAttention(reason=f"the mask stays: {reason}")]


def test_a_mask_is_what_it_is_when_it_is_read():
    """The second call reads the mask after a write, and the third another one."""

    def function(q: Tensor) -> Tensor:
        mask = torch.ones(7, 7, dtype=torch.bool)
        first = F.scaled_dot_product_attention(q, q, q, mask)
        mask.tril_()
        second = F.scaled_dot_product_attention(q, q, q, mask)
        mask[5, 1] = False
        return first + second + F.scaled_dot_product_attention(q, q, q, mask)

    result = Rewritten(function, torch.randn(2, 4, 7, 8, requires_grad=True))
    assert [call.became for call in result.found] == [NO_MASK, CAUSAL, ""]
    assert {"tril_", "setitem"} < set(result.calls)


def test_one_evaluation_serves_all_layers(monkeypatch):
    def function(q: Tensor) -> Tensor:
        mask = torch.ones(7, 7, dtype=torch.bool).tril()
        for _ in range(3):
            q = F.scaled_dot_product_attention(q, q, q, mask)
        return q

    evaluate = mock.Mock(side_effect=constants.Constants.evaluate)
    monkeypatch.setattr(constants.Constants, "evaluate", lambda *arguments: evaluate(*arguments))
    result = Rewritten(function, torch.randn(2, 4, 7, 8, requires_grad=True))
    assert [call.became for call in result.found] == [CAUSAL] * 3
    assert evaluate.call_count == 1


def test_what_is_too_large_is_not_evaluated(monkeypatch):
    """What is alive at a time counts, and views do not."""

    def mask(q: Tensor) -> Tensor:
        seen = torch.ones(7, 7, dtype=torch.bool)[None].tril()
        return seen.logical_and(seen).logical_or(seen[0]).logical_xor(torch.zeros((), dtype=torch.bool))[0]

    monkeypatch.setattr(constants, "LIMIT", 3 * 7 * 7)
    assert Rewritten(attention(mask), *operands()).found == [MaskedAttention(CAUSAL)]
    monkeypatch.setattr(constants, "LIMIT", 3 * 7 * 7 - 1)
    (call,) = Rewritten(attention(mask), *operands()).found
    assert call.reason.startswith("the mask stays: its evaluation takes")


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_a_dynamic_batch_leaves_the_mask_known():
    def function(q: Tensor) -> Tensor:
        mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(q.shape[0], 1, 7, 7)
        return F.scaled_dot_product_attention(q, q, q, mask)

    q = torch.randn(2, 4, 7, 8, requires_grad=True)
    torch._dynamo.mark_dynamic(q, 0)
    assert Rewritten(function, q).found == [MaskedAttention(CAUSAL)]


def test_a_dynamic_length_proves_nothing():
    def function(q: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, q, q, mask)

    (call,) = Rewritten(function, torch.randn(2, 4, 7, 8, requires_grad=True), dynamic=True).found
    assert call.reason.startswith("the mask stays: a size is symbolic")


# --- calls ----------------------------------------------------------------------------------------------------------

ATEN = torch.ops.aten.scaled_dot_product_attention


CALLS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "positions": (lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), {}),
    "options": (
        lambda q, k, v, m: torch.nn.functional.scaled_dot_product_attention(q, k, v, m, 0.5, scale=0.3),
        {"dropout_p": 0.5, "scale": 0.3},
    ),
    "keywords": (lambda q, k, v, m: F.scaled_dot_product_attention(attn_mask=m, value=v, key=k, query=q), {}),
    "all": (
        lambda q, k, v, m: torch._C._nn.scaled_dot_product_attention(q, k, v, m, 0.0, False, enable_gqa=False),
        {"dropout_p": 0.0, "enable_gqa": False},
    ),
    "packet": (lambda q, k, v, m: ATEN(q, k, v, m, scale=2.0), {"scale": 2.0}),
    "overload": (lambda q, k, v, m: ATEN.default(q, k, v, attn_mask=m), {}),
}


@pytest.mark.parametrize(("call", "kept"), CALLS.values(), ids=CALLS)
def test_every_spelling_of_the_call(call, kept):
    """Whatever else it is given stays. Dropout draws the same numbers: on a CPU it is no part of a fused kernel."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, torch.ones(7, 7, dtype=torch.bool).tril())

    result = Rewritten(function, *operands())
    assert [found.became for found in result.found] == [CAUSAL]
    assert result.attention == [{"attn_mask": None, "is_causal": True, **kept}]


def test_kernels_that_the_user_has_chosen_are_kept():
    def function(q: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, q, q, torch.ones(7, 7, dtype=torch.bool).tril())

    (call,) = Rewritten(function, torch.randn(2, 4, 7, 8, requires_grad=True)).found
    assert call.reason == "the mask stays: the graph chooses its attention kernels itself (sdpa_kernel)"


@pytest.mark.parametrize("kernel", [("", "5, 1"), ("fused", "1, 5")], ids=["not_fused", "laid_out_otherwise"])
def test_a_kernel_that_is_no_replacement(kernel, monkeypatch):
    """Torch may run the call without a mask by another kernel; of its result the graph may take views."""
    kernels = iter([module._Kernel("fused", "5, 1"), module._Kernel(*kernel)])
    monkeypatch.setattr(module._Rewriter, "_kernel", lambda *_: next(kernels))
    (call,) = Rewritten(attention(SPELLINGS["tril"]), *operands()).found
    assert not call.became
    assert "not fused (strides 5, 1)" in call.reason


# --- grouped heads --------------------------------------------------------------------------------------------------


def repeat_kv(x: Tensor, times: int) -> Tensor:
    """As transformers has it."""
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, times, length, width)
    return x.reshape(batch, heads * times, length, width)


REPEATS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "transformers": repeat_kv,
    "flatten": lambda x, times: x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2),
    "interleave": lambda x, times: x.repeat_interleave(times, dim=1),
    "interleave_from_the_end": lambda x, times: torch.repeat_interleave(x, times, -3),
}


def grouped(repeat_key: Callable[[Tensor, int], Tensor], repeat_value: Callable[[Tensor, int], Tensor], **options: Any):
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[1] // k.shape[1]
        mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, repeat_key(k, times), repeat_value(v, times), mask, **options)

    return function


@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
def test_grouped_heads_stay_grouped(repeat):
    result = Rewritten(grouped(repeat, repeat), *operands(heads=6, kept=2))
    assert result.found == [MaskedAttention(CAUSAL, grouped=True)]
    assert result.attention == [{"attn_mask": None, "is_causal": True, "enable_gqa": True}]
    assert result.calls == ["scaled_dot_product_attention"]


@pytest.mark.parametrize(
    "repeat",
    [
        lambda x, times: x.repeat(1, times, 1, 1),
        lambda x, times: x.unsqueeze(1).expand(-1, times, -1, -1, -1).reshape(2, -1, 7, 8),
        lambda x, times: x[:, [0, 0, 1, 1, 0, 1]],
        lambda x, times: x[:, :, None].expand(-1, -1, times, -1, -1).mul(2).flatten(1, 2),
    ],
    ids=["tiled", "axis_before", "picked", "scaled"],
)
@pytest.mark.parametrize("both", [True, False])
def test_heads_that_are_repeated_otherwise_stay(repeat, both):
    result = Rewritten(grouped(repeat if both else repeat_kv, repeat), *operands(heads=6, kept=2))
    assert result.found == [MaskedAttention(CAUSAL)]


def test_heads_stay_repeated_where_grouped_ones_have_no_fused_kernel():
    """With dropout a CPU has none."""
    (call,) = Rewritten(grouped(repeat_kv, repeat_kv, dropout_p=0.5), *operands(heads=6, kept=2)).found
    assert (call.became, call.grouped) == (CAUSAL, False)
    assert call.reason.startswith("the heads stay repeated: grouped, it would run no fused kernel")


# --- bodies ---------------------------------------------------------------------------------------------------------


def test_checkpointed_layers_read_the_mask_of_the_model():
    """The mask is an argument of their bodies; after AOTAutograd it is in no graph."""

    def layer(q: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, mask) + q

    def function(x: Tensor, w: Tensor) -> Tensor:
        q = F.linear(x, w).view(2, 40, 4, 8).transpose(1, 2)
        mask = torch.ones(40, 40, dtype=torch.bool).tril()
        for _ in range(2):
            q = checkpoint(layer, q, mask, use_reentrant=False)
        return q

    x, w = torch.randn(2, 40, 32, requires_grad=True), nn.Parameter(torch.randn(32, 32))
    results = [compile_and_run(function, x, w, disable_passes=off) for off in ([], ["causal_masks"])]
    assert [call.became for call in results[0].observations[0].masked] == [CAUSAL, CAUSAL]
    assert "tril" not in results[0].program("joint_fuse")
    assert "tril" in results[1].program("joint_fuse")
    assert_same(results[0].outputs, results[1].outputs)
    assert_same(results[0].gradients, results[1].gradients)


# --- whole models ---------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Attention of torch's own, opened by `expand`, under a mask that the graph makes."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(36, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        attended, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return attended


@pytest.mark.parametrize("gradients", [True, False])
def test_multi_head_attention(gradients):
    model, x = Encoder(), torch.randn(2, 5, 36)
    with torch.set_grad_enabled(gradients):
        results = [compile_and_run(model, x, disable_passes=off) for off in ([], ["causal_masks"])]
    assert [observed.masked for result in results for observed in result.observations] == [
        [MaskedAttention(CAUSAL)],
        [],
    ]
    assert_same(results[0].outputs, results[1].outputs)
    assert_same(results[0].gradients, results[1].gradients)


def test_where_nothing_is_quantized_no_bit_changes():
    """The off switch: attention's kernel is torch's choice, too."""
    model, x = Encoder(), torch.randn(2, 5, 36)
    on, off = (compile_and_run(model, x, skip=["*"], disable_passes=names) for names in ([], ["causal_masks"]))
    assert on.observations[0].masked == []
    assert "attn_mask = " in on.program("joint_audit")
    assert torch.equal(on.outputs, off.outputs)
    assert all(torch.equal(on.gradients[name], gradient) for name, gradient in off.gradients.items())


@pytest.fixture
def llama(monkeypatch) -> nn.Module:
    """Two layers with grouped heads, whose mask is built without a condition, as on torch 2.11."""
    monkeypatch.setattr(transformers.masking_utils, "_ignore_causal_mask_sdpa", lambda *_, **__: False)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


class Step(nn.Module):
    def __init__(self, model: nn.Module, use_cache: bool) -> None:
        super().__init__()
        self.model, self.use_cache = model, use_cache

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, labels=ids, use_cache=self.use_cache).loss


@pytest.mark.parametrize(("use_cache", "of_mask"), [(True, 8), (False, 27)])
def test_llama_ends_without_a_mask(llama, use_cache, of_mask):
    """Without a cache the model looks for packed sequences, which makes a longer sub-graph. 6 nodes of every layer
    repeat heads.
    """
    result = Rewritten(Step(llama, use_cache), torch.randint(0, 50, (2, 11)))
    assert result.found == [MaskedAttention(CAUSAL, grouped=True)] * 2
    assert result.before - len(result.gm.graph.nodes) == of_mask + 2 * 6
    assert not {"le", "expand", "masked_fill"} & set(result.calls)


def test_the_report_says_what_became_of_masks(llama):
    ids = torch.randint(0, 50, (2, 11))
    options = {"min_side": 0}
    assert explain(llama.forward, ids, options=options).remarks == [
        "attention with a mask: 2 call(s), of which needed less: 2 is_causal=True; 2 read grouped heads as they are"
    ]
    assert explain(llama, ids, attention_mask=torch.ones_like(ids), options=options).remarks == [
        "attention with a mask: 2 call(s), of which needed less: none; "
        "2: the mask stays: it depends on the input kwargs_attention_mask"
    ]
