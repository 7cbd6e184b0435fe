"""A script that runs one model, once, with and without quantization: for bisecting, and for bug reports."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backends import plain_model, split_options
from .recipes import RECIPES

__all__ = ["save_repro"]

_SCRIPT = '''"""{backend} on {model}: forward and backward, with and without quantization (by qcompile.save_repro).

Versions: qcompile {qcompile}, torch {torch}, Python {python}. The model and its inputs are in the file beside this one.
To bisect, change ``options``: {{"fuel": n}} quantizes the first n products, {{"skip": [names]}} leaves layers alone,
{{"disable_passes": ["fuse"]}} leaves out a pass, {{"debug": True}} verifies the graph after each.
"""

from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import qcompile

options = {options!r}


def run(model, args, kwargs, options):
    """Mean square of the floating-point results, and its gradient for every parameter."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    results = torch.compile(model, backend={backend!r}, options=options)(*args, **kwargs)
    wide = [t.float() for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    loss = sum(t.square().mean() for t in wide)
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else ()
    return loss.item(), dict(zip(names, gradients))


if __name__ == "__main__":
    saved = torch.load(Path(__file__).with_suffix(".pt"), weights_only=False)
    model, args, kwargs = saved["model"], saved["args"], saved["kwargs"]
    print(qcompile.explain(model, *args, backend={backend!r}, options=options, **kwargs))
    loss, gradients = run(model, args, kwargs, options)
    plain_loss, plain = run(model, args, kwargs, {{**options, "enabled": False}})
    print(f"mean square of the results: {{loss:.6g}} quantized, {{plain_loss:.6g}} not")
    for name, gradient in gradients.items():
        if gradient is not None and plain[name] is not None:
            difference = (gradient - plain[name]).float().norm() / plain[name].float().norm()
            print(f"{{difference:10.4f}}  {{name}}  (difference of the gradient, relative)")
'''


def save_repro(
    path: str | Path,
    model: nn.Module,
    *args: Any,
    backend: str = "qcompile_fp4",
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write ``<path>.py``, which compiles ``model`` and runs it on the given inputs, and ``<path>.pt``, which it loads.

    The script prints the report, and by how much quantization changes the results and every parameter's gradient.

    Args:
        path: where to write, with or without ``.py``; the folder must exist.
        model: the module, compiled or not; it is pickled, so its class has to be importable where the script runs.
        args, kwargs: inputs of the forward. backend, options: as for ``torch.compile``; a monitor is left out.

    Returns the path of the script. Raises ``ValueError`` for an unknown backend or option, and for a class in place
    of a model.
    """
    if backend not in RECIPES:
        msg = f"unknown backend {backend!r}; known: {', '.join(RECIPES)}"
        raise ValueError(msg)
    given = {key: value for key, value in (options or {}).items() if key != "monitor"}
    RECIPES[backend].override(split_options(None, given)[0])
    from . import __version__

    model = plain_model(model, "save_repro")
    script = Path(path).with_suffix(".py")
    text = _SCRIPT.format(
        backend=backend,
        model=type(model).__name__,
        options=given,
        qcompile=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    torch.save({"model": model, "args": args, "kwargs": kwargs}, script.with_suffix(".pt"))
    script.write_text(text, encoding="utf-8")
    return script
