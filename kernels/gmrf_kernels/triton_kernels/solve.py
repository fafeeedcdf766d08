"""Triangular solves with L and Lᵀ: block wavefronts, each row of an image in the hands of one lane.

`wavefronts` says in which order blocks of V sites are solved, and why what a block needs is in registers of its own lane or of
another. A program is one warp, and a step of it passes blocks between lanes by shuffles: no barrier and no memory lie between
one wavefront and the next. Its lanes are the rows active at one time, of as many items (pairs of an image and a sample) as fit,
consecutive samples first, so that samples of one factor load the same addresses with the same instruction. The coefficients
of a step are copied into shared memory some steps ahead, where tensors stand in aligned blocks; else they are loaded one step
ahead, each into the registers that the step before has just left.

Where more rows are active at once than a program has lanes, bands of rows are programs that follow each other: a band reads
from memory what its rows need of the bands before it, and waits for those where they are not far enough. Bands take their
numbers from a counter, so a band only ever waits for programs that have begun before it: in whatever order the GPU starts
programs, and however few it holds at a time, they cannot wait for each other for ever.

Bytes moved through memory: each coefficient, diagonal and right-hand side is read once, each solution written once.

One file because it is one loop: its steps and the functions that they call share the layout of registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import current_target, is_cuda

from ..stencils import Offsets
from . import schedule
from .exponential import exp, exp_in_factors
from .geometry import grid3, offsets3, on_device_of, spans_32_bits, strides3
from .unrolling import Edge, Group, PlaneBefore, Term, Tile, Window, constants, positions

# Where the fields stand in the tuples from which the kernel unrolls its code: inside of a tuple Triton knows no names.
_PLANES, _ROWS, _OFFSET, _SHIFT, _FROM, _TO, _TERMS, _TERMS_END, _PLACE, _CARRIED = positions(Tile)
_START, _END, _LOADS = positions(Group)
_PLANES, _ROWS, _YOUNGEST, _COUNT, _FIRST, _PASSED_ON, _PLANES_TO_SOURCE, _ROWS_TO_SOURCE = positions(Window)
_PLANES, _ROWS, _MOST_ROWS, _FIRST_BAND, _BANDS = positions(PlaneBefore)
_SITE, _TILE, _ENTRY, _VALUE, _BOUND, _EDGE = positions(Term)
_SITE, _EDGE_BOUND = positions(Edge)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Later than every step.
_DONE = tl.constexpr(2**30)


def solve(diag: Tensor, off_diag: Tensor, b: Tensor, offsets: Offsets, transpose: bool, log: bool) -> Tensor:
    """L⁻¹b, or L⁻ᵀb with ``transpose``: (S, B, *grid); ``diag`` is the log-diagonal where ``log``."""
    samples, batch, *grid = b.shape
    ndim = len(grid)
    depth, height, width = grid3(grid)
    offsets = offsets3(offsets)
    chosen = schedule.wavefronts(offsets, (depth, height, width), samples * batch, off_diag.dtype)
    # Not `triton.cdiv`, which takes long on the host in some releases: this runs at every launch.
    groups = -(-samples * batch // chosen.items)
    bands = depth * -(-height // chosen.band) if chosen.band else 1
    x = torch.empty_like(b, memory_format=torch.contiguous_format)
    counters = torch.zeros(1 + bands * groups, dtype=torch.int32, device=b.device) if chosen.band else None
    vectors = [_in_vectors(tensor, chosen.sites) for tensor in (diag, off_diag, b)]
    full = width % chosen.sites == 0
    wide = spans_32_bits(off_diag, ndim=ndim + 1) or spans_32_bits(diag, b, x, ndim=ndim)
    with on_device_of(b):
        stages = chosen.stages if full and all(vectors) and _copies_asynchronously() else 1
        _solve[(bands * groups,)](
            *(diag, diag.stride(0), *strides3(diag, ndim)),
            *(off_diag, off_diag.stride(0), off_diag.stride(1), *strides3(off_diag, ndim)),
            *(b, b.stride(0), b.stride(1), *strides3(b, ndim)),
            *(x, counters),
            *(samples, samples * batch, depth, height, width),
            *(groups, chosen.items, chosen.row_lanes),
            **constants(offsets, chosen.sites, full, chosen.band, transpose, chosen.group if stages > 1 else 0),
            TRANSPOSE=transpose,
            LOG=log,
            DIAG_VECTORS=vectors[0],
            OFF_VECTORS=vectors[1],
            B_VECTORS=vectors[2],
            V=chosen.sites,
            LANES=chosen.lanes,
            BAND=chosen.band,
            PUBLISH=chosen.steps_per_flag,
            TURNS=not chosen.band and height > chosen.row_lanes,
            STAGES=stages,
            INDEX=tl.int64 if wide else tl.int32,
            num_warps=1,
        )
    return x


def _copies_asynchronously() -> bool:
    """The GPU can copy from memory to shared memory while it computes, and the compiler knows how to."""
    target = current_target()
    # The interpreter, on a machine with no GPU, takes the same steps.
    return target is None or (target.backend == "cuda" and target.arch >= 80)


def _in_vectors(tensor: Tensor, sites: int) -> bool:
    """Every block of sites, in rows of a multiple of as many, is one aligned piece of memory."""
    *strides, last = tensor.stride()
    return last == 1 and all(s % sites == 0 for s in strides) and tensor.data_ptr() % (sites * tensor.itemsize) == 0


# All that the code must know of sizes and strides are constants of their own.
_SIZES = [
    *(f"{tensor}_{axis}" for tensor in ("diag", "off", "b") for axis in "sbkdhw"),
    *("samples", "all_items", "D", "H", "W", "groups", "items", "row_lanes"),
]


@triton.jit(do_not_specialize=_SIZES)
def _solve(
    diag_ptr,  # (B, D, H, W): the diagonal, or its logarithm where LOG
    diag_b: tl.int64,
    diag_d: tl.int64,
    diag_h,
    diag_w,
    off_ptr,  # (B, K-1, D, H, W)
    off_b: tl.int64,
    off_k,
    off_d,
    off_h,
    off_w,
    b_ptr,  # (S, B, D, H, W)
    b_s: tl.int64,
    b_b: tl.int64,
    b_d: tl.int64,
    b_h,
    b_w,
    x_ptr,  # (S, B, D, H, W), contiguous
    counter_ptr,  # (1 + bands · groups,): bands that have begun; then, for each, the first step that it has not done
    samples,  # S
    all_items,  # S · B
    D,
    H,
    W,
    groups,  # of items; a program solves one group, or a band of one
    items,  # in a group
    row_lanes,  # lanes of one plane of one item
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    CARRIED: tl.constexpr,  # tiles that a lane keeps from the step before
    AHEAD: tl.constexpr,  # steps before a row's first block in which a lane loads for the row already
    EDGES: tl.constexpr,  # of the grid, whose terms are added up by themselves
    KNOWN: tl.constexpr,
    NEW: tl.constexpr,
    WINDOWS: tl.constexpr,
    KEPT: tl.constexpr,  # sites in all windows of a lane
    BANDS_BEFORE: tl.constexpr,
    BANDS_READ: tl.constexpr,  # no band reads more others
    PLANE_SLOPE: tl.constexpr,
    ROW_SLOPE: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    LOG: tl.constexpr,
    FULL: tl.constexpr,  # W is a multiple of V
    DIAG_VECTORS: tl.constexpr,  # every block of the tensor is one aligned piece of memory
    OFF_VECTORS: tl.constexpr,
    B_VECTORS: tl.constexpr,
    V: tl.constexpr,  # sites of a block
    LANES: tl.constexpr,
    BAND: tl.constexpr,  # rows of a band; 0 where a program solves all rows
    LEAD: tl.constexpr,  # steps before the first that solves, in which values are only gathered
    YOUNGEST: tl.constexpr,  # age of the youngest block that a band takes from others
    PUBLISH: tl.constexpr,  # steps from one flag of a band to the next
    TURNS: tl.constexpr,  # lanes go on from the end of a row to another
    STAGES: tl.constexpr,  # of the loop, with loads that are copied asynchronously; 1 with loads a step ahead
    INDEX: tl.constexpr,
):
    COPIED: tl.constexpr = STAGES > 1
    # What stands for a diagonal where there is no site.
    UNIT: tl.constexpr = 0.0 if LOG else 1.0
    dtype = x_ptr.dtype.element_ty
    blocks = tl.cdiv(W, V)
    if BAND > 0:
        ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed")
        group = ticket % groups
        band = ticket // groups
        bands_per_plane = tl.cdiv(H, BAND)
        first_plane = band // bands_per_plane
        first_row = band % bands_per_plane * BAND
        planes = 1
        rows = tl.minimum(H - first_row, BAND)
    else:
        group = tl.program_id(0)
        first_plane = 0
        first_row = 0
        planes = D
        rows = H

    # Planes, rows and blocks are counted in the order of the solve: for Lᵀ from the end of the grid.
    lane = tl.arange(0, LANES)
    own_item = lane // (planes * row_lanes)
    plane_lane = lane // row_lanes % planes
    row_lane = lane % row_lanes
    item = group.to(tl.int64) * items + own_item
    has_item = (own_item < items) & (item < all_items)
    sample = item % samples
    image = item // samples
    plane = first_plane + plane_lane
    site_plane = (D - 1 - plane if TRANSPOSE else plane).to(tl.int64)
    diag = diag_ptr + image * diag_b + site_plane * diag_d
    off = off_ptr + image * off_b + site_plane * off_d
    off_k, off_d, off_h, off_w = off_k.to(INDEX), off_d.to(INDEX), off_h.to(INDEX), off_w.to(INDEX)
    b = b_ptr + sample * b_s + image * b_b + site_plane * b_d
    x = x_ptr + ((sample * (all_items // samples) + image) * D + site_plane) * H * W

    # For each window the lane that passes on its youngest block, and whether that block is this program's.
    sources = ()
    ours = ()
    for q in tl.static_range(len(WINDOWS)):
        source_plane = plane_lane - WINDOWS[q][_PLANES_TO_SOURCE]
        source_row = row_lane - WINDOWS[q][_ROWS_TO_SOURCE]
        ours += ((source_plane >= 0) & ((rows > row_lanes) | ((source_row >= 0) & (source_row < rows))),)
        source_row = (source_row % row_lanes + row_lanes) % row_lanes
        source = (own_item * planes + tl.maximum(source_plane, 0)) * row_lanes + source_row
        sources += (tl.minimum(source, LANES - 1),)

    begin = PLANE_SLOPE * first_plane + ROW_SLOPE * first_row
    end = begin + PLANE_SLOPE * (planes - 1) + ROW_SLOPE * (rows - 1) + blocks
    begin -= LEAD
    if BAND > 0:
        progress = counter_ptr + 1 + group * (D * bands_per_plane)
        bands_read = _bands_read(first_plane, first_row, bands_per_plane, BANDS_BEFORE, BAND, BANDS_READ)
        read_begins = bands_read // bands_per_plane * PLANE_SLOPE + bands_read % bands_per_plane * (BAND * ROW_SLOPE)
        # No band has been seen yet: the first step waits for what it reads.
        seen = begin - YOUNGEST

    # The first step solves nothing: it only loads for the next, what is not copied, and what comes from other bands.
    kept = _filled(0.0, dtype, KEPT, LANES)
    rights = _filled(0.0, dtype, V, LANES)
    diagonal = _filled(UNIT, dtype, V, LANES)
    tiles = ()
    for i in tl.static_range(len(TILES)):
        if not COPIED or TILES[i][_CARRIED] >= 0:
            tiles += (_filled(0.0, off_ptr.dtype.element_ty, TILES[i][_TO] - TILES[i][_FROM], LANES),)
    # A lane begins its first row in this step. Where there are more rows than lanes it goes on from the end of one to another:
    # all do so after the same number of steps, in which turns of the first lane are counted.
    start = PLANE_SLOPE * plane + ROW_SLOPE * (first_row + row_lane)
    period = ROW_SLOPE * row_lanes
    turns_before = 0
    if TURNS:
        turns_before = start // period
        start = start % period
    phase = period - 1
    turn = -1

    for step in tl.range(begin - 1, end, num_stages=STAGES):
        row, block = _place(step, phase, turn, start, turns_before, period, first_row + row_lane, row_lanes, AHEAD, TURNS)
        live = has_item & _below(row, H) & _below(block, blocks)
        column = (blocks - 1 - block if TRANSPOSE else block) * V
        x_row = (H - 1 - row if TRANSPOSE else row).to(INDEX)
        turn_ends = phase + 1 == period
        phase = tl.where(turn_ends, 0, phase + 1)
        turn = tl.where(turn_ends, turn + 1, turn)

        load_row, load_block, load_live = row, block, live
        if not COPIED:
            # The place of the next step, whose values are loaded into the registers that this step leaves.
            load_row, load_block = _place(
                step + 1, phase, turn, start, turns_before, period, first_row + row_lane, row_lanes, AHEAD, TURNS
            )
            load_live = has_item & _below(load_row, H) & _below(load_block, blocks)
        site_row = (H - 1 - load_row if TRANSPOSE else load_row).to(INDEX)
        site_column = (blocks - 1 - load_block if TRANSPOSE else load_block) * V

        place = b + (site_row * b_h + site_column.to(INDEX) * b_w)
        next_rights = _load(place, b_w, site_column, W, load_live, 0.0, 0, V, V, FULL, B_VECTORS, False)
        place = diag + (site_row * diag_h + site_column.to(INDEX) * diag_w)
        next_diagonal = _load(place, diag_w, site_column, W, load_live, UNIT, 0, V, V, FULL, DIAG_VECTORS, False)
        if COPIED:
            rights, diagonal = next_rights, next_diagonal

        sums = rights
        edges = _filled(0.0, dtype, len(EDGES), LANES)
        place = site_row * off_h + site_column.to(INDEX) * off_w
        next_tiles = ()
        if COPIED:
            kept_tiles = tiles
            tiles = ()
            for g in tl.static_range(len(GROUPS)):
                copied = _copy(
                    off,
                    place,
                    off_k,
                    off_d,
                    off_h,
                    off_w,
                    plane,
                    load_row,
                    load_block,
                    load_live,
                    has_item,
                    H,
                    blocks,
                    TILES,
                    GROUPS,
                    g,
                    TRANSPOSE,
                    V,
                )
                for i in tl.static_range(tl.constexpr(GROUPS[g][_START]), tl.constexpr(GROUPS[g][_END])):
                    columns = _columns(copied, TILES[i][_PLACE] * V + TILES[i][_FROM], TILES[i][_PLACE] * V + TILES[i][_TO])
                    if TILES[i][_CARRIED] >= 0:
                        tiles += (kept_tiles[TILES[i][_CARRIED]],)
                        next_tiles += (columns,)
                    else:
                        tiles += (columns,)
        for i in tl.static_range(len(TILES)):
            for j in tl.static_range(tl.constexpr(TILES[i][_TERMS]), tl.constexpr(TILES[i][_TERMS_END])):
                entry, value = tiles[i][KNOWN[j][_ENTRY]], kept[KNOWN[j][_VALUE]]
                if KNOWN[j][_EDGE] >= 0:
                    edges = _subtract(edges, KNOWN[j][_EDGE], entry, value)
                else:
                    sums = _subtract(sums, KNOWN[j][_SITE], _on_grid(entry, column, W, KNOWN[j][_BOUND]), value)
            if not COPIED:
                # Only now that its registers are free the next tile is loaded.
                exists = load_live & _has_row(plane, load_row, H, TILES[i][_PLANES], TILES[i][_ROWS])
                there = site_column
                if not TRANSPOSE:
                    exists = exists & _below(load_block - TILES[i][_SHIFT], blocks)
                    there -= TILES[i][_SHIFT] * V
                distance = _distance(off_k, off_d, off_h, off_w, TILES, i, TRANSPOSE, V)
                next_tiles += (
                    _load(
                        off + (place + distance),
                        off_w,
                        there,
                        W,
                        exists,
                        0.0,
                        TILES[i][_FROM],
                        TILES[i][_TO],
                        V,
                        FULL,
                        OFF_VECTORS,
                        False,
                    ),
                )
        for e in tl.static_range(len(EDGES)):
            sums = _add(sums, EDGES[e][_SITE], _on_grid(edges[e], column, W, EDGES[e][_EDGE_BOUND]))

        # The recursion along the block, in which solutions are in the order of the solve.
        new = ()
        for i in tl.static_range(V):
            solution = _divided(
                _in_block(sums, V - 1 - i if TRANSPOSE else i, tiles, new, column, W, NEW),
                diagonal[V - 1 - i if TRANSPOSE else i],
                LOG,
            )
            if not FULL:
                solution = tl.where(live & (column + (V - 1 - i if TRANSPOSE else i) < W), solution, 0.0)
            new += (solution,)
        solved = ()
        moved = ()
        for i in tl.static_range(V):
            solution = new[V - 1 - i if TRANSPOSE else i]
            solved += (solution,)
            # Every lane passes on what it has: 0 where there is no site.
            moved += (tl.where(live, solution, 0.0) if FULL else solution,)
        _store(x + (x_row * W + column), solved, column, W, live, V, FULL)

        arriving = _filled(0.0, dtype, (len(WINDOWS) - 1) * V if BAND > 0 else 0, LANES)
        if BAND > 0:
            seen = _wait(seen, step + 2 - YOUNGEST, progress, bands_read, read_begins)
            # Inside of a branch, which the compiler moves no load out of.
            if seen >= step + 2 - YOUNGEST:
                arriving = _arriving(
                    x, plane, row, block, x_row, column, has_item, ours, H, W, blocks, WINDOWS, TRANSPOSE, FULL, V
                )

        # The windows move on by a step.
        for q in tl.static_range(len(WINDOWS)):
            if q > 0:
                for i in tl.static_range(V):
                    youngest = arriving[(q - 1) * V + i] if BAND > 0 else 0.0
                    if WINDOWS[q][_PASSED_ON] >= 0:
                        passed_on = tl.gather(moved[WINDOWS[q][_PASSED_ON] * V + i], sources[q], 0)
                        youngest = tl.where(ours[q], passed_on, youngest)
                    moved += (youngest,)
            for i in tl.static_range(tl.constexpr((WINDOWS[q][_COUNT] - 1) * V)):
                moved += (_renewed(kept[WINDOWS[q][_FIRST] * V + i]),)
        kept = moved
        tiles = next_tiles
        if not COPIED:
            rights = next_rights
            diagonal = next_diagonal

        if BAND > 0:
            _publish(progress + band, step + 1, (step - begin) % PUBLISH == PUBLISH - 1)
    if BAND > 0:
        _publish(progress + band, _DONE, True)


@triton.jit
def _load(
    first,
    stride,
    column,
    W,
    lanes,
    other,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    V: tl.constexpr,
    FULL: tl.constexpr,
    VECTORS: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Columns of a block of V sites of each lane, as so many tensors (LANES,): ``other`` where no site or no lane is."""
    # The L1 cache does not learn of what other programs write while this one runs.
    CACHE: tl.constexpr = ".cg" if SHARED else ""
    columns = ()
    if VECTORS:
        # Of three axes, for the columns to be laid out as those of groups are: else the compiler keeps windows in both ways.
        tile = tl.load(_vectors(first, V)[None, :, :], lanes[None, :, None], other=other, cache_modifier=CACHE)
        whole = _split(tl.reshape(tile, (lanes.shape[0], V)), V)
        for i in tl.static_range(FROM, TO):
            columns += (whole[i],)
    else:
        for i in tl.static_range(FROM, TO):
            exists = lanes if FULL else lanes & (column + i < W)
            columns += (tl.load(first + i * stride, exists, other=other, cache_modifier=CACHE),)
    return columns


