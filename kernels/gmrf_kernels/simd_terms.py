"""All terms of a stencil that read one row of neighbours, as one operation of generated CPU code.

Numba takes a millisecond or more for each expression of a kernel: with an operation for each load, each mask and each product,
a kernel for 62 offsets took fifteen seconds to compile, most of them in Python.

The terms of a row are pairs (k, column): the number of an offset, and where its neighbour is from the site, in sites along the
row. Operations take ``shift``, the distance from a site to the same place in the row of neighbours; those that may meet
neighbours which do not exist take ``end``, too: the number of sites in that row, 0 where it lies off the grid.
"""

import inspect
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import Table, integer, operation_table

Terms = Sequence[tuple[int, int]]


def folds(dtype: str, row: int, terms: Terms, operation: str, at_neighbour: bool, vectors: int = 1) -> dict[str, Callable]:
    """What adds a row's terms to sums, or subtracts them, one after the other.

    ``fold{row}(a1, ..., coefficients, values1, ..., w, off_k, shift)`` returns the sums, ``vectors`` of them that share each
    coefficient, in a tuple if there are several, for the block of sites that begins at ``w``; ``off_k`` is the distance between
    planes of coefficients. ``fold{row}_masked(..., shift, end)`` is for blocks whose neighbours may not exist.

    Args:
        dtype: of the coefficients.
        row: a number, with which the names of the operations end.
        terms: of the row.
        operation: "add_product" or "subtract_product".
        at_neighbour: whether a coefficient is that of the neighbour, as in L x, rather than that of the site, as in Lᵀx.
        vectors: see above.
    """
    table = operation_table(dtype)
    return {f"fold{row}{suffix}": _fold(table, terms, operation, at_neighbour, vectors, suffix) for suffix in ("", "_masked")}


def outer_row(dtype: str, terms: Terms, streaming: bool) -> Callable:
    """What computes a row's terms of an outer product at all sites of one row of the grid.

    ``operation(c_row, a_image, a_s, b_image, b_s, weights, weights_s, samples, r, width, n, shift, end)`` stores the sums over
    the ``samples``, each with its weight, of a at the neighbour times b at the site, into planes that are ``n`` apart from
    ``c_row`` on; 0 where there is no neighbour. The loops over blocks and samples are in here: Numba would take as long for
    those of thirteen rows of neighbours as for all else of a kernel.

    Args:
        dtype: of the result.
        terms: of the row.
        streaming: whether blocks in the interior are stored past the caches.
    """
    table = operation_table(dtype)
    operations = table.emit
    columns = [column for _, column in terms]

    def emit(builder, c_row, a_image, a_s, b_image, b_s, weights, weights_s, samples, r, width, n, shift, end):
        def block(w, masked):
            suffix = "_masked" if masked else ""
            inside = [operations["between"](builder, w, integer(0), width)] if masked else []
            masks = [[_exists(table, builder, w, column, end)] if masked else [] for column in columns]
            sums = [cgutils.alloca_once_value(builder, table.constant(0.0)) for _ in terms]
            with cgutils.for_range(builder, samples) as sample:
                a_row, b_row = (
                    operations["row_of_sample"](builder, image, sample.index, stride, r, width)
                    for image, stride in ((a_image, a_s), (b_image, b_s))
                )
                weight = operations["load_splat"](builder, weights, builder.mul(sample.index, weights_s))
                factor = operations["multiply"](builder, weight, operations[f"load{suffix}"](builder, b_row, w, *inside))
                values = _permuted_neighbours(table, builder, a_row, w, shift, columns, *([end] if masked else []))
                for total, value in zip(sums, values, strict=True):
                    builder.store(operations["add_product"](builder, builder.load(total), value, factor), total)
            store = operations[f"store_c{suffix or ('_streaming' if streaming else '')}"]
            for total, (k, _), mask in zip(sums, terms, masks, strict=True):
                value = operations["keep"](builder, builder.load(total), *mask) if masked else builder.load(total)
                store(builder, c_row, builder.add(builder.mul(n, integer(k)), w), value, *inside)

        least_end = operations["least"](builder, width, end)
        with cgutils.for_range_slice(builder, integer(0), width, integer(table.lanes), inc=True) as (w, _):
            last = _plus(builder, w, table.lanes + max(0, *columns))
            begins, ends = builder.icmp_signed(">=", w, integer(-min(0, *columns))), builder.icmp_signed("<=", last, least_end)
            with builder.if_else(builder.and_(begins, ends)) as (interior, border):
                with interior:
                    block(w, masked=False)
                with border:
                    block(w, masked=True)

    return _operation(table, 0, [types.int64] * 13, emit)


