"""The order in which a triangular solve takes blocks of sites, and where a block finds the solutions that it needs.

A row of the grid is cut into blocks of V consecutive sites, and blocks are solved in wavefronts, as DESIGN describes for
single sites: at step t those with ``t = slopes[0]·plane + slopes[1]·row + block`` (planes, rows and blocks counted from where
the solve begins, the end of the grid for L⁻ᵀ). A lane owns a row from its first block to its last, one block a step.

So a solution is known by the lane that computed it and by how many steps ago that was, its *age*: a block's neighbours ``rows``
rows and ``blocks`` blocks before it have age ``slopes[1]·rows + blocks`` whatever the site, and are found in the lane
``rows`` lanes before. A lane keeps a *window* of ages for each row of neighbours that the stencil reads, and all windows
move on by one age a step: only the youngest block of each comes from another lane, and windows that touch pass it on.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from ..stencils import Offsets, wavefront_slopes


@dataclass(frozen=True)
class Window:
    """What a lane keeps of one row of neighbours.

    Args:
        planes, rows: how many the neighbours lie before the site.
        blocks: how many the youngest block lies before the site's own.
        youngest, oldest: ages of the blocks kept, in steps.
        source: number of the window from which the youngest block comes, in the lane as many planes and rows away as the two
            windows are apart; -1 where it is the lane's own solution, or comes from another program.
        first: number of the window's first block among the blocks of all windows.
    """

    planes: int
    rows: int
    blocks: int
    youngest: int
    oldest: int
    source: int
    first: int


@dataclass(frozen=True)
class Plan:
    """Order and windows of a solve.

    Args:
        slopes: steps by which a plane, and a row, begin after the one before.
        windows: the own row first, sources before those that draw on them.
        idle: steps that a lane must pause between two rows, for what it keeps of one never to meet the other.
    """

    slopes: tuple[int, int]
    windows: tuple[Window, ...]
    idle: int

    @property
    def youngest(self) -> int:
        """Age of the youngest block that a lane needs of another row."""
        return min((w.youngest for w in self.windows[1:]), default=1)

    @property
    def lead(self) -> int:
        """How many blocks ahead of its own a lane needs those of another row."""
        return max(0, *(-w.blocks for w in self.windows))

    @property
    def blocks_kept(self) -> int:
        """Blocks in all windows of a lane."""
        return sum(w.oldest - w.youngest + 1 for w in self.windows)


def block_shifts(offset: Sequence[int], sites: int) -> range:
    """How many blocks of ``sites`` sites the neighbours at this offset lie before the sites of one block."""
    return range(offset[-1] // sites, (sites - 1 + offset[-1]) // sites + 1)


@functools.cache
def plan(offsets: Offsets, sites: int, one_plane: bool) -> Plan:
    """The plan for blocks of ``sites`` sites and offsets (planes, rows, columns).

    With ``one_plane`` the lanes of a program own rows of one plane, so that all of other planes comes from other programs.
    """
    neighbours = {(*o[:2], s) for o in offsets for s in block_shifts(o, sites)} - {(0, 0, 0)}
    # The unit offsets make every slope at least 1: rows begin one after the other, and few of them are active at a time.
    slopes = wavefront_slopes((*sorted(neighbours), (0, 1, 0), (1, 0, 0)), 3)
    ages: dict[tuple[int, int], list[int]] = {(0, 0): [1]}
    for p, r, s in neighbours:
        ages.setdefault((p, r), []).append(slopes[0] * p + slopes[1] * r + s)

    kept = {row: [min(a), max(a)] for row, a in ages.items()}
    order = [(0, 0), *sorted(kept.keys() - {(0, 0)}, key=lambda row: (kept[row][0], row))]
    sources = dict.fromkeys(order, -1)
    for i, row in enumerate(order[1:], 1):
        needed = kept[row][0]
        # The lane asked exists whenever the neighbour does, if its own row lies between the site's and the neighbour's.
        between = [
            j
            for j, other in enumerate(order[:i])
            if all(0 <= b <= a or a <= b <= 0 for a, b in zip(row, other, strict=True))
            and not (one_plane and other[0] != row[0])
            and kept[other][0] <= needed
        ]
        if between:
            nearest = min(between, key=lambda j: (max(0, needed - kept[order[j]][1]), -j))
            kept[order[nearest]][1] = max(kept[order[nearest]][1], needed)
            sources[row] = nearest

    windows, first = [], 0
    for row in order:
        blocks = kept[row][0] - slopes[0] * row[0] - slopes[1] * row[1]
        windows.append(Window(*row, blocks, *kept[row], sources[row], first))
        first += kept[row][1] - kept[row][0] + 1
    idle = max((abs(s) for _, _, s in neighbours), default=0)
    return Plan(slopes[:2], tuple(windows), idle)
