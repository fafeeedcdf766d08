"""What the kernel of triangular solves is unrolled from: terms of its recursion, tiles of coefficients, windows, bands.

The kernel has each of these as a constant.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from ..stencils import Offsets
from .wavefronts import Plan, block_shifts, plan


class Tile(NamedTuple):
    """Coefficients of one offset that a block of sites meets: Lᵀ has them at the sites, L at the neighbours."""

    planes: int  # from the site to its neighbour
    rows: int
    offset: int
    shift: int  # blocks from the coefficients to the site
    first: int  # column that counts
    end: int
    first_term: int  # among the known ones
    end_term: int
    place: int  # in its group
    carried: int  # number among the tiles that a lane keeps from the step before, instead of loading them; -1 where it loads


class Group(NamedTuple):
    """Tiles whose coefficients are copied by one load."""

    start: int  # its first tile
    end: int
    loads: int  # tiles that are loaded, a power of two


class Term(NamedTuple):
    """One coefficient times one solution."""

    site: int
    tile: int
    entry: int  # column of the tile
    value: int  # number of the solution: in the windows, or in the order of the solve where it is one of the block itself
    bound: int  # where not 0, the term exists only if the site's column + bound lies on the grid
    edge: int  # number of the edge whose terms are added up by themselves, or -1


class Edge(NamedTuple):
    """Terms that exist together or not at all."""

    site: int
    bound: int


class Window(NamedTuple):
    """Solutions of one row that a block needs."""

    planes: int  # from the site to the youngest block, like rows and youngest
    rows: int
    youngest: int
    blocks: int
    first: int  # number of the first block
    passed_on: int  # number of the block that the source passes on, or -1
    planes_to_source: int
    rows_to_source: int


class PlaneBefore(NamedTuple):
    """Where a band finds the rows that it reads in a plane."""

    planes: int  # before its own
    rows: int  # the fewest before
    most_rows: int
    first_band: int  # its number among those of all planes
    bands: int  # that the rows can lie in


def positions(fields: type[tuple]) -> tuple[tl.constexpr, ...]:
    """The numbers of a named tuple's fields, as code of Triton takes them."""
    return tuple(tl.constexpr(i) for i in range(len(fields._fields)))


@functools.cache
def constants(offsets: Offsets, sites: int, full: bool, band: int, transpose: bool, group: int) -> dict[str, object]:
    """What the kernel is unrolled from, for a stencil and blocks of ``sites`` sites that are all ``full`` or not.

    Where its loads are copied asynchronously, those of up to ``group`` offsets are one, and L loads each coefficient once;
    else ``group`` is 0.
    """
    order = plan(offsets, sites, one_plane=band > 0)
    tiles, known, new, edges = terms_of(offsets, order, sites, full, transpose)
    groups = ()
    if group:
        tiles, groups = _grouped(tiles, group)
    bands_before = _bands_before(order, band) if band else ()
    ahead = max([0, *(-tile.shift for tile in tiles)]) if group else 0
    return {
        "TILES": tiles,
        "GROUPS": groups,
        "CARRIED": sum(tile.carried >= 0 for tile in tiles),
        "AHEAD": ahead,
        "EDGES": edges,
        "KNOWN": known,
        "NEW": new,
        "WINDOWS": _windows(order),
        "KEPT": sites * order.blocks_kept,
        "PLANE_SLOPE": order.slopes[0],
        "ROW_SLOPE": order.slopes[1],
        "FULL": full,
        "BANDS_BEFORE": bands_before,
        "BANDS_READ": triton.next_power_of_2(max(1, sum(plane.bands for plane in bands_before))),
        "LEAD": max(order.lead if band else 0, ahead),
        "YOUNGEST": order.youngest,
    }


