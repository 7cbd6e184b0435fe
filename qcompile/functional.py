"""Quantization of single tensors, for those who want the numbers without ``torch.compile``.

Every function takes the texts of recipes: ``"e2m1 row"``, ``"int4 block32 e8m0 stochastic"``. They run on CPU and CUDA,
eagerly and inside compiled functions, with the kernels that compiled models use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import qcompile.kernels  # noqa: F401  (registers the qcompile:: ops)

from .ir.definitions import short_names
from .ir.operand import Operand
from .ir.ops import global_scale_of
from .ir.quantizer import DRAWING, Quantizer

__all__ = ["Quantized", "dequantize", "fake_quantize", "quantize"]


@dataclass(frozen=True)
class Quantized:
    """A quantized tensor: what :func:`quantize` makes and :func:`dequantize` reads. x is ``[..., K]`` below, with the
    quantized axis moved last.

    Attributes:
        codes: uint8 ``[..., ⌈K / codes per byte⌉]``; several codes of up to 4 bits share a byte, the first one in the
            low bits.
        scales: in the type that the scale rule stores (float32, uint8 for E8M0 …): ``[..., 1]`` for row,
            ``[..., ⌈K / n⌉]`` for block<n>, ones for tensor.
        global_scale: float32 ``[]``, the scale of the scales; ``None`` unless the rule has two levels.
        quantizer: text that says what the codes mean.
        axis: the quantized axis of x.
        size: its length, K.
        dtype: that of x.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    quantizer: str
    axis: int
    size: int
    dtype: torch.dtype


def fake_quantize(x: Tensor, operand: str, axis: int = -1, *, seed: Tensor | None = None) -> Tensor:
    """x rounded to what an operand of a recipe can hold, with the shape and dtype of x; differentiable.

    The gradient is the operand's estimator: ``"e2m1 row"`` passes it on as it is, ``"e2m1 row; dge"`` and others change
    it.

    Args:
        x: floating point, any shape of at least one axis.
        operand: ``"<quantizer>[; <estimator>][; occ(...)][; hadamard(<size>)][; sparse(<pattern>)]"``.
        axis: along which blocks lie, and elements share a scale under ``row``.
        seed: int64 ``[1]`` for stochastic rounding; by default torch's generator draws it.

    Raises ``ValueError`` for a text that is not understood and an axis that x does not have, ``TypeError`` for an x
    that is not floating point.
    """
    spec = _operand(operand)
    axis = _checked_axis(x, axis, "fake_quantize")
    return torch.ops.qcompile.fake_quantize(x, _operand_text(operand), axis, _seed(x, spec.quantizer, seed))


def quantize(x: Tensor, quantizer: str, axis: int = -1, *, seed: Tensor | None = None) -> Quantized:
    """Codes and scales of x; not differentiable.

    Args:
        x: floating point, any shape of at least one axis (two for ``block<n>x<n>``).
        quantizer: ``"<format> [<granularity>] [<scale rule>] [<rounding>]"``, words in any order.
        axis: as for :func:`fake_quantize`.
        seed: as for :func:`fake_quantize`.

    Raises ``ValueError`` for a text that is not understood and an axis that x does not have, ``TypeError`` for an x
    that is not floating point.
    """
    q = _quantizer(quantizer)
    axis = _checked_axis(x, axis, "quantize")
    if q.granularity.kind == "square" and x.dim() < 2:
        msg = f"quantize: granularity {q.granularity} needs a matrix, got shape {tuple(x.shape)}"
        raise ValueError(msg)
    x = x.detach()
    whole = global_scale_of(x, q)
    codes, scales = torch.ops.qcompile.quantize(x, _quantizer_text(quantizer), axis, whole, _seed(x, q, seed))
    return Quantized(codes, scales, whole, _quantizer_text(quantizer), axis, x.shape[axis], x.dtype)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor that codes and scales stand for, with the shape and, unless ``dtype`` says otherwise, dtype of x."""
    q = quantized
    return torch.ops.qcompile.dequantize(
        q.codes, q.scales, q.quantizer, q.axis, q.size, dtype or q.dtype, q.global_scale
    )


# Dynamo need not look into what texts mean: that is known when it compiles.


@torch.compiler.assume_constant_result
def _operand(text: str) -> Operand:
    return Operand.parse(text)


@torch.compiler.assume_constant_result
def _quantizer(text: str) -> Quantizer:
    return Quantizer.parse(text)


@torch.compiler.assume_constant_result
def _operand_text(text: str) -> str:
    return str(Operand.parse(text))


@torch.compiler.assume_constant_result
def _quantizer_text(text: str) -> str:
    return str(Quantizer.parse(text))


def _checked_axis(x: Tensor, axis: int, caller: str) -> int:
    if not x.is_floating_point():
        msg = f"{caller}: takes floating-point tensors, got {str(x.dtype).removeprefix('torch.')}; convert it"
        raise TypeError(msg)
    if not -x.dim() <= axis < x.dim():
        msg = f"{caller}: axis={axis} is not one of a tensor of shape {tuple(x.shape)}"
        raise ValueError(msg)
    return axis


def _seed(x: Tensor, q: Quantizer, seed: Tensor | None) -> Tensor | None:
    if q.rounding in DRAWING:  # Dynamo reads no property of a frozen dataclass
        return torch.randint(0, 2**31 - 1, (1,), device=x.device) if seed is None else seed
    if seed is not None:
        msg = f"seed= is for stochastic rounding; {short_names(str(q))!r} rounds {q.rounding}"
        raise ValueError(msg)
    return None
