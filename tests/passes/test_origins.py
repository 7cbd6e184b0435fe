"""What an operand derives from: every view torch has, computed weights, constants, noise, memory that is written to."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils import parametrizations, prune, weight_norm

from qcompile.passes.find_gemms import COMPUTES_A_WEIGHT, CONSTANT_WEIGHT, IS_CONSTANT, UNDER_NO_GRAD, find_gemms
from qcompile.passes.names import Names
from qcompile.passes.origins import Origin, Origins, written_by
from qcompile.passes.record import Site

from .harness import DISTINCT, assert_same, backward, compile_and_run, compiler, fake_quantize, leaf

A, W = "activation", "weight"


class Layer(nn.Module):
    """A function of x with a weight, another, and a buffer, all square."""

    def __init__(self, f: Callable[[Any, Tensor], Tensor], size: int = 6) -> None:
        super().__init__()
        self.f = f
        self.w, self.v = nn.Parameter(torch.randn(size, size)), nn.Parameter(torch.randn(size, size))
        self.register_buffer("c", torch.randn(size, size))
        self.kept = torch.randn(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def looked_at(function: Callable[..., Any], *inputs: Any, look: Callable[[GraphModule], Any]) -> Any:
    """What ``look`` says of the graph of a function, while Dynamo still knows where its inputs come from."""
    results: list[Any] = []

    def backend(gm: GraphModule, _: Any) -> GraphModule:
        results.append(look(gm))
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    (result,) = results
    return result


def sites(function: Callable[..., Any], *inputs: Tensor) -> list[Site]:
    """Of a function of inputs, or of ``f(m, x)`` with a layer m."""
    if not inputs:
        function, inputs = Layer(function), (torch.randn(6, 6),)
    return looked_at(function, *inputs, look=lambda gm: find_gemms(gm, Names(gm, None)))


def kinds(site: Site) -> list[str]:
    return [slot.kind for slot in site.slots]


def origins_of_results(gm: GraphModule) -> list[Origin]:
    origins = Origins()
    for node in gm.graph.nodes:
        origins.visit(node)
    return [origins.of(node) for node in gm.graph.output_node().all_input_nodes if node.op != "placeholder"]


# --- views ----------------------------------------------------------------------------------------------------------

#: Arguments after the tensor, by name of a view; what is not here takes none.
VIEW_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "__getitem__": (slice(0, 4),),
    "as_strided": ([6, 6], [1, 6]),
    "_reshape_alias": ([36], [1]),
    "_sparse_broadcast_to": ([2, 6, 6],),
    "broadcast_to": ([2, 6, 6],),
    "chunk": (2,),
    "dsplit": (2,),
    "expand": ([2, 6, 6],),
    "flatten": (0,),
    "hsplit": (2,),
    "moveaxis": (0, 1),
    "movedim": (0, 1),
    "narrow": (0, 1, 4),
    "permute": ([1, 0],),
    "reshape": ([4, 9],),
    "select": (0, 1),
    "slice": (0, 1, 5),
    "split": (3,),
    "split_with_sizes": ([2, 4],),
    "swapaxes": (0, 1),
    "swapdims": (0, 1),
    "tensor_split": (2,),
    "to": (torch.float64,),
    "transpose": (0, 1),
    "unflatten": (0, [2, 3]),
    "unfold": (0, 3, 3),
    "unsqueeze": (0,),
    "view": ([4, 9],),
    "vsplit": (2,),
    "_grad_sum_to_size": ([6, 6],),
    "slice_inverse": (torch.randn(6, 6), 0, 0, 6, 1),
}
#: Views whose other argument is a tensor of which only the shape is read; it is given the input here.
SHAPE_OF_INPUT = ("view_as", "expand_as", "reshape_as", "type_as")
#: Other calls that keep or permute a tensor's elements: casts, copies, selections.
SAME_ELEMENTS: dict[str, tuple[Any, ...]] = {
    "double": (),
    "half": (),
    "bfloat16": (),
    "clone": (),
    "flip": ([0],),
    "fliplr": (),
    "roll": (1, 0),
    "rot90": (1, [0, 1]),
    "repeat": (2, 1),
    "tile": ([2],),
    "repeat_interleave": (2,),
    "index_select": (0, torch.tensor([1, 3])),
    "take_along_dim": (torch.tensor([[1], [2]]), 0),
    "gather": (0, torch.tensor([[1, 2, 0, 0, 1, 2]])),
    "tril": (),
    "triu": (),
}
#: What torch counts as a view and a Dynamo graph of a dense real tensor cannot hold.
NO_VIEW_OF_OURS = {
    "another layout": {"_indices", "_values", "ccol_indices", "coalesce", "col_indices", "crow_indices", "indices",
                       "row_indices", "values"},
    "nested": {"_nested_get_values", "_nested_view_from_buffer", "_nested_view_from_jagged"},
    "complex": {"_conj", "imag", "view_as_complex", "view_as_real"},
    "torch's own plumbing": {"_autocast_to_full_precision", "_autocast_to_reduced_precision", "_fw_primal",
                             "_make_dual", "_unpack_dual", "_unwrap_optional", "_ncf_unsqueeze", "_ncf_view",
                             "_test_autograd_multiple_dispatch_view", "as_tensor", "lift_fresh", "matrix_H",
                             "linalg_diagonal", "_sparse_broadcast_to", "_grad_sum_to_size", "slice_inverse"},
    "named axes": {"align_as", "align_tensors", "align_to", "refine_names", "rename"},
    "needs a GPU": {"cuda", "pin_memory"},
}  # fmt: skip


def views_of_torch() -> list[str]:
    """Every ATen op that returns an alias of an argument it does not write to."""
    names = set()
    for schema in torch._C._jit_get_all_schemas():
        aliases = [a.alias_info for a in schema.arguments if a.alias_info is not None]
        returned = any(r.alias_info is not None for r in schema.returns)
        if schema.name.startswith("aten::") and aliases and returned and not any(a.is_write for a in aliases):
            names.add(schema.name.removeprefix("aten::"))
    return sorted(names - set().union(*NO_VIEW_OF_OURS.values()))


def forms_of(name: str) -> dict[str, Callable[..., Any]]:
    """A view as method or attribute, function and ATen op, as far as torch has them."""
    forms: dict[str, Callable[..., Any]] = {}
    if isinstance(attribute := getattr(Tensor, name, None), property) or "getset" in type(attribute).__name__:
        forms["attribute"] = lambda w: getattr(w, name)
    elif attribute is not None:
        forms["method"] = lambda w, *args: getattr(w, name)(*args)
    if callable(function := getattr(torch, name, None)):
        forms["function"] = function
    if hasattr(torch.ops.aten, name):
        forms["aten"] = getattr(torch.ops.aten, name)
    return forms


@pytest.mark.parametrize("name", sorted({*views_of_torch(), *SAME_ELEMENTS}))
def test_whatever_a_view_makes_of_a_parameter_is_a_weight(name: str) -> None:
    """Each form of each view is called on a parameter, an input and a buffer, in one graph each."""
    tried = 0
    shape = (6, 6, 4) if name == "dsplit" else (6, 6)
    w, x = nn.Parameter(torch.randn(shape)), torch.randn(shape)
    arguments = VIEW_ARGUMENTS.get(name) or SAME_ELEMENTS.get(name, ())
    for form in forms_of(name).values():
        call = functools.partial(_call, form, () if name in SHAPE_OF_INPUT else arguments, name in SHAPE_OF_INPUT)
        try:
            call(w, x)
        except (RuntimeError, TypeError):
            continue  # no overload for these arguments in this form
        of_parameter, of_input = _origins(call, w, x)
        assert all(origin.is_parameter for origin in of_parameter)
        assert all(origin.varies and not origin.is_parameter for origin in of_input)
        tried += 1
    assert tried, f"no form of {name} could be called: give its arguments in VIEW_ARGUMENTS"


def _origins(call: Callable[..., Any], w: Tensor, x: Tensor) -> list[list[Origin]]:
    return [
        looked_at(lambda x: call(w, x), x, look=origins_of_results),
        looked_at(lambda x: call(x, w), x, look=origins_of_results),
    ]


def _call(form: Callable[..., Any], arguments: tuple[Any, ...], like: bool, t: Tensor, other: Tensor) -> Any:
    return form(t, other) if like else form(t, *arguments)


# --- what a weight is -----------------------------------------------------------------------------------------------


def row_norms(w: Tensor) -> Tensor:
    return w / w.norm(dim=1, keepdim=True)


FREE_WEIGHTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scaled": lambda m, x: x @ (m.w * 0.1),
    "masked by a buffer": lambda m, x: x @ (m.w * (m.c > 0)),
    "normalized": lambda m, x: x @ row_norms(m.w),
    "standardized": lambda m, x: x @ F.layer_norm(m.w, (6,)),
    "softmax": lambda m, x: x @ m.w.softmax(-1),
    "a sum of parameters": lambda m, x: x @ (m.w + m.v),
    "cat": lambda m, x: x @ torch.cat([m.w, m.v], 1),
    "stack": lambda m, x: x @ torch.stack([m.w, m.v])[1],
    "where": lambda m, x: x @ torch.where(m.c > 0, m.w, 0.0),
    "indexed by a constant": lambda m, x: x @ m.w[:, torch.arange(3)],
    "matrices that an input picks": lambda m, x: torch.bmm(x.expand(2, 6, 6), m.w.expand(3, 6, 6)[x[0, :2].long() % 3]),
    "sliced by an input's size": lambda m, x: x @ m.w[: x.shape[1]],
    "noise added": lambda m, x: x @ (m.w + 0.1 * torch.randn_like(m.v)),
    "dropped out": lambda m, x: x @ F.dropout(m.w, 0.5),
    "shaped like an input": lambda m, x: x @ m.w.view_as(x),
    "cast like an input": lambda m, x: x @ m.w.to(x),
    "normalized in place": lambda m, x: x @ m.w.clone().div_(m.w.norm()),
    "einsum": lambda m, x: torch.einsum("bi,io->bo", x, m.w * 2),
}


@pytest.mark.parametrize("name", FREE_WEIGHTS)
def test_what_derives_from_parameters_alone_is_the_weight_of_a_free_product(name: str) -> None:
    site = sites(FREE_WEIGHTS[name])[-1]
    assert (kinds(site), site.reservation, site.obstacle) == ([A, W], "", "")


IN_A_SLOT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a sum with a product": lambda m, x: F.linear(x, m.w + m.w @ m.v),
    "from an input": lambda m, x: F.linear(x, m.w * x.mean()),
    "an input": lambda m, x: F.linear(m.w @ x, x),
    "convolution from an input": lambda m, x: F.conv1d(x[None], (m.w * x.sum())[..., None]),
}


@pytest.mark.parametrize("name", IN_A_SLOT)
def test_the_weight_slot_of_a_layer_holds_the_weight_however_it_was_computed(name: str) -> None:
    site = sites(IN_A_SLOT[name])[-1]
    assert (kinds(site), site.reservation, site.obstacle) == ([A, W], "", "")


LEFT_WIDE: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "orthogonal map": (lambda m, x: F.linear(x, m.c @ torch.linalg.matrix_exp(m.w - m.w.T)), [COMPUTES_A_WEIGHT]),
    "power iteration": (lambda m, x: x @ (m.w / (m.c[:1] @ m.w @ m.c[:, :1])), [COMPUTES_A_WEIGHT] * 2),
    "low-rank update": (lambda m, x: F.linear(x, m.v + m.w[:, :2] @ m.v[:2]), [COMPUTES_A_WEIGHT]),
    "two constants": (lambda m, x: F.linear(x, m.v + m.c @ torch.ones(6, 6)), [COMPUTES_A_WEIGHT]),
    "a buffer": (lambda m, x: x @ m.c, [IS_CONSTANT]),
    "a buffer on the left": (lambda m, x: m.c @ x, [IS_CONSTANT]),
    "a view of a buffer": (lambda m, x: torch.einsum("bi,oi->bo", x, m.c[:4]), [IS_CONSTANT]),
    "a tensor a module keeps": (lambda m, x: x @ m.kept, [IS_CONSTANT]),
    "a factory": (lambda m, x: x @ torch.eye(6), [IS_CONSTANT]),
    "ones like an input": (lambda m, x: torch.ones_like(x) @ x, [IS_CONSTANT]),
}


@pytest.mark.parametrize("name", LEFT_WIDE)
def test_constants_and_what_prepares_a_weight_are_left_wide(name: str) -> None:
    f, reasons = LEFT_WIDE[name]
    assert [s.reservation for s in sites(f) if s.reservation] == reasons


def test_a_closure_and_a_global_are_constants_and_a_static_input_is_none() -> None:
    table, x = torch.randn(6, 6), torch.randn(6, 6)
    torch._dynamo.mark_static_address(x)
    (closed,) = sites(lambda x: x @ table, x)
    (static,) = sites(lambda x, y: y @ x, x, torch.randn(6, 6))
    assert closed.reservation == IS_CONSTANT
    assert kinds(static) == [A, A]


def test_a_constant_in_a_layers_slot_is_its_weight_and_is_remarked() -> None:
    (site,) = sites(lambda m, x: F.linear(x, m.c))
    assert (site.reservation, site.slots[0].note) == ("", CONSTANT_WEIGHT)


def test_a_rule_quantizes_a_constant_as_a_weight() -> None:
    layer = Layer(lambda m, x: x @ m.c, 37)
    result = compile_and_run(layer, leaf(5, 37), recipe=DISTINCT, rules=[{"name": "*", "quantize": True}])
    assert [[s.kind for s in d.site.slots] for d in result.quantized] == [[A, W]]


ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "two inputs": lambda m, x: x @ x.T,
    "a cache of keys": lambda m, x: x @ m.c.copy_(x).T,
    "written through a view": lambda m, x: (m.c[0].copy_(x[0]), x @ m.c)[1],
    "written by setitem": lambda m, x: (m.c.__setitem__(slice(0, 2), x[:2]), x @ m.c)[1],
    "a parameter times an input": lambda m, x: x @ (m.w * x),
    "rows that an input picks": lambda m, x: x @ m.w[x.argmax(0)],
    "an embedding": lambda m, x: x @ F.embedding(x.argmax(0), m.w),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_operand_is_a_weight_once_an_input_is_in_both(name: str) -> None:
    site = sites(ACTIVATIONS[name])[-1]
    assert (kinds(site), site.reservation) == ([A, A], "")


def test_noise_is_an_input_and_not_a_weight() -> None:
    """A generator draws what it starts from."""
    site, second = sites(lambda m, x: torch.randn(6, 6) @ m.w @ m.v)
    assert [kinds(site), kinds(second)] == [[A, W], [A, W]]
    assert site.reservation == second.reservation == ""


def test_under_no_grad_inside_a_training_graph_products_stay_wide() -> None:
    """A teacher, a code book that is searched; inference under no_grad is not meant."""

    def teacher(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.linear(x, m.v)
        return F.linear(x, m.w) - target

    assert [s.reservation for s in sites(teacher)] == [UNDER_NO_GRAD, ""]
    with torch.no_grad():
        assert [s.reservation for s in sites(teacher)] == ["", ""]


@pytest.mark.parametrize(
    ("beside", "trains"),
    [
        (lambda w: w.T, False),
        (lambda w: w.transpose(0, 1), False),
        (lambda w: w[1:].unbind(0)[0], False),
        (lambda w: w.detach() * 2, False),
        (lambda w: w.clone(), True),
        (lambda w: (w * 2).T, True),
    ],
    ids=["T", "transpose", "part", "detached", "clone", "view of a result"],
)
def test_a_parameter_that_is_handed_back_trains_nothing(beside: Callable[[Tensor], Tensor], trains: bool) -> None:
    """Whether ``p.T`` is a result of the graph depends on torch's version; the decision may not."""

    @torch.no_grad()
    def product(m: Any, x: Tensor) -> Tensor:
        return F.linear(x, m.v)

    (site,) = sites(lambda m, x: (product(m, x), beside(m.w)))
    assert site.reservation == (UNDER_NO_GRAD if trains else "")


