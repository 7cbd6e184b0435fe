"""The joint graph: sharing, quantized gradients, fusion, and what the backward is given to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from qcompile.passes.verify import VerificationError, verify
from qcompile.report import saved_bytes

from .harness import (
    DISTINCT,
    QuantizedProducts,
    Result,
    assert_same,
    compile_and_run,
    compiler,
    fp4,
    run_eager,
)
from .harness import SMALL_FP4 as FP4


class MLP(nn.Module):
    """Two linear layers: two fprop products, two wgrad, and one dgrad, since nothing asks for dL/dx."""

    def __init__(self, width: int = 128, hidden: int = 192) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def measured(model: nn.Module, *inputs: Any, **options: Any) -> int:
    """Bytes autograd keeps for the backward of one compiled call."""
    compiled, _ = compiler(model, FP4, **options)
    with saved_bytes(model, *inputs) as saved:
        compiled(*inputs)
    return saved.total


def against_reference(model: nn.Module, *inputs: Any, recipe: Any = FP4, **reference: Any) -> Result:
    """Compile, and compare outputs and every gradient with eager torch on operands quantized by hand."""
    result = compile_and_run(model, *inputs, recipe=recipe)
    outputs, gradients = run_eager(model, *inputs, under=lambda: QuantizedProducts(recipe, **reference))
    assert_same(result.outputs, outputs)
    assert_same(result.gradients, gradients)
    return result


# --- estimators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["ste", "clip", "trust", "dge(k=5,cap=3)"])
@pytest.mark.parametrize(
    "operand", ["e2m1 row e8m0 even", "midrise4 block16 absmax even", "e3m0 tensor absmax_pow2 half_up"]
)
def test_gradients_of_every_estimator(operand: str, estimator: str) -> None:
    """On both operands; an E8M0 scale puts elements outside the grid, where the estimators differ most."""
    recipe = fp4(activation=f"{operand}; {estimator}", weight=f"{operand}; {estimator}")
    against_reference(MLP(37, 21), torch.randn(3, 5, 37, requires_grad=True), recipe=recipe)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": {"outliers": "occ(compensate=0)"}},
        {"activation": {"outliers": "occ(alpha=0.9,per=tensor)"}},
        {"activation": "e2m1 block16 e4m3 even", "weight": "e2m1 block16 e4m3 even"},
        {"activation": "e2m1 block16x16", "weight": "e2m1 block16x16"},
        {"weight": None},
        {"activation": None},
    ],
    ids=str,
)
def test_gradients_of_recipes(options: dict[str, Any]) -> None:
    against_reference(MLP(37, 130), torch.randn(3, 5, 37, requires_grad=True), recipe=fp4(**options))


# --- one quantization for all consumers -----------------------------------------------------------------------------


def _plain(x: Tensor, k: nn.Linear) -> Tensor:
    return k(x)


def _in_place(x: Tensor, k: nn.Linear) -> Tensor:
    x.mul_(2)
    return k(x)


def _through_a_view(x: Tensor, k: nn.Linear) -> Tensor:
    x.view(-1).mul_(2)
    return k(x)


def _item_assignment(x: Tensor, k: nn.Linear) -> Tensor:
    x[0] = 1.0
    return k(x)


def _augmented(x: Tensor, k: nn.Linear) -> Tensor:
    x += 1.0
    return k(x)


def _no_grad(x: Tensor, k: nn.Linear) -> Tensor:
    with torch.no_grad():
        return k(x)


def _autocast(x: Tensor, k: nn.Linear) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return k(x).float()


class Projections(nn.Module):
    def __init__(self, between: Callable[[Tensor, nn.Linear], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 48) for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (64,))
        return self.q(x) + self.between(x, self.k) + self.v(x)


@pytest.mark.parametrize(
    ("between", "times"),
    [
        (_plain, 1),
        (_in_place, 2),
        (_through_a_view, 2),
        (_item_assignment, 2),
        (_augmented, 3),  # Python's ``+=`` rebinds a name in the callee: the caller goes on with another node
        (_no_grad, 3),
        (_autocast, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_quantization_serves_all_consumers(between: Callable[..., Tensor], times: int) -> None:
    """An in-place write, or another mode, between two consumers starts afresh; sharing across it would be wrong numbers
    or wrong gradients."""
    model, x = Projections(between), torch.randn(9, 64)
    # Products under no_grad stay wide in a training graph unless a rule speaks for them.
    result = compile_and_run(model, x, rules=[{"name": "*", "quantize": True}])
    activations = [
        line
        for line in result.program("dynamo_insert").splitlines()
        if "fake_quantize.default(" in line and "occ(" in line
    ]
    assert len(activations) == times
    outputs, gradients = run_eager(model, x, under=lambda: QuantizedProducts(FP4))
    assert_same(result.outputs, outputs, 2**-8 if between is _autocast else 2e-5)
    assert_same(result.gradients, gradients, 2**-8 if between is _autocast else 2e-5)


def test_shared_codes_are_saved_once() -> None:
    result = compile_and_run(Projections(_plain), torch.randn(9, 64))
    assert len([r for r in result.saved if r["codes"] and r["shape"] == [9, 32]]) == 1


# --- quantized gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["e5m2 tensor absmax even", "e4m3 row", "e2m1 block16 e4m3 even", "midrise8 block32 e8m0"]
)
@pytest.mark.parametrize("roles", [("dgrad", "wgrad"), ("wgrad",), ("dgrad",)], ids="+".join)
def test_quantized_gradients(text: str, roles: tuple[str, ...]) -> None:
    """dgrad contracts dY over features and wgrad over tokens; each takes its scales along its own axis."""
    recipe = fp4(rules=[{"gradient": text, "roles": list(roles)}])
    operands = {role: text if role in roles else None for role in ("dgrad", "wgrad")}
    result = against_reference(MLP(37, 50), torch.randn(3, 7, 37, requires_grad=True), recipe=recipe, **operands)
    per_tensor = "tensor" in text
    assert result.count("quantize") == 4 + 2 * (1 if per_tensor else len(roles))


def test_fp8_gradient_is_quantized_once_for_dgrad_and_wgrad() -> None:
    result = against_reference(
        MLP(37, 50),
        torch.randn(21, 37, requires_grad=True),
        recipe=fp4(gradient="fp8"),
        dgrad="e5m2 tensor absmax even",
        wgrad="e5m2 tensor absmax even",
    )
    assert result.program("joint_fuse").count("'e5m2 tensor absmax even', -1)") == 2
    assert result.fused() == {"fprop": 2, "dgrad": 2, "wgrad": 2}
    assert not any("dense" in row["operands"] for row in result.gemms)


def test_stochastic_gradient_rounding_is_unbiased_and_seeded_per_step() -> None:
    """The mean over steps must approach the gradient of the same layer with dY in high precision."""
    layer, x = nn.Linear(32, 48, bias=False), torch.randn(24, 32, requires_grad=True)
    exact = compile_and_run(layer, x)
    compiled, _ = compiler(layer, FP4, gradient="e2m1 block16 e4m3 stochastic")
    cotangent = torch.randn(24, 48, generator=torch.Generator().manual_seed(7))
    steps = [torch.autograd.grad(compiled(x), (x, layer.weight), cotangent) for _ in range(100)]
    for i, name in ((0, 0), (1, "weight")):
        samples = torch.stack([step[i] for step in steps])
        assert not torch.equal(samples[0], samples[1])
        error = (samples.mean(0) - exact.gradients[name]).abs().max() / exact.gradients[name].abs().max()
        single = (samples[0] - exact.gradients[name]).abs().max() / exact.gradients[name].abs().max()
        assert error < 0.25 * single, (name, float(error), float(single))  # 1/√100 = 0.1


def test_a_rule_keeps_one_layer_s_gradient_exact() -> None:
    rules = [{"name": "fc1", "gradient": "off"}]
    result = compile_and_run(MLP(), torch.randn(9, 128, requires_grad=True), gradient="fp8", rules=rules)
    backward = {(row["site"], row["role"]): row["operands"] for row in result.gemms if row["role"] != "fprop"}
    assert all("dense" in backward[0, role] for role in ("dgrad", "wgrad"))
    assert all("dense" not in backward[1, role] for role in ("dgrad", "wgrad"))


def test_zero_gradient_stays_zero() -> None:
    """A two-level scale divides by the tensor's largest magnitude."""
    layer, x = nn.Linear(32, 48), torch.randn(8, 32, requires_grad=True)
    compiled, _ = compiler(layer, FP4, gradient="e2m1 block16 e4m3 even")
    dx, dw = torch.autograd.grad(compiled(x), (x, layer.weight), torch.zeros(8, 48))
    assert not dx.any()
    assert not dw.any()


