"""Named recipes, as data. Each becomes a ``torch.compile`` backend of the same name (``pyproject.toml``, entry
points).
"""

from .fp4 import FP4
from .quest import QUEST
from .stored import STORED

RECIPES = {recipe.name: recipe for recipe in (FP4, QUEST, STORED)}

__all__ = ["FP4", "QUEST", "RECIPES", "STORED"]
