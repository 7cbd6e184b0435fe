"""Packed weights on two gloo ranks against one process on the whole batch.

Codes are those of one process, so only sums differ: gradients over the 12 rows of a rank and then over two ranks. Per
step that is 24·2⁻²⁴ ≈ 1.4e-6 of the largest summand at the very most; gradients are allowed 1e-6 of their norm.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import qcompile
from qcompile.stored import PackedShard, PackedWeight, packed_state_dict

from ..loops.ranks import WORLD, Ranks
from . import sharded as worker

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

Parts = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    directory = tmp_path_factory.mktemp("stored")
    dcp.save(worker.qlora().state_dict(), checkpoint_id=directory / "of_one", no_dist=True)
    gloo = ({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},) * WORLD
    return Ranks(worker.__file__, "quick", directory, gloo, timeout=400)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process, eager."""
    return worker.train(worker.qlora(), worker.batch())


@pytest.fixture(scope="module")
def whole() -> Parts:
    return worker.parts_of(worker.qlora().state_dict())


def assert_trains_like(trained: list[dict[str, Any]], expected: dict[str, Any], limit: float = 1e-6) -> None:
    torch.testing.assert_close(sum(rank["losses"] for rank in trained) / WORLD, expected["losses"], rtol=limit, atol=0)
    for rank in trained:
        assert list(rank["gradients"]) == list(expected["gradients"])
        for name, gradient in expected["gradients"].items():
            assert gradient.norm() > 0, name
            assert (rank["gradients"][name] - gradient).norm() <= limit * gradient.norm(), name


def assert_packed_alike(actual: Parts, expected: Parts) -> None:
    """The same parts, bit for bit, of the weights that are packed."""
    packed = {name: parts for name, parts in expected.items() if "codes" in parts}
    assert len(packed) == 5 * worker.LAYERS
    for name, parts in packed.items():
        assert list(actual[name]) == list(parts)
        for part, tensor in parts.items():
            bits = [t.reshape(-1).view(torch.uint8) for t in (actual[name][part], tensor)]
            assert torch.equal(*bits), f"{name}.{part}"


# --- FSDP2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["eager", "compiled", "offloaded"])
def test_fsdp_trains_adapters_like_one_process(how, ranks, alone):
    """All kinds of scales, weights whose 37 rows do not divide, and blocks of nested scales across both shards."""
    assert_trains_like(ranks(how), alone)


def test_weights_decode_to_what_mixed_precision_says(ranks):
    """``param_dtype=bfloat16``, against the model in BF16: a few roundings of 2⁻⁸ per product, 10 products."""
    inputs, targets = worker.batch()
    expected = worker.train(worker.qlora().bfloat16(), (inputs.bfloat16(), targets))
    expected["gradients"] = {name: gradient.float() for name, gradient in expected["gradients"].items()}
    assert_trains_like(ranks("bfloat16"), expected, 2.0**-4)


def test_a_rank_holds_half_of_a_weight_and_knows_which(ranks):
    """Rows of rank 1 were wrong in a prototype, since they read the scales of scales from the first one on."""
    model = worker.qlora()
    for name, weight in model.named_parameters():
        if not isinstance(weight, PackedWeight):
            continue
        held = [rank["rows"][name] for rank in ranks("eager")]
        assert torch.equal(torch.cat(held), weight.decoded()), name
        shared = sum(weight.parts[part].nbytes for part in ("second", "offset", "global_scale") if part in weight.parts)
        for rank, rows in zip(ranks("eager"), held, strict=True):
            start = 8 if "second" in weight.parts else 0
            assert rank["bytes"][name] == (weight.nbytes - shared) * len(rows) // weight.shape[0] + shared + start


