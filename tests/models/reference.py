"""What a compiled model must compute, in eager mode and written for the tests alone.

:class:`Reference` is a function mode: while it is on, every product that a recipe quantizes reads operands quantized by
the few lines of plain torch below, and autograd differentiates through them. It shares no code with the package, knows
what a tensor is computed from by the memory it lies in and not by a way through a graph, and layers by module hooks.
:class:`Flops` counts what runs, one level below, where all spellings have become a handful of ATen products.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from math import gcd, prod
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["REFERENCES", "Flops", "Operands", "Product", "Reference"]

# --- operands -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operands:
    """How a backend quantizes: functions of a tensor whose last axis is contracted, differentiable by an estimator."""

    activation: Callable[[Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]


class _Estimate(torch.autograd.Function):
    """``value`` forward; backward the gradient of x is ``slope`` times that of the value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, slope: Tensor | None) -> Tensor:
        ctx.slope = slope
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (grad if ctx.slope is None else (grad.float() * ctx.slope).to(grad.dtype)), None, None


def e2m1(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Magnitude, spacing and sign of y rounded to E2M1 (0, ½, 1, 1½, 2, 3, 4, 6), half to even, saturating.

    Levels are ½ apart below 2, 1 below 4 and 2 below 6, each interval starting at an even multiple of its spacing: so
    the even code is the even multiple.
    """
    magnitude = y.abs().clamp(max=6.0)
    spacing = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return (magnitude / spacing).round() * spacing, spacing, y.sign()


def e2m1_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x rounded to E2M1 with one scale amax / 6 a row, in float32; and x in units of the scale."""
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=6 * 2.0**-126)
    six = torch.full_like(amax, 6.0)
    y = x.float() * (six / amax)
    level, _, sign = e2m1(y)
    return (level * sign * (amax / six)).to(x.dtype), y


def fp4_weight(x: Tensor) -> Tensor:
    """Differentiable gradient estimator (arXiv 2501.17116 eq. 8): slope |v|^(1/k − 1) / k with k = 5, at most 3."""
    value, y = e2m1_rows(x.detach())
    _, spacing, _ = e2m1(y)
    position = 2 * (y.abs().clamp(max=6.0) / spacing).frac() - 1
    return _Estimate.apply(x, value, (position.abs().pow(1 / 5 - 1) / 5).clamp(max=3.0))


def fp4_activation(alpha: str) -> Callable[[Tensor], Tensor]:
    """Straight-through, with everything outside the (1 − α, α) quantiles of a row clamped before rounding and given
    back exactly after it."""

    def quantize(x: Tensor) -> Tensor:
        rows, size = x.detach(), x.shape[-1]
        ranked = rows.sort(-1).values
        below, above = (int(Fraction(part) * size) for part in (1 - Fraction(alpha), alpha))
        clamped = rows.clamp(ranked[..., below, None], ranked[..., min(above, size - 1), None])
        return _Estimate.apply(x, e2m1_rows(clamped)[0] + (rows - clamped), None)

    return quantize


class _EstimateRotated(torch.autograd.Function):
    """``value`` forward; backward the gradient, rotated, where ``mask`` is set, rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return rotate(rotate(grad) * ctx.mask), None, None


def rotate(x: Tensor) -> Tensor:
    """Blocks of the last axis, of the largest power of two up to 128 that divides it, times Sylvester's matrix."""
    block = gcd(x.shape[-1], 128)
    return (walsh(x.unflatten(-1, (-1, block))) * block**-0.5).flatten(-2)


def walsh(x: Tensor) -> Tensor:
    """H₂ₙ = [[Hₙ, Hₙ], [Hₙ, −Hₙ]], from single elements up: neighbours are added first."""
    size, n = x.shape[-1], 1
    x = x.unsqueeze(-1)
    while n < size:  # [..., size / n, n]: blocks that are transformed, two of which make the next
        first, second = x[..., ::2, :], x[..., 1::2, :]
        x, n = torch.cat((first + second, first - second), -1), 2 * n
    return x.squeeze(-2)


def quest4(x: Tensor) -> Tensor:
    """QuEST in 4 bits (arXiv 2502.05003): rotated, half-integer multiples of Δ = 2 · 2.5139 rms / 15, trusted within
    half of it."""
    rows = x.detach().float()
    clip = 2.513930578568423 * rows.double().square().mean(-1, keepdim=True).sqrt() + 1e-8
    y = rotate(rows) * (7.5 / clip).float()
    level = y.floor().clamp(-8, 7) + 0.5
    value = rotate((level * (clip / 7.5).float()).to(x.dtype))
    return _EstimateRotated.apply(x, value, (y - level).abs() <= 0.5)


