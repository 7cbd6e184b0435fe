"""``qcompile.Schedule``: one more compilation when a phase begins, and nothing else.

What would break: a model that is compiled again at every step, or never; an optimizer whose state is lost; a resumed
run in the wrong phase; a mistake in the last phase that shows after days.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import NVFP4

STEPS, SWITCH = 5, 3


class Counting:
    """A backend that compiles in seconds, and counts."""

    __name__ = "counting"

    def __init__(self) -> None:
        self.options: list[Any] = []

    def __call__(self, gm: Any, inputs: Any, *, options: Any = None, **_: Any) -> Any:
        self.options.append(options)
        recipe = NVFP4.override({"gradient": {"rounding": "even"}, "min_side": 0, "rules": []})
        return compile_with(recipe, gm, inputs, options=options, inner_compile=compat.eager_inner_compile)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def model() -> nn.Module:
    torch.manual_seed(0)
    return Model()


def schedule(backend: Any) -> qcompile.Schedule:
    return qcompile.Schedule([(0, backend), (SWITCH, backend, {"forward": "bf16"})])


def train(net: nn.Module, optimizer: torch.optim.Optimizer, phases: qcompile.Schedule, until: int) -> list[Tensor]:
    """Outputs, step by step."""
    outputs = []
    while phases.count < until:
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(phases.count))
        outputs.append(net(x))
        (outputs[-1] - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        phases.step()
    return outputs


def test_a_model_is_compiled_again_once_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """The forward is the plain one from then on; parameters, names and the optimizer's state are the same objects."""
    torch._dynamo.reset()
    backend, net = Counting(), model()
    phases = schedule(backend)
    phases.compile(net, dynamic=False)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    names, parameters = list(net.state_dict()), list(net.parameters())
    train(net, optimizer, phases, SWITCH - 1)
    states = [optimizer.state[p]["exp_avg"] for p in parameters]
    with caplog.at_level(logging.WARNING, "qcompile"):
        train(net, optimizer, phases, SWITCH)
    said = [record.message for record in caplog.records if record.name == "qcompile"]
    assert said == ["qcompile: step 3: counting, {'forward': 'bf16'}; compiled again at the next call"]
    assert backend.options == [None]
    x = torch.randn(32, 32, generator=torch.Generator().manual_seed(SWITCH))
    plain = net.forward(x)
    torch.testing.assert_close(train(net, optimizer, phases, STEPS)[0], plain)
    assert backend.options == [None, {"forward": "bf16"}]
    assert list(net.state_dict()) == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert all(optimizer.state[p]["exp_avg"] is state for p, state in zip(parameters, states, strict=True))


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("stop", "late"),
    [
        (SWITCH - 1, False),
        (SWITCH, True),
        *(pytest.param(*case, marks=NIGHTLY) for case in ((SWITCH - 1, True), (SWITCH, False), (SWITCH + 1, True))),
    ],
)
def test_a_resumed_run_is_in_the_phase_that_it_was_in(stop: int, late: bool) -> None:
    """Stopped before, at and after the switch, loaded before the model is compiled and after: the same parameters."""
    torch._dynamo.reset()
    backend = Counting()
    whole = model()
    phases = schedule(backend)
    phases.compile(whole)
    optimizer = torch.optim.AdamW(whole.parameters(), 1e-2)
    train(whole, optimizer, phases, stop)
    saved = {"model": {k: v.clone() for k, v in whole.state_dict().items()}, "phases": phases.state_dict()}
    saved["optimizer"] = torch.optim.AdamW(whole.parameters(), 1e-2).state_dict() | {
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in optimizer.state_dict()["state"].items()}
    }
    train(whole, optimizer, phases, STEPS)

    resumed, again = model(), schedule(backend)
    resumed.load_state_dict(saved["model"])
    continued = torch.optim.AdamW(resumed.parameters(), 1e-2)
    continued.load_state_dict(saved["optimizer"])
    if late:
        again.compile(resumed)
    again.load_state_dict(saved["phases"])
    if not late:
        again.compile(resumed)
    assert bool(again.phase.options) == (stop >= SWITCH)
    train(resumed, continued, again, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "the first phase begins at step 0, got no phase"),
        ([(1, "qcompile_nvfp4")], "the first phase begins at step 0, got 1"),
        ([(0, "inductor"), (5, "inductor"), (5, "qcompile_nvfp4")], r"phases begin one after another, got \[0, 5, 5\]"),
        ([(0.5, "qcompile_nvfp4")], "a phase begins at a step ≥ 0, got 0.5"),
        ([(0, "qcompile_fp5")], "at step 0: unknown backend 'qcompile_fp5'; known: "),
        ([(0, "inductor", {"max_autotun": True})], "at step 0: inductor has no option 'max_autotun'"),
        ([(0, "qcompile_nvfp4", "bf16")], "options of the phase at step 0 are no dictionary, got 'bf16'"),
        (["qcompile_nvfp4"], "takes phases such as"),
        (
            [(0, "qcompile_nvfp4"), (9, "qcompile_nvfp4", {"forward": "fp32"})],
            "at step 9: option 'forward': 'fp32' is not one of quantized, bf16",
        ),
    ],
)
def test_what_is_refused_at_once(phases: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qcompile.Schedule(phases)


def test_what_is_not_compiled() -> None:
    phases = qcompile.Schedule([(0, "inductor")])
    with pytest.raises(TypeError, match=r"takes modules as they were before torch.compile, got what torch.compile ret"):
        phases.compile(torch.compile(model()))
    with pytest.raises(TypeError, match="torch runs Sequential's own forward uncompiled; give a module that calls"):
        phases.compile(model().layers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got function"):
        phases.compile(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend= belongs to a phase"):
        phases.compile(model(), backend="inductor")
    with pytest.raises(ValueError, match=r"takes what state_dict\(\) returned, got \{'step': 3\}"):
        phases.load_state_dict({"step": 3})
