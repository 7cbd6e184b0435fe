"""Rules: which layers of a model a recipe treats otherwise than the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .operand import check_override, resolve_override
from .options import reject_unknown

__all__ = ["Block", "Rule", "block_of", "blocks_in", "describe", "matches_name"]


@dataclass(frozen=True)
class Block:
    """The place of a layer in its model: in block ``index`` of ``count``."""

    index: int
    count: int


def blocks_in(module: nn.Module, name: str) -> dict[str, Block]:
    """The entries of a module called ``name``, by their names, if it is a list of more than one."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(module) < 2:
        return {}
    return {f"{name}.{key}" if name else key: Block(i, len(module)) for i, key in enumerate(module._modules)}


def block_of(name: str, blocks: Mapping[str, Block]) -> Block | None:
    """The outermost of ``blocks`` (by name) that the layer ``name`` is in."""
    parts = name.split(".")
    above = (".".join(parts[: end + 1]) for end in range(len(parts)))
    return next((blocks[prefix] for prefix in above if prefix in blocks), None)


@dataclass(frozen=True)
class Rule:
    """Changes the treatment of the sites it matches; later rules win over earlier ones.

    Attributes:
        name: glob over whole dotted segments of the layer name: ``"lm_head"`` matches ``model.lm_head``, ``"layers.0"``
            everything under it, ``"layers.*.q_proj"`` one projection of every layer.
        op: op kind as the report names it (``linear``, ``matmul``, ``conv2d`` …), or ``*``.
        min_size, max_size: bounds on the number of elements of the weight operand.
        last_blocks: the share of a model's blocks that the rule is for, from the end: of 62 blocks, ``0.15`` are the
            last 9. Blocks are the entries of the outermost ``ModuleList`` or ``Sequential`` that a layer is in. 0: no
            matter where.
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
    last_blocks: float = 0.0
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

    def matches(self, name: str, op: str, size: int | None, block: Block | None = None) -> bool:
        """Whether a site with this layer name, op kind, weight size and block (``None`` if unknown) falls under the
        rule.
        """
        return self.may_match(name, op, size, block) and (not self.last_blocks or self._is_late(block))

    def last_of(self, count: int) -> int:
        """How many of ``count`` blocks the last ones are."""
        return round(self.last_blocks * count)

    def _is_late(self, block: Block | None) -> bool:
        return block is not None and block.index >= block.count - self.last_of(block.count)

    def may_match(self, name: str, op: str, size: int | None, block: Block | None) -> bool:
        """Whether a site would fall under the rule in one of the blocks of its model."""
        if not fnmatchcase(op, self.op) or not matches_name(name, self.name) or (self.last_blocks and block is None):
            return False
        if size is None:
            return self.min_size == 0 and self.max_size is None
        return self.min_size <= size and (self.max_size is None or size <= self.max_size)

    @property
    def matches_everything(self) -> bool:
        return (self.name, self.op, self.min_size, self.max_size, self.last_blocks) == ("*", "*", 0, None, 0.0)

    @property
    def reads_names(self) -> bool:
        """Whether what it says of a site depends on where in the model that is."""
        return self.name != "*" or self.last_blocks > 0

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
    "last_blocks": ("a share from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1),
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
