"""What an installation offers: the entry point, cheap imports, complete packages and no stray names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = tuple(ROOT / room for room in ("qcompile", "passes", "kernels"))
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


def test_python_m_is_the_command():
    """Where the script's folder is not on the path."""
    command = [sys.executable, "-m", "qcompile", "--help"]
    help_text = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/").stdout
    assert help_text.startswith("usage: qcompile ")


def test_the_backend_is_found_by_name_and_brings_only_what_a_compilation_needs():
    """Nobody has to import us: torch lists the entry point, and loads it when a model asks for it. The import budget,
    without a clock: nothing of the demo's, the report's or third parties' comes along.
    """
    loaded = modules_after(
        "import sys, torch._dynamo as dynamo\n"
        "assert 'qcompile_fp4' in dynamo.list_backends(exclude_tags=None)\n"
        "assert not [m for m in sys.modules if m.startswith('qcompile')], 'listing must not import'\n"
        "from torch._dynamo.backends.registry import lookup_backend\n"
        "backend = lookup_backend('qcompile_fp4')\n"
        "assert (backend.__module__, backend.__name__) == ('qcompile.backends', 'qcompile_fp4')\n"
    )
    assert "qcompile.backends" in loaded
    third_party = {"transformers", "torchao", "matplotlib", "rich", "hypothesis", "datasets", "torchvision"}
    assert not third_party & {name.split(".")[0] for name in loaded}
    assert not {"qcompile.report", "qcompile.apps"} & loaded


def test_a_cpu_needs_no_triton():
    """torch for CPUs comes without it: what a compilation there registers must not import it."""
    loaded = modules_after(
        "import sys\n"
        "sys.modules['triton'] = None  # importing it raises\n"
        "from qcompile.kernels.lowerings import register_lowerings\n"
        "register_lowerings()\n"
        "import qcompile.distributed, qcompile.optim, qcompile.passes.pipeline\n"
        "assert sys.modules.pop('triton') is None\n"
    )
    assert not {name for name in loaded if name.split(".")[0] == "triton"}


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


def test_every_folder_with_code_is_a_package():
    """setuptools leaves a folder without ``__init__.py`` out of the wheel; an editable checkout would not notice."""
    stray = {p.parent for folder in ROOMS for p in folder.rglob("*.py") if not (p.parent / "__init__.py").exists()}
    assert not stray


@pytest.mark.parametrize("room", ["passes", "kernels"])
def test_the_package_reaches_the_top_level_folders_by_relative_links(room):
    """An absolute link would be broken in every other clone, and mypy would see `Any` behind it."""
    link = ROOT / "qcompile" / room
    assert link.is_symlink(), f"qcompile/{room} is no link; on Windows: git config core.symlinks true"
    assert str(link.readlink()) == f"../{room}"
    assert Path(import_module(f"qcompile.{room}").__file__).resolve().parent == ROOT / room


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


# --- what pip builds ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A clone, as far as a build reads it: a build leaves files in the folder that it runs in."""
    folder = tmp_path_factory.mktemp("build") / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    folder.mkdir()
    for room in ("qcompile", "passes", "kernels"):
        shutil.copytree(ROOT / room, folder / room, symlinks=True, ignore=unwanted)
    for file in ("pyproject.toml", PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]):
        shutil.copy(ROOT / file, folder / file)
    return folder


def build(kind: str, source: Path, target: Path) -> Path:
    """Runs the hook that pip runs for ``kind`` ("wheel", "editable" or "sdist"); the archive that it made."""
    script = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    subprocess.run([sys.executable, "-c", script], cwd=source, check=True, capture_output=True, text=True)
    (archive,) = target.iterdir()
    return archive


def modules_of_the_tree() -> set[str]:
    return {
        str(Path("qcompile" if room.name == "qcompile" else f"qcompile/{room.name}") / path.relative_to(room))
        for room in ROOMS
        for path in room.rglob("*.py")
    }


@pytest.mark.parametrize("through_sdist", [False, True], ids=["wheel", "sdist, wheel"])
def test_the_wheel_puts_one_name_into_site_packages(source, tmp_path, through_sdist):
    """Nothing called ``passes`` or ``kernels`` may reach site-packages, and no module may be left out."""
    if through_sdist:
        sdist = build("sdist", source, tmp_path / "sdist")
        with tarfile.open(sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        source = tmp_path / sdist.name.removesuffix(".tar.gz")
    names = zipfile.ZipFile(build("wheel", source, tmp_path / "wheel")).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"qcompile"}
    assert {name for name in names if name.endswith(".py")} == modules_of_the_tree()
    for package, patterns in PYPROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert [n for n in names if Path(n).match(f"{package.replace('.', '/')}/{pattern}")], (package, pattern)


def test_an_editable_installation_finds_the_checkout_and_adds_no_other_name(source, tmp_path):
    """setuptools may put the checkout itself on the path; then every program could import our ``tests``."""
    site = tmp_path / "site"
    with zipfile.ZipFile(build("editable", source, tmp_path / "wheel")) as wheel:
        wheel.extractall(site)
    names = ["qcompile", "qcompile.passes", "qcompile.kernels", "passes", "kernels", "tests", "benchmarks"]
    code = (
        f"import json, site; site.addsitedir({str(site)!r})\n"
        "from importlib.util import find_spec\n"
        f"print(json.dumps([s and s.origin for s in map(find_spec, {names})]))"
    )
    isolated = [sys.executable, "-I", "-S", "-c", code]  # without the packages of this environment, among them ours
    run = subprocess.run(isolated, capture_output=True, text=True, check=True, cwd=tmp_path)
    package = source / "qcompile"
    found = [str(package / folder / "__init__.py") for folder in (".", "passes", "kernels")]
    assert json.loads(run.stdout) == [*found, None, None, None, None]
