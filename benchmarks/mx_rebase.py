"""Could FP8 tensor cores multiply MXFP4 exactly? Each row of blocks, rebased into E4M3 codes with one scale.

    python benchmarks/mx_rebase.py --model SmolLM2-135M-Instruct.Q4_1.gguf --text test.txt \\
        --out benchmarks/mx_rebase_cpu.csv

E2M1 · 2^r is exact in E4M3 for r = −8 … 6, so a row whose blocks' exponents differ by at most 14 is one row of E4M3
codes with one scale, a power of two. Three questions, of the operands of one training step of a pretrained model:

* How many rows are so? Operands are those of ``qcompile_mxfp4``, ``variant="full"``.
* How many elements of the products are exact, if the codes are? FP8 products of Hopper are summed in 14 significant
  bits, of which :func:`summed` is a model. "E2M1 row" is what runs there today: one scale per row, no blocks.
* What would it save? Estimates, by the rates in ``kernels/matmul/costs.py``.

Writes a line of CSV for every role and operand, and prints the tables.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import brief, write_rows
from stored_quality import load, tokenizer_of, windows_of
from torch import Tensor, nn

from qcompile.ir.formats import get_format
from qcompile.ir.operand import Operand
from qcompile.kernels.matmul.costs import RATES, Rates
from qcompile.kernels.quantize.reference import decode, unpack
from qcompile.recipes import MXFP4

__all__ = ["SPAN", "Row", "collected", "estimates", "main", "operands", "rebased", "rows_of", "summed"]

#: Blocks of a row may have exponents that differ by as much. At r = −8 the smallest number of E2M1, ½, is E4M3's
#: smallest, 2^−9; at r = HIGHEST the largest is 384, of at most 448.
SPAN, HIGHEST = 14, 6
BLOCK, BIAS, NAN = 32, 127, 255
#: Significant bits in which FP8 products are added on Hopper, and how many at once.
SIGNIFICANT, STEP = 14, 32
#: Rows of either operand that are multiplied to see whether sums are exact.
SAMPLED = 16
ROWS = Operand.parse("e2m1 row absmax even")


def rebased(codes: Tensor, scales: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored MXFP4 codes ``[R, ⌈K/2⌉]`` and scales ``[R, ⌈K/32⌉]`` as E4M3 codes ``[R, K]`` and float32 scales
    ``[R, 1]``; how far apart exponents are, int32 ``[R]``; and bool ``[R]``, whether codes stand for the same numbers.

    Zeros do not count. Of a row that does not qualify the lower blocks are rounded. A row with a NaN never qualifies.
    """
    levels = decode(unpack(codes, 4, size), get_format("e2m1"))
    exponents = (scales.int() - BIAS).repeat_interleave(BLOCK, 1)[:, :size]
    zeros = levels == 0
    top = exponents.masked_fill(zeros, -BIAS).amax(1, keepdim=True)
    bottom = exponents.masked_fill(zeros, BIAS + 1).amin(1, keepdim=True)
    span = (top - bottom).clamp(min=0)  # of zeros alone: 0
    exact = (span <= SPAN) & ~(scales == NAN).any(1, keepdim=True)
    shifted = torch.ldexp(levels.double(), exponents - top + HIGHEST)
    scale = torch.ldexp(torch.ones_like(top, dtype=torch.float64), top - HIGHEST)
    return shifted.to(torch.float8_e4m3fn), scale.float(), span.squeeze(1), exact.squeeze(1)


def summed(a: Tensor, b: Tensor) -> Tensor:
    """a ``[M, K]`` times b ``[N, K]`` transposed, in float64, as Hopper's FP8 tensor cores add: of the sum so far and
    32 products at a time each is cut off 14 bits below the leading one of the largest, and so is their sum.
    """
    total = a.new_zeros(a.shape[0], b.shape[0])
    for left, right in zip(a.split(STEP, 1), b.split(STEP, 1), strict=True):
        addends = torch.cat([total[..., None], left[:, None] * right], -1)
        last = _last_bit(addends.abs().amax(-1, keepdim=True))
        total = ((addends / last).trunc() * last).sum(-1)
        last = _last_bit(total)
        total = (total / last).trunc() * last
    return total


