"""Weights with zeros, and adapters on block sums that merge into those: no rounding but float32's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.ir.stored import Stored
from qcompile.recipes import STORED
from qcompile.stored import PackedWeight
from qcompile.stored.pack import packed_weights
from tests.passes.harness import assert_same, compile_and_run, compiler, leaf, run_eager
from tests.stored.adapters import language_model, loss_and_gradients, with_numbers

peft = pytest.importorskip("peft")

UINT4, NF4 = "uint4 block32; zeros", "nf4 block64 absmax_bnb; nested; zeros"


def weight(rows: int = 37, size: int = 96) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(16)) * 0.1 + 0.05


# --- zeros ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_the_unsigned_integers_between_minimum_and_maximum(bits):
    """By the definition, in float64: ``w = scale · code + zero``. Codes lie low bits first, as any codes of ours."""
    w = weight()
    packed = PackedWeight.of(w, f"uint{bits} block32; zeros")
    blocks = w.double().view(37, 3, 32)
    low, high = blocks.aminmax(dim=-1)
    scale = (high - low) / (2**bits - 1)
    q = ((blocks - low[..., None]) / scale[..., None]).round()
    stored = packed.codes if bits == 8 else _unpacked(packed.codes, bits)
    assert torch.equal(stored.view(37, 3, 32).double(), q)
    assert torch.equal(packed.zeros, low.float())
    assert packed.zeros.dtype == packed.scales.dtype == torch.float32
    torch.testing.assert_close(packed.scales, scale.float(), rtol=2**-22, atol=0)
    expected = (q * scale[..., None] + low[..., None]).view(37, 96)
    torch.testing.assert_close(packed.decoded().double(), expected, rtol=0, atol=2**-23)
    assert packed.nbytes == packed.codes.numel() + 2 * 4 * 37 * 3


def _unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.stack([(codes >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(-2)


def test_any_format_can_have_zeros():
    """A centred one in the middle of a block, so that adding a number to all weights of a block moves its zero alone.
    NF4 gains nothing on such weights but that.
    """
    w, shift = weight(8, 128), torch.tensor([3.0, -1.0]).repeat_interleave(64)
    packed, moved = (PackedWeight.of(value, NF4) for value in (w, w + shift))
    low, high = w.view(8, 2, 64).aminmax(dim=-1)
    torch.testing.assert_close(packed.zeros, (low + high) / 2, rtol=0, atol=2**-24)
    torch.testing.assert_close(moved.zeros, packed.zeros + torch.tensor([3.0, -1.0]), rtol=0, atol=2**-21)
    assert (moved.codes != packed.codes).float().mean() < 0.01  # float32 rounds w + shift
    assert list(packed.parts) == ["codes", "scale_codes", "second", "offset", "zeros"]


def test_blocks_of_equal_weights_and_rows_of_odd_length():
    constant = torch.full((3, 64), 0.3)
    assert torch.equal(PackedWeight.of(constant, UINT4).decoded(), constant)
    w = weight(5, 101)
    packed = PackedWeight.of(w, "uint8 row; zeros")
    assert packed.zeros.shape == (5, 1)
    assert (packed.decoded() - w).abs().max() < 0.51 * packed.scales.max()


def test_sixteen_bits_outside_leave_zeros_alone():
    """And the weight is rounded once, after its zero is added."""
    packed = PackedWeight.of(weight(), UINT4)
    narrow = packed.to(torch.bfloat16)
    assert narrow.zeros.dtype == torch.float32
    assert torch.equal(narrow.decoded(), packed.decoded().bfloat16())


def test_text_of_zeros():
    for text in (UINT4, "nf4 block64; nested; zeros", "nf4 row; nested(int8 block128 absmax even; mean); zeros"):
        assert Stored.parse(str(Stored.parse(text))) == Stored.parse(text)
    assert str(Stored.parse("uint4 block32;zeros")) == "uint4 block32 absmax even; zeros"
    wrong = {
        "uint4 block32": "uint4 has no negative levels; add '; zeros'",
        "uint4 tensor; zeros": "zeros belong to blocks of a row, for example block32, or to 'row'",
        "uint4 block32; zeross": r"'zeross' after the quantizer is not 'nested' .*, 'zeros' after those",
    }
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            Stored.parse(text)


class Layers(nn.Module):
    def __init__(self, spec: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(128, 192), nn.Linear(192, 64, bias=False)
        qcompile.pack_(self, spec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(UINT4, torch.float32), (UINT4, torch.bfloat16), (NF4, torch.float32)],
)
def test_forward_and_backward_decode_from_codes(spec, dtype):
    """Under autocast too, where decoding ends with a cast: no decoded weight is kept, neither wide nor narrow."""
    model, x = Layers(spec), leaf(4, 7, 128)

    def under():
        return torch.autocast("cpu", torch.bfloat16, enabled=dtype is not torch.float32)

    result = compile_and_run(model, x, recipe=STORED, under=under)
    assert_same(
        (result.outputs, result.gradients), run_eager(model, x, under=under), 1e-6 if dtype is torch.float32 else 2**-6
    )
    assert [tuple(row["shape"]) for row in result.saved] == [(28, 192)]  # gelu's input
    reads = [(row["role"], row["operands"][1].partition(";")[0]) for row in result.gemms]
    quantizer = str(model.up.weight.stored.quantizer)
    assert reads == [("fprop", quantizer)] * 2 + [("dgrad", quantizer)] * 2
    rest = "all else in high precision: the recipe quantizes none of its operands"
    assert {d.reason for d in result.decisions} == {f"weight stored as {model.up.weight.spec}; {rest}"}


def test_zeros_in_files():
    """Names of parts; reading gives the same weight."""
    saved = Layers(UINT4)
    state = qcompile.packed_state_dict(saved)
    assert [name for name in state if name.startswith("down.")] == [
        f"down.weight.{part}" for part in ("codes", "scales", "zeros", "packed")
    ]
    other = Layers("uint8 row; zeros")
    qcompile.load_packed_(other, state)
    x = torch.randn(2, 128)
    assert torch.equal(other(x), saved(x))


@pytest.mark.parametrize("spec", ["int4 block32; zeros", "e2m1 block16 e4m3; zeros"])
def test_a_layout_without_float_zeros_does_not_drop_them(spec, tmp_path):
    model = language_model(num_hidden_layers=1)
    qcompile.pack_(model, spec, skip=["self_attn", "gate_proj", "up_proj"])
    with pytest.raises(ValueError, match=r"stored as '.*; zeros': compressed-tensors has no float zeros"):
        qcompile.export(model, tmp_path)


# --- adapters -------------------------------------------------------------------------------------------------------


def adapted(spec: str = UINT4, inputs: int = 96, outputs: int = 37, **options):
    """Two layers with odd sizes, packed, with PEFT's adapters of rank 3."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, 5))
    qcompile.pack_(model, spec, skip="2")
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["0"]} | options)
    return peft.get_peft_model(model, config)


