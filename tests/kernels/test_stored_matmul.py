"""Products with stored weights (kernels/matmul/stored.py): numbers in the interpreter, machine code without a card.

Every product is compared with float64. What may differ follows from what a kernel does, for a sum of K terms
p = x · w, with Σ|p| in float64:

* ``gemv`` multiplies float32 levels: no weight is rounded, but for its scale (one rounding of the level times it, and
  up to two of the scale's own parts in the reference as well as here): 4 u, u = 2⁻²⁴. Its sum, in any order, is off by
  less than K u Σ|p|.
* ``fragments`` multiplies the levels rounded to x's dtype, the scale with the sum of a block: a bound as of ``gemv``,
  of tensor cores (below), with one operation more per block.
* ``tile`` multiplies exactly the weights that the reference decodes to x's dtype. Tensor cores sum float32, rounding
  toward zero: less than 2 K u Σ|p|. So does NumPy, which the interpreter multiplies with, at half of that.
* Splits add their sums in float32: part of the K.
* The result is rounded once.

The interpreter truncates where it should round to bfloat16, so results are float32 and float16 there.
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import qcompile.kernels  # noqa: F401
from qcompile.ir.stored import Stored
from qcompile.kernels.matmul import costs, reference
from qcompile.kernels.matmul import stored as kernels
from qcompile.kernels.matmul.stored import CONFIGS, Config
from qcompile.stored.weight import encode

from .harness import compiled, interpreted, launching, run_interpreted
from .test_triton_quantize import compile_for_hopper, spills

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NESTED = "nf4 block64 absmax_bnb; nested"
#: All kinds of scales: of rows, a tensor, blocks; nested in two ways, FP8 beside a global one, powers of two; 16 bits.
SPECS = (
    NESTED,
    "nf4 block64; nested(int8 block128)",
    "nf4 row",
    "fp4bnb block32",
    "int4 block32",
    "int4 tensor",
    "e2m1 block16 e4m3",
    "e2m1 block32 e8m0",
    "midrise4 block128",
)
UNIT = 2.0**-24


def weight(n: int, size: int, spec: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Arguments of ``mm_stored`` that are parts of a random weight."""
    stored = Stored.parse(spec)
    parts = encode(torch.randn(n, size, device=device) * 0.05, stored)
    scales = parts.get("scales", parts.get("scale_codes"))
    second = parts.get("second", parts.get("global_scale"))
    return {"codes": parts["codes"], "scales": scales, "second": second, "offset": parts.get("offset")}


def arguments(parts: dict[str, torch.Tensor], spec: str, size: int, rows: bool, dtype, bias=None, high_first=False):
    """Those after x, in order."""
    codes = parts["codes"]
    if high_first:
        codes = (codes << 4) | (codes >> 4)
    names = codes, parts["scales"], str(Stored.parse(spec)), size, rows, dtype, bias
    return (*names, parts["second"], parts["offset"], high_first)


def decoded(parts: dict[str, torch.Tensor], spec: str, size: int, dtype: torch.dtype) -> torch.Tensor:
    """W ``[N, size]`` by the reference, in ``dtype``: a product with the unit matrix."""
    unit = torch.eye(parts["codes"].shape[0], dtype=dtype, device=parts["codes"].device)
    return reference.mm_stored(unit, *arguments(parts, spec, size, True, dtype))


def as_multiplied(
    kernel: str, parts: dict[str, torch.Tensor], spec: str, size: int, dtype: torch.dtype
) -> torch.Tensor:
    """W ``[N, size]`` as a kernel sees it beside x of ``dtype``."""
    if kernel not in ("gemv", "fragments"):
        return decoded(parts, spec, size, dtype)
    dense = decoded(parts, spec, size, FP32)
    if kernel == "gemv":
        return dense
    levels = torch.tensor(Stored.parse(spec).quantizer.format.levels, device=dense.device)
    of_codes = (levels.to(dtype).double() / levels.double()).nan_to_num(1.0)  # a level of 0 stays one
    low, high = (parts["codes"] & 15).long(), (parts["codes"] >> 4).long()
    return dense.double() * of_codes[torch.stack([low, high], -1).flatten(1)]


def assert_product(got, x, dense, bias=None, rounded: bool = True) -> None:
    """``dense``: W as the product sees it, ``[…, K]``. ``rounded``: whether the kernel rounds what it decodes."""
    x, dense = x.double(), dense.double()
    expected, size = x @ dense.t(), x.shape[1]
    bound = (x.abs() @ dense.abs().t()) * ((2 * size + 4 * (not rounded)) * UNIT)
    if bias is not None:
        expected = expected + bias.double()
        bound = bound + expected.abs() * UNIT
    bound = bound + (expected.abs() + bound) * torch.finfo(got.dtype).eps / 2
    difference = (got.double() - expected).abs()
    assert not got.isnan().any()
    assert (difference <= bound).all(), (difference / bound).max()


