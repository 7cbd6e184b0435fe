"""The report as one line per site, with what lines have in common said once: the table, page and Markdown print this.

A value that every quantized site shares (estimators, kernels, dY) is hoisted out of the lines, and a remark that comes
with several is written once and referred to by number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from .rows import NOT_COMPUTED, QUANTIZED, Row
from .text import folded_name, ranks_text, size_text

__all__ = ["DECISION", "SAVED", "Line", "Listing", "View", "counted", "folded"]

#: Fields of a line that are hoisted where all quantized sites agree, and what they are called.
FIELDS = {"formats": "formats", "estimator": "estimator", "gradient": "dY", "kernels": "kernels"}
#: Headers that a table treats apart.
SAVED, DECISION = "saved", "decision"


@dataclass(frozen=True)
class Line:
    """One site.

    Attributes:
        layer, op, shape, formats, estimator, saved_bytes, decision, ranks: as of its forward product's row.
        gradient: what dY is read as. kernels: the forward's, and what else the backward takes.
        notes: remarks on a quantized site, the role first where it is not the forward. reason: why any other is not.
        rows: the rows of the site. count: how many layers the line stands for.
    """

    layer: str
    op: str
    shape: str
    decision: str
    formats: str
    estimator: str
    gradient: str
    kernels: str
    saved_bytes: int
    notes: tuple[str, ...]
    reason: str
    rows: tuple[Row, ...]
    ranks: tuple[int, ...]
    count: int = 1

    @staticmethod
    def of(site: tuple[Row, ...]) -> Line:
        first, *backward = site
        quantized = first.decision == QUANTIZED
        backward = [row for row in backward if row.decision != NOT_COMPUTED]
        return Line(
            first.layer,
            first.op,
            first.shape,
            first.decision,
            first.formats,
            first.estimator,
            _gradient(backward),
            _joined([first.provider, *(row.provider for row in backward if row.provider not in first.provider)]),
            first.saved_bytes,
            _notes(first, backward) if quantized else (),
            "" if quantized else first.reason,
            site,
            first.ranks,
        )


#: A header, and the text below it.
Column = tuple[str, Callable[[Line], str]]


@dataclass(frozen=True)
class Listing:
    """Lines of a report of ``ranks``. ``shared``: fields that all quantized lines agree in; ``notes``: their remarks,
    once each.
    """

    lines: tuple[Line, ...]
    shared: dict[str, str]
    notes: tuple[str, ...]
    ranks: tuple[int, ...]

    @staticmethod
    def of(sites: Iterable[tuple[Row, ...]], ranks: tuple[int, ...] = (), compact: bool = False) -> Listing:
        lines = [Line.of(site) for site in sites]
        lines = folded(lines) if compact else lines
        quantized = [line for line in lines if line.decision == QUANTIZED]
        shared = {}
        for field in FIELDS:
            values = {getattr(line, field) for line in quantized}
            if len(values) == 1 and (value := values.pop()):
                shared[field] = value
        notes = dict.fromkeys(note for line in quantized for note in line.notes)
        return Listing(tuple(lines), shared, tuple(notes), ranks)

    @property
    def varied(self) -> list[str]:
        """Fields that quantized lines differ in."""
        return [f for f in FIELDS if f not in self.shared and any(getattr(line, f) for line in self.lines)]

    def on_all(self, note: str) -> bool:
        return all(note in line.notes for line in self.lines if line.decision == QUANTIZED)


@dataclass(frozen=True)
class View:
    """A listing in columns. ``inline``: a decision is given in full, else by the number of its remark.

    ``columns_for_fields``: fields in which quantized lines differ have columns, else they are remarks. ``saved``: there
    is a column for bytes.
    """

    listing: Listing
    inline: bool = True
    columns_for_fields: bool = True
    saved: bool = True

    @cached_property
    def columns(self) -> list[Column]:
        columns: list[Column] = [
            ("layer", lambda line: counted(line.layer, line.count)),
            ("product", lambda line: f"{line.op} {line.shape}".rstrip()),
        ]
        if self.columns_for_fields:
            columns += [(FIELDS[field], partial(_field, field)) for field in self.listing.varied if field != "formats"]
        if self.saved:
            columns.append((SAVED, lambda line: size_text(line.saved_bytes) if line.saved_bytes else ""))
        ranks = self.listing.ranks
        if any(line.ranks != ranks for line in self.listing.lines):
            columns.append(("ranks", lambda line: ranks_text(line.ranks, ranks)))
        return [*columns, (DECISION, self._verdict)]

    @cached_property
    def cells(self) -> list[list[str]]:
        """The texts of each line, in the order of the columns."""
        return [[text(line) for _, text in self.columns] for line in self.listing.lines]

    @cached_property
    def remarks(self) -> list[str]:
        """What is said once, as all quantized lines share it."""
        listing, without = self.listing, ("formats",) if self.inline else ()
        shared = [f"{FIELDS[f]} {value}" for f, value in listing.shared.items() if f not in without]
        shared += [note for note in listing.notes if listing.on_all(note)]
        return [f"all quantized: {'; '.join(shared)}"] if shared else []

    @cached_property
    def legend(self) -> list[str]:
        """What lines refer to by number."""
        return [f"[{number}] {detail}" for number, detail in enumerate(self._numbered, 1)]

    @cached_property
    def _numbered(self) -> list[str]:
        return list(dict.fromkeys(filter(None, map(self._detail, self.listing.lines))))

    def _detail(self, line: Line) -> str:
        """What is said of a line by number."""
        if line.decision != QUANTIZED:
            return "" if self.inline else line.reason
        parts = [line.formats] if "formats" in self.listing.varied and not self.inline else []
        if not self.columns_for_fields:
            fields = [field for field in self.listing.varied if field != "formats" and _field(field, line)]
            parts += [f"{FIELDS[field]} {_field(field, line)}" for field in fields]
        return "; ".join([*parts, *(note for note in line.notes if not self.listing.on_all(note))])

    def _verdict(self, line: Line) -> str:
        """``"quantized: e2m1 row × e2m1 row [1]"``, ``"skipped: skip='lm_head'"``, ``"skipped [2]"``"""
        detail = line.formats if line.decision == QUANTIZED else line.reason
        text = f"{line.decision}: {detail}" if self.inline and detail else line.decision
        numbered = self._detail(line)
        return f"{text} [{self._numbered.index(numbered) + 1}]" if numbered else text


def counted(layer: str, count: int) -> str:
    return f"{layer} ×{count}" if count > 1 else layer


def folded(lines: Iterable[Line]) -> list[Line]:
    """Lines that differ only in numbers in the layer name (``layers.*``) as one, which counts them."""
    counts: dict[Line, int] = {}
    rows: dict[Line, tuple[Row, ...]] = {}
    for line in lines:
        key = replace(line, layer=folded_name(line.layer), rows=())
        rows.setdefault(key, line.rows)
        counts[key] = counts.get(key, 0) + line.count
    return [replace(key, count=count, rows=rows[key]) for key, count in counts.items()]


def _notes(first: Row, backward: Sequence[Row]) -> tuple[str, ...]:
    """Remarks of the forward, then those of gradients that say something else."""
    notes = first.reason.split("; ") if first.reason else []
    of_roles: dict[str, list[str]] = {}
    for row in backward:
        for note in row.reason.split("; ") if row.reason else []:
            if note not in notes:
                of_roles.setdefault(note, []).append(row.role)
    return (*notes, *(f"{', '.join(roles)}: {note}" for note, roles in of_roles.items()))


def _field(field: str, line: Line) -> str:
    return str(getattr(line, field))


def _gradient(backward: Sequence[Row]) -> str:
    """What dY is read as; by role where that differs."""
    read_as = {row.role: row.formats.split(" × ")[0] for row in backward}
    if len(set(read_as.values())) > 1:
        return ", ".join(f"{role} {text}" for role, text in read_as.items())
    return _joined(read_as.values())


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, texts)))
