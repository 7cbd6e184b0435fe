"""Optimizers with states in 8 bits: ``qcompile.optim.AdamW`` and ``Muon``."""

from .adamw import AdamW as AdamW
from .muon import Muon as Muon

__all__ = ["AdamW", "Muon"]
