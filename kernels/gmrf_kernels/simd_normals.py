"""Standard normal numbers from a counter, in vectors: Philox 4x32-10, and the transform of Box and Muller.

Philox turns a counter and a key into four random words of 32 bits (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as
easy as 1, 2, 3, SC 2011). What it gives depends on these alone, so it does not matter who computes it, or what else.

A radius √(-2 log u) and an angle make two normal numbers. In float32 they come from two words: u from the first one and 8 bits
of the second, so that the radius reaches 7.5, and the angle from the other 24 bits. In float64 they come from four: u has 53
bits, so that the radius reaches 8.5, and the angle 54. Two bits of the angle are its quadrant, the others, centred, an angle
between -π/4 and π/4.
"""

import math
from collections.abc import Sequence

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .cpu_source import inside, span_kernel, store
from .simd import Table, integer, lanes
from .simd import operations as simd_operations

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 2**32 - 1

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_BITS = {_I32: 32, _I64: 64, ir.FloatType(): 32, ir.DoubleType(): 64}

# Bits of a mantissa, and terms of the series for the logarithm, the sine and the cosine: what is left out is less than half a
# unit in the last place of the first term.
_SERIES = {"float32": (23, 6, 5, 6), "float64": (52, 11, 9, 10)}

# Vectors of numbers that one block of counters gives.
_VECTORS = {"float32": 4, "float64": 2}


def source(dtype: str, cache: bool) -> str:
    """The source of a kernel that writes the first ``numbers`` of the stream of a key; items are blocks.

    The numbers of a block lie one vector behind the other, so that of a longer stream the beginning is the same.
    """
    size, step = block_size(dtype), lanes(dtype)
    last = "".join(
        f"inside = between(0, 0, numbers - w - {v * step})\n" + store("store", "result", f"w + {v * step}", f"normal{v}", True)
        for v in range(_VECTORS[dtype])
    )
    body = "for block in range(start, stop):\n" + inside(
        draw_block(dtype, "key", "block")
        + f"w = block * {size}\n"
        + f"if w + {size} <= numbers:\n"
        + inside(store_block(dtype, "result", "w"))
        + "else:\n"
        + inside(last)
    )
    return span_kernel(dtype, cache, "key, result, numbers", "", body, operations="simd_normals")


def draw_block(dtype: str, key: str, block: str) -> str:
    """The source that draws a block, of `operations`."""
    return f"{', '.join(f'normal{v}' for v in range(_VECTORS[dtype]))} = normals({key}, {block})\n"


def store_block(dtype: str, row: str, index: str) -> str:
    """The source that stores it from an index of a row on."""
    step = lanes(dtype)
    return "".join(store("store", row, f"{index} + {v * step}", f"normal{v}", False) for v in range(_VECTORS[dtype]))


def block_size(dtype: str) -> int:
    """Numbers in a block."""
    return _VECTORS[dtype] * lanes(dtype)


def operations(dtype: str) -> dict:
    """The intrinsics of `simd`, and ``normals(key, block)``: some vectors of numbers.

    Block i has the counters from i · lanes on. Its vector v has, in lane l, number v of those that counter i · lanes + l gives.
    """
    table = Table(dtype)
    write = _Normals(table)

    @table.add(types.UniTuple(table.vector_type, _VECTORS[dtype]), types.int64, types.int64)
    def normals(builder, key, block):
        return cgutils.pack_array(builder, [numbers.value for numbers in write(builder, key, block)])

    return {**simd_operations(dtype), **table}


