"""``qcompile_llm_int8``: *LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale*, arXiv 2208.07339.

When to use it: to run, or to train adapters beside, a pretrained model of which a few columns of the activations are
many times larger than the rest. These are multiplied in high precision; the rest of X with one INT8 scale per row, and
W with one per output channel. Store W as such codes before (``qcompile.pack_(model, "int8 row")``) to halve its memory,
or leave it wide, to be quantized in the graph. Gradients stay in high precision.
"""

from ..ir.operand import Operand
from ..ir.recipe import Recipe

LLM_INT8 = Recipe(
    name="qcompile_llm_int8",
    source="arXiv 2208.07339",
    activation=Operand.parse("int8 row absmax even; ste; columns(threshold=6.0,most=64)"),
    weight=Operand.parse("int8 row absmax even; ste"),
)
