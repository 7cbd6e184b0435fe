"""``qcompile_quartet2``: *Quartet II*, arXiv 2601.22813. The forward in NVFP4 with 4/6; every operand of the backward
rotated in 128s with drawn signs and rounded by MS-EDEN, W and X anew from the forward's codes.

When to use it: by default, if all three products are to be in FP4. Published gaps to BF16 (C4, 30M … 200M parameters,
25 tokens each): 0.043 … 0.042 nats, of which the backward makes 0.007; TetraJet-v2 0.054, NVIDIA's recipe 0.055.
"""

from ..ir.recipe import Recipe

EDEN = "e2m1 block16 e4m3_eden eden"
QUARTET2 = Recipe(
    name="qcompile_quartet2",
    source="arXiv 2601.22813",
    activation="e2m1 block16 e4m3_46",
    weight="e2m1 block16 e4m3_46",
    gradient=EDEN,
    dgrad_weight=f"{EDEN}; hadamard(128,signs=drawn)",
    wgrad_activation=f"{EDEN}; hadamard(128,signs=drawn)",
    again_from="codes",
)
