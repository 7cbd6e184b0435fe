"""Backward estimators: published vectors, finite differences of the surrogate, masks by their definition."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir.estimators import ESTIMATORS, EstimatorSpec, dge_surrogate, trust_threshold
from qcompile.ir.formats import FORMATS
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize.reference import decode, encode

E2M1 = FORMATS["e2m1"]
DGE = EstimatorSpec.parse("dge")

# --- DGE
# ------------------------------------------------------------------------------------------------------------

# Unit test of the released code: x = linspace(−6, 6, 20), k = 5, cap 3, computed and printed in bfloat16.
PUBLISHED_HALF = [0.2002, 0.4375, 0.6055, 0.2168, 1.8359, 0.2695, 0.3027, 0.2695, 0.2402, 0.5781]


def test_dge_reproduces_the_published_vector():
    """The inputs are rounded to bfloat16 as published; then one bfloat16 rounding of the result, 2^-8,
    separates the two.
    """
    slope = DGE.slope(torch.linspace(-6, 6, 20).bfloat16().float(), E2M1)
    expected = torch.tensor(PUBLISHED_HALF + PUBLISHED_HALF[::-1])
    torch.testing.assert_close(slope, expected, rtol=2.0**-8, atol=0)


# x, f(x), f'(x), from notes/fp4_training.md §14, k = 5, cap 3.
POINTS = [
    (0, 0, 0.2),
    (0.1, 0.0243, 0.3010),
    (0.24, 0.1187, 2.6265),
    (0.25, 0.25, 3),
    (0.3, 0.4312, 0.7248),
    (0.5, 0.5, 0.2),
    (1.6, 1.5243, 0.3010),
    (2.1, 2.0218, 0.2391),
    (2.4, 2.1376, 0.7248),
    (3.2, 3.0486, 0.3010),
    (4.8, 4.2752, 0.7248),
    (5.5, 5.8706, 0.3482),
    (6, 6, 0.2),
]


@pytest.mark.parametrize("sign", [1, -1])
def test_dge_reproduces_the_worked_points(sign):
    """f is odd and f' even; printed to four decimals."""
    x, f, slope = (torch.tensor(column, dtype=torch.float64) for column in zip(*POINTS, strict=True))
    torch.testing.assert_close(dge_surrogate(sign * x, E2M1, 5.0), sign * f, rtol=0, atol=0.6e-4)
    torch.testing.assert_close(DGE.slope(sign * x, E2M1), slope, rtol=0, atol=0.6e-4)


@pytest.mark.parametrize("k", [2.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "midrise1", "midrise4", "int4", "e4m3", "nf4", "fp4bnb"])
def test_dge_slope_is_the_derivative_of_its_surrogate(name, k):
    """Central difference in float64, away from the levels (a kink) and from the thresholds (the cap)."""
    fmt, points = FORMATS[name], []
    edges = (
        fmt.sorted_levels
        if fmt.codebook
        else tuple(level for level in fmt.sorted_levels if level >= -fmt.magnitudes[0])
    )
    for low, high in pairwise(edges):
        points += [low + (high - low) * share for share in (0.06, 0.31, 0.43, 0.58, 0.71, 0.97)]
    y = torch.tensor(points, dtype=torch.float64)
    if not fmt.codebook:
        y = torch.cat([y, -y])
    step = 1e-6 * y.abs()
    difference = (dge_surrogate(y + step, fmt, k) - dge_surrogate(y - step, fmt, k)) / (2 * step)
    slope = EstimatorSpec.parse(f"dge(k={k:g},cap=1000)").slope(y, fmt)
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "midrise4", "midrise1"])
def test_dge_surrogate_meets_the_staircase(name):
    """f(level) = level and f(threshold) = threshold, increasing in between: else f is no surrogate of this
    grid's rounding.
    """
    fmt = FORMATS[name]
    fixed = torch.tensor([*fmt.magnitudes, *fmt.thresholds], dtype=torch.float64)
    fixed = torch.cat([fixed, -fixed])
    torch.testing.assert_close(dge_surrogate(fixed, fmt, 5.0), fixed, rtol=0, atol=1e-12)
    y = torch.linspace(-fmt.max, fmt.max, 4001, dtype=torch.float64)
    assert (dge_surrogate(y, fmt, 5.0).diff() >= -1e-12).all()


