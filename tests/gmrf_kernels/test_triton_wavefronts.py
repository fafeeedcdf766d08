"""Triangular solves with no GPU: the plan of the wavefronts, and the machine code as the schedule launches it."""

import re

import pytest
import torch

from gmrf_kernels.checks import accumulate_dtype
from gmrf_kernels.stencils import wavefront_slopes
from tests.cases import STENCILS

pytest.importorskip("triton")

from gmrf_kernels import triton_kernels
from gmrf_kernels.triton_kernels import schedule
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
    tiles, known, new, edges = terms_of(offsets, order, sites, full, transpose)
    terms = [(term.site, tiles[term.tile].offset) for term in (*known, *new)]
    assert sorted(terms) == [(site, k) for site in range(sites) for k in range(len(offsets))]
    assert all(0 <= term.value < sites * order.blocks_kept for term in known)
    # Terms that are added up by themselves exist under the same condition.
    for term in known:
        assert (term.edge >= 0) == (full and term.bound != 0)
        assert term.edge < 0 or edges[term.edge] == (term.site, term.bound)


@pytest.mark.parametrize("stencil", ALL)
@pytest.mark.parametrize("sites", [1, 2, 4, 8])
@pytest.mark.parametrize("transpose", [False, True])
def test_each_coefficient_is_copied_once(stencil, sites, transpose):
    """In groups of powers of two; what a block needs of the block before is what its lane has loaded a step before."""
    offsets = offsets3(ALL[stencil])
    unrolled = constants(offsets, sites, True, 0, transpose, 4)
    tiles, groups = unrolled["TILES"], unrolled["GROUPS"]
    assert [i for group in groups for i in range(group.start, group.end)] == list(range(len(tiles)))
    assert sorted(tile.carried for tile in tiles if tile.carried >= 0) == list(range(unrolled["CARRIED"]))
    loads = []
    for group in groups:
        loaded = {tile.place: tile for tile in tiles[group.start : group.end] if tile.carried < 0}
        assert sorted(loaded) == list(range(group.loads))
        assert group.loads in (1, 2, 4)
        for tile in tiles[group.start : group.end]:
            source = loaded[tile.place]
            assert source.offset == tile.offset
            # A lane goes on by a block in a step.
            assert tile.shift - source.shift == (tile.carried >= 0)
            # It is in the row of the site's own before it loads for it.
            assert source.shift >= -unrolled["AHEAD"]
        loads += [tile.offset for tile in loaded.values()]
    assert sorted(loads) == list(range(len(offsets)))
    assert 0 <= unrolled["AHEAD"] <= plan(offsets, sites, one_plane=False).idle


@pytest.mark.parametrize("stencil", ALL)
@pytest.mark.parametrize("sites", [1, 2, 4, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 32])
def test_what_a_band_reads_is_older_than_what_it_has_waited_for(stencil, sites, rows):
    """In step t a band loads for step t + 1, and has waited until all before t + 2 - YOUNGEST is done."""
    offsets = offsets3(ALL[stencil])
    order = plan(offsets, sites, one_plane=True)
    unrolled = constants(offsets, sites, True, rows, False, 0)
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
    return machine_of(*CASES[case], transpose, target)


