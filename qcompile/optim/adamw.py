"""AdamW whose states take two bytes per parameter, and whose BF16 parameters need no float32 copy."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.sharding import local_tensor
from qcompile.kernels.formula.torch_target import evaluate

from . import blocks, formulas
from .base import PER_STEP, RULES, PackedOptimizer, int32, is_number
from .states import LEAST_BLOCK, LEAST_ELEMENTS, MASTERS, STATES, Kind, kind_of

__all__ = ["AdamW"]


@dataclass
class _Plan:
    """Parameters of one device that step together.

    Attributes:
        members: group, parameter and kind, in the order of the groups.
        steps: float32 ``[members]``; the ``step`` of each state is a view of its element.
        keys, firsts: int32 ``[members]``: what random numbers are drawn by, and the shard's first element.
        launches: of the kinds among them, with the places of their members.
    """

    members: list[tuple[dict[str, Any], Tensor, Kind]]
    steps: Tensor
    keys: Tensor
    firsts: Tensor
    launches: dict[tuple[Kind, torch.dtype], Any] = field(default_factory=dict)


class AdamW(PackedOptimizer):
    """``torch.optim.AdamW`` with states in 8 bits.

    The first moment is stored in E4M3, the second in UE5M3, with one float32 scale per block along the last axis. Both
    are rounded stochastically, and so are 16-bit parameters without a master. No second moment above 0 is stored as 0.

    Args:
        params: parameters or groups, as for any optimizer: float32, bfloat16 or float16; DTensors too.
        lr: a number, or a tensor: then it can change in a captured CUDA graph.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled, times ``lr``.
        states: ``"8bit"``; ``"fp8-lm"``, FP8-LM's E4M3 and FP16 with a scaled FP16 master; ``"fp32"``.
        master: ``"none"``, ``"fp16"`` (scaled) or ``"fp32"``, of 16-bit parameters; by default what ``states`` says.
        block: most elements that share a scale; blocks are the largest that part a row evenly.
        seed: of stochastic rounding. Random numbers follow from it, the step and the element's place.

    Every option but ``params`` can be given per group. Parameters of fewer than 4096 elements, vectors, and rows that
    part into no block of 16 … ``block`` elements have float32 states.

    A step whose gradients are not all finite, or whose squares would not be, changes nothing, as under
    ``torch.amp.GradScaler``, whose attributes ``grad_scale`` and ``found_inf`` are read. With DTensors all ranks skip.
    Nothing waits for the device.

    Raises ``ValueError`` for options out of range and parameters of other types, ``RuntimeError`` for sparse gradients.
    """

    _reference = torch.optim.AdamW
    _counted = ("step",)
    _own_options = ("states", "master", "block", "seed")
    _rules = (
        *RULES,
        (
            "betas",
            lambda b: isinstance(b, (tuple, list)) and len(b) == 2 and all(is_number(x, 0, 1) for x in b),
            "two numbers, at least 0 and below 1",
        ),
        ("states", lambda name: isinstance(name, str) and name in STATES, f"known are {', '.join(map(repr, STATES))}"),
        (
            "master",
            lambda name: name is None or (isinstance(name, str) and name in MASTERS),
            f"known are {', '.join(map(repr, MASTERS))}",
        ),
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        states: str = "8bit",
        master: str | None = None,
        block: int = 128,
        seed: int = 0,
    ) -> None:
        self._plans: dict[torch.device, _Plan] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "states": states,
            "master": master,
            "block": block,
            "seed": seed,
        }
        super().__init__(params, defaults)
        self._warn_of_wide()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}

    def _kept(self, group: dict[str, Any], parameter: Tensor) -> Kind:
        states = STATES[group["states"]]
        return kind_of(parameter, states, group["master"] or states.master, group["block"])

    def _warn_of_wide(self) -> None:
        """Small parameters are expected; a model that has nothing else would save nothing."""
        all_of = [(p, self._kept(group, p)) for group in self.param_groups for p in group["params"]]
        wanted = {id(p) for g in self.param_groups for p in g["params"] if STATES[g["states"]].first.scaled}
        wide = sum(
            p.numel() for p, kind in all_of if not kind.block and id(p) in wanted and p.numel() >= LEAST_ELEMENTS
        )
        total = sum(p.numel() for p, _ in all_of)
        if wide > total / 20:
            warnings.warn(
                f"AdamW: {wide} of {total} parameters keep float32 states: their rows part into no block of "
                f"{LEAST_BLOCK} elements (FSDP1's flat parameters are vectors: use fully_shard)",
                stacklevel=3,
            )

    # --- the step -----------------------------------------------------------------------------------------------

    def _advance(self, stepping: list[tuple[dict[str, Any], Tensor, Tensor]], found: Tensor) -> None:
        by_device: dict[torch.device, list[tuple[dict[str, Any], Tensor, Tensor]]] = {}
        for group, parameter, gradient in stepping:
            by_device.setdefault(gradient.device, []).append((group, parameter, gradient))
        for device, members in by_device.items():
            self._step_on(device, members, found.to(device, non_blocking=True))

    def _step_on(
        self, device: torch.device, members: list[tuple[dict[str, Any], Tensor, Tensor]], found: Tensor
    ) -> None:
        plan = self._planned(device, [(group, parameter) for group, parameter, _ in members])
        plan.steps += 1 - found
        reals = torch.cat([self._reals(group, steps) for group, steps in _by_group(plan)])
        keys = evaluate(formulas.hashed(), plan.keys + plan.steps.to(torch.int32) * int32(PER_STEP))
        integers = torch.stack([keys + plan.firsts, found.to(torch.int32).expand_as(keys)], 1)
        copies = []
        held: dict[tuple[Kind, torch.dtype], _Held] = {}
        for place, ((_, parameter, kind), (*_, gradient)) in enumerate(zip(plan.members, members, strict=True)):
            if not gradient.numel():  # a rank may have nothing of a parameter, whose steps it counts all the same
                continue
            own = local_tensor(parameter).detach()
            dense = own.contiguous()
            if dense is not own:
                copies.append((own, dense))
            tensors = {
                "parameter": blocks.as_blocks(dense, kind),
                "gradient": blocks.as_blocks(gradient.contiguous(), kind),
                **blocks.state_as_blocks(self.state[parameter], kind),
            }
            held.setdefault((kind, gradient.dtype), []).append((place, tensors))
        for (kind, dtype), some in held.items():
            provider = _fused if device.type == "cuda" else _one_by_one
            provider(plan, kind, dtype, some, reals, integers)
        for own, dense in copies:
            own.copy_(dense)

    def _reals(self, group: dict[str, Any], steps: Tensor) -> Tensor:
        """Float32 ``[members, 8]``: what :func:`formulas.advance` takes behind the tensors, rounded once."""
        steps = steps.double()
        lr, (beta1, beta2), eps, decay = (group[name] for name in ("lr", "betas", "eps", "weight_decay"))
        if isinstance(lr, Tensor):
            lr = lr.to(steps.device, torch.float64, non_blocking=True)
        numbers = (
            self._unscale(steps.device),
            1 - beta1,
            beta2,
            1 - beta2,
            1 - lr * decay,
            lr / (1 - beta1**steps),
            (1 - beta2**steps).sqrt(),
            eps,
        )
        columns = [
            number.expand_as(steps) if isinstance(number, Tensor) else steps.new_full(steps.shape, number)
            for number in numbers
        ]
        return torch.stack(columns, 1).float()

    def _planned(self, device: torch.device, members: list[tuple[dict[str, Any], Tensor]]) -> _Plan:
        plan = self._plans.get(device)
        if plan is None or [id(p) for _, p, _ in plan.members] != [id(p) for _, p in members]:
            plan = self._plans[device] = self._plan(device, members)
        return plan

    def _plan(self, device: torch.device, members: list[tuple[dict[str, Any], Tensor]]) -> _Plan:
        steps = torch.stack([self.state[p]["step"].to(device, torch.float32) for _, p in members])
        for (_, parameter), step in zip(members, steps.unbind(), strict=True):
            self.state[parameter]["step"] = step
        return _Plan(
            [(group, p, self._kept(group, p)) for group, p in members],
            steps,
            *self._keys(members, device),
        )


#: Places in a plan, and the tensors there.
_Held = list[tuple[int, dict[str, Tensor]]]


def _one_by_one(plan: _Plan, kind: Kind, dtype: torch.dtype, held: _Held, reals: Tensor, integers: Tensor) -> None:
    """A call of the compiled update per parameter."""
    update = blocks.compiled(kind)
    for place, tensors in held:
        state = {name: tensor for name, tensor in tensors.items() if name not in ("parameter", "gradient")}
        update(tensors["parameter"], tensors["gradient"], state, reals[place], integers[place])


def _fused(plan: _Plan, kind: Kind, dtype: torch.dtype, held: _Held, reals: Tensor, integers: Tensor) -> None:
    """One launch for all of them."""
    from .triton import Launch

    launch = plan.launches.get((kind, dtype))
    places = [place for place, _ in held]
    if launch is None or launch.places != places:
        sizes = [tensors["parameter"].numel() for _, tensors in held]
        launch = plan.launches[kind, dtype] = Launch(kind, dtype, places, sizes, reals.device)
    launch([tensors for _, tensors in held], reals, integers)


def _by_group(plan: _Plan) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Every group of a plan and the steps of its members, which lie side by side."""
    start = 0
    groups = [group for group, *_ in plan.members]
    for end, (group, after) in enumerate(zip(groups, [*groups[1:], None], strict=True), 1):
        if after is not group:
            yield group, plan.steps[start:end]
            start = end
