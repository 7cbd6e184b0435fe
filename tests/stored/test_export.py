"""Checkpoints in the layouts of compressed-tensors: its words are restated here, and its loader is asked where it is
installed.
"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import qcompile
from tests.stored.adapters import language_model

safetensors = pytest.importorskip("safetensors.torch")


def exported(tmp_path, spec: str, **changes):
    model = language_model("llama", num_hidden_layers=1, **changes).eval()
    qcompile.pack_(model, spec)
    assert qcompile.export(model, tmp_path) < 2**-23
    config = json.loads((tmp_path / "config.json").read_text())
    return model, safetensors.load_file(tmp_path / "model.safetensors"), config


@pytest.mark.parametrize(
    ("spec", "strategy"), [("int4 block64", "group"), ("int8 row", "channel"), ("int2 row", "channel")]
)
def test_integers_in_words_of_32_bits(tmp_path, spec, strategy):
    """Read bit by bit, by the formula of the format: word i holds elements i·32/b and following, low bits first."""
    model, state, config = exported(tmp_path, spec)
    weight = model.model.layers[0].self_attn.k_proj.weight
    bits = weight.stored.quantizer.format.bits
    name = "model.layers.0.self_attn.k_proj"
    words = state[f"{name}.weight_packed"]
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (64, 128 * bits // 32))
    levels = torch.stack([(words.long() >> shift) % 2**bits - 2 ** (bits - 1) for shift in range(0, 32, bits)], -1)
    scales = state[f"{name}.weight_scale"]
    decoded = levels.flatten(1).float() * scales.repeat_interleave(128 // scales.shape[1], 1)
    assert torch.equal(decoded, weight.decoded())
    assert state[f"{name}.weight_shape"].tolist() == [64, 128]
    quantization = config["quantization_config"]
    assert quantization["format"] == "pack-quantized"
    assert quantization["ignore"] == ["lm_head"]
    assert quantization["config_groups"]["group_0"]["weights"]["strategy"] == strategy
    assert not any(name.endswith(("codes", "packed_", "weight.packed")) for name in state)
    assert "lm_head.weight" in state


def test_nvfp4_is_written_as_it_lies(tmp_path):
    model, state, config = exported(tmp_path, "e2m1 block16 e4m3")
    weight = model.model.layers[0].mlp.up_proj.weight
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(state[f"{name}.weight_packed"], weight.codes)
    assert torch.equal(state[f"{name}.weight_scale"].view(torch.uint8), weight.scales.view(torch.uint8))
    whole = state[f"{name}.weight_global_scale"]
    torch.testing.assert_close(1 / whole, weight.global_scale.reshape(1), rtol=2**-23, atol=0)
    assert config["quantization_config"]["format"] == "nvfp4-pack-quantized"


@pytest.mark.parametrize("spec", ["int4 block64", "int8 row"])
def test_transformers_loads_the_logits_that_were_meant(tmp_path, spec):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    model, *_ = exported(tmp_path, spec)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            lambda m: qcompile.pack_(m, "nf4 block64"),
            "no layout for weights stored as 'nf4 block64 absmax even'",
        ),
        (lambda m: qcompile.pack_(m, "int4 block64", rules={"k_proj": "int8 row"}), "the model has int4 .* and int8"),
        (lambda m: None, "the model has no packed weights; pack_ all alike"),
    ],
)
def test_what_is_refused(tmp_path, prepare, message):
    model = language_model("llama", num_hidden_layers=1)
    prepare(model)
    with pytest.raises(ValueError, match=message):
        qcompile.export(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_16_bits_round_the_scales_and_that_is_said(tmp_path):
    model = language_model("llama", num_hidden_layers=1).bfloat16()
    qcompile.pack_(model, "int4 block64")
    assert 0 < qcompile.export(model, tmp_path) <= 2**-6


def test_other_models_and_layouts(tmp_path):
    with pytest.raises(ValueError, match="layout='gguf' is not one of compressed-tensors"):
        qcompile.export(nn.Linear(2, 2), tmp_path, "gguf")
    with pytest.raises(ValueError, match="a Linear has no config to write; give a transformers model"):
        qcompile.export(nn.Linear(2, 2), tmp_path)
