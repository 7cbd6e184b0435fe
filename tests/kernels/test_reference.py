"""Reference kernels of outlier clamping and of ``quantized_mm``, against sorted rows and exact integers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompile.ir.formats import FORMATS
from qcompile.ir.ops import clamped_counts
from qcompile.ir.outliers import OutlierClamp
from qcompile.kernels.matmul.reference import count_bits, mm_1bit, mm_8bit, quantized_mm
from qcompile.kernels.outliers.reference import clamp_outliers, restore_outliers
from qcompile.kernels.quantize.reference import pack, recode

OPS = torch.ops.qcompile

# --- outlier clamping
# -----------------------------------------------------------------------------------------------


def dense_residual(x: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, per: str, axis: int) -> torch.Tensor:
    """The residual in the shape of ``x``, summed by a loop."""
    rows = x.movedim(axis, -1)
    flat = np.zeros(rows.shape, np.float64).reshape(1, -1) if per == "tensor" else np.zeros(rows.shape, np.float64)
    flat = flat.reshape(-1, flat.shape[-1])
    v, p = values.double().reshape(len(flat), -1).numpy(), positions.long().reshape(len(flat), -1).numpy()
    for row, vs, ps in zip(flat, v, p, strict=True):
        for value, position in zip(vs, ps, strict=True):
            row[position] += value
    return torch.from_numpy(flat.reshape(rows.shape)).movedim(-1, axis)


def data(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(shape, generator=generator)
    match kind:
        case "ties":
            return (x * 2).round()
        case "constant":
            return torch.full(shape, 1.5)
        case "heavy":
            return x / torch.rand(shape, generator=generator).clamp(min=1e-3)
        case "positive":
            return x.abs() + 0.25
    return x


KINDS = ["normal", "ties", "constant", "heavy", "positive"]
CLAMPS = ["occ(alpha=0.9)", "occ(alpha=0.99)", "occ(alpha=0.9,per=tensor)", "occ(alpha=0.75)"]


@pytest.mark.parametrize("alpha", ["0.99", "0.97", "0.999", "0.9", "0.95", "0.75", "0.51", "0.9999"])
def test_ranks_are_the_exact_floors(alpha):
    """⌊(1 − α)n⌋ below and n − 1 − ⌊αn⌋ above, for the α that was written: in floating point (1 − 0.9)·10 is
    0.99…
    """
    exact, clamp = Fraction(alpha), OutlierClamp(float(alpha))
    for n in (*range(1, 300), 1000, 1023, 1024, 4096, 10**6, 2**31 + 1, 10**10):
        low, high = clamped_counts(clamp, n)
        assert low == math.floor((1 - exact) * n)
        assert high == n - 1 - math.floor(exact * n)
        assert low >= 0
        assert high >= 0
        assert low + high < n


@pytest.mark.parametrize("alpha", [0.999, 0.99, 0.97])
def test_ranks_are_those_of_the_released_code(alpha):
    """int((1 − α)n) and int(αn) of the sorted row, in the authors' floating point, at the published α."""
    for n in range(1, 20_000):
        low, high = clamped_counts(OutlierClamp(alpha), n)
        assert (low, n - 1 - high) == (int((1 - alpha) * n), int(alpha * n)), n


@pytest.mark.parametrize("alpha", [0.999999, 0.9999985, 0.5000001])
def test_ranks_stay_inside_the_row_for_extreme_alpha(alpha):
    """Any α that `OutlierClamp` accepts must give counts that exist."""
    for n in (1, 7, 100, 4096):
        low, high = clamped_counts(OutlierClamp(alpha), n)
        assert low >= 0
        assert high >= 0


@pytest.mark.parametrize("n", [0, 1, 2, 3, 5])
def test_counts_of_short_rows_are_not_negative(n):
    low, high = clamped_counts(OutlierClamp(), n)
    assert low >= 0
    assert high >= 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("shape", [(5, 40), (3, 1), (3, 2), (4, 3), (2, 3, 101), (7,)])
