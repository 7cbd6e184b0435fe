"""The product of few rows with a stored weight, whose codes go straight to tensor cores: numbers and machine code.

Gluon has no interpreter. The PTX of the kernel is run by :mod:`.emulator`, and compared as in
:mod:`.test_stored_matmul`, whose bounds hold.
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from qcompile.ir.stored import Stored
from qcompile.kernels.matmul import stored as kernels
from qcompile.kernels.matmul.stored import CONFIGS, Config

from .emulator import emulate
from .harness import compiled, launching
from .test_stored_matmul import NESTED, SPECS, arguments, as_multiplied, assert_product, compiled_for, weight
from .test_triton_quantize import compile_for_hopper, spills

pytestmark = compiled
BF16, FP16 = torch.bfloat16, torch.float16
TABLE = [config for config in CONFIGS[False] if config.kernel == "fragments"]
#: Blocks of one unit each and of several; the first of each list of words per step that fit.
OTHER_BLOCKS = ("int4 block96", "int4 block256")


def emulated(x, config: Config, processors: int, monkeypatch, *call) -> tuple[torch.Tensor, list]:
    """``mm_stored`` without a card, in memory that is NaN where nothing was written; names and grids of the kernels."""
    monkeypatch.setattr(kernels, "processors", lambda device: processors)
    new_empty, launched = torch.Tensor.new_empty, []

    def launch(kernel, programs, *given, num_warps=4, launch_pdl=False, maxnreg=None, **constants):
        grid = programs if isinstance(programs, tuple) else (programs,)
        built = compile_for_hopper(kernel, given, constants, num_warps, maxnreg)
        arguments = [value for value in given if isinstance(value, torch.Tensor) or value not in (None, 1)]
        emulate(built.asm["ptx"], arguments, grid, num_warps)
        launched.append((kernel.__name__, grid))

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **b: new_empty(*a, **b).fill_(float("nan")))
    with launching(launch):
        return kernels.mm_stored(x, *call, config=config), launched


def check(spec: str, m: int, n: int, size: int, config: Config, processors: int, dtype, monkeypatch) -> list:
    """Odd cases take a bias, even ones the high half of a byte first."""
    torch.manual_seed(m)
    parts, x = weight(n, size, spec), torch.randn(m, size).to(dtype)
    bias = torch.randn(n).to(dtype) if m % 2 else None
    call = arguments(parts, spec, size, False, dtype, bias, high_first=m % 2 == 0)
    got, launched = emulated(x, config, processors, monkeypatch, *call)
    assert_product(got, x, as_multiplied("fragments", parts, spec, size, dtype), bias, rounded=False)
    return launched


#: Rows of x, warps, rows of W and words of a program, steps.
CUTS = (
    (1, 2, 16, 32, 1),
    (8, 2, 32, 16, 2),
    (2, 4, 32, 32, 1),
    (16, 1, 16, 16, 2),
    (3, 2, 32, 32, 2),
    (1, 1, 16, 16, 4),
    (17, 2, 32, 32, 1),
)
QUICK = (NESTED, "e2m1 block16 e4m3")


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, marks=() if spec in QUICK else pytest.mark.nightly) for spec in SPECS + OTHER_BLOCKS]
)
def test_emulated_products(spec, monkeypatch):
    """Odd N, K that is no multiple of a step; every kind of scale and exchange, warps side by side and in turn."""
    place = (SPECS + OTHER_BLOCKS).index(spec)
    m, warps, block_n, block_w, stages = CUTS[place % len(CUTS)]
    block_m = 1 << (m - 1).bit_length()
    size = 5 * (Stored.parse(spec).quantizer.granularity.size or 40)
    config = Config("fragments", 0, block_n, block_w, block_m, warps, stages, programs=1)
    launched = check(spec, m, 37, size, config, 1, (BF16, FP16)[place % 2], monkeypatch)
    assert [name for name, _ in launched] == ["fragments"]


@pytest.mark.nightly
@pytest.mark.parametrize("m", [3, 33])
def test_emulated_splits_and_whole_steps(m, monkeypatch):
    """K of whole steps, where nothing is masked; every split writes its own sum."""
    config = Config("fragments", 0, 16, 16, 4 if m == 3 else 64, 1, 2, programs=1)
    launched = check(NESTED, m, 37, 1024, config, 6, BF16, monkeypatch)
    assert [name for name, _ in launched] == ["fragments", "add_splits"]
    assert launched[0][1] == (3, 2)


@pytest.mark.parametrize(
    ("config", "spec"),
    [
        pytest.param(config, spec, marks=() if (i, spec) == (0, NESTED) else pytest.mark.nightly, id=f"{config} {spec}")
        for i, config in enumerate(TABLE)
        for spec in (NESTED, "int4 block32", "e2m1 block16 e4m3", "nf4 row")
    ],
)
def test_operands_stay_where_they_were_loaded(config, spec, monkeypatch, tmp_path):
    """16 bytes of codes at a time, early; shared memory holds the table only, until the sums are added; no spills, but
    for 64 rows of x, whose sums are half of all registers. Cuts that spill nothing took 1.4 times as long there.
    """
    built = compiled_for(8192, 8192, config.most_m, False, spec, config, monkeypatch)["fragments"]
    ptx = built.asm["ptx"]
    loop = ptx[ptx.index("Loop Header") : ptx.rindex("mma.sync")]
    assert spills(built, tmp_path) <= (64 if config.block_m == 64 else 0)
    assert re.search(r"evict_first\S*\.v4\.b32", loop)
    assert not re.search(r"evict_first\S*\.(v2\.)?b32 \{", loop.replace(".v4.b32", ""))
    assert "st.shared" not in loop
    # A word of 8 codes is looked up in four pieces.
    assert loop.count("ld.shared") == 4 * 4 * loop.count("evict_first.L2")
    assert "bar.sync" not in loop
