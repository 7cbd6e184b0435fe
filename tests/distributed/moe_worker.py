"""What the tests of transformers' mixtures of experts under FSDP2 run on each rank: ``python moe_worker.py GROUP RANK
WORLD DIRECTORY`` as in ``tests/loops/worker.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from qcompile import compat
from qcompile.backends import compile_with
from qcompile.distributed import fp8_gradients
from qcompile.optim import AdamW
from qcompile.passes.pass_base import Observations
from qcompile.recipes import RECIPES
from tests.loops.cells import run_cells
from tests.loops.worker import VOCABULARY, batches, loss_of, mine, parameters_of, sgd

#: By the name of a cell: model, recipe, and a number of experts that two ranks cannot share evenly.
MODELS = {"mixtral": ("Mixtral", "qcompile_fp4", 3), "qwen3": ("Qwen3Moe", "qcompile_quest", 5)}
STEPS = 2
#: Rows are long enough to have outliers, and for QuEST's rotations.
WIDTH, HIDDEN = 128, 256

Placement = Callable[[nn.Parameter], Shard | None]


def model_of(name: str) -> nn.Module:
    """Two layers, and experts in grouped products; the model's own forward gives logits."""
    kind, _, experts = MODELS[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=HIDDEN, moe_intermediate_size=HIDDEN,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32, num_local_experts=experts,
        num_experts=experts, num_experts_per_tok=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    model.set_experts_implementation("grouped_mm")
    return model


def compile_layers(name: str, model: nn.Module, **options: Any) -> list[Observations]:
    """Every decoder layer by itself, as torch recommends; what was found fills the list as they run."""
    recipe = RECIPES[MODELS[name][1]].override({"min_side": 0})
    seen: list[Observations] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any, **given: Any) -> Any:
        seen.append(Observations())
        return compile_with(recipe, gm, inputs, inner_compile=compat.eager_inner_compile, observe=seen[-1], **given)

    for layer in model.model.layers:
        layer.compile(backend=backend, **options)
    return seen


def experts_in(seen: list[Observations]) -> list[str]:
    """Products of experts and whether each is quantized, of all graphs."""
    decisions = [decision for observed in seen if observed.plan for decision in observed.plan.decisions]
    return [f"{d.site.name} {d.site.op} {d.quantized}" for d in decisions if "experts" in d.site.name]


def sharded(model: nn.Module, placed: Placement | None = None, **policy: torch.dtype) -> nn.Module:
    """Each layer, and what is left."""
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=MixedPrecisionPolicy(**policy), shard_placement_fn=placed)
    return fully_shard(model, mp_policy=MixedPrecisionPolicy(**policy))


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return loss_of(lambda ids: model(input_ids=ids).logits, tokens)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of the whole parameters, by name."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad.clone()
        for name, p in model.named_parameters()
    }


def train(model: nn.Module, data: list[Tensor]) -> dict[str, Any]:
    """Losses, the first step's gradients, and parameters after the last step."""
    optimizer, losses, gradients = sgd(model), [], None
    for tokens in data:
        step = loss(model, tokens)
        step.backward()
        gradients = gradients or gradients_of(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step.detach())
    return {"losses": losses, "gradients": gradients, "parameters": parameters_of(model)}


# --- cells ------------------------------------------------------------------------------------------------------------


def trained(name: str) -> dict[str, Any]:
    model = model_of(name)
    seen = compile_layers(name, model, fullgraph=True)
    sharded(model)
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    found = {"placements": str(experts.placements), "local": experts.to_local().shape[0], "keys": [*model.state_dict()]}
    return found | train(model, mine(batches(STEPS))) | {"experts": experts_in(seen)}


def first_gradients(make: Callable[[nn.Module], Any], **options: Any) -> dict[str, Any]:
    """Of a Mixtral that ``make`` has sharded."""
    model = model_of("mixtral")
    seen = compile_layers("mixtral", model, **options)
    make(model)
    loss(model, mine(batches(1))[0]).backward()
    return {"gradients": gradients_of(model), "experts": experts_in(seen)}


def placed(axis: int) -> dict[str, Any]:
    """Experts that every rank has a part of: rows (1), or parts of all rows (2)."""
    return first_gradients(
        lambda model: sharded(model, lambda p: Shard(axis) if p.dim() == 3 else None), fullgraph=True
    )


def apart() -> dict[str, Any]:
    """Experts are a unit of FSDP's of their own, whose hooks break the layer's graph."""

    def make(model: nn.Module) -> None:
        for layer in model.model.layers:
            fully_shard(layer.mlp.experts)
        sharded(model)

    return first_gradients(make)


def bfloat16() -> dict[str, Any]:
    policy = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    return first_gradients(lambda model: sharded(model, **policy), fullgraph=True)


def fp8(directory: Path) -> dict[str, Any]:
    """Gradients as E4M3 codes, AdamW with 8-bit states, saved half-way and finished by a new model."""

    def make() -> tuple[nn.Module, AdamW]:
        model = model_of("mixtral")
        compile_layers("mixtral", model, fullgraph=True)
        traffic.append(fp8_gradients(sharded(model)))
        return model, AdamW(model.parameters(), lr=1e-3)

    def run(model: nn.Module, optimizer: AdamW, tokens: Tensor) -> dict[str, Tensor]:
        loss(model, tokens).backward()
        gradients = gradients_of(model)
        with torch.compiler.set_stance("force_eager"):  # on a CPU it compiles for longer than all else takes
            optimizer.step()
        optimizer.zero_grad()
        return gradients

    traffic: list[Any] = []
    first, second = mine(batches(2))
    model, optimizer = make()
    gradients = run(model, optimizer, first)
    sent = traffic[0].bytes / traffic[0].wide_bytes
    saved, state = get_state_dict(model, optimizer)
    dcp.save({"model": saved, "optimizer": state}, checkpoint_id=directory / "checkpoint")
    run(model, optimizer, second)

    resumed, other = make()
    target, target_state = get_state_dict(resumed, other)
    dcp.load({"model": target, "optimizer": target_state}, checkpoint_id=directory / "checkpoint")
    set_state_dict(resumed, other, model_state_dict=target, optim_state_dict=target_state)
    run(resumed, other, second)
    return {
        "gradients": gradients, "sent": sent, "whole": parameters_of(model), "resumed": parameters_of(resumed),
        "start": parameters_of(model_of("mixtral")),
    }  # fmt: skip


CELLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "moe_mixtral": lambda _: trained("mixtral"),
    "moe_qwen3": lambda _: trained("qwen3"),
    "moe_rows": lambda _: placed(1),
    "moe_columns": lambda _: placed(2),
    "moe_apart": lambda _: apart(),
    "moe_bfloat16": lambda _: bfloat16(),
    "moe_fp8": fp8,
}


if __name__ == "__main__":
    run_cells(CELLS)
