"""How a product may be spelled, and where its operands are.

:data:`SPELLINGS` is the table of what is understood; :data:`OUT_OF_SCOPE` names the products that are seen but left
alone. A new spelling is one entry.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from qcompile import compat

from .graph import value_of

__all__ = ["ATTENTION", "HIGHER_ORDER_ATTENTION", "Frame", "Recognized", "Slot", "is_in", "recognize"]


@dataclass(frozen=True)
class Frame:
    """Reshaping that turns an operand into rows × contraction axis before it is quantized, and back afterwards.

    ``flatten``: merge the axes from this one on (a convolution's weight, or its whole sample). ``patch``: kernel
    extents of a convolution whose windows tile its input; each window becomes a row.
    """

    flatten: int | None = None
    patch: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Slot:
    """One operand of a GEMM: where the node holds it and which axis is contracted."""

    position: int
    keyword: str
    axis: int
    frame: Frame | None = None
    kind: str = "activation"
    note: str = ""
    item: int | None = None
    """Index into the argument where it is a list of operands (einsum)."""

    def of(self, node: Node) -> Any:
        argument = node.args[self.position] if self.position < len(node.args) else node.kwargs.get(self.keyword)
        return argument if self.item is None else argument[self.item]  # type: ignore[index]

    def size(self, node: Node) -> Any:
        """How many elements a row of the operand has, along the axis it is quantized on."""
        shape = self.of(node).meta["example_value"].shape
        if self.frame is None:
            return shape[self.axis]
        if self.frame.flatten is not None:
            return math.prod(shape[self.frame.flatten :])
        return shape[1] * math.prod(self.frame.patch or ())


class Unsupported(Exception):  # noqa: N818  (a reason, not an error)
    """A spelling recognized as a GEMM but not in a form we quantize; the message is the reason in the plan."""


Locate = Callable[[Node], tuple[Slot, Slot]]


# --- spellings ------------------------------------------------------------------------------------------------------


_VECTORS = "a product of two vectors"


def _fixed(a: tuple[int, str, int], b: tuple[int, str, int]) -> Locate:
    slots = (Slot(*a), Slot(*b))
    return lambda node: slots


def _matmul(left: int, right: int, right_name: str) -> Locate:
    def locate(node: Node) -> tuple[Slot, Slot]:
        slots = Slot(left, "input", -1), Slot(right, right_name, -2)
        dims = [value_of(slot.of(node)).dim() for slot in slots]
        if dims == [1, 1]:
            raise Unsupported(_VECTORS)
        return slots if dims[1] > 1 else (slots[0], replace(slots[1], axis=-1))

    return locate


def _tensordot(node: Node) -> tuple[Slot, Slot]:
    dims: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dims", 2)
    if isinstance(dims, int) and dims == 1:
        return Slot(0, "a", -1), Slot(1, "b", 0)
    listed = isinstance(dims, (list, tuple)) and len(dims) == 2 and all(isinstance(d, (list, tuple)) for d in dims)
    if listed and len(dims[0]) == 1:
        return Slot(0, "a", dims[0][0]), Slot(1, "b", dims[1][0])
    msg = "tensordot contracts several axes; one scale per row needs a single contraction axis"
    raise Unsupported(msg)


def _einsum(node: Node) -> tuple[Slot, Slot]:
    equation, *operands = node.args
    if not isinstance(equation, str):
        msg = "einsum in sublist form; write the equation as a string"
        raise Unsupported(msg)
    nested = len(operands) == 1 and isinstance(operands[0], (list, tuple))
    values: Any = operands[0] if nested else operands
    if len(values) != 2:
        msg = f"einsum of {len(values)} operands; only products of two are quantized"
        raise Unsupported(msg)
    inputs, _, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not output:
        letters = inputs.replace(",", "").replace(".", "")
        output = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    for term in terms:
        letters = term.replace(".", "")
        if len(set(letters)) != len(letters):
            msg = f"einsum {equation!r} takes a diagonal"
            raise Unsupported(msg)
    contracted = [c for c in terms[0] if c != "." and c in terms[1] and c not in output]
    if len(contracted) != 1:
        msg = f"einsum {equation!r} contracts {len(contracted)} pairs of axes; exactly one is supported"
        raise Unsupported(msg)
    axes = [_letter_axis(term, contracted[0]) for term in terms]
    if nested:
        return Slot(1, "operands", axes[0], item=0), Slot(1, "operands", axes[1], item=1)
    return Slot(1, "operands", axes[0]), Slot(2, "operands", axes[1])


def _letter_axis(term: str, letter: str) -> int:
    """Axis of a letter, counted from the end if an ellipsis stands before it."""
    head, dots, tail = term.partition("...")
    if letter in head:
        return head.index(letter)
    return tail.index(letter) - len(tail) if dots else term.index(letter)


def _divides(kernel: tuple[int, ...], extents: Sequence[Any]) -> bool:
    """Whether windows fill an input; decided by a guard where its size is symbolic."""
    return all(compat.guarded_bool(extent % size == 0) for extent, size in zip(extents, kernel, strict=True))


def _conv(dims: int) -> Locate:
    """Convolutions contract channels × window. The weight's rows are its output channels. The input's rows depend on
    how windows overlap: per position for 1×1, per window where the windows tile the input, else one scale a sample,
    since an element that several windows read cannot carry the scale of each."""

    def locate(node: Node) -> tuple[Slot, Slot]:
        def argument(index: int, name: str, default: Any) -> Any:
            return node.args[index] if index < len(node.args) else node.kwargs.get(name, default)

        def per_axis(value: Any) -> tuple[int, ...]:
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            return value * dims if len(value) == 1 else value

        stride, padding = argument(3, "stride", 1), argument(4, "padding", 0)
        dilation, groups = per_axis(argument(5, "dilation", 1)), argument(6, "groups", 1)
        x, weight = value_of(Slot(0, "input", 0).of(node)), value_of(Slot(1, "weight", 0).of(node))
        kernel = tuple(int(k) for k in weight.shape[2:])
        unpadded = padding == "valid" or (not isinstance(padding, str) and not any(per_axis(padding)))
        weight_slot = Slot(1, "weight", -1, Frame(flatten=1))
        channels = x.dim() - dims - 1
        if groups == 1 and all(k == 1 for k in kernel):
            return Slot(0, "input", channels, note="one scale per position"), weight_slot
        tiled = per_axis(stride) == kernel and all(d == 1 for d in dilation) and x.dim() == dims + 2
        if groups == 1 and unpadded and tiled and _divides(kernel, x.shape[2:]):
            return Slot(
                0, "input", -1, Frame(patch=kernel), note="one scale per window (windows tile the input)"
            ), weight_slot
        note = "one scale per sample: windows overlap or leave a rest, so a position has no scale of its own"
        return Slot(0, "input", -1, Frame(flatten=channels), note=note), weight_slot

    return locate


_LINEAR = _fixed((0, "input", -1), (1, "weight", -1))
_MATMUL = _matmul(0, 1, "other")
_MM = _matmul(0, 1, "mat2")
_ADDMM = _fixed((1, "mat1", -1), (2, "mat2", -2))
_ADDBMM = _fixed((1, "batch1", -1), (2, "batch2", -2))
_INNER = _fixed((0, "input", -1), (1, "other", -1))
_GROUPED = _fixed((0, "input", -1), (1, "mat2", -2))

#: Function target → (op kind, where its operands are). Methods and ATen overloads are added below.
SPELLINGS: dict[Any, tuple[str, Locate]] = {
    F.linear: ("linear", _LINEAR),
    torch.matmul: ("matmul", _MATMUL),
    torch.linalg.matmul: ("matmul", _MATMUL),
    operator.matmul: ("matmul", _MATMUL),
    operator.imatmul: ("matmul", _MATMUL),
    torch.mm: ("mm", _MM),
    torch.mv: ("mv", _fixed((0, "input", -1), (1, "vec", -1))),
    torch.addmv: ("addmv", _fixed((1, "mat", -1), (2, "vec", -1))),
    torch.bmm: ("bmm", _MM),
    torch.addmm: ("addmm", _ADDMM),
    torch.addbmm: ("addbmm", _ADDBMM),
    torch.baddbmm: ("baddbmm", _ADDBMM),
    torch.inner: ("inner", _INNER),
    torch.functional.einsum: ("einsum", _einsum),
    torch.functional.tensordot: ("tensordot", _tensordot),
    torch.conv1d: ("conv1d", _conv(1)),
    torch.conv2d: ("conv2d", _conv(2)),
    torch.conv3d: ("conv3d", _conv(3)),
    torch._grouped_mm: ("grouped_mm", _GROUPED),
}

#: Tensor methods with the signature of the function of the same name; in-place forms read the same operands.
_METHODS = ("matmul", "mm", "mv", "addmv", "bmm", "addmm", "addbmm", "baddbmm", "inner")
for _name in _METHODS:
    SPELLINGS[_name] = SPELLINGS[getattr(torch, _name)]
    SPELLINGS[f"{_name}_"] = SPELLINGS[getattr(torch, _name)]
SPELLINGS["__matmul__"] = SPELLINGS["__imatmul__"] = ("matmul", _MATMUL)
SPELLINGS["__rmatmul__"] = ("matmul", _fixed((1, "other", -1), (0, "self", -2)))

#: ATen packets; an overload is looked up by its packet.
for _name in ("linear", *_METHODS, "conv1d", "conv2d", "conv3d", "_grouped_mm"):
    _function = F.linear if _name == "linear" else getattr(torch, _name)
    SPELLINGS[getattr(torch.ops.aten, _name)] = SPELLINGS[_function]
if hasattr(F, "grouped_mm"):
    SPELLINGS[F.grouped_mm] = ("grouped_mm", _GROUPED)

#: Ops of other libraries with a known meaning, by qualified name (they are registered only once that library is
#: imported).
NAMED_SPELLINGS: dict[str, tuple[str, Locate]] = {
    "transformers::grouped_mm_fallback": ("grouped_mm", _GROUPED),
}

ATTENTION = "attention is left in high precision (as in every published recipe)"
_OPAQUE = "one opaque op; its products are not visible in the graph"
_FAST_PATH = f"{_OPAQUE} (without torch.backends.mha.set_fastpath_enabled(False), which shows them)"
#: Products that are recognized and left alone, with the reason.
OUT_OF_SCOPE: dict[Any, tuple[str, str]] = {
    F.scaled_dot_product_attention: ("sdpa", ATTENTION),
    torch.ops.aten.scaled_dot_product_attention: ("sdpa", ATTENTION),
    F.multi_head_attention_forward: ("multi_head_attention", _OPAQUE),
    torch._transformer_encoder_layer_fwd: ("transformer_encoder_layer", _FAST_PATH),
    torch._native_multi_head_attention: ("multi_head_attention", _FAST_PATH),
    torch.bilinear: ("bilinear", "contracts two axes at once; no scale per row factors out"),
    F.bilinear: ("bilinear", "contracts two axes at once; no scale per row factors out"),
    torch.chain_matmul: ("chain_matmul", "the order of products is chosen at run time"),
    torch.linalg.multi_dot: ("multi_dot", "the order of products is chosen at run time"),
    torch.dot: ("dot", _VECTORS),
    torch.conv_transpose1d: ("conv_transpose1d", "output windows overlap; its operands have no exact scale per row"),
    torch.conv_transpose2d: ("conv_transpose2d", "output windows overlap; its operands have no exact scale per row"),
    torch.conv_transpose3d: ("conv_transpose3d", "output windows overlap; its operands have no exact scale per row"),
    torch.cdist: ("cdist", "a distance, not a product"),
    "dot": ("dot", _VECTORS),
    **{rnn: (rnn.__name__, _OPAQUE) for rnn in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
}
HIGHER_ORDER_ATTENTION = ("flex_attention", "flex_attention_backward")


@dataclass(frozen=True)
class Recognized:
    """A product, by its spelling alone. ``obstacle`` says why it cannot be quantized; empty if it may be."""

    op: str
    slots: tuple[Slot, ...] = ()
    obstacle: str = ""


def recognize(node: Node) -> Recognized | None:
    """What product a call is; ``None`` for anything else."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        named = NAMED_SPELLINGS.get(target.name().partition(".")[0])
        target = target.overloadpacket
    else:
        named = NAMED_SPELLINGS.get(getattr(target, "_qualified_op_name", ""))
    if is_in(OUT_OF_SCOPE, target):
        op, reason = OUT_OF_SCOPE[target]
        return Recognized(op, obstacle=reason)
    if str(target) in HIGHER_ORDER_ATTENTION:
        return Recognized("flex_attention", obstacle=ATTENTION)
    entry = named or (SPELLINGS[target] if is_in(SPELLINGS, target) else None)
    if entry is None:
        return None
    op, locate = entry
    try:
        return Recognized(op, locate(node))
    except Unsupported as reason:
        return Recognized(op, obstacle=str(reason))


def is_in(table: Container[Any], target: Any) -> bool:
    """Whether a call's target is in a table; unhashable ones are in none."""
    try:
        return target in table
    except TypeError:
        return False