#: Operands by backend. The rows of the tiny models are too short to have anything beyond a 99 % quantile.
ALPHA = "0.95"
REFERENCES: dict[str, Operands] = {
    "qcompile_fp4": Operands(activation=fp4_activation(ALPHA), weight=fp4_weight),
    "qcompile_quest": Operands(activation=quest4, weight=quest4),
}


# --- products -------------------------------------------------------------------------------------------------------


@dataclass
class Product:
    """One product of the eager forward: how it is spelled, in which module, whether quantized; ``flops`` of it."""

    op: str
    layer: str
    quantized: bool
    flops: int = 0


Rows = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""An operand with what shares a scale in its last axis, and the way back, which is also given the operand."""


def along(axis: int) -> Rows:
    return lambda x: x.movedim(axis, -1), lambda rows, x: rows.movedim(-1, axis)


def flattened(start: int) -> Rows:
    return lambda x: x.flatten(start), lambda rows, x: rows.view_as(x)


def windows(kernel: tuple[int, ...]) -> Rows:
    """Windows that tile an image: ``[B, C, H, W] → [B, H/p, W/p, C·p·p]``."""

    def split(x: Tensor) -> Tensor:
        for i, k in enumerate(kernel):
            x = x.unflatten(2 + 2 * i, (-1, k))
        outer = [2 + 2 * i for i in range(len(kernel))]
        return x.permute(0, *outer, 1, *(axis + 1 for axis in outer)).flatten(1 + len(kernel))

    def join(rows: Tensor, x: Tensor) -> Tensor:
        n = len(kernel)
        rows = rows.unflatten(-1, (x.shape[1], *kernel))
        pairs = [axis for i in range(n) for axis in (1 + i, 2 + n + i)]
        return rows.permute(0, 1 + n, *pairs).reshape(x.shape)

    return split, join


Sides = tuple[tuple[str, Rows], tuple[str, Rows]]
"""The two operands by name of the argument, and their rows."""


def fixed(left: str, left_axis: int, right: str, right_axis: int) -> Callable[[dict[str, Any]], Sides | None]:
    return lambda given: ((left, along(left_axis)), (right, along(right_axis)))


def matmul_sides(given: dict[str, Any]) -> Sides | None:
    dims = given["input"].dim(), given["other"].dim()
    if dims == (1, 1):
        return None
    return ("input", along(-1)), ("other", along(-2 if dims[1] > 1 else -1))


def einsum_sides(given: dict[str, Any]) -> Sides | None:
    inputs, output = given["equation"].replace(" ", "").split("->")
    if inputs.count(",") != 1:
        return None
    left, right = inputs.split(",")
    summed = [letter for letter in left if letter in right and letter not in output]
    return (("a", along(left.index(summed[0]))), ("b", along(right.index(summed[0])))) if len(summed) == 1 else None


def conv_sides(given: dict[str, Any]) -> Sides | None:
    """One scale per position for 1×1, per window where windows tile the image, else per sample."""
    x, weight = given["input"], given["weight"]
    kernel, n = tuple(weight.shape[2:]), weight.dim() - 2

    def is_all(name: str, default: int, values: tuple[int, ...]) -> bool:
        value = given.get(name, default)
        return (tuple(value) if isinstance(value, (tuple, list)) else (value,) * n) == values

    ungrouped = given.get("groups", 1) == 1
    disjoint = is_all("stride", 1, kernel) and is_all("padding", 0, (0,) * n) and is_all("dilation", 1, (1,) * n)
    fits = not any(extent % k for extent, k in zip(x.shape[2:], kernel, strict=True))
    if ungrouped and prod(kernel) == 1:
        rows = along(1)
    elif ungrouped and disjoint and fits:
        rows = windows(kernel)
    else:
        rows = flattened(1)
    return ("input", rows), ("weight", flattened(1))


@dataclass(frozen=True)
class Spelling:
    """Functions that multiply, the names of their arguments, and what of these is contracted how.

    ``sides=None``: recognized, and left alone whatever the recipe. ``slot``: the argument that is a layer's weight, if
    there is such a one.
    """

    functions: tuple[Any, ...]
    names: tuple[str, ...] = ()
    sides: Callable[[dict[str, Any]], Sides | None] | None = None
    slot: str = ""


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
#: By what the report calls them.
SPELLINGS: dict[str, Spelling] = {
    "linear": Spelling((F.linear,), ("input", "weight", "bias"), fixed("input", -1, "weight", -1), "weight"),
    "matmul": Spelling((torch.matmul, Tensor.matmul, Tensor.__matmul__), ("input", "other"), matmul_sides),
    "mm": Spelling((torch.mm, Tensor.mm), ("input", "mat2"), fixed("input", -1, "mat2", -2)),
    "bmm": Spelling((torch.bmm, Tensor.bmm), ("input", "mat2"), fixed("input", -1, "mat2", -2)),
    "addmm": Spelling((torch.addmm, Tensor.addmm), ("input", "mat1", "mat2"), fixed("mat1", -1, "mat2", -2)),
    "baddbmm": Spelling(
        (torch.baddbmm, Tensor.baddbmm), ("input", "batch1", "batch2"), fixed("batch1", -1, "batch2", -2)
    ),
    "einsum": Spelling((torch.einsum,), ("equation", "a", "b"), einsum_sides),
    "conv1d": Spelling((F.conv1d,), _CONV, conv_sides, "weight"),
    "conv2d": Spelling((F.conv2d,), _CONV, conv_sides, "weight"),
    "grouped_mm": Spelling(
        (torch._grouped_mm, F.grouped_mm), ("input", "mat2", "offs"), fixed("input", -1, "mat2", -2), "mat2"
    ),
    "sdpa": Spelling((F.scaled_dot_product_attention,)),
    "conv_transpose1d": Spelling((F.conv_transpose1d,)),
    "conv_transpose2d": Spelling((F.conv_transpose2d,)),
    "lstm": Spelling((torch.lstm,)),
    "gru": Spelling((torch.gru,)),
}
_OP_OF = {function: op for op, spelling in SPELLINGS.items() for function in spelling.functions}


# --- where tensors come from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What a tensor is computed from.

    Attributes:
        parameters: their memory. varies: whether an input of the model is among it.
        scores: the products, by number, that it is a result of with no other product between.
    """

    parameters: frozenset[int] = frozenset()
    varies: bool = False
    scores: frozenset[int] = frozenset()

    def __or__(self, other: Source) -> Source:
        return Source(self.parameters | other.parameters, self.varies or other.varies, self.scores | other.scores)

    @property
    def is_weight(self) -> bool:
        return bool(self.parameters) and not self.varies


