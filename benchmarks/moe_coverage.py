"""How much of what mixtures of experts multiply runs on 8-bit tensor cores. Needs no card.

    python benchmarks/moe_coverage.py --label after --out benchmarks/moe_coverage_cpu.csv [model …]

Coverage is the share of floating-point operations of one training step's products that kernels of 8-bit codes do
(``mm_8bit``, ``mm_8bit_grouped``). The whole is what products of the eager model do, forward and backward, attention's,
the router's and the head's among them. What runs is counted, as it runs: passes are told that the CPU is a card of
compute capability 9.0 and the graphs are executed op by op. So what Dynamo leaves in Python counts as not covered, and
so does what is decoded first. The recipe is ``qcompile_fp4`` with ``backward="fp8"``.

Every model of transformers is one decoder layer in BF16 with the proportions that it was published with, width 256 and
8 experts, 512 tokens; with each implementation of experts that transformers has for it. ``"float32"``: the same in
float32 under autocast.

Rows are written one by one, and those that the file has are not run again. The script depends on nothing but the
package, so that it can be run on another commit: ``PYTHONPATH=<its tree> python benchmarks/moe_coverage.py --label
before``.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import in_own_process
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.recipes import FP4

__all__ = ["IMPLEMENTATIONS", "MODELS", "Operations", "Row", "coverage", "main"]

WIDTH, TOKENS, EXPERTS = 256, (4, 128), 8
DENSE = {
    "vocab_size": 256, "hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 128, "use_cache": False, "pad_token_id": 0,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 96, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "num_key_value_heads": 4, "head_dim": 16, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS,
    "n_shared_experts": 1, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
}  # fmt: skip
#: By name: the class, and what its configuration has beside DENSE.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 896, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": EXPERTS,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 176,
            "shared_expert_intermediate_size": 704,
        },
    ),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": EXPERTS, "num_experts_per_tok": 4, "moe_intermediate_size": 96}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "num_experts_per_tok": 4, "moe_intermediate_size": 80}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "num_experts_per_tok": 4, "moe_intermediate_size": 80}),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 256, "num_local_experts": EXPERTS, "num_experts_per_tok": 4, "sliding_window": 64},
    ),
    "llama4": (
        "Llama4",
        {
            "intermediate_size": 416,
            "intermediate_size_mlp": 832,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 1,
            "moe_layers": [0],
        },
    ),
    "granitemoe": ("GraniteMoe", {"intermediate_size": 128, "num_local_experts": EXPERTS, "num_experts_per_tok": 4}),
    "olmoe": ("Olmoe", {"intermediate_size": 128, "num_experts": EXPERTS, "num_experts_per_tok": 4}),
}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")


@dataclass(frozen=True)
class Row:
    """``covered``: of the step's operations, in percent; ``forward``, ``backward``: of those of either direction.

    ``graphs``: that Dynamo made. ``warned``: what was said of code that stays in Python, or why there are no figures.
    """

    label: str
    model: str
    implementation: str
    dtype: str
    covered: float = float("nan")
    forward: float = float("nan")
    backward: float = float("nan")
    graphs: int = 0
    warned: str = ""


# --- what runs ------------------------------------------------------------------------------------------------------


def _mm_8bit(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * prod(a.shape) * b.shape[0]


def _mm_8bit_grouped(a: Tensor, b: Tensor, offs: Tensor, *_: Any, **__: Any) -> int:
    """Of a contraction in groups the columns that pad groups are left out."""
    return 2 * prod(a.shape) * b.shape[1] if b.dim() == 3 else 2 * a.shape[0] * b.shape[0] * int(offs[-1])


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * prod(a.shape) * b.shape[-1]


CODES = {"qcompile::mm_8bit": _mm_8bit, "qcompile::mm_8bit_grouped": _mm_8bit_grouped}
#: Other products that torch's counter has no formula for, by name.
OTHERS: dict[str, Callable[..., int]] = {
    "aten::_grouped_mm": _grouped,
    "transformers::grouped_mm_fallback": _grouped,
    "transformers::grouped_mm_fallback_backward": lambda *given: 2 * _grouped(*given),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_, **__: (
        2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    ),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": lambda _, q, k, v, *__, **___: (
        2 * q[..., 0].numel() * k.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])
    ),
}


class Operations(TorchDispatchMode):
    """Operations of products that run inside it: all, and those of kernels that read 8-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.of_codes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        if formula := CODES.get(name) or OTHERS.get(name):
            operations = formula(*args, **kwargs)
        elif func.overloadpacket in flop_counter.flop_registry:
            operations = flop_counter.flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        else:
            return result
        self.all += operations
        self.of_codes += operations if name in CODES else 0
        return result


