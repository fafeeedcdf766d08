"""Python source of the CPU kernels of products, specialised to a stencil: every offset is a literal in straight-line code.

`cpu_loops` has those for stencils of many offsets, `cpu_solve` the solves.

A pass over a row folds the terms that read one or a few rows of neighbours into the row's result: with more of them at once the
planes of coefficients, a power of two apart in large images, would drive each other out of the caches.
"""

from collections.abc import Callable, Sequence
from itertools import groupby

from .cpu_source import (
    PLACE,
    SUM_OF_ROWS,
    band_kernel,
    band_rows,
    diagonal_value,
    element_bytes,
    inside,
    load,
    outer_source,
    row_blocks,
    store,
)
from .simd import lanes
from .stencils import Offsets

# Terms folded in one pass, at most, unless one row of neighbours has more.
_TERMS_PER_PASS = 10


class Terms:
    """The stencil's terms as seen from the site that a gather computes, grouped by the row that they read.

    ``Lᵀx`` gathers at j from j + o, with the coefficient of j; ``L x`` gathers at i from i - o, with the coefficient of i - o.
    """

    def __init__(self, offsets: Offsets, dtype: str, transpose: bool):
        sign = 1 if transpose else -1
        padded = [(0,) * (3 - len(offset)) + tuple(offset) for offset in offsets]
        terms = [(k, *(sign * o for o in offset)) for k, offset in enumerate(padded)]
        self.dtype, self.step = dtype, lanes(dtype)
        self.transpose = transpose
        self.groups = [
            (plane, line, [(k, column) for k, _, _, column in group])
            for (plane, line), group in groupby(terms, key=lambda term: term[1:3])
        ]
        self.own_row = [g for g, (plane, line, _) in enumerate(self.groups) if plane == line == 0]

    def passes(self, groups: list[int]) -> list[list[int]]:
        """The groups in lists, each for one pass; at least one, if empty, list."""
        passes, size = [[]], 0
        for g in groups:
            terms = len(self.groups[g][2])
            if passes[-1] and size + terms > _TERMS_PER_PASS:
                passes.append([])
                size = 0
            passes[-1].append(g)
            size += terms
        return passes

    def setup(self) -> str:
        """Per kernel: the distance, in elements, to each group's row."""
        return "".join(f"shift{g} = ({plane} * height + {line}) * width\n" for g, (plane, line, _) in enumerate(self.groups))

    def ends(self, groups: list[int]) -> str:
        """Per row r: the number of sites in each group's row, 0 where it lies off the grid, and the least of these numbers."""
        code = PLACE + "least_end = width\n"
        for g in groups:
            code += f"{self.end(g)}least_end = least(least_end, end{g})\n"
        return code

    def end(self, g: int) -> str:
        """Per row: the number of sites in a group's row, 0 where it lies off the grid."""
        plane, line, _ = self.groups[g]
        return f"end{g} = sites_of_row(p + {plane}, depth, h + {line}, height, width)\n"

    def coefficient(self, g: int, k: int, column: int, masked: bool) -> str:
        source = "w" if self.transpose else f"w + shift{g} + {column}"
        return load("load_c", "c_row", f"{k} * off_k + {source}", masked, _mask(g, column))

    def folds(self, operation: str, groups: Sequence[int], vectors: int = 1) -> str:
        """Definitions for `fold` of these groups."""
        options = f"{operation!r}, {not self.transpose}, {vectors}"
        return "from gmrf_kernels.simd_terms import folds\n\n" + "".join(
            f"globals().update(folds({self.dtype!r}, {g}, {self.groups[g][2]}, {options}))\n" for g in groups
        )

    def fold(
        self,
        groups: list[int],
        begin: Callable,
        finish: Callable,
        masks: Sequence[int] = (),
        vectors: Sequence[str] = ("",),
    ) -> str:
        """One pass over the blocks of a row.

        ``begin(masked)`` sets ``a``, the operation of `folds` adds each term of the groups to it, times values of ``x_row``, or
        subtracts it, and ``finish(masked)`` stores it; that may use the masks of the groups ``masks``. Several ``vectors``
        share each coefficient: their variables have these endings.
        """
        sums, rows = (", ".join(f"{name}{v}" for v in vectors) for name in ("a", "x_row"))

        def block(masked):
            suffix, more = ("_masked", ", end{g}") if masked else ("", "")
            call = f"{sums} = fold{{g}}{suffix}({sums}, c_row, {rows}, w, off_k, shift{{g}}{more})\n"
            return begin(masked) + "".join(call.format(g=g) for g in groups) + finish(masked)

        return self.ends([*groups, *masks]) + self.blocks([*groups, *masks], block, masks)

    def blocks(self, groups: list[int], body: Callable, named: Sequence[int] = ()) -> str:
        """A loop over the blocks of a row; ``body(masked)`` is the code of a block that meets the groups' terms.

        It may use the masks of the groups ``named``.
        """
        columns = [0, *(column for g in groups for _, column in self.groups[g][2])]
        interior = f"{-min(columns)} <= w and w + {self.step} + {max(columns)} <= least_end"
        masks = "".join(
            f"{_mask(g, column)} = between(w, {max(0, -column)}, end{g} - {max(0, column)})\n"
            for g in named
            for _, column in self.groups[g][2]
        )
        return row_blocks(self.step, "0", "width", body, interior, masks)


