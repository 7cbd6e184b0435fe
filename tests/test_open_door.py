"""What users define: an outsider's file trains, kernels are its formulas bit for bit, caches tell definitions apart.

``examples/outsider.py`` is that file.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import backends, compat
from qcompile.ir.definitions import short_names
from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.formats import get_format
from qcompile.ir.operand import Operand
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.formula import estimators as formulas
from qcompile.kernels.formula import rounding, scales
from qcompile.kernels.formula.torch_target import evaluate
from qcompile.kernels.quantize.reference import pack
from qcompile.kernels.register import provider_of
from qcompile.passes import pipeline
from qcompile.passes.pipeline import cache_identity

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "outsider.py"
CURVE = (0.0, 0.5, 1.0, 1.75, 2.5, 3.5, 5.0, 7.0)


pytestmark = pytest.mark.usefixtures("definitions_forgotten")


@pytest.fixture(scope="module")
def outsider(definitions_forgotten) -> ModuleType:
    """The example as a module, under a name that pickles and scripts can import it by."""
    spec = importlib.util.spec_from_file_location("outsider", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["outsider"] = module
    spec.loader.exec_module(module)
    return module


def rows(*shape: int) -> Tensor:
    """Normal data with a row of zeros and one of tiny numbers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x[..., 0, :] = 0.0
    x[..., 1, :] *= 1e-30
    return x


def scaled(x: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """y and its level by the formulas, evaluated in torch."""
    amax = x.abs().amax(-1, keepdim=True).clamp(min=q.amax_floor)
    y = x * evaluate(scales.reciprocal(q), amax)
    return y, evaluate(rounding.round_level(q.format, q.rounding), y)


# --- the outsider's file --------------------------------------------------------------------------------------------


def test_the_file_is_short():
    tree = ast.parse(EXAMPLE.read_text())
    lines = {node.lineno for node in ast.walk(tree) if isinstance(node, ast.stmt)} - {tree.body[0].lineno}
    assert len(lines) <= 15


@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_dynamo")
def test_it_trains_through_inductor(outsider):
    """The gradient of the first step is that of the operands fake-quantized in eager torch; the loss falls."""
    model = nn.Linear(48, 24)
    step = torch.compile(model, backend=qcompile.backend(outsider.recipe))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses, x = [], torch.randn(37, 48)
    for i in range(6):
        loss = (step(x) - x[:, :24]).square().mean()
        loss.backward()
        if i == 0:
            twin = model.weight.detach().clone().requires_grad_()
            operands = (str(outsider.recipe.activation), str(outsider.recipe.weight))
            read = [qcompile.fake_quantize(t, text) for t, text in zip((x, twin), operands, strict=True)]
            y = nn.functional.linear(*read, model.bias.detach())
            (expected,) = torch.autograd.grad((y - x[:, :24]).square().mean(), twin)
            torch.testing.assert_close(model.weight.grad, expected, rtol=1e-5, atol=1e-7)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_report_names_it_as_people_do(outsider):
    """Digests are for caches."""
    report = qcompile.explain(nn.Linear(48, 24), torch.randn(37, 48), backend=outsider.recipe)
    (row, *_) = report.rows
    assert (row.formats, row.estimator) == ("curve row × curve row", "rising × soft")
    assert "cpp quantize" in row.provider
    assert "@" not in str(report)


@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 129), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_in_cpp_are_the_formulas(outsider, shape, dtype):
    """Codes, scales, mask and slope, bit for bit; and compiled kernels run, not the reference."""
    ops, x = torch.ops.qcompile, rows(*shape).to(dtype)
    q = Quantizer.parse("curve row tight")
    text, grad = str(q), torch.randn(shape).to(dtype)
    mask, slope = EstimatorSpec.parse("rising"), EstimatorSpec.parse("soft")
    for op, estimator in (("quantize", None), ("estimator_mask", mask), ("scale_gradient", slope)):
        assert provider_of(op, "cpu", text, dtype, estimator and str(estimator))[0] == "cpp"
    codes, stored = ops.quantize(x, text, -1)
    y, level = scaled(x.float(), q)
    assert torch.equal(codes, pack(evaluate(rounding.encode(q.format, "even"), y).to(torch.uint8), 4))
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=q.amax_floor)
    assert torch.equal(stored, evaluate(scales.stored_scale(q), amax))
    keeps = evaluate(formulas.mask(mask, q.format), y, level)
    assert 0.05 < keeps.float().mean() < 0.95
    assert torch.equal(ops.estimator_mask(x, stored, text, str(mask), -1), pack(keeps.to(torch.uint8), 1))
    factor = evaluate(formulas.slope(slope, q.format), y)
    assert torch.equal(ops.scale_gradient(grad, x, stored, text, str(slope), -1), (grad.float() * factor).to(dtype))


