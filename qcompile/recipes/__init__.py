"""Named recipes, as data. Each becomes a ``torch.compile`` backend of the same name (``pyproject.toml``, entry
points).
"""

from .fp4 import FP4

RECIPES = {recipe.name: recipe for recipe in (FP4,)}

__all__ = ["FP4", "RECIPES"]
