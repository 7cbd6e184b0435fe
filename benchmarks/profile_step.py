"""Where the time of a training step goes, and how far that is from what the card could do.

    python benchmarks/profile_step.py --arm ours_fp8 --size d4096 --out benchmarks/h200/profile_ours_fp8_d4096.md

Profiles three steps, sorts every kernel into a class by the operator that launched it and by its name (the first row of
CLASSES that matches), and sets each class against its floor: the operations it has to do over the matrix rate, or the
bytes it has to move over the copy bandwidth, both measured in the same process. A kernel that Inductor fused from
several ops counts whole in one class: SwiGLU fused with the quantization of its result is a cast, so the casts below
carry work that other arms do elsewhere.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._logging
from measure import copy_microseconds, environment, failure, fresh_log, microseconds, quiet_stderr
from model import MODELS, SIZES, Size
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from training_step import ARMS, Arm, Run, Trainer

__all__ = ["CLASSES", "Ceilings", "Launch", "class_of", "floors", "launches_of", "main", "report"]

#: ``triton_poi_``, ``triton_red_`` and ``triton_per_`` begin the kernels that Inductor generates from loops; they are
#: named after the ops in them, and sometimes after a product beside them.
_NOT_A_LOOP = r"^(?!.*\btriton_(?:poi|red|per)_)"

#: What the profiler calls the host's waiting for a full queue; it lists kernels there that other operators launched.
_WAITING = "Command Buffer Full"

#: Class → what matches ``"<operator> | <kernel>"``, tried in order.
CLASSES: dict[str, str] = {
    "attention": _NOT_A_LOOP + r".*(scaled_dot_product|sdpa|flash|fmha|cudnn::fusion)",
    "8-bit GEMM": _NOT_A_LOOP
    + r".*(\b_(rows|contraction)_kernel|scaled_mm|int_mm|mm_8bit|(gemm|matmul)_8bit|nvjet\w*_qq|ovscale"
    r"|gemm\w*_(f8|s8)|float_e[45]m[23])",
    "loss": r"log_softmax|nll_loss|cross_entropy|softmax_online",
    "DGE slope": r"scale_gradient",
    "casts": r"quantize|encode|recode|8bit|float8|outlier|compensat|topk|bitonicSort|radixSort|scaled_mm|amax"
    r"|reciprocal|_(row|column)_scales|rotate|hadamard",
    "BF16 GEMM": _NOT_A_LOOP + r".*(aten::(add|b|badd)?mm\b|nvjet|gemm|cutlass|splitK|triton_tem_\w*mm)",
    "optimizer": r"adam|multi_tensor_apply",
    "memory copies": r"\bMem(cpy|set)\b",
    "norms, RoPE, SwiGLU, other elementwise": r"triton_|elementwise|reduce|embedding|index|copy|cat",
}
HEAD, OTHER = "BF16 GEMM, head", "other"

#: The order in which they are printed.
ORDER = ("8-bit GEMM", "BF16 GEMM", HEAD, "attention", "casts", "DGE slope", *CLASSES, OTHER)


# --- what ran -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Kernels of one name that one operator launched: total microseconds over ``count`` launches."""

    kernel: str
    operator: str
    shapes: str
    microseconds: float
    count: int = 1


def launches_of(events: Iterable[Any]) -> list[Launch]:
    """Every kernel of a profile (``torch.profiler.profile.events()``), with the operator that launched it if known."""
    total: defaultdict[str, float] = defaultdict(float)
    times: Counter[str] = Counter()
    linked: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        if event.device_type == DeviceType.CUDA:
            if not event.is_user_annotation:  # a span over kernels, such as the optimizer's step
                total[event.name] += event.time_range.elapsed_us()
                times[event.name] += 1
            continue
        if event.name == _WAITING:
            continue
        for kernel in event.kernels:
            key = (kernel.name, event.name, str(event.input_shapes or ""))
            linked.setdefault(key, []).append(kernel.duration)
    launches = [
        Launch(kernel, operator, shapes, sum(durations), len(durations))
        for (kernel, operator, shapes), durations in linked.items()
        if kernel in total
    ]
    for launch in launches:
        total[launch.kernel] -= launch.microseconds
        times[launch.kernel] -= launch.count
    return launches + [Launch(name, "", "", total[name], times[name]) for name in total if times[name] > 0]


