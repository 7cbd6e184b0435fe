"""2:4 sparse weights on sparse tensor cores (cuSPARSELt, through torch) against the dense product of the same codes.

    python benchmarks/sparse_24.py --out benchmarks/h200/sparse_24.csv

Codes are integers from −7 to 7, which FP8 and INT8 hold exactly; of four neighbours in a row of the weight the last two
are 0. cuSPARSELt puts the sparse operand first and has no scales of rows, so its product is the least that such a layer
takes. The dense one is ``_scaled_mm`` with scales of rows (FP8) or our own INT8 kernel. cuSPARSELt's own search chooses
its algorithm; both products are compared with float64 on some tokens before they are timed.

A weight that is trained changes with every step and is compressed again: ``with_compression`` counts that. Writes a
CSV file: a row for every shape and type.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import brief, environment, microseconds, rotations, write_rows
from torch import Tensor

from qcompile.kernels.matmul import providers

__all__ = ["Row", "main", "measure_shape"]

#: (N, K) of the weight; M is the tokens of a step.
SHAPES = [(2048, 2048), (2048, 8192), (4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192)]
TOKENS = 16384
#: Rows of the output that are compared with float64.
CHECKED = 128
BF16 = torch.bfloat16
TYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Row:
    """One weight in one type; microseconds, and times of the dense product over those of the sparse one."""

    n: int
    k: int
    kind: str
    algorithm: int
    dense: float
    sparse: float
    compress: float
    gain: float
    gain_with_compression: float


def codes(rows: int, columns: int, dtype: torch.dtype, sparse: bool) -> Tensor:
    values = torch.randint(-7, 8, (rows, columns), device="cuda")
    if sparse:
        values.view(-1, 4)[:, 2:] = 0
    return values.to(torch.float32).to(dtype)


def dense_product(x: Tensor, weight: Tensor, scale_x: Tensor, scale_w: Tensor) -> Tensor:
    if x.dtype == torch.int8:
        return providers.mm_8bit(x, weight, scale_x, scale_w, BF16)
    return torch._scaled_mm(x, weight.t(), scale_x, scale_w.t(), None, None, BF16, use_fast_accum=True)


def sparse_product(compressed: Tensor, x: Tensor, algorithm: int) -> Tensor:
    """``weight @ xᵀ``: [N, M]."""
    return torch._cslt_sparse_mm(compressed, x.t(), out_dtype=BF16, alg_id=algorithm)


def is_right(product: Tensor, x: Tensor, weight: Tensor) -> bool:
    """Whether [M, N] is x @ weightᵀ on some rows, to two roundings to bfloat16; the sums are exact."""
    expected = x[:CHECKED].float().double() @ weight.float().double().t()
    return bool(((product[:CHECKED].double() - expected).abs() <= expected.abs() * 2**-7).all())


def measure_shape(m: int, n: int, k: int, kind: str) -> Row:
    """Raises ``RuntimeError`` if a product is wrong."""
    dtype = TYPES[kind]
    count = rotations(m * k + n * k + 2 * m * n)
    inputs = [codes(m, k, dtype, sparse=False) for _ in range(count)]
    weights = [codes(n, k, dtype, sparse=True) for _ in range(count)]
    packed = [torch._cslt_compress(weight) for weight in weights]
    scale_x, scale_w = torch.ones(m, 1, device="cuda"), torch.ones(n, 1, device="cuda")

    def median(call: Callable[..., Tensor], *operands: list[Tensor]) -> float:
        return microseconds([partial(call, *tensors) for tensors in zip(*operands, strict=True)])

    algorithm = torch._cslt_sparse_mm_search(packed[0], inputs[0].t(), out_dtype=BF16)
    products = {
        "cuSPARSELt": sparse_product(packed[0], inputs[0], algorithm).t(),
        "dense": dense_product(inputs[0], weights[0], scale_x, scale_w),
    }
    for name, product in products.items():
        if not is_right(product, inputs[0], weights[0]):
            msg = f"{kind}, {n} x {k}: {name} gives another product than float64"
            raise RuntimeError(msg)
    del products
    dense = median(partial(dense_product, scale_x=scale_x, scale_w=scale_w), inputs, weights)
    sparse = median(partial(sparse_product, algorithm=algorithm), packed, inputs)
    compress = median(torch._cslt_compress, weights)
    return Row(n, k, kind, algorithm, dense, sparse, compress, dense / sparse, dense / (sparse + compress))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"M (default: {TOKENS})")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or not torch.backends.cusparselt.is_available():
        print("sparse_24: needs a CUDA card and a torch with cuSPARSELt", file=sys.stderr)
        return 2
    print(", ".join(filter(None, environment().values())), f"cuSPARSELt {torch.backends.cusparselt.version()}")
    rows, failures = [], []
    for n, k in SHAPES:
        for kind in TYPES:
            try:
                row = measure_shape(arguments.tokens, n, k, kind)
            except RuntimeError as error:
                failures.append(brief(error))
                continue
            rows.append(row)
            print(
                f"{n:6} x {k:5} {kind:4}  dense {row.dense:7.1f} us  sparse {row.sparse:7.1f} us ({row.gain:.2f})  "
                f"compress {row.compress:6.1f} us ({row.gain_with_compression:.2f} with it)  algorithm {row.algorithm}",
                flush=True,
            )
            if arguments.out:
                write_rows(arguments.out, rows)
            torch.cuda.empty_cache()
    for line in failures:
        print(line, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
