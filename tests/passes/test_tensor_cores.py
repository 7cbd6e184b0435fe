"""Products on 8-bit tensor cores: folded gradients, lowering, merged quantization.

The passes are told that the CPU is an sm_90 device; the ops then run as their plain-torch references. What would break:
gradients that are not the formula's, an operand read in the wrong layout, a tensor quantized twice, a product that
quietly stays in high precision.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile import compat
from qcompile.ir.formats import FORMATS, Format
from qcompile.passes.verify import VerificationError, verify
from qcompile.recipes import QUEST
from qcompile.report import saved_bytes

from .harness import SMALL_FP4 as FP4
from .harness import assert_same, compile_and_run, compiler, fp4, run_eager

E4M3_OUTLIERS = {"outliers": "occ(alpha=0.97,residual=e4m3)"}
OFF = {"outliers": None}


@pytest.fixture(autouse=True)
def _hopper(request: pytest.FixtureRequest) -> Any:
    """Every device has Hopper's tensor cores, unless the test says otherwise."""
    capability = getattr(request, "param", (9, 0))
    with mock.patch.object(compat, "tensor_core_capability", return_value=capability):
        yield


class Block(nn.Module):
    """Two layers share an input, one has a bias, one reads what they make; widths off every power of two."""

    def __init__(self, width: int = 48, hidden: int = 80) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


