"""How others lay quantized weights out in files, bit by bit: what can be said so, how it is written, read and decoded.

A layout is data: widths, blocks, the types of its tensors. Its ``decode`` restates in plain torch what the loaders of
that layout compute, in the dtype they compute it in, which is what an export is compared with.

====================== =============================================================== ==============================
layout                 tensors of a layer, weight [N, K]                               value
====================== =============================================================== ==============================
pack-quantized         weight_packed int32 [N, ⌈K·b/32⌉], weight_scale [N, K/g],       (u − 2^(b−1)) · scale
                       weight_shape int64 [2]; asymmetric, read only:                  (u − zero) · scale
                       weight_zero_point int32 [⌈N·b/32⌉, K/g]
nvfp4-pack-quantized   weight_packed uint8 [N, K/2], weight_scale E4M3 [N, K/16],      e2m1 · (scale / global)
                       weight_global_scale float32 [1]
mxfp4-pack-quantized   weight_packed uint8 [N, K/2], weight_scale E8M0 uint8 [N, K/32] e2m1 · 2^(scale − 127)
bitsandbytes           weight uint8 [N·K/2, 1], first code in the high half;           map[code] · absmax
                       weight.absmax, weight.quant_map, weight.quant_state.…;
                       absmax in 8 bits: weight.nested_absmax, weight.nested_quant_map
gptq                   qweight int32 [K·b/32, N], scales [K/g, N],                     (u − zero) · scale
                       qzeros int32 [K/g, N·b/32] (v1: zero − 1), g_idx int32 [K]
awq (read only)        qweight int32 [K, N/8], scales [K/g, N],                        (u − zero) · scale
                       qzeros int32 [K/g, N/8]; columns interleaved by eight
mxfp4 (read only)      blocks uint8 [E, N, K/32, 16], scales E8M0 uint8 [E, N, K/32]:  e2m1 · 2^(scale − 127)
                       gpt-oss's experts, [E, K, N] in transformers
====================== =============================================================== ==============================

Integers of b bits are a stream: element i is bits i·b to (i+1)·b of a row, the lowest first, in little-endian words.
"""

from __future__ import annotations

import json
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.definitions import short_name, short_names
from qcompile.ir.formats import Format
from qcompile.ir.nested import BITSANDBYTES, BITSANDBYTES_FORMATS
from qcompile.ir.quantizer import SCALE_RULES, Granularity, Quantizer
from qcompile.ir.stored import Stored
from qcompile.kernels.quantize.nested import CodedScales, dequantize_scales
from qcompile.kernels.quantize.reference import load_scale, pack, swap_halves, unpack

from .weight import PackedWeight

__all__ = [
    "BITSANDBYTES_TYPES",
    "FLOATS",
    "Awq",
    "BitsAndBytes",
    "Gptq",
    "Integers",
    "Layout",
    "Mxfp4Experts",
    "PackedFloats",
    "PackedIntegers",
    "pack_words",
    "reciprocal",
    "settled",
    "unpack_words",
]

Tensors = dict[str, Tensor]
Read = Mapping[str, Tensor]
Combine = Callable[[Tensor, Tensor], Tensor]

#: Elements whose codes are written together: any number of bits makes whole bytes of them, at most 8.
_TOGETHER = 8
#: Bits of a word.
_WORD = 32


