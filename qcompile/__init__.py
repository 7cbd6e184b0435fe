"""qcompile: 4-bit training and serving of any PyTorch model through ``torch.compile``.

``torch.compile(model, backend="qcompile_fp4")`` finds the backend by its entry point; nothing needs to be imported.
Names below are loaded on first use, so that importing this package stays cheap.
"""

from importlib import import_module

_EXPORTS = {
    "explain": "qcompile.report",
    "Report": "qcompile.report",
    "saved_bytes": "qcompile.report",
    "Recipe": "qcompile.ir.recipe",
    "Rule": "qcompile.ir.recipe",
    "Monitor": "qcompile.numerics",
    "monitor": "qcompile.numerics",
    "gradient_cosine": "qcompile.numerics",
    "save_repro": "qcompile.repro",
    "RECIPES": "qcompile.recipes",
}

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
