"""What no graph holds: products that ran in Python, by parameter and product, and what training would leave there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import conv2d, linear, scaled_dot_product_attention

import qcompile
from qcompile import compat
from qcompile.report import Report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Outside(nn.Module):
    """Runs ``body`` in Python, and one captured linear layer behind it."""

    def __init__(self, body: Callable[[Outside, Tensor], Tensor]) -> None:
        super().__init__()
        self.base, self.norm, self.out = nn.Linear(16, 24), nn.LayerNorm(16), nn.Linear(24, 8)
        self.body = torch._dynamo.disable(body)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self, x))


def outside(report: Report) -> list[tuple[str, str, str]]:
    rows = [row for row in report.rows if row.decision == "not captured"]
    assert {row.role for row in rows} <= {"-"}
    return [(row.layer, row.op, row.shape) for row in rows]


# --- modules -----------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.inp, self.encoder, self.out = nn.Linear(40, 12), kind(12, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.inp(x))[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_a_recurrent_layer_that_keeps_the_model_in_python_is_named(kind):
    """Dynamo gives the whole frame up, so there is nothing else to report."""
    report = qcompile.explain(Tagger(kind), torch.randn(3, 7, 40))
    missing, advice = report.remarks
    assert "encoder" in missing
    assert missing.startswith("not captured: ")
    assert "(encoder)" in advice
    assert "torch._dynamo.config.allow_rnn = True" in advice
    assert report.summary().endswith(f"\n{missing}\n{advice}")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        report = qcompile.explain(Tagger(kind), torch.randn(3, 7, 40))
    assert report.remarks == []
    assert {"inp", "out"} <= {row.layer for row in report.rows}


def test_modules_that_are_in_no_graph_are_listed():
    """A layer behind a graph break of the user's that leaves its frame in Python; others are as they were."""

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden, self.norm = nn.Linear(40, 12), nn.Linear(12, 12), nn.LayerNorm(12)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch._dynamo.disable(self.hidden)(self.seen(x)))

    report = qcompile.explain(Partly(), torch.randn(6, 40))
    assert report.remarks == ["not captured: hidden (linear 6×12 · 12×12 ran in Python)"]
    assert [row.layer for row in report.rows if row.role == "fprop"] == ["seen"]
    merged = Report.merged([report, report])
    assert merged.remarks == report.remarks


def test_equal_layers_that_share_a_graph_are_all_in_it():
    """As under FSDP2, whose hooks leave the loop over blocks in Python and one graph for all blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x).relu()

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                torch._dynamo.graph_break()
                x = block(x)
            return x

    x = torch.randn(6, 12)
    report = qcompile.explain(Loop(), x)
    assert report.graphs < 3
    assert report.remarks == []
    first, *_, other = [row for row in report.rows if row.role == "fprop"]
    assert "times" not in first.reason  # whose input needs no gradient
    assert other.reason.endswith("its graph runs 2 times")
    torch._dynamo.reset()
    inputs = (x, *2 * [x.clone().requires_grad_()])
    assert report.saved_bytes == sum(qcompile.explain(Block(), given).saved_bytes for given in inputs)
    assert report.code_bytes == sum(row.saved_bytes for row in report.rows) > 0


# --- by parameter and product -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_a_product_in_python_is_named_though_a_graph_reads_its_weight(norm):
    """What DoRA does: a graph has the norm of the base layer's weight, Python has its product."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(48, 32, bias=False)

        def scale(self) -> Tensor:
            return self.base.weight.norm(dim=1)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(1):
                torch._dynamo.graph_break()  # in a loop: Dynamo leaves the frame in Python
                y = self.base(x)
            return y / self.scale() if norm else y

    report = qcompile.explain(Layer(), torch.randn(5, 48))
    assert outside(report) == [("base", "linear", "5×48 · 32×48")]
    assert report.remarks == ["not captured: base (linear 5×48 · 32×48 ran in Python)"]
    assert (report.sites, report.quantized_sites, report.graphs) == (1, 0, int(norm))
    assert "0 of 1 GEMM sites quantized" in report.summary()
    assert "1 not captured" in report.summary()


