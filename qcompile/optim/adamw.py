"""AdamW whose states take two bytes per parameter, and whose BF16 parameters need no float32 copy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from qcompile.ir.sharding import is_sharded, local_tensor
from qcompile.kernels.formula.torch_target import evaluate

from . import blocks, formulas
from .states import (
    LEAST_BLOCK,
    LEAST_ELEMENTS,
    MASTERS,
    STATES,
    Kind,
    allocate,
    decoded,
    encoded,
    first_element,
    kind_of,
)

__all__ = ["AdamW"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: What a group has beside the options of ``torch.optim.AdamW``.
_OWN_OPTIONS = ("states", "master", "block", "seed")
#: Part the random numbers of parameters and of steps.
_PER_PARAMETER, _PER_STEP = 0x85EBCA6B, 0x9E3779B1


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


class AdamW(torch.optim.Optimizer):
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

    #: Makes GradScaler hand over ``grad_scale`` and ``found_inf``.
    _step_supports_amp_scaling = True

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, right, wanted in _RULES:
                if not right(group[name]):
                    msg = f"AdamW: {name}={group[name]!r}; {wanted}"
                    raise ValueError(msg)
            for parameter in group["params"]:
                if parameter.dtype not in _DTYPES:
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    msg = f"AdamW: a parameter {tuple(parameter.shape)} is {dtype}; convert it to float32 or bfloat16"
                    raise ValueError(msg)
                self._kind(group, parameter)
        except ValueError:
            self.param_groups.pop()
            raise

    @staticmethod
    def _kind(group: dict[str, Any], parameter: Tensor) -> Kind:
        states = STATES[group["states"]]
        return kind_of(parameter, states, group["master"] or states.master, group["block"])

    def _warn_of_wide(self) -> None:
        """Small parameters are expected; a model that has nothing else would save nothing."""
        all_of = [(p, self._kind(group, p)) for group in self.param_groups for p in group["params"]]
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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure``, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping = list(self._stepping())
        found = self._found_inf([gradient for *_, gradient in stepping])
        by_device: dict[torch.device, list[tuple[dict[str, Any], Tensor, Tensor]]] = {}
        for group, parameter, gradient in stepping:
            by_device.setdefault(gradient.device, []).append((group, parameter, gradient))
        for device, members in by_device.items():
            self._step_on(device, members, found.to(device, non_blocking=True))
        return loss

    def _stepping(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and this rank's gradient, of parameters that have one; states are made here."""
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    msg = (
                        f"AdamW: the gradient of parameter {place} in group {number}, {tuple(parameter.shape)}, is "
                        "sparse; make it dense (nn.Embedding(sparse=False)) or give it to torch.optim.SparseAdam"
                    )
                    raise RuntimeError(msg)
                if is_sharded(gradient) and gradient.placements != parameter.placements:
                    gradient = gradient.redistribute(placements=parameter.placements)
                if not self.state[parameter]:
                    step = torch.zeros((), device=local_tensor(parameter).device)
                    self.state[parameter] = {"step": step, **allocate(parameter, self._kind(group, parameter))}
                yield group, parameter, local_tensor(gradient)

    def _found_inf(self, gradients: list[Tensor]) -> Tensor:
        """Float32 scalar, 1 to skip the step; the same on all ranks that share a DTensor."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        device = local_tensor(parameters[0]).device if parameters else torch.device("cpu")
        if (found := getattr(self, "found_inf", None)) is not None:
            found = found.to(device, torch.float32, non_blocking=True).clone()
        elif gradients := [gradient for gradient in gradients if gradient.numel()]:
            largest = get_total_norm(gradients, math.inf).to(device, non_blocking=True).float()
            found = (~largest.square().isfinite()).float()
        else:
            found = torch.zeros((), device=device)
        meshes = {p.device_mesh: None for p in parameters if is_sharded(p)}
        for mesh in meshes:
            for axis in range(mesh.ndim):
                dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.get_group(axis))
        return found

    def _step_on(
        self, device: torch.device, members: list[tuple[dict[str, Any], Tensor, Tensor]], found: Tensor
    ) -> None:
        plan = self._planned(device, [(group, parameter) for group, parameter, _ in members])
        plan.steps += 1 - found
        reals = torch.cat([self._reals(group, steps) for group, steps in _by_group(plan)])
        keys = evaluate(formulas.hashed(), plan.keys + plan.steps.to(torch.int32) * _int32(_PER_STEP))
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
        scale = getattr(self, "grad_scale", None)
        unscale = 1.0 if scale is None else 1 / scale.to(steps.device, torch.float64, non_blocking=True)
        numbers = (
            unscale,
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
        places = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        steps = torch.stack([self.state[p]["step"].to(device, torch.float32) for _, p in members])
        for (_, parameter), step in zip(members, steps.unbind(), strict=True):
            self.state[parameter]["step"] = step
        keys = [_int32(group["seed"] + places[id(p)] * _PER_PARAMETER) for group, p in members]
        firsts = [_int32(first_element(p)) for _, p in members]
        return _Plan(
            [(group, p, self._kind(group, p)) for group, p in members],
            steps,
            torch.tensor(keys, dtype=torch.int32, device=device),
            torch.tensor(firsts, dtype=torch.int32, device=device),
        )

    # --- checkpoints --------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, bit for bit, or one of ``torch.optim.AdamW``, which is encoded.

        Raises ``ValueError`` if a state's tensors are not those that the group's options call for.
        """
        own = [{name: group[name] for name in _OWN_OPTIONS} for group in self.param_groups]
        saved = [options | group for options, group in zip(own, state_dict["param_groups"], strict=False)]
        saved += state_dict["param_groups"][len(saved) :]  # as many as were saved, so that torch compares the numbers
        # Not the states: torch would convert them to the dtype of the parameter.
        super().load_state_dict({**state_dict, "state": {}, "param_groups": saved})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for name, (group, parameter) in zip(names, parameters, strict=True):
            if state := state_dict["state"].get(name):
                self.state[parameter] = self._loaded(parameter, self._kind(group, parameter), state)

    @staticmethod
    def _loaded(parameter: Tensor, kind: Kind, state: dict[str, Any]) -> dict[str, Any]:
        device = local_tensor(parameter).device
        expected = allocate(parameter, kind)
        loaded = {"step": torch.as_tensor(state["step"], dtype=torch.float32).to(device, copy=True)}
        for name, numbers in kind.entries():
            if name not in state and name == "master":
                loaded |= {key: tensor for key, tensor in expected.items() if key.startswith(name)}
            elif numbers.scaled and f"{name}_scale" not in state and state[name].is_floating_point():
                loaded |= encoded(parameter, state[name], name, kind)
            else:
                for key in (name, f"{name}_scale")[: 1 + numbers.scaled]:
                    given, wanted = state.get(key), expected[key]
                    if given is None or (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
                        have = "missing" if given is None else f"{tuple(given.shape)} {given.dtype}"
                        msg = (
                            f"AdamW: {key} of a parameter {tuple(parameter.shape)} is {have}, and its group calls for "
                            f"{tuple(wanted.shape)} {wanted.dtype}; load it with the states=, master= and block= it had"
                        )
                        raise ValueError(msg)
                    loaded[key] = wanted.copy_(given)
        return loaded

    def decoded_state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim.AdamW`` loads it: moments in float32, without masters; DTensors stay such."""
        packed = self.state_dict()
        kinds = [self._kind(group, p) for group in self.param_groups for p in group["params"]]
        states = {
            number: {
                "step": state["step"].clone(),
                "exp_avg": decoded(state, "exp_avg", kinds[number]),
                "exp_avg_sq": decoded(state, "exp_avg_sq", kinds[number]),
            }
            for number, state in packed["state"].items()
        }
        torchs = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
        groups = [
            torchs | {name: value for name, value in group.items() if name not in _OWN_OPTIONS}
            for group in packed["param_groups"]
        ]
        return {"state": states, "param_groups": groups}


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


def _int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def _is_number(value: Any, least: float, below: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and least <= value < below


#: Option, whether a value is right, and what is.
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("lr", lambda lr: lr.numel() == 1 if isinstance(lr, Tensor) else _is_number(lr, 0), "a number of at least 0"),
    (
        "betas",
        lambda b: isinstance(b, (tuple, list)) and len(b) == 2 and all(_is_number(x, 0, 1) for x in b),
        "two numbers, at least 0 and below 1",
    ),
    ("eps", lambda eps: _is_number(eps, 0), "a number of at least 0"),
    ("weight_decay", lambda decay: _is_number(decay, 0), "a number of at least 0"),
    ("states", lambda name: isinstance(name, str) and name in STATES, f"known are {', '.join(map(repr, STATES))}"),
    (
        "master",
        lambda name: name is None or (isinstance(name, str) and name in MASTERS),
        f"known are {', '.join(map(repr, MASTERS))}",
    ),
    ("block", lambda n: isinstance(n, int) and n >= LEAST_BLOCK, f"an integer of at least {LEAST_BLOCK}"),
    ("seed", lambda seed: isinstance(seed, int), "an integer"),
)
