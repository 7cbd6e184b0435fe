"""What users do wrong, and the one line they get for it: it names the option (or layer), the value, and what to do.

Torch wraps what a backend raises in ``BackendCompilerFailed``; its first line names the backend, the second is ours.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.passes.pass_base import Observations
from qcompile.recipes.fp4 import FP4
from qcompile.session import UnmatchedRuleError

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def eagerly(gm, inputs, **kwargs):
    return compile_with(FP4.override({"min_side": 0}), gm, inputs, inner_compile=compat.eager_inner_compile, **kwargs)


def step(options: Any) -> None:
    """Two training steps of a compiled model: a rule that matched nothing is an error in the second."""
    call = torch.compile(Mlp(), backend=eagerly, options=options)
    for _ in range(2):
        call(torch.randn(5, 24)).sum().backward()


def rule(**fields: Any) -> dict[str, Any]:
    return {"rules": [{"name": "up", **fields}]}


FORMATS = r"known formats: e2m1, e1m2, e3m0, .*int8$"
OPTIONS = r"Known: bits, defaults, variant, activation, weight, gradient, dgrad_weight, .*, and Inductor's$"
QUANTIZER = r"is not '<format> \[<granularity>\] \[<scale rule>\] \[<rounding>\]', in any order$"

#: What the user does → options, and a regular expression for the whole line.
BAD: dict[str, tuple[Any, str]] = {
    # names of options
    "misspelt option": ({"activatoin": "e2m1"}, rf"unknown option 'activatoin'; did you mean 'activation'\? {OPTIONS}"),
    "misspelt option of Inductor's": (
        {"max_autotun": True},
        r"unknown option 'max_autotun'; did you mean 'max_autotune'\? Known: .*",
    ),
    "dashes in an option": (
        {"saved-weights": "codes"},
        r"unknown option 'saved-weights'; did you mean 'saved_weights'\? Known: .*",
    ),
    "capitals in an option": ({"Skip": ["up"]}, r"unknown option 'Skip'; did you mean 'skip'\? Known: .*"),
    "no option at all": ({"zzz": 1}, rf"unknown option 'zzz'\. {OPTIONS}"),
    "argument of torch.compile": (
        {"dynamic": True},
        r"unknown option 'dynamic'; it is an argument of torch\.compile: "
        r"torch\.compile\(model, backend=…, dynamic=…\) Known: .*",
    ),
    "field users may not set": ({"user_patterns": ["up"]}, r"unknown option 'user_patterns'.* Known: .*"),
    "name that is no text": ({3: True}, r"options: the name of an option is text, got 3"),
    "options as text": ("skip", r"options takes a dictionary, got 'skip'"),
    "options as pairs": ([("skip", ["up"])], r"options takes a dictionary, got \[\('skip', \['up'\]\)\]"),
    "mistake beside an option of Inductor's": (
        {"max_autotune": True, "fuell": 1},
        r"unknown option 'fuell'; did you mean 'fuel'\? Known: .*",
    ),
    # operands
    "unknown format": ({"weight": "e2m2"}, rf"option 'weight': unknown format 'e2m2'; {FORMATS}"),
    "format in capitals": (
        {"weight": "E2M1"},
        rf"option 'weight': unknown format 'E2M1'; did you mean 'e2m1'\? {FORMATS}",
    ),
    "empty operand": ({"weight": ""}, rf"option 'weight': quantizer '' {QUANTIZER}"),
    "too many words": (
        {"weight": "e2m1 row absmax even more"},
        rf"option 'weight': quantizer 'e2m1 row absmax even more' {QUANTIZER}",
    ),
    "unknown granularity": (
        {"weight": "e2m1 column"},
        r"option 'weight': unknown granularity 'column'; use tensor, row, block<n> or block<n>x<n>, .* block16",
    ),
    "former granularity": (
        {"weight": {"granularity": "tile128"}},
        r"option 'weight': unknown granularity 'tile128': tile128 is now block128x128",
    ),
    "blocks that are no squares": (
        {"weight": "e2m1 block16x32"},
        r"option 'weight': granularity 'block16x32' is not square; use block<n>x<n>, for example block16x16",
    ),
    "former format": (
        {"weight": "int4z row"},
        r"option 'weight': unknown format 'int4z': int4z is now int4",
    ),
    "former rounding": (
        {"weight": {"rounding": "up"}},
        r"option 'weight': unknown rounding 'up': up is now half_up",
    ),
    "blocks of nothing": (
        {"weight": "e2m1 block0"},
        r"option 'weight': unknown granularity 'block0'; use tensor, row, block<n>.*",
    ),
    "blocks without a size": (
        {"weight": {"granularity": "block"}},
        r"option 'weight': unknown granularity 'block'; use tensor, row, block<n>.*",
    ),
    "unknown scale rule": (
        {"weight": "e2m1 row maxabs"},
        r"option 'weight': unknown scale rule 'maxabs'; known: absmax, absmax_pow2, e8m0, e8m0_ceil, rms, e4m3, .*",
    ),
    "unknown rounding": (
        {"weight": {"rounding": "nearest"}},
        r"option 'weight': unknown rounding 'nearest'; known: even, half_up, stochastic, eden",
    ),
    "unknown estimator": (
        {"weight": "e2m1; stee"},
        r"option 'weight': unknown estimator 'stee'; known: ste, clip, trust, dge",
    ),
    "unknown parameter of an estimator": (
        {"weight": "e2m1; dge(kk=3)"},
        r"option 'weight': estimator 'dge' has no parameter 'kk'; its parameters: k, cap",
    ),
    "estimator's parameter is a word": (
        {"weight": "e2m1; dge(k=five)"},
        r"option 'weight': estimator 'dge': k='five' is not a number",
    ),
    "estimator's parameter is negative": (
        {"weight": "e2m1; dge(k=-1)"},
        r"option 'weight': estimator 'dge': k must be positive and finite, got -1",
    ),
    "estimator's parameter twice": (
        {"weight": "e2m1; dge(k=3,k=4)"},
        r"option 'weight': estimator 'dge\(k=3,k=4\)': a parameter is given twice",
    ),
    "two estimators": (
        {"weight": "e2m1; ste; clip"},
        r"option 'weight': operand 'e2m1; ste; clip' names more than one estimator, .*",
    ),
    "misspelt field": (
        {"weight": {"fromat": "e1m2"}},
        r"option 'weight': unknown operand 'fromat'; did you mean 'format'\? Known: format, .*",
    ),
    "number for an operand": ({"weight": 4}, r"option 'weight': takes text, a dictionary or None, got int 4"),
    "dtype for an operand": (
        {"activation": torch.float16},
        r"option 'activation': takes text, a dictionary or None, got dtype torch\.float16",
    ),
    "recipe for an operand": (
        {"weight": FP4},
        r"option 'weight': takes text, a dictionary or None, got Recipe .{1,60}",
    ),
    "number for a scale rule": ({"weight": {"scale": 2.0}}, r"option 'weight': scale takes text, got 2\.0"),
    # outliers
    "unknown parameter of occ": (
        {"activation": "e2m1; occ(beta=1)"},
        r"option 'activation': unknown occ 'beta'\. Known: alpha, per, compensate, residual",
    ),
    "quantile above one": (
        {"activation": "e2m1; occ(alpha=2)"},
        r"option 'activation': .*alpha must lie in \(0\.5, 0\.999999\], got 2\.0",
    ),
    "quantile in words": (
        {"activation": "e2m1; occ(alpha=high)"},
        r"option 'activation': outlier clamp 'occ\(alpha=high\)': alpha='high' is not a number",
    ),
    "quantile twice": (
        {"activation": "e2m1; occ(alpha=0.9,alpha=0.8)"},
        r"option 'activation': .*: a parameter is given twice",
    ),
    "outliers per column": (
        {"activation": "e2m1; occ(per=col)"},
        r"option 'activation': .*per must be 'row' or 'tensor', got 'col'",
    ),
    "True for outliers": ({"activation": {"outliers": True}}, r"option 'activation': outliers takes text, got True"),
    "residual in a format without kernels": (
        {"activation": "e2m1; occ(residual=e5m2)"},
        r"option 'activation': .*residual must be 'exact' or 'e4m3', got 'e5m2'",
    ),
    # what does not go together
    "dge on clamped activations": (
        {"activation": {"estimator": "dge"}},
        r"option 'activation': occ\(\.\.\.\) clamps the input that dge takes its slope from; use ste, clip or trust",
    ),
    "residual as code, not compensated": (
        {"activation": "e2m1; occ(residual=e4m3,compensate=0)"},
        r"option 'activation': .*residual=e4m3 goes with compensate=1 and per=row",
    ),
    "residual as code of eight bits": (
        {"activation": "midrise8; occ(residual=e4m3)"},
        r"option 'activation': .*residual=e4m3 goes with a grid of up to 4 bits, .* not midrise8 row absmax even; .*",
    ),
    "residual as code and trust": (
        {"activation": "e2m1; trust; occ(residual=e4m3)"},
        r"option 'activation': .*goes with the estimator ste, not trust; residual=exact .*",
    ),
    "two-level scales of rows": (
        {"weight": "e2m1 row e4m3"},
        r"option 'weight': scale rule e4m3 needs blocks, for example block16; got row",
    ),
    "stochastic rounding without a zero": (
        {"weight": "midrise4 row absmax stochastic"},
        r"option 'weight': stochastic rounding on midrise4: .*",
    ),
    "ties up on a float grid": (
        {"gradient": "e4m3 row absmax half_up"},
        r"option 'gradient': e4m3 rounds to even or stochastically; .*",
    ),
    "estimator for a gradient": (
        {"gradient": "e5m2; clip"},
        r"option 'gradient': e5m2 row absmax even; clip: "
        r"a gradient takes a quantizer only, no estimator, no outlier clamp and no transform",
    ),
    "part of a gradient there is none of": (
        {"gradient": {"format": "e4m3"}},
        r"option 'gradient': there is nothing to change in part; give the whole operand as text",
    ),
    "unknown gradient": (
        {"gradient": "fp9"},
        r"option 'gradient': unknown format 'fp9'; known formats: .*; or bf16, fp8 for short",
    ),
    "gradient that tensor cores cannot read": (
        {"backward": "fp8", "gradient": "e4m3 block16"},
        r"layer 'up': option 'backward' needs a gradient exact in 8-bit floating point, .* for example 'e4m3 row'; "
        r"got 'e4m3 block16 absmax even'",
    ),
    "gradient that is to be wide and 8 bits": (
        {"backward": "fp8", "gradient": "bf16"},
        r"options 'backward' and 'gradient': backward='fp8' quantizes dY, and gradient='bf16' does not; "
        r"leave out one of the two",
    ),
    "rule that undoes the backward": (
        {"backward": "dgrad_fp8", "rules": [{"gradient": "off"}]},
        r"options 'backward' and 'gradient': .* gradient='off' in rule '\*' does not; .* "
        r"name the layers that the rule is for",
    ),
    # switches
    "unknown backward": ({"backward": "fp4"}, r"option 'backward': 'fp4' is not one of bf16, dgrad_fp8, fp8, auto"),
    "text for fuel": ({"fuel": "3"}, r"option 'fuel': '3' is not an integer ≥ 0 or None"),
    "negative fuel": ({"fuel": -1}, r"option 'fuel': -1 is not an integer ≥ 0 or None"),
    "save in two bits": ({"save": "2bit"}, r"option 'save': '2bit' is not one of exact, 8bit, 4bit"),
    "save all weights": ({"saved_weights": "all"}, r"option 'saved_weights': 'all' is not one of recompute, codes"),
    "no for False": ({"enabled": "no"}, r"option 'enabled': 'no' is not True or False"),
    "one for True": ({"attention": 1}, r"option 'attention': 1 is not True or False"),
    "unknown pass": (
        {"disable_passes": ["fusee"]},
        r"option 'disable_passes': there is no pass 'fusee'; passes: expand, adopt, causal_masks, insert, .*",
    ),
    "pass that needs no request": (
        {"enable_passes": ["fuse"]},
        r"option 'enable_passes': runs unless it is disabled: 'fuse'; "
        r"passes: move_factors, join_products, accumulate, fuse_producers",
    ),
    "pass not in a list": ({"disable_passes": "fuse"}, r"option 'disable_passes' takes a list of names, got 'fuse'"),
    "layer not in a list": ({"skip": "lm_head"}, r"option 'skip' takes a list of names, got 'lm_head'"),
    "empty layer name": ({"skip": [""]}, r"option 'skip' takes a list of names, got \[''\]"),
    # rules
    "rules not in a list": (
        {"rules": {"name": "up"}},
        r"option 'rules' takes a list of dictionaries, got \{'name': 'up'\}",
    ),
    "rule that is a name": ({"rules": ["up"]}, r"option 'rules': a rule is a dictionary, got 'up'"),
    "misspelt field of a rule": (
        {"rules": [{"nmae": "up"}]},
        r"option 'rules': unknown rule 'nmae'; did you mean 'name'\? Known: name, .*",
    ),
    "role of the forward": (
        rule(roles=["fprop"], gradient="fp8"),
        r"option 'rules': rule 'up': role 'fprop' is not 'dgrad' or 'wgrad'",
    ),
    "no role": (rule(roles=[], gradient="fp8"), r"option 'rules': rule 'up': roles=\(\) is not a tuple with .*"),
    "size in words": (rule(min_size="1k"), r"option 'rules': rule 'up': min_size='1k' is not an integer ≥ 0"),
    "sizes the wrong way round": (
        rule(min_size=10, max_size=5),
        r"option 'rules': rule 'up': max_size=5 below min_size=10 matches nothing",
    ),
    "no for quantize": (rule(quantize="no"), r"option 'rules': rule 'up': quantize='no' is not True, False or None"),
    "unknown format in a rule that matches nothing": (
        {"rules": [{"name": "nowhere", "weight": "e9"}]},
        r"option 'rules': rule 'nowhere': option 'weight': unknown format 'e9'; .*",
    ),
    "misspelt field of a rule's operand": (
        rule(weight={"fromat": "e1m2"}),
        r"option 'rules': rule 'up': option 'weight': unknown operand 'fromat'; did you mean 'format'.*",
    ),
    "rule that does not fit the recipe": (
        rule(activation={"estimator": "dge"}),
        r"rule 'up': option 'activation': occ\(\.\.\.\) clamps the input that dge takes .*",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_option_is_one_line_that_says_what_to_do(name):
    options, expected = BAD[name]
    with pytest.raises(BackendCompilerFailed) as caught:
        step(options)
    first, line, *rest = str(caught.value).splitlines()
    assert first == "backend='eagerly' raised:"
    assert re.fullmatch(f"ValueError: {expected}", line), line
    assert not rest or rest[0] == "", "a second line of ours"


UNMATCHED = {
    "layer that is not there": (
        {"skip": ["head"]},
        "skip='head' matched no GEMM of the model; its layers: down, up",
    ),
    "misspelt layer": (
        {"skip": ["dwon"]},
        "skip='dwon' matched no GEMM of the model (did you mean 'down'?); its layers: down, up",
    ),
    "misspelt op of a rule": (
        {"rules": [{"name": "up", "op": "lineer", "quantize": False}]},
        "rule 'up' (op=lineer, quantize=False) matched no GEMM of the model (did you mean 'up'?); its layers: down, up",
    ),
    "size nothing has": (
        {"rules": [{"name": "down", "min_size": 10**9, "quantize": False}]},
        "rule 'down' (min_size=1000000000, quantize=False) matched no GEMM of the model (did you mean 'down'?); "
        "its layers: down, up",
    ),
}


@pytest.mark.parametrize("name", UNMATCHED)
def test_a_rule_that_matches_nothing(name):
    """A warning, or an error under ``strict``; `explain` always raises."""
    options, message = UNMATCHED[name]
    with pytest.raises(UnmatchedRuleError, match=f"^{re.escape(message)}$"):
        step({**options, "strict": True})
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match=f"^qcompile: {re.escape(message)}$"):
        step(options)
    with pytest.raises(UnmatchedRuleError, match=f"^{re.escape(message)}$"):
        qcompile.explain(Mlp(), torch.randn(5, 24), options=options)


def test_an_unknown_backend_of_explain():
    with pytest.raises(ValueError, match=r"^unknown backend 'qcompile_fp3'; known: qcompile_fp4"):
        qcompile.explain(Mlp(), torch.randn(5, 24), backend="qcompile_fp3")


INDUCTORS = {
    "type of an option of Inductor's": (
        {"max_autotune": "yes"},
        "RuntimeError: Unexpected type of attr max_autotune, got str should be bool",
    ),
    "unknown mode": ({"mode": "fastest"}, "RuntimeError: Unrecognized mode=fastest, should be one of: default, "),
}


@pytest.mark.parametrize("name", INDUCTORS)
def test_inductors_own_complaints_come_through(name):
    options, expected = INDUCTORS[name]
    with pytest.raises(BackendCompilerFailed) as caught:
        step({"skip": [], **options})
    assert str(caught.value).splitlines()[1].startswith(expected)


# --- tensors that are not quantized -------------------------------------------------------------------------


def decisions(function: Any, *inputs: Tensor, **options: Any) -> list[tuple[bool, str]]:
    """Whether each product is quantized, and the reason, after a call and its backward."""
    observed = Observations()

    def backend(gm, inputs, **kwargs):
        return eagerly(gm, inputs, observe=observed, **kwargs)

    result = torch.compile(function, backend=backend, options=options or None)(*inputs)
    result.sum().backward()
    assert observed.plan is not None
    return [(d.quantized, d.reason) for d in observed.plan.decisions]


def test_a_nested_tensor_is_left_alone():
    x = torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)], layout=torch.jagged)
    layer = nn.Linear(24, 8)

    def function(x):
        return torch.nested.to_padded_tensor(layer(x), 0.0)

    ((quantized, reason),) = decisions(function, x)
    assert not quantized
    assert reason == "an operand is a NestedTensor, a tensor subclass: it multiplies in its own way"


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(24, 8), (24,)), (nn.Conv1d(3, 4, 3), (3, 9))], ids=["linear", "conv1d"]
)
def test_tiles_of_a_single_row_are_left_alone(layer, shape):
    """One vector in a model is no reason to refuse the recipe, and none to pass it over in silence."""
    ((quantized, reason),) = decisions(layer, torch.randn(shape), activation="e2m1 block16x16")
    assert not quantized
    assert reason == "granularity block16x16 needs a matrix, but the activation is one row"


def test_integers_are_left_alone():
    weight = nn.Parameter(torch.randn(4, 5))
    results = decisions(lambda a, b: (a @ b).float() @ weight, torch.ones(3, 4).int(), torch.ones(4, 4).int())
    assert results == [(False, "operands are int32 × int32, not floating point"), (True, "")]
