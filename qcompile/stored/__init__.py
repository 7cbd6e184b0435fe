"""Weights that are stored as codes: QLoRA, W4A16, and 4-bit weights under any recipe.

::

    qcompile.pack_(model, "nf4 block64 absmax_bnb; nested")     # in place; then PEFT, as usual
    model = torch.compile(model, backend="qcompile_stored")

"Stored" belongs to the weight. A recipe decides what activations and gradients are: ``qcompile_stored`` leaves them
alone, ``qcompile_fp4`` multiplies FP4 activations by the codes.
"""

from .bitsandbytes import from_bitsandbytes_
from .checkpoint import load_packed_, packed_state_dict
from .export import Exported, export
from .load import load_quantized_
from .loftq import LoftQLayer, loftq_
from .pack import PackedLayer, Packing, bytes_of, pack_, unpack_
from .qa_lora import qa_lora_
from .sharding import PackedShard
from .weight import PackedWeight

__all__ = [
    "Exported", "LoftQLayer", "PackedLayer", "PackedShard", "PackedWeight", "Packing", "bytes_of", "export",
    "from_bitsandbytes_", "load_packed_", "load_quantized_", "loftq_", "pack_", "packed_state_dict", "qa_lora_",
    "unpack_",
]  # fmt: skip
