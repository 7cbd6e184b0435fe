"""8-bit products of 4-bit codes on tensor cores against BF16, cuBLASLt and torch's INT8 product.

    python benchmarks/gemm.py --out benchmarks/h200/gemm.csv

Operands are rows of Gaussians quantized to E2M1 (FP8) or to integers of 4 bits (INT8); BF16 multiplies the Gaussians.
``--kinds int8_offset``: half-integers of 8 bits, as INT8 with sums of both operands' codes, which are timed as well.
``--kinds int1``: signs, counted as they are stored, with counts of both operands' bits, timed too; against FP8.
Every provider is first compared with float64 on some rows, to the rounding of its output: 4-bit codes have exact sums.
Then all are timed in turns, several operand sets each, so that none runs on a warmer cache or a cooler card. Configs of
the kernels in Triton and Gluon are tuned before, templates within the time that `--seconds` leaves; `--sweep` times
each config instead, and experimental ones.

Writes a CSV file: a row for every shape and provider, with the config that won, TFLOP/s and ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from measure import brief, environment, write_rows
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from qcompile.ir.quantizer import Quantizer
from qcompile.kernels.lowerings import register_lowerings
from qcompile.kernels.matmul import inductor, providers
from qcompile.kernels.matmul import triton as gemm
from qcompile.kernels.quantize.reference import quantize_8bit

__all__ = ["Row", "main", "measure_shape"]

#: (N, K); M is the tokens of a step.
SHAPES = [(2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)]
TOKENS = 16384
#: Operand sets that calls go round, and calls in a graph.
SETS, CALLS = 3, 6
#: Rows of the output that are compared with float64.
CHECKED_ROWS = 128
BF16 = torch.bfloat16
#: What the operands of each kind are quantized to.
QUANTIZERS = {
    "fp8": "e2m1 row absmax even",
    "int8": "int4 row absmax even",
    "int8_offset": "midrise8 row absmax half_up",
    "int1": "midrise1 row absmax half_up",
}
#: What figures are compared with: the same product in BF16, and a library's in the same type.
BASELINE = "bf16 mm"
LIBRARIES = {"fp8": "fp8 _scaled_mm", "int8": "int8 _int_mm", "int1": "int1 as fp8 _scaled_mm"}


@dataclass(frozen=True)
class Operands:
    """``a @ bᵀ``: codes, their scales, the rows they were quantized from, what levels have that codes lack, and single
    bits as they are stored.
    """

    a: Tensor
    b: Tensor
    scale_a: Tensor
    scale_b: Tensor
    dense_a: Tensor
    dense_b: Tensor
    offset: float
    bits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """A product to measure.

    ``roundings`` says how often its exact sums are rounded to bfloat16, 0 that it returns them as integers, without
    scales. ``config`` tells how it is cut up, as far as is known.
    """

    name: str
    run: Callable[[Operands], Tensor]
    sets: list[Operands]
    roundings: int = 1
    config: str = ""


@dataclass(frozen=True)
class Row:
    """One provider on one shape; ratios of TFLOP/s to BF16 and to the library's product of the same type."""

    m: int
    n: int
    k: int
    provider: str
    config: str
    microseconds: float
    tflops: float
    over_bf16: float
    over_library: float


# --- what is measured -----------------------------------------------------------------------------------------------


def operand_sets(m: int, n: int, k: int, kind: str) -> list[Operands]:
    """:data:`SETS` pairs of Gaussian matrices and their codes, as FP8 or as INT8."""
    quantizer = QUANTIZERS[kind]
    offset = Quantizer.parse(quantizer).format.tensor_core_offset
    sets = []
    for _ in range(SETS):
        dense = [torch.randn(rows, k, dtype=BF16, device="cuda") for rows in (m, n)]
        (a, scale_a, stored_a), (b, scale_b, stored_b) = (quantize_8bit(x, quantizer, kind == "int1") for x in dense)
        if kind == "int8":
            a, b = a.to(BF16).to(torch.int8), b.to(BF16).to(torch.int8)
        bits = (stored_a, stored_b) if kind == "int1" else ()
        sets.append(Operands(a, b, scale_a, scale_b, *dense, offset, bits))
    return sets


def hand_launched(x: Operands, module: ModuleType, config=None) -> Tensor:
    if x.bits:
        offsets = counts_of_bits(*x.bits)
        return module.mm_1bit(*x.bits, x.scale_a, x.scale_b, BF16, None, *offsets, config=config, tune=config is None)
    offsets = sums_of_codes(x.a, x.b, x.offset) if x.offset else (None, None)
    return module.mm_8bit(x.a, x.b, x.scale_a, x.scale_b, BF16, None, *offsets, config=config, tune=config is None)


