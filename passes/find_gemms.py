"""Find every GEMM of a Dynamo graph, however it is spelled.

Sees a graph as Dynamo captured it, bodies of higher-order ops included; changes nothing. Leaves a list of
:class:`Site`: which operands are contracted along which axis, whether each is a weight, what layer the GEMM belongs to,
and, where the spelling does not allow a scale per row, why.

:data:`SPELLINGS` is the table of what is understood; :data:`OUT_OF_SCOPE` names the products that are seen but left
alone. A new spelling is one entry.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from qcompile import compat

__all__ = ["Frame", "Site", "Slot", "find_gemms"]


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

    def put(self, node: Node, value: Any) -> None:
        """Let the node read ``value`` here."""
        if self.item is not None:
            operands = list(node.args[self.position])  # type: ignore[arg-type]
            operands[self.item] = value
            value = operands
        if self.position < len(node.args):
            node.update_arg(self.position, value)
        else:
            node.update_kwarg(self.keyword, value)

    def size(self, node: Node) -> Any:
        """How many elements a row of the operand has, along the axis it is quantized on."""
        shape = self.of(node).meta["example_value"].shape
        if self.frame is None:
            return shape[self.axis]
        if self.frame.flatten is not None:
            return math.prod(shape[self.frame.flatten :])
        return shape[1] * math.prod(self.frame.patch or ())


@dataclass
class Site:
    """One matrix product. ``obstacle`` says why it cannot be quantized; empty if it can. ``anonymous`` is the
    higher-order op around it, if any, whose backward does not say which site a node serves.
    """

    node: Node
    op: str
    slots: tuple[Slot, ...] = ()
    obstacle: str = ""
    name: str = ""
    body: str = ""
    shape: tuple[Any, ...] = ()
    weight_size: int | None = None
    index: int = -1
    training: bool = True
    anonymous: str = ""


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
        dims = [_value(slot.of(node)).dim() for slot in slots]
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
    terms, output = einsum_letters(node)
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


def einsum_letters(node: Node) -> tuple[list[str], str]:
    """Terms of the operands and of the result of an einsum whose equation is text."""
    inputs, arrow, output = str(node.args[0]).replace(" ", "").partition("->")
    letters = inputs.replace(",", "").replace(".", "")
    implied = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return inputs.split(","), output if arrow else ("..." if "..." in inputs else "") + implied


def _letter_axis(term: str, letter: str) -> int:
    """Axis of a letter, counted from the end if an ellipsis stands before it."""
    head, dots, tail = term.partition("...")
    if letter in head:
        return head.index(letter)
    return tail.index(letter) - len(tail) if dots else term.index(letter)


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
        x, weight = _value(Slot(0, "input", 0).of(node)), _value(Slot(1, "weight", 0).of(node))
        kernel = tuple(int(k) for k in weight.shape[2:])
        unpadded = padding == "valid" or (not isinstance(padding, str) and not any(per_axis(padding)))
        weight_slot = Slot(1, "weight", -1, Frame(flatten=1))
        channels = x.dim() - dims - 1
        if groups == 1 and all(k == 1 for k in kernel):
            return Slot(0, "input", channels, note="one scale per position"), weight_slot
        tiled = per_axis(stride) == kernel and all(d == 1 for d in dilation) and x.dim() == dims + 2
        extents = [static_size(size) for size in x.shape[2:]]
        exact = all(e is not None and e % k == 0 for e, k in zip(extents, kernel, strict=False))
        if groups == 1 and unpadded and tiled and exact:
            return Slot(
                0, "input", -1, Frame(patch=kernel), note="one scale per window (windows tile the input)"
            ), weight_slot
        note = "one scale per sample: windows overlap, so a position has no scale of its own"
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

_ATTENTION = "attention is left in high precision (as in every published recipe)"
_OPAQUE = "one opaque op; its products are not visible in the graph"
_FAST_PATH = f"{_OPAQUE} (without torch.backends.mha.set_fastpath_enabled(False), which shows them)"
#: Products that are recognized and left alone, with the reason.
OUT_OF_SCOPE: dict[Any, tuple[str, str]] = {
    F.scaled_dot_product_attention: ("sdpa", _ATTENTION),
    torch.ops.aten.scaled_dot_product_attention: ("sdpa", _ATTENTION),
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
_HIGHER_ORDER_ATTENTION = ("flex_attention", "flex_attention_backward")


# --- search ---------------------------------------------------------------------------------------------------------


def find_gemms(gm: GraphModule) -> list[Site]:
    """All GEMM sites of ``gm`` and of the bodies of its higher-order ops, in program order within each body."""
    sites = [site for body in _bodies(gm) for site in _find_in(body)]
    for index, site in enumerate(sites):
        site.index = index
        site.name = site.name or f"{site.op}_{index}"
    return sites


@dataclass(frozen=True)
class _Body:
    """A graph module reachable through higher-order ops; ``obstacle`` and ``anonymous`` hold for all its sites."""

    path: str
    module: GraphModule
    obstacle: str = ""
    anonymous: str = ""
    caller: tuple[_Body, Node] | None = None
    """Where its higher-order op is called."""

    def autocasts(self, node: Node, device: str) -> bool:
        """Whether autocast is on for ``device`` where a node of this body runs."""
        states = [
            self.caller[0].autocasts(self.caller[1], device) if self.caller else torch.is_autocast_enabled(device)
        ]
        for earlier in self.module.graph.nodes:
            if earlier is node:
                break
            name = _target_name(earlier)
            if name == "_enter_autocast":
                its_device, _, enabled, *_ = earlier.args
                states.append(bool(enabled) if its_device == device else states[-1])
            elif name == "_exit_autocast":
                states.pop()
        return states[-1]


#: Higher-order ops whose backward is traced without saying which node serves which site.
_ANONYMOUS_BACKWARD = ("cond", "while_loop", "scan", "map_impl")


def _bodies(gm: GraphModule) -> Iterator[_Body]:
    yield from _bodies_below(_Body("", gm))


def _bodies_below(body: _Body) -> Iterator[_Body]:
    yield body
    users = {node.target: node for node in body.module.graph.nodes if node.op == "get_attr"}
    for name, child in body.module.named_children():
        if not isinstance(child, GraphModule):
            continue
        caller = next(iter(users[name].users), None) if name in users else None
        operation = str(caller.target) if caller is not None else ""
        obstacle, anonymous = body.obstacle, body.anonymous
        if "autograd_function_apply" in operation:
            obstacle = "inside a torch.autograd.Function, whose backward is the user's own"
        elif operation in _HIGHER_ORDER_ATTENTION:
            obstacle = _ATTENTION
        elif operation in _ANONYMOUS_BACKWARD:
            anonymous = operation
        path = f"{body.path}.{name}" if body.path else name
        called = None if caller is None else (body, caller)
        yield from _bodies_below(_Body(path, child, obstacle, anonymous, called))


def _find_in(body: _Body) -> Iterator[Site]:
    functorch_depth = 0
    for node in body.module.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        target_name = getattr(node.target, "__name__", str(node.target))
        functorch_depth += target_name.endswith("_increment_nesting") - target_name.endswith("_decrement_nesting")
        site = _recognize(node)
        if site is None:
            continue
        site.body, site.name = body.path, layer_name(node)
        site.obstacle = site.obstacle or body.obstacle
        if not site.obstacle and functorch_depth:
            site.obstacle = "inside a torch.func transform (vmap, grad): estimators do not compose with it"
        site.anonymous = body.anonymous
        if site.slots:
            _describe(site)
            site.obstacle = site.obstacle or _mixed_precision(site, body)
        yield site


def _mixed_precision(site: Site, body: _Body) -> str:
    """What is wrong with operands of two dtypes where autocast does not make them one; the product itself raises."""
    values = [_value(slot.of(site.node)) for slot in site.slots]
    if len({value.dtype for value in values}) == 1 or body.autocasts(site.node, values[0].device.type):
        return ""
    return f"operands are {_dtypes(values)}, which the product itself refuses"


def _dtypes(values: list[Any]) -> str:
    return " × ".join(str(value.dtype).removeprefix("torch.") for value in values)


def _recognize(node: Node) -> Site | None:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        named = NAMED_SPELLINGS.get(target.name().partition(".")[0])
        target = target.overloadpacket
    else:
        named = NAMED_SPELLINGS.get(getattr(target, "_qualified_op_name", ""))
    if _lookup(OUT_OF_SCOPE, target):
        op, reason = OUT_OF_SCOPE[target]
        return Site(node, op, obstacle=reason)
    if str(target) in _HIGHER_ORDER_ATTENTION:
        return Site(node, "flex_attention", obstacle=_ATTENTION)
    entry = named or (SPELLINGS[target] if _lookup(SPELLINGS, target) else None)
    if entry is None:
        return None
    op, locate = entry
    try:
        return Site(node, op, locate(node))
    except Unsupported as reason:
        return Site(node, op, obstacle=str(reason))


def _lookup(table: Container[Any], target: Any) -> bool:
    try:
        return target in table
    except TypeError:  # unhashable targets are nobody's GEMM
        return False


def _describe(site: Site) -> None:
    """Fill in what the plan needs to know: weights, shapes, and obstacles that show in the operands."""
    node, values = site.node, [_value(slot.of(site.node)) for slot in site.slots]
    if not all(isinstance(v, torch.Tensor) for v in values) or not isinstance(_value(node), torch.Tensor):
        site.obstacle = site.obstacle or "its operands are not plain tensors"
        return
    if any(v.is_nested or v.layout is not torch.strided for v in values):
        site.obstacle = site.obstacle or "an operand is nested or sparse; only dense tensors are quantized"
        return
    origins = [origin(slot.of(node), node) for slot in site.slots]
    weights = [is_weight(source) for source in origins]
    if not any(weights):
        weights[1] = origins[0] is not origins[1] and is_functional_weight(origins[1], site.op)
    site.slots = tuple(
        replace(slot, kind="weight" if weight else "activation")
        for slot, weight in zip(site.slots, weights, strict=True)
    )
    contraction = static_size(_contraction_size(values[1], site.slots[1]))
    site.shape = (tuple(values[0].shape), tuple(values[1].shape))
    sizes = [v.numel() for v, s in zip(values, site.slots, strict=True) if s.kind == "weight"]
    site.weight_size = static_size(sizes[-1]) if sizes else None
    site.training = torch.is_grad_enabled() and any(v.requires_grad for v in values)
    parameter = next((parameter_name(o) for o, s in zip(origins, site.slots, strict=True) if s.kind == "weight"), "")
    site.name = _with_parameter(site.name, parameter)
    if site.obstacle:
        return
    if not all(v.dtype.is_floating_point for v in values):
        site.obstacle = f"operands are {_dtypes(values)}, not floating point"
    elif contraction is None:
        site.obstacle = "the contraction size is dynamic; mark it static"
    elif contraction <= 1:
        site.obstacle = f"contraction size {contraction}: an outer product, nothing is summed"
    elif any(static_size(v.numel()) == 0 for v in values):
        site.obstacle = "an operand is empty"


def _contraction_size(value: torch.Tensor, slot: Slot) -> Any:
    if slot.frame and slot.frame.flatten is not None:
        return torch.Size(value.shape[slot.frame.flatten :]).numel()
    return value.shape[slot.axis]


def _value(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else node


def static_size(size: Any) -> int | None:
    """The size as an int, or ``None`` if it is only known at run time. Specialized SymInts count as known."""
    if isinstance(size, int):
        return size
    known = size.node.maybe_as_int()
    return None if known is None else int(known)


# --- where operands come from ---------------------------------------------------------------------------------------

#: Python's in-place operators, by name.
IN_PLACE_OPERATORS = frozenset(
    {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor", "ilshift",
     "irshift", "setitem"}
)  # fmt: skip

#: Ops that keep an operand the same matrix up to layout and precision, or take rows or columns of it.
_TRANSPARENT_METHODS = frozenset(
    {
        "t", "transpose", "permute", "view", "reshape", "contiguous", "flatten", "unflatten", "expand", "squeeze",
        "unsqueeze", "to", "type", "float", "half", "bfloat16", "detach", "clone", "movedim", "swapaxes", "view_as",
        "type_as", "__getitem__", "chunk", "split", "narrow", "select", "unbind", "diagonal",
    }
)  # fmt: skip
_TRANSPARENT_FUNCTIONS = frozenset(
    {
        torch.t, torch.transpose,
        torch.permute, torch.reshape, torch.flatten, torch.unflatten,
        torch.squeeze, torch.unsqueeze, torch.movedim, torch.swapaxes, torch.clone, torch.detach, operator.getitem,
        torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind, torch.diagonal,
        torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.view.default,
        torch.ops.aten.split_with_sizes.default, torch.ops.aten.split.Tensor, torch.ops.aten.chunk.default,
    }
)  # fmt: skip


#: Those that may make memory of its own.
_COPIES = frozenset({"reshape", "contiguous", "flatten", "to", "type", "float", "half", "bfloat16", "clone", "type_as"})


def origin(node: Any, reader: Node) -> Any:
    """The node an operand of ``reader`` comes from through views, casts and attributes like ``.T``.

    A copy that something is written into before it is read holds data of its own, and a buffer then holds no weight
    (a cache of keys); a parameter stays one whatever is written into it.
    """
    written = False
    while isinstance(node, Node):
        written = written or _is_written(node, reader)
        if not node.args or not (writes_first_argument(node) or _is_transparent(node)):
            break
        if written and _target_name(node) in _COPIES:
            break
        node = node.args[0]
    return None if written and not compat.is_parameter(_value(node)) else node


def _is_transparent(node: Node) -> bool:
    attribute = node.target is getattr and node.args[1] in ("T", "mT", "H", "mH", "data")
    method = node.op == "call_method" and node.target in _TRANSPARENT_METHODS
    return attribute or method or (node.op == "call_function" and _lookup(_TRANSPARENT_FUNCTIONS, node.target))


def _target_name(node: Node) -> str:
    return getattr(node.target, "__name__", str(node.target))


def writes_first_argument(node: Node) -> bool:
    """Whether a call changes its first argument in place (and returns it, if anything)."""
    name = _target_name(node)
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return (name.endswith("_") and not name.endswith("__")) or name.strip("_") in IN_PLACE_OPERATORS


def _is_written(node: Node, before: Node) -> bool:
    """Whether anything is written into ``node``, or into a view of it, before ``before`` reads it."""
    for user in node.users:
        if user < before and user.args and user.args[0] is node:
            if writes_first_argument(user) or user.kwargs.get("inplace"):
                return True
            if _is_transparent(user) and _target_name(user) != "clone" and _is_written(user, before):
                return True
    return False


def is_weight(node: Any) -> bool:
    """A parameter or a buffer."""
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return False
    static = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") is not None
    return static or compat.is_parameter(_value(node))


def is_functional_weight(node: Any, op: str) -> bool:
    """A leaf input that requires grad and stands where a weight does: functional code passes weights that way.

    Of products that attention uses as well only matrices count: there, leaves of higher rank are queries, keys and
    values.
    """
    if not isinstance(node, Node) or node.op not in ("placeholder", "get_attr"):
        return False
    value = _value(node)
    if not isinstance(value, torch.Tensor) or not (value.requires_grad and value.is_leaf):
        return False
    return value.dim() == 2 or (value.dim() > 2 and op.startswith(("conv", "grouped")))


def parameter_name(node: Any) -> str:
    """Dotted name of a parameter placeholder, e.g. ``layers.0.weight``; "" where Dynamo does not tell (nested
    bodies).
    """
    if not isinstance(node, Node):
        return ""
    source = compat.source_name(node)
    parts = re.findall(r"\['([^']+)'\]|\.(\w+)|\[(\d+)\]", source.removeprefix("L").removeprefix("G"))
    names = [a or b or c for a, b, c in parts]
    return ".".join(n for n in names[1:] if n not in ("_modules", "_parameters", "_buffers"))


def layer_name(node: Node) -> str:
    """Dotted name of the innermost module whose forward called the GEMM; "" at the root."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    path = re.sub(r"^[LG]\['[^']*'\]\.?", "", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return ".".join(p for p in path.split(".") if p and p not in ("_modules", "_parameters", "_buffers"))


def _with_parameter(layer: str, parameter: str) -> str:
    """Tell apart several products of one module: ``experts`` with parameter ``experts.down_proj`` →
    ``experts.down_proj``, ``attention`` with ``attention.out_proj.weight`` → ``attention.out_proj``.
    """
    prefix = f"{layer}." if layer else ""
    if parameter == f"{prefix}weight":
        return layer
    if parameter.startswith(prefix):
        return parameter.removesuffix(".weight") or layer
    return layer
