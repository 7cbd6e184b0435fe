"""Producers: the pointwise operations that compute a tensor, for a kernel that quantizes it to do itself.

In the arguments of an op a producer is text, one step after the other::

    neg(a); exp(%0); add(%1, 1.0); div(a, %2) bfloat16; mul(%3, b) bfloat16

A step is given inputs (``a`` to ``d``), results of earlier steps (``%0`` is the first one's) and numbers. It computes
in float32, and its result has the dtype that stands behind it, float32 if none does.

Triton is printed with the functions that Inductor prints for the same ATen calls (``tests/kernels/test_producer.py``
compares), and like Inductor's it keeps float32 from step to step: only the last result is rounded. So a tensor has the
same bits whether Inductor writes it or the kernel that quantizes it computes it. The exception is what
:attr:`Producer.contracted` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .formula.triton_target import loaded

__all__ = ["INPUTS", "OPERATIONS", "Operation", "Producer", "Step"]

#: Names of inputs, and how many there may be.
INPUTS = "abcd"


@dataclass(frozen=True)
class Operation:
    """``compute``: on float32 tensors; ``triton``: as Inductor prints it; ``instructions``: about how many an element
    takes on Hopper.
    """

    compute: Callable[..., Tensor]
    triton: str
    instructions: int


OPERATIONS: dict[str, Operation] = {
    "neg": Operation(torch.neg, "-{0}", 0),
    "add": Operation(torch.add, "{0} + {1}", 1),
    "sub": Operation(torch.sub, "{0} - {1}", 1),
    "mul": Operation(torch.mul, "{0} * {1}", 1),
    "div": Operation(torch.div, "({0} / {1})", 11),
    "exp": Operation(torch.exp, "libdevice.exp({0})", 8),
    "erf": Operation(torch.erf, "libdevice.erf({0})", 28),
    "sigmoid": Operation(torch.sigmoid, "tl.sigmoid({0})", 20),
    "round": Operation(torch.clone, "{0}", 0),  # to the dtype of the step
}
#: What may stand between a product and the sum that it is contracted with.
_PASSED_THROUGH = ("neg", "round")

_STEP = re.compile(r"(\w+)\(([^()]*)\)(?: (\w+))?")
_HEAD = '''"""Printed by qcompile.kernels.producer."""
import triton
import triton.language as tl
from {module} import {name} as libdevice


@triton.jit
'''


@dataclass(frozen=True)
class Step:
    """``operation`` of ``arguments`` (inputs, results and numbers, as the text has them), and the result's dtype."""

    operation: str
    arguments: tuple[str, ...]
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{self.operation}({', '.join(self.arguments)}){dtype}"


@dataclass(frozen=True)
class Producer:
    """A chain of steps; the last one's result is what it produces."""

    steps: tuple[Step, ...]

    @staticmethod
    @cache
    def parse(text: str) -> Producer:
        """Raises ``ValueError`` for text that is no producer."""
        steps = []
        for part in text.split("; "):
            match = _STEP.fullmatch(part)
            if match is None or match[1] not in OPERATIONS:
                msg = f"{part!r} is no step of a producer; operations are {', '.join(OPERATIONS)}"
                raise ValueError(msg)
            steps.append(Step(match[1], tuple(match[2].split(", ")), getattr(torch, match[3] or "float32")))
        return Producer(tuple(steps))

    def __str__(self) -> str:
        return "; ".join(map(str, self.steps))

    @property
    def dtype(self) -> torch.dtype:
        return self.steps[-1].dtype

    @property
    def operations(self) -> str:
        """Their names, for people."""
        return ", ".join(step.operation for step in self.steps if step.operation != "round")

    @property
    def instructions(self) -> int:
        """About how many an element takes."""
        return sum(OPERATIONS[step.operation].instructions for step in self.steps)

    @property
    def contracted(self) -> bool:
        """Whether a product is added to something. Inductor lets such a pair become one multiply-add, which rounds
        once; kernels that quantize do not.
        """
        return any(
            self._is_product(argument)
            for step in self.steps
            if step.operation in ("add", "sub")
            for argument in step.arguments
        )

    def _is_product(self, argument: str) -> bool:
        if not argument.startswith("%"):
            return False
        step = self.steps[int(argument[1:])]
        through = step.operation in _PASSED_THROUGH
        return self._is_product(step.arguments[0]) if through else step.operation == "mul"

    def produced(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """The tensor, with the inputs broadcast, by torch."""
        known: dict[str, Any] = {name: x.float() for name, x in zip(INPUTS, inputs, strict=False) if x is not None}
        for i, step in enumerate(self.steps):
            arguments = (known[a] if a in known else float(a) for a in step.arguments)
            result = OPERATIONS[step.operation].compute(*arguments).to(step.dtype)
            known[f"%{i}"] = result.float()
        return result


@dataclass(frozen=True, eq=False)
class DeviceProducer:
    """A producer as a constant of a kernel; there is one of each (:func:`device_producer`).

    Attributes:
        source: of ``element``; Triton's cache on disk tells producers apart by it.
        element: device function of all inputs, those that there are in float32.
    """

    source: str
    element: Any = field(repr=False)

    @property
    def cache_key(self) -> str:
        return self.source


@cache
def device_producer(text: str) -> DeviceProducer:
    source = _HEAD.format(**_libdevice()) + triton_source(Producer.parse(text))
    return DeviceProducer(source, loaded(source, "element"))


def triton_source(producer: Producer) -> str:
    """The device function as Python text, without its decorator."""
    lines = [f"def element({', '.join(INPUTS)}):"]
    for i, step in enumerate(producer.steps):
        arguments = (a.replace("%", "step") for a in step.arguments)
        lines.append(f"    step{i} = {OPERATIONS[step.operation].triton.format(*arguments)}")
    return "\n".join([*lines, f"    return step{len(producer.steps) - 1}", ""])


def _libdevice() -> dict[str, str]:
    from .triton import INTERPRETED  # torch for CPUs comes without Triton

    # The interpreter has no functions of CUDA's library.
    module, name = (
        ("triton.language", "math") if INTERPRETED else ("torch._inductor.runtime.triton_helpers", "libdevice")
    )
    return {"module": module, "name": name}
