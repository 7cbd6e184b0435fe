"""Packed weights as checkpoints that transformers and vLLM load: the layouts of compressed-tensors.

Codes keep their meaning and scales their numbers, so what is loaded is what was packed:

================ ======================= =========================================================================
stored as        layout                  what changes
================ ======================= =========================================================================
int2 … int8      pack-quantized          two's complement + 2^(b−1), low bits first in int32; row or block scales
e2m1 block16 …   nvfp4-pack-quantized    nothing but the scale of scales, which is given as its reciprocal
================ ======================= =========================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.definitions import short_names
from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.quantize.reference import decode, unpack

from .checkpoint import packed_state_dict
from .pack import packed_weights
from .weight import PackedWeight

__all__ = ["LAYOUTS", "export"]

LAYOUTS = ("compressed-tensors",)


@dataclass(frozen=True)
class _Layout:
    """How the weights of one quantizer are written.

    Attributes:
        format: what compressed-tensors calls it. weights: its arguments of a scheme. tensors: of a packed weight, by
        the names that take the place of ``weight``.
    """

    format: str
    weights: dict[str, Any]
    tensors: Callable[[PackedWeight], dict[str, Tensor]]


def export(model: nn.Module, path: str | Path, layout: str = "compressed-tensors") -> float:
    """Write a transformers model with packed weights to a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Every weight is read back from what is to be written, and compared with what it decodes to here. Scales of integers
    are written in the model's dtype, in which loaders compute: exact for float32, rounded for 16 bits.

    Args:
        model: a ``PreTrainedModel`` without adapters.
        path: of the folder; made if it is not there.
        layout: ``"compressed-tensors"``.

    Returns the largest difference of a weight, relative to its layer's maximum. Raises ``ValueError`` for a difference
    that rounding scales does not explain, another layout, a model that has no ``config``, and weights that are stored
    in several ways or in one that the layout does not have; nothing is written then.
    """
    if layout not in LAYOUTS:
        msg = f"export: layout={layout!r} is not one of {', '.join(LAYOUTS)}"
        raise ValueError(msg)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        msg = f"export: a {type(model).__name__} has no config to write; give a transformers model"
        raise ValueError(msg)
    packed = dict(packed_weights(model))
    specs = sorted({weight.spec for weight in packed.values()})
    if len(specs) != 1:
        found = " and ".join(map(short_names, specs)) or "no packed weights"
        msg = f"export: a checkpoint has one way to store weights, the model has {found}; pack_ all alike"
        raise ValueError(msg)
    for name, weight in packed.items():
        if weight.transposed:
            msg = f"export: layer {name!r} is no nn.Linear, which is all that the layout has; leave it out of pack_"
            raise ValueError(msg)
    how = _layout_of(next(iter(packed.values())))
    error = 0.0
    state = {name: tensor for name, tensor in packed_state_dict(model).items() if not _is_part(name, packed)}
    for name, weight in packed.items():
        tensors = how.tensors(weight)
        error = max(error, _difference(name, weight, tensors, how))
        state |= {f"{name}.{key}": tensor for key, tensor in tensors.items()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    wide = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    scheme = {"targets": ["Linear"], "weights": how.weights, "input_activations": None, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors", "format": how.format, "quantization_status": "compressed",
        "config_groups": {"group_0": scheme}, "ignore": wide,
    }  # fmt: skip
    text = json.dumps(config.to_dict() | {"quantization_config": quantization}, indent=2, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    return error


def _is_part(name: str, packed: dict[str, PackedWeight]) -> bool:
    layer, separator, _ = name.rpartition(".weight.")
    return bool(separator) and layer in packed


def _layout_of(weight: PackedWeight) -> _Layout:
    q, block = weight.stored.quantizer, weight.stored.quantizer.granularity
    integers = q.format.name.startswith("int") and q.format.bits in (2, 4, 8) and not q.scale.two_level
    plain = not weight.stored.nested and not weight.stored.zeros  # compressed-tensors' zeros are integers
    if plain and integers and q.scale.storage == "float32" and block.kind in ("row", "block"):
        grouped = {"strategy": "group", "group_size": block.size} if block.kind == "block" else {"strategy": "channel"}
        arguments = {"num_bits": q.format.bits, "type": "int", "symmetric": True, "dynamic": False, **grouped}
        return _Layout("pack-quantized", arguments, _integers)
    if plain and str(Quantizer(q.format, block, q.scale)).startswith("e2m1 block16 e4m3 "):
        arguments = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor_group",
                     "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}  # fmt: skip
        return _Layout("nvfp4-pack-quantized", arguments, _nvfp4)
    msg = (
        f"export: compressed-tensors has no layout for weights stored as {short_names(weight.spec)!r}; it has "
        "'int4 block<n>', 'int8 row' and other int2, int4 and int8, and 'e2m1 block16 e4m3'"
    )
    raise ValueError(msg)


def _integers(weight: PackedWeight) -> dict[str, Tensor]:
    """Integers + 2^(b−1), as many as an int32 holds, the first in its low bits."""
    fmt, size = weight.stored.quantizer.format, int(weight.size_contracted)
    levels = decode(unpack(weight.codes, fmt.bits, size), fmt).to(torch.int64) + 2 ** (fmt.bits - 1)
    per_word = 32 // fmt.bits
    levels = nn.functional.pad(levels, (0, -size % per_word)).unflatten(-1, (-1, per_word))
    words = (levels << (fmt.bits * torch.arange(per_word, device=levels.device))).sum(-1)
    return {
        "weight_packed": (words - (words >= 2**31).long() * 2**32).to(torch.int32),
        "weight_scale": weight.scales.to(weight.dtype),
        "weight_shape": torch.tensor([weight.codes.shape[0], size]),
    }


def _nvfp4(weight: PackedWeight) -> dict[str, Tensor]:
    return {
        "weight_packed": weight.codes,
        "weight_scale": weight.scales,
        "weight_global_scale": weight.global_scale.reciprocal().reshape(1),
    }


def _difference(name: str, weight: PackedWeight, tensors: dict[str, Tensor], how: _Layout) -> float:
    """How far what a loader gets is from what is packed, relative to the maximum. Raises ``ValueError`` for more than
    two roundings to the weight's dtype, of a scale and of a product.
    """
    read, expected = _read(tensors, how, weight.dtype), weight.decoded()
    scale = expected.float().abs().amax()
    error = float((read.float() - expected.float()).abs().amax() / scale.clamp(min=torch.finfo(torch.float32).tiny))
    if error > 2 * torch.finfo(weight.dtype).eps:
        msg = f"export: layer {name!r} would be read {error:.1e} away from what is packed, relative to its maximum"
        raise ValueError(msg)
    return error


def _read(tensors: dict[str, Tensor], how: _Layout, dtype: torch.dtype) -> Tensor:
    """The weight as compressed-tensors decodes it."""
    if how.format == "pack-quantized":
        bits = how.weights["num_bits"]
        shifts = bits * torch.arange(32 // bits, device=tensors["weight_packed"].device)
        values = (tensors["weight_packed"].long()[..., None] >> shifts) & (2**bits - 1)
        levels = values.flatten(-2)[:, : int(tensors["weight_shape"][1])] - 2 ** (bits - 1)
        scales = tensors["weight_scale"]
    else:
        fmt = Quantizer.parse("e2m1").format
        levels = decode(unpack(tensors["weight_packed"], 4, 2 * tensors["weight_packed"].shape[1]), fmt)
        scales = tensors["weight_scale"].float() / tensors["weight_global_scale"]
    spread = scales.repeat_interleave(levels.shape[1] // scales.shape[1], 1)
    return levels.to(dtype) * spread.to(dtype)
