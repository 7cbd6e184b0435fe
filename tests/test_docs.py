"""The pages are true: their code runs, they name every option and every public name, and their links lead somewhere.

``mkdocs build --strict``, which checks the links between pages, is part of `.ci/run`.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest

import qcompile
from qcompile import backends, compat
from qcompile.ir.definitions import definitions_as_before
from qcompile.ir.estimators import ESTIMATORS
from qcompile.ir.formats import FORMATS
from qcompile.ir.quantizer import ROUNDINGS, SCALE_RULES
from qcompile.ir.recipe import Recipe
from qcompile.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_page = load(DOCS / "run_page.py")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
RUNNABLE = [page for page in PAGES if run_page.script(page).strip()]


def test_the_first_steps_are_among_the_pages_that_run():
    """A typo in the fence of a block would leave a page out."""
    names = {page.relative_to(ROOT).as_posix() for page in RUNNABLE}
    assert {"README.md", "docs/quickstart.md", "docs/tutorial.md", "docs/options.md"} <= names


@pytest.fixture
def _tables_as_before():
    """A page adds rows to the tables of the process."""
    with definitions_as_before(FORMATS, SCALE_RULES, ESTIMATORS), mock.patch.dict(RECIPES):
        yield


@pytest.mark.usefixtures("fresh_dynamo", "_tables_as_before")
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Every pass runs; graphs are executed eagerly, since code generation takes half a minute."""
    eager = functools.partial(backends.compile_with, inner_compile=compat.eager_inner_compile)
    monkeypatch.setattr(backends, "compile_with", eager)
    monkeypatch.chdir(tmp_path)
    try:
        run_page.run(page)
    finally:
        sys.modules.pop(f"page_{page.stem}", None)


def test_a_block_keeps_its_line_and_fragments_are_left_out(tmp_path):
    """Otherwise a traceback leads nowhere, or half a program is run."""
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n<!-- fragment -->\n```python\n...more\n```\n\n```python\nhere = 1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run_page.run(page)
    assert error.traceback[-1].lineno + 1 == 9


def test_the_readme_fits_the_first_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 60


def test_links_of_the_readme_lead_somewhere():
    """On PyPI only absolute links do. They can be absolute once the project has an address."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert "Repository" not in urls or not links, f"write {urls['Repository']} in front of {links}"


def test_every_option_has_a_row():
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| (`.*?) \|", text, re.M)
    assert sorted({name for cell in cells for name in re.findall(r"`(\w+)`", cell)}) == sorted(Recipe.option_names())


def test_every_word_of_an_operand_is_listed():
    text = (DOCS / "options.md").read_text(encoding="utf-8")
    section = text[text.index("## Operands") : text.index("## Rules")]
    for kind, low, high in (("int", 2, 8), ("midrise", 1, 8)):
        section = section.replace(
            f"`{kind}{low}` … `{kind}{high}`", " ".join(f"`{kind}{b}`" for b in range(low, high + 1))
        )
    listed = set(re.findall(r"`(\w+)", section))
    formats = {fmt.name for fmt in FORMATS.values() if not fmt.pruned}
    assert {*formats, *SCALE_RULES, *ROUNDINGS, *ESTIMATORS} - listed == set()
    families = {name for name in listed if re.fullmatch(r"(int|midrise)\d", name)}
    assert families <= formats, "a page names a format that there is not"


def test_every_public_name_is_in_the_reference():
    shown = re.findall(r"^::: qcompile\.(\w+)$", (DOCS / "reference.md").read_text(encoding="utf-8"), re.M)
    assert sorted(shown) == sorted(qcompile.__all__)


def test_versions_agree():
    """A release touches four files."""
    citation, changes, project = (
        (ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md", "pyproject.toml")
    )
    assert re.findall(r"^version: (.+)$", citation, re.M) == [qcompile.__version__]
    assert tomllib.loads(project)["project"]["version"] == qcompile.__version__
    assert re.search(rf"^## (\[{re.escape(qcompile.__version__)}\]|{re.escape(qcompile.__version__)}\b)", changes, re.M)
