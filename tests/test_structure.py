"""How the sources hang together: types that cross folders, which folder may import which, and private torch API."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
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
    pytest.importorskip("mypy")
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


# --- private torch API ----------------------------------------------------------------------------------------------

#: The modules that may use private torch API, and what for. A new release of torch can break these alone.
PRIVATE_API = {
    "qcompile/compat.py": "gives it a name and a docstring for everything else",
    "kernels/choices.py": "overrides one of Inductor's choices: rows that stay in registers",
    "kernels/cpp.py": "builds C++ with Inductor's search for a compiler, its locks and its cache",
    "kernels/extern.py": "an extern kernel of Inductor's, with another name in generated code",
    "kernels/lowerings.py": "registers the lowerings below with Inductor",
    "kernels/formula/inductor_target.py": "prints formulas through Inductor's handler of scalar operations",
    "kernels/formula/triton_target.py": "printed modules lie in Inductor's cache, as those of its own kernels do",
    "kernels/quantize/inductor.py": "loop bodies, which Inductor fuses with their neighbours",
    "kernels/estimate/inductor.py": "loop bodies",
    "kernels/outliers/inductor.py": "loop bodies",
    "kernels/matmul/inductor.py": "Triton templates and extern kernels, between which Inductor's autotuning chooses",
    "kernels/matmul/providers.py": "torch._scaled_mm is cuBLASLt's FP8 product; compat would import Inductor with it",
}


def is_private(name: str) -> bool:
    """``torch._inductor.ir`` and ``torch.fx.experimental`` are; operators (``torch.ops.aten._to_copy``) are not: a
    graph has them whoever asks.
    """
    first, *parts = name.split(".")
    private = any(part == "experimental" or (part[0] == "_" and not part.startswith("__")) for part in parts)
    return first == "torch" and parts[:1] != ["ops"] and private


def torch_names(tree: ast.AST) -> Iterator[str]:
    """Full names of all that a module imports, and of attributes of what it has imported."""
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                top = alias.name.partition(".")[0]
                bound[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            path, _, attributes = ast.unparse(node).partition(".")
            if path in bound:
                yield f"{bound[path]}.{attributes}"


@pytest.mark.parametrize(
    ("code", "private"),
    [
        ("import torch._dynamo", True),
        ("from torch import _inductor", True),
        ("def f():\n    from torch._inductor.lowering import lowerings", True),
        ("from torch.fx.experimental.proxy_tensor import make_fx", True),
        ("import torch\ntorch._C._nn.linear(x)", True),
        ("import torch as t\nt._scaled_mm", True),
        ("from torch.utils import checkpoint as c\nc._infer_device_type(1)", True),
        ("import torch\ntorch.ops.aten._to_copy(x); torch.__version__; torch.fx.Graph", False),
        ("from ._private import x; from qcompile import _own; import triton.experimental", False),
    ],
)
def test_the_walk_below_knows_private_api(code, private):
    assert any(map(is_private, torch_names(ast.parse(code)))) == private


def test_private_torch_api_is_used_where_it_is_declared_and_nowhere_else():
    users = {
        str(path.relative_to(ROOT)): names
        for room in ("qcompile", "passes", "kernels", "examples")
        for path in (ROOT / room).rglob("*.py")
        if (names := sorted(set(filter(is_private, torch_names(ast.parse(path.read_text(encoding="utf-8")))))))
    }
    strays = {file: names for file, names in users.items() if file not in PRIVATE_API}
    assert not strays, "give it a name in qcompile/compat.py"
    assert set(users) == set(PRIVATE_API), "a module that needs no private API any more leaves the list"


# --- which room may import which ------------------------------------------------------------------------------------

#: Each imports what stands before it, at any level of a function. ``qcompile/__init__.py`` loads names on first use.
ROOMS = (
    "ir",
    "compat",
    "recipes",
    "kernels",
    "definitions",
    "functional",
    "stored",
    "optim",
    "distributed",
    "passes",
    "regional",
    "session",
    "backends",
    "schedule",
    "numerics",
    "report",
    "search",
    "apps",
    "__main__",
)
#: ``options={"monitor": True}`` makes a monitor, which itself reads a backend's options.
EXCEPTIONS = {("backends", "numerics")}


def imported(module: str, is_package: bool, tree: ast.AST) -> Iterator[str]:
    """Full names of all that a module imports, relative imports included."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_rooms_import_one_way():
    """Who reads a room need not know those above it; a cycle would also make the order of imports matter."""
    wrong = set()
    for folder in ("qcompile", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / "qcompile" if folder == "qcompile" else ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(["qcompile", *(parts[:-1] if is_package else parts)])
            for name in imported(module, is_package, ast.parse(path.read_text(encoding="utf-8"))):
                here, there = (*module.split("."), "")[1], (*name.split("."), "")[1]
                if here and name.startswith("qcompile.") and there not in (here, "__version__"):
                    assert here in ROOMS, f"which rooms may {here!r} import? ROOMS does not say"
                    if there not in ROOMS[: ROOMS.index(here)] and (here, there) not in EXCEPTIONS:
                        wrong.add(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong
