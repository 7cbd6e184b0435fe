"""Registers the kernels of the ``qcompile::`` ops with the dispatcher.

An op has a list of providers per device type, best first; a call runs the first that supports its dtypes,
quantizer and estimator. The last one is always the plain-torch reference, also the default of other devices.
:func:`provider_of` says which one runs and why; the report prints it. On CUDA, calls of a kind are recorded once and
replayed (:mod:`qcompile.kernels.replay`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch

import qcompile.ir.tensor_core_ops  # noqa: F401  (defines the ops)
from qcompile import compat
from qcompile.ir.ops import LIB

from .estimate import cpp as estimate_cpp
from .estimate import reference as estimate
from .matmul import providers as matmul_providers
from .matmul import reference as matmul
from .outliers import cpp as outliers_cpp
from .outliers import reference as outliers
from .producer import Producer
from .quantize import cpp as quantize_cpp
from .quantize import reference as quantize
from .replay import replayed
from .transform import cpp as transform_cpp
from .transform import reference as transform

__all__ = ["DIRECT", "REFERENCES", "Provider", "provider_of", "supports_produced"]

REFERENCES: dict[str, Callable[..., Any]] = {
    "quantize": quantize.quantize,
    "quantize_compensated": quantize.quantize_compensated,
    "encode_compensated": quantize.encode_compensated,
    "quantize_produced": quantize.quantize_produced,
    "quantize_8bit": quantize.quantize_8bit,
    "quantize_8bit_masked": quantize.quantize_8bit_masked,
    "quantize_8bit_transposed": quantize.quantize_8bit_transposed,
    "quantize_8bit_pair": quantize.quantize_8bit_pair,
    "quantize_groups": quantize.quantize_groups,
    "quantize_groups_pair": quantize.quantize_groups_pair,
    "recode": quantize.recode,
    "transpose_codes": quantize.transpose_codes,
    "dequantize": quantize.dequantize,
    "dequantize_groups": quantize.dequantize_groups,
    "clamp_outliers": outliers.clamp_outliers,
    "restore_outliers": outliers.restore_outliers,
    "hadamard": transform.hadamard,
    "estimator_mask": estimate.estimator_mask,
    "mask_gradient": estimate.mask_gradient,
    "scale_gradient": estimate.scale_gradient,
    "quantized_mm": matmul.quantized_mm,
    "mm_8bit": matmul.mm_8bit,
    "mm_8bit_grouped": matmul.mm_8bit_grouped,
    "mm_1bit": matmul.mm_1bit,
    "count_bits": matmul.count_bits,
    "mm_block_scaled": matmul.mm_block_scaled,
    "mm_stored": matmul.mm_stored,
    "mm_add": torch.addmm,
}


@dataclass(frozen=True)
class Provider:
    """An implementation of one op on one device type.

    Attributes:
        name: what the report calls it.
        run: the kernel, with the signature of the op.
        supports: ``(dtypes, *texts) -> (whether, reason if not)`` with the dtypes of its floating-point tensors, as
            ``key`` lists them.
        key: the arguments of ``supports`` out of the arguments of the op.
        texts: which texts of the op ``supports`` takes; ``None`` if it asks for extents, which a report does not know.
    """

    name: str
    run: Callable[..., Any]
    supports: Callable[..., tuple[bool, str]]
    key: Callable[..., tuple[Any, ...]]
    texts: tuple[str, ...] | None


def _key_of_quantize(x, quantizer, axis, global_scale=None, seed=None, fold=None, transform=""):
    return (x.dtype,), quantizer, transform


def _key_of_dequantize(codes, scales, quantizer, axis, size, dtype, global_scale=None):
    return (dtype,), quantizer


def _key_of_clamp(x, clamp, axis):
    return ((x.dtype,),)


def _key_of_restore(x, values, positions, clamp, axis):
    return ((x.dtype, values.dtype),)


def _key_of_mask(x, scales, quantizer, estimator, axis, global_scale=None, transform=""):
    return (x.dtype,), quantizer, estimator, transform


def _key_of_hadamard(x, block, axis, mask=None):
    return ((x.dtype,),)


def _key_of_mask_gradient(grad, mask, axis):
    return ((grad.dtype,),)


def _key_of_slope(grad, x, scales, quantizer, estimator, axis, global_scale=None):
    return (x.dtype, grad.dtype), quantizer, estimator


def _key_of_recode(codes, quantizer, size, transposed, offs=None):
    return (), quantizer


def _key_of_8bit(x, quantizer, *rest):
    return (x.dtype,), quantizer


def _key_of_quantize_on_cuda(x, quantizer, axis, global_scale=None, seed=None, fold=None, transform=""):
    return (x.dtype,), quantizer, transform, x.dim() == 2 and axis % 2 == 0


def _key_of_transposed(x, quantizer, transform=""):
    return (x.dtype,), quantizer, transform


def _key_of_compensated(x, operand, axis):
    return (x.dtype,), operand, x.shape[axis]


def _key_of_produced(a, b, c, d, producer, operand):
    return (Producer.parse(producer).dtype,), operand, a.shape[-1]


def _key_of_clamp_on_cuda(x, clamp, axis):
    return (x.dtype,), clamp, x.shape[axis]


def _key_of_stored(x, codes, scales, stored, size, *rest):
    return (x.dtype,), stored, size


def _no_key(*arguments):
    return ()


_ROWS, _TRANSFORMED, _BLOCKS = "quantize.triton", "quantize.triton_transformed", "quantize.triton_blocks"


def _triton(module: str, name: str) -> Callable[..., Any]:
    """A function of a module of kernels/, imported at its first call: torch for CPUs comes without Triton."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"qcompile.kernels.{module}"), name)(*arguments)

    return call


