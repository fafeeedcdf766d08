"""Explicit vectors for Numba: what generated CPU code loads, computes with and stores, 64 bytes at a time.

Numba's loop vectoriser gives up on loops with two dozen input streams, and spends rows of 64 pixels in its scalar remainder.
These intrinsics emit LLVM vector instructions directly; LLVM splits them where the machine's registers are narrower.

An *address* is the int64 of a tensor's ``data_ptr()``; an index counts elements. A *mask* switches lanes off: a masked load
yields 0 there and touches no memory, a masked store leaves memory as it is. One file because all of it is one table, by
the names that generated code uses.
"""

import functools
import inspect
import math
from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# LLVM's bits for classes of floating-point numbers, either sign.
_NAN, _INFINITE, _SUBNORMAL, _ZERO = 0x3, 0x204, 0x90, 0x60

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

_I1, _I32, _I64, _DOUBLE = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.DoubleType()
_STORED = {"float16": ir.HalfType(), "bfloat16": ir.IntType(16), "float32": ir.FloatType(), "float64": _DOUBLE}


class _Vector(types.Type):
    """A vector of LLVM elements, held in registers."""

    def __init__(self, name: str, element: ir.Type, lanes: int):
        self.llvm = ir.VectorType(element, lanes)
        super().__init__(f"gmrf_vector({name} x {lanes})")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.llvm)


# Of `exponential`: mantissa bits, exponent bias, bounds of the argument, ln 2 as a sum whose first part has trailing zeros, and
# the degree of the polynomial.
_EXPONENTIAL = {
    "float": (23, 127, -104.0, 89.0, 0.693359375, -2.12194440054690583e-4, 7),
    "double": (52, 1023, -746.0, 710.0, 0.693145751953125, 1.42860682030941723212e-6, 13),
}


def lanes(dtype: str) -> int:
    """Elements in one vector of the dtype that coefficients of ``dtype`` are computed with."""
    return 8 if dtype == "float64" else 16


def operations(dtype: str) -> dict:
    """The intrinsics for coefficients of ``dtype`` (float16, bfloat16, float32, float64), by the names generated code uses.

    Those whose names have ``_c`` convert between ``dtype`` and the dtype of arithmetic (float64 for float64, else float32); all
    others work on the latter.
    """
    return dict(operation_table(dtype))


@functools.cache
def operation_table(dtype: str, computed: str = "") -> "Table":
    """The table of `operations`, for what makes larger ones of them; not to be added to.

    ``computed`` is the dtype of arithmetic where it is not the usual one: float64 for what is stored in float32.
    """
    table = Table(dtype, computed)
    for suffix, stored in (("", table.computed), ("_c", dtype)):
        _add_loads(table, suffix, stored)
        _add_stores(table, suffix, stored)
    _add_scalars(table)
    _add_masks(table)
    _add_vectors(table)
    _add_arithmetic(table)
    _add_exponential(table)
    _add_sums(table)
    return table