def test_one_parameter_of_a_module_may_be_in_python_and_another_in_a_graph():
    """As in a relational graph convolution, whose ``root`` is multiplied outside of what Dynamo captures."""

    class Relational(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.root = nn.Parameter(torch.randn(3, 16, 24)), nn.Parameter(torch.randn(16, 24))

        def messages(self, x: Tensor) -> Tensor:
            return x @ self.weight[0]

        def forward(self, x: Tensor) -> Tensor:
            return self.messages(x) + torch._dynamo.disable(torch.matmul)(x, self.root)

    model = nn.Sequential(Relational())
    report = qcompile.explain(model, torch.randn(6, 16))
    assert outside(report) == [("0", "mm", "6×16 · 16×24")]
    assert report.rows[-1].reason == "root: ran in Python, no graph has it"
    assert report.remarks == ["not captured: * (root: mm 6×16 · 16×24 ran in Python)"]
    assert report.sites == 2


def test_a_layer_that_runs_in_a_graph_and_in_python_too_is_both():
    model = Outside(lambda self, x: self.base(self.norm(x)))
    model.forward = lambda x: model.base(x) + model.body(model, x)  # type: ignore[method-assign]
    report = qcompile.explain(model, torch.randn(6, 16))
    assert [row.decision for row in report.rows if row.role in ("fprop", "-")] == ["quantized", "not captured"]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda self, x: linear(x[None], self.base.weight.bfloat16().float())[0], ("base", "linear", "6×16 · 24×16")),
        (lambda self, x: x @ self.base.weight.T, ("base", "linear", "6×16 · 24×16")),
        (lambda self, x: (self.base.weight @ x.T).T, ("base", "mm", "24×16 · 16×6")),
        (lambda self, x: torch.vmap(self.base)(x), ("base", "linear", "6×16 · 24×16")),
        (lambda self, x: torch.bmm(x[None], self.base.weight.T[None])[0], ("base", "bmm", "1×6×16 · 1×16×24")),
        (lambda self, x: torch.mv(self.base.weight, x[0])[None], ("base", "mv", "24×16 · 16")),
        (
            lambda self, x: conv2d(x[..., None, None], self.base.weight[..., None, None])[..., 0, 0],
            ("base", "conv2d", "6×16×1×1 · 24×16×1×1"),
        ),
        (
            lambda self, x: self.base(scaled_dot_product_attention(x[None], x[None], x[None])[0]),
            ("Outside", "bmm", "1×6×16 · 1×16×6"),
        ),
    ],
    ids=["computed weight", "transposed", "weight first", "vmap", "bmm", "mv", "conv2d", "attention"],
)
def test_a_product_is_named_as_it_is_written(body, expected):
    """By its parameter, or where that is computed by the module that runs; ``linear`` reads its matrix transposed."""
    found = outside(qcompile.explain(Outside(body), torch.randn(6, 16)))
    if expected[0] == "Outside":
        assert [layer for layer, _, _ in found] == ["Outside"] * (len(found) - 1) + ["base"]
    else:
        layer = "Outside" if "float" in str(body.__code__.co_names) else expected[0]
        assert found == [(layer, *expected[1:])]


def test_equal_products_are_one_row_that_counts_them():
    def three_times(self: Outside, x: Tensor) -> Tensor:
        return self.base(x) + self.base(x) + self.base(x)

    report = qcompile.explain(Outside(three_times), torch.randn(6, 16))
    assert outside(report) == [("base", "linear", "6×16 · 24×16")]
    assert report.rows[-1].reason == "ran in Python, no graph has it (3 times)"


def test_modules_without_products_are_named_too_and_unused_ones_are_not():
    """`norm` runs in Python; `base` does not run at all, so nothing of it is left in Python."""
    report = qcompile.explain(Outside(lambda self, x: self.norm(x).repeat(1, 2)[:, :24]), torch.randn(6, 16))
    assert report.remarks == ["not captured: norm (ran in Python)"]
    assert outside(report) == []


