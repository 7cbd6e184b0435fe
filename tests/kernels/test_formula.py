"""The formula layer: what is recorded, and that every target computes the same from it."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable

import pytest
import torch

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.formats import FORMATS, get_format
from qcompile.ir.formulas import floor_log2, power_of_two
from qcompile.ir.quantizer import SCALE_RULES, SCALE_STORES, Granularity, Quantizer, ScaleRule
from qcompile.kernels.cpp import load
from qcompile.kernels.estimate import reference as estimate_reference
from qcompile.kernels.formula import estimators, rounding, scales
from qcompile.kernels.formula.cpp_target import cpp_function
from qcompile.kernels.formula.expression import FLOAT, Formula, Value, where
from qcompile.kernels.formula.layout import why_not_rounded
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.formula.triton_target import triton_source
from qcompile.kernels.quantize import reference

NAN, INFINITY = math.nan, math.inf
SPECIAL = torch.tensor([0.0, -0.0, NAN, -NAN, INFINITY, -INFINITY, 1e-40, -1e-40, 3e38, -3e38, 1.0, -1.0])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, zeros by sign and NaN like NaN."""
    if a.dtype != torch.float32:
        return torch.equal(a, b)
    return torch.equal(a.nan_to_num(7.0).view(torch.int32), b.nan_to_num(7.0).view(torch.int32)) and torch.equal(
        a.isnan(), b.isnan()
    )


def around(fmt) -> torch.Tensor:
    """Numbers on and beside every decision of a format, and random ones."""
    exact = torch.tensor([*fmt.thresholds, *fmt.magnitudes])
    near = [exact, torch.nextafter(exact, exact + 1), torch.nextafter(exact, torch.zeros_like(exact))]
    y = torch.cat([*near, torch.randn(999, generator=torch.Generator().manual_seed(1)) * fmt.max / 2])
    return torch.cat([y, -y, SPECIAL])


def run_cpp(formula: Formula, *inputs: torch.Tensor) -> torch.Tensor:
    """A formula of float32 inputs and one float32, int32 or bool output as the C++ target prints it."""
    (output,) = formula.outputs
    dtype = torch.float32 if output.dtype == torch.float32 else torch.int32
    names = [f"x{i}" for i in range(len(inputs))]
    arguments = ", ".join(f"const float* {name}" for name in names)
    call = f"{formula.name}({', '.join(f'{name}[i]' for name in names)})"
    kind = "float" if dtype == torch.float32 else "int32_t"
    head = f'extern "C" void run({arguments}, {kind}* out, int64_t n)'
    loop = f"{head} {{ for (int64_t i = 0; i < n; ++i) out[i] = {call}; }}"
    out = torch.full(inputs[0].shape, -1, dtype=dtype)
    run = load(cpp_function(formula) + loop, pointers=len(inputs) + 1, integers=1)
    run(*(x.data_ptr() for x in inputs), out.data_ptr(), out.numel())
    return out.bool() if output.dtype == torch.bool else out


# --- what is recorded -----------------------------------------------------------------------------------------------


def test_text_says_what_is_computed_and_nothing_else():
    """The text is what caches tell formulas apart by: names must not show in it, constants must."""
    one = Formula.record("one", lambda y: where(y < 0, -1.0, y * 0.1), y=FLOAT)
    same = Formula.record("other", lambda y: torch.where(y < 0.0, -1.0, 0.1 * y), y=FLOAT)
    different = Formula.record("one", lambda y: where(y < 0, -1.0, y * 0.1000001), y=FLOAT)
    assert one.text == same.text
    assert one.digest == same.digest
    assert one.digest != different.digest


def test_constants_are_float32_numbers():
    """Targets would each round 0.1 in their own way: C++ multiplies by a double, Triton by a float."""
    formula = Formula.record("tenth", lambda y: y * 0.1, y=FLOAT)
    assert torch.tensor(0.1).item().hex() in formula.text