class Table(dict):
    """Intrinsics by name, and the types that those of one dtype share; ``emit`` has what writes the instructions of each."""

    def __init__(self, dtype: str, computed: str = ""):
        super().__init__()
        self.emit: dict[str, Callable] = {}
        self.computed = computed or ("float64" if dtype == "float64" else "float32")
        self.lanes = lanes(self.computed)
        self.scalar_type = getattr(types, self.computed)
        self.scalar = _STORED[self.computed]
        self.vector_type = _Vector(self.computed, self.scalar, self.lanes)
        self.mask_type = _Vector("bool", _I1, self.lanes)
        # Sums over a row, one float64 for each lane.
        self.sums_type = _Vector("float64", _DOUBLE, self.lanes)
        self.vector = self.vector_type.llvm

    def add(self, result: types.Type, *arguments: types.Type, name: str = "") -> Callable:
        """Decorates ``emit(builder, *values)``, which emits an operation's instructions and returns its result's LLVM value.

        The operation has the name of the function unless another is given; ``result`` and ``arguments`` are Numba's types.
        """

        def define(emit):
            def typing(typingctx, *given):
                def codegen(context, builder, signature, values):
                    value = emit(builder, *values)
                    return context.get_dummy_value() if result is types.void else value

                return result(*arguments), codegen

            typing.__name__ = typing.__qualname__ = name or emit.__name__
            # The function's own parameters, with Numba's typing context in the place of the builder.
            typing.__signature__ = inspect.signature(emit)
            self[typing.__name__] = intrinsic(typing)
            self.emit[typing.__name__] = emit
            return emit

        return define

    def constant(self, number: float, kind: ir.Type | None = None) -> ir.Constant:
        """A vector of one number in all lanes; ``kind`` is its LLVM type, by default that of arithmetic."""
        return ir.Constant(kind or self.vector, [number] * self.lanes)

    def call(self, builder, name: str, result: ir.Type, arguments: list, element: ir.Type | None = None, **options):
        """Call LLVM's intrinsic ``name``, overloaded for vectors of ``element`` (that of arithmetic) and named so."""
        return _call(builder, f"{name}.v{self.lanes}{_mangled(element or self.scalar)}", result, arguments, **options)


def _add_loads(table: Table, suffix: str, stored: str) -> None:
    """``load`` and ``load_masked`` of elements of dtype ``stored``."""
    element, align = _STORED[stored], ELEMENT_BYTES[stored]
    stored_vector = ir.VectorType(element, table.lanes)

    def widen(builder, value):
        if stored == "bfloat16":
            # bfloat16 is the upper half of a float32.
            integers = ir.VectorType(_I32, table.lanes)
            shifted = builder.shl(builder.zext(value, integers), table.constant(16, integers))
            return builder.bitcast(shifted, table.vector)
        return value if element == table.scalar else builder.fpext(value, table.vector)

    @table.add(table.vector_type, types.int64, types.int64, name=f"load{suffix}")
    def load(builder, address, index):
        return widen(builder, builder.load(_pointer(builder, address, index, element), typ=stored_vector, align=align))

    @table.add(table.vector_type, types.int64, types.int64, table.mask_type, name=f"load{suffix}_masked")
    def load_masked(builder, address, index, mask):
        pointer = _pointer(builder, address, index, element)
        arguments = [pointer, ir.Constant(_I32, align), mask, ir.Constant(stored_vector, None)]
        name = f"llvm.masked.load.v{table.lanes}{_mangled(element)}.p0"
        return widen(builder, _call(builder, name, stored_vector, arguments))


def _add_stores(table: Table, suffix: str, stored: str) -> None:
    """``store``, ``store_masked`` and ``store_streaming`` of elements of dtype ``stored``."""
    element, align = _STORED[stored], ELEMENT_BYTES[stored]
    stored_vector = ir.VectorType(element, table.lanes)

    def narrow(builder, value):
        if stored == "bfloat16":
            # Round to nearest even on the bits; a NaN keeps its top bits, with the quiet bit set.
            integers = ir.VectorType(_I32, table.lanes)
            bits = builder.bitcast(value, integers)
            odd = builder.and_(builder.lshr(bits, table.constant(16, integers)), table.constant(1, integers))
            rounded = builder.add(bits, builder.add(odd, table.constant(0x7FFF, integers)))
            is_nan = builder.fcmp_unordered("uno", value, value)
            chosen = builder.select(is_nan, builder.or_(bits, table.constant(0x400000, integers)), rounded)
            return builder.trunc(builder.lshr(chosen, table.constant(16, integers)), stored_vector)
        return value if element == table.scalar else builder.fptrunc(value, stored_vector)

    arguments = types.int64, types.int64, table.vector_type

    @table.add(types.void, *arguments, name=f"store{suffix}")
    def store(builder, address, index, value):
        builder.store(narrow(builder, value), _pointer(builder, address, index, element), align=align)

    @table.add(types.void, *arguments, name=f"store{suffix}_streaming")
    def store_streaming(builder, address, index, value):
        """Past the caches, for results too large to stay there; the address must be a multiple of the vector's size."""
        value, target = narrow(builder, value), _pointer(builder, address, index, element)
        instruction = builder.store(value, target, align=table.lanes * align)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))

    @table.add(types.void, *arguments, table.mask_type, name=f"store{suffix}_masked")
    def store_masked(builder, address, index, value, mask):
        target = _pointer(builder, address, index, element)
        name = f"llvm.masked.store.v{table.lanes}{_mangled(element)}.p0"
        _call(builder, name, ir.VoidType(), [narrow(builder, value), target, ir.Constant(_I32, align), mask])


