"""The numerics monitor: its numbers are those of the operands, and watching changes nothing."""

from __future__ import annotations

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.operand import Operand
from qcompile.kernels.statistics import STATISTICS
from qcompile.recipes import FP4, QUEST

ops = torch.ops.qcompile


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(96, 40), nn.Linear(40, 37)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def compiled(model, recipe=FP4, **options):
    def backend(gm, inputs):
        return compile_with(recipe, gm, inputs, options=options, inner_compile=compat.eager_inner_compile)

    return torch.compile(model, backend=backend, fullgraph=True)


OPERANDS = [
    "e2m1 row absmax even",
    "e2m1 row absmax even; ste; occ(alpha=0.9)",
    "e2m1 row absmax even; ste; occ(alpha=0.9,residual=e4m3)",
    "e2m1 block16 e8m0 even; clip",
    "e2m1 tensor absmax even",
    "e2m1 block16 e4m3 even",
    "midrise4 row rms half_up; trust; hadamard(32)",
    "midrise4 row rms half_up; trust; hadamard(32); sparse(4:8)",
    "midrise1 row rms half_up; clip(s=1.3); hadamard(32)",
]


@pytest.mark.parametrize("operand", OPERANDS)
def test_statistics_are_what_they_are_called(operand):
    """By their definitions, from the values an operand takes and the gradient it lets pass."""
    x = torch.randn(9, 96, requires_grad=True)
    signal, noise, clipped, masked, underflow, *columns = ops.operand_statistics(x, operand, -1).tolist()
    restored = ops.fake_quantize(x, operand, -1)
    assert signal == pytest.approx(x.square().mean().item(), rel=1e-5)
    assert noise == pytest.approx((x - restored).square().mean().item(), rel=1e-5)
    assert columns == [0, 0]  # tests/recipes/test_llm_int8.py
    spec = Operand.parse(operand)
    if spec.estimator.kind.mask and not spec.transform:
        restored.sum().backward()
        assert masked == pytest.approx((x.grad == 0).float().mean().item(), abs=1e-6)
    elif not spec.estimator.kind.mask:
        assert masked == 0
    if not spec.transform and not spec.outliers:
        zeros = ((restored == 0) & (x != 0)).float().mean().item()
        assert underflow == pytest.approx(zeros, abs=1e-6)
    if spec.quantizer.scale.name == "absmax" and not spec.outliers:
        assert clipped == 0
    if spec.quantizer.scale.name == "rms":
        largest = spec.stored.format.max * ops.quantize(x, str(spec.stored), -1, transform=str(spec.transform))[1]
        beyond = ops.hadamard(x.detach(), 32, -1).abs() > largest * (1 + 2.0**-22)
        assert clipped == pytest.approx(beyond.float().mean().item(), abs=1e-6)
        assert clipped > 0


@pytest.mark.parametrize("rows", [1000, 4099])
def test_many_rows_are_sampled(rows):
    """Every sixteenth of them: a spoiled row shows if it is among those, and only then."""
    x = torch.randn(rows, 16)
    x[1] *= 1e4
    signal = ops.operand_statistics(x, OPERANDS[0], -1)[0].item()
    assert (signal > 1e4) == (rows < 1024)


@pytest.mark.parametrize("recipe", [FP4, QUEST], ids=lambda r: r.name)
def test_watching_changes_no_number(recipe):
    model, x = Mlp(), torch.randn(5, 96)
    monitor = qcompile.Monitor()

    def step(call):
        model.zero_grad()
        loss = call(x).square().sum()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    plain = step(compiled(model, recipe))
    torch._dynamo.reset()
    watched = step(compiled(model, recipe, monitor=monitor, debug=True))
    assert all(torch.equal(one, other) for one, other in zip(plain, watched, strict=True))
    monitor.step()
    assert [row[:2] for row in monitor.layers] == [
        ("up", "activation"), ("up", "weight"), ("down", "activation"), ("down", "weight"),
    ]  # fmt: skip
    expected = ops.operand_statistics(model.up.weight, str(recipe.weight), -1)
    torch.testing.assert_close(monitor.history[0, 1], expected)


def test_nothing_more_is_saved_for_the_backward():
    model, x = Mlp(), torch.randn(64, 96)
    sizes = []
    for options in ({}, {"monitor": qcompile.Monitor()}):
        torch._dynamo.reset()
        with qcompile.saved_bytes(model, x) as saved:
            compiled(model, QUEST, **options)(x)
        sizes.append(saved.total)
    assert sizes[0] == sizes[1]