class _Lanes:
    """A vector in LLVM, with Python's operators; a number stands for a vector of it."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value):
        self.builder, self.value = builder, value
        self.element, self.count = value.type.element, value.type.count
        self._prefix = "" if self.element in (_I32, _I64) else "f"

    def _apply(self, instruction: str, *others: "_Lanes | float") -> "_Lanes":
        values = [other.value if isinstance(other, _Lanes) else self.filled(other) for other in others]
        return _Lanes(self.builder, getattr(self.builder, instruction)(self.value, *values))

    def filled(self, number: float) -> ir.Constant:
        return ir.Constant(self.value.type, [number] * self.count)

    def convert(self, instruction: str, element: ir.Type) -> "_Lanes":
        count = self.count * _BITS[self.element] // _BITS[element] if instruction == "bitcast" else self.count
        return _Lanes(self.builder, getattr(self.builder, instruction)(self.value, ir.VectorType(element, count)))

    def __add__(self, other):
        return self._apply(f"{self._prefix}add", other)

    def __sub__(self, other):
        return self._apply(f"{self._prefix}sub", other)

    def __mul__(self, other):
        return self._apply(f"{self._prefix}mul", other)

    def __truediv__(self, other):
        return self._apply("fdiv", other)

    def __and__(self, other):
        return self._apply("and_", other)

    def __or__(self, other):
        return self._apply("or_", other)

    def __xor__(self, other):
        return self._apply("xor", other)

    def __lshift__(self, other):
        return self._apply("shl", other)

    def __rshift__(self, other):
        return self._apply("lshr", other)

    def arithmetic_shift(self, bits: int) -> "_Lanes":
        return self._apply("ashr", bits)


def philox(counter: Sequence, key: Sequence) -> list:
    """Four words for a counter of four words and a key of two: in vectors of 64-bit lanes, or Python's numbers.

    Only the lower half of each 64-bit word counts.
    """
    for _ in range(_ROUNDS):
        # Masked here, where LLVM can then see that a product is one of 32 bits by 32 bits.
        first, second = (counter[0] & _WORD) * _MULTIPLIERS[0], (counter[2] & _WORD) * _MULTIPLIERS[1]
        counter = [(second >> 32) ^ counter[1] ^ key[0], second, (first >> 32) ^ counter[3] ^ key[1], first]
        key = [word + step for word, step in zip(key, _KEY_STEPS, strict=True)]
    return counter


class _Normals:
    """Writes ``normals`` for a table of `simd`."""

    def __init__(self, table: Table):
        self.table = table
        self.mantissa_bits, self.log_terms, self.sine_terms, self.cosine_terms = _SERIES[table.computed]
        self.integer = _I64 if table.computed == "float64" else _I32
        # A quarter of the whole range of integers, and of a turn.
        self.quarter = 2 ** (_BITS[self.integer] - 2)

    def __call__(self, builder: ir.IRBuilder, key: ir.Value, block: ir.Value) -> list[_Lanes]:
        numbers = self.float64 if self.table.computed == "float64" else self.float32
        return numbers(builder, key, block)

    def float32(self, builder: ir.IRBuilder, key: ir.Value, block: ir.Value) -> list[_Lanes]:
        # Lanes of 64 bits for the counters of even and of odd number, whose words then become lanes of 32 bits side by side.
        pairs = zip(*(self.words(builder, key, block, range(parity, self.table.lanes, 2)) for parity in (0, 1)), strict=True)
        joined = [((even & _WORD) | (odd << 32)).convert("bitcast", _I32) for even, odd in pairs]
        numbers = []
        for first, second in (joined[:2], joined[2:]):
            low = self.real(second & 255) * 2.0**-8 + 2.0**-9
            uniform = (first.convert("uitofp", self.table.scalar) + low) * 2.0**-32
            centred = (second & (self.quarter - 256) | 128) - self.quarter // 2
            numbers += self.box_muller(uniform, self.real(centred) * (math.pi / 2 * 2.0**-30), second >> 30)
        return numbers

    def float64(self, builder: ir.IRBuilder, key: ir.Value, block: ir.Value) -> list[_Lanes]:
        first, second, third, fourth = self.words(builder, key, block, range(self.table.lanes))
        uniform = (((first & _WORD) | (second << 32)) >> 11).convert("uitofp", self.table.scalar)
        turn = (third & _WORD) | (fourth << 32)
        centred = ((turn & (self.quarter - 1)) >> 10).convert("uitofp", self.table.scalar) + (0.5 - 2.0**51)
        return self.box_muller((uniform + 1.0) * 2.0**-53, centred * (math.pi / 2 * 2.0**-52), turn >> 62)

    def words(self, builder: ir.IRBuilder, key: ir.Value, block: ir.Value, lanes: Sequence[int]) -> list[_Lanes]:
        """Philox of the counters of these lanes of the block."""
        kind = ir.VectorType(_I64, len(lanes))

        def splat(value):
            first = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
            zeros = ir.Constant(ir.VectorType(_I32, len(lanes)), [0] * len(lanes))
            return _Lanes(builder, builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros))

        first = builder.mul(block, integer(self.table.lanes))
        number, key = splat(first) + _Lanes(builder, ir.Constant(kind, list(lanes))), splat(key)
        zero = _Lanes(builder, ir.Constant(kind, None))
        return philox([number, number >> 32, zero, zero], [key, key >> 32])

    def box_muller(self, uniform: _Lanes, angle: _Lanes, quadrant: _Lanes) -> list[_Lanes]:
        builder = uniform.builder
        square = self.logarithm(uniform) * -2.0
        radius = _Lanes(builder, self.table.call(builder, "llvm.sqrt", square.value.type, [square.value]))
        square = angle * angle
        sine = angle * self.polynomial(square, [(-1) ** k / math.factorial(2 * k + 1) for k in range(self.sine_terms)])
        cosine = self.polynomial(square, [(-1) ** k / math.factorial(2 * k) for k in range(self.cosine_terms)])
        odd = builder.icmp_unsigned("!=", (quadrant & 1).value, quadrant.filled(0))
        numbers = []
        # The cosine changes its sign in quadrants 1 and 2, the sine in 2 and 3.
        for in_even, in_odd, negative in ((cosine, sine, quadrant + 1), (sine, cosine, quadrant)):
            number = radius * _Lanes(builder, builder.select(odd, in_odd.value, in_even.value))
            sign = ((negative & 2) >> 1) << (_BITS[self.integer] - 1)
            numbers.append((number.convert("bitcast", self.integer) ^ sign).convert("bitcast", self.table.scalar))
        return numbers

    def logarithm(self, x: _Lanes) -> _Lanes:
        """log x of positive normal numbers: x = 2ᵉ (1 + f) with 1 + f from √½ to √2, and log(1 + f) = 2 artanh(f / (2 + f))."""
        bits = x.convert("bitcast", self.integer)
        root = _Lanes(x.builder, x.filled(math.sqrt(0.5))).convert("bitcast", self.integer)
        exponent = (bits - root).arithmetic_shift(self.mantissa_bits)
        f = (bits - (exponent << self.mantissa_bits)).convert("bitcast", self.table.scalar) - 1.0
        s = f / (f + 2.0)
        series = self.polynomial(s * s, [2 / (2 * k + 1) for k in range(self.log_terms)])
        exponent = exponent.convert("trunc", _I32) if self.integer is _I64 else exponent
        return self.fused(self.real(exponent), x.filled(math.log(2)), (s * series).value)

    def polynomial(self, x: _Lanes, coefficients: Sequence[float]) -> _Lanes:
        """Σ coefficients[k] xᵏ."""
        value = _Lanes(x.builder, x.filled(coefficients[-1]))
        for coefficient in reversed(coefficients[:-1]):
            value = self.fused(value, x.value, x.filled(coefficient))
        return value

    def fused(self, a: _Lanes, b: ir.Value, c: ir.Value) -> _Lanes:
        """a b + c."""
        return _Lanes(a.builder, self.table.call(a.builder, "llvm.fmuladd", a.value.type, [a.value, b, c]))

    def real(self, integers: _Lanes) -> _Lanes:
        return integers.convert("sitofp", self.table.scalar)
