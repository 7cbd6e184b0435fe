"""FP8 gradients on two ranks over gloo, against exact sums, against the reference's codes, and against wide gradients.

What would break: a shard that is sent to another rank, a part of it that is summed twice or left out, a mean that is a
sum, ranks that decode different bytes, micro-batches that are reduced one by one.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..loops.ranks import WORLD, Ranks
from . import worker

#: Threads and a network that two processes of one machine can share.
GLOO = ({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},) * WORLD
#: Relative errors, L2. E4M3 rounds to 2⁻⁴ of a binade's start at most, 2.6 % root mean square; of two summands that are
#: alike in size and independent, one is rounded, and the mean of an all-reduce once more.
ONE_HOP, TWO_HOPS = 0.020, 0.033
TAKEN = (
    "fp8_gradients: {} already reduces gradients with {}, which this would replace; call it once, on wrappers without "
    "a communication hook"
)


@pytest.fixture(scope="module")
def wire(tmp_path_factory) -> Ranks:
    return Ranks(worker.__file__, "wire", tmp_path_factory.mktemp("wire"), GLOO)


def error(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert list(actual) == list(exact)
    a, b = (torch.cat([t.flatten().double() for t in each.values()]) for each in (actual, exact))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", worker.DTYPES, ids=str)
@pytest.mark.parametrize("width", worker.WIDTHS)
def test_reduce_scatter(width, dtype, wire):
    """Own summands as they are, the other's as the reference rounds them, added up in float32, and bytes counted."""
    for rank, found in enumerate(wire("direct")):
        assert torch.equal(found[f"scatter {width} {dtype}"], worker.scattered(rank, width, dtype))
        # Codes, and a float32 number per block of 32; parts are filled up to 16 bytes.
        assert width * (1 + 1 / 8) <= found[f"sent {width}"] <= width * (1 + 1 / 8) + 3 * 2 * 16


@pytest.mark.parametrize("dtype", worker.DTYPES, ids=str)
@pytest.mark.parametrize("width", worker.WIDTHS)
def test_all_reduce(width, dtype, wire):
    first, second = (found[f"all {width} {dtype}"] for found in wire("direct"))
    assert torch.equal(first, second)
    size = 2 * width - 3
    exact = sum(worker.summand(rank, size, dtype).double() for rank in range(WORLD)) / 2
    assert error({"": first}, {"": exact}) < (TWO_HOPS if width > 100 else 0.06)  # of few elements it is by chance
    expected = worker.first_shard(width, dtype)
    assert torch.equal(first[: len(expected)], expected)


def test_what_is_not_finite_arrives(wire):
    for found in wire("direct"):
        assert not found["broken"][[7, 300]].isfinite().any()
        assert found["broken"][64:288].isfinite().all()  # other blocks


def test_a_group_of_one_rank_is_exact(wire):
    """Nothing is sent, so nothing is to be rounded."""
    for found in wire("alone"):
        assert torch.equal(found["summed"], found["own"] / 4)
        assert found["sent"] == 0
        assert all(torch.equal(found["fp8"][name], value) for name, value in found["wide"].items())


@pytest.mark.parametrize(
    ("cell", "limit"),
    [("fsdp", ONE_HOP), ("fsdp_bfloat16", ONE_HOP), ("ddp", TWO_HOPS), ("ddp_compiled", TWO_HOPS)],
)
def test_gradients_of_a_model(cell, limit, wire):
    first, second = wire(cell)
    assert all(torch.equal(first["fp8"][name], second["fp8"][name]) for name in first["fp8"])
    assert 0.001 < error(first["fp8"], first["wide"]) < limit
    assert first["traffic"]["reductions"] == (4 if cell.startswith("ddp") else 3)  # buckets; blocks and the rest
    itemsize = 2 if cell == "fsdp_bfloat16" else 4
    # Blocks of 32: 1⅛ bytes per element; shards are filled up to whole blocks and 16 bytes.
    ratio = first["traffic"]["bytes"] / first["traffic"]["wide_bytes"]
    assert 1.125 / itemsize <= ratio < 1.2 / itemsize


@pytest.mark.parametrize(("kind", "limit"), [("fsdp", ONE_HOP), ("ddp", TWO_HOPS)])
def test_accumulation(kind, limit, wire):
    """Micro-batches without synchronization send nothing (asserted by the cell), and nothing of them is lost."""
    first, second = wire(f"{kind}_accumulated")
    assert all(torch.equal(first["fp8"][name], second["fp8"][name]) for name in first["fp8"])
    assert 0.001 < error(first["fp8"], first["wide"]) < limit


def test_a_divisor_of_the_users(wire):
    for found in wire("divided"):
        for name, mean in found["mean"].items():
            assert torch.equal(found["divided"][name], mean / 4), name  # 1/8 of the sum, and 1/2: exact