class _FoldedLinear(torch.autograd.Function):
    """A linear layer by the formulas: dX = Q(dY ⊙ s_w) · Wq, dW = Q(dY ⊙ s_x)ᵀ · Xq, with codes that are exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, activation: str, roles: tuple[str, ...], gradient: str) -> Tensor:
        ops = torch.ops.qcompile
        ctx.roles, ctx.gradient, ctx.shape = roles, gradient, x.shape
        rows = x.reshape(-1, x.shape[-1])
        if "residual=e4m3" in activation:
            codes, s_x, _ = ops.quantize_compensated(rows, activation, -1)
            x_levels = codes.view(torch.float8_e4m3fn).float()
        else:
            codes, s_x = ops.quantize(rows, activation.split(";")[0], -1)
            x_levels = ops.recode(codes, "e2m1", x.shape[-1], False).float()
        codes, s_w = ops.quantize(w, str(FP4.weight.quantizer), -1)  # type: ignore[union-attr]
        w_levels = ops.recode(codes, "e2m1", w.shape[-1], False).float()
        ctx.save_for_backward(x_levels, s_x, w_levels, s_w, w)
        return ((x_levels * s_x) @ (w_levels * s_w).T).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x_levels, s_x, w_levels, s_w, w = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])

        def rounded(gradient: Tensor, axis: int) -> Tensor:
            ops = torch.ops.qcompile
            codes, scales = ops.quantize(gradient, ctx.gradient, axis)
            return ops.dequantize(codes, scales, ctx.gradient, axis, gradient.shape[axis], torch.float32)

        dx = rounded(dy * s_w.T, 1) @ w_levels if "dgrad" in ctx.roles else dy @ (w_levels * s_w)
        dw = rounded(dy * s_x, 0).T @ x_levels if "wgrad" in ctx.roles else dy.T @ (x_levels * s_x)
        weight = FP4.weight
        assert weight is not None
        dw = torch.ops.qcompile.scale_gradient(dw, w, s_w, str(weight.quantizer), str(weight.estimator), -1)
        return dx.view(ctx.shape), dw, None, None, None


ROLES = {"bf16": (), "dgrad_fp8": ("dgrad",), "fp8": ("dgrad", "wgrad")}


@pytest.mark.parametrize("activation", [OFF, E4M3_OUTLIERS], ids=["plain", "outliers"])
@pytest.mark.parametrize("mode", ROLES)
@pytest.mark.parametrize("gradient", ["e4m3 row absmax even", "e5m2 row absmax_pow2 even", "e4m3 tensor absmax even"])
def test_gradients_are_the_formulas(mode: str, activation: dict[str, Any], gradient: str) -> None:
    """Forward and all gradients, in float32, of a block whose layers share inputs; scales fold and codes stay exact."""
    default = gradient == "e4m3 row absmax even"
    if mode != "fp8" and not default:
        pytest.skip("a format of the gradient that is given holds for the products that are not folded too")
    recipe = fp4(activation=activation)
    options = {"backward": mode} | ({} if default else {"gradient": gradient})
    model, x = Block(), torch.randn(5, 7, 48, requires_grad=True)
    result = compile_and_run(model, x, recipe=recipe, **options)

    def linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        y = _FoldedLinear.apply(x, w, str(recipe.activation), ROLES[mode], gradient)
        return y if bias is None else y + bias

    with mock.patch.object(F, "linear", linear):
        outputs, gradients = run_eager(model, x)
    assert_same(result.outputs, outputs)
    for name, expected in gradients.items():
        actual = result.gradients[name]
        # A sum in another order moves a few gradients across a rounding threshold; a wrong formula moves all by 2 %.
        assert (actual - expected).norm() < 3e-3 * expected.norm(), name
    roles = [(row["role"], row["provider"].startswith("dequantize")) for row in result.gemms]
    assert sorted(roles) == sorted(
        (role, role != "fprop" and role not in ROLES[mode]) for role in ("fprop", "dgrad", "wgrad") for _ in range(3)
    )


def test_each_tensor_is_quantized_once_and_for_all_its_readers() -> None:
    """One input for gate and up, one read of a gradient for dgrad and wgrad, one transposition of shared codes."""
    result = compile_and_run(
        Block(), torch.randn(35, 48, requires_grad=True), recipe=fp4(activation=OFF), backward="fp8"
    )
    forward, backward = (result.program(f"post_grad_merge_quantize{n}") for n in ("", "_2"))
    assert forward.count("qcompile.quantize_8bit.default(") == 5  # two activations, three weights
    assert forward.count("qcompile.mm_8bit.default(") == 3
    assert backward.count("qcompile.quantize_8bit_pair.default(") == 3
    assert backward.count("qcompile.quantize_8bit_transposed.default(") == 3
    assert backward.count("qcompile.recode.default(") == 2
    assert backward.count("qcompile.mm_8bit.default(") == 6
    for program in (forward, backward):
        assert "qcompile.quantize.default(" not in program
        assert "dequantize" not in program
        assert "qcompile.quantized_mm" not in program


@pytest.mark.parametrize("activation", [OFF, E4M3_OUTLIERS], ids=["plain", "outliers"])
def test_what_is_saved_are_codes(activation: dict[str, Any]) -> None:
    """Half a byte per element, or one with outliers, and one scale per row; never the gradient's operands."""
    model, x = nn.Linear(128, 64, bias=False), torch.randn(32, 128, requires_grad=True)
    compiled, _ = compiler(model, FP4, activation=activation, backward="fp8")
    with saved_bytes(model, x) as saved:
        compiled(x)
    assert saved.total == 32 * (64 if activation is OFF else 128) + 32 * 4


def test_int8_codes_run_forward_and_leave_the_gradient_wide() -> None:
    """midrise7 is exact in int8 as odd numerators; a gradient in 8-bit floating point cannot meet it."""
    recipe = fp4(activation="midrise7 row", weight="midrise7 row")
    model, x = nn.Linear(40, 24, bias=False), torch.randn(9, 40, requires_grad=True)
    result = compile_and_run(model, x, recipe=recipe, backward="fp8")
    exact = compile_and_run(model, x, recipe=recipe, disable_passes=["lower"])
    assert_same(result.outputs, exact.outputs)
    assert_same(result.gradients, exact.gradients)
    reasons = {row["role"]: (row["provider"].startswith("dequantize"), row["reason"]) for row in result.gemms}
    assert not reasons["fprop"][0]
    assert reasons["wgrad"] == (True, "midrise7 is not exact in 8-bit floating point, which gradients need")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "the exact residual of the outliers (occ(residual=e4m3) is a code)"),
        ({"activation": "e2m1 block16"}, "scales block16 absmax change along the contraction"),
        ({"activation": "thirds row"}, "thirds fits no 8-bit tensor-core type"),
        ({"activation": "midrise7 row"}, "e4m3 and int8 do not mix on tensor cores"),
        ({"activation": "midrise8 row"}, "e4m3 and int8 do not mix on tensor cores"),
    ],
    ids=str,
)
def test_products_that_stay_wide_say_why(options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "thirds", Format("thirds", 3, (0.0, 1 / 3, 2 / 3, 1.0)))
    result = compile_and_run(nn.Linear(128, 64), torch.randn(9, 128), recipe=fp4(**options))
    (row,) = (row for row in result.gemms if row["role"] == "fprop")
    assert (row["provider"], row["reason"]) == ("dequantize + aten", reason)


