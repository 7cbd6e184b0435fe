"""Which activations are computed where they are quantized, and that nothing changes with it.

Everything runs on the CPU under a claim of tensor cores, so the fused op is its plain-torch reference, which rounds
where eager torch does: results with and without the pass have the same bits. Generated and Triton code is compared in
tests/kernels/test_triton_codegen.py and tests/gpu/test_triton_quantize.py.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcompile import compat
from qcompile.kernels.matmul.costs import Rates
from qcompile.kernels.producer import Producer
from qcompile.passes.fuse_producers import saved_microseconds
from qcompile.recipes import FP4

from .harness import Result, compile_and_run, compiler
from .test_grouped import Experts, ends

RECIPE = FP4.override({"min_side": 0, "defaults": False})
ASKED = RECIPE.override({"enable_passes": ["fuse_producers"]})
SWIGLU = "round(a); neg(%0); exp(%1); add(%2, 1.0); div(%0, %3); round(%4) bfloat16; mul(%5, b) bfloat16"
GELU = "round(a); mul(%0, 0.5); mul(%0, 0.7071067811865476); erf(%2); add(%3, 1.0); mul(%1, %4); round(%5) bfloat16"


@pytest.fixture(autouse=True)
def _tensor_cores():
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        yield


class Gated(nn.Module):
    """Two products, an ``activate(gate, up, self)`` or several, and the product that reads each."""

    def __init__(self, *activations, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.activations = activations
        self.gate, self.up = nn.Linear(34, 251), nn.Linear(34, 251, bias=False)
        self.down = nn.ModuleList(nn.Linear(251, 34) for _ in activations)
        self.factor, self.number = nn.Parameter(torch.rand(251)), nn.Parameter(torch.rand(()))
        self.to(dtype)

    def forward(self, x):
        gate, up = self.gate(x), self.up(x)
        pairs = zip(self.down, self.activations, strict=True)
        return torch.stack([down(activate(gate, up, self)) for down, activate in pairs])


def swiglu(gate, up, model):
    return F.silu(gate) * up


def fused(result) -> list[str]:
    """The producers of the graphs' fused calls."""
    programs = [
        text for o in result.observations for name, text in o.programs.items() if name.startswith("post_grad_fuse")
    ]
    lines = [line for text in programs for line in text.splitlines() if "qcompile.quantize_produced.default(" in line]
    return [line.split("'")[1] for line in lines]


def run(*activations, dtype=torch.bfloat16, under=torch.no_grad, **options):
    """Without gradients unless asked for: that is one graph instead of two."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 34, dtype=dtype)
    options = {"enable_passes": ["fuse_producers"], **options}
    return compile_and_run(Gated(*activations, dtype=dtype), x, recipe=RECIPE, under=under, **options)


COMPUTED = {
    SWIGLU.replace("mul(%5, b)", "mul(b, %5)"): lambda gate, up, model: up * F.silu(gate),
    GELU: lambda gate, up, model: F.gelu(gate),
    "div(a, 3.0) bfloat16; mul(b, %0) bfloat16": lambda gate, up, model: model.factor * (gate / 3),
    "mul(a, b) bfloat16": lambda gate, up, model: gate * model.number,
    "round(a); sub(%0, b); round(%1) bfloat16": lambda gate, up, model: (gate.float() - up).bfloat16(),
}


def test_what_is_computed_where_it_is_quantized():
    """With weights, numbers and casts, in any order."""
    on, off = (run(*COMPUTED.values(), enable_passes=names) for names in (["fuse_producers"], []))
    assert fused(on) == list(COMPUTED)
    assert not fused(off)
    assert torch.equal(on.outputs, off.outputs)


def test_gradients():
    """What the backward computes again is what the kernel quantized."""
    on, off = (run(swiglu, under=contextlib.nullcontext, enable_passes=names) for names in (["fuse_producers"], []))
    assert fused(on) == [SWIGLU]
    assert torch.equal(on.outputs, off.outputs)
    for name in ("gate.weight", "up.weight", "down.0.weight"):
        assert torch.equal(on.gradients[name], off.gradients[name]), name
    # And the report says what runs.
    reasons = [encoder.reason for o in on.observations for found in o.encoders.values() for encoder in found]
    assert any(reason.endswith("with its neg, exp, add, div, mul") for reason in reasons)


class Halves(nn.Module):
    """Gate and up as parts of one product, ``[..., 2 * 251]``."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.parts = parts
        self.both, self.down = nn.Linear(34, 502), nn.Linear(251, 34)

    def forward(self, x):
        gate, up = self.parts(self.both(x))
        return self.down(F.silu(gate) * up)


HALVES = {
    "chunk": lambda both: both.chunk(2, -1),
    "split, up first": lambda both: both.split(251, -1)[::-1],
    "slices": lambda both: (both[..., :251], both[..., 251:]),
    "an axis of two": lambda both: both.unflatten(-1, (2, 251)).unbind(-2),
}


@pytest.mark.parametrize("parts", HALVES.values(), ids=HALVES)
def test_halves_of_one_product(parts):
    """They are read where they are, rows of twice the width; the same bits as without the pass, gradients too."""
    x, results = torch.randn(2, 7, 34, dtype=torch.bfloat16), []
    for names in (["fuse_producers"], []):
        torch.manual_seed(0)
        results.append(compile_and_run(Halves(parts).bfloat16(), x, recipe=RECIPE, enable_passes=names))
    on, off = results
    assert fused(on) == [SWIGLU]
    assert not fused(off)
    assert torch.equal(on.outputs, off.outputs)
    assert all(torch.equal(gradient, off.gradients[name]) for name, gradient in on.gradients.items())


