"""Recipes: what to quantize, where, and how. A recipe is data; a backend is a recipe with a name.

``torch.compile(model, backend="qcompile_fp4", options={...})``: every option is a field of :class:`Recipe`, given as
plain data. Operands are given whole, as text, or in part, as a dictionary of the fields to change::

    options={"activation": "e2m1 row absmax even; ste; occ(alpha=0.99,compensate=1)"}      # whole
    options={"activation": {"format": "e1m2"}, "weight": {"scale": "absmax_pow2"}}          # in part
    options={"gradient": "fp8", "skip": ["lm_head", "layers.0"]}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .formats import get_format
from .operand import READ_AGAIN, WIDE_GRADIENTS, Operand, operand_from, override_operand
from .options import names_of, reject_unknown
from .quantizer import Quantizer
from .rules import Rule

__all__ = ["BACKWARD_ROLES", "FOLDED_GRADIENT", "LEFT_WIDE", "Recipe"]

#: ``backward=`` → roles whose products run on 8-bit tensor cores; of ``"auto"``, those that may.
BACKWARD_ROLES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "dgrad_fp8": ("dgrad",),
    "fp8": ("dgrad", "wgrad"),
    "auto": ("dgrad", "wgrad"),
}

#: What dY is quantized to for those products unless ``gradient=`` says otherwise.
FOLDED_GRADIENT = Operand(Quantizer(get_format("e4m3")))

#: Layers that every recipe leaves in high precision by their names: heads, and the adapters of PEFT's methods.
LEFT_WIDE = ("lm_head", "lora_*", "hada_*", "lokr_*", "vera_*")


class OperandField:
    """A field that takes an operand as text too, and holds it parsed; by the protocol of dataclass descriptors."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, recipe: Recipe | None, owner: type) -> Operand | None:
        return None if recipe is None else vars(recipe)[self.name]  # of the class: the default

    def __set__(self, recipe: Recipe, value: Operand | str | None) -> None:
        if isinstance(value, Mapping):
            msg = f"recipe {recipe.name!r}: {self.name}={value!r} changes nothing; give the whole operand as text"
            raise ValueError(msg)
        try:
            vars(recipe)[self.name] = operand_from(None, value, self.name)
        except ValueError as error:
            msg = f"recipe {recipe.name!r}: {self.name}={value!r}: {error}"
            raise ValueError(msg) from None


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers a compiled model produces, and the switches around it.

    A recipe of your own, whose operands may be text: ``Recipe("mine", weight="int4 block32; ste")``. Compile with it by
    ``torch.compile(model, backend=qcompile.backend(recipe))``. Raises ``ValueError`` naming the recipe, the field, its
    value and what would be accepted.

    Attributes:
        name, source: the backend's name, and where the recipe is published.
        widths: what ``bits=`` stands for: an operand for each number of bits (or name) that the recipe knows. The
            option takes one for both operands, or ``{"activation": 8, "weight": 4}``; it is not a field, but sets two.
            Nor is the option ``defaults``: ``False`` drops what the recipe leaves wide by itself (``skip``, ``rules``,
            heads, thin layers), before the other options apply.
        variants: what ``variant=`` stands for: other forms of the recipe, by name, each the options that make it. They
            apply before the options that are given beside it.
        activation, weight: operands of the forward GEMM; the backward GEMMs read the same codes.
        gradient: operand that dY is quantized to in dgrad and wgrad, or ``None`` for high precision. Both products read
            it, whichever of their operands are quantized; a product that cannot (a convolution, unless the scale is one
            per tensor) says so in the report. The gradient of a bias is the sum of the plain dY.
        dgrad_weight, wgrad_activation: what W is quantized to again in dgrad, and X in wgrad, from the originals and
            along the axis that these products contract; ``None``: they read the codes of the forward. A rotation is one
            of dY too, with the same signs. Only where dY is quantized (``gradient``).
        again_from: what these are made from: ``"originals"``, or ``"codes"``, what the forward's codes stand for, so
            that no original has to be kept for it.
        forward: ``"bf16"`` multiplies the originals in the forward, and the backward reads the codes of X and W all the
            same: what a run heals by in its last steps. ``"quantized"``: the forward multiplies what is quantized.
        backward: which backward GEMMs run on 8-bit tensor cores: ``"bf16"`` none, ``"dgrad_fp8"`` dX, ``"fp8"`` dX and
            dW. The scales of the weight (or input) codes are folded into dY, which is then quantized to ``gradient``,
            or to E4M3 with one scale per row; the codes themselves are exact. Where scales cannot be folded (the exact
            residual of outliers, batches, convolutions) dY is what ``gradient`` says: in high precision if that is not
            given. ``"auto"``: those of the two that the card is estimated to run faster so, layer by layer
            (:mod:`qcompile.kernels.matmul.costs`), unless ``gradient`` says what dY is to be; none beside a stored
            weight and a wide activation. As an option, ``"bf16"`` drops a recipe's own ``gradient``, and with it what
            is read again.
        skip: layer-name patterns to leave in high precision; shorthand for rules with ``quantize=False``. As an option,
            adds to the recipe's own.
        rules: further rules, applied in order after ``skip``; added in the same way.
        heads: quantize output heads too: layers whose weight is an embedding's, whose result reaches a cross-entropy or
            is as wide as the vocabulary, or which the model calls its output embeddings.
        min_side: layers whose weight has a side below this (inputs or outputs) stay in high precision: classifiers,
            low-rank adapters, convolutions of few inputs.
        attention: quantize products without a weight too (q·kᵀ, p·v); off as in every published recipe.
        saved_weights: ``"recompute"`` quantizes a weight again in the backward, from the parameter that is resident
            anyway; ``"codes"`` saves its codes (½ byte per element) instead of the work.
        save: what the other activations kept for the backward are stored as: ``"exact"``, ``"8bit"`` (E4M3, one scale
            a row) or ``"4bit"`` (E2M1, one scale per 32 elements). Lossy; off by default.
        enabled: ``False`` leaves every site alone: the result is bit-identical to ``backend="inductor"``.
        fuel: quantize only the first n sites of each graph (bisection), ``None`` for all.
        disable_passes: names of passes to leave out. As an option, adds to the recipe's own.
        enable_passes: names of passes that run only if they are asked for, unless ``disable_passes`` has them. As an
            option, adds to the recipe's own.
        strict: unmatched rules raise instead of warning.
        monitor: ``True``, or a :class:`qcompile.Monitor`, to gather statistics of every operand; numbers do not change.
        debug: verify the graph after every pass.
    """

    name: str
    source: str = ""
    widths: Mapping[Any, Operand | str | None] = field(default_factory=dict, repr=False, compare=False)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    activation: OperandField = OperandField()
    weight: OperandField = OperandField()
    gradient: OperandField = OperandField()
    dgrad_weight: OperandField = OperandField()
    wgrad_activation: OperandField = OperandField()
    again_from: str = "originals"
    forward: str = "quantized"
    backward: str = "bf16"
    skip: tuple[str, ...] = LEFT_WIDE
    rules: tuple[Rule, ...] = ()
    heads: bool = False
    min_side: int = 32
    attention: bool = False
    saved_weights: str = "recompute"
    save: str = "exact"
    enabled: bool = True
    fuel: int | None = None
    disable_passes: tuple[str, ...] = ()
    enable_passes: tuple[str, ...] = ()
    strict: bool = False
    monitor: Any = field(default=False, repr=False, compare=False)
    debug: bool = False
    user_patterns: tuple[str, ...] = field(default=(), repr=False)
    user_rules: tuple[Rule, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            msg = f"recipe {self.name!r}: its name is not text"
            raise ValueError(msg)
        where = f"recipe {self.name!r}"
        for key in ("skip", "disable_passes", "enable_passes", "user_patterns"):
            object.__setattr__(self, key, names_of(key, getattr(self, key), where))
        for key in _ACCEPTED:
            _checked(key, getattr(self, key), where)
        try:
            rules = tuple(Rule.from_data(rule) for rule in self.rules)
            widths = {width: operand_from(None, operand, "widths") for width, operand in self.widths.items()}
        except ValueError as error:
            msg = f"{where}: {error}"
            raise ValueError(msg) from None
        object.__setattr__(self, "rules", rules)
        object.__setattr__(self, "widths", widths)

    @staticmethod
    def option_names() -> list[str]:
        """The options a backend takes, besides Inductor's own."""
        return [
            "bits",
            "defaults",
            "variant",
            *(f.name for f in fields(Recipe) if f.name not in _NO_OPTIONS),
        ]

    def override(self, options: Mapping[str, Any]) -> Recipe:
        """A copy with options applied. Raises ``ValueError`` naming the option, its value and what would be
        accepted.
        """
        reject_unknown("option", options, self.option_names())
        if "variant" in options:
            form = self._variant(options["variant"])
            return self.override(form).override({key: value for key, value in options.items() if key != "variant"})
        changes: dict[str, Any] = self.of_width(options["bits"], "option 'bits'") if "bits" in options else {}
        if not _checked("defaults", options.get("defaults", True)):
            changes |= {"skip": (), "rules": (), "heads": True, "min_side": 0}
        for key, value in options.items():
            if key in ("bits", "defaults"):
                continue
            if key in ("activation", "weight", "gradient"):
                changes[key] = override_operand(changes.get(key, getattr(self, key)), value, key)
            elif key in READ_AGAIN:
                changes[key] = override_operand(getattr(self, key), value, key)
            elif key == "skip":
                changes["user_patterns"] = names_of(key, value)
                changes[key] = tuple(dict.fromkeys((*changes.get(key, self.skip), *changes["user_patterns"])))
            elif key == "rules":
                if not isinstance(value, (list, tuple)):
                    msg = f"option 'rules' takes a list of dictionaries, got {value!r}"
                    raise ValueError(msg)
                try:
                    changes["user_rules"] = tuple(Rule.from_data(rule) for rule in value)
                    changes[key] = (*changes.get(key, self.rules), *changes["user_rules"])
                except ValueError as error:
                    msg = f"option 'rules': {error}"
                    raise ValueError(msg) from None
            elif key in ("disable_passes", "enable_passes"):
                changes[key] = tuple(dict.fromkeys((*getattr(self, key), *names_of(key, value))))
            else:
                changes[key] = _checked(key, value)
        if self.backward == "auto" and "backward" not in changes and changes.get("gradient", "") is None:
            changes["backward"] = "bf16"  # a wide dY was asked for
        if changes.get("backward") == "bf16" and "gradient" not in changes:
            changes["gradient"] = None  # a wide backward was asked for, of a recipe that quantizes dY by itself
        recipe = replace(self, **changes)
        recipe._refuse_wide_gradient(options)
        return recipe

    def _variant(self, name: Any) -> Mapping[str, Any]:
        """The options that a variant stands for. Raises ``ValueError`` for one that the recipe does not have."""
        if name not in self.variants:
            known = ", ".join(self.variants) or "none"
            msg = f"option 'variant': {name!r} is not one of the variants of {self.name}: {known}"
            raise ValueError(msg)
        return self.variants[name]

    def _refuse_wide_gradient(self, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where dY is to be quantized for tensor cores and to stay wide at once. A rule for some
        layers or one of two roles is an exception, not a contradiction.
        """
        folded = BACKWARD_ROLES[self.backward]
        if not folded or self.backward == "auto":
            return
        wide, fix = "", ""
        if "gradient" in options and self.gradient is None:
            wide, fix = f"gradient={options['gradient']!r}", "leave out one of the two"
        for rule in self.rules:
            if rule.gradient in WIDE_GRADIENTS and rule.matches_everything and set(rule.roles) >= set(folded):
                wide = f"gradient={rule.gradient!r} in rule {rule.name!r}"
                fix = "leave out one of the two, or name the layers that the rule is for"
        if wide:
            why = f"backward={self.backward!r} quantizes dY, and {wide} does not"
            msg = f"options 'backward' and 'gradient': {why}; {fix}"
            raise ValueError(msg)

    @property
    def all_rules(self) -> list[Rule]:
        """Skips first, then rules in order: later ones win."""
        return [*(Rule(name=pattern, quantize=False) for pattern in self.skip), *self.rules]

    def operand_under(self, rules: Iterable[Rule], operand: Operand | None, key: str) -> Operand | None:
        """What ``operand``, called ``key``, becomes of a site that falls under ``rules``."""
        for rule in rules:
            if rule.bits is not None:
                operand = self.of_width(rule.bits, f"rule {rule.name!r}: bits").get(key, operand)
            change = getattr(rule, key)
            if change is not None:
                try:
                    operand = override_operand(operand, change, key)
                except ValueError as error:
                    msg = f"rule {rule.name!r}: {error}"
                    raise ValueError(msg) from None
        return operand

    def of_width(self, bits: Any, where: str) -> dict[str, Operand | None]:
        """The operands that ``bits`` stands for, by name.

        Raises ``ValueError``, beginning with ``where``, for a width that the recipe does not know.
        """
        chosen = bits if isinstance(bits, Mapping) else {"activation": bits, "weight": bits}
        reject_unknown(f"operand in {where}", chosen, ("activation", "weight"))
        for width in chosen.values():
            if isinstance(width, bool) or not isinstance(width, (int, float, str)) or width not in self.widths:
                known = ", ".join(map(str, self.widths)) or f"none; {self.name} is not a family of widths"
                msg = f"{where}: {width!r} is not one of the widths of {self.name}: {known}"
                raise ValueError(msg)
        return {name: operand_from(None, self.widths[width], name) for name, width in chosen.items()}


#: Fields that no option of their name sets.
_NO_OPTIONS = ("name", "source", "widths", "variants", "user_patterns", "user_rules")

_SWITCH = ("True or False", lambda value: isinstance(value, bool))

#: Field → what it takes, and the test.
_ACCEPTED: dict[str, tuple[str, Any]] = {
    "backward": (f"one of {', '.join(BACKWARD_ROLES)}", lambda v: isinstance(v, str) and v in BACKWARD_ROLES),
    "again_from": ("one of originals, codes", lambda v: v in ("originals", "codes")),
    "forward": ("one of quantized, bf16", lambda v: v in ("quantized", "bf16")),
    "monitor": ("True, False or a qcompile.Monitor", lambda v: isinstance(v, bool) or hasattr(v, "attach")),
    "min_side": ("an integer ≥ 0", lambda v: type(v) is int and v >= 0),
    "fuel": ("an integer ≥ 0 or None", lambda v: v is None or (type(v) is int and v >= 0)),
    "saved_weights": ("one of recompute, codes", lambda v: v in ("recompute", "codes")),
    "save": ("one of exact, 8bit, 4bit", lambda v: v in ("exact", "8bit", "4bit")),
    **dict.fromkeys(("heads", "attention", "enabled", "strict", "debug"), _SWITCH),
}


def _checked(key: str, value: Any, where: str = "") -> Any:
    accepted, test = _ACCEPTED.get(key, _SWITCH)
    if not test(value):
        msg = f"{where}: {key}={value!r} is not {accepted}" if where else f"option {key!r}: {value!r} is not {accepted}"
        raise ValueError(msg)
    return value
