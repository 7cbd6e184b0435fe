"""The count of the joint graph's own products: nothing that the report lacks stays unnoticed.

Every test of this folder that compiles through ``compile_and_run`` demands that no product is without a site. Here is
what that rests on: FLOPs by the textbook, a miss that is seen, and bodies whose backward carries no metadata.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.map import map as map_over
from torch._higher_order_ops.while_loop import while_loop
from torch.utils import flop_counter

import qcompile
from qcompile.passes import account, find_gemms
from qcompile.passes.pass_base import Product
from qcompile.passes.spellings import recognize

from .harness import DISTINCT, compile_and_run, compiler

M, K, N = 5, 37, 11
EACH = 2 * M * K * N


class Two(nn.Module):
    """A layer that is quantized and a product of activations that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ x.sin()[:N, :M]


def products(function, *inputs: Tensor, **options) -> list[Product]:
    result = compile_and_run(function, *inputs, recipe=DISTINCT, **options)
    return [product for observed in result.observations for product in observed.products]


def test_flops_by_site_and_role() -> None:
    x = torch.randn(N, K, requires_grad=True)
    layer, scores = 2 * N * K * N, 2 * N * N * M
    found = [(p.site, p.role, p.op, p.flops, p.quantized) for p in products(Two(), x)]
    assert sorted(found) == [
        (0, "dgrad", "mm", layer, True),
        (0, "fprop", "addmm", layer, True),
        (0, "wgrad", "mm", layer, True),
        (1, "backward", "mm", scores, False),
        (1, "backward", "mm", scores, False),
        (1, "fprop", "mm", scores, False),
    ]


def test_a_graph_without_a_quantized_site_is_counted_too() -> None:
    """Else the share of a model would leave out its wide graphs."""
    found = products(nn.Linear(K, N), torch.randn(M, K), skip=["*"])
    assert [(p.site, p.flops, p.quantized) for p in found] == [(0, EACH, False)] * 2


def test_symbolic_sizes_count_as_in_the_call_that_is_compiled() -> None:
    assert [p.flops for p in products(nn.Linear(K, N), torch.randn(M, K), dynamic=True)] == [EACH] * 2


def test_a_product_that_is_missed_is_remarked(monkeypatch) -> None:
    """A spelling taken out of the table: `explain` says what share of the operations its report does not speak of."""
    monkeypatch.setattr(find_gemms, "recognize", lambda node: None if node.target is torch.mm else recognize(node))

    class Missed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mm(self.layer(x), self.w)

    report = qcompile.explain(Missed(), torch.randn(4, 16))
    assert [row.op for row in report.rows] == ["linear"] * len(report.rows)
    (remark,) = report.remarks
    # The layer's dX is not computed: 5 products, 3 of them missed.
    assert remark.startswith("not accounted for: 3 product(s), 60.0% of the FLOPs of the graphs, belong to no layer: ")
    assert f"mm at {__file__}:" in remark
    assert remark in report.summary()


def test_a_model_without_a_miss_has_no_remark() -> None:
    assert qcompile.explain(Two(), torch.randn(N, K)).remarks == []


def in_cond(w: Tensor, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: y @ w, lambda y: (y @ w).sin(), (x,))


def in_map(w: Tensor, x: Tensor) -> Tensor:
    return map_over(lambda row, u: row @ u, x, w)


def in_while(w: Tensor, x: Tensor) -> Tensor:
    return while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, F.linear(y, w)), (torch.tensor(0), x))[1]


def in_func_grad(w: Tensor, x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (y @ w).sin().sum())(x)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return F.conv1d(x, w)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        return torch.ops.aten.convolution_backward(grad, x, w, None, [1], [0], [1], False, [0], 1, [True, True, False])[
            :2
        ]


def own_backward(w: Tensor, x: Tensor) -> Tensor:
    return Own.apply(x[None].mT, w[..., None])


@pytest.mark.parametrize("function", [in_cond, in_map, in_while, in_func_grad, own_backward])
def test_backwards_without_metadata_belong_to_sites(function) -> None:
    """Their nodes say nothing of the forward's; without the match by extents each would be a miss."""
    w, x = nn.Parameter(torch.randn(16, 16)), torch.randn(4, 16, requires_grad=True)
    found = products(lambda x: function(w, x), x)
    assert {product.role for product in found} > {"fprop"}


def test_a_backward_of_other_extents_is_nobodys() -> None:
    """The match by extents must not swallow a product that no site of a body can have made."""
    compiled, observations = compiler(lambda x: in_map(x.new_ones(16, 16), x), DISTINCT)
    compiled(torch.randn(4, 16))
    (observed,) = observations
    stray = Product(None, True, "backward", "mm", 12345, False, "")
    observed.products.append(stray)
    account._attribute_bodies(observed.products, observed.plan)
    assert observed.unaccounted == [stray]


@pytest.mark.parametrize(
    ("op", "shapes", "extra", "flops"),
    [
        ("_grouped_mm", [(10, 16), (3, 16, 32)], (), 2 * 10 * 16 * 32),
        ("_grouped_mm", [(3, 10, 16), (16, 32)], (), 2 * 10 * 16 * 32),
        ("_grouped_mm", [(10, 16), (16, 32)], (), 2 * 10 * 16 * 32),
        ("_grouped_mm", [(3, 10, 16), (3, 16, 32)], (), 2 * 3 * 10 * 16 * 32),
        ("conv_tbc", [(7, 2, 6), (3, 6, 5), (5,)], (1,), 2 * 7 * 2 * 3 * 6 * 5),
        ("mv", [(7, 6), (6,)], (), 2 * 7 * 6),
        ("addmv", [(7,), (7, 6), (6,)], (), 2 * 7 * 6),
        ("_int_mm", [(7, 6), (6, 5)], (), 2 * 7 * 6 * 5),
        ("mkldnn_rnn_layer", [(9, 2, 6), (20, 6), (20, 5), (20,), (20,), (2, 5)], (), 2 * 9 * 2 * 20 * (6 + 5)),
    ],
)
def test_formulas(op: str, shapes: list[tuple[int, ...]], extra: tuple[int, ...], flops: int) -> None:
    """Those that torch has none for, by the textbook."""
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    assert account.FORMULAS[op](*tensors, *extra) == flops
    assert getattr(torch.ops.aten, op) not in flop_counter.flop_registry


def test_recurrent_weights_may_come_as_a_list() -> None:
    x, *weights = (torch.empty(shape, device="meta") for shape in [(9, 2, 6), (20, 6), (20, 5), (20,)])
    assert account.FORMULAS["_cudnn_rnn"](x, weights, 3) == 2 * 9 * 2 * 20 * (6 + 5)
    assert account.FORMULAS["_cudnn_rnn_backward"](x, weights, 3) == 2 * 2 * 9 * 2 * 20 * (6 + 5)
