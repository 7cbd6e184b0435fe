"""Quantize kernels against a device copy of the same number of bytes.

    python benchmarks/quantize_kernels.py --out benchmarks/h200/quantize_kernels.csv

Every kernel is first compared with its plain-torch reference on the same card, bit for bit, and only then timed. Bytes
are the fewest possible: each input read once, each output written once. The copy moves as many, in the same run, with
the same harness (measure.py): buffers rotate, so that nothing is read from cache.

The producers fused by Inductor keep float32 where eager torch rounds to bfloat16; of their codes, up to 2 % may differ
from the reference's, which is what a last bit moves across a decision threshold.

Writes the CSV file, a plot beside it (.png), and what outlier clamping adds to a forward linear (_occ.csv).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from measure import (
    copy_microseconds,
    environment,
    failure,
    fresh_log,
    microseconds,
    quiet_stderr,
    rotations,
    write_rows,
)
from torch import Tensor

from qcompile.kernels.lowerings import register_lowerings
from qcompile.kernels.register import REFERENCES

__all__ = ["CASES", "Case", "OccCost", "Row", "main", "measure_all", "occ_costs"]

FP4, FP8 = "e2m1 row absmax even", "e4m3 row absmax even"
CLAMP = "occ(alpha=0.99,per=row,compensate=1)"
CLAMP_TENSOR = "occ(alpha=0.99,per=tensor,compensate=1)"
OCC = "e2m1 row absmax even; ste; occ(alpha=0.99,residual=e4m3)"

ACTIVATIONS = [(16384, 4096), (16384, 14336), (16384, 2048)]
WEIGHTS = [(14336, 4096)]
#: Of small models, whose rows are short.
SHORT_ROWS = [(32768, 640), (16384, 1024), (32768, 1792)]
#: In and out features of the linears that the cost of outlier clamping is set against.
LINEARS = [(4096, 4096), (4096, 14336), (14336, 4096)]

#: Largest share of a fused producer's codes that may differ from the reference's.
FUSED_BOUND = 0.02


# --- what is measured -----------------------------------------------------------------------------------------------


def normal(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    """One bfloat16 matrix, with rows of different size and a few columns of outliers, as activations have them."""
    x = torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device).exp()
    x[:, :: max(1, columns // 8)] *= 20
    return (x.to(torch.bfloat16),)


def with_fold(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    return (*normal(rows, columns, device), torch.rand(columns, device=device) + 0.5)


def with_folds(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    return (*with_fold(rows, columns, device), torch.rand(rows, device=device) + 0.5)


def packed_codes(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    """Packed FP4 codes of ``columns`` elements per row."""
    return (torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device=device),)


def two(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    return (*normal(rows, columns, device), *normal(rows, columns, device))


def with_weight(rows: int, columns: int, device: str) -> tuple[Tensor, ...]:
    return (*normal(rows, columns, device), (torch.rand(columns, device=device) + 0.5).to(torch.bfloat16))


#: The ops, and what defines them, under the same names.
OPS: Any = torch.ops.qcompile
DEFINED: Any = SimpleNamespace(**REFERENCES)


@dataclass(frozen=True)
class Case:
    """``call(kernels, *inputs(rows, columns, device))``; the references define the right answer.

    ``differs(actual, expected)`` says why an answer is wrong, "" if it is right. ``compiled``: through Inductor.
    """

    call: Callable[..., Any]
    inputs: Callable[[int, int, str], tuple[Tensor, ...]]
    shapes: Sequence[tuple[int, int]]
    differs: Callable[[Any, Any], str]
    compiled: bool = False

    def runner(self) -> Callable[..., Any]:
        call = self.call

        def run(*tensors: Tensor) -> Any:
            return call(OPS, *tensors)

        return torch.compile(run, fullgraph=True, dynamic=False) if self.compiled else run


def bitwise(actual: Any, expected: Any) -> str:
    """Why two results are not the same bits; "" if they are."""
    for position, (a, e) in enumerate(zip(tensors_of(actual), tensors_of(expected), strict=True)):
        if a.shape != e.shape or a.dtype != e.dtype:
            return f"output {position} is {a.dtype} {list(a.shape)}, not {e.dtype} {list(e.shape)}"
        differing = int((as_integers(a) != as_integers(e)).sum())
        if differing:
            return f"output {position} differs in {differing} of {a.numel()} elements"
    return ""


def clamps_differently(actual: Any, expected: Any) -> str:
    """As :func:`bitwise`, for any order of the residual, and wherever its entries of value 0 stand."""

    def dense(result: Any) -> tuple[Tensor, Tensor]:
        clamped, values, positions = result
        shape = clamped.shape if values.dim() == clamped.dim() else (clamped.numel(),)  # of a row, or of all elements
        residual = values.new_zeros(shape).scatter_add_(-1, positions.to(torch.int64), values)
        return clamped, residual

    return bitwise(dense(actual), dense(expected))


def as_integers(x: Tensor) -> Tensor:
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def mostly_bitwise(actual: Any, expected: Any, codes: Sequence[tuple[int, int]] = ((0, 1), (2, 2))) -> str:
    """As :func:`bitwise`, for the 8-bit and the packed codes of a fused producer: all but FUSED_BOUND of them.

    ``codes``: which results they are, and how many of them are in a byte.
    """
    for position, codes_per_byte in codes:
        a, e = as_integers(actual[position]), as_integers(expected[position])
        if a.shape != e.shape:
            return f"output {position} has shape {list(a.shape)}, not {list(e.shape)}"
        share = (a != e).float().mean().item()
        if share > codes_per_byte * FUSED_BOUND:
            return f"output {position} differs in {100 * share:.1f} % of its elements"
    return ""


def rmsnorm_quantize(kernels: Any, x: Tensor, weight: Tensor) -> Any:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return kernels.quantize_8bit(normed.to(x.dtype) * weight, FP4, True)


def swiglu_quantize(kernels: Any, gate: Tensor, up: Tensor) -> Any:
    return kernels.quantize_8bit(F.silu(gate) * up, FP4, True)


#: SwiGLU as `fuse_producers` writes it.
SWIGLU = "round(a); neg(%0); exp(%1); add(%2, 1.0); div(%0, %3); round(%4) bfloat16; mul(%5, b) bfloat16"
#: Of models of d=640, 1024, 2048 and 4096.
INNER = [(32768, 1792), (16384, 4096), (16384, 8192), (16384, 14336)]


def swiglu_compensated(kernels: Any, gate: Tensor, up: Tensor) -> Any:
    return kernels.quantize_compensated(F.silu(gate) * up, OCC, -1)


CASES: dict[str, Case] = {
    "quantize_8bit e2m1": Case(lambda k, x: k.quantize_8bit(x, FP4, False), normal, ACTIVATIONS, bitwise),
    "quantize_8bit e2m1 packed": Case(lambda k, x: k.quantize_8bit(x, FP4, True), normal, ACTIVATIONS, bitwise),
    "quantize_8bit e4m3": Case(lambda k, x: k.quantize_8bit(x, FP8, False), normal, ACTIVATIONS, bitwise),
    "quantize_8bit e4m3 fold": Case(
        lambda k, x, fold: k.quantize_8bit(x, FP8, False, fold), with_fold, ACTIVATIONS, bitwise
    ),
    "quantize_8bit_pair e4m3 folds": Case(
        lambda k, x, fold, fold_rows: k.quantize_8bit_pair(x, FP8, fold, fold_rows), with_folds, ACTIVATIONS, bitwise
    ),
    "recode e2m1": Case(lambda k, x: k.recode(x, FP4, 2 * x.shape[1], False), packed_codes, ACTIVATIONS, bitwise),
    "recode e2m1 transposed": Case(
        lambda k, x: k.recode(x, FP4, 2 * x.shape[1], True), packed_codes, ACTIVATIONS, bitwise
    ),
    "quantize_compensated e2m1": Case(
        lambda k, x: k.quantize_compensated(x, OCC, -1), normal, SHORT_ROWS + ACTIVATIONS, bitwise
    ),
    "clamp_outliers": Case(lambda k, x: k.clamp_outliers(x, CLAMP, -1), normal, ACTIVATIONS, clamps_differently),
    "clamp_outliers per=tensor": Case(
        lambda k, x: k.clamp_outliers(x, CLAMP_TENSOR, -1), normal, ACTIVATIONS, clamps_differently
    ),
    "clamp_outliers per=tensor, two topk": Case(  # what the kernel replaces: the reference, whoever is asked
        lambda k, x: DEFINED.clamp_outliers(x, CLAMP_TENSOR, -1), normal, ACTIVATIONS, clamps_differently
    ),
    "weight quantize_8bit e2m1": Case(lambda k, x: k.quantize_8bit(x, FP4, False), normal, WEIGHTS, bitwise),
    "weight quantize_8bit_transposed e2m1": Case(
        lambda k, x: k.quantize_8bit_transposed(x, FP4), normal, WEIGHTS, bitwise
    ),
    "rmsnorm · weight → quantize_8bit packed": Case(
        rmsnorm_quantize, with_weight, [(16384, 4096)], mostly_bitwise, compiled=True
    ),
    "silu(gate) · up → quantize_8bit packed": Case(
        swiglu_quantize, two, [(16384, 14336)], mostly_bitwise, compiled=True
    ),
    # Two kernels, and one. Bytes are those of gate, up and codes, so times can be compared, and shares of a copy too.
    "silu(gate) · up → quantize_compensated": Case(
        swiglu_compensated, two, INNER, partial(mostly_bitwise, codes=((0, 1),)), compiled=True
    ),
    "silu(gate) · up in quantize_produced": Case(
        lambda k, gate, up: k.quantize_produced(gate, up, None, None, SWIGLU, OCC),
        two,
        INNER,
        partial(mostly_bitwise, codes=((0, 1),)),
    ),
}


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One kernel on one shape. ``gb_per_s`` counts the fewest bytes; ``of_copy`` is its ratio to the copy's."""

    kernel: str
    rows: int
    columns: int
    status: str = "ok"
    bytes: int = 0
    us: float = math.nan
    gb_per_s: float = math.nan
    copy_gb_per_s: float = math.nan
    of_copy: float = math.nan


