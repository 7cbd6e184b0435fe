"""How the sources hang together: types that cross folders, which folder may import which, and private torch API."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qcompile

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "passes").is_dir(), reason="tests the source tree")

#: Calls into another folder with arguments of wrong types, and what mypy has to say. Where it sees `Any` behind a
#: folder, it says nothing.
PLANTED = {
    "qcompile.passes.pipeline.rewrite(gm, FP4, None, 42)": r'Argument 4 to "rewrite" has incompatible type "int"',
    'qcompile.passes.pipeline.rewrite(gm, FP4, None, None, "x")': r'Too many arguments for "rewrite"',
    'qcompile.passes.pipeline.hooks("context", {})': r'Argument 1 to "hooks" has incompatible type "str"',
    "qcompile.kernels.matmul.providers.choose(3)": r'Argument 1 to "choose" has incompatible type "int"',
    'qcompile.kernels.quantize.reference.quantize(1.0, "e2m1 row")': r'Argument 1 to "quantize" has .* type "float"',
    "qcompile.explain(3)": r'"explain" has incompatible type "int"',
}


def test_mypy_sees_through_every_folder_and_lazy_name(tmp_path):
    """Wrong arguments to other folders' functions are errors, and no public name is `Any`.

    The cache is the one of a plain ``mypy``, so that whichever runs first in CI pays for both.
    """
    imports = [f"import {call.rpartition('.')[0]}" for call in (c.partition("(")[0] for c in PLANTED)]
    reveals = [f"reveal_type(qcompile.{name})" for name in qcompile.__all__]
    head = [*imports, "from torch.fx import GraphModule", "from qcompile.recipes import FP4", "gm: GraphModule"]
    code = "\n".join([*head, *PLANTED, *reveals])
    (tmp_path / "planted.py").write_text(code)
    command = [sys.executable, "-m", "mypy", str(tmp_path / "planted.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = dict(re.findall(r"planted.py:(\d+): (.*)$", run.stdout, re.MULTILINE))
    assert run.returncode == 1, run.stdout + run.stderr
    for line, (call, error) in enumerate(PLANTED.items(), len(head) + 1):
        assert re.search(error, said.pop(str(line), "")), f"{call}: {run.stdout}"
    for line, name in enumerate(qcompile.__all__, len(head) + len(PLANTED) + 1):
        assert re.search(r"Revealed type is .*\w", said.get(str(line), "")), run.stdout
        assert '"Any"' not in said.pop(str(line)), f"type checkers do not know qcompile.{name}"
    assert not said, run.stdout