def llama(spec: str = UINT4, dtype: torch.dtype = torch.float32, layers: int = 1):
    model = language_model(num_hidden_layers=layers).to(dtype).eval()
    qcompile.pack_(model, spec)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    assert len(qcompile.qa_lora_(model)) == 7 * layers
    return with_numbers(model)


def test_outputs_and_gradients_are_those_of_the_formula():
    """``y = x·Wᵀ + s·Σ(x)·Aᵀ·Bᵀ`` with Σ by a matrix of ones, differentiated by eager torch; ours are compiled."""
    model = adapted()
    assert qcompile.qa_lora_(model) == ["base_model.model.0"]
    layer = with_numbers(model).base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((3, 3), (37, 3))
    x = leaf(5, 96)
    result = compile_and_run(layer, x, recipe=STORED)
    ones = torch.block_diag(*[torch.ones(1, 32)] * 3)
    dense = layer.base_layer.weight.decoded()

    def formula(x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, dense, layer.base_layer.bias) + 2.0 * (x @ ones.T) @ a.T @ b.T

    outputs = formula(x)
    generator = torch.Generator().manual_seed(7)
    expected = torch.autograd.grad(outputs, (x, a, b), torch.randn(outputs.shape, generator=generator))
    names = (0, "lora_A.default.weight", "lora_B.default.weight")
    assert_same((result.outputs, [result.gradients[name] for name in names]), (outputs, list(expected)), 2e-6)


