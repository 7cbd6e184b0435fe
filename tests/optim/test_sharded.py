"""Two ranks under FSDP2 against one process, and checkpoints between them; all of it bit for bit.

What would break: a block or a random number that depends on how a parameter is sharded, a rank that steps where another
skips, scales that are not saved beside their codes.
"""

from __future__ import annotations

import pytest
import torch

from ..loops.ranks import WORLD, Ranks
from . import worker

#: Threads and a network that two processes of one machine can share.
GLOO = ({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},) * WORLD


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Ranks:
    return Ranks(worker.__file__, "fsdp", tmp_path_factory.mktemp("fsdp"), GLOO)


def alone(**options):
    model = worker.Model()
    return model, worker.optimizer_of(model, **options)


def one_process(**options):
    model, optimizer = alone(**options)
    worker.train(model, optimizer, range(worker.STEPS))
    return worker.everything(model, optimizer)


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("states", ["8bit", "fp8-lm"])
def test_two_ranks_are_one_process(states, fsdp):
    expected = one_process(states=states)
    assert expected["up.weight.exp_avg_sq_scale"].shape == (57, 1)
    for rank in fsdp(states):
        assert_same(rank, expected)


def test_two_ranks_orthogonalize_what_one_process_does(fsdp):
    expected = worker.with_muon(worker.Model())
    assert expected["up.weight.momentum_buffer_scale"].shape == (57, 1)
    for rank in fsdp("muon"):
        assert_same(rank, expected)


def test_two_ranks_resume(fsdp):
    for rank in fsdp("checkpoint"):
        assert_same(rank, one_process())


def test_one_process_resumes_what_two_ranks_saved(fsdp):
    fsdp("checkpoint")
    assert_same(worker.resumed(fsdp.directory / "checkpoint", alone), one_process())


def test_a_nan_of_one_rank_skips_the_step_of_both(fsdp):
    assert [rank["changed"] for rank in fsdp("nan")] == [[], []]


def test_shards_that_cut_blocks_are_refused(fsdp):
    for rank in fsdp("columns"):
        assert rank["message"] == (
            "AdamW: 2 shards along axis 1 of a parameter (64, 128) cut blocks of 128; give block= such that a shard "
            "holds whole blocks, or the parameter a group with states='fp32'"
        )
        assert rank["scales"].shape == (64, 2)
        torch.testing.assert_close(rank["weight"], torch.full((64, 128), 1 - 1e-3 - 1e-5))
