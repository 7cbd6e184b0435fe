"""Weights that torchao has quantized, taken over as they are: nothing is rounded again.

============================ ====================================================== ==================================
torchao's class              made by                                                stored as
============================ ====================================================== ==================================
``NF4Tensor``                ``to_nf4``, ``NF4WeightOnlyConfig``                    ``nf4torchao block64 absmax_bnb``
``Int4Tensor`` (plain)       ``Int4WeightOnlyConfig`` (needs mslk: on GPUs)         ``uint4b8 block<g>; zeros``
``IntxUnpackedToInt8Tensor`` ``IntxWeightOnlyConfig``, 1 to 8 bits, one per byte    ``uint4b8`` or ``uint8b128``
``Int8Tensor``               ``Int8WeightOnlyConfig``, per row or tensor            ``uint8b128 row``
============================ ====================================================== ==================================

Integers are q in two's complement, which stand for scale · (q − zero), or scale · q + zero in ``Int4Tensor``. Where all
zeros are 0 there are none here. A scale that all rows share is repeated, one per row. Layouts for one kernel
(tile-packed, preshuffled, opaque) are not read.

NF4's levels have four decimals in torchao and are in the dtype of the weight, as all of its arithmetic is; a format for
each dtype has those. Its scales of scales decode by a division, through that dtype, so scales are stored decoded: 4.5
bits for torchao's 4.13, and every number is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.formats import FORMATS
from qcompile.ir.stored import Stored
from qcompile.kernels.quantize.reference import swap_halves, unpack

from .layouts import Integers
from .weight import PackedWeight

__all__ = ["fault_of", "is_quantized", "packed_weight"]

#: What a layer's own activations are quantized by, in whichever of the classes has it.
_OF_ACTIVATIONS = ("act_pre_scale", "act_quant_kwargs", "act_quant_scale", "activation_quantization")
_NF4 = "nf4torchao"


def is_quantized(weight: Tensor) -> bool:
    """Whether a weight is of a class of torchao's."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def fault_of(weight: Any) -> str:
    """Why a weight of torchao's cannot be taken over; "" if it can."""
    kind = type(weight).__name__
    if kind not in _READERS:
        return f"torchao's {kind} is not read; those of {', '.join(_READERS)} are"
    if weight.dim() != 2:
        return f"torchao's {kind} has {weight.dim()} axes, not 2"
    of_activations = next((name for name in _OF_ACTIVATIONS if getattr(weight, name, None) is not None), "")
    if of_activations or getattr(weight, "activation_dtype", torch.bfloat16) == torch.float8_e4m3fn:
        return f"torchao's {kind} also quantizes activations ({of_activations or 'activation_dtype'})"
    block = [1, weight.block_size] if kind == "NF4Tensor" else list(weight.block_size)
    size = "×".join(map(str, block))
    if block[0] != 1 and (_READERS[kind] is not _int8 or block[0] != weight.shape[0]):
        return f"torchao's {kind} has blocks of {size}: {block[0]} of {weight.shape[0]} rows share a scale"
    if weight.shape[1] % block[1]:
        return f"torchao's {kind} has blocks of {size}, which do not divide rows of {weight.shape[1]}"
    if kind == "NF4Tensor" and not weight.is_contiguous():
        return f"torchao's {kind} is transposed"
    return "" if kind != "NF4Tensor" or _format_of(weight.nf4) else "its table is none that torchao's NF4Tensor has"


def packed_weight(weight: Any) -> PackedWeight:
    """Of a weight ``[N, K]`` of torchao's without fault, with its dtype."""
    return _READERS[type(weight).__name__](weight)


def _nf4(weight: Any) -> PackedWeight:
    rows, size = weight.shape
    scales = weight.dequantize_scalers(
        weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size
    )  # in the dtype of the weight
    parts = {
        "codes": swap_halves(weight.quantized_data).view(rows, -1),
        "scales": scales.float().view(rows, -1),
    }
    spec = Stored.parse(f"{_format_of(weight.nf4)} block{weight.block_size} absmax_bnb")
    return PackedWeight(parts, str(spec), size, weight.dtype)


def _format_of(table: Tensor) -> str:
    """The format whose levels are a table of 16; "" if there is none."""
    levels = tuple(table.float().tolist())
    return next((name for name, fmt in FORMATS.items() if name.startswith(_NF4) and fmt.codebook == levels), "")


def _int4(weight: Any) -> PackedWeight:
    # The other sign bit makes q + 8 of q in two's complement.
    u = unpack(weight.qdata.view(torch.uint8) ^ 0x88, 4, weight.shape[1])
    return Integers(4).weight(u, weight.scale.t(), weight.dtype, weight.zero_point.t())


def _int8(weight: Any) -> PackedWeight:
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    integers = Integers(4 if bits <= 4 else 8)
    u = (weight.qdata.to(torch.int16) + integers.zero).to(torch.uint8)
    rows, size = weight.shape
    shape = (rows // weight.block_size[0], size // weight.block_size[1])
    scales = weight.scale.view(shape).expand(rows, -1)
    zeros = torch.zeros_like(scales) if weight.zero_point is None else weight.zero_point.view(shape).float()
    return integers.weight(u, scales, weight.dtype, -zeros * scales.float())


_READERS: dict[str, Callable[[Any], PackedWeight]] = {
    "NF4Tensor": _nf4,
    "Int4Tensor": _int4,
    "IntxUnpackedToInt8Tensor": _int8,
    "Int8Tensor": _int8,
}
