"""The printed kernel is the one that is generated."""

import runpy
from pathlib import Path

KERNELS = Path(__file__).parent.parent.parent / "kernels"


def test_the_page_shows_the_kernel():
    program = runpy.run_path(str(KERNELS / "print_generated_solve.py"))
    expected = program["PAGE"].read_text(encoding="utf-8")
    assert program["page"]() == expected, "run python kernels/print_generated_solve.py"
