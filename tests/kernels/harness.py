"""What the tests of Triton kernels share: the process in which Triton interprets, and a driver that only claims a card.

The interpreter has to be chosen before Triton is imported, so tests named ``test_interpreted_…`` run in a process of
their own, which one test of their file starts through :func:`run_interpreted`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import interpreter

from qcompile.kernels.triton import launch as triton_launch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, not its interpreter")
SM90 = GPUTarget("cuda", 90, 32)


def _search_the_language_once_a_launch() -> None:
    """Make the interpreter look for what it replaces in ``triton.language`` when a kernel is launched, not again at
    every call of a function within, where all of it has been replaced: a reduction calls its function once per element.
    """
    search, languages = interpreter._patch_lang, (interpreter.tl, interpreter.tl.core)

    def search_if_needed(function):
        if any(interpreter.tl.core.is_builtin(language.load) for language in languages):
            return search(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = search_if_needed


def _reduce_by_halves() -> None:
    """Make the interpreter reduce with a kernel's own function (a maximum that keeps NaN, say) as a card does: all
    neighbours are combined at once, until one is left along the axis. It calls the function once per element.
    """
    reduce_elements = interpreter.ReduceOps.generic_reduce

    def reduce(self, operands):
        operands, axis = self.unravel(operands, self.axis)
        while (size := operands[0].handle.data.shape[axis]) > 1:
            left, right = (
                [self.to_tensor(x.handle.data.take(range(first, size, 2), axis), x.dtype) for x in operands]
                for first in (0, 1)
            )
            combined = self.combine_fn.fn(*left, *right)
            combined = combined if isinstance(combined, tuple) else (combined,)
            operands = [self.to_tensor(y.handle.data, x.dtype) for x, y in zip(operands, combined, strict=True)]
        return reduce_elements(self, operands)

    interpreter.ReduceOps.generic_reduce = reduce


if INTERPRETED:
    _search_the_language_once_a_launch()
    _reduce_by_halves()


def run_interpreted(file: str) -> None:
    """Run the interpreted tests of ``file``; skips if this is that process.

    There are as many workers as cores already, so that process has none of its own.
    """
    if INTERPRETED:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-n0", "-x", "-k", "test_interpreted", "--show-capture=no", file]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@contextmanager
def launching(instead: Callable[..., None]) -> Iterator[None]:
    """Within it ``instead`` is called where a module of kernels/ launches a Triton kernel."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("qcompile.kernels.") and getattr(module, "launch", None) is triton_launch:
                stack.enter_context(mock.patch.object(module, "launch", instead))
        yield


class ClaimedDriver:
    """A driver that answers what Inductor asks while it generates code, and can launch nothing."""

    def get_current_target(self):
        return SM90

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True
