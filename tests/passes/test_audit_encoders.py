"""What the report says runs the ops that quantize on a card: of MXFP4 it depends on where the operand lies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from qcompile.passes.audit import audit_encoders
from qcompile.passes.pass_base import EncoderKey, Observations

pytest.importorskip("triton")

ops, aten = torch.ops.qcompile, torch.ops.aten
MXFP4, NVFP4 = "e2m1 block32 e8m0 even", "e2m1 block16 e4m3 even"


def encoders(text: str, *before: tuple) -> list[tuple[str, str]]:
    """What is noted of a ``quantize`` of an input on a card, behind calls of ``before``, ops with more arguments."""
    graph, observed = Graph(), Observations()
    with FakeTensorMode():
        x = graph.placeholder("x")
        x.meta["val"] = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
        whole = graph.placeholder("whole")
        whole.meta["val"] = torch.empty((), device="cuda")
        for op, *arguments in before:
            x = called(graph, op, x, *arguments)
        called(graph, ops.quantize.default, x, text, -1, whole if text == NVFP4 else None)
    audit_encoders(graph, SimpleNamespace(observe=observed))  # type: ignore[arg-type]
    return [tuple(found) for found in observed.encoders[EncoderKey(text, "", torch.bfloat16)]]


def called(graph: Graph, op, *arguments) -> Node:
    node = graph.call_function(op, arguments)
    node.meta["val"] = op(*(a.meta["val"] if isinstance(a, Node) else a for a in arguments))
    return node


@pytest.mark.parametrize(
    "before",
    [(), ((ops.hadamard.default, 32, -1),), ((ops.hadamard.default, 32, -1), (aten.view.default, [32, 256]))],
)
def test_what_lies_in_memory_is_quantized_by_a_kernel_of_its_own(before):
    for text in (MXFP4, NVFP4):
        assert encoders(text, *before) == [("triton", "")]


def test_behind_a_producer_mxfp4_is_printed():
    assert encoders(MXFP4, (aten.gelu.default,)) == [("triton (inductor)", "")]
    assert encoders(NVFP4, (aten.gelu.default,)) == [("triton", "")]
