import copy
import pickle

import pytest
import torch

import banded_gmrf as bg
from tests.cases import FACTORS, STENCILS
from tests.dense import exists, neighbours


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_square_is_the_forward_half_of_a_patch(size):
    stencil = bg.Stencil.square(size)
    assert stencil.ndim == 2
    assert len(stencil) == (size**2 - 1) // 2
    both_halves = {*stencil.offsets, (0, 0), *((-i, -j) for i, j in stencil.offsets)}
    radius = size // 2
    assert both_halves == {(i, j) for i in range(-radius, radius + 1) for j in range(-radius, radius + 1)}


def test_box_takes_a_radius_per_axis():
    assert bg.Stencil.box((2,)).offsets == ((1,), (2,))
    assert bg.Stencil.box((0, 1, 0)).offsets == ((0, 1, 0),)
    assert bg.Stencil.box((1, 1)) == bg.Stencil.square(3)
    assert len(bg.Stencil.box((1, 3, 3))) == (3 * 7 * 7 - 1) // 2


def test_cross_reaches_along_the_axes_only():
    assert bg.Stencil.cross(2).offsets == ((0, 1), (0, 2), (1, 0), (2, 0))
    assert bg.Stencil.cross(1, ndim=3).offsets == ((0, 0, 1), (0, 1, 0), (1, 0, 0))
    assert len(bg.Stencil.cross(0)) == 0


def test_offsets_are_kept_in_raster_order():
    stencil = bg.Stencil([(1, 0), [0, 2], torch.tensor([1, -1]), (0, 1)])
    assert stencil.offsets == ((0, 1), (0, 2), (1, -1), (1, 0))
    assert bg.Stencil({2, 1}).offsets == ((1,), (2,))


