"""Formats: the values of every code against the published tables and against ml_dtypes."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.formats import FORMATS, Format, get_format
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.formula import rounding as formulas
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.quantize.reference import decode, encode

ALL = [pytest.param(fmt, id=name) for name, fmt in FORMATS.items()]
SYMMETRIC = [pytest.param(fmt, id=name) for name, fmt in FORMATS.items() if fmt.magnitudes]
CODE_BOOKS = [pytest.param(fmt, id=name) for name, fmt in FORMATS.items() if fmt.codebook]

# Copied from the papers: OCP MX v1.0 and arXiv 2501.17116 Table 4.
PUBLISHED = {
    "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "e1m2": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5),
    "e3m0": (0, 0.25, 0.5, 1, 2, 4, 8, 16),
    "midrise1": (0.5,),
    "midrise2": (0.5, 1.5),
    "midrise3": (0.5, 1.5, 2.5, 3.5),
    "midrise4": (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5),
    "int2": (0, 1),
    "int3": (0, 1, 2, 3),
    "int4": (0, 1, 2, 3, 4, 5, 6, 7),
}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def every_code(fmt) -> torch.Tensor:
    """All codes of non-NaN, finite values, uint8: magnitudes first, then the same with the sign bit."""
    if fmt.codebook:
        return torch.arange(len(fmt.codebook)).to(torch.uint8)
    index = torch.arange(len(fmt.magnitudes))
    return torch.cat([index, index + 2 ** (fmt.bits - 1)]).to(torch.uint8)


@pytest.mark.parametrize("name", PUBLISHED)
def test_magnitudes_are_the_published_table(name):
    assert FORMATS[name].magnitudes == PUBLISHED[name]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_means_what_ml_dtypes_says(name):
    fmt, dtype = FORMATS[name], ML_DTYPES[name]
    codes = every_code(fmt)
    theirs = codes.numpy().view(dtype).astype(np.float32)
    ours = decode(codes, fmt).numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32), "−0 counts too")
    assert fmt.max == float(ml_dtypes.finfo(dtype).max)
    assert 2**fmt.bits - len(codes) == np.sum(
        ~np.isfinite(np.arange(2**fmt.bits, dtype=np.uint8).view(dtype).astype(np.float32))
    )


def test_int4_grids_against_ml_dtypes_int4():
    """midrise4 is (k + ½) for every two's-complement k; int4 is the symmetric part, without −8."""
    k = np.arange(16, dtype=np.uint8).view(ml_dtypes.int4).astype(np.float64)
    half = decode(every_code(FORMATS["midrise4"]), FORMATS["midrise4"]).numpy()
    centred = decode(every_code(FORMATS["int4"]), FORMATS["int4"]).numpy()
    assert set(half) == set(k + 0.5)
    assert set(centred) == set(k) - {-8.0}


@pytest.mark.parametrize("fmt", SYMMETRIC)
def test_derived_attributes(fmt):
    """Thresholds, largest value and exponent, and the uniform step follow from the magnitudes."""
    m = fmt.magnitudes
    assert list(m) == sorted(set(m)), "ascending, no value twice"
    assert fmt.has_zero == (fmt.grid.magnitudes[0] == 0)
    assert fmt.max == m[-1]
    assert fmt.max_exponent == math.floor(math.log2(m[-1]))
    assert len(fmt.thresholds) == len(m) - 1
    for i, t in enumerate(fmt.thresholds):
        assert t - m[i] == m[i + 1] - t > 0
    if fmt.step is not None:
        assert {hi - lo for lo, hi in pairwise(m)} <= {fmt.step}
    assert len(m) <= 2 ** (fmt.bits - 1), "index and sign fit a code"


@pytest.mark.parametrize("fmt", ALL)
def test_thresholds_and_magnitudes_are_exact_in_float32(fmt):
    """Rounding compares in float32; a threshold that float32 cannot hold would move a tie."""
    for value in (*fmt.levels, *fmt.thresholds):
        assert float(np.float32(value)) == value


@pytest.mark.parametrize("fmt", ALL)
def test_codes_per_byte(fmt):
    """A code takes the next power of two of bits: no code straddles two bytes."""
    width = next(w for w in (1, 2, 4, 8) if w >= fmt.bits)
    assert fmt.codes_per_byte == 8 // width


def _exact_in(dtype, values: np.ndarray) -> bool:
    return bool(np.all(values.astype(dtype).astype(np.float64) == values))


@pytest.mark.parametrize("fmt", ALL)
def test_tensor_core_type_by_brute_force(fmt):
    """The named type holds f·v − o of every level v exactly; plain levels are preferred, then twice them, then those
    beside by ½; where no type is named, none does.
    """
    fits = []
    levels = np.array([*fmt.codebook, *fmt.magnitudes, *(-m for m in fmt.magnitudes)])
    for offset, factor in ((0.0, 1.0), (0.0, 2.0), (0.5, 1.0)):
        for name, dtype, least, most in (
            ("e4m3", ml_dtypes.float8_e4m3fn, -448, 448),
            ("int8", np.int8, -128, 127),
            ("e5m2", ml_dtypes.float8_e5m2, -57344, 57344),
        ):
            values = factor * levels - offset
            if values.min() >= least and values.max() <= most and _exact_in(dtype, values):
                fits.append((name, factor, offset))
    expected = fits[0] if fits else (None, 1.0, 0.0)
    assert (fmt.tensor_core_type, fmt.tensor_core_factor, fmt.tensor_core_offset) == expected


