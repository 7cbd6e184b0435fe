"""What an installation offers: the entry point, cheap imports, complete packages and no stray names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

pytestmark = pytest.mark.skipif(not (ROOT / "passes").is_dir(), reason="tests the source tree")


def modules_after(code: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh interpreter that ran ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_else():
    """``import qcompile`` is free: torch, and our own submodules, come on first use of a name."""
    loaded = modules_after("import qcompile; assert qcompile.__version__; assert 'explain' in qcompile.__all__")
    assert {name for name in loaded if name.split(".")[0] == "qcompile"} == {"qcompile"}
    assert not {"torch", "numpy", "rich"} & loaded


def test_the_backend_is_found_by_name_and_only_then_imported():
    """Nobody has to import us: torch lists the entry point, and loads it when a model asks for it."""
    loaded = modules_after(
        "import sys, torch._dynamo as dynamo\n"
        "assert 'qcompile_fp4' in dynamo.list_backends(exclude_tags=None)\n"
        "assert not [m for m in sys.modules if m.startswith('qcompile')], 'listing must not import'\n"
        "from torch._dynamo.backends.registry import lookup_backend\n"
        "backend = lookup_backend('qcompile_fp4')\n"
        "assert (backend.__module__, backend.__name__) == ('qcompile.backends', 'qcompile_fp4')\n"
    )
    assert "qcompile.backends" in loaded


def test_the_backend_imports_only_what_a_compilation_needs():
    """The import budget, without a clock: nothing of the demo's, the report's or third parties' comes along."""
    loaded = modules_after("import qcompile.backends")
    third_party = {"transformers", "torchao", "matplotlib", "rich", "hypothesis", "datasets", "torchvision"}
    assert not third_party & {name.split(".")[0] for name in loaded}
    assert not {"qcompile.report", "qcompile.cli"} & loaded


def test_in_a_checkout_the_folder_kernels_may_be_taken_for_hugging_faces():
    """transformers looks for a package of that name; finding our folder must not register our ops twice."""
    code = "import kernels, qcompile.kernels; assert kernels is not qcompile.kernels"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_name_the_package_does_not_have_is_an_attribute_error():
    package = import_module("qcompile")
    assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="'qcompile' has no attribute 'quantise'"):
        _ = package.quantise


def test_every_folder_with_code_is_installed():
    """A package missing from the list works in an editable checkout and breaks for everybody else."""
    folders = {"qcompile": "qcompile", "passes": "qcompile.passes", "kernels": "qcompile.kernels"}
    found = set()
    for folder, package in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
        stray = {p.parent for p in (ROOT / folder).rglob("*.py") if not (p.parent / "__init__.py").exists()}
        assert not stray, f"no __init__.py in {stray}"
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_all_that_pyproject_points_at_exists():
    """Read-me and license files, data, and the targets of all entry points."""
    project = PYPROJECT["project"]
    for file in (project["readme"], *project["license-files"]):
        assert (ROOT / file).is_file(), file
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), f"{package}: {pattern}"
    entries = {**project["scripts"], **project["entry-points"]["torch_dynamo_backends"]}
    for target in entries.values():
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name)), target


def test_each_recipe_is_a_backend_of_its_own_name():
    from qcompile.recipes import RECIPES

    entries = PYPROJECT["project"]["entry-points"]["torch_dynamo_backends"]
    assert entries == {name: f"qcompile.backends:{name}" for name in RECIPES}
    assert all(recipe.name == name for name, recipe in RECIPES.items())


@pytest.mark.slow
def test_the_wheel_puts_one_name_into_site_packages(tmp_path):
    """Nothing called ``passes`` or ``kernels`` may reach site-packages, and no module may be left out."""
    source = tmp_path / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    source.mkdir()
    for folder in ("qcompile", "passes", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=unwanted)
    for file in ("pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]):
        shutil.copy(ROOT / file, source / file)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"qcompile"}
    assert "qcompile/py.typed" in names, "users' type checkers would ignore the annotations"
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {
        str(Path("qcompile" if folder == "qcompile" else f"qcompile/{folder}") / path.relative_to(source / folder))
        for folder in ("qcompile", "passes", "kernels")
        for path in (source / folder).rglob("*.py")
    }
