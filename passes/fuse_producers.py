"""Post-grad graphs: the kernel that quantizes an activation computes it, too.

Where a row's outliers are searched for, Inductor can only write the activation for another kernel to read. If nothing
else reads it, and it is pointwise work on tensors that are in memory anyway (SwiGLU of two products), that kernel does
the work::

    quantize_compensated(silu(gate) * up)   ─►   quantize_produced(gate, up, "neg(a); exp(%0); …; mul(%4, b)")

Experts' gate and up are halves of one product, and are read there; the kernel's rows have any stride.

Of each element two bytes are not written and two not read, and there is a launch less. The search waits for arithmetic,
though, so operations that take longer than that saves (`erf`) stay where they are (:func:`saved_microseconds`).

No bit changes (:mod:`qcompile.kernels.producer`), under two conditions. No product is added to anything, since
Inductor would contract the pair. And inputs come from memory: Inductor keeps what it computes in float32 until it
stores it, so a residual in front of a norm has more bits in the kernel that adds it than in the buffer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.kernels.matmul.costs import Rates, rates_of
from qcompile.kernels.producer import INPUTS, Producer, Step
from qcompile.kernels.register import supports_produced

from .dialect import lies_in_memory
from .graph import aten, is_call, is_cast, item_of, same_sizes, static_size
from .pass_base import Context
from .views import QuantizeCompensated, QuantizeProduced

__all__ = ["fuse_producers", "saved_microseconds"]

#: ATen op → operation of a producer. What else they take than tensors and numbers (``alpha``) has no place there.
_OPERATIONS: dict[Any, str] = {
    aten.neg.default: "neg",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.exp.default: "exp",
    aten.erf.default: "erf",
    aten.sigmoid.default: "sigmoid",
    torch.ops.prims.convert_element_type.default: "round",
}
Inputs = tuple[Node, Node | None, Node | None, Node | None]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: Bytes that an element of 16 bits takes to be written and read.
_BYTES = 4
#: Stands for a size that is known at run time only: launches do not count then.
_MANY_ROWS = 1 << 20


def fuse_producers(graph: Graph, context: Context) -> int:
    """Returns how many activations are computed where they are quantized."""
    count = 0
    for node in QuantizeCompensated.calls(graph):
        call = QuantizeCompensated.of(node)
        if (found := _producer_of(node, call)) is None:
            continue
        producer, inputs = found
        with graph.inserting_before(node):
            results = QuantizeProduced(*inputs, producer, call.operand).emit_results(graph, near=node)
        for user in list(node.users):
            item = item_of(user)
            assert item is not None
            user.replace_all_uses_with(results[item[1]])
        count += 1
    return count


def saved_microseconds(producer: Producer, elements: float, rates: Rates) -> float:
    """How much sooner ``elements`` are quantized than if they were written and read, by a card's rates."""
    return rates.passes(_BYTES * elements, 1) - producer.instructions * elements / rates.instructions


def _producer_of(node: Node, call: QuantizeCompensated) -> tuple[Producer, Inputs] | None:
    """What computes the activation that a call quantizes, and of what; ``None`` if the call should not do that."""
    value = call.x.meta["val"]
    size = static_size(value.shape[-1])
    capability = compat.tensor_core_capability(value.device)
    if capability is None or size is None or value.dtype.itemsize != 2 or call.axis % value.dim() != value.dim() - 1:
        return None
    if not (compat.keeps_float32() and supports_produced((value.dtype,), str(call.operand), size)[0]):
        return None
    chain = _chain(node, call.x)
    inputs = _inputs(chain, value)
    if inputs is None:
        return None
    producer = _written(chain, inputs)
    elements = math.prod(static_size(n) or _MANY_ROWS for n in value.shape)
    rates, _ = rates_of(compat.card_name(value.device))
    wins = saved_microseconds(producer, elements, rates) > 0
    return (producer, inputs) if wins and not producer.contracted else None


def _chain(node: Node, x: Node) -> list[Node]:
    """What has to be computed for x alone, which ``node`` alone reads, in order."""
    chain, pending = {node}, [x]
    while pending:
        candidate = pending.pop()
        if candidate not in chain and _is_step(candidate) and chain.issuperset(candidate.users):
            chain.add(candidate)
            pending += candidate.all_input_nodes
    return sorted(chain - {node})


def _is_step(node: Node) -> bool:
    """Whether a producer can do what a node does: to floating-point tensors, with numbers beside them."""
    if not is_call(node, *_OPERATIONS) or node.kwargs or node.meta["val"].dtype not in _FLOATS:
        return False
    operands = node.args[:1] if is_cast(node) else node.args
    return all(isinstance(a, (int, float, Node)) and not isinstance(a, bool) for a in operands) and all(
        a.meta["val"].dtype in _FLOATS for a in node.all_input_nodes
    )


def _inputs(chain: list[Node], value: torch.Tensor) -> Inputs | None:
    """What the steps read, one of the activation's shape first; ``None`` if not all is in memory of its device."""
    read = dict.fromkeys(a for node in chain for a in node.all_input_nodes if a not in chain)
    whole = [a for a in read if same_sizes(a.meta["val"].shape, value.shape)]
    there = all(_is_in_memory(a) and a.meta["val"].device == value.device for a in read)
    if not (whole and there) or len(read) > len(INPUTS):
        return None
    others = [a for a in read if a is not whole[0]]
    b, c, d = [*others, None, None, None][:3]
    return whole[0], b, c, d


def _is_in_memory(node: Node) -> bool:
    """Whether a kernel can read ``node`` where it is: rows of any stride (halves of a product), elements side by side
    (not every other one).
    """
    value = node.meta["val"]
    apart = value.dim() and static_size(value.shape[-1]) != 1 and static_size(value.stride(-1)) not in (0, 1)
    return not apart and lies_in_memory(node)


def _written(chain: list[Node], inputs: Inputs) -> Producer:
    names: dict[Any, str] = dict(zip(inputs, INPUTS, strict=False))
    steps = []
    for i, node in enumerate(chain):
        operation, operands = _OPERATIONS[node.target], node.args[:1] if is_cast(node) else node.args
        arguments = tuple(names[a] if isinstance(a, Node) else repr(float(a)) for a in operands)  # type: ignore
        steps.append(Step(operation, arguments, node.meta["val"].dtype))
        names[node] = f"%{i}"
    return Producer(tuple(steps))