# --- fusion ---------------------------------------------------------------------------------------------------------


def llama(layers: int, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            **config,
        )
    )


class Loss(nn.Module):
    """The language model's loss and logits from token ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids=tokens, labels=tokens, use_cache=False)
        return out.loss, out.logits


TOKENS = torch.arange(34).view(2, 17) * 7 % 96


def test_mlp_is_two_products_forward_and_three_backward() -> None:
    result = against_reference(MLP(), torch.randn(40, 128))
    assert result.fused() == {"fprop": 2, "dgrad": 1, "wgrad": 2}
    assert not [row for row in result.gemms if not row["fused"]]


@pytest.mark.parametrize("layers", [1, 2])
def test_llama_products_and_gradients(layers: int) -> None:
    """Seven products per layer forward and fourteen backward: the embedding wants dL/dx of the first layer too."""
    model = Loss(llama(layers))
    head = model.model.lm_head.weight
    result = against_reference(model, TOKENS, skip=lambda weight: weight is head)
    assert result.graphs == 1
    assert result.fused() == {"fprop": 7 * layers, "dgrad": 7 * layers, "wgrad": 7 * layers}
    assert {d.site.name: d.reason for d in result.decisions if not d.quantized and d.site.op == "linear"} == {
        "model.lm_head": "skip='lm_head'"
    }


@pytest.mark.parametrize("disabled", ["fuse", "hints", "lower", "audit"])
def test_passes_that_may_not_change_numbers(disabled: str) -> None:
    """fused ≡ unfused: the same codes, so only the order of accumulation may differ."""
    model = Loss(llama(1))
    on, off = compile_and_run(model, TOKENS), compile_and_run(model, TOKENS, disable_passes=[disabled])
    assert_same(on.outputs, off.outputs, 1e-6)
    assert_same(on.gradients, off.gradients, 1e-5)


def test_without_insert_nothing_is_quantized() -> None:
    model, x = MLP(), torch.randn(9, 128, requires_grad=True)
    result = compile_and_run(model, x, disable_passes=["insert"])
    outputs, gradients = run_eager(model, x)
    assert_same(result.outputs, outputs)
    assert_same(result.gradients, gradients)


def test_no_recompilation_in_five_steps_and_three_lengths() -> None:
    model = MLP()
    compiled, observations = compiler(model, FP4, gradient="fp8")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for length in (5, 7, 7, 9, 9):
        x = torch.randn(2, length, 128)
        torch._dynamo.mark_dynamic(x, 1)
        compiled(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(observations) == 1
    assert Counter(row["role"] for row in observations[0].gemms if row["fused"]) == {"fprop": 2, "dgrad": 1, "wgrad": 2}


# --- what is saved --------------------------------------------------------------------------------------------------


def assert_no_wide_twin(result: Result) -> None:
    """Nothing that a site's operand went through on its way into codes or out of them is kept wide."""
    assert not [row for row in result.saved if not row["codes"] and "qcompile_kind" in row["custom"]]