def test_formulas_are_recorded_where_a_subclass_of_tensors_is_at_work():
    """Its ``__torch_function__`` runs ops with overriding turned off, and the first op of a kind records formulas."""
    with torch._C.DisableTorchFunctionSubclass():
        formula = Formula.record("f", lambda y: torch.where(y < 0, -1.0, 1.0), y=torch.float32)
    assert "where" in formula.text


def test_what_is_computed_twice_is_printed_once():
    formula = Formula.record("twice", lambda y: (y * y + 1) / (y * y + 1), y=FLOAT)
    assert [step.op for step in formula.steps] == ["mul", "add", "div"]


def test_what_no_output_needs_is_not_printed():
    def level_only(y):
        level, _ = rounding.nearest_level(y, get_format("int4"), "even")
        return level

    both = len(rounding.nearest(get_format("int4"), "even").steps)
    assert len(Formula.record("level", level_only, y=FLOAT).steps) < both


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: 1.0 if y > 0 else 0.0, "no branches on values: write torch.where"),
        (lambda y: torch.sin(y), "torch.sin has no scalar formula"),
        (lambda y: 1.0, "returned float, not a value computed from y"),
        (lambda y: y + (y > 0), "add of float32 and bool: convert one of them"),
        (lambda y: y**y, "to constant powers only"),
        (lambda y: ~y, "inverts conditions"),
        (lambda y: y.int() + 0.5, "0.5 beside an int32 value"),
    ],
)
def test_what_is_no_formula_is_refused_with_the_reason(function: Callable, message: str):
    """A formula that records something else than it says would be wrong in a kernel only."""
    with pytest.raises(TypeError, match=re.escape(message)):
        Formula.record("wrong", function, y=FLOAT)


# --- targets --------------------------------------------------------------------------------------------------------


def random_formula(seed: int) -> Formula:
    """A formula of two inputs from all operations that round once."""
    draw = random.Random(seed)

    def build(x: Value, y: Value) -> Value:
        values = [x, y]
        for _ in range(12):
            a, b = draw.choice(values), draw.choice(values)
            number = draw.choice([0.3, -1.5, 2.0, 7.25, 1e-3])
            made = [
                lambda a=a, b=b: a + b,
                lambda a=a, n=number: n - a,
                lambda a=a, b=b: a * b,
                lambda a=a, n=number: a / n,
                lambda a=a, b=b: a / b,
                lambda a=a: abs(a),
                lambda a=a: -a,
                lambda a=a: a.floor(),
                lambda a=a: abs(a).sqrt(),
                lambda a=a, b=b: where(a <= b, a, b),
                lambda a=a, b=b, n=number: where((a > n) | ~(b < 0.0), a, 1.0),
                lambda a=a: a.clamp(-2.0, 3.0),
                lambda a=a: a.sign(),
                lambda a=a: (a.view(torch.int32) & ~0xFFFF).view(torch.float32),
                lambda a=a, b=b: where((a >= b) & (a != 0.0), floor_log2(abs(a)), 3).float(),
                lambda a=a, b=b: power_of_two(where(a == b, 5, floor_log2(abs(b)) >> 1)),
            ]
            values.append(draw.choice(made)())
        return values[-1]

    return Formula.record("random_formula", build, x=FLOAT, y=FLOAT)