def test_only_eight_bits_of_half_integers_need_an_offset():
    """An offset costs sums of codes: no format may get one that does without."""
    assert [(fmt.name, fmt.tensor_core_offset) for fmt in FORMATS.values() if fmt.tensor_core_offset] == [
        ("midrise8", 0.5)
    ]
    assert {fmt.name for fmt in FORMATS.values() if fmt.tensor_core_factor == 2} == {
        f"midrise{bits}{kind}" for bits in (5, 6, 7) for kind in ("", "p")
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        **dict.fromkeys(("e2m1", "e1m2", "e3m0", "midrise4", "int4", "e4m3"), "e4m3"),
        **dict.fromkeys(("midrise5", "midrise7", "midrise8", "int8"), "int8"),
        "e5m2": "e5m2",
    }.items(),
)
def test_tensor_core_type_of_the_formats_recipes_use(name, expected):
    assert FORMATS[name].tensor_core_type == expected


@pytest.mark.parametrize("fmt", ALL)
def test_levels_survive_a_round_trip(fmt):
    """encode(decode(code)) == code for every code: no level rounds to its neighbour, the sign of zero is
    kept.
    """
    codes = every_code(fmt)
    levels = decode(codes, fmt)
    if fmt.pruned:  # 0 has one code, and nothing is rounded to it
        codes, levels = codes[levels != 0], levels[levels != 0]
    assert torch.equal(encode(levels, Quantizer(fmt)), codes)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.pruned], ids=lambda fmt: fmt.name)
def test_pruned_formats_give_zero_to_what_is_dropped_only(fmt):
    """Kept elements take the codes of the grid, one magnitude up; the smallest of them is not drawn to 0."""
    y = torch.linspace(-fmt.max - 1, fmt.max + 1, 501)
    keep = torch.arange(501) % 3 > 0
    levels = decode(encode(y, Quantizer(fmt), keep=keep), fmt)
    expected = decode(encode(y, Quantizer(fmt.grid)), fmt.grid)
    assert torch.equal(levels, torch.where(keep, expected, 0.0))
    assert fmt.grid.with_zero == fmt == fmt.with_zero
    assert fmt.levels[0] == 0


@pytest.mark.parametrize("fmt", CODE_BOOKS)
def test_what_follows_from_a_code_book(fmt):
    """Codes in order of levels, midpoints, the gap, the interval of 0 and the code of dropped elements. Books end at 1,
    but for those of integers.
    """
    levels = sorted({*fmt.codebook})
    unsigned, largest = levels[0] == 0, max(map(abs, levels))
    assert largest == 1.0 or all(level == int(level) for level in levels)
    assert list(fmt.sorted_levels) == levels
    assert [fmt.codebook[code] for code in fmt.ranked_codes] == levels
    assert list(fmt.thresholds) == [float(np.float32((a + b) / 2)) for a, b in pairwise(levels)]
    y = torch.cat([torch.tensor(fmt.thresholds), torch.tensor(fmt.thresholds).nextafter(torch.tensor(largest + 1))])
    assert fmt.half_gap == (y - decode(encode(y, Quantizer(fmt)), fmt)).abs().max()
    assert fmt.max == largest
    assert (fmt.centred, fmt.has_zero) == (levels[0] == -levels[-1], True)
    assert math.copysign(1.0, fmt.codebook[fmt.zero_code]) == 1.0 == fmt.codebook[fmt.zero_code] + 1.0
    assert fmt.around_zero is not None
    low, high = fmt.around_zero
    inside = torch.tensor([low * 0.99, high * 0.99, low * 1.01, high * 1.01])
    assert (decode(encode(inside, Quantizer(fmt)), fmt) == 0).tolist() == [True, True, unsigned, False]
    keep = torch.tensor([True, False])
    assert decode(encode(torch.ones(2), Quantizer(fmt), keep=keep), fmt).tolist() == [1.0, 0.0]