class Sources:
    """What the tensors of one forward are computed from, by the memory that they lie in.

    So a view is what it is a view of, and what is written into a tensor is in all its views.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._found: dict[int, tuple[Any, Source]] = {}
        self._parameters = {_memory(p) for p in model.parameters()}
        for parameter in model.parameters():
            self._put(parameter, Source(frozenset([_memory(parameter)])))
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._put(leaf, Source(varies=True))

    def _put(self, x: Tensor, source: Source) -> None:
        self._found[_memory(x)] = x.untyped_storage(), source  # kept alive, so that no other tensor takes its place

    def of(self, x: Any) -> Source:
        """Of what was not computed here, such as a buffer: nothing."""
        return self._found[_memory(x)][1] if isinstance(x, Tensor) and _memory(x) in self._found else Source()

    def note(self, name: str, args: Any, result: Any, source: Source | None = None) -> None:
        """``result`` comes from ``source``, or of what the function ``name`` has read among ``args``."""
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if source is None:
            read = [] if name.startswith("new_") or name.endswith("_like") else tensors
            if name in ("__getitem__", "index_select") and tensors and tensors[0].dim() > 2:
                read = tensors[:1]  # experts, picked by the router
            read = read[:1] if name in _READ_A_SHAPE else read
            source = reduce(operator.or_, map(self.of, read), Source())
        written = tensors[:1] if name.endswith("_") or name in _WRITE else []
        for x in (*written, *tree_leaves(result)):
            if isinstance(x, Tensor) and _memory(x) not in self._parameters:
                self._put(x, self.of(x) | source)


#: Of their other arguments these functions read the shape, dtype or device alone.
_READ_A_SHAPE = ("view_as", "expand_as", "reshape_as", "type_as", "to")
_WRITE = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def lstm_cell(
    x: Tensor, state: list[Tensor], w_x: Tensor, w_h: Tensor, b_x: Tensor | None, b_h: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A step of torch's LSTM from its two products: hidden state and cell."""
    hidden, cell = state
    write, keep, value, read = (F.linear(x, w_x, b_x) + F.linear(hidden, w_h, b_h)).chunk(4, 1)
    cell = keep.sigmoid() * cell + write.sigmoid() * value.tanh()
    return read.sigmoid() * cell.tanh(), cell


