"""Blocks that are compiled one by one: rules about the last of them reach none, which is said once, and only then."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import compat
from qcompile.backends import compile_with
from qcompile.ir.recipe import Recipe
from qcompile.recipes import FP4, IF4, NVFP4
from qcompile.session import UnmatchedRuleError

#: How a block is compiled by itself.
IN_PLACE, REPLACED = "block.compile()", "torch.compile(block)"


class Block(nn.Module):
    """With a list of its own, whose entries are no blocks of the model, as experts are none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(32, width)
        self.mlp = nn.Sequential(nn.GELU(), nn.Linear(width, 32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.up(x))


class Model(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (48, 48, 48, 48)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Block, widths))
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def backend_of(recipe: Recipe, **options: Any) -> Callable[..., Any]:
    def backend(gm: torch.fx.GraphModule, inputs: Any, **_: Any) -> Any:
        return compile_with(recipe, gm, inputs, options=options, inner_compile=compat.eager_inner_compile)

    return backend


def compile_blocks(model: Model, backend: Any, last: Any = None, how: str = IN_PLACE) -> Model:
    """``last``: the backend of the last block, if it has another one."""
    for i, layer in enumerate(model.layers):
        chosen = last if last is not None and i == len(model.layers) - 1 else backend
        if how == IN_PLACE:
            layer.compile(backend=chosen)
        else:
            model.layers[i] = torch.compile(layer, backend=chosen)
    return model


def said_by(model: Callable[[Tensor], Tensor], calls: int = 2) -> list[str]:
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(calls):
            model(torch.randn(4, 32))
    return [str(w.message) for w in caught if str(w.message).startswith("qcompile:")]


@pytest.mark.parametrize("how", [IN_PLACE, REPLACED])
@pytest.mark.parametrize("recipe", [NVFP4, IF4], ids=lambda recipe: recipe.name)
def test_blocks_that_are_compiled_one_by_one(recipe: Recipe, how: str) -> None:
    (message,) = said_by(compile_blocks(Model(), backend_of(recipe), how=how))
    assert message == (
        "qcompile: rule '*' (last_blocks=0.15, quantize=False) does not reach the last 1 of the 4 blocks in 'layers': "
        "blocks that are compiled one by one have no place in their model; compile the whole model, or the last 1 with "
        'backend="inductor"'
    )


def test_it_is_said_once_for_blocks_of_several_shapes() -> None:
    """Each shape is compiled, and belongs to another ``torch.compile`` call."""
    assert len(said_by(compile_blocks(Model((48, 64, 80, 96)), backend_of(NVFP4)))) == 1


@pytest.mark.parametrize(
    "model",
    [
        lambda: torch.compile(Model(), backend=backend_of(NVFP4)),
        lambda: compile_blocks(Model(), backend_of(NVFP4), last="eager"),
        lambda: compile_blocks(Model(), backend_of(NVFP4), last=backend_of(FP4), how=REPLACED),
        lambda: compile_blocks(Model(), backend_of(FP4)),
        lambda: compile_blocks(Model(), backend_of(NVFP4, enabled=False)),
        lambda: compile_blocks(Model((48, 48)), backend_of(NVFP4)),
    ],
    ids=["whole", "last with another", "last with another, replaced", "no such rule", "off", "no last one"],
)
def test_nothing_is_said_where_nothing_is_lost(model: Callable[[], Any]) -> None:
    assert said_by(model()) == []


def test_nor_of_whole_models_in_a_list() -> None:
    """The blocks of each have their places in what is compiled."""
    models = nn.ModuleList(Model() for _ in range(4))
    for model in models:
        model.compile(backend=backend_of(NVFP4, skip=["head"]))
    ensemble = nn.Module()
    ensemble.models = models
    ensemble.forward = lambda x: sum(model(x) for model in models)  # type: ignore[method-assign,assignment]
    assert said_by(ensemble) == []


RULE = {"last_blocks": 0.3, "weight": "e2m1 row"}


def test_a_rule_of_the_users_is_explained_in_place_of_being_unmatched() -> None:
    (message,) = said_by(compile_blocks(Model(), backend_of(FP4, rules=[{"name": "up", **RULE}])))
    assert "rule 'up' (last_blocks=0.3, weight=e2m1 row) does not reach the last 1 of the 4 blocks" in message
    assert message.endswith("compile the whole model, or the last 1 with options of their own")


def test_under_strict_it_is_an_error_as_well() -> None:
    model = compile_blocks(Model(), backend_of(FP4, rules=[{"name": "up", **RULE}], strict=True))
    assert len(said_by(model, calls=1)) == 1
    with pytest.raises(UnmatchedRuleError, match="matched no GEMM"):
        model(torch.randn(4, 32))


@pytest.mark.parametrize("how", [IN_PLACE, REPLACED])
def test_a_report_says_what_the_model_as_it_is_compiled_does_otherwise(how: str) -> None:
    """`explain` itself compiles the whole, where the last block stays wide."""
    model = compile_blocks(Model(), backend_of(NVFP4), how=how)
    report = qcompile.explain(model, torch.randn(4, 32), backend="qcompile_nvfp4")
    assert {row.decision for row in report.rows if row.layer.startswith("layers.3")} == {"skipped"}
    (remark,) = report.remarks
    assert remark.startswith(
        "this report is of the model as a whole. As it is compiled now, rule '*' (last_blocks=0.15"
    )
    assert remark in " ".join(str(report).split())


@pytest.mark.parametrize("last", [None, "eager"])
def test_a_report_on_what_is_compiled_as_it_says_has_no_such_remark(last: str | None) -> None:
    model = compile_blocks(Model(), backend_of(NVFP4), last=last) if last else Model()
    assert qcompile.explain(model, torch.randn(4, 32), backend="qcompile_nvfp4").remarks == []


def test_a_report_on_what_has_no_blocks() -> None:
    (remark,) = qcompile.explain(nn.Linear(32, 32), torch.randn(4, 32), backend="qcompile_if4").remarks
    assert remark == (
        "rule '*' (last_blocks=0.15, quantize=False) applies to nothing: no layer here is in a list of blocks; a block "
        "that is compiled by itself has no place in its model"
    )
