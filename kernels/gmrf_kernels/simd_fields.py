"""Fields beside each other: their inner products, combinations and a regression on them, and the CPU kernels made of these.

All is computed in float64. Fields lie ``_s`` elements apart, those of the next image ``_b``, and each has its sites side by
side. A tile of them is taken at once: a vector that is loaded and converted to float64 serves several products. In what
`reference.low_rank_log_density` says, ``rows`` is R, ``terms`` is R + S, and U is Cᵀ.
"""

import math
from collections.abc import Callable

from numba import types
from numba.core import cgutils

from .cpu_source import element_bytes, inside, span_kernel
from .simd import Table, integer, lanes, operation_table

# Fields of a tile, on either side.
_TILE = 4

# Sites of an item, at most: those of some fields stay in the nearest caches.
SPAN = 2**10

# Of item ``item``: its image, and its sites from ``first`` on.
_PLACE = (
    f"b = item // spans\nfirst = (item - b * spans) * {SPAN}\ncount = min({SPAN}, n - first)\n"
    "own = fields + (b * fields_b + first) * {vector}\n"
)

# Vectors of float64.
_STEP = lanes("float64")

# Of image b, when all of its spans have been summed: I + VᵀV and Vᵀy, row by row, each from its diagonal on.
_NORMAL_EQUATIONS = f"""\
for j in range(rows):
    row = image + j * terms * 8
    for w in range(j // {_STEP} * {_STEP}, terms, {_STEP}):
        inside = between(w, j, terms)
        total = zeros()
        for t in range(spans):
            total = add_product(total, ones(), load_masked(sums_of_image + (t * rows + j) * terms * 8, w, inside))
        store_masked(row, w, total, inside)
    store_double(row, j, load_double(row, j) + 1.0)
"""

# U with UᵀU = I + VᵀV, and U⁻ᵀVᵀy beside it. Where a pivot is none, it is NaN, and so is all that comes after.
_ELIMINATION = f"""\
for j in range(rows):
    row = image + j * terms * 8
    pivot = load_double(row, j)
    store_double(row, j, sqrt(pivot) if 0.0 < pivot < inf else nan)
    root = load_splat(row, j)
    for w in range((j + 1) // {_STEP} * {_STEP}, terms, {_STEP}):
        inside = between(w, j + 1, terms)
        store_masked(row, w, divide(load_masked(row, w, inside), root), inside)
    for i in range(j + 1, rows):
        below = image + i * terms * 8
        entry = load_splat(row, i)
        for w in range(i // {_STEP} * {_STEP}, terms, {_STEP}):
            inside = between(w, i, terms)
            rest = subtract_product(load_masked(below, w, inside), entry, load_masked(row, w, inside))
            store_masked(below, w, rest, inside)
"""

# The weights U⁻¹U⁻ᵀVᵀy in its place.
_SUBSTITUTION = f"""\
for w in range(rows // {_STEP} * {_STEP}, terms, {_STEP}):
    inside = between(w, rows, terms)
    for j in range(rows - 1, -1, -1):
        row = image + j * terms * 8
        solved = divide(load_masked(row, w, inside), load_splat(row, j))
        store_masked(row, w, solved, inside)
        for i in range(j):
            above = image + i * terms * 8
            store_masked(above, w, subtract_product(load_masked(above, w, inside), load_splat(above, j), solved), inside)
"""

# Of image b, when all of its spans have been summed: log |L| - log |U| - ½ (|y - V a|² + |a|²) + const of each residual.
_LOG_DENSITY = f"""\
logs = {-0.5 * math.log(2 * math.pi)} * n
for j in range(rows):
    logs -= log(load_double(image, j * terms + j))
for t in range(spans):
    logs += load_double(sums_of_image, t * (residuals + 1) + residuals)
for s in range(residuals):
    squares = 0.0
    for t in range(spans):
        squares += load_double(sums_of_image, t * (residuals + 1) + s)
    for j in range(rows):
        weight = load_double(image, j * terms + rows + s)
        squares += weight * weight
    store_double(value, s * value_s + b, logs - 0.5 * squares)
"""


