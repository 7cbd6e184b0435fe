"""What was quantized, how, by which kernel, and why the rest was not.

``print(qcompile.explain(model, *args))`` compiles the model's graphs through every pass without generating code
(seconds), runs its forward once, and prints one row a GEMM and role. Parameters, buffers, gradients and random state
are left as they were. Under ``torch.distributed`` every rank has a report of its own; :meth:`Report.gather` merges
them and says where ranks disagree.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from qcompile.ir.recipe import Operand
from qcompile.kernels.matmul.reference import LEVELS
from qcompile.kernels.register import provider_of
from qcompile.passes.account import remark
from qcompile.passes.lower import DECODED
from qcompile.passes.pass_base import Observations
from qcompile.passes.plan import KIND_KEY, SITE_KEY, Decision, transform_at

from . import compat
from .backends import compile_with, split_options
from .recipes import RECIPES
from .session import Session, UnmatchedRuleError, unmatched_message

__all__ = ["Report", "Row", "SavedBytes", "explain", "saved_bytes"]

ROLES = ("fprop", "dgrad", "wgrad")
#: How many disagreements between ranks, or modules in no graph, the summary spells out.
SHOWN = 8


@dataclass(frozen=True)
class Row:
    """One GEMM in one role (or one site that was left alone).

    Attributes:
        layer: dotted module name. op: how the model spells the product. role: fprop, dgrad, wgrad, or "-" if left
        alone. shape: operand shapes, e.g. ``"8×64×256 · 1024×256"``.
        formats: what each operand is read as, e.g. ``"e2m1 row + residual × e2m1 row"``.
        estimator: backward estimators of the two operands, after their transforms (fprop rows).
        provider: the kernels that run it. saved_bytes: bytes of codes this site keeps for the backward (fprop rows).
        decision: "quantized", "skipped" or, of a gradient that nobody needs, "not computed". reason: why, or a remark
            about granularity.
        ranks: the ranks that the row holds on, in a report merged over ranks; empty in the report of one process.
    """

    layer: str
    op: str
    role: str
    shape: str
    formats: str
    estimator: str
    provider: str
    saved_bytes: int
    decision: str
    reason: str
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))  # JSON has lists alone


@dataclass
class Report:
    """The plan of a whole model, with what the later passes made of it.

    Attributes:
        backend: recipe name. rows: see :class:`Row`. programs: program text after each pass, keyed by graph, stage and
        pass. saved: every tensor kept for the backward: node, shape, dtype, bytes, whether it is codes.
        graphs: number of sub-graphs Dynamo handed over (1 if it found no graph break).
        ranks: the ranks whose reports are merged in this one (:meth:`merged`); empty for the report of one process.
        remarks: lines about what no graph has: modules whose parameters Dynamo handed over in none, and what keeps
        them in Python.
    """

    backend: str
    rows: list[Row]
    programs: dict[str, str] = field(default_factory=dict)
    saved: list[dict[str, Any]] = field(default_factory=list)
    graphs: int = 0
    ranks: tuple[int, ...] = ()
    remarks: list[str] = field(default_factory=list)

    @staticmethod
    def merged(reports: Sequence[Report], ranks: Sequence[int] | None = None) -> Report:
        """One report of several processes' reports, ``reports[i]`` being that of rank ``ranks[i]`` (default: i).

        A site whose rows are equal on several ranks is listed once, with these ranks; one that differs in anything
        (decision, shape, bytes) is listed once a variant, each with its ranks. Stages of a pipeline thus stay apart.
        Bytes of a row are those of each of its ranks; :attr:`saved_bytes` and :attr:`code_bytes` are sums over ranks,
        and every entry of :attr:`saved` has its ``"rank"``. ``graphs`` is the largest of any rank. Programs are left
        out. See :attr:`disagreements`.

        Raises ``ValueError`` without reports, for reports that are merged already, and unless there is one rank a
        report.
        """
        ranks = tuple(range(len(reports)) if ranks is None else ranks)
        if not reports or len(ranks) != len(reports) or any(report.ranks for report in reports):
            msg = f"merging takes one report of one process a rank, got {len(reports)} for ranks {list(ranks)}"
            raise ValueError(msg)
        variants: dict[tuple[Any, ...], dict[tuple[Row, ...], list[int]]] = {}  # sites in order, and what each became
        for rank, report in zip(ranks, reports, strict=True):
            count: Counter[Any] = Counter()
            for site in report._by_site():
                name = site[0].layer, site[0].op
                variants.setdefault((*name, count[name]), {}).setdefault(site, []).append(rank)
                count[name] += 1
        return Report(
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
        for site in self._by_site():
            first = site[0]
            text = "; ".join(f"{row.role} {row.decision} {row.formats} {row.estimator}".rstrip() for row in site)
            text = f"skipped ({first.reason})" if first.role == "-" else text
            for rank in first.ranks:
                name = first.layer, first.op, rank
                treatments.setdefault((first.layer, first.op, count[name]), {}).setdefault(text, []).append(rank)
                count[name] += 1
        return [
            f"{layer} ({op}): " + " | ".join(f"{_ranks(ranks)}: {text}" for text, ranks in texts.items())
            for (layer, op, _), texts in treatments.items()
            if len(texts) > 1
        ]

    def _by_site(self) -> list[tuple[Row, ...]]:
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
        if self.saved:
            over = " over all ranks" if self.ranks else ""
            text += f"; {_size(self.saved_bytes)} kept for the backward{over}, {_size(self.code_bytes)} of it as codes"
        if self.ranks:
            text = f"{_ranks(self.ranks, self.ranks)}: {text}"
        text = "\n".join([text, *self.remarks])
        if different := self.disagreements:
            text += f"\nRANKS DISAGREE about {len(different)} site(s):\n" + "\n".join(different[:SHOWN])
            text += f"\n… and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        return text

    def to_json(self) -> str:
        """Rows, saved tensors, totals and disagreements as JSON; programs are left out (see :attr:`programs`)."""
        totals = {
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
        return json.dumps({**totals, "rows": [asdict(row) for row in self.rows], "saved": self.saved}, indent=1)

    def to_html(self) -> str:
        """A stand-alone HTML page with the table."""
        console = Console(record=True, width=220, file=io.StringIO())
        console.print(self)
        return console.export_html()

    def table(self, compact: bool = False) -> Table:
        """A rich table. ``compact`` folds rows that differ only in numbers in the layer name (``layers.*``) into
        one.
        """
        table = Table(title=self.summary(), title_justify="left", header_style="bold")
        table.add_column("layer", no_wrap=True)
        for column in ("op", "role", "shape", "formats", "estimator", "provider"):
            table.add_column(column, overflow="fold")
        table.add_column("saved", justify="right")
        if self.ranks:
            table.add_column("ranks", no_wrap=True)
        table.add_column("decision / reason", overflow="fold")
        for row, count in _folded(self.rows) if compact else [(row, 1) for row in self.rows]:
            layer = f"{row.layer} [dim]×{count}[/dim]" if count > 1 else row.layer
            style = "" if row.decision == "quantized" else "yellow"
            verdict = row.decision + (f": {row.reason}" if row.reason else "")
            saved = _size(row.saved_bytes) if row.saved_bytes else ""
            ranks = [_ranks(row.ranks, self.ranks)] if self.ranks else []
            cells = [layer, row.op, row.role, row.shape, row.formats, row.estimator, row.provider, saved, *ranks]
            table.add_row(*cells, verdict, style=style)
        return table

    def __rich__(self) -> Table:
        return self.table(compact=len(self.rows) > 60)

    def __str__(self) -> str:
        console = Console(width=200, file=io.StringIO())
        console.print(self)
        return console.file.getvalue()  # type: ignore[attr-defined]


def explain(
    model: Callable[..., Any],
    *args: Any,
    backend: str = "qcompile_fp4",
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Report what ``torch.compile(model, backend=backend, options=options)(*args, **kwargs)`` would do.

    Args:
        model: module or function, compiled or not. Its forward runs once, on the device and in the mode it is in.
        args, kwargs: inputs of the forward.
        backend: name of a recipe. options: as for ``torch.compile``.

    Raises ``ValueError`` for an unknown backend or option, :class:`UnmatchedRuleError` (a ``ValueError``) for a rule of
    the user's that matches no GEMM of the model.
    """
    if backend not in RECIPES:
        msg = f"unknown backend {backend!r}; known: {', '.join(RECIPES)}"
        raise ValueError(msg)
    model = getattr(model, "_orig_mod", model)
    options = dict(options or {})
    graphs: list[Observations] = []
    captured: set[str] = set()

    def observing(gm: Any, example_inputs: Any, **_: Any) -> Any:
        observed = Observations()
        compiled = compile_with(
            RECIPES[backend],
            gm,
            example_inputs,
            options=options,
            observe=observed,
            inner_compile=compat.eager_inner_compile,
        )
        graphs.append(observed)  # a graph that torch cannot trace comes back in pieces; only what compiled counts

        def run(*inputs: Any) -> Any:
            captured.update(_owners(model, inputs))
            return compiled(*inputs)

        return run

    with _unchanged(model, args, kwargs), compat.unlimited_recompiles():
        _run(torch.compile(_with_own_code(model), backend=observing), args, kwargs)
    report = _make_report(backend, graphs)
    report.remarks = list(filter(None, [*_not_captured(model, captured), remark(graphs)]))
    ours, _ = split_options(None, options)
    session = Session(RECIPES[backend].override(ours))
    for graph in graphs:
        if graph.plan is not None:
            session.add(graph.plan)
    if unmatched := session.unmatched():
        raise UnmatchedRuleError(unmatched_message(unmatched, session.layers))
    return report


