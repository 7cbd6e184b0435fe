"""The backend on a CUDA card: run by hand (`pytest tests/gpu`), never in CI.

What would break: generated Triton that disagrees with the plain-torch reference, CUDA graphs that replay stale data,
options that only work on CPUs.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile.kernels  # noqa: F401  (registers the ops)
from qcompile.recipes import FP4

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

fake_quantize = torch.ops.qcompile.fake_quantize


class Mlp(nn.Module):
    """Odd token counts, odd widths, a nonlinearity to fuse the second quantize into."""

    def __init__(self, width: int = 96, hidden: int = 250) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))

    def reference(self, x):
        activation, weight = str(FP4.activation), str(FP4.weight)
        h = F.linear(fake_quantize(x, activation, -1), fake_quantize(self.up.weight, weight, -1), self.up.bias)
        return F.linear(fake_quantize(F.gelu(h), activation, -1), fake_quantize(self.down.weight, weight, -1))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Every test compiles the same forward: without this, one's graphs are another's recompilation."""
    torch._dynamo.reset()


#: What the reference does too; a card would quantize dY.
WIDE_GRADIENTS = {"backward": "bf16"}


def build(dtype=torch.float32):
    torch.manual_seed(0)
    return Mlp().to("cuda", dtype), torch.randn(37, 96, device="cuda", dtype=dtype)


def gradients(model, function, x):
    model.zero_grad()
    out = function(x)
    out.float().square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def relative(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("mode", [None, "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_float32_equals_the_eager_reference(mode):
    """Float32 leaves only accumulation order, and codes next to a tie that gelu's last bit moves."""
    model, x = build()
    expected = gradients(model, model.reference, x)
    options = WIDE_GRADIENTS | ({"mode": mode} if mode else {})
    compiled = torch.compile(model, backend="qcompile_fp4", options=options, fullgraph=True)
    for _ in range(3):  # CUDA graphs warm up, record, replay
        actual = [t.clone() for t in gradients(model, compiled, x)]
    assert max(relative(a, e) for a, e in zip(actual, expected, strict=True)) < 2e-3


def test_a_compiled_model_moves_to_the_card_and_back():
    """One graph a device: what was compiled for the CPU neither runs on the card nor is compiled again on return."""
    model, x = build()
    compiled = torch.compile(model.cpu(), backend="qcompile_fp4", options=WIDE_GRADIENTS, fullgraph=True)
    first = gradients(model, compiled, x.cpu())
    model.cuda()
    there = gradients(model, compiled, x)
    assert all(t.is_cuda for t in there)
    assert max(relative(a, e) for a, e in zip(there, gradients(model, model.reference, x), strict=True)) < 2e-3
    model.cpu()
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = gradients(model, compiled, x.cpu())
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_bfloat16_stays_within_rounding_of_the_eager_reference():
    """Inductor keeps gelu in float32 where eager rounds to bfloat16, so a few codes differ; most must not."""
    model, x = build(torch.bfloat16)
    expected = gradients(model, model.reference, x)
    actual = gradients(model, torch.compile(model, backend="qcompile_fp4", options=WIDE_GRADIENTS), x)
    assert max(relative(a, e) for a, e in zip(actual, expected, strict=True)) < 0.06


def test_first_layer_is_exact_because_nothing_rounds_before_it():
    """Codes and scales of a graph input are bitwise; a single product then differs by accumulation order only."""
    torch.manual_seed(0)
    layer = nn.Linear(250, 96).cuda()
    x = torch.randn(37, 250, device="cuda")
    expected = F.linear(
        fake_quantize(x, str(FP4.activation), -1),
        fake_quantize(layer.weight, str(FP4.weight), -1),
        layer.bias,
    )
    torch.testing.assert_close(torch.compile(layer, backend="qcompile_fp4")(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "fp8"},
        {"gradient": "e4m3 row"},
        {"gradient": "e2m1 block16 e4m3 stochastic"},
        {"save": "8bit"},
        {"save": "4bit"},
        {"saved_weights": "codes"},
        {"weight": {"format": "midrise4", "rounding": "half_up", "estimator": "trust"}},
        {"activation": {"outliers": "occ(per=tensor)"}},
        {
            "activation": {"granularity": "block32", "scale": "e8m0"},
            "weight": {"granularity": "block32", "scale": "e8m0"},
        },
        {"activation": {"granularity": "block16", "scale": "e4m3"}},
    ],
    ids=str,
)
def test_options_train(options):
    """Twenty steps on a fixed regression: the loss falls and stays finite under every option."""
    model, x = build(torch.bfloat16)
    target = torch.randn_like(x)
    compiled = torch.compile(model, backend="qcompile_fp4", options={"debug": True, **options})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(compiled(x).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_stochastic_gradients_differ_between_cuda_graph_replays():
    """A seed baked into a recorded graph would repeat the same rounding for ever."""
    model, x = build()
    options = {"gradient": "e2m1 row absmax stochastic", "mode": "reduce-overhead"}
    compiled = torch.compile(model, backend="qcompile_fp4", options=options)
    grads = [gradients(model, compiled, x)[1].clone() for _ in range(6)]
    assert not torch.equal(grads[-1], grads[-2])


def test_dynamic_lengths_do_not_recompile():
    model, _ = build()
    compiled = torch.compile(model, backend="qcompile_fp4", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (33, 57, 121):
            x = torch.randn(tokens, 96, device="cuda")
            assert relative(compiled(x), model.reference(x)) < 2e-3


def test_off_switch_is_bitwise_inductor():
    model, x = build(torch.bfloat16)
    expected = gradients(model, torch.compile(model, backend="inductor"), x)
    torch._dynamo.reset()
    actual = gradients(model, torch.compile(model, backend="qcompile_fp4", options={"enabled": False}), x)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