def ridge_regression(dtype: str, cache: bool) -> str:
    """The source of a kernel that regresses fields on the first ``rows`` of them, V, with unit penalty.

    Of the ``terms`` fields of each image it stores U, where UᵀU = I + VᵀV, and beside it the weights (I + VᵀV)⁻¹Vᵀy of all
    others y, as (rows, terms) in float64. Below the diagonal of U nothing is stored. Scratch, as long as `regression_scratch`
    says, counts the spans done of each image; the last one to be done finds the sums of all in ``sums``.
    """
    vector, _ = element_bytes(dtype)
    body = (
        _PLACE.format(vector=vector) + "target = sums + item * rows * terms * 8\n"
        f"for j in range(0, rows, {_TILE}):\n"
        f"    for i in range(j, terms - {_TILE - 1}, {_TILE}):\n"
        "        tile_of_products(own, fields_s, i, j, rows, terms, count, target)\n"
        f"    for i in range(terms // {_TILE} * {_TILE}, terms):\n"
        "        row_of_products(own, fields_s, i, j, rows, terms, count, target)\n"
        "if add_done(scratch, b, 1) == spans:\n"
    )
    body += inside(
        "image = system + b * rows * terms * 8\nsums_of_image = sums + b * spans * rows * terms * 8\n"
        + _NORMAL_EQUATIONS
        + _ELIMINATION
        + _SUBSTITUTION
    )
    return _items(dtype, cache, "fields, fields_s, fields_b, terms, rows, n, spans, sums, system", body)


def log_density(dtype: str, cache: bool) -> str:
    """The source of a kernel that leaves the rests y - V a of fields y that `ridge_regression` has regressed in their place.

    It stores the log densities, too. Scratch, as long as `density_scratch` says, has behind the number of spans done of each
    image the squares of each field's rests in each span, and the sum of the log-diagonal there.
    """
    vector, _ = element_bytes(dtype)
    body = (
        _PLACE.format(vector=vector) + "image = system + b * rows * terms * 8\n"
        "residuals = terms - rows\n"
        "sums_of_image = scratch + (images + b * spans * (residuals + 1)) * 8\n"
        "target = scratch + (images + item * (residuals + 1)) * 8\n"
        f"for i in range(rows, terms - {_TILE - 1}, {_TILE}):\n"
        "    tile_of_rests(own, fields_s, i, image, rows, terms, count, target)\n"
        f"for i in range(rows + residuals // {_TILE} * {_TILE}, terms):\n"
        "    row_of_rests(own, fields_s, i, image, rows, terms, count, target)\n"
        f"store_double(target, residuals, sum_of_field(log_diag + (b * log_diag_b + first) * {vector}, count))\n"
        "if add_done(scratch, b, 1) == spans:\n"
    )
    body += inside(_LOG_DENSITY)
    arguments = "fields, fields_s, fields_b, terms, rows, n, spans, images, system, log_diag, log_diag_b, value, value_s"
    return _items(dtype, cache, arguments, body)


def regression_scratch(images: int) -> int:
    """Bytes of scratch of `ridge_regression`."""
    return 8 * images


def density_scratch(images: int, spans: int, residuals: int) -> int:
    """Bytes of scratch of `log_density`, for so many spans of each image."""
    return 8 * images * (1 + spans * (residuals + 1))


def combinations(dtype: str, cache: bool) -> str:
    """The source of a kernel that stores Σ_u weights[b, t, u] fields[u, b] for each image b and each of ``rows`` t."""
    vector, _ = element_bytes(dtype)
    tiles = (
        _PLACE.format(vector=vector) + "weights_of_image = weights + b * rows * terms * 8\n"
        f"target = result + (b * result_b + first) * {vector}\n"
        f"for t in range(0, rows, {_TILE}):\n"
        "    tile_of_combinations(weights_of_image, t, rows, terms, own, fields_s, target, result_s, count)\n"
    )
    return _items(dtype, cache, "weights, rows, terms, fields, fields_s, fields_b, n, spans, result, result_s, result_b", tiles)