def _owners(model: Any, inputs: Sequence[Any]) -> list[str]:
    """Names of the modules that own one of a graph's inputs. Asked while the graph runs: equal layers share a graph,
    and FSDP gathers a parameter for as long as its module runs.
    """
    given = {id(value) for value in inputs}
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return [name for name, module in modules if any(id(p) in given for p in module._parameters.values())]


def _not_captured(model: Any, captured: set[str]) -> list[str]:
    """What to say of the modules with parameters that are in no graph."""
    if not isinstance(model, nn.Module):
        return []
    missing = {
        name: m
        for name, m in model.named_modules()
        if name not in captured and any(p is not None for p in m._parameters.values())
    }
    recurrent = [name for name, m in missing.items() if isinstance(m, (nn.RNN, nn.LSTM, nn.GRU))]
    remarks = []
    if missing:
        names = [name or type(m).__name__ for name, m in missing.items()]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        remarks.append(f"not captured: {', '.join(names[:SHOWN])}{more} (in no graph of Dynamo's, so left in Python)")
    if recurrent and not compat.captures_recurrent_layers():
        remarks.append(
            f"Dynamo leaves what calls nn.RNN, nn.LSTM or nn.GRU ({', '.join(recurrent[:SHOWN])}) in Python unless "
            "torch._dynamo.config.allow_rnn = True is set before compiling"
        )
    return remarks