@triton.jit
def _store(first, columns, column, W, lanes, V: tl.constexpr, FULL: tl.constexpr):
    """Write a block of V sites of each lane."""
    if FULL:
        tl.store(_vectors(first, V), _join(columns, V), lanes[:, None])
    else:
        for i in tl.static_range(V):
            tl.store(first + i, columns[i], lanes & (column + i < W))


@triton.jit
def _vectors(first, V: tl.constexpr):
    """(LANES, V) pointers to aligned pieces of memory."""
    size: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(first[:, None] + tl.arange(0, V)[None, :], (size, V * size))


@triton.jit
def _split(tile, V: tl.constexpr):
    """The V columns of a tile (LANES, V). They are in registers of their lanes already: no data moves."""
    columns = (tile,)
    for i in tl.static_range(8):
        if V >> i > 1:
            even = ()
            odd = ()
            for j in tl.static_range(1 << i):
                first, second = tl.split(tl.reshape(columns[j], (tile.shape[0], V >> (i + 1), 2)))
                even += (first,)
                odd += (second,)
            columns = even + odd
    flat = ()
    for j in tl.static_range(V):
        flat += (tl.reshape(columns[j], (tile.shape[0],)),)
    return flat


@triton.jit
def _join(columns, V: tl.constexpr):
    """The tile (LANES, V) with these columns."""
    tiles = columns
    for i in tl.static_range(5):
        if V >> i > 1:
            pairs = ()
            for j in tl.static_range(V >> (i + 1)):
                pair = tl.join(tiles[j], tiles[j + (V >> (i + 1))])
                pairs += (tl.reshape(pair, (columns[0].shape[0], 2 << i)),)
            tiles = pairs
    return tl.reshape(tiles[0], (columns[0].shape[0], V))


