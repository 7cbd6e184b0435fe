"""Packed weights in files: plain tensors under names of their own, so that safetensors takes them.

A packed weight ``layer.weight`` is its parts, ``layer.weight.codes`` and so on (:mod:`.weight` lists them), and
``layer.weight.packed``: a JSON text as bytes, which says how it is stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.sharding import is_sharded

from .weight import PARTS, PackedWeight

__all__ = ["give", "load_packed_", "packed_state_dict", "readers_of_files"]

#: What the text of a packed weight is called.
_TEXT = "packed"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

Read = Callable[[], Tensor]


def packed_state_dict(model: nn.Module | Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a model with packed weights as plain tensors: ``safetensors.torch.save_file(packed_state_dict(m),
    path)``.

    A tensor that is there under several names (tied weights) is given once, under the first of them.

    Args:
        model: or its state: of a sharded model the full one, ``get_model_state_dict(model, options=StateDictOptions(
            full_state_dict=True))``.

    Raises ``ValueError`` for state that is no tensor, or a shard.
    """
    state: dict[str, Tensor] = {}
    seen = set()
    given = model.state_dict(keep_vars=True) if isinstance(model, nn.Module) else model
    for name, value in given.items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if not isinstance(value, Tensor):
            msg = f"packed_state_dict: {name!r} is a {type(value).__name__}, no tensor; save it beside the file"
            raise ValueError(msg)
        if is_sharded(value):
            msg = (
                f"packed_state_dict: {name!r} is sharded; give packed_state_dict what get_model_state_dict returns "
                "with full_state_dict=True, or save with torch.distributed.checkpoint"
            )
            raise ValueError(msg)
        if not isinstance(value, PackedWeight):
            state[name] = value.detach()
            continue
        state |= {f"{name}.{part}": tensor.detach() for part, tensor in value.parts.items()}
        state[f"{name}.{_TEXT}"] = _bytes_of(value)
    return state


def load_packed_(model: nn.Module, source: Mapping[str, Tensor] | str | Path, device: Any = None) -> None:
    """Give a model the state of :func:`packed_state_dict`, in place.

    A weight that is packed in ``source`` is packed in the model afterwards, whatever it was before. One that is wide in
    ``source`` and packed in the model (by :func:`~qcompile.pack_` on the meta device, say) is quantized, so a model
    larger than memory can be packed from its wide checkpoint, one tensor at a time.

    Args:
        source: tensors by name, a ``.safetensors`` file, or a folder of such files. Files are read tensor by tensor.
        device: where tensors go; by default where the model's are, and where they come from if that is the meta device.

    Raises ``ValueError`` if names differ, or the model is sharded, before anything is loaded, and for a tensor of
    another shape. Of the names of a tied weight one is enough.
    """
    with ExitStack() as files:
        given = _readers(source, files)
        texts = {key: given.pop(key) for key in [*given] if key.endswith(f".{_TEXT}")}
        for key, text in texts.items():
            name = key.removesuffix(f".{_TEXT}")
            parts = {part: given.pop(part_key) for part in PARTS if (part_key := f"{name}.{part}") in given}
            given[name] = partial(_packed, text, parts)
        give(model, given, device, "load_packed_")


def give(model: nn.Module, given: Mapping[str, Read], device: Any, caller: str) -> None:
    """Give a model tensors by the names of its state, one after the other, in place; packed ones stay packed.

    Raises ``ValueError``, which ``caller`` begins, if names differ, before anything is loaded, and for a tensor of
    another shape. Of the names of a tied weight one is enough.
    """
    tie: Any = getattr(model, "tie_weights", None)  # transformers'; accelerate.init_empty_weights undoes it
    if tie is not None and any(value.is_meta for value in model.parameters()):
        tie()
    state = model.state_dict(keep_vars=True)
    _check_names(state, given.keys(), caller)
    if sharded := next((name for name, value in state.items() if is_sharded(value)), None):
        msg = f"{caller}: {sharded!r} is sharded; load before fully_shard, or by set_model_state_dict"
        raise ValueError(msg)
    names_of: dict[int, list[str]] = {}
    for name, value in state.items():
        names_of.setdefault(id(value), []).append(name)
    for names in names_of.values():
        value = state[names[0]]
        loaded = given[next(name for name in names if name in given)]()
        where = device if device is not None else None if value.is_meta else value.device
        loaded = loaded if where is None else loaded.to(where)
        if loaded.shape != value.shape:
            msg = f"{caller}: {names[0]!r} is {tuple(loaded.shape)} in the file, {tuple(value.shape)} in the model"
            raise ValueError(msg)
        _put(model, names, value, loaded)


def _put(model: nn.Module, names: list[str], value: Tensor, loaded: Tensor) -> None:
    """Give the tensor ``value``, which the model has under ``names``, what was loaded for it."""
    if isinstance(value, PackedWeight) and not isinstance(loaded, PackedWeight):
        loaded = PackedWeight.of(loaded.to(value.dtype), value.spec, value.transposed)
    if not isinstance(loaded, PackedWeight) and loaded.device == value.device:
        with torch.no_grad():
            value.copy_(loaded)
        return
    if isinstance(value, nn.Parameter):
        loaded = nn.Parameter(loaded, requires_grad=value.requires_grad and not isinstance(loaded, PackedWeight))
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, loaded)


def _packed(text: Read, parts: Mapping[str, Read]) -> PackedWeight:
    how = json.loads(bytes(text().tolist()))
    tensors = {part: read() for part, read in parts.items()}
    return PackedWeight(tensors, how["spec"], how["size"], _DTYPES[how["dtype"]], how["transposed"])


def _bytes_of(weight: PackedWeight) -> Tensor:
    how = {
        "spec": weight.spec,
        "size": int(weight.size_contracted),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "transposed": weight.transposed,
    }
    return torch.tensor(list(json.dumps(how).encode()), dtype=torch.uint8)


def _readers(source: Mapping[str, Tensor] | str | Path, files: ExitStack) -> dict[str, Read]:
    """What reads each tensor, by name."""
    if isinstance(source, Mapping):
        return {name: partial(_itself, tensor) for name, tensor in source.items()}
    return readers_of_files(Path(source), files)


def readers_of_files(path: Path, files: ExitStack) -> dict[str, Read]:
    """What reads each tensor of a ``.safetensors`` file or of a folder of such files, by name."""
    from safetensors import safe_open

    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        msg = f"there is no *.safetensors in {str(path)!r}"
        raise ValueError(msg)
    readers: dict[str, Read] = {}
    for file in paths:
        opened = files.enter_context(safe_open(file, "pt"))
        readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    return readers


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _check_names(state: Mapping[str, Any], given: Set[str], caller: str) -> None:
    """Raises ``ValueError`` if a tensor of the model is not given under any of its names, or one is given that the
    model has not.
    """
    loaded = {id(value) for name, value in state.items() if name in given}
    missing = [name for name, value in state.items() if id(value) not in loaded]
    unknown = sorted(given - state.keys())
    for what, names in (("is missing", missing), ("is given, but the model has none", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            msg = f"{caller}: {names[0]!r}{more} {what}; load into the model that was saved"
            raise ValueError(msg)
