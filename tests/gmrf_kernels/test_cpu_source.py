"""The sources of CPU kernels: what Numba has to read of them grows with the rows of neighbours, not with the offsets."""

import itertools

import pytest

from gmrf_kernels import cpu_solve, cpu_unrolled

# The neighbours before a site within two planes, rows and columns: 62 offsets in 13 rows, of which one is the site's own.
OFFSETS = tuple(o for o in itertools.product(range(3), range(-2, 3), range(-2, 3)) if o > (0, 0, 0))
ROWS = {o[:2] for o in OFFSETS}
COMMON = {"dtype": "float32", "cache": False}


@pytest.mark.parametrize(
    ("source", "name", "rows"),
    [
        (cpu_unrolled.matvec(OFFSETS, transpose=True, log=True, **COMMON), "fold", len(ROWS)),
        (cpu_solve.solve(OFFSETS, transpose=True, log=True, chains=1, **COMMON), "fold", len(ROWS) - 1),
        (cpu_unrolled.outer(OFFSETS, streaming=False, **COMMON), "add", len(ROWS)),
    ],
    ids=["matvec", "solve", "outer"],
)
def test_a_row_of_neighbours_is_one_operation(source, name, rows):
    """With operations for each offset Numba took fifteen seconds for these."""
    calls = [
        line.split(" = ")[1].split("(")[0] for line in source.splitlines() if f" = {name}" in line and "product" not in line
    ]
    assert len(calls) == len(set(calls)) == 2 * rows  # with masks and without