@partial(torch.compile, dynamic=False)
def sums_of_codes(a: Tensor, b: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """``offset_a`` and ``offset_b`` of the product, as `lower` has them computed."""
    return (a.float() + offset).sum(-1, keepdim=True) * offset, b.float().sum(-1, keepdim=True) * offset


@partial(torch.compile, dynamic=False)
def counts_of_bits(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same for single bits."""
    count = torch.ops.qcompile.count_bits
    return count(a) * -0.5, count(b) * -0.5 + 2 * b.shape[1]


def hand_launched_kernels() -> dict[str, ModuleType]:
    """Modules with a kernel and its configs; Gluon's runs on Hopper only."""
    kernels = {"triton": gemm}
    if torch.cuda.get_device_capability() == (9, 0):
        with contextlib.suppress(ImportError):  # Triton without Gluon, or with another one
            kernels["gluon"] = importlib.import_module("qcompile.kernels.matmul.gluon")
    return kernels


def scaled_mm(x: Operands) -> Tensor:
    return torch._scaled_mm(x.a, x.b.t(), x.scale_a, x.scale_b.t(), None, None, BF16, use_fast_accum=True)


def providers_of(
    m: int, n: int, k: int, kinds: list[str], sweep: bool, deadline: float
) -> Iterator[tuple[str, Callable[[], Provider]]]:
    """Names of all providers of one shape, and what builds them; the hand-launched kernel is tuned then."""
    for kind in kinds:
        sets = operand_sets(m, n, k, kind)
        if kind == kinds[0]:
            yield BASELINE, partial(Provider, BASELINE, lambda x: x.dense_a @ x.dense_b.t(), sets)
        if kind in ("fp8", "int1"):
            yield LIBRARIES[kind], partial(Provider, LIBRARIES[kind], scaled_mm, sets, roundings=2)
        elif kind == "int8":
            yield LIBRARIES[kind], partial(Provider, LIBRARIES[kind], int_mm, sets, roundings=0)
        for kernel, module in hand_launched_kernels().items():
            if kind == "int1" and not hasattr(module, "mm_1bit"):
                continue
            name = f"{kind} {kernel}"
            yield name, partial(tuned, name, sets, module)
            if sweep:
                for config in (*module.candidates(problem_of(sets[0])), *getattr(module, "EXPERIMENTAL_CONFIGS", ())):
                    run = partial(hand_launched, module=module, config=config)
                    yield f"{name} {config}", partial(Provider, f"{name} {config}", run, sets, config=str(config))
        if not sweep and kind == "fp8" and time.monotonic() < deadline:
            yield "fp8 template", partial(template, "fp8 template", sets)


def problem_of(x: Operands) -> gemm.Problem:
    a, b = x.bits or (x.a, x.b)
    return gemm.Problem(a.shape[0], b.shape[0], a.shape[1], a.dtype, b.dtype, BF16, gemm.card_of(a.device))


def tuned(name: str, sets: list[Operands], module: ModuleType) -> Provider:
    """The hand-launched kernel with the config that is fastest on the first set."""
    hand_launched(sets[0], module)
    columns = {"summands": 1} if (sets[0].offset or sets[0].bits) and name.endswith("gluon") else {}
    best = module.best_config(problem_of(sets[0]), lambda config: None, tune=False, **columns)
    return Provider(name, partial(hand_launched, module=module, config=best), sets, config=str(best))


def int_mm(x: Operands) -> Tensor:
    return torch._int_mm(x.a, x.b.t())


def template(name: str, sets: list[Operands]) -> Provider:
    """Inductor's choice among the configs of its template, without cuBLASLt."""
    op = torch.ops.qcompile.mm_8bit
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda a, b, scale_a, scale_b: op(a, b, scale_a, scale_b, BF16),
        options={"max_autotune_gemm": True, "fx_graph_cache": False},  # what is patched below is in no cache's key
        fullgraph=True,
        dynamic=False,
    )

    def run(x: Operands) -> Tensor:
        return compiled(x.a, x.b, x.scale_a, x.scale_b)

    (triton_provider,) = (provider for provider in providers.PROVIDERS if provider.name == "triton")
    with mock.patch.object(inductor, "choose", return_value=(triton_provider, "")):
        _, codes = run_and_get_code(run, sets[0])
    settings = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "PARTS", "num_warps", "num_stages")
    found = {word: re.search(rf"\b{word}(?: : tl\.constexpr)? ?= ?(\d+)", codes[0]) for word in settings}
    config = " ".join(f"{word.lower()}={match[1]}" for word, match in found.items() if match)
    return Provider(name, run, sets, config=config)


# --- correctness ----------------------------------------------------------------------------------------------------


