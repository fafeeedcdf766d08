"""Writes `generated_solve.md`: the kernel that solves with a 3 × 3 stencil on a CPU, as `gmrf_kernels.cpu_solve` generates it.

python kernels/print_generated_solve.py
"""

from pathlib import Path

from gmrf_kernels.cpu_solve import solve

PAGE = Path(__file__).with_name("generated_solve.md")

OFFSETS = ((0, 1), (1, -1), (1, 0), (1, 1))

TEXT = """# A generated kernel

The CPU backend writes Python source for each stencil and compiles it with Numba. Below is what `gmrf_kernels/cpu_solve.py`
writes for x = L⁻ᵀb, the solve behind every sample, with the 3 × 3 stencil in float32, one image at a time. Its four offsets,
(0, 1), (1, -1), (1, 0) and (1, 1), are numbered 0 to 3, and each has lines of its own. `kernels/print_generated_solve.py` makes
this page, and a test compares it with the code.

* `load`, `store`, `between` and the other functions are one or a few vector instructions on 16 sites (`gmrf_kernels/simd.py`);
  those with `_masked` leave out the lanes in which a mask is off.
* `shift1` is how far away the next row is, in sites; `mask1_p1` says at which sites of a block the neighbour one row and one
  column on exists.
* `data` is the address of all arguments. Threads draw the numbers of the images to solve from its first element.
* Rows are solved from the last to the first. A row's *gather* leaves (b - what the next row contributes) / d in plane 0 of the
  scratch and the row's own coefficient, divided by d, in plane 1, so that the *recursion* needs one multiply-add a site:
  x[w] = plane 0 - plane 1 · x[w + 1].
* Where such a quotient overflows or is subnormal, the row is walked *again* from what was kept in plane 2 (what is left of b)
  and plane 3 (d), with a division a site.

<!-- fmt: off -->
```python
{code}```
<!-- fmt: on -->
"""


def page() -> str:
    code = solve(OFFSETS, "float32", transpose=True, cache=True, log=True, chains=1)
    return TEXT.format(code=code)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
