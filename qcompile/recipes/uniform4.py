"""``qcompile_uniform4``: after *UFP4*, arXiv 2606.20381: evenly spaced levels, −7 … 7 by 16, of operands that are all
rotated; dY stochastically. Theirs has FP32 scales, ours those of NVFP4, which take a third of the bits.

When to use it: to see what a uniform grid is worth; no Blackwell multiplies it. Published: error of the loss 0.97 % of
BF16's at 1.5B parameters and 1.39 % at 124B, of E2M1 1.26 % and 1.73 %.
"""

from ..ir.recipe import Recipe

AGAIN = "int4 block16 e4m3; hadamard(16,signs=fixed)"
UNIFORM4 = Recipe(
    name="qcompile_uniform4",
    source="arXiv 2606.20381",
    activation="int4 block16 e4m3; ste; hadamard(16)",
    weight="int4 block16 e4m3; ste; hadamard(16)",
    gradient="int4 block16 e4m3 stochastic",
    dgrad_weight=AGAIN,
    wgrad_activation=AGAIN,
)
