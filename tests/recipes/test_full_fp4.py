"""Recipes of all three products: numbers against TransformerEngine's, what they do to a model, and that it learns.

The golden hashes are of ``NVFP4QuantizerRef`` of TransformerEngine d0067d0, run on the input below. A scale that were
rounded once more, or a sign of the rotation that were wrong, would change them.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.ir.ops import global_scale_of, quantize_along, with_signs
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.rules import Block, Rule
from qcompile.ir.transforms import Transform
from qcompile.kernels.quantize import reference
from qcompile.kernels.transform.reference import rotate
from qcompile.recipes import IF4, MXFP4, MXFP8, NVFP4, QUARTET2, TETRAJET2, UNIFORM4
from tests.passes.harness import assert_same, backward, compile_and_run, compiler, leaves_of

RECIPES = {recipe.name: recipe for recipe in (QUARTET2, NVFP4, TETRAJET2, UNIFORM4, IF4, MXFP4, MXFP8)}

#: Quantizer, whether of the transposed input, and SHA-256 of codes and scales, 16 digits.
GOLDEN = {
    "1x16": ("e2m1 block16 e4m3", False, "eb45d6b458c2690d", "9fdfe1e59f7cd158"),
    "1x16, transposed": ("e2m1 block16 e4m3", True, "c63faf2f4bde0fca", "5912f1251a259d63"),
    "1x16, transposed, rotated": ("e2m1 block16 e4m3", True, "ee99c359b47d0764", "d64ddbb419917e31"),
    "16x16": ("e2m1 block16x16 e4m3", False, "e46637d4f7cdf5e0", "f34362cd48d5e579"),
    "16x16, transposed": ("e2m1 block16x16 e4m3", True, "2c885e82d6070a10", "b57515791c44822a"),
    "16x16, 4/6": ("e2m1 block16x16 e4m3_46", False, "66308bdcd8cb09ba", "4e5ca9d1ee14981f"),
    "16x16, 4/6, transposed": ("e2m1 block16x16 e4m3_46", True, "f3964025168b3d42", "e1afe3386411f926"),
}


def golden_input() -> Tensor:
    i, j = torch.arange(32).double()[:, None], torch.arange(64).double()
    return (((37 * i + 101 * j) % 257 - 128) / 64 * 2 ** ((i + 3 * j) % 7 - 3)).float()


def digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def quantized(x: Tensor, text: str) -> tuple[Tensor, Tensor]:
    q = Quantizer.parse(text)
    codes, scales = reference.quantize(x, str(q), -1, global_scale_of(x, q), torch.tensor([1]) if q.draws else None)
    return codes, scales.view(torch.uint8)


def decoded(x: Tensor, text: str) -> Tensor:
    q = Quantizer.parse(text)
    codes, scales = quantized(x, text)
    dtype = getattr(torch, q.scale.storage)
    return reference.dequantize(codes, scales.view(dtype), str(q), -1, x.shape[-1], x.dtype, global_scale_of(x, q))


def rotated(x: Tensor) -> Tensor:
    """x · D·H in blocks of 16, as operands of the backward are rotated."""
    return rotate(with_signs(x, Transform.parse("hadamard(16,signs=fixed)"), -1), 16)


@pytest.mark.parametrize("case", GOLDEN)
def test_codes_and_scales_are_those_of_transformer_engine(case: str) -> None:
    text, transposed, codes_hash, scales_hash = GOLDEN[case]
    x = golden_input()
    assert digest(x) == "b0987f51a464c2c1"
    x = x.T.contiguous() if transposed else x
    x = rotated(x) if "rotated" in case else x
    codes, scales = quantized(x, text)
    if "16x16" in text:  # stored once per square; TransformerEngine repeats them for every row
        scales = scales.repeat_interleave(16, 0)
    assert (digest(codes), digest(scales)) == (codes_hash, scales_hash)


def four_over_six(x: Tensor, power: int, cap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of TransformerEngine's 4/6 in rows (MSE, or MAE with power 1), in the order of its operations;
    and both scales of every block before they are rounded.
    """
    blocks, encode = x.unflatten(-1, (-1, 16)), cap * 6 / x.abs().max()
    levels, found, plain = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]), [], []
    for factor in (1.0, 1.5):
        plain.append(blocks.abs().amax(-1, keepdim=True) / 6 * encode * factor)
        scale = plain[-1].clamp(max=448).to(torch.float8_e4m3fn)
        decode = scale.float() * (1 / encode)
        distance = ((blocks * (1 / decode)).abs().clamp(max=6).unsqueeze(-1) - levels).abs()
        ties = distance == distance.amin(-1, keepdim=True)
        code = torch.where(ties, torch.arange(8) + 8 * (torch.arange(8) % 2), 99).amin(-1) % 8  # to the even code
        error = (blocks.abs() - levels[code] * decode).abs().pow(power).sum(-1, keepdim=True)
        found.append((scale.view(torch.uint8), code + 8 * blocks.signbit(), error))
    (s6, c6, e6), (s4, c4, e4) = found
    low, high = torch.where(e4 < e6, c4, c6).flatten(-2).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4, torch.where(e4 < e6, s4, s6)[..., 0], torch.stack(plain)[..., 0]


