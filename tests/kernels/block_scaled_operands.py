"""Operands with scales of blocks and exact products, for the tests of ``mm_block_scaled`` with and without a card."""

from __future__ import annotations

import torch

from qcompile.ir.quantizer import Quantizer
from qcompile.ir.tensor_core_ops import BLOCK_SCALES

MXFP4, NVFP4 = BLOCK_SCALES.values()


def operand(rows: int, size: int, quantizer: Quantizer, device: str = "cpu") -> list[torch.Tensor | None]:
    """Random codes, scales and global scale of a matrix.

    Values are multiples of 1/16, at most 12, times a power of two. Sums of a few thousand products are then exact in
    float32: random ones stay below 2^12, in units of 2^-8.
    """
    shape = quantizer.scale_shape((rows, size))
    codes = torch.randint(0, 256, (rows, quantizer.packed_size(size)), dtype=torch.uint8, device=device)
    if size % 2:
        codes[:, -1] &= 15  # what `quantize` leaves of a byte that is not full
    if quantizer.scale.two_level:
        scales = torch.randint(8, 16, shape, device=device) / 8
        return [codes, scales.to(torch.float8_e4m3fn), 2.0 ** torch.randint(-5, 5, (), device=device).float()]
    return [codes, torch.randint(126, 129, shape, dtype=torch.uint8, device=device), None]


def arguments(a: list, b: list) -> tuple[torch.Tensor | None, ...]:
    """Those of ``mm_block_scaled`` that two operands make."""
    return tuple(tensor for pair in zip(a, b, strict=True) for tensor in pair)


def exact(a: list, b: list, size: int, quantizer: Quantizer, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The product in float64 of what `dequantize` decodes."""
    left, right = (
        torch.ops.qcompile.dequantize(codes, scales, str(quantizer), -1, size, torch.float32, global_scale).double()
        for codes, scales, global_scale in (a, b)
    )
    product = left @ right.t()
    return product if bias is None else product + bias.double()
