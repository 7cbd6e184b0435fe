"""Recipes: what options accept, what they change (and leave alone), and what they say when they are wrong."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.formats import FORMATS
from qcompile.ir.operand import Operand
from qcompile.ir.outliers import OutlierClamp
from qcompile.ir.quantizer import SCALE_RULES, Granularity, Quantizer
from qcompile.ir.recipe import LEFT_WIDE, Recipe
from qcompile.ir.rules import Rule, matches_name
from qcompile.recipes import QUARTET2, RECIPES, STORED
from qcompile.recipes.fp4 import FP4


def raises(message: str):
    """ValueError whose text contains ``message`` literally."""
    return pytest.raises(ValueError, match=re.escape(message))


def changed(before, after) -> set[str]:
    return {f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)}


# --- the published recipe
# -------------------------------------------------------------------------------------------


def test_fp4_is_what_the_paper_prints():
    """arXiv 2501.17116: vector-wise E2M1 both ways, DGE k = 5 cap 3 on weights, OCC α = .99 with compensation
    on activations.
    """
    printed = FP4.override({"variant": "paper"})
    assert printed.activation is not None
    assert printed.weight is not None
    exact = Quantizer(FORMATS["e2m1"], Granularity("row"), SCALE_RULES["absmax"], "even")
    assert printed.activation == Operand(
        exact, EstimatorSpec("ste"), OutlierClamp(alpha=0.99, per="row", compensate=True)
    )
    assert printed.weight == Operand(exact, EstimatorSpec("dge", (("k", 5.0), ("cap", 3.0))))
    assert printed.gradient is None
    assert printed.backward == "bf16"
    assert FP4.skip == LEFT_WIDE
    assert (FP4.heads, FP4.min_side) == (False, 32)
    assert not FP4.attention
    assert FP4.save == "exact"
    assert RECIPES["qcompile_fp4"] == FP4


# options → for each operand, the part it changes and the text of that part.
DEPARTURES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "exact residual, as printed": (
        {"activation": {"outliers": "occ(compensate=1)"}},
        {"activation": "e2m1 row absmax even; ste; occ(alpha=0.99,per=row,compensate=1)"},
    ),
    "power-of-two scales": (
        {"activation": {"scale": "absmax_pow2"}, "weight": {"scale": "absmax_pow2"}},
        {
            "activation": "e2m1 row absmax_pow2 even; ste; occ(alpha=0.99,per=row,compensate=1)",
            "weight": "e2m1 row absmax_pow2 even; dge(k=5,cap=3)",
        },
    ),
    "no compensation of the residual": (
        {"activation": {"outliers": "occ(compensate=0)"}},
        {"activation": "e2m1 row absmax even; ste; occ(alpha=0.99,per=row,compensate=0)"},
    ),
    "quantile over the whole tensor": (
        {"activation": {"outliers": "occ(per=tensor)"}},
        {"activation": "e2m1 row absmax even; ste; occ(alpha=0.99,per=tensor,compensate=1)"},
    ),
    "E1M2 activations (fork ``pai``)": (
        {"activation": {"format": "e1m2", "outliers": "occ(alpha=0.97)"}},
        {"activation": "e1m2 row absmax even; ste; occ(alpha=0.97,per=row,compensate=1)"},
    ),
    "ties toward +∞ (look-up kernel)": (
        {"activation": {"rounding": "half_up"}, "weight": {"rounding": "half_up"}},
        {
            "activation": "e2m1 row absmax half_up; ste; occ(alpha=0.99,per=row,compensate=1,residual=e4m3)",
            "weight": "e2m1 row absmax half_up; dge(k=5,cap=3)",
        },
    ),
    "tensor-wise scales (ablations)": (
        {"activation": {"granularity": "tensor"}, "weight": {"granularity": "tensor"}},
        {
            "activation": "e2m1 tensor absmax even; ste; occ(alpha=0.99,per=row,compensate=1)",
            "weight": "e2m1 tensor absmax even; dge(k=5,cap=3)",
        },
    ),
    "DGE off": ({"weight": {"estimator": "ste"}}, {"weight": "e2m1 row absmax even; ste"}),
    "OCC off": ({"activation": {"outliers": None}}, {"activation": "e2m1 row absmax even; ste"}),
}


@pytest.mark.parametrize("departure", DEPARTURES)
def test_departures_change_what_they_say_and_nothing_else(departure):
    options, expected = DEPARTURES[departure]
    recipe = FP4.override(options)
    assert changed(FP4, recipe) == set(expected)
    for name, text in expected.items():
        assert str(getattr(recipe, name)) == text


def test_the_table_of_departures_is_the_one_in_the_docstring():
    """Each row of the docstring is a row above, option for option: what users copy is what is tested."""
    from qcompile.recipes import fp4

    rows = dict(re.findall(r"^(\S.*?)\s{2,}``(\{.*\})``$", fp4.__doc__ or "", re.M))
    assert {name: eval(options) for name, options in rows.items()} == {n: o for n, (o, _) in DEPARTURES.items()}


# --- Recipe.override
# ------------------------------------------------------------------------------------------------


def test_no_options_change_nothing():
    assert FP4.override({}) == FP4


def test_whole_operand_as_text_replaces_all_of_it():
    recipe = FP4.override({"activation": "midrise4 tensor absmax even; clip"})
    assert recipe.activation == Operand.parse("midrise4 tensor absmax even; clip")
    assert changed(FP4, recipe) == {"activation"}


@pytest.mark.parametrize("operand", ["activation", "weight", "gradient"])
@pytest.mark.parametrize("off", ["off", None])
def test_operands_can_be_switched_off(operand, off):
    base = FP4.override({"gradient": "fp8", "backward": "bf16"})
    recipe = base.override({operand: off})
    assert getattr(recipe, operand) is None
    assert changed(base, recipe) == {operand}


def test_a_wide_backward_drops_the_gradient_of_the_recipe():
    """Else ``backward="bf16"`` of a recipe of all three products would change nothing; a gradient given beside it
    stays, and so does one of a recipe whose backward nobody mentions.
    """
    recipe = QUARTET2.override({"backward": "bf16"})
    assert changed(QUARTET2, recipe) == {"gradient"}
    assert recipe.gradient is None
    assert QUARTET2.override({"backward": "bf16", "gradient": "e4m3 row"}).gradient == Operand.parse("e4m3 row")
    assert QUARTET2.override({"forward": "bf16"}).gradient == QUARTET2.gradient


def test_gradient_aliases():
    """fp8 is the paper's per-tensor E5M2 with the exact scale; bf16 is high precision. They are names for
    gradients only.
    """
    assert FP4.override({"gradient": "fp8"}).gradient == Operand.parse("e5m2 tensor absmax even")
    assert FP4.override({"gradient": "fp8"}).override({"gradient": "bf16"}).gradient is None
    with raises("option 'weight': unknown format 'fp8'; known formats: e2m1"):
        FP4.override({"weight": "fp8"})


def test_an_operand_object_is_taken_as_it_is():
    operand = Operand.parse("e2m1 block16 e4m3 stochastic")
    assert FP4.override({"gradient": operand}).gradient is operand


def test_overrides_compose():
    """Later options build on earlier ones; the field each names is the only one that moves."""
    recipe = FP4.override({"weight": {"format": "midrise4"}}).override(
        {"weight": {"rounding": "half_up", "granularity": "block32"}}
    )
    assert str(recipe.weight) == "midrise4 block32 absmax half_up; dge(k=5,cap=3)"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention", True),
        ("saved_weights", "codes"),
        ("save", "8bit"),
        ("save", "4bit"),
        ("enabled", False),
        ("fuel", 3),
        ("fuel", 0),
        ("fuel", None),
        ("disable_passes", ("fold",)),
        ("enable_passes", ("fuse_producers",)),
        ("strict", True),
        ("debug", True),
    ],
)
def test_plain_options(key, value):
    recipe = FP4.override({key: value})
    assert getattr(recipe, key) == value
    assert changed(FP4, recipe) <= {key}


def test_passes_that_are_named_add_to_the_recipes_own():
    """One more pass must not turn off those that a recipe has."""
    recipe = STORED.override({"enable_passes": ["fuse_producers", "accumulate"]})
    assert recipe.enable_passes == (*STORED.enable_passes, "fuse_producers")
    assert recipe.override({"disable_passes": ["fold"]}).disable_passes == ("fold",)


def test_skip_adds_and_is_remembered_as_the_users():
    """Leaving one more layer alone must not quantize the head. Patterns of the recipe may match nothing; those a user
    gave must be reported when they do not match.
    """
    assert FP4.user_patterns == ()
    recipe = FP4.override({"skip": ["lm_head", "layers.0"]})
    assert recipe.skip == (*LEFT_WIDE, "layers.0")
    assert recipe.user_patterns == ("lm_head", "layers.0")
    assert FP4.override({"skip": []}) == FP4


def test_rules_add_to_the_recipes_own():
    mine, yours = Rule(name="first", quantize=False), Rule(name="second", bits=None)
    assert replace(FP4, rules=(mine,)).override({"rules": [yours]}).rules == (mine, yours)


@pytest.mark.parametrize("order", [1, -1], ids=["defaults first", "defaults last"])
def test_defaults_are_dropped_by_one_word_and_what_is_given_stays(order):
    """Whatever the order of the options."""
    base = replace(FP4, rules=(Rule(name="own", quantize=False),))
    options = {"defaults": False, "skip": ["layers.0"], "rules": [Rule(name="a", quantize=True)], "min_side": 8}
    recipe = base.override(dict(list(options.items())[::order]))
    assert recipe.skip == recipe.user_patterns == ("layers.0",)
    assert recipe.rules == (Rule(name="a", quantize=True),)
    assert (recipe.heads, recipe.min_side) == (True, 8)
    assert FP4.override({"defaults": True}) == FP4


def test_rules_from_plain_data():
    data = {"name": "layers.*.q_proj", "roles": "wgrad", "gradient": "off", "min_size": 10}
    (rule,) = FP4.override({"rules": [data]}).rules
    assert rule == Rule(name="layers.*.q_proj", roles=("wgrad",), gradient="off", min_size=10)
    assert FP4.override({"rules": [rule]}).rules == (rule,)
    assert FP4.override({"rules": [{"roles": ["dgrad", "wgrad"]}]}).rules == (Rule(),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activations": None},
            "unknown option 'activations'; did you mean 'activation'? Known: bits, defaults, variant, ",
        ),
        ({"wieght": "e2m1"}, "unknown option 'wieght'; did you mean 'weight'?"),
        ({"zzz": 1}, "unknown option 'zzz'"),
        ({"name": "mine"}, "unknown option 'name'"),
        ({"user_patterns": []}, "unknown option 'user_patterns'"),
        (
            {"weight": {"foramt": "e2m1"}},
            "option 'weight': unknown operand 'foramt'; did you mean 'format'? Known: format, ",
        ),
        ({"weight": {"format": "fp4"}}, "option 'weight': unknown format 'fp4'; known formats: e2m1, "),
        (
            {"weight": {"granularity": "col"}},
            "option 'weight': unknown granularity 'col'; use tensor, row, block<n>",
        ),
        ({"weight": {"scale": "max"}}, "option 'weight': unknown scale rule 'max'; known: absmax, "),
        (
            {"weight": {"rounding": "down"}},
            "option 'weight': unknown rounding 'down'; known: even, half_up, stochastic, eden",
        ),
        (
            {"weight": {"estimator": "sto"}},
            "option 'weight': unknown estimator 'sto'; known: ste, clip, trust, dge",
        ),
        (
            {"weight": {"scale": "e4m3"}},
            "option 'weight': scale rule e4m3 needs blocks, for example block16; got row",
        ),
        ({"activation": {"outliers": "ooc"}}, "option 'activation': outlier clamp 'ooc' is not 'occ("),
        ({"activation": {"estimator": "dge"}}, "use ste, clip or trust"),
        (
            {"gradient": {"rounding": "stochastic"}},
            "option 'gradient': there is nothing to change in part; give the whole",
        ),
        ({"gradient": "e4m3 row; dge"}, "a gradient takes a quantizer only"),
        ({"gradient": "e4m3 row; ste; occ"}, "a gradient takes a quantizer only"),
        ({"weight": 4}, "option 'weight': takes text, a dictionary or None, got int 4"),
        ({"weight": ["e2m1"]}, "option 'weight': takes text, a dictionary or None, got list ['e2m1']"),
        ({"skip": "lm_head"}, "option 'skip' takes a list of names, got 'lm_head'"),
        ({"skip": [1]}, "option 'skip' takes a list of names, got [1]"),
        ({"skip": 5}, "option 'skip' takes a list of names, got 5"),
        ({"skip": None}, "option 'skip' takes a list of names, got None"),
        ({"disable_passes": "fold"}, "option 'disable_passes' takes a list of names, got 'fold'"),
        ({"save": "2bit"}, "option 'save': '2bit' is not one of exact, 8bit, 4bit"),
        ({"saved_weights": "none"}, "option 'saved_weights': 'none' is not one of recompute, codes"),
        ({"rules": [{"nmae": "x"}]}, "unknown rule 'nmae'; did you mean 'name'?"),
        ({"rules": [{"roles": "fprop"}]}, "role 'fprop' is not 'dgrad' or 'wgrad'"),
    ],
)
def test_errors_name_the_option_the_value_and_what_is_accepted(options, message):
    with raises(message):
        FP4.override(options)


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"enabled": "no"}, "True or False"),
        ({"enabled": 1}, "True or False"),
        ({"fuel": 1.5}, "integer"),
        ({"fuel": True}, "integer"),
        ({"fuel": -1}, "integer"),
        ({"save": 8}, "exact, 8bit, 4bit"),
        ({"saved_weights": None}, "recompute, codes"),
    ],
)
def test_wrong_types_name_the_option_the_value_and_what_is_accepted(options, accepted):
    """`Recipe.override` promises all three in its docstring."""
    ((key, value),) = options.items()
    with pytest.raises(ValueError, match=f"{key}.*{re.escape(repr(value))}.*{re.escape(accepted)}"):
        FP4.override(options)


@pytest.mark.parametrize(
    "options",
    [
        {"weight": {"format": ["e2m1"]}},
        {"weight": {"granularity": 16}},
        {"weight": {"scale": ["absmax"]}},
        {"weight": {"rounding": ["even"]}},
        {"weight": {"estimator": None}},
        {"weight": {"estimator": 5}},
        {"activation": {"outliers": 0.99}},
        {"rules": None},
        {"rules": 5},
        {"rules": "lm_head"},
        {"rules": ["lm_head"]},
        {"rules": [{"min_size": "big"}]},
        {"rules": [{"roles": 3}]},
        {3: True},
    ],
    ids=str,
)
def test_wrong_types_inside_an_option_are_value_errors(options):
    """A user's slip must come back as a ValueError that names the option, not as a TypeError from inside."""
    (key,) = options
    with pytest.raises(ValueError, match=str(key).rstrip("s")):
        FP4.override(options)


