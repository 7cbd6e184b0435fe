"""Run the Python blocks of a page, in order, as one script: ``python docs/run_page.py docs/tutorial.md``.

A block after the comment ``<!-- fragment -->`` shows part of a program and is left out.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

BLOCK = re.compile(r"^(<!-- fragment -->\n)?```python\n(.*?)^```$", re.M | re.S)


def script(page: Path) -> str:
    """The blocks, each on the lines that it has in the page, so that a traceback leads there."""
    text = page.read_text(encoding="utf-8")
    lines: list[str] = []
    for block in BLOCK.finditer(text):
        if not block[1]:
            lines += [""] * (text.count("\n", 0, block.start(2)) - len(lines))
            lines += block[2].splitlines()
    return "\n".join(lines) + "\n"


def run(page: Path) -> None:
    """As a module of its own, since Dynamo looks a function's globals up in the module that it names."""
    module = types.ModuleType(f"page_{page.stem}")
    sys.modules[module.__name__] = module
    exec(compile(script(page), str(page), "exec"), module.__dict__)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/run_page.py PAGE")
    run(Path(sys.argv[1]))
