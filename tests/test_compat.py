"""Which releases of torch the package has been tried with, and what it says of others."""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import RECIPES

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(autouse=True)
def _nothing_said_yet():
    compat.warn_if_untried.cache_clear()
    yield
    compat.warn_if_untried.cache_clear()


def compile_twice() -> list[warnings.WarningMessage]:
    """What two models, compiled one after the other, warn of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            torch._dynamo.reset()
            gm, x = torch.fx.symbolic_trace(torch.nn.ReLU()), torch.ones(2)
            compile_with(RECIPES["qcompile_fp4"], gm, [x], inner_compile=compat.eager_inner_compile)
    return [warning for warning in said if "untried" in str(warning.message)]


@pytest.mark.parametrize("version", ["2.12.0", "2.99.0+cu140", "3.0.0", "2.13.0a0+git1234", "2.15.0.dev20260801"])
def test_an_untried_release_is_said_once(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    (warning,) = compile_twice()
    text = str(warning.message)
    assert version in text
    assert all(tried in text for tried in compat.TRIED)
    assert "\n" not in text


@pytest.mark.parametrize("version", [*compat.TRIED, "2.13.0+cpu", "2.11.0+cu130", "2.14.0"])
def test_a_tried_release_is_silent(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert not compile_twice()


def test_the_readme_names_what_was_tried():
    (names,) = re.findall(r"tried with ((?:\d+\.\d+\.\d+[, and]*)+)", README.read_text(encoding="utf-8"))
    assert tuple(re.findall(r"[\d.]+\d", names)) == compat.TRIED


def test_torch_without_distributed_is_enough(monkeypatch):
    """Such a build has a ``torch.distributed`` with hardly a name in it; its users train on one device."""
    for name in ("all_gather_single", "all_gather_into_tensor", "ReduceOp", "Work"):
        monkeypatch.delattr(torch.distributed, name, raising=False)
    spec = importlib.util.spec_from_file_location("another_compat", compat.__file__)
    another = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, another)
    spec.loader.exec_module(another)
    assert another.TRIED == compat.TRIED


# --- fake results ---------------------------------------------------------------------------------------------------

aten, ops = torch.ops.aten, torch.ops.qcompile


def fake(mode: Any, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with mode:
        return torch.empty(size, dtype=dtype)


def result(mode: Any, op: Any, *args: Any, asked: list[Any] | None = None) -> Any:
    """Of a call as passes make it; ``asked`` takes down that the op was run."""

    def run() -> Any:
        if asked is not None:
            asked.append(op)
        with mode:
            return op(*args)

    return compat.fake_result(mode, op, args, {}, run)


def told(value: Any, given: list[torch.Tensor]) -> Any:
    """All that passes and Inductor read of a fake result."""
    if isinstance(value, tuple):
        return [told(part, given) for part in value]
    shared = [compat.memory_of(value) == compat.memory_of(tensor) for tensor in given]
    return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad, shared


QUANTIZER = "e2m1 row absmax even"


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (aten.mm.default, lambda x: (x, x)),
        (aten.permute.default, lambda x: (x, [1, 0])),
        (aten.slice.Tensor, lambda x: (x, 1, 3, 5)),
        (aten.reshape.default, lambda x: (x, [4, 16])),
        (aten.reshape.default, lambda x: (x.t(), [4, 16])),
        (ops.quantize.default, lambda x: (x, QUANTIZER, -1)),
        (ops.quantize.default, lambda x: (x, QUANTIZER, -2)),
    ],
)
def test_a_fake_result_that_is_remembered_is_what_the_op_returns(op: Any, arguments: Any) -> None:
    """Also in which tensor's memory it lies, by which Inductor decides what may be written in place."""
    mode, other = FakeTensorMode(), FakeTensorMode()  # the other one remembers nothing
    first, again, new = fake(mode, 8, 8), fake(mode, 8, 8), fake(other, 8, 8)
    asked: list[Any] = []
    values = [result(mode, op, *arguments(x), asked=asked) for x in (first, again)]
    expected = told(op(*arguments(new)), [new])
    assert [told(value, [x]) for value, x in zip(values, (first, again), strict=True)] == [expected] * 2
    assert len(asked) == 1, "the second call ran the op"
    tensors = [value[0] if isinstance(value, tuple) else value for value in values]
    assert compat.memory_of(tensors[0]) != compat.memory_of(tensors[1])


@pytest.mark.parametrize(
    ("op", "one", "two"),
    [
        (aten.mul.Tensor, lambda x: (x, 2), lambda x: (x, 2.0)),
        (aten.add.Tensor, lambda x: (x, 1), lambda x: (x, True)),
        (aten.clone.default, lambda x: (x,), lambda x: (x.t(),)),
        (aten.slice.Tensor, lambda x: (x, 1, 0, 4), lambda x: (x, 1, 4, 8)),
        (aten.view.dtype, lambda x: (x, torch.float32), lambda x: (x, torch.int32)),
        (aten.reshape.default, lambda x: (x, [8, 8]), lambda x: (x.t(), [64])),
    ],
)
def test_calls_that_return_other_values_are_told_apart(op: Any, one: Any, two: Any) -> None:
    mode, other = FakeTensorMode(), FakeTensorMode()
    x, new = fake(mode, 8, 8, dtype=torch.int32), fake(other, 8, 8, dtype=torch.int32)
    for arguments in (one, two, one, two):
        assert told(result(mode, op, *arguments(x)), [x]) == told(op(*arguments(new)), [new])


def test_fake_results_of_symbolic_sizes_are_found_each_time() -> None:
    """A remembered size would be one of another symbol, or leave a guard out."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(torch.empty(6, 8), symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC] * 2))
    asked: list[Any] = []
    for _ in range(2):
        assert isinstance(result(mode, aten.mm.default, x, x.t(), asked=asked).shape[0], torch.SymInt)
    assert len(asked) == 2


def test_an_op_of_ours_is_asked_once_for_equal_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd dispatches it for every layer, and torch remembers ops of its own only."""
    mode, made = FakeTensorMode(), []
    real = FakeTensorMode.__torch_dispatch__
    monkeypatch.setattr(
        FakeTensorMode, "__torch_dispatch__", lambda self, op, *rest: made.append(op) or real(self, op, *rest)
    )
    with mode:
        for _ in range(3):
            ops.quantize(torch.empty(8, 8), QUANTIZER, -1)
    assert made.count(ops.quantize.default) == 1
