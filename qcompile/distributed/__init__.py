"""Eight bits between devices: ``qcompile.distributed.fp8_gradients``."""

from .experts import exchange_rows as exchange_rows
from .fp8_lm import AutomaticScaling as AutomaticScaling
from .fp8_lm import fp8_lm_gradients as fp8_lm_gradients
from .gradients import Traffic as Traffic
from .gradients import fp8_gradients as fp8_gradients
from .weights import WeightTraffic as WeightTraffic
from .weights import fp8_weights as fp8_weights

__all__ = [
    "AutomaticScaling",
    "Traffic",
    "WeightTraffic",
    "exchange_rows",
    "fp8_gradients",
    "fp8_lm_gradients",
    "fp8_weights",
]
