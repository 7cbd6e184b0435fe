"""Products of groups (mixtures of experts) on 8-bit tensor cores, beside BF16 and torchao's FP8.

    python benchmarks/grouped.py --out benchmarks/h200/grouped.csv

M = 131,072 rows in 1, 4, 16 and 64 groups: equal ones, and ragged ones, of which some are empty and none begins at a
multiple of 16. First, of 4 and 64 equal groups, one layer's forward and backward, compiled: by Inductor in BF16, by the
backend with an FP8 backward, and torchao's row-wise FP8 training. Then the kernels alone of each of the three products:
BF16's, ours, and the FP8 one that torchao calls, on the same codes; and what quantizes operands. torchao's takes groups
of multiples of 16 rows only, and none without rows; it is not called with others, which end the process. ``--sweep``
times ours with every config that fits.

Ours is compared with the dense kernel on some group, bit for bit, before it is timed, and the other FP8 kernel with
ours, to the rounding of results. An arm that fails or would begin after ``--limit`` seconds is a line that says so. The
CSV file is written after every arm.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import failure, fresh_log, milliseconds, quiet_stderr, write_rows
from torch import Tensor
from torchao_experts import fp8_product

import qcompile.kernels.register  # noqa: F401  (kernels of the qcompile:: ops)

__all__ = ["Problem", "Row", "arms", "main", "sizes_of"]

#: Relative, of two results in bfloat16 whose sums were rounded apart.
ROUNDING = 2**-7
QUANTIZER, GRADIENT = "e2m1 row absmax even", "e4m3 row absmax even"
SHAPES = ((8192, 5120), (2048, 7168))
GROUPS = (1, 4, 16, 64)
#: Of layers, which are compiled for each of them.
LAYER_GROUPS = (4, 64)


@dataclass(frozen=True)
class Problem:
    """X ``[rows, k]`` times the matrix ``[n, k]`` of each group."""

    rows: int
    groups: int
    n: int
    k: int
    ragged: bool
    device: str

    @property
    def operations(self) -> float:
        """Of one of the three products."""
        return 2.0 * self.rows * self.n * self.k


def sizes_of(problem: Problem) -> list[int]:
    """Equal, or falling off as 1 / place, the last eighth of the groups empty."""
    if not problem.ragged:
        return [problem.rows // problem.groups] * problem.groups
    used = problem.groups - problem.groups // 8
    weights = [1 / (place + 1) for place in range(used)]
    sizes = [int(problem.rows * weight / sum(weights)) | 1 for weight in weights]
    sizes[0] += problem.rows - sum(sizes)
    return sizes + [0] * (problem.groups - used)


@dataclass
class Row:
    """A row of the CSV file. ``speedup``: BF16's time of the same product over this one's."""

    n: int
    k: int
    groups: int
    sizes: str
    product: str
    arm: str
    status: str = "ok"
    microseconds: float = math.nan
    tflops: float = math.nan
    speedup: float = math.nan


@dataclass
class Tensors:
    """Operands in BF16, ends of groups, and, made when first asked for, everything that ours multiplies."""

    problem: Problem

    def __post_init__(self) -> None:
        p = self.problem
        generator = torch.Generator(p.device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=p.device, dtype=torch.bfloat16)

        self.x, self.dy = normal(p.rows, p.k), normal(p.rows, p.n)
        self.w = normal(p.groups, p.n, p.k) / p.k**0.5
        ends = list(itertools.accumulate(sizes_of(p)))
        self.offs = torch.tensor(ends, dtype=torch.int32, device=p.device)
        ops = torch.ops.qcompile
        flat = self.w.view(-1, p.k)
        self.quantize: dict[str, Callable[[], Any]] = {
            "x": partial(ops.quantize_8bit, self.x, QUANTIZER, True),
            "w": partial(ops.quantize_8bit, flat, QUANTIZER, True),
        }
        self.codes_x, self.scale_x, stored_x = self.quantize["x"]()
        codes_w, scale_w, stored_w = self.quantize["w"]()
        self.codes_w, self.scale_w = codes_w.view(p.groups, p.n, p.k), scale_w.view(p.groups, p.n, 1)
        stored_w = stored_w.view(p.groups, p.n, -1)
        self.quantize |= {
            "dy by rows": partial(ops.quantize_groups, self.dy, GRADIENT, 1, self.offs, self.scale_w),
            "dy by columns": partial(ops.quantize_groups, self.dy, GRADIENT, 0, self.offs, self.scale_x),
            "dy by both": partial(ops.quantize_groups_pair, self.dy, GRADIENT, self.offs, self.scale_w, self.scale_x),
            "w transposed": partial(ops.recode, stored_w, QUANTIZER, p.k, True),
            "x transposed": partial(ops.recode, stored_x, QUANTIZER, p.k, True, self.offs),
        }
        rows, columns = self.quantize["dy by rows"](), self.quantize["dy by columns"]()
        one = torch.ones(1, 1, device=p.device)
        e4m3 = torch.float8_e4m3fn
        self.products = {
            "fprop": (self.codes_x, self.codes_w, self.offs, self.scale_x, self.scale_w, torch.bfloat16),
            "dgrad": (rows[0].view(e4m3), self.quantize["w transposed"](), self.offs, rows[1], one, torch.bfloat16),
            "wgrad": (
                columns[0].view(e4m3),
                self.quantize["x transposed"](),
                self.offs,
                columns[1],
                one,
                torch.bfloat16,
            ),
        }

    def bf16(self, product: str) -> Callable[[], Any]:
        operands = {
            "fprop": (self.x, self.w.transpose(-2, -1)),
            "dgrad": (self.dy, self.w),
            "wgrad": (self.dy.t(), self.x),
        }
        return partial(torch._grouped_mm, *operands[product], offs=self.offs)

    def check(self) -> None:
        """The largest group's rows of the forward, against the dense kernel. Raises ``ValueError`` if they differ."""
        sizes = sizes_of(self.problem)
        group = max(range(len(sizes)), key=sizes.__getitem__)
        start = sum(sizes[:group])
        own = slice(start, start + min(sizes[group], 1024))
        got = torch.ops.qcompile.mm_8bit_grouped(*self.products["fprop"])[own]
        dense = torch.ops.qcompile.mm_8bit(
            self.codes_x[own], self.codes_w[group], self.scale_x[own], self.scale_w[group], torch.float32
        )
        # Exact sums; the dense product may be another kernel's, which rounds them to bfloat16 alike.
        if not torch.equal(got, dense.to(torch.bfloat16)):
            msg = f"group {group} is not the dense product"
            raise ValueError(msg)

    def scaled(self, product: str) -> Callable[[], Any]:
        """The kernel that torchao calls, on the operands of ours. Raises ``ValueError`` if their results differ."""
        sizes = sizes_of(self.problem)
        if any(size % 16 or not size for size in sizes):
            msg = "takes groups of multiples of 16 rows only, none of them empty"
            raise ValueError(msg)
        a, b, offs, scale_a, scale_b, out_dtype = self.products[product]
        if product == "wgrad":  # ours are padded per group, which changes nothing of multiples of 128
            a, b = (codes[:, : self.problem.rows].contiguous() for codes in (a, b))
            scales = [scale_a.flatten(), scale_b.expand(self.problem.groups, b.shape[0], 1).flatten()]
        else:
            scales = [scale_a.flatten(), scale_b.expand(*b.shape[:2], 1).flatten(1)]
        scales = [scale.contiguous() for scale in scales]
        call = partial(
            torch._scaled_grouped_mm,
            *(a.view(torch.float8_e4m3fn), b.view(torch.float8_e4m3fn).transpose(-2, -1), *scales, offs),
            out_dtype=out_dtype,
            use_fast_accum=True,
        )
        got, expected = call().float(), torch.ops.qcompile.mm_8bit_grouped(*self.products[product]).float()
        if not (error := ((got - expected).norm() / expected.norm()).item()) < ROUNDING:
            msg = f"differs from ours by {error:.3g}"
            raise ValueError(msg)
        return call

    # --- a layer, compiled ---

    def layer(self, compiled: Callable[..., Tensor]) -> Callable[[], Any]:
        x, w = self.x.requires_grad_(), self.w.requires_grad_()

        def forward_backward() -> Any:
            return torch.autograd.grad(compiled(x, w, self.offs), (x, w), self.dy)

        return forward_backward


