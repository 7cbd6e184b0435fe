"""A typed view of every ``qcompile::`` op: the arguments of a call by name, and the node that a call of it makes.

::

    view = Quantize.of(node)                           # raises unless node calls qcompile::quantize
    view.quantizer.format, view.axis, view.fold        # Format, int, Node or None
    replace(view, axis=0).emit(graph, near=node)       # a node, with its fake value and the metadata of `near`

Fields have the names, the order and the defaults of the op's schema. Text in a schema is the value it stands for here:
no pass reads or writes it. A size may be a number, a SymInt or the node that computes it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Self, get_origin, get_type_hints

import torch
from torch.fx import Graph, Node

import qcompile.ir.tensor_core_ops  # noqa: F401  (defines the ops, with qcompile.ir.ops)
from qcompile.ir.encoding import Encoding, Parts
from qcompile.ir.estimators import EstimatorSpec
from qcompile.ir.operand import Operand
from qcompile.ir.outliers import OutlierClamp, OutlierColumns, Outliers
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.stored import Stored
from qcompile.ir.transforms import Transform
from qcompile.kernels.producer import Producer

from .graph import emit, is_call, item_of

__all__ = [
    "ENCODERS", "TEXTS", "VIEW_OF", "ClampOutliers", "CountBits", "Dequantize", "DequantizeGroups",
    "EncodeCompensated", "EstimatorMask", "FakeQuantize", "Hadamard", "MaskGradient", "Mm1Bit", "Mm8Bit",
    "Mm8BitGrouped", "MmAdd", "MmBlockScaled", "MmStored", "OperandStatistics", "ProductOperand", "Quantize",
    "Quantize8Bit",
    "Quantize8BitMasked", "Quantize8BitPair", "Quantize8BitTransposed", "QuantizeCompensated", "QuantizeGroups",
    "QuantizeGroupsPair", "QuantizeProduced", "QuantizedMM", "ReadAgain", "Recode", "RestoreOutliers",
    "ScaleGradient", "SplitGradient", "View", "encoder_of",
]  # fmt: skip

ops = torch.ops.qcompile

#: A length: a number, or in a graph with dynamic shapes a SymInt or the node that computes it.
Size = Any

_NO_TRANSFORM = Transform()
#: Values that travel as text.
TEXTS: dict[Any, Any] = {
    kind: kind.parse
    for kind in (
        Encoding,
        EstimatorSpec,
        Operand,
        Outliers,
        OutlierClamp,
        OutlierColumns,
        Producer,
        Quantizer,
        Stored,
        Transform,
    )
} | {Operand | None: lambda text: None if text is None else Operand.parse(text)}


class View:
    """What the views of single ops have in common."""

    op: ClassVar[Any]

    @classmethod
    def of(cls, node: Node) -> Self:
        """Raises ``TypeError`` for any node but a call of the op."""
        view = cls.match(node)
        if view is None:
            what = f"a call of {node.target}" if isinstance(node, Node) else repr(node)
            msg = f"{cls.__name__}.of takes a call of {cls.op}; got {node}, {what}"
            raise TypeError(msg)
        return view

    @classmethod
    def match(cls, node: Any) -> Self | None:
        """``None`` for any node but a call of the op."""
        if not is_call(node, cls.op):
            return None
        names = (argument.name for argument in cls.op._schema.arguments)
        return cls._made_of({**dict(zip(names, node.args, strict=False)), **node.kwargs})

    @classmethod
    def _made_of(cls, given: dict[str, Any]) -> Self:
        parsers = _parsers(cls)  # type: ignore[arg-type]
        return cls(**{name: parsers[name](value) if name in parsers else value for name, value in given.items()})

    @classmethod
    def calls(cls, graph: Graph) -> list[Node]:
        """The calls of the op in a graph, in order."""
        return list(graph.find_nodes(op="call_function", target=cls.op))

    def arguments(self) -> tuple[Any, ...]:
        """Of the call: trailing defaults are left out, as in nodes that torch traces, so equal calls look equal."""
        values = self._values()
        for argument in reversed(self.op._schema.arguments):
            last = values[-1]
            if not argument.has_default_value() or isinstance(last, Node) or last != argument.default_value:
                break
            values.pop()
        return tuple(values)

    def _values(self) -> list[Any]:
        return [_plain(getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]

    def emit(self, graph: Graph, near: Node) -> Node:
        """Add the call at the graph's insertion point, with the metadata of the node it serves and its fake value."""
        return emit(graph, near, self.op, *self.arguments())

    def emit_results(self, graph: Graph, near: Node) -> list[Node]:
        """The same of an op that returns several tensors: the nodes that take them out of its tuple."""
        node = self.emit(graph, near)
        return [emit(graph, near, operator.getitem, node, i) for i in range(len(self.op._schema.returns))]


