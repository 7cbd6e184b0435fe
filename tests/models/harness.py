"""Run a model compiled and under the reference, and count what it multiplies: for the zoo's test and its benchmark."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.recipe import Recipe
from qcompile.passes.pass_base import Observations
from qcompile.passes.record import Decision

from .reference import Count, Flops, Operands, Reference
from .zoo import loss_of

__all__ = ["Compiled", "Expected", "Step", "expect"]


@dataclass
class Compiled:
    """A backend that runs all passes, verifies the graphs after each, and counts what then runs.

    Attributes:
        graphs: what the passes saw of every graph that was compiled.
        forward, backward: FLOPs since :meth:`restart`.
    """

    recipe: Recipe
    graphs: list[Observations] = field(default_factory=list)
    forward: Count = field(default_factory=Count)
    backward: Count = field(default_factory=Count)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        observed = Observations()
        compiled = compile_with(
            self.recipe, gm, example_inputs, observe=observed, inner_compile=self._eagerly, options={"debug": True}
        )
        self.graphs.append(observed)  # Dynamo restarts on some failures; only what compiled counts
        return compiled

    def _eagerly(self, gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Callable[..., Any]:
        run = compat.eager_inner_compile(gm, example_inputs, **kwargs)
        backward = bool(kwargs.get("is_backward"))

        def counted(args: list[Any]) -> Any:
            with Flops() as flops:
                result = run(args)
            count = self.backward if backward else self.forward
            count.total += flops.count.total
            count.quantized += flops.count.quantized
            return result

        counted._boxed_call = True  # type: ignore[attr-defined]
        return counted

    def restart(self) -> None:
        self.forward, self.backward = Count(), Count()

    @property
    def decisions(self) -> list[Decision]:
        return [decision for graph in self.graphs if graph.plan for decision in graph.plan.decisions]


@dataclass
class Step:
    """Loss and gradients of one step, by parameter."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @staticmethod
    def of(
        model: nn.Module,
        call: Callable[..., Any],
        batch: dict[str, Any],
        flops: AbstractContextManager[Any] | None = None,
    ) -> Step:
        """One forward of ``call`` and one backward, the latter within ``flops``."""
        model.zero_grad()
        loss = loss_of(call(**batch))
        with flops or nullcontext():
            loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return Step(loss.detach(), found)


@dataclass
class Expected:
    """What the eager model computes under a reference, and counts of its products."""

    step: Step
    reference: Reference
    forward: Flops
    backward: Flops


def expect(
    model: nn.Module, batch: dict[str, Any], operands: Operands | None = None, plain: Expected | None = None
) -> Expected:
    """One step of the eager model with its operands quantized; ``plain`` is one without, which knows the heads."""
    reference = Reference(model, batch, operands, plain.reference if plain else None)
    forward = Flops(reference)
    backward = Flops(marks=forward.marks)

    def call(**inputs: Any) -> Any:
        with reference.on(), forward:
            return model(**inputs)

    return Expected(Step.of(model, call, batch, backward), reference, forward, backward)
