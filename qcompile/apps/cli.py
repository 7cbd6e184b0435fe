"""``qcompile demo | explain | sensitivity | eval | bench``. A command imports torch when it runs, so that ``--help``
answers at once.

Exit status: 0 done, 2 something in the request cannot be used (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qcompile import __version__

__all__ = ["build_parser", "main"]

UNUSABLE = 2
INTERRUPTED = 130

#: What bad input raises while a request is being checked.
InputErrors = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. ``argv`` without the program's name; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    logging.getLogger("torchao").setLevel(
        logging.ERROR
    )  # transformers imports it where it is installed; it reports CUDA files
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qcompile",
        description='Train any PyTorch model in 4 bits: torch.compile(model, backend="qcompile_fp4").',
    )
    parser.add_argument("--version", action="version", version=f"qcompile {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_demo(commands)
    add_explain(commands)
    add_sensitivity(commands)
    add_eval(commands)
    add_bench(commands)
    return parser


def unusable(command: str, error: BaseException | str) -> int:
    """Say in one line why a request cannot be served."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    print(f"qcompile {command}: {text}", file=sys.stderr)
    return UNUSABLE


# --- demo ---------------------------------------------------------------------------------------------------

MODEL_FLAGS = {
    "batch": "sequences per step",
    "sequence": "bytes per sequence",
    "hidden": "width of the model",
    "layers": "decoder layers",
    "heads": "attention heads",
    "intermediate": "width of the feed-forward layers",
}
QUICK = {
    "steps": 10,
    "batch": 2,
    "sequence": 32,
    "hidden": 128,
    "layers": 1,
    "heads": 2,
    "intermediate": 128,
    "sample_bytes": 16,
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "each has a default that suits the device")
    for name, text in MODEL_FLAGS.items():
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)