def test_elements_that_lie_apart_are_left_to_inductor():
    """Of interleaved gates a kernel would use half of what it reads."""
    result = compile_and_run(
        Halves(lambda both: (both[..., ::2], both[..., 1::2])).bfloat16(),
        torch.randn(7, 34, dtype=torch.bfloat16),
        recipe=ASKED,
        under=torch.no_grad,
    )
    assert len(result.quantized) == 2
    assert not fused(result)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_compute_swiglu_where_it_is_quantized(transposed):
    """Groups of any size, rows that belong to none, and a token with NaN, which spoils what it does without the pass."""
    sizes, results = (17, 0, 1, 30, 0), []
    x = torch.randn(56, 32, dtype=torch.bfloat16)  # eight rows more than groups have
    x[20, 3] = torch.nan
    for names in (["fuse_producers"], []):
        model = Experts(len(sizes), 32, 256, transposed)
        options = {"backward": "fp8", "enable_passes": names}
        results.append(compile_and_run(model, x.requires_grad_(), ends(*sizes), recipe=RECIPE, **options))
    on, off = results
    assert fused(on) == [SWIGLU]
    assert not fused(off)
    rows = sum(sizes)
    assert on.outputs[:rows].isnan().any(1).nonzero().flatten().tolist() == [20]
    assert same(on.outputs[:rows], off.outputs[:rows])
    assert on.gradients["up"].isnan().flatten(1).any(1).tolist() == [False, False, False, True, False]
    assert not on.gradients["down"][[1, 4]].any()
    for name in ("up", "down"):
        assert same(on.gradients[name], off.gradients[name]), name
    reasons = [encoder.reason for o in on.observations for found in o.encoders.values() for encoder in found]
    assert any(reason.endswith("with its neg, exp, add, div, mul") for reason in reasons)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


LEFT_ALONE = {
    "a sum behind a product, which Inductor contracts": lambda gate, up, m: torch.sigmoid(gate) * m.factor - 0.25,
    "another such sum": lambda gate, up, m: F.gelu(gate, approximate="tanh"),
    "an operation that is not printed": lambda gate, up, m: (gate * up).tanh(),
    "five inputs": lambda gate, up, m: gate * up * m.factor * m.number * m.gate.bias,
    "a condition": lambda gate, up, m: torch.where(gate > 0, gate, up),
}


def test_what_is_left_to_inductor():
    result = run(*LEFT_ALONE.values())
    assert len(result.quantized) == 2 + len(LEFT_ALONE)
    assert not fused(result)


@pytest.mark.parametrize("options", [{"activation": "e2m1 row absmax even"}, {"dtype": torch.float32}])
def test_other_activations(options):
    """Without outliers the quantizer fuses with Inductor's loops; float32 rows take twice the memory."""
    assert not fused(run(swiglu, **options))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(251), nn.Linear(251, 34)

    def forward(self, x):
        return self.linear(self.norm(x + x.tanh()))


def test_what_others_read_is_left_to_inductor():
    """It would be computed, and its inputs read, twice."""

    class Returned(Gated):
        def forward(self, x):
            activation = F.silu(self.gate(x)) * self.up(x)
            return self.down[0](activation), activation

    x = torch.randn(3, 34, dtype=torch.bfloat16)
    result = compile_and_run(Returned(swiglu), x, recipe=ASKED, under=torch.no_grad)
    assert len(result.quantized) == 3
    assert not fused(result)


def test_what_inductor_keeps_in_float32_is_left_to_it():
    """The sum in front of a norm is rounded in memory, and not in the kernel that goes on with it."""
    x = torch.randn(3, 251, dtype=torch.bfloat16)
    result = compile_and_run(Residual().bfloat16(), x, recipe=ASKED, under=torch.no_grad)
    assert result.quantized
    assert not fused(result)


@pytest.mark.parametrize("name", ["emulate_precision_casts", "use_fast_math"])
def test_other_arithmetic_of_inductor(name):
    """What Inductor is asked to print otherwise, it prints alone."""
    with mock.patch.object(torch._inductor.config, name, True):
        assert not fused(run(swiglu))


def test_off_the_tensor_cores():
    with mock.patch.object(compat, "tensor_core_capability", return_value=None):
        assert not fused(run(swiglu))


def test_a_dynamic_batch():
    """Rows are counted when it runs; no size makes it compile again."""
    model = Gated(swiglu)
    compiled, observations = compiler(model, ASKED, dynamic=True)
    with torch.no_grad():
        shapes = [compiled(torch.randn(n, 7, 34, dtype=torch.bfloat16)).shape for n in (2, 5)]
    assert shapes == [(1, 2, 7, 34), (1, 5, 7, 34)]
    assert len(observations) == 1
    assert fused(Result(None, {}, observations)) == [SWIGLU]


def test_what_takes_longer_than_memory_is_left_alone():
    """Two bytes written and read per element, against instructions: SwiGLU wins at any size, GELU only where launches
    are what counts.
    """
    rates = Rates("a card")
    swiglu, gelu = Producer.parse(SWIGLU), Producer.parse(GELU)
    assert saved_microseconds(swiglu, 16384 * 14336, rates) > 0
    assert saved_microseconds(gelu, 16384 * 14336, rates) < 0 < saved_microseconds(gelu, 1024 * 1024, rates)
