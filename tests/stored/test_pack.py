"""Which layers ``pack_`` stores how, what it refuses, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.stored import PackedWeight
from qcompile.stored.pack import bytes_of


class Conv1D(nn.Module):
    """As transformers' own, of GPT-2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 128)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 128)) for _ in range(2))
        self.conv = Conv1D(128, 96)
        self.gate = nn.Linear(128, 4)
        self.lm_head = nn.Linear(128, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        self.conv(x)
        return self.lm_head(x)


def packed_names(model: nn.Module) -> dict[str, str]:
    modules = model.named_modules()
    return {name: m.weight.spec for name, m in modules if isinstance(getattr(m, "weight", None), PackedWeight)}


def test_linear_layers_are_packed_and_heads_and_thin_ones_are_not():
    model = Model()
    before = bytes_of(model)
    done = qcompile.pack_(model, "nf4 block64 absmax_bnb; nested")
    assert list(packed_names(model)) == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1", "conv"]
    assert done.wide == {
        "gate": "a side of its weight is 4, below min_side=32",
        "lm_head": "a layer called lm_head",
    }
    assert [layer.name for layer in done.layers] == list(packed_names(model))
    assert done.layers[0].shape == (64, 128)
    weights = 4 * 64 * 128 + 128 * 96
    assert done.bytes_before == before == bytes_of(Model())
    assert done.bytes_after == before - 4 * weights + weights * done.bits_per_weight / 8 == bytes_of(model)
    assert 4.12 < done.bits_per_weight < 4.14
    assert str(done).splitlines() == [
        "packed layers: 5 as 'nf4 block64 absmax_bnb even; nested'; 4.132 bits per weight",
        f"model: {before / 1e6:.2f} MB → {done.bytes_after / 1e6:.2f} MB",
        "left wide: gate (a side of its weight is 4, below min_side=32)",
        "left wide: lm_head (a layer called lm_head)",
    ]
    assert type(model.layers[0][0]) is nn.Linear
    assert not model.layers[0][0].weight.requires_grad


def test_experts_in_one_parameter_are_listed():
    """They are most of the memory of such a model."""
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "conv": nn.Conv1d(4, 4, 3), "experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.zeros(4, 64, 64))
    done = qcompile.pack_(model, "nf4 block64")
    assert done.wide == {"experts.up": "a parameter of three axes, as those of experts: not packed"}


def test_layers_that_another_library_has_quantized_are_listed():
    """transformers keeps the blocks of a GGUF file in modules of its own; else nothing would say why they stay."""
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "gguf": nn.Module()})
    model["gguf"].weight = nn.Parameter(torch.zeros(64, 36, dtype=torch.uint8), requires_grad=False)
    done = qcompile.pack_(model, "nf4 block64")
    assert done.wide == {"gguf": "its weight is a Parameter of uint8"}
    with pytest.raises(
        ValueError, match=r"layer 'gguf' cannot be stored as 'int8 row': its weight is a Parameter of uint8"
    ):
        qcompile.pack_(model, "nf4 block64", rules={"gguf": "int8 row"})


def test_rules_and_skip_choose_layers():
    """Later rules win; a rule packs what is left wide by default; skip= wins over all."""
    model = Model()
    done = qcompile.pack_(
        model,
        "nf4 block64",
        skip="layers.1",
        rules={"layers": "int8 row", "layers.0.1": "e2m1 block16 e4m3", "lm_head": "int8 row", "conv": None},
    )
    assert packed_names(model) == {
        "layers.0.0": "int8 row absmax even",
        "layers.0.1": "e2m1 block16 e4m3 even",
        "lm_head": "int8 row absmax even",
    }
    assert done.wide["layers.1.0"] == "skip='layers.1'"
    assert done.wide["conv"] == "rules: 'conv': None"


def test_unpack_gives_plain_parameters_back():
    model, ids = Model(), torch.arange(5)
    qcompile.pack_(model, "int8 row")
    y = model(ids)
    assert qcompile.unpack_(model, "layers.0") == ["layers.0.0", "layers.0.1"]
    assert len(packed_names(model)) == 3
    qcompile.unpack_(model)
    assert packed_names(model) == {}
    assert type(model.conv.weight.data) is torch.Tensor
    assert model.conv.weight.is_contiguous()
    assert torch.equal(model(ids), y)
    model.conv.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"unpack_: names: 'gate' matches no layer; there are none"):
        qcompile.unpack_(model, "gate")


def test_tied_weights():
    """Between linear layers there is one packed weight for both; an embedding looks rows up, so its weight stays."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(64, 128), "head": nn.Linear(128, 64), "a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}
    )
    model["head"].weight = model["embed"].weight
    model["b"].weight = model["a"].weight
    done = qcompile.pack_(model, "nf4 block64")
    assert model["a"].weight is model["b"].weight
    assert list(packed_names(model)) == ["a", "b"]
    assert done.wide == {"head": "tied: its weight is also that of a module of class Embedding"}
    qcompile.unpack_(model)
    assert model["a"].weight is model["b"].weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"spec": "nf4 block48"},
            "layer 'layers.0.0' of 64×128 as 'nf4 block48': K = 128 is no multiple of block48; take",
        ),
        ({"spec": "nf5 block64"}, "nf5"),
        ({"skip": "layres"}, r"skip: 'layres' matches no layer; there are embed, layers.0.0"),
        ({"rules": {"layres": None}}, r"rules: 'layres' matches no layer"),
        (
            {"rules": {"embed": "int8 row"}},
            "'embed' cannot be stored as 'int8 row': a module of class Embedding",
        ),
    ],
)
def test_what_is_refused_names_the_layer_the_value_and_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        qcompile.pack_(Model(), **{"spec": "nf4 block64"} | options)


def test_packing_twice_leaves_packed_weights_alone():
    model = Model()
    qcompile.pack_(model, "nf4 block64")
    codes = model.conv.weight.codes
    done = qcompile.pack_(model, "int8 row")
    assert model.conv.weight.codes is codes
    assert done.wide["conv"] == "stored already, as 'nf4 block64 absmax even'"


def test_on_the_meta_device_shapes_are_packed():
    """So that a model larger than memory can be packed before its weights are loaded."""
    with torch.device("meta"):
        model = Model()
    qcompile.pack_(model, "nf4 block64 absmax_bnb; nested")
    assert model.conv.weight.codes.shape == (96, 64)
    assert model.conv.weight.shape == (128, 96)
    model.to_empty(device="cpu").load_state_dict(Model().state_dict())
    assert model.conv.weight.decoded().isfinite().all()


def test_a_format_of_the_users(definitions_forgotten):
    """By its short name in the text; stored under the full one, which means one thing for ever."""
    mine = qcompile.Format("eighths", bits=4, codebook=tuple(x / 8 for x in range(-8, 8)))
    model = nn.Sequential(nn.Linear(64, 64))
    qcompile.pack_(model, "eighths block32")
    assert model[0].weight.spec == f"{mine.name} block32 absmax even"
    assert len(set((model[0].weight.decoded()[0, :32] / model[0].weight.scales[0, 0] * 8).round().tolist())) > 4
