"""FP8 products by cuBLASLt, called past torch.

``torch._scaled_mm`` describes a product and asks cuBLASLt for an algorithm at every call, which takes the host some 50
microseconds: longer than many a product takes the card. Here both are done once per kind of product and thread, and a
call hands over addresses. The library is the one that torch has loaded, asked as torch asks it, for the same algorithm.

Reference: cuBLAS documentation, "Using the cuBLASLt API".
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from ctypes import byref, c_float, c_int, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qcompile import compat
from qcompile.kernels.replay import note_call

__all__ = ["RefusedError", "scaled_mm", "supports"]

# --- the library ----------------------------------------------------------------------------------------------------

#: First version with one scale per row of both operands.
_WITH_ROW_SCALES = 120900
#: ``cudaDataType``.
_DATA_TYPES = {torch.float8_e4m3fn: 28, torch.float8_e5m2: 29, torch.bfloat16: 14}
_FLOAT32, _COMPUTE_FLOAT32 = 0, 68
#: ``cublasLtMatmulDescAttributes_t``; cuBLASLt's A and B are our b and a.
_TRANSPOSE_A, _EPILOGUE, _BIAS_POINTER, _BIAS_TYPE = 3, 7, 8, 26
_SCALE_A, _SCALE_B, _FAST_ACCUMULATION, _SCALE_MODE_A, _SCALE_MODE_B = 17, 18, 25, 31, 32
_TRANSPOSED, _ADDS_BIAS, _SCALE_PER_ROW = 1, 4, 3
#: ``cublasLtMatmulPreferenceAttributes_t``, and the bytes that torch allows on Hopper.
_MOST_WORKSPACE, _WORKSPACE = 1, 32 * 2**20
#: ``cublasStatus_t``: no algorithm, or a description that the library does not take.
_REFUSALS = (7, 15)
#: Bytes that addresses must be a multiple of, which rows of a multiple of 16 elements keep.
_ALIGNMENT = 16
#: Products that a thread remembers; a model of many sizes has them described again.
_MOST_PLANS = 4096


class _Heuristic(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace", c_size_t),
        ("status", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


_SIGNATURES: dict[str, tuple[type, ...]] = {
    "cublasLtCreate": (c_void_p,),
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),
    "cublasLtMatmulDescDestroy": (c_void_p,),
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, c_void_p, c_void_p),
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}


@cache
def _library() -> ctypes.CDLL | None:
    """cuBLASLt as torch has loaded it; ``None`` if there is none of this name, or too old a one."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.partition('.')[0]}")
        library.cublasLtGetVersion.restype = c_size_t
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
    except (OSError, AttributeError):  # linked into torch, or of another platform
        return None
    return library if library.cublasLtGetVersion() >= _WITH_ROW_SCALES else None


def _check(status: int) -> None:
    if status:
        library = _library()
        assert library is not None
        library.cublasLtGetStatusString.restype = ctypes.c_char_p
        msg = f"cuBLASLt: {library.cublasLtGetStatusString(status).decode()}"
        raise RuntimeError(msg)


def _created(name: str, *arguments: int) -> c_void_p:
    made = c_void_p()
    _check(getattr(_library(), name)(byref(made), *arguments))
    return made


def _destroy(description: c_void_p, *layouts: c_void_p) -> None:
    library = _library()
    assert library is not None
    for layout in layouts:
        library.cublasLtMatrixLayoutDestroy(layout)
    library.cublasLtMatmulDescDestroy(description)


@cache
def _handle(device: torch.device) -> c_void_p:
    return _created("cublasLtCreate")


