"""Experts on two ranks over gloo: rows that travel as codes, and a layer beside the whole of it on one rank.

What would break: rows that arrive elsewhere or in another order, a scale of another row, own rows that are rounded,
a gradient that goes astray.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.distributed import exchange_rows
from qcompile.kernels.quantize import reference

from ..loops.ranks import WORLD, Ranks
from . import experts_worker as worker
from .test_gradients import GLOO


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    return Ranks(worker.__file__, "experts", tmp_path_factory.mktemp("experts"), GLOO)


def rounded(x: Tensor) -> Tensor:
    quantizer = "e4m3 row absmax even"
    codes, scales = reference.quantize(x, quantizer, -1)
    return reference.dequantize(codes, scales, quantizer, -1, x.shape[-1], x.dtype)


@pytest.mark.nightly
def test_rows_arrive_rounded_once_and_own_ones_as_they_are(ranks):
    """So do gradients, there and back. Zeros and NaN arrive as such."""
    for rank, found in enumerate(ranks("exchanged")):
        parts = [worker.rows(source).split(worker.COUNTS[source])[rank] for source in range(WORLD)]
        arrived, gradient = found["e4m3"]
        coded = [part if source == rank else rounded(part) for source, part in enumerate(parts)]
        torch.testing.assert_close(arrived, torch.cat(coded), rtol=0, atol=0, equal_nan=True)
        mine = worker.rows(rank).split(worker.COUNTS[rank])
        back = [part * 2 if target == rank else rounded(rounded(part) * 2) for target, part in enumerate(mine)]
        torch.testing.assert_close(gradient, torch.cat(back), rtol=0, atol=0, equal_nan=True)
        wide, gradient = found["wide"]
        torch.testing.assert_close(wide, torch.cat(parts), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, worker.rows(rank) * 2, rtol=0, atol=0, equal_nan=True)


@pytest.mark.nightly
def test_sharded_experts_are_the_whole_layer(ranks):
    """DTensors of experts beside a router under FSDP2. As they are, or rounded to odd, tokens give the same codes;
    rounded to nearest, other ones of some elements.
    """
    for found in ranks("layer"):
        for name, expected in found["whole"].items():
            scale = expected.norm()
            assert (found["wide"][name] - expected).norm() < 1e-2 * scale, name  # sums in BF16 in another order
            error = (found["e4m3"][name] - expected).norm() / scale
            assert 0 < error < 0.2, name
        assert torch.equal(found["odd"]["y"], found["wide"]["y"])
        for name, expected in found["wide"].items():  # gradients of tokens are rounded on their way back, to nearest
            assert (found["odd"][name] - expected).norm() < 0.03 * expected.norm(), name


def test_rows_without_ranks_are_refused():
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group first"):
        exchange_rows(torch.ones(3, 8), (3,), (3,))


def test_counts_that_do_not_fit_are_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'alone'}", rank=0, world_size=1)
    try:
        x = torch.ones(3, 8)
        for sent, received in (((2,), (3,)), ((3, 0), (3,)), ((3,), (2,)), ((3,), (-3,)), ((3,), (3.0,))):
            with pytest.raises(ValueError, match="one count for each of the 1 ranks, ints ≥ 0"):
                exchange_rows(x, sent, received)
        with pytest.raises(ValueError, match="give a floating-point matrix"):
            exchange_rows(x.long(), (3,), (3,))
        with pytest.raises(ValueError, match="codes='e5m2'; known: 'e4m3', 'e4m3_odd', None"):
            exchange_rows(x, (3,), (3,), codes="e5m2")
        with pytest.raises(ValueError, match="give bfloat16 rows"):
            exchange_rows(x, (3,), (3,), codes="e4m3_odd")
        assert torch.equal(exchange_rows(x, (3,), (3,)), x)
    finally:
        torch.distributed.destroy_process_group()
