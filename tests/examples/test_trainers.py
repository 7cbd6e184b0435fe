"""Training with transformers' Trainer, accelerate and Lightning: the commands of docs/training.md run as written, train
in 4 bits, and leave checkpoints of the plain model.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qcompile.apps import demo

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "examples").is_dir():
    pytest.skip("tests the source tree", allow_module_level=True)

PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## Trainer, accelerate, Lightning\n(.*?)^## ", PAGE, re.M | re.S)[1]
COMMANDS = re.search(r"```bash\n(.*?)```", SECTION, re.S)[1].splitlines()
SNIPPET = re.search(r"```python\n(.*?)```", SECTION, re.S)[1].splitlines()
RESOLUTION = 1e-4  # of the losses in the output


def lightning_state(path: Path) -> dict[str, Tensor]:
    """The parameters of the module's only member, under the names they have there."""
    saved = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("model."): value for name, value in saved.items()}


#: Every checkpoint of a run, and how to read it.
CHECKPOINTS: dict[str, tuple[list[str], Callable[[Path], dict[str, Tensor]]]] = {
    "trainer": (["model.safetensors", *(f"checkpoint-{step}/model.safetensors" for step in (20, 40, 60))], load_file),
    "accelerate": (["model.safetensors", "state/model.safetensors"], load_file),
    "lightning": (["checkpoints/epoch=0-step=60.ckpt"], lightning_state),
}


def library_of(command: str) -> str:
    return re.fullmatch(r"python examples/train_with_(\w+)\.py", command)[1]


def sizes_of(script: Path) -> dict[str, int]:
    """The model and batch that a script trains."""
    return ast.literal_eval(re.search(r"^SIZES = (.*)$", script.read_text(), re.M)[1])


@functools.cache
@torch.no_grad()  # a forward alone compiles in seconds
def hand_written(script: Path, backend: str) -> float:
    """The loss of the first batch without any library, as every script should find it."""
    config = demo.configure({**sizes_of(script), "device": "cpu"})
    model = demo.build_model(config, torch.device("cpu"))
    model.compile(backend=backend)
    windows = torch.frombuffer(bytearray(demo.read_text(None)), dtype=torch.uint8).long().split(config.sequence)
    batch = torch.stack(windows[: config.batch])
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=batch, labels=batch).loss.item()


def test_the_page_runs_every_example_of_its_kind():
    scripts = sorted(path.stem for path in (ROOT / "examples").glob("train_with_*.py"))
    assert sorted(f"train_with_{library_of(command)}" for command in COMMANDS) == scripts


def test_what_the_page_shows_is_what_the_examples_do():
    code = [line for line in SNIPPET if line and not line.startswith("#")]
    examples = {line.strip() for path in (ROOT / "examples").glob("train_with_*.py") for line in path.open()}
    assert [line for line in code if line.strip() not in examples] == []


def test_accelerate_still_refuses_backends_that_it_does_not_list():
    """Once it takes any name, the page and the examples have a shorter way to show."""
    from accelerate.utils import TorchDynamoPlugin

    with pytest.raises(ValueError, match="not a valid DynamoBackend"):
        TorchDynamoPlugin(backend="qcompile_fp4")


@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow if "with_trainer" in command else pytest.mark.nightly)
        for command in COMMANDS
    ],
)
def test_an_example_trains_in_four_bits_and_its_checkpoints_are_the_plain_models(command, tmp_path):
    library = library_of(command)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "QCOMPILE_LOGS": "info",
    }
    run = subprocess.run(
        command.split(), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]

    # One graph to train, one to evaluate as often as one likes, one to evaluate another model, one for the report.
    compiled = re.findall(r"qcompile_fp4: (\d+) of (\d+) GEMM sites quantized \(", run.stderr)
    assert compiled == [("7", "9")] * 4
    assert "qcompile_fp4: 7 of 9 GEMM sites quantized in 1 graph(s); " in run.stdout

    [[first, last]] = re.findall(r"^loss: ([\d.]+) at first, ([\d.]+) at last$", run.stdout, re.M)
    [[trained, reloaded]] = re.findall(r"^validation loss: ([\d.]+) as trained, ([\d.]+) as saved", run.stdout, re.M)
    script = ROOT / command.split()[1]
    assert abs(float(first) - hand_written(script, "qcompile_fp4")) <= RESOLUTION
    assert abs(float(first) - hand_written(script, "eager")) > 20 * RESOLUTION  # not by chance, and not unquantized
    assert float(last) < float(first) - 2
    assert abs(float(trained) - float(reloaded)) <= RESOLUTION

    plain = demo.build_model(demo.configure({**sizes_of(script), "device": "cpu"}), torch.device("cpu"))
    shapes = {name: (value.shape, value.dtype) for name, value in plain.state_dict().items()}
    names, load = CHECKPOINTS[library]
    for name in names:
        state = load(tmp_path / f"qcompile-{library}" / name)
        assert {name: (value.shape, value.dtype) for name, value in state.items()} == shapes
        plain.load_state_dict(state, strict=True)
