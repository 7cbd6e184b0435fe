"""torchao's FP8 training of experts, in transformers' models.

torchao multiplies groups of multiples of 16 rows, none of them empty; others end the process by an assertion on the
card. A router makes groups of any size, and torchao 0.18 refuses to pad them in FP8 ("not yet supported"). So there
are two ways. :func:`swap_weights` is torchao's own for models as they are; it runs once torchao pads. And
:func:`use_padded_experts` gives the models another forward of experts, which gathers tokens into padded groups, as
torchtitan's models do for torchao.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ALIGNMENT", "fp8_product", "padded_groups", "swap_weights", "use_padded_experts"]

ALIGNMENT = 16

#: x ``[rows, k]``, a transposed weight ``[experts, k, n]`` and ends of groups → ``[rows, n]``.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def fp8_product(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Row-wise FP8 in all three products, differentiable."""
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as grouped_mm

    try:
        return grouped_mm(x, weight, offs, pad_token_groups_for_grouped_mm=False)
    except TypeError:  # an argument that came with torchao 0.17
        return grouped_mm(x, weight, offs)


def swap_weights(model: nn.Module) -> None:
    """torchao's own conversion of experts' parameters. Raises ``NotImplementedError`` if it cannot pad groups."""
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as grouped_mm
    from torchao.prototype.moe_training.config import Float8TrainingOpConfig
    from torchao.quantization import quantize_

    one = next(model.parameters()).new_zeros(ALIGNMENT, ALIGNMENT, dtype=torch.bfloat16)
    offs = torch.tensor([ALIGNMENT], dtype=torch.int32, device=one.device)
    try:
        grouped_mm(one, one[None].transpose(-2, -1), offs, pad_token_groups_for_grouped_mm=True)
    except AssertionError as error:  # under Dynamo it would be hidden behind that of a fake call
        msg = f"a router's groups are no multiples of {ALIGNMENT} rows, and torchao says: {error}"
        raise NotImplementedError(msg) from None
    config = Float8TrainingOpConfig(pad_token_groups_for_grouped_mm=True)
    quantize_(model, config, filter_fn=lambda _, name: name.endswith(".experts"))


def padded_groups(expert_of: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Where each of the rows ``[S]`` goes if every expert's are a multiple of ALIGNMENT and some, and where groups end.

    Places are below ``S + experts * ALIGNMENT``, which does not depend on data; ends are int32 ``[experts]``.
    """
    counts = (expert_of[:, None] == torch.arange(experts, device=expert_of.device)).sum(0)
    padded = ((counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT).clamp(min=ALIGNMENT)
    offs = padded.cumsum(0)
    order = torch.sort(expert_of, stable=True).indices
    sorted_of = expert_of[order]
    within = torch.arange(len(expert_of), device=expert_of.device) - (counts.cumsum(0) - counts)[sorted_of]
    places = torch.empty_like(order)
    places[order] = (offs - padded)[sorted_of] + within
    return places, offs.int()


def use_padded_experts(model: Any, product: Product = fp8_product) -> None:
    """Let experts of transformers multiply by ``product``, padded groups at a time. Those without a bias only."""

    def forward(self: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k = top_k_index.shape[1]
        places, offs = padded_groups(top_k_index.reshape(-1), self.num_experts)
        rows = len(places) + self.num_experts * ALIGNMENT
        # The row behind the last one is zeros, which whatever pads a group reads.
        source = torch.full((rows,), len(x), device=x.device)
        source[places] = torch.arange(len(places), device=x.device) // top_k
        gathered = torch.cat((x, x.new_zeros(1, x.shape[1])))[source]
        hidden = self._apply_gate(product(gathered, self.gate_up_proj.transpose(-2, -1), offs))
        y = product(hidden, self.down_proj.transpose(-2, -1), offs)[places]
        weighted = y.view(len(x), top_k, -1) * top_k_weights[..., None]
        return weighted.sum(1).to(x.dtype)

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("padded", forward)
    model.set_experts_implementation("padded")
