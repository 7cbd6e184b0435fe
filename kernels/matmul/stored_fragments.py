"""x · Wᵀ of few rows of x with a 4-bit W in Gluon: codes go from memory to the registers of the tensor cores' operand.

W is the left operand of ``mma.m16n8k16``, 16 of its rows at a time, x the right one, 8 rows. Where an element of K
stands inside an mma does not matter as long as both operands agree, so a thread keeps the codes that it loads. The
kernel is written for the threads of a warp: the first axis of a tensor is the thread, others are its registers, and no
layout is ever converted.

**From codes to levels**: two codes, a byte, are looked up at once in a table of 256 pairs of 16-bit levels, each one
operand register. It lies in shared memory 32 times, once per bank: every lane reads its own bank, so no two collide.
One integer dot product makes the address (a byte of the word times 128, plus the lane's column), one load reads the
pair: 2 instructions for two codes of any format. Look-ups by ``prmt`` in registers take 5.5, of the unit that runs at
half rate.

**Scales**: the products of a block are summed from 0 by themselves, and the sum is multiplied: total += scale · sum,
4 operations for 16 rows, 8 rows of x and a block. So levels are rounded to x's dtype but never their product with a
scale. The threads of a row share the work of decoding scales, each one of four, and shuffle them.

**Blocks**: the four threads of a row load 4 × 16 bytes, 128 codes, but an mma adds what the four multiply: they must
stay in one block at a time. Below blocks of 128 they exchange words until the register says which block a word is of,
not the thread (:func:`_arranged`).

**Bytes in flight**: when a thread has arranged the words of a step it loads those of the next round's, ``steps`` · 32
bytes per 16 rows; with 16 warps per processor and two steps that is 32 KiB.

**What limits it** on an H200, in codes per clock and processor, of which memory brings 41. 2.2 instructions per code
for ``nf4 block64; nested`` and 8 rows of x, as compiled, are 58. The unit that loads and shuffles takes 0.5 look-ups
and 0.125 shuffles per code, 51, and x, 16 bytes per lane and word: 36 in all for 8 rows of x; 48 for one. x comes from
L2 once per ``block_n`` rows of W: with 4 · M of them that is as much as the codes. Measured at N = K = 8192: 2.0 TB/s
of codes and scales, 21 codes, with one row of x, half of what memory brings; all cuts that were tried are within 10 %.
With all codes in L2 it is 8 % faster for one row and no faster for 16: memory is not what it waits for.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .stored_scales import load_scales, scales_of

__all__ = ["MMA", "MMA_COLUMNS", "MMA_ROWS", "STEP_WORDS", "UNIT", "fragments", "scales_of_thread"]

#: Rows of x that an mma takes, and rows of W.
MMA_ROWS, MMA_COLUMNS = gl.constexpr(8), gl.constexpr(16)
#: Codes of a row that the four threads of an mma's row load at once, and their words of 8.
UNIT = gl.constexpr(128)
STEP_WORDS = gl.constexpr(16)


# --- instructions ----------------------------------------------------------------------------------------------------


@gluon.jit
def _filled_table(pairs, warps: gl.constexpr, layout: gl.constexpr):
    """For every thread, where in shared memory its lane's column of the table lies, once all threads have filled it.

    Entry e of lane l is at 128 e + 4 l. A warp writes four entries at a time.
    """
    thread = gl.arange(0, 32 * warps, layout)
    table = gl.inline_asm_elementwise(
        ".shared .align 128 .b8 stored_pairs[32768]; mov.u32 $0, stored_pairs; // $1",
        "=r,r",
        [thread],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    loaded = ()
    for first in gl.static_range(0, 256, 4 * warps):
        loaded += (gl.load(pairs + (first + thread // 8) % 256),)  # type: ignore[assignment]
    for i in gl.static_range(len(loaded)):
        entry = (4 * warps * i + thread // 8) % 256
        table = gl.inline_asm_elementwise(
            "st.shared.v4.b32 [$1], {$2, $2, $2, $2}; mov.u32 $0, $3;",
            "=r,r,r,r",
            [table + entry * 128 + thread % 8 * 16, loaded[i], table],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
    return gl.inline_asm_elementwise(
        "bar.sync 0; mov.u32 $0, $1;", "=r,r", [table + thread % 32 * 4], dtype=gl.int32, is_pure=False, pack=1
    )


#: PTX: the operands of a word's eight codes ($0 … $3) from the word ($4) and the lane's column of the table ($5). The
#: product of bytes with one factor that is not 0 takes a byte of the word times 128 and adds the column.
_LOOK_UP = gl.constexpr(
    "{.reg .b32 at;"
    + "".join(f"dp4a.u32.u32 at, $4, {128 << 8 * i}, $5; ld.shared.b32 ${i}, [at];" for i in range(4))
    + "}"
)
#: PTX: threads exchange one of two registers with thread + 1 or + 2, so that their bit of its number ($4) and the
#: register's change places.
_EXCHANGE = {
    distance: gl.constexpr(
        "{.reg .pred upper; .reg .b32 mine, yours; setp.ne.u32 upper, $4, 0; selp.b32 mine, $2, $3, upper;"
        f"shfl.sync.bfly.b32 yours, mine, {distance}, 0x1f, 0xffffffff;"
        "selp.b32 $0, yours, $2, upper; selp.b32 $1, $3, yours, upper;}"
    )
    for distance in (1, 2)
}
_EXCHANGE_1, _EXCHANGE_2 = _EXCHANGE[1], _EXCHANGE[2]
#: PTX: likewise of the halves of a register, with thread + 2; $2 is what the bytes of both are permuted by.
_EXCHANGE_HALVES = gl.constexpr(
    "{.reg .b32 yours; shfl.sync.bfly.b32 yours, $1, 2, 0x1f, 0xffffffff; prmt.b32 $0, $1, yours, $2;}"
)
#: PTX: what a thread holds of the four of an mma's row.
_OF_THREAD = gl.constexpr(tuple(f"shfl.sync.idx.b32 $0, $1, {place}, 0x1c1f, 0xffffffff;" for place in range(4)))
#: PTX: what a thread has plus what thread + 1 or + 2 has.
_PLUS_1, _PLUS_2 = (
    gl.constexpr(
        f"{{.reg .b32 yours; shfl.sync.bfly.b32 yours, $1, {distance}, 0x1f, 0xffffffff; add.f32 $0, $1, yours;}}"
    )
    for distance in (1, 2)
)
#: PTX, by the dtype of x.
MMA = {
    dtype: f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32 "
    "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "f16"))
}


@gluon.jit
def _levels(words, table):
    """Pairs of 16-bit levels of the words' codes: four tensors of operand registers."""
    return gl.inline_asm_elementwise(
        _LOOK_UP,
        "=r,=r,=r,=r,r,r",
        [words, table],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _mma(low, high, x, half: gl.constexpr, sums, instruction: gl.constexpr):
    """``sums`` plus the products of half the codes of a word; ``low`` and ``high`` are levels of rows r and r + 8."""
    return gl.inline_asm_elementwise(
        instruction,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [
            low[2 * half][:, :, None],
            high[2 * half][:, :, None],
            low[2 * half + 1][:, :, None],
            high[2 * half + 1][:, :, None],
            x[2 * half][:, None, :],
            x[2 * half + 1][:, None, :],
            sums[0],
            sums[1],
            sums[2],
            sums[3],
        ],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _exchanged(first, second, thread, distance: gl.constexpr):
    code: gl.constexpr = _EXCHANGE_1 if distance == 1 else _EXCHANGE_2
    return gl.inline_asm_elementwise(
        code,
        "=r,=r,r,r,r",
        [first, second, thread & distance],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _exchanged_halves(words, order):
    return gl.inline_asm_elementwise(_EXCHANGE_HALVES, "=r,r,r", [words, order], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _keep_loads_before(thread):
    """The assembler moves loads whose results are not wanted yet to where they are, but not across a barrier."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _let_next_begin():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _wait_for_previous():
    """Until what was launched before has ended and its results are there."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


# --- operands --------------------------------------------------------------------------------------------------------


@gluon.jit
def _four(tensor, layout: gl.constexpr):
    """The four registers of the last axis."""
    even, odd = tensor.reshape([tensor.shape[0], tensor.shape[1], 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    return (
        gl.convert_layout(first, layout, assert_trivial=True),
        gl.convert_layout(second, layout, assert_trivial=True),
        gl.convert_layout(third, layout, assert_trivial=True),
        gl.convert_layout(fourth, layout, assert_trivial=True),
    )


@gluon.jit
def _arranged(loaded, thread, unit: gl.constexpr, layout: gl.constexpr):
    """A thread's four words of a step, in the order of units, to each of which all threads of a row contribute.

    A word's number among the 16 of a step has the bits (thread, thread, register, register) as loaded. Units of 64
    codes need its highest bit to be the register's, units of 32 the two highest, units of 16 halves of words as well.
    """
    w0, w1, w2, w3 = _four(loaded, layout)
    if unit <= 64:
        w0, w2 = _exchanged(w0, w2, thread, 2)
        w1, w3 = _exchanged(w1, w3, thread, 2)
    if unit <= 32:
        w0, w1 = _exchanged(w0, w1, thread, 1)
        w2, w3 = _exchanged(w2, w3, thread, 1)
    words = (w0, w1, w2, w3)
    if unit == 16:
        order = gl.where((thread & 2) == 0, 0x5410, 0x3276)
        words = (
            _exchanged_halves(w0, order),
            _exchanged_halves(w1, order),
            _exchanged_halves(w2, order),
            _exchanged_halves(w3, order),
        )
    return words


@gluon.jit
def _pair_of_thread(thread, unit: gl.constexpr):
    """Where in a step the codes of a thread's register 0 of :func:`_arranged` begin, in pairs."""
    upper = (thread >> 1) & 1
    lower = thread & 1
    if unit == 128:
        pair = 32 * upper + 16 * lower
    elif unit == 64:
        pair = 16 * lower + 8 * upper
    elif unit == 32:
        pair = 8 * upper + 4 * lower
    else:
        pair = 4 * lower + 2 * upper
    return pair


@gluon.constexpr_function
def _pair_of_register(register, unit):
    """How far from there those of another register are."""
    return {128: 4 * register, 64: 32 * (register // 2) + 4 * (register % 2)}.get(unit, 16 * register)


@gluon.jit
def _side_by_side(at, inside, wanted, even: gl.constexpr, quads: gl.constexpr):
    """As many words from ``at`` ``[threads, tiles]`` on as a thread has in a row of ``quads``; 0 where there are
    ``inside`` fewer, unless ``even``, or if not ``wanted``.
    """
    side = gl.arange(0, quads.size_per_thread[2], gl.SliceLayout(0, gl.SliceLayout(1, quads)))[None, None, :]
    wanted = wanted[:, :, None]
    if not even:
        wanted = wanted & (side < inside[:, None, None])
    return gl.load(at[:, :, None] + side, mask=wanted, other=0)


@gluon.constexpr_function
def _pair_of_load(step, register, half, mix):
    """How far from there the words of x are that belong to a register of a step, or to its second half."""
    return 4 * step * STEP_WORDS.value + _pair_of_register(register, mix) + 8 * half


@gluon.constexpr_function
def _column(step, register, mix, unit, lines):
    """Of the units whose sums stand side by side, the number of the first that a register is of."""
    return (8 * step + 2 * register) // (mix // 16) * (mix // unit) % (MMA_ROWS.value // lines)


@gluon.jit
def _load_x(
    at,
    pairs,
    own_pair,
    line,
    m,
    wanted,
    step: gl.constexpr,
    register: gl.constexpr,
    even: gl.constexpr,
    mix: gl.constexpr,
    unit: gl.constexpr,
    lines: gl.constexpr,
    quads: gl.constexpr,
):
    """Words of x ``[threads, tiles, side]`` that belong to one that :func:`_arranged` returned, or to its two halves.

    ``at``: where the rows' first words of the turn are, ``pairs`` before the end. 0 in columns of other blocks.
    """
    thread = gl.arange(0, at.shape[0], own_pair.type.layout)
    loaded = ()
    # The second half of a word of units of 16 is of the next 16 codes.
    for half in gl.static_range(2 if mix == 16 else 1):
        inside = pairs - _pair_of_load(step, register, half, mix) - own_pair
        here = wanted & (line < m)
        if lines < MMA_ROWS:
            inner = 2 * (_pair_of_thread(thread, mix) + _pair_of_register(register, mix)) % mix // unit
            own_column = thread % 32 // 4 // lines - _column(step, register, mix, unit, lines)
            here = here & (own_column == inner)[:, None]
        of_load = at + _pair_of_load(step, register, half, mix)
        loaded += (_side_by_side(of_load, inside, here, even, quads),)  # type: ignore[assignment]
    return loaded


@gluon.jit
def _operand_of_x(loaded, layout: gl.constexpr):
    """The four operand registers that :func:`_load_x` returned."""
    if len(loaded) == 2:
        first, second = loaded[0].split()
        third, fourth = loaded[1].split()
        operand = (
            gl.convert_layout(first, layout, assert_trivial=True),
            gl.convert_layout(second, layout, assert_trivial=True),
            gl.convert_layout(third, layout, assert_trivial=True),
            gl.convert_layout(fourth, layout, assert_trivial=True),
        )
    else:
        operand = _four(loaded[0], layout)
    return operand


@gluon.jit
def _load_words(at, inside, wanted, even: gl.constexpr, quads: gl.constexpr):
    """Four words from ``at`` ``[threads, tiles]`` on; 0 where there are ``inside`` fewer, or if not ``wanted``."""
    side = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, quads)))[None, None, :]
    if not even:
        wanted = wanted & (side < inside[:, None, None])
    return gl.load(at[:, :, None] + side, mask=wanted, other=0, eviction_policy="evict_first")


@gluon.jit
def _scales_ahead(
    scales,
    second,
    upper,
    lower,
    word,
    own_unit,
    per_row,
    unit: gl.constexpr,
    units: gl.constexpr,
    lines: gl.constexpr,
    fmt: gl.constexpr,
):
    """What is loaded of the scales of a thread's units, upper and lower row in turn; beyond a row, of its last unit.

    ``upper``, ``lower``: numbers of the rows' first scales. Of ``lines`` = 8 rows of x, the threads of a row share the
    units; of fewer, each has those of its own columns.
    """
    thread = gl.arange(0, own_unit.shape[0], own_unit.type.layout)
    side: gl.constexpr = MMA_ROWS // lines  # units whose sums stand side by side
    loaded = ()
    for i in gl.static_range(scales_of_thread(units, lines)):
        if lines == MMA_ROWS:
            mine = (4 * i + thread % 4) % units
        elif lines == 1:
            mine = gl.minimum(i // 2 * side + thread % 4 * 2 + i % 2, units - 1)
        else:
            mine = gl.minimum(i * side + thread % 4 * 2 // lines, units - 1)
        number = word * 8 // unit + own_unit + mine
        column = number if unit == fmt.block else number // (fmt.block // unit)
        column = gl.minimum(column, per_row - 1)[:, None]
        loaded += (  # type: ignore[assignment]
            load_scales(scales, second, upper + column, fmt),
            load_scales(scales, second, lower + column, fmt),
        )
    return loaded


@gluon.constexpr_function
def scales_of_thread(units, lines):
    """Scales of a row of W that a thread decodes."""
    if lines == MMA_ROWS.value:
        return (units + 3) // 4
    return max(1, units * lines // MMA_ROWS.value) * (2 if lines == 1 else 1)


@gluon.jit
def _decoded(loaded, offset, book, fmt: gl.constexpr):
    """Float32 scales from what :func:`_scales_ahead` returned."""
    scale = ()
    for i in gl.static_range(len(loaded)):
        scale += (scales_of(loaded[i][0], loaded[i][1], offset, book, fmt),)  # type: ignore[assignment]
    return scale


@gluon.jit
def _scaled(sums, scale, totals):
    """``totals`` plus ``sums``, times the scale of each of the four."""
    added = ()
    for i in gl.static_range(4):
        factor, _ = gl.broadcast(scale[i][:, :, None], sums[i])
        added += (gl.fma(sums[i], factor, totals[i]),)  # type: ignore[assignment]
    return added


@gluon.jit
def _of_thread(value, place: gl.constexpr):
    """What the thread at ``place`` of the four of a row has."""
    code: gl.constexpr = _OF_THREAD[place]
    return gl.inline_asm_elementwise(code, "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _scaled_by_unit(sums, scale, number: gl.constexpr, lines: gl.constexpr, totals):
    """``number``: of the unit, or of as many as stand side by side; ``scale`` as of :func:`_scales_ahead`."""
    if lines == MMA_ROWS:
        upper = _of_thread(scale[number // 4 * 2], number % 4)
        lower = _of_thread(scale[number // 4 * 2 + 1], number % 4)
        factors = upper, upper, lower, lower
    elif lines == 1:
        factors = scale[4 * number], scale[4 * number + 2], scale[4 * number + 1], scale[4 * number + 3]
    else:
        factors = scale[2 * number], scale[2 * number], scale[2 * number + 1], scale[2 * number + 1]
    return _scaled(sums, factors, totals)


@gluon.jit
def _plus_thread(value, distance: gl.constexpr):
    """``value`` plus that of thread + 1 or + 2."""
    code: gl.constexpr = _PLUS_1 if distance == 1 else _PLUS_2
    return gl.inline_asm_elementwise(code, "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _side_added(totals, lines: gl.constexpr):
    """``totals`` where columns that differ in the block alone are added; all of them hold the sum."""
    first, second, third, fourth = totals
    if lines == 1:
        first, third = first + second, third + fourth
        second, fourth = first, third
    added = ()
    for total in gl.static_range(4):
        value = (first, second, third, fourth)[total]
        if lines <= 4:
            value = _plus_thread(value, 2)
        if lines <= 2:
            value = _plus_thread(value, 1)
        added += (value,)  # type: ignore[assignment]
    return added


# --- kernel ----------------------------------------------------------------------------------------------------------


@gluon.jit
def _rows(threads: gl.constexpr, tiles: gl.constexpr, layout: gl.constexpr):
    """The upper of the two rows of W that a thread has of each tile of 16 rows, ``[threads, tiles]``."""
    thread = gl.arange(0, threads, gl.SliceLayout(1, layout))
    tile = gl.arange(0, tiles, gl.SliceLayout(0, layout))
    return ((thread // 32 * tiles)[:, None] + tile[None, :]) * 16 + (thread % 32 // 4)[:, None]


@gluon.jit
def fragments(
    x,
    codes,
    scales,
    second,
    offset,
    book,
    pairs,
    bias,
    out,
    m,
    n,
    row_words,
    per_row,
    rounds,
    fmt: gl.constexpr,
    instruction: gl.constexpr,
    unit: gl.constexpr,
    lines: gl.constexpr,
    tiles_m: gl.constexpr,
    tiles_n: gl.constexpr,
    across: gl.constexpr,
    along: gl.constexpr,
    steps: gl.constexpr,
    even: gl.constexpr,
    x_ahead: gl.constexpr,
    number: gl.constexpr,
    early: gl.constexpr,
):
    """``out[split, m, n] = x[m, K] · W[n, K]ᵀ`` over the ``rounds`` of a split; x and codes as words of 32 bits.

    ``across`` · ``along`` warps, of ``tiles_n`` · 16 rows of W each; ``along`` of them share rows and take turns at
    ``steps`` steps of K. ``tiles_m`` · ``lines`` rows of x, read a step ahead if ``x_ahead``. ``number``: dtype that a
    scale's number fits. ``early``: launched to begin before the kernel in front has ended.
    """
    warps: gl.constexpr = across * along
    threads: gl.constexpr = 32 * warps
    block_n: gl.constexpr = 16 * across * tiles_n
    turn: gl.constexpr = steps * STEP_WORDS
    units: gl.constexpr = steps * UNIT // unit  # pieces of 128 codes that share a scale, of a turn
    side: gl.constexpr = MMA_ROWS // lines  # units whose sums stand side by side
    mix: gl.constexpr = min(UNIT, unit * side)  # codes of which the threads of a row have a word each
    mmas: gl.constexpr = min(side * unit // 16, 8 * steps)  # that are summed before scales are applied
    # The first axis is the thread, the others are its registers. Warps that share rows are ``across`` apart.
    layout: gl.constexpr = gl.BlockedLayout([1, tiles_n, tiles_m], [32, 1, 1], [warps, 1, 1], [2, 1, 0])
    of_w: gl.constexpr = gl.SliceLayout(2, layout)
    of_x: gl.constexpr = gl.SliceLayout(1, layout)
    word_quads: gl.constexpr = gl.BlockedLayout([1, tiles_n, 4], [32, 1, 1], [warps, 1, 1], [2, 1, 0])
    of_words: gl.constexpr = gl.SliceLayout(2, word_quads)
    x_quads: gl.constexpr = gl.BlockedLayout([1, tiles_m, 2 if mix == 16 else 4], [32, 1, 1], [warps, 1, 1], [2, 1, 0])
    of_line: gl.constexpr = gl.SliceLayout(2, x_quads)

    first_row = gl.program_id(0) * block_n
    word = gl.program_id(1) * rounds * (along * turn)
    end = word + rounds * (along * turn)

    thread = gl.arange(0, threads, gl.SliceLayout(1, of_w))
    row = first_row + _rows(threads, tiles_n, of_w) % block_n
    # Rows beyond the last are the last again, and are not stored.
    upper, lower = gl.minimum(row, n - 1), gl.minimum(row + 8, n - 1)
    upper_scales, lower_scales = upper.to(number) * per_row, lower.to(number) * per_row
    own_unit = thread // (32 * across) * units
    own = gl.arange(0, threads, gl.SliceLayout(1, of_words))
    own_word = own // (32 * across) * turn + own % 4 * 4
    upper_words = (
        codes + gl.convert_layout(upper, of_words, assert_trivial=True).to(gl.int64) * row_words + own_word[:, None]
    )
    lower_words = (
        codes + gl.convert_layout(lower, of_words, assert_trivial=True).to(gl.int64) * row_words + own_word[:, None]
    )
    own = gl.arange(0, threads, gl.SliceLayout(1, of_line))
    own_pair = own // (32 * across) * (4 * turn) + _pair_of_thread(own, mix)
    line = (own % 32 // 4 % lines)[:, None] + 8 * gl.arange(0, tiles_m, gl.SliceLayout(0, of_line))[None, :]
    # Rows of x beyond the last are not read: of few rows, most lanes would read what others do.
    line_x = x + line * (4 * row_words) + own_pair[:, None]

    if early:  # what no kernel before writes, then the others
        _let_next_begin()
        table = _filled_table(pairs, warps, gl.SliceLayout(1, of_w))[:, None]
        _wait_for_previous()
    words = ()
    upper_at, lower_at = upper_words + word, lower_words + word
    for step in gl.static_range(steps):
        inside = row_words - word - step * STEP_WORDS - own_word
        words += (  # type: ignore[assignment]
            _load_words(upper_at + step * STEP_WORDS, inside, word < end, even, word_quads),
            _load_words(lower_at + step * STEP_WORDS, inside, word < end, even, word_quads),
        )
    scale, ahead = (), ()
    if fmt.block:
        now = _scales_ahead(
            scales, second, upper_scales, lower_scales, word, own_unit, per_row, unit, units, lines, fmt
        )
        following = word + along * turn
        ahead = _scales_ahead(
            scales, second, upper_scales, lower_scales, following, own_unit, per_row, unit, units, lines, fmt
        )
    words_x = ()
    if x_ahead:
        at_x, left, wanted_x = line_x + 4 * word, 4 * (row_words - word), word < end
        for i in gl.static_range(4):
            words_x += (  # type: ignore[assignment]
                _load_x(at_x, left, own_pair, line, m, wanted_x, 0, i, even, mix, unit, lines, x_quads),
            )
    if not early:
        table = _filled_table(pairs, warps, gl.SliceLayout(1, of_w))[:, None]
    if fmt.block:
        scale = _decoded(now, offset, book, fmt)

    zero = gl.zeros([threads, tiles_n, tiles_m], gl.float32, layout)
    totals = (zero, zero, zero, zero)
    for _ in range(rounds):
        following = word + along * turn
        later = ()
        if fmt.block:
            after = following + along * turn
            later = _scales_ahead(
                scales, second, upper_scales, lower_scales, after, own_unit, per_row, unit, units, lines, fmt
            )
        next_words = ()
        upper_at, lower_at = upper_words + following, lower_words + following
        for step in gl.static_range(steps):
            upper_codes = _arranged(words[2 * step], thread[:, None], mix, of_w)
            lower_codes = _arranged(words[2 * step + 1], thread[:, None], mix, of_w)
            inside, wanted = row_words - following - step * STEP_WORDS - own_word, following < end
            next_words += (  # type: ignore[assignment]
                _load_words(upper_at + step * STEP_WORDS, inside, wanted, even, word_quads),
                _load_words(lower_at + step * STEP_WORDS, inside, wanted, even, word_quads),
            )
            next_x = ()
            if x_ahead:
                after = (step + 1) // steps * (following - word) + word
                at_x, left, wanted_x = line_x + 4 * after, 4 * (row_words - after), after < end
                for i in gl.static_range(4):
                    next_x += (  # type: ignore[assignment]
                        _load_x(
                            at_x,
                            left,
                            own_pair,
                            line,
                            m,
                            wanted_x,
                            (step + 1) % steps,
                            i,
                            even,
                            mix,
                            unit,
                            lines,
                            x_quads,
                        ),
                    )
            _keep_loads_before(thread)
            for register in gl.static_range(4):
                if x_ahead:
                    of_word = words_x[register]  # type: ignore[var-annotated]
                else:
                    at_x, left, wanted_x = line_x + 4 * word, 4 * (row_words - word), word < end
                    of_word = _load_x(
                        at_x, left, own_pair, line, m, wanted_x, step, register, even, mix, unit, lines, x_quads
                    )
                right = _operand_of_x(of_word, of_x)
                upper_levels = _levels(upper_codes[register], table)
                lower_levels = _levels(lower_codes[register], table)
                for half in gl.static_range(2):
                    if fmt.block == 0:
                        totals = _mma(upper_levels, lower_levels, right, half, totals, instruction)
                    else:
                        if (8 * step + 2 * register + half) % mmas == 0:
                            sums = (zero, zero, zero, zero)
                        sums = _mma(upper_levels, lower_levels, right, half, sums, instruction)
                        if (8 * step + 2 * register + half) % mmas == mmas - 1:
                            totals = _scaled_by_unit(
                                sums, scale, (8 * step + 2 * register + half) // mmas, lines, totals
                            )
            words_x = next_x
        words = next_words
        if fmt.block:
            scale = _decoded(ahead, offset, book, fmt)
        ahead = later
        word = following
    if fmt.block == 0:
        at = (upper, lower) if fmt.by_row else (upper * 0, lower * 0)
        of_rows = _decoded(
            (load_scales(scales, second, at[0], fmt), load_scales(scales, second, at[1], fmt)), offset, book, fmt
        )
        totals = _scaled(totals, (of_rows[0], of_rows[0], of_rows[1], of_rows[1]), (zero, zero, zero, zero))
    totals = _side_added(totals, lines)

    row = first_row + _rows(32 * across, tiles_n, of_w)[:, :, None]
    thread = gl.arange(0, 32 * across, gl.SliceLayout(1, of_w))[:, None, None]
    line = 8 * gl.arange(0, tiles_m, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :] + thread % 4 * 2
    for i in gl.static_range(4):
        of_row = row + i // 2 * 8
        column = line + i % 2
        total = gl.convert_layout(gl.sum(totals[i].reshape([along, 32 * across, tiles_n, tiles_m]), 0), layout)
        if bias is not None:
            total += gl.load(bias + of_row, mask=of_row < n, other=0.0).to(gl.float32)
        at = out + (gl.program_id(1) * m + column).to(gl.int64) * n + of_row
        gl.store(at, total.to(out.dtype.element_ty), mask=(of_row < n) & (column < m))
