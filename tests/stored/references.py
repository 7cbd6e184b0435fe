"""A mode in which our ops are run by their references."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.kernels.register import REFERENCES

__all__ = ["References"]


class References(TorchDispatchMode):
    """Quantizes by the references. The C++ kernels are the same bit for bit, but each is compiled first."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, _, name = func._schema.name.partition("::")
        return (REFERENCES[name] if space == "qcompile" and name in REFERENCES else func)(*args, **(kwargs or {}))