@pytest.mark.parametrize(
    "recipe", [FP4, fp4(activation="e2m1 row; clip", weight="e2m1 row; clip")], ids=["fp4", "masks"]
)
def test_saved_bytes_fall_below_inductor_s(recipe: Any) -> None:
    for model, inputs in ((MLP(), torch.randn(256, 128)), (Loss(llama(2)), TOKENS)):
        result = compile_and_run(model, inputs, recipe=recipe)
        assert_no_wide_twin(result)
        assert result.saved_bytes < measured(model, inputs, enabled=False)


@pytest.mark.parametrize("save", ["exact", "8bit"])
def test_saved_bytes_agree_with_autograd_s(save: str) -> None:
    """What the partitioner reports is what autograd holds."""
    model = Loss(llama(1))
    assert compile_and_run(model, TOKENS, save=save).saved_bytes == measured(model, TOKENS, save=save)


def test_operands_are_saved_in_056_bytes_an_element() -> None:
    """Codes and scales, without outlier compensation, whose residual comes on top."""
    result = compile_and_run(MLP(128, 192), torch.randn(40, 128), activation={"outliers": None})
    for site, width in ((0, 128), (1, 192)):
        saved = sum(r["bytes"] for r in result.saved if r["codes"] and r["custom"]["qcompile_site"] == site)
        assert 0.5 * 40 * width <= saved <= 0.56 * 40 * width