# --- doors ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_registered_recipe_is_a_backend_by_name(monkeypatch):
    """Registered again, the name stands for the new recipe; names of others are refused."""
    monkeypatch.setattr(backends, "RECIPES", dict(backends.RECIPES))
    monkeypatch.setattr(compat, "compile_fx", lambda gm, inputs, **_: gm.forward)
    linear, x = nn.Linear(48, 40), torch.randn(7, 48)
    first = qcompile.Recipe("door_by_name", weight="int4")
    assert qcompile.register(first) == "door_by_name"
    four = torch.compile(linear, backend="door_by_name")(x)
    qcompile.register(replace(first, weight="int2"))
    two = torch.compile(linear, backend="door_by_name")(x)
    for result, text in ((four, "int4 row"), (two, "int2 row")):
        weight = qcompile.fake_quantize(linear.weight, text)
        torch.testing.assert_close(result, nn.functional.linear(x, weight, linear.bias))
    assert not torch.equal(four, two)
    assert qcompile.explain(linear, x, backend="door_by_name").rows[0].formats == "float32 × int2 row"
    for taken in ("inductor", "qcompile_fp4"):
        with pytest.raises(ValueError, match=f"there is a backend '{taken}' already"):
            qcompile.register(qcompile.Recipe(taken))
    with pytest.raises(TypeError, match=r"takes a qcompile.Recipe, got str"):
        qcompile.backend("qcompile_fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["e2m1 row", "int4 block16", "stochastic block32 int4", "e2m1 block16 e4m3"])
@pytest.mark.parametrize("axis", [-1, 0])
def test_quantize_and_dequantize_are_fake_quantize(text, axis):
    x = torch.randn(33, 50, dtype=torch.bfloat16)
    seed = torch.tensor([5]) if "stochastic" in text else None
    quantized = qcompile.quantize(x, text, axis, seed=seed)
    assert quantized.codes.dtype == torch.uint8
    decoded = qcompile.dequantize(quantized)
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    assert torch.equal(decoded, qcompile.fake_quantize(x, text, axis, seed=seed))
    assert qcompile.dequantize(quantized, torch.float32).dtype == torch.float32


@pytest.mark.usefixtures("fresh_dynamo")
def test_functions_trace_without_graph_breaks():
    x = torch.randn(5, 64)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return qcompile.fake_quantize(x, "even e2m1; dge"), qcompile.dequantize(qcompile.quantize(x, "int4 block16"))

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(x), both(x)))


def test_fake_quantize_is_differentiable():
    x = torch.tensor([[6.5, 1.0, -0.1, 12.0]], requires_grad=True)
    qcompile.fake_quantize(x, "e2m1 row; clip(s=0.5)").sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: qcompile.quantize(x, "e2m1 column"), "unknown granularity 'column'"),
        (lambda x: qcompile.quantize(x, "e2m1", 2), r"quantize: axis=2 is not one of a tensor of shape \(3, 4\)"),
        (lambda x: qcompile.quantize(x[0], "e2m1 block2x2"), r"block2x2 needs a matrix, got shape \(4,\)"),
        (lambda x: qcompile.fake_quantize(x, "e2m1", seed=torch.tensor([1])), "seed= is for stochastic rounding"),
        (lambda x: qcompile.fake_quantize(x.int(), "e2m1"), "takes floating-point tensors, got int32"),
    ],
)
def test_errors_of_functions(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.ones(3, 4))


