"""What can run ``mm_8bit``, ``mm_1bit`` and ``mm_block_scaled``, which of it runs a product, and why nothing better.

========= =============================================== ======================= =========================
provider  operands                                        compute capability      output
========= =============================================== ======================= =========================
cublaslt  FP8, not both e5m2, without offsets; N and K    9.0; 8.9 with one scale bfloat16, as is its bias
          multiples of 16                                 a tensor
gluon     both INT8; K a multiple of 16                   9.0                     bfloat16, float16, float32
triton    FP8, or both INT8; any extents                  8.9 for FP8, 8.0 for    bfloat16, float16, float32
                                                          INT8
reference any                                             any                     any
========= =============================================== ======================= =========================

cuBLASLt sums with fast accumulation: the tensor cores' own accumulator, 14 significant bits on Hopper, over all of K.
4-bit codes are exact in it (see :mod:`qcompile.kernels.matmul.triton`); arbitrary FP8 codes, those of a gradient, lose
about 2^-14 of the running sum an addition there as in Triton.

Of ``mm_1bit``, whose operands are stored single bits:

========== ============================================== ======================= =========================
provider   operands                                       compute capability      output
========== ============================================== ======================= =========================
popcount   K a multiple of 128                            9.0                     bfloat16, float16, float32
reference  any                                            any                     any
========== ============================================== ======================= =========================

Of ``mm_block_scaled``, whose operands are stored E2M1 codes with scales of blocks along K:

========== ============================================== ======================= =========================
provider   scales of both operands                        compute capability      output
========== ============================================== ======================= =========================
dot_scaled E8M0 of 32 elements, or E4M3 of 16; any        10.0, 10.3, 12.0; all   bfloat16, float16, float32
           extents                                        of them untested
reference  the same                                       any                     any
========== ============================================== ======================= =========================

Of ``mm_8bit_grouped``, whose rows or contraction are in groups of any sizes:

============= =========================================== ======================= =========================
provider      operands                                    compute capability      output
============= =========================================== ======================= =========================
grouped_gluon FP8, or both INT8; the contraction in       9.0                     bfloat16, float16, float32
              groups, or rows in groups of 128 and more
              on average; K a multiple of 16
grouped       FP8, or both INT8, without offsets; K a     9.0                     bfloat16, float16, float32
              multiple of 16
reference     the same, any K                             any                     any
============= =========================================== ======================= =========================

Of ``mm_stored``, whose weight is stored in 4 bits and whose other operand is in high precision:

========== ============================================== ======================= =========================
provider   weight                                         compute capability      x
========== ============================================== ======================= =========================
stored     two codes per byte; scales of rows or blocks   9.0                     bfloat16, float16, float32
           of a multiple of 16 elements, nested ones
           too; K a multiple of 8
reference  any                                            any                     any
========== ============================================== ======================= =========================

Tensor cores for FP4 begin with compute capability 10 (Blackwell) and want such scales. With a scale for a row, the same
FP8 codes give the same product there, through kernels that have run elsewhere, at half the rate of FP4. Blocks that all
have the scale 1 would be FP4 as well: Triton 3.6 aborts where both operands have such a constant, and a tensor of ones
is one more to read, so that waits for a card to measure it on. None of this has been run on one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.stored import Stored

from . import reference
from .costs import rates_of

__all__ = [
    "BLOCK_SCALED",
    "FP4",
    "GROUPED",
    "ONE_BIT",
    "POPCOUNT",
    "PROVIDERS",
    "STORED",
    "Product",
    "Provider",
    "choose",
    "decodes_first",
    "mm_1bit",
    "mm_8bit",
    "mm_8bit_grouped",
    "mm_block_scaled",
    "multiplies_groups",
    "rows_per_group",
    "supports_stored",
]

#: Two E2M1 codes, or eight single bits, a byte: what stands for the dtype of stored codes, uint8, where they are
#: multiplied as they are.
FP4, ONE_BIT = torch.float4_e2m1fn_x2, torch.bits1x8
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: What the kernels in Triton and Gluon write.
_WRITTEN = (torch.bfloat16, torch.float16, torch.float32)
#: The compute capability on which all of this has run.
_TESTED = (9, 0)
#: Those for which Triton 3.6 and 3.7 both make FP4 instructions of ``dot_scaled``. For 12.1 they widen E8M0 scales and
#: fail on E4M3 ones; for 10.1 and 11.0 one of the two does not compile.
_WITH_FP4 = ((10, 0), (10, 3), (12, 0))


@dataclass(frozen=True)
class Product:
    """What decides about the provider of one ``mm_8bit``; or, with two operands of :data:`ONE_BIT`, ``mm_1bit``, and of
    :data:`FP4`, ``mm_block_scaled``.

    Attributes:
        shape: (M, N, K); symbolic extents count as multiples of 16 where they are so by their form.
        dtypes: of a and b.
        dtype: of the output.
        capability: compute capability of the card.
        bias: dtype of the bias, ``None`` without one.
        tensor_scales: whether both scales are ``[1, 1]``.
        offsets: whether something is added before the scales.
        group_rows: of ``mm_8bit_grouped``, one product for each group: a's rows per group; 0 if there are no groups.
        contracted: whether these are groups of the contraction, not of a's rows.
    """

    shape: tuple[Any, Any, Any]
    dtypes: tuple[torch.dtype, torch.dtype]
    dtype: torch.dtype
    capability: tuple[int, int]
    bias: torch.dtype | None = None
    tensor_scales: bool = False
    offsets: bool = False
    group_rows: float = 0.0
    contracted: bool = False


@dataclass(frozen=True)
class Provider:
    """An implementation of one of the ops.

    Attributes:
        name: what the report calls it.
        run: the kernel, with the signature of the op.
        obstacle: why it cannot run a product, empty if it can.
    """

    name: str
    run: Callable[..., Tensor]
    obstacle: Callable[[Product], str]


def choose(product: Product) -> tuple[Provider, str]:
    """The first provider that can run ``product``, and what kept those before it, one reason each.

    The reason also says if this was never tried on such a card. ``reference`` can always run.
    """
    reasons = []
    for provider in GROUPED if product.group_rows else _AS_STORED.get(product.dtypes[0], PROVIDERS):
        obstacle = provider.obstacle(product)
        if not obstacle:
            break
        reasons.append(f"{provider.name}: {obstacle}")
    if product.capability != _TESTED and provider.name != "reference":
        major, minor = product.capability
        reasons.append(f"{provider.name} is untested on compute capability {major}.{minor}")
        if major >= 10 and product.dtypes[0] in _FP8:
            reasons.append("its native FP4 would need a scale for every 16 or 32 elements")
    return provider, "; ".join(reasons)


def mm_8bit(a: Tensor, b: Tensor, *arguments: Any) -> Tensor:
    """``qcompile::mm_8bit`` on CUDA by the provider that :func:`choose` names; ``arguments`` as in the reference."""
    return _mm((a.dtype, b.dtype), a.shape[1], a, b, *arguments)


def mm_1bit(a: Tensor, b: Tensor, *arguments: Any) -> Tensor:
    """``qcompile::mm_1bit`` on CUDA by the provider that :func:`choose` names; ``arguments`` as of :func:`mm_8bit`."""
    return _mm((ONE_BIT, ONE_BIT), 8 * a.shape[1], a, b, *arguments)


def _mm(
    dtypes: tuple[torch.dtype, torch.dtype],
    k: int,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    offset_a: Tensor | None = None,
    offset_b: Tensor | None = None,
) -> Tensor:
    product = Product(
        shape=(a.shape[0], b.shape[0], k),
        dtypes=dtypes,
        dtype=dtype,
        capability=_capability(a.device),
        bias=None if bias is None else bias.dtype,
        tensor_scales=scale_a.shape[0] == scale_b.shape[0] == 1,
        offsets=offset_a is not None or offset_b is not None,
    )
    return _chosen(product).run(a, b, scale_a, scale_b, dtype, bias, offset_a, offset_b)


def mm_8bit_grouped(
    a: Tensor, b: Tensor, offs: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """``qcompile::mm_8bit_grouped`` on CUDA by the provider that :func:`choose` names; as in the reference."""
    product = Product(
        shape=(a.shape[0], b.shape[-2], a.shape[1]),
        dtypes=(a.dtype, b.dtype),
        dtype=dtype,
        capability=_capability(a.device),
        bias=None if bias is None else bias.dtype,
        group_rows=rows_per_group(a.shape[0], offs.shape[0]),
        contracted=b.dim() == 2,
    )
    return _chosen(product).run(a, b, offs, scale_a, scale_b, dtype, bias)


def mm_block_scaled(a: Tensor, b: Tensor, *arguments: Any) -> Tensor:
    """``qcompile::mm_block_scaled`` on CUDA by the provider that :func:`choose` names; ``arguments`` as in the
    reference.
    """
    dtype, *bias = arguments[4:]
    product = Product(
        shape=(a.shape[0], b.shape[0], 2 * a.shape[1]),
        dtypes=(FP4, FP4),
        dtype=dtype,
        capability=_capability(a.device),
        bias=bias[0].dtype if bias and bias[0] is not None else None,
    )
    return _chosen(product).run(a, b, *arguments)


@cache
def _chosen(product: Product) -> Provider:
    return choose(product)[0]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# --- cuBLASLt -------------------------------------------------------------------------------------------------------


def _obstacle_to_cublaslt(product: Product) -> str:
    _, n, k = product.shape
    checks = {
        "it multiplies FP8 only": all(dtype in _FP8 for dtype in product.dtypes),
        "it does not multiply e5m2 with e5m2": torch.float8_e4m3fn in product.dtypes,
        "it adds nothing before the scales": not product.offsets,
        "there is nothing to multiply": 0 not in product.shape,
        "FP8 needs compute capability 8.9": product.capability >= (8, 9),
        "scales of rows need compute capability 9.0": product.capability >= (9, 0) or product.tensor_scales,
        f"this build of torch has CUDA {torch.version.cuda}, it needs 12.1": _cuda_version() >= (12, 1),
        f"K = {k} is no multiple of 16": k % 16 == 0,
        f"N = {n} is no multiple of 16": n % 16 == 0,
        f"it writes bfloat16, not {_name(product.dtype)}": product.dtype == torch.bfloat16,
        f"its bias is bfloat16, not {_name(product.bias)}": product.bias in (None, torch.bfloat16),
    }
    return next((reason for reason, passed in checks.items() if not passed), "")


def _run_cublaslt(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    offset_a: None = None,
    offset_b: None = None,
) -> Tensor:
    if scale_a.shape[0] != 1 or scale_b.shape[0] != 1:  # scales of rows on both sides, or none
        scale_a = scale_a.expand(a.shape[0], 1).contiguous()
        scale_b = scale_b.expand(b.shape[0], 1).contiguous()
    # scale_result belongs to FP8 outputs.
    return torch._scaled_mm(
        a.contiguous(), b.contiguous().t(), scale_a, scale_b.t(), bias, None, dtype, use_fast_accum=True
    )


def _cuda_version() -> tuple[int, ...]:
    return tuple(int(part) for part in (torch.version.cuda or "0").split("."))


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


# --- Triton ---------------------------------------------------------------------------------------------------------


def _obstacle_to_triton(product: Product) -> str:
    fp8 = all(dtype in _FP8 for dtype in product.dtypes)
    int8 = product.dtypes == (torch.int8, torch.int8)
    checks = {
        f"tensor cores do not multiply {' with '.join(map(_name, product.dtypes))}": fp8 or int8,
        "there is nothing to multiply": 0 not in product.shape,
        "INT8 needs compute capability 8.0": fp8 or product.capability >= (8, 0),
        "FP8 needs compute capability 8.9 (integer grids as INT8: 8.0)": int8 or product.capability >= (8, 9),
        f"it writes bfloat16, float16 and float32, not {_name(product.dtype)}": product.dtype in _WRITTEN,
        "it is not installed": _has_triton(),
    }
    return next((reason for reason, passed in checks.items() if not passed), "")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _run_triton(*arguments: Any) -> Tensor:
    from . import triton  # imports Triton, which a build of torch for CPUs does without

    return triton.mm_8bit(*arguments)


# --- Gluon ----------------------------------------------------------------------------------------------------------


def _obstacle_to_gluon(product: Product) -> str:
    if product.dtypes != (torch.int8, torch.int8):
        return "it is used for INT8 only"
    return _obstacle_in_gluon(product, 16)


def _obstacle_in_gluon(product: Product, multiple: int) -> str:
    """Why its kernel does not multiply operands with K a multiple of ``multiple``; empty if it does."""
    k, hopper = product.shape[2], product.capability == (9, 0)
    error = _gluon_error() if hopper else ""
    checks = {
        "there is nothing to multiply": 0 not in product.shape,
        "it needs compute capability 9.0": hopper,
        f"K = {k} is no multiple of {multiple}": k % multiple == 0,
        f"it writes bfloat16, float16 and float32, not {_name(product.dtype)}": product.dtype in _WRITTEN,
        f"its kernel cannot be imported: {error}": not error,
    }
    return next((reason for reason, passed in checks.items() if not passed), "")


@cache
def _gluon_error() -> str:
    """Why the kernels in Gluon cannot be imported (no Triton, other names there or in Inductor); empty if they can."""
    try:
        from . import gluon  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def _run_gluon(*arguments: Any) -> Tensor:
    from . import gluon

    return gluon.mm_8bit(*arguments)


# --- single bits ----------------------------------------------------------------------------------------------------


def _obstacle_to_popcount(product: Product) -> str:
    return _obstacle_in_gluon(product, 128)


def _run_popcount(*arguments: Any) -> Tensor:
    from . import gluon

    return gluon.mm_1bit(*arguments)


#: Best first.
PROVIDERS = (
    Provider("cublaslt", _run_cublaslt, _obstacle_to_cublaslt),
    Provider("gluon", _run_gluon, _obstacle_to_gluon),
    Provider("triton", _run_triton, _obstacle_to_triton),
    Provider("reference", reference.mm_8bit, lambda product: ""),
)


# --- groups ---------------------------------------------------------------------------------------------------------


def multiplies_groups(capability: tuple[int, int] | None) -> bool:
    """Whether the kernel for groups runs on cards of this compute capability; ``None``: no card."""
    return capability is not None and capability >= (9, 0)


def _obstacle_to_grouped(product: Product) -> str:
    k = product.shape[2]
    checks = {
        "it adds nothing before the scales": not product.offsets,
        "the kernel for groups needs compute capability 9.0": multiplies_groups(product.capability),
        f"K = {k} is no multiple of 16": k % 16 == 0,
    }
    return next((reason for reason, passed in checks.items() if not passed), "") or _obstacle_to_triton(product)


def _run_grouped(*arguments: Any) -> Tensor:
    from . import grouped

    return grouped.mm_8bit_grouped(*arguments)


#: Rows per group from which tiles of as many serve; the kernel in Triton has lower ones.
GLUON_ROWS = 128


def rows_per_group(rows: int, groups: int) -> float:
    """On average, as :attr:`Product.group_rows` counts them: never 0, which stands for no groups."""
    return max(1, rows) / max(1, groups)


def _obstacle_to_grouped_gluon(product: Product) -> str:
    low = not product.contracted and product.group_rows < GLUON_ROWS
    few = f"groups of {product.group_rows:.3g} rows on average are lower than its tiles of {GLUON_ROWS}" if low else ""
    return few or _obstacle_to_grouped(product) or _obstacle_in_gluon(product, 16)


def _run_grouped_gluon(*arguments: Any) -> Tensor:
    from . import gluon

    return gluon.mm_8bit_grouped(*arguments)


#: Best first, for products of groups.
GROUPED = (
    Provider("grouped_gluon", _run_grouped_gluon, _obstacle_to_grouped_gluon),
    Provider("grouped", _run_grouped, _obstacle_to_grouped),
    Provider("reference", reference.mm_8bit_grouped, lambda product: ""),
)
#: What the report calls the first two, where rows per group are known at run time only.
GROUPED_AT_RUN_TIME = "grouped_gluon or grouped"


# --- FP4 ------------------------------------------------------------------------------------------------------------


def _obstacle_to_dot_scaled(product: Product) -> str:
    checks = {
        "there is nothing to multiply": 0 not in product.shape,
        "no FP4 tensor cores, which take scales of blocks, before compute capability 10.0": product.capability >= (10,),
        "Triton reaches FP4 tensor cores of compute capability 10.0, 10.3 and 12.0": product.capability in _WITH_FP4,
        f"it writes bfloat16, float16 and float32, not {_name(product.dtype)}": product.dtype in _WRITTEN,
        "Triton is not installed": _has_triton(),
    }
    return next((reason for reason, passed in checks.items() if not passed), "")


def _run_dot_scaled(*arguments: Any) -> Tensor:
    from . import block_scaled

    return block_scaled.mm_block_scaled(*arguments)


# --- stored weights -------------------------------------------------------------------------------------------------

#: What the report calls the kernels that decode a stored weight where it is multiplied, or before cuBLAS.
STORED = "stored"


def supports_stored(stored: str, size: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether :mod:`.stored` multiplies ``dtype`` with weights stored so, rows of ``size``; and if not, why."""
    if not _has_triton():
        return False, "Triton is not installed"
    from . import stored as kernels

    reason = kernels.obstacle(Stored.parse(stored), size, dtype)
    return not reason, reason


def decodes_first(shape: tuple[int, int, int], rows: bool, dtype: torch.dtype, card: str) -> bool:
    """Whether x ``[M, …]`` of ``shape`` (M, N, K) waits for the weight to be decoded; ``rows``: whether those of the
    weight are contracted. ``card``: as torch names it. The kernel decides alike, where M is known at run time only.
    """
    from . import stored as kernels

    return kernels.config_for(shape, rows, dtype, rates_of(card)[0]) is None


#: Best first, for stored E2M1 codes with scales of blocks.
BLOCK_SCALED = (
    Provider("dot_scaled", _run_dot_scaled, _obstacle_to_dot_scaled),
    Provider("reference", reference.mm_block_scaled, lambda product: ""),
)
#: The same for stored signs.
POPCOUNT = (
    Provider("popcount", _run_popcount, _obstacle_to_popcount),
    Provider("reference", reference.mm_1bit, lambda product: ""),
)
#: What multiplies codes as they are stored; all else is :data:`PROVIDERS`.
_AS_STORED = {FP4: BLOCK_SCALED, ONE_BIT: POPCOUNT}