def test_a_language_model_in_one_graph_that_keeps_block_sums():
    """What an adapter needs for its backward is [tokens, K / 32] instead of its input [tokens, K]."""
    model = llama()
    loss, gradients = loss_and_gradients(model)
    call, observations = compiler(model, STORED)
    compiled_loss, compiled_gradients = loss_and_gradients(model, call)
    assert abs(loss - compiled_loss) < 1e-6 * loss
    assert all((compiled_gradients[name] - g).norm() < 3e-6 * g.norm() for name, g in gradients.items())
    (observed,) = observations
    assert not observed.unaccounted
    kept = {tuple(row["shape"]) for row in observed.saved}
    weights = {tuple(weight.shape) for _, weight in packed_weights(model)}
    assert not kept & (weights | {shape[::-1] for shape in weights})
    assert {(30, 4), (30, 8)} <= kept  # 2 · 15 tokens; K = 128 and 256


@pytest.mark.parametrize("safe", [False, True])
def test_merging_is_exact_and_unmerging_gives_the_bits_back(safe):
    model, ids = llama(), torch.arange(3, 33).view(2, 15)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    packed = layer.base_layer.weight
    before = {name: part.clone() for name, part in packed.parts.items()}
    delta = 2.0 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    expected = packed.decoded().double() + delta.repeat_interleave(32, -1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with model.disable_adapter():
            assert (model(input_ids=ids).logits - logits).abs().max() > 0.1  # the adapters do something
        model.merge_adapter(safe_merge=safe)
        assert (layer.base_layer.weight.decoded() - expected).abs().max() <= 1e-6
        assert (model(input_ids=ids).logits - logits).abs().max() <= 1e-6
        model.unmerge_adapter()
        for name, part in layer.base_layer.weight.parts.items():
            assert torch.equal(part, before[name])
        merged = model.merge_and_unload(safe_merge=safe)
        assert (merged(input_ids=ids).logits - logits).abs().max() <= 1e-6
    plain = merged.model.layers[0].mlp.down_proj
    assert type(plain) is nn.Linear
    assert plain.weight.spec == "uint4 block32 absmax even; zeros"
    assert torch.equal(plain.weight.codes, before["codes"])
    assert torch.equal(plain.weight.scales, before["scales"])


def test_merging_below_sixteen_bits():
    """Zeros stay in float32, so merging takes nothing: what a product reads is the sum rounded to BF16 once."""
    model = llama(dtype=torch.bfloat16)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    a, b = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
    wide = layer.base_layer.weight.decoded(torch.float32).double() + 2.0 * (b @ a).repeat_interleave(32, -1)
    model.merge_adapter()
    packed = layer.base_layer.weight
    assert packed.dtype == torch.bfloat16
    assert (packed.decoded(torch.float32) - wide).abs().max() <= 1e-6
    assert (packed.decoded() - wide).abs().max() <= 2**-9 * 2 * wide.abs().max()


def test_several_adapters_merge_and_unmerge_in_any_order():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    for name in ("default", "other"):
        qcompile.qa_lora_(model, adapter=name)
    layer = with_numbers(model).base_model.model[0]
    model.base_model.set_adapter(["default", "other"])
    before, x = layer.base_layer.weight.zeros.clone(), torch.randn(4, 96)
    y = model(x)
    model.merge_adapter()
    assert (model(x) - y).abs().max() <= 1e-6
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight.zeros, before)


@pytest.mark.parametrize(("spec", "blocks"), [("uint8 row; zeros", 1), ("int4 block48; zeros", 2)])
def test_any_weight_with_zeros_takes_adapters(spec, blocks):
    model = adapted(spec)
    qcompile.qa_lora_(model)
    layer, x = with_numbers(model).base_model.model[0], torch.randn(4, 96)
    assert layer.lora_A["default"].in_features == blocks
    y = model(x)
    model.merge_adapter()
    assert (model(x) - y).abs().max() <= 1e-6


