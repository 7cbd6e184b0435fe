"""Recipes: what to quantize, where, and how. A recipe is data; a backend is a recipe with a name.

``torch.compile(model, backend="qcompile_fp4", options={...})``: every option is a field of :class:`Recipe`, given as
plain data. Operands are given whole, as text, or in part, as a dictionary of the fields to change::

    options={"activation": "e2m1 row absmax even; ste; occ(alpha=0.99,compensate=1)"}      # whole
    options={"activation": {"format": "e1m2"}, "weight": {"scale": "absmax_pow2"}}          # in part
    options={"gradient": "fp8", "skip": ["lm_head", "layers.0"]}
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from .estimators import Estimator
from .formats import get_format
from .quantizer import SCALE_RULES, Granularity, Quantizer
from .transforms import Transform

__all__ = ["Operand", "OutlierClamp", "Recipe", "Rule"]

STE = Estimator("ste")
NO_TRANSFORM = Transform()


@dataclass(frozen=True)
class OutlierClamp:
    """Outlier clamping and compensation (OCC), arXiv 2501.17116 §3.2.

    ``x = clamped + residual``, exactly for 16-bit x and to one rounding for float32, with ``clamped`` inside the
    (1 − α, α) quantiles. ``per="row"`` takes the quantiles of each token (the released code), ``per="tensor"`` those of
    the whole tensor. Without ``compensate`` the residual is dropped (the released wiring).

    ``residual="exact"`` keeps the residual apart, in high precision. ``residual="e4m3"`` adds it to the code of the
    clamped element, rounded to E4M3 (relative error ≤ 2⁻⁴; the levels in between stay what they are): one product
    on 8-bit tensor cores then serves both. It saturates at 448/max times the clamped row's absolute maximum.
    """

    alpha: float = 0.99
    per: str = "row"
    compensate: bool = True
    residual: str = "exact"

    def __post_init__(self) -> None:
        if not 0.5 < self.alpha <= 0.999999:
            msg = f"occ: alpha must lie in (0.5, 0.999999], got {self.alpha}"
            raise ValueError(msg)
        if self.per not in ("row", "tensor"):
            msg = f"occ: per must be 'row' or 'tensor', got {self.per!r}"
            raise ValueError(msg)
        if self.residual not in ("exact", "e4m3"):
            msg = f"occ: residual must be 'exact' or 'e4m3', got {self.residual!r}"
            raise ValueError(msg)
        if self.residual == "e4m3" and not (self.compensate and self.per == "row"):
            msg = "occ: residual=e4m3 goes with compensate=1 and per=row"
            raise ValueError(msg)

    def __str__(self) -> str:
        residual = f",residual={self.residual}" if self.residual != "exact" else ""
        return f"occ(alpha={self.alpha!r},per={self.per},compensate={int(self.compensate)}{residual})"

    @staticmethod
    def parse(text: str) -> OutlierClamp:
        match = re.fullmatch(r"occ(?:\(([^()]*)\))?", text.replace(" ", ""))
        if match is None:
            msg = f"outlier clamp {text!r} is not 'occ(alpha=0.99,per=row,compensate=1)'"
            raise ValueError(msg)
        parts = [part.partition("=") for part in filter(None, (match[1] or "").split(","))]
        values = {key: value for key, _, value in parts}
        _reject_unknown("occ", values, ("alpha", "per", "compensate", "residual"))
        try:
            if len(values) < len(parts):
                msg = "a parameter is given twice"
                raise ValueError(msg)
            if not _is_number(values.get("alpha", "0.99")):
                msg = f"alpha={values['alpha']!r} is not a number"
                raise ValueError(msg)
            if values.get("compensate", "1") not in ("0", "1"):
                msg = f"compensate must be 0 or 1, got {values['compensate']!r}"
                raise ValueError(msg)
            return OutlierClamp(
                alpha=float(values.get("alpha", 0.99)),
                per=values.get("per", "row"),
                compensate=values.get("compensate", "1") == "1",
                residual=values.get("residual", "exact"),
            )
        except ValueError as error:
            msg = f"outlier clamp {text!r}: {error}"
            raise ValueError(msg) from None


@dataclass(frozen=True)
class Operand:
    """How one operand of a GEMM is quantized: transforms (optional) → quantizer → estimator for the way back."""

    quantizer: Quantizer
    estimator: Estimator = STE
    outliers: OutlierClamp | None = None
    transform: Transform = NO_TRANSFORM

    def __post_init__(self) -> None:
        if self.transform:
            self._check_transform()
        if self.outliers and self.estimator.kind.slope:
            msg = f"occ(...) clamps the input that {self.estimator.name} takes its slope from; use ste, clip or trust"
            raise ValueError(msg)
        if self.outliers and self.outliers.residual == "e4m3":
            self._check_e4m3_residual()

    def _check_e4m3_residual(self) -> None:
        q = self.quantizer
        fits = q.format.tensor_core_type == "e4m3" and q.format.bits <= 4
        if not (fits and q.granularity.kind == "row" and q.scale.name == "absmax" and q.rounding != "stochastic"):
            msg = f"occ: residual=e4m3 goes with a grid of up to 4 bits, granularity row and scale absmax, not {q}"
            raise ValueError(msg)
        if self.estimator != STE:
            msg = f"occ: residual=e4m3 goes with the estimator ste, not {self.estimator}"
            raise ValueError(msg)

    def _check_transform(self) -> None:
        if self.outliers:
            msg = f"occ(...) clamps what {self.transform} changes; take one of the two"
        elif self.estimator.kind.slope:
            msg = f"{self.estimator.name} needs the input that {self.transform} changes; use trust, clip or ste"
        elif self.quantizer.scale.two_level:
            msg = f"scale rule {self.quantizer.scale.name} has a scale of the tensor, which {self.transform} changes"
        else:
            if self.transform.sparsity:
                _ = self.quantizer.format.with_zero  # raises if 0 has no code
            return
        raise ValueError(msg)

    @property
    def stored(self) -> Quantizer:
        """The quantizer whose decoder reads the codes: with a code for 0 where sparsity gives one."""
        sparse = bool(self.transform.sparsity)
        return replace(self.quantizer, format=self.quantizer.format.with_zero) if sparse else self.quantizer

    def __str__(self) -> str:
        optional = [str(part) for part in (self.outliers, self.transform) if part]
        return "; ".join([str(self.quantizer), str(self.estimator), *optional])

    @staticmethod
    @cache
    def parse(text: str) -> Operand:
        """``"<quantizer>[; <estimator>][; occ(...)][; hadamard(<size>)][; sparse(<pattern>)]"``; inverse of
        ``str()``.
        """
        head, *rest = (part.strip() for part in text.split(";"))
        parts: dict[str, list[str]] = {"occ": [], "hadamard": [], "sparse": [], "": []}
        for part in rest:
            parts[next(kind for kind in parts if part.startswith(kind))].append(part)
        if any(len(found) > 1 for found in parts.values()):
            msg = f"operand {text!r} names more than one estimator, outlier clamp, rotation or sparsity"
            raise ValueError(msg)
        return Operand(
            Quantizer.parse(head),
            Estimator.parse(parts[""][0]) if parts[""] else STE,
            OutlierClamp.parse(parts["occ"][0]) if parts["occ"] else None,
            Transform.parse("; ".join([*parts["hadamard"], *parts["sparse"]])),
        )

    def override(self, changes: Mapping[str, Any]) -> Operand:
        """A copy with the named fields changed: format, granularity, scale, rounding, estimator, outliers, rotation,
        sparsity.
        """
        known = ("format", "granularity", "scale", "rounding", "estimator", "outliers", "rotation", "sparsity")
        _reject_unknown("operand", changes, known)
        for key, value in changes.items():
            size = key == "rotation" and type(value) is int
            if not (isinstance(value, str) or size or (key in ("outliers", "rotation", "sparsity") and value is None)):
                msg = f"{key} takes {'a size' if key == 'rotation' else 'text'}, got {value!r}"
                raise ValueError(msg)
        quantizer = self.quantizer
        if "format" in changes:
            quantizer = replace(quantizer, format=get_format(changes["format"]))
        if "granularity" in changes:
            quantizer = replace(quantizer, granularity=Granularity.parse(changes["granularity"]))
        if "scale" in changes:
            if changes["scale"] not in SCALE_RULES:
                msg = f"unknown scale rule {changes['scale']!r}; known: {', '.join(SCALE_RULES)}"
                raise ValueError(msg)
            quantizer = replace(quantizer, scale=SCALE_RULES[changes["scale"]])
        if "rounding" in changes:
            quantizer = replace(quantizer, rounding=changes["rounding"])
        estimator = Estimator.parse(changes["estimator"]) if "estimator" in changes else self.estimator
        outliers = self.outliers
        if "outliers" in changes:
            outliers = OutlierClamp.parse(changes["outliers"]) if changes["outliers"] else None
        transform = self.transform
        if "rotation" in changes:
            transform = replace(transform, rotation=_rotation(changes["rotation"]))
        if "sparsity" in changes:
            transform = replace(transform, sparsity=changes["sparsity"] or "")
        return Operand(quantizer, estimator, outliers, transform)


def _rotation(value: Any) -> int:
    """The size of a rotation given as a number, as ``"hadamard(128)"``, or as ``None``."""
    return Transform.parse(value).rotation if isinstance(value, str) else 1 if value is None else value


#: Short names for the gradient operand. "fp8" is per-tensor E5M2, as published (arXiv 2501.17116 §4.1).
GRADIENT_ALIASES: dict[str, str | None] = {"bf16": None, "fp8": "e5m2 tensor absmax even"}

#: What ``gradient=`` of a rule takes for high precision.
WIDE_GRADIENTS = ("off", *(name for name, text in GRADIENT_ALIASES.items() if text is None))

#: ``backward=`` → roles whose products run on 8-bit tensor cores.
BACKWARD_ROLES: dict[str, tuple[str, ...]] = {"bf16": (), "dgrad_fp8": ("dgrad",), "fp8": ("dgrad", "wgrad")}

#: What dY is quantized to for those products unless ``gradient=`` says otherwise.
FOLDED_GRADIENT = Operand(Quantizer(get_format("e4m3")))


@dataclass(frozen=True)
class Rule:
    """Changes the treatment of the sites it matches; later rules win over earlier ones.

    Attributes:
        name: glob over whole dotted segments of the layer name: ``"lm_head"`` matches ``model.lm_head``, ``"layers.0"``
            everything under it, ``"layers.*.q_proj"`` one projection of every layer.
        op: op kind as the report names it (``linear``, ``matmul``, ``conv2d`` …), or ``*``.
        min_size, max_size: bounds on the number of elements of the weight operand.
        roles: for ``gradient``: the backward GEMMs whose gradient operand this rule changes.
        quantize: ``False`` keeps the site in high precision, ``True`` undoes an earlier skip.
        bits: operands by width, as in :class:`Recipe`; the other operand options apply on top.
        activation, weight, gradient: operand overrides, as in :class:`Recipe`; ``"off"`` keeps that operand in high
            precision.
    """

    name: str = "*"
    op: str = "*"
    min_size: int = 0
    max_size: int | None = None
    roles: tuple[str, ...] = ("dgrad", "wgrad")
    quantize: bool | None = None
    bits: Any = None
    activation: Any = None
    weight: Any = None
    gradient: Any = None

    def __post_init__(self) -> None:
        for key, (accepted, test) in _ACCEPTED_IN_RULES.items():
            if not test(getattr(self, key)):
                msg = f"rule {self.name!r}: {key}={getattr(self, key)!r} is not {accepted}"
                raise ValueError(msg)
        if self.max_size is not None and self.max_size < self.min_size:
            msg = f"rule {self.name!r}: max_size={self.max_size} below min_size={self.min_size} matches nothing"
            raise ValueError(msg)
        for role in self.roles:
            if role not in ("dgrad", "wgrad"):
                msg = f"rule {self.name!r}: role {role!r} is not 'dgrad' or 'wgrad'"
                raise ValueError(msg)
        for key in ("activation", "weight", "gradient"):
            try:
                _check_override(getattr(self, key), key)
            except ValueError as error:
                msg = f"rule {self.name!r}: {error}"
                raise ValueError(msg) from None

    def matches(self, name: str, op: str, size: int | None) -> bool:
        """Whether a site with this layer name, op kind and weight size (``None`` if unknown) falls under the rule."""
        if not fnmatchcase(op, self.op) or not matches_name(name, self.name):
            return False
        if size is None:
            return self.min_size == 0 and self.max_size is None
        return self.min_size <= size and (self.max_size is None or size <= self.max_size)

    @property
    def matches_everything(self) -> bool:
        return (self.name, self.op, self.min_size, self.max_size) == ("*", "*", 0, None)

    @staticmethod
    def from_data(data: Rule | Mapping[str, Any]) -> Rule:
        if isinstance(data, Rule):
            return data
        if not isinstance(data, Mapping):
            msg = f"a rule is a dictionary, got {data!r}"
            raise ValueError(msg)
        _reject_unknown("rule", data, [f.name for f in fields(Rule)])
        values = dict(data)
        if "roles" in values:
            roles = values["roles"]
            values["roles"] = (roles,) if isinstance(roles, str) else tuple(roles) if isinstance(roles, list) else roles
        return Rule(**values)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


#: Field of a rule → what it takes, and the test. Operands are checked by :func:`_check_override`.
_ACCEPTED_IN_RULES: dict[str, tuple[str, Any]] = {
    "name": ("a pattern for layer names", lambda v: isinstance(v, str) and v != ""),
    "op": ("an op kind as the report names it", lambda v: isinstance(v, str) and v != ""),
    "min_size": ("an integer ≥ 0", _is_size),
    "max_size": ("an integer ≥ 0 or None", lambda v: v is None or _is_size(v)),
    "quantize": ("True, False or None", lambda v: v is None or isinstance(v, bool)),
    "roles": ("a tuple with 'dgrad', 'wgrad' or both", lambda v: isinstance(v, tuple) and len(v) > 0),
}


#: Names under which wrappers keep the module they wrap: torch.compile, checkpoint_wrapper, FSDP, DDP and averaging.
WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})


def matches_name(name: str, pattern: str) -> bool:
    """Whether a run of whole dotted segments of ``name`` is ``pattern``, literally or as a glob.

    Both count as they are, and without the segments that wrappers add.
    """
    return _matches(name, pattern) or _matches(_without_wrappers(name), _without_wrappers(pattern) or pattern)


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _matches(name: str, pattern: str) -> bool:
    if f".{pattern}." in f".{name}.":
        return True
    return any(fnmatchcase(name, form) for form in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


#: Layers that every recipe leaves in high precision by their names: heads, and the adapters of PEFT's methods.
LEFT_WIDE = ("lm_head", "lora_*", "hada_*", "lokr_*", "vera_*")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers a compiled model produces, and the switches around it.

    Attributes:
        name, source: the backend's name, and where the recipe is published.
        widths: what ``bits=`` stands for: an operand for each number of bits (or name) that the recipe knows. The
            option takes one for both operands, or ``{"activation": 8, "weight": 4}``; it is not a field, but sets two.
            Nor is the option ``defaults``: ``False`` drops what the recipe leaves wide by itself (``skip``, ``rules``,
            heads, thin layers), before the other options apply.
        activation, weight: operands of the forward GEMM; the backward GEMMs read the same codes.
        gradient: operand that dY is quantized to in dgrad and wgrad, or ``None`` for high precision. Both products read
            it, whichever of their operands are quantized; a product that cannot (a convolution, unless the scale is one
            per tensor) says so in the report. The gradient of a bias is the sum of the plain dY.
        backward: which backward GEMMs run on 8-bit tensor cores: ``"bf16"`` none, ``"dgrad_fp8"`` dX, ``"fp8"`` dX and
            dW. The scales of the weight (or input) codes are folded into dY, which is then quantized to ``gradient``,
            or to E4M3 with one scale per row; the codes themselves are exact. Where scales cannot be folded (the exact
            residual of outliers, batches, convolutions) dY is what ``gradient`` says: in high precision if that is not
            given.
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
        disable_passes: names of passes to leave out.
        strict: unmatched rules raise instead of warning.
        monitor: ``True``, or a :class:`qcompile.Monitor`, to gather statistics of every operand; numbers do not change.
        debug: verify the graph after every pass.
    """

    name: str
    source: str = ""
    widths: Mapping[Any, Operand | None] = field(default_factory=dict, repr=False, compare=False)
    activation: Operand | None = None
    weight: Operand | None = None
    gradient: Operand | None = None
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
    strict: bool = False
    monitor: Any = field(default=False, repr=False, compare=False)
    debug: bool = False
    user_patterns: tuple[str, ...] = field(default=(), repr=False)

    @staticmethod
    def option_names() -> list[str]:
        """The options a backend takes, besides Inductor's own."""
        return [
            "bits",
            "defaults",
            *(f.name for f in fields(Recipe) if f.name not in ("name", "source", "widths", "user_patterns")),
        ]

    def override(self, options: Mapping[str, Any]) -> Recipe:
        """A copy with options applied. Raises ``ValueError`` naming the option, its value and what would be
        accepted.
        """
        _reject_unknown("option", options, self.option_names())
        changes: dict[str, Any] = self.of_width(options["bits"], "option 'bits'") if "bits" in options else {}
        if not _checked("defaults", options.get("defaults", True)):
            changes |= {"skip": (), "rules": (), "heads": True, "min_side": 0}
        for key, value in options.items():
            if key in ("bits", "defaults"):
                continue
            if key in ("activation", "weight", "gradient"):
                changes[key] = override_operand(changes.get(key, getattr(self, key)), value, key)
            elif key == "skip":
                changes["user_patterns"] = _strings(key, value)
                changes[key] = tuple(dict.fromkeys((*changes.get(key, self.skip), *changes["user_patterns"])))
            elif key == "rules":
                if not isinstance(value, (list, tuple)):
                    msg = f"option 'rules' takes a list of dictionaries, got {value!r}"
                    raise ValueError(msg)
                try:
                    changes[key] = (*changes.get(key, self.rules), *(Rule.from_data(rule) for rule in value))
                except ValueError as error:
                    msg = f"option 'rules': {error}"
                    raise ValueError(msg) from None
            elif key == "disable_passes":
                changes[key] = _strings(key, value)
            else:
                changes[key] = _checked(key, value)
        recipe = replace(self, **changes)
        recipe._refuse_wide_gradient(options)
        return recipe

    def _refuse_wide_gradient(self, options: Mapping[str, Any]) -> None:
        """Raises ``ValueError`` where dY is to be quantized for tensor cores and to stay wide at once. A rule for some
        layers or one of two roles is an exception, not a contradiction.
        """
        folded = BACKWARD_ROLES[self.backward]
        if not folded:
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

    def of_width(self, bits: Any, where: str) -> dict[str, Operand | None]:
        """The operands that ``bits`` stands for, by name.

        Raises ``ValueError``, beginning with ``where``, for a width that the recipe does not know.
        """
        chosen = bits if isinstance(bits, Mapping) else {"activation": bits, "weight": bits}
        _reject_unknown(f"operand in {where}", chosen, ("activation", "weight"))
        for width in chosen.values():
            if isinstance(width, bool) or not isinstance(width, (int, float, str)) or width not in self.widths:
                known = ", ".join(map(str, self.widths)) or f"none; {self.name} is not a family of widths"
                msg = f"{where}: {width!r} is not one of the widths of {self.name}: {known}"
                raise ValueError(msg)
        return {name: self.widths[width] for name, width in chosen.items()}


