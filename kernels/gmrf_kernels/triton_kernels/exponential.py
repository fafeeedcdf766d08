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


@triton.jit
def exp(x):
    """e^x in the type of ``x``, float32 or float64."""
    if x.dtype == tl.float32:
        x = tl.minimum(tl.maximum(x, _LEAST, tl.PropagateNan.ALL), _MOST, tl.PropagateNan.ALL)
        shifted = tl.fma(x, _LOG2_E, _ROUNDING)
        n = shifted - _ROUNDING
        r = tl.fma(n, 0.0 - _LN2_LOW, tl.fma(n, 0.0 - _LN2_HIGH, x))
        q = tl.fma(tl.fma(tl.fma(tl.fma(_Q4, r, _Q3), r, _Q2), r, _Q1), r, _Q0)
        power = tl.fma(tl.fma(q, r, 1.0), r, 1.0)
        # Times 2^⌊n/2⌋ and 2^⌈n/2⌉, made from the bits of their exponents: 2^n itself need not be a normal number.
        bits = shifted.to(tl.int32, bitcast=True)
        half = (bits >> 1) << 23
        rest = (bits << 23) - half
        one = 127 << 23
        return power * (half + one).to(tl.float32, bitcast=True) * (rest + one).to(tl.float32, bitcast=True)
    else:
        return tl.exp(x)
