"""``qcompile_stored``: activations and gradients in high precision, beside weights that are stored as codes.

That is QLoRA (arXiv 2305.14314) where adapters train beside the weights, and W4A16 where nothing trains. How a weight
is stored is decided before it is compiled (``qcompile.pack_(model, "nf4 block64")``), and any recipe compiles it: this
one quantizes nothing else.
"""

from ..ir.recipe import Recipe

STORED = Recipe(name="qcompile_stored", source="arXiv 2305.14314")
