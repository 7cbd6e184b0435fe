"""The distributed example on two CPU processes: killed in the middle and started again, it goes on as if nothing had
happened. What would break: a state that is in no checkpoint, a batch that depends on more than its step, losses lost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "pretrain_fsdp2.py"
if not SCRIPT.is_file():
    pytest.skip("tests the source tree", allow_module_level=True)

SIZES = "--width 64 --layers 2 --sequence 32 --batch 4 --steps 8 --save-every 2 --report 4".split()


def start(out: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen([*launcher, str(SCRIPT), "--out", str(out), *SIZES], env=environment, start_new_session=True)


@pytest.mark.slow
@pytest.mark.inductor
def test_killed_and_started_again(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole).wait(300) == 0
    killed, deadline = start(cut), time.monotonic() + 300
    while not (cut / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert int((cut / "latest").read_text()) < 8
    assert start(cut).wait(300) == 0
    expected = (whole / "losses.csv").read_text()
    assert len(expected.splitlines()) == 8
    assert (cut / "losses.csv").read_text() == expected
    assert (cut / "loss.png").stat().st_size > 0
    assert [path.name for path in cut.glob("step-*")] == ["step-8"]
