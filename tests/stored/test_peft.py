"""QLoRA with PEFT as it is: loss and adapter gradients are those of bitsandbytes' eager layers.

Both decode the same bytes to the same numbers, so results differ by the order of sums alone: 10⁻⁶ in float32.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from unittest import mock

import pytest
import torch

import qcompile
from qcompile import compat
from qcompile.recipes import FP4, STORED
from qcompile.stored import from_bitsandbytes_
from qcompile.stored.pack import packed_weights
from tests.passes.harness import compiler
from tests.stored.adapters import adapted, in_4_bits, language_model, loss_and_gradients, with_numbers

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

#: Linear layers: q, k, v, o, gate, up, down of two decoder layers or one. Mixtral's experts are no linear layers.
LINEAR = {"llama": 14, "qwen3": 7, "gemma3": 7, "mixtral": 4}
KINDS = [pytest.param(kind, marks=[] if kind == "llama" else pytest.mark.slow) for kind in LINEAR]


#: Passes that are about low-rank products; by request.
LOW_RANK = ["move_factors", "join_products", "accumulate"]


@contextlib.contextmanager
def tensor_cores():
    """What is compiled within it is compiled as for a card."""
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        yield


def program_of(observed) -> str:
    """The forward graph of a card, before what quantizes."""
    return observed.programs["post_grad_accumulate"]


def worst(gradients, expected) -> float:
    """Largest relative difference of a gradient."""
    assert gradients.keys() == expected.keys()
    return max(((gradients[name] - g).norm() / g.norm()).item() for name, g in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_bitsandbytes_eager_with_one_graph_and_nothing_wide_saved(kind):
    """bitsandbytes' bytes, nested scales included, and our own bytes of plain scales."""
    theirs = in_4_bits(language_model(kind), nested=True)
    ours = in_4_bits(language_model(kind), nested=True)
    assert len(from_bitsandbytes_(ours)) == LINEAR[kind]
    theirs, ours = adapted(theirs), adapted(ours)
    expected_loss, expected = loss_and_gradients(theirs)
    compiled, observations = compiler(ours, STORED)
    loss, gradients = loss_and_gradients(ours, compiled)
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert worst(gradients, expected) < 1e-6

    (observed,) = observations
    assert not observed.unaccounted
    products = Counter((row["role"], row["fused"]) for row in observed.gemms)
    assert products["fprop", True] == LINEAR[kind]
    assert products["dgrad", True] == LINEAR[kind] - 3  # the first q, k, v: nothing below them is trained
    weights = {tuple(weight.shape) for _, weight in packed_weights(ours)}
    weights |= {shape[::-1] for shape in weights}
    assert not weights & {tuple(row["shape"]) for row in observed.saved}
    reasons = Counter(d.reason.partition(";")[0] for d in observed.plan.decisions)
    assert reasons["weight stored as nf4 block64 absmax_bnb even"] == LINEAR[kind]
    assert reasons["skip='lora_*'"] == 2 * LINEAR[kind]


def test_our_own_bytes_are_as_good():
    """Packed by us, plain scales: bitwise what bitsandbytes makes of the same weights."""
    ours = language_model()
    qcompile.pack_(ours, "nf4 block64 absmax_bnb")
    theirs = in_4_bits(language_model(), nested=False)
    expected_loss, expected = loss_and_gradients(adapted(theirs))
    loss, gradients = loss_and_gradients(adapted(ours))
    assert abs(loss - expected_loss) < 1e-6 * expected_loss
    assert worst(gradients, expected) < 1e-6


@pytest.mark.parametrize("reentrant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_checkpointing_after_prepare_model_for_kbit_training(reentrant):
    """Which casts all parameters to float32 by ``p.data = …``, and hooks the embeddings."""
    peft = pytest.importorskip("peft")
    results = []
    for compile_it in (False, True):
        model = language_model(num_hidden_layers=1).to(torch.bfloat16)
        qcompile.pack_(model, "nf4 block64")
        model = peft.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": reentrant, "preserve_rng_state": False}
        )
        model = adapted(model).train()
        call = compiler(model, STORED, fullgraph=False)[0] if compile_it else None
        results.append(loss_and_gradients(model, call))
    assert abs(results[0][0] - results[1][0]) < 1e-6 * results[0][0]
    assert worst(results[1][1], results[0][1]) < 2e-6


