"""What the benchmarks share: how long a kernel takes, where it was measured, and what is left of a failure."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = [
    "Call",
    "Seconds",
    "add_worker_arguments",
    "answer",
    "answers",
    "copy_microseconds",
    "environment",
    "failure",
    "fresh_log",
    "in_fresh_process",
    "in_own_process",
    "mark",
    "microseconds",
    "milliseconds",
    "milliseconds_between",
    "quiet_stderr",
    "rotations",
    "run_process",
    "share_of_cores",
    "side_by_side",
    "write_rows",
]

Call = Callable[[], object]
Item = TypeVar("Item")

#: Second-level cache that buffers must outgrow; the H200's is 60 MB, and unknown caches are taken to be that large.
L2_BYTES = 60 * 2**20
#: What copies are a multiple of, and the longest: what the driver moves at full speed (see ``copy_microseconds``).
PAGE, LONGEST_COPY = 2**16, 2**28


def environment() -> dict[str, str]:
    """Date, card and versions: the columns that every row of a CSV file starts with."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {name: _version(name) for name in ("triton", "torchao")}
    return {"date": str(datetime.date.today()), "card": card, "torch": torch.__version__, **versions}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """A CSV file of one or more equal dataclasses, the environment in front of each."""
    columns = environment()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *asdict(rows[0])])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**columns, **values})


def fresh_log(out: Path) -> Path:
    """An empty file beside ``out`` (.log), whose folder is made if need be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    log = out.with_suffix(".log")
    log.write_bytes(b"")
    return log


def brief(error: BaseException, width: int = 160) -> str:
    """The error that others were raised from, in one line."""
    while (cause := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:width]


def failure(error: BaseException, log: Path, what: str) -> str:
    """The line that stands for a failed measurement; the traceback goes to ``log``."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"=== {what}\n{''.join(traceback.format_exception(error))}\n")
    return f"FAILED: {brief(error)}"


@contextmanager
def quiet_stderr(log: Path) -> Iterator[None]:
    """Append to ``log`` what would go to standard error: compilers, below Python too, print pages about one failure."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
            yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def rotations(bytes_of_a_call: int) -> int:
    """How many buffer sets a benchmark must go round for none to be in cache when its turn comes again (CPU: one)."""
    if not torch.cuda.is_available():
        return 1
    return max(3, -(-4 * L2_BYTES // max(1, bytes_of_a_call)) + 1)


def microseconds(calls: Sequence[Call], repeats: int = 20) -> float:
    """Median time of one call; ``calls`` do the same work on different buffers.

    On CUDA the calls are recorded into one graph, whose replays are timed: launches from Python take longer than small
    kernels. Only calls that make the host wait, which no graph can record, are launched one by one.
    """
    if not torch.cuda.is_available():
        return 1e6 * statistics.median(_seconds(call) for call in calls for _ in range(repeats))
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):  # compiles and tunes, neither of which can be recorded
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    torch.cuda.synchronize()
    rounds = max(1, 16 // len(calls))
    if _host_waits(calls[0]):
        return _device_microseconds(partial(_go_round, calls, rounds), repeats) / (rounds * len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _go_round(calls, rounds)
    median = _device_microseconds(graph.replay, repeats)
    graph.reset()
    return median / (rounds * len(calls))


def _go_round(calls: Sequence[Call], rounds: int) -> None:
    """As many results as there are calls stay alive at any time, so that outputs rotate as inputs do."""
    results: list[object] = [None] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            results[i] = call()


def _host_waits(call: Call) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _device_microseconds(run: Call, repeats: int) -> float:
    """Median over ``repeats`` runs, queued without waiting, so that the card never idles between two marks."""
    for _ in range(3):
        run()
    return 1e3 * statistics.median(milliseconds(run, repeats, cuda=True))


def milliseconds(run: Call, repeats: int, cuda: bool) -> list[float]:
    """Times of ``repeats`` runs, one queued after the other: by CUDA events, or by the clock."""
    marks = [mark(cuda)]
    for _ in range(repeats):
        run()
        marks.append(mark(cuda))
    return milliseconds_between(marks, cuda)


def milliseconds_between(marks: Sequence[Any], cuda: bool) -> list[float]:
    """Times from each of :func:`mark` to the next one, after waiting for the last."""
    if cuda:
        torch.cuda.synchronize()
    return [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(marks)]


def mark(cuda: bool) -> Any:
    """This moment on the current stream, or of the clock."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@cache
