"""The launch for CUDA against the update in torch, bit for bit, in Triton's interpreter; and that it compiles."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from qcompile.optim import AdamW, adamw
from qcompile.optim import triton as fused
from qcompile.optim.states import STATES, kind_of

from ..kernels.harness import SM90, compiled, interpreted, run_interpreted

#: Blocks of 128, 125 and 68, small parameters, a scalar; sizes that end within a program, one of three programs.
SHAPES = ((70, 128), (33, 125), (16, 16 * 17), (100,), ())


def train(dtype: torch.dtype, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    own = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = AdamW(own, 0.01, **options)
    for step in range(3):
        for parameter in own:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        if step == 1:
            own[0].grad[3, 4] = torch.nan
        optimizer.step()
    return [*own, *(value for p in own for value in optimizer.state[p].values())]


@interpreted
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.float32, {}),
        (torch.float16, {"states": "fp8-lm"}),
        (torch.float16, {"states": "fp32", "master": "fp32"}),  # to BF16 the interpreter cuts where a GPU rounds
    ],
)
def test_interpreted_launch_is_the_update_in_torch(dtype, options):
    expected = train(dtype, **options)
    with mock.patch.object(adamw, "_one_by_one", adamw._fused):
        actual = train(dtype, **options)
    assert [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if not torch.equal(a, b)] == []


def test_numerics_under_the_interpreter():
    run_interpreted(__file__)


@compiled
def test_it_compiles():
    """For an H100: products are not contracted with sums, which would round other than torch does, and a thread reads
    and writes several elements at once.
    """
    kind = kind_of(torch.empty(64, 128, dtype=torch.bfloat16), STATES["8bit"], "none", 128)
    signature = {"table": "*i64", "sizes": "*i64", "programs": "*i32", "reals": "*fp32", "integers": "*i32"}
    constants = {"own": fused._constants(kind, torch.bfloat16), "aligned": True}
    source = ASTSource(fused._step, signature | {"own": "constexpr", "aligned": "constexpr"}, constants)
    kernel = triton_compile(source, target=SM90, options={"enable_fp_fusion": False})
    products = [line for line in kernel.asm["ptx"].splitlines() if "fma.rn.f32" in line]
    assert [line for line in products if "0f" not in line] == []  # the others are by a constant power of two, exact
    accesses = set(re.findall(r"((?:ld|st)\.global\.\S+)", kernel.asm["ptx"]))
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= accesses
    assert not [access for access in accesses if access.endswith(("b8", "b16"))]
