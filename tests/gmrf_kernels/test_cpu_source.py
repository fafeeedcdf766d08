"""The sources of CPU kernels: what Numba has to read of them grows with the rows of neighbours, not with the offsets."""

import itertools
import re

import pytest

from gmrf_kernels import cpu_solve, cpu_unrolled

# The neighbours before a site within two planes, rows and columns: 62 offsets in 13 rows, of which one is the site's own.
OFFSETS = tuple(o for o in itertools.product(range(3), range(-2, 3), range(-2, 3)) if o > (0, 0, 0))
ROWS = {o[:2] for o in OFFSETS}
COMMON = {"dtype": "float32", "cache": False}


@pytest.mark.parametrize(
    ("source", "operation", "calls"),
    [
        # With masks and without.
        (cpu_unrolled.matvec(OFFSETS, transpose=True, log=True, **COMMON), r"fold\d+(_masked)?", 2 * len(ROWS)),
        (cpu_solve.solve(OFFSETS, transpose=True, log=True, chains=1, **COMMON), r"fold\d+(_masked)?", 2 * (len(ROWS) - 1)),
        (cpu_unrolled.outer(OFFSETS, streaming=False, **COMMON), r"outer\d+", len(ROWS)),
    ],
    ids=["matvec", "solve", "outer"],
)
def test_a_row_of_neighbours_is_one_operation(source, operation, calls):
    """With operations for each offset Numba took fifteen seconds for these."""
    found = [match[0] for match in re.finditer(rf"\b{operation}(?=\()", source.partition("def kernel")[2])]
    assert len(found) == len(set(found)) == calls


def test_loops_of_an_outer_product_are_not_written_for_each_row():
    """Written so, its kernel took five seconds, more than all else of a first step."""
    row, rows = (cpu_unrolled.outer(offsets, streaming=False, **COMMON).count("for w in") for offsets in (OFFSETS[:2], OFFSETS))
    assert row == rows
