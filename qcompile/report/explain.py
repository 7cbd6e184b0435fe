"""Run a model once, through every pass but without generating code, and report what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import repeat
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import compat
from qcompile.backends import compile_with, plain_model, recipe_of, with_options
from qcompile.ir.recipe import Recipe
from qcompile.passes.account import remark as unaccounted
from qcompile.passes.causal_masks import remark as masks
from qcompile.passes.pass_base import Observations
from qcompile.regional import remarks as regional
from qcompile.session import Session, UnmatchedRuleError, unmatched_message

from .model import Report
from .outside import OutsideGraphs
from .rows import Row, rows_of
from .saved import newly_saved, storage_of, storages_of
from .text import SHOWN, folded_name, some

__all__ = ["explain", "own_errors", "unchanged", "with_own_code"]


def explain(
    model: Callable[..., Any],
    *args: Any,
    backend: str | Recipe = "qcompile_fp4",
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Report:
    """Report what ``torch.compile(model, backend=backend, options=options)(*args, **kwargs)`` would do.

    Args:
        model: module or function, compiled or not. Its forward runs once, on the device and in the mode it is in.
        *args: positional inputs of the forward.
        backend: a recipe or its name.
        options: as for ``torch.compile``.
        **kwargs: keyword inputs of the forward.

    Raises ``ValueError`` for an unknown backend or option and for a class in place of a model,
    :class:`UnmatchedRuleError` (a ``ValueError``) for a rule of the user's that matches no GEMM of the model.
    """
    recipe = recipe_of(backend)
    model = plain_model(model, "explain")
    options = dict(options or {})
    graphs: list[Graph] = []
    captured: set[str] = set()
    outside = OutsideGraphs(model)
    earlier = compat.frame_compilations()
    tensors = [*_tensors_of(model), *compat.tree_leaves((args, kwargs))]
    alive = storages_of(value for value in tensors if isinstance(value, Tensor))
    kept: list[Tensor] = []

    def observing(gm: Any, example_inputs: Any, **_: Any) -> Any:
        observed = Observations()
        compiled = compile_with(
            recipe,
            gm,
            example_inputs,
            options=options,
            observe=observed,
            inner_compile=compat.eager_inner_compile,
        )
        # A graph that torch cannot trace comes back in pieces; only what compiled counts.
        frame, number = compat.current_frame()
        graph = Graph(observed, number - earlier.get(frame, 0))
        graphs.append(graph)

        def run(*inputs: Any) -> Any:
            captured.update(_owners(model, inputs))
            graph.runs += outside.watching
            with outside.inside(), newly_saved(alive) as saved:
                results = compiled(*inputs)
            given = {storage_of(value) for value in inputs if isinstance(value, Tensor)}
            graph.inputs += [tensor for tensor in saved if storage_of(tensor) in given]
            kept.extend(saved)
            return results

        return run

    with unchanged(model, args, kwargs), compat.unlimited_recompiles():
        _run(torch.compile(with_own_code(model), backend=observing), args, kwargs, outside)
    report = _make_report(recipe.name, graphs)
    report.rows += outside.rows()
    report.remarks += [
        *_not_captured(model, outside, captured),
        *_dropped(graphs, compat.recompile_limits()),
        *filter(None, [about([graph.observed for graph in graphs]) for about in (unaccounted, masks)]),
    ]
    session = Session(with_options(recipe, options))
    plans = [graph.observed.plan for graph in graphs if graph.observed.plan is not None]
    for plan in plans:
        session.add(plan)
    report.remarks += regional(session.recipe, plans, model)
    if unmatched := session.unmatched():
        raise UnmatchedRuleError(unmatched_message(unmatched, session.layers))
    return report


@dataclass
class Graph:
    """One graph of Dynamo's: what the passes saw of it, how many versions its code object had before, how often
    the forward ran it (equal layers may share one), and which of its inputs it saves that an earlier graph computed.
    """

    observed: Observations
    version: int
    runs: int = 0
    inputs: list[Tensor] = field(default_factory=list)

    @property
    def sites(self) -> list[str]:
        """Layers of its products."""
        return [decision.site.name for decision in self.observed.plan.decisions] if self.observed.plan else []


def _make_report(backend: str, graphs: list[Graph]) -> Report:
    report = Report(backend, [], graphs=len(graphs))
    for number, graph in enumerate(graphs):
        observed = graph.observed
        prefix = f"graph{number}_" if len(graphs) > 1 else ""
        report.programs.update({prefix + name: text for name, text in observed.programs.items()})
        report.saved += observed.saved * graph.runs
        report.saved += [
            {
                "node": "input",
                "shape": list(tensor.shape),
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "bytes": tensor.untyped_storage().nbytes(),
                "codes": False,
                "custom": {},
            }
            for tensor in graph.inputs
        ]
        for decision in observed.plan.decisions if observed.plan else []:
            report.rows += _of_runs(rows_of(decision, observed), graph.runs)
            for slot, operand in zip(decision.site.slots, decision.operands or repeat(None), strict=False):
                if slot.kind == "weight":
                    report.add_weight(decision.site.name, str(operand) if decision.quantized and operand else "")
    return report


def _of_runs(rows: list[Row], runs: int) -> list[Row]:
    """Rows of a site whose graph runs so often: bytes of all runs, and a remark on the first row."""
    if runs < 2:
        return rows
    first, *others = rows
    reason = "; ".join(filter(None, (first.reason, f"its graph runs {runs} times")))
    return [replace(first, saved_bytes=runs * first.saved_bytes, reason=reason), *others]


def _owners(model: Any, inputs: Sequence[Any]) -> list[str]:
    """Names of the modules that own one of a graph's inputs. Asked while the graph runs: equal layers share a graph,
    and FSDP gathers a parameter for as long as its module runs.
    """
    given = {id(value) for value in inputs}
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return [name for name, module in modules if any(id(p) in given for p in module._parameters.values())]


def _not_captured(model: Any, outside: OutsideGraphs, captured: set[str]) -> list[str]:
    """What to say of products that ran in Python, and of modules whose parameters were read there alone."""
    products: dict[str, dict[str, None]] = {}
    for product in outside.products:
        text = f"{product.of}{product.op} {product.shape}"
        products.setdefault(folded_name(product.layer), {})[text] = None
    texts = [f"{layer} ({some(list(shapes), 2)} ran in Python)" for layer, shapes in products.items()]
    missing = outside.readers - captured
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    missed = {name or type(module).__name__: module for name, module in modules if name in missing}
    without_products = dict.fromkeys(map(folded_name, missed))
    texts += [f"{name} (ran in Python)" for name in without_products if name not in products]
    remarks = [f"not captured: {some(texts, SHOWN)}"] if texts else []
    recurrent = [name for name, module in missed.items() if isinstance(module, (nn.RNN, nn.LSTM, nn.GRU))]
    if recurrent and not compat.captures_recurrent_layers():
        remarks.append(
            f"Dynamo leaves what calls nn.RNN, nn.LSTM or nn.GRU ({some(recurrent, SHOWN)}) in Python unless "
            "torch._dynamo.config.allow_rnn = True is set before compiling"
        )
    return remarks


def _dropped(graphs: list[Graph], limits: Mapping[str, int]) -> list[str]:
    """What to say of graphs that `explain` compiles and training does not: their code has too many versions."""
    over = [graph for graph in graphs if graph.version >= min(limits.values())]
    dropped = sum(len(graph.sites) for graph in over)
    if not dropped:
        return []
    needed = 1 + max(graph.version for graph in over)
    low = " and ".join(f"{name} (now {limit})" for name, limit in limits.items() if limit < needed)
    layers = dict.fromkeys(folded_name(name) for graph in over for name in graph.sites)
    return [
        f"over Dynamo's recompile limit: training leaves {dropped} of {sum(len(graph.sites) for graph in graphs)} "
        f"captured products in Python ({some(list(layers), SHOWN)}); raise torch._dynamo.config.{low} to {needed}"
    ]


def with_own_code(model: Callable[..., Any]) -> Callable[..., Any]:
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


def _run(compiled: Callable[..., Any], args: Any, kwargs: Any, outside: OutsideGraphs) -> None:
    """Run the forward, and the backward where there is one (it compiles lazily)."""
    with own_errors():
        with outside:
            results = compat.tree_leaves(compiled(*args, **kwargs))
        outputs = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if leaves := _leaves_below(outputs):
            ones = [torch.ones_like(output) for output in outputs]
            torch.autograd.grad(outputs, leaves, ones, allow_unused=True)  # leaves .grad alone


@contextmanager
def own_errors() -> Iterator[None]:
    """A ``ValueError`` that Dynamo has wrapped comes out as it was raised."""
    try:
        yield
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


def _tensors_of(model: Any) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []


@contextmanager
def unchanged(model: Any, args: Any, kwargs: Any) -> Iterator[None]:
    """Buffers and random state are put back; a model compiled in place runs uncompiled meanwhile."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if isinstance(model, nn.Module) else []
    in_place = getattr(model, "_compiled_call_impl", None)
    tensors = _tensors_of(model)
    tensors += [leaf for leaf in compat.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
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
