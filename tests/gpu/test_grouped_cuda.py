"""Products of groups on a CUDA card: run by hand (`pytest -n 4 tests/gpu/test_grouped_cuda.py`; kernels are compiled
most of the time), never in CI.

Sums of products of 4-bit codes are exact, so a group's product is the dense kernel's bit for bit. What would break:
rows of a neighbour in a group's result or sum, an expert without tokens whose gradient is not 0, NaN that spreads, a
tail that is left out, a graph that serves one partition only, a host that waits.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import run_and_get_code

pytest.importorskip("triton")

from qcompile.backends import compile_with
from qcompile.ir.ops import padded_rows
from qcompile.kernels import register
from qcompile.kernels.matmul import gluon, grouped
from qcompile.kernels.matmul import triton as gemm
from qcompile.kernels.quantize import reference as quantize
from qcompile.passes.pass_base import Observations
from qcompile.recipes import FP4

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = pytest.mark.skipif(not HOPPER, reason="needs a CUDA card with TMA and FP8")

BF16, FP32, E4M3, INT8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8
ops = torch.ops.qcompile
QUANTIZER, GRADIENT = "e2m1 row absmax even", "e4m3 row absmax even"

#: Empty groups at both ends and side by side, ones that begin at no multiple of anything, one of several tiles, and
#: rows that belong to none; a single group; 64 of them; none with rows.
SIZES = {
    "ragged": (0, 1, 15, 16, 0, 0, 17, 129, 2000, 3, 640, 0),
    "one": (1000,),
    "many": tuple((7 * i * i) % 131 for i in range(64)),
    "none": (0, 0),
}
BEYOND = 5


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [
        torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for size in (2**9, 2**14, 2**20, 2**23, 2**25)
    ]
    del blocks
    torch._dynamo.reset()


def ends(sizes) -> torch.Tensor:
    return torch.tensor(list(itertools.accumulate(sizes)), dtype=torch.int32, device="cuda")


def codes(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Random E2M1 levels, times two for INT8."""
    levels = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*levels, *(-level for level in levels[1:])], device="cuda")
    return (values[torch.randint(len(values), (rows, columns), device="cuda")] * (2 if dtype == INT8 else 1)).to(dtype)


def powers_of_two(*shape: int) -> torch.Tensor:
    return 2.0 ** torch.randint(-3, 3, shape, device="cuda").float()


