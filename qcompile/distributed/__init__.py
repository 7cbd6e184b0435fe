"""Eight bits between devices: ``qcompile.distributed.fp8_gradients``."""

from .gradients import Traffic as Traffic
from .gradients import fp8_gradients as fp8_gradients

__all__ = ["Traffic", "fp8_gradients"]
