"""``pack_``: store a model's weights as codes, in place and layer by layer; ``unpack_``: decode them for good."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn

from qcompile import compat
from qcompile.ir.definitions import short_names
from qcompile.ir.recipe import LEFT_WIDE, Recipe
from qcompile.ir.rules import matches_name
from qcompile.ir.stored import Stored

from . import torchao
from .weight import PackedWeight

__all__ = [
    "PackedLayer", "Packing", "Place", "bytes_of", "choice", "impossible", "left_wide", "multiplies",
    "output_embeddings", "pack_", "packed_weights", "places_of", "readers_of", "tied_to_embedding",
    "unpack_",
]  # fmt: skip


@dataclass(frozen=True)
class PackedLayer:
    """A layer whose weight is stored as codes: its name (experts in one parameter have the parameter's), how, the
    weight's shape, and bytes before and after.
    """

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
        wide: name → reason of the other layers that multiply by a weight, of embeddings, of layers whose weight another
        library has quantized, and of other parameters of three axes.
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
    and their forward. So do experts that are one parameter of three axes, of which each is a matrix. Layers are packed
    one after another, so no more than one is held twice. Layers left wide unless ``rules`` names them: embeddings,
    output heads, adapters of PEFT's, and those with a side below ``min_side``. A head and an embedding that have one
    weight are packed together.

    A weight that torchao has quantized (:mod:`.torchao`) is taken over as it is, whatever the spec is.

    Args:
        model: any module; on the meta device shapes alone are packed.
        spec: how weights are stored, for example ``"nf4 block64"``, ``"nf4 block64 absmax_bnb; nested"`` (as
            bitsandbytes does with ``compress_statistics``), ``"int8 row"``, ``"e2m1 block16 e4m3"`` (NVFP4).
        skip: names of layers to leave wide, as patterns over whole dotted segments.
        rules: pattern → how the layers that it matches are stored, or ``None`` to leave them wide; later ones win. What
            a rule says of a layer holds for those that have its weight.
        min_side: smallest side of a weight that is packed.

    Returns what was done. A terminal shows progress, and this result.

    Raises ``ValueError`` for a text that is not understood, for a pattern that matches no layer, and naming the layer
    for a weight that cannot be stored so, one that rules say two things of, or one of torchao's that is not read. The
    model is as it was then.
    """
    from rich.console import Console  # takes as long to import as to pack a small model, and no compilation needs it
    from rich.progress import track

    chosen = choice(model, spec, [skip] if isinstance(skip, str) else skip, rules or {}, min_side)
    before, console = bytes_of(model), Console()
    made: dict[int, Any] = {}
    layers = []
    places = places_of(model)
    for name, text in track(chosen.specs.items(), "packing", console=console, disable=not console.is_terminal):
        place = places[name]
        weight = place.weight
        packed: Any = made.get(id(weight))
        if packed is None:
            if name in chosen.foreign:
                packed = torchao.packed_weight(weight)
            else:
                packed = PackedWeight.of(weight, text, place.multiplies == "transposed")
            packed.layer = name
            packed = made[id(weight)] = nn.Parameter(packed, requires_grad=False)
        layers.append(PackedLayer(name, packed.spec, tuple(weight.shape), _bytes(weight), packed.nbytes))
        place.put(packed)
    result = Packing(tuple(layers), chosen.wide, before, bytes_of(model))
    if console.is_terminal:
        console.print(str(result), highlight=False, markup=False)
    return result


def unpack_(model: nn.Module, names: str | Sequence[str] = "*") -> list[str]:
    """Decode packed weights for good, in place; returns the names of their layers, those that share one included.

    The parameters are plain tensors of the same dtype again, still frozen: ``requires_grad_(True)`` trains them.

    Args:
        names: patterns of the layers to decode.

    Raises ``ValueError`` for a pattern that matches no packed layer.
    """
    patterns = [names] if isinstance(names, str) else list(names)
    packed = {name: place for name, place in places_of(model).items() if isinstance(place.weight, PackedWeight)}
    for pattern in patterns:
        _check_matched("unpack_", "names", pattern, packed)
    asked = {id(packed[name].weight) for name in packed if any(matches_name(name, pattern) for pattern in patterns)}
    made: dict[int, nn.Parameter] = {}
    done = [name for name, place in packed.items() if id(place.weight) in asked]
    for name in done:
        weight: Any = packed[name].weight
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.decoded().contiguous(), requires_grad=False)
        packed[name].put(made[id(weight)])
    return done


def packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    """Name of the layer and weight, for every layer with a packed one."""
    for name, place in places_of(model).items():
        if isinstance(place.weight, PackedWeight):
            yield name, place.weight


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(map(_bytes, tensors.values()))


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, or of those that it is made of."""
    return sum(part.numel() * part.element_size() for part in compat.plain_parts(tensor))


# --- which layers ---------------------------------------------------------------------------------------------------


#: Kinds of layers that contract their ``weight`` and do nothing else with it; whether it lies transposed, by the name
#: of the class (transformers' ``Conv1D`` is a linear layer whose weight is [inputs, outputs]).
_BY_CLASS_NAME = {"Conv1D": "transposed"}
#: The same of experts that are parameters of three axes, where they do not say so as those of transformers do.
_EXPERTS_BY_CLASS_NAME = {"Llama4TextExperts": "transposed"}
#: Layers whose ``weight`` has three axes and is no experts'.
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)


def multiplies(module: nn.Module) -> str:
    """``"rows"`` for a layer whose weight has a row per output, ``"transposed"`` for one with a column; else ""."""
    return "rows" if isinstance(module, nn.Linear) else _BY_CLASS_NAME.get(type(module).__name__, "")


def multiplies_by_experts(module: nn.Module) -> str:
    """The same of the matrices in parameters of three axes: what ``use_experts_implementation`` of transformers notes
    as ``is_transposed``.
    """
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return "transposed" if transposed else "rows"
    return _EXPERTS_BY_CLASS_NAME.get(type(module).__name__, "")


@dataclass(frozen=True)
class Place:
    """Where a model has a weight."""

    module: nn.Module
    attribute: str = "weight"

    @property
    def weight(self) -> Tensor:
        return self.module._parameters[self.attribute]  # type: ignore[return-value]

    def put(self, weight: nn.Parameter) -> None:
        setattr(self.module, self.attribute, weight)

    @property
    def is_experts(self) -> bool:
        return self.attribute != "weight"

    @property
    def has_three_axes(self) -> bool:
        """Whether it may be experts, called ``weight`` too; the weights of convolutions are none."""
        return self.is_experts or (self.weight.dim() == 3 and not isinstance(self.module, _CONVOLUTIONS))

    @property
    def multiplies(self) -> str:
        """See :func:`multiplies`."""
        return (multiplies_by_experts if self.is_experts else multiplies)(self.module)

    @property
    def looks_up(self) -> bool:
        """Whether rows are looked up in it, as in an embedding."""
        return isinstance(self.module, nn.Embedding) and not self.is_experts

    @property
    def reads_rows(self) -> bool:
        """Whether its rows stand for themselves, in a product or looked up."""
        return self.looks_up or (self.multiplies == "rows" and not self.is_experts)


def places_of(model: nn.Module) -> dict[str, Place]:
    """Name of the module and place of every parameter called ``weight``, and name and place of every other parameter of
    three axes.
    """
    places = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and attribute == "weight":
                places[name] = Place(module)
            elif parameter is not None and parameter.dim() == 3:
                places[f"{name}.{attribute}" if name else attribute] = Place(module, attribute)
    return places


@dataclass(frozen=True)
class _Choice:
    """Name → how a layer is stored; names of those that torchao has quantized, whose weights are taken over; name → why
    a layer stays wide.
    """

    specs: dict[str, str]
    foreign: set[str]
    wide: dict[str, str]


def choice(model: nn.Module, spec: str, skip: Iterable[str], rules: Mapping[str, str | None], min_side: int) -> _Choice:
    """How each layer is stored, or why not."""
    for text in (spec, *(text for text in rules.values() if text is not None)):
        Stored.parse(text)
    readers = readers_of(model)
    output = getattr(output_embeddings(model), "weight", None)
    places = places_of(model)
    for what, pattern in [*(("skip", pattern) for pattern in skip), *(("rules", pattern) for pattern in rules)]:
        _check_matched("pack_", what, pattern, places)
    chosen, by_default, by_rule = _Choice({}, set(), {}), set(), set()
    for name, place in places.items():
        weight = place.weight
        matching = [(pattern, text) for pattern, text in rules.items() if matches_name(name, pattern)]
        pattern, chosen_spec = matching[-1] if matching else ("", spec)
        exact = bool(pattern) and name.endswith(pattern)
        if matching:
            by_rule.add(name)
        understood = bool(place.multiplies) or place.looks_up
        if skipped := next((skipping for skipping in skip if matches_name(name, skipping)), None):
            reason = f"skip={skipped!r}"
        elif chosen_spec is None:
            reason = f"rules: {pattern!r}: None"
        elif understood and torchao.is_quantized(weight) and not exact:
            _check_torchao(name, place)
            chosen.foreign.add(name)
            chosen.specs[name] = chosen_spec
            continue
        elif why := impossible(place, readers):
            if exact:
                msg = f"pack_: layer {name!r} cannot be stored as {chosen_spec!r}: {why}; leave it out of rules"
                raise ValueError(msg)
            reason = why
        elif reason := "" if matching else left_wide(name, place, weight is output, min_side, readers):
            by_default.add(name)
        if not reason:
            assert chosen_spec is not None
            chosen.specs[name] = chosen_spec
        elif understood or place.has_three_axes or not weight.is_floating_point():
            chosen.wide[name] = reason
    _share(chosen, places, by_default, by_rule)
    for name, text in chosen.specs.items():
        if name not in chosen.foreign:
            _check_size(name, places[name].weight, text, places[name].multiplies == "transposed")
    return chosen


def _share(chosen: _Choice, places: Mapping[str, Place], by_default: Set[str], by_rule: Set[str]) -> None:
    """Choose layers that have the weight of a chosen one, if they are only wide ``by_default``. Of the chosen layers of
    a weight, those that rules name say how it is stored.

    Raises ``ValueError`` if such a layer is to stay wide, or if rules say two things of a weight.
    """
    spec_of: dict[int, tuple[str, str]] = {}
    for name in sorted(chosen.specs, key=lambda name: name not in by_rule):
        first, spec = spec_of.setdefault(id(places[name].weight), (name, chosen.specs[name]))
        if name in by_rule - chosen.foreign and Stored.parse(chosen.specs[name]) != Stored.parse(spec):
            msg = (
                f"pack_: layers {first!r} and {name!r} have one weight, but rules store them as {spec!r} and "
                f"{chosen.specs[name]!r}; name one of them"
            )
            raise ValueError(msg)
        chosen.specs[name] = spec
    for name in [name for name in chosen.wide if id(places[name].weight) in spec_of]:
        packed, spec = spec_of[id(places[name].weight)]
        if name not in by_default:
            msg = (
                f"pack_: layers {packed!r} and {name!r} have one weight, but {name!r} stays wide ({chosen.wide[name]})"
            )
            raise ValueError(msg)
        chosen.specs[name] = spec
        del chosen.wide[name]


def impossible(place: Place, readers: Mapping[int, set[type]]) -> str:
    """Why the weight of a layer cannot be stored as codes; "" if it can."""
    weight, kind, axes = place.weight, type(place.module).__name__, 3 if place.is_experts else 2
    if isinstance(weight, PackedWeight):
        return f"stored already, as {short_names(weight.spec)!r}"
    if compat.is_wrapper_subclass(weight) or not weight.is_floating_point():
        return f"its weight is a {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    if not place.multiplies and not place.looks_up:
        if place.has_three_axes:
            return f"a parameter of three axes of a {kind}, not known to be experts (no is_transposed): left as it is"
        return f"a module of class {kind} does not only multiply by its weight"
    if weight.dim() != axes:
        return f"its weight has {weight.dim()} axes, not {axes}"
    if getattr(place.module, "max_norm", None) is not None:
        return f"a module of class {kind} with max_norm writes to its weight"
    rows = (nn.Linear, nn.Embedding) if place.reads_rows else ()
    others = {other for other in readers[id(weight)] if other is not type(place.module) and not issubclass(other, rows)}
    return _tied(others)


def tied_to_embedding(place: Place, readers: Mapping[int, set[type]]) -> str:
    """That a layer that multiplies has the weight of an embedding; "" if it has not."""
    return _tied({other for other in readers[id(place.weight)] if issubclass(other, nn.Embedding)})


def _tied(others: Set[type]) -> str:
    names = ", ".join(sorted(other.__name__ for other in others))
    return f"tied: its weight is also that of a module of class {names}" if others else ""


def left_wide(name: str, place: Place, is_output: bool, min_side: int, readers: Mapping[int, set[type]]) -> str:
    """Why a layer that no rule names stays wide; "" if it does not."""
    if place.looks_up:
        return "an embedding; rules may name it"
    if tied := tied_to_embedding(place, readers):
        return tied
    if pattern := next((pattern for pattern in LEFT_WIDE if matches_name(name, pattern)), ""):
        return f"a layer called {pattern}"
    if is_output:
        return "output head: the model's get_output_embeddings()"
    thin = min(place.weight.shape[-2:])
    return f"a side of its weight is {thin}, below min_side={min_side}" if thin < min_side else ""


def readers_of(model: nn.Module) -> dict[int, set[type]]:
    """Classes of the modules that have a parameter, by its identity."""
    readers: dict[int, set[type]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            readers.setdefault(id(parameter), set()).add(type(module))
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


def _check_torchao(name: str, place: Place) -> None:
    kind = type(place.module).__name__
    if fault := torchao.fault_of(place.weight) if place.reads_rows else f"torchao's weights of a {kind} are not read":
        msg = f"pack_: layer {name!r}: {fault}; skip=[{name!r}] leaves it as it is"
        raise ValueError(msg)


def _check_size(name: str, weight: Tensor, spec: str, transposed: bool) -> None:
    try:
        Stored.parse(spec).check_size(weight.shape[-2 if transposed else -1])
    except ValueError as error:
        size = "×".join(map(str, weight.shape))
        msg = f"pack_: layer {name!r} of {size} as {spec!r}: {error}; or skip=[{name!r}]"
        raise ValueError(msg) from None


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
