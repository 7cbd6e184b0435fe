"""``qcompile_quest``: *QuEST: Stable Training of LLMs with 1-Bit Weights and Activations*, arXiv 2502.05003.

Weights and activations of every linear layer are rotated in blocks of 128 by a Hadamard matrix, scaled by their rows'
root mean square so that they look like N(0, 1), and rounded to the grid of least squared error for that. Gradients pass
where the rounding error is at most half a step ("trust"), in rotated coordinates, and are rotated back. For one bit a
clip at 1.3 times the level takes the place of trust. Hyperparameters are those of the BF16 model. Head, embeddings,
norms and attention stay as they are.

One thing is ours, for speed: dY is quantized to E4M3 for the products that the card runs faster so (up to 4 bits;
``backward="auto"``). ``options={"variant": "paper"}`` keeps it in high precision, as the paper does.

``options={"bits": b}``: 1 … 8 on half-integer grids, ``"ternary"``, ``"fp4"`` (E2M1), 16 to leave an operand wide;
``{"activation": 8, "weight": 4}`` for two widths. Where only one operand is quantized it is rotated back, so that a
pretrained model keeps its meaning.

What else the authors tried, and what they shipped, are options:

=================================== ===============================================================================
variant                             options, for ``activation`` and ``weight`` alike unless said
=================================== ===============================================================================
weights only                        ``{"bits": {"activation": 16, "weight": 4}}``
INT4 with 4:8 sparsity              ``{"bits": 4, "weight": {"sparsity": "4:8"}}`` (or ``"2:4"``)
straight-through estimator          ``{"estimator": "ste"}``
clip instead of trust               ``{"estimator": "clip"}``
no rotation                         ``{"rotation": None}``, for one bit with ``{"estimator": "clip(s=1.25)"}``
absmax scales (QuaRot as QAT)       ``{"scale": "absmax"}``
FP4 trust as shipped                ``{"estimator": "trust(t=0.6541)"}``: T = 0.3186 σ instead of 0.4871 σ
=================================== ===============================================================================

LSQ, which the paper compares with, is left out: its step is a parameter that is trained, and a compiler has none. It
would be missing from ``state_dict``, from the optimizer and from every checkpoint, or a module would have to be
swapped, which is what this backend exists to avoid.

Where both operands of a forward product are quantized, Hopper's tensor cores multiply the codes: up to 4 bits as FP8, 5
to 8 bits as INT8; a product of one with the other is decoded. Signs with signs are counted bit by bit where 128 divides
a layer's inputs. The half-integers k + ½ of 8 bits are multiplied as k; sums of k by rows make up for the halves.

Two departures. An exact zero goes to +Δ/2: levels are ⌊x/Δ⌋ + ½ times Δ, and the authors' code computes
round(x/Δ + ½) − ½, which rounds the tie at zero to the even 0 and so to −Δ/2. And the trust rule compares in units
of the grid. A row of zeros, whose scale is all floor, is then trusted, where the authors' comparison with the row's own
root mean square masks it for good; a layer that is initialized with zeros can learn.
"""

from __future__ import annotations

from typing import Any

from ..ir.operand import Operand
from ..ir.recipe import Recipe

ROTATION = "hadamard(128)"

#: ``bits=`` → operand.
WIDTHS: dict[Any, Operand | None] = {
    1: Operand.parse(f"midrise1 row rms half_up; clip(s=1.3); {ROTATION}"),
    **{bits: Operand.parse(f"midrise{bits} row rms half_up; trust; {ROTATION}") for bits in range(2, 9)},
    16: None,
    "ternary": Operand.parse(f"int2 row rms even; trust; {ROTATION}"),
    "fp4": Operand.parse(f"e2m1 row rms even; trust; {ROTATION}"),
}

QUEST = Recipe(
    name="qcompile_quest",
    source="arXiv 2502.05003",
    widths=WIDTHS,
    activation=WIDTHS[4],
    weight=WIDTHS[4],
    gradient=None,
    backward="auto",
    variants={"paper": {"backward": "bf16"}},
    skip=("lm_head",),
)
