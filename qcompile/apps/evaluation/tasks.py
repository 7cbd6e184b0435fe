"""The tasks: how a line of JSONL becomes a prompt, choices and the right one. Prompts are those of lm_eval 0.4.

A task may be read from more than one layout: the fields of the original data set, and those of llm-foundry, whose files
hold the question in full. A layout is a function; the names of its arguments are the fields that it needs.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["TASKS", "Document", "Task", "read", "task_of"]


class Document(NamedTuple):
    """``context`` is followed by a space and one of ``choices``, of which ``gold`` is right.

    A cloze has one choice, its last word.
    """

    context: str
    choices: tuple[str, ...]
    gold: int = 0

    def pairs(self) -> list[tuple[str, str]]:
        """Contexts and continuations, which are to get log-likelihoods."""
        return [(self.context, f" {choice}") for choice in self.choices]


Layout = Callable[..., Document]


@dataclass(frozen=True)
class Task:
    """``layouts``: the first one whose fields a document has reads it. ``metrics``: of every document."""

    name: str
    layouts: tuple[Layout, ...]
    metrics: tuple[str, ...] = ("acc", "acc_norm")

    @property
    def is_cloze(self) -> bool:
        return "nll" in self.metrics

    def document(self, fields: Mapping[str, Any]) -> Document:
        """Raises ``ValueError`` where fields are missing, or hold something else."""
        for layout in self.layouts:
            names = fields_of(layout)
            if all(name in fields for name in names):
                return checked(layout(**{name: fields[name] for name in names}))
        needed = "; or ".join(", ".join(fields_of(layout)) for layout in self.layouts)
        best = max(self.layouts, key=lambda layout: sum(name in fields for name in fields_of(layout)))
        missing = next(name for name in fields_of(best) if name not in fields)
        msg = f"no field {missing!r}; {self.name} needs {needed}"
        raise ValueError(msg)


def fields_of(layout: Layout) -> list[str]:
    return list(inspect.signature(layout).parameters)


def checked(document: Document) -> Document:
    """Raises ``ValueError`` for what cannot be scored."""
    context, choices, gold = document
    if not isinstance(context, str) or not context.strip():
        msg = "the context is empty"
        raise ValueError(msg)
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        msg = f"choices {list(choices)!r} are not texts"
        raise ValueError(msg)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        msg = f"gold {gold!r} is no index of the {len(choices)} choices"
        raise ValueError(msg)
    return document


# --- layouts --------------------------------------------------------------------------------------------------


def listed(choices: Sequence[str]) -> tuple[str, ...]:
    """Raises ``ValueError`` for a text, which is a sequence of texts as well: of its characters."""
    if not isinstance(choices, (list, tuple)):
        msg = f"choices {choices!r} are no list of texts"
        raise ValueError(msg)
    return tuple(choices)


def plain(query: str, choices: Sequence[str], gold: int) -> Document:
    return Document(query, listed(choices), gold)


def stated(query: str, choices: Sequence[str], gold: int) -> Document:
    """llm-foundry: ``query`` begins with "Question: "."""
    return Document(f"{query.strip()}\nAnswer:", listed(choices), gold)


def stated_passage(query: str, choices: Sequence[str], gold: int) -> Document:
    """llm-foundry's BoolQ, which has "Passage: " in front, as lm_eval has not."""
    return stated(query.removeprefix("Passage: "), choices, gold)


def labelled(choices: Mapping[str, Sequence[str]], answer: str, question: str) -> Document:
    """``choices`` as ARC and OpenBookQA have them: ``{"text": [...], "label": ["A", ...]}``."""
    return Document(question, listed(choices["text"]), listed(choices["label"]).index(answer.strip()))


def arc(question: str, choices: Mapping[str, Sequence[str]], answerKey: str) -> Document:  # noqa: N803
    return labelled(choices, answerKey, f"Question: {question}\nAnswer:")


def open_book_qa(question_stem: str, choices: Mapping[str, Sequence[str]], answerKey: str) -> Document:  # noqa: N803
    return labelled(choices, answerKey, question_stem)