def measure_case(name: str, case: Case, run: Callable[..., Any], shape: tuple[int, int], device: str) -> Row:
    """Compare with the reference on fresh data, then time. Raises what the kernel raises."""
    row = Row(name, *shape)
    inputs = [case.inputs(*shape, device)]
    result = run(*inputs[0])
    why = case.differs(result, case.call(DEFINED, *inputs[0]))
    if why:
        row.status = f"FAILED: {why}"
        return row
    row.bytes = sum(t.nbytes for t in (*inputs[0], *tensors_of(result)))
    del result
    inputs += [case.inputs(*shape, device) for _ in range(rotations(row.bytes) - 1)]
    row.us = microseconds([partial(run, *tensors) for tensors in inputs])
    copy_us = copy_microseconds(row.bytes)
    row.gb_per_s, row.copy_gb_per_s, row.of_copy = row.bytes / row.us / 1e3, row.bytes / copy_us / 1e3, copy_us / row.us
    return row


def measure_all(cases: Mapping[str, Case], scale: int, device: str, log: Path) -> Iterator[Row]:
    """A row per case and shape, shapes divided by ``scale``; a failing one is one line, and the others go on."""
    register_lowerings()
    for name, case in cases.items():
        run = case.runner()
        for rows, columns in case.shapes:
            shape = rows // scale, columns // scale
            try:
                with quiet_stderr(log):
                    row = measure_case(name, case, run, shape, device)
            except Exception as error:
                row = Row(name, *shape, status=failure(error, log, f"{name} {shape}"))
            if device == "cuda":
                torch.cuda.empty_cache()
            yield row