@cache
def _parsers(view: type[View]) -> dict[str, Any]:
    """Field → what makes its value of the argument, where that is not the value itself."""
    kinds = get_type_hints(view).items()
    texts = {name: TEXTS[kind] for name, kind in kinds if kind in TEXTS}
    return texts | {name: tuple for name, kind in kinds if get_origin(kind) is tuple}


def _plain(value: Any) -> Any:
    """A field's value as the op takes it."""
    return str(value) if type(value) in TEXTS else list(value) if type(value) is tuple else value


# --- from operands to codes and back --------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakeQuantize(View):
    op = ops.fake_quantize.default
    x: Node
    operand: Operand
    axis: int
    seed: Node | None = None


@dataclass(frozen=True)
class SplitGradient(View):
    op = ops.split_gradient.default
    y: Node
    twins: tuple[Node, ...]
    operand: Operand | None
    rows: tuple[int, ...]
    contracted: tuple[int, ...]
    bits: Node | None = None


@dataclass(frozen=True)
class ReadAgain(View):
    op = ops.read_again.default
    x: Node
    operand: Operand
    rows: tuple[int, ...]
    contracted: tuple[int, ...]
    bits: Node | None = None


@dataclass(frozen=True)
class OperandStatistics(View):
    op = ops.operand_statistics.default
    x: Node
    operand: Operand
    axis: int
    seed: Node | None = None


@dataclass(frozen=True)
class Quantize(View):
    op = ops.quantize.default
    x: Node
    quantizer: Quantizer
    axis: int
    global_scale: Node | None = None
    seed: Node | None = None
    fold: Node | None = None
    transform: Transform = _NO_TRANSFORM


@dataclass(frozen=True)
class QuantizeGroups(View):
    op = ops.quantize_groups.default
    x: Node
    quantizer: Quantizer
    axis: int
    offs: Node
    fold: Node


@dataclass(frozen=True)
class DequantizeGroups(View):
    op = ops.dequantize_groups.default
    codes: Node
    scales: Node
    quantizer: Quantizer
    offs: Node
    size: Size
    dtype: torch.dtype


@dataclass(frozen=True)
class QuantizeCompensated(View):
    op = ops.quantize_compensated.default
    x: Node
    operand: Operand
    axis: int


@dataclass(frozen=True)
class QuantizeProduced(View):
    op = ops.quantize_produced.default
    a: Node
    b: Node | None
    c: Node | None
    d: Node | None
    producer: Producer
    operand: Operand


@dataclass(frozen=True)
class EncodeCompensated(View):
    op = ops.encode_compensated.default
    x: Node
    bounds: Node
    operand: Operand
    axis: int


@dataclass(frozen=True)
class Dequantize(View):
    op = ops.dequantize.default
    codes: Node
    scales: Node
    quantizer: Quantizer
    axis: int
    size: Size
    dtype: torch.dtype
    global_scale: Node | None = None


@dataclass(frozen=True)
class Hadamard(View):
    op = ops.hadamard.default
    x: Node
    block: int
    axis: int
    mask: Node | None = None


