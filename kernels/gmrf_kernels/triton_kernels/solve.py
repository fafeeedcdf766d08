"""Triangular solves with L and Lᵀ: block wavefronts, each row of an image in the hands of one lane.

`wavefronts` says in which order blocks of V sites are solved, and why what a block needs is in registers of its own lane or of
another. A program is one warp, and a step of it passes blocks between lanes by shuffles: no barrier and no memory lie between
one wavefront and the next. Its lanes are the rows active at one time, of as many items (pairs of an image and a sample) as fit,
consecutive samples first, so that samples of one factor load the same addresses with the same instruction. The coefficients
of a step are loaded one step ahead, each into the registers that the step before has just left.

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

from ..stencils import Offsets
from . import schedule
from .exponential import exp
from .geometry import grid3, offsets3, on_device_of, spans_32_bits, strides3
from .unrolling import PlaneBefore, Term, Tile, Window, constants, positions

# Where the fields stand in the tuples from which the kernel unrolls its code: inside of a tuple Triton knows no names.
_PLANES, _ROWS, _OFFSET, _SHIFT, _FROM, _TO, _TERMS, _TERMS_END = positions(Tile)
_PLANES, _ROWS, _YOUNGEST, _COUNT, _FIRST, _PASSED_ON, _PLANES_TO_SOURCE, _ROWS_TO_SOURCE = positions(Window)
_PLANES, _ROWS, _MOST_ROWS, _FIRST_BAND, _BANDS = positions(PlaneBefore)
_SITE, _TILE, _ENTRY, _VALUE, _BOUND = positions(Term)

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
    wide = spans_32_bits(off_diag, ndim=ndim + 1) or spans_32_bits(diag, b, x, ndim=ndim)
    with on_device_of(b):
        _solve[(bands * groups,)](
            *(diag, diag.stride(0), *strides3(diag, ndim)),
            *(off_diag, off_diag.stride(0), off_diag.stride(1), *strides3(off_diag, ndim)),
            *(b, b.stride(0), b.stride(1), *strides3(b, ndim)),
            *(x, counters),
            *(samples, samples * batch, depth, height, width),
            *(groups, chosen.items, chosen.row_lanes),
            **constants(offsets, chosen.sites, width % chosen.sites == 0, chosen.band, transpose),
            TRANSPOSE=transpose,
            LOG=log,
            DIAG_VECTORS=_in_vectors(diag, chosen.sites),
            OFF_VECTORS=_in_vectors(off_diag, chosen.sites),
            B_VECTORS=_in_vectors(b, chosen.sites),
            V=chosen.sites,
            LANES=chosen.lanes,
            BAND=chosen.band,
            PUBLISH=chosen.steps_per_flag,
            INDEX=tl.int64 if wide else tl.int32,
            num_warps=1,
        )
    return x


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
    LEAD: tl.constexpr,  # steps in which a band only gathers from others, before its own first
    YOUNGEST: tl.constexpr,  # age of the youngest block that a band takes from others
    PUBLISH: tl.constexpr,  # steps from one flag of a band to the next
    INDEX: tl.constexpr,
):
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
    if BAND > 0:
        begin -= LEAD
        progress = counter_ptr + 1 + group * (D * bands_per_plane)
        bands_read = _bands_read(first_plane, first_row, bands_per_plane, BANDS_BEFORE, BAND, BANDS_READ)
        read_begins = bands_read // bands_per_plane * PLANE_SLOPE + bands_read % bands_per_plane * (BAND * ROW_SLOPE)
        # No band has been seen yet: the first step waits for what it reads.
        seen = begin - YOUNGEST

    # The first step solves nothing, it only loads for the next.
    kept = _filled(0.0, dtype, KEPT, LANES)
    rights = _filled(0.0, dtype, V, LANES)
    diagonal = _filled(1.0, dtype, V, LANES)
    tiles = ()
    for i in tl.static_range(len(TILES)):
        tiles += (_filled(0.0, off_ptr.dtype.element_ty, TILES[i][_TO] - TILES[i][_FROM], LANES),)
    row = first_row + row_lane
    block = begin - 1 - PLANE_SLOPE * plane - ROW_SLOPE * row
    # Where there are more rows than lanes, a lane goes on from the end of one row to another.
    period = tl.where(rows > row_lanes, ROW_SLOPE * row_lanes, _DONE)

    for step in range(begin - 1, end):
        live = has_item & (row < H) & (block >= 0) & (block < blocks)
        column = (blocks - 1 - block if TRANSPOSE else block) * V
        x_row = (H - 1 - row if TRANSPOSE else row).to(INDEX)

        # The place of the next step, whose values are loaded into the registers that this step leaves.
        row_ends = block + 1 == period
        row = tl.where(row_ends, row + row_lanes, row)
        block = tl.where(row_ends, 0, block + 1)
        next_live = has_item & (row < H) & (block >= 0) & (block < blocks)
        next_row = (H - 1 - row if TRANSPOSE else row).to(INDEX)
        next_column = (blocks - 1 - block if TRANSPOSE else block) * V

        divisors = ()
        for i in tl.static_range(V):
            divisors += (exp(diagonal[i]) if LOG else diagonal[i],)
        sums = rights
        place = b + next_row * b_h + next_column.to(INDEX) * b_w
        rights = _load(place, b_w, next_column, W, next_live, 0.0, 0, V, V, FULL, B_VECTORS, False)
        place = diag + next_row * diag_h + next_column.to(INDEX) * diag_w
        next_diagonal = _load(place, diag_w, next_column, W, next_live, 1.0, 0, V, V, FULL, DIAG_VECTORS, False)

        place = next_row * off_h + next_column.to(INDEX) * off_w
        next_tiles = ()
        for i in tl.static_range(len(TILES)):
            for j in tl.static_range(tl.constexpr(TILES[i][_TERMS]), tl.constexpr(TILES[i][_TERMS_END])):
                sums = _subtract(
                    sums, KNOWN[j][_SITE], tiles[i][KNOWN[j][_ENTRY]], kept[KNOWN[j][_VALUE]], column, W, KNOWN[j][_BOUND]
                )
            # Only now that its registers are free the next tile is loaded.
            exists = next_live & _has_row(plane, row, H, TILES[i][_PLANES], TILES[i][_ROWS])
            distance = TILES[i][_OFFSET] * off_k
            there = next_column
            if not TRANSPOSE:
                exists = exists & (block >= TILES[i][_SHIFT]) & (block - TILES[i][_SHIFT] < blocks)
                distance -= TILES[i][_PLANES] * off_d + TILES[i][_ROWS] * off_h + TILES[i][_SHIFT] * V * off_w
                there -= TILES[i][_SHIFT] * V
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

        arriving = ()
        if BAND > 0:
            seen = _wait(seen, step + 2 - YOUNGEST, progress, bands_read, read_begins)
            for q in tl.static_range(1, len(WINDOWS)):
                exists = has_item & _has_row(plane, row, H, WINDOWS[q][_PLANES], WINDOWS[q][_ROWS])
                if WINDOWS[q][_PASSED_ON] >= 0:
                    exists = exists & (ours[q] == 0)
                exists = exists & (block >= WINDOWS[q][_YOUNGEST]) & (block - WINDOWS[q][_YOUNGEST] < blocks)
                way = (WINDOWS[q][_PLANES] * H + WINDOWS[q][_ROWS]).to(tl.int64) * W + WINDOWS[q][_YOUNGEST] * V
                there = next_column + (WINDOWS[q][_YOUNGEST] * V if TRANSPOSE else -WINDOWS[q][_YOUNGEST] * V)
                pointers = x + next_row * W + next_column + (way if TRANSPOSE else -way)
                arriving += _load(pointers, 1, there, W, exists, 0.0, 0, V, V, FULL, FULL, True)

        # The recursion along the block. Solutions are kept with their sign turned, so that a term is one fused operation.
        turned = ()
        for i in tl.static_range(V):
            for j in tl.static_range(len(NEW)):
                if NEW[j][_SITE] == (V - 1 - i if TRANSPOSE else i):
                    sums = _subtract(
                        sums,
                        NEW[j][_SITE],
                        tiles[NEW[j][_TILE]][NEW[j][_ENTRY]],
                        turned[NEW[j][_VALUE]],
                        column,
                        W,
                        NEW[j][_BOUND],
                    )
            quotient = _divide(sums[V - 1 - i if TRANSPOSE else i], divisors[V - 1 - i if TRANSPOSE else i])
            exists = live if FULL else live & (column + (V - 1 - i if TRANSPOSE else i) < W)
            # Every lane passes on what it has: 0 where there is no site.
            turned += (tl.where(exists, 0.0 - quotient, 0.0),)
        solved = ()
        moved = ()
        for i in tl.static_range(V):
            solved += (0.0 - turned[V - 1 - i if TRANSPOSE else i],)
            moved += (turned[V - 1 - i if TRANSPOSE else i],)
        _store(x + x_row * W + column, solved, column, W, live, V, FULL)

        # The windows move on by a step.
        for q in tl.static_range(len(WINDOWS)):
            if q > 0:
                for i in tl.static_range(V):
                    youngest = 0.0 - arriving[(q - 1) * V + i] if BAND > 0 else 0.0
                    if WINDOWS[q][_PASSED_ON] >= 0:
                        passed_on = tl.gather(moved[WINDOWS[q][_PASSED_ON] * V + i], sources[q], 0)
                        youngest = tl.where(ours[q], passed_on, youngest)
                    moved += (youngest,)
            for i in tl.static_range(tl.constexpr((WINDOWS[q][_COUNT] - 1) * V)):
                moved += (kept[WINDOWS[q][_FIRST] * V + i],)
        kept = moved
        tiles = next_tiles
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
        tile = tl.load(_vectors(first, V), lanes[:, None], other=other, cache_modifier=CACHE)
        whole = _split(tile, V)
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
    for i in tl.static_range(5):
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
def _has_row(plane, row, H, PLANES: tl.constexpr, ROWS: tl.constexpr):
    """The row so many planes and rows before this one exists."""
    exists = row < H
    if PLANES > 0:
        exists = exists & (plane >= PLANES)
    if ROWS > 0:
        exists = exists & (row >= ROWS)
    elif ROWS < 0:
        exists = exists & (row - ROWS < H)
    return exists


@triton.jit
def _divide(a, b):
    """The correctly rounded quotient."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def _subtract(sums, SITE: tl.constexpr, entry, turned, column, W, BOUND: tl.constexpr):
    """The sums, that of one site less a term: the entry, if it exists, times a solution whose sign is turned."""
    if BOUND < 0:
        entry = tl.where(column + BOUND >= 0, entry, 0.0)
    elif BOUND > 0:
        entry = tl.where(column + BOUND < W, entry, 0.0)
    rest = tl.fma(entry.to(turned.dtype), turned, sums[SITE])
    rests = ()
    for i in tl.static_range(len(sums)):
        rests += (rest if i == SITE else sums[i],)
    return rests


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
        tl.debug_barrier()
    return seen


@triton.jit
def _publish(progress, step, now):
    """Let other programs know that all steps before this one are done."""
    if now:
        # The flag must not be seen before what the other lanes of this program have written.
        tl.debug_barrier()
        tl.atomic_xchg(progress, step, sem="release")