def test_clamping_to_the_order_statistics(clamp, kind, shape, generator):
    """The bounds come from a full sort; at most m elements move; positions are distinct within a side and in
    range.
    """
    x, spec = data(kind, shape, generator), OutlierClamp.parse(clamp)
    for axis in range(len(shape)):
        clamped, values, positions = clamp_outliers(x, clamp, axis)
        rows = x.movedim(axis, -1)
        rows = rows.reshape(1, -1) if spec.per == "tensor" else rows.reshape(-1, rows.shape[-1])
        n = rows.shape[-1]
        ordered = rows.sort(-1).values
        exact = Fraction(str(spec.alpha))
        low, high = math.floor((1 - exact) * n), math.floor(exact * n)
        expected = torch.minimum(torch.maximum(rows, ordered[:, low, None]), ordered[:, high, None])
        moved = clamped.movedim(axis, -1).reshape(rows.shape)
        assert torch.equal(moved, expected)
        assert clamped.stride() == x.stride()
        assert values.shape == positions.shape
        assert values.shape[-1] == low + n - 1 - high
        assert ((moved != rows).sum(-1) <= values.shape[-1]).all()
        assert ((positions.long() >= 0) & (positions.long() < n)).all()
        for side in (positions[..., :low], positions[..., low:]):
            for row in side.flatten(0, -2).tolist() if side.dim() > 1 else [side.tolist()]:
                assert len(set(row)) == len(row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_clamped_plus_residual_is_x_within_one_rounding(clamp, kind, dtype, generator):
    """clamped + (x − bound): each of the two operations rounds once, by at most half an ulp of the residual
    or of x.

    Elements that were not clamped must come back bit for bit.
    """
    x = data(kind, (6, 100), generator).to(dtype)
    clamped, values, positions = clamp_outliers(x, clamp, 1)
    residual = dense_residual(x, values, positions, OutlierClamp.parse(clamp).per, 1)
    restored = restore_outliers(clamped, values, positions, clamp, 1)
    untouched = residual == 0
    assert torch.equal(restored[untouched], x[untouched])
    error = (restored.double() - x.double()).abs()
    eps = torch.finfo(dtype).eps
    assert (error <= eps / 2 * (residual.abs() * (1 + eps) + x.double().abs() * (1 + eps))).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clamped_plus_residual_is_x_bit_for_bit(clamp, kind, dtype, generator):
    """The residual of 16-bit inputs is kept in float32 for this: restoring gives x back to the last bit."""
    x = data(kind, (6, 100), generator).to(dtype)
    clamped, values, positions = clamp_outliers(x, clamp, 1)
    restored = restore_outliers(clamped, values, positions, clamp, 1)
    wrong = (restored != x).sum().item()
    assert wrong == 0, f"{wrong} of {(clamped != x).sum().item()} clamped elements differ after the round trip"


@pytest.mark.parametrize("clamp", ["occ(alpha=0.9)", "occ(alpha=0.9,per=tensor)"])
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 200), (0,), (2, 0, 5)])
def test_clamping_nothing(clamp, shape):
    """An expert without tokens: shapes as the fake implementation promises, nothing aliased."""
    x = torch.empty(shape)
    clamped, values, positions = clamp_outliers(x, clamp, -1)
    meta = OPS.clamp_outliers(x.to("meta"), clamp, -1)
    for real, fake in zip((clamped, values, positions), meta, strict=True):
        assert real.shape == fake.shape
        assert real.dtype == fake.dtype
    assert restore_outliers(clamped, values, positions, clamp, -1).shape == shape
    assert not values._is_view()


