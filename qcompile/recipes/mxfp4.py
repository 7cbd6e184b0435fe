"""``qcompile_mxfp4``: after *Training LLMs with MXFP4*, arXiv 2502.20586: a wide forward, and a backward whose operands
are all rotated and rounded stochastically. Theirs rounds ¾·x to scales rounded down, ours x to scales rounded up; both
are unbiased. Theirs draws signs, ours are fixed. ``{"variant": "full"}`` has the forward in MXFP4 as well.

When to use it: MXFP4 hardware without NVFP4. Published (30M, Quartet II's log): +0.015 nats, of the backward alone.
"""

from ..ir.recipe import Recipe

MX = "e2m1 block32 e8m0_ceil stochastic"
ROTATED = f"{MX}; hadamard(64,signs=fixed)"
MXFP4 = Recipe(
    name="qcompile_mxfp4",
    source="arXiv 2502.20586",
    gradient=MX,
    dgrad_weight=ROTATED,
    wgrad_activation=ROTATED,
    variants={"full": {"activation": "e2m1 block32 e8m0", "weight": "e2m1 block32 e8m0"}},
)