@dataclass
class OccCost:
    """What outlier clamping adds: to the plain quantize, as a share of that plus the FP8 product it feeds."""

    tokens: int
    features_in: int
    features_out: int
    quantize_us: float
    compensated_us: float
    product_us: float
    added: float


def occ_costs(rows: Sequence[Row], tokens: int = 16384) -> Iterator[OccCost]:
    """The cost on a forward linear, from measured rows; the product is cuBLASLt's row-wise scaled FP8 one."""
    times = {(row.kernel, row.rows, row.columns): row.us for row in rows if row.status == "ok"}
    for inner, outer in LINEARS:
        plain = times.get(("quantize_8bit e2m1", tokens, inner))
        compensated = times.get(("quantize_compensated e2m1", tokens, inner))
        if plain is None or compensated is None:
            continue
        product = product_microseconds(tokens, inner, outer)
        yield OccCost(tokens, inner, outer, plain, compensated, product, (compensated - plain) / (plain + product))


def product_microseconds(rows: int, inner: int, columns: int) -> float:
    """``torch._scaled_mm`` of E2M1 values in E4M3, row-wise scales, fast accumulation, BF16 out."""
    sides = [OPS.quantize_8bit(*normal(n, inner, "cuda"), FP4, False) for n in (rows, columns)]
    (a, scale_a, _), (b, scale_b, _) = sides
    multiply = partial(torch._scaled_mm, a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True)
    return microseconds([multiply])


