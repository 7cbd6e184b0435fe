"""What ``export`` writes is what transformers, compressed-tensors and bitsandbytes load, bit for bit; what has no place
in a layout is refused with a way out; and others' checkpoints become packed weights without a change.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from operator import mul, truediv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompile
from qcompile.ir.formats import get_format
from qcompile.ir.recipe import Recipe
from qcompile.recipes import FP4, QUEST
from qcompile.stored import PackedWeight
from qcompile.stored.layouts import Integers, pack_words, reciprocal, settled, unpack_words
from qcompile.stored.pack import packed_weights
from tests.passes.harness import compiler
from tests.stored.adapters import language_model
from tests.stored.references import References

IDS = torch.arange(3, 23)[None]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
NVFP4 = "e2m1 block16 e4m3"
LINEAR = 14


#: Tests in which Dynamo would see that mode.
COMPILED = (
    "test_trained_weights_are_the_numbers_that_the_forward_used",
    "test_a_rotation_is_written_for_those_who_rotate_inputs",
)


@pytest.fixture(autouse=True)
def references(request):
    with nullcontext() if request.node.originalname in COMPILED else References():
        yield


def tiny(dtype: torch.dtype = F32, **changes: Any) -> nn.Module:
    """As ``from_pretrained`` makes it, which leaves the frequencies of positions in float32."""
    model = language_model(**changes)
    made = transformers.AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    made.load_state_dict(model.state_dict())
    return made.eval()


def loaded(path: Path) -> nn.Module:
    """By transformers. In training where that is bitsandbytes', which has other kernels otherwise on some CPUs."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model.train(model.config.quantization_config.quant_method == "bitsandbytes")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


