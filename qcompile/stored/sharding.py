"""Packed weights on several ranks: each holds rows of them, and only codes travel.

FSDP2 and ``torch.distributed.checkpoint`` cut a weight along its first axis. What a rank holds is a
:class:`PackedShard`: its own rows of codes and scales, and whole what all rows share (the scales of nested scales,
NVFP4's global scale). FSDP2 gathers codes and scales as they are, and a layer reads a whole
:class:`~qcompile.stored.PackedWeight` around them. DDP reduces gradients, of which packed weights have none.

Blocks of nested scales run through rows and across shards, so a shard must know at which scale of the weight it starts.
``start`` is a tensor among the parts: FSDP allocates a shard before it copies the rows of this rank into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.ir.definitions import short_names
from qcompile.ir.stored import Stored
from qcompile.kernels.quantize.nested import CodedScales, dequantize_scales

from .weight import HANDLERS, PackedWeight, Parts, decode, same_shape

__all__ = ["PackedShard"]

aten = torch.ops.aten


class PackedShard(PackedWeight):
    """Rows of a packed weight, which decode like any.

    Parts are those of :class:`~qcompile.stored.PackedWeight` for these rows, but for ``global_scale``, ``second`` and
    ``offset``, which are the whole weight's. If scales are nested there is one more: ``start``, int64 ``[]``, the
    position of the first scale among those of the whole weight.

    Attributes:
        total: rows of the whole weight.
        owned: whether this is memory of a rank's own, into which packed rows are copied with what all rows share. Rows
            of a weight that is there as a whole cannot take that: its other rows would change.
    """

    total: int = 0
    owned: bool = False

    @staticmethod
    def around(parts: Parts, like: PackedWeight, owned: bool) -> PackedShard:
        """Around parts of some rows of the weight that ``like`` is, or is rows of."""
        made = PackedShard(parts, like.spec, like.size_contracted, like.dtype, like.transposed)
        made.layer, made.total, made.owned = like.layer, like.total, owned
        return made

    @property
    def parts(self) -> Parts:
        start = self.__dict__.get("start")
        return super().parts if start is None else super().parts | {"start": start}

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        if self.stored.nested is None:
            return super().decoded(dtype)
        parts = {"codes": self.parts["codes"], "scales": _scales(self)}
        dense = decode(parts, Stored(self.stored.quantizer), self.size_contracted, dtype or self.dtype)
        return dense.mT if self.transposed else dense

    def _with(self, parts: Parts, dtype: torch.dtype | None = None, transposed: bool | None = None) -> PackedShard:
        how = self.transposed if transposed is None else transposed
        made = PackedShard(parts, self.spec, self.size_contracted, dtype or self.dtype, how)
        made.layer, made.total, made.owned = self.layer, self.total, self.owned
        return made

    def _store(self, value: Tensor) -> None:
        """Raises ``ValueError`` if rows on other ranks would change with these."""
        mine = self.parts
        shared = [name for name in mine if name not in _own(self)]
        if isinstance(value, PackedWeight) and self.matches(value):
            theirs = {"start": torch.zeros_like(mine["start"])} if "start" in mine else {}
            theirs |= value.parts
            if self.owned or all(torch.equal(mine[name], theirs[name]) for name in shared):
                for name, part in mine.items():
                    part.copy_(theirs[name])
                return
        if shared and self.shape[0] < self.total:
            common = ", ".join(name for name in shared if name != "start")
            msg = (
                f"{_where(self)}: some of its {self.total} rows cannot be written alone, since all share {common}; "
                "write the whole weight before it is sharded, or load packed rows (torch.distributed.checkpoint, or a "
                "full state dict that every rank has)"
            )
            raise ValueError(msg)
        super()._store(value)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names, context = super().__tensor_flatten__()
        return names, (*context, self.total, self.owned)

    @staticmethod
    def __tensor_unflatten__(inner: Parts, context: Any, shape: Sequence[Any], stride: Sequence[Any]) -> PackedShard:
        spec, dtype, transposed, total, owned = context
        made = PackedShard(inner, spec, shape[-2 if transposed else -1], dtype, transposed)
        made.total, made.owned = total, owned
        return made

    def _stable_hash_for_caching(self) -> str:
        return repr((super()._stable_hash_for_caching(), self.total, self.owned))

    # --- FSDP2 -------------------------------------------------------------------------------------------------------

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], Parts]:
        """What travels, of as many rows on every rank, and what does not.

        FSDP also knows a signature with five arguments, but with that it wants every tensor of a rank with fewer rows
        to have the shape of the weight.
        """
        rows = -(-self.total // mesh.size())
        parts = _padded(self, rows - self.shape[0]).parts if rows != self.shape[0] else self.parts
        own = _own(self)
        shared = {name: part for name, part in parts.items() if name not in (*own, "start")}
        return tuple(parts[name] for name in own), shared

    def fsdp_post_all_gather(
        self, gathered: Sequence[Tensor], shared: Parts, dtype: torch.dtype, *, out: PackedWeight | None = None
    ) -> tuple[PackedWeight, tuple[Tensor, ...]] | None:
        """The weight around what was gathered. FSDP frees that memory, and fills it again for ``out``."""
        if out is not None:
            out.__dict__ |= shared  # copies, if shards are kept on the CPU
            return None
        return _whole(dict(zip(_own(self), gathered, strict=True)) | shared, self, dtype), ()


torch.serialization.add_safe_globals([PackedShard])


# --- rows of parts --------------------------------------------------------------------------------------------------


def _own(weight: PackedWeight) -> tuple[str, ...]:
    """Names of the parts that have rows; the others are the whole weight's on every rank."""
    of_all = "scales" if weight.stored.quantizer.granularity.kind == "tensor" else ""
    return tuple(name for name in ("codes", "scales", "scale_codes") if name in weight.parts and name != of_all)


