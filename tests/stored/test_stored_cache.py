"""Generated code of packed weights: right, and found again in both of torch's caches by another process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

STEP = """
import json, sys
import torch
from torch import nn
from torch._dynamo.utils import counters
import qcompile
found = {}
for spec in sys.argv[1:]:
    torch._dynamo.reset(); counters.clear(); torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 128))
    qcompile.pack_(model, spec)
    x = torch.randn(7, 128, requires_grad=True)
    results = []
    for step in (model, torch.compile(model, backend="qcompile_stored", fullgraph=True)):
        y = step(x)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=2e-6 * eager.abs().max().item())
    found[spec] = {
        f"{cache} {what}": counters[cache][f"{name}_cache_{what}"]
        for cache, name in (("inductor", "fxgraph"), ("aot_autograd", "autograd")) for what in ("hit", "miss", "bypass")
    }
print(json.dumps(found))
"""
NF4, AF4 = (f"{name} block64 absmax_bnb; nested" for name in ("nf4", "af4"))
MISSED = {
    "inductor hit": 0,
    "inductor bypass": 0,
    "aot_autograd hit": 0,
    "aot_autograd miss": 1,
    "aot_autograd bypass": 0,
}
HIT = {"inductor hit": 2, "inductor miss": 0, "inductor bypass": 0}
HIT |= {"aot_autograd hit": 1, "aot_autograd miss": 0, "aot_autograd bypass": 0}


@pytest.mark.inductor
def test_both_caches_hit_in_a_second_process_and_another_spec_misses(tmp_path):
    """AF4 has the tensors of NF4, with the same shapes: only the text of the spec tells the two apart."""

    def run(*specs):
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1",
                       "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
        command = [sys.executable, "-c", STEP, *specs]
        process = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        assert process.returncode == 0, process.stderr[-3000:]
        return json.loads(process.stdout.splitlines()[-1])

    assert run(NF4)[NF4].items() >= MISSED.items()
    again = run(NF4, AF4)
    assert again[NF4] == HIT
    assert again[AF4].items() >= MISSED.items()