@pytest.mark.parametrize(
    ("rule", "power", "cap", "hashes"),
    [
        ("e4m3_46", 2, 256, ("2b3e63904aade55a", "238bbcfc386c1309")),
        ("e4m3_46_mae", 1, 256, ("819d5d81c08beba6", "8b30f205744cd954")),
        ("e4m3_46_448", 2, 448, None),
        ("e4m3_46_mae_448", 1, 448, None),
    ],
)
def test_four_over_six_in_rows_differs_from_transformer_engine_by_ties_of_scales_only(
    rule: str, power: int, cap: int, hashes: tuple[str, str] | None
) -> None:
    """Both round amax/6 · (1536/amax of the tensor). Ours divides by the tensor's scale, which is rounded, theirs
    multiplies by its exact inverse: where that is halfway between two E4M3 numbers, 6 blocks of 128 here and with
    the cap of 256, ours may go to the other. Everything else is equal.
    """
    x = golden_input()
    codes, scales, plain = four_over_six(x, power, cap)
    assert hashes is None or (digest(codes), digest(scales)) == hashes  # of the other cap there are none
    our_codes, our_scales = quantized(x, f"e2m1 block16 {rule}")
    differs = scales != our_scales
    number = plain.clamp(max=448)
    mantissa = number / 2 ** torch.floor(torch.log2(number)) * 16  # halfway: an odd number of sixteenths
    halfway = ((mantissa - mantissa.round()).abs() < 1e-4) & (mantissa.round() % 2 == 1)
    assert differs.sum() <= 6
    assert differs.any() == (cap == 256)
    assert halfway.any(0)[differs].all()
    assert torch.equal(*(c.unflatten(-1, (-1, 8))[~differs] for c in (codes, our_codes)))


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("e2m1 block16 e4m3", 3.38),
        ("e2m1 block16 e4m3_46", 3.52),
        ("e2m1/int4 block16 e4m3", 3.67),
        ("e2m1 block16 e4m3_eden eden", 3.32),
    ],
)
def test_effective_bits_of_normal_numbers(text: str, bits: float) -> None:
    """½ · log2(1 / relative squared error), to the two decimals that are published."""
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    error = (decoded(x, text) - x).square().sum() / x.square().sum()
    assert round(-0.5 * error.log2().item(), 2) >= bits


def test_scales_rounded_up_cut_nothing_off() -> None:
    """The next power of two: one step lower would leave an element outside of the grid."""
    x = torch.randn(64, 320, generator=torch.Generator().manual_seed(0)) * torch.logspace(-20, 20, 64, 2)[:, None]
    for name, largest in (("e2m1", 6.0), ("e4m3", 448.0)):
        _, scales = quantized(x, f"{name} block32 e8m0_ceil")
        scale = torch.exp2(scales.double() - 127)
        amax = x.unflatten(-1, (-1, 32)).abs().amax(-1)
        assert (amax <= scale * largest).all()
        assert (amax > scale / 2 * largest).all()