@triton.jit
def _filled(value, dtype: tl.constexpr, COUNT: tl.constexpr, LANES: tl.constexpr):
    """So many tensors (LANES,)."""
    columns = ()
    for _ in tl.static_range(COUNT):
        columns += (tl.full((LANES,), value, dtype),)
    return columns


@triton.jit
def _place(step, phase, turn, start, turns_before, period, first_row, row_lanes, AHEAD: tl.constexpr, TURNS: tl.constexpr):
    """Row and block that each lane is at; a row begins with blocks before the first, so many ``AHEAD``."""
    if TURNS:
        late = phase < start
        block = phase - start - AHEAD + tl.where(late, period, 0)
        row = first_row + (turn - turns_before) * row_lanes - tl.where(late, row_lanes, 0)
    else:
        block = step - start
        row = first_row
    return row, block


@triton.jit
def _below(index, size):
    """0 <= index < size, in one comparison."""
    return index.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def _has_row(plane, row, H, PLANES: tl.constexpr, ROWS: tl.constexpr):
    """The row so many planes and rows before this one exists."""
    exists = _below(row, H)
    if PLANES > 0:
        exists = exists & (plane >= PLANES)
    if ROWS > 0:
        exists = exists & (row >= ROWS)
    elif ROWS < 0:
        exists = exists & (row - ROWS < H)
    return exists