def test_fp8_lm_adds_up_in_fp8(wire):
    """By hand: 4 is 448 at first, and twice that ends at 448; then µ is halved as long as a sum lies there."""
    first, second = wire("fp8_lm")
    for step, (one, other) in enumerate(zip(first["steps"], second["steps"], strict=True)):
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert one["a"][0, 0] == (2.0 if step == 0 else 4.0)
        # 11.2 and then 5.6 and 2.8, which E4M3 rounds to 11 and 5.5 and 2.75; twice that it holds.
        assert one["a"][0, 1] == 11 / 112
        # The mean of 0 and 3; a sum that is 448 counts as one that was cut, too, and µ has grown in the last step.
        assert torch.allclose(one["b"], torch.tensor(1.5), rtol=1e-3)
        assert one["factor DistributedDataParallel.module.b"] == pytest.approx(0.5 * 2 ** (1e-3 * step))
        assert one["factor DistributedDataParallel.module.a"] == pytest.approx((0.5, 0.25, 0.25 * 2**1e-3)[step])
    assert first["bytes"] < 0.3 * first["wide_bytes"]
    ours, wide = wire("ddp")[0]["fp8"], wire("ddp")[0]["wide"]
    assert 1.05 * error(ours, wide) < error(first["decoder"], wide) < 0.12
    taken = TAKEN.replace("fp8_gradients: ", "fp8_lm_gradients: ")
    assert first["again"] == taken.format("DistributedDataParallel", "fp8_lm_gradients")
    assert first["plain"] == "fp8_lm_gradients: no DistributedDataParallel in the model; wrap it first"
    assert first["fsdp"].startswith("fp8_lm_gradients: FSDPLinear is sharded; use fp8_gradients, or Dist")


def test_weights_in_8_bits_change_nothing(wire):
    """The loss and every gradient, bit for bit."""
    for rank in wire("weights"):
        assert len(rank["traffic"]["weights"]) == 4  # of the block; not the head's, which is the embedding's
        assert [name for name, value in rank["wide"].items() if not torch.equal(value, rank["narrow"][name])] == []
        # Rows of 36 and 52: 1.1 bytes instead of 2, beside biases, norms and parts that are filled up to 16 bytes.
        assert 0.55 < rank["traffic"]["bytes"] / rank["traffic"]["wide_bytes"] < 0.65
        assert rank["again"].startswith("fp8_weights: blocks.0 already gathers weights with _AllGather, which this")
        assert rank["none"].startswith("fp8_weights: no weight of an FSDP2 module is 'e2m1 row; ste' in the report")
        assert rank["dtype"] == (
            "fp8_weights: FSDPDecoder gathers float32; give fully_shard MixedPrecisionPolicy(param_dtype=bfloat16)"
        )


def test_replicas(wire):
    (first, second), wide = wire("replicated"), wire("ddp")[0]["wide"]
    assert all(torch.equal(first["fp8"][name], second["fp8"][name]) for name in wide)
    assert 0.001 < error(first["fp8"], wide) < TWO_HOPS
    assert first["bytes"] > 0
    assert all(torch.equal(first["divided"][name], second["divided"][name]) for name in wide)
    assert 0.001 < error(first["divided"], first["divided_wide"]) < TWO_HOPS  # a mean would be half of it
    assert first["message"] == (
        "fp8_gradients: Decoder is replicated on an axis of its mesh, whose reduction FSDP2 runs itself; shard on "
        "mesh['shard'] and give replicas=mesh['replicate'].get_group()"
    ).replace("Decoder", "FSDPDecoder")


def test_what_is_refused(wire):
    for found in wire("refused"):
        assert "gradients are float64; reduce them in float32, bfloat16 or float16" in found.pop("dtype")
        assert "the gradient of DistributedDataParallel.module.weight is sparse; make it dense" in found.pop("sparse")
        assert found == {
            "groups": "fp8_gradients: FSDPLinear has 2 parameter groups; apply fully_shard to its parts",
            "format": "fp8_gradients: format='e3m4'; one of e4m3, e5m2",
            "block": "fp8_gradients: block=100; a power of two from 32 to 4096",
            "block_float": "fp8_gradients: block=256.0; a power of two from 32 to 4096",
            "ranks": "fp8_gradients: replicas=[0, 1]; a ProcessGroup, for example mesh['replicate'].get_group()",
            "again": TAKEN.format("taken", "_Fp8ReduceScatter"),
            "untouched": "",
            "again_ddp": TAKEN.format("DistributedDataParallel", "fp8_gradients"),
            "hooked": TAKEN.format("FSDPLinear", "an all-reduce hook"),
            "plain": "fp8_gradients: no FSDP2 module or DistributedDataParallel in the model; call fully_shard(model) "
            "first",
            "fsdp1": "fp8_gradients: 0 is sharded by FSDP1; use torch.distributed.fsdp.fully_shard",
            "replicas": "fp8_gradients: replicas= is for FSDP2; give DistributedDataParallel, a "
            "DistributedDataParallel, process_group=",
        }


def test_compiled_blocks_resume_bitwise(wire):
    """FP8 gradients and 8-bit states: a new model goes on where the first one was saved."""
    first, second = wire("trained")
    for name, parameter in first["whole"].items():
        assert torch.equal(parameter, first["resumed"][name]), name
        assert torch.equal(parameter, second["whole"][name]), name
