"""Muon whose momentum takes one byte per parameter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.ir.sharding import is_sharded, local_tensor
from qcompile.kernels.formula.torch_target import evaluate

from . import blocks, formulas
from .base import PER_STEP, RULES, PackedOptimizer, int32, is_number
from .states import E4M3, FP32, Numbers, block_of, like

__all__ = ["Muon"]

#: The numbers of the momentum, by the name that ``states=`` takes.
STATES = {"8bit": E4M3, "fp32": FP32}
_ADJUSTMENTS = (None, "original", "match_rms_adamw")
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True)
class _Momentum:
    """What is kept of a matrix; ``block`` is 0 where nothing is scaled."""

    numbers: Numbers
    block: int

    def entries(self) -> Iterator[tuple[str, Numbers]]:
        """The name of ``torch.optim.Muon``'s state."""
        yield "momentum_buffer", self.numbers


def _is_whole(number: Any, least: int, below: int) -> bool:
    return type(number) is int and least <= number < below


class Muon(PackedOptimizer):
    """``torch.optim.Muon`` with its momentum in 8 bits.

    Decay, Nesterov's momentum, the rate's adjustment and the orthogonalization are torch's. The momentum is stored in
    E4M3 with one float32 scale per block along rows, rounded stochastically, and so are 16-bit parameters.

    Args:
        params: matrices or groups of them: float32, bfloat16 or float16; DTensors too, whose ranks gather every update
            in bfloat16 and orthogonalize all of it.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in ``torch.optim.Muon``.
        states: ``"8bit"``, or ``"fp32"``.
        block: most elements that share a scale; blocks are the largest that part a row evenly.
        seed: of stochastic rounding. Random numbers follow from it, the step and the element's place.

    Every option but ``params`` can be given per group. Matrices of fewer than 4096 elements, and rows that part into no
    block of 16 … ``block`` elements, have a float32 momentum. Gradients that are not finite are treated as
    :class:`AdamW` does: the step changes nothing.

    Raises ``ValueError`` for options out of range, and parameters that are no matrices or of other types,
    ``RuntimeError`` for sparse gradients.
    """

    _reference = torch.optim.Muon
    _own_options = ("states", "block", "seed")
    _rules = (
        *RULES,
        ("momentum", lambda x: is_number(x, 0, 1), "a number of at least 0 and below 1"),
        ("nesterov", lambda x: isinstance(x, bool), "True or False"),
        ("ns_coefficients", lambda x: isinstance(x, (tuple, list)) and len(x) == 3, "three numbers"),
        ("ns_steps", lambda x: _is_whole(x, 1, 100), "an integer from 1 to 99"),
        ("adjust_lr_fn", lambda x: x in _ADJUSTMENTS, f"one of {', '.join(map(repr, _ADJUSTMENTS))}"),
        ("states", lambda x: isinstance(x, str) and x in STATES, f"known are {', '.join(map(repr, STATES))}"),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        states: str = "8bit",
        block: int = 128,
        seed: int = 0,
    ) -> None:
        self._drawn: dict[torch.device, tuple[list[int], Tensor, Tensor]] = {}
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "states": states,
            "block": block,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drawn = {}

    def _kept(self, group: dict[str, Any], parameter: Tensor) -> _Momentum:
        if parameter.dim() != 2:
            msg = f"a parameter {tuple(parameter.shape)} is no matrix; give it to qcompile.optim.AdamW"
            raise ValueError(msg)
        numbers = STATES[group["states"]]
        size = block_of(parameter, group["block"]) if numbers.scaled else 0
        return _Momentum(numbers if size else FP32, size)

    # --- the step -----------------------------------------------------------------------------------------------

    def _advance(self, stepping: list[tuple[dict[str, Any], Tensor, Tensor]], found: Tensor) -> None:
        by_device: dict[torch.device, list[tuple[dict[str, Any], Tensor, Tensor]]] = {}
        for group, parameter, gradient in stepping:
            by_device.setdefault(gradient.device, []).append((group, parameter, gradient))
        for device, members in by_device.items():
            skip = found.to(device, non_blocking=True)
            keys, firsts = self._drawn_by(device, [(group, parameter) for group, parameter, _ in members])
            for number, (group, parameter, gradient) in enumerate(members):
                step = self.state[parameter]["step"]
                step += 1 - skip
                key = evaluate(formulas.hashed(), keys[number] + step.to(torch.int32) * int32(PER_STEP))
                integers = torch.stack([key + firsts[number], skip.to(torch.int32)])
                self._step_one(group, parameter, gradient, integers)

    def _drawn_by(self, device: torch.device, members: list[tuple[dict[str, Any], Tensor]]) -> tuple[Tensor, Tensor]:
        """:meth:`_keys`, which stay on the device from step to step."""
        own = [id(parameter) for _, parameter in members]
        if device not in self._drawn or self._drawn[device][0] != own:
            self._drawn[device] = (own, *self._keys(members, device))
        return self._drawn[device][1:]

    def _step_one(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor, integers: Tensor) -> None:
        if not parameter.numel():
            return
        kind, device = self._kept(group, parameter), gradient.device
        lr, keep, decay = group["lr"], group["momentum"], group["weight_decay"]
        if isinstance(lr, Tensor):
            lr = lr.to(device, torch.float64, non_blocking=True)
        update = torch.empty(gradient.shape, dtype=torch.bfloat16, device=device)
        if gradient.numel():  # a rank may have nothing of a matrix
            update = blocks.compiled_momentum(kind.numbers, group["nesterov"])(
                blocks.as_blocks(gradient.contiguous(), kind),
                blocks.state_as_blocks(self.state[parameter], kind),
                _on(device, self._unscale(device), 1 - keep, keep),
                integers,
            ).view(gradient.shape)
        whole: Any = like(parameter, update, parameter.shape)
        if is_sharded(parameter):
            whole = whole.full_tensor()
        direction = compat.orthogonalized(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = compat.muon_rate(lr, group["adjust_lr_fn"], parameter.shape)
        own = local_tensor(parameter).detach()
        if own.numel():
            blocks.compiled_move(parameter.dtype)(
                own, _part_of(parameter, direction), _on(device, 1 - lr * decay, rate), integers
            )


def _on(device: torch.device, *numbers: Tensor | float) -> Tensor:
    """Float32 ``[numbers]``, made on the device and rounded once."""
    made = [x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=device) for x in numbers]
    return torch.stack([x.reshape(()) for x in made]).float()


def _part_of(parameter: Any, whole: Tensor) -> Tensor:
    """This rank's part of ``whole``, which all ranks have."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = parameter.device_mesh
    everywhere = DTensor.from_local(whole.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return local_tensor(everywhere.redistribute(placements=parameter.placements))
