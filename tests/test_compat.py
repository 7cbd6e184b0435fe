"""Which releases of torch the package has been tried with, and what it says of others."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

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
