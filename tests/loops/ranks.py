"""Processes that run the cells of a worker script, and what went wrong if they did not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

WORLD = 2
ROOT = Path(__file__).resolve().parents[2]


class Ranks:
    """``python SCRIPT GROUP RANK WORLD DIRECTORY``, once per rank, until all are done.

    Args:
        script: leaves what its cell ``NAME`` returned in ``DIRECTORY/{GROUP}_{NAME}.rank{RANK}.pt``.
        group: cells that share the processes; starting these is most of the time.
        directory: for results and logs.
        environments: one dictionary per rank of variables to set beside those of this process.
        timeout: seconds.
    """

    def __init__(
        self,
        script: str,
        group: str,
        directory: Path,
        environments: Sequence[dict[str, str]] = ({},) * WORLD,
        timeout: float = 180,
    ) -> None:
        self.script, self.group, self.directory, self.timeout = script, group, directory, timeout
        self.problem = self._run(environments)

    def _run(self, environments: Sequence[dict[str, str]]) -> str:
        """Run to the end, to the first failure, or until time is over; what went wrong, with tracebacks."""
        logs = [self.directory / f"rank{rank}.log" for rank in range(WORLD)]
        processes = []
        for rank, path in enumerate(logs):
            command = [sys.executable, self.script, self.group, str(rank), str(WORLD), str(self.directory)]
            paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))  # scripts import tests
            environment = {**os.environ, "PYTHONPATH": paths, **environments[rank]}
            with path.open("w") as log:
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        deadline = time.monotonic() + self.timeout
        try:
            while True:
                codes = [process.poll() for process in processes]
                if any(codes) or time.monotonic() > deadline or None not in codes:
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if not any(codes) and None not in codes:
            return ""
        failed = [rank for rank, code in enumerate(codes) if code]
        what = f"rank {failed[0]} exited with {codes[failed[0]]}" if failed else f"not done after {self.timeout} s"
        return f"{what}\n" + "\n".join(f"--- rank {rank}\n{path.read_text()[-4000:]}" for rank, path in enumerate(logs))

    def __call__(self, cell: str) -> list[dict[str, Any]]:
        """What each rank returned from a cell."""
        paths = [self.directory / f"{self.group}_{cell}.rank{rank}.pt" for rank in range(WORLD)]
        if not all(path.exists() for path in paths):
            pytest.fail(f"no result of {self.group}_{cell}: {self.problem}", pytrace=False)
        return [torch.load(path, weights_only=True) for path in paths]