def machine_of(dtype, offsets, grid, transpose, target, shift=False):
    """With ``shift`` the coefficients' rows begin at no multiple of a block."""
    with torch.device("meta"):
        diag = torch.empty(64, *grid, dtype=accumulate_dtype(dtype))
        off_diag = torch.empty(64, len(offsets), *grid[:-1], grid[-1] + shift, dtype=dtype)[..., : grid[-1]]
        b = torch.empty(2, 64, *grid, dtype=diag.dtype)
    (kernel,) = compile_launches(triton_kernels.solve, diag, off_diag, b, offsets, transpose, True, target=target)
    return kernel


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_no_register_is_spilled(case, transpose, target):
    assert machine(case, transpose, target).spilled == 0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_block_of_each_tensor_is_one_copy_of_16_bytes(transpose, target):
    """24 of coefficients, and the diagonal and the right-hand side, in each of the steps that are ahead, and in the loop."""
    kernel = machine("7x7", transpose, target)
    ahead = schedule.wavefronts(offsets3(SEVEN), (1, 64, 64), 128, torch.float32).stages - 1
    copies = re.findall(r"\bcp\.async\.cg\.shared\.global [^;]*", kernel.assembly)
    assert len(copies) == 26 * (ahead + 1)
    assert all(" 0x10, " in copy for copy in copies)
    assert "ld.global" not in kernel.assembly
    assert re.findall(r"\bst\.global\S*", kernel.assembly) == ["st.global.v4.b32"]
    # All that is under way is in shared memory: 26 blocks of 16 bytes for each lane and step.
    assert kernel.shared == ahead * 26 * 16 * 32
    assert len(re.findall(r"\bld\.shared\.v4", kernel.assembly)) == 26


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("case", ["3x3", "7x7", "7x7 in bands", "7x7, bfloat16", "volume"])
def test_lanes_read_different_banks_of_shared_memory(case, transpose):
    """What lanes load at once lies side by side: the last axis is a lane's, the one before is that of lanes."""
    orders = re.findall(r"swizzled_shared<\{[^}]*order = \[([^]]*)\]", machine(case, transpose, "sm_90").ttgir)
    assert orders
    assert all(order == "1, 0" or order == "2, 1, 0" for order in orders)


@pytest.mark.parametrize("layout", ["strides", "odd sizes"])
def test_what_is_not_in_vectors_is_not_copied(layout):
    grid = (64, 64) if layout == "strides" else (63, 65)
    kernel = machine_of(torch.float32, SEVEN, grid, True, "sm_90", shift=layout == "strides")
    assert "cp.async" not in kernel.assembly
    assert "ld.global" in kernel.assembly


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_one_wavefront_hands_over_to_the_next_in_registers(transpose, target):
    """Four values from each of the three rows of neighbours, by shuffles; the only barriers are those around what is copied."""
    kernel = machine("7x7", transpose, target)
    shuffles = re.findall(r"shfl\.sync\.idx\.b32\s+%r\d+, (%r\d+),", kernel.assembly)
    assert len(set(shuffles)) == 3 * 4
    step = kernel.assembly[kernel.assembly.index("cp.async.wait_group") : kernel.assembly.rindex("cp.async.wait_group")]
    # One behind the wait for the copies, and one before the next ones go where what has been read was.
    assert re.findall(r"bar\.sync|cp\.async\.wait_group|ld\.shared|cp\.async\.cg", step) == [
        *["cp.async.wait_group", "bar.sync"],
        *["ld.shared"] * 26,
        "bar.sync",
        *["cp.async.cg"] * 26,
    ]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_bands_publish_by_release_and_wait_by_acquire(target):
    """All that orders programs, in its order: the ticket; the flags of others, and what they wrote, past the L1 cache, a block
    from each of three rows; the own flag, behind what all lanes have written, in the loop and at its end. Triton passes the
    results of atomics on to all lanes through shared memory, with a barrier before and one behind ("passed on").
    """
    assembly = machine("7x7 in bands", True, target).assembly
    names = {"bar.sync 0; mov": "barrier", "bar.sync": "passed on", "ld.global.cg.v4.b32": "load"}
    found = re.findall(r"bar\.sync 0; mov|bar\.sync|(?<=atom\.global\.gpu\.)\w+|ld\.global\S*", assembly)
    orders = ", ".join(names.get(each, each) for each in found)
    assert orders.startswith("relaxed, passed on, ")
    assert orders.count("passed on, acquire, passed on, barrier, load, load, load") == orders.count("acquire") == 1
    assert orders.count("load") == 3
    assert orders.count("barrier, release") == orders.count("release") == 2
    assert orders.endswith("barrier, release")
    assert orders.count("relaxed") == 1