def _supports_stored(dtypes, stored, size):
    return matmul_providers.supports_stored(stored, size, *dtypes)


def _quantize_columns(x, quantizer, axis, global_scale=None, seed=None, fold=None, transform=""):
    return _triton(_ROWS, "quantize_columns")(x, quantizer, fold)


def supports_produced(dtypes: tuple[torch.dtype, ...], operand: str, size: int) -> tuple[bool, str]:
    """Whether a CUDA kernel runs ``quantize_produced`` on rows of ``size`` elements, and if not, why."""
    return _triton(_ROWS, "supports_quantize_compensated")(dtypes, operand, size)


def _supports_columns(dtypes, quantizer, transform, by_columns=False):
    return _triton(_ROWS, "supports_columns")(dtypes, quantizer, by_columns and not transform)


def _quantize_transposed(x, quantizer, transform=""):
    return _triton(_ROWS, "quantize_8bit_transposed")(x, quantizer)


def _supports_transposed(dtypes, quantizer, transform):
    supported = _triton(_ROWS, "supports_quantize_8bit_transposed")
    return (False, f"{transform} takes two kernels") if transform else supported(dtypes, quantizer)


#: Providers that are tried before the reference, best first, by device type and op.
PROVIDERS: dict[str, dict[str, tuple[Provider, ...]]] = {
    "cpu": {
        "quantize": (
            Provider(
                "cpp",
                quantize_cpp.quantize,
                quantize_cpp.supports_quantize,
                _key_of_quantize,
                ("quantizer", "transform"),
            ),
        ),
        "dequantize": (
            Provider(
                "cpp", quantize_cpp.dequantize, quantize_cpp.supports_dequantize, _key_of_dequantize, ("quantizer",)
            ),
        ),
        "clamp_outliers": (
            Provider("cpp", outliers_cpp.clamp_outliers, outliers_cpp.supports_clamp, _key_of_clamp, ()),
        ),
        "restore_outliers": (
            Provider("cpp", outliers_cpp.restore_outliers, outliers_cpp.supports_restore, _key_of_restore, ()),
        ),
        "estimator_mask": (
            Provider(
                "cpp",
                estimate_cpp.estimator_mask,
                estimate_cpp.supports_mask,
                _key_of_mask,
                ("quantizer", "estimator", "transform"),
            ),
        ),
        "hadamard": (Provider("cpp", transform_cpp.hadamard, transform_cpp.supports_hadamard, _key_of_hadamard, ()),),
        "mask_gradient": (
            Provider(
                "cpp",
                estimate_cpp.mask_gradient,
                estimate_cpp.supports_mask_gradient,
                _key_of_mask_gradient,
                (),
            ),
        ),
        "scale_gradient": (
            Provider(
                "cpp",
                estimate_cpp.scale_gradient,
                estimate_cpp.supports_slope,
                _key_of_slope,
                ("quantizer", "estimator"),
            ),
        ),
    },
    "cuda": {
        **{
            op: (Provider("triton", _triton(_ROWS, op), _triton(_ROWS, f"supports_{kind}"), key, None),)
            for op, kind, key in (
                ("quantize_8bit", "quantize_8bit", _key_of_8bit),
                ("quantize_8bit_pair", "quantize_8bit", _key_of_8bit),
                ("quantize_groups", "quantize_groups", _key_of_8bit),
                ("quantize_groups_pair", "quantize_groups", _key_of_8bit),
                ("recode", "recode", _key_of_recode),
                ("quantize_compensated", "quantize_compensated", _key_of_compensated),
                ("quantize_produced", "quantize_compensated", _key_of_produced),
            )
        },
        "quantize": (
            Provider("triton", _quantize_columns, _supports_columns, _key_of_quantize_on_cuda, None),
            Provider(
                "triton",
                _triton(_TRANSFORMED, "quantize"),
                _triton(_TRANSFORMED, "supports_quantize"),
                _key_of_quantize_on_cuda,
                ("quantizer", "transform"),
            ),
            Provider(
                "triton",
                _triton(_BLOCKS, "quantize_blocks"),
                _triton(_BLOCKS, "supports_blocks"),
                _key_of_quantize_on_cuda,
                ("quantizer", "transform"),
            ),
        ),
        "quantize_8bit_masked": (
            Provider(
                "triton",
                _triton(_TRANSFORMED, "quantize_8bit_masked"),
                _triton(_TRANSFORMED, "supports_quantize_8bit_masked"),
                _key_of_8bit,
                None,
            ),
        ),
        "quantize_8bit_transposed": (
            Provider("triton", _quantize_transposed, _supports_transposed, _key_of_transposed, None),
            Provider(
                "triton",
                _triton(_TRANSFORMED, "quantize_8bit_transposed"),
                _triton(_TRANSFORMED, "supports_quantize_8bit_transposed"),
                _key_of_transposed,
                ("quantizer", "transform"),
            ),
        ),
        "estimator_mask": (
            Provider(
                "triton",
                _triton(_TRANSFORMED, "estimator_mask"),
                _triton(_TRANSFORMED, "supports_estimator_mask"),
                _key_of_mask,
                ("quantizer", "estimator", "transform"),
            ),
        ),
        "hadamard": (
            Provider(
                "triton",
                _triton("transform.triton", "hadamard"),
                _triton("transform.triton", "supports_hadamard"),
                _key_of_hadamard,
                (),
            ),
        ),
        "clamp_outliers": (
            Provider(
                "triton",
                _triton("outliers.triton", "clamp_outliers"),
                _triton("outliers.triton", "supports_clamp_outliers"),
                _key_of_clamp_on_cuda,
                None,
            ),
        ),
        # They choose by the extents of each product.
        **{
            op: (Provider("tensor cores", getattr(matmul_providers, op), lambda: (True, ""), _no_key, None),)
            for op in ("mm_8bit", "mm_8bit_grouped", "mm_1bit", "mm_block_scaled")
        },
        "mm_stored": (
            Provider("triton", _triton("matmul.stored", "mm_stored"), _supports_stored, _key_of_stored, None),
        ),
    },
}