def copy_microseconds(total_bytes: int) -> float:
    """Time of a device-to-device copy that reads and writes ``total_bytes`` in all, up to whole pages.

    On an H200 the driver moves 2.7 TB/s instead of 4.2 of other numbers of bytes (seen: no multiple of 8 KiB) and of
    512 MiB or more. So the time of a longer copy is that of one of 256 MiB, as often as it fits.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages = max(1, -(-total_bytes // (2 * PAGE)))
    half = min(pages * PAGE, LONGEST_COPY)
    sources = [torch.randint(256, (half,), dtype=torch.uint8, device=device) for _ in range(rotations(2 * half))]
    targets = [torch.empty_like(source) for source in sources]
    time = microseconds([partial(target.copy_, source) for source, target in zip(sources, targets, strict=True)])
    return time * pages * PAGE / half


@dataclass(frozen=True)
class Seconds:
    processor: float
    wall: float

    @staticmethod
    def now() -> Seconds:
        """Of this process and of the compilers that it has run."""
        usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return Seconds(sum(usage.ru_utime + usage.ru_stime for usage in usages), time.perf_counter())

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.processor - other.processor, self.wall - other.wall)


def in_own_process(work: Callable[[], Any]) -> Any:
    """What ``work`` returns in a fork of this process, which has imported everything and computed nothing.

    Raises ``RuntimeError`` with the text of whatever ``work`` raises.
    """

    def run(pipe: Connection) -> None:
        try:
            pipe.send((True, work()))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}"[:300]))

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(theirs,))
    process.start()
    theirs.close()
    try:
        done, result = ours.recv()
    except EOFError:
        done, result = False, "the process died"
    process.join()
    if not done:
        raise RuntimeError(result)
    return result


# --- arms in fresh processes ----------------------------------------------------------------------------------------


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """What a script that runs itself by :func:`in_fresh_process` tells its workers."""
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)


#: Processes of workers that run now.
_WORKERS: set[subprocess.Popen[bytes]] = set()


def share_of_cores(jobs: int) -> dict[str, str]:
    """Environment of one of ``jobs`` workers: how many threads and compilers it may have, which else are one per core.

    Inductor's cache is the same folder for all workers, so what one of them has compiled the later ones read.
    """
    share = max(1, len(os.sched_getaffinity(0)) // jobs)
    names = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    return {name: str(min(share, int(os.environ.get(name) or share))) for name in names}


@contextmanager
def _asked_to_end() -> Iterator[None]:
    """SIGTERM, which ``timeout``, ``kill`` and schedulers send, and SIGHUP raise ``SystemExit`` in the main thread, so
    that what ends workers runs: they have sessions of their own, and would keep the card.
    """

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signals = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    found = {number: signal.getsignal(number) for number in signals}
    for number in found:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in found.items():
            signal.signal(number, handler)


def run_process(command: Sequence[str], name: str, limit: float, log: Path, jobs: int = 1) -> tuple[int, str]:
    """Run a command with what one of ``jobs`` may have of this machine; its exit status and what it printed, which
    becomes a section of ``log``. Raises ``TimeoutError`` if it took longer than ``limit`` seconds, after ending it.
    """
    with tempfile.TemporaryFile() as printed, _asked_to_end():
        process = subprocess.Popen(
            command, stdout=printed, stderr=printed, start_new_session=True, env={**os.environ, **share_of_cores(jobs)}
        )
        _WORKERS.add(process)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            msg = f"took longer than {limit:.3g} s"
            raise TimeoutError(msg) from None
        finally:
            _kill(process)
            process.wait()
            _WORKERS.discard(process)
            printed.seek(0)
            text = printed.read()
            with log.open("ab", buffering=0) as sections:  # one write, so that those of others do not get in between
                sections.write(f"=== {name}\n".encode() + text)
    return process.returncode, text.decode(errors="replace")


def in_fresh_process(
    script: Path, name: str, arguments: Sequence[str], limit: float, scratch: Path, log: Path, jobs: int = 1
) -> dict[str, Any]:
    """What ``script``, run once more with ``--worker name``, answers.

    A fork would do in less time, but not after CUDA has been asked anything. Raises ``RuntimeError`` with what the
    worker raised, and what :func:`run_process` raises.
    """
    result = scratch / "answer.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(script), *arguments, "--worker", name, "--scratch", str(scratch)]
    status, _ = run_process(command, name, limit, log, jobs)
    found = json.loads(result.read_text()) if result.exists() else {"error": f"the process died ({status})"}
    if "error" in found:
        raise RuntimeError(found["error"])
    return found["answer"]


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # its compilers, too


def side_by_side(run: Callable[[Item], None], items: Sequence[Item], at_once: int) -> None:
    """``run`` for each item, in their order, ``at_once`` at a time in threads that wait for workers.

    What interrupts this process, asks it to end, or is raised by ``run`` ends all workers: they have sessions of their
    own, so that no terminal does.
    """
    with _asked_to_end(), ThreadPoolExecutor(max(1, at_once)) as pool:
        waiting = [pool.submit(run, item) for item in items]
        try:
            for each in waiting:
                each.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(each.done() for each in waiting):  # one may just be starting its worker
                for process in list(_WORKERS):
                    _kill(process)
                time.sleep(0.05)
            raise


def answers(
    script: Path, names: Iterable[str], arguments: Sequence[str], limit: float, log: Path
) -> Iterator[tuple[str, dict[str, Any], str]]:
    """:func:`in_fresh_process` for each name: the name, what was answered, and why nothing was, one of them empty."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            found, fault = dict[str, Any](), ""
            try:
                found = in_fresh_process(script, name, arguments, limit, Path(scratch), log)
            except (RuntimeError, TimeoutError) as error:
                fault = brief(error)
            yield name, found, fault


def answer(given: argparse.Namespace, work: Callable[[], dict[str, Any]]) -> int:
    """In a worker: what ``work`` returns or raises, for :func:`in_fresh_process`; returns the exit status."""
    try:
        found = {"answer": work()}
    except Exception as error:
        traceback.print_exception(error)
        found = {"error": brief(error)}
    (given.scratch / "answer.json").write_text(json.dumps(found))
    return 0
