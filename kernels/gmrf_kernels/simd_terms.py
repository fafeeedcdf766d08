"""All terms of a stencil that read one row of neighbours, as one operation of generated CPU code.

Numba takes a millisecond or more for each expression of a kernel: with an operation for each load, each mask and each product,
a kernel for 62 offsets took fifteen seconds to compile, most of them in Python.

The terms of a row are pairs (k, column): the number of an offset, and where its neighbour is from the site, in sites along the
row. Operations are called by ``w``, the first site of a block, and ``shift``, the distance from a site to the same place in
the row of neighbours. Those with ``_masked`` take ``end``, too: the number of sites in the row of neighbours, 0 where that lies
off the grid.
"""

import inspect
from collections.abc import Callable, Sequence

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd import Table, operation_table

Terms = Sequence[tuple[int, int]]


def folds(dtype: str, row: int, terms: Terms, operation: str, at_neighbour: bool, vectors: int = 1) -> dict[str, Callable]:
    """What adds a row's terms to sums, or subtracts them, one after the other.

    ``fold{row}(a1, ..., coefficients, values1, ..., w, off_k, shift)`` returns the sums, ``vectors`` of them that share each
    coefficient, in a tuple if there are several; ``off_k`` is the distance between planes of coefficients. Likewise
    ``fold{row}_masked(..., shift, end)``.

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


def products(dtype: str, row: int, terms: Terms) -> dict[str, Callable]:
    """What makes a row's part of an outer product, in a tuple with one vector for each term.

    zeros{row}()                                            where it begins
    add{row}(sums, values, w, shift, factor)                with ``values`` at the neighbours times ``factor``
    add{row}_masked(sums, values, w, shift, factor, end)
    store{row}(sums, result, w, distance)                   into planes of ``result`` that are ``distance`` apart
    store{row}_streaming(sums, result, w, distance)         past the caches
    store{row}_masked(sums, result, w, distance, end, inside)   lanes of ``inside``, 0 where there is no neighbour

    Args:
        dtype: of the result.
        row: a number.
        terms: of the row.
    """
    table = operation_table(dtype)
    return {
        f"zeros{row}": _zeros(table, terms),
        f"add{row}": _add_products(table, terms, ""),
        f"add{row}_masked": _add_products(table, terms, "_masked"),
        f"store{row}": _store(table, terms, "store_c"),
        f"store{row}_streaming": _store(table, terms, "store_c_streaming"),
        f"store{row}_masked": _store_masked(table, terms),
    }


def _fold(table: Table, terms: Terms, operation: str, at_neighbour: bool, vectors: int, suffix: str) -> Callable:
    def emit(builder, *arguments):
        sums, arguments = list(arguments[:vectors]), arguments[vectors:]
        coefficients, values = arguments[0], arguments[1 : 1 + vectors]
        w, off_k, shift, *end = arguments[1 + vectors :]
        for k, column in terms:
            neighbour = _plus(builder, builder.add(w, shift), column)
            plane = builder.mul(off_k, _int(k))
            index = builder.add(plane, neighbour if at_neighbour else w)
            mask = [_exists(table, builder, w, column, *end)] if suffix else []
            coefficient = table.emit[f"load_c{suffix}"](builder, coefficients, index, *mask)
            for v in range(vectors):
                value = table.emit[f"load{suffix}"](builder, values[v], neighbour, *mask)
                sums[v] = table.emit[operation](builder, sums[v], coefficient, value)
        return sums

    integers = 4 + vectors + len(suffix[:1])
    return _operation(table, vectors, [table.vector_type] * vectors + [types.int64] * integers, emit)


def _zeros(table: Table, terms: Terms) -> Callable:
    return _operation(table, len(terms), [], lambda builder: [table.constant(0.0)] * len(terms), always_tuple=True)


def _add_products(table: Table, terms: Terms, suffix: str) -> Callable:
    def emit(builder, sums, values, w, shift, factor, *end):
        found = []
        for number, (_, column) in enumerate(terms):
            mask = [_exists(table, builder, w, column, *end)] if suffix else []
            index = _plus(builder, builder.add(w, shift), column)
            value = table.emit[f"load{suffix}"](builder, values, index, *mask)
            found.append(table.emit["add_product"](builder, builder.extract_value(sums, number), value, factor))
        return found

    arguments = [
        _tuple(table, terms),
        types.int64,
        types.int64,
        types.int64,
        table.vector_type,
        *[types.int64] * len(suffix[:1]),
    ]
    return _operation(table, len(terms), arguments, emit, always_tuple=True)


def _store(table: Table, terms: Terms, name: str) -> Callable:
    def emit(builder, sums, result, w, distance):
        for number, (k, _) in enumerate(terms):
            index = builder.add(builder.mul(distance, _int(k)), w)
            table.emit[name](builder, result, index, builder.extract_value(sums, number))

    return _operation(table, 0, [_tuple(table, terms), types.int64, types.int64, types.int64], emit)


def _store_masked(table: Table, terms: Terms) -> Callable:
    def emit(builder, sums, result, w, distance, end, inside):
        for number, (k, column) in enumerate(terms):
            index = builder.add(builder.mul(distance, _int(k)), w)
            exists = _exists(table, builder, w, column, end)
            value = table.emit["keep"](builder, builder.extract_value(sums, number), exists)
            table.emit["store_c_masked"](builder, result, index, value, inside)

    return _operation(table, 0, [_tuple(table, terms), *[types.int64] * 4, table.mask_type], emit)


def _operation(
    table: Table, results: int, arguments: Sequence[types.Type], emit: Callable, always_tuple: bool = False
) -> Callable:
    """An intrinsic whose ``emit`` returns ``results`` vectors in a list: a tuple if there are several, or ``always_tuple``."""
    in_tuple = always_tuple or results > 1
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


def _tuple(table: Table, terms: Terms) -> types.UniTuple:
    return types.UniTuple(table.vector_type, len(terms))


def _exists(table: Table, builder, w, column: int, end):
    """Mask of the lanes whose neighbour is in its row and in the grid."""
    return table.emit["between"](builder, w, _int(max(0, -column)), _plus(builder, end, -max(0, column)))


def _plus(builder, value, number: int):
    return builder.add(value, _int(number)) if number else value


def _int(number: int) -> ir.Constant:
    return ir.Constant(ir.IntType(64), number)
