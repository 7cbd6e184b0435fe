"""The model zoo: architectures of others with tiny random configurations, as data.

One row per model in :data:`ZOO`: how to build it, what it is fed, and where it departs from the rule (one graph, every
product in the report). Lengths are odd where an architecture allows it. ``test_zoo.py`` says what must hold for each;
``benchmarks/zoo.py`` measures each.

A model of transformers is its class, its configuration class and a configuration; nothing is downloaded. Dropout of
every kind is set to zero, so that two runs of one model can be compared; the models are in training mode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ZOO", "Entry", "build", "loss_of"]

Inputs = dict[str, Any]

BATCH, LENGTH, VOCABULARY = 2, 11, 59


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        model: builds it. inputs: one batch from a generator; every call gives another batch of the same shape.
        dtype: float64 where possible: what a model and its reference compute then differs by less than decides how a
            value is rounded to four bits. Torch's grouped product takes nothing wider than float32.
        breaks: why plain ``backend="aot_eager"`` breaks the graph; empty if ``fullgraph=True`` must hold.
        first_call: what a model does in its first call that Dynamo cannot trace; it is then called once beforehand.
        dynamo: settings of Dynamo without which plain ``aot_eager`` compiles nothing of the model.
    """

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]
    dtype: torch.dtype = torch.float64
    breaks: str = ""
    first_call: str = ""
    dynamo: dict[str, Any] = field(default_factory=dict)


def build(entry: Entry, dtype: torch.dtype | None = None) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """The model in training mode, in ``dtype`` or the entry's, and a function from a seed to inputs for its forward."""
    dtype = dtype or entry.dtype
    torch.manual_seed(0)
    model = entry.model().train().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0

    def inputs(seed: int) -> Inputs:
        batch = entry.inputs(torch.Generator().manual_seed(seed))
        return {
            name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in batch.items()
        }

    if entry.first_call:
        model(**inputs(0))
    return model, inputs


def loss_of(output: Any) -> Tensor:
    """The loss a model computes itself, or else a mean square that no normalization of the output makes constant."""
    if not isinstance(output, Tensor):
        return output.loss
    return (output * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)).square().mean()


# --- inputs ---------------------------------------------------------------------------------------------------------


def tokens(g: torch.Generator) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=g)


def text(g: torch.Generator) -> Inputs:
    """Token ids, and the same as labels."""
    ids = tokens(g)
    return {"input_ids": ids, "labels": ids}


def text_pair(g: torch.Generator) -> Inputs:
    """What an encoder-decoder reads: a source and the labels, from which it makes the decoder's input."""
    return {"input_ids": tokens(g), "labels": tokens(g)[:, :7].contiguous()}


def images(size: int, labels: int | None = 3, channels: int = 3) -> Callable[[torch.Generator], Inputs]:
    def sample(g: torch.Generator) -> Inputs:
        batch = {"pixel_values": torch.randn(BATCH, channels, size, size, generator=g)}
        if labels:
            batch["labels"] = torch.randint(0, labels, (BATCH,), generator=g)
        return batch

    return sample


def segmentation(g: torch.Generator) -> Inputs:
    return {**images(32, None)(g), "labels": torch.randint(0, 3, (BATCH, 32, 32), generator=g)}


def image_and_text(g: torch.Generator) -> Inputs:
    return {"input_ids": tokens(g), **images(20, None)(g), "return_loss": True}


def speech(g: torch.Generator) -> Inputs:
    return {"input_features": torch.randn(BATCH, 12, 30, generator=g), "labels": tokens(g)[:, :7].contiguous()}


def vectors(*shape: int, name: str = "x") -> Callable[[torch.Generator], Inputs]:
    return lambda g: {name: torch.randn(shape, generator=g)}


# --- models of transformers -----------------------------------------------------------------------------------------

TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
#: Names under which configurations spell the same sizes; a configuration takes those that it knows.
BERT_LIKE = {
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    **TOKENS,
}
LLAMA_LIKE = {**BERT_LIKE, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 40,
    "intermediate_size": 53,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 20,
    "patch_size": 5,
}
EXPERTS = {
    "num_experts": 3,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 28,
    "shared_expert_intermediate_size": 36,
}
LATENT_ATTENTION = {
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "head_dim": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 28,
    "first_k_dense_replace": 1,
}


