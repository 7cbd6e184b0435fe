"""Docstrings for mkdocstrings: ours are reStructuredText, what it renders is Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`[~!]?([^`]+)`")
LITERAL = re.compile(r"(?<!`)``(?!`)")
LITERAL_BLOCK = re.compile(r"::(?=\n)")
SIMPLE_TABLE = re.compile(r"(?m)^(?P<rule>=+ [= ]+)\n(?:.*\n)+?(?P=rule)\n(?:.*\n)+?(?P=rule)$")


class Docstrings(griffe.Extension):
    """Docstrings as Markdown, before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """Roles become code, literal blocks indented blocks, simple tables preformatted text."""
    text = SIMPLE_TABLE.sub(lambda table: f"```text\n{table[0]}\n```", text)
    text = LITERAL.sub("`", ROLE.sub(r"`\1`", text))
    return LITERAL_BLOCK.sub(":", text)
