"""What is known of a product from the Dynamo graph on: its site, the decision about it, and the marks its nodes carry.

Passes share these records, and none of them makes another's: `find_gemms` makes sites, `plan` the decisions, `insert`
and `quantize_gradients` leave the marks. A mark is an entry of ``node.meta["custom"]``, which AOTAutograd hands on to
the forward and backward nodes it traces; :func:`marked` writes one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from qcompile.ir.operand import Operand
from qcompile.ir.rules import Block

from .graph import value_of
from .spellings import Slot

__all__ = [
    "DECODED", "KIND_KEY", "PROVIDER_KEY", "REFERENCE", "ROLE_KEY", "SIGNS_KEY", "SITE_KEY", "STATISTICS_KIND",
    "UNFOLDED_KEY", "Again", "Decision", "Plan", "Provision", "Site", "mark_of", "marked", "operand_kind", "site_index",
    "stated_role", "without_name",
]  # fmt: skip

#: Index of the site a node serves.
SITE_KEY = "qcompile_site"
#: ``"weight"`` or ``"activation"``, on nodes that quantize an operand; :data:`STATISTICS_KIND` on what watches one.
KIND_KEY = "qcompile_kind"
#: Which gradient the backward of a call computes, where that is one and the same for all its nodes.
ROLE_KEY = "qcompile_role"
#: Why `fold` left a product of the backward as it was.
UNFOLDED_KEY = "qcompile_unfolded"
#: What runs a product: a :class:`Provision`, by `choose_providers`.
PROVIDER_KEY = "qcompile_provider"
#: On a draw of signs, whether it is one.
SIGNS_KEY = "qcompile_signs"
#: What :data:`KIND_KEY` says of statistics: they are no operand.
STATISTICS_KIND = "statistics"


def mark_of(node: Node, key: str) -> Any:
    """A node's mark, ``None`` without one."""
    return (node.meta.get("custom") or {}).get(key)


def marked(node: Node, **marks: Any) -> Node:
    """``node`` with further marks. Nodes may share a dictionary of them, so it gets one of its own."""
    node.meta["custom"] = {**(node.meta.get("custom") or {}), **marks}
    return node


def site_index(node: Node) -> int | None:
    """Which site a node serves, in the Dynamo, joint or post-grad graph."""
    return mark_of(node, SITE_KEY)


def operand_kind(node: Node) -> str:
    """``"weight"`` or ``"activation"`` for a node traced from an operand `insert` wrapped, ``"weight"`` for the codes
    of a stored one, which are given; "" for others.
    """
    stored = node.op == "placeholder" and getattr(value_of(node), "dtype", None) == torch.uint8
    return mark_of(node, KIND_KEY) or ("weight" if stored else "")


def stated_role(node: Node) -> str:
    """The role that `quantize_gradients` gave the call a backward node is traced from; "" if none."""
    return mark_of(node, ROLE_KEY) or ""


#: The provider that decodes operands for an ATen product.
DECODED = "dequantize + aten"
#: An op's own kernel in plain torch.
REFERENCE = "reference"


class Provision(NamedTuple):
    """What runs an op, and why not something faster."""

    provider: str
    reason: str = ""