def open_book_qa_nested(question: Mapping[str, Any], answerKey: str) -> Document:  # noqa: N803
    """As published: ``{"question": {"stem": ..., "choices": [{"text": ..., "label": ...}]}, "answerKey": ...}``."""
    columns = {key: [choice[key] for choice in question["choices"]] for key in ("text", "label")}
    return labelled(columns, answerKey, question["stem"])


def piqa(goal: str, sol1: str, sol2: str, label: int) -> Document:
    return Document(f"Question: {goal}\nAnswer:", (sol1, sol2), int(label))


def boolq(passage: str, question: str, label: int) -> Document:
    return Document(f"{passage}\nQuestion: {question}?\nAnswer:", ("no", "yes"), int(label))


def boolq_published(passage: str, question: str, answer: bool) -> Document:
    return boolq(passage, question, int(answer))


def sciq(
    support: str, question: str, distractor1: str, distractor2: str, distractor3: str, correct_answer: str
) -> Document:
    choices = (distractor1, distractor2, distractor3, correct_answer)
    return Document(f"{support.lstrip()}\nQuestion: {question}\nAnswer:", choices, 3)


def hellaswag(activity_label: str, ctx_a: str, ctx_b: str, endings: Sequence[str], label: str | int) -> Document:
    context = f"{activity_label}: {ctx_a} {ctx_b.capitalize()}"
    return Document(without_brackets(context), tuple(map(without_brackets, listed(endings))), int(label))


def without_brackets(text: str) -> str:
    """WikiHow's marks, which are left over in HellaSwag."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def logiqa(context: str, question: str, options: Sequence[str], label: str) -> Document:
    choices = listed(options)
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=False))
    prompt = f"Passage: {context}\nQuestion: {question}\nChoices:\n{lines}Answer:"
    return Document(prompt, choices, "abcd".index(label.strip().lower()))


def lambada(text: str) -> Document:
    context, _, word = text.rpartition(" ")
    return Document(context, (word,))


def cloze(context: str, continuation: str) -> Document:
    return Document(context.rstrip(), (continuation.strip(),))


#: By name. "acc" and "acc_norm": the choice of the highest log-likelihood, of the highest per character, is right. A
#: cloze has "acc", whether every token was the likeliest, and "nll", minus the log-likelihood.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("arc_easy", (arc, stated)),
        Task("arc_challenge", (arc, stated)),
        Task("boolq", (boolq, boolq_published, stated_passage)),
        Task("piqa", (piqa, stated)),
        Task("sciq", (sciq, stated)),
        Task("openbookqa", (open_book_qa, open_book_qa_nested, plain)),
        Task("hellaswag", (hellaswag, plain)),
        Task("logiqa", (logiqa, plain)),
        Task("lambada_openai", (lambada, cloze), ("acc", "nll")),
        Task("multiple_choice", (plain,)),
        Task("cloze", (cloze,), ("acc", "nll")),
    )
}


def task_of(request: str) -> tuple[str, Task, Path]:
    """``"TASK=FILE"``, or a file that is called like its task: the name of the result, the task, the file.

    Raises ``ValueError`` for an unknown task.
    """
    name, equals, file = request.partition("=")
    path = Path(file if equals else request)
    wanted = name if equals else path.stem
    by_letters = {letters(known): task for known, task in TASKS.items()}
    task = by_letters.get(letters(wanted))
    if task is None:
        msg = f"{request!r}: no task {wanted!r}; give TASK=FILE with one of {', '.join(TASKS)}"
        raise ValueError(msg)
    return path.stem if task.name in ("multiple_choice", "cloze") else task.name, task, path


def letters(name: str) -> str:
    return re.sub(r"[-_]", "", name.lower())


def read(task: Task, path: Path, limit: int | None = None) -> list[Document]:
    """All documents of a file, or the first ``limit``. Raises ``ValueError`` naming file and line, or ``OSError``."""
    documents: list[Document] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if len(documents) == limit:
                break
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    msg = f"{type(fields).__name__} instead of an object"
                    raise ValueError(msg)
                documents.append(task.document(fields))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                what = f"no {error} in a field" if isinstance(error, KeyError) else str(error)
                msg = f"{path}, line {number}: {what}"
                raise ValueError(msg) from None
    if not documents:
        msg = f"{path} has no documents"
        raise ValueError(msg)
    return documents