@dataclass(frozen=True)
class ClampOutliers(View):
    op = ops.clamp_outliers.default
    x: Node
    clamp: OutlierClamp
    axis: int


@dataclass(frozen=True)
class RestoreOutliers(View):
    op = ops.restore_outliers.default
    x: Node
    values: Node
    positions: Node
    clamp: Outliers
    axis: int


# --- estimators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EstimatorMask(View):
    op = ops.estimator_mask.default
    x: Node
    scales: Node
    quantizer: Quantizer
    estimator: EstimatorSpec
    axis: int
    global_scale: Node | None = None
    transform: Transform = _NO_TRANSFORM


@dataclass(frozen=True)
class MaskGradient(View):
    op = ops.mask_gradient.default
    grad: Node
    mask: Node
    axis: int


@dataclass(frozen=True)
class ScaleGradient(View):
    op = ops.scale_gradient.default
    grad: Node
    x: Node
    scales: Node
    quantizer: Quantizer
    estimator: EstimatorSpec
    axis: int
    global_scale: Node | None = None


# --- products -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProductOperand:
    """One operand of a product: the tensors it is stored in, and how the product reads them.

    Attributes:
        tensors: as ``encoding`` lists them. Codes are stored ``[batch…, rows, size]``, with the axis last that they
            were quantized along; a dense tensor is ``[batch…, M, K]`` on the left and ``[batch…, K, N]`` on the right.
        size: length of that last axis, which codes do not tell; 0 of a dense operand.
        contracts_rows: whether the product sums over the axis before the last one.
    """

    tensors: tuple[Node, ...]
    encoding: Encoding
    size: Size = 0
    contracts_rows: bool = False

    @property
    def parts(self) -> Parts:
        """The tensors by name; not of a dense operand."""
        return self.encoding.parts(self.tensors)

    @property
    def takes_columns(self) -> bool:
        """Whether some columns lie beside the codes, the same ones of every row."""
        spec = self.encoding.operand
        return spec is not None and isinstance(spec.outliers, OutlierColumns)

    @property
    def first(self) -> Node:
        """Its codes, or the dense tensor."""
        return self.tensors[0]

    @property
    def length(self) -> Any:
        """``size`` as a number or SymInt, whatever computes it."""
        return self.size.meta["val"] if isinstance(self.size, Node) else self.size


@dataclass(frozen=True)
class QuantizedMM(View):
    """In the schema an operand is four arguments: tensors, text, size, and whether it is read transposed."""

    op = ops.quantized_mm.default
    a: ProductOperand
    b: ProductOperand
    dtype: torch.dtype
    bias: Node | None = None
    offs: Node | None = None

    @classmethod
    def _made_of(cls, given: dict[str, Any]) -> Self:
        a, b = (
            ProductOperand(
                tuple(given[side]),
                Encoding.parse(given[f"{side}_operand"]),
                given[f"{side}_size"],
                bool(given[f"{side}_transposed"]) == (side == "a"),
            )
            for side in "ab"
        )
        return cls(a, b, given["dtype"], given.get("bias"), given.get("offs"))

    def _values(self) -> list[Any]:
        values: list[Any] = []
        for operand, left in ((self.a, True), (self.b, False)):
            values += [list(operand.tensors), str(operand.encoding), operand.size, operand.contracts_rows == left]
        return [*values, self.dtype, self.bias, self.offs]

    @property
    def operands(self) -> tuple[ProductOperand, ProductOperand]:
        return self.a, self.b

    @property
    def contracts_groups(self) -> bool:
        """Whether the axis is in groups that it sums over, not the rows of ``a``."""
        return self.offs is not None and bool(self.b.first.meta["val"].dim() == 2)

    def has_scales_of_groups(self, operand: ProductOperand) -> bool:
        """Whether an operand, of :class:`QuantizeGroups`, has a scale for every row and group of the contraction."""
        if operand.encoding.operand is None or not self.contracts_groups:
            return False
        codes, scales = operand.parts[:2]
        return bool(scales.meta["val"].dim() > codes.meta["val"].dim())


