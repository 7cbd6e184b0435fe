"""LoftQ: weight and adapter together are nearer to the wide weight than the rounded weight is, whatever alpha."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qcompile
from qcompile.stored import PackedWeight

peft = pytest.importorskip("peft")


def adapted(alpha: int = 16, rank: int = 8, **options):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 64))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1"], **options))


def residual(model, wide) -> float:
    """‖W − Q − what PEFT adds to it‖ / ‖W‖ of the first layer, by PEFT's own formula for the adapter."""
    layer, weight = model.base_model.model[0], wide.base_model.model[0].base_layer.weight
    stands_for = layer.base_layer.weight
    stands_for = stands_for.decoded() if isinstance(stands_for, PackedWeight) else stands_for
    return float((weight - stands_for - layer.get_delta_weight("default")).norm() / weight.norm())


@pytest.mark.parametrize("alpha", [4, 8, 32])
def test_residuals_fall_whatever_alpha_is(alpha):
    """alpha / r = ½, 1, 4. Reported residuals are those that PEFT's formula gives, and do not depend on alpha: what an
    adapter of rank 8 leaves of the rounding of normal weights [256, 128] after 1, 2 and 5 iterations.
    """
    wide = adapted(alpha)
    for iters, share in ((1, 0.915), (2, 0.865), (5, 0.82)):
        model = copy.deepcopy(wide)
        rows = qcompile.loftq_(model, "nf4 block64 absmax_bnb; nested", iters=iters)
        assert [row.name for row in rows] == ["base_model.model.0", "base_model.model.1"]
        assert len(rows[0].residuals) == iters + 1
        assert rows[0].best == pytest.approx(residual(model, wide), rel=1e-4)
        assert rows[0].best / rows[0].residuals[0] == pytest.approx(share, abs=0.01)
    assert isinstance(model.base_model.model[0].base_layer.weight, PackedWeight)


def test_the_best_iteration_is_kept():
    """Residuals need not fall: of three levels they rise from the third iteration on."""
    wide = adapted()
    model = copy.deepcopy(wide)
    (row, _) = qcompile.loftq_(model, "int2 block64", iters=5)
    assert row.residuals[-1] > row.best
    assert residual(model, wide) == pytest.approx(row.best, rel=1e-4)


def test_without_the_division_it_would_be_worse_than_no_adapter():
    """What PEFT's own initialization does for alpha / r = 4: that the test above can fail."""
    wide = adapted(alpha=32)
    model = copy.deepcopy(wide)
    (row, _) = qcompile.loftq_(model, "nf4 block64", iters=1)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(2)
        layer.lora_B["default"].weight.mul_(2)
    assert residual(model, wide) > row.residuals[0]


def test_a_smaller_rank_and_layers_left_alone():
    model = adapted()
    rows = qcompile.loftq_(model, "nf4 block64", rank=3, iters=2, skip="1")
    assert [row.name for row in rows] == ["base_model.model.0"]
    a = model.base_model.model[0].lora_A["default"].weight
    assert a[:3].abs().amax(1).gt(0).all()
    assert a[3:].count_nonzero() == 0
    assert not isinstance(model.base_model.model[1].base_layer.weight, PackedWeight)


def test_a_weight_with_a_column_per_output():
    """transformers' Conv1D, for which PEFT transposes what it adds."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(3)
    model = nn.Sequential(utils.Conv1D(64, 128))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], fan_in_fan_out=True)
    wide = peft.get_peft_model(model, config)
    model = copy.deepcopy(wide)
    (row,) = qcompile.loftq_(model, "nf4 block64")
    assert row.best < row.residuals[0]
    assert residual(model, wide) == pytest.approx(row.best, rel=1e-4)
    assert model.base_model.model[0].base_layer.weight.shape == (128, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 9}, r"rank=9, but the adapter 'default' of 'base_model.model.0' has rank 8"),
        ({"iters": 0}, "iters=0 is not at least 1"),
        ({"adapter": "other"}, r"no linear layer has a LoRA adapter 'other'; call peft.get_peft_model"),
        ({"spec": "nf4 block96"}, "K = 128 is no multiple of block96"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        qcompile.loftq_(adapted(), **{"spec": "nf4 block64"} | options)


def test_packed_weights_have_lost_what_the_adapter_would_make_up_for():
    model = adapted()
    qcompile.pack_(model, "nf4 block64")
    with pytest.raises(ValueError, match=r"the weight of 'base_model.model.0' is packed already"):
        qcompile.loftq_(model, "nf4 block64")
