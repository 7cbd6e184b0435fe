"""Products of groups on 8-bit tensor cores: experts, from `F.grouped_mm` to codes, in both directions.

The passes are told that the CPU is an sm_90 device; the ops then run as their plain-torch references. What would break:
a group multiplied with another's matrix or scales, a gradient that sums over two groups, an expert without tokens whose
gradient is not 0, NaN that reaches a neighbour, an operand decoded that tensor cores could read.
"""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.recipe import Recipe
from qcompile.kernels.quantize import reference as quantize
from qcompile.recipes import QUEST

from .harness import SMALL_FP4, compile_and_run, compiler, fp4, run_eager

BF16 = torch.bfloat16
#: No outliers, so that codes and gradients are formulas of a line; both gradients in FP8.
PLAIN = SMALL_FP4.override({"activation": {"outliers": None}, "weight": {"estimator": "ste"}})
QUANTIZER, GRADIENT = "e2m1 row absmax even", "e4m3 row absmax even"
#: What multiplies each role on such a device: groups of a few rows in Triton, others in Gluon.
KERNELS = {"fprop": "grouped", "dgrad": "grouped", "wgrad": "grouped_gluon"}
KERNELS_OF_MANY_ROWS = dict.fromkeys(KERNELS, "grouped_gluon")


@pytest.fixture(autouse=True)
def _hopper(request: pytest.FixtureRequest) -> Any:
    """Every device has Hopper's tensor cores, unless the test says otherwise."""
    with mock.patch.object(compat, "tensor_core_capability", return_value=getattr(request, "param", (9, 0))):
        yield


