"""``qcompile eval``: prompts, log-likelihoods, scores, paired differences, and what it refuses.

What would break: a prompt that is not lm_eval's, scores that are not lm_eval's, a log-likelihood that depends on the
other rows of its batch or is of the wrong tokens, errors of the difference as if runs were independent.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from qcompile.apps import cli
from qcompile.apps.evaluation import (
    TASKS,
    LogLikelihoods,
    TaskScores,
    difference,
    harness,
    mean,
    read,
    score_by_lm_eval,
    score_here,
    task_of,
)

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="needs lm_eval (pip install 'qcompile[eval]'), which CI leaves out"
)

THREE = [
    {"query": "The sky is", "choices": ["blue", "a very long wrong answer"], "gold": 0},
    {"query": "Grass is", "choices": ["a very long wrong answer indeed", "green"], "gold": 1},
    {"query": "2+2=", "choices": ["5", "4"], "gold": 1},
]

#: A document of every task in the fields of its data set: what lm_eval 0.4.13 makes of it.
DOCUMENTS = {
    "arc_easy": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        ("Question: Q?\nAnswer:", ("x", "y"), 1),
    ),
    "boolq": ({"passage": "P.", "question": "is it", "label": 1}, ("P.\nQuestion: is it?\nAnswer:", ("no", "yes"), 1)),
    "piqa": ({"goal": "G", "sol1": "a", "sol2": "b", "label": 0}, ("Question: G\nAnswer:", ("a", "b"), 0)),
    "sciq": (
        {
            "support": " S.",
            "question": "Q?",
            "distractor1": "a",
            "distractor2": "b",
            "distractor3": "c",
            "correct_answer": "d",
        },
        ("S.\nQuestion: Q?\nAnswer:", ("a", "b", "c", "d"), 3),
    ),
    "openbookqa": (
        {"question_stem": "Fog is", "choices": {"text": ["w", "x"], "label": ["A", "B"]}, "answerKey": " A"},
        ("Fog is", ("w", "x"), 0),
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx_a": "[header] A man  bakes.",
            "ctx_b": "he",
            "endings": ["eats [title] Then rests.", "[step] sits."],
            "label": "1",
        },
        ("Baking: A man bakes. He", ("eats. Then rests.", " sits."), 1),
    ),
    "logiqa": (
        {"context": "C.", "question": "Which?", "options": ["k", "l", "m", "n"], "label": "c"},
        ("Passage: C.\nQuestion: Which?\nChoices:\nA. k\nB. l\nC. m\nD. n\nAnswer:", ("k", "l", "m", "n"), 2),
    ),
    "lambada_openai": ({"text": "he lost his way"}, ("he lost his", ("way",), 0)),
}


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@cache
def task_manager():
    """Seconds: it reads all its YAML."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


class Bytes:
    """One token per byte."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return list(text.encode())


class Model(nn.Module):
    """Logits that depend on all tokens before."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(256, 32), nn.Linear(32, 48), nn.Linear(48, 256)

    def forward(self, input_ids):
        seen = self.embed(input_ids).cumsum(1) / input_ids.shape[1] ** 0.5
        return self.down(self.up(seen).relu())


class Causal(Model):
    def forward(self, input_ids):
        return self.down(self.up(self.embed(input_ids).cumsum(1)).relu())


def shorter_is_likelier(pairs):
    return [(-float(len(continuation)), len(continuation) < 6) for _, continuation in pairs]


# --- prompts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_prompts_are_lm_evals(name):
    fields, expected = DOCUMENTS[name]
    assert TASKS[name].document(fields) == expected


