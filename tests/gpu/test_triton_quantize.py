"""The Triton quantize kernels on a GPU, equal to the plain-torch references there bit for bit: run by hand.

Memory that the caching allocator hands out holds NaN, so an element that a kernel does not write, or one that it reads
past the end of a row, shows. What only a GPU runs: conversions to FP8, inline PTX (the look-up of stored codes, the
comparison of two elements at once), reductions over several warps, and everything that depends on what memory is
aligned to.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytest.importorskip("triton")

from qcompile.ir.formats import FORMATS  # noqa: E402
from qcompile.ir.ops import clamped_counts  # noqa: E402
from qcompile.ir.outliers import OutlierClamp  # noqa: E402
from qcompile.ir.quantizer import Quantizer  # noqa: E402
from qcompile.kernels.outliers import reference as outliers_reference  # noqa: E402
from qcompile.kernels.outliers import triton as outliers  # noqa: E402
from qcompile.kernels.quantize import reference  # noqa: E402
from qcompile.kernels.quantize import triton as kernels  # noqa: E402

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E2M1, E4M3 = "e2m1 row absmax even", "e4m3 row absmax even"
#: Formats with codes for tensor cores whose grid the kernels print.
NAMES = [
    name
    for name, fmt in FORMATS.items()
    if fmt.tensor_core_type and not fmt.pruned and kernels.supports_recode((), f"{name} row absmax even")[0]
]
#: Rows of less than a run, of a warp, of several; of no whole run; as long as registers hold, and longer.
SHAPES = [(1, 1), (37, 129), (130, 34), (5, 4099), (300, 2048), (64, 4096), (9, 14336), (7, 16384), (3, 20000)]


def compensated(module, x, operand, axis):
    """Codes, scales and bounds; the bounds of a row that is not finite are any."""
    codes, scales, bounds = module.quantize_compensated(x, operand, axis)
    return codes, scales, bounds.where(scales.isfinite(), 0.0)


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """Blocks the caching allocator will hand out again, filled with NaN (0xFF bytes)."""
    blocks = [torch.full((2**n,), 0xFF, dtype=torch.uint8, device="cuda") for n in (9, 14, 18, 20, 22, 23, 25)]
    del blocks


def rows_of_everything(rows: int, columns: int, text: str, dtype: torch.dtype = FP32) -> torch.Tensor:
    """Rows with ties, saturation, −0, tiny and huge scales, zeros only, NaN and infinity, as far as there are rows."""
    fmt = Quantizer.parse(text).format
    x = torch.randn(rows, columns, device="cuda") * torch.logspace(-6, 6, rows, device="cuda")[:, None]
    ties = torch.tensor([*fmt.thresholds, *fmt.magnitudes, -0.0], device="cuda")[: columns - 1]
    for row, factor in enumerate((1.0, -1.0, -(2.0**60))[:rows]):
        x[row] = 0.0
        x[row, : len(ties)] = ties * factor
        x[row, -1] = fmt.max * factor
    if rows > 9:
        x[3], x[5] = 0.0, 3e38
        x[4] *= 1e-38
        x[6, 1], x[6, 2] = float("nan"), float("inf")
        x[7, 1], x[7, 2] = float("inf"), -float("inf")
    return x.to(dtype)


def rows_with_outliers(rows: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose order statistics are hard to find: ties, one sign, a shift, heavy tails, NaN in any number."""
    x = torch.randn(rows, size, device="cuda")
    kinds = (
        lambda row: row * 0.0,
        torch.relu,
        lambda row: row * 100.0,
        lambda row: row * 0.0 + 3.0,
        lambda row: row.round(),
        lambda row: row + 10.0,
        lambda row: row**5,
        lambda row: row.where(row.abs() < 2.5, float("inf") * row),
        lambda row: row.where(row < 2.0, float("nan")),
        lambda row: row.where(row < 0.0, float("nan")),
        lambda row: row * float("nan"),
    )
    for i in range(rows):
        x[i] = kinds[i % len(kinds)](x[i]) if i % 2 else x[i]
    return x.to(dtype) + 0.0  # a −0 and a +0 that tie could each be the bound


