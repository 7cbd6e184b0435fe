"""Weights that others have quantized: AWQ checkpoints and torchao's tensors become packed weights with
the same numbers.
"""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao import quantization as torchao
from torchao.quantization import Float8Tensor, MappingType
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

import qcompile
from qcompile.recipes import STORED
from tests.passes.harness import assert_same, compile_and_run, leaf, run_eager
from tests.stored.references import References

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def references(request):
    with nullcontext() if "compiled" in request.node.originalname else References():
        yield


# --- AWQ ------------------------------------------------------------------------------------------------------------


class Awq(nn.Module):
    def __init__(self, size: int, rows: int, dtype: torch.dtype):
        super().__init__()
        self.q = nn.Linear(size, rows, dtype=dtype)
        self.head = nn.Linear(rows, 3, bias=False, dtype=dtype)


def awq_files(folder, size: int, rows: int, group: int, **config) -> dict[str, Tensor]:
    """A checkpoint of :class:`Awq`, whose words are any."""
    words = {
        "q.qweight": torch.randint(-(2**31), 2**31, (size, rows // 8)).int(),
        "q.qzeros": torch.randint(-(2**31), 2**31, (size // group, rows // 8)).int(),
        "q.scales": (torch.rand(size // group, rows) / 30).half(),
    }
    wide = {"q.bias": torch.randn(rows).half(), "head.weight": torch.randn(3, rows).half()}
    save_file(words | wide, folder / "model.safetensors")
    how = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"} | config
    (folder / "config.json").write_text(json.dumps({"quantization_config": how}))
    return words | wide


def awq_number(tensors: dict[str, Tensor], n: int, k: int, group: int) -> Tensor:
    """Weight n, k in float16, as AutoAWQ's ``awq_gemm`` kernels read it: its packer writes the columns 0, 2, 4, 6, 1,
    3, 5, 7 of eight from the low bits of a word to the high ones.
    """
    shift = 4 * [0, 2, 4, 6, 1, 3, 5, 7].index(n % 8)
    code = (int(tensors["q.qweight"][k, n // 8]) >> shift) & 15
    zero = (int(tensors["q.qzeros"][k // group, n // 8]) >> shift) & 15
    return torch.tensor(code - zero, dtype=F16) * tensors["q.scales"][k // group, n]


@pytest.mark.parametrize(("size", "rows", "group"), [(256, 16, 128), (96, 8, 32), (33, 8, 33)])
def test_awq_by_an_independent_reader(tmp_path, size, rows, group):
    torch.manual_seed(0)
    tensors = awq_files(tmp_path, size, rows, group)
    model = Awq(size, rows, F16)
    assert qcompile.load_quantized_(model, tmp_path) == ["q"]
    block = "row" if group == size else f"block{group}"
    assert model.q.weight.spec == f"uint4b8 {block} absmax even; zeros"
    meant = torch.stack([torch.stack([awq_number(tensors, n, k, group) for k in range(size)]) for n in range(rows)])
    assert torch.equal(model.q.weight.decoded(), meant)
    assert torch.equal(model.q.bias, tensors["q.bias"])
    # What other dtypes hold is the exact product, rounded once.
    assert torch.equal(model.q.weight.decoded(F32).half(), meant)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((256, 42, 128), "42×256 as awq block128: its words have 8 outputs, which do not divide N = 42"),
        ((200, 40, 128), "40×200 as awq block128: K = 200 is no multiple of its blocks of 128"),
        ((256, 40, 128, "q.qzeros"), "40×256 as awq block128: its tensor 'qzeros' is (1, 5), not (2, 5)"),
        ((256, 40, 128, "q.qweight"), "40×256 as awq block128: its tensor 'qweight' is (255, 5), not (256, 5)"),
    ],
)
def test_awq_of_other_sizes_is_refused(tmp_path, given, why):
    size, rows, group, *cut = given
    tensors = awq_files(tmp_path, size, rows, group)
    save_file({k: v[:-1].clone() if k in cut else v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^load_quantized_: layer 'q' of {re.escape(why)}$"):
        qcompile.load_quantized_(Awq(size, rows, F16), tmp_path)


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"version": None}, {"bits": 8}, {"zero_point": False}])
def test_awq_of_another_version_is_refused(tmp_path, change):
    awq_files(tmp_path, 64, 8, 32, **change)
    with pytest.raises(ValueError, match=r"^load_quantized_: awq of . bits, .* is not read; 4 bits, 'gemm', True is$"):
        qcompile.load_quantized_(Awq(64, 8, F16), tmp_path)


# --- torchao --------------------------------------------------------------------------------------------------------


def in_a_layer(weight: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return nn.Sequential(layer)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_nf4_of_torchao_keeps_its_numbers(dtype):
    wide = torch.randn(128, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = torchao.NF4Tensor.from_tensor(wide, 64, 256)
    model = in_a_layer(theirs)
    done = qcompile.pack_(model, "int8 row")
    name = {F32: "nf4torchao", BF16: "nf4torchao_bf16", F16: "nf4torchao_fp16"}[dtype]
    assert [layer.spec for layer in done.layers] == [f"{name} block64 absmax_bnb even"]
    assert done.layers[0].bytes_before < 128 * 256 * 0.6
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight.decoded(), theirs.get_original_weight())


#: Weight, its configuration, how it is stored here.
INTEGERS = [
    (torchao.IntxWeightOnlyConfig(torch.int4, PerGroup(32)), "uint4b8 block32 absmax even"),
    (torchao.IntxWeightOnlyConfig(torch.int3, PerAxis(0)), "uint4b8 row absmax even"),
    (torchao.IntxWeightOnlyConfig(torch.int5, PerGroup(64)), "uint8b128 block64 absmax even"),
    (
        torchao.IntxWeightOnlyConfig(torch.int4, PerGroup(32), mapping_type=MappingType.ASYMMETRIC),
        "uint4b8 block32 absmax even; zeros",
    ),
    (torchao.Int8WeightOnlyConfig(), "uint8b128 row absmax even"),
    (torchao.Int8WeightOnlyConfig(granularity=PerTensor()), "uint8b128 row absmax even"),
]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize(("config", "spec"), INTEGERS)
def test_integers_of_torchao_keep_their_numbers(config, spec, dtype):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(128, 64, bias=False, dtype=dtype))
    torchao.quantize_(model, config)
    meant = model[0].weight.dequantize()
    assert [layer.spec for layer in qcompile.pack_(model, "nf4 block64").layers] == [spec]
    if dtype == F32 and spec.endswith("zeros"):  # scale · q + (−zero · scale) rounds three times, theirs once
        torch.testing.assert_close(model[0].weight.decoded(), meant, rtol=0, atol=2**-23 * 16 * 0.012)
    else:
        assert torch.equal(model[0].weight.decoded(), meant)


@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_int4_of_torchao_is_scale_times_q_plus_zero(symmetric):
    """As mslk's ``bf16i4bf16_rowwise`` reads it; on CPUs torchao can neither make one nor multiply by it."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(-8, 8, (64, 128), generator=generator)
    scale, zero = (torch.randn(4, 64, generator=generator).bfloat16() / 30 for _ in range(2))
    zero = zero * (not symmetric)
    low, high = q[:, ::2] & 15, q[:, 1::2] & 15
    weight = torchao.Int4Tensor((low | high << 4).to(torch.int8), scale, zero, [1, 32], torch.Size((64, 128)))
    model = in_a_layer(weight)
    qcompile.pack_(model, "nf4 block64")
    assert model[0].weight.spec == f"uint4b8 block32 absmax even{'' if symmetric else '; zeros'}"
    of = torch.arange(128) // 32
    meant = q.double() * scale.double().t()[:, of] + zero.double().t()[:, of]
    assert torch.equal(model[0].weight.decoded(), meant.float().bfloat16())


def test_compiled_layers_of_torchao_multiply_by_codes():
    """Left to torchao, products are its own, and the decoded weight is kept for the backward."""
    model = in_a_layer(torchao.NF4Tensor.from_tensor(torch.randn(128, 256), 64, 256))
    qcompile.pack_(model, "nf4 block64")
    x = leaf(3, 256)
    result = compile_and_run(model, x, recipe=STORED)
    assert_same((result.outputs, result.gradients), run_eager(model, x), 1e-6)
    assert result.fused() == {"fprop": 1, "dgrad": 1}
    assert result.saved == []


def test_weights_of_torchao_that_are_not_read_name_their_layer():
    row = torch.zeros(64, 256)
    faults = {
        "torchao's NF4Tensor has blocks of 1×96, which do not divide rows of 256": torchao.NF4Tensor.from_tensor(
            torch.randn(96, 256), 96, 128
        ),
        "torchao's Int8Tensor has blocks of 2×256: 2 of 64 rows share a scale": torchao.Int8Tensor(
            row.char(), row[:32, :1], [2, 256], torch.float32
        ),
        "torchao's Float8Tensor is not read; those of NF4Tensor, Int4Tensor, .* are": Float8Tensor.from_hp(row),
        r"torchao's Int4Tensor also quantizes activations \(activation_dtype\)": torchao.Int4Tensor(
            row[:, :128].char(), row[:8].t(), row[:8].t(), [1, 32], row.shape, None, torch.float8_e4m3fn
        ),
    }
    for why, weight in faults.items():
        model = in_a_layer(weight)
        with pytest.raises(ValueError, match=rf"^pack_: layer '0': {why}; skip=\['0'\] leaves it as it is$"):
            qcompile.pack_(model, "nf4 block64")
        assert model[0].weight.data.shape == weight.shape
        assert type(model[0].weight) is type(weight)
        assert qcompile.pack_(model, "nf4 block64", skip="0").wide == {"0": "skip='0'"}
    model = in_a_layer(torchao.NF4Tensor.from_tensor(torch.randn(128, 256), 64, 256))
    with pytest.raises(ValueError, match=r"^pack_: layer '0' cannot be stored as 'int8 row': its weight is a NF4"):
        qcompile.pack_(model, "nf4 block64", rules={"0": "int8 row"})
    model.config = transformers.PretrainedConfig()
    with pytest.raises(ValueError, match=r"^export: layer '0' is quantized by torchao; qcompile.pack_\(model, …\)"):
        qcompile.export(model, "nowhere", spec="int4 block32")