def test_outliers_that_are_not_finite_stay_visible():
    """One infinity or NaN in a row must not turn into a finite number by being clamped away and restored."""
    for bad in (math.inf, -math.inf, math.nan):
        x = torch.linspace(-2, 2, 40).repeat(2, 1)
        x[1, 7] = bad
        out = OPS.fake_quantize(x, "e2m1 row absmax even; ste; occ(alpha=0.9)", 1)
        assert not out[1, 7].isfinite()
        assert out[0].isfinite().all()


def snr_db(x: torch.Tensor, text: str) -> float:
    error = (OPS.fake_quantize(x, text, 1) - x).double()
    return 10 * math.log10((x.double().square().sum() / error.square().sum()).item())


def snr_db_by_hand(x: np.ndarray, alpha: float | None, compensate: int) -> float:
    """The same figure from a sort, 6/amax and ml_dtypes, in float64."""
    x = x.astype(np.float64)
    clamped = x
    if alpha:
        ordered, n = np.sort(x, -1), x.shape[-1]
        clamped = np.clip(x, ordered[:, [int((1 - alpha) * n)]], ordered[:, [int(alpha * n)]])
    gamma = 6 / np.abs(clamped).max(-1, keepdims=True)
    levels = (clamped * gamma).astype(np.float32).astype(ml_dtypes.float4_e2m1fn).astype(np.float64)
    error = levels / gamma + compensate * (x - clamped) - x
    return 10 * math.log10((x**2).sum() / (error**2).sum())


# notes/fp4_training.md §1.3: rows of 4096, SNR in dB: without OCC, then α = .999, .99, .97. Student-t₃
# without
# compensation is left to the oracle: its error is what was cut off, which a few largest elements of a sample
# decide.
SNR = {
    ("normal", 0): (18.5, 18.9, 18.4, 16.2),
    ("normal", 1): (18.5, 19.0, 19.7, 20.7),
    ("student", 0): None,
    ("student", 1): (8.5, 15.9, 20.8, 22.9),
}


@pytest.mark.parametrize(("kind", "compensate"), SNR)
def test_signal_to_noise_with_and_without_compensation(kind, compensate, rng):
    """Clamping alone can hurt; the residual carries the benefit. Table to 0.3 dB, oracle on the same data to
    0.01 dB.
    """
    draws = rng.standard_normal((96, 4096)) if kind == "normal" else rng.standard_t(3, (96, 4096))
    x = draws.astype(np.float32)
    alphas = (None, 0.999, 0.99, 0.97)
    clamps = [f"; ste; occ(alpha={a},compensate={compensate})" if a else "" for a in alphas]
    measured = [snr_db(torch.from_numpy(x), f"e2m1 row absmax even{clamp}") for clamp in clamps]
    assert measured == pytest.approx([snr_db_by_hand(x, a, compensate) for a in alphas], abs=0.01)
    if SNR[kind, compensate]:
        assert measured == pytest.approx(SNR[kind, compensate], abs=0.3)
    if compensate:
        assert measured == sorted(measured), "the more is compensated, the better"
    else:
        assert measured[1] > measured[2] > measured[3], "the more is cut off, the worse"
        assert measured[3] < measured[0], "at α = .97 clamping alone hurts"


# --- quantized_mm
# ------------------------------------------------------------------------------------------------------

SIZE = 24


def operand(rng: np.random.Generator, shape: tuple[int, ...], text: str):
    """Tensors of a quantized operand whose values are exact small integers, and those values in float64.

    Levels are integers (int4, or E2M1 × 2) times a power-of-two scale per row: products and sums are exact.
    """
    magnitudes = np.array([0, 1, 2, 3, 4, 6, 8, 12] if text.startswith("e2m1") else range(8))
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    levels = magnitudes[codes & 7] * np.where(codes & 8, -1.0, 1.0)
    scale = np.exp2(rng.integers(0, 3, (*shape[:-1], 1)))
    dense = levels * scale
    packed = codes[..., ::2] | (codes[..., 1::2] << 4)
    stored = 2 * scale if text.startswith("e2m1") else scale
    tensors = [torch.from_numpy(packed), torch.from_numpy(stored.astype(np.float32))]
    if "occ" in text:
        rows = dense.reshape(-1, shape[-1])
        m = sum(clamped_counts(OutlierClamp.parse(text.split(";")[-1].strip()), shape[-1]))
        positions = np.stack([rng.choice(shape[-1], m, replace=False) for _ in rows])
        values = rng.integers(-9, 10, positions.shape).astype(np.float64)
        for row, value, position in zip(rows, values, positions, strict=True):
            row[position] += value
        lead = (*shape[:-1], m)
        tensors += [
            torch.from_numpy(values.astype(np.float32)).reshape(lead),
            torch.from_numpy(positions.astype(np.uint8)).reshape(lead),
        ]
    return tensors, torch.from_numpy(dense)


