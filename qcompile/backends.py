"""The ``torch.compile`` backends: options → recipe → graph rewriting → Inductor.

One function a recipe (``pyproject.toml`` names them in the entry-point group ``torch_dynamo_backends``), all of them
:func:`compile_with`. Everything after the rewriting is Inductor's ``compile_fx`` with our passes in its hooks, which is
how both caches, CUDA graphs, ``max-autotune``, inference and dynamic shapes come along.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

import qcompile.kernels  # noqa: F401  (registers the qcompile:: ops)
from qcompile.kernels.choices import quantize_choices
from qcompile.kernels.lowerings import register_lowerings
from qcompile.passes.pass_base import Observations, log
from qcompile.passes.pipeline import PASS_NAMES, PASSES_BY_REQUEST, hooks, rewrite

from . import compat
from .ir.recipe import Recipe
from .recipes import RECIPES
from .session import session_of

__all__ = [
    "backend",
    "check_passes",
    "compile_with",
    "plain_model",
    "qcompile_fp4",
    "qcompile_if4",
    "qcompile_llm_int8",
    "qcompile_mxfp4",
    "qcompile_mxfp8",
    "qcompile_nvfp4",
    "qcompile_quartet2",
    "qcompile_quest",
    "qcompile_stored",
    "qcompile_tetrajet2",
    "qcompile_uniform4",
    "recipe_of",
    "register",
    "split_options",
]

Compiled = Callable[..., Any]


def qcompile_fp4(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_fp4")``: :mod:`qcompile.recipes.fp4`."""
    return compile_with(RECIPES["qcompile_fp4"], gm, example_inputs, **kwargs)