def _last_bit(x: Tensor) -> Tensor:
    """The last of 14 significant bits of x, a power of two; 1 for 0."""
    exponent = torch.frexp(x.abs())[1]
    return torch.ldexp(torch.ones_like(x), exponent - SIGNIFICANT).where(x != 0, 1.0)


# --- operands of a training step ------------------------------------------------------------------------------------


def collected(model: nn.Module, windows: Tensor) -> dict[str, dict[str, Tensor]]:
    """x ``[M, K]``, w ``[N, K]`` and dy ``[M, N]`` of every linear layer of the blocks, by name, after one step of a
    transformers model on int64 ``[windows, context]``.
    """
    kept: dict[str, dict[str, Tensor]] = {}

    def keep(name: str, layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[name] = {"x": inputs[0].detach().flatten(0, -2), "w": layer.weight.detach()}
        output.register_hook(lambda dy: kept[name].update(dy=dy.flatten(0, -2)))

    layers = {name: layer for name, layer in model.model.layers.named_modules() if isinstance(layer, nn.Linear)}
    handles = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    return kept


def operands(tensors: dict[str, Tensor]) -> dict[str, dict[str, tuple[Tensor, Operand]]]:
    """By role: what the two operands of its product are made of, contraction last, and how they are quantized."""
    x, w, dy = (tensors[name] for name in ("x", "w", "dy"))
    full = MXFP4.override({"variant": "full"})
    forward, again = full.activation, full.wgrad_activation
    assert forward is not None
    assert again is not None
    return {
        "fprop": {"X": (x, forward), "W": (w, forward)},
        "dgrad": {"dY": (dy, again), "W": (w.t(), again)},
        "wgrad": {"dY": (dy.t(), again), "X": (x.t(), again)},
    }


def quantized(x: Tensor, operand: Operand) -> tuple[Tensor, Tensor]:
    """Codes and scales, both as they are stored, along the last axis."""
    seed = torch.zeros(1, dtype=torch.int64) if operand.quantizer.draws else None
    text = str(operand.quantizer)
    transform = str(operand.transform.on(x.shape[-1]))
    codes, scales = torch.ops.qcompile.quantize(x.contiguous(), text, -1, None, seed, None, transform)
    return codes, scales


@dataclass(frozen=True)
class Row:
    """Of one operand of one role, over all layers; of a product, the same in both of its rows.

    Attributes:
        rows: how many there are, of blocks along the contraction.
        qualify: of these, the part that one E4M3 row with one scale stands for exactly.
        median, most: how far apart the exponents of a row's blocks are, in binades.
        exact: the part of sampled elements of the product that 14 bits add up without an error.
        error: relative root mean square error of all of them.
    """

    role: str
    operand: str
    rows: int
    qualify: float
    median: float
    most: int
    exact: float
    error: float


def rows_of(kept: dict[str, dict[str, Tensor]]) -> Iterator[Row]:
    """The two operands of every role, and then those of a forward with one scale per row of E2M1."""
    for role in ("fprop", "dgrad", "wgrad"):
        spans: dict[str, list[Tensor]] = {}
        qualify: dict[str, list[Tensor]] = {}
        sums = []
        for tensors in kept.values():
            pair = []
            for name, (x, operand) in operands(tensors)[role].items():
                codes, scale, span, exact = rebased(*quantized(x, operand), x.shape[-1])
                spans.setdefault(name, []).append(span)
                qualify.setdefault(name, []).append(exact)
                pair.append(_sampled((codes.double() * scale)[exact]))
            sums.append(_errors(*pair))
        of_product = _together(sums)
        for name, parts in spans.items():
            span, exact = torch.cat(parts), torch.cat(qualify[name])
            share = exact.double().mean().item()
            yield Row(role, name, len(span), share, span.double().median().item(), int(span.max()), *of_product)
    by_rows = []
    for tensors in kept.values():
        pair = [quantized(tensors[name], ROWS)[0] for name in ("x", "w")]
        size = tensors["x"].shape[-1]
        by_rows.append(
            _errors(*(_sampled(decode(unpack(codes, 4, size), get_format("e2m1")).double()) for codes in pair))
        )
    count = sum(len(tensors["x"]) for tensors in kept.values())
    yield Row("fprop", "E2M1 row", count, 1.0, 0.0, 0, *_together(by_rows))


def _sampled(rows: Tensor) -> Tensor:
    """Evenly spread ones."""
    return rows[:: max(1, len(rows) // SAMPLED)][:SAMPLED]


def _errors(a: Tensor, b: Tensor) -> tuple[int, int, float, float]:
    """How many elements of a product are exact, of how many; the sum of squared errors, and of squares."""
    expected, found = a @ b.t(), summed(a, b)
    squares = (found - expected).square().sum().item(), expected.square().sum().item()
    return int((found == expected).sum()), expected.numel(), *squares


def _together(products: Sequence[tuple[int, int, float, float]]) -> tuple[float, float]:
    """The share of exact elements, and the mean over products of their relative errors."""
    errors = [math.sqrt(wrong / all_) for _, _, wrong, all_ in products if all_]
    return sum(p[0] for p in products) / sum(p[1] for p in products), sum(errors) / len(errors)


# --- what it would save ---------------------------------------------------------------------------------------------


def estimates(shape: tuple[int, int, int], rates: Rates) -> dict[str, float]:
    """Microseconds of a product (M, N, K) of two MXFP4 operands, from stored codes on.

    Where sums leave the tensor cores after every block, each element takes an instruction of a thread per block.
    """
    m, n, k = shape
    operations, elements = 2.0 * m * n * k, k * (m + n)
    eight_bit = rates.passes(1.5 * elements, 2) + rates.product_8bit(operations, m * n)
    added = m * n * k / BLOCK / rates.instructions
    twice = rates.passes(1.5 * elements + k * (m + n), 2)
    return {
        "decoded to BF16": rates.passes(2.5 * elements, 2) + rates.product_decoded(operations, torch.bfloat16),
        "rebased, summed in 14 bits": eight_bit,
        "rebased, summed in FP32 by blocks, both at once": max(eight_bit, rates.passes(1.5 * elements, 2) + added),
        "rebased, summed in FP32 by blocks, one after the other": eight_bit + added,
        "one operand in two summands, 14 bits": twice + rates.product_8bit(2 * operations, m * n),
        "both in two summands, 14 bits": twice + rates.product_8bit(4 * operations, m * n),
    }


def table(found: Sequence[Row]) -> str:
    lines = ["| product | operand | rows | rows that qualify | binades, median | most | exact sums | error |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in found:
        cells = f"{row.rows} | {row.qualify:.3%} | {row.median:.0f} | {row.most} | {row.exact:.1%} | {row.error:.1e}"
        lines.append(f"| {row.role} | {row.operand} | {cells} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a transformers model, or a GGUF file")
    parser.add_argument("--text", type=Path, required=True, help=".xz or plain")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--tokens", type=int, default=1024, help="of the step (default: 1024)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window (default: 512)")
    given = parser.parse_args(argv)
    try:
        windows = windows_of(given.text, tokenizer_of(given.model), given.tokens, given.context)
        model: Any = load(given.model, "cpu").float()
    except (ValueError, OSError) as error:
        print(f"mx_rebase: {brief(error)}", file=sys.stderr)
        return 2
    given.out.parent.mkdir(parents=True, exist_ok=True)
    found = list(rows_of(collected(model, windows)))
    write_rows(given.out, found)
    print(table(found))
    for shape in ((16384, 4096, 4096), (16384, 14336, 4096)):
        print(f"\n{shape}, {RATES[0].card}, microseconds:")
        for name, microseconds in estimates(shape, RATES[0]).items():
            print(f"{microseconds:8.0f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
