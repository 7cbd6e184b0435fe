"""Small layers are enough for a report: the recipe's own ``min_side`` would leave them alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcompile.recipes import RECIPES


@pytest.fixture(scope="module", autouse=True)
def small_layers_are_quantized() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "qcompile_fp4", RECIPES["qcompile_fp4"].override({"min_side": 0}))
        yield
