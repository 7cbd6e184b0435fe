"""Cold compile of transformers' Llama by the number of layers: what the passes and the tracing cost beside Inductor's.

Without ``--whole`` no code is generated: Dynamo, AOTAutograd and every graph pass run, Inductor's included, and nothing
is computed. That is the part that grows with the model and that this package adds to. With it, the compilation is the
user's. Times are of the first forward and backward less a later one, in a process of its own with an empty cache; arms
take turns. Processor seconds are compared: they hold on a machine that is shared, where the clock does not.

``--regional`` compiles the decoder layers one by one, which all run the code of the first.

    python benchmarks/compile_time.py --out benchmarks/compile_layers_cpu.csv [--layers 8 32 64] [--repeats 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._inductor.config
import transformers
from measure import Seconds, in_own_process, write_rows

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import RECIPES

#: The options that are fastest on a card.
FAST = {"backward": "fp8", "activation": {"outliers": "occ(residual=e4m3)"}}
#: Arm → backend and options. ``off``: our backend, told to leave everything alone.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "inductor": ("inductor", {}),
    "off": ("qcompile_fp4", {"enabled": False}),
    "qcompile_fp4": ("qcompile_fp4", {}),
    "qcompile_fp4 fast": ("qcompile_fp4", FAST),
    "qcompile_quest": ("qcompile_quest", {}),
}
BASELINE = "inductor"


@dataclass(frozen=True)
class Row:
    """Medians of ``repeats`` cold compilations. ``ratio``: of processor seconds, to the baseline's."""

    transformers: str
    whole: bool
    regional: bool
    layers: int
    arm: str
    processor_seconds: float
    wall_seconds: float
    ratio: float
    repeats: int


def llama(layers: int, device: str) -> Any:
    """Thin, since a graph's size is that of its layers' number."""
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(device, torch.bfloat16)


def passes_alone(gm: torch.fx.GraphModule, inputs: list[Any], **how: Any) -> Any:
    """An inner compile that runs Inductor's graph passes, for a callable that returns zeros of the right shapes."""
    compat.eager_inner_compile(gm, inputs, **how)
    values = [getattr(node, "meta", {}).get("val") for node in gm.graph.output_node().args[0]]

    def run(arguments: list[Any]) -> list[Any]:
        arguments.clear()
        return [
            None if v is None else torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device).zero_()
            for v in values
        ]

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def how(arm: str, whole: bool) -> dict[str, Any]:
    """The arm's arguments of ``Module.compile``."""
    name, options = ARMS[arm]
    if whole:
        return {"backend": name, **({"options": options} if options else {})}

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if name in RECIPES:
            return compile_with(RECIPES[name], gm, inputs, options=options, inner_compile=passes_alone)
        return compat.compile_fx(gm, inputs, inner_compile=passes_alone, config_patches={"fx_graph_cache": False})

    return {"backend": backend}


def compile_seconds(arm: str, layers: int, whole: bool, regional: bool, device: str) -> Seconds:
    """What the first training step takes longer than the third."""
    model = llama(layers, device)
    arguments = how(arm, whole)  # made once: code is shared between modules that have the same backend
    for module in model.model.layers if regional else [model]:
        module.compile(**arguments)
    tokens = torch.randint(model.config.vocab_size, (2, 64), device=device)
    times = []
    with tempfile.TemporaryDirectory(prefix="qcompile_compile_time_") as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for _ in range(3):
            start = Seconds.now()
            model(input_ids=tokens, labels=tokens).loss.backward()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(Seconds.now() - start)
    return times[0] - times[-1]


def measure(layers: int, arms: list[str], repeats: int, whole: bool, regional: bool, device: str) -> list[Row]:
    """The baseline and ``arms``, in turns."""
    seconds: dict[str, list[Seconds]] = {arm: [] for arm in dict.fromkeys((BASELINE, *arms))}
    for _ in range(repeats):
        for arm, found in seconds.items():
            found.append(in_own_process(partial(compile_seconds, arm, layers, whole, regional, device)))
    processor = {arm: median(one.processor for one in found) for arm, found in seconds.items()}
    rows = [
        Row(
            transformers=transformers.__version__,
            whole=whole,
            regional=regional,
            layers=layers,
            arm=arm,
            processor_seconds=processor[arm],
            wall_seconds=median(one.wall for one in found),
            ratio=processor[arm] / processor[BASELINE],
            repeats=repeats,
        )
        for arm, found in seconds.items()
    ]
    for row in rows:
        print(
            f"{layers:3} layers  {row.arm:18} {row.processor_seconds:7.2f} s of the processor, "
            f"{row.wall_seconds:7.2f} s by the clock  {row.ratio:.2f}x",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="generate code, as users do")
    parser.add_argument("--regional", action="store_true", help="compile the decoder layers one by one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    llama(1, "cpu")  # imports what all processes need
    how_measured = (arguments.arms, arguments.repeats, arguments.whole, arguments.regional, arguments.device)
    rows = [row for layers in arguments.layers for row in measure(layers, *how_measured)]
    if arguments.out:
        write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
