"""What fuzzing found, shrunk: each program once compiled wrongly, or left a weight in high precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.torch_version import TorchVersion

from .check import EXACT, ROUNDED, Outcome, Setting, attempt, check, torchs_own
from .graphs import SUMS, Leaf, Program, Step, _Builder

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def weight(shape: tuple[int, ...], requires_grad: bool = True) -> Leaf:
    return Leaf("p0", "parameter", shape, F32, requires_grad)


def buffer(shape: tuple[int, ...]) -> Leaf:
    return Leaf("b0", "buffer", shape, F32, False)


X, X_FIXED = (Leaf("i1", "input", (5, 8), F32, requires_grad) for requires_grad in (True, False))


def program(leaves: tuple[Leaf, ...], *lines: str) -> Program:
    """Lines ``v = text``; products are those with a ``@``, a ``linear`` or a ``conv``."""
    steps, results = [], []
    for line in lines:
        target, equals, text = line.partition(" = ")
        named = equals and target.isidentifier()
        product = any(mark in line for mark in ("@", "linear", "conv"))
        steps.append(Step(text, target, product) if named else Step(line))
        results += [target] if product else []
    return Program(leaves, tuple(steps), tuple(results), exact=True)


#: Program → which of its products are quantized when products without a weight are not.
FOUND: dict[str, tuple[Program, list[bool]]] = {
    "a frozen weight that is changed in place is a weight": (
        program((weight((7, 8), False), X), "p0 += 1", "v2 = F.linear(i1, p0)"),
        [True],
    ),
    "a copy of a parameter that data is added to is an activation": (
        program(
            (weight((5, 8)), X, Leaf("i2", "input", (5, 8), F32, False)),
            "h = p0.clone()",
            "h.add_(i2)",
            "v3 = i1 @ h.transpose(-1, -2)",
        ),
        [False],
    ),
    "a cache that is written before it is read is an activation": (
        program(
            (buffer((5, 8)), X, Leaf("i2", "input", (8,), F32, False)), "b0[0] = i2", "v3 = i1 @ b0.transpose(-1, -2)"
        ),
        [False],
    ),
    "so it is through a view": (
        program(
            (buffer((5, 8)), X, Leaf("i2", "input", (8,), F32, False)),
            "h = b0.transpose(-1, -2)",
            "h[:, 0].copy_(i2)",
            "v3 = i1 @ h",
        ),
        [False],
    ),
    "a buffer in a layer's slot is its weight, before and after it is written": (
        program((buffer((5, 8)), X_FIXED), "v2 = F.linear(i1, b0)", "b0.mul_(2)", "v3 = F.linear(i1, b0)"),
        [True, True],
    ),
    "a buffer in a free product is none": (
        program((buffer((5, 8)), X), "v2 = i1 @ b0.transpose(-1, -2)", "v3 = i1 @ (b0 * 2).transpose(-1, -2)"),
        [False, False],
    ),
    "a convolution whose weight is computed from an input has a weight": (
        program((X, Leaf("i2", "input", (7, 8, 1), F32, True)), "v3 = F.conv1d(i1.unsqueeze(-1), i2.abs())"),
        [True],
    ),
    "what is computed from parameters is a weight, and a product of parameters is left alone": (
        program(
            (weight((7, 8)), Leaf("p1", "parameter", (7, 2), F32, True), Leaf("p2", "parameter", (2, 8), F32, True), X),
            "v4 = p1 @ p2",
            "w = p0 * 0.5 + v4",
            "v5 = i1 @ w.mT",
        ),
        [False, True],
    ),
    "a part of a weight is a weight": (
        program(
            (weight((6, 8)), X),
            "v2 = F.linear(i1, p0.chunk(3)[1])",
            "v3 = F.linear(i1, p0.narrow(0, 2, 4))",
            "v4 = F.linear(i1, torch.split(p0, 4)[0])",
            "v5 = p0.unbind(0)[2] @ i1.transpose(-1, -2)",
        ),
        [True, True, True, True],
    ),
    "one operand before and after it is changed": (
        program(
            (weight((7, 8), False), X_FIXED),
            "v2 = F.linear(i1, p0)",
            "i1[..., :1].mul_(4)",
            "v3 = F.linear(i1, p0)",
        ),
        [True, True],
    ),
}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_found(name, as_module):
    found, quantized = FOUND[name]
    outcome = check(replace(found, as_module=as_module), Setting(*EXACT[0]))
    assert outcome.products == len(quantized)
    assert outcome.quantized == sum(quantized)


def test_gradients_read_a_weight_as_it_was_multiplied():
    """Eager torch refuses to change what it has saved; compiled, the codes of the old value are saved."""
    changed = program((weight((7, 8), False), X), "v2 = F.linear(i1, p0)", "p0.mul_(4)", "v3 = F.linear(i1, p0)")
    for module in (True, False):
        assert attempt(replace(changed, as_module=module), Setting(*EXACT[0]), 0, Outcome()) == ""


@pytest.mark.parametrize(
    ("lines", "trains"),
    [
        (["v3 = p0.T"], False),
        (["h = p0.mH", "v3 = h.T"], False),
        (["v3 = p0.transpose(0, 1)"], False),
        (["v3 = p0 * 2"], True),
        (["h = p0.T", "v3 = h + 1"], True),
    ],
)
def test_under_no_grad_where_a_leaf_is_handed_back(lines, trains):
    """No gradient comes from a view of a leaf, so it is inference. (Since torch 2.14 the graph returns ``.T``.)"""
    found = program((weight((7, 8)), X_FIXED), "v2 = F.linear(i1, p0)", *lines)
    found = replace(found, steps=(replace(found.steps[0], no_grad=True), *found.steps[1:]), results=("v2", "v3"))
    for module in (True, False):
        outcome = check(replace(found, as_module=module), Setting(*EXACT[0]))
        assert outcome.quantized != trains


def test_a_slope_reads_a_weight_as_it_was_multiplied():
    """Without a gradient of x eager torch saves no weight, so that a computed one may change; DGE reads it again."""
    changed = program((weight((7, 8)), X_FIXED), "w = p0 * 0.5", "v3 = F.linear(i1, w)", "w.fill_(0.25)")
    for module in (True, False):
        assert check(replace(changed, as_module=module), Setting(*EXACT[2])).quantized == 1


def test_an_infinity_in_a_row_too_short_for_outliers():
    """Nothing lies beyond its quantiles, so there is no residual, and no ∞ − ∞ either."""
    leaves = (
        Leaf("i0", "input", (5, 2), BF16, False, content="-inf"),
        Leaf("i1", "input", (3, 2), BF16, True),
    )
    assert check(replace(program(leaves, "v2 = F.linear(i0, i1)"), exact=False), Setting(*ROUNDED[0])).quantized == 1


def changes(*lines: str) -> Program:
    """A product (``v2``) and what reads the buffer ``b0`` (``v3``) while ``b0`` is changed."""
    found = program((weight((7, 8)), buffer((8,)), X_FIXED), *lines)
    return replace(found, results=("v2", "v3"))


LAYER = "v2 = F.linear(i1, p0)"


@pytest.mark.parametrize(
    "lines",
    [
        ("v = b0 + b0", "v3 = torch.maximum(p0, v)", "F.relu(b0, inplace=True)"),
        ("v = b0[None] + 1", "h = v * 3", "v3 = p0 * h", "b0.mul_(-2)"),
        ("b0.mul_(-2)", "v3 = p0 * b0"),
        ("b0.t().mul_(2)", "v = b0 + b0", "v3 = torch.maximum(p0, v)", "b0.mul_(-2)"),
        ("v3 = p0 * (b0 > 0)", "b0.mul_(-2)"),
    ],
    ids=["pointwise", "through a view", "before", "before and after", "mask"],
)
def test_the_backward_reads_an_input_as_it_was(lines):
    """Plain ``aot_eager`` computes again from the new value. Where nothing is quantized, we compile what Inductor does;
    if that is right one day, the excuse goes.
    """
    found = changes(LAYER, *lines)
    assert [d.name for d in torchs_own(found, backend="aot_eager")] == ["gradient of p0"]
    outcome = check(found, Setting(*EXACT[0]))
    assert (outcome.quantized, outcome.excused) == (1, [])
    outcome = check(changes("v2 = p0 @ p0.mT", *lines), Setting(*EXACT[0]))
    assert (outcome.quantized, len(outcome.excused)) == (0, 1)


def test_inductor_drops_a_copy_that_keeps_the_old_value():
    """Before it parts forward and backward: nothing is left that could be saved. From torch 2.15 on the copy stays in
    what we quantize, and plain Inductor alone is wrong.
    """
    found = changes(LAYER, "v = b0.clone()", "v3 = p0 * v", "b0.mul_(-2)")
    assert [d.name for d in torchs_own(found)] == ["gradient of p0"]
    outcome = check(found, Setting(*EXACT[0]))
    right = TorchVersion(torch.__version__) >= "2.15"
    assert (outcome.quantized, len(outcome.excused)) == (1, 0 if right else 1)


def test_torch_s_decomposition_of_layer_norm_where_the_gradient_is_infinite():
    """It leaves infinities where eager torch has NaN; without decompositions the gradients agree."""
    p0 = replace(weight((3, 33)), dtype=F16)
    i1 = Leaf("i1", "input", (5, 17, 33), F16, False, content="-inf")
    found = program((p0, i1), "w = F.layer_norm(p0, p0.shape[-1:])", "v3 = F.linear(i1, w)")
    found = replace(found, exact=False)
    assert torchs_own(found, backend="aot_eager") == []
    for backend in ("aot_eager_decomp_partition", None):
        assert list(map(str, torchs_own(found, backend=backend))) == ["gradient of p0: not finite in other places"]
    outcome = check(found, Setting(*ROUNDED[0]))
    assert (outcome.quantized, outcome.excused) == (1, ["gradient of p0: not finite in other places"])


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("copied", [True, False], ids=["copied", "not copied"])
def test_a_weight_of_16_bits_and_its_update(dtype, copied):
    """Of w + B·A alone Inductor makes an addmm that rounds once; DGE shows it. When it stops, so may the copies."""
    shapes = {"p0": (33, 17), "p1": (33, 2), "p2": (2, 17)}
    found = program(
        (
            *(Leaf(name, "parameter", shape, dtype, True) for name, shape in shapes.items()),
            replace(X, shape=(7, 17), dtype=dtype),
        ),
        "v4 = p1 @ p2",
        *(["v5 = v4.clone()"] if copied else []),
        "w = p0 + v4",
        "v7 = F.linear(i1, w)",
    )
    found = replace(found, exact=False, results=("v5", "v7") if copied else ("v7",))
    outcome = Outcome()
    assert bool(attempt(found, Setting(*ROUNDED[0]), 0, outcome)) != copied
    assert outcome.quantized == 1


@pytest.mark.parametrize("template", SUMS)
@pytest.mark.parametrize("view", ["", "{x}.detach()", "{x}.mT"])
@pytest.mark.parametrize(
    ("dtype", "autocast", "copies"),
    [(F16, None, True), (BF16, None, True), (F32, BF16, True), (F32, None, False)],
    ids=["float16", "bfloat16", "autocast", "float32"],
)
def test_what_is_added_to_a_product_of_16_bits_leaves_it_another_use(template, view, dtype, autocast, copies):
    builder = _Builder(lambda strategy: 0, exact=False, dtype=dtype, training=False, autocast=autocast)
    a, b, c = (builder.leaf((4, 4), dtype, "parameter") for _ in range(3))
    product = builder.step("{a} @ {b}", product=True, a=a, b=b)
    term = builder.step(view, x=product) if view else product
    for x, y in ((c, term), (term, c)):
        builder.steps.clear()
        builder.step(template, in_place="add_" in template, x=x, y=y)
        assert [step.text for step in builder.steps[:-1]] == [f"{term}.clone()"] * copies
