"""Kernels of the ``qcompile::`` ops: one folder an op, its plain-torch reference beside its providers."""

from . import register, statistics  # noqa: F401