OPERANDS = ["e2m1 row absmax even", "int4 row absmax even", "e2m1 row absmax even; ste; occ(alpha=0.9)"]


@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("a_text", "b_text"), list(itertools.product(OPERANDS, OPERANDS)))
def test_quantized_mm_in_exact_integers(a_text, b_text, batch, a_transposed, b_transposed, rng):
    """All four layouts, batches and residuals, equal to decode-then-matmul in float64 without any rounding at
    all.
    """
    rows, columns, inner = 10, 14, SIZE
    a_shape = (*batch, inner, rows) if a_transposed else (*batch, rows, inner)
    b_shape = (*batch, columns, inner) if b_transposed else (*batch, inner, columns)
    a, a_dense = operand(rng, a_shape, a_text)
    b, b_dense = operand(rng, b_shape, b_text)
    expected = (a_dense.mT if a_transposed else a_dense) @ (b_dense.mT if b_transposed else b_dense)
    args = (a, a_text, a_shape[-1], a_transposed, b, b_text, b_shape[-1], b_transposed)
    for dtype in (torch.float32, torch.float64):
        out = quantized_mm(*args, dtype)
        assert out.dtype == dtype
        assert torch.equal(out.double(), expected)


INTEGER = [fmt for fmt in FORMATS.values() if fmt.tensor_core_type == "int8"]


