"""Python source of the CPU kernels for stencils of many offsets: loops over a table of them, compiled once for all stencils.

`cpu_unrolled` and `cpu_solve` have code for each offset, which for hundreds of them takes minutes to compile. Here a kernel
takes a few offsets after the other, and adds their terms to whole rows of the result: these stay in the nearest cache, while
coefficients are read in runs of a row or more.

Items and arguments are those that `cpu_source` describes. Before the other arguments come the address of the table, int64
(plane, line, column) of each offset in raster order, and the number of offsets.
"""

from collections.abc import Callable

from .cpu_source import (
    PLACE,
    SUM_OF_ROWS,
    band_kernel,
    band_rows,
    diagonal_value,
    element_bytes,
    inside,
    kernel_source,
    load,
    outer_source,
    row_blocks,
    store,
    store_off_diagonal,
    weighted_samples,
)
from .simd import lanes
from .stencils import Offsets

# Terms taken at once: results are loaded and stored once for all of them.
_GROUP = 4

# Sites of a row, a multiple of the lanes of a vector, that a solve takes at a time: vectors subtract what comes from other
# sites, a recursion what comes from the block itself.
_BLOCK = 64

_STENCIL = "table, terms, "


def table(offsets: Offsets) -> list[tuple[int, int, int]]:
    """The rows of the table, and some more of zeros because groups may reach beyond the last offset."""
    rows = [(*(0,) * (3 - len(offset)), *offset) for offset in offsets]
    return rows + [(0, 0, 0)] * (_GROUP - 1)


def _each_group(transpose: bool, first: str, last: str, body: str) -> str:
    """A loop over the offsets in groups: by their term ``i``, sites read ``shift{i}`` elements further on.

    As in `cpu_unrolled`, Lᵀx gathers at j from j + o, with the coefficient of j, and L x at i from i - o, with that of i - o.
    """
    sign = "" if transpose else "-"
    code = "".join(
        f"plane{i} = {sign}load_int(table, 3 * (t + {i}))\n"
        f"line{i} = {sign}load_int(table, 3 * (t + {i}) + 1)\n"
        f"column{i} = {sign}load_int(table, 3 * (t + {i}) + 2)\n"
        f"shift{i} = (plane{i} * height + line{i}) * width + column{i}\n"
        for i in range(_GROUP)
    )
    return f"for t in range({first}, {last}, {_GROUP}):\n" + inside(code + body)


def _limits(last: str) -> str:
    """Per row r: the columns from ``begin{i}`` to ``end{i}`` whose sites find a neighbour there, none beyond term ``last``."""
    return "".join(
        f"begin{i} = max(0, -column{i})\n"
        f"exists = t + {i} < {last} and 0 <= p + plane{i} < depth and 0 <= h + line{i} < height\n"
        f"end{i} = width - max(0, column{i}) if exists else 0\n"
        for i in range(_GROUP)
    )


def _of_all(function: str, name: str) -> str:
    return f"{function}({', '.join(f'{name}{i}' for i in range(_GROUP))})"


# The columns between any of the group's limits, and those between all of them.
_EXTENT = (
    f"begin, end = {_of_all('min', 'begin')}, {_of_all('max', 'end')}\n"
    f"all_begin, all_end = {_of_all('max', 'begin')}, {_of_all('min', 'end')}\n"
)


def _group_blocks(dtype: str, begin: str, end: str, body: Callable) -> str:
    """The blocks of a row from ``begin`` to ``end``; ``mask{i}`` has the sites between the limits of term ``i``."""
    interior = f"all_begin <= w and w + {lanes(dtype)} <= all_end"
    masks = "".join(f"mask{i} = between(w, begin{i}, end{i})\n" for i in range(_GROUP))
    return row_blocks(lanes(dtype), begin, end, body, interior, masks)


