"""e^x in float32 without float64, of which consumer GPUs have few units: 0.88 units in the last place at most, for every x.

`tl.exp` is 2^(x log₂e) with x log₂e rounded, so that it loses up to |x| roundings. Here x = n ln 2 + r with an integer n, after
Cody and Waite: ln 2 is the sum of two constants, the first of so few bits that its product with n is exact. Then e^r is a
polynomial, 1 + r + r² q(r), whose q has the least largest relative error for |r| ≤ ln 2 / 2: 3e-9.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 15 bits
_LN2_LOW = tl.constexpr(1.428606765330187e-06)
_Q0 = tl.constexpr(0.4999999403953552)
_Q1 = tl.constexpr(0.1666651964187622)
_Q2 = tl.constexpr(0.041668400168418884)
_Q3 = tl.constexpr(0.00836885068565607)
_Q4 = tl.constexpr(0.0013814320554956794)

# 1.5 · 2²³: a float32 near it has its integers in its last bits.
_ROUNDING = tl.constexpr(12582912.0)

# Beyond these, e^x is 0 or infinite.
_LEAST = tl.constexpr(-105.0)
_MOST = tl.constexpr(90.0)


# And of the product of two factors, for which 2^n is cut in two, beyond these.
_LEAST_IN_FACTORS = tl.constexpr(-176.0)
_MOST_IN_FACTORS = tl.constexpr(177.5)


@triton.jit
def exp(x):
    """e^x in the type of ``x``, float32 or float64."""
    if x.dtype == tl.float32:
        power, half, rest = _parts(tl.minimum(tl.maximum(x, _LEAST, tl.PropagateNan.ALL), _MOST, tl.PropagateNan.ALL))
        return power * half * rest
    else:
        return tl.exp(x)


@triton.jit
def exp_in_factors(x):
    """Two float32 numbers whose product is e^x, also where that itself is no normal number: the second is a power of two."""
    power, half, rest = _parts(
        tl.minimum(tl.maximum(x, _LEAST_IN_FACTORS, tl.PropagateNan.ALL), _MOST_IN_FACTORS, tl.PropagateNan.ALL)
    )
    return power * half, rest


@triton.jit
def _parts(x):
    """e^r, and two powers of two of about the same size, whose product is e^x."""
    shifted = tl.fma(x, _LOG2_E, _ROUNDING)
    n = shifted - _ROUNDING
    r = tl.fma(n, 0.0 - _LN2_LOW, tl.fma(n, 0.0 - _LN2_HIGH, x))
    q = tl.fma(tl.fma(tl.fma(tl.fma(_Q4, r, _Q3), r, _Q2), r, _Q1), r, _Q0)
    power = tl.fma(tl.fma(q, r, 1.0), r, 1.0)
    # 2^⌊n/2⌋ and 2^⌈n/2⌉, made from the bits of their exponents: 2^n itself need not be a normal number.
    bits = shifted.to(tl.int32, bitcast=True)
    half = (bits >> 1) << 23
    rest = (bits << 23) - half
    one = 127 << 23
    return power, (half + one).to(tl.float32, bitcast=True), (rest + one).to(tl.float32, bitcast=True)