def counting(run: Callable[..., Any], operations: Operations) -> Callable[..., Any]:
    def counted(args: list[Any]) -> Any:
        with operations:
            return run(args)

    counted._boxed_call = True  # type: ignore[attr-defined]
    return counted


# --- a model --------------------------------------------------------------------------------------------------------


def build(model: str, implementation: str, dtype: torch.dtype) -> nn.Module:
    """Raises ``ValueError`` if its experts have no such implementation."""
    import transformers

    kind, sizes = MODELS[model]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}TextConfig" if kind == "Llama4" else f"{kind}Config")(**DENSE | sizes)
    built = getattr(transformers, f"{kind}ForCausalLM")(config).train().to(dtype)
    if not built._can_set_experts_implementation():
        if implementation != "eager":
            msg = "transformers has one implementation of its experts"
            raise ValueError(msg)
        return built
    built.set_experts_implementation(implementation)
    return built


def coverage(model: str, implementation: str, dtype: torch.dtype, label: str = "") -> Row:
    """One step of the eager model, which says what there is to compute, and one compiled."""
    head = (label, model, implementation, str(dtype).removeprefix("torch."))
    try:
        built = build(model, implementation, dtype)
    except ValueError as error:
        return Row(*head, warned=str(error))
    ids = torch.randint(1, 256, TOKENS, generator=torch.Generator().manual_seed(0))
    forward, backward, graphs = Operations(), Operations(), 0

    def inner(gm: torch.fx.GraphModule, inputs: list[Any], **kwargs: Any) -> Any:
        run = compat.eager_inner_compile(gm, inputs, **kwargs)
        return counting(run, backward if kwargs.get("is_backward") else forward)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return compile_with(FP4, gm, inputs, options={"backward": "fp8"}, inner_compile=inner)

    def step(call: Callable[..., Any], around: tuple[AbstractContextManager[Any], ...]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32), around[0]:
            loss = call(input_ids=ids, labels=ids).loss
        with around[1]:
            loss.backward()

    whole, bare = (Operations(), Operations()), (nullcontext(), nullcontext())
    step(built, whole)
    torch._dynamo.reset()
    compiled = torch.compile(built, backend=backend)
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(compiled, bare)
            for counter in (forward, backward):
                counter.all = counter.of_codes = 0
            step(compiled, bare)  # the second call is warned of what the first one left
        said = [str(w.message) for w in caught if "qcompile" in str(w.message)]
    total = sum(operations.all for operations in whole)
    return Row(
        *head,
        covered=100 * (forward.of_codes + backward.of_codes) / total,
        forward=100 * forward.of_codes / whole[0].all,
        backward=100 * backward.of_codes / whole[1].all,
        graphs=graphs,
        warned="; ".join(dict.fromkeys(said)),
    )


# --- results --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict[str, str]]) -> str:
    """Markdown: a line per model, for each way of its experts what was covered by each label, in percent."""
    labels = list(dict.fromkeys(row["label"] for row in rows))
    ways = list(dict.fromkeys((row["implementation"], row["dtype"]) for row in rows))
    found = {(row["model"], (row["implementation"], row["dtype"]), row["label"]): row["covered"] for row in rows}

    def cell(model: str, way: tuple[str, str]) -> str:
        return " → ".join("–" if (v := found.get((model, way, at), "nan")) == "nan" else v for at in labels)

    heads = [f"{way}{', float32' if dtype == 'float32' else ''}" for way, dtype in ways]
    lines = [f"| {' → '.join(labels)}, % | {' | '.join(heads)} |", f"|---|{'---:|' * len(ways)}"]
    models = dict.fromkeys(row["model"] for row in rows)
    return "\n".join([*lines, *(f"| {model} | {' | '.join(cell(model, way) for way in ways)} |" for model in models)])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all if none is given")
    parser.add_argument("--label", default="after", help="what this commit is called")
    parser.add_argument("--out", type=Path, default=Path("moe_coverage_cpu.csv"))
    given = parser.parse_args(arguments)
    if unknown := set(given.models) - set(MODELS):
        parser.error(f"no such models: {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    ways = [*product(IMPLEMENTATIONS, [torch.bfloat16]), ("grouped_mm", torch.float32)]
    for model, (implementation, dtype) in product(given.models or MODELS, ways):
        rows = read(given.out)
        key = given.label, model, implementation, str(dtype).removeprefix("torch.")
        if any((row["label"], row["model"], row["implementation"], row["dtype"]) == key for row in rows):
            continue
        # What one process has seen in a graph it does not warn of.
        found = asdict(in_own_process(partial(coverage, model, implementation, dtype, given.label)))
        texts = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in found.items()}
        write(given.out, [*rows, texts])
        print(*texts.values(), flush=True)
    print(f"\n{table(read(given.out))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
