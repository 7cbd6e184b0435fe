"""Whole models of transformers: every product of the eager model is in the report, with a reason if left alone.

The count is independent: a dispatch mode sees the ATen products that one eager forward runs.
"""

from __future__ import annotations

import io
import re
from collections import Counter

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import qcompile
from qcompile.passes import heads
from qcompile.report import ROLES, Report, Row

transformers = pytest.importorskip("transformers")

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 59,
}
#: Two key-value heads of 8, three experts and three classes would stay wide for their size.
NARROW = {"min_side": 0}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
TEXT = {"input_ids": torch.arange(22).view(2, 11) % 59, "labels": torch.arange(22).view(2, 11) % 59}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Products(TorchDispatchMode):
    """Counts ATen products; an attention op counts once, however many it is made of."""

    GEMMS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.GEMMS:
            self.counts[name] += 1
        elif "scaled_dot_product" in name:
            self.counts["sdpa"] += 1
        return func(*args, **(kwargs or {}))


def count(model, inputs) -> Counter[str]:
    """Products by kind, two-dimensional ones together: how a linear layer is spelled depends on its bias."""
    with Products() as products:
        model(**inputs)
    counts = products.counts
    return Counter(
        gemm=counts["mm"] + counts["addmm"],
        batched=counts["bmm"] + counts["baddbmm"],
        conv=counts["convolution"],
        grouped=counts["_grouped_mm"],
        sdpa=counts["sdpa"],
    )


KIND = {
    "linear": "gemm",
    "addmm": "gemm",
    "bmm": "batched",
    "matmul": "batched",
    "conv2d": "conv",
    "grouped_mm": "grouped",
    "sdpa": "sdpa",
}


def listed(report: Report) -> Counter[str]:
    return Counter(dict.fromkeys(KIND.values(), 0)) + Counter(
        KIND[row.op] for row in report.rows if row.role in ("fprop", "-") and row.decision != "not captured"
    )


def times(row: Row) -> int:
    """How often the forward runs a product: equal layers share a graph, and Python may repeat itself."""
    found = re.search(r"(\d+) times", row.reason)
    return (int(found[1]) if found else 1) if row.role in ("fprop", "-") else 0


def skipped(report: Report) -> dict[str, str]:
    """Reasons by layer. Transformers 5.17 spells rotary angles as an outer product, which adds a row."""
    reasons = {row.layer: row.reason for row in report.rows if row.decision == "skipped"}
    rotary = reasons.pop("model.rotary_emb.inv_freq", "an outer product")
    assert "an outer product" in rotary
    return reasons


def assert_all_roles(report: Report, first: str = "") -> None:
    """Three rows a quantized site, each of them computed; the input's gradient of ``first`` alone is not."""
    roles: dict[str, list[str]] = {}
    for row in report.rows:
        if row.role != "-":
            roles.setdefault(row.layer, []).append(row.role)
            expected = "not computed" if (row.layer, row.role) == (first, "dgrad") else "quantized"
            assert row.decision == expected, row
    assert all(tuple(found) == ROLES for found in roles.values())
    assert len(roles) == report.quantized_sites
    assert not any("not accounted for" in remark for remark in report.remarks)


ATTENTION = "attention is left in high precision (as in every published recipe)"


