"""The report for a terminal: a rich table that fits its width."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD as PLAIN
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from .lines import SAVED, Listing, View, counted
from .rows import QUANTIZED, Row
from .text import folded_name, printable, ranks_text, size_text

if TYPE_CHECKING:
    from .model import Report

__all__ = ["ReportTable", "roles_table"]

#: From how many columns on a decision is given in full beside its line; longer ones wrap.
ROOM = 50
#: Ways to show a listing (see :class:`View`), the widest first. The last one is for any width: long names wrap.
VIEWS = (
    {"inline": True, "columns_for_fields": True, "saved": True},
    {"inline": True, "columns_for_fields": False, "saved": True},
    {"inline": False, "columns_for_fields": False, "saved": True},
    {"inline": False, "columns_for_fields": False, "saved": False},
)


@dataclass(frozen=True)
class ReportTable:
    """One line per site: of :data:`VIEWS` the first that fits the console."""

    report: Report
    compact: bool

    @property
    def row_count(self) -> int:
        return len(self.listing().lines)

    def listing(self) -> Listing:
        return Listing.of(self.report.by_site(), self.report.ranks, self.compact)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        views = [View(self.listing(), **choice) for choice in VIEWS]
        view = next((view for view in views if _width(view) <= options.max_width), views[-1])
        yield from map(_text, [*self.report.summary().split("\n"), *view.remarks])
        if view.cells:
            yield _table(view)
        yield from map(_text, view.legend)


def _table(view: View) -> Table:
    table = Table(header_style="bold") if view.inline else Table(header_style="bold", box=PLAIN, padding=(0, 1, 0, 0))
    table.show_edge = view.inline
    _add_columns(table, [header for header, _ in view.columns])
    if not view.inline:  # the name is what wraps
        for column in table.columns[1:]:
            column.no_wrap = True
    for line, texts in zip(view.listing.lines, view.cells, strict=True):
        _add_row(table, texts, line.decision)
    return table


def _width(view: View) -> int:
    """How many columns of a terminal a view takes without wrapping anything, decisions given in full excepted."""
    frame = 3 * len(view.columns) + 1 if view.inline else 2 * len(view.columns)
    widths = [
        max(map(cell_len, (header, *texts))) for (header, _), *texts in zip(view.columns, *view.cells, strict=True)
    ]
    if view.inline:
        widths[-1] = min(widths[-1], ROOM)
    return sum(widths) + frame


def roles_table(report: Report, compact: bool) -> Table:
    """One line per site and role, with everything that a row holds."""
    table = Table(header_style="bold", title_justify="left")
    table.title = Text("\n").join(map(_text, report.summary().split("\n")))
    headers = ["layer", "op", "role", "shape", "formats", "estimator", "provider", SAVED]
    _add_columns(table, [*headers, *(["ranks"] if report.ranks else []), "decision / reason"])
    for row, count in _folded(report.rows) if compact else [(row, 1) for row in report.rows]:
        saved = size_text(row.saved_bytes) if row.saved_bytes else ""
        ranks = [ranks_text(row.ranks, report.ranks)] if report.ranks else []
        verdict = row.decision + (f": {row.reason}" if row.reason else "")
        texts = [counted(row.layer, count), row.op, row.role, row.shape, row.formats, row.estimator, row.provider]
        _add_row(table, [*texts, saved, *ranks, verdict], row.decision)
    return table


def _add_columns(table: Table, headers: Iterable[str]) -> None:
    for header in headers:
        table.add_column(header, overflow="fold", justify="right" if header == SAVED else "left")


def _add_row(table: Table, texts: Iterable[str], decision: str) -> None:
    table.add_row(*map(_text, texts), style="" if decision == QUANTIZED else "yellow")


def _text(text: str) -> Text:
    """What came from the user is no markup."""
    return Text(printable(text))


def _folded(rows: Iterable[Row]) -> list[tuple[Row, int]]:
    counts: dict[Row, int] = {}
    for row in rows:
        folded = replace(row, layer=folded_name(row.layer))
        counts[folded] = counts.get(folded, 0) + 1
    return list(counts.items())