def _mask(g: int, column: int) -> str:
    return f"mask{g}_{'m' if column < 0 else 'p'}{abs(column)}"


def matvec(
    offsets: Offsets, dtype: str, transpose: bool, cache: bool, log: bool, likelihood: bool = False, together: int = 1
) -> str:
    """y = L x or Lᵀx over bands of rows; ``diag`` is the log-diagonal where ``log``.

    With ``likelihood``, the likelihood of each image is stored, too; scratch holds each row's Σ (½ y² - log_diag). So many
    samples ``together`` share each coefficient that is loaded.
    """
    vector, coefficient = element_bytes(dtype)
    terms = Terms(offsets, dtype, transpose)
    passes = terms.passes(list(range(len(terms.groups))))
    names = [str(v) if together > 1 else "" for v in range(together)]

    def row_pass(number):
        sums = likelihood and number == len(passes) - 1

        def begin(masked):
            if number > 0:
                return "".join(f"a{v} = {load('load', f'y_row{v}', 'w', masked)}\n" for v in names)
            products = (f"a{v} = multiply(d, {load('load', f'x_row{v}', 'w', masked)})\n" for v in names)
            return f"d = {diagonal_value(masked, log)}\n" + "".join(products)

        def finish(masked):
            code = "".join(store("store", f"y_row{v}", "w", f"a{v}", masked) for v in names)
            if sums:
                # Neighbours may be infinite where the site lies beyond the row's end, and their coefficients 0: NaN.
                code += "".join(f"a{v} = keep(a{v}, inside)\n" for v in names if masked)
                code += f"log_d = {load('load', 'd_row', 'w', masked)}\n"
                code += "".join(f"sums{v} = subtract_twice(add_square(sums{v}, a{v}), log_d)\n" for v in names)
            return code

        code = f"d_row = diag + (b * diag_b + r * width) * {vector}\nc_row = off + (b * off_b + r * width) * {coefficient}\n"
        for v in names:
            code += (
                f"x_row{v} = x + (s{v} * x_s + b * x_b + r * width) * {vector}\n"
                f"y_row{v} = y + (s{v} * y_s + b * y_b + r * width) * {vector}\n"
            )
        code += "".join(f"sums{v} = no_sums()\n" for v in names if sums)
        code += terms.fold(passes[number], begin, finish, vectors=names)
        total = "store_double(scratch, (s{v} * batch + b) * rows + r, 0.5 * total(sums{v}))\n"
        code += "".join(total.format(v=v) for v in names if sums)
        return band_rows(code)

    # Where fewer samples are left than go together, the last one is computed several times.
    group = "".join(f"s{v} = min(first + {i}, samples - 1)\n" for i, v in enumerate(names))
    body = f"for first in range(0, samples, {together}):\n" + inside(
        group + "".join(row_pass(number) for number in range(len(passes)))
    )
    arguments = "diag, diag_b, off, off_b, off_k, x, x_s, x_b, y, y_s, y_b" + (", value" if likelihood else "")
    definitions = terms.folds("add_product", range(len(terms.groups)), together)
    finish = SUM_OF_ROWS if likelihood else ""
    return band_kernel(dtype, cache, arguments, terms.setup(), body, finish=finish, definitions=definitions)


def outer(offsets: Offsets, dtype: str, cache: bool, streaming: bool) -> str:
    """Σ_s scale_s a_s b_sᵀ on the stencil, over bands of rows: diagonal and off-diagonals.

    Where ``log_diag`` is not 0 the diagonal is that of the negative log likelihood with respect to it:
    Σ_s scale_s (a_s b_s exp(log_diag) - 1). ``streaming`` writes the off-diagonals past the caches; their rows must then begin
    at multiples of 64 bytes.
    """
    terms = Terms(offsets, dtype, transpose=True)

    definitions = "from gmrf_kernels.simd_terms import outer_row\n\n" + "".join(
        f"outer{g} = outer_row({dtype!r}, {group}, {streaming})\n" for g, (_, _, group) in enumerate(terms.groups)
    )

    def off_diagonals(g):
        vectors = "a_image, a_s, b_image, right_s, weights_of_image, scale_s, samples"
        return band_rows(
            f"c_row = off + (b * {len(offsets)} * n + r * width) * {element_bytes(dtype)[1]}\n"
            + PLACE
            + terms.end(g)
            + f"outer{g}(c_row, {vectors}, r, width, n, shift{g}, end{g})\n"
        )

    code = "".join(off_diagonals(g) for g in range(len(terms.groups)))
    return outer_source(dtype, cache, "", terms.setup(), code, definitions)