def class_of(launch: Launch, size: Size) -> str:
    """The class of a launch; a product with the vocabulary among its sizes is the head's."""
    text = f"{launch.operator} | {launch.kernel}"
    found = next((name for name, pattern in CLASSES.items() if re.search(pattern, text, re.IGNORECASE)), OTHER)
    of_head = re.search(rf"\b{size.vocabulary}\b", launch.shapes) is not None
    return HEAD if found == "BF16 GEMM" and of_head else found


# --- what had to run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes per second of a copy (read plus written), operations per second of products."""

    copy: float
    bf16: float
    fp8: float

    @staticmethod
    def measured(rows: int = 16384, inner: int = 4096, columns: int = 14336) -> Ceilings:
        """Of the card at hand; row-wise scaled FP8 with fast accumulation, as the arms use it."""
        operations = 2 * rows * inner * columns
        a, b = (torch.randn(n, inner, device="cuda", dtype=torch.bfloat16) for n in (rows, columns))
        fp8 = [x.to(torch.float8_e4m3fn) for x in (a, b)]
        scales = [torch.ones(n, 1, device="cuda") for n in (rows, columns)]
        scaled = partial(torch._scaled_mm, fp8[0], fp8[1].t(), scales[0], scales[1].t(), out_dtype=torch.bfloat16)
        gigabyte = 2**30
        return Ceilings(
            copy=1e6 * gigabyte / copy_microseconds(gigabyte),
            bf16=1e6 * operations / microseconds([partial(torch.mm, a, b.t())]),
            fp8=1e6 * operations / microseconds([partial(scaled, use_fast_accum=True)]),
        )


@dataclass(frozen=True)
class Floor:
    """Fewest operations and bytes of a class in one step, and how they were counted."""

    seconds: float
    amount: str
    how: str


#: Bytes per element that casts read and write, by who casts what: for the forward product, and in the backward for the
#: product of the second role if it runs in 8 bits and if it does not. Ours saves packed codes (half a byte) of
#: activations, whole ones where they hold outliers, and decodes them to BF16 for a wide product.
CAST_BYTES: dict[str, tuple[str, float, float, float]] = {
    "ours, activation": ("wgrad", 2 + 1 + 0.5, 0.5 + 1, 0.5 + 2),
    "ours, activation with outliers": ("wgrad", 2 + 1, 1 + 1, 1 + 2),
    "ours, weight": ("dgrad", 2 + 1, 2 + 1, 2 + 2),
    "torchao, activation": ("wgrad", 2 + 1, 2 + 1, 0),
    "torchao, weight": ("dgrad", 2 + 1, 2 + 1, 0),
}
#: Bytes per element of dY by the roles that read it in 8 bits: one read serves both.
GRADIENT_BYTES = {frozenset(): 0, frozenset({"dgrad"}): 2 + 1, frozenset({"dgrad", "wgrad"}): 2 + 1 + 1}


def cast_bytes(arm: Arm, size: Size) -> float:
    """Fewest bytes all casts of a step move, each input read once and each output written once, nothing fused."""
    if not arm.roles:
        return 0
    # q, k, v share one, gate and up too, of all experts of a token
    inputs = size.layers * size.tokens * (3 * size.hidden + size.mixed * size.intermediate)
    outputs = size.layers * size.tokens * sum(features for _, _, features in size.linears_of_token())
    total: float = GRADIENT_BYTES[arm.roles - {"fprop"}] * outputs
    activation = "activation with outliers" if arm.outliers else "activation"
    for operand, elements in ((activation, inputs), ("weight", size.block_weights)):
        role, forward, narrow, wide = CAST_BYTES[f"{arm.provider}, {operand}"]
        total += elements * (forward + (narrow if role in arm.roles else wide))
    return total


