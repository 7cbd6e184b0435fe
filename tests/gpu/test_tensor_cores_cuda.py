"""Training on 8-bit tensor cores on a CUDA card: run by hand (`pytest tests/gpu`), never in CI.

What would break: a product on codes that is not the product of the decoded operands, gradients of a mode that are off
by more than its rounding, a kernel left out of a CUDA graph, a shape that only the slow path takes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qcompile
from qcompile.recipes import FP4

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a CUDA card with FP8")

OUTLIERS = {"off": None, "e4m3": "occ(alpha=0.99,residual=e4m3)", "exact": "occ(alpha=0.99)"}


class Block(nn.Module):
    """A norm and a SwiGLU: an input shared by two layers, a producer to fuse each quantization with, one bias."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, dtype=dtype)
        self.gate = nn.Linear(width, hidden, bias=False, dtype=dtype)
        self.up = nn.Linear(width, hidden, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, dtype=dtype)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def build(width=256, hidden=640, tokens=(4, 96), dtype=torch.bfloat16):
    torch.manual_seed(0)
    with torch.device("cuda"):
        return Block(width, hidden, dtype), torch.randn(*tokens, width, dtype=dtype, requires_grad=True)


def compiled(model, outliers, **options):
    mode = options.pop("mode", None)
    options = {"activation": {"outliers": OUTLIERS[outliers]}, "debug": True, **options}
    return torch.compile(model, backend="qcompile_fp4", options=options | ({"mode": mode} if mode else {}))


