"""What every recipe does to a pretrained model that is quantized after training: perplexity and zero-shot scores.

    python benchmarks/real_weights.py --model SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/real_weights_cpu \\
        --text wikitext2=test.txt novels=valid.txt.xz docs=valid.txt.xz --task arc_easy.jsonl piqa.jsonl

Only the forward of a recipe matters here. Perplexity is exp of the mean loss of the first ``--tokens`` of a text in
windows of ``--context``; scores are those of `qcompile eval`, of the first ``--limit`` documents of every file. Each
arm is compared with BF16 on the same documents and tokens: errors are of the paired differences. ``--check`` instead
scores the first file by lm_eval, with its own model class, and compares every document with ours, in float32.

``--finetune STEPS --train FILE`` trains every arm first, BF16 too: FP32 parameters and AdamW, BF16 under autocast.

Writes a JSON file per arm after every text and task, which a second call goes on from, and a CSV file of all.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import brief, environment
from stored_quality import load, tokenizer_of, windows_of
from torch import Tensor, nn

import qcompile
from qcompile import compat
from qcompile.apps import demo, evaluation
from qcompile.backends import compile_with
from qcompile.ir.rules import Rule

__all__ = ["ARMS", "BASELINE", "Arm", "check_against_lm_eval", "compiled", "losses_of", "main", "rows"]


@dataclass(frozen=True)
class Arm:
    backend: str = ""
    options: dict[str, Any] = field(default_factory=dict)


BASELINE = "BF16"
ARMS: dict[str, Arm] = {
    BASELINE: Arm(),
    "QuEST W4A4": Arm("qcompile_quest"),
    "NVFP4": Arm("qcompile_nvfp4"),
    "FP4, as printed": Arm("qcompile_fp4", {"variant": "paper"}),
    "FP4, no OCC": Arm("qcompile_fp4", {"activation": {"outliers": None}}),
    "MXFP4": Arm("qcompile_mxfp4", {"variant": "full"}),
    "MXFP8": Arm("qcompile_mxfp8"),
    "LLM.int8()": Arm("qcompile_llm_int8"),
    "IF4": Arm("qcompile_if4"),
    "FP4, direct per tensor": Arm("qcompile_fp4", demo.ARMS["direct"].options or {}),
    "FP4": Arm("qcompile_fp4"),
    "Quartet II": Arm("qcompile_quartet2"),
    "uniform4": Arm("qcompile_uniform4"),
    "TetraJet-v2": Arm("qcompile_tetrajet2"),
    "QuEST W8A8": Arm("qcompile_quest", {"bits": 8}),
}


def compiled(model: Any, arm: Arm) -> Any:
    """The model, whose blocks are compiled one for all; on a CPU by all passes and then eager torch, whose kernels are
    the same: generating code would take longer than it saves. A block by itself does not know its place, so the last
    ones are left out here where a recipe has them wide.
    """
    if not arm.backend:
        return model
    recipe = qcompile.RECIPES[arm.backend]
    blocks = model.model.layers
    shares = [rule.last_blocks for rule in recipe.rules]
    assert all(
        rule == Rule(last_blocks=share, quantize=False) for rule, share in zip(recipe.rules, shares, strict=True)
    )
    everywhere = replace(recipe, rules=())
    inner = None if model.device.type == "cuda" else compat.eager_inner_compile

    def backend(graph: Any, inputs: Any, **_: Any) -> Any:
        return compile_with(everywhere, graph, inputs, options=arm.options, inner_compile=inner)

    torch.compiler.reset()
    for block in blocks[: len(blocks) - round(max(shares, default=0.0) * len(blocks))]:
        block.compile(backend=backend, dynamic=True)
    return model


def finetuned(model: Any, windows: Tensor, steps: int, learning_rate: float, batch: int) -> Callable[..., Any]:
    """Train in place on int64 ``[windows, context]``, and again from the first if they do not last; the call that
    scores as it was trained, under autocast.
    """

    def call(**inputs: Any) -> Any:
        with torch.autocast(model.device.type, torch.bfloat16):
            return model(**inputs)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: demo.learning_rate_factor(step, steps))
    for _, part in zip(range(steps), cycle(windows.split(batch)), strict=False):
        call(input_ids=part, labels=part).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    model.eval()
    return call


@torch.no_grad()
def losses_of(model: Callable[..., Any], windows: Tensor) -> list[float]:
    """Mean loss of every window, int64 ``[windows, context]``. Two at a time: of one, Dynamo makes another graph."""
    losses = []
    for pair in windows.split(2):
        logits = model(input_ids=pair).logits[:, :-1].float()
        losses += F.cross_entropy(logits.transpose(1, 2), pair[:, 1:], reduction="none").mean(1).tolist()
    return losses


def loaded(given: argparse.Namespace) -> Any:
    model = load(given.model, given.device)
    model.config.use_cache = False
    return model


def start(given: argparse.Namespace, arm: Arm, training: Tensor | None) -> Callable[..., Any]:
    """What is scored: the compiled model, trained if there is something to train it on."""
    model = loaded(given)
    if training is None:
        return compiled(model, arm)
    return finetuned(compiled(model.float(), arm), training, given.finetune, given.learning_rate, given.batch)


def add_text(scores: evaluation.Evaluation, name: str, windows: Tensor, model: Callable[..., Any]) -> None:
    """Unless the scores have it of as many tokens."""
    known = f"{windows.numel()} tokens"
    if name not in scores.tasks or scores.tasks[name].documents != known:
        scores.tasks[name] = evaluation.TaskScores("text", known, {"nll": losses_of(model, windows)})


def check_against_lm_eval(
    model: Any, tokenizer: Any, task: evaluation.Task, documents: Sequence[Any]
) -> dict[str, Any]:
    """Scores of lm_eval's own model class and task loop beside ours: how many documents differ, and by how much the
    log-likelihoods do, in nats. In float32: lm_eval's class takes the softmax of BF16 logits in BF16.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    kept: list[tuple[float, bool]] = []

    def their_likelihoods(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        kept.extend((float(value), bool(greedy)) for value, greedy in theirs.loglikelihood(requests, disable_tqdm=True))
        return kept

    expected = evaluation.score_by_lm_eval(their_likelihoods, task, documents)
    ours = evaluation.LogLikelihoods(model, tokenizer)
    found = evaluation.score_here(ours, task, documents)
    values = ours([pair for document in documents for pair in document.pairs()])
    differing = {
        metric: sum(a != b for a, b in zip(found[metric], expected[metric], strict=True))
        for metric in task.metrics
        if metric != "nll"
    }
    return {
        "task": task.name,
        "documents": len(documents),
        "ours": {metric: sum(numbers) / len(numbers) for metric, numbers in found.items()},
        "lm_eval": {metric: sum(numbers) / len(numbers) for metric, numbers in expected.items()},
        "documents that differ": differing,
        "largest difference of a log-likelihood": max(abs(a - b) for (a, _), (b, _) in zip(values, kept, strict=True)),
    }


def rows(found: dict[str, evaluation.Evaluation]) -> list[dict[str, Any]]:
    """One per arm, task or text, and metric; differences are from BF16. A text's metric is ``nll`` per window."""
    table = []
    base = found.get(BASELINE)
    for name, scores in found.items():
        shared = set(scores.tasks) & set(base.tasks) if base else set()
        ours = evaluation.Evaluation({}, {key: task for key, task in scores.tasks.items() if key in shared})
        for row in evaluation.rows(ours, base):
            value, difference = row.values["score"], row.values["difference"]
            table.append(
                {
                    "arm": name,
                    "task": row.task,
                    "metric": row.metric,
                    "documents": row.documents,
                    "value": f"{value[0]:.5f}",
                    "error": f"{value[1]:.5f}",
                    "perplexity": f"{math.exp(value[0]):.3f}" if row.metric == "nll" else "",
                    "difference": f"{difference[0]:+.5f}",
                    "error of the difference": f"{difference[1]:.5f}",
                }
            )
    return table


def summary(table: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per arm, a column per task and metric."""
    columns = list(dict.fromkeys((row["task"], row["metric"]) for row in table))
    heads = (f"{task} {'perplexity' if metric == 'nll' else metric}" for task, metric in columns)
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
    for arm in dict.fromkeys(row["arm"] for row in table):
        cells = {(row["task"], row["metric"]): shown(row) for row in table if row["arm"] == arm}
        lines.append(f"| {arm} | {' | '.join(cells.get(column, '') for column in columns)} |")
    return "\n".join(lines)


def shown(row: dict[str, Any]) -> str:
    if row["perplexity"]:
        return row["perplexity"]
    own = f"{100 * float(row['value']):.1f}"
    if row["arm"] == BASELINE:
        return own
    return f"{own} ({100 * float(row['difference']):+.1f} ± {100 * float(row['error of the difference']):.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model, or a GGUF file")
    parser.add_argument("--text", nargs="+", default=[], metavar="NAME=FILE", help="texts, .xz or plain")
    parser.add_argument("--task", nargs="+", default=[], metavar="[TASK=]FILE", help="as of qcompile eval")
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON files; the CSV file is beside it")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--tokens", type=int, default=8192, help="of each text (default: 8192)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window (default: 1024)")
    parser.add_argument("--limit", type=int, default=200, help="documents of each task (default: 200)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no text or task later than this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS", help="train every arm so long before")
    parser.add_argument("--train", type=Path, metavar="FILE", help="what on, .xz or plain")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step of training (default: 8)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of training: peak (default: 1e-4)")
    parser.add_argument("--check", action="store_true", help="compare the first task with lm_eval's own model class")
    given = parser.parse_args(argv)
    if bool(given.finetune) != bool(given.train):
        parser.error("--finetune and --train go together")
    began = time.perf_counter()
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer = tokenizer_of(given.model)
        texts = {
            name: windows_of(Path(file), tokenizer, given.tokens, given.context).to(given.device)
            for name, file in (text.split("=", 1) for text in given.text)
        }
        training = None
        if given.train:
            needed = given.finetune * given.batch * given.context
            training = windows_of(given.train, tokenizer, needed, given.context).to(given.device)
        tasks = [evaluation.task_of(request) for request in given.task]
        documents = {name: evaluation.read(task, path, given.limit) for name, task, path in tasks}
    except (ValueError, OSError) as error:
        print(f"real_weights: {brief(error)}", file=sys.stderr)
        return 2
    if given.check:
        name, task, _ = tasks[0]
        report = {**environment(), **check_against_lm_eval(loaded(given).float(), tokenizer, task, documents[name])}
        given.out.with_name(f"{given.out.name}_check.json").write_text(f"{json.dumps(report, indent=1)}\n")
        print(report)
        return 0
    found: dict[str, evaluation.Evaluation] = {}
    for arm in given.arms:
        path = given.out / f"{''.join(c if c.isalnum() else '_' for c in arm)}.json"
        settings = {**asdict(ARMS[arm]), "model": given.model.name, "context": given.context}
        if training is not None:
            settings |= {key: getattr(given, key) for key in ("finetune", "batch", "learning_rate")}
            settings["train"] = given.train.name
        try:
            found[arm] = evaluation.resumed(path, settings)
            call = start(given, ARMS[arm], training)
            likelihoods = evaluation.LogLikelihoods(call, tokenizer, rows=16, device=given.device)
            work = {name: partial(add_text, found[arm], name, windows, call) for name, windows in texts.items()}
            for name, task, _ in tasks:
                work[name] = partial(
                    evaluation.add, found[arm], name, task, documents[name], likelihoods, evaluation.score_here
                )
            for name, step in work.items():
                if time.perf_counter() - began > given.seconds:
                    break
                started = time.perf_counter()
                step()
                path.write_text(found[arm].to_json() + "\n", encoding="utf-8")
                print(f"{arm:24} {name:16} {time.perf_counter() - started:6.1f} s", flush=True)
        except Exception as error:  # the others go on
            print(f"{arm}: {brief(error)}", file=sys.stderr)
        table = rows(found)
        if table:
            with given.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
                columns = environment()
                writer = csv.DictWriter(file, [*columns, *table[0]])
                writer.writeheader()
                writer.writerows({**columns, **row} for row in table)
    print(summary(rows(found)))
    done = [arm for arm, scores in found.items() if len(scores.tasks) == len(texts) + len(tasks)]
    return 0 if done == given.arms else 1


if __name__ == "__main__":
    sys.exit(main())
