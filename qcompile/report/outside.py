"""What runs in Python between Dynamo's graphs while `explain` runs a model: products that no graph holds.

A module whose parameter some graph reads may still run in Python: DoRA's graph reads the norm of the base layer's
weight, and the layer's own product stays outside. So products are seen where they happen, as ATen ops that reach a
dispatch mode. Dynamo captures as without the mode, which says that it ignores the compiler's internals.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qcompile import compat

from .rows import NOT_CAPTURED, Row, bare_row, shape_text
from .saved import storage_of

__all__ = ["OutsideGraphs"]

aten = torch.ops.aten

#: ATen ops that multiply matrices when Python runs a model: the positions of the two operands, and what it is called.
PRODUCTS: dict[Any, tuple[int, int, str]] = {
    aten.mm: (0, 1, "mm"),
    aten.addmm: (1, 2, "addmm"),
    aten.bmm: (0, 1, "bmm"),
    aten.baddbmm: (1, 2, "baddbmm"),
    aten.addbmm: (1, 2, "addbmm"),
    aten.mv: (0, 1, "mv"),
    aten.addmv: (1, 2, "addmv"),
    aten.linear: (0, 1, "linear"),
    aten._trilinear: (0, 1, "bilinear"),
    aten.convolution: (0, 1, "conv"),
    aten._convolution: (0, 1, "conv"),
    aten._grouped_mm: (0, 1, "_grouped_mm"),
    aten._scaled_mm: (0, 1, "_scaled_mm"),
    aten._int_mm: (0, 1, "_int_mm"),
    aten._scaled_dot_product_flash_attention: (0, 1, "sdpa"),
    aten._scaled_dot_product_flash_attention_for_cpu: (0, 1, "sdpa"),
    aten._scaled_dot_product_efficient_attention: (0, 1, "sdpa"),
    aten._scaled_dot_product_cudnn_attention: (0, 1, "sdpa"),
    aten._native_multi_head_attention: (0, 5, "multi_head_attention"),
    aten._transformer_encoder_layer_fwd: (0, 3, "transformer_encoder_layer"),
    aten.mkldnn_rnn_layer: (0, 1, "rnn"),
    aten._cudnn_rnn: (0, 1, "rnn"),
    aten.miopen_rnn: (0, 1, "rnn"),
}


class Product(NamedTuple):
    """What ran in Python: ``parameter`` is the layer's that it read, "" if it read a computed one or none."""

    layer: str
    parameter: str
    op: str
    shape: str

    @property
    def of(self) -> str:
        """The parameter, where the layer's name alone does not tell it."""
        return "" if not self.parameter or self.parameter.startswith("weight") else f"{self.parameter}: "


class OutsideGraphs(compat.TorchDispatchMode):
    """Sees the ATen ops that Python runs, except within :meth:`inside` and while torch traces.

    Attributes:
        products: how often each product ran, in the order of first runs.
        readers: modules of whose parameters an op read one, views excepted.
        watching: whether the mode is on.
    """

    supports_higher_order_operators = True

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        modules = list(model.named_modules()) if isinstance(model, nn.Module) else []
        self.products: Counter[Product] = Counter()
        self.readers: set[str] = set()
        self._root = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "")
        self._names = {id(module): name for name, module in modules}
        self._owners: dict[int, dict[str, str]] = {}  # of a parameter, by what it is called there
        for name, module in modules:
            for key, parameter in module.named_parameters(recurse=False):
                self._owners.setdefault(storage_of(parameter), {})[name] = key
        self._depth = 0
        self.watching = False

    def __enter__(self) -> Self:
        self.watching = True
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.watching = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While a compiled graph runs: its products have rows of their own."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._depth == 0 and isinstance(func, compat.OpOverload) and not compat.is_tracing():
            self._see(func, args)
        return func(*args, **(kwargs or {}))

    def _see(self, func: compat.OpOverload, args: Sequence[Any]) -> None:
        if (product := PRODUCTS.get(func.overloadpacket)) is not None:
            first, second, op = product
            operands = [_first_tensor(args[first]), _first_tensor(args[second])]
            layer, parameter = self._owner(operands)
            weight_first = storage_of(operands[0]) in self._owners
            self.products[Product(layer or self._root, parameter, *_as_spelled(op, operands, weight_first))] += 1
        if not _is_view(func):
            tensors = [leaf for leaf in compat.tree_leaves(args) if isinstance(leaf, Tensor)]
            self.readers.update(name for tensor in tensors for name in self._owners.get(storage_of(tensor), ()))

    def _owner(self, operands: list[Tensor]) -> tuple[str, str]:
        """A module and its parameter that is an operand; of several modules the one that is running. Else that one."""
        running = self._running()
        for operand in operands:
            if owners := self._owners.get(storage_of(operand)):
                return (running, owners[running]) if running in owners else next(iter(owners.items()))
        return running, ""

    def _running(self) -> str:
        frame: Any = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and (name := self._names.get(id(frame.f_locals.get(code.co_varnames[0])))) is not None:
                return name
            frame = frame.f_back
        return ""

    def rows(self) -> list[Row]:
        """A row for each product that ran."""
        return [
            bare_row(
                product.layer,
                product.op,
                product.shape,
                NOT_CAPTURED,
                f"{product.of}ran in Python, no graph has it" + (f" ({count} times)" if count > 1 else ""),
            )
            for product, count in self.products.items()
        ]


def _first_tensor(operand: Any) -> Tensor:
    return operand[0] if isinstance(operand, (list, tuple)) else operand


def _as_spelled(op: str, operands: list[Tensor], weight_first: bool) -> tuple[str, str]:
    """Name and shape as a model would write them: ``linear`` where the weight is right and read transposed."""
    left, right = operands
    if op in ("mm", "addmm") and right.stride(0) == 1 and not right.is_contiguous() and not weight_first:
        return "linear", shape_text([left.shape, right.shape[::-1]])
    if op == "conv":
        op = f"conv{right.dim() - 2}d"
    return op, shape_text([left.shape, right.shape])


def _is_view(func: compat.OpOverload) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)