@pytest.mark.parametrize("left", INTEGER, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("right", INTEGER, ids=lambda fmt: fmt.name)
def test_products_of_8bit_codes_in_exact_integers(left, right, rng):
    """Levels are (code + offset) / factor; with sums of codes any two INT8 grids give the product of their levels."""
    codes, levels = [], []
    for fmt, rows in ((left, 5), (right, 7)):
        index = rng.integers(0, len(fmt.codebook or fmt.magnitudes), (rows, 65))
        sign = rng.integers(0, 1 if fmt.codebook else 2, index.shape)
        stored = torch.from_numpy((index | sign << fmt.bits - 1).astype(np.uint8))
        codes.append(recode(pack(stored, fmt.bits), fmt.name, 65, False))
        levels.append(torch.from_numpy(np.array(fmt.codebook or fmt.magnitudes)[index] * np.where(sign, -1.0, 1.0)))
        assert codes[-1].dtype == torch.int8
        assert torch.equal((codes[-1].double() + fmt.tensor_core_offset) / fmt.tensor_core_factor, levels[-1])
    sums = [c.sum(-1, keepdim=True, dtype=torch.float32) for c in codes]
    offset_a = right.tensor_core_offset * (sums[0] + 65 * left.tensor_core_offset)
    scales = [torch.full((1, 1), 1 / fmt.tensor_core_factor) for fmt in (left, right)]
    got = mm_8bit(*codes, *scales, torch.float32, None, offset_a, left.tensor_core_offset * sums[1])
    assert torch.equal(got.double(), levels[0] @ levels[1].T)


@pytest.mark.parametrize("shape", [(1, 1), (5, 8), (6, 7), (9, 9)])
def test_codes_of_the_transpose(shape, rng):
    """Element by element, as packed along the rows as along the columns; half a byte that nothing fills is 0."""
    codes = torch.from_numpy(rng.integers(0, 16, shape).astype(np.uint8))
    got = torch.ops.qcompile.transpose_codes(pack(codes, 4), shape[1])
    assert torch.equal(got, pack(codes.t().contiguous(), 4))
    assert got.is_contiguous()
    for row, column in np.ndindex(shape):
        assert got[column, row // 2] >> 4 * (row % 2) & 15 == codes[row, column]
    if shape[0] % 2:
        assert not (got[:, -1] >> 4).any()


def test_products_of_signs_in_exact_integers(rng):
    """Counts of common bits, less half of those of either row, are the product of levels ±½; a set bit is −½."""
    bits = [torch.from_numpy(rng.integers(0, 2, (rows, 128)).astype(np.uint8)) for rows in (5, 7)]
    bits[0][1], bits[0][2] = 0, 1
    a, b = (0.5 - x.double() for x in bits)
    codes = [pack(x, 1) for x in bits]
    for stored, x in zip(codes, bits, strict=True):
        assert torch.equal(count_bits(stored), x.sum(-1, keepdim=True, dtype=torch.float32))
    offsets = count_bits(codes[0]) * -0.5, count_bits(codes[1]) * -0.5 + 128 / 4
    scales = [torch.full((rows, 1), 0.5) for rows in (5, 7)]
    shift = torch.arange(7.0)
    got = mm_1bit(*codes, *scales, torch.float32, shift, *offsets)
    assert torch.equal(got.double(), a @ b.T / 4 + shift)


@pytest.mark.parametrize("dense", ["a", "b", "both"])
def test_quantized_mm_with_dense_operands(dense, rng):
    a, a_dense = operand(rng, (5, SIZE), OPERANDS[0])
    b, b_dense = operand(rng, (7, SIZE), OPERANDS[0])
    left = ([a_dense.float()], "dense") if dense in ("a", "both") else (a, OPERANDS[0])
    right = ([b_dense.float()], "dense") if dense in ("b", "both") else (b, OPERANDS[0])
    out = quantized_mm(*left, SIZE, False, *right, SIZE, True, torch.float32)
    assert torch.equal(out.double(), a_dense @ b_dense.T)


def test_quantized_mm_is_the_matmul_of_fake_quantized_operands(rng):
    """The three roles of one GEMM from one set of codes: fprop X·Wᵀ, dgrad dY·W, wgrad dYᵀ·X; bitwise."""
    x, w, g = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((9, 20), (11, 20), (9, 11)))
    text = "e2m1 row absmax even"
    xq, wq = (list(OPS.quantize(t, text, -1)) for t in (x, w))
    xd, wd = (OPS.fake_quantize(t, text, -1) for t in (x, w))
    assert torch.equal(quantized_mm(xq, text, 20, False, wq, text, 20, True, torch.float32), xd @ wd.mT)
    assert torch.equal(quantized_mm([g], "dense", 11, False, wq, text, 20, False, torch.float32), g @ wd)
    assert torch.equal(quantized_mm([g], "dense", 11, True, xq, text, 20, False, torch.float32), g.mT @ xd)


def test_two_level_scales_are_not_decoded_without_their_tensor_scale(rng):
    """Without the tensor-wide scale an operand must be refused, not multiplied by 1 in its stead."""
    x = torch.from_numpy(rng.standard_normal((4, 32)).astype(np.float32))
    text = "e2m1 block16 e4m3 even"
    codes, scales = OPS.quantize(x, text, -1, x.abs().amax() / 2688)
    with pytest.raises((ValueError, RuntimeError), match=r"two-level|global"):
        OPS.dequantize(codes, scales, text, -1, 32, torch.float32)
    with pytest.raises((ValueError, RuntimeError), match=r"two-level|global"):
        quantized_mm([codes, scales], text, 32, False, [x], "dense", 32, True, torch.float32)