def test_steps_are_means_of_their_calls():
    """Gradient accumulation averages, evaluation does not count, a step without a call is empty."""
    model, monitor = Mlp(), qcompile.Monitor()
    call = compiled(model, monitor=monitor)
    batches = [torch.randn(5, 96) * scale for scale in (1, 2, 3)]
    call(batches[0])
    call(batches[1])
    with torch.no_grad():
        call(batches[2])
    monitor.step()
    monitor.step()
    call(batches[2])
    monitor.step()
    signal = monitor.history[:, 0, 0]
    squares = [batch.square().mean() for batch in batches]
    torch.testing.assert_close(signal[0], (squares[0] + squares[1]) / 2)
    assert signal[1].isnan()
    torch.testing.assert_close(signal[2], squares[2])
    torch.testing.assert_close(monitor.sqnr()[2, 0], 10 * (monitor.history[2, 0, 0] / monitor.history[2, 0, 1]).log10())


def test_tables_files_and_pictures(tmp_path):
    model, monitor = Mlp(), qcompile.Monitor()
    call = compiled(model, monitor=monitor)
    for _ in range(3):
        call(torch.randn(5, 96))
        monitor.step()
    text = str(monitor)
    assert "4 operands, 3 steps" in text
    assert all(word in text for word in ("up", "down", "e2m1 row absmax even", "SQNR dB", "underflow %"))
    monitor.to_csv(tmp_path / "numerics.csv")
    with (tmp_path / "numerics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    assert set(rows[0]) == {"step", "layer", "operand", "sqnr_db", *STATISTICS[2:]}
    assert all(5 < float(row["sqnr_db"]) < 40 for row in rows)
    scalars = {}

    class Writer:
        def add_scalar(self, tag, value, step):
            scalars[tag] = (value, step)

    monitor.to_tensorboard(Writer())
    assert scalars["up/activation/sqnr_db"] == (pytest.approx(float(monitor.sqnr()[-1, 0])), 2)
    for what in ("sqnr_db", "underflow"):
        monitor.heat_map(tmp_path / f"{what}.png", what)
        assert (tmp_path / f"{what}.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match=r"heat_map\('snr', 'activation'\): known are sqnr_db, clipped"):
        monitor.heat_map(tmp_path / "no.png", "snr")


def test_the_monitor_of_the_process_and_bad_values():
    compiled(Mlp(), monitor=True)(torch.randn(5, 96))
    assert [layer for layer, *_ in qcompile.monitor().layers] == ["up", "up", "down", "down"]
    with pytest.raises(ValueError, match=r"option 'monitor': 'yes' is not True, False or a qcompile\.Monitor"):
        FP4.override({"monitor": "yes"})


@pytest.mark.inductor
def test_through_inductor_with_changing_shapes():
    """Dynamic rows; the graph of few rows and that of many are one to the monitor; `explain` does not watch."""
    model, monitor = Mlp().up, qcompile.Monitor()  # one layer: its statistics are twenty C++ kernels
    call = torch.compile(model, backend="qcompile_quest", options={"monitor": monitor}, dynamic=True)
    for rows in (5, 1500):
        x = torch.randn(rows, 96)
        call(x).sum().backward()
        monitor.step()
    expected = ops.operand_statistics(x, str(QUEST.activation), -1)
    torch.testing.assert_close(monitor.history[1, 0, 1], expected[1], rtol=1e-4, atol=0)
    assert len(monitor.layers) == 2
    qcompile.explain(model, x, options={"monitor": monitor})
    assert len(monitor.layers) == 2


def test_gradient_cosine():
    """Close to 1 for eight bits, less for one, NaN where there is no direction."""
    model, x = Mlp(), torch.randn(64, 96)

    def loss(call):
        return call(x).square().mean()

    cosines = [qcompile.gradient_cosine(model, loss, "qcompile_quest", {"bits": bits}) for bits in (8, 1)]
    torch._dynamo.reset()
    assert set(cosines[0]) == {name for name, _ in model.named_parameters()}
    assert all(value > 0.999 for value in cosines[0].values())
    assert cosines[1]["up.weight"] < 0.95
    assert all(p.grad is None for p in model.parameters())
    assert math.isnan(qcompile.gradient_cosine(model, lambda call: call(x).sum() * 0)["up.weight"])
