"""``qcompile demo``: a small Llama pretrained in BF16 and in 4 bits, same seed, same batches.

The model is transformers' own ``LlamaForCausalLM``, untouched; an *arm* differs from the others in one line,
its ``torch.compile(model, backend=..., options=...)``. Text is read as bytes, so there is no tokenizer and
nothing to download.

Precision follows mixed-precision pretraining: FP32 parameters, which are the master weights of a plain AdamW,
and BF16 matrix products through ``torch.autocast``. The 4-bit arms quantize what autocast
hands to each product.
"""

from __future__ import annotations

import torch
from rich.console import Console
from torch import nn

from qcompile.report import Report, explain

from .model import batches, build_model, learning_rate_factor, loss_of, validation_batches
from .results import final_line, plot, replace_file, smoothed, summary_rows, summary_table, write_results
from .settings import (
    ARMS,
    PRESETS,
    Arm,
    DemoConfig,
    Experiment,
    check_writable,
    configure,
    prepare,
    read_text,
    require,
)
from .training import ArmProgress, ArmResult, compile_arm, sample, train_arm, validate

__all__ = [
    "ARMS",
    "PRESETS",
    "Arm",
    "ArmResult",
    "DemoConfig",
    "Experiment",
    "batches",
    "build_model",
    "check_writable",
    "configure",
    "learning_rate_factor",
    "loss_of",
    "prepare",
    "read_text",
    "require",
    "run",
    "smoothed",
    "summary_rows",
    "validate",
    "validation_batches",
]


def explain_arm(arm: str, model: nn.Module, experiment: Experiment) -> Report:
    """The report of one 4-bit arm, under the same autocast as its training."""
    inputs, _ = next(batches(experiment))
    torch.compiler.reset()
    with torch.autocast(experiment.device.type, torch.bfloat16):
        return explain(model, input_ids=inputs, backend=ARMS[arm].backend, options=ARMS[arm].options)


def run(experiment: Experiment, console: Console) -> list[ArmResult]:
    """Train every arm, print and write the results; a finished arm is on disk before the next one starts."""
    config = experiment.config
    results: list[ArmResult] = []
    shown = next((arm for arm in ("fp4", "direct") if arm in config.arms), None)
    text = report = None
    progress = ArmProgress(console, config.steps)
    with progress.bar:
        for arm in config.arms:
            progress.start(arm)
            model = build_model(config, experiment.device)
            if arm == shown:  # before training: other shapes seen first would make the graph's batch symbolic
                report = explain_arm(arm, model, experiment)
                replace_file(config.out / "explain.html", report.to_html())
            compiled = compile_arm(arm, model)
            results.append(train_arm(arm, compiled, experiment, progress))
            write_results(experiment, results)
            if arm == shown:
                text = sample(compiled, experiment)
                replace_file(config.out / "sample.txt", text)
    plot(experiment, results, config.out / "loss.png")
    if report is not None:
        console.print(report.table(compact=True))
    console.print(summary_table(results))
    if text is not None:
        console.rule(f"written by the 4-bit model ({ARMS[shown or ''].label})", align="left")
        console.print(text, markup=False, highlight=False)
        console.rule()
    console.print(final_line(results), markup=False, highlight=False)
    console.print(
        f"Written to {config.out}/: {', '.join(sorted(p.name for p in config.out.iterdir()))}",
        highlight=False,
    )
    return results