def test_parameters_of_an_estimator_are_words_of_its_text():
    """Full names, digits and underscores included, come back from ``str()`` and are cut in messages."""
    qcompile.Estimator("_door4", mask=lambda y, level, fmt, t: y.abs() <= t, parameters={"t": 1.0})
    spec = Operand.parse("e2m1 row; _door4(t=2.5)")
    assert Operand.parse(str(spec)) == spec
    assert short_names(str(spec)) == "e2m1 row absmax even; _door4(t=2.5)"
    for text, passing in (("e2m1; _door4", [0.0, 1.0, 0.0]), ("e2m1; _door4(t=2.5)", [0.0, 1.0, 1.0])):
        x = torch.tensor([[6.0, 1.0, -2.0]], requires_grad=True)
        qcompile.fake_quantize(x, text).sum().backward()
        assert x.grad.tolist() == [passing]
    with pytest.raises(ValueError, match="estimator '_door4' has no parameter 's'; its parameters: t"):
        Operand.parse("e2m1; _door4(s=1)")


# --- texts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("int4 block16 stochastic", "int4 block16 absmax stochastic"),
        ("half_up row e2m1", "e2m1 row absmax half_up"),
        ("e4m3 block16 e2m1", "e2m1 block16 e4m3 even"),
        ("block16 e4m3 e4m3", "e4m3 block16 e4m3 even"),
        ("even e4m3", "e4m3 row absmax even"),
    ],
)
def test_words_come_in_any_order(text, canonical):
    assert str(Quantizer.parse(text)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e2m1 int4 row", "quantizer 'e2m1 int4 row': 'e2m1' and 'int4' each name a format; give one"),
        ("e2m1 tensor row", "'tensor' and 'row' each name a granularity; give one"),
        ("even half_up e2m1", "'even' and 'half_up' each name a rounding; give one"),
        ("e8m0 absmax e2m1", "'e8m0' and 'absmax' each name a scale rule; give one"),
        ("row even", "quantizer 'row even' names no format; for example 'e2m1 row even'"),
    ],
)
def test_two_words_of_one_set(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Quantizer.parse(text)


# --- constructors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qcompile.Format("e2m1", 4, CURVE), "format 'e2m1' is defined by qcompile; take another name"),
        (lambda: qcompile.Format("row", 4, CURVE), "format 'row': texts use this word for something else"),
        (lambda: qcompile.Format("block7", 4, CURVE), "format 'block7': texts use this word"),
        (lambda: qcompile.Format("a b", 4, CURVE), "format 'a b': a name is letters, digits and underscores"),
        (lambda: qcompile.ScaleRule("even", lambda a, f: a), "scale rule 'even': texts use this word"),
        (
            lambda: qcompile.ScaleRule("r", lambda a, f: a, store="fp9"),
            "scale rule 'r': store='fp9' is not one of fp32",
        ),
        (lambda: qcompile.ScaleRule("r", lambda a, f: a, statistic="max"), "statistic='max' is not one of amax, rms"),
        *(
            (lambda numbers=numbers: qcompile.ScaleRule("r", lambda a, f: a, **numbers), f"scale rule 'r': {message}")
            for numbers, message in (
                ({"candidates": 1.5}, r"candidates=1.5 are not positive numbers, for example \(1.0, 1.5\)"),
                ({"candidates": (1.0, -1.5)}, r"candidates=\(1.0, -1.5\) are not positive numbers"),
                ({"candidates": (1.0, float("nan"))}, r"candidates=\(1.0, nan\) are not positive numbers"),
                ({"candidates": ()}, r"candidates=\(\) do not begin with 1.0"),
                (
                    {"candidates": [1.5, 1.0]},
                    r"candidates=\[1.5, 1.0\] do not begin with 1.0, the scale of the formula",
                ),
                ({"candidates": (1, 1.5, 1.5)}, r"candidates=\(1, 1.5, 1.5\) name a factor twice"),
                (
                    {"candidates": (1.0, 2.0), "statistic": "rms"},
                    r"candidates=.* relative to the absolute maximum; use",
                ),
                ({"floor": -1.0}, "floor=-1.0 is not a finite number from 0 on, or None"),
                ({"floor": "tiny"}, "floor='tiny' is not a finite number"),
                ({"floor": float("inf")}, "floor=inf is not a finite number"),
                ({"largest": 0}, "largest=0 is not a positive number that fp32 holds"),
                (
                    {"largest": 500.0, "store": "e4m3"},
                    "largest=500.0 is not a positive number that e4m3 holds, at most 448",
                ),
                (
                    {"largest": 1e6, "store": "ue5m3"},
                    "largest=1000000.0 is not a positive number that ue5m3 holds, at most 61440",
                ),
            )
        ),
        (lambda: qcompile.ScaleRule("r", lambda a, f: a > 1), "scale rule 'r': scale returns bool, not float32"),
        (lambda: qcompile.Estimator("x"), "estimator 'x': give mask=… or slope=…"),
        (lambda: qcompile.Estimator("ste", slope=lambda y, f: y), "estimator 'ste' is defined by qcompile"),
        (lambda: qcompile.Estimator("occ", slope=lambda y, f: y), "estimator 'occ': texts use this word"),
        (lambda: qcompile.Estimator("x", slope=lambda y, f: torch.sin(y)), "torch.sin has no scalar formula"),
        (lambda: qcompile.Estimator("x", slope=lambda y, f: y.tanh()), "have no operation 'tanh'"),
        (lambda: qcompile.Estimator("x", slope=lambda y, f: y if y > 0 else -y), r"write torch.where\(condition"),
        (lambda: qcompile.Estimator("x", mask=lambda y, q, f: y), "estimator 'x': mask returns float32, not bool"),
        (lambda: qcompile.Estimator("x", slope=lambda y, f: y, parameters={"k": -1.0}), "parameter k=-1.0 is not a"),
        (lambda: qcompile.Recipe("x", backward="fp9"), "recipe 'x': backward='fp9' is not one of bf16, dgrad_fp8, fp8"),
        (lambda: qcompile.Recipe("x", weight="fp9 row"), "recipe 'x': weight='fp9 row': unknown format 'fp9'"),
        (lambda: qcompile.Recipe("x", gradient="e2m1; dge"), "a gradient takes a quantizer only"),
        (lambda: qcompile.Recipe("x", skip="head"), "recipe 'x': skip takes a list of names, got 'head'"),
        (lambda: qcompile.Recipe("x", rules=({"nmae": 1},)), "recipe 'x': unknown rule 'nmae'; did you mean 'name'"),
        (lambda: qcompile.Recipe("x", widths={4: "fp9"}), "recipe 'x': unknown format 'fp9'"),
        (lambda: qcompile.Recipe("x", heads="yes"), "recipe 'x': heads='yes' is not True or False"),
        (lambda: qcompile.Recipe("", weight="int4"), "recipe '': its name is not text"),
    ],
)
def test_constructors_refuse_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