def test_stencil_without_offsets():
    stencil = bg.Stencil.square(1)
    assert stencil == bg.Stencil([], ndim=2)
    assert len(stencil) == 0
    assert stencil.slopes == (0, 1)
    assert stencil.mask((3, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_mask_tells_which_neighbours_exist(name, grid):
    stencil = STENCILS[name]
    mask = stencil.mask(grid)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, exists(stencil.offsets, grid))


def test_mask_is_made_on_the_device_asked_for():
    assert bg.Stencil.square(3).mask((4, 5), device="meta").device.type == "meta"


@pytest.mark.parametrize("stencil", STENCILS.values(), ids=STENCILS)
def test_slopes_are_the_smallest_that_put_every_offset_ahead(stencil):
    slopes = stencil.slopes
    assert slopes[-1] == 1

    def ahead(slopes):
        return all(sum(s * o for s, o in zip(slopes, offset, strict=True)) >= 1 for offset in stencil.offsets)

    assert ahead(slopes)
    for axis in range(stencil.ndim - 1):
        lower = tuple(s - (a == axis) for a, s in enumerate(slopes))
        assert slopes[axis] == 0 or not ahead(lower)


@pytest.mark.parametrize(("size", "slope", "wavefronts"), [(3, 2, 190), (5, 3, 253), (7, 4, 316)])
def test_wavefronts_of_a_square_stencil_on_64x64(size, slope, wavefronts):
    stencil = bg.Stencil.square(size)
    assert stencil.slopes == (slope, 1)
    assert stencil.num_wavefronts((64, 64)) == wavefronts


@pytest.mark.parametrize("name", ["line", "5x5", "bands of a box"])
def test_one_site_is_one_wavefront(name):
    assert STENCILS[name].num_wavefronts((1,) * STENCILS[name].ndim) == 1


def test_equality_and_hash_are_by_value():
    a, b = bg.Stencil([(0, 1), (1, 0)]), bg.Stencil([(1, 0), (0, 1)])
    assert a == b == bg.Stencil.cross(1)
    assert hash(a) == hash(b)
    assert a != bg.Stencil.square(3)
    assert bg.Stencil.square(1) != bg.Stencil.box((0, 0, 0))
    assert a != a.offsets


@pytest.mark.parametrize("stencil", STENCILS.values(), ids=STENCILS)
def test_repr_pickle_and_copies_give_the_same_stencil(stencil):
    assert eval(repr(stencil), {"Stencil": bg.Stencil}) == stencil
    assert pickle.loads(pickle.dumps(stencil)) == stencil
    assert copy.deepcopy(stencil) == stencil


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: bg.Stencil([(0, 1), (0, 0)]), ValueError, r"offset \(0, 0\) is not forward"),
        (lambda: bg.Stencil([(0, -1)]), ValueError, r"offset \(0, -1\) is not forward"),
        (lambda: bg.Stencil([(-1, 3)]), ValueError, r"offset \(-1, 3\) is not forward"),
        (lambda: bg.Stencil([(0, 1), (1, 0), (0, 1)]), ValueError, r"offset \(0, 1\) occurs 2 times"),
        (lambda: bg.Stencil([(0, 1), (1, 0, 0)]), ValueError, r"offset \(1, 0, 0\) has 3 axes, the stencil has 2"),
        (lambda: bg.Stencil([(0, 1)], ndim=3), ValueError, r"offset \(0, 1\) has 2 axes, the stencil has 3"),
        (lambda: bg.Stencil([(0, 0, 0, 1)]), ValueError, "ndim is 4, expected a grid of 1 to 3 axes"),
        (lambda: bg.Stencil([]), ValueError, "ndim is needed"),
        (lambda: bg.Stencil([], ndim=0), ValueError, "ndim is 0"),
        (lambda: bg.Stencil([], ndim=2.0), TypeError, "ndim is 2.0, expected an integer"),
        (lambda: bg.Stencil([(0, 1.0)]), TypeError, r"offset \(0, 1.0\) is not made of integers"),
        (lambda: bg.Stencil(["ab"]), TypeError, "offset 'ab' is not made of integers"),
        (lambda: bg.Stencil([None]), TypeError, "offset None is not made of integers"),
        (lambda: bg.Stencil(torch.tensor([[0.0, 1.0]])), TypeError, "is not made of integers"),
        (lambda: bg.Stencil(3), TypeError, "offsets is 3, expected a sequence"),
        (lambda: bg.Stencil.square(4), ValueError, "size is 4, expected an odd number"),
        (lambda: bg.Stencil.square(0), ValueError, "size is 0, expected an odd number"),
        (lambda: bg.Stencil.square(-3), ValueError, "size is -3, expected an odd number"),
        (lambda: bg.Stencil.square(3.0), TypeError, "size is 3.0, expected an integer"),
        (lambda: bg.Stencil.box((1, -1)), ValueError, r"radii is \(1, -1\), expected no negative radius"),
        (lambda: bg.Stencil.box((1, 0.5)), TypeError, r"radii\[1\] is 0.5, expected an integer"),
        (lambda: bg.Stencil.box(1), TypeError, "radii is 1, expected one radius per axis"),
        (lambda: bg.Stencil.cross(-1), ValueError, "radius is -1, expected at least 0"),
        (lambda: bg.Stencil.cross("2"), TypeError, "radius is '2', expected an integer"),
        (lambda: bg.Stencil.cross(1, ndim=4), ValueError, "ndim is 4"),
        (lambda: bg.Stencil.square(3).mask((4,)), ValueError, r"grid is \(4,\), expected 2 axes"),
        (lambda: bg.Stencil.square(3).mask((4, 0)), ValueError, r"grid is \(4, 0\), expected 2 axes"),
        (lambda: bg.Stencil([1]).mask(4), TypeError, "grid is 4, expected 1 axes"),
        (lambda: bg.Stencil.square(3).num_wavefronts((4, 4, 4)), ValueError, r"grid is \(4, 4, 4\), expected 2 axes"),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("name", "grid"), FACTORS)
def test_entries_are_those_of_the_dense_factor(name, grid):
    stencil = STENCILS[name]
    k, row, column = stencil.entries(grid)
    assert k.dtype == row.dtype == column.dtype == torch.int64
    raster = torch.arange(torch.tensor(grid).prod()).reshape(grid)
    expected = [(k, raster[there].item(), raster[here].item()) for k, here, there in neighbours(stencil.offsets, grid)]
    assert list(zip(k.tolist(), row.tolist(), column.tolist(), strict=True)) == expected


@pytest.mark.parametrize("name", STENCILS)
def test_reach_and_json(name):
    stencil = STENCILS[name]
    assert stencil.row_reach == max([0, *(offset[0] for offset in stencil.offsets)])
    assert bg.Stencil.from_json(stencil.to_json()) == stencil
