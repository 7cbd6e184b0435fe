"""Experts that are one parameter of three axes: packed, they are those of the decoded model, and no product keeps a
decoded one.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import qcompile
from qcompile.recipes import STORED
from qcompile.stored import PackedWeight
from tests.passes.harness import assert_same, compile_and_run, leaf, run_eager
from tests.stored.references import References

NESTED = "nf4 block64 absmax_bnb; nested"
EXPERTS, HIDDEN, INNER = 4, 64, 128
SIZES = {
    "hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 96, "num_local_experts": EXPERTS,
    "num_experts": EXPERTS, "num_experts_per_tok": 2, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
CLASSES = {
    "Mixtral": MixtralExperts, "Qwen3Moe": Qwen3MoeExperts, "GptOss": GptOssExperts, "Llama4Text": Llama4TextExperts,
}  # fmt: skip


def experts(kind: str, implementation: str, spec: str = NESTED) -> tuple[nn.Module, nn.Module]:
    """Packed ones, and what they decode to."""
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    config._experts_implementation = implementation
    module = nn.ModuleDict({"experts": CLASSES[kind](config)})
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    qcompile.pack_(module, spec)
    decoded = copy.deepcopy(module)
    assert qcompile.unpack_(decoded) == ["experts.gate_up_proj", "experts.down_proj"]
    return module["experts"].requires_grad_(False), decoded["experts"].requires_grad_(False)


def inputs(kind: str, seed: int = 8) -> tuple[Tensor, ...]:
    """Tokens, the two experts of each, and what those count. One expert has no token."""
    tokens = 12
    x = leaf(tokens, HIDDEN)
    if kind == "Llama4Text":
        return (x,)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, EXPERTS - 1, generator=generator).topk(2).indices
    return x, chosen, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize(
    ("kind", "implementation", "spec"),
    [
        ("Mixtral", "grouped_mm", NESTED),
        ("Mixtral", "batched_mm", NESTED),
        ("Qwen3Moe", "grouped_mm", "int4 block32"),
        ("GptOss", "grouped_mm", "e2m1 block32 e8m0"),
        ("GptOss", "batched_mm", "uint4 block32; zeros"),
        ("Llama4Text", "", "e2m1 block16 e4m3"),
    ],
)
def test_compiled_experts_are_those_of_the_decoded_model(kind, implementation, spec):
    packed, decoded = experts(kind, implementation, spec)
    given = inputs(kind)
    result = compile_and_run(packed, *given, recipe=STORED)
    assert_same((result.outputs, result.gradients), run_eager(decoded, *given), 1e-6)
    assert [d.reason.partition(";")[0] for d in result.decisions] == [
        f"weight stored as {w.spec.partition(';')[0]}" for w in (packed.gate_up_proj, packed.down_proj)
    ]
    # Grouped products have no form that reads codes; what is decoded for them is the whole layer.
    assert result.fused().total() == (0 if implementation == "grouped_mm" or "zeros" in spec else 4)
    # float32 numbers of one expert, or of one for every token
    wide = [row["shape"] for row in result.saved if row["shape"][-2:] in ([HIDDEN, 2 * INNER], [2 * INNER, HIDDEN])]
    assert wide == []


def test_compiled_grouped_products_of_bfloat16():
    """torch's own, where those of float32 are an op of transformers."""
    packed, decoded = (module.bfloat16() for module in experts("Mixtral", "grouped_mm"))
    x, chosen, counts = inputs("Mixtral")
    given = (x.detach().bfloat16().requires_grad_(), chosen, counts.bfloat16())
    result = compile_and_run(packed, *given, recipe=STORED)
    assert "_grouped_mm" in result.program("joint_fuse")
    assert_same((result.outputs, result.gradients), run_eager(decoded, *given), 2**-7)
    assert not [row for row in result.saved if row["shape"][-2:] in ([HIDDEN, 2 * INNER], [2 * INNER, HIDDEN])]