# --- rules
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", True),
        ("lm_head", "model.lm_head.linear", True),
        ("lm_head", "lm_head2", False),
        ("lm_head", "model.lm_head2", False),
        ("lm_head", "my_lm_head", False),
        ("layers.0", "model.layers.0", True),
        ("layers.0", "layers.0.mlp.up_proj", True),
        ("layers.0", "model.layers.0.mlp.up_proj", True),
        ("layers.0", "layers.01", False),
        ("layers.0", "model.layers.01.mlp", False),
        ("layers.0", "model.layers.10", False),
        ("layers.0", "sublayers.0", False),
        ("layers.*.q_proj", "model.layers.3.self_attn.q_proj", True),
        ("layers.*.q_proj", "model.layers.3.self_attn.k_proj", False),
        ("*_proj", "model.layers.3.self_attn.k_proj", True),
        ("*_proj", "model.layers.3.mlp.act", False),
        ("layers.?", "layers.7", True),
        ("layers.?", "layers.17", False),
        ("layers.[02].mlp", "layers.2.mlp", True),
        ("layers.[02].mlp", "layers.1.mlp", False),
        ("Head", "head", False),
        ("*", "anything.at.all", True),
        ("*", "", True),
        ("lm_head", "", False),
    ],
)
def test_names_match_on_whole_segments(pattern, name, expected):
    assert matches_name(name, pattern) is expected