def slices(sizes):
    return [slice(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]


# --- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_groups_of_rows_are_dense_products(sizes, dtype):
    """Bit for bit what the dense kernel computes of a group's rows and its own matrix; every config where groups are
    ragged.
    """
    groups, n, k, rows = len(sizes), 520, 272, sum(sizes) + BEYOND
    a, b = codes(rows, k, dtype), codes(groups * n, k, dtype).view(groups, n, k)
    scale_a, scale_b, bias = torch.rand(rows, 1).cuda(), torch.rand(groups, n, 1).cuda(), torch.randn(groups, n).cuda()
    configs = grouped.CONFIGS if sizes is SIZES["ragged"] and dtype == E4M3 else ()
    for config, shift, out in ((None, None, BF16), *((config, bias, widest(config)) for config in configs)):
        got = grouped.mm_8bit_grouped(a, b, ends(sizes), scale_a, scale_b, out, shift, config=config)
        for group, own in enumerate(slices(sizes)):
            if own.start == own.stop:
                continue
            of_group = None if shift is None else shift[group]
            expected = gemm.mm_8bit(a[own], b[group], scale_a[own], scale_b[group], out, of_group)
            assert torch.equal(got[own], expected), (group, str(config))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("n", [520, 512, 515], ids=["odd", "whole tiles", "pointers"])
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_groups_of_rows_in_gluon_are_dense_products(sizes, n, dtype):
    """Bit for bit the dense kernel's, whether a part of a tile leaves whole or by rows; rows beyond are not written."""
    groups, k, rows = len(sizes), 272, sum(sizes) + BEYOND
    a, b = codes(rows, k, dtype), codes(groups * n, k, dtype).view(groups, n, k)
    scale_a, scale_b, bias = torch.rand(rows, 1).cuda(), torch.rand(groups, n, 1).cuda(), torch.randn(groups, n).cuda()
    every = gluon.CONFIGS if sizes is SIZES["ragged"] and dtype == E4M3 else ()
    with_bias = [config for config in every if config.shared_memory(1) <= gluon.SHARED_MEMORY]
    plain, shifted = ((config, BF16, None) for config in (None, *every)), ((c, FP32, bias) for c in (None, *with_bias))
    for config, out, shift in (*plain, *shifted):
        got = gluon.mm_8bit_grouped(a, b, ends(sizes), scale_a, scale_b, out, shift, config=config)
        for group, own in enumerate(slices(sizes)):
            if own.start < own.stop:
                of_group = None if shift is None else shift[group]
                expected = gemm.mm_8bit(a[own], b[group], scale_a[own], scale_b[group], out, of_group)
                assert torch.equal(got[own], expected), (group, str(config))


def test_rows_beyond_the_last_group_stay_as_they_were():
    """Of results in Gluon, whose tiles leave whole where a group fills them: the next rows are nobody's."""
    sizes, n, k = (128, 70, 0), 512, 256
    a, b = codes(sum(sizes) + 200, k, E4M3), codes(len(sizes) * n, k, E4M3).view(len(sizes), n, k)
    one = torch.ones(1, 1, device="cuda")
    blocks = [torch.full((a.shape[0], n), float("nan"), dtype=BF16, device="cuda") for _ in range(4)]
    del blocks  # the allocator hands one of them out
    got = gluon.mm_8bit_grouped(a, b, ends(sizes), one, one, BF16)
    assert got[sum(sizes) :].isnan().all()
    assert not got[: sum(sizes)].isnan().any()


def widest(config: gemm.Config) -> torch.dtype:
    """The widest dtype of results for which a config has room."""
    card = gemm.card_of(torch.device("cuda", 0))
    return FP32 if gemm.fits(config, gemm.Problem(1, 1, 1, E4M3, E4M3, FP32, card)) else BF16


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_contractions_in_groups_are_exact(sizes):
    """Against float64; 0 without rows; scales of one side, and a single one of the other; every config where groups are
    ragged.
    """
    groups, n, k, rows = len(sizes), 264, 392, sum(sizes) + BEYOND
    offs, y, x = ends(sizes), codes(rows, n, E4M3), torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8).cuda()
    left = padded(y, offs)
    right, levels = ops.recode(x, QUANTIZER, k, True, offs), quantize.recode(x, QUANTIZER, k, False).double()
    scale, single = powers_of_two(groups, n, 1), torch.ones(1, 1, device="cuda")
    ragged = sizes is SIZES["ragged"]
    configs = [config for config in grouped.CONFIGS if ragged and not config.flatten]
    for config, swapped in ((None, False), *((None, True) for _ in range(ragged)), *((c, False) for c in configs)):
        operands = (right, left, offs, single, scale) if swapped else (left, right, offs, scale, single)
        out = FP32 if config is None else widest(config)
        got = grouped.mm_8bit_grouped(*operands, out, config=config)
        for group, own in enumerate(slices(sizes)):
            expected = (y[own].double().t() @ levels[own]) * scale[group].double()
            expected = (expected.t() if swapped else expected).to(out)
            assert torch.equal(got[group], expected), (group, str(config))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("n", "k"), [(264, 392), (512, 394), (256, 384)], ids=["odd", "pointers", "TMA stores"])
@pytest.mark.parametrize("dtype", [E4M3, INT8], ids=str)
def test_contractions_in_gluon_are_exact(sizes, n, k, dtype):
    """Against float64, in two dtypes; results that hang over their group and may not touch the next; 0 without rows."""
    groups, rows = len(sizes), sum(sizes) + BEYOND
    offs, y, x = ends(sizes), codes(rows, n, dtype), codes(rows, k, dtype)
    left, right = padded(y, offs), padded(x, offs)
    scale, single = powers_of_two(groups, n, 1), torch.ones(1, 1, device="cuda")
    configs = gluon.CONFIGS if sizes is SIZES["ragged"] and dtype == E4M3 else (None,)
    for config, out in itertools.product(configs, (BF16, FP32)):
        for swapped in (False, True):
            operands = (right, left, offs, single, scale) if swapped else (left, right, offs, scale, single)
            got = gluon.mm_8bit_grouped(*operands, out, config=config)
            for group, own in enumerate(slices(sizes)):
                expected = (y[own].double().t() @ x[own].double()) * scale[group].double()
                assert torch.equal(got[group], (expected.t() if swapped else expected).to(out)), (group, str(config))