# --- redefinition and caches ----------------------------------------------------------------------------------------


def plan_of(recipe: qcompile.Recipe) -> Any:
    plans = []

    def backend(gm, inputs):
        plans.append(pipeline.rewrite(gm, recipe).plan)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(nn.Sequential(nn.Linear(48, 40)), backend=backend, fullgraph=True)(torch.randn(7, 48))
    return plans[0]


def identity_of(**fields: Any) -> str:
    recipe = qcompile.Recipe("door_identity", **fields)
    return cache_identity(recipe, plan_of(recipe))


def defined(kind: str, number: float) -> Operand:
    """An operand whose text is the same for every ``number``, which changes its ``kind`` of definition."""
    match kind:
        case "format":
            qcompile.Format("door_grid", 4, (0.0, 1.0, 2.0, 3.0, number))
            return Operand.parse("door_grid row")
        case "scale rule":
            qcompile.ScaleRule("door_rule", scale=lambda amax, fmt: amax / fmt.max * (1 / number))
            return Operand.parse("e2m1 row door_rule")
        case "mask":
            qcompile.Estimator("door_rounded", mask=lambda y, level, fmt: y.abs() * number < fmt.max)
            return Operand.parse("e2m1; door_rounded")
    qcompile.Estimator("door_rounded", slope=lambda y, fmt: 1 / (number + y.square()))
    return Operand.parse("e2m1; door_rounded")