def terms_of(
    offsets: Offsets, order: Plan, sites: int, full: bool, transpose: bool
) -> tuple[tuple[Tile, ...], tuple[Term, ...], tuple[Term, ...], tuple[Edge, ...]]:
    """The tiles that a block of sites meets, the terms whose solutions are in the windows, and those of the block itself; the
    edges of the grid at which some of the former do not exist, where blocks are ``full``.

    A tile is loaded as a whole. The load itself leaves out what does not exist in L.
    """
    windows = {(w.planes, w.rows): w for w in order.windows}
    tiles, known, new = [], [], []
    # Old solutions first, the own row last, and in it the nearest neighbours.
    for k in sorted(range(len(offsets)), key=lambda k: (order.windows.index(windows[offsets[k][:2]]), k), reverse=True):
        planes, rows, columns = offsets[k]
        window = windows[planes, rows]
        for shift in [0] if transpose else block_shifts((columns,), sites):
            first, last = (
                (0, sites) if transpose else (max(0, shift * sites - columns), min(sites, (shift + 1) * sites - columns))
            )
            first_term = len(known)
            for column in range(first, last):
                site = column if transpose else column + columns - shift * sites
                neighbour = column + columns if transpose else column - shift * sites
                bound = 0
                if transpose and (not 0 <= neighbour < sites or (columns > 0 and not full)):
                    bound = neighbour // sites * sites if full else neighbour
                blocks = neighbour // sites if transpose else shift
                place = (site, len(tiles), column - first)
                if window.rows == window.planes == 0 and blocks == 0:
                    new.append(Term(*place, sites - 1 - neighbour if transpose else neighbour, bound, -1))
                else:
                    kept = window.first + blocks - window.blocks
                    known.append(Term(*place, kept * sites + neighbour % sites, bound, -1))
            tiles.append(Tile(planes, rows, k, shift, first, last, first_term, len(known), 0, -1))
    # Whole blocks exist or not, so that few bounds decide on many terms.
    edges = sorted({Edge(term.site, term.bound) for term in known if term.bound}) if full else []
    numbers = {edge: number for number, edge in enumerate(edges)}
    known = [term._replace(edge=numbers.get((term.site, term.bound), -1)) for term in known]
    return tuple(tiles), tuple(known), tuple(new), tuple(edges)


def _grouped(tiles: Sequence[Tile], most: int) -> tuple[tuple[Tile, ...], tuple[Group, ...]]:
    """The tiles with their places in groups. Of two of an offset the first is loaded, the other was so a step before."""
    loaded = [i for i, tile in enumerate(tiles) if i == 0 or tiles[i - 1].offset != tile.offset]
    ends = [*loaded[1:], len(tiles)]
    placed, groups, carried = [], [], 0
    while loaded:
        count = min(most, 1 << (len(loaded).bit_length() - 1))
        for place, (first, end) in enumerate(zip(loaded[:count], ends[:count], strict=True)):
            placed.append(tiles[first]._replace(place=place))
            for tile in tiles[first + 1 : end]:
                placed.append(tile._replace(place=place, carried=carried))
                carried += 1
        groups.append(Group(loaded[0], ends[count - 1], count))
        loaded, ends = loaded[count:], ends[count:]
    return tuple(placed), tuple(groups)


def _windows(order: Plan) -> tuple[Window, ...]:
    windows = []
    for w in order.windows:
        source = order.windows[w.source] if w.source >= 0 else w
        passed_on = source.first + w.youngest - source.youngest if w.source >= 0 else -1
        way = (w.planes - source.planes, w.rows - source.rows)
        windows.append(Window(w.planes, w.rows, w.blocks, w.oldest - w.youngest + 1, w.first, passed_on, *way))
    return tuple(windows)


def _bands_before(order: Plan, band: int) -> tuple[PlaneBefore, ...]:
    rows: dict[int, list[int]] = {}
    for w in order.windows[1:]:
        rows.setdefault(w.planes, []).append(w.rows)
    before, first = [], 0
    for planes, distances in sorted(rows.items()):
        bands = (band - 2 + max(distances) - min(distances)) // band + 2
        before.append(PlaneBefore(planes, min(distances), max(distances), first, bands))
        first += bands
    return tuple(before)
