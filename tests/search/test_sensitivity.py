"""`qcompile.sensitivity`: scores against autograd by hand, a choice against all choices, rules against the report."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qcompile
from qcompile.search.knapsack import solve
from qcompile.search.layers import COSTS, WIDE, Layer, grouped
from tests.passes.harness import fake_quantize

FP4 = "e2m1 row absmax even; ste"
INT8 = "int8 row absmax even; ste"
OPTIONS = {"activation": FP4, "weight": FP4, "min_side": 0}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40), nn.Linear(40, 12)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.second(F.relu(self.first(x), inplace=True)), target)


class Attention(nn.Module):
    """q, k and v of one input, o of another, a gated MLP, and a product of tensors by einsum."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.mix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:])
        x = x + self.o(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        y = F.layer_norm(x, x.shape[-1:])
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return torch.einsum("bsi,io->bso", x, self.mix).square().mean()


def pairs(count: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(9, 24, generator=generator), torch.randn(9, 12, generator=generator)) for _ in range(count)]


def sequences(count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 7, 32, generator=generator) for _ in range(count)]


def scores_of(found: qcompile.Sensitivity) -> dict[str, dict[str, float]]:
    return {layer.name: layer.scores for layer in found.layers}


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_autograd_by_hand():
    """Σ (g ⊙ (y_q − y))² of both layers, summed over batches, with g from autograd and y_q from eager references."""
    model = TwoLayers()
    found = qcompile.sensitivity(model, pairs(), options=OPTIONS, candidates={"4": {}, "8": INT8})
    expected: dict[str, dict[str, float]] = {name: {"4": 0.0, "8": 0.0} for name in ("first", "second")}
    for x, target in pairs():
        y1 = model.first(x)
        h = F.relu(y1)
        y2 = model.second(h)
        gradients = torch.autograd.grad(F.mse_loss(y2, target), (y1, y2))
        for name, layer, given, y, g in (
            ("first", model.first, x, y1, gradients[0]),
            ("second", model.second, h, y2, gradients[1]),
        ):
            for candidate, text in (("4", FP4), ("8", INT8)):
                y_q = F.linear(fake_quantize(given, text, -1), fake_quantize(layer.weight, text, -1), layer.bias)
                expected[name][candidate] += (g * (y_q - y)).square().sum().item()
    for name, scores in expected.items():
        assert scores_of(found)[name] == pytest.approx(scores, rel=1e-4)


def test_errors_of_backward_products_are_those_of_autograd_by_hand():
    """‖dX_q − dX‖² / ‖dX‖² with Q(dY)·Q(W), and of dW with Q(dY)ᵀ·Q(X), dY rounded along each contraction."""
    model, (batch,) = TwoLayers(), pairs(1)
    options = {**OPTIONS, "gradient": "e4m3 row", "backward": "bf16"}
    found = qcompile.sensitivity(model, [batch], options=options, gradients=True)
    x, target = batch
    h = F.relu(model.first(x)).detach().requires_grad_()
    y = model.second(h)
    g, dx, dw = torch.autograd.grad(F.mse_loss(y, target), (y, h, model.second.weight))
    w_q, h_q = fake_quantize(model.second.weight, FP4, -1), fake_quantize(h, FP4, -1)
    dx_q = fake_quantize(g, "e4m3 row", -1) @ w_q
    dw_q = fake_quantize(g, "e4m3 row", 0).T @ h_q
    second = next(layer for layer in found.layers if layer.name == "second")
    for role, exact, other in (("dgrad", dx, dx_q), ("wgrad", dw, dw_q)):
        ratio = ((other - exact).square().sum() / exact.square().sum()).item()
        assert second.noise(role, "qcompile_fp4") == pytest.approx(ratio, rel=1e-4), role
    assert "dgrad error" in str(found)
    first = next(layer for layer in found.layers if layer.name == "first")
    assert first.noise("wgrad", "qcompile_fp4") > 0


