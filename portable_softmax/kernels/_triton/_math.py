"""exp, log1p and tanh written out, so that a device and the interpreter give the same bits.

Triton's own exp is ex2.approx of a rounded product, whose error grows with the argument, and its
division is approximate. Here every step is an operation that IEEE 754 rounds correctly (add,
multiply, fma, div_rn) or moves bits, so the error can be measured on a CPU and is that of a GPU.
Kernels must be compiled without contraction: each launch passes enable_fp_fusion=False. Results in
half precision need less: `quick_exp` is the device's own.

Each function takes float32 or float64, by the dtype of its first argument. All exponentials share
one range reduction (`_nearest`, `_reduced`) and one polynomial.
"""

import triton
import triton.language as tl


@triton.jit
def constant(value: tl.constexpr, like):
    """A constant in the dtype of a tile: Triton 3.7 rounds a bare number in fma to float32."""
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
    """(a - b) - fl(a - b), exactly where all are finite (Knuth's two-sum)."""
    t = difference - a
    return (a - (difference - t)) - (b + t)


@triton.jit
def _power_of_two(n, like):
    """2^n for n in the range of normal exponents."""
    if like.dtype == tl.float64:
        return ((n + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nearest(x, OFFSET: tl.constexpr):
    """n = x / ln 2 to the nearest integer, and a number whose low bits hold n + OFFSET.

    Adding 1.5 * 2^23 (2^52) rounds, and leaves the integer in the low bits.
    """
    if x.dtype == tl.float64:
        MAGIC: tl.constexpr = 6755399441055744.0 + OFFSET
    else:
        MAGIC: tl.constexpr = 12582912.0 + OFFSET
    shifted = tl.fma(x, constant(1.4426950408889634, x), constant(MAGIC, x))
    return shifted - MAGIC, shifted


@triton.jit
def _reduced(n, x, head):
    """x - head - n ln 2, for a head that is a multiple of 2^-14 (2^-32).

    The head of ln 2 is such a multiple as well, so that the first step loses nothing for a head
    below 256 (2048); the second one loses nothing beside what is left (Cody and Waite 1980).
    """
    if x.dtype == tl.float64:
        near = tl.fma(n, constant(-6.93147180369123816490e-01, x), -head) + x
        return tl.fma(n, constant(-1.90821492927058770002e-10, x), near)
    else:
        near = tl.fma(n, constant(-0.69317626953125, x), -head) + x
        return tl.fma(n, constant(2.9088971132296138e-05, x), near)


@triton.jit
def _exp_polynomial(r):
    """q with exp(r) = 1 + q r for |r| <= 0.3467."""
    if r.dtype == tl.float64:
        # Taylor series: the first omitted term is below 2^-57.
        q = tl.fma(r, constant(1.6059043836821613e-10, r), constant(2.08767569878681e-09, r))
        q = tl.fma(q, r, constant(2.505210838544172e-08, r))
        q = tl.fma(q, r, constant(2.755731922398589e-07, r))
        q = tl.fma(q, r, constant(2.7557319223985893e-06, r))
        q = tl.fma(q, r, constant(2.48015873015873e-05, r))
        q = tl.fma(q, r, constant(0.0001984126984126984, r))
        q = tl.fma(q, r, constant(0.001388888888888889, r))
        q = tl.fma(q, r, constant(0.008333333333333333, r))
        q = tl.fma(q, r, constant(0.041666666666666664, r))
        q = tl.fma(q, r, constant(0.16666666666666666, r))
        q = tl.fma(q, r, constant(0.5, r))
    else:
        # Minimax for the relative error of exp (Remez): 3e-9, and 0.72 units once rounded.
        q = tl.fma(r, constant(1.3814540579915047e-3, r), constant(8.368745446205139e-3, r))
        q = tl.fma(q, r, constant(4.166838899254799e-2, r))
        q = tl.fma(q, r, constant(1.6666521131992340e-1, r))
        q = tl.fma(q, r, constant(4.9999994039535522e-1, r))
    return tl.fma(q, r, constant(1.0, r))


@triton.jit
def _integer(shifted):
    """n as an integer, from the bits that hold it with no offset."""
    if shifted.dtype == tl.float64:
        return shifted.to(tl.int64, bitcast=True) - 0x4338000000000000
    else:
        return shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def exp(x):
    """exp(x) for any x, within one unit in the last place."""
    if x.dtype == tl.float64:
        x = tl.minimum(tl.maximum(x, -746.0, propagate_nan=tl.PropagateNan.ALL), 710.0,
                       propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
    else:
        x = tl.minimum(tl.maximum(x, -104.0, propagate_nan=tl.PropagateNan.ALL), 89.0,
                       propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
    n, shifted = _nearest(x, 0)
    r = _reduced(n, x, x * 0.0)
    y = tl.fma(_exp_polynomial(r), r, constant(1.0, x))
    # Two factors, both normal: only the last product is rounded.
    n = _integer(shifted)
    half = n >> 1
    return y * _power_of_two(half, x) * _power_of_two(n - half, x)


@triton.jit
def expm1(x):
    """exp(x) - 1 for any x, with its own digits near 0."""
    near = tl.abs(x) < 0.34  # where exp does not reduce x
    small = tl.where(near, x, 0.0)
    return tl.where(near, _exp_polynomial(small) * small, exp(x) - 1.0)


@triton.jit
def tanh(x):
    """(1 - E) / (1 + E) with E = exp(-2|x|), 1 - E without cancellation: within 3 units."""
    size = tl.maximum(-2.0 * tl.abs(x), -80.0)  # tanh is 1 there; nan is restored below
    n, shifted = _nearest(size, 0)
    r = _reduced(n, size, size * 0.0)
    scale = _power_of_two(_integer(shifted), x)
    minus = -tl.fma(scale, _exp_polynomial(r) * r, scale - 1.0)
    y = divide(minus, 2.0 - minus)
    y = tl.where(x < 0.0, -y, y)
    return tl.where(x == x, y, x)


# --- exp(x - m) for x <= m ----------------------------------------------------------------------

# The scale of exponentials: subnormal results are rounded once, when they are unscaled.
EXP_SCALE32 = tl.constexpr(2.0**32)
EXP_SCALE64 = tl.constexpr(2.0**64)


@triton.jit
def exp_scale(like):
    """The scale of exponentials, a power of two."""
    if like.dtype == tl.float64:
        return constant(EXP_SCALE64, like)
    else:
        return constant(EXP_SCALE32, like)


@triton.jit
def _exp_bits(n, shifted, x, head, error):
    """exp_scale * exp(x + error - head), with n + log2(exp_scale) in the bits of `shifted`."""
    r = _reduced(n, x, head) + error
    y = tl.fma(_exp_polynomial(r), r, constant(1.0, x))
    # The exponent is added to the bits.
    if x.dtype == tl.float64:
        bits = shifted.to(tl.int64, bitcast=True) << 52
        return (bits + y.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)
    else:
        bits = shifted.to(tl.int32, bitcast=True) << 23
        return (bits + y.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def lowest(like):
    """An argument at which exp rounds to 0."""
    if like.dtype == tl.float64:
        return constant(-746.0, like)
    else:
        return constant(-104.0, like)


@triton.jit
def _scaled(near, x, head, error):
    """exp_scale * exp(x + error - head), 0 where x - head is `lowest`; `near` is fl(x - head).

    The value at `lowest` is subtracted: at most half a unit of a subnormal number.
    """
    low = lowest(x)
    zero = low * 0.0
    if x.dtype == tl.float64:
        n, shifted = _nearest(near, 64)
        n_low, shifted_low = _nearest(low, 64)
    else:
        n, shifted = _nearest(near, 32)
        n_low, shifted_low = _nearest(low, 32)
    return _exp_bits(n, shifted, x, head, error) - _exp_bits(n_low, shifted_low, low, zero, zero)


@triton.jit
def split(m):
    """Split a maximum m for `scaled_exp`: m = base + head + tail.

    For large m, x - m is exact wherever exp(x - m) is not 0, and base is m. Otherwise head is m
    rounded to a multiple that `_reduced` takes, and tail, at most 2^-15 (2^-33), is left to a
    factor of the row.
    """
    if m.dtype == tl.float64:
        large = tl.abs(m) >= 2048.0
        head = (m + 1572864.0) - 1572864.0
    else:
        large = tl.abs(m) >= 256.0
        head = (m + 768.0) - 768.0
    head = tl.where(large, 0.0, head)
    return tl.where(large, m, 0.0), head, tl.where(large, 0.0, m - head)


@triton.jit
def scaled_exp(x, base, head):
    """exp_scale * exp(x - base - head), 0 where that rounds to 0; unspecified for a nan.

    Within one unit in the last place, also where exp is subnormal.
    """
    x = tl.maximum(x - base, head + lowest(head))
    return _scaled(x - head, x, head, x * 0.0)


@triton.jit
def scaled_exp_of(x, error):
    """exp_scale * exp(x + error), for an error that is small where exp(x) is not 0, or nan."""
    # This maximum of a nan and a number is the number. Half a unit of any x above `lowest` is less.
    error = tl.minimum(tl.maximum(error, -1.52587890625e-05), 1.52587890625e-05)
    x = tl.maximum(x, lowest(x))
    return _scaled(x, x, x * 0.0, error)


@triton.jit
def quick_exp(x):
    """exp_scale * exp(x) for results in half precision, by the device's approximate exp2.

    Its error and that of its argument stay below 2^-17.
    """
    return tl.exp2(tl.fma(x, constant(1.4426950408889634, x), constant(32.0, x)))


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1, within 1.5 units in the last place (the scheme of FreeBSD's log1p).

    1 + x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), the rounding error of 1 + x put back
    into f. With s = f / (2 + f) and a minimax polynomial R in s^2,
    log(1 + f) = f - (f^2/2 - s (f^2/2 + R)).
    """
    u = 1.0 + x
    lost = difference_error(x, -1.0 + x * 0.0, u)
    lost = tl.where(lost == lost, lost, 0.0)
    if x.dtype == tl.float64:
        bits = u.to(tl.int64, bitcast=True)
        k = (bits - 0x3FE6A09E667F3BCD) >> 52
        f = (bits - (k << 52)).to(tl.float64, bitcast=True) - 1.0
    else:
        bits = u.to(tl.int32, bitcast=True)
        k = (bits - 0x3F3504F3) >> 23
        f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    # 2^-k times the rounding error, which is 0 beyond 2^80.
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
        y = tl.fma(kf, constant(6.93147180369123816490e-01, x), f - (half - low))
    else:
        r = tl.fma(z, constant(0.24279078841, x), constant(0.28498786688, x))
        r = tl.fma(r, z, constant(0.40000972152, x))
        r = tl.fma(r, z, constant(0.66666662693, x)) * z
        low = tl.fma(s, half + r, kf * 9.0580006145e-06)
        y = tl.fma(kf, constant(6.9313812256e-01, x), f - (half - low))
    y = tl.where(u == 0.0, float("-inf"), y)
    return tl.where((x - x == 0.0), y, x)  # infinities and nan


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter of Triton 3.9 truncates where a device rounds: round the bits first.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x - x == 0.0, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
