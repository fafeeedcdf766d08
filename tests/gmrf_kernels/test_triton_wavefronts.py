"""Triangular solves with no GPU: the plan of the wavefronts, and the machine code as the schedule launches it."""

import re

import pytest
import torch

from gmrf_kernels.checks import accumulate_dtype
from gmrf_kernels.stencils import wavefront_slopes
from tests.cases import STENCILS

pytest.importorskip("triton")

from gmrf_kernels import triton_kernels
from gmrf_kernels.triton_kernels.geometry import offsets3
from gmrf_kernels.triton_kernels.unrolling import constants, terms_of
from gmrf_kernels.triton_kernels.wavefronts import plan
from tests.gmrf_kernels.triton_compilation import TARGETS, compile_launches

SEVEN = tuple((i, j) for i in range(4) for j in range(-3, 4) if (i, j) > (0, 0))
ALL = {
    **{name: stencil.offsets for name, stencil in STENCILS.items()},
    "7x7": SEVEN,
    "far rows": ((1, 5), (3, -1)),
    "gap row": ((0, 1), (2, 0)),
    "two rows down": ((2, 0), (2, 1)),
}


# --- the plan ---


@pytest.mark.parametrize("stencil", ALL)
@pytest.mark.parametrize("sites", [1, 2, 4, 8])
@pytest.mark.parametrize("one_plane", [False, True])
def test_windows_hold_what_a_block_needs(stencil, sites, one_plane):
    order = plan(offsets3(ALL[stencil]), sites, one_plane)
    windows = {(w.planes, w.rows): w for w in order.windows}
    assert windows[0, 0] == order.windows[0]
    for planes, rows, columns in offsets3(ALL[stencil]):
        window = windows[planes, rows]
        for site in range(sites):
            blocks = (site + columns) // sites
            age = order.slopes[0] * planes + order.slopes[1] * rows + blocks
            assert window.youngest <= age <= window.oldest or (age == 0 and planes == rows == 0)
    for i, window in enumerate(order.windows):
        assert window.blocks == window.youngest - order.slopes[0] * window.planes - order.slopes[1] * window.rows
        if window.source >= 0:
            source = order.windows[window.source]
            assert window.source < i
            assert source.youngest <= window.youngest <= source.oldest
            assert source.planes == window.planes or not one_plane
        elif i > 0:
            assert one_plane


def test_a_block_of_one_site_has_the_slopes_of_sites():
    assert plan(offsets3(SEVEN), 1, False).slopes[1] == wavefront_slopes(SEVEN, 2)[0] == 4
    # Blocks of four sites as long as the stencil's reach begin two steps after those of the row before.
    assert plan(offsets3(SEVEN), 4, False).slopes[1] == 2


@pytest.mark.parametrize("stencil", ALL)
@pytest.mark.parametrize("sites", [1, 2, 4, 8])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_each_term_is_unrolled_once(stencil, sites, full, transpose):
    offsets = offsets3(ALL[stencil])
    order = plan(offsets, sites, False)
    tiles, known, new = terms_of(offsets, order, sites, full, transpose)
    terms = [(term.site, tiles[term.tile].offset) for term in (*known, *new)]
    assert sorted(terms) == [(site, k) for site in range(sites) for k in range(len(offsets))]
    assert all(0 <= term.value < sites * order.blocks_kept for term in known)


@pytest.mark.parametrize("stencil", ALL)
@pytest.mark.parametrize("sites", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 32])
def test_what_a_band_reads_is_older_than_what_it_has_waited_for(stencil, sites, rows):
    """In step t a band loads for step t + 1, and has waited until all before t + 2 - YOUNGEST is done."""
    offsets = offsets3(ALL[stencil])
    order = plan(offsets, sites, one_plane=True)
    unrolled = constants(offsets, sites, True, rows, False)
    bands = {plane.planes: (plane.most_rows, plane.bands) for plane in unrolled["BANDS_BEFORE"]}
    for window in order.windows[1:]:
        assert window.youngest >= unrolled["YOUNGEST"] >= 1
        # Before its own first step a band takes what lies ahead of its first block.
        assert unrolled["LEAD"] >= -window.blocks
        most, count = bands[window.planes]
        for own in range(3 * rows, 4 * rows):
            band = (own - window.rows) // rows
            # Rows of the own band are the program's own.
            assert band in range((3 * rows - most) // rows, (3 * rows - most) // rows + count) or (band, window.planes) == (
                3,
                0,
            )


# --- the machine code ---

CASES = {  # coefficients, offsets, grid
    "3x3": (torch.float32, STENCILS["3x3"].offsets, (64, 64)),
    "7x7": (torch.float32, SEVEN, (64, 64)),
    "7x7, odd sizes": (torch.float32, SEVEN, (63, 65)),
    "7x7 in bands": (torch.float32, SEVEN, (1024, 1024)),
    "7x7, bfloat16": (torch.bfloat16, SEVEN, (64, 64)),
    "5x5, float16 in bands": (torch.float16, STENCILS["5x5"].offsets, (1023, 1023)),
    "7x7, float64 in bands": (torch.float64, SEVEN, (1024, 1024)),
    "colours": (torch.float32, STENCILS["bands of a box"].offsets, (3, 64, 64)),
    "volume": (torch.float32, STENCILS["bands of a box"].offsets, (64, 64, 64)),
}


def machine(case, transpose, target):
    """The kernel that solves for 64 images, each of them with 2 samples."""
    dtype, offsets, grid = CASES[case]
    with torch.device("meta"):
        diag = torch.empty(64, *grid, dtype=accumulate_dtype(dtype))
        off_diag = torch.empty(64, len(offsets), *grid, dtype=dtype)
        b = torch.empty(2, 64, *grid, dtype=diag.dtype)
    (kernel,) = compile_launches(triton_kernels.solve, diag, off_diag, b, offsets, transpose, True, target=target)
    return kernel


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_register_is_spilled(case, transpose, target):
    assert machine(case, transpose, target).spilled == 0


def test_a_block_of_each_tensor_is_one_load_of_16_bytes():
    """24 of coefficients, and the diagonal and the right-hand side."""
    assembly = machine("7x7", True, "sm_90").assembly
    assert re.findall(r"\bld\.global\S*", assembly) == ["ld.global.v4.b32"] * 26
    assert re.findall(r"\bst\.global\S*", assembly) == ["st.global.v4.b32"]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_one_wavefront_hands_over_to_the_next_in_registers(transpose, target):
    """Four values from each of the three rows of neighbours, by shuffles; nothing in shared memory, no barrier."""
    kernel = machine("7x7", transpose, target)
    assert kernel.shared == 0
    assert len(re.findall(r"\bshfl\.sync\.idx", kernel.assembly)) == 3 * 4
    assert "bar." not in kernel.assembly


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_bands_publish_by_release_and_wait_by_acquire(target):
    """All that orders programs, in its order: the ticket; the flags of others, and what they wrote, past the L1 cache, a block
    from each of three rows; the own flag, behind what all lanes have written. Triton passes the results of atomics on to
    all lanes through shared memory, with a barrier before and one behind.
    """
    assembly = machine("7x7 in bands", True, target).assembly
    orders = re.findall(r"bar\.sync|(?<=atom\.global\.gpu\.)\w+|ld\.global\.cg\S*", assembly)
    ticket, wait = ["relaxed", "bar.sync"], ["bar.sync", "acquire", "bar.sync", "bar.sync"]
    publish = ["bar.sync", "release"]
    assert orders == [*ticket, *wait, *["ld.global.cg.v4.b32"] * 3, *publish, *publish]