@dataclass
class Site:
    """One matrix product.

    Attributes:
        node: the call. op: how it is spelled. slots: its two operands.
        obstacle: why it cannot be quantized; empty if it can.
        reservation: why it is left wide unless a rule says ``quantize=True``; empty if nothing speaks against it.
        head: why it is taken for an output head; empty if it is none.
        name: of its layer. aliases: further names of a shared layer. missing: what layer has no name
            (:class:`names.Name`). blocks: in which block of the model the layer is, by name.
            body: path of the higher-order op's body it is in.
        shape: of the operands. contraction: how many terms are summed. sides: of the weight as a matrix (of the whole
            parameter where the weight is a part of one), ``None`` without a weight. Sizes may be symbolic.
        anonymous: the higher-order op around it, if any, whose backward does not say which site a node serves.
        index: of the site in its graph. training: whether a gradient is computed.
    """

    node: Node
    op: str
    slots: tuple[Slot, ...] = ()
    obstacle: str = ""
    name: str = ""
    body: str = ""
    reservation: str = ""
    head: str = ""
    shape: tuple[Any, ...] = ()
    contraction: Any = 0
    sides: tuple[Any, Any] | None = None
    weight_size: Any = None
    index: int = -1
    training: bool = True
    aliases: tuple[str, ...] = ()
    missing: str = ""
    blocks: tuple[Block | None, ...] = (None,)
    anonymous: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that rules can match."""
        return (self.name, *self.aliases)

    @property
    def places(self) -> list[tuple[str, str, Any, Block | None]]:
        """What a rule is asked about, once for each name."""
        pairs = zip(self.names, self.blocks, strict=True)
        return [(name, self.op, self.weight_size, block) for name, block in pairs]


class Again(NamedTuple):
    """An operand as the backward reads it, and the draw of its signs and dY's, if they are drawn."""

    node: Node
    bits: Node | None


@dataclass
class Decision:
    """What one site gets.

    ``operands`` follow the site's slots; all may be ``None`` where only gradients are quantized. ``gradients`` says
    what dY is quantized to, by role (dgrad, wgrad): for the roles in ``rounded`` before any backward product reads it
    (`quantize_gradients`), for the roles in ``folded`` times the scales of the other operand (`fold`). A role in both
    is folded if its scales allow it; ``by_cost``: and if that is estimated to be faster.

    ``originals`` are what `insert` quantized. ``read_again`` says what the other operand of a role's product is
    quantized to once more, where that does not read what the forward read; ``again`` has the nodes that do so, by the
    operand's place in the product; ``from_codes``: they read what the forward's codes stand for, not the originals.
    ``wide_forward``: the forward reads the originals.
    """

    site: Site
    quantized: bool
    reason: str
    operands: tuple[Operand | None, ...] = ()
    gradients: dict[str, Operand | None] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    rounded: tuple[str, ...] = ()
    by_cost: bool = False
    read_again: dict[str, Operand] = field(default_factory=dict)
    from_codes: bool = False
    wide_forward: bool = False
    originals: tuple[Node, ...] = ()
    again: dict[int, Again] = field(default_factory=dict)


@dataclass
class Plan:
    """Decisions for one graph, indexed by site, and how often each rule of the user's matched."""

    decisions: list[Decision]
    matched: Counter[str]

    def digest(self) -> str:
        """Everything of the plan that later passes act on, for the hooks' cache identity. Layer names are not among
        it.
        """
        return repr([
            (d.site.index, d.quantized, [s.kind for s in d.site.slots], list(map(str, d.operands)), str(d.gradients),
             d.folded, d.rounded, d.by_cost, str(d.read_again), d.from_codes, d.wide_forward)
            for d in self.decisions
        ])  # fmt: skip

    def summary(self, recipe: str) -> str:
        """One line, whatever the size of the model."""
        reasons = Counter(d.reason for d in self.decisions if not d.quantized)
        left = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common(3))
        text = f"{recipe}: {len(self.quantized)} of {len(self.decisions)} GEMM sites quantized"
        return f"{text} (left alone: {left})" if left else text

    @property
    def quantized(self) -> list[Decision]:
        return [d for d in self.decisions if d.quantized]

    @property
    def nameless(self) -> list[Decision]:
        """What stays wide because no rule could have matched its layer."""
        return [d for d in self.decisions if d.site.missing and d.reason == without_name(d.site.missing)]


def without_name(layer: str) -> str:
    """Why a product stays wide whose ``layer`` is in nothing that was compiled: a rule may have meant it."""
    return (
        f"its layer ({layer}) has no name that skip=… or rules=… could match: it is reached from nothing that was "
        "compiled; make it a submodule or an argument"
    )
