"""``load_quantized_``: checkpoints of others as packed weights, bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from qcompile.ir.quantizer import Granularity

from .checkpoint import Read, give, readers_of_files
from .layouts import FLOATS, Awq, BitsAndBytes, Gptq, Integers, Mxfp4Experts, PackedIntegers, Readable
from .pack import Place, places_of
from .weight import PackedWeight

__all__ = ["load_quantized_"]


def load_quantized_(model: nn.Module, path: str | Path, device: Any = None) -> list[str]:
    """Load a quantized checkpoint into a model of the same names, in place, one layer after the other.

    Quantized weights become :class:`~qcompile.stored.PackedWeight` in the place of what the model has there, which is
    freed; no weight is decoded. The model may be on the meta device but for its buffers, which no checkpoint has::

        with accelerate.init_empty_weights():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        qcompile.load_quantized_(model, path)

    Args:
        path: a folder with ``config.json`` and ``*.safetensors``, whose ``quant_method`` is compressed-tensors
            (``pack-quantized`` with integers of 4 or 8 bits, ``nvfp4-pack-quantized``,
            ``mxfp4-pack-quantized``), bitsandbytes (4 bits), gptq (4 or 8 bits, version 1), awq
            (AutoAWQ's version "gemm", 4 bits with zeros) or mxfp4 (gpt-oss).
        device: where tensors go; by default where the model's are, and to the CPU where those are on meta.

    Returns the names of the layers that are packed. Raises ``ValueError`` naming the layer and what cannot be read, or
    the tensor that is missing.
    """
    folder = Path(path)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
    method = config.get("quant_method")
    if method not in _LAYERS:
        msg = f"load_quantized_: quant_method {method!r} in {str(folder)!r} is not one of {', '.join(_LAYERS)}"
        raise ValueError(msg)
    places = {name: place for name, place in places_of(model).items() if place.multiplies}
    with ExitStack() as files:
        read = readers_of_files(folder, files)
        layouts = _LAYERS[method](config, places, read)
        names = model.state_dict().keys()
        for name, layout in layouts.items():
            place = places[name]
            key, start = (name, f"{name}_") if place.is_experts else (f"{name}.weight", f"{name}.")
            tensors = _take(read, start, names - {key})
            read[key] = partial(_packed, name, place, layout, tensors)
        give(model, read, device, "load_quantized_")
    if empty := next((name for name, b in model.named_buffers() if b.is_meta), None):
        msg = (
            f"load_quantized_: buffer {empty!r} is on the meta device and in no checkpoint; make the model under "
            "accelerate.init_empty_weights(), which leaves buffers alone"
        )
        raise ValueError(msg)
    return [*layouts]


def _take(read: dict[str, Read], start: str, wide: Set[str]) -> dict[str, Read]:
    """Take out of ``read`` what a weight has become, by what follows ``start`` in keys. ``wide`` ones stay (a bias)."""
    keys = [key for key in sorted(read) if key.startswith(start) and key not in wide]
    return {key.removeprefix(start): read.pop(key) for key in keys}


def _packed(name: str, place: Place, layout: Readable, tensors: Mapping[str, Read]) -> PackedWeight:
    weight: Any = place.weight
    transposed = place.multiplies == "transposed"
    shape = tuple(weight.mT.shape if transposed else weight.shape)
    given = {suffix: read() for suffix, read in tensors.items()}
    try:
        packed = layout.read(given, shape, weight.dtype)
    except ValueError as error:
        msg = f"load_quantized_: layer {name!r} of {'×'.join(map(str, shape))} as {layout}: {error}"
        raise ValueError(msg) from None
    return PackedWeight(packed.parts, packed.spec, shape[-1], weight.dtype, transposed)


# --- which layers have which layout ---------------------------------------------------------------------------------

Layers = Callable[[Mapping[str, Any], Mapping[str, Place], Mapping[str, Read]], dict[str, Readable]]


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """Raises ``ValueError`` if it is missing."""
    if config.get(key) is None:
        msg = f"load_quantized_: quantization_config says no {key!r}; it says {', '.join(config)}"
        raise ValueError(msg)
    return config[key]


def _block(group_size: int) -> Granularity:
    """What shares a scale; −1 stands for rows. Raises ``ValueError`` for what is no size."""
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        msg = f"load_quantized_: group_size {group_size!r} in quantization_config is neither positive nor -1"
        raise ValueError(msg)
    return Granularity("row") if group_size == -1 else Granularity("block", group_size)


#: compressed-tensors' ``strategy`` of weights → what shares a scale, given their settings.
_STRATEGIES: dict[str, Callable[[Mapping[str, Any]], Granularity]] = {
    "tensor": lambda weights: Granularity("tensor"),
    "channel": lambda weights: Granularity("row"),
    "group": lambda weights: _block(_setting(weights, "group_size")),
}


def _compressed_tensors(
    config: Mapping[str, Any], places: Mapping[str, Place], read: Mapping[str, Read]
) -> dict[str, Readable]:
    found: dict[str, Readable] = {}
    for name, place in places.items():
        if f"{name}.weight_packed" not in read:
            if f"{name}.weight_scale" in read:
                msg = f"load_quantized_: layer {name!r} is quantized, but not packed ({config.get('format')})"
                raise ValueError(msg)
            continue
        group = _group_of(name, place.module, _setting(config, "config_groups"))
        kind, weights = group.get("format") or _setting(config, "format"), _setting(group, "weights")
        floats = next((layout for layout in FLOATS if layout.name == kind), None)
        fault = "an order of activations is not read" if f"{name}.weight_g_idx" in read else ""
        if fault := fault or ("" if floats else _fault(kind, weights, f"{name}.weight_zero_point" in read)):
            msg = f"load_quantized_: layer {name!r}: {fault}"
            raise ValueError(msg)
        found[name] = floats or PackedIntegers(weights["num_bits"], _STRATEGIES[weights["strategy"]](weights))
    return found


def _fault(kind: str, weights: Mapping[str, Any], has_zeros: bool) -> str:
    """Why integers are not read; "" if they are."""
    bits, strategy = _setting(weights, "num_bits"), _setting(weights, "strategy")
    if kind != PackedIntegers.name:
        return f"format {kind!r} is not read"
    if not Integers(bits).readable:
        return f"integers of {bits} bits are not read; those of 4 and 8 bits are"
    if strategy not in _STRATEGIES:
        return f"strategy {strategy!r} is not read; {', '.join(_STRATEGIES)} are"
    if not weights.get("symmetric", True) and not has_zeros:
        return "it is not symmetric, and has no tensor 'weight_zero_point'"
    return ""


def _group_of(name: str, module: nn.Module, groups: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group of ``config_groups`` that a layer is in: by its name, by a regular expression, or by its class."""
    for group in groups.values():
        for target in group["targets"]:
            pattern = target.removeprefix("re:")
            if target == name or (pattern != target and re.match(pattern, name)):
                return group
    kinds = {kind.__name__ for kind in type(module).__mro__}
    for group in groups.values():
        if kinds & set(group["targets"]):
            return group
    msg = f"load_quantized_: layer {name!r} is packed, but in none of config_groups: {', '.join(groups)}"
    raise ValueError(msg)


def _bitsandbytes(
    config: Mapping[str, Any], places: Mapping[str, Place], read: Mapping[str, Read]
) -> dict[str, Readable]:
    if not config.get("load_in_4bit", config.get("_load_in_4bit")):
        msg = "load_quantized_: bitsandbytes with load_in_8bit is not read; load_in_4bit is"
        raise ValueError(msg)
    return {name: BitsAndBytes() for name in places if f"{name}.weight.absmax" in read}


#: What patterns of ``dynamic`` begin with if their modules are not quantized.
_WIDE = "-:"


def _gptq(config: Mapping[str, Any], places: Mapping[str, Place], read: Mapping[str, Read]) -> dict[str, Readable]:
    bits, version = _setting(config, "bits"), config.get("checkpoint_format", "gptq")
    layout = Gptq(bits, _block(_setting(config, "group_size")))
    if version != "gptq" or not layout.integers.readable:
        msg = (
            f"load_quantized_: gptq of {bits} bits, checkpoint_format {version!r}, is not read; 4 or 8 bits, 'gptq' is"
        )
        raise ValueError(msg)
    if pattern := next((key for key in config.get("dynamic") or {} if not key.startswith(_WIDE)), None):
        msg = f"load_quantized_: gptq's dynamic {pattern!r} gives modules settings of their own, which are not read"
        raise ValueError(msg)
    found: dict[str, Readable] = {name: layout for name in places if f"{name}.qweight" in read}
    if config.get("desc_act") and (name := next((name for name in found if f"{name}.g_idx" not in read), None)):
        msg = f"load_quantized_: layer {name!r}: desc_act is true, and it has no tensor 'g_idx', which has the order"
        raise ValueError(msg)
    return found


def _awq(config: Mapping[str, Any], places: Mapping[str, Place], read: Mapping[str, Read]) -> dict[str, Readable]:
    layout = Awq(_block(_setting(config, "group_size")))
    bits, zeros = _setting(config, "bits"), config.get("zero_point", True)
    version = config.get("version", config.get("format", "gemm"))
    if (bits, str(version).lower(), zeros) != (layout.bits, "gemm", True):
        msg = (
            f"load_quantized_: awq of {bits} bits, version {version!r}, zero_point {zeros}, is not read; 4 bits, "
            "'gemm', True is"
        )
        raise ValueError(msg)
    return {name: layout for name in places if f"{name}.qweight" in read}


def _mxfp4(config: Mapping[str, Any], places: Mapping[str, Place], read: Mapping[str, Read]) -> dict[str, Readable]:
    return {name: Mxfp4Experts() for name, place in places.items() if place.is_experts and f"{name}_blocks" in read}


#: ``quant_method`` → the layouts of a model's quantized layers.
_LAYERS: dict[str, Layers] = {
    "compressed-tensors": _compressed_tensors,
    "bitsandbytes": _bitsandbytes,
    "gptq": _gptq,
    "awq": _awq,
    "mxfp4": _mxfp4,
}
