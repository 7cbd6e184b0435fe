"""Time and peak memory of a LoRA step on a Llama of 8 billion frozen weights: BF16, bitsandbytes, torchao and ours.

    python benchmarks/lora_step.py --layers 8 --out lora_8.csv                      # six arms, some minutes
    python benchmarks/lora_step.py --arms bf16 ours_nf4 --limit 200 --out lora_32.csv
    python benchmarks/lora_step.py --regional --arms bf16 ours_nf4 ours_nf4_apart --out both.csv    # what passes save
    python benchmarks/lora_step.py --tiny --device cpu --out lora_cpu.csv           # tries every arm out

The model is transformers' Llama with random weights, made on the meta device and filled and packed layer by layer, so
that it is never wide as a whole. PEFT puts BF16 adapters of rank 16 on all its linear layers but the head. A step is
forward, loss, backward, fused AdamW of the adapters and ``zero_grad(set_to_none=True)``. ``--regional`` compiles
decoder layers one by one (they share a compilation), which is quicker by far; head and loss are then eager.

Every arm has a process of its own and ``--limit`` seconds. Before it is timed its first loss and the gradients of all
adapters are compared with a reference: bitsandbytes' eager layers where weights are NF4, and where activations are
quantized too, the same forward with dX in BF16. That one is compared with the model without compilation, which FP4
changes much, so only the median cosine is asked to be :data:`MEDIAN_COSINE`, of up to :data:`DEEPEST` layers. Peak
memory is that of the timed steps, model and optimizer included; on a CPU it is the largest resident set of the process.

Writes the CSV file after every arm.
"""

from __future__ import annotations

import argparse
import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import add_worker_arguments, answer, answers, fresh_log, milliseconds, write_rows
from model import Size
from torch import Tensor, nn

__all__ = [
    "ARMS",
    "BASELINE",
    "LLAMA_8B",
    "NF4",
    "TINY",
    "Arm",
    "Row",
    "adapted",
    "by_bitsandbytes",
    "llama",
    "main",
    "packed",
    "work",
]

BF16 = torch.bfloat16
LLAMA_8B = Size("8B", 4096, 32, 14336, heads=32, kv_heads=8, sequence=2048, batch=4, vocabulary=128256)
TINY = Size("tiny", 256, 2, 512, heads=4, kv_heads=2, sequence=32, batch=2, vocabulary=512)
BASELINE, REFERENCE = "bf16", "bnb_eager"
#: An arm's first loss may differ by so much from its reference's, as a share.
LOSS_BOUND = 0.02
#: Least cosine of a gradient with that of the reference: of any adapter, and of half of them where FP4 is between.
WORST_COSINE, MEDIAN_COSINE = 0.97, 0.2
#: Layers beyond which FP4 leaves random weights' gradients no likeness: 0.53 remain at 4 layers, 0.09 at 32.
DEEPEST = 8


# --- how weights are stored -----------------------------------------------------------------------------------------


def as_they_are(layer: nn.Module) -> None:
    """BF16."""


def packed(spec: str) -> Callable[[nn.Module], None]:
    def pack(layer: nn.Module) -> None:
        import qcompile

        qcompile.pack_(layer, spec)

    return pack


def by_bitsandbytes(layer: nn.Module) -> None:
    """``Linear4bit`` with nested scales, as transformers' ``BitsAndBytesConfig`` puts it in."""
    import bitsandbytes as bnb

    for name, module in _linears(layer):
        made = bnb.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=BF16, compress_statistics=True,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
        made.weight = weight.to(module.weight.device)
        parent, _, child = name.rpartition(".")
        setattr(layer.get_submodule(parent), child, made)


def by_torchao(layer: nn.Module) -> None:
    """``NF4Tensor``, whose scales are nested in linear 8-bit integers."""
    from torchao.quantization import to_nf4

    for _, module in _linears(layer):
        module.weight = nn.Parameter(to_nf4(module.weight.data), requires_grad=False)


def _linears(layer: nn.Module) -> list[tuple[str, nn.Linear]]:
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