def tiny(kernel: str, **changes) -> Config:
    """A config of small blocks, so that tiles hang over every edge and the contraction takes several steps."""
    block_m = 1 if kernel == "gemv" else 16
    return replace(Config(kernel, 0, block_n=32, block_w=8, block_m=block_m, programs=1), **changes)


# --- numerics in the interpreter ------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_numerics_under_the_interpreter():
    """Runs the tests below in a process where Triton interprets kernels."""
    run_interpreted(__file__)


@pytest.fixture(autouse=True)
def filled(monkeypatch):
    """Uninitialized memory is NaN."""
    new_empty = torch.Tensor.new_empty

    def empty(self, *sizes, **options):
        made = new_empty(self, *sizes, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", empty)


@interpreted
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("m", [1, 5, 17])
def test_interpreted_products(spec, m):
    """N = 37, K = 3 blocks; the kernel of few rows and of many, with and without a bias, in both halves' order."""
    torch.manual_seed(0)
    n, size = 37, 3 * (Stored.parse(spec).quantizer.granularity.size or 32)
    parts = weight(n, size, spec)
    exact = decoded(parts, spec, size, FP32)
    for dtype, kernel, bias in ((BF16, "gemv", None), (FP32, "gemv", torch.randn(n)), (FP16, "tile", torch.randn(n))):
        if kernel == "gemv" and m > kernels.MOST_ROWS:
            continue
        x = torch.randn(m, size).to(dtype)
        dense = exact if kernel == "gemv" else decoded(parts, spec, size, dtype)
        high_first = bias is None
        call = arguments(parts, spec, size, False, FP16 if dtype == FP16 else FP32, bias, high_first)
        got = kernels.mm_stored(x, *call, config=tiny(kernel))
        assert_product(got, x, dense, bias, rounded=kernel != "gemv")


@interpreted
@pytest.mark.parametrize("spec", SPECS)
def test_interpreted_gradients(spec):
    """dX = dY · W from the same codes."""
    torch.manual_seed(1)
    n, size = 37, 3 * (Stored.parse(spec).quantizer.granularity.size or 32)
    parts = weight(n, size, spec)
    for m, dtype, high_first in ((1, FP16, False), (17, FP16, True)):
        dy = torch.randn(m, n).to(dtype)
        call = arguments(parts, spec, size, True, dtype, None, high_first)
        got = kernels.mm_stored(dy, *call, config=tiny("tile_rows"))
        assert_product(got, dy, decoded(parts, spec, size, dtype).t())


@interpreted
@pytest.mark.parametrize(("kernel", "rows"), [("gemv", False), ("tile", False), ("tile_rows", True)])
def test_interpreted_splits(kernel, rows):
    """Every split writes a sum of its own, of no step that is not there. The bias is added once."""
    torch.manual_seed(2)
    n, size, spec = 70, 64 * 7, NESTED
    parts = weight(n, size, spec)
    bias = torch.randn(size if rows else n)
    x = torch.randn(3, n if rows else size).to(FP16)
    call = arguments(parts, spec, size, rows, FP16, bias)
    dense = decoded(parts, spec, size, FP32 if kernel == "gemv" else FP16)
    launched = []

    def launch(function, programs, *rest, **constants):
        launched.append((function.__name__, programs))
        return kernels_launch(function, programs, *rest, **constants)

    kernels_launch = kernels.launch
    with launching(launch):
        for programs in (1, 10, 50):
            got = kernels.mm_stored(x, *call, config=tiny(kernel, programs=programs))
            assert_product(got, x, dense.t() if rows else dense, bias, rounded=kernel != "gemv")
    splits = [programs[1] for name, programs in launched if name == kernel]
    assert splits[0] == 1
    assert 1 < splits[1] <= splits[2]
    assert [name for name, _ in launched].count("add_splits") == 2


@interpreted
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [FP16, FP32])
def test_interpreted_weights_are_the_references_bit_for_bit(spec, dtype):
    torch.manual_seed(3)
    parts = weight(37, 384, spec)
    call = arguments(parts, spec, 384, True, dtype)
    got = kernels.decode(*call[:4], dtype, *call[7:9])
    torch.testing.assert_close(got, decoded(parts, spec, 384, dtype), rtol=0, atol=0)


@interpreted
def test_interpreted_not_a_number_stays_one():
    """Of a weight's row in its column of the result, and in none beside it."""
    parts = weight(37, 64, "nf4 block32")
    parts["scales"][5, 1] = float("nan")
    for kernel in ("gemv", "tile"):
        call = arguments(parts, "nf4 block32", 64, False, FP32)
        got = kernels.mm_stored(torch.ones(2, 64, dtype=FP16), *call, config=tiny(kernel))
        assert got.isnan().any(0).nonzero().flatten().tolist() == [5]


# --- machine code ---------------------------------------------------------------------------------------------------