def test_a_loop_over_experts_keeps_their_codes_for_the_backward():
    """Eager torch's own loop, which no compiler takes as it is: the experts it selects stay packed."""
    packed, decoded = experts("Mixtral", "eager")
    given, saved = inputs("Mixtral"), []
    with References(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = run_eager(packed, *given)
    assert_same(result, run_eager(decoded, *given), 1e-6)
    kept = [tensor for tensor in saved if {*tensor.shape} in ({HIDDEN, 2 * INNER}, {HIDDEN, INNER})]
    assert len(kept) == 2 * (EXPERTS - 1)
    assert all(isinstance(tensor, PackedWeight) for tensor in kept)


@pytest.mark.parametrize("spec", ["nf4 block64", NESTED, "uint4 block32; zeros", "e2m1 block16 e4m3", "int8 tensor"])
def test_experts_that_are_taken_are_those_of_the_decoded_weight(spec):
    generator = torch.Generator().manual_seed(9)
    wide = torch.randn(3, 128, 64, generator=generator)
    with References():
        for weight in (PackedWeight.of(wide, spec), PackedWeight.of(wide, spec, transposed=True)):
            dense, ids = weight.decoded(), torch.tensor([2, 0, 0, 1])
            taken = {1: dense[1], -1: dense[-1], "ids": dense[ids], "select": dense[ids]}
            got = {1: weight[1], -1: weight[-1], "ids": weight[ids], "select": weight.index_select(0, ids)}
            for name, value in got.items():
                assert isinstance(value, PackedWeight) == (spec != "int8 tensor"), name
                plain = value.decoded() if isinstance(value, PackedWeight) else value
                assert torch.equal(plain, taken[name])
            for index in ((slice(None), 1), (ids, 1), (torch.tensor([True, False, True]),)):
                assert torch.equal(weight[index], dense[index])


# --- models ---------------------------------------------------------------------------------------------------------


def language_model(kind: str = "GptOss") -> nn.Module:
    torch.manual_seed(10)
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**SIZES)).eval()


def test_a_model_with_experts_is_packed_saved_and_loaded():
    with References():
        model = language_model()
        before = {name: parameter.numel() * 4 for name, parameter in model.named_parameters() if parameter.dim() == 3}
        done = qcompile.pack_(model, "nf4 block64", skip="self_attn")
        assert {layer.name: layer.bytes_before for layer in done.layers} == before
        assert [layer.shape for layer in done.layers] == [(EXPERTS, HIDDEN, 2 * INNER), (EXPERTS, INNER, HIDDEN)]
        assert done.bits_per_weight == 4.5
        ids = torch.arange(2, 12)[None]
        again = language_model()
        qcompile.load_packed_(again, qcompile.packed_state_dict(model))
        assert torch.equal(again(ids).logits, model(ids).logits)
        with pytest.raises(ValueError, match=r"^export: 'model.layers.0.mlp.experts.gate_up_proj': no layout holds"):
            qcompile.export(model, "nowhere")
        one = "model.layers.0.mlp.experts.down_proj"
        assert qcompile.unpack_(model, one) == [one]
        left = qcompile.pack_(language_model(), "nf4 block64", rules={"experts": None}).wide
        assert left["model.layers.0.mlp.experts.down_proj"] == "rules: 'experts': None"
        with pytest.raises(
            ValueError, match=r"layer 'model.layers.0.*down_proj' of 4×128×64 as 'nf4 block48': K = 128"
        ):
            qcompile.pack_(model, "nf4 block48", skip="self_attn")


def gpt_oss_files(folder, model: nn.Module) -> dict[str, Tensor]:
    """As OpenAI's: experts in MXFP4 blocks of any bytes, the rest in BF16."""
    generator = torch.Generator().manual_seed(11)
    tensors = {name: value.bfloat16().clone() for name, value in model.state_dict().items()}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, size, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, size // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, rows, size // 32), generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "mxfp4"}}))
    return tensors


def test_mxfp4_checkpoints_of_gpt_oss_keep_their_bytes(tmp_path):
    tensors = gpt_oss_files(tmp_path, language_model())
    with References():
        model = language_model().bfloat16()
        names = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        assert qcompile.load_quantized_(model, tmp_path) == names
        for name in names:
            weight = model.get_parameter(name)
            assert weight.spec == "e2m1 block32 e8m0 even"
            meant = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
            assert torch.equal(weight.decoded(), meant)
        assert model(torch.arange(2, 12)[None]).logits.isfinite().all()


def test_mxfp4_checkpoints_of_other_sizes_are_refused(tmp_path):
    tensors = gpt_oss_files(tmp_path, language_model())
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(tensors | {f"{name}_scales": tensors[f"{name}_scales"][:, :-1].clone()}, tmp_path / "model.safetensors")
    why = rf"layer '{name}' of 4×64×128 as mxfp4: its tensor 'scales' is \(4, 63, 4\), not \(4, 64, 4\)$"
    with pytest.raises(ValueError, match=f"^load_quantized_: {why}"):
        qcompile.load_quantized_(language_model(), tmp_path)
    tensors.pop(f"{name}_scales")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=f"^load_quantized_: layer '{name}' of .* as mxfp4: it has no tensor 'scales'$"
    ):
        qcompile.load_quantized_(language_model(), tmp_path)