@needs_lm_eval
@pytest.mark.parametrize("name", DOCUMENTS)
def test_lm_evals_own_tasks_make_the_same_prompts(name, monkeypatch):
    """Its YAML on our document: what keeps the table above true."""
    import datasets

    fields, (context, choices, gold) = DOCUMENTS[name]
    data = datasets.DatasetDict(
        {split: datasets.Dataset.from_list([fields]) for split in ("train", "validation", "test")}
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: data)
    loaded = task_manager().load([name])["tasks"][name]
    document = next(iter(loaded.eval_docs))
    requests = loaded.construct_requests(document, loaded.fewshot_context(document, 0), metadata=(name, 0, 1))
    requests = requests if isinstance(requests, list) else [requests]
    assert [request.args for request in requests] == [(context, f" {choice}") for choice in choices]
    if TASKS[name].metrics != ("acc", "nll"):
        assert loaded.doc_to_target(document) in (gold, choices[gold])


def test_other_layouts_read_alike():
    """llm-foundry's files hold the question in full, and BoolQ's passage with a word in front that lm_eval has not."""
    arc = TASKS["arc_easy"].document({"query": "Question: Q?\n", "choices": ["x", "y"], "gold": 1})
    assert arc == DOCUMENTS["arc_easy"][1]
    boolq = TASKS["boolq"].document({"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1})
    assert boolq == DOCUMENTS["boolq"][1]
    lambada = TASKS["lambada_openai"].document({"context": "he lost his", "continuation": "way"})
    assert lambada == DOCUMENTS["lambada_openai"][1]


@pytest.mark.parametrize(
    ("name", "fields", "choices"),
    [
        ("multiple_choice", {**THREE[0], "choices": "ab"}, "'ab'"),
        ("multiple_choice", {**THREE[0], "choices": {"a": 0}}, "{'a': 0}"),
        ("arc_easy", {**THREE[0], "choices": "ab"}, "'ab'"),
        ("arc_easy", {**DOCUMENTS["arc_easy"][0], "choices": {"text": "ab", "label": ["A", "B"]}}, "'ab'"),
        ("openbookqa", {**DOCUMENTS["openbookqa"][0], "choices": {"text": ["a", "b"], "label": "AB"}}, "'AB'"),
        ("hellaswag", {**DOCUMENTS["hellaswag"][0], "endings": "ab"}, "'ab'"),
        ("logiqa", {**DOCUMENTS["logiqa"][0], "options": "abcd"}, "'abcd'"),
    ],
)
def test_a_text_is_no_list_of_choices(name, fields, choices, tmp_path):
    """It would be one choice per character."""
    path = write(tmp_path / "rows.jsonl", [fields])
    with pytest.raises(ValueError, match=re.escape(f"rows.jsonl, line 1: choices {choices} are no list of texts")):
        read(TASKS[name], path)


# --- scores ---------------------------------------------------------------------------------------------------


def test_three_documents_score_what_lm_eval_gives(tmp_path):
    """lm_eval 0.4.13 on the same: 2/3 and 0. The space counts in log-likelihoods and not in lengths, which is worse for
    short choices; of the last document's two equal ones the first wins.
    """
    task = TASKS["multiple_choice"]
    documents = read(task, write(tmp_path / "three.jsonl", THREE))
    found = score_here(shorter_is_likelier, task, documents)
    assert found == {"acc": [1.0, 1.0, 0.0], "acc_norm": [0.0, 0.0, 0.0]}


@needs_lm_eval
@pytest.mark.parametrize("name", ["multiple_choice", "cloze"])
def test_our_scores_are_lm_evals(name, tmp_path):
    """The fixture, and random choices with ties: every document, not only the mean."""
    generator = torch.Generator().manual_seed(0)
    rows = [*THREE]
    for _ in range(40):
        lengths = torch.randint(1, 12, (3,), generator=generator).tolist()
        choices = ["é" * length for length in lengths]
        rows.append({"query": "é", "choices": choices, "gold": int(torch.randint(3, (), generator=generator))})
    if name == "cloze":
        rows = [{"context": row["query"], "continuation": row["choices"][row["gold"]]} for row in rows]
    task = TASKS[name]
    documents = read(task, write(tmp_path / "rows.jsonl", rows))
    found = score_here(shorter_is_likelier, task, documents)
    assert score_by_lm_eval(shorter_is_likelier, task, documents) == found
    assert all(len(set(values)) > 1 for values in found.values())


@pytest.mark.parametrize("rows", [1, 3])
def test_log_likelihoods_are_those_of_each_text_alone(rows):
    """Whatever shares its batch, and where two requests share their input."""
    model = Causal()
    pairs = [("ab", " c"), ("ab", " d"), ("a longer context than the others", " of it"), ("ab  ", "c")]
    found = LogLikelihoods(model, Bytes(), rows=rows)(pairs)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([list((context + continuation).encode())])
        count = len(context + continuation) - len(context.rstrip())
        table = model(ids[:, :-1])[0].log_softmax(-1)[-count:]
        assert value == pytest.approx(table.gather(1, ids[0, -count:, None]).sum().item(), abs=1e-4)
        assert greedy == bool((table.argmax(1) == ids[0, -count:]).all())


def test_long_texts_keep_their_end():
    ids, count = LogLikelihoods(Causal(), Bytes(), most_tokens=5).encode("0123456789", " ab")
    assert (bytes(ids), count) == (b"789 ab", 3)


def test_errors_are_of_differences_not_of_means():
    """Two runs that differ in one document of a hundred."""
    ours = [float(i % 2) for i in range(100)]
    theirs = [1 - ours[0], *ours[1:]]
    both = [TaskScores("cloze", "", {"acc": values}) for values in (ours, theirs)]
    value, error = difference(*both, "acc")
    assert (value, error) == (pytest.approx(-0.01), pytest.approx(0.01))
    assert mean(ours)[1] == pytest.approx(statistics.stdev(ours) / 10)
    assert math.isnan(mean([1.0])[1])


# --- command line ---------------------------------------------------------------------------------------------

MODULE = """
from test_evaluation_parts import Bytes, Causal

def build():
    return Causal(), Bytes()

def no_tokenizer():
    return Causal()

def wrong_tokenizer():
    return Causal(), len
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch) -> str:
    name = f"eval_module_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "test_evaluation_parts", sys.modules[__name__])
    write(tmp_path / "piqa.jsonl", [DOCUMENTS["piqa"][0], {**DOCUMENTS["piqa"][0], "goal": "H"}])
    write(tmp_path / "three.jsonl", THREE)
    write(tmp_path / "broken.jsonl", [THREE[0], {"query": "x", "gold": 0}])
    write(tmp_path / "wrong.jsonl", [{"query": "x", "choices": ["a", "b"], "gold": 2}])
    (tmp_path / "empty.jsonl").write_text("\n")
    return name


def test_two_recipes_are_compared_and_files_resumed(user_module, tmp_path, capsys, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **given: compiled.append(given) or model)
    files = ["piqa.jsonl", "multiple_choice=three.jsonl"]
    request = ["eval", f"{user_module}:build", *files, "--scorer", "own", "--batch", "2"]
    wide = [*request, "--backend", "eager", "--json", "wide.json"]
    assert cli.main(wide) == 0
    quantized = [*request, "--option", "min_side=0", "--json", "fp4.json", "--against", "wide.json"]
    assert cli.main(quantized) == 0
    assert compiled == [
        {"backend": "eager", "options": None},
        {"backend": "qcompile_fp4", "options": {"min_side": 0}},
    ]
    shown = capsys.readouterr().out
    assert "difference" in shown
    assert "mean of tasks" in shown
    written = json.loads((tmp_path / "fp4.json").read_text())
    assert {name: len(task["scores"]["acc"]) for name, task in written["tasks"].items()} == {"piqa": 2, "three": 3}
    monkeypatch.setattr(harness, "score_of", None)  # would fail: nothing is scored again
    assert cli.main(quantized) == 0
    assert cli.main([*wide, "--limit", "1"]) == 2
    assert "wide.json was made with limit=None, now 1" in capsys.readouterr().err


SCORED = {"task": "piqa", "documents": "0", "scores": {"acc": [1.0, 0.0], "acc_norm": [1.0, 0.0]}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"tasks": {}}, "the other result has no task 'piqa'; it has none"),
        ({"tasks": {"piqa": SCORED}}, "piqa: the other result is of other documents (2, here 2)"),
        ({"scores": {"acc": [1.0, 0.0]}}, "piqa: the other result has no acc_norm; run it again"),
        ({"scores": {"acc": [1.0], "acc_norm": [1.0]}}, "piqa: the other result is of other documents (1, here 2)"),
        ({"scores": {}}, "other.json is no result of qcompile eval --json"),
        ({"scores": {"acc": [1.0, 0.0], "acc_norm": [1.0]}}, "other.json is no result of qcompile eval --json"),
        ({"scores": {"acc": "10", "acc_norm": "10"}}, "other.json is no result of qcompile eval --json"),
        ({"settings": None}, "other.json is no result of qcompile eval --json"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_scored(
    change, expected, user_module, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(torch, "compile", lambda model, **given: model)
    request = ["eval", f"{user_module}:build", "piqa.jsonl", "--scorer", "own", "--backend", "eager"]
    assert cli.main([*request, "--json", "other.json"]) == 0
    written = json.loads((tmp_path / "other.json").read_text())
    changed = dict(change)
    if "scores" in changed:
        written["tasks"]["piqa"]["scores"] = changed.pop("scores")
    (tmp_path / "other.json").write_text(json.dumps({**written, **changed}))
    capsys.readouterr()
    monkeypatch.setattr(cli, "compiled_likelihoods", None)  # would fail
    assert cli.main([*request, "--against", "other.json"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert expected in complaint
    assert "\n" not in complaint


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["{m}:no_tokenizer", "piqa.jsonl"], "returned Causal; it is to return (model, tokenizer)"),
        (["{m}:wrong_tokenizer", "piqa.jsonl"], "is no tokenizer: it has no encode"),
        (["{m}:build", "three.jsonl"], "no task 'three'; give TASK=FILE with one of arc_easy"),
        (["{m}:build", "piqa=broken.jsonl"], "broken.jsonl, line 2: no field 'choices'; piqa needs goal, sol1, sol2"),
        (["{m}:build", "piqa=wrong.jsonl"], "wrong.jsonl, line 1: gold 2 is no index of the 2 choices"),
        (["{m}:build", "piqa=empty.jsonl"], "empty.jsonl has no documents"),
        (["{m}:build", "piqa=absent.jsonl"], "absent.jsonl: No such file"),
        (["{m}:build", "piqa.jsonl", "--limit", "0"], "--limit 0 is to be positive"),
        (["{m}:build", "piqa.jsonl", "--tokens", "0"], "--tokens 0 is to be positive"),
        (["{m}:build", "piqa.jsonl", "--tokens", "1"], "' a' has 2 tokens, more than the 1 of a sequence"),
        (["{m}:build", "piqa.jsonl", "--against", "three.jsonl"], "three.jsonl is no result of qcompile eval"),
        (["{m}:build", "piqa.jsonl", "piqa=three.jsonl"], "have the same name"),
    ],
)
def test_eval_refuses_in_one_line(argv, expected, user_module, capsys):
    assert cli.main(["eval", *(a.format(m=user_module) for a in argv), "--scorer", "own"]) == 2
    complaint = capsys.readouterr().err.strip()
    assert expected in complaint
    assert "\n" not in complaint


def test_a_missing_lm_eval_is_named_with_both_ways_out(user_module, capsys, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert cli.main(["eval", f"{user_module}:build", "piqa.jsonl"]) == 2
    assert "pip install 'qcompile[eval]', or --scorer own" in capsys.readouterr().err


def test_tasks_go_by_their_files_names():
    assert [task_of(name)[1].name for name in ("x/openbook_qa.jsonl", "ARC-Easy.jsonl")] == ["openbookqa", "arc_easy"]
