"""Score every candidate of every layer: ``qcompile.sensitivity``."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import qcompile.kernels  # noqa: F401  (registers the qcompile:: ops)
from qcompile import compat
from qcompile.backends import plain_model, recipe_of, with_options
from qcompile.ir.recipe import Recipe
from qcompile.passes.pipeline import rewrite_to_score
from qcompile.passes.probe import Probes, why_not_probed
from qcompile.passes.record import Plan
from qcompile.report.explain import own_errors, unchanged, with_own_code
from qcompile.session import Session, UnmatchedRuleError, unmatched_message

from .layers import COSTS, WIDE, Cost, Layer, layer_of, operands_of, roles_of
from .result import Sensitivity, check_budget

__all__ = ["sensitivity"]

#: Of the file that ``resume=`` names.
VERSION = 1


def sensitivity(
    model: Callable[..., Any],
    batches: Iterable[Any],
    *,
    budget: float = 0.25,
    candidates: Mapping[str, Any] | None = None,
    backend: str | Recipe = "qcompile_fp4",
    options: Mapping[str, Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    cost: str | Cost = "operations",
    gradients: bool = False,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Sensitivity:
    """Which layers to leave in high precision, or to quantize more finely, from what each does to the loss.

    Every product computes y and, for every candidate, the y_q of its quantized operands, in one forward. One backward
    gives g, the gradient of the loss at y, and the score Σ (g ⊙ (y_q − y))² over all elements and batches: a
    diagonal-Fisher estimate of how much the candidate raises the loss, as in NVIDIA ModelOpt's ``auto_quantize``. Then
    one option for each group of layers is chosen, of least total score within the budget, exactly. Layers that read
    one activation share a choice (q, k and v; gate and up), and so do the experts of a mixture.

    ::

        found = qcompile.sensitivity(model, batches, budget=0.25)
        print(found)
        compiled = torch.compile(model, backend="qcompile_fp4", options={"rules": found.rules})

    Args:
        model: module or function, on the device and in the mode that it is to be scored in. Its parameters, buffers and
            gradients are left as they were.
        batches: inputs of the model: each a dictionary (keyword inputs), a tuple or list (positional), or one input.
        budget: the share of what quantization saves that may be given up: 0 is all layers at their cheapest, 1 all at
            their best. :meth:`Sensitivity.at` chooses again for another one.
        candidates: by name, what a layer may be quantized to: a dictionary of what a rule takes (``{"activation":
            "int8 row", "weight": {"format": "e1m2"}}``, ``{"bits": 4}``), one operand as text for both, or a number of
            bits. Default: the recipe itself. High precision is always an option, called ``"wide"``.
        backend: a recipe or its name.
        options: as for ``torch.compile``. What they leave wide (``skip``, heads, thin layers) is not scored.
        loss: called with the model and a batch, returns a scalar. Default: the model's result, its ``.loss``, or
            its first item.
        cost: of a choice. ``"operations"``: products of one bit with one bit, over all layers. ``"weights"``: bits that
            hold the weights, scales included. ``"saved"``: bytes that hold the activations for the backward.
            ``"time"``: estimated nanoseconds of the forward products on this card. Or a function of the layers of a
            group and an option's name, which returns an integer.
        gradients: also compare the backward products: ‖error‖² / ‖gradient‖² of dX and dW, which the table lists. That
            takes two more products per candidate.
        resume: a JSON file, written after every batch. If it exists, the batches in it are not computed again.
        seed: of the random state, set before every batch. The state of the process stays as it was.
        progress: show a progress bar.

    All candidates' errors are kept until the backward: tokens × outputs for each layer and candidate. Products that
    are written in place, in bodies of ``cond``, ``scan`` and ``map``, of a DTensor, or outside of graphs
    (:func:`qcompile.explain` lists these) are not scored.

    Raises ``ValueError`` for an unknown backend, option, candidate or cost, for a budget outside of 0 … 1, for no
    batches, a loss that is no scalar or does not depend on the products, a model without products to score, and a file
    that belongs to another model or other settings; :class:`UnmatchedRuleError` (a ``ValueError``) for a rule that
    matches nothing.

    Reference: NVIDIA TensorRT Model Optimizer, ``mtq.auto_quantize(method="gradient")``.
    """
    model = plain_model(model, "sensitivity")
    recipe = recipe_of(backend)
    options = dict(options or {})
    base = with_options(recipe, options)
    check_budget(budget)
    function = _cost_of(cost)
    recipes = _recipes(base, candidates)
    scores = _Scores(base, recipes, gradients)
    store = _Store(resume, _identity(model, base, recipes, gradients, seed))
    store.load(scores)
    compiled = torch.compile(with_own_code(model), backend=scores.compile)
    total = len(batches) if isinstance(batches, Sized) else None
    done = 0
    with _progress(progress, total) as step, compat.unlimited_recompiles():
        for done, batch in enumerate(batches, 1):
            if not store.has(done - 1, batch):
                with unchanged(model, (batch,), {}), own_errors():
                    torch.manual_seed(seed + done)
                    scores.add(_loss_of(compiled, batch, loss))
                store.save(scores)
            step()
    if not done:
        msg = "sensitivity: batches is empty; give at least one batch"
        raise ValueError(msg)
    if done < len(store.batches):
        msg = f"sensitivity: {store.path} holds {len(store.batches)} batches, more than the {done} given"
        raise ValueError(msg)
    if not any(layer.scores for layer in scores.layers.values()):
        reasons = dict.fromkeys(layer.reason for layer in scores.layers.values())
        msg = f"sensitivity: no product to score: {'; '.join(reasons) or 'the model has none in a graph'}"
        raise ValueError(msg)
    unit = COSTS[cost][1] if isinstance(cost, str) else ""
    return Sensitivity.of(list(scores.layers.values()), tuple(recipes), function, unit, budget, options)


def _cost_of(cost: Any) -> Cost:
    if isinstance(cost, str) and cost in COSTS:
        return COSTS[cost][0]
    if callable(cost):
        return cost
    msg = f"sensitivity: cost={cost!r} is not one of {', '.join(COSTS)} or a function of a group's layers and an option"
    raise ValueError(msg)


#: What a candidate may set: all that changes the forward product.
_CANDIDATE_KEYS = ("bits", "activation", "weight", "gradient")


def _recipes(base: Recipe, candidates: Mapping[str, Any] | None) -> dict[str, Recipe]:
    """Candidate → ``base`` with its operands in every layer. Raises ``ValueError`` naming the candidate."""
    if candidates is None:
        return {base.name: base}
    if not isinstance(candidates, Mapping) or not candidates:
        msg = f"sensitivity: candidates takes a dictionary of names and operands, got {candidates!r}"
        raise ValueError(msg)
    found = {}
    for name, given in candidates.items():
        where = f"sensitivity: candidate {name!r}"
        if not isinstance(name, str) or name == WIDE:
            msg = f"{where}: a name is text, and {WIDE!r} is high precision"
            raise ValueError(msg)
        if isinstance(given, str):
            given = {"activation": given, "weight": given}
        elif not isinstance(given, Mapping):
            given = {"bits": given}
        if unknown := [key for key in given if key not in _CANDIDATE_KEYS]:
            msg = f"{where}: unknown key {unknown[0]!r}; a candidate sets {', '.join(_CANDIDATE_KEYS)}"
            raise ValueError(msg)
        try:
            if "bits" in given:
                base.of_width(given["bits"], "bits")
            found[name] = base.override({"rules": [dict(given)]})
        except ValueError as error:
            msg = f"{where}: {error}"
            raise ValueError(msg) from None
    return found


# --- the loss --------------------------------------------------------------------------------------------------------


def _loss_of(compiled: Callable[..., Any], batch: Any, loss: Callable[[Any, Any], Tensor] | None) -> Tensor:
    with torch.enable_grad():
        if loss is not None:
            value = loss(compiled, batch)
        elif isinstance(batch, Mapping):
            value = compiled(**batch)
        else:
            value = compiled(*batch) if isinstance(batch, (tuple, list)) else compiled(batch)
    if loss is None and not isinstance(value, Tensor):
        value = getattr(value, "loss", None) if not isinstance(value, (tuple, list)) else value[0]
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        msg = f"sensitivity: the loss is no scalar tensor but {got}; give loss=lambda model, batch: …"
        raise ValueError(msg)
    return value


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass
class _Scores:
    """A backend that puts probes into every graph, and what they have found, by layer."""

    base: Recipe
    candidates: dict[str, Recipe]
    gradients: bool
    layers: dict[tuple[str, str], Layer] = field(default_factory=dict)
    graphs: list[Probes] = field(default_factory=list)
    session: Session = field(init=False)

    def __post_init__(self) -> None:
        self.session = Session(self.base)

    def compile(self, gm: GraphModule, example_inputs: Any, **_: Any) -> Callable[..., Any]:
        plan, plans, probes = rewrite_to_score(gm, self.base, self.candidates, self.gradients)
        self.session.add(plan)
        self._describe(plan, plans, f"graph {len(self.graphs)}: ")
        self.graphs.append(probes)
        return gm.forward

    def _describe(self, plan: Plan, plans: Mapping[str, Plan], graph: str) -> None:
        """Add the layers of a graph. One that is known, from an earlier graph or from a file, stays as it is."""
        known = set(self.layers)
        for decision in plan.decisions:
            site, key = decision.site, (decision.site.name, decision.site.op)
            if key in known or not site.slots:
                continue
            activation = next((slot.of(site.node) for slot in site.slots if slot.kind == "activation"), None)
            new = layer_of(site, f"{graph}{site.body}{activation}")
            if key in self.layers:  # once more in this graph
                self.layers[key].m += new.m
                continue
            new.recipe, new.reason = operands_of(decision), decision.reason
            for name, other in plans.items():
                if operands := operands_of(other.decisions[site.index]):
                    new.candidates[name] = operands
            if new.candidates:
                new.reason = why_not_probed(site)
                if new.reason:
                    new.candidates = {}
            self.layers[key] = new

    def add(self, loss: Tensor) -> None:
        """Add what a batch gives."""
        if unmatched := self.session.unmatched():
            raise UnmatchedRuleError(unmatched_message(unmatched, self.session.layers))
        graphs = [probes for probes in self.graphs if probes.sites]
        leaves = [probes.scores for probes in graphs]
        if not leaves:
            return
        found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
        if all(table is None for table in found):
            msg = "sensitivity: the loss does not depend on any product that is scored"
            raise ValueError(msg)
        for probes, table in zip(graphs, found, strict=True):
            if table is not None:
                self._add_graph(probes, table.tolist())

    def _add_graph(self, probes: Probes, table: list[list[float]]) -> None:
        count = len(probes.candidates)
        for site, row in zip(probes.sites, table, strict=True):
            layer = self.layers[site.name, site.op]
            for name, value in zip(probes.candidates, row, strict=False):
                if not math.isfinite(value):
                    msg = f"sensitivity: the score of layer {site.name!r} as {name!r} is {value}; is the loss finite?"
                    raise ValueError(msg)
                if name in layer.candidates:
                    layer.scores[name] = layer.scores.get(name, 0.0) + value
            for position, role in enumerate(roles_of(site) if probes.gradients else ()):
                start = count + position * (1 + count)
                errors = layer.errors.setdefault(role, {})
                for name, value in zip((WIDE, *probes.candidates), row[start:], strict=False):
                    if name in (WIDE, *layer.candidates):
                        errors[name] = errors.get(name, 0.0) + value


# --- the file --------------------------------------------------------------------------------------------------------


@dataclass
class _Store:
    """What is on disk after every batch, so that a run may stop anywhere. Without a path nothing is kept."""

    path: str | Path | None
    identity: str
    batches: list[str] = field(default_factory=list)
    pending: str = ""

    def load(self, scores: _Scores) -> None:
        if self.path is None or not Path(self.path).exists():
            return
        try:
            data = json.loads(Path(self.path).read_text(encoding="utf-8"))
            identity, self.batches = data["identity"], data["batches"]
            layers = [Layer(**layer) for layer in data["layers"]]
        except (ValueError, KeyError, TypeError):
            msg = f"sensitivity: resume={str(self.path)!r} is no file of a search; give another name"
            raise ValueError(msg) from None
        if identity != self.identity:
            msg = (
                f"sensitivity: resume={str(self.path)!r} is of another model, recipe, candidates or seed; "
                "give another name or remove it"
            )
            raise ValueError(msg)
        scores.layers.update({layer.key: layer for layer in layers})

    def has(self, index: int, batch: Any) -> bool:
        """Whether a batch is on disk. Raises ``ValueError`` if another one is."""
        if self.path is None:
            return False
        self.pending = _digest(batch)
        if index >= len(self.batches):
            return False
        if self.batches[index] != self.pending:
            msg = f"sensitivity: batch {index} is not the one in resume={str(self.path)!r}; give the same batches"
            raise ValueError(msg)
        return True

    def save(self, scores: _Scores) -> None:
        if self.path is None:
            return
        self.batches.append(self.pending)
        layers = [asdict(layer) for layer in scores.layers.values()]
        data = {"identity": self.identity, "batches": self.batches, "layers": layers}
        unfinished = Path(f"{self.path}.part")
        unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        os.replace(unfinished, self.path)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for leaf in compat.tree_leaves(value):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + _bytes(leaf))
        else:
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _identity(model: Any, base: Recipe, recipes: Mapping[str, Recipe], gradients: bool, seed: int) -> str:
    """Of everything that scores follow from but the batches. Of parameters the beginning tells models apart."""
    digest = hashlib.sha256(repr((VERSION, repr(base), list(recipes), repr(recipes), gradients, seed)).encode())
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if type(parameter) is nn.Parameter and not parameter.is_meta:
            digest.update(_bytes(parameter.detach().flatten()[:64]))
    return digest.hexdigest()


def _progress(shown: bool, total: int | None) -> Any:
    """A context that gives what to call after every batch."""
    return _Bar(total) if shown else nullcontext(lambda: None)


class _Bar:
    def __init__(self, total: int | None) -> None:
        from rich.progress import Progress

        self.bar, self.total = Progress(transient=True), total

    def __enter__(self) -> Callable[[], None]:
        self.bar.__enter__()
        task = self.bar.add_task("scoring batches", total=self.total)
        return lambda: self.bar.advance(task)

    def __exit__(self, *exception: Any) -> None:
        self.bar.__exit__(*exception)