def test_an_input_that_a_result_is_written_into_trains() -> None:
    def written(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            y = F.linear(x, m.v)
        return y, x.add_(m.w[0])

    (site,) = sites(written)
    assert site.reservation == UNDER_NO_GRAD


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(37, 40)),
        lambda: weight_norm(nn.Linear(37, 40)),
        lambda: parametrizations.spectral_norm(nn.Linear(37, 40)),
        lambda: parametrizations.orthogonal(nn.Linear(37, 40)),
        lambda: prune.l1_unstructured(nn.Linear(37, 40), "weight", 0.5),
    ],
    ids=["weight_norm", "weight_norm as a hook", "spectral_norm", "orthogonal", "prune"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradients_run_through_the_estimator_into_what_computed_the_weight(make: Callable[[], nn.Module]) -> None:
    """The layer's own product is quantized and nothing else; forward and gradients equal those of eager torch with the
    operands of that product quantized.
    """
    torch.manual_seed(0)
    layer, x = make(), leaf(5, 37)
    layer.eval()
    result = compile_and_run(layer, x, recipe=DISTINCT)
    assert [d.site.op for d in result.quantized] == ["linear"]
    layer(torch.zeros(1, 37))  # hooks compute the weight when the layer is called
    weight = fake_quantize(layer.weight, str(DISTINCT.weight), -1)
    expected = F.linear(fake_quantize(x, str(DISTINCT.activation), -1), weight, layer.bias)
    assert_same(result.outputs, expected)
    leaves = {0: x, **dict(layer.named_parameters())}
    assert_same(result.gradients, backward(expected, leaves))


def test_bodies_of_higher_order_ops_are_told_where_their_operands_come_from() -> None:
    from torch.utils.checkpoint import checkpoint

    scaled = sites(lambda m, x: checkpoint(lambda y, w: y @ w, x, m.w * 2, use_reentrant=False))
    constant = sites(lambda m, x: checkpoint(lambda y, w: y @ w, x, m.c * 2, use_reentrant=False))
    assert [kinds(site) for site in scaled] == [[A, W]]
    assert [site.reservation for site in constant] == [IS_CONSTANT]


def test_static_and_dynamic_sizes_are_decided_alike() -> None:
    """A weight that is sliced by an input's size, and a convolution whose windows tile its input."""
    torch.manual_seed(0)
    layer, conv = Layer(lambda m, x: x @ m.w[: x.shape[1]], 50), nn.Conv2d(3, 16, 4, stride=4)
    for module, inputs in ((layer, (leaf(5, 50), leaf(5, 48))), (conv, (leaf(2, 3, 8, 12), leaf(2, 3, 9, 12)))):
        static, dynamic = (compiler(module, DISTINCT, dynamic=dynamic)[0] for dynamic in (False, True))
        for x in inputs:
            assert torch.equal(static(x), dynamic(x))


#: A call of tensors a and b → what it writes into.
WRITERS: dict[str, tuple[Callable[[Graph, Node, Node], Node], str]] = {
    "a method": (lambda g, a, b: g.call_method("mul_", (a, b)), "a"),
    "an operator": (lambda g, a, b: g.call_function(operator.iadd, (a, b)), "a"),
    "an item": (lambda g, a, b: g.call_function(operator.setitem, (a, 0, b)), "a"),
    "a flag": (lambda g, a, b: g.call_function(F.relu, (a,), {"inplace": True}), "a"),
    "a positional flag": (lambda g, a, b: g.call_function(F.silu, (a, True)), "a"),
    "another positional flag": (lambda g, a, b: g.call_function(F.dropout, (a, 0.5, True)), ""),
    "by keyword": (lambda g, a, b: g.call_function(torch.relu_, (), {"input": a}), "a"),
    "out": (lambda g, a, b: g.call_function(torch.add, (a, a), {"out": b}), "b"),
    "several outs": (lambda g, a, b: g.call_function(torch.aminmax, (a,), {"out": (a, b)}), "ab"),
    "several tensors": (lambda g, a, b: g.call_function(torch._foreach_mul_, ([a, b], 2.0)), "ab"),
    "a schema": (lambda g, a, b: g.call_function(torch.ops.aten.add_.Tensor, (a, b)), "a"),
    "a schema that writes elsewhere": (
        lambda g, a, b: g.call_function(
            torch.ops.aten._native_batch_norm_legit.default, (a, None, None, b, None, True, 0.1, 0.1)
        ),
        "b",
    ),
    "none": (lambda g, a, b: g.call_method("__add__", (a, b)), ""),
}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_call_writes_into(name: str) -> None:
    call, written = WRITERS[name]
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    assert [node.name for node in written_by(call(graph, a, b))] == list(written)
