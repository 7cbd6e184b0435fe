"""Rules: which layers of a model a recipe treats otherwise than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from .operand import check_override, resolve_override
from .options import reject_unknown

__all__ = ["Rule", "describe", "matches_name"]


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
                check_override(getattr(self, key), key)
            except ValueError as error:
                msg = f"rule {self.name!r}: {error}"
                raise ValueError(msg) from None
            object.__setattr__(self, key, resolve_override(getattr(self, key)))

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
        reject_unknown("rule", data, [f.name for f in fields(Rule)])
        values = dict(data)
        if "roles" in values:
            roles = values["roles"]
            values["roles"] = (roles,) if isinstance(roles, str) else tuple(roles) if isinstance(roles, list) else roles
        return Rule(**values)


def describe(rule: Rule) -> str:
    """Short text of a rule, the same for equal rules."""
    changes = {k: v for k, v in vars(rule).items() if v != Rule.__dataclass_fields__[k].default and k != "name"}
    if changes == {"quantize": False}:
        return f"skip={rule.name!r}"
    return f"rule {rule.name!r} ({', '.join(f'{k}={v}' for k, v in changes.items())})"


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


#: Field of a rule → what it takes, and the test. Operands are checked by :func:`check_override`.
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
