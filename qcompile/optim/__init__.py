"""Optimizers with states in 8 bits: ``qcompile.optim.AdamW``."""

from .adamw import AdamW as AdamW

__all__ = ["AdamW"]