def _with_own_code(model: Callable[..., Any]) -> Callable[..., Any]:
    """Something to call like ``model`` whose outermost code object is nobody else's.

    Dynamo keeps what it compiled on the code object of the outermost frame, and gives up on one that has too many
    entries. Were that the model's ``forward``, a few calls of `explain` would keep the model from being compiled later.
    """

    def call(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    if isinstance(model, nn.Module):
        return MethodType(FunctionType(call.__code__.replace(), globals()), model)
    if isinstance(model, FunctionType) and not hasattr(model, "_torchdynamo_orig_callable"):
        own = FunctionType(
            model.__code__.replace(), model.__globals__, model.__name__, model.__defaults__, model.__closure__
        )
        own.__kwdefaults__ = model.__kwdefaults__
        return own
    return model


def _run(compiled: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """Run the forward, and the backward where there is one (it compiles lazily); surface our errors without Dynamo's
    wrapping.
    """
    try:
        results = torch.utils._pytree.tree_leaves(compiled(*args, **kwargs))
        outputs = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if leaves := _leaves_below(outputs):
            ones = [torch.ones_like(output) for output in outputs]
            torch.autograd.grad(outputs, leaves, ones, allow_unused=True)  # leaves .grad alone
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            inner = getattr(cause, "inner_exception", None) or cause.__cause__
            if isinstance(inner, ValueError):
                raise inner from None
            cause = inner
        raise


def _leaves_below(outputs: list[Tensor]) -> list[Tensor]:
    """The leaf tensors that gradients of ``outputs`` reach: parameters, wherever they are kept, and inputs."""
    leaves: dict[int, Tensor] = {}
    pending = [output.grad_fn for output in outputs]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves[id(leaf)] = leaf
        pending += [parent for parent, _ in node.next_functions]  # type: ignore[union-attr]
    return list(leaves.values())


@contextmanager
def _unchanged(model: Any, args: Any, kwargs: Any) -> Iterator[None]:
    """Buffers and random state are put back; a model compiled in place runs uncompiled meanwhile."""
    is_module = isinstance(model, nn.Module)
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if is_module else []
    in_place = getattr(model, "_compiled_call_impl", None)
    tensors = [*model.parameters(), *model.buffers()] if is_module else []
    tensors += [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = sorted({t.device.index or 0 for t in tensors if t.is_cuda})
    with torch.random.fork_rng(devices=devices):
        try:
            if in_place is not None:
                model._compiled_call_impl = None
            yield
        finally:
            if in_place is not None:
                model._compiled_call_impl = in_place
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


# --- rows -----------------------------------------------------------------------------------------------------------


def _make_report(backend: str, graphs: list[Observations]) -> Report:
    report = Report(backend, [], graphs=len(graphs))
    for number, observed in enumerate(graphs):
        prefix = f"graph{number}_" if len(graphs) > 1 else ""
        report.programs.update({prefix + name: text for name, text in observed.programs.items()})
        report.saved += observed.saved
        for decision in observed.plan.decisions if observed.plan else []:
            report.rows += _rows_of(decision, observed)
    return report


def _rows_of(decision: Decision, observed: Observations) -> list[Row]:
    site = decision.site
    shape = " · ".join("×".join(str(n) for n in operand) for operand in site.shape)
    base = {"layer": site.name, "op": site.op, "shape": shape}
    if not decision.quantized:
        return [_bare_row(base, "-", "skipped", decision.reason)]
    saved = sum(t["bytes"] for t in observed.saved if t["codes"] and t["custom"].get(SITE_KEY) == site.index)
    products = {g["role"]: g for g in observed.gemms if g["site"] == site.index}
    rows = []
    for role in ROLES:
        product = products.get(role)
        if product is None and role != "fprop":
            if not site.training:
                continue
            if not _needs_gradient(decision, role):
                rows.append(_bare_row(base, role, "not computed", "nothing upstream needs this gradient"))
                continue
            product = products.get("dgrad+wgrad") or products.get("backward")
            if product is None and "weight" not in [slot.kind for slot in site.slots]:
                product = products.get("wgrad")  # both gradients of a product of activations go by that name
        reason = decision.reason if role == "fprop" else ""
        if product is None:
            product = _implied(decision, role)
            reason = "not a matrix product in the joint graph; it reads the decoded operands"
        elif site.op.startswith("conv"):
            product = _implied(decision, role)
        texts = product["operands"]
        dense = all(text == "dense" for text in texts)
        rows.append(
            Row(
                **base,
                role=role,
                formats=" × ".join(_format(text, product["dtype"]) for text in texts),
                estimator=_estimators(decision) if role == "fprop" else "",
                provider="" if dense else _provider(decision, product, role),
                saved_bytes=saved if role == "fprop" else 0,
                decision="skipped" if dense else "quantized",
                reason="both operands are kept in high precision"
                if dense
                else "; ".join(filter(None, (reason, product["reason"]))),
            )
        )
    return rows


def _estimators(decision: Decision) -> str:
    """``"trust of hadamard(64) × trust of hadamard(64)"``: estimators, and the transforms as the operands have them."""
    texts = []
    for slot, operand in zip(decision.site.slots, decision.operands, strict=True):
        if operand is None:
            texts.append("-")
            continue
        transform = transform_at(slot, operand, decision.site.node)
        texts.append(f"{operand.estimator} of {transform}" if transform else str(operand.estimator))
    return " × ".join(texts)


def _bare_row(base: dict[str, Any], role: str, decision: str, reason: str) -> Row:
    """A row of which there is nothing to say but why."""
    empty: dict[str, Any] = {"formats": "", "estimator": "", "provider": "", "saved_bytes": 0}
    return Row(**base, **empty, role=role, decision=decision, reason=reason)


def _weight_position(decision: Decision) -> int:
    """Which operand is the weight; the right one of a product without."""
    kinds = [slot.kind for slot in decision.site.slots]
    return kinds.index("weight") if "weight" in kinds else 1


def _needs_gradient(decision: Decision, role: str) -> bool:
    """Whether autograd asks for dX (dgrad) or dW (wgrad): by the operand as the model has it, before what `insert` put
    on it.
    """
    weight = _weight_position(decision)
    node = decision.site.slots[weight if role == "wgrad" else 1 - weight].of(decision.site.node)
    while KIND_KEY in (node.meta.get("custom") or {}):
        node = node.args[0]
    return bool(node.meta["example_value"].requires_grad)


def _implied(decision: Decision, role: str) -> dict[str, Any]:
    """What a product reads where the joint graph does not tell: autograd is given the decoded operands.

    Products over one element become multiplications, equal products are merged, some ops have a backward of their own,
    and a convolution reads windows that were put together again.
    """
    texts = [str(operand) if operand else "dense" for operand in decision.operands]
    if role != "fprop":
        weight = _weight_position(decision)
        texts = ["dense", texts[weight if role == "dgrad" else 1 - weight]]
    dtype = str(decision.site.node.meta["example_value"].dtype).removeprefix("torch.")
    return {"operands": texts, "fused": False, "dtype": dtype, "provider": "", "reason": ""}


def _format(text: str, dense: str) -> str:
    if text == "dense":
        return dense or "high precision"
    if text.startswith(LEVELS):
        return text.removeprefix(LEVELS)  # its scales are in the gradient
    operand = Operand.parse(text)
    quantizer = f"{operand.quantizer.format.name} {operand.quantizer.granularity}"
    if not (operand.outliers and operand.outliers.compensate):
        return quantizer
    return quantizer + (" + residual" if operand.outliers.residual == "exact" else " + e4m3 outliers")


def _provider(decision: Decision, product: dict[str, Any], role: str) -> str:
    product_by = product["provider"] if product["fused"] else f"{DECODED} {decision.site.op}"
    if role != "fprop":
        return product_by
    value = decision.site.node.meta["example_value"]
    quantizers = [
        provider_of(
            _quantize_op(operand), value.device.type, str(operand.stored), value.dtype, transform=str(operand.transform)
        )
        for operand in decision.operands
        if operand
    ]
    names = dict.fromkeys(name if not why else f"{name} ({why})" for name, why in quantizers)
    return f"{', '.join(names)} quantize; {product_by}"


def _quantize_op(operand: Operand) -> str:
    in_codes = operand.outliers is not None and operand.outliers.residual == "e4m3"
    return "quantize_compensated" if in_codes else "quantize"


def _folded(rows: list[Row]) -> list[tuple[Row, int]]:
    counts: dict[Row, int] = {}
    for row in rows:
        folded = replace(row, layer=re.sub(r"\b\d+\b", "*", row.layer))
        counts[folded] = counts.get(folded, 0) + 1
    return list(counts.items())


def _ranks(ranks: Sequence[int], everyone: Sequence[int] = ()) -> str:
    """``"2 ranks"`` for everyone, else which: ``"rank 3"``, ``"ranks 0–3, 6"``."""
    if len(ranks) > 1 and tuple(ranks) == tuple(everyone):
        return f"{len(ranks)} ranks"
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


# --- measured bytes -------------------------------------------------------------------------------------------------


class SavedBytes:
    """Filled by :func:`saved_bytes`: ``total`` bytes, and one ``(shape, dtype, bytes)`` a distinct tensor storage."""

    def __init__(self) -> None:
        self.tensors: list[tuple[tuple[int, ...], torch.dtype, int]] = []

    @property
    def total(self) -> int:
        return sum(size for _, _, size in self.tensors)


@contextmanager
def saved_bytes(model: nn.Module | None = None, *inputs: Any) -> Iterator[SavedBytes]:
    """Measure what autograd saves for the backward inside the ``with`` block, compiled or eager.

    Parameters and buffers of ``model`` and the given inputs are not counted: they live whether or not they are saved.
    What counts is storage: once if several saved tensors share it, and all of it if a saved tensor is a part of it.
    """
    owners = [*model.parameters(), *model.buffers()] if model is not None else []
    owners += [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    seen = {tensor.untyped_storage().data_ptr() for tensor in owners}
    saved = SavedBytes()
    keep: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            keep.append(tensor.detach())  # alive until the end, so that no address is used twice
            saved.tensors.append((tuple(tensor.shape), tensor.dtype, storage.nbytes()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
