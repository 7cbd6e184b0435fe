"""Post-grad graphs: quantize straight to the 8-bit codes that tensor cores read.

`lower` leaves ``quantize → recode``: two kernels, the first of which writes what only the second reads. Here the two
become one, which writes packed codes too if the backward keeps them::

    recode(quantize(x))                                   ─►   quantize_8bit(x)
    recode(quantize(x, transform)), estimator_mask(x, …)  ─►   quantize_8bit_masked(x)
    mm_1bit(quantize(x)), estimator_mask(x, …)            ─►   quantize_8bit_masked(x), without 8-bit codes
    recode(quantize(x), transposed)                       ─►   quantize_8bit_transposed(x)
    the same, estimator_mask(x, …)                        ─►   recode(quantize_8bit_masked(x), transposed)
    quantize(dy, along rows), quantize(dy, along columns) ─►   quantize_8bit_pair(dy)
    the same of quantize_groups                           ─►   quantize_groups_pair(dy)

The second is for operands that are rotated, scaled by their root mean square, or have a mask taken of them; the third
for signs, which are multiplied as they are stored. The last two are a gradient on its way to dgrad and wgrad: one read
of it finds the scales of both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.operand import STE, Operand

from .graph import (
    aten,
    emit,
    input_of,
    is_call,
    item_of,
    result,
    same_sizes,
    size_along,
    through_views,
)  # fmt: skip
from .pass_base import Context
from .views import (
    EstimatorMask,
    Mm1Bit,
    Quantize,
    Quantize8Bit,
    Quantize8BitMasked,
    Quantize8BitPair,
    Quantize8BitTransposed,
    QuantizeGroups,
    QuantizeGroupsPair,
    Recode,
    View,
)  # fmt: skip

__all__ = ["merge_quantize"]


@dataclass
class Use:
    """A ``quantize`` whose codes tensor cores read.

    Attributes:
        node: the call; call: its arguments, the axis not negative.
        masks: calls that take the mask of an estimator of the same elements.
        plain: nodes that stand for 8-bit codes as they are stored; transposed: for their transpose.
        packed: whether anything reads the stored codes, as ``mm_1bit`` does.
        signs: whether that does.
    """

    node: Node
    call: Quantize
    masks: list[Node]
    plain: list[Node] = field(default_factory=list)
    transposed: list[Node] = field(default_factory=list)
    packed: bool = False
    signs: bool = False

    @staticmethod
    def of(node: Node) -> Use | None:
        """``None`` for a call that the 8-bit kernels do not cover."""
        call = Quantize.of(node)
        supported = call.quantizer.granularity.kind == "row" and call.quantizer.scale.storage == "float32"
        if not supported or call.global_scale is not None or call.seed is not None:
            return None
        masks = [user for user in call.x.users if _is_mask_of(user, node, call)]
        use = Use(node, replace(call, axis=call.axis % call.x.meta["val"].dim()), masks)
        for reader in _readers(result(node, 0)):
            recode = Recode.match(reader)
            if recode is not None and recode.offs is None:
                (use.transposed if recode.transposed else use.plain).append(reader)
            elif is_call(reader, aten.view.dtype):
                use.plain.append(reader)
            else:
                use.packed = True
                use.signs |= is_call(reader, Mm1Bit.op)
        return use if use.plain or use.transposed or (use.signs and use.masks) else None

    @property
    def is_matrix(self) -> bool:
        return bool(self.call.x.meta["val"].dim() == 2)

    @property
    def transposed_as_is(self) -> bool:
        """Whether the matrix that is transposed is x, or each one of a batch that x is; as the kernels take them."""
        shape = self.call.x.meta["val"].shape
        read = [Recode.of(node).codes.meta["val"].shape for node in self.transposed]
        return self.is_matrix or (
            len(shape) == 3 and not self.masks and all(same_sizes(s[:-1], shape[:-1]) for s in read)
        )

    @property
    def along_rows(self) -> bool:
        return bool(self.call.axis == self.call.x.meta["val"].dim() - 1)

    @property
    def key(self) -> Any:
        """Equal for calls on the same memory, read in the same shape."""
        value = self.call.x.meta["val"]
        shape, strides = tuple(map(str, value.shape)), tuple(map(str, value.stride()))
        return through_views(self.call.x), shape, strides, self.call.quantizer


def _is_mask_of(user: Node, node: Node, call: Quantize) -> bool:
    """Whether ``user`` masks the elements of the tensor that ``node``, a ``call``, encodes."""
    mask = EstimatorMask.match(user)
    if mask is None or item_of(mask.scales) != (node, 1):
        return False
    its = mask.quantizer, mask.axis, mask.global_scale, mask.transform
    return its == (call.quantizer, call.axis, None, call.transform)


def merge_quantize(graph: Graph, context: Context) -> int:
    """Returns how many ``quantize`` calls were replaced."""
    _read_unpermuted(graph)
    _share_equal_calls(graph)
    uses = [use for node in Quantize.calls(graph) if (use := Use.of(node))]
    pairs = list(_pairs(uses))
    paired = {id(use) for pair in pairs for use in pair}
    for rows, columns in pairs:
        _replace_pair(graph, rows, columns)
    singles = [use for use in uses if id(use) not in paired and use.along_rows and _replace_single(graph, use)]
    groups = _pair_groups(graph)
    if pairs or groups:
        compat.stable_topological_sort(graph)
    return 2 * (len(pairs) + groups) + len(singles)


def _read_unpermuted(graph: Graph) -> None:
    """Let ``quantize`` along an axis that a permutation moves away from the end read what is permuted, along its end:
    codes are the same, and have that axis last.
    """
    for node in Quantize.calls(graph):
        call = Quantize.of(node)
        if not is_call(call.x, aten.permute.default):
            continue
        order = list(call.x.args[1])  # type: ignore
        order.append(order.pop(call.axis))
        if order == sorted(order):
            node.args = replace(call, x=input_of(call.x), axis=-1).arguments()


def _share_equal_calls(graph: Graph) -> None:
    """Make one of ``quantize`` calls with the same arguments: the partitioner recomputes codes and scales apart."""
    first: dict[Quantize, Node] = {}
    for node in Quantize.calls(graph):
        kept = first.setdefault(Quantize.of(node), node)
        if kept is node:
            continue
        for user in list(node.users):
            item = item_of(user)
            assert item is not None
            same = result(kept, item[1])
            if same is None:
                with graph.inserting_after(kept):
                    same = emit(graph, user, operator.getitem, kept, item[1])
            user.replace_all_uses_with(same)


def _pairs(uses: list[Use]) -> Iterator[tuple[Use, Use]]:
    """Quantizations of one matrix by rows and by columns, with nothing that needs the stored codes."""
    matrices = [
        use for use in uses if use.is_matrix and not (use.packed or use.transposed or use.masks or use.call.transform)
    ]
    by_rows = {use.key: use for use in matrices if use.along_rows}
    for use in matrices:
        if not use.along_rows and use.key in by_rows:
            yield by_rows.pop(use.key), use


def _replace_pair(graph: Graph, rows: Use, columns: Use) -> None:
    pair = Quantize8BitPair(columns.call.x, rows.call.quantizer, rows.call.fold, columns.call.fold)
    with graph.inserting_before(columns.node):
        items = pair.emit_results(graph, near=columns.node)
        for use, (codes, scales) in ((rows, items[:2]), (columns, items[2:])):
            _replace_all(use.plain, codes)
            _replace_stored(graph, use, 1, scales)


def _pair_groups(graph: Graph) -> int:
    """Join ``quantize_groups`` of one gradient by rows and by columns; returns how many."""
    by_rows: dict[Any, tuple[Node, QuantizeGroups]] = {}
    calls = [(node, QuantizeGroups.of(node)) for node in QuantizeGroups.calls(graph)]
    for node, call in calls:
        if call.axis % 2:
            by_rows[call.x, call.quantizer, call.offs] = node, call
    count = 0
    for node, call in calls:
        rows = None if call.axis % 2 else by_rows.pop((call.x, call.quantizer, call.offs), None)
        if rows is None:
            continue
        pair = QuantizeGroupsPair(call.x, call.quantizer, call.offs, rows[1].fold, call.fold)
        with graph.inserting_before(node):
            items = pair.emit_results(graph, near=node)
        for source, results in ((rows[0], items[:2]), (node, items[2:])):
            for index, by in enumerate(results):
                if (old := result(source, index)) is not None:
                    old.replace_all_uses_with(by)
        count += 1
    return count


def _replace_single(graph: Graph, use: Use) -> bool:
    quantizer, fold, transform = use.call.quantizer, use.call.fold, use.call.transform
    whole = bool(transform or use.masks or quantizer.scale.statistic == "rms")
    packed = use.packed or bool(use.transposed and use.masks)  # what is recoded once more
    if use.transposed and (use.plain or use.packed or fold is not None or not use.transposed_as_is):
        return False  # both layouts of one tensor in one graph: rare, and right as it is
    if fold is not None and whole:
        return False  # a gradient of another recipe than any known
    masks: list[Node] = []
    with graph.inserting_before(use.node):
        x = _as_matrix(graph, use)
        view: View
        if use.transposed and not use.masks:
            view = Quantize8BitTransposed(use.call.x, quantizer, transform)
        elif whole:
            estimators = [EstimatorMask.of(mask).estimator for mask in use.masks]
            masks = [mask for mask, its in zip(use.masks, estimators, strict=True) if its == estimators[0]]
            operand = Operand(quantizer, estimators[0] if estimators else STE, transform=transform)
            view = Quantize8BitMasked(x, operand, packed, bool(use.plain))
        else:
            view = Quantize8Bit(x, quantizer, use.packed, fold)
        codes, scales, *more = view.emit_results(graph, near=use.node)
        for mask in masks:
            _replace_all([mask], _reshaped(graph, use, more[1], mask))
        _replace_all([*use.plain, *(() if packed else use.transposed)], codes)
        _replace_stored(graph, use, 1, scales)
        if packed:
            _replace_stored(graph, use, 0, more[0])
    return True


def _as_matrix(graph: Graph, use: Use) -> Node:
    x = use.call.x
    return x if use.is_matrix else emit(graph, use.node, aten.reshape.default, x, [-1, x.meta["val"].shape[-1]])


def _replace_stored(graph: Graph, use: Use, index: int, by: Node) -> None:
    """Stored codes (0) or scales (1), in the shape they had."""
    stored = result(use.node, index)
    if stored is not None:
        _replace_all([stored], _reshaped(graph, use, by, stored))


def _reshaped(graph: Graph, use: Use, node: Node, like: Node) -> Node:
    """``node``, a matrix of rows, in the shape of ``like``, whose leading axes are those of x."""
    shape = like.meta["val"].shape
    if same_sizes(node.meta["val"].shape, shape):
        return node
    rows = [size_along(graph, use.node, use.call.x, axis) for axis in range(len(shape) - 1)]
    last = shape[-1] if isinstance(shape[-1], int) else -1
    return emit(graph, use.node, aten.reshape.default, node, [*rows, last])


def _replace_all(nodes: list[Node], by: Node) -> None:
    for node in nodes:
        node.replace_all_uses_with(by)


def _readers(node: Node | None) -> Iterator[Node]:
    """Users of a tensor, looking through its views."""
    for user in node.users if node is not None else ():
        if through_views(user) is not user:
            yield from _readers(user)
        else:
            yield user
