"""Packed weights in safetensors files, and wide files into packed models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcompile
from qcompile.stored import PackedWeight

safetensors = pytest.importorskip("safetensors.torch")


class Model(nn.Module):
    """A buffer, two linear layers that share a weight, one with three dtypes of parts, one that stays wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(128, 128), nn.Linear(128, 128)
        self.b.weight = self.a.weight
        self.c, self.gate = nn.Linear(128, 64, bias=False), nn.Linear(64, 4)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(self.c(self.b(self.a(x)))) * self.scale.sum()


def packed(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    model = Model()
    qcompile.pack_(model, "nf4 block64 absmax_bnb; nested", rules={"c": "e2m1 block16 e4m3"})
    return model


@pytest.mark.parametrize("into", ["packed otherwise", "wide", "meta"])
def test_a_file_gives_any_model_the_same_weights(tmp_path, into):
    """Bitwise, in every part; tied weights are in the file once and tied afterwards."""
    saved, x = packed(), torch.randn(2, 128)
    file = tmp_path / "model.safetensors"
    safetensors.save_file(qcompile.packed_state_dict(saved), file)
    with torch.device("meta" if into == "meta" else "cpu"):
        model = Model()
    if into == "packed otherwise":
        qcompile.pack_(model, "int8 row")
    qcompile.load_packed_(model, file)
    assert torch.equal(model(x), saved(x))
    assert model.a.weight is model.b.weight
    for name in ("a", "c"):
        ours, theirs = getattr(model, name).weight, getattr(saved, name).weight
        assert isinstance(ours, nn.Parameter)
        assert ours.spec == theirs.spec
        assert all(torch.equal(part, theirs.parts[key]) for key, part in ours.parts.items())
    assert model.gate.weight.requires_grad


def test_what_is_in_the_file():
    state = qcompile.packed_state_dict(packed())
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in state.items() if name.startswith("c.")} == {
        "c.weight.codes": ("torch.uint8", (64, 64)),
        "c.weight.scales": ("torch.float8_e4m3fn", (64, 8)),
        "c.weight.global_scale": ("torch.float32", ()),
        "c.weight.packed": ("torch.uint8", state["c.weight.packed"].shape),
    }
    text = bytes(state["c.weight.packed"].tolist()).decode()
    assert text == '{"spec": "e2m1 block16 e4m3 even", "size": 128, "dtype": "float32", "transposed": false}'
    assert not any(name.startswith("b.weight") for name in state)


def test_a_wide_checkpoint_in_shards_is_packed_as_it_is_read(tmp_path):
    """So a model whose wide weights fit into no memory can be packed: it is on the meta device until then."""
    torch.manual_seed(1)
    wide = Model()
    state = {name: tensor for name, tensor in wide.state_dict().items() if name != "b.weight"}
    names = sorted(state)
    for shard, part in (("1", names[:3]), ("2", names[3:])):
        safetensors.save_file({name: state[name].contiguous() for name in part}, tmp_path / f"{shard}.safetensors")
    with torch.device("meta"):
        model = Model()
    qcompile.pack_(model, "nf4 block64")
    qcompile.load_packed_(model, tmp_path)
    expected = PackedWeight.of(wide.c.weight, "nf4 block64")
    assert all(torch.equal(part, expected.parts[key]) for key, part in model.c.weight.parts.items())
    assert torch.equal(model.gate.weight, wide.gate.weight)
    assert model.a.weight is model.b.weight
    assert isinstance(model.a.weight, PackedWeight)


def test_adapters_alone_are_saved_by_peft(tmp_path):
    """``save_pretrained`` of PEFT writes its own parameters, and reads them into a packed model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(packed(), peft.LoraConfig(target_modules=["a", "c"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(packed(), tmp_path)
    x = torch.randn(2, 128)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("c.weight.packed"), r"'c.weight' is missing"),
        (lambda state: state.pop("gate.bias"), r"'gate.bias' is missing; load into the model that was saved"),
        (lambda state: state.update(more=torch.ones(1)), r"'more' is given, but the model has none"),
        (lambda state: state.update({"scale": torch.ones(4)}), r"'scale' is \(4,\) in the file, \(3,\) in the model"),
    ],
)
def test_states_that_do_not_fit(change, message):
    state = qcompile.packed_state_dict(packed())
    change(state)
    with pytest.raises(ValueError, match=message):
        qcompile.load_packed_(packed(), state)
