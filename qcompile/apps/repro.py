"""A script that runs one model, once, with and without quantization: for bisecting, and for bug reports."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import pickle
import pickletools
import platform
import reprlib
import symtable
import sys
import sysconfig
import textwrap
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcompile.backends import plain_model, recipe_of, with_options
from qcompile.ir.definitions import named_definitions, short_name
from qcompile.ir.estimators import ESTIMATORS
from qcompile.ir.formats import FORMATS
from qcompile.ir.operand import Operand
from qcompile.ir.quantizer import SCALE_RULES
from qcompile.ir.recipe import Recipe
from qcompile.ir.rules import Rule
from qcompile.recipes import FP4, QUEST

__all__ = ["save_repro"]

_SCRIPT = '''"""{backend} on {model}: forward and backward, with and without quantization (by qcompile.save_repro).

Versions: qcompile {qcompile}, torch {torch}, Python {python}. The model and its inputs are in the file beside this one.
To bisect, change ``options``: {{"fuel": n}} quantizes the first n products, {{"skip": [names]}} leaves layers alone,
{{"disable_passes": ["fuse"]}} leaves out a pass, {{"debug": True}} verifies the graph after each.
"""

import sys
from pathlib import Path

import torch

import qcompile
from qcompile.compat import tree_leaves

sys.path += {folders!r}
{definitions}
recipe = {recipe}
options = {options!r}


def run(model, args, kwargs, options):
    """Mean square of the floating-point results, and its gradient for every parameter."""
    torch.compiler.reset()
    torch.manual_seed(0)
    results = torch.compile(model, backend=qcompile.backend(recipe), options=options)(*args, **kwargs)
    wide = [t.float() for t in tree_leaves(results) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    loss = sum((t.square().mean() for t in wide), torch.zeros(()))
    named = model.named_parameters() if isinstance(model, torch.nn.Module) else ()
    leaves = {{name: p for name, p in named if p.requires_grad}}
    if not (leaves and loss.requires_grad):
        return loss.item(), {{}}
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.item(), dict(zip(leaves, gradients))


if __name__ == "__main__":
    device = None if torch.cuda.is_available() else "cpu"
    saved = torch.load(Path(__file__).with_suffix(".pt"), map_location=device, weights_only=False)
    model, args, kwargs = saved["model"], saved["args"], saved["kwargs"]
    print(qcompile.explain(model, *args, backend=recipe, options=options, **kwargs))
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
    backend: str | Recipe = "qcompile_fp4",
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Path:
    """Write ``<path>.py``, which compiles ``model`` and runs it on the given inputs, and ``<path>.pt``, which it loads.

    The script prints the report, and by how much quantization changes the results and every parameter's gradient.

    Args:
        path: where to write, with or without ``.py``; the folder must exist.
        model: the module (or function), compiled or not. It is pickled. Modules that are not installed are imported
            from the folder they are in now; what is defined in ``__main__`` is copied into the script.
        *args: positional inputs of the forward.
        backend: a recipe or its name.
        options: as for ``torch.compile``; a monitor is left out. Formats, estimators and scale rules of the user's are
            written into the script; their functions are imported or copied as the model's code is.
        **kwargs: keyword inputs of the forward.

    Returns the path of the script. Raises ``ValueError``, before anything is written, for an unknown backend or option,
    an option that has no text, a class in place of a model, a model or input that cannot be pickled, and code of
    ``__main__`` that cannot be copied, a lambda above all.
    """
    recipe = recipe_of(backend)
    given = {key: value for key, value in (options or {}).items() if key != "monitor"}
    changed = with_options(recipe, given)
    from qcompile import __version__

    model = plain_model(model, "save_repro")
    data = _pickled({"model": model, "args": args, "kwargs": kwargs})
    definitions, functions = _user_definitions(repr([recipe, recipe.widths, changed]))
    used = sorted({*_globals_of(data), *functions})
    path = Path(path)
    script = path if path.suffix == ".py" else path.with_name(f"{path.name}.py")
    text = _SCRIPT.format(
        backend=recipe.name,
        recipe=_recipe_source(recipe),
        model=getattr(model, "__name__", type(model).__name__),
        options={key: _plain(value, f"option {key!r}") for key, value in given.items()},
        folders=sorted({folder for module, _ in used if (folder := _folder_of(module))}),
        definitions=_definitions([name for module, name in used if module == "__main__"]) + definitions,
        qcompile=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
    )
    script.with_suffix(".pt").write_bytes(data)
    script.write_text(text, encoding="utf-8")
    return script


def _plain(value: Any, where: str) -> Any:
    """An option as literals: operands as text, rules as dictionaries. Raises ``ValueError`` for what has none."""
    match value:
        case Operand():
            return str(value)
        case Rule():
            defaults = {f.name: f.default for f in dataclasses.fields(Rule)}
            return {name: _plain(v, where) for name, v in vars(value).items() if v != defaults[name]}
        case Mapping():
            return {key: _plain(item, where) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            plain = [_plain(item, where) for item in value]
            return tuple(plain) if isinstance(value, tuple) else plain
    try:
        if ast.literal_eval(repr(value)) == value:
            return value
    except (ValueError, SyntaxError):
        pass
    msg = f"{where}: {reprlib.repr(value)} cannot be written into a script"
    raise ValueError(msg)


# --- the model and what its pickle needs ----------------------------------------------------------------------------


def _pickled(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    try:
        torch.save(content, buffer)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        msg = f"save_repro: the model or its inputs cannot be pickled: {reason}"
        raise ValueError(msg) from None
    return buffer.getvalue()


def _globals_of(data: bytes) -> Iterator[tuple[str, str]]:
    """(module, name) of every class and function that unpickling looks up."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    (member,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
    for opcode, argument, _ in pickletools.genops(archive.read(member)):
        if opcode.name == "GLOBAL":  # torch pickles by protocol 2, which has no other look-up
            module, _, name = str(argument).partition(" ")
            yield module, name.partition(".")[0]


