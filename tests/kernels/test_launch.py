"""Launches that are prepared once: what tells their kinds apart, and what a prepared one is given.

Where a kind left out something that Triton compiles a kernel for, a launch would run the kernel of another one.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from qcompile.kernels import triton as kernels

CUDA = torch.device("cuda", 0)
X = torch.zeros(64)


class Kernel:
    """What a launch asks of a kernel; it compiles to a list of what it is run with."""

    def __init__(self):
        self.signature = inspect.signature(lambda x, n, scale, fmt, width=8: None)
        self.arg_names = list(self.signature.parameters)
        self.runs, self.compilations = [], 0

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **constants):
            self.compilations += 1
            return SimpleNamespace(run=lambda *given: self.runs.append(given), function="f", packed_metadata="m")

        return compile_and_run


def kind(*arguments, kernel=None, device=CUDA, contract=False, **constants):
    return kernels._kind(kernel, device, arguments, constants, contract)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((X,), (X.bfloat16(),)),
        ((X,), (X[1:],)),
        ((X, 16), (X, 17)),
        ((X, 1), (X, 3)),
        ((X, 32), (X, 2**31)),
        ((X, None), (X, X)),
        ((X, None), (X, 16)),
        ((X, 3), (X, 3.0)),
    ],
    ids=["dtype", "alignment", "multiple of 16", "one", "64 bits", "none and tensor", "none and number", "float"],
)
def test_kinds_are_told_apart_as_triton_specializes(one, other):
    assert kind(*one) != kind(*other)


def test_kinds_are_told_apart_by_constants_and_device():
    fmt = object()
    kinds = [
        kind(X, fmt=fmt, num_warps=4),
        kind(X, fmt=object(), num_warps=4),
        kind(X, fmt=fmt, num_warps=8),
        kind(X, fmt=fmt, num_warps=4, contract=True),
        kind(X, fmt=fmt, num_warps=4, device=torch.device("cuda", 1)),
        kind(X, fmt=fmt, num_warps=4, kernel=Kernel()),
    ]
    assert len(set(kinds)) == len(kinds)
    assert kind(X, fmt=fmt, num_warps=4) == kinds[0]
    assert kind(torch.ones(8), 48, 2.5, shape=(1, 2)) == kind(X, 32, 3.5, shape=(1, 2))


def test_descriptors_and_cpus_are_left_to_triton():
    assert kind(SimpleNamespace(base=X)) is None
    assert kind(X, device=torch.device("cpu")) is None


def test_a_prepared_launch_has_its_own_addresses_and_numbers(monkeypatch):
    kernel, fmt = Kernel(), object()
    monkeypatch.setattr(kernels, "_prepared", {})
    monkeypatch.setattr(kernels, "_kind", lambda kernel, device, *rest: "one kind")
    for n, x in ((3, X), (5, X[32:])):
        kernels.launch(kernel, (7, 2), x, n, 0.5, fmt=fmt, num_warps=4)
    assert kernel.compilations == 1
    assert kernel.runs == [(7, 2, 1, 0, "f", "m", None, None, None, X[32:].data_ptr(), 5, 0.5, fmt, 8)]
