"""The kernels for CUDA against :mod:`qcompile.distributed.packets`, bit for bit, in Triton's interpreter; and what they
compile to.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile

from qcompile.distributed import packets
from qcompile.distributed import triton as kernels
from qcompile.distributed.packets import Packets
from qcompile.kernels.quantize import reference
from qcompile.kernels.quantize.grid import grid_of

from ..kernels.harness import SM90, compiled, interpreted, run_interpreted

BLOCK, RANKS = 64, 3
#: Elements of a shard: a short last block, whole blocks, and two programs of 4096 elements.
WIDTHS = (200, 128, 4200)


def both(compute: Callable[..., Tensor], *arguments: object) -> None:
    """What ``compute`` makes with the kernels and with their definition is the same to the bit."""
    actual = compute(kernels.__dict__, *arguments)
    with (
        mock.patch.object(torch.ops.qcompile, "quantize", reference.quantize),  # in C++ it takes seconds to build
        mock.patch.object(torch.ops.qcompile, "dequantize", reference.dequantize),
    ):
        expected = compute({name: getattr(packets, f"_{name}") for name in kernels.__all__}, *arguments)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def data(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(size, generator=generator) * torch.randn(size, generator=generator).exp()
    x[:BLOCK] = 0  # a block of zeros, ties, and numbers beyond a normal scale
    x[BLOCK : BLOCK + 8] = torch.tensor([448.0, 17.0, 19.0, -0.0, 1e-3, -25.0, 2.0**-10, 3 * 2.0**-10])
    x[2 * BLOCK : 3 * BLOCK] *= 1e-41
    return x


def filled(provider, x: Tensor, stride: int, skip: int, width: int, fmt: str) -> Packets:
    made = Packets.empty(RANKS - (skip < RANKS), width, fmt, BLOCK, x.device)
    made.data.fill_(0)
    provider["encode"](x, stride, skip, made)
    return made


def encoded(provider, width: int, skip: int, fmt: str) -> Tensor:
    return filled(provider, data(RANKS * width - 70), width, skip, width, fmt).data


def summed(provider, width: int, rank: int) -> Tensor:
    x, out = data(RANKS * width), torch.full((width,), torch.nan)
    provider["summed"](filled(provider, x, width, rank, width, "e4m3"), x[: width - 5], rank, 1 / RANKS, out)
    return out


def summed_and_encoded(provider, width: int) -> Tensor:
    x, out = data(RANKS * width), Packets.empty(1, width, "e4m3", BLOCK, torch.device("cpu"))
    out.data.fill_(0)
    provider["summed_and_encoded"](filled(provider, x, width, 1, width, "e4m3"), x[:width], 1, 1 / RANKS, out)
    return out.data


def decoded(provider, width: int, fmt: str) -> Tensor:
    x = data(RANKS * width - 70)
    out = torch.full_like(x, torch.nan)
    provider["decode"](filled(provider, x, width, RANKS, width, fmt), out, width)
    return out


@interpreted
@pytest.mark.parametrize("width", WIDTHS)
def test_interpreted_kernels_are_those_in_torch(width):
    both(encoded, width, RANKS, "e4m3")
    both(encoded, width, 0, "e5m2")
    both(summed, width, 0)
    both(summed, width, 2)
    both(summed_and_encoded, width)
    both(decoded, width, "e4m3")
    both(decoded, width, "e5m2")


@interpreted
def test_interpreted_numbers_that_are_not_finite():
    x = torch.ones(4 * BLOCK)
    x[3], x[BLOCK + 3] = torch.nan, -torch.inf
    out = torch.empty_like(x)
    made = Packets.empty(1, len(x), "e4m3", BLOCK, x.device)
    kernels.encode(x, 0, 1, made)
    kernels.decode(made, out, 0)
    assert not out[[3, BLOCK + 3]].isfinite().any()
    assert torch.equal(out[2 * BLOCK :], x[2 * BLOCK :])


def test_numerics_under_the_interpreter():
    run_interpreted(__file__)


SIZES = {"size": "i32", "stride": "i32", "skip": "i32", "width": "i32", "row_bytes": "i32"}
SUMS = {"size": "i32", "rank": "i32", "sources": "i32", "factor": "fp32", "width": "i32", "row_bytes": "i32"}
ROWS = {"codes": "*u8", "scales": "*fp32"}
KERNELS = {
    "encode": (kernels._encode, {"x": "*bf16", **ROWS, **SIZES}, {}),
    "summed": (kernels._sum, {"own": "*bf16", **ROWS, "out": "*bf16", **SUMS}, {"out_scales": None}),
    "summed_and_encoded": (kernels._sum, {"own": "*bf16", **ROWS, "out": "*u8", "out_scales": "*fp32", **SUMS}, {}),
    "decode": (
        kernels._decode,
        {**ROWS, "out": "*bf16", **{k: v for k, v in SIZES.items() if k != "skip"}},
        {},
    ),
}


@compiled
@pytest.mark.parametrize("name", KERNELS)
def test_they_compile(name):
    """For an H100: threads read and write 16 bytes at once wherever elements lie, and no product is contracted with a
    sum, which would round other than torch does.
    """
    kernel, signature, constants = KERNELS[name]
    constants = {**constants, "fmt": grid_of("e4m3 row absmax even"), "blocks": 16, "block": 256}
    whole = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, (argument, kind) in enumerate(whole.items())
        if kind.startswith("*") or argument in ("size", "stride", "width", "row_bytes")
    }
    options = {"enable_fp_fusion": False, "num_warps": 8}
    made = triton_compile(ASTSource(kernel, whole, constants, aligned), target=SM90, options=options)
    ptx = made.asm["ptx"]
    assert "fma.rn.f32" not in ptx
    accesses = set(re.findall(r"((?:ld|st)\.global\.\S+)", ptx))
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= accesses
    assert not [access for access in accesses if access.endswith(("b8", "b16"))]
    assert made.metadata.shared <= 16384  # what is rearranged between threads, by the sums alone
