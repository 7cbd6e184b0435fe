"""The report as a web page, as a piece of one (notebooks) and as Markdown. All text is escaped; nothing is fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from .lines import DECISION, SAVED, Line, Listing, View
from .rows import QUANTIZED, Row
from .text import printable, size_text

if TYPE_CHECKING:
    from .model import Report

__all__ = ["fragment", "markdown", "page"]


def page(report: Report) -> str:
    """A stand-alone page: totals, remarks, and the table with a filter and the gradients' rows on request."""
    view = View(Listing.of(report.by_site(), report.ranks))
    headers = [header for header, _ in view.columns]
    title, *remarks = [*report.summary().split("\n"), *view.remarks, *view.legend]
    sites = zip(view.listing.lines, view.cells, strict=True)
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=_html(title),
        backend=_html(report.backend),
        totals="".join(f"<div><dt>{name}</dt><dd>{_html(value)}</dd></div>" for name, value in _totals(report)),
        remarks="".join(f"<li>{_html(remark)}</li>" for remark in remarks),
        head="".join(f"<th scope='col'{_class(header)}>{_html(header)}</th>" for header in headers),
        body="\n".join(_site(line, headers, texts) for line, texts in sites),
        foot=_cells(headers, [_foot(report, header) for header in headers]),
    )


def fragment(report: Report, compact: bool) -> str:
    """Summary and table for a notebook, without scripts or style sheets."""
    view = View(Listing.of(report.by_site(), report.ranks, compact))
    remarks = "<br>".join(map(_html, [*report.summary().split("\n"), *view.remarks, *view.legend]))
    head = _row("th", [header for header, _ in view.columns])
    body = "".join(_row("td", texts) for texts in view.cells)
    return f"<div><p>{remarks}</p><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def markdown(report: Report, roles: bool) -> str:
    """Summary and table in GitHub's Markdown."""
    if roles:
        names = [
            "layer",
            "op",
            "role",
            "shape",
            "formats",
            "estimator",
            "provider",
            "saved_bytes",
            "decision",
            "reason",
        ]
        records = [[str(record[name]) for name in names] for record in report.to_records()]
        texts = report.summary().split("\n")
    else:
        view = View(Listing.of(report.by_site(), report.ranks))
        names = [header for header, _ in view.columns]
        records = view.cells
        texts = [*report.summary().split("\n"), *view.remarks, *view.legend]
    table = [names, ["---:" if name in (SAVED, "saved_bytes") else "---" for name in names], *records]
    # The second line is syntax; everything else is text.
    rows = [f"| {' | '.join(row if i == 1 else map(_markdown, row))} |" for i, row in enumerate(table)]
    return "\n\n".join([*map(_markdown, texts), *(["\n".join(rows)] if records else [])]) + "\n"


def _totals(report: Report) -> list[tuple[str, str]]:
    return [
        ("quantized", f"{report.quantized_sites} of {report.sites} sites"),
        ("graphs", str(report.graphs)),
        ("kept for the backward", size_text(report.saved_bytes)),
        ("of it codes", size_text(report.code_bytes)),
    ]


def _row(tag: str, texts: Sequence[str]) -> str:
    cells = "".join(f"<{tag} style='text-align:left'>{_html(text)}</{tag}>" for text in texts)
    return f"<tr>{cells}</tr>"


def _site(line: Line, headers: Sequence[str], texts: Sequence[str]) -> str:
    """A site as a table body of its own: its line, and a row for each role, which the page hides at first."""
    roles = "".join(_role(r, len(headers) - 1) for r in line.rows if r.role != "-")
    kind = "quantized" if line.decision == QUANTIZED else "wide"
    return f"<tbody class='{kind}'><tr>{_cells(headers, texts)}</tr>{roles}</tbody>"


def _cells(headers: Sequence[str], texts: Sequence[str]) -> str:
    return "".join(
        f"<td data-label='{_html(header)}'{_class(header)}>{_html(text)}</td>"
        for header, text in zip(headers, texts, strict=True)
    )


def _foot(report: Report, header: str) -> str:
    """The total below a column."""
    quantized = f"{report.quantized_sites} of {report.sites} sites quantized"
    totals = {"layer": "total", DECISION: quantized, SAVED: size_text(report.code_bytes)}
    return totals.get(header, "")


def _role(row: Row, width: int) -> str:
    details = filter(None, (row.decision, row.formats, row.estimator, row.provider, row.reason))
    return f"<tr class='role'><td>↳ {_html(row.role)}</td><td colspan='{width}'>{_html(' · '.join(details))}</td></tr>"


def _class(header: str) -> str:
    return f" class='{header}'" if header in ("layer", SAVED) else ""


def _html(text: str) -> str:
    return escape(printable(text), quote=True)


def _markdown(text: str) -> str:
    """Text of the user's, with everything that Markdown reads as syntax escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", printable(text))