def _lengths(weight: PackedWeight, rows: int) -> dict[str, int]:
    """How many entries the parts that have rows have along their first axis, for that many rows of the weight."""
    quantizer = weight.stored.quantizer
    shape = (*weight.parts["codes"].shape[:-1], weight.size_contracted)
    square = quantizer.granularity.kind == "square" and len(shape) == 2
    bands = -(-rows // quantizer.granularity.size) if square else rows
    return {"codes": rows, "scales": bands, "scale_codes": bands * prod(quantizer.scale_shape(shape)[1:])}


def _cut(parts: Parts, like: PackedWeight, first: int, last: int) -> Parts:
    """Parts of rows ``[first, last)`` of a weight like ``like``, which has ``parts``; they share its memory."""
    above, below = _lengths(like, first), _lengths(like, last)
    return parts | {name: parts[name][above[name] : below[name]] for name in _own(like)}


def _uncuttable(weight: PackedWeight, row: int) -> str:
    """Why a weight cannot be cut in front of a row; "" if it can."""
    stored = weight.stored
    square = stored.quantizer.granularity
    if weight.transposed:
        return "its first axis is the contracted one (Conv1D)"
    if square.kind == "square" and weight.dim() == 2 and row % square.size:
        return f"row {row} is inside of {square}"
    if stored.nested and stored.nested.quantizer.format.codes_per_byte > 1:
        return f"two codes of its scales ({stored.nested.quantizer}) share a byte"
    return ""


def rows_of(weight: PackedWeight, first: int, last: int, owned: bool | None = None) -> PackedShard:
    """Rows ``[first, last)`` that share memory with ``weight``; ``owned`` as the weight is, if not given."""
    parts = _cut(weight.parts, weight, first, last)
    if weight.stored.nested:
        start = parts["start"] if "start" in parts else parts["codes"].new_zeros((), dtype=torch.int64)
        # Rows from the first one on share `start` with what they are rows of: FSDP fills a shard through such a view.
        parts["start"] = start + _lengths(weight, first)["scale_codes"] if first else start
    inherited = isinstance(weight, PackedShard) and weight.owned
    return PackedShard.around(parts, weight, inherited if owned is None else owned)


def _zeros(weight: PackedWeight, rows: int) -> PackedShard:
    """Memory for a shard of ``rows`` rows."""
    lengths, own = _lengths(weight, rows), _own(weight)
    shapes = {name: (lengths[name], *p.shape[1:]) if name in own else p.shape for name, p in weight.parts.items()}
    parts = {name: weight.parts[name].new_zeros(shape) for name, shape in shapes.items()}
    if weight.stored.nested:
        parts["start"] = parts["codes"].new_zeros((), dtype=torch.int64)
    return PackedShard.around(parts, weight, owned=True)


def _padded(weight: PackedShard, rows: int) -> PackedShard:
    """With that many rows of zeros below."""
    made = _zeros(weight, weight.shape[0] + rows)
    rows_of(made, 0, weight.shape[0])._store(weight)
    return made


def _whole(parts: Parts, shard: PackedShard, dtype: torch.dtype) -> PackedWeight:
    """The weight that ``shard`` is rows of, from parts of all its rows and perhaps more."""
    cut = _cut(parts, shard, 0, shard.total)
    cut.pop("start", None)
    made = PackedWeight(cut, shard.spec, shard.size_contracted, dtype)
    made.layer = shard.layer
    return made


def _scales(shard: PackedShard) -> Tensor:
    """The scales of a shard whose scales are nested, as float32."""
    nested = shard.stored.nested
    assert nested is not None
    parts = shard.parts
    codes, second = parts["scale_codes"], parts["second"]
    # Where they stand in the whole weight, whose blocks of scales need not begin where the shard does.
    positions = parts["start"] + torch.arange(codes.numel(), device=codes.device)
    count = second.numel() * nested.quantizer.granularity.size
    every = codes.new_zeros(count).index_copy(0, positions, codes)
    coded = CodedScales(every, second, parts.get("offset"), torch.Size([count]))
    shape = shard.stored.quantizer.scale_shape((*parts["codes"].shape[:-1], shard.size_contracted))
    return dequantize_scales(coded, nested)[positions].view(shape)


def _where(weight: PackedWeight) -> str:
    layer = f"layer {weight.layer!r}" if weight.layer else "a weight"
    return f"{layer} of {'×'.join(map(str, weight.shape))}, stored as {short_names(weight.spec)!r}"


# --- what FSDP2, DTensor and checkpoints do to weights and shards ----------------------------------------------------


def _split(func: Any, weight: PackedWeight, size: int, axis: int = 0) -> list[PackedShard]:
    """``chunk``: what FSDP2 and ``distribute_tensor`` ask for.

    Raises ``ValueError`` where packed rows cannot be parted so: decoded ones would make the weight wide, unsaid.
    """
    rows = weight.shape[0]
    ends = range(0, rows, size)
    reasons = [f"axis {axis} is not the first one" if axis else "", *(_uncuttable(weight, end) for end in ends)]
    if reason := next(filter(None, reasons), ""):
        msg = (
            f"{_where(weight)}: cannot be cut into pieces of {size}: {reason}; shard axis 0, by blocks along rows "
            f"(pack_ with rules={{{weight.layer!r}: 'nf4 block64'}}), or leave it wide (skip=[{weight.layer!r}])"
        )
        raise ValueError(msg)
    return [rows_of(weight, first, min(first + size, rows)) for first in ends]


def _slice(
    func: Any, weight: PackedWeight, axis: int = 0, first: int | None = None, last: int | None = None, step: int = 1
) -> Any:
    first, last, _ = slice(first, last).indices(weight.shape[axis])
    if step == 1 and (first, last) == (0, weight.shape[axis]):
        return weight._with(weight.parts)
    if axis % weight.dim() or step != 1 or last < first or _uncuttable(weight, first):
        return NotImplemented
    if isinstance(weight, PackedShard) and last - first == weight.total:
        return _whole(weight.parts, weight, weight.dtype)
    return rows_of(weight, first, last)


def _flat(func: Any, weight: PackedWeight, shape: Sequence[int]) -> Any:
    """``view(-1)``: FSDP2 keeps a shard so, and never looks at it; it stays as it is."""
    flat = isinstance(weight, PackedShard) and list(shape) == [-1]
    return weight._with(weight.parts) if flat else same_shape(func, weight, shape)


def _new_zeros(func: Any, weight: PackedWeight, shape: Sequence[int], **options: Any) -> Any:
    same = len(shape) == weight.dim() and list(shape[1:]) == list(weight.shape[1:])
    return _zeros(weight, shape[0]) if same and not any(options.values()) and not weight.transposed else NotImplemented


def _pad(func: Any, weight: PackedWeight, pad: Sequence[int], value: float = 0) -> Any:
    below = len(pad) == 2 * weight.dim() and not any(pad[:-1]) and not value
    return _padded(weight, pad[-1]) if below and isinstance(weight, PackedShard) else NotImplemented


def _as_strided(func: Any, weight: PackedWeight, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> Any:
    same = (tuple(shape), tuple(stride), offset) == (weight.shape, weight.stride(), 0)
    return weight._with(weight.parts) if same else NotImplemented


def _all_gather(func: Any, weight: PackedWeight, ranks: int, group: Any) -> Any:
    """The rows of all ranks: a whole weight, or a shard with those beyond its last that even it out."""
    if not isinstance(weight, PackedShard) or (rows := ranks * weight.shape[0]) < weight.total:
        return NotImplemented
    wait, parts = compat.functional_collective("wait_tensor"), weight.parts
    for name in _own(weight):
        part = parts[name]
        parts[name] = wait(func(_bytes(part), ranks, group)).view(part.dtype).view(-1, *part.shape[1:])
    if rows == weight.total:
        return _whole(parts, weight, weight.dtype)
    if "start" in parts:
        parts["start"] = torch.zeros_like(parts["start"])
    return weight._with(parts)


def _part_by_part(func: Any, *arguments: Any) -> Any:
    """``distribute_tensor``, which also loads full state dicts: parts are sent from one rank."""
    weights = [value for value in compat.tree_leaves(arguments) if isinstance(value, PackedWeight)]
    for name in weights[0].parts:

        def part(value: Any, name: str = name) -> Any:
            return _bytes(value.parts[name]) if isinstance(value, PackedWeight) else value

        _, work = func(*compat.tree_map(part, arguments))
        work.wait()
    return arguments[0], work


def _bytes(part: Tensor) -> Tensor:
    """A part as gloo sends it too, which knows no 8-bit floats."""
    return part.view(-1).view(torch.uint8)


def _pin_memory(func: Any, weight: PackedWeight, device: Any = None) -> PackedWeight:
    return weight._each(Tensor.pin_memory)


def _is_pinned(func: Any, weight: PackedWeight, device: Any = None) -> bool:
    return all(part.is_pinned() for part in weight.parts.values())


def _same(func: Any, weight: PackedWeight) -> PackedWeight:
    return weight._with(weight.parts)


HANDLERS.update(
    {
        aten.split.Tensor: _split,
        aten.slice.Tensor: _slice,
        aten.view.default: _flat,
        aten.new_zeros.default: _new_zeros,
        aten.constant_pad_nd.default: _pad,
        aten.as_strided.default: _as_strided,
        aten._pin_memory.default: _pin_memory,
        aten.is_pinned.default: _is_pinned,
        compat.functional_collective("all_gather_into_tensor"): _all_gather,
        compat.functional_collective("wait_tensor"): _same,
        torch.ops.c10d.scatter_.default: _part_by_part,
        torch.ops.c10d.broadcast_.default: _part_by_part,
        compat.functional_collective("_wrap_tensor_autograd"): _same,
    }
)
