"""``pack_``: store a model's weights as codes, in place and layer by layer; ``unpack_``: decode them for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from qcompile import compat
from qcompile.ir.definitions import short_names
from qcompile.ir.recipe import LEFT_WIDE, Recipe
from qcompile.ir.rules import matches_name
from qcompile.ir.stored import Stored

from .weight import PackedWeight

__all__ = [
    "PackedLayer", "Packing", "bytes_of", "choice", "impossible", "left_wide", "multiplies", "output_embeddings",
    "pack_", "packed_weights", "readers_of", "unpack_",
]  # fmt: skip


@dataclass(frozen=True)
class PackedLayer:
    """A layer whose weight is stored as codes: its name, how, the weight's shape, and bytes before and after."""

    name: str
    spec: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Packing:
    """What :func:`pack_` has done; ``str()`` says it in a few lines.

    Attributes:
        layers: those whose weights are stored as codes now.
        wide: name → reason of the other layers that multiply by a weight, of those whose weight another library has
            quantized, and of parameters of three axes (experts).
        bytes_before, bytes_after: of all parameters and buffers of the model.
    """

    layers: tuple[PackedLayer, ...]
    wide: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    @property
    def bits_per_weight(self) -> float:
        """Of the packed layers, scales included."""
        weights = sum(prod(layer.shape) for layer in self.layers)
        return 8 * sum(layer.bytes_after for layer in self.layers) / weights if weights else 0.0

    def __str__(self) -> str:
        kinds = Counter(short_names(layer.spec) for layer in self.layers)
        how = ", ".join(f"{count} as {spec!r}" for spec, count in kinds.items()) or "none"
        lines = [
            f"packed layers: {how}; {self.bits_per_weight:.3f} bits per weight",
            f"model: {_megabytes(self.bytes_before)} → {_megabytes(self.bytes_after)}",
        ]
        return "\n".join([*lines, *lines_of_wide(self.wide)])


#: How many layers a line of the summary names.
SHOWN = 4


def lines_of_wide(wide: Mapping[str, str]) -> list[str]:
    """Name → reason of layers left wide, as one line per reason."""
    names_of: dict[str, list[str]] = {}
    for name, reason in wide.items():
        names_of.setdefault(reason, []).append(name)
    return [
        f"left wide: {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''} ({reason})"
        for reason, names in names_of.items()
    ]


def pack_(
    model: nn.Module,
    spec: str,
    *,
    skip: str | Sequence[str] = (),
    rules: Mapping[str, str | None] | None = None,
    min_side: int = Recipe.min_side,
) -> Packing:
    """Store the weights of a model's linear layers as codes and scales, in place, before ``torch.compile``.

    Every packed weight becomes a :class:`~qcompile.stored.PackedWeight`, frozen; modules keep their class, their name
    and their forward. Layers are packed one after another, so no more than one is held twice. Layers left wide unless
    ``rules`` names them: output heads, adapters of PEFT's, those whose weight another module reads too, and those with
    a side below ``min_side``.

    Args:
        model: any module; on the meta device shapes alone are packed.
        spec: how weights are stored, for example ``"nf4 block64"``, ``"nf4 block64 absmax_bnb; nested"`` (as
            bitsandbytes does with ``compress_statistics``), ``"int8 row"``, ``"e2m1 block16 e4m3"`` (NVFP4).
        skip: names of layers to leave wide, as patterns over whole dotted segments.
        rules: pattern → how the layers that it matches are stored, or ``None`` to leave them wide; later ones win.
        min_side: smallest side of a weight that is packed.

    Returns what was done. A terminal shows progress, and this result.

    Raises ``ValueError`` for a text that is not understood, for a pattern that matches no layer, and naming the layer
    for a weight that cannot be stored so. The model is as it was then.
    """
    from rich.console import Console  # takes as long to import as to pack a small model, and no compilation needs it
    from rich.progress import track

    chosen = choice(model, spec, [skip] if isinstance(skip, str) else skip, rules or {}, min_side)
    before, console = bytes_of(model), Console()
    made: dict[int, Any] = {}
    layers = []
    named = dict(model.named_modules())
    for name, text in track(chosen.specs.items(), "packing", console=console, disable=not console.is_terminal):
        module = named[name]
        weight = module._parameters["weight"]
        assert weight is not None
        packed: Any = made.get(id(weight))
        if packed is None:
            packed = PackedWeight.of(weight, text, multiplies(module) == "transposed")
            packed.layer = name
            packed = made[id(weight)] = nn.Parameter(packed, requires_grad=False)
        size = weight.numel() * weight.element_size()
        layers.append(PackedLayer(name, packed.spec, tuple(weight.shape), size, packed.nbytes))
        module.weight = packed
    result = Packing(tuple(layers), chosen.wide, before, bytes_of(model))
    if console.is_terminal:
        console.print(str(result), highlight=False, markup=False)
    return result


