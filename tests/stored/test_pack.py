"""Which layers ``pack_`` stores how, what it refuses, and what it says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.recipes import STORED
from qcompile.stored import PackedWeight
from qcompile.stored.pack import bytes_of, packed_weights
from tests.passes.harness import compile_and_run


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
        self.norm = nn.LayerNorm(128)
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
        "embed": "an embedding; rules may name it",
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
        "left wide: embed (an embedding; rules may name it)",
        "left wide: gate (a side of its weight is 4, below min_side=32)",
        "left wide: lm_head (a layer called lm_head)",
    ]
    assert type(model.layers[0][0]) is nn.Linear
    assert not model.layers[0][0].weight.requires_grad


def test_parameters_of_three_axes_that_may_be_no_experts_are_listed():
    """Whichever axis they are contracted along, and called ``weight`` too (JetMoe's); convolutions are not."""
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "conv": nn.Conv1d(4, 4, 3), "experts": nn.Module()})
    model["experts"].up = nn.Parameter(torch.zeros(4, 64, 64))
    model["experts"].weight = nn.Parameter(torch.zeros(4, 64, 64))
    done = qcompile.pack_(model, "nf4 block64")
    why = "a parameter of three axes of a Module, not known to be experts (no is_transposed): left as it is"
    assert done.wide == {"experts.up": why, "experts": why}


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
    """Between linear layers there is one packed weight for both; with an embedding too, if rules name one of them."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(64, 128), "head": nn.Linear(128, 64), "a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}
    )
    model["head"].weight = model["embed"].weight
    model["b"].weight = model["a"].weight
    done = qcompile.pack_(model, "nf4 block64")
    assert model["a"].weight is model["b"].weight
    assert list(packed_names(model)) == ["a", "b"]
    assert done.wide == {
        "embed": "an embedding; rules may name it",
        "head": "tied: its weight is also that of a module of class Embedding",
    }
    with pytest.raises(ValueError, match=r"'embed' and 'head' have one weight, but 'head' stays wide \(skip='head'\)$"):
        qcompile.pack_(model, "nf4 block64", rules={"embed": "int8 row"}, skip="head")
    done = qcompile.pack_(model, "nf4 block64", rules={"embed": "int8 row"})
    assert packed_names(model) == {
        name: f"{spec} absmax even" for name, spec in
        {"embed": "int8 row", "head": "int8 row", "a": "nf4 block64", "b": "nf4 block64"}.items()
    }  # fmt: skip
    assert model["head"].weight is model["embed"].weight
    assert qcompile.unpack_(model, ["a", "head"]) == ["embed", "head", "a", "b"]
    assert model["a"].weight is model["b"].weight
    assert model["head"].weight is model["embed"].weight


def tied() -> nn.Sequential:
    """Linear layers with one weight, an embedding with it first."""
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    model[2].weight = model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "rules", [{"1": "int8 row"}, {"2": "int8 row absmax"}, {"0": "int8 row", "2": "int8 row even"}]
)
def test_a_rule_holds_for_all_layers_of_a_weight(rules):
    """The default does not win because its layer comes first, nor is its block size checked."""
    model = tied()
    model[0] = nn.Identity() if "0" not in rules else model[0]
    qcompile.pack_(model, "nf4 block48", rules=rules)
    assert {weight.spec for _, weight in packed_weights(model)} == {"int8 row absmax even"}
    assert model[1].weight is model[2].weight


def test_rules_that_say_two_things_of_one_weight_are_refused():
    model = tied()
    with pytest.raises(
        ValueError,
        match=r"^pack_: layers '0' and '1' have one weight, but rules store them as 'int8 row' and 'nf4 block64'; name",
    ):
        qcompile.pack_(model, "nf4 block64", rules={"0": "int8 row", "1": "nf4 block64"})
    assert type(model[1].weight) is nn.Parameter


@pytest.mark.parametrize(
    "spec", ["nf4 block64 absmax_bnb; nested", "uint4 block32; zeros", "int8 row", "e2m1 block16 e4m3"]
)
def test_of_a_packed_embedding_the_rows_that_are_looked_up_are_decoded(spec, monkeypatch):
    model = nn.Sequential(nn.Embedding(96, 64, padding_idx=3), nn.Linear(64, 96, bias=False))
    model[1].weight = model[0].weight
    qcompile.pack_(model, spec, rules={"0": spec})
    ids = torch.randint(0, 96, (2, 15))
    dense = model[0].weight.decoded()
    with monkeypatch.context() as patch:
        patch.delattr(PackedWeight, "decoded")
        assert torch.equal(model[0](ids), dense[ids])
    plain = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False))
    plain[0].weight = plain[1].weight = nn.Parameter(dense, requires_grad=False)
    result = compile_and_run(model, ids, recipe=STORED)
    torch.testing.assert_close(result.outputs, plain(ids))
    assert result.fused() == ({} if "zeros" in spec else {"fprop": 1})


def test_embeddings_that_are_written_to_are_refused():
    model = nn.Sequential(nn.Embedding(64, 64, max_norm=1.0))
    with pytest.raises(
        ValueError, match=r"layer '0' cannot .*: a module of class Embedding with max_norm writes to its"
    ):
        qcompile.pack_(model, "nf4 block64", rules={"0": "int8 row"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"spec": "nf4 block48"},
            "layer 'layers.0.0' of 64×128 as 'nf4 block48': K = 128 is no multiple of block48; take",
        ),
        ({"spec": "nf5 block64"}, "nf5"),
        ({"spec": None}, "^weights stored as None: that is no text; for example 'nf4 block64'$"),
        ({"spec": 4}, "^weights stored as 4: that is no text"),
        ({"spec": ["nf4"]}, r"^weights stored as \['nf4'\]: that is no text"),
        ({"rules": {"conv": 4}}, "^weights stored as 4: that is no text"),
        ({"skip": "layres"}, r"skip: 'layres' matches no layer; there are embed, layers.0.0"),
        ({"rules": {"layres": None}}, r"rules: 'layres' matches no layer"),
        (
            {"rules": {"norm": "int8 row"}},
            "'norm' cannot be stored as 'int8 row': a module of class LayerNorm does not only multiply by its weight",
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
