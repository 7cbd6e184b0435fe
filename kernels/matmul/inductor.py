"""``mm_8bit`` in Inductor: cuBLASLt, Gluon, or a Triton template whose epilogue takes the operations that follow.

The template is the TMA kernel of :mod:`qcompile.kernels.matmul.triton` with two differences. Its tensor descriptors
are made on the device, since Inductor passes pointers. And its output leaves by pointers, piece by piece, through
Inductor's ``store_output``, which fuses what reads the product: an activation, a residual, a cast. Each piece is stored
before the next is computed, so an epilogue needs the registers and the shared memory of one piece.

Without max-autotune the product runs on the provider that :func:`qcompile.kernels.matmul.providers.choose` names. With
it, Inductor measures that provider (cuBLASLt for FP8, Gluon for INT8) and the template's configs, with the epilogue if
``benchmark_epilogue_fusion`` is on. Where none can be generated (on CPUs, on cards without TMA, where K may be no
multiple of 16) the op's own kernel is called, which chooses by the sizes it meets. So is ``mm_1bit``, which has no
lowering; the counts of bits that it needs, ``count_bits``, are generated and fuse.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.kernel.mm import aten__fp8_mm
from torch._inductor.kernel.mm_common import persistent_mm_grid
from torch._inductor.lowering import fallback_handler, lowerings
from torch._inductor.select_algorithm import ExternKernelChoice, TritonTemplate, autotune_select_algorithm
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from qcompile.kernels.extern import own_kernel
from qcompile.kernels.quantize.inductor import is_empty

from .providers import Product, choose

if TYPE_CHECKING:
    from . import triton as gemm

__all__ = ["lower_count_bits", "lower_mm_8bit", "lower_mm_add"]

#: Most configs of the template that max-autotune measures, those that should be fastest.
_MEASURED_CONFIGS = 6

aten = torch.ops.aten

_TEMPLATE = TritonTemplate(
    name="qcompile_mm_8bit",
    grid=persistent_mm_grid,
    source=r"""
{{def_kernel("a", "b", "scale_a", "scale_b", *SUMMANDS)}}
    m = {{size("a", 0)}}
    n = {{size("b", 0)}}
    k = {{size("a", 1)}}
    if m * n == 0:
        return
    a_tiles = tl.make_tensor_descriptor(a, shape=[m, k], strides=[k, 1], block_shape=[BLOCK_M, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(b, shape=[n, k], strides=[k, 1], block_shape=[BLOCK_N, BLOCK_K])
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    in_group = GROUP_M * tiles_n
    PIECE_N: tl.constexpr = BLOCK_N // PARTS
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, NUM_SMS, flatten=True):
        first = tile // in_group * GROUP_M
        height = min(tiles_m - first, GROUP_M)
        place = tile % in_group
        row = ((first + place % height) * BLOCK_M).to(tl.int32)
        column = (place // height * BLOCK_N).to(tl.int32)
        product = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
        for step in range(tl.cdiv(k, BLOCK_K)):
            left = a_tiles.load([row, step * BLOCK_K])
            right = b_tiles.load([column, step * BLOCK_K])
            product = tl.dot(left, right.T, product, out_dtype=ACCUMULATOR)
        rows = row + tl.arange(0, BLOCK_M)
        by_row = tl.load(scale_a + rows * SCALE_A_STRIDE, mask=rows < m, other=0.0)
        pieces = pieces_of(product, PARTS)
        for piece in tl.static_range(PARTS):
            columns = column + piece * PIECE_N + tl.arange(0, PIECE_N)
            by_column = tl.load(scale_b + columns * SCALE_B_STRIDE, mask=columns < n, other=0.0)
            value = pieces[piece].to(tl.float32)
            {% if "offset_a" in SUMMANDS %}
            value += tl.load(offset_a + rows, mask=rows < m, other=0.0)[:, None]
            {% endif %}
            {% if "offset_b" in SUMMANDS %}
            value += tl.load(offset_b + columns, mask=columns < n, other=0.0)[None, :]
            {% endif %}
            value = value * by_row[:, None] * by_column[None, :]
            {% if "bias" in SUMMANDS %}
            value += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
            {% endif %}
            idx_m = rows.to(INDEX_DTYPE)[:, None]
            idx_n = columns.to(INDEX_DTYPE)[None, :]
            mask = (idx_m < m) & (idx_n < n)
            {{store_output(("idx_m", "idx_n"), "value", "mask", indent_width=12, val_shape=("BLOCK_M", "PIECE_N"))}}


@triton.jit
def pieces_of(product, PARTS: tl.constexpr):
    if PARTS == 1:
        return (product,)
    else:
        halves = tl.reshape(product, (product.shape[0], 2, product.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return pieces_of(left, PARTS // 2) + pieces_of(right, PARTS // 2)
""",
)


def mm_8bit_in_gluon(a, b, scale_a, scale_b, *summands, dtype: torch.dtype, names: tuple[str, ...]) -> torch.Tensor:
    """What generated code calls; operands as in :func:`qcompile.kernels.matmul.gluon.mm_8bit`, ``names`` those of
    ``summands``.
    """
    from . import gluon

    return gluon.mm_8bit(a, b, scale_a, scale_b, dtype, **dict(zip(names, summands, strict=True)))


_GLUON = ExternKernelChoice(mm_8bit_in_gluon, name="qcompile_mm_8bit_in_gluon", has_out_variant=False)


def lower_mm_8bit(a, b, scale_a, scale_b, dtype: torch.dtype, bias=None, offset_a=None, offset_b=None):
    """``qcompile::mm_8bit``: ``[M, N]`` in ``dtype``; M may be symbolic."""
    summands = {"bias": bias, "offset_a": offset_a, "offset_b": offset_b}
    arguments = (a, b, scale_a, scale_b, dtype, *summands.values())
    as_extern = partial(own_kernel, torch.ops.qcompile.mm_8bit.default, *arguments)
    if not ir.is_triton(a) or is_empty(a, b):
        return as_extern()
    from . import triton as gemm  # imports Triton, which a build of torch for CPUs does without

    names = tuple(name for name, x in summands.items() if x is not None)
    operands = [_realized(x) for x in (a, b, scale_a, scale_b, *(summands[name] for name in names))]
    (m, k), n = a.get_size(), b.get_size()[0]
    card = gemm.card_of(a.get_device())
    product = Product(
        shape=(m, n, k),
        dtypes=(a.get_dtype(), b.get_dtype()),
        dtype=dtype,
        capability=card.capability,
        bias=None if bias is None else bias.get_dtype(),
        tensor_scales=not (_is_of_rows(scale_a) or _is_of_rows(scale_b)),
        offsets=offset_a is not None or offset_b is not None,
    )
    provider = choose(product)[0].name
    measure = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    if measure or provider == "triton":
        operands[:2] = map(_of_own_dtype, operands[:2])
    layout = ir.FixedLayout(a.get_device(), dtype, [m, n])
    choices: list[Any] = []
    inputs = operands
    if provider == "cublaslt":
        if not product.tensor_scales:
            operands[2:4] = _of_rows(operands[2], m), _of_rows(operands[3], n)
        inputs = [operands[0], _transposed(operands[1]), operands[2], _transposed(operands[3]), *operands[4:]]
        aten__fp8_mm.maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, out_dtype=dtype, use_fast_accum=True
        )
    if provider == "gluon":
        _GLUON.maybe_append_choice(choices, input_nodes=operands, layout=layout, dtype=dtype, names=names)
    if provider != "reference" and (measure or not choices) and _fits_tma(operands, card):
        rows, columns, depth = (V.graph.sizevars.optimization_hint(extent) for extent in (m, n, k))
        configs = _template_configs(gemm.Problem(rows, columns, depth, *product.dtypes, dtype, card))
        for config in configs[: _MEASURED_CONFIGS if measure else 1]:
            _append_template(choices, operands, names, layout, config, card)
    if not choices:
        return as_extern()
    if len(choices) == 1:
        return choices[0].output_node()
    selected = autotune_select_algorithm("qcompile_mm_8bit", choices, inputs, layout)
    return selected[0] if isinstance(selected, tuple) else selected  # torch 2.13 names the choice as well


class _AddProduct(ir.ExternKernel):
    """``sum += a · b`` in a buffer that exists: of ``addmm`` with another output torch copies the summand first."""

    def __init__(self, total, a, b) -> None:
        operands = [self.realize_input(x) for x in (total, a, b)]
        super().__init__(None, ir.NoneLayout(device=total.get_device()), self.unwrap_storage(operands))
        V.graph.mark_buffer_mutated(self.input_name(0))
        self.name = V.graph.register_buffer(self)
        V.graph.register_operation(self)

    def codegen(self, wrapper: Any) -> None:
        total, a, b = (x.codegen_reference() for x in self.inputs)  # type: ignore[union-attr]
        wrapper.writeline(f"extern_kernels.addmm({total}, {a}, {b}, out={total}){wrapper.ending}")

    def should_allocate(self) -> bool:
        return False

    def get_mutation_names(self):
        return [self.input_name(0)]

    def get_unbacked_symbol_defs(self):
        return OrderedSet()


def lower_mm_add(total, a, b):
    """``qcompile::mm_add``: in place by cuBLAS, ``[M, N]``. Where Inductor measures what adds a matrix, as ``addmm``:
    so under max-autotune, on CPUs, and in C++.
    """
    measure = inductor_config.max_autotune or inductor_config.max_autotune_gemm
    if measure or V.graph.cpp_wrapper or not ir.is_triton(total) or is_empty(total, a, b):
        return _call(aten.addmm.default, total, a, b)
    total.realize()
    _AddProduct(total, a, b)
    return total


def lower_count_bits(codes):
    """``qcompile::count_bits``: the reference's operations as one loop over bytes."""
    of_2 = _call(aten.sub.Tensor, codes, _field(codes, 1, 0x55))
    of_4 = _call(aten.add.Tensor, _field(of_2, 0, 0x33), _field(of_2, 2, 0x33))
    of_8 = _field(_call(aten.add.Tensor, of_4, _call(aten.bitwise_right_shift.Tensor_Scalar, of_4, 4)), 0, 0x0F)
    return _call(aten.sum.dim_IntList, of_8, [-1], True, dtype=torch.float32)


def _field(x, shift: int, mask: int):
    shifted = _call(aten.bitwise_right_shift.Tensor_Scalar, x, shift) if shift else x
    return _call(aten.bitwise_and.Scalar, shifted, mask)


def _call(op: torch._ops.OpOverload, *arguments, **options):
    return lowerings[op](*arguments, **options)


def _realized(x):
    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(x))


def _of_own_dtype(x):
    """``x``, if it is a view in another dtype as the result of a call: templates and their benchmark read the dtype of
    the buffer that a view looks at.
    """
    if not isinstance(x, ir.ReinterpretView) or x.data.get_dtype() == x.get_dtype():
        return x
    layout = x.get_layout()
    stored = ir.FixedLayout(layout.device, x.data.get_dtype(), layout.size, layout.stride, layout.offset)
    unviewed = ir.TensorBox(ir.ReinterpretView(data=x.data, layout=stored))
    return _realized(fallback_handler(torch.ops.aten.view.dtype, add_to_fallback_set=False)(unviewed, x.get_dtype()))


def _transposed(x):
    return ir.ExternKernel.realize_input(lowerings[torch.ops.aten.permute.default](ir.TensorBox(x), [1, 0]))


def _is_of_rows(scale) -> bool:
    """Whether scales are ``[rows, 1]``; one row may be taken for a tensor."""
    return not V.graph.sizevars.statically_known_equals(scale.get_size()[0], 1)


def _of_rows(scale, rows):
    """Scales ``[rows, 1]``, also from ``[1, 1]``: cuBLASLt takes scales of rows on both sides, or on none."""
    if _is_of_rows(scale):
        return scale
    spread = lowerings[torch.ops.aten.expand.default](ir.TensorBox(scale), [rows, 1])
    return _realized(lowerings[torch.ops.aten.clone.default](spread, memory_format=torch.contiguous_format))


def _fits_tma(operands, card: gemm.Card) -> bool:
    from . import triton as gemm

    a, b = operands[:2]
    whole = V.graph.sizevars.statically_known_multiple_of(a.get_size()[1], gemm.TMA_ALIGNMENT)
    return card.capability >= (9, 0) and whole and not (ir.is_unaligned(a) or ir.is_unaligned(b))


def _template_configs(problem: gemm.Problem) -> list[gemm.Config]:
    """The tiles of :data:`CONFIGS` with the fewest parts whose pieces, in float32, have room; the best first."""
    from . import triton as gemm

    worst = replace(problem, dtype=torch.float32)  # an epilogue may cast
    tiles = {}
    for config in gemm.CONFIGS:
        whole = replace(config, parts=1, tma_store=False, flatten=True)
        fitting = [cut for parts in (1, 2, 4) if gemm.fits(cut := replace(whole, parts=parts), worst)]
        if fitting:
            tiles[whole] = fitting[0]
    return sorted(tiles.values(), key=lambda config: gemm.predicted_cycles(config, problem))


def _append_template(choices, operands, summands, layout, config: gemm.Config, card: gemm.Card) -> None:
    """``summands``: names of the operands after the scales."""
    a, _, scale_a, scale_b = operands[:4]
    _TEMPLATE.maybe_append_choice(
        choices,
        input_nodes=operands,
        layout=layout,
        num_stages=config.stages,
        num_warps=config.warps,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        PARTS=config.parts,
        NUM_SMS=card.processors * config.resident,
        ACCUMULATOR="tl.int32" if a.get_dtype() == torch.int8 else "tl.float32",
        SCALE_A_STRIDE=int(_is_of_rows(scale_a)),
        SCALE_B_STRIDE=int(_is_of_rows(scale_b)),
        SUMMANDS=summands,
    )
