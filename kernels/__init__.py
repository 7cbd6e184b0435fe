"""Kernels of the ``qcompile::`` ops: one folder per op, its plain-torch reference beside its providers."""

# Hugging Face has a package `kernels`, which transformers looks for; started in a checkout it finds this folder under
# that name, and must not register everything once more.
if __name__ == "qcompile.kernels":
    from . import register, statistics  # noqa: F401
