"""What every test runs under: one Inductor cache per run, few threads, a fixed seed, and no memory that happens
to be zero.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# What follows is read when torch is imported, so it has to be set before.

# Workers share the cores. A thread that waits for others of its team spins by default and takes the core from the very
# thread that it waits for: of the tests' processor time that was a third.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A run has an Inductor cache of its own: kernels that an older checkout compiled are not reused, and all tests of the
# run share what they compile.
_OWN_CACHE = None
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    _OWN_CACHE = tempfile.mkdtemp(prefix="qcompile_inductor_")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _OWN_CACHE

import numpy as np  # noqa: E402
import torch  # noqa: E402

import qcompile.kernels.register  # noqa: E402, F401  (kernels of the qcompile:: ops)
from qcompile.ir.definitions import definitions_as_before  # noqa: E402
from qcompile.ir.estimators import ESTIMATORS  # noqa: E402
from qcompile.ir.formats import FORMATS  # noqa: E402
from qcompile.ir.quantizer import SCALE_RULES  # noqa: E402


def _fill_fresh_memory_with_junk() -> None:
    """Make torch's CPU allocator fill what it hands out with ``0x7fedbeef``, which reads as NaN in float32
    and bfloat16.

    This is c10's own debugging flag. It reaches every allocation: ``empty`` in Python and C++,
    ``new_empty``, and the buffers of compiled graphs, at the price of one ``memset``.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_cpu_allocator_do_junk_fill").value = True


def pytest_configure(config: pytest.Config) -> None:
    # `pyproject.toml` turns warnings raised inside qcompile into errors; with a `stacklevel` they carry the
    # name of the
    # caller's module, so ours are also recognized by their text.
    config.addinivalue_line("filterwarnings", "error:.*qcompile:UserWarning")
    torch.set_num_threads(2)
    # Tracing leaves a million objects that live: by default Python looks through all of them too often.
    gc.set_threshold(2_000, 50, 50)
    # pytest attaches its handlers to every logger that does not propagate. As soon as the logger of torch's structured
    # trace has a handler, each compilation writes all of its graphs as text.
    logging.getLogger("torch.__trace").propagate = True
    _fill_fresh_memory_with_junk()


def pytest_collection_finish(session: pytest.Session) -> None:
    """What has been imported by now lives until the end: nothing is to be found there."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN_CACHE:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(scope="module")
def definitions_forgotten() -> Iterator[None]:
    """What the tests of a module define is forgotten after them: other tests go through all that there is."""
    with definitions_as_before(FORMATS, SCALE_RULES, ESTIMATORS):
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers whichever tests ran before."""
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own, for data that must not depend on what else draws numbers."""
    return torch.Generator().manual_seed(20250117)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20250117)