@pytest.mark.parametrize("cap", [1.0, 3.0, 7.5])
def test_dge_cap_holds_where_the_paper_says(cap):
    """The cap is reached exactly for |v| < (k·cap)^(−k/(k−1)) (0.0339 at k = 5, cap 3), and at thresholds,
    where f' is infinite.
    """
    estimator = EstimatorSpec.parse(f"dge(k=5,cap={cap:g})")
    edge = (5 * cap) ** (-5 / 4)
    v = torch.tensor([0.0, 0.5 * edge, 0.99 * edge, 1.01 * edge, 2 * edge], dtype=torch.float64)
    slope = estimator.slope(5.0 + v, E2M1)  # the bin [4, 6] is centred on 5 and has half width 1
    assert (slope[:3] == cap).all()
    assert (slope[3:] < cap).all()
    thresholds = torch.tensor(E2M1.thresholds)
    assert (estimator.slope(torch.cat([thresholds, -thresholds]), E2M1) == cap).all()


@pytest.mark.parametrize(("k", "mean"), [(5, 0.593), (3, 0.778), (10, 0.383)])
def test_dge_mean_slope(k, mean):
    """Average over a uniform position, notes/fp4_training.md §1.2: how much DGE shrinks the average weight
    gradient.
    """
    y = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 100_000 + 4  # the bin [4, 6]
    assert EstimatorSpec.parse(f"dge(k={k},cap=3)").slope(y, E2M1).mean().item() == pytest.approx(mean, abs=5e-4)


def test_dge_beyond_the_last_level_keeps_the_last_slope():
    """Rounding noise of the scale puts the largest element at 6.0000005: it gets 1/k, neither 0 nor a growing
    factor.
    """
    y = torch.tensor([6.0, 6.0000005, 6.4, 7.99, 100.0, math.inf])
    torch.testing.assert_close(DGE.slope(torch.cat([y, -y]), E2M1), torch.full((12,), 0.2))


# --- masks
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["e2m1", "e1m2", "e3m0", "midrise4", "midrise1", "int4", "e4m3"])
def test_masks_by_definition(name):
    """clip: inside the grid, edges included. trust: less than half the widest gap from the level taken.
    Checked point by point.
    """
    fmt = FORMATS[name]
    half = {"e2m1": 1.0, "e1m2": 0.25, "e3m0": 4.0, "midrise4": 0.5, "midrise1": 0.5, "int4": 0.5, "e4m3": 16.0}[name]
    assert trust_threshold(fmt) == half
    points = [
        0.0,
        0.3,
        fmt.max * (1 + 2.0**-22),  # x = amax may land this far outside by rounding
        fmt.max * (1 + 2.0**-21),
        fmt.max + half,
        fmt.max + 1.01 * half,
        fmt.max * 9,
    ]
    y = torch.tensor(points + [-p for p in points], dtype=torch.float64)
    q = decode(encode(y.float(), Quantizer(fmt)), fmt).double()
    clip, trust = (EstimatorSpec.parse(text).mask(y, q, fmt) for text in ("clip", "trust"))
    assert clip.tolist() == [True, True, True, False, False, False, False] * 2
    assert trust.tolist() == [True, True, True, True, True, False, False] * 2
    wider, narrower = (EstimatorSpec.parse(text).mask(y, q, fmt) for text in ("clip(s=1.5)", f"trust(t={half / 2})"))
    assert torch.equal(wider, y.abs() <= 1.5 * fmt.max * (1 + 2.0**-22))
    assert torch.equal(narrower, (y - q).abs() <= half / 2)


@pytest.mark.parametrize("bits", range(1, 9))
def test_trust_mask_equals_unclamped_floor(bits, rng):
    """QuEST's cheap kernel form: trusted exactly where the clamp left ⌊y⌋ alone (but for the upper edge
    itself).
    """
    fmt = FORMATS[f"midrise{bits}"]
    y = torch.from_numpy(rng.uniform(-1.5, 1.5, 20_000).astype(np.float32) * np.float32(2 ** (bits - 1)))
    k = y.double().floor()
    inside = (k >= -(2 ** (bits - 1))) & (k <= 2 ** (bits - 1) - 1)
    q = decode(encode(y, Quantizer(fmt, rounding="half_up")), fmt)
    assert torch.equal(EstimatorSpec.parse("trust").mask(y, q, fmt), inside)


# --- QuEST's row (notes/quest.md §3)
# --------------------------------------------------------------------------------

ALPHA = [0.7978845587140913, 1.4935346200015913, 2.051068354131873, 2.513930578568423]
ALPHA += [2.9160938834961225, 3.276597282593217, 3.6010497188221655, 3.884938678807525]


def quest_row() -> tuple[np.ndarray, float]:
    """x_i = sin i + ½ cos i², i = 1…256, rotated by two 128-blocks of the Hadamard matrix, in float64; and
    its rms.
    """
    i = np.arange(1, 257, dtype=np.float64)
    hadamard = np.ones((1, 1))
    while len(hadamard) < 128:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    x = ((np.sin(i) + 0.5 * np.cos(i**2)).reshape(2, 128) @ hadamard / math.sqrt(128)).reshape(-1)
    return x, float(np.sqrt(np.mean(x**2)))


