"""The distributed example on two CPU processes: killed in the middle and started again, it goes on as if nothing had
happened. What would break: a state that is in no checkpoint, a batch that depends on more than its step, losses lost.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_fsdp2.py"
if not SCRIPT.is_file():
    pytest.skip("tests the source tree", allow_module_level=True)

STEPS, EVERY = 40, 10
SIZES = {"width": 64, "layers": 2, "sequence": 32, "batch": 4, "steps": STEPS, "save-every": EVERY, "report": 5}
COMMAND = [str(SCRIPT), *(word for name, size in SIZES.items() for word in (f"--{name}", str(size)))]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run(out: Path) -> None:
    """To the end, by the command of the page."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, *COMMAND, "--out", str(out)], env=ENVIRONMENT, timeout=300, check=True)


def run_and_kill(out: Path) -> None:
    """Both ranks die once there is a checkpoint. Without torchrun, whose workers outlive it."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *COMMAND, "--out", str(out)],
            env=ENVIRONMENT | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    deadline = time.monotonic() + 300
    while not (out / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in ranks:
        process.kill()
    assert [process.wait() for process in ranks] == [-signal.SIGKILL] * 2


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.mark.nightly
@pytest.mark.inductor
def test_killed_and_started_again(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    run_and_kill(cut)
    assert int((cut / "latest").read_text()) < STEPS
    run(cut)
    expected = (whole / "losses.csv").read_text()
    assert len(expected.splitlines()) == STEPS
    assert (cut / "losses.csv").read_text() == expected
    assert (cut / "loss.png").stat().st_size > 0
    assert [path.name for path in cut.glob("step-*")] == [f"step-{STEPS}"]