def words_of(size: int, bits: int) -> int:
    """How many words hold ``size`` integers of ``bits``."""
    return -(-size * bits // _WORD)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """int32 ``[..., ⌈n·bits/32⌉]``: the lowest ``bits`` of uint8 ``[..., n]`` as a stream."""
    size = values.shape[-1]
    values = torch.nn.functional.pad(values, (0, -size % _TOGETHER)).unflatten(-1, (-1, _TOGETHER))
    joined = values[..., 0].long()
    for i in range(1, _TOGETHER):
        joined |= values[..., i].long() << (bits * i)
    stream = joined.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    length = words_of(size, bits) * (_WORD // 8)
    stream = torch.nn.functional.pad(stream, (0, max(length - stream.shape[-1], 0)))[..., :length]
    return stream.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, size: int) -> Tensor:
    """uint8 ``[..., size]``: the inverse of :func:`pack_words`. Raises ``ValueError`` for another number of words."""
    stream = words.contiguous().view(torch.uint8)
    if stream.shape[-1] != (length := words_of(size, bits) * (_WORD // 8)):
        msg = f"{size} integers of {bits} bits take {length} bytes, not {stream.shape[-1]}"
        raise ValueError(msg)
    groups = -(-size // _TOGETHER)
    stream = torch.nn.functional.pad(stream, (0, max(groups * bits - stream.shape[-1], 0)))[..., : groups * bits]
    stream = torch.nn.functional.pad(stream.unflatten(-1, (groups, bits)), (0, 8 - bits))
    joined = stream.contiguous().view(torch.int64).squeeze(-1)
    values = [((joined >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(_TOGETHER)]
    return torch.stack(values, -1).flatten(-2)[..., :size]


def float_scales(weight: PackedWeight) -> Tensor:
    """The float32 scales of a packed weight, as its quantizer shapes them, whatever they are stored as."""
    stored, parts = weight.stored, weight.parts
    q = stored.quantizer
    if stored.nested is None:
        return load_scale(parts["scales"], q, parts.get("global_scale"))
    rows = parts["codes"].shape[:-1]
    shape = torch.Size(q.scale_shape((*rows, weight.size_contracted)))
    return dequantize_scales(
        CodedScales(parts["scale_codes"], parts["second"], parts.get("offset"), shape), stored.nested
    )


def codes_of(weight: PackedWeight) -> Tensor:
    """uint8 ``[N, K]``, one code per element."""
    return unpack(weight.parts["codes"], weight.stored.quantizer.format.bits, weight.size_contracted)


def _expect(tensors: Read, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ``ValueError`` naming the first tensor of ``shapes`` that is missing or has another shape."""
    for suffix, shape in shapes.items():
        if suffix not in tensors:
            msg = f"it has no tensor {suffix!r}"
            raise ValueError(msg)
        if (given := tuple(tensors[suffix].shape)) != shape:
            msg = f"its tensor {suffix!r} is {given}, not {shape}"
            raise ValueError(msg)


def _blocks(size: int, block: Granularity) -> int:
    """How many blocks a row of ``size`` elements has. One that is longer than a row is the row.

    Raises ``ValueError`` if blocks do not divide rows.
    """
    if block.kind != "block" or block.size >= size:
        return 1
    if size % block.size:
        msg = f"K = {size} is no multiple of its blocks of {block.size}"
        raise ValueError(msg)
    return size // block.size


class Readable(ABC):
    """A layout that is read. Tensors are given by suffix, which is what follows the layer's name and a dot."""

    name: str

    def __str__(self) -> str:
        """As messages call it."""
        return self.name

    @abstractmethod
    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        """The packed weight ``[…, N, K]`` of ``shape`` that decodes to the same numbers. Raises ``ValueError`` for what
        we have no word for.
        """


class Layout(Readable):
    """One that is written as well."""

    @abstractmethod
    def fault(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> str:
        """Why a weight ``[N, K]`` stored so cannot be said in this layout, and what to do; "" if it can."""

    def nearest(self, weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        """The weight itself if this layout has its scales, which may be limited to ``dtype``, else one with scales that
        it has.
        """
        return weight

    @abstractmethod
    def write(self, weight: PackedWeight, dtype: torch.dtype) -> Tensors:
        """Tensors by suffix, of a weight without fault, for a model of ``dtype``."""

    @abstractmethod
    def decode(self, tensors: Read, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """``[N, K]`` as the loaders of this layout compute it in a model of ``dtype``."""


# --- integers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Integers:
    """Codes as integers around 2^(bits − 1), which is zero: u = level · factor + 2^(bits − 1)."""

    bits: int

    @property
    def zero(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def readable(self) -> bool:
        """Whether we have a format whose codes these are."""
        return self.bits in _UNSIGNED

    def factor(self, fmt: Format) -> int:
        """The smallest factor that makes integers of all levels, if they fit; else 0."""
        if fmt.grids:
            return 0
        for factor in (1, 2, 4):
            values = [level * factor for level in fmt.levels]
            if all(value == int(value) and -self.zero <= value < self.zero for value in values):
                return factor
        return 0

    def fault(self, stored: Stored) -> str:
        """Why these integers do not hold what is stored; "" if they do."""
        fmt, block = stored.quantizer.format, stored.quantizer.granularity
        if block.kind == "square":
            return f"a scale per {block} is shared by rows; use block{block.size}"
        if self.factor(fmt):
            return ""
        name = short_names(fmt.name)
        wider = next((b for b in range(self.bits + 1, 9) if Integers(b).factor(fmt)), 0)
        if not wider:
            return f"the levels of {name} are no integers times a scale"
        return (
            f"no integers of {self.bits} bits are the levels of {name} times a factor, those of {wider} bits are; "
            f"bits={wider} or bits=8 writes the same numbers so"
        )

    def of(self, weight: PackedWeight) -> Tensor:
        """u, uint8 ``[N, K]``."""
        fmt = weight.stored.quantizer.format
        table = torch.tensor([int(level * self.factor(fmt)) + self.zero for level in fmt.levels], dtype=torch.uint8)
        codes = codes_of(weight)
        return table.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)

    def scales(self, weight: PackedWeight) -> Tensor:
        """float32 ``[N, blocks]``."""
        scales = float_scales(weight) / self.factor(weight.stored.quantizer.format)
        rows = weight.parts["codes"].shape[0]
        return scales.expand(rows, -1)

    def nearest(self, weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        """The same codes with scales that are numbers of ``dtype``; the weight itself if they are."""
        scales = float_scales(weight)
        rounded = scales.to(dtype).float()
        if torch.equal(rounded, scales):
            return weight
        quantizer = replace(weight.stored.quantizer, scale=SCALE_RULES["absmax"])
        parts = {"codes": weight.parts["codes"], "scales": rounded}
        return PackedWeight(parts, str(quantizer), weight.size_contracted, weight.dtype, weight.transposed)

    def values(self, u: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """``[N, K]``: what a loader makes of u and ``scales`` ``[N, blocks]`` in a model of ``dtype``."""
        value = u.to(torch.int16).sub_(self.zero).to(dtype).unflatten(-1, (scales.shape[-1], -1))
        return (value * scales.to(dtype).unsqueeze(-1)).flatten(-2)

    def weight(self, u: Tensor, scales: Tensor, dtype: torch.dtype, zeros: Tensor | None = None) -> PackedWeight:
        """The packed weight scale · (u − 2^(bits − 1)) + zero, of uint8 u ``[N, K]``, and ``scales`` and ``zeros``
        ``[N, blocks]``. Zeros that are all 0 are left out.
        """
        size = u.shape[-1]
        block = "row" if scales.shape[-1] == 1 else f"block{size // scales.shape[-1]}"
        stored = Stored(
            Quantizer.parse(f"{_UNSIGNED[self.bits]} {block}"), zeros=zeros is not None and bool(zeros.any())
        )
        parts = {"codes": pack(u, self.bits), "scales": scales.float().contiguous()}
        if stored.zeros:
            assert zeros is not None
            parts["zeros"] = zeros.float().contiguous()
        return PackedWeight(parts, str(stored), size, dtype)

    def weight_of_zeros(self, u: Tensor, zeros: Tensor, scales: Tensor, dtype: torch.dtype) -> PackedWeight:
        """(u − zero) · scale with integers for zeros.

        With scales of 16 bits its two terms are float32 numbers, and so is their sum: it is what a loader has that
        multiplies u − zero by the scale and rounds once.
        """
        return self.weight(u, scales, dtype, (self.zero - zeros.float()) * scales.float())


#: Bits → the format whose code is u: level u − 2^(bits − 1).
_UNSIGNED = {4: "uint4b8", 8: "uint8b128"}


_ROW = Granularity("row")


@dataclass(frozen=True)
class _IntegerLayout(Layout):
    """One that holds integers of ``bits``; ``block`` is what shares a scale in weights that are read."""

    bits: int
    block: Granularity = _ROW

    def __str__(self) -> str:
        return f"{self.name} {self.block} of {self.bits} bits"

    @property
    def integers(self) -> Integers:
        return Integers(self.bits)

    def fault(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> str:
        return self.integers.fault(stored)

    def nearest(self, weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        return self.integers.nearest(weight, dtype)


@dataclass(frozen=True)
class PackedIntegers(_IntegerLayout):
    """compressed-tensors' ``pack-quantized``; asymmetric weights, with ``weight_zero_point``, are read."""

    name = "pack-quantized"

    def write(self, weight: PackedWeight, dtype: torch.dtype) -> Tensors:
        return {
            "weight_packed": pack_words(self.integers.of(weight), self.bits),
            "weight_scale": self.integers.scales(weight).to(dtype).contiguous(),
            "weight_shape": torch.tensor([weight.parts["codes"].shape[0], weight.size_contracted]),
        }

    def decode(self, tensors: Read, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        u = unpack_words(tensors["weight_packed"], self.bits, shape[1])
        return self.integers.values(u, tensors["weight_scale"], dtype)

    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        rows, size = shape
        blocks = _blocks(size, self.block)
        scale_shape = (1,) if self.block.kind == "tensor" else (rows, blocks)
        packed_shape = (rows, words_of(size, self.bits))
        _expect(tensors, {"weight_shape": (2,), "weight_packed": packed_shape, "weight_scale": scale_shape})
        if (given := tuple(tensors["weight_shape"].tolist())) != shape:
            msg = f"its 'weight_shape' says {given}"
            raise ValueError(msg)
        u = unpack_words(tensors["weight_packed"], self.bits, size)
        scales = tensors["weight_scale"].expand(rows, blocks)
        if (words := tensors.get("weight_zero_point")) is None:
            return self.integers.weight(u, scales, dtype)
        _expect(tensors, {"weight_zero_point": (words_of(rows, self.bits), blocks)})
        zeros = unpack_words(words.t(), self.bits, rows).t()  # words run along N
        return self.integers.weight_of_zeros(u, zeros, scales, dtype)

    def scheme(self, stored: Stored) -> dict[str, Any]:
        block = stored.quantizer.granularity
        groups = {"strategy": "group", "group_size": block.size} if block.kind == "block" else {"strategy": "channel"}
        return {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **groups}


# --- E2M1 in blocks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedFloats(Layout):
    """compressed-tensors' ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``: our bytes as they are.

    Its decoder computes in bfloat16, so the model has to.
    """

    name: str
    quantizer: Quantizer
    strategy: str

    @property
    def two_level(self) -> bool:
        return self.quantizer.scale.two_level

    def holds(self, stored: Stored) -> bool:
        """Whether codes and scales are those of this layout, however the scales were found."""
        q, own = stored.quantizer, self.quantizer
        scale = (q.scale.store, q.scale.two_level) == (own.scale.store, own.scale.two_level)
        return scale and (q.format, q.granularity) == (own.format, own.granularity)

    def fault(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> str:
        if not self.holds(stored):
            return f"{self.name} holds {short_names(str(self.quantizer))!r}"
        if dtype != torch.bfloat16:
            return f"{self.name} is decoded in bfloat16, and the model is {_name(dtype)}; give dtype=torch.bfloat16"
        return ""

    def nearest(self, weight: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        if not self.two_level or self._divisor(weight, dtype) is not None:
            return weight
        parts = weight.parts | {"global_scale": settled(weight.parts["global_scale"])}
        return PackedWeight(parts, weight.spec, weight.size_contracted, weight.dtype, weight.transposed)

    def write(self, weight: PackedWeight, dtype: torch.dtype) -> Tensors:
        parts = weight.parts
        tensors = {"weight_packed": parts["codes"], "weight_scale": parts["scales"]}
        if self.two_level:
            divisor = self._divisor(weight, dtype)
            tensors["weight_global_scale"] = (1 / parts["global_scale"]).view(1) if divisor is None else divisor
        return tensors

    def _divisor(self, weight: PackedWeight, dtype: torch.dtype) -> Tensor | None:
        return reciprocal(weight.parts["global_scale"], self.quantizer.format, dtype, _OURS, _THEIRS)

    def decode(self, tensors: Read, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        fmt = self.quantizer.format
        codes = unpack(tensors["weight_packed"], fmt.bits, shape[1])
        levels = torch.tensor(fmt.levels).index_select(0, codes.flatten().int()).view(codes.shape)
        scales = load_scale(tensors["weight_scale"], self.quantizer, *([torch.ones(())] if self.two_level else []))
        if self.two_level:
            scales = scales / tensors["weight_global_scale"]
        return (levels.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2).to(dtype)

    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        rows, size = shape
        packed_shape = (rows, -(-size * self.quantizer.format.bits // 8))
        scale_shape = (rows, _blocks(size, self.quantizer.granularity))
        _expect(tensors, {"weight_packed": packed_shape, "weight_scale": scale_shape})
        parts = {"codes": tensors["weight_packed"], "scales": tensors["weight_scale"]}
        if self.two_level:
            _expect(tensors, {"weight_global_scale": (1,)})
            number = tensors["weight_global_scale"].float()
            factor = reciprocal(number, self.quantizer.format, dtype, _THEIRS, _OURS)
            # Without one, products halfway between two numbers of the dtype may round to the other.
            parts["global_scale"] = (1 / number if factor is None else factor).view(())
        return PackedWeight(parts, str(Stored(self.quantizer)), size, dtype)

    def scheme(self, stored: Stored) -> dict[str, Any]:
        size = self.quantizer.granularity.size
        return {
            "num_bits": self.quantizer.format.bits, "type": "float", "symmetric": True, "dynamic": False,
            "strategy": self.strategy, "group_size": size, "scale_dtype": f"torch.{self.quantizer.scale.storage}",
        }  # fmt: skip


FLOATS = (
    PackedFloats("nvfp4-pack-quantized", Quantizer.parse("e2m1 block16 e4m3"), "tensor_group"),
    PackedFloats("mxfp4-pack-quantized", Quantizer.parse("e2m1 block32 e8m0"), "group"),
)


#: What a scale of a block and a global one make: ours is a factor, compressed-tensors' a divisor.
_OURS, _THEIRS = operator.mul, operator.truediv


def reciprocal(number: Tensor, fmt: Format, dtype: torch.dtype, given: Combine, sought: Combine) -> Tensor | None:
    """float32 ``[1]``: 1 / ``number``, or the number above or below: that one with which ``sought`` makes of all E4M3
    scales what ``given`` makes of them with ``number``, once they are multiplied by a level and rounded to ``dtype``.
    ``None`` if there is none.
    """
    scales = torch.arange(127, dtype=torch.uint8, device=number.device).view(torch.float8_e4m3fn).float()
    levels = torch.tensor(fmt.magnitudes, device=number.device).unsqueeze(-1)
    meant = (levels * given(scales, number)).to(dtype)
    nearest = (1 / number.float()).view(1)
    infinity = torch.full_like(nearest, float("inf"))
    near = (nearest, *(torch.nextafter(nearest, towards) for towards in (infinity, -infinity)))
    return next((other for other in near if torch.equal((levels * sought(scales, other)).to(dtype), meant)), None)


#: Bits of a settled number.
_SETTLED = 20


def settled(scale: Tensor) -> Tensor:
    """A global scale within 2⁻¹⁹ of ``scale`` with 20 bits, of which the last one is set.

    Its products with a level and a scale are never halfway between two numbers of bfloat16, where multiplying by it and
    dividing by its reciprocal, each rounded, go different ways. Those of amax/2688 and amax/1536 often are: one tensor
    in a hundred has such a product in NVFP4, one in twelve with Four over Six.
    """
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2 ** (_SETTLED - 1)).floor() * 2 + 1, exponent - _SETTLED)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- bitsandbytes ---------------------------------------------------------------------------------------------------

#: Our format → bitsandbytes' ``quant_type``.
BITSANDBYTES_TYPES = {ours: theirs for theirs, ours in BITSANDBYTES_FORMATS.items()}
#: Blocks it has kernels for.
_BNB_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class BitsAndBytes(Layout):
    """``bitsandbytes.nn.Linear4bit`` as transformers saves it."""

    name = "bitsandbytes"

    def fault(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> str:
        q, block = stored.quantizer, stored.quantizer.granularity
        if q.format.name not in BITSANDBYTES_TYPES:
            return f"bitsandbytes has {' and '.join(BITSANDBYTES_TYPES)}, not {short_names(q.format.name)}"
        if block.kind != "block" or block.size not in _BNB_BLOCKS:
            return f"bitsandbytes has blocks of {', '.join(map(str, _BNB_BLOCKS))}, not {block}"
        if q.scale.storage != "float32" or q.scale.two_level:
            return f"bitsandbytes has float32 scales or nested ones, not those of {short_name(q.scale.name)}"
        if stored.nested not in (None, BITSANDBYTES):
            return f"bitsandbytes nests scales as 'nested' does, not as 'nested({stored.nested})'"
        return ""

    def write(self, weight: PackedWeight, dtype: torch.dtype) -> Tensors:
        stored, parts = weight.stored, weight.parts
        q = stored.quantizer
        kind = BITSANDBYTES_TYPES[q.format.name]
        rows, size = parts["codes"].shape[0], weight.size_contracted
        state = {
            "quant_type": kind, "blocksize": q.granularity.size, "dtype": _name(dtype), "shape": [rows, size],
        }  # fmt: skip
        tensors = {
            "weight": swap_halves(parts["codes"]).view(-1, 1),
            "weight.quant_map": torch.tensor(q.format.levels),
        }
        if stored.nested is None:
            tensors["weight.absmax"] = (parts["scales"] * q.format.max).flatten()
        else:
            inner = stored.nested.quantizer
            tensors["weight.absmax"] = parts["scale_codes"]
            tensors["weight.nested_absmax"] = parts["second"]
            tensors["weight.nested_quant_map"] = torch.tensor(inner.format.levels)
            state["nested_blocksize"] = inner.granularity.size
            state["nested_dtype"] = "float32"
            state["nested_offset"] = float(parts["offset"])
        tensors[f"weight.{_STATE}{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return tensors

    def decode(self, tensors: Read, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        _, state = bnb_state(tensors)
        absmax = tensors["weight.absmax"]
        if "nested_offset" in state:
            second = tensors["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
            level = tensors["weight.nested_quant_map"].index_select(0, absmax.int())
            absmax = level * second + torch.tensor(state["nested_offset"])
        codes = unpack(swap_halves(tensors["weight"]).flatten(), 4, shape[0] * shape[1])
        level = tensors["weight.quant_map"].index_select(0, codes.int())
        return (level.view(-1, state["blocksize"]) * absmax.unsqueeze(-1)).to(dtype).view(shape)

    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        kind, state = bnb_state(tensors)
        (rows, size), block = shape, state["blocksize"]
        if size % block:
            msg = f"K = {size} is no multiple of its blocks of {block}, which run through rows"
            raise ValueError(msg)
        scales = rows * size // block
        _expect(tensors, {"weight": (rows * size // 2, 1), "weight.absmax": (scales,)})
        if (given := tuple(state["shape"])) != shape:
            msg = f"its quant_state says that the weight is {given}"
            raise ValueError(msg)
        parts = {"codes": swap_halves(tensors["weight"]).view(rows, -1)}
        nested = "nested_offset" in state
        if nested:
            together = BITSANDBYTES.quantizer.granularity.size
            if state["nested_blocksize"] != together:
                msg = f"{state['nested_blocksize']} of its scales share a scale; {together} are understood"
                raise ValueError(msg)
            _expect(tensors, {"weight.nested_absmax": (-(-scales // together),)})
            parts |= {"scale_codes": tensors["weight.absmax"], "second": tensors["weight.nested_absmax"]}
            parts["offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32)
        else:
            parts["scales"] = tensors["weight.absmax"].view(rows, -1)
        return PackedWeight(parts, bnb_spec(kind, block, nested), size, dtype)


_STATE = "quant_state.bitsandbytes__"


def bnb_state(tensors: Read) -> tuple[str, dict[str, Any]]:
    """``quant_type`` and what else bitsandbytes keeps as JSON. Raises ``ValueError`` if that is missing."""
    key = next((key for key in tensors if key.startswith(f"weight.{_STATE}")), "")
    if not key:
        msg = f"it has no tensor 'weight.{_STATE}<quant_type>'"
        raise ValueError(msg)
    return key.removeprefix(f"weight.{_STATE}"), json.loads(bytes(tensors[key].tolist()))


def bnb_spec(kind: str, block: int, nested: bool) -> str:
    """How a weight of bitsandbytes is stored, by its ``quant_type`` and ``blocksize``."""
    return f"{BITSANDBYTES_FORMATS[kind]} block{block} absmax_bnb even{'; nested' if nested else ''}"


# --- GPTQ -----------------------------------------------------------------------------------------------------------


_GPTQ_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Gptq(_IntegerLayout):
    """AutoGPTQ's layout (``checkpoint_format`` "gptq", version 1), no order of activations.

    Words run along K, and along N for zeros, of which 1 is taken off before they are stored. Asymmetric weights are
    read; symmetric ones are written as well. Without ``g_idx`` columns are in order.
    """

    name = "gptq"

    def fault(self, stored: Stored, shape: tuple[int, int], dtype: torch.dtype) -> str:
        if self.bits not in _GPTQ_BITS:
            wider = next(bits for bits in _GPTQ_BITS if bits > self.bits)
            return f"gptq has integers of 2, 4 or 8 bits, not {self.bits}; bits={wider} writes the same numbers"
        per_word = _WORD // self.bits
        if dtype == torch.float32:
            return "gptq has scales in 16 bits, and the model is float32; give dtype=torch.float16"
        if shape[0] % per_word or shape[1] % per_word:
            return f"gptq packs {per_word} rows and columns to a word, which do not divide {shape[0]}×{shape[1]}"
        return super().fault(stored, shape, dtype)

    def write(self, weight: PackedWeight, dtype: torch.dtype) -> Tensors:
        scales = self.integers.scales(weight)
        rows, size = weight.parts["codes"].shape[0], weight.size_contracted
        zeros = torch.full((scales.shape[1], rows), self.integers.zero - 1, dtype=torch.uint8)
        return {
            "qweight": pack_words(self.integers.of(weight), self.bits).t().contiguous(),
            "qzeros": pack_words(zeros, self.bits),
            "scales": scales.t().to(dtype).contiguous(),
            "g_idx": torch.arange(size, dtype=torch.int32) // (size // scales.shape[1]),
        }

    def decode(self, tensors: Read, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        u = unpack_words(tensors["qweight"].t(), self.bits, shape[1])
        return self.integers.values(u, tensors["scales"].t(), dtype)

    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        rows, size = shape
        blocks = _blocks(size, self.block)
        words, scales = {"qweight": (words_of(size, self.bits), rows)}, {"scales": (blocks, rows)}
        _expect(tensors, words | scales | {"qzeros": (blocks, words_of(rows, self.bits))})
        if "g_idx" in tensors:
            _expect(tensors, {"g_idx": (size,)})
            if not torch.equal(tensors["g_idx"].cpu(), torch.arange(size, dtype=torch.int32) // (size // blocks)):
                msg = "its columns are in the order of activations (desc_act), which is not read"
                raise ValueError(msg)
        zeros = unpack_words(tensors["qzeros"], self.bits, rows).short() + 1
        if bool((zeros == 2**self.bits).any()):
            msg = f"a zero is stored as {2**self.bits - 1}, which some loaders take for 0 and some for {2**self.bits}"
            raise ValueError(msg)
        u = unpack_words(tensors["qweight"].t(), self.bits, size)
        return self.integers.weight_of_zeros(u, zeros.t(), tensors["scales"].t(), dtype)


# --- AWQ ------------------------------------------------------------------------------------------------------------

#: Which of eight outputs is in bits 4·i … 4·i + 3 of a word, for i = 0 … 7.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Awq(Readable):
    """AutoAWQ's layout ``version: "gemm"``: asymmetric integers of 4 bits.

    A word holds eight neighbouring *outputs* of one input. Counted from 0, its four lowest bits are those of output 0,
    then come 2, 4, 6, 1, 3, 5 and 7: ``qweight[k, n // 8]`` has output n where :data:`_AWQ_ORDER` has n % 8. Words of
    zeros have the same order. Zeros are stored as they are (GPTQ's are one less), scales in float16.

    ``block`` is what shares a scale, 128 inputs by AutoAWQ's default.
    """

    block: Granularity = _ROW

    name = "awq"
    bits = 4

    def __str__(self) -> str:
        return f"{self.name} {self.block}"

    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        (rows, size), per_word = shape, len(_AWQ_ORDER)
        blocks = _blocks(size, self.block)
        if rows % per_word:
            msg = f"its words have {per_word} outputs, which do not divide N = {rows}"
            raise ValueError(msg)
        shapes = {"qweight": (size, rows // per_word), "qzeros": (blocks, rows // per_word), "scales": (blocks, rows)}
        _expect(tensors, shapes)
        words, zeros, scales = (tensors[suffix] for suffix in shapes)
        u = self._columns(words).t().contiguous()
        return Integers(self.bits).weight_of_zeros(u, self._columns(zeros).t(), scales.t(), dtype)

    def _columns(self, words: Tensor) -> Tensor:
        """uint8 ``[…, N]`` of int32 ``[…, N/8]``."""
        per_word = len(_AWQ_ORDER)
        places = torch.tensor(_AWQ_ORDER, device=words.device).argsort()
        values = unpack_words(words, self.bits, words.shape[-1] * per_word)
        return values.unflatten(-1, (-1, per_word)).index_select(-1, places).flatten(-2)


# --- gpt-oss --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mxfp4Experts(Readable):
    """MXFP4 as gpt-oss has it: our bytes as they are, block by block, for all experts of a layer together."""

    name = "mxfp4"
    quantizer = Quantizer.parse("e2m1 block32 e8m0")

    def read(self, tensors: Read, shape: tuple[int, ...], dtype: torch.dtype) -> PackedWeight:
        experts, rows, size = shape
        block = self.quantizer.granularity.size
        blocks = (experts, rows, _blocks(size, self.quantizer.granularity))
        _expect(tensors, {"blocks": (*blocks, block // 2), "scales": blocks})
        parts = {"codes": tensors["blocks"].flatten(-2), "scales": tensors["scales"]}
        return PackedWeight(parts, str(Stored(self.quantizer)), size, dtype)
