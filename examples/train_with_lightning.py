"""Train a small Llama in 4 bits with Lightning.

    python examples/train_with_lightning.py [FOLDER]

The model inside the LightningModule is compiled, so that `training_step` may log: Dynamo of torch 2.13 cannot trace
`self.log`, with whatever backend. Compiled in place, it keeps the names of its parameters in checkpoints.
"""

import sys
from pathlib import Path

import lightning
import torch
from torch.utils.data import DataLoader

import qcompile
from qcompile.apps import demo

STEPS = 60
SIZES = {"hidden": 64, "layers": 1, "heads": 2, "intermediate": 192, "sequence": 64, "batch": 8}


class LanguageModel(lightning.LightningModule):
    def __init__(self, model: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["model"])
        self.model = model
        self.losses: list[float] = []

    def configure_model(self) -> None:
        self.model.compile(backend="qcompile_fp4")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.hparams.learning_rate)

    def training_step(self, batch: dict[str, torch.Tensor], number: int) -> torch.Tensor:
        if number == 0:
            print(qcompile.explain(self.model, **batch).summary())
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self.log("validation_loss", self.model(**batch).loss, prog_bar=True)


def main(folder: Path) -> None:
    experiment = demo.prepare({**SIZES, "steps": STEPS, "out": folder})
    config = experiment.config

    def loader(text: torch.Tensor, count: int) -> DataLoader:
        windows = [{"input_ids": window, "labels": window} for window in text.split(config.sequence)[:count]]
        return DataLoader(windows, config.batch)

    train, validation = loader(experiment.train, STEPS * config.batch), loader(experiment.validation, 64)

    module = LanguageModel(demo.build_model(config, experiment.device), config.learning_rate)
    trainer = lightning.Trainer(
        max_epochs=1,
        precision="bf16-mixed",
        val_check_interval=20,
        default_root_dir=folder,
        logger=False,
        devices=1,
    )
    trainer.fit(module, train, validation)
    trained = trainer.callback_metrics["validation_loss"]

    path = trainer.checkpoint_callback.best_model_path
    again = LanguageModel.load_from_checkpoint(path, model=demo.build_model(config, experiment.device))
    [reloaded] = trainer.validate(again, validation)

    print(f"loss: {module.losses[0]:.4f} at first, {module.losses[-1]:.4f} at last")
    print(f"validation loss: {trained:.4f} as trained, {reloaded['validation_loss']:.4f} as saved and loaded again")


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ["qcompile-lightning"]))
