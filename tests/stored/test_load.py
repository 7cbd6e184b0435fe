"""What ``load_quantized_`` checks before it believes a file: a layer of another size, other blocks or other bits than
``config.json`` says would load as wrong numbers, and an error without the layer's name helps nobody.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompile
from qcompile.stored.layouts import pack_words, unpack_words
from tests.stored.references import References

F16 = torch.float16
N = 32


@pytest.fixture(autouse=True)
def references():
    with References():
        yield


def model_of(size: int, rows: int = N, dtype: torch.dtype = F16) -> nn.Module:
    return nn.ModuleDict({"q": nn.Linear(size, rows, bias=False, dtype=dtype)})


def write(folder, tensors: dict[str, Tensor | None], config: dict[str, Any]) -> None:
    """Settings and tensors that are ``None`` are left out."""
    given = {f"q.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items() if tensor is not None}
    save_file(given, folder / "model.safetensors")
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


def codes(rows: int, size: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits - 1, (rows, size), generator=torch.Generator().manual_seed(0)).byte()


def compressed_tensors(size: int, blocks: int, bits: int = 4) -> dict[str, Tensor | None]:
    return {
        "weight_packed": pack_words(codes(N, size, bits), bits),
        "weight_scale": torch.rand(N, blocks).to(F16),
        "weight_shape": torch.tensor([N, size]),
    }


def config_of(**weights: Any) -> dict[str, Any]:
    how = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128} | weights
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": how}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def gptq(size: int, blocks: int, bits: int = 4) -> dict[str, Tensor | None]:
    return {
        "qweight": pack_words(codes(N, size, bits), bits).t(),
        "qzeros": pack_words(codes(blocks, N, bits), bits),
        "scales": torch.rand(blocks, N).to(F16),
        "g_idx": torch.arange(size, dtype=torch.int32) // (size // blocks),
    }


def gptq_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False} | changes


CT, GPTQ = "as pack-quantized block128 of 4 bits: ", "as gptq block128 of 4 bits: "
#: Tensors, configuration, inputs of the model's layer, why it is refused.
REFUSED = {
    "blocks that do not divide": (
        compressed_tensors(200, 2),
        config_of(),
        200,
        f"32×200 {CT}K = 200 is no multiple of its blocks of 128",
    ),
    "other blocks": (
        compressed_tensors(256, 4),
        config_of(),
        256,
        f"32×256 {CT}its tensor 'weight_scale' is (32, 4), not (32, 2)",
    ),
    "a row": (
        compressed_tensors(256, 2),
        config_of(strategy="channel", group_size=None),
        256,
        "32×256 as pack-quantized row of 4 bits: its tensor 'weight_scale' is (32, 2), not (32, 1)",
    ),
    "other words": (
        compressed_tensors(256, 1),
        config_of(),
        128,
        f"32×128 {CT}its tensor 'weight_packed' is (32, 32), not (32, 16)",
    ),
    "as many words": (compressed_tensors(99, 1), config_of(), 100, f"32×100 {CT}its 'weight_shape' says (32, 99)"),
    "no shape": (
        compressed_tensors(128, 1) | {"weight_shape": None},
        config_of(),
        128,
        f"32×128 {CT}it has no tensor 'weight_shape'",
    ),
    "no zeros": (
        compressed_tensors(128, 1),
        config_of(symmetric=False),
        128,
        "it is not symmetric, and has no tensor 'weight_zero_point'",
    ),
    "squares": (
        compressed_tensors(128, 1),
        config_of(strategy="block"),
        128,
        "strategy 'block' is not read; tensor, channel",
    ),
    "no num_bits": (
        compressed_tensors(128, 1),
        config_of(num_bits=None),
        128,
        "quantization_config says no 'num_bits'; it",
    ),
    "4 bits for 8": (
        gptq(128, 1),
        gptq_config(bits=8),
        128,
        "32×128 as gptq block128 of 8 bits: its tensor 'qweight' is (16, 32), not (32, 32)",
    ),
    "8 bits for 4": (
        gptq(128, 1, 8),
        gptq_config(),
        128,
        f"32×128 {GPTQ}its tensor 'qweight' is (32, 32), not (16, 32)",
    ),
    "other zeros": (
        gptq(256, 2) | {"qzeros": torch.zeros(2, 8).int()},
        gptq_config(),
        256,
        f"32×256 {GPTQ}its tensor 'qzeros' is (2, 8), not (2, 4)",
    ),
    "other groups": (gptq(256, 4), gptq_config(), 256, f"32×256 {GPTQ}its tensor 'scales' is (4, 32), not (2, 32)"),
    "another K": (gptq(256, 2), gptq_config(), 128, f"32×128 {GPTQ}its tensor 'qweight' is (32, 32), not (16, 32)"),
    "no qzeros": (gptq(256, 2) | {"qzeros": None}, gptq_config(), 256, f"32×256 {GPTQ}it has no tensor 'qzeros'"),
    "an order": (
        gptq(256, 2) | {"g_idx": torch.arange(256).int() % 2},
        gptq_config(),
        256,
        f"32×256 {GPTQ}its columns are in the order of activations (desc_act), which is not read",
    ),
    "an order left out": (
        gptq(256, 2) | {"g_idx": None},
        gptq_config(desc_act=True),
        256,
        "layer 'q': desc_act is true, and it has no tensor",
    ),
    "bits of a module": (
        gptq(128, 1),
        gptq_config(dynamic={"-:head": {}, "+:q": {"bits": 8}}),
        128,
        "gptq's dynamic '+:q' gives modules settings of their own, which are not read",
    ),
    "no bits": (
        gptq(128, 1),
        gptq_config(bits=None),
        128,
        "quantization_config says no 'bits'; it says quant_method, group",
    ),
    "no size": (gptq(128, 1), gptq_config(group_size=0), 128, "group_size 0 in quantization_config is neither"),
    "NVFP4": (
        {"weight_packed": torch.zeros(N, 64).byte(), "weight_scale": torch.zeros(N, 4, dtype=torch.float8_e4m3fn)},
        {
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        },
        128,
        "32×128 as nvfp4-pack-quantized: its tensor 'weight_scale' is (32, 4), not (32, 8)",
    ),
    "bitsandbytes without its state": (
        {"weight": torch.zeros(N * 64, 1).byte(), "weight.absmax": torch.zeros(64)},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        128,
        "32×128 as bitsandbytes: it has no tensor 'weight.quant_state.bitsandbytes__<quant_type>'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, case):
    tensors, config, size, why = REFUSED[case]
    write(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=rf"^load_quantized_: .*{re.escape(why)}") as error:
        qcompile.load_quantized_(model_of(size), tmp_path)
    assert "\n" not in str(error.value)


def test_bitsandbytes_of_another_shape_is_refused(tmp_path):
    """As many bytes as the layer's own; only the state tells."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [128, N]}
    tensors = {
        "weight": torch.zeros(N * 64, 1).byte(),
        "weight.absmax": torch.zeros(64),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    write(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ValueError, match=r"'q' of 32×128 as bitsandbytes: its quant_state says .* is \(128, 32\)$"):
        qcompile.load_quantized_(model_of(128), tmp_path)


@pytest.mark.parametrize(("dynamic", "blocks"), [(None, 2), ({"-:head": {}}, 1)])
def test_gptq_without_an_order_has_its_columns_in_order(tmp_path, dynamic, blocks):
    """A group longer than a row is the row; modules that ``dynamic`` leaves wide change nothing for others."""
    tensors, weights = gptq(256, blocks), []
    for order in (tensors["g_idx"], None):
        write(
            tmp_path, tensors | {"g_idx": order}, gptq_config(group_size=128 if blocks == 2 else 512, dynamic=dynamic)
        )
        model = model_of(256)
        assert qcompile.load_quantized_(model, tmp_path) == ["q"]
        weights.append(model["q"].weight.decoded())
    assert torch.equal(*weights)


def test_one_scale_of_compressed_tensors_is_that_of_all_rows(tmp_path):
    tensors = compressed_tensors(200, 1) | {"weight_scale": torch.tensor([0.0371]).to(F16)}
    write(tmp_path, tensors, config_of(strategy="tensor", group_size=None))
    model = model_of(200)
    qcompile.load_quantized_(model, tmp_path)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="tensor"))
    meant = PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(model["q"].weight.decoded(), meant)


@pytest.mark.parametrize("count", [1, 3])
def test_words_that_are_not_as_many_are_not_padded_or_cut(count):
    with pytest.raises(ValueError, match=f"^16 integers of 4 bits take 8 bytes, not {4 * count}$"):
        unpack_words(torch.zeros(5, count).int(), 4, 16)