def test_operands_rotated_alike_multiply_to_the_same() -> None:
    """D·H is orthogonal: what both operands of a product have, it does not see."""
    a, b = torch.randn(48, 8), torch.randn(48, 4)
    turned = [quantize_along(t, "e4m3 block16; hadamard(16,signs=fixed)", (1,), (0,)) for t in (a, b)]
    exact = a.T @ b
    assert (turned[0].T @ turned[1] - exact).norm() < 0.06 * exact.norm()
    assert (turned[0].T @ b - exact).norm() > exact.norm() / 2


# --- what they do to a model ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Four blocks of one layer, the last of which NVIDIA's recipe leaves wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x).relu()
        return x


EXPECTED = {
    "qcompile_nvfp4": (
        "wgrad reads activation again as e2m1 block16 e4m3 even, and with dY in hadamard(16,signs=fixed)",
    ),
    "qcompile_quartet2": (
        "dgrad reads weight again from its codes as e2m1 block16 e4m3_eden eden, and with dY in hadamard(32,signs=d",
        "wgrad reads activation again from its codes as e2m1 block16 e4m3_eden eden, and with dY in hadamard(32,",
    ),
    "qcompile_tetrajet2": ("dgrad reads weight again from its codes as e2m1 block16 e4m3 stochastic, and with dY in",),
    "qcompile_uniform4": (
        "dgrad reads weight again as int4 block16 e4m3 even, and with dY in hadamard(16,signs=fixed)",
    ),
    "qcompile_if4": ("wgrad reads activation again as e2m1/int4 block16 e4m3 even, and with dY in hadamard(16,",),
    "qcompile_mxfp4": (
        "dgrad reads weight again as e2m1 block32 e8m0_ceil stochastic, and with dY in hadamard(32,signs=fixed)",
        "wgrad reads activation again as e2m1 block32 e8m0_ceil stochastic, and with dY in hadamard(32,signs=fixed)",
    ),
    "qcompile_mxfp8": (
        "dgrad reads weight again as e4m3 block32 e8m0_ceil even",
        "wgrad reads activation again as e4m3 block32 e8m0_ceil even",
    ),
}