class Experts(nn.Module):
    """Experts with SwiGLU between two grouped products; weights as transformers keeps them, or transposed (gpt-oss)."""

    def __init__(self, experts: int = 7, width: int = 32, hidden: int = 48, transposed: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(n: int, k: int) -> nn.Parameter:
            shape = (experts, k, n) if transposed else (experts, n, k)
            return nn.Parameter(torch.randn(shape, generator=generator).to(BF16))

        self.up, self.down, self.transposed = weight(2 * hidden, width), weight(width, hidden), transposed

    def product(self, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        return F.grouped_mm(x, weight if self.transposed else weight.transpose(-2, -1), offs=offs)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        gate, up = self.product(x, self.up, offs).chunk(2, -1)
        return self.product(F.silu(gate) * up, self.down, offs)


def ends(*sizes: int) -> Tensor:
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)


#: 168 tokens: torch wants a multiple of 8.
SIZES = (17, 1, 0, 6, 15, 129, 0)
OFFS = ends(*SIZES)


def tokens(requires_grad: bool = True) -> Tensor:
    return torch.randn(168, 32, generator=torch.Generator().manual_seed(1)).to(BF16).requires_grad_(requires_grad)


class _Grouped(torch.autograd.Function):
    """A loop over experts by the formulas, in float64 on the same codes: Y = X̂ Ŵᵀ, dX = Q(dY ⊙ s_w) Wq,
    dW = Q(dY ⊙ s_x)ᵀ Xq.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        (x_levels, s_x), (w_levels, s_w) = levels(x, QUANTIZER, -1), levels(w, QUANTIZER, -2)
        ctx.save_for_backward(x_levels, s_x, w_levels, s_w, offs)
        y = x.new_zeros(x.shape[0], w.shape[2])
        for e, (own, _) in enumerate(quantize.group_slices(offs)):
            y[own] = ((x_levels[own] @ w_levels[e].T) * s_x[own] * s_w[e].T).to(y.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x_levels, s_x, w_levels, s_w, offs = ctx.saved_tensors
        dx = dy.new_zeros(x_levels.shape)
        dw = dy.new_zeros(w_levels.shape[0], w_levels.shape[2], w_levels.shape[1])
        for e, (own, _) in enumerate(quantize.group_slices(offs)):
            codes, scale = levels(dy[own].float() * s_w[e].T.float(), GRADIENT, -1)
            dx[own] = (codes @ w_levels[e] * scale).to(dx.dtype)
            codes, scale = levels(dy[own].float() * s_x[own].float(), GRADIENT, 0)
            dw[e] = (codes @ x_levels[own] * scale).T.to(dw.dtype)
        return dx, dw, None


def levels(x: Tensor, quantizer: str, axis: int) -> tuple[Tensor, Tensor]:
    """Float64 levels and scales, the quantized axis last."""
    codes, scales = torch.ops.qcompile.quantize(x, quantizer, axis)
    size = x.shape[axis]
    return quantize.recode(codes, quantizer, size, False).double(), scales.double()


@pytest.mark.parametrize("transposed", [False, True])
def test_all_three_products_are_the_formulas(transposed: bool) -> None:
    """Groups of 0, 1, 15, 17 and 129 tokens: every result is the exact one, rounded to bfloat16 once, and no expert's
    gradient is missing or in the wrong place.
    """
    experts, x = Experts(transposed=transposed), tokens()
    result = compile_and_run(experts.product, x, experts.up.requires_grad_(), OFFS, recipe=PLAIN, backward="fp8")

    def loop(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return _Grouped.apply(x, w if transposed else w.mT, offs)

    outputs, gradients = run_eager(loop, x, experts.up, OFFS)
    assert len(gradients) == 2
    for got, expected in ((result.outputs, outputs), *((result.gradients[i], gradients[i]) for i in gradients)):
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6 * float(expected.detach().abs().max()))
    for empty in (2, 6):
        assert torch.equal(result.gradients[1][empty], torch.zeros_like(experts.up[empty]))
    assert {(row["role"], row["provider"]) for row in result.gemms} == set(KERNELS.items())


def test_what_runs_reads_codes_alone() -> None:
    """Weights in transformers' layout are quantized to 8-bit codes at once; activations keep packed codes beside."""
    result = compile_and_run(Experts(), tokens(), OFFS, recipe=PLAIN, backward="fp8")
    forward, backward = (result.program(f"post_grad_merge_quantize{n}") for n in ("", "_2"))
    assert forward.count("qcompile.quantize_8bit.default(") == 4
    assert forward.count("qcompile.mm_8bit_grouped.default(") == 2
    assert backward.count("qcompile.quantize_groups_pair.default(") == 2
    assert "qcompile.quantize_groups.default(" not in backward
    assert backward.count("qcompile.mm_8bit_grouped.default(") == 4
    assert backward.count("qcompile.quantize_8bit_transposed.default(") == 2
    assert "qcompile.quantize.default(" not in forward + backward
    for program in (forward, backward):
        assert "dequantize" not in program
        assert "grouped_mm.default(" not in program.replace("mm_8bit_grouped", "")
    assert all(row["codes"] for row in result.saved if row["dtype"] in ("uint8", "float32"))


@pytest.mark.parametrize("backward", ["auto", "dgrad_fp8"])
def test_other_backwards_run_decoded(backward: str) -> None:
    """What is not folded reads what is decoded, with gradients in high precision; "auto" decides by cost."""
    model, x = Experts(), tokens()
    result = compile_and_run(model, x, OFFS, recipe=PLAIN, backward=backward)
    providers = {(row["role"], row["provider"]) for row in result.gemms}
    assert ("fprop", "grouped") in providers
    assert (("dgrad", "grouped") in providers) == (backward == "dgrad_fp8")
    assert ("wgrad", "dequantize + aten") in providers
    assert not result.gradients["up"].isnan().any()


def test_nan_stays_in_its_expert() -> None:
    """A token with NaN spoils its own result and gradient and its expert's weights, and nothing else."""
    model, x = Experts(), tokens(requires_grad=False)
    x[30] = float("nan")  # of the fifth expert, tokens 24 to 38
    result = compile_and_run(model, x.requires_grad_(), OFFS, recipe=PLAIN, backward="fp8")
    rows = torch.arange(168) == 30
    assert torch.equal(result.outputs.isnan().any(1), rows)
    assert torch.equal(result.gradients[0].isnan().any(1), rows)
    for name in ("up", "down"):
        assert result.gradients[name].isnan().flatten(1).any(1).tolist() == [e == 4 for e in range(7)]


def test_other_sizes_do_not_compile_again() -> None:
    """Where groups end is data: one graph serves all, also with as many rows as come."""
    run, observations = compiler(Experts(), PLAIN, backward="fp8")
    for sizes in ((17, 1, 0, 6, 15, 129, 0), (0, 0, 0, 168, 0, 0, 0), (20, 30, 40, 2, 60, 15, 1)):
        result = run(tokens(), ends(*sizes))
        result.float().sum().backward()
    assert len(observations) == 1


def test_any_number_of_tokens() -> None:
    """One graph where the number of rows is not known either; what is padded follows it."""
    run, observations = compiler(Experts(), PLAIN, backward="fp8", dynamic=True)
    for sizes in ((17, 1, 0, 6, 15, 129, 0), (3, 0, 0, 5, 0, 1000, 0)):
        x = torch.randn(sum(sizes), 32).to(BF16).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        y = run(x, ends(*sizes))
        assert torch.equal(y, by_operations(x, sizes))
        y.float().sum().backward()
        assert not x.grad.isnan().any()
    assert len(observations) == 1


def by_operations(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The same by the reference's own operations, of one product after the other."""
    experts = Experts()

    def product(x: Tensor, w: Tensor) -> Tensor:
        (codes_x, s_x, _), (codes_w, s_w, _) = (
            torch.ops.qcompile.quantize_8bit(t.flatten(0, -2), QUANTIZER, False) for t in (x, w)
        )
        shape = w.shape[:2]
        return torch.ops.qcompile.mm_8bit_grouped(
            codes_x, codes_w.view(w.shape), ends(*sizes), s_x, s_w.view(*shape, 1), BF16
        )

    with torch.no_grad():
        gate, up = product(x, experts.up).chunk(2, -1)
        return product(F.silu(gate) * up, experts.down)


@pytest.mark.parametrize("_hopper", [None, (8, 9)], indirect=True)
def test_elsewhere_they_are_decoded(_hopper: Any) -> None:
    """Without the kernel: torch's grouped product of what codes stand for, and the report says why."""
    model, x = Experts(), tokens()
    result = compile_and_run(lambda x, w, offs: F.grouped_mm(x, w.mT, offs=offs), x, model.up, OFFS, recipe=PLAIN)
    fake_quantize = torch.ops.qcompile.fake_quantize
    decoded = fake_quantize(x, f"{QUANTIZER}; ste", -1), fake_quantize(model.up, f"{QUANTIZER}; ste", -1)
    assert torch.equal(result.outputs, F.grouped_mm(decoded[0], decoded[1].mT, offs=OFFS))
    assert {row["provider"] for row in result.gemms} == {"dequantize + aten"}
    assert all(row["reason"] for row in result.gemms if row["role"] == "fprop")


def test_gradients_that_groups_do_not_take_stay_wide() -> None:
    """A gradient with a scale of blocks, or rounded stochastically, is decoded for torch's product, with the reason."""
    for gradient in ("e4m3 row absmax stochastic", "e4m3 tensor absmax even"):
        result = compile_and_run(Experts(), tokens(), OFFS, recipe=PLAIN, backward="fp8", gradient=gradient)
        decoded = [row for row in result.gemms if row["role"] != "fprop"]
        assert {row["provider"] for row in decoded} == {"dequantize + aten"}, gradient


def test_outliers_are_read_as_codes_too() -> None:
    """The FP4 default adds outliers to E4M3 codes, which routed tokens take along in both directions."""
    recipe = fp4(activation={"outliers": "occ(alpha=0.9,residual=e4m3)"}, weight={"estimator": "ste"})
    result = compile_and_run(Experts(), tokens(), OFFS, recipe=recipe, backward="fp8")
    assert {row["provider"] for row in result.gemms} == set(KERNELS.values())


@pytest.mark.parametrize("_hopper", [None], indirect=True)
def test_folded_gradients_are_decoded_alike(_hopper: Any) -> None:
    """Where FP8 gradients are asked for, they round alike with and without tensor cores."""
    experts, x = Experts(), tokens()
    results = {}
    for capability in (None, (9, 0)):
        with mock.patch.object(compat, "tensor_core_capability", return_value=capability):
            results[capability] = compile_and_run(experts.product, x, experts.up, OFFS, recipe=PLAIN, backward="fp8")
    decoded, codes = results.values()
    assert {row["provider"] for row in decoded.gemms} == {"dequantize + aten"}
    for got, expected in ((decoded.gradients[i], codes.gradients[i]) for i in (0, 1)):
        assert (got.double() - expected.double()).norm() < 2**-8 * expected.double().norm()


@pytest.mark.parametrize("activation", [None, "occ(alpha=0.9,residual=e4m3)"])
def test_tokens_are_quantized_once_and_their_codes_gathered(activation: str | None) -> None:
    """Two experts for each token: codes of 84 tokens are saved, not of 168 copies, and nothing is rounded otherwise."""
    recipe = fp4(activation={"outliers": activation}, weight={"estimator": "ste"})
    experts, x = Experts(), tokens().detach()[:84].requires_grad_()
    rows = torch.randperm(168, generator=torch.Generator().manual_seed(2)) // 2

    def routed(x: Tensor, w: Tensor, offs: Tensor, rows: Tensor) -> Tensor:
        return experts.product(x[rows], w, offs)

    results = [
        compile_and_run(routed, x, experts.up, OFFS, rows, recipe=recipe, backward="fp8", **off)
        for off in ({}, {"disable_passes": ["gather_codes"]})
    ]
    for a, b in zip(*([r.outputs, *r.gradients.values()] for r in results), strict=True):
        assert torch.equal(a, b)
    assert {row["provider"] for row in results[0].gemms} == set(KERNELS.values())
    shapes = [{row["shape"][0] for row in result.saved if row["codes"]} for result in results]
    assert shapes == [{84}, {168}]


def test_a_few_gathered_tokens_are_quantized_themselves() -> None:
    """Quantizing all tokens for half of them would cost more."""
    experts, x = Experts(), torch.cat((tokens(), tokens())).detach().requires_grad_()
    rows = torch.arange(0, 336, 2)
    result = compile_and_run(lambda x, w, rows: experts.product(x[rows], w, OFFS), x, experts.up, rows, recipe=PLAIN)
    assert result.program("joint_gather_codes") == result.program("joint_cancel_rotations")


@pytest.mark.parametrize(("dtype", "transposed"), [(torch.float32, False), (torch.float16, True)])
def test_experts_in_other_dtypes_read_codes_too(dtype: torch.dtype, transposed: bool) -> None:
    """transformers' own op for what `_grouped_mm` refuses, and its backward, are the same products of groups."""
    pytest.importorskip("transformers.integrations.moe")
    experts, x = Experts(transposed=transposed).to(dtype), tokens().detach().to(dtype).requires_grad_()
    loop = torch.ops.transformers.grouped_mm_fallback

    def product(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
        return loop(x, w if transposed else w.transpose(-2, -1), offs.to(torch.int64) if transposed else offs)

    result = compile_and_run(product, x, experts.up, OFFS, recipe=PLAIN, backward="fp8")
    outputs, gradients = run_eager(
        lambda x, w, offs: _Grouped.apply(x, w if transposed else w.mT, offs), x, experts.up, OFFS
    )
    for got, expected in ((result.outputs, outputs), *((result.gradients[i], gradients[i]) for i in gradients)):
        torch.testing.assert_close(got, expected, rtol=2**-10, atol=1e-5 * float(expected.detach().abs().max()))
    assert {(row["role"], row["provider"]) for row in result.gemms} == set(KERNELS.items())
    decoded = compile_and_run(product, x, experts.up, OFFS, recipe=PLAIN, backward="bf16")
    assert {row["provider"] for row in decoded.gemms} == {"grouped", "reference"}
    for got, expected in ((decoded.gradients[i], gradients[i]) for i in gradients):
        assert (got.double() - expected.double()).norm() < 0.05 * expected.double().norm()


def routed() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """transformers' experts of Qwen3 in float32; tokens, which experts each goes to, and their weights."""
    qwen = pytest.importorskip("transformers.models.qwen3_moe")
    config = qwen.Qwen3MoeConfig(hidden_size=32, num_experts=4, moe_intermediate_size=48)
    config._experts_implementation = "grouped_mm"
    experts, generator = qwen.modeling_qwen3_moe.Qwen3MoeExperts(config), torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=generator)
    chosen, weights = torch.randint(4, (64, 2), generator=generator), torch.rand(64, 2, generator=generator)
    return experts, torch.randn(64, 32, generator=generator).requires_grad_(), chosen, weights


@pytest.mark.parametrize("recipe", [PLAIN, pytest.param(QUEST, marks=pytest.mark.nightly)], ids=["fp4", "quest"])
def test_transformers_experts_in_float32_under_autocast(recipe: Recipe) -> None:
    """Its module as it is: autocast leaves experts in float32, which transformers has an opaque op for while compiling.
    All six products are of groups of codes.
    """

    def under() -> Any:
        return torch.autocast("cpu", BF16)

    result = compile_and_run(*routed(), recipe=recipe, backward="fp8", min_side=0, under=under)
    assert result.outputs.dtype == torch.float32
    assert [(row["role"], row["provider"]) for row in result.gemms] == 2 * [("fprop", KERNELS["fprop"])] + 2 * [
        (role, KERNELS[role]) for role in ("dgrad", "wgrad")
    ]


@pytest.mark.nightly
def test_opaque_products_without_rotations_are_the_same() -> None:
    """And so are both of their gradients, which one op computes."""
    results = [
        compile_and_run(*routed(), recipe=QUEST, backward="bf16", min_side=0, **options)
        for options in ({}, {"disable_passes": ["cancel_rotations"]})
    ]
    assert [result.count("hadamard", "joint_fuse") for result in results] == [4, 12]
    for got, expected in zip(*([r.outputs, *r.gradients.values()] for r in results), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


class OneByOne(Experts):
    """The same, as linear layers of slices of known sizes."""

    def product(self, x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        parts = x.split(SIZES)
        return torch.cat([F.linear(part, weight[i]) for i, part in enumerate(parts) if len(part)])


@pytest.mark.parametrize("bits", [4, pytest.param(1, marks=pytest.mark.nightly)])
def test_quest_experts_are_its_linear_layers(bits: int) -> None:
    """Rotated along K and multiplied as codes in all three products, with results and gradients of the dense products;
    what is rotated back is each of the four gradients alone.
    """
    results = []
    for kind in (Experts, OneByOne):
        experts, x = kind(), tokens()
        options = {"bits": bits, "backward": "fp8", "min_side": 0}
        results.append(compile_and_run(experts, x, OFFS, recipe=QUEST, **options))
    grouped, dense = results
    assert [(row["role"], row["provider"]) for row in grouped.gemms].count(("fprop", "grouped")) == 2
    assert {(row["role"], row["provider"]) for row in grouped.gemms} == set(KERNELS.items())
    assert grouped.count("hadamard", "joint_cancel_rotations") == 4
    torch.testing.assert_close(grouped.outputs, dense.outputs, rtol=2**-7, atol=2**-7)
    for name, expected in dense.gradients.items():
        got = grouped.gradients[name]
        assert (got.double() - expected.double()).norm() < 2**-7 * expected.double().norm(), name


@pytest.mark.nightly
def test_quest_experts_of_eight_bits_are_decoded_and_the_report_says_why() -> None:
    """Half-integers of eight bits are beside INT8's numbers by a half, which the kernel for groups does not add."""
    result = compile_and_run(Experts(), tokens(), OFFS, recipe=QUEST, bits=8, min_side=0)
    (reason,) = {row["reason"] for row in result.gemms if row["role"] == "fprop"}
    assert "it adds nothing before the scales" in reason
    assert {row["provider"] for row in result.gemms} == {"dequantize + aten"}


def test_codes_of_tokens_are_computed_again_for_the_backward() -> None:
    """Where they lie beside what they were computed from, the bounds of a token's row are saved, not its codes."""
    recipe = fp4(activation={"outliers": "occ(alpha=0.9,residual=e4m3)"}, weight={"estimator": "ste"})
    experts, x = Experts(), tokens().detach()[:84].requires_grad_()
    rows = torch.randperm(168, generator=torch.Generator().manual_seed(2)) // 2

    def routed(x: Tensor, w: Tensor, rows: Tensor) -> Tensor:
        return experts.product((x * x)[rows], w, OFFS)  # its gradient needs x

    results = [
        compile_and_run(routed, x, experts.up, rows, recipe=recipe, backward="fp8", **off)
        for off in ({}, {"disable_passes": ["recompute_codes"]})
    ]
    for a, b in zip(*([r.outputs, *r.gradients.values()] for r in results), strict=True):
        assert torch.equal(a, b)
    kept = [[row["dtype"] for row in result.saved if row["codes"]].count("uint8") for result in results]
    assert kept == [0, 1]


def test_under_activation_checkpointing_codes_are_padded_again() -> None:
    """The backward quantizes tokens once more, for a product whose contraction is in groups."""
    experts, x = Experts(), tokens()

    def checkpointed(x: Tensor, offs: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(experts, x, offs, use_reentrant=False)

    results = [
        compile_and_run(model, x, OFFS, recipe=PLAIN, backward="fp8")
        for model in (experts, Holder(experts, checkpointed))
    ]
    for name, expected in results[0].gradients.items():
        other = name if name == 0 else f"experts.{name}"
        assert torch.equal(results[1].gradients[other], expected), name
    assert not [row for row in results[1].saved if row["codes"]]


class Holder(nn.Module):
    def __init__(self, experts: Experts, function: Any) -> None:
        super().__init__()
        self.experts, self.function = experts, function

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return self.function(x, offs)


def test_a_batch_of_sequences_is_no_batch_of_matrices() -> None:
    """What a linear layer under checkpointing transposes for wgrad is all tokens, not those of each sequence."""
    layer, x = nn.Linear(48, 80, bias=False), torch.randn(3, 16, 48, requires_grad=True)

    def checkpointed(x: Tensor, w: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: F.linear(torch.sigmoid(x), w), x, use_reentrant=False)

    results = [
        compile_and_run(function, x, layer.weight, recipe=PLAIN, backward="fp8")
        for function in (checkpointed, lambda x, w: F.linear(torch.sigmoid(x), w))
    ]
    for i in (0, 1):
        assert torch.equal(*(result.gradients[i] for result in results))


@pytest.mark.parametrize("spelling", ["bmm", "einsum", "transposed"])
def test_batched_experts_are_products_of_equal_groups(spelling: str) -> None:
    """As many tokens for each expert, by `bmm` or `einsum`: the products of `grouped_mm`, to the bit."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 128, 32, generator=generator).to(BF16).requires_grad_()
    w = (torch.randn(3, 32, 64, generator=generator).to(BF16)).requires_grad_()
    offs = ends(128, 128, 128)

    def batched(x: Tensor, w: Tensor) -> Tensor:
        if spelling == "einsum":
            return torch.einsum("eck,ekn->ecn", x, w)
        return torch.bmm(x, w if spelling == "bmm" else w.mT.contiguous().mT)

    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x.flatten(0, 1), w, offs=offs).view(3, 128, 64)

    model = nn.ParameterDict({"w": nn.Parameter(w.detach())})

    class Batched(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.held, self.function = model, function

        def forward(self, x: Tensor) -> Tensor:
            return self.function(x, self.held["w"])

    results = [compile_and_run(Batched(function), x, recipe=PLAIN, backward="fp8") for function in (batched, grouped)]
    assert {(row["role"], row["provider"]) for row in results[0].gemms} == set(KERNELS_OF_MANY_ROWS.items())
    for a, b in zip(*([r.outputs, *r.gradients.values()] for r in results), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("shape", "columns", "limit"),
    [
        ((3, 127, 32), 64, "127 rows each, fewer than the 128 that fill a tile"),
        ((3, 64, 32), 64, "64 rows each, fewer than the 128 that fill a tile"),
        ((3, 128, 32), 48, "48 columns each, fewer than the 64 that fill a tile"),
        ((300, 128, 32), 64, "300 matrices, more than the 256 that the kernel for groups takes"),
    ],
)
def test_small_and_many_batches_stay_decoded(shape: tuple[int, int, int], columns: int, limit: str) -> None:
    """A tile per group would be half empty, or a group hard to find. The report says which limit it is, of all three
    products.
    """
    w = nn.Parameter(torch.randn(shape[0], 32, columns).to(BF16))
    x = torch.randn(shape).to(BF16).requires_grad_()
    result = compile_and_run(lambda x, w: torch.bmm(x, w), x, w, recipe=PLAIN, backward="fp8")
    assert {row["provider"] for row in result.gemms} == {"dequantize + aten"}
    assert {row["role"]: row["reason"] for row in result.gemms} == dict.fromkeys(
        ("fprop", "dgrad", "wgrad"), f"a product of batches: {limit}"
    )


def test_batches_of_sizes_known_at_run_time_stay_decoded() -> None:
    w = nn.Parameter(torch.randn(3, 32, 64).to(BF16))
    x = torch.randn(3, 130, 32).to(BF16).requires_grad_()
    torch._dynamo.mark_dynamic(x, 1)
    result = compile_and_run(lambda x, w: torch.bmm(x, w), x, w, recipe=PLAIN, backward="fp8")
    reasons = {row["reason"] for row in result.gemms if row["role"] == "fprop"}
    assert reasons == {"a product of batches: sizes are known at run time only"}


class Looped(Experts):
    """Experts one after the other, which ones being decided by data: Dynamo leaves the whole method in Python."""

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        y, starts = torch.zeros_like(x), offs - torch.diff(offs, prepend=offs.new_zeros(1))
        for expert in (offs > starts).nonzero():
            rows = slice(int(starts[expert]), int(offs[expert]))
            gate, up = F.linear(x[rows], self.up[int(expert)]).chunk(2, -1)
            y[rows] = F.linear(F.silu(gate) * up, self.down[int(expert)])
        return y


class Layer(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.conv = nn.Linear(32, 32, dtype=BF16), experts, nn.Conv1d(4, 4, 1, dtype=BF16)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return self.experts(self.router(x), offs)


def test_experts_that_stay_in_python_are_warned_of_once() -> None:
    """At the second call, naming what no graph has read. Not of experts in a graph, of one model or of another that
    runs its code; not of other parameters that nothing reads.
    """
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(gm)
        return compile_with(PLAIN, gm, inputs, inner_compile=compat.eager_inner_compile)

    def warned(model: nn.Module) -> list[list[str]]:
        """Of what each of three calls warns."""
        compiled, said = torch.compile(model, backend=backend), []
        for _ in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                compiled(tokens(), OFFS)
            said.append([text for w in caught if "no graph reads" in (text := str(w.message))])
        return said

    torch._dynamo.reset()
    before, (warning,), after = warned(Layer(Looped()))
    assert before == after == []
    assert "no graph reads experts.up, experts.down: " in warning
    graphs.clear()
    for _ in range(2):
        assert warned(Layer(Experts())) == [[], [], []]
    assert len(graphs) == 1, "the second model ran the first one's code"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(Experts()) for _ in range(2))

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, offs)
        return x


def test_rules_name_what_experts_are_kept_in() -> None:
    """A parameter of experts is a layer to rules: of all blocks, or of one."""
    rules = [
        {"name": "layers.*.experts.down", "quantize": False},
        {"name": "layers.1.experts.up", "weight": {"format": "int4"}},
    ]
    with torch.no_grad():
        result = compile_and_run(Stack(), tokens(False), OFFS, recipe=PLAIN, rules=rules)
    weights = {d.site.name: str(d.operands[1]).split()[0] if d.quantized else "" for d in result.decisions}
    assert weights == {
        "layers.0.router": "e2m1",
        "layers.0.experts.up": "e2m1",
        "layers.0.experts.down": "",
        "layers.1.router": "e2m1",
        "layers.1.experts.up": "int4",
        "layers.1.experts.down": "",
    }
