"""``qcompile eval``: zero-shot scores of a compiled model on local JSONL files, and paired differences of two recipes.

A file is read as documents of one task, whose prompts are lm_eval's. The log-likelihoods of all choices come from
:class:`LogLikelihoods`. They become scores in lm_eval, or here with the same result, where it is not installed.
"""

from __future__ import annotations

from .harness import SCORERS, score_by_lm_eval, score_here
from .likelihood import LogLikelihoods
from .results import Evaluation, TaskScores, add, check_comparable, difference, mean, resumed, rows, table
from .tasks import TASKS, Document, Task, read, task_of

__all__ = [
    "SCORERS",
    "TASKS",
    "Document",
    "Evaluation",
    "LogLikelihoods",
    "Task",
    "TaskScores",
    "add",
    "check_comparable",
    "difference",
    "mean",
    "read",
    "resumed",
    "rows",
    "score_by_lm_eval",
    "score_here",
    "table",
    "task_of",
]
