"""Every model of the zoo, through every pass: the right numbers, nothing skipped without a reason, no graph break.

Dynamo captures a model once for all backends. Each compiles it, with graphs executed eagerly in place of Inductor's
code generation, and trains it for five steps. What its forward and backward then compute, and how much of it is
quantized, is compared with :mod:`reference`, which shares no code with the package. The decisions are those that
``qcompile.explain`` prints.

**Tolerance.** The products are the same ATen calls on both sides. In float64, everything around them differs by
10⁻¹⁵, which changes no rounding to four bits; but many models compute norms, rotary angles, scans or the loss in
float32 whatever their dtype, some hundred roundings of 2⁻²⁴ deep. A gradient may therefore miss its reference by 10⁻⁵
of its norm, or, where it is zero but for rounding (the bias of keys, a bias before a norm), by 2⁻²³ of the largest
norm. One element rounded to the wrong level would be a hundred times that.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qcompile.passes import pass_base
from qcompile.recipes import RECIPES

from .harness import Compiled, Expected, Step, expect
from .reference import ALPHA, REFERENCES
from .zoo import ZOO, Entry, build, loss_of

pytest.importorskip("transformers")

RELATIVE = 1e-5
ABSOLUTE = 2.0**-23
STEPS = 5

#: What distinguishes a recipe here from the one users get: see ``ALPHA``; and no layer is too thin, where all are tiny.
OPTIONS: dict[str, dict[str, Any]] = {
    "qcompile_fp4": {"activation": {"outliers": f"occ(alpha={ALPHA})"}, "min_side": 0},
    "qcompile_quest": {"min_side": 0},
}


#: Models whose products another one has, which every run of the tests trains; a nightly run trains these too.
RESEMBLES = {
    "albert": "bert", "cohere": "llama", "deberta_v2": "bert", "deepseek_v2": "deepseek_v3", "dinov2": "vit",
    "distilbert": "bert", "gemma2": "gemma3", "gpt_neox": "falcon", "gru": "lstm_cell",
    "mamba": "mamba2", "mistral": "llama", "olmo2": "llama", "opt": "gpt2", "phi": "llama", "phi3": "llama",
    "qwen2": "llama", "qwen2_moe": "qwen3_moe", "qwen3": "gemma3", "starcoder2": "llama",
}  # fmt: skip


def in_turn(name: str) -> Any:
    assert RESEMBLES.get(name, name) in ZOO.keys() - RESEMBLES.keys()
    return pytest.param(name, marks=pytest.mark.nightly) if name in RESEMBLES else name


@pytest.fixture(autouse=True)
def _no_programs(monkeypatch):
    """A pass leaves its graph as text for the report; of the models here that is a tenth of the time, and unread."""
    monkeypatch.setattr(pass_base, "program_text", lambda graph: "")


def assert_same(actual: Step, expected: Step) -> None:
    torch.testing.assert_close(actual.loss, expected.loss, rtol=RELATIVE, atol=0.0)
    assert actual.gradients.keys() == expected.gradients.keys()
    floor = ABSOLUTE * max(gradient.norm() for gradient in expected.gradients.values())
    for name, gradient in expected.gradients.items():
        error = (actual.gradients[name] - gradient).norm()
        assert error <= RELATIVE * gradient.norm() + floor, (name, error / gradient.norm())


def graphs_of_aot_eager(entry: Entry) -> int:
    """How many graphs plain torch makes of a model that it does not capture whole."""
    model, inputs = build(entry)
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        compiled = torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)
        graphs.append(gm)
        return compiled

    loss_of(torch.compile(model, backend=backend)(**inputs(0))).backward()
    torch._dynamo.reset()
    return len(graphs)


class Subject:
    """A model of the zoo, captured once for all backends: to trace its Python takes as long as to compile the graph.

    Attributes:
        initial: its parameters and buffers before training.
        twin: a copy that stays eager. plain: what that computes without quantization.
        graphs: how many graphs torch makes of it.
        compiled: the backends by name. backend: the one that :attr:`call` runs.
    """

    def __init__(self, entry: Entry) -> None:
        self.graphs = graphs_of_aot_eager(entry) if entry.breaks else 1
        self.entry = entry
        self.model, self.inputs = build(entry)
        self.initial = copy.deepcopy(self.model.state_dict())
        self.twin = copy.deepcopy(self.model)
        self.plain = expect(self.twin, self.inputs(0))
        # Rotations that are not computed are roundings that are not made; in float32 that turns codes over.
        exact = {} if entry.dtype == torch.float64 else {"disable_passes": ["cancel_rotations"]}
        self.compiled = {name: Compiled(RECIPES[name].override({**OPTIONS[name], **exact})) for name in REFERENCES}
        self.backend = ""
        self.call = torch.compile(self.model, backend=self._compile, fullgraph=not entry.breaks)

    def _compile(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        calls = {name: compile(copy.deepcopy(gm), example_inputs) for name, compile in self.compiled.items()}
        return lambda *args: calls[self.backend](*args)


@pytest.fixture(scope="module")
def subject(request) -> Iterator[Subject]:
    torch._dynamo.reset()
    yield Subject(ZOO[request.param])
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", list(REFERENCES))
@pytest.mark.parametrize("subject", [in_turn(name) for name in ZOO], indirect=True, scope="module")
def test_zoo(subject, backend):
    model, twin, inputs, compiled = subject.model, subject.twin, subject.inputs, subject.compiled[backend]
    subject.backend = backend
    model.load_state_dict(subject.initial)
    for number in range(STEPS):
        first, last = number == 0, number == STEPS - 1
        compiled.restart()
        with torch._dynamo.config.patch(**subject.entry.dynamo, error_on_recompile=not first):
            step = Step.of(model, subject.call, inputs(number))
        if first or last:
            twin.load_state_dict(model.state_dict())
            expected = expect(twin, inputs(number), REFERENCES[backend], subject.plain)
            assert_same(step, expected.step)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
    assert_accounted_for(compiled, subject.plain, expected)
    assert len(compiled.graphs) == subject.graphs


def assert_accounted_for(compiled: Compiled, plain: Expected, expected: Expected) -> None:
    """Every product that eager torch runs is a site, quantized as the reference has it or left alone with a reason;
    that is what runs; and every product of the graphs, forward and backward, belongs to a site."""
    assert not plain.forward.unknown, "the reference does not know these products"
    assert not [product for graph in compiled.graphs for product in graph.unaccounted]
    products = expected.reference.products
    quantized = [decision.site.op for decision in compiled.decisions if decision.quantized]
    assert Counter(quantized) == Counter(product.op for product in products if product.quantized)
    reasons = {d.site.op: d.reason for d in compiled.decisions if not d.quantized}
    assert all(reasons.values())
    # Not counted: a loop over time in eager mode can be one scan in a graph.
    assert {product.op for product in products if not product.quantized} == set(reasons)
    assert compiled.forward.quantized == expected.forward.count.quantized
    assert compiled.backward.quantized == expected.backward.count.quantized
    # The graphs' own count: every product belongs to a site, and no operation that runs is left out of it.
    assert not [product for graph in compiled.graphs for product in graph.unaccounted]
    counted = [product for graph in compiled.graphs for product in graph.products]
    for count, roles in ((compiled.forward, {"fprop"}), (compiled.backward, {p.role for p in counted} - {"fprop"})):
        assert sum(product.flops for product in counted if product.role in roles) == count.total
    # Inductor leaves out what has no effect and turns small products into sums; it adds none.
    assert compiled.forward.quantized <= compiled.forward.total <= plain.forward.count.total
    assert compiled.backward.quantized <= compiled.backward.total <= plain.backward.count.total