def test_nf4_by_its_construction():
    """Quantiles of the normal distribution, eight of the positive half and seven of the negative, and 0 (QLoRA App. E).

    The table was computed in lower precision: 1.5e-7 apart.
    """
    normal, offset = NormalDist(), 0.9677083
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative]))
    np.testing.assert_allclose(FORMATS["nf4"].codebook, levels / levels.max(), rtol=0, atol=1.5e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nf4", 4, (-1.0, 0.0, 1.0)), r"magnitude -1.0 is negative; give signed levels as codebook="),
        (("twelve", 4, tuple(range(12))), r"12 magnitudes in 4 bits, which hold 8 and a sign; give more bits"),
        (("falls", 4, (0.0, 2.0, 1.0)), r"magnitudes 2.0, 1.0 do not ascend \(as float32\); sort them"),
        (("twice", 4, (0.0, 1.0, 1.0)), r"magnitudes 1.0, 1.0 do not ascend"),
        (("nil", 4, (0.0,)), r"the only magnitude is 0; give one above"),
        (("nan", 4, (0.0, math.nan)), r"level nan is not a finite float32 number"),
        (("huge", 4, (0.0, 1e39)), r"level 1e\+39 is not a finite float32 number"),
        (("step", 4, (0.0, 1.0, 3.0), 1.0), r"step=1.0, but the magnitudes are not that far apart; leave step= out"),
        (("wide", 9, (0.0, 1.0)), r"bits=9; a code has 1 to 8 bits"),
        (("none", 0, (0.0, 1.0)), r"bits=0; a code has 1 to 8 bits"),
        (("Nf4", 4, (0.0, 1.0)), r"a name is a lower-case letter, then letters, digits or _"),
        (("empty", 4), r"give either magnitudes=, for levels of both signs, or codebook="),
    ],
)
def test_values_that_make_no_format(arguments, message):
    """Each was taken without a word, and its rounding was that of another grid."""
    with pytest.raises(ValueError, match=rf"^format '{arguments[0]}': {message}"):
        Format(*arguments)


@pytest.mark.parametrize(
    ("levels", "others", "message"),
    [
        (tuple(range(-8, 9)), {}, r"17 levels in 4 bits, which hold 16; give more bits or fewer levels"),
        ((0.0, 1.0, 0.0), {}, r"level 0.0 is there twice"),
        ((1.0, 1.0 + 2.0**-30), {}, r"level 1.0 is there twice \(as float32\); every level has one code"),
        ((0.0, math.inf), {}, r"level inf is not a finite float32 number"),
        ((0.0, -0.0), {}, r"a code book has two different levels at least"),
        ((1.0,), {}, r"a code book has two different levels at least"),
        ((0.0, 1.0), {"step": 1.0}, r"step=, torch_dtype= and pruned= are for formats with magnitudes="),
        ((0.0, 1.0), {"magnitudes": (0.0, 1.0)}, r"give either magnitudes="),
    ],
)
def test_levels_that_make_no_code_book(levels, others, message):
    with pytest.raises(ValueError, match=rf"^format 'mine': {message}"):
        Format("mine", 4, codebook=levels, **others)


def test_a_code_book_need_not_hold_zero_nor_both_signs():
    """Levels of one sign, unsorted: saturation, NaN, ties and the clip interval are those of the levels there are."""
    fmt = Format("mine", 2, codebook=(5, -1, 2))
    assert (fmt.range, fmt.centred, fmt.has_zero, fmt.max, fmt.levels) == ((-1, 5), False, False, 5, (5, -1, 2, 0))
    assert (fmt.around_zero, fmt.half_gap, fmt.thresholds) == (None, 1.5, (0.5, 3.5))
    y = torch.tensor([-9.0, -math.inf, 0.5, 0.6, 3.5, 9.0, math.inf, math.nan])
    assert decode(encode(y, Quantizer(fmt)), fmt).tolist() == [-1, -1, -1, 2, 2, 5, 5, 5]
    assert decode(encode(y, Quantizer(fmt, rounding="half_up")), fmt).tolist() == [-1, -1, 2, 2, 5, 5, 5, 5]
    for rounding in ("even", "half_up"):
        assert torch.equal(
            evaluate(formulas.encode(fmt, rounding), y), encode(y, Quantizer(fmt, rounding=rounding)).int()
        )
    clip, trust = EstimatorSpec.parse("clip"), EstimatorSpec.parse("trust")
    y = torch.tensor([-1.1, -1.0, 5.0, 5.1, math.nan])
    assert clip.mask(y, y, fmt).tolist() == [False, True, True, False, False]
    assert clip.bound(fmt) is trust.bound(fmt) is None, "|y| decides of centred levels only"
    with pytest.raises(ValueError, match="mine has no level 0 and no spare code"):
        _ = fmt.with_zero


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown format 'e2m2'.*e2m1, e1m2, e3m0, e4m3, e5m2, nf4, af4, fp4bnb, dynamic8, midrise1"
    ):
        get_format("e2m2")


@pytest.mark.parametrize(
    ("former", "name"),
    [("int1", "midrise1"), ("int2z", "int2"), ("int8z", "int8"), ("int1p", "midrise1p"), ("int7p", "midrise7p")],
)
def test_former_names_tell_the_new_one(former, name):
    """A recipe written for the old names must not fail with a list to guess from."""
    with pytest.raises(ValueError, match=rf"^unknown format '{former}': {former} is now {name}$"):
        get_format(former)
    assert get_format(name).name == name


def test_fresh_memory_reads_as_nan():
    """Guards the guard in conftest.py: a kernel that forgets to write an output must not find zeros there."""
    x = torch.ones(3, dtype=torch.float32)
    for fresh in (
        torch.empty(1001),
        x.new_empty(7, 5),
        torch.empty_like(x),
        torch.empty_strided((5, 3), (1, 5)),
    ):
        assert fresh.isnan().all()
    assert torch.empty(64, dtype=torch.bfloat16).isnan().any()