@pytest.mark.parametrize("kind", ["format", "scale rule", "mask", "slope"])
def test_a_redefinition_changes_keys_and_results(kind):
    """One name, two meanings: two keys, and results that are not those of the first, in one process. The first
    object's own text keeps its meaning, and the same definition again is the same text.
    """
    x = torch.randn(5, 37)

    def outcome(text: str) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = qcompile.fake_quantize(leaf, text)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    short = {"format": "door_grid row", "scale rule": "e2m1 door_rule"}.get(kind, "e2m1; door_rounded")
    first = defined(kind, 5.0)
    before, key, ruled = outcome(short), identity_of(weight=short), identity_of(rules=({"weight": short},))
    second = defined(kind, 6.0)
    after = outcome(short)
    assert str(first) != str(second)
    assert not all(map(torch.equal, before, after))
    assert all(map(torch.equal, before, outcome(str(first))))
    assert len({key, ruled, identity_of(weight=short), identity_of(rules=({"weight": short},))}) == 4
    assert defined(kind, 5.0) == first
    assert identity_of(weight=short) == key


def test_a_recipe_keeps_what_it_was_made_with():
    """Operands and rules alike: a recipe is one thing, whatever its names come to mean."""
    qcompile.Format("door_grid", 4, (0.0, 1.0, 2.0, 5.0))
    recipe = qcompile.Recipe("door", weight="door_grid", rules=({"name": "a", "weight": {"format": "door_grid"}},))
    same = repr(recipe)
    qcompile.Format("door_grid", 4, (0.0, 1.0, 2.0, 6.0))
    assert repr(recipe) == same
    assert get_format(recipe.rules[0].weight["format"]).max == 5.0


def test_the_identity_is_the_same_in_another_process(outsider):
    """No address of a function and no order of definitions is in it, or compiled code would never be found again."""
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import outsider; print(repr(outsider.recipe))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == repr(outsider.recipe)
    assert " at 0x" not in repr(outsider.recipe)


# --- repros ---------------------------------------------------------------------------------------------------------


def gentle(y: Any, fmt: Any) -> Any:
    """A slope with a name."""
    return 1 / (1 + y.abs())


def test_a_repro_carries_definitions(outsider, tmp_path):
    """In a fresh process: data as text, named functions and lambdas of modules by import, `__main__`'s as source."""
    qcompile.Format("door_grid", 4, (0.0, 1.0, 2.0, 7.0))
    code = f"""
import sys, torch, qcompile
sys.path.insert(0, {str(EXAMPLE.parent)!r})
import outsider
def gentle(y, fmt):
    return 1 / (1 + y.abs())
qcompile.Format("door_grid", 4, (0.0, 1.0, 2.0, 7.0))
qcompile.Estimator("gentle", slope=gentle)
recipe = qcompile.Recipe("door", activation=outsider.recipe.activation, weight="door_grid; gentle", min_side=8)
path = qcompile.save_repro({str(tmp_path / "repro")!r}, torch.nn.Linear(48, 24), torch.randn(7, 48), backend=recipe)
print(repr(recipe))
"""
    script = tmp_path / "train.py"
    script.write_text(code)
    written = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    load = f"""
import runpy, torch, qcompile
print(repr(runpy.run_path({str(tmp_path / "repro.py")!r})['recipe']))
def without_source(y, fmt):
    return 1 / (1 + y.abs())
qcompile.Estimator("gentle", slope=without_source)
recipe = qcompile.Recipe("door", weight="e2m1; gentle")
qcompile.save_repro({str(tmp_path / "none")!r}, torch.nn.Linear(48, 24), torch.randn(7, 48), backend=recipe)
"""
    read = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=False)
    assert read.stdout == written.stdout
    # Without a source file what __main__ defines cannot be copied: that is said in one line.
    assert "'without_source' is defined in __main__, whose source cannot be read" in read.stderr
    assert not list(tmp_path.glob("none*"))


def test_a_repro_refuses_what_no_script_can_import(tmp_path):
    def local(y, fmt):
        return 1 / (1 + y.abs())

    unnamed = lambda y, fmt: 1 / (2 + y.abs())  # noqa: E731
    unnamed.__module__, unnamed.__qualname__ = "__main__", "<lambda>"
    for slope, name in ((local, "local"), (unnamed, "lambda")):
        qcompile.Estimator("door_local", slope=slope)
        recipe = qcompile.Recipe("door", weight="e2m1; door_local")
        with pytest.raises(
            ValueError, match=rf"^save_repro: Estimator 'door_local': slope is .*{name}.*write it with def"
        ):
            qcompile.save_repro(tmp_path / "repro", nn.Linear(48, 24), torch.randn(7, 48), backend=recipe)
    assert not list(tmp_path.iterdir())
