"""The table of spellings against torch's own lists of ops: a product that torch has and the table lacks would be missed
without a word.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qcompile.passes.expand import COMPOSITES
from qcompile.passes.spellings import OUT_OF_SCOPE, SPELLINGS, name_of, recognize

KNOWN = SPELLINGS.keys() | OUT_OF_SCOPE.keys() | COMPOSITES

#: What is named like a product and is none, and why.
NO_PRODUCTS = {
    r"_?upsample_.*": "interpolation",
    r"_thnn_(fused|differentiable)_.*": "what a recurrent cell computes after its products",
    r".*(prepack|pack_gemm_matrix.*|pack_quantized_matrix|reorder_conv.*|flatten_weight|quantize_weight)": "a layout",
    r"_convert_.*|_cslt_sparse_mm_search": "a layout",
    r"linalg_(vector_norm|matrix_norm|norm|cond|matrix_rank|_powsum)": "a norm",
    r"linalg_(cross|diagonal|vander)|matrix_H|slice_inverse|trapz": "views, elementwise operations and sums",
    r"_compute_linear_combination": "how matrix_exp adds its products up",
}
_PARTS = (
    r"\w*mm|\w*mv|matmul|(slow_)?conv\w*|\w*dot|\w*linear|einsum|addr|ger|outer|inner|kron|[cp]dist|lstm|gru|rnn|attention"
    r"|matrix|chain|inverse|solve|cov|corrcoef|mha|trapz|gemm"
)
LIKE_A_PRODUCT = re.compile(
    rf"(^|_)({_PARTS})(_|\d|$)|^linalg_|cell|orgqr|ormqr|qr$|cholesky|^det$|logdet|slogdet|svd|grid_gen"
)


def is_known(name: str) -> bool:
    return bool({name, name.removesuffix("_")} & KNOWN) or any(re.fullmatch(pattern, name) for pattern in NO_PRODUCTS)


def test_every_op_with_a_flop_formula_is_known() -> None:
    names = {getattr(op, "__name__", str(op)) for op in flop_registry if not str(op).startswith("qcompile.")}
    assert {"mm", "convolution"} <= names
    assert ("flex_attention" in names) == (torch.__version__ >= "2.13")  # torch 2.11 has no formula for it
    assert {name for name in names if not is_known(name)} == set()


def test_every_aten_op_that_is_named_like_a_product_is_known() -> None:
    ops = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}
    named = {name for op in ops if LIKE_A_PRODUCT.search(name := op.removeprefix("aten::"))}
    assert len(named) > 200
    assert {name for name in named if not is_known(name)} == set()


@pytest.mark.nightly
def test_every_sampled_op_that_runs_a_product_is_known() -> None:
    """By what they do, not by their names: torch's own samples of all its ops, run. A function written in Python is
    captured as the ops it is made of."""
    pytest.importorskip("expecttest", reason="torch's samples need it")
    from torch.testing._internal.common_methods_invocations import op_db

    class Products(TorchDispatchMode):
        seen = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen = self.seen or func.overloadpacket in flop_registry
            return func(*args, **(kwargs or {}))

    in_python = {"pca_lowrank", "svd_lowrank"}
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db:
            if torch.float32 not in op.dtypes:
                continue
            for sample, _ in zip(op.sample_inputs("cpu", torch.float32), range(3), strict=False):
                with Products() as products:
                    try:
                        op.op(sample.input, *sample.args, **sample.kwargs)
                    except Exception:  # what does not run on a CPU runs no product here
                        continue
                if products.seen:
                    found.add(op.name)
    names = {re.sub(r"^(nn\.functional\.|torch\.(ops\.aten\.)?)", "", name).replace(".", "_") for name in found}
    assert {"mm", "linalg_multi_dot", "cov"} <= names
    assert {name for name in names - in_python if not is_known(name)} == set()


def call(target, *operands: Tensor, method: bool = False, **kwargs) -> Node:
    """A call of ``target`` in a graph as Dynamo leaves it."""
    graph = Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(operands))]
    for node, value in zip(nodes, operands, strict=True):
        node.meta["example_value"] = value
    given = {key: [nodes[i] for i in value] if isinstance(value, range) else value for key, value in kwargs.items()}
    return graph.call_method(target, tuple(nodes)) if method else graph.call_function(target, tuple(nodes), given)


aten = torch.ops.aten


@pytest.mark.parametrize(
    "node",
    [
        call(torch.mm, torch.ones(2, 3), torch.ones(3, 4)),
        call("mm", torch.ones(2, 3), torch.ones(3, 4), method=True),
        call(torch.Tensor.mm, torch.ones(2, 3), torch.ones(3, 4)),
        call(aten.mm, torch.ones(2, 3), torch.ones(3, 4)),
        call(aten.mm.default, torch.ones(2, 3), torch.ones(3, 4)),
        call(aten.mm.out, torch.ones(2, 3), torch.ones(3, 4)),
    ],
    ids=["function", "method", "descriptor", "packet", "overload", "out"],
)
def test_one_entry_serves_every_form(node: Node) -> None:
    found = recognize(node)
    assert (name_of(node), found.op, [slot.axis for slot in found.slots]) == ("mm", "mm", [-1, -2])


def test_a_product_with_an_activation_is_an_addmm() -> None:
    """Only inference has it: torch knows no derivative."""
    found = recognize(call(torch._addmm_activation, torch.ones(4), torch.ones(2, 3), torch.ones(3, 4)))
    assert [(slot.position, slot.axis) for slot in found.slots] == [(1, -1), (2, -2)]


def test_a_function_that_only_shares_its_name_is_no_product() -> None:
    def mm(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    assert recognize(call(mm, torch.ones(2, 3), torch.ones(2, 3))) is None


MATRIX, BYTES, VECTOR = torch.ones(4, 8), torch.ones(16, dtype=torch.uint8), torch.ones(8)


@pytest.mark.parametrize(
    ("operands", "listed"),
    [([MATRIX, BYTES], True), ([MATRIX, VECTOR], True), ([VECTOR, VECTOR], False), ([MATRIX], False)],
    ids=["matrix_codes", "matrix_vector", "vectors", "one_matrix"],
)
def test_ops_of_other_libraries_are_listed_where_they_may_be_products(operands: list[Tensor], listed: bool) -> None:
    """An op that reads two tensors, one of them a matrix. More cannot be told; what reads less multiplies nothing."""
    with torch.library._scoped_library("qcompile_test_spellings", "FRAGMENT") as library:
        signature = ", ".join(f"Tensor x{i}" for i in range(len(operands)))
        library.define(f"gemv_4bit({signature}) -> Tensor")
        for target in (op := torch.ops.qcompile_test_spellings.gemv_4bit, op.default):
            found = recognize(call(target, *operands))
            reason = (
                "one opaque op of qcompile_test_spellings; its products, if it has any, are not visible in the graph"
            )
            assert (found.obstacle if found else "") == (reason if listed else "")


def test_triton_kernels_are_listed_by_name() -> None:
    triton = pytest.importorskip("triton")
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    @triton.jit
    def my_matmul(a, b):
        pass

    node = call(triton_kernel_wrapper_mutation, MATRIX, VECTOR, kernel_idx=kernel_side_table.add_kernel(my_matmul))
    found = recognize(node)
    assert found.op == "my_matmul"
    assert found.obstacle.startswith("one opaque Triton kernel")


def test_quantized_layers_of_libraries_stay_as_they_are() -> None:
    """Products of operands that a library has quantized."""
    found = recognize(call(torch._int_mm, torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8)))
    assert found.obstacle == "its operands are quantized already"
