"""``qcompile_nvfp4``: *Pretraining Large Language Models with NVFP4*, arXiv 2509.25149. Weights in squares, so that
both directions read the same codes; wgrad reads X again, rotated with dY; gradients are rounded stochastically.

When to use it: the recipe with the longest published run. 12B, 10T tokens: loss within 1 % of FP8's, 1.5 % after the
decay; 0.5 % with ``{"forward": "bf16"}`` for its last part (App. D). MMLU-Pro 62.58 against 62.62.
"""

from ..ir.recipe import Recipe
from ..ir.rules import Rule

NVFP4 = Recipe(
    name="qcompile_nvfp4",
    source="arXiv 2509.25149",
    activation="e2m1 block16 e4m3",
    weight="e2m1 block16x16 e4m3",
    gradient="e2m1 block16 e4m3 stochastic",
    wgrad_activation="e2m1 block16 e4m3; hadamard(16,signs=fixed)",
    rules=(Rule(last_blocks=0.15, quantize=False),),
)
