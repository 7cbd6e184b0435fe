"""Constants on a device that live as long as the process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["lasting"]


def lasting(make: Callable[[], Tensor]) -> Tensor:
    """The tensor that ``make`` returns, ready for every stream.

    The call that needs it first may be the one that prepares a CUDA graph. What its thread allocates is the graph's
    memory, in which torch refuses a tensor that outlives the call; so another thread allocates it.
    """
    with ThreadPoolExecutor(1) as other_thread:
        return other_thread.submit(_ready, make).result()


def _ready(make: Callable[[], Tensor]) -> Tensor:
    made = make()
    if made.is_cuda:
        torch.cuda.current_stream(made.device).synchronize()
    return made