def test_weights_are_recomputed_or_saved_as_codes() -> None:
    def weights(mode: str) -> list[list[int]]:
        result = compile_and_run(MLP(), torch.randn(40, 128), saved_weights=mode, weight={"estimator": "ste"})
        assert_no_wide_twin(result)
        return [r["shape"] for r in result.saved if r["custom"].get("qcompile_kind") == "weight"]

    assert weights("recompute") == []
    assert sorted(weights("codes")) == [[128, 1], [128, 96]]  # fc1's are read forward only: nothing wants dL/dx


def test_broadcast_weight_saves_codes_of_the_activation_only() -> None:
    """ATen copies the broadcast weight once per sample; that copy must be made again."""
    w = nn.Parameter(torch.randn(4, 64, 48))
    result = compile_and_run(
        lambda x: x @ w, torch.randn(3, 4, 5, 64, requires_grad=True), activation={"outliers": None}
    )
    assert_no_wide_twin(result)
    assert sorted(r["bytes"] for r in result.saved) == [4 * 60, 32 * 60]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mix = nn.Conv2d(3, 32, 4, stride=4), nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.patch(x).exp())


def test_convolutions_save_codes() -> None:
    """Their backward is one ATen op that reads decoded operands; these must be decoded again, not kept."""
    x = torch.randn(2, 3, 16, 16)
    result = compile_and_run(Convolutions(), x, activation="e2m1 row", weight="e2m1 row")
    assert_no_wide_twin(result)
    wide = [row["shape"] for row in result.saved if not row["codes"]]
    assert wide.count([2, 32, 4, 4]) == 1  # the exponential, for its own derivative
    assert {row["custom"]["qcompile_site"] for row in result.saved if row["codes"]} == {0, 1}


def test_grouped_products_save_codes() -> None:
    w, ends = nn.Parameter(torch.randn(2, 32, 64, dtype=torch.bfloat16)), torch.tensor([3, 8], dtype=torch.int32)
    model = nn.Module()
    model.w = w
    model.forward = lambda x: torch._grouped_mm(x.sin(), model.w, ends)  # type: ignore[method-assign]
    result = compile_and_run(model, torch.randn(8, 32, dtype=torch.bfloat16), activation="e2m1 row", weight="e2m1 row")
    assert_no_wide_twin(result)
    assert [row["shape"] for row in result.saved if not row["codes"] and row["dtype"] == "bfloat16"] == []


# --- narrowing the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_narrowed_activations(attention: str) -> None:
    """``save=`` changes what the backward reads and nothing the forward returns; masks of −inf survive."""
    model = Loss(llama(1, attn_implementation=attention))
    exact = compile_and_run(model, TOKENS)
    previous, cosine_floor = exact.saved_bytes, {"8bit": 0.995, "4bit": 0.9}
    for save in ("8bit", "4bit"):
        narrowed = compile_and_run(model, TOKENS, save=save)
        for a, b in zip(narrowed.outputs, exact.outputs, strict=True):
            assert torch.equal(a, b)
        gradients = [torch.cat([g.flatten() for g in r.gradients.values()]) for r in (narrowed, exact)]
        assert gradients[0].isfinite().all()
        assert F.cosine_similarity(*gradients, dim=0) > cosine_floor[save]
        assert narrowed.saved_bytes < previous
        previous = narrowed.saved_bytes


def test_an_output_of_the_user_s_is_not_narrowed() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MLP()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.inner.fc1(x)
            return self.inner.fc2(F.gelu(h)), h

    model, x = Both(), torch.randn(40, 128)
    result = compile_and_run(model, x, save="4bit")
    outputs, gradients = run_eager(model, x, under=lambda: QuantizedProducts(FP4))
    assert_same(result.outputs, outputs)
    assert_same(result.gradients, gradients)


# --- the verifier ----------------------------------------------------------------------------------------------------

