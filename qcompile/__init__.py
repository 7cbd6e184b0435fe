"""qcompile: 4-bit training and serving of any PyTorch model through ``torch.compile``.

``torch.compile(model, backend="qcompile_fp4")`` finds the backend by its entry point; nothing needs to be imported.
Names below are loaded on first use, so that importing this package stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and IDEs, which do not follow __getattr__
    from qcompile import distributed as distributed
    from qcompile import optim as optim
    from qcompile.apps.repro import save_repro as save_repro
    from qcompile.backends import backend as backend
    from qcompile.backends import register as register
    from qcompile.definitions import Estimator as Estimator
    from qcompile.definitions import Format as Format
    from qcompile.definitions import ScaleRule as ScaleRule
    from qcompile.functional import Quantized as Quantized
    from qcompile.functional import dequantize as dequantize
    from qcompile.functional import fake_quantize as fake_quantize
    from qcompile.functional import quantize as quantize
    from qcompile.ir.recipe import Recipe as Recipe
    from qcompile.ir.rules import Rule as Rule
    from qcompile.numerics import Monitor as Monitor
    from qcompile.numerics import gradient_cosine as gradient_cosine
    from qcompile.numerics import monitor as monitor
    from qcompile.recipes import RECIPES as RECIPES
    from qcompile.report.explain import explain as explain
    from qcompile.report.model import Report as Report
    from qcompile.report.saved import saved_bytes as saved_bytes
    from qcompile.schedule import Schedule as Schedule
    from qcompile.search import Sensitivity as Sensitivity
    from qcompile.search import sensitivity as sensitivity
    from qcompile.stored import PackedWeight as PackedWeight
    from qcompile.stored import from_bitsandbytes_ as from_bitsandbytes_
    from qcompile.stored import load_packed_ as load_packed_
    from qcompile.stored import load_quantized_ as load_quantized_
    from qcompile.stored import loftq_ as loftq_
    from qcompile.stored import pack_ as pack_
    from qcompile.stored import packed_state_dict as packed_state_dict
    from qcompile.stored import qa_lora_ as qa_lora_
    from qcompile.stored import unpack_ as unpack_
    from qcompile.stored.export import export as export

_EXPORTS = {
    "explain": "qcompile.report",
    "Report": "qcompile.report",
    "saved_bytes": "qcompile.report",
    "sensitivity": "qcompile.search",
    "Sensitivity": "qcompile.search",
    "Format": "qcompile.definitions",
    "Estimator": "qcompile.definitions",
    "ScaleRule": "qcompile.definitions",
    "Recipe": "qcompile.ir.recipe",
    "Rule": "qcompile.ir.rules",
    "backend": "qcompile.backends",
    "register": "qcompile.backends",
    "Schedule": "qcompile.schedule",
    "Quantized": "qcompile.functional",
    "fake_quantize": "qcompile.functional",
    "quantize": "qcompile.functional",
    "dequantize": "qcompile.functional",
    "Monitor": "qcompile.numerics",
    "monitor": "qcompile.numerics",
    "gradient_cosine": "qcompile.numerics",
    "save_repro": "qcompile.apps.repro",
    "RECIPES": "qcompile.recipes",
    **dict.fromkeys(
        (
            "PackedWeight", "export", "from_bitsandbytes_", "load_packed_", "load_quantized_", "loftq_", "pack_",
            "packed_state_dict", "qa_lora_", "unpack_",
        ),
        "qcompile.stored",
    ),
}  # fmt: skip

__all__ = sorted(_EXPORTS)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    if name in ("distributed", "optim"):
        return import_module(f"qcompile.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