def of_transformers(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A randomly initialized model; ``config`` is the prefix of its configuration class."""

    def make() -> nn.Module:
        import transformers

        configuration = getattr(transformers, f"{config}Config")(**sizes)
        _without_dropout(configuration)
        return getattr(transformers, model)(configuration)

    return make


def _without_dropout(configuration: Any) -> None:
    """Every probability of dropping something, in nested configurations too."""
    for name, value in vars(configuration).items():
        if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
            setattr(configuration, name, 0.0)
        elif hasattr(value, "to_dict"):
            _without_dropout(value)


def causal(model: str, dtype: torch.dtype = torch.float64, **sizes: Any) -> Entry:
    """A decoder with a language-modelling head."""
    return Entry(of_transformers(f"{model}ForCausalLM", model, **{**LLAMA_LIKE, **sizes}), text, dtype)


def mixture_of_experts(model: str, **sizes: Any) -> Entry:
    """A decoder whose experts are one grouped product; torch wants its rows in multiples of 16 bytes."""
    return causal(model, torch.float32, **{**EXPERTS, **sizes})


def masked(model: str, **sizes: Any) -> Entry:
    """An encoder with a masked-language-modelling head."""
    return Entry(of_transformers(f"{model}ForMaskedLM", model, **{**BERT_LIKE, **sizes}), text)


def vision(model: str, size: int, **sizes: Any) -> Entry:
    sizes = {"num_labels": 3, "problem_type": "single_label_classification", **sizes}  # else set by the first call
    return Entry(of_transformers(f"{model}ForImageClassification", model, **sizes), images(size))


GPT = {"n_embd": 40, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32, **TOKENS}
BART = {
    "d_model": 40,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "decoder_ffn_dim": 53,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 1,
    **TOKENS,
}


# --- models of plain torch ------------------------------------------------------------------------------------------


class TransformerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(40, 4, 53, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Seq2Seq(nn.Module):
    """``nn.Transformer``: encoder, decoder, cross attention; sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(40, 4, 1, 1, 53, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[0], dtype=target.dtype)
        return self.transformer(source, target, tgt_mask=mask, tgt_is_causal=True)


class Recurrent(nn.Module):
    """An RNN of torch between two linear layers."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(21, 34), kind(34, 40, batch_first=True), nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(x))[0])


class GatedCell(nn.Module):
    """A recurrent cell written with linear layers, unrolled over time."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.update, self.head = nn.Linear(21, 2 * 40), nn.Linear(40, 2 * 40, bias=False), nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 40)
        for step in x.unbind(1):
            candidate, gate = (self.read(step) + self.update(state)).chunk(2, -1)
            gate = gate.sigmoid()
            state = gate * state + (1 - gate) * candidate.tanh()
        return self.head(state)


class UNet(nn.Module):
    """Two scales: convolutions, pooling, a transposed convolution, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.middle = nn.Sequential(nn.Conv2d(12, 20, 3, padding=1), nn.GroupNorm(4, 20), nn.SiLU())
        self.up = nn.ConvTranspose2d(20, 12, 2, stride=2)
        self.out = nn.Sequential(nn.Conv2d(24, 12, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(12, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        return self.out(torch.cat([fine, self.up(self.middle(F.max_pool2d(fine, 2)))], 1))


class GraphNetwork(nn.Module):
    """Message passing: gather along edges, transform, scatter-add to nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.ModuleList([nn.Linear(2 * 21, 34), nn.Linear(2 * 34, 34)])
        self.update = nn.ModuleList([nn.Linear(21 + 34, 34), nn.Linear(34 + 34, 7)])

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        for message, update in zip(self.message, self.update, strict=True):
            sent = F.silu(message(torch.cat([x[source], x[target]], -1)))
            received = sent.new_zeros(x.shape[0], sent.shape[1]).index_add(0, target, sent)
            x = F.silu(update(torch.cat([x, received], -1)))
        return x


def graph(g: torch.Generator) -> Inputs:
    return {"x": torch.randn(17, 21, generator=g), "edges": torch.randint(0, 17, (2, 45), generator=g)}


class MixerBlock(nn.Module):
    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(channels), nn.LayerNorm(channels)])
        self.patches = nn.Sequential(nn.Linear(patches, 34), nn.GELU(), nn.Linear(34, patches))
        self.channels = nn.Sequential(nn.Linear(channels, 53), nn.GELU(), nn.Linear(53, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.patches(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norms[1](x))


class MlpMixer(nn.Module):
    """Patches by a strided convolution; MLPs along patches and along channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 5, stride=5)
        self.blocks = nn.Sequential(MixerBlock(16, 40), MixerBlock(16, 40))
        self.head = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Dlrm(nn.Module):
    """Recommendation: embedding bags, a bottom MLP, pairwise dot products of the features, a top MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(VOCABULARY, 18, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(13, 34), nn.ReLU(), nn.Linear(34, 18), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(18 + 6, 34), nn.ReLU(), nn.Linear(34, 1))
        self.register_buffer("pairs", torch.tril_indices(4, 4, -1), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        features = torch.stack([x, *(table(ids) for table, ids in zip(self.tables, sparse, strict=True))], 1)
        products = torch.bmm(features, features.transpose(1, 2))
        return self.top(torch.cat([x, products[:, self.pairs[0], self.pairs[1]]], 1))


def clicks(g: torch.Generator) -> Inputs:
    return {
        "dense": torch.randn(9, 13, generator=g),
        "sparse": torch.randint(0, VOCABULARY, (3, 9, 5), generator=g),
    }


class Nerf(nn.Module):
    """Points in space through a positional encoding and an MLP with a skip connection to density and colour."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(4), persistent=False)
        self.first = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 40)])
        self.second = nn.ModuleList([nn.Linear(64, 40), nn.Linear(40, 40)])
        self.density, self.colour = nn.Linear(40, 1), nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.frequencies).flatten(-2)
        h = encoded = torch.cat([angles.sin(), angles.cos()], -1)
        for layer in self.first:
            h = F.relu(layer(h))
        h = torch.cat([h, encoded], -1)
        for layer in self.second:
            h = F.relu(layer(h))
        return F.softplus(self.density(h)) * self.colour(h).sigmoid()


# --- models whose weights are computed, and others that a first look at a graph gets wrong ----------------------------


class AudioCodec(nn.Module):
    """EnCodec's encoder, residual vector quantizer and decoder, the gradient passing straight through the codebooks.

    Its convolutions compute from tensors how they pad, which breaks the graph before every one. For lengths that the
    strides divide these are constants, put here in their place.
    """

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "hidden_size": 36,
            "num_filters": 18,
            "upsampling_ratios": [3, 2],
            "codebook_size": 16,
            "sampling_rate": 600,
            "target_bandwidths": [0.8],
            "num_lstm_layers": 1,
            "pad_mode": "constant",
        }
        self.codec = of_transformers("EncodecModel", "Encodec", **sizes)()
        for module in self.codec.modules():
            if hasattr(module, "padding_total"):
                total = int(module.padding_total)
                del module.padding_total
                module.padding_total = total
                module._get_extra_padding_for_conv1d = lambda hidden_states: 0

    def forward(self, x: Tensor) -> Tensor:
        encoded = self.codec.encoder(x)
        decoded = self.codec.quantizer.decode(self.codec.quantizer.encode(encoded, 0.8))
        return self.codec.decoder(encoded + (decoded - encoded).detach())


class WaveNet(nn.Module):
    """Dilated convolutions with gates and skips, every one weight-normed."""

    def __init__(self) -> None:
        super().__init__()

        def convolution(*sizes: int, **options: int) -> nn.Module:
            return nn.utils.parametrizations.weight_norm(nn.Conv1d(*sizes, **options))

        self.first = convolution(1, 34, 1)
        self.dilated = nn.ModuleList(convolution(34, 2 * 34, 2, dilation=2**i) for i in range(3))
        self.mixed = nn.ModuleList(convolution(34, 34 + 40, 1) for _ in range(3))
        self.last = nn.Sequential(nn.ReLU(), convolution(40, 40, 1), nn.ReLU(), convolution(40, 35, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), 0
        for dilated, mixed in zip(self.dilated, self.mixed, strict=True):
            signal, gate = dilated(F.pad(x, (dilated.dilation[0], 0))).chunk(2, 1)
            residual, skip = mixed(signal.tanh() * gate.sigmoid()).split([34, 40], 1)
            x, skips = x + residual, skips + skip
        return self.last(skips)


class NfNet(nn.Module):
    """timm's normalizer-free ResNet: convolutions with scaled, standardized weights, squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        nfnet = timm_module("nfnet")
        sizes = nfnet.NfCfg(
            depths=(1, 1), channels=(48, 80), stem_type="3x3", stem_chs=40, group_size=20, attn_layer="se",
            attn_kwargs={"rd_ratio": 0.5}, num_features=96,
        )  # fmt: skip
        self.net = nfnet.NormFreeNet(sizes, num_classes=33)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def timm_module(name: str) -> Any:
    """A module of ``timm.models``, imported beside an empty torchvision, of which timm's models need names only.

    The torchvision on PyPI is built for CUDA: it does not load beside a CPU build of torch, and then takes transformers
    and Lightning with it. So timm is installed without what it depends on.
    """

    class Empty(ModuleType):
        __path__: ClassVar[list[str]] = []

        def __getattr__(self, name: str) -> Any:
            return sys.modules.get(f"{self.__name__}.{name}") or mock.MagicMock(name=name)

    names = (
        "datasets",
        "models",
        "models.feature_extraction",
        "ops",
        "ops.misc",
        "transforms",
        "transforms.functional",
    )
    empty = {name: Empty(name) for name in ("torchvision", *(f"torchvision.{name}" for name in names))}
    sys.modules.update(empty)
    try:
        return import_module(f"timm.models.{name}")
    finally:
        for module in empty:
            del sys.modules[module]


class SpeechEncoder(nn.Module):
    """wav2vec 2.0, fine-tuned: its weight-normed convolution of positions trains, its feature encoder is frozen."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {
            "conv_dim": [34, 36],
            "conv_stride": [5, 2],
            "conv_kernel": [10, 3],
            "num_conv_pos_embeddings": 6,
            "num_conv_pos_embedding_groups": 4,
            "classifier_proj_size": 33,
            "num_labels": 35,
            "apply_spec_augment": False,
        }
        self.model = of_transformers("Wav2Vec2ForSequenceClassification", "Wav2Vec2", **BERT_LIKE, **sizes)()
        self.model.freeze_feature_encoder()

    def forward(self, **inputs: Tensor) -> Any:
        return self.model(**inputs)


class Detector(nn.Module):
    """DETR on a ResNet: image in, class logits and a box for every query out.

    In training, its encoder's layers look whether everything is finite, which breaks the graph. Without dropout that is
    all that training changes of them.
    """

    def __init__(self) -> None:
        super().__init__()
        from transformers import ResNetConfig

        backbone = ResNetConfig(
            embedding_size=34, hidden_sizes=[36, 40], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        )
        sizes = {
            "d_model": 40,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 53,
            "decoder_ffn_dim": 53,
            "num_queries": 5,
            "num_labels": 32,
        }
        self.detr = of_transformers("DetrForObjectDetection", "Detr", backbone_config=backbone, **sizes)()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        for layer in self.detr.model.encoder.layers:
            layer.training = False
        return self

    def forward(self, pixel_values: Tensor) -> Tensor:
        found = self.detr(pixel_values)
        return torch.cat([found.logits, found.pred_boxes], -1)


class GeometricNetwork(nn.Module):
    """Two layers of torch_geometric's on a graph."""

    def __init__(self, layer: Callable[[Any, int, int], nn.Module]) -> None:
        super().__init__()
        import torch_geometric.nn

        torch_geometric.backend.use_segment_matmul = False  # else torch_geometric counts a relation's edges first
        self.layers = nn.ModuleList([layer(torch_geometric.nn, 41, 34), layer(torch_geometric.nn, 34, 37)])

    def forward(self, x: Tensor, edge_index: Tensor, **edges: Tensor) -> Tensor:
        first, second = self.layers
        return second(F.relu(first(x, edge_index, **edges)), edge_index, **edges)


def geometric(layer: Callable[..., nn.Module], relations: int = 0) -> Entry:
    """Edges are selected by a mask there: how many are left is known when it runs."""

    def nodes_and_edges(g: torch.Generator) -> Inputs:
        batch = {"x": torch.randn(17, 41, generator=g), "edge_index": torch.randint(0, 17, (2, 45), generator=g)}
        if relations:
            batch["edge_type"] = torch.randint(0, relations, (45,), generator=g)
        return batch

    return Entry(lambda: GeometricNetwork(layer), nodes_and_edges, dynamo={"capture_dynamic_output_shape_ops": True})


class CellLoop(nn.Module):
    """An ``nn.LSTMCell`` called in a loop over time, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Linear(41, 34), nn.LSTMCell(34, 40), nn.Linear(40, 35)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in self.embed(x).unbind(1):
            state = self.cell(step, state)
        return self.head(state[0])


# --- the table ------------------------------------------------------------------------------------------------------

CAPTURING = "transformers takes a lock to install the hooks that collect hidden states"
COPYING = "transformers copies a configuration in the forward" if torch.__version__ < "2.13" else ""
"""Dynamo of torch 2.11 breaks the graph at ``copy.deepcopy``, later ones trace it."""

ZOO: dict[str, Entry] = {
    "llama": causal("Llama"),
    "mistral": causal("Mistral", sliding_window=5),
    "qwen2": causal("Qwen2"),
    "qwen3": causal("Qwen3", head_dim=10),
    "gemma2": causal("Gemma2", head_dim=10, sliding_window=5),
    "gemma3": Entry(of_transformers("Gemma3ForCausalLM", "Gemma3Text", **LLAMA_LIKE, head_dim=10), text),
    "phi": causal("Phi", partial_rotary_factor=0.4),
    "phi3": causal("Phi3"),
    "olmo2": causal("Olmo2"),
    "cohere": causal("Cohere"),
    "starcoder2": causal("Starcoder2"),
    "gpt2": Entry(
        of_transformers("GPT2LMHeadModel", "GPT2", **GPT), text, breaks="transformers logs a warning about the loss"
    ),
    "gpt_neox": causal("GPTNeoX", rotary_pct=0.5),
    "opt": causal("OPT", ffn_dim=53, word_embed_proj_dim=36),
    "bloom": causal("Bloom", n_layer=2, n_head=4),
    "falcon": causal("Falcon"),
    "mpt": causal("Mpt", d_model=40, n_heads=4, n_layers=2, expansion_ratio=2, max_seq_len=32),
    "mixtral": mixture_of_experts("Mixtral", intermediate_size=28),
    "qwen2_moe": mixture_of_experts("Qwen2Moe"),
    "qwen3_moe": mixture_of_experts("Qwen3Moe", head_dim=10),
    "gpt_oss": mixture_of_experts("GptOss", head_dim=10, sliding_window=5, intermediate_size=28),
    "deepseek_v2": mixture_of_experts("DeepseekV2", **LATENT_ATTENTION, num_key_value_heads=4),
    "deepseek_v3": mixture_of_experts("DeepseekV3", **LATENT_ATTENTION, num_key_value_heads=4),
    "mamba": causal("Mamba", state_size=5, conv_kernel=3, expand=2),
    "mamba2": causal("Mamba2", num_heads=8, head_dim=10, state_size=5, n_groups=2, chunk_size=4, expand=2),
    "bert": masked("Bert"),
    "roberta": masked("Roberta"),
    "distilbert": masked("DistilBert", dim=40, hidden_dim=53, n_layers=2, n_heads=4),
    "albert": masked("Albert", embedding_size=18),
    "deberta_v2": masked("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4),
    "modernbert": masked("ModernBert", cls_token_id=0, sep_token_id=1, local_attention=4),
    "t5": Entry(
        of_transformers(
            "T5ForConditionalGeneration",
            "T5",
            d_model=40,
            d_kv=10,
            d_ff=53,
            num_layers=1,
            num_heads=4,
            vocab_size=VOCABULARY,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            **TOKENS,
        ),
        text_pair,
        breaks=COPYING,
    ),
    "bart": Entry(of_transformers("BartForConditionalGeneration", "Bart", **BART), text_pair),
    "whisper": Entry(
        of_transformers(
            "WhisperForConditionalGeneration",
            "Whisper",
            **BART,
            num_mel_bins=12,
            max_source_positions=15,
            max_target_positions=16,
        ),
        speech,
        breaks=COPYING,
    ),
    "vit": vision("ViT", 20, **VISION),
    "dinov2": vision("Dinov2", 20, **VISION),
    "swin": vision(
        "Swin", 16, image_size=16, patch_size=2, embed_dim=12, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "clip": Entry(
        of_transformers("CLIPModel", "CLIP", text_config=BERT_LIKE, vision_config=VISION, projection_dim=18),
        image_and_text,
    ),
    "resnet": vision("ResNet", 32, embedding_size=10, hidden_sizes=[12, 20], depths=[1, 1], layer_type="basic"),
    "convnext": vision("ConvNext", 32, hidden_sizes=[12, 20], depths=[1, 1], num_stages=2),
    "segformer": Entry(
        of_transformers(
            "SegformerForSemanticSegmentation",
            "Segformer",
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[12, 20],
            num_attention_heads=[1, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=18,
            num_labels=3,
        ),
        segmentation,
        first_call=CAPTURING,
    ),
    "transformer_encoder": Entry(TransformerEncoder, vectors(BATCH, LENGTH, 40)),
    "transformer": Entry(
        Seq2Seq,
        lambda g: {
            "source": torch.randn(LENGTH, BATCH, 40, generator=g),
            "target": torch.randn(7, BATCH, 40, generator=g),
        },
    ),
    "lstm": Entry(lambda: Recurrent(nn.LSTM), vectors(BATCH, LENGTH, 21), dynamo={"allow_rnn": True}),
    "gru": Entry(lambda: Recurrent(nn.GRU), vectors(BATCH, LENGTH, 21), dynamo={"allow_rnn": True}),
    "gated_cell": Entry(GatedCell, vectors(5, 7, 21)),
    "unet": Entry(UNet, vectors(BATCH, 3, 14, 14)),
    "graph_network": Entry(GraphNetwork, graph),
    "mlp_mixer": Entry(MlpMixer, vectors(BATCH, 3, 20, 20)),
    "dlrm": Entry(Dlrm, clicks),
    "nerf": Entry(Nerf, vectors(23, 3)),
    "encodec": Entry(AudioCodec, vectors(BATCH, 1, 66), dynamo={"allow_rnn": True}),
    "wav2vec2": Entry(
        SpeechEncoder,
        lambda g: {
            "input_values": torch.randn(BATCH, 230, generator=g),
            "labels": torch.randint(0, 35, (BATCH,), generator=g),
        },
        first_call=CAPTURING,
    ),
    "nfnet": Entry(NfNet, vectors(BATCH, 3, 32, 32)),
    "wavenet": Entry(WaveNet, vectors(BATCH, 1, 29)),
    "detr": Entry(Detector, images(32, None)),
    "gcn": geometric(lambda layers, *sizes: layers.GCNConv(*sizes)),
    "gat": geometric(lambda layers, *sizes: layers.GATConv(*sizes, heads=1)),
    "rgcn": geometric(lambda layers, *sizes: layers.RGCNConv(*sizes, num_relations=3), relations=3),
    "lstm_cell": Entry(CellLoop, vectors(BATCH, LENGTH, 41)),
}
