"""The models that the benchmarks train: transformers' own, and a Llama in plain torch. Nothing of qcompile is in them.

The plain one has RMSNorm, rotary positions, grouped-query attention through ``F.scaled_dot_product_attention``, SwiGLU,
an untied head and cross-entropy, as in arXiv 2307.09288. Its ``forward`` returns the loss; that of transformers' an
output that holds it. Those of transformers are Llamas too, or mixtures of experts, with grouped products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MODELS", "SIZES", "Block", "Llama", "Size", "build", "random_batch"]


@dataclass(frozen=True)
class Size:
    """Dimensions of a model and of the batch it is trained on."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    sequence: int
    batch: int
    vocabulary: int = 32000
    family: str = "Llama"
    experts: int = 0
    """Of a layer, if it is a mixture, each ``intermediate`` wide."""
    experts_per_token: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.sequence

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_hidden(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_dim

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """Name, input and output features of every linear of one block."""
        return self._linears(max(1, self.experts))

    def linears_of_token(self) -> Iterator[tuple[str, int, int]]:
        """Of these, the ones that a token is multiplied by."""
        return self._linears(self.mixed)

    def _linears(self, experts: int) -> Iterator[tuple[str, int, int]]:
        yield "q_proj", self.hidden, self.hidden
        yield "k_proj", self.hidden, self.kv_hidden
        yield "v_proj", self.hidden, self.kv_hidden
        yield "o_proj", self.hidden, self.hidden
        for _ in range(experts):
            yield "gate_proj", self.hidden, self.intermediate
            yield "up_proj", self.hidden, self.intermediate
            yield "down_proj", self.intermediate, self.hidden

    @property
    def block_weights(self) -> int:
        """Elements of the linears of all blocks."""
        return self.layers * sum(inputs * outputs for _, inputs, outputs in self.linears())

    @property
    def weights_of_token(self) -> int:
        """Those that a token is multiplied by."""
        return self.layers * sum(inputs * outputs for _, inputs, outputs in self.linears_of_token())

    @property
    def mixed(self) -> int:
        """How many feed-forward networks of a block a token passes through."""
        return max(1, self.experts_per_token)

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return self.block_weights + (2 * self.layers + 1) * self.hidden + 2 * self.vocabulary * self.hidden


#: The four shapes of the step benchmark, the one of the loss curves (bytes for tokens), mixtures of experts (those of
#: the step benchmark and of loss curves), and one of each kind for tests on a CPU.
SIZES: dict[str, Size] = {
    size.name: size
    for size in (
        Size("d4096", 4096, 4, 14336, heads=32, kv_heads=8, sequence=4096, batch=4),
        Size("d2048", 2048, 8, 8192, heads=32, kv_heads=8, sequence=2048, batch=8),
        Size("d1024", 1024, 12, 4096, heads=16, kv_heads=8, sequence=1024, batch=16),
        Size("d640", 640, 6, 1792, heads=10, kv_heads=10, sequence=512, batch=64),
        Size("d768", 768, 4, 2304, heads=12, kv_heads=6, sequence=256, batch=32, vocabulary=256),
        Size(
            "mixtral",
            2048,
            4,
            7168,
            heads=16,
            kv_heads=8,
            sequence=2048,
            batch=8,
            family="Mixtral",
            experts=8,
            experts_per_token=2,
        ),
        Size(
            "qwen3_moe",
            2048,
            4,
            768,
            heads=16,
            kv_heads=8,
            sequence=2048,
            batch=8,
            family="Qwen3Moe",
            experts=64,
            experts_per_token=8,
        ),
        Size(
            "moe100m",
            512,
            8,
            512,
            heads=8,
            kv_heads=4,
            sequence=512,
            batch=32,
            vocabulary=4096,
            family="Qwen3Moe",
            experts=16,
            experts_per_token=2,
        ),
        Size(
            "tiny_moe",
            128,
            2,
            64,
            heads=4,
            kv_heads=2,
            sequence=32,
            batch=4,
            vocabulary=128,
            family="Mixtral",
            experts=4,
            experts_per_token=2,
        ),
        Size("tiny", 128, 2, 256, heads=4, kv_heads=2, sequence=32, batch=4, vocabulary=128),
    )
}


class RMSNorm(nn.Module):
    """Root-mean-square normalization, computed in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, dtype: torch.dtype, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(x.dtype) * self.weight


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding of ``[batch, heads, sequence, head_dim]`` (arXiv 2104.09864, halves paired)."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1).to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, each behind its norm and added to its input."""

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = size
        self.attention_norm = RMSNorm(size.hidden, dtype)
        self.mlp_norm = RMSNorm(size.hidden, dtype)
        for name, inputs, outputs in size.linears():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False, dtype=dtype))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cosine, sine)
        h = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def attention(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Llama(nn.Module):
    """``model(input_ids, labels)``: mean cross-entropy, float32 scalar, of int64 ``[batch, sequence]`` each."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, size: Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.hidden, dtype=dtype)
        self.layers = nn.ModuleList(Block(size, dtype) for _ in range(size.layers))
        self.norm = RMSNorm(size.hidden, dtype)
        self.lm_head = nn.Linear(size.hidden, size.vocabulary, bias=False, dtype=dtype)
        frequency = 10000.0 ** -(torch.arange(0, size.head_dim, 2).float() / size.head_dim)
        angle = torch.arange(size.sequence).float()[:, None] * frequency
        self.register_buffer("cosine", angle.cos(), persistent=False)
        self.register_buffer("sine", angle.sin(), persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.layers:
            x = block(x, self.cosine, self.sine)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())


def of_transformers(size: Size, dtype: torch.dtype) -> nn.Module:
    """The causal model of transformers, as it comes: ``sdpa`` attention, no key-value cache in training."""
    import transformers

    of_experts = {
        "Llama": {},
        "Mixtral": {"num_local_experts": size.experts},
        "Qwen3Moe": {
            "num_experts": size.experts,
            "moe_intermediate_size": size.intermediate,
            "head_dim": size.head_dim,
        },
    }
    more = (
        {"num_experts_per_tok": size.experts_per_token, "experts_implementation": "grouped_mm"} if size.experts else {}
    )
    config = getattr(transformers, f"{size.family}Config")(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.sequence,
        tie_word_embeddings=False,
        use_cache=False,
        **of_experts[size.family],
        **more,
    )
    return getattr(transformers, f"{size.family}ForCausalLM")(config).to(dtype)


#: How a model of a size and dtype is made, by name.
MODELS: dict[str, Callable[[Size, torch.dtype], nn.Module]] = {"transformers": of_transformers, "plain": Llama}


@torch.no_grad()
def build(size: Size, device: torch.device, dtype: torch.dtype, seed: int, model: str = "plain") -> nn.Module:
    """Weights are normal with deviation 0.02, the last of each branch by √(2·layers) less; the seed decides them."""
    with device:
        built = MODELS[model](size, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in built.named_parameters():
        if parameter.dim() >= 2:
            ends_branch = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
            deviation = 0.02 / (2 * size.layers) ** 0.5 if ends_branch else 0.02
            parameter.normal_(0, deviation, generator=generator)
    return built


def random_batch(size: Size, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 ``[batch, sequence]``. Only a 32nd of the vocabulary occurs, which a model learns in a
    few steps: a falling loss then shows that its gradients point the right way.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (size.batch, size.sequence + 1)
    text = torch.randint(size.vocabulary // 32, shape, generator=generator).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()