@pytest.mark.parametrize("_hopper", [None], indirect=True)
def test_without_tensor_cores_folded_gradients_are_the_same_numbers() -> None:
    """`lower` decodes what it cannot run on codes; the pass that changes numbers is `fold`, on every device."""
    model, x = Block(), torch.randn(35, 48, requires_grad=True)
    options: dict[str, Any] = {"recipe": fp4(activation=OFF), "backward": "fp8"}
    decoded = compile_and_run(model, x, **options)
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        on_codes = compile_and_run(model, x, **options)
    assert_same(decoded.outputs, on_codes.outputs)
    assert_same(decoded.gradients, on_codes.gradients)
    assert {row["reason"] for row in decoded.gemms} == {"no 8-bit tensor cores on cpu"}


@pytest.mark.parametrize("lead", [(1,), (3,)], ids=["matrix", "batch"])
def test_dynamic_tokens(lead: tuple[int, ...]) -> None:
    """Tokens are wgrad's contraction: its length is known at run time only, and so may be every leading axis."""
    model = Block()
    compiled, observations = compiler(model, fp4(activation=OFF), dynamic=True, backward="fp8")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (35, 17, 64):
            shape = (tokens,) if lead == (1,) else (lead[0] + tokens // 16, tokens)
            x = torch.randn(*shape, 48, requires_grad=True)
            compiled(x).sum().backward()
            assert x.grad is not None
            assert x.grad.isfinite().all()
    assert len(observations) == 1


@pytest.mark.parametrize("gradient", ["e2m1 block16 e4m3", "int8 row", "e4m3 block32 e8m0"])
def test_gradients_that_tensor_cores_cannot_fold_are_refused(gradient: str) -> None:
    with pytest.raises(Exception, match=r"layer .*: option 'backward' needs a gradient exact in 8-bit floating point"):
        compile_and_run(nn.Linear(48, 64), torch.randn(9, 48, requires_grad=True), backward="fp8", gradient=gradient)


@pytest.mark.parametrize("_hopper", [(8, 0)], indirect=True)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_card_without_fp8_decodes_whatever_the_shapes(dynamic: bool) -> None:
    x = torch.randn(35, 48, requires_grad=True)
    result = compile_and_run(Block(), x, recipe=fp4(activation=OFF), backward="fp8", dynamic=dynamic)
    assert {row["provider"] for row in result.gemms} == {"dequantize + aten"}
    assert all("FP8 needs compute capability 8.9" in row["reason"] for row in result.gemms)


def test_float64_and_a_broadcast_bias_decode() -> None:
    """Tensor cores sum and scale in float32; their epilogue reads one bias a column."""
    wide = compile_and_run(nn.Linear(48, 64).double(), torch.randn(9, 48).double(), recipe=fp4(activation=OFF))
    weight = nn.Parameter(torch.randn(64, 48))
    scalar = compile_and_run(lambda x, b: F.linear(x, weight, b), torch.randn(9, 48), torch.randn(1))
    for result in (wide, scalar):
        providers = {row["provider"] for row in result.gemms if row["role"] == "fprop"}
        assert providers <= {"dequantize + aten"}


def test_rules_reach_folded_gradients() -> None:
    """A rule may keep one role of one layer wide."""
    rules = [{"name": "down", "roles": ["wgrad"], "gradient": "off"}]
    x = torch.randn(35, 48, requires_grad=True)
    result = compile_and_run(Block(), x, recipe=fp4(activation=OFF), backward="fp8", rules=rules)
    wide = [row["role"] for row in result.gemms if "dense" in row["operands"]]
    assert wide == ["wgrad"]


# --- rotated operands (QuEST) ---------------------------------------------------------------------------------------


def test_rotated_operands_are_encoded_and_masked_in_one_kernel() -> None:
    """Codes for the product, packed codes and mask for the backward from one reading of x. The backward reads weights
    once, for their transposed codes and their mask.
    """
    x = torch.randn(35, 48, requires_grad=True)
    result = compile_and_run(Block(), x, recipe=QUEST, backward="fp8")
    forward, backward = (result.program(f"post_grad_merge_quantize{n}") for n in ("", "_2"))
    assert forward.count("qcompile.quantize_8bit_masked.default(") == 5  # two activations, three weights
    assert forward.count("qcompile.mm_8bit.default(") == 3
    assert "estimator_mask" not in forward
    assert backward.count("qcompile.quantize_8bit_masked.default(") == 3
    assert backward.count("qcompile.recode.default(") == 5  # three weights and two activations, transposed
    for other in ("quantize_8bit_transposed", "estimator_mask"):
        assert f"qcompile.{other}.default(" not in backward
    assert backward.count("qcompile.quantize_8bit_pair.default(") == 3
    assert backward.count("qcompile.mm_8bit.default(") == 6
    assert backward.count("qcompile.hadamard.default(") == 5  # each gradient of a rotated operand, once
    for program in (forward, backward):
        assert "qcompile.quantize.default(" not in program
        assert "dequantize" not in program


@pytest.mark.parametrize("backward", ["bf16", "fp8"])
@pytest.mark.parametrize("bits", [1, 3, 4, 7, 8, "ternary", "fp4"])
def test_rotated_codes_on_tensor_cores_are_the_same_numbers(bits: Any, backward: str) -> None:
    model, x = Block(), torch.randn(35, 48, requires_grad=True)
    options: dict[str, Any] = {"recipe": QUEST, "bits": bits, "backward": backward}
    on_codes = compile_and_run(model, x, **options)
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        decoded = compile_and_run(model, x, **options)
    assert_same(on_codes.outputs, decoded.outputs)
    assert_same(on_codes.gradients, decoded.gradients)
    forward = {row["provider"] for row in on_codes.gemms if row["role"] == "fprop"}
    assert not any(name.startswith("dequantize") for name in forward)


# --- signs ----------------------------------------------------------------------------------------------------------


def test_signs_are_counted_as_they_are_stored() -> None:
    """Nothing is recoded on the way forward, and one reading of x gives codes and mask; weights are masked later."""
    model, x = Block(128, 256), torch.randn(35, 128, requires_grad=True)
    result = compile_and_run(model, x, recipe=QUEST, bits=1, backward="fp8")
    forward, backward = (result.program(f"post_grad_merge_quantize{n}") for n in ("", "_2"))
    assert forward.count("qcompile.mm_1bit.default(") == 3
    assert forward.count("qcompile.quantize_8bit_masked.default(") == 2
    assert forward.count("True, False)") == 2  # packed, and no 8-bit codes
    assert forward.count("qcompile.quantize.default(") == 3
    assert forward.count("qcompile.count_bits.default(") == 5  # one per operand
    for absent in ("mm_8bit", "recode", "estimator_mask"):
        assert absent not in forward
    assert backward.count("qcompile.mm_8bit.default(") == 6
    assert {row["provider"] for row in result.gemms if row["role"] == "fprop"} == {"popcount"}


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("bias", [False, True])
def test_counted_signs_give_the_product_of_the_levels(granularity: str, bias: bool) -> None:
    """Rows with far more of one sign than of the other, whose sums of levels are large."""
    text = f"midrise1 {granularity} absmax half_up"
    model, x = nn.Linear(256, 12, bias=bias), torch.rand(2, 9, 256) - 0.1
    nn.init.uniform_(model.weight, -0.1, 1)
    on_bits = compile_and_run(model, x, recipe=fp4(activation=text, weight=text))
    assert on_bits.gemms[0]["provider"] == "popcount"
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        decoded = compile_and_run(model, x, recipe=fp4(activation=text, weight=text))
    assert_same(on_bits.outputs, decoded.outputs)


def test_signs_that_would_have_to_be_transposed_are_recoded() -> None:
    """Bits lie along K. With one scale per tensor, dgrad and wgrad read 8-bit codes: stored rows are contracted."""
    text, model, x = "midrise1 tensor absmax half_up", nn.Linear(128, 256), torch.randn(384, 128, requires_grad=True)
    options: dict[str, Any] = {"recipe": fp4(activation=text, weight=text), "gradient": text}
    result = compile_and_run(model, x, **options)
    assert {row["role"]: row["provider"] for row in result.gemms} == {
        "fprop": "popcount",
        "dgrad": "triton",
        "wgrad": "triton",
    }
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        decoded = compile_and_run(model, x, **options)
    assert_same(result.gradients, decoded.gradients)


@pytest.mark.parametrize(
    ("size", "weight", "_hopper", "reason"),
    [
        (96, "midrise1", (9, 0), "popcount: K = 96 is no multiple of 128"),
        (128, "midrise1", (8, 9), "popcount: it needs compute capability 9.0"),
        (128, "midrise2", (9, 0), ""),
    ],
    indirect=["_hopper"],
)
def test_other_signs_are_8bit_codes(size: int, weight: str, _hopper: None, reason: str) -> None:
    """The reason is said before those of the 8-bit providers."""
    recipe = fp4(activation="midrise1 row absmax half_up", weight=f"{weight} row absmax half_up")
    model, x = nn.Linear(size, 16), torch.randn(8, size)
    (row,) = (row for row in compile_and_run(model, x, recipe=recipe).gemms if row["role"] == "fprop")
    assert row["provider"] == "triton"
    assert row["reason"].startswith(reason)
    assert reason or "popcount" not in row["reason"]


# --- codes beside their levels: the half-integers of 8 bits -----------------------------------------------------------


def test_codes_are_summed_once_and_for_all_their_readers() -> None:
    """Forward on INT8, one sum per operand; gradients in 8-bit floating point cannot meet it, and are the wide ones."""
    model, x = Block(), torch.randn(35, 48, requires_grad=True)
    result = compile_and_run(model, x, recipe=QUEST, bits=8, backward="fp8")
    forward, backward = (result.program(f"post_grad_merge_quantize{n}") for n in ("", "_2"))
    assert forward.count("qcompile.quantize_8bit_masked.default(") == 5  # two activations, three weights
    assert forward.count("qcompile.mm_8bit.default(") == 3
    assert forward.count("aten.sum.dim_IntList(") == 5
    assert "qcompile.mm_8bit.default(" not in backward
    wide = {row["role"]: row["reason"] for row in result.gemms if row["provider"].startswith("dequantize")}
    assert wide == dict.fromkeys(
        ("dgrad", "wgrad"), "midrise8 is not exact in 8-bit floating point, which gradients need"
    )
    exact = compile_and_run(model, x, recipe=QUEST, bits=8, disable_passes=["lower"])
    assert_same(result.gradients, exact.gradients)


@pytest.mark.parametrize(
    "names", [("midrise8", "midrise8"), ("midrise8", "midrise7"), ("int8", "midrise8")], ids=" ".join
)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_sums_of_codes_stand_in_for_their_offsets(names: tuple[str, str], granularity: str) -> None:
    """Either operand beside its levels, or both; codes that have one sign, whose sums are largest."""
    activation, weight = (f"{name} {granularity} absmax half_up" for name in names)
    model, x = nn.Linear(101, 12), torch.rand(9, 101)
    nn.init.uniform_(model.weight, -0.1, 1)
    on_codes = compile_and_run(model, x, recipe=fp4(activation=activation, weight=weight))
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        decoded = compile_and_run(model, x, recipe=fp4(activation=activation, weight=weight))
    assert_same(on_codes.outputs, decoded.outputs)
    assert not on_codes.gemms[0]["provider"].startswith("dequantize")


def test_sums_of_codes_over_tokens() -> None:
    """wgrad contracts tokens, known at run time only: a constant number of codes would be that of the first call."""
    text = "midrise8 tensor absmax half_up"
    options: dict[str, Any] = {"recipe": fp4(activation=text, weight=text), "gradient": text, "dynamic": True}
    model, results = nn.Linear(40, 24), []
    for capability in ((9, 0), None):
        with mock.patch.object(compat, "tensor_core_capability", return_value=capability):
            compiled, observations = compiler(model, **options)
            torch.manual_seed(0)
            for x in (torch.randn(35, 40), torch.randn(17, 40)):
                loss = (compiled(x) * torch.randn(len(x), 24)).sum()
                results.append(torch.autograd.grad(loss, model.weight))
            assert len(observations) == 1
            (wgrad,) = (row for row in observations[0].gemms if row["role"] == "wgrad")
            assert wgrad["provider"].startswith("dequantize") == (capability is None), wgrad
    assert_same(results[:2], results[2:])


def test_the_verifier_misses_sums_of_codes() -> None:
    """8-bit codes beside their levels, read as levels, are an error of the graph and not of its numbers only."""
    left, right = (torch.fx.Graph() for _ in range(2))
    for graph, present in ((left, (None, True)), (right, (True, None))):
        stored, one = graph.placeholder("stored"), graph.placeholder("one")
        codes = [
            graph.call_function(torch.ops.qcompile.recode.default, (stored, f, 4, False))
            for f in ("midrise8", "midrise8")
        ]
        offsets = [one if given else None for given in present]
        arguments = (*codes, one, one, torch.float32, None)
        graph.call_function(torch.ops.qcompile.mm_8bit.default, (*arguments, one, one))
        verify(graph, "lower")
        graph.call_function(torch.ops.qcompile.mm_8bit.default, (*arguments, *offsets))
        with pytest.raises(
            VerificationError, match=f"operand {present.index(True)} has codes of midrise8, without the sums"
        ):
            verify(graph, "lower")


@pytest.mark.parametrize("sparsity", ["4:8", "2:4"])
def test_sparse_weights_reach_tensor_cores(sparsity: str) -> None:
    """Zeros are a code of their own, exact in E4M3 like the levels."""
    model, x = Block(), torch.randn(35, 48, requires_grad=True)
    options: dict[str, Any] = {"recipe": QUEST, "weight": {"sparsity": sparsity}, "backward": "fp8"}
    on_codes = compile_and_run(model, x, **options)
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        decoded = compile_and_run(model, x, **options)
    assert_same(on_codes.outputs, decoded.outputs)
    assert_same(on_codes.gradients, decoded.gradients)
    assert {row["provider"].startswith("dequantize") for row in on_codes.gemms} == {False}


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("backend", "bits", "dtype"),
    [
        ("qcompile_fp4", 4, torch.float8_e4m3fn),
        ("qcompile_quest", 4, torch.float8_e4m3fn),
        ("qcompile_quest", 8, torch.int8),
        ("qcompile_quest", 1, torch.uint8),
    ],
)
def test_freezing_computes_weight_codes_once(backend: str, bits: int, dtype: torch.dtype, fresh_dynamo: None) -> None:
    """Served with frozen weights, nothing reads a wide or a packed weight any more, and no bit changes."""
    torch.manual_seed(0)
    model, x = Block(128, 256).eval().bfloat16(), torch.randn(17, 128).bfloat16()
    results, read = [], []
    for freezing in (False, True):
        torch._dynamo.reset()
        hook = {"freezing": freezing, "post_grad_custom_post_pass": lambda graph: read.append(_weights_read(graph))}
        with torch.no_grad(), torch._inductor.config.patch(hook):
            options = {"activation": OFF} | ({"bits": bits} if bits != 4 else {})
            results.append(torch.compile(model, backend=backend, options=options)(x))
    assert torch.equal(*results)
    assert read == [{torch.bfloat16}, {dtype}]


def _weights_read(graph: torch.fx.Graph) -> set[torch.dtype]:
    """Dtypes of the matrices that a graph takes from outside, its first argument left out."""
    outside = [n for n in graph.nodes if n.op in ("placeholder", "get_attr")]
    values = [n.meta["val"] if "val" in n.meta else getattr(graph.owning_module, n.target) for n in outside]
    return {value.dtype for value in values if value.dim() == 2 and value.shape[0] != 17 and value.shape[-1] > 1}