def override_operand(base: Operand | None, value: Any, name: str) -> Operand | None:
    """Apply an operand option: ``None``/"off", a whole operand as text, or a dictionary of changed fields."""
    if value is None or value == "off":
        return None
    try:
        operand = _operand_from(base, value, name)
        if name == "gradient" and operand and operand != Operand(operand.quantizer):
            msg = f"{operand}: a gradient takes a quantizer only, no estimator, no outlier clamp and no transform"
            raise ValueError(msg)
    except ValueError as error:
        msg = f"option {name!r}: {error}"
        raise ValueError(msg) from None
    return operand


def _check_override(value: Any, name: str) -> None:
    """Refuse what :func:`override_operand` would refuse whatever operand it starts from."""
    if not isinstance(value, Mapping):
        override_operand(None, value, name)
        return
    for key, part in value.items():
        granularity = Granularity("block", 16) if key == "scale" else Granularity("row")
        override_operand(Operand(Quantizer(get_format("e2m1"), granularity)), {key: part}, name)


def _operand_from(base: Operand | None, value: Any, name: str) -> Operand | None:
    if isinstance(value, Operand):
        return value
    if isinstance(value, str):
        if name != "gradient":
            return Operand.parse(value)
        if value in GRADIENT_ALIASES:
            alias = GRADIENT_ALIASES[value]
            return None if alias is None else Operand.parse(alias)
        try:
            return Operand.parse(value)
        except ValueError as error:
            msg = f"{error}; or {', '.join(GRADIENT_ALIASES)} for short"
            raise ValueError(msg) from None
    if isinstance(value, Mapping):
        if base is None:
            msg = "there is nothing to change in part; give the whole operand as text"
            raise ValueError(msg)
        return base.override(value)
    msg = f"takes text, a dictionary or None, got {type(value).__name__} {reprlib.repr(value)}"
    raise ValueError(msg)


