"""Which layers to quantize how: scores from one backward pass, and the cheapest choice that they admit."""

from .result import Sensitivity
from .score import sensitivity

__all__ = ["Sensitivity", "sensitivity"]