def unpack_(model: nn.Module, names: str | Sequence[str] = "*") -> list[str]:
    """Decode packed weights for good, in place; returns the names of their layers.

    The parameters are plain tensors of the same dtype again, still frozen: ``requires_grad_(True)`` trains them.

    Args:
        names: patterns of the layers to decode.

    Raises ``ValueError`` for a pattern that matches no packed layer.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    packed = dict(packed_weights(model))
    for pattern in patterns:
        _check_matched("unpack_", "names", pattern, packed)
    made: dict[int, nn.Parameter] = {}
    done = [name for name in packed if any(matches_name(name, pattern) for pattern in patterns)]
    for name in done:
        weight = packed[name]
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.decoded().contiguous(), requires_grad=False)
        model.get_submodule(name).weight = made[id(weight)]
    return done


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Name of the layer and weight, for every layer with a packed one."""
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, PackedWeight):
            yield name, weight


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes if isinstance(t, PackedWeight) else t.numel() * t.element_size() for t in tensors.values())


# --- which layers ---------------------------------------------------------------------------------------------------


#: Kinds of layers that contract their ``weight`` and do nothing else with it; whether it lies transposed, by the name
#: of the class (transformers' ``Conv1D`` is a linear layer whose weight is [inputs, outputs]).
_BY_CLASS_NAME = {"Conv1D": "transposed"}


def multiplies(module: nn.Module) -> str:
    """``"rows"`` for a layer whose weight has a row per output, ``"transposed"`` for one with a column; else ""."""
    return "rows" if isinstance(module, nn.Linear) else _BY_CLASS_NAME.get(type(module).__name__, "")


@dataclass(frozen=True)
class _Choice:
    specs: dict[str, str]
    wide: dict[str, str]


def choice(model: nn.Module, spec: str, skip: Iterable[str], rules: Mapping[str, str | None], min_side: int) -> _Choice:
    """How each layer is stored, or why not."""
    for text in (spec, *filter(None, rules.values())):
        Stored.parse(text)
    readers = readers_of(model)
    output = getattr(output_embeddings(model), "weight", None)
    named = {name: module for name, module in model.named_modules() if module._parameters.get("weight") is not None}
    for what, pattern in [*(("skip", pattern) for pattern in skip), *(("rules", pattern) for pattern in rules)]:
        _check_matched("pack_", what, pattern, named)
    chosen = _Choice({}, {})
    for name, module in named.items():
        weight = module._parameters["weight"]
        assert weight is not None
        matching = [(pattern, text) for pattern, text in rules.items() if matches_name(name, pattern)]
        pattern, chosen_spec = matching[-1] if matching else ("", spec)
        exact = bool(pattern) and name.endswith(pattern)
        if skipped := next((skipping for skipping in skip if matches_name(name, skipping)), None):
            reason = f"skip={skipped!r}"
        elif chosen_spec is None:
            reason = f"rules: {pattern!r}: None"
        elif why := impossible(name, module, weight, readers):
            if exact:
                msg = f"pack_: layer {name!r} cannot be stored as {chosen_spec!r}: {why}; leave it out of rules"
                raise ValueError(msg)
            reason = why
        else:
            reason = "" if matching else left_wide(name, weight, weight is output, min_side)
        if not reason:
            assert chosen_spec is not None
            _check_size(name, weight, chosen_spec, multiplies(module) == "transposed")
            chosen.specs[name] = chosen_spec
        elif multiplies(module) or not weight.is_floating_point():
            chosen.wide[name] = reason
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and not name.endswith("weight"):  # those of convolutions are called so
            chosen.wide[name] = "a parameter of three axes, as those of experts: not packed"
    return chosen


def impossible(name: str, module: nn.Module, weight: Tensor, readers: Mapping[int, set[str]]) -> str:
    """Why the weight of a layer cannot be stored as codes; "" if it can."""
    if isinstance(weight, PackedWeight):
        return f"stored already, as {short_names(weight.spec)!r}"
    if compat.is_wrapper_subclass(weight) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    if not multiplies(module):
        return f"a module of class {type(module).__name__} does not only multiply by its weight"
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} axes, not 2"
    others = readers[id(weight)] - {type(module).__name__}
    return f"tied: its weight is also that of a module of class {', '.join(sorted(others))}" if others else ""


def left_wide(name: str, weight: Tensor, is_output: bool, min_side: int) -> str:
    """Why a layer that no rule names stays wide; "" if it does not."""
    if pattern := next((pattern for pattern in LEFT_WIDE if matches_name(name, pattern)), ""):
        return f"a layer called {pattern}"
    if is_output:
        return "output head: the model's get_output_embeddings()"
    thin = min(weight.shape)
    return f"a side of its weight is {thin}, below min_side={min_side}" if thin < min_side else ""


def readers_of(model: nn.Module) -> dict[int, set[str]]:
    """Class names of the modules that have a parameter, by its identity."""
    readers: dict[int, set[str]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            readers.setdefault(id(parameter), set()).add(type(module).__name__)
    return readers


def output_embeddings(model: nn.Module) -> Any:
    """transformers' ``get_output_embeddings()``, where a model has one to give."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _check_matched(caller: str, what: str, pattern: str, names: Iterable[str]) -> None:
    if not any(matches_name(name, pattern) for name in names):
        known = ", ".join(list(names)[:SHOWN])
        msg = f"{caller}: {what}: {pattern!r} matches no layer; there are {known or 'none'}, …"
        raise ValueError(msg)


def _check_size(name: str, weight: Tensor, spec: str, transposed: bool) -> None:
    try:
        Stored.parse(spec).check_size(weight.shape[0 if transposed else 1])
    except ValueError as error:
        size = "×".join(map(str, weight.shape))
        msg = f"pack_: layer {name!r} of {size} as {spec!r}: {error}; or skip=[{name!r}]"
        raise ValueError(msg) from None


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
