"""x · Wᵀ of few rows of x with a 4-bit W in Gluon: codes wait in shared memory, not in registers.

The arithmetic is that of :mod:`.stored_fragments`: levels from the same table, the same ``mma``, sums of a block times
its scale. What differs is how operands come to it.

**Codes**: every warp has a ring of ``depth`` turns in shared memory, which nobody else reads or writes. A turn is
``steps`` · 128 codes of ``tiles_n`` · 16 rows. Its lanes ask for it by asynchronous copies of 16 bytes, those side by
side for pieces side by side, as soon as the turn that was in its place has been read, and wait for it ``depth`` turns
later. So bytes in flight, ``warps`` · ``depth`` turns per program, do not depend on registers or on where the assembler
puts loads, and no warp waits for another until rows are complete. Bulk copies, one per row, are not used for it: what
they are of comes from uniform registers, so that a warp asks for one lane's after the other's, some 50 clocks each.

**Blocks**: threads read the words that the block of the moment wants, 8 bytes or 4 at a time, so none are exchanged but
for blocks of 16. Rows lie such that a warp's reads meet no bank twice (:func:`_place_of_row`).

**x** is in shared memory too, one round of it (all that the warps multiply in one of their turns) per stage, by bulk
copies of a row each. Where all of it fits it is read from L2 once per program; else its stages are a ring, which all
warps release and one of them fills, each in turn.

**Persistent**: a program takes tiles of rows of W in turn, and asks for the next tile's codes before it has written
this one's sums. Those of its warps that share rows are added in shared memory, in order. Where K is split, the programs
of the splits may be a cluster (``joined``): then each adds part of the sums, which it reads from the others' memory.

Copies are of 16 bytes: K must be a multiple of 32. Weights of which it is not take :mod:`.stored_fragments`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .stored_fragments import (
    MMA_ROWS,
    STEP_WORDS,
    UNIT,
    decoded,
    exchanged_halves,
    filled_table,
    let_next_begin,
    levels,
    mma,
    scaled,
    scaled_by_unit,
    scales_ahead,
    side_added,
    wait_for_previous,
)
from .stored_scales import load_scales

__all__ = ["ROW_CODES", "ring", "room_of"]

#: K is a multiple of it: a row of codes then has a multiple of 16 bytes.
ROW_CODES = 32
_WORD_BYTES = gl.constexpr(4)
#: Codes that the four threads of a row read at a time, at most: 8 bytes each.
_MIX = gl.constexpr(64)


# --- shared memory ---------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _mix_of(unit, lines):
    """Codes of a row, of as many units as stand side by side, of which its threads have 8 bytes or 4 each at a time."""
    return min(_MIX.value, unit * (MMA_ROWS.value // lines))


@gluon.constexpr_function
def _groups_of(mix):
    """Rows that one read of a warp must find in different banks."""
    return 4 if mix == _MIX.value else 8


@gluon.constexpr_function
def _turn_bytes(rows, steps):
    """Of a warp's turn, with 128 bytes that keep banks apart."""
    return rows * steps * UNIT.value // 2 + 128


@gluon.constexpr_function
def _x_pitch(along, steps, mix):
    """Bytes from a row of x to the next: what the warps multiply in a round, and what keeps banks apart."""
    return along * steps * UNIT.value * 2 + {64: 16, 32: 64, 16: 32}[mix]


@gluon.constexpr_function
def _sums_pitch(block_n):
    """Likewise of sums, from a row of x to the next, in numbers."""
    return block_n + 4


@gluon.constexpr_function
def room_of(unit, lines, rows_x, tiles_n, across, along, steps, depth, x_depth):
    """Where turns, x and sums begin in shared memory, and where it ends, in bytes.

    After a piece of 64 that is not used come barriers: of stages of x that are full, of those that are empty.
    """
    mix, warps = _mix_of(unit, lines), across * along
    turns = (64 + 8 * (2 * x_depth) + 127) // 128 * 128
    x = turns + warps * depth * _turn_bytes(16 * tiles_n, steps)
    sums = x + x_depth * rows_x * _x_pitch(along, steps, mix)
    end = sums + along * rows_x * _sums_pitch(16 * across * tiles_n) * 4
    return turns, x, sums, (end + 63) // 64 * 64


