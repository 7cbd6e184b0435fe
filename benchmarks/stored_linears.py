"""Linear layers whose weights are stored in 4 bits, for a few rows of activations, against BF16 and other libraries.

    python benchmarks/stored_linears.py --out benchmarks/h200/stored_linears.csv
    python benchmarks/stored_linears.py --sweep --seconds 240 --formats nf4 --shapes 8192,8192 --out sweep.csv
    python benchmarks/stored_linears.py --gradient --batches 256 1024 4096 --decoded --out dx.csv

``--sweep`` times every cut of our kernels, which is what ``CONFIGS`` in ``kernels/matmul/stored.py`` is to be made of,
as long as ``--seconds`` last for a shape, a batch and a format. ``--gradient`` multiplies dY · W from the same codes.
``--decoded`` adds the weight decoded by our kernel and multiplied by cuBLAS: where that is faster is what
``operations_in_tile`` in ``kernels/matmul/costs.py`` has to say.

Every arm has ``--limit`` seconds, is compared with float64 before it is timed, and goes round so many copies of its
weight that none is in L2 when its turn comes again. bitsandbytes and gemlite are timed where they are installed.

Writes a CSV file after every row: microseconds, the bytes of the weight over them, and the time of BF16 over that.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measure import brief, environment, failure, fresh_log, microseconds, rotations, write_rows
from torch import Tensor

from qcompile.ir.ops import global_scale_of
from qcompile.ir.stored import Stored
from qcompile.kernels.quantize.nested import quantize_scales

__all__ = ["BASELINE", "FORMATS", "Arm", "Row", "arms_of", "main", "measure_arm", "variations"]

#: (N, K) of the weight.
SHAPES = [(4096, 4096), (8192, 8192), (8192, 28672)]
BATCHES = [1, 4, 16, 64]
FORMATS = {
    "nf4": "nf4 block64 absmax_bnb; nested",
    "int4 g32": "int4 block32",
    "int4 g128": "int4 block128",
    "nvfp4": "e2m1 block16 e4m3",
}
BASELINE = "bf16"
BF16 = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """One arm on one shape; ``error`` says why there are no figures."""

    n: int
    k: int
    batch: int
    gradient: bool
    arm: str
    config: str
    microseconds: float = float("nan")
    weight_gb_per_second: float = float("nan")
    over_bf16: float = float("nan")
    error: str = ""


@dataclass(frozen=True)
class Arm:
    """A product to measure.

    Attributes:
        name: of it. config: how it is cut up, as far as is known.
        weights: copies of what it reads of the weight.
        run: ``(x, weight) → product``.
        dense: the weight ``[N, K]`` that it stands for, decoded to bfloat16.
        nbytes: of one copy.
    """

    name: str
    weights: Sequence[Any]
    run: Callable[[Tensor, Any], Tensor]
    dense: Tensor
    nbytes: int
    config: str = ""


# --- arms -----------------------------------------------------------------------------------------------------------


def stored_parts(weight: Tensor, spec: str) -> tuple[Tensor | None, ...]:
    """Codes, scales, scales of scales (or the global one), offset."""
    stored = Stored.parse(spec)
    q = stored.quantizer
    whole = global_scale_of(weight, q)
    codes, scales = torch.ops.qcompile.quantize(weight, str(q), -1, whole)
    if stored.nested is None:
        return codes, scales, whole, None
    coded = quantize_scales(scales, stored.nested)
    return codes, coded.codes, coded.scales, coded.offset


def ours(name: str, weight: Tensor, gradient: bool, config: Any = None) -> Arm:
    """The op as it chooses, or a kernel of ours as ``config`` says."""
    spec, size = str(Stored.parse(FORMATS[name])), weight.shape[1]
    parts = stored_parts(weight, spec)

    def run(x: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
        codes, scales, second, offset = parts
        call = x, codes, scales, spec, size, gradient, BF16, None, second, offset
        if config is None:
            return torch.ops.qcompile.mm_stored(*call)
        from qcompile.kernels.matmul import stored as kernels

        return kernels.mm_stored(*call, config=config)

    return _arm(name, parts, run, _decoded(parts, spec, weight), "" if config is None else str(config))


def decoded_first(name: str, weight: Tensor, gradient: bool) -> Arm:
    """Our kernel decodes the weight, cuBLAS multiplies it."""
    from qcompile.kernels.matmul import stored as kernels

    spec, size = str(Stored.parse(FORMATS[name])), weight.shape[1]
    parts = stored_parts(weight, spec)

    def run(x: Tensor, parts: Sequence[Tensor | None]) -> Tensor:
        codes, scales, second, offset = parts
        dense = kernels.decode(codes, scales, spec, size, BF16, second, offset)
        return x @ (dense if gradient else dense.t())

    return _arm(f"{name} decoded first", parts, run, _decoded(parts, spec, weight))


def _decoded(parts: Sequence[Tensor | None], spec: str, weight: Tensor) -> Tensor:
    """By the reference, some rows at a time: its products with rows of the unit matrix take little memory."""
    from qcompile.kernels.matmul import reference

    codes, scales, second, offset = parts
    unit = torch.eye(weight.shape[0], dtype=BF16, device=weight.device)
    return reference.mm_stored(unit, codes, scales, spec, weight.shape[1], True, BF16, None, second, offset)


def dense(weight: Tensor, gradient: bool) -> Arm:
    return _arm(BASELINE, (weight,), lambda x, parts: x @ (parts[0] if gradient else parts[0].t()), weight)


def bitsandbytes_nf4(weight: Tensor, gradient: bool) -> Arm:
    """``matmul_4bit``, which takes its kernel for one row or for few; it has none for gradients but decode and mm."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")

    def run(x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        if gradient:
            return x @ dequantize_4bit(parts[0], state)
        return bitsandbytes.matmul_4bit(x, parts[0].t(), quant_state=state)

    return _arm("bitsandbytes nf4", (packed,), run, dequantize_4bit(packed, state))


def gemlite_int4(group: int, weight: Tensor, gradient: bool) -> Arm:
    """Asymmetric codes of 4 bits around 8, BF16 scales."""
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

    n, k = weight.shape
    blocks = weight.float().view(n, k // group, group)
    scales = (blocks.abs().amax(-1, keepdim=True) / 7).to(BF16)
    codes = (blocks / scales.float()).round().clamp(-7, 7)
    kind = TORCH_TO_DTYPE[BF16]
    layer = GemLiteLinearTriton(4, group_size=group, in_features=k, out_features=n, input_dtype=kind, output_dtype=kind)
    unsigned = (codes + 8).to(torch.uint8).view(n, k)
    layer.pack(unsigned, scales.view(-1, 1), torch.full_like(scales.view(-1, 1), 8), None)
    meaning = (codes * scales.float()).to(BF16).view(n, k)
    return _arm(f"gemlite int4 g{group}", (layer.W_q,), lambda x, parts: _gemlite(layer, x, parts[0]), meaning)


def _gemlite(layer: Any, x: Tensor, codes: Tensor) -> Tensor:
    layer.W_q.data = codes
    return layer(x)


def _arm(name: str, parts: Sequence[Any], run: Callable[..., Tensor], meaning: Tensor, config: str = "") -> Arm:
    nbytes = sum(part.numel() * part.element_size() for part in parts if part is not None)
    copies = [tuple(part if part is None else part.clone() for part in parts) for _ in range(rotations(nbytes))]
    return Arm(name, copies, run, meaning, nbytes, config)


def arms_of(formats: Sequence[str], gradient: bool, decoded: bool) -> dict[str, Callable[[Tensor], Arm]]:
    """Name → what makes the arm of a BF16 weight; BF16 first."""
    arms: dict[str, Callable[[Tensor], Arm]] = {BASELINE: partial(dense, gradient=gradient)}
    for name in formats:
        arms[name] = partial(ours, name, gradient=gradient)
        if decoded:
            arms[f"{name} decoded first"] = partial(decoded_first, name, gradient=gradient)
    if importlib.util.find_spec("bitsandbytes"):
        arms["bitsandbytes nf4"] = partial(bitsandbytes_nf4, gradient=gradient)
    if importlib.util.find_spec("gemlite") and not gradient:
        arms |= {f"gemlite int4 g{group}": partial(gemlite_int4, group, gradient=gradient) for group in (32, 128)}
    return arms


def variations(batch: int, gradient: bool) -> Iterator[Any]:
    """Cuts of our kernels for a number of rows: those of the table first, then all others that may be faster."""
    from qcompile.kernels.matmul import stored as kernels

    table = kernels.CONFIGS[gradient]
    seen: set[str] = set()
    fitting = [config for config in table if not config.most_m or batch <= config.most_m]
    for config in (*fitting, *_by_fragments(batch, gradient), *_few_rows(batch, gradient), *_tiles(batch, gradient)):
        if str(config) not in seen:
            seen.add(str(config))
            yield config


def _named(texts: Sequence[str] | None, batch: int) -> list[Any]:
    """Of configs as text, those for as many rows of x, rounded up to a power of two."""
    from qcompile.kernels.matmul.stored import Config

    block_m = 1 << (batch - 1).bit_length()
    found = [re.fullmatch(r"(\w+) (\d+)x(\d+)x(\d+) w(\d+) s(\d+) p(\d+)(.*)", text) for text in texts or ()]
    if bad := [text for text, match in zip(texts or (), found, strict=True) if match is None]:
        msg = f"--configs: {bad[0]!r} is not like {str(Config('fragments', 1, 64, 64))!r}"
        raise ValueError(msg)
    configs = []
    for kernel, *numbers, how in (match.groups() for match in found if match):
        rows, block_n, width, warps, stages, programs = map(int, numbers)
        if rows == block_m:
            table, early = "formula" not in how, "early" in how
            configs.append(Config(kernel, batch, block_n, width // 8, rows, warps, stages, programs, table, early))
    return configs


def _by_fragments(batch: int, gradient: bool) -> Iterator[Any]:
    """Warps side by side and in turn, tiles of 16 rows of W for each, steps ahead; the likelier first."""
    from qcompile.kernels.matmul.stored import Config

    block_m = 1 << (batch - 1).bit_length()
    if gradient or block_m > 64:
        return
    for stages, (warps, along), tiles in product(
        (2, 1, 4) if batch <= 16 else (1, 2),
        ((8, 4), (16, 4), (8, 8), (16, 8), (8, 2), (4, 4), (4, 2), (16, 2), (8, 1), (16, 16), (4, 1)),
        (1, 2),
    ):
        block_n = 16 * tiles * warps // along
        # Few programs of many rows read x less often, and split K to be enough.
        for programs in (2,) if block_n < 64 else (1, 2, 4):
            yield Config("fragments", batch, block_n, 16 * along, block_m, warps, stages, programs)


def _few_rows(batch: int, gradient: bool) -> Iterator[Any]:
    from qcompile.kernels.matmul.stored import MOST_ROWS, Config

    if gradient or batch > MOST_ROWS:
        return
    for block_n, (block_w, warps), programs, lookup in product(
        (1, 2, 4, 8), ((128, 1), (256, 2), (512, 4), (1024, 8)), (4, 8, 16), (True, False)
    ):
        yield Config("gemv", batch, block_n, block_w, 1, warps, 1, programs, lookup)


def _tiles(batch: int, gradient: bool) -> Iterator[Any]:
    from qcompile.kernels.matmul.stored import Config

    block_m = min(128, max(16, 1 << (batch - 1).bit_length()))
    for block_n, block_w, warps, stages, programs, lookup in product(
        (64, 128), (8, 16, 32), (4, 8), (2, 3, 4), (1, 2, 4), (True, False)
    ):
        yield Config("tile_rows" if gradient else "tile", 0, block_n, block_w, block_m, warps, stages, programs, lookup)


# --- measuring ------------------------------------------------------------------------------------------------------


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` within it after that long, as soon as Python runs again."""

    def stop(*_: Any) -> None:
        msg = f"took longer than {seconds:g} s"
        raise TimeoutError(msg)

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def disagreement(got: Tensor, x: Tensor, weight: Tensor) -> str:
    """What is wrong with x · weightᵀ, empty if nothing is.

    A kernel may round weights to bfloat16 or not, sums K terms in float32, and rounds the result once.
    """
    expected = x.double() @ weight.double().t()
    terms = x.abs().double() @ weight.abs().double().t()
    bound = terms * (2.0**-8 + 2 * x.shape[1] * 2.0**-24)
    bound = bound + (expected.abs() + bound) * 2.0**-9
    wrong = ~((got.double() - expected).abs() <= bound)  # NaN is wrong
    return f"{int(wrong.sum())} of {wrong.numel()} elements are wrong" if wrong.any() else ""


def measure_arm(make: Callable[[Tensor], Arm], weight: Tensor, batch: int, gradient: bool, repeats: int) -> Row:
    """Raises ``RuntimeError`` if the product is wrong."""
    (n, k), arm = weight.shape, make(weight)
    x = torch.randn(batch, n if gradient else k, dtype=BF16, device=weight.device)
    with torch.no_grad():
        got = arm.run(x, arm.weights[0])
        if wrong := disagreement(got, x, arm.dense.t() if gradient else arm.dense):
            raise RuntimeError(wrong)
        taken = microseconds([partial(arm.run, x, copy) for copy in arm.weights], repeats)
    return Row(n, k, batch, gradient, arm.name, arm.config, taken, arm.nbytes / taken / 1e3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--shapes", nargs="+", metavar="N,K", help="weights to measure (default: three of Llama's)")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="rows of x (default: 1 4 16 64)")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--arms", nargs="+", help="of the comparison, beside BF16 (default: all), as the CSV file names them"
    )
    parser.add_argument("--gradient", action="store_true", help="dY · W instead of x · Wᵀ")
    parser.add_argument("--decoded", action="store_true", help="add the weight decoded first, for cuBLAS")
    parser.add_argument("--sweep", action="store_true", help="time every cut of our kernels, and nothing else but BF16")
    parser.add_argument("--configs", nargs="+", help="of the sweep, instead of all, as the CSV file names them")
    parser.add_argument("--kernels", nargs="+", help="kernels of the sweep (default: all), for example fragments")
    parser.add_argument("--limit", type=float, default=40, help="seconds of an arm (default: 40)")
    parser.add_argument("--seconds", type=float, default=120, help="of a sweep (default: 120)")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the timing (default: 20)")
    parser.add_argument("--device", default="cuda", help="cpu checks the script, with the reference of the op")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("stored_linears: needs a CUDA card", file=sys.stderr)
        return 2
    shapes = [tuple(map(int, text.split(","))) for text in arguments.shapes] if arguments.shapes else SHAPES
    log = fresh_log(arguments.out)
    rows: list[Row] = []
    print(", ".join(filter(None, environment().values())))
    for (n, k), batch in product(shapes, arguments.batches):
        torch.manual_seed(0)
        weight = (torch.randn(n, k, device=arguments.device) * 0.05).to(BF16)
        bf16 = float("nan")
        for name, make in _contenders(arguments, batch):
            try:
                with limited(arguments.limit):
                    row = measure_arm(make, weight, batch, arguments.gradient, arguments.repeats)
            except Exception as error:  # a library may lack a kernel, a cut may not compile
                what = f"{name} {n}x{k} batch {batch}"
                row = Row(n, k, batch, arguments.gradient, name, "", error=failure(error, log, what))
                print(f"{what}: {brief(error)}", file=sys.stderr)
            bf16 = row.microseconds if name == BASELINE else bf16
            rows.append(replace(row, over_bf16=bf16 / row.microseconds))
            write_rows(arguments.out, rows)
            print(_line(rows[-1]), flush=True)
    return 1 if any(row.error for row in rows) and not arguments.sweep else 0


def _contenders(arguments: argparse.Namespace, batch: int) -> Iterator[tuple[str, Callable[[Tensor], Arm]]]:
    arms = arms_of(arguments.formats, arguments.gradient, arguments.decoded)
    if not arguments.sweep:
        chosen = {BASELINE, *(arguments.arms or arms)}
        if unknown := chosen - arms.keys():
            msg = f"--arms: {sorted(unknown)[0]!r} is none of {', '.join(arms)}"
            raise ValueError(msg)
        yield from ((name, make) for name, make in arms.items() if name in chosen)
        return
    yield BASELINE, arms[BASELINE]
    for name in arguments.formats:
        end = time.monotonic() + arguments.seconds
        for config in _named(arguments.configs, batch) or variations(batch, arguments.gradient):
            if time.monotonic() > end:
                break
            if arguments.kernels and config.kernel not in arguments.kernels:
                continue
            yield f"{name} {config}", partial(ours, name, gradient=arguments.gradient, config=config)


def _line(row: Row) -> str:
    what = f"{row.n:6} x {row.k:5} batch {row.batch:4}  {row.arm:<20}"
    figures = f"{row.microseconds:8.1f} us {row.weight_gb_per_second:6.0f} GB/s {row.over_bf16:6.2f}x"
    return f"{what} {row.error or figures}  {row.config}"


if __name__ == "__main__":
    sys.exit(main())