# --- arms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """A way to store the frozen weights and to run the model.

    Attributes:
        store: changes a decoder layer in place.
        backend: what compiles it, with ``options``; "" leaves it eager.
        reference: the arm whose gradients it must have, ``"eager"`` for its own without compilation; "" is not gated.
        worst: whether every gradient must agree, and not only the median.
    """

    store: Callable[[nn.Module], None]
    backend: str = "inductor"
    options: dict[str, Any] = field(default_factory=dict)
    reference: str = REFERENCE
    worst: bool = True


#: Without the passes that are about low-rank products.
APART = {"disable_passes": ["move_factors", "join_products", "accumulate"]}


def w4a4(name: str, activation: str) -> dict[str, Arm]:
    """FP4 activations beside FP4 weights: with dX on 8-bit tensor cores, and, to compare that with, in BF16; both also
    without the passes that join low-rank products.
    """
    store, wide = packed("e2m1 row"), f"{name}_wide_dx"
    options = {"activation": activation}
    bf16 = options | {"backward": "bf16"}
    return {
        wide: Arm(store, "qcompile_stored", bf16, reference="eager", worst=False),
        f"{wide}_apart": Arm(store, "qcompile_stored", bf16 | APART, reference="eager", worst=False),
        name: Arm(store, "qcompile_stored", options, reference=wide),
        f"{name}_apart": Arm(store, "qcompile_stored", options | APART, reference=wide),
    }


NF4 = "nf4 block64 absmax_bnb; nested"
ARMS = {
    BASELINE: Arm(as_they_are, reference=""),
    REFERENCE: Arm(by_bitsandbytes, "", reference=""),
    "bnb_inductor": Arm(by_bitsandbytes),
    "torchao_inductor": Arm(by_torchao),
    "ours_nf4": Arm(packed(NF4), "qcompile_stored"),
    "ours_nf4_apart": Arm(packed(NF4), "qcompile_stored", APART),
    **w4a4("ours_w4a4", "e2m1 row"),
    **w4a4("ours_w4a4_occ", "e2m1 row absmax even; ste; occ(residual=e4m3)"),  # as pretrained models need it
    "ours_on_bnb": Arm(by_bitsandbytes, "qcompile_stored"),  # bitsandbytes' layers, compiled as they are
}
DEFAULT = [n for n in ARMS if not n.startswith(("ours_w4a4_occ", "ours_on_bnb")) and not n.endswith("_apart")]


@dataclass(frozen=True)
class Row:
    """One arm. ``model_gb``: weights and adapters; ``speedup``: time of BF16 over this one."""

    arm: str
    layers: int
    compiled: str
    tokens: int
    median_ms: float = math.nan
    min_ms: float = math.nan
    speedup: float = math.nan
    peak_gb: float = math.nan
    model_gb: float = math.nan
    loss: float = math.nan
    worst_cosine: float = math.nan
    median_cosine: float = math.nan
    first_step_s: float = math.nan
    total_s: float = math.nan
    status: str = "ok"


# --- the model ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def llama(size: Size, store: Callable[[nn.Module], None], device: torch.device) -> Any:
    """transformers' Llama in BF16 with its decoder layers stored so, the same numbers in every call."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.sequence, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(BF16)
    with device:
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are computed, not loaded
    generator = torch.Generator(device).manual_seed(0)
    for layer in model.model.layers:
        store(_filled(layer, size, device, generator))
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        _filled(module, size, device, generator)
    model.is_loaded_in_4bit = store is by_bitsandbytes  # as transformers says it, for PEFT
    return model.eval()


@torch.no_grad()
def adapted(model: Any, device: torch.device) -> Any:
    """With adapters of rank 16 on all linear layers, the same numbers in every call."""
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator(device).manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(BF16)  # PEFT leaves them in float32 beside bitsandbytes' bytes
            parameter.normal_(0, 0.02, generator=generator)  # lora_B is zero at first, and lora_A's gradient then
    return model.train()


def _filled(module: nn.Module, size: Size, device: torch.device, generator: torch.Generator) -> nn.Module:
    """Matrices are normal with deviation 0.02, the last of each branch by √(2·layers) less; norms are one."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1)
        else:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(0, 0.02 / (2 * size.layers) ** 0.5 if ends_branch else 0.02, generator=generator)
        parameter.requires_grad_(False)
    return module


def compiled(model: Any, arm: Arm, regional: bool) -> str:
    """Compile in place; says what was."""
    if not arm.backend:
        return "eager"
    for module in model.get_base_model().model.layers if regional else [model]:
        module.compile(backend=arm.backend, options=dict(arm.options) or None, dynamic=False)
    return "layers" if regional else "whole"


# --- one arm, in a process of its own -------------------------------------------------------------------------------


def loss_and_gradients(model: Any, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad.detach().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), gradients


def cosines(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> list[float]:
    """Of every parameter's gradient, smallest first. Raises ``ValueError`` where one has a gradient and one has not."""
    if gradients.keys() != expected.keys():
        msg = f"gradients of {len(gradients)} parameters, not of the reference's {len(expected)}"
        raise ValueError(msg)
    pairs = ((gradients[name].double().flatten(), g.double().flatten()) for name, g in expected.items())
    return sorted(nn.functional.cosine_similarity(found, g, 0).item() for found, g in pairs)