def test_rules_match_on_op_and_size_too():
    rule = Rule(name="mlp", op="lin*", min_size=10, max_size=100)
    assert rule.matches("layers.0.mlp.up", "linear", 10)
    assert rule.matches("layers.0.mlp.up", "linear", 100)
    assert not rule.matches("layers.0.mlp.up", "linear", 9)
    assert not rule.matches("layers.0.mlp.up", "linear", 101)
    assert not rule.matches("layers.0.mlp.up", "conv2d", 50)
    assert not rule.matches("layers.0.attn.q", "linear", 50)


def test_unknown_sizes_match_only_rules_without_bounds():
    """A weight of symbolic size: a size bound cannot be said to hold, so the rule is not applied."""
    assert Rule().matches("x", "linear", None)
    assert not Rule(min_size=1).matches("x", "linear", None)
    assert not Rule(max_size=10**9).matches("x", "linear", None)


# --- text form
# ------------------------------------------------------------------------------------------------------

CLAMPS = st.builds(
    OutlierClamp,
    alpha=st.floats(0.5, 0.999999, exclude_min=True),
    per=st.sampled_from(["row", "tensor"]),
    compensate=st.booleans(),
)


@given(CLAMPS)
@settings(max_examples=100, deadline=None)
def test_outlier_clamp_parse_is_the_inverse_of_str(clamp):
    """To the last bit of α: the text is what travels through graphs, and 6 digits of 0.9999999 are 1."""
    assert OutlierClamp.parse(str(clamp)) == clamp