def elementwise_bytes(size: Size) -> float:
    """Fewest bytes of what is neither product nor cast, BF16, every tensor read and written once a use."""
    d, kv, ff = size.hidden, size.kv_hidden, size.intermediate
    forward_norms = 2 * 2 * (2 * d + 2 * d)  # two adds with norm: read both addends, write sum and normed
    backward_norms = 2 * (3 + 3) * d + 2 * (2 + 3) * d  # read the gradients of all readers, x and dx; write dx
    rotary = 2 * 2 * (2 * d + 2 * kv)
    swiglu = 2 * (3 + 5) * ff * size.mixed
    embedding = 2 * (2 * size.tokens * d + 2 * size.tokens * d + size.vocabulary * d)
    return size.layers * size.tokens * (forward_norms + backward_norms + rotary + swiglu) + embedding


def floors(arm: Arm, size: Size, ceilings: Ceilings) -> dict[str, Floor]:
    """The floor of every class that has one."""
    role_operations = 2 * size.tokens * size.weights_of_token
    head_operations = 3 * 2 * size.tokens * size.hidden * size.vocabulary
    scores = 2 * size.batch * size.sequence**2 * size.hidden / 2 * size.layers  # one causal product of all heads
    slope = 6 * size.block_weights if arm.provider == "ours" else 0

    def products(operations: float, rate: float, how: str) -> Floor:
        return Floor(operations / rate, f"{operations / 1e12:.1f} TFLOP", how)

    def traffic(moved: float, how: str) -> Floor:
        return Floor(moved / ceilings.copy, f"{moved / 1e9:.2f} GB", how)

    narrow, wide = len(arm.roles), 3 - len(arm.roles)
    return {
        "8-bit GEMM": products(narrow * role_operations, ceilings.fp8, f"{narrow} of 3 roles, FP8 rate"),
        "BF16 GEMM": products(wide * role_operations, ceilings.bf16, f"{wide} of 3 roles"),
        HEAD: products(head_operations, ceilings.bf16, "3 roles"),
        "attention": products((2 + 5) * scores, ceilings.bf16, "2 causal products forward, 5 backward, BF16 GEMM rate"),
        "casts": traffic(cast_bytes(arm, size), "each operand read once, each code written once, unfused"),
        "DGE slope": traffic(slope, "read dW and W, write dW"),
        "loss": traffic(6 * size.tokens * size.vocabulary, "logits read twice, their gradient written"),
        "optimizer": traffic(14 * size.parameters, "read p, g, m, v; write p, m, v"),
        "norms, RoPE, SwiGLU, other elementwise": traffic(elementwise_bytes(size), "each tensor once a use, BF16"),
    }


LONGEST = "## Longest kernels"


# --- the report -----------------------------------------------------------------------------------------------------