def test_a_product_without_a_module_is_scored_and_the_model_stays_as_it_was():
    model, (x,) = Attention(), sequences()
    x.requires_grad_()
    state = torch.random.get_rng_state()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = qcompile.sensitivity(model, [x], options=OPTIONS)
    assert [layer.op for layer in found.layers if layer.scores].count("einsum") == 1
    assert torch.equal(torch.random.get_rng_state(), state)
    assert x.grad is None
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_checkpointed_layers_and_frozen_ones_score_alike():
    """Autograd carries g into a checkpointed body, and to products none of whose parameters requires a gradient."""
    model = TwoLayers()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model.first, model.second

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            h = checkpoint(lambda x: F.relu(self.first(x)), x, use_reentrant=False)
            return F.mse_loss(self.second(h), target)

    plain = scores_of(qcompile.sensitivity(model, pairs(), options=OPTIONS))
    assert scores_of(qcompile.sensitivity(Checkpointed(), pairs(), options=OPTIONS)) == plain
    model.requires_grad_(False)
    assert scores_of(qcompile.sensitivity(model, pairs(), options=OPTIONS)) == plain


def test_a_stored_weight_is_what_it_is_and_its_activation_is_scored():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    qcompile.pack_(model, "nf4 block64")
    found = qcompile.sensitivity(
        model,
        [torch.randn(5, 64)],
        loss=lambda model, x: model(x).square().mean(),
        backend="qcompile_stored",
        candidates={"8": {"activation": INT8}, "4": {"activation": FP4}},
        gradients=True,
    )
    assert [layer.recipe for layer in found.layers] == [None, None]
    for layer in found.layers:
        assert 0 < layer.scores["8"] < layer.scores["4"]
        assert layer.noise("wgrad", "4") is None  # of a weight that stays as it is
    rules = found.at(0).rules
    assert rules == [{"name": name, "op": "linear", "activation": FP4} for name in "02"]


def test_louder_noise_scores_higher_by_its_power():
    """A layer whose output counts twice as much has four times the score, on the same codes."""

    class Scaled(TwoLayers):
        factor = 1.0

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return self.factor * (self.second(self.first(x)) * target).sum()

    model = Scaled()
    single = scores_of(qcompile.sensitivity(model, pairs(1), options=OPTIONS))["second"]["qcompile_fp4"]
    Scaled.factor = 2.0
    torch._dynamo.reset()
    twice = scores_of(qcompile.sensitivity(model, pairs(1), options=OPTIONS))["second"]["qcompile_fp4"]
    assert twice == pytest.approx(4 * single, rel=1e-5)


def test_resumed_equals_uninterrupted(tmp_path):
    """Also with random numbers in the model: every batch starts from a state of its own."""

    class Dropped(TwoLayers):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5), target)

    model, batches, path = Dropped(), pairs(3), tmp_path / "scores.json"
    whole = qcompile.sensitivity(model, batches, options=OPTIONS)
    qcompile.sensitivity(model, batches[:2], options=OPTIONS, resume=path)
    assert len(json.loads(path.read_text())["batches"]) == 2
    resumed = qcompile.sensitivity(model, batches, options=OPTIONS, resume=path)
    assert scores_of(resumed) == scores_of(whole)
    again = qcompile.sensitivity(model, batches, options=OPTIONS, resume=path)  # computes nothing
    assert again.to_json() == whole.to_json()
    with pytest.raises(ValueError, match=r"batch 0 is not the one in resume=.*; give the same batches"):
        qcompile.sensitivity(model, batches[1:], options=OPTIONS, resume=path)
    with pytest.raises(ValueError, match="another model, recipe, candidates or seed"):
        qcompile.sensitivity(model, batches, options=OPTIONS, resume=path, seed=1)
    with pytest.raises(ValueError, match="holds 3 batches, more than the 1 given"):
        qcompile.sensitivity(model, batches[:1], options=OPTIONS, resume=path)


# --- groups ----------------------------------------------------------------------------------------------------------


def test_layers_that_read_one_activation_share_a_choice():
    found = qcompile.sensitivity(Attention(), sequences(), options=OPTIONS)
    groups = {frozenset(layer.name.rpartition(".")[2] for layer in group) for group in found.groups}
    assert groups >= {frozenset("qkv"), frozenset({"gate", "up"}), frozenset({"down"}), frozenset("o")}
    for budget in (0.0, 0.2, 0.5, 0.8):
        choice = found.at(budget).choice
        assert choice["q"] == choice["k"] == choice["v"]
        assert choice["gate"] == choice["up"]


