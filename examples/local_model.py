"""What the examples on stored weights share: which model they take, and where transformers finds it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

#: A Llama of 0.3 million weights that has learned to tell stories.
SMALL = Path(__file__).parent / "data" / "stories260K"
NF4 = "nf4 block64 absmax_bnb; nested"


def folder_of(model: Path, out: Path) -> Path:
    """Where transformers finds the model: a GGUF file is decoded into a folder in ``out`` (needs ``pip install
    gguf``).
    """
    if model.suffix != ".gguf":
        return model
    folder = out / model.stem
    if not folder.exists():
        where = {"pretrained_model_name_or_path": model.parent, "gguf_file": model.name}
        wide = transformers.GgufConfig(dequantize=True)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.bfloat16, quantization_config=wide
        )
        transformers.AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
        loaded.save_pretrained(folder)
    return folder
