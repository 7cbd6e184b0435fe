"""How transformers runs experts, and what the report says of each way.

The passes are told that the CPU is an sm_90 device. What would break: a way in which experts are not seen, or are
multiplied decoded without a word.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import qcompile
from qcompile import compat

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.nightly

EXPERTS = {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": {"num_experts": 4}}


def report_of(kind: str, implementation: str, hidden: int = 64, **options: Any) -> qcompile.Report:
    """Of one training step of a tiny model, whose experts are ``hidden`` wide inside."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=128, hidden_size=64, intermediate_size=hidden, moe_intermediate_size=hidden, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=32,
        use_cache=False, head_dim=32, **EXPERTS[kind],
    )  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    model.set_experts_implementation(implementation)
    ids = torch.randint(128, (2, 16))
    with mock.patch.object(compat, "tensor_core_capability", return_value=(9, 0)):
        return qcompile.explain(model, input_ids=ids, labels=ids, options={"backward": "fp8", **options})


@pytest.mark.parametrize("kind", EXPERTS)
def test_grouped_experts_run_on_tensor_cores(kind: str) -> None:
    rows: list[Any] = [row for row in report_of(kind, "grouped_mm").rows if "experts" in row.layer]
    assert [(row.op, row.role) for row in rows] == 2 * [("grouped_mm", role) for role in ("fprop", "dgrad", "wgrad")]
    assert [row.provider.split()[-1] for row in rows] == 2 * ["grouped", "grouped", "grouped_gluon"]


@pytest.mark.parametrize("kind", EXPERTS)
def test_swiglu_is_computed_where_it_is_quantized(kind: str) -> None:
    """On request, from the halves of one product; rows are long enough to have outliers."""
    with_pass, without = (report_of(kind, "grouped_mm", 256, enable_passes=names) for names in (["fuse_producers"], []))
    assert "with its neg, exp, add, div, mul" in str(with_pass.to_json())
    assert "with its" not in str(without.to_json())


@pytest.mark.parametrize("kind", EXPERTS)
def test_batched_experts_are_decoded_and_the_report_says_why(kind: str) -> None:
    rows = [row for row in report_of(kind, "batched_mm").rows if "experts" in row.layer]
    assert {row.op for row in rows} == {"bmm"}
    assert all("dequantize + aten" in row.provider for row in rows)
    assert any("a product of batches" in row.reason for row in rows)


@pytest.mark.parametrize("kind", EXPERTS)
def test_a_loop_that_stays_in_python_is_reported(kind: str) -> None:
    report = report_of(kind, "eager")
    rows = [row for row in report.rows if "experts" in row.layer]
    assert rows
    assert all("no graph has it" in row.reason for row in rows)
    assert any("not captured: model.layers.*.mlp.experts" in remark for remark in report.remarks)