def test_experts_share_a_choice():
    names = ["mlp.experts.0.up", "mlp.experts.1.up", "mlp.experts.10.up", "mlp.experts.0.down", "mlp.gate"]
    layers = [Layer(name, "linear", reads=str(i)) for i, name in enumerate(names)]
    assert [[layer.name for layer in group] for group in grouped(layers)] == [names[:3], [names[3]], [names[4]]]


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_knapsack_finds_what_trying_everything_finds():
    generator = torch.Generator().manual_seed(3)
    for sizes in ([2], [3, 2, 4], [3, 3, 3, 3, 2]):
        groups = [
            [
                (int(torch.randint(0, 9, (), generator=generator)), float(torch.rand((), generator=generator)))
                for _ in range(size)
            ]
            for size in sizes
        ]
        frontier = solve(groups)
        everything = [[sum(numbers) for numbers in zip(*picked, strict=True)] for picked in itertools.product(*groups)]
        for limit in range(sum(max(cost for cost, _ in group) for group in groups) + 1):
            affordable = [score for cost, score in everything if cost <= limit]
            if affordable:
                point = frontier.within(limit)
                assert float(frontier.scores[point]) == pytest.approx(min(affordable), abs=1e-12)
                picked = [group[i] for group, i in zip(groups, frontier.choice(point), strict=True)]
                assert sum(cost for cost, _ in picked) == int(frontier.costs[point]) <= limit
                assert sum(score for _, score in picked) == pytest.approx(float(frontier.scores[point]), abs=1e-12)


def test_more_budget_never_scores_worse_and_the_ends_are_all_and_nothing():
    found = qcompile.sensitivity(Attention(), sequences(), options=OPTIONS)
    scores = [found.at(budget / 20).score for budget in range(21)]
    assert scores == sorted(scores, reverse=True)
    assert set(found.at(0).chosen) == {"qcompile_fp4"}
    assert set(found.at(1).chosen) == {WIDE}
    assert found.at(1).score == 0
    assert found.at(0).rules == []
    with pytest.raises(ValueError, match="budget=-1 is not a number from 0 to 1"):
        found.at(-1)


@pytest.mark.parametrize("cost", COSTS)
def test_every_cost_prices_high_precision_above_four_bits_for_wide_layers(cost):
    layer = Layer("0", "linear", m=4096, n=4096, k=4096, activation=4096**2, weight=4096**2, itemsize=2, reads="x")
    layer.candidates = {"4": {"activation": FP4, "weight": FP4}, "mixed": {"activation": "off", "weight": FP4}}
    price = COSTS[cost][0]
    assert price([layer], "4") < price([layer], WIDE)
    assert price([layer], "4") <= price([layer], "mixed")
    bits = 4 * 4096**2 + 32 * 4096
    expected = {"operations": 2 * 4096**3 * 4 * 4, "weights": bits, "saved": bits // 8}
    if cost in expected:
        assert price([layer], "4") == expected[cost]
    if cost == "saved":  # what three layers read is kept once
        assert price([layer] * 3, "4") == price([layer], "4")


# --- rules -----------------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Names that are parts of others: a rule for "0" is one for "head.0" too."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(32, 32))
        self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.get_submodule("0")(x)).square().mean()


def formats(model: nn.Module, x: Tensor, rules: list[dict[str, object]]) -> dict[str, str]:
    """Layer → what its weight is, by the report of a compilation with these rules."""
    report = qcompile.explain(model, x, options={**OPTIONS, "strict": True, "rules": rules})
    return {row.layer: row.formats or row.decision for row in report.rows if row.role in ("fprop", "-")}


