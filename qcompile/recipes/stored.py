"""``qcompile_stored``: activations and gradients in high precision, beside weights that are stored as codes.

That is QLoRA (arXiv 2305.14314) where adapters train beside the weights, and W4A16 where nothing trains. How a weight
is stored is decided before it is compiled (``qcompile.pack_(model, "nf4 block64")``), and any recipe compiles it: this
one quantizes nothing else. With ``activation="e2m1 row"`` it also quantizes activations (W4A4), and dX is multiplied on
8-bit tensor cores where the card is estimated to run faster so; beside wide activations dY stays wide.

Adapters beside the weights are low-rank products, whose cost is what they read and write: three passes join them and
add them up in other products.
"""

from ..ir.recipe import Recipe

STORED = Recipe(
    name="qcompile_stored",
    source="arXiv 2305.14314",
    backward="auto",
    enable_passes=("move_factors", "join_products", "accumulate"),
)
