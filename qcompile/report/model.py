"""The report of a whole model: its rows, totals over them, and reports of several ranks as one."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from .page import fragment, markdown, page
from .rows import NOT_CAPTURED, Row
from .table import ReportTable, roles_table
from .text import SHOWN, ranks_text, size_text

__all__ = ["Report"]

RichRenderable = ReportTable | Table

#: Columns of a text that no terminal shows.
WIDE = 200
#: From how many sites on equal layers are printed as one line.
LONG = 24


@dataclass
class Report:
    """The plan of a whole model, with what the later passes made of it.

    Attributes:
        backend: name of the recipe.
        rows: one per product and role, see :class:`Row`.
        programs: text of the program after each pass, keyed by graph, stage and pass.
        saved: every tensor kept for the backward: node, shape, dtype, bytes, whether it is codes.
        graphs: number of sub-graphs that Dynamo handed over (1 if it found no graph break).
        ranks: the ranks whose reports are merged in this one (:meth:`merged`); empty for the report of one process.
        remarks: lines about the whole model: modules that Dynamo did not capture, and what training would lose at the
            recompile limit.
        weights: what the weight of each layer is quantized to, as an operand's text; empty if it is wide in one of its
            products.
    """

    backend: str
    rows: list[Row]
    programs: dict[str, str] = field(default_factory=dict)
    saved: list[dict[str, Any]] = field(default_factory=list)
    graphs: int = 0
    ranks: tuple[int, ...] = ()
    remarks: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)

    def add_weight(self, layer: str, text: str) -> None:
        """Note one more product of a layer's weight."""
        self.weights[layer] = text if self.weights.get(layer, text) == text else ""

    @staticmethod
    def merged(reports: Sequence[Report], ranks: Sequence[int] | None = None) -> Report:
        """One report of several processes' reports, ``reports[i]`` being that of rank ``ranks[i]`` (default: i).

        A site whose rows are equal on several ranks is listed once, with these ranks; one that differs in anything
        (decision, shape, bytes) is listed once for each variant, with its ranks. Stages of a pipeline thus stay apart.
        Bytes of a row are those of each of its ranks; :attr:`saved_bytes` and :attr:`code_bytes` are sums over ranks,
        and every entry of :attr:`saved` has its ``"rank"``. ``graphs`` is the largest of any rank. Programs are left
        out. See :attr:`disagreements`.

        Raises ``ValueError`` without reports, for reports that are merged already, and unless there is one rank for
        each report.
        """
        ranks = tuple(range(len(reports)) if ranks is None else ranks)
        if not reports or len(ranks) != len(reports) or any(report.ranks for report in reports):
            msg = f"merging takes one report of one process per rank, got {len(reports)} for ranks {list(ranks)}"
            raise ValueError(msg)
        variants: dict[tuple[Any, ...], dict[tuple[Row, ...], list[int]]] = {}  # sites in order, and what each became
        for rank, report in zip(ranks, reports, strict=True):
            count: Counter[Any] = Counter()
            for site in report.by_site():
                name = site[0].layer, site[0].op
                variants.setdefault((*name, count[name]), {}).setdefault(site, []).append(rank)
                count[name] += 1
        merged = Report(
            " / ".join(dict.fromkeys(report.backend for report in reports)),
            [
                replace(row, ranks=tuple(on))
                for sites in variants.values()
                for site, on in sites.items()
                for row in site
            ],
            saved=[{**entry, "rank": r} for r, report in zip(ranks, reports, strict=True) for entry in report.saved],
            graphs=max(report.graphs for report in reports),
            ranks=ranks,
            remarks=list(dict.fromkeys(remark for report in reports for remark in report.remarks)),
        )
        for report in reports:
            for layer, text in report.weights.items():
                merged.add_weight(layer, text)
        return merged

    def gather(self, group: Any = None) -> Report:
        """The reports of all ranks of a process group (default: all there are), merged, on each of them.

        A collective: every rank of ``group`` calls it with its own report. Rows, saved tensors and totals are merged as
        :meth:`merged` describes, ranks being those of the default group; programs stay this rank's own.

        Raises ``RuntimeError`` where ``torch.distributed`` is not initialized, ``ValueError`` on a rank outside of
        ``group``.
        """
        if not (dist.is_available() and dist.is_initialized()):
            msg = "Report.gather needs a process group: call torch.distributed.init_process_group() first"
            raise RuntimeError(msg)
        if dist.get_rank(group) < 0:
            msg = f"Report.gather: rank {dist.get_rank()} is not in the group whose reports it is to merge"
            raise ValueError(msg)
        reports: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, replace(self, programs={}), group=group)
        merged = Report.merged(reports, dist.get_process_group_ranks(group or dist.group.WORLD))
        return replace(merged, programs=self.programs)

    @property
    def disagreements(self) -> list[str]:
        """One line for every site of a merged report that ranks treat differently: a bug or a misconfiguration.

        Sites are told apart by layer and op, and by their order where these are equal. Decisions, formats and
        estimators of all roles count, and why a site was left alone. Shapes, bytes and kernels may differ between ranks
        (an uneven batch), and so may the sites that a rank has (the stages of a pipeline).
        """
        treatments: dict[tuple[Any, ...], dict[str, list[int]]] = {}
        count: Counter[Any] = Counter()
        for site in self.by_site():
            first = site[0]
            text = "; ".join(f"{row.role} {row.decision} {row.formats} {row.estimator}".rstrip() for row in site)
            text = f"skipped ({first.reason})" if first.role == "-" else text
            for rank in first.ranks:
                name = first.layer, first.op, rank
                treatments.setdefault((first.layer, first.op, count[name]), {}).setdefault(text, []).append(rank)
                count[name] += 1
        return [
            f"{layer} ({op}): " + " | ".join(f"{ranks_text(ranks)}: {text}" for text, ranks in texts.items())
            for (layer, op, _), texts in treatments.items()
            if len(texts) > 1
        ]

    def by_site(self) -> list[tuple[Row, ...]]:
        """Rows of one site together: one that is left alone, or a forward product and its gradients."""
        sites: list[list[Row]] = []
        for row in self.rows:
            if row.role in ("fprop", "-"):
                sites.append([])
            sites[-1].append(row)
        return [tuple(site) for site in sites]

    @property
    def sites(self) -> int:
        return sum(row.role in ("fprop", "-") for row in self.rows)

    @property
    def quantized_sites(self) -> int:
        return sum(row.role == "fprop" for row in self.rows)

    @property
    def saved_bytes(self) -> int:
        """Bytes kept for the backward, parameters and inputs excluded; in a merged report, of all ranks together."""
        return sum(tensor["bytes"] for tensor in self.saved)

    @property
    def code_bytes(self) -> int:
        """The part of :attr:`saved_bytes` that is codes, scales, residuals and masks."""
        return sum(tensor["bytes"] for tensor in self.saved if tensor["codes"])

    def summary(self) -> str:
        text = f"{self.backend}: {self.quantized_sites} of {self.sites} GEMM sites quantized in {self.graphs} graph(s)"
        if outside := sum(row.decision == NOT_CAPTURED for row in self.rows):
            text += f", {outside} not captured"
        if self.saved:
            over = " over all ranks" if self.ranks else ""
            kept, codes = size_text(self.saved_bytes), size_text(self.code_bytes)
            text += f"; {kept} kept for the backward{over}, {codes} of it as codes"
        if self.ranks:
            text = f"{ranks_text(self.ranks, self.ranks)}: {text}"
        text = "\n".join([text, *self.remarks])
        if different := self.disagreements:
            text += f"\nRANKS DISAGREE about {len(different)} site(s):\n" + "\n".join(different[:SHOWN])
            text += f"\n… and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        return text

    def totals(self) -> dict[str, Any]:
        """Everything that is said of the model as a whole."""
        return {
            "backend": self.backend,
            "graphs": self.graphs,
            "sites": self.sites,
            "quantized_sites": self.quantized_sites,
            "saved_bytes": self.saved_bytes,
            "code_bytes": self.code_bytes,
            "ranks": self.ranks,
            "disagreements": self.disagreements,
            "remarks": self.remarks,
        }

    def to_json(self) -> str:
        """Rows, saved tensors, totals and disagreements as JSON; programs are left out (see :attr:`programs`)."""
        return json.dumps({**self.totals(), "rows": [asdict(row) for row in self.rows], "saved": self.saved}, indent=1)

    def to_records(self) -> list[dict[str, Any]]:
        """A dictionary for each row, as ``pandas.DataFrame`` takes them; ``ranks`` as text, as in the table."""
        return [{**asdict(row), "ranks": ranks_text(row.ranks) if row.ranks else ""} for row in self.rows]

    def to_markdown(self, roles: bool = False) -> str:
        """Summary and a table in GitHub's Markdown, one line per site or, with ``roles``, per row."""
        return markdown(self, roles)

    def to_html(self) -> str:
        """A stand-alone web page: the table with a filter, roles on request, totals."""
        return page(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return fragment(self, compact=self.sites > LONG)

    def table(self, compact: bool = False, roles: bool = False) -> RichRenderable:
        """Something that rich prints: one line per site, fitted to the console's width.

        ``roles`` prints every row instead, the product and its gradients, with all that is known of each. ``compact``
        folds lines that differ only in numbers in the layer name (``layers.*``) into one.
        """
        return roles_table(self, compact) if roles else ReportTable(self, compact)

    def __rich__(self) -> RichRenderable:
        return self.table(compact=self.sites > LONG)

    def __str__(self) -> str:
        """The table as text: as wide as the terminal (or ``COLUMNS``), 200 columns where there is none."""
        console = Console(width=shutil.get_terminal_size((WIDE, 0)).columns, file=io.StringIO())
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]