# --- results --------------------------------------------------------------------------------------------------------


def line(row: Row) -> str:
    head = f"{row.kernel:46} {f'{row.rows}×{row.columns}':>12}"
    if row.status != "ok":
        return f"{head} {row.status}"
    return f"{head} {row.us:9.1f} {row.gb_per_s:8.0f} {row.copy_gb_per_s:8.0f} {100 * row.of_copy:7.1f} %"


HEAD = f"{'kernel':46} {'shape':>12} {'µs':>9} {'GB/s':>8} {'copy':>8} {'of copy':>9}"


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Bars of the share of copy bandwidth, with the goals of 70 and 80 %."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.status == "ok"]
    figure = Figure(figsize=(9, 1 + 0.28 * len(measured)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.kernel}  {row.rows}×{row.columns}" for row in measured]
    bars = axes.barh(names, [100 * row.of_copy for row in measured], color="tab:blue")
    axes.bar_label(bars, labels=[f" {row.gb_per_s:.0f} GB/s, {row.us:.0f} µs" for row in measured], fontsize=7)
    for goal in (70, 80):
        axes.axvline(goal, color="0.4", linestyle=":", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.01)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("% of a device copy of as many bytes (dotted: 70 and 80 %)", fontsize=8)
    where = environment()
    axes.set_title(f"{where['card']}, torch {where['torch']}, {where['date']}", fontsize=9, loc="left")
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", type=int, default=1, help="divide all shapes by this, to try things out")
    parser.add_argument("--only", default="", help="leave out all kernels whose names do not contain this")
    parser.add_argument("--out", type=Path, default=Path("quantize_kernels.csv"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("quantize_kernels: needs a CUDA card (or --device cpu)", file=sys.stderr)
        return 2
    log = fresh_log(given.out)
    rows: list[Row] = []
    print(HEAD)
    cases = {name: case for name, case in CASES.items() if given.only in name}
    for row in measure_all(cases, given.scale, given.device, log):
        rows.append(row)
        write_rows(given.out, rows)
        print(line(row), flush=True)
    if any(row.status == "ok" for row in rows):
        plot(given.out.with_suffix(".png"), rows)
    costs = list(occ_costs(rows)) if given.device == "cuda" else []
    if costs:
        write_rows(given.out.with_stem(f"{given.out.stem}_occ"), costs)
        for cost in costs:
            shape = f"{cost.tokens}×{cost.features_in}→{cost.features_out}"
            print(
                f"OCC adds {100 * cost.added:.1f} % to the forward linear {shape}:"
                f" {cost.compensated_us:.0f} µs instead of {cost.quantize_us:.0f}, product {cost.product_us:.0f}"
            )
    return 0 if all(row.status == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
