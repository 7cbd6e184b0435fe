"""Decide what happens to every site: quantized how, or left alone and why. Numbers are changed by `insert`, never here.

The plan is the single record of these decisions. Reports, tests and the later passes read it; a node carries only the
index of its site, in ``node.meta["custom"]``, which AOTAutograd hands on to the forward and backward nodes it traces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from torch.fx import Node

from qcompile.ir.definitions import short_names
from qcompile.ir.operand import READ_AGAIN, Operand
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.recipe import BACKWARD_ROLES, FOLDED_GRADIENT, Recipe
from qcompile.ir.rules import Rule, describe
from qcompile.ir.transforms import Transform

from .gradient_axes import axes_of_operand, role_of_slot, why_gradient_stays_wide, why_not_read_again
from .graph import decided_size, static_size
from .origins import written_by
from .record import Decision, Plan, Site, without_name
from .spellings import Slot
from .subclasses import shard_note

__all__ = ["make_plan", "transform_at"]


def make_plan(sites: Iterable[Site], recipe: Recipe) -> Plan:
    """One decision per site. Skips come first, then rules in order (later ones win), then fuel.

    A weight that is stored as codes is what it is: of its products the recipe decides the activation and the gradients.
    """
    matched: Counter[str] = Counter({describe(rule): 0 for rule in user_rules(recipe)})
    decisions = []
    fuel = recipe.fuel
    for site in sites:
        decision = _decide(site, recipe, matched)
        if not decision.quantized and recipe.enabled and not site.obstacle and any(slot.stored for slot in site.slots):
            why = f"{_stored_note(site)}; all else in high precision: {decision.reason}"
            decision = Decision(site, True, why, (None,) * len(site.slots))
        if decision.quantized and fuel is not None:
            fuel -= 1
            if fuel < 0:
                decision = Decision(site, False, f"out of fuel (fuel={recipe.fuel})")
        decisions.append(decision)
    return Plan(decisions, matched)


def user_rules(recipe: Recipe) -> list[Rule]:
    """The rules a user wrote, which are expected to match something; the recipe's own, and its skips, are not."""
    return [*(Rule(name=pattern, quantize=False) for pattern in recipe.user_patterns), *recipe.user_rules]


def _decide(site: Site, recipe: Recipe, matched: Counter[str]) -> Decision:
    rules = recipe.all_rules
    applicable = [rule for rule in rules if any(rule.matches(*place) for place in site.places)]
    for rule in rules:
        if (text := describe(rule)) in matched:
            matched[text] += any(rule.may_match(*place) for place in site.places)
    if site.obstacle:
        return Decision(site, False, site.obstacle)
    if not recipe.enabled:
        return Decision(site, False, "quantization is off (enabled=False)")
    if "insert" in recipe.disable_passes:
        return Decision(site, False, "the pass insert is disabled")
    verdict = next((r for r in reversed(applicable) if r.quantize is not None), None)
    if verdict is not None and not verdict.quantize:
        return Decision(site, False, describe(verdict))
    if verdict is None and (reason := _left_wide(site, recipe)):
        return Decision(site, False, reason)
    if site.missing and any(rule.reads_names for rule in rules):
        return Decision(site, False, without_name(site.missing))
    if decided_size(site.contraction) is None:
        return Decision(site, False, "the contraction size is marked dynamic or depends on data; mark it static")
    chosen = {key: recipe.operand_under(applicable, getattr(recipe, key), key) for key in ("activation", "weight")}
    operands = tuple(None if slot.stored else chosen[slot.kind] for slot in site.slots)
    wide_forward = recipe.forward == "bf16" and any(operands)
    if wide_forward and (why := _why_no_wide_forward(site, recipe)):
        return Decision(site, False, f"forward='bf16': {why}")
    if misfit := _misfit(site, operands):
        return Decision(site, False, misfit)
    by_cost = recipe.backward == "auto"
    decision = Decision(site, True, "", operands, folded=BACKWARD_ROLES[recipe.backward], by_cost=by_cost)
    decision.wide_forward = wide_forward
    notes = [
        "the forward multiplies the originals" if wide_forward else "",
        _stored_note(site),
        *(slot.note for slot in site.slots if slot.note),
    ]
    notes += _decide_gradients(decision, recipe, applicable)
    if not any(operands) and not decision.rounded:
        reasons = ["the recipe quantizes none of its operands", *dict.fromkeys(filter(None, notes[2:]))]
        return Decision(site, False, "; ".join(reasons))
    for note in (_rotation_note, shard_note):
        notes += [note(slot, operand, site.node) for slot, operand in zip(site.slots, operands, strict=True)]
    decision.reason = "; ".join(dict.fromkeys(filter(None, notes)))
    return decision


def _why_no_wide_forward(site: Site, recipe: Recipe) -> str:
    """Why the codes of a site cannot be left to its backward alone; "" if they can."""
    if not site.training:
        return "no gradient is computed"
    if any(written_by(site.node)):
        return "the product is written in place"
    return "the pass quantize_gradients is disabled" if "quantize_gradients" in recipe.disable_passes else ""


def _stored_note(site: Site) -> str:
    """How its weight is stored; "" if it is wide."""
    return "; ".join(f"{slot.kind} stored as {short_names(slot.stored)}" for slot in site.slots if slot.stored)