def _items(dtype: str, cache: bool, arguments: str, body: str) -> str:
    loop = "for item in range(start, stop):\n" + inside(body)
    definitions = "from math import inf, log, nan, sqrt\n"
    return span_kernel(dtype, cache, arguments, "", loop, operations="simd_fields", definitions=definitions)


def operations(dtype: str) -> dict:
    """The intrinsics of `simd` that compute in float64, and those for fields of ``dtype``, float32 or float64."""
    fields = _Fields(dtype)
    for name, size in (("tile_of_products", _TILE), ("row_of_products", 1)):
        fields.add_products(name, size)
    # A sum waits four cycles for its last product, and eight sums, or four, keep the machine busy meanwhile.
    for name, size, vectors in (("tile_of_rests", _TILE, 2), ("row_of_rests", 1, 4)):
        fields.add_rests(name, size, vectors)
    fields.add_combinations()
    fields.add_sum()
    return {**fields.computing, **fields.table}


class _Fields:
    """What writes the instructions for fields of ``dtype``."""

    def __init__(self, dtype: str):
        self.computing = operation_table(dtype, computed="float64")
        self.emit = self.computing.emit
        self.table = Table("float64")
        self.bytes = integer(element_bytes(dtype)[0])

    def tile(self, builder, address, first, size: int, number, stride) -> list[tuple]:
        """The number and the address of each of ``size`` fields, from the ``first`` of ``number`` fields on."""
        last = builder.sub(number, integer(1))
        fields = [self.emit["least"](builder, builder.add(first, integer(i)), last) for i in range(size)]
        return [(field, self.address_of(builder, address, field, stride)) for field in fields]

    def address_of(self, builder, address, field, stride):
        return builder.add(address, builder.mul(builder.mul(field, stride), self.bytes))

    def each_block(self, builder, count, vectors: int, block: Callable) -> None:
        """``block(sites, ending, *mask)`` for the sites of a span, so many vectors at a time; a mask is for the last sites."""
        size = integer(vectors * _STEP)
        whole = builder.mul(builder.udiv(count, size), size)
        with cgutils.for_range_slice(builder, integer(0), whole, size, inc=True) as (w, _):
            block([builder.add(w, integer(v * _STEP)) for v in range(vectors)], "")
        with cgutils.for_range_slice(builder, whole, count, integer(_STEP), inc=True) as (w, _):
            block([w], "_masked", self.emit["between"](builder, w, integer(0), count))

    def sum(self, builder):
        """Memory for a vector of sums, which LLVM keeps in a register."""
        return cgutils.alloca_once_value(builder, self.computing.constant(0.0))

    def add_to(self, builder, total, a, b, operation: str = "add_product") -> None:
        builder.store(self.emit[operation](builder, builder.load(total), a, b), total)

    def load(self, builder, field, sites, ending: str, mask) -> list:
        """The vectors of a field in a block."""
        return [self.emit[f"load_c{ending}"](builder, field, w, *mask) for w in sites]

    def fold(self, builder, operation: str, sums: list[list], weight_of: Callable, number, fields, stride, block: tuple):
        """Add to sums[t][v], or subtract, the weight in row t of each of ``number`` fields times its v-th vector in a block."""
        with cgutils.for_range(builder, number) as term:
            values = self.load(builder, self.address_of(builder, fields, term.index, stride), *block)
            for t, row in enumerate(sums):
                weight = weight_of(t, term.index)
                for total, value in zip(row, values, strict=True):
                    self.add_to(builder, total, weight, value, operation)

    def add_products(self, name: str, size: int) -> None:
        """The products of ``size`` fields from i on with a tile from j on: entries (j, i) of (rows, terms)."""

        @self.table.add(types.void, *[types.int64] * 8, name=name)
        def products(builder, fields, stride, i, j, rows, terms, count, result):
            left, right = self.tile(builder, fields, i, size, terms, stride), self.tile(builder, fields, j, _TILE, rows, stride)
            sums = [[self.sum(builder) for _ in right] for _ in left]

            def block(sites, ending, *mask):
                a, b = ([self.load(builder, field, sites, ending, mask)[0] for _, field in side] for side in (left, right))
                for value, row in zip(a, sums, strict=True):
                    for other, total in zip(b, row, strict=True):
                        self.add_to(builder, total, value, other)

            self.each_block(builder, count, 1, block)
            for (field, _), row in zip(left, sums, strict=True):
                for (other, _), total in zip(right, row, strict=True):
                    index = builder.add(builder.mul(other, terms), field)
                    self.emit["store_double"](builder, result, index, self.emit["total"](builder, builder.load(total)))

    def add_rests(self, name: str, size: int, vectors: int) -> None:
        """Fields from i on less their combinations of the first ``rows``, in place, and the sums of squares of what is left."""

        @self.table.add(types.void, *[types.int64] * 8, name=name)
        def rests(builder, fields, stride, i, weights, rows, terms, count, squares):
            targets = self.tile(builder, fields, i, size, terms, stride)
            totals = [self.sum(builder) for _ in targets]

            def weight_of(t, term):
                return self.emit["load_splat"](builder, weights, builder.add(builder.mul(term, terms), targets[t][0]))

            def block(sites, ending, *mask):
                block = sites, ending, mask
                left = [[cgutils.alloca_once_value(builder, y) for y in self.load(builder, t, *block)] for _, t in targets]
                self.fold(builder, "subtract_product", left, weight_of, rows, fields, stride, block)
                for (_, target), row, total in zip(targets, left, totals, strict=True):
                    for w, memory in zip(sites, row, strict=True):
                        value = builder.load(memory)
                        self.emit[f"store_c{ending}"](builder, target, w, value, *mask)
                        self.add_to(builder, total, value, value)

            self.each_block(builder, count, vectors, block)
            for (field, _), total in zip(targets, totals, strict=True):
                index = builder.sub(field, rows)
                self.emit["store_double"](builder, squares, index, self.emit["total"](builder, builder.load(total)))

    def add_combinations(self) -> None:
        """A tile from t on of a result: combinations of all ``terms`` fields."""

        @self.table.add(types.void, *[types.int64] * 9)
        def tile_of_combinations(builder, weights, t, rows, terms, fields, stride, result, result_stride, count):
            targets = self.tile(builder, result, t, _TILE, rows, result_stride)

            def weight_of(t, term):
                return self.emit["load_splat"](builder, weights, builder.add(builder.mul(targets[t][0], terms), term))

            def block(sites, ending, *mask):
                sums = [[self.sum(builder) for _ in sites] for _ in targets]
                self.fold(builder, "add_product", sums, weight_of, terms, fields, stride, (sites, ending, mask))
                for (_, target), row in zip(targets, sums, strict=True):
                    for w, total in zip(sites, row, strict=True):
                        self.emit[f"store_c{ending}"](builder, target, w, builder.load(total), *mask)

            # As many vectors as fields: each loaded weight, too, serves four products.
            self.each_block(builder, count, _TILE, block)

    def add_sum(self) -> None:
        """Sums of single fields."""

        @self.table.add(types.float64, types.int64, types.int64)
        def sum_of_field(builder, field, count):
            total = self.sum(builder)

            def block(sites, ending, *mask):
                (value,) = self.load(builder, field, sites, ending, mask)
                self.add_to(builder, total, value, self.computing.constant(1.0))

            self.each_block(builder, count, 1, block)
            return self.emit["total"](builder, builder.load(total))
