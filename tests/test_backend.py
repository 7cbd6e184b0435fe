"""The backend as ``torch.compile`` uses it: options, sessions, shapes, graph breaks, state, Inductor.

Most tests run every graph pass and then execute the graphs eagerly (:func:`qcompile.compat.eager_inner_compile`);
those marked ``inductor`` generate C++.
"""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import qcompile
from qcompile import compat
from qcompile.backends import compile_with, split_options
from qcompile.passes import pipeline
from qcompile.passes.pass_base import Observations
from qcompile.recipes.fp4 import FP4
from qcompile.session import UnmatchedRuleError

ACTIVATION, WEIGHT = str(FP4.activation), str(FP4.weight)
fake_quantize = torch.ops.qcompile.fake_quantize


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Mlp(nn.Module):
    def __init__(self, width: int = 210, hidden: int = 96, out: int = 33) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """A pre-norm transformer block of plain torch."""

    def __init__(self, width: int = 36, heads: int = 3, hidden: int = 52) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.proj = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp_norm, self.mlp = nn.LayerNorm(width), Mlp(width, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.mlp_norm(x))


class Quantized(nn.Module):
    """``model`` with fake quantization in its linear layers, in eager mode: what the backend must compute."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        for layer in self.model.modules():
            if isinstance(layer, nn.Linear):
                layer.forward = lambda x, layer=layer: F.linear(
                    fake_quantize(x, ACTIVATION, -1), fake_quantize(layer.weight, WEIGHT, -1), layer.bias
                )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def eagerly(gm, inputs, **kwargs):
    """The backend with graphs executed eagerly in place of Inductor's code generation."""
    return compile_with(FP4, gm, inputs, inner_compile=compat.eager_inner_compile, **kwargs)


def compiled(model, **kwargs):
    return torch.compile(model, backend=eagerly, **{"fullgraph": True, **kwargs})


def step(model, call, *inputs: Tensor) -> list[Tensor]:
    """Loss, then all gradients, of one forward and backward."""
    model.zero_grad()
    output = call(*inputs)
    loss = (output.float() * torch.linspace(-1, 1, output.shape[-1])).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def assert_quantizes_like_eager(model: nn.Module, call, *inputs: Tensor, **tolerance: float) -> None:
    reference = Quantized(model)
    assert_all_close(step(model, call, *inputs), step(reference, reference, *inputs), **tolerance)


# --- options ------------------------------------------------------------------------------------------------


def failure_of(**kwargs) -> str:
    """Text of the error a user gets on the first call."""
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(Mlp(), backend="qcompile_fp4", **kwargs)(torch.randn(7, 210))
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"activatoin": None}, "ValueError: unknown option 'activatoin'; did you mean 'activation'?"),
        ({"max_autotun": True}, "ValueError: unknown option 'max_autotun'"),
        (
            {"max_autotune": "yes"},
            "RuntimeError: Unexpected type of attr max_autotune, got str should be bool",
        ),
        ({"mode": "fastest"}, "RuntimeError: Unrecognized mode=fastest"),
        ({"fuel": "3"}, "ValueError: option 'fuel': '3' is not an integer"),
        ({"skip": "lm_head"}, "ValueError: option 'skip' takes a list of names, got 'lm_head'"),
        ({"gradient": "fp9"}, "ValueError: option 'gradient': unknown format 'fp9'"),
        (
            {"weight": {"fromat": "e1m2"}},
            "ValueError: option 'weight': unknown operand 'fromat'; did you mean 'format'?",
        ),
        ({"disable_passes": ["fusee"]}, "ValueError: option 'disable_passes': there is no pass 'fusee'"),
        ({"save": "2bit"}, "ValueError: option 'save': '2bit' is not one of exact, 8bit, 4bit"),
    ],
)
def test_a_wrong_option_says_so_right_below_the_name_of_the_backend(options, expected):
    """Torch wraps the error; its first line names the backend and the second must be ours."""
    first, second, *_ = failure_of(options=options).splitlines()
    assert first == "backend='qcompile_fp4' raised:"
    assert second.startswith(expected)