def _add_scalars(table: Table) -> None:
    """Single numbers in memory: arguments and counters, int64, and values of the dtype of arithmetic."""

    @table.add(types.int64, types.int64, types.int64)
    def load_int(builder, address, index):
        return builder.load(_pointer(builder, address, index, _I64), typ=_I64)

    @table.add(types.int64, types.int64, types.int64)
    def take_ticket(builder, address, index):
        """The int64 counter's value, and one more for the next thread."""
        return builder.atomic_rmw("add", _pointer(builder, address, index, _I64), integer(1), "monotonic")

    @table.add(types.int64, types.int64, types.int64, types.int64)
    def add_done(builder, address, index, count):
        """The int64 counter's value with ``count`` more. Whoever finds all items done sees what other threads wrote."""
        before = builder.atomic_rmw("add", _pointer(builder, address, index, _I64), count, "acq_rel")
        return builder.add(before, count)

    @table.add(types.int64, *[types.int64] * 5)
    def sites_of_row(builder, plane, depth, line, height, width):
        """``width``, or 0 where the row lies off the grid."""
        on_grid = [builder.icmp_unsigned("<", place, size) for place, size in ((plane, depth), (line, height))]
        return builder.select(builder.and_(*on_grid), width, integer(0))

    @table.add(types.int64, types.int64, types.int64)
    def least(builder, a, b):
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    @table.add(table.scalar_type, types.int64, types.int64)
    def load_scalar(builder, address, index):
        return builder.load(_pointer(builder, address, index, table.scalar), typ=table.scalar)

    @table.add(types.int64, *[types.int64] * 5)
    def row_of_sample(builder, image, sample, stride, row, width):
        """The address of a row of the ``sample``-th of vectors that are ``stride`` apart, the first of which is ``image``."""
        index = builder.add(builder.mul(sample, stride), builder.mul(row, width))
        return builder.add(image, builder.mul(index, integer(ELEMENT_BYTES[table.computed])))

    @table.add(types.void, types.int64, types.int64, table.scalar_type)
    def store_scalar(builder, address, index, value):
        builder.store(value, _pointer(builder, address, index, table.scalar))

    @table.add(types.void, types.int64, types.int64, types.float64)
    def store_double(builder, address, index, value):
        builder.store(value, _pointer(builder, address, index, _DOUBLE))

    @table.add(types.float64, types.int64, types.int64)
    def load_double(builder, address, index):
        return builder.load(_pointer(builder, address, index, _DOUBLE), typ=_DOUBLE)

    @table.add(types.void, types.int64, types.int64, types.float64)
    def store_rounded(builder, address, index, value):
        """A float64, rounded to the dtype of arithmetic."""
        rounded = value if table.scalar == _DOUBLE else builder.fptrunc(value, table.scalar)
        builder.store(rounded, _pointer(builder, address, index, table.scalar))

    @table.add(table.scalar_type)
    def zero_scalar(builder):
        return ir.Constant(table.scalar, 0.0)