def disagreement(provider: Provider) -> str:
    """What is wrong with the provider's product of each set, empty if nothing is.

    The sums are exact, so the error is that of two float32 products and of rounding to bfloat16. A library may do that
    before it scales, and again.
    """
    for x in provider.sets:
        rows = torch.randint(x.a.shape[0], (CHECKED_ROWS,), device="cuda")
        rows[-1] = x.a.shape[0] - 1
        left = x.a.view(torch.uint8)[rows].view(x.a.dtype).float().double() + x.offset
        expected = left @ (x.b.float().double() + x.offset).t()
        if provider.roundings:
            expected = expected * x.scale_a[rows].double() * x.scale_b.double().t()
        tolerance = expected.abs() * (provider.roundings * 2.0**-8 + 2.0**-22 if provider.roundings else 0)
        got = provider.run(x)[rows].double()
        wrong = ~((got - expected).abs() <= tolerance)  # NaN is wrong
        if wrong.any():
            worst = (got - expected).abs().max().item()
            return f"{int(wrong.sum())} of {wrong.numel()} checked elements are wrong, by {worst:.3g} at most"
    return ""


# --- time -----------------------------------------------------------------------------------------------------------


def capture(provider: Provider) -> torch.cuda.CUDAGraph:
    """A graph of :data:`CALLS` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for x in provider.sets:
            provider.run(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(CALLS):
            provider.run(provider.sets[call % SETS])
    return graph


def microseconds_in_turns(contenders: list[Provider], repeats: int) -> list[float]:
    """Median time of one call of each; they take turns, each round begins with another one."""
    graphs = [capture(provider) for provider in contenders]
    times: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in contenders]
    for turn in range(repeats + 2):
        for place in range(len(graphs)):
            i = (place + turn) % len(graphs)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graphs[i].replay()
            end.record()
            if turn >= 2:  # the first two rounds warm the card
                times[i].append((begin, end))
    torch.cuda.synchronize()
    return [1e3 * statistics.median(a.elapsed_time(b) for a, b in pairs) / CALLS for pairs in times]


def measure_shape(
    m: int, n: int, k: int, kinds: list[str], repeats: int, sweep: bool, deadline: float
) -> tuple[list[Row], list[str]]:
    """Rows of one shape, and what went wrong."""
    contenders, failures = [], []
    for name, build in providers_of(m, n, k, kinds, sweep, deadline):
        try:
            provider = build()
            wrong = "" if name == BASELINE else disagreement(provider)
        except Exception as error:  # an experimental config may not compile, or not fit
            wrong = brief(error)
        if wrong:
            failures.append(f"{name}, {m} x {n} x {k}: {wrong}")
        else:
            contenders.append(provider)
    times = dict(zip((p.name for p in contenders), microseconds_in_turns(contenders, repeats), strict=True))
    rows = []
    for provider in contenders:
        taken = times[provider.name]
        library = times.get(LIBRARIES.get(provider.name.split()[0], ""), float("nan"))
        tflops = 2 * m * n * k / taken / 1e6
        rows.append(
            Row(m, n, k, provider.name, provider.config, taken, tflops, times[BASELINE] / taken, library / taken)
        )
    return rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the timing (default: 20)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"M (default: {TOKENS})")
    parser.add_argument("--shapes", nargs="+", metavar="N,K", help="weights to measure (default: six of Llama's)")
    parser.add_argument("--kinds", nargs="+", choices=tuple(QUANTIZERS), default=["fp8", "int8"])
    parser.add_argument("--seconds", type=float, default=60, help="when to stop compiling templates (default: 60)")
    parser.add_argument("--sweep", action="store_true", help="time every config instead of the template")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gemm: needs a CUDA card", file=sys.stderr)
        return 2
    register_lowerings()
    shapes = [tuple(map(int, text.split(","))) for text in arguments.shapes] if arguments.shapes else SHAPES
    deadline = time.monotonic() + arguments.seconds
    print(", ".join(filter(None, environment().values())))
    print(f"{'M x N x K':>20}  {'provider':<16} {'TFLOP/s':>8} {'/ BF16':>7} {'/ library':>9}  config")
    all_rows, all_failures = [], []
    for n, k in shapes:
        rows, failures = measure_shape(
            arguments.tokens, n, k, arguments.kinds, arguments.repeats, arguments.sweep, deadline
        )
        for row in rows:
            shape = f"{row.m} x {row.n} x {row.k}"
            ratios = f"{row.over_bf16:7.2f} {row.over_library:9.3f}"
            print(f"{shape:>20}  {row.provider[:16]:<16} {row.tflops:8.0f} {ratios}  {row.config}", flush=True)
        all_rows += rows
        all_failures += failures
        torch.cuda.empty_cache()
        if arguments.out:  # compiling takes minutes, and what was measured should outlive an interruption
            write_rows(arguments.out, all_rows)
    for failure in all_failures:
        print(failure, file=sys.stderr)
    return 1 if all_failures and not arguments.sweep else 0


if __name__ == "__main__":
    sys.exit(main())
