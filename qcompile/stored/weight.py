"""``PackedWeight``: the parameter of an unchanged layer, stored as codes and scales.

To everyone who asks it is a tensor of its outer dtype and shape. Eager torch decodes it in front of whatever reads it.
``torch.compile`` takes it apart into the tensors it is made of, decodes them in the graph, and the passes make products
of that which read codes.

Parts, with a weight ``[..., N, K]`` that the layer contracts along K:

============== ========================================================================================
codes          uint8 ``[..., N, packed(K)]``, the first of two codes of a byte in its low half; bitsandbytes
               has the first one in the high half
scales         as the scale rule stores them, a float32 number each if they are not nested
global_scale   float32 ``[]``, only of two-level rules (NVFP4)
scale_codes    uint8 ``[n]``: codes of the n scales in row-major order, in the place of ``scales`` if nested
second         float32 ``[⌈n / block⌉]``: scales of those
offset         float32 ``[]``: what was taken off the scales
zeros          float32 ``[..., N, ⌈K / block⌉]``, only of specs with zeros: what is added to scale · level of a block
============== ========================================================================================

A layer that keeps its weight the other way round (``[K, N]``, Conv1D) has the same parts, read ``transposed``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import qcompile.kernels  # noqa: F401  (registers the qcompile:: ops)
from qcompile import compat
from qcompile.ir.definitions import short_names
from qcompile.ir.ops import global_scale_of
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.stored import Stored
from qcompile.kernels.quantize.nested import CodedScales, dequantize_scales, quantize_scales

__all__ = ["PARTS", "PackedWeight", "decode", "encode"]

aten = torch.ops.aten

#: All parts there are.
PARTS = ("codes", "scales", "global_scale", "scale_codes", "second", "offset", "zeros")

Parts = dict[str, Tensor]

#: Namespaces of ops that send tensors to other ranks.
_COLLECTIVES = ("c10d", "_c10d_functional")

#: Share of a change that rounding may take before it is said.
NOTICED = 0.01


def encode(weight: Tensor, stored: Stored, global_scale: Tensor | None = None, transform: str = "") -> Parts:
    """The parts of a weight ``[..., N, K]``, floating point; a ``global_scale`` may be given that it shares, and the
    text of a transform that comes before rounding.
    """
    q, zeros = stored.quantizer, None
    if stored.zeros:
        weight, zeros = _centred(weight.float(), q)
    whole = global_scale_of(weight, q) if global_scale is None else global_scale
    codes, scales = torch.ops.qcompile.quantize(weight, str(q), -1, whole, None, None, transform)
    parts = {"codes": codes}
    if stored.nested is None:
        parts["scales"] = scales
    else:
        coded = quantize_scales(scales, stored.nested)
        parts |= {"scale_codes": coded.codes, "second": coded.scales}
        if coded.offset is not None:
            parts["offset"] = coded.offset
    if whole is not None:
        parts["global_scale"] = whole
    if zeros is not None:
        parts["zeros"] = zeros
    return parts


def _centred(weight: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """``weight`` without its zeros, and those: what lets the range of levels begin and end where that of a block does.

    That of levels begins at 0, or is centred; a symmetric scale rule finds the same scale at both ends then.
    """
    lowest, highest = q.format.range
    blocks = weight.unflatten(-1, (q.scale_shape(tuple(weight.shape))[-1], -1))
    smallest, largest = blocks.aminmax(dim=-1, keepdim=True)
    zeros = smallest - (largest - smallest) * (lowest / (highest - lowest))
    return (blocks - zeros).flatten(-2), zeros.squeeze(-1)


def decode(parts: Mapping[str, Tensor], stored: Stored, size: int, dtype: torch.dtype) -> Tensor:
    """The weight ``[..., N, size]`` in ``dtype`` that parts stand for."""
    q, codes = stored.quantizer, parts["codes"]
    scales = _scales(parts, stored, size)
    zeros, inner = parts.get("zeros"), torch.float32 if stored.zeros else dtype
    dense = torch.ops.qcompile.dequantize(codes, scales, str(q), -1, size, inner, parts.get("global_scale"))
    if zeros is None:
        return dense
    return (dense.unflatten(-1, (zeros.shape[-1], -1)) + zeros.unsqueeze(-1)).flatten(-2).to(dtype)


def _scales(parts: Mapping[str, Tensor], stored: Stored, size: int) -> Tensor:
    """Scales as the rule stores them, of rows of ``size`` elements."""
    if stored.nested is None:
        return parts["scales"]
    shape = torch.Size(stored.quantizer.scale_shape((*parts["codes"].shape[:-1], size)))
    coded = CodedScales(parts["scale_codes"], parts["second"], parts.get("offset"), shape)
    return dequantize_scales(coded, stored.nested)


class PackedWeight(Tensor):
    """A weight as codes and scales. It is frozen: what trains beside it is an adapter.

    Reading decodes. Writing in place (``copy_``, ``add_``, ``p.data = …``) decodes, writes, and quantizes again, so it
    rounds; a view that eager torch takes of it (a slice, ``view``) is a decoded copy.

    Attributes:
        spec: text of a :class:`~qcompile.ir.stored.Stored`.
        transposed: whether this is ``[..., K, N]``; parts do not differ.
        layer: name of the layer it was packed for, for messages.
    """

    spec: str
    transposed: bool
    layer: str = ""
    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    scale_codes: Tensor
    second: Tensor
    offset: Tensor
    __torch_function__ = compat.disabled_torch_function  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, parts: Mapping[str, Tensor], spec: str, size: Any, dtype: torch.dtype, transposed: bool = False
    ) -> PackedWeight:
        codes = parts["codes"]
        *batch, rows = codes.shape[:-1]
        shape = [*batch, size, rows] if transposed else [*batch, rows, size]
        return compat.make_wrapper_subclass(cls, shape, dtype, codes.device, swapped=transposed)

    def __init__(
        self, parts: Mapping[str, Tensor], spec: str, size: Any, dtype: torch.dtype, transposed: bool = False
    ) -> None:
        self.spec, self.transposed = spec, transposed
        for name, part in parts.items():
            setattr(self, name, part)

    @classmethod
    def of(
        cls, weight: Tensor, spec: str, transposed: bool = False, global_scale: Tensor | None = None,
        transform: str = "",
    ) -> PackedWeight:  # fmt: skip
        """``weight``, floating point ``[..., N, K]`` (``[..., K, N]`` if ``transposed``), quantized; under a two-level
        rule by a ``global_scale`` that it shares with others, if one is given. After a ``transform`` it stands for what
        was transformed.

        Raises ``ValueError`` if blocks do not divide K, and for a text that is not understood.
        """
        stored = Stored.parse(spec)
        source = weight.detach()
        source = source.mT if transposed else source
        stored.check_size(source.shape[-1])
        with torch.no_grad():
            parts = encode(source, stored, global_scale, transform)
        return cls(parts, str(stored), source.shape[-1], weight.dtype, transposed)

    # --- what it is made of --------------------------------------------------------------------------------------

    @property
    def parts(self) -> Parts:
        return {name: part for name in PARTS if (part := self.__dict__.get(name)) is not None}

    @property
    def stored(self) -> Stored:
        return Stored.parse(self.spec)

    @property
    def total(self) -> int:
        """Rows of the whole weight, of which a shard has some."""
        return self.shape[0]

    def matches(self, other: PackedWeight) -> bool:
        """Whether parts of the other mean the same here."""
        return (self.spec, self.transposed, self.total) == (other.spec, other.transposed, other.total)

    @property
    def size_contracted(self) -> Any:
        """K."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """The plain tensor it stands for."""
        dense = decode(self.parts, self.stored, self.size_contracted, dtype or self.dtype)
        return dense.mT if self.transposed else dense

    def _with(self, parts: Parts, dtype: torch.dtype | None = None, transposed: bool | None = None) -> PackedWeight:
        how = self.transposed if transposed is None else transposed
        made = PackedWeight(parts, self.spec, self.size_contracted, dtype or self.dtype, how)
        made.layer = self.layer
        return made

    def _each(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        return self._with({name: change(part) for name, part in self.parts.items()}, dtype)

    def _store(self, value: Tensor) -> None:
        """Write ``value`` (plain or packed, its shape) into the parts."""
        if isinstance(value, PackedWeight):
            if self.matches(value):
                for name, part in self.parts.items():
                    part.copy_(value.parts[name])
                return
            value = value.decoded()
        source = value.detach().to(self.device).expand(self.shape)
        # Decoding rounds to the outer dtype; a value that fits it is quantized from its own.
        for name, part in encode(source.mT if self.transposed else source, self.stored).items():
            self.parts[name].copy_(part)

    def _change(self, value: Tensor, how: str) -> None:
        """Write ``value``; warn where rounding it takes a part of what it changes."""
        if compat.is_tracing() or self.device.type == "meta":
            self._store(value)
            return
        change = (value - self.decoded()).norm()
        self._store(value)
        lost = float((self.decoded() - value).norm() / change) if change > 0 else 0.0
        if lost > NOTICED:
            warnings.warn(
                f"qcompile: a weight stored as {short_names(self.spec)!r} was changed by {how}: rounding took "
                f"{lost * 100:.0f} % of the change, by norm; to merge adapters exactly, call qcompile.unpack_(model) "
                "first",
                UserWarning,
                stacklevel=3,
            )

    # --- what torch asks for -------------------------------------------------------------------------------------

    def __tensor_flatten__(self) -> tuple[list[str], tuple[str, torch.dtype, bool]]:
        return list(self.parts), (self.spec, self.dtype, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: Parts, context: Any, shape: Sequence[Any], stride: Sequence[Any]) -> PackedWeight:
        spec, dtype, transposed = context
        return PackedWeight(inner, spec, shape[-2 if transposed else -1], dtype, transposed)

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on, for the key of AOTAutograd's cache."""
        parts = [
            (name, str(part.dtype), str(part.device), *part.shape, *part.stride(), part.storage_offset())
            for name, part in self.parts.items()
        ]
        return repr((type(self).__name__, self.spec, str(self.dtype), self.transposed, *self.shape, parts))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in HANDLERS:
            result = HANDLERS[func](func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if func.namespace in _COLLECTIVES:
            weights = (value for value in compat.tree_leaves((args, kwargs)) if isinstance(value, PackedWeight))
            msg = (
                f"layer {next(weights).layer!r}: {func} of a packed weight: codes are gathered, scattered and "
                "broadcast, but never reduced; send its parts, or weight.decoded()"
            )
            raise NotImplementedError(msg)
        dense: dict[int, Tensor] = {}

        def decoded(value: Any) -> Any:
            if not isinstance(value, PackedWeight):
                return value
            if id(value) not in dense:
                dense[id(value)] = value.decoded()
            return dense[id(value)]

        arguments = compat.tree_map(decoded, (args, kwargs))
        result = func(*arguments[0], **arguments[1])
        written = [value for value in _written(func, args, kwargs) if isinstance(value, PackedWeight)]
        for value in written:
            value._change(dense[id(value)], func._schema.name.partition("::")[2])
        names = {id(dense[id(value)]): value for value in written}
        return compat.tree_map(lambda value: names.get(id(value), value), result) if written else result

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        """Raises ``RuntimeError`` for ``True``."""
        if value:
            msg = (
                f"requires_grad=True on a weight stored as {self.spec!r}: packed weights are frozen, since gradients "
                "would be wide and every step would round; train an adapter beside it, or qcompile.unpack_(model) first"
            )
            raise RuntimeError(msg)

    def requires_grad_(self, requires_grad: bool = True) -> PackedWeight:
        self.requires_grad = requires_grad
        return self

    @property
    def data(self) -> PackedWeight:
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        """``p.data = …`` takes the parts of a packed value, with its dtype and device; any other is quantized."""
        if value.shape != self.shape:
            msg = f"data: a weight of shape {tuple(self.shape)} cannot become one of {tuple(value.shape)}"
            raise ValueError(msg)
        if not isinstance(value, PackedWeight):
            packed = self._each(lambda part: part.to(value.device, copy=True), value.dtype)
            packed._change(value, "data = …")
            value = packed
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        for name in PARTS:
            self.__dict__.pop(name, None)
        self.__dict__ |= {"spec": value.spec, "transposed": value.transposed, **value.parts}

    def __get_tensor_shard__(self, index: Any) -> PackedWeight:
        """What ``torch.distributed.checkpoint`` saves and loads into: rows, of which a file may have some."""
        from .sharding import PackedShard, rows_of

        whole = not isinstance(self, PackedShard) and not self.transposed
        return rows_of(self, 0, self.shape[0], owned=True) if whole else self

    def share_memory_(self) -> PackedWeight:
        """Returns another tensor around the same parts, which ``Module.share_memory`` swaps for this one."""
        return self._each(Tensor.share_memory_)

    def is_shared(self) -> bool:
        return all(part.is_shared() for part in self.parts.values())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        size = "×".join(map(str, self.shape))
        return f"{type(self).__name__}({size} {str(self.dtype).removeprefix('torch.')} on {self.device}, {self.spec!r})"


torch.serialization.add_safe_globals([PackedWeight])


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments of a call that it writes to."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    return [
        given[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
    ]


# --- what stays packed ----------------------------------------------------------------------------------------------


def _same(func: Any, weight: PackedWeight, *_: Any, **__: Any) -> PackedWeight:
    return weight._with(weight.parts)


def _clone(func: Any, weight: PackedWeight, *_: Any, **__: Any) -> PackedWeight:
    return weight._each(torch.clone)


def _swapped(func: Any, weight: PackedWeight, *axes: Any) -> Any:
    """``t``, ``transpose`` and ``permute``, as far as they swap the last two axes or none."""
    last = list(range(weight.dim()))
    order = list(axes[0]) if func is aten.permute.default else last[:]
    if func is aten.transpose.int:
        first, second = (axis % weight.dim() for axis in axes)
        order[first], order[second] = second, first
    elif func is aten.t.default:
        order = [1, 0]
    order = [axis % weight.dim() for axis in order]
    if order == last:
        return weight._with(weight.parts)
    if order == [*last[:-2], last[-1], last[-2]]:
        return weight._with(weight.parts, transposed=not weight.transposed)
    return NotImplemented


def _to_copy(func: Any, weight: PackedWeight, *, dtype: Any = None, device: Any = None, **rest: Any) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    blocking = {"non_blocking": rest.get("non_blocking", False)}
    return weight._each(lambda part: aten._to_copy.default(part, device=device, **blocking), dtype)


def _empty_like(func: Any, weight: PackedWeight, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
    return weight._each(lambda part: torch.empty_like(part, device=device), dtype)


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Into a packed weight, out of one, or both."""
    if isinstance(target, PackedWeight):
        if not _stands_for(target, source):
            target._store(source)
    else:
        target.copy_(source.decoded(), non_blocking)  # type: ignore[attr-defined]
    return target


def _stands_for(weight: PackedWeight, value: Tensor) -> bool:
    """Whether writing a wide value would change nothing: DDP writes back what it has broadcast. Quantized once more,
    nested scales would be others.
    """
    if isinstance(value, PackedWeight) or compat.is_tracing() or weight.device.type == "meta":
        return False
    same = (value.shape, value.dtype, value.device) == (weight.shape, weight.dtype, weight.device)
    return same and torch.equal(value, weight.decoded())


def same_shape(func: Any, weight: PackedWeight, shape: Sequence[Any]) -> Any:
    return _same(func, weight) if list(shape) == list(weight.shape) else NotImplemented


def _taken(weight: PackedWeight, take: Callable[[Tensor], Tensor]) -> tuple[Parts, Stored]:
    """What ``take`` takes of every part along the first axis, and how that is stored.

    Nested scales are decoded: those of several rows share a scale.
    """
    stored, parts = weight.stored, weight.parts
    if stored.nested is not None:
        parts = {name: part for name, part in parts.items() if name not in ("scale_codes", "second", "offset")}
        parts["scales"] = _scales(weight.parts, stored, weight.size_contracted)
    taken = {name: part if name == "global_scale" else take(part) for name, part in parts.items()}
    return taken, Stored(stored.quantizer, zeros=stored.zeros)


def _experts(weight: PackedWeight, take: Callable[[Tensor], Tensor]) -> Any:
    """The experts, matrices along the first axis, that ``take`` takes."""
    if type(weight) is not PackedWeight or weight.dim() != 3 or weight.stored.quantizer.granularity.kind == "tensor":
        return NotImplemented
    parts, stored = _taken(weight, take)
    made = PackedWeight(parts, str(stored), weight.size_contracted, weight.dtype, weight.transposed)
    made.layer = weight.layer
    return made


def _embedding(func: Any, weight: PackedWeight, rows: Tensor, *_: Any) -> Any:
    """Decodes the rows that are looked up."""
    alone = weight.stored.quantizer.granularity.kind in ("row", "block")
    if type(weight) is not PackedWeight or weight.transposed or not alone:
        return NotImplemented
    parts, stored = _taken(weight, lambda part: part[rows])
    return decode(parts, stored, weight.size_contracted, weight.dtype)


def _select(func: Any, weight: PackedWeight, axis: int, index: Any) -> Any:
    return NotImplemented if axis % weight.dim() else _experts(weight, lambda part: part.select(0, index))


def _index_select(func: Any, weight: PackedWeight, axis: int, index: Tensor) -> Any:
    return NotImplemented if axis % weight.dim() else _experts(weight, lambda part: part.index_select(0, index))


def _index(func: Any, weight: PackedWeight, indices: Sequence[Tensor | None]) -> Any:
    first, *others = indices
    if others or first is None or first.dtype not in (torch.int32, torch.int64) or first.dim() != 1:
        return NotImplemented
    return _experts(weight, lambda part: part[first])


#: Op → what it does to a packed weight without decoding it; ``NotImplemented`` decodes.
HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten.t.default: _swapped,
    aten.transpose.int: _swapped,
    aten.permute.default: _swapped,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten.embedding.default: _embedding,
    aten.select.int: _select,
    aten.index_select.default: _index_select,
    aten.index.Tensor: _index,
    aten.view.default: same_shape,
    aten._unsafe_view.default: same_shape,
}
