"""Which products are output heads: layers that turn hidden states into scores of a vocabulary or of classes.

No recipe quantizes them by default, and their name need not be ``lm_head``. One is recognized by what it is: its weight
is tied to an embedding, it is what the model itself calls its output embeddings, its result reaches a cross-entropy, or
it is the last product and as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from qcompile import compat

from .graph import argument_of, static_size, value_of
from .spellings import is_in

__all__ = ["Vocabulary", "head_reasons"]

TIED = "output head: its weight is an embedding's"
OUTPUT_EMBEDDINGS = "output head: the model's get_output_embeddings()"
SCORED = "output head: its result reaches a cross-entropy"
VOCABULARY = "output head: the last product, and as wide as the vocabulary"

#: Look-ups in a table → position and name of the table.
_EMBEDDINGS: dict[Any, tuple[int, str]] = {
    F.embedding: (1, "weight"),
    torch.embedding: (0, "weight"),
    torch.ops.aten.embedding.default: (0, "weight"),
    F.embedding_bag: (1, "weight"),
}
_CROSS_ENTROPIES = (F.cross_entropy, F.nll_loss, compat.nll_loss_nd, torch.ops.aten.cross_entropy_loss.default)


@dataclass
class Vocabulary:
    """What is known of a model's embeddings. Tensors are told apart by identity.

    Attributes:
        tables: weights of embeddings. outputs: weights of what the model calls its output embeddings.
        size: rows of the largest table; 0 if there is none.
    """

    tables: set[Any] = field(default_factory=set)
    outputs: set[Any] = field(default_factory=set)
    size: int = 0

    @staticmethod
    def of_modules(modules: Iterable[nn.Module]) -> Vocabulary:
        found = Vocabulary()
        for module in modules:
            if isinstance(module, nn.Embedding):
                found.add(id(module.weight), module.num_embeddings)
            if (weight := getattr(_output_embeddings(module), "weight", None)) is not None:
                found.outputs.add(id(weight))
        return found

    def add(self, table: Any, size: Any) -> None:
        self.tables.add(table)
        self.size = max(self.size, static_size(size) or 0)

    def add_graph(self, graph: Graph, identities: Callable[[Any], frozenset[Any]]) -> None:
        """Note the tables that a graph looks up; ``identities`` tells what an operand derives from."""
        for node in graph.nodes:
            if node.op == "call_function" and is_in(_EMBEDDINGS, node.target):
                position, keyword = _EMBEDDINGS[node.target]
                table = argument_of(node, position, keyword)
                for identity in identities(table):
                    self.add(identity, value_of(table).shape[0])


def _output_embeddings(module: nn.Module) -> Any:
    """transformers' ``get_output_embeddings()``, where a module has one to give."""
    try:
        return module.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def identity_of(placeholder: Node) -> Any:
    """What tells a parameter apart in all graphs of a model: the tensor's ``id``; the node where Dynamo keeps none."""
    tensor = compat.placeholder_value(placeholder)
    return placeholder if tensor is None else id(tensor)


def head_reasons(graph: Graph, products: dict[Node, frozenset[Any]], vocabulary: Vocabulary) -> dict[Node, str]:
    """Why each of ``products`` that is an output head is one.

    Args:
        products: every call of ``graph`` that multiplies, with the identities of the parameters in its weight.
    """
    scored, followed = _what_follows(graph, set(products))
    reasons = {}
    for node, weights in products.items():
        value = value_of(node)
        width = value.shape[-1] if isinstance(value, torch.Tensor) and value.dim() else 0
        if weights & vocabulary.outputs:
            reasons[node] = OUTPUT_EMBEDDINGS
        elif weights & vocabulary.tables:
            reasons[node] = TIED
        elif node in scored:
            reasons[node] = SCORED
        elif node not in followed and vocabulary.size and static_size(width) == vocabulary.size:
            reasons[node] = VOCABULARY
    return reasons


def _what_follows(graph: Graph, products: set[Node]) -> tuple[set[Node], set[Node]]:
    """Nodes whose values reach a cross-entropy past no product, and nodes that a product follows."""
    scored: set[Node] = set()
    followed: set[Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            if user in products or _has_body(user):
                followed.add(node)
                continue
            if user in followed:
                followed.add(node)
            if user in scored or is_in(_CROSS_ENTROPIES, user.target):
                scored.add(node)
    return scored, followed


def _has_body(node: Node) -> bool:
    """A call of a higher-order op, whose body may hold products."""
    return any(n.op == "get_attr" and not isinstance(value_of(n), torch.Tensor) for n in node.all_input_nodes)
