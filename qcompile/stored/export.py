"""``export``: packed or trained weights as a checkpoint that others load.

A layout holds a weight or it does not: nothing is quantized twice. What is written is read again and decoded as the
loaders of the layout decode it, and has to be, bit for bit, what the packed weight stands for.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.definitions import short_names
from qcompile.ir.operand import Operand
from qcompile.ir.ops import global_scale_of
from qcompile.ir.recipe import Recipe
from qcompile.ir.rules import block_of, blocks_in, describe
from qcompile.ir.stored import Stored
from qcompile.ir.transforms import Transform
from qcompile.recipes import RECIPES

from .checkpoint import readers_of_files
from .layouts import (
    BITSANDBYTES_TYPES,
    FLOATS,
    BitsAndBytes,
    Gptq,
    Layout,
    PackedFloats,
    PackedIntegers,
    settled,
)
from .pack import (
    Place,
    choice,
    impossible,
    left_wide,
    lines_of_wide,
    multiplies,
    output_embeddings,
    packed_weights,
    places_of,
    readers_of,
    tied_to_embedding,
)
from .weight import PackedWeight

__all__ = ["FUSED", "Exported", "export"]

#: Layers of one module that servers multiply as one. vLLM gives them one global scale, the largest that it finds.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Exported:
    """What :func:`export` has written; ``str()`` says it in a few lines.

    Attributes:
        path: the folder.
        layout: as it was asked for.
        layers: name → how the weight is stored.
        wide: name → reason, of other layers that multiply by a weight.
        dtype: of the model that loads.
        files: those with tensors, by name.
        bytes: of all tensors.
    """

    path: Path
    layout: str
    layers: Mapping[str, str]
    wide: Mapping[str, str]
    dtype: torch.dtype
    files: tuple[str, ...]
    bytes: int

    def __str__(self) -> str:
        kinds = Counter(map(short_names, self.layers.values()))
        how = ", ".join(f"{count} layers stored as {spec!r}" for spec, count in kinds.items())
        files = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        lines = [
            f"exported to {self.path} as {self.layout}: {how}; {self.bytes / 1e6:.2f} MB in {files}",
            f"read back: all weights decode to the same {_name(self.dtype)} numbers",
        ]
        return "\n".join([*lines, *lines_of_wide(self.wide)])


def export(
    model: nn.Module,
    path: str | Path,
    layout: str = "compressed-tensors",
    *,
    spec: str | None = None,
    recipe: str | Recipe | None = None,
    options: Mapping[str, Any] | None = None,
    skip: str | Sequence[str] = (),
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    round_scales: bool = False,
    rotated: bool = False,
    fused: Sequence[Sequence[str]] = FUSED,
    max_shard_size: int | str = "5GB",
) -> Exported:
    """Write a transformers model so that ``AutoModelForCausalLM.from_pretrained(path)`` loads the numbers that are
    stored: ``*.safetensors`` and ``config.json``. The model is not changed.

    What is quantized in the checkpoint: weights that are packed (:func:`~qcompile.pack_`), with the codes they have;
    and wide ones, if ``spec`` or ``recipe`` says how.

    Args:
        model: a transformers model, compiled or not. Adapters have to be merged first.
        path: a folder, made if it does not exist.
        layout: ``"compressed-tensors"`` (integers of 1 to 8 bits, NVFP4, MXFP4; transformers and vLLM),
            ``"bitsandbytes"`` (NF4, its FP4), ``"gptq"`` (integers of 2, 4 or 8 bits; version 1, symmetric).
        spec: how wide weights are quantized, as for ``pack_``, and which of them.
        recipe: the recipe that wide weights were trained with, by name (``"qcompile_quest"``) or as a
            :class:`~qcompile.Recipe`: they are quantized as its forward did. With the ``options`` that the model was
            compiled with.
        skip: names of layers to leave wide, as patterns over whole dotted segments.
        dtype: of the model that loads, by default that of the model as it is.
        bits: of the integers that codes are written as, by default those of a code. Integers of more bits hold grids
            that no integers of as many bits hold: E2M1 in rows, half-integers.
        round_scales: whether float32 scales may be rounded to what the layout has: integers have scales in ``dtype``;
            a global scale moves by up to 2⁻¹⁹ where decoding would round differently. Otherwise that is refused.
        rotated: whether weights that a recipe rotates are written rotated, with a ``transform_config`` that says so
            (compressed-tensors). vLLM rotates inputs by it; transformers ignores it, and computes other numbers.
        fused: layers of one module that need one global scale (NVFP4); ``spec`` gives them that of the largest. ``()``
            leaves each its own, which transformers loads and vLLM does not.
        max_shard_size: of a file, in bytes or as text; tensors beyond go to further files, with an index beside them.

    Returns what was written. A terminal shows progress, and this result.

    Raises ``ValueError`` naming the layer, how it is stored and what to do, before anything is written; and if what was
    written does not read back, in which case there is no ``config.json``.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from rich.console import Console
    from rich.progress import track
    from safetensors.torch import save_file

    model = getattr(model, "_orig_mod", model)
    target = Path(path)
    _check(model, layout, spec, recipe, options, rotated)
    main = next(p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = dtype or main
    console = Console()
    watched = partial(track, console=console, disable=not console.is_terminal)
    wide: dict[str, str] = {}
    skipped = [skip] if isinstance(skip, str) else skip
    chosen = dict(_chosen(model, spec, recipe, options or {}, skipped, rotated, wide))
    if not chosen:
        msg = "export: no weight is packed; pack_ the model, or give spec= or recipe="
        raise ValueError(msg)
    shared = {} if spec is None else _global_scales(chosen, fused)
    layers = {}
    for name, layer in watched(chosen.items(), "packing"):
        layers[name] = _laid_out(name, layer, layout, dtype, bits, round_scales, shared.get(name))
    _check_fused(layers, fused)
    config = _CONFIGS[layout](layers, [name for name in wide if name not in layers], dtype)
    content = _Content(model, layers, main, dtype)

    plan = split_torch_state_dict_into_shards(content.shapes, max_shard_size=max_shard_size)
    _check_folder(target, plan.filename_to_tensors)
    target.mkdir(parents=True, exist_ok=True)
    files = plan.filename_to_tensors.items()
    for file, names in watched(files, "writing"):
        save_file(content.tensors(names), target / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    content.check_read_back(target, watched)
    _write_config(model, target, dtype, config)
    result = Exported(
        target, layout, {name: layer.text for name, layer in layers.items()}, wide, dtype,
        tuple(plan.filename_to_tensors), sum(t.numel() * t.element_size() for t in content.shapes.values()),
    )  # fmt: skip
    if console.is_terminal:
        console.print(str(result), highlight=False, markup=False)
    return result


def _check(
    model: nn.Module, layout: str, spec: str | None, recipe: str | Recipe | None, options: Mapping[str, Any] | None,
    rotated: bool,
) -> None:  # fmt: skip
    """Raises ``ValueError`` for what cannot be exported at all."""
    if layout not in _LAYOUTS:
        msg = f"export: layout={layout!r} is not one of {', '.join(_LAYOUTS)}{_ELSEWHERE.get(layout, '')}"
        raise ValueError(msg)
    if not hasattr(model, "config"):
        kind = type(model).__name__
        msg = (
            f"export: {kind} has no config, as transformers' models have; others save qcompile.packed_state_dict(model)"
        )
        raise ValueError(msg)
    if spec is not None and recipe is not None:
        msg = f"export: spec={spec!r} and recipe= both say how wide weights are quantized; give one"
        raise ValueError(msg)
    if rotated and layout != _ROTATED:
        msg = f"export: rotated=True: layout={layout!r} cannot say so; {_ROTATED!r} can"
        raise ValueError(msg)
    if options and recipe is None:
        msg = "export: options= are those of a recipe; give recipe= too"
        raise ValueError(msg)
    if adapter := next((name for name, module in model.named_modules() if hasattr(module, "base_layer")), None):
        msg = f"export: layer {adapter!r} has an adapter beside it; call merge_and_unload() on the model first"
        raise ValueError(msg)


# --- which layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """A weight and how it is to be stored."""

    weight: Tensor
    stored: Stored
    transposed: bool
    rotation: int = 1


@dataclass(frozen=True)
class _Layer:
    """A packed weight and where its bits go."""

    weight: PackedWeight
    layout: Layout
    rotation: int = 1

    @property
    def text(self) -> str:
        return f"{self.weight.spec}; {Transform(self.rotation)}" if self.rotation > 1 else self.weight.spec

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.parts["codes"].shape[0], self.weight.size_contracted

    @property
    def two_level(self) -> bool:
        return isinstance(self.layout, PackedFloats) and self.layout.two_level

    def tensors(self, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return {f"{name}.{suffix}": tensor for suffix, tensor in self.layout.write(self.weight, dtype).items()}


def _chosen(
    model: nn.Module, spec: str | None, recipe: str | Recipe | None, options: Mapping[str, Any], skip: Sequence[str],
    rotated: bool, wide: dict[str, str],
) -> Iterator[tuple[str, _Chosen]]:  # fmt: skip
    """Layers in the order of the model; fills in ``wide`` with the others."""
    how: Mapping[str, Operand | Stored] = {}
    places = places_of(model)
    if spec is not None:
        found = choice(model, spec, skip, {}, Recipe.min_side)
        if foreign := next(iter(found.foreign), None):
            msg = f"export: layer {foreign!r} is quantized by torchao; qcompile.pack_(model, …) takes it over as it is"
            raise ValueError(msg)
        modules = dict(model.named_modules())
        how = {name: Stored.parse(text) for name, text in found.specs.items() if name in modules}
        reasons = {name: reason for name, reason in found.wide.items() if not places[name].looks_up}
        reasons |= dict.fromkeys(found.specs.keys() - modules.keys(), "experts in one parameter")
    elif recipe is not None:
        how, reasons = _trained(model, recipe, {**options, **({"skip": [*skip]} if skip else {})}, rotated)
    else:
        reasons = {name: "not packed" for name, module in model.named_modules() if multiplies(module)}
    packed = dict(packed_weights(model))
    if other := next((name for name in packed if places[name].is_experts or not places[name].multiplies), None):
        what = "experts" if places[other].is_experts else "embeddings"
        msg = f"export: {other!r}: no layout holds packed {what}; call qcompile.unpack_(model, {other!r}) first"
        raise ValueError(msg)
    wide |= {name: reason for name, reason in reasons.items() if name not in packed}
    for name, module in model.named_modules():
        weight, transposed = getattr(module, "weight", None), multiplies(module) == "transposed"
        if name in packed:
            yield name, _Chosen(packed[name], packed[name].stored, packed[name].transposed)
        elif name in how:
            assert weight is not None
            stored, rotation = how[name], 1
            if isinstance(stored, Operand):
                rotation = stored.transform.on(weight.shape[0 if transposed else 1]).rotation
                stored = Stored(stored.quantizer)
            yield name, _Chosen(weight.detach(), stored, transposed, rotation)


def _trained(
    model: nn.Module, recipe: str | Recipe, options: Mapping[str, Any], rotated: bool
) -> tuple[dict[str, Operand], dict[str, str]]:
    """How the recipe quantizes the weight of each layer, or why it does not. Raises ``ValueError`` for an operand that
    is more than a quantizer, and a rotation if there may be one.
    """
    if not isinstance(recipe, Recipe) and recipe not in RECIPES:
        msg = f"export: recipe={recipe!r} is not one of {', '.join(RECIPES)}"
        raise ValueError(msg)
    of = (recipe if isinstance(recipe, Recipe) else RECIPES[recipe]).override(options)
    readers, output = readers_of(model), getattr(output_embeddings(model), "weight", None)
    operands, wide = {}, {}
    blocks = {name: block for path, module in model.named_modules() for name, block in blocks_in(module, path).items()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if not multiplies(module) or weight is None or isinstance(weight, PackedWeight):
            continue
        applicable = [
            rule for rule in of.all_rules if rule.matches(name, "linear", weight.numel(), block_of(name, blocks))
        ]
        verdict = next((rule for rule in reversed(applicable) if rule.quantize is not None), None)
        head = weight is output and not of.heads
        if verdict is not None and not verdict.quantize:
            reason = describe(verdict)
        else:
            place = Place(module)
            reason = impossible(place, readers) or tied_to_embedding(place, readers)
            if verdict is None and not reason:
                reason = left_wide(name, place, head, of.min_side, readers)
        operand = of.operand_under(applicable, of.weight, "weight")
        if not reason and operand is None:
            reason = f"{of.name} leaves its weight wide"
        if reason:
            wide[name] = reason
            continue
        assert operand is not None
        _check_plain(name, operand, of.name, rotated)
        operands[name] = operand
    return operands, wide


def _check_plain(name: str, operand: Operand, recipe: str, rotated: bool) -> None:
    """Raises ``ValueError`` for what happens to a weight before it is rounded, and loaders do not know of."""
    extra = {
        "outliers": operand.outliers,
        "sparsity": operand.transform.sparsity,
        "rotation": operand.transform.rotation > 1 and not rotated,
    }
    if kind := next((kind for kind, is_there in extra.items() if is_there), ""):
        also = ", or rotated=True for vLLM, which rotates inputs" if kind == "rotation" else ""
        msg = (
            f"export: layer {name!r} was trained by {recipe} as {short_names(str(operand))!r}: transformers' loaders "
            f"know no {kind}, and would multiply by other numbers; train with "
            f"options={{'weight': {{{kind!r}: None}}, 'activation': {{{kind!r}: None}}}}{also}"
        )
        raise ValueError(msg)


# --- one scale for layers that are multiplied as one -----------------------------------------------------------------


def _groups(names: Iterable[str], fused: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    """Those of the layers ``names`` that have the same parent and are in a group of ``fused``."""
    known = set(names)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        for group in fused:
            members = [f"{parent}.{last}" if parent else last for last in group]
            if len(found := [name for name in members if name in known]) > 1:
                yield found


def _global_scales(chosen: Mapping[str, _Chosen], fused: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Of layers whose wide weights get one: the one that follows from the largest absolute maximum of their group."""
    own = {
        name: settled(scale)
        for name, layer in chosen.items()
        if not isinstance(layer.weight, PackedWeight)
        and (scale := global_scale_of(layer.weight, layer.stored.quantizer)) is not None
    }
    for names in _groups(own, fused):
        own |= dict.fromkeys(names, torch.stack([own[name] for name in names]).max())
    return own


def _check_fused(layers: Mapping[str, _Layer], fused: Sequence[Sequence[str]]) -> None:
    """Raises ``ValueError`` for layers whose global scales differ, but must not."""
    scales = {name: float(layer.weight.parts["global_scale"]) for name, layer in layers.items() if layer.two_level}
    for names in _groups(scales, fused):
        if len({scales[name] for name in names}) > 1:
            spec = short_names(layers[names[0]].weight.spec)
            msg = (
                f"export: layers {', '.join(names)} stored as {spec!r} have global scales of their own, and vLLM "
                f"multiplies all of them by one; spec={spec!r} on a wide model gives them one, and fused=() is for "
                "transformers alone"
            )
            raise ValueError(msg)


# --- layouts --------------------------------------------------------------------------------------------------------

#: ``layout=`` → the layouts it stands for, given the bits of a code; of several the first that has a word for a weight.
_LAYOUTS: dict[str, Callable[[int], tuple[Layout, ...]]] = {
    "compressed-tensors": lambda bits: (*FLOATS, PackedIntegers(bits)),
    "bitsandbytes": lambda bits: (BitsAndBytes(),),
    "gptq": lambda bits: (Gptq(bits),),
}
#: The one whose ``config.json`` has a word for rotations.
_ROTATED = "compressed-tensors"
#: What to do instead of others that people ask for.
_ELSEWHERE = {
    "mxfp4": "; transformers reads it for gpt-oss's experts only, and compressed-tensors holds 'e2m1 block32 e8m0'"
}


def _laid_out(
    name: str, layer: _Chosen, kind: str, dtype: torch.dtype, bits: int | None, round_scales: bool,
    global_scale: Tensor | None,
) -> _Layer:  # fmt: skip
    """The packed weight of a layer, and the layout that holds it. Raises ``ValueError`` if none does."""
    stored, weight = layer.stored, layer.weight
    layout, fault = _layout_of(kind, layer, bits, dtype)
    if fault:
        others = [other for other in _LAYOUTS if other != kind and not _layout_of(other, layer, bits, dtype)[1]]
        fix = f"; layout={others[0]!r} holds it" if others and "bits=" not in fault and "dtype=" not in fault else ""
        msg = f"export: layer {name!r} stored as {short_names(str(stored))!r}: {fault}{fix}"
        raise ValueError(msg)
    if not isinstance(weight, PackedWeight):
        transform = str(Transform(layer.rotation))
        try:
            weight = PackedWeight.of(weight, str(stored), layer.transposed, global_scale, transform)
        except ValueError as error:
            msg = f"export: layer {name!r}: {error}"
            raise ValueError(msg) from None
    near = layout.nearest(weight, dtype)
    if near is not weight and not round_scales:
        msg = (
            f"export: layer {name!r} stored as {short_names(str(stored))!r}: its float32 scales are no numbers that "
            f"{kind} has in {_name(dtype)}; round_scales=True rounds them"
            f"{'' if isinstance(layout, PackedFloats) or kind == 'gptq' else ', dtype=torch.float32 keeps them'}"
        )
        raise ValueError(msg)
    return _Layer(near, layout, layer.rotation)


def _layout_of(kind: str, layer: _Chosen, bits: int | None, dtype: torch.dtype) -> tuple[Layout, str]:
    """The layout, and why it does not hold the weight; "" if it does."""
    stored, weight = layer.stored, layer.weight
    candidates = _LAYOUTS[kind](bits or stored.quantizer.format.bits)
    exact = [layout for layout in candidates if isinstance(layout, PackedFloats) and layout.holds(stored)]
    layout = exact[0] if exact and bits is None else candidates[-1]
    shape = tuple(weight.mT.shape if layer.transposed else weight.shape)
    if layer.transposed and kind != "bitsandbytes":
        return layout, f"its weight lies [K, N] (Conv1D), and {kind} quantizes nn.Linear only; skip it"
    if stored.zeros:
        return layout, f"{kind} has no float zeros; qcompile.unpack_ the model and pack it without 'zeros'"
    return layout, layout.fault(stored, (shape[0], shape[1]), dtype)


# --- files ----------------------------------------------------------------------------------------------------------

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class _Content:
    """The tensors of a checkpoint, none of which is made before it is asked for.

    Attributes:
        model, layers: where they come from.
        main, dtype: wide tensors of dtype ``main`` become ``dtype``.
    """

    model: nn.Module
    layers: Mapping[str, _Layer]
    main: torch.dtype
    dtype: torch.dtype

    @cached_property
    def wide(self) -> dict[str, Tensor]:
        """Those that no layer quantizes; one that is there under several names (tied weights) under the first."""
        quantized = {f"{name}.weight" for name in self.layers}
        seen: set[int] = set()
        found = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in seen and name not in quantized and isinstance(value, Tensor):
                seen.add(id(value))
                found[name] = value.detach()
        return found

    @cached_property
    def keys(self) -> dict[str, dict[str, Tensor]]:
        """By layer its tensors on the meta device, by name."""
        return {
            name: {key: torch.empty_like(t, device="meta") for key, t in layer.tensors(name, self.dtype).items()}
            for name, layer in self.layers.items()
        }

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """All tensors on the meta device."""
        found = {name: torch.empty_like(t, dtype=self.dtype_of(t), device="meta") for name, t in self.wide.items()}
        return found | {key: tensor for tensors in self.keys.values() for key, tensor in tensors.items()}

    def tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of one file."""
        asked = set(names)
        found = {name: t.to(self.dtype_of(t)).contiguous() for name, t in self.wide.items() if name in asked}
        for name, layer in self.layers.items():
            if asked & self.keys[name].keys():
                found |= {key: t for key, t in layer.tensors(name, self.dtype).items() if key in asked}
        return found

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        return self.dtype if tensor.dtype == self.main else tensor.dtype

    def check_read_back(self, path: Path, watched: Callable[..., Any]) -> None:
        """Raises ``ValueError`` naming the tensor that is not in the files what it was."""
        with ExitStack() as files:
            read = readers_of_files(path, files)
            for name, tensor in self.wide.items():
                _check_same(path, name, read[name](), tensor.to(self.dtype_of(tensor)))
            for name, layer in watched(self.layers.items(), "reading back"):
                prefix = f"{name}."
                tensors = {key.removeprefix(prefix): read[key]() for key in self.keys[name]}
                decoded, meant = layer.layout.decode(tensors, layer.shape, self.dtype), layer.weight.decoded(self.dtype)
                _check_same(path, name, decoded, meant.mT if layer.weight.transposed else meant)


def _check_same(path: Path, name: str, found: Tensor, meant: Tensor) -> None:
    if not torch.equal(found, meant.to(found.device)):
        count = int((found != meant.to(found.device)).sum())
        msg = (
            f"export: {name!r} does not read back from {str(path)!r}: {count} of {found.numel()} numbers differ from "
            f"what is stored, as {_name(found.dtype)}; nothing can load this folder, which has no config.json"
        )
        raise ValueError(msg)


def _check_folder(path: Path, files: Iterable[str]) -> None:
    """Raises ``ValueError`` if there are tensors in the folder that would be mixed with these."""
    stale = sorted({file.name for file in path.glob("*.safetensors*")} - set(files))
    if stale:
        msg = f"export: {str(path)!r} holds {stale[0]}, which would be mixed with this checkpoint; give another folder"
        raise ValueError(msg)
    (path / "config.json").unlink(missing_ok=True)


def _write_config(model: Any, path: Path, dtype: torch.dtype, quantization: dict[str, Any]) -> None:
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype, config.quantization_config = [type(model).__name__], dtype, quantization
    config.save_pretrained(path)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(path)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- config.json ----------------------------------------------------------------------------------------------------


def _compressed_tensors(layers: Mapping[str, _Layer], wide: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """A group of layers for every way they are quantized in; of a single one the group is all linear layers."""
    members: dict[str, list[str]] = {}
    for name, layer in layers.items():
        assert isinstance(layer.layout, (PackedFloats, PackedIntegers))
        scheme = {"format": layer.layout.name, "weights": layer.layout.scheme(layer.weight.stored)}
        members.setdefault(json.dumps(scheme), []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(members) == 1 else [f"re:^{re.escape(name)}$" for name in names],
            "input_activations": None, "output_activations": None, **json.loads(scheme),
        }
        for i, (scheme, names) in enumerate(members.items())
    }  # fmt: skip
    rotations: dict[int, list[str]] = {}
    for name, layer in layers.items():
        if layer.rotation > 1:
            rotations.setdefault(layer.rotation, []).append(f"re:^{re.escape(name)}$")
    transforms = {
        f"hadamard_{size}": {
            "type": "hadamard", "head_dim": size, "randomize": False, "requires_grad": False,
            "apply": [
                {"targets": targets, "location": "input", "inverse": False, "ignore": []},
                {"targets": targets, "location": "weight_input", "inverse": True, "ignore": []},
            ],
        }
        for size, targets in rotations.items()
    }  # fmt: skip
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups, "ignore": list(wide), "kv_cache_scheme": None,
        **({"transform_config": {"config_groups": transforms}} if transforms else {}),
    }  # fmt: skip


def _bitsandbytes(layers: Mapping[str, _Layer], wide: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """The type and nesting of the first layer; those of a layer are in its file."""
    stored = next(iter(layers.values())).weight.stored
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
        "bnb_4bit_quant_type": BITSANDBYTES_TYPES[stored.quantizer.format.name],
        "bnb_4bit_use_double_quant": stored.nested is not None,
        "bnb_4bit_compute_dtype": _name(dtype), "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(wide),
    }  # fmt: skip


def _gptq(layers: Mapping[str, _Layer], wide: Sequence[str], dtype: torch.dtype) -> dict[str, Any]:
    """Raises ``ValueError`` if two layers differ in what the layout has once per model."""
    schemes: dict[tuple[int, int], str] = {}
    for name, layer in layers.items():
        assert isinstance(layer.layout, Gptq)
        block = layer.weight.stored.quantizer.granularity
        schemes.setdefault((layer.layout.bits, block.size if block.kind == "block" else -1), name)
    if len(schemes) > 1:
        first, second = [*schemes.values()][:2]
        msg = (
            f"export: layers {first!r} and {second!r} differ in bits or blocks, of which gptq has one per model; "
            "skip one, or layout='compressed-tensors'"
        )
        raise ValueError(msg)
    bits, group = next(iter(schemes))
    return {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": True, "desc_act": False, "lm_head": False,
        "checkpoint_format": "gptq", "dynamic": {f"-:^{re.escape(name)}$": {} for name in wide},
    }  # fmt: skip


_CONFIGS: dict[str, Callable[[Mapping[str, _Layer], Sequence[str], torch.dtype], dict[str, Any]]] = {
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
}