def test_equal_layers_are_named_together():
    model = nn.Sequential(*(Outside(lambda self, x: self.base(x)) for _ in range(4)))
    for module in model:
        module.out = nn.Linear(24, 16)
    report = qcompile.explain(model, torch.randn(6, 16))
    assert report.remarks == ["not captured: *.base (linear 6×16 · 24×16 ran in Python)"]
    assert len(outside(report)) == 4


def test_a_function_has_products_in_python_too():
    def function(x: Tensor) -> Tensor:
        return torch._dynamo.disable(torch.mm)(x, x) @ x

    report = qcompile.explain(function, torch.randn(16, 16))
    assert outside(report) == [("function", "mm", "16×16 · 16×16")]


def test_higher_order_operators_run_in_python_as_ever():
    """A dispatch mode that does not know them makes torch raise."""

    def body(self: Outside, x: Tensor) -> Tensor:
        return self.base(flex_attention(*[x.expand(1, 1, 6, 16)] * 3)[0, 0])

    assert outside(qcompile.explain(Outside(body), torch.randn(6, 16)))[-1] == ("base", "linear", "6×16 · 24×16")


@pytest.mark.parametrize("training", [True, False])
def test_dynamo_captures_as_it_does_without_us(training):
    """Watching must not turn a graph into Python, nor Python into a graph."""
    model = nn.Sequential(*(Outside(lambda self, x: self.base(x)) for _ in range(2)))
    model[0].out = nn.Linear(24, 16)
    x = torch.randn(6, 16)
    captured: list[list[str]] = []

    def backend(gm: Any, inputs: Any) -> Any:
        captured.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        return gm.forward

    with torch.set_grad_enabled(training):
        torch.compile(model, backend=backend)(x)
        torch._dynamo.reset()
        report = qcompile.explain(model, x)
    assert report.graphs == len(captured) == 2
    for index, targets in enumerate(captured):
        assert report.programs[f"graph{index}_dynamo_captured"].count("torch._C._nn.linear(") == len(targets)


# --- Dynamo's limits ----------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """One code object, as many versions of it as blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8 + n) for n in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = self.one(block, x)
        return x

    def one(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)[:, :8]


def explained(model: nn.Module, x: Tensor) -> Report:
    return qcompile.explain(model, x, options={"enabled": False})  # a graph's products count all the same, and sooner


@pytest.mark.parametrize("name", ["recompile_limit", "accumulated_recompile_limit"])
def test_what_training_drops_at_the_recompile_limit_is_remarked(name):
    """The number is what training drops indeed, and with the limit that the remark asks for it drops nothing."""
    model, x = Blocks(4), torch.randn(3, 8)

    def captured() -> int:
        torch._dynamo.reset()
        products = []

        def backend(gm: Any, inputs: Any) -> Any:
            products.extend(node for node in gm.graph.nodes if "linear" in str(node.target))
            return gm.forward

        torch.compile(model, backend=backend)(x)
        return len(products)

    with torch._dynamo.config.patch({name: 2}):
        report = explained(model, x)
        dropped = 4 - captured()
        (remark,) = report.remarks
        assert dropped == 2
        assert remark.startswith(f"over Dynamo's recompile limit: training leaves {dropped} of 4 captured products in")
        assert remark.endswith(f"raise torch._dynamo.config.{name} (now 2) to 4")
        assert remark in report.summary()
    with torch._dynamo.config.patch({name: 4}):
        assert captured() == 4
        assert explained(model, x).remarks == []


def test_explaining_again_does_not_count_earlier_versions():
    """Nor those that training has compiled: what counts is how many this model needs."""
    model, x = Blocks(2), torch.randn(3, 8)
    with torch._dynamo.config.patch(recompile_limit=3):
        assert [explained(model, x).remarks for _ in range(3)] == [[]] * 3


def test_the_limits_are_torchs():
    assert set(compat.recompile_limits()) == {"recompile_limit", "accumulated_recompile_limit"}
    assert all(isinstance(limit, int) for limit in compat.recompile_limits().values())