@given(
    quantizer=st.sampled_from(
        ["e2m1 row absmax even", "midrise4 block16 e8m0 half_up", "e2m1 block16x16 e4m3 stochastic"]
    ),
    estimator=st.sampled_from(["ste", "clip", "trust", "dge(k=5,cap=3)", "dge(k=2.5,cap=1)"]),
    alpha=st.sampled_from([None, 0.9, 0.97, 0.99, 0.999]),
    compensate=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_operand_parse_is_the_inverse_of_str(quantizer, estimator, alpha, compensate):
    outliers = OutlierClamp(alpha, "row", compensate) if alpha and not estimator.startswith("dge") else None
    operand = Operand(Quantizer.parse(quantizer), EstimatorSpec.parse(estimator), outliers)
    assert Operand.parse(str(operand)) == operand


def test_parts_of_an_operand_may_come_in_any_order_and_be_left_out():
    full = Operand.parse("e2m1 row absmax even; clip; occ(alpha=0.99,per=row,compensate=1)")
    assert Operand.parse(" e2m1 ;occ; clip") == full
    assert Operand.parse("e2m1") == replace(full, estimator=EstimatorSpec("ste"), outliers=None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("occ(alpha=0.5)", "alpha must lie in (0.5, 0.999999], got 0.5"),
        ("occ(alpha=1)", "alpha must lie in (0.5, 0.999999], got 1"),
        ("occ(alpha=nan)", "alpha must lie in (0.5, 0.999999], got nan"),
        ("occ(per=column)", "per must be 'row' or 'tensor', got 'column'"),
        ("occ(alhpa=0.9)", "unknown occ 'alhpa'; did you mean 'alpha'? Known: alpha, per, compensate"),
        ("occ(0.99)", "unknown occ '0.99'"),
        ("occ(alpha=0.99", "outlier clamp 'occ(alpha=0.99' is not 'occ(alpha=0.99,per=row,compensate=1)'"),
        ("occ(alpha=high)", "outlier clamp 'occ(alpha=high)'"),
        ("occ(compensate=yes)", "compensate must be 0 or 1, got 'yes'"),
        ("occ(compensate=2)", "compensate must be 0 or 1, got '2'"),
    ],
)
def test_outlier_clamp_errors(text, message):
    with raises(message):
        OutlierClamp.parse(text)


@pytest.mark.parametrize("text", ["e2m1; ste; clip", "e2m1; occ; occ(alpha=0.9)", "e2m1;", "e2m1; ;clip"])
def test_operands_with_a_part_twice_or_empty_are_refused(text):
    """Two estimators in one operand: dropping the first silently would train something else."""
    with pytest.raises(ValueError, match=r"estimator|outlier"):
        Operand.parse(text)


def test_occ_and_dge_do_not_combine():
    with raises("occ(...) clamps the input that dge takes its slope from; use ste, clip or trust"):
        Operand.parse("e2m1; dge; occ")


def test_option_names_are_the_fields_users_may_set():
    hidden = {"name", "source", "widths", "variants", "user_patterns", "user_rules"}
    assert set(Recipe.option_names()) == {"bits", "defaults", "variant", *(f.name for f in fields(Recipe))} - hidden
