"""A packed weight as a tensor of eager torch: what it decodes to, and what programs do with a parameter."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile.ir.ops import global_scale_of
from qcompile.ir.stored import Stored
from qcompile.kernels.quantize import reference
from qcompile.stored import PackedWeight

NESTED = "nf4 block64 absmax_bnb; nested"
#: Spec → bits per weight of [96, 128], counted by hand.
SPECS = {
    "nf4 block64": 4 + 32 / 64,
    NESTED: 4 + 8 / 64 + 32 / (96 * 128) * (1 + 1),  # 192 scales: one second scale, one offset
    "fp4bnb block64 absmax_bnb": 4 + 32 / 64,
    "int4 block32": 4 + 32 / 32,
    "int8 row": 8 + 32 / 128,
    "e2m1 row": 4 + 32 / 128,
    "e2m1 block16 e4m3": 4 + 8 / 16 + 32 / (96 * 128),
    "e2m1 block32 e8m0": 4 + 8 / 32,
    "int4 block64; nested(int8 block32 absmax)": 4 + 8 / 64 + 32 / 64 / 32,
}


def weight(rows: int = 96, size: int = 128, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(16)).to(dtype)


def layer(spec: str = NESTED, **options) -> nn.Linear:
    linear = nn.Linear(128, 96)
    linear.weight = nn.Parameter(PackedWeight.of(weight(**options), spec), requires_grad=False)
    return linear


def reopened(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# --- what it stands for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "bits"), SPECS.items())
def test_it_decodes_to_what_its_quantizer_makes_of_the_weight(spec, bits):
    """And is as small as the format says. Nested scales are checked against bitsandbytes' below."""
    w = weight()
    packed = PackedWeight.of(w, spec)
    assert packed.nbytes * 8 == pytest.approx(bits * w.numel())
    assert (packed.shape, packed.dtype, packed.stride()) == (w.shape, w.dtype, w.stride())
    if packed.stored.nested is None:
        q = packed.stored.quantizer
        whole = global_scale_of(w, q)
        codes, scales = reference.quantize(w, str(q), -1, whole)
        assert torch.equal(packed.codes, codes)
        expected = reference.dequantize(codes, scales, str(q), -1, 128, w.dtype, whole)
        assert torch.equal(packed.decoded(), expected)
    assert packed.decoded().sub(w).norm() < 0.15 * w.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("spec", "kind"), [(NESTED, "nf4"), ("fp4bnb block64 absmax_bnb; nested", "fp4")])
def test_bytes_decode_as_those_of_bitsandbytes(spec, kind, dtype):
    """Bitwise, in 16 bits too, but for the order of codes in a byte (theirs: high half first).

    Codes of scales are copied: its C++ kernel rounds a few to a level farther away
    (tests/kernels/test_nested_scales.py).
    """
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = weight(dtype=dtype)
    theirs, state = bnb.quantize_4bit(w, quant_type=kind, blocksize=64, compress_statistics=True)
    packed = PackedWeight.of(w, spec)
    if kind == "nf4":  # FP4 has two codes for 0, of which its C++ kernel takes either
        assert torch.equal(packed.codes.reshape(-1), ((theirs << 4) | (theirs >> 4)).reshape(-1))
    assert torch.equal(packed.second, state.state2.absmax)
    assert torch.equal(packed.offset, state.offset)
    assert packed.scale_codes.ne(state.absmax).float().mean() < 0.01
    packed.scale_codes.copy_(state.absmax)
    assert torch.equal(packed.decoded(), bnb.dequantize_4bit(theirs, state))


def test_text_of_a_spec():
    assert str(Stored.parse("nf4 block64 absmax_bnb;nested")) == "nf4 block64 absmax_bnb even; nested"
    for text in SPECS:
        assert Stored.parse(str(Stored.parse(text))) == Stored.parse(text)
    wrong = {
        "nf4 block64; netsed": "'netsed' after the quantizer is not 'nested'",
        "e2m1 block16 e4m3; nested": "scales in e4m3 are not quantized again; drop '; nested'",
        "e2m1 row stochastic": "rounded once, to the nearest; use even",
        "nf5 block64": "nf5",
    }
    for text, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            Stored.parse(text)