# --- instructions ----------------------------------------------------------------------------------------------------


@gluon.jit
def _shared_memory(thread):
    """Where this program's begins, for every thread."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, global_smem; // $1", "=r,r", [thread], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _barriers_made(at, thread, count: gl.constexpr, arrivals):
    """``count`` barriers from ``at`` on, made by as many threads, that wait for ``arrivals`` each; visible once all
    threads have met.
    """
    gl.inline_asm_elementwise(
        "{.reg .pred mine; setp.lt.u32 mine, $2, $3; @mine mbarrier.init.shared::cta.b64 [$1], $4;"
        "fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta; mov.u32 $0, $1;}",
        "=r,r,r,r,r",
        [at + 8 * thread, thread, thread * 0 + count, arrivals],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _expect(barrier, size, mine):
    """One thread, where ``mine``, arrives and announces ``size`` bytes."""
    gl.inline_asm_elementwise(
        "{.reg .pred mine; setp.ne.u32 mine, $3, 0;"
        "@mine mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2; mov.u32 $0, $1;}",
        "=r,r,r,r",
        [barrier, size, mine.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _arrive(barrier, mine):
    gl.inline_asm_elementwise(
        "{.reg .pred mine; setp.ne.u32 mine, $2, 0;@mine mbarrier.arrive.shared::cta.b64 _, [$1]; mov.u32 $0, $1;}",
        "=r,r,r",
        [barrier, mine.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _wait(barrier, parity, mine):
    """Until the phase of that parity is over; only warps where ``mine`` wait."""
    gl.inline_asm_elementwise(
        "{.reg .pred over, mine; setp.ne.u32 mine, $3, 0; setp.eq.u32 over, $3, 0;"
        "again${:uid}: @mine mbarrier.try_wait.parity.shared::cta.b64 over, [$1], $2; @!over bra again${:uid};"
        "bar.warp.sync 0xffffffff; mov.u32 $0, $1;}",
        "=r,r,r,r",
        [barrier, parity, mine.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _meet_warp(thread):
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _meet(thread):
    """All threads of the program."""
    gl.inline_asm_elementwise("bar.sync 0; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _meet_cluster(thread):
    """All threads of the programs of a cluster; what they wrote to shared memory can then be read by each of them."""
    gl.inline_asm_elementwise(
        "barrier.cluster.arrive.release; barrier.cluster.wait.acquire; mov.b32 $0, $1;",
        "=r,r",
        [thread],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _of_program(at, program: gl.constexpr):
    """Where in a cluster the shared memory of its ``program`` has what this one has at ``at``."""
    return gl.inline_asm_elementwise(
        "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", [at, at * 0 + program], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _policy(thread):
    """Of codes, which are read once."""
    return gl.inline_asm_elementwise(
        "createpolicy.fractional.L2::evict_first.b64 $0, 1.0; // $1",
        "=l,r",
        [thread],
        dtype=gl.int64,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _copy_piece(into, source, size, policy):
    """16 bytes of what is read once, those from ``size`` on 0, some time before :func:`_await`."""
    gl.inline_asm_elementwise(
        "cp.async.cg.shared.global.L2::cache_hint [$1], [$2], 16, $3, $4; mov.u32 $0, $1;",
        "=r,r,l,r,l",
        [into, source, size, policy],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _commit(thread):
    """What this thread has asked for since the last time belongs together."""
    gl.inline_asm_elementwise(
        "cp.async.commit_group; mov.b32 $0, $1;", "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1
    )


#: PTX: until all but so many of the last of them have come, to all threads of the warp.
_AWAIT = gl.constexpr(
    tuple(f"cp.async.wait_group {later}; bar.warp.sync 0xffffffff; mov.b32 $0, $1;" for later in range(16))
)


@gluon.jit
def _await(thread, later: gl.constexpr):
    code: gl.constexpr = _AWAIT[later]
    gl.inline_asm_elementwise(code, "=r,r", [thread], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _copy(into, source, size, barrier):
    gl.inline_asm_elementwise(
        "{.reg .pred some; setp.gt.s32 some, $3, 0;"
        "@some cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$1], [$2], $3, [$4];"
        "mov.u32 $0, $1;}",
        "=r,r,l,r,r",
        [into, source, size, barrier],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _read(at):
    return gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _read_two(at):
    return gl.inline_asm_elementwise(
        "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r", [at], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def _read_four(at):
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [at],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _read_two_if(at, wanted):
    return gl.inline_asm_elementwise(
        "{.reg .pred wanted; setp.ne.u32 wanted, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0;"
        "@wanted ld.shared.v2.b32 {$0, $1}, [$2];}",
        "=&r,=&r,r,r",
        [at, wanted.to(gl.int32)],
        dtype=(gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _read_four_if(at, wanted):
    return gl.inline_asm_elementwise(
        "{.reg .pred wanted; setp.ne.u32 wanted, $5, 0;"
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;"
        "@wanted ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];}",
        "=&r,=&r,=&r,=&r,r,r",
        [at, wanted.to(gl.int32)],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


#: PTX: a number of this program's shared memory, or of any of its cluster; 0 where none is wanted.
_READ_SUM, _READ_SUM_OF_ANY = (
    gl.constexpr(
        "{.reg .pred wanted; setp.ne.u32 wanted, $2, 0; mov.f32 $0, 0f00000000;"
        f"@wanted ld.shared::{where}.f32 $0, [$1];}}"
    )
    for where in ("cta", "cluster")
)


@gluon.jit
def _read_sum(at, wanted, of_any: gl.constexpr):
    code: gl.constexpr = _READ_SUM_OF_ANY if of_any else _READ_SUM
    return gl.inline_asm_elementwise(
        code,
        "=&f,r,r",
        [at, wanted.to(gl.int32)],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _write_sum(at, value, wanted):
    gl.inline_asm_elementwise(
        "{.reg .pred wanted; setp.ne.u32 wanted, $3, 0; @wanted st.shared.f32 [$1], $2; mov.u32 $0, $1;}",
        "=r,r,f,r",
        [at, value, wanted.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


# --- operands --------------------------------------------------------------------------------------------------------


@gluon.jit
def _place_of_row(row, rows: gl.constexpr, steps: gl.constexpr, mix: gl.constexpr):
    """Where in a turn a row of codes begins: those that one read of a warp finds together are one pad apart, modulo
    the 128 bytes of all banks.
    """
    groups: gl.constexpr = _groups_of(mix)
    piece: gl.constexpr = steps * UNIT // 2
    return row % groups * (rows // groups * piece + 128 // groups) + row // groups * piece


@gluon.jit
def _pair_of_thread(thread, mix: gl.constexpr):
    """Where among the codes that the threads of a row read together those of one begin, in pairs."""
    if mix == 64:
        pair = thread % 4 * 8
    elif mix == 32:
        pair = thread % 4 * 4
    else:  # whose halves are exchanged
        pair = thread % 2 * 4 + thread // 2 % 2 * 2
    return pair


@gluon.constexpr_function
def _pair_of_register(step, register, mix):
    """How far into a turn the pairs of word ``register`` of a step are from there."""
    return 64 * step + (32 * (register // 2) + 4 * (register % 2) if mix == 64 else 16 * register)


@gluon.constexpr_function
def _column(step, register, mix, unit, lines):
    """Of the units whose sums stand side by side, the number of the first that the threads' words are of."""
    return 2 * _pair_of_register(step, register, mix) // mix * mix // unit % (MMA_ROWS.value // lines)


