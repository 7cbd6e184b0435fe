"""Pages of the site that lie outside of docs/: a link such as ``../benchmarks/README.md`` works in the repository and
on the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

#: What the site takes from outside of docs/, as globs.
OUTSIDE = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/*.md",
    "benchmarks/*.csv",
    "benchmarks/*.txt",
    "benchmarks/h200/*",
    "examples/*.py",
    "qcompile/recipes/*.py",
)

LINK = re.compile(r"(?<=\]\()([^)\s#]+)")


def on_files(files: Any, config: Any) -> Any:
    """Add the files, where the repository has them."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    outside = not (ROOT / "docs" / here).is_file()
    folder = posixpath.dirname(here if outside else f"docs/{here}")

    def on_the_site(match: re.Match[str]) -> str:
        if ":" in match[1]:
            return match[1]
        target = posixpath.normpath(posixpath.join(folder, match[1])).removeprefix("docs/")
        return posixpath.relpath(target, posixpath.dirname(here) or ".")

    return LINK.sub(on_the_site, markdown)
