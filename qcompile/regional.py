"""Blocks that are compiled one by one (regional compilation), which rules about a model's last blocks do not reach.

A graph is of one block then, and its layers have no place among the blocks of a model: equal blocks run one compiled
function. So such a rule applies to none of them. It is no mistake where the last blocks are compiled otherwise or not
at all, which is what the warning asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from qcompile.passes.record import Plan

from . import compat
from .ir.recipe import Recipe
from .ir.rules import Block, Rule, block_of, blocks_in, describe

__all__ = ["out_of_reach", "remarks"]


def out_of_reach(recipe: Recipe, plan: Plan, call: compat.CompiledCall | None) -> Iterator[tuple[str, str, bool]]:
    """Rules that do not reach the last blocks of the model that called what was compiled, as it compiles these with the
    same backend: described, with what to say of it, and whether that has not been said of this model yet.
    """
    if call is None:
        return
    for rule in _without_place(recipe, [plan]):
        for model in call.callers:
            if found := _alike(model, rule, call):
                said = _said.setdefault(model, set())
                yield describe(rule), found, found not in said
                said.add(found)
                break


def remarks(recipe: Recipe, plans: list[Plan], model: Any) -> list[str]:
    """What a report on ``model``, which is compiled as a whole for it, has to say of such rules."""
    found = [
        f"{describe(rule)} applies to nothing: no layer here is in a list of blocks; a block that is compiled by "
        "itself has no place in its model"
        for rule in _without_place(recipe, plans)
        if not any(rule.may_match(*place) for plan in plans for d in plan.decisions for place in d.site.places)
    ]
    for rule in filter(_about_last_blocks, recipe.all_rules):
        if isinstance(model, nn.Module) and (message := _alike(model, rule)):
            found.append(f"this report is of the model as a whole. As it is compiled now, {message}")
    return found


#: What has been said of a model.
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _about_last_blocks(rule: Rule) -> bool:
    return rule.last_blocks > 0


def _without_place(recipe: Recipe, plans: Iterable[Plan]) -> Iterator[Rule]:
    """Rules about the last blocks that a quantized product without a place among blocks might fall under."""
    sites = [decision.site for plan in plans for decision in plan.quantized]
    for rule in filter(_about_last_blocks, recipe.all_rules):
        anywhere = replace(rule, last_blocks=0.0)
        if any(place[-1] is None and anywhere.matches(*place) for site in sites for place in site.places):
            yield rule


def _alike(model: nn.Module, rule: Rule, call: compat.CompiledCall | None = None) -> str:
    """What to say of a list in ``model`` whose last blocks, by ``rule``, are compiled by themselves as an earlier one
    is; "" if there is none. With ``call``: a list that what was compiled is in, and as that was compiled.
    """
    for name, blocks in _lists_of_blocks(model):
        last = rule.last_of(len(blocks))
        early, late = blocks[: len(blocks) - last], blocks[len(blocks) - last :]
        if call is None:
            backends = [backend for block in early for backend in compat.backends_below(block)]
        else:
            inside = any(call.target is inner for block in blocks for inner in block.modules())
            backends = [compat.backend_of(call.context)] if inside else []
        if any(backend in backends for block in late for backend in compat.backends_below(block)):
            these = 'with backend="inductor"' if rule.quantize is False else "with options of their own"
            return (
                f"{describe(rule)} does not reach the last {last} of the {len(blocks)} blocks in {name!r}: blocks that "
                f"are compiled one by one have no place in their model; compile the whole model, or the last {last} "
                f"{these}"
            )
    return ""


def _lists_of_blocks(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """The outermost lists of more than one module, by name, with their entries."""
    known: dict[str, Block] = {}
    for name, module in model.named_modules():
        if block_of(name, known) is None and (found := blocks_in(module, name)):
            known |= found
            yield name, [model.get_submodule(entry) for entry in found]