def _folder_of(module: str) -> str:
    """The folder that a module is imported from; "" for installed, built-in and ``__main__``'s own."""
    top = sys.modules.get(module.partition(".")[0])
    file = getattr(top, "__file__", None)
    if module == "__main__" or file is None:
        return ""
    folder = Path(file).resolve().parent
    folder = folder.parent if hasattr(top, "__path__") else folder
    installed = {Path(place).resolve() for place in sysconfig.get_paths().values()}
    return "" if installed & {folder, *folder.parents} else str(folder)


# --- the recipe and what users define of it -------------------------------------------------------------------------


def _recipe_source(recipe: Recipe) -> str:
    """An expression for the recipe."""
    if recipe is FP4 or recipe is QUEST:
        return f"qcompile.RECIPES[{recipe.name!r}]"
    default = Recipe(recipe.name)
    arguments = [repr(recipe.name)]
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        if field.name not in ("name", "monitor") and value != getattr(default, field.name):
            arguments.append(f"{field.name}={_plain(value, f'recipe {recipe.name!r}: {field.name}')!r}")
    return f"qcompile.Recipe({', '.join(arguments)})"


def _user_definitions(text: str) -> tuple[str, set[tuple[str, str]]]:
    """Statements that make the users' definitions that ``text`` names, and (module, name) of the functions they need.

    A definition is made from its data and named functions. One of a lambda is made by importing the lambda's module.
    """
    imports: set[str] = set()
    statements: list[str] = []
    used: set[tuple[str, str]] = set()
    names = named_definitions(text)
    paired = [grid for name in names if name in FORMATS for grid in FORMATS[name].grids]
    for name in dict.fromkeys([*named_definitions(" ".join(paired)), *names]):  # grids before their pairs
        definition = next(table[name] for table in (FORMATS, SCALE_RULES, ESTIMATORS) if name in table)
        kind = type(definition).__name__
        where = f"save_repro: {kind} {short_name(name)!r}"
        arguments, by_import = [repr(short_name(name))], False
        for field in dataclasses.fields(definition):
            value = getattr(definition, field.name)
            if field.name == "name" or value in (None, {}, field.default):
                continue
            if not callable(value):
                arguments.append(f"{field.name}={_plain(value, f'{where}: {field.name}')!r}")
                continue
            module, function = value.__module__, getattr(value, "__qualname__", "<object>")
            by_import |= function == "<lambda>" and module != "__main__"
            if not function.isidentifier() and not by_import:
                msg = (
                    f"{where}: {field.name} is {function} of {module}, which a script cannot import; write it with def"
                )
                raise ValueError(msg)
            used.add((module, function))
            imports |= {module} - {"__main__"}
            arguments.append(f"{field.name}={function if module == '__main__' else f'{module}.{function}'}")
        if not by_import:
            statements.append(f"qcompile.{kind}({', '.join(arguments)})")
    return "\n".join([*(f"import {module}" for module in sorted(imports)), *statements, ""]), used


# --- code of __main__ -----------------------------------------------------------------------------------------------


def _definitions(names: list[str]) -> str:
    """Source of what is defined in ``__main__``, and of all that it uses, in an order that runs."""
    written: dict[str, str] = {}
    main = vars(sys.modules["__main__"])
    for name in names:
        _write(name, main, written, "the model")
    return "\n\n".join(["", *written.values(), ""]) if written else ""


def _write(name: str, main: Mapping[str, Any], written: dict[str, str], user: str, open_: tuple[str, ...] = ()) -> None:
    """``open_``: names whose definitions wait for this one; what calls itself needs no second."""
    if name in written or name in open_ or name not in main:
        return  # a name that is not there is a builtin
    value = main[name]
    text = _source(name, value, user)
    if isinstance(value, type | types.FunctionType) and value.__module__ == "__main__":
        for other in sorted(_global_names(text)):
            _write(other, main, written, name, (*open_, name))
    written[name] = text


def _global_names(source: str) -> set[str]:
    """Names that code looks up in its module."""
    names: set[str] = set()
    scopes = [symtable.symtable(source, "__main__", "exec")]
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        names |= {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global()}
    return names


def _source(name: str, value: Any, user: str) -> str:
    """A statement that defines ``name``. Raises ``ValueError`` if there is none."""
    if isinstance(value, types.ModuleType):
        return f"import {value.__name__} as {name}"
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        if value.__module__ != "__main__":
            return f"from {value.__module__} import {value.__qualname__} as {name}"
        try:
            return textwrap.dedent(inspect.getsource(value)).rstrip()
        except (OSError, TypeError):
            msg = f"save_repro: {name!r} is defined in __main__, whose source cannot be read; define it in a module"
            raise ValueError(msg) from None
    return f"{name} = {_plain(value, f'save_repro: {name!r} of __main__, which {user} uses')!r}"