def qcompile_llm_int8(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_llm_int8")``: :mod:`qcompile.recipes.llm_int8`."""
    return compile_with(RECIPES["qcompile_llm_int8"], gm, example_inputs, **kwargs)


def qcompile_quest(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_quest", options={"bits": 4})``: :mod:`qcompile.recipes.quest`."""
    return compile_with(RECIPES["qcompile_quest"], gm, example_inputs, **kwargs)


def qcompile_stored(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_stored")`` after ``qcompile.pack_(model, "nf4 block64")``:
    :mod:`qcompile.recipes.stored`.
    """
    return compile_with(RECIPES["qcompile_stored"], gm, example_inputs, **kwargs)


def qcompile_if4(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_if4")``: :mod:`qcompile.recipes.if4`."""
    return compile_with(RECIPES["qcompile_if4"], gm, example_inputs, **kwargs)


def qcompile_mxfp4(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_mxfp4")``: :mod:`qcompile.recipes.mxfp4`."""
    return compile_with(RECIPES["qcompile_mxfp4"], gm, example_inputs, **kwargs)


def qcompile_mxfp8(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_mxfp8")``: :mod:`qcompile.recipes.mxfp8`."""
    return compile_with(RECIPES["qcompile_mxfp8"], gm, example_inputs, **kwargs)


def qcompile_nvfp4(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_nvfp4")``: :mod:`qcompile.recipes.nvfp4`."""
    return compile_with(RECIPES["qcompile_nvfp4"], gm, example_inputs, **kwargs)


def qcompile_quartet2(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_quartet2")``: :mod:`qcompile.recipes.quartet2`."""
    return compile_with(RECIPES["qcompile_quartet2"], gm, example_inputs, **kwargs)


def qcompile_tetrajet2(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_tetrajet2")``: :mod:`qcompile.recipes.tetrajet2`."""
    return compile_with(RECIPES["qcompile_tetrajet2"], gm, example_inputs, **kwargs)


def qcompile_uniform4(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
    """``torch.compile(model, backend="qcompile_uniform4")``: :mod:`qcompile.recipes.uniform4`."""
    return compile_with(RECIPES["qcompile_uniform4"], gm, example_inputs, **kwargs)


def backend(recipe: Recipe) -> Compiled:
    """The backend of a recipe: ``torch.compile(model, backend=qcompile.backend(recipe), options={…})``.

    ``options`` override fields of the recipe, as they do those of ``"qcompile_fp4"``. Two calls give two backends that
    share no compiled code within a process. Raises ``TypeError`` for what is no :class:`Recipe`, ``ValueError`` for a
    pass in ``disable_passes`` that does not exist.
    """
    if not isinstance(recipe, Recipe):
        msg = f"backend: takes a qcompile.Recipe, got {type(recipe).__name__}; for a name, write backend={recipe!r}"
        raise TypeError(msg)
    check_passes(recipe)

    def compile_graph(gm: GraphModule, example_inputs: list[Tensor], **kwargs: Any) -> Compiled:
        return compile_with(recipe, gm, example_inputs, **kwargs)

    compile_graph.__name__ = recipe.name
    return compile_graph


def register(recipe: Recipe) -> str:
    """Make the recipe's name one that ``torch.compile(model, backend=name)``, ``explain`` and ``save_repro`` take.

    Returns the name. Registering another recipe of the same name replaces it for later compilations. Raises
    ``ValueError`` for the name of a backend that is not a recipe registered so, and whatever :func:`backend` raises.
    """
    function = backend(recipe)
    if recipe.name not in _REGISTERED and recipe.name in torch.compiler.list_backends(exclude_tags=()):
        msg = f"register: there is a backend {recipe.name!r} already; give the recipe another name"
        raise ValueError(msg)
    compat.register_backend(recipe.name, function)
    _REGISTERED.add(recipe.name)
    RECIPES[recipe.name] = recipe
    return recipe.name


#: Names of recipes that users have registered.
_REGISTERED: set[str] = set()


def recipe_of(backend: str | Recipe) -> Recipe:
    """The recipe that ``backend=`` of `explain` and `save_repro` stands for. Raises ``ValueError`` for an unknown
    name.
    """
    if isinstance(backend, Recipe):
        return backend
    if not isinstance(backend, str):
        msg = f"backend= takes a qcompile.Recipe or its name, got {type(backend).__name__}"
        raise ValueError(msg)
    if backend not in RECIPES:
        msg = f"unknown backend {backend!r}; known: {', '.join(RECIPES)}"
        raise ValueError(msg)
    return RECIPES[backend]


def compile_with(
    recipe: Recipe,
    gm: GraphModule,
    example_inputs: list[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    observe: Observations | None = None,
    inner_compile: Callable[..., Any] | None = None,
) -> Compiled:
    """Compile one Dynamo sub-graph.

    Args:
        recipe: the backend's recipe, before ``options``.
        mode: any of ``torch.compile``'s modes; torch passes it on, but refuses it beside ``options``. Beside options
            write ``options["mode"]``.
        options: fields of :class:`Recipe` and Inductor's own options, mixed.
        observe: where to record programs, products and saved tensors (`explain`).
        inner_compile: replaces Inductor's code generation, e.g. by :func:`compat.eager_inner_compile`.

    Raises ``ValueError`` for an unknown or contradictory option of ours, ``RuntimeError`` for one of Inductor's. They
    reach the user wrapped in ``BackendCompilerFailed``.
    """
    compat.warn_if_untried(str(torch.__version__))
    ours, inductor = split_options(mode, options)
    recipe = recipe.override(ours)
    check_passes(recipe)
    patches = dict(inductor)
    watched: list[tuple[str, str, str]] = []
    if not compat.in_compiled_autograd():
        call = compat.compiled_call()
        context = rewrite(gm, recipe, observe, call)
        session = session_of(call, recipe)
        session.add(context.plan)
        session.see(gm, call)
        session.remark(context.plan, call)
        log.info("%s", context.plan.summary(recipe.name))
        watched = context.watched
        if context.plan.quantized or observe is not None:
            register_lowerings()
            patches.update(hooks(context, patches))
    if inner_compile is None and compat.given_fake_tensors(example_inputs):
        inner_compile = compat.eager_inner_compile  # there is no data that generated code could read
    if any(isinstance(x, Tensor) and x.is_meta for x in example_inputs):
        # On the meta device Inductor folds everything, in the wrong order; and in torch 2.11 meta kernels disagree with
        # its fake tensors on strides, on which nothing depends there.
        patches |= {"joint_graph_constant_folding": False, "size_asserts": False}
    compiled: Any
    if inner_compile is not None:
        patches["fx_graph_cache"] = False
        compiled = compat.compile_fx(gm, example_inputs, inner_compile=inner_compile, config_patches=patches)
    else:
        with quantize_choices():
            compiled = compat.compile_fx(gm, example_inputs, config_patches=patches)
    if watched:
        from .numerics import monitor  # brings the report's libraries along

        compiled = (monitor() if recipe.monitor is True else recipe.monitor).attach(watched, compiled)
    return compiled


def plain_model(model: Any, caller: str) -> Any:
    """``model`` as it was before ``torch.compile``.

    Raises ``ValueError`` for a class, which ``torch.compile`` would change for the whole process, and for what cannot
    be called.
    """
    if isinstance(model, type):
        msg = f"{caller}: takes a model, got the class {model.__name__}; make an instance: {model.__name__}(...)"
        raise ValueError(msg)
    if not callable(model):
        msg = f"{caller}: takes a module or function, got {type(model).__name__}"
        raise ValueError(msg)
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def with_options(recipe: Recipe, options: Mapping[str, Any] | None) -> Recipe:
    """A recipe with those of a call's ``options`` that are ours. Raises ``ValueError`` as compiling with them would."""
    changed = recipe.override(split_options(None, options)[0])
    check_passes(changed)
    return changed


def check_passes(recipe: Recipe) -> None:
    """Raises ``ValueError`` for a pass to disable that does not exist, or one to enable that needs no request."""
    for option, known in (("disable_passes", PASS_NAMES), ("enable_passes", PASSES_BY_REQUEST)):
        for name in getattr(recipe, option):
            if name not in known:
                what = "there is no pass" if name not in PASS_NAMES else "runs unless it is disabled:"
                msg = f"option {option!r}: {what} {name!r}; passes: {', '.join(known)}"
                raise ValueError(msg)


def _raise_unknown(key: str, names: list[str]) -> None:
    """Say which name of ours, of Inductor's or of ``torch.compile``'s arguments the user may have meant."""
    if key in inspect.signature(torch.compile).parameters:
        hint = f"; it is an argument of torch.compile: torch.compile(model, backend=…, {key}=…)"
    elif key.lower().replace("-", "_") in names:
        hint = f"; did you mean {key.lower().replace('-', '_')!r}?"
    else:
        close = difflib.get_close_matches(key, [*names, *compat.inductor_option_names()], 1)
        hint = f"; did you mean {close[0]!r}?" if close else "."
    msg = f"unknown option {key!r}{hint} Known: {', '.join(names)}, and Inductor's"
    raise ValueError(msg)


def split_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part ``options`` into recipe fields and Inductor's, the latter checked and with ``mode`` expanded.

    A name that neither side knows raises ``ValueError`` with the closest of ours.
    """
    if not isinstance(options, Mapping | None):
        msg = f"options takes a dictionary, got {options!r}"
        raise ValueError(msg)
    given = dict(options or {})
    for key in given:
        if not isinstance(key, str):
            msg = f"options: the name of an option is text, got {key!r}"
            raise ValueError(msg)
    mode = given.pop("mode", mode)
    names = Recipe.option_names()
    ours = {key: given.pop(key) for key in list(given) if key in names}
    unknown = [key for key in given if not compat.is_inductor_option(key)]
    if unknown:
        _raise_unknown(unknown[0], names)
    inductor = compat.inductor_options(mode, None)
    inductor.update(compat.inductor_options(None, given))
    return ours, inductor
