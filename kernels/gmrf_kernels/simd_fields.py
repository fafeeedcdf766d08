"""Inner products and combinations of fields, computed in float64, and the CPU kernels that are made of them.

Fields lie ``stride`` elements apart, and each has its sites side by side. A tile of them is taken at once: a vector that is
loaded and converted to float64 serves several products. Tiles that reach beyond the last field take that one several times.
"""

from numba import types
from numba.core import cgutils

from .cpu_source import element_bytes, inside, span_kernel
from .simd import Table, integer, operation_table

# Fields of a tile, on either side.
_TILE = 4

# Sites of an item, at most: those of some fields stay in the nearest caches.
SPAN = 2**10

# Of item ``item``: its image, and its sites from ``first`` on.
_PLACE = (
    f"b = item // spans\nfirst = (item - b * spans) * {SPAN}\ncount = min({SPAN}, n - first)\n"
    "own = fields + (b * fields_b + first) * {vector}\n"
)


def inner_products(dtype: str, cache: bool) -> str:
    """The source of a kernel that stores, for each span of sites of each image, (terms, rows) sums of products in float64.

    They are those of all fields with the first ``rows`` of them, without those above the diagonal.
    """
    vector, _ = element_bytes(dtype)
    tiles = (
        _PLACE.format(vector=vector) + "target = result + item * terms * rows * 8\n"
        f"for i in range(0, terms, {_TILE}):\n"
        f"    for j in range(0, min(rows, i + {_TILE}), {_TILE}):\n"
        "        tile_of_products(own, fields_s, i, terms, j, rows, count, target)\n"
    )
    return _items(dtype, cache, "fields, fields_s, fields_b, terms, rows, n, spans, result", tiles)


def combinations(dtype: str, cache: bool) -> str:
    """The source of a kernel that stores Σ_u weights[b, t, u] fields[u, b] for each image b and each of ``rows`` t."""
    vector, _ = element_bytes(dtype)
    tiles = (
        _PLACE.format(vector=vector) + "weights_of_image = weights + b * rows * terms * 8\n"
        f"target = result + (b * n + first) * {vector}\n"
        f"for t in range(0, rows, {_TILE}):\n"
        "    tile_of_combinations(weights_of_image, t, rows, terms, own, fields_s, target, result_s, count)\n"
    )
    return _items(dtype, cache, "weights, rows, terms, fields, fields_s, fields_b, n, spans, result, result_s", tiles)


def _items(dtype: str, cache: bool, arguments: str, body: str) -> str:
    loop = "for item in range(start, stop):\n" + inside(body)
    return span_kernel(dtype, cache, arguments, "", loop, operations="simd_fields")


def operations(dtype: str) -> dict:
    """The intrinsics of `simd` that compute in float64, and two for tiles of fields of ``dtype``, float32 or float64."""
    computing = operation_table(dtype, computed="float64")
    emit, step = computing.emit, computing.lanes
    table = Table("float64")

    def tile(builder, address, first, number, stride):
        """The number and the address of each field of a tile, from the ``first`` of ``number`` fields on."""
        last = builder.sub(number, integer(1))
        fields = [emit["least"](builder, builder.add(first, integer(i)), last) for i in range(_TILE)]
        return [(field, address_of(builder, address, field, stride)) for field in fields]

    def address_of(builder, address, field, stride):
        return builder.add(address, builder.mul(builder.mul(field, stride), integer(element_bytes(dtype)[0])))

    def each_block(builder, count, vectors, block):
        """``block(sites, ending, *mask)`` for the sites of a span, so many vectors at a time; a mask is for the last sites."""
        size = integer(vectors * step)
        whole = builder.mul(builder.udiv(count, size), size)
        with cgutils.for_range_slice(builder, integer(0), whole, size, inc=True) as (w, _):
            block([builder.add(w, integer(v * step)) for v in range(vectors)], "")
        with cgutils.for_range_slice(builder, whole, count, integer(step), inc=True) as (w, _):
            block([w], "_masked", emit["between"](builder, w, integer(0), count))

    def add_product(builder, total, a, b):
        builder.store(emit["add_product"](builder, builder.load(total), a, b), total)

    @table.add(types.void, *[types.int64] * 8)
    def tile_of_products(builder, fields, stride, i, terms, j, rows, count, result):
        left, right = tile(builder, fields, i, terms, stride), tile(builder, fields, j, rows, stride)
        sums = [[cgutils.alloca_once_value(builder, computing.constant(0.0)) for _ in right] for _ in left]

        def block(sites, ending, *mask):
            (w,) = sites
            a, b = ([emit[f"load_c{ending}"](builder, field, w, *mask) for _, field in side] for side in (left, right))
            for value, row in zip(a, sums, strict=True):
                for other, total in zip(b, row, strict=True):
                    add_product(builder, total, value, other)

        each_block(builder, count, 1, block)
        for (field, _), row in zip(left, sums, strict=True):
            for (other, _), total in zip(right, row, strict=True):
                index = builder.add(builder.mul(field, rows), other)
                emit["store_double"](builder, result, index, emit["total"](builder, builder.load(total)))

    @table.add(types.void, *[types.int64] * 9)
    def tile_of_combinations(builder, weights, t, rows, terms, fields, stride, result, result_stride, count):
        targets = tile(builder, result, t, rows, result_stride)

        def block(sites, ending, *mask):
            sums = [[cgutils.alloca_once_value(builder, computing.constant(0.0)) for _ in sites] for _ in targets]
            with cgutils.for_range(builder, terms) as term:
                field = address_of(builder, fields, term.index, stride)
                values = [emit[f"load_c{ending}"](builder, field, w, *mask) for w in sites]
                for (row, _), totals in zip(targets, sums, strict=True):
                    weight = emit["load_splat"](builder, weights, builder.add(builder.mul(row, terms), term.index))
                    for total, value in zip(totals, values, strict=True):
                        add_product(builder, total, weight, value)
            for (_, target), totals in zip(targets, sums, strict=True):
                for w, total in zip(sites, totals, strict=True):
                    emit[f"store_c{ending}"](builder, target, w, builder.load(total), *mask)

        # Two vectors: a sum waits four cycles for its last product, and eight sums keep the machine busy meanwhile.
        each_block(builder, count, 2, block)

    return {**computing, **table}
