"""FP8 gradients between two GPUs: kernels, collectives, and whole steps under DDP and FSDP2, beside BF16 ones.

    python benchmarks/gradient_communication.py --out benchmarks/h200/gradient_communication.csv
    python benchmarks/gradient_communication.py --out /tmp/try.csv --cpu        # two processes over gloo, tiny sizes

Nothing is timed before it is right: the collectives must give what the reference's codes sum up to, bit for bit, and
gradients of a step must be alike on both ranks and within the stated error of those that are averaged in float32 on the
same batches. Arms run one after the other in one pair of processes, of which a new one takes over where an arm fails or
is not done in time. All rows are written after every arm. NVLink multicast stays off (``NCCL_NVLS_ENABLE=0``).

- ``kernel``: time, and share of the bandwidth of a copy that moves as many bytes; buckets of 2 and of 8 ranks.
- ``reduce-scatter``, ``all-reduce``: of a bucket of so many MiB in BF16, by itself. ``us`` is the device's time of
  calls that were queued while the device slept, ``host_us`` the host's.
- ``model reduce-scatter``: of 2, 4 and 8 GPUs, computed from the rows above.
- ``ddp``, ``fsdp2``: a step of a plain Llama of model.py in eager BF16, fused AdamW included. ``fp8-lm``: with sums in
  FP8 as FP8-LM publishes, whose error is the comparison; its time is that of untuned code.
- ``alone``, ``optimizer``: that step without communication, and its optimizer; scaling_on_paper.py needs them.
- ``fsdp2 compiled, … weights``: under ``ste``, with weights that are gathered in BF16 and in 8 bits.
- ``fsdp2 compiled``: the same with blocks by ``backend="qcompile_fp4"``, and qcompile's AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import brief, copy_microseconds, microseconds, milliseconds, rotations, write_rows
from model import SIZES, build, random_batch
from torch import Tensor, nn

WORLD = 2
BLOCK = 256
BF16 = torch.bfloat16
#: Most relative error (L2) of gradients, in percent; a BF16 sum has a tenth of it.
MOST_ERROR = {"fsdp2": 2.0, "ddp": 3.3}
#: That of FP8-LM's sums in FP8, which is what they are here for.
MOST_ERROR_FP8_LM = 20.0
SETTLING = 6  # gradients after which µ is halved no more


@dataclass(frozen=True)
class Row:
    """``sent_mb``: by one rank, per call or step. ``ratio``: of the time to that of the same with BF16 gradients.
    ``error``: in percent.
    """

    arm: str
    size: str = ""
    gradients: str = ""
    us: float = 0.0
    host_us: float = 0.0
    sent_mb: float = 0.0
    ratio: float = 0.0
    copy_share: float = 0.0
    error: float = 0.0
    status: str = "ok"


@dataclass(frozen=True)
class Run:
    """What arms are told."""

    device: torch.device
    mib: list[int]
    steps: int

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


def bytes_encoded(world: int, width: int) -> int:
    """Read and written where shards of ``width`` BF16 elements are quantized for all other ranks."""
    return (world - 1) * (2 * width + packet_bytes(width))


def bytes_summed(world: int, width: int) -> int:
    """Read and written where what others sent is added to the own shard, all in BF16 but codes."""
    return (world - 1) * packet_bytes(width) + 4 * width


def packet_bytes(width: int) -> int:
    return width + 4 * width // BLOCK


# --- kernels --------------------------------------------------------------------------------------------------------


def kernels(run: Run) -> Iterator[Row]:
    """On the first rank; the other waits."""
    from qcompile.distributed.packets import Packets, decode, encode, summed, summed_and_encoded

    if dist.get_rank() == 0 and run.cuda:
        for mib in run.mib:
            for world in (2, 8):
                width = mib * 2**19 // world
                sets = rotations(mib * 2**20)

                def many(make: Callable[[], Any], sets: int = sets) -> list[Any]:
                    return [make() for _ in range(sets)]

                def packets(rows: int, width: int = width) -> Packets:
                    made = Packets.empty(rows, width, "e4m3", BLOCK, run.device)
                    made.data.random_(120)
                    return made

                buckets = many(lambda width=width, world=world: torch.randn(width * world, device=run.device).to(BF16))
                sent, gathered, mine = (
                    many(partial(packets, world - 1)), many(partial(packets, world)), many(partial(packets, 1))
                )  # fmt: skip
                shards = [bucket[:width] for bucket in buckets]
                outs = many(lambda width=width: torch.empty(width, dtype=BF16, device=run.device))
                row_bytes = packet_bytes(width)
                # Calls, and the bytes that one of them reads and writes.
                table: dict[str, tuple[list[Callable[[], Any]], int]] = {
                    "encode": (
                        [partial(encode, x, width, 0, p) for x, p in zip(buckets, sent, strict=True)],
                        bytes_encoded(world, width),
                    ),
                    "summed": (
                        [
                            partial(summed, p, x, 0, 1 / world, out)
                            for p, x, out in zip(sent, shards, outs, strict=True)
                        ],
                        bytes_summed(world, width),
                    ),
                    "summed_and_encoded": (
                        [
                            partial(summed_and_encoded, p, x, 0, 1 / world, out)
                            for p, x, out in zip(sent, shards, mine, strict=True)
                        ],
                        world * row_bytes + 2 * width,
                    ),
                    "decode": (
                        [partial(decode, p, x, width) for p, x in zip(gathered, buckets, strict=True)],
                        world * (row_bytes + 2 * width),
                    ),
                }
                for name, (calls, moved) in table.items():
                    time_us = microseconds(calls)
                    share = copy_microseconds(moved) / time_us
                    yield Row(f"kernel {name}", f"{mib} MiB", f"{world} ranks", us=time_us, copy_share=share)
    dist.barrier()


# --- collectives ----------------------------------------------------------------------------------------------------


def _rounded(x: Tensor) -> Tensor:
    """What arrives of a flat tensor of whole blocks."""
    from qcompile.kernels.quantize import reference

    quantizer = "e4m3 row absmax even"
    codes, scales = reference.quantize(x.view(-1, BLOCK), quantizer, -1)
    return reference.dequantize(codes, scales, quantizer, -1, BLOCK, torch.float32).flatten()


def correct(run: Run) -> Iterator[Row]:
    """Bit for bit what the reference says, short blocks aside; the ranks alike."""
    from qcompile.distributed import collectives

    codes, group, rank = collectives.Codes("e4m3", BLOCK), dist.group.WORLD, dist.get_rank()
    width = 64 * BLOCK
    for dtype in (torch.float32, BF16, torch.float16):
        generator = torch.Generator().manual_seed(3)
        x = [torch.randn(2 * width, generator=generator).exp().to(run.device, dtype) for _ in range(2)]
        out = torch.full((width,), torch.nan, device=run.device, dtype=dtype)
        collectives.reduce_scatter(x[rank], out, group, 0.5, codes)
        shards = [of.view(2, width)[rank].float() for of in x]
        shards[1 - rank] = _rounded(shards[1 - rank])
        expected = (shards[0] + shards[1]) * 0.5
        assert torch.equal(out, expected.to(dtype)), f"reduce_scatter of {dtype}"
        both = [torch.empty_like(expected) for _ in range(2)]
        dist.all_gather(both, _rounded(expected))
        collectives.all_reduce(x[rank], group, 0.5, codes)
        assert torch.equal(x[rank], torch.cat(both).to(dtype)), f"all_reduce of {dtype}"
    yield Row("correct", status="ok: bit for bit the reference")
    yield _weights_correct(run)


def _weights_correct(run: Run) -> Row:
    """What E2M1 makes of a weight that has travelled is what it makes of the weight."""
    from qcompile.distributed import weights
    from qcompile.kernels.quantize import reference

    x = torch.randn(512, 2048, generator=torch.Generator().manual_seed(4)).mul(0.02).to(run.device, BF16)
    arrived = weights.decode(*weights.encode(x))
    if run.cuda:  # as it is called there
        assert torch.equal(
            arrived, weights._on(run.device, weights.decode)(*weights._on(run.device, weights.encode)(x))
        )
    for one, other in zip(*(reference.quantize(of, "e2m1 row absmax even", -1) for of in (x, arrived)), strict=True):
        assert torch.equal(one, other), "weights in 8 bits"
    return Row("correct weights", status="ok: the same codes and scales")


def _timed(call: Callable[[], Any], run: Run, repeats: int = 20) -> tuple[float, float]:
    """Median microseconds of a call on the device, and on the host."""
    for _ in range(3):
        call()
    dist.barrier()
    if run.cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(int(4e7))  # about 20 ms, in which the host gets ahead
    start = time.perf_counter()
    times: list[float] = []
    if run.cuda:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        host = (time.perf_counter() - start) / repeats
        torch.cuda.synchronize()
        times = [1e3 * a.elapsed_time(b) for a, b in pairwise(marks)][2:]
    else:
        times = [1e3 * ms for ms in milliseconds(call, repeats, cuda=False)]
        host = statistics.median(times) / 1e6
    return statistics.median(times), 1e6 * host


def reductions(run: Run) -> Iterator[Row]:
    """Reduce-scatter and all-reduce by themselves."""
    from qcompile.distributed import collectives

    group, codes = dist.group.WORLD, collectives.Codes("e4m3", BLOCK)
    mean = dist.ReduceOp.AVG if run.cuda else dist.ReduceOp.SUM
    for mib in run.mib:
        x = torch.randn(mib * 2**19, device=run.device).to(BF16)
        out = torch.empty(len(x) // WORLD, dtype=BF16, device=run.device)
        wide: dict[str, tuple[Callable[[], Any], int]] = {
            "reduce-scatter": (partial(dist.reduce_scatter_tensor, out, x, op=mean), 1),
            "all-reduce": (partial(dist.all_reduce, x, op=mean), 2),
        }
        ours: dict[str, Callable[[], int]] = {
            "reduce-scatter": partial(collectives.reduce_scatter, x, out, group, 0.5, codes),
            "all-reduce": partial(collectives.all_reduce, x, group, 0.5, codes),
        }
        for name, (call, hops) in wide.items():
            base, host = _timed(call, run)
            sent = collectives.wide_bytes(len(x), BF16, WORLD, hops)
            yield Row(name, f"{mib} MiB", "bf16", base, host, sent / 1e6, 1.0)
            sent = ours[name]()
            time_us, host = _timed(ours[name], run)
            yield Row(name, f"{mib} MiB", "fp8", time_us, host, sent / 1e6, time_us / base)


# --- steps ----------------------------------------------------------------------------------------------------------


#: What blocks are compiled with where weights travel in 8 bits, and where they do not to compare with.
STRAIGHT = {"weight": {"estimator": "ste"}}


def _wrap(model: nn.Module, wrapper: str, run: Run, compiled: bool, options: dict[str, Any] | None) -> nn.Module:
    if wrapper == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(run.device.type, (WORLD,))
    for block in model.layers:
        if compiled:
            block.compile(backend="qcompile_fp4", options=options, dynamic=False)
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _sampled(gradient: Tensor) -> Tensor:
    """About 16,384 evenly spread elements in float64."""
    return gradient.flatten()[:: max(1, gradient.numel() // 16384)].double().cpu()


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def step(
    run: Run, wrapper: str, size_name: str, gradients: str, compiled: bool = False, weights: str = ""
) -> Iterator[Row]:
    """Gradients against those that are averaged in float32, then the time of a step. ``weights``: how they are gathered
    under the straight-through estimator, "bf16" or "fp8".
    """
    import qcompile
    from qcompile.distributed import fp8_gradients, fp8_lm_gradients, fp8_weights
    from qcompile.optim import AdamW

    size, rank = SIZES[size_name], dist.get_rank()
    model = build(size, run.device, BF16, seed=0)
    batch = dict(zip(("input_ids", "labels"), random_batch(size, run.device, seed=rank), strict=True))
    exact: dict[str, Tensor] = {}
    if not compiled:  # whose local gradients are others, by the noise of quantization
        model(**batch).backward()
        for name, parameter in model.named_parameters():
            mean = parameter.grad.float()
            dist.all_reduce(mean)
            exact[name], parameter.grad = _sampled(mean / WORLD), None
    options = STRAIGHT if weights else None
    report = qcompile.explain(model, **batch, options=options) if weights == "fp8" else None
    wrapped = _wrap(model, wrapper, run, compiled, options)
    gathered = fp8_weights(wrapped, report) if report else None
    ways: dict[str, Callable[[nn.Module], Any]] = {
        "fp8": partial(fp8_gradients, block=BLOCK),
        "fp8-lm": fp8_lm_gradients,
    }
    traffic = ways[gradients](wrapped) if gradients in ways else None
    elements = sum(parameter.numel() for parameter in wrapped.parameters())
    make = AdamW if compiled else partial(torch.optim.AdamW, fused=True)
    optimizer = make(wrapped.parameters(), lr=1e-5)

    for _ in range(SETTLING if gradients == "fp8-lm" else 1):
        wrapped.zero_grad()
        wrapped(**batch).backward()
    error = _check(wrapped, exact, MOST_ERROR_FP8_LM if gradients == "fp8-lm" else MOST_ERROR[wrapper])
    wrapped.zero_grad()

    def one() -> None:
        wrapped(**batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        one()
    if traffic is not None:
        traffic.reset()
    if gathered is not None:
        gathered.reset()
    one()
    hops = 2 if wrapper == "ddp" else 1
    sent = traffic.bytes if traffic is not None else hops * elements * 2 * (WORLD - 1) // WORLD
    dist.barrier()
    times = milliseconds(one, run.steps, run.cuda)
    arm = f"{wrapper} compiled" if compiled else wrapper
    if weights:
        arm = f"{arm}, {weights} weights"
    if gathered is not None:
        yield Row(
            f"{arm}: gathers", size_name, sent_mb=gathered.bytes / 1e6, ratio=gathered.bytes / gathered.wide_bytes
        )
    yield Row(arm, size_name, gradients, us=1e3 * statistics.median(times), sent_mb=sent / 1e6, error=error)


def alone(run: Run, size_name: str) -> Iterator[Row]:
    """The same step on every GPU by itself, and its optimizer: what a step costs beside communication."""
    size = SIZES[size_name]
    model = build(size, run.device, BF16, seed=0)
    batch = dict(zip(("input_ids", "labels"), random_batch(size, run.device, seed=0), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def backward() -> None:
        model(**batch).backward()

    def one() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        one()
    backward()
    for arm, call in (("alone", one), ("optimizer", optimizer.step)):
        yield Row(arm, size_name, "bf16", us=1e3 * statistics.median(milliseconds(call, run.steps, run.cuda)))
        backward()


def _check(model: nn.Module, exact: dict[str, Tensor], most: float) -> float:
    """The error in percent. Raises ``RuntimeError`` if it is too large, or ranks have other bits."""
    squares = norms = 0.0
    for name, parameter in model.named_parameters():
        whole = _whole(parameter.grad)
        bits = whole.view(torch.int16).long()
        digest = (bits * torch.arange(1, bits.numel() + 1, device=bits.device).view(bits.shape)).sum().view(1)
        both = [torch.empty_like(digest) for _ in range(WORLD)]
        dist.all_gather(both, digest)
        if not torch.equal(*both):
            msg = f"ranks have other gradients of {name}"
            raise RuntimeError(msg)
        if (expected := exact.get(name.removeprefix("module."))) is not None:
            difference = _sampled(whole) - expected
            squares, norms = squares + float(difference.square().sum()), norms + float(expected.square().sum())
    error = 100 * (squares / norms) ** 0.5 if norms else 0.0
    if error > most:
        msg = f"gradients are {error:.2f} % off, at most {most} % are allowed"
        raise RuntimeError(msg)
    return error


# --- on paper -------------------------------------------------------------------------------------------------------


def on_paper(rows: list[Row], mib: list[int]) -> Iterator[Row]:
    """A reduce-scatter of 2, 4 and 8 GPUs by a model: links are as fast as BF16's reduce-scatter of 2 used them, each
    kernel as fast per byte as it was measured for 2 ranks. That of 2 is to be compared with the measurement.
    """
    measured = {(row.arm, row.size, row.gradients): row for row in rows if row.us}
    for size in mib:
        wide = measured.get(("reduce-scatter", f"{size} MiB", "bf16"))
        kernels = [measured.get((f"kernel {name}", f"{size} MiB", "2 ranks")) for name in ("encode", "summed")]
        if wide is None or None in kernels:
            continue
        moved = [of(2, size * 2**18) for of in (bytes_encoded, bytes_summed)]
        rates = [each / row.us for each, row in zip(moved, kernels, strict=True) if row is not None]
        for world in (2, 4, 8):
            width = size * 2**19 // world
            base = (world - 1) * 2 * width / (wide.sent_mb * 1e6 / wide.us)
            sent = (world - 1) * packet_bytes(width)
            computed = bytes_encoded(world, width) / rates[0] + bytes_summed(world, width) / rates[1]
            time_us = sent / (wide.sent_mb * 1e6 / wide.us) + computed
            yield Row("model reduce-scatter", f"{size} MiB", f"{world} ranks", time_us, 0, sent / 1e6, time_us / base)


# --- processes ------------------------------------------------------------------------------------------------------


def arms_of(sizes: list[str]) -> dict[str, Callable[[Run], Iterator[Row]]]:
    """By name, in order."""
    arms: dict[str, Callable[[Run], Iterator[Row]]] = {
        "correct": correct,
        "reductions": reductions,
        "kernels": kernels,
    }
    for size in sizes:
        arms[f"alone {size}"] = partial(alone, size_name=size)
        for wrapper in ("ddp", "fsdp2"):
            for gradients in ("bf16", "fp8", "fp8-lm")[: 3 if wrapper == "ddp" else 2]:
                arms[f"{wrapper} {size} {gradients}"] = partial(
                    step, wrapper=wrapper, size_name=size, gradients=gradients
                )
    for gradients in ("fp8", "bf16"):
        arms[f"compiled {gradients}"] = partial(
            step, wrapper="fsdp2", size_name=sizes[0], gradients=gradients, compiled=True
        )
    for weights in ("bf16", "fp8"):
        arms[f"weights {weights}"] = partial(
            step, wrapper="fsdp2", size_name=sizes[0], gradients="fp8", compiled=True, weights=weights
        )
    return arms


def work(options: argparse.Namespace) -> None:
    """A rank: runs arms, prints rows as JSON (the first rank), and stops at the first failure."""
    device = torch.device("cpu") if options.cpu else torch.device("cuda", options.rank)
    if not options.cpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if options.cpu else "nccl",
        init_method=f"file://{options.meet}",
        rank=options.rank,
        world_size=WORLD,
        device_id=None if options.cpu else device,
    )
    run = Run(device, options.mib, options.steps)
    for name in options.arms:
        say = partial(_say, options.rank == 0)
        try:
            for row in arms_of(options.sizes)[name](run):
                say({"row": asdict(row)})
        except Exception as error:  # belongs in the arm's row; the other rank may wait for us, so this pair ends
            print(json.dumps({"failed": name, "why": brief(error)}), flush=True)
            os._exit(1)
        gc.collect()
        if run.cuda:
            torch.cuda.empty_cache()
        say({"done": name})
    dist.destroy_process_group()


def _say(speaks: bool, message: dict[str, Any]) -> None:
    if speaks:
        print(json.dumps(message), flush=True)


def measured(options: argparse.Namespace, arms: list[str], limit: float) -> Iterator[tuple[str, Row | None]]:
    """Rows of the arms, each with its arm's name; ``None`` when an arm is done. A pair of processes runs until all are
    done or one fails.
    """
    meet = tempfile.mktemp()
    command = [sys.executable, __file__, "--meet", meet, "--steps", str(options.steps), "--sizes", *options.sizes]
    command += ["--mib", *map(str, options.mib), *(["--cpu"] if options.cpu else []), "--arms", *arms]
    environment = {**os.environ, "NCCL_NVLS_ENABLE": "0"}
    pair = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    lines: queue.Queue[str] = queue.Queue()
    for process in pair:
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
    left = list(arms)
    deadline = time.monotonic() + limit + 60  # and a minute to start
    try:
        while left:
            try:
                line = lines.get(timeout=max(0.1, deadline - time.monotonic()))
                message = json.loads(line) if line.startswith("{") else {"ended": True} if not line else {}
            except queue.Empty:
                message = {"failed": left[0], "why": f"not done after {limit:g} s"}
            if message.get("failed", left[0]) != left[0]:  # one rank is ahead of what the other one has said
                time.sleep(0.1)
                lines.put(line)
            elif "row" in message:
                yield left[0], Row(**message["row"])
            elif "done" in message:
                yield left.pop(0), None
                deadline = time.monotonic() + limit
            elif message:
                why = message.get("why", "a process died")
                yield left[0], Row(left[0], status=f"FAILED: {why}")
                yield left.pop(0), None
                return
    finally:
        for process in pair:
            process.kill()
            process.wait()
        Path(meet).unlink(missing_ok=True)


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.strip() or " ")
    if process.wait():
        lines.put("")


def with_ratio(row: Row, rows: list[Row]) -> Row:
    """To the time of the same step with BF16 gradients, once that is known."""
    base = [other.us for other in rows if (other.arm, other.size, other.gradients) == (row.arm, row.size, "bf16")]
    return replace(row, ratio=row.us / base[0]) if base and row.us and not row.ratio else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    parser.add_argument("--mib", type=int, nargs="+")
    parser.add_argument("--arms", nargs="+", help="all by default")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--limit", type=float, default=60, help="seconds per arm")
    parser.add_argument("--total", type=float, default=190, help="seconds after which no arm is started")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sizes = options.sizes or (["tiny"] if options.cpu else ["d2048", "d4096"])
    options.mib = options.mib or ([1] if options.cpu else [16, 64, 256])
    if options.rank is not None:
        work(options)
        return
    if options.out is None:
        parser.error("--out says where the rows go")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    left = options.arms or list(arms_of(options.sizes))
    rows: list[Row] = []
    start = time.monotonic()
    while left and time.monotonic() - start < options.total:
        for arm, row in measured(options, left, min(options.limit, options.total - time.monotonic() + start)):
            if row is not None:
                rows.append(row)
                print(row, flush=True)
            else:
                left = left[left.index(arm) + 1 :]
                rows = [with_ratio(each, rows) for each in rows]
                write_rows(options.out, rows)  # all of them, so that what is there is a table at any time
            if time.monotonic() - start > options.total:
                break
    rows += on_paper(rows, options.mib)
    write_rows(options.out, rows)
    if left:
        print("no time for:", ", ".join(left))


if __name__ == "__main__":
    main()