def test_codes_are_gathered_and_nothing_as_wide_as_a_weight(ranks):
    """A block's parameters travel as bytes of as many rows on every rank, the head as its floats; gradients that are
    reduced are the adapters'.
    """
    model = worker.qlora()
    block, head = model.blocks[0], model.lm_head.weight
    adapters = [p for p in block.parameters() if p.requires_grad]
    forward = [("_allgather_base_", "float32", sent_bytes(head) // 4)]
    forward += [("_allgather_base_", "uint8", sum(map(sent_bytes, block.parameters())))] * worker.LAYERS
    backward = (
        forward[1:]
        + [("_reduce_scatter_base_", "float32", WORLD * sum(map(sent_bytes, adapters)) // 4)] * worker.LAYERS
    )
    for rank in ranks("eager"):
        assert [tuple(entry) for entry in rank["sent"]] == (forward + backward) * worker.STEPS
    packed = [p for p in block.parameters() if isinstance(p, PackedWeight)]
    assert sum(map(sent_bytes, packed)) < sum(p.numel() for p in packed) / WORLD  # less than a byte per weight


def sent_bytes(parameter: Tensor) -> int:
    """What a rank sends of a parameter: the bytes of as many rows as rank 0 has."""
    share = -(-parameter.shape[0] // WORLD)
    shared = {"second", "offset", "global_scale"}
    parts = parameter.parts if isinstance(parameter, PackedWeight) else {"": parameter}
    return sum(p.nbytes * share // parameter.shape[0] for name, p in parts.items() if name not in shared)


# --- state ------------------------------------------------------------------------------------------------------------


def test_the_full_state_dict_holds_whole_packed_weights_on_every_rank(ranks, whole):
    """For which codes travel, too."""
    sizes = {"uint8": 0, "float32": 0}
    for parameter in worker.qlora().parameters():
        sizes["uint8" if isinstance(parameter, PackedWeight) else "float32"] += sent_bytes(parameter)
    for rank in ranks("state"):
        assert list(rank["full"]) == list(whole)
        assert list(rank["file"]) == list(packed_state_dict(worker.qlora()))
        assert_packed_alike(rank["full"], whole)
        sent = {kind: sum(n for _, dtype, n in rank["sent"] if dtype == kind) for kind in sizes}
        assert (sent["uint8"], 4 * sent["float32"]) == tuple(sizes.values())


def test_a_full_state_dict_is_loaded_into_a_sharded_model(ranks, whole, alone):
    """Into one that held other weights and has run: what FSDP gathered before must not be read again."""
    for rank in ranks("state"):
        assert_packed_alike(rank["loaded"], whole)
        assert_packed_alike(rank["tensors"], whole)  # full_tensor()
    assert_trains_like([rank["trained"] for rank in ranks("state")], alone)


@pytest.mark.parametrize("saved", ["of_one", "of_two"])
def test_checkpoints_are_loaded_by_two_ranks(saved, ranks, whole):
    for rank in ranks("checkpoint"):
        assert_packed_alike(rank[saved], whole)


def test_a_checkpoint_of_two_ranks_is_loaded_by_one(ranks, whole):
    ranks("checkpoint")
    model = worker.qlora(seed=5)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=ranks.directory / "of_two", no_dist=True)
    assert_packed_alike(worker.parts_of(model.state_dict()), whole)
    assert type(model.blocks[0].up.base_layer.weight) is PackedWeight


# --- DDP and tensor parallelism ---------------------------------------------------------------------------------------


def test_ddp_exchanges_gradients_of_adapters_alone(ranks, alone, whole):
    trained = ranks("ddp")
    assert_trains_like(trained, alone)
    count = sum(gradient.numel() for gradient in alone["gradients"].values())
    for rank in trained:
        assert_packed_alike(rank["full"], whole)
        assert sum(n for name, _, n in rank["sent"] if name == "allreduce_") == worker.STEPS * count


def test_columnwise_layers_decode_their_rows(ranks):
    expected = worker.packed(worker.NESTED, seed=0)(worker.batch()[0])
    for rank in ranks("columnwise"):
        torch.testing.assert_close(rank["y"], expected)


ERRORS = {
    "squares": "layer 'up' of 300×128, stored as 'midrise3 block64x64 absmax even': cannot be cut into pieces of 150: "
    "row 150 is inside of block64x64; shard axis 0, by blocks along rows (pack_ with rules={'up': 'nf4 block64'}), or "
    "leave it wide (skip=['up'])",
    "columns": "cannot be cut into pieces of 64: axis 1 is not the first one; shard axis 0",
    "halves": "two codes of its scales (int4 block64 absmax even) share a byte",
    "rowwise": "axis 1 is not the first one",
    "reduced": "layer 'up': c10d.allreduce_.default of a packed weight: codes are gathered, scattered and broadcast, "
    "but never reduced; send its parts, or weight.decoded()",
    "file": "packed_state_dict: 'up.weight' is sharded; give packed_state_dict what get_model_state_dict returns",
    "loaded": "load_packed_: 'up.weight' is sharded; load before fully_shard, or by set_model_state_dict",
    "wide": "some of its 300 rows cannot be written alone, since all share second, offset; write the whole weight "
    "before it is sharded, or load packed rows (torch.distributed.checkpoint, or a full state dict that every "
    "rank has)",
}


@pytest.mark.parametrize("case", list(ERRORS))
def test_what_cannot_be_done_says_so(case, ranks):
    for rank in ranks("errors"):
        assert ERRORS[case] in rank[case]


# --- one process ------------------------------------------------------------------------------------------------------


def packed(spec: str, rows: int = 300) -> PackedWeight:
    layers = nn.Sequential(nn.Linear(128, rows, bias=False))
    qcompile.pack_(layers, spec)
    return layers[0].weight.detach()


@pytest.mark.parametrize(
    "spec", [worker.NESTED, "e2m1 block16 e4m3", "int8 tensor", "midrise3 block64x64", "nf4 block64"]
)
def test_rows_decode_like_the_weight(spec):
    weight = packed(spec)
    rows = weight[128:210]
    assert type(rows) is PackedShard
    assert torch.equal(rows.decoded(), weight.decoded()[128:210])
    assert torch.equal(rows[64:70].decoded(), weight.decoded()[192:198])
    assert torch.equal(weight[:0].decoded(), weight.decoded()[:0])
    assert torch.equal(torch.nn.functional.linear(torch.eye(128), rows), weight.decoded()[128:210].t())


def test_rows_of_a_whole_weight_take_others_only_if_nothing_is_shared():
    """Copying codes alone would make them mean something else, and their scales of scales would change other rows."""
    weight, other = packed("nf4 block64"), packed("nf4 block64")
    expected = torch.cat([other.decoded()[:150], weight.decoded()[150:]])
    weight[:150].copy_(other[:150])
    assert torch.equal(weight.decoded(), expected)
    weight, other = packed(worker.NESTED), packed(worker.NESTED)
    weight[:150].copy_(weight.clone()[:150])
    for rows in (other[:150], weight[150:]):
        with pytest.raises(ValueError, match=r"layer '0' of 150×128.*some of its 300 rows cannot be written alone"):
            weight[:150].copy_(rows)


def test_what_a_weight_stands_for_leaves_it_as_it_is():
    """DDP writes back what it has broadcast; nested scales of decoded weights are others."""
    weight = packed(worker.NESTED)
    parts = {name: part.clone() for name, part in weight.parts.items()}
    weight.copy_(weight.decoded())
    assert all(torch.equal(weight.parts[name], part) for name, part in parts.items())
