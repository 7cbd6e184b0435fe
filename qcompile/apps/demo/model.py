"""The demo's model, its batches and its loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .settings import DemoConfig, Experiment

__all__ = ["batches", "build_model", "learning_rate_factor", "loss_of", "unigram_entropy", "validation_batches"]

VOCABULARY = 256  # bytes
VALIDATION_BATCHES = 8


def build_model(config: DemoConfig, device: torch.device) -> nn.Module:
    """A randomly initialized ``LlamaForCausalLM`` in FP32; equal seeds give equal parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    settings: dict[str, Any] = {
        "attn_implementation": "sdpa",
        "use_cache": False,
    }  # not in LlamaConfig's signature
    llama = LlamaConfig(
        **settings,
        vocab_size=VOCABULARY,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=config.sequence,
        initializer_range=0.05,  # the default of 0.02 is for widths in the thousands
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(llama)
    return model.to(device)


def batches(experiment: Experiment) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless ``(inputs, targets)``, int64 ``[batch, sequence]``: random windows, decided by the seed."""
    config = experiment.config
    generator = torch.Generator().manual_seed(config.seed)
    offsets = torch.arange(config.sequence + 1)
    while True:
        starts = torch.randint(len(experiment.train) - config.sequence, (config.batch, 1), generator=generator)
        yield split_windows(experiment.train[starts + offsets], experiment.device)


def validation_batches(experiment: Experiment) -> Iterator[tuple[Tensor, Tensor]]:
    """Evenly spread windows of the held-out tail, in the training shape so that nothing is compiled again."""
    config = experiment.config
    last = len(experiment.validation) - config.sequence - 1
    starts = torch.linspace(0, last, VALIDATION_BATCHES * config.batch).long()[:, None]
    windows = experiment.validation[starts + torch.arange(config.sequence + 1)]
    for chunk in windows.split(config.batch):
        yield split_windows(chunk, experiment.device)


def split_windows(windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    windows = windows.to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def unigram_entropy(data: Tensor) -> float:
    """Nats per byte of a model that knows only how often each byte occurs."""
    counts = torch.bincount(data, minlength=VOCABULARY)
    return float(torch.special.entr(counts / counts.sum()).sum())


def loss_of(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, FP32 scalar."""
    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 %, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