def test_a_wrong_pass_name_lists_the_passes():
    assert f"passes: {', '.join(pipeline.PASS_NAMES)}" in failure_of(options={"disable_passes": ["fusee"]})


def test_options_of_ours_and_of_inductors_are_parted():
    ours, inductor = split_options(None, {"skip": ["a"], "max_autotune": True, "epilogue-fusion": False, "fuel": 3})
    assert ours == {"skip": ["a"], "fuel": 3}
    assert inductor == {"max_autotune": True, "epilogue_fusion": False}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_a_mode_may_come_either_way(mode):
    """``torch.compile`` refuses ``mode=`` beside ``options=``, so it can be an option; others override it."""
    expected = torch._inductor.list_mode_options(mode)
    assert expected
    assert split_options(mode, None) == ({}, expected)
    assert split_options(None, {"mode": mode, "strict": True}) == ({"strict": True}, expected)
    name = next(iter(expected))
    assert split_options(None, {"mode": mode, name: False})[1] == {**expected, name: False}


def test_options_are_not_changed_by_reading_them():
    """Torch hands the user's dictionary to every sub-graph; a ``pop`` would lose options for the second."""
    options = {"mode": "max-autotune", "skip": ["up"], "max_autotune": False}
    before = copy.deepcopy(options)
    split_options(None, options)
    assert options == before


def test_inductors_options_reach_inductor():
    seen = []

    def inner(gm, inputs, **kwargs):
        seen.append((inductor_config.max_autotune, inductor_config.coordinate_descent_tuning))
        return compat.eager_inner_compile(gm, inputs, **kwargs)

    def backend(gm, inputs, **kwargs):
        return compile_with(FP4, gm, inputs, inner_compile=inner, **kwargs)

    model = Mlp()
    call = torch.compile(model, backend=backend, options={"mode": "max-autotune", "coordinate_descent_tuning": True})
    step(model, call, torch.randn(7, 210))
    assert seen == [
        (True, True),
        (True, True),
    ]  # the backward compiles later, and must be under the same settings
    assert not inductor_config.max_autotune


def plan_of(model: nn.Module, **options):
    observed = Observations()

    def backend(gm, inputs, **kwargs):
        return eagerly(gm, inputs, observe=observed, **kwargs)

    torch.compile(model, backend=backend, options=options)(torch.randn(7, 210))
    assert observed.plan is not None
    return observed.plan


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        ({"enabled": False}, []),
        ({"skip": ["*"]}, []),
        ({"fuel": 0}, []),
        ({"fuel": 1}, ["up"]),
        ({"skip": ["up"]}, ["down"]),
        ({"rules": [{"name": "*", "quantize": False}, {"name": "down", "quantize": True}]}, ["down"]),
        ({}, ["up", "down"]),
    ],
)
def test_options_decide_what_is_quantized(options, quantized):
    assert [d.site.name for d in plan_of(Mlp(), **options).quantized] == quantized


def test_without_a_quantized_site_no_hook_is_installed():
    """The off switch leaves Inductor's configuration alone: its cache entries are those of ``inductor``."""
    seen = []

    def inner(gm, inputs, **kwargs):
        seen.append((inductor_config.joint_custom_pre_pass, inductor_config.custom_partitioner_fn))
        return compat.eager_inner_compile(gm, inputs, **kwargs)

    def backend(gm, inputs, **kwargs):
        return compile_with(FP4, gm, inputs, inner_compile=inner, **kwargs)

    torch.compile(Mlp(), backend=backend, options={"skip": ["*"], "save": "8bit"})(torch.randn(7, 210))
    assert seen == [(None, None)]


def test_disabling_a_pass_leaves_the_numbers():
    """Every pass but ``insert`` is numerics-preserving; without ``insert`` the model is the plain one."""
    model, x = Mlp(), torch.randn(7, 210)
    expected = step(model, compiled(model), x)
    for name in pipeline.PASS_NAMES:
        torch._dynamo.reset()
        actual = step(model, compiled(model, options={"disable_passes": [name]}), x)
        assert_all_close(actual, step(model, model, x) if name == "insert" else expected)


