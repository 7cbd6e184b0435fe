"""``backward="auto"``: which backward products are multiplied in 8 bits, and what a report says of the others.

What would break: a choice that does not follow the estimates, numbers that are not those of the mode it stands for, a
gradient that is rounded though the user, a rule or the card says otherwise.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import qcompile
from qcompile import compat
from qcompile.kernels.matmul.costs import RATES, best_backward, rates_of
from qcompile.recipes import FP4, QUEST, STORED

from .harness import assert_same, compile_and_run

H200 = RATES[0]
BOTH = ("dgrad", "wgrad")


@pytest.fixture
def hopper() -> Any:
    with (
        mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)),
        mock.patch.object(compat, "card_name", return_value="NVIDIA H200"),
    ):
        yield


@pytest.mark.parametrize(
    ("shape", "readers", "roles"),
    [
        ((16384, 14336, 4096), 2, BOTH),
        ((16384, 1024, 4096), 3, BOTH),
        ((16384, 2048, 8192), 1, BOTH),
        ((32768, 640, 640), 3, ()),
        ((32768, 1792, 640), 2, ()),
        ((256, 256, 256), 1, ()),
    ],
)
def test_large_products_run_in_8_bits(shape: tuple[int, int, int], readers: int, roles: tuple[str, ...]) -> None:
    """The shapes of Llamas of 8 billion, 1 billion and 30 million parameters, as measured on an H200."""
    assert best_backward(shape, BOTH, readers, torch.bfloat16, H200)[0] == roles


def test_the_choice_is_the_least_estimate_and_stays_within_what_can_be_folded() -> None:
    for roles in (BOTH, ("dgrad",), ("wgrad",)):
        chosen, estimates = best_backward((16384, 4096, 4096), roles, 1, torch.bfloat16, H200)
        assert estimates[chosen] == min(estimates.values())
        assert all(set(choice) <= set(roles) for choice in estimates)
    wide = best_backward((4096, 640, 640), BOTH, 1, torch.float32, H200)[0]
    assert wide == BOTH  # products of float32 take so long that every pass pays


def test_a_card_that_was_not_measured_is_taken_for_an_h100() -> None:
    assert rates_of("NVIDIA H200") == (H200, True)
    for card in ("NVIDIA H100 80GB HBM3", "NVIDIA B200"):
        rates, measured = rates_of(card)
        assert (rates.card, measured) == ("NVIDIA H100", False)


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(96, 160), nn.GELU(), nn.Linear(160, 96))


def _reasons(result: Any) -> dict[str, set[str]]:
    reasons: dict[str, set[str]] = {}
    for row in result.gemms:
        reasons.setdefault(row["role"], set()).add(row["reason"])
    return reasons


@pytest.mark.parametrize("recipe", [FP4, QUEST], ids=["fp4", "quest"])
@pytest.mark.parametrize(
    ("choice", "mode"), [((), "bf16"), (("dgrad",), "dgrad_fp8"), (BOTH, "fp8")], ids=["none", "dgrad", "both"]
)
def test_the_numbers_are_those_of_the_mode_that_it_stands_for(
    hopper: Any, recipe: Any, choice: tuple[str, ...], mode: str
) -> None:
    x = torch.randn(9, 96, requires_grad=True)
    decided = mock.patch(
        "qcompile.passes.fold.costs.best_backward", lambda shape, roles, *rest: (choice, {choice: 1.0, roles: 2.0})
    )
    with decided:
        auto = compile_and_run(_model(), x, recipe=recipe)
    pinned = compile_and_run(_model(), x, recipe=recipe, backward=mode)
    assert_same(auto.outputs, pinned.outputs, tolerance=0)
    assert_same(auto.gradients, pinned.gradients, tolerance=0)


def test_small_layers_are_decoded_and_the_report_gives_both_estimates(hopper: Any) -> None:
    result = compile_and_run(_model(), torch.randn(9, 96, requires_grad=True), recipe=FP4)
    reasons = _reasons(result)
    for role in BOTH:
        assert all("µs estimated for the backward" in reason and "in 8 bits" in reason for reason in reasons[role])


def test_a_card_without_8_bit_tensor_cores_keeps_gradients_wide() -> None:
    result = compile_and_run(_model(), torch.randn(9, 96, requires_grad=True), recipe=FP4)
    for role in BOTH:
        assert _reasons(result)[role] == {"no 8-bit tensor cores on cpu"}


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "bf16"},
        {"gradient": None},
        {"gradient": "e2m1 block16 e4m3"},
        {"rules": [{"name": "*", "gradient": "bf16"}]},
        {"rules": [{"name": "*", "gradient": "e5m2 tensor"}]},
        {"variant": "paper"},
    ],
    ids=str,
)
def test_a_gradient_that_is_given_is_that_on_every_card(hopper: Any, options: dict[str, Any]) -> None:
    """The same numbers with Hopper's tensor cores, where auto would fold scales into dY, and without."""

    def fold_all(shape: Any, roles: Any, *rest: Any) -> Any:
        return roles, {roles: 1.0}

    x = torch.randn(9, 96, requires_grad=True)
    with mock.patch("qcompile.passes.fold.costs.best_backward", fold_all):
        on_hopper = compile_and_run(_model(), x, recipe=FP4, **options)
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        on_cpu = compile_and_run(_model(), x, recipe=FP4, **options)
    assert_same(on_hopper.gradients, on_cpu.gradients)


@pytest.mark.parametrize("activation", [None, "e2m1 row"])
def test_beside_stored_weights_dy_is_as_wide_as_x(hopper: Any, activation: str | None) -> None:
    """QLoRA's gradients must not be rounded because the codes of its weights happen to be exact in 8 bits."""

    def run(**options: Any) -> Any:
        model = _model()
        qcompile.pack_(model, "e2m1 row")
        return compile_and_run(model, x, recipe=STORED, activation=activation, **options).gradients

    x = torch.randn(9, 96, requires_grad=True)
    with mock.patch("qcompile.passes.fold.costs.best_backward", lambda shape, roles, *rest: (roles, {roles: 1.0})):
        auto = run()
    wide, folded = run(backward="bf16"), run(backward="fp8")
    assert_same(auto, folded, tolerance=0)
    assert torch.equal(wide[0], folded[0]) == (activation is None)


def test_variants_apply_before_the_options_beside_them() -> None:
    paper = FP4.override({"variant": "paper"})
    assert (paper.backward, paper.activation.outliers.residual) == ("bf16", "exact")
    assert FP4.override({"variant": "paper", "backward": "fp8"}).backward == "fp8"
    with pytest.raises(ValueError, match=r"'variant': 'papr' is not one of the variants of qcompile_fp4: paper"):
        FP4.override({"variant": "papr"})
