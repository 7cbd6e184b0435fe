"""What a compiled program must compute, in eager torch: :class:`QuantizedProducts` intercepts products and quantizes.

Nothing here calls the package. Quantizing is written out below from the definitions (docs/design.md and the cited
papers), as distances to levels in float64 where the kernels use thresholds, sorting where they use top-k; and which
operands of which product are quantized, along which axis, is decided from what eager torch calls with.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Flag, auto
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["Numbers", "QuantizedProducts", "quantize"]

MAGNITUDES = {
    "e2m1": (0, 0.5, 1, 1.5, 2, 3, 4, 6),
    "e1m2": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5),
    "midrise4": tuple(i + 0.5 for i in range(8)),
    "int4": tuple(float(i) for i in range(8)),
}


@dataclass(frozen=True)
class Numbers:
    """How one operand is quantized. ``group``: row, tensor, or how many neighbours share a scale."""

    grid: str = "e2m1"
    group: str | int = "row"
    scale: str = "absmax"
    estimator: str = "ste"
    alpha: float | None = None
    per: str = "row"

    def __str__(self) -> str:
        """As the option reads."""
        group = f"block{self.group}" if isinstance(self.group, int) else self.group
        clamp = f"; occ(alpha={self.alpha},per={self.per})" if self.alpha else ""
        return f"{self.grid} {group} {self.scale} even; {self.estimator}{clamp}"


# --- quantizing -----------------------------------------------------------------------------------------------------


def quantize(x: Tensor, numbers: Numbers, axis: int) -> Tensor:
    """``x`` with every element replaced by what its code stands for; differentiable through the estimator."""
    return _Quantize.apply(x, numbers, axis)


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Numbers, axis: int) -> Tensor:
        rows = x.movedim(axis, -1).float()
        low, high = _bounds(rows, numbers)
        clamped = rows if low is None else torch.minimum(torch.maximum(rows, low), high)  # type: ignore[type-var]
        y, scale = _scaled(clamped, numbers)
        level = _nearest(y, numbers)
        result = (level * scale).to(x.dtype)
        if low is not None:
            # The residual is exact for 16-bit inputs; both sums round once, to x's dtype. ∞ − ∞ is none.
            residual = torch.where(rows == clamped, 0, rows - clamped)
            result = (result.float() + residual).to(x.dtype)
        ctx.axis, ctx.factor = axis, _factor(y, level, numbers)
        return result.movedim(-1, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.factor is None:
            return grad, None, None
        if ctx.factor.dtype == torch.bool:
            return torch.where(ctx.factor.movedim(-1, ctx.axis), grad, 0), None, None
        return (grad.float() * ctx.factor.movedim(-1, ctx.axis)).to(grad.dtype), None, None


def _bounds(rows: Tensor, numbers: Numbers) -> Any:
    """Elements of rank ⌊(1 − α)n⌋ and ⌊αn⌋ of the sorted row or tensor (arXiv 2501.17116 §3.2)."""
    if numbers.alpha is None:
        return None, None
    ordered = (rows.reshape(-1) if numbers.per == "tensor" else rows).sort(-1).values
    parts, n = round(numbers.alpha * 1e6), ordered.shape[-1]
    low, high = ordered[..., (10**6 - parts) * n // 10**6], ordered[..., min(parts * n // 10**6, n - 1)]
    return (low, high) if numbers.per == "tensor" else (low[..., None], high[..., None])


def _scaled(rows: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """y = x · γ in float32, and s; γ and s are each rounded once from the absolute maximum."""
    magnitude = rows.abs()
    if numbers.group == "tensor":
        amax = magnitude.amax().expand(rows.shape)
    elif numbers.group == "row":
        amax = magnitude.amax(-1, keepdim=True).expand(rows.shape)
    else:
        blocks = magnitude.split(numbers.group, -1)  # type: ignore[arg-type]
        amax = torch.cat([b.amax(-1, keepdim=True).expand(b.shape) for b in blocks], -1)
    largest = torch.tensor(float(MAGNITUDES[numbers.grid][-1]))
    # No scale lies below float32's normal numbers, and no power of two below E8M0's least.
    least = 2.0 ** (math.frexp(largest)[1] - 1 - 127) if numbers.scale == "e8m0" else max(float(largest), 1) * 2.0**-126
    amax = amax.clamp(min=least)
    if numbers.scale == "absmax":
        return rows * (largest / amax), amax / largest
    # Powers of two: s = 2^−⌊log2(M / amax)⌋, or 2^(⌊log2 amax⌋ − ⌊log2 M⌋) (OCP MX v1.0 §6.3).
    ratio = (largest / amax) if numbers.scale == "absmax_pow2" else amax
    exponent = torch.frexp(ratio).exponent.double() - 1
    if numbers.scale == "e8m0":
        exponent = math.floor(math.log2(float(largest))) - exponent
    reciprocal = (2.0**exponent).float()
    return rows * reciprocal, torch.where(amax.isfinite(), 1 / reciprocal, torch.nan)


def _nearest(y: Tensor, numbers: Numbers) -> Tensor:
    """Nearest level; ties go to the even index. NaN takes the largest."""
    levels = torch.tensor(MAGNITUDES[numbers.grid], dtype=torch.float64)
    distance = (y.abs().double().clamp(max=levels[-1])[..., None] - levels).abs()
    index = distance.argmin(-1)
    above = (index + 1).clamp(max=len(levels) - 1)
    tied = distance.gather(-1, above[..., None]) == distance.gather(-1, index[..., None])
    index = torch.where(tied[..., 0] & (index % 2 == 1), above, index)
    index = torch.where(y.isnan(), len(levels) - 1, index)
    sign = torch.where(y < 0, -1.0, 1.0)
    return sign * levels[index].float()


def _factor(y: Tensor, level: Tensor, numbers: Numbers) -> Tensor | None:
    """What the gradient is multiplied with; a bool tensor masks."""
    levels = MAGNITUDES[numbers.grid]
    if numbers.estimator == "ste":
        return None
    if numbers.estimator == "clip":  # arXiv 1602.02830; two roundings may carry y just beyond the last level
        return y.abs() <= levels[-1] * (1 + 2.0**-22)
    if numbers.estimator == "trust":  # arXiv 2502.05003 §3.2
        gaps = [b - a for a, b in pairwise(levels)] + ([2 * levels[0]] if levels[0] else [])
        return (y - level).abs() <= max(gaps) / 2
    # dge(k=5,cap=3), arXiv 2501.17116 eq. 8: v ∈ [−1, 1] is the position between two neighbouring levels.
    edges = torch.tensor(levels if levels[0] == 0 else (-levels[0], *levels), dtype=torch.float32)
    magnitude = y.abs().clamp(max=levels[-1])
    lower = (magnitude.nan_to_num()[..., None] >= edges[1:-1]).sum(-1)
    gap = edges[lower + 1] - edges[lower]
    v = 2 * (magnitude - edges[lower]) / gap - 1
    return (v.abs().pow(1 / 5 - 1) / 5).clamp(max=3)


# --- products -------------------------------------------------------------------------------------------------------


class LeftAlone(Exception):  # noqa: N818  (not an error)
    """A product whose operands keep their precision."""


@dataclass(frozen=True)
class Place:
    """Where a call holds an operand, and the axis it is contracted along, or how to bring it into rows and back."""

    index: int
    keyword: str
    axis: int = -1
    rows: Callable[[Tensor, Callable[[Tensor, int], Tensor]], Tensor] | None = None

    def get(self, args: list[Any], kwargs: dict[str, Any]) -> Tensor:
        return args[self.index] if self.index < len(args) else kwargs[self.keyword]

    def put(self, args: list[Any], kwargs: dict[str, Any], value: Tensor) -> None:
        if self.index < len(args):
            args[self.index] = value
        else:
            kwargs[self.keyword] = value


class Source(Flag):
    """What a tensor is computed from. Neither is a buffer, a factory, or nothing but numbers."""

    NOTHING = 0
    PARAMETER = auto()
    INPUT = auto()


@dataclass(frozen=True)
class Origin:
    """``leaf``: the input that a tensor holds the values of, if that is a leaf which requires grad."""

    source: Source = Source.NOTHING
    leaf: int | None = None

    def __or__(self, other: Origin) -> Origin:
        return Origin(self.source | other.source, self.leaf if self.leaf == other.leaf else None)

    @property
    def is_weight(self) -> bool:
        return self.source == Source.PARAMETER

    @property
    def varies(self) -> bool:
        return Source.INPUT in self.source


class QuantizedProducts(TorchFunctionMode):
    """Quantizes the operands of the products that run under it, and notes in ``quantized`` which it did.

    Args:
        activation, weight: how operands are quantized.
        parameters, inputs: the model's; whatever else it reads is constant.
        attention: quantize products of two activations as well.
        training: whether a result requires a gradient, leaves and their views aside.

    A weight is what stands in the slot that linear layers and convolutions have for it. In any other product it is what
    is computed from parameters alone, whatever else is done on the way, or else a matrix on the right that is handed
    over as a leaf which requires grad. Constants are no weights there. Left alone is what does not depend on an input,
    and what runs under no_grad while the program trains.

    What a tensor is computed from is kept by the memory that it lies in: so a view is what it is a view of, and what is
    written into memory is in all its views. A parameter stays one whatever is written into it.

    Functions other than views read and return copies: a compiled program may change in place what eager autograd has
    saved for the backward, so the reference must be free of that restriction too.
    """

    def __init__(
        self,
        activation: Numbers,
        weight: Numbers,
        parameters: list[Tensor],
        inputs: list[Tensor],
        attention: bool,
        training: bool,
    ) -> None:
        self.activation, self.weight, self.attention, self.training = activation, weight, attention, training
        self.quantized: list[bool] = []
        self.origins: dict[int, tuple[Any, Origin]] = {}
        for x in inputs:
            self._note(x, Origin(Source.INPUT, id(x) if x.is_leaf and x.requires_grad else None))
        for p in parameters:
            self._note(p, Origin(Source.PARAMETER))
        self.parameters = {_memory(p) for p in parameters}

    def _note(self, x: Tensor, origin: Origin) -> None:
        self.origins[_memory(x)] = x.untyped_storage(), origin  # kept alive, so that nothing else takes its place

    def origin(self, x: Tensor) -> Origin:
        return self.origins[_memory(x)][1] if _memory(x) in self.origins else Origin()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func in CONTRACTIONS:
            return self._product(func, list(args), kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        read = tensors[:1] if name in _READ_A_SHAPE else [] if name.endswith("_like") else tensors
        origin = reduce(operator.or_, map(self.origin, read)) if read else Origin()
        if name in _CHANGES or kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__")):
            if _memory(args[0]) not in self.parameters:
                self._note(args[0], origin)
            if name.startswith("relu"):  # saves its own result
                return args[0].copy_(torch.relu(args[0].clone()).clone())
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and isinstance(out, Tensor) and not _same_memory(out, source):
            out = func(*(a.clone() if isinstance(a, Tensor) else a for a in args), **kwargs).clone()
        for result in tree_leaves(out):
            if isinstance(result, Tensor) and not (source is not None and _same_memory(result, source)):
                self._note(result, origin if name in _COPIES else Origin(origin.source))
        return out

    def _product(self, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if func is torch.einsum and isinstance(args[1], (list, tuple)):
            args = [args[0], *args[1]]
        read = [self.origin(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        try:
            places = CONTRACTIONS[func](args, kwargs)
            operands = [place.get(args, kwargs) for place in places]
            kinds = self._kinds(func, places, operands)
        except LeftAlone:
            places = operands = kinds = ()
        self.quantized.append(bool(kinds))
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        if kinds:
            with torch.no_grad():
                dtype = func(*copies, **kwargs).dtype
        for place, x, numbers in zip(places, operands, kinds, strict=True):
            # Under autocast the product reads a narrower operand than it is given.
            x = x.to(dtype) if dtype.itemsize < x.dtype.itemsize else x
            rows = place.rows or (lambda x, q, axis=place.axis: q(x, axis))
            place.put(args, kwargs, rows(x, lambda x, axis, numbers=numbers: quantize(x, numbers, axis)))
        out = func(*(args if kinds else copies), **kwargs)
        # With an input in it, a product is an activation and nothing else.
        sources = reduce(operator.or_, (o.source for o in read))
        self._note(out, Origin(Source.INPUT if Source.INPUT in sources else sources))
        return out

    def _kinds(self, func: Any, places: tuple[Place, Place], operands: list[Tensor]) -> list[Numbers]:
        """How each operand is quantized; raises :class:`LeftAlone`."""
        origins = [self.origin(t) for t in operands]
        if not any(origin.varies for origin in origins):
            raise LeftAlone  # computes a weight
        if self.training and not torch.is_grad_enabled():
            raise LeftAlone  # under no_grad
        convolution = places[1].rows is not None
        if convolution or func is F.linear:
            kinds = [False, True]
        else:
            kinds = [origin.is_weight for origin in origins]
            if not all(origin.source for origin in origins):
                raise LeftAlone  # a constant
            first, second = (origin.leaf for origin in origins)
            if not any(kinds) and second is not None and second != first:
                kinds[1] = operands[1].dim() == 2  # functional code passes weights so
            if not any(kinds) and not self.attention:
                raise LeftAlone  # no weight
        size = operands[1].shape[1:].numel() if convolution else operands[0].shape[places[0].axis]
        if size <= 1:
            raise LeftAlone  # nothing is summed
        if any(t.numel() == 0 for t in operands):
            raise LeftAlone  # empty
        return [self.weight if kind else self.activation for kind in kinds]


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return _memory(a) == _memory(b)


_CHANGES = ("__setitem__", "__iadd__", "__imul__")
#: Copies of the same values, whether or not they alias.
_COPIES = ("to", "clone", "contiguous", "reshape", "flatten", "ravel", "reshape_as")
#: Of their other arguments these functions read the shape or dtype alone.
_READ_A_SHAPE = ("view_as", "expand_as", "reshape_as", "to")

Contraction = Callable[[list[Any], dict[str, Any]], tuple[Place, Place]]


def _fixed(left: Place, right: Place) -> Contraction:
    return lambda args, kwargs: (left, right)


def _matmul(args: list[Any], kwargs: dict[str, Any]) -> tuple[Place, Place]:
    left, right = Place(0, "input"), Place(1, "other", -2)
    dims = [place.get(args, kwargs).dim() for place in (left, right)]
    if dims == [1, 1]:
        raise LeftAlone  # two vectors
    return left, right if dims[1] > 1 else Place(1, "other", -1)


def _einsum(args: list[Any], kwargs: dict[str, Any]) -> tuple[Place, Place]:
    inputs, _, output = args[0].replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not output and "->" not in args[0]:
        output = "".join(c for c in set(inputs) if inputs.count(c) == 1)
    summed = [c for c in dict.fromkeys(terms[0]) if c.isalpha() and c in terms[1] and c not in output]
    if len(summed) != 1 or any(len(set(t)) < len(t) for t in terms if "." not in t):
        raise LeftAlone  # not one pair of axes
    axes = [t.index(summed[0]) - len(t) for t in terms]
    return Place(1, "", axes[0]), Place(2, "", axes[1])


def _tensordot(args: list[Any], kwargs: dict[str, Any]) -> tuple[Place, Place]:
    dims = args[2] if len(args) > 2 else kwargs["dims"]
    if dims == 1:
        return Place(0, "a", -1), Place(1, "b", 0)
    if dims == 2:
        raise LeftAlone  # two axes
    return Place(0, "a", dims[0][0]), Place(1, "b", dims[1][0])


def _convolution(dims: int) -> Contraction:
    """A weight's row is an output channel. An input's row: a position for 1×1, a window where windows tile, else a
    sample.
    """

    def contraction(args: list[Any], kwargs: dict[str, Any]) -> tuple[Place, Place]:
        x, weight, _, stride, padding, dilation, groups = (
            args[i] if i < len(args) else kwargs.get(name, default)
            for i, (name, default) in enumerate(
                [("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0), ("dilation", 1),
                 ("groups", 1)]
            )
        )  # fmt: skip
        kernel = tuple(weight.shape[2:])
        filters = Place(1, "weight", rows=lambda w, q: q(w.flatten(1), -1).view(w.shape))
        channels = x.dim() - dims - 1
        if groups == 1 and set(kernel) == {1}:
            return Place(0, "input", channels), filters
        steps = (stride,) * dims if isinstance(stride, int) else tuple(stride)
        tiles = steps == kernel and dilation == 1 and padding in (0, "valid") and groups == 1 and channels == 1
        if tiles and all(n % k == 0 for n, k in zip(x.shape[2:], kernel, strict=True)):
            return Place(0, "input", rows=lambda x, q: _windows(x, kernel, q)), filters
        return Place(0, "input", rows=lambda x, q: q(x.flatten(channels), -1).view(x.shape)), filters

    return contraction


def _windows(x: Tensor, kernel: tuple[int, ...], q: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Every window of [B, C, H, W] or [B, C, L] is one row."""
    image, window = (x, kernel) if x.dim() == 4 else (x.unsqueeze(2), (1, *kernel))
    rows = q(F.unfold(image, window, stride=window), 1)
    return F.fold(rows, image.shape[2:], window, stride=window).view(x.shape)


_MM, _ADDMM = (_fixed(Place(i, a, -1), Place(i + 1, b, -2)) for i, a, b in ((0, "input", "mat2"), (1, "mat1", "mat2")))
_INNER = _fixed(Place(0, "input"), Place(1, "weight"))

CONTRACTIONS: dict[Any, Contraction] = {
    F.linear: _INNER,
    torch.inner: _INNER,
    **dict.fromkeys((torch.matmul, torch.linalg.matmul, Tensor.matmul, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: _fixed(Place(1, "other", -1), Place(0, "self", -2)),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.ops.aten.mm.default, torch.bmm, Tensor.bmm), _MM),
    torch.mv: _fixed(Place(0, "input"), Place(1, "vec")),
    torch.addmv: _fixed(Place(1, "mat"), Place(2, "vec")),
    **dict.fromkeys((torch.addmm, Tensor.addmm, Tensor.addmm_, torch.baddbmm, Tensor.baddbmm_, torch.addbmm), _ADDMM),
    torch.einsum: _einsum,
    torch.tensordot: _tensordot,
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
}


def _refused(args: list[Any], kwargs: dict[str, Any]) -> tuple[Place, Place]:
    raise LeftAlone  # two vectors


CONTRACTIONS[torch.dot] = _refused
