"""What was quantized, how, by which kernel, and why the rest was not.

``print(qcompile.explain(model, *args))`` compiles the model's graphs through every pass without generating code
(seconds), runs its forward once, and prints one line per GEMM. Parameters, buffers, gradients and random state are
left as they were. Under ``torch.distributed`` every rank has a report of its own; :meth:`Report.gather` merges them
and says where ranks disagree.
"""

from .explain import explain
from .model import Report
from .rows import ROLES, Row
from .saved import SavedBytes, saved_bytes

__all__ = ["ROLES", "Report", "Row", "SavedBytes", "explain", "saved_bytes"]