_OPS = torch.ops.qcompile


def traced(function: Callable[..., Any]) -> Graph:
    return make_fx(function, tracing_mode="fake")(torch.randn(6, 10)).graph


def _round_trip(x: Tensor) -> Tensor:
    codes, scales = _OPS.quantize(x, "e2m1 row", -1)
    return _OPS.dequantize(codes, scales, "e2m1 row", -1, 10, torch.float32)


def _first(graph: Graph, op: str) -> Any:
    return next(n for n in graph.nodes if n.target is getattr(_OPS, op).default)


def _wrong_codes(graph: Graph) -> None:
    node = _first(graph, "quantize")
    node.meta["val"] = (node.meta["val"][0].new_empty(6, 7), node.meta["val"][1])


def _wrong_scales(graph: Graph) -> None:
    _first(graph, "quantize").update_arg(1, "e2m1 block5")


def _wrong_decoder(graph: Graph) -> None:
    _first(graph, "dequantize").update_arg(2, "midrise2 row")


def _wrong_dtype(graph: Graph) -> None:
    _first(graph, "dequantize").update_arg(5, torch.bfloat16)


def _lost_codes(graph: Graph) -> None:
    node = _first(graph, "dequantize")
    with graph.inserting_before(node):
        stray = graph.call_function(torch.ops.aten.neg.default, (node.args[0],))
    node.replace_all_uses_with(stray)
    graph.erase_node(node)


def _whole_tuple(graph: Graph) -> None:
    graph.find_nodes(op="output")[0].args = (_first(graph, "quantize"),)


def _left_over(graph: Graph) -> None:
    node = _first(graph, "quantize")
    with graph.inserting_before(node):
        graph.call_function(_OPS.fake_quantize.default, (node.args[0], "e2m1 row; ste", -1))


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (_wrong_codes, "codes are torch.uint8 .6, 7., expected torch.uint8 .6, 5."),
        (_wrong_scales, "scales are torch.float32 .6, 1., expected torch.float32 .6, 2."),
        (_wrong_decoder, "codes are torch.uint8 .6, 5., expected torch.uint8 .6, 3."),
        (_wrong_dtype, "decodes to torch.float32, not torch.bfloat16"),
        (_lost_codes, "its codes reach neither a dequantize nor a quantized_mm"),
        (_whole_tuple, "its tuple is read by output"),
        (_left_over, "fake_quantize survived tracing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_verifier_catches(plant: Callable[[Graph], None], message: str) -> None:
    graph = traced(_round_trip)
    verify(graph, "before")
    plant(graph)
    with pytest.raises(VerificationError, match=f"after here: .*{message}"):
        verify(graph, "here")


# --- random graphs -------------------------------------------------------------------------------------------------

_STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w, b: F.linear(x, w.T, b),
    "@": lambda x, w, b: x @ w + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w).view(*x.shape[:-1], -1),
    "mm of transposes": lambda x, w, b: (w.t() @ x.flatten(0, -2).t()).t().reshape(*x.shape[:-1], -1),
    "bmm": lambda x, w, b: torch.bmm(x, w.expand(x.shape[0], -1, -1)) + b,
    "matmul of a slice": lambda x, w, b: torch.cat([x @ w[:, :3], x @ w[:, 3:]], -1),
}


class Chain(nn.Module):
    def __init__(self, steps: list[str], sizes: list[int]) -> None:
        super().__init__()
        self.steps = steps
        self.w = nn.ParameterList(torch.randn(k, n) / k**0.5 for k, n in pairwise(sizes))
        self.b = nn.ParameterList(torch.randn(n) for n in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        for step, w, b in zip(self.steps, self.w, self.b, strict=True):
            x = F.silu(_STEPS[step](x, w, b))
        return x


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    steps=st.lists(st.sampled_from(sorted(_STEPS)), min_size=1, max_size=3),
    sizes=st.lists(st.integers(5, 40), min_size=4, max_size=4),
    batch=st.tuples(st.integers(1, 3), st.integers(1, 5)),
)
def test_random_chains(steps: list[str], sizes: list[int], batch: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model = Chain(steps, sizes[: len(steps) + 1])
    against_reference(model, torch.randn(*batch, sizes[0], requires_grad=True), recipe=DISTINCT)
