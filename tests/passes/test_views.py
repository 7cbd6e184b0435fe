"""Typed views of the ops. What would break: a pass that reads an argument under another's name, or leaves one out,
after an op's schema has changed; a call that looks other than the one that torch traces.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, get_type_hints

import pytest
import torch
from torch.fx import Graph, Node

from qcompile.ir.encoding import Encoding
from qcompile.ir.operand import Operand
from qcompile.passes import views
from qcompile.passes.views import VIEW_OF, ProductOperand, Quantize, QuantizedMM, View

#: Type in a schema → types of a field.
FIELD_TYPES: dict[str, set[Any]] = {
    "Tensor": {Node},
    "Tensor?": {Node | None},
    "Tensor[]": {tuple[Node, ...]},
    "int[]": {tuple[int, ...]},
    "str": set(views.TEXTS),
    "str?": {Operand | None},
    "int": {int},
    "SymInt": {views.Size},
    "bool": {bool},
    "ScalarType": {torch.dtype},
}


def ops() -> list[Any]:
    """All ops of the dialect, as torch knows them."""
    names = {name.removeprefix("qcompile::") for name in torch._C._dispatch_get_all_op_names() if "qcompile::" in name}
    return [getattr(torch.ops.qcompile, name.partition(".")[0]).default for name in sorted(names)]


def described(view: type[View]) -> list[tuple[str, Any, Any]]:
    """Name, type and default of every argument, as the view's fields have them."""
    hints, found = get_type_hints(view), []
    for field in fields(view):  # type: ignore[arg-type]
        if hints[field.name] is ProductOperand:
            name = field.name
            found += [(name, tuple[Node, ...], MISSING), (f"{name}_operand", Encoding, MISSING)]
            found += [(f"{name}_size", views.Size, MISSING), (f"{name}_transposed", bool, MISSING)]
        else:
            default = views._plain(field.default) if field.default is not MISSING else MISSING
            found.append((field.name, hints[field.name], default))
    return found


def test_every_op_has_one_view() -> None:
    assert set(ops()) == set(VIEW_OF)
    assert len(VIEW_OF) == len(View.__subclasses__())


@pytest.mark.parametrize("op", ops(), ids=str)
def test_fields_are_the_arguments_of_the_schema(op: Any) -> None:
    arguments, found = op._schema.arguments, described(VIEW_OF[op])
    types = [text.split()[0] for text in str(op._schema).partition("(")[2].partition(")")[0].split(", ")]
    assert [name for name, _, _ in found] == [argument.name for argument in arguments]
    for (name, kind, default), argument, schema_type in zip(found, arguments, types, strict=True):
        assert kind in FIELD_TYPES[schema_type], (name, schema_type)
        assert default == (argument.default_value if argument.has_default_value() else MISSING), name


def test_a_view_reads_what_it_writes() -> None:
    """By position, by keyword, and with what torch leaves out."""
    graph = Graph()
    x, fold = graph.placeholder("x"), graph.placeholder("fold")
    text = "e2m1 row absmax even"
    short = graph.call_function(Quantize.op, (x, text, -1))
    full = graph.call_function(Quantize.op, (x, text, -1, None, None, fold), {"transform": "hadamard(8)"})
    assert Quantize.of(short).arguments() == (x, text, -1)
    assert Quantize.of(short).transform.rotation == 1
    assert Quantize.of(full).arguments() == (x, text, -1, None, None, fold, "hadamard(8)")
    assert Quantize.of(full).quantizer.format.name == "e2m1"


def test_operands_of_a_product_are_one_argument() -> None:
    """What they contract does not depend on the side they stand on: x wᵀ contracts the stored last axis of both."""
    graph = Graph()
    codes, scales, dense = (graph.placeholder(name) for name in ("codes", "scales", "dense"))
    quantized = [codes, scales], "e2m1 row absmax even; ste", 20
    for left, right, rows in (
        ((*quantized, False), (*quantized, True), (False, False)),
        ((*quantized, True), ([dense], "dense", 0, False), (True, True)),
        (([dense], "dense", 0, False), ([codes], "levels e2m1", 20, False), (False, True)),
    ):
        node = graph.call_function(QuantizedMM.op, (*left, *right, torch.float32))
        view = QuantizedMM.of(node)
        assert (view.a.contracts_rows, view.b.contracts_rows) == rows
        assert view.arguments() == node.args


def test_another_node_is_refused() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    negated = graph.call_function(torch.ops.aten.neg.default, (x,))
    with pytest.raises(TypeError, match=r"Quantize.of takes a call of qcompile.quantize.default; got neg_?\w*, a call"):
        Quantize.of(negated)
    assert Quantize.match(x) is None