def test_blocks_have_to_divide_the_rows():
    with pytest.raises(ValueError, match="K = 100 is no multiple of block64; take a block that divides it, or 'row'"):
        PackedWeight.of(weight(8, 100), "nf4 block64")
    assert PackedWeight.of(weight(8, 101), "int4 row").decoded().shape == (8, 101)  # a byte's second half is spare


# --- products -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["nf4 block64", NESTED, "e2m1 block16 e4m3"])
def test_eager_products_keep_nothing_wide_for_the_backward(spec):
    """``W.t()`` has to stay packed for that. Numbers are those of the decoded weight."""
    linear, x = layer(spec), torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = linear(x)
    y.sum().backward()
    dense = linear.weight.decoded()
    assert torch.equal(y, F.linear(x, dense, linear.bias))
    assert torch.equal(x.grad, torch.ones(5, 96) @ dense)
    assert [type(t) for t in saved] == [PackedWeight]


@pytest.mark.parametrize("how", ["no_grad", "inference_mode"])
def test_products_without_gradients(how):
    linear, x = layer(), torch.randn(5, 128)
    with getattr(torch, how)():
        assert torch.equal(linear(x), F.linear(x, linear.weight.decoded(), linear.bias))


def test_autocast_decodes_to_the_narrow_dtype():
    linear, x = layer(), torch.randn(5, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    narrow = linear.weight.decoded(torch.bfloat16)
    assert torch.equal(y, F.linear(x.bfloat16(), narrow, linear.bias.bfloat16()))


def test_views_that_swap_axes_stay_packed_and_others_decode():
    packed = layer().weight
    dense = packed.decoded()
    for view in (packed.t(), packed.T, packed.mT, packed.transpose(0, 1), packed.permute(1, 0)):
        assert isinstance(view, PackedWeight)
        assert torch.equal(view.decoded(), dense.t())
        assert view.codes.data_ptr() == packed.codes.data_ptr()
    assert torch.equal(packed[3:5], dense[3:5])
    assert type(packed * 2) is torch.Tensor
    assert torch.equal(packed.int(), dense.int())


# --- what programs do with parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("copy_of", [reopened, copy.deepcopy], ids=["saved", "deepcopy"])
@pytest.mark.parametrize("spec", ["nf4 block64", NESTED, "e2m1 block16 e4m3"])
def test_state_dict_saved_with_weights_only_and_deepcopy(spec, copy_of):
    linear = layer(spec)
    copied = copy_of(linear.state_dict())["weight"]
    assert isinstance(copied, PackedWeight)
    assert copied.spec == linear.weight.spec
    assert torch.equal(copied.decoded(), linear.weight.decoded())
    assert all(copied.parts[name].data_ptr() != part.data_ptr() for name, part in linear.weight.parts.items())


def test_deepcopy_of_a_module_has_a_parameter():
    copied = copy.deepcopy(layer())
    assert isinstance(copied.weight, nn.Parameter)
    assert isinstance(copied.weight, PackedWeight)


def test_to_another_dtype_and_device():
    """Only the outer dtype changes: codes are not quantized again, so there and back is exact."""
    linear = layer()
    dense = linear.weight.decoded()
    linear.to(torch.bfloat16)
    assert (linear.weight.dtype, type(linear.weight)) == (torch.bfloat16, PackedWeight)
    assert isinstance(linear.weight, nn.Parameter)
    assert torch.equal(linear.weight.decoded(), dense.bfloat16())
    assert torch.equal(linear.float().weight.decoded(), dense)
    linear.to("meta")
    assert {part.device.type for part in linear.weight.parts.values()} == {"meta"}
    assert linear.to_empty(device="cpu").weight.codes.device.type == "cpu"


def test_data_takes_wide_and_packed_values():
    """On a plain wrapper ``p.data = …`` changes shape and dtype and leaves the parts: merged adapters would be lost."""
    parameter = layer().weight
    dense = parameter.decoded()
    parameter.data = parameter.data.to(torch.bfloat16)  # as prepare_model_for_kbit_training does
    assert torch.equal(parameter.decoded(), dense.bfloat16())
    parameter.data = dense * 2  # exact: no warning
    assert parameter.dtype == torch.float32
    assert torch.equal(parameter.decoded(), PackedWeight.of(dense * 2, NESTED).decoded())
    assert isinstance(parameter, nn.Parameter)
    with pytest.raises(ValueError, match=r"shape \(96, 128\) cannot become one of \(3, 4\)"):
        parameter.data = torch.zeros(3, 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_in_place_changes_are_quantized_again(transposed):
    """Not lost on a decoded copy. Doubling is exact: the scales double."""
    w = weight()
    packed = PackedWeight.of(w.t() if transposed else w, "nf4 block64", transposed)
    dense, codes = packed.decoded(), packed.codes.clone()
    result = packed.mul_(2)
    assert result is packed
    assert torch.equal(packed.decoded(), dense * 2)
    assert torch.equal(packed.codes, codes)
    packed.zero_()
    assert packed.decoded().count_nonzero() == 0
    packed.copy_(dense)
    assert torch.equal(packed.decoded(), dense)


def test_what_rounding_costs_is_said():
    """Where a weight is changed, not where it is loaded: the number is that of the sentence, worked out here."""
    parameter, delta = layer("int4 row").weight, torch.full((96, 128), 0.01)
    value = parameter.decoded() + delta
    lost = (PackedWeight.of(value, "int4 row").decoded() - value).norm() / delta.norm()
    with pytest.warns(UserWarning, match=f"stored as 'int4 row .*add_: rounding took {lost:.0%}".replace("%", " %")):
        parameter.add_(delta)
    with pytest.warns(UserWarning, match=r"data = …: rounding took \d+ % of the change"):
        parameter.data = parameter.decoded() + delta


def test_loading_crosses_between_wide_and_packed():
    linear, plain = layer(), nn.Linear(128, 96)
    plain.load_state_dict(linear.state_dict())
    assert torch.equal(plain.weight, linear.weight.decoded())
    linear.load_state_dict({"weight": weight() + 1, "bias": plain.bias})
    assert torch.equal(linear.weight.decoded(), PackedWeight.of(weight() + 1, NESTED).decoded())
    other = layer("int8 row")
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight.decoded(), PackedWeight.of(linear.weight.decoded(), "int8 row").decoded())


def test_shared_memory():
    """Torch's own ``share_memory_`` takes the memory of the wrapper, which has none, and crashes."""
    linear = layer()
    dense = linear.weight.decoded()
    linear.share_memory()
    assert linear.weight.is_shared()
    assert torch.equal(linear.weight.decoded(), dense)


@pytest.mark.parametrize("ask", [lambda p: p.requires_grad_(True), lambda p: setattr(p, "requires_grad", True)])
def test_it_cannot_be_trained(ask):
    parameter = layer().weight
    message = (
        r"requires_grad=True on a weight stored as 'nf4 .*nested'.*train an adapter beside it, or qcompile.unpack_"
    )
    with pytest.raises(RuntimeError, match=message):
        ask(parameter)
    assert not parameter.requires_grad_(False).requires_grad


def test_optimizers_and_clipping_pass_it_by():
    linear = layer()
    dense = linear.weight.decoded()
    linear(torch.randn(3, 128)).sum().backward()
    torch.nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
    torch.optim.AdamW(linear.parameters(), weight_decay=0.1).step()
    assert torch.equal(linear.weight.decoded(), dense)


def test_it_says_what_it_is():
    assert repr(layer("int8 row").weight) == "PackedWeight(96×128 float32 on cpu, 'int8 row absmax even')"