class Reference(TorchFunctionMode):
    """Inside it, ``model`` computes of ``inputs`` what the backend must.

    A weight is what stands in a layer's slot for it; in a product without such a slot, what is computed from parameters
    alone. Quantized is a product of floating-point operands of which one is a weight and the other varies with the
    model's inputs, summing over more than one element of a single axis, under autograd, in a layer that is neither
    called ``skip`` nor a head.

    Args:
        operands: how to quantize; ``None`` lists the products and changes nothing.
        plain: such a list, which knows the heads: that a product is the last, or is scored, shows only later.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        operands: Operands | None = None,
        plain: Reference | None = None,
        skip: str = "lm_head",
    ) -> None:
        super().__init__()
        self.model, self.operands, self.plain, self.skip = model, operands, plain, skip
        self.products: list[Product] = []
        self.current: Product | None = None
        self.flops: Flops | None = None
        self._layers: list[str] = []
        self._sources = Sources(model, inputs)
        tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        self._tables = {_memory(table) for table in tables}
        self._vocabulary = max((len(table) for table in tables), default=0)
        self._heads: set[int] = set()
        self._wide: set[int] = set()
        self._followed: set[int] = set()

    @property
    def heads(self) -> set[int]:
        """Numbers of the products that turn hidden states into scores: tied to an embedding, under a cross-entropy, or
        the last and as wide as the vocabulary.
        """
        return self._heads | (self._wide - self._followed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = _OP_OF.get(func)
        if op is not None:
            return self._multiply(op, func, args, kwargs)
        if func is torch.lstm_cell:
            with self:
                return lstm_cell(*args)
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _CROSS_ENTROPIES:
            self._heads |= self._sources.of(args[0]).scores
        self._sources.note(name, (args, kwargs), result)
        return result

    def _multiply(self, op: str, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        spelling, number = SPELLINGS[op], len(self.products)
        given = {**dict(zip(spelling.names, args, strict=False)), **kwargs}
        read = [self._sources.of(leaf) for leaf in tree_leaves((args, kwargs))]
        sides = spelling.sides(given) if spelling.sides else None
        weights = self._weights(spelling, given, sides) if sides is not None else ()
        product = Product(op, self._layers[-1] if self._layers else "", self._is_quantized(number, bool(weights)))
        self.products.append(product)
        self._followed |= frozenset().union(*(source.scores for source in read))
        if any(self._sources.of(given[name]).parameters & self._tables for name in weights):
            self._heads.add(number)
        if sides is not None and product.quantized and self.operands:
            for name, (split, join) in sides:
                x = given[name]
                quantize = self.operands.weight if name in weights else self.operands.activation
                given[name] = join(quantize(split(x)), x)
                if self.flops:
                    self.flops.mark(given[name])
            positional = spelling.names[: len(args)]
            args, kwargs = [given.pop(name) for name in positional], given
        self.current = product
        try:
            result = func(*args, **kwargs)
        finally:
            self.current = None
        varies = any(source.varies for source in read)
        parameters = frozenset() if varies else frozenset().union(*(source.parameters for source in read))
        self._sources.note(op, (), result, Source(parameters, varies, frozenset([number])))
        if isinstance(result, Tensor) and result.dim() and result.shape[-1] == self._vocabulary:
            self._wide.add(number)
        return result

    def _weights(self, spelling: Spelling, given: dict[str, Any], sides: Sides) -> tuple[str, ...]:
        """Names of the arguments that are weights; none if the product is left alone."""
        operands = [given[name] for name, _ in sides]
        sources = [self._sources.of(x) for x in operands]
        split = sides[0][1][0]
        if not (
            all(x.is_floating_point() and x.numel() for x in operands)
            and split(operands[0]).shape[-1] > 1
            and any(source.varies for source in sources)
        ):
            return ()
        if spelling.slot:
            return (spelling.slot,)
        return tuple(name for (name, _), source in zip(sides, sources, strict=True) if source.is_weight)

    def _is_quantized(self, number: int, has_weight: bool) -> bool:
        named = self.skip in ".".join(self._layers[-1:]).split(".")
        head = self.plain is not None and number in self.plain.heads
        return has_weight and torch.is_grad_enabled() and not named and not head

    def _leave_layer(self, *_: Any) -> None:
        self._layers.pop()

    @contextmanager
    def on(self) -> Iterator[Reference]:
        """The mode, with the names of the modules whose forward is running.

        Functions of ``torch.nn.functional`` that are written in Python hand themselves over to a mode as one call; told
        that there is none, they run, and the mode sees the products that they are made of.
        """
        handles = []
        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._layers.append(name)))
            handles.append(module.register_forward_hook(self._leave_layer))
        try:
            with mock.patch.object(F, "has_torch_function", return_value=False), self:
                yield self
        finally:
            for handle in handles:
                handle.remove()


_CROSS_ENTROPIES = ("cross_entropy", "nll_loss")


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


# --- operations -----------------------------------------------------------------------------------------------------

aten = torch.ops.aten


def _grouped(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return 2 * prod(a) * b[-1]


def _attention(formula: Callable[..., int], *tensors: Tensor) -> int:
    """``formula`` with as many heads in keys and values as in queries: flop_counter of torch 2.11 refuses fewer."""
    heads = tensors[0].shape[1]
    return formula(*((batch, heads, *matrix) for batch, _, *matrix in (tensor.shape for tensor in tensors)))


#: FLOPs from the arguments of what flop_counter does not know, by qualified name.
_FORMULAS: dict[str, Callable[..., int]] = {
    "aten::_grouped_mm": lambda a, b, *_, **__: _grouped(a.shape, b.shape),
    "transformers::grouped_mm_fallback": lambda a, b, *_: _grouped(a.shape, b.shape),
    "transformers::grouped_mm_fallback_backward": lambda a, b, *_: 2 * _grouped(a.shape, b.shape),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (
        lambda q, k, v, *_, **__: _attention(flop_counter.sdpa_flop_count, q, k, v)
    ),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (
        lambda grad, q, k, v, *_, **__: _attention(flop_counter.sdpa_backward_flop_count, grad, q, k, v)
    ),
}
#: Ops of the package whose result is an operand as the product reads it.
_DECODERS = ("qcompile::dequantize", "qcompile::restore_outliers")
_ROTATION = "qcompile::hadamard"
#: Ops that copy what they are given.
_COPIES = (aten.clone, aten._to_copy, aten.copy_, aten.copy, aten.constant_pad_nd, aten.cat)


@dataclass
class Count:
    """Floating-point operations of products: all, and of those that read at least one quantized operand."""

    total: int = 0
    quantized: int = 0


class Flops(TorchDispatchMode):
    """Counts products that run inside it.

    Quantized is what :meth:`mark` was told of or an op of the package decoded, with views and copies of it. ``marks``
    hands on what the forward knows to the backward. With ``reference``, the operations of a forward go to the record of
    the call that they belong to, and what runs outside of all these to ``unknown``.
    """

    def __init__(self, reference: Reference | None = None, marks: dict[int, Any] | None = None) -> None:
        super().__init__()
        self.reference = reference
        self.marks = {} if marks is None else marks
        self.count = Count()
        self.unknown: Counter[str] = Counter()
        if reference is not None:
            reference.flops = self

    def mark(self, x: Tensor) -> None:
        self.marks[_storage(x)] = x.untyped_storage()  # kept alive, so that the address means this tensor

    def _is_quantized(self, x: Any) -> bool:
        return isinstance(x, Tensor) and _storage(x) in self.marks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func.overloadpacket
        leaves = tree_leaves((args, kwargs))
        flops = None
        name = func.name().partition(".")[0]
        if name in _FORMULAS:
            flops = _FORMULAS[name](*args, **kwargs)
        elif packet in flop_counter.flop_registry:
            flops = flop_counter.flop_registry[packet](*args, **kwargs, out_val=result)
        quantized = name in _DECODERS or any(map(self._is_quantized, leaves))
        if flops is not None:
            self._add(name, flops, quantized)
        elif quantized and (name in _DECODERS or name == _ROTATION or packet in _COPIES):
            self.mark(result)
        return result

    def _add(self, name: str, flops: int, quantized: bool) -> None:
        self.count.total += flops
        self.count.quantized += flops * quantized
        if self.reference is not None and self.reference.current is not None:
            self.reference.current.flops += flops
        elif self.reference is not None:
            self.unknown[name] += 1