def test_a_weight_with_a_column_per_output():
    """transformers' Conv1D."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(3)
    model = nn.Sequential(utils.Conv1D(48, 64))
    qcompile.pack_(model, UINT4)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True))
    qcompile.qa_lora_(model)
    x = torch.randn(3, 64)
    y = with_numbers(model)(x)
    assert (model.merge_and_unload()(x) - y).abs().max() <= 1e-6


def test_training_and_then_merging():
    """A base model in 2 bits learns the function of the model it was made of, and keeps it when it is merged."""
    torch.manual_seed(1)
    teacher, x = nn.Linear(96, 37), torch.randn(64, 96)
    student = nn.Sequential(copy.deepcopy(teacher))
    qcompile.pack_(student, "uint2 block32; zeros")
    model = peft.get_peft_model(student, peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"], lora_dropout=0.1))
    qcompile.qa_lora_(model)
    shift = torch.randn(37, 3).repeat_interleave(32, -1) * 0.1  # what block sums can express
    target = (teacher(x) + x @ shift.T).detach()

    def loss() -> torch.Tensor:
        return F.mse_loss(model(x), target)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    model.eval()
    trained = loss().item()
    assert trained < 0.3 * first
    model.merge_adapter()
    assert loss().item() == pytest.approx(trained, rel=1e-5)


def test_trained_adapters_in_files(tmp_path):
    """Names are PEFT's; the state goes into a model that has been made ready for it."""
    model = adapted()
    qcompile.qa_lora_(model)
    with_numbers(model).save_pretrained(tmp_path)
    state = peft.utils.load_peft_weights(str(tmp_path), device="cpu")
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "base_model.model.0.lora_A.weight": (3, 3),
        "base_model.model.0.lora_B.weight": (37, 3),
    }
    other = adapted()
    qcompile.qa_lora_(other)
    peft.set_peft_model_state_dict(other, state)
    x = torch.randn(2, 96)
    assert torch.equal(other(x), model(x))


def test_blocks_have_to_divide_the_inputs():
    """Said where the model is packed, before there is an adapter."""
    message = r"layer '0' of 37×100 as 'uint4 block32; zeros': K = 100 is no multiple of block32; .*skip=\['0'\]"
    with pytest.raises(ValueError, match=message):
        adapted(inputs=100)


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        (
            {"spec": "int4 block32"},
            {},
            r"the weight of 'base_model.model.0' is stored as 'int4 block32 absmax even', without zeros to merge into; "
            r"pack it as 'uint4 block32; zeros', or skip=\['base_model.model.0'\]",
        ),
        ({}, {"adapter": "other"}, r"no packed layer has a LoRA adapter 'other'; call qcompile.pack_"),
        ({}, {"skip": "0"}, "no packed layer has a LoRA adapter 'default'"),
        ({"target_modules": ["2"]}, {}, "no packed layer has a LoRA adapter"),
        ({"use_dora": True}, {}, r"adapter 'default' of 'base_model.model.0' is a DoraLinearVariant; .*LoraConfig"),
        ({"init_lora_weights": False}, {}, r"'base_model.model.0' does not begin at zero, .* init_lora_weights=True"),
    ],
)
def test_what_is_refused(made, options, message):
    model = adapted(**made)
    with pytest.raises(ValueError, match=message):
        qcompile.qa_lora_(model, **options)


def test_a_second_call_is_refused():
    """A trained adapter would begin anew."""
    model = adapted()
    qcompile.qa_lora_(model)
    with pytest.raises(ValueError, match="is a QALoRA"):
        qcompile.qa_lora_(model)


@pytest.mark.parametrize(("change", "how"), [("unpack", "wide"), ("pack", "stored as 'uint8 row absmax even; zeros'")])
def test_merging_into_a_weight_that_is_stored_otherwise_by_now(change, how):
    model = adapted()
    qcompile.qa_lora_(model)
    qcompile.unpack_(model)
    if change == "pack":
        qcompile.pack_(model, "uint8 row; zeros", rules={"2": None})
    with pytest.raises(
        RuntimeError, match=f"layer 'base_model.model.0': its weight is {how} by now; merge adapters first"
    ):
        model.merge_adapter()