def report(arm: str, size: Size, launches: Sequence[Launch], steps: int, step_ms: float, ceilings: Ceilings) -> str:
    """Markdown: classes against their floors, the casts' share, and the longest kernels of every class."""
    by_class: dict[str, list[Launch]] = {name: [] for name in dict.fromkeys(ORDER)}
    for launch in launches:
        by_class[class_of(launch, size)].append(launch)
    milliseconds = {name: sum(x.microseconds for x in found) / 1e3 / steps for name, found in by_class.items()}
    total = sum(milliseconds.values())
    floor = floors(ARMS[arm], size, ceilings)
    where = environment()
    lines = [
        f"# One training step: {ARMS[arm].label}, {size.name}",
        "",
        f"{where['date']}, {where['card']}, torch {where['torch']}, triton {where['triton']}. d={size.hidden},"
        f" {size.layers} layers, ff={size.intermediate}, {size.batch} × {size.sequence} tokens, vocabulary"
        f" {size.vocabulary}, BF16 weights, fused AdamW. Means of {steps} profiled steps.",
        "",
        f"A step takes {step_ms:.1f} ms without the profiler; its kernels take {total:.1f} ms. Measured ceilings: copy"
        f" {ceilings.copy / 1e12:.2f} TB/s, BF16 {ceilings.bf16 / 1e12:.0f} and FP8 {ceilings.fp8 / 1e12:.0f} TFLOP/s"
        " (16384×4096×14336).",
        "",
        "| class | ms | share | floor ms | gap ms | × floor | what has to be done |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    floor_total = 0.0
    for name, measured in milliseconds.items():
        least = floor.get(name)
        if not measured and not (least and least.seconds):
            continue
        row = f"| {name} | {measured:.2f} | {100 * measured / total:.1f} % |"
        if least and least.seconds:
            ms = 1e3 * least.seconds
            floor_total += ms
            row += f" {ms:.2f} | {measured - ms:+.2f} | {measured / ms:.2f} | {least.amount}: {least.how} |"
        else:
            row += " | | | |"
        lines.append(row)
    lines.append(
        f"| total | {total:.2f} | | {floor_total:.2f} | {total - floor_total:+.2f} | {total / floor_total:.2f} | |"
    )
    linear = milliseconds["casts"] + milliseconds["8-bit GEMM"] + milliseconds["BF16 GEMM"]
    if linear:
        share = 100 * milliseconds["casts"] / linear
        lines += ["", f"Casts are {share:.1f} % of the linear layers' time (casts and their GEMMs, head excluded)."]
    lines += ["", LONGEST, "", "| class | kernel | launched by | launches | ms |", "|---|---|---|---:|---:|"]
    for name, found in by_class.items():
        lines += [kernel_row(name, *entry, steps) for entry in longest(found)]
    return "\n".join(lines) + "\n"


def longest(launches: Sequence[Launch], count: int = 6) -> list[tuple[str, str, int, float]]:
    """Kernel, operator, launches and microseconds, whatever the shapes; the most expensive ones."""
    times: defaultdict[tuple[str, str], float] = defaultdict(float)
    counts: Counter[tuple[str, str]] = Counter()
    for launch in launches:
        times[launch.kernel, launch.operator] += launch.microseconds
        counts[launch.kernel, launch.operator] += launch.count
    top = sorted(times.items(), key=lambda item: -item[1])[:count]
    return [(kernel, operator, counts[kernel, operator], us) for (kernel, operator), us in top]


def kernel_row(name: str, kernel: str, operator: str, count: int, us: float, steps: int) -> str:
    launched_by = "" if operator == kernel else operator
    text = [part.replace("|", "\\|") for part in (name, f"`{kernel[:110]}`", launched_by[:40])]
    return f"| {' | '.join(text)} | {count / steps:g} | {us / 1e3 / steps:.2f} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=ARMS, default="ours_fp8_occ")
    parser.add_argument("--size", choices=SIZES, default="d4096")
    parser.add_argument("--model", choices=MODELS, default="transformers")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("profile_step.md"))
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("profile_step: needs a CUDA card", file=sys.stderr)
        return 2
    torch._logging.set_logs(all=logging.CRITICAL)
    size, log = SIZES[given.size], fresh_log(given.out)
    try:
        with quiet_stderr(log):
            ceilings = Ceilings.measured()
            trainer = Trainer(ARMS[given.arm], size, Run(torch.device("cuda"), model=given.model))
            trainer.milliseconds(5)
            step_ms = sorted(trainer.milliseconds(7)[0])[3]
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as trace:
                trainer.milliseconds(given.steps)
                torch.cuda.synchronize()
            launches = launches_of(trace.events())
    except Exception as error:
        print(f"profile_step: {failure(error, log, given.arm)}", file=sys.stderr)
        return 1
    text = report(given.arm, size, launches, given.steps, step_ms, ceilings)
    given.out.write_text(text, encoding="utf-8")
    print(text[: text.index(LONGEST)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
