"""Post-grad graphs: quantize straight to the 8-bit codes that tensor cores read.

`lower` leaves ``quantize → recode``: two kernels, the first of which writes what only the second reads. Here the two
become one, which writes packed codes too if the backward keeps them::

    recode(quantize(x))                                   ─►   quantize_8bit(x)
    recode(quantize(x, transform)), estimator_mask(x, …)  ─►   quantize_8bit_masked(x)
    mm_1bit(quantize(x)), estimator_mask(x, …)            ─►   quantize_8bit_masked(x), without 8-bit codes
    recode(quantize(x), transposed)                       ─►   quantize_8bit_transposed(x)
    quantize(dy, along rows), quantize(dy, along columns) ─►   quantize_8bit_pair(dy)

The second is for operands that are rotated, scaled by their root mean square, or have a mask taken of them; the third
for signs, which are multiplied as they are stored. The last is a gradient on its way to dgrad and wgrad: one read of it
finds the scales of both.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.quantizer import Quantizer

from .dialect import aten, is_call, ops, same_sizes, through_views
from .pass_base import Context, emit, size_along

__all__ = ["merge_quantize"]


@dataclass
class Use:
    """A ``quantize`` whose codes tensor cores read.

    Attributes:
        node: the call; x, quantizer, axis, fold, transform: its arguments.
        masks: calls that take the mask of an estimator of the same elements.
        plain: nodes that stand for 8-bit codes as they are stored; transposed: for their transpose.
        packed: whether anything reads the stored codes, as ``mm_1bit`` does.
        signs: whether that does.
    """

    node: Node
    x: Node
    quantizer: Quantizer
    axis: int
    fold: Node | None
    transform: str
    masks: list[Node]
    plain: list[Node]
    transposed: list[Node]
    packed: bool
    signs: bool

    @staticmethod
    def of(node: Node) -> Use | None:
        """``None`` for a call that the 8-bit kernels do not cover."""
        x, text, axis, *rest = node.args
        global_scale, seed, fold = [*rest, None, None, None][:3]
        transform = rest[3] if len(rest) > 3 else ""
        quantizer = Quantizer.parse(text)  # type: ignore[arg-type]
        supported = quantizer.granularity.kind == "row" and quantizer.scale.storage == "float32"
        if not supported or global_scale is not None or seed is not None:
            return None
        masks = [user for user in x.users if _is_mask_of(user, node, text, axis, transform)]  # type: ignore[union-attr]
        use = Use(node, x, quantizer, axis % x.meta["val"].dim(), fold, transform, masks, [], [], False, False)  # type: ignore
        for reader in _readers(_item(node, 0)):
            if is_call(reader, ops.recode.default):
                (use.transposed if reader.args[3] else use.plain).append(reader)
            elif is_call(reader, aten.view.dtype):
                use.plain.append(reader)
            else:
                use.packed = True
                use.signs |= is_call(reader, ops.mm_1bit.default)
        return use if use.plain or use.transposed or (use.signs and use.masks) else None

    @property
    def along_rows(self) -> bool:
        return self.axis == self.x.meta["val"].dim() - 1

    @property
    def key(self) -> Any:
        """Equal for calls on the same memory, read in the same shape."""
        value = self.x.meta["val"]
        return through_views(self.x), tuple(map(str, value.shape)), tuple(map(str, value.stride())), str(self.quantizer)


def _is_mask_of(user: Node, quantize: Node, text: Any, axis: Any, transform: Any) -> bool:
    """Whether ``user`` masks the elements of the tensor that ``quantize`` encodes."""
    if not is_call(user, ops.estimator_mask.default) or user.args[1] is not _item(quantize, 1):
        return False
    its_text, _, its_axis, *rest = user.args[2:]
    global_scale, its_transform = rest if len(rest) == 2 else (*rest, None, "")[:2]
    return (its_text, its_axis, global_scale, its_transform) == (text, axis, None, transform)


def merge_quantize(graph: Graph, context: Context) -> int:
    """Returns how many ``quantize`` calls were replaced."""
    _share_equal_calls(graph)
    uses = [use for node in graph.find_nodes(op="call_function", target=ops.quantize.default) if (use := Use.of(node))]
    pairs = list(_pairs(uses))
    paired = {id(use) for pair in pairs for use in pair}
    for rows, columns in pairs:
        _replace_pair(graph, rows, columns)
    singles = [use for use in uses if id(use) not in paired and use.along_rows and _replace_single(graph, use)]
    if pairs:
        compat.stable_topological_sort(graph)
    return 2 * len(pairs) + len(singles)


def _share_equal_calls(graph: Graph) -> None:
    """Make one of ``quantize`` calls with the same arguments: the partitioner recomputes codes and scales apart."""
    first: dict[Any, Node] = {}
    for node in list(graph.find_nodes(op="call_function", target=ops.quantize.default)):
        kept = first.setdefault(node.args, node)
        if kept is node:
            continue
        for item in list(node.users):
            index: Any = item.args[1]
            same = _item(kept, index)
            if same is None:
                with graph.inserting_after(kept):
                    same = emit(graph, item, operator.getitem, kept, index)
            item.replace_all_uses_with(same)


def _pairs(uses: list[Use]) -> Iterator[tuple[Use, Use]]:
    """Quantizations of one matrix by rows and by columns, with nothing that needs the stored codes."""
    matrices = [
        use
        for use in uses
        if use.x.meta["val"].dim() == 2 and not (use.packed or use.transposed or use.masks or use.transform)
    ]
    by_rows = {use.key: use for use in matrices if use.along_rows}
    for use in matrices:
        if not use.along_rows and use.key in by_rows:
            yield by_rows.pop(use.key), use


def _replace_pair(graph: Graph, rows: Use, columns: Use) -> None:
    with graph.inserting_before(columns.node):
        made = emit(
            graph, columns.node, ops.quantize_8bit_pair.default, columns.x, str(rows.quantizer), rows.fold, columns.fold
        )
        items = [emit(graph, columns.node, operator.getitem, made, i) for i in range(4)]
        for use, (codes, scales) in ((rows, items[:2]), (columns, items[2:])):
            _replace_all(use.plain, codes)
            _replace_stored(graph, use, 1, scales)


def _replace_single(graph: Graph, use: Use) -> bool:
    text = str(use.quantizer)
    if use.transposed and (use.plain or use.packed or use.fold is not None or use.x.meta["val"].dim() != 2):
        return False  # both layouts of one tensor in one graph: rare, and right as it is
    if use.fold is not None and (use.transform or use.masks or use.quantizer.scale.statistic == "rms"):
        return False  # a gradient of another recipe than any known
    with graph.inserting_before(use.node):
        x = _as_matrix(graph, use)
        masks: list[Node] = []
        if use.transposed:
            transform = {"transform": use.transform} if use.transform else {}
            made = emit(graph, use.node, ops.quantize_8bit_transposed.default, x, text, **transform)
        elif use.transform or use.masks or use.quantizer.scale.statistic == "rms":
            masks = [mask for mask in use.masks if mask.args[3] == use.masks[0].args[3]]
            estimator = str(masks[0].args[3]) if masks else "ste"
            operand = "; ".join(filter(None, (text, estimator, use.transform)))
            made = emit(graph, use.node, ops.quantize_8bit_masked.default, x, operand, use.packed, bool(use.plain))
        else:
            made = emit(graph, use.node, ops.quantize_8bit.default, x, text, use.packed, use.fold)
        for mask in masks:
            _replace_all([mask], _reshaped(graph, use, emit(graph, use.node, operator.getitem, made, 3), mask))
        codes, scales = (emit(graph, use.node, operator.getitem, made, i) for i in range(2))
        _replace_all([*use.plain, *use.transposed], codes)
        _replace_stored(graph, use, 1, scales)
        if use.packed:
            _replace_stored(graph, use, 0, emit(graph, use.node, operator.getitem, made, 2))
    return True


def _as_matrix(graph: Graph, use: Use) -> Node:
    value = use.x.meta["val"]
    return use.x if value.dim() == 2 else emit(graph, use.node, aten.reshape.default, use.x, [-1, value.shape[-1]])


def _replace_stored(graph: Graph, use: Use, index: int, by: Node) -> None:
    """Stored codes (0) or scales (1), in the shape they had."""
    stored = _item(use.node, index)
    if stored is not None:
        _replace_all([stored], _reshaped(graph, use, by, stored))


def _reshaped(graph: Graph, use: Use, node: Node, like: Node) -> Node:
    """``node``, a matrix of rows, in the shape of ``like``, whose leading axes are those of x."""
    shape = like.meta["val"].shape
    if same_sizes(node.meta["val"].shape, shape):
        return node
    rows = [size_along(graph, use.node, use.x, axis) for axis in range(len(shape) - 1)]
    last = shape[-1] if isinstance(shape[-1], int) else -1
    return emit(graph, use.node, aten.reshape.default, node, [*rows, last])


def _replace_all(nodes: list[Node], by: Node) -> None:
    for node in nodes:
        node.replace_all_uses_with(by)


def _item(node: Node, index: int) -> Node | None:
    return next((user for user in node.users if is_call(user, operator.getitem) and user.args[1] == index), None)


def _readers(node: Node | None) -> Iterator[Node]:
    """Users of a tensor, looking through its views."""
    for user in node.users if node is not None else ():
        if through_views(user) is not user:
            yield from _readers(user)
        else:
            yield user
