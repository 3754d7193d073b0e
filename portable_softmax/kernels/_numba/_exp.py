"""exp and log1p written out, for numbers and for vectors, and the exponents of a softmax.

Both are within one unit in the last place. `exp_up(d)` is 2**64 * exp(d), for d <= 0: UP and DOWN
are the factor and its inverse. The factor keeps every exp above 0 a normal number down to where exp
itself rounds to 0: one multiplication scales the polynomial, and a division by a sum with the same
factor rounds once, also to subnormal numbers.

`t` stands for the temperature T: the integer 1 for none, or what `temperature` makes of it.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import overload

from portable_softmax.kernels._numba._compensation import difference_error
from portable_softmax.kernels._numba._jit import INLINED, function
from portable_softmax.kernels._numba._vectors import elementwise, fma, fused, product

UP, DOWN = 2.0**64, 2.0**-64


class Format(NamedTuple):
    """What exp and log1p need to know of a floating format."""

    bits: ir.Type
    mantissa: int
    bias: int
    lowest: float  # exp rounds to 0 from here downwards
    highest: float  # exp is inf from here upwards
    ln2: tuple[float, float]  # the first part times any exponent is exact
    exp: tuple[float, ...]
    log: tuple[float, ...]


# exp(r) = 1 + r + r**2 * q(r) on |r| <= log(2)/2, q fitted in 40 digits with Lawson's weights to
# the smallest relative error: 3.1e-9 and 3.6e-18. log1p: fdlibm's s_log1p.c and e_logf.c.
FORMATS = {
    "float": Format(
        bits=ir.IntType(32),
        mantissa=23,
        bias=127,
        lowest=-105.0,
        highest=90.0,
        ln2=(0.693359375, -2.12194440e-4),
        exp=(
            0.4999999345040558, 0.16666520675091812, 0.04166838761300896, 0.008368711360272556,
            0.0013814603019313672,
        ),
        log=(0.66666662693, 0.40000972152, 0.28498786688, 0.24279078841),
    ),
    "double": Format(
        bits=ir.IntType(64),
        mantissa=52,
        bias=1023,
        lowest=-746.0,
        highest=711.0,
        ln2=(6.93147180369123816490e-01, 1.90821492927058770002e-10),
        exp=(
            0.5000000000000011, 0.16666666666666413, 0.04166666666653023, 0.008333333333494218,
            0.001388888894360678, 0.00019841269507074274, 2.4801493127028698e-05,
            2.7557585969917054e-06, 2.763023711290513e-07, 2.5000174862750608e-08,
        ),
        log=(
            6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
            2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
            1.479819860511658591e-01,
        ),
    ),
}  # fmt: skip


class Writer:
    """Writes instructions on numbers of one format, or on vectors of them."""

    def __init__(self, builder, x):
        self.b, self.kind = builder, x.type
        self.lanes = x.type.count if isinstance(x.type, ir.VectorType) else 0
        self.f = FORMATS[str(x.type.element if self.lanes else x.type)]
        self.bits = ir.VectorType(self.f.bits, self.lanes) if self.lanes else self.f.bits

    def _constant(self, kind, value):
        return ir.Constant(kind, [value] * self.lanes if self.lanes else value)

    def number(self, value):
        # llvmlite wants what a float32 constant holds exactly.
        return self._constant(self.kind, _rounded(value, self.f.mantissa))

    def integer(self, value):
        return self._constant(self.bits, value)

    def fma(self, a, b, c):
        return fused(self.b, a, b, c)

    def polynomial(self, coefficients, x):
        *lower, value = (self.number(c) for c in coefficients)
        for c in reversed(lower):
            value = self.fma(value, x, c)
        return value

    def at_least(self, low, x):
        """The larger one, `x` where it is nan: one instruction in this order."""
        low = self.number(low)
        return self.b.select(self.b.fcmp_ordered(">", low, x), low, x)

    def at_most(self, high, x):
        high = self.number(high)
        return self.b.select(self.b.fcmp_ordered("<", high, x), high, x)

    def two_to(self, n):
        """2**n for an integer in the range of normal exponents."""
        shifted = self.b.add(n, self.integer(self.f.bias))
        return self.b.bitcast(self.b.shl(shifted, self.integer(self.f.mantissa)), self.kind)

    def reduced(self, x, offset):
        """Return exp(r) and bits that end in n + offset, for x = n * log(2) + r."""
        e, bits = self.reduced_less_one(x, offset)
        return self.b.fadd(e, self.number(1.0)), bits

    def reduced_less_one(self, x, offset):
        """The same with exp(r) - 1, to its own last digits.

        Adding a large number rounds to an integer and leaves it in the lowest bits.
        """
        f, b = self.f, self.b
        magic = self.number(1.5 * 2**f.mantissa + offset)
        t = self.fma(x, self.number(1 / math.log(2)), magic)
        n = b.fsub(t, magic)
        r = self.fma(n, self.number(-f.ln2[0]), x)
        r = self.fma(n, self.number(-f.ln2[1]), r)
        q = self.polynomial(f.exp, r)
        return self.fma(q, b.fmul(r, r), r), b.bitcast(t, self.bits)

    def tanh(self, x):
        """-m / (2 + m) for m = exp(-2 |x|) - 1, which keeps the digits of a small x."""
        f, b = self.f, self.b
        u = self.at_least(-80.0, b.fmul(self.number(-2.0), self.size(x)))
        m, n = self.reduced_less_one(u, f.bias)
        scale = b.bitcast(b.shl(n, self.integer(f.mantissa)), self.kind)
        m = self.fma(scale, m, b.fsub(scale, self.number(1.0)))
        y = b.fdiv(m, b.fadd(m, self.number(2.0)))
        return b.select(b.fcmp_ordered("<", x, self.number(0.0)), y, b.fneg(y))

    def size(self, x):
        """|x|."""
        return self.b.select(self.b.fcmp_ordered("<", x, self.number(0.0)), self.b.fneg(x), x)

    def exp_up(self, x):
        f, b = self.f, self.b
        # From here downwards the scale is 0: a factor that rounds to 0 would take a hundred times
        # as long as others do, and what is masked by -inf has no other.
        zero = self.number(-(f.bias + 64) * math.log(2))
        x = b.select(b.fcmp_ordered(">", self.number(f.lowest), x), zero, x)
        e, n = self.reduced(x, f.bias + 64)
        scale = b.bitcast(b.shl(n, self.integer(f.mantissa)), self.kind)
        return b.fmul(e, scale)

    def exp(self, x):
        f, b = self.f, self.b
        e, n = self.reduced(self.at_most(f.highest, self.at_least(f.lowest, x)), 0)
        # The lowest bits as a signed number, and in two steps: either may be a subnormal's.
        unused = self.integer(f.bits.width - f.mantissa + 1)
        n = b.ashr(b.shl(n, unused), unused)
        a = b.ashr(n, self.integer(1))
        return b.fmul(b.fmul(e, self.two_to(a)), self.two_to(b.sub(n, a)))

    def expm1(self, x):
        b = self.b
        m, _ = self.reduced_less_one(x, 0)
        far = b.fsub(self.exp(x), self.number(1.0))
        near = b.fcmp_ordered("<", self.size(x), self.number(0.34))  # x is not reduced
        return b.select(near, m, far)

    def log1p(self, x):
        f, b = self.f, self.b
        one = self.number(1.0)
        u = b.fadd(one, x)
        bits = b.bitcast(u, self.bits)
        # The exponent that leaves a significand in [sqrt(1/2), sqrt(2)).
        one_bits = f.bias << f.mantissa
        root = {23: 0x3F3504F3, 52: 0x3FE6A09E667F3BCD}[f.mantissa]
        up = b.add(bits, self.integer(one_bits - root))
        k = b.sub(b.lshr(up, self.integer(f.mantissa)), self.integer(f.bias))
        m = b.and_(up, self.integer((1 << f.mantissa) - 1))
        g = b.fsub(b.bitcast(b.add(m, self.integer(root)), self.kind), one)
        # What rounding 1 + x lost, in the way that is exact.
        small = b.fsub(x, b.fsub(u, one))
        large = b.fsub(one, b.fsub(u, x))
        positive = b.icmp_signed(">", k, self.integer(0))
        c = b.fdiv(b.select(positive, large, small), u)
        k = b.sitofp(k, self.kind)
        half = b.fmul(b.fmul(self.number(0.5), g), g)
        s = b.fdiv(g, b.fadd(self.number(2.0), g))
        z = b.fmul(s, s)
        r = b.fmul(z, self.polynomial(f.log, z))
        high, low = (0.69313812256, 9.0580006145e-06) if f.mantissa == 23 else f.ln2
        tail = b.fadd(b.fmul(s, b.fadd(half, r)), self.fma(k, self.number(low), c))
        return self.fma(k, self.number(high), b.fsub(g, b.fsub(half, tail)))


def _rounded(value: float, mantissa: int) -> float:
    return value if mantissa == 52 else struct.unpack("f", struct.pack("f", value))[0]


@elementwise
def exp_up(builder, d):
    """2**64 * exp(d) for d <= 0."""
    return Writer(builder, d).exp_up(d)


@elementwise
def exp(builder, x):
    """exp(x) for any x."""
    return Writer(builder, x).exp(x)


@elementwise
def expm1(builder, x):
    """exp(x) - 1 for any x, with its own digits near 0."""
    return Writer(builder, x).expm1(x)


@elementwise
def log1p(builder, x):
    """log(1 + x) for x >= 0."""
    return Writer(builder, x).log1p(x)


@elementwise
def where_positive(builder, d, value):
    """`value`, 0 where d is so low that exp(d) is 0, -inf included."""
    writer = Writer(builder, d)
    counts = builder.fcmp_unordered(">", d, writer.number(writer.f.lowest))  # or nan
    return builder.select(counts, value, writer.number(0.0))


# --------------------------------------------------------------------------- exponents


def temperature(value: float, dtype: Any) -> int | tuple[float, float, float]:
    """Return T as the kernels take it: 1 for none, else a scale and 1 / (scale * T) in two parts.

    The scale is a power of two that keeps x - m from overflowing before it is divided. The first
    part is rounded towards 0, so that the second is positive and -inf stays -inf.
    """
    if value == 1.0:
        return 1
    info = np.finfo(dtype)
    tiny = float(info.smallest_normal)
    large = 2.0 ** (info.maxexp // 2)
    scale = 0.5 if value < large else 1 / large
    inverse = 1 / (Fraction(value) * Fraction(scale))
    first = dtype(float(inverse))
    if Fraction(float(first)) > inverse:
        first = np.nextafter(first, dtype(0))
    return scale, float(first), max(float(inverse - Fraction(float(first))), tiny)


def difference(x, m, t):
    """x - m, times the scale of a temperature."""


@overload(difference, jit_options=INLINED)
def _difference(x, m, t):
    if isinstance(t, types.Integer):
        return lambda x, m, t: x - m
    return lambda x, m, t: fma(x, t[0], -product(m, t[0]))


def quotient(d, t):
    """(x - m) / T from the difference."""


@overload(quotient, jit_options=INLINED)
def _quotient(d, t):
    if isinstance(t, types.Integer):
        return lambda d, t: d
    return lambda d, t: fma(d, t[1], product(d, t[2]))


def quotient_error(x, m, d, q, t):
    """What the quotient q of the difference d lost; nan beside an infinity."""


@overload(quotient_error, jit_options=INLINED)
def _quotient_error(x, m, d, q, t):
    if isinstance(t, types.Integer):
        return lambda x, m, d, q, t: difference_error(x, m, d)

    def scaled(x, m, d, q, t):
        lost = difference_error(product(x, t[0]), product(m, t[0]), d)
        return fma(lost, t[1], fma(d, t[2], fma(d, t[1], -q)))

    return scaled


@function
def exponent(x, m, t):
    """(x - m) / T."""
    return quotient(difference(x, m, t), t)


@function
def compensated_exp_up(x, m, t):
    """2**64 * exp((x - m) / T), with what rounding the exponent lost put back to first order."""
    d = difference(x, m, t)
    q = quotient(d, t)
    e = exp_up(q)
    return where_positive(q, fma(e, quotient_error(x, m, d, q, t), e))