def _decide_gradients(decision: Decision, recipe: Recipe, applicable: list[Rule]) -> list[str]:
    """Fill in ``gradients`` and ``rounded``; returns what is to be said about it."""
    site, notes = decision.site, []
    computed = {role_of_slot(site, position) for position in range(len(site.slots))}
    for role in ("dgrad", "wgrad"):
        default = FOLDED_GRADIENT if role in decision.folded and recipe.gradient is None else None
        rules = [r for r in applicable if role in r.roles]
        gradient = recipe.operand_under(rules, recipe.gradient or default, "gradient")
        decision.gradients[role] = gradient
        if decision.by_cost and gradient is not default:  # as it is asked for, on every card
            decision.folded = tuple(folded for folded in decision.folded if folded != role)
        if gradient is None:
            continue
        if role in decision.folded:
            _check_folded(site, gradient.quantizer)
        if gradient is default or role not in computed or not site.training:
            continue
        if "quantize_gradients" in recipe.disable_passes:
            why = "the pass quantize_gradients is disabled"
        else:
            why = why_gradient_stays_wide(site, gradient)
        if why:
            notes.append(f"gradient= is not applied: {why}")
        else:
            decision.rounded += (role,)
    if site.training:
        notes += _decide_read_again(decision, recipe, computed)
    if site.anonymous and not set(decision.rounded) >= computed:
        notes.append(f"inside {site.anonymous}: its gradients stay in high precision")
    return notes


def _decide_read_again(decision: Decision, recipe: Recipe, computed: set[str]) -> list[str]:
    """Fill in ``read_again``; returns what is to be said about it."""
    notes = []
    for key, role in READ_AGAIN.items():
        operand = getattr(recipe, key)
        if operand is None or role not in computed:
            continue
        rounded = role in decision.rounded
        why = why_not_read_again(decision.site, role) if rounded else "dY stays in high precision"
        if not why and operand.transform.signs == "drawn" and decision.site.anonymous:
            why = f"{decision.site.anonymous} would draw its signs in the forward and again in the backward"
        if why:
            notes.append(f"{key}= is not applied: {why}")
            continue
        decision.read_again[role] = operand
        decision.from_codes = recipe.again_from == "codes"
        transform = _transform_again(decision.site, role, operand)
        rotation = f", and with dY in {transform}" if transform else ", not rotated" if operand.transform else ""
        source = " from its codes" if decision.from_codes else ""
        text = short_names(str(operand.quantizer))
        notes.append(f"{role} reads {key.partition('_')[2]} again{source} as {text}{rotation}")
    return notes


def _transform_again(site: Site, role: str, operand: Operand) -> Transform:
    """:func:`transform_at` of an operand that the product of a role reads again, along all axes that it contracts."""
    position = next(i for i in range(2) if role_of_slot(site, 1 - i) == role)
    axes = axes_of_operand(site, position)
    assert axes is not None  # why_not_read_again
    shape = site.slots[position].of(site.node).meta["example_value"].shape
    size = static_size(math.prod(shape[axis] for axis in axes[1]))
    return operand.transform if size is None else operand.transform.on(size)


def _left_wide(site: Site, recipe: Recipe) -> str:
    """Why a site is left alone that no rule speaks of; "" if it is not."""
    if site.reservation:
        return f"{site.reservation}; a rule with quantize=True quantizes it"
    if site.head and not recipe.heads:
        return f"{site.head}; heads=True quantizes these"
    if site.sides is None:
        alike = "no weight operand (attention-like product); attention=True quantizes these"
        return "" if recipe.attention else alike
    thin = min(site.sides)
    return f"a side of its weight is {thin}, below min_side={recipe.min_side}" if thin < recipe.min_side else ""


def transform_at(slot: Slot, operand: Operand, node: Node) -> Transform:
    """The transform of an operand as its axis admits it; as the recipe has it where the extent is not known yet."""
    size = static_size(slot.size(node))
    return operand.transform if size is None else operand.transform.on(size)


def _rotation_note(slot: Slot, operand: Operand | None, node: Node) -> str:
    """What is left of a rotation whose size does not divide the axis; "" if it does."""
    if operand is None or (transform := transform_at(slot, operand, node)) == operand.transform:
        return ""
    rotation = f"hadamard({transform.rotation})" if transform.rotation > 1 else "no rotation"
    return f"{rotation}, since K = {slot.size(node)}"


def _misfit(site: Site, operands: tuple[Operand | None, ...]) -> str:
    """Why the granularity of an operand does not fit its shape; "" if it does."""
    for slot, operand, shape in zip(site.slots, operands, site.shape, strict=False):
        rank = slot.frame.flatten + 1 if slot.frame and slot.frame.flatten is not None else len(shape)
        if operand is not None and operand.quantizer.granularity.kind == "square" and rank < 2:
            return f"granularity {operand.quantizer.granularity} needs a matrix, but the {slot.kind} is one row"
    return ""


def _check_folded(site: Site, quantizer: Quantizer) -> None:
    """Raises ``ValueError`` if dY, times the scales of the other operand, cannot be quantized so."""
    rows = quantizer.granularity.kind in ("row", "tensor") and quantizer.scale.storage == "float32"
    if not (rows and quantizer.format.tensor_core_type in ("e4m3", "e5m2")):
        msg = (
            f"layer {site.name!r}: option 'backward' needs a gradient exact in 8-bit floating point, with one float32 "
            f"scale per row or tensor, for example 'e4m3 row'; got '{quantizer}'"
        )
        raise ValueError(msg)