def keys(path: Path) -> set[str]:
    return {key for file in path.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


EXACT = [
    ("int4 block32", F32, "compressed-tensors", {}),
    ("int4 block64", F32, "compressed-tensors", {"bits": 8}),
    ("int4 block128", F32, "compressed-tensors", {}),
    ("int4 row", F32, "compressed-tensors", {}),
    ("int8 block64", F32, "compressed-tensors", {}),
    ("int8 row", F32, "compressed-tensors", {}),
    ("int3 block32", F32, "compressed-tensors", {}),
    ("e1m2 tensor", F32, "compressed-tensors", {}),
    ("int4 block32 e8m0", BF16, "compressed-tensors", {}),
    ("e2m1 row", F32, "compressed-tensors", {"bits": 5}),
    ("midrise4 row rms half_up", F32, "compressed-tensors", {"bits": 8}),
    (NVFP4, BF16, "compressed-tensors", {"fused": ()}),
    ("e2m1 block32 e8m0", BF16, "compressed-tensors", {}),
    ("nf4 block64", F32, "bitsandbytes", {}),
    ("nf4 block64 absmax_bnb; nested", F32, "bitsandbytes", {}),
    ("nf4 block128 absmax_bnb; nested", BF16, "bitsandbytes", {}),
    ("fp4bnb block64 absmax_bnb", F32, "bitsandbytes", {}),
    ("fp4bnb block64 absmax_bnb; nested", F32, "bitsandbytes", {}),
]


@pytest.mark.parametrize(("spec", "dtype", "layout", "options"), EXACT)
def test_transformers_loads_the_logits_that_were_meant(tmp_path, spec, dtype, layout, options):
    model = tiny(dtype)
    qcompile.pack_(model, spec)
    result = qcompile.export(model, tmp_path, layout, **options)
    assert len(result.layers) == LINEAR
    assert list(result.wide) == ["lm_head"]
    assert "read back: all weights decode to the same" in str(result)
    other = loaded(tmp_path)
    assert torch.equal(logits(other), logits(model))

    # And back: the same numbers, packed.
    again = tiny(dtype)
    if options.get("bits") not in (None, 4, 8) or spec.startswith("int3"):
        with pytest.raises(ValueError, match="bits are not read; those of 4 and 8 bits are"):
            qcompile.load_quantized_(again, tmp_path)
        return
    assert qcompile.load_quantized_(again, tmp_path) == list(result.layers)
    weights = dict(packed_weights(model))
    for name, weight in packed_weights(again):
        assert weight.dtype == dtype
        assert torch.equal(weight.decoded(), weights[name].decoded())
    assert torch.equal(logits(again), logits(model))


def test_scales_that_the_dtype_does_not_have_are_rounded_if_that_is_asked_for(tmp_path):
    model = tiny(BF16)
    qcompile.pack_(model, "int4 block32")
    with pytest.raises(
        ValueError, match=r"q_proj' stored as 'int4 block32 .*: its float32 scales are no .*bfloat16; round"
    ):
        qcompile.export(model, tmp_path)
    qcompile.export(model, tmp_path, round_scales=True)
    for weight in dict(packed_weights(model)).values():
        weight.parts["scales"].copy_(weight.parts["scales"].bfloat16())
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    qcompile.export(model, tmp_path / "wide", dtype=F32)
    assert torch.equal(logits(loaded(tmp_path / "wide")), logits(model.float()))


@pytest.mark.parametrize(("spec", "largest_scale"), [(NVFP4, 448), ("e2m1 block16 e4m3_46", 256)])
def test_layers_that_vllm_fuses_share_the_global_scale_of_the_largest(tmp_path, spec, largest_scale):
    model = tiny(BF16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qcompile.export(model, tmp_path, spec=spec)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    scales: dict[str, list[float]] = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name.endswith("weight_global_scale"):
            scales.setdefault(name.split(".")[-2], []).append(float(tensor))
    assert scales["q_proj"] == scales["k_proj"] == scales["v_proj"]
    assert scales["gate_proj"] == scales["up_proj"]
    assert scales["o_proj"] != scales["q_proj"]
    attention = model.model.layers[0].self_attn
    largest = max(
        float(layer.weight.detach().abs().max()) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    assert scales["q_proj"][0] == pytest.approx(6 * largest_scale / largest, rel=2**-18)
    # What is loaded is as close to the weights as blocks of 16 come with scales of their own.
    again = tiny(BF16)
    qcompile.load_quantized_(again, tmp_path)
    for name, packed in packed_weights(again):
        weight = before[f"{name}.weight"].float()
        own, shared = (
            (value.float() - weight).norm() for value in (qcompile.fake_quantize(weight, spec), packed.decoded())
        )
        assert shared < 1.05 * own
    assert torch.equal(logits(loaded(tmp_path)), logits(again))


def test_packed_layers_with_global_scales_of_their_own_are_not_for_vllm(tmp_path):
    model = tiny(BF16)
    qcompile.pack_(model, NVFP4)
    with pytest.raises(ValueError, match=r"layers .*q_proj, .*k_proj, .*v_proj stored as .* spec='e2m1 block16 e4m3"):
        qcompile.export(model, tmp_path)


def test_a_global_scale_moves_where_decoding_would_round_the_other_way(tmp_path):
    """With scales of amax/1536, products lie halfway between two numbers of bfloat16 in one tensor of twelve."""
    model = tiny(BF16)
    qcompile.pack_(model, "e2m1 block16 e4m3_46")
    with pytest.raises(
        ValueError, match=r"o_proj' stored as .*no numbers that compressed-tensors has in bfloat16; round_"
    ):
        qcompile.export(model, tmp_path, fused=())
    qcompile.export(model, tmp_path, fused=(), round_scales=True)
    again = tiny(BF16)
    qcompile.load_quantized_(again, tmp_path)
    weights, moved = dict(packed_weights(model)), 0
    for name, weight in packed_weights(again):
        # One unit in the last of eight places.
        torch.testing.assert_close(weight.decoded(), weights[name].decoded(), rtol=2**-7, atol=0)
        moved += not torch.equal(weight.decoded(), weights[name].decoded())
    assert 0 < moved < LINEAR / 2
    assert torch.equal(logits(loaded(tmp_path)), logits(again))


@pytest.mark.parametrize("denominator", [2688, 1536])
def test_a_settled_factor_has_a_divisor_that_gives_the_same_products(denominator):
    fmt, found = get_format("e2m1"), 0
    for amax in (torch.rand(300, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.01).bfloat16().float():
        factor = amax / denominator
        found += reciprocal(factor, fmt, BF16, mul, truediv) is not None
        other = settled(factor)
        assert abs(other / factor - 1) <= 2**-19 + 2**-23
        assert reciprocal(other, fmt, BF16, mul, truediv) is not None
    assert found < 300


def test_layers_may_be_quantized_each_its_way(tmp_path):
    model = tiny(BF16)
    rules = {"o_proj": "int8 row e8m0", "down_proj": "int4 block32 e8m0", "layers.1.mlp.down_proj": None}
    qcompile.pack_(model, "e2m1 block32 e8m0", rules=rules)
    result = qcompile.export(model, tmp_path)
    assert [*result.wide] == ["model.layers.1.mlp.down_proj", "lm_head"]
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert config["ignore"] == [*result.wide]
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [4, 8, 4]
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    again = tiny(BF16)
    qcompile.load_quantized_(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_files_are_split_as_transformers_splits_them(tmp_path):
    model = tiny()
    qcompile.pack_(model, "int4 block32")
    result = qcompile.export(model, tmp_path, max_shard_size="50KB")
    assert len(result.files) > 2
    assert sorted(result.files) == sorted(file.name for file in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == keys(tmp_path)
    assert index["metadata"]["total_size"] == result.bytes
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    again = tiny()
    qcompile.load_quantized_(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"holds model-00001-of-000.*; give another folder"):
        qcompile.export(model, tmp_path)


def test_tied_embeddings_are_written_once(tmp_path):
    model = tiny(tie_word_embeddings=True)
    qcompile.pack_(model, "int4 block32")
    qcompile.export(model, tmp_path)
    assert "lm_head.weight" not in keys(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))
    again = tiny(tie_word_embeddings=True)
    qcompile.load_quantized_(again, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again), logits(model))


def test_what_does_not_read_back_is_no_export(tmp_path, monkeypatch):
    model = tiny()
    qcompile.pack_(model, "int4 block32")
    qcompile.export(model, tmp_path)

    def damaged(tensors, path, metadata):
        tensors["model.layers.1.mlp.up_proj.weight_packed"][3, 1] ^= 1 << 9
        save_file(tensors, path, metadata)

    monkeypatch.setattr("safetensors.torch.save_file", damaged)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' does not read back .*: 1 of 32768 numbers"):
        qcompile.export(model, tmp_path)
    assert not (tmp_path / "config.json").exists()


REFUSED = [
    ("e2m1 row", "compressed-tensors", {}, "no integers of 4 bits .* e2m1 .*; bits=5 or bits=8 writes the same"),
    ("e2m1 row", "bitsandbytes", {}, "bitsandbytes has nf4 and fp4bnb, not e2m1$"),
    (
        "nf4 block64",
        "compressed-tensors",
        {},
        "levels of nf4 are no integers times a scale; layout='bitsandbytes' holds",
    ),
    ("nf4 block16", "bitsandbytes", {}, "bitsandbytes has blocks of 32, 64, .*, not block16"),
    ("nf4 block64 e8m0", "bitsandbytes", {}, "has float32 scales or nested ones, not those of e8m0"),
    ("nf4 block64; nested(int8 block64)", "bitsandbytes", {}, r"nests scales as 'nested' does, not as 'nested\(int8"),
    ("int4 block32", "bitsandbytes", {}, "not int4; layout='compressed-tensors' holds it"),
    ("int4 block32x32", "compressed-tensors", {}, "a scale per block32x32 is shared by rows; use block32"),
    (NVFP4, "compressed-tensors", {"fused": ()}, "decoded in bfloat16, and the model is float32; give dtype=torch.bf"),
    ("int4 block32", "gptq", {}, "scales in 16 bits, and the model is float32; give dtype=torch.float16"),
    (
        "int4 block32; zeros",
        "compressed-tensors",
        {},
        "compressed-tensors has no float zeros; qcompile.unpack_ the model",
    ),
    ("nf4 block64; zeros", "bitsandbytes", {}, "bitsandbytes has no float zeros"),
    ("int3 block32", "gptq", {"dtype": F16}, "gptq has integers of 2, 4 or 8 bits, not 3; bits=4 writes the same"),
]


@pytest.mark.parametrize(("spec", "layout", "options", "why"), REFUSED)
def test_what_a_layout_has_no_word_for_is_refused_with_a_way_out(tmp_path, spec, layout, options, why):
    model = tiny()
    qcompile.pack_(model, spec)
    with pytest.raises(ValueError, match=why) as error:
        qcompile.export(model, tmp_path / "never", layout, **options)
    assert "export: layer 'model.layers.0.self_attn.q_proj' stored as" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "never").exists()


def test_what_cannot_be_exported_at_all(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny()
    for given, why in [
        ({}, "no weight is packed; pack_ the model, or give spec= or recipe="),
        ({"layout": "awq"}, "layout='awq' is not one of compressed-tensors, bitsandbytes, gptq$"),
        ({"layout": "mxfp4"}, "is not one of .*experts only, and compressed-tensors holds 'e2m1 block32 e8m0'"),
        ({"recipe": "qcompile_fp8"}, "recipe='qcompile_fp8' is not one of qcompile_fp4, qcompile_quest"),
        ({"spec": "int4", "recipe": "qcompile_fp4"}, "spec='int4' and recipe= both say"),
        ({"options": {"bits": 4}}, "options= are those of a recipe"),
    ]:
        with pytest.raises(ValueError, match=why):
            qcompile.export(model, tmp_path, **given)
    with pytest.raises(ValueError, match="Linear has no config"):
        qcompile.export(nn.Linear(64, 64), tmp_path, spec="int4")
    qcompile.pack_(model, "int4 block32")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj' has an adapter beside it; call merge_and_unload\(\)"):
        qcompile.export(adapted, tmp_path)


# --- weights that were trained ----------------------------------------------------------------------------------------


def trained(recipe: Recipe, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    """A model after two steps, and its compiled form."""
    model = tiny(num_hidden_layers=1).train()
    compiled, _ = compiler(model, recipe, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        compiled(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), compiled


@pytest.mark.parametrize(
    ("recipe", "options", "given", "operand"),
    [
        (FP4, {"activation": None}, {"bits": 8}, "e2m1 row; dge"),
        pytest.param(
            QUEST,
            {"activation": None, "weight": {"rotation": None}},
            {"bits": 8},
            "midrise4 row rms half_up; trust",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_trained_weights_are_the_numbers_that_the_forward_used(tmp_path, recipe, options, given, operand):
    """The weights only: what a loader does not do is to quantize activations."""
    model, compiled = trained(recipe, options)
    result = qcompile.export(compiled, tmp_path, recipe=recipe, options=options, **given)
    assert len(result.layers) == LINEAR // 2
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert not isinstance(model.model.layers[0].mlp.up_proj.weight, PackedWeight)
    other = loaded(tmp_path)
    # Sums are in another order in the compiled graph.
    with torch.no_grad():
        torch.testing.assert_close(logits(other), compiled(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    for name in result.layers:
        weight = model.get_parameter(f"{name}.weight")
        assert torch.equal(other.get_parameter(f"{name}.weight"), qcompile.fake_quantize(weight, operand))


def test_a_rotation_is_written_for_those_who_rotate_inputs(tmp_path):
    """compressed-tensors' own transform of inputs, which vLLM applies; K = 128 and 256, rotated in blocks of 64."""
    options = {"activation": None, "weight": {"rotation": 64}}
    model, compiled = trained(QUEST, options)
    result = qcompile.export(model, tmp_path, recipe=QUEST, options=options, bits=8, rotated=True)
    assert set(result.layers.values()) == {"midrise4 row rms half_up; hadamard(64)"}
    other = loaded(tmp_path)
    with torch.no_grad():
        meant = compiled(input_ids=IDS).logits
    assert (logits(other) - meant).abs().max() > 0.01
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["transform_config"]
    for group in config["config_groups"].values():
        assert [entry["location"] for entry in group["apply"]] == ["input", "weight_input"]
        del group["apply"][1]  # what has been done to the weights
    apply_transform_config(other, TransformConfig(**config))
    torch.testing.assert_close(logits(other), meant, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rotated=True: layout='gptq' cannot say so; 'compressed-tensors' can"):
        qcompile.export(model, tmp_path, "gptq", recipe=QUEST, options=options, rotated=True)


def test_a_recipe_says_which_layers_it_quantizes(tmp_path):
    options = {
        "activation": None, "skip": ["layers.0"],
        "rules": [{"name": "down_proj", "weight": {"format": "int8"}}, {"name": "up_proj", "weight": "off"}],
    }  # fmt: skip
    result = qcompile.export(tiny(), tmp_path, recipe="qcompile_fp4", options=options, bits=8)
    assert {name.removeprefix("model.layers.1.") for name in result.layers} == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
        "mlp.down_proj",
    }  # fmt: skip
    assert result.layers["model.layers.1.mlp.down_proj"] == "int8 row absmax even"
    assert result.layers["model.layers.1.self_attn.o_proj"] == "e2m1 row absmax even"
    assert result.wide["model.layers.0.mlp.up_proj"] == "skip='layers.0'"
    assert result.wide["model.layers.1.mlp.up_proj"] == "qcompile_fp4 leaves its weight wide"
    assert result.wide["lm_head"] == "skip='lm_head'"


@pytest.mark.parametrize(
    ("recipe", "options", "why"),
    [
        (
            "qcompile_fp4",
            {},
            "'e2m1 row absmax even': no integers of 4 bits .* bits=5 or bits=8 writes the same numbers",
        ),
        (
            "qcompile_quest",
            {},
            r"trained by qcompile_quest as 'midrise4 .*know no rotation.*'rotation': None.*rotated=True",
        ),
        ("qcompile_fp4", {"weight": {"outliers": "occ(alpha=0.99)", "estimator": "ste"}}, "'outliers': None"),
    ],
)
def test_trained_weights_that_no_layout_holds(tmp_path, recipe, options, why):
    with pytest.raises(ValueError, match=rf"^export: layer 'model.layers.0.self_attn.q_proj' .*{why}"):
        qcompile.export(tiny(), tmp_path, recipe=recipe, options=options)


# --- bits, and checkpoints that others have written -------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("size", [1, 7, 32, 75])
def test_words_are_those_of_compressed_tensors(bits, size):
    signed = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, size), dtype=torch.int8)
    u = (signed + 2 ** (bits - 1)).to(torch.uint8)
    words = pack_words(u, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_words(words, bits, size), u)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((5, size))), signed)


def test_integers_hold_what_is_an_integer_of_their_bits_times_a_factor():
    factors = {
        "e2m1": {4: 0, 5: 2, 8: 2}, "e1m2": {4: 2}, "e3m0": {7: 0, 8: 4}, "int4": {3: 0, 4: 1}, "uint4b8": {4: 1},
        "midrise4": {4: 0, 5: 2}, "midrise8": {8: 0}, "midrise4p": {5: 2}, "nf4": {8: 0}, "e2m1/int4": {8: 0},
    }  # fmt: skip
    for name, expected in factors.items():
        fmt = get_format(name)
        assert {bits: Integers(bits).factor(fmt) for bits in expected} == expected


def test_checkpoints_of_compressed_tensors_are_read_with_the_codes_we_do_not_write(tmp_path):
    """Others' integers of four bits reach −8."""
    generator, model = torch.Generator().manual_seed(0), tiny()
    qcompile.pack_(model, "int4 block32")
    qcompile.export(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            tensor.copy_(torch.randint(-(2**31), 2**31, tensor.shape, generator=generator))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = tiny()
    assert len(qcompile.load_quantized_(model, tmp_path)) == LINEAR
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.spec == "uint4b8 block32 absmax even"
    assert int((weight.decoded() == -8 * weight.parts["scales"].repeat_interleave(32, 1)).sum()) > 1000
    assert torch.equal(logits(model), logits(loaded(tmp_path)))


def test_asymmetric_checkpoints_of_compressed_tensors_are_read(tmp_path):
    """As its own decompressor does: transformers 5.23 loads no packed zeros."""
    generator, model = torch.Generator().manual_seed(0), tiny(BF16)
    qcompile.export(model, tmp_path, spec="int4 block32", round_scales=True)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in [name.removesuffix("weight_packed") for name in tensors if name.endswith("weight_packed")]:
        zeros = torch.randint(-8, 8, tensors[f"{layer}weight_scale"].shape, generator=generator, dtype=torch.int8)
        tensors[f"{layer}weight_zero_point"] = pack_to_int32(zeros, 4, packed_dim=0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert len(qcompile.load_quantized_(model, tmp_path)) == LINEAR
    how = QuantizationArgs(num_bits=4, group_size=32, strategy="group", symmetric=False)
    scheme = QuantizationScheme(targets=["Linear"], weights=how)
    for name, weight in packed_weights(model):
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        assert weight.spec == "uint4b8 block32 absmax even; zeros"
        assert torch.equal(weight.decoded(), PackedQuantizationCompressor.decompress(own, scheme)["weight"]), name
    tensors[f"{name}.weight_zero_point"] = zeros
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=rf"^load_quantized_: layer '{name}' of .*: its tensor 'weight_zero_point' is .*, not \(16, 8\)$",
    ):
        qcompile.load_quantized_(tiny(BF16), tmp_path)


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("fp4", False)])
def test_checkpoints_of_bitsandbytes_are_read(tmp_path, kind, nested):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, llm_int8_skip_modules=["lm_head"]
    )
    tiny().save_pretrained(tmp_path / "wide")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", quantization_config=config)
    theirs.save_pretrained(tmp_path / "packed")
    model = tiny()
    assert len(qcompile.load_quantized_(model, tmp_path / "packed")) == LINEAR
    assert torch.equal(logits(model), logits(theirs.train()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_on_the_meta_device_is_filled(tmp_path, tied):
    """Its head as well, where that is the embedding: accelerate parts the two."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny(BF16, tie_word_embeddings=tied)
    qcompile.export(model, tmp_path, spec="e2m1 block32 e8m0")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with accelerate.init_empty_weights():
        empty = transformers.AutoModelForCausalLM.from_config(config)
    assert len(qcompile.load_quantized_(empty, tmp_path)) == LINEAR
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert (empty.lm_head.weight is empty.model.embed_tokens.weight) == tied
    assert torch.equal(logits(empty.eval()), logits(loaded(tmp_path)))
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(
        ValueError, match=r"buffer 'model.rotary_emb.inv_freq' is on the meta device .*init_empty_weights"
    ):
        qcompile.load_quantized_(empty, tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"quant_method": "aqlm"},
            "quant_method 'aqlm' in .* is not one of .*tensors, bitsandbytes, gptq, awq",
        ),
        ({"format": "marlin-24"}, "q_proj': format 'marlin-24' is not read"),
        ({"config_groups": {}}, "q_proj' is packed, but in none of config_groups"),
    ],
)
def test_a_checkpoint_that_is_not_read_says_why(tmp_path, change, why):
    qcompile.export(tiny(), tmp_path, spec="int4 block32")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    for group in config["quantization_config"]["config_groups"].values():
        group["format"] = change.get("format", group["format"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^load_quantized_: .*{why}"):
        qcompile.load_quantized_(tiny(), tmp_path)


# --- GPTQ, whose library cannot be installed beside PEFT --------------------------------------------------------------


def gptq_weight(tensors: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """float16 ``[N, K]``, number by number, as AutoGPTQ's first kernels read version 1."""
    words, zeros, scales, group = (tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    per_word, mask = 32 // bits, 2**bits - 1
    size, rows = words.shape[0] * per_word, words.shape[1]
    weight = torch.empty(rows, size, dtype=torch.float16)
    for k in range(size):
        code = (words[k // per_word].long() >> (bits * (k % per_word))) & mask
        zero = torch.stack(
            [(zeros[group[k], n // per_word].long() >> (bits * (n % per_word))) & mask for n in range(rows)]
        )
        weight[:, k] = scales[group[k]] * (code - (zero + 1)).half()
    return weight


@pytest.mark.parametrize(("spec", "bits"), [("int4 block32", 4), ("e1m2 row", 4), ("int8 block64", 8)])
def test_gptq_by_an_independent_reader(tmp_path, spec, bits):
    model = tiny(F16)
    qcompile.pack_(model, spec)
    qcompile.export(model, tmp_path, "gptq", round_scales=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    assert name + ".weight" not in tensors
    again = tiny(F16)
    assert len(qcompile.load_quantized_(again, tmp_path)) == LINEAR
    meant = again.get_submodule(name).weight.decoded()
    assert torch.equal(gptq_weight(tensors, name, bits), meant)
    # Rounding a scale to float16 moves a number by 2⁻¹¹ of itself at most, and by 2⁻¹¹ more as it is rounded.
    torch.testing.assert_close(meant, model.get_submodule(name).weight.decoded(), rtol=2**-10, atol=0)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = {"int4 block32": 32, "e1m2 row": -1, "int8 block64": 64}[spec]
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, group, True, False)


def test_asymmetric_gptq_by_an_independent_reader(tmp_path):
    qcompile.export(tiny(F16), tmp_path, "gptq", spec="int4 block32", round_scales=True)
    tensors, generator = load_file(tmp_path / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if name.endswith("qzeros"):  # nothing above 14
            size = tensor.shape[1] * 8
            tensor.copy_(pack_words(torch.randint(0, 15, (len(tensor), size), generator=generator).byte(), 4))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, name = tiny(F16), "model.layers.1.self_attn.k_proj"
    qcompile.load_quantized_(model, tmp_path)
    weight = model.get_submodule(name).weight
    assert weight.spec == "uint4b8 block32 absmax even; zeros"
    assert torch.equal(gptq_weight(tensors, name, 4), weight.decoded())
    tensors[f"{name}.qzeros"][0, 0] = -1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"^load_quantized_: layer '{name}' of .*: a zero is stored as 15, which some"
    ):
        qcompile.load_quantized_(tiny(F16), tmp_path)


def test_gptq_has_one_group_size(tmp_path):
    model = tiny(F16)
    qcompile.pack_(model, "int4 block32", rules={"o_proj": "int4 block64"})
    with pytest.raises(ValueError, match=r"q_proj' and .*o_proj' differ in bits or blocks, of which gptq has one"):
        qcompile.export(model, tmp_path, "gptq", round_scales=True)
