"""Named recipes, as data. Each becomes a ``torch.compile`` backend of the same name (``pyproject.toml``, entry
points).
"""

from .fp4 import FP4
from .if4 import IF4
from .llm_int8 import LLM_INT8
from .mxfp4 import MXFP4
from .mxfp8 import MXFP8
from .nvfp4 import NVFP4
from .quartet2 import QUARTET2
from .quest import QUEST
from .stored import STORED
from .tetrajet2 import TETRAJET2
from .uniform4 import UNIFORM4

RECIPES = {
    recipe.name: recipe
    for recipe in (FP4, QUEST, STORED, LLM_INT8, QUARTET2, NVFP4, TETRAJET2, UNIFORM4, IF4, MXFP4, MXFP8)
}

__all__ = [
    "FP4", "IF4", "LLM_INT8", "MXFP4", "MXFP8", "NVFP4", "QUARTET2", "QUEST", "RECIPES", "STORED", "TETRAJET2",
    "UNIFORM4",
]  # fmt: skip