def _add_masks(table: Table) -> None:
    """What makes masks, joins them and asks them."""
    mask, vector = table.mask_type, table.vector_type

    @table.add(mask)
    def no_lanes(builder):
        return ir.Constant(mask.llvm, None)

    @table.add(mask, types.int64, types.int64, types.int64)
    def between(builder, first, start, stop):
        """Mask of the lanes i with start <= first + i < stop, all of them below 2³¹."""
        first, start, stop = (_splat(builder, builder.trunc(a, _I32), table.lanes) for a in (first, start, stop))
        lane = builder.add(first, ir.Constant(first.type, list(range(table.lanes))))
        return builder.and_(builder.icmp_signed(">=", lane, start), builder.icmp_signed("<", lane, stop))

    def in_class(builder, value, classes):
        """Mask of the lanes whose floating-point class is among LLVM's bits ``classes``."""
        return table.call(builder, "llvm.is.fpclass", mask.llvm, [value, ir.Constant(_I32, classes)])

    @table.add(mask, vector)
    def not_finite(builder, value):
        return in_class(builder, value, _NAN | _INFINITE)

    @table.add(mask, vector, vector)
    def not_normal(builder, quotient, numerator):
        """Mask of the lanes whose quotient is not a normal number, but for those that are 0 because the numerator is."""
        outside = in_class(builder, quotient, _NAN | _INFINITE | _SUBNORMAL | _ZERO)
        return builder.and_(outside, builder.fcmp_unordered("!=", numerator, ir.Constant(table.vector, None)))

    @table.add(mask, mask, mask)
    def both(builder, a, b):
        return builder.and_(a, b)

    @table.add(mask, mask, mask)
    def either(builder, a, b):
        return builder.or_(a, b)

    @table.add(types.boolean, mask)
    def any_lane(builder, lanes_on):
        bits = builder.bitcast(lanes_on, ir.IntType(table.lanes))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


def _add_vectors(table: Table) -> None:
    """Vectors from numbers and from masks."""
    vector = table.vector_type

    @table.add(vector)
    def zeros(builder):
        return table.constant(0.0)

    @table.add(vector)
    def ones(builder):
        return table.constant(1.0)

    @table.add(vector, types.int64, types.int64)
    def load_splat(builder, address, index):
        """One element in all lanes."""
        return _splat(builder, table.emit["load_scalar"](builder, address, index), table.lanes)

    @table.add(vector, vector, table.mask_type)
    def keep(builder, value, mask):
        """The value where the mask is on, 0 elsewhere."""
        return builder.select(mask, value, ir.Constant(table.vector, None))


def _add_arithmetic(table: Table) -> None:
    """Products, sums and quotients."""
    vector, scalar = table.vector_type, table.scalar_type

    @table.add(vector, vector, vector)
    def multiply(builder, a, b):
        return builder.fmul(a, b)

    @table.add(vector, vector, vector)
    def subtract(builder, a, b):
        return builder.fsub(a, b)

    @table.add(vector, vector, vector)
    def divide(builder, a, b):
        return builder.fdiv(a, b)

    @table.add(vector, vector, vector, vector)
    def add_product(builder, a, b, c):
        """a + b c, fused where the machine can; so are the next two."""
        return table.call(builder, "llvm.fmuladd", a.type, [b, c, a])

    @table.add(vector, vector, vector, vector)
    def subtract_product(builder, a, b, c):
        return table.call(builder, "llvm.fmuladd", a.type, [builder.fneg(b), c, a])

    @table.add(scalar, scalar, scalar, scalar)
    def subtract_product_scalar(builder, a, b, c):
        return _call(builder, f"llvm.fmuladd.{_mangled(table.scalar)}", a.type, [builder.fneg(b), c, a])


