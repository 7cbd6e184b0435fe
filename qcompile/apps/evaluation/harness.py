"""From log-likelihoods to scores of documents: by lm_eval, or here by the same rules."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from .tasks import Document, Task

__all__ = ["SCORERS", "Likelihoods", "Scorer", "score_by_lm_eval", "score_here"]

Likelihoods = Callable[[Sequence[tuple[str, str]]], list[tuple[float, bool]]]
Scores = dict[str, list[float]]
Scorer = Callable[[Likelihoods, Task, Sequence[Document]], Scores]


def score_here(likelihoods: Likelihoods, task: Task, documents: Sequence[Document]) -> Scores:
    """Metric → one number per document. The first of equal choices wins; lengths are in characters."""
    found = iter(likelihoods([pair for document in documents for pair in document.pairs()]))
    scores: Scores = {metric: [] for metric in task.metrics}
    for document in documents:
        answers = [next(found) for _ in document.choices]
        for metric in task.metrics:
            scores[metric].append(score_of(document, answers, task, metric))
    return scores


def score_of(document: Document, answers: Sequence[tuple[float, bool]], task: Task, metric: str) -> float:
    if metric == "nll":
        return -answers[document.gold][0]
    if task.is_cloze:
        return float(answers[document.gold][1])
    lengths = [len(choice) if metric == "acc_norm" else 1 for choice in document.choices]
    values = [value / length for (value, _), length in zip(answers, lengths, strict=True)]
    return float(values.index(max(values)) == document.gold)


def score_by_lm_eval(likelihoods: Likelihoods, task: Task, documents: Sequence[Document]) -> Scores:
    """The same from ``lm_eval.simple_evaluate``. Raises ``ImportError`` where it is not installed."""
    if find_spec("lm_eval") is None:
        msg = "lm_eval is not installed: pip install 'qcompile[eval]', or --scorer own for the same numbers without it"
        raise ImportError(msg)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a data set that is no file, among others
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.model import LM

    class Model(LM):
        """What lm_eval asks of a model; the tasks here ask for nothing else than this."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    rows = [
        {"context": context, "choices": list(choices), "gold": gold, "answer": f" {choices[gold]}"}
        for context, choices, gold in documents
    ]
    kind: Mapping[str, Any] = (
        {"output_type": "loglikelihood", "doc_to_target": "answer"}
        if task.is_cloze
        else {"output_type": "multiple_choice", "doc_to_target": "gold", "doc_to_choice": "choices"}
    )
    names = {metric: "perplexity" if metric == "nll" else metric for metric in task.metrics}
    config = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "context",
        "metric_list": [{"metric": name} for name in names.values()],
        **kind,
    }
    found = lm_eval.simple_evaluate(model=Model(), tasks=[config], bootstrap_iters=0, log_samples=True)
    assert found is not None  # on rank 0, which is all there is
    samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
    signs = {metric: -1.0 if metric == "nll" else 1.0 for metric in task.metrics}
    return {metric: [signs[metric] * float(sample[name]) for sample in samples] for metric, name in names.items()}


#: What turns log-likelihoods into scores, by name.
SCORERS: dict[str, Scorer] = {
    "lm_eval": score_by_lm_eval,
    "own": score_here,
}
