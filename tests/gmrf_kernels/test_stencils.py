import itertools

import pytest

from gmrf_kernels.stencils import overlap, unflatten, wavefront_slopes
from tests.cases import GRIDS, STENCILS

MORE = {
    "knight": ((1, -2), (2, -1), (2, 1)),
    "rest that helps": ((1, 3, -9), (0, 1, 0)),
    "one plane on": ((1, 0, 0),),
    "steep": ((0, 1, -4), (1, -2, -1), (2, 3, -7)),
}
ALL = {name: (stencil.offsets, stencil.ndim) for name, stencil in STENCILS.items()}
ALL |= {name: (offsets, len(offsets[0])) for name, offsets in MORE.items()}


def sites(grid):
    return list(itertools.product(*(range(n) for n in grid)))


@pytest.mark.parametrize(("grid", "radius"), [((5,), 7), ((1,), 2), ((2, 3), 3), ((4, 1), 4), ((1, 1, 1), 1), ((2, 3, 1), 3)])
def test_overlap_pairs_every_site_with_its_neighbour_inside_the_grid(grid, radius):
    # Offsets beyond the grid's size, too, where nothing overlaps.
    for offset in itertools.product(range(-radius, radius + 1), repeat=len(grid)):
        slices = overlap(offset, grid)
        here, there = (list(itertools.product(*(range(n)[s] for n, s in zip(grid, which, strict=True)))) for which in slices)
        moved = {site: tuple(i + o for i, o in zip(site, offset, strict=True)) for site in sites(grid)}
        inside = {site: neighbour for site, neighbour in moved.items() if neighbour in moved}
        assert dict(zip(here, there, strict=True)) == inside


def test_overlap_wants_an_offset_component_for_each_axis():
    with pytest.raises(ValueError):
        overlap((1, 0), (3,))


@pytest.mark.parametrize("name", ALL)
def test_slopes_are_the_smallest_by_brute_force(name):
    """Of all slopes that order the sites, the smallest on the last axis but one, then on the one before."""
    offsets, ndim = ALL[name]
    slopes = wavefront_slopes(offsets, ndim)
    assert max(slopes) < 20
    candidates = [(*first, 1) for first in itertools.product(range(20), repeat=ndim - 1)]
    valid = [c for c in candidates if all(sum(s * o for s, o in zip(c, offset, strict=True)) >= 1 for offset in offsets)]
    assert slopes == min(valid, key=lambda c: c[::-1])


@pytest.mark.parametrize("radius", [1, 2, 3])
def test_slope_of_a_square_stencil_is_its_radius_plus_one(radius):
    forward = [(i, j) for i in range(radius + 1) for j in range(-radius, radius + 1) if (i, j) > (0, 0)]
    assert wavefront_slopes(tuple(forward), 2) == (radius + 1, 1)


@pytest.mark.parametrize("name", ALL)
def test_every_neighbour_is_on_an_earlier_wavefront(name):
    offsets, ndim = ALL[name]
    slopes = wavefront_slopes(offsets, ndim)
    for grid in GRIDS[ndim]:
        time = {site: sum(s * i for s, i in zip(slopes, site, strict=True)) for site in sites(grid)}
        for site, offset in itertools.product(time, offsets):
            neighbour = tuple(i + o for i, o in zip(site, offset, strict=True))
            assert neighbour not in time or time[neighbour] > time[site]


@pytest.mark.parametrize("name", ALL)
def test_unflatten_undoes_flattening(name):
    offsets, ndim = ALL[name]
    assert unflatten([component for offset in offsets for component in offset], ndim) == offsets


def test_unflatten_of_nothing_is_no_offsets():
    assert unflatten([], 3) == ()