@triton.jit
def _divided(a, diagonal, LOG: tl.constexpr):
    """a over the diagonal, correctly rounded where its logarithm is not what is given."""
    if a.dtype == tl.float32:
        if LOG:
            first, second = exp_in_factors(diagonal * -1.0)
            return a * first * second
        else:
            return tl.div_rn(a, diagonal)
    else:
        return a / (exp(diagonal) if LOG else diagonal)


@triton.jit
def _on_grid(entry, column, W, BOUND: tl.constexpr):
    """The entry, or 0 where the neighbour is not on the grid."""
    if BOUND < 0:
        entry = tl.where(column + BOUND >= 0, entry, 0.0)
    elif BOUND > 0:
        entry = tl.where(column + BOUND < W, entry, 0.0)
    return entry


@triton.jit
def _subtract(sums, NUMBER: tl.constexpr, entry, solution):
    """The sums, one of them less a term."""
    rests = ()
    for i in tl.static_range(len(sums)):
        rests += (_less(sums[i], entry, solution) if i == NUMBER else sums[i],)
    return rests


@triton.jit
def _add(sums, NUMBER: tl.constexpr, part):
    """The sums, one of them with a part that was added up by itself."""
    joined = ()
    for i in tl.static_range(len(sums)):
        joined += (sums[i] + part if i == NUMBER else sums[i],)
    return joined


