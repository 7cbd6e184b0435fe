"""Masks of attention that are only causal, told to attention as what they are.

Before::

    arange ─► le ─► expand ──────────────┐
    k ─► unsqueeze ─► expand ─► reshape ─► scaled_dot_product_attention(q, ·, ·, ·)

After::

    k ─► scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

Models hand attention masks that they build from positions, and for a mask torch has no fast kernel: on CUDA it must be
read for every score, and flash attention takes none. A mask that follows from the graph alone (`constants.py`) is
evaluated, once for all calls that read it. If query i sees the keys j ≤ i and no others, the call gets
``is_causal=True``; if all queries see all keys, no mask. Both compute the same; what differs is the kernel, so rounding
and the numbers that dropout draws.

Repeated heads of keys and values serve attention with a mask, too: the kernels that read one take no grouped heads.
Where the mask is gone they stay as few as they are, unless torch would then leave its fused kernel.

What cannot be proven stays, and the report says why. So it does where the new kernel would lay its result out in memory
in another way, since the graph may take a view of it, or where there is no fused one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qcompile import compat

from .constants import Constants, NotConstant
from .graph import argument_of, graph_modules, input_of, same_sizes, static_size, value_of
from .pass_base import MaskedAttention, Observations
from .spellings import name_of

__all__ = ["causal_masks", "remark"]

#: The first parameters of ``scaled_dot_product_attention``; those behind ``is_causal`` have keywords only.
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

#: A mask that adds this or less to a score hides the key from the softmax as −∞ does, if a row sees any key at all: no
#: two scores are as far apart. The least numbers of bfloat16, float32 and float64 are below it; that of float16 is not.
HIDDEN = -1e38
#: Elements of a mask that are compared at a time.
_CHUNK = 1 << 24

CAUSAL, NO_MASK = "is_causal=True", "no mask"
_BECOMES: dict[str, dict[str, Any]] = {
    CAUSAL: {"attn_mask": None, "is_causal": True},
    NO_MASK: {"attn_mask": None, "is_causal": False},
}


def causal_masks(gm: GraphModule) -> list[MaskedAttention]:
    """Rewrites ``gm`` and its nested bodies in place; returns what became of each call that has a mask."""
    if not any(_is_masked(node) for module in graph_modules(gm) for node in module.graph.nodes):
        return []
    rewriter = _Rewriter(gm)
    scopes = Constants.of_all(gm)
    found = [
        rewriter.rewrite(scope, node) for scope in scopes for node in list(scope.module.graph.nodes) if _is_masked(node)
    ]
    if any(call.became for call in found):
        for scope in scopes:
            scope.erase_unused()
            scope.module.graph.lint()
            scope.module.recompile()
    return found


def remark(graphs: Iterable[Observations]) -> str:
    """What to say of attention with masks; "" if there is none."""
    calls = [call for observed in graphs for call in observed.masked]
    if not calls:
        return ""
    became = Counter(call.became for call in calls if call.became)
    done = ", ".join(f"{count} {what}" for what, count in became.items()) or "none"
    grouped = sum(call.grouped for call in calls)
    heads = f"; {grouped} read grouped heads as they are" if grouped else ""
    left = Counter(call.reason for call in calls if call.reason)
    reasons = "".join(f"; {count}: {reason}" for reason, count in left.most_common())
    return f"attention with a mask: {len(calls)} call(s), of which needed less: {done}{heads}{reasons}"


class _Rewriter:
    def __init__(self, gm: GraphModule) -> None:
        self.fake_mode = compat.fake_mode_of(gm.graph)
        nodes = [node for module in graph_modules(gm) for node in module.graph.nodes]
        self.chooses_kernels = any(name_of(node) == "_sdpa_kernel" for node in nodes)
        self.patterns: dict[Any, tuple[str, str]] = {}
        self.kernels: dict[str, _Kernel] = {}

    def rewrite(self, scope: Constants, call: Node) -> MaskedAttention:
        arguments = _arguments(call)
        reason = self._obstacle(arguments)
        if reason:
            return MaskedAttention(reason=f"the mask stays: {reason}")
        became, reason = self._pattern(scope, call, arguments)
        if not became:
            return MaskedAttention(reason=f"the mask stays: {reason}")
        unmasked = arguments | _BECOMES[became]
        before, after = self._kernel(call, arguments), self._kernel(call, unmasked)
        if not after.replaces(before):
            return MaskedAttention(reason=f"the mask stays: with {became} it would run {after}, not {before}")
        grouped = _with_grouped_heads(unmasked)
        if grouped is not None and not (kernel := self._kernel(call, grouped)).is_like(after):
            reason, grouped = f"the heads stay repeated: grouped, it would run {kernel}, not {after}", None
        arguments = grouped or unmasked
        call.args = tuple(arguments.pop(name) for name in _PARAMETERS[:3])
        call.kwargs = arguments
        return MaskedAttention(became, grouped is not None, reason)

    def _obstacle(self, arguments: dict[str, Any]) -> str:
        """Why a call is left alone whatever its mask; "" if nothing speaks against it."""
        if self.chooses_kernels:
            return "the graph chooses its attention kernels itself (sdpa_kernel)"
        if arguments.get("is_causal", False) is not False or isinstance(arguments.get("dropout_p"), Node):
            return "is_causal or dropout_p is given by the graph's inputs"
        tensors = [value_of(arguments[name]) for name in _PARAMETERS[:4]]
        if any(compat.memory_of(tensor) is None for tensor in tensors):
            return "its operands are no plain tensors"
        return ""

    def _pattern(self, scope: Constants, call: Node, arguments: dict[str, Any]) -> tuple[str, str]:
        """What a call becomes, "" and why if it stays. One evaluation serves all calls that read a mask."""
        scope, mask, before = scope.source(arguments["attn_mask"], call)
        sizes = [static_size(value_of(arguments[name]).shape[-2]) for name in ("query", "key")]
        try:
            needed = scope.needed(mask, before)
            key = (mask, *needed, *sizes)
            if key not in self.patterns:
                self.patterns[key] = pattern_of(scope.evaluate(mask, needed), *sizes)
        except NotConstant as reason:
            return "", str(reason)
        return self.patterns[key]

    def _kernel(self, call: Node, arguments: dict[str, Any]) -> _Kernel:
        """What torch runs for a call with these arguments, asked as AOTAutograd will ask it."""
        dtype = value_of(call).dtype  # under autocast narrower than the operands'

        def narrowed(value: Any) -> Any:
            wide = isinstance(value, Tensor) and value.is_floating_point() and value.itemsize > dtype.itemsize
            return value.to(dtype) if wide else value

        values = {name: value_of(argument) for name, argument in arguments.items() if name != "scale"}
        described = [
            (name, v.shape, v.stride(), v.dtype, v.requires_grad) if isinstance(v, Tensor) else (name, v)
            for name, v in values.items()
        ]
        key = str((dtype, described))
        if key not in self.kernels:
            function: Any = call.target
            # The hooks of whoever counts what autograd saves are not for a trial.
            kept = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
            with self.fake_mode, kept, _Recorder() as recorder:
                result = function(**{name: narrowed(value) for name, value in values.items()})
            extents = zip(result.shape, result.stride(), strict=True)
            strides = ", ".join(str(step) for size, step in extents if static_size(size) != 1)
            self.kernels[key] = _Kernel(recorder.kernel, strides)
        return self.kernels[key]


@dataclass(frozen=True)
class _Kernel:
    """What runs attention: the ATen op of a fused kernel, "" for single operations; and how the result is laid out."""

    op: str
    strides: str

    def __str__(self) -> str:
        return f"{self.op or 'no fused kernel'} (strides {self.strides})"

    def replaces(self, other: _Kernel) -> bool:
        """Whether a graph may take this for ``other``: views of the result are as valid, and it is as fused."""
        return self.strides == other.strides and (bool(self.op) or not other.op)

    def is_like(self, other: _Kernel) -> bool:
        """Whether this is the same fused kernel."""
        return self == other and bool(self.op)


class _Recorder(compat.TorchDispatchMode):
    """Notes which fused kernel ``scaled_dot_product_attention`` is made of."""

    kernel = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name.startswith("_scaled_dot_product_") and "attention_math" not in name:
            self.kernel = name
        return func(*args, **(kwargs or {}))


# --- masks ----------------------------------------------------------------------------------------------------------


def pattern_of(mask: Tensor, queries: int | None, keys: int | None) -> tuple[str, str]:
    """What attention with ``mask`` (boolean, or added to the scores) may be told instead, and "" if nothing: why.

    mask: broadcasts to [..., queries, keys]; sizes are ``None`` if they are not known. A causal mask is aligned with
    the first query and the first key, as ``is_causal`` is.
    """
    mask = mask[(None,) * (2 - mask.dim())] if mask.dim() < 2 else mask
    if queries is not None and keys is not None:
        mask = mask.expand(*mask.shape[:-2], queries, keys)
    for axis in range(mask.dim() - 2):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    rows, columns = mask.shape[-2:]
    step = max(1, _CHUNK // max(1, mask[..., :1, :].numel()))
    causal, full = queries is not None and keys is not None, True
    for start in range(0, rows, step):
        part = mask[..., start : start + step, :]
        seen = part if part.dtype == torch.bool else part == 0
        if part.dtype != torch.bool and not (seen | (part <= HIDDEN)).all():
            return "", "it adds other numbers than 0 and −∞"
        triangle = torch.arange(columns) <= torch.arange(start, start + part.shape[-2])[:, None]
        causal = causal and bool((seen == triangle).all())
        full = full and bool(seen.all())
        if not causal and not full:
            return "", "it is neither causal nor all true"
    return (NO_MASK if full else CAUSAL), ""


# --- calls ----------------------------------------------------------------------------------------------------------


def _is_masked(node: Node) -> bool:
    return name_of(node) == "scaled_dot_product_attention" and isinstance(argument_of(node, 3, "attn_mask"), Node)


def _arguments(call: Node) -> dict[str, Any]:
    """All that a call is given, by name."""
    return dict(zip(_PARAMETERS, call.args, strict=False)) | dict(call.kwargs)


def _with_grouped_heads(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments with keys and values before their heads were repeated; ``None`` unless both were, alike."""
    key, value = (_before_repeat(arguments[name]) for name in ("key", "value"))
    if key is None or value is None:
        return None
    heads = [value_of(node).shape[-3] for node in (arguments["query"], arguments["key"], key, value)]
    if not same_sizes(heads[::2], heads[1::2]):
        return None
    return arguments | {"key": key, "value": value, "enable_gqa": True}


