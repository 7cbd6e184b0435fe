"""Constants that outlive the call that makes them: the thread that prepares a CUDA graph must not allocate them."""

from __future__ import annotations

import threading

import pytest
import torch

from qcompile.kernels.lasting import lasting


def test_another_thread_allocates() -> None:
    threads = []

    def make() -> torch.Tensor:
        threads.append(threading.get_ident())
        return torch.arange(3)

    assert lasting(make).tolist() == [0, 1, 2]
    assert threads != [threading.get_ident()]


def test_what_fails_there_fails_here() -> None:
    with pytest.raises(ZeroDivisionError):
        lasting(lambda: torch.ones(1 // 0))
