"""What a worker script of :class:`.ranks.Ranks` does on its rank: run cells over gloo, and keep what they return."""

from __future__ import annotations

import datetime
import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["run_cells"]


def run_cells(cells: Mapping[str, Callable[[Path], dict[str, Any]]], timeout: float = 60) -> None:
    """``python SCRIPT GROUP RANK WORLD DIRECTORY``: those whose names begin with ``GROUP``, called with the directory.

    Results are left in ``DIRECTORY/{NAME}.rank{RANK}.pt``. ``timeout``: seconds that a collective may take.
    """
    group, rank, world, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    # As in the tests' own processes: what is imported lives until the end, and so does most of what tracing makes.
    gc.set_threshold(2_000, 50, 50)
    gc.freeze()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    for name, cell in cells.items():
        if name.startswith(group):
            print(f"{name}:", flush=True)  # the last line before a traceback says whose it is
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.save(cell(directory), directory / f"{name}.rank{rank}.pt")
    dist.destroy_process_group()
