"""Formats: the values of every code against the published tables and against ml_dtypes."""

from __future__ import annotations

import math
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch

from qcompile.ir.formats import FORMATS, get_format
from qcompile.kernels.quantize.reference import decode, encode

ALL = [pytest.param(fmt, id=name) for name, fmt in FORMATS.items()]

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


@pytest.mark.parametrize("fmt", ALL)
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
    for value in (*fmt.magnitudes, *fmt.thresholds):
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
    levels = np.array([*fmt.magnitudes, *(-m for m in fmt.magnitudes)])
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
    from qcompile.ir.quantizer import Quantizer

    codes = every_code(fmt)
    levels = decode(codes, fmt)
    if fmt.pruned:  # 0 has one code, and nothing is rounded to it
        codes, levels = codes[levels != 0], levels[levels != 0]
    assert torch.equal(encode(levels, Quantizer(fmt)), codes)


@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS.values() if fmt.pruned], ids=lambda fmt: fmt.name)
def test_pruned_formats_give_zero_to_what_is_dropped_only(fmt):
    """Kept elements take the codes of the grid, one magnitude up; the smallest of them is not drawn to 0."""
    from qcompile.ir.quantizer import Quantizer

    y = torch.linspace(-fmt.max - 1, fmt.max + 1, 501)
    keep = torch.arange(501) % 3 > 0
    levels = decode(encode(y, Quantizer(fmt), keep=keep), fmt)
    expected = decode(encode(y, Quantizer(fmt.grid)), fmt.grid)
    assert torch.equal(levels, torch.where(keep, expected, 0.0))
    assert fmt.grid.with_zero == fmt == fmt.with_zero
    assert fmt.levels[0] == 0


def test_unknown_format_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown format 'e2m2'.*e2m1, e1m2, e3m0, e4m3, e5m2, midrise1"):
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