#: Of the recipes, those that differ in kind.
EVERY_RUN = ("qcompile_quartet2", "qcompile_nvfp4", "qcompile_mxfp4")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.nightly] * (name not in EVERY_RUN)) for name in RECIPES],
)
def test_a_recipe_quantizes_what_it_says_and_learns(name: str) -> None:
    """All products of all blocks but the last, and a few steps at the end of which a regression is better."""
    model, x = Model(), torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    compiled, observations = compiler(model, RECIPES[name])
    target, losses = x.roll(1, -1), []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(4):
        loss = (compiled(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    (observed,) = observations
    decisions = observed.plan.decisions  # type: ignore[union-attr]
    assert [d.quantized for d in decisions] == [True] * 3 + [name not in ("qcompile_nvfp4", "qcompile_if4")]
    for text in EXPECTED[name]:
        assert text in decisions[0].reason
    first = {row["role"]: row["operands"] for row in observed.gemms if row["site"] == 1}
    read = {role: sum(text != "dense" for text in texts) for role, texts in first.items()}
    assert read == {"fprop": 0 if name == "qcompile_mxfp4" else 2, "dgrad": 2, "wgrad": 2}, first


@pytest.mark.parametrize(("count", "wide"), [(2, 0), (4, 1), (8, 1), (62, 9)])
def test_the_last_blocks_of_a_model(count: int, wide: int) -> None:
    rule = Rule(last_blocks=0.15, quantize=False)
    matching = [i for i in range(count) if rule.matches(f"layers.{i}.up", "linear", 10, Block(i, count))]
    assert matching == list(range(count - wide, count))
    assert not rule.matches("head", "linear", 10)


def test_blocks_that_are_frames_of_their_own_are_told_apart() -> None:
    """After a graph break all blocks run one code object; the last must not run what was compiled for the first."""

    class Broken(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model = Model()
    model.blocks = nn.ModuleList(Broken(32, 32) for _ in range(4))
    compiled, observations = compiler(model, NVFP4, fullgraph=False)
    compiled(torch.randn(4, 32))
    decisions = [d for o in observations for d in o.plan.decisions]  # type: ignore[union-attr]
    assert {d.site.name: d.quantized for d in decisions} == {f"blocks.{i}": i < 3 for i in range(4)}


@pytest.mark.parametrize("rules", [[], [{"last_blocks": 0.15, "quantize": False}]], ids=["recipe's", "user's"])
def test_a_rule_for_blocks_without_blocks(rules: list) -> None:
    """A user's says so; the recipe's own is no mistake of the user's, for whom `explain` would be an error."""
    result = compile_and_run(nn.Linear(32, 32), torch.randn(2, 32), recipe=NVFP4, enabled=False, rules=rules)
    expected = {"rule '*' (last_blocks=0.15, quantize=False)": 0} if rules else {}
    assert dict(result.observations[0].plan.matched) == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["qcompile_quartet2", "qcompile_nvfp4"])
def test_a_wide_backward_reads_the_codes_of_the_forward(name: str) -> None:
    """dY is not quantized, and nothing is read again: gradients are those of the product of decoded operands."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(32, 64, requires_grad=True)
    result = compile_and_run(layer, x, recipe=RECIPES[name].override({"backward": "bf16"}))
    operands = {row["role"]: row["operands"] for row in result.gemms}
    forward = operands["fprop"]
    assert all(text.startswith("e2m1 block16") for text in forward)
    assert {role: sorted(texts) for role, texts in operands.items() if role != "fprop"} == {
        "dgrad": sorted(["dense", forward[1]]),
        "wgrad": sorted(["dense", forward[0]]),
    }
    fake = (torch.ops.qcompile.fake_quantize(t, text, -1) for t, text in zip((x, layer.weight), forward, strict=True))
    y = nn.functional.linear(*fake, layer.bias)
    assert_same(result.outputs, y)
    assert_same(result.gradients, backward(y, leaves_of(layer, (x,))))


def test_the_report_says_what_a_wide_forward_leaves_quantized() -> None:
    report = qcompile.explain(nn.Sequential(nn.Linear(64, 64)), torch.randn(32, 64), backend="qcompile_mxfp4")
    (forward, _, wgrad) = report.rows
    assert forward.decision == "skipped"
    assert forward.reason == f"the forward is in high precision; quantized: wgrad {wgrad.formats}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wgrad_activation": "e2m1 row; clip"}, "an operand of the backward takes a quantizer and a rotation only"),
        ({"activation": "e2m1 row; ste; hadamard(16,signs=fixed)"}, "signs= go with operands of the backward"),
        ({"dgrad_weight": "e2m1 row; hadamard(16,signs=random)"}, "signs are those of a rotation, fixed or drawn"),
        ({"forward": "fp16"}, "'fp16' is not one of quantized, bf16"),
        ({"rules": [{"last_blocks": 15, "quantize": False}]}, "last_blocks=15 is not a share from 0 to 1"),
    ],
)
def test_what_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NVFP4.override(options)


@pytest.mark.nightly
@pytest.mark.parametrize("forward", ["quantized", "bf16"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_small_llama_learns(name: str, forward: str) -> None:
    """Through Inductor, with tokens that no power of two above 8 divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch._dynamo.reset()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model, backend=name, options={"forward": forward})
    tokens = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for _ in range(12):
        loss = compiled(tokens, labels=tokens).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5, losses


@pytest.mark.nightly
def test_evaluation_reads_what_training_reads() -> None:
    """Without a gradient the forward is the same: NVFP4 in all blocks but one."""
    model, x = Model(), torch.randn(32, 32)
    trained = compile_and_run(model, x, recipe=NVFP4)
    evaluated = compile_and_run(model.requires_grad_(False), x, recipe=NVFP4)
    assert torch.equal(trained.outputs, evaluated.outputs)
    assert [d.quantized for d in evaluated.decisions] == [True] * 3 + [False]