def product(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(-2, -1), offs=offs)


def torchao_product(x: Tensor, w: Tensor, offs: Tensor) -> Tensor:
    return fp8_product(x, w.transpose(-2, -1), offs)


PRODUCTS = ("fprop", "dgrad", "wgrad")
OPTIONS = {"activation": {"outliers": None}, "backward": "fp8"}


#: Product, arm, and what makes the call that is timed.
ProductArm = tuple[str, str, Callable[[], Callable[[], Any]]]


def arms(tensors: Tensors) -> Iterator[ProductArm]:
    op = torch.ops.qcompile.mm_8bit_grouped
    for name in PRODUCTS:
        yield name, "bf16", partial(tensors.bf16, name)
        yield name, "ours", lambda name=name: partial(op, *tensors.products[name])
        yield name, "torchao", partial(tensors.scaled, name)
    if not tensors.problem.ragged:
        for what in tensors.quantize:
            yield f"quantize {what}", "ours", lambda what=what: tensors.quantize[what]


def layer_arms(tensors: Tensors) -> Iterator[ProductArm]:
    ours = partial(torch.compile, backend="qcompile_fp4", options=OPTIONS)
    for arm, function, compile_by in (
        ("bf16", product, torch.compile),
        ("ours", product, ours),
        ("torchao", torchao_product, torch.compile),
    ):
        yield "forward + backward", arm, partial(layer_of, tensors, function, compile_by)