@gluon.constexpr_function
def _pair_of_word(register, mix):
    """Of a thread's pairs that it reads at a time, where those of a word begin."""
    return 4 * (register % 2) if mix == 64 else 0


@gluon.jit
def _x(
    at,
    own_pair,
    own_column,
    left,
    step: gl.constexpr,
    register: gl.constexpr,
    even: gl.constexpr,
    mix: gl.constexpr,
    unit: gl.constexpr,
    lines: gl.constexpr,
):
    """The words of x ``[threads, tiles]`` that belong to a word of codes: 0 in columns of other blocks, and from the
    pair ``left`` of the turn on.
    """
    pair: gl.constexpr = _pair_of_register(step, register, mix)
    masked: gl.constexpr = lines < MMA_ROWS or not even
    here = own_pair >= 0
    if lines < MMA_ROWS:
        inner = 2 * (own_pair + _pair_of_word(register, mix)) // unit
        here = own_column - _column(step, register, mix, unit, lines) == inner
    if not even:
        here = here & (own_pair + pair < left)
    here, _ = gl.broadcast(here[:, None], at)
    place = at + 4 * pair
    if mix == 16:
        later = here
        if not even:
            later, _ = gl.broadcast((own_pair + pair + 8 < left)[:, None], at)
        if masked:
            first, second = _read_two_if(place, here)
            third, fourth = _read_two_if(place + 32, later)
        else:
            first, second = _read_two(place)
            third, fourth = _read_two(place + 32)
        words = first, second, third, fourth
    elif masked:
        words = _read_four_if(place, here)
    else:
        words = _read_four(place)
    return words


