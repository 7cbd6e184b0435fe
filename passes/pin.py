"""Keep code that was compiled for one layer from running in another that the user's rules treat differently.

Dynamo keeps compiled code by code object. Blocks of one class whose forward is a frame of its own, as after a graph
break, run what was compiled for the first of them, since nothing in their values differs. If a rule names one of them,
that is wrong: the frame gets a guard on the identity of its module, and each such block is compiled for itself. Without
such a rule nothing is guarded.

Only modules of the model at hand are compared. Another model with blocks of the same class, compiled with equal
options, may take over code whose blocks are called otherwise there.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.fx import GraphModule

from qcompile import compat
from qcompile.ir.rules import Rule

from .names import Names
from .reachable import join
from .record import Site

__all__ = ["pin"]


def pin(gm: GraphModule, names: Names, sites: Iterable[Site], rules: list[Rule]) -> int:
    """Guard the modules of the frame being compiled whose peers get other rules; returns how many."""
    sites, pinned = list(sites), set()
    for placeholder in gm.graph.find_nodes(op="placeholder"):
        owner, source = names.owner(placeholder)
        if owner is not None and id(owner) not in pinned and _differs_from_peers(owner, names, sites, rules):
            pinned.add(id(owner))
            compat.guard_identity(source)
    return len(pinned)


def _differs_from_peers(owner: nn.Module, names: Names, sites: list[Site], rules: list[Rule]) -> bool:
    prefix, *_ = names.of_module(owner)
    peers = [name for peer in names.peers(owner) for name in names.of_module(peer)]
    inside = [site for site in sites if not prefix or f"{site.name}.".startswith(f"{prefix}.")]
    return any(
        _matches(site, names, join(peer, site.name[len(prefix) :].lstrip(".")), rules)
        != _matches(site, names, site.name, rules)
        for site in inside
        for peer in peers
    )


def _matches(site: Site, names: Names, name: str, rules: list[Rule]) -> list[bool]:
    return [rule.matches(name, site.op, site.weight_size, names.block(name)) for rule in rules]