def gate(
    arm: Arm, layers: int, found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]
) -> dict[str, Any]:
    """Raises ``ValueError`` if the loss or gradients are not those of the reference."""
    similar = cosines(found[1], expected[1])
    figures = {"worst_cosine": similar[0], "median_cosine": median(similar)}
    enough = similar[0] >= WORST_COSINE if arm.worst else median(similar) >= MEDIAN_COSINE or layers > DEEPEST
    if not (enough and abs(found[0] - expected[0]) <= LOSS_BOUND * expected[0]):
        msg = f"loss {found[0]:.5f}, the reference's {expected[0]:.5f}; cosines of gradients {figures}"
        raise ValueError(msg)
    return figures


def work(name: str, given: argparse.Namespace, scratch: Path) -> Row:
    """The arm built, checked and timed. Raises ``ValueError`` if it computes something else."""
    arm, size, device, start = ARMS[name], _size(given), torch.device(given.device), time.perf_counter()
    cuda = device.type == "cuda"
    model = adapted(llama(size, arm.store, device), device)
    model_bytes = torch.cuda.memory_allocated() if cuda else _bytes_of(model)
    shape = (size.batch, size.sequence)
    ids = torch.randint(size.vocabulary, shape, generator=torch.Generator().manual_seed(1)).to(device)
    file = scratch / f"{arm.reference}.pt"
    expected = loss_and_gradients(model, ids) if arm.reference == "eager" else None
    if expected is None and arm.reference and file.exists():
        expected = torch.load(file)
    how = compiled(model, arm, given.regional)
    begun = time.perf_counter()
    found = loss_and_gradients(model, ids)
    first = time.perf_counter() - begun
    figures = gate(arm, size.layers, found, expected) if expected else {}
    if name in {other.reference for other in ARMS.values()}:
        torch.save(found, scratch / f"{name}.pt")

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(step, given.repeats, cuda)
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Row(
        name, size.layers, how, size.tokens, median(times), min(times), peak_gb=peak / 1e9, model_gb=model_bytes / 1e9,
        loss=found[0], first_step_s=first, total_s=time.perf_counter() - start,
        status="ok" if expected or not arm.reference else f"ok, but {arm.reference} did not run to compare with",
        **figures,
    )  # fmt: skip


def _bytes_of(model: nn.Module) -> int:
    from qcompile.stored import bytes_of

    return bytes_of(model)


def _size(given: argparse.Namespace) -> Size:
    size = TINY if given.tiny else LLAMA_8B
    return replace(size, layers=given.layers or size.layers)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=DEFAULT, metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--layers", type=int, help="decoder layers (default: 32)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--regional", action="store_true", help="compile decoder layers one by one")
    parser.add_argument("--limit", type=float, default=100, help="seconds of an arm (default: 100)")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps (default: 10)")
    parser.add_argument("--device", default="cuda")
    add_worker_arguments(parser)
    arguments = list(sys.argv[1:] if argv is None else argv)
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("lora_step: needs a CUDA card (or --tiny --device cpu)", file=sys.stderr)
        return 2
    if given.worker:
        return answer(given, lambda: asdict(work(given.worker, given, given.scratch)))
    log, size = fresh_log(given.out), _size(given)
    rows: list[Row] = []
    base = math.nan
    for name, found, fault in answers(Path(__file__), given.arms, arguments, given.limit, log):
        row = Row(name, size.layers, "", size.tokens, status=f"FAILED: {fault}") if fault else Row(**found)
        base = row.median_ms if name == BASELINE else base
        rows.append(replace(row, speedup=base / row.median_ms))
        write_rows(given.out, rows)
        print(_line(rows[-1]), flush=True)
    return 0 if all(row.status == "ok" for row in rows) else 1


def _line(row: Row) -> str:
    return (
        f"{row.arm:17} {row.median_ms:9.2f} ms {row.speedup:6.3f}x  peak {row.peak_gb:7.2f} GB  "
        f"model {row.model_gb:6.2f} GB  cosines {row.worst_cosine:.4f} {row.median_cosine:.4f}  "
        f"first step {row.first_step_s:5.1f} s, all {row.total_s:5.1f} s  {row.status}"
    )


if __name__ == "__main__":
    sys.exit(main())