# --- between `lower` and the kernels --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantize8Bit(View):
    op = ops.quantize_8bit.default
    x: Node
    quantizer: Quantizer
    packed: bool
    fold: Node | None = None


@dataclass(frozen=True)
class Quantize8BitMasked(View):
    op = ops.quantize_8bit_masked.default
    x: Node
    operand: Operand
    packed: bool
    eight_bit: bool = True


@dataclass(frozen=True)
class Quantize8BitTransposed(View):
    op = ops.quantize_8bit_transposed.default
    x: Node
    quantizer: Quantizer
    transform: Transform = _NO_TRANSFORM


@dataclass(frozen=True)
class Quantize8BitPair(View):
    op = ops.quantize_8bit_pair.default
    x: Node
    quantizer: Quantizer
    fold: Node | None
    fold_rows: Node | None


@dataclass(frozen=True)
class QuantizeGroupsPair(View):
    op = ops.quantize_groups_pair.default
    x: Node
    quantizer: Quantizer
    offs: Node
    fold: Node
    fold_rows: Node


@dataclass(frozen=True)
class Recode(View):
    op = ops.recode.default
    codes: Node
    quantizer: Quantizer
    size: Size
    transposed: bool
    offs: Node | None = None


@dataclass(frozen=True)
class TransposeCodes(View):
    op = ops.transpose_codes.default
    codes: Node
    size: Size


@dataclass(frozen=True)
class Mm8Bit(View):
    op = ops.mm_8bit.default
    a: Node
    b: Node
    scale_a: Node
    scale_b: Node
    dtype: torch.dtype
    bias: Node | None = None
    offset_a: Node | None = None
    offset_b: Node | None = None


@dataclass(frozen=True)
class Mm8BitGrouped(View):
    op = ops.mm_8bit_grouped.default
    a: Node
    b: Node
    offs: Node
    scale_a: Node
    scale_b: Node
    dtype: torch.dtype
    bias: Node | None = None


@dataclass(frozen=True)
class Mm1Bit(View):
    op = ops.mm_1bit.default
    a: Node
    b: Node
    scale_a: Node
    scale_b: Node
    dtype: torch.dtype
    bias: Node | None = None
    offset_a: Node | None = None
    offset_b: Node | None = None


@dataclass(frozen=True)
class CountBits(View):
    op = ops.count_bits.default
    codes: Node


@dataclass(frozen=True)
class MmBlockScaled(View):
    op = ops.mm_block_scaled.default
    a: Node
    b: Node
    scale_a: Node
    scale_b: Node
    global_a: Node | None
    global_b: Node | None
    dtype: torch.dtype
    bias: Node | None = None


@dataclass(frozen=True)
class MmStored(View):
    op = ops.mm_stored.default
    x: Node
    codes: Node
    scales: Node
    stored: Stored
    size: Size
    rows: bool
    dtype: torch.dtype
    bias: Node | None = None
    second: Node | None = None
    offset: Node | None = None
    high_first: bool = False


@dataclass(frozen=True)
class MmAdd(View):
    op = ops.mm_add.default
    sum: Node
    a: Node
    b: Node


#: Op → its view.
VIEW_OF: dict[Any, type[View]] = {view.op: view for view in View.__subclasses__()}

#: What makes codes, scales and residuals of a tensor.
ENCODERS: tuple[type[View], ...] = (Quantize, QuantizeCompensated, ClampOutliers)


def encoder_of(node: Any) -> tuple[View, int] | None:
    """The view of the encoder that ``node`` is a result of, and which one; ``None`` for any other node."""
    item = item_of(node)
    views = (view.match(item[0]) for view in ENCODERS) if item else ()
    found = next((view for view in views if view is not None), None)
    return None if item is None or found is None else (found, item[1])
