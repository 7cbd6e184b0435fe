"""Named recipes, as data. Each becomes a ``torch.compile`` backend of the same name (``pyproject.toml``, entry
points).
"""

from .fp4 import FP4
from .quest import QUEST

RECIPES = {recipe.name: recipe for recipe in (FP4, QUEST)}

__all__ = ["FP4", "QUEST", "RECIPES"]