def test_rules_compile_and_change_exactly_the_chosen_layers():
    made, (x,) = Attention(), sequences()
    found = qcompile.sensitivity(made, [x], options=OPTIONS, candidates={"4": {}, "8": INT8})
    assert {found.at(budget).rules == [] for budget in (0.0, 0.1)} == {True, False}
    before = formats(made, x, [])
    for budget in (0.1, 0.6):
        at = found.at(budget)
        after = formats(made, x, at.rules)
        wanted = {"4": "e2m1 row × e2m1 row", "8": "int8 row × int8 row", WIDE: "skipped"}
        for name, choice in at.choice.items():
            assert after[name] == wanted[choice], (budget, name)
        assert {n: f for n, f in after.items() if n not in at.choice} == {
            n: f for n, f in before.items() if n not in at.choice
        }


def test_a_layer_that_an_earlier_rule_meets_gets_its_own():
    """Here the layer "0" stays wide, and "head.0", which a rule for "0" meets as well, does not."""
    made, (x,) = Nested(), sequences()
    found = qcompile.sensitivity(made, [x], options=OPTIONS)
    for layer in found.layers:
        layer.scores = {"qcompile_fp4": 1.0 if layer.name == "0" else 1e-3}
    again = qcompile.Sensitivity.of(found.layers, found.candidates, COSTS["weights"][0], "", 0.34, OPTIONS)
    assert again.choice == {"0": WIDE, "head.0": "qcompile_fp4", "head.2": "qcompile_fp4"}
    assert formats(made, x, again.rules) == {
        "0": "skipped", "head.0": "e2m1 row × e2m1 row", "head.2": "e2m1 row × e2m1 row",
    }  # fmt: skip


def test_what_is_read_of_it(tmp_path):
    found = qcompile.sensitivity(Attention(), sequences(), options={**OPTIONS, "skip": ["o"]}, progress=True)
    text = str(found)
    assert all(part in text for part in ("down", "100.0%", "budget 25%"))
    skipped = next(layer for layer in found.layers if layer.name == "o")
    assert (skipped.scores, skipped.reason) == ({}, "skip='o'")
    data = json.loads(found.to_json())
    assert (data["choice"], data["rules"]) == (found.choice, found.rules)
    found.plot(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5000


# --- what cannot be used ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 1.5}, "budget=1.5 is not a number from 0 to 1"),
        ({"budget": True}, "budget=True is not a number"),
        ({"cost": "milk"}, "cost='milk' is not one of operations, weights, saved, time"),
        ({"cost": lambda layers, option: 1.5}, "cost of 'first' is 1.5; a cost is an integer"),
        ({"candidates": []}, "candidates takes a dictionary"),
        ({"candidates": {"wide": {}}}, "candidate 'wide': a name is text, and 'wide' is high precision"),
        ({"candidates": {"a": {"wieght": FP4}}}, "candidate 'a': unknown key 'wieght'"),
        ({"candidates": {"a": "e9m9 row"}}, "candidate 'a': .*e9m9"),
        ({"candidates": {"a": 4}}, "candidate 'a': bits: 4 is not one of the widths"),
        ({"backend": "qcompile_fp5"}, "unknown backend 'qcompile_fp5'"),
        ({"options": {"wieght": FP4}}, "unknown option 'wieght'; did you mean 'weight'"),
        ({"options": {"skip": ["frist"]}}, "skip='frist' matched no GEMM.*did you mean 'first'"),
        ({"options": {"min_side": 512}}, "no product to score: a side of its weight is"),
        ({"batches": []}, "batches is empty"),
        ({"loss": lambda model, batch: batch[0]}, r"the loss is no scalar tensor but shape \(9, 24\)"),
        ({"loss": lambda model, batch: (model(*batch), batch[0].sum())[1]}, "does not depend on any product"),
        ({"loss": lambda model, batch: model(*batch) / 0}, "the score of layer 'first' as 'qcompile_fp4' is"),
        ({"model": TwoLayers}, "takes a model, got the class TwoLayers"),
    ],
)
def test_bad_input_gives_one_line(changes, message):
    given = {"model": TwoLayers(), "batches": pairs(1), "options": OPTIONS, **changes}
    with pytest.raises(ValueError, match=message) as caught:
        qcompile.sensitivity(given.pop("model"), given.pop("batches"), **given)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="is no file of a search"):
        qcompile.sensitivity(TwoLayers(), pairs(1), options=OPTIONS, resume=path)
    assert path.read_text() == "[]"