@pytest.mark.parametrize("seed", range(12))
def test_targets_compute_the_same(seed: int):
    """Every operation in C++ against torch, special numbers included. A contraction or a branch would show."""
    formula = random_formula(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([torch.randn(1003, generator=generator) * 3, SPECIAL.repeat_interleave(len(SPECIAL))])
    y = torch.cat([torch.randn(1003, generator=generator), SPECIAL.repeat(len(SPECIAL))])
    assert same_bits(run_cpp(formula, x, y), evaluate(formula, x, y))


def test_power_is_within_a_unit_of_the_last_place():
    base = torch.cat([torch.linspace(1e-30, 9, 5001), torch.tensor([0.0, 1e-41, 1.0, INFINITY, NAN, -1.0])])
    for exponent in (-0.8, 0.2, 2.5, -3.0):
        formula = Formula.record("raised", lambda x, e=exponent: x**e, x=FLOAT)
        got, expected = run_cpp(formula, base), evaluate(formula, base)
        assert torch.equal(got.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert (got[number].view(torch.int32) - expected[number].view(torch.int32)).abs().max() <= 1


def test_triton_text():
    """The module that stays on disk; a reader of a traceback sees these lines."""
    formula = Formula.record("halved", lambda y: where(y < 0, 0.0, y / 3), y=FLOAT)
    assert triton_source(formula) == (
        "def halved(y):\n"
        "    v0 = y < 0.0\n"
        "    v1 = tl.math.div_rn(y, 3.0)\n"
        "    v2 = tl.where(v0, 0.0, v1)\n"
        "    return v2\n"
    )


# --- the formulas against the references ----------------------------------------------------------------------------


def roundings_of(fmt) -> list[str]:
    return ["even"] if fmt.torch_dtype else ["even", "half_up"]


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if not why_not_rounded(fmt)])
def test_rounding(name: str):
    """Codes and levels at every threshold, level, neighbour of them, zero of either sign, NaN and infinity."""
    fmt = get_format(name)
    y = around(fmt.grid)
    for way in roundings_of(fmt):
        codes = reference.encode(y, Quantizer(fmt, rounding=way)).int()
        assert torch.equal(evaluate(rounding.encode(fmt, way), y), codes)
        assert torch.equal(run_cpp(rounding.encode(fmt, way), y), codes)
        levels = reference.decode(codes.to(torch.uint8), fmt)
        assert same_bits(evaluate(rounding.round_level(fmt, way), y), levels)
        assert same_bits(evaluate(rounding.decode(fmt), codes), levels)


def statistics_of(q: Quantizer) -> torch.Tensor:
    exponents = torch.linspace(-149, 128, 4001, dtype=torch.float64)
    amax = (2.0**exponents).float().nan_to_num(posinf=3e38)
    if q.scale.statistic == "rms":
        return torch.cat([amax, torch.tensor([0.0, INFINITY, NAN])]).double()
    return torch.cat([amax.clamp(min=q.amax_floor), torch.tensor([q.amax_floor, INFINITY, NAN])])


@pytest.mark.parametrize("rule", list(SCALE_RULES))
@pytest.mark.parametrize("name", ["e2m1", "midrise1", "int8", "e5m2"])
def test_scales(rule: str, name: str):
    """Stored scale, scale and reciprocal over all exponents of float32."""
    q = Quantizer(get_format(name), Granularity("block", 16), SCALE_RULES[rule])
    amax = statistics_of(q)
    whole = (torch.tensor(0.37),) if q.scale.two_level else ()
    stored, scale, gamma = reference.scale_pair(amax, q, *whole)
    got = evaluate(scales.stored_scale(q), amax, *whole)
    assert same_bits(got, stored if stored.dtype == torch.float32 else stored.view(torch.uint8).int())
    assert same_bits(evaluate(scales.reciprocal(q), amax, *whole), gamma)
    assert same_bits(evaluate(scales.load_scale(q), got, *whole), scale)


@pytest.mark.parametrize("store", list(SCALE_STORES))
def test_stores_round_as_torch_does(store: str):
    """To the nearest, ties to even, saturating. A store whose rounding were off would shift every scale."""
    kept = scales.store_of(store)
    numbers = torch.cat([(2.0 ** torch.linspace(-140, 100, 3001, dtype=torch.float64)).float(), torch.rand(999) * 500])
    encode = Formula.record("encode", kept.encode, scale=FLOAT)
    bits = evaluate(encode, numbers)
    if store == "fp32":
        assert torch.equal(bits, numbers)
        return
    back = evaluate(Formula.record("decode", kept.decode, bits=torch.int32), bits)
    assert evaluate(Formula.record("encode", kept.encode, scale=FLOAT), torch.tensor(NAN)).item() in (
        0xFF,
        0x7F,
        0x7FC0,
        0x7E00,
    )
    if store in ("e8m0", "ue5m3"):
        assert torch.equal(evaluate(encode, back), bits)
        assert (back[:3001].diff() >= 0).all()  # ordered
        normal = (numbers > 2.0**-14) & (numbers < 2.0**15)
        if store == "ue5m3":  # three bits of mantissa
            assert ((back - numbers).abs()[normal] <= numbers[normal] * 2.0**-4).all()
        return
    dtype = getattr(torch, SCALE_STORES[store])
    expected = numbers.clamp(max=torch.finfo(dtype).max).to(dtype)
    assert torch.equal(back, expected.float())
    assert torch.equal(bits, expected.view(torch.uint8 if dtype.itemsize == 1 else torch.int16).int())


