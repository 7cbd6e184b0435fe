"""Scales of stored weights in kernels, of Triton and of Gluon: what is loaded of one, and the number it stands for."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_scales", "scales_of"]


@triton.jit
def load_scales(stored, second, at, fmt: tl.constexpr):
    """What is stored of the scales at ``at``, and of those that they share (0 if there are none)."""
    loaded = tl.load(stored + at)
    if fmt.nested:
        # A division of numbers without a sign is a shift.
        unsigned: tl.constexpr = tl.uint32 if at.dtype == tl.int32 else tl.uint64
        shared = tl.load(second + (at.to(unsigned) // fmt.nested).to(at.dtype))
    elif fmt.two_level:
        shared = tl.load(second)
    else:
        shared = 0.0
    return loaded, shared


@triton.jit
def scales_of(loaded, shared, offset, book, fmt: tl.constexpr):
    """Float32 scales from what :func:`load_scales` returned."""
    if loaded.dtype != tl.float32:
        bits = loaded.to(tl.int32)
        loaded = bits & 0xFFFF if loaded.dtype == tl.int16 else bits
    if fmt.nested:
        level = tl.load(book + loaded) if fmt.in_book else fmt.scale_level(loaded)
        scale = level * fmt.load_second(shared)
        if offset is not None:
            scale += tl.load(offset)
    elif fmt.two_level:
        scale = fmt.load(loaded, shared)
    else:
        scale = fmt.load(loaded)
    return scale
