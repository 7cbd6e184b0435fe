"""``qcompile_tetrajet2``: the core of *TetraJet-v2*, arXiv 2510.27527: NVFP4 in all products, rounded stochastically in
the backward, whose operands are rotated in 16s with drawn signs; W and X are made anew from the forward's codes. Theirs
has an FP32 scale for every 128, ours one per tensor; OsciReset and OutControl, which act on a run, are left out.

When to use it: to compare. Published gap (Quartet II's log, 30M … 200M parameters): 0.054 … 0.052 nats.
"""

from ..ir.recipe import Recipe

ROTATED = "e2m1 block16 e4m3 stochastic; hadamard(16,signs=drawn)"
TETRAJET2 = Recipe(
    name="qcompile_tetrajet2",
    source="arXiv 2510.27527",
    activation="e2m1 block16 e4m3",
    weight="e2m1 block16 e4m3",
    gradient="e2m1 block16 e4m3 stochastic",
    dgrad_weight=ROTATED,
    wgrad_activation=ROTATED,
    again_from="codes",
)