def _add_terms(dtype: str, transpose: bool, operation: str, result: str, source: str, each_sample: Callable) -> str:
    """Add the group's products to a row of the result of each sample, or subtract them, between each term's limits."""
    vector, coefficient = element_bytes(dtype)
    coefficients = "".join(
        f"c_row{i} = off + (b * off_b + (t + {i}) * off_k + r * width{'' if transpose else f' + shift{i}'}) * {coefficient}\n"
        for i in range(_GROUP)
    )
    neighbours = "".join(f"moved{i} = {source} + shift{i} * {vector}\n" for i in range(_GROUP))

    def block(masked):
        code = f"a = {load('load', result, 'w', masked)}\n"
        for i in range(_GROUP):
            stored = load("load_c", f"c_row{i}", "w", masked, f"mask{i}")
            neighbour = load("load", f"moved{i}", "w", masked, f"mask{i}")
            code += f"a = {operation}(a, {stored}, {neighbour})\n"
        return code + store("store", result, "w", "a", masked)

    blocks = _group_blocks(dtype, "begin", "end", block)
    return _EXTENT + coefficients + each_sample(neighbours + blocks)


def matvec(dtype: str, transpose: bool, cache: bool, log: bool, likelihood: bool = False) -> str:
    """As `cpu_unrolled.matvec`."""
    vector, _ = element_bytes(dtype)
    d_row = f"d_row = diag + (b * diag_b + r * width) * {vector}\n"

    def each_sample(body):
        rows = (
            f"x_row = x + (s * x_s + b * x_b + r * width) * {vector}\ny_row = y + (s * y_s + b * y_b + r * width) * {vector}\n"
        )
        return "for s in range(samples):\n" + inside(rows + body)

    def diagonal(masked):
        value = f"multiply({diagonal_value(masked, log)}, {load('load', 'x_row', 'w', masked)})"
        return store("store", "y_row", "w", value, masked)

    def add_to_sums(masked):  # lanes beyond the row's end are 0
        return (
            f"sums = add_square(sums, {load('load', 'y_row', 'w', masked)})\n"
            f"sums = subtract_twice(sums, {load('load', 'd_row', 'w', masked)})\n"
        )

    add_terms = _add_terms(dtype, transpose, "add_product", "y_row", "x_row", each_sample)
    body = band_rows(d_row + each_sample(row_blocks(lanes(dtype), "0", "width", diagonal)))
    body += _each_group(transpose, "0", "terms", band_rows(PLACE + _limits("terms") + add_terms))
    if likelihood:
        total = "store_double(scratch, (s * batch + b) * rows + r, 0.5 * total(sums))\n"
        sums = "sums = no_sums()\n" + row_blocks(lanes(dtype), "0", "width", add_to_sums) + total
        body += band_rows(d_row + each_sample(sums))
    arguments = "diag, diag_b, off, off_b, off_k, x, x_s, x_b, y, y_s, y_b" + (", value" if likelihood else "")
    finish = SUM_OF_ROWS if likelihood else ""
    return band_kernel(dtype, cache, _STENCIL + arguments, "", body, finish=finish)