def step(model, function, x):
    """Output, gradient of x, gradients of the parameters."""
    model.zero_grad()
    x.grad = None
    out = function(x)
    (out.float() * torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [t.detach().double().cpu() for t in (out, x.grad, *(p.grad for p in model.parameters()))]


def errors(actual, expected):
    return [((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True)]


def linear_step(layer, function, x, cotangent):
    """Output and gradients of a layer whose input nothing rounds: codes are the same however it is compiled."""
    y = function(x)
    return [t.detach().double().cpu() for t in (y, *torch.autograd.grad(y, (x, *layer.parameters()), cotangent))]


#: Two roundings of decoded operands to 2^-9, which products of codes are spared, and one of the result.
BFLOAT16_ROUNDINGS = 6e-3


@pytest.mark.parametrize("outliers", OUTLIERS)
@pytest.mark.parametrize(("width", "hidden", "tokens"), [(256, 640, (4, 96)), (272, 1040, (3, 37)), (250, 514, (5, 7))])
@pytest.mark.parametrize("mode", ["bf16", "fp8"])
def test_codes_multiply_as_decoded_operands_do(mode, width, hidden, tokens, outliers):
    """`lower` off decodes every operand."""
    torch.manual_seed(0)
    layer = nn.Linear(width, hidden, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(*tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn(*tokens, hidden, device="cuda", dtype=torch.bfloat16)
    on_codes = linear_step(layer, compiled(layer, outliers, backward=mode), x, cotangent)
    torch._dynamo.reset()
    decoded = compiled(layer, outliers, backward=mode, disable_passes=["lower", "merge_quantize"])
    assert max(errors(on_codes, linear_step(layer, decoded, x, cotangent))) < BFLOAT16_ROUNDINGS


@pytest.mark.parametrize("outliers", ["off", "e4m3"])
def test_error_of_each_mode_against_float64(outliers):
    """Rounding dY to E4M3 has an error of 2.6 % rms, which a sum of products keeps; a mode that leaves dY has none.

    What remains then are the roundings of results, and of decoded operands where those are multiplied, to bfloat16.
    """
    torch.manual_seed(0)
    layer = nn.Linear(512, 768, bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    cotangent = torch.randn(1024, 768, device="cuda", dtype=torch.bfloat16)
    recipe = FP4.override({"activation": {"outliers": OUTLIERS[outliers]}})
    fake_quantize = torch.ops.qcompile.fake_quantize
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, layer.weight))
    y64 = F.linear(fake_quantize(x64, str(recipe.activation), -1), fake_quantize(w64, str(recipe.weight), -1))
    expected = [y64, *torch.autograd.grad(y64, (x64, w64), cotangent.double())]
    for mode, (dx_limit, dw_limit) in {"bf16": (6e-3, 6e-3), "dgrad_fp8": (0.03, 6e-3), "fp8": (0.03, 0.03)}.items():
        torch._dynamo.reset()
        y = compiled(layer, outliers, backward=mode)(x)
        dx, dw = torch.autograd.grad(y, (x, layer.weight), cotangent)
        y_error, dx_error, dw_error = errors([y.double(), dx.double(), dw.double()], expected)
        assert y_error < 6e-3, (mode, y_error)
        assert dx_error < dx_limit, (mode, dx_error)
        assert dw_error < dw_limit, (mode, dw_error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_dtype(dtype):
    """Outputs that cuBLASLt does not write go through the Triton product."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 640, device="cuda", dtype=dtype)
    x = torch.randn(96, 256, device="cuda", dtype=dtype, requires_grad=True)
    cotangent = torch.randn(96, 640, device="cuda", dtype=dtype)
    on_codes = linear_step(layer, compiled(layer, "off", backward="fp8"), x, cotangent)
    torch._dynamo.reset()
    decoded = compiled(layer, "off", backward="fp8", disable_passes=["lower", "merge_quantize"])
    assert max(errors(on_codes, linear_step(layer, decoded, x, cotangent))) < BFLOAT16_ROUNDINGS


def test_autocast():
    """The cast of a weight is in front of what quantizes it, in every layout."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 640, bias=False, device="cuda")
    x = torch.randn(96, 256, device="cuda", requires_grad=True)
    cotangent = torch.randn(96, 640, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        on_codes = linear_step(layer, compiled(layer, "e4m3", backward="fp8"), x, cotangent)
        torch._dynamo.reset()
        decoded = compiled(layer, "e4m3", backward="fp8", disable_passes=["lower", "merge_quantize"])
        assert max(errors(on_codes, linear_step(layer, decoded, x, cotangent))) < BFLOAT16_ROUNDINGS


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"])
@pytest.mark.parametrize("outliers", ["off", "e4m3"])
def test_modes_of_torch_compile(mode, outliers):
    """Replays see new data: each call gets another input."""
    model, x = build(512, 1536, (8, 128))
    plain, fast = compiled(model, outliers, backward="fp8"), compiled(model, outliers, backward="fp8", mode=mode)
    for scale in (1.0, 2.0, 0.5, 3.0):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * scale)
        actual, expected = step(model, fast, x), step(model, plain, x)
        assert max(errors(actual, expected)) < 0.03


def test_dynamic_lengths():
    """Tokens are wgrad's contraction, so its kernel is chosen at run time; no recompilation."""
    model, _ = build()
    run = torch.compile(model, backend="qcompile_fp4", dynamic=True, options={"backward": "fp8"})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (96, 33, 160):
            x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            assert all(t.isfinite().all() for t in step(model, run, x))


def test_an_infinity_or_nan_spoils_its_own_row_only_and_does_not_vanish():
    model, x = build()
    run = compiled(model, "e4m3", backward="fp8")
    clean = run(x).detach()
    for bad in (float("nan"), float("inf")):
        spoiled = x.detach().clone()
        spoiled[1, 5, 7] = bad
        out = run(spoiled.requires_grad_())  # the graph of the clean run: another one may round elsewhere
        assert not out[1, 5].isfinite().all()
        others = torch.ones(4, 96, dtype=torch.bool, device="cuda")
        others[1, 5] = False
        assert torch.equal(out[others], clean[others])


def test_the_report_names_the_kernels():
    model, x = build()
    report = qcompile.explain(model, x, options={"backward": "fp8", "activation": {"outliers": None}})
    rows = [row for row in report.rows if row.decision == "quantized"]
    assert len(rows) == 9
    assert {row.provider.split("; ")[-1] for row in rows} == {"cublaslt"}
    torch._dynamo.reset()  # another shape of the same code would be compiled for any shape
    odd, x = build(250, 514, (5, 7))
    report = qcompile.explain(odd, x, options={"backward": "fp8", "activation": {"outliers": None}})
    assert all("triton" in row.provider and "multiple of 16" in row.reason for row in report.rows)


def test_training_reaches_a_lower_loss_in_every_mode():
    for mode in ("bf16", "dgrad_fp8", "fp8"):
        torch._dynamo.reset()
        model, x = build()
        target = torch.randn_like(x)
        run = torch.compile(model, backend="qcompile_fp4", options={"backward": mode})
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        losses = []
        for _ in range(30):
            loss = F.mse_loss(run(x).float(), target.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], mode
