"""Calls of an op's own kernel in generated code: past the dispatcher on CUDA, where it takes as long as a launch.

The C++ wrapper calls the dispatcher, which it reaches from C++. So does code for CPUs, whose kernels take longer.
"""

from __future__ import annotations

from typing import Any

from torch._inductor import ir
from torch._inductor.lowering import fallback_handler
from torch._inductor.virtualized import V

from qcompile import compat

from .register import DIRECT

__all__ = ["own_kernel"]

_IMPORT = "from qcompile.kernels.register import DIRECT as qcompile_kernels"


class _DirectCall(ir.FallbackKernel):
    """An extern call of the function that :data:`DIRECT` has for an op."""

    def codegen(self, wrapper: Any) -> None:
        wrapper.add_import_once(_IMPORT)
        self.python_kernel_name = f"qcompile_kernels[{_name(self.op_overload)!r}]"
        super().codegen(wrapper)


def own_kernel(op: Any, *arguments: Any) -> Any:
    """Call the op's own kernel from the generated program; results as IR, as its schema has them."""
    devices = [x.get_device() for x in arguments if isinstance(x, ir.TensorBox)]
    on_cuda = any(device is not None and device.type == "cuda" for device in devices)
    if not on_cuda or V.graph.cpp_wrapper or _name(op) not in DIRECT:
        return fallback_handler(op, add_to_fallback_set=False)(*arguments)
    results = _DirectCall.create(op, *arguments)
    return compat.tree_map(lambda x: ir.TensorBox.create(x) if isinstance(x, ir.IRNode) else x, results)


def _name(op: Any) -> str:
    return op.name().partition("::")[2].partition(".")[0]