def layer_of(tensors: Tensors, function: Callable[..., Tensor], compile_by: Callable[..., Any]) -> Callable[[], Any]:
    return tensors.layer(compile_by(function, dynamic=False))


def sweep(tensors: Tensors) -> Iterator[ProductArm]:
    from qcompile.kernels.matmul import gluon, grouped

    for name in PRODUCTS:
        contraction = name == "wgrad"
        kernels: list[tuple[str, Callable[..., Tensor], Any]] = [
            *(("in Gluon ", gluon.mm_8bit_grouped, config) for config in gluon.CONFIGS),
            *(("", grouped.mm_8bit_grouped, c) for c in grouped.CONFIGS if not (contraction and c.flatten)),
        ]
        for language, kernel, config in kernels:
            call = partial(kernel, *tensors.products[name], config=config)
            yield name, f"ours {language}{config}", lambda call=call: call


def measured(make: Callable[[], Callable[[], Any]], cuda: bool, repeats: int) -> float:
    """Median microseconds of a call, after two that compile and warm up."""
    call = make()
    for _ in range(2):
        call()
    return 1e3 * statistics.median(milliseconds(call, repeats, cuda))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--shapes", nargs="*", help="N,K", default=[f"{n},{k}" for n, k in SHAPES])
    parser.add_argument("--groups", nargs="*", type=int, default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=float, default=110.0, help="seconds after which no arm begins")
    parser.add_argument("--sweep", action="store_true", help="every config of ours; needs a card")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("grouped.csv"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("grouped: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    log, begun, rows = fresh_log(given.out), time.perf_counter(), list[Row]()
    shapes = [tuple(map(int, shape.split(","))) for shape in given.shapes]
    problems = [
        Problem(given.rows, groups, n, k, ragged, given.device)
        for (n, k), groups, ragged in itertools.product(shapes, given.groups, (False, True))
        if groups > 1 or not ragged
    ]
    layers = [problem for problem in problems if not problem.ragged and problem.groups in LAYER_GROUPS]
    swept = problems if given.sweep else []
    for problem, of in [(p, of) for ps, of in ((layers, layer_arms), (problems, arms), (swept, sweep)) for p in ps]:
        for row in measure(problem, of, given, log, begun):
            rows.append(row)
            write_rows(given.out, rows)
            print(line(row), flush=True)
    return 0 if all(row.status == "ok" for row in rows) else 1


def measure(
    problem: Problem,
    arms_of: Callable[[Tensors], Iterator[ProductArm]],
    given: argparse.Namespace,
    log: Path,
    begun: float,
) -> Iterator[Row]:
    torch.compiler.reset()
    sizes, bf16 = "ragged" if problem.ragged else "equal", dict[str, float]()
    head = (problem.n, problem.k, problem.groups, sizes)
    try:
        with quiet_stderr(log):
            tensors = Tensors(problem)
            tensors.check()
    except Exception as error:
        yield Row(*head, "all", "ours", failure(error, log, str(problem)))
        return
    for name, arm, make in arms_of(tensors):
        row = Row(*head, name, arm)
        if time.perf_counter() - begun > given.limit:
            row.status = f"left out: {given.limit:g} s are over"
            yield row
            return
        try:
            with quiet_stderr(log):
                row.microseconds = measured(make, given.device == "cuda", given.repeats)
        except Exception as error:
            row.status = failure(error, log, f"{problem} {name} {arm}")
        if arm == "bf16":
            bf16[name] = row.microseconds
        if not name.startswith("quantize"):
            count = 3 if name == "forward + backward" else 1
            row.tflops = count * problem.operations / row.microseconds / 1e6
            row.speedup = bf16.get(name, math.nan) / row.microseconds
        yield row


def line(row: Row) -> str:
    head = f"{row.n:5} × {row.k:5}  E {row.groups:3} {row.sizes:6} {row.product:20} {row.arm:44}"
    if row.status != "ok":
        return f"{head} {row.status}"
    return f"{head} {row.microseconds:10.0f} µs {row.tflops:8.0f} TFLOP/s {row.speedup:6.2f}×"


if __name__ == "__main__":
    sys.exit(main())
