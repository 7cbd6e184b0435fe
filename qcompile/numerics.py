"""The numerics monitor: what quantization does to every operand, step by step, without stopping the device.

::

    monitor = qcompile.Monitor()
    model = torch.compile(model, backend="qcompile_fp4", options={"monitor": monitor})
    for batch in data:
        train_step(model, batch)
        monitor.step()
    print(monitor)
    monitor.heat_map("sqnr.png")

Every compiled graph returns one small table of statistics beside its results, which is added up on the device; reading
the monitor is what copies to the host. ``options={"monitor": True}`` takes the monitor of the process,
:func:`monitor`. Calls in which autograd is off are not counted.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qcompile.kernels.statistics import STATISTICS

from .backends import plain_model
from .ir.definitions import short_names

__all__ = ["Monitor", "gradient_cosine", "monitor"]

#: What a monitor reports of an operand, beside its SQNR: shares of its elements.
SHARES = STATISTICS[2:]


@dataclass
class _Graph:
    """Sums of one compiled graph since the last step, and the means of the steps before, on the device."""

    rows: list[tuple[str, str, str]]
    total: Tensor | None = None
    calls: int = 0
    history: list[Tensor | None] = field(default_factory=list)


class Monitor:
    """Statistics of every quantized operand over steps.

    ``layers``: (layer, ``"activation"`` or ``"weight"``, operand text) of every row, in the order of compilation.
    """

    def __init__(self) -> None:
        self._graphs: list[_Graph] = []
        self._steps = 0

    def attach(self, rows: list[tuple[str, str, str]], compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, whose last result is the table of ``rows``, without that result; for the backend to call.

        A graph of the same operands as one before is that one compiled again, for other shapes.
        """
        graph = next((known for known in self._graphs if known.rows == rows), None)
        if graph is None:
            graph = _Graph(rows, history=[None] * self._steps)
            self._graphs.append(graph)

        def run(*args: Any) -> Any:
            *results, statistics = compiled(*args)
            if torch.is_grad_enabled():
                # At once: under CUDA graphs the next call writes to the same memory.
                graph.total = statistics.clone() if graph.total is None else graph.total.add_(statistics)
                graph.calls += 1
            return results

        return run

    def step(self) -> None:
        """End a step: what was gathered since the last one becomes its row of the history. Does not synchronize."""
        for graph in self._graphs:
            graph.history.append(None if graph.total is None else graph.total / graph.calls)
            graph.total, graph.calls = None, 0
        self._steps += 1

    @property
    def layers(self) -> list[tuple[str, str, str]]:
        return [row for graph in self._graphs for row in graph.rows]

    @property
    def history(self) -> Tensor:
        """Float32 ``[steps, operands, statistics]`` on the host, NaN where a graph did not run; synchronizes."""
        steps = [self._at(step) for step in range(self._steps)]
        return torch.stack(steps) if steps else torch.empty(0, len(self.layers), len(STATISTICS))

    def _at(self, step: int) -> Tensor:
        """One step of the history, the only one that is copied."""
        nothing = [torch.full((len(graph.rows), len(STATISTICS)), math.nan) for graph in self._graphs]
        found = [graph.history[step] for graph in self._graphs]
        parts = [none if part is None else part.cpu() for part, none in zip(found, nothing, strict=True)]
        return torch.cat(parts) if parts else torch.empty(0, len(STATISTICS))

    def sqnr(self) -> Tensor:
        """Signal-to-quantization-noise ratio in dB, ``[steps, operands]``."""
        return _sqnr(self.history)

    def table(self, last: int | None = None) -> Table:
        """A rich table of means over the ``last`` steps (default: all)."""
        table = Table(title=f"{len(self.layers)} operands, {self._steps} steps", title_justify="left")
        for column in ("layer", "operand", "format", "SQNR dB", *(f"{share} %" for share in SHARES)):
            table.add_column(column, justify="left" if column in ("layer", "operand", "format") else "right")
        history = self.history[-last:] if last else self.history
        means = history.nanmean(0) if len(history) else history.new_full(history.shape[1:], math.nan)
        for (layer, kind, text), row in zip(self.layers, means, strict=True):
            signal, noise, *shares = row.tolist()
            ratio = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.nan
            table.add_row(
                layer, kind, short_names(text.split(";")[0]), f"{ratio:.2f}", *(f"{100 * s:.3f}" for s in shares)
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        console = Console(width=160, file=io.StringIO())
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]

    def to_csv(self, path: str | Path) -> None:
        """One line per operand and step: step, layer, operand, sqnr_db and the shares."""
        history = self.history
        sqnr = _sqnr(history)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "layer", "operand", "sqnr_db", *SHARES])
            for step in range(len(history)):
                for i, (layer, kind, _) in enumerate(self.layers):
                    shares = history[step, i, 2:].tolist()
                    writer.writerow([step, layer, kind, f"{sqnr[step, i]:.4f}", *(f"{s:.6g}" for s in shares)])

    def to_tensorboard(self, writer: Any, step: int | None = None) -> None:
        """The last finished step as scalars ``<layer>/<operand>/sqnr_db`` and so on.

        ``writer``: a ``SummaryWriter``, or anything with its ``add_scalar(tag, value, global_step)``.
        """
        if not self._steps:
            return
        last, step = self._at(-1), self._steps - 1 if step is None else step
        for (layer, kind, _), row, ratio in zip(self.layers, last, _sqnr(last), strict=True):
            values = {"sqnr_db": ratio, **dict(zip(SHARES, row[2:], strict=True))}
            for name, value in values.items():
                writer.add_scalar(f"{layer}/{kind}/{name}", float(value), step)

    def heat_map(self, path: str | Path, what: str = "sqnr_db", operand: str = "activation") -> None:
        """Draw layers × steps to an image file: ``"sqnr_db"`` or one of the shares, of activations or weights.

        Raises ``ValueError`` for another name, ``ImportError`` without matplotlib.
        """
        if what not in ("sqnr_db", *SHARES) or operand not in ("activation", "weight"):
            msg = f"heat_map({what!r}, {operand!r}): known are sqnr_db, {', '.join(SHARES)}; activation, weight"
            raise ValueError(msg)
        from matplotlib.figure import Figure

        chosen = [i for i, (_, kind, _) in enumerate(self.layers) if kind == operand]
        values = self.sqnr() if what == "sqnr_db" else self.history[..., STATISTICS.index(what)]
        figure = Figure(figsize=(8, 1 + 0.22 * len(chosen)), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values[:, chosen].T, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set_yticks(range(len(chosen)), [self.layers[i][0] for i in chosen], fontsize=6)
        axes.set(xlabel="step", title=f"{what} of {operand}s")
        figure.colorbar(image, ax=axes)
        figure.savefig(path, dpi=150)


def _sqnr(statistics: Tensor) -> Tensor:
    """Signal-to-noise ratio in dB of statistics ``[…, len(STATISTICS)]``."""
    return 10 * torch.log10(statistics[..., 0] / statistics[..., 1])


_monitor = Monitor()


def monitor() -> Monitor:
    """The monitor that ``options={"monitor": True}`` reports to: one for the process."""
    return _monitor


def gradient_cosine(
    model: nn.Module,
    loss: Callable[[Callable[..., Any]], Tensor],
    backend: str = "qcompile_fp4",
    options: Mapping[str, Any] | None = None,
    parameters: Sequence[str] | None = None,
) -> dict[str, float]:
    """Cosine between each parameter's gradient with and without quantization, by parameter name.

    Args:
        model: the module, not compiled; its gradients are left as they were.
        loss: called with a compiled ``model``, returns the loss of a batch; runs twice.
        backend: name of a recipe.
        options: as for ``torch.compile``.
        parameters: names to look at, default all that get a gradient.

    Both runs start from the same random state. A gradient that is all zeros has no direction: NaN.

    Raises ``ValueError`` for a class in place of a model.
    """
    model = plain_model(model, "gradient_cosine")
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {name: named[name] for name in parameters} if parameters is not None else named
    found = []
    for given in (dict(options or {}), {**(options or {}), "enabled": False}):
        with torch.random.fork_rng():
            value = loss(torch.compile(model, backend=backend, options=given))
            found.append(torch.autograd.grad(value, list(named.values()), allow_unused=True))
    return {
        name: float(nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), 0, 0))
        if bool(one.any() and other.any())
        else math.nan
        for name, one, other in zip(named, *found, strict=True)
        if one is not None and other is not None
    }
