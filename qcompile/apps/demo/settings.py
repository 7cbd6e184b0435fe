"""What the demo trains and on what: arms, sizes by device, the text, and all that a user can get wrong."""

from __future__ import annotations

import lzma
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ARMS",
    "PRESETS",
    "Arm",
    "DemoConfig",
    "Experiment",
    "check_writable",
    "configure",
    "prepare",
    "read_text",
    "require",
]


@dataclass(frozen=True)
class Arm:
    """One way to compile the model: ``torch.compile(model, backend=backend, options=options)``."""

    label: str
    backend: str
    options: dict[str, Any] | None
    color: str


ARMS: dict[str, Arm] = {
    "bf16": Arm("BF16", "inductor", None, "#333333"),
    "fp4": Arm("FP4 recipe (DGE + OCC)", "qcompile_fp4", None, "#1f77b4"),
    # What the recipe is measured against (arXiv 2501.17116 §4): one scale per tensor, straight-through, no OCC.
    "direct": Arm(
        "FP4 direct cast, tensor-wise",
        "qcompile_fp4",
        {
            "activation": {"granularity": "tensor", "outliers": None},
            "weight": {"granularity": "tensor", "estimator": "ste"},
        },
        "#d62728",
    ),
}


@dataclass(frozen=True)
class DemoConfig:
    """Settings that every arm shares. The fields without a default come from the device's :data:`PRESETS`."""

    device: str
    steps: int
    batch: int
    sequence: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    learning_rate: float
    sample_bytes: int
    arms: tuple[str, ...] = tuple(ARMS)
    text: Path | None = None
    out: Path = Path("qcompile-demo")
    seed: int = 0


#: Bytes that are read of a text. The largest run of the demo sees fewer; more would only fill the memory.
MOST_TEXT = 64 * 2**20

#: Defaults by device. On 2 CPU cores three arms take less than 4 minutes, compilation included.
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {
        "steps": 300,
        "batch": 16,
        "sequence": 128,
        "hidden": 128,
        "layers": 2,
        "heads": 4,
        "intermediate": 384,
        "learning_rate": 2e-3,
        "sample_bytes": 240,
    },
    "cuda": {
        "steps": 400,
        "batch": 64,
        "sequence": 256,
        "hidden": 512,
        "layers": 6,
        "heads": 8,
        "intermediate": 1536,
        "learning_rate": 2e-3,
        "sample_bytes": 480,
    },
}


@dataclass(frozen=True)
class Experiment:
    """A checked configuration with its data: int64 byte values ``[n]`` on the CPU."""

    config: DemoConfig
    device: torch.device
    train: Tensor
    validation: Tensor


def prepare(given: Mapping[str, Any]) -> Experiment:
    """Check the settings and read the text, before anything is trained or written over.

    ``given`` holds fields of :class:`DemoConfig`; ``None`` or left out means the default.

    Raises ``ValueError`` for a setting or a text that cannot be used, ``OSError`` for a file or folder,
    ``ImportError`` naming the pip command for a missing package.
    """
    require("transformers", "matplotlib")
    config = configure(given)
    text = read_text(config.text)
    needed = 10 * (config.sequence + 1)
    if len(text) < needed:
        name = config.text or "the built-in text"
        msg = f"{name} has {len(text)} bytes; windows of {config.sequence} bytes need at least {needed}"
        raise ValueError(msg)
    check_writable(config.out)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    held_out = len(data) // 10
    return Experiment(config, torch.device(config.device), data[:-held_out], data[-held_out:])


def configure(given: Mapping[str, Any]) -> DemoConfig:
    """Fill in the defaults of the device. Raises ``ValueError`` for an unknown arm or a size no Llama has."""
    device = pick_device(given.get("device") or "auto")
    chosen = {name: value for name, value in given.items() if value is not None}
    config = DemoConfig(**{**PRESETS[device], **chosen, "device": device})
    for name in config.arms:
        if name not in ARMS:
            msg = f"unknown arm {name!r}; known: {', '.join(ARMS)}"
            raise ValueError(msg)
    if not config.arms or len(set(config.arms)) < len(config.arms):
        msg = f"arms must be one or more different names of {', '.join(ARMS)}"
        raise ValueError(msg)
    for name in PRESETS[device]:
        if not 0 < getattr(config, name) < math.inf:  # false for NaN
            msg = f"{name.replace('_', ' ')} must be positive and finite, got {getattr(config, name)}"
            raise ValueError(msg)
    if config.hidden % (2 * config.heads):
        msg = f"hidden size {config.hidden} must be a multiple of twice the {config.heads} heads (rotary pairs)"
        raise ValueError(msg)
    return config


def require(*packages: str) -> None:
    """Raise ``ImportError`` unless every package of the ``demo`` extra can be imported."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        msg = f"the demo needs {' and '.join(missing)}: pip install 'qcompile[demo]'"
        raise ImportError(msg)


def pick_device(name: str) -> str:
    """``"auto"`` takes a GPU if there is one. Raises ``ValueError`` for a device this torch cannot use."""
    cuda = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if name not in PRESETS:
        msg = f"unknown device {name!r}; choose auto, {' or '.join(PRESETS)}"
        raise ValueError(msg)
    if name == "cuda" and not cuda:
        msg = "device 'cuda' is not available: this torch sees no GPU"
        raise ValueError(msg)
    return name


def read_text(path: Path | None) -> bytes:
    """The first MOST_TEXT bytes of the user's file, plain or compressed (.xz), or the works of Shakespeare shipped with
    the package (public domain). Raises ``ValueError`` for a damaged .xz, ``OSError`` for what cannot be read.
    """
    if path is None:
        return lzma.decompress(files("qcompile.data").joinpath("tinyshakespeare.txt.xz").read_bytes())
    with path.open("rb") as file:
        if path.suffix != ".xz":
            return file.read(MOST_TEXT)
        try:
            return lzma.open(file).read(MOST_TEXT)
        except (lzma.LZMAError, EOFError) as error:
            msg = f"{path} is no complete .xz file: {error}"
            raise ValueError(msg) from None


def check_writable(folder: Path) -> None:
    """Create ``folder`` and try a file in it. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