def assert_same(actual, expected, what: object = "") -> None:
    """Equal bits, except that any NaN equals any other."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), (what, i)
        if a.dtype == FP32:
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"{what}[{i}]: {m}")
        else:
            differing = (a.contiguous().view(torch.uint8) != e.contiguous().view(torch.uint8)).nonzero()
            assert not len(differing), (what, i, len(differing), differing[:5].tolist())


@pytest.mark.parametrize("name", NAMES)
def test_formats(name):
    """Every format with every rounding and scale rule, packed and not."""
    for rounding in ("even",) if FORMATS[name].torch_dtype else ("even", "half_up"):
        for rule in ("absmax", "absmax_pow2"):
            text = f"{name} row {rule} {rounding}"
            for shape in ((37, 129), (130, 34), (300, 512)):
                x = rows_of_everything(*shape, text)
                for packed in (False, True):
                    actual = kernels.quantize_8bit(x, text, packed)
                    assert_same(actual, reference.quantize_8bit(x, text, packed), (text, shape, packed))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(dtype, shape):
    """Block sizes, warps, alignment and long rows; with factors to fold."""
    fold = torch.rand(1, shape[1], device="cuda") + 0.5
    for text in (E2M1, E4M3, "midrise4 row absmax_pow2 half_up"):
        x = rows_of_everything(*shape, text, dtype)
        assert_same(kernels.quantize_8bit(x, text, True), reference.quantize_8bit(x, text, True), text)
        folded = kernels.quantize_8bit(x, text, False, fold)
        assert_same(folded, reference.quantize_8bit(x, text, False, fold), text)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed(dtype, shape):
    for text in (E2M1, E4M3, "int8 row absmax_pow2 half_up"):
        x = rows_of_everything(*shape, text, dtype)
        assert_same(kernels.quantize_8bit_transposed(x, text), reference.quantize_8bit_transposed(x, text), text)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [*SHAPES, (2000, 70), (5000, 4096)])
def test_pair(dtype, shape):
    """Rows and columns of a gradient, with both folds and without; programs that take many rows."""
    rows, columns = shape
    x = torch.randn(shape, device="cuda") * torch.logspace(-4, 4, columns, device="cuda")
    if rows > 9:
        x[5, columns // 2], x[6, columns // 3], x[:, columns // 4] = float("nan"), float("inf"), 0.0
    x = x.to(dtype)
    for fold, fold_rows in ((None, None), (torch.rand(columns, device="cuda"), torch.rand(rows, 1, device="cuda"))):
        for text in (E4M3, "e5m2 row absmax_pow2 even"):
            actual = kernels.quantize_8bit_pair(x, text, fold, fold_rows)
            assert_same(actual, reference.quantize_8bit_pair(x, text, fold, fold_rows), (text, fold is None))
        assert_same(kernels.quantize_columns(x, E4M3, fold_rows), reference.quantize(x, E4M3, 0, fold=fold_rows))


@pytest.mark.parametrize("name", NAMES)
def test_recode(name):
    """Every byte of stored codes, in odd rows, whole ones and parts of longer ones, as stored and transposed."""
    fmt = FORMATS[name]
    for rows, size in ((37, 129), (300, 34), (130, 4096), (9, 14336)):
        x = torch.randn(rows, size, device="cuda")
        codes, _ = reference.quantize(x, name, -1)
        if fmt.bits == 4 and size % 2 == 0:
            codes = torch.randint(256, codes.shape, dtype=torch.uint8, device="cuda")
        apart = torch.full((rows, codes.shape[1] + 3), 255, dtype=torch.uint8, device="cuda")
        apart = apart[:, : codes.shape[1]].copy_(codes)
        for transposed in (False, True):
            expected = [reference.recode(codes, name, size, transposed)]
            for stored in (codes, apart):
                assert_same([kernels.recode(stored, name, size, transposed)], expected, (size, transposed))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [1, 5, 37, 600, 2048, 4099, 14336, 16384])
@pytest.mark.parametrize("alpha", [0.6, 0.9, 0.99, 0.999])
def test_compensated(dtype, size, alpha):
    """Order statistics of easy and hard rows, and the codes that follow."""
    x = rows_with_outliers(44, size, dtype)
    for grid in ("e2m1", "midrise4 row absmax half_up", "e3m0"):
        operand = f"{grid}; ste; occ(alpha={alpha},residual=e4m3)"
        actual = compensated(kernels, x, operand, -1)
        assert_same(actual, compensated(reference, x, operand, -1), operand)


def test_compensated_along_other_axes():
    x, operand = torch.randn(5, 70, 6, device="cuda", dtype=BF16), "e2m1; ste; occ(alpha=0.9,residual=e4m3)"
    for axis in (0, 1, 2, -2):
        actual = compensated(kernels, x, operand, axis)
        assert_same(actual, compensated(reference, x, operand, axis), axis)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("size", [1, 5, 37, 600, 4099, 16384])
def test_clamp(dtype, size):
    """The clamped tensor bit for bit, and the residual wherever its entries stand. Of rows without NaN: which of
    several NaN an entry stands for is open.
    """
    x = rows_with_outliers(44, size, dtype)
    x = x[~x.isnan().any(1)]
    for alpha in (0.6, 0.99):
        clamp = f"occ(alpha={alpha})"
        clamped, values, positions = outliers.clamp_outliers(x, clamp, -1)
        expected, expected_values, expected_positions = outliers_reference.clamp_outliers(x, clamp, -1)
        assert (values.shape, positions.dtype) == (expected_values.shape, expected_positions.dtype)
        torch.testing.assert_close(clamped, expected, rtol=0, atol=0, equal_nan=True)
        assert (positions.long() < size).all()
        residual = values.new_zeros(x.shape).scatter_add_(-1, positions.long(), values)
        expected_residual = values.new_zeros(x.shape).scatter_add_(-1, expected_positions.long(), expected_values)
        torch.testing.assert_close(residual, expected_residual, rtol=0, atol=0, equal_nan=True)


def assert_clamps_a_tensor(x: torch.Tensor, alpha: float, axis: int = -1) -> None:
    """The clamped tensor bit for bit; the residual wherever its entries stand, and of NaN and infinite bounds, of which
    it is open what ties with them, only its values.
    """
    clamp = f"occ(alpha={alpha},per=tensor)"
    clamped, values, positions = outliers.clamp_outliers(x, clamp, axis)
    expected, expected_values, expected_positions = outliers_reference.clamp_outliers(x, clamp, axis)
    what = (x.dtype, tuple(x.shape), alpha)
    assert (values.dtype, values.shape) == (expected_values.dtype, expected_values.shape), what
    assert (positions.dtype, positions.shape) == (expected_positions.dtype, expected_positions.shape), what
    assert clamped.stride() == expected.stride(), what
    torch.testing.assert_close(clamped, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values.sort()[0], expected_values.sort()[0], rtol=0, atol=0, equal_nan=True)
    assert len(positions.unique()) == len(positions), what
    if values.isfinite().all():
        dense, expected_dense = (
            v.new_zeros(x.numel()).scatter_add_(0, at.long(), v)
            for v, at in ((values, positions), (expected_values, expected_positions))
        )
        assert torch.equal(dense, expected_dense), what
        again = outliers.clamp_outliers(x, clamp, axis)
        assert all(torch.equal(a, b) for a, b in zip(again, (clamped, values, positions), strict=True)), what


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("shape", [(1, 1), (16, 1024), (127, 129), (131, 1001), (1024, 4096)])
@pytest.mark.parametrize("alpha", [0.6, 0.9, 0.99, 0.999])
def test_clamp_of_a_tensor(dtype, shape, alpha):
    """One bound for all rows; a tensor that is a row, and ones that are not; numbers below the smallest normal one."""
    x = torch.randn(shape, device="cuda")
    x = x * torch.rand(shape[0], 1, device="cuda").exp()
    assert_clamps_a_tensor(x.to(dtype), alpha)
    x[:, :: max(1, shape[1] // 8)] *= 20
    assert_clamps_a_tensor(x.to(dtype), alpha)
    assert_clamps_a_tensor((x * torch.finfo(dtype).tiny / 8).to(dtype), alpha)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_clamp_of_hard_tensors(dtype):
    """Every kind of row on its own: ties, one sign, a shift, heavy tails, infinities, NaN in any number."""
    kinds = rows_with_outliers(24, 40_000, dtype)
    for x in kinds:
        assert_clamps_a_tensor(x[None], 0.99)
    assert_clamps_a_tensor(kinds, 0.9)
    any_bits = torch.randint(-(2**15), 2**15, (300, 301), device="cuda").short().view(BF16).to(dtype)
    # The reference's topk sorts NaN with a minus below all numbers, on CUDA.
    assert_clamps_a_tensor(any_bits.where(any_bits == any_bits, float("nan")), 0.9)


def test_clamp_of_a_tensor_in_any_layout():
    x = torch.randn(50, 34, 60, device="cuda", dtype=BF16)
    for view in (x, x.transpose(0, 2), x[:, :, 1:], x[::2], x[:1].expand(30, -1, -1)):
        for axis in (0, 1, -1):
            assert_clamps_a_tensor(view, 0.97, axis)


def test_strided_inputs():
    """Views: padded rows, every other row, one row for all, columns instead of rows, and bases that are not aligned."""
    whole = torch.randn(200, 1000, device="cuda", dtype=BF16)
    operand = "e2m1; ste; occ(residual=e4m3)"
    for x in (whole[:, :256], whole[::2, 3:700], whole[:1].expand(50, -1), whole.t(), whole[1:, 1:]):
        assert_same(kernels.quantize_8bit(x, E2M1, True), reference.quantize_8bit(x, E2M1, True))
        assert_same(kernels.quantize_8bit_transposed(x, E2M1), reference.quantize_8bit_transposed(x, E2M1))
        actual = kernels.quantize_8bit_pair(x, E4M3, None, None)
        assert_same(actual, reference.quantize_8bit_pair(x, E4M3, None, None))
        assert_same(compensated(kernels, x, operand, -1), compensated(reference, x.contiguous(), operand, -1))


def swiglu(gate, up, weight, factor):
    return F.silu(gate) * up


#: As the pass writes them, functions with the same ATen calls, and how many inputs they have.
PRODUCERS = {
    "round(a); neg(%0); exp(%1); add(%2, 1.0); div(%0, %3); round(%4) {0}; mul(%5, b) {0}": (swiglu, 2),
    "round(a); mul(%0, 0.5); mul(%0, 0.7071067811865476); erf(%2); add(%3, 1.0); mul(%1, %4); round(%5) {0}": (
        lambda gate, up, weight, factor: F.gelu(gate),
        1,
    ),
    "sigmoid(a) {0}; mul(%0, c) {0}; mul(%1, d); round(%2) {0}": (
        lambda gate, up, weight, factor: (gate.sigmoid() * weight * factor).to(gate.dtype),
        4,
    ),
}


@pytest.mark.parametrize("text", PRODUCERS, ids=["swiglu", "gelu", "broadcast"])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("rows", "size"), [*SHAPES[1:-1], (9001, 640), (5000, 1792), (4099, 4096), (3001, 14336)])
def test_producers(rows, size, dtype, text):
    """Codes, scales and bounds are those of what Inductor's kernel writes, bit for bit; with more rows than all
    programs take at once, and columns that nothing is aligned to.
    """
    function, count = PRODUCERS[text]
    gate = (rows_of_everything(rows, size + 1, E2M1).clamp(-6e4, 6e4)).to(dtype)[:, 1:]
    gate[::2] = torch.randn(gate[::2].shape, device="cuda").to(dtype)
    inputs = [
        gate,
        torch.randn(rows, size, device="cuda").to(dtype),
        torch.rand(size, device="cuda").to(dtype),
        torch.rand(rows, 1, device="cuda") + 0.5,
    ]
    operand = f"{E2M1}; ste; occ(alpha=0.9,residual=e4m3)"
    x = torch.compile(function, fullgraph=True, dynamic=False)(*inputs)
    assert x.dtype == dtype
    read = [*inputs[:count], *[None] * (4 - count)]
    codes, scales, bounds = kernels.quantize_produced(*read, text.format(str(dtype).removeprefix("torch.")), operand)
    assert_same((codes, scales, bounds.where(scales.isfinite(), 0.0)), compensated(kernels, x, operand, -1))
    torch._dynamo.reset()


@pytest.mark.parametrize(("rows", "size"), [(37, 129), (9001, 768), (5000, 1408), (3001, 7168)])
def test_producers_read_halves_of_one_product(rows, size):
    """Gate and up of experts: rows of twice the width, some of them junk beyond the last group."""
    both = torch.randn(rows, 2 * size, device="cuda").to(BF16)
    both[-5:] = float("nan")
    text, operand = next(iter(PRODUCERS)).format("bfloat16"), f"{E2M1}; ste; occ(alpha=0.99,residual=e4m3)"
    gate, up = both.chunk(2, -1)
    x = torch.compile(swiglu, fullgraph=True, dynamic=False)(gate, up, None, None)
    codes, scales, bounds = kernels.quantize_produced(gate, up, None, None, text, operand)
    assert_same((codes, scales, bounds.where(scales.isfinite(), 0.0)), compensated(kernels, x, operand, -1))
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_computes_what_it_quantizes(dynamic):
    """With the pass and without it a step has the same bits, for two batches, and compiles once for all of them if
    sizes are dynamic.
    """
    results = []
    for enabled in (["fuse_producers"], []):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = SwiGlu(256, 640).to("cuda", BF16)
        options = {"enable_passes": enabled, "min_side": 0, "defaults": False}
        compiled = torch.compile(model, backend="qcompile_fp4", dynamic=dynamic, options=options)
        found = []
        for batch in (96, 160):
            y = compiled(torch.randn(batch, 256, device="cuda", dtype=BF16))
            y.float().square().sum().backward()
            found += [y.detach(), *(p.grad.clone() for p in model.parameters())]
        results.append(found)
    assert_same(*results)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="qcompile_fp4", options=options | {"enable_passes": ["fuse_producers"]})
        compiled(torch.randn(96, 256, device="cuda", dtype=BF16))
    assert "_quantize_produced_rows" in {event.name for event in trace.events()}


class SwiGlu(torch.nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up = torch.nn.Linear(width, inner, bias=False), torch.nn.Linear(width, inner)
        self.down = torch.nn.Linear(inner, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_cuda_graph():
    """Captured launches read the data of the replay: no scalar of the data is baked in, and nothing synchronizes."""
    x = torch.randn(256, 4096, device="cuda", dtype=BF16)
    fold, fold_rows = torch.rand(4096, device="cuda"), torch.rand(256, device="cuda")
    operand = f"{E2M1}; ste; occ(alpha=0.99,residual=e4m3)"

    def everything(module, clamps):
        packed = module.quantize_8bit(x, E2M1, True)
        return [
            *packed,
            *module.quantize_8bit_transposed(x, E2M1),
            *module.quantize_8bit_pair(x, E4M3, fold, fold_rows),
            module.recode(packed[2], E2M1, 4096, True),
            *module.quantize_compensated(x, operand, -1)[:2],
            *module.quantize_produced(x, None, None, None, "mul(a, 0.5) bfloat16", operand)[:2],
            clamps.clamp_outliers(x, "occ(alpha=0.99)", -1)[0],
            clamps.clamp_outliers(x, "occ(alpha=0.99,per=tensor)", -1)[0],
        ]

    everything(kernels, outliers)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(kernels, outliers)
    for scale in (1.0, 1e-3):
        x.normal_().mul_(scale)
        fold.uniform_()
        graph.replay()
        assert_same(captured, everything(reference, outliers_reference), scale)


def test_offsets_beyond_32_bits():
    """More than 2³¹ elements: the last rows would be written to where the first ones are."""
    rows, size = 2**31 // 16384 + 8, 16384
    x = torch.randn(16, size, device="cuda", dtype=BF16).repeat(rows // 16 + 1, 1)[:rows]
    x[-8:].normal_()
    codes, scales, stored = kernels.quantize_8bit(x, E2M1, True)
    for part in (slice(0, 8), slice(-8, None)):
        assert_same([codes[part], scales[part], stored[part]], reference.quantize_8bit(x[part], E2M1, True))
    del x, codes
    recoded = kernels.recode(stored, E2M1, size, False)
    assert_same([recoded[-8:]], [reference.recode(stored[-8:], E2M1, size, False)])
    del recoded
    transposed = kernels.recode(stored, E2M1, size, True)
    assert_same([transposed[-8:, -8:]], [reference.recode(stored[-8:], E2M1, size, True)[-8:]])


def test_clamp_beyond_32_bits():
    """Order statistics of more than 2³¹ elements, by their definition, and a residual that restores every element."""
    x = torch.empty(2**31 + 4099, device="cuda", dtype=BF16).normal_()
    x[-4099:] *= 3
    clamp = "occ(alpha=0.999,per=tensor)"
    clamped, values, positions = outliers.clamp_outliers(x, clamp, -1)
    low, high = clamped_counts(OutlierClamp.parse(clamp), x.numel())
    assert (positions.dtype, len(positions)) == (torch.int64, low + high)
    lower, upper = clamped.aminmax()
    assert (x < lower).sum() <= low < (x <= lower).sum()
    assert (x > upper).sum() <= high < (x >= upper).sum()
    clamped[positions] = (clamped[positions].float() + values).to(BF16)
    assert torch.equal(clamped, x)