def add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="pretrain a small Llama in BF16 and in 4 bits, side by side",
        description="Pretrain a small Llama from transformers on real text: BF16, the FP4 recipe and a "
        "direct cast to FP4, from the same seed, on the same batches. Prints what was quantized and the "
        "gap to BF16; writes loss curves, results and a sample of text.",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="train on the first 64 MiB of this file, plain or .xz (default: Shakespeare, included)",
    )
    parser.add_argument("--arms", default="bf16,fp4,direct", help="any of bf16,fp4,direct (default: all)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: a GPU if there is one)")
    parser.add_argument(
        "--out", type=Path, default=Path("qcompile-demo"), metavar="DIR", help="default: ./qcompile-demo"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run: 10 steps of a tiny model")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="peak of the cosine schedule")
    add_model_flags(parser)
    parser.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    try:
        from . import demo

        experiment = demo.prepare(demo_settings(arguments))
    except InputErrors as error:
        return unusable("demo", error)
    demo.run(experiment, make_console())
    return 0


def demo_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags as fields of ``DemoConfig``; ``--quick`` fills in what was not given."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    given = {name: value for name, value in given.items() if name not in ("run", "quick")}
    given["arms"] = tuple(name.strip() for name in arguments.arms.split(",") if name.strip())
    return {**(QUICK if arguments.quick else {}), **given}


def make_console() -> Any:
    """A rich console; where the output is no terminal, wide enough that no table is cut."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 180)


# --- explain ------------------------------------------------------------------------------------------------


def add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="what would be quantized in your model, how, and why the rest would not",
        description="Import FACTORY from MODULE and call it. It returns (model, inputs), (model, inputs, "
        "keyword inputs), or a model alone, whose inputs are then made from --input.",
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="for example my_package.models:build")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SHAPE",
        help="one random input, in order: 8x128 is float32, 8x128:bfloat16 another dtype, 8x128:int64 zeros",
    )
    add_backend_flags(parser)
    parser.add_argument("--roles", action="store_true", help="a line for each product and each of its gradients")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as a web page")
    parser.add_argument("--programs", type=Path, metavar="DIR", help="write the program after each pass")
    parser.set_defaults(run=run_explain)


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", default="qcompile_fp4")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="K=V",
        help="an entry of torch.compile's options: gradient=fp8, activation.outliers=None, skip=['layers.0']",
    )


def run_explain(arguments: argparse.Namespace) -> int:
    try:
        options = parse_options(arguments.option)
        model, args, kwargs = load_model(arguments.factory, arguments.input)
        report = explained(model, args, kwargs, arguments.backend, options)
        if arguments.json:
            arguments.json.write_text(report.to_json() + "\n", encoding="utf-8")
        if arguments.html:
            arguments.html.write_text(report.to_html(), encoding="utf-8")
        if arguments.programs:
            arguments.programs.mkdir(parents=True, exist_ok=True)
            for name, program in report.programs.items():
                file_name = re.sub(r"[^\w.-]+", "_", name) + ".txt"
                (arguments.programs / file_name).write_text(program, encoding="utf-8")
    except InputErrors as error:
        return unusable("explain", error)
    make_console().print(report.table(roles=True) if arguments.roles else report)
    return 0


def explained(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], backend: str, options: dict[str, Any]) -> Any:
    """The report. Raises ``ValueError`` with the reason where the model cannot be run on these inputs, or not with
    these options.
    """
    from qcompile.report import explain

    try:
        return explain(model, *args, backend=backend, options=options, **kwargs)
    except InputErrors:
        raise
    except (RuntimeError, TypeError, IndexError, KeyError) as error:
        # Dynamo quotes the error it met after saying what it was doing.
        quoted = re.search(r"got (\w+Error\(.*?\))$|^(\w+Error: .*?)$", str(error), re.MULTILINE)
        reason = (quoted[1] or quoted[2]) if quoted else f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        shapes = ", ".join("×".join(map(str, a.shape)) for a in args if hasattr(a, "shape"))
        msg = f"the model cannot be compiled and run on inputs of shape {shapes}: {reason}"
        raise ValueError(msg) from error


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """``["gradient=fp8", "weight.estimator=ste"]`` → ``{"gradient": "fp8", "weight": {"estimator": "ste"}}``.

    Values are Python literals where they parse as such, else text. Raises ``ValueError`` for an item that is
    not ``key=value``.
    """
    options: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not key or not equals:
            msg = f"--option {item!r} is not key=value"
            raise ValueError(msg)
        *path, last = key.split(".")
        target = options
        for part in path:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                msg = f"--option {item!r}: {part!r} was given as a whole before"
                raise ValueError(msg)
        try:
            target[last] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            target[last] = value
    return options


def load_model(spec: str, inputs: Sequence[str]) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """Call the factory that ``MODULE:FACTORY`` names: the model, its positional and its keyword inputs.

    Raises ``ValueError`` or ``ImportError`` if there is no such factory or the inputs are missing.
    """
    made = call_factory(spec)
    model, *given = made if isinstance(made, tuple) else (made,)
    args = given[0] if given else ()
    args = tuple(args) if isinstance(args, tuple | list) else (args,)
    kwargs = given[1] if len(given) > 1 else {}
    if inputs:
        args = tuple(make_input(text) for text in inputs)
    if not args and not kwargs:
        msg = f"{spec} returned no inputs; return (model, inputs) or give --input SHAPE"
        raise ValueError(msg)
    return model, args, kwargs


def call_factory(spec: str) -> Any:
    """What the function that ``MODULE:FACTORY`` names returns. Raises as :func:`load_model` does."""
    module_name, colon, factory_name = spec.partition(":")
    if not module_name or not colon or not factory_name:
        msg = f"{spec!r} is not MODULE:FACTORY, for example my_package.models:build"
        raise ValueError(msg)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = importlib.import_module(module_name)
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        msg = f"module {module_name!r} has no function {factory_name!r}"
        raise ValueError(msg)
    return factory()


def make_input(text: str) -> Any:
    """``"8x128"``, ``"8x128:bfloat16"``: normal values. Integer dtypes: zeros, valid indices.

    Raises ``ValueError`` for anything else.
    """
    import torch

    match = re.fullmatch(r"(\d+(?:[x,×]\d+)*)(?::(\w+))?", text)
    dtype = getattr(torch, match[2] or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        msg = f"--input {text!r} is not SHAPE or SHAPE:DTYPE, for example 8x128 or 8x128:int64"
        raise ValueError(msg)
    shape = [int(n) for n in re.split("[x,×]", match[1])]
    try:
        return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
    except RuntimeError:
        msg = f"--input {text!r} is more than fits into memory"
        raise ValueError(msg) from None


# --- sensitivity --------------------------------------------------------------------------------------------


def add_sensitivity(commands: Any) -> None:
    parser = commands.add_parser(
        "sensitivity",
        help="which layers to leave in high precision, from one backward pass per batch",
        description="Import FACTORY from MODULE and call it. It returns (model, batches), or with --text a model of "
        "transformers and its tokenizer: (model, tokenizer). Prints scores, the frontier and the rules for options.",
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="for example my_package.models:build")
    parser.add_argument("--text", type=Path, metavar="FILE", help="make the batches of this file")
    parser.add_argument("--batches", type=int, default=8, metavar="N", help="of --text (default 8)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="sequences in each (default 4)")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="in each sequence (default 512)")
    parser.add_argument("--budget", type=float, default=0.25, metavar="SHARE", help="of the savings to give up (0.25)")
    parser.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME=OPERAND",
        help="what a layer may be: 8='int8 row', or a number of bits (default: the recipe)",
    )
    parser.add_argument("--cost", default="operations", help="operations, weights, saved or time (default: operations)")
    parser.add_argument("--gradients", action="store_true", help="compare the backward products too")
    add_backend_flags(parser)
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep scores here after every batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write choice, rules and scores")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the frontier")
    parser.set_defaults(run=run_sensitivity)


def run_sensitivity(arguments: argparse.Namespace) -> int:
    try:
        from qcompile.search import sensitivity

        made = call_factory(arguments.factory)
        if not isinstance(made, tuple) or len(made) != 2:
            what = "(model, tokenizer)" if arguments.text else "(model, batches)"
            msg = f"{arguments.factory} returned {type(made).__name__}; it is to return {what}"
            raise ValueError(msg)
        model, given = made
        found = sensitivity(
            model,
            text_batches(given, arguments) if arguments.text else given,
            budget=arguments.budget,
            candidates=parse_candidates(arguments.candidate),
            backend=arguments.backend,
            options=parse_options(arguments.option),
            cost=arguments.cost,
            gradients=arguments.gradients,
            resume=arguments.resume,
            progress=sys.stderr.isatty(),
        )
        if arguments.json:
            arguments.json.write_text(found.to_json() + "\n", encoding="utf-8")
        if arguments.plot:
            found.plot(arguments.plot)
    except InputErrors as error:
        return unusable("sensitivity", error)
    make_console().print(found)
    print(f"rules: {found.rules}")
    return 0


def parse_candidates(items: Sequence[str]) -> dict[str, Any] | None:
    """``["8=int8 row", "four=4"]`` → ``{"8": "int8 row", "four": 4}``; ``None`` for none."""
    found: dict[str, Any] = {}
    for item in items:
        name, equals, operand = item.partition("=")
        if not name or not equals or not operand:
            msg = f"--candidate {item!r} is not NAME=OPERAND, for example 8='int8 row'"
            raise ValueError(msg)
        found[name] = int(operand) if operand.isdigit() else operand
    return found or None


def text_batches(tokenizer: Callable[[str], Any], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The beginning of a text as ``{"input_ids", "labels"}``, each ``[sequences, tokens]``.

    Raises ``ValueError`` for a text that is too short, ``OSError`` for one that cannot be read.
    """
    import torch

    count, batch, tokens = arguments.batches, arguments.batch, arguments.tokens
    if min(count, batch, tokens - 1) < 1:
        msg = f"--batches {count}, --batch {batch} and --tokens {tokens} are to be positive, tokens at least 2"
        raise ValueError(msg)
    needed = count * batch * tokens
    with arguments.text.open(encoding="utf-8", errors="replace") as file:
        text = file.read(16 * needed)  # no tokenizer makes fewer tokens of English
    ids = tokenizer(text)["input_ids"][:needed]
    if len(ids) < needed:
        msg = f"{arguments.text} has {len(ids)} tokens, fewer than the {needed} of {count} × {batch} × {tokens}"
        raise ValueError(msg)
    return [{"input_ids": part, "labels": part} for part in torch.tensor(ids).reshape(count, batch, tokens)]


# --- eval ---------------------------------------------------------------------------------------------------


def add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="zero-shot scores of a compiled model, and paired differences between two recipes",
        description="Import FACTORY from MODULE and call it. It returns (model, tokenizer). Scores the model, compiled "
        "with --backend and --option, on local JSONL files with the prompts of lm_eval; with --against, prints paired "
        "differences from an earlier result.",
    )
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="for example my_package.models:build")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="[TASK=]FILE",
        help="arc_easy.jsonl, boolq=dev.jsonl; tasks are arc_easy, arc_challenge, boolq, piqa, sciq, openbookqa, "
        "hellaswag, logiqa, lambada_openai, and multiple_choice and cloze for files of your own",
    )
    add_backend_flags(parser)
    parser.add_argument("--limit", type=int, metavar="N", help="the first N documents of every file")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences in a batch (default 8)")
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="most in a sequence (default: what the model's config says, or 2048)"
    )
    parser.add_argument(
        "--scorer", default="lm_eval", choices=["lm_eval", "own"], help="own: the same numbers without lm_eval"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write scores after every task; those that it has are not run again"
    )
    parser.add_argument("--against", type=Path, metavar="FILE", help="what --json wrote for another recipe")
    parser.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> int:
    try:
        from qcompile.schedule import refused

        from . import evaluation

        for flag in ("limit", "tokens", "batch"):
            value = getattr(arguments, flag)
            if value is not None and value < 1:
                msg = f"--{flag} {value} is to be positive"
                raise ValueError(msg)
        other = evaluation.Evaluation.from_file(arguments.against) if arguments.against else None
        tasks = [evaluation.task_of(request) for request in arguments.files]
        documents = {name: evaluation.read(task, path, arguments.limit) for name, task, path in tasks}
        if len(documents) < len(tasks):
            msg = f"two of {', '.join(arguments.files)} have the same name; a name stands for one file"
            raise ValueError(msg)
        options = parse_options(arguments.option)
        if why := refused(arguments.backend, options):
            raise ValueError(why)
        if arguments.json and not arguments.json.parent.is_dir():
            msg = f"--json {arguments.json}: there is no folder {arguments.json.parent}"
            raise ValueError(msg)
        settings = {
            key: getattr(arguments, key) for key in ("factory", "backend", "limit", "tokens", "batch", "scorer")
        }
        found = evaluation.resumed(arguments.json, {**settings, "options": options})
        if other is not None:
            evaluation.check_comparable(found, {name: (task, documents[name]) for name, task, _ in tasks}, other)
        likelihoods = compiled_likelihoods(arguments, options)
        for name, task, _ in tasks:
            evaluation.add(found, name, task, documents[name], likelihoods, evaluation.SCORERS[arguments.scorer])
            if arguments.json:
                arguments.json.write_text(found.to_json() + "\n", encoding="utf-8")
    except InputErrors as error:
        return unusable("eval", error)
    make_console().print(evaluation.table(found, other))
    return 0