def compiled_for(n: int, size: int, m: int, rows: bool, spec: str, config: Config, monkeypatch) -> dict:
    """Every kernel of a call, by name, for a card that is not there."""
    parts = weight(n, 2 * 64, spec)  # what is launched depends on shapes alone
    stored = Stored.parse(spec)
    parts["codes"] = torch.empty(n, size // 2, dtype=torch.uint8)
    shape = stored.quantizer.scale_shape((n, size))
    count = (n * shape[-1],) if stored.nested else shape
    parts["scales"] = torch.empty(count, dtype=parts["scales"].dtype)
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    found = {}

    def launch(kernel, programs, *given, num_warps=4, num_stages=3, launch_pdl=False, maxnreg=None, **constants):
        found[kernel.__name__] = compile_for_hopper(kernel, given, constants, num_warps, maxnreg)

    with launching(launch):
        x = torch.empty(m, n if rows else size, dtype=BF16)
        kernels.mm_stored(x, *arguments(parts, spec, size, rows, BF16), config=config)
    return found


#: tests/kernels/test_stored_fragments.py has those of few rows.
FIRST = {(rows, config.most_m): config for rows, configs in CONFIGS.items() for config in configs}


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize(("rows", "most_m"), [key for key, config in FIRST.items() if config.kernel != "fragments"])
def test_every_config_keeps_its_registers(rows, most_m, monkeypatch, tmp_path):
    """On Hopper no kernel of the table spills, codes come 16 bytes at a time, and levels out of registers."""
    config = FIRST[rows, most_m]
    found = compiled_for(4096, 4096, most_m or 512, rows, NESTED, config, monkeypatch)
    built = found[config.kernel]
    ptx = built.asm["ptx"]
    assert spills(built, tmp_path) == 0
    assert "shfl.sync.idx" in ptx
    assert re.search(r"cp\.async\.cg\.shared\.global \[.*\], 0x10", ptx)
    assert built.metadata.shared <= 227 * 1024
    wide = config.kernel == "tile" or config.block_m >= 64
    assert ("wgmma.mma_async" if wide else "mma.sync") in ptx


@compiled
@pytest.mark.nightly
def test_few_rows_of_float32(monkeypatch, tmp_path):
    """Codes come 16 bytes at a time, levels out of registers; nothing spills."""
    config = kernels.config_for((8, 4096, 4096), False, FP32, costs.RATES[0])
    built = compiled_for(4096, 4096, 8, False, NESTED, config, monkeypatch)["gemv"]
    ptx = built.asm["ptx"]
    assert spills(built, tmp_path) == 0
    assert "shfl.sync.idx" in ptx
    assert re.search(r"ld\.global\S*\.v4\.b32", ptx)
    assert not re.search(r"ld\.global\S*evict_first\S*\.v2|evict_first\S*\.b32 +%r\d", ptx)
    assert "mma" not in ptx


@compiled
@pytest.mark.nightly
@pytest.mark.parametrize("spec", ["e2m1 block16 e4m3", "int4 block32"])
def test_levels_by_formula(spec, monkeypatch, tmp_path):
    """What ``table=False`` is for: no shuffle but those of the sum, which are few."""
    config = Config("gemv", 1, block_n=4, block_w=512, programs=8, table=False)
    built = compiled_for(4096, 4096, 1, False, spec, config, monkeypatch)["gemv"]
    assert "shfl.sync.idx" not in built.asm["ptx"]
    assert spills(built, tmp_path) == 0


# --- choice ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "dtype", "rows", "kernel"),
    [
        (1, BF16, False, "fragments"),
        (4, FP16, False, "fragments"),
        (64, BF16, False, "fragments"),
        (8, FP32, False, "gemv"),
        (9, FP32, False, None),
        (200, BF16, False, "tile"),
        (1, BF16, True, "tile_rows"),
        (16384, BF16, False, None),
        (16384, BF16, True, None),
    ],
)
def test_the_kernel_follows_from_rows_and_dtype(m, dtype, rows, kernel):
    """CUDA cores multiply few rows of float32, which no tensor core takes; cuBLAS is faster beyond some hundred."""
    config = kernels.config_for((m, 4096, 4096), rows, dtype, costs.RATES[0])
    assert (config and config.kernel) == kernel
    assert config is None or not config.most_m or m <= config.most_m


@pytest.mark.parametrize(
    ("spec", "size", "reason"),
    [
        ("nf4 block64", 4096, ""),
        ("nf4 block64", 68, "K = 68 is no multiple of 8"),
        ("int8 row", 64, "int8 has 1 codes per byte, not 2"),
        ("e2m1/int4 block32", 64, "which grid of e2m1/int4 a code is of, its block's scale says"),
        ("int4 block32x32", 64, "scales of block32x32 are not those of rows or blocks of a row"),
        ("int4 block8", 64, "blocks of 8 are no multiple of 16"),
    ],
)
def test_what_no_kernel_reads(spec, size, reason):
    assert kernels.obstacle(Stored.parse(spec), size, BF16) == reason


def test_nothing_to_multiply():
    """No rows: an empty result; no columns of the weight: the bias, or zeros."""
    parts = weight(8, 64, "nf4 block64")
    call = arguments(parts, "nf4 block64", 64, False, BF16)
    assert kernels.mm_stored(torch.empty(0, 64, dtype=BF16), *call).shape == (0, 8)
