"""Rotations that undo each other leave the joint graph, and nothing else changes."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.passes.pass_base import Observations
from qcompile.recipes.quest import QUEST

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def run(function, *inputs: Tensor, dynamic: tuple[int, ...] = (), **options) -> tuple[list[Tensor], Counter[str]]:
    """Output and gradients of all inputs, and how often each op stands in the joint graph. ``dynamic``: axes of the
    first input.
    """
    observed = Observations()

    def backend(gm, example_inputs):
        return compile_with(
            QUEST,
            gm,
            example_inputs,
            options={"debug": True, "min_side": 0, **options},
            observe=observed,
            inner_compile=compat.eager_inner_compile,
        )

    torch._dynamo.reset()
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    if dynamic:
        torch._dynamo.mark_dynamic(leaves[0], dynamic)
    output = torch.compile(function, backend=backend, fullgraph=True)(*leaves)
    gradients = torch.autograd.grad((output * torch.linspace(-1, 1, output.shape[-1])).sum(), leaves)
    program = observed.programs["joint_hints"]
    return [output.detach(), *gradients], Counter(re.findall(r"= torch\.ops\.(\w+\.\w+)\.\w+\(", program))


def compare(function, *inputs: Tensor, **options) -> tuple[Counter[str], Counter[str]]:
    """Op counts without the pass and with it; asserts that results agree to float32 rounding."""
    off = {**options, "disable_passes": ["cancel_rotations"]}
    (expected, before), (actual, after) = run(function, *inputs, **off), run(function, *inputs, **options)
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).norm() <= 3e-6 * other.norm()
    return before, after


def project(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(x, w)


#: Spelling → (function, shapes of its operands).
SPELLINGS = {
    "linear": (project, (2, 5, 96), (7, 96)),
    "a matrix": (lambda x, w: x @ w, (9, 64), (64, 5)),
    "batches": (torch.bmm, (3, 4, 32), (3, 32, 6)),
    "einsum": (lambda x, w: torch.einsum("bsk,kn->bsn", x, w), (2, 3, 32), (32, 5)),
    "heads": (lambda x, w: F.linear(x.transpose(0, 1).reshape(6, 64), w), (3, 2, 64), (5, 64)),
    "bias": (lambda x, w: torch.addmm(torch.ones(5), x, w.t()), (4, 128), (5, 128)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_products_of_rotated_operands_see_no_rotation(spelling, dynamic):
    """Two rotations are left, of the two masked gradients; and products read codes."""
    function, *shapes = SPELLINGS[spelling]
    if dynamic and spelling not in ("linear", "a matrix", "bias"):
        pytest.skip("its leading axis is not one of rows alone")
    axes = tuple(range(len(shapes[0]) - 1)) if dynamic else ()
    before, after = compare(function, *(torch.randn(*shape) for shape in shapes), attention=True, dynamic=axes)
    assert before["qcompile.hadamard"] == 6
    assert after["qcompile.hadamard"] == 2
    assert after["qcompile.quantized_mm"] == 3
    assert after["qcompile.dequantize"] == 0


def test_a_gradient_with_several_sources_is_one_sum():
    """q, k and v read one x: three products are summed in rotated coordinates, then rotated once."""

    def attention_inputs(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([F.linear(x, w) for w in (q, k, v)], -1)

    _, after = compare(attention_inputs, torch.randn(3, 5, 64), *(torch.randn(8, 64) for _ in range(3)))
    assert after["qcompile.quantize"] == 4
    assert after["qcompile.hadamard"] == 4
    assert after["qcompile.quantized_mm"] == 9


def test_a_weight_alone_stays_rotated_back():
    """Its product contracts one rotated operand with one that is not: the rotation has to be there."""
    _, after = compare(project, torch.randn(4, 64), torch.randn(6, 64), bits={"activation": 16, "weight": 4})
    assert after["aten.mm"] == 2  # forward and the weight's gradient; dX reads codes and is rotated afterwards
    assert after["qcompile.quantized_mm"] == 1
    assert after["qcompile.hadamard"] == 4


def test_without_masks_products_are_rotated_afterwards():
    """Straight through: gradients stay in the coordinates they come in, and still every product reads codes."""
    ste = {"estimator": "ste"}
    _, after = compare(project, torch.randn(4, 64), torch.randn(6, 64), activation=ste, weight=ste)
    assert after["qcompile.quantized_mm"] == 3
    assert after["qcompile.hadamard"] == 2


def test_blocks_of_different_size_do_not_cancel():
    """An activation rotated by 32 and a weight by 64: each is rotated back for the product, and each gradient comes in
    the coordinates of the other.
    """
    _, after = compare(project, torch.randn(4, 64), torch.randn(6, 64), activation={"rotation": 32})
    assert after["aten.mm"] == 1
    assert after["qcompile.quantized_mm"] == 2
    assert after["qcompile.hadamard"] == 2 + 2 * 3


def test_without_rotation_the_pass_does_nothing():
    options = dict.fromkeys(("activation", "weight"), "midrise4 row rms half_up; trust")
    _, after = compare(project, torch.randn(4, 64), torch.randn(6, 64), **options)
    assert after["qcompile.hadamard"] == 0
    assert after["qcompile.mask_gradient"] == 2


def test_checkpointed_blocks_recompute_codes():
    """Activation checkpointing runs the forward again in the backward, rotations included."""
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))

    def checkpointed(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    x = torch.randn(5, 64)
    (plain, *_), _ = run(lambda x: model(x), x)
    (recomputed, *_), after = run(checkpointed, x)
    assert torch.equal(plain, recomputed)
    assert after["qcompile.hadamard"] == 4