def padded(codes: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Transposed, as kernels pad it, with NaN where no group has anything."""
    rows, width = codes.shape
    nothing = 127 if codes.dtype == INT8 else float("nan")
    out = torch.full((width, padded_rows(rows, len(offs))), nothing, device="cuda").to(codes.dtype)
    for own, place in quantize.group_slices(offs):
        out[:, place.start : place.start + -(-(place.stop - place.start) // 128) * 128] = 0
        out[:, place] = codes[own].t()
    return out


@pytest.mark.parametrize(
    ("sizes", "width"), [*((sizes, 520) for sizes in SIZES.values()), *((SIZES["ragged"], n) for n in (513, 20000))]
)
def test_quantizing_groups_is_the_reference(sizes, width):
    """Codes, scales and zeros bit for bit, by rows and by columns; rows too long for registers; NaN and infinity."""
    rows, offs = sum(sizes) + BEYOND, ends(sizes)
    inside = sum(sizes)
    x = torch.randn(rows, width, device="cuda").to(BF16)
    if inside:
        x[0, 3], x[inside - 1, 5] = float("nan"), float("inf")
    for axis, fold in ((1, torch.rand(len(sizes), width, 1).cuda()), (0, torch.rand(rows, 1).cuda())):
        got, expected = (f(x, GRADIENT, axis, offs, fold) for f in (ops.quantize_groups, quantize.quantize_groups))
        if axis:
            got, expected = ([part[:inside] for part in result] for result in (got, expected))
        else:
            last = max(-(-place.stop // 128) * 128 for _, place in quantize.group_slices(offs))
            got, expected = ((codes[:, :last], scales) for codes, scales in (got, expected))
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    folds = torch.rand(len(sizes), width, 1).cuda(), torch.rand(rows, 1).cuda()
    got, expected = (f(x, GRADIENT, offs, *folds) for f in (ops.quantize_groups_pair, quantize.quantize_groups_pair))
    last = max(-(-place.stop // 128) * 128 for _, place in quantize.group_slices(offs))
    assert torch.equal(got[0][:inside], expected[0][:inside])
    assert torch.equal(got[2][:, :last], expected[2][:, :last])
    for a, b in ((got[1][:inside], expected[1][:inside]), (got[3], expected[3])):
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


@pytest.mark.parametrize("quantizer", [QUANTIZER, "midrise4 row absmax half_up", "e4m3 row absmax even"])
def test_recoding_groups_and_batches_is_the_reference(quantizer):
    sizes, width = SIZES["ragged"], 264
    offs, per_byte = ends(sizes), 1 if "e4m3" in quantizer else 2
    stored = torch.randint(0, 127, (sum(sizes), width // per_byte), dtype=torch.uint8, device="cuda")
    got, expected = (f(stored, quantizer, width, True, offs) for f in (ops.recode, quantize.recode))
    last = max(-(-place.stop // 128) * 128 for _, place in quantize.group_slices(offs))
    assert torch.equal(got[:, :last].float(), expected[:, :last].float())
    batch = stored[:2790].view(3, 930, -1)
    for transposed in (False, True):
        got, expected = (f(batch, quantizer, width, transposed) for f in (ops.recode, quantize.recode))
        assert torch.equal(got.float(), expected.float())


def test_a_graph_serves_other_sizes():
    """One CUDA graph of all three products and what quantizes for them, replayed with other ends."""
    groups, rows, n, k = 8, 1024, 256, 512
    x, dy = (torch.randn(rows, width, device="cuda").to(BF16) for width in (k, n))
    w, offs = torch.randn(groups, n, k, device="cuda").to(BF16), ends([128] * groups)

    def products():
        (_, s_w, stored_w), (codes_x, s_x, stored_x) = (
            ops.quantize_8bit(t.view(-1, k), QUANTIZER, True) for t in (w, x)
        )
        codes_w, s_w = ops.recode(stored_w, QUANTIZER, k, False).view(groups, n, k), s_w.view(groups, n, 1)
        y = ops.mm_8bit_grouped(codes_x, codes_w, offs, s_x, s_w, BF16)
        rows_of_dy, s_rows, columns_of_dy, s_columns = ops.quantize_groups_pair(dy, GRADIENT, offs, s_w, s_x)
        one = torch.ones(1, 1, device="cuda")
        w_t = ops.recode(stored_w.view(groups, n, -1), QUANTIZER, k, True)
        dx = ops.mm_8bit_grouped(rows_of_dy.view(E4M3), w_t, offs, s_rows, one, BF16)
        x_t = ops.recode(stored_x, QUANTIZER, k, True, offs)
        return y, dx, ops.mm_8bit_grouped(columns_of_dy.view(E4M3), x_t, offs, s_columns, one, BF16)

    products()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = products()
    for sizes in ([0, 1, 15, 17, 129, 400, 462, 0], [1024, *[0] * 7], [128] * 8):
        offs.copy_(ends(sizes))
        graph.replay()
        replayed = [result.clone() for result in results]
        for got, expected in zip(replayed, products(), strict=True):
            assert torch.equal(got, expected)
        assert not replayed[2][[i for i, size in enumerate(sizes) if not size]].any()


# --- compiled -------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts with SwiGLU; weights as transformers keeps them, or transposed (gpt-oss)."""

    def __init__(self, experts: int, width: int, hidden: int, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        for name, n, k in (("up", 2 * hidden, width), ("down", width, hidden)):
            shape = (experts, k, n) if transposed else (experts, n, k)
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=BF16) / k**0.5))

    def product(self, x, weight, offs):
        return F.grouped_mm(x, weight if self.transposed else weight.transpose(-2, -1), offs=offs)

    def forward(self, x, offs):
        gate, up = self.product(x, self.up, offs).chunk(2, -1)
        return self.product(F.silu(gate) * up, self.down, offs)


