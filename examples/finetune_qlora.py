"""Fine-tune a language model on a text: adapters over NF4 weights, ours and bitsandbytes', and over BF16 ones.

    python examples/finetune_qlora.py                     # a Llama of 0.3 million weights on Shakespeare: seconds
    python examples/finetune_qlora.py --model path/to/model --text docs.txt.xz --steps 500 --seeds 2

A model is a folder of transformers' or a GGUF file. Loss is validated on the last tenth of the text. Writes losses and
memory of every run to ``finetune_qlora.json`` and plots them. Needs ``pip install qcompile[examples]``.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import peft
import torch
import transformers
from local_model import NF4, SMALL, folder_of
from rich.console import Console
from rich.table import Table

import qcompile
from qcompile.stored import bytes_of

SHAKESPEARE = Path(qcompile.__file__).parent / "data" / "tinyshakespeare.txt.xz"
BITSANDBYTES = {
    "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}  # fmt: skip


class Arm(NamedTuple):
    """How weights are stored by ``pack_``, by bitsandbytes instead, and what compiles the layers ("": nothing)."""

    spec: str
    bitsandbytes: bool
    backend: str


ARMS = {
    "BF16": Arm("", False, "inductor"),
    "bitsandbytes NF4": Arm("", True, ""),
    "NF4": Arm(NF4, False, "qcompile_stored"),
    "NF4, LoftQ": Arm(NF4, False, "qcompile_stored"),
    "INT4, float zeros": Arm("uint4 block32; zeros", False, "qcompile_stored"),
}


def adapted(name: str, folder: Path, device: str, seed: int) -> Any:
    """The model with weights as the arm stores them and adapters of rank 16 on all linear layers, compiled."""
    arm = ARMS[name]
    theirs = transformers.BitsAndBytesConfig(**BITSANDBYTES) if arm.bitsandbytes else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=theirs, device_map=device
    )
    loftq = name.endswith("LoftQ")
    if arm.spec and not loftq:
        qcompile.pack_(model, arm.spec)
    torch.manual_seed(seed)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if loftq:
        qcompile.loftq_(model, arm.spec, iters=1)
    torch.compiler.reset()
    if arm.backend:  # one compilation serves all decoder layers
        for layer in model.get_base_model().model.layers:
            layer.compile(backend=arm.backend, dynamic=False)
    return model.train()


def run(name: str, folder: Path, tokens: torch.Tensor, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """Train the adapters; the seed decides their first numbers and the order of the text."""
    model = adapted(name, folder, given.device, seed)
    cut = len(tokens) * 9 // 10
    train, held_out = tokens[:cut], tokens[cut:]
    last = len(held_out) - given.context
    windows = [held_out[start : start + given.context] for start in torch.linspace(0, last, given.validate).long()]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=given.rate, betas=(0.9, 0.99), weight_decay=0.0)
    warm_up = min(1.0, max(0.1, 2 / given.steps))  # of one step or more, or the schedule divides by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.rate, total_steps=given.steps, pct_start=warm_up)
    generator = torch.Generator().manual_seed(seed)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(given.device, torch.bfloat16):
            return model(input_ids=ids.to(given.device), labels=ids.to(given.device), use_cache=False).loss

    @torch.no_grad()
    def validated() -> float:
        return mean(
            loss_of(torch.stack(windows[i : i + given.batch])).item() for i in range(0, len(windows), given.batch)
        )

    before, losses, times = validated(), [], []
    if given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(given.steps):
        begun = time.perf_counter()
        starts = torch.randint(len(train) - given.context, (given.batch, 1), generator=generator)
        ids = train[starts + torch.arange(given.context)]
        if step == min(1, given.steps - 1):  # the first one compiles
            with qcompile.saved_bytes(model, ids) as saved:
                loss = loss_of(ids)
        else:
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else 0
    return {
        "arm": name, "seed": seed, "before": before, "after": validated(), "model_mb": bytes_of(model) / 1e6,
        "saved_mb": saved.total / 1e6, "peak_mb": peak / 1e6, "step_s": sorted(times)[len(times) // 2],
        "losses": losses,
    }  # fmt: skip


def table_of(runs: list[dict[str, Any]]) -> Table:
    """One line per arm; losses are means over seeds, and ± half of what lies between the seeds."""
    table = Table("weights", "model, MB", "saved, MB", "peak, MB", "s per step", "loss before", "loss after")
    for arm in dict.fromkeys(r["arm"] for r in runs):
        own = [r for r in runs if r["arm"] == arm]
        first, after = own[0], [r["after"] for r in own]
        figures = [f"{first[key]:.1f}" for key in ("model_mb", "saved_mb", "peak_mb")]
        noise = f" ± {(max(after) - min(after)) / 2:.4f}" if len(own) > 1 else ""
        table.add_row(
            arm,
            *figures,
            f"{first['step_s']:.3f}",
            f"{mean(r['before'] for r in own):.4f}",
            f"{mean(after):.4f}{noise}",
        )
    return table


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Training losses, means of ten steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(dict.fromkeys(r["arm"] for r in runs)):
        for r in (r for r in runs if r["arm"] == arm):
            smooth = [mean(r["losses"][max(0, k - 9) : k + 1]) for k in range(len(r["losses"]))]
            axes.plot(smooth, color=f"C{i}", linewidth=1, label=arm if r["seed"] == 0 else None)
    axes.set(xlabel="step", ylabel="training loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMALL, help="folder, or GGUF file")
    parser.add_argument("--text", type=Path, default=SHAKESPEARE, help="plain or .xz")
    parser.add_argument("--characters", type=int, default=4_000_000, help="of the text that are read")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=["BF16", "bitsandbytes NF4", "NF4"])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--validate", type=int, default=32, help="windows that are validated")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every arm")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("qcompile-qlora"), help="folder")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        folder = folder_of(given.model, given.out)
        with (lzma.open if given.text.suffix == ".xz" else open)(given.text, "rt", encoding="utf-8") as file:
            text = file.read(given.characters)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        if len(tokens) < 10 * given.context:  # the last tenth is held out
            msg = f"{given.text} has {len(tokens)} tokens; --context {given.context} needs {10 * given.context}"
            raise ValueError(msg)
    except (ValueError, OSError) as error:
        print(f"finetune_qlora: {error}", file=sys.stderr)
        return 2
    runs: list[dict[str, Any]] = []
    for seed in range(given.seeds):
        for name in given.arms:
            runs.append(run(name, folder, tokens, seed, given))
            found = runs[-1]
            print(f"{name}, seed {seed}: {found['before']:.4f} → {found['after']:.4f}", flush=True)
            (given.out / "finetune_qlora.json").write_text(json.dumps(runs), encoding="utf-8")
    Console(highlight=False).print(table_of(runs))
    plot(runs, given.out / "finetune_qlora.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
