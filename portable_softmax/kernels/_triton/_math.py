"""exp, log1p and tanh written out, so that a device and the interpreter give the same bits.

Triton's own exp is ex2.approx of a rounded product, whose error grows with the argument, and its
division is approximate. Here every step is an operation that IEEE 754 rounds correctly (add,
multiply, fma, div_rn) or moves bits, so the error can be measured on a CPU and is that of a GPU.
That takes kernels compiled without contraction: each launch passes enable_fp_fusion=False.

Each function takes float32 or float64, by the dtype of its first argument.
"""

import triton
import triton.language as tl


@triton.jit
def constant(value: tl.constexpr, like):
    """A number in the dtype of a tile, so that fma need not guess one."""
    return tl.full((1, 1), value, like.dtype)


@triton.jit
def divide(a, b):
    """a / b, correctly rounded: Triton's `/` is so for float64 only."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def difference_error(a, b, difference):
    """(a - b) - fl(a - b), exactly where all are finite and else 0 (Knuth's two-sum)."""
    t = difference - a
    error = (a - (difference - t)) - (b + t)
    return tl.where(error - error == 0.0, error, 0.0)


@triton.jit
def _power_of_two(n, like):
    """2^n for n in the range of normal exponents."""
    if like.dtype == tl.float64:
        return ((n + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _parts(x, error):
    """Return p and n with exp(x + error) = 2^n (1 + p), |n ln 2 - x| <= ln 2 / 2.

    x is cut off where exp has long been 0 or inf. Adding and subtracting 1.5 * 2^52 rounds to an
    integer and leaves it in the low bits. ln 2 is split so that n times its head is exact (Cody
    and Waite 1980); `error` joins where it is no longer small beside what is left.
    """
    if x.dtype == tl.float64:
        x = tl.minimum(tl.maximum(x, -746.0), 710.0)
        shifted = tl.fma(x, constant(1.4426950408889634, x), constant(6755399441055744.0, x))
        n = shifted.to(tl.int64, bitcast=True) - 0x4338000000000000
        k = shifted - 6755399441055744.0
        r = tl.fma(k, constant(-6.93147180369123816490e-01, x), x)
        r = tl.fma(k, constant(-1.90821492927058770002e-10, x), r) + error
        # Taylor's series: the first term left out is below 2^-57 for |r| <= 0.35.
        p = tl.fma(r, constant(1.6059043836821613e-10, x), constant(2.08767569878681e-09, x))
        p = tl.fma(p, r, constant(2.505210838544172e-08, x))
        p = tl.fma(p, r, constant(2.755731922398589e-07, x))
        p = tl.fma(p, r, constant(2.7557319223985893e-06, x))
        p = tl.fma(p, r, constant(2.48015873015873e-05, x))
        p = tl.fma(p, r, constant(0.0001984126984126984, x))
        p = tl.fma(p, r, constant(0.001388888888888889, x))
        p = tl.fma(p, r, constant(0.008333333333333333, x))
        p = tl.fma(p, r, constant(0.041666666666666664, x))
        p = tl.fma(p, r, constant(0.16666666666666666, x))
        p = tl.fma(p, r, constant(0.5, x))
        return tl.fma(p, r * r, r), n
    else:
        x = tl.minimum(tl.maximum(x, -104.0), 89.0)
        shifted = tl.fma(x, constant(1.4426950408889634, x), constant(12582912.0, x))
        n = shifted.to(tl.int32, bitcast=True) - 0x4B400000
        k = shifted - 12582912.0
        r = tl.fma(k, constant(-0.693145751953125, x), x)
        r = tl.fma(k, constant(-1.428606765330187e-06, x), r) + error
        # Cephes, expf: minimax on |r| <= 0.35.
        p = tl.fma(r, constant(1.9875691500e-4, x), constant(1.3981999507e-3, x))
        p = tl.fma(p, r, constant(8.3334519073e-3, x))
        p = tl.fma(p, r, constant(4.1665795894e-2, x))
        p = tl.fma(p, r, constant(1.6666665459e-1, x))
        p = tl.fma(p, r, constant(5.0000001201e-1, x))
        return tl.fma(p, r * r, r), n


@triton.jit
def exp(x, error):
    """exp(x + error) for a small error, within one unit in the last place, nan for nan."""
    p, n = _parts(x, error)
    # Two factors, so that neither leaves the normal range: only the last product is rounded.
    half = n >> 1
    y = (1.0 + p) * _power_of_two(half, x) * _power_of_two(n - half, x)
    return tl.where(x == x, y, x)


@triton.jit
def tanh(x):
    """(1 - E) / (1 + E) with E = exp(-2|x|), 1 - E without cancellation: within 3 units."""
    size = -2.0 * tl.abs(x)
    p, n = _parts(size, 0.0)
    n = tl.maximum(n, -80)  # far below one unit of 1
    scale = _power_of_two(n, x)
    minus = -tl.fma(scale, p, scale - 1.0)
    y = divide(minus, 2.0 - minus)
    y = tl.where(x < 0.0, -y, y)
    return tl.where(x == x, y, x)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1, within 1.5 units in the last place (the scheme of FreeBSD's log1p).

    1 + x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), the rounding error of 1 + x put back
    into f. With s = f / (2 + f) and a minimax polynomial R in s^2,
    log(1 + f) = f - (f^2/2 - s (f^2/2 + R)).
    """
    u = 1.0 + x
    lost = difference_error(x, -1.0 + x * 0.0, u)
    if x.dtype == tl.float64:
        bits = u.to(tl.int64, bitcast=True)
        k = (bits - 0x3FE6A09E667F3BCD) >> 52
        f = (bits - (k << 52)).to(tl.float64, bitcast=True) - 1.0
    else:
        bits = u.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    # 2^-k times what was lost; beyond 2^80 nothing is.
    f = f + tl.where(k < 80, lost * _power_of_two(-tl.minimum(k, 80), x), 0.0)
    s = divide(f, 2.0 + f)
    z = s * s
    half = 0.5 * f * f
    kf = k.to(x.dtype)
    if x.dtype == tl.float64:
        r = tl.fma(z, constant(1.479819860511658591e-01, x), constant(1.531383769920937332e-01, x))
        r = tl.fma(r, z, constant(1.818357216161805012e-01, x))
        r = tl.fma(r, z, constant(2.222219843214978396e-01, x))
        r = tl.fma(r, z, constant(2.857142874366239149e-01, x))
        r = tl.fma(r, z, constant(3.999999999940941908e-01, x))
        r = tl.fma(r, z, constant(6.666666666666735130e-01, x)) * z
        low = tl.fma(s, half + r, kf * 1.90821492927058770002e-10)
        y = tl.fma(kf, 6.93147180369123816490e-01, f - (half - low))
    else:
        r = tl.fma(z, constant(0.24279078841, x), constant(0.28498786688, x))
        r = tl.fma(r, z, constant(0.40000972152, x))
        r = tl.fma(r, z, constant(0.66666662693, x)) * z
        low = tl.fma(s, half + r, kf * 9.0580006145e-06)
        y = tl.fma(kf, 6.9313812256e-01, f - (half - low))
    y = tl.where(u == 0.0, float("-inf"), y)
    return tl.where((x - x == 0.0), y, x)  # an infinity or nan is its own answer


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter of Triton 3.9 cuts off what a device rounds: round the bits beforehand.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x - x == 0.0, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