ESTIMATORS = ["clip", "clip(s=1.3)", "trust", "trust(t=0.1)", "trust(t=3.3)"]


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4", "midrise1", "midrise4", "midrise4p", "e4m3"])
def test_masks(name: str):
    """Masks recorded from the estimators' own formulas against the papers' in plain torch."""
    fmt = get_format(name)
    y = around(fmt.grid)
    level = reference.decode(reference.encode(y, Quantizer(fmt)), fmt)
    for text in ESTIMATORS:
        spec = EstimatorSpec.parse(text)
        expected = estimate_reference.mask_of(spec, y, level, fmt)
        assert torch.equal(evaluate(estimators.mask(spec, fmt), y, level), expected)
        if not estimators.why_no_mask(spec, fmt):
            assert torch.equal(run_cpp(estimators.mask_of_input(spec, fmt, "even"), y), expected)


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "int4", "midrise1"])
@pytest.mark.parametrize("text", ["dge", "dge(k=2,cap=10)", "dge(k=1,cap=3)"])
def test_slopes(name: str, text: str):
    """Bins and positions are exact; the power may differ in its last place, which the division by k keeps."""
    fmt, spec = get_format(name), EstimatorSpec.parse(text)
    y = around(fmt)
    got, expected = evaluate(estimators.slope(spec, fmt), y), estimate_reference.slope_of(spec, y, fmt)
    assert torch.equal(got.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert (got[number].view(torch.int32) - expected[number].view(torch.int32)).abs().max() <= 1


def test_the_slope_of_a_pruned_format_is_that_of_its_grid():
    """Its 0 is given to dropped elements only; as a level it made a bin without width."""
    spec, fmt = EstimatorSpec.parse("dge"), get_format("midrise4p")
    y = around(fmt.grid)
    assert estimators.slope(spec, fmt).text == estimators.slope(spec, fmt.grid).text
    got, expected = (estimate_reference.slope_of(spec, y, f) for f in (fmt, fmt.grid))
    assert torch.equal(got.nan_to_num(9), expected.nan_to_num(9))


@pytest.mark.parametrize("two_level", [False, True])
def test_a_rule_of_its_formula_alone(two_level: bool):
    """Reference, C++ and dequantize of a rule that nothing names: by blocks, stored in each of the stores."""
    whole = (torch.tensor(0.37),) if two_level else ()
    x = torch.randn(5, 77, generator=torch.Generator().manual_seed(2)) * 3
    x[1] = 0
    x[2, 3] = NAN
    for store in SCALE_STORES:
        name = f"nine_tenths_{store}_{'two' if two_level else 'one'}"
        rule = ScaleRule(name, lambda amax, fmt: amax * 0.9 / fmt.max, store=store, two_level=two_level)
        SCALE_RULES[rule.name] = rule
        try:
            text = f"e2m1 block16 {rule.name} even"
            expected = reference.quantize(x, text, -1, *whole)
            got = torch.ops.qcompile.quantize(x, text, -1, *whole)
            for a, b in zip(got, expected, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), store
            wide = torch.ops.qcompile.dequantize(*got, text, -1, 77, torch.float32, *whole)
            assert same_bits(wide, reference.dequantize(*expected, text, -1, 77, torch.float32, *whole)), store
            finite = wide[[0, 3, 4]]
            assert ((finite - x[[0, 3, 4]]).abs() <= x[[0, 3, 4]].abs().amax(1, keepdim=True)).all()  # no garbage
        finally:
            del SCALE_RULES[rule.name]
