"""Tiny language models with PEFT's adapters, and bitsandbytes' own 4-bit layers in the same places."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

__all__ = ["adapted", "in_4_bits", "language_model", "loss_and_gradients", "with_numbers"]

#: Classes of transformers, and what their configurations need beyond SIZES.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_hidden_layers": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3", {"head_dim": 32, "sliding_window": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "sdpa", "use_cache": False,
}  # fmt: skip


def language_model(kind: str = "llama", **changes: Any) -> nn.Module:
    """The same weights in every call."""
    name, options = MODELS[kind]
    prefix = f"{name}Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{prefix}Config")(**SIZES | options | changes)
    torch.manual_seed(16)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def in_4_bits(model: nn.Module, nested: bool) -> nn.Module:
    """bitsandbytes' NF4 layers for all linear layers but the head and thin ones, as transformers puts them in."""
    bnb = __import__("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and min(module.weight.shape) >= 32:
            layer = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32,
                compress_statistics=nested, quant_type="nf4",
            )  # fmt: skip
            layer.weight = bnb.nn.Params4bit(
                module.weight.data.clone(), requires_grad=False, compress_statistics=nested, quant_type="nf4"
            )
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    return model


def adapted(model: nn.Module, **options: Any) -> Any:
    """PEFT's LoRA on all linear layers, with the same numbers in every call; lora_B is not zero.

    Not on Mixtral's router and experts, which are no linear layers: PEFT puts parametrizations on those, and that in
    every forward, which Dynamo does not capture.
    """
    peft = __import__("peft")
    linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
    targets = [name for name in linear if name != "lm_head"]
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | options)
    torch.manual_seed(4)
    return with_numbers(peft.get_peft_model(model, config))


def with_numbers(model: nn.Module) -> nn.Module:
    """Adapters as training would leave them: lora_B is not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def loss_and_gradients(model: nn.Module, call: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Of a language model on fixed tokens, by ``call`` (the compiled model) if it is given."""
    ids = torch.randint(3, 96, (2, 15), generator=torch.Generator().manual_seed(6))
    model.zero_grad()
    loss = (model if call is None else call)(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
