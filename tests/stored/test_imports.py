"""Weights that others have quantized: AWQ checkpoints become packed weights with the same numbers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import qcompile
from tests.stored.references import References

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def references():
    with References():
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
    assert model.q.weight.spec == f"uint4 {block} absmax even; zeros"
    meant = torch.stack([torch.stack([awq_number(tensors, n, k, group) for k in range(size)]) for n in range(rows)])
    assert torch.equal(model.q.weight.decoded(), meant)
    assert torch.equal(model.q.bias, tensors["q.bias"])
    # What other dtypes hold is the exact product, rounded once.
    assert torch.equal(model.q.weight.decoded(F32).half(), meant)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ((256, 42, 128), "awq has words of 8 outputs and 2 blocks of inputs, which do not divide 42×256"),
        ((200, 40, 64), "awq has words of 8 outputs and 3 blocks of inputs, which do not divide 40×200"),
        ((256, 40, 128, "q.qzeros"), "its qzeros is (1, 5), not (2, 5) as awq has it of 40×256 in 2 blocks"),
        ((256, 40, 128, "q.qweight"), "its qweight is (255, 5), not (256, 5) as awq has it of 40×256 in 2 blocks"),
    ],
)
def test_awq_of_other_sizes_is_refused(tmp_path, given, why):
    size, rows, group, *cut = given
    tensors = awq_files(tmp_path, size, rows, group)
    save_file({k: v[:-1].clone() if k in cut else v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"^load_quantized_: layer 'q': {re.escape(why)}$"):
        qcompile.load_quantized_(Awq(size, rows, F16), tmp_path)


@pytest.mark.parametrize("change", [{"version": "gemv"}, {"bits": 8}, {"zero_point": False}])
def test_awq_of_another_version_is_refused(tmp_path, change):
    awq_files(tmp_path, 64, 8, 32, **change)
    with pytest.raises(ValueError, match=r"^load_quantized_: awq of . bits, .* is not read; 4 bits, 'gemm', True is$"):
        qcompile.load_quantized_(Awq(64, 8, F16), tmp_path)
