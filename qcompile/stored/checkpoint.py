"""Packed weights in files: plain tensors under names of their own, so that safetensors takes them.

A packed weight ``layer.weight`` is its parts, ``layer.weight.codes`` and so on (:mod:`.weight` lists them), and
``layer.weight.packed``: a JSON text as bytes, which says how it is stored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .weight import PARTS, PackedWeight

__all__ = ["load_packed_", "packed_state_dict"]

#: What the text of a packed weight is called.
_TEXT = "packed"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

Read = Callable[[], Tensor]


def packed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model with packed weights as plain tensors: ``safetensors.torch.save_file(packed_state_dict(m),
    path)``.

    A tensor that is there under several names (tied weights) is given once, under the first of them.

    Raises ``ValueError`` for state that is no tensor.
    """
    state: dict[str, Tensor] = {}
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in seen:
            continue
        seen.add(id(value))
        if not isinstance(value, Tensor):
            msg = f"packed_state_dict: {name!r} is a {type(value).__name__}, no tensor; save it beside the file"
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

    Raises ``ValueError`` if names differ, before anything is loaded, and for a tensor of another shape. Of the names of
    a tied weight one is enough.
    """
    with ExitStack() as files:
        given = _readers(source, files)
        state = model.state_dict(keep_vars=True)
        texts = {name: given.pop(f"{name}.{_TEXT}") for name in state if f"{name}.{_TEXT}" in given}
        parts = {name: {p: given.pop(key) for p in PARTS if (key := f"{name}.{p}") in given} for name in texts}
        _check_names(state, {*texts, *given})
        names_of: dict[int, list[str]] = {}
        for name, value in state.items():
            names_of.setdefault(id(value), []).append(name)
        for names in names_of.values():
            value = state[names[0]]
            name = next(name for name in names if name in texts or name in given)
            where = device if device is not None else None if value.is_meta else value.device
            if name in texts:
                loaded: Tensor = _packed(texts[name](), parts[name])
            else:
                loaded = given[name]()
            loaded = loaded if where is None else loaded.to(where)
            if loaded.shape != value.shape:
                msg = f"load_packed_: {name!r} is {tuple(loaded.shape)} in the file, {tuple(value.shape)} in the model"
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


def _packed(text: Tensor, parts: Mapping[str, Read]) -> PackedWeight:
    how = json.loads(bytes(text.tolist()))
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
    from safetensors import safe_open

    path = Path(source)
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths:
        msg = f"load_packed_: there is no *.safetensors in {str(path)!r}"
        raise ValueError(msg)
    readers: dict[str, Read] = {}
    for file in paths:
        opened = files.enter_context(safe_open(file, "pt"))
        readers |= {name: partial(opened.get_tensor, name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
    return readers


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _check_names(state: Mapping[str, Any], given: set[str]) -> None:
    """Raises ``ValueError`` if a tensor of the model is not given under any of its names, or one is given that the
    model has not.
    """
    loaded = {id(value) for name, value in state.items() if name in given}
    missing = [name for name, value in state.items() if id(value) not in loaded]
    unknown = sorted(given - state.keys())
    for what, names in (("is missing", missing), ("is given, but the model has none", unknown)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            msg = f"load_packed_: {names[0]!r}{more} {what}; load into the model that was saved"
            raise ValueError(msg)
