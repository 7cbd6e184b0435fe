"""Groups of rows, as grouped products have them: where they begin, and which one a tile belongs to.

``offs`` (int32 ``[E]``, torch's name) has the row at which each group ends; it begins where the one before ends. Sizes
are known to the device alone. So kernels are launched for the most tiles there can be, and find their group themselves.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qcompile.ir.ops import GROUP_ALIGNMENT

__all__ = ["ALIGNMENT", "group_of_row", "group_of_tile", "groups_of", "most_tiles", "picked", "rows_of_tile"]

ALIGNMENT = tl.constexpr(GROUP_ALIGNMENT)


@triton.jit
def groups_of(offs, groups, most: tl.constexpr):
    """First rows and sizes, int32 ``[most]``, of ``groups`` groups; sizes of 0 follow. ``most``: a power of two."""
    index = tl.arange(0, most)
    ends = tl.load(offs + index, mask=index < groups, other=0)
    starts = tl.load(offs + index - 1, mask=(index > 0) & (index < groups), other=0)
    return starts, tl.maximum(ends - starts, 0)


@triton.jit
def picked(values, at):
    """Element ``at`` of a vector; 0 beyond its end."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == at, values, 0), 0)


@triton.jit
def group_of_tile(tile, tiles):
    """The group that has a tile, where group e has the next ``tiles[e]``, and which one of its tiles that is."""
    ends = tl.cumsum(tiles, 0)
    group = tl.sum((ends <= tile).to(tl.int32), 0)
    return group, tile - picked(ends - tiles, group)


@triton.jit
def rows_of_tile(tile, offs, groups, most: tl.constexpr, height: tl.constexpr):
    """The group of a tile, each group being cut into tiles of ``height`` rows; the tile's first row, and the row at
    which the group ends, which is not beyond the first one for a tile that there is not.
    """
    starts, sizes = groups_of(offs, groups, most)
    group, place = group_of_tile(tile, tl.cdiv(sizes, height))
    start = picked(starts, group)
    return group, start + place * height, start + picked(sizes, group)


@triton.jit
def group_of_row(row, offs, groups, most: tl.constexpr):
    """The group of a row; the last one for a row beyond it."""
    index = tl.arange(0, most)
    ends = tl.load(offs + index, mask=index < groups - 1, other=2**31 - 1)
    return tl.sum((ends <= row).to(tl.int32), 0)


def most_tiles(rows: int, groups: int, height: int) -> int:
    """Of ``height`` rows, of as many groups: each may have one that it does not fill."""
    return triton.cdiv(rows, height) + min(groups, rows)