@triton.jit
def _in_block(sums, SITE: tl.constexpr, tiles, new, column, W, NEW: tl.constexpr):
    """The sum of one site less the terms whose solutions are in its own block."""
    rest = sums[SITE]
    for j in tl.static_range(len(NEW)):
        if NEW[j][_SITE] == SITE:
            entry = _on_grid(tiles[NEW[j][_TILE]][NEW[j][_ENTRY]], column, W, NEW[j][_BOUND])
            rest = _less(rest, entry, new[NEW[j][_VALUE]])
    return rest


@triton.jit
def _less(rest, entry, solution):
    # Times -1 costs nothing: the sign is turned where the product reads it.
    return tl.fma(entry.to(solution.dtype) * -1.0, solution, rest)


@triton.jit
def _renewed(x):
    """The same number. The compiler does not know that, and overlaps no steps of a loop that hands on values unchanged."""
    return tl.fma(x, 1.0, -0.0)


@triton.jit
def _distance(off_k, off_d, off_h, off_w, TILES: tl.constexpr, INDEX: tl.constexpr, TRANSPOSE: tl.constexpr, V: tl.constexpr):
    """From a block of sites to the coefficients of a tile."""
    distance = TILES[INDEX][_OFFSET] * off_k
    if not TRANSPOSE:
        distance -= TILES[INDEX][_PLANES] * off_d + TILES[INDEX][_ROWS] * off_h + TILES[INDEX][_SHIFT] * V * off_w
    return distance


