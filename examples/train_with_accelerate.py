"""Train a small Llama in 4 bits with Hugging Face's accelerate: mixed precision and gradient accumulation.

    python examples/train_with_accelerate.py [FOLDER]

accelerate's `TorchDynamoPlugin` takes the backends it lists and no other. A model that was compiled in place before
`prepare` needs no plugin, and keeps its class and the names of its parameters.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import load_checkpoint_in_model
from torch.utils.data import DataLoader

import qcompile
from qcompile.apps import demo

STEPS, ACCUMULATE = 60, 2
SIZES = {"hidden": 64, "layers": 1, "heads": 2, "intermediate": 192, "sequence": 64, "batch": 8}


def main(folder: Path) -> None:
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATE)
    experiment = demo.prepare({**SIZES, "steps": STEPS, "out": folder})
    config = experiment.config

    def loader(text: torch.Tensor, count: int) -> DataLoader:
        windows = [{"input_ids": window, "labels": window} for window in text.split(config.sequence)[:count]]
        return DataLoader(windows, config.batch)

    train = loader(experiment.train, STEPS * ACCUMULATE * config.batch)
    validation = loader(experiment.validation, 64)

    model = demo.build_model(config, experiment.device)
    model.compile(backend="qcompile_fp4")
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    model, optimizer, train, validation = accelerator.prepare(model, optimizer, train, validation)

    @torch.no_grad()
    def validate(model: torch.nn.Module) -> float:
        model.eval()
        losses = [model(**batch).loss for batch in validation]
        model.train()
        return accelerator.gather(torch.stack(losses)).mean().item()

    losses = []
    for number, batch in enumerate(train):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if number % 40 == 39:
            print(f"batch {number + 1}: loss {losses[-1]:.4f}, validation loss {validate(model):.4f}")
            accelerator.save_state(folder / "state")  # to resume from, with `accelerator.load_state`
    accelerator.save_model(model, folder)
    trained = validate(model)

    again = demo.build_model(config, experiment.device)
    load_checkpoint_in_model(again, folder)
    again.compile(backend="qcompile_fp4")
    reloaded = validate(accelerator.prepare(again))

    print(qcompile.explain(model, **batch).summary())
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")
    print(f"validation loss: {trained:.4f} as trained, {reloaded:.4f} as saved and loaded again")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["qcompile-accelerate"]))