#: Without outliers and slopes of the estimator, what is computed is a formula of a few lines.
OPTIONS = {"activation": {"outliers": None}, "weight": {"estimator": "ste"}, "backward": "fp8"}


def one_product(transposed: bool = False, **options):
    """Results of one compiled product, and of a loop over experts in float64 by the formulas, on the same codes."""
    torch.manual_seed(0)
    sizes = (0, 1, 15, 17, 129, 300, 0, 562)
    with torch.device("cuda"):
        experts, x = Experts(8, 256, 384, transposed), torch.randn(1024, 256, dtype=BF16, requires_grad=True)
        dy = torch.randn(1024, 768, dtype=BF16)
    run = torch.compile(
        lambda x, w, offs: experts.product(x, w, offs), backend="qcompile_fp4", options=OPTIONS | options
    )
    y = run(x, experts.up, ends(sizes))
    got = [y, *torch.autograd.grad(y, (x, experts.up), dy)]
    w = experts.up.mT if transposed else experts.up
    expected = [torch.zeros_like(y, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float64), []]
    for group, own in enumerate(slices(sizes)):
        (x_levels, s_x), (w_levels, s_w) = levels(x[own], QUANTIZER), levels(w[group], QUANTIZER)
        expected[0][own] = (x_levels @ w_levels.T) * s_x * s_w.T
        codes, scale = levels(dy[own].float() * s_w.T.float(), GRADIENT)
        expected[1][own] = codes @ w_levels * scale
        codes, scale = levels((dy[own].float() * s_x.float()).T, GRADIENT)
        expected[2].append(codes @ x_levels * scale)
    expected[2] = torch.stack(expected[2])
    return got, [*expected[:2], expected[2].mT if transposed else expected[2]]


def levels(x, quantizer):
    if not x.numel():
        return x.double(), x.new_ones((*x.shape[:-1], 1)).double()
    codes, scales, _ = quantize.quantize_8bit(x, quantizer, False)
    return codes.double(), scales.double()


@pytest.mark.parametrize("transposed", [False, True])
def test_compiled_products_are_the_formulas(transposed):
    """Codes are exact; the tensor cores' accumulator rounds sums of FP8 gradients at 2^-13, and bfloat16 at 2^-9."""
    for name, got, expected in zip(("y", "dx", "dw"), *one_product(transposed), strict=True):
        assert not got.isnan().any()
        assert ((got.double() - expected).norm() / expected.norm()).item() < 4e-3, name
    assert not got[[0, 6]].any()


class Held(nn.Module):
    """A function of an input and a parameter, which is what tells a weight from an activation in ``bmm``."""

    def __init__(self, function, *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(shape, dtype=BF16))

    def forward(self, x):
        return self.function(x, self.weight)


