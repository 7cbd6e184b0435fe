"""``python -m tests.fuzz --programs 500 --seed 1``: fresh programs, one line of totals. Wrong ones are printed."""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import time
from collections import Counter

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import qcompile

from .check import MismatchError, check
from .test_fuzz import cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=500, help="how many that eager torch can run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    totals, reasons, start = Counter[str](), Counter[str](), time.perf_counter()
    seen: set[str] = set()

    @seed(options.seed)
    @settings(
        max_examples=20 * options.programs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def run(case) -> None:
        if totals["programs"] == options.programs or not case[0].products or case[0].source() in seen:
            return
        seen.add(case[0].source())
        try:
            outcome = check(*case)
        except MismatchError as mismatch:
            totals.update(programs=1, wrong=1)
            print(f"--- wrong {totals['wrong']}\n{mismatch}\n", flush=True)
            return
        if outcome.products or outcome.refused:
            totals.update(
                programs=1,
                products=outcome.products,
                quantized=outcome.quantized,
                refused=bool(outcome.refused),
                redrawn=outcome.redrawn,
                exact=case[0].bitwise,
            )
            if outcome.excused:
                totals.update(excused=1)
                print(f"--- wrong in plain torch, too: {'; '.join(outcome.excused)}\n{case[0].source()}", flush=True)
            reasons.update(outcome.reasons)
            if outcome.refused:
                reasons[outcome.refused] += 1

    run()
    print(
        f"{datetime.date.today()} qcompile {qcompile.__version__} torch {torch.__version__} Python "
        f"{platform.python_version()} seed {options.seed} ({time.perf_counter() - start:.0f} s):",
        f"{totals['programs']} programs ({totals['exact']} compared bitwise), {totals['products']} products,",
        f"{totals['quantized']} quantized, {totals['refused']} programs refused, {totals['redrawn']} redrawn,",
        f"{totals['wrong']} wrong, {totals['excused']} with a gradient that is wrong in plain torch, too",
    )
    for reason, count in reasons.most_common():
        print(f"  {count:4d} left alone: {reason}")
    return int(totals["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