# --- rules that match nothing -------------------------------------------------------------------------------

UNMATCHED = {"skip": ["up", "head"]}


def test_an_unmatched_rule_warns_once_after_the_first_step():
    """Not during it: a later sub-graph may still match. Not again: one line a training run."""
    call, x = compiled(Mlp(), options=UNMATCHED), torch.randn(7, 210)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x)
    with pytest.warns(UserWarning, match=r"^qcompile: skip='head' matched no GEMM of the model; its layers: down, up$"):
        call(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(x)


def test_an_unmatched_rule_is_an_error_under_strict():
    call, x = compiled(Mlp(), options={**UNMATCHED, "strict": True}), torch.randn(7, 210)
    call(x)
    with pytest.raises(UnmatchedRuleError, match="skip='head' matched no GEMM"):
        call(x)
    assert qcompile.explain(Broken(), x).graphs == 2, "the error has left torch in a state of its own"


def test_the_default_skips_are_nobodys_mistake():
    """A model without an ``lm_head`` is no reason to warn."""
    call, x = compiled(Mlp(), options={"strict": True}), torch.randn(7, 210)
    for _ in range(3):
        call(x)


class Broken(nn.Module):
    """Two sub-graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(210, 60), nn.Linear(60, 33)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(x)


def test_a_rule_may_match_in_another_sub_graph():
    call, x = (
        compiled(Broken(), fullgraph=False, options={"skip": ["second"], "strict": True}),
        torch.randn(7, 210),
    )
    for _ in range(3):
        call(x)


def test_explain_raises_for_an_unmatched_rule():
    with pytest.raises(UnmatchedRuleError, match="skip='head' matched no GEMM of the model; its layers: down, up"):
        qcompile.explain(Mlp(), torch.randn(7, 210), options=UNMATCHED)


def test_a_session_belongs_to_one_call_of_compile():
    """Equal options in two dictionaries are two sessions; what one model matches does not excuse the other."""
    x = torch.randn(7, 210)
    for model in (Broken(), Mlp()):
        call = compiled(model, fullgraph=False, options={"skip": ["first"]})
        call(x)
    with pytest.warns(UserWarning, match="skip='first' matched no GEMM"):
        call(x)


# --- hooks the user has set ---------------------------------------------------------------------------------


class Recording(compat.CustomGraphPass):
    """Notes whether our ops are there yet."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def __call__(self, graph) -> None:
        self.seen.append(any("quantized_mm" in str(node.target) for node in graph.nodes))

    def uuid(self) -> str:
        return "recording"


@pytest.mark.parametrize("through", ["config", "options"])
@pytest.mark.parametrize(
    ("hook", "expected"), [("joint_custom_pre_pass", [False]), ("post_grad_custom_pre_pass", [True] * 2)]
)
def test_passes_of_the_user_still_run_before_ours(hook, expected, through):
    """Ours are chained behind; replacing the user's would silently drop them."""
    user_pass, model = Recording(), Mlp()
    options = {hook: user_pass} if through == "options" else {}
    with inductor_config.patch({hook: user_pass} if through == "config" else {}):
        step(model, compiled(model, options=options), torch.randn(7, 210))
    assert user_pass.seen == expected


def test_a_partitioner_of_the_user_still_runs():
    class Counting(compat.CustomPartitionerFn):
        calls = 0

        def __call__(self, gm, joint_inputs, **kwargs):
            Counting.calls += 1
            return compat.min_cut_partition(gm, joint_inputs, **{"compiler": "inductor", **kwargs})

        def uuid(self):
            return "counting"

    model, x = Mlp(), torch.randn(7, 210)
    for options in ({}, {"save": "8bit"}):
        torch._dynamo.reset()
        step(model, compiled(model, options={"custom_partitioner_fn": Counting(), **options}), x)
    assert Counting.calls == 2


# --- shapes and graphs --------------------------------------------------------------------------------------


def test_five_steps_compile_once():
    """Weights change under the optimizer and gradients come and go; neither may recompile."""
    model, x = Block(), torch.randn(2, 11, 36)
    optimizer = torch.optim.AdamW(model.parameters())
    call = compiled(model)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for set_to_none in (True, False, True, True, False):
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.parametrize(("how", "width"), [("dynamic", 36), ("mark_dynamic", 120)])
def test_one_graph_serves_every_sequence_length(how, width):
    """Also where rows are so short that the clamp cuts nothing and the residual is empty: below 100 elements."""
    model = Block(width, hidden=width + 3)
    call = compiled(model, dynamic=True if how == "dynamic" else None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (11, 5, 17):
            x = torch.randn(2, length, width)
            if how == "mark_dynamic":
                torch._dynamo.mark_dynamic(x, 1)
            assert_quantizes_like_eager(model, call, x)


def test_a_graph_break_gives_two_graphs_and_one_report():
    model, x = Broken(), torch.randn(7, 210)
    assert_quantizes_like_eager(model, compiled(model, fullgraph=False), x)
    report = qcompile.explain(model, x)
    assert report.graphs == 2
    assert [(r.layer, r.role) for r in report.rows] == [
        (layer, role) for layer in ("first", "second") for role in ("fprop", "dgrad", "wgrad")
    ]
    assert {name.split("_")[0] for name in report.programs} == {"graph0", "graph1"}
    assert "2 of 2 GEMM sites quantized in 2 graph(s)" in report.summary()


def test_compiling_in_place():
    model, x = Mlp(), torch.randn(7, 210)
    reference = Quantized(model)
    model.compile(backend=eagerly, fullgraph=True)
    assert_all_close(step(model, model, x), step(reference, reference, x))


def test_regional_compilation_shares_one_graph_between_equal_blocks():
    blocks = nn.Sequential(*(Block() for _ in range(3)))
    # As behind an embedding: were the input of the first block a constant, its graph would be another one.
    reference, x = Quantized(blocks), torch.randn(2, 11, 36, requires_grad=True)
    for block in blocks:
        block.compile(backend=eagerly, fullgraph=True)
    actual = step(blocks, blocks, x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_all_close(actual, step(reference, reference, x))


# --- state --------------------------------------------------------------------------------------------------


def test_the_state_dict_stays_what_it_was():
    """Parameters are the model's own: compiling changes no key, dtype or value, a step values only."""
    model, x = Block().to(torch.bfloat16), torch.randn(2, 11, 36, dtype=torch.bfloat16)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    call = compiled(model)
    call(x).float().square().mean().backward()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    stepped = model.state_dict()
    assert {key: (value.dtype, value.shape) for key, value in stepped.items()} == {
        key: (value.dtype, value.shape) for key, value in before.items()
    }
    assert not torch.equal(stepped["qkv.weight"], before["qkv.weight"])


def test_saving_and_loading_moves_the_weights_and_nothing_else():
    trained, x = Mlp(), torch.randn(7, 210)
    expected = compiled(trained)(x)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh = Mlp()
    call = compiled(fresh)
    assert not torch.equal(call(x), expected)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(call(x), expected)


def test_a_deep_copy_of_a_compiled_model_trains_on_its_own():
    model, x = Mlp(), torch.randn(7, 210)
    call = compiled(model)
    expected = call(x)
    clone = copy.deepcopy(call)
    assert torch.equal(clone(x), expected)
    clone(x).sum().backward()
    torch.optim.SGD(clone.parameters(), lr=1.0).step()
    assert not torch.equal(clone(x), expected)
    assert torch.equal(call(x), expected)
    assert model.up.weight.grad is None


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_numbers_of_training(guard):
    """One quantizer for both: else validation measures another model."""
    model, x = Block(), torch.randn(2, 11, 36)
    call = compiled(model)
    trained = call(x).detach()
    model.eval()
    with guard():
        assert torch.equal(call(x), trained)


def test_frozen_layers():
    """No gradient for the frozen weight, the usual one for what lies before it."""
    model, x = Mlp(), torch.randn(7, 210)
    model.down.weight.requires_grad_(False)
    reference = Quantized(model)
    assert_all_close(step(model, compiled(model), x), step(reference, reference, x))
    assert model.down.weight.grad is None
    rows = {(row.layer, row.role): row for row in qcompile.explain(model, x).rows}
    assert rows["down", "wgrad"].decision == "not computed"
    assert rows["down", "dgrad"].decision == "quantized"
    assert rows["up", "wgrad"].decision == "quantized"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(57, 36),
            nn.Linear(36, 36),
            nn.Linear(36, 57, bias=False),
        )
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


def test_a_tied_embedding_is_read_in_high_precision_and_multiplied_in_four_bits():
    """The table's gradient is the sum over both uses, and the look-up is no GEMM."""
    model = Tied()
    assert_quantizes_like_eager(model, compiled(model, options={"heads": True}), torch.randint(0, 57, (2, 11)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_sixteen_bits(dtype):
    model, x = Mlp().to(dtype), torch.randn(7, 210, dtype=dtype)
    call = compiled(model)
    assert call(x).dtype == dtype
    # Same codes; what differs is where 16-bit intermediates are rounded.
    assert_quantizes_like_eager(model, call, x)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast_quantizes_what_the_product_reads(where):
    """Under autocast the product reads bfloat16, so that operand is what is quantized; gradients are float32."""
    model, x = Mlp(), torch.randn(7, 210)

    def half(layer, x):
        operands = (
            fake_quantize(x.bfloat16(), ACTIVATION, -1),
            fake_quantize(layer.weight.bfloat16(), WEIGHT, -1),
        )
        return F.linear(*operands, layer.bias.bfloat16())

    def expected(x):
        return half(model.down, F.gelu(half(model.up, x)))

    def with_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    if where == "inside":
        call = compiled(with_autocast)
    else:
        inner = compiled(model)

        def call(x):
            with torch.autocast("cpu", torch.bfloat16):
                return inner(x)

    assert call(x).dtype == torch.bfloat16
    assert_all_close(step(model, call, x), step(model, expected, x))


# --- saved bytes --------------------------------------------------------------------------------------------


def mlp_and_input():
    return Mlp(210, 112, 33).to(torch.bfloat16), torch.randn(24, 210, dtype=torch.bfloat16)


#: FP4 as the paper prints it: codes of half a byte, and an exact residual beside them.
PRINTED = {"variant": "paper"}


def test_saved_bytes_of_an_mlp_are_what_the_formats_say():
    """As printed: codes at half a byte, a float32 scale per row, the residual of two outliers per side, and the GELU's
    input.

    Neither the input nor the parameters count; min-cut alone keeps both 16-bit operands of the second layer.
    """
    model, x = mlp_and_input()
    # ⌊(1 − α)·K⌋ elements lie below and K − 1 − ⌊α·K⌋ above the quantiles.
    residual = {210: 2 + 2, 112: 1 + 1}
    scale, value, position = 4, 4, 1
    expected = sum(24 * (k // 2 + scale + m * (value + position)) for k, m in residual.items()) + 24 * 112 * 2
    with qcompile.saved_bytes(model, x) as saved:
        output = compiled(model, options=PRINTED)(x)
    assert saved.total == expected
    assert saved.total == sum(size for _, _, size in saved.tensors)
    assert sorted(t[0] for t in saved.tensors) == sorted(
        [(24, 105), (24, 1), (24, 4), (24, 4), (24, 112), (24, 56), (24, 1), (24, 2), (24, 2)]
    )
    output.sum().backward()  # the hooks hand the tensors back unchanged

    torch._dynamo.reset()
    with qcompile.saved_bytes(model, x) as wide:
        compiled(model, options={"enabled": False})(x)
    assert wide.total == 2 * 24 * 112 * 2


def test_saved_bytes_agree_with_the_report():
    model, x = mlp_and_input()
    with qcompile.saved_bytes(model, x) as measured:
        compiled(model)(x)
    assert qcompile.explain(model, x).saved_bytes == measured.total


def test_saved_bytes_count_storage_once_and_whole():
    """A slice keeps its whole storage alive, however little of it is saved, and three slices keep it once."""
    x = torch.randn(5, 30)
    with qcompile.saved_bytes(None, x) as saved:
        a, b, c = (x * torch.ones(30, requires_grad=True)).split(10, -1)
        _ = (a * b * c).sum()
    # The product before the split, and a·b; the vector of ones is a leaf nobody named.
    assert sorted(size for *_, size in saved.tensors) == [5 * 10 * 4, 5 * 30 * 4]


def test_saved_bytes_leave_nothing_out_of_an_eager_model():
    model, x = mlp_and_input()
    with qcompile.saved_bytes(model, x) as saved:
        model(x)
    assert saved.total == 2 * 24 * 112 * 2  # input and output of the GELU
    with qcompile.saved_bytes() as everything:
        model(x)
    owned = [x, model.down.weight]  # the first layer's weight is for the gradient of x, which nobody asks for
    assert everything.total == saved.total + sum(t.nbytes for t in owned)


# --- through Inductor ---------------------------------------------------------------------------------------


@pytest.mark.inductor
@pytest.mark.parametrize("options", [{"enabled": False}, {"skip": ["*"]}, {"fuel": 0}], ids=str)
def test_switched_off_it_is_inductor_bit_for_bit(options):
    """Twenty steps, loss and every gradient: with no site quantized nothing of ours may touch the numbers."""
    start, x = Block(), torch.randn(2, 11, 36)

    def history(backend, **kwargs):
        torch._dynamo.reset()
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        call = torch.compile(model, backend=backend, fullgraph=True, **kwargs)
        steps = []
        for _ in range(20):
            steps += step(model, call, x)
            optimizer.step()
        return steps

    expected = history("inductor")
    assert len(expected) == 20 * (1 + len(list(start.parameters())))
    assert not torch.equal(expected[0], expected[-1 - len(list(start.parameters()))])
    actual = history("qcompile_fp4", options=options)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.inductor
@pytest.mark.parametrize(("model", "shape"), [(Mlp, (7, 210)), (Block, (2, 11, 36))], ids=["mlp", "block"])
def test_generated_code_agrees_with_the_graphs_it_comes_from(model, shape):
    """Same codes and scales, so products differ by the order of accumulation alone."""
    model, x = model(), torch.randn(shape)
    expected = step(model, compiled(model), x)
    torch._dynamo.reset()
    actual = step(model, torch.compile(model, backend="qcompile_fp4", fullgraph=True), x)
    assert_all_close(actual, expected, rtol=1e-5, atol=1e-6)
    # Gradients as well: the loss of one lucky initialization may well agree to three digits.
    plain = step(model, model, x)
    gradients = zip(actual[1:], plain[1:], strict=True)
    assert min(torch.norm(one - other) / torch.norm(other) for one, other in gradients) > 0.01


@pytest.mark.inductor
@pytest.mark.parametrize(
    "kwargs",
    [
        {"mode": "reduce-overhead"},
        {"mode": "max-autotune"},
        {"options": {"mode": "max-autotune", "skip": ["up"], "epilogue_fusion": False}},
    ],
    ids=str,
)
def test_modes_run(kwargs):
    model, x = Mlp(), torch.randn(7, 210)
    options = {"skip": ["up"]} if "options" in kwargs else {}
    expected = step(model, compiled(model, options=options), x)
    torch._dynamo.reset()
    actual = step(model, torch.compile(model, backend="qcompile_fp4", **kwargs), x)
    assert_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.inductor
def test_saved_bytes_of_generated_code():
    """What Inductor keeps is what the partitioner decided, in 16 bits and in four."""
    model, x = mlp_and_input()
    with qcompile.saved_bytes(model, x) as ours:
        torch.compile(model, backend="qcompile_fp4", options=PRINTED)(x)
    torch._dynamo.reset()
    with qcompile.saved_bytes(model, x) as wide:
        torch.compile(model, backend="inductor")(x)
    assert wide.total == 2 * 24 * 112 * 2
    assert ours.total == qcompile.explain(model, x, options=PRINTED).saved_bytes < wide.total


def test_the_message_of_an_unknown_option_names_every_option():
    """A user who mistypes an option sees what there is."""
    text = failure_of(options={"zzz": 1})
    assert all(re.search(rf"\b{name}\b", text) for name in FP4.option_names())