def test_llama():
    """Seven projections per block in all three roles; the head and attention are skipped, with the reason."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, **TOKENS, num_key_value_heads=2))
    report = qcompile.explain(model, options=NARROW, **TEXT)
    assert report.graphs == 1
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    quantized = {row.layer for row in report.rows if row.role == "fprop"}
    assert quantized == {f"model.layers.{i}.{projection}" for i in range(2) for projection in projections}
    assert_all_roles(report)
    assert skipped(report) == {
        "lm_head": "skip='lm_head'",
        **{f"model.layers.{i}.self_attn": ATTENTION for i in range(2)},
    }  # fmt: skip
    assert listed(report) == count(model, TEXT)
    assert (listed(report)["gemm"], listed(report)["sdpa"]) == (15, 2)
    # One quantization each for q, k, v; for the output projection; for gate and up; for the down projection.
    assert sum(row.saved_bytes > 0 for row in report.rows) == 4 * 2
    # On a screen of 80 × 40, a line for each product.
    console = Console(width=80, file=io.StringIO())
    console.print(report)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 40
    assert max(map(cell_len, lines)) <= 80
    sites = [line for line in lines if re.search(r" (quantized|skipped)( \[\d+\])?\s*$", line)]
    assert len(sites) == report.sites == 17


def test_gpt2():
    """Its ``Conv1D`` is an ``addmm`` with the weight the other way round. A log call breaks its graph once."""
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=59, n_positions=16, **TOKENS)
    config.loss_type = "ForCausalLM"
    model = transformers.GPT2LMHeadModel(config)
    report = qcompile.explain(model, options=NARROW, **TEXT)
    assert_all_roles(report)
    assert report.quantized_sites == 4 * 2
    assert skipped(report)["lm_head"] == "skip='lm_head'"
    # Attention with dropout on a CPU runs as two batched products that only the eager count sees.
    expected = count(model, TEXT)
    assert expected == Counter(gemm=9, batched=4)
    assert listed(report) == Counter(gemm=9, sdpa=2)


def test_bert():
    """Tied output embedding under another name than ``lm_head``: known by what the model says of it."""
    model = transformers.BertForMaskedLM(transformers.BertConfig(**TINY, pad_token_id=2)).eval()
    report = qcompile.explain(model, options=NARROW, **TEXT)
    assert report.graphs == 1
    assert_all_roles(report)
    assert listed(report) == count(model, TEXT) == Counter(gemm=6 * 2 + 2, sdpa=2)
    assert skipped(report) == {
        "cls.predictions.decoder": heads.OUTPUT_EMBEDDINGS + "; heads=True quantizes these",
        **{f"bert.encoder.layer.{i}.attention.self": ATTENTION for i in range(2)},
    }


def test_vit():
    """The patch embedding is a convolution whose windows tile the image."""
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=20,
        patch_size=5,
        num_labels=3,
    )
    model = transformers.ViTForImageClassification(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 20, 20)}
    report = qcompile.explain(model, options=NARROW, **inputs)
    assert report.graphs == 1
    (patches,) = (row for row in report.rows if row.op == "conv2d" and row.role == "fprop")
    assert patches.layer.endswith("patch_embeddings.projection")
    assert_all_roles(report, first=patches.layer)
    assert listed(report) == count(model, inputs) == Counter(gemm=6 * 2 + 1, sdpa=2, conv=1)


@pytest.mark.parametrize(
    ("experts", "kinds", "products"),
    [
        (None, Counter(grouped=4), {"gate_up_proj", "down_proj"}),
        ("grouped_mm", Counter(grouped=4), {"gate_up_proj", "down_proj"}),
        ("batched_mm", Counter(batched=4), {"gate_up_proj", "down_proj"}),
    ],
)
def test_mixture_of_experts(experts, kinds, products):
    """Both products of all experts, by whichever kernel transformers chooses."""
    config = transformers.MixtralConfig(
        **TINY, **TOKENS, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    )
    if experts:
        config._experts_implementation = experts
    model = transformers.MixtralForCausalLM(config)
    report = qcompile.explain(model, options=NARROW, **TEXT)
    assert report.graphs == 1
    assert_all_roles(report)
    assert listed(report) == count(model, TEXT)
    assert (listed(report)["gemm"], listed(report)["sdpa"]) == (4 * 2 + 2 + 1, 2)
    assert kinds <= listed(report)
    quantized = {row.layer for row in report.rows if "experts" in row.layer and row.decision == "quantized"}
    assert {name.rsplit(".", 1)[1] for name in quantized} == products


def test_experts_in_a_python_loop_stay_outside_the_graphs():
    """A loop over the experts that a batch uses cannot be captured: it runs as it is, and the report says so of every
    product.
    """
    config = transformers.MixtralConfig(
        **TINY, **TOKENS, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    model = transformers.MixtralForCausalLM(config)
    report = qcompile.explain(model, options=NARROW, **TEXT)
    assert report.graphs > 1
    outside = [row for row in report.rows if row.decision == "not captured"]
    assert {row.layer for row in outside} == {row.layer for row in report.rows if "experts" in row.layer}
    assert report.remarks[0].startswith("not captured: model.layers.*.mlp.experts (gate_up_proj: linear ")
    found, present = listed(report), count(model, TEXT)
    assert found["sdpa"] == present["sdpa"] == 2
    assert sum(map(times, report.rows)) == present["gemm"] + present["sdpa"]
