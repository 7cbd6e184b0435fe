"""Joint graph: choose what runs every product that reads codes. Decided here once; `lower` does it, the report says it.

Where 8-bit tensor cores hold both operands exactly, they read the codes; which kernel then multiplies is up to
:mod:`qcompile.kernels.matmul.providers`, by shape, dtype and card. Signs are read as stored where tensor cores count
bits, MXFP4 and NVFP4 where they multiply FP4. A stored weight beside activations in high precision is decoded by the
kernel that multiplies it. Everywhere else the operands are decoded for an ATen product.

Products of groups have a kernel of their own for 8-bit codes (:data:`providers.GROUPED`).

The choice is a mark of the node (:data:`~.record.PROVIDER_KEY`), which it takes along through the partitioner.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from qcompile import compat
from qcompile.ir.quantizer import Quantizer
from qcompile.ir.stored import Stored
from qcompile.ir.tensor_core_ops import block_scales, tensor_core_dtype
from qcompile.kernels.matmul import providers

from .batches import why_no_groups
from .dialect import stored_weight
from .graph import same_sizes, static_size
from .pass_base import Context
from .record import DECODED, PROVIDER_KEY, REFERENCE, Provision, marked
from .views import ProductOperand, QuantizedMM

__all__ = ["choose_providers"]

#: Tensor cores, through whichever kernel fits the extents.
AT_RUN_TIME = "cublaslt, gluon or triton"
#: Stands for an extent that is known at run time only: one that keeps no provider away.
_ALIGNED = 16
#: Levels of codes whose bits tensor cores count.
_SIGNS = (0.5, -0.5)
#: Providers that multiply codes as they are stored, which are not those of other extents.
_AS_STORED = (providers.POPCOUNT[0].name, providers.BLOCK_SCALED[0].name)


def choose_providers(graph: Graph, context: Context) -> int:
    """Marks every ``quantized_mm``; returns 0, since nothing is rewritten."""
    left_alone = "lower" in context.recipe.disable_passes
    for node in QuantizedMM.calls(graph):
        provision = Provision(REFERENCE, "the pass lower is disabled") if left_alone else _provision(node)
        marked(node, **{PROVIDER_KEY: provision})
    return 0


def _provision(node: Node) -> Provision:
    product, value = QuantizedMM.of(node), node.meta["val"]
    capability = compat.tensor_core_capability(value.device)
    if capability is None:
        return Provision(DECODED, f"no 8-bit tensor cores on {value.device.type}")
    if product.offs is not None:
        provision = _of_groups(product, value, capability)
        # What decodes for torch's product of groups decodes for bfloat16.
        by_itself = provision.provider == DECODED and value.dtype != torch.bfloat16
        return provision._replace(provider=REFERENCE) if by_itself else provision
    if value.dim() != 2:
        why = why_no_groups(product, value.shape[-2], value.shape[-1])
        if why or product.a.contracts_rows:
            return Provision(DECODED, why or "batches of transposed operands")
        return _of_groups(product, value, capability)
    if product.a.encoding.is_dense and (weight := stored_weight(product.b)) is not None:
        return _of_stored_weight(node, product, weight.stored)
    readings, why_not = _readings(*product.operands)
    bias = None if product.bias is None else product.bias.meta["val"]
    if bias is not None and not same_sizes(bias.shape, value.shape[1:]):
        return Provision(DECODED, "a bias that is broadcast over the columns")
    extents = (static_size(value.shape[0]), static_size(value.shape[1]), _contraction(product.a))
    m, n, k = (_ALIGNED if extent is None else extent for extent in extents)
    reasons: list[str] = []
    for dtypes in readings:
        described = providers.Product(
            shape=(m, n, k),
            dtypes=dtypes,
            dtype=value.dtype,
            capability=capability,
            bias=None if bias is None else bias.dtype,
            tensor_scales=all(_is_scalar(operand) for operand in product.operands),
            offsets=any(operand.encoding.format.tensor_core_offset for operand in product.operands),
        )
        provider, why = providers.choose(described)
        reasons.append(why)
        if provider.name == "reference":
            continue
        if None in extents and provider.name not in _AS_STORED:
            return Provision(AT_RUN_TIME, "extents are known at run time only")
        return Provision(provider.name, "; ".join(filter(None, reasons)))
    return Provision(DECODED, "; ".join(filter(None, (*reasons, why_not))))


def _of_groups(product: QuantizedMM, value: torch.Tensor, capability: tuple[int, int]) -> Provision:
    """What multiplies groups of rows, or groups of a contraction, whose codes `fold` leaves padded."""
    if why := _why_not_8bit(product.a) or _why_not_8bit(product.b):
        return Provision(DECODED, why)
    padded = list(map(product.has_scales_of_groups, product.operands))
    if product.contracts_groups and padded.count(True) != 1:
        return Provision(DECODED, "groups of a contraction need a gradient with scales of their own")
    if any(operand.takes_columns for operand in product.operands):
        return Provision(DECODED, "outlier columns of a product of groups")
    k = _ALIGNED if product.contracts_groups else _contraction(product.a)
    if k is None:
        return Provision(DECODED, "K is known at run time only")
    formats = [operand.encoding.format for operand in product.operands]
    rows = _rows_per_group(product, value)
    described = providers.Product(
        shape=(_ALIGNED, static_size(value.shape[-1]) or _ALIGNED, k),
        dtypes=(tensor_core_dtype(formats[0]), tensor_core_dtype(formats[1])),
        dtype=value.dtype,
        capability=capability,
        offsets=any(fmt.tensor_core_offset for fmt in formats),
        group_rows=rows or providers.GLUON_ROWS,
        contracted=product.contracts_groups,
    )
    provider, why = providers.choose(described)
    if rows is None and not product.contracts_groups and provider.name == "grouped_gluon":
        return Provision(providers.GROUPED_AT_RUN_TIME, "rows are known at run time only")
    return Provision(DECODED if provider.name == "reference" else provider.name, why)


def _rows_per_group(product: QuantizedMM, value: torch.Tensor) -> float | None:
    """On average; ``None`` where that is known at run time only. Batches are equal groups."""
    rows = static_size(value.shape[-2])
    groups = 1 if product.offs is None else static_size(product.offs.meta["val"].shape[0])
    return None if rows is None or groups is None else providers.rows_per_group(rows, groups)


def _of_stored_weight(node: Node, product: QuantizedMM, stored: Stored) -> Provision:
    """What multiplies activations in high precision with a weight that the graph was given as codes."""
    x, size, value = product.a.first.meta["val"], product.b.size, node.meta["val"]
    bias = None if product.bias is None else product.bias.meta["val"]
    if not isinstance(size, int):
        return Provision(DECODED, "K is known at run time only")
    if x.dtype != product.dtype:
        return Provision(DECODED, f"the product is {product.dtype}, its operand {x.dtype}")
    if bias is not None and not same_sizes(bias.shape, value.shape[1:]):
        return Provision(DECODED, "a bias that is broadcast over the columns")
    supported, reason = providers.supports_stored(str(stored), size, x.dtype)
    if not supported:
        return Provision(DECODED, reason)
    m, rows = static_size(x.shape[0]), product.b.contracts_rows
    if m is None:
        return Provision(providers.STORED, "M is known at run time only")
    n = product.b.first.meta["val"].shape[0]
    card = compat.card_name(value.device)
    if providers.decodes_first((m, n, size), rows, x.dtype, card):
        return Provision(DECODED, f"with M = {m}, decoding before the product is estimated to be faster")
    return Provision(providers.STORED)


def _readings(a: ProductOperand, b: ProductOperand) -> tuple[list[tuple[torch.dtype, torch.dtype]], str]:
    """The dtypes as which tensor cores can read the two operands, best first; if not as 8-bit codes, why."""
    scaled = _block_scales(a)
    if scaled is not None and scaled == _block_scales(b):
        return [(providers.FP4, providers.FP4)], ""
    if why := _why_not_8bit(a) or _why_not_8bit(b):
        return [], why
    if a.takes_columns and b.takes_columns:
        return [], "outlier columns of both operands"
    formats = a.encoding.format, b.encoding.format
    types = {fmt.tensor_core_type for fmt in formats}
    if len(types) > 1 and "int8" in types:
        return [], f"{' and '.join(sorted(map(str, types)))} do not mix on tensor cores"
    signs = _are_stored_signs(a) and _are_stored_signs(b) and not (a.takes_columns or b.takes_columns)
    as_8bit = tensor_core_dtype(formats[0]), tensor_core_dtype(formats[1])
    return [*[(providers.ONE_BIT, providers.ONE_BIT)] * signs, as_8bit], ""


def _block_scales(operand: ProductOperand) -> Quantizer | None:
    """What FP4 tensor cores read codes and scales as, as they are stored or, of squares, transposed; else ``None``."""
    spec = operand.encoding.operand
    if spec is None or spec.outliers:  # a residual beside the codes is read apart
        return None
    if operand.contracts_rows and spec.quantizer.granularity.kind != "square":
        return None
    return block_scales(spec.quantizer)


def _are_stored_signs(operand: ProductOperand) -> bool:
    """Whether tensor cores that count bits read the codes, which can be read as 8-bit ones, as they are stored."""
    one_bit = operand.encoding.operand is not None and operand.encoding.format.levels == _SIGNS
    return one_bit and not operand.contracts_rows and isinstance(operand.size, int)


def _why_not_8bit(operand: ProductOperand) -> str:
    """Why tensor cores cannot read the codes as 8-bit ones; "" if they can."""
    if operand.encoding.is_dense:
        return "an operand in high precision"
    fmt, spec = operand.encoding.format, operand.encoding.operand
    if fmt.grids:
        return f"which grid of {fmt.name} a code is of, its block's scale says"
    if fmt.tensor_core_type is None:
        return f"{fmt.name} fits no 8-bit tensor-core type"
    if spec is None:
        return ""
    granularity, scale = spec.quantizer.granularity, spec.quantizer.scale
    if granularity.kind not in ("row", "tensor") or scale.storage != "float32":
        return f"scales {granularity} {scale.name} change along the contraction"
    if granularity.kind == "row" and operand.contracts_rows:
        return "scales of rows change along the contraction (backward= folds them into the gradient)"
    if spec.outliers is None or (operand.takes_columns and not operand.contracts_rows):
        return ""  # a product of their own takes the columns
    return spec.outliers.why_no_code


def _is_scalar(operand: ProductOperand) -> bool:
    """Whether the operand has one scale; where scales were folded away, `lower` gives every row a one."""
    spec = operand.encoding.operand
    return spec is not None and spec.quantizer.granularity.kind == "tensor"


def _contraction(left: ProductOperand) -> int | None:
    """Length of the contraction, ``None`` if it is known at run time only."""
    if left.contracts_rows:
        return static_size(left.first.meta["val"].shape[-2])
    return left.size if isinstance(left.size, int) else None