def solve(dtype: str, transpose: bool, cache: bool, log: bool) -> str:
    """As `cpu_solve.solve`, with a division a site; the samples of an image in a span are solved in step.

    The result begins as the right-hand side. What other rows contribute is subtracted from a whole row, what other blocks of
    the row contribute from a block. The recursion within the block reads its coefficients from scratch.
    """
    vector, _ = element_bytes(dtype)
    step = lanes(dtype)

    def each_sample(body):
        row = f"x_row = x + ((s * batch + b) * n + r * width) * {vector}\n"
        return "for s in range(first_sample, last_sample):\n" + inside(row + body)

    def copy(masked):
        return store("store", "x_row", "w", load("load", "b_row", "w", masked), masked)

    def keep_diagonal(masked):
        return f"store(scratch, w - left, {diagonal_value(masked, log)})\n"

    def keep_coefficient(masked):
        return f"store(scratch, (t + 1) * {_BLOCK} + w - left, {load('load_c', 'c_row', 'w', masked)})\n"

    right_side = f"b_row = rhs + (s * rhs_s + b * rhs_b + r * width) * {vector}\n" + row_blocks(step, "0", "width", copy)
    subtract_terms = _add_terms(dtype, transpose, "subtract_product", "x_row", "x_row", each_sample)
    if transpose:
        from_outside, from_block = "max(left, right - column{i}), min(width - column{i}, right)", "left, right - column"
    else:
        from_outside, from_block = "max(-column{i}, left), min(left - column{i}, right)", "left + column, right"
    outside_limits = "".join(
        f"begin{i}, end{i} = {from_outside.format(i=i)}\nend{i} = end{i} if t + {i} < own else 0\n" for i in range(_GROUP)
    )
    keep_coefficients = (
        "column = load_int(table, 3 * t + 2)\n"
        f"c_row = off + (b * off_b + t * off_k + r * width{'' if transpose else ' - column'}) * {element_bytes(dtype)[1]}\n"
        f"begin, end = {from_block}\n" + row_blocks(step, "begin", "end", keep_coefficient)
    )
    recursion = (
        "near = 0\n"
        "for i in range(right - left):\n"
        f"    w = {'right - 1 - i' if transpose else 'left + i'}\n"
        "    while near < own and load_int(table, 3 * near + 2) <= i:\n"
        "        near += 1\n"
        "    a = load_scalar(x_row, w)\n"
        # The nearest neighbour comes last: only its product waits for the previous step.
        "    for t in range(near - 1, -1, -1):\n"
        f"        solved = load_scalar(x_row, w {'+' if transpose else '-'} load_int(table, 3 * t + 2))\n"
        f"        a = subtract_product_scalar(a, load_scalar(scratch, (t + 1) * {_BLOCK} + w - left), solved)\n"
        "    store_scalar(x_row, w, a / load_scalar(scratch, w - left))\n"
    )
    per_block = (
        f"left = {'blocks - 1 - block' if transpose else 'block'}\n"
        f"left *= {_BLOCK}\n"
        f"right = min(left + {_BLOCK}, width)\n"
        + _each_group(transpose, "0", "own", outside_limits + subtract_terms)
        + "for t in range(own):\n"
        + inside(keep_coefficients)
        + row_blocks(step, "left", "right", keep_diagonal)
        + each_sample(recursion)
    )
    per_row = (
        f"r = {'rows - 1 - j' if transpose else 'j'}\n"
        + PLACE
        + f"d_row = diag + (b * diag_b + r * width) * {vector}\n"
        + each_sample(right_side)
        + _each_group(transpose, "own", "terms", _limits("terms") + subtract_terms)
        + "for block in range(blocks):\n"
        + inside(per_block)
    )
    setup = (
        "own = 0\n"
        "while own < terms and load_int(table, 3 * own) == 0 and load_int(table, 3 * own + 1) == 0:\n"
        "    own += 1\n"
        f"blocks = (width + {_BLOCK - 1}) // {_BLOCK}\n"
        f"scratch += worker * {solve_scratch()} * {vector}\n"
    )
    body = (
        "item = start\n"
        "while item < stop:\n"
        "    b = item // samples\n"
        "    first_sample = item - b * samples\n"
        "    last_sample = min(samples, first_sample + stop - item)\n"
        "    item += last_sample - first_sample\n"
        "    for j in range(rows):\n" + inside(inside(per_row))
    )
    arguments = "diag, diag_b, off, off_b, off_k, rhs, rhs_s, rhs_b, x"
    return kernel_source(dtype, cache, _STENCIL + arguments, setup, body)


def solve_scratch() -> int:
    """Elements of scratch that each thread of a solve kernel needs: of a block the diagonal and, by term, the coefficients.

    Of the row's own terms the t-th reaches at least t + 1 columns, so that fewer than a block's sites stay within it.
    """
    return _BLOCK * _BLOCK


def outer(dtype: str, cache: bool, streaming: bool) -> str:
    """As `cpu_unrolled.outer`."""

    def block(masked):
        code = "".join(f"entry{i} = zeros()\n" for i in range(_GROUP))
        products = f"product = multiply(weight, {load('load', 'b_row', 'w', masked)})\n"
        for i in range(_GROUP):
            neighbour = load("load", "a_row", f"w + shift{i}", masked, f"mask{i}")
            products += f"entry{i} = add_product(entry{i}, {neighbour}, product)\n"
        code += weighted_samples(products)
        for i in range(_GROUP):
            value = f"keep(entry{i}, mask{i})" if masked else f"entry{i}"
            code += f"if t + {i} < terms:\n    " + store_off_diagonal(f"{i} * n + w", value, masked, streaming)
        return code

    row = (
        PLACE
        + _limits("terms")
        + _EXTENT
        + f"c_row = off + ((b * terms + t) * n + r * width) * {element_bytes(dtype)[1]}\n"
        + _group_blocks(dtype, "0", "width", block)
    )
    return outer_source(dtype, cache, _STENCIL, "", _each_group(True, "0", "terms", band_rows(row)))