def _before_repeat(repeated: Node) -> Node | None:
    """What the heads of ``repeated``, [..., heads, length, width], were repeated from, each in place: by
    ``repeat_interleave``, or by a new axis that is expanded and merged. Their shapes leave no other reading.
    """
    if name_of(repeated) == "repeat_interleave":
        times, axis, dims = (
            argument_of(repeated, 1, "repeats"),
            argument_of(repeated, 2, "dim"),
            value_of(repeated).dim(),
        )
        is_plain = isinstance(times, int) and axis in (-3, dims - 3) and bool(repeated.args)
        return input_of(repeated) if is_plain else None
    chain = [repeated]
    for names in _REPEAT:
        if name_of(chain[-1]) not in names or not chain[-1].args:
            return None
        chain.append(input_of(chain[-1]))
    _, spread, single, root = chain
    *batch, heads, length, width = value_of(root).shape
    *_, times, _, _ = value_of(spread).shape
    shapes = ([*batch, heads * times], [*batch, heads, times], [*batch, heads, 1])
    fits = all(same_sizes(value_of(x).shape, [*s, length, width]) for x, s in zip(chain, shapes, strict=False))
    return root if fits and _adds_an_axis(single) else None


#: How heads are repeated, from the last call to the first.
_REPEAT = (("reshape", "view", "flatten"), ("expand", "broadcast_to"), ("unsqueeze", "getitem", "__getitem__"))


def _adds_an_axis(node: Node) -> bool:
    """Whether an index takes everything."""
    if name_of(node) == "unsqueeze":
        return True
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(part is None or part is Ellipsis or part == slice(None) for part in index)