@triton.jit
def _copy(
    off,
    place,
    off_k,
    off_d,
    off_h,
    off_w,
    plane,
    row,
    block,
    live,
    has_item,
    H,
    blocks,
    TILES: tl.constexpr,
    GROUPS: tl.constexpr,
    NUMBER: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    V: tl.constexpr,
):
    """The coefficients of a group, so many tensors (LANES,): V of each tile that it loads."""
    COUNT: tl.constexpr = GROUPS[NUMBER][_LOADS]
    LANES: tl.constexpr = live.shape[0]
    index = tl.arange(0, COUNT)[:, None]
    distance = tl.full((COUNT, 1), 0, off_k.dtype)
    exists = tl.full((COUNT, LANES), False, tl.int1)
    for i in tl.static_range(tl.constexpr(GROUPS[NUMBER][_START]), tl.constexpr(GROUPS[NUMBER][_END])):
        if TILES[i][_CARRIED] < 0:
            its = index == TILES[i][_PLACE]
            distance = tl.where(its, _distance(off_k, off_d, off_h, off_w, TILES, i, TRANSPOSE, V), distance)
            its_block = live if TRANSPOSE else has_item & _below(block - TILES[i][_SHIFT], blocks)
            its_exists = its_block & _has_row(plane, row, H, TILES[i][_PLANES], TILES[i][_ROWS])
            exists = tl.where(its, its_exists[None, :], exists)
    # Of two axes, so that in shared memory too lanes follow each other, and none waits for another that reads the same bank.
    pointers = _vectors(tl.reshape(off[None, :] + (place[None, :] + distance), (COUNT * LANES,)), V)
    tiles = tl.load(pointers, tl.reshape(exists, (COUNT * LANES,))[:, None], other=0.0)
    tiles = tl.permute(tl.reshape(tiles, (COUNT, LANES, V)), (1, 0, 2))
    return _split(tl.reshape(tiles, (LANES, COUNT * V)), COUNT * V)


