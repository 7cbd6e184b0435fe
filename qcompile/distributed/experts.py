"""Tokens on their way to the ranks that have their experts, and back: rows as E4M3 codes.

Dispatch and combine are one all-to-all each; :func:`exchange_rows` is either. A row travels as its codes and one
float32 scale behind them, in one collective, so half of the bytes of BF16 are moved. Gradients go the same way back.
Rows that stay on their rank are copied as they are.

**Error.** ``"e4m3"`` rounds a row once per exchange to nearest, to its maximum / 448 times an E4M3 number: an element
by at most 2⁻⁴ of itself, and below a 2⁻¹⁴·⁸ of the row's maximum by at most 2⁻¹⁸·⁸ of that. Of normal numbers that is
2.6 % of the row in root mean square. Experts that round what arrives to E2M1 decide otherwise about some elements than
they would about the original. With ``"e4m3_odd"`` they do not: rows travel as weights do (:mod:`.weights`), rounded to
odd, and are the same to whatever reads E2M1 codes by rows without outliers. Others see up to twice the error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

import qcompile.kernels.register  # noqa: F401  (the op below)
from qcompile import compat

from . import weights

__all__ = ["Codes", "exchange_rows"]

#: What rows travel as. Gradients of rows that were rounded to odd are rounded to nearest.
Codes = Literal["e4m3", "e4m3_odd"]
_QUANTIZER = "e4m3 row absmax even"
_SCALE = torch.float32
_Counts = tuple[int, ...]


def exchange_rows(
    x: Tensor,
    sent: Sequence[int],
    received: Sequence[int],
    group: dist.ProcessGroup | None = None,
    codes: Codes | None = "e4m3",
) -> Tensor:
    """All-to-all of rows, differentiable.

    Args:
        x: floating-point ``[rows, width]``, those for the first rank first; bfloat16 for ``"e4m3_odd"``.
        sent: how many rows go to each rank, ``len(x)`` together.
        received: how many come from each rank.
        group: by default all ranks.
        codes: what rows, and in the backward their gradients, travel as; ``None``: as they are.

    Returns the rows that arrive, those of the first rank first, in the dtype of ``x``. A row with a NaN arrives as NaN,
    one with an infinity as none that is finite. In a compiled graph counts may be data of it
    (``torch._dynamo.config.capture_scalar_outputs``). Raises ``ValueError`` where counts or ``codes`` do not fit; a
    graph whose counts do not, ``RuntimeError`` when it runs.
    """
    if not dist.is_initialized():
        msg = "exchange_rows: there are no ranks; call torch.distributed.init_process_group first"
        raise ValueError(msg)
    group = group if group is not None else dist.group.WORLD
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    conditions = _conditions(x, sent, received, ranks, rank)
    if torch.compiler.is_compiling():
        for condition in conditions:
            compat.check_when_it_runs(condition)
    elif not all(conditions):
        msg = (
            f"exchange_rows: x is {x.dtype} {list(x.shape)}, sent {list(sent)}, received {list(received)}; give a"
            f" floating-point matrix, and one count for each of the {ranks} ranks, ints ≥ 0, those of sent adding up to"
            f" its rows, and both the same for rank {rank} itself"
        )
        raise ValueError(msg)
    known = (*get_args(Codes), None)
    if codes not in known:
        msg = f"exchange_rows: codes={codes!r}; known: {', '.join(map(repr, known))}"
        raise ValueError(msg)
    if codes == "e4m3_odd" and x.dtype != torch.bfloat16:
        msg = f"exchange_rows: codes='e4m3_odd' of {x.dtype}; give bfloat16 rows, or codes='e4m3'"
        raise ValueError(msg)
    return _Exchange.apply(x, tuple(sent), tuple(received), group, codes)


def _conditions(
    x: Tensor, sent: Sequence[int], received: Sequence[int], ranks: int, rank: int
) -> Iterator[bool | torch.SymBool]:
    yield x.dim() == 2 and x.is_floating_point() and len(sent) == len(received) == ranks
    for count in (*sent, *received):
        yield type(count) is int and count >= 0
    yield sum(sent) == len(x)
    yield sent[rank] == received[rank]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: _Counts, received: _Counts, group: dist.ProcessGroup, codes: Codes | None
    ) -> Tensor:
        ctx.back = received, sent, group, codes and "e4m3"
        return _exchanged(x, sent, received, group, codes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _exchanged(gradient, *ctx.back), None, None, None, None


def _exchanged(x: Tensor, sent: _Counts, received: _Counts, group: dist.ProcessGroup, codes: Codes | None) -> Tensor:
    if codes is None:
        return _all_to_all(x.contiguous(), sent, received, group)
    arrived = _decoded(_all_to_all(_encoded(x, codes), sent, received, group), codes, x.dtype)
    rank = dist.get_rank(group)
    ours, here = sum(sent[:rank]), sum(received[:rank])
    arrived[here : here + received[rank]] = x[ours : ours + sent[rank]]
    return arrived


def _all_to_all(x: Tensor, sent: _Counts, received: _Counts, group: dist.ProcessGroup) -> Tensor:
    """Functional, since Dynamo loses the gradient of a result that is written in place (torch 2.11)."""
    collectives = torch.ops._c10d_functional
    return collectives.wait_tensor(collectives.all_to_all_single(x, received, sent, group.group_name))


def _encoded(x: Tensor, kind: Codes) -> Tensor:
    """Uint8 ``[rows, width + 4]``: codes, and the bytes of the scale, or of the row's maximum."""
    if kind == "e4m3_odd":
        codes, scales = weights.encode(x)
    else:
        codes, scales, _ = torch.ops.qcompile.quantize_8bit(x.contiguous(), _QUANTIZER, False)
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], 1)


def _decoded(data: Tensor, kind: Codes, dtype: torch.dtype) -> Tensor:
    width = data.shape[1] - _SCALE.itemsize
    codes, scales = data[:, :width], data[:, width:].contiguous().view(_SCALE)
    if kind == "e4m3_odd":
        return weights.decode(codes, scales)
    return (codes.view(torch.float8_e4m3fn).float() * scales).to(dtype)
