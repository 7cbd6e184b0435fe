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
@pytest.mark.parametrize("name", worker.COUNTS)
def test_rows_arrive_rounded_once_and_own_ones_as_they_are(name, ranks):
    """So do gradients, there and back. Zeros and NaN arrive as such, and nothing where there is nothing."""
    counts = worker.COUNTS[name]
    for rank, found in enumerate(ranks("exchanged")):
        parts = [worker.rows(source, counts).split(counts[source])[rank] for source in range(WORLD)]
        arrived, gradient = found[f"{name} e4m3"]
        coded = [part if source == rank else rounded(part) for source, part in enumerate(parts)]
        torch.testing.assert_close(arrived, torch.cat(coded), rtol=0, atol=0, equal_nan=True)
        mine = worker.rows(rank, counts).split(counts[rank])
        back = [part * 2 if target == rank else rounded(rounded(part) * 2) for target, part in enumerate(mine)]
        torch.testing.assert_close(gradient, torch.cat(back), rtol=0, atol=0, equal_nan=True)
        wide, gradient = found[f"{name} None"]
        torch.testing.assert_close(wide, torch.cat(parts), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(gradient, worker.rows(rank, counts) * 2, rtol=0, atol=0, equal_nan=True)


@pytest.mark.nightly
def test_sharded_experts_are_the_whole_layer(ranks):
    """DTensors of experts, three per rank, beside a router under FSDP2. As they are, or rounded to odd, tokens give the
    same codes; rounded to nearest, other ones of some elements.
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


@pytest.mark.nightly
def test_a_rank_whose_experts_no_token_chooses(ranks):
    """It multiplies nothing, its experts' gradients are 0, and its tokens come back from the other rank."""
    for found in ranks("lopsided"):
        whole, odd = found["whole"], found["odd"]
        for name in ("up", "down"):
            assert whole[name][: worker.EXPERTS // 2].any(), name
            assert not odd[name][worker.EXPERTS // 2 :].any(), name
        for name, expected in whole.items():
            assert (odd[name] - expected).norm() < 0.03 * expected.norm(), name
        assert torch.equal(odd["y"], whole["y"])


@pytest.mark.nightly
@pytest.mark.parametrize("codes", [None, "e4m3_odd"])
@pytest.mark.parametrize("routed", ["both", "first"])
def test_a_layer_and_its_exchanges_in_one_graph(routed, codes, ranks):
    """Counts of rows are data of the graph: no other partition makes it compile again. Bits are those of compiled
    experts between exchanges in eager torch, but for the gradient of the router's softmax, which tokens get a part of.
    """
    for found in ranks("compiled"):
        assert found[f"graphs {codes}"] == 0
        expected, actual = found[f"{routed} {codes}"]
        for name, value in expected.items():
            if name in ("y", "up", "down"):
                assert torch.equal(actual[name], value), name
            else:
                assert (actual[name] - value).norm() < 2**-8 * value.norm(), name  # a place of BF16


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
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            counted = torch.compile(
                lambda x, n: exchange_rows(x, n.tolist(), n.tolist()), backend="aot_eager", fullgraph=True
            )
            assert torch.equal(counted(x, torch.tensor([3])), x)
            for count in (2, -1):  # data, which only the graph sees
                with pytest.raises(RuntimeError):
                    counted(x, torch.tensor([count]))
    finally:
        torch.distributed.destroy_process_group()