def test_batched_experts_are_the_same_products():
    """`bmm` of as many tokens for each expert, to the bit what grouped experts get."""
    offs, results = ends([256] * 4), []
    for function in (torch.bmm, lambda x, w: F.grouped_mm(x.flatten(0, 1), w, offs=offs).view(4, 256, 384)):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model, x = Held(function, 4, 256, 384), torch.randn(4, 256, 256, dtype=BF16, requires_grad=True)
            dy = torch.randn(4, 256, 384, dtype=BF16)
        y = torch.compile(model, backend="qcompile_fp4", options=OPTIONS)(x)
        results.append([y, *torch.autograd.grad(y, (x, model.weight), dy)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_compiled_experts_replay_with_other_sizes_and_never_wait():
    """One compilation and one set of CUDA graphs for all partitions; nothing waits for the host."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        experts, x = Experts(8, 256, 384), torch.randn(1024, 256, dtype=BF16)
    eager = torch.compile(copy.deepcopy(experts), backend="qcompile_fp4", options=OPTIONS)
    graphed = torch.compile(experts, backend="qcompile_fp4", options=OPTIONS | {"triton.cudagraphs": True})

    def step(run, offs):
        torch.compiler.cudagraph_mark_step_begin()
        leaf = x.clone().requires_grad_()
        y = run(leaf, offs)
        grads = torch.autograd.grad(y.float().square().sum(), (leaf, *run.parameters()))
        return [t.detach().clone() for t in (y, *grads)]

    partitions = [[128] * 8, [0, 1, 15, 17, 129, 400, 462, 0], [1024, *[0] * 7], [3, 1000, 0, 0, 0, 0, 20, 1]]
    for sizes in partitions[:2]:
        for run in (eager, graphed):
            for _ in range(3):
                step(run, ends(sizes))
    given = [ends(sizes) for sizes in partitions]
    torch._dynamo.utils.counters.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [(step(eager, offs), step(graphed, offs)) for offs in given]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch._dynamo.utils.counters["stats"].get("unique_graphs")
    for one, other in results:
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


def test_nan_stays_in_its_expert():
    """A token with NaN spoils its own results and its expert's gradient alone."""
    torch.manual_seed(0)
    sizes = (100, 0, 28, 300, 84)
    with torch.device("cuda"):
        experts, x = Experts(5, 256, 384), torch.randn(512, 256, dtype=BF16)
    x[110, 7] = float("nan")
    x.requires_grad_()
    y = torch.compile(experts, backend="qcompile_fp4", options=OPTIONS)(x, ends(sizes))
    dx, *dw = torch.autograd.grad(y.float().sum(), (x, *experts.parameters()))
    for result in (y, dx):
        assert result.isnan().any(1).nonzero().flatten().tolist() == [110]
    for gradient in dw:
        assert gradient.isnan().flatten(1).any(1).tolist() == [False, False, True, False, False]


def what_happened(step, options) -> str:
    """Where products of groups went: breaks of graphs, what the passes decided and why, what generated code calls."""
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    seen = []

    def observing(gm, inputs, **_):
        seen.append(Observations())
        return compile_with(FP4, gm, inputs, options=options, observe=seen[-1])

    compile_as = torch.compile
    with pytest.MonkeyPatch.context() as patch, torch._inductor.config.patch(force_disable_caches=True):
        patch.setattr(torch, "compile", lambda f, backend, options: compile_as(f, backend=observing))
        _, code = run_and_get_code(step, options)
    text = "\n".join(code)
    rows = [(row["role"], row["provider"], row["reason"]) for observed in seen for row in observed.gemms]
    plans = [
        (decision.site.name, decision.site.op, decision.quantized, decision.reason)
        for observed in seen
        if observed.plan
        for decision in observed.plan.decisions
    ]
    names = ("qcompile_kernels['mm_8bit_grouped']", "qcompile.mm_8bit_grouped", "_grouped_mm", "grouped_mm_fallback")
    called = {name: text.count(name) for name in names}
    return "\n".join(map(str, (f"breaks: {breaks}", f"{len(seen)} graphs", called, *rows, *plans)))


@pytest.mark.parametrize(("kind", "dtype"), [("Mixtral", BF16), ("Qwen3Moe", FP32), ("Qwen3Moe", BF16)], ids=str)
def test_models_of_transformers_train(kind, dtype, monkeypatch):
    """Tiny models as they come, in float32 under autocast: all grouped products on tensor cores, gradients close to
    those of an exact backward.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    experts = {"num_local_experts": 8} if kind == "Mixtral" else {"num_experts": 8, "moe_intermediate_size": 128}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=256, hidden_size=256, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=128, use_cache=False, head_dim=64,
        **experts,
    )  # fmt: skip
    with torch.device("cuda"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
        ids = torch.randint(256, (4, 128))
    model.set_experts_implementation("grouped_mm")
    calls, kernel = [], register.DIRECT["mm_8bit_grouped"]
    monkeypatch.setitem(register.DIRECT, "mm_8bit_grouped", lambda *given: calls.append(given) or kernel(*given))
    gradients = {}

    def step(options):
        run = torch.compile(model.forward, backend="qcompile_fp4", options=options)
        model.zero_grad()
        with torch.autocast("cuda", BF16, enabled=dtype == FP32):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    for backward, products in (("bf16", 2), ("fp8", 6)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        calls.clear()
        loss = step(OPTIONS | {"backward": backward})
        if len(calls) != products:
            pytest.fail(f"{len(calls)} calls, not {products}\n{what_happened(step, OPTIONS | {'backward': backward})}")
        assert loss.isfinite()
        gradients[backward] = {name: p.grad.float().flatten() for name, p in model.named_parameters()}
    for name, exact in gradients["bf16"].items():
        assert torch.cosine_similarity(gradients["fp8"][name], exact, 0) > 0.97, name