# bits: Δ, Σk, Σ|k + ½|, masked of 256, MSE / rms²
QUEST = {
    1: (1.2640841, -114, 128, 25, 0.639613),
    2: (0.7887329, -116, 174, 15, 0.282665),
    3: (0.4642137, -124, 268, 11, 0.141542),
    4: (0.2655204, -114, 460, 9, 0.082766),
    5: (0.1490307, -102, 826, 5, 0.052738),
    6: (0.0823983, -83, 1493, 5, 0.035493),
    7: (0.0449222, -41, 2761, 2, 0.024913),
    8: (0.0241368, 54, 5146, 2, 0.017537),
}


@pytest.mark.parametrize("bits", QUEST)
def test_quest_reference_row(bits):
    """Codes, trust mask and error of the reference row, with the scale α·rms given by hand (the grid and mask
    are ours).
    """
    delta, sum_k, sum_abs, masked, mse = QUEST[bits]
    x, rms = quest_row()
    fmt = FORMATS[f"midrise{bits}"]
    step = 2 * (ALPHA[bits - 1] * rms + 1e-8) / (2**bits - 1)
    assert step == pytest.approx(delta, abs=1e-7)
    y = torch.from_numpy((x / step).astype(np.float32))
    q = decode(encode(y, Quantizer(fmt, rounding="half_up")), fmt)
    assert (q - 0.5).sum().item() == sum_k
    assert q.abs().sum().item() == sum_abs
    assert (~EstimatorSpec.parse("trust").mask(y, q, fmt)).sum().item() == masked
    assert np.mean((q.double().numpy() * step - x) ** 2) / rms**2 == pytest.approx(mse, abs=2e-6)


def test_quest_reference_row_in_fp4():
    """E2M1 with unit u = 0.48707976·rms: first codes, error, and 3 elements masked under the paper's
    threshold T = u.
    """
    x, rms = quest_row()
    unit = 0.48707976 * rms
    y = torch.from_numpy((x / unit).astype(np.float32))
    q = decode(encode(y, Quantizer(E2M1)), E2M1)
    assert q[:16].tolist() == [1.5, 0.5, 0.5, -1, -0.5, 1, -0.5, 0.5, -0.5, -1, 1, 0, -0.5, 1, 0.5, -1]
    assert (~EstimatorSpec.parse("trust").mask(y, q, E2M1)).sum().item() == 3
    assert np.mean((q.double().numpy() * unit - x) ** 2) / rms**2 == pytest.approx(0.057396, abs=2e-6)


# --- text form
# ------------------------------------------------------------------------------------------------------


def test_every_estimator_is_a_mask_or_a_slope_or_nothing():
    for name, kind in ESTIMATORS.items():
        assert not (kind.mask and kind.slope), name
        assert str(EstimatorSpec.parse(name)).startswith(name)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("ste", "ste"),
        ("clip()", "clip"),
        ("trust", "trust"),
        ("dge", "dge(k=5,cap=3)"),
        ("dge( k = 3 )", "dge(k=3,cap=3)"),
        ("dge(cap=2.5)", "dge(k=5,cap=2.5)"),
        ("dge(cap=2,k=4)", "dge(k=4,cap=2)"),
    ],
)
def test_text_has_one_canonical_form(text, canonical):
    assert str(EstimatorSpec.parse(text)) == canonical
    assert EstimatorSpec.parse(canonical) == EstimatorSpec.parse(text)


@given(k=st.floats(0.01, 1e4), cap=st.floats(0.01, 1e4))
@settings(max_examples=60, deadline=None)
def test_parse_is_the_inverse_of_str(k, cap):
    """To the last bit: the text is what travels through graphs and cache keys."""
    estimator = EstimatorSpec.parse(f"dge(k={k!r},cap={cap!r})")
    assert dict(estimator.parameters) == {"k": k, "cap": cap}
    assert EstimatorSpec.parse(str(estimator)) == estimator


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown estimator ''; known: ste, clip, trust, dge"),
        ("dgee", "unknown estimator 'dgee'; known: ste, clip, trust, dge"),
        ("dge(k=5", "unknown estimator"),
        ("dge(q=5)", "estimator 'dge' has no parameter 'q'; its parameters: k, cap"),
        ("ste(k=5)", "estimator 'ste' has no parameter 'k'; its parameters: none"),
        ("dge(k=five)", "estimator 'dge': k='five' is not a number"),
        ("dge(k)", "estimator 'dge': k='' is not a number"),
        ("dge(k=0)", "estimator 'dge': k must be positive and finite, got 0"),
        ("dge(cap=-1)", "estimator 'dge': cap must be positive and finite, got -1"),
        ("dge(k=nan)", "estimator 'dge': k must be positive and finite, got nan"),
    ],
)
def test_errors_name_the_value_and_what_is_accepted(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        EstimatorSpec.parse(text)
