"""Scores of documents, their means, and differences between two runs over the same documents."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from .harness import Likelihoods, Scorer
from .tasks import Document, Task

__all__ = [
    "Evaluation",
    "TaskScores",
    "add",
    "check_comparable",
    "difference",
    "digest",
    "mean",
    "resumed",
    "rows",
    "table",
]


@dataclass(frozen=True)
class TaskScores:
    """``scores``: metric → one number per document. ``documents``: a digest of them and of their prompts."""

    task: str
    documents: str
    scores: dict[str, list[float]]

    @property
    def count(self) -> int:
        """How many documents there are."""
        return len(next(iter(self.scores.values())))

    @staticmethod
    def from_data(data: Mapping[str, Any]) -> TaskScores:
        """Raises ``TypeError`` or ``AttributeError`` for anything else than a number per metric and document."""
        found = TaskScores(**data)
        lists = list(found.scores.values())
        numbers = all(isinstance(value, (int, float)) for values in lists for value in values)
        if not (numbers and len({len(values) for values in lists} - {0}) == 1):
            msg = "scores are lists of numbers, of one length"
            raise TypeError(msg)
        return found


@dataclass
class Evaluation:
    """What one recipe scored; ``settings`` says how."""

    settings: dict[str, Any]
    tasks: dict[str, TaskScores] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_file(path: Path) -> Evaluation:
        """Raises ``ValueError`` for what :meth:`to_json` did not write, ``OSError`` for what cannot be read."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            tasks = {name: TaskScores.from_data(task) for name, task in data["tasks"].items()}
            return Evaluation(dict(data["settings"]), tasks)
        except (ValueError, KeyError, TypeError, AttributeError):
            msg = f"{path} is no result of qcompile eval --json"
            raise ValueError(msg) from None


def digest(documents: Sequence[Document]) -> str:
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


def resumed(path: Path | None, settings: dict[str, Any]) -> Evaluation:
    """What a file has of a run with these settings. Raises ``ValueError`` if it is of other settings."""
    if path is None or not path.exists():
        return Evaluation(settings)
    found = Evaluation.from_file(path)
    for key in settings:
        if found.settings.get(key) != settings[key]:
            msg = f"{path} was made with {key}={found.settings.get(key)!r}, now {settings[key]!r}; take another file"
            raise ValueError(msg)
    return found


def add(
    evaluation: Evaluation,
    name: str,
    task: Task,
    documents: Sequence[Document],
    likelihoods: Likelihoods,
    scorer: Scorer,
) -> None:
    """Score a task, unless the evaluation has it of these documents."""
    known = digest(documents)
    if name not in evaluation.tasks or evaluation.tasks[name].documents != known:
        evaluation.tasks[name] = TaskScores(task.name, known, scorer(likelihoods, task, documents))


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error: the sample's deviation by √n; NaN of a single document."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), deviation / math.sqrt(len(values))


def difference(ours: TaskScores, theirs: TaskScores, metric: str) -> tuple[float, float]:
    """Mean of the documents' differences, ours − theirs, and its standard error.

    Pairing takes out what makes a document hard for both, so the error is far below that of either mean.
    """
    pairs = zip(ours.scores[metric], theirs.scores[metric], strict=True)
    return mean([mine - other for mine, other in pairs])


def check_comparable(
    ours: Evaluation, to_score: Mapping[str, tuple[Task, Sequence[Document]]], theirs: Evaluation
) -> None:
    """Raises ``ValueError`` where ``theirs`` does not have the documents of ``ours``, once those in ``to_score`` are in
    it, with the same metrics.
    """
    scored = {name: (task.documents, task.count, tuple(task.scores)) for name, task in ours.tasks.items()}
    planned = {name: (digest(each), len(each), task.metrics) for name, (task, each) in to_score.items()}
    for name, (documents, count, metrics) in {**scored, **planned}.items():
        other = theirs.tasks.get(name)
        if other is None:
            msg = f"the other result has no task {name!r}; it has {', '.join(theirs.tasks) or 'none'}"
            raise ValueError(msg)
        if (other.documents, other.count) != (documents, count):
            msg = (
                f"{name}: the other result is of other documents ({other.count}, here {count}); "
                "give both runs the same file and --limit"
            )
            raise ValueError(msg)
        if missing := [metric for metric in metrics if metric not in other.scores]:
            msg = f"{name}: the other result has no {missing[0]}; run it again, as the same task"
            raise ValueError(msg)


@dataclass(frozen=True)
class Row:
    """Means and their errors, under "score" and, beside another run, "other" and "difference"."""

    task: str
    metric: str
    documents: int
    values: dict[str, tuple[float, float]]


def rows(ours: Evaluation, theirs: Evaluation | None = None) -> list[Row]:
    """One per task and metric, and the mean over tasks of each metric that several have."""
    found = []
    for name, task in ours.tasks.items():
        for metric, numbers in task.scores.items():
            values = {"score": mean(numbers)}
            if theirs is not None:
                values["other"] = mean(theirs.tasks[name].scores[metric])
                values["difference"] = difference(task, theirs.tasks[name], metric)
            found.append(Row(name, metric, len(numbers), values))
    for metric in ("acc", "acc_norm"):
        same = [row for row in found if row.metric == metric]
        if len(same) > 1:
            values = {key: over_tasks([row.values[key] for row in same]) for key in same[0].values}
            found.append(Row("mean of tasks", metric, sum(row.documents for row in same), values))
    return found


def over_tasks(values: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Every task counts alike; their errors are independent."""
    error = math.sqrt(sum(error**2 for _, error in values)) / len(values)
    return statistics.fmean(value for value, _ in values), error


def table(ours: Evaluation, theirs: Evaluation | None = None) -> Table:
    """Percent for accuracies, nats for ``nll``; after ± one standard error."""
    title = f"{label(ours)}" + (f" against {label(theirs)}" if theirs else "")
    shown = Table(title=title, title_justify="left", box=SIMPLE)
    for column in ("task", "metric"):
        shown.add_column(column)
    keys = ("score", "other", "difference") if theirs else ("score",)
    for column in ("documents", *keys):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows(ours, theirs):
        cells = [formatted(row.metric, row.values[key], signed=key == "difference") for key in keys]
        shown.add_row(row.task, row.metric, str(row.documents), *cells)
    return shown


def label(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    options = ", ".join(f"{key}={value}" for key, value in (settings.get("options") or {}).items())
    return f"{settings.get('backend', '?')}{f' ({options})' if options else ''}"


def formatted(metric: str, value: tuple[float, float], signed: bool) -> str:
    scale, digits = (1, 4) if metric == "nll" else (100, 2)
    sign = "+" if signed else ""
    return f"{scale * value[0]:{sign}.{digits}f} ± {scale * value[1]:.{digits}f}"
