"""Train a small Llama in 4 bits with the Trainer of Hugging Face's transformers.

    python examples/train_with_trainer.py [FOLDER]

Trainer knows no backends but those that accelerate lists: it refuses `torch_compile_backend="qcompile_fp4"`. A model
that was compiled in place before needs no such argument, and keeps its class and the names of its parameters.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import qcompile
from qcompile.apps import demo

STEPS = 60
SIZES = {"hidden": 64, "layers": 1, "heads": 2, "intermediate": 192, "sequence": 64, "batch": 8}


def main(folder: Path) -> None:
    experiment = demo.prepare({**SIZES, "steps": STEPS, "out": folder})
    config = experiment.config

    def windows(text: torch.Tensor, count: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": window, "labels": window} for window in text.split(config.sequence)[:count]]

    train, validation = windows(experiment.train, STEPS * config.batch), windows(experiment.validation, 64)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch,
        per_device_eval_batch_size=config.batch,
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate,
        bf16=True,
        use_cpu=config.device == "cpu",
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        logging_steps=20,
        logging_first_step=True,
        report_to="none",
    )

    model = demo.build_model(config, experiment.device)
    model.compile(backend="qcompile_fp4")
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=validation)
    trainer.train()
    trainer.save_model()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    trained = trainer.evaluate()["eval_loss"]

    again = LlamaForCausalLM.from_pretrained(folder)
    again.compile(backend="qcompile_fp4")
    reloaded = Trainer(again, arguments, eval_dataset=validation).evaluate()["eval_loss"]

    print(qcompile.explain(model, **next(iter(trainer.get_train_dataloader()))).summary())
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    print(f"validation loss: {trained:.4f} as trained, {reloaded:.4f} as saved and loaded again")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["qcompile-trainer"]))
