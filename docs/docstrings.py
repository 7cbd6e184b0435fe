"""What mkdocstrings has to be told of our sources: names that ``qcompile`` loads on first use, and reStructuredText."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`[~!]?([^`]+)`")
LITERAL = re.compile(r"(?<!`)``(?!`)")
LITERAL_BLOCK = re.compile(r"::(?=\n)")
SIMPLE_TABLE = re.compile(r"(?m)^(?P<rule>=+ [= ]+)\n(?:.*\n)+?(?P=rule)\n(?:.*\n)+?(?P=rule)$")


class Docstrings(griffe.Extension):
    """Public names as members of the package, and docstrings as Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        if "_EXPORTS" not in pkg.members:
            return
        for name, module in ast.literal_eval(str(pkg["_EXPORTS"].value)).items():
            if name in pkg.members:
                continue  # imported for type checkers
            home = pkg[module.removeprefix(f"{pkg.path}.")]
            if name in home.modules:  # the package's name for its submodule's: report/explain.py has `explain`
                home = home.modules[name]
            pkg.set_member(name, griffe.Alias(name, f"{home.path}.{name}"))

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Roles become code, literal blocks indented blocks, simple tables preformatted text."""
    text = SIMPLE_TABLE.sub(lambda table: f"```text\n{table[0]}\n```", text)
    text = LITERAL.sub("`", ROLE.sub(r"`\1`", text))
    return LITERAL_BLOCK.sub(":", text)
