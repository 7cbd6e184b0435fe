"""Muon with an 8-bit momentum against torch's.

What would break: an update that is not Muon's, a momentum that drifts, states that do not come back as they were.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.optim import Muon
from qcompile.optim.states import decoded

from .test_adamw import assert_same, give_gradients, parameters, rounding_of, tensors, trained

SHAPES = ((40, 128), (96, 64), (64, 125), (8, 16))
LR = 0.02
OPTIONS = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.9, "ns_steps": 4, "ns_coefficients": (3.0, -3.2, 1.2)},
]


def reference_of(optimizer: Muon, **options) -> torch.optim.Muon:
    """torch's, on copies of the parameters and from the same momentum."""
    own = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    reference = torch.optim.Muon(own, LR, **options)
    reference.load_state_dict(optimizer.decoded_state_dict())
    return reference


@pytest.mark.parametrize("states", ["8bit", "fp32"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_is_that_of_torch_from_the_same_momentum(options, states):
    """Parameters to float32's rounding, the momentum to a step of its grid."""
    own = parameters(shapes=SHAPES)
    optimizer = trained(Muon(own, LR, states=states, **options))
    reference = reference_of(optimizer, **options)
    for one in (optimizer, reference):
        trained(one, range(3, 4))
    for parameter, expected in zip(own, reference.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(parameter, expected, rtol=2**-22, atol=LR * 2**-22)
        kind = optimizer._kept(optimizer.param_groups[0], parameter)
        moment = reference.state[expected]["momentum_buffer"]
        grid = rounding_of(moment.double(), "e4m3", kind.block) if kind.block else 0.0
        found = decoded(optimizer.state[parameter], "momentum_buffer", kind)
        assert ((found - moment).abs() <= grid + 2**-22 * moment.abs()).all()


def test_a_momentum_comes_to_rest_where_float32s_does():
    """Beside a number ten times as large, its increments are a tenth of a step of its grid: to nearest it would stop
    half-way.
    """
    own = nn.Parameter(torch.zeros(32, 128))
    optimizer = Muon([own], LR, ns_steps=1)
    for _ in range(60):
        own.grad = torch.ones_like(own)
        own.grad[:, 0] = 10
        optimizer.step()
    kind = optimizer._kept(optimizer.param_groups[0], own)
    assert decoded(optimizer.state[own], "momentum_buffer", kind)[:, 1:].mean() == pytest.approx(1 - 0.95**60, rel=0.01)


def test_16_bit_parameters_follow_float32_ones():
    """Every update is below half a step of the parameter's grid, where rounding to nearest would stand still."""
    own = nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16))
    wide = nn.Parameter(own.detach().float())
    for parameter in (own, wide):
        optimizer = Muon([parameter], lr=1e-2, weight_decay=0.0, states="fp32")
        for _ in range(20):
            parameter.grad = torch.eye(64, dtype=parameter.dtype) + 1 / 64
            optimizer.step()
    moved = 1 - wide.detach()
    assert 0 < moved.mean() < 20 * 2**-9
    # Sums of 20 roundings of at most 2^-8, 4096 of them.
    assert (own.float() - wide).mean().abs() < 5 * 2**-8 * math.sqrt(20 / 4 / own.numel())


def test_bytes_per_parameter():
    own = nn.Parameter(torch.randn(256, 1024, dtype=torch.bfloat16))
    optimizer = trained(Muon([own]), range(1))
    held = sum(value.untyped_storage().nbytes() for value in optimizer.state[own].values())
    assert held / own.numel() <= 1.04


def test_nothing_is_asked_of_the_device():
    """Fake tensors have no numbers: whatever waited for one would fail."""
    with FakeTensorMode():
        own = [nn.Parameter(torch.empty(shape, dtype=torch.bfloat16)) for shape in SHAPES]
        optimizer = Muon(own, lr=torch.tensor(1e-3))
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        for _ in range(2):
            for parameter in own:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()


def test_a_step_with_a_nan_changes_nothing():
    optimizer = trained(Muon(parameters(shapes=SHAPES)))
    before = [tensor.clone() for tensor in tensors(optimizer)]
    give_gradients(own := optimizer.param_groups[0]["params"], 3)
    own[3].grad[7, 2] = math.nan
    optimizer.step()
    assert all(map(torch.equal, before, tensors(optimizer)))


def test_grad_scaler():
    """A scale that is a power of two changes nothing but the numbers' exponents."""
    scaled, plain = (Muon(parameters(shapes=((64, 128),))) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    give_gradients(plain.param_groups[0]["params"], 0)
    give_gradients(scaled.param_groups[0]["params"], 0, scale=float(scaler.scale(torch.ones(()))))
    plain.step()
    scaler.step(scaled)
    assert_same(scaled, plain)


@pytest.mark.parametrize("how", ["load_state_dict", "deepcopy"])
def test_resuming_is_bitwise(how):
    optimizer = trained(Muon(parameters(torch.bfloat16, SHAPES), LR, seed=4))
    if how == "deepcopy":
        resumed = copy.deepcopy(optimizer)
    else:
        own = [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
        resumed = Muon(own)  # options come with the state
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same(trained(resumed, range(3, 5)), trained(optimizer, range(3, 5)))


def test_torchs_state_is_loaded():
    """Training that began with a float32 momentum goes on with 8 bits."""
    own = parameters(shapes=SHAPES)
    reference = trained(torch.optim.Muon(own, LR), range(2))
    optimizer = Muon(own)
    optimizer.load_state_dict(reference.state_dict())
    assert optimizer.param_groups[0]["lr"] == LR
    state = optimizer.state[own[0]]
    assert state["momentum_buffer"].dtype == torch.uint8
    kind = optimizer._kept(optimizer.param_groups[0], own[0])
    exact = reference.state[own[0]]["momentum_buffer"]
    assert ((decoded(state, "momentum_buffer", kind) - exact).abs() <= rounding_of(exact.double(), "e4m3", 128)).all()
    trained(optimizer, range(2, 3))


@pytest.mark.nightly
@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_is_eager():
    """One program for all sizes; sums may be contracted, so roundings of either kind may differ by one step."""
    eager, compiled = (Muon(parameters(torch.bfloat16, SHAPES), LR) for _ in range(2))
    trained(compiled, range(1))
    with torch.compiler.set_stance("force_eager"):
        trained(eager, range(1))
    for one, other in zip(*(o.param_groups[0]["params"] for o in (eager, compiled)), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=0)
        kind = eager._kept(eager.param_groups[0], one)
        a, b = (decoded(o.state[p], "momentum_buffer", kind) for o, p in ((eager, one), (compiled, other)))
        torch.testing.assert_close(a, b, rtol=2**-3, atol=0)


def test_matrices_without_elements():
    own = parameters(shapes=((0, 128), (64, 0), (40, 128)))
    assert float(trained(Muon(own)).state[own[0]]["step"]) == 3


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1}, "lr=-1; a number of at least 0"),
        ({"momentum": 1.0}, "momentum=1.0; a number of at least 0 and below 1"),
        ({"nesterov": 1}, "nesterov=1; True or False"),
        ({"ns_coefficients": (1, 2)}, r"ns_coefficients=\(1, 2\); three numbers"),
        ({"ns_steps": 100}, "ns_steps=100; an integer from 1 to 99"),
        ({"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms'; one of None, 'original', 'match_rms_adamw'"),
        ({"states": "fp8-lm"}, "states='fp8-lm'; known are '8bit', 'fp32'"),
        ({"block": 8}, "block=8; an integer of at least 16"),
    ],
)
def test_wrong_options(options, error):
    with pytest.raises(ValueError, match=f"^Muon: {error}"):
        Muon(parameters(shapes=SHAPES), **options)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"^Muon: a parameter \(4,\) is no matrix; give it to qcompile.optim.AdamW$"):
        Muon([nn.Parameter(torch.ones(4))])
