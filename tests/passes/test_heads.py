"""Output heads stay wide by what they are, and thin layers by their width; rules and options win over both."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.passes import heads
from qcompile.recipes import FP4

from .harness import compile_and_run

VOCABULARY = 72


class Language(nn.Module):
    """An embedding, a hidden layer as wide as the vocabulary, and a head whose name says nothing."""

    def __init__(self, tied: bool = False, scores: int = VOCABULARY) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 48)
        self.inner, self.outer = nn.Linear(48, VOCABULARY), nn.Linear(VOCABULARY, 48)
        self.last = nn.Linear(48, scores, bias=False)
        if tied:
            self.last.weight = self.table.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        scores = self.last(self.outer(self.inner(self.table(tokens)).relu())).float()
        return scores if targets is None else F.cross_entropy(scores.flatten(0, -2), targets.flatten())


TOKENS = torch.arange(10).view(2, 5)


def reasons(model: nn.Module, *inputs: Tensor, **options) -> dict[str, str]:
    decisions = compile_and_run(model, *inputs, recipe=FP4, fullgraph=False, **options).decisions
    return {d.site.name: "" if d.quantized else d.reason.partition(";")[0] for d in decisions}


def test_a_last_product_as_wide_as_the_vocabulary_is_a_head_and_a_hidden_layer_is_none() -> None:
    assert reasons(Language(), TOKENS) == {"inner": "", "outer": "", "last": heads.VOCABULARY}


def test_a_tied_weight_makes_a_head_and_a_cross_entropy_does() -> None:
    assert reasons(Language(tied=True), TOKENS)["last"] == heads.TIED
    assert reasons(Language(scores=40), TOKENS, TOKENS)["last"] == heads.SCORED
    assert reasons(Language(scores=40), TOKENS)["last"] == ""


def test_what_the_model_calls_its_output_embeddings_is_a_head() -> None:
    class Named(Language):
        def get_output_embeddings(self) -> nn.Module:
            return self.last

    assert reasons(Named(scores=40), TOKENS)["last"] == heads.OUTPUT_EMBEDDINGS


def test_a_head_behind_a_graph_break_is_known_by_the_models_embedding() -> None:
    class InTwo(Language):
        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.outer(self.inner(self.table(tokens)))
            torch._dynamo.graph_break()
            return self.last(hidden)

    for tied, reason in ((True, heads.TIED), (False, heads.VOCABULARY)):
        assert reasons(InTwo(tied=tied), TOKENS)["last"] == reason


def test_options_and_rules_quantize_heads() -> None:
    for options in ({"heads": True}, {"defaults": False}, {"rules": [{"name": "last", "quantize": True}]}):
        assert set(reasons(Language(tied=True), TOKENS, **options).values()) == {""}


@pytest.mark.parametrize(
    ("shape", "thin"), [((32, 48), False), ((31, 48), True), ((48, 31), True), ((10, 48), True)], ids=str
)
def test_layers_with_a_thin_side_stay_wide(shape: tuple[int, int], thin: bool) -> None:
    layer = nn.Linear(shape[1], shape[0])
    (reason,) = reasons(layer, torch.randn(3, shape[1])).values()
    assert reason == (f"a side of its weight is {min(shape)}, below min_side=32" if thin else "")
    assert set(reasons(layer, torch.randn(3, shape[1]), min_side=0).values()) == {""}


def test_a_part_of_a_wide_parameter_is_no_thin_layer() -> None:
    layer = SimpleNamespace(w=nn.Parameter(torch.randn(48, 48)))
    assert list(reasons(lambda x: x @ layer.w[:, :24], torch.randn(3, 48)).values()) == [""]


def test_adapters_are_left_wide_by_name() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48)), peft.LoraConfig(r=40, target_modules=["0"])
    )
    found = reasons(model, torch.randn(3, 48))
    assert sorted(found.values()) == ["", "", "skip='lora_*'", "skip='lora_*'"]
