"""The Triton that Inductor generates for the ``qcompile::`` ops, checked without a GPU.

Inductor is told that it generates Triton for the CPU (``cpu_backend="triton"``) under a driver that only claims to be an sm_90.
Three things are then done with the kernels' source: counting them and reading them, compiling one to PTX, and running them in
Triton's interpreter. The interpreter has to be chosen before Triton is imported, so the tests named ``test_interpreted_…`` run in a
process of their own, which :func:`test_numerics_under_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

import torch._inductor.config as inductor_config  # noqa: E402
from torch._inductor.runtime import triton_heuristics  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import qcompile.kernels  # noqa: E402, F401
from qcompile.ir.formats import Format  # noqa: E402
from qcompile.ir.quantizer import Quantizer  # noqa: E402
from qcompile.kernels.estimate import reference as estimate_reference  # noqa: E402
from qcompile.kernels.lowerings import LOWERINGS, cuda_provider, register_lowerings  # noqa: E402
from qcompile.kernels.quantize import reference  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(INTERPRETED, reason="needs Triton's compiler, not its interpreter")
SM90 = GPUTarget("cuda", 90, 32)
quantize, dequantize = torch.ops.qcompile.quantize, torch.ops.qcompile.dequantize


class ClaimedDriver:
    """A driver that answers what Inductor asks while it generates code, and can launch nothing."""

    def get_current_target(self):
        return SM90

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True


class Kernel:
    """One generated kernel: its source, and its function run in the interpreter (or not at all)."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        self.name, self.source = name, source
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        recorder = mock.Mock(side_effect=self._record)
        heuristics = {"pointwise": recorder, "reduction": recorder, "persistent_reduction": recorder}
        with mock.patch.multiple(triton_heuristics, **heuristics):
            spec.loader.exec_module(module)
        if INTERPRETED:
            module.libdevice = InterpretedLibdevice
        self.function = getattr(module, name)

    def _record(self, *args, triton_meta, **kwargs):
        self.signature = triton_meta["signature"]
        return lambda function: function

    def run(self, *args, stream=None):
        if not INTERPRETED:
            return
        blocks = {name: 16 for name, kind in self.signature.items() if kind == "constexpr"}
        values = dict(zip(self.signature, args, strict=False))
        grid = [triton.cdiv(values.get(f"{axis}numel", 1), 16) for axis in "xyz"]
        self.function[tuple(grid)](*args, **blocks)

    def ptx(self) -> str:
        blocks = {name: 16 for name, kind in self.signature.items() if kind == "constexpr"}
        return triton.compile(ASTSource(self.function, self.signature, blocks), target=SM90).asm["ptx"]


class InterpretedLibdevice:
    """The libdevice functions that the kernels here call, which the interpreter lacks."""

    @staticmethod
    def pow(base, exponent):
        return triton.language.exp2(exponent * triton.language.log2(base))


@pytest.fixture
def generate(tmp_path, monkeypatch):
    """``generate(fn, *inputs, dynamic=False) -> (outputs, kernels)``; outputs mean something in the interpreter only."""
    register_lowerings()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    previous = triton.runtime.driver._active
    triton.runtime.driver.set_active(ClaimedDriver())

    def run(fn, *inputs, dynamic: bool = False):
        kernels: list[Kernel] = []

        def load(self, name: str, source: str, device_str: str = "cpu") -> Kernel:
            kernels.append(Kernel(name, source, tmp_path))
            return kernels[-1]

        torch._dynamo.reset()
        settings = {"cpu_backend": "triton", "fx_graph_cache": False, "autotune_remote_cache": False}
        with (
            mock.patch("torch._inductor.async_compile.AsyncCompile.triton", load),
            inductor_config.patch(settings),
        ):
            outputs = torch.compile(fn, backend="inductor", fullgraph=True, dynamic=dynamic)(*inputs)
        return outputs, kernels

    yield run
    triton.runtime.driver._active = previous


def rows_of_everything(rows: int, columns: int, fmt: Format) -> torch.Tensor:
    """Float32 rows that hit ties, saturation, −0, tiny and huge scales, an all-zero row, and NaN and infinity in a row."""
    torch.manual_seed(0)
    x = torch.randn(rows, columns)
    ties = torch.tensor([*fmt.thresholds, *fmt.magnitudes, -0.0][: columns - 1])
    for row, factor in ((0, 1.0), (1, -1.0), (2, 2.0**-90), (3, -(2.0**60))):
        x[row] = 0.0
        x[row, : len(ties)] = ties * factor
        x[row, -1] = fmt.max * factor  # the scale is then a power of two, and ties stay ties
    x[4] = 0.0
    x[5] *= 1e-38
    x[6] *= 1e37
    x[7, 3] = float("nan")
    x[8, 2] = float("inf")
    return x


FORMATS = ["e2m1", "e1m2", "e3m0", "int4", "int8z", "int4z", "int8", "int2", "int1", "int3z"]


@interpreted
@pytest.mark.parametrize("rounding", ["even", "up"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_interpreted_codes_and_scales_are_the_references(generate, format_name, rounding):
    """Threshold, tie, sign, padding or scale arithmetic that is off by one bit anywhere."""
    text = f"{format_name} row absmax {rounding}"
    x = rows_of_everything(19, 37, Quantizer.parse(text).format)
    (codes, scales), kernels = generate(lambda x: quantize(x, text, -1), x)
    expected_codes, expected_scales = reference.quantize(x, text, -1)
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(codes, expected_codes, rtol=0, atol=0)
    assert len(kernels) == 1