def compiled_likelihoods(arguments: argparse.Namespace, options: dict[str, Any]) -> Any:
    """Raises ``ValueError`` for a factory that returns something else than a model and its tokenizer."""
    import torch

    from .evaluation import LogLikelihoods

    made = call_factory(arguments.factory)
    if not isinstance(made, tuple) or len(made) != 2:
        msg = f"{arguments.factory} returned {type(made).__name__}; it is to return (model, tokenizer)"
        raise ValueError(msg)
    model, tokenizer = made
    compiled = torch.compile(model.eval(), backend=arguments.backend, options=options or None)
    device = next((parameter.device for parameter in model.parameters()), "cpu")
    return LogLikelihoods(
        compiled,
        tokenizer,
        rows=arguments.batch,
        most_tokens=arguments.tokens or getattr(getattr(model, "config", None), "max_position_embeddings", 2048),
        device=device,
        progress=show_progress if sys.stderr.isatty() else lambda done, total: None,
    )


def show_progress(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


# --- bench --------------------------------------------------------------------------------------------------


def add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time a training step and its compilation, backend by backend",
        description="One training step of the demo's Llama under Inductor and every qcompile backend: median "
        "step time, compile time with an empty and with a full cache (each in a fresh process), saved bytes, "
        "cache hits.",
    )
    parser.add_argument("--backends", metavar="A,B", help="default: inductor and every qcompile backend")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="steps to take the median of (default 20)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: a GPU if there is one)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV")
    add_model_flags(parser)
    parser.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> int:
    try:
        from . import bench

        plan = bench.prepare(
            backends=arguments.backends.split(",") if arguments.backends else None,
            repeats=arguments.repeats,
            device=arguments.device,
            sizes={name: getattr(arguments, name) for name in MODEL_FLAGS},
            csv_file=arguments.csv,
        )
    except InputErrors as error:
        return unusable("bench", error)
    bench.run(plan, make_console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
