"""Joint graph: quantize tokens once, and let experts gather their codes.

A mixture of experts gathers every token once for each of its experts, and then quantizes what it has gathered. A row's
codes do not depend on the other rows, so they may be gathered instead: each token is quantized once, the forward moves
codes, and what is saved for the backward are the codes of tokens, however many experts read one::

    quantize(index(x, [rows]))   ─►   index(quantize(x), [rows])

The gathered copies are made again in the backward. Only where at least as many rows are gathered as there are, and not
where an estimator's mask is taken of the gathered rows, which is found together with their codes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node

from qcompile import compat

from .graph import emit, input_of, is_gather, item_of, static_size
from .pass_base import Context
from .views import EstimatorMask, Quantize, QuantizeCompensated

__all__ = ["gather_codes"]

_AGAIN = compat.CheckpointPolicy.MUST_RECOMPUTE


def gather_codes(graph: Graph, context: Context) -> int:
    """Returns how many quantizations gather codes now."""
    made: dict[Any, list[Node]] = {}
    count = 0
    for node in [*Quantize.calls(graph), *QuantizeCompensated.calls(graph)]:
        call = Quantize.match(node) or QuantizeCompensated.of(node)
        gather = call.x
        if not is_gather(gather) or not _commutes(call) or any(EstimatorMask.match(user) for user in gather.users):
            continue
        source = replace(call, x=input_of(gather))
        with graph.inserting_before(node):
            if source not in made:
                made[source] = source.emit_results(graph, near=node)
            for user in list(node.users):
                item = item_of(user)
                assert item is not None
                part = emit(graph, user, gather.target, made[source][item[1]], *gather.args[1:])
                part.meta.setdefault("recompute", _AGAIN)
                user.replace_all_uses_with(part)
                graph.erase_node(user)
        graph.erase_node(node)
        count += 1
    return count


def _commutes(call: Quantize | QuantizeCompensated) -> bool:
    """Whether a gathered row has the codes that it has among all rows, of which there are no more."""
    gathered, source = call.x.meta["val"], input_of(call.x).meta["val"]
    rows = static_size(gathered.shape[0]), static_size(source.shape[0])
    if source.dim() != 2 or None in rows or rows[0] < rows[1] or call.axis % 2 == 0:  # type: ignore[operator]
        return False
    if isinstance(call, QuantizeCompensated):
        return True
    rowwise = call.quantizer.granularity.kind in ("row", "block")
    return rowwise and call.global_scale is None and call.seed is None
