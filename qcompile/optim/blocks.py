"""The update of one parameter in torch: what devices without Triton run, compiled, and what the Triton kernel equals.

A parameter is ``[blocks, block]`` here, its scales ``[blocks, 1]``; without blocks both are ``[elements, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qcompile.ir.sharding import local_tensor
from qcompile.kernels.formula.torch_target import torch_function

from . import formulas
from .states import Kept, Kind, Numbers

__all__ = [
    "as_blocks",
    "compiled",
    "compiled_momentum",
    "compiled_move",
    "momentum",
    "move",
    "state_as_blocks",
    "update",
]

#: Who gets which of the random numbers of :func:`formulas.draw`.
_DRAWN = ("parameter", "exp_avg", "exp_avg_sq")


def as_blocks(tensor: Tensor, kind: Kept) -> Tensor:
    """A contiguous parameter or gradient as ``[blocks, block]``."""
    return tensor.view(-1, kind.block or 1)


def state_as_blocks(state: dict[str, Tensor], kind: Kept) -> dict[str, Tensor]:
    """This rank's codes, as the bits that they are, and scales of a parameter."""
    found = {}
    for name, numbers in kind.entries():
        found[name] = as_blocks(local_tensor(state[name]), kind).view(numbers.bits)
        if numbers.scaled:
            found[f"{name}_scale"] = local_tensor(state[f"{name}_scale"]).view(-1, 1)
    return found


def update(kind: Kind) -> Callable[[Tensor, Tensor, dict[str, Tensor], Tensor, Tensor], None]:
    """The step of this kind, ``(parameter, gradient, state, reals, integers)``, in place.

    Parameter, gradient and codes are ``[blocks, block]``, scales ``[blocks, 1]``. ``reals``: float32 ``[8]``, the
    numbers that :func:`formulas.advance` takes behind the tensors. ``integers``: int32 ``[2]``, the number of the first
    element for random numbers, and whether to change nothing.
    """
    # Formulas are recorded and printed here, so that torch.compile sees functions.
    numbers = dict(kind.entries())
    draw, advance = torch_function(formulas.draw()), torch_function(formulas.advance())
    load = {name: _loader(name, numbers[name]) for name in numbers}
    store = {name: _storer(name, numbers[name]) for name in numbers}
    rounded = kind.master is None and kind.parameter != torch.float32
    round_parameter = torch_function(formulas.round_parameter(kind.parameter)) if rounded else None

    def step(parameter: Tensor, gradient: Tensor, state: dict[str, Tensor], reals: Tensor, integers: Tensor) -> None:
        first, skip = integers.unbind()
        index = torch.arange(parameter.numel(), dtype=torch.int32, device=parameter.device).view(parameter.shape)
        random = dict(zip(_DRAWN, draw(index + first), strict=True))
        random["master"] = random["parameter"]
        old = {name: load[name](state) for name in numbers}
        p = old.get("master", parameter.float())
        p, m, v = advance(p, gradient.float(), old["exp_avg"], old["exp_avg_sq"], *reals.unbind())
        new = {"exp_avg": m, "exp_avg_sq": v, "master": p}
        for name in numbers:
            for key, stored in store[name](new[name], random[name]).items():
                state[key].copy_(torch.where(skip == 0, stored, state[key]))
        if round_parameter is not None:
            p = round_parameter(p, random["parameter"])
        parameter.copy_(torch.where(skip == 0, p.to(kind.parameter), parameter))

    return step


def momentum(numbers: Numbers, nesterov: bool) -> Callable[[Tensor, dict[str, Tensor], Tensor, Tensor], Tensor]:
    """Muon before the orthogonalization, as torch.optim.Muon computes it: ``(gradient, state, reals, integers)`` →
    what is to be orthogonalized, bfloat16; the momentum in ``state`` advances in place.

    Shapes and ``integers`` are those of :func:`update`. ``reals``: float32 ``[3]``, what gradients are multiplied with,
    the share of the new one, and that of the momentum.
    """
    draw = torch_function(formulas.draw())
    load, store = _loader("momentum_buffer", numbers), _storer("momentum_buffer", numbers)

    def step(gradient: Tensor, state: dict[str, Tensor], reals: Tensor, integers: Tensor) -> Tensor:
        first, skip = integers.unbind()
        unscale, new, keep = reals.unbind()
        index = torch.arange(gradient.numel(), dtype=torch.int32, device=gradient.device).view(gradient.shape)
        _, random, _ = draw(index + first)
        g = gradient.float() * unscale
        m = torch.lerp(load(state), g, new)
        for key, stored in store(m, random).items():
            state[key].copy_(torch.where(skip == 0, stored, state[key]))
        return (torch.lerp(g, m, keep) if nesterov else m).bfloat16()

    return step


def move(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Muon after the orthogonalization: ``(parameter, direction, reals, integers)``, in place.

    ``reals``: float32 ``[2]``, what the parameter is multiplied with, and the rate. Parameters in 16 bits are rounded
    stochastically.
    """
    draw = torch_function(formulas.draw())
    round_parameter = torch_function(formulas.round_parameter(dtype)) if dtype != torch.float32 else None

    def step(parameter: Tensor, direction: Tensor, reals: Tensor, integers: Tensor) -> None:
        first, skip = integers.unbind()
        decay, rate = reals.unbind()
        p = parameter.float() * decay - direction.float() * rate
        if round_parameter is not None:
            index = torch.arange(p.numel(), dtype=torch.int32, device=p.device).view(p.shape)
            p = round_parameter(p, draw(index + first)[0])
        parameter.copy_(torch.where(skip == 0, p.to(dtype), parameter))

    return step


def _loader(name: str, numbers: Numbers) -> Callable[[dict[str, Tensor]], Tensor]:
    if not numbers.scaled:
        return lambda state: state[name]
    decode = torch_function(formulas.decode(numbers.name))
    return lambda state: decode(state[name].to(torch.int32), state[f"{name}_scale"])


def _storer(name: str, numbers: Numbers) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    if not numbers.scaled:
        return lambda x, random: {name: x}
    scale_of = torch_function(formulas.scale(numbers.name))
    encode = torch_function(formulas.encode(numbers.name, name == "exp_avg_sq"))

    def store(x: Tensor, random: Tensor) -> dict[str, Tensor]:
        scale, gamma = scale_of(x.abs().amax(1, keepdim=True))
        return {name: encode(x, gamma, random).to(numbers.bits), f"{name}_scale": scale}

    return store


@cache
def _compiled(kind: Kind) -> Callable[..., None]:
    return torch.compile(update(kind), dynamic=True, fullgraph=True)


def compiled(kind: Kind) -> Callable[..., None]:
    """:func:`update` of this kind as one program for tensors of all sizes, and for blocks of all sizes."""
    return _compiled(replace(kind, block=0))


@cache
def compiled_momentum(numbers: Numbers, nesterov: bool) -> Callable[..., Tensor]:
    """:func:`momentum` as one program for tensors and blocks of all sizes."""
    return torch.compile(momentum(numbers, nesterov), dynamic=True, fullgraph=True)


@cache
def compiled_move(dtype: torch.dtype) -> Callable[..., None]:
    """:func:`move` as one program for tensors of all sizes."""
    return torch.compile(move(dtype), dynamic=True, fullgraph=True)
