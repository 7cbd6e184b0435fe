"""Compiling an update takes a while: only what is about compilation does it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _eager(request):
    if "inductor" in request.keywords:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