@triton.jit
def _columns(columns, FROM: tl.constexpr, TO: tl.constexpr):
    """Some of them."""
    taken = ()
    for i in tl.static_range(FROM, TO):
        taken += (columns[i],)
    return taken


@triton.jit
def _arriving(
    x,
    plane,
    row,
    block,
    x_row,
    column,
    has_item,
    ours,
    H,
    W,
    blocks,
    WINDOWS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    FULL: tl.constexpr,
    V: tl.constexpr,
):
    """The youngest block of each window but the first, where another program has solved it, as the next step needs it."""
    arriving = ()
    for q in tl.static_range(1, len(WINDOWS)):
        exists = has_item & _has_row(plane, row, H, WINDOWS[q][_PLANES], WINDOWS[q][_ROWS])
        if WINDOWS[q][_PASSED_ON] >= 0:
            exists = exists & (ours[q] == 0)
        # Seen from the block of this step, which comes before that of the next.
        exists = exists & _below(block - (WINDOWS[q][_YOUNGEST] - 1), blocks)
        way = (WINDOWS[q][_PLANES] * H + WINDOWS[q][_ROWS]).to(tl.int64) * W + (WINDOWS[q][_YOUNGEST] - 1) * V
        there = column + ((WINDOWS[q][_YOUNGEST] - 1) * V if TRANSPOSE else (1 - WINDOWS[q][_YOUNGEST]) * V)
        pointers = x + (x_row * W + column) + (way if TRANSPOSE else -way)
        arriving += _load(pointers, 1, there, W, exists, 0.0, 0, V, V, FULL, FULL, True)
    return arriving