def test_fp4_activations_beside_stored_weights_and_wide_adapters():
    """W4A4 LoRA: the recipe quantizes activations of the base layers; adapters are left alone by their names."""
    model = language_model(num_hidden_layers=1)
    qcompile.pack_(model, "e2m1 row")
    model = adapted(model)
    compiled, observations = compiler(model, FP4, backward="fp8", min_side=0)
    _, gradients = loss_and_gradients(model, compiled)
    (observed,) = observations
    stored = [row for row in observed.gemms if row["fused"]]
    assert Counter(row["role"] for row in stored) == Counter(fprop=7, dgrad=4)
    assert {row["operands"][0].partition(" ")[0] for row in stored} == {"e2m1", "e4m3"}
    assert all(row["operands"] == ["dense", "dense"] for row in observed.gemms if not row["fused"])
    assert worst(gradients, loss_and_gradients(model)[1]) < 0.6  # FP4 activations cost this much here, and no more


@pytest.mark.parametrize("safe", [False, True])
def test_merging_warns_with_the_error_that_it_measured(safe):
    """PEFT merges by ``weight.data += …`` and, safely, by ``weight.data = …``: neither may be lost, and both round. A
    wide copy takes the merge as it is.
    """
    model = language_model(num_hidden_layers=1)
    qcompile.pack_(model, "nf4 block64")
    model = adapted(model)
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj
    delta, before = adapter.get_delta_weight("default"), adapter.base_layer.weight.decoded()
    with pytest.warns(UserWarning, match=r"stored as 'nf4 block64 .*rounding took [2-9]\d % of .*qcompile.unpack_"):
        merged = model.merge_and_unload(safe_merge=safe)
    weight = merged.model.layers[0].self_attn.q_proj.weight
    assert isinstance(weight, qcompile.PackedWeight)
    assert torch.equal(weight.decoded(), qcompile.PackedWeight.of(before + delta, weight.spec).decoded())
    qcompile.unpack_(merged)


def test_merging_into_wide_weights_is_exact():
    model = language_model(num_hidden_layers=1)
    qcompile.pack_(model, "nf4 block64")
    model = adapted(model)
    adapter = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = adapter.base_layer.weight.decoded() + adapter.get_delta_weight("default")
    qcompile.unpack_(model)
    assert torch.equal(model.merge_and_unload().model.layers[0].self_attn.q_proj.weight, expected)


def test_generate():
    model = language_model(num_hidden_layers=1).eval()
    qcompile.pack_(model, "nf4 block64")
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.forward, _ = compiler(model.forward, STORED, dynamic=True)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


#: What PEFT adds beside plain LoRA.
VARIANTS = {
    "lora": {},
    "rank-stabilized": {"use_rslora": True},  # 8 / √4 = 4; below with rank 6, which is no power of two
    "rank-stabilized, rank 6": {"use_rslora": True, "r": 6},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "biases": {"lora_bias": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_low_rank_products_beside_stored_weights(variant):
    """As on a card, where products add up: what a layer computes, and every gradient, stays that of PEFT's own code.

    Dropout draws the same numbers with the passes and without.
    """
    model = language_model(num_hidden_layers=1, intermediate_size=192)  # eager torch counts to 255 for DoRA's identity
    qcompile.pack_(model, "nf4 block64 absmax_bnb")
    model = adapted(model, **VARIANTS[variant]).train()
    results = []
    for disabled in (LOW_RANK, []):
        with tensor_cores():
            compiled, observations = compiler(model, STORED, disable_passes=disabled)
            torch.manual_seed(0)
            results.append(loss_and_gradients(model, compiled))
    expected = results[0] if variant == "dropout" else loss_and_gradients(model)
    loss, gradients = results[1]
    assert abs(loss - expected[0]) < 1e-6 * expected[0]
    assert worst(gradients, expected[1]) < 2e-6
    (observed,) = observations
    # DoRA multiplies the base layer's result by a factor per column, and a bias is multiplied with its product: what is
    # added then is no product.
    assert ("mm_add" in program_of(observed)) == (variant not in ("dora", "biases"))
    weights = {tuple(weight.shape) for _, weight in packed_weights(model)}
    weights |= {shape[::-1] for shape in weights}
    assert not weights & {tuple(row["shape"]) for row in observed.saved}


def test_adapters_that_are_switched():
    """Two at a time, the other one, none, and the first again."""
    model = language_model(num_hidden_layers=1)
    qcompile.pack_(model, "nf4 block64 absmax_bnb")
    model = adapted(model)
    model.add_adapter("second", __import__("peft").LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"]))
    with_numbers(model)
    compiled, observations = compiler(model, STORED)
    ids, sums = torch.arange(3, 33).reshape(2, 15), []
    for active in (["default", "second"], ["second"], [], ["default"]):
        with model.disable_adapter() if not active else contextlib.nullcontext(), tensor_cores():
            model.base_model.set_adapter(active or ["default"])
            before = len(observations)
            torch.testing.assert_close(
                compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=2e-5, atol=2e-5
            )
            sums += [program_of(observed).count("qcompile.mm_add.default(") for observed in observations[before:]]
    # The second adapter's products with q and up, beside the first one's or alone.
    assert sums == [7 + 2, 2, 0, 7]