@gluon.jit
def _words(at, step: gl.constexpr, register: gl.constexpr, thread, mix: gl.constexpr):
    """The words of codes ``[threads, tiles]`` from ``register`` of a step on, as many as are read at once."""
    if mix == 64:
        words = _read_two(at + (64 * step + 32 * (register // 2)))
    elif mix == 32:
        words = (_read(at + (64 * step + 16 * register)),)
    else:
        order = gl.where((thread & 2) == 0, 0x5410, 0x3276)[:, None]
        order, _ = gl.broadcast(order, at)
        words = (exchanged_halves(_read(at + (64 * step + 16 * register)), order),)
    return words


# --- rows and turns --------------------------------------------------------------------------------------------------


@gluon.jit
def _after(tile, turn, rounds, programs):
    """The tile and the round that follow."""
    last = turn + 1 >= rounds
    return gl.where(last, tile + programs, tile), gl.where(last, 0, turn + 1)


@gluon.jit
def _ask(
    wanted,
    tile,
    turn,
    stage,
    codes,
    n,
    row_words,
    begin,
    memory,
    thread,
    policy,
    turns_at: gl.constexpr,
    tiles_n: gl.constexpr,
    across: gl.constexpr,
    along: gl.constexpr,
    steps: gl.constexpr,
    depth: gl.constexpr,
    mix: gl.constexpr,
):
    """Every warp, for its rows of a tile, the turn of a round, into a stage of its ring; 0 unless ``wanted``. A row's
    pieces lie side by side, and so do the lanes that ask for them.
    """
    rows: gl.constexpr = 16 * tiles_n
    turn_words: gl.constexpr = steps * STEP_WORDS
    pieces: gl.constexpr = turn_words // 4  # of a row
    at_once: gl.constexpr = 32 // pieces  # rows that a warp asks for at a time
    warp, lane = thread // 32, thread % 32
    own_row, own_piece = lane // pieces, lane % pieces
    row = (tile * across + warp % across) * rows + own_row
    word = begin + (turn * along + warp // across) * turn_words + own_piece * 4
    # Pieces beyond a row's last, and rows beyond the last, are not read.
    last_row = gl.where(wanted & (word < row_words), n, 0)
    source = codes + (row.to(gl.int64) * row_words + word)
    into = memory + turns_at + (warp * depth + stage) * _turn_bytes(rows, steps) + own_piece * 16
    for first in gl.static_range(0, rows, at_once):
        size = gl.where(row + first < last_row, 16, 0)
        _copy_piece(into + _place_of_row(own_row + first, rows, steps, mix), source, size, policy)
        source += at_once * row_words.to(gl.int64)
    _commit(thread)


@gluon.jit
def _ask_x(
    wanted,
    turn,
    stage,
    x,
    m,
    row_words,
    begin,
    memory,
    thread,
    askers: gl.constexpr,
    x_at: gl.constexpr,
    rows_x: gl.constexpr,
    along: gl.constexpr,
    steps: gl.constexpr,
    depth: gl.constexpr,
    x_depth: gl.constexpr,
    mix: gl.constexpr,
):
    """x of a round: row by row by ``askers`` warps in turn, whose threads are the first."""
    round_words: gl.constexpr = along * steps * STEP_WORDS
    word = begin + turn * round_words
    size = gl.minimum(gl.maximum(row_words - word, 0), round_words) * (4 * _WORD_BYTES)
    size = gl.where(wanted & (thread < 32 * askers), size, 0)
    barrier = memory + 64 + 8 * stage
    _expect(barrier, size * m, (thread == 0) & wanted)
    into = memory + x_at + stage * (rows_x * _x_pitch(along, steps, mix))
    for first in gl.static_range(0, rows_x, 32 * askers):
        line = first + thread % 32 * askers + thread // 32
        source = x + (line * row_words + word) * 4
        _copy(into + line * _x_pitch(along, steps, mix), source, gl.where(line < m, size, 0), barrier)


@gluon.jit
def _rows_of(tile, thread, tile_of_warp, tiles_n: gl.constexpr, across: gl.constexpr):
    """The upper of a thread's two rows of W of each tile of 16, ``[threads, tiles]``."""
    first = (tile * across + thread // 32 % across) * (16 * tiles_n) + thread % 32 // 4
    return first[:, None] + 16 * tile_of_warp[None, :]


@gluon.jit
def _scales_of_turn(
    scales,
    second,
    tile,
    turn,
    begin,
    n,
    per_row,
    thread,
    tile_of_warp,
    own_unit,
    unit: gl.constexpr,
    units: gl.constexpr,
    lines: gl.constexpr,
    tiles_n: gl.constexpr,
    across: gl.constexpr,
    along: gl.constexpr,
    steps: gl.constexpr,
    number: gl.constexpr,
    fmt: gl.constexpr,
):
    """What is loaded of the scales of a thread's units in a round; of the last row beyond the last."""
    row = _rows_of(tile, thread, tile_of_warp, tiles_n, across)
    upper = gl.minimum(row, n - 1).to(number) * per_row
    lower = gl.minimum(row + 8, n - 1).to(number) * per_row
    word = begin + turn * (along * steps * STEP_WORDS)
    return scales_ahead(scales, second, upper, lower, word, own_unit, per_row, unit, units, lines, fmt)


# --- kernel ----------------------------------------------------------------------------------------------------------


@gluon.jit
def ring(
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
    tiles,
    rounds,
    fmt: gl.constexpr,
    instruction: gl.constexpr,
    unit: gl.constexpr,
    lines: gl.constexpr,
    rows_x: gl.constexpr,
    tiles_m: gl.constexpr,
    tiles_n: gl.constexpr,
    across: gl.constexpr,
    along: gl.constexpr,
    steps: gl.constexpr,
    depth: gl.constexpr,
    x_depth: gl.constexpr,
    x_stays: gl.constexpr,
    even: gl.constexpr,
    joined: gl.constexpr,
    number: gl.constexpr,
    early: gl.constexpr,
):
    """``out[split, m, n] = x[m, K] · W[n, K]ᵀ`` over the ``rounds`` of a split; x and codes as words of 32 bits.

    Programs take ``tiles`` of ``across`` · ``tiles_n`` · 16 rows of W in turn. ``along`` warps share rows and take
    turns along them. ``rows_x`` rows of x at most. ``x_stays``: whether each of its ``x_depth`` stages is filled once.
    ``even``: whether rounds end where rows do. ``joined``: splits that are a cluster, which adds their sums; else
    1. ``number``: dtype that a scale's number fits. ``early``: launched to begin before the kernel in front has ended.
    """
    warps: gl.constexpr = across * along
    threads: gl.constexpr = 32 * warps
    units: gl.constexpr = steps * UNIT // unit  # pieces of codes that share a scale, of a turn
    side: gl.constexpr = MMA_ROWS // lines  # units whose sums stand side by side
    mix: gl.constexpr = _mix_of(unit, lines)
    mmas: gl.constexpr = min(side * unit // 16, 8 * steps)  # that are summed before scales are applied
    at_once: gl.constexpr = 2 if mix == 64 else 1  # words of codes that a thread reads
    room: gl.constexpr = room_of(unit, lines, rows_x, tiles_n, across, along, steps, depth, x_depth)
    # The first axis is the thread, the others are its registers. Warps that share rows are ``across`` apart.
    layout: gl.constexpr = gl.BlockedLayout([1, tiles_n, tiles_m], [32, 1, 1], [warps, 1, 1], [2, 1, 0])
    of_w: gl.constexpr = gl.SliceLayout(2, layout)
    of_x: gl.constexpr = gl.SliceLayout(1, layout)
    of_thread: gl.constexpr = gl.SliceLayout(1, of_w)
    whole: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffer = gl.allocate_shared_memory(gl.int32, [room[3] // 64, 16], whole)
    # Instructions find it by its symbol, which is there if Triton's own code uses it: here, what nobody else does.
    buffer.index(0).store(gl.zeros([16], gl.int32, gl.BlockedLayout([4], [32], [warps], [0])))

    programs = gl.num_programs(0)
    begin = gl.program_id(1) * rounds * (along * steps * STEP_WORDS)
    tile = gl.program_id(0)
    count = gl.cdiv(tiles - tile, programs) * rounds

    thread = gl.arange(0, threads, of_thread)
    tile_of_warp = gl.arange(0, tiles_n, gl.SliceLayout(0, of_w))
    memory = _shared_memory(thread)
    own_unit = thread // (32 * across) * units
    own_x = gl.arange(0, threads, gl.SliceLayout(1, of_x))
    own_pair = _pair_of_thread(own_x, mix)
    own_column = own_x % 32 // 4 // lines
    line = (own_x % 32 // 4 % lines)[:, None] + 8 * gl.arange(0, tiles_m, gl.SliceLayout(0, of_x))[None, :]
    # Columns beyond the last row of x repeat it, and are not stored.
    own_part = own_x // (32 * across) * (4 * steps * STEP_WORDS)  # in pairs
    from_x = gl.minimum(line, m - 1) * _x_pitch(along, steps, mix) + (4 * (own_part + own_pair))[:, None]
    from_x += _shared_memory(own_x)[:, None] + room[1]
    place = _place_of_row(thread % 32 // 4, 16 * tiles_n, steps, mix) + thread % 4 * (4 * at_once)
    # Every eighth row is at the same distance.
    eight: gl.constexpr = 8 // _groups_of(mix) * (steps * UNIT // 2)
    own_ring = memory + room[0] + thread // 32 * (depth * _turn_bytes(16 * tiles_n, steps))
    upper_at = (own_ring + place)[:, None] + 2 * eight * tile_of_warp[None, :]

    if early:
        let_next_begin()
    _barriers_made(memory + 64, thread, 2 * x_depth, gl.where(thread >= x_depth, warps, 1))
    # What no kernel before writes, then the others.
    table = filled_table(pairs, warps, of_thread)[:, None]
    if early:
        wait_for_previous()

    policy = _policy(thread)
    ask_tile, ask_turn = tile, 0
    for stage in gl.static_range(depth):
        _ask(
            stage < count,
            ask_tile,
            ask_turn,
            stage,
            codes,
            n,
            row_words,
            begin,
            memory,
            thread,
            policy,
            room[0],
            tiles_n,
            across,
            along,
            steps,
            depth,
            mix,
        )
        ask_tile, ask_turn = _after(ask_tile, ask_turn, rounds, programs)
    for stage in gl.static_range(x_depth):
        _ask_x(
            stage < count,
            stage % rounds,
            stage,
            x,
            m,
            row_words,
            begin,
            memory,
            thread,
            warps,
            room[1],
            rows_x,
            along,
            steps,
            depth,
            x_depth,
            mix,
        )
    scale = ()
    if fmt.block:
        now = _scales_of_turn(
            scales,
            second,
            tile,
            0,
            begin,
            n,
            per_row,
            thread,
            tile_of_warp,
            own_unit,
            unit,
            units,
            lines,
            tiles_n,
            across,
            along,
            steps,
            number,
            fmt,
        )
        scale = decoded(now, offset, book, fmt)

    zero = gl.zeros([threads, tiles_n, tiles_m], gl.float32, layout)
    totals = (zero, zero, zero, zero)
    turn, stage, stage_x, phase_x = 0, 0, 0, 0
    for i in range(count):
        next_tile, next_turn = _after(tile, turn, rounds, programs)
        ahead = ()
        if fmt.block:
            ahead = _scales_of_turn(
                scales,
                second,
                next_tile,
                next_turn,
                begin,
                n,
                per_row,
                thread,
                tile_of_warp,
                own_unit,
                unit,
                units,
                lines,
                tiles_n,
                across,
                along,
                steps,
                number,
                fmt,
            )
        always = thread >= 0
        _wait(memory + 64 + 8 * stage_x, thread * 0 + phase_x, always)
        _await(thread, depth - 1)
        upper_words = upper_at + stage * _turn_bytes(16 * tiles_n, steps)
        at_x = from_x + stage_x * (rows_x * _x_pitch(along, steps, mix))
        left = 4 * (row_words - begin - turn * (along * steps * STEP_WORDS)) - own_part
        for step in gl.static_range(steps):
            for register in gl.static_range(4):
                if register % at_once == 0:
                    upper_codes = _words(upper_words, step, register, thread, mix)
                    lower_codes = _words(upper_words + eight, step, register, thread, mix)
                right = _x(at_x, own_pair, own_column, left, step, register, even, mix, unit, lines)
                upper_levels = levels(upper_codes[register % at_once], table)
                lower_levels = levels(lower_codes[register % at_once], table)
                for half in gl.static_range(2):
                    if fmt.block == 0:
                        totals = mma(upper_levels, lower_levels, right, half, totals, instruction)
                    else:
                        if (8 * step + 2 * register + half) % mmas == 0:
                            sums = (zero, zero, zero, zero)
                        sums = mma(upper_levels, lower_levels, right, half, sums, instruction)
                        if (8 * step + 2 * register + half) % mmas == mmas - 1:
                            totals = scaled_by_unit(
                                sums, scale, (8 * step + 2 * register + half) // mmas, lines, totals
                            )
        _meet_warp(thread)
        _ask(
            i + depth < count,
            ask_tile,
            ask_turn,
            stage,
            codes,
            n,
            row_words,
            begin,
            memory,
            thread,
            policy,
            room[0],
            tiles_n,
            across,
            along,
            steps,
            depth,
            mix,
        )
        ask_tile, ask_turn = _after(ask_tile, ask_turn, rounds, programs)
        if not x_stays:
            empty = memory + 64 + 8 * (x_depth + stage_x)
            _arrive(empty, thread % 32 == 0)
            again = i + x_depth < count
            own = gl.where(thread // 32 == i % warps, thread % 32, 32)  # one warp, each in turn: it takes a while
            _wait(empty, thread * 0 + phase_x, (own < 32) & again)
            _ask_x(
                again,
                (turn + x_depth) % rounds,
                stage_x,
                x,
                m,
                row_words,
                begin,
                memory,
                own,
                1,
                room[1],
                rows_x,
                along,
                steps,
                depth,
                x_depth,
                mix,
            )
        if turn == rounds - 1:
            if fmt.block == 0:
                row = gl.minimum(_rows_of(tile, thread, tile_of_warp, tiles_n, across), n - 1)
                at = (row, gl.minimum(row + 8, n - 1)) if fmt.by_row else (row * 0, row * 0)
                of_rows = decoded(
                    (load_scales(scales, second, at[0], fmt), load_scales(scales, second, at[1], fmt)),
                    offset,
                    book,
                    fmt,
                )
                totals = scaled(totals, (of_rows[0], of_rows[0], of_rows[1], of_rows[1]), (zero, zero, zero, zero))
            _store(
                side_added(totals, lines),
                bias,
                out,
                tile,
                m,
                n,
                memory + room[2],
                thread,
                layout,
                lines,
                rows_x,
                tiles_m,
                tiles_n,
                across,
                along,
                joined,
            )
            totals = (zero, zero, zero, zero)
        if fmt.block:
            scale = decoded(ahead, offset, book, fmt)
        tile, turn = next_tile, next_turn
        last = stage == depth - 1
        stage = gl.where(last, 0, stage + 1)
        last = stage_x == x_depth - 1
        stage_x = gl.where(last, 0, stage_x + 1)
        if not x_stays:
            phase_x = gl.where(last, phase_x ^ 1, phase_x)
    if joined > 1:
        _meet_cluster(thread)  # others may still read this one's sums
    buffer._keep_alive()


@gluon.jit
def _store(
    totals,
    bias,
    out,
    tile,
    m,
    n,
    memory,
    thread,
    layout: gl.constexpr,
    lines: gl.constexpr,
    rows_x: gl.constexpr,
    tiles_m: gl.constexpr,
    tiles_n: gl.constexpr,
    across: gl.constexpr,
    along: gl.constexpr,
    joined: gl.constexpr,
):
    """Sums of a tile, those of splits that are joined and of warps that share rows added in order, to memory; every
    thread takes rows beside its neighbours'.
    """
    threads: gl.constexpr = 32 * across * along
    block_n: gl.constexpr = 16 * across * tiles_n
    pitch: gl.constexpr = _sums_pitch(block_n)
    warp, lane = thread // 32, thread % 32
    of_w: gl.constexpr = gl.SliceLayout(2, layout)
    tile_of_warp = gl.arange(0, tiles_n, gl.SliceLayout(0, of_w))[None, :, None]
    tile_of_x = gl.arange(0, tiles_m, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    row = (warp % across * (16 * tiles_n) + lane // 4)[:, None, None] + 16 * tile_of_warp
    column = (lane % 4 * 2)[:, None, None] + 8 * tile_of_x
    part = (memory + warp // across * (rows_x * pitch * 4))[:, None, None]
    if joined > 1:
        _meet_cluster(thread)  # sums of the tile before have been read
    else:
        _meet(thread)
    for i in gl.static_range(4):
        here = part + ((column + i % 2) * pitch + row + i // 2 * 8) * 4
        _write_sum(here, totals[i], (column + i % 2 < m) & (row >= 0))
    if joined > 1:
        _meet_cluster(thread)
    else:
        _meet(thread)
    share: gl.constexpr = (rows_x * block_n + joined - 1) // joined
    split = gl.program_id(1)
    for first in gl.static_range(0, share, threads):
        element = first + thread
        wanted = element < share
        if joined > 1:
            element += split * share
        own_row, own_line = element % block_n, element // block_n
        wanted = wanted & (own_line < m)
        here = memory + (own_line * pitch + own_row) * 4
        total = gl.zeros_like(here).to(gl.float32)
        for program in gl.static_range(joined):
            part = here
            if joined > 1:
                part = _of_program(here, program)
            for k in gl.static_range(along):
                total += _read_sum(part + k * (rows_x * pitch * 4), wanted, joined > 1)
        of_row = tile * block_n + own_row
        wanted = wanted & (of_row < n)
        if bias is not None:
            total += gl.load(bias + of_row, mask=wanted, other=0.0).to(gl.float32)
        line = own_line
        if joined == 1:
            line += split * m
        at = out + line.to(gl.int64) * n + of_row
        gl.store(at, total.to(out.dtype.element_ty), mask=wanted)