def provider_of(
    op_name: str,
    device_type: str,
    quantizer_text: str,
    dtype: torch.dtype,
    estimator: str = "ste",
    transform: str = "",
    in_memory: bool = False,
) -> tuple[str, str]:
    """Name of the provider that runs an op, and why not a faster one (empty for the first choice).

    ``dtype`` is that of the floating-point tensors, inputs or outputs, of the op; ``in_memory``: whether Inductor
    generates nothing that makes its x. Raises ``KeyError`` for an unknown op.
    """
    if op_name not in REFERENCES:
        msg = f"unknown op {op_name!r}; known: {', '.join(REFERENCES)}"
        raise KeyError(msg)
    providers = PROVIDERS.get(device_type, {}).get(op_name, ())
    generated, reasons = "", []  # type: ignore[var-annotated]
    if device_type == "cuda":
        from .lowerings import LOWERINGS, cuda_provider  # imports Inductor, which registering kernels must not

        if op_name in LOWERINGS or not providers:
            name, generated = cuda_provider(op_name, quantizer_text, estimator, transform, dtype, in_memory)
            if name != "reference":
                return name, generated
        by_extents = bool(providers) and providers[0].texts is None  # which a report does not know
        if by_extents and (op_name not in LOWERINGS or len(providers) == 1):
            return providers[0].name, ""
    elif not providers:
        return "reference", f"no other provider of {op_name} on {device_type}"
    texts = {"quantizer": quantizer_text, "estimator": estimator, "transform": transform}
    for provider in providers:
        if provider.texts is None:
            continue
        supported, reason = provider.supports((dtype,), *(texts[name] for name in provider.texts))
        if supported:
            return provider.name, "; ".join(reasons)
        reasons.append(reason)
    return "reference", "; ".join(filter(None, (generated, *reasons)))


def _dispatcher(op_name: str, providers: tuple[Provider, ...]) -> Callable[..., Any]:
    """A kernel that runs the first provider that supports its arguments; the choice is remembered by their
    key."""
    key_of = providers[0].key

    @cache
    def choose(*key: Any) -> Callable[..., Any]:
        supporting = (provider.run for provider in providers if provider.supports(*key)[0])
        return next(supporting, REFERENCES[op_name])

    def kernel(*arguments: Any) -> Any:
        return choose(*key_of(*arguments))(*arguments)

    return kernel


for _name, _reference in REFERENCES.items():
    LIB.impl(_name, _reference, "CompositeExplicitAutograd")
for _name, _providers in PROVIDERS["cpu"].items():
    LIB.impl(_name, _dispatcher(_name, _providers), "CPU")

#: By name of the op, its kernel on CUDA. Generated code calls it directly: the dispatcher takes as long as a launch.
DIRECT = {_name: replayed(_dispatcher(_name, _providers)) for _name, _providers in PROVIDERS["cuda"].items()}
for _name, _kernel in DIRECT.items():
    LIB.impl(_name, _kernel, "CUDA")
compat.remember_fake_results(LIB, (f"{LIB.ns}::{name}" for name in REFERENCES))
