"""DDP and FSDP2 on two GPUs against one GPU on the whole batch: run by hand (`pytest -n 0 -s FILE`), never in CI.

Activations are quantized row by row and weights are whole wherever they are multiplied, so splitting a batch between
GPUs changes no code by definition. What it changes is the order in which a matrix product of another size, and the
gradients over tokens, are summed: 2⁻²⁴ relative in float32. That can carry an element over a rounding boundary, with a
probability of about 1e-6 for each of a million elements per step. Another code is a step of the grid in one element:
0.5 / (2 · √256) ≈ 1.5 % of the row of one token, which is one of the 512 that a gradient is summed over, that is
1.5 % / √512 ≈ 7e-4 of it. The limit of 1e-2 is some two hundred such tokens. A scale that depends on the batch would
change all codes (10 %), a missing or doubled reduction the gradient itself (100 %). Over several steps a code that went
the other way moves weights, whose codes may then go the other way too: there the limit is 5e-2.

With `backward="fp8"`, dY is quantized for wgrad with a scale for every column of the tokens at hand; in BF16, sums of
another order differ by 2⁻⁹, which moves one code in fifty. These two are compared with one GPU that adds up the
gradients of the half-batches: the same products of the same sizes, and a sum of two terms, which has one order.

Compared are norms of differences relative to norms: of every parameter's gradient in the first step, of every
parameter's change over five steps, and the loss of every step relative to what it falls by. Each test prints the
largest; on CPUs (see the worker) they are zero in all comparisons with half-batches.

FP8 gradients (alone: `-k test_fp8`) are compared with the reference's sums, bit for bit, and with wide gradients; the
limits are those of `tests/distributed`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import worker as wire
from ..distributed.test_gradients import ONE_HOP, TWO_HOPS
from ..loops.ranks import WORLD, Ranks
from . import distributed_worker as worker

LIMITS = {"gradient": 1e-2, "loss": 1e-2, "change": 5e-2}

pytestmark = [
    pytest.mark.skipif(
        worker.DEVICE == "cuda" and not (torch.cuda.device_count() >= WORLD and dist.is_nccl_available()),
        reason="needs two GPUs and NCCL",
    ),
    pytest.mark.usefixtures("fresh_dynamo"),
]

each_recipe = pytest.mark.parametrize("recipe", worker.SETTINGS)
single_gpu = functools.cache(worker.single_gpu)


def start(group: str, directory: Path) -> Ranks:
    """Two processes. Each sees one GPU, number 0 to it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    environments = [{"CUDA_VISIBLE_DEVICES": visible[rank]} for rank in range(WORLD)]
    if worker.DEVICE == "cpu":
        environments = [{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}] * WORLD
    return Ranks(worker.__file__, group, directory, environments, timeout=400)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    """Started when one GPU has compiled the blocks: they find its kernels in Inductor's cache, which knows devices by
    number.
    """
    for recipe in worker.SETTINGS:
        for dtype in (torch.float32, torch.bfloat16):
            single_gpu(recipe, dtype, WORLD)
    return start("two", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def fp8_ranks(tmp_path_factory) -> Ranks:
    """Gradients travel in 8 bits; nothing is compiled by Inductor."""
    return start("wire", tmp_path_factory.mktemp("wire"))


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def errors(rank: dict[str, Any], expected: dict[str, Any], losses: Tensor) -> dict[str, float]:
    """The largest over parameters and steps."""
    start = {name: p.detach().cpu() for name, p in worker.Decoder().named_parameters()}
    gradients, parameters = expected["gradients"], expected["parameters"]
    assert list(rank["gradients"]) == list(gradients) == list(start)
    fall = expected["losses"][0] - expected["losses"][-1]
    assert fall > 0.1, "nothing was learned that could differ"
    assert (expected["losses"].diff() < 0).all(), "unstable training multiplies the smallest difference"
    return {
        "gradient": max(error(rank["gradients"][name], value) for name, value in gradients.items()),
        "change": max(error(rank["parameters"][n] - start[n], value - start[n]) for n, value in parameters.items()),
        "loss": float((losses - expected["losses"]).abs().max() / fall),
    }


def assert_like_one_gpu(title: str, results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Ranks agree to the bit, and with one GPU up to ``LIMITS``."""
    first, second = results
    assert all(torch.equal(first["parameters"][name], value) for name, value in second["parameters"].items())
    losses = torch.stack([rank["losses"] for rank in results]).mean(0)
    found = errors(first, expected, losses)
    print(f"\n{title}: " + ", ".join(f"{what} {value:.1e}" for what, value in found.items()))
    assert all(value < LIMITS[what] for what, value in found.items()), found


@each_recipe
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_gpus_train_like_one_in_float32(how, recipe, ranks):
    """All of the model compiled around DDP, its blocks under FSDP2."""
    for parts in (1, WORLD) if recipe != "fp8_products" else (WORLD,):
        expected = single_gpu(recipe, torch.float32, parts)
        assert_like_one_gpu(f"{recipe}, {how}, float32, {parts} part(s)", ranks(f"{recipe}_{how}"), expected)


@each_recipe
def test_two_gpus_train_like_one_in_bfloat16(recipe, ranks):
    """Parameters gathered in BF16, gradients reduced in FP32, FP32 in the optimizer; one GPU does the same by hand."""
    expected = single_gpu(recipe, torch.bfloat16, WORLD)
    assert_like_one_gpu(f"{recipe}, fsdp, bfloat16, {WORLD} parts", ranks(f"{recipe}_fsdp_bf16"), expected)


@each_recipe
@pytest.mark.parametrize("how", ["ddp", "fsdp_bf16"])
def test_gradients_reduced_in_bfloat16(how, recipe, ranks):
    """By DDP's hook or FSDP2's policy: each rank's gradient is rounded by at most 2⁻⁹ of it and so is the sum. In norm,
    gradients of two random halves are at most twice their mean: 3 · 2⁻⁹.
    """
    exact, reduced = (ranks(f"{recipe}_{name}")[0]["gradients"] for name in (how, f"{how}_reduce"))
    worst = max(error(reduced[name], value) for name, value in exact.items())
    print(f"\n{recipe}, {how}, reduced in bfloat16: gradient {worst:.1e}")
    assert 0 < worst < 3 * 2.0**-9


@each_recipe
def test_the_report_holds_for_both_ranks(recipe, ranks):
    first, second = ranks(f"{recipe}_report")
    assert first["merged"] == second["merged"]
    own, merged = json.loads(first["own"]), json.loads(first["merged"])
    assert merged["ranks"] == [0, 1]
    assert merged["disagreements"] == []
    assert {tuple(row["ranks"]) for row in merged["rows"]} == {(0, 1)}
    assert merged["quantized_sites"] == own["quantized_sites"] == 5 * worker.LAYERS
    assert merged["code_bytes"] == 2 * own["code_bytes"] > 0


# --- gradients in 8 bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", wire.DTYPES, ids=str)
@pytest.mark.parametrize("width", wire.WIDTHS)
def test_fp8_sums_are_those_of_the_reference(width, dtype, fp8_ranks):
    """To the bit: codes, scales, the order of ranks, and float32 sums."""
    results = fp8_ranks("sums")
    for rank, found in enumerate(results):
        assert torch.equal(found[f"scatter {width} {dtype}"], wire.scattered(rank, width, dtype))
    first, second = (found[f"all {width} {dtype}"] for found in results)
    assert torch.equal(first, second)
    expected = wire.first_shard(width, dtype)
    assert torch.equal(first[: len(expected)], expected)


def test_fp8_numbers_that_are_not_finite_arrive(fp8_ranks):
    for found in fp8_ranks("sums"):
        assert not found["broken"][[7, 300]].isfinite().any()
        assert found["broken"][64:288].isfinite().all()  # other blocks


@pytest.mark.parametrize(("how", "limit"), [("fsdp", ONE_HOP), ("ddp", TWO_HOPS)])
def test_fp8_gradients_of_a_model(how, limit, fp8_ranks):
    """Ranks are equal to the bit. A bucket that is reduced before its gradients are there errs by far more."""
    first, second = fp8_ranks(how)
    assert all(torch.equal(value, second["fp8"][name]) for name, value in first["fp8"].items())
    actual, exact = (torch.cat([g.flatten() for g in first[kind].values()]) for kind in ("fp8", "wide"))
    print(f"\nfp8 gradients, {how}: {error(actual, exact):.1e}")
    assert 1e-3 < error(actual, exact) < limit
    ratio = first["traffic"]["bytes"] / first["traffic"]["wide_bytes"]
    assert 1.015 / 4 < ratio < 1.03 / 4  # a float32 scale for 256 codes, and what fills the last blocks


def test_fp8_lms_sums_err_more(fp8_ranks):
    first, second = fp8_ranks("fp8_lm")
    assert all(torch.equal(value, second["fp8"][name]) for name, value in first["fp8"].items())
    actual, exact = (torch.cat([g.flatten() for g in first[kind].values()]) for kind in ("fp8", "wide"))
    print(f"\nFP8-LM's gradients: {error(actual, exact):.1e}")
    assert TWO_HOPS * 0.8 < error(actual, exact) < 0.12


def test_fp8_weights_change_nothing(fp8_ranks):
    """The loss to the bit; gradients but for the order in which attention's backward adds up."""
    for found in fp8_ranks("weights"):
        assert len(found["weights"]) >= 4
        assert found["ratio"] < 0.6
        assert torch.equal(found["narrow loss"], found["wide loss"])
        actual, exact = (torch.cat([g.flatten() for g in found[kind].values()]) for kind in ("narrow", "wide"))
        print(f"\nfp8 weights: gradients differ by {error(actual, exact):.1e}")
        assert error(actual, exact) < 1e-3
