"""What optimizers with packed states share: options and gradients that are checked, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from qcompile.ir.sharding import is_sharded, local_tensor

from .states import LEAST_BLOCK, Kept, allocate, decoded, encoded, first_element

__all__ = ["PER_STEP", "RULES", "PackedOptimizer", "Rule", "int32", "is_number"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Part the random numbers of parameters and of steps.
_PER_PARAMETER, PER_STEP = 0x85EBCA6B, 0x9E3779B1

#: Option, whether a value is right, and what is.
Rule = tuple[str, Callable[[Any], bool], str]


def int32(number: int) -> int:
    return (number + 2**31) % 2**32 - 2**31


def is_number(value: Any, least: float, below: float = math.inf) -> bool:
    return isinstance(value, (int, float)) and least <= value < below


RULES: tuple[Rule, ...] = (
    ("lr", lambda lr: lr.numel() == 1 if isinstance(lr, Tensor) else is_number(lr, 0), "a number of at least 0"),
    ("eps", lambda eps: is_number(eps, 0), "a number of at least 0"),
    ("weight_decay", lambda decay: is_number(decay, 0), "a number of at least 0"),
    ("block", lambda n: isinstance(n, int) and n >= LEAST_BLOCK, f"an integer of at least {LEAST_BLOCK}"),
    ("seed", lambda seed: isinstance(seed, int), "an integer"),
)


class PackedOptimizer(torch.optim.Optimizer):
    """An optimizer of ``torch.optim`` whose states are stored as :mod:`.states` says, and decoded for the step.

    Attributes:
        _reference: the optimizer that computes the same from float32 states.
        _own_options: what a group has beside the reference's.
        _rules: what values options may have.
        _counted: states that the reference has beside moments.
    """

    _reference: ClassVar[Any]
    _own_options: ClassVar[tuple[str, ...]]
    _rules: ClassVar[tuple[Rule, ...]]
    _counted: ClassVar[tuple[str, ...]] = ()
    #: Makes GradScaler hand over ``grad_scale`` and ``found_inf``.
    _step_supports_amp_scaling = True

    def _kept(self, group: dict[str, Any], parameter: Tensor) -> Kept:
        """What is kept of a parameter. Raises ``ValueError`` for one that cannot be stored like this."""
        raise NotImplementedError

    @property
    def _name(self) -> str:
        return str(self._reference.__name__)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name, right, wanted in self._rules:
                if not right(group[name]):
                    msg = f"{name}={group[name]!r}; {wanted}"
                    raise ValueError(msg)
            for parameter in group["params"]:
                if parameter.dtype not in _DTYPES:
                    dtype = str(parameter.dtype).removeprefix("torch.")
                    msg = f"a parameter {tuple(parameter.shape)} is {dtype}; convert it to float32 or bfloat16"
                    raise ValueError(msg)
                self._kept(group, parameter)
        except ValueError as error:
            self.param_groups.pop()
            msg = f"{self._name}: {error}"
            raise ValueError(msg) from None

    # --- the step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure``, called first, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepping = list(self._stepping())
        self._advance(stepping, self._found_inf([gradient for *_, gradient in stepping]))
        return loss

    def _advance(self, stepping: list[tuple[dict[str, Any], Tensor, Tensor]], found: Tensor) -> None:
        """Take the step of these; ``found`` is a float32 scalar, 1 to change nothing."""
        raise NotImplementedError

    def _stepping(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        """Group, parameter and this rank's gradient, of parameters that have one; states are made here."""
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided:
                    msg = (
                        f"{self._name}: the gradient of parameter {place} in group {number}, {tuple(parameter.shape)}, "
                        "is sparse; make it dense (nn.Embedding(sparse=False)) or give it to torch.optim.SparseAdam"
                    )
                    raise RuntimeError(msg)
                if is_sharded(gradient) and gradient.placements != parameter.placements:
                    gradient = gradient.redistribute(placements=parameter.placements)
                if not self.state[parameter]:
                    step = torch.zeros((), device=local_tensor(parameter).device)
                    self.state[parameter] = {"step": step, **allocate(parameter, self._kept(group, parameter))}
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

    def _unscale(self, device: torch.device) -> Tensor | float:
        """What gradients are multiplied with."""
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else 1 / scale.to(device, torch.float64, non_blocking=True)

    def _keys(self, members: list[tuple[dict[str, Any], Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Int32 ``[members]`` each: what random numbers are drawn by, and the place of the shard's first element."""
        places = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        keys = [int32(group["seed"] + places[id(p)] * _PER_PARAMETER) for group, p in members]
        firsts = [int32(first_element(p)) for _, p in members]
        return (
            torch.tensor(keys, dtype=torch.int32, device=device),
            torch.tensor(firsts, dtype=torch.int32, device=device),
        )

    # --- checkpoints --------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer, bit for bit, or one of the optimizer of ``torch.optim``, which is encoded.

        Raises ``ValueError`` if a state's tensors are not those that the group's options call for.
        """
        own = [{name: group[name] for name in self._own_options} for group in self.param_groups]
        saved = [options | group for options, group in zip(own, state_dict["param_groups"], strict=False)]
        saved += state_dict["param_groups"][len(saved) :]  # as many as were saved, so that torch compares the numbers
        # Not the states: torch would convert them to the dtype of the parameter.
        super().load_state_dict({**state_dict, "state": {}, "param_groups": saved})
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        parameters = [(group, p) for group in self.param_groups for p in group["params"]]
        for name, (group, parameter) in zip(names, parameters, strict=True):
            if state := state_dict["state"].get(name):
                self.state[parameter] = self._loaded(parameter, self._kept(group, parameter), state)

    def _loaded(self, parameter: Tensor, kind: Kept, state: dict[str, Any]) -> dict[str, Any]:
        device = local_tensor(parameter).device
        expected = allocate(parameter, kind)
        loaded = {"step": torch.as_tensor(state.get("step", 0), dtype=torch.float32).to(device, copy=True)}
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
                            f"{self._name}: {key} of a parameter {tuple(parameter.shape)} is {have}, and its group "
                            f"calls for {tuple(wanted.shape)} {wanted.dtype}; load it with the options it had: "
                            f"{', '.join(self._own_options[:-1])}"
                        )
                        raise ValueError(msg)
                    loaded[key] = wanted.copy_(given)
        return loaded

    def decoded_state_dict(self) -> dict[str, Any]:
        """The state as the optimizer of ``torch.optim`` loads it: moments in float32, without masters; DTensors stay
        such.
        """
        packed = self.state_dict()
        kinds = [self._kept(group, p) for group in self.param_groups for p in group["params"]]
        states = {
            number: {name: state[name].clone() for name in self._counted}
            | {name: decoded(state, name, kinds[number]) for name, _ in kinds[number].entries() if name != "master"}
            for number, state in packed["state"].items()
        }
        torchs = self._reference([torch.zeros(1, 1)]).param_groups[0]
        groups = [
            torchs | {name: value for name, value in group.items() if name not in self._own_options}
            for group in packed["param_groups"]
        ]
        return {"state": states, "param_groups": groups}