def _fold(table: Table, terms: Terms, operation: str, at_neighbour: bool, vectors: int, suffix: str) -> Callable:
    columns = [column for _, column in terms]

    def emit(builder, *arguments):
        sums, arguments = list(arguments[:vectors]), arguments[vectors:]
        coefficients, rows = arguments[0], arguments[1 : 1 + vectors]
        w, off_k, shift, *end = arguments[1 + vectors :]
        # One vector waits for its coefficients from memory, and permutations would only come on top.
        neighbours = _neighbours if vectors == 1 else _permuted_neighbours
        values = [neighbours(table, builder, row, w, shift, columns, *end) for row in rows]
        for i, (k, column) in enumerate(terms):
            plane = builder.mul(off_k, integer(k))
            index = builder.add(plane, _plus(builder, builder.add(w, shift), column) if at_neighbour else w)
            mask = [_exists(table, builder, w, column, *end)] if suffix else []
            coefficient = table.emit[f"load_c{suffix}"](builder, coefficients, index, *mask)
            for v in range(vectors):
                sums[v] = table.emit[operation](builder, sums[v], coefficient, values[v][i])
        return sums

    integers = 4 + vectors + len(suffix[:1])
    return _operation(table, vectors, [table.vector_type] * vectors + [types.int64] * integers, emit)


def _neighbours(table: Table, builder, row, w, shift, columns: Sequence[int], *end) -> list:
    """The vectors that begin at w + shift plus each of the columns; with ``end``, 0 where a row of so many sites has none."""

    def load(column):
        index = _plus(builder, builder.add(w, shift), column)
        if not end:
            return table.emit["load"](builder, row, index)
        mask = table.emit["between"](builder, _plus(builder, w, column), integer(0), *end)
        return table.emit["load_masked"](builder, row, index, mask)

    return [load(column) for column in columns]


def _permuted_neighbours(table: Table, builder, row, w, shift, columns: Sequence[int], *end) -> list:
    """The same, all made of the two outermost: most loads would cross from one cache line into the next, and take longer."""
    first, last = min(columns), max(columns)
    reach = last - first
    if len(columns) < 3 or reach > table.lanes:
        return _neighbours(table, builder, row, w, shift, columns, *end)
    outermost = _neighbours(table, builder, row, w, shift, (first, last), *end)

    def between(column):
        places = (column - first + lane for lane in range(table.lanes))
        # Lanes of the second vector are numbered after those of the first.
        lanes = [place if place < table.lanes else place - reach + table.lanes for place in places]
        return builder.shuffle_vector(*outermost, ir.Constant(ir.VectorType(ir.IntType(32), table.lanes), lanes))

    return [between(column) for column in columns]


def _operation(table: Table, results: int, arguments: Sequence[types.Type], emit: Callable) -> Callable:
    """An intrinsic whose ``emit`` returns ``results`` vectors in a list: a tuple if there are several."""
    in_tuple = results > 1
    result = types.UniTuple(table.vector_type, results) if in_tuple else table.vector_type if results else types.void

    def typing(typingctx, *given):
        def codegen(context, builder, signature, values):
            found = emit(builder, *values)
            if not results:
                return context.get_dummy_value()
            return context.make_tuple(builder, result, found) if in_tuple else found[0]

        return result(*arguments), codegen

    names = ["typingctx", *(f"a{i}" for i in range(len(arguments)))]
    typing.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
    return intrinsic(typing)


def _exists(table: Table, builder, w, column: int, end):
    """Mask of the lanes whose neighbour is in its row and in the grid."""
    return table.emit["between"](builder, w, integer(max(0, -column)), _plus(builder, end, -max(0, column)))


def _plus(builder, value, number: int):
    return builder.add(value, integer(number)) if number else value
