"""``qcompile_if4``: NVIDIA's recipe (:mod:`qcompile.recipes.nvfp4`) with IF4, *Adaptive Block-Scaled Data Types*, arXiv
2603.28765: every block takes E2M1 or INT4, whichever errs less when rounded to the nearest, at the same 4.5 bits; of dY
the codes are then rounded stochastically.

When to use it: to see what the format is worth; no hardware multiplies it. Published: less loss than NVFP4 in quantized
training. Measured: squared error on N(0, 1) 6.16·10⁻³ against NVFP4's 9.06·10⁻³.
"""

from ..ir.recipe import Recipe
from ..ir.rules import Rule

IF4 = Recipe(
    name="qcompile_if4",
    source="arXiv 2603.28765",
    activation="e2m1/int4 block16 e4m3",
    weight="e2m1/int4 block16x16 e4m3",
    gradient="e2m1/int4 block16 e4m3 stochastic",
    wgrad_activation="e2m1/int4 block16 e4m3; hadamard(16,signs=fixed)",
    rules=(Rule(last_blocks=0.15, quantize=False),),
)