@triton.jit
def _bands_read(plane, row, bands_per_plane, BEFORE: tl.constexpr, BAND: tl.constexpr, COUNT: tl.constexpr):
    """Numbers of the bands that the band at this plane and row reads, (COUNT,), -1 where there are fewer."""
    index = tl.arange(0, COUNT)
    bands = tl.full((COUNT,), -1, tl.int32)
    for i in tl.static_range(len(BEFORE)):
        nth = index - BEFORE[i][_FIRST_BAND]
        band = tl.maximum(row - BEFORE[i][_MOST_ROWS], 0) // BAND + nth
        reads = (nth >= 0) & (nth < BEFORE[i][_BANDS]) & (plane >= BEFORE[i][_PLANES])
        if BEFORE[i][_PLANES] == 0:
            reads = reads & (band * BAND < row)
        else:
            reads = reads & (band < bands_per_plane) & (band * BAND < row + BAND - BEFORE[i][_ROWS])
        bands = tl.where(reads, (plane - BEFORE[i][_PLANES]) * bands_per_plane + band, bands)
    return bands


@triton.jit
def _wait(seen, needed, progress, bands, begins):
    """Wait until each of the bands has done all steps before ``needed``; returns before which step all is known to be done."""
    if seen < needed:
        while seen < needed:
            done = tl.atomic_add(progress + bands, 0, bands >= 0, sem="acquire")
            # Whoever has not begun yet has nothing to do before its first step.
            seen = tl.min(tl.where(bands >= 0, tl.maximum(done, begins), _DONE), axis=0)
        # The lanes that have seen the flags let the others read.
        _synchronize()
    return seen


@triton.jit
def _publish(progress, step, now):
    """Let other programs know that all steps before this one are done."""
    if now:
        # The flag must not be seen before what the other lanes of this program have written.
        _synchronize()
        tl.atomic_xchg(progress, step, sem="release")


@triton.jit
def _synchronize():
    """Order what the lanes of a program read and write."""
    if is_cuda() and not _INTERPRETED:
        # The compiler overlaps no steps of a loop in which it knows of a barrier.
        tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r,~{memory}", [], tl.int32, is_pure=False, pack=1)
    else:
        tl.debug_barrier()
