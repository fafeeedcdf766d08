"""Explicit vectors for Numba: what generated CPU code loads, computes with and stores, 64 bytes at a time.

Numba's loop vectoriser gives up on loops with two dozen input streams, and spends rows of 64 pixels in its scalar remainder.
These intrinsics emit LLVM vector instructions directly; LLVM splits them where the machine's registers are narrower.

An *address* is the int64 of a tensor's ``data_ptr()``; an index counts elements. A *mask* switches lanes off: a masked load
yields 0 there and touches no memory, a masked store leaves memory as it is.
"""

import math

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

# LLVM's bits for classes of floating-point numbers, either sign.
_NAN, _INFINITE, _SUBNORMAL, _ZERO = 0x3, 0x204, 0x90, 0x60

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_STORED = {"float16": ir.HalfType(), "bfloat16": ir.IntType(16), "float32": ir.FloatType(), "float64": ir.DoubleType()}


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

    ``load_c`` and ``store_c`` convert between ``dtype`` and the dtype of arithmetic (float64 for float64, else float32); all
    others work on the latter.
    """
    scalar_type = types.float64 if dtype == "float64" else types.float32
    scalar = _STORED["float64" if dtype == "float64" else "float32"]
    n = lanes(dtype)
    vector_type = _Vector(str(scalar_type), scalar, n)
    mask_type = _Vector("bool", _I1, n)
    vector = vector_type.llvm

    def pointer(builder, address, index, element):
        base = builder.inttoptr(address, ir.PointerType())
        return builder.gep(base, [index], source_etype=element)

    def call(builder, name, result, arguments):
        function_type = ir.FunctionType(result, [a.type for a in arguments])
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)

    def widen(builder, stored, stored_llvm):
        if stored == "float16":
            return builder.fpext(stored_llvm, vector)
        if stored == "bfloat16":
            # bfloat16 is the upper half of a float32.
            integers = ir.VectorType(_I32, n)
            shifted = builder.shl(builder.zext(stored_llvm, integers), ir.Constant(integers, [16] * n))
            return builder.bitcast(shifted, vector)
        return stored_llvm

    def narrow(builder, stored, value):
        if stored == "float16":
            return builder.fptrunc(value, ir.VectorType(_STORED[stored], n))
        if stored == "bfloat16":
            # Round to nearest even on the bits; a NaN keeps its top bits, with the quiet bit set.
            integers = ir.VectorType(_I32, n)

            def constant(number):
                return ir.Constant(integers, [number] * n)

            bits = builder.bitcast(value, integers)
            odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
            rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
            is_nan = builder.fcmp_unordered("uno", value, value)
            chosen = builder.select(is_nan, builder.or_(bits, constant(0x400000)), rounded)
            return builder.trunc(builder.lshr(chosen, constant(16)), ir.VectorType(_STORED[stored], n))
        return value

    def make_load(stored):
        element = _STORED[stored]
        stored_vector = ir.VectorType(element, n)
        align = ELEMENT_BYTES[stored]

        @intrinsic
        def load(typingctx, address, index):
            def codegen(context, builder, signature, args):
                value = builder.load(pointer(builder, *args, element), typ=stored_vector, align=align)
                return widen(builder, stored, value)

            return vector_type(types.int64, types.int64), codegen

        @intrinsic
        def load_masked(typingctx, address, index, mask):
            def codegen(context, builder, signature, args):
                address, index, mask = args
                zero = ir.Constant(stored_vector, None)
                arguments = [pointer(builder, address, index, element), ir.Constant(_I32, align), mask, zero]
                name = f"llvm.masked.load.v{n}{_mangled(element)}.p0"
                return widen(builder, stored, call(builder, name, stored_vector, arguments))

            return vector_type(types.int64, types.int64, mask_type), codegen

        return load, load_masked

    def make_store(stored):
        element = _STORED[stored]
        align = ELEMENT_BYTES[stored]

        @intrinsic
        def store(typingctx, address, index, value):
            def codegen(context, builder, signature, args):
                address, index, value = args
                builder.store(narrow(builder, stored, value), pointer(builder, address, index, element), align=align)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, vector_type), codegen

        @intrinsic
        def store_streaming(typingctx, address, index, value):
            """Past the caches, for results too large to stay there; the address must be a multiple of the vector's size."""

            def codegen(context, builder, signature, args):
                address, index, value = args
                value = narrow(builder, stored, value)
                instruction = builder.store(value, pointer(builder, address, index, element), align=n * align)
                instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, vector_type), codegen

        @intrinsic
        def store_masked(typingctx, address, index, value, mask):
            def codegen(context, builder, signature, args):
                address, index, value, mask = args
                target = pointer(builder, address, index, element)
                arguments = [narrow(builder, stored, value), target, ir.Constant(_I32, align), mask]
                call(builder, f"llvm.masked.store.v{n}{_mangled(element)}.p0", ir.VoidType(), arguments)
                return context.get_dummy_value()

            return types.void(types.int64, types.int64, vector_type, mask_type), codegen

        return store, store_masked, store_streaming

    @intrinsic
    def load_int(typingctx, address, index):
        def codegen(context, builder, signature, args):
            return builder.load(pointer(builder, *args, _I64), typ=_I64)

        return types.int64(types.int64, types.int64), codegen

    @intrinsic
    def take_ticket(typingctx, address, index):
        """The int64 counter's value, and one more for the next thread."""

        def codegen(context, builder, signature, args):
            return builder.atomic_rmw("add", pointer(builder, *args, _I64), ir.Constant(_I64, 1), "monotonic")

        return types.int64(types.int64, types.int64), codegen

    @intrinsic
    def load_scalar(typingctx, address, index):
        def codegen(context, builder, signature, args):
            return builder.load(pointer(builder, *args, scalar), typ=scalar)

        return scalar_type(types.int64, types.int64), codegen

    @intrinsic
    def store_scalar(typingctx, address, index, value):
        def codegen(context, builder, signature, args):
            address, index, value = args
            builder.store(value, pointer(builder, address, index, scalar))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, scalar_type), codegen

    @intrinsic
    def between(typingctx, first, start, stop):
        """Mask of the lanes i with start <= first + i < stop, all of them below 2³¹."""

        def codegen(context, builder, signature, args):
            first, start, stop = (_splat(builder, builder.trunc(a, _I32), n) for a in args)
            lane = builder.add(first, ir.Constant(first.type, list(range(n))))
            return builder.and_(builder.icmp_signed(">=", lane, start), builder.icmp_signed("<", lane, stop))

        return mask_type(types.int64, types.int64, types.int64), codegen

    @intrinsic
    def splat(typingctx, value):
        def codegen(context, builder, signature, args):
            return _splat(builder, args[0], n)

        return vector_type(scalar_type), codegen

    @intrinsic
    def keep(typingctx, value, mask):
        """The value where the mask is on, 0 elsewhere."""

        def codegen(context, builder, signature, args):
            value, mask = args
            return builder.select(mask, value, ir.Constant(vector, None))

        return vector_type(vector_type, mask_type), codegen

    @intrinsic
    def window(typingctx, low, high, first):
        """Lanes ``first`` to ``first + n - 1`` of two vectors one behind the other; ``first`` is a literal."""
        if not isinstance(first, types.IntegerLiteral):
            return None
        indices = ir.Constant(ir.VectorType(_I32, n), [first.literal_value + i for i in range(n)])

        def codegen(context, builder, signature, args):
            return builder.shuffle_vector(args[0], args[1], indices)

        return vector_type(vector_type, vector_type, first), codegen

    def in_class(builder, value, classes):
        """Mask of the lanes whose floating-point class is among LLVM's bits ``classes``."""
        function_type = ir.FunctionType(mask_type.llvm, [vector, _I32])
        name = f"llvm.is.fpclass.v{n}{_mangled(scalar)}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return builder.call(function, [value, ir.Constant(_I32, classes)])

    @intrinsic
    def not_finite(typingctx, value):
        def codegen(context, builder, signature, args):
            return in_class(builder, args[0], _NAN | _INFINITE)

        return mask_type(vector_type), codegen

    @intrinsic
    def not_normal(typingctx, quotient, numerator):
        """Mask of the lanes whose quotient is not a normal number, but for those that are 0 because the numerator is."""

        def codegen(context, builder, signature, args):
            quotient, numerator = args
            outside = in_class(builder, quotient, _NAN | _INFINITE | _SUBNORMAL | _ZERO)
            return builder.and_(outside, builder.fcmp_unordered("!=", numerator, ir.Constant(vector, None)))

        return mask_type(vector_type, vector_type), codegen

    def lanewise(kind, instruction):
        """An intrinsic that applies a two-operand instruction to vectors or masks."""

        @intrinsic
        def compute(typingctx, a, b):
            def codegen(context, builder, signature, args):
                return getattr(builder, instruction)(*args)

            return kind(kind, kind), codegen

        return compute

    @intrinsic
    def no_lanes(typingctx):
        def codegen(context, builder, signature, args):
            return ir.Constant(mask_type.llvm, None)

        return mask_type(), codegen

    @intrinsic
    def any_lane(typingctx, mask):
        def codegen(context, builder, signature, args):
            bits = builder.bitcast(args[0], ir.IntType(n))
            return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

        return types.boolean(mask_type), codegen

    def multiply_add(kind, negate):
        """a + b c (a - b c to ``negate``) on vectors or scalars, fused where the machine can."""
        name = f"llvm.fmuladd.{f'v{n}' if kind is vector_type else ''}{_mangled(scalar)}"

        @intrinsic
        def compute(typingctx, a, b, c):
            def codegen(context, builder, signature, args):
                a, b, c = args
                return call(builder, name, a.type, [builder.fneg(b) if negate else b, c, a])

            return kind(kind, kind, kind), codegen

        return compute

    @intrinsic
    def zero_scalar(typingctx):
        def codegen(context, builder, signature, args):
            return ir.Constant(scalar, 0.0)

        return scalar_type(), codegen

    @intrinsic
    def exponential(typingctx, a):
        """exp(a) to about one unit in the last place: a power of two times a Taylor polynomial on [-ln 2 / 2, ln 2 / 2]."""

        def codegen(context, builder, signature, args):
            integers = ir.VectorType(_I64 if scalar == ir.DoubleType() else _I32, n)
            mantissa_bits, bias, lowest, highest, ln2_high, ln2_low, degree = _EXPONENTIAL[str(scalar)]

            def constant(number, kind=vector):
                return ir.Constant(kind, [number] * n)

            def power_of_two(exponent):
                biased = builder.add(exponent, constant(bias, integers))
                return builder.bitcast(builder.shl(biased, constant(mantissa_bits, integers)), vector)

            def fused(a, b, c):
                return call(builder, f"llvm.fmuladd.v{n}{_mangled(scalar)}", vector, [a, b, c])

            # Beyond these bounds the result is 0 or infinity; NaN passes both comparisons.
            x = builder.select(builder.fcmp_ordered("<", args[0], constant(lowest)), constant(lowest), args[0])
            x = builder.select(builder.fcmp_ordered(">", x, constant(highest)), constant(highest), x)
            turns = builder.fmul(x, constant(1 / math.log(2)))
            turns = call(builder, f"llvm.rint.v{n}{_mangled(scalar)}", vector, [turns])
            is_nan = builder.fcmp_unordered("uno", x, x)
            exponent = builder.fptosi(builder.select(is_nan, constant(0.0), turns), integers)
            rest = fused(turns, constant(-ln2_low), fused(turns, constant(-ln2_high), x))
            value = constant(1 / math.factorial(degree))
            for power in range(degree - 1, -1, -1):
                value = fused(value, rest, constant(1 / math.factorial(power)))
            # In two steps, because 2 ** exponent alone may be beyond the range of the result.
            half = builder.ashr(exponent, constant(1, integers))
            value = builder.fmul(value, power_of_two(half))
            return builder.fmul(value, power_of_two(builder.sub(exponent, half)))

        return vector_type(vector_type), codegen

    # Sums over a row, one float64 for each lane.
    sums_type = _Vector("float64", ir.DoubleType(), n)

    def widened_sum(product):
        """An intrinsic that adds ``product(value)``, two factors in float64, to each lane's sum."""

        @intrinsic
        def add(typingctx, sums, value):
            def codegen(context, builder, signature, args):
                sums, value = args
                wide = value if value.type == sums.type else builder.fpext(value, sums.type)
                return call(builder, f"llvm.fmuladd.v{n}f64", sums.type, [wide, product(wide), sums])

            return sums_type(sums_type, vector_type), codegen

        return add

    @intrinsic
    def no_sums(typingctx):
        def codegen(context, builder, signature, args):
            return ir.Constant(sums_type.llvm, None)

        return sums_type(), codegen

    @intrinsic
    def total(typingctx, sums):
        """The sum of all lanes, in an order fixed at compile time."""

        def codegen(context, builder, signature, args):
            double = ir.DoubleType()
            function_type = ir.FunctionType(double, [double, sums_type.llvm])
            name = f"llvm.vector.reduce.fadd.v{n}f64"
            function = cgutils.get_or_insert_function(builder.module, function_type, name)
            # "reassoc": a tree over the lanes rather than one after the other.
            return builder.call(function, [ir.Constant(double, 0.0), args[0]], fastmath=["reassoc"])

        return types.float64(sums_type), codegen

    @intrinsic
    def store_double(typingctx, address, index, value):
        def codegen(context, builder, signature, args):
            address, index, value = args
            builder.store(value, pointer(builder, address, index, ir.DoubleType()))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float64), codegen

    def constant(number):
        @intrinsic
        def filled(typingctx):
            def codegen(context, builder, signature, args):
                return ir.Constant(vector, [number] * n)

            return vector_type(), codegen

        return filled

    load, load_masked = make_load(str(scalar_type))
    load_c, load_c_masked = make_load(dtype)
    store, store_masked, _ = make_store(str(scalar_type))
    store_c, store_c_masked, store_c_streaming = make_store(dtype)
    return {
        "load": load,
        "load_masked": load_masked,
        "load_c": load_c,
        "load_c_masked": load_c_masked,
        "store": store,
        "store_masked": store_masked,
        "store_c": store_c,
        "store_c_masked": store_c_masked,
        "store_c_streaming": store_c_streaming,
        "load_int": load_int,
        "take_ticket": take_ticket,
        "load_scalar": load_scalar,
        "store_scalar": store_scalar,
        "store_double": store_double,
        "zero_scalar": zero_scalar,
        "zeros": constant(0.0),
        "ones": constant(1.0),
        "between": between,
        "splat": splat,
        "keep": keep,
        "window": window,
        "not_finite": not_finite,
        "not_normal": not_normal,
        "both": lanewise(mask_type, "and_"),
        "either": lanewise(mask_type, "or_"),
        "no_lanes": no_lanes,
        "any_lane": any_lane,
        "multiply": lanewise(vector_type, "fmul"),
        "subtract": lanewise(vector_type, "fsub"),
        "divide": lanewise(vector_type, "fdiv"),
        "add_product": multiply_add(vector_type, negate=False),
        "subtract_product": multiply_add(vector_type, negate=True),
        "subtract_product_scalar": multiply_add(scalar_type, negate=True),
        "exponential": exponential,
        "no_sums": no_sums,
        "add_square": widened_sum(lambda wide: wide),
        "subtract_twice": widened_sum(lambda wide: ir.Constant(wide.type, [-2.0] * n)),
        "total": total,
    }


def _mangled(element: ir.Type) -> str:
    """The element type as it stands in the name of an overloaded LLVM intrinsic."""
    if isinstance(element, ir.IntType):
        return f"i{element.width}"
    return {ir.HalfType: "f16", ir.FloatType: "f32", ir.DoubleType: "f64"}[type(element)]


def _splat(builder, value, n):
    vector = ir.VectorType(value.type, n)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, n), [0] * n))