def _add_exponential(table: Table) -> None:
    integers = ir.VectorType(_I64 if table.computed == "float64" else _I32, table.lanes)
    mantissa_bits, bias, lowest, highest, ln2_high, ln2_low, degree = _EXPONENTIAL[str(table.scalar)]

    def power_of_two(builder, exponent):
        biased = builder.add(exponent, table.constant(bias, integers))
        return builder.bitcast(builder.shl(biased, table.constant(mantissa_bits, integers)), table.vector)

    def fused(builder, a, b, c):
        return table.call(builder, "llvm.fmuladd", table.vector, [a, b, c])

    @table.add(table.vector_type, table.vector_type)
    def exponential(builder, x):
        """exp(x) to about one unit in the last place: a power of two times a Taylor polynomial on [-ln 2 / 2, ln 2 / 2]."""
        # Beyond these bounds the result is 0 or infinity; NaN passes both comparisons.
        x = builder.select(builder.fcmp_ordered("<", x, table.constant(lowest)), table.constant(lowest), x)
        x = builder.select(builder.fcmp_ordered(">", x, table.constant(highest)), table.constant(highest), x)
        turns = builder.fmul(x, table.constant(1 / math.log(2)))
        turns = table.call(builder, "llvm.rint", table.vector, [turns])
        is_nan = builder.fcmp_unordered("uno", x, x)
        exponent = builder.fptosi(builder.select(is_nan, table.constant(0.0), turns), integers)
        rest = fused(builder, turns, table.constant(-ln2_high), x)
        rest = fused(builder, turns, table.constant(-ln2_low), rest)
        value = table.constant(1 / math.factorial(degree))
        for power in range(degree - 1, -1, -1):
            value = fused(builder, value, rest, table.constant(1 / math.factorial(power)))
        # In two steps, because 2 ** exponent alone may be beyond the range of the result.
        half = builder.ashr(exponent, table.constant(1, integers))
        value = builder.fmul(value, power_of_two(builder, half))
        return builder.fmul(value, power_of_two(builder, builder.sub(exponent, half)))


def _add_sums(table: Table) -> None:
    """Sums over a row of values, in float64."""
    sums_type = table.sums_type

    def add_to_sums(builder, sums, value, factor=None):
        """Σ + value · factor, by default value²."""
        wide = value if value.type == sums.type else builder.fpext(value, sums.type)
        return table.call(builder, "llvm.fmuladd", sums.type, [wide, factor or wide, sums], element=_DOUBLE)

    @table.add(sums_type)
    def no_sums(builder):
        return ir.Constant(sums_type.llvm, None)

    @table.add(sums_type, sums_type, table.vector_type)
    def add_square(builder, sums, value):
        return add_to_sums(builder, sums, value)

    @table.add(sums_type, sums_type, table.vector_type)
    def subtract_twice(builder, sums, value):
        return add_to_sums(builder, sums, value, factor=table.constant(-2.0, sums.type))

    @table.add(types.float64, sums_type)
    def total(builder, sums):
        """The sum of all lanes, in an order fixed at compile time."""
        arguments = [ir.Constant(_DOUBLE, 0.0), sums]
        # "reassoc": a tree over the lanes rather than one after the other.
        return table.call(builder, "llvm.vector.reduce.fadd", _DOUBLE, arguments, element=_DOUBLE, fastmath=["reassoc"])


def integer(number: int) -> ir.Constant:
    """An int64 in LLVM, as all arguments and indices are."""
    return ir.Constant(_I64, number)


def _pointer(builder, address, index, element: ir.Type):
    return builder.gep(builder.inttoptr(address, ir.PointerType()), [index], source_etype=element)


def _call(builder, name: str, result: ir.Type, arguments: list, **options):
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments, **options)


def _mangled(element: ir.Type) -> str:
    """The element type as it stands in the name of an overloaded LLVM intrinsic."""
    if isinstance(element, ir.IntType):
        return f"i{element.width}"
    return {ir.HalfType: "f16", ir.FloatType: "f32", ir.DoubleType: "f64"}[type(element)]


def _splat(builder, value, n):
    vector = ir.VectorType(value.type, n)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, n), [0] * n))