_ACCEPTED: dict[str, tuple[str, Any]] = {
    "backward": (f"one of {', '.join(BACKWARD_ROLES)}", lambda v: isinstance(v, str) and v in BACKWARD_ROLES),
    "monitor": ("True, False or a qcompile.Monitor", lambda v: isinstance(v, bool) or hasattr(v, "attach")),
    "min_side": ("an integer ≥ 0", lambda v: type(v) is int and v >= 0),
    "fuel": ("an integer ≥ 0 or None", lambda v: v is None or (type(v) is int and v >= 0)),
    "saved_weights": ("one of recompute, codes", lambda v: v in ("recompute", "codes")),
    "save": ("one of exact, 8bit, 4bit", lambda v: v in ("exact", "8bit", "4bit")),
}


def _checked(key: str, value: Any) -> Any:
    accepted, test = _ACCEPTED.get(key, ("True or False", lambda v: isinstance(v, bool)))
    if not test(value):
        msg = f"option {key!r}: {value!r} is not {accepted}"
        raise ValueError(msg)
    return value


def _strings(key: str, value: Any) -> tuple[str, ...]:
    names = () if isinstance(value, str) or not isinstance(value, Iterable) else tuple(value)
    listed = isinstance(value, Iterable) and not isinstance(value, str)
    if not listed or not all(isinstance(name, str) and name for name in names):
        msg = f"option {key!r} takes a list of names, got {value!r}"
        raise ValueError(msg)
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _reject_unknown(kind: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            msg = f"unknown {kind} {key!r}{hint} Known: {', '.join(known)}"
            raise ValueError(msg)