# --- a product ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """All that the choice of an algorithm depends on: a ``[m, k]`` and b ``[n, k]``."""

    device: torch.device
    m: int
    n: int
    k: int
    dtypes: tuple[torch.dtype, torch.dtype]
    row_scales: bool
    bias: bool

    @classmethod
    def of(cls, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> _Kind:
        row_scales = scale_a.numel() > 1 or scale_b.numel() > 1
        sizes = a.shape[0], b.shape[0], a.shape[1]
        return cls(a.device, *sizes, (a.dtype, b.dtype), row_scales=row_scales, bias=bias is not None)

    def __call__(self, stream: int, *tensors: Tensor) -> None:
        """Queue the product; ``tensors``: a, b, scale_a, scale_b, out and a bias if there is one."""
        addresses = [tensor.data_ptr() for tensor in tensors]
        plans = _of_thread.plans
        plan = plans.get(self)
        if plan is None:
            if len(plans) >= _MOST_PLANS:
                plans.clear()
            plan = plans[self] = _Plan(self, addresses)
        plan.run(stream, *addresses)


class _Plan:
    """A product described to cuBLASLt, and the algorithm it chose. Addresses of scales are part of the description, so
    that every thread has its own.
    """

    def __init__(self, kind: _Kind, addresses: Sequence[int]) -> None:
        """Raises :class:`RefusedError` if cuBLASLt has no algorithm. ``addresses`` as in a call: it looks at them."""
        library = _library()
        assert library is not None
        self.kind, self.handle, self.multiply = kind, _handle(kind.device), library.cublasLtMatmul
        self.set_attribute = library.cublasLtMatmulDescSetAttribute
        self.description = _created("cublasLtMatmulDescCreate", _COMPUTE_FLOAT32, _FLOAT32)
        self.address = c_void_p()
        self._set(_TRANSPOSE_A, c_int32(_TRANSPOSED))
        self._set(_FAST_ACCUMULATION, c_int8(1))
        if kind.row_scales:
            self._set(_SCALE_MODE_A, c_int32(_SCALE_PER_ROW))
            self._set(_SCALE_MODE_B, c_int32(_SCALE_PER_ROW))
        if kind.bias:
            self._set(_EPILOGUE, c_uint32(_ADDS_BIAS))
            self._set(_BIAS_TYPE, c_int32(_DATA_TYPES[torch.bfloat16]))
        types = [_DATA_TYPES[dtype] for dtype in kind.dtypes]
        # Matrices lie by columns there: b and a transposed, and the product transposed.
        self.b = _created("cublasLtMatrixLayoutCreate", types[1], kind.k, kind.n, kind.k)
        self.a = _created("cublasLtMatrixLayoutCreate", types[0], kind.k, kind.m, kind.k)
        self.out = _created("cublasLtMatrixLayoutCreate", _DATA_TYPES[torch.bfloat16], kind.n, kind.m, kind.n)
        self._point(*addresses)
        self.found = self._choose()
        release = weakref.finalize(self, _destroy, self.description, self.a, self.b, self.out)
        release.atexit = False
        self.one, self.zero = c_float(1.0), c_float(0.0)

    def _set(self, attribute: int, value: ctypes._SimpleCData) -> None:
        _check(self.set_attribute(self.description, attribute, byref(value), ctypes.sizeof(value)))

    def _choose(self) -> _Heuristic:
        library = _library()
        assert library is not None
        preference = _created("cublasLtMatmulPreferenceCreate")
        most = c_uint64(_WORKSPACE)
        _check(
            library.cublasLtMatmulPreferenceSetAttribute(preference, _MOST_WORKSPACE, byref(most), ctypes.sizeof(most))
        )
        found, count = _Heuristic(), c_int()
        layouts = (self.b, self.a, self.out, self.out)
        status = library.cublasLtMatmulAlgoGetHeuristic(
            self.handle, self.description, *layouts, preference, 1, byref(found), byref(count)
        )
        library.cublasLtMatmulPreferenceDestroy(preference)
        if status in _REFUSALS or not (status or count.value):
            raise RefusedError(self.kind)
        _check(status)
        return found

    def _point(self, a: int, b: int, scale_a: int, scale_b: int, out: int, bias: int = 0) -> None:
        """Put the addresses that are part of the description there."""
        address, set_attribute = self.address, self.set_attribute
        for attribute, value in ((_SCALE_A, scale_b), (_SCALE_B, scale_a), (_BIAS_POINTER, bias)):
            if value:
                address.value = value
                set_attribute(self.description, attribute, byref(address), 8)

    def run(self, stream: int, a: int, b: int, scale_a: int, scale_b: int, out: int, bias: int = 0) -> None:
        """Queue it; all but ``stream`` are addresses."""
        self._point(a, b, scale_a, scale_b, out, bias)
        size = self.found.workspace
        # A tensor of the call: the allocator orders its reuse by the stream, and a CUDA graph owns its own.
        workspace = compat.empty_strided((size,), (1,), torch.uint8, self.kind.device) if size else None
        status = self.multiply(
            self.handle, self.description, byref(self.one), b, self.b, a, self.a, byref(self.zero), out, self.out, out,
            self.out, byref(self.found), workspace.data_ptr() if workspace is not None else None, size, stream,
        )  # fmt: skip
        _check(status)


class RefusedError(RuntimeError):
    """cuBLASLt has no algorithm for a kind of product."""


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.plans: dict[_Kind, _Plan] = {}


_of_thread = _OfThread()


def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None) -> Tensor:
    """``(a · bᵀ) · scale_a · scale_bᵀ + bias``, ``[M, N]`` BF16, with fast accumulation.

    Args:
        a: ``[M, K]``, E4M3 or E5M2, contiguous; its address and K are multiples of 16.
        b: ``[N, K]``, the same; not both are E5M2, and N is a multiple of 16.
        scale_a: float32, ``[M, 1]``, or ``[1, 1]`` if ``scale_b`` is too.
        scale_b: float32, ``[N, 1]`` or ``[1, 1]``.
        bias: ``[N]``, BF16.

    Raises:
        RefusedError: cuBLASLt has no algorithm for it.
        RuntimeError: it fails to launch one.
    """
    kind = _Kind.of(a, b, scale_a, scale_b, bias)
    out = torch.empty(kind.m, kind.n, dtype=torch.bfloat16, device=a.device)
    tensors = (a, b, scale_a, scale_b, out, *(() if bias is None else (bias,)))
    with torch.cuda.device_of(a):
        kind(compat.raw_stream(a.device), *tensors)
    note_call(kind, *tensors)
    return out


def supports(*tensors: Tensor) -> bool:
    """Whether :func:`scaled_mm` can be called on operands and a bias that torch would multiply: the library was found,
    and their addresses are multiples of 16.
    """
    return _library() is not None and all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)
